//! Single paths of the replica, looked at and mended for `verify`, between two txns: row and disk are of one moment then.
//!
//! Mending brings a path to what its row says. What is to be there is made elsewhere, durably, under a name of our own in the root, by the thread that verifies; here it changes places with what is there, which then
//! goes to rescue: the path is never empty, and nothing is read or written for long. Rows do not change but for what this machine notes of its files.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Duration;

use rustix::fs::FileType;
use rustix::io::Errno;
use tokio::sync::oneshot;
use tokio::time::timeout;
use twinbox_protocol::entry::Entry;
use twinbox_protocol::ids::ContentHash;
use twinbox_protocol::path::RelPath;
use twinbox_resync::rows::{Local, Row, Rows};

use super::StandbyHandle;
use super::applier::{Applier, Cmd};
use super::apply::at;
use super::error::{OpError, StandbyError};
use super::replica::{is_dir, kind, same_type};
use super::rescue::Why;
use crate::tree;
use crate::verify::judge::{Found, Looked};

/// How a path is brought to what its row says.
#[derive(Debug, Clone)]
pub(crate) enum How {
    /// It goes: there is no row.
    Remove,
    /// Owner, mode, times.
    Attributes,
    /// A directory, link, pipe or device is made.
    Make,
    /// It is another name of a file that is as noted.
    Link,
    /// What was made under this name takes its place.
    Place(RelPath),
}

/// A path that is to be mended.
#[derive(Debug)]
pub(crate) struct Mend {
    pub(crate) path: RelPath,
    /// Its row, when it was judged.
    pub(crate) wanted: Option<Entry>,
    /// What was there then.
    pub(crate) seen: Option<Local>,
    pub(crate) how: How,
}

/// What became of a path.
#[derive(Debug)]
pub(crate) enum Mended {
    /// It is as its row says; what was there is kept here.
    Done(Option<PathBuf>),
    /// No other name of the file is known to be well.
    NoLink,
    /// Its row, or what is there, is another by now.
    Changed,
    /// The disk does not do it.
    Failed(String),
}

impl Applier {
    pub(super) fn look_at(&mut self, paths: Vec<RelPath>) -> Result<Vec<Looked>, StandbyError> {
        if paths.is_empty() {
            // A name of ours came or went in the root, and nothing else: its times are to be as they were.
            self.begin()?;
            self.replica.dirs.insert(RelPath::root());
        }
        let mut all = vec![];
        for path in paths {
            let row = self.manifest.row(&path)?;
            let found = self.found(&path);
            all.push(Looked { row, found, busy: false });
        }
        Ok(all)
    }

    fn found(&mut self, path: &RelPath) -> Result<Option<Found>, Errno> {
        let Some(stat) = self.replica.stat(path)? else { return Ok(None) };
        let handle = self.replica.handle(path)?;
        let file = if kind(&stat) == FileType::RegularFile { Some(self.replica.file(path, false)?) } else { None };
        Found::of(handle.as_fd(), file)
    }

    /// Only what ends all work is an error.
    pub(super) fn mend(&mut self, mend: &Mend) -> Result<Mended, StandbyError> {
        let row = self.manifest.row(&mend.path)?;
        if row.as_ref().map(|row| &row.entry) != mend.wanted.as_ref() {
            return Ok(Mended::Changed);
        }
        self.begin()?;
        self.replica.dirs.insert(RelPath::root());
        let mended = self.try_mend(mend, row);
        self.restore_dirs()?;
        self.trouble.clear();
        match mended {
            Err(OpError::Fatal(error)) => Err(error),
            Err(OpError::Sys(_, Errno::NOENT | Errno::NOTDIR)) => Ok(Mended::Failed("its directory is not there: run it once more".into())),
            Err(OpError::Sys(_, errno)) => Ok(Mended::Failed(std::io::Error::from(errno).to_string())),
            Err(OpError::Rows(error)) => Ok(Mended::Failed(error.to_string())),
            Err(OpError::Content(_)) => Ok(Mended::Failed("its content cannot be had".into())),
            Ok(mended) => Ok(mended),
        }
    }

