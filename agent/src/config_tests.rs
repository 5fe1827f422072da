//! Tests of the configuration: what is accepted, each refusal with its place, writing and editing.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::time::Duration;

use proptest::prelude::*;

use super::{Config, ConfigError, Peer, ProblemKind, Role, upsert_peer, upsert_peer_file};
use crate::layout::Layout;

const FULL: &str = r#"
# My notes.
node = "Mail1.example.org"
state = "/var/lib/twinbox"
listen = ["192.0.2.7:7440", "[2001:db8::7]:7440"]

[limits]
memory_mib = 128

[log]
level = "debug"
format = "json"

[[mirror]]
name = "mail"
root = "/srv/mail/"
layout = "mdbox"
role = "standby"
groups = ["*/*"]
exclude = "*.bak"
sweep_interval = "1h30m"
fuzzy_after = "45s"

[fence]
socket = "/run/twinbox/fence.sock"
group = "vmail"

[hooks]
post_promote = "/etc/twinbox/hooks/mail-server"
pre_demote = "/etc/twinbox/hooks/mail-server"
timeout = "2m"

[verify]
interval = "7d"
repair = true
rate_mib = 8

[[peer]] # the other one
node = "mail2"   # in the cellar
addresses = ["192.0.2.8:7440"] # rack 2
"#;

fn problems(text: &str) -> Vec<String> {
    match Config::parse(text) {
        Ok(config) => panic!("accepted: {config:?}"),
        Err(ConfigError::Invalid { problems, .. }) => problems.as_slice().iter().map(ToString::to_string).collect(),
        Err(other) => panic!("{other}"),
    }
}

fn peer(node: &str, fingerprint: &str) -> Peer {
    Peer {
        node: node.parse().expect("a node name"),
        addresses: vec!["198.51.100.1:9".parse().expect("an address")],
        fingerprint: Some(fingerprint.to_owned()),
    }
}

#[test]
fn accepts_everything_documented() {
    let config = Config::parse(FULL).expect("valid");
    assert_eq!(config.node.as_str(), "Mail1.example.org");
    assert_eq!(config.listen.len(), 2);
    assert_eq!(config.limits.memory_mib, 128);
    assert_eq!(config.limits.bulk_streams, 8, "others keep their default");
    let mirror = config.mirror("mail").expect("the mirror");
    assert_eq!(mirror.root, Path::new("/srv/mail"));
    assert_eq!((mirror.layout, mirror.role), (Layout::Mdbox, Role::Standby));
    assert_eq!(mirror.sweep_interval, Duration::from_secs(5400));
    assert_eq!(mirror.fuzzy_after, Some(Duration::from_secs(45)));
    assert_eq!(config.verify, super::Verify { interval: Some(Duration::from_secs(7 * 24 * 3600)), repair: true, rate: 8 << 20 });
    let fence = config.fence.as_ref().unwrap();
    assert_eq!((fence.socket.to_str(), fence.group.as_deref()), (Some("/run/twinbox/fence.sock"), Some("vmail")));
    assert!(mirror.selection().excludes(b"a/b/x.bak", false));
    assert_eq!(mirror.grouping().group_of(b"org/alice/x", false), b"org/alice");
    assert_eq!(config.peer("mail2").expect("the peer").fingerprint, None);
    assert_eq!(Config::parse(&config.to_toml()).expect("reads its own writing"), config);
}

/// Each line of the file may be missing.
#[test]
fn what_is_left_out_stays_out() {
    for line in FULL.lines().filter(|line| line.contains(" = ")) {
        if let Ok(config) = Config::parse(&FULL.replacen(line, "", 1)) {
            assert_eq!(Config::parse(&config.to_toml()).expect("reads its own writing"), config, "without {line}");
        }
    }
}

