//! From what was observed at a cut to the ops of one transaction.
//!
//! The plan starts from the rows as they are, applies the renames that were seen, then compares every dirty path with what was observed and emits what is missing, performing each op on the
//! rows as it goes: after the plan the rows *are* the observed state. Renames seen ("hints") are only a better starting point: a wrong one costs bytes or another look, never correctness.
//!
//! Pure but for the rows it is given; on an error they are rolled back.

use std::collections::{BTreeMap, HashSet};

use serde_bytes::ByteBuf;
use twinbox_protocol::entry::{Entry, Kind};
use twinbox_protocol::ids::{ContentHash, Lsn};
use twinbox_protocol::ops::{Attrs, Content, Op, Seg};
use twinbox_protocol::path::RelPath;

use crate::manifest::REF_MIN;
use crate::rows::{Local, Row, RowError, Rows, perform};
use crate::view::View;

/// A rename seen in the event queue.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Hint {
    /// Old name.
    pub from: RelPath,
    /// New name.
    pub to: RelPath,
}

/// How the bytes of an observed file are at hand.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Body {
    /// Not a regular file, or not read because nothing says that it changed: the standby has this content.
    Unread,
    /// Here, whole.
    Bytes(Vec<u8>),
    /// As pieces.
    Recipe(Vec<Seg>),
    /// Read whole, and let go of for want of room: to be read again when it is sent.
    Later,
    /// Sent ahead; staged on the standby under its name.
    Staged,
    /// As changed ranges of `base`.
    Patch {
        /// What the row must hold.
        base: ContentHash,
        /// `(offset, bytes)`.
        writes: Vec<(u64, ByteBuf)>,
        /// Size of `base` when it may not be in the row yet: the standby has it staged.
        ahead: Option<u64>,
    },
}

/// A path as observed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Found {
    /// What it is.
    pub entry: Entry,
    /// What only this machine knows of it.
    pub local: Local,
    /// Number of names of its inode.
    pub nlink: u64,
    /// Its bytes.
    pub body: Body,
}

/// What looking at a dirty path gave.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Seen {
    /// Nothing is there.
    Absent,
    /// This is there.
    Present(Box<Found>),
    /// Could not be read, or is never mirrored: what the standby has stays.
    Skip,
}

/// Why there is no plan.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// Rows and observations do not fit: look at this place again, with everything below it.
    #[error("{path} must be looked at again ({why})")]
    Rescan {
        /// Where.
        path: RelPath,
        /// What did not fit.
        why: String,
    },
    /// The row store failed.
    #[error("{detail}")]
    Store {
        /// Its words.
        detail: String,
    },
}

impl From<RowError> for PlanError {
    fn from(error: RowError) -> Self {
        let why = error.to_string();
        match error {
            RowError::Store { detail } => PlanError::Store { detail },
            RowError::Missing { path } | RowError::NoParent { path } | RowError::NotEmpty { path } | RowError::WrongType { path } => {
                PlanError::Rescan { path, why }
            }
        }
    }
}

struct Planner<'a> {
    view: &'a mut View,
    seen: &'a BTreeMap<RelPath, Seen>,
    ops: Vec<Op>,
}

/// Plans the transaction `lsn`. The result may be empty: nothing to ship.
///
/// # Errors
/// [`PlanError`]; the rows are as before.
pub fn plan(view: &mut View, lsn: Lsn, seen: &BTreeMap<RelPath, Seen>, hints: &[Hint]) -> Result<Vec<Op>, PlanError> {
    view.start(lsn);
    let mut planner = Planner { view, seen, ops: vec![] };
    match planner.run(hints) {
        Ok(()) => {
            let ops = planner.ops;
            view.keep();
            Ok(ops)
        }
        Err(error) => {
            view.roll_back();
            Err(error)
        }
    }
}

