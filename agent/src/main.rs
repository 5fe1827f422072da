//! The `twinbox` command: parses, runs, says what went wrong in one message, and ends with a documented exit code.

use clap::Parser;
use tracing_subscriber::EnvFilter;

use twinbox::admin::Request;
use twinbox::cli::{Cli, Command};
use twinbox::cmd;
use twinbox::exit::ExitCode;
use twinbox::failure::Failure;

fn main() -> std::process::ExitCode {
    let cli = Cli::parse();
    let level = match (&cli.global.log_level, &cli.command) {
        (Some(level), _) => level.as_str(),
        (None, Command::Run(_)) => "info",
        // Commands that people watch say things themselves.
        (None, _) => "error",
    };
    let filter = EnvFilter::try_new(format!("{level},quinn=warn,rustls=warn")).unwrap_or_default();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false).with_ansi(false).init();
    let result = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new(ExitCode::Failure, format!("cannot start: {error}")))
        .and_then(|runtime| {
            let result = runtime.block_on(run(cli));
            runtime.shutdown_timeout(std::time::Duration::from_secs(2));
            result
        });
    match result {
        Ok(code) => code.into(),
        Err(failure) => {
            eprintln!("twinbox: {failure}");
            failure.code.into()
        }
    }
}

async fn run(cli: Cli) -> Result<ExitCode, Failure> {
    let quiet = cli.global.quiet;
    match cli.command {
        Command::Demo(args) => cmd::demo::run(&args, quiet).await,
        Command::Mirror(args) => cmd::mirror::run(&args, quiet).await,
        Command::Init(args) => cmd::init::run(&args, quiet),
        Command::Pair(args) => cmd::pair::run(&args).await,
        Command::Heal(args) => cmd::heal::run(&args, quiet).await,
        Command::Run(args) => cmd::run::run(&args).await,
        Command::Promote(args) => cmd::switch::run(&args, Request::Promote, quiet).await,
        Command::Switchover(args) => cmd::switch::run(&args, Request::Switchover, quiet).await,
        Command::Rescue(args) => cmd::rescue::run(&args, quiet).await,
        Command::Resync(args) => cmd::resync::run(&args, quiet).await,
        Command::Verify(args) => cmd::verify::run(&args, quiet).await,
        Command::Demote(args) => cmd::switch::run(&args, Request::Demote, quiet).await,
        Command::Reload(args) => cmd::status::reload(&args, quiet).await,
        Command::Status(args) => cmd::status::run(&args).await,
        Command::Fence(args) => cmd::fence::run(&args, quiet).await,
        Command::Txn(args) => cmd::fence::txn(&args, quiet).await,
        Command::Compare(args) => cmd::compare::run(&args),
        _ => Err(Failure::new(ExitCode::Usage, "this command is not there yet")),
    }
}
