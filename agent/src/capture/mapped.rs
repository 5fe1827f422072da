//! Files that some process has mapped for writing: a store into a mapping raises no event, and a second one to a dirty page moves no timestamp either.
//!
//! A thread of its own reads `/proc/*/maps` (proc(5)), at most every second and for at most a fiftieth of the time. What it finds is synced before it is compared (fdatasync write-protects the pages again, so that the next store
//! moves the ctime, as was seen on ext4 and XFS; tmpfs has no write-back, so nothing helps there). Sees the mappings of all processes as root, else its own user's.
//! A mapping made since the last look is found by the next: stores through mappings are outside of what a fence promises.

use std::collections::BTreeSet;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use twinbox_protocol::path::RelPath;

use super::messages::{CaptureHandle, Command};
use crate::tree::Root;

/// Between two looks.
const EVERY: Duration = Duration::from_secs(1);
/// A look may take this part of the time.
const SHARE: u32 = 50;
/// Files followed at most; more are a sign that the store is no mail store.
const FILES_MAX: usize = 10_000;

/// Starts the thread; it ends when the sender is dropped.
pub(super) fn start(root: Arc<Root>, place: PathBuf, reply: CaptureHandle) -> Sender<()> {
    let (alive, ended) = channel();
    std::thread::spawn(move || run(&root, &place, &reply, &ended));
    alive
}

fn run(root: &Root, place: &std::path::Path, reply: &CaptureHandle, ended: &Receiver<()>) {
    let place = std::fs::canonicalize(place).unwrap_or_else(|_| place.to_owned());
    let mut known = BTreeSet::new();
    let mut pause = EVERY;
    while ended.recv_timeout(pause) == Err(RecvTimeoutError::Timeout) {
        let began = Instant::now();
        let found = look(place.as_os_str().as_bytes());
        pause = EVERY.max(began.elapsed() * SHARE);
        for path in &found {
            sync(root, path);
        }
        if (!found.is_empty() || !known.is_empty()) && !reply.send(Command::Mapped(found.clone())) {
            return;
        }
        known = found;
    }
}

/// Makes the next store into a mapping of the file move its ctime.
pub(super) fn sync(root: &Root, path: &RelPath) {
    if let Ok(file) = root.file(path) {
        let _ = rustix::fs::fdatasync(&file); // What cannot be written back is somebody else's error; the file is compared all the same.
    }
}

/// Files below `place` that any process we may look at has mapped shared and writable.
fn look(place: &[u8]) -> BTreeSet<RelPath> {
    let mut found = BTreeSet::new();
    let Ok(processes) = std::fs::read_dir("/proc") else { return found };
    for process in processes.flatten() {
        if !process.file_name().as_bytes().first().is_some_and(u8::is_ascii_digit) {
            continue;
        }
        if let Ok(maps) = std::fs::read(process.path().join("maps")) {
            found.extend(maps.split(|b| *b == b'\n').filter_map(|line| mapped(line, place)));
        }
        if found.len() > FILES_MAX {
            break;
        }
    }
    found
}

/// The file of a line of `maps`, when it is a shared writable mapping below `place`.
fn mapped(line: &[u8], place: &[u8]) -> Option<RelPath> {
    // address perms offset dev inode pathname: five fields, then blanks, then the rest of the line.
    let mut rest = line;
    let mut field = || {
        let end = rest.iter().position(|b| *b == b' ')?;
        let (field, left) = rest.split_at(end);
        rest = left.trim_ascii_start();
        Some(field)
    };
    let (_, perms) = (field()?, field()?);
    if perms.get(1) != Some(&b'w') || perms.get(3) != Some(&b's') {
        return None;
    }
    let _ = (field()?, field()?, field()?);
    let path = unescape(rest);
    let below = path.strip_prefix(place)?.strip_prefix(b"/")?;
    RelPath::new(below).ok()
}

/// A newline in a name is written as `\012`.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut at = 0;
    while at < text.len() {
        if text[at..].starts_with(b"\\012") {
            out.push(b'\n');
            at += 4;
        } else {
            out.push(text[at]);
            at += 1;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_writable_mappings_below_the_root_are_found() {
        let of = |line: &str| mapped(line.as_bytes(), b"/srv/mail").map(|path| path.to_string());
        assert_eq!(of("7f0a3000-7f0a5000 rw-s 00000000 fd:01 131 /srv/mail/u/a b.db"), Some("u/a b.db".into()));
        assert_eq!(of("7f0a3000-7f0a5000 rw-s 00000000 fd:01 131                  /srv/mail/u/x"), Some("u/x".into()));
        assert_eq!(of("7f0a3000-7f0a5000 rw-p 00000000 fd:01 131 /srv/mail/u/x"), None);
        assert_eq!(of("7f0a3000-7f0a5000 r--s 00000000 fd:01 131 /srv/mail/u/x"), None);
        assert_eq!(of("7f0a3000-7f0a5000 rw-s 00000000 fd:01 131 /srv/mailbox/x"), None);
        assert_eq!(of("7f0a3000-7f0a5000 rw-s 00000000 00:01 9 /dev/zero (deleted)"), None);
        assert_eq!(of("7f0a3000-7f0a5000 rw-s 00000000 00:00 0"), None);
        assert_eq!(of("7f0a3000-7f0a5000 rw-s 00000000 fd:01 1 /srv/mail/a\\012b"), Some("a\\nb".into()));
        assert_eq!(of(""), None);
    }
}
