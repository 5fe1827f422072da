//! Reads one directory tree into a [`Snapshot`], touching nothing but access times.
//!
//! Descends by directory descriptors, so paths may be longer than `PATH_MAX`. What vanishes during the walk is left out: whoever
//! needs a stable picture stops the writers first. Contents are hashed as a stream that skips holes and blocks of zeros, so a
//! sparse file of many GiB costs only its data, and a hole equals the zeros it reads as.

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, SeekFrom, Stat};
use rustix::io::Errno;

use crate::tree::{Depth, Entry, Kind, Rules, Snapshot};

/// Hashing granularity; a block of zeros this long is treated as a hole.
const BLOCK: usize = 64 * 1024;

/// Reads the tree at `root`; its own entry has the empty name.
pub fn snapshot(root: &Path, rules: Rules, depth: Depth) -> io::Result<Snapshot> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = rustix::fs::open(root, flags, Mode::empty())?;
    let stat = rustix::fs::fstat(&dir)?;
    let mut walk = Walk { rules, depth, device: stat.st_dev, entries: BTreeMap::new(), names: BTreeMap::new() };
    let mut top = entry(&stat);
    top.xattrs = xattrs(&format!("/proc/self/fd/{}/.", dir.as_raw_fd()))?;
    walk.entries.insert(Vec::new(), top);
    walk.directory(dir, &[])?;
    for names in walk.names.into_values().filter(|n| n.len() > 1) {
        for name in &names {
            if let Some(entry) = walk.entries.get_mut(name) {
                entry.links.clone_from(&names);
            }
        }
    }
    Ok(Snapshot { entries: walk.entries })
}

struct Walk {
    rules: Rules,
    depth: Depth,
    device: u64,
    entries: BTreeMap<Vec<u8>, Entry>,
    /// Inode → every name seen for it, sorted.
    names: BTreeMap<u64, Vec<Vec<u8>>>,
}

impl Walk {
    fn directory(&mut self, dir: OwnedFd, path: &[u8]) -> io::Result<()> {
        let mut names = Vec::new();
        for item in Dir::read_from(&dir)? {
            let name = item?.file_name().to_owned();
            if !matches!(name.to_bytes(), b"." | b"..") {
                names.push(name);
            }
        }
        names.sort();
        for name in names {
            let mut full = path.to_vec();
            if !full.is_empty() {
                full.push(b'/');
            }
            full.extend_from_slice(name.to_bytes());
            match self.one(dir.as_fd(), &name, &full) {
                Ok(()) => {}
                Err(e) if vanished(&e) => {
                    self.entries.remove(&full);
                }
                Err(e) => {
                    let shown = full.escape_ascii().to_string();
                    return Err(io::Error::new(e.kind(), format!("{shown}: {e}")));
                }
            }
        }
        Ok(())
    }

    fn one(&mut self, dir: BorrowedFd<'_>, name: &CStr, full: &[u8]) -> io::Result<()> {
        let stat = rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let mut entry = entry(&stat);
        if self.rules.excludes(full, entry.kind == Kind::Directory) {
            return Ok(());
        }
        let mut through = format!("/proc/self/fd/{}/", dir.as_raw_fd()).into_bytes();
        through.extend_from_slice(name.to_bytes());
        entry.xattrs = xattrs(&through)?;
        match entry.kind {
            Kind::Symlink => {
                entry.target = Some(rustix::fs::readlinkat(dir, name, Vec::new())?.into_bytes());
            }
            Kind::File if self.depth == Depth::Content => {
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
                let file = rustix::fs::openat(dir, name, flags, Mode::empty())?;
                entry.content = Some(content(file.as_fd())?);
            }
            _ => {}
        }
        if entry.kind != Kind::Directory && stat.st_nlink > 1 {
            self.names.entry(stat.st_ino).or_default().push(full.to_vec());
        }
        let descend = entry.kind == Kind::Directory && stat.st_dev == self.device;
        self.entries.insert(full.to_vec(), entry);
        if descend {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            self.directory(rustix::fs::openat(dir, name, flags, Mode::empty())?, full)?;
        }
        Ok(())
    }
}

fn entry(stat: &Stat) -> Entry {
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Kind::File,
        FileType::Directory => Kind::Directory,
        FileType::Symlink => Kind::Symlink,
        FileType::Fifo => Kind::Fifo,
        FileType::Socket => Kind::Socket,
        FileType::CharacterDevice => Kind::CharDevice,
        FileType::BlockDevice => Kind::BlockDevice,
        _ => Kind::Unknown,
    };
    let regular = kind == Kind::File;
    let device = matches!(kind, Kind::CharDevice | Kind::BlockDevice);
    #[allow(clippy::unnecessary_cast)] // widths differ between targets
    Entry {
        kind,
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        size: if regular { stat.st_size as u64 } else { 0 },
        mtime: (stat.st_mtime as i64, stat.st_mtime_nsec as u32),
        rdev: if device { stat.st_rdev as u64 } else { 0 },
        allocated: if regular { stat.st_blocks as u64 * 512 } else { 0 },
        target: None,
        xattrs: BTreeMap::new(),
        content: None,
        links: Vec::new(),
    }
}

/// Every extended attribute the caller may list (`user.*`, POSIX ACLs, and as root `trusted.*`), links not followed.
fn xattrs(path: impl rustix::path::Arg + Copy) -> io::Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let mut names = vec![0_u8; 64 * 1024];
    let len = match rustix::fs::llistxattr(path, &mut names[..]) {
        Ok(len) => len,
        Err(Errno::OPNOTSUPP) => 0,
        Err(e) => return Err(e.into()),
    };
    let mut found = BTreeMap::new();
    for name in names[..len].split(|b| *b == 0).filter(|n| !n.is_empty()) {
        let mut value = vec![0_u8; 64 * 1024];
        match rustix::fs::lgetxattr(path, name, &mut value[..]) {
            Ok(len) => {
                value.truncate(len);
                found.insert(name.to_vec(), value);
            }
            Err(Errno::NODATA) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(found)
}

/// A hash of what reading the whole file gives: of its size and of every block that is not all zeros, with its place.
fn content(file: BorrowedFd<'_>) -> io::Result<[u8; 32]> {
    let size = rustix::fs::fstat(file)?.st_size as u64;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0_u8; BLOCK];
    let mut at = 0_u64;
    while at < size {
        let data = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(Errno::NXIO) => break,
            Err(Errno::INVAL) => at,
            Err(e) => return Err(e.into()),
        };
        let hole = rustix::fs::seek(file, SeekFrom::Hole(data)).unwrap_or(size);
        // Whole blocks only, so that the same bytes hash alike wherever the holes lie.
        let mut block = data / BLOCK as u64 * BLOCK as u64;
        while block < hole {
            let len = read_block(file, &mut buffer, block)?;
            if buffer[..len].iter().any(|b| *b != 0) {
                hasher.update(&block.to_le_bytes());
                hasher.update(&buffer[..len]);
            }
            block += BLOCK as u64;
        }
        at = block;
    }
    hasher.update(&size.to_le_bytes());
    Ok(*hasher.finalize().as_bytes())
}

fn read_block(file: BorrowedFd<'_>, buffer: &mut [u8], at: u64) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match rustix::io::pread(file, &mut buffer[filled..], at + filled as u64)? {
            0 => break,
            n => filled += n,
        }
    }
    Ok(filled)
}

fn vanished(e: &io::Error) -> bool {
    let code = e.raw_os_error();
    [Errno::NOENT, Errno::NOTDIR, Errno::LOOP].iter().any(|n| code == Some(n.raw_os_error()))
}
