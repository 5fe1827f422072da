//! The engine without its thread: one turn at a time, so that what comes between two steps is chosen by the test.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use tokio::sync::mpsc;
use twinbox_protocol::codec::decode_log;
use twinbox_protocol::digest::Digest;
use twinbox_protocol::entry::{Kind, Time};
use twinbox_protocol::msg::{BulkItem, Hello, Position, Replica, Welcome};
use twinbox_protocol::ops::{FLAG_INITIAL, Op};
use twinbox_resync::rows::{Local, Rows, perform};

use super::super::bulk::{BulkResult, Outcome};
use super::super::messages::{BulkMessage, Step, ToLink};
use super::super::testing;
use super::*;

pub(super) struct Rig {
    pub(super) dir: tempfile::TempDir,
    pub(super) root: PathBuf,
    pub(super) engine: Engine,
    out: Option<mpsc::UnboundedReceiver<ToLink>>,
    bulk: Option<mpsc::Receiver<BulkMessage>>,
    replica: Manifest,
    session: u64,
    /// Acknowledge txns but for the newest `unacked`.
    pub(super) unacked: usize,
    sent: VecDeque<Lsn>,
    /// Take bulk objects; say that they are staged.
    take: bool,
    pub(super) stage: bool,
    ended: Vec<ContentHash>,
    objects: BTreeSet<u64>,
    /// Inodes the standby made.
    inodes: u64,
    /// One of these is there after every txn, if there are any.
    somewhere: Vec<&'static str>,
    /// What the standby is told that the primary has stored,
    pub(super) stored: Lsn,
    /// and that it needs no more.
    unstaged: Vec<ContentHash>,
    /// Whether the standby is at a cut, by the last txn it got.
    whole: bool,
    /// What the engine said at the begin of the session that it still wants.
    wanted: Vec<ContentHash>,
}

pub(super) fn p(text: &str) -> RelPath {
    RelPath::new(text.as_bytes()).unwrap()
}

impl Rig {
    pub(super) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (root, state) = (dir.path().join("root"), dir.path().join("state"));
        fs::create_dir_all(&root).unwrap();
        fs::create_dir_all(&state).unwrap();
        let mut replica = Manifest::open(&dir.path().join("replica.db"), true).unwrap();
        replica.set_digest_key(testing::history().digest_key).unwrap();
        replica.begin().unwrap();
        let engine = testing::engine(testing::config(&root, &state, 4));
        Rig {
            dir,
            root,
            engine,
            out: None,
            bulk: None,
            replica,
            session: 0,
            unacked: 0,
            sent: VecDeque::new(),
            take: true,
            stage: true,
            ended: vec![],
            objects: BTreeSet::new(),
            inodes: 0,
            stored: Lsn::ZERO,
            unstaged: vec![],
            whole: false,
            wanted: vec![],
            somewhere: vec![],
        }
    }

    pub(super) fn connect(&mut self) {
        let (reply, mut answer) = oneshot::channel();
        self.engine.command(Command::Hello(reply)).unwrap();
        let hello = answer.try_recv().unwrap();
        let replica = match self.session {
            0 => Replica::Empty,
            _ => Replica::Holds {
                lineage: hello.lineage.clone(),
                epoch: hello.epoch,
                position: hello.position,
                digest: self.replica.digest(),
                chain_at_yours: None,
                complete: self.whole,
            },
        };
        let welcome = testing::welcome(hello.chunker, replica);
        let (reply, mut answer) = oneshot::channel();
        self.engine.command(Command::Welcome(Box::new(welcome), reply)).unwrap();
        let mut pulled = false;
        let (from, reset) = loop {
            match answer.try_recv().unwrap().unwrap() {
                Step::Begin { from, reset } => break (from, reset),
                Step::Pull(since) => {
                    assert_eq!(since, None, "this standby remembers no LSNs");
                    pulled = true;
                    let mut rows = vec![];
                    self.replica.each(None, |path, row, _| rows.push((path, Some(row.entry)))).unwrap();
                    self.engine.command(Command::Rows(rows)).unwrap();
                    let (reply, next) = oneshot::channel();
                    answer = next;
                    self.engine.command(Command::RowsEnd(hello.position, self.replica.digest(), reply)).unwrap();
                }
            }
        };
        if reset {
            if !pulled {
                self.replica.clear().unwrap();
            }
            self.replica.commit(from).unwrap();
            self.replica.begin().unwrap();
        }
        let (out, txns) = mpsc::unbounded_channel();
        let (bulk, objects) = mpsc::channel(2);
        (self.out, self.bulk) = (Some(txns), Some(objects));
        self.session += 1;
        self.engine.command(Command::Up { id: self.session, out, bulk, peer: "b".into() }).unwrap();
    }

    pub(super) fn disconnect(&mut self) {
        (self.out, self.bulk) = (None, None);
        self.engine.command(Command::Down(self.session)).unwrap();
    }

    /// The agent is killed, and another one comes up.
    fn restart(&mut self) {
        self.engine = Rig::new().engine; // One at a time.
        self.engine = testing::engine(testing::config(&self.root, &self.dir.path().join("state"), 5));
    }

    /// The standby keeps what it has by now,
    pub(super) fn keep(&mut self) {
        self.replica.commit(Position::START).unwrap();
        self.replica.begin().unwrap();
    }

    /// and goes back to it.
    pub(super) fn forget(&mut self) {
        self.sent.clear();
        self.replica.roll_back().unwrap();
        self.replica.begin().unwrap();
    }

    pub(super) fn turn(&mut self) {
        let engine = &mut self.engine;
        assert!(engine.commands().unwrap());
        engine.take_events().unwrap();
        engine.scan_some().unwrap();
        engine.note_listed();
        engine.timers().unwrap();
        engine.mint_when_alone().unwrap();
        engine.round().unwrap();
        engine.finish_first_sync().unwrap();
        engine.answer_waiters().unwrap();
        while let Some(Ok(message)) = self.out.as_mut().map(mpsc::UnboundedReceiver::try_recv) {
            if let ToLink::Stored(lsn) = message {
                self.stored = lsn;
            }
            if let ToLink::Unstage(hash) = message {
                self.unstaged.push(hash);
            }
            if let ToLink::Keep { hashes, .. } = &message {
                self.wanted.clone_from(hashes);
            }
            let ToLink::Txn(frames) = message else { continue };
            for body in frames {
                let frame = decode_log(&body).unwrap();
                self.replica.set_lsn(frame.lsn);
                for op in &frame.ops {
                    perform(&mut self.replica, op).unwrap();
                    if let Op::Put { path, .. } | Op::Make { path, .. } = op {
                        self.inodes += 1; // A new inode there; a link copies it.
                        self.replica.set_local(path, Some(Local { ino: self.inodes, ctime: Time::default() })).unwrap();
                    }
                }
                if let Some(seal) = frame.seal {
                    self.whole = frame.flags & FLAG_INITIAL == 0;
                    let there = |path: &&str| self.replica.row(&p(path)).unwrap().is_some();
                    assert!(self.somewhere.is_empty() || self.somewhere.iter().any(there), "nowhere at {}", frame.lsn);
                    assert_eq!(self.replica.digest(), seal.digest);
                    self.sent.push_back(frame.lsn);
                }
            }
        }
        while self.sent.len() > self.unacked {
            let lsn = self.sent.pop_front().unwrap();
            self.engine.command(Command::Durable(lsn)).unwrap();
            self.engine.command(Command::Applied(lsn)).unwrap();
        }
        while let Some(Ok(message)) = self.bulk.as_mut().filter(|_| self.take).map(mpsc::Receiver::try_recv) {
            let BulkMessage::Item(id, item) = message else { continue };
            self.objects.insert(id);
            if let BulkItem::End { hash, .. } = item {
                self.ended.push(hash);
            }
        }
        if self.stage {
            for hash in std::mem::take(&mut self.ended) {
                self.engine.command(Command::Staged(hash)).unwrap();
            }
        }
    }

    pub(super) fn until(&mut self, what: &str, done: impl Fn(&Self) -> bool) {
        let end = Instant::now() + Duration::from_secs(5);
        while !done(self) {
            assert!(Instant::now() < end, "never: {what}");
            self.turn();
        }
    }

    pub(super) fn settle(&mut self) {
        // An event may still be in the queue when nothing is dirty: a boundary says.
        for _ in 0..2 {
            self.engine.boundary().unwrap();
            self.until("settled", |r| {
                let e = &r.engine;
                e.complete && e.scan.is_done() && e.sets.is_clean() && e.outbox.in_flight().len() == 0
            });
        }
    }

    pub(super) fn has(&self, path: &str) -> bool {
        self.replica.row(&p(path)).unwrap().is_some()
    }

    pub(super) fn check(&self) {
        let rows: Vec<_> = self.replica.below(&RelPath::root()).unwrap();
        let mut disk = BTreeSet::new();
        walk(&self.root, &RelPath::root(), &mut disk);
        let names: BTreeSet<RelPath> = rows.iter().map(|(path, _)| path.clone()).collect();
        assert_eq!(names, disk);
        let mut here: BTreeMap<u64, BTreeSet<&RelPath>> = BTreeMap::new();
        let mut there = here.clone();
        for (path, row) in rows.iter().filter(|(_, row)| !row.entry.is_dir()) {
            here.entry(fs::symlink_metadata(self.root.join(path.to_string())).unwrap().ino()).or_default().insert(path);
            there.entry(row.local.unwrap().ino).or_default().insert(path);
        }
        let (here, there): (BTreeSet<_>, BTreeSet<_>) = (here.into_values().collect(), there.into_values().collect());
        assert_eq!(here, there, "names of one inode");
        for (path, row) in rows {
            if let Kind::File { hash, .. } = row.entry.kind {
                assert_eq!(hash, ContentHash::of(&fs::read(self.root.join(path.to_string())).unwrap()), "{path}");
            }
        }
    }
}

