//! Waiting until everything that has changed by now is safe, and holding a group while an application changes it.
//!
//! A caller is registered at a boundary of its own with the number r of the last round: whatever had changed before the call is then a mark of round ≤ r, or lies in a directory that is still to be listed. Every group it
//! touches must then be clean, or have committed a round > r, and what had been issued by then must have arrived. Callers of one turn share the boundary; nothing is kept for each but its paths.
//!
//! A hold keeps a group from being cut until its application commits, or its time is over. Commands are handled between rounds, so no cut contains half of what comes after the answer.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use rustix::fs::FileType;
use tokio::sync::oneshot;
use twinbox_protocol::ids::Lsn;
use twinbox_protocol::path::RelPath;
use twinbox_resync::rows::Rows;

use super::dirty::Group;
use super::engine::{CaptureError, Engine};

/// A group that has been held for this long without a gap takes no new hold until it was cut.
const HELD_ON: Duration = Duration::from_secs(10);
/// Longest time an application may hold a group at once.
pub const HOLD_MAX: Duration = Duration::from_secs(600);

/// With more dirty paths than this nobody looks for their other names.
const DIRTY_SEARCHED: usize = 2000;

/// What a caller waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Until {
    /// A power cut on the standby cannot lose it.
    Durable,
    /// It is visible in the standby's tree.
    Applied,
}

/// Why a fence did not hold.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NotFenced {
    /// No standby, or its first sync is not complete.
    #[error("no standby follows now, or its first sync is not complete")]
    Unprotected,
    /// Something below the paths cannot be read.
    #[error("{path} cannot be read ({why}): whether it changed is not known")]
    Unreadable {
        /// Which.
        path: RelPath,
        /// The system's words.
        why: String,
    },
}

/// Why a declared txn was not begun or not committed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NoTxn {
    /// No hold of that number or group: its time was over, or it was never begun.
    #[error("no such transaction: its time was over, and what had changed by then was shipped as it was, or it was never begun")]
    Expired,
    /// The group has several holds.
    #[error("the group has {open} open transactions: say which")]
    Several {
        /// How many.
        open: usize,
    },
}

/// A fence, as asked for.
#[derive(Debug)]
pub struct FenceRequest {
    /// What is asked about; empty: the whole mirror.
    pub paths: Vec<RelPath>,
    /// What to wait for.
    pub until: Until,
    /// Wait for a standby, too.
    pub wait: bool,
    /// The answer: an LSN that had arrived, and before which all of it was issued.
    pub reply: oneshot::Sender<Result<Lsn, NotFenced>>,
}

/// The answer to whoever begins a txn: its number.
pub type Begun = oneshot::Sender<u64>;

enum Reply {
    Fence(oneshot::Sender<Result<Lsn, NotFenced>>),
    /// For those who stop or report: unreadable paths or not.
    Sync(oneshot::Sender<()>),
}

/// A caller that waits.
pub(super) struct Waiter {
    paths: Vec<RelPath>,
    until: Until,
    wait: bool,
    reply: Reply,
    /// Too much was dirty to find out what concerns it: it waits for all of it.
    all: bool,
    /// Registered: the last round begun before.
    pub(super) round: Option<u64>,
    /// No directory that appeared before it is still to be listed.
    listed: bool,
    pub(super) at: Option<Lsn>,
}

impl Waiter {
    /// Back to the beginning: what it waited for is dirty again.
    pub(super) fn restart(&mut self) {
        (self.round, self.at, self.listed) = (None, None, false);
    }

    fn is_closed(&self) -> bool {
        match &self.reply {
            Reply::Fence(reply) => reply.is_closed(),
            Reply::Sync(reply) => reply.is_closed(),
        }
    }

    /// The caller may have given up meanwhile.
    fn answer(self, with: Result<Lsn, NotFenced>) {
        match self.reply {
            Reply::Fence(reply) => drop(reply.send(with)),
            Reply::Sync(reply) => drop(reply.send(())),
        }
    }
}

struct Hold {
    group: Group,
    until: Instant,
}

/// Holds, and who waits for one.
#[derive(Default)]
pub(super) struct Holds {
    open: BTreeMap<u64, Hold>,
    /// Since when a group is held without a gap in which it was cut.
    since: BTreeMap<Group, Instant>,
    later: Vec<(RelPath, Duration, Begun)>,
    last: u64,
}

