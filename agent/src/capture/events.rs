//! What each event of the kernel's queue means for the dirty sets: marks, renames, names that came and went.
//!
//! Invariant: whatever an event may have changed is dirty, to be compared, or nothing to the standby when it has been taken. Events are taken in the order of the queue; their paths are those of that moment.

use std::collections::BTreeSet;
use std::time::Instant;

use rustix::fs::inotify::ReadFlags;
use twinbox_protocol::path::RelPath;

use super::dirty::Group;
use super::engine::{CaptureError, Engine, HINTS_MAX, HalfRename, RECHECK_AFTER};
use super::watch::Event;

impl Engine {
    pub(super) fn event(&mut self, event: &Event) -> Result<(), CaptureError> {
        self.pace.events += 1;
        if event.mask.contains(ReadFlags::QUEUE_OVERFLOW) {
            self.summary.overflows += 1;
            self.halves.clear();
            // Where they led may have been left since.
            self.distrust_renames();
            // What was seen and is not committed may be gone by an event that was lost, and the comparison looks for it among the rows only.
            for path in self.sets.observed() {
                self.mark(&path, true, true, false);
            }
            if self.scan.restart() {
                tracing::warn!(mirror = %self.config.name, "the kernel's event queue overflowed: comparing the whole store (fs.inotify.max_queued_events can be raised)");
            }
            return Ok(());
        }
        if self.watch.is_cookie_dir(event) {
            return Ok(());
        }
        let gone = ReadFlags::MOVE_SELF | ReadFlags::DELETE_SELF | ReadFlags::UNMOUNT | ReadFlags::IGNORED;
        if event.wd == self.watch.root() && event.mask.intersects(gone) {
            return Err(CaptureError::RootGone { path: self.config.root.clone() });
        }
        if event.mask.contains(ReadFlags::IGNORED) {
            self.watch.handle_ignored(event.wd);
            return Ok(());
        }
        let Some(dir) = self.watch.path(event.wd) else { return Ok(()) };
        if event.name.is_empty() {
            if event.mask.contains(ReadFlags::ATTRIB) {
                self.mark(&dir, false, false, true);
            }
            return Ok(());
        }
        let is_dir = event.mask.contains(ReadFlags::ISDIR);
        let Some(path) = dir.join(&event.name) else { return Ok(()) };
        let excluded = self.config.selection.excludes(path.as_bytes(), is_dir);
        let names = ReadFlags::CREATE | ReadFlags::DELETE | ReadFlags::MOVED_FROM | ReadFlags::MOVED_TO;
        if is_dir && !excluded && event.mask.intersects(names) {
            let group = self.group_of(&path, true);
            if self.complete {
                self.rechecks.insert(group, Instant::now() + RECHECK_AFTER);
            }
        }
        if event.mask.intersects(names) {
            self.mark(&dir, false, false, true);
        }
        if !is_dir && event.mask.intersects(ReadFlags::DELETE | ReadFlags::MOVED_TO) {
            self.other_names_changed(&path)?;
        }
        if !is_dir && event.mask.contains(ReadFlags::DELETE) {
            self.fresh.remove(&path);
            if self.is_unheard_of(&path)? {
                self.forget(&path);
                return Ok(());
            }
        }
        if event.mask.contains(ReadFlags::MOVED_FROM) {
            if !excluded {
                self.mark(&path, false, false, false);
            }
            let wd = self.watch.at(&path).filter(|_| is_dir);
            self.halves.insert(event.cookie, HalfRename { path, dir: event.wd, is_dir, excluded, wd });
        } else if event.mask.contains(ReadFlags::MOVED_TO) {
            match self.halves.remove(&event.cookie) {
                Some(half) => self.renamed(&half, &path, excluded)?,
                None if excluded => {}
                None => self.appeared(&path, is_dir),
            }
        } else if excluded {
            // Never mirrored.
        } else if event.mask.contains(ReadFlags::CREATE) {
            self.appeared(&path, is_dir);
            self.closers.add(&path, Instant::now());
        } else if event.mask.intersects(ReadFlags::MODIFY | ReadFlags::CLOSE_WRITE) {
            let closed = event.mask.contains(ReadFlags::CLOSE_WRITE);
            self.written_alone(&path)?;
            self.mark(&path, true, false, false);
            let group = self.group_of_marked(&path);
            self.sets.wrote(&group, &path, closed);
            if closed {
                self.closers.add(&path, Instant::now());
            }
        } else {
            self.mark(&path, false, false, is_dir && event.mask.contains(ReadFlags::ATTRIB));
        }
        Ok(())
    }

