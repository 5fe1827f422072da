//! One stable look at one path: stat, prove, read. Nothing is decided here about when to look or what to ship.
//!
//! Proof 1 (lease probe – read – lease probe) where nobody has the file open for writing; else proof 2 (stat – lseek(SEEK_DATA), which waits for a
//! write in progress – read in pieces – stat). The caller adds the third part of either proof: no event for the path by the next cookie.

use std::os::fd::AsFd;
use std::time::Duration;

use rustix::fs::{self as rfs, FileType, SeekFrom};
use rustix::io::Errno;
use serde_bytes::ByteBuf;
use twinbox_protocol::chunk::{Chunk, Chunker};
use twinbox_protocol::content::{PAGE, PageTree, TreeHasher, page_value};
use twinbox_protocol::entry::Time;
use twinbox_protocol::ids::ContentHash;
use twinbox_protocol::ops::{INLINE_MAX, OP_DATA_MAX, Seg};
use twinbox_protocol::path::RelPath;
use twinbox_resync::manifest::Large;
use twinbox_resync::plan::{Body, Found, Seen};
use twinbox_resync::rows::Row;

use crate::sys::Probe;
use crate::tree::{self, Root};

/// Files up to this size are read where they are found; larger ones by the bulk thread, so that they hold nobody up.
pub const DIRECT_MAX: u64 = OP_DATA_MAX as u64;
/// Bytes of one read(2): on XFS a read holds writers back while it lasts.
pub const PIECE: usize = 1024 * 1024;
/// Contents changed in place from this size on are compared page by page.
pub const PATCH_MIN: u64 = 16 * 1024;
/// Pages and chunks of contents from this size on are remembered at first sight; of smaller ones once they are changed in place.
pub const REMEMBER_MIN: u64 = 1024 * 1024;

/// What a look gave.
#[derive(Debug)]
pub enum Look {
    /// An observation, with what is to be remembered of a large content and which content it replaces.
    Seen(Seen, Option<(Large, Option<ContentHash>)>),
    /// Somebody is writing, or it changed under our eyes: look again.
    Unstable {
        /// A writer has it open.
        writer: bool,
    },
    /// Too large to be read here: its size in bytes.
    Bulk(u64),
    /// May not be read.
    Unreadable(Errno),
}

/// What the caller knows before a look.
pub struct Known<'a> {
    /// The row at the path's origin.
    pub row: Option<&'a Row>,
    /// An event says the bytes may have changed.
    pub content: bool,
    /// Only an equal ctime proves that nothing changed.
    pub scan: bool,
    /// Do not read while somebody has it open for writing.
    pub quiet_only: bool,
    /// Its writers close it: how long ago it was written to and not closed since, and how long ago it was made or last closed.
    pub unfinished: Option<(Duration, Duration)>,
    /// When the round's first cookie was made, wall clock.
    pub boundary: Time,
}

/// Whether a file of this size may be in the middle of a change made by several writes. Pauses between them, and what one such change takes, grow with the size; who writes for longer without closing keeps the file open.
fn may_be_unfinished(size: u64, quiet: Duration, closed: Duration) -> bool {
    let size = Duration::from_millis(size / (32 << 10));
    quiet < Duration::from_millis(250) + size && closed < Duration::from_secs(1) + 4 * size
}

/// Where known chunks are: content, offset.
pub trait KnownChunks {
    /// Where this chunk can be copied from.
    fn find(&self, chunk: Chunk) -> Option<(ContentHash, u64)>;
}

/// Looks at `path`. `large` gives what is remembered of a content.
pub fn look(
    root: &Root,
    path: &RelPath,
    known: &Known<'_>,
    large: impl Fn(ContentHash) -> Option<Large>,
    chunks: &dyn KnownChunks,
) -> (Look, Option<bool>) {
    let mut writer = None;
    let look = match try_look(root, path, known, large, chunks, &mut writer) {
        Ok(look) => look,
        Err(Errno::NOENT | Errno::NOTDIR) => Look::Seen(Seen::Absent, None),
        // A link where a moment ago was none, or a name under change: the event comes.
        Err(Errno::LOOP | Errno::AGAIN | Errno::STALE) => Look::Unstable { writer: false },
        Err(error) => Look::Unreadable(error),
    };
    (look, writer)
}

