//! Everything wrong that `twinbox mirror` can be given or find on the disk: one clear message, a documented exit code, nothing lost, no
//! panic. Configurations, pairing and other nodes stand in `bad_nodes.rs`.

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use twinbox_tests::gate::{Need, heavy, wait_until};
use twinbox_tests::live::{Live, once, once_by, words};
use twinbox_tests::refusal::{refused, small_store};
use twinbox_tests::require;
use twinbox_tests::rng::Rng;
use twinbox_tests::scratch::Scratch;
use twinbox_tests::tree::{Depth, Layout, Rules, assert_identical, snapshot, wait_identical};
use twinbox_tests::twinbox::{COMMAND_LIMIT, Program};

const NOBODY: u32 = 65_534;

fn path_text(path: &Path) -> &str {
    path.to_str().expect("scratch paths are text")
}

#[test]
fn no_such_root() {
    let scratch = Scratch::new("bad");
    let (gone, replica) = (scratch.join("gone"), scratch.join("replica"));
    let ended = once(&gone, &replica, scratch.path(), Layout::Plain);
    refused(&ended, &scratch, &[path_text(&gone)]);
    assert!(!replica.exists() || fs::read_dir(&replica).unwrap().next().is_none());
}

/// The dangerous one: a source that is gone (not mounted) must not empty the replica.
#[test]
fn root_gone_since_last_time() {
    let scratch = Scratch::new("bad");
    let (root, replica) = (small_store(&scratch), scratch.join("replica"));
    once(&root, &replica, scratch.path(), Layout::Plain).ok("first");
    fs::rename(&root, scratch.join("moved")).unwrap();
    refused(&once(&root, &replica, scratch.path(), Layout::Plain), &scratch, &[path_text(&root)]);
    assert_identical(&scratch.join("moved"), &replica, Rules::of(Layout::Plain));
}

/// And the same where an empty directory stands in its place: another root under the same path.
#[test]
fn another_root_under_the_same_path() {
    let scratch = Scratch::new("bad");
    let (root, replica) = (small_store(&scratch), scratch.join("replica"));
    once(&root, &replica, scratch.path(), Layout::Plain).ok("first");
    fs::rename(&root, scratch.join("moved")).unwrap();
    fs::create_dir(&root).unwrap();
    refused(&once(&root, &replica, scratch.path(), Layout::Plain), &scratch, &[]);
    assert_identical(&scratch.join("moved"), &replica, Rules::of(Layout::Plain));
}

#[test]
fn root_is_a_file() {
    let scratch = Scratch::new("bad");
    let file = scratch.join("file");
    fs::write(&file, b"not a directory").unwrap();
    refused(&once(&file, &scratch.join("replica"), scratch.path(), Layout::Plain), &scratch, &[path_text(&file)]);
}

#[test]
fn unreadable_root() {
    require!(Need::Root, Need::Program("setpriv"));
    let scratch = Scratch::new("bad");
    let root = small_store(&scratch);
    fs::set_permissions(&root, fs::Permissions::from_mode(0o700)).unwrap();
    let home = scratch.dir_of("home", NOBODY);
    let user = Program::as_user(NOBODY, scratch.path());
    let ended = once_by(&user, &root, &home.join("replica"), &home, Layout::Plain);
    refused(&ended, &scratch, &[path_text(&root), "permission"]);
}

#[test]
fn one_inside_the_other() {
    let scratch = Scratch::new("bad");
    let root = small_store(&scratch);
    let before = snapshot(&root, Rules::of(Layout::Plain), Depth::Content).unwrap();
    symlink(&root, scratch.join("alias")).unwrap();
    let cases = [
        (root.clone(), root.join("user1/replica")),
        (root.join("user1"), root.clone()),
        (root.clone(), root.clone()),
        (root.clone(), root.join("user1/..")),
        (scratch.join("alias"), root.clone()),
        (root.clone(), scratch.join("alias/user2/replica")),
        (scratch.join("alias/user1"), root.clone()),
    ];
    for (from, to) in cases {
        let ended = once(&from, &to, scratch.path(), Layout::Plain);
        refused(&ended, &scratch, &[]);
        let after = snapshot(&root, Rules::of(Layout::Plain), Depth::Content).unwrap();
        assert_eq!(before, after, "{} → {} touched the source", from.display(), to.display());
    }
}

#[test]
fn state_inside_a_tree() {
    let scratch = Scratch::new("bad");
    let root = small_store(&scratch);
    let replica = scratch.join("replica");
    let mut words = words(&root, &replica, scratch.path(), Layout::Plain);
    *words.last_mut().unwrap() = root.join("state").into();
    words.push("--once".into());
    refused(&Program::here().run("mirror", scratch.path(), words), &scratch, &["state"]);
}

