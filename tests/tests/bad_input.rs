//! Everything wrong that can be given on the command line or lie on the disk: one clear message, a documented exit code, nothing lost,
//! no panic.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::net::UdpSocket;
use std::os::unix::fs::{FileExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use twinbox_tests::gate::{Need, heavy, wait_until};
use twinbox_tests::live::{Live, once, once_by, words};
use twinbox_tests::node::{Node, Pair, Spec, code_in, free_udp, pair};
use twinbox_tests::require;
use twinbox_tests::rng::Rng;
use twinbox_tests::scratch::Scratch;
use twinbox_tests::tree::{Depth, Layout, Rules, assert_identical, snapshot, wait_identical};
use twinbox_tests::twinbox::{COMMAND_LIMIT, Ended, Program, by_signal};

const NOBODY: u32 = 65_534;

/// Every exit code the product's help lists: lines of a number and a meaning below "Exit codes".
fn documented(scratch: &Scratch) -> Vec<i32> {
    let help = Program::here().run("help", scratch.path(), ["--help"]).ok("--help").stdout;
    let table = help.split("Exit codes").nth(1).unwrap_or_else(|| panic!("no exit codes in --help:\n{help}"));
    table.lines().filter_map(|line| line.split_whitespace().next()?.parse().ok()).collect()
}

/// One clear message that names each of `mentions`, a documented exit code that is not 0, no panic.
#[track_caller]
fn refused(ended: &Ended, scratch: &Scratch, mentions: &[&str]) {
    assert!(!ended.panicked(), "{ended}");
    assert!(!by_signal(ended.status), "ended by a signal: {ended}");
    let code = ended.status.code().expect("an exit code");
    assert_ne!(code, 0, "not refused: {ended}");
    assert!(documented(scratch).contains(&code), "exit code {code} is not documented: {ended}");
    assert!(!ended.stderr.trim().is_empty(), "no message: {ended}");
    for word in mentions {
        assert!(ended.stderr.to_lowercase().contains(&word.to_lowercase()), "the message does not say {word:?}: {ended}");
    }
}

/// A source with a little mail, and a snapshot-able path.
fn source(scratch: &Scratch) -> PathBuf {
    let root = scratch.dir("source");
    for n in 0..20 {
        let dir = root.join(format!("user{n}/Maildir/new"));
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("1.M1.host"), Rng::new(n).bytes(500)).unwrap();
    }
    root
}

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
    let (root, replica) = (source(&scratch), scratch.join("replica"));
    once(&root, &replica, scratch.path(), Layout::Plain).ok("first");
    fs::rename(&root, scratch.join("moved")).unwrap();
    refused(&once(&root, &replica, scratch.path(), Layout::Plain), &scratch, &[path_text(&root)]);
    assert_identical(&scratch.join("moved"), &replica, Rules::of(Layout::Plain));
}

/// And the same where an empty directory stands in its place: another root under the same path.
#[test]
fn another_root_under_the_same_path() {
    let scratch = Scratch::new("bad");
    let (root, replica) = (source(&scratch), scratch.join("replica"));
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
    let root = source(&scratch);
    fs::set_permissions(&root, fs::Permissions::from_mode(0o700)).unwrap();
    let home = scratch.dir_of("home", NOBODY);
    let user = Program::as_user(NOBODY, scratch.path());
    let ended = once_by(&user, &root, &home.join("replica"), &home, Layout::Plain);
    refused(&ended, &scratch, &[path_text(&root), "permission"]);
}

#[test]
fn one_inside_the_other() {
    let scratch = Scratch::new("bad");
    let root = source(&scratch);
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
    let root = source(&scratch);
    let replica = scratch.join("replica");
    let mut words = words(&root, &replica, scratch.path(), Layout::Plain);
    *words.last_mut().unwrap() = root.join("state").into();
    words.push("--once".into());
    refused(&Program::here().run("mirror", scratch.path(), words), &scratch, &["state"]);
}

