//! The two nodes: who owns the rows, and how a path is brought to what its row says.
//!
//! What is to be at a path is made first, durably, under a name of ours in the root (one file system, and a directory that nobody removes); then it changes places with what is there.

use std::fs::File;
use std::io::Seek;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{FileType, RawDir};
use rustix::io::Errno;
use tokio::runtime::Handle;
use tokio::time::timeout;
use twinbox_protocol::entry::{Entry, Kind};
use twinbox_protocol::ids::{ContentHash, MirrorId};
use twinbox_protocol::path::RelPath;
use twinbox_resync::manifest::Reader;
use twinbox_resync::rows::Row;

use super::VerifyError;
use super::judge::{Able, Found, Looked, What};
use super::pace::Stop;
use super::record::Outcome;
use super::scrub::{Seen, look};
use crate::capture::{CaptureHandle, Command};
use crate::heal::remote::Remote;
use crate::link::paths::Paths;
use crate::standby::replica::{Bytes, Replica, kind};
use crate::standby::rescue::{Rescue, Why, remove_all};
use crate::standby::{How, Mend, Mended, StandbyHandle, attrs, copy};
use crate::sys::Probe;
use crate::tree::{self, Root};

/// How long a content may take from the other node.
const CONTENT_WITHIN: Duration = Duration::from_secs(600);
/// How long a connection is waited for.
const PEER_WITHIN: Duration = Duration::from_secs(10);
/// What stays free on a file system.
const RESERVE: u64 = 64 << 20;

/// Begin of the names of what is not in its place yet, or not any more.
pub(super) const MADE: &[u8] = b".twinbox-verify-";

/// One node's half of a mirror.
pub(crate) trait Side {
    /// Has rows committed, so that a reader beside their owner sees them.
    ///
    /// # Errors
    /// [`VerifyError::Ended`], [`VerifyError::NotNow`].
    fn ready(&mut self) -> Result<(), VerifyError> {
        Ok(())
    }

    /// Looks at paths as the owner of their rows.
    ///
    /// # Errors
    /// [`VerifyError::Ended`], [`VerifyError::NotNow`].
    fn look(&mut self, paths: Vec<RelPath>) -> Result<Vec<Looked>, VerifyError>;

    /// Brings a path to what its row says; `None` when it, or its row, is another by now.
    ///
    /// # Errors
    /// [`VerifyError::Ended`].
    fn repair(&mut self, path: &RelPath, seen: &Seen) -> Result<Option<Outcome>, VerifyError>;

    /// What an earlier run that was killed has left under a name of ours goes to rescue.
    fn left_behind(&mut self, path: &RelPath);

    /// What this disk can store.
    fn able(&self) -> Able;

    /// The mirror's position.
    fn lsn(&self) -> u64;
}

fn failed(why: impl Into<String>) -> Option<Outcome> {
    Some(Outcome::Failed { why: why.into() })
}

/// A name that nobody has.
fn made_name() -> RelPath {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos());
    let name = format!("{}{now}-{}", String::from_utf8_lossy(MADE), NEXT.fetch_add(1, Ordering::Relaxed));
    RelPath::new(name.as_bytes()).unwrap_or_default()
}

/// Why a path stays as it is.
enum Not {
    Changed,
    Failed(String),
}

impl From<Errno> for Not {
    fn from(errno: Errno) -> Self {
        Not::Failed(std::io::Error::from(errno).to_string())
    }
}

impl From<std::io::Error> for Not {
    fn from(error: std::io::Error) -> Self {
        Not::Failed(error.to_string())
    }
}

fn no(why: impl Into<String>) -> Not {
    Not::Failed(why.into())
}

fn has_room(root: &Root, size: u64) -> Result<(), Not> {
    let stat = rustix::fs::fstatvfs(root.fd())?;
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    if free < size.saturating_add(RESERVE) { Err(no("no room on this disk")) } else { Ok(()) }
}

