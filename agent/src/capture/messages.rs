//! What the capture thread is told and what it tells: its only doors.
//!
//! Commands come through an unbounded queue, but each sender waits for an answer or is bounded by the in-flight window; a byte in an eventfd wakes the thread.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::{mpsc, oneshot};
use twinbox_protocol::digest::Digest;
use twinbox_protocol::entry::Entry;
use twinbox_protocol::hello::Refusal;
use twinbox_protocol::ids::{ContentHash, Generation, Lsn};
use twinbox_protocol::msg::{BulkItem, Hello, Position, Welcome};
use twinbox_protocol::path::RelPath;

use super::bulk::BulkResult;
use super::fence::{Begun, FenceRequest, NoTxn};
use super::pulse::{Pulse, Stall, stall};
use super::verify::Known;

/// What the link does next, after the capture compared memories.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Step {
    /// Ask for manifest rows.
    Pull(Option<Lsn>),
    /// Begin the log after this position; `reset` when the standby must take it over as its own.
    Begin {
        /// Where.
        from: Position,
        /// Both manifests were just made equal; the log starts anew.
        reset: bool,
    },
}

/// To the link task of the session.
#[derive(Debug)]
pub enum ToLink {
    /// Bodies of one txn's frames, to be flushed together.
    Txn(Vec<Vec<u8>>),
    /// The content asked for is gone.
    Gone(ContentHash),
    /// The content that `verify` wants is not here.
    Lacks(ContentHash),
    /// A staged object no txn will name.
    Unstage(ContentHash),
    /// Staged objects of sessions before that are still wanted, some of them.
    Keep {
        /// They.
        hashes: Vec<ContentHash>,
        /// That was all.
        last: bool,
    },
    /// Everything up to here is in the primary's own manifest.
    Stored(Lsn),
}

/// To the link task of the session, on the bulk queue.
#[derive(Debug)]
pub enum BulkMessage {
    /// The next item of object `id`; the first opens its stream.
    Item(u64, BulkItem),
    /// The object cannot be finished: reset its stream.
    Abort(u64),
}

/// Commands to the capture thread.
#[derive(Debug)]
pub enum Command {
    /// A session is being opened: what do we say?
    Hello(oneshot::Sender<Hello>),
    /// What the standby answered.
    Welcome(Box<Welcome>, oneshot::Sender<Result<Step, Refusal>>),
    /// Rows of a pull.
    Rows(Vec<(RelPath, Option<Entry>)>),
    /// End of a pull.
    RowsEnd(Position, Digest, oneshot::Sender<Result<Step, Refusal>>),
    /// The log may flow.
    Up {
        /// Tells sessions apart.
        id: u64,
        /// Txns.
        out: mpsc::UnboundedSender<ToLink>,
        /// Bulk objects.
        bulk: mpsc::Sender<BulkMessage>,
        /// The standby's node.
        peer: String,
    },
    /// The session is over.
    Down(u64),
    /// From the standby.
    Durable(Lsn),
    /// From the standby.
    Applied(Lsn),
    /// From the standby.
    Staged(ContentHash),
    /// From the standby.
    Miss(ContentHash),
    /// The standby's `verify` wants the content of a path.
    Want(RelPath, ContentHash),
    /// What is known of some paths, for `verify`.
    Known(Vec<RelPath>, oneshot::Sender<Option<Vec<Known>>>),
    /// Paths whose file has this inode number.
    NamesOf(u64, oneshot::Sender<Vec<RelPath>>),
    /// Changes of these paths were missed: look at them.
    Recheck(Vec<RelPath>),
    /// The standby could not put a bulk object together.
    Incomplete(ContentHash),
    /// A heartbeat came back.
    Heard,
    /// From the bulk thread.
    Bulk(Box<BulkResult>),
    /// Files mapped for writing, all there are.
    Mapped(BTreeSet<RelPath>),
    /// Answer when everything that is dirty now is applied on the standby.
    Sync(oneshot::Sender<()>),
    /// Answer when everything that has changed by now, below some paths, is safe.
    Fence(FenceRequest),
    /// Keep a group from being cut.
    TxnBegin {
        /// Any path of the group.
        path: RelPath,
        /// For this long at most.
        time: Duration,
        /// Its number.
        reply: Begun,
    },
    /// Let the group be cut again. The answer: a path that a fence of the group may name.
    TxnEnd {
        /// Number; `None`: the only one of the group.
        id: Option<u64>,
        /// Any path of the group.
        path: Option<RelPath>,
        /// The group.
        reply: oneshot::Sender<Result<RelPath, NoTxn>>,
    },
    /// Other exclusions.
    Reselect(Box<(crate::layout::Selection, crate::layout::Grouping)>),
    /// End. Sends nothing more.
    Stop,
}

