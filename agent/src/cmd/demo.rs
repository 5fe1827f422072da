//! `twinbox demo`: a sample Maildir store, mirrored live with the same code, with mail delivered into it while the lag is shown; then both sides are compared.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until, timeout};

use crate::capture::Command;
use crate::cli::Demo;
use crate::cmd::compare;
use crate::exit::ExitCode;
use crate::failure::Failure;
use crate::layout::{Layout, Selection};
use crate::local::{LocalPair, LocalSpec};

/// Mailboxes of the sample store.
const USERS: usize = 20;
/// Messages in each to begin with.
const MESSAGES: usize = 50;
/// Deliveries a second.
const RATE: u64 = 50;
/// A delivery that is not there by then has been lost.
const LOST_AFTER: Duration = Duration::from_secs(10);

fn failed(what: &Path) -> impl Fn(std::io::Error) -> Failure + '_ {
    move |error| Failure::io(&what.display().to_string(), &error)
}

/// A message of 1 to 30 KiB, the same for the same number.
fn message(n: u64) -> Vec<u8> {
    let mut noise = vec![0; 700 + (n as usize * 7919) % 22_000];
    blake3::Hasher::new().update(&n.to_le_bytes()).finalize_xof().fill(&mut noise);
    let mut text =
        format!("From: demo@example.org\r\nTo: user@example.org\r\nSubject: message {n}\r\nMIME-Version: 1.0\r\n\r\n").into_bytes();
    for line in data_encoding::BASE64.encode(&noise).as_bytes().chunks(76) {
        text.extend_from_slice(line);
        text.extend_from_slice(b"\r\n");
    }
    text
}

/// As a mail server delivers: written in tmp/, synced, renamed into new/. Gives the path below the store.
fn deliver(store: &Path, n: u64) -> Result<PathBuf, Failure> {
    let mailbox = PathBuf::from(format!("user{:02}/Maildir", n as usize % USERS));
    let name = format!("{n}.M{n}P{}.demo", std::process::id());
    let tmp = store.join(&mailbox).join("tmp").join(&name);
    let to = mailbox.join("new").join(&name);
    fs::write(&tmp, message(n)).map_err(failed(&tmp))?;
    fs::File::open(&tmp).and_then(|f| f.sync_all()).map_err(failed(&tmp))?;
    fs::rename(&tmp, store.join(&to)).map_err(failed(&tmp))?;
    Ok(to)
}

fn percentile(sorted: &[Duration], percent: usize) -> f64 {
    sorted.get((sorted.len() * percent / 100).min(sorted.len().saturating_sub(1))).map_or(0.0, |d| d.as_secs_f64() * 1e3)
}

/// Runs the command.
///
/// # Errors
/// [`Failure`].
pub async fn run(args: &Demo, quiet: bool) -> Result<ExitCode, Failure> {
    let say = |text: String| {
        if !quiet {
            println!("{text}");
        }
    };
    let dir = tempfile::Builder::new().prefix("twinbox-demo-").tempdir().map_err(|e| Failure::io("temporary directory", &e))?;
    let base = dir.path().to_path_buf();
    let (source, replica) = (base.join("primary"), base.join("replica"));
    let sub = ["tmp", "new", "cur"];
    for user in 0..USERS {
        for sub in sub {
            let path = source.join(format!("user{user:02}/Maildir/{sub}"));
            fs::create_dir_all(&path).map_err(failed(&path))?;
        }
    }
    for n in 0..(USERS * MESSAGES) as u64 {
        let path = source.join(format!("user{:02}/Maildir/cur/{n}.M{n}.demo:2,S", n as usize % USERS));
        fs::write(&path, message(n)).map_err(failed(&path))?;
    }
    say(format!("A sample store: {USERS} mailboxes, {} messages, in {}", USERS * MESSAGES, source.display()));
    let spec = LocalSpec {
        source: source.clone(),
        replica: replica.clone(),
        state: base.join("state"),
        layout: Layout::Maildir,
        exclude: vec![],
        adopt: false,
    };
    let started = Instant::now();
    let pair = tokio::task::block_in_place(|| LocalPair::start(&spec))?;
    let capture = pair.capture();
    capture.ask(Command::Sync).await.ok_or_else(|| broken(&capture))?;
    say(format!("First sync over QUIC to {}: {:.2} s", replica.display(), started.elapsed().as_secs_f64()));
    say(format!("Delivering {RATE} messages a second for {} s (Ctrl-C ends it early)", args.seconds));
    let (mut lags, mut lost, mut delivered) = (vec![], 0u64, (USERS * MESSAGES) as u64);
    let end = Instant::now() + Duration::from_secs(args.seconds);
    let mut tick = interval(Duration::from_micros(1_000_000 / RATE));
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut shown = Instant::now();
    let mut interrupted = std::pin::pin!(tokio::signal::ctrl_c());
    while Instant::now() < end {
        tokio::select! {
            _ = &mut interrupted => break,
            _ = tick.tick() => {}
        }
        let path = deliver(&source, delivered)?;
        let sent = Instant::now();
        delivered += 1;
        while !replica.join(&path).exists() {
            if sent.elapsed() > LOST_AFTER {
                lost += 1;
                break;
            }
            sleep_until(Instant::now() + Duration::from_micros(200)).await;
        }
        lags.push(sent.elapsed());
        if shown.elapsed() >= Duration::from_secs(1) {
            shown = Instant::now();
            let now = capture.status();
            let mut recent: Vec<Duration> = lags.iter().rev().take(RATE as usize).copied().collect();
            recent.sort();
            say(format!(
                "  standby at LSN {:>6}   lag p50 {:>6.2} ms  max {:>6.2} ms   pending {}",
                now.lsn.2,
                percentile(&recent, 50),
                percentile(&recent, 100),
                now.pending_paths
            ));
        }
    }
    if timeout(LOST_AFTER, capture.ask(Command::Sync)).await.is_err() {
        lost += 1;
    }
    let wire = pair.status().map_or(0, |s| s.totals.wire_sent);
    tokio::task::block_in_place(|| pair.stop());
    let selection = Selection::new(Layout::Maildir, vec![]);
    let (a, b) = (compare::snapshot(&compare::open(&source)?, &selection)?, compare::snapshot(&compare::open(&replica)?, &selection)?);
    let found = compare::differences(&a, &b);
    lags.sort();
    say(format!(
        "{} deliveries; rename on the primary to visible on the replica: p50 {:.2} ms, p99 {:.2} ms, max {:.2} ms; {} on the wire",
        lags.len(),
        percentile(&lags, 50),
        percentile(&lags, 99),
        percentile(&lags, 100),
        crate::status::bytes_text(wire)
    ));
    let code = if found.is_empty() && lost == 0 {
        say(format!("Both sides compared: identical, {} entries (names, content, owners, times).", a.entries.len()));
        ExitCode::Ok
    } else {
        for (path, what) in found.iter().take(10) {
            eprintln!("differs: {path}: {what}");
        }
        eprintln!(
            "Both sides compared: {} differences, {lost} deliveries not seen in time. This is a defect: please report it.",
            found.len()
        );
        ExitCode::Differs
    };
    if args.keep {
        let kept = dir.keep();
        say(format!("Kept in {}", kept.display()));
    }
    Ok(code)
}

fn broken(capture: &crate::capture::CaptureHandle) -> Failure {
    Failure::new(ExitCode::Failure, capture.status().failed.unwrap_or_else(|| "the mirror ended by itself".into()))
}