fn walk(at: &Path, path: &RelPath, out: &mut BTreeSet<RelPath>) {
    for item in fs::read_dir(at).unwrap() {
        let item = item.unwrap();
        let path = path.join(item.file_name().as_encoded_bytes()).unwrap();
        if item.metadata().unwrap().is_dir() {
            walk(&item.path(), &path, out);
        }
        out.insert(path);
    }
}

const BIG: usize = 9 << 20;

pub(super) fn big() -> Vec<u8> {
    (0..BIG as u32 / 4).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect()
}

pub(super) fn started(dirs: &[&str]) -> Rig {
    let mut rig = Rig::new();
    for dir in dirs {
        fs::create_dir_all(rig.root.join(dir)).unwrap();
    }
    rig.connect();
    rig.settle();
    rig
}

#[test]
fn a_folder_moved_to_where_one_that_left_the_tree_was_stays_watched() {
    let mut rig = started(&["d", "e"]);
    rig.disconnect();
    fs::rename(rig.root.join("d"), rig.dir.path().join("outside")).unwrap();
    fs::rename(rig.root.join("e"), rig.root.join("d")).unwrap();
    (0..5).for_each(|_| rig.turn());
    rig.connect();
    rig.settle();
    fs::write(rig.root.join("d/x"), b"mail").unwrap();
    rig.settle();
    rig.check();
}

#[test]
fn what_is_seen_of_a_name_counts_in_one_group_only() {
    let mut rig = started(&["y"]);
    fs::write(rig.root.join("y/mail"), b"1").unwrap();
    fs::write(rig.root.join("z"), b"").unwrap();
    rig.settle();
    rig.stage = false;
    // The group of files in the root waits for this one.
    fs::write(rig.root.join("big"), big()).unwrap();
    fs::create_dir(rig.root.join("x")).unwrap();
    rig.until("x arrives", |r| r.has("x"));
    fs::remove_dir(rig.root.join("x")).unwrap();
    (0..9).for_each(|_| rig.turn());
    rig.stage = true;
    rig.settle();
    rig.check();
    rig.stage = false;
    fs::write(rig.root.join("big"), &big()[5..]).unwrap();
    fs::remove_file(rig.root.join("z")).unwrap();
    rig.until("z is seen absent", |r| r.engine.sets.groups().any(|(_, g)| g.captured.contains_key(&p("z"))));
    fs::rename(rig.root.join("y"), rig.root.join("z")).unwrap();
    rig.until("z arrives", |r| r.has("z/mail"));
    rig.stage = true;
    rig.settle();
    rig.check();
}

/// What was never sent and is gone again, or has another name, is not kept: a standby that is away for long is owed what there is, not every name there ever was.
#[test]
fn names_that_came_and_went_while_the_standby_was_away_are_forgotten() {
    let mut rig = started(&["u", "v"]);
    fs::write(rig.root.join("u/old"), b"old").unwrap();
    rig.settle();
    rig.stage = false;
    fs::write(rig.root.join("u/big"), big()).unwrap(); // u is not cut meanwhile.
    for n in 0..50 {
        fs::write(rig.root.join("u/new"), format!("{n}")).unwrap();
        rig.turn();
        for (from, to) in [("new", "a"), ("a", "b"), ("b", "c")] {
            fs::rename(rig.root.join("u").join(from), rig.root.join("u").join(to)).unwrap();
            rig.turn();
        }
        fs::remove_file(rig.root.join("u/c")).unwrap();
    }
    fs::write(rig.root.join("u/here"), b"mail").unwrap();
    fs::rename(rig.root.join("u/here"), rig.root.join("u/there")).unwrap();
    fs::rename(rig.root.join("u/old"), rig.root.join("u/older")).unwrap();
    rig.until("there is read", |r| r.engine.sets.groups().any(|(_, g)| g.captured.contains_key(&p("u/there"))));
    // u itself, big, there, old, older.
    assert!(rig.engine.sets.pending() <= 5, "{:?}", rig.engine.sets);
    assert_eq!((rig.engine.fresh.len(), rig.engine.sets.hint_count()), (2, 1));
    rig.stage = true;
    rig.settle();
    rig.check();
    assert!(rig.engine.fresh.is_empty());
}

/// A file that nobody has heard of replaced one that the standby has, its folder was renamed, and it is gone: so is what it replaced, whatever name the standby has that under.
#[test]
fn what_was_replaced_before_its_folder_was_renamed_goes_with_what_replaced_it() {
    let mut rig = started(&["u", "v"]);
    for dir in ["u/d", "u/e", "u/e/f"] {
        fs::create_dir(rig.root.join(dir)).unwrap();
        fs::write(rig.root.join(dir).join("x"), b"old").unwrap();
    }
    rig.settle();
    rig.stage = false;
    fs::write(rig.root.join("u/big"), big()).unwrap(); // u is not cut meanwhile.
    for dir in ["u/d", "u/e/f"] {
        fs::write(rig.root.join("v/new"), b"new").unwrap();
        fs::rename(rig.root.join("v/new"), rig.root.join(dir).join("x")).unwrap();
    }
    for (from, to) in [("u/d", "u/d2"), ("u/e", "u/e2"), ("u/e2/f", "u/e2/f2"), ("u/e2", "u/e3")] {
        fs::rename(rig.root.join(from), rig.root.join(to)).unwrap();
    }
    (0..20).for_each(|_| rig.turn()); // They are compared under their new names while it is there.
    fs::remove_file(rig.root.join("u/d2/x")).unwrap();
    fs::remove_file(rig.root.join("u/e3/f2/x")).unwrap();
    (0..20).for_each(|_| rig.turn());
    rig.stage = true;
    rig.settle();
    rig.check();
}

/// A file was moved into a folder, and is gone with that; another folder has had its name since, and has moved on: that it is gone is not told of the other folder alone.
#[test]
fn what_was_moved_into_a_folder_goes_with_that_though_another_had_its_name_since() {
    let mut rig = started(&["u", "v"]);
    for dir in ["u/d", "u/e"] {
        fs::create_dir(rig.root.join(dir)).unwrap();
        fs::write(rig.root.join(dir).join("x"), b"mail").unwrap();
    }
    fs::write(rig.root.join("v/m"), b"moved").unwrap();
    rig.settle();
    rig.stage = false;
    fs::write(rig.root.join("u/big"), big()).unwrap(); // u is not cut meanwhile.
    fs::hard_link(rig.root.join("v/m"), rig.root.join("u/m")).unwrap();
    fs::rename(rig.root.join("v/m"), rig.root.join("u/d/m")).unwrap();
    (0..20).for_each(|_| rig.turn());
    fs::remove_dir_all(rig.root.join("u/d")).unwrap();
    (0..20).for_each(|_| rig.turn());
    for (from, to) in [("u/e", "u/d"), ("u/d", "u/f")] {
        fs::rename(rig.root.join(from), rig.root.join(to)).unwrap();
    }
    fs::create_dir(rig.root.join("u/d")).unwrap();
    (0..20).for_each(|_| rig.turn());
    rig.stage = true;
    rig.settle();
    rig.check();
}

/// A folder that is renamed takes along what was read below it, also when its turn for a cut comes only after many renames.
#[test]
fn what_was_read_below_a_folder_is_not_read_again_because_that_was_renamed() {
    let mut rig = started(&["u"]);
    fs::create_dir(rig.root.join("u/d")).unwrap();
    rig.settle();
    rig.stage = false;
    fs::write(rig.root.join("u/big"), big()).unwrap(); // u is not cut meanwhile.
    for n in 0..100 {
        fs::write(rig.root.join(format!("u/d/{n}")), b"mail").unwrap();
    }
    rig.until("all is read", |r| r.engine.sets.groups().any(|(_, g)| g.captured.len() >= 100));
    let before = rig.engine.pace.looked;
    for n in 0..20 {
        fs::rename(rig.root.join(if n == 0 { "u/d".into() } else { format!("u/d{n}") }), rig.root.join(format!("u/d{}", n + 1))).unwrap();
        (0..5).for_each(|_| rig.turn());
    }
    let looked = rig.engine.pace.looked - before;
    assert!(looked < 500, "{looked} looks for 20 renames of a folder of 100 messages");
    rig.stage = true;
    rig.settle();
    rig.check();
}

