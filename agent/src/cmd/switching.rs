//! Roles that change by an operator's word: promote, demote, switchover, with the hooks around them.
//!
//! One change at a time. No hook runs while the roles are locked: it may ask this agent how things are.

use std::path::PathBuf;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::MutexGuard;
use tokio::time::{Instant, timeout};
use twinbox_protocol::codec::CONTROL_MAX;
use twinbox_protocol::ids::{Epoch, Generation};
use twinbox_protocol::msg::{RefuseCode, ToPrimary, ToStandby};
use twinbox_resync::node::NodeState;

use super::run::{Agent, DRAIN, HEAL_ENDS, outcome, said, standby_of};
use crate::admin::{Response, Switch};
use crate::capture::Command;
use crate::config::Role;
use crate::hooks::{About, Hook};
use crate::net::framed::{FrameReader, write_frame};
use crate::roles::{MirrorSpec, Roles};
use crate::status::{MirrorState, MirrorStatus};

/// How long the other node may take to become primary, its hooks included.
const TAKES_OVER: Duration = Duration::from_secs(300);
/// Pause before it is asked again.
const AGAIN: Duration = Duration::from_millis(200);

impl Agent {
    pub(super) fn about(&self, mirror: &str, role: Role, reason: impl Into<String>) -> About {
        let specs = self.specs.read().unwrap_or_else(PoisonError::into_inner);
        let root = specs.iter().find(|spec| spec.name == mirror).map_or_else(PathBuf::new, |spec| spec.root.clone());
        About { node: self.node.clone(), mirror: mirror.into(), root, role: role.as_str().into(), reason: reason.into() }
    }

    /// Runs a hook whose failure changes nothing any more.
    pub(super) async fn hook_after(&self, hook: Hook, about: &About) {
        let hooks = self.hooks.read().unwrap_or_else(PoisonError::into_inner).clone();
        if let Err(error) = hooks.run(hook, about).await {
            tracing::error!(mirror = %about.mirror, %error, "a hook failed: see to it by hand");
        }
    }

    /// Runs a hook without which nothing is changed.
    async fn hook_before(&self, hook: Hook, about: &About) -> Result<(), Response> {
        let hooks = self.hooks.read().unwrap_or_else(PoisonError::into_inner).clone();
        let done = hooks.run(hook, about).await;
        done.map_err(|error| Response::error("refused", format!("mirror `{}`: {error}; nothing was changed", about.mirror)))
    }

