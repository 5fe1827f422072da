//! After a power cut of the primary: what its disk lost comes back from the standby, before the mail server starts and before anything is shipped. See ARCHITECTURE §6a.
//!
//! [`need`] says whether a mirror is to be healed (`boot`: is this another boot?), [`heal`] does it once over a connection: `remote` speaks to the standby, `work` goes through the
//! paths, `disk` looks at one, `judge` decides (a pure function). [`until_healed`] does it again until it is done, `waiting` beside a running agent. Does not start captures; those refuse to start before ([`needs_heal`]).

mod boot;
#[cfg(test)]
pub(crate) mod by_hand;
mod disk;
mod judge;
pub mod remote;
mod touched;
pub mod waiting;
mod work;

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;
use tokio::time::Instant;
use twinbox_protocol::PROTOCOL_VERSION;
use twinbox_protocol::chunk::CHUNKER;
use twinbox_protocol::digest::Digest;
use twinbox_protocol::entry::{Entry, Time};
use twinbox_protocol::ids::{Incarnation, Lsn};
use twinbox_protocol::msg::{Hello, Position};
use twinbox_protocol::path::RelPath;
use twinbox_resync::manifest::Manifest;
use twinbox_resync::node::{LocalMark, MirrorState, NodeState, Role};
use twinbox_resync::rows::{Row, Rows};
use twinbox_resync::schema::StateError;

pub use boot::boot_id;
pub use remote::RemoteError;
use remote::{Greeting, Remote, Waiting};
use touched::Touched;
pub use work::{Done, WorkError};

use crate::capture::engine::wall_ns;
use crate::layout::Selection;
use crate::link::paths::Paths;
use crate::roles::{MirrorSpec, RoleError};
use crate::standby::replica::Replica;
use crate::standby::rescue::Rescue;
use crate::tree::Root;

/// Pause after an attempt that failed.
const PAUSE: Duration = Duration::from_millis(500);
/// The same after one that went through everything and could not put all of it back,
const PAUSE_INCOMPLETE: Duration = Duration::from_secs(5);
/// and how many of those: the standby may have been short of something. After that a person is needed.
const TRIES_INCOMPLETE: u32 = 6;
/// The standby's rows, while a heal runs.
const SCRATCH: &str = "heal.db";

/// Why a mirror is not healed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HealError {
    /// No standby in time.
    #[error(
        "mirror `{mirror}`: after a power cut nobody can tell what this disk lacks without the standby ({why}); bring it back and run `twinbox heal` again"
    )]
    NoStandby {
        /// Which.
        mirror: String,
        /// Last word.
        why: String,
    },
    /// The standby, or what it said.
    #[error("mirror `{mirror}`: {source}")]
    Remote {
        /// Which.
        mirror: String,
        /// Why.
        source: RemoteError,
    },
    /// This node.
    #[error("mirror `{mirror}`: {source}")]
    Work {
        /// Which.
        mirror: String,
        /// Why.
        source: WorkError,
    },
    /// The root, or the state, is another's.
    #[error(transparent)]
    Role(#[from] RoleError),
    /// `state.db`.
    #[error(transparent)]
    State(#[from] StateError),
    /// The standby has more of it than could be put back.
    #[error(
        "mirror `{mirror}`: {paths} paths could not be put back (the log says why, --log-level debug names them); until they are, nothing is shipped, since it would remove them on the standby too. Mend it, on the standby or here, and run `twinbox heal` again; `twinbox heal --force-incomplete` does without them"
    )]
    Incomplete {
        /// Which.
        mirror: String,
        /// How many.
        paths: u64,
    },
    /// Which boot this is.
    #[error("the kernel's boot id cannot be read: {0}")]
    Boot(std::io::Error),
}

impl HealError {
    /// Whether trying again by itself is of no use.
    #[must_use]
    pub fn is_final(&self) -> bool {
        match self {
            HealError::Remote { source, .. } => source.is_final(),
            HealError::Work { source: WorkError::Remote(source), .. } => source.is_final(),
            HealError::NoStandby { .. } | HealError::Incomplete { .. } => false,
            _ => true,
        }
    }
}

/// How it ended. An interface: names are only added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// Compared with the standby, and put right.
    Healed,
    /// The standby has nothing of this mirror that could be put back.
    Nothing,
}

