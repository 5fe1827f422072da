//! Runs over a tree and rows that a test makes; the owner of the rows is made of both, and of what the test wants to have happened between two looks.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use twinbox_protocol::entry::Kind;
use twinbox_protocol::msg::Position;
use twinbox_protocol::path::RelPath;
use twinbox_resync::manifest::{Manifest, Reader};
use twinbox_resync::rows::{Row, Rows};

use super::judge::{Able, Looked};
use super::scrub::{Scrub, Seen, look};
use super::sides::Side;
use super::{Outcome, Record, Stop, VerifyError, What};
use crate::config::Role;
use crate::layout::{Layout, Selection};
use crate::standby::copy;
use crate::tree::Root;

fn p(text: &str) -> RelPath {
    if text.is_empty() { RelPath::root() } else { RelPath::new(text.as_bytes()).unwrap() }
}

/// Owns the rows; may do something before each look.
struct Owner {
    root: Root,
    rows: Manifest,
    busy: BTreeSet<RelPath>,
    before: Box<dyn FnMut(usize) + Send>,
    looks: usize,
    repaired: Vec<(RelPath, What)>,
    left: Arc<Mutex<Vec<RelPath>>>,
}

impl Side for Owner {
    fn look(&mut self, paths: Vec<RelPath>) -> Result<Vec<Looked>, VerifyError> {
        self.looks += 1;
        (self.before)(self.looks);
        let one =
            |path: &RelPath| Looked { row: self.rows.row(path).unwrap(), found: look(&self.root, path), busy: self.busy.contains(path) };
        Ok(paths.iter().map(one).collect())
    }

    fn repair(&mut self, path: &RelPath, seen: &Seen) -> Result<Option<Outcome>, VerifyError> {
        self.repaired.push((path.clone(), seen.what));
        Ok(Some(Outcome::Repaired { kept: None }))
    }

    fn left_behind(&mut self, path: &RelPath) {
        self.left.lock().unwrap().push(path.clone());
    }

    fn able(&self) -> Able {
        Able { ordinary: !rustix::process::geteuid().is_root(), ..Able::default() }
    }

    fn lsn(&self) -> u64 {
        7
    }
}

struct World {
    dir: tempfile::TempDir,
}

impl World {
    /// Some directories with files, and rows that say the same.
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        for sub in ["a/cur", "a/new", "b/cur", "b/empty", "c"] {
            fs::create_dir_all(root.join(sub)).unwrap();
        }
        for (at, name) in ["a/cur/1", "a/cur/2", "a/new/3", "b/cur/4", "b/cur/5", "c/6", "7"].iter().enumerate() {
            fs::write(root.join(name), vec![at as u8 + 1; 10_000 * at + 5]).unwrap();
        }
        std::os::unix::fs::symlink("a", root.join("link")).unwrap();
        fs::create_dir(dir.path().join("state")).unwrap();
        let world = World { dir };
        world.learn();
        world
    }

    fn root(&self) -> std::path::PathBuf {
        self.dir.path().join("root")
    }

    fn state(&self) -> std::path::PathBuf {
        self.dir.path().join("state")
    }

    fn manifest(&self) -> Manifest {
        Manifest::open(&self.state().join("manifest.db"), true).unwrap()
    }

    /// Rows of all there is.
    fn learn(&self) {
        let (root, mut rows) = (Root::open(&self.root()).unwrap(), self.manifest());
        rows.begin().unwrap();
        let mut stack = vec![RelPath::root()];
        while let Some(path) = stack.pop() {
            let found = look(&root, &path).unwrap().unwrap();
            let mut entry = found.entry;
            if let (Kind::File { hash, .. }, Some(file)) = (&mut entry.kind, &found.file) {
                *hash = copy::hash(file).unwrap();
            }
            if entry.is_dir() {
                let names = fs::read_dir(self.root().join(path.to_string())).unwrap();
                stack.extend(names.map(|name| path.join(name.unwrap().file_name().as_encoded_bytes()).unwrap()));
            }
            rows.set(&path, Some(Row { entry, local: Some(found.local) })).unwrap();
        }
        rows.commit(Position::START).unwrap();
    }

    fn record(&self, repair: bool) -> Record {
        Record::begin("mail", "n", Role::Standby, repair, false, None)
    }

    fn scrub(&self, record: Record, stop: Stop, before: impl FnMut(usize) + Send + 'static) -> Scrub<Owner> {
        let owner = Owner {
            root: Root::open(&self.root()).unwrap(),
            rows: self.manifest(),
            busy: BTreeSet::new(),
            before: Box::new(before),
            looks: 0,
            repaired: vec![],
            left: Arc::default(),
        };
        Scrub {
            root: Root::open(&self.root()).unwrap(),
            rows: Reader::open(&self.state().join("manifest.db")).unwrap(),
            selection: Selection::new(Layout::Plain, vec![]),
            mirror_dir: self.state(),
            side: owner,
            stop,
            rate: None,
            again: Duration::ZERO,
            shown: Arc::new(Mutex::new(record.clone())),
            record,
        }
    }
}

