//! One op on replica and rows.
//!
//! Rows first (an op that does not fit changes nothing on disk), then the disk; every step on disk can be repeated, so a full disk is waited out. Whatever is about to be
//! replaced or removed and is not what the manifest says goes to rescue. An op the disk refuses for another reason is *quarantined*: the path's row is set to what
//! the disk really holds, so that the digest differs from the primary's, which then compares all rows and sends what is missing; the txn's removals are not told to a healing primary.

use std::fs::File;
use std::time::Duration;

use rustix::fs::Stat;
use rustix::io::Errno;
use serde_bytes::ByteBuf;
use twinbox_protocol::entry::{Entry, Kind};
use twinbox_protocol::ids::{ContentHash, Lsn};
use twinbox_protocol::ops::{Content, Op};
use twinbox_protocol::path::RelPath;
use twinbox_resync::rows::{self, Row, Rows};

use super::applier::{Applier, RETRY_EVERY};
use super::attrs;
use super::copy;
use super::error::{OpError, StandbyError};
use super::patch::{self, Base};
use super::replica::{Bytes, is_dir, same_type};
use super::rescue::Why;
use crate::tree;

/// The rows an op starts from.
struct Before {
    at: Option<Row>,
    from: Option<Row>,
    lsn: Lsn,
    /// A patch has begun to write: the file is neither old nor new.
    begun: bool,
}

pub(super) fn at(path: &RelPath) -> impl Fn(Errno) -> OpError + '_ {
    move |errno| OpError::Sys(path.clone(), errno)
}

fn io_at(path: &RelPath) -> impl Fn(std::io::Error) -> OpError + '_ {
    move |error| OpError::Sys(path.clone(), Errno::from_io_error(&error).unwrap_or(Errno::IO))
}

impl Applier {
    /// Performs an op; only what ends all work is an error.
    pub(super) fn op(&mut self, op: &Op, lsn: Lsn) -> Result<(), StandbyError> {
        let (path, why) = match self.try_op(op, lsn) {
            Ok(()) => return Ok(()),
            Err(OpError::Fatal(error)) => return Err(error),
            Err(OpError::Rows(error)) => {
                self.trouble.push(error.to_string());
                return Ok(());
            }
            Err(OpError::Sys(path, errno)) => (path, errno.to_string()),
            Err(OpError::Content(path)) => (path, "its content cannot be had here".to_owned()),
        };
        tracing::error!(%path, lsn = lsn.0, why, "an op could not be applied; the path is asked for again");
        self.trouble.push(format!("{path}: {why}"));
        self.quarantine(op.path())?;
        Ok(())
    }

    fn try_op(&mut self, op: &Op, lsn: Lsn) -> Result<(), OpError> {
        self.serve()?;
        let from = match op {
            Op::Rename { from, .. } | Op::Link { from, .. } => self.manifest.row(from)?,
            _ => None,
        };
        let mut before = Before { at: self.manifest.row(op.path())?, from, lsn, begun: false };
        rows::perform(&mut self.manifest, op)?;
        let mut told = false;
        loop {
            match self.on_disk(op, &mut before) {
                Err(OpError::Sys(path, errno @ (Errno::NOSPC | Errno::DQUOT))) => {
                    let error = StandbyError::io(
                        format!("standby disk is full, waiting for room at {}", self.replica.root.path().display()),
                        errno,
                    );
                    if !told {
                        tracing::error!(%path, %errno, "no room in the replica; trying again every second");
                        self.shared.problem(error.to_string());
                        told = true;
                    }
                    self.pause(RETRY_EVERY, &error)?;
                }
                // Of this process or machine, not of the path: it passes.
                Err(OpError::Sys(path, errno @ (Errno::MFILE | Errno::NFILE | Errno::NOMEM))) => {
                    let error =
                        StandbyError::io("the standby is short of file descriptors or memory, raise its limits (LimitNOFILE=)", errno);
                    if !told {
                        tracing::error!(%path, %errno, "no descriptors or memory; trying again every second");
                        self.shared.problem(error.to_string());
                        told = true;
                    }
                    self.pause(RETRY_EVERY, &error)?;
                }
                Err(OpError::Sys(_, Errno::ROFS)) => {
                    let what = format!("the replica's file system {} is mounted read-only", self.replica.root.path().display());
                    return Err(OpError::Fatal(StandbyError::io(what, Errno::ROFS)));
                }
                other => return other,
            }
        }
    }

