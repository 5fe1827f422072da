//! `state.db`: which mirrors this node keeps, in which role and history. Small, and every write survives a power cut.
//!
//! Invariant: an LSN is handed out only below the reserved ceiling stored here, so none is ever issued twice.

use std::path::{Path, PathBuf};

use rusqlite::{Connection, OptionalExtension, params};
use twinbox_protocol::codec;
use twinbox_protocol::digest::DigestKey;
use twinbox_protocol::ids::{Epoch, Generation, Lsn, MirrorId};
use twinbox_protocol::lineage::Lineage;

use crate::schema::{self, StateError};

const ADVICE: &str = "restore it from a backup, or move the whole state directory aside and set the node up again with `twinbox init`, `twinbox pair` and `--adopt`; the mail store itself is not affected";

const MIGRATIONS: &[&str] = &[
    "CREATE TABLE node (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
     CREATE TABLE mirror (
        name TEXT PRIMARY KEY, mirror_id BLOB NOT NULL, role TEXT NOT NULL, generation BLOB NOT NULL,
        epoch INTEGER NOT NULL, digest_key BLOB NOT NULL, reserved INTEGER NOT NULL, complete INTEGER NOT NULL
     ) WITHOUT ROWID;",
    // Version 2: the whole history, not only its newest generation.
    "ALTER TABLE mirror ADD COLUMN lineage BLOB;",
];

/// Role of a node for one mirror.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// Accepts changes.
    Primary,
    /// Holds the replica.
    Standby,
}

impl Role {
    /// As in configuration and status.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Role::Primary => "primary",
            Role::Standby => "standby",
        }
    }
}

/// What of a primary's own disk survives a power cut, as of the last word on it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LocalMark {
    /// The boot of the machine it was written in.
    pub boot: String,
    /// Everything up to here was on the disk.
    pub lsn: Lsn,
    /// The agent stopped in order after it: nothing was shipped since.
    pub clean: bool,
}

impl LocalMark {
    fn read(text: &str) -> Option<Self> {
        let mut words = text.split(' ');
        let (boot, lsn, clean) = (words.next()?, words.next()?.parse::<u64>().ok()?, words.next()?);
        let clean = match clean {
            "stopped" => true,
            "open" => false,
            _ => return None,
        };
        Some(LocalMark { boot: boot.into(), lsn: Lsn::try_from(lsn).ok()?, clean })
    }

    /// Whether the disk may lack what was shipped: the machine was started anew and nobody had said that all was on the disk. `known`: the last position of this node's manifest.
    #[must_use]
    pub fn is_torn(&self, boot: &str, known: Lsn) -> bool {
        // A mark that is older than the manifest is of a state.db that was put back.
        self.boot != boot && !(self.clean && known <= self.lsn)
    }
}

/// What a node knows of one mirror's history.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MirrorState {
    /// Id of the store.
    pub mirror_id: MirrorId,
    /// Role here.
    pub role: Role,
    /// History followed or written.
    pub lineage: Lineage,
    /// Promotions known of: one more than the newest term's when this node was promoted and nothing has changed since.
    pub epoch: Epoch,
    /// Key of the mirror's digests.
    pub digest_key: DigestKey,
    /// No LSN above this was ever issued by this node.
    pub reserved: Lsn,
    /// The first sync has been completed: the replica is at a cut.
    pub complete: bool,
}

/// The node's own state file.
pub struct NodeState {
    db: Connection,
    path: PathBuf,
}

