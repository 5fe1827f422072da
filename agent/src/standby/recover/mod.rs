//! Bringing a replica whose agent died, or whose machine lost power, to the end of the redo log.
//!
//! The disk may be behind the log, ahead of the manifest, or a mixture: after a power cut later changes can have reached it before earlier ones. So nothing is replayed.
//! The log's suffix is *folded* into one wanted row a path ([`fold`]), the disk is looked at and compared by content ([`survey`]), and only what differs is made right
//! ([`settle`]). Every step can be repeated, so a crash during recovery is recovered from in the same way.
//!
//! What is trusted without reading: a file whose inode and ctime are those of its row, unless the log patches that inode (new bytes can be on disk under old times).
//! What is deleted without keeping: content the log or the manifest knows, empty files, and files that carry exactly a modification time of the log (our own, torn
//! by the power cut); anything else goes to rescue.

mod fold;
mod settle;
mod survey;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use rustix::fs as rfs;
use twinbox_protocol::ids::Lsn;
use twinbox_protocol::msg::Position;
use twinbox_protocol::path::RelPath;
use twinbox_resync::manifest::Manifest;
use twinbox_resync::rows::{Row, Rows};

use super::error::StandbyError;
use super::replica::Replica;
use super::rescue::Rescue;
use super::staging::Staging;
use fold::Suffix;

/// What recovery found.
pub(super) struct Recovered {
    /// For status: what could not be made right.
    pub(super) problems: Vec<String>,
    /// Whether the replica is at a cut.
    pub(super) complete: bool,
    /// Time of the last txn's cut.
    pub(super) captured_ns: i64,
}

/// Everything recovery works on.
struct Work<'a> {
    replica: &'a mut Replica,
    manifest: &'a mut Manifest,
    staging: &'a Arc<Staging>,
    rescue: &'a Rescue,
    adopting: bool,
    suffix: Suffix,
    /// Touched paths, their link partners and their directories: row at the checkpoint.
    before: BTreeMap<RelPath, Option<Row>>,
    /// The same paths: row wanted now.
    wanted: BTreeMap<RelPath, Option<Row>>,
    /// What was seen on disk.
    seen: BTreeMap<RelPath, survey::Seen>,
    /// Paths whose file on disk is right.
    right: BTreeSet<RelPath>,
    failed: BTreeMap<RelPath, String>,
    /// Inodes whose half-patched content was rebuilt elsewhere.
    rebuilt: BTreeSet<u64>,
}

/// See the module's text. `sealed`: the log's last position.
pub(super) fn recover(
    replica: &mut Replica,
    manifest: &mut Manifest,
    staging: &Arc<Staging>,
    rescue: &Rescue,
    redo_dir: &Path,
    sealed: Position,
    adopting: bool,
) -> Result<Recovered, StandbyError> {
    manifest.begin().map_err(|e| manifest.state_error(&e))?;
    let (suffix, before) = fold::fold(manifest, staging, redo_dir)?;
    tracing::info!(txns = suffix.txns, paths = before.len(), lsn = sealed.lsn.0, "recovering the replica from the redo log");
    let mut work = Work {
        replica,
        manifest,
        staging,
        rescue,
        adopting,
        suffix,
        before,
        wanted: BTreeMap::new(),
        seen: BTreeMap::new(),
        right: BTreeSet::new(),
        failed: BTreeMap::new(),
        rebuilt: BTreeSet::new(),
    };
    work.redo_renames()?;
    work.gather()?;
    work.look()?;
    let plan = work.plan()?;
    work.settle(&plan)?;
    let problems = work.verify()?;
    work.let_go();
    let (complete, captured_ns) = (work.suffix.complete, work.suffix.captured_ns);
    replica.dirs.clear();
    rfs::syncfs(replica.root.fd()).map_err(|e| StandbyError::io("syncfs of the replica", e))?;
    manifest.commit(sealed).map_err(|e| manifest.state_error(&e))?;
    Ok(Recovered { problems, complete, captured_ns })
}

impl Work<'_> {
    /// Recovery needs no content beside the replica any more; nor one that an earlier recovery, interrupted, had saved and this one found in its place.
    fn let_go(&self) {
        let wanted = self.wanted.values().flatten().filter_map(|row| row.entry.hash());
        for hash in self.suffix.known.iter().copied().chain(wanted) {
            self.staging.pin(hash, Lsn(u64::MAX));
        }
    }

    /// Completes the set of paths: link partners share an inode, directories above get their times back.
    fn gather(&mut self) -> Result<(), StandbyError> {
        let touched: Vec<RelPath> = self.before.keys().cloned().collect();
        let mut more = BTreeSet::new();
        for path in &touched {
            if let Some(row) = self.manifest.row(path)?
                && let Some(local) = row.local.filter(|_| !row.entry.is_dir())
            {
                more.extend(self.manifest.by_ino(local.ino).map_err(|e| self.manifest.state_error(&e))?);
            }
            let mut at = path.parent();
            while let Some(dir) = at {
                at = dir.parent();
                if !more.insert(dir) {
                    break;
                }
            }
        }
        for path in more {
            if !self.before.contains_key(&path) {
                let row = self.manifest.row(&path)?;
                self.before.insert(path, row);
            }
        }
        for path in self.before.keys() {
            self.wanted.insert(path.clone(), self.manifest.row(path)?);
        }
        Ok(())
    }
}