/// A mirror that is to be healed.
pub struct Job {
    node: String,
    spec: MirrorSpec,
    state_dir: PathBuf,
    mirror_dir: PathBuf,
    history: MirrorState,
    boot: String,
    durable: Lsn,
    incomplete: bool,
    /// When the machine was started, if that is why.
    booted: Option<Time>,
}

/// Whether a mirror's disk may lack what was shipped. `known`: the last position of this node's manifest.
///
/// # Errors
/// [`StateError`], or the boot id cannot be read: nobody can tell then.
pub fn needs_heal(node: &NodeState, mirror: &str, boot: &str, known: Lsn) -> Result<bool, StateError> {
    // No mark at all: nothing was ever shipped by an agent that keeps one.
    Ok(node.local_mark(mirror)?.is_some_and(|mark| mark.is_torn(boot, known)))
}

/// Whether, and from where, this node's mirror is to be healed; `None`: not at all. `force`: although nothing says so.
///
/// # Errors
/// [`HealError`].
pub fn need(node: &str, state_dir: &Path, spec: MirrorSpec, force: bool) -> Result<Option<Job>, HealError> {
    let state = NodeState::open(state_dir)?;
    let Some(history) = state.mirror(&spec.name)?.filter(|history| history.role == Role::Primary) else { return Ok(None) };
    let boot = boot_id().map_err(HealError::Boot)?;
    let mirror_dir = crate::roles::mirror_dir(state_dir, &spec.name);
    let Some(mark) = state.local_mark(&spec.name)? else { return Ok(None) };
    if mark.boot == boot && !force {
        return Ok(None);
    }
    let known = known(&mirror_dir)?;
    if !force && !needs_heal(&state, &spec.name, &boot, known.as_ref().map_or(Lsn::ZERO, |(_, at)| at.lsn))? {
        return Ok(None);
    }
    match crate::roles::bind_root(&state, &MirrorSpec { adopt: false, ..spec.clone() }) {
        Err(RoleError::OtherRoot { .. }) if spec.adopt => {
            tracing::warn!(mirror = %spec.name, "another directory is taken over as it is: what the one before lost is not brought back");
            state.set_local_mark(&spec.name, &LocalMark { boot, ..mark })?;
            return Ok(None);
        }
        Err(RoleError::OtherMachine {}) if spec.adopt => crate::roles::bind_root(&state, &spec)?,
        bound => bound?,
    }
    if history.reserved <= mark.lsn {
        // No transaction was ever numbered above what is durable here (none at all, or none since this node was promoted), so the standby has nothing that this disk could lack.
        // What was written in place since, with no standby, can be new bytes under old times.
        if let Some((mut manifest, _)) = known {
            manifest.distrust_in_place().map_err(|e| manifest.state_error(&e))?;
        }
        state.set_local_mark(&spec.name, &LocalMark { boot, ..mark })?;
        return Ok(None);
    }
    // A mark that names no boot is of a disk that lost something in this one: nothing on it is known to be of after that.
    let booted = (!mark.boot.is_empty() && mark.boot != boot).then(boot::booted).transpose().map_err(HealError::Boot)?;
    Ok(Some(Job {
        node: node.into(),
        spec,
        state_dir: state_dir.into(),
        mirror_dir,
        history,
        boot,
        durable: mark.lsn,
        incomplete: false,
        booted,
    }))
}

/// This node's own manifest; `None` when it is damaged (the capture sets it aside) or not there.
fn known(mirror_dir: &Path) -> Result<Option<(Manifest, Position)>, StateError> {
    let path = mirror_dir.join("manifest.db");
    if !path.exists() {
        return Ok(None);
    }
    match Manifest::open(&path, false) {
        Err(error) if error.is_damage() => Ok(None),
        Err(error) => Err(error),
        Ok(manifest) => {
            let position = manifest.position().map_err(|e| manifest.state_error(&e))?;
            Ok(Some((manifest, position)))
        }
    }
}

impl Job {
    /// Name of the mirror.
    #[must_use]
    pub fn mirror(&self) -> &str {
        &self.spec.name
    }

    /// Everything up to here was on the disk before the cut.
    #[must_use]
    pub fn durable(&self) -> Lsn {
        self.durable
    }

    /// Does without what cannot be put back: what the standby has of it goes to `rescue`.
    pub fn accept_incomplete(&mut self) {
        self.incomplete = true;
    }

