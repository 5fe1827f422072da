//! A disk whose power can be cut: an ext4 image on a loop device. The cut copies the image while it is mounted, so that only what had reached the "platter" is in the copy, and mounts the copy in its place.
//!
//! What is in the page cache and in the open journal transaction is gone, as after a power cut. Nothing may be writing at that moment: the copy takes a while.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

fn must(program: &str, args: &[&str]) {
    let ended = Command::new(program).args(args).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    assert!(ended.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&ended.stderr));
}

fn text(path: &Path) -> &str {
    path.to_str().expect("scratch paths are text")
}

/// See the module's text. Unmounted when dropped.
#[derive(Debug)]
pub struct Disk {
    base: PathBuf,
    at: PathBuf,
    cuts: u32,
}

impl Disk {
    /// Makes a disk of so many MiB in `base` (created) and mounts it at `base/at`.
    #[must_use]
    pub fn new(base: &Path, mib: u64) -> Self {
        let at = base.join("at");
        fs::create_dir_all(&at).expect("mount point");
        let disk = Disk { base: base.into(), at, cuts: 0 };
        let image = disk.image();
        File::create(&image).and_then(|file| file.set_len(mib << 20)).expect("image");
        must("mkfs.ext4", &["-q", text(&image)]);
        disk.mount();
        disk
    }

    fn image(&self) -> PathBuf {
        self.base.join(format!("disk-{}.img", self.cuts))
    }

    fn mount(&self) {
        // The journal is not committed by a timer: only syncs of the programs under test move anything to the disk.
        must("mount", &["-o", "loop,commit=300", text(&self.image()), text(&self.at)]);
    }

    /// Where it is mounted.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.at
    }

    /// Cuts the power and boots again. No program may have a file open on it.
    pub fn cut(&mut self) {
        self.swap(&[]);
    }

    /// Mounts in its place what the disk has, without a boot and under the programs that use it: they keep what was mounted before.
    pub fn mount_anew(&mut self) {
        self.swap(&["-l"]);
    }

    fn swap(&mut self, how: &[&str]) {
        let before = self.image();
        self.cuts += 1;
        must("cp", &["--sparse=always", text(&before), text(&self.image())]);
        must("umount", &[how, &[text(&self.at)]].concat());
        let _ = fs::remove_file(before);
        self.mount();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let done = Command::new("umount").args(["-l", text(&self.at)]).status();
        if !done.is_ok_and(|status| status.success()) {
            eprintln!("{} stays mounted", self.at.display());
        }
    }
}
