//! The receiver thread: frames in, self-contained redo records out, acknowledgements back.
//!
//! Owns the redo log's tail. Order of a txn: decode and check → resolve every reference to bytes or a pinned staged object → append → (sealed, nothing more waiting)
//! one sync for all → `Durable` → tell the applier. Nothing is acknowledged that a power cut could lose, or for which there is no room in the replica.
//!
//! Waits (for a content, for room in the redo log) take events from the same queue, so that a new session, the end of this one or a stop always gets through.

use std::collections::VecDeque;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvError, Sender, TryRecvError};

use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use twinbox_protocol::codec;
use twinbox_protocol::ids::{ContentHash, Lsn};
use twinbox_protocol::msg::{Hello, Position, Replica as Holding, ToPrimary};
use twinbox_protocol::ops::{LogFrame, Op};
use twinbox_protocol::outbox::Chain;
use twinbox_resync::redo::{Record, RedoLog};

use super::applier::{Cmd, content_bytes, record_bytes};
use super::error::{Refusal, StandbyError};
use super::recent::Recent;
use super::room::Room;
use super::shared::{Alive, SessionShared, Shared};
use super::staging::Staging;

/// Sealed bytes that may wait for a sync while more input comes.
const SYNC_BYTES: u64 = 4 * 1024 * 1024;
/// Ops are written to the log in records of about this size.
const RECORD_BYTES: usize = 1024 * 1024;

/// What the receiver is told.
pub(super) enum Event {
    Frame {
        session: u64,
        body: Vec<u8>,
        _room: OwnedSemaphorePermit,
    },
    Hello {
        hello: Box<Hello>,
        reply: oneshot::Sender<Result<Holding, Refusal>>,
    },
    Pull {
        since: Option<Lsn>,
        out: mpsc::Sender<ToPrimary>,
        reply: oneshot::Sender<Result<(), StandbyError>>,
    },
    Begin {
        from: Position,
        reset: bool,
        out: mpsc::UnboundedSender<ToPrimary>,
        reply: oneshot::Sender<Result<Arc<SessionShared>, StandbyError>>,
    },
    Ended {
        session: u64,
    },
    Gone {
        session: u64,
        hash: ContentHash,
    },
    Staged,
    Fetched {
        token: u64,
        files: Vec<File>,
    },
    Done {
        token: u64,
        result: Result<(), StandbyError>,
    },
    /// The applier made a checkpoint, or ended.
    Progress,
    Stop,
}

/// Position within the log of the open session.
struct Txn {
    lsn: Lsn,
    prev: Lsn,
    flags: u8,
    captured_ns: i64,
    /// Parts received and records written.
    parts: u32,
    records: u32,
    ops: u64,
    chain: Chain,
    content: u64,
    bytes: u64,
}

/// See the module's text.
pub(super) struct Receiving {
    pub(super) shared: Arc<Shared>,
    pub(super) staging: Arc<Staging>,
    pub(super) events: Receiver<Event>,
    pub(super) sender: Sender<Event>,
    pub(super) applier: Sender<Cmd>,
    pub(super) recent: Recent,
    pub(super) session: Option<Arc<SessionShared>>,
    log: RedoLog,
    backlog: VecDeque<Event>,
    sealed: Position,
    durable: Position,
    unsynced: u64,
    txn: Option<Txn>,
    sessions: u64,
    tokens: u64,
    pub(super) room: Room,
}

/// What a receiver is made of.
pub(super) struct Parts {
    pub(super) shared: Arc<Shared>,
    pub(super) staging: Arc<Staging>,
    pub(super) log: RedoLog,
    pub(super) roots: [PathBuf; 2],
    pub(super) redo_max: u64,
}

impl Receiving {
    pub(super) fn new(parts: Parts, events: Receiver<Event>, sender: Sender<Event>, applier: Sender<Cmd>) -> Self {
        let Parts { shared, staging, log, roots, redo_max } = parts;
        let sealed = log.sealed();
        Receiving {
            shared,
            staging,
            events,
            sender,
            applier,
            recent: Recent::default(),
            session: None,
            log,
            backlog: VecDeque::new(),
            sealed,
            durable: sealed,
            unsynced: 0,
            txn: None,
            sessions: 0,
            tokens: 0,
            room: Room::new(roots, redo_max),
        }
    }

