//! Which inodes a heal of this boot has touched: their ctimes are its own work, not changes made after the boot.
//!
//! A file of the state directory, written before each step, so that a heal that was killed is known to the next. It need not survive a power cut: after one, everything an earlier heal did is of before the boot.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

const NAME: &str = "heal-touched";

/// See the module's text.
pub(super) struct Touched {
    inodes: BTreeSet<u64>,
    file: File,
    /// Steps until a test's heal is killed.
    #[cfg(test)]
    pub(super) left: usize,
}

impl Touched {
    /// What earlier heals of `boot` have touched.
    ///
    /// # Errors
    /// The file system's.
    pub(super) fn open(mirror_dir: &Path, boot: &str) -> io::Result<Self> {
        let mut file = File::options().create(true).truncate(false).read(true).append(true).open(mirror_dir.join(NAME))?;
        let mut bytes = vec![];
        file.read_to_end(&mut bytes)?;
        let head = format!("{boot}\n").into_bytes();
        let mut inodes = BTreeSet::new();
        match bytes.strip_prefix(head.as_slice()) {
            Some(rest) => inodes.extend(rest.as_chunks::<8>().0.iter().map(|ino| u64::from_le_bytes(*ino))),
            None => {
                file.set_len(0)?;
                file.write_all(&head)?;
            }
        }
        Ok(Touched {
            inodes,
            file,
            #[cfg(test)]
            left: usize::MAX,
        })
    }

    /// Before a step that moves the ctime of an inode.
    ///
    /// # Errors
    /// The file system's: nothing may be done then.
    pub(super) fn before(&mut self, ino: u64) -> io::Result<()> {
        #[cfg(test)]
        {
            self.left = self.left.checked_sub(1).ok_or_else(|| io::Error::other("killed"))?;
        }
        self.file.write_all(&ino.to_le_bytes())
    }

    /// After it.
    pub(super) fn add(&mut self, ino: u64) {
        self.inodes.insert(ino);
    }

    /// Whether the ctime of an inode may be of a heal.
    pub(super) fn contains(&self, ino: u64) -> bool {
        self.inodes.contains(&ino)
    }

    /// The boot is healed: nobody asks any more.
    pub(super) fn forget(mirror_dir: &Path) {
        let _ = std::fs::remove_file(mirror_dir.join(NAME));
    }
}
