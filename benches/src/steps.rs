//! The steps a change goes through, each alone: chunk, hash, plan, encode, decode, redo log, manifest, reconcile. `micro` times them, `instructions` counts them.
//!
//! State files lie under the system's temporary directory (`TMPDIR`): choose the disk under test with it.

use std::collections::{BTreeMap, HashMap};
use std::hint::black_box;

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
use twinbox_protocol::rejoin::Flags;
use twinbox_resync::manifest::{Manifest, plain_dir};
use twinbox_resync::plan::{Body, Found, Seen, plan};
use twinbox_resync::reconcile::{Change, Mail, Policy, Tail, reconcile};
use twinbox_resync::redo::{Record, RedoLog};
use twinbox_resync::rows::{Local, Row, Rows, perform};
use twinbox_resync::view::View;
use twinbox_tests::mailload::sized_message;
use twinbox_tests::rng::Rng;

const MESSAGE: usize = 4_000;

/// What one run of a step goes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Per {
    /// So many bytes.
    Bytes(usize),
    /// So many things.
    Elements(usize),
}

/// A step, set up: it can be run again and again.
pub struct Step {
    /// What one run goes through.
    pub per: Per,
    work: Box<dyn FnMut()>,
}

impl Step {
    fn new(per: Per, work: impl FnMut() + 'static) -> Self {
        Self { per, work: Box::new(work) }
    }

    /// Runs it once.
    pub fn run(&mut self) {
        counted(&mut *self.work);
    }
}

/// What `instructions` counts: everything that is called from here, and nothing else.
#[inline(never)]
pub fn counted(work: &mut dyn FnMut()) {
    work();
}

/// Sets up a step of a size: by bytes or elements, as the step has it.
pub type SetUp = fn(usize) -> Step;

/// Every step: its name, how large it is timed, how large it is counted (which is slower by a factor of fifty), how it is set up.
pub const ALL: [(&str, usize, usize, SetUp); 10] = [
    ("content/chunk", 32 << 20, 2 << 20, chunk),
    ("content/page tree", 32 << 20, 2 << 20, page_tree),
    ("content/one page replaced and named", 32 << 20, 32 << 20, one_page),
    ("codec/encode puts", 100, 100, encoding),
    ("codec/decode puts", 100, 100, decoding),
    ("manifest/rows in a transaction, synced", 1_000, 1_000, rows),
    ("redo/append small txns, one sync", 100, 100, |n| redo(n, false)),
    ("redo/append small txns, a sync each", 100, 100, |n| redo(n, true)),
    ("plan/dirty paths, all new", 1_000, 1_000, planning),
    ("reconcile/messages of a tail", 1_000_000, 5_000, reconciling),
];

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

fn chunk(len: usize) -> Step {
    let bytes = Rng::new(2).bytes(len);
    Step::new(Per::Bytes(len), move || {
        let (mut chunker, mut count) = (Chunker::default(), 0u32);
        bytes.chunks(1 << 20).for_each(|piece| chunker.update(piece, |_, _| count += 1));
        chunker.finish(|_, _| count += 1);
        black_box(count);
    })
}

fn hashed(bytes: &[u8]) -> TreeHasher {
    let mut hasher = TreeHasher::default();
    bytes.chunks(1 << 20).for_each(|piece| hasher.update(piece));
    hasher
}

fn page_tree(len: usize) -> Step {
    let bytes = Rng::new(2).bytes(len);
    Step::new(Per::Bytes(len), move || drop(black_box(hashed(&bytes).finish())))
}

fn one_page(len: usize) -> Step {
    let bytes = Rng::new(2).bytes(len);
    let mut tree = hashed(&bytes).finish().1.expect("longer than a page");
    let mut n = 0;
    Step::new(Per::Elements(1), move || {
        // Another content each time.
        n = (n + 1) % 50;
        tree.replace(100 * PAGE as u64, black_box(&bytes[n * PAGE..(n + 1) * PAGE]));
        black_box(tree.root());
    })
}

fn encoding(count: usize) -> Step {
    let txn = frame(1, (0..count).map(put).collect());
    Step::new(Per::Elements(count), move || drop(black_box(encode(black_box(&txn)))))
}

fn decoding(count: usize) -> Step {
    let body = encode(&frame(1, (0..count).map(put).collect()));
    Step::new(Per::Elements(count), move || drop(black_box(decode_log(black_box(&body)).expect("decodes"))))
}

fn rows(count: usize) -> Step {
    let (dir, mut manifest) = manifest(true);
    let rows: Vec<(RelPath, Row)> = (0..count).map(|n| (path(n), Row { entry: entry(&[n as u8; 10]), local: None })).collect();
    let mut lsn = 0;
    Step::new(Per::Elements(count), move || {
        let _ = &dir;
        lsn += 1;
        manifest.begin().expect("begins");
        manifest.set_lsn(Lsn(lsn));
        for (path, row) in &rows {
            manifest.set(path, Some(row.clone())).expect("a row");
        }
        manifest.commit(Position { lsn: Lsn(lsn), chain: ChainHash::ZERO }).expect("commits");
    })
}

fn redo(count: usize, each: bool) -> Step {
    let dir = tempfile::tempdir().expect("a scratch directory");
    let mut log = RedoLog::open(dir.path(), Position::START).expect("a log");
    let ops: Vec<Op> = (0..count).map(put).collect();
    let mut lsn = 0;
    Step::new(Per::Elements(count), move || {
        let _ = &dir;
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
    })
}

fn planning(count: usize) -> Step {
    let (dir, manifest) = manifest(false);
    let mut view = View::new(manifest);
    let seen: BTreeMap<RelPath, Seen> = (0..count)
        .map(|n| {
            let bytes = message(n);
            let local = Local { ino: n as u64 + 1000, ctime: Time::default() };
            let found = Found { entry: entry(&bytes), local, nlink: 1, body: Body::Bytes(bytes) };
            (path(n), Seen::Present(Box::new(found)))
        })
        .collect();
    Step::new(Per::Elements(count), move || {
        let _ = &dir;
        let ops = plan(&mut view, Lsn(1), black_box(&seen), &[]).expect("a plan");
        assert_eq!(ops.len(), seen.len());
        // Nothing of it became durable: the next round starts from the same rows.
        view.handle_restart();
    })
}

/// A tail of new messages, which the other node has none of.
fn reconciling(count: usize) -> Step {
    let tail: Tail = (0..count)
        .map(|n| {
            let owner = RelPath::new(format!("user{:03}", n % 100).as_bytes()).expect("a legal path");
            let flags: Flags = [String::from("S")].into_iter().collect();
            let change = Change { fork: None, ours: Some(entry(&n.to_le_bytes())), was: None, owner, flags, fork_flags: Flags::new() };
            (path(n), change)
        })
        .collect();
    let theirs = HashMap::new();
    Step::new(Per::Elements(count), move || {
        let plan = reconcile(black_box(&tail), Mail::Maildir, Policy::Merge, &theirs);
        assert_eq!(plan.items.len(), tail.len());
        black_box(plan);
    })
}
