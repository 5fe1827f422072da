//! A simulated mail server works between and in the middle of the engine's steps, a model standby takes what comes, sessions end and agents are killed at any step. After every txn: what a group holds is a state it
//! really had, and no older than the one before; no message is nowhere; what was acknowledged stays; a fence that answered was right. At the end both sides are the same.
//!
//! The server's changes and the faults follow from the seed; when a file is at rest long enough to be read does not. `TWINBOX_SIM_SEED=N` runs one seed, `TWINBOX_SIM_SEEDS=N` so many.
//! `TWINBOX_SIM_HARD=1` adds what is known to fail once in some hundred seeds: kills of the agent, links between groups, and
//! files of one size that follow each other under one inode number within a tick of the clock (ARCHITECTURE, Open defects).

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::sync::MutexGuard;

use tokio::sync::mpsc;
use twinbox_protocol::codec::decode_log;
use twinbox_protocol::digest::DigestKey;
use twinbox_protocol::entry::Kind;
use twinbox_protocol::ids::{ChainHash, Epoch, Generation, MirrorId};
use twinbox_protocol::msg::{BulkItem, Position, Replica, Welcome};
use twinbox_protocol::ops::{Content, FLAG_INITIAL, Op, Seg};
use twinbox_protocol::outbox::Chain;
use twinbox_resync::node::Role;
use twinbox_resync::rows::{Rows, perform};

use super::super::fence::{FenceRequest, NotFenced, Until};
use super::super::messages::{BulkMessage, Step, ToLink};
use super::*;
use crate::layout::Layout;

const GROUPS: [&str; 3] = ["anna", "bert", "cleo"];
const FOLDERS: [&str; 4] = ["in", "work", "old", "in/sub"];
/// Past what is read at once.
const LARGE: usize = 8 * 1024 * 1024 + 4096;

struct Rng(u64);

impl Rng {
    fn next(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % n as u64) as usize
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.next(n) == 0
    }

    fn pick<T: Clone>(&mut self, from: &[T]) -> Option<T> {
        (!from.is_empty()).then(|| from[self.next(from.len())].clone())
    }
}

/// `None`: a directory; else which content.
type Tree = BTreeMap<String, Option<usize>>;
/// What a group is at one moment.
type State = BTreeMap<String, Option<ContentHash>>;

/// The mail server, what its store holds, and every state each group was in.
struct Server {
    root: PathBuf,
    aside: PathBuf,
    rng: Rng,
    tree: Tree,
    /// Contents of files, shared by the names of one inode.
    bytes: Vec<Vec<u8>>,
    hashes: Vec<ContentHash>,
    states: BTreeMap<String, Vec<State>>,
    /// Contents of messages that were removed.
    removed: BTreeSet<ContentHash>,
    messages: BTreeSet<ContentHash>,
    made: usize,
    /// Changes left.
    left: usize,
    hard: bool,
    said: Vec<String>,
}

impl Server {
    fn new(root: PathBuf, aside: PathBuf, seed: u64, left: usize) -> Self {
        let mut server = Server {
            root,
            aside,
            rng: Rng(seed),
            tree: Tree::new(),
            bytes: vec![],
            hashes: vec![],
            states: BTreeMap::new(),
            removed: BTreeSet::new(),
            messages: BTreeSet::new(),
            made: 0,
            left,
            hard: std::env::var("TWINBOX_SIM_HARD").is_ok(),
            said: vec![],
        };
        for group in GROUPS {
            server.mkdir(group);
            for folder in FOLDERS {
                server.mkdir(&format!("{group}/{folder}"));
            }
        }
        server
    }

    fn now(&self, group: &str) -> State {
        let below = |path: &String| path == group || path.starts_with(&format!("{group}/"));
        self.tree.iter().filter(|(path, _)| below(path)).map(|(path, content)| (path.clone(), content.map(|c| self.hashes[c]))).collect()
    }

    /// An instant: what each group is now, it was.
    fn instant(&mut self, what: String) {
        self.said.push(what);
        for group in GROUPS {
            let now = self.now(group);
            let states = self.states.entry(group.into()).or_default();
            if states.last() != Some(&now) {
                states.push(now);
            }
        }
    }

    fn mkdir(&mut self, path: &str) {
        if fs::create_dir(self.root.join(path)).is_ok() {
            self.tree.insert(path.into(), None);
            self.instant(format!("mkdir {path}"));
        }
    }

