//! Where content goes that would otherwise be lost: files changed on the standby by somebody else, and what `--adopt` found here.
//!
//! `<state>/rescue/<unix seconds>-<why>/<path>`. A rename where the state directory shares the replica's file system; else a copy, durable before the original goes.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{self as rfs, AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;
use twinbox_protocol::entry::Entry;
use twinbox_protocol::path::RelPath;

use super::attrs;
use super::copy;
use super::replica::{Replica, kind};
use crate::tree;

/// Why something is kept; part of the directory's name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Why {
    /// Not what the manifest says: a local change.
    Drift,
    /// Found when the directory was taken over.
    Adopt,
    /// After a power cut: the standby's version of a file of which this disk has another, or this disk's that gave way.
    Heal,
    /// What a node that was primary had alone, when it came back.
    Resync,
    /// Was not what its row says, and was put right by `verify --repair`.
    Verify,
}

impl Why {
    fn as_str(self) -> &'static str {
        match self {
            Why::Drift => "drift",
            Why::Adopt => "adopt",
            Why::Heal => "heal",
            Why::Resync => "resync",
            Why::Verify => "verify",
        }
    }
}

/// See the module's text.
pub(crate) struct Rescue {
    base: PathBuf,
}

fn sys(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

impl Rescue {
    pub(crate) fn new(state_dir: &Path) -> Self {
        Rescue { base: state_dir.join("rescue") }
    }

    fn relative(&self, path: &RelPath) -> PathBuf {
        if path.as_bytes().len() + self.base.as_os_str().len() > 3900 {
            // Longer than one system call takes: kept under a name made of its hash, the end of the path beside it.
            return PathBuf::from(format!("long-{}", &blake3::hash(path.as_bytes()).to_hex()[..16])).join(OsStr::from_bytes(path.name()));
        }
        PathBuf::from(OsStr::from_bytes(path.as_bytes()))
    }

    /// Whether a file with this content of `path` is kept already.
    pub(crate) fn holds(&self, path: &RelPath, why: Why, entry: &Entry) -> bool {
        let (relative, kind) = (self.relative(path), format!("-{}", why.as_str()));
        let tops = fs::read_dir(&self.base).into_iter().flatten().flatten();
        tops.filter(|top| top.file_name().to_string_lossy().contains(&kind)).any(|top| {
            let Ok(file) = File::open(top.path().join(&relative)) else { return false };
            let same = file.metadata().is_ok_and(|meta| meta.is_file() && meta.len() == entry.size());
            same && copy::hash(&file).is_ok_and(|hash| Some(hash) == entry.hash())
        })
    }

    /// A path under rescue that is free, its directory made.
    pub(crate) fn room(&self, path: &RelPath, why: Why) -> Result<PathBuf, Errno> {
        let secs = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let (kind, relative) = (why.as_str(), self.relative(path));
        for n in 0.. {
            let top = if n == 0 { format!("{secs}-{kind}") } else { format!("{secs}-{kind}.{n}") };
            let target = self.base.join(top).join(&relative);
            let made = target.parent().map_or(Ok(()), fs::create_dir_all);
            match made {
                Ok(()) if fs::symlink_metadata(&target).is_err() => return Ok(target),
                Ok(()) => {}
                Err(error) if matches!(error.kind(), io::ErrorKind::NotADirectory | io::ErrorKind::AlreadyExists) => {}
                Err(error) => return Err(sys(&error)),
            }
        }
        Err(Errno::EXIST)
    }

    /// Moves what is at `path`, with everything below it, to rescue.
    pub(crate) fn take(&self, replica: &mut Replica, path: &RelPath, why: Why) -> Result<PathBuf, Errno> {
        self.take_as(replica, path, path, why)
    }

    /// The same, kept as what was at `known_as`.
    pub(crate) fn take_as(&self, replica: &mut Replica, path: &RelPath, known_as: &RelPath, why: Why) -> Result<PathBuf, Errno> {
        let target = self.room(known_as, why)?;
        let place = replica.place_to_change(path)?;
        match rfs::renameat(&place.dir, place.name.as_slice(), rfs::CWD, &target) {
            Err(Errno::XDEV) => {
                copy_out(replica, path, &target)?;
                remove_all(replica, path)?;
            }
            other => other?,
        }
        Ok(target)
    }

    /// Keeps a copy of a file that will be changed in place.
    pub(crate) fn copy(&self, replica: &mut Replica, path: &RelPath, why: Why) -> Result<PathBuf, Errno> {
        let target = self.room(path, why)?;
        copy_out(replica, path, &target)?;
        Ok(target)
    }
}

fn copy_out(replica: &mut Replica, path: &RelPath, target: &Path) -> Result<(), Errno> {
    let Some(stat) = replica.stat(path)? else { return Ok(()) };
    match kind(&stat) {
        FileType::RegularFile => {
            let from = replica.file(path, false)?;
            let to = File::options().read(true).write(true).create_new(true).open(target).map_err(|e| sys(&e))?;
            copy::whole(from.as_fd(), to.as_fd(), stat.st_size as u64)?;
            let entry = tree::entry(&stat, tree::xattrs(from.as_fd(), false).unwrap_or_default(), None, None);
            if let Some(entry) = entry {
                attrs::set(to.as_fd(), &entry, replica.ordinary, &mut attrs::Lost::new())?;
            }
            to.sync_all().map_err(|e| sys(&e))?;
        }
        FileType::Directory => {
            fs::create_dir(target).map_err(|e| sys(&e))?;
            for child in children(replica, path)? {
                copy_out(replica, &child, &target.join(OsStr::from_bytes(child.name())))?;
            }
        }
        FileType::Symlink => {
            let place = replica.place(path)?;
            let link = rfs::readlinkat(&place.dir, place.name.as_slice(), vec![])?;
            rfs::symlinkat(&*link, rfs::CWD, target)?;
        }
        other => rfs::mknodat(rfs::CWD, target, other, Mode::from_raw_mode(0o600), stat.st_rdev).or_else(|error| match error {
            Errno::PERM => Ok(()),
            other => Err(other),
        })?,
    }
    if let Some(dir) = target.parent() {
        File::open(dir).and_then(|d| d.sync_all()).map_err(|e| sys(&e))?;
    }
    Ok(())
}

/// What a directory on disk holds.
pub(crate) fn children(replica: &mut Replica, path: &RelPath) -> Result<Vec<RelPath>, Errno> {
    let place = if path.is_root() { None } else { Some(replica.place(path)?) };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = match &place {
        None => rfs::openat(replica.root.fd(), b".".as_slice(), flags, Mode::empty()),
        Some(place) => rfs::openat(&place.dir, place.name.as_slice(), flags, Mode::empty()),
    }?;
    Ok(tree::list(fd.as_fd())?.iter().filter_map(|listed| path.join(&listed.name)).collect())
}

/// Removes what was copied.
pub(crate) fn remove_all(replica: &mut Replica, path: &RelPath) -> Result<(), Errno> {
    let Some(stat) = replica.stat(path)? else { return Ok(()) };
    if kind(&stat) == FileType::Directory {
        for child in children(replica, path)? {
            remove_all(replica, &child)?;
        }
    }
    let place = replica.place_to_change(path)?;
    let flags = if kind(&stat) == FileType::Directory { AtFlags::REMOVEDIR } else { AtFlags::empty() };
    rfs::unlinkat(&place.dir, place.name.as_slice(), flags)
}
