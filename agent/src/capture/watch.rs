//! One inotify instance for a whole mirror, and the tree of directories it watches.
//!
//! A watch descriptor (wd) follows its inode, so a directory that moves loses no event; this tree maps a wd to a path *as of the events processed so far*.
//! Disk truth wins: whoever opens a directory and watches it says where it is ([`Watch::place`]).
//! Cookies are files made and removed in a directory of ours on tmpfs, watched by the same instance: when one comes out of the queue, everything completed before it has come out.
//!
//! Does not interpret events; `capture::engine` does.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use twinbox_protocol::path::RelPath;

/// Estimated kernel memory of one watch in bytes: `fsnotify_mark`, the pinned inode and dentry (64-bit, kernel 6).
pub const KERNEL_BYTES_PER_WATCH: u64 = 1100;

/// A watch descriptor: the name of a directory here, whatever its path is.
pub type Wd = i32;

/// One event out of the queue.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Event {
    /// Directory it happened in (or to).
    pub wd: Wd,
    /// What.
    pub mask: ReadFlags,
    /// Joins the two halves of a rename.
    pub cookie: u32,
    /// Name in the directory; empty for the directory itself.
    pub name: Vec<u8>,
}

/// Why a directory cannot be watched.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WatchError {
    /// The kernel's limit on watches.
    #[error(
        "out of inotify watches: this mirror needs one for each directory, and fs.inotify.max_user_watches is {limit} ({used} in use here); raise it: `sysctl -w fs.inotify.max_user_watches={wanted}` (and in /etc/sysctl.d/ to keep it)"
    )]
    Limit {
        /// The sysctl's value.
        limit: u64,
        /// Watches held by this mirror.
        used: u64,
        /// What to set it to.
        wanted: u64,
    },
    /// The kernel's limit on instances.
    #[error(
        "out of inotify instances: raise fs.inotify.max_user_instances (now {limit}): `sysctl -w fs.inotify.max_user_instances={}`",
        limit * 2
    )]
    Instances {
        /// The sysctl's value.
        limit: u64,
    },
    /// Anything else.
    #[error("cannot watch {what}: {source}")]
    Io {
        /// Directory.
        what: String,
        /// The system's words.
        source: io::Error,
    },
}

struct Node {
    parent: Option<Wd>,
    name: Vec<u8>,
    children: BTreeMap<Vec<u8>, Wd>,
}

/// See the module's text.
pub struct Watch {
    fd: OwnedFd,
    nodes: HashMap<Wd, Node>,
    root: Wd,
    cookies: OwnedFd,
    cookie_dir: PathBuf,
    cookie_wd: Wd,
    cookie_seq: u64,
    buffer: Vec<MaybeUninit<u8>>,
}

fn sysctl(name: &str) -> u64 {
    std::fs::read_to_string(format!("/proc/sys/fs/inotify/{name}")).ok().and_then(|t| t.trim().parse().ok()).unwrap_or(0)
}

fn mask() -> WatchFlags {
    WatchFlags::CREATE
        | WatchFlags::DELETE
        | WatchFlags::MODIFY
        | WatchFlags::CLOSE_WRITE
        | WatchFlags::ATTRIB
        | WatchFlags::MOVED_FROM
        | WatchFlags::MOVED_TO
        | WatchFlags::DELETE_SELF
        | WatchFlags::MOVE_SELF
        | WatchFlags::ONLYDIR
}

