//! A redo log whose segments hold arbitrary bytes: opening and reading it gives an error or whole records in order, never a panic,
//! and what was opened once opens again the same and goes on.
//!
//! First byte: 0, the rest is the segment's file; else records of (length, body), to which the right header and checks are added,
//! and each bit decides what is spoiled. Fuzzed by `fuzz_targets/redo.rs`; the corpus is replayed by `resync/tests/corpus.rs`.

use std::path::{Path, PathBuf};

use twinbox_protocol::digest::Digest;
use twinbox_protocol::ids::{ChainHash, Lsn};
use twinbox_protocol::msg::Position;
use twinbox_protocol::ops::{LogFrame, Seal};
use twinbox_resync::redo::{Record, RedoLog, RedoReader};

/// In memory where there is one: the log syncs much.
fn scratch() -> tempfile::TempDir {
    let shm = Path::new("/dev/shm");
    let base = if shm.is_dir() { PathBuf::from(shm) } else { std::env::temp_dir() };
    tempfile::Builder::new().prefix("twinbox-redo-").tempdir_in(base).expect("a scratch directory")
}

fn segment(bodies: &[u8], prev: [u8; 16]) -> (Vec<u8>, [u8; 16]) {
    let mut out = b"TWBXREDO\x01\0\0\0".to_vec();
    out.extend_from_slice(&prev);
    let (mut check, mut rest) = (prev, bodies);
    while let Some((len, after)) = rest.split_first_chunk::<2>() {
        let (body, after) = after.split_at(after.len().min(usize::from(u16::from_le_bytes(*len))));
        let mut hasher = blake3::Hasher::new();
        hasher.update(&check).update(body);
        check.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
        out.extend_from_slice(&(body.len() as u32).to_le_bytes());
        out.extend_from_slice(&check);
        out.extend_from_slice(body);
        rest = after;
    }
    (out, check)
}

fn read_all(dir: &Path, after: Lsn) -> Option<Vec<Record>> {
    let mut reader = RedoReader::new(dir, after);
    let mut out = vec![];
    loop {
        match reader.next_record() {
            Ok(Some(record)) => {
                assert!(record.frame.lsn > after, "a record from before");
                out.push(record);
            }
            Ok(None) => return Some(out),
            Err(_) => return None,
        }
        assert!(out.len() <= 1 << 16, "the reader goes round in circles");
    }
}

/// Panics when a promise of the log is broken.
pub(crate) fn check(data: &[u8]) {
    let Some((&kind, data)) = data.split_first() else { return };
    let dir = scratch();
    let place = |first: u64| dir.path().join(format!("{first:020}.redo"));
    match kind {
        0 => std::fs::write(place(1), data).expect("written"),
        _ => {
            let half = if kind & 2 != 0 { data.len() / 2 } else { data.len() };
            let (mut first, check) = segment(&data[..half], [0; 16]);
            if kind & 4 != 0 {
                first.truncate(first.len().saturating_sub(usize::from(kind >> 4)));
            }
            std::fs::write(place(1), &first).expect("written");
            if half < data.len() {
                let prev = if kind & 8 != 0 { [9; 16] } else { check };
                std::fs::write(place(5), segment(&data[half..], prev).0).expect("written");
            }
        }
    }
    let before = read_all(dir.path(), Lsn::ZERO);
    let Ok(log) = RedoLog::open(dir.path(), Position::START) else { return };
    let sealed = log.sealed();
    drop(log);
    let records = read_all(dir.path(), Lsn::ZERO).expect("what was opened can be read");
    if let Some(before) = before {
        assert!(records.len() <= before.len() || kind & 2 != 0, "opening the log made records");
    }
    let highest = records.iter().filter_map(|r| r.chain.map(|_| r.frame.lsn)).max().unwrap_or_default();
    assert!(highest <= sealed.lsn, "a sealed record above the sealed position");

    let mut log = RedoLog::open(dir.path(), Position::START).expect("what was opened opens again");
    assert_eq!(log.sealed(), sealed);
    if sealed.lsn.0 < u64::MAX {
        let seal = Some(Seal { digest: Digest::default(), ops: 0 });
        let frame = LogFrame { lsn: Lsn(sealed.lsn.0 + 1), prev: sealed.lsn, part: 0, flags: 0, captured_ns: 0, ops: vec![], seal };
        let record = Record { frame, chain: Some(ChainHash([7; 32])) };
        log.append(&record).and_then(|()| log.sync()).expect("the log goes on");
        assert_eq!(read_all(dir.path(), sealed.lsn).as_deref(), Some(&[record.clone()][..]));
        drop(log);
        let mut log = RedoLog::open(dir.path(), sealed).expect("opens after what was added");
        assert_eq!(log.sealed().lsn, record.frame.lsn);
        log.drop_up_to(record.frame.lsn).expect("old segments can go");
    }
}
