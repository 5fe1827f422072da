//! Opening SQLite state files: version check, forward migration, damage told apart from a full disk.
//!
//! Invariant: a file with a newer schema, or one SQLite finds damaged, is never written to.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, ErrorCode, OpenFlags};

/// Why a state file cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// Written by a newer twinbox.
    #[error("{path} has schema version {found}, this twinbox knows up to {known}: start the newer twinbox, the file was not touched", path = path.display())]
    Newer {
        /// File.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// Ours.
        known: u32,
    },
    /// Not a database any more, or one that contradicts itself.
    #[error("{path} is damaged ({detail}): {advice}", path = path.display())]
    Damaged {
        /// File.
        path: PathBuf,
        /// SQLite's words.
        detail: String,
        /// What to do.
        advice: &'static str,
    },
    /// The disk or its permissions say no.
    #[error("cannot use {path}: {detail}; free space or mend permissions, then start again", path = path.display())]
    Disk {
        /// File.
        path: PathBuf,
        /// SQLite's words.
        detail: String,
    },
}

impl StateError {
    /// Sorts an SQLite error: damage, or the disk.
    #[must_use]
    pub fn from_sqlite(path: &Path, error: &rusqlite::Error, advice: &'static str) -> Self {
        let detail = error.to_string();
        match error.sqlite_error_code() {
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => StateError::Damaged { path: path.into(), detail, advice },
            Some(_) => StateError::Disk { path: path.into(), detail },
            None => StateError::Damaged { path: path.into(), detail, advice },
        }
    }

    /// Whether the file itself is bad (as opposed to the disk being full or closed to us).
    #[must_use]
    pub fn is_damage(&self) -> bool {
        matches!(self, StateError::Damaged { .. })
    }
}

/// Opens (or creates) a state file and brings it to the newest schema. `migrations[n]` takes version n to n + 1.
/// `full_sync`: commits survive a power cut (`synchronous=FULL`), else only a crash of the process (`NORMAL`).
///
/// # Errors
/// [`StateError`].
pub fn open(path: &Path, migrations: &[&str], full_sync: bool, advice: &'static str) -> Result<Connection, StateError> {
    let sorted = |error: rusqlite::Error| StateError::from_sqlite(path, &error, advice);
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let db = Connection::open_with_flags(path, flags).map_err(sorted)?;
    db.busy_timeout(Duration::from_secs(10)).map_err(sorted)?;
    let found: u32 = db.query_row("PRAGMA user_version", [], |row| row.get(0)).map_err(sorted)?;
    let known = migrations.len() as u32;
    if found > known {
        return Err(StateError::Newer { path: path.into(), found, known });
    }
    db.execute_batch(if full_sync {
        "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA cache_size=-16384; PRAGMA temp_store=MEMORY;"
    } else {
        "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; PRAGMA cache_size=-16384; PRAGMA temp_store=MEMORY;"
    })
    .map_err(sorted)?;
    for (version, step) in migrations.iter().enumerate().skip(found as usize) {
        db.execute_batch(&format!("BEGIN IMMEDIATE; {step} PRAGMA user_version={}; COMMIT;", version + 1)).map_err(sorted)?;
    }
    let tables: String = db.query_row("PRAGMA quick_check(1)", [], |row| row.get(0)).map_err(sorted)?;
    if tables != "ok" {
        return Err(StateError::Damaged { path: path.into(), detail: tables, advice });
    }
    Ok(db)
}
