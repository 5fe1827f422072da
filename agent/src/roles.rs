//! What a node runs for its mirrors: a capture for each it is primary of, a standby for each it is standby of, and the links between.
//!
//! Owns every part; dropping it ends them in order. Does not read configuration files or speak to operators.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use twinbox_protocol::digest::DigestKey;
use twinbox_protocol::ids::{Epoch, Generation, Incarnation, Lsn, MirrorId};
use twinbox_protocol::lineage::Lineage;
use twinbox_resync::node::{MirrorState as History, NodeState, Role};
use twinbox_resync::schema::StateError;

use crate::capture::pulse::{STALLED_AFTER, Stage, Stall};
use crate::capture::watch::KERNEL_BYTES_PER_WATCH;
use crate::capture::{Capture, CaptureConfig, CaptureError, CaptureHandle};
use crate::config;
use crate::layout::{Grouping, Selection};
use crate::link::paths::Paths;
use crate::link::primary::{self, PeerLink};
use crate::link::standby::{Served, Server, Word};
use crate::net::{Endpoint, Fingerprint};
use crate::resync::serve::Lent;
use crate::standby::{Standby, StandbyConfig, StandbyError, StandbyHandle};
use crate::status::{
    LastError, Lsns, MirrorState, MirrorStatus, PeerStatus, Pending, Rates, Stalled, SyncProgress, Totals, Unreadable, Watches, rfc3339,
};

/// One mirror as configured.
#[derive(Clone)]
pub struct MirrorSpec {
    /// Name.
    pub name: String,
    /// Directory.
    pub root: PathBuf,
    /// Layout's name.
    pub layout: String,
    /// Role it begins in, when the node's state knows none.
    pub role: Role,
    /// What is mirrored.
    pub selection: Selection,
    /// Groups.
    pub grouping: Grouping,
    /// Take over what is in a standby's directory.
    pub adopt: bool,
    /// Compare everything this often.
    pub sweep: Option<Duration>,
    /// Send a group that could not be cut for this long as it is read.
    pub fuzzy_after: Option<Duration>,
    /// What has the mail server take in what only it can; as the configuration says now.
    pub tool: SharedTool,
}

/// May be given another one while it runs.
pub type SharedTool = Arc<std::sync::RwLock<Option<crate::hooks::Tool>>>;

/// The other node.
#[derive(Clone, PartialEq, Eq)]
pub struct PeerSpec {
    /// Name.
    pub node: String,
    /// Where it listens.
    pub addresses: Vec<SocketAddr>,
    /// Its key.
    pub fingerprint: Fingerprint,
}

/// Bounds.
#[derive(Clone, Copy)]
pub struct Bounds {
    /// Bytes in flight of one mirror.
    pub window_bytes: usize,
    /// Dirty paths kept.
    pub dirty_max: usize,
    /// Redo log on a standby.
    pub redo_max: u64,
}

impl Default for Bounds {
    fn default() -> Self {
        Bounds { window_bytes: 32 << 20, dirty_max: 200_000, redo_max: 1 << 30 }
    }
}

/// Why a node cannot start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RoleError {
    /// Primary side.
    #[error("mirror `{mirror}`: {source}")]
    Capture {
        /// Which.
        mirror: String,
        /// Why.
        source: CaptureError,
    },
    /// Standby side.
    #[error("mirror `{mirror}`: {source}")]
    Standby {
        /// Which.
        mirror: String,
        /// Why.
        source: StandbyError,
    },
    /// `state.db`.
    #[error(transparent)]
    State(#[from] StateError),
    /// Randomness.
    #[error("no randomness from the kernel: {0}")]
    Random(rustix::io::Errno),
    /// Another directory lies under the mirror's path than the state was made for.
    #[error(
        "mirror `{mirror}`: {path} is not the directory this state was made for (another file system mounted, or the directory made anew): put the right one back, or take this one over with --adopt; nothing was changed",
        path = path.display()
    )]
    OtherRoot {
        /// Which.
        mirror: String,
        /// Where.
        path: PathBuf,
    },
    /// The state directory was made on another machine.
    #[error(
        "this state directory was made on another machine (its machine-id differs): a copied state must not run twice; set this node up anew with `twinbox init`, or take it over with --adopt"
    )]
    OtherMachine {},
    /// Making directories.
    #[error("state directory {path}: {source}", path = path.display())]
    Dir {
        /// Which.
        path: PathBuf,
        /// The system's words.
        source: std::io::Error,
    },
}

