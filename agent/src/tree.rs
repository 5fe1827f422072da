//! A directory tree touched only beneath its root's descriptor.
//!
//! Every path is resolved with `openat2(RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_XDEV | RESOLVE_NO_MAGICLINKS)`: a directory swapped for a symbolic link, a mount put
//! in the way or a hostile name cannot make us touch anything outside. Reads serve the capture, writes the standby; both meet the same [`Root`].

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{self as rfs, AtFlags, FileType, Mode, OFlags, RawDir, ResolveFlags, Stat};
use rustix::io::Errno;
use serde_bytes::ByteBuf;
use twinbox_protocol::entry::{Entry, Kind, Time, XATTRS_MAX_BYTES};
use twinbox_protocol::ids::ContentHash;
use twinbox_protocol::path::RelPath;
use twinbox_resync::rows::Local;

use crate::sys::{Probe, lease_probe};

/// Longest path given to one system call (PATH_MAX is 4096 with the NUL).
const PIECE: usize = 4000;

/// The root of a tree.
#[derive(Debug)]
pub struct Root {
    fd: OwnedFd,
    path: PathBuf,
    leases: bool,
    grain: Duration,
}

/// One entry of a listing.
pub struct Listed {
    /// Name.
    pub name: Vec<u8>,
    /// Its type as the directory says, or `Unknown`.
    pub kind: FileType,
}

fn beneath() -> ResolveFlags {
    ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV | ResolveFlags::NO_MAGICLINKS
}

fn open_beneath(dir: BorrowedFd<'_>, path: &[u8], flags: OFlags, mode: Mode) -> Result<OwnedFd, Errno> {
    let path = if path.is_empty() { b".".as_slice() } else { path };
    loop {
        match rfs::openat2(dir, path, flags | OFlags::CLOEXEC, mode, beneath()) {
            Err(Errno::INTR) => {}
            other => return other,
        }
    }
}

impl Root {
    /// Opens a root. The path itself may lead through symbolic links: it is the operator's.
    ///
    /// # Errors
    /// The system's.
    pub fn open(path: &Path) -> io::Result<Self> {
        let fd = rfs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        // A kernel without openat2 (before 5.6) is refused here, not in the middle of the work.
        open_beneath(fd.as_fd(), b".", OFlags::PATH, Mode::empty()).map_err(|error| match error {
            Errno::NOSYS => io::Error::other("this kernel has no openat2 (5.6 or later is needed)"),
            other => other.into(),
        })?;
        Ok(Root { fd, path: path.into(), leases: true, grain: Duration::ZERO })
    }

    /// Believes leases or not, and how fine times are: see [`crate::capture::proofs`].
    pub fn trust(&mut self, leases: bool, grain: Duration) {
        (self.leases, self.grain) = (leases, grain);
    }

    /// Whether somebody has a file open for writing, as far as this file system can say.
    #[must_use]
    pub fn probe(&self, file: BorrowedFd<'_>) -> Probe {
        if self.leases { lease_probe(file) } else { Probe::Unable }
    }

    /// A change made after `now` has a later ctime than this.
    #[must_use]
    pub fn surely_before(&self, now: Time) -> Time {
        let ns = i128::from(now.secs) * 1_000_000_000 + i128::from(now.nanos) - self.grain.as_nanos() as i128;
        Time { secs: ns.div_euclid(1_000_000_000) as i64, nanos: ns.rem_euclid(1_000_000_000) as u32 }
    }

    /// The path it was opened by, for messages.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether its path still leads to it: not when another file system was mounted there, or the one it is on was unmounted lazily, of which the kernel says nothing while it is open.
    #[must_use]
    pub fn is_in_place(&self) -> bool {
        match (rfs::stat(&self.path), rfs::fstat(&self.fd)) {
            (Ok(there), Ok(ours)) => (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino),
            (Err(Errno::NOENT | Errno::NOTDIR), _) => false,
            _ => true,
        }
    }

