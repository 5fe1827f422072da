//! `twinbox compare`: two trees on this machine, name by name, with content and all metadata that travels.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::FileType;
use twinbox_protocol::entry::{Entry, Kind};
use twinbox_protocol::ids::ContentHash;
use twinbox_protocol::path::RelPath;

use crate::cli::Compare;
use crate::exit::ExitCode;
use crate::failure::Failure;
use crate::layout::Selection;
use crate::tree::{self, Root};

/// What a tree holds: entries, and for files with several names the first of them.
#[derive(Default)]
pub struct Snapshot {
    /// By path.
    pub entries: BTreeMap<RelPath, Entry>,
    links: BTreeMap<RelPath, RelPath>,
}

/// Reads a whole tree.
///
/// # Errors
/// The system's, naming the path.
pub fn snapshot(root: &Root, selection: &Selection) -> Result<Snapshot, Failure> {
    let mut out = Snapshot::default();
    let mut inodes: BTreeMap<u64, RelPath> = BTreeMap::new();
    let mut stack = vec![RelPath::root()];
    while let Some(dir) = stack.pop() {
        let failed = |path: &RelPath, error: rustix::io::Errno| {
            Failure::io(&root.path().join(std::ffi::OsStr::new(&path.to_string())).display().to_string(), &error.into())
        };
        let fd = root.dir_for_reading(&dir).map_err(|e| failed(&dir, e))?;
        let stat = rustix::fs::fstat(&fd).map_err(|e| failed(&dir, e))?;
        let xattrs = tree::xattrs(fd.as_fd(), false).map_err(|e| failed(&dir, e))?;
        out.entries.extend(tree::entry(&stat, xattrs, None, None).map(|entry| (dir.clone(), entry)));
        for item in tree::list(fd.as_fd()).map_err(|e| failed(&dir, e))? {
            let Some(path) = dir.join(&item.name) else { continue };
            let Some(stat) = root.stat(&path).map_err(|e| failed(&path, e))? else { continue };
            let kind = FileType::from_raw_mode(stat.st_mode);
            if selection.excludes(path.as_bytes(), kind == FileType::Directory) {
                continue;
            }
            if kind == FileType::Directory {
                stack.push(path);
                continue;
            }
            let entry = if kind == FileType::RegularFile {
                let file = root.file(&path).map_err(|e| failed(&path, e))?;
                let xattrs = tree::xattrs(file.as_fd(), false).map_err(|e| failed(&path, e))?;
                let mut hasher = blake3::Hasher::new();
                hasher.update_reader(std::fs::File::from(file)).map_err(|e| Failure::io(&path.to_string(), &e))?;
                tree::entry(&stat, xattrs, Some(ContentHash(*hasher.finalize().as_bytes())), None)
            } else {
                let handle = root.handle(&path).map_err(|e| failed(&path, e))?;
                let target = match kind {
                    FileType::Symlink => Some(rustix::fs::readlinkat(&handle, "", vec![]).map_err(|e| failed(&path, e))?.into_bytes()),
                    _ => None,
                };
                tree::entry(&stat, tree::xattrs(handle.as_fd(), true).map_err(|e| failed(&path, e))?, None, target)
            };
            let Some(entry) = entry else { continue };
            if stat.st_nlink > 1 {
                let first = inodes.entry(stat.st_ino).or_insert_with(|| path.clone()).clone();
                out.links.insert(path.clone(), first);
            }
            out.entries.insert(path, entry);
        }
    }
    // The first name of an inode, whatever order the directories came in.
    let mut firsts: BTreeMap<RelPath, RelPath> = BTreeMap::new();
    for (path, group) in &out.links {
        firsts.entry(group.clone()).and_modify(|f| *f = f.clone().min(path.clone())).or_insert_with(|| path.clone());
    }
    for group in out.links.values_mut() {
        if let Some(first) = firsts.get(group) {
            *group = first.clone();
        }
    }
    Ok(out)
}

/// Where two trees differ: path and what.
#[must_use]
pub fn differences(a: &Snapshot, b: &Snapshot) -> Vec<(RelPath, String)> {
    let mut out = vec![];
    for (path, entry) in &a.entries {
        let Some(other) = b.entries.get(path) else {
            out.push((path.clone(), "only in the first".into()));
            continue;
        };
        let mut what = vec![];
        match (&entry.kind, &other.kind) {
            (x, y) if x == y => {}
            (Kind::File { size: x, .. }, Kind::File { size: y, .. }) if x != y => what.push(format!("size {x} and {y}")),
            (Kind::File { .. }, Kind::File { .. }) => what.push("content".into()),
            (Kind::Symlink { .. }, Kind::Symlink { .. }) => what.push("link target".into()),
            _ => what.push("type".into()),
        }
        if entry.mode != other.mode {
            what.push(format!("mode {:o} and {:o}", entry.mode, other.mode));
        }
        if (entry.uid, entry.gid) != (other.uid, other.gid) {
            what.push(format!("owner {}:{} and {}:{}", entry.uid, entry.gid, other.uid, other.gid));
        }
        if entry.mtime != other.mtime {
            what.push("modification time".into());
        }
        if entry.xattrs != other.xattrs {
            what.push("extended attributes".into());
        }
        if a.links.get(path) != b.links.get(path) {
            what.push("hard links".into());
        }
        if !what.is_empty() {
            out.push((path.clone(), what.join(", ")));
        }
    }
    out.extend(b.entries.keys().filter(|path| !a.entries.contains_key(*path)).map(|path| (path.clone(), "only in the second".into())));
    out.sort();
    out
}

/// Opens a root for comparing.
///
/// # Errors
/// Names the path.
pub fn open(path: &Path) -> Result<Root, Failure> {
    Root::open(path).map_err(|error| Failure::new(ExitCode::BadPath, format!("{}: {error}", path.display())))
}

/// Runs the command.
///
/// # Errors
/// A tree that cannot be read.
pub fn run(args: &Compare) -> Result<ExitCode, Failure> {
    let selection = Selection::new(args.layout, vec![]);
    let (a, b) = (snapshot(&open(&args.a)?, &selection)?, snapshot(&open(&args.b)?, &selection)?);
    let found = differences(&a, &b);
    if args.json {
        let list: Vec<_> = found.iter().map(|(path, what)| serde_json::json!({"path": path.to_string(), "what": what})).collect();
        println!("{}", serde_json::json!({"entries": a.entries.len(), "differences": list}));
    } else if found.is_empty() {
        println!("identical: {} entries, names, content and metadata", a.entries.len());
    } else {
        for (path, what) in &found {
            println!("{path}: {what}");
        }
        eprintln!("{} of {} entries differ", found.len(), a.entries.len());
    }
    Ok(if found.is_empty() { ExitCode::Ok } else { ExitCode::Differs })
}
