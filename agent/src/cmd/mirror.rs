//! `twinbox mirror SRC DST`: both ends in one process, until Ctrl-C or, with `--once`, until in sync.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use crate::capture::{CaptureStatus, Command};
use crate::cli::Mirror;
use crate::exit::ExitCode;
use crate::failure::Failure;
use crate::local::{LocalPair, LocalSpec};
use crate::status::{bytes_text, span_text};

/// How long Ctrl-C waits for what is under way.
const DRAIN: Duration = Duration::from_secs(60);

/// Where state goes by default: one directory for each pair of directories.
fn default_state(source: &Path, replica: &Path) -> Result<PathBuf, Failure> {
    let base = std::env::var_os("XDG_STATE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local/state")))
        .ok_or_else(|| Failure::new(ExitCode::Usage, "neither HOME nor XDG_STATE_HOME is set: say where state goes with --state DIR"))?;
    let absolute = |path: &Path| std::fs::canonicalize(path).or_else(|_| std::path::absolute(path)).unwrap_or_else(|_| path.into());
    let mut hasher = blake3::Hasher::new();
    for path in [source, replica] {
        hasher.update(absolute(path).as_os_str().as_encoded_bytes());
        hasher.update(&[0]);
    }
    Ok(base.join("twinbox").join(format!("mirror-{}", &hasher.finalize().to_hex()[..16])))
}

/// Files and bytes of the source, counted beside the work so that the bar can tell what is left.
#[derive(Default)]
struct Total {
    files: AtomicU64,
    bytes: AtomicU64,
    done: AtomicU64,
}

fn count(dir: &Path, total: &Total) {
    use std::os::unix::fs::MetadataExt;
    let Ok(items) = std::fs::read_dir(dir) else { return };
    for item in items.flatten() {
        let Ok(meta) = item.metadata() else { continue };
        total.files.fetch_add(1, Ordering::Relaxed);
        total.bytes.fetch_add(if meta.is_file() { meta.size() } else { 0 }, Ordering::Relaxed);
        if meta.is_dir() {
            count(&item.path(), total);
        }
    }
}

/// Runs the command.
///
/// # Errors
/// [`Failure`].
pub async fn run(args: &Mirror, quiet: bool) -> Result<ExitCode, Failure> {
    let state = match &args.state {
        Some(state) => state.clone(),
        None => default_state(&args.src, &args.dst)?,
    };
    let spec = LocalSpec {
        source: args.src.clone(),
        replica: args.dst.clone(),
        state,
        layout: args.layout,
        exclude: args.exclude.clone(),
        adopt: args.adopt,
    };
    let failed = |error: std::io::Error| Failure::io("signals", &error);
    let (mut interrupt, mut terminate) =
        (signal(SignalKind::interrupt()).map_err(failed)?, signal(SignalKind::terminate()).map_err(failed)?);
    let started = Instant::now();
    let pair = tokio::task::block_in_place(|| LocalPair::start(&spec))?;
    if !rustix::process::geteuid().is_root() && !quiet {
        eprintln!(
            "Running as an ordinary user: ownership is not kept, and files of other users that are held open are watched less strictly."
        );
    }
    let total = Arc::new(Total::default());
    {
        let (total, source) = (total.clone(), args.src.clone());
        std::thread::spawn(move || {
            count(&source, &total);
            total.done.store(1, Ordering::Release);
        });
    }
    let bar = bar(quiet || args.json);
    let capture = pair.capture();
    let mut synced = Box::pin(capture.ask(Command::Sync));
    let (mut in_sync, mut told) = (false, std::collections::BTreeSet::new());
    let mut tick = interval(Duration::from_millis(if bar.is_hidden() { 1000 } else { 200 }));
    tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let stopped_by = loop {
        tokio::select! {
            _ = interrupt.recv() => break "interrupted",
            _ = terminate.recv() => break "asked to stop",
            done = &mut synced, if !in_sync => {
                in_sync = true;
                if done.is_some() && !quiet && !args.json {
                    bar.suspend(|| eprintln!("In sync after {}.", span_text(started.elapsed())));
                }
                if args.once && done.is_some() {
                    break "in sync";
                }
            }
            _ = tick.tick() => {}
        }
        let now = capture.status();
        if let Some(why) = &now.failed {
            return Err(stopped(why));
        }
        if let Some(status) = pair.status() {
            if args.json {
                println!("{}", serde_json::to_string(&status).unwrap_or_default());
            }
            if let (false, Some(error)) = (now.connected, &status.last_error)
                && status.state == crate::status::MirrorState::Diverged
            {
                return Err(Failure::new(ExitCode::Peer, error.message.clone()));
            }
        }
        for (path, why) in now.unreadable.iter().filter(|(_, why)| !why.is_empty()) {
            if told.insert(path.clone()) && !quiet {
                bar.suspend(|| eprintln!("Cannot read {path}: {why}. The rest goes on; it is tried again every few seconds."));
            }
        }
        told.retain(|path| now.unreadable.contains_key(path));
        show(&bar, &now, &total, in_sync);
    };
    let mut code = ExitCode::Ok;
    if stopped_by != "in sync" {
        bar.set_message("finishing what is under way…");
        // A second Ctrl-C does not wait.
        let drained = tokio::select! {
            drained = timeout(DRAIN, capture.ask(Command::Sync)) => matches!(drained, Ok(Some(()))),
            _ = interrupt.recv() => false,
        };
        if !drained {
            code = ExitCode::Interrupted;
        }
    }
    bar.finish_and_clear();
    let now = capture.status();
    let status = pair.status();
    tokio::task::block_in_place(|| pair.stop());
    if !quiet && !args.json {
        summary(&now, status.as_ref(), started.elapsed(), code == ExitCode::Ok);
    }
    if args.once && !now.unreadable.is_empty() {
        let list: Vec<String> = now.unreadable.iter().take(5).map(|(path, why)| format!("  {path}: {why}")).collect();
        let message = format!("{} paths could not be read and are not in the replica:\n{}", now.unreadable.len(), list.join("\n"));
        return Err(Failure::new(ExitCode::Permission, message));
    }
    Ok(code)
}

