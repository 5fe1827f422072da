//! Large files, read on a thread of their own so that they hold up neither events nor other groups' cuts.
//!
//! A job reads one file under the same proofs as a direct look. A change in place of a remembered content becomes a patch; anything else goes ahead on a bulk stream as a recipe against
//! the remembered content, and is staged by the standby under its name. What a job read counts only if no event for the path came since the job was given: the engine sees to that.

use std::os::fd::AsFd;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use rustix::fs::{self as rfs, FileType};
use rustix::io::Errno;
use serde_bytes::ByteBuf;
use tokio::sync::mpsc;
use twinbox_protocol::chunk::{Chunk, Chunker, rechunk};
use twinbox_protocol::content::{PAGE, PageTree, TreeHasher, page_value};
use twinbox_protocol::entry::Time;
use twinbox_protocol::ids::ContentHash;
use twinbox_protocol::msg::BulkItem;
use twinbox_protocol::ops::{OP_DATA_MAX, Seg};
use twinbox_protocol::path::RelPath;
use twinbox_resync::manifest::Large;
use twinbox_resync::plan::{Body, Found, Seen};

use super::look::{self, KnownChunks, PIECE, RecipeBuilder};
use super::messages::{BulkMessage, CaptureHandle, Command};
use super::recent::RecentChunks;
use crate::sys::Probe;
use crate::tree::{self, Root};

/// A file to be read.
pub struct Job {
    /// Number.
    pub id: u64,
    /// Session it belongs to.
    pub out: mpsc::Sender<BulkMessage>,
    /// File.
    pub path: RelPath,
    /// Remembered content to compare with: the row's, or one that the standby has staged for this path.
    pub base: Option<(ContentHash, Large)>,
    /// In the latter case, its size.
    pub ahead: Option<u64>,
    /// Content of the row, when it is remembered.
    pub replaces: Option<ContentHash>,
    /// The file still has the inode of `base` and one name: pages may be compared.
    pub in_place: bool,
    /// Some process has it mapped for writing.
    pub mapped: bool,
    /// Answer to a miss: every byte, no copies.
    pub whole: bool,
    /// Chunks shipped lately: a file rewritten under another name (and then renamed) finds its old content here.
    pub known: Arc<Mutex<RecentChunks>>,
}

/// What a job gave.
#[derive(Debug)]
pub struct BulkResult {
    /// Number.
    pub id: u64,
    /// File.
    pub path: RelPath,
    /// What happened.
    pub outcome: Outcome,
}

/// See [`BulkResult`].
#[derive(Debug)]
pub enum Outcome {
    /// An observation; when `staged`, its content is on its way on a bulk stream.
    Read {
        /// What was seen.
        seen: Seen,
        /// To be remembered.
        large: Option<(Large, Option<ContentHash>)>,
        /// Wait for the standby's word before using it.
        staged: bool,
        /// The file changed meanwhile: good to compare with, not to be committed.
        torn: bool,
    },
    /// It changed under our eyes.
    Unstable,
    /// May not be read.
    Unreadable(Errno),
    /// The session ended.
    Cut,
}

enum Failure {
    Unstable,
    Errno(Errno),
    Cut,
}

impl From<Errno> for Failure {
    fn from(error: Errno) -> Self {
        Failure::Errno(error)
    }
}

struct NothingKnown;
impl KnownChunks for NothingKnown {
    fn find(&self, _: Chunk) -> Option<(ContentHash, u64)> {
        None
    }
}

