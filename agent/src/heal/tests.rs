//! Heals of real directories against a model standby: what each rule keeps, and what is lost without it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;

use twinbox_protocol::entry::{Entry, Kind, Time};
use twinbox_protocol::ids::ContentHash;
use twinbox_protocol::path::RelPath;
use twinbox_resync::rows::Local;

use super::*;
use crate::layout::Layout;
use crate::tree;

/// What the standby can give; the rest of the calls fail once `calls` are used up.
struct Model {
    contents: BTreeMap<ContentHash, Vec<u8>>,
    calls: usize,
    /// Sets of names of one file.
    names: Vec<Vec<RelPath>>,
    /// While a path is fetched somebody appends these bytes to that file, or makes it.
    meanwhile: Vec<(RelPath, PathBuf, &'static [u8])>,
}

impl remote::Source for &mut Model {
    fn fetch(&mut self, path: &RelPath, hash: ContentHash, size: u64, into: &mut File) -> Result<Option<Vec<RelPath>>, RemoteError> {
        self.calls = self.calls.checked_sub(1).ok_or(RemoteError::Silent)?;
        self.meanwhile.retain(|(when, at, bytes)| {
            let now = when == path;
            if now {
                File::options().append(true).create(true).open(at).unwrap().write_all(bytes).unwrap();
            }
            !now
        });
        let Some(bytes) = self.contents.get(&hash) else { return Ok(None) };
        assert_eq!(bytes.len() as u64, size);
        into.write_all(bytes)?;
        Ok(Some(self.names.iter().filter(|set| set.contains(path)).flatten().filter(|name| *name != path).cloned().collect()))
    }
}

struct Rig {
    dir: tempfile::TempDir,
    root: PathBuf,
    /// Rows and removals of the standby, after what is durable here.
    wanted: BTreeMap<RelPath, Option<Entry>>,
    /// This node's own rows.
    known: BTreeMap<RelPath, Row>,
    had: Vec<(RelPath, ContentHash)>,
    in_place: Vec<u64>,
    model: Model,
    incomplete: bool,
    booted: Option<Time>,
    /// The heal is killed after so many steps.
    steps: usize,
}

fn p(text: &str) -> RelPath {
    RelPath::new(text.as_bytes()).unwrap()
}

fn now() -> Time {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    Time { secs: now.tv_sec, nanos: now.tv_nsec as u32 }
}

/// No file of a test is this new: what is noted with it was captured after what is on the disk.
fn later() -> Time {
    Time { secs: now().secs + 1000, nanos: 0 }
}

impl Rig {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        for sub in ["new", "cur", "tmp"] {
            fs::create_dir_all(root.join("u").join(sub)).unwrap();
        }
        fs::create_dir(dir.path().join("mirror")).unwrap();
        let model = Model { contents: BTreeMap::new(), calls: usize::MAX, names: vec![], meanwhile: vec![] };
        Rig {
            dir,
            root,
            wanted: BTreeMap::new(),
            known: BTreeMap::new(),
            had: vec![],
            in_place: vec![],
            model,
            incomplete: false,
            booted: None,
            steps: usize::MAX,
        }
    }

    fn entry(kind: Kind) -> Entry {
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        Entry { kind, mode: 0o640, uid, gid, mtime: Time { secs: 1_700_000_000, nanos: 9_000 }, xattrs: vec![] }
    }

    fn file(&mut self, bytes: &[u8]) -> Entry {
        let hash = ContentHash::of(bytes);
        self.model.contents.insert(hash, bytes.to_vec());
        Self::entry(Kind::File { size: bytes.len() as u64, hash })
    }

    /// The standby has this file since.
    fn has(&mut self, path: &str, bytes: &[u8]) -> Entry {
        let entry = self.file(bytes);
        self.wanted.insert(p(path), Some(entry.clone()));
        entry
    }

    fn gone(&mut self, path: &str) {
        self.wanted.insert(p(path), None);
    }

    fn on_disk(&self, path: &str, bytes: &[u8]) -> Local {
        let at = self.root.join(path);
        fs::write(&at, bytes).unwrap();
        let meta = fs::symlink_metadata(at).unwrap();
        Local { ino: meta.ino(), ctime: Time { secs: meta.ctime(), nanos: meta.ctime_nsec() as u32 } }
    }

    /// What is on the disk is of before a boot, and what comes is of after it: the clock of ctimes ticks in between, twice.
    fn boot(&mut self) {
        let probe = tempfile::tempdir_in(self.dir.path()).unwrap();
        let tick = || {
            let at = probe.path().join("probe");
            let ctime = || {
                fs::write(&at, b"").unwrap();
                let meta = fs::metadata(&at).unwrap();
                Time { secs: meta.ctime(), nanos: meta.ctime_nsec() as u32 }
            };
            let first = ctime();
            std::iter::repeat_with(ctime).find(|ctime| *ctime > first).unwrap()
        };
        self.booted = Some(tick());
        tick();
    }

    fn knows(&mut self, path: &str, entry: &Entry, ino: u64, ctime: Time) {
        self.known.insert(p(path), Row { entry: entry.clone(), local: Some(Local { ino, ctime }) });
    }

