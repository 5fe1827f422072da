//! The system calls no safe wrapper offers. The only unsafe code of the project; each call with its proof.

use std::os::fd::{AsRawFd, BorrowedFd};

/// What asking for a read lease tells.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Probe {
    /// Nobody has the file open for writing or mapped writable.
    Quiet,
    /// Somebody has.
    Writer,
    /// The kernel or our rights do not allow to ask (not owner, file system without leases).
    Unable,
}

/// Takes a read lease and gives it back at once: `fcntl(2)`, F_SETLEASE. Never holds it, because a held lease makes writers wait.
#[must_use]
pub fn lease_probe(fd: BorrowedFd<'_>) -> Probe {
    // SAFETY: fcntl with F_SETLEASE takes an integer argument and touches no memory of ours; the descriptor is borrowed, so it is open.
    #[allow(unsafe_code)]
    let set = |how: libc::c_int| unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETLEASE, how) };
    if set(libc::F_RDLCK) == 0 {
        set(libc::F_UNLCK);
        return Probe::Quiet;
    }
    match std::io::Error::last_os_error().raw_os_error() {
        Some(libc::EAGAIN) => Probe::Writer,
        _ => Probe::Unable,
    }
}

/// Ignores SIGIO, which the kernel sends when a lease is asked back, and whose default is to end the process. Call before the first probe.
pub fn ignore_sigio() {
    // SAFETY: setting a disposition to SIG_IGN installs no handler and touches no memory of ours.
    #[allow(unsafe_code)]
    unsafe {
        libc::signal(libc::SIGIO, libc::SIG_IGN);
    }
}

/// Stops the file system a directory is on as a power cut does: what is not on the disk never gets there (`FS_IOC_SHUTDOWN` of ext4 and XFS, without flushing the log). Until it is mounted anew everything fails.
#[cfg(test)]
pub(crate) fn lose_power(dir: BorrowedFd<'_>) -> std::io::Result<()> {
    /// `_IOR('X', 125, __u32)` and `EXT4_GOING_FLAGS_NOLOGFLUSH`.
    const SHUTDOWN: libc::Ioctl = 0x8004_587d_u32 as libc::Ioctl;
    let how: u32 = 2;
    // SAFETY: this request reads four bytes at the address, which is that of `how`, alive until the call returns; the descriptor is borrowed, so it is open.
    #[allow(unsafe_code)]
    let done = unsafe { libc::ioctl(dir.as_raw_fd(), SHUTDOWN, &raw const how) };
    if done == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{File, OpenOptions};
    use std::os::fd::AsFd;

    #[test]
    fn a_writer_is_noticed_and_no_lease_is_left_behind() {
        ignore_sigio();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, b"x").unwrap();
        let reader = File::open(&path).unwrap();
        assert_eq!(lease_probe(reader.as_fd()), Probe::Quiet);
        let writer = OpenOptions::new().write(true).open(&path).unwrap();
        assert_eq!(lease_probe(reader.as_fd()), Probe::Writer);
        drop(writer);
        assert_eq!(lease_probe(reader.as_fd()), Probe::Quiet);
    }
}