/// A folder takes the name of one that was just emptied and removed, as a server's trash does for each folder that is deleted: the plan knows where everything went, and nothing is read again.
#[test]
fn a_name_that_folder_after_folder_has_is_planned_at_once() {
    let mut rig = started(&["u"]);
    for folder in ["a", "b"] {
        fs::create_dir(rig.root.join("u").join(folder)).unwrap();
        fs::write(rig.root.join("u").join(folder).join("mail"), folder).unwrap();
    }
    rig.settle();
    rig.stage = false;
    fs::write(rig.root.join("u/big"), big()).unwrap(); // u is not cut meanwhile.
    rig.until("big is being sent", |r| r.engine.sets.groups().any(|(_, g)| !g.staging.is_empty()));
    let trash = |rig: &mut Rig, folder: &str, empty: bool| {
        fs::rename(rig.root.join("u").join(folder), rig.root.join("u/trash")).unwrap();
        rig.turn();
        if empty {
            fs::remove_file(rig.root.join("u/trash/mail")).unwrap();
            fs::remove_dir(rig.root.join("u/trash")).unwrap();
            rig.turn();
        }
    };
    trash(&mut rig, "a", true);
    fs::create_dir(rig.root.join("u/c")).unwrap();
    fs::write(rig.root.join("u/c/mail"), b"c").unwrap();
    (0..5).for_each(|_| rig.turn());
    trash(&mut rig, "c", true);
    trash(&mut rig, "b", false);
    (0..20).for_each(|_| rig.turn());
    let again = rig.engine.summary.replanned;
    rig.stage = true;
    rig.settle();
    rig.check();
    assert_eq!(rig.engine.summary.replanned, again, "looked at again");
}

/// What is read below a folder is read under the name it has at that moment, and its rename may be on its way: nothing that was seen so is believed under the other name.
#[test]
fn what_was_looked_for_where_a_folder_had_been_is_looked_for_again_where_it_is() {
    let mut rig = started(&["u"]);
    fs::create_dir_all(rig.root.join("u/f/cur")).unwrap();
    for name in ["m", "n"] {
        fs::write(rig.root.join("u/f/cur").join(name), b"mail").unwrap();
    }
    rig.settle();
    // Dirty, though as its row says: its writer closes it without a change.
    drop(fs::OpenOptions::new().append(true).open(rig.root.join("u/f/cur/m")).unwrap());
    let (root, mut moment) = (rig.root.clone(), 0);
    rig.engine.meanwhile = Some(Box::new(move || {
        moment += 1;
        if moment == 1 {
            fs::rename(root.join("u/f"), root.join("u/g")).unwrap(); // After the first boundary, before the look.
            fs::create_dir_all(root.join("u/f/cur")).unwrap();
            fs::write(root.join("u/f/cur/m"), b"another").unwrap();
        }
    }));
    for _ in 0..20 {
        rig.turn();
        let cur = if rig.has("u/g") { "u/g/cur" } else { "u/f/cur" };
        assert!(rig.has(&format!("{cur}/m")) && rig.has(&format!("{cur}/n")), "a message is nowhere");
    }
    rig.engine.meanwhile = None;
    rig.settle();
    rig.check();
}

/// The same where two folders change places: what is new in one is not in the other, too.
#[test]
fn what_is_new_in_a_folder_that_is_exchanged_with_another_is_in_one_place() {
    let mut rig = started(&["u"]);
    for folder in ["a", "b"] {
        fs::create_dir(rig.root.join("u").join(folder)).unwrap();
    }
    rig.settle();
    rig.stage = false;
    fs::write(rig.root.join("u/big"), big()).unwrap(); // u is not cut meanwhile.
    fs::write(rig.root.join("u/a/x"), b"mail").unwrap();
    rig.until("x is read", |r| r.engine.sets.groups().any(|(_, g)| g.captured.contains_key(&p("u/a/x"))));
    let path = |name: &str| rig.root.join("u").join(name);
    let cwd = rustix::fs::CWD;
    rustix::fs::renameat_with(cwd, path("a"), cwd, path("b"), rustix::fs::RenameFlags::EXCHANGE).unwrap();
    (0..20).for_each(|_| rig.turn());
    rig.stage = true;
    rig.until("x arrives", |r| r.has("u/b/x"));
    assert!(!rig.has("u/a/x"), "twice");
    rig.settle();
    rig.check();
}

/// A round that was to look at a name, and did not, is none because that name is gone in the end: what is there in its place belongs to it.
#[test]
fn a_round_in_which_a_name_was_not_looked_at_is_not_whole_because_that_is_forgotten() {
    use std::time::Instant;
    let mut rig = started(&["u"]);
    fs::write(rig.root.join("u/x"), b"mail").unwrap();
    rig.engine.take_events().unwrap();
    rig.engine.sets.start_round();
    rig.engine.sets.freeze(b"u");
    let mark = rig.engine.sets.take(b"u", &p("u/x")).unwrap();
    rig.engine.sets.put_back(b"u", p("u/x"), mark); // Its writer has it open.
    assert!(mark.since <= Instant::now() && mark.round < rig.engine.sets.round());
    fs::hard_link(rig.root.join("u/x"), rig.root.join("u/z")).unwrap();
    fs::remove_file(rig.root.join("u/x")).unwrap();
    rig.engine.take_events().unwrap();
    assert!(!rig.engine.sets.is_pending(b"u", &p("u/x")), "forgotten");
    assert!(!rig.engine.sets.is_round_whole(b"u"), "a fence over it would be through without z");
    rig.settle();
    rig.check();
}

#[test]
fn an_overflow_voids_what_was_seen_before_it() {
    let mut rig = started(&["u"]);
    rig.stage = false;
    fs::write(rig.root.join("u/big"), big()).unwrap();
    fs::write(rig.root.join("u/new"), b"1").unwrap();
    rig.until("new is read", |r| r.engine.sets.groups().any(|(_, g)| g.captured.contains_key(&p("u/new"))));
    fs::remove_file(rig.root.join("u/new")).unwrap();
    rig.engine.watch.read(&mut vec![]).unwrap();
    rig.engine.event(&Event { wd: -1, mask: ReadFlags::QUEUE_OVERFLOW, cookie: 0, name: vec![] }).unwrap();
    rig.stage = true;
    rig.settle();
    rig.check();
}

#[test]
fn a_file_somebody_keeps_open_is_not_read_anew_while_its_content_is_on_its_way() {
    let mut rig = started(&["u"]);
    rig.stage = false;
    let mut file = fs::File::create(rig.root.join("u/big")).unwrap();
    std::io::Write::write_all(&mut file, &big()).unwrap();
    rig.until("sent", |r| !r.ended.is_empty() && !r.engine.writers.is_empty());
    for _ in 0..3 {
        rig.engine.writers_at = Instant::now() - WRITERS_EVERY;
        rig.turn();
    }
    assert_eq!(rig.engine.sets.groups().filter(|(_, g)| g.staging.contains_key(&p("u/big"))).count(), 1, "else it never ends");
    rig.stage = true;
    rig.settle();
    rig.check();
}

#[test]
fn a_bulk_result_of_the_session_before_does_not_swallow_the_standbys_word() {
    let mut rig = started(&["u"]);
    rig.stage = false;
    fs::write(rig.root.join("u/big"), big()).unwrap();
    rig.until("read", |r| !r.engine.bulk.awaiting.is_empty());
    let (hash, id, seen) = rig.engine.bulk.awaiting.iter().map(|(hash, all)| (*hash, all[0].id, all[0].seen.clone())).next().unwrap();
    rig.disconnect();
    rig.ended.clear();
    rig.take = false;
    rig.connect();
    rig.until("read again", |r| r.engine.bulk.last_id() > id);
    let outcome = Outcome::Read { seen, large: None, staged: true, torn: false };
    rig.engine.command(Command::Bulk(Box::new(BulkResult { id, path: p("u/big"), outcome }))).unwrap();
    rig.engine.command(Command::Staged(hash)).unwrap();
    rig.take = true;
    rig.settle();
    rig.check();
}

#[test]
fn what_an_older_read_of_a_file_says_does_not_take_away_the_newer_one() {
    let mut rig = started(&["u"]);
    rig.stage = false;
    fs::write(rig.root.join("u/big"), big()).unwrap();
    rig.until("read", |r| !r.engine.bulk.awaiting.is_empty());
    let old = rig.engine.bulk.last_id();
    fs::OpenOptions::new().append(true).open(rig.root.join("u/big")).unwrap().write_all(b"one more message").unwrap();
    rig.until("sent", |r| !r.ended.is_empty());
    let hash = rig.ended.pop().unwrap();
    rig.engine.boundary().unwrap();
    rig.engine.command(Command::Staged(hash)).unwrap();
    rig.until("read again", |r| r.engine.bulk.last_id() > old);
    rig.engine.command(Command::Bulk(Box::new(BulkResult { id: old, path: p("u/big"), outcome: Outcome::Unstable }))).unwrap();
    rig.stage = true;
    rig.settle();
    rig.check();
}

#[test]
fn a_file_that_grew_while_it_was_staged_is_sent_once() {
    let mut rig = started(&["u"]);
    rig.stage = false;
    fs::write(rig.root.join("u/big"), big()).unwrap();
    rig.until("read and sent", |r| !r.engine.bulk.awaiting.is_empty() && !r.ended.is_empty());
    let path = rig.root.join("u/big");
    let append = |text: &[u8]| fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(text).unwrap();
    append(b"one more message");
    rig.engine.boundary().unwrap();
    rig.engine.command(Command::Staged(rig.ended.pop().unwrap())).unwrap();
    rig.settle(); // Nothing more is staged.
    rig.check();
    append(b"and another");
    rig.settle();
    rig.check();
    assert!(rig.ended.is_empty() && rig.engine.bulk.left().is_none());
    assert_eq!(std::mem::take(&mut rig.unstaged).len(), 1, "once the txn that named it was durable");
    // What was staged for a file that is gone is let go.
    fs::write(rig.root.join("u/other"), big().split_off(5)).unwrap();
    rig.until("read and sent", |r| !r.engine.bulk.awaiting.is_empty() && !r.ended.is_empty());
    fs::remove_file(rig.root.join("u/other")).unwrap();
    rig.engine.boundary().unwrap();
    let hash = rig.ended.pop().unwrap();
    rig.engine.command(Command::Staged(hash)).unwrap();
    rig.settle();
    assert_eq!(rig.unstaged, [hash]);
}

