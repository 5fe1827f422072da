//! Delivery lag, from the rename on the primary to the name on the replica, at a steady pace; with the floor of the same run and
//! the memory of each end over many files.
//!
//! `cargo run -p twinbox-tests --bin lag [-- --mirror] [--fences] [--rate N] [--seconds N] [--files N]`. Two agents on loopback; with `--mirror`,
//! one process (`twinbox mirror`); with `--fences`, each delivery is followed by a fence of its own, waited for beside the next ones. Figures that are compared with anything want `--release` for the product (`TWINBOX_BIN`).

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use twinbox_tests::arrivals::{watch, watches};
use twinbox_tests::bench::{Samples, floor, memory};
use twinbox_tests::fence::Client;
use twinbox_tests::gate::nap_until;
use twinbox_tests::live::Live;
use twinbox_tests::mailload::message;
use twinbox_tests::node::Pair;
use twinbox_tests::rng::Rng;
use twinbox_tests::scratch::Scratch;
use twinbox_tests::tree::{Layout, Rules, wait_identical};

const USERS: usize = 10;
const LIMIT: Duration = Duration::from_secs(300);

/// What is measured.
enum Mirror {
    Pair(Box<Pair>),
    Live(Box<Live>),
}

impl Mirror {
    fn processes(&mut self) -> Vec<(&'static str, u32)> {
        match self {
            Self::Pair(pair) => vec![("primary", pair.primary.agent().pid()), ("standby", pair.standby.agent().pid())],
            Self::Live(live) => vec![("both ends", live.process().pid())],
        }
    }

    fn stop(self) {
        match self {
            Self::Pair(mut pair) => {
                pair.primary.stop();
                pair.standby.stop();
            }
            Self::Live(live) => drop(live.stop()),
        }
    }
}

fn option(name: &str, default: usize) -> usize {
    let mut words = std::env::args().skip_while(|w| w != name).skip(1);
    words.next().map_or(default, |w| w.parse().unwrap_or_else(|_| panic!("{name} wants a number")))
}

/// As a mail server delivers: into `tmp`, made durable, renamed to `new`; the moment the rename had returned.
fn deliver(root: &Path, n: usize, body: &[u8]) -> (String, Instant) {
    let home = root.join(format!("user{}/Maildir", n % USERS));
    let name = format!("1700000000.M{n}P1.host");
    let tmp = home.join("tmp").join(&name);
    let mut file = fs::File::create(&tmp).expect("create");
    file.write_all(body).expect("write");
    file.sync_all().expect("fsync");
    drop(file);
    fs::rename(&tmp, home.join("new").join(&name)).expect("rename");
    (name, Instant::now())
}

/// Fences every path, some at a time; how long each took.
fn fences(state: &Path, asked: &Receiver<PathBuf>) -> Samples {
    const LANES: usize = 8;
    let samples = std::sync::Mutex::new(Samples::default());
    std::thread::scope(|scope| {
        let mut lanes: Vec<Sender<(PathBuf, Instant)>> = vec![];
        for _ in 0..LANES {
            let (send, work) = channel::<(PathBuf, Instant)>();
            lanes.push(send);
            let samples = &samples;
            scope.spawn(move || {
                let mut client = Client::connect(state).expect("the agent's socket");
                while let Ok((path, asked)) = work.recv() {
                    assert!(client.fence(&path, 30).expect("an answer"), "a fence failed");
                    samples.lock().expect("no panics while locked").push(asked.elapsed());
                }
            });
        }
        let mut n = 0;
        while let Ok(path) = asked.recv() {
            n += 1;
            let _ = lanes[n % LANES].send((path, Instant::now()));
        }
    });
    samples.into_inner().expect("no panics while locked")
}

