//! What the running agent does about a mirror whose other primary was promoted after it: it stops being primary, and resyncs when it is asked to.

use std::sync::PoisonError;
use std::time::Duration;

use tokio::time::{Instant, timeout};
use twinbox_protocol::ids::Epoch;
use twinbox_protocol::msg::RefuseCode;
use twinbox_protocol::rejoin::Merged;
use twinbox_resync::reconcile::Policy;

use super::run::{Agent, HEAL_ENDS, outcome, standby_of};
use crate::admin::{Rescued, Response, Resync};
use crate::config::Role;
use crate::hooks::Hook;
use crate::link::standby::Word;
use crate::resync::back::Back;
use crate::resync::work::{Job, ResyncError};
use crate::roles::{MirrorSpec, ReturnProgress};
use crate::status::SyncProgress;

/// How long the other node is waited for.
const PEER_WITHIN: Duration = Duration::from_secs(30);

impl Agent {
    /// What the other node has said.
    pub(super) async fn heed(&self, word: Word) {
        match word {
            Word::Superseded(mirror, epoch) => {
                // At once, whatever else is under way.
                self.step_down(&mirror, epoch).await;
            }
            Word::TakeOver(mirror, generation, reply) => {
                let Ok(_alone) = self.alone() else {
                    let _ = reply.send(Err((RefuseCode::Busy, "another change of role is under way there".into())));
                    return;
                };
                let done = self.take_over(&mirror, generation).await.map_err(|why| (RefuseCode::Failed, why));
                let taken = done.is_ok();
                let _ = reply.send(done);
                if taken {
                    self.hook_after(Hook::PostPromote, &self.about(&mirror, Role::Primary, "the other node handed over")).await;
                }
            }
        }
    }

    /// Stops being primary of a mirror, at once: another node was promoted after this one.
    async fn step_down(&self, mirror: &str, heard: Epoch) {
        if self.unhealed.names().iter().any(|unhealed| unhealed == mirror) && !self.unhealed.give_up(mirror, HEAL_ENDS).await {
            return; // It is asked again.
        }
        let reason = "another node was promoted after this one";
        {
            let mut roles = self.roles.lock().await;
            if roles.returning(mirror).is_some() {
                return; // Told twice.
            }
            let (done, started) = self.restart(&mut roles, || crate::switch::step_down(&self.state, mirror, heard));
            self.unhealed.remove(mirror);
            match done {
                Ok(()) => tracing::error!(
                    mirror,
                    "{reason}: it is primary no more, its mail server must not run; `twinbox resync plan` shows what is here alone"
                ),
                Err(error) => return tracing::error!(mirror, %error, "{reason}, and this one cannot give way"),
            }
            if let Err(why) = started {
                tracing::error!(mirror, why);
            }
        }
        // The mail server is stopped when the role is gone: nothing it does counts any more.
        for hook in [Hook::PreDemote, Hook::PostDemote] {
            self.hook_after(hook, &self.about(mirror, Role::Standby, reason)).await;
        }
    }

    pub(super) fn spec(&self, mirror: Option<&str>) -> Result<MirrorSpec, Response> {
        let specs = self.specs.read().unwrap_or_else(PoisonError::into_inner);
        match mirror {
            None if specs.len() > 1 => Err(Response::error("bad-arguments", "there are several mirrors: say which, with --mirror")),
            _ => {
                let named = specs.iter().find(|spec| mirror.is_none_or(|name| spec.name == name));
                named.cloned().ok_or_else(|| Response::error("refused", "this node keeps no mirror of that name"))
            }
        }
    }

    /// Whether this node is still primary of the mirror, and the operator has named another node that is to stay.
    async fn gives_way(&self, spec: &MirrorSpec, winner: Option<&str>) -> Result<bool, Response> {
        let no = |why: &str| Err(Response::error("refused", format!("mirror `{}`: {why}", spec.name)));
        let (mut all, returns) = {
            let roles = self.roles.lock().await;
            (roles.status(), roles.returning(&spec.name).is_some())
        };
        all.extend(self.unhealed.status());
        match (all.into_iter().find(|mirror| mirror.name == spec.name).map(|mirror| mirror.role), winner) {
            _ if returns => Ok(false),
            (Some(Role::Primary), Some(winner)) if *winner == *self.node => {
                no("this node is the one that stays: run this command on the other one")
            }
            (Some(Role::Primary), Some(_)) => Ok(true),
            (Some(Role::Primary), None) => no(
                "this node is its primary. If another one was promoted after it, that one says so as soon as it is reached; if both went on apart, name the one that stays with --winner",
            ),
            (Some(Role::Standby), _) => no("this node is its standby, and has nothing that the primary lacks: there is nothing to resync"),
            (None, _) => no("this node keeps no mirror of that name"),
        }
    }

