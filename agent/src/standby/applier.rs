//! The applier thread: reads the redo log back up to what is durable and makes replica and manifest follow.
//!
//! Owns the replica's tree and `manifest.db`. Rows change in one open SQLite transaction between checkpoints; a checkpoint is `syncfs` through a descriptor opened
//! before the writes, then rows and position in one commit, then old redo segments and staged objects go: the manifest is never ahead of the disk.
//! Checkpoints happen between txns only. A failure of the manifest or of `syncfs` ends all work until a restart, which recovers from the redo log.

use std::collections::VecDeque;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use rustix::fs as rfs;
use tokio::sync::oneshot;
use twinbox_protocol::ids::{ContentHash, Epoch, Lsn};
use twinbox_protocol::lineage::Lineage;
use twinbox_protocol::msg::{Hello, NAMES_MAX, Position, RefuseCode, Replica as Holding, ToPrimary};
use twinbox_protocol::ops::{Content, FLAG_INITIAL, Op, Seal};
use twinbox_protocol::path::RelPath;
use twinbox_resync::manifest::Manifest;
use twinbox_resync::redo::{self, Record, RedoReader};
use twinbox_resync::rows::Rows;

use super::error::{OpError, Refusal, StandbyError};
use super::patch::Trees;
use super::receiver::Event;
use super::replica::Replica;
use super::rescue::Rescue;
use super::rescue::Why;
use super::shared::{Alive, Shared};
use super::staging::Staging;
use super::verify::{Mend, Mended};
use crate::verify::judge::Looked;

/// A checkpoint at the latest after so long …
const CHECKPOINT_EVERY: Duration = Duration::from_secs(5);
/// … or so many bytes of redo …
const CHECKPOINT_BYTES: u64 = 16 * 1024 * 1024;
/// … or when nothing came for so long.
const CHECKPOINT_IDLE: Duration = Duration::from_secs(1);
/// How often a write is tried again while the disk is full.
pub(super) const RETRY_EVERY: Duration = Duration::from_secs(1);

pub(super) type Reply<T> = Box<dyn FnOnce(T) + Send>;

/// What the applier is asked.
pub(super) enum Cmd {
    /// Records up to here are durable: apply them.
    Durable(Position),
    /// Files that should hold this content, opened; `hint` is a path that may have it.
    Fetch { hash: ContentHash, hint: Option<RelPath>, reply: Reply<Vec<File>> },
    /// Other names of the file at this path.
    Names { path: RelPath, reply: Reply<Vec<RelPath>> },
    /// What is at some paths, and their rows, between two txns.
    Look { paths: Vec<RelPath>, reply: Reply<Result<Vec<Looked>, StandbyError>> },
    /// Bring a path to what its row says.
    Mend { mend: Mend, reply: Reply<Mended> },
    /// Everything durable is applied.
    Barrier { reply: Reply<Result<(), StandbyError>> },
    /// As [`super::StandbyHandle::replica`].
    Hello { hello: Box<Hello>, reply: oneshot::Sender<Result<Holding, Refusal>> },
    /// As [`super::StandbyHandle::pull`].
    Pull { since: Option<Lsn>, out: tokio::sync::mpsc::Sender<ToPrimary>, reply: oneshot::Sender<Result<(), StandbyError>> },
    /// The log goes on after `from`.
    Begin { from: Position, reset: bool, reply: Reply<Result<(), StandbyError>> },
    /// Make room in the redo log.
    Checkpoint,
    /// The primary has stored everything up to here.
    Stored(Lsn),
    /// Something changed that a wait may depend on.
    Wake,
    /// This node follows that history.
    Follow(Box<Lineage>, Epoch),
    /// Apply what is durable, checkpoint, end.
    Stop,
}

/// See the module's text.
pub(super) struct Applier {
    pub(super) shared: Arc<Shared>,
    pub(super) staging: Arc<Staging>,
    pub(super) replica: Replica,
    pub(super) manifest: Manifest,
    pub(super) rescue: Rescue,
    pub(super) trees: Trees,
    pub(super) adopting: bool,
    pub(super) adopting_mark: PathBuf,
    pub(super) known: Option<(Lineage, Epoch)>,
    pub(super) redo_dir: PathBuf,
    pub(super) applied: Position,
    pub(super) on_complete: Box<dyn Fn(bool) + Send>,
    pub(super) commands: Receiver<Cmd>,
    pub(super) events: mpsc::Sender<Event>,
    reader: RedoReader,
    backlog: VecDeque<Cmd>,
    target: Position,
    stored: Lsn,
    redo_bytes: u64,
    checkpointed: Instant,
    dirty: bool,
    dead: Option<StandbyError>,
    stopping: bool,
    /// In the txn being applied: what did not fit.
    pub(super) trouble: Vec<String>,
    /// In the txn being applied: bytes of content and files written.
    pub(super) files: u64,
    pub(super) rescued: u64,
}

