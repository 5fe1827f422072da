//! Looking at the disk: what is right already, and where the contents that are needed can be had.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{self as rfs, Mode, Stat};
use rustix::io::Errno;
use twinbox_protocol::entry::Kind;
use twinbox_protocol::ids::{ContentHash, Lsn};
use twinbox_protocol::path::RelPath;
use twinbox_resync::rows::{Row, Rows};

use super::Work;
use super::fold::Patch;
use crate::standby::copy;
use crate::standby::error::StandbyError;
use crate::standby::replica::{is_dir, same_type};
use crate::standby::staging::Finished;
use crate::tree;

/// A path as it is on disk.
pub(super) struct Seen {
    pub(super) stat: Stat,
    /// Of a regular file that could be read.
    pub(super) hash: Option<ContentHash>,
}

/// Where a needed content comes from.
pub(super) enum Source {
    /// The redo log.
    Log,
    /// Staging.
    Staged,
    /// A file that stays as it is.
    Path(RelPath),
}

/// What must be done.
#[derive(Default)]
pub(super) struct Plan {
    pub(super) sources: BTreeMap<ContentHash, Source>,
    /// Names of one file: the first is put if need be, the others are linked to it.
    pub(super) sets: BTreeMap<u64, Vec<RelPath>>,
}

pub(super) fn full(error: Errno) -> bool {
    matches!(error, Errno::NOSPC | Errno::DQUOT)
}

fn io(error: std::io::Error) -> StandbyError {
    StandbyError::io("recovering the replica", error)
}

/// Whether every byte of a file is 0, or that which one of these has at its place.
fn brings_nothing(file: &File, known: [&File; 2]) -> std::io::Result<bool> {
    let mut at = 0;
    let mut bytes = [0; 16 * 1024];
    let mut theirs = [bytes; 2];
    loop {
        let got = file.read_at(&mut bytes, at)?;
        if got == 0 {
            return Ok(true);
        }
        for (known, theirs) in known.iter().zip(&mut theirs) {
            theirs.fill(0);
            let mut have = 0;
            while have < got {
                match known.read_at(&mut theirs[have..got], at + have as u64)? {
                    0 => break,
                    more => have += more,
                }
            }
        }
        let known_byte = |at: usize| bytes[at] == 0 || theirs.iter().any(|theirs| theirs[at] == bytes[at]);
        if !(0..got).all(known_byte) {
            return Ok(false);
        }
        at += got as u64;
    }
}

