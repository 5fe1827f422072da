//! The standby's half of a mirror: what arrives is made durable, acknowledged, and applied to the replica.
//!
//! ```text
//! Session::frame ─▶ receiver thread ─▶ redo log ─▶ fdatasync ─▶ Durable      applier thread ◀─ reads the redo log back
//! ObjectWriter ─▶ staging/ (fsync) ─▶ Staged                                   └▶ replica, manifest.db, checkpoint
//! ```
//! `receiver` orders and acknowledges, `resolve` turns references into bytes, `staging` keeps large ones, `applier` and `apply` make replica and
//! manifest follow, `replica`, `attrs`, `patch`, `copy` and `rescue` touch files, `recover` brings a tree that was interrupted to the log's end, `adopt` takes over
//! files that are here; `content` gives contents back to a primary that lost them, `verify` looks at and mends single paths. Each thread owns its state; see ARCHITECTURE §2 and §6.

mod adopt;
mod applier;
mod apply;
pub(crate) mod attrs;
mod content;
pub(crate) mod copy;
mod error;
mod object;
mod patch;
mod receiver;
mod recent;
mod recover;
pub(crate) mod replica;
pub(crate) mod rescue;
mod resolve;
mod room;
mod shared;
mod staging;
mod start;
mod verify;

use std::path::PathBuf;
use std::sync::Arc;
#[cfg(test)]
use std::sync::atomic::Ordering;
use std::sync::mpsc::Sender;
use std::thread::JoinHandle;

use tokio::sync::oneshot;
use twinbox_protocol::codec::{DecodeError, LOG_FRAME_MAX};
use twinbox_protocol::ids::{ContentHash, Epoch, Lsn};
use twinbox_protocol::lineage::Lineage;
use twinbox_protocol::msg::{Hello, Position, Replica, ToPrimary};
use twinbox_resync::node::MirrorState;

use applier::Cmd;
pub use error::{Refusal, StandbyError};
pub use object::ObjectWriter;
use receiver::Event;
pub use shared::StandbyStatus;
use shared::{SessionShared, Shared};
use staging::Staging;
pub(crate) use verify::{How, Mend, Mended};

/// What a standby needs to know.
pub struct StandbyConfig {
    /// Name of the mirror.
    pub mirror: String,
    /// The replica's directory.
    pub root: PathBuf,
    /// `<node state>/mirrors/<name>`: `manifest.db`, `redo/`, `staging/`, `rescue/`.
    pub state_dir: PathBuf,
    /// Take over files that are in the directory already.
    pub adopt: bool,
    /// The redo log is not let grow past this (one txn aside).
    pub redo_max_bytes: u64,
    /// Called when the first sync becomes complete, or a new one begins; on the applier's thread.
    pub on_complete: Box<dyn Fn(bool) + Send>,
}

/// A running standby; owns its threads. Dropped or stopped, it applies what is durable and makes a last checkpoint.
pub struct Standby {
    handle: StandbyHandle,
    threads: Vec<JoinHandle<()>>,
}

/// Talks to a running standby.
#[derive(Clone)]
pub struct StandbyHandle {
    events: Sender<Event>,
    applier: Sender<Cmd>,
    staging: Arc<Staging>,
    shared: Arc<Shared>,
}

impl Standby {
    /// Opens the state, brings the replica to the end of the redo log, and starts. Blocks until that is done.
    /// `known`: what the node remembers of this mirror, if it has ever followed it.
    ///
    /// # Errors
    /// [`StandbyError`]; nothing was changed that a later start would miss.
    pub fn start(config: StandbyConfig, known: Option<&MirrorState>) -> Result<Standby, StandbyError> {
        start::start(config, known)
    }

    /// For talking to it.
    #[must_use]
    pub fn handle(&self) -> StandbyHandle {
        self.handle.clone()
    }

    /// Applies what is durable, makes a checkpoint and ends. Blocks until that is done.
    pub fn stop(self) {}

    /// Ends as a killed process does: nothing is finished, nothing committed.
    #[cfg(test)]
    pub(crate) fn crash(self) {
        self.handle.shared.crash.store(true, Ordering::Relaxed);
    }
}

impl Drop for Standby {
    fn drop(&mut self) {
        let _ = self.handle.events.send(Event::Stop);
        for (at, thread) in self.threads.drain(..).enumerate() {
            if at == 1 {
                let _ = self.handle.applier.send(Cmd::Stop);
            }
            if thread.join().is_err() {
                tracing::error!("a thread of the standby panicked");
            }
        }
    }
}

impl StandbyHandle {
    async fn answer<T>(&self, event: Event, reply: oneshot::Receiver<Result<T, StandbyError>>) -> Result<T, StandbyError> {
        self.events.send(event).map_err(|_| StandbyError::Stopped)?;
        reply.await.map_err(|_| StandbyError::Stopped)?
    }