/// Makes a file under a name of ours; durable when it returns.
fn make_file(replica: &mut Replica, made: &RelPath, entry: &Entry, bytes: &Bytes<'_>) -> Result<(), Not> {
    let put = |replica: &mut Replica| -> Result<(), Not> {
        has_room(&replica.root, entry.size())?;
        replica.put(made, entry, bytes)?;
        Ok(replica.file(made, false)?.sync_all()?)
    };
    let done = put(replica);
    if done.is_err() {
        let _ = replica.remove(made);
    }
    done
}

/// The standby: its rows are what its disk should be, always.
pub(crate) struct Standby {
    pub(crate) handle: StandbyHandle,
    /// The replica's tree, to make things in its root.
    pub(crate) replica: Replica,
    pub(crate) runtime: Handle,
    pub(crate) stop: Stop,
}

impl Standby {
    fn mend(&self, path: &RelPath, seen: &Seen, how: How) -> Result<Mended, VerifyError> {
        let wanted = seen.row.as_ref().map(|row| row.entry.clone());
        let mend = Mend { path: path.clone(), wanted, seen: seen.local, how };
        self.runtime.block_on(self.handle.mend(mend)).ok_or(VerifyError::Ended)
    }

    /// A file that has the content; of an empty one none is needed.
    fn source(&self, path: &RelPath, size: u64, hash: ContentHash) -> Result<Option<File>, Not> {
        if size == 0 {
            return Ok(None);
        }
        let good = |file: &File| copy::hash_on_disk(file).is_ok_and(|found| found == hash);
        let files = self.runtime.block_on(self.handle.holders(hash, path.clone())).unwrap_or_default();
        if let Some(file) = files.into_iter().find(good).or_else(|| self.handle.staged(hash)) {
            return Ok(Some(file));
        }
        let came = self.runtime.block_on(async {
            tokio::select! {
                came = self.handle.want(path.clone(), hash, CONTENT_WITHIN) => came.map_err(no),
                () = self.stop.stopped() => Err(Not::Changed),
            }
        });
        came.and_then(|()| self.handle.staged(hash).map(Some).ok_or_else(|| no("its content came, and was gone again: run it once more")))
    }

    fn place(&mut self, path: &RelPath, seen: &Seen, row: &Row) -> Result<Result<Mended, Not>, VerifyError> {
        let Kind::File { size, hash } = row.entry.kind else { return Ok(Ok(Mended::NoLink)) };
        let file = match self.source(path, size, hash) {
            Ok(file) => file,
            Err(not) => return Ok(Err(not)),
        };
        let made = made_name();
        let bytes = file.as_ref().map_or(Bytes::Here(&[]), |file| Bytes::File(file, size));
        let placed = match make_file(&mut self.replica, &made, &row.entry, &bytes) {
            Ok(()) => self.mend(path, seen, How::Place(made.clone())).map(Ok),
            Err(not) => Ok(Err(not)),
        };
        self.handle.let_go(hash);
        if !matches!(placed, Ok(Ok(Mended::Done(_)))) {
            let _ = self.replica.remove(&made); // What could not be kept is still there under this name.
            let _ = self.runtime.block_on(self.handle.look(vec![]));
        }
        self.replica.dirs.clear();
        placed
    }
}

impl Side for Standby {
    fn ready(&mut self) -> Result<(), VerifyError> {
        self.handle.checkpoint();
        Side::look(self, vec![]).map(drop)
    }

    fn look(&mut self, paths: Vec<RelPath>) -> Result<Vec<Looked>, VerifyError> {
        let looked = self.runtime.block_on(self.handle.look(paths)).ok_or(VerifyError::Ended)?;
        looked.map_err(|error| VerifyError::NotNow(error.to_string()))
    }