/// Random bytes from the kernel.
///
/// # Errors
/// The system's.
pub fn random<const N: usize>() -> Result<[u8; N], RoleError> {
    let mut bytes = [0; N];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()).map_err(RoleError::Random)?;
    Ok(bytes)
}

/// Notes which directory and machine the state is made for, and refuses any other until it is adopted.
pub(crate) fn bind_root(state: &NodeState, spec: &MirrorSpec) -> Result<(), RoleError> {
    use std::os::unix::fs::MetadataExt;
    let Ok(meta) = std::fs::metadata(&spec.root) else { return Ok(()) }; // Said by whoever opens it.
    let made = meta.created().ok().and_then(|t| t.duration_since(SystemTime::UNIX_EPOCH).ok()).map_or(0, |d| d.as_nanos());
    let identity = format!("{}:{made}", meta.ino());
    let key = format!("root:{}", spec.name);
    match state.value(&key)? {
        Some(known) if known != identity && !spec.adopt => {
            return Err(RoleError::OtherRoot { mirror: spec.name.clone(), path: spec.root.clone() });
        }
        Some(known) if known == identity => {}
        _ => state.set_value(&key, &identity)?,
    }
    let machine = std::fs::read_to_string("/etc/machine-id").map(|id| id.trim().to_owned()).unwrap_or_default();
    match state.value("machine-id")? {
        Some(known) if !machine.is_empty() && known != machine && !spec.adopt => Err(RoleError::OtherMachine {}),
        Some(known) if known == machine => Ok(()),
        _ if machine.is_empty() => Ok(()),
        _ => Ok(state.set_value("machine-id", &machine)?),
    }
}

/// Where a mirror's own state lies: manifest, redo log, staging, rescue.
pub(crate) fn mirror_dir(state_dir: &std::path::Path, mirror: &str) -> PathBuf {
    state_dir.join("mirrors").join(mirror)
}

struct Primary {
    spec: MirrorSpec,
    history: History,
    link: Arc<Mutex<PeerLink>>,
    paths: Vec<Arc<Paths>>,
    task: Option<JoinHandle<()>>,
    rates: Mutex<RateMeter>,
    capture: Capture,
}

struct Replica {
    spec: MirrorSpec,
    served: Arc<Served>,
    standby: Option<Standby>,
    rates: Mutex<RateMeter>,
    /// Last durable position, and since when it is.
    moved: Mutex<(Lsn, Instant)>,
}

impl Replica {
    /// For how long no txn came of a primary that is connected, when that is too long: it sends a canary every second.
    fn silent(&self) -> Option<Duration> {
        let (now, status) = (Instant::now(), self.served.handle.status());
        let connected = self.served.seen.lock().is_ok_and(|seen| seen.connected);
        let mut moved = self.moved.lock().ok()?;
        if moved.0 != status.durable.lsn || !connected || !status.complete {
            *moved = (status.durable.lsn, now);
        }
        Some(now.duration_since(moved.1)).filter(|lasts| *lasts > STALLED_AFTER)
    }
}

/// A mirror this node was primary of, until it has been resynced.
struct Returning {
    spec: MirrorSpec,
    history: History,
    progress: ReturnProgress,
}

/// What runs of a mirror.
pub(crate) enum Running {
    /// Its primary.
    Primary {
        /// Speaks to its capture.
        capture: CaptureHandle,
        /// The mirror.
        mirror_id: MirrorId,
        /// The way to the standby.
        paths: Option<Arc<Paths>>,
    },
    /// Its standby.
    Standby(StandbyHandle),
}

