//! The store of the node that was promoted, for one that comes back: what is in it now, and the changes of that one that are made here too.
//!
//! Everything is done as a mail client or server would do it: a message appears whole, in `new` or `cur`, under a name that nobody has; nothing is overwritten or removed. What is said to be done
//! survives a power cut. The capture sees it like any other change.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{self as rfs, FileType, RenameFlags};
use rustix::io::Errno;
use twinbox_protocol::digest::Digest;
use twinbox_protocol::entry::Entry;
use twinbox_protocol::ids::{ChainHash, Lsn};
use twinbox_protocol::msg::Position;
use twinbox_protocol::path::RelPath;
use twinbox_protocol::rejoin::{Ask, Changes, Differs, FIRST_MAX, Flags, Found, Merge, Merged};
use twinbox_resync::mailname::{self, Name};
use twinbox_resync::manifest::Manifest;
use twinbox_resync::rows::Rows;
use twinbox_resync::schema::StateError;

use super::keywords::Keywords;
use super::program::Program;
use super::tail::{TailError, differences, look, unread};
use crate::layout::{Grouping, Selection};
use crate::roles::SharedTool;
use crate::standby::replica::{Bytes, Over, Replica};
use crate::tree::{self, Root};

/// What of a mirror a returning node may be told.
#[derive(Clone)]
pub struct Lent {
    /// The store.
    pub root: PathBuf,
    /// `<state>/mirrors/<name>`.
    pub mirror_dir: PathBuf,
    /// What of it is mirrored.
    pub selection: Selection,
    /// How paths fall into groups.
    pub grouping: Grouping,
    /// The mirror.
    pub name: String,
    /// What has the mail server take in what only it can.
    pub tool: SharedTool,
    /// Held by the one node that may change it.
    pub alone: Arc<tokio::sync::Mutex<()>>,
}

