//! Every kind of thing a tree can hold, first carried over whole, then changed one by one under a live mirror: identical after each.
//! Then the same as an ordinary user, who loses ownership, and only that, and is told so.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt, chown, lchown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, Mode, Timespec, Timestamps, XattrFlags, lremovexattr, lsetxattr};
use twinbox_tests::gate::{Need, heavy};
use twinbox_tests::live::{Live, once, once_by};
use twinbox_tests::require;
use twinbox_tests::rng::Rng;
use twinbox_tests::scratch::Scratch;
use twinbox_tests::tree::{Layout, Rules, assert_identical, compare, describe};
use twinbox_tests::twinbox::Program;

/// Over 4 GiB, where 32-bit sizes end.
const SPARSE: u64 = (5 << 30) + 12_345;

const NOBODY: u32 = 65_534;

/// Names that were trouble somewhere.
const NAMES: [&[u8]; 17] = [
    b"new\nline",
    b"\xff\xfe not utf-8 \x80",
    b"back\\slash",
    b" leading and trailing ",
    b"-rf",
    b"~",
    b"*?[a]{b}",
    b"'\"`$(x)",
    b"...",
    b"caf\xc3\xa9",  // NFC
    b"cafe\xcc\x81", // NFD, the same to a reader
    b"tab\tbell\x07del\x7f",
    b"carriage\r",
    b".hidden",
    b"CASE",
    b"case",
    b"%2F:#;",
];

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