    fn on_disk(&mut self, op: &Op, before: &mut Before) -> Result<(), OpError> {
        match op {
            Op::Put { path, entry, content } => {
                let shared = self.displace(path, before.at.as_ref(), entry.hash())?;
                match content {
                    Content::Inline(bytes) => self.put(path, entry, &Bytes::Here(bytes))?,
                    Content::Staged => {
                        let hash = entry.hash().unwrap_or(ContentHash([0; 32]));
                        let file = self.staging.object(hash).map_err(|_| OpError::Content(path.clone()))?;
                        self.put(path, entry, &Bytes::File(&file, entry.size()))?;
                    }
                    Content::Known | Content::Recipe(_) => return Err(OpError::Content(path.clone())),
                }
                self.refresh(shared)
            }
            Op::Patch { path, entry, base, writes } => self.patch(path, entry, *base, writes, before),
            Op::Make { path, entry } => self.make(path, entry, before),
            Op::Rename { from, to } => self.rename(from, to, before),
            Op::Link { from, to } => self.link(from, to, before),
            Op::Remove { path } => {
                let stat = self.replica.stat(path).map_err(at(path))?;
                if stat.is_some_and(|s| is_dir(&s)) && before.at.as_ref().is_some_and(|r| r.entry.is_dir()) {
                    return match self.replica.remove(path) {
                        Err(Errno::NOTEMPTY | Errno::EXIST) => self.rescue(path, Why::Drift),
                        other => other.map_err(at(path)),
                    };
                }
                let shared = self.displace(path, before.at.as_ref(), None)?;
                self.replica.remove(path).map_err(at(path))?;
                self.refresh(shared)
            }
            Op::SetMeta { path, .. } => self.set_meta(path, before),
        }
    }

    pub(super) fn put(&mut self, path: &RelPath, entry: &Entry, bytes: &Bytes<'_>) -> Result<(), OpError> {
        self.replica.put(path, entry, bytes).map_err(at(path))?;
        self.files += 1;
        self.landed(path)
    }

    /// Notes what a path that was just made or changed looks like here.
    pub(super) fn landed(&mut self, path: &RelPath) -> Result<(), OpError> {
        let Some(stat) = self.replica.stat(path).map_err(at(path))? else { return Ok(()) };
        self.set_local(path, &stat)?;
        self.refresh((stat.st_nlink > 1 && !is_dir(&stat)).then_some(stat.st_ino))
    }

    fn set_local(&mut self, path: &RelPath, stat: &Stat) -> Result<(), OpError> {
        let done = self.manifest.set_local(path, Some(tree::local(stat)));
        done.map_err(|e| OpError::Fatal(self.manifest.state_error(&e).into()))
    }

    /// An inode changed: so did the ctime seen through its other names.
    fn refresh(&mut self, ino: Option<u64>) -> Result<(), OpError> {
        let Some(ino) = ino else { return Ok(()) };
        let names = self.manifest.by_ino(ino).map_err(|e| OpError::Fatal(self.manifest.state_error(&e).into()))?;
        for name in names {
            if let Some(stat) = self.replica.stat(&name).map_err(at(&name))?
                && stat.st_ino == ino
            {
                self.set_local(&name, &stat)?;
            }
        }
        Ok(())
    }

    /// Whether what is on disk is what the row says, by inode and ctime, or else by its bytes.
    fn is_ours(&mut self, path: &RelPath, row: Option<&Row>, stat: &Stat) -> Result<bool, OpError> {
        let Some(row) = row else { return Ok(false) };
        if !same_type(stat, &row.entry) {
            return Ok(false);
        }
        if is_dir(stat) || row.local == Some(tree::local(stat)) {
            return Ok(true);
        }
        match row.entry.kind {
            Kind::File { size, hash } => Ok(size == stat.st_size as u64 && self.hash(path)? == hash),
            _ => Ok(true),
        }
    }

