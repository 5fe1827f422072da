//! What of a node's memory changes when it takes over a mirror, or gives it up. See ARCHITECTURE §5b.
//!
//! Called while nothing of the mirror runs: the standby has applied and checkpointed what it had, or the capture has ended. Each function's last step is one write to `state.db`; killed before it, nothing has happened
//! that the next start would not put right. Does not stop or start anything.

use std::fs;
use std::path::Path;

use rustix::fs::{self as rfs, FileType};
use rustix::io::Errno;
use twinbox_protocol::entry::Kind;
use twinbox_protocol::ids::{Epoch, Lsn};
use twinbox_protocol::path::RelPath;
use twinbox_resync::manifest::Manifest;
use twinbox_resync::node::{LocalMark, MirrorState, NodeState, Role};
use twinbox_resync::redo::RedoLog;
use twinbox_resync::rows::{Row, Rows};
use twinbox_resync::schema::StateError;

use crate::heal::boot_id;
use crate::layout::Selection;
use crate::roles::mirror_dir;
use crate::standby::copy;
use crate::tree::{self, Root};

/// Why a role was not changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SwitchError {
    /// Nothing is known of the mirror.
    #[error("mirror `{mirror}`: this node has never followed a primary: there is nothing to take over")]
    Unknown {
        /// Which.
        mirror: String,
    },
    /// It has that role.
    #[error("mirror `{mirror}`: this node is its {role} already")]
    Already {
        /// Which.
        mirror: String,
        /// Role.
        role: &'static str,
    },
    /// Acknowledged txns are not in the replica.
    #[error(
        "mirror `{mirror}`: the replica could not be brought to LSN {durable}, which was acknowledged; it is at {applied}. See the log and mend what it names"
    )]
    Behind {
        /// Which.
        mirror: String,
        /// Acknowledged.
        durable: Lsn,
        /// In the replica.
        applied: Lsn,
    },
    /// The store was changed after the last fence.
    #[error("mirror `{mirror}`: {count} paths were changed while the role was given up, {first} among them: stop the mail server first")]
    Changed {
        /// Which.
        mirror: String,
        /// How many.
        count: u64,
        /// One of them.
        first: RelPath,
    },
    /// State.
    #[error(transparent)]
    State(#[from] StateError),
    /// Files of the state.
    #[error("mirror `{mirror}`: {source}")]
    Io {
        /// Which.
        mirror: String,
        /// The system's words.
        source: std::io::Error,
    },
}

fn known(node: &NodeState, mirror: &str, not: Role) -> Result<MirrorState, SwitchError> {
    match node.mirror(mirror)? {
        None => Err(SwitchError::Unknown { mirror: mirror.into() }),
        Some(known) if known.role == not => Err(SwitchError::Already { mirror: mirror.into(), role: not.as_str() }),
        Some(known) => Ok(known),
    }
}

/// The standby of a mirror becomes its primary: the manifest stays as it is, which is what any other node is compared with when it comes back. Gives the new epoch.
///
/// # Errors
/// [`SwitchError`]: nothing was changed.
pub fn promote(state_dir: &Path, mirror: &str) -> Result<Epoch, SwitchError> {
    let io = |source| SwitchError::Io { mirror: mirror.into(), source };
    let node = NodeState::open(state_dir)?;
    let mut known = known(&node, mirror, Role::Primary)?;
    let dir = mirror_dir(state_dir, mirror);
    let manifest = Manifest::open(&dir.join("manifest.db"), true)?;
    let position = manifest.position().map_err(|e| manifest.state_error(&e))?;
    let applied = position.lsn;
    let redo = dir.join("redo");
    if redo.exists() {
        let durable = RedoLog::open(&redo, position).map_err(|error| io(std::io::Error::other(error)))?.sealed().lsn;
        if durable > applied {
            return Err(SwitchError::Behind { mirror: mirror.into(), durable, applied });
        }
    }
    known.role = Role::Primary;
    known.epoch = Epoch(known.epoch.0.max(known.lineage.last().epoch.0).max(heard(&dir).0) + 1);
    // No LSN is issued twice. The next one is left to a node that comes back: it marks by it what it has that is not of this history.
    known.reserved = known.reserved.max(applied).next();
    // The last checkpoint of the standby synced the replica: this disk has all that was ever numbered. Without this mark one of an earlier time as primary would call for a heal.
    node.set_local_mark(mirror, &LocalMark { boot: boot_id().map_err(io)?, lsn: known.reserved, clean: false })?;
    node.set_mirror(mirror, &known)?;
    unmark(&dir, &[ADOPTING, GAVE_UP, RETURNING]).map_err(io)?;
    // What was sent ahead and never named.
    or_absent(fs::remove_dir_all(dir.join("staging"))).map_err(io)?;
    Ok(known.epoch)
}

