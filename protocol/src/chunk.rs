//! Content-defined chunks of large files: where a file was cut, and what of it another content already has.
//!
//! FastCDC (Xia et al., USENIX ATC 2016, the 2020 variant) by the pinned `fastcdc` crate. A cut depends only on the bytes of its own chunk
//! (and on the end of the content), so after an in-place change only the chunks around it need to be cut again: [`rechunk`].

use std::collections::HashMap;

use fastcdc::v2020::FastCDC;
use serde::{Deserialize, Serialize};

/// Smallest chunk in bytes.
pub const MIN: usize = 4 * 1024;
/// Aim for this many bytes a chunk: an insertion costs one or two chunks, so small; a list costs 20 bytes a chunk, so not tiny.
pub const AVG: usize = 16 * 1024;
/// Largest chunk in bytes. A content up to this size is never chunked.
pub const MAX: usize = 64 * 1024;
/// Chunker and parameters: part of the handshake, because a chunker that cuts elsewhere finds nothing in common.
pub const CHUNKER: &str = "fastcdc-5.0.0/v2020/4096-16384-65536";

/// First 16 bytes of a chunk's BLAKE3. Only a hint where to copy from: the whole content's name is always checked.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct ChunkId(pub [u8; 16]);

impl ChunkId {
    /// Id of `bytes`.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        let mut id = [0; 16];
        id.copy_from_slice(&blake3::hash(bytes).as_bytes()[..16]);
        ChunkId(id)
    }
}

/// One chunk of a content; its offset is the sum of the lengths before it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Chunk {
    /// Content.
    pub id: ChunkId,
    /// Bytes.
    pub len: u32,
}

fn cut_at(bytes: &[u8]) -> usize {
    FastCDC::new(bytes, MIN, AVG, MAX).cut(0, bytes.len()).1
}

/// Cuts a content fed in order.
#[derive(Default)]
pub struct Chunker {
    buffer: Vec<u8>,
}

impl Chunker {
    /// Takes the next bytes; `sink` gets every chunk that is complete.
    pub fn update(&mut self, bytes: &[u8], mut sink: impl FnMut(Chunk, &[u8])) {
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() < 16 * MAX {
            return; // Cut in batches: moving the rest down is then rare.
        }
        self.drain(MAX, &mut sink);
    }

    /// Ends the content; `sink` gets the remaining chunks.
    pub fn finish(mut self, mut sink: impl FnMut(Chunk, &[u8])) {
        self.drain(1, &mut sink);
    }

    fn drain(&mut self, least: usize, sink: &mut impl FnMut(Chunk, &[u8])) {
        let mut at = 0;
        while self.buffer.len() - at >= least {
            let rest = &self.buffer[at..];
            let chunk = &rest[..cut_at(&rest[..rest.len().min(MAX)])];
            sink(Chunk { id: ChunkId::of(chunk), len: chunk.len() as u32 }, chunk);
            at += chunk.len();
        }
        self.buffer.drain(..at);
    }
}

/// Chunk list of a content that was changed in place: `old` list, the byte ranges that changed (sorted), the new length, and a reader of
/// the new content (`read(offset, len)` gives exactly the bytes there). Reads only around the changes.
///
/// # Errors
/// Whatever `read` fails with.
pub fn rechunk<E>(
    old: &[Chunk],
    dirty: &[(u64, u64)],
    new_len: u64,
    mut read: impl FnMut(u64, usize) -> Result<Vec<u8>, E>,
) -> Result<Vec<Chunk>, E> {
    let old_len: u64 = old.iter().map(|c| u64::from(c.len)).sum();
    let mut out = Vec::with_capacity(old.len());
    let (mut at, mut next, mut next_start, mut range) = (0u64, 0usize, 0u64, 0usize);
    while at < new_len {
        while next < old.len() && next_start < at {
            next_start += u64::from(old[next].len);
            next += 1;
        }
        if next < old.len() && next_start == at {
            let end = at + u64::from(old[next].len);
            while range < dirty.len() && dirty[range].1 <= at {
                range += 1;
            }
            let touched = range < dirty.len() && dirty[range].0 < end;
            // The last chunk was cut by the old end, not by its bytes.
            let by_end = end == old_len && new_len != old_len;
            if !touched && !by_end && end <= new_len {
                out.push(old[next]);
                at = end;
                continue;
            }
        }
        let window = read(at, (new_len - at).min(MAX as u64) as usize)?;
        let chunk = &window[..cut_at(&window)];
        out.push(Chunk { id: ChunkId::of(chunk), len: chunk.len() as u32 });
        at += chunk.len() as u64;
    }
    Ok(out)
}

