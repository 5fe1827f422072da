//! Both nodes, as they are but for the network between them, which is here: it delays, mixes up its streams and loses what was on its way. Each node has a disk of its own, a file system
//! (ext4 or XFS, by the seed) in a file, which loses power as a machine does: what was not synced is gone. Any of the agents is killed, any machine loses power, both do, the standby's disk fills up.
//!
//! Whenever a standby has come up, its replica is read from the disk and must be a state the store had, no older than what was acknowledged or fenced. When the primary's machine has come up, it heals, and everything
//! fenced must be on its disk. Needs root (mounts); elsewhere it says so, and nothing is tried.

use std::collections::BTreeSet;
use std::fs;
use std::sync::MutexGuard;

use tokio::runtime::{Builder, Runtime};
use tokio::sync::mpsc;
use twinbox_protocol::codec::decode_log;
use twinbox_protocol::entry::Entry;
use twinbox_protocol::entry::Time;
use twinbox_protocol::msg::{BulkItem, Position, Replica, ToPrimary};
use twinbox_resync::node::Role;

use super::super::super::cut::wall;
use super::super::super::messages::{BulkMessage, Step, ToLink};
use super::super::*;
use super::disk::Disk;
use super::server::{GROUPS, Rng, Server, State, each_below};
use super::testing::{history, welcome};
use super::{Fence, Seeds, fence, open_engine, pending, turn};
use crate::heal::{RemoteError, by_hand, remote::Source};
use crate::layout::Layout;
use crate::roles::MirrorSpec;
use crate::standby::{ObjectWriter, Session, Standby, StandbyConfig, StandbyError, StandbyHandle};

/// Far above what anything takes.
const LONG: Duration = Duration::from_secs(60);
/// The two nodes.
pub(super) const NAMES: [&str; 2] = ["a", "b"];
const FILLED: &str = "disk filled or freed";

/// What the network holds.
struct Link {
    session: Session,
    txns: mpsc::UnboundedReceiver<ToLink>,
    bulk: mpsc::Receiver<BulkMessage>,
    words: mpsc::UnboundedReceiver<ToPrimary>,
    /// On its way to the standby, and back.
    forth: VecDeque<Forth>,
    objects: BTreeMap<u64, VecDeque<Option<BulkItem>>>,
    writers: HashMap<u64, ObjectWriter>,
    back: VecDeque<Command>,
}

enum Forth {
    Frame(Vec<u8>),
    Gone(ContentHash),
    Unstage(ContentHash),
    Keep(Vec<ContentHash>, bool),
    Stored(Lsn),
}

pub(super) struct Nodes {
    pub(super) disks: [Disk; 2],
    /// Which of them is the primary; the other is its standby, or has not come back yet.
    pub(super) primary: usize,
    pub(super) away: bool,
    /// Whether they change roles, too.
    changes_roles: bool,
    runtime: Runtime,
    pub(super) server: Arc<Mutex<Server>>,
    pub(super) rng: Rng,
    pub(super) engine: Option<Engine>,
    pub(super) standby: Option<Standby>,
    link: Option<Link>,
    lives: u8,
    sessions: u64,
    /// The highest LSN of which the primary was told that it is durable.
    pub(super) acknowledged: Lsn,
    /// Which state each group on the standby is at least in.
    pub(super) known: BTreeMap<String, usize>,
    /// Messages on the standby when last looked at, and those that a fence answered for.
    pub(super) seen: BTreeSet<ContentHash>,
    pub(super) promised: BTreeSet<ContentHash>,
    pub(super) fences: Vec<Fence>,
    pub(super) full: bool,
    /// Messages that a node which is away has, and those that both had when the other was promoted.
    pub(super) tail: BTreeSet<ContentHash>,
    pub(super) fork: BTreeSet<ContentHash>,
    pub(super) counts: BTreeMap<&'static str, usize>,
    problems: Vec<String>,
}

/// The contents of the standby, for a heal.
struct ByHand<'a> {
    runtime: &'a Runtime,
    handle: StandbyHandle,
}

