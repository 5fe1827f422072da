//! The replica's tree as something to write to: places reached beneath the root, files that appear whole, directories opened for an ordinary user and closed again.
//!
//! Every change of a name notes its directory in `dirs`; the owner restores their attributes from the rows when the txn is done (a change of names moves a
//! directory's mtime, and an ordinary user may have had to open a directory without write permission).

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{self as rfs, AtFlags, FileType, Mode, OFlags, RenameFlags, Stat};
use rustix::io::Errno;
use twinbox_protocol::entry::{Entry, Kind};
use twinbox_protocol::path::RelPath;

use super::attrs::{self, Lost};
use super::copy;
use crate::tree::Root;

/// Begin of the names of files that are not yet in place.
pub(crate) const TEMP: &[u8] = b".twinbox-apply-";

/// The same where files are synced: one name, so that what a power cut left of it goes when that directory is healed again.
const TEMP_HEAL: &[u8] = b".twinbox-heal";

/// Bytes of a file to be written.
pub(crate) enum Bytes<'a> {
    /// These.
    Here(&'a [u8]),
    /// The first so many of a file.
    File(&'a File, u64),
}

/// What becomes of a file that is where another is put.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Over {
    /// It is replaced.
    Replace,
    /// There must be none: else `EXIST`.
    Nothing,
    /// It is left under the temporary name, to be looked at ([`Replica::displaced`]); `NOENT` if there is none.
    Exchange,
}

/// A directory and a name in it.
pub(crate) struct Place {
    pub(crate) dir: OwnedFd,
    pub(crate) name: Vec<u8>,
}

impl Place {
    /// `lstat`; `None` when nothing is there.
    pub(crate) fn stat(&self) -> Result<Option<Stat>, Errno> {
        match rfs::statat(&self.dir, self.name.as_slice(), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(stat)),
            Err(Errno::NOENT) => Ok(None),
            Err(other) => Err(other),
        }
    }

    fn unlink(&self) -> Result<(), Errno> {
        rfs::unlinkat(&self.dir, self.name.as_slice(), AtFlags::empty())
    }
}

/// See the module's text.
pub(crate) struct Replica {
    pub(crate) root: Root,
    /// Not root: permissions bind us, owners and devices are out of reach.
    pub(crate) ordinary: bool,
    pub(crate) lost: Lost,
    /// Directories whose attributes must be restored.
    pub(crate) dirs: BTreeSet<RelPath>,
    /// A file is durable before it gets its name (where no redo log stands behind it).
    pub(crate) synced: bool,
    /// See [`Over`].
    pub(crate) over: Over,
    next: u64,
}