    fn try_heal(&mut self) -> Result<Done, WorkError> {
        let mirror_dir = self.dir.path().join("mirror");
        let own = mirror_dir.join("manifest.db");
        let mut manifest = Manifest::open(&own, false).unwrap();
        manifest.begin().unwrap();
        for (path, row) in &self.known {
            manifest.set(path, Some(row.clone())).unwrap();
        }
        for (path, hash) in &self.had {
            manifest.note_before(path, *hash, Lsn(1)).unwrap();
        }
        for ino in &self.in_place {
            manifest.note_in_place(*ino).unwrap();
        }
        manifest.commit(Position::START).unwrap();
        let scratch = Scratch::new(&mirror_dir);
        let mut pulled = Manifest::open(&scratch.0, true).unwrap();
        pulled.begin().unwrap();
        for (path, entry) in &self.wanted {
            match entry {
                Some(entry) => pulled.set(path, Some(Row { entry: entry.clone(), local: None })).unwrap(),
                None => pulled.set_gone(path).unwrap(),
            }
        }
        let selection = Selection::new(Layout::Maildir, vec![]);
        let root = Root::open(&self.root).unwrap();
        let (manifest, source, incomplete, booted) = (Some(manifest), &mut self.model, self.incomplete, self.booted);
        let mut touched = Touched::open(&mirror_dir, "this boot").unwrap();
        touched.left = self.steps;
        let plan = Plan { root, manifest, pulled, selection: &selection, mirror_dir: &mirror_dir, source, incomplete, booted, touched };
        run(plan, &mut |_| {})
    }

    fn heal(&mut self) -> Done {
        let done = self.try_heal().unwrap();
        let left: Vec<_> = walk(&self.root).into_iter().filter(|path| path.contains(".twinbox-")).collect();
        assert!(left.is_empty(), "{left:?}");
        done
    }

    #[track_caller]
    fn holds(&self, path: &str, bytes: &[u8]) {
        assert_eq!(
            fs::read(self.root.join(path)).map(|b| String::from_utf8_lossy(&b).into_owned()).ok().as_deref(),
            std::str::from_utf8(bytes).ok(),
            "{path}"
        );
    }

    fn rescued(&self) -> Vec<Vec<u8>> {
        let base = self.dir.path().join("mirror/rescue");
        walk(&base).iter().filter_map(|path| fs::read(base.join(path)).ok()).collect()
    }
}

fn walk(dir: &Path) -> Vec<String> {
    let mut out = vec![];
    for item in fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = item.file_name().to_string_lossy().into_owned();
        if item.metadata().unwrap().is_dir() {
            out.extend(walk(&item.path()).into_iter().map(|below| format!("{name}/{below}")));
        }
        out.push(name);
    }
    out
}

#[test]
fn what_the_disk_lost_comes_back_with_everything_about_it() {
    let mut rig = Rig::new();
    let mail = rig.has("u/new/1.M1", b"mail one");
    rig.has("u/cur/2.M2:2,S", b"");
    let link = Rig::entry(Kind::Symlink { target: serde_bytes::ByteBuf::from("../target") });
    rig.wanted.insert(p("u/link"), Some(Entry { mode: 0o777, ..link }));
    let dir = Rig::entry(Kind::Dir);
    for path in ["u/.Folder", "u/.Folder/cur"] {
        rig.wanted.insert(p(path), Some(Entry { mode: 0o750, ..dir.clone() }));
    }
    rig.has("u/.Folder/cur/3.M3:2,", b"mail three");
    rig.has("u/tmp/never", b"scratch");
    let done = rig.heal();
    assert_eq!((done.restored, done.unrestored, done.doubtful), (6, 0, 0), "{done:?}");
    rig.holds("u/new/1.M1", b"mail one");
    rig.holds("u/cur/2.M2:2,S", b"");
    rig.holds("u/.Folder/cur/3.M3:2,", b"mail three");
    assert!(!rig.root.join("u/tmp/never").exists(), "never mirrored, never put back");
    assert_eq!(fs::read_link(rig.root.join("u/link")).unwrap(), PathBuf::from("../target"));
    let meta = fs::metadata(rig.root.join("u/new/1.M1")).unwrap();
    assert_eq!((meta.mtime(), meta.mtime_nsec() as u32, meta.permissions().mode() & 0o7777), (mail.mtime.secs, mail.mtime.nanos, 0o640));
    assert_eq!(fs::metadata(rig.root.join("u/.Folder")).unwrap().permissions().mode() & 0o7777, 0o750);
    // Once more: its own work is done.
    let again = rig.heal();
    assert_eq!((again.restored, again.replaced, again.removed, again.bytes), (0, 0, 0, 0), "{again:?}");
}

#[test]
fn a_rename_that_was_lost_is_done_again() {
    let mut rig = Rig::new();
    let local = rig.on_disk("u/cur/1.M1:2,", b"a mail");
    let entry = rig.has("u/cur/1.M1:2,S", b"a mail");
    rig.gone("u/cur/1.M1:2,");
    rig.had.push((p("u/cur/1.M1:2,"), entry.hash().unwrap()));
    rig.knows("u/cur/1.M1:2,S", &entry, local.ino, later());
    let done = rig.heal();
    assert_eq!((done.restored, done.removed, done.moved), (1, 1, 0), "{done:?}");
    rig.holds("u/cur/1.M1:2,S", b"a mail");
    assert!(!rig.root.join("u/cur/1.M1:2,").exists());
}

