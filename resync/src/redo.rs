//! The standby's redo log: transactions on disk before they are acknowledged, read back to be applied.
//!
//! Segments `redo/<first LSN>.redo`: a header, then records. A record is `len u32 | check 16 bytes | body`; `check` is the start of
//! `BLAKE3(previous check ‖ body)`, so a record is only good after the one it was written after. A body is a postcard [`Record`]: a frame of a txn with every reference resolved to
//! bytes in the record or to an object in staging.
//!
//! Invariants: nothing counts until the txn's sealing record is on disk (`sync`); a torn tail is cut off at open, which can only lose what was never acknowledged;
//! the first failed write or sync latches, because after it the page cache can no longer be trusted (PostgreSQL's fsync lesson, 2018).

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use twinbox_protocol::codec;
use twinbox_protocol::ids::{ChainHash, Lsn};
use twinbox_protocol::msg::Position;
use twinbox_protocol::ops::{LogFrame, Seal};

const MAGIC: &[u8; 8] = b"TWBXREDO";
const VERSION: u32 = 1;
const HEADER: u64 = 8 + 4 + 16;
/// A new segment is begun past this many bytes: small enough to be dropped soon after a checkpoint, large enough to be rare.
const SEGMENT_BYTES: u64 = 32 * 1024 * 1024;
/// Written to the file when this much is waiting, so memory stays bounded between syncs.
const BUFFER_BYTES: usize = 1024 * 1024;
/// Largest record: a log frame whose references became inline bytes.
pub const RECORD_MAX: usize = 2 * codec::LOG_FRAME_MAX;

/// One record.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Record {
    /// The frame, references resolved.
    pub frame: LogFrame,
    /// In a sealing record: the chain hash at its LSN, as the primary computed it.
    pub chain: Option<ChainHash>,
}

impl Record {
    /// Ends its transaction.
    #[must_use]
    pub fn seal(&self) -> Option<&Seal> {
        self.frame.seal.as_ref()
    }
}

/// Why the log cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RedoError {
    /// The disk said no; latched until restart.
    #[error("redo log {path}: {source}", path = path.display())]
    Io {
        /// File.
        path: PathBuf,
        /// The system's words.
        source: io::Error,
    },
    /// An earlier failure of this run; nothing is acknowledged until the agent is restarted.
    #[error("redo log failed earlier ({why}); mend the disk and restart the agent")]
    Latched {
        /// First failure.
        why: String,
    },
    /// Written by a newer twinbox, or no redo segment at all.
    #[error("{path} is not a redo segment this twinbox can read: start the newer twinbox, or move it aside to sync anew", path = path.display())]
    Foreign {
        /// File.
        path: PathBuf,
    },
    /// Records are missing between two that are there.
    #[error("redo log has a gap after LSN {after}: move the state directory aside and start with --adopt")]
    Gap {
        /// Last good position.
        after: Lsn,
    },
}

fn failed(path: &Path) -> impl Fn(io::Error) -> RedoError + '_ {
    move |source| RedoError::Io { path: path.into(), source }
}

type Check = [u8; 16];

fn check_of(prev: &Check, body: &[u8]) -> Check {
    let mut hasher = blake3::Hasher::new();
    hasher.update(prev);
    hasher.update(body);
    let mut check = [0; 16];
    check.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    check
}

/// Sorted `(first LSN, path)`.
fn segments(dir: &Path) -> Result<Vec<(Lsn, PathBuf)>, RedoError> {
    let mut out = vec![];
    for item in fs::read_dir(dir).map_err(failed(dir))? {
        let path = item.map_err(failed(dir))?.path();
        let stem = path.file_stem().and_then(|s| s.to_str()).and_then(|s| s.parse().ok());
        if let (Some(first), Some("redo")) = (stem, path.extension().and_then(|e| e.to_str())) {
            out.push((Lsn(first), path));
        }
    }
    out.sort();
    Ok(out)
}

/// Reads one segment.
struct Segment {
    file: BufReader<File>,
    path: PathBuf,
    check: Check,
    at: u64,
}

