//! `twinbox heal`: after a power cut of a primary, brings back what its disk lost, then ends. What the unit runs before the mail server starts.
//!
//! Starts no capture. While it runs it serves the mirrors this node is standby of: two nodes that lost power together would else wait for each other.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::Instant;

use super::run::{check_root, mirrors, peers, pin, standby_of};
use crate::admin::StateLock;
use crate::cli::Heal;
use crate::config::Config;
use crate::exit::ExitCode;
use crate::failure::Failure;
use crate::heal::{self, Done, Job, Outcome};
use crate::net::{Endpoint, NodeKey, PinnedPeers, Tuning};
use crate::roles::{Bounds, MirrorSpec, Roles};
use crate::status::{bytes_text, span_text};

/// The schema of `--json`.
const SCHEMA: u32 = 1;

/// Runs the command.
///
/// # Errors
/// [`Failure`].
pub async fn run(args: &Heal, quiet: bool) -> Result<ExitCode, Failure> {
    let config = Config::load(&args.file.config)?;
    let specs = mirrors(&config, &[]);
    if let Some(unknown) = args.mirror.iter().find(|name| !specs.iter().any(|spec| spec.name == name.as_str())) {
        return Err(Failure::new(ExitCode::Usage, format!("no mirror `{}` in {}", unknown.as_str(), args.file.config.display())));
    }
    let lock = StateLock::acquire(&config.state)?;
    let (jobs, fine) = tokio::task::block_in_place(|| needed(args, &config, &specs))?;
    let started = Instant::now();
    let mut said: Vec<Value> = fine.iter().map(|name| json!({ "name": name, "outcome": "clean" })).collect();
    if !jobs.is_empty() {
        let failed = |error: std::io::Error| Failure::io("signals", &error);
        let (mut interrupt, mut terminate) =
            (signal(SignalKind::interrupt()).map_err(failed)?, signal(SignalKind::terminate()).map_err(failed)?);
        let bar = bar(quiet || args.json);
        let healed = tokio::select! {
            healed = all(args, &config, &jobs, &specs, &bar) => healed,
            _ = interrupt.recv() => Err(Failure::new(ExitCode::Interrupted, "interrupted; what was healed stays, run it again")),
            _ = terminate.recv() => Err(Failure::new(ExitCode::Interrupted, "asked to stop; what was healed stays, run it again")),
        };
        bar.finish_and_clear();
        for (name, outcome, done) in healed? {
            if !args.json {
                tell(&name, outcome, &done, quiet, started.elapsed());
            }
            let mut value = serde_json::to_value(&done).unwrap_or_default();
            value["name"] = json!(name);
            value["outcome"] = json!(outcome);
            said.push(value);
        }
    } else if !quiet && !args.json {
        println!("Nothing to heal: no power was cut since the agent last ran, or it had stopped in order.");
    }
    if args.json {
        println!("{}", json!({ "schema": SCHEMA, "mirrors": said }));
    }
    drop(lock);
    Ok(ExitCode::Ok)
}

/// What is to be healed, and the names of the mirrors that are fine.
fn needed(args: &Heal, config: &Config, specs: &[MirrorSpec]) -> Result<(Vec<Job>, Vec<String>), Failure> {
    let (mut jobs, mut fine) = (vec![], vec![]);
    for spec in specs.iter().filter(|spec| args.mirror.is_empty() || args.mirror.iter().any(|name| name.as_str() == spec.name)) {
        match heal::need(config.node.as_str(), &config.state, spec.clone(), args.force)? {
            Some(mut job) => {
                if args.force_incomplete {
                    job.accept_incomplete();
                }
                check_root(&spec.root)?;
                jobs.push(job);
            }
            None => fine.push(spec.name.clone()),
        }
    }
    Ok((jobs, fine))
}

async fn all(
    args: &Heal,
    config: &Config,
    jobs: &[Job],
    specs: &[MirrorSpec],
    bar: &ProgressBar,
) -> Result<Vec<(String, Outcome, Done)>, Failure> {
    let key = NodeKey::load(&config.state.join("node.key"))?;
    let (pins, peers) = (PinnedPeers::new(), peers(config)?);
    pin(&pins, &peers)?;
    let mut endpoints = vec![];
    for addr in &config.listen {
        endpoints.push(Endpoint::bind(Some(*addr), key.clone(), pins.clone(), Tuning::default())?);
    }
    let mut roles = tokio::task::block_in_place(|| {
        Roles::start_standbys(config.node.as_str(), &config.state, specs.to_vec(), &endpoints, Bounds::default())
    })?;
    let paths = standby_of(&peers, &endpoints);
    let deadline = args.timeout.map(|time| Instant::now() + time);
    let mut healed = vec![];
    let mut ended = Ok(());
    for job in jobs {
        bar.set_message(format!("{}: waiting for the standby…", job.mirror()));
        let show = |done: &Done| {
            bar.set_message(format!("{}: {} compared, {} put back", job.mirror(), done.compared, done.restored + done.replaced));
            bar.tick();
        };
        match heal::until_healed(job, paths.as_ref(), deadline, show).await {
            Ok((outcome, done)) => healed.push((job.mirror().to_owned(), outcome, done)),
            Err(error) => {
                ended = Err(error.into());
                break;
            }
        }
    }
    tokio::task::block_in_place(|| roles.stop());
    ended.map(|()| healed)
}

fn tell(name: &str, outcome: Outcome, done: &Done, quiet: bool, took: Duration) {
    if outcome == Outcome::Nothing {
        eprintln!("{name}: the standby has nothing of this mirror; nothing could be put back.");
        return;
    }
    if !quiet {
        println!(
            "{name}: healed in {}: {} paths compared, {} put back, {} replaced, {} removed again, {} attributes set ({} from the standby).",
            span_text(took),
            done.compared,
            done.restored,
            done.replaced,
            done.removed,
            done.attributes,
            bytes_text(done.bytes)
        );
        if done.newer + done.moved > 0 {
            println!(
                "{name}: {} were changed and {} moved here after the last transaction; they stay as they are.",
                done.newer, done.moved
            );
        }
    }
    if let Some(rescue) = done.rescue.as_ref().filter(|_| done.rescued > 0) {
        eprintln!("{name}: {} files of this disk gave way to the standby's; they are kept in {}.", done.rescued, rescue.display());
    }
    if let Some(rescue) = done.rescue.as_ref().filter(|_| done.beside > 0) {
        eprintln!(
            "{name}: {} files here are or may be newer than the standby's, or half written. They stay; the standby's versions are in {}: compare them.",
            done.beside,
            rescue.display()
        );
    }
    if done.unrestored > 0 {
        eprintln!(
            "{name}: {} paths could not be put back and will be removed on the standby; what it has of them is kept in rescue. The log says why (--log-level debug names them).",
            done.unrestored
        );
    }
}

fn bar(hidden: bool) -> ProgressBar {
    let target =
        if hidden || !std::io::stderr().is_terminal() { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr_with_hz(5) };
    let bar = ProgressBar::with_draw_target(None, target);
    if let Ok(style) = ProgressStyle::with_template("{spinner} {wide_msg}") {
        bar.set_style(style);
    }
    bar
}
