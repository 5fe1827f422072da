//! End to end: a burst of mail into a store that `twinbox mirror` keeps in step, until the replica is the same in number and bytes; beside
//! `rsync -a` of the same messages, alternated in the same run. How to read and rerun it is in `benches/README.md`.
//!
//! Only for figures: what is asserted about the mirror is the tests' business, but a replica that differs ends the run.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use clap::Parser;
use rustix::process::{Pid, Signal, kill_process};
use twinbox_benches::burst::{Burst, mailboxes};
use twinbox_tests::bench::Samples;

/// How often the replica is counted: coarse enough not to be the load itself.
const LOOK: Duration = Duration::from_millis(20);
/// A mirror that takes longer than this is not slow but stuck.
const LIMIT: Duration = Duration::from_secs(600);
/// The first message, which shows that the mirror follows.
const PROBE: &str = "user000/new/0.probe";

#[derive(Debug, Parser)]
#[command(about = "Throughput of `twinbox mirror`, beside rsync")]
struct Options {
    /// Messages in the burst
    #[arg(long, default_value_t = 5_000)]
    messages: usize,
    /// Bytes of all messages together
    #[arg(long, default_value_t = 225_000_000)]
    bytes: usize,
    /// Mailboxes they go to
    #[arg(long, default_value_t = 50)]
    users: usize,
    /// Rounds of each contender
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Draws sizes and text
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Where source and replica lie [default: the system's temporary directory]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// rsync, too, makes each file durable (`--fsync`, rsync 3.2.4 or later)
    #[arg(long)]
    rsync_fsync: bool,
    /// One JSON object instead of the table
    #[arg(long)]
    json: bool,
}

/// What is compared while the clock runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Tally {
    files: u64,
    bytes: u64,
}

fn tally(dir: &Path) -> Tally {
    let mut sum = Tally::default();
    let Ok(items) = fs::read_dir(dir) else { return sum };
    for item in items.flatten() {
        let Ok(kind) = item.file_type() else { continue };
        if kind.is_dir() {
            let below = tally(&item.path());
            sum = Tally { files: sum.files + below.files, bytes: sum.bytes + below.bytes };
        } else if let Ok(meta) = item.metadata() {
            sum = Tally { files: sum.files + 1, bytes: sum.bytes + meta.len() };
        }
    }
    sum
}

/// Waits until `done`, at most [`LIMIT`].
fn until(what: &str, mut done: impl FnMut() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    let (_never, pause) = mpsc::channel::<()>();
    let began = Instant::now();
    while !done()? {
        ensure!(began.elapsed() < LIMIT, "{what}: not within {} s", LIMIT.as_secs());
        let _ = pause.recv_timeout(LOOK);
    }
    Ok(())
}

/// A store with empty mailboxes and the probe.
fn store(dir: &Path, users: usize) -> anyhow::Result<PathBuf> {
    let store = dir.join("source");
    mailboxes(&store, users)?;
    fs::write(store.join(PROBE), "probe\n")?;
    Ok(store)
}

/// The agent, ended when dropped.
struct Agent(Child);

impl Agent {
    fn start(program: &Path, source: &Path, replica: &Path, state: &Path) -> anyhow::Result<Self> {
        let child = Command::new(program)
            .args(["mirror", "--quiet", "--layout", "maildir", "--state"])
            .args([state, source, replica])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .with_context(|| {
                format!("cannot start {}: build it with `cargo build --release -p twinbox`, or set TWINBOX_BIN", program.display())
            })?;
        Ok(Agent(child))
    }

    fn running(&mut self) -> anyhow::Result<()> {
        match self.0.try_wait()? {
            Some(status) => bail!("the mirror ended: {status}"),
            None => Ok(()),
        }
    }

