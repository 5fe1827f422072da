//! What the standby has staged for paths that are not committed yet, by path and by content.

use std::collections::{BTreeMap, HashMap};

use twinbox_protocol::ids::ContentHash;
use twinbox_protocol::path::RelPath;
use twinbox_resync::manifest::Large;

use super::ahead::take_within;

/// A content the standby has staged for a path and that is not committed.
pub(super) struct Ahead {
    pub(super) hash: ContentHash,
    pub(super) size: u64,
    pub(super) ino: u64,
    pub(super) large: Option<Large>,
}

/// At most one content a path; one content may be staged for several.
#[derive(Default)]
pub(super) struct Staged {
    paths: BTreeMap<RelPath, Ahead>,
    uses: HashMap<ContentHash, usize>,
}

impl Staged {
    pub(super) fn get(&self, path: &RelPath) -> Option<&Ahead> {
        self.paths.get(path)
    }

    /// What the path had before.
    pub(super) fn insert(&mut self, path: RelPath, ahead: Ahead) -> Option<Ahead> {
        *self.uses.entry(ahead.hash).or_default() += 1;
        let old = self.paths.insert(path, ahead);
        old.inspect(|old| self.unused(old.hash))
    }

    pub(super) fn remove(&mut self, path: &RelPath) -> Option<Ahead> {
        let old = self.paths.remove(path);
        old.inspect(|old| self.unused(old.hash))
    }

    /// What a path and all below it have.
    pub(super) fn take_within(&mut self, dir: &RelPath) -> Vec<(RelPath, Ahead)> {
        let taken = take_within(&mut self.paths, dir);
        taken.iter().for_each(|(_, ahead)| self.unused(ahead.hash));
        taken
    }

    fn unused(&mut self, hash: ContentHash) {
        if let Some(uses) = self.uses.get_mut(&hash) {
            *uses -= 1;
            if *uses == 0 {
                self.uses.remove(&hash);
            }
        }
    }

    pub(super) fn holds(&self, hash: ContentHash) -> bool {
        self.uses.contains_key(&hash)
    }

    pub(super) fn hashes(&self) -> impl Iterator<Item = ContentHash> + '_ {
        self.uses.keys().copied()
    }

    pub(super) fn len(&self) -> usize {
        self.paths.len()
    }

    #[cfg(test)]
    pub(super) fn paths(&self) -> Vec<&RelPath> {
        self.paths.keys().collect()
    }
}
