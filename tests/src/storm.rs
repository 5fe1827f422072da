//! A storm of changes: files made, renamed and removed as fast as the disk takes them, in directories that are made, moved and removed
//! meanwhile, and mail delivered into folders while those are moved.
//!
//! What each thread chooses follows from the seed. A change that meets a path another thread just moved fails and is not counted.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{Mode, OFlags, openat, renameat};

use crate::rng::Rng;

/// Threads that make, rename and remove.
const WRITERS: usize = 3;

/// Folders that mail is delivered into while they move.
const FOLDERS: usize = 6;

/// Directories the folders move between.
const PARENTS: usize = 4;

/// What was done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Done {
    pub created: usize,
    pub renamed: usize,
    pub removed: usize,
    pub directories: usize,
    pub moved: usize,
    pub delivered: usize,
}

impl std::ops::AddAssign for Done {
    fn add_assign(&mut self, other: Self) {
        self.created += other.created;
        self.renamed += other.renamed;
        self.removed += other.removed;
        self.directories += other.directories;
        self.moved += other.moved;
        self.delivered += other.delivered;
    }
}

/// Makes `files` files under `root`, about a fifth of them as mail, and all that goes with it.
pub fn run(root: &Path, files: usize, seed: u64) -> io::Result<Done> {
    let parents: Vec<PathBuf> = (0..PARENTS).map(|n| root.join(format!("moving/P{n}"))).collect();
    for parent in &parents {
        fs::create_dir_all(parent)?;
    }
    let mut homes = Vec::new();
    for n in 0..FOLDERS {
        let home = parents[n % PARENTS].join(format!("F{n}"));
        for part in ["tmp", "new", "cur"] {
            fs::create_dir_all(home.join(part))?;
        }
        homes.push(home);
    }
    let mail = files / 5;
    let share = (files - mail).div_ceil(WRITERS);
    let working = AtomicBool::new(true);
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..WRITERS)
            .map(|n| {
                let area = root.join(format!("area{n}"));
                scope.spawn(move || write(&area, share, Rng::part(seed, n as u64)))
            })
            .collect();
        let (working, parents) = (&working, &parents);
        let mover = scope.spawn(move || move_folders(parents, working, Rng::part(seed, 100)));
        let mut done = deliver(parents, mail, Rng::part(seed, 200));
        for writer in writers {
            match (&mut done, writer.join().expect("a writer panicked")) {
                (Ok(sum), Ok(part)) => *sum += part,
                (Ok(_), Err(e)) => done = Err(e),
                (Err(_), _) => {}
            }
        }
        working.store(false, Ordering::SeqCst);
        let moved = mover.join().expect("the mover panicked")?;
        done.map(|mut done| {
            done.moved += moved;
            done
        })
    })
}

/// One writer in an area of its own: nothing here may fail.
fn write(area: &Path, files: usize, mut rng: Rng) -> io::Result<Done> {
    let mut done = Done::default();
    fs::create_dir_all(area)?;
    let mut dirs = vec![area.to_owned()];
    let mut held: Vec<PathBuf> = Vec::new();
    let mut n = 0;
    while done.created < files {
        n += 1;
        match rng.below(100) {
            0..3 if dirs.len() < 200 => {
                let dir = rng.pick::<PathBuf>(&dirs).join(format!("d{n}"));
                // Made and filled at once: whoever watches has not seen it yet.
                fs::create_dir(&dir)?;
                fs::create_dir(dir.join("deeper"))?;
                let file = dir.join("deeper/first");
                fs::write(&file, rng.bytes(100))?;
                dirs.extend([dir.join("deeper"), dir]);
                held.push(file);
                done.created += 1;
                done.directories += 2;
            }
            3..5 if dirs.len() > 4 => {
                let from = dirs[1 + rng.below(dirs.len() - 1)].clone();
                let to = rng.pick::<PathBuf>(&dirs).join(format!("m{n}"));
                if !to.starts_with(&from) {
                    fs::rename(&from, &to)?;
                    for path in dirs.iter_mut().chain(&mut held) {
                        if let Ok(rest) = path.strip_prefix(&from) {
                            *path = if rest.as_os_str().is_empty() { to.clone() } else { to.join(rest) };
                        }
                    }
                    done.moved += 1;
                }
            }
            5 if dirs.len() > 60 => {
                let gone = dirs[1 + rng.below(dirs.len() - 1)].clone();
                fs::remove_dir_all(&gone)?;
                dirs.retain(|d| !d.starts_with(&gone));
                let before = held.len();
                held.retain(|f| !f.starts_with(&gone));
                done.removed += before - held.len();
            }
            6..31 if !held.is_empty() => {
                let at = rng.below(held.len());
                let to = rng.pick::<PathBuf>(&dirs).join(format!("r{n}"));
                fs::rename(&held[at], &to)?;
                held[at] = to;
                done.renamed += 1;
            }
            31..51 if !held.is_empty() => {
                let gone = held.swap_remove(rng.below(held.len()));
                fs::remove_file(gone)?;
                done.removed += 1;
            }
            51..55 if !held.is_empty() => {
                // An old name takes new content: replaced by rename, as editors do.
                let over = rng.pick::<PathBuf>(&held).clone();
                let fresh = area.join("replacement");
                fs::write(&fresh, rng.bytes(300))?;
                fs::rename(&fresh, over)?;
                done.renamed += 1;
                done.created += 1;
            }
            _ => {
                let file = rng.pick::<PathBuf>(&dirs).join(format!("f{n}"));
                let size = rng.below(2_000);
                fs::write(&file, rng.bytes(size))?;
                held.push(file);
                done.created += 1;
            }
        }
    }
    Ok(done)
}

/// Delivers as a mail server does, holding each folder by descriptor, so that mail goes on arriving while the folder moves.
fn deliver(parents: &[PathBuf], messages: usize, mut rng: Rng) -> io::Result<Done> {
    let mut done = Done::default();
    while done.delivered < messages {
        let folder = format!("F{}", rng.below(FOLDERS));
        let Some(dir) = parents.iter().find_map(|p| open_dir(&p.join(&folder))) else { continue };
        for _ in 0..5 {
            let n = done.delivered;
            let (tmp, new) = (format!("tmp/{n}.M1.load"), format!("new/{n}.M1.load"));
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            let file = openat(&dir, &tmp, flags, Mode::from_raw_mode(0o600))?;
            let size = 200 + rng.below(3_000);
            io::Write::write_all(&mut fs::File::from(file), &rng.bytes(size))?;
            renameat(&dir, &tmp, &dir, &new)?;
            done.delivered += 1;
            done.created += 1;
            if rng.chance(40) {
                renameat(&dir, &new, &dir, format!("cur/{n}.M1.load:2,S"))?;
                done.renamed += 1;
            }
        }
    }
    Ok(done)
}

fn open_dir(path: &Path) -> Option<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).ok()
}

fn move_folders(parents: &[PathBuf], working: &AtomicBool, mut rng: Rng) -> io::Result<usize> {
    let mut moved = 0;
    while working.load(Ordering::SeqCst) {
        let folder = format!("F{}", rng.below(FOLDERS));
        let to = rng.pick::<PathBuf>(parents).join(&folder);
        if let Some(from) = parents.iter().map(|p| p.join(&folder)).find(|p| p.exists())
            && from != to
        {
            fs::rename(from, to)?;
            moved += 1;
        }
        // Leaves the disk to the writers most of the time.
        crate::gate::nap(std::time::Duration::from_micros(500));
    }
    Ok(moved)
}
