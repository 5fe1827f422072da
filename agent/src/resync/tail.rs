//! What this disk has that the rows both nodes had at the fork have not. Stats decide where inode and ctime are as noted; everything else is read.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::AsFd;

use rustix::fs::{self as rfs, FileType};
use rustix::io::Errno;
use twinbox_protocol::entry::{Entry, Kind};
use twinbox_protocol::path::RelPath;
use twinbox_protocol::rejoin::Flags;
use twinbox_resync::mailname::Name;
use twinbox_resync::manifest::Manifest;
use twinbox_resync::reconcile::{Change, Tail};
use twinbox_resync::rows::{Local, Row, RowError, Rows};

use super::keywords::Keywords;
use crate::layout::Selection;
use crate::standby::copy;
use crate::tree::{self, Root};

/// Looks at a file that changes under our eyes.
const LOOKS: u32 = 5;

/// Why the tail is not known.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TailError {
    /// A path cannot be looked at.
    #[error("{path}: {}; nobody can tell what is in it: mend that and try again", std::io::Error::from(*.source))]
    Disk {
        /// Which.
        path: RelPath,
        /// The system's word.
        source: Errno,
    },
    /// Rows.
    #[error("{0}")]
    Rows(#[from] RowError),
    /// The row store.
    #[error(transparent)]
    State(#[from] twinbox_resync::schema::StateError),
}

/// What is at `path`; bytes are read unless the row knows them. `BUSY`: somebody changes it all the time.
pub(super) fn look(root: &Root, path: &RelPath, row: Option<&Row>) -> Result<Option<(Entry, Local)>, Errno> {
    for _ in 0..LOOKS {
        match look_once(root, path, row) {
            Ok(Look::Still(found)) => return Ok(found),
            // Changed, moved or replaced between two of our steps.
            Ok(Look::Changed) | Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {}
            Err(error) => return Err(error),
        }
    }
    Err(Errno::BUSY)
}

enum Look {
    Still(Option<(Entry, Local)>),
    Changed,
}

fn look_once(root: &Root, path: &RelPath, row: Option<&Row>) -> Result<Look, Errno> {
    let Some(stat) = root.stat(path)? else { return Ok(Look::Still(None)) };
    let entry = match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => {
            let file = root.file(path)?;
            let known = row.filter(|row| {
                row.local == Some(tree::local(&stat)) && row.entry.size() == stat.st_size as u64 && row.entry.mtime == tree::mtime(&stat)
            });
            let xattrs = tree::xattrs(file.as_fd(), false)?;
            let hash = match known.and_then(|row| row.entry.hash()) {
                Some(hash) => hash,
                None => copy::hash(&file.into()).map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?,
            };
            tree::entry(&stat, xattrs, Some(hash), None)
        }
        FileType::Symlink => {
            let link = root.handle(path)?;
            let target = rfs::readlinkat(&link, "", Vec::with_capacity(256))?.into_bytes();
            tree::entry(&stat, tree::xattrs(link.as_fd(), true)?, None, Some(target))
        }
        _ => tree::entry(&stat, tree::xattrs(root.handle(path)?.as_fd(), true)?, None, None),
    };
    Ok(match root.stat(path)? {
        Some(after) if tree::same_stat(&stat, &after) => Look::Still(entry.map(|entry| (entry, tree::local(&stat)))),
        _ => Look::Changed,
    })
}

/// A difference, with what only this machine knows of it.
pub(super) struct Differs {
    pub(super) fork: Option<Row>,
    pub(super) ours: Option<(Entry, Local)>,
}

/// All of them; and of files that are as their rows say what this machine knows of them.
type Differences = (BTreeMap<RelPath, Differs>, Vec<(RelPath, Local)>);