/// How far a resync is; `None` while there is none.
pub type ReturnProgress = Arc<Mutex<Option<SyncProgress>>>;

/// All mirrors of a node, running.
pub struct Roles {
    primaries: Vec<Primary>,
    replicas: Vec<Replica>,
    servers: Vec<JoinHandle<()>>,
    server: Option<Arc<Server>>,
    order: Vec<String>,
    state_dir: PathBuf,
    returning: Vec<Returning>,
    words: Option<mpsc::Receiver<Word>>,
}

impl Roles {
    /// Starts everything. `endpoints`: the first dials; all listen.
    ///
    /// # Errors
    /// [`RoleError`]: nothing is running then.
    pub fn start(
        node: &str,
        state_dir: &std::path::Path,
        mirrors: Vec<MirrorSpec>,
        peers: &[PeerSpec],
        endpoints: &[Endpoint],
        bounds: Bounds,
    ) -> Result<Self, RoleError> {
        let state = NodeState::open(state_dir)?;
        let incarnation = Incarnation(random()?);
        let order = mirrors.iter().map(|m| m.name.clone()).collect();
        let mut roles = Roles {
            primaries: vec![],
            replicas: vec![],
            servers: vec![],
            server: None,
            order,
            state_dir: state_dir.into(),
            returning: vec![],
            words: None,
        };
        for spec in mirrors {
            let mirror_dir = mirror_dir(state_dir, &spec.name);
            std::fs::create_dir_all(&mirror_dir).map_err(|source| RoleError::Dir { path: mirror_dir.clone(), source })?;
            let known = state.mirror(&spec.name)?;
            bind_root(&state, &spec)?;
            if let Some(history) = known.as_ref().filter(|known| crate::switch::is_returning(state_dir, &spec.name, known.role)) {
                roles.returning.push(Returning { spec, history: history.clone(), progress: Arc::default() });
                continue;
            }
            match known.as_ref().map_or(spec.role, |k| k.role) {
                Role::Primary => {
                    let history = match known {
                        Some(history) => history,
                        None => {
                            let history = History {
                                mirror_id: MirrorId(random()?),
                                role: Role::Primary,
                                lineage: Lineage::begin(Generation(random()?), node),
                                epoch: Epoch(1),
                                digest_key: DigestKey(random()?),
                                reserved: Lsn::ZERO,
                                complete: false,
                            };
                            state.set_mirror(&spec.name, &history)?;
                            history
                        }
                    };
                    let config = CaptureConfig {
                        name: spec.name.clone(),
                        node: node.into(),
                        root: spec.root.clone(),
                        state_dir: state_dir.into(),
                        mirror_dir,
                        selection: spec.selection.clone(),
                        grouping: spec.grouping.clone(),
                        layout: spec.layout.clone(),
                        known: history.clone(),
                        incarnation,
                        window_bytes: bounds.window_bytes,
                        dirty_max: bounds.dirty_max,
                        sweep: spec.sweep,
                        fuzzy_after: spec.fuzzy_after,
                    };
                    let mirror = spec.name.clone();
                    let capture = Capture::start(config).map_err(|source| RoleError::Capture { mirror, source })?;
                    let link = Arc::default();
                    roles.primaries.push(Primary { spec, history, link, paths: vec![], task: None, rates: Mutex::default(), capture });
                }
                Role::Standby => {
                    // Of a resync that is through.
                    let _ = std::fs::remove_file(mirror_dir.join(crate::resync::work::PLAN));
                    let (state_dir, name) = (state_dir.to_path_buf(), spec.name.clone());
                    let config = StandbyConfig {
                        mirror: spec.name.clone(),
                        root: spec.root.clone(),
                        state_dir: mirror_dir,
                        adopt: spec.adopt,
                        redo_max_bytes: bounds.redo_max,
                        on_complete: Box::new(move |complete| {
                            if let Err(error) = NodeState::open(&state_dir).and_then(|node| node.set_complete(&name, complete)) {
                                tracing::error!(mirror = %name, %error, "cannot note that the first sync is complete");
                            }
                        }),
                    };
                    let mirror = spec.name.clone();
                    let standby = Standby::start(config, known.as_ref()).map_err(|source| RoleError::Standby { mirror, source })?;
                    let served = Arc::new(Served { handle: standby.handle(), seen: Mutex::default() });
                    let moved = Mutex::new((Lsn::ZERO, Instant::now()));
                    roles.replicas.push(Replica { spec, served, standby: Some(standby), rates: Mutex::default(), moved });
                }
            }
        }
        roles.connect(peers, endpoints);
        roles.serve(node, incarnation, state_dir, endpoints);
        Ok(roles)
    }

