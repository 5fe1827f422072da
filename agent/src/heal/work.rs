//! Brings the disk to where the standby is, path by path: looks, lets `judge` decide, acts.
//!
//! Invariants: every step is repeatable (a power cut in the middle begins it again); a file that is put back is durable before it has its name; nothing is removed or replaced whose content the mirror
//! does not have or had not; contents are streamed through an unnamed file, rows lie in a scratch database. Directories come before what is in them, removals after everything else, deepest first.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io::Seek;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::fs::{self as rfs, FileType, RawDir};
use rustix::io::Errno;
use serde::Serialize;
use twinbox_protocol::entry::{Entry, Kind, Time};
use twinbox_protocol::ids::ContentHash;
use twinbox_protocol::path::RelPath;
use twinbox_resync::manifest::{Manifest, plain_dir};
use twinbox_resync::rows::{Local, Row, RowError, Rows};

use super::disk;
use super::judge::{Found, Verdict, judge};
use super::remote::{RemoteError, Source};
use super::touched::Touched;
use crate::layout::Selection;
use crate::standby::replica::{Bytes, Over, Replica};
use crate::standby::rescue::{Rescue, Why};
use crate::standby::{attrs, copy};
use crate::tree;

/// Rows looked at between two looks into the database.
const PAGE: usize = 500;

/// Looks at a path that somebody else is changing.
const LOOKS: u32 = 3;

/// What a heal did; the numbers are paths. An interface: fields are only added.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Done {
    /// Compared with the standby.
    pub compared: u64,
    /// Missing here, put back.
    pub restored: u64,
    /// Older here, replaced.
    pub replaced: u64,
    /// Right content, attributes set.
    pub attributes: u64,
    /// Removed before the cut, removed again.
    pub removed: u64,
    /// Changed here after the last transaction: left as they are; what the standby has is in `rescue` unless it is the beginning of what is here.
    pub newer: u64,
    /// Moved here after the last transaction: left where they are.
    pub moved: u64,
    /// In doubt: left as they are, the standby's version is in `rescue`.
    pub doubtful: u64,
    /// Not what the standby has, and not decided either: its replica does not have their content, or the disk refuses them. Not healed while there are any.
    pub unrestored: u64,
    /// The standby's versions that are in `rescue`.
    pub beside: u64,
    /// The disk's own versions that went to `rescue`.
    pub rescued: u64,
    /// Written in place once, so to be read again by the capture.
    pub reread: u64,
    /// Bytes that came from the standby.
    pub bytes: u64,
    /// Where versions that were not left in place are.
    pub rescue: Option<PathBuf>,
}