fn told(record: &Record) -> BTreeMap<String, What> {
    let all: BTreeMap<_, _> = record.findings.iter().map(|one| (one.path.clone(), one.what)).collect();
    assert_eq!(all.len(), record.findings.len(), "each is told once: {:?}", record.findings);
    assert_eq!(record.differences, all.len() as u64);
    all
}

fn list(all: &[(&str, What)]) -> BTreeMap<String, What> {
    all.iter().map(|(path, what)| (p(path).to_string(), *what)).collect()
}

/// Changes a byte; size and modification time stay.
fn rot(path: &Path) {
    let before = fs::metadata(path).unwrap().modified().unwrap();
    let mut bytes = fs::read(path).unwrap();
    bytes[3] ^= 1;
    fs::write(path, bytes).unwrap();
    fs::File::open(path).unwrap().set_modified(before).unwrap();
}

fn damage(root: &Path) -> BTreeMap<String, What> {
    rot(&root.join("a/cur/2"));
    fs::set_permissions(root.join("b/cur/4"), fs::Permissions::from_mode(0o611)).unwrap();
    fs::remove_file(root.join("a/new/3")).unwrap();
    fs::write(root.join("b/empty/x"), "x").unwrap();
    fs::remove_file(root.join("c/6")).unwrap();
    fs::create_dir(root.join("c/6")).unwrap();
    fs::remove_file(root.join("link")).unwrap();
    std::os::unix::fs::symlink("b", root.join("link")).unwrap();
    // A time that nothing in it explains; those of the others are.
    fs::File::open(root.join("b")).unwrap().set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    list(&[
        ("a/cur/2", What::Content),
        ("b/cur/4", What::Attributes),
        ("a/new/3", What::Missing),
        ("b/empty/x", What::Extra),
        ("c/6", What::Type),
        ("link", What::Content),
        ("b", What::Attributes),
    ])
}

#[test]
fn a_tree_that_is_as_its_rows_say_is_read_in_full() {
    let world = World::new();
    let record = world.scrub(world.record(false), Stop::default(), |_| {}).run().unwrap();
    assert_eq!((told(&record), record.paths, record.total), (BTreeMap::new(), 16, 16));
    assert_eq!((record.bytes, record.lsn, record.busy), (210_035, 7, 0));
    assert!(record.ended.is_some() && record.cursor.is_none());
    assert_eq!(Record::load(&world.state()).unwrap(), record);
}

#[test]
fn every_kind_of_difference_is_told_once_and_repaired_if_so_wanted() {
    let world = World::new();
    let want = damage(&world.root());
    let record = world.scrub(world.record(false), Stop::default(), |_| {}).run().unwrap();
    assert_eq!((told(&record), record.left()), (want.clone(), 7));
    assert!(record.findings.iter().all(|one| one.outcome == Outcome::Found));
    let record = world.scrub(world.record(true), Stop::default(), |_| {}).run().unwrap();
    assert_eq!((told(&record), record.repaired, record.left()), (want, 7, 0));
}

#[test]
fn what_is_another_at_the_next_look_is_no_difference() {
    for mended_at in 2..=3 {
        let world = World::new();
        let (file, want) = (world.root().join("a/cur/2"), fs::read(world.root().join("a/cur/2")).unwrap());
        let time = fs::metadata(&file).unwrap().modified().unwrap();
        rot(&file);
        let again = file.clone();
        let scrub = world.scrub(world.record(true), Stop::default(), move |looks| {
            if looks == mended_at - 1 {
                // Still other bytes, but not the same: somebody writes to it.
                let mut bytes = fs::read(&again).unwrap();
                bytes[looks] ^= 1;
                fs::write(&again, bytes).unwrap();
            }
            if looks == mended_at {
                fs::write(&again, &want).unwrap();
                fs::File::open(&again).unwrap().set_modified(time).unwrap();
            }
        });
        let record = scrub.run().unwrap();
        assert_eq!((told(&record), record.ended.is_some()), (BTreeMap::new(), true), "mended before look {mended_at}");
    }
}