    fn stop(mut self) -> anyhow::Result<()> {
        if let Some(pid) = Pid::from_raw(self.0.id() as i32) {
            kill_process(pid, Signal::TERM)?;
        }
        until("the mirror's end", || Ok(self.0.try_wait()?.is_some()))
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What one round took.
struct Round {
    /// The burst itself, first message to last.
    written: Duration,
    /// First message to a replica that is the same.
    done: Duration,
}

fn by_twinbox(program: &Path, dir: &Path, burst: &Burst, users: usize) -> anyhow::Result<Round> {
    let (source, replica) = (store(dir, users)?, dir.join("replica"));
    let mut agent = Agent::start(program, &source, &replica, &dir.join("state"))?;
    until("the first sync", || {
        agent.running()?;
        Ok(replica.join(PROBE).exists())
    })?;
    let began = Instant::now();
    let written = burst.deliver(&source)?;
    let wanted = tally(&source);
    until("the burst in the replica", || {
        agent.running()?;
        Ok(tally(&replica) == wanted)
    })?;
    let done = began.elapsed();
    agent.stop()?;
    same(&source, &replica)?;
    Ok(Round { written, done })
}

fn by_rsync(dir: &Path, burst: &Burst, options: &Options) -> anyhow::Result<Round> {
    let (source, replica) = (store(dir, options.users)?, dir.join("replica"));
    rsync(&source, &replica, options.rsync_fsync)?;
    let began = Instant::now();
    let written = burst.deliver(&source)?;
    rsync(&source, &replica, options.rsync_fsync)?;
    let done = began.elapsed();
    same(&source, &replica)?;
    Ok(Round { written, done })
}

fn rsync(source: &Path, replica: &Path, fsync: bool) -> anyhow::Result<()> {
    let mut from = source.as_os_str().to_owned();
    from.push("/");
    let mut command = Command::new("rsync");
    command.arg("-a").args(fsync.then_some("--fsync")).arg(from).arg(replica);
    let status = command.status().context("rsync must be installed")?;
    ensure!(status.success(), "rsync: {status}");
    Ok(())
}

/// Byte for byte, outside the measured time.
fn same(source: &Path, replica: &Path) -> anyhow::Result<()> {
    let status = Command::new("diff").args(["-rq", "--no-dereference"]).args([source, replica]).status().context("diff")?;
    ensure!(status.success(), "the replica differs from the source");
    Ok(())
}

/// One row of the result.
#[derive(Default)]
struct Contender {
    written: Samples,
    done: Samples,
    behind: Samples,
}

impl Contender {
    fn take(&mut self, round: &Round) {
        self.written.push(round.written);
        self.done.push(round.done);
        self.behind.push(round.done - round.written);
    }
}

fn program() -> PathBuf {
    match std::env::var_os("TWINBOX_BIN") {
        Some(path) => path.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/release/twinbox"),
    }
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    ensure!(options.rounds > 0 && options.messages > 0, "at least one round and one message");
    let program = program();
    let burst = Burst::new(options.messages, options.bytes, options.users, options.seed);
    let (mut twinbox, mut rsync) = (Contender::default(), Contender::default());
    for round in 1..=options.rounds {
        for ours in [true, false] {
            let base = options.dir.clone().unwrap_or_else(std::env::temp_dir);
            let scratch = tempfile::Builder::new().prefix("twinbox-throughput-").tempdir_in(base)?;
            let (name, contender) = if ours { ("twinbox", &mut twinbox) } else { ("rsync", &mut rsync) };
            let took = match ours {
                true => by_twinbox(&program, scratch.path(), &burst, options.users)?,
                false => by_rsync(scratch.path(), &burst, &options)?,
            };
            eprintln!("round {round}: {name} {:.2} s", took.done.as_secs_f64());
            contender.take(&took);
            // What this round left dirty must not be written back during the next one.
            rustix::fs::sync();
        }
    }
    report(&options, &burst, &[("twinbox", &twinbox), ("rsync -a", &rsync)])
}

fn report(options: &Options, burst: &Burst, contenders: &[(&str, &Contender)]) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    let seconds = |samples: &Samples, percent| samples.percentile(percent).as_secs_f64();
    let rates = |time: f64| (burst.bytes as f64 / 1e6 / time.max(1e-9), burst.len() as f64 / time.max(1e-9));
    if options.json {
        let figures: serde_json::Map<String, serde_json::Value> = contenders
            .iter()
            .map(|(name, c)| {
                let (mb_per_s, messages_per_s) = rates(seconds(&c.done, 50));
                let spread = |samples: &Samples| serde_json::json!({ "median": seconds(samples, 50), "min": seconds(samples, 1), "max": seconds(samples, 100) });
                let figures = serde_json::json!({
                    "burst_s": spread(&c.written), "identical_s": spread(&c.done), "behind_s": spread(&c.behind),
                    "mb_per_s": mb_per_s, "messages_per_s": messages_per_s,
                });
                ((*name).to_owned(), figures)
            })
            .collect();
        let result = serde_json::json!({
            "messages": burst.len(), "bytes": burst.bytes, "rounds": options.rounds, "seed": options.seed,
            "rsync_fsync": options.rsync_fsync, "contenders": figures,
        });
        writeln!(out, "{result}")?;
        return Ok(());
    }
    writeln!(out, "{} messages, {:.1} MB, {} rounds, medians", burst.len(), burst.bytes as f64 / 1e6, options.rounds)?;
    writeln!(
        out,
        "{:<10} {:>9} {:>12} {:>10} {:>9} {:>11}   identical, min to max",
        "", "burst s", "identical s", "behind s", "MB/s", "messages/s"
    )?;
    for (name, c) in contenders {
        let (mb, messages) = rates(seconds(&c.done, 50));
        writeln!(
            out,
            "{name:<10} {:>9.2} {:>12.2} {:>10.2} {mb:>9.1} {messages:>11.0}   {:.2} to {:.2}",
            seconds(&c.written, 50),
            seconds(&c.done, 50),
            seconds(&c.behind, 50),
            seconds(&c.done, 1),
            seconds(&c.done, 100)
        )?;
    }
    Ok(())
}