fn of_fd(fd: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

impl Watch {
    /// Starts an instance that watches `root` (an open directory); cookies are made below `cookie_parent`, best a tmpfs.
    ///
    /// # Errors
    /// [`WatchError`].
    pub fn new(root: BorrowedFd<'_>, cookie_parent: &Path) -> Result<Self, WatchError> {
        let io = |what: &str| {
            let what = what.to_owned();
            move |error: Errno| WatchError::Io { what, source: error.into() }
        };
        let fd = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).map_err(|error| match error {
            Errno::MFILE => WatchError::Instances { limit: sysctl("max_user_instances") },
            other => io("anything")(other),
        })?;
        let mut nonce = [0u8; 8];
        rustix::rand::getrandom(&mut nonce, rustix::rand::GetRandomFlags::empty()).map_err(io("anything"))?;
        let cookie_dir = cookie_parent.join(format!("twinbox-{}-{:016x}", std::process::id(), u64::from_le_bytes(nonce)));
        let cookie_name = cookie_dir.display().to_string();
        rustix::fs::mkdir(&cookie_dir, Mode::RWXU).map_err(io(&cookie_name))?;
        let cookies =
            rustix::fs::open(&cookie_dir, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).map_err(io(&cookie_name))?;
        let mut watch = Watch {
            fd,
            nodes: HashMap::new(),
            root: -1,
            cookies,
            cookie_dir,
            cookie_wd: -1,
            cookie_seq: 0,
            buffer: vec![MaybeUninit::uninit(); 64 * 1024],
        };
        watch.cookie_wd = watch.watch(of_fd(watch.cookies.as_fd()), WatchFlags::CREATE | WatchFlags::ONLYDIR, &cookie_name)?;
        watch.root = watch.add(root)?;
        watch.nodes.insert(watch.root, Node { parent: None, name: vec![], children: BTreeMap::new() });
        Ok(watch)
    }

    fn watch(&self, path: String, mask: WatchFlags, what: &str) -> Result<Wd, WatchError> {
        inotify::add_watch(&self.fd, path, mask).map_err(|error| match error {
            Errno::NOSPC => {
                let (limit, used) = (sysctl("max_user_watches"), self.nodes.len() as u64);
                WatchError::Limit { limit, used, wanted: (limit.max(used) * 2).max(524_288) }
            }
            other => WatchError::Io { what: what.into(), source: other.into() },
        })
    }

    /// Watches an open directory: the inode it is, wherever its path leads by now.
    ///
    /// # Errors
    /// [`WatchError`].
    pub fn add(&self, dir: BorrowedFd<'_>) -> Result<Wd, WatchError> {
        self.watch(of_fd(dir), mask(), "a directory")
    }

    /// The instance, for poll(2).
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Number of directories watched.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.nodes.len() as u64
    }

    /// Whether none is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// The root's wd.
    #[must_use]
    pub fn root(&self) -> Wd {
        self.root
    }

    /// Path of a watched directory as of the events processed so far.
    #[must_use]
    pub fn path(&self, wd: Wd) -> Option<RelPath> {
        let mut names = vec![];
        let (mut wd, mut at) = (wd, self.nodes.get(&wd)?);
        while let Some(parent) = at.parent {
            names.push(at.name.as_slice());
            (wd, at) = (parent, self.nodes.get(&parent)?);
        }
        if wd != self.root {
            return None; // Without a place until it is found again: not the root's.
        }
        names.reverse();
        RelPath::new(&names.join(&b'/')).ok()
    }

    /// The watched directory at `path`.
    #[must_use]
    pub fn at(&self, path: &RelPath) -> Option<Wd> {
        let mut at = self.root;
        if !path.is_root() {
            for name in path.as_bytes().split(|b| *b == b'/') {
                at = *self.nodes.get(&at)?.children.get(name)?;
            }
        }
        Some(at)
    }

    /// Says that the directory `wd` is `name` in `parent`. A node that was there before is left without a place until it is found again.
    pub fn place(&mut self, wd: Wd, parent: Wd, name: &[u8]) {
        if wd == self.root || self.is_above(wd, parent) {
            return; // Would be a loop: what we believe of the parent is old; its own event corrects it.
        }
        self.unhook(wd);
        let Some(node) = self.nodes.get_mut(&parent) else { return };
        let displaced = node.children.insert(name.to_vec(), wd);
        if let Some(old) = displaced.filter(|old| *old != wd) {
            self.forget(old);
        }
        let node = self.nodes.entry(wd).or_insert_with(|| Node { parent: None, name: vec![], children: BTreeMap::new() });
        node.parent = Some(parent);
        node.name = name.to_vec();
    }

    fn is_above(&self, wd: Wd, mut below: Wd) -> bool {
        loop {
            if below == wd {
                return true;
            }
            match self.nodes.get(&below).and_then(|n| n.parent) {
                Some(parent) => below = parent,
                None => return false,
            }
        }
    }

    fn unhook(&mut self, wd: Wd) {
        let Some(node) = self.nodes.get(&wd) else { return };
        let (parent, name) = (node.parent, node.name.clone());
        if let Some(parent) = parent.and_then(|p| self.nodes.get_mut(&p))
            && parent.children.get(&name) == Some(&wd)
        {
            parent.children.remove(&name);
        }
    }

    /// Stops watching a directory and all below it.
    pub fn forget(&mut self, wd: Wd) {
        self.unhook(wd);
        let mut stack = vec![wd];
        while let Some(wd) = stack.pop() {
            if let Some(node) = self.nodes.remove(&wd) {
                stack.extend(node.children.into_values());
                let _ = inotify::remove_watch(&self.fd, wd); // Gone already if the directory is.
            }
        }
    }

    /// The kernel says the watch is gone (the directory was removed).
    pub fn handle_ignored(&mut self, wd: Wd) {
        self.unhook(wd);
        if let Some(node) = self.nodes.remove(&wd) {
            for child in node.children.into_values() {
                if let Some(child) = self.nodes.get_mut(&child) {
                    child.parent = None;
                }
            }
        }
    }

    /// Makes a cookie; gives its number. It has come out when [`Watch::cookie_of`] says so.
    ///
    /// # Errors
    /// The system's (tmpfs full, directory removed).
    pub fn cookie(&mut self) -> io::Result<u64> {
        self.cookie_seq += 1;
        let name = format!("{}", self.cookie_seq);
        rustix::fs::openat(&self.cookies, name.as_str(), OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC, Mode::RUSR)?;
        rustix::fs::unlinkat(&self.cookies, name.as_str(), rustix::fs::AtFlags::empty())?;
        Ok(self.cookie_seq)
    }

    /// The number of a cookie event.
    #[must_use]
    pub fn cookie_of(&self, event: &Event) -> Option<u64> {
        (event.wd == self.cookie_wd).then(|| std::str::from_utf8(&event.name).ok()?.parse().ok()).flatten()
    }

    /// Whether the event is one of the cookie directory at all.
    #[must_use]
    pub fn is_cookie_dir(&self, event: &Event) -> bool {
        event.wd == self.cookie_wd
    }

    /// Takes what is in the queue, up to a buffer full; never waits.
    ///
    /// # Errors
    /// The system's.
    pub fn read(&mut self, out: &mut Vec<Event>) -> io::Result<()> {
        let mut reader = Reader::new(self.fd.as_fd(), &mut self.buffer);
        loop {
            match reader.next() {
                Ok(event) => out.push(Event {
                    wd: event.wd(),
                    mask: event.events(),
                    cookie: event.cookie(),
                    name: event.file_name().map(|n| n.to_bytes().to_vec()).unwrap_or_default(),
                }),
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(other) => return Err(other.into()),
            }
            if reader.is_buffer_empty() {
                return Ok(());
            }
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.cookie_dir);
    }
}