    fn repair(&mut self, path: &RelPath, seen: &Seen) -> Result<Option<Outcome>, VerifyError> {
        let how = match (&seen.row, seen.what) {
            (None, _) => How::Remove,
            (Some(_), What::Attributes) => How::Attributes,
            (Some(row), _) if row.entry.hash().is_none() => How::Make,
            (Some(row), _) => {
                let linked = if seen.local.is_none() { self.mend(path, seen, How::Link)? } else { Mended::NoLink };
                let mended = match linked {
                    Mended::NoLink => self.place(path, seen, row)?,
                    other => Ok(other),
                };
                return Ok(match mended {
                    Ok(mended) => told(mended),
                    Err(Not::Changed) => None,
                    Err(Not::Failed(why)) => failed(why),
                });
            }
        };
        let mended = self.mend(path, seen, how)?;
        if seen.what == What::Attributes && matches!(mended, Mended::Done(_)) {
            let again = Side::look(self, vec![path.clone()])?.into_iter().next();
            let now = again.and_then(|looked| looked.found.ok().flatten()).map(|found| found.entry);
            if let (Some(now), Some(row)) = (now, &seen.row)
                && super::judge::differ_in_attributes(&row.entry, &now, &self.able())
            {
                return Ok(failed("this file system does not store it"));
            }
        }
        Ok(told(mended))
    }

    fn left_behind(&mut self, path: &RelPath) {
        let seen = self.replica.stat(path).ok().flatten().as_ref().map(tree::local);
        let mend = Mend { path: path.clone(), wanted: None, seen, how: How::Remove };
        if let Some(Mended::Done(Some(kept))) = self.runtime.block_on(self.handle.mend(mend)) {
            tracing::warn!(kept = %kept.display(), "a verify that was cut short had left this: it is kept");
        }
    }

    fn able(&self) -> Able {
        let lost = self.handle.status().lost_metadata.into_iter().filter(|(_, count)| *count > 0).map(|(kind, _)| kind).collect();
        Able { ordinary: !rustix::process::geteuid().is_root(), lost }
    }

    fn lsn(&self) -> u64 {
        self.handle.status().applied.0
    }
}

fn told(mended: Mended) -> Option<Outcome> {
    match mended {
        Mended::Done(kept) => Some(Outcome::Repaired { kept }),
        Mended::Changed => None,
        Mended::NoLink => failed("its content cannot be had"),
        Mended::Failed(why) => failed(why),
    }
}

/// The primary: what differs from its row is a change that no event told of, unless inode and change time are the row's. Then it is the disk that changed.
pub(crate) struct Primary {
    capture: CaptureHandle,
    replica: Replica,
    rows: Reader,
    rescue: Rescue,
    mirror_dir: PathBuf,
    mirror: String,
    mirror_id: MirrorId,
    paths: Option<Arc<Paths>>,
    remote: Option<Remote>,
    runtime: Handle,
    stop: Stop,
}

impl Primary {
    pub(crate) fn new(
        capture: CaptureHandle,
        replica: Replica,
        mirror_dir: &Path,
        mirror: (&str, MirrorId),
        paths: Option<Arc<Paths>>,
        stop: Stop,
    ) -> Result<Self, VerifyError> {
        Ok(Primary {
            capture,
            replica,
            rows: Reader::open(&mirror_dir.join("manifest.db"))?,
            rescue: Rescue::new(mirror_dir),
            mirror_dir: mirror_dir.into(),
            mirror: mirror.0.into(),
            mirror_id: mirror.1,
            paths,
            remote: None,
            runtime: Handle::current(),
            stop,
        })
    }

    fn recheck(&self, paths: Vec<RelPath>) -> Option<Outcome> {
        self.capture.send(Command::Recheck(paths));
        Some(Outcome::Sent)
    }

    /// A content that this disk has lost, from the standby.
    fn fetch(&mut self, path: &RelPath, size: u64, hash: ContentHash) -> Result<File, Not> {
        let mut file = tempfile::tempfile_in(&self.mirror_dir)?;
        let paths = self.paths.clone().ok_or_else(|| no("no standby is known that may have its content"))?;
        let (mut remote, stop, runtime) = (self.remote.take(), self.stop.clone(), self.runtime.clone());
        let fetched = async {
            let mut open = match remote.take() {
                Some(open) => open,
                None => {
                    let connection = timeout(PEER_WITHIN, paths.connection()).await;
                    let connection = connection.map_err(|_| no("the standby, which may have its content, does not answer"))?;
                    Remote::borrow(&connection, &self.mirror, self.mirror_id).await.map_err(|error| no(error.to_string()))?
                }
            };
            let had = open.fetch(path, hash, size, &mut file).await.map_err(|error| no(error.to_string()))?;
            Ok::<_, Not>((open, had.is_some()))
        };
        let (open, had) = runtime.block_on(async {
            tokio::select! {
                had = timeout(CONTENT_WITHIN, fetched) => had.unwrap_or_else(|_| Err(no("its content did not come in time"))),
                () = stop.stopped() => Err(Not::Changed),
            }
        })?;
        self.remote = Some(open);
        if !had {
            return Err(no("the standby's file is not what it should be either: run `twinbox verify --repair` there"));
        }
        file.rewind()?;
        Ok(file)
    }

