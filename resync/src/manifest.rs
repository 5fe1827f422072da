//! The manifest: per path, what the standby durably has. Both nodes keep the same one, in `manifest.db`.
//!
//! A row is keyed by (directory, name), so that listing a directory reads neighbours. Memory is SQLite's page cache (16 MiB), whatever the
//! store's size. Beside the rows: tombstones of removed paths (for a primary that missed acknowledgements), the log position and digest the rows stand for,
//! recent chain hashes, and the page values and chunk lists of large files, keyed by content.
//!
//! A primary's manifest also remembers what its own disk may have lost track of at a power cut: see `manifest/power.rs`.
//!
//! Does not decide when to commit: the owner wraps changes in [`Manifest::begin`] and [`Manifest::commit`].

mod power;
mod reader;

pub use reader::Reader;

use std::path::{Path, PathBuf};

use rusqlite::types::Value;
use rusqlite::{Connection, OptionalExtension, Row as SqlRow, params};
use serde_bytes::ByteBuf;
use twinbox_protocol::chunk::{self, Chunk};
use twinbox_protocol::codec;
use twinbox_protocol::content::PageTree;
use twinbox_protocol::digest::{Digest, DigestKey};
use twinbox_protocol::entry::{Entry, Kind, Time};
use twinbox_protocol::ids::{ChainHash, ContentHash, Lsn};
use twinbox_protocol::msg::Position;
use twinbox_protocol::path::{NAME_MAX, RelPath};

use crate::rows::{Local, Row, RowError, Rows};
use crate::schema::{self, StateError};

const ADVICE: &str = "move it aside and start again: it is rebuilt from the files and the peer";

const MIGRATIONS: &[&str] = &[
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
     CREATE TABLE file (
        dir BLOB NOT NULL, name BLOB NOT NULL, entry BLOB NOT NULL, lsn INTEGER NOT NULL,
        hash INTEGER, ino INTEGER, ctime_s INTEGER, ctime_ns INTEGER,
        PRIMARY KEY (dir, name)
     ) WITHOUT ROWID;
     CREATE INDEX file_ino ON file(ino) WHERE ino IS NOT NULL;
     CREATE INDEX file_hash ON file(hash) WHERE hash IS NOT NULL;
     CREATE TABLE gone (path BLOB PRIMARY KEY, lsn INTEGER NOT NULL) WITHOUT ROWID;
     CREATE TABLE chain (lsn INTEGER PRIMARY KEY, hash BLOB NOT NULL);
     CREATE TABLE large (hash BLOB PRIMARY KEY, size INTEGER NOT NULL, pages BLOB, chunks BLOB);",
    "CREATE TABLE before (path BLOB NOT NULL, hash BLOB NOT NULL, lsn INTEGER NOT NULL, PRIMARY KEY (path, hash)) WITHOUT ROWID;
     CREATE INDEX before_lsn ON before(lsn);
     CREATE TABLE in_place (ino INTEGER PRIMARY KEY);",
];

/// Contents shorter than this are not looked up by hash: sending them costs less than the reference.
pub const REF_MIN: u64 = 512;
/// Chain hashes remembered.
const CHAIN_KEPT: u64 = 100_000;

/// See the module's text.
pub struct Manifest {
    db: Connection,
    path: PathBuf,
    key: DigestKey,
    digest: Digest,
    lsn: Lsn,
    rows: u64,
    tombstones: bool,
}

fn store(error: &rusqlite::Error) -> RowError {
    RowError::Store { detail: error.to_string() }
}

fn short(hash: ContentHash) -> i64 {
    i64::from_le_bytes(hash.0[..8].try_into().unwrap_or_default())
}

/// The hash column: only for contents worth a look-up.
fn indexed(entry: &Entry) -> Option<i64> {
    entry.hash().filter(|_| entry.size() >= REF_MIN).map(short)
}

