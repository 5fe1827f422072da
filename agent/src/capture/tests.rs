//! The capture against a model standby: it acknowledges everything and performs the ops on a manifest of its own, which must end up equal to the store.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use twinbox_protocol::codec::decode_log;
use twinbox_protocol::entry::{Entry, Kind, Time};
use twinbox_protocol::ids::{ContentHash, Incarnation, Lsn};
use twinbox_protocol::msg::{Position, Replica, Welcome};
use twinbox_protocol::path::RelPath;
use twinbox_resync::manifest::{Manifest, plain_dir};
use twinbox_resync::node::{LocalMark, NodeState};
use twinbox_resync::rows::{Local, Row, Rows, perform};

use super::messages::BulkMessage;
use super::testing::{self, history};
use super::{Capture, CaptureConfig, CaptureError, CaptureHandle, Command, Step, ToLink};

struct World {
    _dir: tempfile::TempDir,
    root: PathBuf,
    state: PathBuf,
    capture: Option<Capture>,
    replica: Arc<Mutex<Manifest>>,
    session: u64,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (root, state) = (dir.path().join("root"), dir.path().join("state"));
        fs::create_dir_all(&root).unwrap();
        fs::create_dir_all(&state).unwrap();
        NodeState::open(&state).unwrap().set_mirror("m", &history()).unwrap();
        let mut replica = Manifest::open(&dir.path().join("replica.db"), true).unwrap();
        replica.set_digest_key(history().digest_key).unwrap();
        replica.begin().unwrap();
        World { _dir: dir, root, state, capture: None, replica: Arc::new(Mutex::new(replica)), session: 0 }
    }

    fn config(&self) -> CaptureConfig {
        testing::config(&self.root, &self.state, 4)
    }

    fn start(&mut self) -> CaptureHandle {
        let capture = Capture::start(self.config()).unwrap();
        let handle = capture.handle();
        self.capture = Some(capture);
        handle
    }

    /// Opens a session and serves it on a task until the capture ends it.
    async fn connect(&mut self, handle: &CaptureHandle, replica: Replica) {
        let hello = handle.ask(Command::Hello).await.unwrap();
        let welcome = Welcome {
            protocol: hello.protocol,
            software: String::new(),
            node: "b".into(),
            incarnation: Incarnation([5; 16]),
            chunker: hello.chunker,
            replica,
            wall_ns: 0,
        };
        let step = handle.ask(|reply| Command::Welcome(Box::new(welcome), reply)).await.unwrap().unwrap();
        let Step::Begin { from, reset } = step else { panic!("{step:?}") };
        if reset {
            let mut replica = self.replica.lock().unwrap();
            replica.clear().unwrap();
            replica.commit(from).unwrap();
            replica.begin().unwrap();
        }
        let (out, mut txns) = mpsc::unbounded_channel();
        let (bulk, mut objects) = mpsc::channel(4);
        self.session += 1;
        handle.send(Command::Up { id: self.session, out, bulk, peer: "b".into() });
        let (replica, capture) = (self.replica.clone(), handle.clone());
        tokio::spawn(async move {
            while let Some(message) = txns.recv().await {
                let ToLink::Txn(frames) = message else { continue };
                let mut replica = replica.lock().unwrap();
                for body in frames {
                    let frame = decode_log(&body).unwrap();
                    replica.set_lsn(frame.lsn);
                    for op in &frame.ops {
                        perform(&mut *replica, op).unwrap();
                    }
                    if let Some(seal) = frame.seal {
                        assert_eq!(replica.digest(), seal.digest);
                        capture.send(Command::Durable(frame.lsn));
                        capture.send(Command::Applied(frame.lsn));
                    }
                }
            }
        });
        let capture = handle.clone();
        tokio::spawn(async move {
            while let Some(message) = objects.recv().await {
                if let BulkMessage::Item(_, twinbox_protocol::msg::BulkItem::End { hash, .. }) = message {
                    capture.send(Command::Staged(hash));
                }
            }
        });
    }

    fn check(&self) {
        let replica = self.replica.lock().unwrap();
        let rows: BTreeMap<RelPath, _> = replica.below(&RelPath::root()).unwrap().into_iter().collect();
        let mut disk = BTreeMap::new();
        walk(&self.root, &RelPath::root(), &mut disk);
        let missing: Vec<_> = disk.keys().filter(|p| !rows.contains_key(*p)).collect();
        let extra: Vec<_> = rows.keys().filter(|p| !disk.contains_key(*p)).collect();
        assert!(missing.is_empty() && extra.is_empty(), "missing {missing:?} extra {extra:?}");
        for (path, meta) in disk {
            let entry = &rows[&path].entry;
            let full = self.root.join(path.to_string());
            assert_eq!((entry.mtime.secs, i64::from(entry.mtime.nanos)), (meta.mtime(), meta.mtime_nsec()), "{path}");
            if let Kind::File { hash, .. } = entry.kind {
                assert_eq!(hash, ContentHash::of(&fs::read(&full).unwrap()), "{path}");
            }
        }
    }
}