impl Engine {
    /// Everything that is dirty now, applied.
    pub(super) fn wait_for_sync(&mut self, reply: oneshot::Sender<()>) {
        let reply = Reply::Sync(reply);
        self.waiters.push(Waiter {
            paths: vec![],
            until: Until::Applied,
            wait: true,
            reply,
            all: false,
            round: None,
            listed: false,
            at: None,
        });
    }

    pub(super) fn fence(&mut self, request: FenceRequest) {
        let FenceRequest { paths, until, wait, reply } = request;
        self.waiters.push(Waiter { paths, until, wait, reply: Reply::Fence(reply), all: false, round: None, listed: false, at: None });
    }

    /// What callers waited for may be dirty again, or in other groups.
    pub(super) fn restart_waiters(&mut self) {
        self.waiters.iter_mut().for_each(Waiter::restart);
    }

    /// Call when a comparison may just have ended.
    pub(super) fn note_listed(&mut self) {
        if self.scan.is_done() {
            self.waiters.iter_mut().filter(|w| w.round.is_some()).for_each(|w| w.listed = true);
        }
    }

    pub(super) fn answer_waiters(&mut self) -> Result<(), CaptureError> {
        if self.waiters.is_empty() {
            return Ok(());
        }
        self.waiters.retain(|w| !w.is_closed());
        if !self.is_protected() {
            let (waiting, refused): (Vec<Waiter>, Vec<Waiter>) = std::mem::take(&mut self.waiters).into_iter().partition(|w| w.wait);
            self.waiters = waiting;
            refused.into_iter().for_each(|w| w.answer(Err(NotFenced::Unprotected)));
            self.restart_waiters();
            return Ok(());
        }
        if self.waiters.iter().any(|w| w.round.is_none()) {
            self.register_waiters()?;
        }
        self.note_listed();
        let last = self.outbox.last().lsn;
        let durable = self.outbox.in_flight().next().map_or(last, |first| Lsn(first.position.lsn.0 - 1));
        let mut whole = BTreeMap::new();
        for mut waiter in std::mem::take(&mut self.waiters) {
            if let (None, Some(round), true) = (waiter.at, waiter.round, waiter.listed) {
                let done = if waiter.all || waiter.paths.is_empty() {
                    *whole.entry(round).or_insert_with(|| self.sets.has_cut_all(round))
                } else {
                    waiter.paths.iter().all(|path| self.sets.has_cut(path, round))
                };
                waiter.at = done.then_some(last);
            }
            let arrived = match waiter.until {
                Until::Durable => durable,
                Until::Applied => self.applied.min(durable),
            };
            match waiter.at {
                Some(at) if at <= arrived => {
                    let unreadable = self.unreadable_below(&waiter.paths);
                    waiter.answer(unreadable.map_or(Ok(at), Err));
                }
                _ => self.waiters.push(waiter),
            }
        }
        Ok(())
    }

    /// A standby follows, and nothing but what is dirty can differ from it.
    fn is_protected(&self) -> bool {
        self.complete && self.session.is_some() && !self.compare && !self.collapsed
    }

    fn register_waiters(&mut self) -> Result<(), CaptureError> {
        // A write through another name of a file raises no event here.
        let asked: Vec<&[RelPath]> = self.waiters.iter().filter(|w| w.round.is_none()).map(|w| w.paths.as_slice()).collect();
        let concerns = |path: &RelPath| asked.iter().any(|paths| paths.is_empty() || paths.iter().any(|p| path.is_within(p)));
        let open: Vec<RelPath> = self.writers.keys().filter(|path| concerns(path)).cloned().collect();
        for path in open {
            self.check_writer(&path)?;
        }
        self.boundary()?;
        self.mark_other_names()?;
        if !self.is_protected() {
            return Ok(());
        }
        let (round, listed) = (self.sets.round(), self.scan.is_done());
        for at in 0..self.waiters.len() {
            let waiter = &mut self.waiters[at];
            if waiter.round.is_none() {
                (waiter.round, waiter.listed) = (Some(round), listed);
                self.sets.hasten(&waiter.paths);
            }
        }
        Ok(())
    }

