//! Replacing a small file so that, after a crash at any instant, either the old or the new content is there, whole.
//!
//! temp file beside it → write → mode and owner of the old file → fsync → rename → fsync of the directory.
//! Does not: follow a symlink to replace it (the file it points to is replaced), or keep xattrs and ACLs.

use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

/// Replaces the content of the existing file at `path`, keeping its mode and, where permitted, its owner.
pub fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let path = path.canonicalize()?;
    let old = fs::metadata(&path)?;
    let directory = parent(&path);
    let mut temp = temp_in(&directory)?;
    temp.write_all(content)?;
    // Owner first: chown clears setuid bits, and a mode must never be wider than its owner allows.
    let own = temp.as_file().metadata()?;
    if (own.uid(), own.gid()) != (old.uid(), old.gid()) {
        fchown(temp.as_file(), Some(old.uid()), Some(old.gid()))?;
    }
    temp.as_file().set_permissions(old.permissions())?;
    temp.as_file().sync_all()?;
    temp.persist(&path).map_err(|error| error.error)?;
    File::open(&directory)?.sync_all()
}

/// Writes a new file with `mode`; fails with `AlreadyExists` if there is one.
pub fn create(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let directory = parent(path);
    let mut temp = temp_in(&directory)?;
    temp.write_all(content)?;
    temp.as_file().set_permissions(Permissions::from_mode(mode))?;
    temp.as_file().sync_all()?;
    temp.persist_noclobber(path).map_err(|error| error.error)?;
    File::open(&directory)?.sync_all()
}

/// Writes a file with `mode`, new or instead of what is there.
pub fn write(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let directory = parent(path);
    let mut temp = temp_in(&directory)?;
    temp.write_all(content)?;
    temp.as_file().set_permissions(Permissions::from_mode(mode))?;
    temp.as_file().sync_all()?;
    temp.persist(path).map_err(|error| error.error)?;
    File::open(&directory)?.sync_all()
}

fn temp_in(directory: &Path) -> io::Result<tempfile::NamedTempFile> {
    tempfile::Builder::new().prefix(".twinbox-").tempfile_in(directory)
}

fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(directory) if !directory.as_os_str().is_empty() => directory.to_owned(),
        _ => PathBuf::from("."),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::{create, replace};

    #[test]
    fn keeps_mode_and_symlink_and_leaves_nothing_behind() {
        let dir = tempfile::tempdir().expect("scratch directory");
        let (file, link) = (dir.path().join("conf"), dir.path().join("link"));
        create(&file, b"old", 0o640).expect("create");
        symlink("conf", &link).expect("symlink");
        replace(&link, b"new").expect("replace");
        assert_eq!(fs::read(&file).expect("read"), b"new");
        assert_eq!(fs::metadata(&file).expect("stat").permissions().mode() & 0o7777, 0o640);
        assert!(fs::symlink_metadata(&link).expect("lstat").is_symlink());
        assert_eq!(fs::read_dir(dir.path()).expect("list").count(), 2);
        let again = create(&file, b"other", 0o600).expect_err("never overwrites");
        assert_eq!(again.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read_dir(dir.path()).expect("list").count(), 2);
    }
}