impl Source for ByHand<'_> {
    fn fetch(&mut self, path: &RelPath, hash: ContentHash, _: u64, into: &mut fs::File) -> Result<Option<Vec<RelPath>>, RemoteError> {
        use std::io::Write;
        let (out, mut answer) = mpsc::channel(4);
        let (handle, path) = (self.handle.clone(), path.clone());
        self.runtime.block_on(async {
            let sent = tokio::spawn(async move { handle.content(path, hash, out).await });
            let (mut names, mut here) = (vec![], None);
            while let Some(message) = answer.recv().await {
                match message {
                    ToPrimary::Names { paths } => names = paths,
                    ToPrimary::Piece { bytes } => into.write_all(&bytes)?,
                    ToPrimary::Fetched { .. } => here = Some(std::mem::take(&mut names)),
                    ToPrimary::NotHere { .. } => {}
                    other => panic!("{other:?}"),
                }
            }
            sent.await.unwrap().unwrap();
            Ok(here)
        })
    }
}

impl Nodes {
    fn new(seed: u64, changes: usize, changes_roles: bool) -> Result<Nodes, String> {
        let kind = if seed.is_multiple_of(2) { "ext4" } else { "xfs" };
        let disks = [Disk::new(kind)?, Disk::new(kind)?];
        for disk in &disks {
            for name in ["store", "state", "aside"] {
                fs::create_dir(disk.path().join(name)).unwrap();
            }
        }
        let mut server = Server::new(disks[0].path().join("store"), disks[0].path().join("aside"), seed, changes);
        server.syncs = true;
        let mut nodes = Nodes {
            disks,
            primary: 0,
            away: false,
            changes_roles,
            runtime: Builder::new_current_thread().enable_all().build().unwrap(),
            server: Arc::new(Mutex::new(server)),
            rng: Rng(!seed),
            engine: None,
            standby: None,
            link: None,
            lives: 0,
            sessions: 0,
            acknowledged: Lsn::ZERO,
            known: BTreeMap::new(),
            seen: BTreeSet::new(),
            promised: BTreeSet::new(),
            fences: vec![],
            full: false,
            tail: BTreeSet::new(),
            fork: BTreeSet::new(),
            counts: BTreeMap::new(),
            problems: vec![],
        };
        nodes.start_primary();
        nodes.start_standby();
        nodes.disks[0].sync(); // Long before anything happens.
        nodes.disks[1].sync();
        Ok(nodes)
    }

