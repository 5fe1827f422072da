//! Which boot of the machine this is, and when it was.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use twinbox_protocol::entry::Time;

/// Names another file than the kernel's; for tests of power cuts only, which cannot boot.
const FOR_TESTS: &str = "TWINBOX_BOOT_ID_FILE";

/// The kernel's random id of this boot (`proc_sys_kernel(5)`).
///
/// # Errors
/// The system's. Without it nobody can tell a power cut from a restart, so nothing may start.
pub fn boot_id() -> std::io::Result<String> {
    let path = std::env::var_os(FOR_TESTS).map_or_else(|| PathBuf::from("/proc/sys/kernel/random/boot_id"), PathBuf::from);
    let text = std::fs::read_to_string(path)?;
    // One word, as the mark in state.db keeps it.
    Ok(text.split_whitespace().collect())
}

/// `btime` and the clock it is set by are whole seconds: what was changed in the last ones before a cut must not seem to be of after it. No mail server runs that early.
const ROUNDED: i64 = 2;

/// When the machine was started, by its clock as it is now (`btime` of `proc_stat(5)`, rounded up).
///
/// # Errors
/// The system's.
pub(super) fn booted() -> std::io::Result<Time> {
    if let Some(path) = std::env::var_os(FOR_TESTS) {
        // Written when the machine is to have started.
        let meta = std::fs::metadata(path)?;
        return Ok(Time { secs: meta.mtime(), nanos: meta.mtime_nsec() as u32 });
    }
    let stat = std::fs::read_to_string("/proc/stat")?;
    let secs = stat.lines().find_map(|line| line.strip_prefix("btime ")).and_then(|secs| secs.trim().parse().ok());
    secs.map(|secs: i64| Time { secs: secs + ROUNDED, nanos: 0 }).ok_or_else(|| std::io::Error::other("/proc/stat has no btime"))
}
