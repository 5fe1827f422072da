//! Are two directory trees the same? What a mirror must carry, and how a difference is told.
//!
//! Compared: names as bytes, types, permission bits with setuid, setgid and sticky, numeric owners, sizes, modification times in
//! nanoseconds (directories and the root too), device numbers, symlink targets, extended attributes with POSIX ACLs, contents,
//! which names share an inode, and that a sparse file has not been filled in. Not compared: access and change times, inode
//! numbers, link counts through names outside the tree.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

pub use crate::walk::snapshot;

/// How the temporary names of the mirror program begin: never mirrored, and gone when it has stopped ([`leftovers`]).
pub const PRIVATE: &[u8] = b".twinbox-";

/// Blocks a replica of a sparse file may have beyond the source's: preallocation and extent rounding.
const SPARSE_SLACK: u64 = 256 * 1024;

/// Mail store formats, which decide what is never mirrored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// One file a message, in `cur` and `new`, delivered through `tmp`.
    Maildir,
    /// Dovecot's one file a message with its index as the truth.
    Sdbox,
    /// Dovecot's many messages a file.
    Mdbox,
    /// One file a folder.
    Mbox,
    /// Any files.
    Plain,
}

impl Layout {
    /// All formats that a mail server writes.
    pub const MAIL: [Self; 4] = [Self::Maildir, Self::Sdbox, Self::Mdbox, Self::Mbox];

    /// Its name on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Maildir => "maildir",
            Self::Sdbox => "sdbox",
            Self::Mdbox => "mdbox",
            Self::Mbox => "mbox",
            Self::Plain => "plain",
        }
    }
}

/// What is compared and what is left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rules {
    layout: Layout,
    owners: bool,
    everything: bool,
}

impl Rules {
    /// Everything that `layout` mirrors.
    #[must_use]
    pub fn of(layout: Layout) -> Self {
        Self { layout, owners: true, everything: false }
    }

    /// The same, but owners are not compared: an ordinary user cannot set them.
    #[must_use]
    pub fn without_owners(self) -> Self {
        Self { owners: false, ..self }
    }

    /// Whether the path (bytes, relative to the root) is never mirrored. Only files are ever scratch, and messages never are.
    #[must_use]
    pub fn excludes(&self, path: &[u8], is_dir: bool) -> bool {
        let mut parents: Vec<&[u8]> = path.split(|b| *b == b'/').collect();
        let name = parents.pop().unwrap_or_default();
        let parent = parents.last().copied().unwrap_or_default();
        if self.everything {
            return false;
        }
        if name.starts_with(PRIVATE) || parents.iter().any(|p| p.starts_with(PRIVATE)) {
            return true;
        }
        if is_dir {
            return false;
        }
        let lock = name.ends_with(b".lock") || name.ends_with(b".newlock");
        let shared = name.ends_with(b"-shm");
        let half = name.starts_with(b"dovecot") && name.ends_with(b".tmp");
        match self.layout {
            Layout::Plain => shared,
            Layout::Maildir if matches!(parent, b"cur" | b"new") => false,
            Layout::Maildir => parent == b"tmp" || lock || shared || half || name.starts_with(b".temp."),
            Layout::Sdbox | Layout::Mdbox => lock || shared || half || name.starts_with(b".temp."),
            Layout::Mbox => lock || half || name.starts_with(b".temp."),
        }
    }
}

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Kind {
    File,
    Directory,
    Symlink,
    Fifo,
    Socket,
    CharDevice,
    BlockDevice,
    Unknown,
}

/// How much of a tree is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// Names and metadata.
    Stat,
    /// And a hash of every file's content.
    Content,
}

/// One name in a tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// What it is.
    pub kind: Kind,
    /// Permission bits, setuid, setgid, sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Bytes; 0 for what is not a regular file.
    pub size: u64,
    /// Seconds and nanoseconds.
    pub mtime: (i64, u32),
    /// Device number of a device node.
    pub rdev: u64,
    /// Bytes allocated; compared only where the source is sparse.
    pub allocated: u64,
    /// Where a symlink points.
    pub target: Option<Vec<u8>>,
    /// Extended attributes by name.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Hash of the content, where it was read.
    pub content: Option<[u8; 32]>,
    /// Every name in the tree of the same inode, where there are several.
    pub links: Vec<Vec<u8>>,
}

/// A tree at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// By path relative to the root; the root itself is the empty path.
    pub entries: BTreeMap<Vec<u8>, Entry>,
}

/// One way in which a replica is not its source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// Relative to the root.
    pub path: Vec<u8>,
    /// Which property.
    pub field: &'static str,
    /// The source's.
    pub source: String,
    /// The replica's.
    pub replica: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = if self.path.is_empty() { "(root)".to_owned() } else { self.path.escape_ascii().to_string() };
        write!(f, "{path}: {} {} → {}", self.field, self.source, self.replica)
    }
}

/// Every way in which `replica` is not `source`, in the order of paths.
#[must_use]
pub fn diff(source: &Snapshot, replica: &Snapshot, rules: Rules) -> Vec<Difference> {
    let mut found = Vec::new();
    let paths: BTreeSet<_> = source.entries.keys().chain(replica.entries.keys()).collect();
    for path in paths {
        let note = |field, source: String, replica: String| Difference { path: path.clone(), field, source, replica };
        match (source.entries.get(path), replica.entries.get(path)) {
            (Some(s), Some(r)) => fields(s, r, rules, |f, a, b| found.push(note(f, a, b))),
            (Some(s), None) => found.push(note("exists", format!("{:?}", s.kind), "absent".into())),
            (None, Some(r)) => found.push(note("exists", "absent".into(), format!("{:?}", r.kind))),
            (None, None) => {}
        }
    }
    found
}