    /// Whether what was done is enough to ship from here on.
    fn is_enough(&self, done: &Done) -> Result<(), HealError> {
        match done.unrestored {
            0 => Ok(()),
            paths if self.incomplete => {
                tracing::error!(mirror = self.mirror(), paths, "paths could not be put back, as was accepted");
                Ok(())
            }
            paths => Err(HealError::Incomplete { mirror: self.spec.name.clone(), paths }),
        }
    }

    fn remote(&self, source: RemoteError) -> HealError {
        HealError::Remote { mirror: self.spec.name.clone(), source }
    }

    fn work(&self, source: WorkError) -> HealError {
        HealError::Work { mirror: self.spec.name.clone(), source }
    }

    fn hello(&self, known: Option<&(Manifest, Position)>) -> Result<Hello, HealError> {
        Ok(Hello {
            protocol: PROTOCOL_VERSION,
            software: env!("CARGO_PKG_VERSION").into(),
            node: self.node.clone(),
            mirror: self.spec.name.clone(),
            mirror_id: self.history.mirror_id,
            lineage: self.history.lineage.clone(),
            epoch: self.history.epoch,
            incarnation: Incarnation(crate::roles::random()?),
            position: known.map_or(Position::START, |(_, position)| *position),
            digest: known.map_or_else(Digest::default, |(manifest, _)| manifest.digest()),
            digest_key: self.history.digest_key,
            chunker: CHUNKER.into(),
            layout: self.spec.layout.clone(),
            wall_ns: wall_ns(),
        })
    }
}

/// Heals a mirror, once: waits for a connection, compares, puts right, and notes that this boot is healed.
///
/// # Errors
/// [`HealError`]: nothing was noted, and a later attempt begins again.
pub async fn heal(job: &Job, paths: &Paths, mut progress: impl FnMut(&Done) + Send) -> Result<(Outcome, Done), HealError> {
    let connection = paths.connection().await;
    let manifest = tokio::task::block_in_place(|| known(&job.mirror_dir))?;
    let hello = job.hello(manifest.as_ref())?;
    let mut remote = match Remote::greet(&connection, hello).await.map_err(|e| job.remote(e))? {
        Greeting::Holds(remote) => remote,
        Greeting::Nothing => {
            tracing::warn!(mirror = job.mirror(), "the standby has nothing of this mirror: nothing can be put back");
            note(job, job.durable)?;
            return Ok((Outcome::Nothing, Done::default()));
        }
    };
    let scratch = Scratch::new(&job.mirror_dir);
    let mut pulled = scratch.open()?;
    let rows = remote.rows(job.durable, |path, entry| take_row(&mut pulled, &path, entry));
    let position = rows.await.map_err(|error| job.work(error))?;
    let runtime = tokio::runtime::Handle::current();
    let manifest = manifest.map(|(manifest, _)| manifest);
    let source = Waiting { runtime, remote };
    let done = tokio::task::block_in_place(|| put_back(job, manifest, pulled, position, source, &mut progress))?;
    Ok((Outcome::Healed, done))
}

/// One of the standby's rows; `None`: the path is gone there.
fn take_row(pulled: &mut Manifest, path: &RelPath, entry: Option<Entry>) -> Result<(), WorkError> {
    match entry {
        None => pulled.set_gone(path).map_err(|e| WorkError::State(pulled.state_error(&e))),
        Some(entry) => pulled.set(path, Some(Row { entry, local: None })).map_err(WorkError::Rows),
    }
}

/// With the standby's rows as of `position`: compares, puts right, and notes that this boot is healed.
fn put_back<S: remote::Source>(
    job: &Job,
    manifest: Option<Manifest>,
    pulled: Manifest,
    position: Position,
    source: S,
    progress: &mut dyn FnMut(&Done),
) -> Result<Done, HealError> {
    let root = Root::open(&job.spec.root).map_err(|e| job.work(e.into()))?;
    let (selection, incomplete, booted) = (&job.spec.selection, job.incomplete, job.booted);
    let touched = Touched::open(&job.mirror_dir, &job.boot).map_err(|e| job.work(e.into()))?;
    let work = Plan { root, manifest, pulled, selection, mirror_dir: &job.mirror_dir, source, incomplete, booted, touched };
    let done = run(work, progress).map_err(|error| job.work(error))?;
    job.is_enough(&done)?;
    note(job, position.lsn.max(job.durable))?;
    Touched::forget(&job.mirror_dir);
    Ok(done)
}

