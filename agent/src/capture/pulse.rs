//! What the capture thread is doing, for those who must notice when it does nothing.
//!
//! The thread writes two atomics at each step; readers never wait for it. What happens behind the link is read from the published summary: the canary (an empty txn, when a second passed without another) must become durable
//! and applied, or the stage it hangs in is named.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::messages::CaptureStatus;

/// A canary is sent when nothing else was for this long.
pub const CANARY_EVERY: Duration = Duration::from_secs(1);
/// What has not moved for this long is a stall: with the canary's second and the second between two looks, it is told within 5 s.
pub const STALLED_AFTER: Duration = Duration::from_secs(3);

/// Where a change is on its way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Stage {
    /// The kernel's queue: a cookie does not come out.
    Watch = 0,
    /// Comparing listings with the manifest.
    Scan = 1,
    /// Reading files.
    Look = 2,
    /// Planning, and the primary's own manifest.
    Commit = 3,
    /// Nothing is heard from the standby.
    Link = 4,
    /// The standby speaks, but does not say that it is durable.
    StandbyLog = 5,
    /// It is durable there, but not applied.
    StandbyApply = 6,
    /// Nothing to do.
    Idle = 7,
}

impl Stage {
    /// As status shows it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Stage::Watch => "watch",
            Stage::Scan => "scan",
            Stage::Look => "read",
            Stage::Commit => "commit",
            Stage::Link => "link",
            Stage::StandbyLog => "standby-log",
            Stage::StandbyApply => "standby-apply",
            Stage::Idle => "idle",
        }
    }
}

/// See the module's text.
#[derive(Debug)]
pub struct Pulse {
    began: Instant,
    at_us: AtomicU64,
    stage: AtomicU8,
    /// Microseconds spent in the thread's own stages, in their order, then at rest.
    spent_us: [AtomicU64; 5],
}

impl Default for Pulse {
    fn default() -> Self {
        Pulse { began: Instant::now(), at_us: AtomicU64::new(0), stage: AtomicU8::new(Stage::Idle as u8), spent_us: Default::default() }
    }
}

impl Pulse {
    /// The thread begins something.
    pub fn enter(&self, stage: Stage) {
        let now = self.began.elapsed().as_micros() as u64;
        let (last, at) = (self.stage.swap(stage as u8, Ordering::Relaxed), self.at_us.swap(now, Ordering::Relaxed));
        self.spent_us[usize::from(last).min(self.spent_us.len() - 1)].fetch_add(now.saturating_sub(at), Ordering::Relaxed);
    }

    /// Milliseconds spent since it was last asked: with the queue, comparing, reading, committing, at rest.
    #[must_use]
    pub fn take_spent_ms(&self) -> [u64; 5] {
        std::array::from_fn(|stage| self.spent_us[stage].swap(0, Ordering::Relaxed) / 1000)
    }

    /// What it does, and for how long.
    #[must_use]
    pub fn now(&self) -> (Stage, Duration) {
        let stage = match self.stage.load(Ordering::Relaxed) {
            0 => Stage::Watch,
            1 => Stage::Scan,
            2 => Stage::Look,
            3 => Stage::Commit,
            _ => Stage::Idle,
        };
        (stage, self.began.elapsed().saturating_sub(Duration::from_micros(self.at_us.load(Ordering::Relaxed))))
    }
}

/// A stage that does not move.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stall {
    /// Which.
    pub stage: Stage,
    /// For how long.
    pub lasts: Duration,
}

/// What hangs, if anything does.
#[must_use]
pub fn stall(pulse: (Stage, Duration), status: &CaptureStatus, now: Instant) -> Option<Stall> {
    let (stage, lasts) = pulse;
    if lasts > STALLED_AFTER {
        return Some(Stall { stage, lasts });
    }
    if !(status.connected && status.complete) {
        return None; // Said by the state already.
    }
    let since = |at: Option<Instant>| at.map(|at| now.saturating_duration_since(at)).filter(|lasts| *lasts > STALLED_AFTER);
    if let Some(lasts) = since(status.unacknowledged_since) {
        let silent = status.heard.is_none_or(|at| now.saturating_duration_since(at) > STALLED_AFTER);
        return Some(Stall { stage: if silent { Stage::Link } else { Stage::StandbyLog }, lasts });
    }
    since(status.unapplied_since).map(|lasts| Stall { stage: Stage::StandbyApply, lasts })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stage_that_hangs_is_named() {
        let began = Instant::now();
        let at = |s: u64| Some(began + Duration::from_secs(s));
        let now = began + Duration::from_secs(100);
        let fine = CaptureStatus { connected: true, complete: true, heard: at(99), ..CaptureStatus::default() };
        let quick = (Stage::Idle, Duration::from_millis(200));
        let stage = |pulse, status: CaptureStatus| stall(pulse, &status, now).map(|s| (s.stage, s.lasts.as_secs()));
        assert_eq!(stage(quick, fine.clone()), None);
        assert_eq!(stage((Stage::Watch, Duration::from_secs(4)), fine.clone()), Some((Stage::Watch, 4)));
        let waits = |since, heard| CaptureStatus { unacknowledged_since: at(since), heard: at(heard), ..fine.clone() };
        assert_eq!(stage(quick, waits(98, 99)), None, "a second or two is no stall");
        assert_eq!(stage(quick, waits(95, 99)), Some((Stage::StandbyLog, 5)));
        assert_eq!(stage(quick, waits(95, 95)), Some((Stage::Link, 5)));
        assert_eq!(stage(quick, CaptureStatus { connected: false, ..waits(90, 90) }), None, "that is `unprotected`");
        assert_eq!(stage(quick, CaptureStatus { unapplied_since: at(90), ..fine.clone() }), Some((Stage::StandbyApply, 10)));
    }

    #[test]
    fn a_pulse_ages_until_the_next() {
        let pulse = Pulse::default();
        pulse.enter(Stage::Scan);
        let (stage, age) = pulse.now();
        assert!(stage == Stage::Scan && age < Duration::from_secs(5));
    }
}
