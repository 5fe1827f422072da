//! What this disk has at a path, read in full: after a power cut neither sizes nor times say what the bytes are.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{FileType, Stat};
use rustix::io::Errno;
use twinbox_protocol::entry::Entry;
use twinbox_protocol::ids::ContentHash;
use twinbox_protocol::path::RelPath;

use super::judge::Found;
use crate::standby::copy;
use crate::standby::replica::Replica;
use crate::sys::{Probe, lease_probe};
use crate::tree;

/// Bytes read at a time.
const PIECE: usize = 256 * 1024;

/// Whatever is at `path`; `wanted` is what the standby has there. `was` and `known` are the caller's to fill in.
pub(super) fn found(replica: &mut Replica, path: &RelPath, wanted: Option<&Entry>) -> Result<Option<Found>, Errno> {
    let Some(stat) = replica.stat(path)? else { return Ok(None) };
    let handle = replica.handle(path)?;
    let xattrs = tree::xattrs(handle.as_fd(), true)?;
    let (mut hash, mut longer, mut busy, mut target) = (None, false, false, None);
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => {
            let file = replica.file(path, false)?;
            busy = lease_probe(file.as_fd()) == Probe::Writer;
            copy::forget_pages(&file);
            let names = names(&file, wanted.and_then(|w| w.hash().map(|_| w.size())))
                .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
            hash = Some(names.whole);
            longer = names.beginning.is_some() && names.beginning == wanted.and_then(Entry::hash);
        }
        FileType::Symlink => {
            let place = replica.place(path)?;
            target = Some(rustix::fs::readlinkat(&place.dir, place.name.as_slice(), vec![])?.into_bytes());
        }
        _ => {}
    }
    // A socket is never mirrored: as if nothing were there, and never touched either, because names of it are excluded from rows.
    Ok(tree::entry(&stat, xattrs, hash, target).map(|entry| Found {
        entry,
        local: tree::local(&stat),
        was: false,
        busy,
        longer,
        known: false,
        fresh: false,
    }))
}

struct Names {
    whole: ContentHash,
    /// Of the first `at` bytes, when there are more.
    beginning: Option<ContentHash>,
}

fn names(file: &File, at: Option<u64>) -> std::io::Result<Names> {
    let (mut hasher, mut beginning, mut read, mut buffer) = (blake3::Hasher::new(), None, 0u64, vec![0; PIECE]);
    loop {
        // A piece ends where the beginning does.
        let want = at.filter(|at| *at > read).map_or(PIECE, |at| (at - read).min(PIECE as u64) as usize);
        let got = file.read_at(&mut buffer[..want], read)?;
        if got == 0 {
            let whole = ContentHash(*hasher.finalize().as_bytes());
            return Ok(Names { whole, beginning: beginning.filter(|_| at.is_some_and(|at| at < read)) });
        }
        if at == Some(read) {
            beginning = Some(ContentHash(*hasher.finalize().as_bytes()));
        }
        hasher.update(&buffer[..got]);
        read += got as u64;
    }
}

/// Whether a file's bytes, as the disk has them, are what `entry` says.
pub(super) fn holds(file: &File, entry: &Entry) -> bool {
    copy::forget_pages(file);
    copy::hash(file).is_ok_and(|hash| Some(hash) == entry.hash())
}

/// Whether all bytes of `part` are the first bytes of `whole`, and fewer.
pub(super) fn begins(part: &File, whole: &File) -> std::io::Result<bool> {
    let (len, of) = (part.metadata()?.len(), whole.metadata()?.len());
    if len >= of {
        return Ok(false);
    }
    let (mut a, mut b, mut at) = (vec![0; PIECE], vec![0; PIECE], 0u64);
    while at < len {
        let want = (len - at).min(PIECE as u64) as usize;
        part.read_exact_at(&mut a[..want], at)?;
        whole.read_exact_at(&mut b[..want], at)?;
        if a[..want] != b[..want] {
            return Ok(false);
        }
        at += want as u64;
    }
    Ok(true)
}

/// Whether two looks saw the same file with the same bytes, as far as its stat goes.
pub(super) fn is_row(stat: &Stat, entry: &Entry, local: twinbox_resync::rows::Local) -> bool {
    tree::local(stat) == local && tree::mtime(stat) == entry.mtime && entry.size() == stat.st_size as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use twinbox_protocol::entry::{Kind, Time};

    fn wanted(bytes: &[u8]) -> Entry {
        let kind = Kind::File { size: bytes.len() as u64, hash: ContentHash::of(bytes) };
        Entry { kind, mode: 0, uid: 0, gid: 0, mtime: Time::default(), xattrs: vec![] }
    }

    #[test]
    fn beginnings() {
        let dir = tempfile::tempdir().unwrap();
        let mut replica = Replica::new(tree::Root::open(dir.path()).unwrap());
        let path = RelPath::new(b"f").unwrap();
        let long: Vec<u8> = (0..600_000u32).map(|i| (i % 251) as u8).collect();
        for (disk, row, longer, begins_) in [
            (&long[..], &long[..300_000], true, false),
            (&long, &long[..262_144], true, false),
            (&long, &long, false, false),
            (&long[..300_000], &long, false, true),
            (b"", &long, false, true),
            (&long, b"", true, false),
            (b"abc", b"abd", false, false),
            (b"xb", b"abd", false, false),
        ] {
            std::fs::write(dir.path().join("f"), disk).unwrap();
            std::fs::write(dir.path().join("g"), row).unwrap();
            let found = found(&mut replica, &path, Some(&wanted(row))).unwrap().unwrap();
            assert_eq!((found.longer, found.entry.hash()), (longer, Some(ContentHash::of(disk))), "{} {}", disk.len(), row.len());
            let (part, whole) = (File::open(dir.path().join("f")).unwrap(), File::open(dir.path().join("g")).unwrap());
            assert_eq!(begins(&part, &whole).unwrap(), begins_, "{} {}", disk.len(), row.len());
        }
    }
}
