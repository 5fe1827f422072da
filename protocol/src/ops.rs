//! The language of the log: what a transaction does to the replica.
//!
//! A transaction is a list of [`Op`]s, carried in one or more [`LogFrame`]s; the last frame's [`Seal`] makes it take effect. Ops are applied in order.

use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

use crate::digest::Digest;
use crate::entry::{Entry, Time};
use crate::ids::{ContentHash, Lsn};
use crate::path::RelPath;

/// Contents up to this many bytes travel inside their op; it bounds what one op may hold in memory.
pub const INLINE_MAX: usize = 64 * 1024;
/// Most data bytes of one op (recipe or patch) in the log; more goes ahead on a bulk stream.
pub const OP_DATA_MAX: usize = 2 * 1024 * 1024;

/// Bytes an op counts for besides its path and data: see [`Op::weight`].
const OP_WEIGHT: usize = 64;
/// Most ops in one frame. A frame is closed once its ops weigh [`crate::outbox::PART_BYTES`], so there are never more; and an op of two
/// bytes takes a hundred times that in memory, so a peer is held to it before they are.
pub const FRAME_OPS_MAX: usize = crate::outbox::PART_BYTES / OP_WEIGHT + 1;

/// One piece of a content's recipe.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Seg {
    /// These bytes.
    Data(ByteBuf),
    /// A hole of so many bytes, read as zeros.
    Hole(u64),
    /// Bytes of a content the standby has.
    Copy {
        /// Its name.
        from: ContentHash,
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
}

/// How a file's bytes reach the standby. Their name and length are in the op's entry, and always checked.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Content {
    /// Here they are, at most [`INLINE_MAX`].
    Inline(ByteBuf),
    /// The standby has them already: no bytes travel.
    Known,
    /// To be put together from pieces.
    Recipe(Vec<Seg>),
    /// They went ahead on a bulk stream and are staged under their name.
    Staged,
}

/// Attributes of a path without its type and content.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Attrs {
    /// `mode & 0o7777`.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time.
    pub mtime: Time,
    /// Extended attributes, sorted by name.
    pub xattrs: Vec<(ByteBuf, ByteBuf)>,
}

impl Attrs {
    /// The attributes of `entry`.
    #[must_use]
    pub fn of(entry: &Entry) -> Self {
        Attrs { mode: entry.mode, uid: entry.uid, gid: entry.gid, mtime: entry.mtime, xattrs: entry.xattrs.clone() }
    }

    /// `entry` with these attributes.
    #[must_use]
    pub fn on(&self, entry: &Entry) -> Entry {
        let Attrs { mode, uid, gid, mtime, xattrs } = self.clone();
        Entry { kind: entry.kind.clone(), mode, uid, gid, mtime, xattrs }
    }
}

/// One change of the replica.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Op {
    /// A regular file gets new content as a new file that replaces whatever is there.
    Put {
        /// Where.
        path: RelPath,
        /// What it is then (a [`crate::entry::Kind::File`]).
        entry: Entry,
        /// Its bytes.
        content: Content,
    },
    /// Ranges of an existing file are overwritten in place, then its length set.
    Patch {
        /// Where.
        path: RelPath,
        /// What it is then.
        entry: Entry,
        /// Content it must have before.
        base: ContentHash,
        /// `(offset, bytes)`, ascending, not overlapping.
        writes: Vec<(u64, ByteBuf)>,
    },
    /// A directory, symbolic link, pipe or device is made, replacing whatever is there; a directory that exists is kept.
    Make {
        /// Where.
        path: RelPath,
        /// What it is then.
        entry: Entry,
    },
    /// As rename(2): replaces a file, or an empty directory, at `to`. A directory takes everything below it along.
    Rename {
        /// Old name.
        from: RelPath,
        /// New name.
        to: RelPath,
    },
    /// `to` becomes another name of the file `from`, replacing whatever is there.
    Link {
        /// Existing name.
        from: RelPath,
        /// New name.
        to: RelPath,
    },
    /// A file, or an empty directory, goes.
    Remove {
        /// Where.
        path: RelPath,
    },
    /// Attributes alone change.
    SetMeta {
        /// Where.
        path: RelPath,
        /// What they are then.
        attrs: Attrs,
    },
}

impl Op {
    /// The path the op leaves its result at (for a removal, the path that goes).
    #[must_use]
    pub fn path(&self) -> &RelPath {
        match self {
            Op::Put { path, .. } | Op::Patch { path, .. } | Op::Make { path, .. } | Op::Remove { path } | Op::SetMeta { path, .. } => path,
            Op::Rename { to, .. } | Op::Link { to, .. } => to,
        }
    }

    /// Roughly the bytes it takes in memory and on the wire before compression.
    #[must_use]
    pub fn weight(&self) -> usize {
        OP_WEIGHT
            + match self {
                Op::Put { path, content, .. } => {
                    path.as_bytes().len()
                        + match content {
                            Content::Inline(bytes) => bytes.len(),
                            Content::Recipe(segs) => segs.iter().map(|s| if let Seg::Data(d) = s { d.len() } else { 48 }).sum(),
                            Content::Known | Content::Staged => 0,
                        }
                }
                Op::Patch { path, writes, .. } => path.as_bytes().len() + writes.iter().map(|(_, b)| b.len() + 8).sum::<usize>(),
                Op::Rename { from, to } | Op::Link { from, to } => from.as_bytes().len() + to.as_bytes().len(),
                Op::Make { path, .. } | Op::Remove { path } | Op::SetMeta { path, .. } => path.as_bytes().len(),
            }
    }
}

/// Set on every txn before the first sync is complete: the replica is not yet at a cut.
pub const FLAG_INITIAL: u8 = 1;
/// A path could not be read and was left out; status says which.
pub const FLAG_PARTIAL: u8 = 2;
/// Not a cut: policy said that a group which never rests is sent as it is read, file by file.
pub const FLAG_FUZZY: u8 = 4;

/// Ends a transaction.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Seal {
    /// Digest of the whole manifest after this transaction.
    pub digest: Digest,
    /// Number of ops in all its frames.
    pub ops: u64,
}

/// A part of a transaction, as it is encoded on the log stream.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct LogFrame {
    /// Its position.
    pub lsn: Lsn,
    /// Position of the transaction before it.
    pub prev: Lsn,
    /// 0, 1, 2, … within the transaction.
    pub part: u32,
    /// `FLAG_*`.
    pub flags: u8,
    /// When the cut was taken: nanoseconds since 1970 by the primary's clock.
    pub captured_ns: i64,
    /// What to do, at most [`FRAME_OPS_MAX`].
    #[serde(deserialize_with = "crate::bounded::seq::<_, _, FRAME_OPS_MAX>")]
    pub ops: Vec<Op>,
    /// In the last part.
    pub seal: Option<Seal>,
}
