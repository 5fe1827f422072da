//! The command line of `twinbox`: what can be asked for, and the help a tired admin reads at three in the morning.
//!
//! Invariant: every command's long help has an example and the exit codes it ends with ([`crate::exit`]).
//! Does not run anything; see `cli/help.rs` for the texts.

mod help;

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use crate::config::{DEFAULT_PORT, LogLevel, Role};
use crate::glob::Glob;
use crate::layout::Layout;
use crate::names::{BadName, MirrorName, NodeName};

/// Keeps a live, crash-safe twin of a mail store on a second machine.
#[derive(Debug, Parser)]
#[command(name = "twinbox", version, about, after_help = help::SHORT, after_long_help = help::long())]
#[command(propagate_version = true, disable_help_subcommand = false, max_term_width = 100)]
pub struct Cli {
    /// Options of every command.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Options of every command.
#[derive(Debug, Clone, Args)]
pub struct Global {
    /// Least severe log lines to show (to stderr) [default: warn for mirror and demo, else the configuration's]
    #[arg(long, global = true, value_enum, value_name = "LEVEL", help_heading = "Output")]
    pub log_level: Option<LogLevel>,
    /// Show errors and results only: no progress, no status line
    #[arg(short, long, global = true, help_heading = "Output")]
    pub quiet: bool,
}

/// What to do.
#[derive(Debug, Subcommand)]
#[non_exhaustive]
pub enum Command {
    /// Try it: mirror a sample mail store in a temporary directory and watch the lag
    #[command(after_long_help = help::demo())]
    Demo(Demo),
    /// Mirror SRC to DST on this machine, live, until Ctrl-C
    #[command(after_long_help = help::mirror())]
    Mirror(Mirror),
    /// Write a configuration and make this node's key
    #[command(after_long_help = help::init())]
    Init(Init),
    /// Make two nodes trust each other by a one-time code
    #[command(after_long_help = help::pair())]
    Pair(Pair),
    /// After a power cut: bring back from the standby what this disk lost, before the mail server starts
    #[command(after_long_help = help::heal())]
    Heal(Heal),
    /// Run the agent in the foreground
    #[command(after_long_help = help::run())]
    Run(Run),
    /// Make the running agent read its configuration again
    #[command(after_long_help = help::reload())]
    Reload(Reload),
    /// Take a mirror over: this standby becomes its primary
    #[command(after_long_help = help::promote())]
    Promote(SwitchArgs),
    /// Give a mirror up: this primary becomes its standby
    #[command(after_long_help = help::demote())]
    Demote(SwitchArgs),
    /// Hand a mirror over to its standby, in order: nothing is lost
    #[command(after_long_help = help::switchover())]
    Switchover(SwitchArgs),
    /// A node that was primary is back: merge what it has alone into the other one, and follow that
    #[command(after_long_help = help::resync())]
    Resync(ResyncArgs),
    /// What gave way to another version, and is kept: list it, give it back
    #[command(after_long_help = help::rescue())]
    Rescue(RescueArgs),
    /// Does this disk hold what it should? With --repair: put right what it does not
    #[command(after_long_help = help::verify())]
    Verify(VerifyArgs),
    /// How well is the mail protected?
    #[command(after_long_help = help::status())]
    Status(StatusArgs),
    /// Wait until everything that has changed by now is on two machines
    #[command(after_long_help = help::fence())]
    Fence(FenceArgs),
    /// Declare a transaction: changes of one group that arrive whole or not at all
    #[command(after_long_help = help::txn())]
    Txn(TxnArgs),
    /// Compare two trees on this machine: names, content, all metadata
    #[command(after_long_help = help::compare())]
    Compare(Compare),
}

/// `twinbox demo`
#[derive(Debug, Args)]
pub struct Demo {
    /// How long mail is delivered, in seconds
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub seconds: u64,
    /// Keep the directory with both stores afterwards, and say where it is
    #[arg(long)]
    pub keep: bool,
}

/// `twinbox mirror`
#[derive(Debug, Args)]
pub struct Mirror {
    /// The tree to mirror
    pub src: PathBuf,
    /// The replica; made if missing. One that is not empty must be this mirror's own, unless --adopt is given
    pub dst: PathBuf,
    /// Where to remember what has been mirrored, outside both trees [default: below ~/.local/state/twinbox, by SRC and DST]
    #[arg(long, value_name = "DIR")]
    pub state: Option<PathBuf>,
    /// Format of the store: maildir, sdbox, mdbox, mbox or plain; decides what is scratch and never mirrored
    #[arg(long, value_name = "LAYOUT", default_value_t = Layout::Maildir)]
    pub layout: Layout,
    /// End when both sides are in sync, instead of going on
    #[arg(long)]
    pub once: bool,
    /// Take over a DST that is not empty: only differences travel, and what is replaced is kept in the state's rescue/
    #[arg(long)]
    pub adopt: bool,
    /// Print the status as one JSON object a line, instead of a progress bar
    #[arg(long)]
    pub json: bool,
    /// Leave out what matches; may be given several times ("*.bak" anywhere, "a/b" from the root, "x/" directories only)
    #[arg(long, value_name = "GLOB")]
    pub exclude: Vec<Glob>,
}

/// The configuration file, for every command that needs one.
#[derive(Debug, Clone, Args)]
pub struct ConfigFile {
    /// The configuration file
    #[arg(short, long, value_name = "FILE", default_value = "/etc/twinbox/twinbox.toml")]
    pub config: PathBuf,
}

/// `twinbox init`
#[derive(Debug, Args)]
pub struct Init {
    /// The configuration file.
    #[command(flatten)]
    pub file: ConfigFile,
    /// Name of this node, unique among those that will know each other
    #[arg(long, value_name = "NAME")]
    pub node: NodeName,
    /// Role of this node in its mirrors to begin with
    #[arg(long, value_enum)]
    pub role: Role,
    /// Name and directory of a mirror; the name is the same on both nodes, the directory need not be. May be repeated
    #[arg(long, value_name = "NAME=ROOT", required = true)]
    pub mirror: Vec<MirrorRoot>,
    /// Format of the store: maildir, sdbox, mdbox, mbox or plain
    #[arg(long, value_name = "LAYOUT", default_value_t = Layout::Maildir)]
    pub layout: Layout,
    /// UDP address to listen on; open it in the firewall
    #[arg(long, value_name = "IP:PORT", default_value_t = std::net::SocketAddr::from(([0, 0, 0, 0], DEFAULT_PORT)))]
    pub listen: std::net::SocketAddr,
    /// State directory: key, database, redo log
    #[arg(long, value_name = "DIR", default_value = "/var/lib/twinbox")]
    pub state: PathBuf,
}

/// `NAME=ROOT` of `twinbox init --mirror`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MirrorRoot {
    /// Name of the mirror.
    pub name: MirrorName,
    /// Its directory, as given.
    pub root: PathBuf,
}

