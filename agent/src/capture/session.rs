//! Following the standby: comparing memories, pulling rows, and what the end of a session means.
//!
//! Invariant: what was in flight when a session ended is found durable by the next hello, or sent again as it was; where the standby does not go on from where it was (or could not take it), it is dirty again.

use std::collections::{BTreeSet, HashMap};
use std::time::Instant;

use tokio::sync::mpsc;
use twinbox_protocol::chunk::CHUNKER;
use twinbox_protocol::digest::Digest;
use twinbox_protocol::entry::Entry;
use twinbox_protocol::hello::{Refusal, Verdict, compare};
use twinbox_protocol::ids::{ChainHash, ContentHash, Generation, Lsn};
use twinbox_protocol::lineage::{Relation, Side, Term, relate};
use twinbox_protocol::msg::{Hello, Position, Replica, Welcome};
use twinbox_protocol::path::RelPath;
use twinbox_resync::rows::{Row, Rows};

use super::dirty::Group;
use super::engine::{CaptureError, ComesBack, Engine};
use super::messages::{BulkMessage, Command, Step, ToLink};
use super::pulse::CANARY_EVERY;

/// An open session.
pub(super) struct Session {
    pub(super) id: u64,
    /// Bulk jobs up to this one were given in sessions before: what they read counts no more.
    pub(super) old_jobs: u64,
    pub(super) out: mpsc::UnboundedSender<ToLink>,
    pub(super) bulk: mpsc::Sender<BulkMessage>,
    /// Last word of the standby.
    pub(super) heard: Instant,
    /// What was durable when it began.
    durable: Lsn,
}

/// Sessions that end one after the other with nothing durable of what was sent: then what is sent is looked at again.
const FRUITLESS_MAX: u32 = 3;

/// Rows being pulled.
pub(super) struct Pull {
    since: Option<Lsn>,
    mark: Lsn,
    paths: Vec<RelPath>,
    tried_all: bool,
    /// The standby is at our position, with other rows: it comes back (ARCHITECTURE §5c).
    comes_back: bool,
}

/// Where the log begins anew after both manifests were made equal.
fn fresh_start(generation: Generation, lsn: Lsn, digest: Digest) -> Position {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"twinbox log restart");
    hasher.update(&generation.0);
    hasher.update(&lsn.0.to_le_bytes());
    hasher.update(&digest.to_bytes());
    Position { lsn, chain: ChainHash(*hasher.finalize().as_bytes()) }
}

/// Where `state.db` keeps which generation the standby follows.
pub(super) fn accepted_key(mirror: &str) -> String {
    format!("accepted:{mirror}")
}

impl Engine {
    /// What is changed while the standby is lost, nobody else has: a term of its own begins, so that it can never look like "merely behind".
    pub(super) fn mint_when_alone(&mut self) -> Result<(), CaptureError> {
        let known = &self.config.known;
        let heard_of = self.accepted || known.epoch > known.lineage.last().epoch;
        let alone = self.session.is_none() && self.greeting.is_none() && self.complete && heard_of;
        let changed = || self.collapsed || self.sets.pending() > 0 || self.outbox.in_flight().next().is_some();
        if alone && changed() { self.mint() } else { Ok(()) }
    }

    /// Begins a term; durable when it returns.
    fn mint(&mut self) -> Result<(), CaptureError> {
        let manifest = self.view.manifest();
        let mut generation = [0; 16];
        rustix::rand::getrandom(&mut generation, rustix::rand::GetRandomFlags::empty()).map_err(std::io::Error::from)?;
        let known = &mut self.config.known;
        known.lineage.mint(Term {
            generation: Generation(generation),
            epoch: known.epoch,
            node: self.config.node.clone(),
            start: manifest.position().map_err(|e| manifest.state_error(&e))?,
        });
        self.accepted = false;
        Ok(self.node.set_lineage(&self.config.name, &known.lineage, known.epoch)?)
    }

    /// The standby follows our history from now on.
    fn accept(&mut self) -> Result<(), CaptureError> {
        let known = &mut self.config.known;
        // Begun after the hello (an older session's end came in between): nobody has heard of it, and what was changed is shipped in this session.
        let told = self.greeting.take().filter(|told| *told != known.lineage.generation());
        if told.is_some_and(|told| known.lineage.withdraw_after(told)) {
            self.node.set_lineage(&self.config.name, &known.lineage, known.epoch)?;
            self.accepted = false;
        }
        if !std::mem::replace(&mut self.accepted, true) {
            self.node.set_value(&accepted_key(&self.config.name), &self.config.known.lineage.generation().to_string())?;
        }
        Ok(())
    }