impl NodeState {
    /// Opens or creates `<state>/state.db`.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn open(state_dir: &Path) -> Result<Self, StateError> {
        let path = state_dir.join("state.db");
        let db = schema::open(&path, MIGRATIONS, true, ADVICE)?;
        Ok(NodeState { db, path })
    }

    fn sorted<T>(&self, result: rusqlite::Result<T>) -> Result<T, StateError> {
        result.map_err(|error| StateError::from_sqlite(&self.path, &error, ADVICE))
    }

    /// A value of the node itself.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn value(&self, key: &str) -> Result<Option<String>, StateError> {
        self.sorted(self.db.query_row("SELECT value FROM node WHERE key = ?1", [key], |row| row.get(0)).optional())
    }

    /// Stores a value of the node itself; durable when it returns.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn set_value(&self, key: &str, value: &str) -> Result<(), StateError> {
        self.sorted(self.db.execute("INSERT OR REPLACE INTO node VALUES (?1, ?2)", params![key, value])).map(|_| ())
    }

    /// What is known of a mirror.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn mirror(&self, name: &str) -> Result<Option<MirrorState>, StateError> {
        let row = self.db.query_row(
            "SELECT mirror_id, role, generation, epoch, digest_key, reserved, complete, lineage FROM mirror WHERE name = ?1",
            [name],
            |row| {
                let role: String = row.get(1)?;
                let terms: Option<Vec<u8>> = row.get(7)?;
                let lineage = match terms {
                    Some(bytes) => codec::decode(&bytes, codec::CONTROL_MAX)
                        .map_err(|error| rusqlite::Error::FromSqlConversionFailure(7, rusqlite::types::Type::Blob, Box::new(error)))?,
                    // Of a version that knew one generation only.
                    None => Lineage::begin(Generation(row.get(2)?), ""),
                };
                Ok(MirrorState {
                    mirror_id: MirrorId(row.get(0)?),
                    role: if role == "primary" { Role::Primary } else { Role::Standby },
                    lineage,
                    epoch: Epoch(row.get::<_, i64>(3)? as u64),
                    digest_key: DigestKey(row.get(4)?),
                    reserved: Lsn(row.get::<_, i64>(5)? as u64),
                    complete: row.get(6)?,
                })
            },
        );
        self.sorted(row.optional())
    }

    /// Stores what is known of a mirror; durable when it returns.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn set_mirror(&self, name: &str, state: &MirrorState) -> Result<(), StateError> {
        self.insert_mirror("INSERT OR REPLACE", name, state.role, state, "").map(|_| ())
    }

    /// Inserts what is known of a mirror, all of it; gives the number of rows written.
    fn insert_mirror(&self, insert: &str, name: &str, role: Role, state: &MirrorState, or: &str) -> Result<usize, StateError> {
        let done = self.db.execute(
            &format!(
                "{insert} INTO mirror (name, mirror_id, role, generation, epoch, digest_key, reserved, complete, lineage) VALUES (?1,?2,?3,?4,?5,?6,?7,?8,?9) {or}"
            ),
            params![
                name,
                state.mirror_id.0,
                role.as_str(),
                state.lineage.generation().0,
                state.epoch.0 as i64,
                state.digest_key.0,
                state.reserved.0 as i64,
                state.complete,
                codec::encode(&state.lineage)
            ],
        );
        self.sorted(done)
    }

    /// A standby follows this history from now on; `false`, and nothing is stored, when this node is not standby of that mirror any more. Durable when it returns.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn follow(&self, name: &str, state: &MirrorState) -> Result<bool, StateError> {
        let or =
            "ON CONFLICT (name) DO UPDATE SET mirror_id = ?2, generation = ?4, epoch = ?5, digest_key = ?6, lineage = ?9 WHERE role = ?3";
        Ok(self.insert_mirror("INSERT", name, Role::Standby, state, or)? == 1)
    }

    /// Notes which history a mirror follows; durable when it returns.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn set_lineage(&self, name: &str, lineage: &Lineage, epoch: Epoch) -> Result<(), StateError> {
        let done = self.db.execute(
            "UPDATE mirror SET lineage = ?2, generation = ?3, epoch = ?4 WHERE name = ?1",
            params![name, codec::encode(lineage), lineage.generation().0, epoch.0 as i64],
        );
        self.sorted(done).map(|_| ())
    }

    /// What of this disk survives a power cut; `None` before the first word on it. Words that cannot be read count as "nothing since the first LSN".
    ///
    /// # Errors
    /// [`StateError`].
    pub fn local_mark(&self, name: &str) -> Result<Option<LocalMark>, StateError> {
        let text = self.value(&format!("local:{name}"))?;
        Ok(text.map(|text| LocalMark::read(&text).unwrap_or(LocalMark { boot: String::new(), lsn: Lsn::ZERO, clean: false })))
    }

    /// Stores it, whole; durable when it returns.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn set_local_mark(&self, name: &str, mark: &LocalMark) -> Result<(), StateError> {
        let LocalMark { boot, lsn, clean } = mark;
        self.set_value(&format!("local:{name}"), &format!("{boot} {lsn} {}", if *clean { "stopped" } else { "open" }))
    }

    /// Raises the ceiling of LSNs; durable when it returns.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn reserve(&self, name: &str, ceiling: Lsn) -> Result<(), StateError> {
        let done = self.db.execute("UPDATE mirror SET reserved = max(reserved, ?2) WHERE name = ?1", params![name, ceiling.0 as i64]);
        self.sorted(done).map(|_| ())
    }

    /// Notes whether the first sync is complete; durable when it returns.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn set_complete(&self, name: &str, complete: bool) -> Result<(), StateError> {
        let done = self.db.execute("UPDATE mirror SET complete = ?2 WHERE name = ?1 AND complete != ?2", params![name, complete]);
        self.sorted(done).map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn when_the_disk_may_lack_what_was_shipped() {
        let mark = |boot: &str, lsn, clean| LocalMark { boot: boot.into(), lsn: Lsn(lsn), clean };
        for (mark, known, torn, why) in [
            (mark("now", 5, false), 9, false, "the agent was killed, the machine was not: the page cache is whole"),
            (mark("now", 5, true), 5, false, "stopped and started again"),
            (mark("then", 5, true), 5, false, "stopped in order, then booted"),
            (mark("then", 5, false), 5, true, "power cut"),
            (mark("then", 5, true), 6, true, "a state.db of before was put back"),
            (mark("", 0, false), 0, true, "the mark cannot be read"),
        ] {
            assert_eq!(mark.is_torn("now", Lsn(known)), torn, "{why}");
        }
    }

    #[test]
    fn the_mark_survives_and_nonsense_is_the_worst_case() {
        let dir = tempfile::tempdir().unwrap();
        let node = NodeState::open(dir.path()).unwrap();
        assert_eq!(node.local_mark("m").unwrap(), None);
        for clean in [true, false] {
            let mark = LocalMark { boot: "b-1".into(), lsn: Lsn(77), clean };
            node.set_local_mark("m", &mark).unwrap();
            assert_eq!(node.local_mark("m").unwrap(), Some(mark));
        }
        for text in ["", "b", "b x open", "b 1 perhaps", "b 99999999999999999999 open"] {
            node.set_value("local:m", text).unwrap();
            let mark = node.local_mark("m").unwrap().unwrap();
            assert!(mark.is_torn("b", Lsn::ZERO) && mark.lsn == Lsn::ZERO, "{text}");
        }
    }
}
