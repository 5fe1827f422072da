//! `twinbox run`: the agent in the foreground, from a configuration.
//!
//! SIGTERM and SIGINT drain and stop; SIGHUP and `twinbox reload` read again what can change: peers, exclusions, groups. Speaks to systemd by `sd_notify`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Mutex, mpsc, oneshot};
use tokio::time::timeout;

use super::events::Events;
use crate::admin::{AdminServer, FenceServer, Request, Response};
use crate::capture::Command;
use crate::capture::pulse::Stage;
use crate::cli::Run;
use crate::config::{self, Config, Role};
use crate::exit::ExitCode;
use crate::failure::Failure;
use crate::fences::Fences;
use crate::heal::waiting::{Unhealed, heal_all};
use crate::heal::{self, Job};
use crate::hooks::{About, Hook, Hooks};
use crate::link::paths::Paths;
use crate::net::{Endpoint, Fingerprint, NodeKey, PinnedPeers, Tuning};
use crate::roles::{Bounds, MirrorSpec, PeerSpec, Roles};
use crate::status::{SCHEMA, Status};
use crate::switch::SwitchError;

/// How long giving a mirror up waits for a heal that is under way.
pub(super) const HEAL_ENDS: Duration = Duration::from_secs(30);
/// How often it is looked whether another node was promoted after this one.
const HEED: Duration = Duration::from_millis(200);
/// How long a stop waits for what is under way.
pub(super) const DRAIN: Duration = Duration::from_secs(15);

pub(super) fn mirrors(config: &Config, adopt: &[String]) -> Vec<MirrorSpec> {
    let spec = |mirror: &crate::config::Mirror| MirrorSpec {
        name: mirror.name.as_str().into(),
        root: mirror.root.clone(),
        layout: mirror.layout.as_str().into(),
        role: match mirror.role {
            Role::Primary => twinbox_resync::node::Role::Primary,
            Role::Standby => twinbox_resync::node::Role::Standby,
        },
        selection: mirror.selection(),
        grouping: mirror.grouping(),
        adopt: adopt.iter().any(|name| name == mirror.name.as_str()),
        sweep: (!mirror.sweep_interval.is_zero()).then_some(mirror.sweep_interval),
        fuzzy_after: mirror.fuzzy_after,
        tool: Arc::new(std::sync::RwLock::new(config.hooks.tool(Hook::Merge))),
    };
    config.mirrors.iter().map(spec).collect()
}

pub(super) fn peers(config: &Config) -> Result<Vec<PeerSpec>, Failure> {
    let mut out = vec![];
    for peer in &config.peers {
        let Some(text) = &peer.fingerprint else {
            tracing::warn!(peer = %peer.node, "peer has no key yet: run `twinbox pair`");
            continue;
        };
        let fingerprint: Fingerprint = text.parse().map_err(|error| {
            Failure::new(ExitCode::Config, format!("[[peer]] `{}`: fingerprint: {error}; pair the nodes again", peer.node))
        })?;
        out.push(PeerSpec { node: peer.node.as_str().into(), addresses: peer.addresses.clone(), fingerprint });
    }
    Ok(out)
}

pub(super) fn pin(pins: &PinnedPeers, peers: &[PeerSpec]) -> Result<(), Failure> {
    let all: BTreeMap<_, _> = peers.iter().map(|p| (p.fingerprint, p.node.clone())).collect();
    pins.replace(all).map_err(|error| Failure::new(ExitCode::Config, error.to_string()))
}

pub(super) struct Agent {
    path: std::path::PathBuf,
    pub(super) state: std::path::PathBuf,
    pub(super) specs: std::sync::RwLock<Vec<MirrorSpec>>,
    pub(super) peers: std::sync::RwLock<Vec<PeerSpec>>,
    bounds: Bounds,
    /// Why this agent cannot go on.
    fatal: mpsc::Sender<Failure>,
    pins: PinnedPeers,
    pub(super) endpoints: Vec<Endpoint>,
    pub(super) roles: Mutex<Roles>,
    pub(super) node: String,
    started: Instant,
    fences: std::sync::RwLock<Arc<Fences>>,
    pub(super) unhealed: Unhealed,
    /// Held by the one change of roles, or resync, there may be.
    pub(super) changing: Mutex<()>,
    pub(super) hooks: std::sync::RwLock<Hooks>,
    pub(super) schedule: std::sync::RwLock<config::Verify>,
    pub(super) verifying: super::verifying::Verifying,
    /// No role is changed any more.
    pub(super) stopping: AtomicBool,
}

