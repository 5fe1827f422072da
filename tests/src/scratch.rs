//! A directory of its own for each test, readable by other users, removed afterwards.
//!
//! `TWINBOX_TEST_KEEP=1` keeps it and prints where it is. It lies under the system's temporary directory (`TMPDIR`), so that
//! the filesystem under test can be chosen from outside.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};

/// A scratch directory, mode 0755.
#[derive(Debug)]
pub struct Scratch(Option<tempfile::TempDir>);

impl Scratch {
    /// Whether scratch directories are kept.
    #[must_use]
    pub fn is_kept() -> bool {
        std::env::var("TWINBOX_TEST_KEEP").is_ok_and(|v| v == "1")
    }

    /// A new scratch directory with `name` in its path.
    #[must_use]
    pub fn new(name: &str) -> Self {
        let dir = tempfile::Builder::new().prefix(&format!("twinbox-{name}-")).tempdir().expect("scratch directory");
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).expect("chmod");
        Self(Some(dir))
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.0.as_ref().expect("only drop takes it").path()
    }

    /// A path beneath it, not created.
    #[must_use]
    pub fn join(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    /// A directory beneath it, created with mode 0755.
    #[must_use]
    pub fn dir(&self, name: &str) -> PathBuf {
        let path = self.join(name);
        fs::create_dir_all(&path).expect("create directory");
        path
    }

    /// A directory beneath it that belongs to `uid`.
    #[must_use]
    pub fn dir_of(&self, name: &str, uid: u32) -> PathBuf {
        let path = self.dir(name);
        chown(&path, Some(uid), Some(uid)).expect("chown");
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if Self::is_kept()
            && let Some(dir) = self.0.take()
        {
            eprintln!("kept {}", dir.keep().display());
        }
    }
}