#[test]
fn a_file_the_standby_cannot_put_together_is_sent_whole() {
    for early in [false, true] {
        let mut rig = started(&["u"]);
        fs::write(rig.root.join("u/big"), big()).unwrap();
        rig.settle();
        rig.stage = false;
        // Another inode: copied from the first where they are equal.
        fs::write(rig.root.join("u/other"), [&big()[..], b"and an end"].concat()).unwrap();
        rig.ended.clear();
        if early {
            rig.until("sent", |r| !r.ended.is_empty());
        } else {
            rig.until("read", |r| !r.engine.bulk.awaiting.is_empty());
            rig.until("sent", |r| !r.ended.is_empty());
        }
        let (id, hash) = (rig.engine.bulk.last_id(), rig.ended.pop().unwrap());
        rig.engine.command(Command::Incomplete(hash)).unwrap();
        rig.until("read again", |r| r.engine.bulk.last_id() > id);
        rig.stage = true;
        rig.settle();
        rig.check();
        assert_eq!(rig.session, 1);
    }
}

#[test]
fn who_waits_for_a_sync_does_not_take_a_lost_txn_for_arrived() {
    let mut rig = started(&["u"]);
    rig.unacked = 9;
    fs::write(rig.root.join("u/x"), b"1").unwrap();
    rig.until("shipped", |r| r.has("u/x"));
    let (reply, _answer) = oneshot::channel();
    rig.engine.command(Command::Sync(reply)).unwrap();
    rig.until("waits for a txn", |r| r.engine.waiters.iter().any(|w| w.at.is_some()));
    rig.disconnect();
    assert!(rig.engine.waiters.iter().all(|w| w.at.is_none() && w.round.is_none()), "that txn is dropped, and its number passed by others");
}

#[test]
fn what_was_in_flight_is_sent_again_as_it_was_and_what_was_seen_is_not_read_again() {
    let mut rig = started(&["u", "v"]);
    fs::write(rig.root.join("v/old"), b"a message").unwrap();
    rig.settle();
    rig.keep();
    rig.unacked = 9;
    fs::write(rig.root.join("u/x"), b"in flight").unwrap();
    let before = rig.sent.len();
    rig.until("sent", |r| r.has("u/x") && r.engine.sets.is_clean());
    let sent: Vec<Lsn> = rig.sent.iter().skip(before).copied().collect();
    // Seen, as what the standby has under another name, and not cut: somebody holds its group.
    let (reply, _begun) = oneshot::channel();
    rig.engine.command(Command::TxnBegin { path: p("v/old"), time: Duration::from_secs(60), reply }).unwrap();
    rig.until("held", |r| r.engine.sets.is_held(&[b"v".to_vec()].into()));
    rig.disconnect();
    rig.forget(); // The standby was killed before it had it.
    rig.connect();
    let looked = rig.engine.pace.looked;
    rig.until("sent again", |r| r.has("u/x"));
    let again: Vec<Lsn> = rig.sent.iter().take(sent.len()).copied().collect();
    assert_eq!((again, rig.engine.pace.looked), (sent, looked), "under the same numbers, and nothing was looked at");
    let (reply, _ended) = oneshot::channel();
    rig.engine.command(Command::TxnEnd { id: None, path: Some(p("v/old")), reply }).unwrap();
    rig.unacked = 0;
    rig.settle();
    rig.check();
}

#[test]
fn what_was_staged_is_not_sent_again_in_the_next_session() {
    let mut rig = started(&["u", "v"]);
    rig.keep();
    // Written to in the middle of every round: nothing is cut.
    let busy = |rig: &mut Rig| {
        let busy = fs::OpenOptions::new().append(true).create(true).open(rig.root.join("u/busy")).unwrap();
        rig.engine.meanwhile = Some(Box::new(move || (&busy).write_all(b"x").unwrap()));
    };
    let (big, hash) = (big(), ContentHash::of(&big()));
    for renamed in [false, true] {
        busy(&mut rig);
        fs::write(rig.root.join("u/big"), &big).unwrap();
        rig.until("staged", |r| r.engine.bulk.ahead.holds(hash) && r.engine.sets.staging().is_empty());
        rig.disconnect();
        if renamed {
            // Read again, and compared with what was staged.
            fs::rename(rig.root.join("u/big"), rig.root.join("u/other")).unwrap();
        }
        let (jobs, objects) = (rig.engine.bulk.last_id(), rig.objects.len());
        rig.connect();
        rig.engine.meanwhile = None;
        rig.settle();
        rig.check();
        assert_eq!((&rig.wanted, rig.engine.bulk.last_id(), rig.objects.len()), (&vec![hash], jobs + u64::from(renamed), objects));
        assert!(rig.engine.bulk.left().is_none());
        let _ = fs::remove_file(rig.root.join("u/big"));
        rig.settle();
    }
    // What is not wanted any more is not named, nor is what the standby may have of another history.
    for same in [true, false] {
        busy(&mut rig);
        fs::write(rig.root.join("u/next"), &big[5..]).unwrap();
        rig.until("staged", |r| r.engine.bulk.ahead.holds(ContentHash::of(&big[5..])) && r.engine.sets.staging().is_empty());
        rig.disconnect();
        if same {
            fs::remove_file(rig.root.join("u/next")).unwrap();
            rig.engine.boundary().unwrap();
        } else {
            rig.engine.doubt = true;
        }
        rig.connect();
        rig.wanted.push(hash);
        rig.turn();
        assert_eq!(rig.wanted, []);
        rig.engine.meanwhile = None;
        rig.settle();
        rig.check();
    }
}

#[test]
fn a_standby_at_no_cut_stays_so_until_a_new_agent_has_found_all_it_lacks() {
    let mut rig = started(&["u", "v"]);
    fs::write(rig.root.join("u/x"), b"1").unwrap();
    rig.settle();
    assert!(rig.whole);
    // It came back to a history that had gone on, and the agent that knew what of it was missing was killed.
    rig.disconnect();
    for n in 0..20 {
        fs::write(rig.root.join(format!("v/{n}")), b"2").unwrap();
    }
    rig.whole = false;
    rig.restart();
    rig.connect();
    let all = |rig: &Rig| (0..20).all(|n| rig.has(&format!("v/{n}")));
    let end = Instant::now() + Duration::from_secs(10);
    while !rig.whole {
        assert!(Instant::now() < end, "never told that it is at a cut");
        rig.turn();
        assert!(!rig.whole || all(&rig), "at a cut without all that the store has");
    }
    rig.settle();
    rig.check();
}

#[test]
fn bytes_for_which_there_is_no_room_are_read_again_when_they_are_sent() {
    let mut rig = started(&["u"]);
    rig.engine.config.window_bytes = 10_000;
    for n in 0..40u8 {
        fs::write(rig.root.join(format!("u/{n}")), vec![n; 2000 + 3000 * usize::from(n % 3)]).unwrap();
    }
    fs::write(rig.root.join("u/larger"), vec![7; twinbox_protocol::ops::INLINE_MAX + 5]).unwrap();
    // Written to in the middle of every round: everything is seen, and nothing cut.
    let busy = fs::OpenOptions::new().append(true).create(true).open(rig.root.join("u/busy")).unwrap();
    rig.engine.meanwhile = Some(Box::new(move || (&busy).write_all(b"x").unwrap()));
    rig.until("all is seen", |r| r.engine.sets.groups().any(|(_, g)| g.captured.len() > 40));
    let unit: BTreeSet<Group> = [b"u".to_vec()].into();
    assert!(rig.engine.sets.later(&unit).len() > 20);
    assert!(rig.engine.sets.held_bytes() < 2 * 10_000 + 42 * 300, "{}", rig.engine.sets.held_bytes());
    // One of them changes, and another goes, before they are sent.
    fs::write(rig.root.join("u/38"), b"other").unwrap();
    fs::remove_file(rig.root.join("u/37")).unwrap();
    rig.engine.meanwhile = None;
    rig.settle();
    rig.check();
    assert_eq!(rig.engine.sets.later(&unit).len(), 0);
}

#[test]
fn a_content_that_cannot_be_sent_again_has_everything_looked_at() {
    let mut rig = started(&["u"]);
    rig.keep();
    rig.unacked = 9;
    fs::write(rig.root.join("u/x"), b"in flight").unwrap();
    rig.until("sent", |r| r.has("u/x") && r.engine.sets.is_clean());
    // The standby lacks a content that is nowhere any more: sent again as it was, it would fail again.
    rig.engine.command(Command::Miss(ContentHash::of(b"gone"))).unwrap();
    rig.disconnect();
    rig.forget();
    let (looked, last) = (rig.engine.pace.looked, rig.engine.outbox.last().lsn);
    rig.connect();
    rig.until("sent", |r| r.has("u/x"));
    assert!(rig.engine.pace.looked > looked && rig.engine.outbox.last().lsn > last);
    rig.unacked = 0;
    rig.settle();
    rig.check();
}