/// Why it could not be looked at or changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// A path.
    #[error("{path}: {}", std::io::Error::from(*.source))]
    Disk {
        /// Which.
        path: RelPath,
        /// The system's word.
        source: Errno,
    },
    /// The root.
    #[error("root: {0}")]
    Root(std::io::Error),
    /// Rows.
    #[error(transparent)]
    State(#[from] StateError),
    /// The comparison.
    #[error(transparent)]
    Tail(#[from] TailError),
}

/// Listings kept: a peer may ask about any number of folders.
const FOLDERS_MAX: usize = 1000;

/// Messages of a folder by their unique names: name ▶ path.
type Folder = HashMap<Vec<u8>, RelPath>;

/// See the module's text.
pub(super) struct Store {
    replica: Replica,
    manifest: Manifest,
    selection: Selection,
    keywords: Keywords,
    /// As they were listed when first asked for, and changed here since: nobody else brings the names that are asked for.
    folders: HashMap<RelPath, Folder>,
    program: Program,
}

impl Store {
    pub(super) fn open(lent: &Lent) -> Result<Self, StoreError> {
        let mut replica = Replica::new(Root::open(&lent.root).map_err(StoreError::Root)?);
        (replica.synced, replica.over) = (true, Over::Nothing);
        let manifest = Manifest::open(&lent.mirror_dir.join("manifest.db"), false)?;
        let program = Program::new(lent);
        program.sweep();
        Ok(Store { replica, manifest, selection: lent.selection.clone(), keywords: Keywords::default(), folders: HashMap::new(), program })
    }

    /// The rows as they were at the fork; nobody follows, so they are as they were.
    pub(super) fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Position and digest of those rows, and the log's hash at another position while that is remembered.
    pub(super) fn position(&self, theirs: Lsn) -> Result<(Position, Digest, Option<ChainHash>), StoreError> {
        let sql = |error| self.manifest.state_error(&error);
        Ok((self.manifest.position().map_err(sql)?, self.manifest.digest(), self.manifest.chain_at(theirs).map_err(sql)?))
    }

    fn entry(&self, path: &RelPath) -> Result<Option<Entry>, StoreError> {
        let row = self.manifest.row(path).map_err(TailError::from)?;
        let disk = |source| StoreError::Disk { path: path.clone(), source };
        match look(&self.replica.root, path, row.as_ref()) {
            // The store is in use: it is there, and nobody can say with what in it.
            Err(Errno::BUSY) => Ok(self.replica.root.stat(path).map_err(disk)?.as_ref().and_then(unread)),
            other => Ok(other.map_err(disk)?.map(|(entry, _)| entry)),
        }
    }

    /// Messages of a folder.
    fn folder(&mut self, folder: &RelPath) -> Result<&mut Folder, StoreError> {
        if self.folders.len() >= FOLDERS_MAX {
            self.folders.clear();
        }
        if !self.folders.contains_key(folder) {
            let mut found = Folder::new();
            for place in [b"new", b"cur"] {
                let Some(dir) = folder.join(place) else { continue };
                let fd = match self.replica.root.dir_for_reading(&dir) {
                    Ok(fd) => fd,
                    Err(Errno::NOENT | Errno::NOTDIR) => continue,
                    Err(source) => return Err(StoreError::Disk { path: dir, source }),
                };
                for item in tree::list(fd.as_fd()).map_err(|source| StoreError::Disk { path: dir.clone(), source })? {
                    if item.kind != FileType::Directory {
                        found.extend(dir.join(&item.name).map(|path| (mailname::split(&item.name).0.to_vec(), path)));
                    }
                }
            }
            self.folders.insert(folder.clone(), found);
        }
        Ok(self.folders.entry(folder.clone()).or_default())
    }

    /// Where a message is now; the listing is made anew when it is not where it was.
    fn message(&mut self, folder: &RelPath, unique: &[u8]) -> Result<Option<RelPath>, StoreError> {
        let known = self.folder(folder)?.get(unique).cloned();
        let Some(path) = known else { return Ok(None) };
        if self.replica.root.stat(&path).is_ok_and(|stat| stat.is_some()) {
            return Ok(Some(path));
        }
        self.folders.remove(folder);
        Ok(self.folder(folder)?.get(unique).cloned())
    }

    fn flags(&mut self, path: &RelPath) -> Flags {
        let Some(name) = Name::of(path) else { return Flags::new() };
        let (keywords, root) = (std::cell::RefCell::new(&mut self.keywords), &self.replica.root);
        name.flags(|letter| keywords.borrow_mut().name(root, &name.folder, letter))
    }

    /// Its flags as they are now, with these changed.
    fn changed_flags(&mut self, path: &RelPath, set: &Flags, clear: &Flags) -> Flags {
        let now = self.flags(path);
        now.union(set).filter(|flag| !clear.contains(*flag)).cloned().collect()
    }

    /// Answers a question.
    pub(super) fn find(&mut self, ask: &Ask) -> Result<Option<Found>, StoreError> {
        let path = match ask {
            Ask::Path(path) => Some(path.clone()),
            Ask::Message { folder, unique } => self.message(folder, unique)?,
            Ask::Mail { owner, mailbox, print } => {
                let Some(path) = self.program.find(&self.replica.root, owner, mailbox, *print)? else { return Ok(None) };
                let file = path.parent().unwrap_or_default();
                let stat = self.replica.root.stat(&file).map_err(|source| StoreError::Disk { path: file, source })?;
                let entry = stat.as_ref().and_then(unread);
                return Ok(entry.map(|entry| Found { path, entry, flags: Flags::new() }));
            }
        };
        let Some(path) = path else { return Ok(None) };
        let flags = self.flags(&path);
        Ok(self.entry(&path)?.map(|entry| Found { path, entry, flags }))
    }

    /// What has changed since the fork.
    pub(super) fn changes(&mut self) -> Result<Changes, StoreError> {
        let mut changes = Changes { has_program: self.program.is_there(), ..Changes::default() };
        let (all, _) = differences(&self.manifest, &self.replica.root, &self.selection, true, &mut |_| {})?;
        for (path, it) in all {
            let dir = |entry: Option<&Entry>| entry.is_some_and(Entry::is_dir);
            let (fork, ours) = (it.fork.as_ref().map(|row| &row.entry), it.ours.as_ref().map(|(entry, _)| entry));
            if (dir(fork) && dir(ours)) || path.is_root() || mailname::is_the_servers_own(&path) {
                continue; // Its times.
            }
            let (kind, count) = match (fork.is_some(), ours.is_some()) {
                (false, _) => (Differs::New, &mut changes.new),
                (_, true) => (Differs::Changed, &mut changes.changed),
                (_, false) => (Differs::Gone, &mut changes.gone),
            };
            *count += 1;
            if changes.first.len() < FIRST_MAX {
                changes.first.push((kind, path));
            }
        }
        Ok(changes)
    }

    /// Makes a change; `bytes` are a message's.
    pub(super) fn merge(&mut self, merge: &Merge, bytes: Option<&File>) -> Result<Merged, StoreError> {
        // A message may be in the root's own folder.
        let (path, is_dir, in_root) = match merge {
            Merge::File { path, .. } => (path, false, false),
            Merge::Dir { path, .. } | Merge::Rename { to: path, .. } => (path, true, false),
            Merge::Message { folder, .. } | Merge::Flags { folder, .. } | Merge::Move { folder, .. } => (folder, true, true),
            Merge::Server { owner, .. } => (owner, true, true),
        };
        if (path.is_root() && !in_root) || self.selection.excludes(path.as_bytes(), is_dir) {
            return Ok(kept("it is not mirrored on this node"));
        }
        // A temporary name is the directory's, not the writer's.
        static ONE: Mutex<()> = Mutex::new(());
        let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        match merge {
            Merge::Dir { path, entry } => self.dir(path, entry),
            Merge::Message { folder, unique, flags, entry } => self.deliver(folder, unique, flags, entry, bytes),
            Merge::Flags { folder, unique, set, clear } => {
                let Some(from) = self.message(folder, unique)? else { return Ok(kept("it was deleted meanwhile")) };
                let flags = self.changed_flags(&from, set, clear);
                self.rename_message(&from, unique, folder, unique, &flags)
            }
            Merge::Move { from, was, folder, unique, set, clear } => {
                if self.message(folder, unique)?.is_some() {
                    return Ok(Merged::Already);
                }
                let Some(at) = self.message(from, was)? else { return Ok(kept("it was deleted meanwhile")) };
                let flags = self.changed_flags(&at, set, clear);
                self.rename_message(&at, was, folder, unique, &flags)
            }
            Merge::File { path, entry } => self.file(path, entry, bytes),
            Merge::Rename { from, to } => self.rename_folder(from, to),
            Merge::Server { owner, task } => self.program.run(&self.replica.root, &self.manifest, owner, task, bytes),
        }
    }

    fn synced(&mut self, path: &RelPath) -> Result<(), StoreError> {
        let Some(dir) = path.parent() else { return Ok(()) };
        let sync = || rfs::fsync(self.replica.root.dir_for_reading(&dir)?.as_fd());
        sync().map_err(|source| StoreError::Disk { path: dir.clone(), source })?;
        // Their times are the mail server's business.
        self.replica.dirs.clear();
        Ok(())
    }

    fn dir(&mut self, path: &RelPath, entry: &Entry) -> Result<Merged, StoreError> {
        let disk = |source| StoreError::Disk { path: path.clone(), source };
        if !entry.is_dir() {
            return Ok(kept("it is no directory"));
        }
        if self.replica.root.stat(path).map_err(disk)?.is_some() {
            return Ok(Merged::Already);
        }
        self.replica.make(path, entry).map_err(disk)?;
        self.synced(path)?;
        Ok(Merged::Done)
    }

    fn deliver(
        &mut self,
        folder: &RelPath,
        unique: &[u8],
        flags: &Flags,
        entry: &Entry,
        bytes: Option<&File>,
    ) -> Result<Merged, StoreError> {
        let Some(bytes) = bytes.filter(|_| entry.hash().is_some()) else { return Ok(kept("its bytes did not arrive")) };
        if let Some(there) = self.message(folder, unique)? {
            let same = self.entry(&there)?.is_some_and(|there| there.hash() == entry.hash());
            return Ok(if same { Merged::Already } else { kept("another message of that name is there") });
        }
        let letters = self.keywords.letters(&self.replica.root, folder, flags);
        let Some(path) = mailname::path(folder, unique, &letters) else { return Ok(kept("its name is too long")) };
        match self.replica.put(&path, entry, &Bytes::File(bytes, entry.size())) {
            Ok(()) => {}
            Err(Errno::EXIST) => return Ok(kept("another message of that name is there")),
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(kept("its folder is not there any more")),
            Err(source) => return Err(StoreError::Disk { path, source }),
        }
        self.synced(&path)?;
        self.folder(folder)?.insert(unique.to_vec(), path);
        Ok(Merged::Done)
    }

    /// A file where nothing is; directories on the way are made like the one they are in.
    fn file(&mut self, path: &RelPath, entry: &Entry, bytes: Option<&File>) -> Result<Merged, StoreError> {
        let disk = |source| StoreError::Disk { path: path.clone(), source };
        let Some(bytes) = bytes.filter(|_| entry.hash().is_some() && !path.is_root()) else { return Ok(kept("its bytes did not arrive")) };
        if let Some(there) = self.entry(path)? {
            return Ok(if there.hash() == entry.hash() { Merged::Already } else { kept("something else is there") });
        }
        let (mut missing, mut at) = (vec![], path.parent());
        let above = loop {
            let Some(dir) = at else { return Ok(kept("it has no place")) };
            match self.entry(&dir)? {
                Some(above) if above.is_dir() => break above,
                Some(_) => return Ok(kept("something else is where its directory was")),
                None => at = dir.parent(),
            }
            missing.push(dir);
        };
        for dir in missing.iter().rev() {
            self.dir(dir, &above)?;
        }
        match self.replica.put(path, entry, &Bytes::File(bytes, entry.size())) {
            Ok(()) => {}
            Err(Errno::EXIST) => return Ok(kept("something else is there")),
            Err(source) => return Err(disk(source)),
        }
        self.synced(path)?;
        Ok(Merged::Done)
    }

    fn rename_message(&mut self, at: &RelPath, was: &[u8], folder: &RelPath, unique: &[u8], flags: &Flags) -> Result<Merged, StoreError> {
        let letters = self.keywords.letters(&self.replica.root, folder, flags);
        let Some(to) = mailname::path(folder, unique, &letters) else { return Ok(kept("its name is too long")) };
        // A message that clients have seen stays where it is.
        let to = if letters.is_empty() && at.parent().is_some_and(|place| place.name() == b"cur") {
            folder.join(b"cur").and_then(|cur| cur.join(&[unique, b":2,"].concat())).unwrap_or(to)
        } else {
            to
        };
        if *at == to
            || (letters.is_empty()
                && Name::of(at).is_some_and(|name| name.letters.is_empty() && name.folder == *folder && name.unique == unique))
        {
            return Ok(Merged::Already);
        }
        match self.rename(at, &to)? {
            Ok(()) => {}
            Err(Errno::EXIST) => return Ok(kept("another message of that name is there")),
            Err(_) => return Ok(kept("it, or its folder, was moved meanwhile")),
        }
        if let Some(old) = at.parent().and_then(|place| place.parent()) {
            self.folder(&old)?.remove(was);
        }
        self.folder(folder)?.insert(unique.to_vec(), to);
        Ok(Merged::Done)
    }

    /// Renames where nothing is; both directories are synced.
    fn rename(&mut self, from: &RelPath, to: &RelPath) -> Result<Result<(), Errno>, StoreError> {
        let places = (|| Ok((self.replica.place_to_change(from)?, self.replica.place_to_change(to)?)))();
        let (source, target) = match places {
            Ok(places) => places,
            Err(error @ (Errno::NOENT | Errno::NOTDIR)) => return Ok(Err(error)),
            Err(source) => return Err(StoreError::Disk { path: from.clone(), source }),
        };
        let only_new = RenameFlags::NOREPLACE;
        match rfs::renameat_with(&source.dir, source.name.as_slice(), &target.dir, target.name.as_slice(), only_new) {
            Ok(()) => {
                self.synced(to)?;
                self.synced(from)?;
                Ok(Ok(()))
            }
            Err(error @ (Errno::NOENT | Errno::EXIST | Errno::NOTDIR)) => Ok(Err(error)),
            Err(source) => Err(StoreError::Disk { path: from.clone(), source }),
        }
    }

    fn rename_folder(&mut self, from: &RelPath, to: &RelPath) -> Result<Merged, StoreError> {
        let is_dir = |path: &RelPath| {
            let stat = self.replica.root.stat(path).map_err(|source| StoreError::Disk { path: path.clone(), source })?;
            Ok::<_, StoreError>(stat.map(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory))
        };
        match (is_dir(from)?, is_dir(to)?) {
            (None, Some(true)) => return Ok(Merged::Already),
            (Some(true), None) => {}
            (None, _) => return Ok(kept("the folder is not there any more")),
            _ => return Ok(kept("something else has the new name")),
        }
        let done = self.rename(from, to)?;
        self.folders.clear();
        self.keywords = Keywords::default();
        Ok(match done {
            Ok(()) => Merged::Done,
            Err(_) => kept("the folder, or the one it goes to, was moved meanwhile"),
        })
    }
}

pub(super) fn kept(why: &str) -> Merged {
    Merged::Kept { why: why.into() }
}