fn walk(at: &Path, path: &RelPath, out: &mut BTreeMap<RelPath, fs::Metadata>) {
    for item in fs::read_dir(at).unwrap() {
        let item = item.unwrap();
        let path = path.join(item.file_name().as_encoded_bytes()).unwrap();
        let meta = item.metadata().unwrap();
        if meta.is_dir() {
            walk(&item.path(), &path, out);
        }
        out.insert(path, meta);
    }
}

async fn settled(handle: &CaptureHandle) {
    let done = tokio::time::timeout(Duration::from_secs(60), handle.ask(Command::Sync)).await;
    assert!(matches!(done, Ok(Some(()))), "{:?}", handle.status());
}

#[tokio::test(flavor = "multi_thread")]
async fn first_sync_then_every_kind_of_change() {
    let mut world = World::new();
    let r = world.root.clone();
    fs::create_dir_all(r.join("u/cur")).unwrap();
    fs::write(r.join("u/cur/a"), b"one").unwrap();
    fs::write(r.join("u/big"), vec![7; 3 << 20]).unwrap();
    let handle = world.start();
    world.connect(&handle, Replica::Empty).await;
    settled(&handle).await;
    world.check();
    fs::rename(r.join("u/cur/a"), r.join("u/cur/b")).unwrap();
    fs::write(r.join("u/cur/c"), b"two").unwrap();
    fs::hard_link(r.join("u/cur/c"), r.join("u/d")).unwrap();
    fs::create_dir_all(r.join("v/w/x")).unwrap();
    fs::rename(r.join("u/cur"), r.join("v/cur")).unwrap();
    fs::write(r.join("v/cur/late"), b"in the moved folder").unwrap();
    fs::write(r.join("u/d"), b"through the other name").unwrap();
    settled(&handle).await;
    world.check();
    fs::remove_dir_all(r.join("v")).unwrap();
    settled(&handle).await;
    world.check();
    // A directory's own times may still follow; then nothing is left.
    let mut tick = tokio::time::interval(Duration::from_millis(5));
    let deadline = Instant::now() + Duration::from_secs(10);
    while !(handle.status().protected && handle.status().pending_paths == 0) {
        assert!(Instant::now() < deadline, "{:?}", handle.status());
        tick.tick().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_finds_what_happened_meanwhile_and_ships_nothing_else() {
    let mut world = World::new();
    let r = world.root.clone();
    for n in 0..200 {
        fs::create_dir_all(r.join(format!("u{}", n % 7))).unwrap();
        fs::write(r.join(format!("u{}/f{n}", n % 7)), format!("{n}")).unwrap();
    }
    let handle = world.start();
    world.connect(&handle, Replica::Empty).await;
    settled(&handle).await;
    world.capture = None;
    fs::write(r.join("u1/new"), b"new").unwrap();
    fs::remove_file(r.join("u0/f7")).unwrap();
    fs::rename(r.join("u2"), r.join("z")).unwrap();
    let handle = world.start();
    let hello = handle.ask(Command::Hello).await.unwrap();
    let holds = Replica::Holds {
        lineage: hello.lineage.clone(),
        epoch: hello.epoch,
        position: hello.position,
        digest: world.replica.lock().unwrap().digest(),
        chain_at_yours: None,
        complete: true,
    };
    // Asked before the standby is there: answered only when what the comparison finds has arrived.
    let asker = handle.clone();
    let early = tokio::spawn(async move { settled(&asker).await });
    world.connect(&handle, holds).await;
    early.await.unwrap();
    world.check();
    let status = handle.status();
    assert!(status.bytes < 20_000, "{} bytes for a new file, a removal and a moved folder", status.bytes);
    assert_ne!(hello.position, Position::START);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_storm_of_moves_of_files_and_folders_converges() {
    let mut world = World::new();
    let handle = world.start();
    world.connect(&handle, Replica::Empty).await;
    settled(&handle).await;
    let end = Instant::now() + Duration::from_secs(3);
    let storm = |seed: u64, r: PathBuf| {
        std::thread::spawn(move || {
            let mut x = seed;
            let mut next = |n: u64| {
                x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (x >> 33) % n
            };
            let mut ops = 0u64;
            while Instant::now() < end || ops < 600 {
                let (a, b) = (next(6), next(6));
                let (m, n) = (next(4), next(4));
                let (p, q) = (r.join(format!("d{a}/s{m}")), r.join(format!("d{b}/s{n}")));
                let _ = match next(8) {
                    0 => fs::create_dir_all(&p),
                    1 => fs::rename(&p, &q),
                    2 => fs::rename(r.join(format!("d{a}")), r.join(format!("d{b}"))),
                    3 => fs::rename(p.join(format!("f{}", next(20))), q.join(format!("f{}", next(20)))),
                    4 => fs::remove_file(p.join(format!("f{}", next(20)))),
                    5 if next(20) == 0 => fs::remove_dir_all(&p),
                    _ => fs::write(p.join(format!("f{}", next(20))), format!("{ops}")),
                };
                ops += 1;
            }
            ops
        })
    };
    let threads: Vec<_> = (1..3).map(|seed| storm(seed, world.root.clone())).collect();
    let ops: u64 = threads.into_iter().map(|t| t.join().unwrap()).sum();
    settled(&handle).await;
    let status = handle.status();
    assert!(ops > 1000 && status.failed.is_none(), "{ops} {status:?}");
    world.check();
}

/// After a power cut nothing may be shipped before it was healed; after a stop in order, or a kill, everything may.
#[test]
fn a_store_that_was_not_healed_is_not_captured() {
    let mut world = World::new();
    let state = NodeState::open(&world.state).unwrap();
    let mark = || state.local_mark("m").unwrap().unwrap();
    world.start();
    assert!(!mark().clean, "taken away before anything is shipped");
    let boot = mark().boot;
    world.capture = None;
    assert!(mark().clean);
    for (boot, clean, refused) in [(&boot[..], false, false), ("another", true, false), ("another", false, true)] {
        state.set_local_mark("m", &LocalMark { boot: boot.into(), lsn: Lsn(3), clean }).unwrap();
        let started = Capture::start(world.config());
        assert_eq!(matches!(started, Err(CaptureError::NotHealed {})), refused, "{boot} {clean}");
    }
    assert_eq!(mark(), LocalMark { boot: "another".into(), lsn: Lsn(3), clean: false }, "a refusal changes nothing");
}

/// The mail server ran on after an orderly stop: new bytes can be under old times after a power cut that nobody is asked about.
#[test]
fn what_is_written_in_place_is_read_again_after_every_boot() {
    let mut world = World::new();
    world.start();
    world.capture = None;
    let state = NodeState::open(&world.state).unwrap();
    let db = RelPath::new(b"db").unwrap();
    let noted = Local { ino: 5, ctime: Time { secs: 9, nanos: 9 } };
    let local = || {
        let manifest = Manifest::open(&world.state.join("mirrors/m/manifest.db"), false).unwrap();
        manifest.row(&db).unwrap().unwrap().local
    };
    let mut manifest = Manifest::open(&world.state.join("mirrors/m/manifest.db"), false).unwrap();
    let kind = Kind::File { size: 1, hash: ContentHash::of(b"1") };
    let entry = Entry { kind, ..plain_dir() };
    manifest.set(&db, Some(Row { entry, local: Some(noted) })).unwrap();
    manifest.note_in_place(5).unwrap();
    manifest.commit(Position::START).unwrap();
    drop(manifest);
    drop(Capture::start(world.config()).unwrap());
    assert_eq!(local(), Some(noted), "the same boot");
    state.set_local_mark("m", &LocalMark { boot: "another".into(), lsn: Lsn(3), clean: true }).unwrap();
    drop(Capture::start(world.config()).unwrap());
    assert_eq!(local(), Some(Local { ctime: Default::default(), ..noted }));
}