/// What a new applier is made of.
pub(super) struct Parts {
    pub(super) shared: Arc<Shared>,
    pub(super) staging: Arc<Staging>,
    pub(super) replica: Replica,
    pub(super) manifest: Manifest,
    pub(super) rescue: Rescue,
    pub(super) adopting: bool,
    pub(super) adopting_mark: PathBuf,
    pub(super) known: Option<(Lineage, Epoch)>,
    pub(super) redo_dir: PathBuf,
    pub(super) applied: Position,
    pub(super) on_complete: Box<dyn Fn(bool) + Send>,
}

/// Bytes of content an op (its references resolved) brings to the replica.
pub(super) fn content_bytes(op: &Op, staging: &Staging) -> u64 {
    match op {
        Op::Put { entry, content: Content::Staged, .. } => entry.hash().map_or(0, |hash| staging.takes(hash)),
        Op::Put { entry, .. } => entry.size(),
        Op::Patch { writes, .. } => writes.iter().map(|(_, bytes)| bytes.len() as u64).sum(),
        _ => 0,
    }
}

/// Bytes a record counts for in the redo log.
pub(super) fn record_bytes(record: &Record) -> u64 {
    64 + record.frame.ops.iter().map(|op| op.weight() as u64).sum::<u64>()
}

impl Applier {
    pub(super) fn new(parts: Parts, commands: Receiver<Cmd>, events: mpsc::Sender<Event>) -> Self {
        let Parts { shared, staging, replica, manifest, rescue, adopting, adopting_mark, known, redo_dir, applied, on_complete } = parts;
        Applier {
            reader: RedoReader::new(&redo_dir, applied.lsn),
            shared,
            staging,
            replica,
            manifest,
            rescue,
            trees: Trees::default(),
            adopting,
            adopting_mark,
            known,
            redo_dir,
            applied,
            on_complete,
            commands,
            events,
            backlog: VecDeque::new(),
            target: applied,
            stored: Lsn::ZERO,
            redo_bytes: 0,
            checkpointed: Instant::now(),
            dirty: false,
            dead: None,
            stopping: false,
            trouble: vec![],
            files: 0,
            rescued: 0,
        }
    }

    /// The thread's body.
    pub(super) fn run(mut self) {
        let _alive = Alive { shared: self.shared.clone(), events: self.events.clone() };
        while !self.stopping {
            let command = match self.backlog.pop_front() {
                Some(command) => Some(command),
                None if self.dirty => match self.commands.recv_timeout(CHECKPOINT_IDLE) {
                    Ok(command) => Some(command),
                    Err(RecvTimeoutError::Timeout) => None,
                    Err(RecvTimeoutError::Disconnected) => break,
                },
                None => match self.commands.recv() {
                    Ok(command) => Some(command),
                    Err(mpsc::RecvError) => break,
                },
            };
            if self.shared.crashed() {
                return;
            }
            let done = match command {
                None => self.checkpoint(),
                Some(command) => self.handle(command),
            };
            if let Err(error) = done.and_then(|()| self.catch_up()) {
                self.die(error);
            }
            if self.shared.crashed() {
                return;
            }
        }
        if self.dead.is_none()
            && let Err(error) = self.catch_up().and_then(|()| self.checkpoint())
        {
            tracing::error!(%error, "the last checkpoint failed; the redo log is replayed at the next start");
        }
    }

    fn die(&mut self, error: StandbyError) {
        if error != StandbyError::Stopped && self.dead.is_none() {
            self.shared.refuse(&error.to_string());
        }
        self.dead.get_or_insert(error);
        let _ = self.events.send(Event::Progress);
    }

