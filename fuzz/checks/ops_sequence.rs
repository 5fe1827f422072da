//! A sequence of ops on the standby's rows and on the primary's: both accept and refuse the same, a refused op changes nothing, and the
//! digest kept op by op is the digest of the rows computed anew.
//!
//! Ops are drawn from the bytes over a few paths that meet often, some of them of extreme length; only what a frame of the log may carry
//! is performed. Fuzzed by `fuzz_targets/ops_sequence.rs`; the corpus is replayed by `resync/tests/corpus.rs`.

use std::cell::RefCell;
use std::path::{Path, PathBuf};

use arbitrary::{Result, Unstructured};
use serde_bytes::ByteBuf;
use twinbox_protocol::codec::{decode_log, encode};
use twinbox_protocol::digest::{Digest, DigestKey};
use twinbox_protocol::entry::{Entry, Kind, Time};
use twinbox_protocol::ids::{ChainHash, ContentHash, Lsn};
use twinbox_protocol::msg::Position;
use twinbox_protocol::ops::{Attrs, Content, LogFrame, Op};
use twinbox_protocol::path::RelPath;
use twinbox_resync::manifest::Manifest;
use twinbox_resync::rows::{RowError, Rows, perform};
use twinbox_resync::view::View;

/// Kept from run to run, emptied before each: making a database takes longer than everything else here.
struct Pair {
    standby: Manifest,
    primary: View,
    _dir: tempfile::TempDir,
}

thread_local!(static PAIR: RefCell<Option<Pair>> = const { RefCell::new(None) });

const KEY: DigestKey = DigestKey([3; 32]);

fn fresh() -> Pair {
    let shm = Path::new("/dev/shm");
    let base = if shm.is_dir() { PathBuf::from(shm) } else { std::env::temp_dir() };
    let dir = tempfile::Builder::new().prefix("twinbox-rows-").tempdir_in(base).expect("a scratch directory");
    let open = |name: &str, full_sync| {
        let mut manifest = Manifest::open(&dir.path().join(name), full_sync).expect("a manifest");
        manifest.set_digest_key(KEY).expect("a key");
        manifest
    };
    Pair { standby: open("standby.db", true), primary: View::new(open("primary.db", false)), _dir: dir }
}

/// 63 names of the greatest length: some 250 bytes below the longest path there is.
fn deep() -> Vec<u8> {
    [[b'd'; 255]; 63].join(&b'/')
}

fn path(u: &mut Unstructured<'_>) -> Result<RelPath> {
    let deep = deep();
    let names: [&[u8]; 12] = [b"", b"a", b"b", b"a/b", b"a/c", b"a/b/c", b"ab", b"a!", b"a0", &[0xff; 9], &[0xff; 4], &deep];
    let base = RelPath::new(u.choose(&names)?).expect("legal");
    match u.int_in_range(0..=5)? {
        0 => Ok(base.join(b"x").unwrap_or(base)),
        1 => Ok(base.join(&[b'y'; 200]).unwrap_or(base)),
        _ => Ok(base),
    }
}

fn entry(u: &mut Unstructured<'_>) -> Result<Entry> {
    let kind = match u.int_in_range(0..=6)? {
        0 | 1 => Kind::Dir,
        2 => Kind::Symlink { target: ByteBuf::from(b"t") },
        3 => Kind::Fifo,
        4 => Kind::Device { block: u.arbitrary()?, major: 1, minor: 2 },
        _ => Kind::File { size: u64::from(u.arbitrary::<u16>()?), hash: hash(u)? },
    };
    let xattrs = if u.ratio(1, 8)? { vec![(ByteBuf::from(b"user.a"), ByteBuf::from(b"1"))] } else { vec![] };
    let mtime = Time { secs: u.arbitrary()?, nanos: u.int_in_range(0..=999_999_999)? };
    Ok(Entry { kind, mode: u.arbitrary::<u32>()? & 0o7777, uid: u.arbitrary()?, gid: 0, mtime, xattrs })
}

fn hash(u: &mut Unstructured<'_>) -> Result<ContentHash> {
    Ok(ContentHash([u.int_in_range(0..=3)?; 32]))
}