/// Compares the whole store. `busy`: it is in use, and what is changed all the time only counts as changed.
pub(super) fn differences(
    manifest: &Manifest,
    root: &Root,
    selection: &Selection,
    busy: bool,
    progress: &mut dyn FnMut(u64),
) -> Result<Differences, TailError> {
    let (mut all, mut same, mut looked_at) = (BTreeMap::new(), vec![], 0);
    let mut stack = vec![RelPath::root()];
    while let Some(dir) = stack.pop() {
        let failed = |source| TailError::Disk { path: dir.clone(), source };
        let fd = match root.dir_for_reading(&dir) {
            Ok(fd) => fd,
            Err(Errno::NOENT | Errno::NOTDIR) => continue, // Gone since it was listed: what is below it is told as gone.
            Err(error) => return Err(failed(error)),
        };
        let mut names = tree::list(fd.as_fd()).map_err(failed)?;
        names.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        let mut rows = manifest.children(&dir).map_err(|e| manifest.state_error(&e))?.into_iter().peekable();
        let mut gone = vec![];
        for item in names {
            let Some(path) = dir.join(&item.name) else { continue };
            while let Some((name, row)) = rows.next_if(|(name, _)| *name < item.name) {
                gone.extend(dir.join(&name).map(|path| (path, row)));
            }
            let row = rows.next_if(|(name, _)| *name == item.name).map(|(_, row)| row);
            looked_at += 1;
            if looked_at % 1000 == 0 {
                progress(looked_at);
            }
            let failed = |source| TailError::Disk { path: path.clone(), source };
            let stat = match root.stat(&path) {
                Err(Errno::XDEV) => continue, // Another file system is no part of the mirror.
                other => other.map_err(failed)?,
            };
            let is_dir = stat.is_some_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory);
            if selection.excludes(path.as_bytes(), is_dir) {
                continue; // What the other node has of it is its own business.
            }
            let as_noted = |row: &Row| {
                stat.is_some_and(|stat| {
                    row.local == Some(tree::local(&stat))
                        && row.entry.mtime == tree::mtime(&stat)
                        && row.entry.size() == size(&row.entry, &stat)
                })
            };
            if !row.as_ref().is_some_and(as_noted) {
                let ours = match look(root, &path, row.as_ref()) {
                    Err(Errno::BUSY) if busy => stat.and_then(|stat| Some((unread(&stat)?, tree::local(&stat)))),
                    other => other.map_err(failed)?,
                };
                match (row, ours) {
                    (Some(row), Some((entry, local))) if row.entry == entry => same.push((path.clone(), local)),
                    (None, None) => {}
                    (Some(row), None) => gone.push((path.clone(), row)),
                    (fork, ours) => {
                        if fork.as_ref().is_some_and(|fork| fork.entry.is_dir()) && !is_dir {
                            below(manifest, &path, &mut all)?;
                        }
                        all.insert(path.clone(), Differs { fork, ours });
                    }
                }
            }
            if is_dir {
                stack.push(path);
            }
        }
        gone.extend(rows.filter_map(|(name, row)| Some((dir.join(&name)?, row))));
        for (path, row) in gone {
            if row.entry.is_dir() {
                below(manifest, &path, &mut all)?;
            }
            all.insert(path, Differs { fork: Some(row), ours: None });
        }
    }
    progress(looked_at);
    Ok((all, same))
}

/// Of something that nobody can read at rest.
pub(super) fn unread(stat: &rfs::Stat) -> Option<Entry> {
    tree::entry(stat, vec![], None, None)
}

fn size(entry: &Entry, stat: &rfs::Stat) -> u64 {
    if matches!(entry.kind, Kind::File { .. }) { stat.st_size as u64 } else { 0 }
}

/// Everything below a directory that is gone is gone.
fn below(manifest: &Manifest, dir: &RelPath, all: &mut BTreeMap<RelPath, Differs>) -> Result<(), RowError> {
    all.extend(manifest.below(dir)?.into_iter().map(|(path, row)| (path, Differs { fork: Some(row), ours: None })));
    Ok(())
}