#[test]
fn unknown_layout() {
    let scratch = Scratch::new("bad");
    let root = source(&scratch);
    let replica = scratch.join("replica");
    let args = ["mirror", path_text(&root), path_text(&replica), "--layout", "maildri", "--once"];
    refused(&Program::here().run("mirror", scratch.path(), args), &scratch, &["maildri", "maildir", "mdbox"]);
}

#[test]
fn replica_that_holds_something_else() {
    let scratch = Scratch::new("bad");
    let (root, replica) = (source(&scratch), scratch.dir("replica"));
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
    let (root, replica) = (source(&scratch), scratch.join("replica"));
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

fn lone_node(scratch: &Scratch, program: Program) -> (Node, PathBuf) {
    let root = source(scratch);
    let spec = Spec { node: "alpha", role: "primary", mirror: "mail", root: &root, layout: Layout::Maildir, listen: free_udp() };
    (Node::init(program, &scratch.join("alpha"), &spec), root)
}

#[test]
fn port_taken() {
    let scratch = Scratch::new("bad");
    let root = source(&scratch);
    let taken = UdpSocket::bind("127.0.0.1:0").unwrap();
    let listen = taken.local_addr().unwrap();
    let spec = Spec { node: "alpha", role: "primary", mirror: "mail", root: &root, layout: Layout::Maildir, listen };
    let mut node = Node::init(Program::here(), &scratch.join("alpha"), &spec);
    node.start();
    let ended = node.agent.take().unwrap().end(COMMAND_LIMIT);
    refused(&ended, &scratch, &[&listen.port().to_string()]);
}

#[test]
fn config_with_an_unknown_key() {
    let scratch = Scratch::new("bad");
    let (mut node, _) = lone_node(&scratch, Program::here());
    let text = fs::read_to_string(&node.config).unwrap();
    assert!(text.contains("listen = "), "{text}");
    fs::write(&node.config, text.replace("listen = ", "lissten = ")).unwrap();
    node.start();
    let ended = node.agent.take().unwrap().end(COMMAND_LIMIT);
    refused(&ended, &scratch, &["lissten", "`listen`"]);
    assert!(!ended.stderr.contains("RUST_BACKTRACE"), "{ended}");
}

#[test]
fn config_missing_or_no_toml() {
    let scratch = Scratch::new("bad");
    let config = scratch.join("none.toml");
    let args: [&OsStr; 3] = ["run".as_ref(), "--config".as_ref(), config.as_os_str()];
    refused(&Program::here().run("run", scratch.path(), args), &scratch, &["none.toml"]);
    for junk in [&b"[[[\n"[..], b"\xff\xfe\x00", b"", b"node = 7\n"] {
        fs::write(&config, junk).unwrap();
        refused(&Program::here().run("run", scratch.path(), args), &scratch, &["none.toml"]);
    }
}

#[test]
fn init_never_overwrites() {
    let scratch = Scratch::new("bad");
    let (node, root) = lone_node(&scratch, Program::here());
    let before = fs::read(&node.config).unwrap();
    let mode = fs::metadata(node.state.join("node.key")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "the key's mode");
    let spec = Spec { node: "omega", role: "primary", mirror: "mail", root: &root, layout: Layout::Maildir, listen: free_udp() };
    let (_, ended) = Node::try_init(Program::here(), &scratch.join("alpha"), &spec);
    refused(&ended, &scratch, &[]);
    assert_eq!(before, fs::read(&node.config).unwrap());
}

/// The state database of a finished mirror, and the mirror.
fn finished(scratch: &Scratch) -> (PathBuf, PathBuf, PathBuf) {
    let (root, replica) = (source(scratch), scratch.join("replica"));
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
    let (root, replica) = (source(&scratch), scratch.join("replica"));
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
    let root = source(&scratch);
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
    let root = source(&scratch);
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

fn two_nodes(scratch: &Scratch) -> [Node; 2] {
    let (root, replica) = (source(scratch), scratch.dir("replica"));
    let first = Spec { node: "alpha", role: "primary", mirror: "mail", root: &root, layout: Layout::Maildir, listen: free_udp() };
    let second = Spec { node: "beta", role: "standby", root: &replica, listen: free_udp(), ..first.clone() };
    [Node::init(Program::here(), &scratch.join("alpha"), &first), Node::init(Program::here(), &scratch.join("beta"), &second)]
}

#[test]
fn wrong_and_used_pairing_codes() {
    let scratch = Scratch::new("bad");
    let [alpha, beta] = two_nodes(&scratch);
    for wrong in ["twinbox-pair:", "twinbox-pair:AAAA", "nonsense", "twinbox-pair:\u{fc}"] {
        refused(&beta.command(&["pair", wrong]), &scratch, &[]);
    }
    let args: [OsString; 3] = ["pair".into(), "--config".into(), alpha.config.clone().into()];
    let mut waiting = alpha.program.spawn("pair", &alpha.logs, args);
    let code = waiting.wait_output(COMMAND_LIMIT, "a pairing code", code_in);
    // One character of the secret changed: refused, and the true code still works.
    let last = code.chars().last().unwrap();
    let other = if last == 'A' { 'B' } else { 'A' };
    let tampered = format!("{}{other}", &code[..code.len() - last.len_utf8()]);
    refused(&beta.command(&["pair", &tampered]), &scratch, &[]);
    waiting.assert_running();
    beta.command(&["pair", &code]).ok("the true code");
    waiting.end(COMMAND_LIMIT).ok("the waiting side");
    refused(&beta.command(&["pair", &code]), &scratch, &[]);
}

#[test]
fn a_peer_with_an_unknown_key_gets_nothing() {
    let _turn = heavy();
    let scratch = Scratch::new("bad");
    let [mut alpha, mut beta] = two_nodes(&scratch);
    pair(&alpha, &beta);
    // Beta loses its key and makes another: the same name and address, a stranger all the same.
    let [saved, spare] = [scratch.join("saved"), scratch.join("spare")];
    fs::copy(&beta.config, &saved).unwrap();
    let other =
        Spec { node: "beta", role: "standby", mirror: "mail", root: &scratch.join("replica"), layout: Layout::Maildir, listen: free_udp() };
    let stranger = Node::init(Program::here(), &spare, &other);
    fs::copy(stranger.state.join("node.key"), beta.state.join("node.key")).unwrap();
    alpha.start();
    beta.start();
    // What refuses says so; looked for rather than waited out.
    wait_until(Duration::from_secs(30), "a refusal to be reported", || {
        [&mut alpha, &mut beta].into_iter().any(|node| {
            let process = node.agent();
            let said = process.stdout() + &process.stderr();
            process.try_wait().is_some() || ["key", "fingerprint", "certificate"].iter().any(|w| said.contains(w))
        })
    });
    let status = alpha.status().expect("the primary goes on");
    assert!(status.said.mirrors.iter().all(|m| m.state != "protected" && m.peers.iter().all(|p| !p.connected)), "{status:?}");
    assert!(fs::read_dir(scratch.join("replica")).unwrap().next().is_none(), "a stranger was given mail");
}

#[test]
fn status_without_an_agent() {
    let scratch = Scratch::new("bad");
    let (node, _) = lone_node(&scratch, Program::here());
    refused(&node.command(&["status"]), &scratch, &[]);
    refused(&node.command(&["status", "--json"]), &scratch, &[]);
}

#[test]
fn a_second_agent_on_the_same_state() {
    let _turn = heavy();
    let scratch = Scratch::new("bad");
    let (root, replica) = (source(&scratch), scratch.dir("replica"));
    let mut pair = Pair::on_loopback(scratch.path(), &root, &replica, Layout::Maildir);
    pair.wait_drained(Duration::from_secs(60));
    let second = pair.primary.command(&["run"]);
    refused(&second, &scratch, &[]);
    pair.primary.stop();
    pair.standby.stop();
    assert_identical(&root, &replica, Rules::of(Layout::Maildir));
}
