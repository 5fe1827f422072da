//! Both ends of a mirror in one process, joined by real QUIC with mutual TLS on loopback: what `mirror` and `demo` run.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use twinbox_resync::node::Role;

use crate::admin::StateLock;
use crate::capture::CaptureHandle;
use crate::exit::ExitCode;
use crate::failure::Failure;
use crate::glob::Glob;
use crate::heal;
use crate::layout::{Grouping, Layout, Selection};
use crate::link::paths::Paths;
use crate::net::{Endpoint, NodeKey, PinnedPeers, Tuning};
use crate::roles::{Bounds, MirrorSpec, PeerSpec, Roles};
use crate::standby::StandbyHandle;
use crate::status::MirrorStatus;

/// The replica is in this very process: without an answer something is broken.
const HEAL_WITHIN: std::time::Duration = std::time::Duration::from_secs(600);

/// A running pair.
pub struct LocalPair {
    primary: Roles,
    standby: Roles,
    _endpoints: Vec<Endpoint>,
    _lock: StateLock,
}

/// What to mirror where.
pub struct LocalSpec {
    /// From.
    pub source: PathBuf,
    /// To.
    pub replica: PathBuf,
    /// State of both ends.
    pub state: PathBuf,
    /// Layout.
    pub layout: Layout,
    /// Left out.
    pub exclude: Vec<Glob>,
    /// Take over what is in `replica`.
    pub adopt: bool,
}

fn real(path: &Path, what: &str) -> Result<PathBuf, Failure> {
    let real = std::fs::canonicalize(path).map_err(|error| Failure::io(&format!("{what} {}", path.display()), &error))?;
    if real.is_dir() { Ok(real) } else { Err(Failure::new(ExitCode::BadPath, format!("{what} {}: not a directory", path.display()))) }
}

/// Refuses places that lie in each other.
fn apart(a: &Path, b: &Path, a_is: &str, b_is: &str) -> Result<(), Failure> {
    let (x, y) = (a.display(), b.display());
    let why = match () {
        () if a == b => format!("{a_is} and {b_is} are the same directory ({x})"),
        () if a.starts_with(b) => format!("{a_is} {x} lies inside {b_is} {y}"),
        () if b.starts_with(a) => format!("{b_is} {y} lies inside {a_is} {x}"),
        () => return Ok(()),
    };
    Err(Failure::new(ExitCode::BadPath, format!("{why}: choose directories that do not contain each other")))
}

/// Before anything is shipped: what the source lost in a power cut comes back from the replica.
fn heal_source(state: &Path, spec: &MirrorSpec, dialler: &Endpoint, peer: &PeerSpec) -> Result<(), Failure> {
    let Some(job) = heal::need("primary", state, spec.clone(), false)? else { return Ok(()) };
    let paths = Paths::start(dialler, &peer.node, &peer.addresses, peer.fingerprint);
    let deadline = tokio::time::Instant::now() + HEAL_WITHIN;
    let runtime = tokio::runtime::Handle::current();
    let (_, done) = runtime.block_on(heal::until_healed(&job, Some(&paths), Some(deadline), |_| {}))?;
    if done.restored + done.replaced > 0 {
        eprintln!("After a power cut {} paths of {} came back from the replica.", done.restored + done.replaced, spec.root.display());
    }
    Ok(())
}

impl LocalPair {
    /// Starts both ends. `spec.state` and `spec.replica` are made when missing.
    ///
    /// # Errors
    /// [`Failure`] with one message.
    pub fn start(spec: &LocalSpec) -> Result<Self, Failure> {
        let source = real(&spec.source, "source")?;
        let made = !spec.replica.exists();
        if made {
            // Before anything is made: where would it be?
            let parent = spec.replica.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
            let parent = real(parent, "directory")?;
            apart(&source, &parent.join(spec.replica.file_name().unwrap_or_default()), "source", "replica")?;
            std::fs::create_dir(&spec.replica).map_err(|error| Failure::io(&format!("replica {}", spec.replica.display()), &error))?;
        }
        let replica = real(&spec.replica, "replica")?;
        apart(&source, &replica, "source", "replica")?;
        let state_failed = |error: std::io::Error| {
            let code = if error.kind() == std::io::ErrorKind::PermissionDenied { ExitCode::Permission } else { ExitCode::Io };
            Failure::new(code, format!("state directory {}: {error}; choose another with --state", spec.state.display()))
        };
        std::fs::create_dir_all(&spec.state).map_err(state_failed)?;
        let state = real(&spec.state, "state directory")?;
        for (root, what) in [(&source, "source"), (&replica, "replica")] {
            apart(&state, root, "state directory", what)?;
        }
        let lock = StateLock::acquire(&state)?;
        let (p, s) = (state.join("primary"), state.join("standby"));
        for dir in [&p, &s] {
            std::fs::create_dir_all(dir).map_err(state_failed)?;
        }
        let (pk, sk) = (NodeKey::load_or_create(&p.join("node.key"))?, NodeKey::load_or_create(&s.join("node.key"))?);
        let (p_pins, s_pins) = (PinnedPeers::new(), PinnedPeers::new());
        let pinned = p_pins.pin(sk.fingerprint(), "standby").and_then(|()| s_pins.pin(pk.fingerprint(), "primary"));
        pinned.map_err(|error| Failure::new(ExitCode::Failure, error.to_string()))?;
        let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let listener = Endpoint::bind(Some(loopback), sk.clone(), s_pins, Tuning::default())?;
        let dialler = Endpoint::bind(Some(loopback), pk, p_pins, Tuning::default())?;
        let addr = listener.local_addr().map_err(|error| Failure::io("loopback", &error))?;
        let mirror = |role, root: &Path| MirrorSpec {
            name: "mirror".into(),
            root: root.into(),
            layout: spec.layout.as_str().into(),
            role,
            selection: Selection::new(spec.layout, spec.exclude.clone()),
            grouping: Grouping::new(vec![]),
            adopt: spec.adopt,
            sweep: None,
            fuzzy_after: None,
            tool: std::sync::Arc::default(),
        };
        let bounds = Bounds::default();
        let peer = PeerSpec { node: "standby".into(), addresses: vec![addr], fingerprint: sk.fingerprint() };
        let standby = Roles::start("standby", &s, vec![mirror(Role::Standby, &replica)], &[], std::slice::from_ref(&listener), bounds)?;
        heal_source(&p, &mirror(Role::Primary, &source), &dialler, &peer)?;
        let primary = Roles::start("primary", &p, vec![mirror(Role::Primary, &source)], &[peer], std::slice::from_ref(&dialler), bounds)?;
        Ok(LocalPair { primary, standby, _endpoints: vec![listener, dialler], _lock: lock })
    }

    /// The capture.
    ///
    /// # Panics
    /// Never: a pair has one.
    #[must_use]
    pub fn capture(&self) -> CaptureHandle {
        self.primary.captures().swap_remove(0).1
    }

    /// The standby.
    #[must_use]
    pub fn standby(&self) -> StandbyHandle {
        self.standby.standbys().swap_remove(0).1
    }

    /// Status of the mirror, as its primary sees it, with what the standby lost.
    #[must_use]
    pub fn status(&self) -> Option<MirrorStatus> {
        let mut status = self.primary.status().pop()?;
        if let Some(standby) = self.standby.status().pop() {
            status.lost_metadata = standby.lost_metadata;
            status.last_error = status.last_error.or(standby.last_error);
        }
        Some(status)
    }

    /// Ends both, with a last checkpoint.
    pub fn stop(mut self) {
        self.primary.stop();
        self.standby.stop();
    }
}
