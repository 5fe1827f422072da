//! `twinbox verify`: planted differences are found and put right, on either side, and nothing else is ever told, whatever goes on meanwhile.
//!
//! On the standby differences are planted by ordinary calls. On the primary they must come without an event: content is changed in the image below a mounted ext4, attributes and names by `debugfs`.
//!
//! Size: 3 runs under load; `TWINBOX_TEST_FULL=1`: 10.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use serde_json::Value;
use twinbox_tests::disk::{Disk, Format};
use twinbox_tests::gate::{Need, full, heavy, nap, wait_until};
use twinbox_tests::node::{Node, Pair};
use twinbox_tests::require;
use twinbox_tests::rng::{Rng, Seed};
use twinbox_tests::scratch::Scratch;
use twinbox_tests::tree::{Layout, Rules, assert_identical, leftovers, wait_identical};

const LIMIT: Duration = Duration::from_secs(60);

/// One run of the command: its exit code and its answer for the only mirror.
fn verify(node: &Node, words: &[&str]) -> (i32, Value) {
    let mut args = vec!["verify", "--json", "--rate", "max"];
    args.extend(words);
    let ended = node.command(&args);
    let code = ended.status.code().expect("an exit code");
    let said: Value = serde_json::from_str(&ended.stdout).unwrap_or_else(|e| panic!("{e}: {ended}"));
    (code, said["mirrors"][0].clone())
}

/// What was found: path and kind.
fn found(said: &Value) -> BTreeSet<(String, String)> {
    let text = |value: &Value| value.as_str().expect("a text").to_owned();
    said["findings"].as_array().expect("a list").iter().map(|one| (text(&one["path"]), text(&one["what"]))).collect()
}

fn planted(list: &[(&str, &str)]) -> BTreeSet<(String, String)> {
    list.iter().map(|(path, what)| ((*path).to_owned(), (*what).to_owned())).collect()
}

fn mailbox(root: &Path, user: &str) {
    for sub in ["new", "cur", "tmp"] {
        fs::create_dir_all(root.join(user).join(sub)).unwrap();
    }
}

fn text(name: &str, len: usize) -> Vec<u8> {
    let line = format!("{name}: a line of a message that nobody else has.\n");
    line.bytes().cycle().take(len).collect()
}

/// Changes bytes of a file and nothing that its stat says but the change time.
fn corrupt(path: &Path) {
    let meta = fs::metadata(path).unwrap();
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(b"XXXX", meta.len() / 2).unwrap();
    file.set_modified(meta.modified().unwrap()).unwrap();
}

/// Where the bytes of a file of the mounted image begin in the image.
fn place(path: &Path) -> u64 {
    let out = tool("filefrag", &["-v", "-b1", &path.display().to_string()]);
    // "   0:        0..    4095:  34603008..  34607103:   4096: …"
    let line = out.lines().find(|line| line.trim_start().starts_with("0:")).unwrap_or_else(|| panic!("{out}"));
    let physical = line.split(':').nth(2).and_then(|part| part.split("..").next()).expect("a physical offset");
    physical.trim().parse().unwrap_or_else(|e| panic!("{e}: {line}"))
}