#[test]
fn a_rename_after_the_last_transaction_stays() {
    // Unshipped: new/1 became cur/1:2,S. And cur/2:2,S was renamed to cur/2:2, (shipped) and back (not shipped).
    let mut rig = Rig::new();
    let first = rig.on_disk("u/cur/1.M1:2,S", b"one");
    let second = rig.on_disk("u/cur/2.M2:2,S", b"two");
    let early = Time { secs: 1, nanos: 1 };
    for (path, bytes, local) in [("u/new/1.M1", &b"one"[..], first), ("u/cur/2.M2:2,", b"two", second)] {
        let mut entry = rig.has(path, bytes);
        let stat = fs::metadata(rig.root.join(if local == first { "u/cur/1.M1:2,S" } else { "u/cur/2.M2:2,S" })).unwrap();
        entry.mtime = Time { secs: stat.mtime(), nanos: stat.mtime_nsec() as u32 };
        rig.wanted.insert(p(path), Some(entry.clone()));
        rig.knows(path, &entry, local.ino, early);
    }
    rig.gone("u/cur/2.M2:2,S");
    rig.had.push((p("u/cur/2.M2:2,S"), ContentHash::of(b"two")));
    let done = rig.heal();
    assert_eq!((done.moved, done.restored, done.removed, done.newer), (2, 0, 0, 1), "{done:?}");
    rig.holds("u/cur/1.M1:2,S", b"one");
    rig.holds("u/cur/2.M2:2,S", b"two");
    assert!(!rig.root.join("u/new/1.M1").exists(), "no mail twice");
}

#[test]
fn a_rename_whose_bytes_were_lost_is_no_move() {
    let mut rig = Rig::new();
    let local = rig.on_disk("u/cur/1.M1:2,S", b"\0\0\0");
    let mut entry = rig.has("u/new/1.M1", b"one");
    let stat = fs::metadata(rig.root.join("u/cur/1.M1:2,S")).unwrap();
    entry.mtime = Time { secs: stat.mtime(), nanos: stat.mtime_nsec() as u32 };
    rig.wanted.insert(p("u/new/1.M1"), Some(entry.clone()));
    rig.knows("u/new/1.M1", &entry, local.ino, Time { secs: 1, nanos: 1 });
    let done = rig.heal();
    assert_eq!((done.moved, done.restored), (0, 1), "{done:?}");
    rig.holds("u/new/1.M1", b"one");
}

#[test]
fn bytes_that_never_reached_the_disk_come_back_under_a_newer_ctime() {
    let mut rig = Rig::new();
    // Linked, renamed or made again since it was captured: that is on the disk, its bytes are not.
    for (path, bytes, disk) in [("u/a", &b"a mail"[..], &b""[..]), ("u/b", b"a longer mail", b"a lon"), ("u/c", b"one", b"another")] {
        let local = rig.on_disk(path, disk);
        let entry = rig.has(path, bytes);
        rig.knows(path, &entry, local.ino, Time { secs: 1, nanos: 1 });
    }
    let done = rig.heal();
    assert_eq!((done.replaced, done.newer), (2, 1), "{done:?}");
    rig.holds("u/a", b"a mail");
    rig.holds("u/b", b"a longer mail");
    rig.holds("u/c", b"another");
}

#[test]
fn what_stays_under_one_name_stays_under_the_other() {
    let mut rig = Rig::new();
    let local = rig.on_disk("u/a", b"mail");
    fs::hard_link(rig.root.join("u/a"), rig.root.join("u/b")).unwrap();
    fs::set_permissions(rig.root.join("u/a"), fs::Permissions::from_mode(0o604)).unwrap(); // Not shipped.
    for path in ["u/a", "u/b"] {
        let entry = rig.has(path, b"mail");
        rig.knows(path, &entry, local.ino, Time { secs: 1, nanos: 1 });
    }
    let done = rig.heal();
    assert_eq!((done.newer, done.attributes), (2, 0), "{done:?}");
    assert_eq!(fs::metadata(rig.root.join("u/b")).unwrap().mode() & 0o777, 0o604);
}

#[test]
fn what_stays_is_read_by_the_capture_whatever_its_times_say() {
    let mut rig = Rig::new();
    let local = rig.on_disk("u/a", b"torn");
    let entry = rig.has("u/a", b"mail");
    rig.knows("u/a", &entry, local.ino, local.ctime);
    let other = rig.file(b"mail");
    rig.knows("u/b", &other, local.ino, local.ctime); // Another name of it.
    let done = rig.heal();
    assert_eq!(done.doubtful, 1, "{done:?}");
    let manifest = Manifest::open(&rig.dir.path().join("mirror/manifest.db"), false).unwrap();
    for path in ["u/a", "u/b"] {
        let row = manifest.row(&p(path)).unwrap().unwrap();
        assert_eq!(row.local, Some(Local { ino: local.ino, ctime: Time::default() }), "{path}");
    }
}