/// A published summary.
#[derive(Clone, Debug, Default)]
pub struct CaptureStatus {
    /// A session is up and the first sync is complete.
    pub protected: bool,
    /// A session is up.
    pub connected: bool,
    /// The first sync is complete.
    pub complete: bool,
    /// The newest term of the history that is written.
    pub generation: Option<Generation>,
    /// Last LSN issued, last durable, last applied.
    pub lsn: (Lsn, Lsn, Lsn),
    /// Paths not yet durable on the standby.
    pub pending_paths: u64,
    /// Their bytes, as far as read.
    pub pending_bytes: u64,
    /// Age of the oldest change not durable, in ms.
    pub lag_ms: u64,
    /// Age of the last proof that the pipeline works (an acknowledgement with nothing older pending), in ms; `None` before the first.
    pub bound_ms: Option<u64>,
    /// When this was published.
    pub at: Option<Instant>,
    /// Last word of the standby.
    pub heard: Option<Instant>,
    /// Since when something is in flight and nothing became durable.
    pub unacknowledged_since: Option<Instant>,
    /// Since when something is durable there and nothing was applied.
    pub unapplied_since: Option<Instant>,
    /// Directories watched.
    pub watches: u64,
    /// Overflows of the kernel's queue since start.
    pub overflows: u64,
    /// What the store's file system cannot prove.
    pub warnings: Vec<String>,
    /// Paths that could not be read, and why.
    pub unreadable: BTreeMap<RelPath, String>,
    /// Since when unprotected.
    pub unprotected_since: Option<SystemTime>,
    /// Txns issued.
    pub txns: u64,
    /// Files whose content or metadata travelled.
    pub files: u64,
    /// Bytes of captured content.
    pub bytes: u64,
    /// Entries looked at by the running comparison; 0 when none runs.
    pub scanned: u64,
    /// A comparison runs.
    pub scanning: bool,
    /// Last thing that went wrong.
    pub last_error: Option<(SystemTime, String)>,
    /// Txns that are no cuts, by policy.
    pub fuzzy_cuts: u64,
    /// Plans that did not fit, so that their paths were looked at again.
    pub replanned: u64,
    /// Rounds that were spoiled.
    pub spoiled_rounds: u64,
    /// Why the mirror ended, if it did.
    pub failed: Option<String>,
    /// Median and 99th percentile of capture ▶ durable over the last 1,000 txns, in µs.
    pub durable_us: (u64, u64),
}

/// Speaks to a capture thread.
#[derive(Clone)]
pub struct CaptureHandle {
    pub(super) commands: Sender<Command>,
    pub(super) wake: Arc<OwnedFd>,
    pub(super) status: Arc<Mutex<CaptureStatus>>,
    pub(super) pulse: Arc<Pulse>,
}

impl CaptureHandle {
    /// Gives a command; `false` when the thread has ended.
    pub fn send(&self, command: Command) -> bool {
        let sent = self.commands.send(command).is_ok();
        let _ = rustix::io::write(&*self.wake, &1u64.to_ne_bytes()); // Full means: it will wake anyway.
        sent
    }

    /// Gives a command that answers; `None` when the thread has ended.
    pub async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        if !self.send(command(reply)) {
            return None;
        }
        answer.await.ok()
    }

    /// The last published summary; its ages are those of now, also when the thread hangs.
    #[must_use]
    pub fn status(&self) -> CaptureStatus {
        let mut status = self.status.lock().map(|s| s.clone()).unwrap_or_default();
        let older = status.at.map_or(0, |at| at.elapsed().as_millis() as u64);
        status.bound_ms = status.bound_ms.map(|bound| bound + older);
        status.lag_ms += if status.lag_ms > 0 { older } else { 0 };
        status
    }

    /// Where the pipeline hangs, if it does.
    #[must_use]
    pub fn stall(&self) -> Option<Stall> {
        let pulse = self.pulse.now();
        let status = self.status.lock().map(|s| s.clone()).unwrap_or_default();
        if status.failed.is_some() { None } else { stall(pulse, &status, Instant::now()) }
    }
}
