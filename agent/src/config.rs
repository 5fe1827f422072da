//! The configuration file: one TOML document of the same shape on every node.
//!
//! Invariants:
//! - A [`Config`] that exists is valid: names parse, paths are absolute and disjoint, addresses and durations are in range.
//!   Everything after [`Config::parse`] trusts it.
//! - All that is wrong is reported at once, each with its line and column; an unknown key is an error, never ignored.
//!
//! | file | idea |
//! |---|---|
//! | `config/problem.rs` | what can be wrong with a file, and how it is told |
//! | `config/reader.rs` | typed access to one TOML table, collecting problems |
//! | `config/parse.rs` | text → [`Config`] |
//! | `config/paths.rs` | no root inside another, state apart from roots |
//! | `config/write.rs` | [`Config`] → commented text, and adding a peer without touching the operator's comments |
//!
//! Does not: hold secrets (the node's key lies in the state directory), or watch the file for changes.

mod parse;
mod paths;
mod problem;
mod reader;
mod write;

use std::fs::File;
use std::io::{self, Read};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::glob::Glob;
use crate::hooks::Hooks;
use crate::layout::{Grouping, Layout, Selection};
use crate::names::{MirrorName, NodeName};

pub use problem::{ConfigError, Problem, ProblemKind, Problems};
pub use write::{upsert_peer, upsert_peer_file};

/// Largest configuration file read, in bytes. A hundred mirrors need a tenth of it.
pub const FILE_BYTES_MAX: u64 = 1 << 20;
/// Most `[[mirror]]` and most `[[peer]]` tables: each costs tasks and connections.
pub const TABLES_MAX: usize = 64;
/// The UDP port used when none is named.
pub const DEFAULT_PORT: u16 = 7440;
/// How often a mirror is compared with its disk by a full stat scan, when not configured.
pub const DEFAULT_SWEEP: Duration = Duration::from_secs(3600);

/// A validated configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// This node's name.
    pub node: NodeName,
    /// The state directory: absolute, outside every root.
    pub state: PathBuf,
    /// UDP addresses to listen on; at least one.
    pub listen: Vec<SocketAddr>,
    /// Bounds on what the agent uses.
    pub limits: Limits,
    /// What is logged, and how.
    pub log: Log,
    /// A socket for fences alone, for others than the agent's own user.
    pub fence: Option<FenceSocket>,
    /// Programs that are run when roles or protection change.
    pub hooks: Hooks,
    /// How disks are compared with the manifest.
    pub verify: Verify,
    /// The trees kept on this node; at least one, names unique.
    pub mirrors: Vec<Mirror>,
    /// The nodes this one talks to, names unique.
    pub peers: Vec<Peer>,
}

/// `[fence]`: where programs of a group may ask for fences and declare transactions, and nothing else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FenceSocket {
    /// Absolute path of the socket.
    pub socket: PathBuf,
    /// Name or number of the group that may use it; `None`: only the agent's user.
    pub group: Option<String>,
}

/// Bounds on what the agent uses. See [`LIMITS`] for units, defaults and ranges.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Memory for buffers, queues and caches, in MiB.
    pub memory_mib: u64,
    /// Changed paths remembered one by one.
    pub dirty_paths_max: u64,
    /// Redo log kept on a standby, in MiB.
    pub redo_max_mib: u64,
    /// Large files in transfer at once.
    pub bulk_streams: u64,
}

/// One key of `[limits]`: the single place for its default, range and explanation.
#[derive(Debug)]
pub struct LimitSpec {
    /// The key.
    pub key: &'static str,
    /// Used when the key is absent.
    pub default: u64,
    /// Smallest value accepted.
    pub min: u64,
    /// Largest value accepted.
    pub max: u64,
    /// Unit and meaning, as written into a new configuration file.
    pub doc: &'static str,
    field: fn(&mut Limits) -> &mut u64,
}

/// Every key of `[limits]`.
pub const LIMITS: [LimitSpec; 4] = [
    LimitSpec {
        key: "memory_mib",
        default: 256,
        min: 32,
        max: 1 << 20,
        doc: "MiB for buffers, queues and caches; not counted: what the kernel pins for watches (see `twinbox status`)",
        field: |limits| &mut limits.memory_mib,
    },
    LimitSpec {
        key: "dirty_paths_max",
        default: 1_000_000,
        min: 1_000,
        max: 1_000_000_000,
        doc: "changed paths remembered one by one while a standby is away; beyond it whole directories are remembered",
        field: |limits| &mut limits.dirty_paths_max,
    },
    LimitSpec {
        key: "redo_max_mib",
        default: 4096,
        min: 64,
        max: 1 << 30,
        doc: "MiB of redo log on a standby; when full, the primary waits with sending (mail is accepted all the same)",
        field: |limits| &mut limits.redo_max_mib,
    },
    LimitSpec {
        key: "bulk_streams",
        default: 8,
        min: 1,
        max: 256,
        doc: "large files in transfer at once",
        field: |limits| &mut limits.bulk_streams,
    },
];

impl Default for Limits {
    fn default() -> Self {
        let mut limits = Limits { memory_mib: 0, dirty_paths_max: 0, redo_max_mib: 0, bulk_streams: 0 };
        for spec in &LIMITS {
            *(spec.field)(&mut limits) = spec.default;
        }
        limits
    }
}

