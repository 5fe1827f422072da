//! What the store's file system can prove, tried at the start on a file without a name in the root: nothing is believed of a file system that was not seen to hold.
//!
//! Leases must tell a writer, and only a writer; two changes one after the other must have different times, or the grain is measured and a file younger than it is read again; a write must raise an event.
//! What cannot be tried on one machine (that others write to the disk behind it) is known by the file system's type.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use rustix::fs::inotify::{self, CreateFlags, Reader, WatchFlags};
use rustix::fs::{self as rfs, AtFlags, Mode, OFlags};
use rustix::io::Errno;

use crate::layout::OWN_PREFIX;
use crate::sys::{Probe, lease_probe};
use crate::tree::{self, Root};

/// Times are looked at for this long before they are taken to count in [`COARSE`].
const PATIENCE: Duration = Duration::from_millis(50);
/// The coarsest times of a file system in use: FAT's.
const COARSE: Duration = Duration::from_secs(2);

/// See the module's text.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Proofs {
    /// A lease is not given while somebody has the file open for writing.
    pub leases: bool,
    /// Two changes within this time may have the same ctime.
    pub grain: Duration,
    /// What an operator should know, one sentence each.
    pub warnings: Vec<String>,
}

/// Type of a file system, as statfs(2) gives it.
struct Type {
    magic: u64,
    name: &'static str,
    trait_: Trait,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Trait {
    /// lseek(SEEK_DATA) and a read wait for a write in progress: looked up in the kernel's source.
    Proven,
    /// Other machines change files without an event here.
    Remote,
    /// Files can be changed below it, without an event or a writer's mark here.
    Layered,
}

const TYPES: [Type; 13] = [
    Type { magic: 0xEF53, name: "ext4", trait_: Trait::Proven },
    Type { magic: 0x5846_5342, name: "XFS", trait_: Trait::Proven },
    Type { magic: 0x9123_683E, name: "btrfs", trait_: Trait::Proven },
    Type { magic: 0x0102_1994, name: "tmpfs", trait_: Trait::Proven },
    Type { magic: 0x6969, name: "NFS", trait_: Trait::Remote },
    Type { magic: 0xFF53_4D42, name: "CIFS", trait_: Trait::Remote },
    Type { magic: 0xFE53_4D42, name: "SMB", trait_: Trait::Remote },
    Type { magic: 0x00C3_6400, name: "Ceph", trait_: Trait::Remote },
    Type { magic: 0x0102_1997, name: "9P", trait_: Trait::Remote },
    Type { magic: 0x5346_414F, name: "AFS", trait_: Trait::Remote },
    Type { magic: 0x6573_5546, name: "FUSE", trait_: Trait::Layered },
    Type { magic: 0x794C_7630, name: "overlayfs", trait_: Trait::Layered },
    Type { magic: 0xF15F, name: "eCryptfs", trait_: Trait::Layered },
];

/// Tries everything; takes some milliseconds, and leaves nothing.
#[must_use]
pub fn try_out(root: &Root) -> Proofs {
    let magic = rfs::fstatfs(root.fd()).map_or(0, |stat| stat.f_type as u64 & 0xFFFF_FFFF);
    let kind = TYPES.iter().find(|kind| kind.magic == magic);
    let mut warnings = vec![];
    let name = kind.map_or_else(|| format!("this file system (type {magic:#x})"), |kind| kind.name.to_owned());
    match kind.map(|kind| kind.trait_) {
        Some(Trait::Remote) => warnings.push(format!(
            "the root is on {name}: what other machines change there raises no event here and is found by the next comparison only; run the agent on the machine that has the disk"
        )),
        Some(Trait::Layered) => warnings.push(format!(
            "the root is on {name}: files changed below it, past this mount, are found by the next comparison only; let nothing write there"
        )),
        Some(Trait::Proven) | None => {}
    }
    let (writer, reader) = match nameless(root) {
        Ok(pair) => pair,
        Err(error) => {
            let why = std::io::Error::from(error);
            warnings.push(format!("what {name} can prove was not tried ({why} when making a file in the root): files are compared before and after they are read"));
            return Proofs { leases: false, grain: COARSE, warnings };
        }
    };
    match events(&writer) {
        Ok(true) => {}
        Ok(false) => warnings.push(format!("a write raises no event on {name}: changes are found by comparisons only (`sweep`)")),
        Err(error) => warnings.push(format!("whether a write raises an event on {name} was not tried: {}", std::io::Error::from(error))),
    }
    let grain = grain(&writer).unwrap_or(COARSE);
    if grain > Duration::ZERO {
        warnings.push(format!(
            "times on {name} count in steps of about {} ms: a file changed within that time is read again, which costs lag (kernels from 6.13 on have finer times on ext4, XFS, btrfs and tmpfs)",
            grain.as_millis().max(1)
        ));
    }
    let busy = lease_probe(reader.as_fd());
    drop(writer);
    let leases = busy == Probe::Writer && lease_probe(reader.as_fd()) == Probe::Quiet;
    if !leases && kind.is_none_or(|kind| kind.trait_ != Trait::Proven) {
        warnings.push(format!(
            "leases do not tell writers on {name}, and it is not one of those whose reads are known to wait for a write: a file caught in the middle of a write may be sent as it was then, and once more when the write is over"
        ));
    }
    Proofs { leases, grain, warnings }
}

/// A file without a name in the root, open for writing and again for reading.
fn nameless(root: &Root) -> Result<(OwnedFd, OwnedFd), Errno> {
    let mode = Mode::from_raw_mode(0o600);
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let writer = rfs::openat(root.fd(), ".", flags | OFlags::TMPFILE, mode).or_else(|_| {
        let name = [OWN_PREFIX, format!("proof-{}", std::process::id()).as_bytes()].concat();
        let file = rfs::openat(root.fd(), name.as_slice(), flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW, mode)?;
        rfs::unlinkat(root.fd(), name.as_slice(), AtFlags::empty()).map(|()| file)
    })?;
    rustix::io::write(&writer, b"x")?;
    let reader = rfs::open(of(&writer), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    Ok((writer, reader))
}

fn of(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

fn events(writer: &OwnedFd) -> Result<bool, Errno> {
    let queue = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
    inotify::add_watch(&queue, of(writer), WatchFlags::MODIFY)?;
    rustix::io::write(writer, b"x")?;
    let mut buffer = [std::mem::MaybeUninit::uninit(); 512];
    match Reader::new(&queue, &mut buffer).next() {
        Ok(_) => Ok(true),
        Err(Errno::AGAIN) => Ok(false),
        Err(error) => Err(error),
    }
}

/// How long it takes until a change has another ctime than the one before; zero when the next one has.
fn grain(writer: &OwnedFd) -> Result<Duration, Errno> {
    let began = std::time::Instant::now();
    let first = tree::local(&rfs::fstat(writer)?).ctime;
    let mut tries = 0;
    loop {
        rustix::io::write(writer, b"x")?;
        tries += 1;
        if tree::local(&rfs::fstat(writer)?).ctime != first {
            return Ok(if tries == 1 { Duration::ZERO } else { began.elapsed().max(Duration::from_millis(10)) });
        }
        if began.elapsed() > PATIENCE {
            return Ok(COARSE);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ordinary_disk_proves_everything_and_nothing_is_left_there() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::open(dir.path()).unwrap();
        let proofs = try_out(&root);
        assert!(proofs.leases, "{proofs:?}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        // The kernel the tests run on may be older than fine times.
        assert!(proofs.warnings.iter().all(|warning| warning.contains("times on")), "{proofs:?}");
    }

    #[test]
    fn what_cannot_be_tried_is_not_believed() {
        let proofs = try_out(&Root::open(std::path::Path::new("/proc/self")).unwrap());
        assert!(!proofs.leases && proofs.grain == COARSE && proofs.warnings.iter().any(|w| w.contains("not tried")), "{proofs:?}");
    }
}