    pub(super) fn hash(&mut self, path: &RelPath) -> Result<ContentHash, OpError> {
        let file = self.replica.file(path, false).map_err(at(path))?;
        copy::hash(&file).map_err(io_at(path))
    }

    /// What is at `path` is about to be replaced by the content `new`, or to go. Content that nobody else has goes to rescue. Gives the inode if it has other names.
    fn displace(&mut self, path: &RelPath, row: Option<&Row>, new: Option<ContentHash>) -> Result<Option<u64>, OpError> {
        let Some(stat) = self.replica.stat(path).map_err(at(path))? else { return Ok(None) };
        let others = (stat.st_nlink > 1 && !is_dir(&stat)).then_some(stat.st_ino);
        if self.is_ours(path, row, &stat)? && !is_dir(&stat) {
            if self.adopting && (new.is_none() || row.and_then(|r| r.entry.hash()) != new) {
                self.rescue(path, Why::Adopt)?;
            }
            return Ok(others);
        }
        if new.is_some() && !is_dir(&stat) && self.hash(path).is_ok_and(|hash| Some(hash) == new) {
            return Ok(others);
        }
        self.rescue(path, if self.adopting { Why::Adopt } else { Why::Drift })?;
        Ok(others)
    }

    fn rescue(&mut self, path: &RelPath, why: Why) -> Result<(), OpError> {
        let kept = self.rescue.take(&mut self.replica, path, why).map_err(at(path))?;
        self.rescued_to(&kept, why);
        Ok(())
    }

    fn rescued_to(&mut self, kept: &std::path::Path, why: Why) {
        self.rescued += 1;
        if why == Why::Drift {
            tracing::warn!("a file in the replica was changed by somebody else; it is kept in rescue");
            let message = format!("a file in the replica was changed on the standby by somebody else; it is kept as {}", kept.display());
            self.shared.problem(message);
        }
    }

    fn make(&mut self, path: &RelPath, entry: &Entry, before: &Before) -> Result<(), OpError> {
        let mut shared = None;
        if entry.is_dir() {
            if let Some(stat) = self.replica.stat(path).map_err(at(path))?
                && !is_dir(&stat)
            {
                shared = self.displace(path, before.at.as_ref(), None)?;
                self.replica.remove(path).map_err(at(path))?;
            }
        } else {
            shared = self.displace(path, before.at.as_ref(), None)?;
            if !self.replica.can_make(entry) {
                attrs::count(&mut self.replica.lost, "devices");
                return self.replica.remove(path).map_err(at(path));
            }
        }
        self.replica.make(path, entry).map_err(at(path))?;
        self.landed(path)?;
        self.refresh(shared)
    }

    fn rename(&mut self, from: &RelPath, to: &RelPath, before: &Before) -> Result<(), OpError> {
        let Some(row) = before.from.clone() else { return Ok(()) };
        let target = self.replica.stat(to).map_err(at(to))?;
        let Some(stat) = self.replica.stat(from).map_err(at(from))? else {
            if !self.replica.can_make(&row.entry) {
                return Ok(());
            }
            // Tried again after it was done, or removed here by somebody else.
            let done = target.is_some_and(|t| row.local.is_some_and(|l| l.ino == t.st_ino));
            return if done { self.landed(to) } else { self.missing(to, &row.entry, before) };
        };
        if !self.is_ours(from, Some(&row), &stat)? {
            self.rescue(from, Why::Drift)?;
            return self.missing(to, &row.entry, before);
        }
        let mut shared = None;
        let same = target.is_some_and(|t| (t.st_dev, t.st_ino) == (stat.st_dev, stat.st_ino));
        if target.is_some_and(|t| !is_dir(&t) || !is_dir(&stat)) && !same {
            shared = self.displace(to, before.at.as_ref(), row.entry.hash())?;
        }
        match self.replica.rename(from, to) {
            Err(Errno::NOTEMPTY | Errno::EXIST) => {
                self.rescue(to, Why::Drift)?;
                self.replica.rename(from, to).map_err(at(to))?;
            }
            other => other.map_err(at(to))?,
        }
        self.landed(to)?;
        self.refresh(shared)
    }

