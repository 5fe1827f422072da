//! How the product must refuse: one clear message, a documented exit code that is not 0, no panic; and a small store to refuse for.

use std::path::PathBuf;

use crate::rng::Rng;
use crate::scratch::Scratch;
use crate::twinbox::{Ended, Program, by_signal};

/// Every exit code the product's help lists: lines of a number and a meaning below "Exit codes".
#[must_use]
pub fn documented(scratch: &Scratch) -> Vec<i32> {
    let help = Program::here().run("help", scratch.path(), ["--help"]).ok("--help").stdout;
    let table = help.split("Exit codes").nth(1).unwrap_or_else(|| panic!("no exit codes in --help:\n{help}"));
    table.lines().filter_map(|line| line.split_whitespace().next()?.parse().ok()).collect()
}

/// One clear message that names each of `mentions`, a documented exit code that is not 0, no panic.
#[track_caller]
pub fn refused(ended: &Ended, scratch: &Scratch, mentions: &[&str]) {
    assert!(!ended.panicked(), "{ended}");
    assert!(!by_signal(ended.status), "ended by a signal: {ended}");
    let code = ended.status.code().expect("an exit code");
    assert_ne!(code, 0, "not refused: {ended}");
    assert!(documented(scratch).contains(&code), "exit code {code} is not documented: {ended}");
    assert!(!ended.stderr.trim().is_empty(), "no message: {ended}");
    for word in mentions {
        assert!(ended.stderr.to_lowercase().contains(&word.to_lowercase()), "the message does not say {word:?}: {ended}");
    }
}

/// A Maildir store of 20 users with a message each, in the scratch directory.
#[must_use]
pub fn small_store(scratch: &Scratch) -> PathBuf {
    let root = scratch.dir("source");
    for n in 0..20 {
        let dir = root.join(format!("user{n}/Maildir/new"));
        std::fs::create_dir_all(&dir).expect("write the store");
        std::fs::write(dir.join("1.M1.host"), Rng::new(n).bytes(500)).expect("write the store");
    }
    root
}