/// What a heal works on.
struct Plan<'a, S> {
    root: Root,
    manifest: Option<Manifest>,
    pulled: Manifest,
    selection: &'a Selection,
    mirror_dir: &'a Path,
    source: S,
    incomplete: bool,
    booted: Option<Time>,
    touched: Touched,
}

fn run<S: remote::Source>(plan: Plan<'_, S>, progress: &mut dyn FnMut(&Done)) -> Result<Done, WorkError> {
    let Plan { root, manifest, pulled, selection, mirror_dir, source, incomplete, booted, touched } = plan;
    let mut replica = Replica::new(root);
    replica.synced = true;
    let mut work = work::Work {
        replica,
        manifest,
        pulled,
        selection,
        mirror_dir,
        source,
        done: Done::default(),
        progress,
        rescue: Rescue::new(mirror_dir),
        links: Default::default(),
        kept: Default::default(),
        listing: None,
        missing: Default::default(),
        incomplete,
        booted,
        touched,
        cleared: Default::default(),
        read_again: Default::default(),
    };
    work.run()?;
    Ok(work.done)
}

/// This boot is healed, and everything up to `lsn` is on the disk: the last write of a heal.
fn note(job: &Job, lsn: Lsn) -> Result<(), StateError> {
    let state = NodeState::open(&job.state_dir)?;
    // A state that was put back from a copy does not know which numbers were used since.
    state.reserve(job.mirror(), lsn)?;
    state.set_local_mark(job.mirror(), &LocalMark { boot: job.boot.clone(), lsn, clean: false })
}

/// The scratch database, removed before and after.
struct Scratch(PathBuf);

impl Scratch {
    fn new(dir: &Path) -> Self {
        let scratch = Scratch(dir.join(SCRATCH));
        scratch.remove();
        scratch
    }

    fn open(&self) -> Result<Manifest, StateError> {
        let pulled = Manifest::open(&self.0, true)?;
        pulled.begin().map_err(|e| pulled.state_error(&e))?;
        Ok(pulled)
    }

    fn remove(&self) {
        for suffix in ["db", "db-wal", "db-shm"] {
            let _ = std::fs::remove_file(self.0.with_extension(suffix));
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Heals a mirror, again and again until it is healed, refused for good, or `deadline` has passed. `paths`: the standby's, if any is known.
///
/// # Errors
/// [`HealError`].
pub async fn until_healed(
    job: &Job,
    paths: Option<&Paths>,
    deadline: Option<Instant>,
    mut progress: impl FnMut(&Done) + Send,
) -> Result<(Outcome, Done), HealError> {
    let mut why = match paths {
        Some(_) => "it does not answer".to_owned(),
        None => "no [[peer]] with a key is configured".into(),
    };
    let (mut incomplete, mut tries) = (None, 0);
    let all = async {
        let Some(paths) = paths else { return std::future::pending().await };
        loop {
            let error = match heal(job, paths, &mut progress).await {
                Err(error) if !error.is_final() => error,
                ended => return ended,
            };
            tracing::warn!(mirror = job.mirror(), %error, "heal begins again");
            why = error.to_string();
            let mut pause = PAUSE;
            if let HealError::Incomplete { mirror, paths } = error {
                (pause, tries) = (PAUSE_INCOMPLETE, tries + 1);
                if tries == TRIES_INCOMPLETE {
                    return Err(HealError::Incomplete { mirror, paths });
                }
                incomplete = Some(paths);
            } else {
                incomplete = None;
            }
            tokio::time::sleep_until(Instant::now() + pause).await;
        }
    };
    let ended = match deadline {
        None => Some(all.await),
        Some(at) => tokio::time::timeout_at(at, all).await.ok(),
    };
    if let (None, Some(paths)) = (&ended, incomplete) {
        return Err(HealError::Incomplete { mirror: job.mirror().into(), paths });
    }
    ended.unwrap_or_else(|| Err(HealError::NoStandby { mirror: job.mirror().into(), why: addresses(paths).unwrap_or(why) }))
}

/// What dialling came to, for a message.
fn addresses(paths: Option<&Paths>) -> Option<String> {
    let all = paths?.addresses();
    if all.iter().any(|address| address.connected) {
        return None;
    }
    all.into_iter().find_map(|address| address.last_error)
}

#[cfg(test)]
mod tests;