#[test]
fn each_mistake_is_named_with_its_place() {
    let mirror = |lines: &str| {
        format!(
            "node = \"a\"\nstate = \"/s\"\n[[mirror]]\nname = \"m\"\nroot = \"/r\"\nlayout = \"maildir\"\nrole = \"primary\"\n{lines}\n"
        )
    };
    let second = |name: &str, root: &str| {
        mirror(&format!("[[mirror]]\nname = \"{name}\"\nroot = \"{root}\"\nlayout = \"plain\"\nrole = \"primary\""))
    };
    for (text, expected) in [
        (mirror("rooot = \"/x\""), "8:1: unknown key `rooot` in [[mirror]]; did you mean `root`?"),
        (mirror("compression = 3"), "8:1: unknown key `compression` in [[mirror]]"),
        (mirror("[limit]"), "8:2: unknown key `limit` in the top level; did you mean `limits`?"),
        (mirror("[limits]\nmemory = 5"), "9:1: unknown key `memory` in [limits]"),
        (mirror("[limits]\nbulk_streams = 0"), "9:16: `bulk_streams` must be between 1 and 256, not 0"),
        (mirror("[limits]\nbulk_streams = \"x\""), "9:16: `bulk_streams` must be a whole number, not a string"),
        (mirror("[log]\nlevel = \"loud\""), "9:9: `level` must be one of error, warn, info, debug, trace, not `loud`"),
        (
            mirror("exclude = [\"/x\"]"),
            "8:12: bad pattern `/x`: the pattern can match no path: patterns are relative to the mirror's root, so drop the leading `/`",
        ),
        (
            mirror("sweep_interval = \"1 hour\""),
            "8:18: `sweep_interval`: `1 hour` is no duration: write numbers with ms, s, m, h or d, as in `90s` or `1h30m`",
        ),
        (mirror("sweep_interval = \"1ms\""), "8:18: `sweep_interval` must be between 1s and 30d, not 1ms"),
        (
            mirror("[[peer]]\nnode = \"b\"\naddresses = [\"mail2:7440\"]"),
            "10:14: `mail2:7440` is no address: write IP:PORT, as in `192.0.2.7:7440` or `[2001:db8::7]:7440`",
        ),
        (mirror("[[peer]]\nnode = \"a\""), "9:8: peer `a` has this node's own name; each node needs its own"),
        (mirror("[[peer]]\nnode = \"b\"\n[[peer]]\nnode = \"b\""), "11:8: a second peer is called `b`; the first is on line 9"),
        (mirror("[peer]\nnode = \"b\""), "8:1: `peer` must be written with double brackets, not a table"),
        (second("m", "/q"), "9:8: a second mirror is called `m`; the first is on line 4"),
        (second("n", "/r"), "10:8: mirrors `m` and `n` have the same root"),
        (second("n", "/r/x"), "10:8: the root of `n` lies inside the root of `m`; mirrors must not overlap"),
        (second("n", "/"), "2:9: the state directory lies inside the root of `n`; it would mirror itself. Move it outside"),
        (second("n", "/s/x"), "10:8: the root of `n` lies inside the state directory; move one of them"),
        (second("N", "/q"), "9:8: `N` is no mirror name: use 1 to 64 of a-z, 0-9, `_` and `-`"),
        (mirror("").replace("\"/r\"", "\"r\""), "5:8: `root` must be an absolute path without `.` or `..`, not `r`"),
        (mirror("").replace("\"/s\"", "\"/a/../b\""), "2:9: `state` must be an absolute path without `.` or `..`, not `/a/../b`"),
        (
            mirror("").replace("maildir", "maildri"),
            "6:10: unknown layout `maildri`; did you mean `maildir`? the layouts are maildir, sdbox, mdbox, mbox and plain",
        ),
        (mirror("").replace("role = \"primary\"\n", ""), "3:1: [[mirror]] lacks `role`: primary or standby"),
        (mirror("").replace("node = \"a\"\n", ""), "1:1: the top level lacks `node`: this node's name"),
        ("node = \"a\"\nstate = \"/s\"\nmirror = []".to_owned(), "1:1: `mirror` is an empty list"),
        (format!("listen = []\n{}", mirror("")), "1:10: `listen` is an empty list"),
    ] {
        let found = problems(&text);
        assert!(found.iter().any(|line| line == expected), "wanted {expected}\nfound {found:#?}\nin\n{text}");
    }
    let syntax = problems("node = \"a\"\nstate = /s");
    assert!(syntax[0].starts_with("2:9: not valid TOML: "), "{syntax:?}");
}

#[test]
fn all_mistakes_are_told_at_once() {
    let found = problems("nod = \"a\"\nstate = 3\n[[mirror]]\nname = \"m\"\nrooot = \"/r\"\nlayout = \"x\"\nrole = \"boss\"\n");
    assert_eq!(found.len(), 7, "{found:#?}");
    let error = Config::parse("nod = 1").expect_err("wrong").to_string();
    assert!(error.contains("line 1:1: unknown key `nod` in the top level; did you mean `node`?"), "{error}");
}

#[test]
fn files() {
    let dir = tempfile::tempdir().expect("scratch directory");
    let path = dir.path().join("twinbox.toml");
    assert!(matches!(Config::load(&path), Err(ConfigError::NotFound { .. })));
    assert!(matches!(Config::load(dir.path()), Err(ConfigError::Unreadable { .. })));
    fs::write(&path, b"node = \"a\"\n\xff").expect("write");
    assert!(matches!(Config::load(&path), Err(ConfigError::NotUtf8 { line: 2, .. })));

    // Two names of one directory: only the disk knows.
    let root = dir.path().join("root");
    fs::create_dir(&root).expect("mkdir");
    symlink(&root, dir.path().join("alias")).expect("symlink");
    let text = FULL
        .replace("/srv/mail/", &root.display().to_string())
        .replace("/var/lib/twinbox", &dir.path().join("alias/state").display().to_string());
    assert!(Config::parse(&text).is_ok());
    fs::write(&path, &text).expect("write");
    let error = Config::load(&path).expect_err("state inside the root");
    let ConfigError::Invalid { problems, .. } = &error else { panic!("{error}") };
    assert!(matches!(problems.as_slice()[0].kind, ProblemKind::StateInRoot { .. }));
    assert!(error.to_string().starts_with(&format!("{}:4:9: ", path.display())), "{error}");
}