#[test]
fn older_is_replaced_newer_stays_doubt_keeps_both() {
    let mut rig = Rig::new();
    let early = Time { secs: 1, nanos: 1 };
    // Known to be of before.
    rig.on_disk("u/a", b"before");
    rig.has("u/a", b"after");
    rig.had.push((p("u/a"), ContentHash::of(b"before")));
    // The row here was not yet the standby's: the acknowledgement was lost.
    let local = rig.on_disk("u/b", b"before");
    rig.has("u/b", b"after");
    let old = rig.file(b"before");
    rig.knows("u/b", &old, local.ino, local.ctime);
    // Changed after it was captured.
    let local = rig.on_disk("u/c", b"newest, not shipped");
    let entry = rig.has("u/c", b"after");
    rig.knows("u/c", &entry, local.ino, early);
    // Bytes that nobody knows under times that say nothing.
    let local = rig.on_disk("u/d", b"torn or new");
    let entry = rig.has("u/d", b"captured");
    rig.knows("u/d", &entry, local.ino, local.ctime);
    // Appended to since, and an append that was lost.
    rig.on_disk("u/e", b"log line, one more");
    rig.has("u/e", b"log line");
    rig.on_disk("u/f", b"log");
    rig.has("u/f", b"log line");
    // New bytes under old times.
    let local = rig.on_disk("u/g", b"BBBB");
    let entry = rig.has("u/g", b"BBBB");
    rig.knows("u/g", &entry, local.ino, later());
    let done = rig.heal();
    for (path, bytes) in [
        ("u/a", &b"after"[..]),
        ("u/b", b"after"),
        ("u/c", b"newest, not shipped"),
        ("u/d", b"torn or new"),
        ("u/e", b"log line, one more"),
        ("u/f", b"log line"),
        ("u/g", b"BBBB"),
    ] {
        rig.holds(path, bytes);
    }
    assert_eq!((done.replaced, done.newer, done.doubtful, done.attributes), (3, 2, 1, 1), "{done:?}");
    let mut rescued = rig.rescued();
    rescued.sort();
    assert_eq!(rescued, [&b"after"[..], b"captured"]);
    assert_eq!(fs::metadata(rig.root.join("u/g")).unwrap().mtime(), entry.mtime.secs);
}

/// The mail server runs meanwhile, or somebody else does.
#[test]
fn what_is_written_during_a_heal_is_not_overwritten() {
    let mut rig = Rig::new();
    rig.on_disk("u/older", b"before");
    rig.has("u/older", b"after");
    rig.had.push((p("u/older"), ContentHash::of(b"before")));
    rig.on_disk("u/part", b"half");
    rig.has("u/part", b"half of it");
    rig.has("u/lost", b"lost");
    for (path, bytes) in [("u/older", &b", m2"[..]), ("u/part", b" of another"), ("u/lost", b"made anew")] {
        rig.model.meanwhile.push((p(path), rig.root.join(path), bytes));
    }
    let done = rig.heal();
    rig.holds("u/older", b"before, m2");
    rig.holds("u/part", b"half of another");
    rig.holds("u/lost", b"made anew");
    let mut rescued = rig.rescued();
    rescued.sort();
    assert_eq!(rescued, [&b"after"[..], b"half of it", b"lost"], "{done:?}");
}

/// A file is put back as it was some time ago, a name is used again: known, and yet the last word.
#[test]
fn what_was_changed_after_the_boot_is_newer_whatever_it_holds() {
    let mut rig = Rig::new();
    rig.on_disk("u/before", b"before");
    rig.has("u/before", b"after");
    rig.on_disk("u/removed", b"removed");
    rig.gone("u/removed");
    rig.on_disk("u/cur/a", b"shared");
    fs::hard_link(rig.root.join("u/cur/a"), rig.root.join("u/cur/b")).unwrap();
    rig.gone("u/cur/a");
    rig.gone("u/cur/b");
    rig.boot();
    rig.on_disk("u/again", b"before");
    rig.has("u/again", b"after");
    rig.on_disk("u/anew", b"removed");
    rig.gone("u/anew");
    fs::create_dir(rig.root.join("u/.Folder")).unwrap();
    rig.gone("u/.Folder");
    for path in ["u/before", "u/again"] {
        rig.had.push((p(path), ContentHash::of(b"before")));
    }
    for path in ["u/removed", "u/anew"] {
        rig.had.push((p(path), ContentHash::of(b"removed")));
    }
    for path in ["u/cur/a", "u/cur/b"] {
        rig.had.push((p(path), ContentHash::of(b"shared")));
    }
    let done = rig.heal();
    assert_eq!((done.replaced, done.removed, done.newer), (1, 3, 3), "{done:?}");
    rig.holds("u/before", b"after");
    rig.holds("u/again", b"before");
    rig.holds("u/anew", b"removed");
    assert!(rig.root.join("u/.Folder").exists() && !rig.root.join("u/removed").exists());
    assert_eq!(rig.rescued(), [b"after"]);
}

/// A clock that is behind after the boot makes new files look old.
#[test]
fn what_is_older_by_its_ctime_alone_is_kept() {
    let mut rig = Rig::new();
    rig.on_disk("u/a", b"nobody knows this");
    let entry = rig.has("u/a", b"captured");
    rig.knows("u/a", &entry, 1, later());
    let done = rig.heal();
    assert_eq!(done.replaced, 1, "{done:?}");
    rig.holds("u/a", b"captured");
    assert_eq!(rig.rescued(), [b"nobody knows this"]);
}

