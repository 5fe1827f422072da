//! Comparing listings with the manifest: which directories are to be looked at, one piece at a time.
//!
//! Watch first, list then: an entry made before the watch is in the listing, one made after it raises an event. Nothing commits while a comparison runs (first sync aside).

use std::collections::{BTreeSet, HashMap};
use std::os::fd::AsFd;

use rustix::fs::{self as rfs, AtFlags, FileType};
use rustix::io::Errno;
use twinbox_protocol::entry::{Kind, Time};
use twinbox_protocol::path::RelPath;
use twinbox_resync::rows::{Row, Rows};

use super::dirty::{Group, Pending};
use super::engine::{CaptureError, Engine};
use crate::tree::{self, Listed};

/// Entries compared in one turn: about 2 ms, so that events are taken often.
const PIECE: usize = 1000;

/// Bounds what is remembered of files that went or came: past it a move between groups that nobody watched may be two txns.
const MOVED_MAX: usize = 200_000;

/// A directory being compared.
struct Listing {
    dir: RelPath,
    origin: RelPath,
    fd: std::os::fd::OwnedFd,
    names: std::vec::IntoIter<Listed>,
    rows: std::iter::Peekable<std::vec::IntoIter<(Vec<u8>, Row)>>,
}

/// Files that may have been moved between groups while nobody watched: they must not be gone in one before they are in the other. Recognised by size and mtime, which a rename leaves as they are:
/// after a power cut this node may not know what inodes they had.
///
/// Only in the first comparison of a life, or after all rows were pulled: later the inodes are known, and copies of one message that come and go under load would make one unit of many groups.
#[derive(Default)]
struct Moved {
    over: bool,
    went: HashMap<(u64, Time), BTreeSet<Group>>,
    came: HashMap<(u64, Time), BTreeSet<Group>>,
}

impl Moved {
    fn went(&mut self, row: &Row, group: Group) {
        if !self.over && row.entry.hash().is_some() && self.went.len() < MOVED_MAX {
            self.went.entry((row.entry.size(), row.entry.mtime)).or_default().insert(group);
        }
    }

    fn came(&mut self, size: u64, mtime: Time, group: Group) {
        if !self.over && self.came.len() < MOVED_MAX {
            self.came.entry((size, mtime)).or_default().insert(group);
        }
    }

    /// Nothing more comes of this comparison; `last`: nothing is remembered from here on.
    fn end(&mut self, last: bool) {
        *self = Moved { over: self.over | last, ..Moved::default() };
    }

    /// Pairs of groups that are cut together.
    fn between_groups(&self) -> BTreeSet<(Group, Group)> {
        let mut pairs = BTreeSet::new();
        for (which, to) in &self.came {
            let Some(from) = self.went.get(which) else { continue };
            // What went in the same group was moved within it; what others lost are copies.
            for to in to.difference(from) {
                pairs.extend(from.iter().map(|from| (from.clone(), to.clone())));
            }
        }
        pairs
    }
}

/// Directories still to be compared.
#[derive(Default)]
pub(super) struct Scan {
    moved: Moved,
    stack: Vec<RelPath>,
    open: Option<Listing>,
    looked_at: u64,
    /// Something was compared, and events may be on their way that came while it was.
    unsettled: bool,
}

impl Scan {
    /// A directory is to be compared, with everything below it.
    pub(super) fn push(&mut self, dir: RelPath) {
        self.unsettled = true;
        if self.stack.last() != Some(&dir) {
            self.stack.push(dir);
        }
    }

    /// Everything is to be compared; `false` when that was so already and nothing of it was done.
    pub(super) fn restart(&mut self) -> bool {
        let fresh = self.open.is_some() || self.stack.first().is_none_or(|d| !d.is_root());
        self.clear();
        self.push(RelPath::root());
        fresh
    }

    /// All that happened while something was compared has been taken from the queue.
    pub(super) fn is_settled(&self) -> bool {
        !self.unsettled
    }

