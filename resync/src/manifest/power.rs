//! What a primary needs to know of its own disk after a power cut: which contents a path had lately, and which inodes are written in place.
//!
//! `before`: contents that paths had, as long as the change that replaced or removed them may not be durable *here*. A file found with one of them is older than its row, not newer.
//! `in_place`: inodes whose content was seen to change while they kept their name; new bytes can be under old timestamps there. A reused number costs one file read in vain.
//! Both are in the same file as the rows, so they are as old as the rows are, whatever the cut took.

use rusqlite::{OptionalExtension, params};
use twinbox_protocol::entry::{Entry, Time};
use twinbox_protocol::ids::{ContentHash, Lsn};
use twinbox_protocol::path::RelPath;

use super::{Manifest, decode, join, split};
use crate::rows::Local;

impl Manifest {
    /// Notes that `path` had this content until `lsn` took it.
    ///
    /// # Errors
    /// SQLite's.
    pub fn note_before(&self, path: &RelPath, hash: ContentHash, lsn: Lsn) -> rusqlite::Result<()> {
        self.db
            .prepare_cached("INSERT OR REPLACE INTO before VALUES (?1, ?2, ?3)")?
            .execute(params![path.as_bytes(), hash.0, lsn.0 as i64])
            .map(|_| ())
    }

    /// Whether `path` had this content lately.
    ///
    /// # Errors
    /// SQLite's.
    pub fn had(&self, path: &RelPath, hash: ContentHash) -> rusqlite::Result<bool> {
        self.db.prepare_cached("SELECT 1 FROM before WHERE path = ?1 AND hash = ?2")?.exists(params![path.as_bytes(), hash.0])
    }

    /// Everything up to `durable` survives a power cut here: what was before it is of no interest any more.
    ///
    /// # Errors
    /// SQLite's.
    pub fn prune_before(&self, durable: Lsn) -> rusqlite::Result<()> {
        self.db.prepare_cached("DELETE FROM before WHERE lsn <= ?1")?.execute([durable.0 as i64]).map(|_| ())
    }

    /// Some rows after a path, in the order of directories: a directory before what is in it.
    ///
    /// # Errors
    /// SQLite's.
    pub fn rows_after(&self, path: Option<&RelPath>, most: usize) -> rusqlite::Result<Vec<(RelPath, Entry)>> {
        let (dir, name) = path.map_or((&b""[..], &b""[..]), split);
        let sql = if path.is_some() {
            "SELECT dir, name, entry, ino, ctime_s, ctime_ns FROM file WHERE (dir, name) > (?1, ?2) ORDER BY dir, name LIMIT ?3"
        } else {
            "SELECT dir, name, entry, ino, ctime_s, ctime_ns FROM file WHERE (dir, name) >= (?1, ?2) ORDER BY dir, name LIMIT ?3"
        };
        let mut statement = self.db.prepare_cached(sql)?;
        let mut rows = statement.query(params![dir, name, most as i64])?;
        let mut out = vec![];
        while let Some(sql) = rows.next()? {
            if let Ok(path) = join(sql.get_ref(0)?.as_blob()?, sql.get_ref(1)?.as_blob()?) {
                out.push((path, decode(sql, 2)?.entry));
            }
        }
        Ok(out)
    }

    /// Some removed paths before a path, backwards: what was in a directory before the directory.
    ///
    /// # Errors
    /// SQLite's.
    pub fn gone_before(&self, path: Option<&RelPath>, most: usize) -> rusqlite::Result<Vec<RelPath>> {
        let sql = match path {
            Some(_) => "SELECT path FROM gone WHERE path < ?1 ORDER BY path DESC LIMIT ?2",
            None => "SELECT path FROM gone WHERE path >= ?1 ORDER BY path DESC LIMIT ?2",
        };
        let mut statement = self.db.prepare_cached(sql)?;
        let mut rows = statement.query(params![path.map_or(&b""[..], RelPath::as_bytes), most as i64])?;
        let mut out = vec![];
        while let Some(sql) = rows.next()? {
            out.extend(RelPath::new(sql.get_ref(0)?.as_blob()?).ok());
        }
        Ok(out)
    }

    /// Notes that a path was removed, whether it had a row or not.
    ///
    /// # Errors
    /// SQLite's.
    pub fn set_gone(&self, path: &RelPath) -> rusqlite::Result<()> {
        self.db
            .prepare_cached("INSERT OR REPLACE INTO gone VALUES (?1, ?2)")?
            .execute(params![path.as_bytes(), self.lsn.0 as i64])
            .map(|_| ())
    }

