//! `twinbox mirror`: both ends in one process, while a test changes the source.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::tree::{Layout, Rules, assert_identical, leftovers, wait_identical};
use crate::twinbox::{Ended, Process, Program, STOP_LIMIT};

/// A live mirror of a directory.
#[derive(Debug)]
pub struct Live {
    process: Process,
    source: PathBuf,
    replica: PathBuf,
    rules: Rules,
}

/// The words of `twinbox mirror SOURCE REPLICA` with its state beside the outputs.
#[must_use]
pub fn words(source: &Path, replica: &Path, dir: &Path, layout: Layout) -> Vec<OsString> {
    vec![
        "mirror".into(),
        source.into(),
        replica.into(),
        "--layout".into(),
        layout.name().into(),
        "--state".into(),
        dir.join("mirror-state").into(),
    ]
}

/// Runs `mirror --once` to its end.
#[must_use]
pub fn once(source: &Path, replica: &Path, dir: &Path, layout: Layout) -> Ended {
    once_by(&Program::here(), source, replica, dir, layout)
}

/// The same, run in some other way.
#[must_use]
pub fn once_by(program: &Program, source: &Path, replica: &Path, dir: &Path, layout: Layout) -> Ended {
    let mut words = words(source, replica, dir, layout);
    words.push("--once".into());
    program.spawn("mirror-once", dir, words).end(Duration::from_secs(300))
}

impl Live {
    /// Starts mirroring; state and outputs go to `dir`.
    #[must_use]
    pub fn start(source: &Path, replica: &Path, dir: &Path, layout: Layout) -> Self {
        let words = words(source, replica, dir, layout);
        Self {
            process: Program::here().spawn("mirror", dir, words),
            source: source.to_owned(),
            replica: replica.to_owned(),
            rules: Rules::of(layout),
        }
    }

    /// Its process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Waits until the replica is identical, while the mirror runs.
    #[track_caller]
    pub fn settle(&mut self, what: &str, limit: Duration) {
        self.process.assert_running();
        if let Err(why) = wait_identical(&self.source, &self.replica, self.rules, limit) {
            self.process.assert_running();
            panic!("{what}: not identical {why}");
        }
    }

    /// Ctrl-C: must drain, exit 0 and leave an identical replica.
    pub fn stop(mut self) -> Ended {
        self.process.assert_running();
        self.process.interrupt();
        let status = self.process.wait(STOP_LIMIT);
        let (stdout, stderr) = (self.process.stdout(), self.process.stderr());
        let ended = Ended { status, stdout, stderr }.ok("mirror after Ctrl-C");
        assert!(!ended.panicked(), "{ended}");
        assert_identical(&self.source, &self.replica, self.rules);
        for root in [&self.source, &self.replica] {
            assert_eq!(leftovers(root).expect("read the tree"), Vec::<String>::new(), "left behind by the mirror");
        }
        ended
    }
}
