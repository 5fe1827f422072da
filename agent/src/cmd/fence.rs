//! `twinbox fence` and `twinbox txn`: asks the running agent through its socket, and ends with a code a script can go by.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use crate::admin::{self, AdminError, Fence, Request};
use crate::cli::{ConfigFile, FenceArgs, TxnArgs, TxnCommand};
use crate::config::Config;
use crate::exit::ExitCode;
use crate::failure::Failure;

/// The agent answers in the time it is told; this is for the way there and back.
const GRACE: Duration = Duration::from_secs(5);

/// A path as the agent knows it: absolute, without links. What does not exist (any more) is named through its directory.
fn real(path: &Path) -> Result<PathBuf, Failure> {
    let failed = |error: std::io::Error| Failure::io(&format!("{}", path.display()), &error);
    match std::fs::canonicalize(path) {
        Ok(real) => Ok(real),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let absolute = std::path::absolute(path).map_err(failed)?;
            let (Some(parent), Some(name)) = (absolute.parent(), absolute.file_name()) else { return Err(failed(error)) };
            Ok(std::fs::canonicalize(parent).map_err(failed)?.join(name))
        }
        Err(error) => Err(failed(error)),
    }
}

async fn ask(file: &ConfigFile, request: Request, time: Duration) -> Result<Value, Failure> {
    let config = Config::load(&file.config)?;
    match admin::request(&config.state, request, time + GRACE).await {
        Ok(value) => Ok(value),
        Err(AdminError::Refused { code, message }) => {
            let exit = match code.as_str() {
                "timeout" => ExitCode::NotInTime,
                "unprotected" => ExitCode::Unprotected,
                "bad-path" => ExitCode::BadPath,
                "bad-arguments" => ExitCode::Usage,
                _ => ExitCode::Failure,
            };
            Err(Failure::new(exit, message))
        }
        Err(error) => Err(error.into()),
    }
}

/// Runs `fence`.
///
/// # Errors
/// [`Failure`], also when the fence does not hold.
pub async fn run(args: &FenceArgs, quiet: bool) -> Result<ExitCode, Failure> {
    let paths = args.paths.iter().map(|path| real(path)).collect::<Result<_, _>>()?;
    let mirror = args.mirror.as_ref().map(|name| name.as_str().to_owned());
    let fence = Fence { mirror, paths, timeout: args.timeout, wait: args.wait };
    let answer = ask(&args.file, Request::Fence(fence), args.timeout).await?;
    if args.json {
        println!("{answer}");
    } else if !quiet {
        let lsns = answer["lsn"].as_object().into_iter().flatten().map(|(name, lsn)| format!("{name} at LSN {lsn}"));
        println!("On two machines: {}.", lsns.collect::<Vec<_>>().join(", "));
    }
    Ok(ExitCode::Ok)
}

/// Runs `txn begin` and `txn commit`.
///
/// # Errors
/// [`Failure`].
pub async fn txn(args: &TxnArgs, quiet: bool) -> Result<ExitCode, Failure> {
    match &args.command {
        TxnCommand::Begin(begin) => {
            let request = Request::TxnBegin { path: real(&begin.group)?, timeout: begin.timeout };
            let answer = ask(&begin.file, request, begin.timeout).await?;
            println!("{}", answer["txn"]);
        }
        TxnCommand::Commit(commit) => {
            let fence = Fence { mirror: None, paths: vec![real(&commit.group)?], timeout: commit.timeout, wait: commit.wait };
            let request = Request::TxnCommit { txn: commit.txn, fence, nowait: commit.no_wait };
            ask(&commit.file, request, commit.timeout).await?;
            if !quiet {
                println!("{}", if commit.no_wait { "Committed." } else { "Committed, and on two machines." });
            }
        }
    }
    Ok(ExitCode::Ok)
}