    pub(super) async fn resync(&self, resync: &Resync) -> Result<Response, Response> {
        let _alone = self.alone()?;
        let spec = self.spec(resync.mirror.as_deref())?;
        let gives_way = self.gives_way(&spec, resync.winner.as_deref()).await?;
        let peers = self.peers.read().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(paths) = standby_of(&peers, &self.endpoints) else {
            return Err(Response::error("refused", "no other node is known: run `twinbox pair`"));
        };
        let Ok(connection) = timeout(PEER_WITHIN, paths.connection()).await else {
            let message = format!("node `{}` does not answer: what is here alone can only be told together with it", paths.node());
            return Err(Response::error("peer", message));
        };
        let job = Job {
            node: self.node.clone(),
            spec: spec.clone(),
            state_dir: self.state.clone(),
            winner: resync.winner.clone(),
            policy: if resync.rescue { Policy::Rescue } else { Policy::Merge },
        };
        let (apply, runtime) = (resync.apply, tokio::runtime::Handle::current());
        let job = if gives_way {
            // Nothing is given up before the other node has said that it is primary.
            let (asking, to) = (runtime.clone(), connection.clone());
            let checked = tokio::task::spawn_blocking(move || {
                let epoch = asking.block_on(job.check(&to));
                (job, epoch)
            });
            let (job, epoch) = checked.await.map_err(|_| Response::error("failed", "cut short"))?;
            self.step_down(&spec.name, epoch.map_err(|error| refused(&error))?).await;
            job
        } else {
            job
        };
        let Some(progress) = self.roles.lock().await.returning(&spec.name) else {
            return Err(Response::error(
                "refused",
                format!("mirror `{}`: this node could not step down: see the log, and try again", spec.name),
            ));
        };
        let said = tokio::task::spawn_blocking(move || {
            let show = {
                let progress = progress.clone();
                let since = std::sync::Mutex::new((String::new(), Instant::now()));
                move |phase: &str, done: u64, total: Option<u64>| say(&progress, &since, phase, done, total)
            };
            let work = async { if apply { job.apply(&connection, &show).await } else { job.plan(&connection, &show).await } };
            let said = runtime.block_on(work);
            if let Ok(mut progress) = progress.lock() {
                *progress = None;
            }
            (job, said)
        });
        let (job, said) = said.await.map_err(|_| Response::error("failed", "the resync was cut short: run it again"))?;
        let said = said.map_err(|error| refused(&error))?;
        if apply {
            let mut roles = self.roles.lock().await;
            let (done, started) = self.restart(&mut roles, || job.finish());
            done.map_err(|error| refused(&error))?;
            outcome::<()>(&spec.name, "resynced", "a standby", (Ok(()), started))?;
            tracing::warn!(mirror = %spec.name, items = said.items.len(), rescued = said.rescued, "resynced: this node is a standby from now on");
        }
        Ok(Response::Ok(serde_json::to_value(said).unwrap_or_default()))
    }

    /// Gives something back that is kept here, on whichever node is primary.
    pub(super) async fn rescue(&self, rescued: &Rescued) -> Result<Response, Response> {
        let names: Vec<String> = self.specs.read().unwrap_or_else(PoisonError::into_inner).iter().map(|spec| spec.name.clone()).collect();
        let found = super::rescue::file_of(&self.state, &names, &rescued.entry);
        let (mirror, file, path) = found.map_err(|why| Response::error("refused", why))?;
        let spec = self.spec(Some(&mirror))?;
        let no = |why: &str| Response::error("refused", format!("mirror `{mirror}`: {why}"));
        let role = self.roles.lock().await.status().into_iter().find(|one| one.name == mirror).map(|one| one.role);
        let (state, redeliver, node) = (self.state.clone(), rescued.redeliver, self.node.clone());
        let back = Back { node, spec, state_dir: state, file, path, redeliver };
        let merged = match role {
            Some(Role::Primary) => {
                let done = tokio::task::spawn_blocking(move || back.here());
                done.await.map_err(|_| no("cut short"))?
            }
            Some(Role::Standby) => {
                let peers = self.peers.read().unwrap_or_else(PoisonError::into_inner).clone();
                let paths = standby_of(&peers, &self.endpoints).ok_or_else(|| no("no other node is known: run `twinbox pair`"))?;
                let Ok(connection) = timeout(PEER_WITHIN, paths.connection()).await else {
                    return Err(Response::error("peer", format!("node `{}`, which is primary, does not answer", paths.node())));
                };
                let runtime = tokio::runtime::Handle::current();
                let done = tokio::task::spawn_blocking(move || runtime.block_on(back.there(&connection)));
                done.await.map_err(|_| no("cut short"))?
            }
            None => return Err(no("it is being healed after a power cut: try again when that is over")),
        };
        let (outcome, said) = match merged.map_err(|error| refused(&error))? {
            Merged::Done => ("done", "given back".to_owned()),
            Merged::Already => ("already", "is there already".to_owned()),
            Merged::Kept { why } => ("kept", format!("not given back: {why}")),
        };
        Ok(Response::Ok(serde_json::json!({ "outcome": outcome, "said": said })))
    }
}

fn refused(error: &ResyncError) -> Response {
    let code = match error {
        ResyncError::Remote(_) => "peer",
        ResyncError::Refused(_) => "refused",
        _ => "failed",
    };
    Response::error(code, error.to_string())
}

/// How far it is, with what is left at the pace of this phase so far.
fn say(progress: &ReturnProgress, since: &std::sync::Mutex<(String, Instant)>, phase: &str, done: u64, total: Option<u64>) {
    let began = since.lock().map(|mut since| {
        if since.0 != phase {
            *since = (phase.to_owned(), Instant::now());
        }
        since.1
    });
    let spent = began.map_or(Duration::ZERO, |began| began.elapsed());
    let left = total.filter(|total| done > 0 && *total >= done).map(|total| spent.as_secs_f64() / done as f64 * (total - done) as f64);
    if let Ok(mut progress) = progress.lock() {
        *progress = Some(SyncProgress {
            phase: phase.into(),
            files_done: done,
            files_total: total,
            bytes_done: 0,
            bytes_total: None,
            eta_s: left.map(|left| left as u64),
        });
    }
}
