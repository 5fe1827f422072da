//! The steps a change goes through, each alone: chunk, hash, plan, encode, decode, redo log, manifest.
//!
//! State files lie under the system's temporary directory (`TMPDIR`): choose the disk under test with it. How to read the figures is in
//! `benches/README.md`.

#![allow(missing_docs, reason = "criterion's macros make public items without any")]

use std::collections::BTreeMap;
use std::hint::black_box;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use serde_bytes::ByteBuf;
use twinbox_protocol::chunk::Chunker;
use twinbox_protocol::codec::{decode_log, encode};
use twinbox_protocol::content::{PAGE, TreeHasher};
use twinbox_protocol::digest::{Digest, DigestKey};
use twinbox_protocol::entry::{Entry, Kind, Time};
use twinbox_protocol::ids::{ChainHash, ContentHash, Lsn};
use twinbox_protocol::msg::Position;
use twinbox_protocol::ops::{Content, LogFrame, Op, Seal};
use twinbox_protocol::path::RelPath;
use twinbox_resync::manifest::{Manifest, plain_dir};
use twinbox_resync::plan::{Body, Found, Seen, plan};
use twinbox_resync::redo::{Record, RedoLog};
use twinbox_resync::rows::{Local, Row, Rows, perform};
use twinbox_resync::view::View;
use twinbox_tests::mailload::sized_message;
use twinbox_tests::rng::Rng;

const LARGE: usize = 32 << 20;
const MESSAGE: usize = 4_000;

fn message(n: usize) -> Vec<u8> {
    sized_message(&mut Rng::part(1, n as u64), n, MESSAGE)
}

fn path(n: usize) -> RelPath {
    let name = format!("user{:03}/cur/1700000000.M{n}P1.host,S={MESSAGE}:2,S", n % 100);
    RelPath::new(name.as_bytes()).expect("a legal path")
}

fn entry(bytes: &[u8]) -> Entry {
    let kind = Kind::File { size: bytes.len() as u64, hash: ContentHash::of(bytes) };
    Entry { kind, mode: 0o600, uid: 1000, gid: 1000, mtime: Time { secs: 1_700_000_000, nanos: 5 }, xattrs: vec![] }
}

fn put(n: usize) -> Op {
    let bytes = message(n);
    Op::Put { path: path(n), entry: entry(&bytes), content: Content::Inline(ByteBuf::from(bytes)) }
}

fn frame(lsn: u64, ops: Vec<Op>) -> LogFrame {
    let seal = Some(Seal { digest: Digest::default(), ops: ops.len() as u64 });
    LogFrame { lsn: Lsn(lsn), prev: Lsn(lsn - 1), part: 0, flags: 0, captured_ns: 0, ops, seal }
}

/// A manifest with the folders of [`path`], in a directory of its own.
fn manifest(full_sync: bool) -> (tempfile::TempDir, Manifest) {
    let dir = tempfile::tempdir().expect("a scratch directory");
    let mut manifest = Manifest::open(&dir.path().join("manifest.db"), full_sync).expect("a manifest");
    manifest.set_digest_key(DigestKey([7; 32])).expect("a key");
    for user in 0..100 {
        for name in [format!("user{user:03}"), format!("user{user:03}/cur")] {
            let path = RelPath::new(name.as_bytes()).expect("a legal path");
            perform(&mut manifest, &Op::Make { path, entry: plain_dir() }).expect("a folder");
        }
    }
    (dir, manifest)
}

fn content(c: &mut Criterion) {
    let bytes = Rng::new(2).bytes(LARGE);
    let mut group = c.benchmark_group("content");
    group.throughput(Throughput::Bytes(LARGE as u64)).sample_size(20);
    group.bench_function("chunk 32 MiB", |b| {
        b.iter(|| {
            let (mut chunker, mut count) = (Chunker::default(), 0u32);
            bytes.chunks(1 << 20).for_each(|piece| chunker.update(piece, |_, _| count += 1));
            chunker.finish(|_, _| count += 1);
            count
        });
    });
    let tree = || {
        let mut hasher = TreeHasher::default();
        bytes.chunks(1 << 20).for_each(|piece| hasher.update(piece));
        hasher.finish()
    };
    group.bench_function("page tree of 32 MiB", |b| b.iter(tree));
    group.throughput(Throughput::Elements(1));
    let whole = tree().1.expect("longer than a page");
    group.bench_function("one page of 32 MiB replaced and named", |b| {
        b.iter_batched_ref(
            || whole.clone(),
            |tree| {
                tree.replace(100 * PAGE as u64, black_box(&bytes[..PAGE]));
                tree.root()
            },
            BatchSize::LargeInput,
        );
    });
    group.finish();
}