#[test]
fn what_is_always_changing_is_counted_and_not_judged() {
    let world = World::new();
    damage(&world.root());
    let mut scrub = world.scrub(world.record(true), Stop::default(), |_| {});
    scrub.side.busy = ["a/cur/2", "b/cur/4", "a/new/3", "b/empty/x", "c/6", "", "a/new", "b/empty", "c", "b"].map(p).into();
    let record = scrub.run().unwrap();
    assert_eq!((told(&record), record.busy), (list(&[("link", What::Content)]), 10));
}

#[test]
fn a_run_that_is_stopped_anywhere_goes_on_and_tells_each_once() {
    let world = World::new();
    let want = damage(&world.root());
    let (mut runs, mut record) = (0, world.record(false));
    loop {
        let stop = Stop::default();
        let stopper = stop.clone();
        // Stopped at one look or the next: each run gets a little further.
        let scrub = world.scrub(record, stop, move |looks| {
            if looks > runs {
                stopper.stop()
            }
        });
        record = scrub.run().unwrap();
        runs += 1;
        assert!(runs < 60, "it gets nowhere: {record:?}");
        let stored = Record::load(&world.state()).unwrap();
        match record.ended {
            Some(_) => break,
            None => {
                assert!(stored.goes_on_as(&world.record(false)));
                record = stored;
            }
        }
    }
    assert_eq!((told(&record), record.paths), (want, record.total), "in {runs} runs");
    assert!(runs > 2);
}

#[test]
fn another_job_begins_anew_and_a_damaged_record_too() {
    let world = World::new();
    let record = Record { cursor: Some((String::new(), "61".into())), ..world.record(true) };
    record.store(&world.state()).unwrap();
    let stored = || Record::load(&world.state()).unwrap();
    assert!(stored().goes_on_as(&world.record(true)));
    assert!(!stored().goes_on_as(&world.record(false)));
    assert!(!stored().goes_on_as(&Record { role: Role::Primary, ..world.record(true) }));
    assert!(!stored().goes_on_as(&Record { node: "other".into(), ..world.record(true) }));
    assert!(!Record { ended: Some("then".into()), ..stored() }.goes_on_as(&world.record(true)));
    let through = Record { ended_s: Some(7), ..stored() };
    let next = Record::begin("mail", "n", Role::Standby, true, true, Some(&through));
    assert_eq!((next.last_ended(), Record::begin("mail", "n", Role::Standby, true, true, Some(&next)).last_ended()), (Some(7), Some(7)));
    fs::write(Record::file(&world.state()), b"{\"mirror\":").unwrap();
    assert_eq!(Record::load(&world.state()), None);
}

#[test]
fn a_directory_s_own_difference_is_told_though_it_is_stopped_in_it() {
    let world = World::new();
    fs::set_permissions(world.root().join("b/cur"), fs::Permissions::from_mode(0o700)).unwrap();
    let stop = Stop::default();
    // Stopped at the first thing that is read below it: by then the directory itself has been found in its parent.
    let mut scrub = world.scrub(world.record(false), stop.clone(), |_| {});
    scrub.rate = Some(1);
    let (stopper, shown) = (stop.clone(), scrub.shown.clone());
    let watcher = std::thread::spawn(move || {
        while shown.lock().unwrap().bytes == 0 {
            std::thread::yield_now();
        }
        stopper.stop();
    });
    let record = scrub.run().unwrap();
    watcher.join().unwrap();
    assert!(record.ended.is_none());
    let record = world.scrub(Record::load(&world.state()).unwrap(), Stop::default(), |_| {}).run().unwrap();
    assert_eq!((told(&record), record.paths), (list(&[("b/cur", What::Attributes)]), record.total));
}

#[test]
fn what_a_killed_run_left_is_cleared_first() {
    let world = World::new();
    fs::write(world.root().join(".twinbox-verify-1-1"), "kept").unwrap();
    let left = Arc::new(Mutex::new(vec![]));
    let mut scrub = world.scrub(world.record(false), Stop::default(), |_| {});
    scrub.side.left = left.clone();
    assert!(scrub.run().unwrap().ended.is_some());
    assert_eq!(*left.lock().unwrap(), [p(".twinbox-verify-1-1")]);
}

#[test]
fn a_root_that_went_is_no_difference() {
    let world = World::new();
    let scrub = world.scrub(world.record(true), Stop::default(), |_| {});
    fs::rename(world.root(), world.dir.path().join("elsewhere")).unwrap();
    fs::create_dir(world.root()).unwrap();
    assert!(matches!(scrub.run(), Err(VerifyError::RootGone(_))));
}
