//! What a test needs before it may run, how large it is, and what must not run beside it.
//!
//! A test that lacks something it needs says so on stderr and returns; where `CI=true` that is a failure, so that nothing is
//! skipped silently on the machine whose verdict counts.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};

/// Something a test cannot do without.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need<'a> {
    /// Effective uid 0.
    Root,
    /// A program found on `PATH` (or in the system's `sbin` directories).
    Program(&'a str),
    /// The right to make network namespaces.
    Namespaces,
    /// A free loop device and ext4, to cut the power of a disk.
    LoopDisk,
    /// A Dovecot with IMAP and LMTP, and root to run it.
    Dovecot,
}

/// Why `need` is not met, or `None` when it is.
#[must_use]
pub fn missing(need: Need<'_>) -> Option<String> {
    match need {
        Need::Root => (!is_root()).then(|| "needs root".to_owned()),
        Need::Program(name) => (!on_path(name)).then(|| format!("needs the program `{name}`")),
        Need::Namespaces => {
            if let Some(why) = missing(Need::Root).or_else(|| missing(Need::Program("ip"))) {
                return Some(why);
            }
            // Asked once a process: two tests that probe at the same moment must not meet.
            static MADE: OnceLock<bool> = OnceLock::new();
            let made = MADE.get_or_init(|| {
                let probe = format!("twb{}p", std::process::id());
                quiet("ip", &["netns", "add", &probe]) && quiet("ip", &["netns", "del", &probe])
            });
            (!made).then(|| "needs the right to make network namespaces".to_owned())
        }
        Need::LoopDisk => missing(Need::Root)
            .or_else(|| missing(Need::Program("mkfs.ext4")))
            .or_else(|| missing(Need::Program("losetup")))
            .or_else(|| (!quiet("losetup", &["-f"])).then(|| "needs a free loop device".into())),
        Need::Dovecot => missing(Need::Root)
            .or_else(|| missing(Need::Program("dovecot")))
            .or_else(|| (!Path::new("/usr/lib/dovecot/lmtp").exists()).then(|| "needs dovecot-lmtpd".into()))
            .or_else(|| (!Path::new("/usr/lib/dovecot/imap").exists()).then(|| "needs dovecot-imapd".into())),
    }
}

/// Whether every need is met; says loudly what is not, and fails where `CI=true`. Use through [`require!`](crate::require).
#[must_use]
pub fn all_met(needs: &[Need<'_>]) -> bool {
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("a test");
    let lacking: Vec<String> = needs.iter().filter_map(|n| missing(*n)).collect();
    if lacking.is_empty() {
        return true;
    }
    let why = lacking.join("; ");
    assert!(!ci(), "{test} may not be skipped where CI=true: {why}");
    eprintln!("\n*** SKIPPED {test}: {why} ***\n");
    false
}

/// Returns from the calling test, loudly, unless every [`Need`] given is met; fails instead where `CI=true`.
#[macro_export]
macro_rules! require {
    ($($need:expr),+ $(,)?) => {
        if !$crate::gate::all_met(&[$($need),+]) {
            return;
        }
    };
}

/// Whether this run's verdict counts (`CI=true`).
#[must_use]
pub fn ci() -> bool {
    std::env::var("CI").is_ok_and(|v| v == "true")
}

/// Whether the full-length variants were asked for (`TWINBOX_TEST_FULL=1`).
#[must_use]
pub fn full() -> bool {
    std::env::var("TWINBOX_TEST_FULL").is_ok_and(|v| v == "1")
}

/// `n` scaled by `TWINBOX_TEST_SCALE` (a factor such as `0.1`; default 1), at least 1.
#[must_use]
pub fn scaled(n: usize) -> usize {
    let factor = match std::env::var("TWINBOX_TEST_SCALE") {
        Ok(text) => text.parse::<f64>().unwrap_or_else(|_| panic!("TWINBOX_TEST_SCALE={text} is not a number")),
        Err(_) => 1.0,
    };
    #[allow(clippy::cast_precision_loss)]
    let scaled = n as f64 * factor;
    (scaled.round() as usize).max(1)
}

/// Whether the effective user is root.
#[must_use]
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Holds the machine for one heavy test at a time, also across test processes; released on drop.
///
/// Also what guards machine-wide settings: see [`Sysctl`].
#[derive(Debug)]
pub struct Heavy(#[allow(dead_code)] File);

/// Waits for the turn of a heavy test.
#[must_use]
pub fn heavy() -> Heavy {
    let path = std::env::temp_dir().join("twinbox-tests-heavy.lock");
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(&path)
        .unwrap_or_else(|e| panic!("open {}: {e}", path.display()));
    // Whoever made it: other users' test runs wait for the same turn.
    let _ = file.set_permissions(std::fs::Permissions::from_mode(0o666));
    flock(&file, FlockOperation::LockExclusive).expect("flock");
    Heavy(file)
}

/// A kernel setting changed for as long as this lives. Takes the [`Heavy`] turn as proof that no other test relies on it.
#[derive(Debug)]
pub struct Sysctl {
    path: String,
    before: String,
}

impl Sysctl {
    /// Sets `name` (with dots) to `value`.
    pub fn set(_turn: &Heavy, name: &str, value: &str) -> std::io::Result<Self> {
        let path = format!("/proc/sys/{}", name.replace('.', "/"));
        let before = std::fs::read_to_string(&path)?.trim().to_owned();
        std::fs::write(&path, value)?;
        Ok(Self { path, before })
    }
}

impl Drop for Sysctl {
    fn drop(&mut self) {
        if let Err(e) = std::fs::write(&self.path, &self.before) {
            eprintln!("could not put {} back to {}: {e}", self.path, self.before);
        }
    }
}

/// Polls `cond` until it gives a value; panics with `what` when `limit` has passed.
pub fn wait_for<T>(limit: Duration, what: &str, mut cond: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + limit;
    let mut pause = Duration::from_millis(2);
    loop {
        if let Some(value) = cond() {
            return value;
        }
        assert!(Instant::now() < deadline, "gave up after {limit:?} waiting for {what}");
        nap(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

/// Gives the processor away between two looks at a condition, or keeps a load's pace. Never instead of a condition.
#[allow(clippy::disallowed_methods)] // the one place
pub fn nap(time: Duration) {
    std::thread::sleep(time);
}

/// Waits for a moment: for loads with a pace and faults with a length.
pub fn nap_until(moment: Instant) {
    nap(moment.saturating_duration_since(Instant::now()));
}

/// Polls `cond` until it holds; panics with `what` when `limit` has passed.
pub fn wait_until(limit: Duration, what: &str, mut cond: impl FnMut() -> bool) {
    wait_for(limit, what, || cond().then_some(()));
}

fn on_path(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]).any(|dir| dir.join(name).is_file())
}

fn quiet(program: &str, args: &[&str]) -> bool {
    Command::new(program).args(args).stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|s| s.success())
}