/// Where chunks of a known content lie, to copy them from there.
#[derive(Default)]
pub struct ChunkMap(HashMap<ChunkId, (u64, u32)>);

impl ChunkMap {
    /// Indexes a chunk list.
    #[must_use]
    pub fn new(chunks: &[Chunk]) -> Self {
        let mut at = 0;
        ChunkMap(
            chunks
                .iter()
                .map(|c| {
                    let entry = (c.id, (at, c.len));
                    at += u64::from(c.len);
                    entry
                })
                .collect(),
        )
    }

    /// Offset of a chunk with this content and length.
    #[must_use]
    pub fn find(&self, chunk: Chunk) -> Option<u64> {
        self.0.get(&chunk.id).filter(|(_, len)| *len == chunk.len).map(|(at, _)| *at)
    }
}

/// 20 bytes a chunk: id, length.
#[must_use]
pub fn to_bytes(chunks: &[Chunk]) -> Vec<u8> {
    chunks.iter().flat_map(|c| c.id.0.into_iter().chain(c.len.to_le_bytes())).collect()
}

/// The reverse of [`to_bytes`]; `None` when the bytes are not such a list.
#[must_use]
pub fn from_bytes(bytes: &[u8]) -> Option<Vec<Chunk>> {
    let (chunks, rest) = bytes.as_chunks::<20>();
    if !rest.is_empty() {
        return None;
    }
    chunks
        .iter()
        .map(|c| Some(Chunk { id: ChunkId(c[..16].try_into().ok()?), len: u32::from_le_bytes(c[16..].try_into().ok()?) }))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn noise(len: usize, seed: u8) -> Vec<u8> {
        let mut out = vec![0; len];
        blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut out);
        out
    }

    fn chunks_of(bytes: &[u8], step: usize) -> Vec<Chunk> {
        let (mut chunker, mut out, mut seen) = (Chunker::default(), vec![], vec![]);
        for part in bytes.chunks(step) {
            chunker.update(part, |c, b| {
                out.push(c);
                seen.extend_from_slice(b);
            });
        }
        chunker.finish(|c, b| {
            out.push(c);
            seen.extend_from_slice(b);
        });
        assert!(seen == bytes);
        out
    }

    #[test]
    fn cut_points_of_the_pinned_release() {
        // Fails when a release of the chunker cuts elsewhere: then CHUNKER must change, so that old peers are told.
        let lens: Vec<u32> = chunks_of(&noise(200_000, 1), 1 << 20).iter().map(|c| c.len).collect();
        assert_eq!(lens.iter().sum::<u32>(), 200_000);
        assert_eq!(lens[..4], [42262, 23594, 17894, 18286], "{lens:?}");
    }

    #[test]
    fn feeding_in_other_pieces_cuts_the_same() {
        let bytes = noise(3_000_000, 2);
        assert_eq!(chunks_of(&bytes, 1 << 20), chunks_of(&bytes, 777));
        assert_eq!(from_bytes(&to_bytes(&chunks_of(&bytes, 777))), Some(chunks_of(&bytes, 777)));
    }

    #[test]
    fn an_insertion_costs_few_chunks() {
        let old = noise(4_000_000, 3);
        let mut new = old.clone();
        new.splice(5000..5000, noise(1024, 4));
        let map = ChunkMap::new(&chunks_of(&old, 1 << 20));
        let shipped: u32 = chunks_of(&new, 1 << 20).iter().filter(|c| map.find(**c).is_none()).map(|c| c.len).sum();
        assert!(shipped < 3 * MAX as u32, "{shipped}");
    }

    proptest! {
        #[test]
        fn rechunk_is_chunking_anew(len in 1usize..600_000, new_len in 1usize..600_000, at in 0usize..600_000, n in 1usize..5000) {
            let old = noise(len, 5);
            let mut new = old.clone();
            new.resize(new_len, 3);
            let (from, to) = (at.min(new_len), (at + n).min(new_len));
            new[from..to].fill(8);
            let mut dirty = vec![(from as u64, to as u64), (len.min(new_len) as u64, new_len as u64)];
            dirty.sort_unstable();
            let got = rechunk(&chunks_of(&old, 1 << 20), &dirty, new_len as u64, |o, l| Ok::<_, ()>(new[o as usize..o as usize + l].to_vec()));
            prop_assert_eq!(got, Ok(chunks_of(&new, 1 << 20)));
        }
    }
}