fn main() {
    let (rate, seconds, files) = (option("--rate", 100), option("--seconds", 30), option("--files", 100_000));
    let single = std::env::args().any(|w| w == "--mirror");
    let scratch = Scratch::new("lag");
    let (root, replica) = (scratch.dir("store"), scratch.dir("replica"));
    for n in 0..USERS {
        for part in ["tmp", "new", "cur"] {
            fs::create_dir_all(root.join(format!("user{n}/Maildir/{part}"))).expect("create");
        }
    }
    let mut mirror = if single {
        Mirror::Live(Box::new(Live::start(&root, &replica, scratch.path(), Layout::Maildir)))
    } else {
        Mirror::Pair(Box::new(Pair::on_loopback(scratch.path(), &root, &replica, Layout::Maildir)))
    };
    let state = match &mirror {
        Mirror::Pair(pair) if std::env::args().any(|w| w == "--fences") => Some(pair.primary.state.clone()),
        _ => None,
    };
    let rules = Rules::of(Layout::Maildir);
    let settle = || wait_identical(&root, &replica, rules, LIMIT).unwrap_or_else(|why| panic!("{why}"));
    settle();
    println!("floor before   {}", floor(scratch.path(), 300).expect("floor"));

    let dirs: Vec<_> = (0..USERS).map(|n| replica.join(format!("user{n}/Maildir/new"))).collect();
    let events = watches(&dirs);
    let (stop, stopped) = channel();
    let (lag, late, floors) = std::thread::scope(|scope| {
        // Ours from here: dropped also when a wait below fails, or the scope would wait for the watch for ever.
        let stop = stop;
        let watching = scope.spawn(move || watch(&events, &stopped));
        let mut rng = Rng::new(1);
        let bodies: Vec<Vec<u8>> = (0..64).map(|n| message(&mut rng, n)).collect();
        let began = Instant::now();
        let mut sent = BTreeMap::new();
        let mut late = Duration::ZERO;
        let (ask, asked) = channel::<PathBuf>();
        let fencing = state.as_ref().map(|state| scope.spawn(move || fences(state, &asked)));
        for n in 0..rate * seconds {
            let due = began + Duration::from_secs_f64(n as f64 / rate as f64);
            nap_until(due);
            late = late.max(due.elapsed());
            let (name, moment) = deliver(&root, n, &bodies[n % bodies.len()]);
            if fencing.is_some() {
                let _ = ask.send(root.join(format!("user{}/Maildir/new/{name}", n % USERS)));
            }
            sent.insert(name, moment);
        }
        drop(ask);
        if let Some(fenced) = fencing {
            println!("fences         {}", fenced.join().expect("the fences panicked"));
        }
        settle();
        let floors = floor(scratch.path(), 300).expect("floor");
        drop::<Sender<()>>(stop);
        let seen = watching.join().expect("the watch panicked");
        let mut lag = Samples::default();
        for (name, began) in sent {
            let arrived = seen.get(&name).unwrap_or_else(|| panic!("{name} was not seen to arrive"));
            lag.push(arrived.saturating_duration_since(began));
        }
        (lag, late, floors)
    });
    println!("delivery lag   {lag}   ({rate}/s for {seconds} s; the load itself was at most {late:.1?} late)");
    println!("floor after    {floors}");
    let ratio = |percent| lag.percentile(percent).as_secs_f64() / floors.percentile(50).as_secs_f64();
    println!("lag / floor p50: p50 {:.1}, p99 {:.1}", ratio(50), ratio(99));

    for n in 0..files {
        let path = root.join(format!("user{}/Maildir/cur/1600000000.M{n}P1.host:2,S", n % USERS));
        fs::write(path, format!("From: a@b\r\n\r\nmessage {n}\r\n")).expect("write");
    }
    let began = Instant::now();
    settle();
    println!("{files} small files more: identical {:.1?} after the last was written", began.elapsed());
    for (what, pid) in mirror.processes() {
        let memory = memory(pid).expect("memory figures");
        println!("memory         {what}: {} MiB resident, {} MiB at most", memory.resident >> 10, memory.peak >> 10);
    }
    mirror.stop();
}
