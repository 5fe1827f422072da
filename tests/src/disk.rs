//! File systems in files: made, mounted through a loop device, copied in one instant as a power cut would leave them; unmounted on drop.
//!
//! A copy "in one instant" needs an image that lies on a file system with reflinks: [`Disk::vault`]. The copy holds what the device had been
//! given at that moment, and nothing of what the mounted file system still had in memory.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A mounted file system in a file.
#[derive(Debug)]
pub struct Disk {
    image: PathBuf,
    mount: PathBuf,
}

/// What a disk is formatted with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// ext4, as made by default.
    Ext4,
    /// XFS, with reflinks.
    Xfs,
}

impl Format {
    /// As `mount` knows it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
        }
    }
}

impl Disk {
    /// A new file system of `mib` MiB in `image`, mounted at `mount` (created).
    #[must_use]
    pub fn new(format: Format, image: &Path, mib: u64, mount: &Path) -> Self {
        let file = fs::File::create(image).expect("make an image");
        file.set_len(mib << 20).expect("size an image");
        drop(file);
        let image_text = image.display().to_string();
        match format {
            Format::Ext4 => run("mkfs.ext4", &["-q", "-F", &image_text]),
            Format::Xfs => run("mkfs.xfs", &["-q", "-f", &image_text]),
        };
        Self::mount(format, image, mount)
    }

    /// A place whose files can be copied in one instant.
    #[must_use]
    pub fn vault(dir: &Path, mib: u64) -> Self {
        Self::new(Format::Xfs, &dir.join("vault.img"), mib, &dir.join("vault"))
    }

    /// Mounts an image that has a file system. Its journal is replayed, as at a boot.
    #[must_use]
    pub fn mount(format: Format, image: &Path, mount: &Path) -> Self {
        fs::create_dir_all(mount).expect("make a mount point");
        // A copy bears the name of what it was copied from.
        let options = if format == Format::Xfs { "loop,nouuid" } else { "loop" };
        run("mount", &["-t", format.name(), "-o", options, &image.display().to_string(), &mount.display().to_string()]);
        Self { image: image.to_owned(), mount: mount.to_owned() }
    }

    /// Where it is mounted.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.mount
    }

    /// What its device holds at this instant, as another image.
    pub fn cut(&self, to: &Path) {
        run("cp", &["--reflink=always", &self.image.display().to_string(), &to.display().to_string()]);
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Mounted by `mount -o loop`: the device goes with the mount.
        let mount = self.mount.display().to_string();
        let gone = |args: &[&str]| Command::new("umount").args(args).output().is_ok_and(|o| o.status.success());
        if !gone(&[&mount]) && !gone(&["-l", &mount]) {
            eprintln!("could not unmount {mount}");
        }
        let _ = fs::remove_file(&self.image);
    }
}

fn run(program: &str, args: &[&str]) -> Output {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let out = Command::new(program).args(args).env("PATH", path).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    assert!(out.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    out
}