impl Segment {
    fn open(path: &Path) -> Result<Option<Self>, RedoError> {
        let file = File::open(path).map_err(failed(path))?;
        let mut file = BufReader::with_capacity(256 * 1024, file);
        let mut header = [0; HEADER as usize];
        match file.read_exact(&mut header) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(error) => return Err(failed(path)(error)),
        }
        if header[..8] != *MAGIC || header[8..12] != VERSION.to_le_bytes() {
            let torn = header.iter().all(|b| *b == 0);
            return if torn { Ok(None) } else { Err(RedoError::Foreign { path: path.into() }) };
        }
        let mut check = [0; 16];
        check.copy_from_slice(&header[12..]);
        Ok(Some(Segment { file, path: path.into(), check, at: HEADER }))
    }

    /// The next record; `None` at the end or at the first one that is not whole.
    fn next(&mut self) -> Result<Option<Record>, RedoError> {
        let mut head = [0; 20];
        if !self.fill(&mut head)? {
            return Ok(None);
        }
        let len = u32::from_le_bytes([head[0], head[1], head[2], head[3]]) as usize;
        if len == 0 || len > RECORD_MAX {
            return Ok(None);
        }
        let mut body = vec![0; len];
        if !self.fill(&mut body)? {
            return Ok(None);
        }
        let check = check_of(&self.check, &body);
        if check != head[4..] {
            return Ok(None);
        }
        let Ok(record) = codec::decode::<Record>(&body, RECORD_MAX) else { return Ok(None) };
        self.check = check;
        self.at += 20 + len as u64;
        Ok(Some(record))
    }

    fn fill(&mut self, buffer: &mut [u8]) -> Result<bool, RedoError> {
        match self.file.read_exact(buffer) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                // The writer may add to this file: come back to this place.
                let path = self.path.clone();
                self.file.seek(SeekFrom::Start(self.at)).map_err(failed(&path))?;
                Ok(false)
            }
            Err(error) => Err(failed(&self.path)(error)),
        }
    }
}

/// The writing end.
pub struct RedoLog {
    dir: PathBuf,
    file: Option<(File, PathBuf)>,
    buffer: Vec<u8>,
    written: u64,
    check: Check,
    /// Last sealed position written (not necessarily synced), and where it ends in the current segment.
    sealed: Position,
    sealed_end: u64,
    sealed_check: Check,
    latched: Option<String>,
}

impl RedoLog {
    /// Opens the log in `dir` (created if need be) whose records up to `checkpoint` are in the manifest. Cuts off a torn tail.
    ///
    /// # Errors
    /// [`RedoError`].
    pub fn open(dir: &Path, checkpoint: Position) -> Result<Self, RedoError> {
        fs::create_dir_all(dir).map_err(failed(dir))?;
        let mut log = RedoLog {
            dir: dir.into(),
            file: None,
            buffer: vec![],
            written: 0,
            check: [0; 16],
            sealed: checkpoint,
            sealed_end: 0,
            sealed_check: [0; 16],
            latched: None,
        };
        let all = segments(dir)?;
        let mut broken = false;
        for (_, path) in &all {
            let segment = if broken { None } else { Segment::open(path)? };
            let Some(mut segment) = segment else {
                // Behind a torn place nothing was acknowledged: whoever wrote it had not synced what is before it.
                fs::remove_file(path).map_err(failed(path))?;
                broken = true;
                continue;
            };
            let (mut end, mut check) = (HEADER, segment.check);
            while let Some(record) = segment.next()? {
                if let Some(chain) = record.chain {
                    let lsn = record.frame.lsn;
                    if lsn > log.sealed.lsn {
                        if record.frame.prev > log.sealed.lsn {
                            return Err(RedoError::Gap { after: log.sealed.lsn });
                        }
                        log.sealed = Position { lsn, chain };
                    }
                    (end, check) = (segment.at, segment.check);
                }
            }
            let file = OpenOptions::new().write(true).open(path).map_err(failed(path))?;
            if file.metadata().map_err(failed(path))?.len() != end {
                file.set_len(end).and_then(|()| file.sync_all()).map_err(failed(path))?;
                broken = true;
            }
            log.check = check;
            (log.sealed_end, log.sealed_check, log.written) = (end, check, end);
            log.file = Some((file, path.clone()));
        }
        if let Some((file, path)) = &mut log.file {
            file.seek(SeekFrom::End(0)).map_err(failed(path))?;
        }
        sync_dir(dir)?;
        Ok(log)
    }

