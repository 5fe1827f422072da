//! An order-free digest of a whole manifest, updated in O(1) for each changed row.
//!
//! The digest is the wrapping sum of one keyed BLAKE3 hash a row, as four 64-bit lanes; the key is drawn at random for each mirror,
//! so nobody can choose rows that cancel out (Bellare and Micciancio, "A new paradigm for collision-free hashing", 1997: AdHash).
//! It compares bookkeeping: both nodes believe the same. Whether a disk holds what its node believes is `verify`'s question.

use serde::{Deserialize, Serialize};

use crate::entry::Entry;
use crate::path::RelPath;

/// Key of a mirror's digests: random, the same on both nodes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DigestKey(pub [u8; 32]);

/// Sum over rows. `Default` is the digest of nothing.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
pub struct Digest(pub [u64; 4]);

impl Digest {
    /// The hash of one row under `key`.
    #[must_use]
    pub fn row(key: &DigestKey, path: &RelPath, entry: &Entry) -> Digest {
        let mut hasher = blake3::Hasher::new_keyed(&key.0);
        hasher.update(&(path.as_bytes().len() as u64).to_le_bytes());
        hasher.update(path.as_bytes());
        let fields = postcard::to_stdvec(entry).unwrap_or_default();
        hasher.update(&fields);
        let hash = *hasher.finalize().as_bytes();
        let mut lanes = [0; 4];
        for (lane, bytes) in lanes.iter_mut().zip(hash.chunks_exact(8)) {
            *lane = u64::from_le_bytes(bytes.try_into().unwrap_or_default());
        }
        Digest(lanes)
    }

    /// Adds a row's hash.
    pub fn add(&mut self, row: Digest) {
        for (lane, other) in self.0.iter_mut().zip(row.0) {
            *lane = lane.wrapping_add(other);
        }
    }

    /// Takes a row's hash out again.
    pub fn sub(&mut self, row: Digest) {
        for (lane, other) in self.0.iter_mut().zip(row.0) {
            *lane = lane.wrapping_sub(other);
        }
    }

    /// 32 bytes, for storing.
    #[must_use]
    pub fn to_bytes(self) -> [u8; 32] {
        let mut bytes = [0; 32];
        for (to, lane) in bytes.chunks_exact_mut(8).zip(self.0) {
            to.copy_from_slice(&lane.to_le_bytes());
        }
        bytes
    }

    /// The reverse of [`Digest::to_bytes`].
    #[must_use]
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        let mut lanes = [0; 4];
        for (lane, from) in lanes.iter_mut().zip(bytes.chunks_exact(8)) {
            *lane = u64::from_le_bytes(from.try_into().unwrap_or_default());
        }
        Digest(lanes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::{Kind, Time};

    #[test]
    fn is_order_free_and_every_field_counts() {
        let key = DigestKey([7; 32]);
        let entry = Entry { kind: Kind::Dir, mode: 0o755, uid: 1, gid: 2, mtime: Time { secs: 3, nanos: 4 }, xattrs: vec![] };
        let (a, b) = (RelPath::new(b"a").unwrap(), RelPath::new(b"b").unwrap());
        let (ra, rb) = (Digest::row(&key, &a, &entry), Digest::row(&key, &b, &entry));
        let (mut x, mut y) = (Digest::default(), Digest::default());
        x.add(ra);
        x.add(rb);
        y.add(rb);
        y.add(ra);
        assert_eq!(x, y);
        x.sub(ra);
        assert_eq!(x, rb);
        assert_eq!(Digest::from_bytes(x.to_bytes()), x);
        let changed = |f: &dyn Fn(&mut Entry)| {
            let mut other = entry.clone();
            f(&mut other);
            Digest::row(&key, &a, &other)
        };
        assert_ne!(ra, changed(&|e| e.mode = 0o700));
        assert_ne!(ra, changed(&|e| e.uid = 9));
        assert_ne!(ra, changed(&|e| e.gid = 9));
        assert_ne!(ra, changed(&|e| e.mtime.nanos = 9));
        assert_ne!(ra, changed(&|e| e.kind = Kind::Fifo));
        assert_ne!(ra, Digest::row(&DigestKey([8; 32]), &a, &entry));
    }
}
