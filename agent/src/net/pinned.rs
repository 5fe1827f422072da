//! The peers this node trusts: public key → node name, shared by every verifier and changeable while running.
//!
//! Invariants: a name belongs to one key at most, so a newly paired node cannot pass for another one by taking its name;
//! what is here at the moment of a handshake decides it.
//!
//! It does not persist anything, nor close the connections of a peer that is unpinned: whoever unpins does both.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use super::identity::Fingerprint;

/// Shared set of trusted keys. Clones are handles to the same set.
#[derive(Debug, Clone, Default)]
pub struct PinnedPeers(Arc<RwLock<BTreeMap<Fingerprint, String>>>);

/// The name is already another key's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the name {node} already belongs to the key {holder}: choose another name, or unpair that node first")]
pub struct NameTaken {
    /// The contested name.
    pub node: String,
    /// The key that has it.
    pub holder: Fingerprint,
}

impl PinnedPeers {
    /// No peer trusted yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Trusts `peer` under the name `node`; a peer already known is renamed.
    pub fn pin(&self, peer: Fingerprint, node: &str) -> Result<(), NameTaken> {
        let mut peers = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(holder) = holder(&peers, node).filter(|holder| *holder != peer) {
            let node = node.to_owned();
            return Err(NameTaken { node, holder });
        }
        peers.insert(peer, node.to_owned());
        Ok(())
    }

    /// Trusts `peer` no more; returns the name it had.
    pub fn unpin(&self, peer: &Fingerprint) -> Option<String> {
        let mut peers = self.0.write().unwrap_or_else(PoisonError::into_inner);
        peers.remove(peer)
    }

    /// Replaces the whole set (a reload). Nothing changes if two keys of the new set share a name.
    pub fn replace(&self, new: BTreeMap<Fingerprint, String>) -> Result<(), NameTaken> {
        for (peer, node) in &new {
            if let Some(holder) = holder(&new, node).filter(|holder| holder != peer) {
                let node = node.clone();
                return Err(NameTaken { node, holder });
            }
        }
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = new;
        Ok(())
    }

    /// The name of a trusted key; `None` means not trusted.
    pub fn name_of(&self, peer: &Fingerprint) -> Option<String> {
        let peers = self.0.read().unwrap_or_else(PoisonError::into_inner);
        peers.get(peer).cloned()
    }

    /// The key of a named node.
    pub fn find(&self, node: &str) -> Option<Fingerprint> {
        holder(&self.0.read().unwrap_or_else(PoisonError::into_inner), node)
    }

    /// All of them, as of now.
    pub fn snapshot(&self) -> BTreeMap<Fingerprint, String> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn holder(peers: &BTreeMap<Fingerprint, String>, node: &str) -> Option<Fingerprint> {
    peers.iter().find_map(|(peer, name)| (name == node).then_some(*peer))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_has_one_key() {
        let [a, b] = [1, 2].map(|n| Fingerprint::from_bytes([n; 32]));
        let peers = PinnedPeers::new();
        peers.pin(a, "east").unwrap();
        peers.pin(a, "east").unwrap();
        let taken = peers.pin(b, "east").unwrap_err();
        assert_eq!(taken.holder, a);
        assert_eq!(peers.name_of(&b), None);
        peers.pin(b, "west").unwrap();
        assert_eq!(peers.find("west"), Some(b));

        let clash = BTreeMap::from([(a, "x".to_owned()), (b, "x".to_owned())]);
        assert!(peers.replace(clash).is_err());
        assert_eq!(peers.snapshot().len(), 2);
        peers.replace(BTreeMap::from([(b, "east".to_owned())])).unwrap();
        assert_eq!(peers.name_of(&a), None);
        assert_eq!(peers.unpin(&b).as_deref(), Some("east"));
    }
}
