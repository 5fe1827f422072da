//! One run over a mirror: directory by directory in the order of their bytes, so that it can go on where it was cut short.

use std::collections::{BTreeSet, VecDeque};
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::fs::FileType;
use rustix::io::Errno;
use twinbox_protocol::entry::Entry;
use twinbox_protocol::ids::ContentHash;
use twinbox_protocol::path::{NAME_MAX, RelPath};
use twinbox_resync::manifest::Reader;
use twinbox_resync::rows::{Local, Row};

use super::VerifyError;
use super::judge::{Able, Found, Glance, Looked, What, glance};
use super::pace::{Pace, Stop};
use super::record::{FINDINGS_MAX, Finding, Outcome, Record, hex, unhex};
use super::sides::{MADE, Side};
use crate::layout::Selection;
use crate::standby::copy;
use crate::standby::replica::kind;
use crate::status::rfc3339;
use crate::tree::{self, Root};

/// Rows read at a time.
const PIECE: usize = 512;
/// Bytes read at a time.
const READ: usize = 256 * 1024;
/// Between two looks at a suspect.
pub(crate) const AGAIN: Duration = Duration::from_secs(1);
/// Looks at a path that is another each time.
const LOOKS_MAX: u32 = 30;
/// Suspects asked about at once.
const ASKED: usize = 64;
/// More suspects wait for their next look before it goes on.
const SUSPECTS_MAX: usize = 2_000;
/// How often it is stored where it is.
const STORE: Duration = Duration::from_secs(5);

/// What was seen at one look by the row's owner.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Seen {
    pub(crate) row: Option<Row>,
    /// With its content's name, where that was read.
    pub(crate) entry: Option<Entry>,
    pub(crate) local: Option<Local>,
    pub(crate) what: What,
}

struct Suspect {
    path: RelPath,
    due: Instant,
    looks: u32,
    last: Option<Seen>,
}

/// What a run works on.
pub(crate) struct Scrub<S> {
    pub(crate) root: Root,
    pub(crate) rows: Reader,
    pub(crate) selection: Selection,
    pub(crate) mirror_dir: PathBuf,
    pub(crate) side: S,
    pub(crate) stop: Stop,
    pub(crate) rate: Option<u64>,
    /// Between two looks at a suspect: [`AGAIN`].
    pub(crate) again: Duration,
    pub(crate) record: Record,
    /// Where others see how far it is.
    pub(crate) shown: Arc<Mutex<Record>>,
}

/// A run.
struct Run<S> {
    of: Scrub<S>,
    able: Able,
    pace: Pace,
    suspects: VecDeque<Suspect>,
    /// Directories of which only the time differs: judged at the end, for what was found in one explains it.
    quiet: Vec<(RelPath, Seen)>,
    since: Instant,
    spent: f64,
    stored: Instant,
}

impl<S: Side> Scrub<S> {
    /// Runs until everything was compared, or it is told to stop; gives what is remembered of it, which is stored.
    ///
    /// # Errors
    /// [`VerifyError`]: it can be continued.
    pub(crate) fn run(self) -> Result<Record, VerifyError> {
        let pace = Pace::new(self.rate, self.stop.clone());
        let (now, spent, able) = (Instant::now(), self.record.seconds, self.side.able());
        let mut run = Run { of: self, able, pace, suspects: VecDeque::new(), quiet: vec![], since: now, spent, stored: now };
        let done = run.everything();
        // What was done until an error is remembered, too.
        let stored = run.store();
        done.and(stored)?;
        Ok(run.of.record)
    }
}