fn try_look(
    root: &Root,
    path: &RelPath,
    known: &Known<'_>,
    large: impl Fn(ContentHash) -> Option<Large>,
    chunks: &dyn KnownChunks,
    writer: &mut Option<bool>,
) -> Result<Look, Errno> {
    let Some(stat) = root.stat(path)? else { return Ok(Look::Seen(Seen::Absent, None)) };
    let plain = |stat, xattrs, target| {
        let found = tree::entry(stat, xattrs, None, target);
        Look::Seen(
            found.map_or(Seen::Absent, |entry| {
                Seen::Present(Box::new(Found { entry, local: tree::local(stat), nlink: stat.st_nlink, body: Body::Unread }))
            }),
            None,
        )
    };
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => {}
        FileType::Directory => {
            let dir = root.dir_for_reading(path)?;
            let stat = rfs::fstat(&dir)?;
            return Ok(plain(&stat, tree::xattrs(dir.as_fd(), false)?, None));
        }
        FileType::Symlink => {
            let link = root.handle(path)?;
            let stat = rfs::fstat(&link)?;
            let target = rfs::readlinkat(&link, "", Vec::with_capacity(256))?.into_bytes();
            return Ok(plain(&stat, tree::xattrs(link.as_fd(), true)?, Some(target)));
        }
        _ => {
            let other = root.handle(path)?;
            let stat = rfs::fstat(&other)?;
            return Ok(plain(&stat, tree::xattrs(other.as_fd(), true)?, None));
        }
    }

    let file = root.file(path)?;
    let before = rfs::fstat(&file)?;
    if FileType::from_raw_mode(before.st_mode) != FileType::RegularFile {
        return Ok(Look::Unstable { writer: false });
    }
    let local = tree::local(&before);
    let found = |xattrs, hash, body| {
        tree::entry(&before, xattrs, Some(hash), None)
            .map_or(Seen::Absent, |entry| Seen::Present(Box::new(Found { entry, local, nlink: before.st_nlink, body })))
    };
    if let Some((row, hash)) = known.row.and_then(|row| Some((row, row.entry.hash()?)))
        && let Some(then) = row.local
        && !known.content
        && then.ino == local.ino
        // Noted as "to be read again", after a power cut: a rename since then says nothing of its bytes.
        && then.ctime != Time::default()
        && row.entry.size() == before.st_size as u64
        && row.entry.mtime == tree::mtime(&before)
        && (!known.scan || then.ctime == local.ctime)
    {
        return Ok(Look::Seen(found(tree::xattrs(file.as_fd(), false)?, hash, Body::Unread), None));
    }
    let probe = root.probe(file.as_fd());
    *writer = Some(probe == Probe::Writer);
    let unfinished = known.unfinished.is_some_and(|(quiet, closed)| may_be_unfinished(before.st_size as u64, quiet, closed));
    if probe != Probe::Quiet && (known.quiet_only || unfinished) {
        return Ok(Look::Unstable { writer: true });
    }
    if before.st_size as u64 > DIRECT_MAX {
        return Ok(Look::Bulk(before.st_size as u64));
    }
    if probe != Probe::Quiet {
        wait_for_write(&file)?;
    }
    let Some(bytes) = read_whole(&file, before.st_size as usize)? else { return Ok(Look::Unstable { writer: probe == Probe::Writer }) };
    let holes =
        if (before.st_blocks as u64 * 512) + (PAGE as u64) < before.st_size as u64 { extents(&file, before.st_size as u64)? } else { None };
    let xattrs = tree::xattrs(file.as_fd(), false)?;
    let after = rfs::fstat(&file)?;
    let late = probe != Probe::Quiet && tree::local(&after).ctime >= known.boundary;
    if !tree::same_stat(&before, &after) || late || (probe == Probe::Quiet && root.probe(file.as_fd()) != Probe::Quiet) {
        return Ok(Look::Unstable { writer: probe == Probe::Writer });
    }
    let (hash, tree) = if bytes.len() <= INLINE_MAX && (bytes.len() as u64) < PATCH_MIN {
        (ContentHash::of(&bytes), None)
    } else {
        let mut hasher = TreeHasher::default();
        hasher.update(&bytes);
        hasher.finish()
    };
    let base = known.row.and_then(|row| Some((row, row.entry.hash()?)));
    if base.is_some_and(|(_, old)| old == hash) {
        return Ok(Look::Seen(found(xattrs, hash, Body::Unread), None));
    }
    let in_place = base.is_some_and(|(row, _)| row.local.is_some_and(|l| l.ino == local.ino)) && before.st_nlink == 1;
    let old = base.and_then(|(_, old)| if bytes.len() as u64 >= PATCH_MIN { Some((old, large(old)?)) } else { None });
    let remember = tree.filter(|_| (in_place && bytes.len() as u64 >= PATCH_MIN) || bytes.len() as u64 >= REMEMBER_MIN);
    if let Some(holes) = holes {
        let body = Body::Recipe(with_holes(&bytes, &holes));
        return Ok(Look::Seen(found(xattrs, hash, body), None));
    }
    if in_place
        && let (Some((old_hash, old)), Some(new)) = (&old, &remember)
        && let Some(ranges) = changed_pages(&old.tree, new, &bytes)
    {
        let shipped: u64 = ranges.iter().map(|(from, to)| to - from).sum();
        if shipped <= (bytes.len() as u64 / 2).max(PAGE as u64) {
            let writes = ranges.iter().map(|(from, to)| (*from, ByteBuf::from(&bytes[*from as usize..*to as usize]))).collect();
            let body = Body::Patch { base: *old_hash, writes, ahead: None };
            let large = Large { tree: new.clone(), chunks: None };
            return Ok(Look::Seen(found(xattrs, hash, body), Some((large, Some(*old_hash)))));
        }
    }
    let replaces = old.as_ref().map(|(hash, _)| *hash);
    if bytes.len() <= INLINE_MAX {
        let large = remember.map(|tree| (Large { tree, chunks: None }, replaces));
        return Ok(Look::Seen(found(xattrs, hash, Body::Bytes(bytes)), large));
    }
    let (segs, list) = recipe(&bytes, chunks, old.as_ref().map(|(hash, large)| (*hash, large)));
    let large = remember.map(|tree| (Large { tree, chunks: Some(list) }, replaces));
    Ok(Look::Seen(found(xattrs, hash, Body::Recipe(segs)), large))
}