fn codec(c: &mut Criterion) {
    let txn = frame(1, (0..100).map(put).collect());
    let body = encode(&txn);
    let mut group = c.benchmark_group("codec");
    group.throughput(Throughput::Bytes(body.len() as u64));
    group.bench_function("encode 100 puts", |b| b.iter(|| encode(black_box(&txn))));
    group.bench_function("decode 100 puts", |b| b.iter(|| decode_log(black_box(&body)).expect("decodes")));
    group.finish();
}

fn rows(c: &mut Criterion) {
    let (_dir, mut manifest) = manifest(true);
    let rows: Vec<(RelPath, Row)> = (0..1000).map(|n| (path(n), Row { entry: entry(&[n as u8; 10]), local: None })).collect();
    let mut lsn = 0;
    let mut group = c.benchmark_group("manifest");
    group.throughput(Throughput::Elements(1000)).sample_size(20);
    group.bench_function("1,000 rows in a transaction, synced", |b| {
        b.iter(|| {
            lsn += 1;
            manifest.begin().expect("begins");
            manifest.set_lsn(Lsn(lsn));
            for (path, row) in &rows {
                manifest.set(path, Some(row.clone())).expect("a row");
            }
            manifest.commit(Position { lsn: Lsn(lsn), chain: ChainHash::ZERO }).expect("commits");
        });
    });
    group.finish();
}

fn redo(c: &mut Criterion) {
    let dir = tempfile::tempdir().expect("a scratch directory");
    let mut log = RedoLog::open(dir.path(), Position::START).expect("a log");
    let ops: Vec<Op> = (0..100).map(put).collect();
    let mut lsn = 0;
    let mut group = c.benchmark_group("redo");
    group.throughput(Throughput::Elements(100)).sample_size(20);
    for (name, each) in [("append 100 small txns, one sync", false), ("append 100 small txns, a sync each", true)] {
        group.bench_function(name, |b| {
            b.iter(|| {
                for op in &ops {
                    lsn += 1;
                    let record = Record { frame: frame(lsn, vec![op.clone()]), chain: Some(ChainHash::ZERO) };
                    log.append(&record).expect("appends");
                    if each {
                        log.sync().expect("syncs");
                    }
                }
                log.sync().expect("syncs");
                log.drop_up_to(Lsn(lsn)).expect("old segments go");
            });
        });
    }
    group.finish();
}

fn planning(c: &mut Criterion) {
    let (_dir, manifest) = manifest(false);
    let mut view = View::new(manifest);
    let seen: BTreeMap<RelPath, Seen> = (0..1000)
        .map(|n| {
            let bytes = message(n);
            let local = Local { ino: n as u64 + 1000, ctime: Time::default() };
            let found = Found { entry: entry(&bytes), local, nlink: 1, body: Body::Bytes(bytes) };
            (path(n), Seen::Present(Box::new(found)))
        })
        .collect();
    let mut group = c.benchmark_group("plan");
    group.throughput(Throughput::Elements(1000)).sample_size(20);
    group.bench_function("1,000 dirty paths, all new", |b| {
        b.iter(|| {
            let ops = plan(&mut view, Lsn(1), black_box(&seen), &[]).expect("a plan");
            assert_eq!(ops.len(), 1000);
            // Nothing of it became durable: the next round starts from the same rows.
            view.handle_restart();
        });
    });
    group.finish();
}

criterion_group!(benches, content, codec, rows, redo, planning);
criterion_main!(benches);
