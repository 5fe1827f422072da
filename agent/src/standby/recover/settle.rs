//! Making the disk what the rows say, in an order that never loses the only copy: removals (children first), directories (parents first), files, links,
//! then attributes, directories' times deepest first; and a last look at everything.

use std::os::fd::AsFd;

use rustix::fs::{self as rfs, FileType, Mode};
use rustix::io::Errno;
use twinbox_protocol::entry::Kind;
use twinbox_protocol::path::RelPath;
use twinbox_resync::rows::Row;

use super::Work;
use super::survey::{Plan, Source, full};
use crate::standby::attrs;
use crate::standby::error::StandbyError;
use crate::standby::replica::{Bytes, TEMP, is_dir, kind, same_type};
use crate::standby::rescue::{Why, children};
use crate::tree;

impl Work<'_> {
    /// A failure at one path: only a full disk ends recovery (it is tried again at the next start).
    fn note(&mut self, path: &RelPath, result: Result<(), Errno>) -> Result<(), StandbyError> {
        match result {
            Ok(()) => Ok(()),
            Err(error) if full(error) => Err(StandbyError::io("no room to recover the replica; free some and start again", error)),
            Err(error) => {
                self.failed.entry(path.clone()).or_insert_with(|| error.to_string());
                Ok(())
            }
        }
    }

    pub(super) fn settle(&mut self, plan: &Plan) -> Result<(), StandbyError> {
        let paths: Vec<RelPath> = self.wanted.keys().cloned().collect();
        for path in paths.iter().rev() {
            let result = self.clear(path);
            self.note(path, result)?;
        }
        for path in &paths {
            if self.wanted_row(path).is_some_and(|row| row.entry.is_dir()) {
                let result = self.directory(path);
                self.note(path, result)?;
            }
        }
        for path in &paths {
            if self.wanted_row(path).is_some_and(|row| !row.entry.is_dir()) && !self.right.contains(path) {
                let result = self.file(path, plan);
                self.note(path, result)?;
            }
        }
        for names in plan.sets.values() {
            self.join(names)?;
        }
        for path in &paths {
            if let Some(row) = self.wanted_row(path).filter(|row| !row.entry.is_dir() && self.replica.can_make(&row.entry)) {
                let result = self.replica.set_attrs(path, &row.entry);
                self.note(path, result)?;
            }
        }
        Ok(())
    }

    fn wanted_row(&self, path: &RelPath) -> Option<Row> {
        self.wanted.get(path).cloned().flatten()
    }

    /// Removes what is of another type than wanted, or not wanted.
    fn clear(&mut self, path: &RelPath) -> Result<(), Errno> {
        let Some(stat) = self.replica.stat(path)? else { return Ok(()) };
        let wanted = self.wanted_row(path);
        let keep = wanted.as_ref().is_some_and(|row| same_type(&stat, &row.entry));
        if !is_dir(&stat) {
            return if keep { Ok(()) } else { self.dispose(path) };
        }
        // Our own unfinished files, wherever names changed.
        for child in children(self.replica, path)?.iter().filter(|child| child.name().starts_with(TEMP)) {
            self.replica.remove(child)?;
        }
        if keep || path.is_root() {
            return Ok(());
        }
        match self.replica.remove(path) {
            Err(Errno::NOTEMPTY | Errno::EXIST) => self.keep(path, Why::Drift),
            other => other,
        }
    }

    fn keep(&mut self, path: &RelPath, why: Why) -> Result<(), Errno> {
        let kept = self.rescue.take(self.replica, path, why)?;
        if why == Why::Drift {
            self.suffix
                .problems
                .push(format!("a file in the replica was changed on the standby by somebody else; it is kept as {}", kept.display()));
        }
        Ok(())
    }

    /// What is at `path` goes; to rescue unless it is known elsewhere or our own torn write.
    fn dispose(&mut self, path: &RelPath) -> Result<(), Errno> {
        let Some(stat) = self.replica.stat(path)? else { return Ok(()) };
        if kind(&stat) == FileType::RegularFile {
            let hash = self.seen.get(path).filter(|seen| seen.stat.st_ino == stat.st_ino).and_then(|seen| seen.hash);
            let in_log = hash.is_some_and(|hash| self.suffix.inline.contains_key(&hash) || self.staging.size(hash).is_some());
            let known = hash.is_some_and(|hash| self.suffix.known.contains(&hash));
            let torn = stat.st_size == 0 || self.suffix.times.contains(&tree::mtime(&stat)) || self.rebuilt.contains(&stat.st_ino);
            if self.adopting && !in_log && stat.st_size > 0 {
                return self.keep(path, Why::Adopt);
            }
            if !known && !torn && !self.half_patched(path, stat.st_ino).map_err(|_| Errno::IO)? {
                return self.keep(path, Why::Drift);
            }
        }
        self.replica.remove(path)
    }

    fn directory(&mut self, path: &RelPath) -> Result<(), Errno> {
        if path.is_root() || self.replica.stat(path)?.is_some() {
            return Ok(());
        }
        let place = self.replica.place_to_change(path)?;
        rfs::mkdirat(&place.dir, place.name.as_slice(), Mode::from_raw_mode(0o700))
    }

    /// Writes a file that is not right, or makes a link, pipe or device.
    fn file(&mut self, path: &RelPath, plan: &Plan) -> Result<(), Errno> {
        let Some(row) = self.wanted_row(path) else { return Ok(()) };
        let Kind::File { size, hash } = row.entry.kind else {
            self.dispose(path)?;
            return if self.replica.can_make(&row.entry) { self.replica.make(path, &row.entry) } else { Ok(()) };
        };
        let Some(source) = plan.sources.get(&hash) else { return Err(Errno::NODATA) };
        let sys = |error: std::io::Error| Errno::from_io_error(&error).unwrap_or(Errno::IO);
        // What is there now is kept or dropped first; its content is either known or saved by now.
        match source {
            Source::Log => {
                let Some(stored) = self.suffix.inline.get(&hash) else { return Err(Errno::NODATA) };
                let bytes = self.suffix.read(*stored).map_err(|_| Errno::IO)?;
                self.dispose(path)?;
                self.replica.put(path, &row.entry, &Bytes::Here(&bytes))
            }
            Source::Staged => {
                let file = self.staging.object(hash).map_err(sys)?;
                self.dispose(path)?;
                self.replica.put(path, &row.entry, &Bytes::File(&file, size))
            }
            Source::Path(from) => {
                let file = self.replica.file(from, false)?;
                self.dispose(path)?;
                self.replica.put(path, &row.entry, &Bytes::File(&file, size))
            }
        }
    }

    /// Makes all names of one file lead to one inode: that of a name which was right, else of the first.
    fn join(&mut self, names: &[RelPath]) -> Result<(), StandbyError> {
        let leader = names.iter().find(|name| self.right.contains(*name)).or_else(|| names.first()).cloned();
        let Some(leader) = leader else { return Ok(()) };
        for name in names.iter().filter(|name| **name != leader) {
            let result = self.replica.link(&leader, name);
            self.note(name, result)?;
        }
        Ok(())
    }

    /// Looks at everything again, notes inodes and ctimes, and gives directories their attributes. What is not right loses its row, so that the digest differs and
    /// the primary sends it again.
    pub(super) fn verify(&mut self) -> Result<Vec<String>, StandbyError> {
        let wanted: Vec<(RelPath, Row)> = self.wanted.iter().filter_map(|(path, row)| Some((path.clone(), row.clone()?))).collect();
        for (path, row) in wanted.iter().filter(|(_, row)| !row.entry.is_dir()) {
            if !self.replica.can_make(&row.entry) {
                attrs::count(&mut self.replica.lost, "devices");
                continue;
            }
            let seen = if self.right.contains(path) {
                // Its bytes were read, or trusted, before; nothing has written to it since.
                let hash = row.entry.hash();
                self.replica.stat(path).map(|stat| stat.map(|stat| super::survey::Seen { stat, hash }))
            } else {
                self.see(path)
            };
            match seen {
                Ok(Some(seen)) if self.matches(path, row, &seen) => self.locate(path, &seen.stat)?,
                Ok(_) => {
                    self.failed.entry(path.clone()).or_insert_with(|| "it does not hold what it should".into());
                }
                Err(error) => {
                    self.failed.entry(path.clone()).or_insert_with(|| error.to_string());
                }
            }
        }
        for (path, row) in wanted.iter().rev().filter(|(_, row)| row.entry.is_dir()) {
            let result = self.replica.handle(path).and_then(|dir| {
                let stat = rfs::fstat(&dir)?;
                if !is_dir(&stat) {
                    return Err(Errno::NOTDIR);
                }
                attrs::set(dir.as_fd(), &row.entry, self.replica.ordinary, &mut self.replica.lost)?;
                rfs::fstat(&dir)
            });
            match result {
                Ok(stat) => self.locate(path, &stat)?,
                Err(error) => {
                    self.failed.entry(path.clone()).or_insert_with(|| error.to_string());
                }
            }
        }
        let mut problems = std::mem::take(&mut self.suffix.problems);
        for (path, why) in std::mem::take(&mut self.failed) {
            tracing::error!(%path, why, "a path could not be recovered; it is asked for again");
            problems.push(format!("{path} could not be recovered ({why}); it is asked for again"));
            self.manifest.forget(&path)?;
        }
        if !problems.is_empty() {
            // As in `Applier::sealed`; which txn it was is not known here.
            let checkpoint = self.manifest.position().map_err(|e| self.manifest.state_error(&e))?;
            self.manifest.forget_gone(checkpoint.lsn.next()).map_err(|e| self.manifest.state_error(&e))?;
        }
        Ok(problems)
    }

    fn locate(&mut self, path: &RelPath, stat: &rfs::Stat) -> Result<(), StandbyError> {
        self.failed.remove(path);
        self.manifest.set_local(path, Some(tree::local(stat))).map_err(|e| self.manifest.state_error(&e).into())
    }
}
