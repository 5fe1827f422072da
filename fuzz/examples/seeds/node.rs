//! Seeds of what a node reads from its operator.

use std::path::PathBuf;

use twinbox::config::{Config, DEFAULT_SWEEP, Limits, Log, Mirror, Peer, Role};
use twinbox::layout::Layout;
use twinbox::link::zstream::Compressor;
use twinbox_protocol::codec::encode;

use crate::{seed, wire};

/// Compressed frames as they are, and lengths for the target to compress by.
pub(crate) fn expander() {
    for (name, long) in [("stream-log", true), ("stream-bulk", false)] {
        let mut compressor = Compressor::new(long).expect("an encoder");
        let mut stream = vec![];
        for (_, op) in wire::ops() {
            compressor.frame(&encode(&wire::frame(7, vec![op]))).expect("compresses");
            stream.extend(compressor.flush().expect("flushes"));
        }
        seed("expander", name, &[&[0x20][..], &stream].concat());
    }
    let mut zeros = Compressor::new(false).expect("an encoder");
    for _ in 0..40 {
        zeros.frame(&[0; 60_000]).expect("compresses");
    }
    seed("expander", "mostly-zeros", &[&[0xfe][..], &zeros.flush().expect("flushes")].concat());
    seed("expander", "ours-short", &[&[1, 3][..], b"abc", &[0, 5], b"hello", &[200], wire::MAIL].concat());
    seed("expander", "ours-long", &[&[3, 255][..], &[b'x'; 255], &[254], &[b'x'; 254]].concat());
}

fn example() -> Config {
    let mirror = |name: &str, root: &str, layout, role| Mirror {
        name: name.parse().expect("a name"),
        root: PathBuf::from(root),
        layout,
        role,
        groups: vec!["*/*".parse().expect("a pattern")],
        exclude: vec!["*.bak".parse().expect("a pattern"), "cache/**".parse().expect("a pattern")],
        sweep_interval: DEFAULT_SWEEP,
        fuzzy_after: None,
    };
    Config {
        node: "mail-a".parse().expect("a name"),
        state: PathBuf::from("/var/lib/twinbox"),
        listen: vec!["0.0.0.0:7440".parse().expect("an address")],
        limits: Limits::default(),
        hooks: twinbox::hooks::Hooks::default(),
        fence: None,
        log: Log::default(),
        mirrors: vec![
            mirror("mail", "/srv/mail", Layout::Maildir, Role::Primary),
            mirror("archive", "/srv/archive", Layout::Mdbox, Role::Standby),
        ],
        peers: vec![Peer {
            node: "mail-b".parse().expect("a name"),
            addresses: vec!["192.0.2.7:7440".parse().expect("an address")],
            fingerprint: Some("abcdef0123456789".into()),
        }],
    }
}

/// A file as `init` writes it, as people write it, and with mistakes.
pub(crate) fn config() {
    seed("config", "written", example().to_toml().as_bytes());
    let top = "node = \"a\"\nstate = \"/var/lib/twinbox\"\n";
    let mirror = "[[mirror]]\nname = \"m\"\nroot = \"/srv/m\"\nlayout = \"maildir\"\nrole = \"primary\"\n";
    seed("config", "least", format!("{top}{mirror}").as_bytes());
    seed("config", "inline-peer", format!("peer = [{{ node = \"b\" }}] # kept\n{top}{mirror}").as_bytes());
    seed("config", "peer-without-end-of-line", format!("{top}{mirror}[[peer]]\nnode = 'b' # no more").as_bytes());
    seed(
        "config",
        "all-keys",
        format!(
            "{top}listen = [\"127.0.0.1:1\", \"[::]:2\"]\n[limits]\nmemory_mib = 0x40\ndirty_paths_max = 1_000\nredo_max_mib = 64\nbulk_streams = 1\n\
             [log]\nlevel = \"debug\"\nformat = \"json\"\n{mirror}groups = \"*/*\"\nexclude = [\"[!a]*\"]\nsweep_interval = \"1h30m\"\n"
        )
        .as_bytes(),
    );
    seed("config", "mistakes", format!("nodee = 1\nlisten = []\n{top}[limits]\nmemory_mib = 1\n{mirror}{mirror}").as_bytes());
    seed("config", "no-toml", b"node = [\n");
    seed("config", "escapes", b"node = \"\\u001b[2J\"\nstate = \"a\\u0007b\"\n[log]\nlevel = \"\\u0000\"\n");
}

/// A code, and payloads for the target to make codes of.
pub(crate) fn pair_code() {
    let payload = |name: &str, addrs: &[std::net::SocketAddr]| encode(&(1u8, name, addrs, [7u8; 32], [8u8; 16], 1_800_000_000u64));
    let (four, six) = ("192.0.2.7:7440".parse().expect("an address"), "[2001:db8::7]:7440".parse().expect("an address"));
    seed("pair_code", "payload", &[&[1][..], &payload("mail-a", &[four])].concat());
    seed("pair_code", "payload-two-addresses", &[&[1][..], &payload("m", &[four, six])].concat());
    seed("pair_code", "payload-no-address", &[&[1][..], &payload("m", &[])].concat());
    seed("pair_code", "payload-bad-name", &[&[1][..], &payload("../m", &[six])].concat());
    seed("pair_code", "text-prefix", b"\0 twinbox-pair:\n ");
    // The fixed secret pairs with nobody: no node ever offered it.
    seed("pair_code", "text-wrong-sum", b"\0twinbox-pair:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa");
}

/// Pattern, NUL, path.
pub(crate) fn glob() {
    for (name, pattern, path) in [
        ("runs", "*a*b*c*", "xxaxxbxxcxx"),
        ("dirs", "**/cur/**", "a/b/cur/1"),
        ("dirs-end", "**", "a/b"),
        ("class", "[!a-z]?\\*", "A-*"),
        ("class-odd", "[]a-]*/", "]x"),
        ("anchored", "a/*/c/", "a/b/c"),
        ("unclosed", "[a", "a"),
        ("many-runs", &"*a".repeat(200), &"a".repeat(400)),
    ] {
        seed("glob", name, &[pattern.as_bytes(), &[0], path.as_bytes()].concat());
    }
}
