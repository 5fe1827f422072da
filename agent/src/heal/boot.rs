//! Which boot of the machine this is.

use std::path::PathBuf;

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