    fn handle(&mut self, command: Cmd) -> Result<(), StandbyError> {
        if let Some(dead) = self.dead.clone() {
            self.refuse(command, &dead);
            return Ok(());
        }
        match command {
            Cmd::Durable(position) => self.target = position,
            Cmd::Fetch { hash, hint, reply } => {
                reply(self.fetch(hash, hint.as_ref()));
                self.restore_dirs()?;
            }
            Cmd::Names { path, reply } => reply(self.names(&path)),
            Cmd::Look { paths, reply } => {
                self.catch_up()?;
                let looked = self.look_at(paths);
                self.restore_dirs()?;
                reply(looked);
            }
            Cmd::Mend { mend, reply } => {
                self.catch_up()?;
                reply(self.mend(&mend)?);
            }
            Cmd::Barrier { reply } => {
                self.catch_up()?;
                reply(Ok(()));
            }
            Cmd::Hello { hello, reply } => {
                self.catch_up()?;
                let answer = self.hello(&hello);
                // It may have made a checkpoint: one that failed is not tried again, for what the system kept of it is not known.
                let failed = answer.as_ref().err().cloned();
                let _ = reply.send(answer.map_err(|error| Refusal::failed(&error)));
                return failed.map_or(Ok(()), Err);
            }
            Cmd::Pull { since, out, reply } => {
                self.catch_up()?;
                let _ = reply.send(self.pull(since, &out));
            }
            Cmd::Begin { from, reset, reply } => {
                self.catch_up()?;
                if reset {
                    self.checkpoint_at(from)?;
                }
                self.reader = RedoReader::new(&self.redo_dir, self.applied.lsn);
                // What was received and taken back does not count any more.
                self.shared.redo_bytes.store(self.redo_bytes, Ordering::Relaxed);
                self.shared.unapplied.store(0, Ordering::Relaxed);
                reply(Ok(()));
            }
            Cmd::Checkpoint => {
                self.checkpoint()?;
                let _ = self.events.send(Event::Progress);
            }
            Cmd::Stored(lsn) => {
                self.dirty |= lsn > self.stored && self.manifest.in_transaction();
                self.stored = self.stored.max(lsn);
            }
            Cmd::Wake => {}
            Cmd::Follow(lineage, epoch) => self.known = Some((*lineage, epoch)),
            Cmd::Stop => self.stopping = true,
        }
        Ok(())
    }

    /// Answers a command with no.
    fn refuse(&mut self, command: Cmd, error: &StandbyError) {
        match command {
            Cmd::Fetch { reply, .. } => reply(vec![]),
            Cmd::Names { reply, .. } => reply(vec![]),
            Cmd::Look { reply, .. } => reply(Err(error.clone())),
            Cmd::Mend { reply, .. } => reply(Mended::Failed(error.to_string())),
            Cmd::Barrier { reply } | Cmd::Begin { reply, .. } => reply(Err(error.clone())),
            Cmd::Hello { reply, .. } => {
                let _ = reply.send(Err(Refusal { code: RefuseCode::Failed, message: error.to_string() }));
            }
            Cmd::Pull { reply, .. } => {
                let _ = reply.send(Err(error.clone()));
            }
            Cmd::Stop => self.stopping = true,
            Cmd::Durable(position) => self.target = position,
            Cmd::Stored(lsn) => self.stored = self.stored.max(lsn),
            Cmd::Follow(lineage, epoch) => self.known = Some((*lineage, epoch)),
            Cmd::Checkpoint | Cmd::Wake => {}
        }
    }