impl Work<'_> {
    /// Moves what a rename of the log would still find at its old name: cheaper than copying, and checked like everything else afterwards.
    pub(super) fn redo_renames(&mut self) -> Result<(), StandbyError> {
        for moved in std::mem::take(&mut self.suffix.moved) {
            if moved.dir {
                // What the log removed before may still be in it, and move along.
                let below: Vec<RelPath> = self.before.keys().filter_map(|path| path.rebase(&moved.from, &moved.to)).collect();
                for path in below {
                    if !self.before.contains_key(&path) {
                        let row = self.manifest.row(&path)?;
                        self.before.insert(path, row);
                    }
                }
            }
            let from = self.replica.stat(&moved.from).ok().flatten();
            let to = self.replica.stat(&moved.to).ok().flatten();
            if to.is_some() || from.is_none_or(|stat| Some(stat.st_ino) != moved.ino) {
                continue;
            }
            let mut above = vec![];
            let mut at = moved.to.parent();
            while let Some(dir) = at.filter(|dir| self.replica.stat(dir).is_ok_and(|stat| stat.is_none())) {
                at = dir.parent();
                above.push(dir);
            }
            for dir in above.iter().rev() {
                if let Ok(place) = self.replica.place_to_change(dir) {
                    let _ = rfs::mkdirat(&place.dir, place.name.as_slice(), Mode::from_raw_mode(0o700));
                }
            }
            if let Err(error) = self.replica.rename(&moved.from, &moved.to) {
                tracing::debug!(%error, from = %moved.from, "not renamed; its contents are compared instead");
            }
        }
        Ok(())
    }

    /// Sees every path, hashing files that cannot be trusted by inode and ctime.
    pub(super) fn look(&mut self) -> Result<(), StandbyError> {
        let paths: Vec<RelPath> = self.wanted.keys().cloned().collect();
        for path in paths {
            match self.see(&path) {
                Ok(Some(seen)) => {
                    self.seen.insert(path, seen);
                }
                Ok(None) => {}
                Err(error) => {
                    self.failed.insert(path, error.to_string());
                }
            }
        }
        Ok(())
    }

    pub(super) fn see(&mut self, path: &RelPath) -> Result<Option<Seen>, Errno> {
        let Some(stat) = self.replica.stat(path)? else { return Ok(None) };
        if rfs::FileType::from_raw_mode(stat.st_mode) != rfs::FileType::RegularFile {
            return Ok(Some(Seen { stat, hash: None }));
        }
        let local = Some(tree::local(&stat));
        let rows = [self.before.get(path), self.wanted.get(path)];
        let trusted = rows.into_iter().flatten().flatten().find(|row| row.local == local && row.entry.size() == stat.st_size as u64);
        if let Some(row) = trusted
            && !self.suffix.patched.contains(&stat.st_ino)
        {
            return Ok(Some(Seen { stat, hash: row.entry.hash() }));
        }
        let hash = self.replica.file(path, false).ok().and_then(|file| copy::hash_on_disk(&file).ok());
        Ok(Some(Seen { stat, hash }))
    }

    /// Whether the disk has what the row says, content and type; not the attributes.
    pub(super) fn matches(&self, path: &RelPath, row: &Row, seen: &Seen) -> bool {
        if !same_type(&seen.stat, &row.entry) {
            return false;
        }
        match &row.entry.kind {
            Kind::File { size, hash } => seen.stat.st_size as u64 == *size && seen.hash == Some(*hash),
            Kind::Symlink { target } => {
                let link = path.split().and_then(|(dir, name)| {
                    let dir = self.replica.root.dir(dir).ok()?;
                    rfs::readlinkat(&dir, name, vec![]).ok()
                });
                link.is_some_and(|link| link.as_bytes() == target.as_slice())
            }
            Kind::Dir | Kind::Fifo | Kind::Device { .. } => true,
        }
    }

    /// Decides which files stay, and finds a source for every content that must be written.
    pub(super) fn plan(&mut self) -> Result<Plan, StandbyError> {
        let mut plan = Plan::default();
        let mut claimed: BTreeMap<u64, (Option<u64>, RelPath)> = BTreeMap::new();
        let mut right = BTreeSet::new();
        for (path, row) in &self.wanted {
            let Some(row) = row.as_ref().filter(|row| !row.entry.is_dir()) else { continue };
            let set = row.local.map(|local| local.ino);
            if let Some(set) = set {
                plan.sets.entry(set).or_default().push(path.clone());
            }
            let Some(seen) = self.seen.get(path).filter(|seen| self.matches(path, row, seen)) else { continue };
            let ino = seen.stat.st_ino;
            // An inode belongs to one file of the rows: another one with equal bytes must get its own.
            let claim = claimed.entry(ino).or_insert_with(|| (set, path.clone()));
            let mine = claim.1 == *path || (claim.0.is_some() && claim.0 == set);
            let foreign = seen.stat.st_nlink > 1
                && set != Some(ino)
                && !self.manifest.by_ino(ino).map_err(|e| self.manifest.state_error(&e))?.is_empty();
            if mine && !foreign {
                right.insert(path.clone());
            }
        }
        plan.sets.retain(|_, names| names.len() > 1);
        self.right = right;
        let mut needed = BTreeSet::new();
        for (path, row) in &self.wanted {
            if let Some(Kind::File { hash, .. }) = row.as_ref().map(|row| &row.entry.kind)
                && !self.right.contains(path)
            {
                needed.insert(*hash);
            }
        }
        for hash in needed {
            match self.source(hash)? {
                Some(source) => {
                    plan.sources.insert(hash, source);
                }
                None => tracing::error!(%hash, "a content of the redo log cannot be rebuilt"),
            }
        }
        Ok(plan)
    }

    fn source(&mut self, hash: ContentHash) -> Result<Option<Source>, StandbyError> {
        if self.suffix.inline.contains_key(&hash) {
            return Ok(Some(Source::Log));
        }
        if self.staging.size(hash).is_some() {
            return Ok(Some(Source::Staged));
        }
        if let Some(path) = self.right.iter().find(|path| self.seen.get(*path).is_some_and(|seen| seen.hash == Some(hash))) {
            return Ok(Some(Source::Path(path.clone())));
        }
        if let Some(path) = self.untouched(hash)? {
            return Ok(Some(Source::Path(path)));
        }
        // A file that will itself change: saved first, durably, so that a crash in the middle of this finds it again.
        let leaving = self.seen.iter().find(|(_, seen)| seen.hash == Some(hash)).map(|(path, _)| path.clone());
        if let Some(path) = leaving
            && self.save(&path, hash)?
        {
            return Ok(Some(Source::Staged));
        }
        Ok(self.rebuild(hash)?.then_some(Source::Staged))
    }

    /// A path the log does not touch that really holds the content.
    fn untouched(&mut self, hash: ContentHash) -> Result<Option<RelPath>, StandbyError> {
        for path in self.manifest.by_hash(hash).map_err(|e| self.manifest.state_error(&e))? {
            if !self.wanted.contains_key(&path)
                && let Ok(file) = self.replica.file(&path, false)
                && copy::hash_on_disk(&file).is_ok_and(|found| found == hash)
            {
                return Ok(Some(path));
            }
        }
        Ok(None)
    }

    fn save(&mut self, path: &RelPath, hash: ContentHash) -> Result<bool, StandbyError> {
        let Ok(file) = self.replica.file(path, false) else { return Ok(false) };
        let size = file.metadata().map_err(io)?.len();
        let mut part = self.staging.create().map_err(io)?;
        part.copy(&file, 0, size).map_err(io)?;
        let saved = part.finish(hash, size).map_err(io)? == Finished::Staged;
        if saved {
            self.staging.pin(hash, Lsn(u64::MAX));
        }
        Ok(saved)
    }

    /// The patches that lead to `last`, that one first, with each base and how many patches lead from it.
    fn chain(&self, last: usize) -> (Vec<usize>, Vec<(usize, ContentHash)>) {
        let patches = &self.suffix.patches;
        let mut chain = vec![last];
        let mut bases: Vec<(usize, ContentHash)> = vec![];
        loop {
            let first = chain[chain.len() - 1];
            bases.push((chain.len(), patches[first].base));
            match patches[..first].iter().rposition(|patch| patch.new == patches[first].base) {
                Some(before) => chain.push(before),
                None => return (chain, bases),
            }
        }
    }

    /// Whether the file at `path` is one whose patching was interrupted: with all ranges of its patches written it is what they make of it, or there is nothing in it that was not in the
    /// content they began with or in what they make of it (some of which a power cut took).
    pub(super) fn half_patched(&mut self, path: &RelPath, ino: u64) -> Result<bool, StandbyError> {
        let patches = &self.suffix.patches;
        let mine = |patch: &Patch| patch.ino.map_or(patch.path == *path, |of| of == ino);
        let lasts = patches.iter().enumerate().filter(|(_, patch)| mine(patch));
        let lasts = lasts.filter(|(at, last)| !patches[at + 1..].iter().any(|next| mine(next) && next.base == last.new));
        let lasts: Vec<(usize, ContentHash)> = lasts.map(|(at, last)| (at, last.new)).collect();
        for (last, new) in lasts {
            let Ok(file) = self.replica.file(path, false) else { return Ok(false) };
            let built = tempfile::tempfile_in(self.staging.dir()).map_err(io)?;
            self.patch(&file, &self.chain(last).0, &built)?;
            if copy::hash(&built).map_err(io)? == new {
                return Ok(true);
            }
            let (chain, bases) = self.chain(last);
            let first = bases.last().map(|(_, base)| *base);
            if let Some(first) = first.map(|first| self.whole(first)).transpose()?.flatten() {
                built.set_len(0).map_err(io)?;
                self.patch(&first, &chain, &built)?;
                if brings_nothing(&file, [&first, &built]).map_err(io)? {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    /// Builds the result of a chain of patches beside the replica.
    fn rebuild(&mut self, hash: ContentHash) -> Result<bool, StandbyError> {
        let patches = &self.suffix.patches;
        let Some(last) = patches.iter().rposition(|patch| patch.new == hash) else { return Ok(false) };
        let (chain, bases) = self.chain(last);
        let inos: BTreeSet<u64> = chain.iter().filter_map(|at| patches[*at].ino).collect();
        let size = patches[last].size;
        // The nearest known point of the chain first; then the file itself, wherever the patching stopped: writing all ranges again converges.
        for (steps, base) in bases {
            if let Some(file) = self.whole(base)?
                && self.build_on(&file, &chain[..steps], hash, size)?
            {
                return Ok(true);
            }
        }
        let torn: Vec<(RelPath, u64)> = self
            .seen
            .iter()
            .filter(|(_, seen)| inos.contains(&seen.stat.st_ino) && !is_dir(&seen.stat))
            .map(|(path, seen)| (path.clone(), seen.stat.st_ino))
            .collect();
        for (path, ino) in torn {
            if let Ok(file) = self.replica.file(&path, false)
                && self.build_on(&file, &chain, hash, size)?
            {
                self.rebuilt.insert(ino);
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// A file that holds the whole of a content.
    fn whole(&mut self, hash: ContentHash) -> Result<Option<File>, StandbyError> {
        if let Some(stored) = self.suffix.inline.get(&hash) {
            let file = tempfile::tempfile_in(self.staging.dir()).map_err(io)?;
            file.write_all_at(&self.suffix.read(*stored)?, 0).map_err(io)?;
            return Ok(Some(file));
        }
        if self.staging.size(hash).is_some() {
            return self.staging.object(hash).map(Some).map_err(io);
        }
        let path = self.seen.iter().find(|(_, seen)| seen.hash == Some(hash)).map(|(path, _)| path.clone());
        let path = match path {
            Some(path) => Some(path),
            None => self.untouched(hash)?,
        };
        Ok(path.and_then(|path| self.replica.file(&path, false).ok()))
    }

    /// Copies `base` to `to` and applies patches (`chain`, last first).
    fn patch(&self, base: &File, chain: &[usize], to: &File) -> Result<(), StandbyError> {
        let len = base.metadata().map_err(io)?.len();
        copy::whole(base.as_fd(), to.as_fd(), len).map_err(|e| StandbyError::io("rebuilding a patched file", e))?;
        for at in chain.iter().rev() {
            let patch = &self.suffix.patches[*at];
            for (offset, stored) in &patch.writes {
                to.write_all_at(&self.suffix.read(*stored)?, *offset).map_err(io)?;
            }
            to.set_len(patch.size).map_err(io)?;
        }
        Ok(())
    }

    /// Applies patches (`chain`, last first) to a copy; stages it when it has the name it must have.
    fn build_on(&mut self, base: &File, chain: &[usize], hash: ContentHash, size: u64) -> Result<bool, StandbyError> {
        let mut part = self.staging.create().map_err(io)?;
        self.patch(base, chain, &part.file)?;
        part.reread().map_err(io)?;
        let built = part.finish(hash, size).map_err(io)? == Finished::Staged;
        if built {
            self.staging.pin(hash, Lsn(u64::MAX));
        }
        Ok(built)
    }
}