    /// Only one change of roles at a time.
    pub(super) fn alone(&self) -> Result<MutexGuard<'_, ()>, Response> {
        self.goes_on()?;
        self.changing.try_lock().map_err(|_| {
            Response::error("refused", "another change of role, or a resync, is under way: `twinbox status` says how far it is")
        })
    }

    /// An agent that stops changes no roles any more: nobody would run the hooks.
    fn goes_on(&self) -> Result<(), Response> {
        let stops = self.stopping.load(Ordering::SeqCst);
        if stops { Err(Response::error("refused", "the agent is stopping: try again when it is back")) } else { Ok(()) }
    }

    /// Whether `state.db` says that this node is primary.
    fn is_primary(&self, mirror: &str) -> bool {
        let known = NodeState::open(&self.state).and_then(|node| node.mirror(mirror));
        known.is_ok_and(|known| known.is_some_and(|known| known.role == twinbox_resync::node::Role::Primary))
    }

    /// The mirror that is meant, which must not have that role.
    pub(super) fn to_switch(&self, roles: &Roles, switch: &Switch, not: Role) -> Result<MirrorStatus, Response> {
        let mut all = roles.status();
        all.extend(self.unhealed.status());
        let named = match &switch.mirror {
            Some(name) => all.into_iter().find(|mirror| mirror.name == *name),
            None if all.len() > 1 => {
                return Err(Response::error("bad-arguments", "there are several mirrors: say which, with --mirror"));
            }
            None => all.into_iter().next(),
        };
        match named {
            // Given up before, and that did not get to its end: it can be done again.
            Some(mirror)
                if mirror.role == not && not == Role::Standby && switch.force && crate::switch::gave_up(&self.state, &mirror.name) =>
            {
                Ok(mirror)
            }
            // Its history and the primary's have parted, however that came about.
            Some(mirror) if not == Role::Standby && switch.force && mirror.state == MirrorState::Diverged => Ok(mirror),
            // It has stepped down, and can give up what it has alone.
            Some(mirror) if not == Role::Standby && roles.returning(&mirror.name).is_some() => Ok(mirror),
            Some(mirror) if mirror.role == not => {
                Err(Response::error("refused", format!("mirror `{}`: this node is its {not} already", mirror.name)))
            }
            Some(mirror) => Ok(mirror),
            None => Err(Response::error("refused", "this node keeps no mirror of that name")),
        }
    }

    /// Why this node may not become primary, if so.
    fn may_promote(&self, roles: &Roles, mirror: &MirrorStatus, asked: bool) -> Result<(), Response> {
        let name = mirror.name.as_str();
        let no = |why: String| Err(Response::error("refused", format!("mirror `{name}`: {why}")));
        if roles.returning(name).is_some() {
            return no("another node was promoted after this one, and this one has what may be nowhere else: `twinbox resync plan` shows it (--force: two primaries, and the other one steps down)".into());
        }
        let connected: Vec<&str> = mirror.peers.iter().filter(|peer| peer.connected).map(|peer| peer.node.as_str()).collect();
        if !asked && !connected.is_empty() {
            let node = connected.join(", ");
            return no(format!(
                "its primary `{node}` is alive and connected, or has been gone for some seconds only: run `twinbox switchover` there, or try again (--force: two primaries, of which one will lose)"
            ));
        }
        let complete = roles.standbys().iter().any(|(of, handle)| of == name && handle.status().complete);
        if !complete {
            return no(
                "its first sync is not complete: the replica is at no point in time and lacks mail (--force takes it as it is)".into()
            );
        }
        Ok(())
    }

    pub(super) async fn promote(&self, switch: &Switch) -> Result<Response, Response> {
        let _alone = self.alone()?;
        let (name, epoch) = self.become_primary(switch, None).await?;
        self.hook_after(Hook::PostPromote, &self.about(&name, Role::Primary, "promoted")).await;
        Ok(said(format!("Mirror `{name}`: this node is its primary now (epoch {}). {}", epoch.0, self.then_start())))
    }

    fn then_start(&self) -> &'static str {
        let hooked = self.hooks.read().unwrap_or_else(PoisonError::into_inner).programs.contains_key(&Hook::PostPromote);
        if hooked { "The hook post_promote has run." } else { "Start the mail server." }
    }

    /// The other node, which was primary until now, asks this one to take over, in the history of `generation`.
    pub(super) async fn take_over(&self, mirror: &str, generation: Generation) -> Result<(), String> {
        let switch = Switch { mirror: Some(mirror.into()), force: false };
        self.become_primary(&switch, Some(generation)).await.map(|_| ()).map_err(|response| match response {
            Response::Error { message, .. } => message,
            Response::Ok(_) => String::new(),
        })
    }

    async fn become_primary(&self, switch: &Switch, asked: Option<Generation>) -> Result<(String, Epoch), Response> {
        let check = |roles: &Roles| {
            self.goes_on()?;
            let mirror = self.to_switch(roles, switch, Role::Primary)?;
            if !switch.force {
                self.may_promote(roles, &mirror, asked.is_some())?;
            }
            // Whoever asked may have taken the role back meanwhile.
            let known = NodeState::open(&self.state).and_then(|node| node.mirror(&mirror.name));
            let follows =
                |generation| known.as_ref().is_ok_and(|known| known.as_ref().is_some_and(|known| known.lineage.generation() == generation));
            if asked.is_some_and(|generation| !follows(generation)) {
                return Err(Response::error("refused", format!("mirror `{}`: its primary has gone on meanwhile", mirror.name)));
            }
            Ok::<_, Response>(mirror.name)
        };
        let name = check(&*self.roles.lock().await)?;
        let reason = if asked.is_some() { "the primary hands over" } else { "promote" };
        self.hook_before(Hook::PrePromote, &self.about(&name, Role::Standby, reason)).await?;
        let mut roles = self.roles.lock().await;
        check(&roles)?;
        let epoch = outcome(&name, "promoted", "its primary", self.restart(&mut roles, || crate::switch::promote(&self.state, &name)))?;
        tracing::warn!(mirror = name, epoch = epoch.0, "promoted: this node is the primary from now on");
        Ok((name, epoch))
    }

    pub(super) async fn demote(&self, switch: &Switch) -> Result<Response, Response> {
        let _alone = self.alone()?;
        if switch.force {
            return self.give_up(switch).await;
        }
        let spec = self.stop_being_primary(switch, "demote", false).await?;
        self.hook_after(Hook::PostDemote, &self.about(&spec.name, Role::Standby, "demoted")).await;
        let name = &spec.name;
        Ok(said(format!("Mirror `{name}`: this node is a standby now. Run `twinbox promote` on the other one, or here to take it back.")))
    }

    /// Whatever is here alone goes to rescue.
    async fn give_up(&self, switch: &Switch) -> Result<Response, Response> {
        let mirror = self.to_switch(&*self.roles.lock().await, switch, Role::Standby)?;
        let name = mirror.name.as_str();
        self.hook_after(Hook::PreDemote, &self.about(name, mirror.role, "demote --force")).await;
        let mut roles = self.roles.lock().await;
        if self.unhealed.names().iter().any(|unhealed| unhealed == name) && !self.unhealed.give_up(name, HEAL_ENDS).await {
            let why =
                "it is being healed after a power cut, with the standby's help: see `twinbox status`, and try again when that is over";
            return Err(Response::error("refused", format!("mirror `{name}`: {why}")));
        }
        let done = self.restart(&mut roles, || crate::switch::give_up(&self.state, name));
        self.unhealed.remove(name);
        outcome(name, "demoted", "a standby", done)?;
        drop(roles);
        tracing::warn!(mirror = name, "given up: this node follows the other one; what that lacks will be in rescue");
        self.hook_after(Hook::PostDemote, &self.about(name, Role::Standby, "demote --force")).await;
        Ok(said(format!(
            "Mirror `{name}`: this node is its standby now. It compares its files with the other node as soon as that is primary; what that one lacks will be in {}.",
            crate::roles::mirror_dir(&self.state, name).join("rescue").display()
        )))
    }

    /// In order, with everything on the standby. A mail server that was stopped for it is started again when it does not come to that.
    async fn stop_being_primary(&self, switch: &Switch, reason: &str, changed: bool) -> Result<MirrorSpec, Response> {
        let spec = {
            let roles = self.roles.lock().await;
            let mirror = self.to_switch(&roles, switch, Role::Standby)?;
            self.is_followed(&roles, &mirror.name)?;
            let specs = self.specs.read().unwrap_or_else(PoisonError::into_inner);
            let spec = specs.iter().find(|spec| spec.name == mirror.name).cloned();
            spec.ok_or_else(|| Response::error("refused", format!("mirror `{}` is not configured any more", mirror.name)))?
        };
        let name = spec.name.as_str();
        let stopped = self.hook_before(Hook::PreDemote, &self.about(name, Role::Primary, reason)).await;
        let done = match stopped {
            Ok(()) => self.hand_over(&spec, changed).await,
            // It may have stopped half of it.
            Err(refusal) => Err(refusal),
        };
        if done.is_err() && self.is_primary(name) {
            self.hook_after(
                Hook::PostPromote,
                &self.about(name, Role::Primary, format!("{reason} was refused: this node is still primary")),
            )
            .await;
        }
        done.map(|()| spec)
    }

    fn is_followed(&self, roles: &Roles, name: &str) -> Result<crate::capture::CaptureHandle, Response> {
        let no = |why: &str| Response::error("refused", format!("mirror `{name}`: {why}"));
        if roles.returning(name).is_some() {
            return Err(no(
                "it is primary no more, another node was promoted after it: `twinbox resync plan` shows what is here alone (--force: all of that goes to rescue)",
            ));
        }
        let capture = roles.captures().into_iter().find(|(of, _)| of == name).map(|(_, capture)| capture);
        capture.filter(|capture| capture.status().protected && capture.stall().is_none()).ok_or_else(|| {
            no("no standby follows, so what is here may be nowhere else. If the other node was promoted meanwhile, this one steps down as soon as it hears of it")
        })
    }

    async fn hand_over(&self, spec: &MirrorSpec, changed: bool) -> Result<(), Response> {
        let name = spec.name.as_str();
        let mut roles = self.roles.lock().await;
        self.goes_on()?;
        let capture = self.is_followed(&roles, name)?;
        if !matches!(timeout(DRAIN, capture.ask(Command::Sync)).await, Ok(Some(()))) {
            let why = "the standby did not get everything in time: stop the mail server first, then try again";
            return Err(Response::error("refused", format!("mirror `{name}`: {why}")));
        }
        let done = self.restart(&mut roles, || crate::switch::demote(&self.state, name, &spec.root, &spec.selection, changed));
        outcome(name, "demoted", "a standby", done)?;
        tracing::warn!(mirror = name, "demoted: this node is a standby from now on");
        Ok(())
    }

    /// Stops the mail server here, sends the last change, and has the other node take over.
    pub(super) async fn switchover(&self, switch: &Switch) -> Result<Response, Response> {
        let _alone = self.alone()?;
        let spec = self.stop_being_primary(switch, "switchover", switch.force).await?;
        let name = spec.name.as_str();
        match self.ask_to_take_over(name).await {
            Ok(other) => {
                self.hook_after(Hook::PostDemote, &self.about(name, Role::Standby, format!("`{other}` has taken over"))).await;
                let end = if switch.force { "What was written here after the last transaction is in rescue." } else { "Nothing was lost." };
                Ok(said(format!("Mirror `{name}`: node `{other}` is its primary now, and this one its standby. {end}")))
            }
            Err(Unmoved::Refused(why)) => {
                // It is not primary, and was told nothing that would make it so: back to where everything was.
                let switch = Switch { mirror: Some(name.into()), force: true };
                let back = self.become_primary(&switch, None).await;
                if back.is_ok() {
                    self.hook_after(Hook::PostPromote, &self.about(name, Role::Primary, "the switchover was refused")).await;
                }
                let end = match back {
                    Ok(_) => "this node is primary again".to_owned(),
                    Err(Response::Error { message, .. }) => format!("and this node is its standby: {message}"),
                    Err(Response::Ok(_)) => String::new(),
                };
                Err(Response::error("refused", format!("mirror `{name}`: the other node does not take over ({why}); {end}")))
            }
            Err(Unmoved::Unknown(why)) => {
                let text = format!(
                    "mirror `{name}`: this node is its standby now, and has not heard whether the other one has taken over ({why}). See `twinbox status` there; if it has not, run `twinbox promote` there, or here to take it back"
                );
                Err(Response::error("peer", text))
            }
        }
    }

    async fn ask_to_take_over(&self, mirror: &str) -> Result<String, Unmoved> {
        let peers = self.peers.read().unwrap_or_else(PoisonError::into_inner).clone();
        let paths = standby_of(&peers, &self.endpoints).ok_or_else(|| Unmoved::Refused("no other node is known".into()))?;
        let known = NodeState::open(&self.state).and_then(|node| node.mirror(mirror));
        let generation = known.ok().flatten().map(|known| known.lineage.generation()).ok_or_else(|| Unmoved::Refused("state.db".into()))?;
        let deadline = Instant::now() + TAKES_OVER;
        let mut asked = None;
        loop {
            let Ok(connection) = timeout(DRAIN, paths.connection()).await else {
                return Err(asked.map_or_else(|| Unmoved::Refused("it is not reached".into()), Unmoved::Unknown));
            };
            match take_over(&connection, mirror, generation).await {
                Ok(()) => return Ok(paths.node().to_owned()),
                // Unless it was asked before: that answer may be on its way to being another.
                Err(TookOver::Refused(why)) if asked.is_none() => return Err(Unmoved::Refused(why)),
                Err(TookOver::Refused(why)) => return Err(Unmoved::Unknown(why)),
                // It closes its connections when its role changes, and says so when it is asked again.
                Err(TookOver::Lost(why)) if Instant::now() < deadline => asked = Some(why),
                Err(TookOver::Lost(why)) => return Err(Unmoved::Unknown(why)),
            }
            tokio::time::sleep_until(Instant::now() + AGAIN).await;
        }
    }
}