    /// What should have been moved or linked to `path` is not here any more: had again by its content, or by what the entry says.
    fn missing(&mut self, path: &RelPath, entry: &Entry, before: &Before) -> Result<(), OpError> {
        self.displace(path, before.at.as_ref(), entry.hash())?;
        match entry.kind {
            Kind::File { .. } => self.heal(path, entry, before.lsn),
            Kind::Dir => Err(OpError::Sys(path.clone(), Errno::NOENT)),
            _ => {
                self.replica.make(path, entry).map_err(at(path))?;
                self.landed(path)
            }
        }
    }

    fn link(&mut self, from: &RelPath, to: &RelPath, before: &Before) -> Result<(), OpError> {
        let Some(row) = before.from.clone() else { return Ok(()) };
        let Some(stat) = self.replica.stat(from).map_err(at(from))? else {
            return if self.replica.can_make(&row.entry) { self.missing(to, &row.entry, before) } else { Ok(()) };
        };
        if !self.is_ours(from, Some(&row), &stat)? {
            return self.missing(to, &row.entry, before);
        }
        let target = self.replica.stat(to).map_err(at(to))?;
        let mut shared = None;
        if target.is_some_and(|t| (t.st_dev, t.st_ino) != (stat.st_dev, stat.st_ino)) {
            shared = self.displace(to, before.at.as_ref(), row.entry.hash())?;
        }
        match self.replica.link(from, to) {
            // Links may be forbidden or used up: a copy keeps the bytes, the loss is counted.
            Err(Errno::PERM | Errno::MLINK | Errno::OPNOTSUPP | Errno::XDEV) if row.entry.hash().is_some() => {
                attrs::count(&mut self.replica.lost, "links");
                let file = self.replica.file(from, false).map_err(at(from))?;
                self.put(to, &row.entry, &Bytes::File(&file, row.entry.size()))?;
            }
            other => {
                other.map_err(at(to))?;
                self.landed(to)?;
            }
        }
        self.refresh(shared)
    }

    fn set_meta(&mut self, path: &RelPath, before: &Before) -> Result<(), OpError> {
        let (Some(row), Some(now)) = (&before.at, self.manifest.row(path)?) else { return Ok(()) };
        let Some(stat) = self.replica.stat(path).map_err(at(path))? else {
            return if self.replica.can_make(&row.entry) { self.missing(path, &now.entry, before) } else { Ok(()) };
        };
        if !same_type(&stat, &row.entry) {
            return self.missing(path, &now.entry, before);
        }
        // A file somebody changed stays known as changed: its new ctime is not taken for ours.
        let ours = is_dir(&stat) || row.local == Some(tree::local(&stat));
        self.replica.set_attrs(path, &now.entry).map_err(at(path))?;
        if ours { self.landed(path) } else { Ok(()) }
    }

