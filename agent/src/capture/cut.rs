//! Rounds: look at every member of the groups that are dirty, between two boundaries, and commit those of which no member was touched meanwhile.
//!
//! The committed content is the group's state at the *first* boundary: whatever was dirty then has been read since, and no event named it until the second boundary came out. Members that were touched, and what
//! became dirty meanwhile, are the next round's; what was read and not touched need not be read again. Before the second boundary the directory of each name looked at is read once: a change of names
//! that we may have observed holds that directory's lock until its events are queued.

use std::collections::{BTreeSet, HashSet};
use std::time::{Duration, Instant};

use serde_bytes::ByteBuf;
use twinbox_protocol::entry::Time;
use twinbox_protocol::ids::{ContentHash, Lsn};
use twinbox_protocol::ops::{FLAG_FUZZY, FLAG_INITIAL, FLAG_PARTIAL, INLINE_MAX, Op, Seg};
use twinbox_protocol::path::RelPath;
use twinbox_resync::plan::{Body, Found, PlanError, Seen, plan};
use twinbox_resync::rows::{Row, Rows};

use super::dirty::{Group, Mark, Pending};
use super::engine::{CaptureError, ComesBack, Engine};
use super::fresh::Which;
use super::look::{Known, Look, SEG_DATA_MAX, look, read_whole};
use super::messages::ToLink;
use super::pulse::Stage;

/// Files looked at in one round, and bytes read: some milliseconds, so that other groups and the queue do not wait long.
const ROUND_FILES: usize = 512;
const ROUND_BYTES: usize = 8 * 1024 * 1024;
/// A group that holds more than this sends the rest of its content ahead on bulk streams.
const GROUP_BYTES: usize = 32 * 1024 * 1024;
/// When all groups together hold so many windows, bytes are read twice: to know them, and when they are sent.
const WINDOWS_HELD: usize = 2;
/// How often these bytes are counted.
const HELD_EVERY: Duration = Duration::from_millis(200);
/// A file somebody is writing is left alone until it was quiet for this long,
const SETTLE: Duration = Duration::from_millis(4);
/// but not longer than this.
const SETTLE_MAX: Duration = Duration::from_millis(40);
/// A large file somebody is writing costs more to read in vain: the same, for it.
const BULK_SETTLE: Duration = Duration::from_millis(50);
const BULK_SETTLE_MAX: Duration = Duration::from_secs(5);
/// A file that is being read ahead is looked at when that is over; this only says when nobody came to say so.
const OPEN_WAIT: Duration = Duration::from_millis(250);
/// Txns in flight at most.
const FLIGHTS_MAX: usize = 4096;
/// LSNs reserved at a time.
const RESERVE: u64 = 4096;
/// A group that lags for longer than this is wondered about.
const WHY_AFTER: Duration = Duration::from_secs(1);
/// Latencies kept for status.
const LATENCIES: usize = 1000;

impl Engine {
    /// Whether cuts can be taken at all now.
    pub(super) fn can_cut(&self) -> bool {
        self.session.is_some() && self.has_window() && (!self.complete || self.scan.is_done())
    }

    /// Whether more may be in flight.
    fn has_window(&self) -> bool {
        self.outbox.bytes_in_flight() < self.config.window_bytes && self.outbox.in_flight().len() < FLIGHTS_MAX
    }

