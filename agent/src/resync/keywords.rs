//! Dovecot's names of a Maildir folder's keywords, of which a message's name has only letters.
//!
//! File `dovecot-keywords`: lines `NUMBER NAME`, letter `a` is number 0; changed under `dovecot-keywords.lock`, which is then given its name (Dovecot 2.3, `maildir-keywords.c`).

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
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
/// Dovecot holds its lock for less.
const LOCKED_FOR: Duration = Duration::from_secs(10);

/// Names by folder, as far as they were asked for.
#[derive(Default)]
pub(super) struct Keywords(HashMap<RelPath, Vec<Option<String>>>);

fn read(root: &Root, folder: &RelPath) -> Vec<Option<String>> {
    let mut names = vec![];
    let Some(file) = folder.join(FILE).and_then(|path| root.file(&path).ok()) else { return names };
    let mut text = vec![];
    let _ = File::from(file).take(BYTES_MAX).read_to_end(&mut text); // What can be read of it.
    for line in String::from_utf8_lossy(&text).lines() {
        let Some((number, name)) = line.split_once(' ') else { continue };
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
        let names = self.0.entry(folder.clone()).or_insert_with(|| read(root, folder));
        names.get(usize::from(letter.checked_sub(b'a')?)).cloned().flatten()
    }

    /// The letters of these flags in a folder; keywords it does not know are added. Those that have no room are left out.
    pub(super) fn letters(&mut self, root: &Root, folder: &RelPath, flags: &Flags) -> Result<Vec<u8>, Errno> {
        let capital = |flag: &&String| flag.len() == 1 && flag.bytes().all(|byte| byte.is_ascii_uppercase());
        let mut letters: Vec<u8> = flags.iter().filter(capital).flat_map(|flag| flag.bytes()).collect();
        let wanted: Vec<&String> = flags.iter().filter(|flag| !capital(flag)).collect();
        if wanted.is_empty() {
            return Ok(letters);
        }
        let mut names = read(root, folder);
        if wanted.iter().any(|name| !names.contains(&Some((*name).clone()))) {
            names = add(root, folder, &wanted)?;
        }
        let of = |name: &&&String| names.iter().position(|known| known.as_ref() == Some(**name));
        letters.extend(wanted.iter().filter_map(|name| of(&name)).map(|number| b'a' + number as u8));
        self.0.insert(folder.clone(), names);
        letters.sort_unstable();
        Ok(letters)
    }
}

/// Another process's lock file: there is nothing to wait on.
#[allow(clippy::disallowed_methods)]
fn pause() {
    std::thread::sleep(Duration::from_millis(20));
}

/// Adds names under Dovecot's lock.
fn add(root: &Root, folder: &RelPath, wanted: &[&String]) -> Result<Vec<Option<String>>, Errno> {
    let dir = root.dir(folder.as_bytes())?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let deadline = Instant::now() + LOCKED_FOR;
    let lock = loop {
        match rfs::openat(&dir, LOCK, flags, Mode::from_raw_mode(0o600)) {
            Err(Errno::EXIST) if Instant::now() < deadline => pause(),
            other => break other?,
        }
    };
    let done = (|| {
        // Once more, now that nobody else changes it.
        let mut names = read(root, folder);
        for name in wanted {
            let fits = !name.is_empty() && !name.contains(['\n', '\r', '\0']);
            if fits && !names.contains(&Some((*name).clone())) {
                match names.iter().position(Option::is_none) {
                    Some(free) => names[free] = Some((*name).clone()),
                    None if names.len() < MOST => names.push(Some((*name).clone())),
                    None => {}
                }
            }
        }
        let text: String = names.iter().enumerate().filter_map(|(n, name)| Some(format!("{n} {}\n", name.as_ref()?))).collect();
        let owner = rfs::fstat(&dir)?;
        let mode = folder.join(FILE).and_then(|path| root.stat(&path).ok().flatten()).map_or(0o600, |stat| stat.st_mode & 0o777);
        let _ = rfs::fchown(&lock, Some(rfs::Uid::from_raw(owner.st_uid)), Some(rfs::Gid::from_raw(owner.st_gid))); // An ordinary user's own already.
        rfs::fchmod(&lock, Mode::from_raw_mode(mode))?;
        let mut file = File::from(lock);
        file.write_all(text.as_bytes())
            .and_then(|()| file.sync_all())
            .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
        rfs::renameat(&dir, LOCK, &dir, FILE)?;
        rfs::fsync(root.dir_for_reading(folder)?.as_fd())?;
        Ok(names)
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
        assert_eq!(keywords.letters(&root, &folder, &flags).unwrap(), b"Sbc");
        assert_eq!(std::fs::read_to_string(dir.path().join("M/dovecot-keywords")).unwrap(), "0 $Label1\n1 new one\n2 urgent\n");
        assert!(!dir.path().join("M/dovecot-keywords.lock").exists());
        // All letters are taken: the flag that has none is left out, the others are not.
        let many: Flags = (0..30).map(|n| format!("k{n:02}")).chain(["F".into()]).collect();
        assert_eq!(keywords.letters(&root, &folder, &many).unwrap().len(), 1 + 23);
    }
}