/// How disks are compared with the manifest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verify {
    /// How often, if at all.
    pub interval: Option<Duration>,
    /// Put right what differs.
    pub repair: bool,
    /// Bytes read a second.
    pub rate: u64,
}

impl Default for Verify {
    fn default() -> Self {
        Verify { interval: None, repair: false, rate: 32 << 20 }
    }
}

/// What is logged, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Log {
    /// Least severe level written.
    pub level: LogLevel,
    /// Shape of a line.
    pub format: LogFormat,
}

/// An enumeration with one lower-case word a value, in the file and on the command line.
macro_rules! words {
    ($(#[$doc:meta])* $type:ident { $($(#[$item_doc:meta])* $item:ident = $word:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, clap::ValueEnum, serde::Serialize, serde::Deserialize)]
        #[serde(rename_all = "lowercase")]
        pub enum $type { $($(#[$item_doc])* $item),+ }

        impl $type {
            /// Every value, as it is written.
            pub const WORDS: &'static [&'static str] = &[$($word),+];

            /// The value as it is written.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $($type::$item => $word),+ }
            }

            fn from_word(word: &str) -> Option<Self> {
                match word { $($word => Some($type::$item),)+ _ => None }
            }
        }

        impl std::fmt::Display for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(self.as_str())
            }
        }
    };
}

words! {
    /// Severity of log lines.
    #[derive(Default)]
    LogLevel {
        /// Replication stopped and a person is needed.
        Error = "error",
        /// Degraded.
        Warn = "warn",
        /// State changes.
        #[default]
        Info = "info",
        /// One line a transaction; addresses and paths appear.
        Debug = "debug",
        /// One line a file.
        Trace = "trace",
    }
}

words! {
    /// Shape of log lines.
    #[derive(Default)]
    LogFormat {
        /// For people.
        #[default]
        Text = "text",
        /// One JSON object a line.
        Json = "json",
    }
}

words! {
    /// The part a node plays in a mirror.
    Role {
        /// Accepts changes.
        Primary = "primary",
        /// Holds the replica.
        Standby = "standby",
    }
}

/// One `[[mirror]]`: a tree kept on two or more nodes.
#[derive(Debug, Clone, PartialEq)]
pub struct Mirror {
    /// Its name, the same on every node.
    pub name: MirrorName,
    /// Where the tree lies on this node: absolute.
    pub root: PathBuf,
    /// The format of what is in it.
    pub layout: Layout,
    /// The role this node starts with; later the state directory knows better (a promotion changes it there).
    pub role: Role,
    /// Patterns of consistency groups; empty: one a top-level directory.
    pub groups: Vec<Glob>,
    /// Patterns of what is not mirrored, besides the layout's own rules.
    pub exclude: Vec<Glob>,
    /// How often the tree is compared with the disk by a full stat scan.
    pub sweep_interval: Duration,
    /// A group that could not be cut for this long is sent as it is read; `None`: it waits, and the lag shows.
    pub fuzzy_after: Option<Duration>,
}

impl Mirror {
    /// What of the tree is replicated.
    #[must_use]
    pub fn selection(&self) -> Selection {
        Selection::new(self.layout, self.exclude.clone())
    }

    /// How its paths fall into groups.
    #[must_use]
    pub fn grouping(&self) -> Grouping {
        Grouping::new(self.groups.clone())
    }
}

/// One `[[peer]]`: another node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Its name.
    pub node: NodeName,
    /// Where it listens; all are tried.
    pub addresses: Vec<SocketAddr>,
    /// Fingerprint of its pinned key, as `twinbox pair` wrote it; without one it is not let in.
    pub fingerprint: Option<String>,
}

impl Config {
    /// Reads and validates the file at `path`; also resolves symlinks to see whether roots overlap on disk.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = read_text(path)?;
        let checked = parse::parse(&text).and_then(|(config, spans)| {
            let problems = paths::overlaps(&config, &spans, paths::resolve);
            if problems.is_empty() { Ok(config) } else { Err(problems) }
        });
        checked.map_err(|problems| ConfigError::Invalid { path: Some(path.to_owned()), problems: Problems::locate(problems, &text) })
    }

    /// Validates `text` without touching the disk.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        parse::parse(text)
            .map(|(config, _)| config)
            .map_err(|problems| ConfigError::Invalid { path: None, problems: Problems::locate(problems, text) })
    }

    /// The mirror called `name`.
    #[must_use]
    pub fn mirror(&self, name: &str) -> Option<&Mirror> {
        self.mirrors.iter().find(|mirror| mirror.name.as_str() == name)
    }

    /// The peer called `node`.
    #[must_use]
    pub fn peer(&self, node: &str) -> Option<&Peer> {
        self.peers.iter().find(|peer| peer.node.as_str() == node)
    }
}

fn read_text(path: &Path) -> Result<String, ConfigError> {
    let unreadable = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => ConfigError::NotFound { path: path.to_owned() },
        _ => ConfigError::Unreadable { path: path.to_owned(), source },
    };
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(unreadable)?;
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(ConfigError::TooLarge { path: path.to_owned() });
    }
    String::from_utf8(bytes).map_err(|error| {
        let good = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        ConfigError::NotUtf8 { path: path.to_owned(), line: 1 + good.iter().filter(|&&b| b == b'\n').count() }
    })
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