#[test]
fn a_change_that_was_taken_back_is_found_in_a_folder_that_moved_since() {
    for file in ["u/x/cur/mail", "u/x/mail"] {
        let mut rig = started(&["u/x/cur"]);
        fs::write(rig.root.join(file), b"first").unwrap();
        rig.settle();
        rig.keep();
        rig.unacked = 9;
        let before = rig.sent.len();
        fs::OpenOptions::new().append(true).open(rig.root.join(file)).unwrap().write_all(b" and second").unwrap();
        rig.until("sent", |r| r.sent.len() > before && r.engine.sets.is_clean());
        rig.disconnect();
        fs::rename(rig.root.join("u/x"), rig.root.join("u/y")).unwrap();
        (0..5).for_each(|_| rig.turn());
        rig.forget(); // The standby was killed before it had the change.
        rig.unacked = 0;
        rig.connect();
        rig.settle();
        rig.check();
    }
}

#[test]
fn a_message_moved_between_groups_is_never_nowhere_though_its_txn_was_lost_or_nobody_saw_it_move() {
    for (from, to) in [("a/x", "b/x"), ("b/x", "a/x")] {
        for seen in [false, true] {
            let mut rig = started(&["a", "b"]);
            fs::write(rig.root.join(from), b"mail").unwrap();
            rig.settle();
            rig.keep();
            rig.somewhere = vec![from, to];
            rig.unacked = 9;
            let before = rig.sent.len();
            if seen {
                fs::rename(rig.root.join(from), rig.root.join(to)).unwrap();
                rig.until("sent", |r| r.sent.len() > before && r.engine.sets.is_clean());
            }
            rig.disconnect();
            if !seen {
                fs::rename(rig.root.join(from), rig.root.join(to)).unwrap();
                rig.engine.boundary().unwrap();
                rig.engine.sets.clear();
                rig.engine.compare = true;
            }
            rig.forget();
            rig.unacked = 0;
            rig.connect();
            rig.settle();
            rig.check();
        }
    }
}

#[test]
fn a_write_under_a_name_that_is_another_files_by_now_is_found_under_the_other() {
    for known in [false, true] {
        let mut rig = started(&["u"]);
        let (log, link) = (rig.root.join("u/log"), rig.root.join("u/link"));
        let write = |path: &Path, text: &str| {
            fs::write(path.with_extension("new"), text).unwrap();
            fs::rename(path.with_extension("new"), path).unwrap();
        };
        write(&log, "one");
        if known {
            fs::hard_link(&log, &link).unwrap();
            rig.settle();
        } else {
            rig.settle();
            rig.stage = false;
            fs::write(rig.root.join("u/big"), big()).unwrap(); // The group waits.
            fs::hard_link(&log, &link).unwrap();
            rig.until("it is seen", |r| matches!(r.engine.sets.seen(b"u", &p("u/link")), Pending::Seen(Some(_))));
        }
        fs::OpenOptions::new().append(true).open(&log).unwrap().write_all(b" and two").unwrap();
        write(&log, "three");
        (0..5).for_each(|_| rig.turn());
        rig.stage = true;
        rig.settle();
        rig.check();
    }
}

#[test]
fn a_message_moved_by_link_and_unlink_is_never_nowhere() {
    let mut rig = started(&["a", "b"]);
    fs::write(rig.root.join("a/x"), b"mail").unwrap();
    rig.settle();
    rig.somewhere = vec!["a/x", "b/x"];
    rig.stage = false;
    fs::write(rig.root.join("b/big"), big()).unwrap(); // b waits.
    fs::hard_link(rig.root.join("a/x"), rig.root.join("b/x")).unwrap();
    fs::remove_file(rig.root.join("a/x")).unwrap();
    (0..20).for_each(|_| rig.turn());
    rig.stage = true;
    rig.settle();
    rig.check();
    assert!(rig.engine.fresh.is_empty());
}

/// A heal put it back after a power cut: its row has another number.
#[test]
fn a_message_that_got_another_number_and_moves_is_never_nowhere() {
    let mut rig = started(&["a", "b"]);
    fs::write(rig.root.join("a/x"), b"mail").unwrap();
    rig.settle();
    rig.somewhere = vec!["a/x", "b/x"];
    let other = |manifest: &mut Manifest| {
        let position = manifest.position()?;
        manifest.begin()?;
        manifest.set_local(&p("a/x"), Some(Local { ino: 1 << 40, ctime: Time::default() }))?;
        manifest.commit(position)
    };
    rig.engine.view.replace(other).unwrap();
    rig.stage = false;
    fs::write(rig.root.join("b/big"), big()).unwrap(); // b waits.
    fs::hard_link(rig.root.join("a/x"), rig.root.join("b/x")).unwrap();
    fs::remove_file(rig.root.join("a/x")).unwrap();
    (0..20).for_each(|_| rig.turn());
    rig.stage = true;
    rig.settle();
    rig.check();
}

#[test]
fn a_users_directory_renamed_is_never_nowhere_though_it_is_compared_before_it_is_cut() {
    let mut rig = started(&["x"]);
    fs::write(rig.root.join("x/mail"), b"mail").unwrap();
    rig.settle();
    rig.somewhere = vec!["x/mail", "y/mail"];
    rig.stage = false;
    fs::write(rig.root.join("x/big"), big()).unwrap();
    fs::rename(rig.root.join("x"), rig.root.join("y")).unwrap();
    rig.until("y waits", |r| r.engine.sets.groups().any(|(_, g)| g.staging.contains_key(&p("y/big"))));
    rig.engine.rechecks.values_mut().for_each(|at| *at = Instant::now()); // Two seconds later.
    (0..20).for_each(|_| rig.turn());
    rig.stage = true;
    rig.settle();
    rig.check();
}

#[test]
fn what_lay_in_a_deleted_folder_is_not_in_the_one_renamed_to_its_name() {
    for watched in [true, false] {
        let mut rig = started(&["u", "u/F"]);
        fs::write(rig.root.join("u/F/old"), b"mail").unwrap();
        rig.settle();
        let trash = || {
            fs::rename(rig.root.join("u/F"), rig.root.join("u/trash")).unwrap();
            fs::remove_dir_all(rig.root.join("u/trash")).unwrap();
        };
        if watched {
            trash();
        } else {
            trash();
            rig.disconnect();
            rig.engine.boundary().unwrap();
            rig.engine.sets.clear();
            rig.engine.compare = true;
        }
        fs::create_dir(rig.root.join("u/X")).unwrap();
        fs::write(rig.root.join("u/X/new"), b"other mail").unwrap();
        fs::rename(rig.root.join("u/X"), rig.root.join("u/F")).unwrap();
        if !watched {
            rig.connect();
        }
        rig.settle();
        assert!(rig.has("u/F/new") && !rig.has("u/F/old"), "watched: {watched}");
        rig.check();
    }
}

#[test]
fn a_users_directory_renamed_while_nobody_watched_is_never_nowhere() {
    for (from, to) in [("a", "c"), ("c", "a")] {
        let mut rig = started(&[from]);
        let (old, new) = (format!("{from}/x"), format!("{to}/x"));
        fs::write(rig.root.join(&old), b"mail").unwrap();
        rig.settle();
        rig.somewhere = vec!["a/x", "c/x"];
        rig.disconnect();
        fs::rename(rig.root.join(from), rig.root.join(to)).unwrap();
        rig.engine.boundary().unwrap();
        rig.engine.sets.clear();
        rig.engine.compare = true;
        rig.connect();
        rig.settle();
        rig.check();
        assert!(rig.has(&new));
    }
}

#[test]
fn a_message_moved_while_nobody_watched_is_never_nowhere_though_the_manifest_was_lost() {
    for (from, to, large) in [("a/x", "b/x", "b/big"), ("b/x", "a/x", "a/big")] {
        let mut rig = started(&["a", "b"]);
        fs::write(rig.root.join(from), b"mail").unwrap();
        rig.settle();
        rig.somewhere = vec![from, to];
        rig.disconnect();
        fs::rename(rig.root.join(from), rig.root.join(to)).unwrap();
        fs::write(rig.root.join(large), big()).unwrap(); // Where it is now waits.
        rig.engine.boundary().unwrap();
        rig.engine.sets.clear();
        rig.engine.compare = true;
        let lost = |manifest: &mut Manifest| {
            manifest.begin()?;
            manifest.clear()?;
            manifest.commit(Position::START)
        };
        rig.engine.view.replace(lost).unwrap();
        rig.stage = false;
        rig.connect();
        (0..20).for_each(|_| rig.turn());
        rig.stage = true;
        rig.settle();
        rig.check();
    }
}

/// As after a restart: what happened so far nobody watched. A file moves on at this moment of the first comparison, and where it is then waits for the standby.
fn moves_on(mut rig: Rig, moment: usize, here: &'static str, there: &'static str) {
    rig.engine.boundary().unwrap();
    rig.engine.sets.clear();
    rig.engine.fresh.clear();
    rig.engine.scan.forget_inodes();
    rig.engine.compare = true;
    rig.stage = false;
    let (root, mut calls) = (rig.root.clone(), 0);
    rig.engine.meanwhile = Some(Box::new(move || {
        if calls == moment {
            fs::rename(root.join(here), root.join(there)).unwrap();
        }
        calls += 1;
    }));
    rig.connect();
    (0..20).for_each(|_| rig.turn());
    rig.stage = true;
    rig.settle();
    rig.engine.meanwhile = None;
    rig.check();
}

