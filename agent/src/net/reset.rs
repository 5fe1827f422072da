//! Stateless resets (RFC 9000 §10.3) that outlive a restart.
//!
//! A node that was killed knows nothing of its old connections; the peer would keep talking into the void until its idle timeout. With a reset key that follows from the node's key, the new process
//! answers a packet of an unknown connection with the very token that the old one had announced, and the peer connects anew at once.

use std::sync::Arc;

use quinn::crypto::{CryptoError, HmacKey};
use quinn::{ConnectionId, ConnectionIdGenerator, EndpointConfig};

/// Keyed BLAKE3.
pub(super) struct ResetKey([u8; blake3::KEY_LEN]);

impl ResetKey {
    /// From the node's private key.
    pub(super) fn new(secret: &[u8]) -> Self {
        ResetKey(blake3::derive_key("twinbox 2026-11 stateless reset of QUIC connections", secret))
    }

    /// An endpoint whose resets the peers of its earlier lives understand.
    pub(super) fn endpoint(self: &Arc<Self>) -> EndpointConfig {
        let mut config = EndpointConfig::new(self.clone());
        config.cid_generator(|| Box::new(Ids));
        config
    }
}

const ID: usize = 8;

/// Random connection ids. The library's own carry a mark of the process, by which a new process would take those of the old one for junk.
struct Ids;

impl ConnectionIdGenerator for Ids {
    fn generate_cid(&mut self) -> ConnectionId {
        let mut id = [0; ID];
        // The kernel gives this much at once, always (getrandom(2)); were it not so, ids would only be easier to guess.
        let _ = rustix::rand::getrandom(&mut id[..], rustix::rand::GetRandomFlags::empty());
        ConnectionId::new(&id)
    }

    fn cid_len(&self) -> usize {
        ID
    }

    fn cid_lifetime(&self) -> Option<std::time::Duration> {
        None
    }
}

impl HmacKey for ResetKey {
    fn sign(&self, data: &[u8], signature_out: &mut [u8]) {
        blake3::Hasher::new_keyed(&self.0).update(data).finalize_xof().fill(signature_out);
    }

    fn signature_len(&self) -> usize {
        blake3::OUT_LEN
    }

    fn verify(&self, data: &[u8], signature: &[u8]) -> Result<(), CryptoError> {
        let right = blake3::keyed_hash(&self.0, data);
        // `Hash` compares in constant time.
        let given: [u8; blake3::OUT_LEN] = signature.try_into().map_err(|_| CryptoError)?;
        if right == blake3::Hash::from_bytes(given) { Ok(()) } else { Err(CryptoError) }
    }
}
