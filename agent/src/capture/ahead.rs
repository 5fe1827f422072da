//! Contents sent ahead of their txns: which large files are read when, and what becomes of what was read.
//!
//! A path is *open* from the moment it is wanted until its reading needed no staging, failed, or was staged by the standby; it is read once at a time. Two lanes, so that a change to what the standby has
//! already does not wait behind gigabytes: each reads in the order asked for (a third is for what the log waits for). An event that comes while a path waits in the queue changes nothing, it is read later
//! anyway; one that comes once it was given to a thread voids the observation. What was staged is then still worth having: the next reading is compared with it and the difference committed together with it, so a file that grows all the time
//! is sent once, and a group whose files never rest for as long as it takes to send them is cut.
//!
//! Invariant: every staged object is either named by a txn, kept in `ahead` for a path that is still pending, or let go (`Unstage`, or at the begin of a session by not being named in `Keep`).
//! Whether the standby still has it is not relied upon: what a txn names and it does not find it asks for (`Miss`).

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Bound;
use std::sync::Arc;
use std::sync::mpsc::Sender;

use twinbox_protocol::ids::{ContentHash, Lsn};
use twinbox_protocol::msg::KEEP_MAX;
use twinbox_protocol::path::RelPath;
use twinbox_resync::manifest::Large;
use twinbox_resync::plan::{Body, Seen};
use twinbox_resync::rows::Rows;

use super::bulk::{self, BulkResult, Job, Outcome};
use super::engine::{CaptureError, Engine};
use super::messages::{CaptureHandle, ToLink};
use super::staged::{Ahead, Staged};
use crate::tree::Root;

/// Jobs given to a lane's thread at once: one under way, one to go on with,
const DEPTH: usize = 2;
/// and of small files more, those included that the standby has not confirmed: a busy engine looks here a few times a second only.
const DEPTH_SMALL: usize = 32;
/// What those may hold together, in bytes.
const SMALL_MAX: u64 = 1024 * 1024;
/// Files up to this size go by the first lane, as does what is compared with something staged.
const QUICK_MAX: u64 = 16 * 1024 * 1024;

/// Number of a job.
pub(super) type JobId = u64;

/// A job that waits for its turn.
struct Wanted {
    id: JobId,
    path: RelPath,
    /// As far as known.
    size: u64,
    /// Every byte, no copies.
    whole: bool,
}

/// An observation whose content is on its way: it counts when the standby has staged it.
#[derive(Clone)]
pub(super) struct Awaiting {
    pub(super) id: JobId,
    pub(super) path: RelPath,
    pub(super) seen: Seen,
    pub(super) large: Option<(Large, Option<ContentHash>)>,
    /// The file changed while it was read: these bytes may never have been its content, and only serve to compare with.
    pub(super) torn: bool,
}

/// Contents sent at once for the standby's `verify`, which asks for one at a time.
const WANTED_MAX: usize = 16;

/// A content the standby asked for: answered when it was read here and has arrived there, in whatever order we hear of it.
struct Miss {
    hash: ContentHash,
    /// The log waits for it.
    urgent: bool,
    read: bool,
    arrived: bool,
    /// Other bytes were sent, which nobody wants.
    stray: bool,
}

impl Miss {
    /// What is said when it cannot be sent.
    fn no(&self) -> ToLink {
        if self.urgent { ToLink::Gone(self.hash) } else { ToLink::Lacks(self.hash) }
    }
}