fn op(u: &mut Unstructured<'_>) -> Result<Op> {
    Ok(match u.int_in_range(0..=8)? {
        0 | 1 => Op::Make { path: path(u)?, entry: entry(u)? },
        2 => Op::Put { path: path(u)?, entry: entry(u)?, content: Content::Known },
        3 => Op::Patch { path: path(u)?, entry: entry(u)?, base: hash(u)?, writes: vec![] },
        4 | 5 => Op::Rename { from: path(u)?, to: path(u)? },
        6 => Op::Link { from: path(u)?, to: path(u)? },
        7 => Op::Remove { path: path(u)? },
        _ => Op::SetMeta { path: path(u)?, attrs: Attrs::of(&entry(u)?) },
    })
}

fn legal(lsn: Lsn, op: &Op) -> bool {
    let frame = LogFrame { lsn, prev: Lsn::ZERO, part: 0, flags: 0, captured_ns: 0, ops: vec![op.clone()], seal: None };
    decode_log(&encode(&frame)).is_ok()
}

/// Panics when a promise about the rows is broken.
pub(crate) fn check(data: &[u8]) {
    PAIR.with_borrow_mut(|slot| {
        let mut pair = slot.take().unwrap_or_else(fresh);
        let _ = run(&mut pair, &mut Unstructured::new(data));
        pair.standby.roll_back().expect("rolls back");
        pair.standby.clear().expect("empties");
        pair.primary.handle_restart();
        pair.primary.replace(Manifest::clear).expect("empties");
        pair.primary.handle_restart();
        *slot = Some(pair);
    });
}

fn run(pair: &mut Pair, u: &mut Unstructured<'_>) -> Result<()> {
    let Pair { standby, primary, .. } = pair;
    assert!(standby.is_empty() && standby.digest() == Digest::default());
    standby.begin().expect("begins");
    let mut lsn = Lsn(0);
    let dir = Entry { kind: Kind::Dir, mode: 0o755, uid: 0, gid: 0, mtime: Time::default(), xattrs: vec![] };
    let names = if u.ratio(1, 4)? { 63 } else { 0 };
    let mut deep_dirs = (1..=names).map(|n| RelPath::new(&deep()[..n * 256 - 1]).expect("legal"));
    while !u.is_empty() && lsn.0 < 200 {
        lsn = lsn.next();
        let op = match deep_dirs.next() {
            Some(path) => Op::Make { path, entry: dir.clone() },
            None => op(u)?,
        };
        if !legal(lsn, &op) {
            continue;
        }
        let before = (standby.digest(), standby.len());
        standby.set_lsn(lsn);
        let there = perform(standby, &op);
        primary.start(lsn);
        let here = perform(primary, &op);
        if here.is_ok() {
            primary.keep()
        } else {
            primary.roll_back()
        }
        assert_eq!(there, here, "the nodes disagree about {op:?}");
        if let Err(error) = &there {
            assert!(!matches!(error, RowError::Store { .. }), "{error} at {op:?}");
            assert_eq!((standby.digest(), standby.len()), before, "refused ({error}), but changed something: {op:?}");
        }
        assert_eq!(standby.digest(), primary.digest(), "after {op:?}");
        if u.ratio(1, 16)? {
            primary.handle_durable(Position { lsn, chain: ChainHash::ZERO }).expect("stored");
        }
    }
    // The primary may hold a transaction open; both are compared as they stand.
    let root = RelPath::root();
    let rows = standby.below(&root).expect("rows");
    assert_eq!(rows, primary.below(&root).expect("rows"), "the nodes hold other rows");
    assert_eq!(rows.len() as u64 + u64::from(standby.row(&root).expect("a row").is_some()), standby.len());
    let (kept, empty) = (standby.digest(), standby.is_empty());
    standby.set_digest_key(DigestKey([9; 32])).expect("a key");
    assert!(empty || standby.digest() != kept);
    standby.set_digest_key(KEY).expect("a key");
    assert_eq!(standby.digest(), kept, "the digest kept is not the digest of the rows");
    Ok(())
}