impl Planner<'_> {
    fn emit(&mut self, op: Op) -> Result<(), PlanError> {
        perform(self.view, &op)?;
        self.ops.push(op);
        Ok(())
    }

    fn found(&self, path: &RelPath) -> Option<&Found> {
        match self.seen.get(path) {
            Some(Seen::Present(found)) => Some(found),
            _ => None,
        }
    }

    fn run(&mut self, hints: &[Hint]) -> Result<(), PlanError> {
        self.renames(hints)?;
        let mut present: Vec<(&RelPath, &Found)> =
            self.seen.iter().filter_map(|(p, s)| if let Seen::Present(f) = s { Some((p, &**f)) } else { None }).collect();
        let mut hidden = HashSet::new();
        for (path, _) in &present {
            if self.is_hidden(path)? {
                hidden.insert(*path);
            }
        }
        present.retain(|(path, _)| !hidden.contains(path));
        for (path, found) in present.iter().filter(|(_, f)| f.entry.is_dir()) {
            self.directory(path, found)?;
        }
        for (path, found) in present.iter().filter(|(_, f)| !f.entry.is_dir()) {
            self.file(path, found)?;
        }
        for (path, seen) in self.seen.iter().rev() {
            if *seen == Seen::Absent
                && let Some(row) = self.view.row(path)?
            {
                self.remove(path, &row)?;
            }
        }
        for (path, found) in &present {
            if let Some(row) = self.view.row(path)? {
                let attrs = Attrs::of(&found.entry);
                if found.entry.is_dir() && Attrs::of(&row.entry) != attrs {
                    self.emit(Op::SetMeta { path: (*path).clone(), attrs })?;
                }
            }
            self.view.set_local(path, Some(found.local))?;
        }
        Ok(())
    }

    /// Whether a directory on the way is not known and cannot be read: what is below it comes with it, when it can. Looking again would only find the same.
    fn is_hidden(&self, path: &RelPath) -> Result<bool, PlanError> {
        let mut at = path.parent();
        while let Some(dir) = at.filter(|d| !d.is_root()) {
            if self.view.row(&dir)?.is_some() {
                return Ok(false);
            }
            if self.seen.get(&dir) == Some(&Seen::Skip) {
                return Ok(true);
            }
            at = dir.parent();
        }
        Ok(false)
    }

    /// Renames that lead to something that cannot be read: nothing but the event says what it is, and the standby keeps what it has of it under the new name.
    fn blind(&self, hints: &[Hint]) -> Vec<bool> {
        let (mut wanted, mut blind) = (HashSet::new(), vec![false; hints.len()]);
        for (hint, blind) in hints.iter().zip(&mut blind).rev() {
            *blind = wanted.remove(&hint.to) || self.seen.get(&hint.to) == Some(&Seen::Skip);
            if *blind {
                wanted.insert(&hint.from);
            }
        }
        blind
    }

    fn renames(&mut self, hints: &[Hint]) -> Result<(), PlanError> {
        let blind = self.blind(hints);
        let inos: HashSet<u64> =
            self.seen.values().filter_map(|s| if let Seen::Present(f) = s { Some(f.local.ino) } else { None }).collect();
        // Where renames lead that were not performed, though there was something.
        let mut passed: Vec<RelPath> = vec![];
        let mut performed: Vec<&RelPath> = vec![];
        for (Hint { from, to }, blind) in hints.iter().zip(blind) {
            let row = self.view.row(from)?;
            // The capture took a moved directory's content as known under its old name: then the rename must be performed, or all of it looked at.
            let unseen = !self.seen.contains_key(to) && row.as_ref().is_some_and(|row| row.entry.is_dir());
            // What it had there, or was moved into it, would stay, where another directory is by now.
            let stays = row.as_ref().is_some_and(|row| row.entry.is_dir())
                && performed.iter().any(|other| from.is_within(other) || other.is_within(from))
                && self.seen.get(from) != Some(&Seen::Absent);
            let needed = unseen || stays || self.found(to).is_some_and(|f| f.entry.is_dir());
            let skipped = |why: &str| if needed { Err(PlanError::Rescan { path: to.clone(), why: why.into() }) } else { Ok(()) };
            // What was below a directory that was moved without its rows has none either, whatever has rows there.
            let below_passed = passed.iter().any(|other| from.is_within(other));
            let Some(row) = row.filter(|_| !below_passed) else {
                // Made since the last cut: it had no rows that anything below it could have been compared with, and is made under its new name.
                if below_passed {
                    skipped("moved here from a name that is not known")?;
                    passed.push(to.clone());
                } else if self.view.row(to)?.is_some_and(|row| row.entry.is_dir()) {
                    // Nor was what lay below the new name, in a folder that is gone, compared with anything.
                    if let Err(why) = self.make_way(to, hints)? {
                        return Err(PlanError::Rescan { path: to.clone(), why: format!("another directory had this name, {why}") });
                    }
                    passed.retain(|other| !other.is_within(to));
                }
                continue;
            };
            // It is back, or never went.
            let is_there = row.entry.is_dir() && self.found(from).is_some_and(|f| row.local.is_some_and(|l| l.ino == f.local.ino));
            // It was renamed and then removed: its entries went one by one under the new name, and its rows at the old one are nobody's.
            let has_left = match self.seen.get(from) {
                Some(Seen::Absent) => true,
                Some(Seen::Present(found)) => row.local.is_some_and(|l| l.ino != found.local.ino),
                Some(Seen::Skip) | None => false,
            };
            let is_gone = row.entry.is_dir() && has_left && self.seen.contains_key(to);
            let is_it = blind || is_gone || row.local.is_some_and(|l| inos.contains(&l.ino)) && !is_there;
            if from == to || to.is_within(from) || from.is_within(to) || !is_it {
                skipped("not what was moved here")?;
                passed.push(to.clone());
                continue;
            }
            match self.parents(to) {
                // It went with the directory it was moved into.
                Err(PlanError::Rescan { .. }) if is_gone && self.seen.get(to) == Some(&Seen::Absent) => {
                    skipped("it went with the directory it was moved into")?;
                    passed.push(to.clone());
                    continue;
                }
                done => done?,
            }
            let op = Op::Rename { from: from.clone(), to: to.clone() };
            let mut done = perform(self.view, &op);
            if matches!(done, Err(RowError::NotEmpty { .. })) && row.entry.is_dir() && !blind {
                if let Err(why) = self.make_way(to, hints)? {
                    return Err(PlanError::Rescan {
                        path: to.clone(),
                        why: format!("a directory that was not empty had this name, {why}"),
                    });
                }
                done = perform(self.view, &op);
            }
            match done {
                Ok(()) => {
                    self.ops.push(op);
                    performed.push(to);
                    passed.retain(|other| !other.is_within(to));
                    passed.iter_mut().for_each(|other| *other = other.rebase(from, to).unwrap_or_else(|| other.clone()));
                }
                Err(error @ RowError::Store { .. }) => return Err(error.into()),
                // A file's rename that does not fit is found again by content; a directory's was taken as whole by the capture.
                Err(error) if row.entry.is_dir() || needed => return Err(PlanError::Rescan { path: to.clone(), why: error.to_string() }),
                Err(_) => {}
            }
        }
        Ok(())
    }

    /// A directory was renamed to a name that another one had, so that one was empty, or gone. Removes what the rows have of it, when every name below it was looked at since (its entries went one by one, with
    /// an event each) and it was not itself renamed (two names can be exchanged); else says why it is not known where it went.
    fn make_way(&mut self, to: &RelPath, hints: &[Hint]) -> Result<Result<(), &'static str>, PlanError> {
        let Some(old) = self.view.row(to)? else { return Ok(Ok(())) };
        let below = self.view.below(to)?;
        let looked_at = |path: &RelPath| self.seen.get(path).is_some_and(|seen| *seen != Seen::Skip);
        if !below.iter().all(|(path, _)| looked_at(path)) {
            return Ok(Err("and not all below it was looked at"));
        }
        // (A number alone may be one that is used again, by a directory that was made.)
        let is_it = |hint: &&Hint| self.found(&hint.to).is_some_and(|found| old.local.is_none_or(|local| local.ino == found.local.ino));
        if hints.iter().filter(|hint| hint.to != *to).any(|hint| is_it(&hint)) {
            return Ok(Err("and may be elsewhere"));
        }
        for (path, _) in below.into_iter().rev() {
            self.emit(Op::Remove { path })?;
        }
        self.emit(Op::Remove { path: to.clone() })?;
        Ok(Ok(()))
    }

    /// Makes the directories above `path` that are observed but not yet known.
    fn parents(&mut self, path: &RelPath) -> Result<(), PlanError> {
        let mut missing = vec![];
        let mut at = path.parent();
        while let Some(dir) = at.filter(|d| !d.is_root()) {
            if self.view.row(&dir)?.is_some_and(|row| row.entry.is_dir()) {
                break;
            }
            at = dir.parent();
            missing.push(dir);
        }
        for dir in missing.into_iter().rev() {
            match self.found(&dir).filter(|f| f.entry.is_dir()).cloned() {
                Some(found) => self.directory(&dir, &found)?,
                None => return Err(PlanError::Rescan { path: dir, why: "a directory on the way is not known".into() }),
            }
        }
        Ok(())
    }

    fn directory(&mut self, path: &RelPath, found: &Found) -> Result<(), PlanError> {
        let row = self.view.row(path)?;
        if row.as_ref().is_some_and(|row| row.entry.is_dir()) {
            return Ok(());
        }
        if !path.is_root() {
            self.parents(path)?;
        }
        if row.is_some() {
            self.emit(Op::Remove { path: path.clone() })?;
        }
        self.emit(Op::Make { path: path.clone(), entry: found.entry.clone() })
    }

    fn remove(&mut self, path: &RelPath, row: &Row) -> Result<(), PlanError> {
        if row.entry.is_dir() {
            for (below, _) in self.view.below(path)?.into_iter().rev() {
                if self.found(&below).is_some() {
                    return Err(PlanError::Rescan { path: path.clone(), why: "gone, but something below it was seen".into() });
                }
                self.emit(Op::Remove { path: below })?;
            }
        }
        self.emit(Op::Remove { path: path.clone() })
    }

    fn file(&mut self, path: &RelPath, found: &Found) -> Result<(), PlanError> {
        let mut row = self.view.row(path)?;
        if let Some(dir) = row.as_ref().filter(|row| row.entry.is_dir()) {
            let dir = dir.clone();
            self.remove(path, &dir)?;
            row = None;
        }
        self.parents(path)?;
        if !self.settled(path, found, row.as_ref())? {
            self.content(path, found, row.as_ref())?;
        }
        let attrs = Attrs::of(&found.entry);
        if self.view.row(path)?.is_some_and(|row| Attrs::of(&row.entry) != attrs) {
            self.emit(Op::SetMeta { path: path.clone(), attrs })?;
        }
        Ok(())
    }

    /// Whether the row already holds this content under the right inode, after a link or rename if need be.
    fn settled(&mut self, path: &RelPath, found: &Found, row: Option<&Row>) -> Result<bool, PlanError> {
        let ino = found.local.ino;
        let same = row.is_some_and(|row| row.entry.kind == found.entry.kind);
        let same_ino = row.and_then(|row| row.local).is_some_and(|l| l.ino == ino);
        if same && same_ino {
            return Ok(true);
        }
        if found.nlink == 1 {
            self.is_of_its_time(path, found)?;
        }
        if found.nlink > 1
            && let Some(leader) = self.leader(path, found)?
        {
            self.emit(Op::Link { from: leader, to: path.clone() })?;
            self.view.set_local(path, Some(found.local))?;
            return Ok(true);
        }
        if same {
            // Another inode with the same content. On the standby the old one may be shared with other names: then part them.
            let shared = match (row.and_then(|row| row.local), found.entry.hash()) {
                (Some(local), _) => self.view.by_ino(local.ino)?.iter().any(|other| other != path),
                // The row was pulled: which names share an inode there is not known, but they have the same content.
                (None, Some(hash)) => self.view.paths_with(hash)?.iter().any(|other| other != path),
                (None, None) => false,
            };
            if !shared {
                // At once, so that the other names of this inode find it.
                self.view.set_local(path, Some(found.local))?;
            }
            return Ok(!shared);
        }
        if row.is_none() && found.entry.hash().is_some() && found.nlink == 1 {
            for source in self.view.by_ino(ino)? {
                let kept = self.view.row(&source)?.is_some_and(|row| row.entry.kind == found.entry.kind);
                if kept && self.seen.get(&source) == Some(&Seen::Absent) {
                    self.emit(Op::Rename { from: source, to: path.clone() })?;
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    /// Refuses what was seen of an inode before it got another name that is committed already: the two would stand apart on the standby.
    fn is_of_its_time(&self, path: &RelPath, found: &Found) -> Result<(), PlanError> {
        for other in self.view.by_ino(found.local.ino)? {
            let later = self.view.row(&other)?.and_then(|row| row.local).is_some_and(|local| local.ctime > found.local.ctime);
            if other != *path && later && self.seen.get(&other) != Some(&Seen::Absent) {
                return Err(PlanError::Rescan { path: path.clone(), why: "its inode was seen later under another name".into() });
            }
        }
        Ok(())
    }

    /// Another name of the same inode whose row is already as it should be.
    fn leader(&self, path: &RelPath, found: &Found) -> Result<Option<RelPath>, PlanError> {
        for other in self.view.by_ino(found.local.ino)? {
            let here = match self.seen.get(&other) {
                None => true,
                Some(Seen::Present(f)) => f.local.ino == found.local.ino,
                Some(_) => false,
            };
            if other != *path && here && self.view.row(&other)?.is_some_and(|row| row.entry.kind == found.entry.kind) {
                return Ok(Some(other));
            }
        }
        Ok(None)
    }

    fn content(&mut self, path: &RelPath, found: &Found, row: Option<&Row>) -> Result<(), PlanError> {
        let Some(hash) = found.entry.hash() else {
            if row.is_some() {
                self.emit(Op::Remove { path: path.clone() })?;
            }
            self.emit(Op::Make { path: path.clone(), entry: found.entry.clone() })?;
            return self.relink(path, found);
        };
        let (path, entry) = (path.clone(), found.entry.clone());
        let known = |view: &View| Ok::<_, PlanError>(entry.size() >= REF_MIN && view.has_content(hash)?);
        let content = match &found.body {
            Body::Patch { base, writes, ahead } => {
                let there = row.and_then(|row| row.entry.hash()) == Some(*base);
                let (true, Some(size)) = (found.nlink == 1, ahead.or(there.then_some(0))) else {
                    return Err(PlanError::Rescan { path, why: "its earlier content is not the one compared with".into() });
                };
                if !there {
                    let staged = Entry { kind: Kind::File { size, hash: *base }, ..entry.clone() };
                    self.emit(Op::Put { path: path.clone(), entry: staged, content: Content::Staged })?;
                    self.view.set_local(&path, Some(found.local))?;
                }
                return self.emit(Op::Patch { path, entry, base: *base, writes: writes.clone() });
            }
            Body::Unread => Content::Known,
            Body::Staged => Content::Staged,
            Body::Bytes(_) | Body::Recipe(_) | Body::Later if known(self.view)? => Content::Known,
            Body::Later => return Err(PlanError::Rescan { path, why: "its content is to be read again".into() }),
            Body::Bytes(bytes) => Content::Inline(ByteBuf::from(bytes.clone())),
            Body::Recipe(segs) => Content::Recipe(segs.clone()),
        };
        self.emit(Op::Put { path: path.clone(), entry, content })?;
        self.relink(&path, found)
    }

    /// `path` is a new inode on the standby: its other names follow it there.
    fn relink(&mut self, path: &RelPath, found: &Found) -> Result<(), PlanError> {
        self.view.set_local(path, Some(found.local))?;
        if found.nlink < 2 {
            return Ok(());
        }
        for other in self.view.by_ino(found.local.ino)? {
            let still = match self.seen.get(&other) {
                // A name nobody looked at and that has something else is of a file that had this inode number before.
                None => self.view.row(&other)?.is_some_and(|row| row.entry.kind == found.entry.kind),
                Some(Seen::Present(f)) => f.local.ino == found.local.ino,
                Some(_) => false,
            };
            if other != *path && still {
                self.emit(Op::Link { from: path.clone(), to: other })?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
