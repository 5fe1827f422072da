//! Messages of the control stream. One control stream a mirror; the primary dials.
//!
//! Order: `Hello` → `Welcome` or `Refuse`; then, as the comparison of both says, `Pull` → `Rows`…; then `Begin`, after which log and
//! bulk streams are open. A stream that begins with `Borrow` carries nothing but `Fetch` and its answers. A primary that lost power says `Fetch` → `Names` if there are more → `Piece`… → `Fetched` or `NotHere` instead of `Begin`, as often as it needs. `Heartbeat`s go both ways at any time after `Welcome`.

use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

use crate::digest::{Digest, DigestKey};
use crate::entry::Entry;
use crate::ids::{ChainHash, ContentHash, Epoch, Generation, Incarnation, Lsn, MirrorId};
use crate::lineage::Lineage;
use crate::path::RelPath;
use crate::rejoin::{ASKS_MAX, Ask, Changes, Found, Merge, Merged};

/// Most rows in one message. A row of two bytes takes near a hundred times that in memory, so a peer is held to it.
pub const ROWS_MAX: usize = 16 * 1024;

/// Staged objects named in one [`ToStandby::Keep`].
pub const KEEP_MAX: usize = 16 * 1024;

/// Most paths of one [`ToPrimary::Names`].
pub const NAMES_MAX: usize = 64;

/// Most bytes of one [`ToPrimary::Piece`].
pub const PIECE_MAX: usize = 256 * 1024;

/// A place in the log: its number and the hash of everything up to it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Position {
    /// Number.
    pub lsn: Lsn,
    /// Chain hash at it.
    pub chain: ChainHash,
}

impl Position {
    /// Before the first transaction.
    pub const START: Position = Position { lsn: Lsn::ZERO, chain: ChainHash::ZERO };
}

/// What the primary says first.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Hello {
    /// [`crate::PROTOCOL_VERSION`].
    pub protocol: u32,
    /// Agent's version, for people.
    pub software: String,
    /// Its node.
    pub node: String,
    /// Which mirror, by name.
    pub mirror: String,
    /// Which mirror, by id.
    pub mirror_id: MirrorId,
    /// History it writes.
    pub lineage: Lineage,
    /// Promotions it knows of.
    pub epoch: Epoch,
    /// This run of the agent.
    pub incarnation: Incarnation,
    /// Last position it knows to be durable on the standby.
    pub position: Position,
    /// Digest of its manifest at that position.
    pub digest: Digest,
    /// Key of the mirror's digests.
    pub digest_key: DigestKey,
    /// [`crate::chunk::CHUNKER`].
    pub chunker: String,
    /// Layout name.
    pub layout: String,
    /// Its wall clock, nanoseconds since 1970.
    pub wall_ns: i64,
}

/// What the standby has.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Replica {
    /// Nothing: an empty directory.
    Empty,
    /// Files of unknown origin, taken over by the operator's `--adopt`, with a manifest made from them.
    Adopted {
        /// Rows in that manifest.
        rows: u64,
    },
    /// A replica of this mirror.
    Holds {
        /// History it follows.
        lineage: Lineage,
        /// Promotions it knows of.
        epoch: Epoch,
        /// Durable position.
        position: Position,
        /// Digest of its manifest there.
        digest: Digest,
        /// Chain hash it remembers at the primary's position, if it still does.
        chain_at_yours: Option<ChainHash>,
        /// It is at a cut.
        complete: bool,
    },
}

/// The standby's answer.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Welcome {
    /// [`crate::PROTOCOL_VERSION`].
    pub protocol: u32,
    /// Agent's version, for people.
    pub software: String,
    /// Its node.
    pub node: String,
    /// This run of the agent.
    pub incarnation: Incarnation,
    /// [`crate::chunk::CHUNKER`].
    pub chunker: String,
    /// What it has.
    pub replica: Replica,
    /// Its wall clock, nanoseconds since 1970.
    pub wall_ns: i64,
}

/// Why a node will not take part; shown to people on both sides.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum RefuseCode {
    /// Another protocol version or chunker.
    Version,
    /// No mirror of that name here, or it is not a standby.
    NoSuchMirror,
    /// Histories do not agree.
    Diverged,
    /// The replica's directory holds files that are not this mirror's.
    NotEmpty,
    /// The standby cannot work now (disk, damage).
    Failed,
    /// Another session of this mirror is open.
    Busy,
}

