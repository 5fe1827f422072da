//! One agent a state directory: a flock(2) on `<state>/lock`, held for life. The kernel releases it however the agent ends.
//!
//! Does not protect against agents on other machines sharing the directory; a state directory is local by definition.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::io::Errno;

use super::AdminError;

const LOCK: &str = "lock";

/// Exclusive use of a state directory, for as long as it lives.
#[derive(Debug)]
pub struct StateLock {
    state: PathBuf,
    // Dropping it releases the lock. The file stays: removing it would let two agents lock two different files.
    _file: File,
}

impl StateLock {
    /// Takes the lock, or says who has it.
    pub fn acquire(state: &Path) -> Result<Self, AdminError> {
        let path = state.join(LOCK);
        let unusable = |source: io::Error| AdminError::Unusable { path: path.clone(), source };
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(OFlags::NOFOLLOW.bits() as i32)
            .open(&path)
            .map_err(unusable)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                let mut text = String::new();
                let _ = (&mut file).take(16).read_to_string(&mut text);
                return Err(AdminError::AlreadyRunning { state: state.to_owned(), pid: text.trim().parse().ok() });
            }
            Err(errno) => return Err(unusable(errno.into())),
        }
        // The pid only makes a message better; on a full disk the lock is as good without it.
        let note = |file: &mut File| -> io::Result<()> {
            file.set_len(0)?;
            file.rewind()?;
            writeln!(file, "{}", std::process::id())
        };
        if let Err(error) = note(&mut file) {
            tracing::debug!(%error, "pid not noted in the lock file");
        }
        Ok(StateLock { state: state.to_owned(), _file: file })
    }

    /// The locked directory.
    #[must_use]
    pub fn state(&self) -> &Path {
        &self.state
    }
}
