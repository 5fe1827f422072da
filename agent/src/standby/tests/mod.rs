//! The standby as a whole: frames in, a tree out, whatever dies in between.

mod adopt;
mod apply;
mod content;
mod hostile;
mod ordinary;
mod receive;
mod recover;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_bytes::ByteBuf;
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio::time::timeout;
use twinbox_protocol::digest::{Digest, DigestKey};
use twinbox_protocol::entry::{Entry, Kind, Time};
use twinbox_protocol::ids::{Epoch, Generation, Incarnation, MirrorId};
use twinbox_protocol::lineage::Lineage;
use twinbox_protocol::ops::{Attrs, Content, FLAG_INITIAL, Op};
use twinbox_protocol::outbox::Outbox;
use twinbox_protocol::path::RelPath;
use twinbox_resync::node::Role;
use twinbox_resync::rows::{Local, Row, RowError, Rows, perform};

use super::*;
use crate::tree::{self, Root};

/// Bounds every wait; far above what any of them takes.
async fn soon<F: Future>(future: F) -> F::Output {
    timeout(Duration::from_secs(30), future).await.expect("took too long")
}

fn p(text: &str) -> RelPath {
    RelPath::new(text.as_bytes()).unwrap()
}

fn key() -> DigestKey {
    DigestKey([5; 32])
}

fn ids() -> (u32, u32) {
    (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw())
}

fn entry(kind: Kind, mode: u32, secs: i64) -> Entry {
    let (uid, gid) = ids();
    Entry { kind, mode, uid, gid, mtime: Time { secs, nanos: 123_456_000 }, xattrs: vec![] }
}

fn file(bytes: &[u8], secs: i64) -> Entry {
    entry(Kind::File { size: bytes.len() as u64, hash: ContentHash::of(bytes) }, 0o640, secs)
}

fn dir(secs: i64) -> Entry {
    entry(Kind::Dir, 0o750, secs)
}

fn put(path: &str, bytes: &[u8], secs: i64) -> Op {
    Op::Put { path: p(path), entry: file(bytes, secs), content: Content::Inline(ByteBuf::from(bytes)) }
}

fn mkdir(path: &str, secs: i64) -> Op {
    Op::Make { path: p(path), entry: dir(secs) }
}

fn rename(from: &str, to: &str) -> Op {
    Op::Rename { from: p(from), to: p(to) }
}

fn link(from: &str, to: &str) -> Op {
    Op::Link { from: p(from), to: p(to) }
}

fn remove(path: &str) -> Op {
    Op::Remove { path: p(path) }
}

fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut out);
    out
}

/// The primary's manifest, in memory. `local` numbers inodes, so that link sets can be compared.
#[derive(Clone, Default)]
struct Model {
    rows: BTreeMap<RelPath, Row>,
    bytes: BTreeMap<ContentHash, Vec<u8>>,
    made: u64,
}

impl Rows for Model {
    fn row(&self, path: &RelPath) -> Result<Option<Row>, RowError> {
        Ok(self.rows.get(path).cloned())
    }
    fn set(&mut self, path: &RelPath, row: Option<Row>) -> Result<(), RowError> {
        match row {
            Some(row) => self.rows.insert(path.clone(), row),
            None => self.rows.remove(path),
        };
        Ok(())
    }
    fn below(&self, dir: &RelPath) -> Result<Vec<(RelPath, Row)>, RowError> {
        Ok(self.rows.iter().filter(|(path, _)| path.is_within(dir) && *path != dir).map(|(p, r)| (p.clone(), r.clone())).collect())
    }
    fn is_empty_dir(&self, dir: &RelPath) -> Result<bool, RowError> {
        Ok(self.below(dir)?.is_empty())
    }
}

