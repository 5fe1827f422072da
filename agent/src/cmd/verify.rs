//! `twinbox verify`: has the running agent compare its disk with the manifest, and shows how far it is.

use std::time::Duration;

use indicatif::ProgressBar;
use tokio::signal::ctrl_c;
use tokio::time::{MissedTickBehavior, interval};

use crate::admin::{self, Request, Verify};
use crate::cli::VerifyArgs;
use crate::config::{Config, Role};
use crate::exit::ExitCode;
use crate::failure::Failure;
use crate::status::{Status, bytes_text, span_text};
use crate::verify::{Outcome, Record};

/// A store may be large, and the pace slow.
const TIMEOUT: Duration = Duration::from_secs(90 * 24 * 3600);
/// How often the agent is asked how far it is, and how long it may take to say so.
const LOOK: Duration = Duration::from_millis(500);

/// Runs the command.
///
/// # Errors
/// [`Failure`]: it can be run again, and goes on where it was.
pub async fn run(args: &VerifyArgs, quiet: bool) -> Result<ExitCode, Failure> {
    let config = Config::load(&args.file.config)?;
    let names: Vec<String> = match &args.mirror {
        Some(name) => vec![name.as_str().to_owned()],
        None => config.mirrors.iter().map(|mirror| mirror.name.as_str().to_owned()).collect(),
    };
    if args.stop {
        let (mut any, mut refused) = (false, None);
        for mirror in names {
            match admin::request(&config.state, Request::VerifyStop { mirror: Some(mirror) }, LOOK * 20).await {
                Ok(_) => any = true,
                Err(error) => refused = Some(error),
            }
        }
        return match refused.filter(|_| !any) {
            Some(error) => Err(super::switch::failure(error)),
            None => Ok(ExitCode::Ok),
        };
    }
    let mut records = vec![];
    for mirror in names {
        let (record, interrupted) = one(&config, args, &mirror, quiet).await?;
        if !args.json {
            tell(&record, quiet);
        }
        if interrupted {
            eprintln!("{mirror}: stopped; the next `twinbox verify` goes on where it was.");
            return Ok(ExitCode::Interrupted);
        }
        records.push(record);
    }
    if args.json {
        println!("{}", serde_json::json!({ "mirrors": records }));
    }
    let ended = records.iter().all(|record| record.ended.is_some());
    Ok(match records.iter().map(Record::left).sum::<u64>() {
        0 if ended => ExitCode::Ok,
        0 => ExitCode::Interrupted,
        _ => ExitCode::Differs,
    })
}

/// One mirror; whether Ctrl-C ended it.
async fn one(config: &Config, args: &VerifyArgs, mirror: &str, quiet: bool) -> Result<(Record, bool), Failure> {
    let request =
        Request::Verify(Verify { mirror: Some(mirror.to_owned()), repair: args.repair, rate: args.rate, anew: args.from_the_beginning });
    let bar = super::resync::bar(quiet || args.json);
    let mut look = interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let answer = admin::request(&config.state, request, TIMEOUT);
    tokio::pin!(answer);
    let mut interrupted = false;
    let answer = loop {
        tokio::select! {
            answer = &mut answer => break answer,
            _ = look.tick() => show(config, mirror, &bar).await,
            stop = ctrl_c(), if !interrupted => {
                interrupted = stop.is_ok();
                let _ = admin::request(&config.state, Request::VerifyStop { mirror: Some(mirror.to_owned()) }, LOOK * 20).await;
            }
        }
    };
    bar.finish_and_clear();
    let record = answer.map_err(super::switch::failure)?;
    let record = serde_json::from_value(record).map_err(|error| {
        Failure::new(ExitCode::Failure, format!("the agent's answer makes no sense to this command ({error}): is it of the same version?"))
    })?;
    Ok((record, interrupted))
}

async fn show(config: &Config, mirror: &str, bar: &ProgressBar) {
    if bar.is_hidden() {
        return;
    }
    let Ok(said) = admin::request(&config.state, Request::Status, LOOK).await else { return };
    let Ok(status) = serde_json::from_value::<Status>(said) else { return };
    let Some(verify) = status.mirrors.into_iter().find(|one| one.name == mirror).and_then(|one| one.verify) else { return };
    bar.set_length(verify.total.max(verify.paths));
    bar.set_position(verify.paths);
    let left = verify.eta_s.map_or(String::new(), |s| format!(", about {} left", span_text(Duration::from_secs(s))));
    bar.set_message(format!("{mirror}: {} of {} paths, {}{left}", verify.paths, verify.total, bytes_text(verify.bytes)));
    bar.tick();
}

fn tell(record: &Record, quiet: bool) {
    let side = if record.role == Role::Primary { "primary" } else { "standby" };
    for finding in &record.findings {
        let became = match &finding.outcome {
            Outcome::Found => "not repaired: `twinbox verify --repair`".to_owned(),
            Outcome::Repaired { kept: None } => "repaired".to_owned(),
            Outcome::Repaired { kept: Some(kept) } => format!("repaired; what was there is {}", kept.display()),
            Outcome::Sent => "a change that nobody had seen: sent to the standby".to_owned(),
            Outcome::Failed { why } => format!("NOT repaired: {why}"),
        };
        println!("{:<10} {}  {became}", finding.what, finding.path);
    }
    let more = record.differences.saturating_sub(record.findings.len() as u64);
    if more > 0 {
        println!("… and {more} more.");
    }
    if quiet && record.left() == 0 {
        return;
    }
    let took = span_text(Duration::try_from_secs_f64(record.seconds).unwrap_or_default());
    let compared = format!("{} paths compared, {} read in {took}", record.paths, bytes_text(record.bytes));
    let found = match (record.differences, record.left()) {
        (0, _) => "no differences".to_owned(),
        (some, 0) => format!("{some} differences, all put right"),
        (some, left) => format!("{some} differences, {left} of them still there"),
    };
    let busy = if record.busy > 0 { format!("; {} paths changed at every look", record.busy) } else { String::new() };
    println!("{} ({side}): {compared}, LSN {}: {found}{busy}.", record.mirror, record.lsn);
}