    /// Makes what a row says, and everything the rows have below it, under a name of ours.
    fn make(&mut self, path: &RelPath, entry: &Entry, made: &RelPath) -> Result<(), Not> {
        match entry.kind {
            Kind::File { size: 0, .. } => make_file(&mut self.replica, made, entry, &Bytes::Here(&[])),
            Kind::File { size, hash } => {
                has_room(&self.replica.root, size)?;
                let file = self.fetch(path, size, hash)?;
                make_file(&mut self.replica, made, entry, &Bytes::File(&file, size))
            }
            Kind::Dir => {
                self.replica.make(made, entry)?;
                let mut after = vec![];
                loop {
                    let rows = self.rows.children_after(path, &after, 256).map_err(|error| no(error.to_string()))?;
                    let Some((last, _)) = rows.last() else { break };
                    after.clone_from(last);
                    for (name, row) in rows {
                        if let (Some(from), Some(to)) = (path.join(&name), made.join(&name)) {
                            self.make(&from, &row.entry, &to)?;
                        }
                    }
                }
                Ok(self.replica.set_attrs(made, entry)?)
            }
            _ => Ok(self.replica.make(made, entry)?),
        }
    }

    /// Whether row and disk are what they were when they were judged.
    fn is_still(&mut self, path: &RelPath, seen: &Seen) -> Result<(), Not> {
        let looked = Side::look(self, vec![path.clone()]).map_err(|error| no(error.to_string()))?;
        let same = looked.into_iter().next().is_some_and(|looked| {
            let local = looked.found.as_ref().ok().and_then(Option::as_ref).map(|found| found.local);
            let unreadable = looked.found.is_err() && seen.local.is_some();
            !looked.busy && looked.row == seen.row && (local == seen.local || unreadable)
        });
        if same { Ok(()) } else { Err(Not::Changed) }
    }

    fn ino(&mut self, path: &RelPath) -> Option<u64> {
        self.replica.stat(path).ok().flatten().map(|stat| stat.st_ino)
    }

    /// Nobody has it open for writing: what he writes there would be in rescue, and not where it belongs.
    fn is_at_rest(&mut self, path: &RelPath) -> Result<bool, Not> {
        if self.replica.stat(path)?.is_none_or(|stat| kind(&stat) != FileType::RegularFile) {
            return Ok(true);
        }
        let file = match self.replica.file(path, false) {
            Err(Errno::IO) => return Ok(true), // The disk does not even let it be opened.
            other => other?,
        };
        match self.replica.root.probe(file.as_fd()) {
            Probe::Quiet => Ok(true),
            Probe::Writer => Ok(false),
            Probe::Unable => {
                Err(no("this file system does not tell whether somebody writes to it: stop the mail server, and put it back by hand"))
            }
        }
    }

    /// Something else than what was judged has been set aside, in favour of ours (`stale`): back, so that what came last stays. What was overtaken is kept.
    fn back(&mut self, made: &RelPath, path: &RelPath, mut stale: Option<u64>) -> Result<(), Not> {
        let ours = stale;
        loop {
            let aside = self.ino(made);
            match self.replica.exchange(made, path) {
                Ok(()) => {}
                Err(Errno::NOENT) => break, // Removed meanwhile: so is what it was put there instead of.
                Err(other) => return Err(other.into()),
            }
            if self.ino(made) == stale {
                break;
            }
            stale = aside;
        }
        if self.ino(made) == ours {
            Ok(self.replica.remove(made)?)
        } else {
            self.rescue.take_as(&mut self.replica, made, path, Why::Verify)?;
            Ok(())
        }
    }