/// Why it could not be finished.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WorkError {
    /// The standby.
    #[error(transparent)]
    Remote(#[from] RemoteError),
    /// This disk.
    #[error("{path}: {}", std::io::Error::from(*.source))]
    Disk {
        /// Where.
        path: String,
        /// The system's word.
        source: Errno,
    },
    /// State beside the manifest.
    #[error("heal: {0}")]
    Io(#[from] std::io::Error),
    /// The rows.
    #[error("heal: {0}")]
    Rows(#[from] RowError),
    /// Somebody changed a path between a look at it and the step that followed.
    #[error("{path} was changed while it was healed")]
    Changed {
        /// Which.
        path: String,
    },
    /// A database.
    #[error(transparent)]
    State(#[from] twinbox_resync::schema::StateError),
}

/// Names by inode in one mailbox: its directories.
type Listing = (RelPath, HashMap<u64, Vec<RelPath>>);

/// See the module's text.
pub(super) struct Work<'a, S> {
    pub(super) replica: Replica,
    /// What this node knew; `None` when it is damaged.
    pub(super) manifest: Option<Manifest>,
    /// What the standby has beyond what is durable here.
    pub(super) pulled: Manifest,
    pub(super) selection: &'a Selection,
    pub(super) mirror_dir: &'a Path,
    pub(super) source: S,
    pub(super) done: Done,
    /// Called now and then.
    pub(super) progress: &'a mut dyn FnMut(&Done),
    pub(super) rescue: Rescue,
    /// Files made anew: inode before ▶ a name now.
    pub(super) links: BTreeMap<u64, RelPath>,
    /// Inodes that are where the mail server moved them.
    pub(super) kept: BTreeSet<u64>,
    pub(super) listing: Option<Listing>,
    /// Contents that could not be put where they belong.
    pub(super) missing: BTreeSet<ContentHash>,
    /// The operator does without what cannot be put back: what the standby has of it is kept in `rescue`.
    pub(super) incomplete: bool,
    /// When this machine was started, if the disk lost something by that.
    pub(super) booted: Option<Time>,
    /// Inodes whose ctime a heal moved.
    pub(super) touched: Touched,
    /// Directories without anything left in them by a heal that was cut short.
    pub(super) cleared: BTreeSet<RelPath>,
    /// Inodes that stay as the disk has them.
    pub(super) read_again: BTreeSet<u64>,
}

impl<S: Source> Work<'_, S> {
    /// Everything, then one `syncfs`: when this returns, what it did survives a power cut.
    pub(super) fn run(&mut self) -> Result<(), WorkError> {
        let mut at: Option<RelPath> = None;
        loop {
            let page = self.pulled.rows_after(at.as_ref(), PAGE).map_err(|e| self.pulled.state_error(&e))?;
            let Some((last, _)) = page.last() else { break };
            at = Some(last.clone());
            for (path, entry) in page {
                self.path(&path, Some(&entry)).or_else(|error| self.tolerate(&path, Some(&entry), error))?;
            }
            (self.progress)(&self.done);
        }
        let mut at: Option<RelPath> = None;
        loop {
            let page = self.pulled.gone_before(at.as_ref(), PAGE).map_err(|e| self.pulled.state_error(&e))?;
            let Some(last) = page.last() else { break };
            at = Some(last.clone());
            for path in page {
                self.path(&path, None).or_else(|error| self.tolerate(&path, None, error))?;
            }
            (self.progress)(&self.done);
        }
        self.forget_what_stays()?;
        self.forget_what_is_written_in_place()?;
        rfs::syncfs(self.replica.root.fd())
            .map_err(|source| WorkError::Disk { path: self.replica.root.path().display().to_string(), source })
    }

    /// A path that the system will not let us have (a name too long here, no permission) must not hold up the others.
    fn tolerate(&mut self, path: &RelPath, wanted: Option<&Entry>, error: WorkError) -> Result<(), WorkError> {
        let (shown, source) = match error {
            WorkError::Disk {
                source: Errno::NOSPC | Errno::DQUOT | Errno::IO | Errno::ROFS | Errno::MFILE | Errno::NFILE | Errno::NOMEM,
                ..
            } => return Err(error),
            WorkError::Disk { path, source } => (path, source),
            WorkError::Changed { path } => (path, Errno::BUSY),
            other => return Err(other),
        };
        tracing::error!(error = %std::io::Error::from(source), "a path could not be healed; the rest goes on");
        tracing::debug!(path = %path, shown, "not healed");
        let Some(wanted) = wanted else {
            // It stays, and mail comes back rather than vanishes.
            self.done.newer += 1;
            return Ok(());
        };
        self.missing.extend(wanted.hash());
        let unrestored = self.done.unrestored + 1;
        if self.incomplete
            && let Some((file, _)) = self.fetch(path, wanted)?
        {
            self.beside(path, wanted, &file)?;
        }
        self.done.unrestored = unrestored;
        Ok(())
    }

    fn row(&self, path: &RelPath) -> Result<Option<Row>, WorkError> {
        Ok(match &self.manifest {
            Some(manifest) => manifest.row(path)?,
            None => None,
        })
    }

    /// Looks and acts; again when somebody else acted in between.
    fn path(&mut self, path: &RelPath, wanted: Option<&Entry>) -> Result<(), WorkError> {
        self.done.compared += 1;
        for _ in 1..LOOKS {
            match self.step(path, wanted) {
                Err(WorkError::Changed { .. }) => {}
                ended => return ended,
            }
        }
        self.step(path, wanted)
    }

    fn step(&mut self, path: &RelPath, wanted: Option<&Entry>) -> Result<(), WorkError> {
        let failed = |source| WorkError::Disk { path: path.to_string(), source };
        if self.selection.excludes(path.as_bytes(), wanted.is_some_and(Entry::is_dir)) {
            self.done.compared -= 1;
            return Ok(());
        }
        self.clear(path)?;
        let row = self.row(path)?;
        // A noted ctime of nothing says: to be read again.
        let then =
            row.as_ref().filter(|row| Some(&row.entry) == wanted).and_then(|row| row.local).filter(|then| then.ctime != Time::default());
        let mut found = disk::found(&mut self.replica, path, wanted).map_err(failed)?;
        if let Some(found) = &mut found {
            self.recognise(path, row.as_ref(), found)?;
            found.fresh = self.is_fresh(path, found);
        }
        if wanted.and_then(Entry::hash) == Some(ContentHash([0; 32])) && found.is_some() {
            // A path that the standby could not apply: it does not say what it should be.
            self.done.newer += 1;
            return Ok(());
        }
        let verdict = judge(wanted, then, found.as_ref());
        if !matches!(verdict, Verdict::Same | Verdict::Newer) {
            self.touching(path, found.as_ref())?;
        }
        match (verdict, wanted) {
            (Verdict::Same, _) => {}
            (Verdict::Newer, Some(wanted)) => self.newer(path, wanted, found.as_ref())?,
            (Verdict::Newer, None) => self.done.newer += 1,
            (Verdict::Attributes, Some(wanted)) => self.attributes(path, wanted, found.as_ref()).map_err(failed)?,
            (Verdict::Restore, Some(wanted)) => self.restore(path, wanted, then)?,
            (Verdict::Replace | Verdict::ReplaceIfBeginning | Verdict::NewerUnlessBeginning | Verdict::Doubt, Some(wanted)) => {
                self.replace(path, wanted, then, verdict, found.as_ref())?
            }
            (Verdict::Remove, _) => self.remove(path, found.as_ref())?,
            (_, None) => {}
        }
        let stays = matches!(verdict, Verdict::Newer | Verdict::NewerUnlessBeginning | Verdict::ReplaceIfBeginning | Verdict::Doubt);
        if stays {
            self.read_again.extend(row.and_then(|row| row.local).map(|local| local.ino));
        }
        Ok(())
    }

    /// Says beforehand that a step will move the ctimes of what is at `path` and of its directory.
    fn touching(&mut self, path: &RelPath, found: Option<&Found>) -> Result<(), WorkError> {
        if let Some(found) = found {
            self.touched.before(found.local.ino)?;
        }
        let above = path.parent().map(|dir| self.replica.stat(&dir));
        if let Some(Ok(Some(stat))) = above {
            self.touched.before(stat.st_ino)?;
        }
        Ok(())
    }

    /// What a heal that was cut short has left under the temporary name in the directory of `path`: it had set it aside, or not finished it. Bytes that the mirror does not know are kept.
    fn clear(&mut self, path: &RelPath) -> Result<(), WorkError> {
        let Some((dir, temp)) = path.parent().zip(Replica::displaced(path)) else { return Ok(()) };
        if !self.cleared.insert(dir) {
            return Ok(());
        }
        let failed = |source| WorkError::Disk { path: temp.to_string(), source };
        let Ok(Some(mut found)) = disk::found(&mut self.replica, &temp, None) else { return Ok(()) };
        self.recognise(&temp, None, &mut found)?;
        self.touched.before(found.local.ino)?;
        if found.known || found.entry.hash().is_none() || found.entry.size() == 0 {
            self.replica.remove(&temp).map_err(failed)?;
        } else {
            let kept = self.rescue.take(&mut self.replica, &temp, Why::Heal).map_err(failed)?;
            tracing::warn!(kept = %kept.display(), "a heal that was cut short left a file that nobody else may have: it is kept");
            self.done.rescued += 1;
            self.done.rescue = Some(self.mirror_dir.join("rescue"));
        }
        self.touched.add(found.local.ino);
        Ok(())
    }

    /// What stays is not what was shipped, and its times may say that it is: the capture reads it whatever they say, under all its names. At the end, because other names are judged by what is noted.
    fn forget_what_stays(&mut self) -> Result<(), WorkError> {
        let Some(manifest) = &mut self.manifest else { return Ok(()) };
        let forget = || {
            manifest.begin()?;
            for ino in &self.read_again {
                for name in manifest.by_ino(*ino)? {
                    manifest.set_local(&name, Some(Local { ino: *ino, ctime: Time::default() }))?;
                }
            }
            Ok(())
        };
        forget().map_err(|error| WorkError::State(manifest.state_error(&error)))
    }

    /// Whether it was changed after the boot, and not by this heal: the last word then, whatever the mirror knows. A ctime ahead of the clock is of before, when that was another.
    fn is_fresh(&self, path: &RelPath, found: &Found) -> bool {
        let ours = self.touched.contains(found.local.ino) || found.entry.is_dir() && self.replica.dirs.contains(path);
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
        let now = Time { secs: now.tv_sec, nanos: now.tv_nsec as u32 };
        self.booted.is_some_and(|booted| !ours && (booted..=now).contains(&found.local.ctime))
    }

    /// Whether the mirror knows what was found.
    fn recognise(&self, path: &RelPath, row: Option<&Row>, found: &mut Found) -> Result<(), WorkError> {
        let before = row.is_some_and(|row| row.entry.kind == found.entry.kind);
        let Some(hash) = found.entry.hash() else {
            found.was = before;
            return Ok(());
        };
        let sql = |db: &Manifest, error| WorkError::State(db.state_error(&error));
        found.known = self.pulled.by_hash(hash).map_err(|e| sql(&self.pulled, e))?.iter().any(|other| other != path);
        found.was = before;
        if let Some(manifest) = &self.manifest {
            found.was |= manifest.had(path, hash).map_err(|e| sql(manifest, e))?;
            if !found.known {
                let others = manifest.by_hash(hash).map_err(|e| sql(manifest, e))?;
                for other in others.iter().filter(|other| *other != path) {
                    // A row that the standby has not changed since.
                    let stays = self.pulled.row(other)?.is_none() && !self.pulled.is_gone(other).map_err(|e| sql(&self.pulled, e))?;
                    found.known |= stays;
                }
            }
        }
        Ok(())
    }

    fn attributes(&mut self, path: &RelPath, wanted: &Entry, found: Option<&Found>) -> Result<(), Errno> {
        let mut entry = wanted.clone();
        if let Some(found) = found.filter(|_| wanted.is_dir()) {
            entry.mtime = entry.mtime.max(found.entry.mtime);
        }
        if let Some(found) = found {
            self.touched.add(found.local.ino);
        }
        self.replica.set_attrs(path, &entry)?;
        self.done.attributes += 1;
        Ok(())
    }

    fn restore(&mut self, path: &RelPath, wanted: &Entry, then: Option<Local>) -> Result<(), WorkError> {
        if let Some(then) = then.filter(|_| !wanted.is_dir())
            && self.moved(path, wanted, then)
        {
            self.done.moved += 1;
            return Ok(());
        }
        self.parents(path)?;
        self.replica.over = Over::Nothing;
        if self.put(path, wanted, then, None)? {
            self.done.restored += 1;
        }
        Ok(())
    }

    /// Directories on the way that were lost as well.
    fn parents(&mut self, path: &RelPath) -> Result<(), WorkError> {
        let mut missing = vec![];
        let mut at = path.parent();
        while let Some(dir) = at.filter(|dir| !dir.is_root()) {
            let failed = |source| WorkError::Disk { path: dir.to_string(), source };
            if self.replica.stat(&dir).map_err(failed)?.is_some() {
                break;
            }
            at = dir.parent();
            missing.push(dir);
        }
        for dir in missing.into_iter().rev() {
            let row = match self.pulled.row(&dir)? {
                Some(row) => Some(row),
                None => self.row(&dir)?,
            };
            let entry = row.map(|row| row.entry).filter(Entry::is_dir).unwrap_or_else(|| Entry { mode: 0o700, ..plain_dir() });
            self.replica.make(&dir, &entry).map_err(|source| WorkError::Disk { path: dir.to_string(), source })?;
        }
        Ok(())
    }

    /// Makes `path` what it is on the standby; `false` when that has not got it either.
    fn put(&mut self, path: &RelPath, wanted: &Entry, then: Option<Local>, over: Option<&Found>) -> Result<bool, WorkError> {
        if !matches!(wanted.kind, Kind::File { .. }) {
            self.replica.make(path, wanted).map_err(|source| self.unnamed(path, source))?;
            return Ok(true);
        }
        if let Some(then) = then
            && self.link(path, wanted, then)?
        {
            return Ok(true);
        }
        let Some((file, names)) = self.fetch(path, wanted)? else { return Ok(false) };
        if let Some(found) = over {
            self.is_still(path, found)?;
        }
        for other in names {
            if self.link_to(&other, path, wanted)? {
                return Ok(true);
            }
        }
        self.place(path, wanted, then, &file)
    }

    fn place(&mut self, path: &RelPath, wanted: &Entry, then: Option<Local>, file: &File) -> Result<bool, WorkError> {
        let put = self.replica.put(path, wanted, &Bytes::File(file, wanted.size()));
        put.map_err(|source| self.unnamed(path, source))?;
        if let (Some(then), Some(manifest)) = (then, &self.manifest)
            && manifest.by_ino(then.ino).map_err(|e| manifest.state_error(&e))?.len() > 1
        {
            self.links.insert(then.ino, path.clone());
        }
        Ok(true)
    }

    /// As another name of a file that is here, if the two were one.
    fn link(&mut self, path: &RelPath, wanted: &Entry, then: Local) -> Result<bool, WorkError> {
        let Some(manifest) = &self.manifest else { return Ok(false) };
        let mut others = manifest.by_ino(then.ino).map_err(|e| manifest.state_error(&e))?;
        others.retain(|other| other != path);
        if others.is_empty() {
            return Ok(false);
        }
        let made = self.links.get(&then.ino).cloned();
        for other in others {
            let row = self.row(&other)?;
            if row.is_none_or(|row| row.entry != *wanted) {
                continue;
            }
            let failed = |source| WorkError::Disk { path: other.to_string(), source };
            let here = self.replica.stat(&other).map_err(failed)?;
            let same = here.is_some_and(|stat| stat.st_ino == then.ino || made.as_ref() == Some(&other));
            if same && self.link_to(&other, path, wanted)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Makes `path` another name of `other`, if that is what it should be: a link to other bytes would be in doubt for both.
    fn link_to(&mut self, other: &RelPath, path: &RelPath, wanted: &Entry) -> Result<bool, WorkError> {
        let found =
            disk::found(&mut self.replica, other, Some(wanted)).map_err(|source| WorkError::Disk { path: other.to_string(), source })?;
        let Some(found) = found.filter(|found| found.entry == *wanted) else { return Ok(false) };
        self.touched.before(found.local.ino)?;
        self.touched.add(found.local.ino);
        self.replica.link(other, path).map_err(|source| self.unnamed(path, source))?;
        Ok(true)
    }

    /// Why something did not get its name.
    fn unnamed(&self, path: &RelPath, source: Errno) -> WorkError {
        match (self.replica.over, source) {
            (Over::Nothing, Errno::EXIST) | (Over::Exchange, Errno::NOENT) => WorkError::Changed { path: path.to_string() },
            _ => WorkError::Disk { path: path.to_string(), source },
        }
    }

    /// Whether what is at `path` is still what was looked at; contents come over the network meanwhile.
    fn is_still(&mut self, path: &RelPath, found: &Found) -> Result<(), WorkError> {
        match self.replica.stat(path) {
            Ok(Some(stat)) if tree::local(&stat) == found.local => Ok(()),
            Ok(_) => Err(WorkError::Changed { path: path.to_string() }),
            Err(source) => Err(WorkError::Disk { path: path.to_string(), source }),
        }
    }

    /// Removes what was at `path` and is under the temporary name now, if the mirror knows it (`known`), it is what was looked at and nobody writes to it; else keeps it. Gives whether it was that.
    fn discard(&mut self, path: &RelPath, found: &Found, known: bool) -> Result<bool, WorkError> {
        self.touched.add(found.local.ino);
        let Some(temp) = Replica::displaced(path) else { return Ok(true) };
        let failed = |source| WorkError::Disk { path: path.to_string(), source };
        let Some(now) = disk::found(&mut self.replica, &temp, None).map_err(failed)? else { return Ok(true) };
        let same = now.local.ino == found.local.ino && now.entry.kind == found.entry.kind && !now.busy;
        if same && known {
            self.replica.remove(&temp).map_err(failed)?;
            return Ok(true);
        }
        let kept = self.rescue.take_as(&mut self.replica, &temp, path, Why::Heal).map_err(failed)?;
        tracing::error!(kept = %kept.display(), same, "a file that gave way to the standby's and that nobody else may have is kept");
        self.done.rescued += 1;
        self.done.rescue = Some(self.mirror_dir.join("rescue"));
        Ok(same)
    }

    /// The content, and other names of the file.
    fn fetch(&mut self, path: &RelPath, wanted: &Entry) -> Result<Option<(File, Vec<RelPath>)>, WorkError> {
        let Some(hash) = wanted.hash() else { return Ok(None) };
        let mut file = tempfile::tempfile_in(self.mirror_dir)?;
        let Some(names) = self.source.fetch(path, hash, wanted.size(), &mut file)? else {
            tracing::error!("the standby's replica lacks a content that this disk lost too: look at its log");
            tracing::debug!(path = %path, %hash, "on neither side");
            self.done.unrestored += 1;
            self.missing.insert(hash);
            return Ok(None);
        };
        file.rewind()?;
        self.done.bytes += wanted.size();
        Ok(Some((file, names)))
    }

    fn replace(
        &mut self,
        path: &RelPath,
        wanted: &Entry,
        then: Option<Local>,
        verdict: Verdict,
        found: Option<&Found>,
    ) -> Result<(), WorkError> {
        let failed = |source| WorkError::Disk { path: path.to_string(), source };
        let Some(found) = found else { return Ok(()) };
        self.replica.over = Over::Exchange;
        if verdict == Verdict::Replace {
            let done = if !found.entry.same_type(wanted) {
                // One cannot be renamed over the other.
                let file = self.fetch(path, wanted)?;
                if file.is_none() && wanted.hash().is_some() {
                    return Ok(());
                }
                self.is_still(path, found)?;
                self.rescue.take(&mut self.replica, path, Why::Heal).map_err(failed)?;
                self.replica.over = Over::Nothing;
                self.done.rescued += 1;
                self.done.rescue = Some(self.mirror_dir.join("rescue"));
                match file {
                    Some((file, _)) => self.place(path, wanted, then, &file)?,
                    None => self.put(path, wanted, then, None)?,
                }
            } else {
                self.put(path, wanted, then, Some(found))? && {
                    self.discard(path, found, found.was || found.known)?;
                    true
                }
            };
            self.done.replaced += u64::from(done);
            return Ok(());
        }
        let Some((file, _)) = self.fetch(path, wanted)? else {
            if wanted.hash().is_none() {
                self.done.doubtful += 1; // A link or a directory: nothing that could be lost.
            }
            return Ok(());
        };
        let may_begin = matches!(verdict, Verdict::ReplaceIfBeginning | Verdict::NewerUnlessBeginning);
        if may_begin && disk::begins(&self.replica.file(path, false).map_err(failed)?, &file)? {
            self.is_still(path, found)?;
            self.place(path, wanted, then, &file)?;
            // Its bytes are the beginning of what took its place.
            self.discard(path, found, true)?;
            self.done.replaced += 1;
            return Ok(());
        }
        self.beside(path, wanted, &file)?;
        if verdict == Verdict::NewerUnlessBeginning {
            self.done.newer += 1;
            return Ok(());
        }
        tracing::error!(
            "a file here may be newer than the standby's, or half written: it stays, and the standby's version is kept beside; compare them"
        );
        self.done.doubtful += 1;
        Ok(())
    }

    /// The disk's version stays and will be shipped over the standby's, which was acknowledged: unless all of it is in the disk's, it is kept.
    fn newer(&mut self, path: &RelPath, wanted: &Entry, found: Option<&Found>) -> Result<(), WorkError> {
        self.done.newer += 1;
        if found.is_some_and(|found| !found.longer && found.entry.kind != wanted.kind)
            && let Some((file, _)) = self.fetch(path, wanted)?
        {
            self.beside(path, wanted, &file)?;
        }
        Ok(())
    }

    /// Keeps the standby's version in `rescue`; once, however often it is healed.
    fn beside(&mut self, path: &RelPath, wanted: &Entry, file: &File) -> Result<(), WorkError> {
        let failed = |source| WorkError::Disk { path: path.to_string(), source };
        self.done.beside += 1;
        self.done.rescue = Some(self.mirror_dir.join("rescue"));
        if self.rescue.holds(path, Why::Heal, wanted) {
            return Ok(());
        }
        let target = self.rescue.room(path, Why::Heal).map_err(failed)?;
        let copied = File::options().read(true).write(true).create_new(true).open(&target)?;
        copy::whole(file.as_fd(), copied.as_fd(), wanted.size()).map_err(failed)?;
        attrs::set(copied.as_fd(), wanted, self.replica.ordinary, &mut attrs::Lost::new()).map_err(failed)?;
        copied.sync_all()?;
        if let Some(dir) = target.parent() {
            File::open(dir)?.sync_all()?;
        }
        tracing::warn!(kept = %target.display(), "the standby's version of a file is kept");
        Ok(())
    }

    fn remove(&mut self, path: &RelPath, found: Option<&Found>) -> Result<(), WorkError> {
        let failed = |source| WorkError::Disk { path: path.to_string(), source };
        let Some(found) = found else { return Ok(()) };
        // Bytes that belong elsewhere and could not be put there may be the last.
        let missing = found.entry.hash().is_some_and(|hash| self.missing.contains(&hash));
        if self.kept.contains(&found.local.ino) || found.busy || missing {
            self.done.newer += 1;
            return Ok(());
        }
        if found.entry.is_dir() {
            match self.replica.remove(path) {
                Ok(()) => self.done.removed += 1,
                // Something newer is in it.
                Err(Errno::NOTEMPTY | Errno::EXIST) => self.done.newer += 1,
                Err(source) => return Err(failed(source)),
            }
            return Ok(());
        }
        self.is_still(path, found)?;
        self.replica.set_aside(path).map_err(failed)?;
        match self.discard(path, found, true)? {
            true => self.done.removed += 1,
            false => self.done.newer += 1,
        }
        Ok(())
    }

    /// Whether the file that was captured at `path` is in the same mailbox under a name it got later.
    fn moved(&mut self, path: &RelPath, wanted: &Entry, then: Local) -> bool {
        let Some(parent) = path.parent() else { return false };
        let mailbox = match parent.name() {
            b"cur" | b"new" => parent.parent().unwrap_or_default(),
            _ => parent.clone(),
        };
        if self.listing.as_ref().is_none_or(|(listed, _)| *listed != mailbox) {
            let dirs =
                if mailbox == parent { vec![parent] } else { [&b"cur"[..], b"new"].iter().filter_map(|name| mailbox.join(name)).collect() };
            let mut names = HashMap::new();
            dirs.iter().for_each(|dir| list(&self.replica, dir, &mut names));
            self.listing = Some((mailbox, names));
        }
        let others = self.listing.as_ref().and_then(|(_, names)| names.get(&then.ino)).cloned().unwrap_or_default();
        let moved = others.iter().filter(|other| *other != path).any(|other| {
            let Ok(Some(stat)) = self.replica.stat(other) else { return false };
            // A name that the standby knows is no new one; and a rename moves the ctime.
            let named = self.pulled.row(other).is_ok_and(|row| row.is_some()) || self.row(other).is_ok_and(|row| row.is_some());
            // Names and sizes may be on the disk without the bytes.
            !named
                && disk::is_row(&stat, wanted, Local { ctime: tree::local(&stat).ctime, ..then })
                && tree::local(&stat).ctime > then.ctime
                && self.replica.file(other, false).is_ok_and(|file| disk::holds(&file, wanted))
        });
        if moved {
            self.kept.insert(then.ino);
        }
        moved
    }

    /// New bytes can be under old times in files that are written in place: what is noted of them counts no more, so that the capture reads them.
    fn forget_what_is_written_in_place(&mut self) -> Result<(), WorkError> {
        let Some(manifest) = &mut self.manifest else { return Ok(()) };
        self.done.reread = manifest.distrust_in_place().map_err(|e| manifest.state_error(&e))?;
        Ok(())
    }
}

fn list(replica: &Replica, dir: &RelPath, names: &mut HashMap<u64, Vec<RelPath>>) {
    let Ok(fd) = replica.root.dir_for_reading(dir) else { return };
    let mut buffer = Vec::with_capacity(32 * 1024);
    let mut reader = RawDir::new(fd, buffer.spare_capacity_mut());
    while let Some(Ok(entry)) = reader.next() {
        if entry.file_type() != FileType::Directory
            && let Some(path) = dir.join(entry.file_name().to_bytes())
        {
            names.entry(entry.ino()).or_default().push(path);
        }
    }
}