impl Model {
    fn perform(&mut self, op: &Op) -> Result<(), RowError> {
        perform(self, op)?;
        if let Op::Put { path, content: Content::Inline(bytes), entry } = op {
            self.bytes.insert(entry.hash().unwrap(), bytes.to_vec());
            let _ = path;
        }
        if let Op::Put { path, .. } | Op::Make { path, .. } = op
            && !self.rows[path].entry.is_dir()
        {
            self.made += 1;
            let local = Some(Local { ino: self.made, ctime: Time::default() });
            self.rows.get_mut(path).unwrap().local = local;
        }
        if let Op::Patch { path, entry, base, writes } = op {
            let mut bytes = self.bytes[base].clone();
            bytes.resize(bytes.len().max(entry.size() as usize), 0);
            for (at, data) in writes {
                bytes[*at as usize..*at as usize + data.len()].copy_from_slice(data);
            }
            bytes.truncate(entry.size() as usize);
            assert_eq!(Some(ContentHash::of(&bytes)), entry.hash());
            self.bytes.insert(ContentHash::of(&bytes), bytes);
            let _ = path;
        }
        Ok(())
    }

    fn digest(&self) -> Digest {
        let mut digest = Digest::default();
        self.rows.iter().for_each(|(path, row)| digest.add(Digest::row(&key(), path, &row.entry)));
        digest
    }

    /// A patch of what the model has at `path`.
    fn patch(&self, path: &str, writes: &[(u64, &[u8])], size: u64, secs: i64) -> Op {
        let base = self.rows[&p(path)].entry.hash().unwrap();
        let mut bytes = self.bytes[&base].clone();
        bytes.resize(bytes.len().max(size as usize), 0);
        for (at, data) in writes {
            bytes[*at as usize..*at as usize + data.len()].copy_from_slice(data);
        }
        bytes.truncate(size as usize);
        let writes = writes.iter().map(|(at, data)| (*at, ByteBuf::from(*data))).collect();
        Op::Patch { path: p(path), entry: file(&bytes, secs), base, writes }
    }

    /// What differs between the model and the tree at `root`; empty when nothing does.
    fn differences(&self, root: &Path) -> Vec<String> {
        let tree_root = Root::open(root).unwrap();
        let (mut out, mut found) = (vec![], vec![]);
        let mut rest = vec![RelPath::root()];
        while let Some(path) = rest.pop() {
            let fd = tree_root.dir_for_reading(&path).unwrap();
            for listed in tree::list(std::os::fd::AsFd::as_fd(&fd)).unwrap() {
                let child = path.join(&listed.name).unwrap();
                if tree_root.stat(&child).unwrap().is_some_and(|s| rustix::fs::FileType::from_raw_mode(s.st_mode).is_dir()) {
                    rest.push(child.clone());
                }
                found.push(child);
            }
        }
        for path in &found {
            if !self.rows.contains_key(path) {
                out.push(format!("{path} should not be there"));
            }
        }
        let mut inodes: BTreeMap<u64, u64> = BTreeMap::new();
        let mut back: BTreeMap<u64, u64> = BTreeMap::new();
        for (path, row) in &self.rows {
            let Some(stat) = tree_root.stat(path).unwrap() else {
                out.push(format!("{path} is missing"));
                continue;
            };
            let handle = tree_root.handle(path).unwrap();
            let xattrs = tree::xattrs(std::os::fd::AsFd::as_fd(&handle), true).unwrap();
            let on_disk = root.join(std::ffi::OsStr::new(std::str::from_utf8(path.as_bytes()).unwrap_or("?")));
            let hash = row.entry.hash().map(|_| ContentHash::of(&read(&tree_root, path)));
            let target = matches!(row.entry.kind, Kind::Symlink { .. })
                .then(|| std::os::unix::ffi::OsStrExt::as_bytes(fs::read_link(&on_disk).unwrap().as_os_str()).to_vec());
            let mut seen = tree::entry(&stat, xattrs, hash, target).unwrap();
            if matches!(row.entry.kind, Kind::Symlink { .. }) {
                seen.mode = row.entry.mode;
            }
            if seen != row.entry {
                out.push(format!("{path} is {seen:?}, should be {:?}", row.entry));
            }
            if let Some(local) = row.local.filter(|_| !row.entry.is_dir()) {
                let (a, b) = (*inodes.entry(local.ino).or_insert(stat.st_ino), *back.entry(stat.st_ino).or_insert(local.ino));
                if a != stat.st_ino || b != local.ino {
                    out.push(format!("{path} is not linked as it should be"));
                }
            }
        }
        out
    }
}

