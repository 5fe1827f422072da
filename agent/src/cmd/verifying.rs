//! What the running agent does about `verify`: one run a mirror at a time, asked for by a person or by the schedule.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::runtime::Handle;
use twinbox_resync::manifest::Reader;

use super::run::Agent;
use crate::admin::{Response, Verify};
use crate::config::Role;
use crate::roles::{MirrorSpec, Running, mirror_dir};
use crate::standby::replica::Replica;
use crate::status::MirrorStatus;
use crate::tree::Root;
use crate::verify::scrub::AGAIN;
use crate::verify::sides::{Primary, Standby};
use crate::verify::{Record, Scrub, Stop, VerifyError};

/// How long the schedule leaves a mirror alone whose run ended, was stopped or could not begin.
const REST: Duration = Duration::from_secs(600);
/// How long a run of the schedule that somebody has stopped rests, at most.
const DAY: Duration = Duration::from_secs(24 * 3600);
/// How often the schedule looks.
const LOOK: Duration = Duration::from_secs(5);
/// How long a run that is told to stop may take to put down what it has in hand.
const STOPS_WITHIN: Duration = Duration::from_secs(60);

/// A run that is under way.
struct UnderWay {
    stop: Stop,
    shown: Arc<Mutex<Record>>,
}

/// All of them, by mirror.
#[derive(Default)]
pub(super) struct Verifying {
    runs: Mutex<BTreeMap<String, UnderWay>>,
    ended: Condvar,
    /// Not before, by the schedule.
    not_before: Mutex<BTreeMap<String, Instant>>,
    /// The same, because somebody has stopped it.
    stopped: Mutex<BTreeMap<String, Instant>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Verifying {
    /// Ends all runs, and waits until they have put down what they have in hand; they go on later. Blocks.
    pub(super) fn stop(&self) {
        let runs = lock(&self.runs);
        runs.values().for_each(|run| run.stop.stop());
        let rest = self.ended.wait_timeout_while(runs, STOPS_WITHIN, |runs| !runs.is_empty());
        if rest.is_ok_and(|(runs, _)| !runs.is_empty()) {
            tracing::error!("a verify does not stop: its disk does not answer");
        }
    }
}

/// Takes a run out of the list, however it ends.
struct Listed {
    agent: Arc<Agent>,
    mirror: String,
}

impl Drop for Listed {
    fn drop(&mut self) {
        let verifying = &self.agent.verifying;
        lock(&verifying.not_before).insert(self.mirror.clone(), Instant::now() + REST);
        lock(&verifying.runs).remove(&self.mirror);
        verifying.ended.notify_all();
    }
}

fn refused(spec: &MirrorSpec, why: &str) -> Response {
    Response::error("refused", format!("mirror `{}`: {why}", spec.name))
}

fn failed(spec: &MirrorSpec, error: &VerifyError) -> Response {
    Response::error("failed", format!("mirror `{}`: {error}", spec.name))
}

impl Agent {
    pub(super) async fn verify(self: Arc<Self>, verify: &Verify) -> Result<Response, Response> {
        let spec = self.spec(verify.mirror.as_deref())?;
        let record = self.scrub(&spec, verify, false).await?;
        Ok(Response::Ok(serde_json::to_value(record).unwrap_or_default()))
    }

    pub(super) fn verify_stop(&self, mirror: Option<&str>) -> Result<Response, Response> {
        let spec = self.spec(mirror)?;
        let runs = lock(&self.verifying.runs);
        let Some(run) = runs.get(&spec.name) else { return Err(refused(&spec, "no verify is under way")) };
        run.stop.stop();
        let scheduled = lock(&run.shown).scheduled;
        drop(runs);
        if scheduled {
            // Somebody wants it to be quiet, and not for ten minutes.
            let interval = self.schedule.read().unwrap_or_else(PoisonError::into_inner).interval.unwrap_or(DAY).min(DAY);
            lock(&self.verifying.stopped).insert(spec.name.clone(), Instant::now() + interval);
        }
        Ok(Response::done())
    }

    /// Begins what the schedule says is due.
    pub(super) fn verify_when_due(self: &Arc<Self>) {
        let schedule = *self.schedule.read().unwrap_or_else(PoisonError::into_inner);
        let Some(interval) = schedule.interval else { return };
        let specs = self.specs.read().unwrap_or_else(PoisonError::into_inner).clone();
        for spec in specs {
            let later = |times: &Mutex<BTreeMap<String, Instant>>| lock(times).get(&spec.name).is_some_and(|at| Instant::now() < *at);
            if later(&self.verifying.not_before) || later(&self.verifying.stopped) || lock(&self.verifying.runs).contains_key(&spec.name) {
                continue;
            }
            lock(&self.verifying.not_before).insert(spec.name.clone(), Instant::now() + LOOK);
            let (agent, verify) = (self.clone(), Verify { mirror: None, repair: schedule.repair, rate: None, anew: false });
            tokio::spawn(async move {
                let (state, name) = (agent.state.clone(), spec.name.clone());
                if !tokio::task::spawn_blocking(move || due(&state, &name, interval)).await.unwrap_or_default() {
                    return;
                }
                match agent.scrub(&spec, &verify, true).await {
                    Ok(record) if record.ended.is_some() => {
                        let (paths, differences, left) = (record.paths, record.differences, record.left());
                        tracing::info!(mirror = %spec.name, paths, differences, left, "verified");
                    }
                    Ok(_) => {}
                    Err(Response::Error { message, .. }) => {
                        lock(&agent.verifying.not_before).insert(spec.name.clone(), Instant::now() + REST);
                        tracing::warn!(mirror = %spec.name, message, "not verified; it is tried again");
                    }
                    Err(Response::Ok(_)) => {}
                }
            });
        }
    }

