//! What a mail store's format means for mirroring: which names are never mirrored, and how paths fall into groups.
//!
//! Invariants:
//! - The rules are data; everything here is a pure function of a relative byte path and whether it is a directory.
//! - In doubt a path is mirrored: a scratch file copied in vain costs a few bytes, mail left behind is lost. So only files are
//!   ever taken for scratch, never directories (a folder may be called `padlock.lock`), and names in a Maildir's `cur/` and
//!   `new/` are messages, whatever they look like.
//! - What is excluded hides everything below it.
//!
//! Does not: look at the disk, or decide what is watched (writes move *out of* `tmp/`, so it is watched all the same).

use std::fmt;
use std::str::FromStr;

use crate::glob::Glob;
use crate::nearest::nearest;

/// Prefix of every temporary name Twinbox makes inside a mirrored tree. Reserved: never mirrored, in any layout.
pub const OWN_PREFIX: &[u8] = b".twinbox-";

/// The format of a mirrored tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Layout {
    /// Maildir and Maildir++ (one file a message).
    Maildir,
    /// Dovecot single-dbox (one file a message, indexes required).
    Sdbox,
    /// Dovecot multi-dbox (several messages a file, indexes required).
    Mdbox,
    /// mbox (one file a folder).
    Mbox,
    /// Any other tree: nothing is taken for scratch.
    Plain,
}

/// What one layout never mirrors. Byte strings are compared exactly; all of them apply to non-directories only.
#[derive(Debug)]
struct Rules {
    /// Directories whose immediate files are scratch. The directory itself, and directories in it, are mirrored.
    scratch_dirs: &'static [&'static [u8]],
    /// Directories whose immediate files are messages and therefore never scratch.
    message_dirs: &'static [&'static [u8]],
    /// A name beginning so is scratch.
    prefixes: &'static [&'static [u8]],
    /// A name ending so is scratch.
    suffixes: &'static [&'static [u8]],
    /// A name with this beginning and, after it, this ending is scratch.
    affixes: &'static [(&'static [u8], &'static [u8])],
}

/// Index files are written under these names, then renamed (lib-index and maildir-uidlist of Dovecot 2.3).
const INDEX_TEMPS: &[(&[u8], &[u8])] = &[(b"dovecot", b".index.tmp"), (b"dovecot.index.", b".tmp"), (b"dovecot-uidlist", b".tmp")];

/// Dovecot's dotlocks, the lock under which it makes a new transaction log, and SQLite's shared-memory file, which is rebuilt
/// from the WAL and never still.
const LOCKS: &[&[u8]] = &[b".lock", b".newlock", b"-shm"];

/// Dovecot's temporary names: `.temp.<time>.P<pid>Q<n>M<usec>.<host>` for dbox, `.temp.<host>.<pid>.` for dotlocks.
const TEMPS: &[&[u8]] = &[b".temp."];

const MAILDIR: Rules =
    Rules { scratch_dirs: &[b"tmp"], message_dirs: &[b"cur", b"new"], prefixes: TEMPS, suffixes: LOCKS, affixes: INDEX_TEMPS };

const DBOX: Rules = Rules { scratch_dirs: &[], message_dirs: &[], prefixes: TEMPS, suffixes: LOCKS, affixes: INDEX_TEMPS };

/// A file here can be a folder its user named. Dovecot itself refuses folders that end in `.lock`; for the rest the rules are
/// narrow enough that a folder's name has to imitate Dovecot's or SQLite's own.
const MBOX: Rules = Rules {
    scratch_dirs: &[],
    message_dirs: &[],
    prefixes: TEMPS,
    suffixes: &[b".lock", b".log.newlock", b".db-shm", b".sqlite-shm", b".sqlite3-shm"],
    affixes: INDEX_TEMPS,
};

const PLAIN: Rules = Rules { scratch_dirs: &[], message_dirs: &[], prefixes: &[], suffixes: &[b"-shm"], affixes: &[] };

impl Layout {
    /// Every layout, in the order they are listed to people.
    pub const ALL: [Layout; 5] = [Layout::Maildir, Layout::Sdbox, Layout::Mdbox, Layout::Mbox, Layout::Plain];

