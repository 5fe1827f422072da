//! A real file system that loses power: what was not synced is gone when it comes up.

use std::ffi::OsStr;
use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use tempfile::TempDir;

const UNMOUNTED_WITHIN: Duration = Duration::from_secs(60);

/// A file system in a file.
pub(super) struct Disk {
    dir: TempDir,
    kind: &'static str,
}

/// What it printed.
fn system(program: &str, words: &[&OsStr]) -> Result<String, String> {
    let done = Command::new(program).args(words).output().map_err(|error| format!("{program}: {error}"))?;
    if done.status.success() {
        Ok(String::from_utf8_lossy(&done.stdout).into_owned())
    } else {
        Err(format!("{program}: {}", String::from_utf8_lossy(&done.stderr)))
    }
}

impl Disk {
    pub(super) fn new(kind: &'static str) -> Result<Disk, String> {
        let memory = Path::new("/dev/shm");
        let dir = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.map_err(|e| e.to_string())?;
        let disk = Disk { dir, kind };
        fs::create_dir(disk.path()).map_err(|e| e.to_string())?;
        let image = disk.image();
        fs::File::create(&image).and_then(|file| file.set_len(512 << 20)).map_err(|e| e.to_string())?;
        let force = if kind == "xfs" { "-f" } else { "-F" };
        system(&format!("mkfs.{kind}"), &["-q".as_ref(), force.as_ref(), image.as_os_str()])?;
        disk.mount()?;
        Ok(disk)
    }

    pub(super) fn path(&self) -> PathBuf {
        self.dir.path().join("disk")
    }

    fn image(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    /// On a loop device of its own each time: of a process that runs in another mount namespace what had no power before is still mounted there, and `mount -o loop` would take the same device.
    fn mount(&self) -> Result<(), String> {
        let device = system("losetup", &["--find".as_ref(), "--show".as_ref(), self.image().as_os_str()])?;
        let (device, options) = (OsStr::new(device.trim()), if self.kind == "xfs" { "nouuid" } else { "defaults" });
        let mounted = system("mount", &["-o".as_ref(), options.as_ref(), device, self.path().as_os_str()]);
        // Goes when it is unmounted.
        system("losetup", &["--detach".as_ref(), device])?;
        mounted.map(drop)
    }

    /// From here on nothing reaches the disk, and everything fails.
    pub(super) fn lose_power(&self) {
        crate::sys::lose_power(fs::File::open(self.path()).unwrap().as_fd()).unwrap();
    }

    /// The machine starts.
    pub(super) fn come_up(&self) {
        let end = Instant::now() + UNMOUNTED_WITHIN;
        // Threads of the agent that died end a moment later.
        while let Err(error) = system("umount", &[self.path().as_os_str()]) {
            assert!(Instant::now() < end, "{error}");
            std::thread::yield_now();
        }
        self.mount().unwrap();
    }

    pub(super) fn sync(&self) {
        rustix::fs::syncfs(fs::File::open(self.path()).unwrap()).unwrap();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = system("umount", &["-l".as_ref(), self.path().as_os_str()]);
    }
}