impl Agent {
    async fn reload(&self) -> Result<(), Failure> {
        let config = Config::load(&self.path)?;
        let peers = peers(&config)?;
        pin(&self.pins, &peers)?;
        let mut roles = self.roles.lock().await;
        // A session that nothing was changed of goes on.
        if *self.peers.read().unwrap_or_else(PoisonError::into_inner) != peers {
            roles.connect(&peers, &self.endpoints);
        }
        let specs = mirrors(&config, &[]);
        roles.reselect(&specs);
        for known in self.specs.write().unwrap_or_else(PoisonError::into_inner).iter_mut() {
            // Roots and layouts want a restart of the process.
            if let Some(new) = specs.iter().find(|new| new.name == known.name && new.root == known.root && new.layout == known.layout) {
                // Where it is used already it is another one from now on.
                let tool = known.tool.clone();
                *tool.write().unwrap_or_else(PoisonError::into_inner) = config.hooks.tool(Hook::Merge);
                *known = MirrorSpec { tool, ..new.clone() };
            }
        }
        *self.hooks.write().unwrap_or_else(PoisonError::into_inner) = config.hooks.clone();
        *self.schedule.write().unwrap_or_else(PoisonError::into_inner) = config.verify;
        tracing::info!(peers = peers.len(), "configuration read again");
        *self.peers.write().unwrap_or_else(PoisonError::into_inner) = peers;
        Ok(())
    }

    /// Stops everything that runs, lets `change` act on the state at rest, and starts again, whatever came of it.
    pub(super) fn restart<T>(&self, roles: &mut Roles, change: impl FnOnce() -> T) -> (T, Result<(), String>) {
        tokio::task::block_in_place(|| {
            // Whose tree it is may change: nobody else touches it by then.
            self.verifying.stop();
            roles.stop();
            let done = change();
            let not_yet = self.unhealed.names();
            let specs = self.specs.read().unwrap_or_else(PoisonError::into_inner).clone();
            let whole = specs.into_iter().filter(|spec| !not_yet.contains(&spec.name)).collect();
            let mut started_again = Ok(());
            let peers = self.peers.read().unwrap_or_else(PoisonError::into_inner).clone();
            match Roles::start(&self.node, &self.state, whole, &peers, &self.endpoints, self.bounds) {
                Ok(started) => {
                    *self.fences.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(started.fences());
                    *roles = started;
                }
                Err(error) => {
                    started_again = Err(format!("the agent cannot go on and ends: {error}"));
                    let _ = self.fatal.try_send(error.into());
                }
            }
            (done, started_again)
        })
    }

    async fn status(&self) -> Status {
        Status {
            schema: SCHEMA,
            node: self.node.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            uptime_s: self.started.elapsed().as_secs(),
            mirrors: {
                let mut all = self.roles.lock().await.status();
                all.extend(self.unhealed.status());
                self.show_verifying(&mut all);
                all
            },
        }
    }

    /// What fences go by. While a mirror is not healed nobody is told that anything is on two machines.
    fn fences(&self) -> Result<Arc<Fences>, Response> {
        match self.unhealed.names().first() {
            Some(name) => Err(Response::error("unprotected", format!("mirror `{name}` is being healed after a power cut"))),
            None => Ok(self.fences.read().unwrap_or_else(PoisonError::into_inner).clone()),
        }
    }
}