/// See the module's text.
pub(super) struct Bulk {
    /// Quick ones, slow ones, and those that the log waits for.
    lanes: [Sender<Job>; 3],
    queues: [VecDeque<Wanted>; 3],
    /// Jobs given to the threads, by which lane and of what size; also those of sessions before.
    running: BTreeMap<JobId, (usize, u64)>,
    open: BTreeMap<RelPath, JobId>,
    pub(super) ahead: Staged,
    /// Staged objects that txns in flight name.
    named: BTreeMap<ContentHash, Lsn>,
    /// The standby says one word for each object; several of one content are told apart by nobody, and need not be.
    pub(super) awaiting: HashMap<ContentHash, VecDeque<Awaiting>>,
    /// Words of the standby that came before the thread's report: staged or not, at most one for each job under way.
    early: HashMap<ContentHash, VecDeque<bool>>,
    misses: BTreeMap<JobId, Miss>,
    last_id: JobId,
    /// Objects that the standby said it has staged since somebody asked, for `pace`.
    pub(super) came: u64,
}

/// Takes what is kept for a path and all below it.
pub(super) fn take_within<T>(map: &mut BTreeMap<RelPath, T>, dir: &RelPath) -> Vec<(RelPath, T)> {
    let mut paths: Vec<RelPath> = map.get_key_value(dir).map(|(path, _)| path.clone()).into_iter().collect();
    if let Some((low, high)) = dir.below() {
        let bounds = (Bound::Included(low.as_slice()), Bound::Excluded(high.as_slice()));
        paths.extend(map.range::<[u8], _>(bounds).map(|(path, _)| path.clone()));
    }
    paths.into_iter().filter_map(|path| map.remove_entry(&path)).collect()
}

/// Takes the oldest of a content.
fn pop<T>(queues: &mut HashMap<ContentHash, VecDeque<T>>, hash: ContentHash) -> Option<T> {
    let queue = queues.get_mut(&hash)?;
    let first = queue.pop_front();
    if queue.is_empty() {
        queues.remove(&hash);
    }
    first
}

impl Bulk {
    /// Starts the threads; they end when this is dropped.
    pub(super) fn start(root: &Arc<Root>, handle: &CaptureHandle) -> Self {
        Bulk {
            lanes: [(); 3].map(|()| bulk::start(root.clone(), handle.clone())),
            queues: Default::default(),
            running: BTreeMap::new(),
            open: BTreeMap::new(),
            ahead: Staged::default(),
            named: BTreeMap::new(),
            awaiting: HashMap::new(),
            early: HashMap::new(),
            misses: BTreeMap::new(),
            last_id: 0,
            came: 0,
        }
    }

    /// Number of the newest job.
    pub(super) fn last_id(&self) -> JobId {
        self.last_id
    }

    /// Whether the path is being read, or waits for that: it need not be looked at before.
    pub(super) fn is_open(&self, path: &RelPath) -> bool {
        self.open.contains_key(path)
    }

    /// Nothing of what was under way counts any more; what runs ends by itself. What is staged stays: the next session says so, or drops it.
    pub(super) fn session_ended(&mut self) {
        self.queues.iter_mut().for_each(VecDeque::clear);
        self.open.clear();
        self.awaiting.clear();
        self.early.clear();
        self.misses.clear();
    }

    /// No txn that is in flight names anything any more.
    pub(super) fn forget_named(&mut self) {
        self.named.clear();
    }

    /// What a lane's thread is given next.
    fn next(&mut self, lane: usize) -> Option<Wanted> {
        let (mut jobs, mut bytes) = (0, 0);
        for (_, size) in self.running.values().filter(|(of, _)| *of == lane) {
            (jobs, bytes) = (jobs + 1, bytes + size);
        }
        let size = self.queues[lane].front()?.size;
        let unconfirmed: usize = self.awaiting.values().map(VecDeque::len).sum();
        let fits = jobs < DEPTH || (jobs + unconfirmed < DEPTH_SMALL && bytes + size <= SMALL_MAX);
        if fits { self.queues[lane].pop_front() } else { None }
    }

    fn next_id(&mut self) -> JobId {
        self.last_id += 1;
        self.last_id
    }

    /// What is left when there is nothing to do, which should be nothing.
    #[cfg(test)]
    pub(super) fn left(&self) -> Option<String> {
        let (open, ahead) = (&self.open, self.ahead.paths());
        let left = (!open.is_empty() || !ahead.is_empty()).then(|| format!("open {open:?} ahead {ahead:?}"));
        left.or_else(|| (!self.awaiting.is_empty()).then(|| format!("awaiting {:?}", self.awaiting.keys())))
    }
}