fn tool(program: &str, args: &[&str]) -> String {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let out = Command::new(program).args(args).env("PATH", path).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    assert!(out.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8_lossy(&out.stdout).into_owned()
}

/// The disk changes bytes by itself.
fn rot(image: &Path, path: &Path) {
    let at = place(path);
    let file = OpenOptions::new().read(true).write(true).open(image).unwrap();
    let mut bytes = [0; 4];
    file.read_exact_at(&mut bytes, at + 8).unwrap();
    bytes.iter_mut().for_each(|byte| *byte ^= 0x55);
    file.write_all_at(&bytes, at + 8).unwrap();
    file.sync_all().unwrap();
}

#[test]
fn planted_differences_are_found_and_repaired_on_both_sides() {
    require!(Need::Root);
    let _alone = heavy();
    let scratch = Scratch::new("verify");
    let image = scratch.join("store.img");
    let disk = Disk::new(Format::Ext4, &image, 128, &scratch.join("store-disk"));
    let (store, replica) = (disk.path().join("store"), scratch.dir("replica"));
    for user in 0..8 {
        let name = format!("user{user}");
        mailbox(&store, &name);
        for message in 0..20 {
            fs::write(store.join(&name).join("cur").join(format!("{message}.M1P1.host:2,S")), text(&format!("{name} {message}"), 3000))
                .unwrap();
        }
        fs::write(store.join(&name).join("subscriptions"), text(&name, 100)).unwrap();
    }
    fs::write(store.join("user0/cur/large"), text("large", 3 << 20)).unwrap();
    fs::hard_link(store.join("user1/cur/5.M1P1.host:2,S"), store.join("user2/cur/linked")).unwrap();
    fs::create_dir_all(store.join("user3/.Empty")).unwrap();
    std::os::unix::fs::symlink("user0", store.join("alias")).unwrap();
    let mut pair = Pair::on_loopback(scratch.path(), &store, &replica, Layout::Maildir);
    let rules = Rules::of(Layout::Maildir);
    wait_identical(&store, &replica, rules, LIMIT).unwrap_or_else(|why| panic!("not identical {why}"));
    pair.wait_drained(LIMIT);
    for node in [&pair.primary, &pair.standby] {
        let (code, said) = verify(node, &[]);
        assert_eq!((code, found(&said)), (0, BTreeSet::new()), "{}: {said}", node.name);
        assert!(said["paths"].as_u64() > Some(200) && said["bytes"].as_u64() > Some(3 << 20), "{said}");
    }

    // The standby's files, changed by somebody there.
    let at = |path: &str| replica.join(path);
    corrupt(&at("user0/cur/0.M1P1.host:2,S"));
    corrupt(&at("user0/cur/large"));
    corrupt(&at("user1/subscriptions"));
    corrupt(&at("user2/cur/linked"));
    fs::set_permissions(at("user0/cur/1.M1P1.host:2,S"), fs::Permissions::from_mode(0o600)).unwrap();
    File::open(at("user0/cur/2.M1P1.host:2,S")).unwrap().set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    fs::set_permissions(at("user4/cur"), fs::Permissions::from_mode(0o700)).unwrap();
    fs::remove_file(at("user5/cur/3.M1P1.host:2,S")).unwrap();
    fs::remove_file(at("alias")).unwrap();
    fs::remove_dir_all(at("user3/.Empty")).unwrap();
    File::open(at("user7/new")).unwrap().set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    fs::write(at("user6/cur/stranger"), "mine").unwrap();
    let on_standby = planted(&[
        ("user0/cur/0.M1P1.host:2,S", "content"),
        ("user0/cur/large", "content"),
        ("user1/subscriptions", "content"),
        ("user1/cur/5.M1P1.host:2,S", "content"),
        ("user2/cur/linked", "content"),
        ("user0/cur/1.M1P1.host:2,S", "attributes"),
        ("user0/cur/2.M1P1.host:2,S", "attributes"),
        ("user4/cur", "attributes"),
        ("user7/new", "attributes"),
        ("user5/cur/3.M1P1.host:2,S", "missing"),
        ("alias", "missing"),
        ("user3/.Empty", "missing"),
        ("user6/cur/stranger", "extra"),
    ]);
    // The primary's, changed below its file system.
    let mine = |path: &str| store.join(path);
    // All of it: a journal that is not written home yet would be written over what is planted.
    tool("sync", &[]);
    let inode = |path: &str| fs::symlink_metadata(mine(path)).unwrap().ino();
    let (moded, timed) = (inode("user7/cur/1.M1P1.host:2,S"), inode("user7/cur/2.M1P1.host:2,S"));
    for path in ["user7/cur/10.M1P1.host:2,S", "user7/cur/11.M1P1.host:2,S", "user7/subscriptions", "user0/cur/large", "user2/cur/linked"] {
        rot(&image, &mine(path));
    }
    for request in
        [format!("sif <{moded}> mode 0100000"), format!("sif <{timed}> mtime @4096"), "unlink /store/user7/cur/12.M1P1.host:2,S".into()]
    {
        tool("debugfs", &["-w", "-R", &request, &image.display().to_string()]);
    }
    // What the kernel has of it goes, so that the disk is asked.
    fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
    wait_until(LIMIT, "the kernel to see what is on the disk", || {
        fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
        !mine("user7/cur/12.M1P1.host:2,S").exists() && fs::metadata(mine("user7/cur/1.M1P1.host:2,S")).unwrap().mode() & 0o7777 == 0
    });
    let on_primary = planted(&[
        ("user7/cur/10.M1P1.host:2,S", "content"),
        ("user7/cur/11.M1P1.host:2,S", "content"),
        ("user7/subscriptions", "content"),
        ("user0/cur/large", "content"),
        ("user1/cur/5.M1P1.host:2,S", "content"),
        ("user2/cur/linked", "content"),
        ("user7/cur/1.M1P1.host:2,S", "attributes"),
        ("user7/cur/2.M1P1.host:2,S", "attributes"),
        ("user7/cur/12.M1P1.host:2,S", "missing"),
    ]);
    // Told, and nothing done.
    for (node, planted) in [(&pair.standby, &on_standby), (&pair.primary, &on_primary)] {
        let (code, said) = verify(node, &[]);
        assert_eq!((code, &found(&said)), (9, planted), "{}: {said:#}", node.name);
    }
    // `large` and the linked message are damaged on both sides: what one node has lost comes from the other only after that one has its own again, and these two have none.
    let both = planted(&[("user0/cur/large", "content"), ("user1/cur/5.M1P1.host:2,S", "content"), ("user2/cur/linked", "content")]);
    let (code, said) = verify(&pair.standby, &["--repair"]);
    let left = |said: &Value| -> BTreeSet<(String, String)> {
        let all = said["findings"].as_array().unwrap().iter();
        let failed = Value::Array(all.filter(|one| one["outcome"] == "failed").cloned().collect());
        found(&serde_json::json!({ "findings": failed }))
    };
    assert_eq!((code, left(&said), found(&said)), (9, both.clone(), on_standby.clone()), "{said:#}");
    let (code, said) = verify(&pair.primary, &["--repair"]);
    assert_eq!((code, left(&said), found(&said)), (9, both.clone(), on_primary), "{said:#}");
    // Somebody has a backup; the rows are what they were, so nothing of it is sent.
    fs::write(mine("user0/cur/large"), text("large", 3 << 20)).unwrap();
    fs::write(mine("user2/cur/linked"), text("user1 5", 3000)).unwrap();
    pair.wait_drained(LIMIT);
    let (code, said) = verify(&pair.standby, &["--repair"]);
    // Of the two names of one file the second is right as soon as the first is.
    assert!(code == 0 && found(&said).is_subset(&both) && found(&said).len() >= 2, "{said:#}");
    wait_identical(&store, &replica, rules, LIMIT).unwrap_or_else(|why| panic!("not identical {why}"));
    for node in [&pair.primary, &pair.standby] {
        let (code, said) = verify(node, &["--repair"]);
        assert_eq!((code, found(&said)), (0, BTreeSet::new()), "{}: {said}", node.name);
    }
    for user in 0..8 {
        for message in 0..20 {
            let (name, path) = (format!("user{user} {message}"), format!("user{user}/cur/{message}.M1P1.host:2,S"));
            assert_eq!(fs::read(mine(&path)).unwrap(), text(&name, 3000), "{path}");
        }
    }
    // What gave way is kept.
    let kept = |node: &Node| fs::read_dir(node.state.join("mirrors/mail/rescue")).map_or(0, Iterator::count);
    assert!(kept(&pair.standby) > 0 && kept(&pair.primary) > 0);
    pair.primary.stop();
    pair.standby.stop();
    assert_identical(&store, &replica, rules);
    assert_eq!(leftovers(&store).unwrap(), Vec::<String>::new());
    assert_eq!(leftovers(&replica).unwrap(), Vec::<String>::new());
}

/// A mail server's work on one user, until it is told to stop; counts what it does.
fn work(root: &Path, user: usize, mut rng: Rng, stop: &AtomicBool, done: &AtomicU64) {
    let (home, mut n) = (root.join(format!("user{user}")), 0u64);
    let log = OpenOptions::new().append(true).create(true).open(home.join("dovecot.index.log")).unwrap();
    while !stop.load(Ordering::Relaxed) {
        let names: Vec<PathBuf> = fs::read_dir(home.join("cur")).unwrap().map(|entry| entry.unwrap().path()).collect();
        match rng.below(10) {
            0..=4 => {
                let name = format!("{n}.M{user}P1.host");
                fs::write(home.join("tmp").join(&name), text(&name, 200 + rng.below(6000))).unwrap();
                fs::rename(home.join("tmp").join(&name), home.join("new").join(&name)).unwrap();
                fs::rename(home.join("new").join(&name), home.join("cur").join(format!("{name}:2,"))).unwrap();
            }
            5 | 6 if !names.is_empty() => {
                let from = &names[rng.below(names.len())];
                let to = format!("{}F", from.display());
                fs::rename(from, if to.len() > 200 { from.display().to_string() } else { to }).unwrap();
            }
            7 if names.len() > 50 => fs::remove_file(&names[rng.below(names.len())]).unwrap(),
            8 => {
                let folder = home.join(format!(".Folder{}", rng.below(3)));
                if folder.exists() {
                    fs::rename(&folder, home.join(format!(".Trash{n}"))).unwrap();
                    fs::remove_dir_all(home.join(format!(".Trash{n}"))).unwrap();
                } else {
                    fs::create_dir_all(folder.join("cur")).unwrap();
                    fs::write(folder.join("cur/one"), text("one", 700)).unwrap();
                }
            }
            _ => {
                std::io::Write::write_all(&mut &log, &text("log", 120)).unwrap();
                fs::write(home.join("list.tmp"), text(&n.to_string(), 300)).unwrap();
                fs::rename(home.join("list.tmp"), home.join("dovecot-uidlist")).unwrap();
            }
        }
        n += 1;
        done.fetch_add(1, Ordering::Relaxed);
        nap(Duration::from_millis(3)); // The load, not a wait: some hundred changes a second in all.
    }
}

#[test]
fn nothing_is_told_of_a_store_in_use() {
    let _alone = heavy();
    let (scratch, seed) = (Scratch::new("verify-load"), Seed::from_env());
    let (store, replica) = (scratch.dir("store"), scratch.dir("replica"));
    (0..4).for_each(|user| mailbox(&store, &format!("user{user}")));
    let mut pair = Pair::on_loopback(scratch.path(), &store, &replica, Layout::Maildir);
    pair.primary.wait_state(LIMIT, "protected");
    let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let workers: Vec<_> = (0..4)
        .map(|user| {
            let (store, stop, done, rng) = (store.clone(), stop.clone(), done.clone(), Rng::part(seed.0, user as u64));
            std::thread::spawn(move || work(&store, user, rng, &stop, &done))
        })
        .collect();
    for run in 0..if full() { 10 } else { 3 } {
        let before = done.load(Ordering::Relaxed);
        for node in [&pair.standby, &pair.primary] {
            // Repair on every second: it would act on what is no difference.
            let (code, said) = verify(node, if run % 2 == 1 { &["--repair"] } else { &[] });
            assert_eq!((code, found(&said)), (0, BTreeSet::new()), "run {run}, {}: {said:#}", node.name);
        }
        wait_until(LIMIT, "the load to go on", || done.load(Ordering::Relaxed) > before + 100);
    }
    stop.store(true, Ordering::Relaxed);
    workers.into_iter().for_each(|worker| worker.join().unwrap());
    wait_identical(&store, &replica, Rules::of(Layout::Maildir), LIMIT).unwrap_or_else(|why| panic!("not identical {why}"));
    pair.primary.stop();
    pair.standby.stop();
}