/// Waits until a write(2) in progress is through: lseek(SEEK_DATA) takes the inode's lock.
pub fn wait_for_write(file: &impl AsFd) -> Result<(), Errno> {
    match rfs::seek(file, SeekFrom::Data(0)) {
        Ok(_) | Err(Errno::NXIO | Errno::INVAL) => Ok(()),
        Err(other) => Err(other),
    }
}

/// All `len` bytes; `None` when the file is shorter or longer by now.
pub(super) fn read_whole(file: &impl AsFd, len: usize) -> Result<Option<Vec<u8>>, Errno> {
    let mut bytes = vec![0; len + 1];
    let mut at = 0;
    while at < bytes.len() {
        let end = (at + PIECE).min(bytes.len());
        match rustix::io::pread(file, &mut bytes[at..end], at as u64) {
            Ok(0) => break,
            Ok(n) => at += n,
            Err(Errno::INTR) => {}
            Err(other) => return Err(other),
        }
    }
    bytes.truncate(at);
    Ok((at == len).then_some(bytes))
}

/// Ranges that hold data, when there are holes at all.
pub fn extents(file: &impl AsFd, len: u64) -> Result<Option<Vec<(u64, u64)>>, Errno> {
    let (mut out, mut at) = (vec![], 0);
    while at < len {
        let data = match rfs::seek(file, SeekFrom::Data(at)) {
            Ok(data) => data.min(len),
            Err(Errno::NXIO) => break,
            Err(Errno::INVAL) => return Ok(None),
            Err(other) => return Err(other),
        };
        let hole = match rfs::seek(file, SeekFrom::Hole(data)) {
            Ok(hole) => hole.min(len),
            Err(Errno::NXIO) => break,
            Err(other) => return Err(other),
        };
        if data < hole {
            out.push((data, hole));
        }
        at = hole;
    }
    Ok((out != [(0, len)]).then_some(out))
}

