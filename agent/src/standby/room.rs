//! Room: nothing is accepted that the replica or the state directory could not hold.

use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::fs as rfs;

use super::applier::Cmd;
use super::error::StandbyError;
use super::receiver::{Event, Receiving};

/// Room that must stay free in both file systems.
pub(super) const RESERVE: u64 = 64 * 1024 * 1024;
/// With so much free beyond what is needed, the file systems are asked once a second …
const PLENTY: u64 = 1024 * 1024 * 1024;
const ASK_ROOM_EVERY: Duration = Duration::from_secs(1);

/// What is known of the room left.
pub(super) struct Room {
    /// The replica's directory and the state's.
    roots: [PathBuf; 2],
    redo_max: u64,
    /// Until then, needs below so many bytes are met.
    plenty: Option<(Instant, u64)>,
}

impl Room {
    pub(super) fn new(roots: [PathBuf; 2], redo_max: u64) -> Self {
        Room { roots, redo_max, plenty: None }
    }
}

impl Receiving {
    /// Waits until the redo log is below its limit again; a checkpoint makes room.
    pub(super) fn make_room_in_log(&mut self) -> Result<(), StandbyError> {
        while self.shared.redo_bytes.load(Ordering::Relaxed) > self.room.redo_max {
            self.settle()?;
            self.ask(Cmd::Checkpoint);
            self.wait(|event| if matches!(event, Event::Progress) { Ok(()) } else { Err(event) })?;
        }
        Ok(())
    }

    /// Both file systems must hold what was accepted, and a reserve.
    pub(super) fn check_room_for(&mut self, content: u64) -> Result<(), StandbyError> {
        let need = RESERVE + content + self.shared.unapplied.load(Ordering::Relaxed);
        if self.room.plenty.is_some_and(|(until, free)| need < free && Instant::now() < until) {
            return Ok(());
        }
        let mut least = u64::MAX;
        for (path, need) in [(&self.room.roots[0], need), (&self.room.roots[1], RESERVE + content)] {
            let Ok(stat) = rfs::statvfs(path) else { continue };
            let free = stat.f_bavail.saturating_mul(stat.f_frsize);
            if free < need {
                let error = StandbyError::Full { path: path.clone(), free: free >> 20, need: need.div_ceil(1 << 20) };
                self.shared.problem(error.to_string());
                self.room.plenty = None;
                self.staging.make_room();
                return Err(error);
            }
            least = least.min(free);
        }
        // Far from full: no need to ask the file systems again for every txn.
        self.room.plenty = least.checked_sub(PLENTY).map(|free| (Instant::now() + ASK_ROOM_EVERY, free));
        Ok(())
    }
}