    /// The root's own descriptor.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn open_at(&self, path: &[u8], flags: OFlags) -> Result<OwnedFd, Errno> {
        if path.len() <= PIECE {
            return open_beneath(self.fd.as_fd(), path, flags, Mode::empty());
        }
        let (mut rest, mut at) = (path, None::<OwnedFd>);
        while rest.len() > PIECE {
            let cut = rest[..PIECE].iter().rposition(|b| *b == b'/').ok_or(Errno::NAMETOOLONG)?;
            let dir = at.as_ref().map_or(self.fd.as_fd(), |fd| fd.as_fd());
            at = Some(open_beneath(dir, &rest[..cut], OFlags::PATH | OFlags::DIRECTORY, Mode::empty())?);
            rest = &rest[cut + 1..];
        }
        let dir = at.as_ref().map_or(self.fd.as_fd(), |fd| fd.as_fd());
        open_beneath(dir, rest, flags, Mode::empty())
    }

    /// Opens a directory as a place to act in (O_PATH).
    ///
    /// # Errors
    /// The system's.
    pub fn dir(&self, path: &[u8]) -> Result<OwnedFd, Errno> {
        self.open_at(path, OFlags::PATH | OFlags::DIRECTORY)
    }

    /// Opens a directory for listing.
    ///
    /// # Errors
    /// The system's.
    pub fn dir_for_reading(&self, path: &RelPath) -> Result<OwnedFd, Errno> {
        self.open_at(path.as_bytes(), OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NONBLOCK | OFlags::NOATIME).or_else(
            |error| match error {
                Errno::PERM => self.open_at(path.as_bytes(), OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NONBLOCK),
                other => Err(other),
            },
        )
    }

    /// Opens a regular file for reading, without touching its access time where we may.
    ///
    /// # Errors
    /// The system's.
    pub fn file(&self, path: &RelPath) -> Result<OwnedFd, Errno> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
        self.open_at(path.as_bytes(), flags | OFlags::NOATIME).or_else(|error| match error {
            Errno::PERM => self.open_at(path.as_bytes(), flags),
            other => Err(other),
        })
    }

    /// Opens whatever is at `path` as a handle (O_PATH), a symbolic link itself included.
    ///
    /// # Errors
    /// The system's.
    pub fn handle(&self, path: &RelPath) -> Result<OwnedFd, Errno> {
        if path.is_root() {
            return self.dir(b"");
        }
        // RESOLVE_NO_SYMLINKS refuses a final link even with O_NOFOLLOW, so the last step is taken on its own.
        let (dir, name) = path.split().unwrap_or_default();
        let dir = self.dir(dir)?;
        rfs::openat(&dir, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
    }

    /// `lstat`; `None` when nothing is there.
    ///
    /// # Errors
    /// The system's, other than "no such file".
    pub fn stat(&self, path: &RelPath) -> Result<Option<Stat>, Errno> {
        let result = match path.split() {
            None => rfs::fstat(&self.fd),
            Some((b"", name)) => rfs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW),
            Some((dir, name)) => self.dir(dir).and_then(|dir| rfs::statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW)),
        };
        match result {
            Ok(stat) => Ok(Some(stat)),
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(None),
            Err(other) => Err(other),
        }
    }
}

/// Names in a directory opened for reading, in the directory's order.
///
/// # Errors
/// The system's.
pub fn list(dir: BorrowedFd<'_>) -> Result<Vec<Listed>, Errno> {
    let mut buffer = Vec::with_capacity(32 * 1024);
    let mut reader = RawDir::new(dir, buffer.spare_capacity_mut());
    let mut out = vec![];
    while let Some(entry) = reader.next() {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            out.push(Listed { name: name.to_vec(), kind: entry.file_type() });
        }
    }
    Ok(out)
}

/// Modification time of a stat.
#[must_use]
pub fn mtime(stat: &Stat) -> Time {
    Time { secs: stat.st_mtime, nanos: stat.st_mtime_nsec as u32 }
}

/// Inode and change time of a stat.
#[must_use]
pub fn local(stat: &Stat) -> Local {
    Local { ino: stat.st_ino, ctime: Time { secs: stat.st_ctime, nanos: stat.st_ctime_nsec as u32 } }
}

/// Whether anything that could mean other bytes or attributes differs between two looks at one file.
#[must_use]
pub fn same_stat(a: &Stat, b: &Stat) -> bool {
    local(a) == local(b) && a.st_size == b.st_size && mtime(a) == mtime(b) && a.st_mode == b.st_mode && a.st_dev == b.st_dev
}

/// Extended attributes that travel: the user's, ACLs, capabilities, and `trusted.` where we may read them.
fn travels(name: &[u8]) -> bool {
    name.starts_with(b"user.")
        || name == b"system.posix_acl_access"
        || name == b"system.posix_acl_default"
        || name == b"security.capability"
        || (name.starts_with(b"trusted.") && !name.starts_with(b"trusted.overlay."))
}

