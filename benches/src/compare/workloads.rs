//! What is done to the store, and when the replica counts as having it.
//!
//! Each workload begins with a store that is in step (or, `first_sync`, with a replica that is empty), and ends when every path that was touched
//! has size and modification time (whole seconds: not all carry more) of the store, or is gone there. Then, outside of the measured time, both trees are compared byte for byte.

use std::collections::BTreeMap;
use std::fs::{self, File, FileTimes};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, bail, ensure};
use twinbox_tests::arrivals::{watch, watches};
use twinbox_tests::bench::Samples;
use twinbox_tests::fence::Client;
use twinbox_tests::gate::{nap, nap_until};
use twinbox_tests::mailload::{message, sized_message};
use twinbox_tests::rng::Rng;

use super::arena::{Arena, Cost};
use super::peers::{Peer, Running};
use crate::burst::{Burst, mailboxes};

/// Who has not got there by then is not slow but stuck.
const LIMIT: Duration = Duration::from_secs(600);
/// Pause between two looks at the replica.
const LOOK: Duration = Duration::from_millis(2);
const USERS: usize = 100;
const PAGE: usize = 4096;
const MIB: usize = 1 << 20;

/// What one workload gave, by name of the figure.
pub type Figures = BTreeMap<&'static str, f64>;

/// A workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
#[allow(missing_docs)]
pub enum Workload {
    Lag,
    Fence,
    Burst,
    FirstSync,
    CatchUp,
    Append,
    Pages,
    Insert,
    Shared,
    Flags,
    Order,
}

/// How large they are, in parts of the full size.
#[derive(Debug, Clone, Copy)]
pub struct Scale {
    /// Full size is 100.
    pub percent: usize,
    /// Files in the store of the outage.
    pub files: usize,
}

impl Scale {
    fn of(self, full: usize) -> usize {
        (full * self.percent / 100).max(1)
    }
}

