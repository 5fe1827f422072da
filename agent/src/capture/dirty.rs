//! What may differ from the standby: dirty paths per consistency group, the renames seen, and where a renamed path's row still is.
//!
//! Invariants: a path is in at most one of `dirty`, `captured` and `staging` of its group; `captured` holds only observations that no later event has named.
//! Pure bookkeeping; time is an argument.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::time::{Duration, Instant};

use twinbox_protocol::entry::Time;
use twinbox_protocol::path::RelPath;
use twinbox_resync::plan::{Found, Hint, Seen};
use twinbox_resync::rows::Local;

use super::origins::Origins;

/// Name of a consistency group.
pub type Group = Vec<u8>;

/// Why a path is dirty.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mark {
    /// An event says its bytes may have changed (else only its name or attributes).
    pub content: bool,
    /// Found by comparing a listing, not by an event: trust nothing but an equal ctime.
    pub scan: bool,
    /// First event since it was last clean.
    pub since: Instant,
    /// Last event.
    pub last: Instant,
    /// Not to be looked at before.
    pub not_before: Option<Instant>,
    /// Round in which it became dirty (or was put back).
    pub round: u64,
    /// Only a directory's own times: rides along with the next real change of its group, or goes alone after a while.
    pub quiet: bool,
    /// Written to, and not closed since.
    pub open: bool,
}

/// How long a directory's own times wait for a real change to ride along with: a delivery touches tmp/ twice before the message is there.
const QUIET: Duration = Duration::from_millis(10);

/// How long a group that waits for the cut of another is left alone.
const OTHERS_WAIT: Duration = Duration::from_millis(5);

/// One consistency group with something to do.
#[derive(Debug, Default)]
pub struct GroupState {
    /// To be looked at.
    pub dirty: BTreeMap<RelPath, Mark>,
    /// Looked at, and no event since.
    pub captured: BTreeMap<RelPath, Seen>,
    /// Content on its way ahead on a bulk stream: path ▶ job number.
    pub staging: BTreeMap<RelPath, u64>,
    /// Renames seen since the last commit, in order.
    pub hints: Vec<Renamed>,
    /// How many of them were seen before the round's first boundary: only these belong to its cut.
    pub frozen: usize,
    /// A captured member was touched since the round began.
    pub spoiled: bool,
    /// Rounds since the last commit.
    pub rounds: u32,
    /// Oldest event not yet committed.
    pub since: Option<Instant>,
    /// Bytes held in `captured`.
    pub bytes: usize,
    /// Last round that was committed; a group made anew has nothing that is older than the round it was made in.
    pub cut: u64,
    /// Last round that looked at it from the beginning.
    began: u64,
    /// What was captured waits for a cut of other groups: not to be tried before.
    not_before: Option<Instant>,
}

/// A rename seen.
#[derive(Clone, Debug)]
pub struct Renamed {
    /// Its place among those of all groups.
    at: u64,
    /// The group of the old name.
    from: Group,
    hint: Hint,
    is_dir: bool,
}

impl GroupState {
    /// See [`DirtySets::has_cut_all`].
    fn has_cut(&self, round: u64) -> bool {
        self.cut > round || self.is_clean()
    }

    /// Nothing to do.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.dirty.is_empty() && self.captured.is_empty() && self.staging.is_empty()
    }
}

/// See [`DirtySets::seen`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pending {
    /// Nothing.
    No,
    /// It is being read ahead.
    Staging,
    /// This inode and ctime; `None` when it was absent or unreadable.
    Seen(Option<twinbox_resync::rows::Local>),
}

/// See the module's text.
#[derive(Debug, Default)]
pub struct DirtySets {
    groups: BTreeMap<Group, GroupState>,
    joins: BTreeSet<(Group, Group)>,
    origins: Origins,
    count: usize,
    round: u64,
    renames: u64,
    /// Hints held by all groups.
    hints: usize,
    held: BTreeSet<Group>,
    kept: BTreeMap<RelPath, Box<Found>>,
    /// Groups that are cut only after others: a file that goes here is there by now.
    waits: BTreeMap<Group, BTreeSet<Group>>,
}

impl DirtySets {
    /// A round of cuts begins: what becomes dirty from now on is the next one's.
    pub fn start_round(&mut self) {
        self.round += 1;
    }

    /// Whether every path of the group that was dirty when the round began has been captured since, and none of them touched.
    #[must_use]
    pub fn is_round_whole(&self, name: &[u8]) -> bool {
        let whole = |g: &GroupState| !g.spoiled && g.staging.is_empty() && g.dirty.values().all(|mark| mark.round >= self.round);
        self.groups.get(name).is_none_or(|g| whole(g) && self.has_begun(g))
    }