#[test]
fn unknown_layout() {
    let scratch = Scratch::new("bad");
    let root = small_store(&scratch);
    let replica = scratch.join("replica");
    let args = ["mirror", path_text(&root), path_text(&replica), "--layout", "maildri", "--once"];
    refused(&Program::here().run("mirror", scratch.path(), args), &scratch, &["maildri", "maildir", "mdbox"]);
}

#[test]
fn replica_that_holds_something_else() {
    let scratch = Scratch::new("bad");
    let (root, replica) = (small_store(&scratch), scratch.dir("replica"));
    fs::create_dir_all(replica.join("user1/Maildir/new")).unwrap();
    fs::write(replica.join("precious"), b"the only copy, absent from the source").unwrap();
    fs::write(replica.join("user1/Maildir/new/1.M1.host"), b"the only copy of an older text").unwrap();
    let before = snapshot(&replica, Rules::of(Layout::Plain), Depth::Content).unwrap();
    refused(&once(&root, &replica, scratch.path(), Layout::Plain), &scratch, &["--adopt"]);
    assert_eq!(before, snapshot(&replica, Rules::of(Layout::Plain), Depth::Content).unwrap());

    let mut words = words(&root, &replica, scratch.path(), Layout::Plain);
    words.extend(["--once".into(), "--adopt".into()]);
    Program::here().run("adopt", scratch.path(), words).ok("with --adopt");
    assert_identical(&root, &replica, Rules::of(Layout::Plain));
    for text in [&b"the only copy, absent from the source"[..], b"the only copy of an older text"] {
        assert!(kept(&scratch.join("mirror-state"), text), "{:?} is gone", text.escape_ascii().to_string());
    }
}

/// Whether some file below `dir` holds exactly `content`.
fn kept(dir: &Path, content: &[u8]) -> bool {
    let Ok(items) = fs::read_dir(dir) else { return fs::read(dir).is_ok_and(|c| c == content) };
    items.flatten().any(|item| kept(&item.path(), content))
}

#[test]
fn state_on_a_full_disk() {
    require!(Need::Root, Need::Program("mount"), Need::Program("unshare"));
    let scratch = Scratch::new("bad");
    let (root, replica) = (small_store(&scratch), scratch.join("replica"));
    let state = scratch.dir("mirror-state");
    let before = snapshot(&root, Rules::of(Layout::Plain), Depth::Content).unwrap();
    // A private mount, seen by this one process only; it ends with the process.
    let script = format!(
        "mount -t tmpfs -o size=256k tmpfs '{}' && dd if=/dev/zero of='{}/filler' bs=4k status=none 2>/dev/null; exec \"$@\"",
        state.display(),
        state.display()
    );
    let full = Program::under(["unshare", "-m", "sh", "-c", &script, "sh"]);
    let ended = once_by(&full, &root, &replica, scratch.path(), Layout::Plain);
    refused(&ended, &scratch, &["space"]);
    assert_eq!(before, snapshot(&root, Rules::of(Layout::Plain), Depth::Content).unwrap());
    // With room again, it simply works.
    let ended = once(&root, &replica, scratch.path(), Layout::Plain);
    if !ended.status.success() {
        // A replica begun under a lost state is no longer known: refused, and nothing else.
        refused(&ended, &scratch, &["--adopt"]);
    }
}

/// The state database of a finished mirror, and the mirror.
fn finished(scratch: &Scratch) -> (PathBuf, PathBuf, PathBuf) {
    let (root, replica) = (small_store(scratch), scratch.join("replica"));
    once(&root, &replica, scratch.path(), Layout::Maildir).ok("first");
    let mut todo = vec![scratch.join("mirror-state")];
    let mut found = Vec::new();
    while let Some(dir) = todo.pop() {
        for item in fs::read_dir(dir).unwrap().flatten() {
            match item.file_type().unwrap().is_dir() {
                true => todo.push(item.path()),
                false if item.file_name() == "state.db" => found.push(item.path()),
                false => {}
            }
        }
    }
    found.sort();
    let database = found.pop().expect("a state.db below the state directory");
    (database, root, replica)
}