fn split(path: &RelPath) -> (&[u8], &[u8]) {
    path.split().unwrap_or((b"", b""))
}

fn join(dir: &[u8], name: &[u8]) -> Result<RelPath, RowError> {
    let bytes = if dir.is_empty() { name.to_vec() } else { [dir, b"/", name].concat() };
    RelPath::new(&bytes).map_err(|error| RowError::Store { detail: error.to_string() })
}

fn decode(sql: &SqlRow<'_>, first: usize) -> rusqlite::Result<Row> {
    let bytes = sql.get_ref(first)?.as_blob()?;
    let entry = codec::decode::<Entry>(bytes, codec::CONTROL_MAX)
        .map_err(|error| rusqlite::Error::FromSqlConversionFailure(first, rusqlite::types::Type::Blob, Box::new(error)))?;
    let ino: Option<i64> = sql.get(first + 1)?;
    let local = match ino {
        Some(ino) => {
            Some(Local { ino: ino as u64, ctime: Time { secs: sql.get(first + 2)?, nanos: sql.get::<_, i64>(first + 3)? as u32 } })
        }
        None => None,
    };
    Ok(Row { entry, local })
}

impl Manifest {
    /// Opens or creates `manifest.db` at `path`. On a standby (`full_sync`) a commit survives a power cut; on a primary it need not, since the standby is asked.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn open(path: &Path, full_sync: bool) -> Result<Self, StateError> {
        let db = schema::open(path, MIGRATIONS, full_sync, ADVICE)?;
        db.set_prepared_statement_cache_capacity(64);
        let mut manifest = Manifest {
            db,
            path: path.into(),
            key: DigestKey([0; 32]),
            digest: Digest::default(),
            lsn: Lsn::ZERO,
            rows: 0,
            tombstones: full_sync,
        };
        let sorted = |error: rusqlite::Error| StateError::from_sqlite(path, &error, ADVICE);
        if let Some(key) = manifest.meta("digest_key").map_err(sorted)?.and_then(|v| v.try_into().ok()) {
            manifest.key = DigestKey(key);
        }
        if let Some(digest) = manifest.meta("digest").map_err(sorted)?.and_then(|v| v.try_into().ok()) {
            manifest.digest = Digest::from_bytes(digest);
        }
        manifest.lsn = manifest.position().map_err(sorted)?.lsn;
        manifest.rows = manifest.db.query_row("SELECT count(*) FROM file", [], |row| row.get::<_, i64>(0)).map_err(sorted)? as u64;
        Ok(manifest)
    }

    /// Makes of a failure a [`StateError`] naming the file.
    #[must_use]
    pub fn state_error(&self, error: &rusqlite::Error) -> StateError {
        StateError::from_sqlite(&self.path, error, ADVICE)
    }

    fn meta(&self, key: &str) -> rusqlite::Result<Option<Vec<u8>>> {
        self.db.prepare_cached("SELECT value FROM meta WHERE key = ?1")?.query_row([key], |row| row.get(0)).optional()
    }

    fn set_meta(&self, key: &str, value: &[u8]) -> rusqlite::Result<()> {
        self.db.prepare_cached("INSERT OR REPLACE INTO meta VALUES (?1, ?2)")?.execute(params![key, value]).map(|_| ())
    }

    /// Starts a transaction; changes are seen by this connection at once and by others after [`Manifest::commit`].
    ///
    /// # Errors
    /// SQLite's.
    pub fn begin(&self) -> rusqlite::Result<()> {
        if self.db.is_autocommit() { self.db.execute_batch("BEGIN IMMEDIATE") } else { Ok(()) }
    }

    /// Ends it, with the position and digest the rows now stand for.
    ///
    /// # Errors
    /// SQLite's.
    pub fn commit(&mut self, position: Position) -> rusqlite::Result<()> {
        self.begin()?;
        self.set_meta("position", &codec::encode(&position))?;
        self.set_meta("digest", &self.digest.to_bytes())?;
        self.db
            .prepare_cached("INSERT OR REPLACE INTO chain VALUES (?1, ?2)")?
            .execute(params![position.lsn.0 as i64, position.chain.0])?;
        self.db.prepare_cached("DELETE FROM chain WHERE lsn < ?1")?.execute([position.lsn.0.saturating_sub(CHAIN_KEPT) as i64])?;
        self.db.execute_batch("COMMIT")
    }

    /// Position the committed rows stand for.
    ///
    /// # Errors
    /// SQLite's.
    pub fn position(&self) -> rusqlite::Result<Position> {
        Ok(self.meta("position")?.and_then(|bytes| codec::decode(&bytes, 1024).ok()).unwrap_or(Position::START))
    }

    /// Chain hash at an LSN, while remembered.
    ///
    /// # Errors
    /// SQLite's.
    pub fn chain_at(&self, lsn: Lsn) -> rusqlite::Result<Option<ChainHash>> {
        self.db
            .prepare_cached("SELECT hash FROM chain WHERE lsn = ?1")?
            .query_row([lsn.0 as i64], |row| row.get(0).map(ChainHash))
            .optional()
    }

    /// Remembers a chain hash of a position between commits.
    ///
    /// # Errors
    /// SQLite's.
    pub fn remember_chain(&self, position: Position) -> rusqlite::Result<()> {
        self.db
            .prepare_cached("INSERT OR REPLACE INTO chain VALUES (?1, ?2)")?
            .execute(params![position.lsn.0 as i64, position.chain.0])
            .map(|_| ())
    }

    /// Digest of all rows.
    #[must_use]
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// Key of the digest.
    #[must_use]
    pub fn digest_key(&self) -> DigestKey {
        self.key
    }

    /// Number of rows.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.rows
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rows == 0
    }

    /// Changes the digest's key, computing the digest of all rows anew when it differs.
    ///
    /// # Errors
    /// SQLite's.
    pub fn set_digest_key(&mut self, key: DigestKey) -> rusqlite::Result<()> {
        if key == self.key {
            return Ok(());
        }
        self.key = key;
        let mut digest = Digest::default();
        self.each(None, |path, row, _| digest.add(Digest::row(&key, &path, &row.entry)))?;
        self.digest = digest;
        self.set_meta("digest_key", &key.0)?;
        self.set_meta("digest", &digest.to_bytes())
    }

    /// The LSN that changes from now on are marked with.
    pub fn set_lsn(&mut self, lsn: Lsn) {
        self.lsn = lsn;
    }

    /// Calls `sink` for every row (changed after `since`), in path order of directories.
    ///
    /// # Errors
    /// SQLite's.
    pub fn each(&self, since: Option<Lsn>, mut sink: impl FnMut(RelPath, Row, Lsn)) -> rusqlite::Result<()> {
        let since = since.map_or(-1, |lsn| lsn.0 as i64);
        let mut statement =
            self.db.prepare_cached("SELECT dir, name, lsn, entry, ino, ctime_s, ctime_ns FROM file WHERE lsn > ?1 ORDER BY dir, name")?;
        let mut rows = statement.query([since])?;
        while let Some(sql) = rows.next()? {
            if let Ok(path) = join(sql.get_ref(0)?.as_blob()?, sql.get_ref(1)?.as_blob()?) {
                sink(path, decode(sql, 3)?, Lsn(sql.get::<_, i64>(2)? as u64));
            }
        }
        Ok(())
    }

    /// Calls `sink` for every path removed after `since`.
    ///
    /// # Errors
    /// SQLite's.
    pub fn each_gone(&self, since: Lsn, mut sink: impl FnMut(RelPath)) -> rusqlite::Result<()> {
        let mut statement = self.db.prepare_cached("SELECT path FROM gone WHERE lsn > ?1")?;
        let mut rows = statement.query([since.0 as i64])?;
        while let Some(sql) = rows.next()? {
            if let Ok(path) = RelPath::new(sql.get_ref(0)?.as_blob()?) {
                sink(path);
            }
        }
        Ok(())
    }

    /// Forgets tombstones up to `stored`: the primary has stored everything up to there.
    ///
    /// # Errors
    /// SQLite's.
    pub fn prune_gone(&self, stored: Lsn) -> rusqlite::Result<()> {
        self.db.prepare_cached("DELETE FROM gone WHERE lsn <= ?1")?.execute([stored.0 as i64]).map(|_| ())
    }

    /// Forgets tombstones from `lsn` on: what was removed then is no longer told as removed.
    ///
    /// # Errors
    /// SQLite's.
    pub fn forget_gone(&self, lsn: Lsn) -> rusqlite::Result<()> {
        self.db.prepare_cached("DELETE FROM gone WHERE lsn >= ?1")?.execute([lsn.0 as i64]).map(|_| ())
    }

    /// Removes the rows of a path and of everything below it without a tombstone: they are not known, which is something else than removed.
    ///
    /// # Errors
    /// [`RowError::Store`].
    pub fn forget(&mut self, path: &RelPath) -> Result<(), RowError> {
        let tombstones = std::mem::replace(&mut self.tombstones, false);
        let below = self.below(path);
        let done = below.and_then(|below| {
            below.into_iter().rev().try_for_each(|(below, _)| self.set(&below, None))?;
            self.set(path, None)
        });
        self.tombstones = tombstones;
        done
    }

    /// Removes every row and tombstone (before a full pull).
    ///
    /// # Errors
    /// SQLite's.
    pub fn clear(&mut self) -> rusqlite::Result<()> {
        self.db.execute_batch("DELETE FROM file; DELETE FROM gone; DELETE FROM chain;")?;
        self.digest = Digest::default();
        self.rows = 0;
        Ok(())
    }

    /// Direct children of a directory, sorted by name. The root's own row is not among them.
    ///
    /// # Errors
    /// SQLite's.
    pub fn children(&self, dir: &RelPath) -> rusqlite::Result<Vec<(Vec<u8>, Row)>> {
        let mut statement =
            self.db.prepare_cached("SELECT name, entry, ino, ctime_s, ctime_ns FROM file WHERE dir = ?1 AND name != x'' ORDER BY name")?;
        let rows = statement.query_map([dir.as_bytes()], |sql| Ok((sql.get(0)?, decode(sql, 1)?)))?;
        rows.collect()
    }

    /// Paths whose file had this inode number here.
    ///
    /// # Errors
    /// SQLite's.
    pub fn by_ino(&self, ino: u64) -> rusqlite::Result<Vec<RelPath>> {
        let mut statement = self.db.prepare_cached("SELECT dir, name FROM file WHERE ino = ?1")?;
        let rows = statement.query_map([ino as i64], |sql| Ok((sql.get::<_, Vec<u8>>(0)?, sql.get::<_, Vec<u8>>(1)?)))?;
        Ok(rows.collect::<rusqlite::Result<Vec<_>>>()?.iter().filter_map(|(dir, name)| join(dir, name).ok()).collect())
    }

    /// Some paths with this content (of [`REF_MIN`] bytes or more), at most eight.
    ///
    /// # Errors
    /// SQLite's.
    pub fn by_hash(&self, hash: ContentHash) -> rusqlite::Result<Vec<RelPath>> {
        let mut statement = self.db.prepare_cached("SELECT dir, name, entry FROM file WHERE hash = ?1 LIMIT 8")?;
        let mut rows = statement.query([short(hash)])?;
        let mut out = vec![];
        while let Some(sql) = rows.next()? {
            let entry = codec::decode::<Entry>(sql.get_ref(2)?.as_blob()?, codec::CONTROL_MAX);
            if entry.is_ok_and(|e| e.hash() == Some(hash)) {
                out.extend(join(sql.get_ref(0)?.as_blob()?, sql.get_ref(1)?.as_blob()?).ok());
            }
        }
        Ok(out)
    }

    /// Notes what this machine knows of a path, without touching anything else.
    ///
    /// # Errors
    /// SQLite's.
    pub fn set_local(&self, path: &RelPath, local: Option<Local>) -> rusqlite::Result<()> {
        let (dir, name) = split(path);
        let local = local.map(|l| (l.ino as i64, l.ctime.secs, i64::from(l.ctime.nanos)));
        self.db
            .prepare_cached("UPDATE file SET ino = ?3, ctime_s = ?4, ctime_ns = ?5 WHERE dir = ?1 AND name = ?2")?
            .execute(params![dir, name, local.map(|l| l.0), local.map(|l| l.1), local.map(|l| l.2)])
            .map(|_| ())
    }

    /// Page values and chunk list of a content.
    ///
    /// # Errors
    /// SQLite's.
    pub fn large(&self, hash: ContentHash) -> rusqlite::Result<Option<Large>> {
        let found = self
            .db
            .prepare_cached("SELECT size, pages, chunks FROM large WHERE hash = ?1")?
            .query_row([hash.0], |row| Ok((row.get::<_, i64>(0)?, row.get::<_, Vec<u8>>(1)?, row.get::<_, Option<Vec<u8>>>(2)?)))
            .optional()?;
        Ok(found.and_then(|(size, pages, chunks)| {
            Some(Large { tree: PageTree::from_bytes(size as u64, &pages)?, chunks: chunks.and_then(|c| chunk::from_bytes(&c)) })
        }))
    }

    /// Forgets page values and chunk list of a content.
    ///
    /// # Errors
    /// SQLite's.
    pub fn forget_large(&self, hash: ContentHash) -> rusqlite::Result<()> {
        self.db.prepare_cached("DELETE FROM large WHERE hash = ?1")?.execute([hash.0]).map(|_| ())
    }

    /// Whether changes wait for [`Manifest::commit`].
    #[must_use]
    pub fn in_transaction(&self) -> bool {
        !self.db.is_autocommit()
    }

    /// Takes back everything since [`Manifest::begin`].
    ///
    /// # Errors
    /// SQLite's.
    pub fn roll_back(&mut self) -> rusqlite::Result<()> {
        if !self.db.is_autocommit() {
            self.db.execute_batch("ROLLBACK")?;
        }
        let key = self.meta("digest_key")?.and_then(|v| v.try_into().ok()).unwrap_or_default();
        let digest = self.meta("digest")?.and_then(|v| v.try_into().ok()).unwrap_or_default();
        self.key = DigestKey(key);
        self.digest = Digest::from_bytes(digest);
        self.rows = self.db.query_row("SELECT count(*) FROM file", [], |row| row.get::<_, i64>(0))? as u64;
        Ok(())
    }

    /// Paths whose row was not set since the mark was set with [`Manifest::set_lsn`].
    ///
    /// # Errors
    /// SQLite's.
    pub fn unmarked(&self, mark: Lsn, most: usize) -> rusqlite::Result<Vec<RelPath>> {
        let mut statement = self.db.prepare_cached("SELECT dir, name FROM file WHERE lsn != ?1 LIMIT ?2")?;
        let rows = statement.query_map([mark.0 as i64, most as i64], |sql| Ok((sql.get::<_, Vec<u8>>(0)?, sql.get::<_, Vec<u8>>(1)?)))?;
        Ok(rows.collect::<rusqlite::Result<Vec<_>>>()?.iter().filter_map(|(dir, name)| join(dir, name).ok()).collect())
    }

    /// Rows and tombstones marked `mark` are of `lsn` instead.
    ///
    /// # Errors
    /// SQLite's.
    pub fn settle(&mut self, mark: Lsn, lsn: Lsn) -> rusqlite::Result<()> {
        for table in ["UPDATE file SET lsn = ?2 WHERE lsn = ?1", "UPDATE gone SET lsn = ?2 WHERE lsn = ?1"] {
            self.db.prepare_cached(table)?.execute([mark.0 as i64, lsn.0 as i64])?;
        }
        self.lsn = lsn;
        Ok(())
    }

    /// Stores page values and chunk list of a content.
    ///
    /// # Errors
    /// SQLite's.
    pub fn set_large(&self, hash: ContentHash, large: &Large) -> rusqlite::Result<()> {
        self.db.prepare_cached("INSERT OR REPLACE INTO large VALUES (?1, ?2, ?3, ?4)")?.execute(params![
            hash.0,
            large.tree.content_len() as i64,
            large.tree.to_bytes(),
            large.chunks.as_ref().map(|c| chunk::to_bytes(c))
        ])?;
        Ok(())
    }
}