/// The primary of a mirror, which has nothing that the other node lacks, becomes a standby that waits for that one to be promoted. `changed`: although the store was changed after the last
/// transaction; that is kept in `rescue` when the other node's state replaces it.
///
/// # Errors
/// [`SwitchError`]: nothing was changed.
pub fn demote(state_dir: &Path, mirror: &str, root: &Path, selection: &Selection, changed: bool) -> Result<(), SwitchError> {
    let io = |source| SwitchError::Io { mirror: mirror.into(), source };
    let node = NodeState::open(state_dir)?;
    let mut known = known(&node, mirror, Role::Standby)?;
    let dir = mirror_dir(state_dir, mirror);
    let manifest = Manifest::open(&dir.join("manifest.db"), true)?;
    let (count, first) = differences(&manifest, root, selection).map_err(io)?;
    if let Some(first) = first.clone().filter(|_| !changed) {
        return Err(SwitchError::Changed { mirror: mirror.into(), count, first });
    }
    // Of an earlier time as standby.
    for part in ["redo", "staging"] {
        or_absent(fs::remove_dir_all(dir.join(part))).map_err(io)?;
    }
    manifest.prune_gone(Lsn::MAX).map_err(|e| manifest.state_error(&e))?;
    drop(manifest);
    // Of steps that were not finished.
    unmark(&dir, &[ADOPTING, GAVE_UP, RETURNING]).map_err(io)?;
    known.role = Role::Standby;
    if first.is_some() {
        // What the other node lacks is told from what it has by comparing all of it, and kept.
        set_mark(&dir, GAVE_UP, "").map_err(io)?;
        known.complete = false;
    }
    Ok(node.set_mirror(mirror, &known)?)
}

/// The primary of a mirror gives up: whatever it has that the other node lacks will be in `rescue` when it follows that one. Its manifest goes, so that all files are compared.
///
/// # Errors
/// [`SwitchError`]: nothing was changed, or it can be done again.
pub fn give_up(state_dir: &Path, mirror: &str) -> Result<(), SwitchError> {
    let io = |source| SwitchError::Io { mirror: mirror.into(), source };
    let node = NodeState::open(state_dir)?;
    let dir = mirror_dir(state_dir, mirror);
    let mut known = match node.mirror(mirror)? {
        // Given up before, and that did not get to its end; or it has stepped down, or follows a history that its primary has left: the caller knows.
        Some(known) => known,
        None => known(&node, mirror, Role::Standby)?,
    };
    or_absent(fs::remove_file(dir.join(ADOPTING))).map_err(io)?;
    set_mark(&dir, GAVE_UP, "").map_err(io)?;
    unmark(&dir, &[RETURNING]).map_err(io)?;
    known.role = Role::Standby;
    known.complete = false;
    // The standby that starts finds the mark, sets the manifest aside and takes all files over.
    Ok(node.set_mirror(mirror, &known)?)
}

/// The primary of a mirror stops being that, because another node was promoted after it, for the `heard`th time. Nothing of the mirror runs then until `resync` has been through, or it is given up or promoted.
///
/// # Errors
/// [`SwitchError`]: nothing was changed.
pub fn step_down(state_dir: &Path, mirror: &str, heard: Epoch) -> Result<(), SwitchError> {
    let io = |source| SwitchError::Io { mirror: mirror.into(), source };
    let node = NodeState::open(state_dir)?;
    let mut known = known(&node, mirror, Role::Standby)?;
    set_mark(&mirror_dir(state_dir, mirror), RETURNING, &heard.0.to_string()).map_err(io)?;
    known.role = Role::Standby;
    Ok(node.set_mirror(mirror, &known)?)
}

/// The promotion that a returning node has stepped down for: its own next one comes after that.
fn heard(dir: &Path) -> Epoch {
    Epoch(fs::read_to_string(dir.join(RETURNING)).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0))
}