/// Why a `NAME=ROOT` was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadMirrorRoot {
    /// There is no `=`, or nothing after it.
    #[error("write NAME=ROOT, as in mail=/srv/mail")]
    Shape,
    /// The name is none.
    #[error(transparent)]
    Name(#[from] BadName),
}

impl FromStr for MirrorRoot {
    type Err = BadMirrorRoot;

    fn from_str(text: &str) -> Result<Self, BadMirrorRoot> {
        match text.split_once('=') {
            Some((name, root)) if !root.is_empty() => Ok(MirrorRoot { name: name.parse()?, root: root.into() }),
            _ => Err(BadMirrorRoot::Shape),
        }
    }
}

/// `twinbox pair`
#[derive(Debug, Args)]
pub struct Pair {
    /// The configuration file.
    #[command(flatten)]
    pub file: ConfigFile,
    /// The code the other node printed; without one, a code is printed here and the other node is waited for
    pub code: Option<String>,
    /// Address of this node to put into the code, as the other node reaches it; may be repeated [default: found out]
    #[arg(long, value_name = "IP:PORT")]
    pub address: Vec<std::net::SocketAddr>,
    /// How long the printed code is good for
    #[arg(long, value_name = "MINUTES", default_value_t = 15, value_parser = clap::value_parser!(u64).range(1..=1440))]
    pub expires: u64,
}