impl Workload {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::Lag,
        Self::Fence,
        Self::Burst,
        Self::FirstSync,
        Self::CatchUp,
        Self::Append,
        Self::Pages,
        Self::Insert,
        Self::Shared,
        Self::Flags,
        Self::Order,
    ];

    /// What is done.
    #[must_use]
    pub fn title(self, scale: Scale) -> String {
        match self {
            Self::Lag => format!("100 messages/s for {} s: from the rename here to the name there", scale.of(30)),
            Self::Fence => "one delivery and its fence at a time".into(),
            Self::Burst => format!("{} messages at once, {} MB", scale.of(5_000), scale.of(225)),
            Self::FirstSync => format!("first sync of {} small files", scale.of(100_000)),
            Self::CatchUp => format!("1,400 changes in {} files while the link was cut", scale.files),
            Self::Append => format!("50 appends of 10 KiB to a file of {} MiB", scale.of(200)),
            Self::Pages => format!("200 random pages of 4 KiB in a file of {} MiB", scale.of(200)),
            Self::Insert => format!("1 KiB inserted near the front of {} MiB", scale.of(200)),
            Self::Shared => "one message of 1 MiB to 100 users".into(),
            Self::Flags => format!("{} flag renames", scale.of(5_000)),
            Self::Order => format!("A then B, 200/s for {} s: is B ever newer than A there?", scale.of(20)),
        }
    }

    /// Whether this contender can be measured by it.
    #[must_use]
    pub fn suits(self, peer: Peer) -> bool {
        self != Self::Fence || peer == Peer::Twinbox
    }

    /// One round.
    ///
    /// # Errors
    /// It could not be done, or the replica did not get there.
    pub fn run(self, peer: Peer, arena: &Arena, scale: Scale) -> anyhow::Result<Figures> {
        self.prepare(&arena.source, scale).context("making the store")?;
        let ready = peer.set_up(arena)?;
        if self == Self::FirstSync {
            let (taken, cost) = arena.measure(|| {
                let began = Instant::now();
                let mut running = ready.start()?;
                whole(arena, &mut running)?;
                Ok((began.elapsed(), running))
            })?;
            arena.same()?;
            return Ok(figures(taken.0, scale.of(100_000) as u64 * 500, cost));
        }
        let mut running = ready.start()?;
        whole(arena, &mut running)?;
        arena.calm();
        let figures = match self {
            Self::Lag => lag(arena, &mut running, scale)?,
            Self::Fence => fence(arena, &running, scale)?,
            Self::Append => append(arena, &mut running)?,
            Self::Order => order(arena, &mut running, scale)?,
            _ => {
                if self == Self::CatchUp {
                    arena.cable.cut();
                    // Long enough for everybody to notice.
                    nap(Duration::from_secs(5));
                }
                let ((taken, payload), cost) = arena.measure(|| {
                    let mut began = Instant::now();
                    let (touched, payload) = self.change(&arena.source, scale)?;
                    if self == Self::CatchUp {
                        arena.cable.restore();
                        began = Instant::now();
                    }
                    reached(arena, &mut running, touched)?;
                    Ok((began.elapsed(), payload))
                })?;
                figures(taken, payload, cost)
            }
        };
        drop(running);
        arena.same()?;
        Ok(figures)
    }

    /// Makes the store it begins with.
    ///
    /// # Errors
    /// The file system's.
    pub fn prepare(self, store: &Path, scale: Scale) -> std::io::Result<()> {
        mailboxes(store, USERS)?;
        let messages = match self {
            Self::FirstSync => scale.of(100_000),
            Self::CatchUp => scale.files,
            Self::Flags => scale.of(5_000),
            _ => 1_000,
        };
        for n in 0..messages {
            let body = sized_message(&mut Rng::new(n as u64), n, 500);
            old(&store.join(kept(n)), &body)?;
        }
        if matches!(self, Self::Append | Self::Pages | Self::Insert) {
            old(&store.join("big"), &Rng::new(5).bytes(scale.of(200) * MIB))?;
        }
        Ok(())
    }

    /// Changes the store; which paths, and how many bytes are new.
    fn change(self, store: &Path, scale: Scale) -> anyhow::Result<(Vec<PathBuf>, u64)> {
        let (mut touched, mut payload) = (vec![], 0);
        match self {
            Self::Burst => {
                let burst = Burst::new(scale.of(5_000), scale.of(225) * 1_000_000, USERS, 1);
                burst.deliver(store)?;
                (touched, payload) = (burst.paths(), burst.bytes);
            }
            Self::CatchUp => {
                for n in 0..1_000 {
                    let body = sized_message(&mut Rng::new(77_000 + n as u64), n, 3_000);
                    payload += body.len() as u64;
                    touched.push(delivered(store, n, &body)?);
                }
                for n in 0..200 {
                    touched.extend(flagged(store, n)?);
                }
                for n in 200..400 {
                    fs::remove_file(store.join(kept(n)))?;
                    touched.push(kept(n));
                }
            }
            Self::Pages => {
                let (mut rng, file) = (Rng::new(2), File::options().write(true).open(store.join("big"))?);
                for _ in 0..200 {
                    let page = rng.below(scale.of(200) * MIB / PAGE) * PAGE;
                    file.write_all_at(&rng.bytes(PAGE), page as u64)?;
                }
                (touched, payload) = (vec!["big".into()], 200 * PAGE as u64);
            }
            Self::Insert => {
                let mut content = fs::read(store.join("big"))?;
                content.splice(5_000..5_000, Rng::new(3).bytes(1 << 10));
                fs::write(store.join("user000/tmp/big"), content)?;
                fs::rename(store.join("user000/tmp/big"), store.join("big"))?;
                (touched, payload) = (vec!["big".into()], 1 << 10);
            }
            Self::Shared => {
                let body = sized_message(&mut Rng::new(4), 1, MIB);
                for n in 0..USERS {
                    touched.push(delivered(store, n, &body)?);
                }
                payload = body.len() as u64;
            }
            Self::Flags => {
                for n in 0..scale.of(5_000) {
                    touched.extend(flagged(store, n)?);
                }
            }
            _ => bail!("nothing to change at once"),
        }
        Ok((touched, payload))
    }
}

fn kept(n: usize) -> PathBuf {
    format!("user{:03}/cur/16000{n:07}.M{n}P7.host,S=500:2,", n % USERS).into()
}

/// A file that was last changed long ago.
fn old(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    file.set_times(FileTimes::new().set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(1_600_000_000)))
}

fn delivered(store: &Path, n: usize, body: &[u8]) -> std::io::Result<PathBuf> {
    let (user, name) = (format!("user{:03}", n % USERS), format!("1700000000.M{n}P9.host"));
    let (tmp, new) = (store.join(&user).join("tmp").join(&name), Path::new(&user).join("new").join(&name));
    fs::write(&tmp, body)?;
    fs::rename(tmp, store.join(&new))?;
    Ok(new)
}

fn flagged(store: &Path, n: usize) -> std::io::Result<[PathBuf; 2]> {
    let from = kept(n);
    let mut to = from.clone().into_os_string();
    to.push("S");
    fs::rename(store.join(&from), store.join(&to))?;
    Ok([from, to.into()])
}

fn figures(taken: Duration, payload: u64, cost: Cost) -> Figures {
    let mut all = of_cost(cost);
    all.insert("seconds", taken.as_secs_f64());
    all.insert("payload_bytes", payload as f64);
    all
}