    /// Whether a path was removed.
    ///
    /// # Errors
    /// SQLite's.
    pub fn is_gone(&self, path: &RelPath) -> rusqlite::Result<bool> {
        self.db.prepare_cached("SELECT 1 FROM gone WHERE path = ?1")?.exists([path.as_bytes()])
    }

    /// Notes that an inode is written in place; whether that was not known.
    ///
    /// # Errors
    /// SQLite's.
    pub fn note_in_place(&self, ino: u64) -> rusqlite::Result<bool> {
        self.db.prepare_cached("INSERT OR IGNORE INTO in_place VALUES (?1)")?.execute([ino as i64]).map(|new| new > 0)
    }

    /// The first inode after `after` that is written in place and still has a row; those without one are forgotten on the way.
    ///
    /// # Errors
    /// SQLite's.
    pub fn in_place_after(&self, after: Option<u64>) -> rusqlite::Result<Option<u64>> {
        let mut at = after.map_or(i64::MIN, |ino| ino as i64);
        let mut first = after.is_none();
        loop {
            let sql = if first { "SELECT min(ino) FROM in_place WHERE ino >= ?1" } else { "SELECT min(ino) FROM in_place WHERE ino > ?1" };
            first = false;
            let found: Option<i64> = self.db.prepare_cached(sql)?.query_row([at], |row| row.get(0)).optional()?.flatten();
            let Some(ino) = found else { return Ok(None) };
            if self.db.prepare_cached("SELECT 1 FROM file WHERE ino = ?1")?.exists([ino])? {
                return Ok(Some(ino as u64));
            }
            self.db.prepare_cached("DELETE FROM in_place WHERE ino = ?1")?.execute([ino])?;
            at = ino;
        }
    }

    /// Forgets the ctime noted of every file that is written in place, so that it is read again; gives their number. The inode stays noted: names that share it, and pages, are recognised by it.
    ///
    /// # Errors
    /// SQLite's.
    pub fn distrust_in_place(&mut self) -> rusqlite::Result<u64> {
        let position = self.position()?;
        self.begin()?;
        let (mut at, mut count) = (None, 0);
        while let Some(ino) = self.in_place_after(at)? {
            at = Some(ino);
            for path in self.by_ino(ino)? {
                self.set_local(&path, Some(Local { ino, ctime: Time::default() }))?;
                count += 1;
            }
        }
        self.commit(position)?;
        Ok(count)
    }

    /// Forgets the ctime noted of everything whose row was changed after `durable`, so that it is read again.
    ///
    /// # Errors
    /// SQLite's.
    pub fn distrust_after(&mut self, durable: Lsn) -> rusqlite::Result<()> {
        let position = self.position()?;
        self.begin()?;
        let all = "UPDATE file SET ctime_s = 0, ctime_ns = 0 WHERE lsn > ?1 AND ino IS NOT NULL";
        self.db.prepare_cached(all)?.execute([durable.0 as i64])?;
        self.commit(position)
    }
}

#[cfg(test)]
mod tests {
    use twinbox_protocol::entry::Kind;
    use twinbox_protocol::msg::Position;

    use super::super::plain_dir;
    use super::*;
    use crate::rows::{Row, Rows};
    use crate::view::View;

    fn p(text: &str) -> RelPath {
        RelPath::new(text.as_bytes()).unwrap()
    }

    fn row(bytes: &[u8], ino: u64) -> Option<Row> {
        let kind = Kind::File { size: bytes.len() as u64, hash: ContentHash::of(bytes) };
        Some(Row { entry: Entry { kind, ..plain_dir() }, local: Some(Local { ino, ctime: Time::default() }) })
    }

    fn at(lsn: u64) -> Position {
        Position { lsn: Lsn(lsn), ..Position::START }
    }

    #[test]
    fn what_a_path_had_is_known_until_the_change_is_durable_here() {
        let dir = tempfile::tempdir().unwrap();
        let mut view = View::new(Manifest::open(&dir.path().join("m.db"), false).unwrap());
        for (lsn, bytes) in [(1, Some(&b"one"[..])), (2, Some(b"two")), (3, Some(b"three")), (4, None)] {
            view.start(Lsn(lsn));
            view.set(&p("f"), bytes.and_then(|bytes| row(bytes, 7))).unwrap();
            view.keep();
        }
        let had = |view: &View, bytes: &[u8]| view.manifest().had(&p("f"), ContentHash::of(bytes)).unwrap();
        view.handle_durable(at(2)).unwrap();
        assert!(had(&view, b"one") && !had(&view, b"two"), "only what is stored is past");
        // Two versions at one acknowledgement: both are past.
        view.handle_durable(at(4)).unwrap();
        assert!(had(&view, b"one") && had(&view, b"two") && had(&view, b"three"));
        view.manifest().prune_before(Lsn(3)).unwrap();
        assert!(!had(&view, b"one") && !had(&view, b"two") && had(&view, b"three"));
    }

