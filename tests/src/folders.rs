//! Folders that come, move, go and come again under the same few names, with messages in them: what Dovecot's maildir does, without Dovecot, as
//! fast as the disk takes it. Each thread has its own mailboxes, so what it does follows from the seed.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::rng::Rng;

/// Names a folder can have.
const NAMES: usize = 5;
/// Threads.
const THREADS: usize = 2;
/// Mailboxes each thread has.
const MAILBOXES: usize = 5;

/// Makes the mailboxes.
///
/// # Errors
/// The disk's.
pub fn make(root: &Path) -> io::Result<()> {
    for n in 0..THREADS * MAILBOXES {
        parts(&maildir(root, n))?;
    }
    Ok(())
}

/// Goes on until `stop`; gives how many things were done. `round` distinguishes runs over one tree.
///
/// # Errors
/// The disk's.
pub fn run(root: &Path, seed: u64, round: u64, stop: &AtomicBool) -> io::Result<u64> {
    let done = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| {
                let mut one = User { rng: Rng::part(seed, round * 16 + thread as u64), maildir: PathBuf::new(), name: 0, round };
                let done = &done;
                scope.spawn(move || {
                    while !stop.load(Ordering::SeqCst) {
                        one.maildir = maildir(root, thread * MAILBOXES + one.rng.below(MAILBOXES));
                        for _ in 0..one.rng.below(12) {
                            one.step()?;
                            done.fetch_add(1, Ordering::SeqCst);
                        }
                    }
                    Ok::<_, io::Error>(())
                })
            })
            .collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("a thread panicked"))
    })?;
    Ok(done.into_inner())
}

fn maildir(root: &Path, n: usize) -> PathBuf {
    root.join(format!("user{n:02}/Maildir"))
}

fn parts(dir: &Path) -> io::Result<()> {
    ["cur", "new", "tmp"].into_iter().try_for_each(|part| fs::create_dir_all(dir.join(part)))
}

struct User {
    rng: Rng,
    maildir: PathBuf,
    name: u64,
    round: u64,
}

impl User {
    fn step(&mut self) -> io::Result<()> {
        let folder = self.folder();
        match self.rng.below(100) {
            0..35 => self.deliver(&folder),
            35..50 => self.mark(&folder),
            50..60 => {
                let to = self.folder();
                self.copy(&folder, &to)
            }
            60..70 => {
                let to = self.folder();
                self.shift(&folder, &to)
            }
            70..76 => self.expunge(&folder),
            76..86 => {
                let fresh = self.maildir.join(format!(".F{}", self.rng.below(NAMES)));
                if fresh.exists() {
                    return Ok(());
                }
                parts(&fresh)?;
                self.list(&fresh)
            }
            86..94 if folder != self.maildir => {
                let fresh = self.maildir.join(format!(".F{}", self.rng.below(NAMES)));
                if fresh.exists() { Ok(()) } else { fs::rename(folder, fresh) }
            }
            94.. if folder != self.maildir => {
                let trash = self.maildir.join("..DOVECOT-TRASHED");
                fs::rename(folder, &trash)?;
                fs::remove_dir_all(trash)
            }
            _ => self.list(&folder),
        }
    }

    /// The inbox or one of the folders.
    fn folder(&mut self) -> PathBuf {
        let there: Vec<PathBuf> = (0..NAMES).map(|n| self.maildir.join(format!(".F{n}"))).filter(|dir| dir.exists()).collect();
        if there.is_empty() || self.rng.chance(40) { self.maildir.clone() } else { self.rng.pick(&there).clone() }
    }

    fn fresh(&mut self) -> String {
        self.name += 1;
        format!("{}.M{}R{}.host", 1_700_000_000 + self.name, self.rng.next_u64() % 1_000_000, self.round)
    }

    fn deliver(&mut self, folder: &Path) -> io::Result<()> {
        let (name, size) = (self.fresh(), self.rng.below(3_000));
        let tmp = folder.join("tmp").join(&name);
        fs::write(&tmp, self.rng.bytes(size))?;
        fs::rename(tmp, folder.join("new").join(name))
    }

    fn mark(&mut self, folder: &Path) -> io::Result<()> {
        let Some(from) = self.message(folder)? else { return Ok(()) };
        let name = from.file_name().expect("a message has a name").to_string_lossy().into_owned();
        let base = name.split(':').next().expect("a first part");
        let flags = *self.rng.pick(&["", "S", "FS", "RS"]);
        fs::rename(&from, folder.join("cur").join(format!("{base}:2,{flags}")))?;
        self.list(folder)
    }

    fn copy(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        let Some(from) = self.message(from)? else { return Ok(()) };
        let name = self.fresh();
        let tmp = to.join("tmp").join(&name);
        fs::hard_link(from, &tmp)?;
        fs::rename(tmp, to.join("cur").join(format!("{name}:2,")))?;
        self.list(to)
    }

    fn shift(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        let Some(from) = self.message(from)? else { return Ok(()) };
        let name = self.fresh();
        fs::rename(from, to.join("cur").join(format!("{name}:2,S")))?;
        self.list(to)
    }

    fn expunge(&mut self, folder: &Path) -> io::Result<()> {
        self.message(folder)?.map_or(Ok(()), fs::remove_file)
    }

    /// The list of messages that the server keeps.
    fn list(&mut self, folder: &Path) -> io::Result<()> {
        let tmp = folder.join("dovecot-uidlist.tmp");
        let size = 50 + self.rng.below(400);
        fs::write(&tmp, self.rng.bytes(size))?;
        fs::rename(tmp, folder.join("dovecot-uidlist"))
    }

    fn message(&mut self, folder: &Path) -> io::Result<Option<PathBuf>> {
        let mut all = Vec::new();
        for part in ["new", "cur"] {
            for item in fs::read_dir(folder.join(part))? {
                all.push(item?.path());
            }
        }
        all.sort();
        Ok((!all.is_empty()).then(|| self.rng.pick(&all).clone()))
    }
}
