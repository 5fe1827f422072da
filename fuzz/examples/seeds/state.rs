//! Seeds of what a standby reads back from its disk.

use twinbox_protocol::codec::encode;
use twinbox_protocol::ids::{ChainHash, Lsn};
use twinbox_protocol::msg::Position;
use twinbox_resync::redo::{Record, RedoLog};

use crate::{seed, wire};

fn record(lsn: u64, sealed: bool) -> Record {
    let (_, op) = wire::ops().into_iter().nth(lsn as usize % 13).expect("an op");
    let mut frame = wire::frame(lsn, vec![op]);
    if !sealed {
        frame.seal = None;
    }
    Record { chain: sealed.then_some(ChainHash([lsn as u8; 32])), frame }
}

fn bodies(records: &[Record]) -> Vec<u8> {
    records
        .iter()
        .flat_map(|r| {
            let body = encode(r);
            [&(body.len() as u16).to_le_bytes()[..], &body].concat()
        })
        .collect()
}

/// A segment as the log writes it, torn and spoiled ones, and records for the target to make segments of.
pub(crate) fn redo() {
    let dir = tempfile::tempdir().expect("a scratch directory");
    let mut log = RedoLog::open(dir.path(), Position::START).expect("a log");
    for lsn in 1..=3 {
        log.append(&record(lsn, true)).expect("appends");
    }
    log.append(&record(4, false)).expect("appends");
    log.sync().expect("syncs");
    let file = std::fs::read(dir.path().join(format!("{:020}.redo", Lsn(1).0))).expect("a segment");
    seed("redo", "file", &[&[0][..], &file].concat());
    seed("redo", "file-torn", &[&[0][..], &file[..file.len() - 9]].concat());
    seed("redo", "file-header-only", &[&[0][..], &file[..28]].concat());
    seed("redo", "file-newer", &[&[0][..], &file[..8], &[2, 0, 0, 0], &[0; 16]].concat());
    seed("redo", "file-zeros", &[0; 40]);
    seed("redo", "records", &[&[1][..], &bodies(&[record(1, true), record(2, false), record(2, true), record(3, true)])].concat());
    seed("redo", "records-gap", &[&[1][..], &bodies(&[record(1, true), record(5, true)])].concat());
    seed("redo", "records-unsealed", &[&[1][..], &bodies(&[record(1, false)])].concat());
    let two = [record(1, true), record(2, true)];
    seed("redo", "records-two-segments", &[&[3][..], &bodies(&two)].concat());
    seed("redo", "records-torn", &[&[0xf5][..], &bodies(&two)].concat());
}

/// Not real encodings: draws for sequences of ops, of some lengths.
pub(crate) fn ops_sequence() {
    for n in 1..=6u8 {
        let mut draws = vec![0; usize::from(n) * 300];
        blake3::Hasher::new().update(&[n]).finalize_xof().fill(&mut draws);
        seed("ops_sequence", &format!("draws-{n}"), &draws);
    }
}