/// Starts the thread; it ends when the sender is dropped.
#[must_use]
pub fn start(root: Arc<Root>, reply: CaptureHandle) -> Sender<Job> {
    let (send, jobs): (_, Receiver<Job>) = channel();
    std::thread::spawn(move || {
        while let Ok(job) = jobs.recv() {
            let outcome = match run(&root, &job) {
                Ok(outcome) => outcome,
                Err(Failure::Unstable | Failure::Errno(Errno::LOOP | Errno::AGAIN)) => Outcome::Unstable,
                Err(Failure::Errno(Errno::NOENT | Errno::NOTDIR)) => {
                    Outcome::Read { seen: Seen::Absent, large: None, staged: false, torn: false }
                }
                Err(Failure::Errno(error)) => Outcome::Unreadable(error),
                Err(Failure::Cut) => Outcome::Cut,
            };
            if !matches!(outcome, Outcome::Read { staged: true, .. }) {
                let _ = job.out.blocking_send(BulkMessage::Abort(job.id));
            }
            if !reply.send(Command::Bulk(Box::new(BulkResult { id: job.id, path: job.path, outcome }))) {
                return;
            }
        }
    });
    send
}

fn now() -> Time {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    Time { secs: now.tv_sec, nanos: now.tv_nsec as u32 }
}

fn run(root: &Root, job: &Job) -> Result<Outcome, Failure> {
    let started = root.surely_before(now());
    let file = root.file(&job.path)?;
    let before = rfs::fstat(&file)?;
    if FileType::from_raw_mode(before.st_mode) != FileType::RegularFile {
        return Err(Failure::Unstable);
    }
    let probe = root.probe(file.as_fd());
    let before = if probe == Probe::Quiet {
        before
    } else {
        if job.mapped {
            let _ = rfs::fdatasync(&file); // A store moves the ctime once more then.
        }
        look::wait_for_write(&file)?;
        rfs::fstat(&file)?
    };
    let len = before.st_size as u64;
    let patch = match &job.base {
        Some((hash, large)) if job.in_place && !job.whole => patch(&file, len, (*hash, job.ahead), large)?,
        _ => None,
    };
    let holes = if patch.is_none() { look::extents(&file, len)? } else { None };
    let (hash, body, large) = match patch {
        Some(done) => done,
        None => stream(&file, &before, job, holes.as_deref())?,
    };
    let xattrs = tree::xattrs(file.as_fd(), false)?;
    let after = rfs::fstat(&file)?;
    let late = probe != Probe::Quiet && tree::local(&after).ctime >= started;
    let torn = !tree::same_stat(&before, &after) || late || (probe == Probe::Quiet && root.probe(file.as_fd()) != Probe::Quiet);
    let staged = body == Body::Staged;
    if torn && !(staged && large.is_some()) {
        return Err(Failure::Unstable);
    }
    if staged {
        send(job, BulkItem::End { hash, size: len })?;
    }
    let Some(entry) = tree::entry(&before, xattrs, Some(hash), None) else { return Err(Failure::Unstable) };
    let found = Found { entry, local: tree::local(&before), nlink: before.st_nlink, body };
    Ok(Outcome::Read { seen: Seen::Present(Box::new(found)), large: large.map(|l| (l, job.replaces)), staged, torn })
}

fn send(job: &Job, item: BulkItem) -> Result<(), Failure> {
    job.out.blocking_send(BulkMessage::Item(job.id, item)).map_err(|_| Failure::Cut)
}