    /// What was captured before belongs to this round, with the renames it rests on.
    fn has_begun(&self, state: &GroupState) -> bool {
        state.began == self.round || state.captured.is_empty()
    }

    /// Whether a cut of these groups now would take renames along.
    #[must_use]
    pub fn has_renames(&self, names: &BTreeSet<Group>) -> bool {
        names.iter().filter_map(|name| self.groups.get(name)).any(|g| g.frozen > 0 || !self.has_begun(g))
    }

    /// Whether a path is to be looked at.
    #[must_use]
    pub fn is_dirty(&self, group: &[u8], path: &RelPath) -> bool {
        self.groups.get(group).is_some_and(|g| g.dirty.contains_key(path))
    }

    /// Whether a path has something to do in a group.
    #[must_use]
    pub fn is_pending(&self, group: &[u8], path: &RelPath) -> bool {
        let holds = |g: &GroupState| g.dirty.contains_key(path) || g.captured.contains_key(path) || g.staging.contains_key(path);
        self.groups.get(group).is_some_and(holds)
    }

    /// Whether a group has nothing to do.
    #[must_use]
    pub fn group_is_clean(&self, name: &[u8]) -> bool {
        self.groups.get(name).is_none_or(GroupState::is_clean)
    }

    /// Number of the last round begun.
    #[must_use]
    pub fn round(&self) -> u64 {
        self.round
    }

    /// A cut of these groups was committed in this round.
    pub fn note_cut(&mut self, names: &BTreeSet<Group>) {
        for name in names {
            if let Some(state) = self.groups.get_mut(name) {
                state.cut = self.round;
            }
        }
    }

    /// Whether everything that was dirty when `round` was the last one begun has been committed since.
    #[must_use]
    pub fn has_cut_all(&self, round: u64) -> bool {
        self.groups.values().all(|g| g.has_cut(round))
    }

    /// The same, of the groups that a path touches: those it lies in, and those that lie below it.
    #[must_use]
    pub fn has_cut(&self, path: &RelPath, round: u64) -> bool {
        self.touched(path).all(|g| g.has_cut(round))
    }

    fn touched(&self, path: &RelPath) -> impl Iterator<Item = &GroupState> {
        let above = std::iter::successors(Some(path.clone()), RelPath::parent).filter_map(|at| self.groups.get(at.as_bytes()));
        let bounds = path.below();
        let (low, high) = match &bounds {
            Some((low, high)) => (Bound::Included(low.as_slice()), Bound::Excluded(high.as_slice())),
            None => (Bound::Excluded(&b""[..]), Bound::Unbounded), // The root, which is its own group, is above.
        };
        above.chain(self.groups.range::<[u8], _>((low, high)).map(|(_, state)| state).collect::<Vec<_>>())
    }

    /// A directory's own times wait for nothing below these paths (none: anywhere): somebody waits for them.
    pub fn hasten(&mut self, paths: &[RelPath]) {
        let concerns = |path: &RelPath| paths.is_empty() || paths.iter().any(|p| path.is_within(p) || p.is_within(path));
        for (path, mark) in self.groups.values_mut().flat_map(|g| g.dirty.iter_mut()) {
            if mark.quiet && concerns(path) {
                mark.not_before = None;
            }
        }
    }

    /// These groups, and no others, are not cut until they are let go.
    pub fn hold(&mut self, groups: BTreeSet<Group>) {
        self.held = groups;
    }

    /// Whether one of them must not be cut now.
    #[must_use]
    pub fn is_held(&self, unit: &BTreeSet<Group>) -> bool {
        !self.held.is_empty() && unit.iter().any(|name| self.held.contains(name))
    }

    /// Whether a group, or one cut together with it, must not be cut now.
    fn rests(&self, name: &Group) -> bool {
        !self.held.is_empty() && self.is_held(&self.closure(name))
    }

    /// Whether a round would find something to look at or to commit.
    #[must_use]
    pub fn has_work(&self, now: Instant) -> bool {
        let due = |g: &GroupState| g.dirty.values().any(|m| m.not_before.is_none_or(|at| at <= now));
        self.groups
            .iter()
            .any(|(name, g)| (due(g) || (self.is_read(name, g) && g.not_before.is_none_or(|at| at <= now))) && !self.rests(name))
    }

    /// Whether all there is to do is a cut. A group cut together with one that waits (for its time, or for the standby to stage an object) waits too: a round would commit nothing, again and again.
    fn is_read(&self, name: &Group, state: &GroupState) -> bool {
        let waits = |name: &Group| self.groups.get(name).is_some_and(|g| !g.dirty.is_empty() || !g.staging.is_empty());
        !state.captured.is_empty() && !waits(name) && !self.closure(name).iter().any(waits)
    }