    /// Puts what the row says where something else is, or nothing.
    fn restore(&mut self, path: &RelPath, row: &Row, seen: &Seen) -> Result<Outcome, Not> {
        let made = made_name();
        let whole = self.make(path, &row.entry, &made);
        let ours = self.ino(&made);
        let done = whole.and_then(|()| self.place(path, seen, &made));
        // What was there may be under this name by now: that stays.
        if done.is_err() && ours.is_some() && self.ino(&made) == ours {
            let _ = remove_all(&mut self.replica, &made);
        }
        done
    }

    fn place(&mut self, path: &RelPath, seen: &Seen, made: &RelPath) -> Result<Outcome, Not> {
        self.is_still(path, seen)?;
        let Some(local) = seen.local else {
            return match self.replica.rename_to_free(made, path) {
                Err(Errno::EXIST) => Err(Not::Changed),
                done => Ok(done.map(|()| Outcome::Repaired { kept: None })?),
            };
        };
        let ours = self.ino(made);
        if !self.is_at_rest(path)? {
            return Err(no("somebody has it open for writing: try again later"));
        }
        // Further names of ours for the other names of the damaged file.
        let mut others = vec![];
        if seen.entry.as_ref().is_some_and(|entry| entry.hash().is_some()) {
            for other in self.names_of(path, local.ino) {
                let another = made_name();
                self.replica.link(made, &another)?;
                others.push((another, other));
            }
        }
        let placed = self.change_places(made, path, seen, local.ino, ours);
        for (another, other) in others {
            let swapped = placed.is_ok() && self.ino(&other) == Some(local.ino) && self.replica.exchange(&another, &other).is_ok();
            if swapped && self.ino(&another) != Some(local.ino) {
                self.back(&another, &other, ours)?;
            } else {
                // Ours, or the damaged file, of which there is a name in rescue.
                self.replica.remove(&another)?;
            }
        }
        placed
    }

    fn change_places(&mut self, made: &RelPath, path: &RelPath, seen: &Seen, judged: u64, ours: Option<u64>) -> Result<Outcome, Not> {
        match self.replica.exchange(made, path) {
            Ok(()) => {}
            Err(Errno::NOENT) => return Err(Not::Changed),
            Err(Errno::INVAL | Errno::NOSYS) => {
                return Err(no("this file system cannot exchange two names: stop the mail server, and put it back by hand"));
            }
            Err(other) => return Err(other.into()),
        }
        // Somebody may have written to it, or put another there, until it was exchanged: his is the last word, and the capture sends it.
        let hash = seen.entry.as_ref().and_then(Entry::hash).filter(|hash| hash.0 != [0; 32]);
        let same = self.ino(made) == Some(judged)
            && self.is_at_rest(made).unwrap_or(false)
            && hash.is_none_or(|hash| self.replica.file(made, false).is_ok_and(|file| copy::hash(&file).is_ok_and(|found| found == hash)));
        if !same {
            self.back(made, path, ours)?;
            return Err(Not::Changed);
        }
        match self.rescue.take_as(&mut self.replica, made, path, Why::Verify) {
            Ok(kept) => Ok(Outcome::Repaired { kept: Some(kept) }),
            // It stays under the name of ours; the next run tries again.
            Err(error) => Err(no(format!("put back, but what was there is left as {made} in the root: {}", std::io::Error::from(error)))),
        }
    }

    /// Other names of the damaged file, as the rows know them.
    fn names_of(&self, path: &RelPath, ino: u64) -> Vec<RelPath> {
        let (reply, names) = tokio::sync::oneshot::channel();
        self.capture.send(Command::NamesOf(ino, reply));
        let mut names = self.runtime.block_on(names).unwrap_or_default();
        names.retain(|name| name != path);
        names
    }