impl Engine {
    /// Has a file read by a thread of its own.
    pub(super) fn send_ahead(&mut self, group: &[u8], path: RelPath, size: u64) -> Result<(), CaptureError> {
        let id = self.bulk.next_id();
        let lane = usize::from(size > QUICK_MAX && self.bulk.ahead.get(&path).is_none());
        self.sets.group(group).staging.insert(path.clone(), id);
        self.bulk.open.insert(path.clone(), id);
        self.bulk.queues[lane].push_back(Wanted { id, path, size, whole: false });
        self.dispatch()
    }

    fn dispatch(&mut self) -> Result<(), CaptureError> {
        for lane in 0..self.bulk.lanes.len() {
            while let Some(wanted) = self.bulk.next(lane) {
                let (id, size) = (wanted.id, wanted.size);
                if let Some(job) = self.job(wanted)? {
                    self.bulk.running.insert(id, (lane, size));
                    let _ = self.bulk.lanes[lane].send(job); // Ended only when this is dropped.
                }
            }
        }
        Ok(())
    }

    /// What the thread needs to know, as of now; `None` when nobody wants it any more.
    fn job(&mut self, Wanted { id, path, whole, .. }: Wanted) -> Result<Option<Job>, CaptureError> {
        let Some(out) = self.session.as_ref().map(|session| session.bulk.clone()) else { return Ok(None) };
        if !self.bulk.misses.contains_key(&id) {
            let group = self.group_of_marked(&path);
            if self.sets.group(&group).staging.get(&path) != Some(&id) {
                // An event came while it waited: it is read after that.
                if self.sets.take(&group, &path).is_none() {
                    self.close(&path, id);
                    return Ok(None);
                }
                self.sets.group(&group).staging.insert(path.clone(), id);
            }
        }
        let row = self.view.row(&self.sets.origin(&path))?;
        let mut base = match row.as_ref().and_then(|row| row.entry.hash()).filter(|_| !whole) {
            Some(hash) => self.view.large(hash)?.map(|large| (hash, large)),
            None => None,
        };
        let replaces = base.as_ref().map(|(hash, _)| *hash);
        let mut ino = row.and_then(|row| row.local).map(|local| local.ino);
        let here = self.root.stat(&path).ok().flatten().filter(|stat| stat.st_nlink == 1).map(|stat| stat.st_ino);
        let mut ahead = None;
        if let Some(staged) = self.bulk.ahead.get(&path).filter(|staged| !whole && Some(staged.ino) == here)
            && let Some(large) = &staged.large
        {
            (base, ahead, ino) = (Some((staged.hash, large.clone())), Some(staged.size), here);
        }
        let (in_place, mapped) = (!whole && here.is_some() && here == ino, self.mapped.contains(&path));
        Ok(Some(Job { id, out, path, base, ahead, replaces, in_place, mapped, whole, known: self.recent.clone() }))
    }

    /// The path can be looked at again.
    fn close(&mut self, path: &RelPath, id: JobId) {
        if self.bulk.open.get(path) == Some(&id) {
            self.bulk.open.remove(path);
            let group = self.group_of_marked(path);
            self.sets.wake(&group, path);
        }
    }