/// Where cookies are best made: a tmpfs we may write to, else `fallback`.
#[must_use]
pub fn cookie_parent(fallback: &Path) -> PathBuf {
    let runtime = std::env::var_os("RUNTIME_DIRECTORY").or_else(|| std::env::var_os("XDG_RUNTIME_DIR")).map(PathBuf::from);
    let candidates = runtime.into_iter().chain(["/dev/shm".into(), "/run".into()]);
    let writable = |dir: &PathBuf| rustix::fs::access(dir, rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK).is_ok();
    candidates.into_iter().find(writable).unwrap_or_else(|| fallback.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, File};

    fn drain(watch: &mut Watch) -> Vec<Event> {
        let seq = watch.cookie().unwrap();
        let mut out = vec![];
        while !out.iter().any(|e| watch.cookie_of(e) == Some(seq)) {
            watch.read(&mut out).unwrap();
        }
        out
    }

    #[test]
    fn a_cookie_comes_out_after_everything_completed_before_it() {
        let dir = tempfile::tempdir().unwrap();
        let mut watch = Watch::new(File::open(dir.path()).unwrap().as_fd(), dir.path().parent().unwrap()).unwrap();
        fs::write(dir.path().join("a"), b"x").unwrap();
        let events = drain(&mut watch);
        assert!(events.iter().any(|e| e.name == b"a" && e.mask.contains(ReadFlags::CLOSE_WRITE)));
        assert!(watch.is_cookie_dir(events.last().unwrap()));
        let left = watch.cookie_dir.clone();
        drop(watch);
        assert!(!left.exists());
    }

    #[test]
    fn a_moved_directory_keeps_its_watch_and_is_found_under_its_new_name() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("a/b")).unwrap();
        let mut watch = Watch::new(File::open(dir.path()).unwrap().as_fd(), dir.path().parent().unwrap()).unwrap();
        let a = watch.add(File::open(dir.path().join("a")).unwrap().as_fd()).unwrap();
        let b = watch.add(File::open(dir.path().join("a/b")).unwrap().as_fd()).unwrap();
        watch.place(a, watch.root(), b"a");
        watch.place(b, a, b"b");
        fs::rename(dir.path().join("a"), dir.path().join("z")).unwrap();
        fs::write(dir.path().join("z/b/x"), b"1").unwrap();
        watch.place(a, watch.root(), b"z");
        assert_eq!(watch.path(b).unwrap().to_string(), "z/b");
        assert!(drain(&mut watch).iter().any(|e| e.wd == b && e.name == b"x"));
        assert_eq!(watch.at(&RelPath::new(b"a").unwrap()), None);
        watch.place(a, b, b"loop");
        assert_eq!(watch.path(a).unwrap().to_string(), "z", "a directory is never put below itself");
        watch.handle_ignored(a);
        assert_eq!(watch.path(b), None, "a directory without a place is not taken for the root");
        watch.forget(b);
        assert_eq!(watch.len(), 1);
    }
}