#[test]
fn a_message_moved_while_nobody_watched_is_never_nowhere_though_it_moves_on_while_it_is_looked_for() {
    for moment in 0..30 {
        for (here, there) in [("b/1/x", "b/2/x"), ("b/2/x", "b/1/x")] {
            let mut rig = started(&["a", "b/1", "b/2"]);
            fs::write(rig.root.join("a/x"), b"mail").unwrap();
            rig.settle();
            rig.somewhere = vec!["a/x", here, there];
            rig.disconnect();
            fs::rename(rig.root.join("a/x"), rig.root.join(here)).unwrap();
            fs::write(rig.root.join("b/big"), big()).unwrap(); // Where it is now waits.
            moves_on(rig, moment, here, there);
        }
    }
}

/// Two names of one message, each of which goes to a folder of its own, one of them before or while anybody watches.
#[test]
fn a_message_of_two_names_that_both_move_while_nobody_watched_is_never_nowhere() {
    for moment in [0, 1, 2, 4, 8] {
        for early in [true, false] {
            let mut rig = started(&["a", "b", "c", "d"]);
            fs::write(rig.root.join("a/x"), b"mail").unwrap();
            fs::hard_link(rig.root.join("a/x"), rig.root.join("b/x")).unwrap();
            rig.settle();
            rig.somewhere = vec!["a/x", "b/x", "c/x", "d/x"];
            rig.disconnect();
            fs::rename(rig.root.join("b/x"), rig.root.join("c/x")).unwrap();
            // Where they are now waits.
            fs::write(rig.root.join("c/big"), big()).unwrap();
            fs::write(rig.root.join("d/big"), big()).unwrap();
            if early {
                fs::rename(rig.root.join("a/x"), rig.root.join("d/x")).unwrap();
                moves_on(rig, moment, "b", "e");
            } else {
                moves_on(rig, moment, "a/x", "d/x");
            }
        }
    }
}

#[test]
fn a_folder_that_left_the_tree_and_came_back_is_never_empty() {
    for overflow in [false, true] {
        let mut rig = started(&["u/F/cur"]);
        fs::write(rig.root.join("u/F/cur/m"), b"mail").unwrap();
        rig.settle();
        rig.somewhere = vec!["u/F/cur/m"];
        rig.disconnect();
        let outside = rig.dir.path().join("outside");
        fs::rename(rig.root.join("u/F"), rig.root.join("u/T")).unwrap();
        rig.engine.boundary().unwrap();
        if overflow {
            // What follows is not seen.
            fs::rename(rig.root.join("u/T"), rig.root.join("u/F")).unwrap();
            rig.engine.watch.read(&mut vec![]).unwrap();
            let lost = Event { wd: -1, mask: ReadFlags::QUEUE_OVERFLOW, cookie: 0, name: vec![] };
            rig.engine.event(&lost).unwrap();
        } else {
            fs::rename(rig.root.join("u/T"), &outside).unwrap();
            rig.engine.boundary().unwrap();
            fs::rename(&outside, rig.root.join("u/F")).unwrap();
        }
        rig.engine.boundary().unwrap();
        rig.connect();
        rig.settle();
        rig.check();
    }
}

#[test]
fn a_message_whose_folder_is_gone_too_is_never_nowhere_though_it_moves_on_while_it_is_looked_for() {
    for moment in 0..30 {
        for (here, there) in [("b/x", "c/x"), ("c/x", "b/x")] {
            let mut rig = started(&["a/F", "b", "c"]);
            fs::write(rig.root.join("a/F/x"), b"mail").unwrap();
            rig.settle();
            rig.somewhere = vec!["a/F/x", here, there];
            rig.disconnect();
            fs::rename(rig.root.join("a/F/x"), rig.root.join(here)).unwrap();
            fs::remove_dir(rig.root.join("a/F")).unwrap();
            for group in ["b", "c"] {
                fs::write(rig.root.join(group).join("big"), big()).unwrap(); // Where it is now waits.
            }
            moves_on(rig, moment, here, there);
        }
    }
}

#[test]
fn a_large_file_changed_under_one_name_is_changed_under_the_other() {
    let mut rig = started(&["u"]);
    fs::write(rig.root.join("u/a"), big()).unwrap();
    fs::hard_link(rig.root.join("u/a"), rig.root.join("u/b")).unwrap();
    rig.settle();
    rig.check();
    fs::OpenOptions::new().append(true).open(rig.root.join("u/a")).unwrap().write_all(b"more").unwrap();
    rig.settle();
    rig.check();
}

#[test]
fn a_file_changed_under_one_name_is_changed_under_the_other_though_its_folder_was_renamed_meanwhile() {
    let mut rig = started(&["u", "v", "w"]);
    fs::create_dir(rig.root.join("v/d")).unwrap();
    fs::write(rig.root.join("u/log"), b"one").unwrap();
    fs::hard_link(rig.root.join("u/log"), rig.root.join("v/d/link")).unwrap();
    rig.settle();
    rig.stage = false;
    fs::write(rig.root.join("w/big"), big()).unwrap(); // w waits, and what is moved there with it.
    fs::rename(rig.root.join("v/d"), rig.root.join("w/d")).unwrap();
    rig.until("w waits", |r| r.engine.sets.groups().any(|(_, g)| g.staging.contains_key(&p("w/big"))));
    fs::OpenOptions::new().append(true).open(rig.root.join("u/log")).unwrap().write_all(b" and two").unwrap();
    (0..20).for_each(|_| rig.turn());
    rig.stage = true;
    rig.settle();
    rig.check();
}

#[test]
fn two_folders_exchanged_are_both_followed() {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    let mut rig = started(&["u/a", "u/b"]);
    fs::write(rig.root.join("u/a/1"), b"one").unwrap();
    fs::write(rig.root.join("u/b/2"), b"two").unwrap();
    rig.settle();
    renameat_with(CWD, rig.root.join("u/a"), CWD, rig.root.join("u/b"), RenameFlags::EXCHANGE).unwrap();
    rig.settle();
    rig.check();
    fs::write(rig.root.join("u/b/3"), b"three").unwrap();
    rig.settle();
    rig.check();
}

#[test]
fn a_domain_that_is_renamed_takes_the_groups_below_it_along() {
    let mut rig = started(&["d/u"]);
    rig.engine.config.grouping = Grouping::new(vec!["*/*".parse().unwrap()]);
    rig.stage = false;
    fs::write(rig.root.join("d/u/big"), big()).unwrap();
    rig.until("being read", |r| r.engine.sets.groups().any(|(_, g)| !g.staging.is_empty()));
    fs::rename(rig.root.join("d"), rig.root.join("e")).unwrap();
    (0..20).for_each(|_| rig.turn());
    rig.stage = true;
    rig.settle();
    rig.check();
}

#[test]
fn a_collapse_is_remembered_over_a_restart() {
    let mut rig = started(&["u"]);
    rig.engine.config.dirty_max = 10;
    (0..50).for_each(|n| fs::write(rig.root.join(format!("u/{n}")), b"1").unwrap());
    rig.engine.boundary().unwrap();
    assert!(!rig.engine.complete);
    rig.until("part of it is shipped", |r| r.has("u/0") || r.engine.complete);
    let stored = NodeState::open(&rig.dir.path().join("state")).unwrap().mirror("m").unwrap().unwrap();
    assert_eq!(stored.complete, rig.engine.complete);
}

#[test]
fn a_folder_listed_before_the_events_that_brought_it_stays_watched() {
    let mut rig = started(&["u/a", "u/c"]);
    let (a, c) = (rig.root.join("u/a"), rig.root.join("u/c"));
    fs::rename(&a, rig.dir.path().join("outside")).unwrap();
    fs::rename(&c, &a).unwrap();
    rig.engine.scan.push(p("u/a"));
    rig.engine.scan_some().unwrap(); // The disk is ahead of the events.
    rig.engine.take_events().unwrap();
    while rig.engine.scan_some().unwrap() {}
    rig.settle();
    fs::write(a.join("mail"), b"mail").unwrap();
    rig.settle();
    rig.check();
}

#[test]
fn a_name_seen_before_its_inode_changed_under_another_name_is_looked_at_again() {
    let mut rig = started(&["u"]);
    fs::write(rig.root.join("u/a"), b"one").unwrap();
    fs::hard_link(rig.root.join("u/a"), rig.root.join("u/b")).unwrap();
    rig.settle();
    rig.stage = false;
    fs::write(rig.root.join("u/big"), big()).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o640);
    fs::set_permissions(rig.root.join("u/b"), mode).unwrap();
    let seen = |r: &Rig, path: &str| r.engine.sets.groups().any(|(_, g)| g.captured.contains_key(&p(path)) && g.dirty.is_empty());
    rig.until("seen", |r| seen(r, "u/b") && seen(r, "u/a"));
    fs::write(rig.root.join("u/a"), b"two").unwrap();
    rig.engine.boundary().unwrap();
    rig.until("seen again", |r| seen(r, "u/b") && seen(r, "u/a"));
    rig.stage = true;
    rig.settle();
    rig.check();
}