    /// What a thread has to say.
    pub(super) fn bulk_done(&mut self, result: BulkResult) -> Result<(), CaptureError> {
        let BulkResult { id, path, outcome } = result;
        self.bulk.running.remove(&id);
        // Of a session that ended: its path is dirty again, and the word of the standby it would wait for is another job's.
        let counts = self.session.as_ref().is_some_and(|session| id > session.old_jobs);
        if !counts {
        } else if let Some(mut miss) = self.bulk.misses.remove(&id) {
            let sent = match &outcome {
                Outcome::Read { seen: Seen::Present(found), staged: true, .. } => found.entry.hash(),
                _ => None,
            };
            if let (true, Some(session)) = (sent != Some(miss.hash), &self.session) {
                let _ = session.out.send(miss.no());
                self.doubt |= miss.urgent;
                // The word that was taken for the answer was of another job of the same content.
                let taken = std::mem::take(&mut miss.arrived).then_some(miss.hash);
                // The file has other bytes: they are on their way, and the standby will say that they came.
                if let Some(other) = sent {
                    (miss.hash, miss.stray) = (other, true);
                    miss.arrived = pop(&mut self.bulk.early, other).is_some();
                    if miss.arrived {
                        self.unstage(other);
                    }
                }
                if let Some(taken) = taken {
                    self.came(taken)?;
                }
            }
            if sent.is_some() && !miss.arrived {
                miss.read = true;
                self.bulk.misses.insert(id, miss);
            }
        } else {
            self.read(id, path, outcome)?;
        }
        self.dispatch()
    }

    fn read(&mut self, id: JobId, path: RelPath, outcome: Outcome) -> Result<(), CaptureError> {
        match outcome {
            Outcome::Read { seen, large, staged: false, torn } => {
                self.arrived(Awaiting { id, path, seen, large, torn })?;
            }
            Outcome::Read { seen, large, staged: true, torn } => {
                let hash = if let Seen::Present(found) = &seen { found.entry.hash() } else { None };
                let Some(hash) = hash else { return Ok(()) };
                let awaiting = Awaiting { id, path, seen, large, torn };
                match pop(&mut self.bulk.early, hash) {
                    Some(true) => self.arrived(awaiting)?,
                    Some(false) => self.send_whole(awaiting),
                    None => self.bulk.awaiting.entry(hash).or_default().push_back(awaiting),
                }
            }
            Outcome::Unreadable(error) => {
                self.cannot_read(&path, error);
                self.arrived(Awaiting { id, path, seen: Seen::Skip, large: None, torn: false })?;
            }
            Outcome::Unstable | Outcome::Cut => {
                self.close(&path, id);
                let group = self.group_of_marked(&path);
                // Of the path's newest job only: what an older one says is old, and the newer one is still waited for.
                if self.sets.group(&group).staging.get(&path) == Some(&id) {
                    self.mark(&path, true, false, false);
                }
            }
        }
        Ok(())
    }

    /// An observation is complete. It counts, unless an event came for its path.
    fn arrived(&mut self, awaiting: Awaiting) -> Result<(), CaptureError> {
        let Awaiting { id, path, seen, large, torn } = awaiting;
        self.close(&path, id);
        self.note_ahead(&path, &seen, large.as_ref().map(|(large, _)| large));
        let group = self.group_of_marked(&path);
        if self.sets.group(&group).staging.get(&path) != Some(&id) {
            return Ok(());
        }
        if torn {
            self.mark(&path, true, false, false);
            return Ok(());
        }
        if let Seen::Present(found) = &seen {
            let row = self.view.row(&self.sets.origin(&path))?;
            self.note_in_place(found, row.as_ref())?;
            self.other_names(&group, &path, found, row.as_ref())?;
        }
        self.sets.group(&group).staging.remove(&path);
        match large {
            Some(large) => self.larges.insert(path.clone(), large),
            None => self.larges.remove(&path),
        };
        if seen != Seen::Skip {
            self.unreadable.remove(&path);
        }
        self.sets.captured(&group, path, seen);
        Ok(())
    }

    fn note_ahead(&mut self, path: &RelPath, seen: &Seen, large: Option<&Large>) {
        let Seen::Present(found) = seen else { return };
        let (Body::Staged, Some(hash)) = (&found.body, found.entry.hash()) else { return };
        let group = self.group_of_marked(path);
        let pending = self.sets.is_dirty(&group, path) || self.sets.group(&group).staging.contains_key(path);
        let ahead = Ahead { hash, size: found.entry.size(), ino: found.local.ino, large: large.cloned() };
        let old = if pending { self.bulk.ahead.insert(path.clone(), ahead) } else { Some(ahead) };
        if let Some(old) = old {
            self.unstage(old.hash);
        }
    }

