//! Small contents that passed through lately: one message to a hundred users is one content and a hundred references.

use std::collections::{BTreeMap, VecDeque};

use twinbox_protocol::ids::ContentHash;

/// Bytes kept.
const BYTES: usize = 16 * 1024 * 1024;

/// First in, first out.
#[derive(Default)]
pub(super) struct Recent {
    kept: BTreeMap<ContentHash, Vec<u8>>,
    order: VecDeque<ContentHash>,
    bytes: usize,
}

impl Recent {
    pub(super) fn find(&self, hash: ContentHash) -> Option<&[u8]> {
        self.kept.get(&hash).map(Vec::as_slice)
    }

    pub(super) fn note(&mut self, hash: ContentHash, bytes: &[u8]) {
        if self.kept.contains_key(&hash) {
            return;
        }
        self.bytes += bytes.len() + 128;
        self.kept.insert(hash, bytes.to_vec());
        self.order.push_back(hash);
        while self.bytes > BYTES {
            let Some(old) = self.order.pop_front() else { return };
            if let Some(bytes) = self.kept.remove(&old) {
                self.bytes -= bytes.len() + 128;
            }
        }
    }

    pub(super) fn clear(&mut self) {
        *self = Recent::default();
    }
}
