//! Where one contender meets one workload: two network namespaces with a cable, a control group at each end, a store and a replica.

use std::ffi::OsString;
use std::fs::{self, File};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use tempfile::TempDir;
use twinbox_tests::gate::nap;
use twinbox_tests::netns::Cable;
use twinbox_tests::slow::Line;

use super::group::Group;

/// How often memory is looked at.
const LOOK: Duration = Duration::from_millis(50);

/// One of the two machines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Where the store is.
    Primary,
    /// Where the replica is.
    Standby,
}

/// See the module's text.
#[derive(Debug)]
pub struct Arena {
    /// Killed before what they work on goes away.
    groups: [Group; 2],
    /// The cable between the two.
    pub cable: Cable,
    /// The store.
    pub source: PathBuf,
    /// Its copy, empty at first.
    pub replica: PathBuf,
    dir: TempDir,
}

/// What something has cost.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Cost {
    /// Bytes on the cable, both ways, with every header.
    pub wire: u64,
    /// CPU time of the primary's and the standby's processes.
    pub cpu: [Duration; 2],
    /// Their resident memory at its highest, in bytes.
    pub peak: [u64; 2],
}

impl Arena {
    /// Makes all of it (root), below `base`; joined by a cable, or by a long line.
    ///
    /// # Errors
    /// Not allowed, or the disk's.
    pub fn new(base: &Path, line: Option<Line>) -> anyhow::Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = tempfile::Builder::new().prefix("twinbox-compare-").tempdir_in(base)?;
        let (source, replica) = (dir.path().join("source"), dir.path().join("replica"));
        fs::create_dir(&source)?;
        fs::create_dir(&replica)?;
        let group = |end: &str| Group::new(&format!("twinbox-compare-{}-{n}-{end}", std::process::id()));
        let cable = line.map_or_else(Cable::new, Cable::long);
        Ok(Self { groups: [group("a")?, group("b")?], cable, source, replica, dir })
    }

    /// A directory for a contender's own files.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The words that run a command at one end, counted.
    #[must_use]
    pub fn prefix(&self, end: End) -> Vec<OsString> {
        let namespace = match end {
            End::Primary => &self.cable.a,
            End::Standby => &self.cable.b,
        };
        [self.groups[end as usize].prefix(), namespace.prefix()].concat()
    }

    /// A command at one end; what it says goes to `NAME.log`.
    ///
    /// # Errors
    /// The log cannot be written.
    pub fn command(&self, end: End, name: &str, words: &[OsString]) -> anyhow::Result<Command> {
        let all: Vec<OsString> = self.prefix(end).into_iter().chain(words.iter().cloned()).collect();
        let log = File::options().create(true).append(true).open(self.dir().join(format!("{name}.log")))?;
        let mut command = Command::new(&all[0]);
        command.args(&all[1..]).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).env("HOME", self.dir());
        Ok(command)
    }

    /// Its address on the cable.
    #[must_use]
    pub fn address(&self, end: End) -> IpAddr {
        match end {
            End::Primary => self.cable.a.address,
            End::Standby => self.cable.b.address,
        }
    }

    fn spent(&self) -> anyhow::Result<Cost> {
        let cpu = [self.groups[0].cpu()?, self.groups[1].cpu()?];
        Ok(Cost { wire: self.cable.a.bytes().total(), cpu, peak: [0; 2] })
    }

    /// Does `work`; what it gave and what it cost the contender meanwhile.
    ///
    /// # Errors
    /// That of `work`, or of a counter.
    pub fn measure<T>(&self, work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<(T, Cost)> {
        let before = self.spent()?;
        let (done, peak) = (AtomicBool::new(false), [const { AtomicU64::new(0) }; 2]);
        let result = std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Acquire) {
                    for (group, peak) in self.groups.iter().zip(&peak) {
                        peak.fetch_max(group.resident(), Ordering::AcqRel);
                    }
                    nap(LOOK);
                }
            });
            let result = work();
            done.store(true, Ordering::Release);
            result
        })?;
        let after = self.spent()?;
        let cpu = [0, 1].map(|end| after.cpu[end].saturating_sub(before.cpu[end]));
        Ok((result, Cost { wire: after.wire - before.wire, cpu, peak: peak.map(AtomicU64::into_inner) }))
    }

    /// Waits until next to nothing passes over the cable for half a second (who never rests is not waited for longer than 10 s).
    pub fn calm(&self) {
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(10) {
            let before = self.cable.a.bytes().total();
            nap(Duration::from_millis(500));
            if self.cable.a.bytes().total() - before < 16 * 1024 {
                return;
            }
        }
    }

    /// Every byte, outside of the measured time: names, types and contents, without what is never mirrored.
    ///
    /// # Errors
    /// They differ.
    pub fn same(&self) -> anyhow::Result<()> {
        let mut command = Command::new("diff");
        command.args(["-rq", "--no-dereference", "-x", "tmp", "-x", ".stfolder", "-x", ".stignore"]);
        let out = command.args([&self.source, &self.replica]).output().context("diff must be installed")?;
        if !out.status.success() {
            let text = String::from_utf8_lossy(&out.stdout);
            bail!("the replica differs: {}", text.lines().take(3).collect::<Vec<_>>().join("; "));
        }
        Ok(())
    }
}