    /// The name used in configuration, on the command line and in status.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Layout::Maildir => "maildir",
            Layout::Sdbox => "sdbox",
            Layout::Mdbox => "mdbox",
            Layout::Mbox => "mbox",
            Layout::Plain => "plain",
        }
    }

    /// Whether `path` (relative, `/`-separated) is never mirrored, because of its own name or of a directory above it.
    #[must_use]
    pub fn excludes(self, path: &[u8], is_dir: bool) -> bool {
        if path.split(|&b| b == b'/').any(|name| name.starts_with(OWN_PREFIX)) {
            return true;
        }
        if is_dir {
            return false;
        }
        let rules = self.rules();
        let mut names = path.rsplit(|&b| b == b'/');
        let name = names.next().unwrap_or_default();
        let parent = names.next().unwrap_or_default();
        if rules.message_dirs.contains(&parent) {
            return false;
        }
        rules.scratch_dirs.contains(&parent)
            || rules.prefixes.iter().any(|prefix| name.starts_with(prefix))
            || rules.suffixes.iter().any(|suffix| name.ends_with(suffix))
            || rules.suffixes.contains(&b".lock".as_slice()) && is_new_lock(name)
            || rules.affixes.iter().any(|(start, end)| name.strip_prefix(*start).is_some_and(|rest| rest.ends_with(end)))
    }

    fn rules(self) -> &'static Rules {
        match self {
            Layout::Maildir => &MAILDIR,
            Layout::Sdbox | Layout::Mdbox => &DBOX,
            Layout::Mbox => &MBOX,
            Layout::Plain => &PLAIN,
        }
    }
}

/// A lock as Dovecot makes it before it gets its name: `mailboxes.lock6fcf2e675c908448`.
fn is_new_lock(name: &[u8]) -> bool {
    let hex = |b: &u8| b.is_ascii_digit() || (b'a'..=b'f').contains(b);
    name.len().checked_sub(16).is_some_and(|at| name[..at].ends_with(b".lock") && name[at..].iter().all(hex))
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// No layout has this name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown layout `{given}`; {}the layouts are maildir, sdbox, mdbox, mbox and plain",
        nearest.map(|layout| format!("did you mean `{layout}`? ")).unwrap_or_default())]
pub struct UnknownLayout {
    /// What was given.
    pub given: String,
    /// The layout whose name is close to it, if one is.
    pub nearest: Option<Layout>,
}

impl FromStr for Layout {
    type Err = UnknownLayout;

    fn from_str(text: &str) -> Result<Self, UnknownLayout> {
        let found = |name: &str| Layout::ALL.into_iter().find(|layout| layout.as_str() == name);
        found(text).ok_or_else(|| UnknownLayout {
            given: text.to_owned(),
            nearest: nearest(text, Layout::ALL.map(Layout::as_str)).and_then(found),
        })
    }
}

/// What of one mirror is replicated: its layout's rules plus the operator's `exclude` patterns.
#[derive(Debug, Clone)]
pub struct Selection {
    layout: Layout,
    exclude: Vec<Glob>,
}

impl Selection {
    /// Joins a layout's rules with `exclude` patterns (see [`Glob::names`] for their meaning).
    #[must_use]
    pub fn new(layout: Layout, exclude: Vec<Glob>) -> Self {
        Selection { layout, exclude }
    }

    /// Its layout.
    #[must_use]
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Whether `path` is never mirrored, because of its own name or of a directory above it.
    #[must_use]
    pub fn excludes(&self, path: &[u8], is_dir: bool) -> bool {
        self.layout.excludes(path, is_dir)
            || self.exclude.iter().any(|glob| glob.names(path, is_dir) || ancestors(path).any(|directory| glob.names(directory, true)))
    }
}

/// How the paths of one mirror fall into consistency groups. A group is named by a path prefix; `""` is the root's own group.
///
/// Without patterns, each top-level directory is a group (a mailbox user, as in `alice/Maildir/cur/…`), and files directly in
/// the root belong to `""`. With patterns (`groups = ["*/*"]` for `domain/user`), the shortest prefix of a path that one of
/// them matches is its group, file or directory; what no prefix matches belongs to `""`. A spool of mbox files directly in the
/// root wants `groups = ["*"]`: one group a file.
#[derive(Debug, Clone, Default)]
pub struct Grouping {
    globs: Vec<Glob>,
}

impl Grouping {
    /// Groups by `globs`, or by top-level directory when there are none.
    #[must_use]
    pub fn new(globs: Vec<Glob>) -> Self {
        Grouping { globs }
    }

    /// The group of `path`: a prefix of it that ends at a component.
    #[must_use]
    pub fn group_of<'p>(&self, path: &'p [u8], is_dir: bool) -> &'p [u8] {
        if self.globs.is_empty() {
            return match path.iter().position(|&b| b == b'/') {
                Some(slash) => &path[..slash],
                None if is_dir => path,
                None => b"",
            };
        }
        ancestors(path).chain([path]).find(|prefix| self.globs.iter().any(|glob| glob.matches(prefix))).unwrap_or(b"")
    }
}

/// The directories above `path`, outermost first, without the root.
fn ancestors(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    let slashes = path.iter().enumerate().filter(|&(_, &b)| b == b'/');
    slashes.map(|(at, _)| &path[..at])
}

#[cfg(test)]
#[path = "layout_tests.rs"]
mod tests;
