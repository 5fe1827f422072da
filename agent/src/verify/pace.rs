//! How fast disks are read for `verify`, and how it is stopped.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

/// What may be read at once after a rest.
const BURST: Duration = Duration::from_millis(100);

/// Ends a running `verify`, from anywhere.
#[derive(Clone, Debug)]
pub struct Stop(Arc<Stopping>);

#[derive(Debug)]
struct Stopping {
    /// For those who await it,
    told: watch::Sender<bool>,
    /// and for threads that wait.
    stopped: Mutex<bool>,
    changed: Condvar,
}

impl Default for Stop {
    fn default() -> Self {
        Stop(Arc::new(Stopping { told: watch::Sender::new(false), stopped: Mutex::default(), changed: Condvar::new() }))
    }
}

impl Stop {
    /// It is to end; it can be continued later.
    pub fn stop(&self) {
        self.0.told.send_replace(true);
        *self.0.stopped.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.0.changed.notify_all();
    }

    /// Whether it is to end.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        *self.0.told.borrow()
    }

    /// Resolves when it is to end.
    pub(super) async fn stopped(&self) {
        let mut told = self.0.told.subscribe();
        let _ = told.wait_for(|stopped| *stopped).await; // Its sender is ours.
    }

    /// Waits until then, or until it is to end.
    pub(super) fn wait_until(&self, until: Instant) {
        let stopped = self.0.stopped.lock().unwrap_or_else(PoisonError::into_inner);
        let left = until.saturating_duration_since(Instant::now());
        drop(self.0.changed.wait_timeout_while(stopped, left, |stopped| !*stopped));
    }
}

/// Bytes a second.
pub(super) struct Pace {
    /// `None`: as fast as the disk.
    rate: Option<u64>,
    /// When all that was read would have been read at that rate.
    due: Instant,
    stop: Stop,
}

impl Pace {
    pub(super) fn new(rate: Option<u64>, stop: Stop) -> Self {
        Pace { rate: rate.filter(|rate| *rate > 0), due: Instant::now(), stop }
    }

    /// So much was read: waits if that was too fast; `false` when it is to end.
    pub(super) fn took(&mut self, bytes: u64) -> bool {
        if let Some(rate) = self.rate {
            let now = Instant::now();
            // Time that was not used is not saved up.
            self.due = self.due.max(now.checked_sub(BURST).unwrap_or(now)) + Duration::from_secs_f64(bytes as f64 / rate as f64);
            if self.due > now {
                self.stop.wait_until(self.due);
            }
        }
        !self.stop.is_stopped()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_fast_as_it_is_told_and_stopped_at_once() {
        let mut pace = Pace::new(Some(1_000_000), Stop::default());
        let begin = Instant::now();
        (0..30).for_each(|_| assert!(pace.took(10_000)));
        assert!(begin.elapsed() >= Duration::from_millis(190), "{:?}", begin.elapsed());
        let stop = Stop::default();
        let mut slow = Pace::new(Some(1), stop.clone());
        let stopper = std::thread::spawn(move || stop.stop());
        assert!(!slow.took(1_000_000), "eleven days otherwise");
        stopper.join().unwrap();
        let mut free = Pace::new(None, Stop::default());
        assert!(free.took(u64::MAX));
    }
}
