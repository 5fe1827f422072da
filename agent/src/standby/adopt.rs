//! Taking over files that are here already: manifest rows made from the tree, at LSN 0.
//!
//! Of several names of one file only the first gets a row: the others are then unknown here, so that the primary links or sends them anew.
//! What a sync replaces or removes before it is complete goes to rescue.

use std::collections::BTreeSet;
use std::os::fd::AsFd;

use rustix::fs as rfs;
use rustix::io::Errno;
use twinbox_protocol::ids::Lsn;
use twinbox_protocol::msg::Position;
use twinbox_protocol::path::RelPath;
use twinbox_resync::manifest::Manifest;
use twinbox_resync::rows::{Row, Rows};

use super::copy;
use super::error::StandbyError;
use super::replica::{Replica, is_dir, kind};
use super::rescue::children;
use crate::tree;

/// Makes the rows; gives their number. Paths that cannot be read are left out, and logged.
pub(super) fn scan(replica: &mut Replica, manifest: &mut Manifest) -> Result<u64, StandbyError> {
    manifest.begin().map_err(|e| manifest.state_error(&e))?;
    manifest.clear().map_err(|e| manifest.state_error(&e))?;
    manifest.set_lsn(Lsn::ZERO);
    let mut seen = BTreeSet::new();
    let mut rest = vec![RelPath::root()];
    while let Some(path) = rest.pop() {
        match look(replica, &path, &mut seen) {
            Ok(Some(row)) => {
                let dir = row.entry.is_dir();
                manifest.set(&path, Some(row))?;
                if dir {
                    match children(replica, &path) {
                        Ok(below) => rest.extend(below.into_iter().filter(|child| !ours(child))),
                        Err(error) => skipped(&path, error),
                    }
                }
            }
            Ok(None) => {}
            Err(Errno::XDEV) => {
                let detail = format!("{path} is another file system; mirror it on its own");
                return Err(StandbyError::Root { path: replica.root.path().into(), detail });
            }
            Err(error) => skipped(&path, error),
        }
    }
    replica.dirs.clear();
    manifest.commit(Position::START).map_err(|e| manifest.state_error(&e))?;
    Ok(manifest.len())
}

fn skipped(path: &RelPath, error: Errno) {
    tracing::warn!(%error, "a path cannot be read and is not taken over");
    tracing::debug!(%path, "not taken over");
}

/// Names that are never mirrored.
pub(super) fn ours(path: &RelPath) -> bool {
    path.name().starts_with(b".twinbox-") || path.as_bytes() == b"lost+found"
}

fn look(replica: &mut Replica, path: &RelPath, seen: &mut BTreeSet<(u64, u64)>) -> Result<Option<Row>, Errno> {
    let handle = replica.handle(path)?;
    let stat = rfs::fstat(&handle)?;
    if !is_dir(&stat) && stat.st_nlink > 1 && !seen.insert((stat.st_dev, stat.st_ino)) {
        return Ok(None);
    }
    let xattrs = tree::xattrs(handle.as_fd(), true)?;
    let (mut hash, mut target) = (None, None);
    match kind(&stat) {
        rfs::FileType::RegularFile => {
            let file = replica.file(path, false)?;
            hash = Some(copy::hash(&file).map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))?);
        }
        rfs::FileType::Symlink => target = Some(rfs::readlinkat(&handle, c"", vec![])?.into_bytes()),
        _ => {}
    }
    // Looked at again after reading, in case opening it changed its ctime.
    let stat = rfs::fstat(&handle)?;
    Ok(tree::entry(&stat, xattrs, hash, target).map(|entry| Row { entry, local: Some(tree::local(&stat)) }))
}