    pub(super) fn server(&self) -> MutexGuard<'_, Server> {
        self.server.lock().unwrap()
    }

    pub(super) fn count(&mut self, what: &'static str) {
        if !what.starts_with("fence") {
            self.server().said.push(format!("-- {what}"));
        }
        *self.counts.entry(what).or_default() += 1;
    }

    pub(super) fn state_dir(&self, node: usize) -> PathBuf {
        self.disks[node].path().join("state")
    }

    pub(super) fn other(&self) -> usize {
        1 - self.primary
    }

    pub(super) fn tree(&self, node: usize) -> PathBuf {
        self.disks[node].path().join("store")
    }

    pub(super) fn start_primary(&mut self) {
        self.lives += 1;
        self.engine = Some(open_engine(NAMES[self.primary], &self.state_dir(self.primary), &self.server, self.lives));
    }

    pub(super) fn start_standby(&mut self) {
        let state = self.state_dir(self.other());
        let known = NodeState::open(&state).unwrap().mirror("m").unwrap();
        let config = StandbyConfig {
            mirror: "m".into(),
            root: self.tree(self.other()),
            state_dir: state.join("mirrors/m"),
            adopt: false,
            redo_max_bytes: 64 << 20,
            on_complete: Box::new(move |complete| {
                // Fails when the power has.
                let _ = NodeState::open(&state).and_then(|node| node.set_complete("m", complete));
            }),
        };
        self.standby = Some(Standby::start(config, known.as_ref()).unwrap());
        self.check_replica();
    }

    fn command(&mut self, command: Command) {
        self.engine.as_mut().unwrap().command(command).unwrap();
    }

    pub(super) fn handle(&self) -> StandbyHandle {
        self.standby.as_ref().unwrap().handle()
    }

    fn pull(&self, since: Option<Lsn>) -> (Vec<(RelPath, Option<Entry>)>, Position, twinbox_protocol::digest::Digest) {
        let (handle, (out, mut batches)) = (self.handle(), mpsc::channel(4));
        self.runtime.block_on(async {
            let sent = tokio::spawn(async move { handle.pull(since, out).await });
            let (mut all, mut end) = (vec![], None);
            while let Some(message) = batches.recv().await {
                match message {
                    ToPrimary::Rows { rows } => all.extend(rows),
                    ToPrimary::RowsEnd { position, digest } => end = Some((position, digest)),
                    other => panic!("{other:?}"),
                }
            }
            sent.await.unwrap().unwrap();
            let (position, digest) = end.unwrap();
            (all, position, digest)
        })
    }

    fn connect(&mut self) {
        let (reply, mut answer) = oneshot::channel();
        self.command(Command::Hello(reply));
        let hello = answer.try_recv().unwrap();
        let replica = match self.runtime.block_on(self.handle().replica(&hello)) {
            Ok(replica) => replica,
            Err(refusal) => return self.problems.push(refusal.message),
        };
        self.count("sessions");
        let (reply, mut answer) = oneshot::channel();
        self.command(Command::Welcome(Box::new(welcome(hello.chunker, replica)), reply));
        let mut step = answer.try_recv().unwrap().unwrap();
        let (from, reset) = loop {
            match step {
                Step::Begin { from, reset } => break (from, reset),
                Step::Pull(since) => {
                    self.count("pulls");
                    let (rows, position, digest) = self.pull(since);
                    self.command(Command::Rows(rows));
                    let (reply, mut answer) = oneshot::channel();
                    self.command(Command::RowsEnd(position, digest, reply));
                    step = answer.try_recv().unwrap().unwrap();
                }
            }
        };
        // As the link has it done: what the standby will follow is remembered before anything of it is written.
        let node = NodeState::open(&self.state_dir(self.other())).unwrap();
        let known = node.mirror("m").unwrap();
        if reset || known.as_ref().is_none_or(|known| known.lineage.generation() != hello.lineage.generation()) {
            let (complete, reserved) = known.map_or((false, Lsn::ZERO), |known| (known.complete, known.reserved));
            let follows =
                MirrorState { role: Role::Standby, complete, reserved, lineage: hello.lineage.clone(), epoch: hello.epoch, ..history() };
            assert!(node.follow("m", &follows).unwrap());
            self.handle().follow(hello.lineage.clone(), hello.epoch);
        }
        drop(node);
        let (told, words) = mpsc::unbounded_channel();
        let session = match self.runtime.block_on(self.handle().begin(from, reset, told)) {
            Ok(session) => session,
            Err(error) => return self.problems.push(error.to_string()),
        };
        let (out, txns) = mpsc::unbounded_channel();
        let (bulk, objects) = mpsc::channel(2);
        self.sessions += 1;
        self.command(Command::Up { id: self.sessions, out, bulk, peer: "b".into() });
        self.link = Some(Link {
            session,
            txns,
            bulk: objects,
            words,
            forth: VecDeque::new(),
            objects: BTreeMap::new(),
            writers: HashMap::new(),
            back: VecDeque::new(),
        });
    }

    /// What was on its way is lost, in both directions.
    pub(super) fn cut(&mut self) {
        self.hear();
        if self.link.take().is_some() {
            let id = self.sessions;
            if let Some(engine) = &mut self.engine {
                engine.command(Command::Down(id)).unwrap();
            }
        }
    }

    /// Takes what the standby said off its hands; the primary hears it later.
    fn hear(&mut self) {
        let Some(link) = &mut self.link else { return };
        while let Ok(word) = link.words.try_recv() {
            link.back.push_back(match word {
                ToPrimary::Durable { lsn } => Command::Durable(lsn),
                ToPrimary::Applied { lsn } => Command::Applied(lsn),
                ToPrimary::Staged { hash } => Command::Staged(hash),
                ToPrimary::Miss { hash } => Command::Miss(hash),
                ToPrimary::Incomplete { hash } => Command::Incomplete(hash),
                ToPrimary::Problem { message } => {
                    self.problems.push(message);
                    continue;
                }
                other => panic!("{other:?}"),
            });
        }
    }

    fn failed(&mut self) -> Option<StandbyError> {
        let failed = self.link.as_ref()?.session.failed();
        self.runtime.block_on(async {
            tokio::select! {
                biased;
                error = failed => Some(error),
                () = std::future::ready(()) => None,
            }
        })
    }

    /// Moves what the network holds; `true` when something moved. `all`: without delay.
    fn pump(&mut self, all: bool) -> bool {
        self.hear();
        let mut moved = false;
        if let Some(error) = self.failed() {
            let expected = match &error {
                StandbyError::Full { .. } => self.counts.contains_key(FILLED),
                StandbyError::Io { .. } => self.counts.contains_key(FILLED) && error.to_string().contains("No space left"),
                StandbyError::Gone { .. } => true,
                _ => false,
            };
            assert!(expected, "the session failed: {error}; {:?}", self.problems);
            self.count("sessions failed");
            self.cut();
            return true;
        }
        let Some(link) = &mut self.link else { return false };
        while let Ok(message) = link.txns.try_recv() {
            match message {
                ToLink::Txn(frames) => link.forth.extend(frames.into_iter().map(Forth::Frame)),
                ToLink::Gone(hash) => link.forth.push_back(Forth::Gone(hash)),
                ToLink::Lacks(hash) => panic!("nobody wanted {hash}"),
                ToLink::Unstage(hash) => link.forth.push_back(Forth::Unstage(hash)),
                ToLink::Keep { hashes, last } => link.forth.push_back(Forth::Keep(hashes, last)),
                ToLink::Stored(lsn) => link.forth.push_back(Forth::Stored(lsn)),
            }
        }
        while let Ok(message) = link.bulk.try_recv() {
            match message {
                BulkMessage::Abort(id) => link.objects.entry(id).or_default().push_back(None),
                BulkMessage::Item(id, item) => link.objects.entry(id).or_default().push_back(Some(item)),
            }
        }
        while !link.forth.is_empty() && (all || !self.rng.one_in(4)) {
            moved = true;
            match link.forth.pop_front().unwrap() {
                // Fails when the session has, which the next look tells.
                Forth::Frame(body) => {
                    let frame = decode_log(&body).unwrap();
                    let lines = frame.ops.iter().map(|op| format!("{}: {op:.140?}", frame.lsn).chars().take(170).collect());
                    self.server.lock().unwrap().said.extend(lines);
                    drop(self.runtime.block_on(tokio_soon(link.session.frame(body))));
                }
                Forth::Gone(hash) => link.session.gone(hash),
                Forth::Unstage(hash) => link.session.unstage(hash),
                Forth::Keep(hashes, last) => link.session.keep(hashes, last),
                Forth::Stored(lsn) => link.session.stored(lsn),
            }
        }
        while !link.objects.is_empty() && (all || !self.rng.one_in(4)) {
            moved = true;
            let ids: Vec<u64> = link.objects.keys().copied().collect();
            let id = self.rng.pick(&ids).unwrap();
            let queue = link.objects.get_mut(&id).unwrap();
            let item = queue.pop_front().unwrap();
            if queue.is_empty() {
                link.objects.remove(&id);
            }
            let Some(item) = item else {
                link.writers.remove(&id);
                continue;
            };
            let end = matches!(item, BulkItem::End { .. });
            if let std::collections::hash_map::Entry::Vacant(slot) = link.writers.entry(id) {
                match self.runtime.block_on(tokio_soon(link.session.object())) {
                    Ok(writer) => drop(slot.insert(writer)),
                    Err(_) => break, // The session has failed.
                }
            }
            let done = self.runtime.block_on(tokio_soon(link.writers.get_mut(&id).unwrap().item(item)));
            if end || done.is_err() {
                link.writers.remove(&id);
            }
        }
        let mut words = vec![];
        while !link.back.is_empty() && (all || !self.rng.one_in(4)) {
            words.extend(link.back.pop_front());
        }
        for word in words {
            moved = true;
            if let Command::Durable(lsn) = &word {
                self.acknowledged = self.acknowledged.max(*lsn);
            }
            self.command(word);
        }
        moved
    }

    fn step(&mut self) {
        let fault = self.rng.next(800);
        match fault {
            0 | 1 => self.cut(),
            2 => {
                self.count("primary killed");
                self.cut();
                self.engine = None;
                self.fences.clear();
                self.start_primary();
            }
            40 | 41 if self.changes_roles && !self.away => self.fail_over(),
            3..9 if self.away => {}
            3 | 4 if self.standby.is_some() => {
                self.count("standby killed");
                self.cut();
                self.standby.take().unwrap().crash();
            }
            5 | 6 => self.standby_loses_power(),
            7 => {
                let both = self.rng.one_in(3);
                self.primary_loses_power(both);
            }
            8 => self.fill(),
            9 if self.full => self.fill(),
            10..30 if self.link.is_some() => {
                let (command, asked) = fence(&self.server());
                self.command(command);
                self.fences.push(asked);
            }
            30..32 => self.disks[self.rng.next(2)].sync(), // As the kernel does by itself.
            _ => {}
        }
        if self.away && self.rng.one_in(60) {
            self.come_back();
        }
        if self.standby.is_none() && !self.away && self.rng.one_in(20) {
            self.start_standby();
        }
        if self.link.is_none() && self.standby.is_some() && self.rng.one_in(15) {
            self.connect();
        }
        turn(self.engine.as_mut().unwrap());
        self.pump(false);
        self.check_fences();
        let mut server = self.server();
        if server.left > 0 && server.rng.one_in(5) {
            server.act();
        }
    }

    fn standby_loses_power(&mut self) {
        self.count("standby lost power");
        self.cut();
        // The threads end first: who touches a mapped page of a disk without power (SQLite's index of its log) takes the whole simulation along.
        if let Some(standby) = self.standby.take() {
            standby.crash();
        }
        let other = self.other();
        self.disks[other].lose_power();
        self.disks[other].come_up();
        self.full = false;
        let _ = fs::remove_file(self.disks[other].path().join("filler"));
    }

    fn primary_loses_power(&mut self, both: bool) {
        self.count("primary lost power");
        self.cut();
        self.engine = None;
        self.disks[self.primary].lose_power();
        self.fences.clear();
        if both {
            self.standby_loses_power();
        }
        self.come_up(self.primary);
        let now = wall();
        if self.standby.is_none() {
            self.start_standby();
        }
        self.heal(now);
        self.check_promises(false);
        // What the server had removed and the power cut brought back is new on the standby.
        let removed = self.server().removed.clone();
        self.seen.retain(|hash| !removed.contains(hash));
        self.server().reload();
        self.start_primary();
    }

    pub(super) fn come_up(&mut self, node: usize) {
        self.disks[node].come_up();
        // Another boot is one with another name.
        let state = NodeState::open(&self.state_dir(node)).unwrap();
        if let Some(mark) = state.local_mark("m").unwrap() {
            state.set_local_mark("m", &twinbox_resync::node::LocalMark { boot: "another".into(), ..mark }).unwrap();
        }
    }

    pub(super) fn spec(&self, node: usize, role: Role) -> MirrorSpec {
        MirrorSpec {
            name: "m".into(),
            root: self.tree(node),
            layout: "plain".into(),
            role,
            selection: Selection::new(Layout::Plain, vec![]),
            grouping: Grouping::new(vec![]),
            adopt: false,
            sweep: None,
            fuzzy_after: None,
            tool: std::sync::Arc::default(),
        }
    }

    fn heal(&mut self, booted: Time) {
        let (node, spec) = (self.primary, self.spec(self.primary, Role::Primary));
        let Some(mut job) = crate::heal::need(NAMES[node], &self.state_dir(node), spec, false).unwrap() else { return };
        job.booted_at(booted);
        let hello = by_hand::hello(&job);
        let replica = self.runtime.block_on(self.handle().replica(&hello)).unwrap_or_else(|refusal| panic!("{}", refusal.message));
        if !matches!(replica, Replica::Holds { .. }) {
            return by_hand::nothing(&job);
        }
        self.count("heals");
        let (rows, position, _) = self.pull(Some(job.durable()));
        let source = ByHand { runtime: &self.runtime, handle: self.handle() };
        let done = by_hand::heal(&job, rows, position, source).unwrap();
        *self.counts.entry("put back").or_default() += done.restored as usize;
        self.server().said.push(format!("-- {done:?}"));
    }

    /// Every message that a fence answered for, and that the server did not remove, is in the store.
    /// `cut`: it is what one txn left, in the middle of others: see ARCHITECTURE, Open defects, for what has several names.
    pub(super) fn check_promises(&mut self, cut: bool) {
        let server = self.server();
        let mut here = BTreeSet::new();
        each_below(&server.root, &mut |path, meta| {
            if meta.is_file() {
                here.insert(ContentHash::of(&fs::read(server.root.join(path)).unwrap()));
            }
        });
        let excused = |hash: &ContentHash| server.removed.contains(hash) || (cut && server.may_be_nowhere(hash));
        let lost: Vec<ContentHash> = self.promised.iter().filter(|hash| !here.contains(hash) && !excused(hash)).copied().collect();
        drop(server);
        assert!(
            lost.is_empty(),
            "after a power cut or a promotion {} fenced messages are not in the store: {}",
            lost.len(),
            self.story(&lost)
        );
    }

    /// What happened lately, and where messages should be.
    pub(super) fn story(&self, messages: &[ContentHash]) -> String {
        let server = self.server();
        let held = |content: &usize| messages.contains(&server.hashes[*content]);
        let paths: Vec<&String> =
            server.tree.iter().filter(|(_, content)| content.as_ref().is_some_and(held)).map(|(path, _)| path).collect();
        format!("in the store {paths:?}; {:#?}", &server.said[server.said.len().saturating_sub(300)..])
    }

    pub(super) fn fill(&mut self) {
        self.count(FILLED);
        let filler = self.disks[self.other()].path().join("filler");
        self.full = !self.full;
        if !self.full {
            let _ = fs::remove_file(filler);
            return;
        }
        let file = fs::File::create(filler).unwrap();
        let free = rustix::fs::fstatvfs(&file).map(|stat| stat.f_bavail * stat.f_frsize).unwrap();
        // Less than what is kept free, at times nothing at all.
        let leave = if self.rng.one_in(2) { 60 << 20 } else { 1 << 20 };
        let _ = rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, free.saturating_sub(leave));
    }

    fn group(&self, group: &str) -> State {
        let root = self.tree(self.other());
        let mut state = State::new();
        if !root.join(group).is_dir() {
            return state;
        }
        state.insert(group.into(), None);
        each_below(&root.join(group), &mut |path, meta| {
            let path = format!("{group}/{path}");
            let content = meta.is_file().then(|| ContentHash::of(&fs::read(root.join(&path)).unwrap()));
            state.insert(path, content);
        });
        state
    }

    /// Of a standby that has just come up: the tree as it is on its disk.
    fn check_replica(&mut self) {
        let status = self.handle().status();
        assert!(status.durable.lsn >= self.acknowledged, "{} was acknowledged, the standby has {}", self.acknowledged, status.durable.lsn);
        assert!(status.refusing.is_none(), "{:?}", status.refusing);
        let mut here = BTreeSet::new();
        let states: Vec<(&str, State)> = GROUPS.iter().map(|group| (*group, self.group(group))).collect();
        for (_, state) in &states {
            here.extend(state.values().flatten().copied());
        }
        let lost = self.server().lost(&self.seen, &here);
        self.seen = here;
        if !status.complete {
            return; // The standby says itself that it is no mirror yet.
        }
        assert!(lost.is_empty(), "{} messages are nowhere at {}: {}", lost.len(), status.durable.lsn, self.story(&lost));
        self.count("replicas checked");
        for (group, now) in states {
            let from = self.known.get(group).copied().unwrap_or(0);
            let found = self.server().states[group].iter().skip(from).position(|state| *state == now);
            let Some(at) = found else {
                let wrong = nearest(&now, &self.server().states[group]);
                let (lsn, story) = (status.durable.lsn, self.story(&[]));
                panic!("{group} at {lsn} is in a state it never had, or one before {from}: {wrong}; {story}");
            };
            self.known.insert(group.into(), from + at);
        }
    }

    fn check_fences(&mut self) {
        for (mut answer, at) in std::mem::take(&mut self.fences) {
            match answer.try_recv() {
                Err(oneshot::error::TryRecvError::Empty) => self.fences.push((answer, at)),
                Err(oneshot::error::TryRecvError::Closed) => {}
                Ok(Err(_)) => self.count("fences refused"),
                Ok(Ok(lsn)) => {
                    self.count("fences");
                    assert!(lsn <= self.acknowledged, "{lsn} was fenced, {} is durable", self.acknowledged);
                    let server = self.server.lock().unwrap();
                    for (group, at) in at {
                        self.promised.extend(server.states[&group][at].values().flatten().filter(|hash| server.messages.contains(hash)));
                        let known = self.known.entry(group).or_default();
                        *known = (*known).max(at);
                    }
                }
            }
        }
    }

    fn finish(&mut self) {
        let end = Instant::now() + LONG;
        if self.full {
            self.fill();
        }
        self.server().left = 0;
        if self.away {
            self.come_back();
        }
        for _ in 0..2 {
            self.engine.as_mut().unwrap().boundary().unwrap();
            loop {
                if self.standby.is_none() {
                    self.start_standby();
                }
                if self.link.is_none() {
                    self.connect();
                }
                turn(self.engine.as_mut().unwrap());
                let moved = self.pump(true);
                self.check_fences();
                let engine = self.engine.as_ref().unwrap();
                let rest = self.link.as_ref().is_some_and(|link| link.objects.is_empty() && link.forth.is_empty());
                if rest && engine.complete && engine.scan.is_done() && engine.sets.is_clean() && engine.outbox.in_flight().len() == 0 {
                    break;
                }
                assert!(Instant::now() < end, "does not settle: {:#?}; {:?}", pending(engine), self.problems);
                if !moved {
                    std::thread::yield_now();
                }
            }
        }
        // In order or not, it comes up with everything.
        self.cut();
        let standby = self.standby.take().unwrap();
        if self.rng.one_in(2) {
            standby.stop()
        } else {
            standby.crash()
        }
        self.start_standby();
        for group in GROUPS {
            assert_eq!(self.group(group), self.server().now(group), "{group} at the end; {:?}", self.problems);
        }
    }
}

