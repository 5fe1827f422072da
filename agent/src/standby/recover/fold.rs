//! The redo log's suffix as final rows, and where the contents it brings are.
//!
//! Bytes are copied to an unnamed file, so that memory holds only their places, whatever the log's size.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use twinbox_protocol::entry::Time;
use twinbox_protocol::ids::ContentHash;
use twinbox_protocol::msg::Position;
use twinbox_protocol::ops::{Content, FLAG_INITIAL, Op};
use twinbox_protocol::path::RelPath;
use twinbox_resync::manifest::Manifest;
use twinbox_resync::redo::RedoReader;
use twinbox_resync::rows::{self, Local, Row, RowError, Rows};

use crate::standby::error::StandbyError;
use crate::standby::staging::Staging;

/// Inode numbers of files the log makes; no file system gives such numbers.
const MADE: u64 = 1 << 63;

/// A place in the unnamed file.
#[derive(Clone, Copy)]
pub(super) struct Stored {
    at: u64,
    len: u32,
}

/// A patch of the log.
pub(super) struct Patch {
    pub(super) base: ContentHash,
    pub(super) new: ContentHash,
    pub(super) size: u64,
    pub(super) writes: Vec<(u64, Stored)>,
    /// Inode it was for, when it is older than the log's suffix.
    pub(super) ino: Option<u64>,
    /// Name it was for.
    pub(super) path: RelPath,
}

/// A rename of the log.
pub(super) struct Moved {
    pub(super) from: RelPath,
    pub(super) to: RelPath,
    pub(super) dir: bool,
    /// Inode, when it is older than the log's suffix.
    pub(super) ino: Option<u64>,
}

/// What the suffix brings.
pub(super) struct Suffix {
    data: File,
    len: u64,
    pub(super) inline: BTreeMap<ContentHash, Stored>,
    pub(super) patches: Vec<Patch>,
    pub(super) moved: Vec<Moved>,
    /// Every modification time the log sets.
    pub(super) times: BTreeSet<Time>,
    pub(super) patched: BTreeSet<u64>,
    /// Names of all contents of the log, and of those it replaced.
    pub(super) known: BTreeSet<ContentHash>,
    pub(super) complete: bool,
    pub(super) captured_ns: i64,
    pub(super) txns: u64,
    pub(super) problems: Vec<String>,
}

fn io(error: std::io::Error) -> StandbyError {
    StandbyError::io("reading the redo log for recovery", error)
}

impl Suffix {
    fn store(&mut self, bytes: &[u8]) -> Result<Stored, StandbyError> {
        self.data.write_all_at(bytes, self.len).map_err(io)?;
        let stored = Stored { at: self.len, len: bytes.len() as u32 };
        self.len += bytes.len() as u64;
        Ok(stored)
    }

    pub(super) fn read(&self, stored: Stored) -> Result<Vec<u8>, StandbyError> {
        let mut bytes = vec![0; stored.len as usize];
        self.data.read_exact_at(&mut bytes, stored.at).map_err(io)?;
        Ok(bytes)
    }
}

/// Rows that note what they were before.
struct Noted<'a> {
    manifest: &'a mut Manifest,
    before: BTreeMap<RelPath, Option<Row>>,
}

impl Rows for Noted<'_> {
    fn row(&self, path: &RelPath) -> Result<Option<Row>, RowError> {
        self.manifest.row(path)
    }

    fn set(&mut self, path: &RelPath, row: Option<Row>) -> Result<(), RowError> {
        if !self.before.contains_key(path) {
            let old = self.manifest.row(path)?;
            self.before.insert(path.clone(), old);
        }
        self.manifest.set(path, row)
    }

    fn below(&self, dir: &RelPath) -> Result<Vec<(RelPath, Row)>, RowError> {
        self.manifest.below(dir)
    }

    fn is_empty_dir(&self, dir: &RelPath) -> Result<bool, RowError> {
        self.manifest.is_empty_dir(dir)
    }
}