    /// These paths are committed by the txn `lsn`, as they were staged, changed since, or otherwise.
    pub(super) fn drop_ahead(&mut self, seen: &BTreeMap<RelPath, Seen>, lsn: Lsn) {
        for seen in seen.values() {
            let Seen::Present(found) = seen else { continue };
            let named = match &found.body {
                Body::Patch { base, ahead: Some(_), .. } => Some(*base),
                Body::Staged => found.entry.hash(),
                _ => None,
            };
            self.bulk.named.extend(named.map(|hash| (hash, lsn)));
        }
        let dropped: Vec<Ahead> = seen.keys().filter_map(|path| self.bulk.ahead.remove(path)).collect();
        dropped.into_iter().for_each(|ahead| self.unstage(ahead.hash));
    }

    /// Nothing that was staged ahead is pending any more.
    pub(super) fn drop_all_ahead(&mut self) {
        let all = std::mem::take(&mut self.bulk.ahead);
        all.hashes().for_each(|hash| self.unstage(hash));
    }

    /// What was staged for a path is not wanted.
    pub(super) fn ahead_in_vain(&mut self, path: &RelPath) {
        if let Some(ahead) = self.bulk.ahead.remove(path) {
            self.unstage(ahead.hash);
        }
    }

    /// What was staged for a path is staged for its new name; for what was there before, in vain.
    pub(super) fn ahead_moved(&mut self, from: &RelPath, to: &RelPath) {
        let mut dropped: Vec<Ahead> = self.bulk.ahead.take_within(to).into_iter().map(|(_, ahead)| ahead).collect();
        for (path, ahead) in self.bulk.ahead.take_within(from) {
            match path.rebase(from, to) {
                Some(new) => drop(self.bulk.ahead.insert(new, ahead)),
                None => dropped.push(ahead),
            }
        }
        dropped.into_iter().for_each(|ahead| self.unstage(ahead.hash));
    }

    /// A session begins: what is staged there that is still wanted here, in messages.
    pub(super) fn keep_staged(&self) -> Vec<ToLink> {
        let named = self.bulk.named.keys().copied().filter(|hash| !self.bulk.ahead.holds(*hash));
        let all: Vec<ContentHash> = self.bulk.ahead.hashes().chain(named).collect();
        let mut parts: Vec<Vec<ContentHash>> = all.chunks(KEEP_MAX).map(<[ContentHash]>::to_vec).collect();
        let last = parts.pop().unwrap_or_default();
        let more = parts.into_iter().map(|hashes| ToLink::Keep { hashes, last: false });
        more.chain([ToLink::Keep { hashes: last, last: true }]).collect()
    }

    /// Txns up to `lsn` are durable.
    pub(super) fn named_until(&mut self, lsn: Lsn) {
        let durable: Vec<ContentHash> = self.bulk.named.iter().filter(|(_, at)| **at <= lsn).map(|(hash, _)| *hash).collect();
        for hash in durable {
            self.bulk.named.remove(&hash);
            // Also what the txn did not put after all (a link, or the same content as before): nothing has pinned that.
            self.unstage(hash);
        }
    }

    fn unstage(&mut self, hash: ContentHash) {
        let wanted = self.bulk.awaiting.contains_key(&hash) || self.bulk.named.contains_key(&hash) || self.bulk.ahead.holds(hash);
        if let (false, Some(session)) = (wanted, &self.session) {
            let _ = session.out.send(ToLink::Unstage(hash)); // A closed queue means the session is ending.
        }
    }