fn read(root: &Root, path: &RelPath) -> Vec<u8> {
    use std::io::Read;
    let mut bytes = vec![];
    if let Ok(fd) = root.file(path) {
        fs::File::from(fd).read_to_end(&mut bytes).unwrap();
    }
    bytes
}

/// A standby and the primary that feeds it.
struct Rig {
    dir: TempDir,
    standby: Option<Standby>,
    session: Option<Session>,
    from_standby: mpsc::UnboundedReceiver<ToPrimary>,
    outbox: Outbox,
    model: Model,
    known: Option<MirrorState>,
    /// Messages taken so far.
    heard: Vec<ToPrimary>,
    redo_max: u64,
}

fn followed() -> MirrorState {
    MirrorState {
        mirror_id: MirrorId([1; 16]),
        role: Role::Standby,
        lineage: Lineage::begin(Generation([2; 16]), "a"),
        epoch: Epoch(1),
        digest_key: key(),
        reserved: Lsn(0),
        complete: false,
    }
}

fn hello(position: Position, digest: Digest) -> Hello {
    Hello {
        protocol: 1,
        software: String::new(),
        node: "a".into(),
        mirror: "m".into(),
        mirror_id: MirrorId([1; 16]),
        lineage: Lineage::begin(Generation([2; 16]), "a"),
        epoch: Epoch(1),
        incarnation: Incarnation([3; 16]),
        position,
        digest,
        digest_key: key(),
        chunker: String::new(),
        layout: String::new(),
        wall_ns: 0,
    }
}