fn set_mtime(path: &Path, seconds: i64, nanoseconds: i64) {
    let time = Timespec { tv_sec: seconds, tv_nsec: nanoseconds };
    let times = Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

fn setfacl(args: &[&str], path: &Path) {
    assert!(Command::new("setfacl").args(args).arg(path).status().unwrap().success());
}

fn xattr(path: &Path, name: &str, value: &[u8]) {
    lsetxattr(path, name, value, XattrFlags::empty()).unwrap();
}

fn fifo(path: &Path) {
    rustix::fs::mkfifoat(CWD, path, Mode::from_raw_mode(0o640)).unwrap();
}

/// About 3,000 bytes below `root`, by components of 200.
fn deep(root: &Path) -> PathBuf {
    (0..15).fold(root.join("deep"), |path, n| path.join(format!("{n:0200}")))
}

/// What an ordinary user may own and read.
fn plant_plain(root: &Path) {
    for dir in ["names", "links/other", "empty/nested/empty", "acl", "modes", "setgid"] {
        fs::create_dir_all(root.join(dir)).unwrap();
    }
    for name in NAMES {
        let name = OsStr::from_bytes(name);
        fs::write(root.join("names").join(name), name.as_bytes()).unwrap();
        let dir = root.join("empty").join(name);
        fs::create_dir_all(dir.join("inside")).unwrap();
    }
    fs::write(root.join("names").join("n".repeat(255)), b"255 bytes").unwrap();
    fs::create_dir_all(deep(root)).unwrap();
    fs::write(deep(root).join("bottom"), b"bottom").unwrap();

    fs::write(root.join("zero"), b"").unwrap();
    let sparse = fs::File::create(root.join("sparse")).unwrap();
    sparse.set_len(SPARSE).unwrap();
    for at in [4096, (4 << 30) - 3, SPARSE - 200_000] {
        sparse.write_all_at(&Rng::new(at).bytes(70_000), at).unwrap();
    }
    let hollow = fs::File::create(root.join("all-hole")).unwrap();
    hollow.set_len(1 << 30).unwrap();
    fs::write(root.join("large"), Rng::new(7).bytes(9 << 20)).unwrap();

    for n in 1..=3 {
        let first = root.join("links/first");
        if n == 1 {
            fs::write(&first, b"one inode").unwrap();
        }
        fs::hard_link(&first, root.join(format!("links/other/name-{n}"))).unwrap();
    }
    symlink("no/such/thing", root.join("links/dangling")).unwrap();
    symlink("/etc/hostname", root.join("links/absolute")).unwrap();
    symlink("../..", root.join("links/upwards")).unwrap();
    symlink("first", root.join("links/relative")).unwrap();
    symlink(OsStr::from_bytes(b"\xff\n\\"), root.join("links/odd")).unwrap();
    symlink("t".repeat(4000), root.join("links/long")).unwrap();
    fifo(&root.join("fifo"));

    fs::write(root.join("acl/file"), b"acl").unwrap();
    setfacl(&["-m", "u:7:rw,g:9:r,m::rw"], &root.join("acl/file"));
    setfacl(&["-m", "u:7:rwx", "-m", "d:u:7:rx,d:g:9:r"], &root.join("acl"));
    xattr(&root.join("acl/file"), "user.empty", b"");
    xattr(&root.join("acl/file"), "user.bytes", b"\x00\xff\n");
    xattr(&root.join("acl/file"), "user.long", &Rng::new(9).bytes(3000));
    xattr(&root.join("acl"), "user.directory", b"yes");
    for mode in [0o600, 0o644, 0o444, 0o400, 0o755, 0o711] {
        let path = root.join(format!("modes/{mode:o}"));
        fs::write(&path, format!("{mode:o}")).unwrap();
        set_mode(&path, mode);
    }
    set_mode(&root.join("setgid"), 0o1777);
    set_mtime(&root.join("zero"), 1, 999_999_999);
    set_mtime(&root.join("large"), -86_400, 1);
    set_mtime(&root.join("modes/600"), 4_000_000_000, 123_456_789);
    set_mtime(&root.join("links/dangling"), 1_000_000_000, 5);
    set_mtime(&root.join("empty/nested/empty"), 946_684_800, 7);
    set_mtime(&root.join("empty"), 946_684_800, 8);
}

/// And what only root can make.
fn plant_owned(root: &Path) {
    for (n, mode) in [0o4755, 0o2755, 0o6711, 0o1644, 0o4000, 0o000].into_iter().enumerate() {
        let path = root.join(format!("modes/special-{n}"));
        fs::write(&path, b"special").unwrap();
        chown(&path, Some(100 + n as u32), Some(200 + n as u32)).unwrap();
        set_mode(&path, mode);
    }
    chown(root.join("setgid"), Some(12), Some(34)).unwrap();
    set_mode(&root.join("setgid"), 0o2750);
    lchown(root.join("links/dangling"), Some(12), Some(34)).unwrap();
    lchown(root.join("fifo"), Some(4_000_000_000), Some(4_000_000_001)).unwrap();
    xattr(&root.join("acl/file"), "trusted.one", b"root only");
    xattr(&root.join("links/odd"), "trusted.link", b"on a symlink");
    xattr(&root.join("fifo"), "trusted.fifo", b"on a fifo");
    set_mtime(&root.join("links/dangling"), 1_000_000_000, 5);
}

type Change = (&'static str, fn(&Path));

/// One change each of every kind.
fn changes() -> Vec<Change> {
    vec![
        ("mode, setuid on", |r| set_mode(&r.join("modes/755"), 0o4755)),
        ("mode, setuid off", |r| set_mode(&r.join("modes/special-0"), 0o755)),
        ("mode of a directory", |r| set_mode(&r.join("empty"), 0o1700)),
        ("owner", |r| chown(r.join("modes/600"), Some(77), Some(88)).unwrap()),
        ("owner of a setuid file, which clears it", |r| {
            chown(r.join("modes/special-2"), Some(5), Some(5)).unwrap();
        }),
        ("owner of a symlink", |r| lchown(r.join("links/absolute"), Some(5), Some(6)).unwrap()),
        ("owner of a directory", |r| chown(r.join("names"), Some(5), Some(6)).unwrap()),
        ("mtime only", |r| set_mtime(&r.join("zero"), 1_234_567_890, 987_654_321)),
        ("mtime back to before 1970", |r| set_mtime(&r.join("zero"), -5, 5)),
        ("mtime of a directory", |r| set_mtime(&r.join("empty/nested"), 1_000, 1)),
        ("mtime of a symlink", |r| set_mtime(&r.join("links/upwards"), 2_000, 2)),
        ("mtime of the root", |r| set_mtime(r, 3_000, 3)),
        ("mode of the root", |r| set_mode(r, 0o751)),
        ("xattr set", |r| xattr(&r.join("acl/file"), "user.fresh", b"1")),
        ("xattr changed", |r| xattr(&r.join("acl/file"), "user.bytes", b"\x01")),
        ("xattr removed", |r| lremovexattr(r.join("acl/file"), "user.empty").unwrap()),
        ("xattr of a directory", |r| lremovexattr(r.join("acl"), "user.directory").unwrap()),
        ("trusted xattr of a symlink", |r| xattr(&r.join("links/odd"), "trusted.link", b"new")),
        ("acl changed", |r| setfacl(&["-m", "u:7:r"], &r.join("acl/file"))),
        ("acl removed", |r| setfacl(&["-b"], &r.join("acl/file"))),
        ("default acl removed", |r| setfacl(&["-k"], &r.join("acl"))),
        ("file born under a default acl", |r| {
            setfacl(&["-m", "d:u:8:rw"], &r.join("acl"));
            fs::write(r.join("acl/born"), b"inherits").unwrap();
        }),
        ("link added", |r| {
            fs::hard_link(r.join("links/first"), r.join("names/another")).unwrap();
        }),
        ("link removed", |r| fs::remove_file(r.join("links/other/name-2")).unwrap()),
        ("link renamed", |r| {
            fs::rename(r.join("links/other/name-3"), r.join("modes/name-3")).unwrap();
        }),
        ("content through one of its names", |r| {
            let file = fs::OpenOptions::new().append(true).open(r.join("modes/name-3")).unwrap();
            rustix::io::write(&file, b" and more").unwrap();
        }),
        ("first name of a link set removed", |r| fs::remove_file(r.join("links/first")).unwrap()),
        ("one link replaced by an equal file", |r| {
            fs::write(r.join("fresh"), b"one inode and more").unwrap();
            fs::rename(r.join("fresh"), r.join("links/other/name-1")).unwrap();
        }),
        ("two sets joined", |r| {
            fs::remove_file(r.join("links/other/name-1")).unwrap();
            fs::hard_link(r.join("modes/name-3"), r.join("links/other/name-1")).unwrap();
        }),
        ("symlink retargeted", |r| {
            symlink("elsewhere", r.join("swap")).unwrap();
            fs::rename(r.join("swap"), r.join("links/dangling")).unwrap();
        }),
        ("file becomes a symlink", |r| {
            fs::remove_file(r.join("modes/644")).unwrap();
            symlink("444", r.join("modes/644")).unwrap();
        }),
        ("symlink becomes a directory", |r| {
            fs::remove_file(r.join("links/absolute")).unwrap();
            fs::create_dir(r.join("links/absolute")).unwrap();
            fs::write(r.join("links/absolute/in"), b"in").unwrap();
        }),
        ("directory becomes a file", |r| {
            fs::remove_dir_all(r.join("links/absolute")).unwrap();
            fs::write(r.join("links/absolute"), b"file").unwrap();
        }),
        ("directory swapped for a symlink to another", |r| {
            fs::rename(r.join("empty/nested"), r.join("empty/kept")).unwrap();
            symlink("kept", r.join("empty/nested")).unwrap();
        }),
        ("fifo removed and made", |r| {
            fs::remove_file(r.join("fifo")).unwrap();
            fifo(&r.join("empty/fifo"));
        }),
        ("sparse file: an island more", |r| {
            let file = fs::OpenOptions::new().write(true).open(r.join("sparse")).unwrap();
            file.write_all_at(&Rng::new(3).bytes(10_000), (3 << 30) + 17).unwrap();
        }),
        ("sparse file: grown by a hole", |r| {
            let file = fs::OpenOptions::new().write(true).open(r.join("sparse")).unwrap();
            file.set_len(SPARSE + (1 << 30)).unwrap();
        }),
        ("sparse file: a hole punched", |r| {
            let file = fs::OpenOptions::new().write(true).open(r.join("large")).unwrap();
            let punch = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(&file, punch, 1 << 20, 4 << 20).unwrap();
        }),
        ("sparse file: cut short", |r| {
            let file = fs::OpenOptions::new().write(true).open(r.join("sparse")).unwrap();
            file.set_len((4 << 30) + 1).unwrap();
        }),
        ("written in the middle", |r| {
            let file = fs::OpenOptions::new().write(true).open(r.join("large")).unwrap();
            file.write_all_at(b"in the middle", 6_000_000).unwrap();
        }),
        ("emptied", |r| fs::write(r.join("large"), b"").unwrap()),
        ("odd names renamed to odd names", |r| {
            for pair in NAMES.chunks_exact(2) {
                let [a, b] = [pair[0], pair[1]].map(|n| r.join("names").join(OsStr::from_bytes(n)));
                let spare = r.join("names/spare");
                fs::rename(&a, &spare).unwrap();
                fs::rename(&b, &a).unwrap();
                fs::rename(&spare, &b).unwrap();
            }
        }),
        ("name of 255 bytes", |r| {
            fs::rename(r.join("names").join("n".repeat(255)), r.join("names").join("m".repeat(255))).unwrap();
        }),
        ("two names exchanged", |r| {
            let (a, b) = (r.join("modes/600"), r.join("modes/444"));
            let flag = rustix::fs::RenameFlags::EXCHANGE;
            rustix::fs::renameat_with(CWD, a, CWD, b, flag).unwrap();
        }),
        ("at the bottom of a deep path", |r| {
            fs::write(deep(r).join("bottom"), b"changed").unwrap();
            fs::create_dir(deep(r).join("more")).unwrap();
        }),
        ("top of a deep path renamed", |r| fs::rename(r.join("deep"), r.join("DEEP")).unwrap()),
        ("directory moved into its sibling", |r| {
            fs::rename(r.join("names"), r.join("empty/names")).unwrap();
        }),
        ("changed right after its directory moved", |r| {
            fs::rename(r.join("empty"), r.join("full")).unwrap();
            fs::write(r.join("full/names/late"), b"late").unwrap();
        }),
        ("tree removed", |r| fs::remove_dir_all(r.join("full")).unwrap()),
        ("deep tree removed", |r| fs::remove_dir_all(r.join("DEEP")).unwrap()),
    ]
}

#[test]
fn everything_once_then_nothing_again() {
    require!(Need::Root, Need::Program("setfacl"));
    let _turn = heavy();
    let scratch = Scratch::new("fidelity-once");
    let (source, replica) = (scratch.dir("source"), scratch.join("replica"));
    plant_plain(&source);
    plant_owned(&source);
    once(&source, &replica, scratch.path(), Layout::Plain).ok("first sync");
    assert_identical(&source, &replica, Rules::of(Layout::Plain));

    for (_, change) in changes() {
        change(&source);
    }
    once(&source, &replica, scratch.path(), Layout::Plain).ok("second sync, after every change");
    assert_identical(&source, &replica, Rules::of(Layout::Plain));
}

#[test]
fn every_change_live() {
    require!(Need::Root, Need::Program("setfacl"));
    let _turn = heavy();
    let scratch = Scratch::new("fidelity-live");
    let (source, replica) = (scratch.dir("source"), scratch.join("replica"));
    plant_plain(&source);
    plant_owned(&source);
    let mut mirror = Live::start(&source, &replica, scratch.path(), Layout::Plain);
    mirror.settle("first sync", Duration::from_secs(120));
    for (what, change) in changes() {
        change(&source);
        mirror.settle(what, Duration::from_secs(30));
    }
    // And all of it at once, from nothing, while the mirror watches.
    plant_plain(&source.join("modes"));
    plant_owned(&source.join("modes"));
    mirror.settle("a whole tree made under a live mirror", Duration::from_secs(60));
    mirror.stop();
}

#[test]
fn an_ordinary_user_loses_ownership_and_is_told() {
    require!(Need::Root, Need::Program("setfacl"), Need::Program("setpriv"));
    let _turn = heavy();
    let scratch = Scratch::new("fidelity-user");
    let source = scratch.dir("source");
    plant_plain(&source);
    let open = Command::new("chown").args(["-hR", "65534:65534"]).arg(&source).status();
    assert!(open.unwrap().success());
    let foreign = source.join("of-another");
    fs::write(&foreign, b"owned by root, readable by all").unwrap();
    set_mode(&foreign, 0o644);
    set_mtime(&foreign, 1_700_000_000, 1);

    let home = scratch.dir_of("home", NOBODY);
    let replica = home.join("replica");
    let user = Program::as_user(NOBODY, scratch.path());
    let ended = once_by(&user, &source, &replica, &home, Layout::Plain).ok("as an ordinary user");
    let rules = Rules::of(Layout::Plain);
    assert_identical(&source, &replica, rules.without_owners());
    let lost = compare(&source, &replica, rules).unwrap();
    assert!(lost.iter().all(|d| d.field == "owner" && d.path == b"of-another"), "{}", describe(&lost));
    let said = format!("{}{}", ended.stdout, ended.stderr).to_lowercase();
    assert!(said.contains("owner"), "does not say that ownership is lost: {ended}");
}