    /// A change under a name that is not asked about changes its other names, which may be: they are found when it is looked at, and that may be later.
    fn mark_other_names(&mut self) -> Result<(), CaptureError> {
        let new = || self.waiters.iter().filter(|waiter| waiter.round.is_none());
        if new().all(|waiter| waiter.paths.is_empty()) {
            return Ok(());
        }
        let dirty: Vec<RelPath> =
            self.sets.groups().flat_map(|(_, g)| g.dirty.iter().filter(|(_, m)| !m.quiet)).map(|(path, _)| path.clone()).collect();
        if dirty.len() > DIRTY_SEARCHED {
            self.waiters.iter_mut().filter(|waiter| waiter.round.is_none()).for_each(|waiter| waiter.all = true);
            return Ok(());
        }
        for path in dirty {
            let Some(local) = self.view.row(&self.sets.origin(&path))?.and_then(|row| row.local) else { continue };
            for other in self.view.by_ino(local.ino)? {
                let group = self.group_of_marked(&other);
                if other != path && !self.sets.is_dirty(&group, &other) {
                    self.mark(&other, false, true, false);
                }
            }
        }
        Ok(())
    }

    fn unreadable_below(&self, paths: &[RelPath]) -> Option<NotFenced> {
        let concerns = |path: &RelPath| paths.is_empty() || paths.iter().any(|p| path.is_within(p) || p.is_within(path));
        let (path, (why, _)) = self.unreadable.iter().find(|(path, _)| concerns(path))?;
        Some(NotFenced::Unreadable { path: path.clone(), why: why.clone() })
    }

    /// Begins a declared txn of the group that `path` is in.
    pub(super) fn begin_txn(&mut self, path: RelPath, time: Duration, reply: Begun) {
        let now = Instant::now();
        let group = self.group_to_hold(&path);
        let since = *self.holds.since.entry(group.clone()).or_insert(now);
        if now.duration_since(since) >= HELD_ON && !self.sets.group_is_clean(&group) {
            self.holds.later.push((path, time, reply));
            return;
        }
        self.holds.last += 1;
        let id = self.holds.last;
        if reply.send(id).is_ok() {
            self.holds.open.insert(id, Hold { group, until: now + time.min(HOLD_MAX) });
        }
        self.settle_holds();
    }

    /// What is not there, or was just made, is about to be a directory.
    fn group_to_hold(&self, path: &RelPath) -> Group {
        let is_file = matches!(self.root.stat(path), Ok(Some(stat)) if FileType::from_raw_mode(stat.st_mode) != FileType::Directory);
        self.group_of(path, !is_file)
    }

    /// Lifts the hold `id`, or the only one of the group that `path` is in; gives the group's name as a path.
    pub(super) fn end_txn(&mut self, id: Option<u64>, path: Option<&RelPath>) -> Result<RelPath, NoTxn> {
        let groups = path.map(|path| [true, false].map(|is_dir| self.group_of(path, is_dir)));
        let fits = |(at, hold): &(&u64, &Hold)| id.is_none_or(|id| id == **at) && groups.as_ref().is_none_or(|g| g.contains(&hold.group));
        let open: Vec<u64> = self.holds.open.iter().filter(fits).map(|(id, _)| *id).collect();
        let id = match open[..] {
            [] => return Err(NoTxn::Expired),
            [id] => id,
            _ => return Err(NoTxn::Several { open: open.len() }),
        };
        let hold = self.holds.open.remove(&id).ok_or(NoTxn::Expired)?;
        self.settle_holds();
        Ok(RelPath::new(&hold.group).unwrap_or_default())
    }

    /// Ends holds whose time is over, and begins those that had to wait.
    pub(super) fn expire_holds(&mut self) {
        let now = Instant::now();
        let over: Vec<u64> = self.holds.open.iter().filter(|(_, hold)| hold.until <= now).map(|(id, _)| *id).collect();
        for id in &over {
            tracing::warn!(mirror = %self.config.name, txn = id, "a declared transaction was not committed in its time: what has changed is shipped as it is");
            self.holds.open.remove(id);
        }
        if !over.is_empty() {
            self.settle_holds();
        }
        self.holds.later.retain(|(_, _, reply)| !reply.is_closed());
        for (path, time, reply) in std::mem::take(&mut self.holds.later) {
            self.begin_txn(path, time, reply);
        }
    }

    /// Groups that were cut, or have nothing to cut, begin to be held anew.
    pub(super) fn holds_cut(&mut self, unit: &BTreeSet<Group>) {
        self.holds.since.retain(|group, _| !unit.contains(group));
    }

    fn settle_holds(&mut self) {
        let held: BTreeSet<Group> = self.holds.open.values().map(|hold| hold.group.clone()).collect();
        self.holds.since.retain(|group, _| held.contains(group) || !self.sets.group_is_clean(group));
        self.sets.hold(held);
    }

    /// When the next hold ends.
    pub(super) fn next_expiry(&self) -> Option<Instant> {
        self.holds.open.values().map(|hold| hold.until).min()
    }
}
