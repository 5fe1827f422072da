//! Dovecot's names of a Maildir folder's keywords, of which a message's name has only letters.
//!
//! File `dovecot-keywords`: lines `NUMBER NAME`, letter `a` is number 0; changed under `dovecot-keywords.lock`, which is then given its name (Dovecot 2.3, `maildir-keywords.c`).

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::fs::{self as rfs, Mode, OFlags};
use rustix::io::Errno;
use twinbox_protocol::path::RelPath;
use twinbox_protocol::rejoin::Flags;

use crate::tree::Root;

const FILE: &[u8] = b"dovecot-keywords";
const LOCK: &[u8] = b"dovecot-keywords.lock";
/// Letters there are.
const MOST: usize = 26;
/// A file of names is not larger.
const BYTES_MAX: u64 = 64 * 1024;
/// Folders whose names are kept.
const FOLDERS_MAX: usize = 1000;
/// A lock that is older than so many seconds is nobody's any more.
const STALE: i64 = 60;
/// Dovecot holds its lock for less.
const LOCKED_FOR: Duration = Duration::from_secs(10);

/// Names by folder, as far as they were asked for.
#[derive(Default)]
pub(super) struct Keywords(HashMap<RelPath, Vec<Option<String>>>);

/// The file's bytes; nothing where there is none.
fn bytes(root: &Root, folder: &RelPath) -> Result<Vec<u8>, Errno> {
    let path = folder.join(FILE).ok_or(Errno::NAMETOOLONG)?;
    let file = match root.file(&path) {
        Ok(file) => file,
        Err(Errno::NOENT) => return Ok(vec![]),
        Err(error) => return Err(error),
    };
    let mut text = vec![];
    let read = File::from(file).take(BYTES_MAX + 1).read_to_end(&mut text);
    read.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    if text.len() as u64 > BYTES_MAX { Err(Errno::FBIG) } else { Ok(text) }
}

/// Names by number; what is no line of this kind is left alone.
fn names(text: &[u8]) -> Vec<Option<String>> {
    let mut names = vec![];
    for line in text.split(|byte| *byte == b'\n') {
        let Some((number, name)) = std::str::from_utf8(line).ok().and_then(|line| line.split_once(' ')) else { continue };
        let Some(number) = number.parse::<usize>().ok().filter(|number| *number < MOST) else { continue };
        if names.len() <= number {
            names.resize(number + 1, None);
        }
        names[number] = Some(name.to_owned());
    }
    names
}

impl Keywords {
    /// The name of a letter in a folder.
    pub(super) fn name(&mut self, root: &Root, folder: &RelPath, letter: u8) -> Option<String> {
        if self.0.len() >= FOLDERS_MAX {
            self.0.clear();
        }
        let names = self.0.entry(folder.clone()).or_insert_with(|| bytes(root, folder).map_or_else(|_| vec![], |text| names(&text)));
        names.get(usize::from(letter.checked_sub(b'a')?)).cloned().flatten()
    }

    /// The letters of these flags in a folder; keywords it does not know are added. Those that have no room, or cannot be written down, are left out: the message matters more.
    pub(super) fn letters(&mut self, root: &Root, folder: &RelPath, flags: &Flags) -> Vec<u8> {
        let capital = |flag: &&String| flag.len() == 1 && flag.bytes().all(|byte| byte.is_ascii_uppercase());
        let mut letters: Vec<u8> = flags.iter().filter(capital).flat_map(|flag| flag.bytes()).collect();
        let wanted: Vec<&String> = flags.iter().filter(|flag| !capital(flag)).collect();
        if wanted.is_empty() {
            return letters;
        }
        let known = bytes(root, folder).and_then(|text| {
            let known = names(&text);
            if wanted.iter().all(|name| known.contains(&Some((*name).clone()))) { Ok(known) } else { add(root, folder, &wanted) }
        });
        let known = match known {
            Ok(known) => known,
            Err(error) => {
                tracing::warn!(folder = %folder, error = %std::io::Error::from(error), "keywords of a message cannot be written down: they are left out");
                return letters;
            }
        };
        let of = |name: &&&String| known.iter().position(|known| known.as_ref() == Some(**name));
        letters.extend(wanted.iter().filter_map(|name| of(&name)).map(|number| b'a' + number as u8));
        self.0.insert(folder.clone(), known);
        letters.sort_unstable();
        letters
    }
}

/// Another process's lock file: there is nothing to wait on.
#[allow(clippy::disallowed_methods)]
fn pause() {
    std::thread::sleep(Duration::from_millis(20));
}