fn fields(s: &Entry, r: &Entry, rules: Rules, mut note: impl FnMut(&'static str, String, String)) {
    if s.kind != r.kind {
        note("type", format!("{:?}", s.kind), format!("{:?}", r.kind));
        return;
    }
    let shown = |v: &Option<Vec<u8>>| v.as_deref().unwrap_or_default().escape_ascii().to_string();
    let names = |v: &[Vec<u8>]| {
        let all: Vec<String> = v.iter().map(|n| n.escape_ascii().to_string()).collect();
        format!("[{}]", all.join(", "))
    };
    if s.mode != r.mode && s.kind != Kind::Symlink {
        note("mode", format!("{:04o}", s.mode), format!("{:04o}", r.mode));
    }
    if rules.owners && (s.uid, s.gid) != (r.uid, r.gid) {
        note("owner", format!("{}:{}", s.uid, s.gid), format!("{}:{}", r.uid, r.gid));
    }
    if s.size != r.size {
        note("size", s.size.to_string(), r.size.to_string());
    }
    if s.mtime != r.mtime {
        let time = |t: (i64, u32)| format!("{}.{:09}", t.0, t.1);
        note("mtime", time(s.mtime), time(r.mtime));
    }
    if s.rdev != r.rdev {
        note("device", s.rdev.to_string(), r.rdev.to_string());
    }
    if s.target != r.target {
        note("target", shown(&s.target), shown(&r.target));
    }
    for name in s.xattrs.keys().chain(r.xattrs.keys()).collect::<BTreeSet<_>>() {
        let (a, b) = (s.xattrs.get(name).cloned(), r.xattrs.get(name).cloned());
        if a != b {
            let name = name.escape_ascii();
            note("xattr", format!("{name}={}", shown(&a)), format!("{name}={}", shown(&b)));
        }
    }
    if let (Some(a), Some(b)) = (s.content, r.content)
        && a != b
    {
        let hex = |h: [u8; 32]| h[..6].iter().map(|b| format!("{b:02x}")).collect::<String>();
        note("content", hex(a), hex(b));
    }
    if s.links != r.links {
        note("links", names(&s.links), names(&r.links));
    }
    let sparse = s.allocated + SPARSE_SLACK < s.size;
    if sparse && r.allocated > s.allocated + s.allocated / 8 + SPARSE_SLACK {
        note("allocated", s.allocated.to_string(), r.allocated.to_string());
    }
}

/// The first differences as text, one a line.
#[must_use]
pub fn describe(differences: &[Difference]) -> String {
    const SHOWN: usize = 20;
    let mut text = format!("{} differences (source → replica):\n", differences.len());
    for d in differences.iter().take(SHOWN) {
        text.push_str(&format!("  {d}\n"));
    }
    if differences.len() > SHOWN {
        text.push_str("  …\n");
    }
    text
}

/// Reads both trees with their contents and compares them.
pub fn compare(source: &Path, replica: &Path, rules: Rules) -> io::Result<Vec<Difference>> {
    compare_at(source, replica, rules, Depth::Content)
}

fn compare_at(a: &Path, b: &Path, rules: Rules, depth: Depth) -> io::Result<Vec<Difference>> {
    Ok(diff(&snapshot(a, rules, depth)?, &snapshot(b, rules, depth)?, rules))
}

/// Waits until the trees are identical; contents are read once the metadata agree. On giving up: what differs.
pub fn wait_identical(a: &Path, b: &Path, rules: Rules, limit: Duration) -> Result<(), String> {
    let deadline = Instant::now() + limit;
    let mut pause = Duration::from_millis(10);
    loop {
        let mut state = compare_at(a, b, rules, Depth::Stat);
        if state.as_ref().is_ok_and(Vec::is_empty) {
            state = compare(a, b, rules);
        }
        let late = Instant::now() >= deadline;
        match state {
            Ok(differences) if differences.is_empty() => return Ok(()),
            Ok(differences) if late => {
                return Err(format!("after {limit:?}: {}", describe(&differences)));
            }
            Err(e) if late => return Err(format!("after {limit:?}: {e}")),
            Ok(_) | Err(_) => crate::gate::nap(pause),
        }
        pause = (pause * 2).min(Duration::from_millis(250));
    }
}

/// Files of the mirror program itself that lie about in a tree.
pub fn leftovers(root: &Path) -> io::Result<Vec<String>> {
    let everything = Rules { everything: true, ..Rules::of(Layout::Plain) };
    let found = snapshot(root, everything, Depth::Stat)?;
    let own = |path: &&Vec<u8>| path.rsplit(|b| *b == b'/').next().is_some_and(|n| n.starts_with(PRIVATE));
    Ok(found.entries.keys().filter(own).map(|p| p.escape_ascii().to_string()).collect())
}

/// Panics with what differs, unless the trees are identical now.
pub fn assert_identical(a: &Path, b: &Path, rules: Rules) {
    let differences = compare(a, b, rules).expect("read both trees");
    assert!(differences.is_empty(), "{}", describe(&differences));
}