    /// Serves what cannot wait while a txn is applied; the rest is handled after it.
    pub(super) fn serve(&mut self) -> Result<(), OpError> {
        if self.shared.crashed() {
            return Err(OpError::Fatal(StandbyError::Stopped));
        }
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Cmd::Fetch { hash, hint, reply } => reply(self.fetch(hash, hint.as_ref())),
                Cmd::Durable(position) => self.target = position,
                other => self.backlog.push_back(other),
            }
        }
        Ok(())
    }

    /// Waits for something while a txn is half applied (room on the disk, a content): commands that need the txn done get `because` for an answer.
    pub(super) fn pause(&mut self, limit: Duration, because: &StandbyError) -> Result<(), OpError> {
        for command in std::mem::take(&mut self.backlog) {
            self.refuse(command, because);
        }
        if !self.stopping {
            match self.commands.recv_timeout(limit) {
                Ok(Cmd::Fetch { hash, hint, reply }) => reply(self.fetch(hash, hint.as_ref())),
                Ok(command) => self.refuse(command, because),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => self.stopping = true,
            }
        }
        if self.stopping || self.shared.crashed() { Err(OpError::Fatal(StandbyError::Stopped)) } else { Ok(()) }
    }

    fn fetch(&mut self, hash: ContentHash, hint: Option<&RelPath>) -> Vec<File> {
        let mut paths: Vec<RelPath> = hint.cloned().into_iter().collect();
        paths.extend(self.manifest.by_hash(hash).unwrap_or_default());
        let mut found = vec![];
        for path in paths {
            let Ok(Some(row)) = self.manifest.row(&path) else { continue };
            if row.entry.hash() == Some(hash)
                && let Ok(file) = self.replica.file(&path, false)
                && file.metadata().is_ok_and(|m| m.len() == row.entry.size())
            {
                found.push(file);
            }
        }
        found
    }

    fn names(&self, path: &RelPath) -> Vec<RelPath> {
        let Ok(Some(row)) = self.manifest.row(path) else { return vec![] };
        let Some(local) = row.local.filter(|_| row.entry.hash().is_some()) else { return vec![] };
        let mut names = self.manifest.by_ino(local.ino).unwrap_or_default();
        names.retain(|name| name != path);
        names.truncate(NAMES_MAX);
        names
    }

    fn hello(&mut self, hello: &Hello) -> Result<Holding, StandbyError> {
        let sql = |error: twinbox_resync::schema::StateError| StandbyError::from(error);
        if hello.digest_key != self.manifest.digest_key() {
            self.manifest.begin().map_err(|e| sql(self.manifest.state_error(&e)))?;
            let done = self.manifest.set_digest_key(hello.digest_key);
            done.map_err(|e| sql(self.manifest.state_error(&e)))?;
            // Txns after this carry digests under the new key: recovery must know it.
            self.checkpoint()?;
        }
        // A history is noted before its first position is: of one that died in between nothing was ever taken, and the primary's position has a chain of its own.
        let Some((lineage, epoch)) = self.known.clone().filter(|_| self.applied != Position::START) else {
            return Ok(if self.manifest.is_empty() { Holding::Empty } else { Holding::Adopted { rows: self.manifest.len() } });
        };
        // One that remembers nothing pulls everything: a first sync's own position, also at LSN 0, has another chain.
        let chain_at_yours = match hello.position {
            Position::START => None,
            position => self.manifest.chain_at(position.lsn).map_err(|e| sql(self.manifest.state_error(&e)))?,
        };
        let (digest, complete) = (self.manifest.digest(), self.shared.status().complete);
        Ok(Holding::Holds { lineage, epoch, position: self.applied, digest, chain_at_yours, complete })
    }

    fn pull(&self, since: Option<Lsn>, out: &tokio::sync::mpsc::Sender<ToPrimary>) -> Result<(), StandbyError> {
        if crate::link::rows::send(&self.manifest, since, self.applied, out)? { Ok(()) } else { Err(StandbyError::Superseded) }
    }

    /// Applies everything that is durable.
    fn catch_up(&mut self) -> Result<(), StandbyError> {
        if self.dead.is_some() || self.applied.lsn >= self.target.lsn || self.shared.held() {
            return Ok(());
        }
        while self.applied.lsn < self.target.lsn {
            self.txn()?;
            if self.redo_bytes >= CHECKPOINT_BYTES || self.checkpointed.elapsed() >= CHECKPOINT_EVERY {
                self.tell_applied();
                self.checkpoint()?;
            }
        }
        self.tell_applied();
        Ok(())
    }

    fn tell_applied(&self) {
        if let Some(session) = self.shared.session() {
            session.send(ToPrimary::Applied { lsn: self.applied.lsn });
        }
    }

    fn next_record(&mut self) -> Result<Record, StandbyError> {
        if let Some(record) = self.reader.next_record()? {
            return Ok(record);
        }
        // What was buffered may be older than the file.
        self.reader = RedoReader::new(&self.redo_dir, self.applied.lsn);
        self.reader.next_record()?.ok_or_else(|| StandbyError::Redo {
            detail: format!("redo log {} ends before LSN {}, which it holds", self.redo_dir.display(), self.target.lsn),
        })
    }

    /// Rows may be changed until the next checkpoint.
    pub(super) fn begin(&mut self) -> Result<(), StandbyError> {
        self.manifest.begin().map_err(|e| self.manifest.state_error(&e))?;
        if !self.dirty {
            self.checkpointed = Instant::now();
            self.dirty = true;
        }
        Ok(())
    }

    fn txn(&mut self) -> Result<(), StandbyError> {
        self.begin()?;
        (self.files, self.rescued, self.trouble) = (0, 0, vec![]);
        loop {
            let record = self.next_record()?;
            self.redo_bytes += record_bytes(&record);
            let lsn = record.frame.lsn;
            self.manifest.set_lsn(lsn);
            let mut content = 0;
            for op in &record.frame.ops {
                content += content_bytes(op, &self.staging);
                self.op(op, lsn)?;
            }
            lower(&self.shared.unapplied, content);
            if let (Some(seal), Some(chain)) = (record.seal(), record.chain) {
                let frame = &record.frame;
                return self.sealed(Position { lsn, chain }, seal, frame.flags, frame.captured_ns);
            }
        }
    }

    fn sealed(&mut self, position: Position, seal: &Seal, flags: u8, captured_ns: i64) -> Result<(), StandbyError> {
        self.restore_dirs()?;
        if !self.trouble.is_empty() {
            // The bytes of a path that could not be made may be under a name that went in the same cut: a healing primary must not remove that.
            self.manifest.forget_gone(position.lsn).map_err(|e| self.manifest.state_error(&e))?;
        }
        self.manifest.remember_chain(position).map_err(|e| self.manifest.state_error(&e))?;
        self.applied = position;
        let complete = flags & FLAG_INITIAL == 0;
        let was = self.shared.update(|status| {
            status.applied = position.lsn;
            status.rows = self.manifest.len();
            status.txns += 1;
            status.files += self.files;
            status.rescued += self.rescued;
            status.captured_ns = captured_ns;
            status.lost_metadata.clone_from(&self.replica.lost);
            status.adopted = self.adopting && !complete;
            std::mem::replace(&mut status.complete, complete)
        });
        if was != complete {
            (self.on_complete)(complete);
        }
        if complete && self.adopting {
            self.keep_what_nobody_knows()?;
            self.adopting = false;
            let _ = std::fs::remove_file(&self.adopting_mark);
            let _ = std::fs::remove_file(self.adopting_mark.with_file_name(crate::switch::GAVE_UP));
        }
        if seal.digest != self.manifest.digest() {
            let detail = if self.trouble.is_empty() { "digests".to_owned() } else { self.trouble.join("; ") };
            let error = StandbyError::Differs { lsn: position.lsn, detail };
            tracing::error!(lsn = position.lsn.0, "manifest differs from the primary's");
            self.shared.problem(error.to_string());
            if let Some(session) = self.shared.session() {
                session.fail(error);
            }
        } else if let Some(first) = self.trouble.first() {
            self.shared.problem(first.clone());
        }
        Ok(())
    }

    /// Everything was taken over: a path that has no row by now is one that the primary does not have (of several names of one file only the first had got a row). It would come back with the next change of roles.
    fn keep_what_nobody_knows(&mut self) -> Result<(), StandbyError> {
        let mut stack = vec![RelPath::root()];
        while let Some(dir) = stack.pop() {
            let Ok(children) = super::rescue::children(&mut self.replica, &dir) else { continue };
            for path in children {
                if super::adopt::ours(&path) {
                    continue;
                }
                match self.manifest.row(&path)? {
                    Some(row) if row.entry.is_dir() => stack.push(path),
                    Some(_) => {}
                    None => match self.rescue.take(&mut self.replica, &path, Why::Adopt) {
                        Ok(kept) => {
                            self.rescued += 1;
                            tracing::warn!(kept = %kept.display(), "the primary does not have this path: it is kept");
                        }
                        Err(error) => {
                            tracing::error!(%error, "a path that the primary does not have could not be moved to rescue");
                            self.shared.problem(format!("{path}: cannot be moved to rescue ({error}); move it away yourself"));
                        }
                    },
                }
            }
        }
        Ok(())
    }

    fn checkpoint(&mut self) -> Result<(), StandbyError> {
        if self.dead.is_some() || !(self.dirty || self.manifest.in_transaction()) {
            return Ok(());
        }
        self.checkpoint_at(self.applied)
    }

    fn checkpoint_at(&mut self, position: Position) -> Result<(), StandbyError> {
        rfs::syncfs(self.replica.root.fd()).map_err(|e| StandbyError::io(format!("syncfs {}", self.replica.root.path().display()), e))?;
        let committed = self.manifest.prune_gone(self.stored).and_then(|()| self.manifest.commit(position));
        committed.map_err(|e| self.manifest.state_error(&e))?;
        self.applied = position;
        if position.lsn > self.target.lsn {
            self.target = position;
        }
        redo::drop_segments(&self.redo_dir, position.lsn)?;
        self.staging.prune(position.lsn);
        lower(&self.shared.redo_bytes, self.redo_bytes);
        self.redo_bytes = 0;
        self.checkpointed = Instant::now();
        self.dirty = false;
        self.shared.update(|status| {
            status.applied = position.lsn;
            status.rows = self.manifest.len();
        });
        let _ = self.events.send(Event::Progress);
        Ok(())
    }
}

fn lower(counter: &AtomicU64, by: u64) {
    let _ = counter.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |before| Some(before.saturating_sub(by)));
}