/// What was acknowledged is on no other machine once the disk's version was shipped over it.
#[test]
fn what_gives_way_to_a_newer_file_is_kept() {
    let mut rig = Rig::new();
    // "A" was appended to and shipped; the cut took that, and then something else was appended.
    let local = rig.on_disk("u/a", b"A, m2");
    let entry = rig.has("u/a", b"A, m1");
    rig.knows("u/a", &entry, local.ino, Time { secs: 1, nanos: 1 });
    // Known to be older, but somebody has it open for writing.
    rig.on_disk("u/b", b"before");
    let writer = File::options().append(true).open(rig.root.join("u/b")).unwrap();
    rig.has("u/b", b"after");
    rig.had.push((p("u/b"), ContentHash::of(b"before")));
    // Only appended to: all of it is still here.
    let local = rig.on_disk("u/c", b"line, one more");
    let entry = rig.has("u/c", b"line");
    rig.knows("u/c", &entry, local.ino, Time { secs: 1, nanos: 1 });
    for _ in 0..2 {
        let done = rig.heal();
        assert_eq!((done.newer, done.replaced, done.unrestored), (3, 0, 0), "{done:?}");
        rig.holds("u/a", b"A, m2");
        rig.holds("u/b", b"before");
        rig.holds("u/c", b"line, one more");
        let mut rescued = rig.rescued();
        rescued.sort();
        assert_eq!(rescued, [&b"A, m1"[..], b"after"], "once each");
    }
    drop(writer);
}

#[test]
fn removals_are_repeated_only_for_what_the_mirror_knew() {
    let mut rig = Rig::new();
    for (path, bytes) in [("u/cur/known", &b"expunged"[..]), ("u/cur/strange", b"nobody has this"), ("u/cur/moved", &[b'm'; 600])] {
        rig.on_disk(path, bytes);
        rig.gone(path);
    }
    rig.had.push((p("u/cur/known"), ContentHash::of(b"expunged")));
    rig.has("u/new/moved", &[b'm'; 600]);
    for dir in ["u/.Old", "u/.Used"] {
        fs::create_dir(rig.root.join(dir)).unwrap();
        rig.gone(dir);
    }
    rig.on_disk("u/.Used/new file", b"x");
    let done = rig.heal();
    assert_eq!((done.removed, done.newer, done.restored), (3, 2, 1), "{done:?}");
    assert!(!rig.root.join("u/cur/known").exists() && !rig.root.join("u/cur/moved").exists() && !rig.root.join("u/.Old").exists());
    rig.holds("u/cur/strange", b"nobody has this");
    rig.holds("u/.Used/new file", b"x");
}

#[test]
fn names_of_one_file_are_one_file_again() {
    let mut rig = Rig::new();
    // One name is still here, and two of another file are gone.
    let local = rig.on_disk("u/new/a", b"shared");
    let entry = rig.file(b"shared");
    tree_set(&rig.root.join("u/new/a"), &entry);
    rig.has("u/new/b", b"shared");
    for path in ["u/new/a", "u/new/b"] {
        rig.knows(path, &entry, local.ino, later());
    }
    for path in ["u/new/c", "u/new/d"] {
        let entry = rig.has(path, b"both lost");
        rig.knows(path, &entry, 999_999_999, later());
    }
    // The acknowledgement was lost: only the standby knows that these are one.
    for path in ["u/new/e", "u/.F/f", "u/.F/g"] {
        rig.has(path, b"only the standby knows");
    }
    rig.model.names.push(["u/new/e", "u/.F/f", "u/.F/g"].map(p).to_vec());
    rig.has("u/new/h", b"only the standby knows");
    let done = rig.heal();
    assert_eq!(done.restored, 7, "{done:?}");
    let ino = |path: &str| fs::metadata(rig.root.join(path)).unwrap().ino();
    assert_eq!(ino("u/new/a"), ino("u/new/b"));
    assert_eq!(ino("u/new/c"), ino("u/new/d"));
    rig.holds("u/new/d", b"both lost");
    assert_eq!((ino("u/new/e"), ino("u/new/e")), (ino("u/.F/f"), ino("u/.F/g")));
    assert_ne!(ino("u/new/e"), ino("u/new/h"), "the same content, another file");
}

fn tree_set(path: &Path, entry: &Entry) {
    let file = File::open(path).unwrap();
    crate::standby::attrs::set(std::os::fd::AsFd::as_fd(&file), entry, false, &mut Default::default()).unwrap();
}

#[test]
fn a_heal_that_is_cut_short_is_finished_by_the_next() {
    let mut rig = Rig::new();
    for n in 0..20 {
        rig.has(&format!("u/new/{n}"), format!("mail {n}").as_bytes());
        rig.on_disk(&format!("u/cur/{n}"), b"old");
        rig.gone(&format!("u/cur/{n}"));
        rig.had.push((p(&format!("u/cur/{n}")), ContentHash::of(b"old")));
    }
    for calls in [0, 1, 7, 5] {
        rig.model.calls = calls;
        assert!(matches!(rig.try_heal(), Err(WorkError::Remote(RemoteError::Silent))), "{calls}");
        // A temporary file of the one that was cut.
        fs::write(rig.root.join("u/new/.twinbox-heal"), b"half").unwrap();
    }
    // And one that it had set aside to remove.
    fs::rename(rig.root.join("u/cur/3"), rig.root.join("u/cur/.twinbox-heal")).unwrap();
    rig.model.calls = usize::MAX;
    let done = rig.heal();
    assert_eq!((done.unrestored, done.removed), (0, 19), "{done:?}");
    for n in 0..20 {
        rig.holds(&format!("u/new/{n}"), format!("mail {n}").as_bytes());
        assert!(!rig.root.join(format!("u/cur/{n}")).exists());
    }
}