    /// Applies everything received, then says what we have. A digest key other than ours is taken over, the digest computed anew.
    ///
    /// # Errors
    /// [`Refusal`] when the standby cannot work now.
    pub async fn replica(&self, hello: &Hello) -> Result<Replica, Refusal> {
        let (reply, answer) = oneshot::channel();
        let stopped = || Refusal::failed(&StandbyError::Stopped);
        self.events.send(Event::Hello { hello: Box::new(hello.clone()), reply }).map_err(|_| stopped())?;
        answer.await.map_err(|_| stopped())?
    }

    /// Notes the history this node follows, for later hellos; the caller has stored it (in `state.db`) before.
    pub fn follow(&self, lineage: Lineage, epoch: Epoch) {
        let _ = self.applier.send(Cmd::Follow(Box::new(lineage), epoch));
    }

    /// Sends the manifest's rows (those changed after `since`, and the paths gone since), in batches, then `RowsEnd`.
    ///
    /// # Errors
    /// [`StandbyError`], also when the receiving end is gone.
    pub async fn pull(&self, since: Option<Lsn>, out: tokio::sync::mpsc::Sender<ToPrimary>) -> Result<(), StandbyError> {
        let (reply, answer) = oneshot::channel();
        self.answer(Event::Pull { since, out, reply }, answer).await
    }

    /// A session begins after `from`: our durable position, or with `reset` any that is not lower, which is then committed as ours. An older session ends;
    /// parts of a txn that was never sealed are taken back.
    ///
    /// # Errors
    /// [`StandbyError`].
    pub async fn begin(
        &self,
        from: Position,
        reset: bool,
        out: tokio::sync::mpsc::UnboundedSender<ToPrimary>,
    ) -> Result<Session, StandbyError> {
        let (reply, answer) = oneshot::channel();
        let shared = self.answer(Event::Begin { from, reset, out, reply }, answer).await?;
        Ok(Session { handle: self.clone(), shared })
    }

    /// For `status`.
    #[must_use]
    pub fn status(&self) -> StandbyStatus {
        self.shared.status()
    }
}

/// An open session. Dropped, it is over.
pub struct Session {
    handle: StandbyHandle,
    shared: Arc<SessionShared>,
}

impl Session {
    fn error(&self) -> StandbyError {
        self.shared.error().unwrap_or(StandbyError::Stopped)
    }

    /// Takes the body of one log frame. Waits while too much is queued.
    ///
    /// # Errors
    /// Why the session has failed.
    pub async fn frame(&self, body: Vec<u8>) -> Result<(), StandbyError> {
        if body.len() > LOG_FRAME_MAX {
            let after = self.handle.shared.status().durable.lsn;
            let error = StandbyError::Frame { after, source: DecodeError::TooLarge { len: body.len(), max: LOG_FRAME_MAX } };
            self.shared.fail(error.clone());
            return Err(error);
        }
        let room = (body.len() / 1024 + 1) as u32;
        let room = self.shared.budget.clone().acquire_many_owned(room).await.map_err(|_| self.error())?;
        let event = Event::Frame { session: self.shared.id, body, _room: room };
        self.handle.events.send(event).map_err(|_| StandbyError::Stopped)
    }

    /// A bulk object begins to arrive: resolves when there is room for one more.
    ///
    /// # Errors
    /// The disk's: the session has failed then, or the primary would wait for this object for ever.
    pub async fn object(&self) -> Result<ObjectWriter, StandbyError> {
        let room = self.shared.objects.clone().acquire_owned().await.map_err(|_| self.error())?;
        if self.shared.is_over() {
            return Err(self.error());
        }
        let StandbyHandle { events, applier, staging, .. } = self.handle.clone();
        ObjectWriter::new(self.shared.clone(), staging, events, applier, room).inspect_err(|error| self.shared.fail(error.clone()))
    }

    /// The primary cannot send a content that was missed: the session fails, the primary looks at the path again.
    pub fn gone(&self, hash: ContentHash) {
        let _ = self.handle.events.send(Event::Gone { session: self.shared.id, hash });
    }

    /// The primary does not have a content that was wanted.
    pub fn lacks(&self, hash: ContentHash) {
        self.shared.note_lacking(hash);
    }

    /// No txn will name this staged object.
    pub fn unstage(&self, hash: ContentHash) {
        self.handle.staging.release(hash);
    }

    /// These objects of sessions before may be named by txns to come; when the `last` were said, no others.
    pub fn keep(&self, hashes: Vec<ContentHash>, last: bool) {
        if let Some(all) = self.shared.note_kept(hashes, last).filter(|_| !self.shared.is_over()) {
            self.handle.staging.keep(&all);
        }
    }

    /// The primary has stored everything up to `lsn`: tombstones up to there may go.
    pub fn stored(&self, lsn: Lsn) {
        let _ = self.handle.applier.send(Cmd::Stored(lsn));
    }

    /// Resolves when the session cannot go on.
    pub fn failed(&self) -> impl Future<Output = StandbyError> + Send + use<> {
        let mut watch = self.shared.watch();
        async move {
            match watch.wait_for(Option::is_some).await {
                Ok(error) => error.clone().unwrap_or(StandbyError::Stopped),
                Err(_) => StandbyError::Stopped,
            }
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.handle.events.send(Event::Ended { session: self.shared.id });
    }
}

#[cfg(test)]
mod tests;