impl Rig {
    fn empty() -> Rig {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("root")).unwrap();
        let (_, from_standby) = mpsc::unbounded_channel();
        let mut outbox = Outbox::new(Position::START, Lsn::ZERO);
        outbox.handle_reserved(Lsn(1_000_000));
        Rig {
            dir,
            standby: None,
            session: None,
            from_standby,
            outbox,
            model: Model::default(),
            known: None,
            heard: vec![],
            redo_max: 256 << 20,
        }
    }

    /// A running standby with an open session from the start.
    async fn new() -> Rig {
        let mut rig = Rig::empty();
        rig.start().unwrap();
        rig.begin().await.unwrap();
        rig
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    fn config(&self, adopt: bool) -> StandbyConfig {
        StandbyConfig {
            mirror: "m".into(),
            root: self.root(),
            state_dir: self.state(),
            adopt,
            redo_max_bytes: self.redo_max,
            on_complete: Box::new(|_| {}),
        }
    }

    fn start(&mut self) -> Result<(), StandbyError> {
        self.start_with(false)
    }

    fn start_with(&mut self, adopt: bool) -> Result<(), StandbyError> {
        self.standby = Some(Standby::start(self.config(adopt), self.known.as_ref())?);
        Ok(())
    }

    fn handle(&self) -> StandbyHandle {
        self.standby.as_ref().unwrap().handle()
    }

    /// Hello, then a session that goes on from what the standby has.
    async fn begin(&mut self) -> Result<(), StandbyError> {
        let handle = self.handle();
        let replica = soon(handle.replica(&hello(self.outbox.last(), self.model.digest()))).await.unwrap();
        let from = match replica {
            Replica::Holds { position, .. } => position,
            _ => Position::START,
        };
        let (out, from_standby) = mpsc::unbounded_channel();
        self.session = Some(soon(handle.begin(from, false, out)).await?);
        self.from_standby = from_standby;
        self.heard.clear();
        self.known = Some(followed());
        handle.follow(followed().lineage, Epoch(1));
        self.outbox.handle_restart(from);
        Ok(())
    }

    /// Performs the ops on the model and sends them as one txn.
    async fn send(&mut self, ops: Vec<Op>) -> Lsn {
        for op in &ops {
            self.model.perform(op).unwrap_or_else(|error| panic!("{op:?}: {error}"));
        }
        self.send_raw(ops, 0).await
    }

    async fn send_raw(&mut self, ops: Vec<Op>, flags: u8) -> Lsn {
        let (lsn, frames) = self.outbox.seal(ops, flags, self.model.digest(), 77).unwrap();
        for frame in frames {
            let _ = soon(self.session.as_ref().unwrap().frame(frame)).await;
        }
        lsn
    }

    async fn until(&mut self, what: impl Fn(&ToPrimary) -> bool) -> ToPrimary {
        if let Some(message) = self.heard.iter().find(|m| what(m)) {
            return message.clone();
        }
        loop {
            let message = soon(self.from_standby.recv()).await.expect("the session has ended");
            self.heard.push(message.clone());
            if what(&message) {
                return message;
            }
        }
    }

    async fn durable(&mut self, lsn: Lsn) {
        self.until(|m| matches!(m, ToPrimary::Durable { lsn: l } if *l >= lsn)).await;
    }

    async fn applied(&mut self, lsn: Lsn) {
        self.until(|m| matches!(m, ToPrimary::Applied { lsn: l } if *l >= lsn)).await;
    }

    /// Sends ops and waits until the tree shows them; the tree must be the model.
    async fn check(&mut self, ops: Vec<Op>) {
        let lsn = self.send(ops).await;
        self.applied(lsn).await;
        self.same();
    }

    fn same(&self) {
        let differences = self.model.differences(&self.root());
        assert!(differences.is_empty(), "{differences:#?}");
        let status = self.handle().status();
        assert_eq!(status.last_error.map(|(_, e)| e), None);
    }

    fn problems(&mut self) -> Vec<String> {
        while let Ok(message) = self.from_standby.try_recv() {
            self.heard.push(message);
        }
        self.heard.iter().filter_map(|m| if let ToPrimary::Problem { message } = m { Some(message.clone()) } else { None }).collect()
    }

    async fn checkpoint(&self) {
        let (reply, done) = tokio::sync::oneshot::channel();
        let handle = self.handle();
        handle.applier.send(Cmd::Checkpoint).unwrap();
        handle.applier.send(Cmd::Barrier { reply: Box::new(move |_| reply.send(()).unwrap_or_default()) }).unwrap();
        soon(done).await.unwrap();
    }

    fn hold(&self) {
        self.handle().shared.hold.store(true, Ordering::Relaxed);
    }

    fn release(&self) {
        self.handle().shared.hold.store(false, Ordering::Relaxed);
        self.handle().applier.send(Cmd::Wake).unwrap();
    }

    fn crash(&mut self) {
        self.session = None;
        self.standby.take().unwrap().crash();
    }

    fn stop(&mut self) {
        self.session = None;
        self.standby.take().unwrap().stop();
    }

    /// Paths the standby says were removed.
    fn gone(&self) -> Vec<String> {
        let (mut out, manifest) = (vec![], twinbox_resync::manifest::Manifest::open(&self.state().join("manifest.db"), true).unwrap());
        manifest.each_gone(Lsn::ZERO, |path| out.push(path.to_string())).unwrap();
        out
    }

    /// Files kept in rescue, as `(path below its directory, bytes)`.
    fn rescued(&self) -> Vec<(String, Vec<u8>)> {
        fn walk(dir: &Path, base: &Path, out: &mut Vec<(String, Vec<u8>)>) {
            for item in fs::read_dir(dir).into_iter().flatten().flatten() {
                if item.file_type().unwrap().is_dir() {
                    walk(&item.path(), base, out);
                } else {
                    let path = item.path();
                    out.push((path.strip_prefix(base).unwrap().to_string_lossy().into_owned(), fs::read(&path).unwrap_or_default()));
                }
            }
        }
        let mut out = vec![];
        for top in fs::read_dir(self.state().join("rescue")).into_iter().flatten().flatten() {
            walk(&top.path(), &top.path(), &mut out);
        }
        out.sort();
        out
    }
}