    /// One round; `true` when it should go on at once.
    pub(super) fn round(&mut self) -> Result<bool, CaptureError> {
        let now = Instant::now();
        let overdue =
            self.config.fuzzy_after.is_some_and(|limit| self.sets.oldest().is_some_and(|since| now.duration_since(since) >= limit));
        if !self.can_cut() || !(overdue || self.sets.has_work(now)) {
            return Ok(false);
        }
        if self.unsaved_incomplete {
            self.set_incomplete()?;
            self.unsaved_incomplete = false;
        }
        let boundary = self.root.surely_before(wall());
        self.boundary()?;
        self.scan.settle(self.session.is_some());
        if !self.can_cut() {
            return Ok(true); // The events asked for a comparison first.
        }
        self.meanwhile();
        // A write under another name, or into a mapping, raises no event: what is open for writing is compared, event or not.
        let work: Vec<RelPath> =
            self.writers.keys().filter(|path| !self.sets.group_is_clean(&self.group_of(path, false))).cloned().collect();
        for path in work {
            self.check_writer(&path)?;
        }
        let mut groups: Vec<(Option<Instant>, Group)> = self.sets.groups().map(|(name, g)| (g.since, name.clone())).collect();
        groups.sort();
        self.sets.start_round();
        // Counting costs as much as there is: not each time. In between it only grows, and who has less room than there is reads a file twice.
        if now.duration_since(self.held_at) >= HELD_EVERY {
            (self.held_bytes, self.held_at) = (self.sets.held_bytes(), now);
        }
        let (mut files, mut bytes, mut taken) = (0, 0, BTreeSet::new());
        let mut parents = BTreeSet::new();
        let mut units: Vec<BTreeSet<Group>> = vec![];
        for (_, name) in groups {
            if taken.contains(&name) || files >= ROUND_FILES || bytes >= ROUND_BYTES {
                continue;
            }
            let unit = self.sets.closure(&name);
            if self.sets.is_held(&unit) {
                taken.extend(unit);
                continue;
            }
            self.pulse.enter(Stage::Look);
            for name in &unit {
                self.sets.freeze(name);
                self.look_at_group(name, boundary, &mut files, &mut bytes, &mut parents)?;
            }
            taken.extend(unit.iter().cloned());
            units.push(unit);
        }
        self.meanwhile();
        // Renames of directories above, too, hold the locks of theirs.
        for dir in super::engine::above(parents.iter()) {
            self.barrier(&dir);
        }
        self.meanwhile();
        self.boundary()?;
        self.meanwhile();
        self.pulse.enter(Stage::Commit);
        let (mut again, mut committed, mut judged) = (false, false, BTreeSet::new());
        for unit in units {
            // A rename since may have joined it to another,
            let unit: BTreeSet<Group> = unit.iter().flat_map(|name| self.sets.closure(name)).collect();
            if !judged.is_disjoint(&unit) {
                // with which it was cut, or not: thawed, that one lacks its renames.
                again = true;
                unit.difference(&judged).for_each(|name| self.sets.thaw(name));
                continue;
            }
            judged.extend(unit.iter().cloned());
            // Each unit that is cut fills the window.
            if self.is_cut(&unit) && self.has_window() && self.read_again(&unit)? {
                self.pace.cuts += 1;
                committed |= self.commit(&unit, 0)?;
            } else if self.is_overdue(&unit) && !self.leaves_for_another(&unit) {
                committed |= self.commit_fuzzy(&unit, boundary)?;
            } else {
                again = true;
                self.tell_why(&unit);
                unit.iter().for_each(|name| self.sets.thaw(name));
                self.summary.spoiled_rounds += u64::from(unit.iter().any(|name| self.sets.group(name).spoiled));
            }
        }
        Ok(committed || again && self.sets.has_work(Instant::now()))
    }

    fn is_cut(&mut self, unit: &BTreeSet<Group>) -> bool {
        if self.sets.is_held(unit) || self.sets.is_waiting(unit, Instant::now()) {
            return false; // Joined since; or it was tried a moment ago.
        }
        // A first sync ships what it has seen, but not half a rename: what is below a directory was compared with the rows of its old name.
        let partial = !self.complete && !self.scan.is_done() && !self.sets.has_renames(unit);
        // The round began when everything was compared, so what came since is of after it: a file that is gone had left for a directory that was known then.
        let compared = !self.complete || !self.is_being_compared(unit);
        let whole = partial || compared && unit.iter().all(|name| self.sets.is_round_whole(name));
        // Names of one inode seen at different times: an event under one of them says nothing of the others, and the manifest may not know them yet.
        let mut stale = if whole { self.sets.stale_links(unit) } else { vec![] };
        if whole {
            // Nor does one under a name that is gone, or another file's, by now.
            // (Its ctime moves with every link of it that comes or goes.)
            let changed = |(path, which): (&RelPath, Which)| {
                let now = self.root.stat(path).ok().flatten().map(|stat| (stat.st_ino, stat.st_size as u64, crate::tree::mtime(&stat)));
                (now != Some(which)).then(|| path.clone())
            };
            stale.extend(self.sets.linked(unit).filter_map(changed));
        }
        stale.iter().for_each(|path| self.mark(path, true, true, false));
        if !whole || stale.iter().any(|path| unit.contains(&self.group_of(path, false))) || self.leaves_for_another(unit) {
            return false;
        }
        self.sets.wait_for(unit, &BTreeSet::new(), Instant::now());
        true
    }

