//! Healing beside a running agent: round after round, until every mirror is healed; meanwhile each says of itself what is wrong.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::mpsc;
use tokio::time::Instant;

use super::{Done, Job, until_healed};
use crate::config::Role;
use crate::link::paths::Paths;
use crate::status::{MirrorState, MirrorStatus, SyncProgress, rfc3339};

/// One mirror is tried for so long before the next.
const TURN: Duration = Duration::from_secs(10);
/// How often who waits looks again.
const LOOK: Duration = Duration::from_millis(100);

/// What is wanted of a mirror that is not healed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wanted {
    /// That it is.
    Healed,
    /// Nothing any more; something may still work on it.
    Nothing,
    /// The same, and nothing does.
    Left,
}

/// The mirrors that are not healed, and what they say of themselves.
#[derive(Clone, Default)]
pub struct Unhealed(Arc<Mutex<BTreeMap<String, (Wanted, MirrorStatus)>>>);

impl Unhealed {
    /// Those of `jobs`.
    #[must_use]
    pub fn of(jobs: &[Job]) -> Self {
        let all = Unhealed::default();
        for job in jobs {
            let said = status(job, "waiting for the standby, to bring back what this disk lost in a power cut".into(), None);
            all.lock().insert(job.mirror().to_owned(), (Wanted::Healed, said));
        }
        all
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, (Wanted, MirrorStatus)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn say(&self, job: &Job, message: String, done: Option<&Done>) {
        if let Some((Wanted::Healed, said)) = self.lock().get_mut(job.mirror()) {
            *said = status(job, message, done);
        }
    }

    fn is_wanted(&self, name: &str) -> bool {
        matches!(self.lock().get(name), Some((Wanted::Healed, _)))
    }

    /// Has a mirror not be healed: waits until nothing works on it any more; it is told of until [`Unhealed::remove`]. `false`: not in time, and it is healed on.
    pub async fn give_up(&self, name: &str, limit: Duration) -> bool {
        let want = |wanted: Wanted| self.lock().get_mut(name).map(|one| one.0 = wanted).is_some();
        if !want(Wanted::Nothing) {
            return true;
        }
        let deadline = Instant::now() + limit;
        while self.lock().get(name).is_some_and(|one| one.0 != Wanted::Left) {
            if Instant::now() >= deadline {
                return !want(Wanted::Healed);
            }
            tokio::time::sleep_until(Instant::now() + LOOK).await;
        }
        true
    }

    fn leave(&self, name: &str) {
        if let Some(one) = self.lock().get_mut(name) {
            one.0 = Wanted::Left;
        }
    }

    /// It is no business of a heal any more.
    pub fn remove(&self, name: &str) {
        self.lock().remove(name);
    }

    /// Their status, by name.
    #[must_use]
    pub fn status(&self) -> Vec<MirrorStatus> {
        self.lock().values().map(|(_, said)| said.clone()).collect()
    }

    /// Names of those that a heal works on, or will.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        self.lock().iter().filter(|(_, one)| one.0 != Wanted::Left).map(|(name, _)| name.clone()).collect()
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
                unhealed.leave(job.mirror());
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
    MirrorStatus {
        sync: done.map(|done| SyncProgress {
            phase: "healing".into(),
            files_done: done.compared,
            files_total: None,
            bytes_done: done.bytes,
            bytes_total: None,
            eta_s: None,
        }),
        unprotected_since: Some(rfc3339(SystemTime::now())),
        ..MirrorStatus::idle(&job.spec, &job.history, Role::Primary, MirrorState::Unprotected, message)
    }
}