impl Pair {
    /// How long a printed code is good for.
    #[must_use]
    pub fn lifetime(&self) -> Duration {
        Duration::from_secs(self.expires * 60)
    }
}

/// `twinbox heal`
#[derive(Debug, Args)]
pub struct Heal {
    /// The configuration file.
    #[command(flatten)]
    pub file: ConfigFile,
    /// Only this mirror; may be repeated [default: every mirror this node is primary of]
    #[arg(short, long, value_name = "MIRROR")]
    pub mirror: Vec<MirrorName>,
    /// Give up when no standby has answered for so long, as in 90s or 10m, and end with 15 [default: wait]
    #[arg(short, long, value_name = "TIME", value_parser = crate::duration::parse_duration)]
    pub timeout: Option<Duration>,
    /// Compare with the standby even if this machine was not cut from power
    #[arg(long)]
    pub force: bool,
    /// Do without paths that cannot be put back: they are removed on the standby too, what it has of them is kept in rescue here
    #[arg(long)]
    pub force_incomplete: bool,
    /// Print what was done as one JSON object
    #[arg(long)]
    pub json: bool,
}

/// `twinbox run`
#[derive(Debug, Args)]
pub struct Run {
    /// The configuration file.
    #[command(flatten)]
    pub file: ConfigFile,
    /// Take over a root that is not empty and not known as this mirror's; what is replaced is kept in rescue. May be repeated
    #[arg(long, value_name = "MIRROR")]
    pub adopt: Vec<MirrorName>,
}

/// `twinbox promote`, `twinbox demote` and `twinbox switchover`
#[derive(Debug, Args)]
pub struct SwitchArgs {
    /// The configuration file.
    #[command(flatten)]
    pub file: ConfigFile,
    /// Which mirror; needed when there are several
    #[arg(short, long, value_name = "MIRROR")]
    pub mirror: Option<MirrorName>,
    /// Although something speaks against it; what that can cost is said without it
    #[arg(long)]
    pub force: bool,
}

/// `twinbox resync`
#[derive(Debug, Args)]
pub struct ResyncArgs {
    /// Which half.
    #[command(subcommand)]
    pub command: ResyncCommand,
}

/// Halves of a resync.
#[derive(Debug, Subcommand)]
pub enum ResyncCommand {
    /// Show what this node has alone and what would become of it; nothing is changed
    #[command(after_long_help = help::resync())]
    Plan(ResyncWhat),
    /// Do it; then this node is a standby in sync. May be interrupted, and run again
    #[command(after_long_help = help::resync())]
    Apply(ResyncWhat),
}

/// What `twinbox resync plan` and `apply` are told.
#[derive(Debug, Args)]
pub struct ResyncWhat {
    /// The configuration file.
    #[command(flatten)]
    pub file: ConfigFile,
    /// Which mirror; needed when there are several
    #[arg(short, long, value_name = "MIRROR")]
    pub mirror: Option<MirrorName>,
    /// The node that stays as it is, when nobody else can tell: both were promoted apart
    #[arg(long, value_name = "NODE")]
    pub winner: Option<NodeName>,
    /// What becomes of what this node has alone
    #[arg(long, value_enum, default_value_t = ResyncPolicy::Merge)]
    pub policy: ResyncPolicy,
    /// Print it as one JSON object (docs/resync.md)
    #[arg(long)]
    pub json: bool,
}

/// What becomes of what a returning node has alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum ResyncPolicy {
    /// Messages, flags and folders of a Maildir go to the other node; the rest is kept in rescue
    Merge,
    /// Everything is kept in rescue
    Rescue,
}

/// `twinbox rescue`
#[derive(Debug, Args)]
pub struct RescueArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: RescueCommand,
}

