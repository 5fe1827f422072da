//! Copying bytes between files with their holes, and hashing files.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;

use rustix::fs::{self as rfs, SeekFrom};
use rustix::io::Errno;
use twinbox_protocol::ids::ContentHash;

/// The next stretch of data in `at..end`, without the hole before it; empty at `end` when only a hole is left. Where the file system cannot tell, all is data.
pub(crate) fn next_data(fd: BorrowedFd<'_>, at: u64, end: u64) -> Range<u64> {
    match rfs::seek(fd, SeekFrom::Data(at)) {
        Ok(start) if start < end => {
            let hole = rfs::seek(fd, SeekFrom::Hole(start)).unwrap_or(end);
            start..hole.clamp(start + 1, end)
        }
        // Past the last data, but maybe also past the end: a reader there finds out that bytes are missing.
        Ok(_) | Err(Errno::NXIO) => match rfs::fstat(fd) {
            Ok(stat) if stat.st_size as u64 >= end => end..end,
            _ => at..end,
        },
        Err(_) => at..end,
    }
}

/// Copies `len` bytes, sharing blocks where the file system can.
fn range(from: BorrowedFd<'_>, to: BorrowedFd<'_>, mut at: u64, end: u64) -> Result<(), Errno> {
    let mut shared = true;
    let mut buffer = vec![];
    while at < end {
        if shared {
            let (mut source, mut target) = (at, at);
            let want = (end - at).min(1 << 30) as usize;
            match rfs::copy_file_range(from, Some(&mut source), to, Some(&mut target), want) {
                Ok(0) => return Err(Errno::IO),
                Ok(got) => at += got as u64,
                Err(Errno::INTR) => {}
                Err(Errno::XDEV | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP | Errno::BADF) => shared = false,
                Err(other) => return Err(other),
            }
            continue;
        }
        buffer.resize(256 * 1024, 0);
        let want = buffer.len().min((end - at) as usize);
        let got = rustix::io::pread(from, &mut buffer[..want], at)?;
        if got == 0 {
            return Err(Errno::IO);
        }
        write_all_at(to, &buffer[..got], at)?;
        at += got as u64;
    }
    Ok(())
}

/// Makes `to` (empty) hold the first `len` bytes of `from`, holes kept.
pub(crate) fn whole(from: BorrowedFd<'_>, to: BorrowedFd<'_>, len: u64) -> Result<(), Errno> {
    let mut at = 0;
    while at < len {
        let data = next_data(from, at, len);
        range(from, to, data.start, data.end)?;
        at = data.end;
    }
    rfs::ftruncate(to, len)
}

/// `pwrite` until all is written.
pub(crate) fn write_all_at(fd: BorrowedFd<'_>, mut bytes: &[u8], mut at: u64) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match rustix::io::pwrite(fd, bytes, at) {
            Ok(0) => return Err(Errno::IO),
            Ok(put) => {
                bytes = &bytes[put..];
                at += put as u64;
            }
            Err(Errno::INTR) => {}
            Err(other) => return Err(other),
        }
    }
    Ok(())
}

/// Name of a whole file's bytes on the disk: pages that are clean are dropped first, for after a failed writeback they are not what the disk has. Dirty ones stay, and are the next `syncfs`'s.
pub(crate) fn hash_on_disk(file: &File) -> io::Result<ContentHash> {
    forget_pages(file);
    hash(file)
}

/// Lets go of the clean pages of a file, so that the next read asks the disk.
pub(crate) fn forget_pages(file: &File) {
    let _ = rfs::fadvise(file, 0, None, rfs::Advice::DontNeed);
}

/// Name of a whole file's bytes.
pub(crate) fn hash(file: &File) -> io::Result<ContentHash> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 256 * 1024];
    let mut at = 0;
    loop {
        let got = std::os::unix::fs::FileExt::read_at(file, &mut buffer, at)?;
        if got == 0 {
            return Ok(ContentHash(*hasher.finalize().as_bytes()));
        }
        hasher.update(&buffer[..got]);
        at += got as u64;
    }
}