    /// Starts those of `mirrors` that this node is standby of, and nothing else.
    ///
    /// # Errors
    /// [`RoleError`]: nothing is running then.
    pub fn start_standbys(
        node: &str,
        state_dir: &std::path::Path,
        mut mirrors: Vec<MirrorSpec>,
        endpoints: &[Endpoint],
        bounds: Bounds,
    ) -> Result<Self, RoleError> {
        let state = NodeState::open(state_dir)?;
        let mut standby = vec![];
        for spec in mirrors.drain(..) {
            if state.mirror(&spec.name)?.map_or(spec.role, |known| known.role) == Role::Standby {
                standby.push(spec);
            }
        }
        Self::start(node, state_dir, standby, &[], endpoints, bounds)
    }

    /// Dials the peers anew (after a reload or a pairing).
    pub fn connect(&mut self, peers: &[PeerSpec], endpoints: &[Endpoint]) {
        let Some(endpoint) = endpoints.first() else { return };
        let paths: Vec<Arc<Paths>> =
            peers.iter().map(|peer| Arc::new(Paths::start(endpoint, &peer.node, &peer.addresses, peer.fingerprint))).collect();
        for primary in &mut self.primaries {
            if let Some(task) = primary.task.take() {
                task.abort();
            }
            primary.paths.clone_from(&paths);
            if let Some(first) = paths.first() {
                let (capture, link) = (primary.capture.handle(), primary.link.clone());
                primary.task = Some(tokio::spawn(primary::run(primary.spec.name.clone(), first.clone(), capture, link)));
            }
        }
    }

    fn serve(&mut self, node: &str, incarnation: Incarnation, state_dir: &std::path::Path, endpoints: &[Endpoint]) {
        let mirrors: HashMap<String, Arc<Served>> = self.replicas.iter().map(|r| (r.spec.name.clone(), r.served.clone())).collect();
        let lent = |p: &Primary| Lent {
            root: p.spec.root.clone(),
            mirror_dir: mirror_dir(state_dir, &p.spec.name),
            selection: p.spec.selection.clone(),
            grouping: p.spec.grouping.clone(),
            name: p.spec.name.clone(),
            tool: p.spec.tool.clone(),
            alone: Arc::default(),
        };
        let lent = self.primaries.iter().map(|p| (p.spec.name.clone(), lent(p))).collect();
        let (words, told) = mpsc::channel(16);
        self.words = Some(told);
        let server = Arc::new(Server::new(node.into(), incarnation, state_dir.into(), mirrors, lent, words));
        self.server = Some(server.clone());
        for endpoint in endpoints {
            let (endpoint, server) = (endpoint.clone(), server.clone());
            self.servers.push(tokio::spawn(async move {
                while let Some(incoming) = endpoint.accept().await {
                    tokio::spawn(server.clone().serve(incoming));
                }
            }));
        }
    }

    /// What other nodes have said about roles since this was asked last.
    pub fn words(&mut self) -> Vec<Word> {
        std::iter::from_fn(|| self.words.as_mut().and_then(|told| told.try_recv().ok())).collect()
    }

    /// The captures, by mirror.
    #[must_use]
    pub fn captures(&self) -> Vec<(String, CaptureHandle)> {
        self.primaries.iter().map(|p| (p.spec.name.clone(), p.capture.handle())).collect()
    }