/// What can be done with what is kept.
#[derive(Debug, Subcommand)]
pub enum RescueCommand {
    /// Print what is kept, oldest first
    List(RescueWhich),
    /// Print one file
    Show(RescueShow),
    /// Put files back where they were, if nothing is there; on whichever node is primary
    Restore(RescueRestore),
    /// Put messages back into their folders, as if they had just come; on whichever node is primary
    Redeliver(RescueRedeliver),
    /// Remove what has been kept for longer than a time, for good
    Purge(RescuePurge),
}

/// `twinbox rescue list`
#[derive(Debug, Args)]
pub struct RescueWhich {
    /// The configuration file.
    #[command(flatten)]
    pub file: ConfigFile,
    /// Only this mirror
    #[arg(short, long, value_name = "MIRROR")]
    pub mirror: Option<MirrorName>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// `twinbox rescue show`
#[derive(Debug, Args)]
pub struct RescueShow {
    /// The configuration file.
    #[command(flatten)]
    pub file: ConfigFile,
    /// Every byte as it is
    #[arg(long)]
    pub raw: bool,
    /// Which, as `list` prints it
    pub entry: String,
}

/// `twinbox rescue restore`
#[derive(Debug, Args)]
pub struct RescueRestore {
    /// The configuration file.
    #[command(flatten)]
    pub file: ConfigFile,
    /// Copy to this file or directory of this machine instead of back into the store
    #[arg(long, value_name = "PATH")]
    pub to: Option<PathBuf>,
    /// Which, as `list` prints them
    #[arg(required = true)]
    pub entries: Vec<String>,
}

/// `twinbox rescue redeliver`
#[derive(Debug, Args)]
pub struct RescueRedeliver {
    /// The configuration file.
    #[command(flatten)]
    pub file: ConfigFile,
    /// Every message that is kept
    #[arg(long, conflicts_with = "entries")]
    pub all: bool,
    /// With --all: only of this mirror
    #[arg(short, long, value_name = "MIRROR", requires = "all")]
    pub mirror: Option<MirrorName>,
    /// Which, as `list` prints them
    #[arg(required_unless_present = "all")]
    pub entries: Vec<String>,
}

/// `twinbox rescue purge`
#[derive(Debug, Args)]
pub struct RescuePurge {
    /// The configuration file.
    #[command(flatten)]
    pub file: ConfigFile,
    /// Only this mirror
    #[arg(short, long, value_name = "MIRROR")]
    pub mirror: Option<MirrorName>,
    /// For how long it has been kept at least, as in 30d
    #[arg(long, value_name = "TIME", value_parser = crate::duration::parse_duration)]
    pub older_than: Duration,
}

/// `twinbox verify`
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// The configuration file.
    #[command(flatten)]
    pub file: ConfigFile,
    /// Only this mirror; else all, one after the other
    #[arg(short, long, value_name = "MIRROR")]
    pub mirror: Option<MirrorName>,
    /// Put right what differs; what was there is kept in rescue
    #[arg(long)]
    pub repair: bool,
    /// Bytes read a second, as in 500K, 20M or 1G; `max`: as fast as the disk [default: rate_mib of the configuration]
    #[arg(long, value_name = "RATE", value_parser = rate)]
    pub rate: Option<u64>,
    /// Begin anew, also where an earlier run was stopped
    #[arg(long)]
    pub from_the_beginning: bool,
    /// Stop the run that is under way; the next one goes on where it was
    #[arg(long, conflicts_with_all = ["repair", "rate", "from_the_beginning", "json"])]
    pub stop: bool,
    /// Print one JSON object (docs/verify.md)
    #[arg(long)]
    pub json: bool,
}

/// Bytes a second; 0: no limit.
fn rate(text: &str) -> Result<u64, String> {
    let wrong = || "write a number with K, M or G, as in 20M, or `max`".to_owned();
    if text == "max" {
        return Ok(0);
    }
    let at = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = (text[..at].parse::<u64>().map_err(|_| wrong())?, &text[at..]);
    let shift = match unit {
        "K" | "k" | "KiB" => 10,
        "M" | "MiB" => 20,
        "G" | "GiB" => 30,
        _ => return Err(wrong()),
    };
    let bytes = number.checked_mul(1 << shift).filter(|bytes| *bytes > 0);
    bytes.ok_or_else(|| "at least 1K; `max` for as fast as the disk".into())
}

