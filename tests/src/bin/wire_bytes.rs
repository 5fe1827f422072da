//! Bytes on the wire for the changes a mail store sees, beside what `rsync` moves for the same.
//!
//! `cargo run -p twinbox-tests --bin wire_bytes`. As root, two agents in two network namespaces: the figures are those of the
//! interface, with every header, both ways. Else on loopback: the agents' own totals. What idle agents exchange (heartbeats, canary)
//! is measured first and taken off in the last column.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use twinbox_tests::bench::rsync;
use twinbox_tests::gate::{Need, missing, nap_until, scaled};
use twinbox_tests::mailload::sized_message;
use twinbox_tests::netns::Cable;
use twinbox_tests::node::Pair;
use twinbox_tests::rng::Rng;
use twinbox_tests::scratch::Scratch;
use twinbox_tests::tree::{Layout, Rules, wait_identical};
use twinbox_tests::twinbox::Program;

const USERS: usize = 100;
const BIG: usize = 200 << 20;
const PAGE: usize = 4096;
const LIMIT: Duration = Duration::from_secs(300);

/// The pair under measurement and how its traffic is counted.
struct Line {
    pair: Pair,
    cable: Option<Cable>,
}

impl Line {
    /// Bytes so far: on the interface, and as the agents count.
    fn bytes(&self) -> (Option<u64>, Option<u64>) {
        let own = |node: &twinbox_tests::node::Node| node.status().and_then(|s| s.total("wire_sent"));
        let counted = own(&self.pair.primary).zip(own(&self.pair.standby)).map(|(a, b)| a + b);
        (self.cable.as_ref().map(|c| c.a.bytes().total()), counted)
    }

    fn best(&self) -> u64 {
        let (interface, counted) = self.bytes();
        interface.or(counted).expect("neither root nor `totals.wire_sent`: nothing to count by")
    }
}

