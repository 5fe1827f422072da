//! Chunks shipped lately: where the standby can copy them from. A bounded hint; a wrong one costs a round trip.

use std::collections::{HashMap, VecDeque};
use std::sync::Mutex;

use twinbox_protocol::chunk::{Chunk, ChunkId};
use twinbox_protocol::ids::ContentHash;

use super::look::KnownChunks;

/// Chunks remembered: at 16 KiB each this covers the last GiB, in about 6 MiB of memory.
const KEPT: usize = 65_536;

/// See the module's text.
#[derive(Default)]
pub struct RecentChunks {
    map: HashMap<ChunkId, (ContentHash, u64, u32)>,
    order: VecDeque<ChunkId>,
}

impl RecentChunks {
    /// Remembers the chunks of a content that is being shipped.
    pub(super) fn add(&mut self, content: ContentHash, chunks: &[Chunk]) {
        let mut at = 0;
        for chunk in chunks {
            if self.map.insert(chunk.id, (content, at, chunk.len)).is_none() {
                self.order.push_back(chunk.id);
            }
            at += u64::from(chunk.len);
        }
        while self.order.len() > KEPT {
            if let Some(old) = self.order.pop_front() {
                self.map.remove(&old);
            }
        }
    }

    /// Forgets everything (the standby may have lost it).
    pub(super) fn clear(&mut self) {
        self.map.clear();
        self.order.clear();
    }
}

impl KnownChunks for Mutex<RecentChunks> {
    fn find(&self, chunk: Chunk) -> Option<(ContentHash, u64)> {
        self.lock().ok()?.map.get(&chunk.id).filter(|(_, _, len)| *len == chunk.len).map(|(content, at, _)| (*content, *at))
    }
}
