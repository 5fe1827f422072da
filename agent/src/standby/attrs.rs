//! Owner, mode, extended attributes and modification time of one file, brought to what an entry says.
//!
//! Everything goes through `/proc/self/fd/N` of a descriptor we hold (O_PATH will do), so that what is changed is the inode we mean and no link is followed.
//! Order: owner (it clears set-user-id), attributes that must go, attributes that must be there (an ACL sets group bits), mode, time last.
//! What this machine or an ordinary user cannot store is counted, not an error.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::fs::{self as rfs, AtFlags, Gid, Mode, Timespec, Timestamps, UTIME_OMIT, Uid, XattrFlags};
use rustix::io::Errno;
use twinbox_protocol::entry::{Entry, Kind, Time};

use crate::tree;

/// Counted losses, by kind.
pub(crate) type Lost = BTreeMap<String, u64>;

/// ext4 keeps a file's attributes in one block and says "no space" when they do not fit: above this many bytes that is a loss, below it the disk is full.
const XATTRS_SMALL: usize = 1024;

pub(crate) fn count(lost: &mut Lost, kind: &str) {
    *lost.entry(kind.to_owned()).or_insert(0) += 1;
}

/// The name under which the kernel reaches a descriptor's inode itself.
pub(crate) fn proc_path(fd: BorrowedFd<'_>) -> CString {
    CString::new(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap_or_default()
}

/// Sets the modification time alone.
pub(crate) fn set_mtime(fd: BorrowedFd<'_>, mtime: Time) -> Result<(), Errno> {
    let times = Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: Timespec { tv_sec: mtime.secs, tv_nsec: mtime.nanos.into() },
    };
    rfs::utimensat(rfs::CWD, &*proc_path(fd), &times, AtFlags::empty())
}

/// See the module's text.
pub(crate) fn set(fd: BorrowedFd<'_>, entry: &Entry, ordinary: bool, lost: &mut Lost) -> Result<(), Errno> {
    let path = &*proc_path(fd);
    let stat = rfs::fstat(fd)?;
    let symlink = matches!(entry.kind, Kind::Symlink { .. });
    let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
    if (stat.st_uid, stat.st_gid) != (entry.uid, entry.gid) && entry.uid != u32::MAX && entry.gid != u32::MAX {
        match rfs::chown(path, Some(uid), Some(gid)) {
            Ok(()) => {}
            Err(Errno::PERM | Errno::INVAL | Errno::NOTSUP) => {
                // The group alone may be one of ours.
                if stat.st_gid != entry.gid {
                    let _ = rfs::chown(path, None, Some(gid));
                }
                count(lost, "ownership");
            }
            Err(other) => return Err(other),
        }
    }
    set_xattrs(fd, entry, ordinary && !symlink, lost)?;
    if !symlink && rfs::fstat(fd)?.st_mode & 0o7777 != entry.mode {
        match rfs::chmod(path, Mode::from_raw_mode(entry.mode)) {
            Ok(()) => {}
            Err(Errno::PERM | Errno::NOTSUP) => count(lost, "mode"),
            Err(other) => return Err(other),
        }
    }
    match set_mtime(fd, entry.mtime) {
        Err(Errno::PERM | Errno::INVAL) => count(lost, "times"),
        other => other?,
    }
    Ok(())
}

fn set_xattrs(fd: BorrowedFd<'_>, entry: &Entry, ordinary: bool, lost: &mut Lost) -> Result<(), Errno> {
    let path = &*proc_path(fd);
    let have = match tree::xattrs(fd, true) {
        Err(Errno::ACCESS | Errno::PERM) => vec![],
        other => other?,
    };
    if have == entry.xattrs {
        return Ok(());
    }
    if ordinary {
        // Attributes of the user's kind need write permission, which the final mode may lack.
        let mode = rfs::fstat(fd)?.st_mode & 0o7777;
        let _ = rfs::chmod(path, Mode::from_raw_mode(mode | 0o600));
    }
    for (name, _) in have.iter().filter(|(name, _)| !entry.xattrs.iter().any(|(wanted, _)| wanted == name)) {
        match rfs::removexattr(path, name.as_slice()) {
            Ok(()) | Err(Errno::NODATA) => {}
            Err(Errno::PERM | Errno::NOTSUP | Errno::ACCESS) => count(lost, "xattrs"),
            Err(other) => return Err(other),
        }
    }
    let bytes: usize = entry.xattrs.iter().map(|(name, value)| name.len() + value.len()).sum();
    for (name, value) in entry.xattrs.iter().filter(|wanted| !have.contains(wanted)) {
        match rfs::setxattr(path, name.as_slice(), value, XattrFlags::empty()) {
            Ok(()) => {}
            Err(Errno::PERM | Errno::NOTSUP | Errno::ACCESS | Errno::INVAL | Errno::TOOBIG | Errno::RANGE) => count(lost, "xattrs"),
            Err(Errno::NOSPC) if bytes > XATTRS_SMALL => count(lost, "xattrs"),
            Err(other) => return Err(other),
        }
    }
    Ok(())
}