fn with_holes(bytes: &[u8], extents: &[(u64, u64)]) -> Vec<Seg> {
    let (mut segs, mut at) = (vec![], 0u64);
    for (from, to) in extents {
        if *from > at {
            segs.push(Seg::Hole(from - at));
        }
        segs.push(Seg::Data(ByteBuf::from(&bytes[*from as usize..*to as usize])));
        at = *to;
    }
    if (at as usize) < bytes.len() {
        segs.push(Seg::Hole(bytes.len() as u64 - at));
    }
    segs
}

/// Byte ranges of `bytes` (whose tree is `new`) that differ from the content of `old`; an appended last page only from where it grew.
pub fn changed_pages(old: &PageTree, new: &PageTree, bytes: &[u8]) -> Option<Vec<(u64, u64)>> {
    let mut out: Vec<(u64, u64)> = vec![];
    for (page, value) in new.values().iter().enumerate() {
        if old.values().get(page) == Some(value) {
            continue;
        }
        let from = page as u64 * PAGE as u64;
        let to = (from + PAGE as u64).min(new.content_len());
        let from = grown_from(old, page, from, &bytes[from as usize..to as usize]);
        match out.last_mut() {
            Some(last) if last.1 == from => last.1 = to,
            _ => out.push((from, to)),
        }
    }
    Some(out)
}

/// Where a page that differs begins to: past the old end when the old part of it is as it was.
pub fn grown_from(old: &PageTree, page: usize, from: u64, bytes: &[u8]) -> u64 {
    let old_end = old.content_len();
    if page + 1 == old.values().len() && old_end > from && old_end < from + bytes.len() as u64 {
        let kept = (old_end - from) as usize;
        if Some(&page_value(from, &bytes[..kept])) == old.values().last() {
            return old_end;
        }
    }
    from
}

/// Cuts `bytes` into chunks and names those that can be copied.
fn recipe(bytes: &[u8], known: &dyn KnownChunks, base: Option<(ContentHash, &Large)>) -> (Vec<Seg>, Vec<Chunk>) {
    let mut builder = RecipeBuilder::new(known, base);
    let (mut chunker, mut list, mut segs) = (Chunker::default(), vec![], vec![]);
    let mut sink = |chunk: Chunk, bytes: &[u8]| {
        list.push(chunk);
        segs.extend(builder.chunk(chunk, bytes));
    };
    chunker.update(bytes, &mut sink);
    chunker.finish(&mut sink);
    segs.extend(builder.finish());
    (segs, list)
}

/// Turns a sequence of chunks into segments: neighbouring copies and neighbouring data are joined.
pub struct RecipeBuilder<'a> {
    known: &'a dyn KnownChunks,
    base: Option<(ContentHash, twinbox_protocol::chunk::ChunkMap)>,
    open: Option<Seg>,
}

/// Data of one segment at most.
pub(super) const SEG_DATA_MAX: usize = 256 * 1024;

impl<'a> RecipeBuilder<'a> {
    /// Chunks are looked for in `base` first, then among `known`.
    pub fn new(known: &'a dyn KnownChunks, base: Option<(ContentHash, &Large)>) -> Self {
        let base = base.and_then(|(hash, large)| Some((hash, twinbox_protocol::chunk::ChunkMap::new(large.chunks.as_ref()?))));
        RecipeBuilder { known, base, open: None }
    }

    /// Takes the next chunk; gives a segment that is complete.
    pub fn chunk(&mut self, chunk: Chunk, bytes: &[u8]) -> Option<Seg> {
        let at = self.base.as_ref().and_then(|(hash, map)| Some((*hash, map.find(chunk)?))).or_else(|| self.known.find(chunk));
        match (at, &mut self.open) {
            (Some((from, at)), Some(Seg::Copy { from: open, offset, len })) if from == *open && at == *offset + *len => {
                *len += u64::from(chunk.len);
                None
            }
            (Some((from, offset)), _) => self.open.replace(Seg::Copy { from, offset, len: u64::from(chunk.len) }),
            (None, Some(Seg::Data(data))) if data.len() + bytes.len() <= SEG_DATA_MAX => {
                data.extend_from_slice(bytes);
                None
            }
            (None, _) => self.open.replace(Seg::Data(ByteBuf::from(bytes))),
        }
    }

    /// The last segment.
    pub fn finish(&mut self) -> Option<Seg> {
        self.open.take()
    }
}

#[cfg(test)]
#[path = "look_tests.rs"]
mod tests;