    /// The thread's body.
    pub(super) fn run(mut self) {
        let _alive = Alive { shared: self.shared.clone(), events: self.sender.clone() };
        loop {
            let event = match self.backlog.pop_front() {
                Some(event) => event,
                None => match self.events.try_recv() {
                    Ok(event) => event,
                    Err(TryRecvError::Disconnected) => return,
                    Err(TryRecvError::Empty) => {
                        self.settle_or_fail();
                        match self.events.recv() {
                            Ok(event) => event,
                            Err(RecvError) => return,
                        }
                    }
                },
            };
            if self.shared.crashed() {
                return;
            }
            match event {
                Event::Stop => {
                    self.settle_or_fail();
                    self.end(StandbyError::Stopped);
                    return;
                }
                other => self.handle(other),
            }
        }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Frame { session, body, _room } => {
                if self.session.as_ref().is_some_and(|s| s.id == session && !s.is_over())
                    && let Err(error) = self.frame(&body)
                {
                    self.fail(error);
                }
            }
            Event::Hello { hello, reply } => {
                self.settle_or_fail();
                match self.shared.refusing() {
                    Some(error) => {
                        let _ = reply.send(Err(Refusal::failed(&error)));
                    }
                    None => self.ask(Cmd::Hello { hello, reply }),
                }
            }
            Event::Pull { since, out, reply } => {
                self.settle_or_fail();
                self.ask(Cmd::Pull { since, out, reply });
            }
            Event::Begin { from, reset, out, reply } => {
                let begun = self.begin(from, reset, out);
                let _ = reply.send(begun);
            }
            Event::Ended { session } => {
                if self.session.as_ref().is_some_and(|s| s.id == session) {
                    self.settle_or_fail();
                    self.end(StandbyError::Superseded);
                }
            }
            Event::Gone { session, hash } => self.gone(session, hash),
            Event::Staged | Event::Progress | Event::Fetched { .. } | Event::Done { .. } => {}
            // Handled where events are taken.
            Event::Stop => {}
        }
    }

    pub(super) fn ask(&self, command: Cmd) {
        // An applier that is gone drops its replies, which tells those who wait.
        let _ = self.applier.send(command);
    }

    fn gone(&mut self, session: u64, hash: ContentHash) {
        if let Some(open) = self.session.as_ref().filter(|s| s.id == session) {
            open.note_gone(hash);
            open.fail(StandbyError::Gone { hash });
            self.ask(Cmd::Wake);
        }
    }

    fn fail(&mut self, error: StandbyError) {
        if matches!(error, StandbyError::Redo { .. }) {
            self.shared.refuse(&error.to_string());
        }
        tracing::warn!(%error, "session ends");
        if let Some(session) = &self.session {
            session.fail(error);
        }
        self.ask(Cmd::Wake);
    }

    /// Ends the open session, if there is one.
    fn end(&mut self, error: StandbyError) {
        if let Some(session) = self.session.take() {
            session.fail(error);
        }
        self.shared.set_session(None);
        self.txn = None;
        self.ask(Cmd::Wake);
    }

    fn begin(&mut self, from: Position, reset: bool, out: mpsc::UnboundedSender<ToPrimary>) -> Result<Arc<SessionShared>, StandbyError> {
        self.settle_or_fail();
        self.end(StandbyError::Superseded);
        if let Some(error) = self.shared.refusing() {
            return Err(error);
        }
        let fits = if reset { from.lsn >= self.durable.lsn } else { from == self.durable };
        if !fits {
            return Err(StandbyError::Position { ours: self.durable.lsn, theirs: from.lsn });
        }
        self.latching(|log| log.discard_unsealed())?;
        self.staging.unpin_after(self.durable.lsn);
        self.staging.next_session();
        self.recent.clear();
        self.tokens += 1;
        let (token, sender) = (self.tokens, self.sender.clone());
        let reply = Box::new(move |result| {
            let _ = sender.send(Event::Done { token, result });
        });
        self.ask(Cmd::Begin { from, reset, reply });
        self.wait(|event| match event {
            Event::Done { token: t, result } if t == token => Ok(result),
            other => Err(other),
        })??;
        if reset {
            self.latching(|log| log.restart_at(from))?;
            self.sealed = from;
            self.durable = from;
        }
        self.shared.update(|status| status.durable = from);
        self.sessions += 1;
        let session = SessionShared::new(self.sessions, out);
        self.session = Some(session.clone());
        self.shared.set_session(Some(session.clone()));
        Ok(session)
    }

    fn latching(&mut self, act: impl FnOnce(&mut RedoLog) -> Result<(), twinbox_resync::redo::RedoError>) -> Result<(), StandbyError> {
        act(&mut self.log).map_err(|error| {
            let error = StandbyError::from(error);
            self.shared.refuse(&error.to_string());
            error
        })
    }

    /// Takes events until one is what is waited for; what must interrupt the wait does, the rest is kept for later.
    pub(super) fn wait<T>(&mut self, mut wanted: impl FnMut(Event) -> Result<T, Event>) -> Result<T, StandbyError> {
        loop {
            if let Some(error) = self.session.as_ref().and_then(|s| s.error()).or_else(|| self.shared.refusing()) {
                return Err(error);
            }
            let event = self.events.recv().map_err(|RecvError| StandbyError::Stopped)?;
            if self.shared.crashed() {
                return Err(StandbyError::Stopped);
            }
            let event = match wanted(event) {
                Ok(value) => return Ok(value),
                Err(other) => other,
            };
            match event {
                Event::Stop => {
                    self.backlog.push_back(event);
                    return Err(StandbyError::Stopped);
                }
                Event::Begin { .. } | Event::Hello { .. } | Event::Pull { .. } => {
                    self.backlog.push_back(event);
                    return Err(StandbyError::Superseded);
                }
                Event::Ended { session } if self.session.as_ref().is_some_and(|s| s.id == session) => {
                    self.backlog.push_back(event);
                    return Err(StandbyError::Superseded);
                }
                Event::Gone { session, hash } => self.gone(session, hash),
                Event::Staged | Event::Progress | Event::Fetched { .. } | Event::Done { .. } => {}
                other => self.backlog.push_back(other),
            }
        }
    }

    /// A number for the answer to a question.
    pub(super) fn token(&mut self) -> u64 {
        self.tokens += 1;
        self.tokens
    }

    fn frame(&mut self, body: &[u8]) -> Result<(), StandbyError> {
        if let Some(error) = self.shared.refusing() {
            return Err(error);
        }
        let after = self.sealed.lsn;
        let frame = codec::decode_log(body).map_err(|source| StandbyError::Frame { after, source })?;
        let mut txn = self.expect(&frame)?;
        txn.chain.update(body);
        txn.parts += 1;
        txn.ops += frame.ops.len() as u64;
        let seal = frame.seal;
        if seal.is_some_and(|seal| seal.ops != txn.ops) {
            return Err(StandbyError::Order { after, part: txn.parts, got: "a seal over another number of ops".into() });
        }
        let (mut batch, mut weight) = (vec![], 0);
        for op in frame.ops {
            let op = self.resolve(op, txn.lsn)?;
            txn.content += content_bytes(&op, &self.staging);
            weight += op.weight();
            batch.push(op);
            if weight >= RECORD_BYTES {
                self.append(&mut txn, std::mem::take(&mut batch), None)?;
                weight = 0;
            }
        }
        self.check_room_for(txn.content)?;
        match seal {
            None => {
                if !batch.is_empty() {
                    self.append(&mut txn, batch, None)?;
                }
                self.txn = Some(txn);
            }
            Some(seal) => {
                let chain = txn.chain.finish();
                self.append(&mut txn, batch, Some((seal, chain)))?;
                self.sealed = Position { lsn: txn.lsn, chain };
                self.unsynced += txn.bytes;
                self.shared.unapplied.fetch_add(txn.content, Ordering::Relaxed);
                if self.unsynced >= SYNC_BYTES {
                    self.settle()?;
                }
            }
        }
        Ok(())
    }

    /// Checks that the frame is the next one, and gives the txn it belongs to.
    fn expect(&mut self, frame: &LogFrame) -> Result<Txn, StandbyError> {
        let after = self.sealed.lsn;
        let wrong = |part, what: &str| StandbyError::Order {
            after,
            part,
            got: format!("LSN {} after {} part {} ({what})", frame.lsn, frame.prev, frame.part),
        };
        if frame.prev != after {
            return Err(wrong(self.txn.as_ref().map_or(0, |t| t.parts), "another predecessor"));
        }
        match self.txn.take() {
            None if frame.part != 0 => Err(wrong(0, "not a first part")),
            None => {
                self.make_room_in_log()?;
                Ok(Txn {
                    lsn: frame.lsn,
                    prev: frame.prev,
                    flags: frame.flags,
                    captured_ns: frame.captured_ns,
                    parts: 0,
                    records: 0,
                    ops: 0,
                    chain: Chain::after(self.sealed.chain),
                    content: 0,
                    bytes: 0,
                })
            }
            Some(txn) if frame.lsn != txn.lsn || frame.part != txn.parts || frame.flags != txn.flags => {
                Err(wrong(txn.parts, "not the next part"))
            }
            Some(txn) => Ok(txn),
        }
    }

    fn append(
        &mut self,
        txn: &mut Txn,
        ops: Vec<Op>,
        seal: Option<(twinbox_protocol::ops::Seal, twinbox_protocol::ids::ChainHash)>,
    ) -> Result<(), StandbyError> {
        let part = txn.records;
        txn.records += 1;
        let frame = LogFrame {
            lsn: txn.lsn,
            prev: txn.prev,
            part,
            flags: txn.flags,
            captured_ns: txn.captured_ns,
            ops,
            seal: seal.map(|(seal, _)| seal),
        };
        let record = Record { frame, chain: seal.map(|(_, chain)| chain) };
        let bytes = record_bytes(&record);
        self.log.append(&record)?;
        txn.bytes += bytes;
        self.shared.redo_bytes.fetch_add(bytes, Ordering::Relaxed);
        Ok(())
    }

    fn settle_or_fail(&mut self) {
        if let Err(error) = self.settle() {
            self.fail(error);
        }
    }

    /// Everything sealed is made durable, acknowledged and given to the applier.
    pub(super) fn settle(&mut self) -> Result<(), StandbyError> {
        if self.sealed.lsn == self.durable.lsn {
            return Ok(());
        }
        self.log.sync()?;
        self.durable = self.sealed;
        self.unsynced = 0;
        let durable = self.durable;
        self.shared.update(|status| status.durable = durable);
        if let Some(session) = &self.session {
            session.send(ToPrimary::Durable { lsn: durable.lsn });
        }
        self.ask(Cmd::Durable(durable));
        Ok(())
    }
}