    async fn scrub(self: &Arc<Self>, spec: &MirrorSpec, verify: &Verify, scheduled: bool) -> Result<Record, Response> {
        if self.unhealed.names().contains(&spec.name) {
            return Err(refused(spec, "it is being healed after a power cut: try again when that is over"));
        }
        let Some(running) = self.roles.lock().await.running(&spec.name) else {
            return Err(refused(spec, "this node comes back to it and has not been resynced: `twinbox resync plan`"));
        };
        let (role, complete) = match &running {
            Running::Primary { capture, .. } => (Role::Primary, capture.status().complete),
            Running::Standby(handle) => {
                let status = handle.status();
                (Role::Standby, status.complete && !status.adopted)
            }
        };
        if !complete {
            return Err(refused(
                spec,
                "its first sync, or a full comparison after an outage, is not through: there is nothing to compare with yet",
            ));
        }
        let mirror_dir = mirror_dir(&self.state, &spec.name);
        let (stop, shown) = {
            let mut runs = lock(&self.verifying.runs);
            if self.stopping.load(Ordering::SeqCst) {
                return Err(refused(spec, "the agent is stopping"));
            }
            if runs.contains_key(&spec.name) {
                return Err(refused(
                    spec,
                    "a verify is under way already: `twinbox status` shows how far it is, `twinbox verify --stop` ends it",
                ));
            }
            let earlier = Record::load(&mirror_dir);
            let record = Record::begin(&spec.name, &self.node, role, verify.repair, scheduled, earlier.as_ref());
            let record = earlier.filter(|earlier| !verify.anew && earlier.goes_on_as(&record)).unwrap_or(record);
            let (stop, shown) = (Stop::default(), Arc::new(Mutex::new(record)));
            runs.insert(spec.name.clone(), UnderWay { stop: stop.clone(), shown: shown.clone() });
            (stop, shown)
        };
        let listed = Listed { agent: self.clone(), mirror: spec.name.clone() };
        let rate = verify.rate.unwrap_or(self.schedule.read().unwrap_or_else(PoisonError::into_inner).rate);
        let (spec_, runtime) = (spec.clone(), Handle::current());
        let work = tokio::task::spawn_blocking(move || {
            let _listed = listed;
            let spec = spec_;
            let open = || {
                Root::open(&spec.root).map_err(|error| VerifyError::Disk {
                    path: spec.root.display().to_string(),
                    source: rustix::io::Errno::from_io_error(&error).unwrap_or(rustix::io::Errno::IO),
                })
            };
            let (root, replica) = (open()?, Replica::new(open()?));
            let rows = Reader::open(&mirror_dir.join("manifest.db"))?;
            let (selection, record, rate) = (spec.selection.clone(), lock(&shown).clone(), Some(rate));
            match running {
                Running::Primary { capture, mirror_id, paths } => {
                    let side = Primary::new(capture, replica, &mirror_dir, (&spec.name, mirror_id), paths, stop.clone())?;
                    Scrub { root, rows, selection, mirror_dir, side, stop, rate, again: AGAIN, record, shown }.run()
                }
                Running::Standby(handle) => {
                    let side = Standby { handle, replica, runtime, stop: stop.clone() };
                    Scrub { root, rows, selection, mirror_dir, side, stop, rate, again: AGAIN, record, shown }.run()
                }
            }
        });
        let done = work.await.map_err(|_| refused(spec, "the verify was cut short (a bug: please report it)"))?;
        done.map_err(|error| failed(spec, &error))
    }

    /// Adds what is known of verifying to what the mirrors say.
    pub(super) fn show_verifying(&self, mirrors: &mut [MirrorStatus]) {
        for mirror in mirrors {
            let shown = lock(&self.verifying.runs).get(&mirror.name).map(|run| run.shown.clone());
            mirror.verify = match shown {
                Some(shown) => Some(lock(&shown).status(true)),
                None => Record::load(&mirror_dir(&self.state, &mirror.name)).map(|record| record.status(false)),
            };
        }
    }
}

/// Whether the last run that was through is that long ago, or one of the schedule was cut short.
fn due(state: &std::path::Path, mirror: &str, interval: Duration) -> bool {
    let Some(record) = Record::load(&mirror_dir(state, mirror)) else { return true };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let cut_short = record.ended.is_none() && record.scheduled;
    cut_short || record.last_ended().is_none_or(|ended| now.saturating_sub(ended) >= interval.as_secs() || ended > now)
}