    /// Whether something in these groups, or all of them, is still to be compared.
    fn is_being_compared(&self, unit: &BTreeSet<Group>) -> bool {
        let above = |dir: &RelPath, group: &Group| RelPath::new(group).is_ok_and(|group| group.is_within(dir));
        self.scan.left().any(|dir| {
            [true, false].iter().any(|is_dir| unit.contains(&self.group_of(dir, *is_dir))) || unit.iter().any(|group| above(dir, group))
        })
    }

    /// Whether a file that goes in this unit has a new name elsewhere that is not there yet: of a move made by link and unlink the new name comes first, for the message was in both places.
    fn leaves_for_another(&mut self, unit: &BTreeSet<Group>) -> bool {
        if (self.fresh.is_empty() && !self.strayed) || !self.complete {
            return false;
        }
        // After a kill or a power cut the inode may not be known (yet).
        let which = |row: &Row| row.entry.hash().map(|_| (row.local.map(|local| local.ino), row.entry.size(), row.entry.mtime));
        // Files that went with their directory are not named one by one.
        let gone = |path: &RelPath| {
            let origin = self.sets.origin(path);
            let row = self.view.row(&origin).ok().flatten();
            let below = row.as_ref().filter(|row| row.entry.is_dir()).and_then(|_| self.view.below(&origin).ok()).unwrap_or_default();
            row.iter().chain(below.iter().map(|(_, row)| row)).filter_map(which).collect::<Vec<_>>()
        };
        let mut gone: HashSet<(Option<u64>, u64, Time)> = self.sets.absent(unit).flat_map(gone).collect();
        if gone.is_empty() {
            return false;
        }
        let strayed = self.strayed && !self.scan.is_done();
        let root = &self.root;
        let stat = |path: &RelPath| {
            let stat = root.stat(path).ok().flatten()?;
            Some(((stat.st_ino, stat.st_size as u64, crate::tree::mtime(&stat)), stat.st_nlink))
        };
        if !strayed {
            self.fresh.ask(stat);
            gone.retain(|(_, size, mtime)| self.fresh.may_be(*size, *mtime));
            if gone.is_empty() {
                return false; // As nearly always.
            }
        }
        // Renamed within the unit, or there under another name: it is somewhere.
        let here: HashSet<u64> = self.sets.inodes(unit).collect();
        let absent: HashSet<&RelPath> = self.sets.absent(unit).collect();
        let is_absent = |path: RelPath| std::iter::successors(Some(path), RelPath::parent).any(|at| absent.contains(&at));
        gone.retain(|(ino, ..)| {
            ino.is_none_or(|ino| {
                !here.contains(&ino) && self.view.by_ino(ino).is_ok_and(|names| names.iter().all(|name| is_absent(self.sets.now_at(name))))
            })
        });
        if gone.is_empty() {
            return false;
        }
        if strayed {
            return true; // It may be what is on its way to a directory that is still to be listed.
        }
        let names: BTreeSet<RelPath> = gone.iter().flat_map(|which| self.fresh.find(*which, stat)).collect();
        let mut found = BTreeSet::new();
        for path in names {
            let group = self.group_of(&path, false);
            if !self.sets.is_pending(&group, &path) {
                self.fresh.remove(&path); // Nobody is going to commit it.
            } else if !unit.contains(&group) {
                found.insert(group);
            }
        }
        if found.is_empty() {
            return false;
        }
        tracing::debug!(mirror = %self.config.name, unit = unit.len(), others = found.len(), ?gone, "after others: moved by link and unlink");
        // Cut together, twenty mailboxes that have links of one message would soon be one unit that never rests.
        self.sets.wait_for(unit, &found, Instant::now());
        true
    }