    fn try_mend(&mut self, mend: &Mend, row: Option<Row>) -> Result<Mended, OpError> {
        let path = &mend.path;
        let stat = self.replica.stat(path).map_err(at(path))?;
        // A directory's ctime moves with what is applied in it.
        let same = match (&stat, mend.seen) {
            (Some(stat), Some(seen)) if is_dir(stat) => stat.st_ino == seen.ino,
            (stat, seen) => stat.as_ref().map(tree::local) == seen,
        };
        if !same {
            return Ok(Mended::Changed);
        }
        let Some(Row { entry, local }) = row else {
            return Ok(Mended::Done(self.keep(path)?));
        };
        match &mend.how {
            How::Remove => Ok(Mended::Changed),
            How::Attributes => {
                self.replica.set_attrs(path, &entry).map_err(at(path))?;
                self.landed(path)?;
                Ok(Mended::Done(None))
            }
            How::Make if !self.replica.can_make(&entry) => Ok(Mended::Failed("only root can make devices".into())),
            How::Make => {
                let stays = stat.is_some_and(|stat| is_dir(&stat) && same_type(&stat, &entry));
                let kept = if stays { None } else { self.keep(path)? };
                self.replica.make(path, &entry).map_err(at(path))?;
                self.landed(path)?;
                Ok(Mended::Done(kept))
            }
            How::Link => {
                let Some(local) = local.filter(|_| stat.is_none()) else { return Ok(Mended::NoLink) };
                for other in self.names_of(local.ino)? {
                    let known = self.manifest.row(&other)?.is_some_and(|row| row.entry == entry && row.local == Some(local));
                    let here = self.replica.stat(&other).map_err(at(&other))?;
                    if other != *path && known && here.as_ref().map(tree::local) == Some(local) {
                        self.replica.link(&other, path).map_err(at(path))?;
                        self.landed(path)?;
                        return Ok(Mended::Done(None));
                    }
                }
                Ok(Mended::NoLink)
            }
            How::Place(made) => {
                let kept = match &stat {
                    None => {
                        self.replica.rename_to_free(made, path).map_err(at(path))?;
                        None
                    }
                    Some(_) => match self.replica.exchange(made, path) {
                        Ok(()) => Some(self.rescue.take_as(&mut self.replica, made, path, Why::Verify).map_err(at(made))?),
                        // A file system that cannot.
                        Err(Errno::INVAL | Errno::NOSYS) => {
                            let kept = self.keep(path)?;
                            self.replica.rename_to_free(made, path).map_err(at(path))?;
                            kept
                        }
                        Err(other) => return Err(at(path)(other)),
                    },
                };
                self.landed(path)?;
                // Other names of what was there.
                if let Some(was) = stat.filter(|stat| stat.st_nlink > 1 && !is_dir(stat)) {
                    for other in self.names_of(was.st_ino)? {
                        let known = self
                            .manifest
                            .row(&other)?
                            .is_some_and(|row| row.entry == entry && row.local.is_some_and(|l| l.ino == was.st_ino));
                        let here = self.replica.stat(&other).map_err(at(&other))?;
                        if other != *path && known && here.is_some_and(|stat| stat.st_ino == was.st_ino) {
                            self.replica.link(path, &other).map_err(at(&other))?;
                            self.landed(&other)?;
                        }
                    }
                }
                Ok(Mended::Done(kept))
            }
        }
    }

    fn names_of(&self, ino: u64) -> Result<Vec<RelPath>, OpError> {
        self.manifest.by_ino(ino).map_err(|e| OpError::Fatal(self.manifest.state_error(&e).into()))
    }

