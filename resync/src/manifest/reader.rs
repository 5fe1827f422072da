//! Committed rows, read beside the thread that owns the manifest: a directory at a time, in pieces, so that memory is bounded and no reader keeps SQLite's log from being trimmed.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, OpenFlags, OptionalExtension, params};
use twinbox_protocol::path::RelPath;

use super::{ADVICE, decode};
use crate::rows::Row;
use crate::schema::StateError;

/// See the module's text.
pub struct Reader {
    db: Connection,
    path: PathBuf,
}

impl Reader {
    /// Opens a `manifest.db` that somebody else has open, and never writes to it.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn open(path: &Path) -> Result<Self, StateError> {
        let sorted = |error: rusqlite::Error| StateError::from_sqlite(path, &error, ADVICE);
        let db = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX).map_err(sorted)?;
        db.busy_timeout(Duration::from_secs(10)).map_err(sorted)?;
        db.execute_batch("PRAGMA query_only=1; PRAGMA cache_size=-2048;").map_err(sorted)?;
        Ok(Reader { db, path: path.into() })
    }

    fn sorted(&self) -> impl Fn(rusqlite::Error) -> StateError + '_ {
        |error| StateError::from_sqlite(&self.path, &error, ADVICE)
    }

    /// Number of rows.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn count(&self) -> Result<u64, StateError> {
        let count = self.db.query_row("SELECT count(*) FROM file", [], |row| row.get::<_, i64>(0));
        Ok(count.map_err(self.sorted())? as u64)
    }

    /// The next directory with something in it, in the order of bytes.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn dir_after(&self, dir: &RelPath) -> Result<Option<RelPath>, StateError> {
        let read = || -> rusqlite::Result<Option<Vec<u8>>> {
            let mut statement = self.db.prepare_cached("SELECT dir FROM file WHERE dir > ?1 ORDER BY dir LIMIT 1")?;
            statement.query_row([dir.as_bytes()], |row| row.get(0)).optional()
        };
        Ok(read().map_err(self.sorted())?.and_then(|bytes| RelPath::new(&bytes).ok()))
    }

    /// Children of a directory after a name, sorted by name, so many at most.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn children_after(&self, dir: &RelPath, name: &[u8], most: usize) -> Result<Vec<(Vec<u8>, Row)>, StateError> {
        let read = || -> rusqlite::Result<Vec<(Vec<u8>, Row)>> {
            let mut statement = self.db.prepare_cached(
                "SELECT name, entry, ino, ctime_s, ctime_ns FROM file WHERE dir = ?1 AND name > ?2 ORDER BY name LIMIT ?3",
            )?;
            let rows = statement.query_map(params![dir.as_bytes(), name, most as i64], |sql| Ok((sql.get(0)?, decode(sql, 1)?)))?;
            rows.collect()
        };
        read().map_err(self.sorted())
    }

    /// Whether nothing is in a directory.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn is_empty_dir(&self, dir: &RelPath) -> Result<bool, StateError> {
        let read = || self.db.prepare_cached("SELECT 1 FROM file WHERE dir = ?1 AND name != x'' LIMIT 1")?.exists([dir.as_bytes()]);
        read().map(|exists| !exists).map_err(self.sorted())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::{Manifest, plain_dir};
    use crate::rows::Rows;
    use twinbox_protocol::msg::Position;

    #[test]
    fn all_rows_come_in_pieces_while_their_owner_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.db");
        let mut owner = Manifest::open(&path, true).unwrap();
        let at = |text: &str| RelPath::new(text.as_bytes()).unwrap();
        let set = |owner: &mut Manifest, path: RelPath| owner.set(&path, Some(Row { entry: plain_dir(), local: None })).unwrap();
        owner.begin().unwrap();
        let all = ["", "a", "a/1", "a/2", "a/3", "a-", "b", "b/c", "b/c/x"];
        all.iter().for_each(|path| set(&mut owner, if path.is_empty() { RelPath::root() } else { at(path) }));
        owner.commit(Position::START).unwrap();
        let reader = Reader::open(&path).unwrap();
        owner.begin().unwrap();
        set(&mut owner, at("a/4"));
        let (mut found, mut dir) = (vec![], Some(RelPath::root()));
        while let Some(here) = dir {
            let mut name = vec![];
            loop {
                let piece = reader.children_after(&here, &name, 2).unwrap();
                let Some((last, _)) = piece.last() else { break };
                name.clone_from(last);
                found.extend(piece.into_iter().map(|(name, _)| here.join(&name).unwrap().to_string()));
            }
            dir = reader.dir_after(&here).unwrap();
        }
        found.sort();
        let mut want = all[1..].to_vec();
        want.sort_unstable();
        assert_eq!(found, want, "committed ones, the root's own aside");
        assert_eq!(
            (reader.count().unwrap(), reader.is_empty_dir(&at("a/1")).unwrap(), reader.is_empty_dir(&at("b")).unwrap()),
            (9, true, false)
        );
        owner.commit(Position::START).unwrap();
        assert_eq!(reader.children_after(&at("a"), b"3", 9).unwrap().len(), 1);
    }
}