fn of_cost(cost: Cost) -> Figures {
    let [primary, standby] = cost.cpu.map(|cpu| cpu.as_secs_f64());
    BTreeMap::from([
        ("wire_bytes", cost.wire as f64),
        ("cpu_primary_s", primary),
        ("cpu_standby_s", standby),
        ("rss_primary_bytes", cost.peak[0] as f64),
        ("rss_standby_bytes", cost.peak[1] as f64),
    ])
}

fn lags(all: &mut Figures, lag: &Samples) {
    let ms = |percent| lag.percentile(percent).as_secs_f64() * 1e3;
    all.extend([("lag_p50_ms", ms(50)), ("lag_p99_ms", ms(99)), ("lag_max_ms", ms(100))]);
}

/// Size and whole seconds of a file; `None` when it is not there.
fn stamp(path: &Path) -> Option<(u64, i64)> {
    fs::symlink_metadata(path).ok().map(|meta| (meta.len(), meta.mtime()))
}

/// Waits until the replica has what the store has at these paths.
fn reached(arena: &Arena, running: &mut Running, touched: Vec<PathBuf>) -> anyhow::Result<()> {
    let began = Instant::now();
    let mut left: Vec<(PathBuf, Option<(u64, i64)>)> = vec![];
    for path in touched {
        let stamp = stamp(&arena.source.join(&path));
        left.push((path, stamp));
    }
    // From the last to the first: most of them copy in order, and what is there stays.
    while let Some((path, wanted)) = left.last() {
        if stamp(&arena.replica.join(path)) == *wanted {
            left.pop();
            continue;
        }
        running.check()?;
        ensure!(began.elapsed() < LIMIT, "{} of the changes not within {} s", left.len(), LIMIT.as_secs());
        nap(LOOK);
    }
    Ok(())
}

/// Files and bytes in a tree.
fn tally(dir: &Path) -> (u64, u64) {
    let (mut files, mut bytes) = (0, 0);
    for item in fs::read_dir(dir).into_iter().flatten().flatten() {
        let Ok(kind) = item.file_type() else { continue };
        if kind.is_dir() {
            let below = if item.file_name() == "tmp" || item.file_name() == ".stfolder" { (0, 0) } else { tally(&item.path()) };
            (files, bytes) = (files + below.0 + 1, bytes + below.1);
        } else if item.file_name() != ".stignore"
            && let Ok(meta) = item.metadata()
        {
            (files, bytes) = (files + 1, bytes + meta.len());
        }
    }
    (files, bytes)
}

/// Waits until the replica holds as much as the store.
fn whole(arena: &Arena, running: &mut Running) -> anyhow::Result<()> {
    let (began, wanted) = (Instant::now(), tally(&arena.source));
    loop {
        let look = Instant::now();
        if tally(&arena.replica) == wanted {
            return Ok(());
        }
        running.check()?;
        ensure!(began.elapsed() < LIMIT, "the first sync is not done within {} s", LIMIT.as_secs());
        // Looking takes time from who is looked at: at most a tenth.
        nap((look.elapsed() * 10).max(LOOK));
    }
}

fn lag(arena: &Arena, running: &mut Running, scale: Scale) -> anyhow::Result<Figures> {
    const RATE: usize = 100;
    let dirs: Vec<PathBuf> = (0..USERS).map(|n| arena.replica.join(format!("user{n:03}/new"))).collect();
    let events = watches(&dirs);
    let (stop, stopped): (Sender<()>, Receiver<()>) = channel();
    let mut rng = Rng::new(1);
    let bodies: Vec<Vec<u8>> = (0..64).map(|n| message(&mut rng, n)).collect();
    let ((sent, seen, payload), cost) = std::thread::scope(|scope| {
        // Ours from here: dropped also when a wait below fails, or the scope would wait for the watch for ever.
        let stop = stop;
        let watching = scope.spawn(move || watch(&events, &stopped));
        arena.measure(|| {
            let (began, mut sent, mut touched, mut payload) = (Instant::now(), BTreeMap::new(), vec![], 0);
            for n in 0..RATE * scale.of(30) {
                nap_until(began + Duration::from_secs_f64(n as f64 / RATE as f64));
                let body = &bodies[n % bodies.len()];
                let (user, name) = (arena.source.join(format!("user{:03}", n % USERS)), format!("1700000000.M{n}P9.host"));
                let tmp = user.join("tmp").join(&name);
                let mut file = File::create(&tmp)?;
                file.write_all(body)?;
                file.sync_all()?;
                drop(file);
                fs::rename(&tmp, user.join("new").join(&name))?;
                sent.insert(name.clone(), Instant::now());
                touched.push(Path::new(&format!("user{:03}/new", n % USERS)).join(name));
                payload += body.len() as u64;
            }
            reached(arena, running, touched)?;
            drop::<Sender<()>>(stop);
            Ok((sent, watching.join().expect("the watch panicked"), payload))
        })
    })?;
    let mut lag = Samples::default();
    for (name, began) in sent {
        let arrived = seen.get(&name).with_context(|| format!("{name} was not seen to arrive"))?;
        lag.push(arrived.saturating_duration_since(began));
    }
    let mut all = of_cost(cost);
    all.insert("payload_bytes", payload as f64);
    lags(&mut all, &lag);
    Ok(all)
}