/// Whether a directory is older than what was noted of it under another name: its inode number alone may have been used again.
fn is_older(root: &Root, path: &RelPath, noted: Local) -> bool {
    let Ok(dir) = root.handle(path) else { return false };
    let Ok(found) = rfs::statx(&dir, "", rfs::AtFlags::EMPTY_PATH, rfs::StatxFlags::BTIME | rfs::StatxFlags::INO) else { return false };
    // A file system without times of birth: no folder is taken for moved, and its messages are told one by one.
    let known = found.stx_mask & rfs::StatxFlags::BTIME.bits() != 0 && found.stx_ino == noted.ino;
    known && (found.stx_btime.tv_sec, found.stx_btime.tv_nsec) <= (noted.ctime.secs, noted.ctime.nanos)
}

/// As the decisions want it: with flags, and with what directories were.
pub(super) fn tail(differences: &BTreeMap<RelPath, Differs>, root: &Root) -> Tail {
    let gone_dirs: HashMap<u64, (&RelPath, Local)> = differences
        .iter()
        .filter(|(_, it)| it.ours.is_none())
        .filter_map(|(path, it)| {
            let local = it.fork.as_ref().filter(|row| row.entry.is_dir())?.local?;
            Some((local.ino, (path, local)))
        })
        .collect();
    let was = |path: &RelPath, it: &Differs| {
        let (entry, local) = it.ours.as_ref().filter(|_| it.fork.is_none())?;
        let (was, noted) = gone_dirs.get(&local.ino).filter(|_| entry.is_dir())?;
        is_older(root, path, *noted).then(|| (*was).clone())
    };
    let was: HashMap<&RelPath, RelPath> = differences.iter().filter_map(|(path, it)| Some((path, was(path, it)?))).collect();
    let now: HashMap<RelPath, RelPath> = was.iter().map(|(path, was)| (was.clone(), (*path).clone())).collect();
    let mut maildirs: HashMap<RelPath, bool> = HashMap::new();
    let mut owner = |path: &RelPath| {
        let mut above: Vec<RelPath> = std::iter::successors(path.parent(), RelPath::parent).collect();
        above.reverse();
        let is_dir = |dir: &RelPath| {
            let there = dir.join(b"cur").and_then(|cur| root.stat(&cur).ok().flatten());
            there.is_some_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory)
        };
        above.into_iter().find(|dir| *maildirs.entry(dir.clone()).or_insert_with(|| is_dir(dir))).unwrap_or_default()
    };
    let mut keywords = Keywords::default();
    let mut flags = |path: &RelPath| {
        let Some(name) = Name::of(path) else { return Flags::new() };
        // Its names are where the folder is now.
        let moved =
            std::iter::successors(Some(name.folder.clone()), RelPath::parent).find_map(|dir| name.folder.rebase(&dir, now.get(&dir)?));
        let folder = moved.unwrap_or_else(|| name.folder.clone());
        let mut found = vec![];
        for letter in name.letters.iter().filter(|letter| letter.is_ascii_lowercase()) {
            found.push((*letter, keywords.name(root, &folder, *letter)));
        }
        name.flags(|letter| found.iter().find(|(of, _)| *of == letter).and_then(|(_, name)| name.clone()))
    };
    let mut change = |(path, it): (&RelPath, &Differs)| {
        let file = |entry: Option<&Entry>| entry.is_some_and(|entry| entry.hash().is_some());
        let fork = it.fork.as_ref().map(|row| row.entry.clone());
        let ours = it.ours.as_ref().map(|(entry, _)| entry.clone());
        let read = flags(path);
        let of = |entry: &Option<Entry>| if file(entry.as_ref()) { read.clone() } else { Flags::new() };
        let (fork_flags, flags) = (of(&fork), of(&ours));
        (path.clone(), Change { fork, ours, was: was.get(path).cloned(), owner: owner(path), flags, fork_flags })
    };
    differences.iter().map(&mut change).collect()
}