    /// Mirrors in which something hangs: name, stage, for how long.
    #[must_use]
    pub fn stalls(&self) -> Vec<(String, Stage, Duration)> {
        let primaries = self.primaries.iter().filter_map(|p| Some((p.spec.name.clone(), p.capture.handle().stall()?)));
        let primaries = primaries.map(|(name, stall)| (name, stall.stage, stall.lasts));
        let replicas = self.replicas.iter().filter_map(|r| Some((r.spec.name.clone(), Stage::Link, r.silent()?)));
        primaries.chain(replicas).collect()
    }

    /// What fences go by; roots and roles do not change while a node runs.
    #[must_use]
    pub fn fences(&self) -> crate::fences::Fences {
        let primaries = self.primaries.iter().map(|p| (p.spec.name.clone(), p.spec.root.clone(), Some(p.capture.handle())));
        let replicas = self.replicas.iter().map(|r| (r.spec.name.clone(), r.spec.root.clone(), None));
        let returning = self.returning.iter().map(|r| (r.spec.name.clone(), r.spec.root.clone(), None));
        crate::fences::Fences::new(primaries.chain(replicas).chain(returning))
    }

    /// Where a resync of a mirror says how far it is; `None`: this node does not come back to it.
    #[must_use]
    pub fn returning(&self, mirror: &str) -> Option<ReturnProgress> {
        self.returning.iter().find(|returning| returning.spec.name == mirror).map(|returning| returning.progress.clone())
    }

    /// What runs of a mirror; `None`: this node comes back to it.
    #[must_use]
    pub(crate) fn running(&self, mirror: &str) -> Option<Running> {
        let primary = self.primaries.iter().find(|p| p.spec.name == mirror).map(|p| Running::Primary {
            capture: p.capture.handle(),
            mirror_id: p.history.mirror_id,
            paths: p.paths.first().cloned(),
        });
        let standby = || self.replicas.iter().find(|r| r.spec.name == mirror).map(|r| Running::Standby(r.served.handle.clone()));
        primary.or_else(standby)
    }

    /// The standbys, by mirror.
    #[must_use]
    pub fn standbys(&self) -> Vec<(String, StandbyHandle)> {
        self.replicas.iter().map(|r| (r.spec.name.clone(), r.served.handle.clone())).collect()
    }

    /// Takes over what may change while running: exclusions and groups.
    pub fn reselect(&self, mirrors: &[MirrorSpec]) {
        for spec in mirrors {
            if let Some(primary) = self.primaries.iter().find(|p| p.spec.name == spec.name) {
                let choice = Box::new((spec.selection.clone(), spec.grouping.clone()));
                primary.capture.handle().send(crate::capture::Command::Reselect(choice));
            }
        }
    }

    /// Ends sessions, then captures, then standbys with a last checkpoint.
    pub fn stop(&mut self) {
        // Before their links: a capture that goes on without a standby would begin a history that nobody hears of.
        for primary in &self.primaries {
            primary.capture.handle().send(crate::capture::Command::Stop);
        }
        for primary in &mut self.primaries {
            if let Some(task) = primary.task.take() {
                task.abort();
            }
        }
        self.servers.drain(..).for_each(|task| task.abort());
        if let Some(server) = self.server.take() {
            server.close();
        }
        self.primaries.clear();
        for replica in &mut self.replicas {
            if let Some(standby) = replica.standby.take() {
                standby.stop();
            }
        }
    }

    /// What each mirror says of itself, in configured order.
    #[must_use]
    pub fn status(&self) -> Vec<MirrorStatus> {
        let replicas = self.replicas.iter().map(|r| replica_status(r, &self.state_dir));
        let mut all: Vec<MirrorStatus> =
            self.primaries.iter().map(primary_status).chain(replicas).chain(self.returning.iter().map(returning_status)).collect();
        all.sort_by_key(|m| self.order.iter().position(|name| *name == m.name));
        all
    }
}

