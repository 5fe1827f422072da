//! Why a standby cannot start, or a session cannot go on.

use std::path::PathBuf;

use rustix::io::Errno;
use twinbox_protocol::codec::DecodeError;
use twinbox_protocol::ids::{ContentHash, Lsn};
use twinbox_protocol::msg::RefuseCode;
use twinbox_protocol::path::RelPath;
use twinbox_resync::redo::RedoError;
use twinbox_resync::rows::RowError;
use twinbox_resync::schema::StateError;

/// See the module's text. Shown to people on both nodes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StandbyError {
    /// The replica's directory is missing, closed to us or no directory.
    #[error("replica directory {path}: {detail}", path = path.display())]
    Root {
        /// Where.
        path: PathBuf,
        /// The system's words.
        detail: String,
    },
    /// Files of unknown origin are in the replica's directory.
    #[error("{path} is not empty and was never this mirror's replica: empty it, or start with --adopt to take its files over", path = path.display())]
    NotEmpty {
        /// Where.
        path: PathBuf,
    },
    /// The directory is empty although the manifest knows files.
    #[error("{path} is empty but its manifest has {rows} paths: is its file system mounted? To sync it anew start with --adopt", path = path.display())]
    Vanished {
        /// Where.
        path: PathBuf,
        /// Rows of the manifest.
        rows: u64,
    },
    /// Another directory than the one the manifest was made for.
    #[error("{path} is not the directory its manifest was made for (a copy, or another file system is mounted there): start with --adopt to take it over", path = path.display())]
    OtherRoot {
        /// Where.
        path: PathBuf,
    },
    /// A state file cannot be used.
    #[error("{detail}")]
    State {
        /// Words of [`StateError`], or the row store's.
        detail: String,
    },
    /// The redo log cannot be used.
    #[error("{detail}")]
    Redo {
        /// Words of [`RedoError`].
        detail: String,
    },
    /// A system call failed where nothing else could be done.
    #[error("{what}: {detail}")]
    Io {
        /// Doing what.
        what: String,
        /// The system's words.
        detail: String,
    },
    /// The primary sent what is not a log frame.
    #[error("log frame after LSN {after}: {source}")]
    Frame {
        /// Last position received.
        after: Lsn,
        /// Kind.
        source: DecodeError,
    },
    /// The primary sent a frame out of order.
    #[error("log out of order: after LSN {after} part {part} came {got}")]
    Order {
        /// Last sealed position.
        after: Lsn,
        /// Part expected.
        part: u32,
        /// What came.
        got: String,
    },
    /// Bytes do not have the name they were sent under.
    #[error("content {hash} arrived damaged (for {place})")]
    Damaged {
        /// Name announced.
        hash: ContentHash,
        /// Path, or `a bulk object`.
        place: String,
    },
    /// The primary cannot send a content we lack; it will look at the path again.
    #[error("content {hash} is gone on the primary; the session starts again")]
    Gone {
        /// Which.
        hash: ContentHash,
    },
    /// No room for what was sent.
    #[error("standby disk is full: {path} has {free} MiB free, {need} MiB are needed; it goes on by itself when there is room", path = path.display())]
    Full {
        /// Which file system.
        path: PathBuf,
        /// MiB free.
        free: u64,
        /// MiB needed.
        need: u64,
    },
    /// A session would not continue where the log ends.
    #[error("cannot begin after LSN {theirs}: the log here ends at LSN {ours}")]
    Position {
        /// Durable here.
        ours: Lsn,
        /// Asked for.
        theirs: Lsn,
    },
    /// An op does not fit the rows, or the digest differs after a txn.
    #[error("the manifests of both nodes differ at LSN {lsn} ({detail}); they are compared as a whole next")]
    Differs {
        /// Where.
        lsn: Lsn,
        /// What.
        detail: String,
    },
    /// A newer session or hello of this mirror took over.
    #[error("another session of this mirror took over")]
    Superseded,
    /// The standby ends.
    #[error("the standby is stopping")]
    Stopped,
    /// A failure that only a restart clears.
    #[error("{why}; mend it and restart the agent")]
    Latched {
        /// First failure.
        why: String,
    },
}

impl StandbyError {
    pub(super) fn io(what: impl Into<String>, error: impl std::fmt::Display) -> Self {
        StandbyError::Io { what: what.into(), detail: error.to_string() }
    }
}

impl From<StateError> for StandbyError {
    fn from(error: StateError) -> Self {
        StandbyError::State { detail: error.to_string() }
    }
}

impl From<RedoError> for StandbyError {
    fn from(error: RedoError) -> Self {
        StandbyError::Redo { detail: error.to_string() }
    }
}

impl From<RowError> for StandbyError {
    fn from(error: RowError) -> Self {
        StandbyError::State { detail: error.to_string() }
    }
}

/// Why a hello is answered with no.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// Kind.
    pub code: RefuseCode,
    /// For people.
    pub message: String,
}

impl Refusal {
    pub(super) fn failed(error: &StandbyError) -> Self {
        Refusal { code: RefuseCode::Failed, message: error.to_string() }
    }
}

/// Why an op was not performed.
#[derive(Debug)]
pub(super) enum OpError {
    /// It does not fit the rows.
    Rows(RowError),
    /// The system said no at a path.
    Sys(RelPath, Errno),
    /// The file does not hold, or would not get, the content it must have.
    Content(RelPath),
    /// The standby ends, or the applier cannot go on at all.
    Fatal(StandbyError),
}

impl From<RowError> for OpError {
    fn from(error: RowError) -> Self {
        match error {
            RowError::Store { detail } => OpError::Fatal(StandbyError::State { detail }),
            other => OpError::Rows(other),
        }
    }
}
