//! Following the standby: comparing memories, pulling rows, and what the end of a session means.
//!
//! Invariant: what was in flight when a session ended is either found durable by the next hello, or dirty again.

use std::time::Instant;

use tokio::sync::mpsc;
use twinbox_protocol::chunk::CHUNKER;
use twinbox_protocol::digest::Digest;
use twinbox_protocol::entry::Entry;
use twinbox_protocol::hello::{Refusal, Verdict, compare};
use twinbox_protocol::ids::{ChainHash, ContentHash, Generation, Lsn};
use twinbox_protocol::msg::{Hello, Position, Replica, Welcome};
use twinbox_protocol::path::RelPath;
use twinbox_resync::manifest::Large;
use twinbox_resync::plan::{Body, Seen};
use twinbox_resync::rows::{Row, Rows};

use super::bulk::{BulkResult, Job, Outcome};
use super::engine::{Ahead, Awaiting, CaptureError, Engine, Miss};
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
}

/// Rows being pulled.
pub(super) struct Pull {
    since: Option<Lsn>,
    mark: Lsn,
    paths: Vec<RelPath>,
    tried_all: bool,
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

impl Engine {
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
                self.session = Some(Session { id, old_jobs: self.job_id, out, bulk, heard: Instant::now() });
                self.collapsed = false;
                // The standby applied all it had before it answered our hello.
                self.applied = self.applied.max(self.outbox.last().lsn);
                self.durable = self.outbox.last().lsn;
                (self.acknowledged_at, self.applied_at) = (Instant::now(), Instant::now());
                // The next turn sends a canary: the first proof of this session.
                self.shipped_at = self.acknowledged_at.checked_sub(CANARY_EVERY).unwrap_or(self.acknowledged_at);
                if std::mem::take(&mut self.compare) {
                    self.scan.push(RelPath::root());
                }
            }
            Command::Down(id) => self.down(Some(id)),
            Command::Durable(lsn) => {
                self.heard();
                self.handle_durable(lsn)?;
            }
            Command::Applied(lsn) => {
                self.heard();
                self.applied = self.applied.max(lsn);
                self.applied_at = Instant::now();
            }
            Command::Staged(hash) => self.staged(hash),
            Command::Miss(hash) => self.miss(hash)?,
            Command::Incomplete(hash) => self.incomplete(hash),
            Command::Bulk(result) => self.bulk_done(*result),
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
                self.larges.clear();
                paths.iter().for_each(|path| self.mark(path, true, true, false));
                self.restart_waiters();
                self.scan.push(RelPath::root());
            }
            Command::Heard => self.heard(),
            Command::Stop => {}
        }
        Ok(())
    }

    fn heard(&mut self) {
        if let Some(session) = &mut self.session {
            session.heard = Instant::now();
        }
    }

    fn hello(&mut self) -> Result<Hello, CaptureError> {
        self.down(None);
        let manifest = self.view.manifest();
        let known = &self.config.known;
        Ok(Hello {
            protocol: twinbox_protocol::PROTOCOL_VERSION,
            software: env!("CARGO_PKG_VERSION").into(),
            node: self.config.node.clone(),
            mirror: self.config.name.clone(),
            mirror_id: known.mirror_id,
            generation: known.generation,
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

    fn welcome(&mut self, welcome: &Welcome) -> Result<Result<Step, Refusal>, CaptureError> {
        self.pull = None;
        let generation = self.config.known.generation;
        if let Replica::Holds { generation: theirs, position, .. } = &welcome.replica
            && *theirs == generation
            && self.outbox.in_flight().any(|f| f.position == *position)
        {
            // Its last acknowledgements were lost on the way.
            self.handle_durable(position.lsn)?;
        }
        for path in self.view.handle_restart() {
            self.mark(&path, true, true, false);
        }
        self.flights.clear();
        if let Ok(mut recent) = self.recent.lock() {
            recent.clear();
        }
        let hello = self.hello()?;
        self.outbox.handle_restart(hello.position);
        Ok(match compare(&hello, welcome) {
            Verdict::Continue => Ok(Step::Begin { from: hello.position, reset: false }),
            Verdict::PullSince(lsn) => Ok(self.start_pull(Some(lsn))?),
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

    fn set_incomplete(&mut self) -> Result<(), CaptureError> {
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
        self.pull = Some(Pull { since, mark, paths: vec![], tried_all });
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
            fresh_start(self.config.known.generation, self.outbox.next_lsn().max(position.lsn.next()), digest)
        } else {
            position
        };
        let done = self.view.replace(|manifest| manifest.commit(from));
        done.map_err(|e| self.view.manifest().state_error(&e))?;
        self.outbox.handle_restart(from);
        for path in pull.paths {
            self.mark(&path, true, true, false);
        }
        self.compare |= reset;
        Ok(Ok(Step::Begin { from, reset }))
    }

    /// The session is over (`None`: a new one is being opened).
    fn down(&mut self, id: Option<u64>) {
        let Some(session) = self.session.take_if(|session| id.is_none_or(|id| session.id == id)) else { return };
        tracing::warn!(mirror = %self.config.name, session = session.id, "standby lost: unprotected until it is back");
        self.last_groups = None;
        // The txn waited for may never arrive, and its number be passed by others: what is dirty then is waited for instead.
        self.restart_waiters();
        self.awaiting.clear();
        self.staged_early.clear();
        self.incomplete_early.clear();
        self.misses.clear();
        self.ahead.clear();
        self.larges.clear();
        // Observations may rest on contents the standby turns out not to have.
        let mut again = vec![];
        let names: Vec<_> = self.sets.groups().map(|(name, _)| name.clone()).collect();
        for name in names {
            let group = self.sets.group(&name);
            again.extend(group.captured.keys().chain(group.staging.keys()).cloned());
        }
        for path in again {
            self.mark(&path, true, false, false);
        }
        if !self.complete {
            // Nothing of a first sync is kept in memory while nobody takes it.
            self.sets.clear();
            self.scan.clear();
            self.compare = true;
        }
    }

    /// The object an observation waits for has to be sent whole.
    fn incomplete(&mut self, hash: ContentHash) {
        self.heard();
        match self.awaiting.remove(&hash) {
            Some(all) => all.into_iter().for_each(|awaiting| self.send_whole(awaiting.id, awaiting.path)),
            None => {
                self.incomplete_early.insert(hash);
            }
        }
    }

    /// Reads the file of the job `id` again, for every byte, unless an event came for it.
    fn send_whole(&mut self, id: u64, path: RelPath) {
        let group = self.group_of_marked(&path);
        let (Some(session), Some(job)) = (&self.session, self.sets.group(&group).staging.get_mut(&path).filter(|job| **job == id)) else {
            return;
        };
        self.job_id += 1;
        *job = self.job_id;
        let _ = self.jobs.send(Job {
            id: self.job_id,
            out: session.bulk.clone(),
            mapped: self.mapped.contains(&path),
            path,
            base: None,
            ahead: None,
            replaces: None,
            in_place: false,
            whole: true,
            known: self.recent.clone(),
        }); // Ended only when this thread ends.
    }

    fn staged(&mut self, hash: ContentHash) {
        self.heard();
        let mut asked = false;
        for miss in self.misses.values_mut().filter(|miss| miss.hash == hash) {
            (asked, miss.arrived) = (true, true);
        }
        self.misses.retain(|_, miss| !(miss.read && miss.arrived));
        if asked && !self.awaiting.contains_key(&hash) {
            return; // An answer to the standby: nobody here waits for it.
        }
        match self.awaiting.remove(&hash) {
            Some(all) => {
                for Awaiting { id, path, seen, large } in all {
                    self.read_ahead(id, path, seen, large);
                }
            }
            // The standby was quicker than the bulk thread's own report.
            None => {
                self.staged_early.insert(hash);
            }
        }
    }

    /// An observation made by the bulk thread counts, unless an event came for its path.
    fn read_ahead(&mut self, id: u64, path: RelPath, seen: Seen, large: Option<(Large, Option<ContentHash>)>) {
        self.note_ahead(&path, &seen, large.as_ref().map(|(large, _)| large));
        let group = self.group_of_marked(&path);
        if self.sets.group(&group).staging.get(&path) != Some(&id) {
            return;
        }
        self.sets.group(&group).staging.remove(&path);
        match large {
            Some(large) => self.larges.insert(path.clone(), large),
            None => self.larges.remove(&path),
        };
        self.unreadable.remove(&path);
        self.sets.captured(&group, path, seen);
    }

    fn note_ahead(&mut self, path: &RelPath, seen: &Seen, large: Option<&Large>) {
        let Seen::Present(found) = seen else { return };
        let (Body::Staged, Some(hash)) = (&found.body, found.entry.hash()) else { return };
        let ahead = Ahead { hash, size: found.entry.size(), ino: found.local.ino, large: large.cloned() };
        if let Some(old) = self.ahead.insert(path.clone(), ahead) {
            self.unstage(old.hash);
        }
    }

    /// What was staged for `path` has been committed as it was or changed since, or never will be.
    pub(super) fn drop_ahead(&mut self, path: &RelPath, seen: &Seen) {
        let Some(ahead) = self.ahead.remove(path) else { return };
        let used = match seen {
            Seen::Present(found) => match &found.body {
                Body::Patch { base, .. } => *base == ahead.hash,
                _ => found.entry.hash() == Some(ahead.hash),
            },
            _ => false,
        };
        if !used {
            self.unstage(ahead.hash);
        }
    }

    fn unstage(&mut self, hash: ContentHash) {
        let wanted = self.awaiting.contains_key(&hash) || self.ahead.values().any(|ahead| ahead.hash == hash);
        if let (false, Some(session)) = (wanted, &self.session) {
            let _ = session.out.send(ToLink::Unstage(hash)); // A closed queue means the session is ending.
        }
    }

    fn bulk_done(&mut self, result: BulkResult) {
        let BulkResult { id, path, outcome } = result;
        // Of a session that ended: its path is dirty again, and the word of the standby it would wait for is another job's.
        if self.session.as_ref().is_none_or(|session| id <= session.old_jobs) {
            return;
        }
        if let Some(mut miss) = self.misses.remove(&id) {
            let sent = match &outcome {
                Outcome::Read { seen: Seen::Present(found), staged: true, .. } => found.entry.hash() == Some(miss.hash),
                _ => false,
            };
            if let (false, Some(session)) = (sent, &self.session) {
                let _ = session.out.send(ToLink::Gone(miss.hash));
            } else if !miss.arrived {
                miss.read = true;
                self.misses.insert(id, miss);
            }
            return;
        }
        match outcome {
            Outcome::Read { seen, large, staged: false } => self.read_ahead(id, path, seen, large),
            Outcome::Read { seen, large, staged: true } => {
                let hash = if let Seen::Present(found) = &seen { found.entry.hash() } else { None };
                let Some(hash) = hash.filter(|_| self.session.is_some()) else { return };
                if self.staged_early.remove(&hash) {
                    self.read_ahead(id, path, seen, large);
                } else if self.incomplete_early.remove(&hash) {
                    self.send_whole(id, path);
                } else {
                    self.awaiting.entry(hash).or_default().push(Awaiting { id, path, seen, large });
                }
            }
            Outcome::Unreadable(error) => {
                self.cannot_read(&path, error);
                self.read_ahead(id, path, Seen::Skip, None);
            }
            Outcome::Unstable | Outcome::Cut => {
                let group = self.group_of_marked(&path);
                // Of the path's newest job only: what an older one says is old, and the newer one is still waited for.
                if self.sets.group(&group).staging.get(&path) == Some(&id) {
                    self.mark(&path, true, false, false);
                }
            }
        }
    }

    /// The standby cannot find a content we took for known: send it whole, if we still have it.
    fn miss(&mut self, hash: ContentHash) -> Result<(), CaptureError> {
        self.heard();
        let Some(session) = &self.session else { return Ok(()) };
        let mut found = None;
        for path in self.view.paths_with(hash)? {
            let row = self.view.row(&path)?;
            let here = self.root.stat(&path).ok().flatten();
            if let (Some(local), Some(stat)) = (row.and_then(|row| row.local), here)
                && crate::tree::local(&stat).ino == local.ino
            {
                found = Some(path);
                break;
            }
        }
        match found {
            Some(path) => {
                self.job_id += 1;
                let job = Job {
                    id: self.job_id,
                    out: session.bulk.clone(),
                    path,
                    base: None,
                    ahead: None,
                    replaces: None,
                    in_place: false,
                    mapped: false,
                    whole: true,
                    known: self.recent.clone(),
                };
                let _ = self.jobs.send(job); // Ended only when this thread ends.
                self.misses.insert(self.job_id, Miss { hash, read: false, arrived: false });
            }
            None => {
                let _ = session.out.send(ToLink::Gone(hash));
            }
        }
        Ok(())
    }
}