    fn content(&mut self, bytes: Vec<u8>) -> usize {
        self.hashes.push(ContentHash::of(&bytes));
        self.bytes.push(bytes);
        self.bytes.len() - 1
    }

    fn files(&self) -> Vec<String> {
        self.tree.iter().filter(|(_, content)| content.is_some()).map(|(path, _)| path.clone()).collect()
    }

    fn dirs(&self) -> Vec<String> {
        self.tree.iter().filter(|(path, content)| content.is_none() && path.contains('/')).map(|(path, _)| path.clone()).collect()
    }

    /// A name goes; the message is removed with its last one.
    fn forget(&mut self, path: &str) {
        if let Some(Some(content)) = self.tree.remove(path)
            && !self.tree.values().any(|c| *c == Some(content))
        {
            self.removed.insert(self.hashes[content]);
        }
    }

    fn rename(&mut self, from: &str, to: &str) {
        if from == to || fs::rename(self.root.join(from), self.root.join(to)).is_err() {
            return;
        }
        if self.tree.get(from).copied().flatten().is_some() && self.tree.get(from) == self.tree.get(to) {
            return; // Two names of one file: rename(2) does nothing.
        }
        let below = format!("{from}/");
        let moved: Vec<(String, Option<usize>)> =
            self.tree.iter().filter(|(p, _)| *p == from || p.starts_with(&below)).map(|(p, c)| (p.clone(), *c)).collect();
        let over = self.tree.get(to).copied().flatten();
        for (path, content) in moved {
            self.tree.remove(&path);
            self.tree.insert(format!("{to}{}", &path[from.len()..]), content);
        }
        if let Some(over) = over.filter(|over| !self.tree.values().any(|c| *c == Some(*over))) {
            self.removed.insert(self.hashes[over]);
        }
        self.instant(format!("rename {from} {to}"));
    }

    /// From outside the store, whole at once.
    fn put(&mut self, path: &str, mut bytes: Vec<u8>, message: bool) {
        if !self.hard {
            // Files of one size, made and removed within one tick of the clock, may have one inode number and the same times.
            bytes.resize(bytes.len() + self.made, b' ');
        }
        let temp = self.aside.join("temp");
        fs::write(&temp, &bytes).unwrap();
        if fs::rename(&temp, self.root.join(path)).is_err() {
            return;
        }
        self.forget(path);
        let content = self.content(bytes);
        if message {
            self.messages.insert(self.hashes[content]);
        }
        self.tree.insert(path.into(), Some(content));
        self.instant(format!("put {path} ({} bytes)", self.bytes[content].len()));
    }

    fn append(&mut self, path: &str, text: &[u8]) {
        let Some(Some(content)) = self.tree.get(path).copied() else { return };
        if self.messages.contains(&self.hashes[content]) {
            return; // A message never changes.
        }
        fs::OpenOptions::new().append(true).open(self.root.join(path)).unwrap().write_all(text).unwrap();
        self.bytes[content].extend_from_slice(text);
        self.hashes[content] = ContentHash::of(&self.bytes[content]);
        self.instant(format!("append {path}"));
    }

    fn remove(&mut self, path: &str) {
        let below = format!("{path}/");
        let all: Vec<String> = self.tree.keys().filter(|p| *p == path || p.starts_with(&below)).cloned().collect();
        for path in all.into_iter().rev() {
            let full = self.root.join(&path);
            let done = if self.tree[&path].is_none() { fs::remove_dir(full) } else { fs::remove_file(full) };
            if done.is_ok() {
                self.forget(&path);
                self.instant(format!("remove {path}"));
            }
        }
    }