/// Reads the extended attributes that travel, sorted by name. `fd` may be an O_PATH handle.
///
/// # Errors
/// The system's.
pub fn xattrs(fd: BorrowedFd<'_>, is_handle: bool) -> Result<Vec<(ByteBuf, ByteBuf)>, Errno> {
    let proc = CString::new(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap_or_default();
    let mut names: Vec<u8> = Vec::with_capacity(256);
    loop {
        let got = if is_handle {
            rfs::listxattr(&*proc, rustix::buffer::spare_capacity(&mut names))
        } else {
            rfs::flistxattr(fd, rustix::buffer::spare_capacity(&mut names))
        };
        match got {
            Ok(_) => break,
            Err(Errno::RANGE) if names.capacity() < XATTRS_MAX_BYTES => {
                names.clear();
                names.reserve(names.capacity().max(64) * 4);
            }
            Err(Errno::NOTSUP | Errno::NOENT) => return Ok(vec![]),
            Err(other) => return Err(other),
        }
    }
    let mut out = vec![];
    for name in names.split(|b| *b == 0).filter(|name| travels(name)) {
        let mut value: Vec<u8> = Vec::with_capacity(256);
        let got = loop {
            let got = if is_handle {
                rfs::getxattr(&*proc, name, rustix::buffer::spare_capacity(&mut value))
            } else {
                rfs::fgetxattr(fd, name, rustix::buffer::spare_capacity(&mut value))
            };
            match got {
                Err(Errno::RANGE) if value.capacity() < XATTRS_MAX_BYTES => {
                    value.clear();
                    value.reserve(value.capacity().max(64) * 4);
                }
                other => break other,
            }
        };
        match got {
            Ok(_) => out.push((ByteBuf::from(name.to_vec()), ByteBuf::from(value))),
            Err(Errno::NODATA | Errno::NOTSUP) => {}
            Err(other) => return Err(other),
        }
    }
    out.sort();
    Ok(out)
}

/// Makes an [`Entry`] of a stat, the attributes, and (for a file) its content's name or (for a link) its target. `None` for sockets, which are never mirrored.
#[must_use]
pub fn entry(stat: &Stat, xattrs: Vec<(ByteBuf, ByteBuf)>, hash: Option<ContentHash>, target: Option<Vec<u8>>) -> Option<Entry> {
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Kind::File { size: stat.st_size as u64, hash: hash.unwrap_or(ContentHash([0; 32])) },
        FileType::Directory => Kind::Dir,
        FileType::Symlink => Kind::Symlink { target: ByteBuf::from(target.unwrap_or_default()) },
        FileType::Fifo => Kind::Fifo,
        kind @ (FileType::CharacterDevice | FileType::BlockDevice) => {
            Kind::Device { block: kind == FileType::BlockDevice, major: rfs::major(stat.st_rdev), minor: rfs::minor(stat.st_rdev) }
        }
        _ => return None,
    };
    Some(Entry { kind, mode: stat.st_mode & 0o7777, uid: stat.st_uid, gid: stat.st_gid, mtime: mtime(stat), xattrs })
}

/// Whether a directory with nothing to mirror in it (our own temporary files aside).
///
/// # Errors
/// The system's.
pub fn is_empty(root: &Root) -> Result<bool, Errno> {
    let dir = root.dir_for_reading(&RelPath::root())?;
    Ok(list(dir.as_fd())?.iter().all(|l| l.name.starts_with(b".twinbox-") || l.name == b"lost+found"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn p(text: &str) -> RelPath {
        RelPath::new(text.as_bytes()).unwrap()
    }

    #[test]
    fn links_in_the_way_lead_nowhere() {
        let dir = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        std::fs::write(outside.path().join("secret"), b"x").unwrap();
        symlink(outside.path(), dir.path().join("d")).unwrap();
        symlink(outside.path().join("secret"), dir.path().join("f")).unwrap();
        let root = Root::open(dir.path()).unwrap();
        assert_eq!(root.file(&p("d/secret")).err(), Some(Errno::LOOP));
        assert_eq!(root.file(&p("f")).err(), Some(Errno::LOOP));
        assert!(root.dir(b"d").is_err());
        assert!(root.stat(&p("d/secret")).unwrap().is_none());
        assert_eq!(FileType::from_raw_mode(root.stat(&p("f")).unwrap().unwrap().st_mode), FileType::Symlink);
        assert!(root.handle(&p("f")).is_ok());
    }

    #[test]
    fn paths_longer_than_one_call_takes() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::open(dir.path()).unwrap();
        let mut path = RelPath::root();
        for _ in 0..30 {
            let parent = root.dir(path.as_bytes()).unwrap();
            let name = "n".repeat(200);
            rfs::mkdirat(&parent, name.as_str(), Mode::from_raw_mode(0o755)).unwrap();
            path = path.join(name.as_bytes()).unwrap();
        }
        assert!(path.as_bytes().len() > 6000);
        assert!(root.stat(&path).unwrap().is_some());
        assert!(root.dir_for_reading(&path).is_ok());
    }

    #[test]
    fn extended_attributes_are_read_sorted_from_files_and_handles() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, b"x").unwrap();
        if rfs::setxattr(&path, "user.b", b"2", rfs::XattrFlags::empty()).is_err() {
            return; // A file system without user attributes has nothing to read.
        }
        rfs::setxattr(&path, "user.a", &[7; 2000], rfs::XattrFlags::empty()).unwrap();
        let root = Root::open(dir.path()).unwrap();
        let want = vec![(ByteBuf::from("user.a"), ByteBuf::from(vec![7; 2000])), (ByteBuf::from("user.b"), ByteBuf::from("2"))];
        assert_eq!(xattrs(root.file(&p("f")).unwrap().as_fd(), false).unwrap(), want);
        assert_eq!(xattrs(root.handle(&p("f")).unwrap().as_fd(), true).unwrap(), want);
    }
}