/// Killed at every step of it, in the same boot: its own work is not what somebody did after the boot.
#[test]
fn a_heal_does_not_take_the_work_of_one_that_was_killed_for_changes() {
    for steps in 0..20 {
        let mut rig = Rig::new();
        rig.on_disk("u/cur/a", b"shared");
        fs::hard_link(rig.root.join("u/cur/a"), rig.root.join("u/cur/b")).unwrap();
        fs::hard_link(rig.root.join("u/cur/a"), rig.root.join("u/cur/stays")).unwrap();
        let shared = rig.has("u/cur/stays", b"shared");
        let ino = fs::metadata(rig.root.join("u/cur/stays")).unwrap().ino();
        rig.knows("u/cur/stays", &shared, ino, later());
        fs::create_dir_all(rig.root.join("u/.Folder/cur")).unwrap();
        rig.on_disk("u/.Folder/cur/c", b"moved");
        rig.on_disk("u/log", b"of before");
        rig.has("u/log", b"of after");
        for (path, bytes) in [("u/cur/a", &b"shared"[..]), ("u/cur/b", b"shared"), ("u/.Folder/cur/c", b"moved"), ("u/log", b"of before")] {
            rig.had.push((p(path), ContentHash::of(bytes)));
        }
        for path in ["u/cur/a", "u/cur/b", "u/.Folder", "u/.Folder/cur", "u/.Folder/cur/c"] {
            rig.gone(path);
        }
        rig.boot();
        rig.steps = steps;
        let killed = rig.try_heal().is_err();
        rig.steps = usize::MAX;
        let done = rig.heal();
        assert_eq!(done.newer, 0, "killed after {steps} steps: {done:?}\n{:?}", walk(&rig.root));
        for path in ["u/cur/a", "u/cur/b", "u/.Folder"] {
            assert!(!rig.root.join(path).exists(), "{path} after {steps} steps");
        }
        rig.holds("u/cur/stays", b"shared");
        rig.holds("u/log", b"of after");
        assert_eq!(rig.rescued(), Vec::<Vec<u8>>::new());
        if !killed {
            assert!(steps > 8, "{steps}");
            return;
        }
    }
    panic!("never whole");
}

/// Killed between two steps: what had been exchanged is only under the temporary name then.
#[test]
fn what_a_heal_that_was_killed_had_set_aside_is_kept_unless_the_mirror_knows_it() {
    let mut rig = Rig::new();
    let theirs = "of the standby ".repeat(100);
    for dir in ["new", "cur"] {
        rig.has(&format!("u/{dir}/1"), theirs.as_bytes());
        rig.on_disk(&format!("u/{dir}/1"), theirs.as_bytes());
    }
    rig.on_disk("u/new/.twinbox-heal", b"nobody else has it");
    rig.on_disk("u/cur/.twinbox-heal", theirs.as_bytes());
    rig.heal();
    assert_eq!(rig.rescued(), [b"nobody else has it"]);
}

#[test]
fn a_content_that_is_on_neither_side_is_counted_and_holds_nobody_up() {
    let mut rig = Rig::new();
    let lost = rig.has("u/new/lost", b"nowhere");
    rig.model.contents.remove(&lost.hash().unwrap());
    rig.has("u/new/other", b"here");
    let done = rig.heal();
    assert_eq!((done.restored, done.unrestored), (1, 1));
    rig.holds("u/new/other", b"here");
}

/// The rename was lost and the standby cannot give the file under its new name: under the old one are the only bytes.
#[test]
fn what_could_not_be_put_back_is_not_removed_either() {
    let mut rig = Rig::new();
    rig.on_disk("u/cur/1.M1:2,", b"a mail");
    let entry = rig.has("u/cur/1.M1:2,S", b"a mail");
    rig.gone("u/cur/1.M1:2,");
    rig.had.push((p("u/cur/1.M1:2,"), entry.hash().unwrap()));
    let bytes = rig.model.contents.remove(&entry.hash().unwrap()).unwrap();
    let done = rig.heal();
    assert_eq!((done.unrestored, done.removed), (1, 0), "{done:?}");
    rig.holds("u/cur/1.M1:2,", b"a mail");
    // It has it again.
    rig.model.contents.insert(entry.hash().unwrap(), bytes);
    let done = rig.heal();
    assert_eq!((done.unrestored, done.restored, done.removed), (0, 1, 1), "{done:?}");
    rig.holds("u/cur/1.M1:2,S", b"a mail");
}