/// Durable when it returns.
pub(crate) fn unmark(dir: &Path, marks: &[&str]) -> std::io::Result<()> {
    for mark in marks {
        or_absent(fs::remove_file(dir.join(mark)))?;
    }
    fs::File::open(dir)?.sync_all()
}

/// Durable when it returns.
fn set_mark(dir: &Path, mark: &str, text: &str) -> std::io::Result<()> {
    fs::write(dir.join(mark), text)?;
    fs::File::open(dir.join(mark))?.sync_all()?;
    fs::File::open(dir)?.sync_all()
}

/// Says that a node has given up: its files are to be taken over by whoever is primary. Goes with the end of that first sync.
pub(crate) const GAVE_UP: &str = "gave-up";
/// Says that files are being taken over; the standby's.
pub(crate) const ADOPTING: &str = "adopting";

/// Says that this node was primary, another one was promoted after it, and what it has alone has not been merged or kept yet.
pub(crate) const RETURNING: &str = "returning";

/// Whether this node has stopped being primary of a mirror and is not its standby yet. `role`: as `state.db` has it; the mark of a step that was not finished counts for nothing.
#[must_use]
pub fn is_returning(state_dir: &Path, mirror: &str, role: Role) -> bool {
    let dir = mirror_dir(state_dir, mirror);
    role == Role::Standby && dir.join(RETURNING).exists() && !dir.join(GAVE_UP).exists()
}

/// Whether this node has given a mirror up and does not follow another primary yet.
#[must_use]
pub fn gave_up(state_dir: &Path, mirror: &str) -> bool {
    mirror_dir(state_dir, mirror).join(GAVE_UP).exists()
}

/// A removal of what need not be there.
pub(crate) fn or_absent(removed: std::io::Result<()>) -> std::io::Result<()> {
    match removed {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Paths of the store that are not as the manifest says, by their stats; their number and one of them. Directories' times are not looked at.
fn differences(manifest: &Manifest, root: &Path, selection: &Selection) -> std::io::Result<(u64, Option<RelPath>)> {
    let root = Root::open(root)?;
    let (mut count, mut first, mut seen) = (0, None, 0u64);
    let mut stack = vec![RelPath::root()];
    let other = std::io::Error::other;
    while let Some(dir) = stack.pop() {
        let fd = root.dir_for_reading(&dir)?;
        for item in tree::list(std::os::fd::AsFd::as_fd(&fd))? {
            let Some(path) = dir.join(&item.name) else { continue };
            let stat = match root.stat(&path) {
                Ok(Some(stat)) => stat,
                Ok(None) | Err(Errno::XDEV) => continue,
                Err(error) => return Err(error.into()),
            };
            let is_dir = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
            if selection.excludes(path.as_bytes(), is_dir) || FileType::from_raw_mode(stat.st_mode) == FileType::Socket {
                continue;
            }
            let row = manifest.row(&path).map_err(other)?;
            seen += u64::from(row.is_some());
            let same = |row: &Row| is_as(row, &stat, is_dir) || holds(&root, &path, row, &stat);
            if !row.as_ref().is_some_and(same) {
                count += 1;
                first.get_or_insert_with(|| path.clone());
            }
            if is_dir {
                stack.push(path);
            }
        }
    }
    // The root's own row is not among those that were seen.
    let rows = manifest.len() - u64::from(manifest.row(&RelPath::root()).map_err(other)?.is_some());
    if seen < rows {
        count += rows - seen;
        first.get_or_insert_with(RelPath::root);
    }
    Ok((count, first))
}

/// Whether a file is as its row says although its ctime is not known or was moved: its bytes are read.
fn holds(root: &Root, path: &RelPath, row: &Row, stat: &rfs::Stat) -> bool {
    let same = row.entry.size() == stat.st_size as u64 && row.entry.mtime == tree::mtime(stat) && row.entry.mode == stat.st_mode & 0o7777;
    let read = || copy::hash(&root.file(path).ok()?.into()).ok();
    FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile && same && row.entry.hash().is_some_and(|hash| read() == Some(hash))
}

fn is_as(row: &Row, stat: &rfs::Stat, is_dir: bool) -> bool {
    if is_dir || row.entry.is_dir() {
        return is_dir && row.entry.is_dir();
    }
    let size = !matches!(row.entry.kind, Kind::File { .. }) || row.entry.size() == stat.st_size as u64;
    row.local == Some(tree::local(stat)) && row.entry.mtime == tree::mtime(stat) && size
}