    pub(super) fn command(&mut self, command: Command) -> Result<(), CaptureError> {
        match command {
            Command::Hello(reply) => {
                let _ = reply.send(self.hello()?);
            }
            Command::Welcome(welcome, reply) => {
                let step = self.welcome(&welcome)?;
                let _ = reply.send(step);
            }
            Command::Rows(rows) => self.rows(rows)?,
            Command::RowsEnd(position, digest, reply) => {
                let step = self.rows_end(position, digest)?;
                let _ = reply.send(step);
            }
            Command::Up { id, out, bulk, peer } => {
                tracing::info!(mirror = %self.config.name, peer, lsn = %self.outbox.last().lsn, "standby connected");
                self.accept()?;
                let durable = self.outbox.durable().lsn;
                for keep in self.keep_staged() {
                    let _ = out.send(keep); // A closed queue means the session is ending.
                }
                // As they were: what is in them refers to nothing that the standby does not have or get with them.
                for txn in self.outbox.in_flight() {
                    let _ = out.send(ToLink::Txn(txn.frames.clone()));
                }
                self.session = Some(Session { id, old_jobs: self.bulk.last_id(), out, bulk, heard: Instant::now(), durable });
                self.collapsed = false;
                // The standby applied all it had before it answered our hello.
                self.applied = self.applied.max(durable);
                self.durable = durable;
                (self.acknowledged_at, self.applied_at) = (Instant::now(), Instant::now());
                // The next turn sends a canary: the first proof of this session.
                self.shipped_at = self.acknowledged_at.checked_sub(CANARY_EVERY).unwrap_or(self.acknowledged_at);
                if std::mem::take(&mut self.compare) {
                    self.scan.push(RelPath::root());
                }
                // An agent that was started since does not know what it is that the standby lacks, nor one that took back what was in flight: it is in what is dirty, or being found.
                if std::mem::take(&mut self.at_no_cut) && self.complete && self.comes_back.is_none() {
                    let known = self.scan.is_done() && !self.scan.is_first();
                    self.comes_back = Some(if known { ComesBack::Round(self.sets.round()) } else { ComesBack::Comparing });
                }
            }
            Command::Down(id) => {
                self.greeting = None;
                self.down(Some(id));
            }
            Command::Durable(lsn) => {
                self.heard();
                self.handle_durable(lsn)?;
            }
            Command::Applied(lsn) => {
                self.heard();
                self.applied = self.applied.max(lsn);
                self.applied_at = Instant::now();
            }
            Command::Staged(hash) => self.staged(hash)?,
            Command::Miss(hash) => self.miss(hash)?,
            Command::Want(path, hash) => self.want(path, hash)?,
            Command::Known(paths, reply) => {
                let _ = reply.send(self.known(&paths)?);
            }
            Command::NamesOf(ino, reply) => {
                let _ = reply.send(self.view.by_ino(ino)?);
            }
            Command::Recheck(paths) => self.recheck(&paths),
            Command::Incomplete(hash) => self.incomplete(hash)?,
            Command::Bulk(result) => self.bulk_done(*result)?,
            Command::Mapped(paths) => self.mapped(paths)?,
            Command::Sync(reply) => self.wait_for_sync(reply),
            Command::Fence(request) => self.fence(request),
            Command::TxnBegin { path, time, reply } => self.begin_txn(path, time, reply),
            Command::TxnEnd { id, path, reply } => {
                let _ = reply.send(self.end_txn(id, path.as_ref()));
            }
            Command::Reselect(choice) => {
                (self.config.selection, self.config.grouping) = *choice;
                // Other groups: what was seen under the old ones would be committed past the events of the new.
                let paths: Vec<RelPath> =
                    self.sets.groups().flat_map(|(_, g)| g.dirty.keys()).cloned().chain(self.sets.observed()).collect();
                self.sets.clear();
                self.fresh.clear();
                self.larges.clear();
                self.drop_all_ahead();
                paths.iter().for_each(|path| self.mark(path, true, true, false));
                self.restart_waiters();
                self.scan.push(RelPath::root());
            }
            Command::Heard => self.heard(),
            Command::Stop => {}
        }
        Ok(())
    }

    pub(super) fn heard(&mut self) {
        if let Some(session) = &mut self.session {
            session.heard = Instant::now();
        }
    }