    /// Last position whose txn is whole in the log.
    #[must_use]
    pub fn sealed(&self) -> Position {
        self.sealed
    }

    /// Writes a record; durable after [`RedoLog::sync`].
    ///
    /// # Errors
    /// [`RedoError`]; any error latches.
    pub fn append(&mut self, record: &Record) -> Result<(), RedoError> {
        self.guard()?;
        let result = self.try_append(record);
        self.latch(result)
    }

    fn try_append(&mut self, record: &Record) -> Result<(), RedoError> {
        if record.frame.part == 0 && (self.file.is_none() || self.written >= SEGMENT_BYTES) {
            self.rotate(record.frame.lsn)?;
        }
        let body = codec::encode(record);
        self.check = check_of(&self.check, &body);
        self.buffer.extend_from_slice(&(body.len() as u32).to_le_bytes());
        self.buffer.extend_from_slice(&self.check);
        self.buffer.extend_from_slice(&body);
        self.written += 20 + body.len() as u64;
        if let Some(chain) = record.chain {
            self.sealed = Position { lsn: record.frame.lsn, chain };
            (self.sealed_end, self.sealed_check) = (self.written, self.check);
        }
        if self.buffer.len() >= BUFFER_BYTES { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<(), RedoError> {
        if let Some((file, path)) = &mut self.file {
            file.write_all(&self.buffer).map_err(failed(path))?;
            self.buffer.clear();
        }
        Ok(())
    }

    fn rotate(&mut self, first: Lsn) -> Result<(), RedoError> {
        self.try_sync()?;
        let path = self.dir.join(format!("{:020}.redo", first.0));
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).open(&path).map_err(failed(&path))?;
        let mut header = MAGIC.to_vec();
        header.extend_from_slice(&VERSION.to_le_bytes());
        header.extend_from_slice(&self.check);
        file.write_all(&header).map_err(failed(&path))?;
        file.sync_all().map_err(failed(&path))?;
        sync_dir(&self.dir)?;
        self.written = HEADER;
        self.file = Some((file, path));
        // A segment begins with the first part of a txn, so whatever is taken back from it is taken back to its start.
        (self.sealed_end, self.sealed_check) = (HEADER, self.check);
        Ok(())
    }

    /// Everything appended so far survives a power cut when this returns.
    ///
    /// # Errors
    /// [`RedoError`]; any error latches.
    pub fn sync(&mut self) -> Result<(), RedoError> {
        self.guard()?;
        let result = self.try_sync();
        self.latch(result)
    }

    fn try_sync(&mut self) -> Result<(), RedoError> {
        self.flush()?;
        match &self.file {
            Some((file, path)) => file.sync_data().map_err(failed(path)),
            None => Ok(()),
        }
    }

    /// Takes back parts of a txn that was never sealed (its session ended).
    ///
    /// # Errors
    /// [`RedoError`]; any error latches.
    pub fn discard_unsealed(&mut self) -> Result<(), RedoError> {
        self.guard()?;
        let result = self.flush().and_then(|()| match &mut self.file {
            Some((file, path)) if self.written != self.sealed_end && self.sealed_end >= HEADER => {
                file.set_len(self.sealed_end).and_then(|()| file.seek(SeekFrom::Start(self.sealed_end)).map(|_| ())).map_err(failed(path))
            }
            _ => Ok(()),
        });
        if self.sealed_end >= HEADER {
            (self.written, self.check) = (self.sealed_end, self.sealed_check);
        }
        self.latch(result)
    }

    /// Goes on after `position` although the log has nothing up to there (a sync anew). The checkpoint must be stored first.
    ///
    /// # Errors
    /// [`RedoError`].
    pub fn restart_at(&mut self, position: Position) -> Result<(), RedoError> {
        self.guard()?;
        self.file = None;
        self.buffer.clear();
        for (_, path) in segments(&self.dir)? {
            fs::remove_file(&path).map_err(failed(&path))?;
        }
        sync_dir(&self.dir)?;
        (self.written, self.sealed_end, self.sealed) = (0, 0, position);
        Ok(())
    }

    /// Removes segments that hold nothing after `lsn`; gives the number left.
    ///
    /// # Errors
    /// [`RedoError`].
    pub fn drop_up_to(&mut self, lsn: Lsn) -> Result<usize, RedoError> {
        drop_segments(&self.dir, lsn)
    }

    fn guard(&self) -> Result<(), RedoError> {
        match &self.latched {
            Some(why) => Err(RedoError::Latched { why: why.clone() }),
            None => Ok(()),
        }
    }

    fn latch<T>(&mut self, result: Result<T, RedoError>) -> Result<T, RedoError> {
        if let Err(error) = &result {
            self.latched = Some(error.to_string());
        }
        result
    }
}

/// Removes segments that hold nothing after `lsn` (a segment is named by its first LSN, so the next one's name tells); gives the number left.
///
/// # Errors
/// [`RedoError`].
pub fn drop_segments(dir: &Path, lsn: Lsn) -> Result<usize, RedoError> {
    let all = segments(dir)?;
    let mut left = all.len();
    for pair in all.windows(2) {
        if pair[1].0.0 <= lsn.0 + 1 {
            fs::remove_file(&pair[0].1).map_err(failed(&pair[0].1))?;
            left -= 1;
        }
    }
    Ok(left)
}

fn sync_dir(dir: &Path) -> Result<(), RedoError> {
    File::open(dir).and_then(|d| d.sync_all()).map_err(failed(dir))
}

/// The reading end: gives records in order, from the first after a position.
pub struct RedoReader {
    dir: PathBuf,
    segment: Option<Segment>,
    segment_first: Lsn,
    after: Lsn,
}

impl RedoReader {
    /// Reads records with an LSN greater than `after`.
    #[must_use]
    pub fn new(dir: &Path, after: Lsn) -> Self {
        RedoReader { dir: dir.into(), segment: None, segment_first: Lsn::ZERO, after }
    }