    fn act(&mut self) {
        self.left = self.left.saturating_sub(1);
        self.made += 1;
        let n = self.made;
        let (files, dirs) = (self.files(), self.dirs());
        let (file, dir, group) = (self.rng.pick(&files), self.rng.pick(&dirs), GROUPS[self.rng.next(3)]);
        let (Some(file), Some(dir)) = (file.or_else(|| dir.clone()), dir) else { return self.mkdir(&format!("{group}/d{n}")) };
        match self.rng.next(20) {
            0..4 => self.put(&format!("{dir}/m{n}"), format!("message {n}").into_bytes(), true),
            4..6 => self.rename(&file, &format!("{file}:f{}", n % 7).split(":f").take(2).collect::<Vec<_>>().join(":f")),
            6..9 => self.rename(&file, &format!("{dir}/m{n}")),
            9..11 => self.remove(&file),
            11 => {
                let log = format!("{group}/log");
                self.put(&log, format!("log {n}\n").into_bytes(), false);
            }
            12 | 13 => self.append(&format!("{group}/log"), format!("line {n}\n").as_bytes()),
            14 => {
                // The second is never newer than the first.
                for name in ["first", "second"] {
                    self.put(&format!("{group}/{name}"), format!("generation {n}").into_bytes(), false);
                }
            }
            15 => {
                let to = self.rng.pick(&dirs).unwrap_or_default();
                self.rename(&dir, &to); // Over it, if that is empty.
            }
            16 => self.rename(&dir, &format!("{group}/d{n}")),
            17 => self.mkdir(&format!("{dir}/d{n}")),
            18 if self.rng.one_in(3) => self.remove(&dir),
            18 => {
                let dir = if self.hard { dir } else { file.rsplit_once('/').map_or(dir, |(dir, _)| dir.to_owned()) };
                let link = format!("{dir}/l{n}");
                if let Some(Some(content)) = self.tree.get(&file).copied()
                    && fs::hard_link(self.root.join(&file), self.root.join(&link)).is_ok()
                {
                    self.tree.insert(link.clone(), Some(content));
                    self.instant(format!("link {file} {link}"));
                }
            }
            _ => {
                let path = format!("{group}/large");
                if self.tree.contains_key(&path) {
                    self.append(&path, format!("more {n}\n").as_bytes());
                } else if self.bytes.iter().filter(|bytes| bytes.len() >= LARGE).count() < 3 {
                    let bytes = (0..LARGE as u32 / 4).flat_map(|i| i.wrapping_mul(2_654_435_761 ^ n as u32).to_le_bytes()).collect();
                    self.put(&path, bytes, false);
                }
            }
        }
    }
}

/// What the standby has received and not yet made durable.
struct Received {
    position: Position,
    ops: Vec<Op>,
    flags: u8,
    digest: twinbox_protocol::digest::Digest,
}

/// The answer, and at which state each group was when it was asked for.
type Fence = (oneshot::Receiver<Result<Lsn, NotFenced>>, BTreeMap<String, usize>);

struct World {
    dir: tempfile::TempDir,
    engine: Option<Engine>,
    server: Arc<Mutex<Server>>,
    rng: Rng,
    replica: Manifest,
    contents: HashMap<ContentHash, Vec<u8>>,
    position: Position,
    chains: BTreeMap<Lsn, ChainHash>,
    out: Option<mpsc::UnboundedReceiver<ToLink>>,
    bulk: Option<mpsc::Receiver<BulkMessage>>,
    objects: HashMap<u64, (Vec<u8>, bool)>,
    /// Objects at hand, and words to the primary that are on their way.
    staged: BTreeSet<ContentHash>,
    words: VecDeque<Command>,
    received: VecDeque<Received>,
    sessions: u64,
    lives: u8,
    known: BTreeMap<String, usize>,
    seen: BTreeSet<ContentHash>,
    fences: Vec<Fence>,
    counts: BTreeMap<&'static str, usize>,
    last_ops: Vec<String>,
}

fn p(text: &str) -> RelPath {
    RelPath::new(text.as_bytes()).unwrap()
}

impl World {
    fn new(seed: u64, changes: usize) -> World {
        let dir = tempfile::tempdir().unwrap();
        for name in ["root", "state", "aside"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        let server = Server::new(dir.path().join("root"), dir.path().join("aside"), seed, changes);
        let mut replica = Manifest::open(&dir.path().join("replica.db"), true).unwrap();
        replica.set_digest_key(DigestKey([3; 32])).unwrap();
        replica.begin().unwrap();
        let mut world = World {
            dir,
            engine: None,
            server: Arc::new(Mutex::new(server)),
            rng: Rng(!seed),
            replica,
            contents: HashMap::new(),
            position: Position::START,
            chains: BTreeMap::new(),
            out: None,
            bulk: None,
            objects: HashMap::new(),
            staged: BTreeSet::new(),
            words: VecDeque::new(),
            received: VecDeque::new(),
            sessions: 0,
            lives: 0,
            known: BTreeMap::new(),
            seen: BTreeSet::new(),
            fences: vec![],
            counts: BTreeMap::new(),
            last_ops: vec![],
        };
        world.start();
        world
    }

    fn server(&self) -> MutexGuard<'_, Server> {
        self.server.lock().unwrap()
    }

    fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    /// An agent comes up on the state the one before left.
    fn start(&mut self) {
        let state = self.dir.path().join("state");
        let node = NodeState::open(&state).unwrap();
        let fresh = MirrorState {
            mirror_id: MirrorId([1; 16]),
            role: Role::Primary,
            generation: Generation([2; 16]),
            epoch: Epoch(1),
            digest_key: DigestKey([3; 32]),
            reserved: Lsn::ZERO,
            complete: false,
        };
        let known = node.mirror("m").unwrap().unwrap_or(fresh);
        node.set_mirror("m", &known).unwrap();
        self.lives += 1;
        let config = CaptureConfig {
            name: "m".into(),
            node: "a".into(),
            root: self.dir.path().join("root"),
            state_dir: state.clone(),
            mirror_dir: state.join("mirrors/m"),
            selection: Selection::new(Layout::Plain, vec![]),
            grouping: Grouping::new(vec![]),
            layout: "plain".into(),
            known,
            incarnation: Incarnation([self.lives; 16]),
            window_bytes: 32 << 20,
            dirty_max: 200_000,
            sweep: None,
            fuzzy_after: None,
        };
        crate::sys::ignore_sigio();
        let (commands, receiver) = channel();
        let wake = Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap());
        let handle = CaptureHandle { commands, wake: wake.clone(), status: Arc::default(), pulse: Arc::default() };
        let mut engine = Engine::open(config, handle, receiver, wake).unwrap();
        let server = self.server.clone();
        engine.meanwhile = Some(Box::new(move || {
            let mut server = server.lock().unwrap();
            if server.left > 0 && server.rng.one_in(40) {
                server.act();
            }
        }));
        self.engine = Some(engine);
    }

    fn command(&mut self, command: Command) {
        self.engine.as_mut().unwrap().command(command).unwrap();
    }

    fn connect(&mut self) {
        self.count("sessions");
        let (reply, mut answer) = oneshot::channel();
        self.command(Command::Hello(reply));
        let hello = answer.try_recv().unwrap();
        let replica = match self.sessions {
            0 => Replica::Empty,
            _ => Replica::Holds {
                generation: hello.generation,
                epoch: hello.epoch,
                position: self.position,
                digest: self.replica.digest(),
                chain_at_yours: self.chains.get(&hello.position.lsn).copied(),
            },
        };
        let welcome = Welcome {
            protocol: hello.protocol,
            software: String::new(),
            node: "b".into(),
            incarnation: Incarnation([9; 16]),
            chunker: hello.chunker,
            replica,
            wall_ns: 0,
        };
        let (reply, mut answer) = oneshot::channel();
        self.command(Command::Welcome(Box::new(welcome), reply));
        let mut step = answer.try_recv().unwrap().unwrap();
        let (from, reset) = loop {
            match step {
                Step::Begin { from, reset } => break (from, reset),
                Step::Pull(since) => {
                    self.count("pulls");
                    let mut rows = vec![];
                    if let Some(since) = since {
                        self.replica.each_gone(since, |path| rows.push((path, None))).unwrap();
                    }
                    self.replica.each(since, |path, row, _| rows.push((path, Some(row.entry)))).unwrap();
                    self.command(Command::Rows(rows));
                    let (reply, mut answer) = oneshot::channel();
                    self.command(Command::RowsEnd(self.position, self.replica.digest(), reply));
                    step = answer.try_recv().unwrap().unwrap();
                }
            }
        };
        if reset {
            self.position = from;
            self.chains = [(from.lsn, from.chain)].into();
        }
        assert_eq!(self.position, from);
        let (out, txns) = mpsc::unbounded_channel();
        let (bulk, objects) = mpsc::channel(2);
        (self.out, self.bulk) = (Some(txns), Some(objects));
        self.sessions += 1;
        self.command(Command::Up { id: self.sessions, out, bulk, peer: "b".into() });
    }

    /// The link is cut: what was on its way is lost, in both directions, and what was staged with the standby's process.
    fn cut(&mut self) {
        (self.out, self.bulk) = (None, None);
        self.received.clear();
        self.words.clear();
        self.objects.clear();
        if self.rng.one_in(2) {
            self.staged.clear();
        }
    }

    fn step(&mut self) {
        match self.rng.next(400) {
            0 if self.out.is_some() => {
                self.cut();
                self.command(Command::Down(self.sessions));
            }
            1 if self.server().hard => {
                self.count("kills");
                self.cut();
                self.engine = None;
                self.fences.clear();
                self.start();
            }
            2..12 if self.out.is_some() => {
                let (reply, answer) = oneshot::channel();
                let at = self.server().states.iter().map(|(group, states)| (group.clone(), states.len() - 1)).collect();
                self.command(Command::Fence(FenceRequest { paths: vec![], until: Until::Durable, wait: false, reply }));
                self.fences.push((answer, at));
            }
            _ => {}
        }
        if self.out.is_none() && self.rng.one_in(15) {
            self.connect();
        }
        self.turn();
        self.take();
        // The standby's disk, and the way back, are slower at times.
        while !self.received.is_empty() && !self.rng.one_in(4) {
            self.make_durable();
        }
        while !self.words.is_empty() && !self.rng.one_in(4) {
            let word = self.words.pop_front().unwrap();
            self.command(word);
        }
        self.check_fences();
        let mut server = self.server();
        if server.left > 0 && server.rng.one_in(5) {
            server.act();
        }
    }

    fn turn(&mut self) {
        let engine = self.engine.as_mut().unwrap();
        assert!(engine.commands().unwrap());
        engine.take_events().unwrap();
        engine.scan_some().unwrap();
        engine.note_listed();
        engine.rechecks.clear(); // Nothing may need it.
        engine.timers().unwrap();
        engine.round().unwrap();
        engine.finish_first_sync().unwrap();
        engine.answer_waiters().unwrap();
    }

    fn take(&mut self) {
        let (mut ops, mut chain) = (vec![], None::<Chain>);
        while let Some(Ok(message)) = self.out.as_mut().map(mpsc::UnboundedReceiver::try_recv) {
            let frames = match message {
                ToLink::Txn(frames) => frames,
                ToLink::Unstage(hash) => {
                    self.staged.remove(&hash);
                    continue;
                }
                ToLink::Gone(hash) => panic!("{hash} is gone, and nobody asked"),
                ToLink::Stored(_) => continue,
            };
            for body in frames {
                let frame = decode_log(&body).unwrap();
                let last = self.received.back().map_or(self.position, |txn| txn.position);
                assert_eq!(frame.prev, last.lsn);
                let chain = chain.get_or_insert_with(|| Chain::after(last.chain));
                chain.update(&body);
                ops.extend(frame.ops);
                if let Some(seal) = frame.seal {
                    let position = Position { lsn: frame.lsn, chain: chain.finish() };
                    self.received.push_back(Received { position, ops: std::mem::take(&mut ops), flags: frame.flags, digest: seal.digest });
                }
            }
            chain = None;
        }
        while let Some(Ok(message)) = self.bulk.as_mut().map(mpsc::Receiver::try_recv) {
            match message {
                BulkMessage::Abort(id) => drop(self.objects.remove(&id)),
                BulkMessage::Item(id, BulkItem::Seg(seg)) => {
                    let (mut bytes, mut whole) = self.objects.remove(&id).unwrap_or((vec![], true));
                    whole &= extend(&mut bytes, &seg, &self.contents);
                    self.objects.insert(id, (bytes, whole));
                }
                BulkMessage::Item(id, BulkItem::End { hash, size }) => {
                    let (bytes, whole) = self.objects.remove(&id).unwrap_or((vec![], true));
                    let copied = !whole || self.rng.one_in(10);
                    if whole {
                        assert_eq!((ContentHash::of(&bytes), bytes.len() as u64), (hash, size));
                    }
                    let word = if copied {
                        Command::Incomplete(hash)
                    } else {
                        self.staged.insert(hash);
                        self.contents.insert(hash, bytes);
                        Command::Staged(hash)
                    };
                    self.words.push_back(word);
                }
            }
        }
    }

    fn make_durable(&mut self) {
        let Some(txn) = self.received.pop_front() else { return };
        let lsn = txn.position.lsn;
        self.replica.set_lsn(lsn);
        for op in &txn.ops {
            self.receive(op);
            self.last_ops.push(format!("{lsn} {op:.150?}").chars().take(220).collect());
            perform(&mut self.replica, op).unwrap_or_else(|error| panic!("{lsn}: {error}"));
        }
        assert_eq!(self.replica.digest(), txn.digest, "digest at {lsn}");
        let len = self.last_ops.len();
        drop(self.last_ops.drain(..len.saturating_sub(60)));
        self.position = txn.position;
        self.chains.insert(lsn, txn.position.chain);
        self.words.push_back(Command::Durable(lsn));
        self.words.push_back(Command::Applied(lsn));
        self.count("txns");
        self.check(lsn, txn.flags);
    }

    /// Bytes are what the op says.
    fn receive(&mut self, op: &Op) {
        let (hash, bytes) = match op {
            Op::Put { entry, content, .. } => {
                let Some(hash) = entry.hash() else { return };
                match content {
                    Content::Inline(bytes) => (hash, bytes.to_vec()),
                    Content::Recipe(segs) => {
                        let mut bytes = vec![];
                        assert!(segs.iter().all(|seg| extend(&mut bytes, seg, &self.contents)));
                        (hash, bytes)
                    }
                    Content::Staged => {
                        assert!(self.staged.contains(&hash), "{op:?} is not staged");
                        return;
                    }
                    Content::Known => {
                        assert!(self.contents.contains_key(&hash), "{op:?} is not known");
                        return;
                    }
                }
            }
            Op::Patch { entry, base, writes, .. } => {
                let mut bytes = self.contents[base].clone();
                bytes.resize(entry.size() as usize, 0);
                for (at, with) in writes {
                    bytes[*at as usize..*at as usize + with.len()].copy_from_slice(with);
                }
                (entry.hash().unwrap(), bytes)
            }
            _ => return,
        };
        assert_eq!(ContentHash::of(&bytes), hash, "{op:?}");
        self.contents.insert(hash, bytes);
    }

    fn group(&self, group: &str) -> State {
        let dir = p(group);
        let own = self.replica.row(&dir).unwrap().map(|row| (dir.clone(), row));
        let mut rows: Vec<_> = own.into_iter().chain(self.replica.below(&dir).unwrap()).collect();
        rows.sort_by(|a, b| a.0.as_bytes().cmp(b.0.as_bytes()));
        let hash = |kind: &Kind| if let Kind::File { hash, .. } = kind { Some(*hash) } else { None };
        rows.into_iter().map(|(path, row)| (path.to_string().trim_matches('`').to_owned(), hash(&row.entry.kind))).collect()
    }

    /// How a group differs from the state that is nearest to it.
    fn nearest(&self, group: &str) -> String {
        let now = self.group(group);
        let differs = |state: &State| {
            let (gone, came) =
                (state.iter().filter(|(p, h)| now.get(*p) != Some(*h)), now.iter().filter(|(p, h)| state.get(*p) != Some(*h)));
            (
                format!("the store {:?}, the standby {:?}", gone.clone().collect::<Vec<_>>(), came.clone().collect::<Vec<_>>()),
                gone.count() + came.count(),
            )
        };
        let server = self.server();
        let all = server.states[group].iter().enumerate().map(|(at, state)| (at, differs(state)));
        let best = all.min_by_key(|(_, (_, count))| *count);
        format!("was at {:?} of {}; {best:?}", self.known.get(group), server.states[group].len())
    }

    fn check(&mut self, lsn: Lsn, flags: u8) {
        let mut here = BTreeSet::new();
        self.replica.each(None, |_, row, _| here.extend(row.entry.hash())).unwrap();
        let nowhere: Vec<ContentHash> = {
            let server = self.server();
            let lost = |hash: &&ContentHash| server.messages.contains(hash) && !server.removed.contains(hash) && !here.contains(hash);
            self.seen.iter().filter(lost).copied().collect()
        };
        self.seen = here;
        if flags & FLAG_INITIAL != 0 {
            return; // The standby says itself that it is no mirror yet.
        }
        assert!(nowhere.is_empty(), "messages are nowhere at {lsn}: {}", self.where_they_are(&nowhere));
        for group in GROUPS {
            let now = self.group(group);
            let from = self.known.get(group).copied().unwrap_or(0);
            let found = self.server().states[group].iter().skip(from).position(|state| *state == now);
            match found {
                Some(at) => drop(self.known.insert(group.into(), from + at)),
                None => panic!(
                    "{group} at {lsn} is in a state it never had, or in one older than before: {}\n{}",
                    self.nearest(group),
                    self.where_they_are(&[])
                ),
            }
        }
    }

    fn where_they_are(&self, messages: &[ContentHash]) -> String {
        let server = self.server();
        let held = |content: &usize| messages.contains(&server.hashes[*content]);
        let paths: Vec<&String> =
            server.tree.iter().filter(|(_, content)| content.as_ref().is_some_and(held)).map(|(path, _)| path).collect();
        format!("{paths:?}, the store {:#?}, the log {:#?}", &server.said[server.said.len().saturating_sub(60)..], self.last_ops)
    }

    fn check_fences(&mut self) {
        for (mut answer, at) in std::mem::take(&mut self.fences) {
            match answer.try_recv() {
                Err(oneshot::error::TryRecvError::Empty) => self.fences.push((answer, at)),
                Err(oneshot::error::TryRecvError::Closed) => {}
                Ok(Err(_)) => self.count("fences refused"),
                Ok(Ok(lsn)) => {
                    self.count("fences");
                    assert!(lsn <= self.position.lsn, "{lsn} was fenced, the standby has {}", self.position.lsn);
                    for (group, at) in at {
                        let now = self.group(&group);
                        let last = self.server().states[&group].iter().rposition(|state| *state == now);
                        assert!(last >= Some(at), "{group} was fenced at state {at} and is at {last:?} (LSN {lsn})");
                    }
                }
            }
        }
    }

    fn finish(&mut self) {
        let end = Instant::now() + Duration::from_secs(30);
        if self.out.is_none() {
            self.connect();
        }
        self.server().left = 0;
        for _ in 0..2 {
            self.engine.as_mut().unwrap().boundary().unwrap();
            loop {
                self.turn();
                self.take();
                while !self.received.is_empty() {
                    self.make_durable();
                }
                while let Some(word) = self.words.pop_front() {
                    self.command(word);
                }
                self.check_fences();
                let e = self.engine.as_ref().unwrap();
                if e.complete && e.scan.is_done() && e.sets.is_clean() && e.outbox.in_flight().len() == 0 {
                    break;
                }
                assert!(Instant::now() < end, "does not settle: {:#?}", pending(e));
            }
        }
        for group in GROUPS {
            assert_eq!(self.group(group), self.server().now(group), "{group} at the end");
        }
        let left = self.engine.as_ref().unwrap().bulk.left();
        assert_eq!(left, None, "something staged is kept for nobody");
    }
}