    fn hello(&mut self) -> Result<Hello, CaptureError> {
        self.down(None);
        if self.pull.take().is_some() {
            // Cut short: half of what the standby has is no memory of it, whatever its digest.
            let undone = self.view.replace(twinbox_resync::manifest::Manifest::roll_back);
            undone.map_err(|e| self.view.manifest().state_error(&e))?;
        }
        if self.config.known.epoch > self.config.known.lineage.last().epoch {
            // Promoted: what is shipped from here on is this node's.
            self.mint()?;
        }
        self.greeting = Some(self.config.known.lineage.generation());
        let manifest = self.view.manifest();
        let known = &self.config.known;
        Ok(Hello {
            protocol: twinbox_protocol::PROTOCOL_VERSION,
            software: env!("CARGO_PKG_VERSION").into(),
            node: self.config.node.clone(),
            mirror: self.config.name.clone(),
            mirror_id: known.mirror_id,
            lineage: known.lineage.clone(),
            epoch: known.epoch,
            incarnation: self.config.incarnation,
            position: manifest.position().map_err(|e| manifest.state_error(&e))?,
            digest: manifest.digest(),
            digest_key: known.digest_key,
            chunker: CHUNKER.into(),
            layout: self.config.layout.clone(),
            wall_ns: super::engine::wall_ns(),
        })
    }

    /// How our history relates to the standby's; `Behind` only where it knows terms of our own that we do not.
    fn relation(&self, welcome: &Welcome) -> Result<Relation, CaptureError> {
        let Replica::Holds { lineage, epoch, position, .. } = &welcome.replica else { return Ok(Relation::Unrelated) };
        let (manifest, known) = (self.view.manifest(), &self.config.known);
        let ours = manifest.position().map_err(|e| manifest.state_error(&e))?;
        let relation = relate(
            Side { lineage: &known.lineage, epoch: known.epoch, position: ours },
            Side { lineage, epoch: *epoch, position: *position },
        );
        Ok(if relation == Relation::Behind && *epoch != known.epoch { Relation::Unrelated } else { relation })
    }

    fn welcome(&mut self, welcome: &Welcome) -> Result<Result<Step, Refusal>, CaptureError> {
        let relation = self.relation(welcome)?;
        if let (Replica::Holds { position, .. }, Relation::Same | Relation::Ahead | Relation::Behind) = (&welcome.replica, relation)
            && position.lsn >= self.outbox.next_lsn()
        {
            // A run begins above every number reserved before it, so that one was issued after the copy was made. The store may be as old: to be healed first.
            self.disk.distrust(&self.node)?;
            return Err(CaptureError::OlderState { ours: Lsn(self.outbox.next_lsn().0 - 1), theirs: position.lsn });
        }
        if let (Replica::Holds { lineage, .. }, Relation::Behind) = (&welcome.replica, relation) {
            // The terms are our own, and the state that knew them was put back from a copy.
            self.config.known.lineage = lineage.clone();
            self.node.set_lineage(&self.config.name, lineage, self.config.known.epoch)?;
            self.accepted = false;
            self.greeting = Some(lineage.generation());
        }
        let generation = self.config.known.lineage.generation();
        if let (Replica::Holds { position, .. }, Relation::Same | Relation::Ahead) = (&welcome.replica, relation)
            && self.outbox.in_flight().any(|f| f.position == *position)
        {
            // Its last acknowledgements were lost on the way.
            self.handle_durable(position.lsn)?;
        }
        let hello = self.hello()?;
        let verdict = compare(&hello, welcome);
        let doubt = std::mem::take(&mut self.doubt) || self.fruitless >= FRUITLESS_MAX;
        let same = matches!(verdict, Verdict::Continue) && self.complete && !doubt;
        let at_cut = matches!(welcome.replica, Replica::Holds { complete: true, .. });
        self.at_no_cut = !at_cut && (!same || self.scan.is_first());
        self.settle_observations(same);
        if !same {
            self.take_back()?;
            self.outbox.handle_restart(hello.position);
        }
        if let Ok(mut recent) = self.recent.lock() {
            recent.clear();
        }
        Ok(match verdict {
            Verdict::Continue => Ok(Step::Begin { from: hello.position, reset: false }),
            Verdict::PullSince(lsn) => {
                let step = self.start_pull(Some(lsn))?;
                if let (Some(pull), Replica::Holds { position, .. }) = (&mut self.pull, &welcome.replica) {
                    pull.comes_back = position.lsn == hello.position.lsn;
                }
                Ok(step)
            }
            Verdict::PullAll { why } => {
                tracing::warn!(mirror = %self.config.name, why, "pulling the whole manifest from the standby");
                if let Replica::Adopted { .. } = welcome.replica {
                    self.set_incomplete()?;
                }
                Ok(self.start_pull(None)?)
            }
            Verdict::FirstSync => {
                self.set_incomplete()?;
                let from = fresh_start(generation, Lsn(self.outbox.next_lsn().0 - 1), Digest::default());
                let done = self.view.replace(|manifest| {
                    manifest.begin()?;
                    manifest.clear()?;
                    manifest.commit(from)
                });
                done.map_err(|e| self.view.manifest().state_error(&e))?;
                self.outbox.handle_restart(from);
                self.sets.clear();
                self.fresh.clear();
                self.larges.clear();
                self.compare = true;
                Ok(Step::Begin { from, reset: true })
            }
            Verdict::Refuse { why } => {
                self.trouble(why.to_string());
                Err(why)
            }
        })
    }