/// `twinbox reload`
#[derive(Debug, Args)]
pub struct Reload {
    /// The configuration file.
    #[command(flatten)]
    pub file: ConfigFile,
}

/// `twinbox status`
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// The configuration file.
    #[command(flatten)]
    pub file: ConfigFile,
    /// Print one JSON object of a stable, documented schema (docs/status.md)
    #[arg(long)]
    pub json: bool,
    /// Go on, once a second, until Ctrl-C
    #[arg(short, long)]
    pub watch: bool,
}

fn duration(text: &str) -> Result<Duration, String> {
    let time = crate::duration::parse_duration(text).map_err(|error| error.to_string())?;
    if time > crate::admin::request::TIMEOUT_MAX { Err("at most 1h".into()) } else { Ok(time) }
}

/// `twinbox fence`
#[derive(Debug, Args)]
pub struct FenceArgs {
    /// The configuration file.
    #[command(flatten)]
    pub file: ConfigFile,
    /// Only this mirror
    #[arg(short, long, value_name = "MIRROR")]
    pub mirror: Option<MirrorName>,
    /// How long to wait, as in 500ms, 10s or 1m
    #[arg(short, long, value_name = "TIME", default_value = "30s", value_parser = duration)]
    pub timeout: Duration,
    /// Without a standby, wait for one too instead of failing at once
    #[arg(short, long)]
    pub wait: bool,
    /// Print the answer as one JSON object: {"lsn": {MIRROR: NUMBER}}
    #[arg(long)]
    pub json: bool,
    /// Only what lies below these paths of the store [default: everything this node is primary of]
    pub paths: Vec<PathBuf>,
}

/// `twinbox txn`
#[derive(Debug, Args)]
pub struct TxnArgs {
    /// Which half.
    #[command(subcommand)]
    pub command: TxnCommand,
}

/// Halves of a declared transaction.
#[derive(Debug, Subcommand)]
pub enum TxnCommand {
    /// From now on nothing of the group is sent; prints the transaction's number
    Begin(TxnBegin),
    /// What has changed since is sent as one transaction; waits until it is on two machines
    Commit(TxnCommit),
}

/// `twinbox txn begin`
#[derive(Debug, Args)]
pub struct TxnBegin {
    /// The configuration file.
    #[command(flatten)]
    pub file: ConfigFile,
    /// After this time the transaction is over, committed or not, and what has changed is sent as it is
    #[arg(short, long, value_name = "TIME", default_value = "30s", value_parser = duration)]
    pub timeout: Duration,
    /// The group: the directory of a mail user, or any path in it
    pub group: PathBuf,
}

/// `twinbox txn commit`
#[derive(Debug, Args)]
pub struct TxnCommit {
    /// The configuration file.
    #[command(flatten)]
    pub file: ConfigFile,
    /// Which transaction of the group, by the number that `begin` printed; needed when several are open
    #[arg(long, value_name = "NUMBER")]
    pub txn: Option<u64>,
    /// How long to wait until it is on two machines
    #[arg(short, long, value_name = "TIME", default_value = "30s", value_parser = duration)]
    pub timeout: Duration,
    /// Without a standby, wait for one too instead of failing at once
    #[arg(short, long)]
    pub wait: bool,
    /// Do not wait at all
    #[arg(long, conflicts_with = "wait")]
    pub no_wait: bool,
    /// The group: the path given to `begin`
    pub group: PathBuf,
}

/// `twinbox compare`
#[derive(Debug, Args)]
pub struct Compare {
    /// One tree
    pub a: PathBuf,
    /// The other
    pub b: PathBuf,
    /// Print each difference as a JSON object, one a line
    #[arg(long)]
    pub json: bool,
    /// Leave out what this layout never mirrors; with plain, compare everything
    #[arg(long, value_name = "LAYOUT", default_value_t = Layout::Plain)]
    pub layout: Layout,
}

#[cfg(test)]
#[path = "cli_tests.rs"]
mod tests;
