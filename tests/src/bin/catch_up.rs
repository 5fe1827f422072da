//! How long a standby takes to catch up, and what it costs: after the link was away, after the primary's agent was away, and when nothing was changed at all.
//!
//! `cargo run -p twinbox-tests --bin catch_up [-- --files N] [--changes N] [--rounds N]`. As root, two agents in two network namespaces: wire bytes are those of the interface, with every header, both ways. Beside each: what rsync takes for
//! the same changes over a pipe, which compares names, sizes and times of both trees. Figures that are compared with anything want `--release` for the product (`TWINBOX_BIN`).

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use twinbox_tests::bench::{memory, rsync};
use twinbox_tests::gate::{Need, missing, wait_until};
use twinbox_tests::mailload::sized_message;
use twinbox_tests::netns::Cable;
use twinbox_tests::node::Pair;
use twinbox_tests::rng::Rng;
use twinbox_tests::scratch::Scratch;
use twinbox_tests::tree::Layout;

const USERS: usize = 100;
const LIMIT: Duration = Duration::from_secs(3_600);

fn option(name: &str, default: usize) -> usize {
    let mut words = std::env::args().skip_while(|w| w != name).skip(1);
    words.next().map_or(default, |w| w.parse().unwrap_or_else(|_| panic!("{name} wants a number")))
}

fn maildir(root: &Path, user: usize) -> PathBuf {
    root.join(format!("user{user:03}/Maildir"))
}

fn old(root: &Path, n: usize, flags: &str) -> PathBuf {
    maildir(root, n % USERS).join(format!("cur/17{n:08}.M{n}P7.host,S=300:2,{flags}"))
}

/// What a mail server does in a while: of ten changes five deliveries, three flags, one deletion, one move to another folder. Gives the bytes of new mail.
fn change(root: &Path, count: usize, from: usize) -> u64 {
    let mut bytes = 0;
    for n in from..from + count {
        let at = n * 7; // Old messages here and there, each once.
        match n % 10 {
            0..5 => {
                let message = sized_message(&mut Rng::new(n as u64), n, 4_000);
                let (tmp, new) =
                    (maildir(root, n % USERS).join("tmp/x"), maildir(root, n % USERS).join(format!("new/18{n:08}.M{n}P7.host")));
                bytes += message.len() as u64;
                fs::write(&tmp, message).expect("write");
                fs::rename(tmp, new).expect("rename");
            }
            5..8 => fs::rename(old(root, at, "S"), old(root, at, "RS")).expect("rename"),
            8 => fs::remove_file(old(root, at, "S")).expect("remove"),
            _ => {
                let name = format!(".Old/cur/18{n:08}.M{n}P7.host:2,S");
                fs::rename(old(root, at, "S"), maildir(root, at % USERS).join(name)).expect("rename");
            }
        }
    }
    bytes
}

fn processor(pid: u32) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("stat");
    let fields: Vec<&str> = stat.rsplit_once(')').expect("stat").1.split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>().expect("utime") + fields[12].parse::<u64>().expect("stime");
    Duration::from_millis(ticks * 10)
}

fn main() {
    if let Some(why) = missing(Need::Namespaces) {
        eprintln!("not measured: {why}");
        return;
    }
    let (files, changes, rounds) = (option("--files", 100_000), option("--changes", 1_400), option("--rounds", 3));
    assert!(files > 7 * changes * 3 * rounds, "fewer files than changes");
    let scratch = Scratch::new("catch-up");
    let (root, replica, copy) = (scratch.dir("store"), scratch.dir("replica"), scratch.dir("rsync"));
    for user in 0..USERS {
        for part in ["tmp", "new", "cur", ".Old/tmp", ".Old/new", ".Old/cur"] {
            fs::create_dir_all(maildir(&root, user).join(part)).expect("create");
        }
    }
    for n in 0..files {
        fs::write(old(&root, n, "S"), sized_message(&mut Rng::new(n as u64), n, 300)).expect("write");
    }
    let began = Instant::now();
    let (mut pair, cable): (Pair, Cable) = Pair::over_cable(scratch.path(), &root, &replica, Layout::Maildir);
    pair.wait_drained(LIMIT);
    println!("{files} files; first sync {:.1?}", began.elapsed());
    let began = Instant::now();
    rsync(&root, &copy).expect("rsync");
    println!("rsync's first copy {:.1?}", began.elapsed());

    let mut next = 0;
    for _ in 0..rounds {
        for what in ["link away", "agent away", "agent away, nothing changed"] {
            let (away, quiet) = (what != "link away", what.ends_with("nothing changed"));
            if away {
                pair.primary.kill9();
            } else {
                cable.cut();
                pair.primary.wait_state(LIMIT, "unprotected");
            }
            let bytes = if quiet { 0 } else { change(&root, changes, next) };
            next += if quiet { 0 } else { changes };
            let (began, wire) = (Instant::now(), cable.a.bytes().total());
            if away {
                pair.primary.start()
            } else {
                cable.restore()
            }
            // A fence over everything: what was changed before is durable on the standby, found by an event or by comparing.
            wait_until(LIMIT, "a fence", || pair.primary.command(&["fence", "--timeout", "3600s"]).status.success());
            let (took, wire) = (began.elapsed(), cable.a.bytes().total() - wire);
            pair.wait_drained(LIMIT);
            let there = |n: usize| maildir(&replica, n % USERS).join(format!("new/18{n:08}.M{n}P7.host")).exists();
            assert!(quiet || (next - changes..next).filter(|n| n % 10 < 5).all(there), "the fence was let through too early");
            let pid = pair.primary.agent().pid();
            let memory = memory(pid).expect("memory figures");
            let began = Instant::now();
            let theirs = rsync(&root, &copy).expect("rsync");
            #[allow(clippy::cast_precision_loss)]
            let ratio = if bytes > 0 { format!("{:.2}", wire as f64 / bytes as f64) } else { "–".into() };
            println!(
                "{what:<28} {took:>8.2?}   wire {wire:>9} of {bytes:>8} new: {ratio}   primary {} MiB, {:.2?} of processor since its start   rsync {:.2?}, {theirs} bytes",
                memory.peak >> 10,
                processor(pid),
                began.elapsed(),
            );
        }
    }
    pair.primary.stop();
    pair.standby.stop();
}