    pub(super) fn set_incomplete(&mut self) -> Result<(), CaptureError> {
        self.complete = false;
        Ok(self.node.set_complete(&self.config.name, false)?)
    }

    fn start_pull(&mut self, since: Option<Lsn>) -> Result<Step, CaptureError> {
        let mark = Lsn(self.outbox.next_lsn().0 + (1 << 40));
        let begun = self.view.replace(|manifest| {
            manifest.set_lsn(mark);
            manifest.begin()
        });
        begun.map_err(|e| self.view.manifest().state_error(&e))?;
        let tried_all = since.is_none();
        self.pull = Some(Pull { since, mark, paths: vec![], tried_all, comes_back: false });
        Ok(Step::Pull(since))
    }

    fn rows(&mut self, rows: Vec<(RelPath, Option<Entry>)>) -> Result<(), CaptureError> {
        let Some(pull) = &mut self.pull else { return Ok(()) };
        let mut failed = None;
        let done = self.view.replace(|manifest| {
            for (path, entry) in rows {
                let row = match entry {
                    None => None,
                    Some(entry) => {
                        // What we know of the file here still holds if the standby has what we believed.
                        let old = manifest.row(&path).ok().flatten();
                        let local = old.filter(|old| old.entry == entry).and_then(|old| old.local);
                        Some(Row { entry, local })
                    }
                };
                if let Err(error) = manifest.set(&path, row) {
                    failed = Some(error);
                }
                if pull.since.is_some() {
                    pull.paths.push(path);
                }
            }
            Ok(())
        });
        done.map_err(|e| self.view.manifest().state_error(&e))?;
        failed.map_or(Ok(()), |error| Err(error.into()))
    }

    fn rows_end(&mut self, position: Position, digest: Digest) -> Result<Result<Step, Refusal>, CaptureError> {
        let Some(pull) = self.pull.take() else { return Ok(Err(Refusal::ForkedAt { at: position.lsn })) };
        if pull.since.is_none() {
            loop {
                let stale = self.view.manifest().unmarked(pull.mark, 1000).map_err(|e| self.view.manifest().state_error(&e))?;
                if stale.is_empty() {
                    break;
                }
                let mut failed = None;
                let done = self.view.replace(|manifest| {
                    for path in &stale {
                        failed = manifest.set(path, None).err().or(failed.take());
                    }
                    Ok(())
                });
                done.map_err(|e| self.view.manifest().state_error(&e))?;
                if let Some(error) = failed {
                    return Err(error.into());
                }
            }
        }
        if self.view.manifest().digest() != digest {
            let undone = self.view.replace(twinbox_resync::manifest::Manifest::roll_back);
            undone.map_err(|e| self.view.manifest().state_error(&e))?;
            if !pull.tried_all {
                tracing::warn!(mirror = %self.config.name, "manifests differ after a partial pull: pulling everything");
                return Ok(Ok(self.start_pull(None)?));
            }
            self.trouble("the standby's manifest does not match its own digest".into());
            return Ok(Err(Refusal::ForkedAt { at: position.lsn }));
        }
        let reset = pull.since.is_none();
        let from = if reset {
            // Past where the standby is: should it never hear of this, it is behind then, and not at the same LSN with another log.
            fresh_start(self.config.known.lineage.generation(), self.outbox.next_lsn().max(position.lsn.next()), digest)
        } else {
            position
        };
        // Known to be this node's own, also when the manifest is lost.
        self.node.reserve(&self.config.name, from.lsn)?;
        // Not later than where the standby is: what is, is this node's own.
        let done = self.view.replace(|manifest| manifest.settle(pull.mark, position.lsn).and_then(|()| manifest.commit(from)));
        done.map_err(|e| self.view.manifest().state_error(&e))?;
        self.outbox.handle_restart(from);
        if !pull.paths.is_empty() {
            self.distrust_renames();
        }
        for path in pull.paths {
            self.mark(&path, true, true, false);
        }
        if pull.comes_back {
            self.comes_back = Some(ComesBack::Round(self.sets.round()));
        }
        if reset {
            self.compare = true;
            self.scan.forget_inodes();
        }
        Ok(Ok(Step::Begin { from, reset }))
    }