/// What is remembered of a large file's content, to find changes in it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Large {
    /// Chaining values of its pages.
    pub tree: PageTree,
    /// Its content-defined chunks.
    pub chunks: Option<Vec<Chunk>>,
}

impl Rows for Manifest {
    fn row(&self, path: &RelPath) -> Result<Option<Row>, RowError> {
        let (dir, name) = split(path);
        self.db
            .prepare_cached("SELECT entry, ino, ctime_s, ctime_ns FROM file WHERE dir = ?1 AND name = ?2")
            .and_then(|mut statement| statement.query_row([dir, name], |sql| decode(sql, 0)).optional())
            .map_err(|error| store(&error))
    }

    fn set(&mut self, path: &RelPath, row: Option<Row>) -> Result<(), RowError> {
        let old = self.row(path)?;
        if let Some(old) = &old {
            self.digest.sub(Digest::row(&self.key, path, &old.entry));
        }
        let (dir, name) = split(path);
        let done = match &row {
            Some(row) => {
                self.digest.add(Digest::row(&self.key, path, &row.entry));
                self.rows += u64::from(old.is_none());
                let local = row.local.map(|l| (l.ino as i64, l.ctime.secs, i64::from(l.ctime.nanos)));
                self.db
                    .prepare_cached(
                        "INSERT OR REPLACE INTO file (dir, name, entry, lsn, hash, ino, ctime_s, ctime_ns) VALUES (?1,?2,?3,?4,?5,?6,?7,?8)",
                    )
                    .and_then(|mut statement| {
                        statement.execute(params![
                            dir,
                            name,
                            codec::encode(&row.entry),
                            self.lsn.0 as i64,
                            indexed(&row.entry),
                            local.map(|l| l.0),
                            local.map(|l| l.1),
                            local.map(|l| l.2)
                        ])
                    })
            }
            None => {
                self.rows -= u64::from(old.is_some());
                self.db
                    .prepare_cached("DELETE FROM file WHERE dir = ?1 AND name = ?2")
                    .and_then(|mut statement| statement.execute(params![dir, name]))
            }
        };
        done.map_err(|error| store(&error))?;
        if self.tombstones {
            let noted = match row {
                None => self
                    .db
                    .prepare_cached("INSERT OR REPLACE INTO gone VALUES (?1, ?2)")
                    .and_then(|mut s| s.execute(params![path.as_bytes(), self.lsn.0 as i64])),
                Some(_) => self.db.prepare_cached("DELETE FROM gone WHERE path = ?1").and_then(|mut s| s.execute(params![path.as_bytes()])),
            };
            noted.map_err(|error| store(&error))?;
        }
        Ok(())
    }