    /// For whoever wonders, at DEBUG, why mail lags: what keeps a group from being cut for longer than a second, once a second.
    fn tell_why(&mut self, unit: &BTreeSet<Group>) {
        let now = Instant::now();
        let since = unit.iter().filter_map(|name| self.sets.group(name).since).min();
        if since.is_none_or(|since| now.duration_since(since) < WHY_AFTER) || now.duration_since(self.told_why) < WHY_AFTER {
            return;
        }
        self.told_why = now;
        let (round, mut old, mut staging, mut spoiled, mut dirty) = (self.sets.round(), vec![], 0, 0, 0);
        for name in unit {
            let state = self.sets.group(name);
            spoiled += usize::from(state.spoiled);
            staging += state.staging.len();
            dirty += state.dirty.len();
            old.extend(state.dirty.iter().filter(|(_, mark)| mark.round < round).map(|(path, mark)| (path.clone(), *mark)).take(3));
        }
        let first = unit.first().map(|name| String::from_utf8_lossy(name).into_owned());
        tracing::debug!(mirror = %self.config.name, groups = unit.len(), ?first, spoiled, staging, dirty, ?old, scan = !self.scan.is_done(), "not cut");
    }

    /// Whether policy says not to wait for a cut of these groups any longer.
    fn is_overdue(&mut self, unit: &BTreeSet<Group>) -> bool {
        let Some(limit) = self.config.fuzzy_after.filter(|_| self.complete && self.scan.is_done()) else { return false };
        let since = unit.iter().filter_map(|name| self.sets.group(name).since).min();
        !self.sets.is_held(unit) && since.is_some_and(|since| since.elapsed() >= limit)
    }

    /// Sends what can be read now, each file for itself at rest, the group not at one point in time: flagged, counted and said.
    fn commit_fuzzy(&mut self, unit: &BTreeSet<Group>, boundary: Time) -> Result<bool, CaptureError> {
        let (mut files, mut bytes, mut parents) = (0, 0, BTreeSet::new());
        for name in unit {
            self.look_at_group(name, boundary, &mut files, &mut bytes, &mut parents)?;
        }
        self.read_again(unit)?;
        tracing::warn!(mirror = %self.config.name, groups = unit.len(), "a group did not rest: sent as it was read, not at one point in time (fuzzy_after)");
        tracing::debug!(groups = ?unit.iter().map(|name| String::from_utf8_lossy(name)).collect::<Vec<_>>(), "fuzzy");
        self.summary.fuzzy_cuts += 1;
        self.commit(unit, FLAG_FUZZY)
    }

    fn look_at_group(
        &mut self,
        name: &[u8],
        boundary: Time,
        files: &mut usize,
        bytes: &mut usize,
        parents: &mut BTreeSet<RelPath>,
    ) -> Result<(), CaptureError> {
        let now = Instant::now();
        let real = self.sets.group(name).dirty.values().any(|m| !m.quiet && m.not_before.is_none_or(|at| at <= now));
        let due: Vec<RelPath> = self.sets.group(name).dirty.keys().take(ROUND_FILES.saturating_sub(*files)).cloned().collect();
        for path in due {
            if *files >= ROUND_FILES || *bytes >= ROUND_BYTES {
                break;
            }
            let Some(mark) = self.sets.take(name, &path) else { continue };
            if mark.not_before.is_some_and(|at| at > now) && !(mark.quiet && real) {
                self.sets.put_back(name, path, mark);
                continue;
            }
            self.meanwhile();
            *files += 1;
            if let Some(parent) = path.parent() {
                parents.insert(parent);
            }
            *bytes += self.look_at(name, path, mark, boundary)?;
        }
        Ok(())
    }

