//! What is remembered of a `verify`, in `<state>/mirrors/<name>/verify.json`: where it is, what it found, how it ended.

use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use twinbox_protocol::path::RelPath;

use super::VerifyError;
use super::judge::What;
use crate::config::Role;
use crate::status::rfc3339;

/// Findings remembered by name; more are counted.
pub(super) const FINDINGS_MAX: usize = 1000;

/// What became of a difference. An interface: words are only added.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "outcome")]
pub enum Outcome {
    /// Told, nothing done.
    Found,
    /// Brought to what the row says; what was there is in rescue.
    Repaired {
        /// Where it is kept, if there was something.
        kept: Option<PathBuf>,
    },
    /// On a primary: a change that no event had told of, sent to the standby now.
    Sent,
    /// Could not be repaired.
    Failed {
        /// Why.
        why: String,
    },
}

/// A difference. An interface: fields are only added.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Finding {
    /// Relative to the root; bytes that are not UTF-8 stand as `\xNN`.
    pub path: String,
    /// How it differs.
    pub what: What,
    /// What became of it.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// A run, under way, cut short or at its end. An interface (`verify --json`): fields are only added.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Record {
    /// Name of the mirror.
    pub mirror: String,
    /// This node.
    pub node: String,
    /// Its part in the mirror.
    pub role: Role,
    /// Repairs what it finds.
    pub repair: bool,
    /// Begun by the schedule, not by a person.
    pub scheduled: bool,
    /// RFC 3339, UTC.
    pub began: String,
    /// When it was through, RFC 3339; `null` before.
    pub ended: Option<String>,
    /// The same in seconds since 1970.
    pub ended_s: Option<u64>,
    /// Seconds spent, pauses between runs aside.
    pub seconds: f64,
    /// The mirror's position at the end, durable on the standby.
    pub lsn: u64,
    /// Rows there were at the beginning.
    pub total: u64,
    /// Paths compared.
    pub paths: u64,
    /// Bytes of content read.
    pub bytes: u64,
    /// Differences that stayed when looked at twice more.
    pub differences: u64,
    /// Of these: repaired, or sent.
    pub repaired: u64,
    /// Paths that changed at every look; what they hold is checked by every transaction, and by the next run.
    pub busy: u64,
    /// Paths the disk did not let be read.
    pub unreadable: u64,
    /// The differences, 1,000 at most.
    pub findings: Vec<Finding>,
    /// Everything up to this directory and this name in it is done: bytes as hexadecimal digits.
    pub cursor: Option<(String, String)>,
    /// Paths that are to be looked at again: the same.
    pub suspects: Vec<String>,
    /// When a run was last through, seconds since 1970.
    pub last_ended_s: Option<u64>,
}

impl Record {
    /// The file.
    #[must_use]
    pub fn file(mirror_dir: &Path) -> PathBuf {
        mirror_dir.join("verify.json")
    }

    /// What is remembered; `None` also when it cannot be read: a run that begins anew loses nothing.
    #[must_use]
    pub fn load(mirror_dir: &Path) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(Record::file(mirror_dir)).ok()?).ok()
    }

    pub(super) fn store(&self, mirror_dir: &Path) -> Result<(), VerifyError> {
        let path = Record::file(mirror_dir);
        let bytes = serde_json::to_vec(self).map_err(io::Error::other);
        bytes.and_then(|bytes| crate::atomic::write(&path, &bytes, 0o600)).map_err(|source| VerifyError::Record { path, source })
    }

    /// A run that begins; `earlier`: the last one, or one that was cut short.
    #[must_use]
    pub fn begin(mirror: &str, node: &str, role: Role, repair: bool, scheduled: bool, earlier: Option<&Record>) -> Self {
        Record {
            mirror: mirror.into(),
            node: node.into(),
            role,
            repair,
            scheduled,
            began: rfc3339(SystemTime::now()),
            ended: None,
            ended_s: None,
            seconds: 0.0,
            lsn: 0,
            total: 0,
            paths: 0,
            bytes: 0,
            differences: 0,
            repaired: 0,
            busy: 0,
            unreadable: 0,
            findings: vec![],
            cursor: None,
            suspects: vec![],
            last_ended_s: earlier.and_then(Record::last_ended),
        }
    }

    /// When a run was last through.
    #[must_use]
    pub fn last_ended(&self) -> Option<u64> {
        self.ended_s.or(self.last_ended_s)
    }

    /// Whether a run was cut short that is the same job as `other`.
    #[must_use]
    pub fn goes_on_as(&self, other: &Record) -> bool {
        let job = |record: &Record| (record.mirror.clone(), record.node.clone(), record.role, record.repair);
        self.ended.is_none() && job(self) == job(other)
    }

    /// Where it goes on: a directory, and the last name in it that is done.
    pub(super) fn done_to(&self) -> Option<(RelPath, Vec<u8>)> {
        let (dir, name) = self.cursor.as_ref()?;
        Some((RelPath::new(&unhex(dir)?).ok()?, unhex(name)?))
    }

    /// Differences that are still there.
    #[must_use]
    pub fn left(&self) -> u64 {
        self.differences - self.repaired.min(self.differences)
    }

    /// For `status`.
    #[must_use]
    pub fn status(&self, running: bool) -> VerifyStatus {
        let eta = (running && self.paths > 0 && self.total > self.paths)
            .then(|| (self.seconds.max(0.0) / self.paths as f64 * (self.total - self.paths) as f64) as u64);
        VerifyStatus {
            running,
            began: self.began.clone(),
            ended: self.ended.clone(),
            paths: self.paths,
            total: self.total,
            bytes: self.bytes,
            differences: self.differences,
            left: self.left(),
            busy: self.busy,
            eta_s: eta,
        }
    }
}

pub(super) fn hex(bytes: &[u8]) -> String {
    data_encoding::HEXLOWER.encode(bytes)
}

pub(super) fn unhex(text: &str) -> Option<Vec<u8>> {
    data_encoding::HEXLOWER.decode(text.as_bytes()).ok()
}

/// The last run of a mirror, or the one under way. An interface: fields are only added.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyStatus {
    /// It is under way.
    pub running: bool,
    /// RFC 3339, UTC.
    pub began: String,
    /// The same; `null`: not through yet.
    pub ended: Option<String>,
    /// Paths compared.
    pub paths: u64,
    /// Paths there were at the beginning.
    pub total: u64,
    /// Bytes read.
    pub bytes: u64,
    /// Differences found.
    pub differences: u64,
    /// Of these not repaired.
    pub left: u64,
    /// Paths that changed at every look, and were not judged.
    pub busy: u64,
    /// Estimated seconds left.
    pub eta_s: Option<u64>,
}
