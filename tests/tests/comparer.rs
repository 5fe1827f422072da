//! The comparer itself: every kind of difference, planted, is found; an exact copy has none.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt, chown, symlink};
use std::path::Path;
use std::process::Command;

use rustix::fs::{CWD, Mode, Timespec, Timestamps, XattrFlags};
use twinbox_tests::gate::Need;
use twinbox_tests::require;
use twinbox_tests::scratch::Scratch;
use twinbox_tests::tree::{Layout, Rules, compare, describe};

/// 5 GiB with three islands of data.
const SPARSE: u64 = 5 << 30;

fn plant(root: &Path) {
    fs::create_dir_all(root.join("dir/empty")).unwrap();
    fs::write(root.join("file"), b"content").unwrap();
    fs::write(root.join("linked-1"), b"linked").unwrap();
    fs::hard_link(root.join("linked-1"), root.join("dir/linked-2")).unwrap();
    fs::write(root.join("alone"), b"linked").unwrap();
    symlink("nowhere", root.join("symlink")).unwrap();
    rustix::fs::mkfifoat(CWD, root.join("fifo"), Mode::from_raw_mode(0o600)).unwrap();
    let sparse = fs::File::create(root.join("sparse")).unwrap();
    sparse.set_len(SPARSE).unwrap();
    for at in [0, SPARSE / 2 + 13, SPARSE - 100] {
        sparse.write_all_at(b"an island of data", at).unwrap();
    }
    let odd = std::ffi::OsStr::from_bytes(b" \n\\\xff\xfe-\xcc\x81");
    fs::write(root.join(odd), b"odd").unwrap();
    rustix::fs::lsetxattr(root.join("file"), "user.tag", b"one", XattrFlags::empty()).unwrap();
}