fn pread(file: &impl AsFd, buffer: &mut [u8], at: u64) -> Result<(), Failure> {
    let mut done = 0;
    while done < buffer.len() {
        match rustix::io::pread(file, &mut buffer[done..], at + done as u64) {
            Ok(0) => return Err(Failure::Unstable),
            Ok(n) => done += n,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

type Read = (ContentHash, Body, Option<Large>);

/// Compares page by page; `None` when too much changed for a patch.
fn patch(file: &impl AsFd, len: u64, (base, ahead): (ContentHash, Option<u64>), old: &Large) -> Result<Option<Read>, Failure> {
    let (mut values, mut ranges, mut shipped) = (Vec::with_capacity((len / PAGE as u64) as usize + 1), Vec::<(u64, u64)>::new(), 0u64);
    let mut buffer = vec![0; PIECE];
    let mut at = 0;
    while at < len {
        let n = (len - at).min(PIECE as u64) as usize;
        pread(file, &mut buffer[..n], at)?;
        for page in buffer[..n].chunks(PAGE) {
            let value = page_value(at, page);
            if old.tree.values().get(values.len()) != Some(&value) {
                let from = look::grown_from(&old.tree, values.len(), at, page);
                let to = at + page.len() as u64;
                shipped += to - from;
                match ranges.last_mut() {
                    Some(last) if last.1 == from => last.1 = to,
                    _ => ranges.push((from, to)),
                }
            }
            values.push(value);
            at += page.len() as u64;
        }
        if shipped > OP_DATA_MAX as u64 - 4096 {
            return Ok(None);
        }
    }
    let Some(tree) = PageTree::from_parts(len, values) else { return Ok(None) };
    let mut writes = vec![];
    for (from, to) in &ranges {
        let mut bytes = vec![0; (to - from) as usize];
        pread(file, &mut bytes, *from)?;
        writes.push((*from, ByteBuf::from(bytes)));
    }
    let chunks = match &old.chunks {
        Some(chunks) => Some(rechunk(chunks, &ranges, len, |at, n| {
            let mut bytes = vec![0; n];
            pread(file, &mut bytes, at).map(|()| bytes)
        })?),
        None => None,
    };
    Ok(Some((tree.root(), Body::Patch { base, writes, ahead }, Some(Large { tree, chunks }))))
}

/// Sends the content ahead.
fn stream(file: &impl AsFd, before: &rfs::Stat, job: &Job, extents: Option<&[(u64, u64)]>) -> Result<Read, Failure> {
    let len = before.st_size as u64;
    let base = job.base.as_ref().filter(|_| !job.whole).map(|(hash, large)| (*hash, large));
    let known: &dyn KnownChunks = if job.whole { &NothingKnown } else { &*job.known };
    let mut builder = RecipeBuilder::new(known, base);
    let (mut hasher, mut chunker, mut list, mut segs) = (TreeHasher::default(), Chunker::default(), vec![], vec![]);
    let mut buffer = vec![0; PIECE];
    let whole = [(0, len)];
    let mut at = 0;
    for (from, to) in extents.unwrap_or(&whole) {
        if *from > at {
            // A hole ends a run of chunks.
            std::mem::take(&mut chunker).finish(|c, b| segs.extend(builder.chunk(c, b)));
            segs.extend(builder.finish());
            segs.push(Seg::Hole(from - at));
            zeros(&mut hasher, from - at);
            at = *from;
        }
        while at < *to {
            let n = (to - at).min(PIECE as u64) as usize;
            pread(file, &mut buffer[..n], at)?;
            hasher.update(&buffer[..n]);
            chunker.update(&buffer[..n], |c, b| {
                list.push(c);
                segs.extend(builder.chunk(c, b));
            });
            at += n as u64;
            for seg in segs.drain(..) {
                send(job, BulkItem::Seg(seg))?;
            }
        }
    }
    chunker.finish(|c, b| {
        list.push(c);
        segs.extend(builder.chunk(c, b));
    });
    segs.extend(builder.finish());
    if at < len {
        segs.push(Seg::Hole(len - at));
        zeros(&mut hasher, len - at);
    }
    for seg in segs {
        send(job, BulkItem::Seg(seg))?;
    }
    let (hash, tree) = hasher.finish();
    let chunks = extents.is_none().then_some(list);
    Ok((hash, Body::Staged, tree.filter(|_| extents.is_none()).map(|tree| Large { tree, chunks })))
}

fn zeros(hasher: &mut TreeHasher, mut len: u64) {
    let page = [0; 64 * 1024];
    while len > 0 {
        let n = len.min(page.len() as u64) as usize;
        hasher.update(&page[..n]);
        len -= n as u64;
    }
}