    /// With no standby it may be long until this is looked at, and the power go before: what has a row is noted as written in place at once, since its bytes can then be new under old times.
    fn written_alone(&mut self, path: &RelPath) -> Result<(), CaptureError> {
        use twinbox_resync::rows::Rows;
        if self.session.is_some() || self.pull.is_some() || self.sets.is_content_dirty(&self.group_of_marked(path), path) {
            return Ok(());
        }
        if let Some(row) = self.view.row(&self.sets.origin(path))?.filter(|row| row.entry.hash().is_some())
            && let Some(local) = row.local
        {
            self.noted_alone |= self.view.note_in_place(local.ino)?;
        }
        Ok(())
    }

    /// A name goes, or becomes another file's: if it was written to, its other names have changed, and no event says so.
    pub(super) fn other_names_changed(&mut self, path: &RelPath) -> Result<(), CaptureError> {
        use twinbox_resync::rows::Rows;
        let group = self.group_of_marked(path);
        if !self.sets.is_content_dirty(&group, path) {
            return Ok(());
        }
        if let Some(local) = self.view.row(&self.sets.origin(path))?.and_then(|row| row.local) {
            for other in self.view.by_ino(local.ino)? {
                if other != *path {
                    self.mark(&other, true, true, false);
                }
            }
        }
        Ok(())
    }