pub(crate) fn kind(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

pub(crate) fn is_dir(stat: &Stat) -> bool {
    kind(stat) == FileType::Directory
}

/// Whether what is on disk is of the entry's type.
pub(crate) fn same_type(stat: &Stat, entry: &Entry) -> bool {
    match (&entry.kind, kind(stat)) {
        (Kind::File { .. }, FileType::RegularFile)
        | (Kind::Dir, FileType::Directory)
        | (Kind::Symlink { .. }, FileType::Symlink)
        | (Kind::Fifo, FileType::Fifo) => true,
        (Kind::Device { block, major, minor }, found @ (FileType::BlockDevice | FileType::CharacterDevice)) => {
            *block == (found == FileType::BlockDevice) && rfs::makedev(*major, *minor) == stat.st_rdev
        }
        _ => false,
    }
}

impl Replica {
    pub(crate) fn new(root: Root) -> Self {
        let ordinary = !rustix::process::geteuid().is_root();
        Replica { root, ordinary, lost: Lost::new(), dirs: BTreeSet::new(), synced: false, over: Over::Replace, next: 0 }
    }

    /// Whether this user may make the entry at all.
    pub(crate) fn can_make(&self, entry: &Entry) -> bool {
        !(self.ordinary && matches!(entry.kind, Kind::Device { .. }))
    }

    /// The directory of `path`, open to act in, and its name. The root has no place.
    pub(crate) fn place(&mut self, path: &RelPath) -> Result<Place, Errno> {
        let (dir, name) = path.split().ok_or(Errno::ISDIR)?;
        let parent = RelPath::new(dir).map_err(|_| Errno::INVAL)?;
        let dir = self.open_dir(&parent)?;
        if self.ordinary && rfs::fstat(&dir)?.st_mode & 0o100 == 0 {
            self.unlock(&parent, dir.as_fd())?;
        }
        Ok(Place { dir, name: name.to_vec() })
    }

    /// As [`Replica::place`], for a change of the name: the directory's attributes are restored later.
    pub(crate) fn place_to_change(&mut self, path: &RelPath) -> Result<Place, Errno> {
        #[cfg(test)]
        fault::count_down()?;
        let place = self.place(path)?;
        if let Some(parent) = path.parent() {
            if self.ordinary {
                self.unlock(&parent, place.dir.as_fd())?;
            }
            self.dirs.insert(parent);
        }
        Ok(place)
    }

    fn open_dir(&mut self, path: &RelPath) -> Result<OwnedFd, Errno> {
        match self.root.dir(path.as_bytes()) {
            Err(Errno::ACCESS) if self.ordinary => {
                let (mut at, bytes) = (0, path.as_bytes());
                let mut ends: Vec<usize> = vec![0];
                while let Some(slash) = bytes[at..].iter().position(|b| *b == b'/') {
                    ends.push(at + slash);
                    at += slash + 1;
                }
                for end in ends {
                    let dir = self.root.dir(&bytes[..end])?;
                    self.unlock(&RelPath::new(&bytes[..end]).map_err(|_| Errno::INVAL)?, dir.as_fd())?;
                }
                self.root.dir(bytes)
            }
            other => other,
        }
    }

    /// Opens a directory of ours for ourselves; its row gives it its mode back.
    fn unlock(&mut self, path: &RelPath, dir: std::os::fd::BorrowedFd<'_>) -> Result<(), Errno> {
        let mode = rfs::fstat(dir)?.st_mode & 0o7777;
        if mode & 0o700 != 0o700 {
            rfs::chmod(&*attrs::proc_path(dir), Mode::from_raw_mode(mode | 0o700))?;
            self.dirs.insert(path.clone());
        }
        Ok(())
    }

    /// Whatever is at `path`, as a handle; a link itself.
    pub(crate) fn handle(&mut self, path: &RelPath) -> Result<OwnedFd, Errno> {
        if path.is_root() {
            return self.root.dir(b"");
        }
        let place = self.place(path)?;
        rfs::openat(&place.dir, place.name.as_slice(), OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
    }

    /// `lstat`, also below directories closed to an ordinary user.
    pub(crate) fn stat(&mut self, path: &RelPath) -> Result<Option<Stat>, Errno> {
        if path.is_root() {
            return rfs::fstat(self.root.fd()).map(Some);
        }
        match self.place(path) {
            Ok(place) => place.stat(),
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(None),
            Err(other) => Err(other),
        }
    }

    /// Opens a regular file; an ordinary user gives himself permission, the attributes are set afterwards by the caller.
    pub(crate) fn file(&mut self, path: &RelPath, write: bool) -> Result<File, Errno> {
        let place = self.place(path)?;
        let access = if write { OFlags::RDWR } else { OFlags::RDONLY };
        let flags = access | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let open = || rfs::openat(&place.dir, place.name.as_slice(), flags, Mode::empty());
        let fd = match open() {
            Err(Errno::ACCESS) if self.ordinary => {
                let handle = self.handle(path)?;
                let stat = rfs::fstat(&handle)?;
                if kind(&stat) == FileType::Symlink {
                    return Err(Errno::LOOP);
                }
                rfs::chmod(&*attrs::proc_path(handle.as_fd()), Mode::from_raw_mode(stat.st_mode & 0o7777 | 0o600))?;
                let fd = open()?;
                if !write {
                    rfs::fchmod(&fd, Mode::from_raw_mode(stat.st_mode & 0o7777))?;
                }
                fd
            }
            other => other?,
        };
        if kind(&rfs::fstat(&fd)?) != FileType::RegularFile {
            return Err(Errno::INVAL);
        }
        Ok(fd.into())
    }

    fn temp_name(&mut self) -> Vec<u8> {
        if self.synced {
            return TEMP_HEAL.to_vec();
        }
        self.next += 1;
        [TEMP, self.next.to_string().as_bytes()].concat()
    }

    /// Runs `make` with free temporary names until it finds one, then `finish` on what was made; the temporary file goes if that fails.
    fn made(
        &mut self,
        place: &Place,
        make: impl Fn(&Place) -> Result<(), Errno>,
        finish: impl FnOnce(&mut Self, &Place) -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        loop {
            let temp = Place { dir: place.dir.try_clone().map_err(|_| Errno::MFILE)?, name: self.temp_name() };
            match make(&temp) {
                // Left behind by an earlier run.
                Err(Errno::EXIST) => {
                    temp.unlink()?;
                    continue;
                }
                other => other?,
            }
            let done = finish(self, &temp).and_then(|()| self.name(&temp, place));
            if done.is_err() {
                let _ = temp.unlink();
            }
            return done;
        }
    }

    /// A temporary file gets its name.
    fn name(&self, temp: &Place, place: &Place) -> Result<(), Errno> {
        let flags = match self.over {
            Over::Replace => RenameFlags::empty(),
            Over::Nothing => RenameFlags::NOREPLACE,
            Over::Exchange => RenameFlags::EXCHANGE,
        };
        match rfs::renameat_with(&temp.dir, temp.name.as_slice(), &place.dir, place.name.as_slice(), flags) {
            // A file system that cannot: the look before is all there is.
            Err(Errno::INVAL | Errno::NOSYS) if !flags.is_empty() => {
                if self.over == Over::Nothing && place.stat()?.is_some() {
                    return Err(Errno::EXIST);
                }
                rfs::renameat(&temp.dir, temp.name.as_slice(), &place.dir, place.name.as_slice())
            }
            other => other,
        }
    }

    /// Where what was at `path` is since something was put there by [`Over::Exchange`], or since [`Replica::set_aside`].
    pub(crate) fn displaced(path: &RelPath) -> Option<RelPath> {
        path.parent()?.join(TEMP_HEAL)
    }

    /// Takes the name of a file away and leaves it where [`Replica::displaced`] says.
    pub(crate) fn set_aside(&mut self, path: &RelPath) -> Result<(), Errno> {
        let place = self.place_to_change(path)?;
        let temp = Place { dir: place.dir.try_clone().map_err(|_| Errno::MFILE)?, name: TEMP_HEAL.to_vec() };
        rfs::renameat(&place.dir, place.name.as_slice(), &temp.dir, temp.name.as_slice())
    }

    /// What is at `a` and what is at `b` change places.
    pub(crate) fn exchange(&mut self, a: &RelPath, b: &RelPath) -> Result<(), Errno> {
        let (one, other) = (self.place_to_change(a)?, self.place_to_change(b)?);
        rfs::renameat_with(&one.dir, one.name.as_slice(), &other.dir, other.name.as_slice(), RenameFlags::EXCHANGE)
    }

    /// rename(2) to a name that is free: else `EXIST`.
    pub(crate) fn rename_to_free(&mut self, from: &RelPath, to: &RelPath) -> Result<(), Errno> {
        let (source, target) = (self.place_to_change(from)?, self.place_to_change(to)?);
        match rfs::renameat_with(&source.dir, source.name.as_slice(), &target.dir, target.name.as_slice(), RenameFlags::NOREPLACE) {
            // A file system that cannot: the look before is all there is.
            Err(Errno::INVAL | Errno::NOSYS) if target.stat()?.is_some() => Err(Errno::EXIST),
            Err(Errno::INVAL | Errno::NOSYS) => rfs::renameat(&source.dir, source.name.as_slice(), &target.dir, target.name.as_slice()),
            other => other,
        }
    }

    /// A regular file appears at `path`, whole, instead of whatever file is there.
    pub(crate) fn put(&mut self, path: &RelPath, entry: &Entry, bytes: &Bytes<'_>) -> Result<(), Errno> {
        let place = self.place_to_change(path)?;
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let made = std::cell::Cell::new(None);
        self.made(
            &place,
            |temp| {
                made.set(Some(rfs::openat(&temp.dir, temp.name.as_slice(), flags, Mode::from_raw_mode(0o600))?));
                Ok(())
            },
            |replica, _| {
                let Some(fd) = made.take() else { return Err(Errno::BADF) };
                match bytes {
                    Bytes::Here(bytes) => copy::write_all_at(fd.as_fd(), bytes, 0)?,
                    Bytes::File(file, len) => copy::whole(file.as_fd(), fd.as_fd(), *len)?,
                }
                attrs::set(fd.as_fd(), entry, replica.ordinary, &mut replica.lost)?;
                if replica.synced { rfs::fsync(&fd) } else { Ok(()) }
            },
        )
    }

    /// A link, pipe or device appears at `path` instead of whatever file is there; or a directory where none is.
    pub(crate) fn make(&mut self, path: &RelPath, entry: &Entry) -> Result<(), Errno> {
        if entry.is_dir() {
            if !path.is_root() {
                let place = self.place_to_change(path)?;
                match rfs::mkdirat(&place.dir, place.name.as_slice(), Mode::from_raw_mode(0o700)) {
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(other) => return Err(other),
                }
            }
            return self.set_attrs(path, entry);
        }
        let place = self.place_to_change(path)?;
        let node = |temp: &Place, kind, dev| rfs::mknodat(&temp.dir, temp.name.as_slice(), kind, Mode::from_raw_mode(0o600), dev);
        self.made(
            &place,
            |temp| match &entry.kind {
                Kind::Symlink { target } => rfs::symlinkat(target.as_slice(), &temp.dir, temp.name.as_slice()),
                Kind::Fifo => node(temp, FileType::Fifo, 0),
                Kind::Device { block, major, minor } => {
                    let kind = if *block { FileType::BlockDevice } else { FileType::CharacterDevice };
                    node(temp, kind, rfs::makedev(*major, *minor))
                }
                Kind::File { .. } | Kind::Dir => Err(Errno::INVAL),
            },
            |replica, temp| {
                let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let fd = rfs::openat(&temp.dir, temp.name.as_slice(), flags, Mode::empty())?;
                attrs::set(fd.as_fd(), entry, replica.ordinary, &mut replica.lost)
            },
        )
    }

    /// `to` becomes another name of the file at `from`, instead of whatever file is there.
    pub(crate) fn link(&mut self, from: &RelPath, to: &RelPath) -> Result<(), Errno> {
        let source = self.place(from)?;
        let target = self.place_to_change(to)?;
        if let (Some(a), Some(b)) = (source.stat()?, target.stat()?)
            && (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino)
        {
            return Ok(());
        }
        self.made(
            &target,
            |temp| rfs::linkat(&source.dir, source.name.as_slice(), &temp.dir, temp.name.as_slice(), AtFlags::empty()),
            |_, _| Ok(()),
        )
    }

    /// rename(2); two names of one file become one.
    pub(crate) fn rename(&mut self, from: &RelPath, to: &RelPath) -> Result<(), Errno> {
        let (source, target) = (self.place_to_change(from)?, self.place_to_change(to)?);
        if let (Some(a), Some(b)) = (source.stat()?, target.stat()?)
            && (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino)
            && !is_dir(&a)
        {
            return source.unlink();
        }
        rfs::renameat(&source.dir, source.name.as_slice(), &target.dir, target.name.as_slice())?;
        // Directories noted under the old name are under the new one now.
        let moved: Vec<RelPath> = self.dirs.iter().filter(|dir| dir.is_within(from)).cloned().collect();
        for dir in moved {
            self.dirs.remove(&dir);
            self.dirs.extend(dir.rebase(from, to));
        }
        Ok(())
    }

    /// A file or an empty directory goes; gone already is fine.
    pub(crate) fn remove(&mut self, path: &RelPath) -> Result<(), Errno> {
        let place = match self.place_to_change(path) {
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
            other => other?,
        };
        let flags = match place.stat()? {
            None => return Ok(()),
            Some(stat) if is_dir(&stat) => AtFlags::REMOVEDIR,
            Some(_) => AtFlags::empty(),
        };
        self.dirs.remove(path);
        match rfs::unlinkat(&place.dir, place.name.as_slice(), flags) {
            Err(Errno::NOENT) => Ok(()),
            other => other,
        }
    }

    /// Attributes alone.
    pub(crate) fn set_attrs(&mut self, path: &RelPath, entry: &Entry) -> Result<(), Errno> {
        let handle = self.handle(path)?;
        attrs::set(handle.as_fd(), entry, self.ordinary, &mut self.lost)
    }
}

/// A fault for tests: on this thread, changes fail with "no space" after so many.
#[cfg(test)]
pub(crate) mod fault {
    use std::cell::Cell;

    use rustix::io::Errno;

    thread_local! {
        pub(in crate::standby) static LEFT: Cell<Option<u32>> = const { Cell::new(None) };
    }

    pub(crate) fn count_down() -> Result<(), Errno> {
        match LEFT.get() {
            Some(0) => Err(Errno::NOSPC),
            Some(left) => {
                LEFT.set(Some(left - 1));
                Ok(())
            }
            None => Ok(()),
        }
    }
}