/// Performs the log's suffix on the rows; gives what it brings and the rows before, of every path it touches.
pub(super) fn fold(
    manifest: &mut Manifest,
    staging: &Staging,
    redo_dir: &Path,
) -> Result<(Suffix, BTreeMap<RelPath, Option<Row>>), StandbyError> {
    let checkpoint = manifest.position().map_err(|e| manifest.state_error(&e))?;
    let mut suffix = Suffix {
        data: tempfile::tempfile_in(staging.dir()).map_err(io)?,
        len: 0,
        inline: BTreeMap::new(),
        patches: vec![],
        moved: vec![],
        times: BTreeSet::new(),
        patched: BTreeSet::new(),
        known: BTreeSet::new(),
        complete: false,
        captured_ns: 0,
        txns: 0,
        problems: vec![],
    };
    let mut rows = Noted { manifest, before: BTreeMap::new() };
    let mut reader = RedoReader::new(redo_dir, checkpoint.lsn);
    let mut made = 0;
    while let Some(record) = reader.next_record()? {
        rows.manifest.set_lsn(record.frame.lsn);
        for op in &record.frame.ops {
            let source = match op {
                Op::Rename { from, .. } | Op::Link { from, .. } => rows.row(from)?,
                _ => rows.row(op.path())?,
            };
            match rows::perform(&mut rows, op) {
                Ok(()) => {}
                Err(RowError::Store { detail }) => return Err(StandbyError::State { detail }),
                Err(error) => {
                    suffix.problems.push(error.to_string());
                    continue;
                }
            }
            suffix.take(op, source, &mut rows, &mut made)?;
        }
        if let (Some(seal), Some(chain)) = (record.seal(), record.chain) {
            let position = Position { lsn: record.frame.lsn, chain };
            rows.manifest.remember_chain(position).map_err(|e| rows.manifest.state_error(&e))?;
            suffix.complete = record.frame.flags & FLAG_INITIAL == 0;
            suffix.captured_ns = record.frame.captured_ns;
            suffix.txns += 1;
            if seal.digest != rows.manifest.digest() {
                suffix.problems.push(format!("the manifests of both nodes differ at LSN {}", position.lsn));
            }
        }
    }
    let before = rows.before;
    suffix.known.extend(before.values().flatten().filter_map(|row| row.entry.hash()));
    Ok((suffix, before))
}

impl Suffix {
    fn take(&mut self, op: &Op, source: Option<Row>, rows: &mut Noted<'_>, made: &mut u64) -> Result<(), StandbyError> {
        let dir = source.as_ref().is_some_and(|row| row.entry.is_dir());
        // Of a name that the log makes by a link, and takes again, no row before it tells what it held.
        self.known.extend(source.as_ref().and_then(|row| row.entry.hash()));
        let real = source.and_then(|row| row.local).map(|l| l.ino).filter(|ino| ino & MADE == 0);
        match op {
            Op::Put { path, entry, content } => {
                if let (Content::Inline(bytes), Some(hash)) = (content, entry.hash())
                    && !self.inline.contains_key(&hash)
                {
                    let stored = self.store(bytes)?;
                    self.inline.insert(hash, stored);
                }
                self.known.extend(entry.hash());
                self.times.insert(entry.mtime);
                made_here(rows, path, made)?;
            }
            Op::Make { path, entry } => {
                self.times.insert(entry.mtime);
                if !entry.is_dir() {
                    made_here(rows, path, made)?;
                }
            }
            Op::Patch { path, entry, base, writes } => {
                let mut stored = vec![];
                for (offset, bytes) in writes {
                    stored.push((*offset, self.store(bytes)?));
                }
                let new = entry.hash().unwrap_or(*base);
                self.known.extend([*base, new]);
                self.times.insert(entry.mtime);
                self.patched.extend(real);
                self.patches.push(Patch { base: *base, new, size: entry.size(), writes: stored, ino: real, path: path.clone() });
            }
            Op::Rename { from, to } => self.moved.push(Moved { from: from.clone(), to: to.clone(), dir, ino: real }),
            Op::SetMeta { attrs, .. } => {
                self.times.insert(attrs.mtime);
            }
            Op::Link { .. } | Op::Remove { .. } => {}
        }
        Ok(())
    }
}

/// Gives a new file's row an inode number of its own, so that links to it are recognised.
fn made_here(rows: &mut Noted<'_>, path: &RelPath, made: &mut u64) -> Result<(), StandbyError> {
    *made += 1;
    let local = Local { ino: MADE | *made, ctime: Time::default() };
    rows.manifest.set_local(path, Some(local)).map_err(|e| rows.manifest.state_error(&e).into())
}