    fn below(&self, dir: &RelPath) -> Result<Vec<(RelPath, Row)>, RowError> {
        // A name is too short to hold that many bytes, so every directory sorts before them.
        let (low, high) = dir.below().unwrap_or((vec![], vec![0xff; NAME_MAX + 1]));
        type Keyed = (Vec<u8>, Vec<u8>, Row);
        let read = || -> rusqlite::Result<Vec<Keyed>> {
            let mut statement = self.db.prepare_cached(
                "SELECT dir, name, entry, ino, ctime_s, ctime_ns FROM file WHERE (dir = ?1 OR (dir >= ?2 AND dir < ?3)) AND name != x''",
            )?;
            let args = [Value::Blob(dir.as_bytes().to_vec()), Value::Blob(low), Value::Blob(high)];
            let rows = statement.query_map(args, |sql| Ok((sql.get(0)?, sql.get(1)?, decode(sql, 2)?)))?;
            rows.collect()
        };
        let mut out = vec![];
        for (dir, name, row) in read().map_err(|error| store(&error))? {
            out.push((join(&dir, &name)?, row));
        }
        out.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(out)
    }

    fn is_empty_dir(&self, dir: &RelPath) -> Result<bool, RowError> {
        self.db
            .prepare_cached("SELECT 1 FROM file WHERE dir = ?1 AND name != x'' LIMIT 1")
            .and_then(|mut statement| statement.exists([dir.as_bytes()]))
            .map(|exists| !exists)
            .map_err(|error| store(&error))
    }
}