    /// One look; gives the bytes it read.
    fn look_at(&mut self, name: &[u8], path: RelPath, mark: Mark, boundary: Time) -> Result<usize, CaptureError> {
        let now = Instant::now();
        if self.config.selection.excludes(path.as_bytes(), self.watch.at(&path).is_some()) {
            // Exclusions changed: what the standby has of it goes.
            self.sets.take_kept(&path);
            self.unreadable.remove(&path);
            self.sets.captured(name, path, Seen::Absent);
            return Ok(0);
        }
        if self.bulk.is_open(&path) {
            self.sets.put_back(name, path, Mark { not_before: Some(now + OPEN_WAIT), ..mark }); // Woken when it is read.
            return Ok(0);
        }
        let row = self.view.row(&self.sets.origin(&path))?;
        let known = Known {
            row: row.as_ref(),
            content: mark.content,
            // A file that is moved from where it was not compared yet to where that is over is in no listing.
            scan: mark.scan || self.scan.is_first(),
            quiet_only: now.duration_since(mark.last) < SETTLE && now.duration_since(mark.since) < SETTLE_MAX,
            unfinished: self
                .closers
                .last(&path)
                .filter(|_| mark.open)
                .map(|closed| (now.duration_since(mark.last), now.duration_since(closed))),
            boundary,
        };
        if self.mapped.contains(&path) {
            super::mapped::sync(&self.root, &path); // A store while it is read moves its ctime then.
        }
        let (seen, writer) = match self.kept(&path, &mark) {
            Some(found) => (Look::Seen(Seen::Present(found), self.larges.remove(&path)), None),
            None => {
                self.pace.looked += 1;
                let view = &self.view;
                look(&self.root, &path, &known, |hash| view.large(hash).ok().flatten(), &*self.recent)
            }
        };
        match writer {
            Some(true) => {
                self.writers.insert(path.clone(), now);
            }
            Some(false) => {
                self.writers.remove(&path);
            }
            None => {}
        }
        match seen {
            Look::Seen(mut seen, large) => {
                self.unreadable.remove(&path);
                let read = super::dirty::weight(&seen);
                let full = self.held_bytes + read > WINDOWS_HELD * self.config.window_bytes;
                if let Seen::Present(found) = &mut seen {
                    self.note_in_place(found, row.as_ref())?;
                    self.other_names(name, &path, found, row.as_ref())?;
                    if matches!(found.body, Body::Bytes(_) | Body::Recipe(_))
                        && self.sets.group(name).bytes > GROUP_BYTES
                        && (self.complete || self.scan.is_done() || self.sets.group(name).frozen > 0)
                    {
                        let size = found.entry.size();
                        return self.send_ahead(name, path, size).map(|()| 0);
                    }
                    // Holes are lost by reading.
                    let plain = match &found.body {
                        Body::Bytes(_) => true,
                        Body::Recipe(segs) => !segs.iter().any(|seg| matches!(seg, Seg::Hole(_))),
                        _ => false,
                    };
                    if full && plain {
                        found.body = Body::Later;
                    }
                }
                match large {
                    Some(large) => self.larges.insert(path.clone(), large),
                    None => self.larges.remove(&path),
                };
                self.held_bytes += if matches!(&seen, Seen::Present(found) if found.body == Body::Later) { 0 } else { read };
                self.sets.captured(name, path, seen);
                Ok(read)
            }
            Look::Unstable { writer } => {
                let rounds = self.sets.group(name).rounds.min(10);
                let wait = if writer { SETTLE } else { Duration::from_micros(200 << rounds.min(7)) };
                self.sets.put_back(name, path, Mark { content: true, not_before: Some(now + wait), ..mark });
                Ok(0)
            }
            Look::Bulk(_)
                if writer == Some(true)
                    && now.duration_since(mark.last) < BULK_SETTLE
                    && now.duration_since(mark.since) < BULK_SETTLE_MAX =>
            {
                self.sets.put_back(name, path, Mark { not_before: Some(now + BULK_SETTLE / 2), ..mark });
                Ok(0)
            }
            Look::Bulk(size) => self.send_ahead(name, path, size).map(|()| 0),
            Look::Unreadable(error) => {
                self.cannot_read(&path, error);
                self.sets.captured(name, path, Seen::Skip);
                Ok(0)
            }
        }
    }