/// From the primary.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum ToStandby {
    /// First message.
    Hello(Box<Hello>),
    /// Send manifest rows: those changed after an LSN, or all.
    Pull {
        /// `None`: all.
        since: Option<Lsn>,
    },
    /// The log goes on from here.
    Begin {
        /// The first txn will name this as its predecessor.
        from: Position,
        /// Both manifests were just made equal: take `from` over as the durable position, and this primary's generation as the history.
        reset: bool,
    },
    /// Still here.
    Heartbeat {
        /// Counts up.
        seq: u64,
        /// Wall clock, ns since 1970.
        wall_ns: i64,
        /// The primary has stored everything up to here in its own manifest.
        stored: Lsn,
    },
    /// The bytes asked for by [`ToPrimary::Miss`] are not there any more.
    Gone {
        /// Which content.
        hash: ContentHash,
    },
    /// Send a content back: this disk lost it. Before `Begin` only.
    Fetch {
        /// A path whose row has it.
        path: RelPath,
        /// Its name.
        hash: ContentHash,
    },
    /// No txn will name this staged object: its file changed before it was committed.
    Unstage {
        /// Its name.
        hash: ContentHash,
    },
    /// Objects staged in sessions before that this primary still wants; those it does not name are let go of when the last were named.
    Keep {
        /// At most [`KEEP_MAX`].
        #[serde(deserialize_with = "crate::bounded::seq::<_, _, KEEP_MAX>")]
        hashes: Vec<ContentHash>,
        /// That was all.
        last: bool,
    },
    /// Instead of `Hello`: this node was primary, the other was promoted after it. See [`crate::rejoin`].
    Rejoin(Box<Hello>),
    /// Questions about the other's store as it is now.
    Ask {
        /// At most [`ASKS_MAX`].
        #[serde(deserialize_with = "crate::bounded::seq::<_, _, ASKS_MAX>")]
        asks: Vec<Ask>,
    },
    /// What has the other changed since the fork?
    Changes,
    /// Make this change there too.
    Merge(Box<Merge>),
    /// The next bytes of a message, at most [`PIECE_MAX`].
    Piece {
        /// They.
        bytes: ByteBuf,
    },
    /// That was all of it.
    End,
    /// Instead of `Hello`: this node was primary until now and has nothing that the other lacks; be primary. Answered by `Begun` or `Refuse`.
    TakeOver {
        /// Which mirror.
        mirror: String,
        /// The history both follow.
        generation: Generation,
    },
    /// Instead of `Hello`: contents are to be given back (`Fetch`), beside the session; `verify` has found them damaged here.
    Borrow {
        /// Which mirror, by name.
        mirror: String,
        /// Which mirror, by id.
        mirror_id: MirrorId,
    },
    /// The content asked for by [`ToPrimary::Want`] is not here, or not any more.
    Lacks {
        /// Its name.
        hash: ContentHash,
    },
}

/// From the standby.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum ToPrimary {
    /// Answer to the hello.
    Welcome(Box<Welcome>),
    /// No. The stream ends after it.
    Refuse {
        /// Kind.
        code: RefuseCode,
        /// For people: what, and what to do.
        message: String,
    },
    /// Part of the answer to a pull: a path and its entry, or `None` when it is gone.
    Rows {
        /// Some rows, at most [`ROWS_MAX`].
        #[serde(deserialize_with = "crate::bounded::seq::<_, _, ROWS_MAX>")]
        rows: Vec<(RelPath, Option<Entry>)>,
    },
    /// End of the answer to a pull.
    RowsEnd {
        /// Rows are as of here.
        position: Position,
        /// Digest there.
        digest: Digest,
    },
    /// Answer to `Begin`: log and bulk streams may be opened.
    Begun,
    /// Everything up to here survives a power cut.
    Durable {
        /// Position.
        lsn: Lsn,
    },
    /// Everything up to here is visible in the replica.
    Applied {
        /// Position.
        lsn: Lsn,
    },
    /// A bulk object is staged, durable, and has the name it was announced with.
    Staged {
        /// Its name.
        hash: ContentHash,
    },
    /// A content the primary took for known is not found: send it on a bulk stream.
    Miss {
        /// Its name.
        hash: ContentHash,
    },
    /// Still here.
    Heartbeat {
        /// Echo of the sequence number.
        seq: u64,
        /// Wall clock, ns since 1970.
        wall_ns: i64,
    },
    /// Something is wrong on the standby; the session goes on.
    Problem {
        /// For people.
        message: String,
    },
    /// The next bytes of the content asked for by [`ToStandby::Fetch`], at most [`PIECE_MAX`].
    Piece {
        /// They.
        bytes: ByteBuf,
    },
    /// Before a content that is asked for: other names of the same file, some of them if there are many.
    Names {
        /// At most [`NAMES_MAX`].
        #[serde(deserialize_with = "crate::bounded::seq::<_, _, NAMES_MAX>")]
        paths: Vec<RelPath>,
    },
    /// That was all of it.
    Fetched {
        /// Its name.
        hash: ContentHash,
    },
    /// No file of the replica has it.
    NotHere {
        /// Its name.
        hash: ContentHash,
    },
    /// A bulk object could not be put together: a content it copies from is not here any more, or not yet. Nobody waits for it: read the file again and send every byte.
    Incomplete {
        /// The name it was announced with.
        hash: ContentHash,
    },
    /// Answers to [`ToStandby::Ask`], in order.
    Found {
        /// `None`: nothing.
        #[serde(deserialize_with = "crate::bounded::seq::<_, _, ASKS_MAX>")]
        found: Vec<Option<Found>>,
    },
    /// Answer to [`ToStandby::Changes`].
    Changed(Box<Changes>),
    /// Answer to [`ToStandby::Merge`].
    Merged(Merged),
    /// The replica's file is not what its row says: send its content on a bulk stream, or say `Lacks`. Nothing waits for it.
    Want {
        /// A path that has it.
        path: RelPath,
        /// Its name.
        hash: ContentHash,
    },
}

/// First frame on a unidirectional stream opened by the primary.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum StreamHead {
    /// The log of a mirror: one zstd stream of length-prefixed [`crate::ops::LogFrame`]s.
    Log {
        /// Which.
        mirror: String,
    },
    /// One content: one zstd stream of length-prefixed [`crate::ops::Seg`]s.
    Bulk {
        /// Which.
        mirror: String,
        /// Its name is not known before its end: `BulkEnd` carries it. This number tells objects apart in messages of people.
        id: u64,
    },
}

/// An item of a bulk stream.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum BulkItem {
    /// The next piece.
    Seg(crate::ops::Seg),
    /// That was all.
    End {
        /// Name of the whole.
        hash: ContentHash,
        /// Bytes of the whole.
        size: u64,
    },
}
