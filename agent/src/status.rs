//! What the agent says about itself: the types behind `twinbox status --json`, described field by field in `docs/status.md`.
//!
//! Invariants: the schema is an interface. Within one [`SCHEMA`] number fields are only added, never renamed, removed or given
//! another unit; readers ignore fields they do not know. `null` always means "not known", never zero.
//!
//! Does not gather the numbers; `status/render.rs` turns them into text for people.

mod render;
mod units;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use render::render_status;
pub use units::{bytes_text, rfc3339, span_text};

use crate::config::Role;

/// The version of the schema these types describe.
pub const SCHEMA: u32 = 1;

/// All an agent says about itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Name of this node.
    pub node: String,
    /// Version of the agent.
    pub version: String,
    /// Process id of the agent.
    pub pid: u32,
    /// Seconds since the agent started.
    pub uptime_s: u64,
    /// The mirrors of this node, in the order of the configuration.
    pub mirrors: Vec<MirrorStatus>,
}

/// How well a mirror is protected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MirrorState {
    /// The first copy, or a full comparison, is under way; the standby is not complete yet.
    Syncing,
    /// A standby follows; the bound says how closely.
    Protected,
    /// No standby follows: what changes now exists once.
    Unprotected,
    /// Two nodes accepted changes apart; replication is refused until a person decides.
    Diverged,
}

/// One mirror.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MirrorStatus {
    /// Its name.
    pub name: String,
    /// This node's part in it now.
    pub role: Role,
    /// How well it is protected.
    pub state: MirrorState,
    /// The format of the tree.
    pub layout: String,
    /// Where the tree lies on this node.
    pub root: String,
    /// Grows by one at each promotion.
    pub epoch: u64,
    /// The history this node is in: 32 hexadecimal digits.
    pub generation: String,
    /// Positions in the mirror's sequence.
    pub lsn: Lsns,
    /// Age of the oldest change not yet durable on a standby, in ms; 0 when there is none.
    pub lag_ms: Option<u64>,
    /// The honest bound: the standby misses no change older than this, in ms, proved by the last canary.
    pub bound_ms: Option<u64>,
    /// What is not yet durable on a standby.
    pub pending: Pending,
    /// The other nodes of this mirror.
    pub peers: Vec<PeerStatus>,
    /// Throughput over the last seconds.
    pub rates: Rates,
    /// Counts since the agent started.
    pub totals: Totals,
    /// Kernel watches held.
    pub watches: Watches,
    /// Cuts committed though a file was still changing, since the agent started.
    pub fuzzy_cuts: u64,
    /// Files that could not be read and are tried again.
    pub unreadable: Unreadable,
    /// What could not be carried over, by kind (`ownership`, `xattrs`, …): number of paths. Empty when nothing is lost.
    pub lost_metadata: BTreeMap<String, u64>,
    /// Progress while `state` is `syncing`.
    pub sync: Option<SyncProgress>,
    /// The last error, also when it is over.
    pub last_error: Option<LastError>,
    /// RFC 3339 time (UTC) since which the mirror is `unprotected`.
    pub unprotected_since: Option<String>,
    /// Where a change does not get on, while that is so; the state is `unprotected` then.
    #[serde(default)]
    pub stalled: Option<Stalled>,
    /// What the file system here cannot do for the mirror, one sentence each. Empty on ext4, XFS, btrfs and tmpfs.
    #[serde(default)]
    pub warnings: Vec<String>,
    /// The last comparison of this node's disk with the manifest, or the one under way.
    #[serde(default)]
    pub verify: Option<crate::verify::VerifyStatus>,
}

/// A stage of the pipeline that does not move.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stalled {
    /// `watch`, `scan`, `read`, `commit`, `link`, `standby-log`, `standby-apply`, `idle`.
    pub stage: String,
    /// For how long, in ms.
    pub for_ms: u64,
}

/// Positions in a mirror's sequence of transactions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Lsns {
    /// Last one captured on the primary (as far as this node knows).
    pub captured: u64,
    /// Last one a power cut on the standby cannot lose.
    pub durable: u64,
    /// Last one visible in the standby's tree.
    pub applied: u64,
}

/// What is not yet durable on a standby.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Pending {
    /// Changed paths.
    pub paths: u64,
    /// Their content still to be sent, in bytes.
    pub bytes: u64,
}

/// One peer, as seen from this node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PeerStatus {
    /// Its name.
    pub node: String,
    /// Each configured address.
    pub addresses: Vec<AddressStatus>,
    /// Whether at least one address works.
    pub connected: bool,
    /// Last LSN durable there.
    pub durable: Option<u64>,
    /// Last LSN applied there.
    pub applied: Option<u64>,
    /// Its clock minus ours, in ms.
    pub clock_skew_ms: Option<i64>,
    /// Its agent's version.
    pub version: Option<String>,
}

/// One address of a peer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AddressStatus {
    /// `IP:PORT`.
    pub addr: String,
    /// Whether heartbeats pass.
    pub connected: bool,
    /// Smoothed round trip in ms.
    pub rtt_ms: Option<f64>,
    /// Why it last failed, also when that is over.
    pub last_error: Option<String>,
}

/// Throughput over the last seconds.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Rates {
    /// Transactions a second.
    pub txns_per_s: f64,
    /// Content captured, bytes a second.
    pub bytes_per_s: f64,
    /// Sent and received on the wire, bytes a second.
    pub wire_bytes_per_s: f64,
}

/// Counts since the agent started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Totals {
    /// Bytes sent on the wire, with all overhead.
    pub wire_sent: u64,
    /// Bytes received on the wire.
    pub wire_received: u64,
    /// Transactions.
    pub txns: u64,
    /// Files whose content or metadata travelled.
    pub files: u64,
}

/// Kernel watches held for a mirror.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Watches {
    /// One a directory.
    pub count: u64,
    /// Kernel memory they pin, in bytes, estimated.
    pub kernel_bytes: u64,
}

/// Files that could not be read.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Unreadable {
    /// How many.
    pub count: u64,
    /// Some of their paths, relative to the root; bytes that are not UTF-8 stand as `\xNN`.
    pub sample: Vec<String>,
}

/// Progress of the first copy or of a full comparison.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SyncProgress {
    /// What is being done, in a word or two: `scanning`, `copying`, `checking`.
    pub phase: String,
    /// Files done.
    pub files_done: u64,
    /// Files in all, once known.
    pub files_total: Option<u64>,
    /// Bytes done.
    pub bytes_done: u64,
    /// Bytes in all, once known.
    pub bytes_total: Option<u64>,
    /// Estimated seconds left.
    pub eta_s: Option<u64>,
}

/// An error and when it happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastError {
    /// RFC 3339, UTC.
    pub at: String,
    /// What happened, where, and what to do.
    pub message: String,
}

#[cfg(test)]
#[path = "status_tests.rs"]
mod tests;
