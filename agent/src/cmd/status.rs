//! `twinbox status` and `twinbox reload`: asks the running agent through its socket.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval};

use crate::admin::{self, Request};
use crate::cli::{Reload, StatusArgs};
use crate::config::Config;
use crate::exit::ExitCode;
use crate::failure::Failure;
use crate::status::render_status;

const TIMEOUT: Duration = Duration::from_secs(5);

/// Runs `status`.
///
/// # Errors
/// [`Failure`].
pub async fn run(args: &StatusArgs) -> Result<ExitCode, Failure> {
    let config = Config::load(&args.file.config)?;
    let mut tick = interval(Duration::from_secs(1));
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let status = admin::status(&config.state, TIMEOUT).await?;
        let text = if args.json { serde_json::to_string(&status).unwrap_or_default() + "\n" } else { render_status(&status) };
        let mut out = std::io::stdout().lock();
        if args.watch && !args.json && out.is_terminal() {
            let _ = write!(out, "\x1b[H\x1b[2J");
        }
        if out.write_all(text.as_bytes()).and_then(|()| out.flush()).is_err() || !args.watch {
            return Ok(ExitCode::Ok); // A closed pipe ends a watch.
        }
    }
}

/// Runs `reload`.
///
/// # Errors
/// [`Failure`].
pub async fn reload(args: &Reload, quiet: bool) -> Result<ExitCode, Failure> {
    let config = Config::load(&args.file.config)?;
    admin::request(&config.state, Request::Reload, TIMEOUT).await?;
    if !quiet {
        println!("The agent has read {} again.", args.file.config.display());
    }
    Ok(ExitCode::Ok)
}