    /// Bytes that were let go of for want of room; `false` when something is not what it was: that is dirty then.
    fn read_again(&mut self, unit: &BTreeSet<Group>) -> Result<bool, CaptureError> {
        let mut same = true;
        for (group, path, found) in self.sets.later(unit) {
            let Some(hash) = found.entry.hash() else { continue };
            let read = || {
                let file = self.root.file(&path).ok()?;
                let bytes = read_whole(&file, found.entry.size() as usize).ok()??;
                let stat = rustix::fs::fstat(&file).ok()?;
                (crate::tree::local(&stat) == found.local && ContentHash::of(&bytes) == hash).then_some(bytes)
            };
            match read() {
                Some(bytes) if bytes.len() <= INLINE_MAX => self.sets.fill(&group, &path, Body::Bytes(bytes)),
                Some(bytes) => {
                    let segs = bytes.chunks(SEG_DATA_MAX).map(|part| Seg::Data(ByteBuf::from(part))).collect();
                    self.sets.fill(&group, &path, Body::Recipe(segs));
                }
                None => {
                    same = false;
                    self.mark(&path, true, false, false);
                }
            }
        }
        Ok(same)
    }

    /// What was read of a path before a directory above it was renamed, when it is the same still: nobody writes to it, and no event has named it.
    fn kept(&mut self, path: &RelPath, mark: &Mark) -> Option<Box<Found>> {
        let found = self.sets.take_kept(path)?;
        let rests = matches!(found.body, Body::Unread | Body::Bytes(_) | Body::Later) && !mark.open && !self.writers.contains_key(path);
        // What the standby is to know by its name only, it must have.
        let has = |hash| self.view.has_content(hash).unwrap_or(false);
        let rests = rests && (found.body != Body::Unread || found.entry.hash().is_none_or(has));
        let stat = self.root.stat(path).ok().flatten()?;
        (rests && found.local == crate::tree::local(&stat) && found.nlink == stat.st_nlink).then_some(found)
    }

    /// An event comes under one name of an inode: when the inode changed, its other names are looked at too, and cut together, because on the standby they change together.
    /// A name that only came, moved or went changes nothing under the others: mail delivered to many users as links must not make one unit of all of them.
    pub(super) fn other_names(&mut self, name: &[u8], path: &RelPath, found: &Found, row: Option<&Row>) -> Result<(), CaptureError> {
        if found.nlink < 2 || found.entry.is_dir() || row.is_some_and(|row| row.entry == found.entry && row.local == Some(found.local)) {
            return Ok(());
        }
        for row in self.view.by_ino(found.local.ino)? {
            let other = self.sets.now_at(&row);
            let group = self.group_of(&other, false);
            // Inode numbers are used again at once: a name that is gone, or another file by now, is no name of this one.
            if other != *path && !matches!(self.root.stat(&other), Ok(Some(stat)) if stat.st_ino == found.local.ino) {
                continue;
            }
            if other != *path && self.view.row(&row)?.is_some_and(|row| row.entry == found.entry) {
                // Seen under this name it is as known under that one, but for its ctime.
                self.view.set_local(&row, Some(found.local))?;
                continue;
            }
            self.sets.join(name, &group);
            // Seen before the inode changed under this name is not seen.
            let same = self.sets.seen(&group, &other) == Pending::Seen(Some(found.local));
            if other != *path && !same && !self.sets.group(&group).dirty.contains_key(&other) {
                self.sets.mark(&group, &other, false, true, false, Instant::now());
                self.sets.group(name).spoiled = true; // Not without them.
            }
        }
        Ok(())
    }

    /// Another content of the same inode (for all we know: a row that was pulled has none): after a power cut its times cannot be trusted.
    pub(super) fn note_in_place(&mut self, found: &Found, row: Option<&Row>) -> Result<(), CaptureError> {
        let changed = |row: &&Row| {
            row.local.is_none_or(|local| local.ino == found.local.ino)
                && row.entry.hash().is_some()
                && found.entry.hash().is_some()
                && row.entry.hash() != found.entry.hash()
        };
        if row.filter(changed).is_some() {
            self.view.note_in_place(found.local.ino)?;
        }
        Ok(())
    }

