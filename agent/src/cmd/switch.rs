//! `twinbox promote`, `twinbox demote` and `twinbox switchover`: asks the running agent to change its role in a mirror.

use std::time::Duration;

use crate::admin::{self, AdminError, Request, Switch};
use crate::cli::SwitchArgs;
use crate::config::Config;
use crate::exit::ExitCode;
use crate::failure::Failure;

/// A replica may have much to apply, and a store much to be looked at.
const TIMEOUT: Duration = Duration::from_secs(900);

/// Runs the command.
///
/// # Errors
/// [`Failure`]: the role is as it was.
pub async fn run(args: &SwitchArgs, ask: fn(Switch) -> Request, quiet: bool) -> Result<ExitCode, Failure> {
    let config = Config::load(&args.file.config)?;
    let switch = Switch { mirror: args.mirror.as_ref().map(|name| name.as_str().to_owned()), force: args.force };
    match admin::request(&config.state, ask(switch), TIMEOUT).await {
        Ok(answer) => {
            if !quiet {
                println!("{}", answer["said"].as_str().unwrap_or("Done."));
            }
            Ok(ExitCode::Ok)
        }
        Err(error) => Err(failure(error)),
    }
}

/// How a command about roles ends when the agent says no.
pub(super) fn failure(error: AdminError) -> Failure {
    let AdminError::Refused { code, message } = error else { return error.into() };
    let exit = match code.as_str() {
        "refused" => ExitCode::Refused,
        "peer" => ExitCode::Peer,
        "bad-arguments" => ExitCode::Usage,
        _ => ExitCode::Failure,
    };
    Failure::new(exit, message)
}