    /// The standby has a content staged.
    pub(super) fn staged(&mut self, hash: ContentHash) -> Result<(), CaptureError> {
        self.heard();
        // An answer to the standby: nobody here waits for it.
        let asked = self.bulk.misses.values_mut().find(|miss| miss.hash == hash && !miss.arrived);
        if let Some(miss) = asked {
            miss.arrived = true;
            let stray = miss.stray;
            self.bulk.misses.retain(|_, miss| !(miss.read && miss.arrived));
            if stray {
                self.unstage(hash);
            }
        } else {
            self.came(hash)?;
        }
        self.dispatch()
    }

    /// An object that a txn is to name is staged there.
    fn came(&mut self, hash: ContentHash) -> Result<(), CaptureError> {
        self.bulk.came += 1;
        match pop(&mut self.bulk.awaiting, hash) {
            Some(awaiting) => self.arrived(awaiting),
            None => {
                self.bulk.early.entry(hash).or_default().push_back(true);
                Ok(())
            }
        }
    }

    /// The standby cannot put an object together: what it should copy from is not there.
    pub(super) fn incomplete(&mut self, hash: ContentHash) -> Result<(), CaptureError> {
        self.heard();
        match pop(&mut self.bulk.awaiting, hash) {
            Some(awaiting) => self.send_whole(awaiting),
            None => self.bulk.early.entry(hash).or_default().push_back(false),
        }
        self.dispatch()
    }

    /// Reads the file of the job `id` again, for every byte.
    fn send_whole(&mut self, Awaiting { id, path, seen, .. }: Awaiting) {
        if self.bulk.open.get(&path) != Some(&id) {
            return;
        }
        let new = self.bulk.next_id();
        let group = self.group_of_marked(&path);
        if let Some(job) = self.sets.group(&group).staging.get_mut(&path).filter(|job| **job == id) {
            *job = new;
        }
        self.bulk.open.insert(path.clone(), new);
        let size = if let Seen::Present(found) = &seen { found.entry.size() } else { 0 };
        self.bulk.queues[1].push_back(Wanted { id: new, path, size, whole: true });
    }

    /// The standby cannot find a content we took for known: send it whole, if we still have it.
    pub(super) fn miss(&mut self, hash: ContentHash) -> Result<(), CaptureError> {
        self.send_again(hash, None)
    }

    /// The standby's file at `path` is damaged: send its content, if this is still what is here.
    pub(super) fn want(&mut self, path: RelPath, hash: ContentHash) -> Result<(), CaptureError> {
        self.send_again(hash, Some(path))
    }

    /// Sends a content that the standby has or had: of `wanted`, where nothing waits for it.
    fn send_again(&mut self, hash: ContentHash, wanted: Option<RelPath>) -> Result<(), CaptureError> {
        self.heard();
        let Some(session) = &self.session else { return Ok(()) };
        let miss = Miss { hash, urgent: wanted.is_none(), read: false, arrived: false, stray: false };
        if !miss.urgent && self.bulk.misses.len() >= WANTED_MAX {
            let _ = session.out.send(miss.no());
            return Ok(());
        }
        let mut found = None;
        // Contents of a few bytes are found by their path only.
        for path in wanted.into_iter().chain(self.view.paths_with(hash)?) {
            let row = self.view.row(&path)?.filter(|row| row.entry.hash() == Some(hash));
            let here = self.root.stat(&path).ok().flatten();
            if let (Some(local), Some(stat)) = (row.and_then(|row| row.local), here)
                && crate::tree::local(&stat).ino == local.ino
            {
                found = Some((path, stat.st_size as u64));
                break;
            }
        }
        let Some((path, size)) = found else {
            let _ = session.out.send(miss.no());
            self.doubt |= miss.urgent;
            return Ok(());
        };
        let id = self.bulk.next_id();
        let wanted = Wanted { id, path, size, whole: true };
        if miss.urgent {
            self.bulk.queues[2].push_back(wanted);
        } else {
            self.bulk.queues[1].push_back(wanted);
        }
        self.bulk.misses.insert(id, miss);
        self.dispatch()
    }
}
