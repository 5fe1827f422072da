//! `verify`: reads a disk against the manifest, and mends what differs. Rows of both nodes are compared at every LSN by their digest; this compares rows with disks, each node its own.
//!
//! ```text
//! committed rows (read beside their owner) ─┐
//! listing, stat, bytes from the disk ───────┴▶ differ? ▶ suspect ▶ owner's look ▶ once more ▶ the same each time? ▶ finding ▶ mend
//! ```
//! A suspect is looked at twice more, a second apart, by whoever owns its row: on a standby the applier, between two txns; on a primary the capture, which knows what is changing. Only what is the same
//! each time, row and disk, is a finding. Paced, stopped and continued at any directory (`scrub`); `judge` is pure; `sides` ask the owners and mend; `record` is what is remembered of it.
//!
//! Does not compare what no row knows of because it is excluded.

pub(crate) mod judge;
mod pace;
pub mod record;
pub(crate) mod scrub;
pub(crate) mod sides;

pub use judge::What;
pub use pace::Stop;
pub use record::{Finding, Outcome, Record, VerifyStatus};
pub(crate) use scrub::Scrub;

#[cfg(test)]
mod tests;

/// Why it could not go on; what was done is remembered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VerifyError {
    /// The root.
    #[error("{path}: {}", std::io::Error::from(*.source))]
    Disk {
        /// Which path.
        path: String,
        /// The system's word.
        source: rustix::io::Errno,
    },
    /// The root is not there.
    #[error("root {0} was moved, removed or unmounted: nothing was judged by its absence")]
    RootGone(String),
    /// The manifest.
    #[error(transparent)]
    State(#[from] twinbox_resync::schema::StateError),
    /// What is remembered of a run.
    #[error("{path}: {source}", path = path.display())]
    Record {
        /// The file.
        path: std::path::PathBuf,
        /// The system's words.
        source: std::io::Error,
    },
    /// Row and disk need not agree.
    #[error("not now: {0}; `twinbox verify` goes on where it was")]
    NotNow(String),
    /// The mirror's threads ended: the agent stops, or its role changes.
    #[error("the mirror was stopped meanwhile; `twinbox verify` goes on where it was")]
    Ended,
}