    /// Another name that a missing file has in its mailbox: nobody saw that it was renamed.
    fn elsewhere(&mut self, path: &RelPath, row: &Row) -> Option<RelPath> {
        let (local, dir) = (row.local?, path.parent()?);
        row.entry.hash()?;
        let sibling = match dir.name() {
            b"cur" => dir.parent()?.join(b"new"),
            b"new" => dir.parent()?.join(b"cur"),
            _ => None,
        };
        for dir in [Some(dir), sibling].into_iter().flatten() {
            let Ok(fd) = self.replica.root.dir_for_reading(&dir) else { continue };
            let mut buffer = Vec::with_capacity(32 * 1024);
            let mut reader = RawDir::new(fd, buffer.spare_capacity_mut());
            while let Some(Ok(entry)) = reader.next() {
                if entry.ino() == local.ino
                    && let Some(name) = dir.join(entry.file_name().to_bytes())
                    && self.replica.stat(&name).ok().flatten().is_some_and(|stat| tree::mtime(&stat) == row.entry.mtime)
                {
                    return Some(name);
                }
            }
        }
        None
    }

    fn mend(&mut self, path: &RelPath, seen: &Seen) -> Result<Option<Outcome>, Not> {
        let Some(row) = &seen.row else { return Ok(self.recheck(vec![path.clone()])) };
        // A change moves the ctime. Where that is the row's, the disk has changed by itself.
        let by_itself = seen.local.is_none_or(|local| row.local == Some(local));
        match seen.what {
            What::Extra => Ok(self.recheck(vec![path.clone()])),
            _ if !by_itself => Ok(self.recheck(vec![path.clone()])),
            What::Attributes => {
                self.is_still(path, seen)?;
                let handle = self.replica.handle(path)?;
                if Some(tree::local(&rustix::fs::fstat(&handle)?)) != seen.local {
                    return Err(Not::Changed);
                }
                attrs::set(handle.as_fd(), &row.entry, self.replica.ordinary, &mut attrs::Lost::new())?;
                Ok(Some(Outcome::Repaired { kept: None }))
            }
            What::Missing => match self.elsewhere(path, row) {
                Some(name) => Ok(self.recheck(vec![path.clone(), name])),
                None => self.restore(path, row, seen).map(Some),
            },
            What::Content | What::Type => self.restore(path, row, seen).map(Some),
        }
    }
}

impl Side for Primary {
    fn look(&mut self, paths: Vec<RelPath>) -> Result<Vec<Looked>, VerifyError> {
        // The disk first: what changed before this look, the capture has taken out of its queue when it answers.
        let found: Vec<Result<Option<Found>, Errno>> = paths.iter().map(|path| look(&self.replica.root, path)).collect();
        let known = self.runtime.block_on(self.capture.ask(|reply| Command::Known(paths, reply))).ok_or(VerifyError::Ended)?;
        let known = known.ok_or_else(|| {
            VerifyError::NotNow("the standby is being brought up to date, or too much has changed while it was away".into())
        })?;
        let one = |(known, found): (crate::capture::verify::Known, Result<Option<Found>, Errno>)| Looked {
            row: known.row,
            // Row and disk differ because it cannot be read.
            busy: known.busy,
            found: if known.unreadable && found.is_ok() { Err(Errno::IO) } else { found },
        };
        Ok(known.into_iter().zip(found).map(one).collect())
    }

    fn repair(&mut self, path: &RelPath, seen: &Seen) -> Result<Option<Outcome>, VerifyError> {
        let mended = self.mend(path, seen);
        self.replica.dirs.clear(); // Times of directories are the mail server's here: they tell it that something is new.
        Ok(match mended {
            Ok(outcome) => outcome,
            Err(Not::Changed) => None,
            Err(Not::Failed(why)) => failed(why),
        })
    }

    fn left_behind(&mut self, path: &RelPath) {
        match self.rescue.take(&mut self.replica, path, Why::Verify) {
            Ok(kept) => tracing::warn!(kept = %kept.display(), "a verify that was cut short had left this: it is kept"),
            Err(error) => {
                tracing::error!(%error, "a verify that was cut short has left something under a name of ours in the root that cannot be moved to rescue")
            }
        }
        self.replica.dirs.clear();
    }

    fn able(&self) -> Able {
        Able { ordinary: !rustix::process::geteuid().is_root(), ..Able::default() }
    }

    fn lsn(&self) -> u64 {
        self.capture.status().lsn.1.0
    }
}