/// The link fails, or the standby dies, after the primary has stored what it pulled and before the standby has heard where to begin.
#[test]
fn a_pull_the_standby_never_heard_the_end_of_is_no_other_history() {
    let mut rig = started(&["u"]);
    fs::write(rig.root.join("u/x"), b"1").unwrap();
    rig.settle();
    rig.disconnect();
    let ask = |rig: &mut Rig, stands: Option<(Position, Digest)>| {
        let (reply, mut answer) = oneshot::channel();
        rig.engine.command(Command::Hello(reply)).unwrap();
        let hello = answer.try_recv().unwrap();
        let (position, digest) = stands.unwrap_or((hello.position, Digest([7; 4])));
        let chain_at_yours = (hello.position == position).then_some(position.chain);
        let replica =
            Replica::Holds { lineage: hello.lineage.clone(), epoch: hello.epoch, position, digest, chain_at_yours, complete: true };
        let incarnation = Incarnation([5; 16]);
        let (protocol, chunker) = (hello.protocol, hello.chunker);
        let welcome = Welcome { protocol, software: String::new(), node: "b".into(), incarnation, chunker, replica, wall_ns: 0 };
        let (reply, mut answer) = oneshot::channel();
        rig.engine.command(Command::Welcome(Box::new(welcome), reply)).unwrap();
        (answer.try_recv().unwrap(), position)
    };
    let (step, stands) = ask(&mut rig, None);
    assert!(matches!(step, Ok(Step::Pull(Some(_)))), "other digest: {step:?}");
    let (reply, mut answer) = oneshot::channel();
    rig.engine.command(Command::RowsEnd(stands, Digest::default(), reply)).unwrap();
    let step = answer.try_recv().unwrap();
    assert!(matches!(step, Ok(Step::Pull(None))), "and nothing that came later: {step:?}");
    let (reply, mut answer) = oneshot::channel();
    rig.engine.command(Command::RowsEnd(stands, Digest::default(), reply)).unwrap();
    let step = answer.try_recv().unwrap();
    assert!(matches!(step, Ok(Step::Begin { reset: true, .. })), "{step:?}");
    let (step, _) = ask(&mut rig, Some((stands, Digest::default())));
    assert!(matches!(step, Ok(Step::Pull(None))), "it is where it was: {step:?}");
}

/// Says hello, and is told of another manifest at the same position: what is asked for are its rows.
fn pulling(rig: &mut Rig) -> Hello {
    let (reply, mut answer) = oneshot::channel();
    rig.engine.command(Command::Hello(reply)).unwrap();
    let hello = answer.try_recv().unwrap();
    let replica = Replica::Holds {
        lineage: hello.lineage.clone(),
        epoch: hello.epoch,
        position: hello.position,
        digest: Digest([7; 4]),
        chain_at_yours: Some(hello.position.chain),
        complete: true,
    };
    let (reply, mut answer) = oneshot::channel();
    rig.engine.command(Command::Welcome(Box::new(testing::welcome(hello.chunker.clone(), replica)), reply)).unwrap();
    assert!(matches!(answer.try_recv().unwrap(), Ok(Step::Pull(_))));
    hello
}

#[test]
fn a_pull_that_was_cut_short_leaves_nothing_behind() {
    let mut rig = started(&["u"]);
    fs::write(rig.root.join("u/x"), b"1").unwrap();
    rig.settle();
    rig.disconnect();
    let first = pulling(&mut rig);
    // One of its rows has come when the link is lost.
    let entry = rig.replica.row(&p("u/x")).unwrap().unwrap().entry;
    rig.engine.command(Command::Rows(vec![(p("u/y"), Some(entry)), (p("u/x"), None)])).unwrap();
    let (reply, mut answer) = oneshot::channel();
    rig.engine.command(Command::Hello(reply)).unwrap();
    let again = answer.try_recv().unwrap();
    assert_eq!((again.digest, again.position), (first.digest, first.position));
    rig.connect();
    rig.settle();
    rig.check();
}

/// The agent is stopped in the middle of a pull: half of the standby's rows are no rows of anybody's.
#[test]
fn a_stop_in_the_middle_of_a_pull_stores_nothing_of_it() {
    let mut rig = started(&["u"]);
    fs::write(rig.root.join("u/x"), b"1").unwrap();
    rig.settle();
    rig.disconnect();
    let first = pulling(&mut rig);
    rig.engine.command(Command::Rows(vec![(p("u/x"), None)])).unwrap();
    rig.engine.store_locals().unwrap(); // As at a stop.
    rig.restart();
    assert_eq!(rig.engine.view.manifest().digest(), first.digest);
}

/// Not later than where the standby is: what is, is this node's own, and read again after a power cut.
#[test]
fn rows_that_were_pulled_are_as_old_as_the_standbys_position() {
    let mut rig = started(&["u"]);
    fs::write(rig.root.join("u/x"), b"1").unwrap();
    rig.settle();
    rig.disconnect();
    let first = pulling(&mut rig);
    let mut row = rig.replica.row(&p("u/x")).unwrap().unwrap();
    row.entry.mode ^= 0o100;
    rig.replica.set(&p("u/x"), Some(row.clone())).unwrap();
    rig.engine.command(Command::Rows(vec![(p("u/x"), Some(row.entry))])).unwrap();
    let (reply, mut answer) = oneshot::channel();
    rig.engine.command(Command::RowsEnd(first.position, rig.replica.digest(), reply)).unwrap();
    let step = answer.try_recv().unwrap();
    assert!(matches!(step, Ok(Step::Begin { reset: false, .. })), "{step:?}");
    let mut later = 0;
    rig.engine.view.manifest().each(Some(first.position.lsn), |_, _, _| later += 1).unwrap();
    assert_eq!(later, 0);
}

#[test]
fn a_first_sync_ends_though_mail_keeps_coming() {
    let mut rig = Rig::new();
    fs::create_dir(rig.root.join("u")).unwrap();
    rig.unacked = 1;
    rig.connect();
    for n in 0..100 {
        if rig.engine.complete {
            return;
        }
        fs::write(rig.root.join(format!("u/{n}")), b"mail").unwrap();
        rig.turn();
    }
    panic!("never protected on a line with a round trip longer than the time between two messages");
}

#[test]
fn names_of_a_new_inode_are_of_one_time() {
    let mut rig = started(&["u"]);
    rig.stage = false;
    fs::write(rig.root.join("u/big"), big()).unwrap();
    fs::write(rig.root.join("u/a"), b"one").unwrap();
    fs::hard_link(rig.root.join("u/a"), rig.root.join("u/b")).unwrap();
    let seen = |r: &Rig, path: &str| r.engine.sets.groups().any(|(_, g)| g.captured.contains_key(&p(path)) && g.dirty.is_empty());
    rig.until("seen", |r| seen(r, "u/b") && seen(r, "u/a"));
    fs::write(rig.root.join("u/a"), b"two").unwrap();
    rig.engine.boundary().unwrap();
    rig.until("seen again", |r| seen(r, "u/b") && seen(r, "u/a"));
    rig.stage = true;
    rig.settle();
    rig.check();
}

#[test]
fn a_message_seen_before_it_was_copied_to_another_folder_shares_its_inode_with_the_copy() {
    // Dovecot's COPY links: no event says so under the first name, which was seen with one name. Within a group, and across two.
    for copy in ["u/0", "v/0"] {
        let mut rig = started(&["u", "v"]);
        rig.stage = false;
        fs::write(rig.root.join("u/big"), big()).unwrap();
        fs::write(rig.root.join("u/a"), b"one").unwrap();
        rig.until("seen", |r| r.engine.sets.groups().any(|(_, g)| g.captured.contains_key(&p("u/a")) && g.dirty.is_empty()));
        fs::hard_link(rig.root.join("u/a"), rig.root.join(copy)).unwrap();
        rig.engine.boundary().unwrap();
        rig.until("seen, or even sent", |r| r.engine.sets.groups().all(|(_, g)| g.dirty.is_empty()));
        rig.stage = true;
        rig.settle();
        rig.check();
    }
}

#[test]
fn a_folder_renamed_during_the_first_sync_keeps_what_is_in_it() {
    let mut rig = Rig::new();
    for n in 0..900 {
        fs::create_dir_all(rig.root.join(format!("u/z/{n}/cur"))).unwrap();
    }
    rig.engine.boundary().unwrap();
    rig.engine.scan.clear(); // As if all that had been there before the agent.
    rig.connect();
    rig.until("the comparison is among the small folders", |r| r.has("u/z"));
    fs::create_dir(rig.root.join("u/d")).unwrap();
    fs::write(rig.root.join("u/d/x"), b"mail").unwrap();
    rig.until("the folder is there", |r| r.has("u/d/x"));
    // More than one round looks at, before the folder's own names.
    for n in 0..600 {
        fs::write(rig.root.join(format!("u/0{n}")), b"").unwrap();
    }
    fs::rename(rig.root.join("u/d"), rig.root.join("u/e")).unwrap();
    rig.turn();
    assert!(!rig.engine.scan.is_done(), "the case is that the first comparison goes on");
    rig.settle();
    rig.check();
}