impl Drop for Roles {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Differences over the last seconds.
#[derive(Default)]
struct RateMeter {
    last: Option<(Instant, [u64; 3])>,
    rates: Rates,
}

impl RateMeter {
    fn rates(&mut self, counts: [u64; 3]) -> Rates {
        let now = Instant::now();
        match self.last {
            Some((at, before)) if now.duration_since(at) >= Duration::from_millis(500) => {
                let seconds = now.duration_since(at).as_secs_f64();
                let per_s = |i: usize| (counts[i].saturating_sub(before[i])) as f64 / seconds;
                self.rates = Rates { txns_per_s: per_s(0), bytes_per_s: per_s(1), wire_bytes_per_s: per_s(2) };
                self.last = Some((now, counts));
            }
            Some(_) => {}
            None => self.last = Some((now, counts)),
        }
        self.rates
    }
}

impl MirrorStatus {
    /// Of a mirror of which nothing runs on this node.
    pub(crate) fn idle(spec: &MirrorSpec, history: &History, role: config::Role, state: MirrorState, message: String) -> Self {
        let now = rfc3339(SystemTime::now());
        MirrorStatus {
            name: spec.name.clone(),
            role,
            state,
            layout: spec.layout.clone(),
            root: spec.root.display().to_string(),
            epoch: history.epoch.0,
            generation: history.lineage.generation().to_string(),
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
            sync: None,
            last_error: Some(LastError { at: now, message }),
            unprotected_since: None,
            verify: None,
        }
    }
}

fn last_error(found: Option<(SystemTime, String)>) -> Option<LastError> {
    found.map(|(at, message)| LastError { at: rfc3339(at), message })
}

fn primary_status(primary: &Primary) -> MirrorStatus {
    let handle = primary.capture.handle();
    let now = handle.status();
    let link = primary.link.lock().map(|l| l.clone()).unwrap_or_default();
    let wire = primary.paths.first().map(|p| p.wire()).unwrap_or_default();
    let stall = handle.stall();
    let state = match () {
        () if link.diverged => MirrorState::Diverged,
        () if stall.is_some() => MirrorState::Unprotected,
        () if now.protected => MirrorState::Protected,
        () if now.connected => MirrorState::Syncing,
        () => MirrorState::Unprotected,
    };
    let peers = primary
        .paths
        .iter()
        .enumerate()
        .map(|(at, paths)| PeerStatus {
            node: paths.node().into(),
            addresses: paths.addresses(),
            connected: at == 0 && now.connected,
            durable: if at == 0 { link.durable.map(|l| l.0) } else { None },
            applied: if at == 0 { link.applied.map(|l| l.0) } else { None },
            clock_skew_ms: if at == 0 { link.skew_ms } else { None },
            version: if at == 0 { link.version.clone() } else { None },
        })
        .collect();
    let rates = primary.rates.lock().map(|mut r| r.rates([now.txns, now.bytes, wire.0 + wire.1])).unwrap_or_default();
    let error = last_error(now.last_error.clone()).or_else(|| {
        let message = link.refused.clone().or(link.last_error.clone())?;
        Some(LastError { at: rfc3339(SystemTime::now()), message })
    });
    MirrorStatus {
        name: primary.spec.name.clone(),
        role: config::Role::Primary,
        state,
        layout: primary.spec.layout.clone(),
        root: primary.spec.root.display().to_string(),
        epoch: primary.history.epoch.0,
        generation: now.generation.unwrap_or_else(|| primary.history.lineage.generation()).to_string(),
        lsn: Lsns { captured: now.lsn.0.0, durable: now.lsn.1.0, applied: now.lsn.2.0 },
        lag_ms: Some(now.lag_ms),
        bound_ms: now.bound_ms,
        pending: Pending { paths: now.pending_paths, bytes: now.pending_bytes },
        peers,
        rates,
        totals: Totals { wire_sent: wire.0, wire_received: wire.1, txns: now.txns, files: now.files },
        watches: Watches { count: now.watches, kernel_bytes: now.watches * KERNEL_BYTES_PER_WATCH },
        fuzzy_cuts: now.fuzzy_cuts,
        unreadable: Unreadable {
            count: now.unreadable.len() as u64,
            sample: now.unreadable.iter().take(10).map(|(path, why)| format!("{path}: {why}")).collect(),
        },
        lost_metadata: BTreeMap::new(),
        sync: (state == MirrorState::Syncing || now.scanning).then(|| SyncProgress {
            phase: if now.complete { "checking" } else { "copying" }.into(),
            files_done: now.files,
            files_total: None,
            bytes_done: now.bytes,
            bytes_total: None,
            eta_s: None,
        }),
        last_error: error,
        unprotected_since: match (state, stall) {
            (MirrorState::Protected, _) => None,
            (_, Some(stall)) if now.protected => SystemTime::now().checked_sub(stall.lasts).map(rfc3339),
            _ => now.unprotected_since.map(rfc3339),
        },
        stalled: stall.map(stalled),
        warnings: now.warnings.clone(),
        verify: None,
    }
}

fn returning_status(returning: &Returning) -> MirrorStatus {
    let Returning { spec, history, progress } = returning;
    let message = format!(
        "this node was primary, and another was promoted after it: what is here alone is neither merged nor kept yet. `twinbox resync plan --mirror {0}` shows it, `twinbox resync apply --mirror {0}` does it",
        spec.name
    );
    MirrorStatus {
        sync: progress.lock().map(|progress| progress.clone()).unwrap_or_default(),
        ..MirrorStatus::idle(spec, history, config::Role::Standby, MirrorState::Diverged, message)
    }
}

fn replica_status(replica: &Replica, state_dir: &std::path::Path) -> MirrorStatus {
    let now = replica.served.handle.status();
    let seen = replica.served.seen.lock().map(|s| s.clone()).unwrap_or_default();
    let silent = replica.silent();
    let history = NodeState::open(state_dir).ok().and_then(|node| node.mirror(&replica.spec.name).ok().flatten());
    let state = match () {
        () if seen.diverged.is_some() => MirrorState::Diverged,
        () if !seen.connected || silent.is_some() => MirrorState::Unprotected,
        () if now.complete => MirrorState::Protected,
        () => MirrorState::Syncing,
    };
    let peers = seen
        .peer
        .iter()
        .map(|(node, version, skew)| PeerStatus {
            node: node.clone(),
            addresses: vec![],
            connected: seen.connected,
            durable: None,
            applied: None,
            clock_skew_ms: Some(*skew),
            version: Some(version.clone()),
        })
        .collect();
    let rates = replica.rates.lock().map(|mut r| r.rates([now.txns, 0, 0])).unwrap_or_default();
    MirrorStatus {
        name: replica.spec.name.clone(),
        role: config::Role::Standby,
        state,
        layout: replica.spec.layout.clone(),
        root: replica.spec.root.display().to_string(),
        epoch: history.as_ref().map_or(0, |h| h.epoch.0),
        generation: history.map_or_else(String::new, |h| h.lineage.generation().to_string()),
        lsn: Lsns { captured: now.durable.lsn.0, durable: now.durable.lsn.0, applied: now.applied.0 },
        lag_ms: None,
        bound_ms: None,
        pending: Pending::default(),
        peers,
        rates,
        totals: Totals { txns: now.txns, files: now.files, ..Totals::default() },
        watches: Watches::default(),
        fuzzy_cuts: 0,
        unreadable: Unreadable::default(),
        lost_metadata: now.lost_metadata.clone(),
        sync: None,
        last_error: seen
            .diverged
            .map(|message| (SystemTime::now(), message))
            .map(|e| last_error(Some(e)))
            .unwrap_or(last_error(now.last_error)),
        unprotected_since: None,
        stalled: silent.map(|lasts| Stalled { stage: Stage::Link.as_str().into(), for_ms: lasts.as_millis() as u64 }),
        warnings: vec![],
        verify: None,
    }
}

fn stalled(stall: Stall) -> Stalled {
    Stalled { stage: stall.stage.as_str().into(), for_ms: stall.lasts.as_millis() as u64 }
}