    fn patch(
        &mut self,
        path: &RelPath,
        entry: &Entry,
        base: ContentHash,
        writes: &[(u64, ByteBuf)],
        before: &mut Before,
    ) -> Result<(), OpError> {
        let known = before.at.as_ref().and_then(|row| row.local);
        let file = match self.replica.file(path, true) {
            Ok(file) => file,
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::INVAL | Errno::ISDIR | Errno::NXIO) => {
                return self.missing(path, entry, before);
            }
            Err(other) => return Err(at(path)(other)),
        };
        let tree = if before.begun {
            None
        } else {
            match patch::check(&file, base, known, &mut self.trees).map_err(io_at(path))? {
                Base::Good(tree) => tree,
                Base::Other => return self.missing(path, entry, before),
            }
        };
        if self.adopting && !before.begun {
            let kept = self.rescue.copy(&mut self.replica, path, Why::Adopt).map_err(at(path))?;
            self.rescued_to(&kept, Why::Adopt);
        }
        before.begun = true;
        patch::write(&file, writes, entry.size()).map_err(at(path))?;
        let (hash, tree) = patch::name_after(&file, tree, writes, entry.size()).map_err(io_at(path))?;
        if Some(hash) != entry.hash() {
            tracing::error!(%path, "a patched file is not what the primary says; its content is asked for");
            return self.heal(path, entry, before.lsn);
        }
        self.patched(&file, path, entry)?;
        let stat = rustix::fs::fstat(&file).map_err(at(path))?;
        if let Some(tree) = tree {
            self.trees.keep(hash, tree::local(&stat), tree);
        }
        Ok(())
    }

    fn patched(&mut self, file: &File, path: &RelPath, entry: &Entry) -> Result<(), OpError> {
        use std::os::fd::AsFd;
        attrs::set(file.as_fd(), entry, self.replica.ordinary, &mut self.replica.lost).map_err(at(path))?;
        self.files += 1;
        self.landed(path)
    }

    /// Puts a content that must be found again: staged, in another file, or asked from the primary.
    fn heal(&mut self, path: &RelPath, entry: &Entry, lsn: Lsn) -> Result<(), OpError> {
        let Some(hash) = entry.hash() else { return Err(OpError::Content(path.clone())) };
        loop {
            if self.staging.pin(hash, lsn) {
                let file = self.staging.object(hash).map_err(io_at(path))?;
                return self.put(path, entry, &Bytes::File(&file, entry.size()));
            }
            for other in self.manifest.by_hash(hash).map_err(|e| OpError::Fatal(self.manifest.state_error(&e).into()))? {
                if other != *path && self.hash(&other).is_ok_and(|h| h == hash) {
                    let file = self.replica.file(&other, false).map_err(at(&other))?;
                    return self.put(path, entry, &Bytes::File(&file, entry.size()));
                }
            }
            let Some(session) = self.shared.session().filter(|s| !s.is_over() && !s.is_gone(hash)) else {
                return Err(OpError::Content(path.clone()));
            };
            session.miss(hash);
            self.pause(Duration::from_secs(1), &StandbyError::Latched { why: format!("waiting for content {hash} of {path}") })?;
        }
    }

    /// Sets the rows of a path and of everything below it to what the disk really holds; to nothing, and not to "removed", where that is not known or not there.
    fn quarantine(&mut self, path: &RelPath) -> Result<(), StandbyError> {
        let Some(row) = self.manifest.row(path)? else { return Ok(()) };
        let stat = self.replica.stat(path).ok().flatten().filter(|stat| same_type(stat, &row.entry));
        let Some(stat) = stat else {
            return Ok(self.manifest.forget(path)?);
        };
        let xattrs = self.replica.handle(path).and_then(|fd| tree::xattrs(std::os::fd::AsFd::as_fd(&fd), true)).unwrap_or_default();
        let target = if let Kind::Symlink { target } = &row.entry.kind { Some(target.to_vec()) } else { None };
        if let Some(entry) = tree::entry(&stat, xattrs, None, target) {
            self.manifest.set(path, Some(Row { entry, local: None }))?;
        }
        Ok(())
    }

    /// Gives directories whose names changed the attributes of their rows again, deepest first.
    pub(super) fn restore_dirs(&mut self) -> Result<(), StandbyError> {
        for dir in std::mem::take(&mut self.replica.dirs).into_iter().rev() {
            let Some(row) = self.manifest.row(&dir)?.filter(|row| row.entry.is_dir()) else { continue };
            let done = match self.replica.handle(&dir) {
                Err(Errno::NOENT | Errno::NOTDIR) => continue,
                Ok(fd) if !self.replica.ordinary => attrs::set_mtime(std::os::fd::AsFd::as_fd(&fd), row.entry.mtime),
                Ok(fd) => attrs::set(std::os::fd::AsFd::as_fd(&fd), &row.entry, true, &mut attrs::Lost::new()),
                Err(other) => Err(other),
            };
            match done {
                Ok(()) | Err(Errno::PERM) => {}
                Err(error) => self.trouble.push(format!("times of {dir}: {error}")),
            }
            if let Ok(Some(stat)) = self.replica.stat(&dir) {
                self.manifest.set_local(&dir, Some(tree::local(&stat))).map_err(|e| self.manifest.state_error(&e))?;
            }
        }
        // Looking may have opened closed directories again.
        self.replica.dirs.clear();
        Ok(())
    }
}