/// Whether whoever made the lock has died over it.
fn is_left(dir: &OwnedFd) -> bool {
    let Ok(stat) = rfs::statat(dir, LOCK, rfs::AtFlags::SYMLINK_NOFOLLOW) else { return false };
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    now.tv_sec - stat.st_mtime > STALE
}

/// Adds names under Dovecot's lock.
fn add(root: &Root, folder: &RelPath, wanted: &[&String]) -> Result<Vec<Option<String>>, Errno> {
    let dir = root.dir(folder.as_bytes())?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let deadline = Instant::now() + LOCKED_FOR;
    let lock = loop {
        match rfs::openat(&dir, LOCK, flags, Mode::from_raw_mode(0o600)) {
            Err(Errno::EXIST) if is_left(&dir) => {
                let _ = rfs::unlinkat(&dir, LOCK, rfs::AtFlags::empty()); // Somebody else may have done that.
            }
            Err(Errno::EXIST) if Instant::now() < deadline => pause(),
            other => break other?,
        }
    };
    let done = (|| {
        // Once more, now that nobody else changes it.
        let mut text = bytes(root, folder)?;
        let mut known = names(&text);
        for name in wanted {
            let fits = !name.is_empty() && !name.contains(['\n', '\r', '\0']);
            if fits && !known.contains(&Some((*name).clone())) {
                let free = known.iter().position(Option::is_none).or_else(|| (known.len() < MOST).then_some(known.len()));
                let Some(free) = free else { continue };
                if free == known.len() {
                    known.push(None);
                }
                known[free] = Some((*name).clone());
                if !text.is_empty() && !text.ends_with(b"\n") {
                    text.push(b'\n');
                }
                text.extend(format!("{free} {name}\n").bytes());
            }
        }
        let owner = rfs::fstat(&dir)?;
        let mode = folder.join(FILE).and_then(|path| root.stat(&path).ok().flatten()).map_or(0o600, |stat| stat.st_mode & 0o777);
        let _ = rfs::fchown(&lock, Some(rfs::Uid::from_raw(owner.st_uid)), Some(rfs::Gid::from_raw(owner.st_gid))); // An ordinary user's own already.
        rfs::fchmod(&lock, Mode::from_raw_mode(mode))?;
        let mut file = File::from(lock);
        file.write_all(&text).and_then(|()| file.sync_all()).map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
        rfs::renameat(&dir, LOCK, &dir, FILE)?;
        rfs::fsync(root.dir_for_reading(folder)?.as_fd())?;
        Ok(known)
    })();
    if done.is_err() {
        let _ = rfs::unlinkat(&dir, LOCK, rfs::AtFlags::empty());
    }
    done
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_are_a_folders_own() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::open(dir.path()).unwrap();
        let folder = RelPath::new(b"M").unwrap();
        std::fs::create_dir(dir.path().join("M")).unwrap();
        std::fs::write(dir.path().join("M/dovecot-keywords"), "0 $Label1\n2 urgent\nnonsense\n99 far\n").unwrap();
        let mut keywords = Keywords::default();
        let names = |keywords: &mut Keywords| b"abcd".map(|letter| keywords.name(&root, &folder, letter));
        assert_eq!(names(&mut keywords), [Some("$Label1".into()), None, Some("urgent".into()), None]);
        let flags: Flags = ["S", "urgent", "new one"].map(String::from).into();
        assert_eq!(keywords.letters(&root, &folder, &flags), b"Sbc");
        let text = std::fs::read_to_string(dir.path().join("M/dovecot-keywords")).unwrap();
        assert_eq!(text, "0 $Label1\n2 urgent\nnonsense\n99 far\n1 new one\n", "what was there stays");
        assert!(!dir.path().join("M/dovecot-keywords.lock").exists());
        // All letters are taken: the flag that has none is left out, the others are not.
        let many: Flags = (0..30).map(|n| format!("k{n:02}")).chain(["F".into()]).collect();
        assert_eq!(keywords.letters(&root, &folder, &many).len(), 1 + 23);
        // A file that cannot be read is not taken for an empty one.
        std::fs::remove_file(dir.path().join("M/dovecot-keywords")).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("M/dovecot-keywords")).unwrap();
        assert_eq!(keywords.letters(&root, &folder, &flags), b"S");
        // A lock that somebody died over.
        std::fs::remove_file(dir.path().join("M/dovecot-keywords")).unwrap();
        let lock = std::fs::File::create(dir.path().join("M/dovecot-keywords.lock")).unwrap();
        lock.set_modified(std::time::SystemTime::now() - Duration::from_secs(120)).unwrap();
        assert_eq!(keywords.letters(&root, &folder, &flags), b"Sab");
    }
}