impl<S: Side> Run<S> {
    fn everything(&mut self) -> Result<(), VerifyError> {
        self.of.side.ready()?;
        if self.of.record.cursor.is_none() {
            self.of.record.total = self.of.rows.count()?;
            self.of.record.paths = 1;
            self.suspect(RelPath::root());
        }
        let open = std::mem::take(&mut self.of.record.suspects);
        let open = open.iter().filter_map(|path| unhex(path)).filter_map(|bytes| RelPath::new(&bytes).ok());
        open.for_each(|path| self.suspect(path));
        self.clear()?;
        let (mut dir, mut after) = self.of.record.done_to().unwrap_or_default();
        self.store()?;
        loop {
            self.directory(&dir, after)?;
            if !self.goes_on() {
                return Ok(());
            }
            let Some(next) = self.of.rows.dir_after(&dir)? else { break };
            (dir, after) = (next, vec![]);
        }
        while !self.suspects.is_empty() && self.goes_on() {
            self.next_look()?;
        }
        self.judge_quiet()?;
        if self.goes_on() {
            let now = SystemTime::now();
            self.of.record.ended = Some(rfc3339(now));
            self.of.record.ended_s = Some(now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()));
            self.of.record.lsn = self.of.side.lsn();
            self.of.record.cursor = None;
        }
        Ok(())
    }

    /// What an earlier run that was killed left in the root.
    fn clear(&mut self) -> Result<(), VerifyError> {
        self.is_in_place()?;
        for path in
            self.list(&RelPath::root()).into_iter().filter(|name| name.starts_with(MADE)).filter_map(|name| RelPath::new(&name).ok())
        {
            self.of.side.left_behind(&path);
        }
        Ok(())
    }

    fn is_in_place(&self) -> Result<(), VerifyError> {
        if self.of.root.is_in_place() { Ok(()) } else { Err(VerifyError::RootGone(self.of.root.path().display().to_string())) }
    }

    /// Remembers where it is: a run that is cut short after this goes on from here.
    fn store(&mut self) -> Result<(), VerifyError> {
        self.show();
        let open = self.suspects.iter().map(|suspect| &suspect.path).chain(self.quiet.iter().map(|(path, _)| path));
        self.of.record.suspects = open.map(|path| hex(path.as_bytes())).collect();
        let stored = self.of.record.store(&self.of.mirror_dir);
        self.of.record.suspects.clear();
        self.stored = Instant::now();
        stored
    }

    fn goes_on(&self) -> bool {
        !self.of.stop.is_stopped()
    }

    fn show(&mut self) {
        self.of.record.seconds = self.spent + self.since.elapsed().as_secs_f64();
        let record = &self.of.record;
        if let Ok(mut shown) = self.of.shown.lock() {
            (shown.seconds, shown.total, shown.paths, shown.bytes) = (record.seconds, record.total, record.paths, record.bytes);
            (shown.differences, shown.repaired, shown.busy) = (record.differences, record.repaired, record.busy);
        }
    }

    fn suspect(&mut self, path: RelPath) {
        self.suspects.push_back(Suspect { path, due: Instant::now(), looks: 0, last: None });
    }

    /// Everything in one directory after a name, a piece at a time, at first by what is easily had: rows may be seconds old.
    fn directory(&mut self, dir: &RelPath, mut after: Vec<u8>) -> Result<(), VerifyError> {
        let mut names = self.list(dir);
        names.sort_unstable();
        let mut names = names.into_iter().peekable();
        while names.next_if(|name| *name <= after).is_some() {}
        loop {
            self.is_in_place()?;
            let (paths, suspects) = (self.of.record.paths, self.suspects.len());
            let rows = self.of.rows.children_after(dir, &after, PIECE)?;
            let last = rows.last().map(|(name, _)| name.clone());
            for (name, row) in rows {
                while let Some(extra) = names.next_if(|listed| *listed < name) {
                    self.extra(dir, &extra);
                }
                let _ = names.next_if(|listed| *listed == name);
                let Some(path) = dir.join(&name) else { continue };
                if self.of.selection.excludes(path.as_bytes(), row.entry.is_dir()) {
                    continue; // Excluded since.
                }
                self.of.record.paths += 1;
                if row.entry.is_dir() && self.of.rows.is_empty_dir(&path)? {
                    // No row is in it, so it is no directory of its own here.
                    self.list(&path).iter().for_each(|name| self.extra(&path, name));
                }
                if !self.agrees(&path, &row) {
                    self.suspect(path);
                }
                if !self.goes_on() {
                    // This piece is compared again as a whole.
                    self.of.record.paths = paths;
                    self.suspects.truncate(suspects);
                    return Ok(());
                }
            }
            if last.is_none() {
                names.by_ref().for_each(|name| self.extra(dir, &name));
            }
            after = last.clone().unwrap_or_else(|| vec![0xff; NAME_MAX + 1]);
            self.of.record.cursor = Some((hex(dir.as_bytes()), hex(&after)));
            self.look_again(Instant::now())?;
            while self.suspects.len() > SUSPECTS_MAX && self.goes_on() {
                self.next_look()?;
            }
            if self.stored.elapsed() >= STORE {
                self.store()?;
            }
            self.show();
            if last.is_none() || !self.goes_on() {
                return Ok(());
            }
        }
    }

    /// A name that has no row.
    fn extra(&mut self, dir: &RelPath, name: &[u8]) {
        if let Some(path) = dir.join(name).filter(|path| self.is_mirrored(path)) {
            self.suspect(path);
        }
    }

    fn is_mirrored(&self, path: &RelPath) -> bool {
        let Ok(Some(stat)) = self.of.root.stat(path) else { return false };
        let excluded = self.of.selection.excludes(path.as_bytes(), kind(&stat) == FileType::Directory);
        !excluded && kind(&stat) != FileType::Socket
    }

    fn list(&self, dir: &RelPath) -> Vec<Vec<u8>> {
        let listed = self.of.root.dir_for_reading(dir).and_then(|fd| tree::list(fd.as_fd()));
        listed.map(|names| names.into_iter().map(|listed| listed.name).collect()).unwrap_or_default()
    }

    fn agrees(&mut self, path: &RelPath, row: &Row) -> bool {
        let Ok(Some(found)) = look(&self.of.root, path) else { return false };
        match glance(Some(&row.entry), Some(&found.entry), &self.able) {
            Glance::Same => true,
            Glance::Differs(_) | Glance::Read(Some(_)) => false,
            Glance::Read(None) => match self.read(&found) {
                Read::Name(hash) => row.entry.hash() == Some(hash),
                Read::Failed(_) => false,
                Read::Stopped => true,
            },
        }
    }

    /// The name of a file's content as the disk has it, at the pace that was asked for.
    fn read(&mut self, found: &Found) -> Read {
        let Some(file) = &found.file else { return Read::Failed(Errno::BADF) };
        copy::forget_pages(file);
        let (mut hasher, mut at, mut buffer) = (blake3::Hasher::new(), 0, vec![0; READ.min(found.entry.size() as usize + 1)]);
        loop {
            match file.read_at(&mut buffer, at) {
                Ok(0) => return Read::Name(ContentHash(*hasher.finalize().as_bytes())),
                Ok(got) => {
                    hasher.update(&buffer[..got]);
                    at += got as u64;
                    self.of.record.bytes += got as u64;
                    self.show();
                    if !self.pace.took(got as u64) {
                        return Read::Stopped;
                    }
                }
                Err(error) => return Read::Failed(Errno::from_io_error(&error).unwrap_or(Errno::IO)),
            }
        }
    }

    /// Waits for the next suspect that is due, and looks.
    fn next_look(&mut self) -> Result<(), VerifyError> {
        if let Some(first) = self.suspects.front() {
            self.of.stop.wait_until(first.due);
        }
        self.look_again(Instant::now())
    }

    /// Has the owners of rows look at what is due.
    fn look_again(&mut self, now: Instant) -> Result<(), VerifyError> {
        while self.goes_on() && self.suspects.front().is_some_and(|first| first.due <= now) {
            let due = self.suspects.iter().take(ASKED).take_while(|suspect| suspect.due <= now).count();
            let batch: Vec<Suspect> = self.suspects.drain(..due).collect();
            let looked = match self.of.side.look(batch.iter().map(|suspect| suspect.path.clone()).collect()) {
                Ok(looked) => looked,
                Err(error) => {
                    batch.into_iter().rev().for_each(|suspect| self.suspects.push_front(suspect));
                    return Err(error);
                }
            };
            for (suspect, looked) in batch.into_iter().zip(looked) {
                if self.goes_on() {
                    self.judge(suspect, looked)?;
                } else {
                    self.suspects.push_back(suspect);
                }
            }
            self.show();
        }
        Ok(())
    }

    fn judge(&mut self, mut suspect: Suspect, looked: Looked) -> Result<(), VerifyError> {
        suspect.looks += 1;
        suspect.due = Instant::now() + self.of.again;
        // A path that could not be applied: its row does not say what it should be.
        let unknown = looked.row.as_ref().and_then(|row| row.entry.hash()).is_some_and(|hash| hash.0 == [0; 32]);
        if looked.busy || unknown {
            suspect.last = None;
            self.later(suspect);
            return Ok(());
        }
        let found = match looked.found {
            Ok(found) => found,
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => None,
            Err(source) => return self.unreadable(suspect, looked.row, None, source),
        };
        if suspect.path.is_root() && looked.row.is_none() {
            return Ok(()); // Nothing came yet.
        }
        let mut entry = found.as_ref().map(|found| found.entry.clone());
        let what = match glance(looked.row.as_ref().map(|row| &row.entry), entry.as_ref(), &self.able) {
            Glance::Same => return Ok(()),
            Glance::Differs(what) => what,
            Glance::Read(besides) => {
                let Some(found) = &found else { return Ok(()) };
                let hash = match self.read(found) {
                    Read::Name(hash) => hash,
                    Read::Failed(source) => {
                        let local = found.local;
                        return self.unreadable(suspect, looked.row, Some((entry, local)), source);
                    }
                    Read::Stopped => {
                        self.later(suspect);
                        return Ok(());
                    }
                };
                if let Some(Entry { kind: twinbox_protocol::entry::Kind::File { hash: name, .. }, .. }) = &mut entry {
                    *name = hash;
                }
                let right = looked.row.as_ref().and_then(|row| row.entry.hash()) == Some(hash);
                match besides {
                    _ if !right => What::Content,
                    Some(besides) => besides,
                    None => return Ok(()),
                }
            }
        };
        let seen = Seen { row: looked.row, entry, local: found.map(|found| found.local), what };
        if suspect.last.as_ref() == Some(&seen) {
            let time_only = match (&seen.row, &seen.entry) {
                (Some(row), Some(entry)) => entry.is_dir() && row.entry == Entry { mtime: row.entry.mtime, ..entry.clone() },
                _ => false,
            };
            if time_only && self.quiet.len() < SUSPECTS_MAX {
                self.quiet.push((suspect.path, seen));
                return Ok(());
            }
            return self.finding(&suspect.path, &seen);
        }
        suspect.last = Some(seen);
        self.later(suspect);
        Ok(())
    }

    fn later(&mut self, suspect: Suspect) {
        if suspect.looks < LOOKS_MAX {
            self.suspects.push_back(suspect);
        } else {
            tracing::debug!(path = %suspect.path, "changes at every look: not verified");
            self.of.record.busy += 1;
        }
    }

    /// A disk that does not give a file's bytes is told, once it was tried twice more; repaired as if they were others.
    fn unreadable(
        &mut self,
        suspect: Suspect,
        row: Option<Row>,
        found: Option<(Option<Entry>, Local)>,
        source: Errno,
    ) -> Result<(), VerifyError> {
        if suspect.looks < 3 {
            self.later(suspect);
            return Ok(());
        }
        tracing::error!(error = %std::io::Error::from(source), "a file cannot be read");
        self.of.record.unreadable += 1;
        let medium = matches!(source, Errno::IO | Errno::BADMSG | Errno::UCLEAN);
        let seen =
            found.filter(|_| medium && row.is_some()).map(|(entry, local)| Seen { row, entry, local: Some(local), what: What::Content });
        let repaired = match seen.filter(|_| self.of.record.repair) {
            Some(seen) => self.of.side.repair(&suspect.path, &seen)?,
            None => Some(Outcome::Failed { why: std::io::Error::from(source).to_string() }),
        };
        if let Some(outcome) = repaired {
            self.note(&suspect.path, What::Content, outcome);
        }
        Ok(())
    }

    /// A directory's time is told where nothing that was found in it explains it.
    fn judge_quiet(&mut self) -> Result<(), VerifyError> {
        let told = self.of.record.findings.iter().filter(|one| one.what != What::Attributes);
        let changed: BTreeSet<String> = told.map(|one| one.path.rsplit_once('/').map_or(".", |(dir, _)| dir).to_owned()).collect();
        for (path, seen) in std::mem::take(&mut self.quiet) {
            if !self.goes_on() {
                self.quiet.push((path, seen));
            } else if !changed.contains(&path.to_string()) {
                self.finding(&path, &seen)?;
            } else if self.of.record.repair {
                self.of.side.repair(&path, &seen)?; // Where that was not done with what was found in it.
            }
        }
        Ok(())
    }

    fn finding(&mut self, path: &RelPath, seen: &Seen) -> Result<(), VerifyError> {
        let outcome = if self.of.record.repair { self.of.side.repair(path, seen)? } else { Some(Outcome::Found) };
        if let Some(outcome) = outcome {
            self.note(path, seen.what, outcome);
        }
        Ok(())
    }

    fn note(&mut self, path: &RelPath, what: What, outcome: Outcome) {
        let record = &mut self.of.record;
        record.differences += 1;
        let mended = matches!(outcome, Outcome::Repaired { .. } | Outcome::Sent);
        record.repaired += u64::from(mended);
        let repaired = if mended { "and it was put right" } else { "" };
        tracing::error!(mirror = %record.mirror, %what, repaired, "verify: a path is not what the manifest says");
        tracing::debug!(%path, ?outcome, "verify");
        if record.findings.len() < FINDINGS_MAX {
            record.findings.push(Finding { path: path.to_string(), what, outcome });
        }
    }
}

enum Read {
    Name(ContentHash),
    Failed(Errno),
    Stopped,
}

/// What is at a path beneath a root.
///
/// # Errors
/// The system's.
pub(super) fn look(root: &Root, path: &RelPath) -> Result<Option<Found>, Errno> {
    let Some(stat) = root.stat(path)? else { return Ok(None) };
    let handle = root.handle(path)?;
    let file = if kind(&stat) == FileType::RegularFile { Some(File::from(root.file(path)?)) } else { None };
    Found::of(handle.as_fd(), file)
}