    /// Whatever is at `path` goes to rescue.
    fn keep(&mut self, path: &RelPath) -> Result<Option<PathBuf>, OpError> {
        if self.replica.stat(path).map_err(at(path))?.is_none() {
            return Ok(None);
        }
        let kept = self.rescue.take(&mut self.replica, path, Why::Verify).map_err(at(path))?;
        self.rescued += 1;
        Ok(Some(kept))
    }
}

impl Found {
    /// What a handle leads to; `file` is the same thing, open for reading.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn of(handle: std::os::fd::BorrowedFd<'_>, file: Option<File>) -> Result<Option<Found>, Errno> {
        // Of the open file: what is read is what was looked at.
        let stat = match &file {
            Some(file) => rustix::fs::fstat(file)?,
            None => rustix::fs::fstat(handle)?,
        };
        let xattrs = tree::xattrs(handle, true)?;
        let target = match kind(&stat) {
            FileType::Symlink => Some(rustix::fs::readlinkat(handle, c"", vec![])?.into_bytes()),
            _ => None,
        };
        Ok(tree::entry(&stat, xattrs, None, target).map(|entry| Found { entry, local: tree::local(&stat), file }))
    }
}

impl StandbyHandle {
    /// What is at some paths, and their rows; `None` when the standby has stopped.
    pub(crate) async fn look(&self, paths: Vec<RelPath>) -> Option<Result<Vec<Looked>, StandbyError>> {
        let (reply, answer) = oneshot::channel();
        let reply = Box::new(move |looked| drop(reply.send(looked)));
        self.applier.send(Cmd::Look { paths, reply }).ok()?;
        answer.await.ok()
    }

    /// Asks for a checkpoint: what is asked for after this is answered after it.
    pub(crate) fn checkpoint(&self) {
        let _ = self.applier.send(Cmd::Checkpoint);
    }

    /// Brings a path to what its row says, if that and what is there are still what they were; `None` when the standby has stopped.
    pub(crate) async fn mend(&self, mend: Mend) -> Option<Mended> {
        let (reply, answer) = oneshot::channel();
        let reply = Box::new(move |mended| drop(reply.send(mended)));
        self.applier.send(Cmd::Mend { mend, reply }).ok()?;
        answer.await.ok()
    }

    /// Files of the replica that should hold a content; `path` may be one.
    pub(crate) async fn holders(&self, hash: ContentHash, path: RelPath) -> Option<Vec<File>> {
        let (reply, answer) = oneshot::channel();
        let reply = Box::new(move |files| drop(reply.send(files)));
        self.applier.send(Cmd::Fetch { hash, hint: Some(path), reply }).ok()?;
        answer.await.ok()
    }

    /// A content that is staged.
    pub(crate) fn staged(&self, hash: ContentHash) -> Option<File> {
        self.staging.size(hash)?;
        self.staging.object(hash).ok()
    }

    /// It is not needed any more.
    pub(crate) fn let_go(&self, hash: ContentHash) {
        self.staging.release(hash);
    }

    /// Has a content sent by the primary, into staging.
    ///
    /// # Errors
    /// Why it did not come.
    pub(crate) async fn want(&self, path: RelPath, hash: ContentHash, within: Duration) -> Result<(), &'static str> {
        let Some(session) = self.shared.session().filter(|session| !session.is_over()) else {
            return Err("the primary, which may have it, is not connected");
        };
        let (mut arrivals, mut over) = (session.arrivals(), session.watch());
        session.want(path, hash);
        let came = async {
            loop {
                if self.staging.size(hash).is_some() {
                    return Ok(());
                }
                if session.is_lacking(hash) {
                    return Err("the primary does not have its content any more");
                }
                tokio::select! {
                    changed = arrivals.changed() => if changed.is_err() { return Err("the session ended") },
                    _ = over.wait_for(Option::is_some) => return Err("the session with the primary ended before its content came"),
                }
            }
        };
        timeout(within, came).await.unwrap_or(Err("its content did not come in time"))
    }
}