/// A file was removed and a directory made in its place; the cut brought the file back.
#[test]
fn a_known_file_gives_way_to_a_directory() {
    let mut rig = Rig::new();
    rig.on_disk("u/Foo", b"the old mbox");
    rig.had.push((p("u/Foo"), ContentHash::of(b"the old mbox")));
    rig.wanted.insert(p("u/Foo"), Some(Entry { mode: 0o700, ..Rig::entry(Kind::Dir) }));
    rig.has("u/Foo/bar", b"acknowledged");
    let done = rig.heal();
    assert_eq!((done.replaced, done.restored, done.unrestored, done.doubtful), (1, 1, 0, 0), "{done:?}");
    rig.holds("u/Foo/bar", b"acknowledged");
    assert_eq!(rig.rescued(), [b"the old mbox"]);
}

/// What the standby could not apply it cannot say.
#[test]
fn a_content_that_the_standby_does_not_know_replaces_nothing() {
    let mut rig = Rig::new();
    rig.on_disk("u/a", b"the good copy");
    rig.had.push((p("u/a"), ContentHash::of(b"the good copy")));
    rig.wanted.insert(p("u/a"), Some(Rig::entry(Kind::File { size: 3, hash: ContentHash([0; 32]) })));
    let done = rig.heal();
    assert_eq!((done.newer, done.unrestored), (1, 0), "{done:?}");
    rig.holds("u/a", b"the good copy");
}

#[test]
fn what_is_written_in_place_will_be_read_again() {
    let mut rig = Rig::new();
    let local = rig.on_disk("u/db", b"BBBB");
    let entry = rig.file(b"AAAA");
    rig.knows("u/db", &entry, local.ino, local.ctime);
    rig.in_place.push(local.ino);
    assert_eq!(rig.heal().reread, 1);
    rig.holds("u/db", b"BBBB");
    let manifest = Manifest::open(&rig.dir.path().join("mirror/manifest.db"), false).unwrap();
    assert_eq!(manifest.row(&p("u/db")).unwrap().unwrap().local, Some(Local { ino: local.ino, ctime: Time::default() }));
    assert_eq!(tree::local(&Root::open(&rig.root).unwrap().stat(&p("u/db")).unwrap().unwrap()), local, "the file itself is not touched");
}

#[test]
fn a_hostile_link_leads_nowhere() {
    let mut rig = Rig::new();
    let outside = tempfile::tempdir().unwrap();
    fs::remove_dir(rig.root.join("u/new")).unwrap();
    std::os::unix::fs::symlink(outside.path(), rig.root.join("u/new")).unwrap();
    rig.has("u/new/1", b"must not get out");
    let done = rig.try_heal().unwrap();
    assert_eq!((done.restored, done.unrestored), (0, 1), "{done:?}");
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
    assert!(rig.rescued().is_empty(), "tried again before anybody does without it");
    rig.incomplete = true;
    assert_eq!(rig.try_heal().unwrap().unrestored, 1);
    assert_eq!(rig.rescued(), [b"must not get out"]);
}

/// Which mirrors are healed at all.
#[test]
fn need_follows_the_mark() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    fs::create_dir(&root).unwrap();
    let state = NodeState::open(dir.path()).unwrap();
    let spec = MirrorSpec {
        name: "m".into(),
        root,
        layout: "maildir".into(),
        role: Role::Primary,
        selection: Selection::new(Layout::Maildir, vec![]),
        grouping: crate::layout::Grouping::new(vec![]),
        adopt: false,
        sweep: None,
        fuzzy_after: None,
        tool: std::sync::Arc::default(),
    };
    let is_needed = |force| need("a", dir.path(), spec.clone(), force).unwrap().is_some();
    assert!(!is_needed(true), "nothing is known of the mirror");
    let mut history = MirrorState {
        mirror_id: twinbox_protocol::ids::MirrorId([1; 16]),
        role: Role::Primary,
        lineage: twinbox_protocol::lineage::Lineage::begin(twinbox_protocol::ids::Generation([2; 16]), "a"),
        epoch: twinbox_protocol::ids::Epoch(1),
        digest_key: twinbox_protocol::digest::DigestKey([3; 32]),
        reserved: Lsn(100),
        complete: true,
    };
    state.set_mirror("m", &history).unwrap();
    assert!(!is_needed(false), "it never ran");
    let boot = boot_id().unwrap();
    for (mark, needed, why) in [
        (LocalMark { boot: boot.clone(), lsn: Lsn(5), clean: false }, false, "the agent was killed"),
        (LocalMark { boot: "other".into(), lsn: Lsn(5), clean: true }, false, "an orderly stop"),
        (LocalMark { boot: "other".into(), lsn: Lsn(5), clean: false }, true, "a power cut"),
    ] {
        state.set_local_mark("m", &mark).unwrap();
        assert_eq!(is_needed(false), needed, "{why}");
        assert!(is_needed(true), "{why}");
    }
    let torn = LocalMark { boot: "other".into(), lsn: Lsn(5), clean: false };
    state.set_local_mark("m", &torn).unwrap();
    let adopting = |spec: &MirrorSpec| need("a", dir.path(), MirrorSpec { adopt: true, ..spec.clone() }, false).unwrap().is_some();
    assert!(adopting(&spec), "the directory is the same: --adopt is no way around a heal");
    let another = MirrorSpec { root: dir.path().join("another"), ..spec.clone() };
    fs::create_dir(&another.root).unwrap();
    assert!(matches!(need("a", dir.path(), another.clone(), false), Err(HealError::Role(RoleError::OtherRoot { .. }))));
    assert!(!adopting(&another), "another directory, taken over as it is");
    // A node that was promoted and is alone: what it wrote in place has bytes that its times do not tell.
    let mirror_dir = crate::roles::mirror_dir(dir.path(), "m");
    fs::create_dir_all(&mirror_dir).unwrap();
    let (path, noted) = (p("index"), Local { ino: 5, ctime: later() });
    let open = || Manifest::open(&mirror_dir.join("manifest.db"), false).unwrap();
    let local = || open().row(&path).unwrap().unwrap().local.unwrap();
    let mut manifest = open();
    let kind = Kind::File { size: 1, hash: ContentHash::of(b"1") };
    manifest.set(&path, Some(Row { entry: Rig::entry(kind), local: Some(noted) })).unwrap();
    manifest.note_in_place(5).unwrap();
    manifest.commit(Position::START).unwrap();
    drop(manifest);
    let mark = LocalMark { lsn: history.reserved, ..torn.clone() };
    state.set_local_mark("m", &LocalMark { boot: boot.clone(), ..mark.clone() }).unwrap();
    assert!(!is_needed(false));
    assert_eq!(local(), noted, "the same boot");
    state.set_local_mark("m", &mark).unwrap();
    assert!(!is_needed(false), "the standby has nothing that it lacks");
    assert_eq!(local(), Local { ctime: Time::default(), ..noted });
    assert_eq!(state.local_mark("m").unwrap().unwrap().boot, boot);
    state.set_local_mark("m", &torn).unwrap();
    history.reserved = Lsn::ZERO;
    state.set_mirror("m", &history).unwrap();
    assert!(!is_needed(false), "nothing was ever shipped");
    assert_eq!(state.local_mark("m").unwrap().unwrap().boot, boot);
}