    /// The queue was taken up to a moment ago; `followed`: a life's first comparison is over with that.
    pub(super) fn settle(&mut self, followed: bool) {
        if self.unsettled && self.is_done() {
            self.unsettled = false;
            self.moved.end(followed);
        }
    }

    /// The next comparison is as the first one of a life.
    pub(super) fn forget_inodes(&mut self) {
        self.moved.over = false;
    }

    /// The first comparison of a life is not over: what a path's row says may be older than this life.
    pub(super) fn is_first(&self) -> bool {
        !self.moved.over
    }

    pub(super) fn clear(&mut self) {
        let moved = Moved { over: self.moved.over, ..Moved::default() };
        *self = Scan { moved, ..Scan::default() };
    }

    pub(super) fn is_done(&self) -> bool {
        self.stack.is_empty() && self.open.is_none()
    }

    /// Directories that are still to be compared, with what is below them.
    pub(super) fn left(&self) -> impl Iterator<Item = &RelPath> {
        self.stack.iter().chain(self.open.iter().map(|open| &open.dir))
    }

    pub(super) fn looked_at(&self) -> u64 {
        self.looked_at
    }

    /// A directory moved: what is still to be compared below it moved along, and what was half compared begins anew.
    pub(super) fn moved(&mut self, from: &RelPath, to: &RelPath) {
        if let Some(open) = self.open.take_if(|open| open.dir.is_within(from) || open.dir.is_within(to)) {
            self.stack.push(open.dir);
        }
        for dir in &mut self.stack {
            if let Some(moved) = dir.rebase(from, to) {
                *dir = moved;
            }
        }
    }
}

impl Engine {
    /// Watches every directory below the root, without comparing (that is done when the standby is there).
    pub(super) fn watch_everything(&mut self) -> Result<(), CaptureError> {
        let mut stack = vec![RelPath::root()];
        while let Some(dir) = stack.pop() {
            let Some((_, names)) = self.open_and_watch(&dir)? else { continue };
            for item in names {
                let Some(path) = dir.join(&item.name) else { continue };
                if item.kind == FileType::Directory && !self.config.selection.excludes(path.as_bytes(), true) {
                    stack.push(path);
                }
            }
        }
        Ok(())
    }

    /// Opens, watches, then lists. `None`: not there, or not readable (noted).
    fn open_and_watch(&mut self, dir: &RelPath) -> Result<Option<(std::os::fd::OwnedFd, Vec<Listed>)>, CaptureError> {
        let fd = match self.root.dir_for_reading(dir) {
            Ok(fd) => fd,
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(None),
            Err(error) => {
                self.cannot_read(dir, error);
                return Ok(None);
            }
        };
        self.meanwhile();
        let wd = self.watch.add(fd.as_fd())?;
        self.meanwhile();
        if !dir.is_root() {
            let parent = dir.parent().unwrap_or_default();
            match self.watch.at(&parent) {
                Some(parent) => self.watch.place(wd, parent, dir.name()),
                // Its own directory is not known to us (any more): the events that explain it are still to come, and bring it back here.
                None => self.scan.push(parent),
            }
        }
        match tree::list(fd.as_fd()) {
            Ok(mut names) => {
                self.unreadable.remove(dir);
                names.sort_unstable_by(|a, b| a.name.cmp(&b.name));
                Ok(Some((fd, names)))
            }
            Err(Errno::NOENT) => Ok(None),
            Err(error) => {
                self.cannot_read(dir, error);
                Ok(None)
            }
        }
    }

    pub(super) fn cannot_read(&mut self, path: &RelPath, error: Errno) {
        let why = std::io::Error::from(error).to_string();
        let at = std::time::Instant::now() + super::engine::UNREADABLE_EVERY;
        if self.unreadable.insert(path.clone(), (why.clone(), at)).is_none() {
            tracing::warn!(mirror = %self.config.name, error = %why, "a path cannot be read; the rest goes on, it is tried again (see status)");
            tracing::debug!(path = %path, "unreadable");
            self.trouble(format!("cannot read {path}: {why}; give the agent permission, it tries again by itself"));
        }
    }

