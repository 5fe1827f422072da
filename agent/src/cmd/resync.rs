//! `twinbox resync plan` and `apply`: asks the running agent, and shows how far it is.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::time::{MissedTickBehavior, interval};

use crate::admin::{self, Request, Resync};
use crate::cli::{ResyncArgs, ResyncCommand, ResyncPolicy, ResyncWhat};
use crate::config::Config;
use crate::exit::ExitCode;
use crate::failure::Failure;
use crate::status::Status;

/// A store may be large, and the line to the other node slow.
const TIMEOUT: Duration = Duration::from_secs(24 * 3600);
/// How often the agent is asked how far it is, and how long it may take to say so.
const LOOK: Duration = Duration::from_millis(500);

/// Runs the command.
///
/// # Errors
/// [`Failure`]: it can be run again, and goes on where it was.
pub async fn run(args: &ResyncArgs, quiet: bool) -> Result<ExitCode, Failure> {
    let (what, apply) = match &args.command {
        ResyncCommand::Plan(what) => (what, false),
        ResyncCommand::Apply(what) => (what, true),
    };
    let config = Config::load(&what.file.config)?;
    let request = Request::Resync(Resync {
        mirror: what.mirror.as_ref().map(|name| name.as_str().to_owned()),
        apply,
        winner: what.winner.as_ref().map(|name| name.as_str().to_owned()),
        rescue: what.policy == ResyncPolicy::Rescue,
    });
    let bar = bar(quiet || what.json);
    let mut look = interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let answer = admin::request(&config.state, request, TIMEOUT);
    tokio::pin!(answer);
    let answer = loop {
        tokio::select! {
            answer = &mut answer => break answer,
            _ = look.tick() => show(&config, what, &bar).await,
        }
    };
    bar.finish_and_clear();
    match answer {
        Ok(shown) => {
            if what.json {
                println!("{shown}");
            } else {
                print!("{}", shown["text"].as_str().unwrap_or_default());
                if !apply && !quiet {
                    println!("\nNothing was changed. `twinbox resync apply` does it.");
                }
            }
            Ok(ExitCode::Ok)
        }
        Err(error) => Err(super::switch::failure(error)),
    }
}

/// What the agent says of it, on the bar; what it does not say in time is left.
async fn show(config: &Config, what: &ResyncWhat, bar: &ProgressBar) {
    if bar.is_hidden() {
        return;
    }
    let Ok(said) = admin::request(&config.state, Request::Status, LOOK).await else { return };
    let Ok(status) = serde_json::from_value::<Status>(said) else { return };
    let ours = |name: &str| what.mirror.as_ref().is_none_or(|mirror| mirror.as_str() == name);
    let Some(sync) = status.mirrors.into_iter().find_map(|mirror| mirror.sync.filter(|_| ours(&mirror.name))) else { return };
    bar.set_length(sync.files_total.unwrap_or(0));
    bar.set_position(sync.files_done);
    let left = sync.eta_s.map_or(String::new(), |s| format!(", about {} left", crate::status::span_text(Duration::from_secs(s))));
    bar.set_message(match sync.files_total {
        Some(total) => format!("{} ({} of {total}{left})", sync.phase, sync.files_done),
        None => format!("{} ({})", sync.phase, sync.files_done),
    });
    bar.tick();
}

/// A bar on the terminal, if there is one.
pub(super) fn bar(hidden: bool) -> ProgressBar {
    let target =
        if hidden || !std::io::stderr().is_terminal() { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr_with_hz(5) };
    let bar = ProgressBar::with_draw_target(Some(0), target);
    if let Ok(style) = ProgressStyle::with_template("{spinner} {bar:30} {wide_msg}") {
        bar.set_style(style);
    }
    bar
}