type Change = (&'static str, Box<dyn FnMut() -> u64>);

fn changes(root: &Path) -> Vec<Change> {
    let big = root.join("big");
    let open = |path: &Path| fs::OpenOptions::new().write(true).open(path).expect("open");
    let user = |root: &Path, n: usize| root.join(format!("user{n:03}/Maildir"));
    let (b1, b2, b3, b4) = (big.clone(), big.clone(), big.clone(), big);
    let (r1, r2): (PathBuf, PathBuf) = (root.into(), root.into());
    vec![
        (
            "200 MiB file: 10 KiB appended",
            Box::new(move || {
                let at = fs::metadata(&b1).expect("stat").len();
                open(&b1).write_all_at(&Rng::new(1).bytes(10 << 10), at).expect("write");
                10 << 10
            }),
        ),
        (
            "200 MiB file: 50 times 10 KiB appended",
            Box::new(move || {
                for n in 0..50 {
                    let at = fs::metadata(&b2).expect("stat").len();
                    open(&b2).write_all_at(&Rng::new(100 + n).bytes(10 << 10), at).expect("write");
                }
                500 << 10
            }),
        ),
        (
            "200 MiB file: 200 random 4 KiB pages",
            Box::new(move || {
                let mut rng = Rng::new(2);
                let file = open(&b3);
                for _ in 0..200 {
                    let page = rng.below(BIG / PAGE) * PAGE;
                    file.write_all_at(&rng.bytes(PAGE), page as u64).expect("write");
                }
                200 * PAGE as u64
            }),
        ),
        (
            "200 MiB file: 1 KiB inserted near the front",
            Box::new(move || {
                let mut content = fs::read(&b4).expect("read");
                let insert = Rng::new(3).bytes(1 << 10);
                content.splice(5_000..5_000, insert);
                let fresh = b4.with_extension("new");
                fs::write(&fresh, content).expect("write");
                fs::rename(fresh, &b4).expect("rename");
                1 << 10
            }),
        ),
        (
            "one 1 MiB message to 100 users",
            Box::new(move || {
                let message = sized_message(&mut Rng::new(4), 1, 1 << 20);
                for n in 0..USERS {
                    let tmp = user(&r1, n).join("tmp/shared");
                    fs::write(&tmp, &message).expect("write");
                    fs::rename(tmp, user(&r1, n).join("new/1700000000.M9P9.host")).expect("rename");
                }
                message.len() as u64
            }),
        ),
        (
            "5,000 flag renames",
            Box::new(move || {
                for n in 0..scaled(5_000) {
                    let cur = user(&r2, n % USERS).join("cur");
                    let name = format!("17000{n:05}.M{n}P7.host,S=700:2,");
                    fs::rename(cur.join(&name), cur.join(format!("{name}S"))).expect("rename");
                }
                0
            }),
        ),
    ]
}

fn main() {
    let scratch = Scratch::new("wire");
    let (root, replica, copy) = (scratch.dir("store"), scratch.dir("replica"), scratch.dir("rsync"));
    for n in 0..USERS {
        for part in ["tmp", "new", "cur"] {
            fs::create_dir_all(root.join(format!("user{n:03}/Maildir/{part}"))).expect("create");
        }
    }
    for n in 0..scaled(5_000) {
        let message = sized_message(&mut Rng::new(n as u64), n, 700);
        let path = root.join(format!("user{:03}/Maildir/cur/17000{n:05}.M{n}P7.host,S=700:2,", n % USERS));
        fs::write(path, message).expect("write");
    }
    fs::write(root.join("big"), Rng::new(5).bytes(BIG)).expect("write");

    let cable = missing(Need::Namespaces).is_none().then(Cable::new);
    let pair = match &cable {
        Some(cable) => Pair::start(
            scratch.path(),
            &root,
            &replica,
            Layout::Maildir,
            [Program::within(&cable.a), Program::within(&cable.b)],
            [SocketAddr::new(cable.a.address, 7440), SocketAddr::new(cable.b.address, 7440)],
        ),
        None => Pair::on_loopback(scratch.path(), &root, &replica, Layout::Maildir),
    };
    let line = Line { pair, cable };
    let rules = Rules::of(Layout::Maildir);
    let settle = || {
        wait_identical(&root, &replica, rules, LIMIT).unwrap_or_else(|why| panic!("{why}"));
        line.pair.wait_drained(LIMIT);
    };
    settle();
    rsync(&root, &copy).expect("rsync");

    let before = (Instant::now(), line.best());
    nap_until(before.0 + Duration::from_secs(5));
    #[allow(clippy::cast_precision_loss)]
    let idle = (line.best() - before.1) as f64 / before.0.elapsed().as_secs_f64();
    println!("idle: {idle:.0} bytes/s, both ways");
    println!("{:<46}{:>11}{:>13}{:>13}{:>13}{:>13}", "change", "changed", "rsync", "interface", "agents say", "less idle");
    for (what, mut change) in changes(&root) {
        let (began, before) = (Instant::now(), line.bytes());
        let changed = change();
        settle();
        let after = line.bytes();
        let moved = |a: Option<u64>, b: Option<u64>| a.zip(b).map(|(a, b)| a - b);
        let (interface, counted) = (moved(after.0, before.0), moved(after.1, before.1));
        #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation)]
        let net = interface.or(counted).map(|n| n as i64 - (idle * began.elapsed().as_secs_f64()) as i64);
        let theirs = rsync(&root, &copy).expect("rsync");
        let text = |n: Option<i64>| n.map_or_else(|| "–".to_owned(), |n| n.to_string());
        let unsigned = |n: Option<u64>| text(n.map(|n| n as i64));
        println!("{what:<46}{changed:>11}{theirs:>13}{:>13}{:>13}{:>13}", unsigned(interface), unsigned(counted), text(net));
    }
    let Line { mut pair, .. } = line;
    pair.primary.stop();
    pair.standby.stop();
}