#[test]
fn what_was_seen_below_a_folder_is_void_when_another_takes_its_place() {
    for from_outside in [false, true] {
        let mut rig = started(&["u/place", "u/gone"]);
        let place = rig.root.join("u/place");
        let other = if from_outside { rig.dir.path().join("other") } else { rig.root.join("u/other") };
        fs::create_dir(&other).unwrap();
        fs::write(other.join("mail"), b"kept").unwrap();
        fs::write(place.join("mail"), b"moved").unwrap();
        rig.settle();
        rig.stage = false;
        fs::write(rig.root.join("u/big"), big()).unwrap(); // The group waits for it: what is seen is not committed.
        fs::rename(&place, rig.root.join("u/gone/first")).unwrap();
        fs::create_dir(&place).unwrap();
        rig.until("the message is seen to be absent", |r| r.engine.sets.seen(b"u", &p("u/place/mail")) == Pending::Seen(None));
        if from_outside {
            fs::write(place.join("new"), b"moved").unwrap();
            rig.until("it is seen", |r| matches!(r.engine.sets.seen(b"u", &p("u/place/new")), Pending::Seen(Some(_))));
            fs::rename(&place, rig.root.join("u/gone/second")).unwrap();
        }
        fs::rename(other, place).unwrap();
        (0..5).for_each(|_| rig.turn());
        rig.stage = true;
        rig.settle();
        rig.check();
    }
}

#[test]
fn a_change_made_by_several_writes_arrives_when_its_writer_closes() {
    let mut rig = started(&["u"]);
    let path = rig.root.join("u/db");
    fs::write(&path, b"generation one").unwrap();
    rig.settle();
    let content = |r: &Rig| r.replica.row(&p("u/db")).unwrap().unwrap().entry.hash().unwrap();
    let one = content(&rig);
    let mut writer = fs::OpenOptions::new().write(true).open(&path).unwrap();
    writer.write_all(b"generation ").unwrap();
    writer.write_all(b"t").unwrap();
    let end = Instant::now() + Duration::from_millis(100);
    while Instant::now() < end {
        rig.turn();
        assert_eq!(content(&rig), one, "half a change was sent");
    }
    writer.write_all(b"wo").unwrap();
    drop(writer);
    rig.settle();
    assert_eq!(content(&rig), ContentHash::of(b"generation two"));

    // A file that nobody was seen to close is changed by single calls: it does not wait.
    rig.engine.closers = Closers::default();
    let mut log = fs::OpenOptions::new().append(true).open(&path).unwrap();
    log.write_all(b", three").unwrap();
    rig.engine.boundary().unwrap();
    let before = Instant::now();
    rig.until("there", |r| content(r) == ContentHash::of(b"generation two, three"));
    assert!(before.elapsed() < Duration::from_millis(200));
}

#[test]
fn a_group_that_never_rests_waits_or_is_sent_as_policy_says() {
    for policy in [None, Some(Duration::from_millis(100))] {
        let mut rig = started(&["u"]);
        rig.engine.config.fuzzy_after = policy;
        rig.stage = false; // One member of the group never arrives on its bulk stream.
        fs::write(rig.root.join("u/big"), big()).unwrap();
        fs::write(rig.root.join("u/a"), b"mail").unwrap();
        let end = Instant::now() + Duration::from_millis(400);
        while Instant::now() < end {
            rig.turn();
        }
        assert_eq!((rig.has("u/a"), rig.engine.summary.fuzzy_cuts > 0), (policy.is_some(), policy.is_some()));
        rig.stage = true;
        rig.settle();
        rig.check();
    }
}

#[test]
fn a_message_linked_to_many_users_does_not_make_one_unit_of_them() {
    let mut rig = started(&["u", "v"]);
    fs::write(rig.root.join("u/m"), b"to all").unwrap();
    fs::hard_link(rig.root.join("u/m"), rig.root.join("v/m")).unwrap();
    rig.settle();
    rig.stage = false;
    fs::write(rig.root.join("v/big"), big()).unwrap(); // v cannot be cut.
    fs::rename(rig.root.join("u/m"), rig.root.join("u/m:2,S")).unwrap();
    fs::hard_link(rig.root.join("u/m:2,S"), rig.root.join("u/copy")).unwrap();
    rig.until("flagged and copied", |r| r.has("u/m:2,S") && r.has("u/copy"));
    // Its content is another matter: on the standby the names change together.
    fs::write(rig.root.join("u/copy"), b"changed").unwrap();
    let content = |r: &Rig| r.replica.row(&p("u/copy")).unwrap().unwrap().entry.hash().unwrap();
    for _ in 0..50 {
        rig.turn();
    }
    assert_eq!(content(&rig), ContentHash::of(b"to all"), "v is not cut, and u/copy is v/m");
    rig.stage = true;
    rig.settle();
    rig.check();
    assert_eq!(content(&rig), ContentHash::of(b"changed"));
}

#[test]
fn an_inode_number_used_again_joins_nothing() {
    let mut rig = started(&["u", "v"]);
    fs::write(rig.root.join("v/old"), b"old").unwrap();
    rig.settle();
    let ino = |path: &str| fs::metadata(rig.root.join(path)).unwrap().ino();
    let old = ino("v/old");
    rig.stage = false;
    fs::write(rig.root.join("v/big"), big()).unwrap(); // v cannot be cut: its row of the old file stays.
    fs::remove_file(rig.root.join("v/old")).unwrap();
    let mut made = vec![];
    let reused = loop {
        let path = format!("u/{}", made.len());
        fs::write(rig.root.join(&path), b"new").unwrap();
        if fs::metadata(rig.root.join(&path)).unwrap().ino() == old {
            break path;
        }
        made.push(path);
        if made.len() > 5000 {
            eprintln!("this file system does not use a number again soon: nothing shown");
            return;
        }
    };
    let link = rig.root.join("u/link");
    fs::hard_link(rig.root.join(&reused), &link).unwrap();
    rig.until("u is cut, whatever v does", |r| r.has("u/link"));
    rig.stage = true;
    rig.settle();
    rig.check();
}

/// A term begins at the first change that the standby may lack, one at each loss of it, and the standby is told.
#[test]
fn what_is_changed_while_the_standby_is_lost_begins_a_term() {
    let mut rig = Rig::new();
    let terms = |rig: &Rig| {
        let stored = rig.engine.node.mirror("m").unwrap().unwrap();
        assert_eq!(stored.lineage, rig.engine.config.known.lineage, "what is minted is stored");
        stored.lineage.terms().len()
    };
    fs::write(rig.root.join("before"), b"1").unwrap();
    rig.turn();
    assert_eq!(terms(&rig), 1, "there was no standby to lose");
    rig.connect();
    rig.until("in sync", |r| r.engine.complete);
    rig.disconnect();
    (0..3).for_each(|_| rig.turn());
    assert_eq!(terms(&rig), 1, "nothing was changed");
    let position = rig.engine.view.manifest().position().unwrap();
    fs::write(rig.root.join("alone"), b"1").unwrap();
    rig.until("a term", |r| terms(r) == 2);
    assert_eq!(rig.engine.config.known.lineage.last().start, position);
    fs::write(rig.root.join("alone"), b"2").unwrap();
    (0..3).for_each(|_| rig.turn());
    assert_eq!(terms(&rig), 2, "nobody has heard of the second one yet");
    rig.connect();
    fs::write(rig.root.join("together"), b"1").unwrap();
    (0..3).for_each(|_| rig.turn());
    assert_eq!(terms(&rig), 2);
    rig.disconnect();
    fs::write(rig.root.join("alone"), b"3").unwrap();
    rig.until("another term", |r| terms(r) == 3);
}

/// A change that comes while a session is being opened is shipped in it: the standby was told of the history as it was before.
#[test]
fn no_term_begins_while_a_session_is_being_opened() {
    let mut rig = Rig::new();
    rig.connect();
    rig.until("in sync", |r| r.engine.complete);
    rig.disconnect();
    let (reply, _answer) = oneshot::channel();
    rig.engine.command(Command::Hello(reply)).unwrap();
    fs::write(rig.root.join("meanwhile"), b"1").unwrap();
    (0..3).for_each(|_| rig.turn());
    assert_eq!(rig.engine.config.known.lineage.terms().len(), 1);
    // It came to nothing.
    rig.engine.command(Command::Down(77)).unwrap();
    rig.turn();
    assert_eq!(rig.engine.config.known.lineage.terms().len(), 2);
}

/// Somebody makes folders in one mailbox all the time: the others do not wait for those to be compared.
#[test]
fn a_group_is_cut_while_another_is_being_compared() {
    let mut rig = Rig::new();
    fs::create_dir(rig.root.join("a")).unwrap();
    fs::create_dir(rig.root.join("b")).unwrap();
    rig.connect();
    rig.until("in sync", |r| r.engine.complete);
    let (busy, mut calls) = (rig.root.join("b"), 0);
    rig.engine.meanwhile = Some(Box::new(move || {
        calls += 1;
        if calls % 3 == 0 {
            fs::create_dir(busy.join(calls.to_string())).unwrap();
        }
    }));
    fs::write(rig.root.join("a/mail"), b"1").unwrap();
    for _ in 0..100 {
        rig.turn();
    }
    rig.engine.meanwhile = None;
    assert!(rig.replica.row(&p("a/mail")).unwrap().is_some(), "never cut");
}
