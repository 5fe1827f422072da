//! Healing beside a running agent: round after round, until every mirror is healed; meanwhile each says of itself what is wrong.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::mpsc;
use tokio::time::Instant;

use super::{Done, Job, until_healed};
use crate::config::Role;
use crate::link::paths::Paths;
use crate::status::{LastError, Lsns, MirrorState, MirrorStatus, Pending, Rates, SyncProgress, Totals, Unreadable, Watches, rfc3339};

/// One mirror is tried for so long before the next.
const TURN: Duration = Duration::from_secs(10);
/// How often who waits looks again.
const LOOK: Duration = Duration::from_millis(100);

/// What the mirrors that are not healed say of themselves; `None`: nobody wants that one healed any more.
#[derive(Clone, Default)]
pub struct Unhealed(Arc<Mutex<BTreeMap<String, Option<MirrorStatus>>>>);

impl Unhealed {
    /// Those of `jobs`.
    #[must_use]
    pub fn of(jobs: &[Job]) -> Self {
        let all = Unhealed::default();
        for job in jobs {
            let said = status(job, "waiting for the standby, to bring back what this disk lost in a power cut".into(), None);
            all.lock().insert(job.mirror().to_owned(), Some(said));
        }
        all
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Option<MirrorStatus>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn say(&self, job: &Job, message: String, done: Option<&Done>) {
        if let Some(Some(said)) = self.lock().get_mut(job.mirror()) {
            *said = status(job, message, done);
        }
    }

    fn is_wanted(&self, name: &str) -> bool {
        matches!(self.lock().get(name), Some(Some(_)))
    }

    /// Has a mirror not be healed: waits until nothing works on it any more. `false`: not in time, and it is healed on.
    pub async fn give_up(&self, name: &str, limit: Duration) -> bool {
        let Some(said) = self.lock().get_mut(name).map(Option::take) else { return true };
        let deadline = Instant::now() + limit;
        loop {
            if let Some(wanted) = self.lock().get_mut(name) {
                if Instant::now() >= deadline {
                    *wanted = said;
                    return false;
                }
            } else {
                return true;
            }
            tokio::time::sleep_until(Instant::now() + LOOK).await;
        }
    }

    fn remove(&self, name: &str) {
        self.lock().remove(name);
    }

    /// Their status, by name.
    #[must_use]
    pub fn status(&self) -> Vec<MirrorStatus> {
        self.lock().values().flatten().cloned().collect()
    }

    /// Their names.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        self.lock().keys().cloned().collect()
    }
}

/// Heals all; says on `some` whenever there are fewer left. Ends when there are none.
pub async fn heal_all(mut jobs: Vec<Job>, paths: Option<Paths>, unhealed: Unhealed, some: mpsc::Sender<()>) {
    // What kept a mirror from being healed stays told while it is tried again.
    let mut why = BTreeMap::<String, String>::new();
    while !jobs.is_empty() {
        let mut some_healed = false;
        let begun = Instant::now();
        let mut left = vec![];
        for job in jobs {
            if !unhealed.is_wanted(job.mirror()) {
                unhealed.remove(job.mirror());
                continue;
            }
            let doing = why.get(job.mirror()).map_or("bringing back what this disk lost in a power cut", String::as_str);
            let progress = |done: &Done| unhealed.say(&job, doing.to_owned(), Some(done));
            match until_healed(&job, paths.as_ref(), Some(Instant::now() + TURN), progress).await {
                Ok((outcome, done)) => {
                    tracing::info!(mirror = job.mirror(), ?outcome, ?done, "healed after a power cut");
                    unhealed.remove(job.mirror());
                    some_healed = true;
                }
                Err(error) => {
                    tracing::error!(mirror = job.mirror(), %error, "not healed yet: nothing of this mirror is shipped");
                    unhealed.say(&job, error.to_string(), None);
                    why.insert(job.mirror().to_owned(), error.to_string());
                    left.push(job);
                }
            }
        }
        jobs = left;
        if some_healed && some.send(()).await.is_err() {
            return;
        }
        // A standing refusal is not asked ten times a second.
        tokio::time::sleep_until(begun + TURN / 2).await;
    }
}

fn status(job: &Job, message: String, done: Option<&Done>) -> MirrorStatus {
    let now = rfc3339(SystemTime::now());
    MirrorStatus {
        name: job.mirror().to_owned(),
        role: Role::Primary,
        state: MirrorState::Unprotected,
        layout: job.spec.layout.clone(),
        root: job.spec.root.display().to_string(),
        epoch: job.history.epoch.0,
        generation: job.history.lineage.generation().to_string(),
        lsn: Lsns::default(),
        lag_ms: None,
        bound_ms: None,
        pending: Pending::default(),
        peers: vec![],
        rates: Rates::default(),
        totals: Totals::default(),
        watches: Watches::default(),
        fuzzy_cuts: 0,
        stalled: None,
        warnings: vec![],
        unreadable: Unreadable::default(),
        lost_metadata: BTreeMap::new(),
        sync: done.map(|done| SyncProgress {
            phase: "healing".into(),
            files_done: done.compared,
            files_total: None,
            bytes_done: done.bytes,
            bytes_total: None,
            eta_s: None,
        }),
        last_error: Some(LastError { at: now.clone(), message }),
        unprotected_since: Some(now),
    }
}
