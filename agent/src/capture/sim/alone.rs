//! The primary alone: the standby is a model that keeps every byte, so that each txn can be checked.

use std::collections::BTreeSet;
use std::fs;
use std::sync::MutexGuard;

use tokio::sync::mpsc;
use twinbox_protocol::codec::decode_log;
use twinbox_protocol::digest::DigestKey;
use twinbox_protocol::entry::Kind;
use twinbox_protocol::ids::ChainHash;
use twinbox_protocol::msg::{BulkItem, Position, Replica};
use twinbox_protocol::ops::{Content, FLAG_INITIAL, Op, Seg};
use twinbox_protocol::outbox::Chain;
use twinbox_resync::rows::{Rows, perform};

use super::super::super::messages::{BulkMessage, Step, ToLink};
use super::super::*;
use super::server::{GROUPS, Rng, Server, State};
use super::{Fence, Seeds, fence, open_engine, testing::welcome};

/// What the standby has received and not yet made durable.
struct Received {
    position: Position,
    ops: Vec<Op>,
    flags: u8,
    digest: twinbox_protocol::digest::Digest,
}

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
    objects: HashMap<u64, Object>,
    /// Objects at hand, and words to the primary that are on their way.
    staged: BTreeSet<ContentHash>,
    /// Whether the standby is at a cut, by its last txn.
    whole: bool,
    /// Of those, what is still wanted, while it is being said.
    kept: BTreeSet<ContentHash>,
    missed: BTreeSet<ContentHash>,
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
            kept: BTreeSet::new(),
            whole: false,
            missed: BTreeSet::new(),
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

    /// For whoever reads a failure: between which changes of the server, and between which ops, it happened.
    fn tell(&mut self, what: &str) {
        self.server().said.push(format!("-- {what}"));
        self.last_ops.push(format!("-- {what}"));
    }

    /// An agent comes up on the state the one before left.
    fn start(&mut self) {
        self.lives += 1;
        let engine = open_engine("a", &self.dir.path().join("state"), &self.server, self.lives);
        self.engine = Some(engine);
    }

    fn command(&mut self, command: Command) {
        self.engine.as_mut().unwrap().command(command).unwrap();
    }

    fn connect(&mut self) {
        self.count("sessions");
        self.tell("a session begins");
        let (reply, mut answer) = oneshot::channel();
        self.command(Command::Hello(reply));
        let hello = answer.try_recv().unwrap();
        let replica = match self.sessions {
            0 => Replica::Empty,
            _ => Replica::Holds {
                lineage: hello.lineage.clone(),
                epoch: hello.epoch,
                position: self.position,
                digest: self.replica.digest(),
                chain_at_yours: self.chains.get(&hello.position.lsn).copied(),
                complete: self.whole,
            },
        };
        let (reply, mut answer) = oneshot::channel();
        self.command(Command::Welcome(Box::new(welcome(hello.chunker, replica)), reply));
        let mut step = answer.try_recv().unwrap().unwrap();
        let (from, reset) = loop {
            match step {
                Step::Begin { from, reset } => break (from, reset),
                Step::Pull(since) => {
                    self.count("pulls");
                    self.tell("rows are pulled");
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
            self.tell("from the beginning");
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

    /// The link is cut: what was on its way is lost, in both directions, and at times what was staged with the standby's state.
    fn cut(&mut self) {
        (self.out, self.bulk) = (None, None);
        self.received.clear();
        self.words.clear();
        self.objects.clear();
        self.missed.clear();
        self.kept.clear();
        if self.rng.one_in(2) {
            self.staged.clear();
        }
    }

    fn step(&mut self) {
        match self.rng.next(400) {
            0 if self.out.is_some() => {
                self.tell("the link is cut");
                self.cut();
                self.command(Command::Down(self.sessions));
            }
            1 => {
                self.count("kills");
                self.tell("the agent is killed");
                self.cut();
                self.engine = None;
                self.fences.clear();
                self.start();
            }
            2..12 if self.out.is_some() => {
                let (command, asked) = fence(&self.server());
                self.command(command);
                self.fences.push(asked);
            }
            _ => {}
        }
        if self.out.is_none() && self.rng.one_in(15) {
            self.connect();
        }
        self.turn();
        self.take();
        // The standby's disk, and the way back, are slower at times.
        while !self.rng.one_in(4) && self.make_durable() {}
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
        super::turn(self.engine.as_mut().unwrap());
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
                ToLink::Keep { hashes, last } => {
                    self.kept.extend(hashes);
                    if last {
                        let kept = std::mem::take(&mut self.kept);
                        self.staged.retain(|hash| kept.contains(hash));
                    }
                    continue;
                }
                ToLink::Gone(hash) if self.missed.contains(&hash) => {
                    self.count("gone");
                    self.tell("something is gone: the link is cut");
                    self.cut();
                    return self.command(Command::Down(self.sessions));
                }
                ToLink::Gone(hash) | ToLink::Lacks(hash) => panic!("{hash} is gone, and nobody asked"),
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
                BulkMessage::Item(id, BulkItem::Seg(seg)) => self.objects.entry(id).or_default().extend(&seg, &self.contents),
                BulkMessage::Item(id, BulkItem::End { hash, size }) => {
                    let Object { bytes, copies, lacks } = self.objects.remove(&id).unwrap_or_default();
                    // What it copies from may be gone by now; who sends every byte is never told that something is missing.
                    let incomplete = lacks || (copies && self.rng.one_in(5));
                    if !lacks {
                        assert_eq!((ContentHash::of(&bytes), bytes.len() as u64), (hash, size));
                    }
                    let word = if incomplete {
                        Command::Incomplete(hash)
                    } else {
                        self.staged.insert(hash);
                        self.missed.remove(&hash);
                        self.contents.insert(hash, bytes);
                        Command::Staged(hash)
                    };
                    self.words.push_back(word);
                }
            }
        }
    }

    /// `false` when there is nothing, or a content is waited for.
    fn make_durable(&mut self) -> bool {
        let Some(txn) = self.received.front() else { return false };
        let staged = txn.ops.iter().filter_map(|op| match op {
            Op::Put { entry, content: Content::Staged, .. } => entry.hash(),
            _ => None,
        });
        let lost: Vec<ContentHash> = staged.filter(|hash| !self.staged.contains(hash)).collect();
        if !lost.is_empty() {
            // Staged in a session before this one, and lost with it: asked for again, one after the other.
            if self.missed.insert(lost[0]) {
                self.count("misses");
                self.words.push_back(Command::Miss(lost[0]));
            }
            return false;
        }
        let Some(txn) = self.received.pop_front() else { return false };
        let lsn = txn.position.lsn;
        self.whole = txn.flags & FLAG_INITIAL == 0;
        self.replica.set_lsn(lsn);
        for op in &txn.ops {
            self.receive(op);
            self.last_ops.push(format!("{lsn} {op:.150?}").chars().take(220).collect());
            perform(&mut self.replica, op).unwrap_or_else(|error| panic!("{lsn}: {error}"));
        }
        assert_eq!(self.replica.digest(), txn.digest, "digest at {lsn}");
        let len = self.last_ops.len();
        drop(self.last_ops.drain(..len.saturating_sub(120)));
        self.position = txn.position;
        self.chains.insert(lsn, txn.position.chain);
        self.words.push_back(Command::Durable(lsn));
        self.words.push_back(Command::Applied(lsn));
        self.count("txns");
        self.check(lsn, txn.flags);
        true
    }

    /// Bytes are what the op says.
    fn receive(&mut self, op: &Op) {
        let (hash, bytes) = match op {
            Op::Put { entry, content, .. } => {
                let Some(hash) = entry.hash() else { return };
                match content {
                    Content::Inline(bytes) => (hash, bytes.to_vec()),
                    Content::Recipe(segs) => {
                        let mut object = Object::default();
                        segs.iter().for_each(|seg| object.extend(seg, &self.contents));
                        assert!(!object.lacks, "{op:?} copies from what is not here");
                        (hash, object.bytes)
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
        let nowhere = self.server().lost(&self.seen, &here);
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
        format!("{paths:?}, the store {:#?}, the log {:#?}", &server.said[server.said.len().saturating_sub(150)..], self.last_ops)
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
                if self.out.is_none() {
                    self.connect();
                }
                self.turn();
                self.take();
                while self.make_durable() {}
                while let Some(word) = self.words.pop_front() {
                    self.command(word);
                }
                self.check_fences();
                let e = self.engine.as_ref().unwrap();
                if e.complete && e.scan.is_done() && e.sets.is_clean() && e.outbox.in_flight().len() == 0 {
                    break;
                }
                let (flying, missed) = (e.outbox.in_flight().len(), &self.missed);
                assert!(Instant::now() < end, "does not settle: {flying} in flight, {missed:?} missed, {:#?}", super::pending(e));
            }
        }
        for group in GROUPS {
            assert_eq!(self.group(group), self.server().now(group), "{group} at the end");
        }
        // A reading of what nobody wants any more may still be under way; then nothing is left of it.
        while let Some(left) = self.engine.as_ref().unwrap().bulk.left() {
            assert!(Instant::now() < end, "something staged is kept for nobody: {left}");
            self.turn();
            self.take();
            while let Some(word) = self.words.pop_front() {
                self.command(word);
            }
        }
    }
}

/// Adds what a segment says; `false` when its source is not here.
/// A bulk object that is arriving.
#[derive(Default)]
struct Object {
    bytes: Vec<u8>,
    /// Some of it is to be copied from another content.
    copies: bool,
    /// One of those is not here.
    lacks: bool,
}

impl Object {
    fn extend(&mut self, seg: &Seg, contents: &HashMap<ContentHash, Vec<u8>>) {
        match seg {
            Seg::Data(data) => self.bytes.extend_from_slice(data),
            Seg::Hole(len) => self.bytes.resize(self.bytes.len() + *len as usize, 0),
            Seg::Copy { from, offset, len } => {
                self.copies = true;
                match contents.get(from) {
                    Some(source) => self.bytes.extend_from_slice(&source[*offset as usize..(*offset + *len) as usize]),
                    None => self.lacks = true,
                }
            }
        }
    }
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
    Seeds::from_env(100).run("whatever_happens", run);
}
