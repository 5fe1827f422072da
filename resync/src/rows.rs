//! What each op does to a manifest: one function for both nodes, so that they cannot disagree.
//!
//! [`Rows`] is implemented by the primary's [`crate::view::View`] and the standby's [`crate::manifest::Manifest`]. [`perform`] refuses an op that makes no sense on the rows as they are
//! (a file in a directory that is not there, a directory that is not empty replaced): the planner then looks at the disk again, and the standby reports it.

use serde::{Deserialize, Serialize};
use twinbox_protocol::entry::{Entry, Time};
use twinbox_protocol::ops::Op;
use twinbox_protocol::path::RelPath;

/// What only this machine knows of a path: it tells whether the file on disk is still the one we know.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Local {
    /// Inode number.
    pub ino: u64,
    /// Time of last change, by this machine's file system.
    pub ctime: Time,
}

/// A path's row.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Row {
    /// What both nodes know.
    pub entry: Entry,
    /// What only this one does; `None` when never looked at here.
    pub local: Option<Local>,
}

/// An op does not fit the rows.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RowError {
    /// The path it starts from is not known.
    #[error("{path} is not in the manifest")]
    Missing {
        /// Which.
        path: RelPath,
    },
    /// The directory it lies in is not known, or is not a directory.
    #[error("the directory of {path} is not in the manifest")]
    NoParent {
        /// Which.
        path: RelPath,
    },
    /// A directory that is not empty would be replaced or removed.
    #[error("{path} is a directory that is not empty")]
    NotEmpty {
        /// Which.
        path: RelPath,
    },
    /// File where a directory is needed, or the reverse.
    #[error("{path} is of another type")]
    WrongType {
        /// Which.
        path: RelPath,
    },
    /// The row store failed.
    #[error("manifest: {detail}")]
    Store {
        /// Its words.
        detail: String,
    },
}

/// A set of rows that ops can be performed on.
pub trait Rows {
    /// The row of a path. The root always has one.
    ///
    /// # Errors
    /// [`RowError::Store`].
    fn row(&self, path: &RelPath) -> Result<Option<Row>, RowError>;
    /// Sets or removes a row, keeping the digest.
    ///
    /// # Errors
    /// [`RowError::Store`].
    fn set(&mut self, path: &RelPath, row: Option<Row>) -> Result<(), RowError>;
    /// Every path strictly below a directory, in path order.
    ///
    /// # Errors
    /// [`RowError::Store`].
    fn below(&self, dir: &RelPath) -> Result<Vec<(RelPath, Row)>, RowError>;
    /// Whether anything is below a directory.
    ///
    /// # Errors
    /// [`RowError::Store`].
    fn is_empty_dir(&self, dir: &RelPath) -> Result<bool, RowError>;
}

fn parent_is_dir(rows: &impl Rows, path: &RelPath) -> Result<(), RowError> {
    let Some(parent) = path.parent() else { return Ok(()) };
    if parent.is_root() || rows.row(&parent)?.is_some_and(|row| row.entry.is_dir()) {
        Ok(())
    } else {
        Err(RowError::NoParent { path: path.clone() })
    }
}

/// Whatever is at `path` may be replaced by something that is not a directory (or, `by_dir`, by an empty or whole directory).
fn replaceable(rows: &impl Rows, path: &RelPath, by_dir: bool) -> Result<(), RowError> {
    match rows.row(path)? {
        None => Ok(()),
        Some(row) if row.entry.is_dir() != by_dir => Err(RowError::WrongType { path: path.clone() }),
        Some(row) if row.entry.is_dir() && !rows.is_empty_dir(path)? => Err(RowError::NotEmpty { path: path.clone() }),
        Some(_) => Ok(()),
    }
}

/// Performs `op` on `rows`. On an error nothing was changed.
///
/// # Errors
/// [`RowError`].
pub fn perform(rows: &mut impl Rows, op: &Op) -> Result<(), RowError> {
    let existing = |rows: &_, path: &RelPath| Rows::row(rows, path)?.ok_or_else(|| RowError::Missing { path: path.clone() });
    match op {
        Op::Put { path, entry, .. } => {
            parent_is_dir(rows, path)?;
            replaceable(rows, path, false)?;
            rows.set(path, Some(Row { entry: entry.clone(), local: None }))
        }
        Op::Patch { path, entry, base, .. } => {
            let row = existing(rows, path)?;
            if row.entry.hash() != Some(*base) {
                return Err(RowError::WrongType { path: path.clone() });
            }
            rows.set(path, Some(Row { entry: entry.clone(), local: row.local }))
        }
        Op::Make { path, entry } => {
            parent_is_dir(rows, path)?;
            let old = rows.row(path)?;
            match &old {
                Some(old) if old.entry.is_dir() && entry.is_dir() => {}
                _ => replaceable(rows, path, entry.is_dir())?,
            }
            let local = old.filter(|o| o.entry.is_dir()).and_then(|o| o.local);
            rows.set(path, Some(Row { entry: entry.clone(), local }))
        }
        Op::Rename { from, to } => {
            let row = existing(rows, from)?;
            parent_is_dir(rows, to)?;
            replaceable(rows, to, row.entry.is_dir())?;
            let below = if row.entry.is_dir() { rows.below(from)? } else { vec![] };
            // Before the first row is touched: a name below may become too long.
            let moves = below.into_iter().map(|(path, row)| match path.rebase(from, to) {
                Some(moved) => Ok((path, moved, row)),
                None => Err(RowError::NoParent { path }),
            });
            for (path, moved, row) in moves.collect::<Result<Vec<_>, _>>()? {
                rows.set(&path, None)?;
                rows.set(&moved, Some(row))?;
            }
            rows.set(from, None)?;
            rows.set(to, Some(row))
        }
        Op::Link { from, to } => {
            let row = existing(rows, from)?;
            if row.entry.is_dir() {
                return Err(RowError::WrongType { path: from.clone() });
            }
            parent_is_dir(rows, to)?;
            replaceable(rows, to, false)?;
            rows.set(to, Some(row))
        }
        Op::Remove { path } => {
            let row = existing(rows, path)?;
            if row.entry.is_dir() && !rows.is_empty_dir(path)? {
                return Err(RowError::NotEmpty { path: path.clone() });
            }
            rows.set(path, None)
        }
        Op::SetMeta { path, attrs } => {
            let row = existing(rows, path)?;
            rows.set(path, Some(Row { entry: attrs.on(&row.entry), local: row.local }))
        }
    }
}