    /// Whether nothing was ever sent of a file, nor of what had its name before: gone again, it is nothing to the standby.
    ///
    /// Rows that are taken back or pulled later mark their paths, so that this holds as long as nobody says otherwise.
    pub(super) fn is_unheard_of(&self, path: &RelPath) -> Result<bool, CaptureError> {
        use twinbox_resync::rows::Rows;
        if !self.complete || self.pull.is_some() || self.collapsed || self.sets.is_ambiguous(path) {
            return Ok(false);
        }
        for name in self.sets.origins(path) {
            if self.view.row(&name)?.is_some() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// A file that is unheard of is gone: whether its bytes were to be read, and since which round, when it was dirty. A round that has seen it is spoiled.
    pub(super) fn forget(&mut self, path: &RelPath) -> Option<u64> {
        self.fresh.remove(path);
        self.larges.remove(path);
        self.unreadable.remove(path);
        self.ahead_in_vain(path);
        let groups: BTreeSet<Group> = [true, false].map(|is_dir| self.group_of(path, is_dir)).into();
        groups.iter().filter_map(|group| self.sets.withdraw(group, path)).map(|(_, round)| round).min()
    }

    /// A directory is to be compared; not when everything will be.
    pub(super) fn push_scan(&mut self, dir: RelPath) {
        if !self.compare || self.session.is_some() {
            self.scan.push(dir);
        }
    }

    /// What was seen below a directory was seen below another one: a comparison need not find it different from the rows, and they move with the one that comes.
    pub(super) fn void_below(&mut self, dir: &RelPath) {
        for path in self.sets.observed_below(dir) {
            self.mark(&path, false, true, false);
        }
    }

    pub(super) fn appeared(&mut self, path: &RelPath, is_dir: bool) {
        self.mark(path, true, false, false);
        if is_dir {
            self.void_below(path);
            self.push_scan(path.clone());
        } else if self.complete && !self.collapsed {
            self.fresh.insert(path.clone());
        }
    }

    pub(super) fn renamed(&mut self, from: &HalfRename, to: &RelPath, to_excluded: bool) -> Result<(), CaptureError> {
        if to_excluded {
            self.moved_out(from);
            return Ok(());
        }
        if from.excluded {
            self.appeared(to, from.is_dir);
            return Ok(());
        }
        if from.is_dir
            && let (Some(wd), Some(parent)) = (self.watch.at(&from.path), to.parent().and_then(|p| self.watch.at(&p)))
        {
            self.watch.place(wd, parent, to.name());
        }
        if !self.collapsed {
            let groups = (self.group_of(&from.path, from.is_dir), self.group_of(to, from.is_dir));
            for (path, group) in [(&from.path, &groups.0), (to, &groups.1)] {
                let other = self.group_of(path, !from.is_dir);
                if other != *group {
                    self.sets.withdraw(&other, path);
                }
            }
            if from.is_dir {
                self.void_below(to);
            }
            self.ahead_moved(&from.path, to);
            self.fresh.moved(&from.path, to);
            for (path, at) in super::ahead::take_within(&mut self.writers, &from.path) {
                if let Some(new) = path.rebase(&from.path, to) {
                    if self.mapped.remove(&path) {
                        self.mapped.insert(new.clone());
                    }
                    self.writers.insert(new, at);
                }
            }
            for (path, why) in super::ahead::take_within(&mut self.unreadable, &from.path) {
                if let Some(new) = path.rebase(&from.path, to) {
                    self.unreadable.insert(new, why);
                }
            }
            use twinbox_resync::rows::Rows;
            let is_known = || self.view.row(&self.sets.origin(&from.path)).is_ok_and(|row| row.is_some_and(|row| row.local.is_some()));
            if !from.is_dir && self.complete && !self.scan.is_settled() && !is_known() {
                // It may have come while nobody watched, and have gone past the comparison: from where that has not been to where it has.
                self.fresh.insert(to.clone());
            }
            if let (false, Some(at)) = (from.is_dir, self.closers.last(&from.path)) {
                self.closers.add(to, at);
            }
            if !from.is_dir && groups.0 == groups.1 && self.sets.origin(to) == *to && self.is_unheard_of(&from.path)? {
                // As if it had come under this name: what is renamed again and again while no standby is there is one thing to send, not one a name.
                let round = self.forget(&from.path);
                self.mark(to, true, true, false);
                self.fresh.insert(to.clone()); // What was joined for its old name is not joined with this one's.
                if let Some(round) = round {
                    let group = self.group_of_marked(to);
                    self.sets.backdate(&group, to, round);
                }
                return Ok(());
            }
            let (grouping, watch) = (&self.config.grouping, &self.watch);
            let group_of = |path: &RelPath| grouping.group_of(path.as_bytes(), watch.at(path).is_some()).to_vec();
            self.sets.renamed((&groups.0, &from.path), (&groups.1, to), from.is_dir, Instant::now(), group_of);
            for (path, large) in self.larges.extract_if(|path, _| path.is_within(&from.path)).collect::<Vec<_>>() {
                // Observations below a directory move along; one of the thing itself is void.
                if let Some(new) = path.rebase(&from.path, to).filter(|_| path != from.path) {
                    self.larges.insert(new, large);
                }
            }
            if self.sets.hint_count() > HINTS_MAX {
                self.distrust_renames();
            }
        }
        if from.is_dir {
            self.scan.moved(&from.path, to);
            // Two directories that were exchanged: what we believed to be there was displaced, and the disk decides.
            self.push_scan(from.path.clone());
            self.push_scan(to.clone());
        }
        Ok(())
    }

    /// Where renames led is compared as if nothing were known of it: there are too many, or the rows it was compared with under its old name are not those any more.
    pub(super) fn distrust_renames(&mut self) {
        let (to, from) = self.sets.distrust();
        for path in &to {
            self.mark_again(path); // Whatever round it is: its groups may not be cut together any more.
        }
        for path in from.into_iter().chain(to) {
            // A directory that is not watched yet is going to be listed, or is none: files are looked at one by one.
            if self.watch.at(&path).is_some() {
                self.scan.push(path);
            }
        }
    }

    /// A name left the tree (or what is mirrored of it).
    pub(super) fn moved_out(&mut self, half: &HalfRename) {
        if let Some(wd) = half.wd
            && self.watch.path(wd).is_none_or(|path| path == half.path)
        {
            self.watch.forget(wd);
        }
        self.strayed |= self.fresh.any_within(&half.path);
        let root = &self.root;
        self.fresh.remove_within(&half.path, |path| root.stat(path).is_ok_and(|stat| stat.is_none()));
        if !half.excluded {
            self.mark(&half.path, false, false, false);
            if half.is_dir {
                if self.sets.hint_count() > 0 {
                    self.distrust_renames(); // One of them may have brought it where it left, and it may come back.
                }
                self.void_below(&half.path);
                // What we forgot may have been its successor, listed before these events.
                self.push_scan(half.path.clone());
            }
        }
    }
}