fn set_mtime(path: &Path, seconds: i64, nanoseconds: i64) {
    let time = Timespec { tv_sec: seconds, tv_nsec: nanoseconds };
    let times = Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(CWD, path, &times, rustix::fs::AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

/// Gives `path` the times `like` has.
fn same_mtime(path: &Path, like: &Path) {
    let stat = rustix::fs::lstat(like).unwrap();
    #[allow(clippy::unnecessary_cast)]
    set_mtime(path, stat.st_mtime as i64, stat.st_mtime_nsec as i64);
}

fn run(program: &str, args: &[&str], path: &Path) {
    assert!(Command::new(program).args(args).arg(path).status().unwrap().success());
}

#[test]
fn every_planted_difference_is_found() {
    require!(Need::Root, Need::Program("setfacl"));
    let scratch = Scratch::new("comparer");
    let (a, b) = (scratch.dir("a"), scratch.join("b"));
    plant(&a);
    let rules = Rules::of(Layout::Plain);
    let copy = || {
        if b.exists() {
            fs::remove_dir_all(&b).unwrap();
        }
        let done = Command::new("cp").args(["-a", "--sparse=auto"]).args([&a, &b]).status();
        assert!(done.unwrap().success());
        let found = compare(&a, &b, rules).unwrap();
        assert!(found.is_empty(), "a faithful copy differs: {}", describe(&found));
    };
    type Change<'a> = &'a dyn Fn(&Path);
    let cases: &[(&str, &str, Change<'_>)] = &[
        ("exists", "file", &|b| fs::remove_file(b.join("file")).unwrap()),
        ("exists", "extra", &|b| fs::write(b.join("extra"), b"").unwrap()),
        ("type", "dir/empty", &|b| {
            fs::remove_dir(b.join("dir/empty")).unwrap();
            fs::write(b.join("dir/empty"), b"").unwrap();
        }),
        ("mode", "file", &|b| {
            fs::set_permissions(b.join("file"), fs::Permissions::from_mode(0o4755)).unwrap();
        }),
        ("mode", "dir", &|b| {
            fs::set_permissions(b.join("dir"), fs::Permissions::from_mode(0o1755)).unwrap();
        }),
        ("owner", "file", &|b| chown(b.join("file"), Some(7), None).unwrap()),
        ("owner", "dir", &|b| chown(b.join("dir"), None, Some(7)).unwrap()),
        ("owner", "symlink", &|b| {
            std::os::unix::fs::lchown(b.join("symlink"), Some(7), None).unwrap();
        }),
        ("size", "file", &|b| fs::write(b.join("file"), b"content!").unwrap()),
        ("content", "file", &|b| fs::write(b.join("file"), b"c0ntent").unwrap()),
        ("content", "sparse", &|b| {
            let file = fs::OpenOptions::new().write(true).open(b.join("sparse")).unwrap();
            file.write_all_at(b"X", SPARSE / 2 + 14).unwrap();
            drop(file);
            same_mtime(&b.join("sparse"), &a.join("sparse"));
        }),
        ("allocated", "sparse", &|b| {
            let file = fs::OpenOptions::new().write(true).open(b.join("sparse")).unwrap();
            file.write_all_at(&vec![0; 4 << 20], 1 << 30).unwrap();
            drop(file);
            same_mtime(&b.join("sparse"), &a.join("sparse"));
        }),
        ("mtime", "file", &|b| set_mtime(&b.join("file"), 1_000_000, 1)),
        ("mtime", "dir/empty", &|b| set_mtime(&b.join("dir/empty"), 1_000_000, 1)),
        ("mtime", "symlink", &|b| set_mtime(&b.join("symlink"), 1_000_000, 1)),
        ("mtime", "", &|b| set_mtime(b, 1_000_000, 1)),
        ("target", "symlink", &|b| {
            fs::remove_file(b.join("symlink")).unwrap();
            symlink("elsewhere", b.join("symlink")).unwrap();
        }),
        ("xattr", "file", &|b| {
            rustix::fs::lsetxattr(b.join("file"), "user.tag", b"two", XattrFlags::empty()).unwrap();
        }),
        ("xattr", "dir", &|b| {
            rustix::fs::lsetxattr(b.join("dir"), "trusted.x", b"1", XattrFlags::empty()).unwrap();
        }),
        ("xattr", "alone", &|b| run("setfacl", &["-m", "u:7:r"], &b.join("alone"))),
        ("xattr", "dir", &|b| run("setfacl", &["-d", "-m", "u:7:r"], &b.join("dir"))),
        ("links", "linked-1", &|b| {
            fs::remove_file(b.join("linked-1")).unwrap();
            fs::write(b.join("linked-1"), b"linked").unwrap();
            same_mtime(&b.join("linked-1"), &a.join("linked-1"));
        }),
        ("links", "alone", &|b| {
            fs::remove_file(b.join("alone")).unwrap();
            fs::hard_link(b.join("linked-1"), b.join("alone")).unwrap();
        }),
    ];
    for (field, path, change) in cases {
        copy();
        change(&b);
        let found = compare(&a, &b, rules).unwrap();
        assert!(
            found.iter().any(|d| d.field == *field && d.path == path.as_bytes()),
            "planted {field} at {path:?}, found {}",
            describe(&found)
        );
    }
}

#[test]
fn what_a_layout_never_mirrors_is_left_out() {
    let excluded = |layout, path: &[u8]| Rules::of(layout).excludes(path, false);
    assert!(excluded(Layout::Maildir, b"u/Maildir/tmp/1.M2.host"));
    assert!(!Rules::of(Layout::Maildir).excludes(b"u/Maildir/tmp", true));
    assert!(!excluded(Layout::Maildir, b"u/Maildir/.tmp/cur/1.M2.host"));
    assert!(!excluded(Layout::Maildir, b"u/Maildir/cur/1.M2.lock"));
    assert!(excluded(Layout::Maildir, b"u/Maildir/dovecot-uidlist.lock"));
    assert!(excluded(Layout::Sdbox, b"u/sdbox/mailboxes/INBOX/dbox-Mails/.temp.host.1.2"));
    assert!(excluded(Layout::Mdbox, b"u/mdbox/storage/dovecot.map.index.log.newlock"));
    assert!(excluded(Layout::Mbox, b"u/mail/inbox.lock"));
    assert!(!excluded(Layout::Plain, b"x.lock"));
    assert!(!excluded(Layout::Plain, b"tmp/x"));
    assert!(excluded(Layout::Plain, b"a/.twinbox-1/x"));
}