fn fence(arena: &Arena, running: &Running, scale: Scale) -> anyhow::Result<Figures> {
    let mut client = Client::connect(running.state().context("no agent")?)?;
    let mut samples = Samples::default();
    for n in 0..scale.of(300) {
        let path = arena.source.join(delivered(&arena.source, n, b"a message\n")?);
        let began = Instant::now();
        ensure!(client.fence(&path, 30)?, "a fence failed");
        samples.push(began.elapsed());
        nap(Duration::from_millis(20));
    }
    let mut all = Figures::new();
    lags(&mut all, &samples);
    Ok(all)
}

fn append(arena: &Arena, running: &mut Running) -> anyhow::Result<Figures> {
    const APPENDED: usize = 10 << 10;
    let (mut samples, mut payload) = (Samples::default(), 0);
    let ((), cost) = arena.measure(|| {
        for n in 0..50 {
            // Closed each time, as mail servers do: some hear of a change only then.
            File::options().append(true).open(arena.source.join("big"))?.write_all(&Rng::new(100 + n).bytes(APPENDED))?;
            payload += APPENDED as u64;
            let began = Instant::now();
            reached(arena, running, vec!["big".into()])?;
            samples.push(began.elapsed());
            nap(Duration::from_millis(50));
        }
        Ok(())
    })?;
    let mut all = of_cost(cost);
    all.insert("payload_bytes", payload as f64);
    lags(&mut all, &samples);
    Ok(all)
}

/// A writer replaces A, then B, each with the number of its round, and between them, by name, a file of 20 MiB twice a second.
fn order(arena: &Arena, running: &mut Running, scale: Scale) -> anyhow::Result<Figures> {
    const RATE: usize = 200;
    let box_of = |root: &Path| root.join("user000/cur");
    let (here, there) = (box_of(&arena.source), box_of(&arena.replica));
    let put = |name: &str, bytes: &[u8]| -> anyhow::Result<()> {
        let tmp = arena.source.join("user000/tmp").join(name);
        fs::write(&tmp, bytes)?;
        Ok(fs::rename(tmp, here.join(name))?)
    };
    let number = |path: &Path| fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<u64>().ok());
    let (big, mut samples, mut wrong) = (Rng::new(9).bytes(20 * MIB), 0u64, 0u64);
    let (stop, stopped) = channel::<()>();
    std::thread::scope(|scope| {
        let there = &there;
        let looking = scope.spawn(move || {
            let (mut samples, mut wrong) = (0, 0);
            while stopped.try_recv() == Err(std::sync::mpsc::TryRecvError::Empty) {
                // B first: what A is read to be afterwards can only be newer.
                let b = number(&there.join("c-B"));
                let a = number(&there.join("a-A"));
                if let (Some(a), Some(b)) = (a, b) {
                    samples += 1;
                    wrong += u64::from(b > a);
                }
                nap(LOOK);
            }
            (samples, wrong)
        });
        let mut write = || -> anyhow::Result<()> {
            let began = Instant::now();
            for n in 1..=RATE * scale.of(20) {
                nap_until(began + Duration::from_secs_f64(n as f64 / RATE as f64));
                put("a-A", format!("{n}\n").as_bytes())?;
                if n % (RATE / 2) == 0 {
                    put("b-big", &big)?;
                }
                put("c-B", format!("{n}\n").as_bytes())?;
            }
            reached(arena, running, ["a-A", "b-big", "c-B"].map(|name| Path::new("user000/cur").join(name)).to_vec())
        };
        let done = write();
        drop(stop);
        (samples, wrong) = looking.join().expect("the reader panicked");
        done
    })?;
    // The same size and second as before: the last ones may still be on their way.
    let began = Instant::now();
    while number(&there.join("c-B")) != number(&here.join("c-B")) || number(&there.join("a-A")) != number(&here.join("a-A")) {
        ensure!(began.elapsed() < LIMIT, "the last numbers do not arrive");
        running.check()?;
        nap(LOOK);
    }
    Ok(BTreeMap::from([("samples", samples as f64), ("b_newer_than_a", wrong as f64)]))
}