/// Asks once.
async fn take_over(connection: &quinn::Connection, mirror: &str, generation: Generation) -> Result<(), TookOver> {
    let lost = |error: &dyn std::fmt::Display| TookOver::Lost(error.to_string());
    let (mut send, recv) = connection.open_bi().await.map_err(|error| lost(&error))?;
    let mut control = FrameReader::<ToPrimary>::new(recv, CONTROL_MAX);
    let asked = ToStandby::TakeOver { mirror: mirror.into(), generation };
    write_frame(&mut send, &asked).await.map_err(|error| lost(&error))?;
    match timeout(TAKES_OVER, control.next()).await {
        Ok(Ok(Some(ToPrimary::Begun))) => Ok(()),
        Ok(Ok(Some(ToPrimary::Refuse { code: RefuseCode::Busy, message }))) => Err(TookOver::Lost(message)),
        Ok(Ok(Some(ToPrimary::Refuse { message, .. }))) => Err(TookOver::Refused(message)),
        Ok(Ok(_)) => Err(TookOver::Lost("the answer was cut short".into())),
        Ok(Err(error)) => Err(lost(&error)),
        Err(_) => Err(TookOver::Lost("no answer in time".into())),
    }
}

/// Why the other node has not said that it took over.
enum TookOver {
    /// It will not.
    Refused(String),
    /// Its answer did not arrive.
    Lost(String),
}

/// Why nobody knows that the other node has taken over.
enum Unmoved {
    /// It has not.
    Refused(String),
    /// It may have.
    Unknown(String),
}