    /// When the next path wants to be looked at, or the next group to be cut.
    #[must_use]
    pub fn next_look(&self, now: Instant) -> Option<Instant> {
        let groups = self.groups.iter().filter(|(name, _)| !self.rests(name));
        let looks = |(name, g): (&Group, &GroupState)| {
            let cut = g.not_before.filter(|_| self.is_read(name, g));
            g.dirty.values().map(|m| m.not_before.unwrap_or(now)).chain(cut).min()
        };
        groups.filter_map(looks).min()
    }

    /// Whether one of these groups was just found to be cut only after another.
    #[must_use]
    pub fn is_waiting(&self, unit: &BTreeSet<Group>, now: Instant) -> bool {
        unit.iter().filter_map(|name| self.groups.get(name)).any(|g| g.not_before.is_some_and(|at| at > now))
    }

    /// Groups with something to do.
    pub fn groups(&self) -> impl Iterator<Item = (&Group, &GroupState)> {
        self.groups.iter()
    }

    /// A group's state, made when it has none.
    pub fn group(&mut self, name: &[u8]) -> &mut GroupState {
        if !self.groups.contains_key(name) {
            self.groups.insert(name.to_vec(), GroupState { cut: self.round, ..GroupState::default() });
        }
        self.groups.entry(name.to_vec()).or_default()
    }

    /// Paths to be looked at.
    #[must_use]
    pub fn dirty_count(&self) -> usize {
        self.count
    }