    /// Plans and ships what a unit of groups has captured; `true` when a txn went out.
    fn commit(&mut self, unit: &BTreeSet<Group>, flags: u8) -> Result<bool, CaptureError> {
        let (mut seen, hints, since) = self.sets.commit(unit);
        if seen.is_empty() && hints.is_empty() {
            self.sets.note_cut(unit);
            return Ok(false);
        }
        self.reserve()?;
        let lsn = self.outbox.next_lsn();
        let ops = match plan(&mut self.view, lsn, &seen, &hints) {
            Ok(ops) => ops,
            Err(error @ PlanError::Store { .. }) => return Err(std::io::Error::other(error).into()),
            Err(PlanError::Rescan { path, why }) => {
                tracing::debug!(mirror = %self.config.name, %path, why, "looked at again");
                self.summary.replanned += 1;
                // What moved between these groups is still one txn.
                for (a, b) in unit.iter().zip(unit.iter().skip(1)) {
                    self.sets.join(a, b);
                }
                if let Some(first) = unit.first() {
                    let needs = self.group_of_marked(&path);
                    self.sets.join(first, &needs);
                }
                let (to, from) = self.sets.distrust_of(|name| unit.contains(name));
                for moved in hints.into_iter().flat_map(|h| [h.from, h.to]).chain(from).chain(to).chain([path.clone()]) {
                    self.mark_again(&moved);
                    if moved == path || self.watch.at(&moved).is_some() {
                        self.scan.push(moved);
                    }
                }
                for (path, seen) in seen {
                    self.mark_again(&path);
                    match seen {
                        // The rows it was compared with were not those; what it is, it is.
                        Seen::Present(found) if matches!(found.body, Body::Unread | Body::Bytes(_) | Body::Later) => {
                            let group = self.group_of_marked(&path);
                            self.sets.keep(&group, path, found);
                        }
                        _ => drop(self.larges.remove(&path)),
                    }
                }
                return Ok(true);
            }
        };
        self.drop_ahead(&seen, lsn);
        if !self.fresh.is_empty() {
            for path in seen.keys() {
                self.fresh.remove(path);
            }
        }
        let mut flags = flags | if self.complete { 0 } else { FLAG_INITIAL };
        for (path, seen) in &mut seen {
            match seen {
                Seen::Skip => flags |= FLAG_PARTIAL,
                Seen::Present(found) => {
                    if matches!(found.body, Body::Patch { .. }) {
                        self.view.note_in_place(found.local.ino)?;
                    }
                    self.remember(path, found)?;
                }
                Seen::Absent => {}
            }
        }
        if flags & FLAG_FUZZY == 0 {
            self.sets.note_cut(unit); // Else what a fence waits for may still be dirty.
            self.holds_cut(unit);
        }
        if let Some((groups, _)) = &mut self.last_groups {
            groups.retain(|name| !unit.contains(name));
        }
        if ops.is_empty() {
            return Ok(false);
        }
        self.ship(ops, flags, since);
        Ok(true)
    }

    /// What could not be committed has been dirty for as long as before: whoever waits for it still does.
    pub(super) fn mark_again(&mut self, path: &RelPath) {
        self.mark(path, true, true, false);
        let group = self.group_of_marked(path);
        self.sets.backdate(&group, path, 0);
    }

    fn remember(&mut self, path: &RelPath, found: &Found) -> Result<(), CaptureError> {
        if let (Some(hash), Some((large, replaces))) = (found.entry.hash(), self.larges.remove(path)) {
            if let (Some(chunks), Ok(mut recent)) = (&large.chunks, self.recent.lock()) {
                recent.add(hash, chunks);
            }
            self.view.set_large(hash, &large, replaces)?;
        }
        Ok(())
    }

    fn reserve(&mut self) -> Result<(), CaptureError> {
        if self.outbox.wants_reserve() {
            let ceiling = Lsn(self.outbox.next_lsn().0 + RESERVE);
            self.node.reserve(&self.config.name, ceiling)?;
            self.outbox.handle_reserved(ceiling);
        }
        Ok(())
    }