/// An entry for tests and for rows that have no file yet.
#[must_use]
pub fn plain_dir() -> Entry {
    Entry { kind: Kind::Dir, mode: 0o755, uid: 0, gid: 0, mtime: Time::default(), xattrs: Vec::<(ByteBuf, ByteBuf)>::new() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rows::perform;
    use twinbox_protocol::ops::{Content, Op};

    fn p(text: &str) -> RelPath {
        RelPath::new(text.as_bytes()).unwrap()
    }

    fn file(bytes: &[u8]) -> Entry {
        Entry { kind: Kind::File { size: bytes.len() as u64, hash: ContentHash::of(bytes) }, ..plain_dir() }
    }

    fn put(path: &str, bytes: &[u8]) -> Op {
        Op::Put { path: p(path), entry: file(bytes), content: Content::Known }
    }

    fn fresh(dir: &tempfile::TempDir) -> Manifest {
        Manifest::open(&dir.path().join("m.db"), true).unwrap()
    }

    #[test]
    fn rows_survive_reopening_with_digest_and_position() {
        let dir = tempfile::tempdir().unwrap();
        let mut m = fresh(&dir);
        m.set_digest_key(DigestKey([3; 32])).unwrap();
        m.begin().unwrap();
        m.set_lsn(Lsn(4));
        perform(&mut m, &Op::Make { path: p("a"), entry: plain_dir() }).unwrap();
        perform(&mut m, &put("a/x", &[1; 600])).unwrap();
        perform(&mut m, &Op::Make { path: RelPath::root(), entry: plain_dir() }).unwrap();
        let position = Position { lsn: Lsn(4), chain: ChainHash([9; 32]) };
        m.commit(position).unwrap();
        let digest = m.digest();
        drop(m);
        let m = fresh(&dir);
        assert_eq!((m.digest(), m.position().unwrap(), m.len()), (digest, position, 3));
        assert_eq!(m.by_hash(ContentHash::of(&[1; 600])).unwrap(), [p("a/x")]);
        assert_eq!(m.children(&RelPath::root()).unwrap().len(), 1);
        assert_eq!(m.chain_at(Lsn(4)).unwrap(), Some(ChainHash([9; 32])));
    }

    #[test]
    fn moving_a_directory_moves_what_is_below_and_keeps_the_digest_honest() {
        let dir = tempfile::tempdir().unwrap();
        let mut m = fresh(&dir);
        for d in ["a", "a/b", "ab"] {
            perform(&mut m, &Op::Make { path: p(d), entry: plain_dir() }).unwrap();
        }
        perform(&mut m, &put("a/b/x", b"1")).unwrap();
        perform(&mut m, &put("ab/y", b"2")).unwrap();
        perform(&mut m, &Op::Rename { from: p("a"), to: p("c") }).unwrap();
        let all: Vec<String> = m.below(&RelPath::root()).unwrap().iter().map(|(p, _)| p.to_string()).collect();
        assert_eq!(all, ["ab", "ab/y", "c", "c/b", "c/b/x"]);
        let kept = m.digest();
        m.set_digest_key(DigestKey([1; 32])).unwrap();
        m.set_digest_key(DigestKey([0; 32])).unwrap();
        assert_eq!(m.digest(), kept);
        let mut gone = vec![];
        m.each_gone(Lsn::ZERO, |path| gone.push(path)).unwrap();
        assert!(gone.is_empty(), "marked with LSN 0, so not after it");
    }

    #[test]
    fn ops_that_make_no_sense_are_refused_and_change_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let mut m = fresh(&dir);
        perform(&mut m, &Op::Make { path: p("d"), entry: plain_dir() }).unwrap();
        perform(&mut m, &put("d/f", b"1")).unwrap();
        let before = m.digest();
        for op in [
            put("no/where", b"1"),
            put("d/f/x", b"1"),
            put("d", b"1"),
            Op::Remove { path: p("d") },
            Op::Remove { path: p("nothing") },
            Op::Rename { from: p("d/f"), to: p("d") },
            Op::Link { from: p("d"), to: p("e") },
            Op::Patch { path: p("d/f"), entry: file(b"2"), base: ContentHash::of(b"other"), writes: vec![] },
        ] {
            assert!(perform(&mut m, &op).is_err(), "{op:?}");
            assert_eq!(m.digest(), before);
        }
    }

    #[test]
    fn a_rename_that_makes_a_name_below_too_long_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let mut m = fresh(&dir);
        let mut deep = RelPath::root();
        for _ in 0..63 {
            deep = deep.join(&[b'd'; 255]).unwrap();
            perform(&mut m, &Op::Make { path: deep.clone(), entry: plain_dir() }).unwrap();
        }
        perform(&mut m, &Op::Make { path: p("a"), entry: plain_dir() }).unwrap();
        perform(&mut m, &put("a/first", b"1")).unwrap();
        let long = p("a").join(&[b'x'; 255]).unwrap();
        perform(&mut m, &Op::Put { path: long, entry: file(b"2"), content: Content::Known }).unwrap();
        let before = (m.digest(), m.below(&p("a")).unwrap());
        let to = deep.join(&[b'y'; 100]).unwrap();
        assert!(matches!(perform(&mut m, &Op::Rename { from: p("a"), to }), Err(RowError::NoParent { .. })));
        assert_eq!((m.digest(), m.below(&p("a")).unwrap()), before);
    }

    #[test]
    fn everything_is_below_the_root_whatever_its_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let mut m = fresh(&dir);
        let high = RelPath::new(&[0xff; NAME_MAX]).unwrap();
        perform(&mut m, &Op::Make { path: high.clone(), entry: plain_dir() }).unwrap();
        let inside = high.join(b"x").unwrap();
        perform(&mut m, &Op::Put { path: inside.clone(), entry: file(b"1"), content: Content::Known }).unwrap();
        let all: Vec<RelPath> = m.below(&RelPath::root()).unwrap().into_iter().map(|(path, _)| path).collect();
        assert_eq!(all, [high, inside]);
    }

    #[test]
    fn damage_and_newer_schema_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.db");
        std::fs::write(&path, vec![7; 8192]).unwrap();
        assert!(Manifest::open(&path, true).err().unwrap().is_damage());
        assert_eq!(std::fs::read(&path).unwrap(), vec![7; 8192], "a damaged file is left as it was");
        std::fs::remove_file(&path).unwrap();
        Connection::open(&path).unwrap().execute_batch("PRAGMA user_version=99").unwrap();
        assert!(matches!(Manifest::open(&path, true), Err(StateError::Newer { found: 99, .. })));
    }
}