#[test]
fn init_writes_once() {
    let dir = tempfile::tempdir().expect("scratch directory");
    let path = dir.path().join("twinbox.toml");
    let config = Config::parse(FULL).expect("valid");
    config.create_file(&path).expect("written");
    assert_eq!(Config::load(&path).expect("loads"), config);
    assert!(matches!(config.create_file(&path), Err(ConfigError::Exists { .. })));
}

#[test]
fn a_peer_is_added_below_everything_else() {
    let edited = upsert_peer(FULL, &peer("mail3", "abc")).expect("edited");
    assert!(edited.starts_with(FULL), "the operator's text is untouched");
    let config = Config::parse(&edited).expect("valid");
    assert_eq!(config.peers.len(), 2);
    assert_eq!(config.peer("mail3"), Some(&peer("mail3", "abc")));
    assert_eq!(upsert_peer(&edited, &peer("mail3", "abc")).expect("again"), edited);
}

#[test]
fn a_peer_is_updated_in_place() {
    let edited = upsert_peer(FULL, &peer("mail2", "abc")).expect("edited");
    let expected = FULL.replace(
        "node = \"mail2\"   # in the cellar\naddresses = [\"192.0.2.8:7440\"] # rack 2",
        "node = \"mail2\"   # in the cellar\nfingerprint = \"abc\"\naddresses = [\"198.51.100.1:9\"] # rack 2",
    );
    assert_eq!(edited, expected);
    let again = upsert_peer(&edited, &peer("mail2", "def")).expect("edited");
    assert_eq!(again, expected.replace("abc", "def"));
}

#[test]
fn unusual_spellings_are_edited_or_refused_never_broken() {
    let base = FULL.split("[[peer]]").next().expect("the part before");
    let inline = format!("peer = [{{ node = \"mail2\" }}]\n{base}");
    let edited = upsert_peer(&inline, &peer("mail2", "abc")).expect("edited");
    assert_eq!(Config::parse(&edited).expect("valid").peers, [peer("mail2", "abc")]);
    let refused = upsert_peer(&inline, &peer("mail3", "abc"));
    assert!(matches!(&refused, Err(ConfigError::CannotEdit { block }) if block.contains("mail3")), "{refused:?}");
    let unterminated = FULL.trim_end();
    assert!(upsert_peer(unterminated, &peer("mail3", "abc")).is_ok());
}

#[test]
fn a_refusal_never_steers_the_terminal_it_is_printed_on() {
    let top = "node = \"a\\u001b[2J\"\nstate = \"x\\u001b]0;owned\\u0007\"\n";
    let mirror = "[[mirror]]\nname = \"m\\u0007\"\nroot = \"r\\u009b\"\nlayout = \"\\u001b[31m\"\nrole = \"\\u0000\"\nsweep_interval = \"\\u0008\"\n";
    let text = format!("{top}{mirror}{mirror}[[peer]]\nnode = \"a\\u001b[2J\"\n");
    let found = problems(&text);
    assert!(found.len() > 8, "{found:?}");
    assert!(found.iter().all(|line| !line.chars().any(char::is_control)), "{found:?}");
    let long = problems(&format!("state = \"{}\"\n", "x".repeat(100_000)));
    assert!(long.iter().all(|line| line.len() < 2_100), "{}", long.iter().map(String::len).max().unwrap_or(0));
}

#[test]
fn a_peer_is_written_atomically_with_the_mode_kept() {
    let dir = tempfile::tempdir().expect("scratch directory");
    let path = dir.path().join("twinbox.toml");
    fs::write(&path, FULL).expect("write");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o604)).expect("chmod");
    upsert_peer_file(&path, &peer("mail2", "abc")).expect("edited");
    assert_eq!(fs::metadata(&path).expect("stat").permissions().mode() & 0o777, 0o604);
    assert_eq!(Config::load(&path).expect("valid").peers, [peer("mail2", "abc")]);
}

proptest! {
    #[test]
    fn any_text_is_read_or_refused(text in ".{0,200}") {
        let _ = Config::parse(&text);
    }

    /// Cuts and overwrites a good file somewhere: never a panic, and what is accepted survives being written.
    #[test]
    fn damaged_files(at in 0..FULL.len(), len in 0usize..12, junk in "[\\[\\]\"=\na-z0-9{}#.]{0,6}") {
        let mut text = FULL.to_owned();
        text.replace_range(at..(at + len).min(FULL.len()), &junk);
        if let Ok(config) = Config::parse(&text) {
            prop_assert_eq!(Config::parse(&config.to_toml()).expect("reads its own writing"), config);
            let edited = upsert_peer(&text, &peer("mail2", "abc"));
            prop_assert!(!edited.is_ok_and(|edited| Config::parse(&edited).is_err()));
        }
    }
}