    /// Compares a piece; `true` when it did something.
    pub(super) fn scan_some(&mut self) -> Result<bool, CaptureError> {
        if self.scan.is_done() {
            self.scan.looked_at = 0;
            return Ok(false);
        }
        if !self.complete && (self.session.is_none() || self.sets.pending() >= 2 * PIECE) {
            return Ok(false); // First sync: as fast as it is shipped, so that memory stays bounded.
        }
        let mut left = PIECE;
        while left > 0 {
            let Some(mut listing) = self.scan.open.take() else {
                let Some(dir) = self.scan.stack.pop() else { break };
                left = left.saturating_sub(10);
                self.open_listing(dir)?;
                continue;
            };
            let mut ended = false;
            while left > 0 {
                left -= 1;
                match listing.names.next() {
                    Some(item) => self.compare_item(&mut listing, &item)?,
                    None => {
                        ended = true;
                        break;
                    }
                }
            }
            if ended {
                for (name, row) in listing.rows {
                    self.compare_gone((&listing.dir, &listing.origin), &name, &row)?;
                }
            } else {
                self.scan.open = Some(listing);
            }
        }
        if self.scan.is_done() {
            self.strayed = false;
            for (from, to) in self.scan.moved.between_groups() {
                self.sets.join(&from, &to);
            }
        }
        Ok(true)
    }

    fn open_listing(&mut self, dir: RelPath) -> Result<(), CaptureError> {
        let Some((fd, names)) = self.open_and_watch(&dir)? else {
            if !self.unreadable.contains_key(&dir) {
                self.mark(&dir, false, true, false);
            }
            return Ok(());
        };
        let origin = self.sets.origin(&dir);
        let stat = rfs::fstat(&fd).map_err(std::io::Error::from)?;
        let row = self.view.row(&origin)?;
        let same = row.as_ref().is_some_and(|row| row.local == Some(tree::local(&stat)) && row.entry.mtime == tree::mtime(&stat));
        if !same {
            self.mark(&dir, false, true, true);
        }
        let rows = self.view.children(&origin)?.into_iter().peekable();
        self.scan.open = Some(Listing { dir, origin, fd, names: names.into_iter(), rows });
        Ok(())
    }

    fn compare_item(&mut self, listing: &mut Listing, item: &Listed) -> Result<(), CaptureError> {
        while let Some((name, row)) = listing.rows.next_if(|(name, _)| *name < item.name) {
            self.compare_gone((&listing.dir, &listing.origin), &name, &row)?;
        }
        let row = listing.rows.next_if(|(name, _)| *name == item.name).map(|(_, row)| row);
        let Some(path) = listing.dir.join(&item.name) else { return Ok(()) };
        self.scan.looked_at += 1;
        self.pace.scanned += 1;
        self.meanwhile();
        let stat = match rfs::statat(&listing.fd, item.name.as_slice(), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => {
                self.mark(&path, false, true, false);
                return Ok(());
            }
            Err(error) => {
                self.cannot_read(&path, error);
                return Ok(());
            }
        };
        let is_dir = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        if self.config.selection.excludes(path.as_bytes(), is_dir) {
            if row.is_some() {
                self.mark(&path, false, true, false);
            }
            return Ok(());
        }
        if is_dir {
            // Its own listing compares it.
            self.scan.push(path.clone());
            if row.is_none_or(|row| !row.entry.is_dir()) {
                self.mark_unless_seen(&path, &stat, true);
            }
            return Ok(());
        }
        // A name moved into or out of this place by a rename we saw is dirty already; its row is elsewhere.
        let row = if self.sets.origin(&path) == listing.origin.join(&item.name).unwrap_or_default() { row } else { None };
        if row.as_ref().is_none_or(|row| !unchanged(row, &stat)) {
            self.mark_unless_seen(&path, &stat, false);
            let is_file = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
            let still = |row: &Row| is_file && row.entry.size() == stat.st_size as u64 && row.entry.mtime == tree::mtime(&stat);
            // With the same size and time it is the same file, whatever else was changed.
            if !row.as_ref().is_some_and(still) {
                let is_new = row.is_none();
                if let Some(row) = row {
                    self.scan.moved.went(&row, self.group_of(&path, false));
                }
                if is_file && self.complete {
                    self.may_have_moved_here(path, &stat, is_new)?;
                }
            }
        }
        Ok(())
    }