/// What a change of role came to: refused, or made, and then the agent went on or could not.
pub(super) fn outcome<T>(
    mirror: &str,
    code: &str,
    role: &str,
    (done, started): (Result<T, SwitchError>, Result<(), String>),
) -> Result<T, Response> {
    let done = done.map_err(|error| Response::error("refused", error.to_string()))?;
    started.map_err(|error| Response::error(code, format!("mirror `{mirror}`: this node is {role} now, but {error}")))?;
    Ok(done)
}

pub(super) fn said(text: String) -> Response {
    Response::Ok(serde_json::json!({ "said": text }))
}

/// Runs the command.
///
/// # Errors
/// [`Failure`].
pub async fn run(args: &Run) -> Result<ExitCode, Failure> {
    let config = Config::load(&args.file.config)?;
    for mirror in &config.mirrors {
        check_root(&mirror.root)?;
    }
    // Each waiting client has a descriptor, and the usual limit is meant for programs that use select(2).
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let _ = rustix::process::setrlimit(rustix::process::Resource::Nofile, rustix::process::Rlimit { current: limit.maximum, ..limit });
    let server = AdminServer::bind(&config.state)?;
    let fence_socket = config.fence.as_ref().map(|fence| FenceServer::bind(&fence.socket, fence.group.as_deref())).transpose()?;
    let key = NodeKey::load(&config.state.join("node.key"))?;
    let pins = PinnedPeers::new();
    let peers = peers(&config)?;
    pin(&pins, &peers)?;
    let mut endpoints = vec![];
    for addr in &config.listen {
        endpoints.push(Endpoint::bind(Some(*addr), key.clone(), pins.clone(), Tuning::default())?);
    }
    let adopt: Vec<String> = args.adopt.iter().map(|name| name.as_str().to_owned()).collect();
    let bounds = Bounds {
        window_bytes: ((config.limits.memory_mib as usize) << 20) / 8,
        dirty_max: config.limits.dirty_paths_max as usize,
        redo_max: config.limits.redo_max_mib << 20,
    };
    let specs = mirrors(&config, &adopt);
    let jobs = tokio::task::block_in_place(|| unhealed(&config, &specs))?;
    let unhealed = Unhealed::of(&jobs);
    let not_yet = unhealed.names();
    let whole = specs.iter().filter(|spec| !not_yet.contains(&spec.name)).cloned().collect();
    let roles = tokio::task::block_in_place(|| Roles::start(config.node.as_str(), &config.state, whole, &peers, &endpoints, bounds))?;
    let (some_healed, mut healed) = mpsc::channel(1);
    let healing = tokio::spawn(heal_all(jobs, standby_of(&peers, &endpoints), unhealed.clone(), some_healed));
    let fences = std::sync::RwLock::new(Arc::new(roles.fences()));
    let (fatal, mut failed_for_good) = mpsc::channel(1);
    let agent = Arc::new(Agent {
        state: config.state.clone(),
        // An operator's word about files that were there counts for this start alone.
        specs: std::sync::RwLock::new(specs.iter().map(|spec| MirrorSpec { adopt: false, ..spec.clone() }).collect()),
        peers: std::sync::RwLock::new(peers.clone()),
        bounds,
        fatal,
        fences,
        unhealed,
        changing: Mutex::default(),
        stopping: AtomicBool::new(false),
        hooks: std::sync::RwLock::new(config.hooks.clone()),
        schedule: std::sync::RwLock::new(config.verify),
        verifying: super::verifying::Verifying::default(),
        path: args.file.config.clone(),
        pins,
        endpoints,
        roles: Mutex::new(roles),
        node: config.node.as_str().into(),
        started: Instant::now(),
    });
    let failed = |error: std::io::Error| Failure::io("signals", &error);
    let (mut term, mut int, mut hup) = (
        signal(SignalKind::terminate()).map_err(failed)?,
        signal(SignalKind::interrupt()).map_err(failed)?,
        signal(SignalKind::hangup()).map_err(failed)?,
    );
    let (ask_stop, mut stop_asked) = mpsc::channel::<()>(1);
    let (end_server, server_ends) = oneshot::channel::<()>();
    let handler = {
        let agent = agent.clone();
        move |request: Request| {
            let (agent, ask_stop) = (agent.clone(), ask_stop.clone());
            async move {
                match request {
                    Request::Status => Response::Ok(serde_json::to_value(agent.status().await).unwrap_or_default()),
                    Request::Reload => match agent.reload().await {
                        Ok(()) => Response::done(),
                        Err(failure) => Response::error("reload", failure.message),
                    },
                    Request::Stop => {
                        let _ = ask_stop.try_send(());
                        Response::done()
                    }
                    Request::Promote(switch) => agent.promote(&switch).await.unwrap_or_else(|refusal| refusal),
                    Request::Rescue(rescued) => agent.rescue(&rescued).await.unwrap_or_else(|refusal| refusal),
                    Request::Verify(verify) => agent.verify(&verify).await.unwrap_or_else(|refusal| refusal),
                    Request::VerifyStop { mirror } => agent.verify_stop(mirror.as_deref()).unwrap_or_else(|refusal| refusal),
                    Request::Switchover(switch) => agent.switchover(&switch).await.unwrap_or_else(|refusal| refusal),
                    Request::Resync(resync) => agent.resync(&resync).await.unwrap_or_else(|refusal| refusal),
                    Request::Demote(switch) => agent.demote(&switch).await.unwrap_or_else(|refusal| refusal),
                    Request::Fence(fence) => match agent.fences() {
                        Ok(fences) => fences.fence(&fence).await,
                        Err(refusal) => refusal,
                    },
                    Request::TxnBegin { path, timeout } => match agent.fences() {
                        Ok(fences) => fences.begin(&path, timeout).await,
                        Err(refusal) => refusal,
                    },
                    Request::TxnCommit { txn, fence, nowait } => match agent.fences() {
                        Ok(fences) => fences.commit(txn, &fence, nowait).await,
                        Err(refusal) => refusal,
                    },
                    Request::Ping => Response::done(),
                }
            }
        }
    };
    let fencing = fence_socket.map(|socket| {
        let handler = handler.clone();
        tokio::spawn(async move { socket.serve(handler, std::future::pending()).await })
    });
    let serving = tokio::spawn(async move {
        let until = async {
            let _ = server_ends.await;
        };
        server.serve(handler, until).await
    });
    let _ = sd_notify::notify(&[NotifyState::Ready, NotifyState::Status("running")]);
    tracing::info!(node = %agent.node, mirrors = config.mirrors.len(), peers = peers.len(), "twinbox is running");
    let mut check = tokio::time::interval(Duration::from_secs(1));
    let mut heed = tokio::time::interval(HEED);
    let mut ended = None;
    let mut hanging: BTreeMap<String, Stage> = BTreeMap::new();
    let (mut events, mut greeted) = (Events::default(), BTreeSet::new());
    // One after the other, so that "protected" does not overtake "unprotected".
    let (tell, mut told) = mpsc::channel::<(Hook, About)>(64);
    let teller = {
        let agent = agent.clone();
        tokio::spawn(async move {
            while let Some((hook, about)) = told.recv().await {
                agent.hook_after(hook, &about).await;
            }
        })
    };
    loop {
        tokio::select! {
            _ = term.recv() => break,
            _ = int.recv() => break,
            _ = stop_asked.recv() => break,
            _ = hup.recv() => {
                if let Err(failure) = agent.reload().await {
                    tracing::error!(error = %failure, "configuration not taken over; the old one stays");
                }
            }
            Some(()) = healed.recv() => {
                let mut roles = agent.roles.lock().await;
                let _ = agent.restart(&mut roles, || ()); // An error ends the loop by `fatal`.
            }
            Some(failure) = failed_for_good.recv() => {
                ended = Some(failure);
                break;
            }
            _ = heed.tick() => {
                let words = agent.roles.lock().await.words();
                for word in words {
                    let agent = agent.clone();
                    tokio::spawn(async move { agent.heed(word).await });
                }
            }
            _ = check.tick() => {
                let _ = sd_notify::notify(&[NotifyState::Watchdog]);
                agent.verify_when_due();
                let (captures, stalls, mut status) = {
                    let roles = agent.roles.lock().await;
                    (roles.captures(), roles.stalls(), roles.status())
                };
                // A machine that was started anew has the mail server of its role, and what was cut off by a stop is made up for.
                for one in &status {
                    if greeted.insert(one.name.clone()) {
                        let hook = if one.role == Role::Primary { Hook::PostPromote } else { Hook::PostDemote };
                        let _ = tell.try_send((hook, agent.about(&one.name, one.role, "the agent has started")));
                    }
                }
                status.extend(agent.unhealed.status());
                for (hook, mirror) in events.look(&status, Instant::now()) {
                    let one = status.iter().find(|one| one.name == mirror);
                    let reason = one.and_then(|one| one.last_error.as_ref()).map_or("", |error| error.message.as_str()).lines().next().unwrap_or_default();
                    let about = agent.about(&mirror, one.map_or(Role::Primary, |one| one.role), reason);
                    let _ = tell.try_send((hook, about)); // So many that none has ended: nobody is helped by more.
                }
                for (mirror, stage, lasts) in &stalls {
                    if hanging.insert(mirror.clone(), *stage) != Some(*stage) {
                        let for_s = lasts.as_secs();
                        tracing::error!(mirror, stage = stage.as_str(), for_s, "stalled: changes do not get on; the mirror counts as unprotected");
                    }
                }
                hanging.retain(|mirror, stage| {
                    let still = stalls.iter().any(|(name, ..)| name == mirror);
                    if !still {
                        tracing::info!(mirror, stage = stage.as_str(), "moves again");
                    }
                    still
                });
                if let Some((mirror, why)) = captures.into_iter().find_map(|(name, c)| Some((name, c.status().failed?))) {
                    ended = Some(Failure::new(super::mirror::code_of_stop(&why), format!("mirror `{mirror}`: {why}")));
                    break;
                }
            }
        }
    }
    healing.abort();
    teller.abort();
    agent.stopping.store(true, Ordering::SeqCst);
    tokio::task::block_in_place(|| agent.verifying.stop());
    let _ = sd_notify::notify(&[NotifyState::Stopping]);
    tracing::info!("stopping: finishing what is under way");
    let captures = agent.roles.lock().await.captures();
    for (mirror, capture) in captures {
        if capture.status().connected && !matches!(timeout(DRAIN, capture.ask(Command::Sync)).await, Ok(Some(()))) {
            tracing::warn!(mirror, "stopped before everything had arrived; it is found again at the next start");
        }
    }
    {
        let mut roles = agent.roles.lock().await;
        tokio::task::block_in_place(|| roles.stop());
    }
    if let Some(task) = fencing {
        task.abort();
        let _ = task.await;
    }
    let _ = end_server.send(());
    let _ = serving.await;
    match ended {
        Some(failure) => Err(failure),
        None => Ok(ExitCode::Ok),
    }
}

/// The mirrors whose disk may lack what was shipped.
fn unhealed(config: &Config, specs: &[MirrorSpec]) -> Result<Vec<Job>, Failure> {
    let mut jobs = vec![];
    for spec in specs {
        jobs.extend(heal::need(config.node.as_str(), &config.state, spec.clone(), false)?);
    }
    Ok(jobs)
}

/// The way to the first peer.
pub(super) fn standby_of(peers: &[PeerSpec], endpoints: &[Endpoint]) -> Option<Paths> {
    let (peer, endpoint) = (peers.first()?, endpoints.first()?);
    Some(Paths::start(endpoint, &peer.node, &peer.addresses, peer.fingerprint))
}

pub(super) fn check_root(root: &Path) -> Result<(), Failure> {
    match std::fs::metadata(root) {
        Ok(meta) if meta.is_dir() => Ok(()),
        Ok(_) => Err(Failure::new(ExitCode::BadPath, format!("root {}: not a directory", root.display()))),
        Err(error) => Err(Failure::io(&format!("root {}", root.display()), &error)),
    }
}