    #[test]
    fn pages_go_through_everything_once_in_an_order_that_suits_a_tree() {
        let dir = tempfile::tempdir().unwrap();
        let mut m = Manifest::open(&dir.path().join("m.db"), true).unwrap();
        let names = ["a", "a/b", "a/b/c", "a-b", "b", "a/c"];
        m.set_lsn(Lsn(1));
        m.set(&RelPath::root(), row(b"x", 1)).unwrap();
        for name in names {
            m.set(&p(name), row(b"x", 1)).unwrap();
        }
        let (mut seen, mut at) = (vec![], None);
        while let Some((path, _)) = m.rows_after(at.as_ref(), 1).unwrap().pop() {
            seen.push(path.clone());
            at = Some(path);
        }
        assert_eq!(seen.len(), names.len() + 1);
        let place = |name: &str| seen.iter().position(|path| *path == p(name)).unwrap();
        assert!(place("a") < place("a/b") && place("a/b") < place("a/b/c"), "{seen:?}");
        for name in names {
            m.set(&p(name), None).unwrap();
        }
        let (mut gone, mut at) = (vec![], None);
        while let Some(path) = m.gone_before(at.as_ref(), 1).unwrap().pop() {
            gone.push(path.clone());
            at = Some(path);
        }
        assert_eq!(gone.len(), names.len());
        let place = |name: &str| gone.iter().position(|path| *path == p(name)).unwrap();
        assert!(place("a/b/c") < place("a/b") && place("a/b") < place("a"), "{gone:?}");
        assert!(m.is_gone(&p("a/c")).unwrap() && !m.is_gone(&p("x")).unwrap());
    }

    #[test]
    fn inodes_written_in_place_are_listed_while_a_row_has_them() {
        let dir = tempfile::tempdir().unwrap();
        let mut m = Manifest::open(&dir.path().join("m.db"), false).unwrap();
        m.set(&p("a"), row(b"a", 5)).unwrap();
        m.set(&p("b"), row(b"b", u64::MAX)).unwrap();
        for ino in [5, 6, u64::MAX, 5] {
            m.note_in_place(ino).unwrap();
        }
        let first = m.in_place_after(None).unwrap();
        let second = m.in_place_after(first).unwrap();
        let mut both = [first.unwrap(), second.unwrap()];
        both.sort_unstable();
        assert_eq!(both, [5, u64::MAX]);
        assert_eq!(m.in_place_after(second).unwrap(), None);
        m.set(&p("b"), None).unwrap();
        assert_eq!(m.in_place_after(None).unwrap(), Some(5));
        m.set_local(&p("a"), Some(Local { ino: 5, ctime: Time { secs: 9, nanos: 9 } })).unwrap();
        assert_eq!(m.distrust_in_place().unwrap(), 1);
        assert_eq!(m.row(&p("a")).unwrap().unwrap().local, Some(Local { ino: 5, ctime: Time::default() }));
    }

    #[test]
    fn what_was_changed_after_the_mark_is_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let mut m = Manifest::open(&dir.path().join("m.db"), false).unwrap();
        let noted = Some(Local { ino: 7, ctime: Time { secs: 9, nanos: 9 } });
        for (lsn, name) in [(3, "before"), (4, "after"), (4, "gone"), (5, "unnoted")] {
            m.set_lsn(Lsn(lsn));
            m.set(&p(name), Some(Row { local: noted.filter(|_| name != "unnoted"), ..row(b"x", 7).unwrap() })).unwrap();
        }
        m.set(&p("gone"), None).unwrap();
        m.distrust_after(Lsn(3)).unwrap();
        let local = |name: &str| m.row(&p(name)).unwrap().and_then(|row| row.local);
        assert_eq!([local("before"), local("unnoted"), local("gone")], [noted, None, None]);
        assert_eq!(local("after"), Some(Local { ino: 7, ctime: Time::default() }));
    }
}