/// One path's part in a random history: versions in order of LSNs (`None`: not there), and which of them the disk has after the cut (or one nobody knows).
#[derive(Clone, Debug)]
struct Past {
    versions: Vec<Option<u8>>,
    /// How many of them this node's manifest knows.
    known: usize,
    /// Index into the versions; beyond them: changed after the last of them.
    disk: usize,
}

fn past() -> impl proptest::strategy::Strategy<Value = Past> {
    use proptest::prelude::*;
    (prop::collection::vec(prop::option::weighted(0.8, any::<u8>()), 2..6), any::<usize>(), any::<usize>()).prop_map(
        |(versions, known, disk)| {
            let len = versions.len();
            Past { known: 1 + known % len, disk: disk % (len + 1), versions }
        },
    )
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]

    /// Whatever the disk has of each path: what the standby has is there afterwards or kept in rescue, what nobody else knows stays, and a second heal finds nothing to do.
    #[test]
    fn nothing_is_lost_on_either_side(pasts in proptest::collection::vec(past(), 1..8)) {
        let mut rig = Rig::new();
        let mut expect = vec![];
        for (n, past) in pasts.iter().enumerate() {
            let path = format!("u/cur/{n}.M:2,");
            // Never the beginning of another, and no version of one path is found under another.
            let bytes = |at: usize| match past.versions.get(at) {
                Some(version) => version.map(|id| format!("path {n} version {id:03}").into_bytes()),
                None => Some(format!("path {n} not shipped").into_bytes()),
            };
            let last = past.versions.len() - 1;
            let (want, here) = (bytes(last), bytes(past.disk));
            let newer = past.disk > last;
            match &want {
                Some(want) => drop(rig.has(&path, want)),
                None => rig.gone(&path),
            }
            let local = here.as_ref().map(|here| rig.on_disk(&path, here));
            // What was captured is older than what was changed since, and newer than what was lost.
            let ctime = if newer { Time { secs: 1, nanos: 0 } } else { later() };
            if let Some(row) = bytes(past.known - 1) {
                let entry = rig.file(&row);
                rig.knows(&path, &entry, local.map_or(1, |local| local.ino), ctime);
            }
            let before: Vec<_> = (0..past.known - 1).filter_map(bytes).filter(|had| Some(had) != bytes(past.known - 1).as_ref()).collect();
            rig.had.extend(before.iter().map(|had| (p(&path), ContentHash::of(had))));
            let recognised = here.as_ref().is_some_and(|here| before.contains(here) || bytes(past.known - 1).as_ref() == Some(here));
            expect.push((path, want, here, newer, recognised));
        }
        let first = rig.heal();
        for (path, want, here, newer, recognised) in expect {
            let now = fs::read(rig.root.join(&path)).ok();
            let rescued = want.as_ref().is_some_and(|want| rig.rescued().contains(want));
            if now == want {
                proptest::prop_assert!(!newer, "{path}: what nobody else knows was replaced: {first:?}");
            } else {
                proptest::prop_assert_eq!(&now, &here, "{} is neither", path);
                proptest::prop_assert!(!recognised, "{path}: known to be older, and still there: {first:?}");
                proptest::prop_assert!(want.is_none() || rescued, "{path}: the standby's is nowhere: {first:?}");
            }
        }
        let again = rig.heal();
        proptest::prop_assert_eq!((again.restored, again.replaced, again.removed), (0, 0, 0));
    }
}