    /// What differs from its row is looked at; not what has been, as it is now, and waits for its cut: the folder of many messages is listed each time it is renamed.
    fn mark_unless_seen(&mut self, path: &RelPath, stat: &rfs::Stat, is_dir: bool) {
        let (group, local) = (self.group_of(path, is_dir), tree::local(stat));
        if self.sets.seen(&group, path) != Pending::Seen(Some(local)) && !self.sets.keeps(&group, path, local) {
            self.mark(path, false, true, false);
        }
    }

    /// A file that differs from its row, or has none, may have come from where nobody watched it go: it must not be gone there before it is here.
    fn may_have_moved_here(&mut self, path: RelPath, stat: &rfs::Stat, is_new: bool) -> Result<(), CaptureError> {
        if stat.st_nlink > 1 {
            // Elsewhere, too, wherever it came from. When it is the last of its names before it is cut, it was a move after all.
            if is_new {
                self.fresh.insert(path);
            }
            return Ok(());
        }
        let here = self.group_of(&path, false);
        let mut left = vec![];
        for other in self.view.by_ino(stat.st_ino)? {
            if self.root.stat(&other).ok().flatten().is_some_and(|there| there.st_ino == stat.st_ino) {
                return Ok(());
            }
            // Another file that had its number says nothing.
            let same = |row: Row| row.entry.size() == stat.st_size as u64 && row.entry.mtime == tree::mtime(stat);
            if self.view.row(&other)?.is_some_and(same) {
                left.push(self.group_of(&other, false));
            }
        }
        // One that its own group lost was moved within that; what other groups lost are copies of it.
        if !left.is_empty() && !left.contains(&here) {
            tracing::debug!(mirror = %self.config.name, %path, from = left.len(), "moved while nobody watched: here first");
            // Not as one: of a message that many had, and all but one threw away, the others' names look the same, and would make one unit of all their groups.
            self.fresh.insert(path.clone());
        }
        self.scan.moved.came(stat.st_size as u64, tree::mtime(stat), here);
        Ok(())
    }

    fn compare_gone(&mut self, listing: (&RelPath, &RelPath), name: &[u8], row: &Row) -> Result<(), CaptureError> {
        let (Some(path), Some(origin)) = (listing.0.join(name), listing.1.join(name)) else { return Ok(()) };
        self.mark(&path, false, true, false);
        self.scan.moved.went(row, self.group_of(&path, false));
        // Above groups, it takes them with it: they are not gone before they are where they are now.
        let (own, is_above) = (self.group_of(&path, true), self.group_of(&path, true).is_empty());
        if row.entry.is_dir() && (!self.scan.moved.over || is_above) {
            for (below, row) in self.view.below(&origin)? {
                let group = self.group_of(&below.rebase(&origin, &path).unwrap_or(below), row.entry.is_dir());
                if is_above {
                    self.sets.join(&own, &group);
                }
                self.scan.moved.went(&row, group);
            }
        }
        Ok(())
    }
}

/// Whether a file's stat says that nothing of it changed since its row was made here.
fn unchanged(row: &Row, stat: &rfs::Stat) -> bool {
    let file = matches!(row.entry.kind, Kind::File { .. }) && FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
    row.local == Some(tree::local(stat))
        && row.entry.mtime == tree::mtime(stat)
        && (!file || row.entry.size() == stat.st_size as u64)
        && row.entry.mode == stat.st_mode & 0o7777
        && row.entry.uid == stat.st_uid
        && row.entry.gid == stat.st_gid
}