fn stopped(why: &str) -> Failure {
    Failure::new(code_of_stop(why), why)
}

/// The exit code for a capture that ended by itself.
#[must_use]
pub fn code_of_stop(why: &str) -> ExitCode {
    if why.contains("fs.inotify") {
        ExitCode::Watches
    } else if why.contains("moved, removed or unmounted") {
        ExitCode::BadPath
    } else {
        ExitCode::Failure
    }
}

fn bar(hidden: bool) -> ProgressBar {
    let target =
        if hidden || !std::io::stderr().is_terminal() { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr_with_hz(5) };
    let bar = ProgressBar::with_draw_target(Some(0), target);
    if let Ok(style) = ProgressStyle::with_template("{spinner} {wide_msg}") {
        bar.set_style(style);
    }
    bar
}

fn show(bar: &ProgressBar, now: &CaptureStatus, total: &Total, in_sync: bool) {
    if bar.is_hidden() {
        return;
    }
    if in_sync {
        bar.set_message(format!(
            "live  lag {}  pending {} paths  capture to durable p50 {:.1} ms  {} txns",
            span_text(Duration::from_millis(now.lag_ms)),
            now.pending_paths,
            now.durable_us.0 as f64 / 1e3,
            now.txns
        ));
    } else {
        let (files, bytes) = (total.files.load(Ordering::Relaxed).max(now.files), total.bytes.load(Ordering::Relaxed).max(now.bytes));
        if total.done.load(Ordering::Acquire) == 1
            && bar.length() != Some(files)
            && let Ok(style) = ProgressStyle::with_template("{spinner} [{wide_bar}] {pos}/{len} files  {msg}  ETA {eta}")
        {
            bar.set_style(style.progress_chars("=> "));
            bar.set_length(files);
        }
        bar.set_position(now.files.min(files));
        bar.set_message(format!("{} of {}", bytes_text(now.bytes), bytes_text(bytes)));
    }
    bar.tick();
}

fn summary(now: &CaptureStatus, status: Option<&crate::status::MirrorStatus>, took: Duration, in_sync: bool) {
    let sent = status.map_or(0, |s| s.totals.wire_sent);
    eprintln!(
        "{}: {} files in {} transactions, {} captured, {} on the wire, in {}.",
        if in_sync { "In sync" } else { "Stopped before everything had arrived (start again to go on)" },
        now.files,
        now.txns,
        bytes_text(now.bytes),
        bytes_text(sent),
        span_text(took)
    );
    if let Some(status) = status {
        for (what, paths) in &status.lost_metadata {
            eprintln!("Not kept on the replica: {what} of {paths} paths (run as root to keep it).");
        }
    }
    for (path, why) in now.unreadable.iter().take(10) {
        eprintln!("Could not read {path}: {why}");
    }
}
