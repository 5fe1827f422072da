//! A control group: the CPU time of every process that ran in it, also of those that have ended; and what the living hold in memory.
//!
//! Both kinds of hierarchy (cgroups(7)): the unified one, and `cpuacct` of the older.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::process::{Pid, Signal, kill_process};
use twinbox_tests::bench::memory;
use twinbox_tests::gate::nap;

/// How long processes that were killed may take to go.
const LIMIT: Duration = Duration::from_secs(20);

/// See the module's text. What still runs in it when it is dropped is killed.
#[derive(Debug)]
pub struct Group {
    dir: PathBuf,
    unified: bool,
}

impl Group {
    /// Makes it (root).
    ///
    /// # Errors
    /// No control groups here, or not allowed.
    pub fn new(name: &str) -> anyhow::Result<Self> {
        let base = Path::new("/sys/fs/cgroup");
        let unified = base.join("cgroup.controllers").exists();
        let dir = if unified { base.join(name) } else { base.join("cpuacct").join(name) };
        fs::create_dir(&dir).with_context(|| format!("cannot make the control group {}: run this as root", dir.display()))?;
        Ok(Self { dir, unified })
    }

    /// The words that run a command inside it (the command takes the process's place).
    #[must_use]
    pub fn prefix(&self) -> Vec<OsString> {
        let enter = r#"echo $$ > "$0" && exec "$@""#;
        vec!["sh".into(), "-c".into(), enter.into(), self.dir.join("cgroup.procs").into()]
    }

    /// Spent so far.
    ///
    /// # Errors
    /// The counter cannot be read.
    pub fn cpu(&self) -> anyhow::Result<Duration> {
        let path = self.dir.join(if self.unified { "cpu.stat" } else { "cpuacct.usage" });
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        if self.unified {
            let micros = text.lines().find_map(|line| line.strip_prefix("usage_usec ")).context("cpu.stat has no usage_usec")?;
            return Ok(Duration::from_micros(micros.trim().parse()?));
        }
        Ok(Duration::from_nanos(text.trim().parse()?))
    }

    fn pids(&self) -> Vec<u32> {
        let text = fs::read_to_string(self.dir.join("cgroup.procs")).unwrap_or_default();
        text.lines().filter_map(|line| line.parse().ok()).collect()
    }

    /// Resident memory of its processes now, in bytes; what several share counts for each.
    #[must_use]
    pub fn resident(&self) -> u64 {
        self.pids().into_iter().filter_map(|pid| memory(pid).ok()).map(|memory| memory.resident << 10).sum()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let began = Instant::now();
        while fs::remove_dir(&self.dir).is_err() && began.elapsed() < LIMIT {
            for pid in self.pids() {
                if let Some(pid) = Pid::from_raw(pid as i32) {
                    let _ = kill_process(pid, Signal::KILL);
                }
            }
            nap(Duration::from_millis(10));
        }
    }
}