    /// The next record, or `None` when there is none yet.
    ///
    /// # Errors
    /// [`RedoError`].
    pub fn next_record(&mut self) -> Result<Option<Record>, RedoError> {
        loop {
            if let Some(segment) = &mut self.segment {
                match segment.next()? {
                    Some(record) if record.frame.lsn <= self.after => continue,
                    Some(record) => return Ok(Some(record)),
                    None => {}
                }
            }
            let later = segments(&self.dir)?.into_iter().filter(|(first, _)| self.segment.is_none() || *first > self.segment_first);
            let next = if self.segment.is_none() {
                // The last segment that starts at or before the wanted LSN holds it.
                let all: Vec<_> = later.collect();
                let at = all.iter().rposition(|(first, _)| first.0 <= self.after.0 + 1).unwrap_or(0);
                all.into_iter().nth(at)
            } else {
                later.into_iter().next()
            };
            let Some((first, path)) = next else { return Ok(None) };
            match Segment::open(&path)? {
                Some(segment) => {
                    self.segment = Some(segment);
                    self.segment_first = first;
                }
                None => return Ok(None),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use twinbox_protocol::digest::Digest;
    use twinbox_protocol::ops::Op;
    use twinbox_protocol::path::RelPath;

    fn record(lsn: u64, part: u32, seal: bool) -> Record {
        let ops = vec![Op::Remove { path: RelPath::new(format!("f{lsn}-{part}").as_bytes()).unwrap() }];
        let seal = seal.then_some(Seal { digest: Digest::default(), ops: 1 });
        let chain = seal.map(|_| ChainHash([lsn as u8; 32]));
        Record { frame: LogFrame { lsn: Lsn(lsn), prev: Lsn(lsn - 1), part, flags: 0, captured_ns: 0, ops, seal }, chain }
    }

    fn lsns(dir: &Path, after: u64) -> Vec<u64> {
        let mut reader = RedoReader::new(dir, Lsn(after));
        std::iter::from_fn(|| reader.next_record().unwrap()).map(|r| r.frame.lsn.0).collect()
    }

    #[test]
    fn what_was_synced_is_read_back_and_an_open_txn_is_cut_off() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = RedoLog::open(dir.path(), Position::START).unwrap();
        for lsn in 1..=3 {
            log.append(&record(lsn, 0, true)).unwrap();
        }
        log.append(&record(4, 0, false)).unwrap();
        log.sync().unwrap();
        drop(log);
        let mut log = RedoLog::open(dir.path(), Position::START).unwrap();
        assert_eq!(log.sealed().lsn, Lsn(3));
        assert_eq!(lsns(dir.path(), 1), [2, 3]);
        log.append(&record(4, 0, false)).unwrap();
        log.discard_unsealed().unwrap();
        log.append(&record(4, 0, false)).unwrap();
        log.append(&record(4, 1, true)).unwrap();
        log.sync().unwrap();
        assert_eq!(lsns(dir.path(), 0), [1, 2, 3, 4, 4]);
    }

    #[test]
    fn parts_taken_back_from_a_new_segment_leave_nothing_that_hides_later_records() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = RedoLog::open(dir.path(), Position::START).unwrap();
        log.append(&record(1, 0, false)).unwrap();
        log.discard_unsealed().unwrap();
        log.append(&record(1, 0, true)).unwrap();
        log.written = SEGMENT_BYTES;
        log.append(&record(2, 0, false)).unwrap();
        log.discard_unsealed().unwrap();
        let mut third = record(3, 0, true);
        third.frame.prev = Lsn(1);
        log.append(&third).unwrap();
        log.sync().unwrap();
        drop(log);
        assert_eq!(lsns(dir.path(), 0), [1, 3]);
        assert_eq!(RedoLog::open(dir.path(), Position::START).unwrap().sealed().lsn, Lsn(3));
        assert_eq!(segments(dir.path()).unwrap().len(), 2);
    }

    #[test]
    fn damage_anywhere_loses_only_what_is_behind_it() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = RedoLog::open(dir.path(), Position::START).unwrap();
        for lsn in 1..=20 {
            log.append(&record(lsn, 0, true)).unwrap();
        }
        log.sync().unwrap();
        drop(log);
        let path = segments(dir.path()).unwrap()[0].1.clone();
        let good = fs::read(&path).unwrap();
        for at in (HEADER as usize..good.len()).step_by(7) {
            let mut bad = good.clone();
            bad[at] ^= 0x40;
            fs::write(&path, &bad).unwrap();
            let log = RedoLog::open(dir.path(), Position::START).unwrap();
            let kept = log.sealed().lsn.0;
            assert!(kept < 20);
            assert_eq!(lsns(dir.path(), 0), (1..=kept).collect::<Vec<_>>());
        }
        for len in [0, 5, HEADER as usize] {
            fs::write(&path, &good[..len]).unwrap();
            assert_eq!(RedoLog::open(dir.path(), Position::START).unwrap().sealed().lsn, Lsn(0));
        }
        fs::write(&path, b"something else entirely, not a segment").unwrap();
        assert!(matches!(RedoLog::open(dir.path(), Position::START), Err(RedoError::Foreign { .. })));
    }

    #[test]
    fn a_reader_follows_the_writer_and_dropped_segments_do_not_matter() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = RedoLog::open(dir.path(), Position::START).unwrap();
        let mut reader = RedoReader::new(dir.path(), Lsn(0));
        assert!(reader.next_record().unwrap().is_none());
        for lsn in 1..=6 {
            if lsn % 2 == 0 {
                log.written = SEGMENT_BYTES;
            }
            log.append(&record(lsn, 0, true)).unwrap();
            log.sync().unwrap();
            assert_eq!(reader.next_record().unwrap().unwrap().frame.lsn, Lsn(lsn));
            assert!(reader.next_record().unwrap().is_none());
        }
        assert_eq!(segments(dir.path()).unwrap().len(), 4);
        assert_eq!(log.drop_up_to(Lsn(4)).unwrap(), 2);
        assert_eq!(lsns(dir.path(), 4), [5, 6]);
        drop(log);
        let at = Position { lsn: Lsn(4), chain: ChainHash([4; 32]) };
        assert_eq!(RedoLog::open(dir.path(), at).unwrap().sealed().lsn, Lsn(6));
        assert!(matches!(RedoLog::open(dir.path(), Position::START), Err(RedoError::Gap { .. })));
    }
}