    fn ship(&mut self, ops: Vec<Op>, flags: u8, since: Option<Instant>) {
        let now = Instant::now();
        let files = ops.iter().filter(|op| !matches!(op, Op::SetMeta { .. })).count();
        let weight: usize = ops.iter().map(Op::weight).sum();
        let changes = !ops.is_empty();
        match self.comes_back {
            Some(ComesBack::Comparing) if self.scan.is_done() && !self.scan.is_first() => {
                self.comes_back = Some(ComesBack::Round(self.sets.round()));
            }
            Some(ComesBack::Round(round)) if self.sets.has_cut_all(round) => self.comes_back = None,
            _ => {}
        }
        let flags = if self.comes_back.is_some() { flags | FLAG_INITIAL } else { flags };
        let Some((lsn, frames)) = self.outbox.seal(ops, flags, self.view.digest(), super::engine::wall_ns()) else { return };
        if changes {
            self.disk.issued(lsn); // A txn without ops has nothing that a disk could lose: no syncfs for it.
        }
        self.summary.txns += 1;
        self.summary.files += files as u64;
        self.summary.bytes += weight as u64;
        if self.flights.is_empty() {
            self.acknowledged_at = now;
        }
        self.shipped_at = now;
        self.flights.push_back((lsn, since.unwrap_or(now), now));
        if let Some(session) = &self.session {
            let _ = session.out.send(ToLink::Txn(frames)); // A closed queue means the session is ending; `Down` follows.
        }
    }

    /// When everything found by the first comparison is durable, says so with a txn of its own.
    pub(super) fn finish_first_sync(&mut self) -> Result<(), CaptureError> {
        if self.complete || self.session.is_none() || !self.scan.is_done() {
            self.last_groups = None;
            return Ok(());
        }
        // From here on cuts are whole. Each group that had something left is waited for once: on a busy store there is no moment at which nothing is dirty or in flight.
        let all = || self.sets.groups().map(|(name, _)| name.clone()).collect();
        let (mut groups, at) = self.last_groups.take().unwrap_or_else(|| (all(), None));
        groups.retain(|name| !self.sets.group_is_clean(name));
        let at = if groups.is_empty() { at.or(Some(self.outbox.last().lsn)) } else { None };
        if at.is_none_or(|at| self.outbox.in_flight().next().is_some_and(|first| first.position.lsn <= at)) {
            self.last_groups = Some((groups, at));
            return Ok(());
        }
        self.reserve()?;
        self.complete = true;
        self.node.set_complete(&self.config.name, true)?;
        tracing::info!(mirror = %self.config.name, "first sync complete: the standby is in sync");
        self.ship_empty();
        Ok(())
    }

    fn ship_empty(&mut self) {
        self.view.start(self.outbox.next_lsn());
        self.view.keep();
        self.ship(vec![], 0, None);
    }

    /// An empty txn through the whole pipeline: nothing hangs, and what is not dirty has arrived.
    pub(super) fn canary(&mut self) -> Result<(), CaptureError> {
        self.shipped_at = Instant::now();
        // What is in flight tells as much.
        if self.outbox.in_flight().len() == 0 {
            self.boundary()?;
            self.reserve()?;
            self.ship_empty();
        }
        Ok(())
    }

    pub(super) fn handle_durable(&mut self, lsn: Lsn) -> Result<(), CaptureError> {
        let done = self.outbox.handle_durable(lsn).map_err(std::io::Error::other)?;
        let now = Instant::now();
        while let Some((_, _, sent)) = self.flights.front().copied().filter(|(at, _, _)| *at <= lsn) {
            self.flights.pop_front();
            self.proof = Some(sent);
            self.acknowledged_at = now;
            let us = now.duration_since(sent).as_micros().min(u128::from(u32::MAX)) as u32;
            if self.latencies.len() >= LATENCIES {
                self.latencies.pop_front();
            }
            self.latencies.push_back(us);
        }
        if let Some(done) = done {
            if self.applied >= self.durable {
                self.applied_at = now; // Only now there is something to be applied.
            }
            self.durable = done.position.lsn;
            self.named_until(self.durable);
            self.view.handle_durable(done.position)?;
            let local = self.disk.durable();
            self.view.prune_before(local)?;
            if let Some(session) = &self.session {
                // A tombstone that is not durable here yet may be needed to heal.
                let _ = session.out.send(ToLink::Stored(done.position.lsn.min(local)));
            }
        }
        Ok(())
    }
}

pub(super) fn wall() -> Time {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    Time { secs: now.tv_sec, nanos: now.tv_nsec as u32 }
}