    /// Paths not yet committed.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.groups.values().map(|g| g.dirty.len() + g.captured.len() + g.staging.len()).sum()
    }

    /// Oldest event not yet committed.
    #[must_use]
    pub fn oldest(&self) -> Option<Instant> {
        self.groups.values().filter_map(|g| g.since).min()
    }

    /// These groups are cut after those others (none: they wait for nobody), and not tried for a moment; two that would wait for each other are cut together.
    pub fn wait_for(&mut self, unit: &BTreeSet<Group>, others: &BTreeSet<Group>, now: Instant) {
        for other in others {
            let (mut seen, mut left) = (BTreeSet::new(), vec![other.clone()]);
            while let Some(group) = left.pop() {
                if unit.contains(&group) {
                    unit.iter().for_each(|name| self.join(name, other));
                    break;
                }
                if seen.insert(group.clone()) {
                    left.extend(self.waits.get(&group).into_iter().flatten().cloned());
                }
            }
        }
        for name in unit {
            if others.is_empty() {
                self.waits.remove(name);
            } else {
                self.waits.insert(name.clone(), others.clone());
            }
            if let Some(state) = self.groups.get_mut(name) {
                // Each try looks for all that is gone: longer and longer.
                state.not_before = (!others.is_empty()).then(|| now + OTHERS_WAIT * (1 << state.rounds.min(5)));
            }
        }
    }

    /// Whether nothing waits.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.groups.values().all(GroupState::is_clean)
    }

    /// Marks a path; an observation of it made before is void, and the round it belongs to is spoiled unless `quiet` (a directory's own times).
    pub fn mark(&mut self, group: &[u8], path: &RelPath, content: bool, scan: bool, quiet: bool, now: Instant) {
        let mut fresh = false;
        // What is voided may have been looked at because its bytes changed: an event that says less (utimes after a write) must not take that back.
        let content = content || (!quiet && self.holds_content(group, path));
        if !quiet {
            self.kept.remove(path);
        }
        let state = self.group(group);
        if !quiet && (state.captured.contains_key(path) || state.staging.contains_key(path)) {
            state.spoiled = true;
            if let Some(seen) = state.captured.remove(path) {
                state.bytes -= weight(&seen).min(state.bytes);
            }
            state.staging.remove(path);
        }
        state.since.get_or_insert(now);
        let round = self.round;
        let state = self.groups.entry(group.to_vec()).or_default();
        state
            .dirty
            .entry(path.clone())
            .and_modify(|mark| {
                mark.content |= content;
                mark.scan |= scan;
                mark.last = now;
                if mark.quiet && !quiet {
                    (mark.quiet, mark.not_before) = (false, None);
                }
            })
            .or_insert_with(|| {
                fresh = true;
                Mark { content, scan, since: now, last: now, not_before: quiet.then(|| now + QUIET), round, quiet, open: false }
            });
        self.count += usize::from(fresh);
    }

    /// What the path waited for is over: it may be looked at.
    pub fn wake(&mut self, group: &[u8], path: &RelPath) {
        if let Some(mark) = self.groups.get_mut(group).and_then(|g| g.dirty.get_mut(path)).filter(|mark| !mark.quiet) {
            mark.not_before = None;
        }
    }

    /// The marked path was written to, or closed after that.
    pub fn wrote(&mut self, group: &[u8], path: &RelPath, closed: bool) {
        if let Some(mark) = self.groups.get_mut(group).and_then(|g| g.dirty.get_mut(path)) {
            mark.open = !closed;
        }
    }

    /// Whether an observation of the path holds bytes, or they are being read.
    fn holds_content(&self, group: &[u8], path: &RelPath) -> bool {
        let read = |seen: &Seen| matches!(seen, Seen::Present(found) if found.body != twinbox_resync::plan::Body::Unread);
        self.groups.get(group).is_some_and(|g| g.staging.contains_key(path) || g.captured.get(path).is_some_and(read))
    }

    /// Takes a path out of a group in every form: whether its content may have changed, and since which round; `None` when it was not in it.
    pub fn withdraw(&mut self, group: &[u8], path: &RelPath) -> Option<(bool, u64)> {
        let held = self.holds_content(group, path);
        self.kept.remove(path);
        let state = self.groups.get_mut(group)?;
        let mut seen = false;
        if let Some(old) = state.captured.remove(path) {
            state.bytes -= weight(&old).min(state.bytes);
            seen = true;
        }
        seen |= state.staging.remove(path).is_some();
        state.spoiled |= seen;
        let (mark, round) = (self.take(group, path), self.round);
        // Nor is a round whole that was to look at it and did not.
        self.group(group).spoiled |= mark.is_some_and(|m| m.round < round);
        (seen || mark.is_some()).then(|| (held || mark.is_some_and(|m| m.content), mark.map_or(self.round, |m| m.round)))
    }

    /// A path that is marked was dirty in an earlier round already, in another place: a cut that does not read it, of a group that it came to, is none.
    pub fn backdate(&mut self, group: &[u8], path: &RelPath, round: u64) {
        if let Some(state) = self.groups.get_mut(group)
            && let Some(mark) = state.dirty.get_mut(path)
        {
            mark.round = mark.round.min(round);
            state.cut = state.cut.min(round);
        }
    }

    /// Paths that are seen or being read, and not committed.
    #[must_use]
    pub fn observed(&self) -> Vec<RelPath> {
        self.groups.values().flat_map(|g| g.captured.keys().chain(g.staging.keys())).cloned().collect()
    }

    /// Paths that are being read.
    #[must_use]
    pub fn staging(&self) -> Vec<RelPath> {
        self.groups.values().flat_map(|g| g.staging.keys()).cloned().collect()
    }

    /// Of those that are seen, such as were compared with what the standby has (or is to be sent), and whether their bytes were to be sent. `same`: it goes on from where it was, with
    /// what it has staged: then only what could not be read.
    #[must_use]
    pub fn on_the_standby(&self, same: bool) -> Vec<(RelPath, bool)> {
        use twinbox_resync::plan::Body;
        let rests = |(path, seen): (&RelPath, &Seen)| match seen {
            Seen::Present(found) if !same && found.entry.hash().is_some() && !matches!(found.body, Body::Bytes(_) | Body::Later) => {
                Some((path.clone(), found.body != Body::Unread))
            }
            Seen::Absent | Seen::Present(_) => None,
            Seen::Skip => Some((path.clone(), true)),
        };
        self.groups.values().flat_map(|g| g.captured.iter().filter_map(rests)).collect()
    }

    /// Bytes that observations hold in memory.
    #[must_use]
    pub fn held_bytes(&self) -> usize {
        let kept = self.kept.values().map(|found| body_weight(found)).sum::<usize>();
        let seen = |seen: &Seen| if let Seen::Present(found) = seen { body_weight(found) } else { 64 };
        kept + self.groups.values().flat_map(|g| g.captured.values()).map(seen).sum::<usize>()
    }

    /// Files of these groups whose bytes were let go of.
    #[must_use]
    pub fn later(&self, names: &BTreeSet<Group>) -> Vec<(Group, RelPath, Found)> {
        let later = |seen: &Seen| match seen {
            Seen::Present(found) if found.body == twinbox_resync::plan::Body::Later => Some((**found).clone()),
            _ => None,
        };
        let of = |name: &Group| {
            let captured = self.groups.get(name).into_iter().flat_map(|g| &g.captured);
            captured.filter_map(|(path, seen)| Some((name.clone(), path.clone(), later(seen)?))).collect::<Vec<_>>()
        };
        names.iter().flat_map(of).collect()
    }

    /// They are here again.
    pub fn fill(&mut self, group: &[u8], path: &RelPath, body: twinbox_resync::plan::Body) {
        if let Some(Seen::Present(found)) = self.groups.get_mut(group).and_then(|g| g.captured.get_mut(path)) {
            found.body = body;
        }
    }

    /// Files of these groups that were seen and have more than one name.
    pub fn linked<'a>(&'a self, names: &'a BTreeSet<Group>) -> impl Iterator<Item = (&'a RelPath, (u64, u64, Time))> {
        let states = names.iter().filter_map(|name| self.groups.get(name));
        states.flat_map(|g| g.captured.iter()).filter_map(|(path, seen)| match seen {
            Seen::Present(found) if found.nlink > 1 && found.entry.hash().is_some() => {
                Some((path, (found.local.ino, found.entry.size(), found.entry.mtime)))
            }
            _ => None,
        })
    }

    /// Whether the bytes of a path are said to have changed, or were read for that.
    #[must_use]
    pub fn is_content_dirty(&self, group: &[u8], path: &RelPath) -> bool {
        self.holds_content(group, path) || self.groups.get(group).and_then(|g| g.dirty.get(path)).is_some_and(|mark| mark.content)
    }

    /// Inodes that were seen in these groups.
    pub fn inodes<'a>(&'a self, names: &'a BTreeSet<Group>) -> impl Iterator<Item = u64> + 'a {
        let states = names.iter().filter_map(|name| self.groups.get(name));
        states
            .flat_map(|g| g.captured.values())
            .filter_map(|seen| if let Seen::Present(found) = seen { Some(found.local.ino) } else { None })
    }

    /// Paths of these groups that were seen to be gone.
    pub fn absent<'a>(&'a self, names: &'a BTreeSet<Group>) -> impl Iterator<Item = &'a RelPath> {
        let states = names.iter().filter_map(|name| self.groups.get(name));
        states.flat_map(|g| g.captured.iter()).filter(|(_, seen)| **seen == Seen::Absent).map(|(path, _)| path)
    }

    /// The same, of those below a directory.
    #[must_use]
    pub fn observed_below(&self, dir: &RelPath) -> Vec<RelPath> {
        let Some((low, high)) = dir.below() else { return self.observed() };
        let bounds = (Bound::Included(low.as_slice()), Bound::Excluded(high.as_slice()));
        let names = |g: &GroupState| {
            let captured = g.captured.range::<[u8], _>(bounds).map(|(path, _)| path.clone());
            captured.chain(g.staging.range::<[u8], _>(bounds).map(|(path, _)| path.clone())).collect::<Vec<_>>()
        };
        self.touched(dir).flat_map(names).collect()
    }

    /// Names seen of an inode that has since been seen with a later ctime under another name, which is in the unit `names`: what was seen of them is old, in whatever group they are.
    ///
    /// How many names the inode had when it was seen does not matter: one that came later raises no event under the first.
    #[must_use]
    pub fn stale_links(&self, names: &BTreeSet<Group>) -> Vec<RelPath> {
        let file = |seen: &Seen| match seen {
            Seen::Present(found) if !found.entry.is_dir() => Some((found.local, found.nlink)),
            _ => None,
        };
        let mut last = BTreeMap::new();
        for seen in names.iter().filter_map(|name| self.groups.get(name)).flat_map(|g| g.captured.values()) {
            if let Some((local, _)) = file(seen).filter(|(_, nlink)| *nlink > 1) {
                let ctime = last.entry(local.ino).or_insert(local.ctime);
                *ctime = local.ctime.max(*ctime);
            }
        }
        if last.is_empty() {
            return vec![];
        }
        let old = |seen: &Seen| file(seen).is_some_and(|(local, _)| last.get(&local.ino).is_some_and(|ctime| local.ctime < *ctime));
        self.groups.values().flat_map(|g| g.captured.iter()).filter(|(_, seen)| old(seen)).map(|(path, _)| path.clone()).collect()
    }

    /// What of a path was seen and is not committed.
    #[must_use]
    pub fn seen(&self, group: &[u8], path: &RelPath) -> Pending {
        let Some(state) = self.groups.get(group) else { return Pending::No };
        match state.captured.get(path) {
            _ if state.staging.contains_key(path) => Pending::Staging,
            Some(Seen::Present(found)) => Pending::Seen(Some(found.local)),
            Some(_) => Pending::Seen(None),
            None => Pending::No,
        }
    }

    /// Takes a path out of a group's dirty set.
    pub fn take(&mut self, group: &[u8], path: &RelPath) -> Option<Mark> {
        let mark = self.group(group).dirty.remove(path);
        self.count -= usize::from(mark.is_some());
        mark
    }

    /// Puts a mark back as it was, merged with what came meanwhile.
    pub fn put_back(&mut self, group: &[u8], path: RelPath, mark: Mark) {
        let mut fresh = false;
        self.group(group)
            .dirty
            .entry(path)
            .and_modify(|m| {
                m.content |= mark.content;
                m.scan |= mark.scan;
                m.since = m.since.min(mark.since);
            })
            .or_insert_with(|| {
                fresh = true;
                mark
            });
        self.count += usize::from(fresh);
    }

    /// Stores an observation.
    pub fn captured(&mut self, group: &[u8], path: RelPath, seen: Seen) {
        let state = self.group(group);
        state.bytes += weight(&seen);
        if let Some(old) = state.captured.insert(path, seen) {
            state.bytes -= weight(&old).min(state.bytes);
        }
    }

    /// A rename was seen: what was known of the old name belongs to the new one; `group_of` says in which group a path below it is.
    pub fn renamed(
        &mut self,
        from: (&[u8], &RelPath),
        to: (&[u8], &RelPath),
        is_dir: bool,
        now: Instant,
        group_of: impl Fn(&RelPath) -> Group,
    ) {
        let read = self.holds_content(from.0, from.1);
        let old = self.take(from.0, from.1);
        let (content, scan) = old.map_or((false, false), |mark| (mark.content, mark.scan));
        self.mark(from.0, from.1, false, false, false, now);
        self.mark(to.0, to.1, content || read, scan, false, now);
        if let Some(old) = old {
            self.backdate(from.0, from.1, old.round);
            self.backdate(to.0, to.1, old.round);
        }
        if is_dir {
            self.move_below(from.1, to.1, to.0, now, group_of);
            // Renames below it are in the groups that had those names: they go first, in the same cut.
            let below = |g: &GroupState| g.hints.iter().any(|seen| seen.hint.to.is_within(from.1));
            let with: Vec<Group> = self.groups.iter().filter(|(_, g)| below(g)).map(|(name, _)| name.clone()).collect();
            with.iter().for_each(|name| self.join(to.0, name));
        }
        self.origins.renamed(from.1, to.1);
        if from.0 != to.0 {
            self.joins.insert((from.0.to_vec(), to.0.to_vec()));
        }
        let mut seen = Renamed { at: 0, from: from.0.to_vec(), hint: Hint { from: from.1.clone(), to: to.1.clone() }, is_dir };
        // The rename just before it moved the same thing: one from there to here says as much, and a file that wanders for hours is one hint.
        if let Some(before) = self.groups.get_mut(from.0)
            && before.hints.len() > before.frozen
            && before.hints.last().is_some_and(|last| last.at == self.renames && last.hint.to == seen.hint.from)
            && let Some(last) = before.hints.pop()
        {
            seen = Renamed { hint: Hint { from: last.hint.from, to: seen.hint.to }, ..last };
            self.hints -= 1;
            self.join(&seen.from, to.0); // The way between them is forgotten with the next commit.
        }
        self.renames += 1;
        if seen.hint.from != seen.hint.to {
            seen.at = self.renames;
            self.hints += 1;
            self.group(to.0).hints.push(seen);
        }
    }

    /// Whether a directory of a group, or above it, has a rename that is not committed.
    #[must_use]
    pub fn has_moved_dirs(&self, group: &RelPath) -> bool {
        let concerns = |path: &RelPath| path.is_within(group) || group.is_within(path);
        let hints = self.groups.values().flat_map(|g| &g.hints);
        hints.filter(|seen| seen.is_dir).any(|seen| concerns(&seen.hint.from) || concerns(&seen.hint.to))
    }

    /// Renames that are not committed.
    #[must_use]
    pub fn hint_count(&self) -> usize {
        self.hints
    }

    /// The round is over for a group that was not committed.
    pub fn thaw(&mut self, name: &[u8]) {
        if let Some(state) = self.groups.get_mut(name) {
            state.frozen = 0;
        }
    }

    /// Everything dirty or captured below `from` is dirty below `to`; `group` is the one of `to`, with which all of it is cut. What was captured is [`kept`](Self::take_kept).
    fn move_below(&mut self, from: &RelPath, to: &RelPath, group: &[u8], now: Instant, group_of: impl Fn(&RelPath) -> Group) {
        let Some((low, high)) = from.below() else { return };
        let bounds = (Bound::Included(low.as_slice()), Bound::Excluded(high.as_slice()));
        let (mut moved, round) = (vec![], self.round);
        let mut kept = super::ahead::take_within(&mut self.kept, from);
        for state in self.groups.values_mut() {
            let dirty: Vec<RelPath> = state.dirty.range::<[u8], _>(bounds).map(|(p, _)| p.clone()).collect();
            for path in dirty {
                let Some(mark) = state.dirty.remove(&path) else { continue };
                self.count -= 1;
                moved.push((path, mark.content, mark.scan, mark.round));
            }
            let captured: Vec<RelPath> = state.captured.range::<[u8], _>(bounds).map(|(p, _)| p.clone()).collect();
            for path in captured {
                if let Some(seen) = state.captured.remove(&path) {
                    state.bytes -= weight(&seen).min(state.bytes);
                    if let Seen::Present(found) = seen {
                        kept.push((path.clone(), found));
                    }
                }
                state.spoiled = true;
                moved.push((path, true, false, round));
            }
            let staging: Vec<RelPath> = state.staging.range::<[u8], _>(bounds).map(|(p, _)| p.clone()).collect();
            for path in staging {
                state.staging.remove(&path);
                state.spoiled = true;
                moved.push((path, true, false, round));
            }
        }
        // A file that was renamed to such a name may have been in another directory that had this one, and is gone with that: the plan puts it there, and has to know what became of it.
        let hints = self
            .groups
            .values()
            .filter(|_| !moved.is_empty())
            .flat_map(|g| &g.hints)
            .filter(|seen| !seen.is_dir && seen.hint.to.is_within(from));
        let given: BTreeSet<RelPath> = hints.map(|seen| seen.hint.to.clone()).collect();
        for (path, content, scan, round) in moved {
            let stays = given.get(&path).map(|path| (path.clone(), true, true));
            let goes = path.rebase(from, to).map(|path| (path, content, scan));
            for (path, content, scan) in stays.into_iter().chain(goes) {
                let own = group_of(&path);
                self.mark(&own, &path, content, scan, false, now);
                self.backdate(&own, &path, round);
                self.join(group, &own);
            }
        }
        self.kept.extend(kept.into_iter().filter_map(|(path, found)| Some((path.rebase(from, to)?, found))));
    }

    /// What was observed of a path under a name that its directory had before, and nothing has named since: a look that finds this very inode and ctime need not read it again.
    pub fn take_kept(&mut self, path: &RelPath) -> Option<Box<Found>> {
        self.kept.remove(path)
    }

    /// Keeps what was observed of a path that is dirty again though no event named it: see [`take_kept`](Self::take_kept).
    pub fn keep(&mut self, group: &[u8], path: RelPath, found: Box<Found>) {
        if self.is_dirty(group, &path) {
            self.kept.insert(path, found);
        }
    }

    /// Whether the look that is due need not read what is there.
    #[must_use]
    pub fn keeps(&self, group: &[u8], path: &RelPath, local: Local) -> bool {
        self.is_dirty(group, path) && self.kept.get(path).is_some_and(|found| found.local == local)
    }

    /// What was kept because the standby had its bytes is not kept: it may turn out not to have them.
    pub fn keep_bytes_only(&mut self) {
        self.kept.retain(|_, found| found.body != twinbox_resync::plan::Body::Unread || found.entry.hash().is_none());
    }

    /// Where the row of `path` is, before the renames seen since the last commit.
    #[must_use]
    pub fn origin(&self, path: &RelPath) -> RelPath {
        self.origins.of(path)
    }

    /// Where there may be a row of what had the name of `path` since the last commit, unless it [is ambiguous](Self::is_ambiguous).
    pub fn origins(&self, path: &RelPath) -> impl Iterator<Item = RelPath> {
        self.origins.all_of(path)
    }

    /// Whether several things were given the name of `path` since the last commit.
    #[must_use]
    pub fn is_ambiguous(&self, path: &RelPath) -> bool {
        self.origins.is_ambiguous(path)
    }

    /// Where what has its row at `origin` is by now: the other way round.
    #[must_use]
    pub fn now_at(&self, origin: &RelPath) -> RelPath {
        self.origins.now_at(origin)
    }

    /// Two groups must be cut together.
    pub fn join(&mut self, a: &[u8], b: &[u8]) {
        if a != b {
            self.joins.insert((a.to_vec(), b.to_vec()));
        }
    }

    /// All groups that must be cut together with `group`.
    #[must_use]
    pub fn closure(&self, group: &[u8]) -> BTreeSet<Group> {
        let mut all: BTreeSet<Group> = [group.to_vec()].into();
        if self.joins.is_empty() {
            return all;
        }
        loop {
            let before = all.len();
            for (a, b) in &self.joins {
                if all.contains(a) || all.contains(b) {
                    all.insert(a.clone());
                    all.insert(b.clone());
                }
            }
            if all.len() == before {
                return all;
            }
        }
    }

    /// A round begins: the renames seen so far belong to its cut.
    pub fn freeze(&mut self, name: &[u8]) {
        let round = self.round;
        let state = self.group(name);
        state.frozen = state.hints.len();
        state.began = round;
        state.spoiled = false;
        state.rounds += 1;
    }

    /// Takes what the groups have captured, with their renames in order; they begin anew with what is dirty.
    pub fn commit(&mut self, names: &BTreeSet<Group>) -> (BTreeMap<RelPath, Seen>, Vec<Hint>, Option<Instant>) {
        let (mut seen, mut hints, mut since) = (BTreeMap::new(), Vec::<Renamed>::new(), None::<Instant>);
        for name in names {
            let Some(state) = self.groups.get_mut(name) else { continue };
            seen.append(&mut state.captured);
            let before = state.hints.len();
            hints.extend(state.hints.drain(..state.frozen.min(before)));
            self.hints -= before - state.hints.len();
            state.frozen = 0;
            (state.bytes, state.rounds, state.spoiled, state.not_before) = (0, 0, false, None);
            since = [since, state.since].into_iter().flatten().min();
            state.since = state.dirty.values().map(|m| m.since).min();
        }
        // Who waited for them need not wait.
        for (name, others) in &self.waits {
            if !others.is_disjoint(names)
                && let Some(state) = self.groups.get_mut(name)
            {
                state.not_before = None;
            }
        }
        self.waits.retain(|name, _| !names.contains(name));
        // Renames of different groups build on each other: in the order they were seen.
        hints.sort_by_key(|seen| seen.at);
        // The committed renames are in the rows now: what is left starts from there.
        self.count_origins_anew();
        // A rename seen after the boundary is not in this cut: its groups are still to be cut together.
        self.joins.retain(|(a, b)| !names.contains(a) || self.groups.get(b).is_some_and(|g| !g.hints.is_empty()));
        for name in names {
            if self.groups.get(name).is_some_and(|g| g.is_clean() && g.hints.is_empty()) {
                self.groups.remove(name);
            }
        }
        (seen, hints.into_iter().map(|seen| seen.hint).collect(), since)
    }

    /// Forgets everything (it will be found again by comparing). Rounds and holds go on.
    pub fn clear(&mut self) {
        let held = std::mem::take(&mut self.held);
        *self = DirtySets { round: self.round, renames: self.renames, held, ..DirtySets::default() };
    }

    /// Forgets every rename seen: gives the new names, which must be compared anew with all that is below them, then the old ones, where something else may be by now.
    pub fn distrust(&mut self) -> (Vec<RelPath>, Vec<RelPath>) {
        self.distrust_of(|_| true)
    }

    /// The same of some groups, with which all are that have renames between them.
    pub fn distrust_of(&mut self, concerns: impl Fn(&Group) -> bool) -> (Vec<RelPath>, Vec<RelPath>) {
        let groups = self.groups.iter_mut().filter(|(name, _)| concerns(name));
        let gone: Vec<Renamed> = groups.flat_map(|(_, g)| g.hints.drain(..)).collect();
        self.hints -= gone.len();
        self.count_origins_anew();
        gone.into_iter().map(|seen| (seen.hint.to, seen.hint.from)).unzip()
    }

    /// Where rows are follows from the renames that are left.
    fn count_origins_anew(&mut self) {
        self.origins.clear();
        let mut left: Vec<&Renamed> = self.groups.values().flat_map(|g| &g.hints).collect();
        left.sort_by_key(|seen| seen.at);
        for seen in left {
            self.origins.renamed(&seen.hint.from, &seen.hint.to);
        }
    }
}

/// Bytes an observation holds in memory, or will when it is sent.
#[must_use]
pub fn weight(seen: &Seen) -> usize {
    match seen {
        Seen::Present(found) if found.body == twinbox_resync::plan::Body::Later => body_weight(found) + found.entry.size() as usize,
        Seen::Present(found) => body_weight(found),
        _ => 64,
    }
}

fn body_weight(found: &Found) -> usize {
    use twinbox_protocol::ops::Seg;
    use twinbox_resync::plan::Body;
    256 + match &found.body {
        Body::Bytes(bytes) => bytes.len(),
        Body::Recipe(segs) => segs.iter().map(|s| if let Seg::Data(d) = s { d.len() } else { 48 }).sum(),
        Body::Patch { writes, .. } => writes.iter().map(|(_, b)| b.len() + 32).sum(),
        Body::Unread | Body::Later | Body::Staged => 0,
    }
}

#[cfg(test)]
#[path = "dirty_tests.rs"]
mod tests;