fn pending(engine: &Engine) -> Vec<String> {
    let of = |name: &Group, g: &super::super::dirty::GroupState| {
        let (dirty, captured) = (g.dirty.keys().collect::<Vec<_>>(), g.captured.keys().collect::<Vec<_>>());
        let name = String::from_utf8_lossy(name).into_owned();
        format!("{name}: dirty {dirty:?} captured {captured:?} staging {:?} hints {:?} spoiled {}", g.staging, g.hints, g.spoiled)
    };
    engine.sets.groups().map(|(name, g)| of(name, g)).chain(engine.bulk.left()).collect()
}

/// Adds what a segment says; `false` when its source is not here.
fn extend(bytes: &mut Vec<u8>, seg: &Seg, contents: &HashMap<ContentHash, Vec<u8>>) -> bool {
    match seg {
        Seg::Data(data) => bytes.extend_from_slice(data),
        Seg::Hole(len) => bytes.resize(bytes.len() + *len as usize, 0),
        Seg::Copy { from, offset, len } => match contents.get(from) {
            Some(source) => bytes.extend_from_slice(&source[*offset as usize..(*offset + *len) as usize]),
            None => return false,
        },
    }
    true
}

fn run(seed: u64) -> BTreeMap<&'static str, usize> {
    let mut world = World::new(seed, 300);
    let end = Instant::now() + Duration::from_secs(60);
    while world.server().left > 0 {
        assert!(Instant::now() < end, "the server's changes do not come to an end");
        world.step();
    }
    world.finish();
    std::mem::take(&mut world.counts)
}

#[test]
fn whatever_happens_the_standby_is_in_a_state_the_store_had() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let (first, count) = match number("TWINBOX_SIM_SEED") {
        Some(seed) => (seed, 1),
        None => (number("TWINBOX_SIM_FROM").unwrap_or(1), number("TWINBOX_SIM_SEEDS").unwrap_or(3)),
    };
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for seed in first..first + count {
        eprintln!("seed {seed} (again: TWINBOX_SIM_SEED={seed} cargo test -p twinbox --lib whatever_happens)");
        for (what, n) in run(seed) {
            *counts.entry(what).or_default() += n;
        }
    }
    eprintln!("{count} seeds: {counts:?}");
}