/// Bounds a wait; what takes longer stands still.
async fn tokio_soon<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(LONG, future).await.expect("the standby stands still")
}

/// How a state differs from the one of `states` that is nearest to it.
fn nearest(now: &State, states: &[State]) -> String {
    let differs = |state: &State| {
        let gone: Vec<_> =
            state.iter().filter(|(path, hash)| now.get(*path) != Some(*hash)).map(|(path, hash)| (path.clone(), *hash)).collect();
        let came: Vec<_> =
            now.iter().filter(|(path, hash)| state.get(*path) != Some(*hash)).map(|(path, hash)| (path.clone(), *hash)).collect();
        (gone.len() + came.len(), format!("the store had {gone:?}, the standby has {came:?}"))
    };
    let best = states.iter().enumerate().map(|(at, state)| (differs(state), at)).min();
    best.map_or_else(String::new, |((_, text), at)| format!("nearest is {at} of {}: {text}", states.len()))
}

fn run(seed: u64, changes_roles: bool) -> BTreeMap<&'static str, usize> {
    let mut nodes = Nodes::new(seed, 300, changes_roles).unwrap_or_else(|error| panic!("{error}"));
    let end = Instant::now() + 2 * LONG;
    while nodes.server().left > 0 {
        assert!(Instant::now() < end, "the server's changes do not come to an end");
        nodes.step();
    }
    nodes.finish();
    std::mem::take(&mut nodes.counts)
}

/// Runs seeds, where file systems can be mounted.
fn seeds(test: &str, usual: u64, changes_roles: bool) {
    if let Err(error) = Nodes::new(0, 0, false).and_then(|_| Nodes::new(1, 0, false)) {
        assert!(std::env::var_os("CI").is_none(), "file systems of our own cannot be mounted: {error}");
        eprintln!("SKIPPED: file systems of our own cannot be mounted, so no machine loses power here: {error}");
        return;
    }
    Seeds::from_env(usual).run(test, |seed| run(seed, changes_roles));
}

#[test]
fn two_nodes_on_disks_that_lose_power() {
    seeds("two_nodes_on_disks_that_lose_power", 100, false);
}

#[test]
fn two_nodes_that_change_roles() {
    seeds("two_nodes_that_change_roles", 30, true);
}