    /// What is in flight is not sent again: what it was made of is looked at once more.
    fn take_back(&mut self) -> Result<(), CaptureError> {
        let undone = self.view.handle_restart();
        // New again, under the names they have by now: what went from elsewhere is not gone before they are there.
        let is_file = |row: &Option<Row>| row.as_ref().is_some_and(|row| row.entry.hash().is_some());
        let came: Vec<RelPath> =
            undone.values().flatten().filter(|(_, row)| is_file(row)).map(|(path, _)| self.sets.now_at(path)).collect();
        if !undone.is_empty() {
            self.distrust_renames();
        }
        for paths in undone.into_values() {
            // What it moved between groups is one txn again: a message is never nowhere.
            let mut came: HashMap<ContentHash, BTreeSet<Group>> = HashMap::new();
            for (path, row) in &paths {
                if let Some(hash) = row.as_ref().and_then(|row| row.entry.hash()) {
                    came.entry(hash).or_default().insert(self.group_of_marked(path));
                }
            }
            for (path, _) in paths.iter().filter(|(_, row)| row.is_none()) {
                let hash = self.view.row(path)?.and_then(|row| row.entry.hash());
                let (from, to) = (self.group_of_marked(path), hash.and_then(|hash| came.get(&hash)));
                if let Some(to) = to.filter(|to| !to.contains(&from)) {
                    to.iter().for_each(|to| self.sets.join(&from, to));
                }
            }
            for (path, _) in paths {
                self.mark(&path, true, true, false);
            }
        }
        if self.complete {
            came.into_iter().for_each(|path| self.fresh.insert(path));
        }
        self.flights.clear();
        self.bulk.forget_named();
        Ok(())
    }

    /// Of what was observed in sessions before: what rests on nothing of the standby (bytes read whole, what is gone, what is no file) is so whatever that one has. What rests on its rows
    /// holds where it goes on (`same`) from where it was; what rests on rows that were taken back is dirty by that. Under a load that never ends a standby that comes and goes would else be
    /// sent nothing but beginnings.
    fn settle_observations(&mut self, same: bool) {
        if !same {
            self.fruitless = 0;
            self.sets.keep_bytes_only();
            self.drop_all_ahead();
        }
        for (path, content) in self.sets.on_the_standby(same) {
            self.larges.remove(&path);
            self.mark(&path, content, true, false);
        }
    }

    /// The session is over (`None`: a new one is being opened).
    fn down(&mut self, id: Option<u64>) {
        let Some(session) = self.session.take_if(|session| id.is_none_or(|id| session.id == id)) else { return };
        tracing::warn!(mirror = %self.config.name, session = session.id, "standby lost: unprotected until it is back");
        self.last_groups = None;
        // The txn waited for may never arrive, and its number be passed by others: what is dirty then is waited for instead.
        self.restart_waiters();
        let fruitless = self.outbox.in_flight().len() > 0 && self.durable == session.durable;
        self.fruitless = if fruitless { self.fruitless + 1 } else { 0 };
        self.bulk.session_ended();
        // What was on its way is not there. What is there, or was there before, is looked at when the standby says how it is: see `settle_observations`.
        for path in self.sets.staging() {
            self.larges.remove(&path);
            self.mark(&path, true, true, false);
        }
        if !self.complete {
            // Nothing of a first sync is kept in memory while nobody takes it.
            self.sets.clear();
            self.fresh.clear();
            self.larges.clear();
            self.drop_all_ahead();
            self.scan.clear();
            self.compare = true;
        }
    }
}
