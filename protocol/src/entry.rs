//! What a path holds: type, permissions, owner, times, extended attributes, and the name of its content.
//!
//! An [`Entry`] is exactly what both nodes' manifests agree on; what only one machine knows (inode, ctime) is not here.

use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

use crate::ids::ContentHash;

/// Most extended attributes of one file we carry, and their bytes together: Linux limits a value to 64 KiB and a list to 64 KiB.
pub const XATTRS_MAX_BYTES: usize = 256 * 1024;

/// Seconds and nanoseconds since 1970, as the file system stores them.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug, Serialize, Deserialize)]
pub struct Time {
    /// Seconds since 1970, negative before.
    pub secs: i64,
    /// Nanoseconds, below 1e9.
    pub nanos: u32,
}

/// Type of a path, with what only that type has.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Kind {
    /// A regular file: size in bytes and the name of its content.
    File {
        /// Bytes.
        size: u64,
        /// BLAKE3 of the bytes.
        hash: ContentHash,
    },
    /// A directory.
    Dir,
    /// A symbolic link and its target's bytes, never followed.
    Symlink {
        /// The target as stored.
        target: ByteBuf,
    },
    /// A named pipe.
    Fifo,
    /// A character or block device; made on the standby only when it runs as root.
    Device {
        /// Block device, else character device.
        block: bool,
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
}

/// What a path holds, the same on both nodes.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Entry {
    /// Type.
    pub kind: Kind,
    /// Permission bits with set-user-id, set-group-id and sticky: `mode & 0o7777`.
    pub mode: u32,
    /// Owner, numeric.
    pub uid: u32,
    /// Group, numeric.
    pub gid: u32,
    /// Modification time.
    pub mtime: Time,
    /// Extended attributes (POSIX ACLs are among them), sorted by name.
    pub xattrs: Vec<(ByteBuf, ByteBuf)>,
}

impl Entry {
    /// Size in bytes of a regular file, 0 for anything else.
    #[must_use]
    pub fn size(&self) -> u64 {
        match self.kind {
            Kind::File { size, .. } => size,
            _ => 0,
        }
    }

    /// The content's name, for a regular file.
    #[must_use]
    pub fn hash(&self) -> Option<ContentHash> {
        match self.kind {
            Kind::File { hash, .. } => Some(hash),
            _ => None,
        }
    }

    /// Whether this is a directory.
    #[must_use]
    pub fn is_dir(&self) -> bool {
        matches!(self.kind, Kind::Dir)
    }

    /// Whether `other` is of the same type (a file stays a file), so that it can be changed in place.
    #[must_use]
    pub fn same_type(&self, other: &Entry) -> bool {
        std::mem::discriminant(&self.kind) == std::mem::discriminant(&other.kind)
    }
}