#[test]
fn damaged_state() {
    let scratch = Scratch::new("bad");
    let (database, root, replica) = finished(&scratch);
    let size = fs::metadata(&database).unwrap().len();
    let file = fs::OpenOptions::new().write(true).open(&database).unwrap();
    file.write_all_at(&Rng::new(1).bytes(size as usize), 0).unwrap();
    drop(file);
    let before = fs::read(&database).unwrap();
    let ended = once(&root, &replica, scratch.path(), Layout::Maildir);
    refused(&ended, &scratch, &["state.db"]);
    assert_eq!(before, fs::read(&database).unwrap(), "what was left of the state was overwritten");
    assert_identical(&root, &replica, Rules::of(Layout::Maildir));
}

#[test]
fn state_of_a_newer_version() {
    let scratch = Scratch::new("bad");
    let (database, root, replica) = finished(&scratch);
    // `PRAGMA user_version`: bytes 60 to 63 of an SQLite file, big-endian (https://www.sqlite.org/fileformat.html).
    let file = fs::OpenOptions::new().write(true).open(&database).unwrap();
    file.write_all_at(&9_999_u32.to_be_bytes(), 60).unwrap();
    drop(file);
    let before = fs::read(&database).unwrap();
    refused(&once(&root, &replica, scratch.path(), Layout::Maildir), &scratch, &["9999"]);
    assert_eq!(before, fs::read(&database).unwrap(), "a newer state was touched");
    assert_identical(&root, &replica, Rules::of(Layout::Maildir));
}

#[test]
fn too_few_watches() {
    require!(Need::Root, Need::Program("unshare"));
    let scratch = Scratch::new("bad");
    let (root, replica) = (small_store(&scratch), scratch.join("replica"));
    // A user namespace has a limit of its own; nothing else on the machine notices.
    let script = "echo 20 > /proc/sys/user/max_inotify_watches && exec \"$@\"";
    let few = Program::under(["unshare", "-Ur", "sh", "-c", script, "sh"]);
    let process = few.spawn("mirror", scratch.path(), words(&root, &replica, scratch.path(), Layout::Maildir));
    let ended = process.end(COMMAND_LIMIT);
    refused(&ended, &scratch, &["fs.inotify.max_user_watches"]);
    // 20 users of 3 directories each, and the root: the number needed is at least that.
    let needed = ended.stderr.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse::<u64>().ok());
    assert!(needed.clone().any(|n| n >= 61), "no number that would do: {ended}");
}

#[test]
fn permission_denied_on_one_file() {
    require!(Need::Root, Need::Program("setpriv"));
    let _turn = heavy();
    let scratch = Scratch::new("bad");
    let root = small_store(&scratch);
    let chowned = Command::new("chown").args(["-R", "65534:65534"]).arg(&root).status();
    assert!(chowned.unwrap().success());
    let secret = root.join("user3/Maildir/new/1.M1.host");
    chown(&secret, Some(0), Some(0)).unwrap();
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();

    let home = scratch.dir_of("home", NOBODY);
    let replica = home.join("replica");
    let user = Program::as_user(NOBODY, scratch.path());
    let mut mirror = user.spawn("mirror", &home, words(&root, &replica, &home, Layout::Maildir));
    let others = |n: usize| replica.join(format!("user{n}/Maildir/new/1.M1.host"));
    wait_until(Duration::from_secs(60), "the readable files", || (0..20).filter(|n| *n != 3).all(|n| others(n).exists()));
    mirror.assert_running();
    mirror.wait_output(Duration::from_secs(30), "a report of the unreadable file", |text| text.contains("user3").then_some(()));
    // It keeps trying: readable again, the file arrives.
    chown(&secret, Some(NOBODY), Some(NOBODY)).unwrap();
    let rules = Rules::of(Layout::Maildir);
    wait_identical(&root, &replica, rules, Duration::from_secs(90)).unwrap_or_else(|why| panic!("{why}"));
    mirror.interrupt();
    let ended = mirror.end(COMMAND_LIMIT).ok("after Ctrl-C");
    assert!(!ended.panicked(), "{ended}");
}

/// Files that vanish between the listing and the reading are no error.
#[test]
fn files_that_vanish_while_read() {
    let _turn = heavy();
    let scratch = Scratch::new("bad");
    let root = small_store(&scratch);
    let mut mirror = Live::start(&root, &scratch.join("replica"), scratch.path(), Layout::Maildir);
    let new = root.join("user1/Maildir/new");
    for n in 0..3_000 {
        let path = new.join(format!("{n}.M1.vanishing"));
        fs::write(&path, vec![b'x'; 20_000]).unwrap();
        fs::remove_file(path).unwrap();
    }
    mirror.settle("after files came and went", Duration::from_secs(60));
    mirror.stop();
}
