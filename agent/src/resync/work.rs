//! What the returning node does: learns what both had at the fork, finds what it has alone, has it merged, keeps the rest in rescue, and makes its rows say what its disk has.
//!
//! Repeatable at every step: the plan is stored before the first change and found again after a crash, each change on the other node can be made twice, a file that is in rescue is not there any more, rows and
//! role are one write each. Until the last of them nothing of the mirror runs on this node.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::fs as rfs;
use serde::{Deserialize, Serialize};
use twinbox_protocol::PROTOCOL_VERSION;
use twinbox_protocol::chunk::CHUNKER;
use twinbox_protocol::entry::Entry;
use twinbox_protocol::ids::{ContentHash, Epoch, Incarnation, Lsn};
use twinbox_protocol::lineage::{Lineage, Meeting, Relation, Side, meet, relate};
use twinbox_protocol::msg::{Hello, Position, Replica as Holding, Welcome};
use twinbox_protocol::path::RelPath;
use twinbox_protocol::rejoin::{Changes, Merge, Merged, Task};
use twinbox_resync::manifest::Manifest;
use twinbox_resync::node::{MirrorState, NodeState, Role};
use twinbox_resync::reconcile::{Item, Mail, Outcome, Plan, Policy, What, questions, reconcile};
use twinbox_resync::rows::{Row, RowError, Rows};
use twinbox_resync::schema::StateError;

use super::boxes;
use super::remote::Remote;
pub use super::remote::RemoteError;
use super::report;
use super::tail::{Differs, TailError, differences, tail};
use crate::capture::engine::wall_ns;
use crate::roles::{MirrorSpec, mirror_dir};
use crate::standby::copy;
use crate::standby::replica::Replica;
use crate::standby::rescue::{Rescue, Why};
use crate::tree::Root;

/// How often it is stored while items are merged.
const SAVE_EVERY: Duration = Duration::from_secs(1);
/// The plan under way, in the mirror's directory.
pub(crate) const PLAN: &str = "resync.json";

/// Why a node is not a standby in sync yet.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ResyncError {
    /// The other node.
    #[error(transparent)]
    Remote(#[from] RemoteError),
    /// This disk.
    #[error(transparent)]
    Tail(#[from] TailError),
    /// Rows or roles.
    #[error(transparent)]
    State(#[from] StateError),
    /// A row.
    #[error("{0}")]
    Rows(#[from] RowError),
    /// Files of the state, or rescue.
    #[error("{what}: {source}")]
    Io {
        /// What was done.
        what: String,
        /// The system's words.
        source: std::io::Error,
    },
    /// It cannot be, as things are.
    #[error("{0}")]
    Refused(String),
}

/// What was decided, before any of it was done.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Stored {
    pub(super) other: String,
    pub(super) lineage: Lineage,
    pub(super) epoch: Epoch,
    pub(super) fork: Position,
    pub(super) policy: Policy,
    /// What was asked for.
    pub(super) asked: Policy,
    pub(super) plan: Plan,
    pub(super) changes: Changes,
    /// Everything was asked of the other node.
    pub(super) merged: bool,
    /// Items of which that was done, and it was stored.
    pub(super) done: BTreeSet<usize>,
    /// Contents that are there by that, or were before.
    pub(super) there: BTreeSet<ContentHash>,
    /// What is moved to rescue, once that is known.
    pub(super) rescued: Option<BTreeSet<RelPath>>,
}

/// What people are told.
#[derive(Clone, Debug, Serialize)]
pub struct Shown {
    /// Mirror.
    pub mirror: String,
    /// This node.
    pub node: String,
    /// The one that stays.
    pub winner: String,
    /// Last position both had in common.
    pub fork: u64,
    /// Its own changes since then, which this node takes over: new, changed, gone paths.
    pub theirs: [u64; 3],
    /// One for each thing that happened here alone.
    pub items: Vec<Told>,
    /// Files that the mail server makes anew: the winner's are used, these are in rescue.
    pub own_files: u64,
    /// Applied, not only planned.
    pub done: bool,
    /// Files that were changed while it ran, and are kept in rescue for that.
    pub unplanned: u64,
    /// Files moved to rescue.
    pub rescued: u64,
    /// Where.
    pub rescue: Option<PathBuf>,
    /// The report.
    pub report: Option<PathBuf>,
    /// In words.
    pub text: String,
}

/// One of them.
#[derive(Clone, Debug, Serialize)]
pub struct Told {
    /// Kind.
    pub what: What,
    /// Where: on this node, or, when it is gone, at the fork. Bytes that are not UTF-8 stand as `\xNN`.
    pub path: String,
    /// Where it was at the fork, if elsewhere.
    pub from: Option<String>,
    /// What becomes of it, and why.
    #[serde(flatten)]
    pub outcome: Outcome,
}

impl From<&Item> for Told {
    fn from(item: &Item) -> Self {
        let Item { what, path, from, outcome, .. } = item;
        Told { what: *what, path: path.to_string(), from: from.as_ref().map(ToString::to_string), outcome: outcome.clone() }
    }
}

/// Who comes back. Its futures block: they are driven by a thread that may.
pub struct Job {
    /// This node.
    pub node: String,
    /// The mirror.
    pub spec: MirrorSpec,
    /// `<state>`.
    pub state_dir: PathBuf,
    /// Named by the operator as the one that stays.
    pub winner: Option<String>,
    /// What may be merged.
    pub policy: Policy,
}

/// Told now and then: what is done, how many are, of how many.
pub type Progress<'a> = &'a (dyn Fn(&str, u64, Option<u64>) + Send + Sync);

/// The other node, and what it said of itself.
struct Other {
    remote: Remote,
    name: String,
    lineage: Lineage,
    epoch: Epoch,
    position: Position,
    /// From where its rows are needed; `None`: all.
    since: Option<Lsn>,
}

pub(super) fn io<T>(what: impl Into<String>, done: std::io::Result<T>) -> Result<T, ResyncError> {
    done.map_err(|source| ResyncError::Io { what: what.into(), source })
}

impl Job {
    fn dir(&self) -> PathBuf {
        mirror_dir(&self.state_dir, &self.spec.name)
    }

    fn refused(&self, why: impl std::fmt::Display) -> ResyncError {
        ResyncError::Refused(format!("mirror `{}`: {why}", self.spec.name))
    }

    fn known(&self) -> Result<MirrorState, ResyncError> {
        let known = NodeState::open(&self.state_dir)?.mirror(&self.spec.name)?;
        known.ok_or_else(|| self.refused("this node knows nothing of it: there is nothing to resync"))
    }

    fn manifest(&self) -> Result<Manifest, ResyncError> {
        let path = self.dir().join("manifest.db");
        let mut manifest = match Manifest::open(&path, true) {
            Err(error) if error.is_damage() => {
                // The other node has the same rows.
                let aside = path.with_extension(format!("db.damaged-{}", crate::capture::engine::unix_seconds()));
                io(format!("setting {} aside", path.display()), fs::rename(&path, &aside))?;
                for suffix in ["db-wal", "db-shm"] {
                    let _ = fs::remove_file(path.with_extension(suffix));
                }
                tracing::error!(mirror = %self.spec.name, %error, aside = %aside.display(), "manifest set aside; its rows come from the other node");
                Manifest::open(&path, true)?
            }
            other => other?,
        };
        manifest.set_digest_key(self.known()?.digest_key).map_err(|e| manifest.state_error(&e))?;
        Ok(manifest)
    }

    /// Whether this node may give way to the other one; gives the number of that one's promotion. Changes nothing.
    ///
    /// # Errors
    /// [`ResyncError`].
    pub async fn check(&self, connection: &quinn::Connection) -> Result<Epoch, ResyncError> {
        Ok(self.greet(connection).await?.epoch)
    }

    fn root(&self) -> Result<Root, ResyncError> {
        io(format!("root {}", self.spec.root.display()), Root::open(&self.spec.root))
    }

    /// Says what this node is to the other one; gives what that one is.
    pub(super) async fn say_hello(&self, connection: &quinn::Connection) -> Result<(Remote, Welcome), ResyncError> {
        let known = self.known()?;
        let manifest = self.manifest()?;
        let ours = manifest.position().map_err(|e| manifest.state_error(&e))?;
        let hello = Hello {
            protocol: PROTOCOL_VERSION,
            software: env!("CARGO_PKG_VERSION").into(),
            node: self.node.clone(),
            mirror: self.spec.name.clone(),
            mirror_id: known.mirror_id,
            lineage: known.lineage.clone(),
            epoch: known.epoch,
            incarnation: Incarnation([0; 16]),
            position: ours,
            digest: manifest.digest(),
            digest_key: known.digest_key,
            chunker: CHUNKER.into(),
            layout: self.spec.layout.clone(),
            wall_ns: wall_ns(),
        };
        drop(manifest);
        Ok(Remote::greet(connection, hello).await?)
    }

    async fn greet(&self, connection: &quinn::Connection) -> Result<Other, ResyncError> {
        let (remote, welcome) = self.say_hello(connection).await?;
        let known = self.known()?;
        let ours = {
            let manifest = self.manifest()?;
            manifest.position().map_err(|e| manifest.state_error(&e))?
        };
        let Welcome { node: name, replica: Holding::Holds { lineage, epoch, position, chain_at_yours, .. }, .. } = welcome else {
            return Err(RemoteError::OutOfTurn("nothing to compare with").into());
        };
        let us = Side { lineage: &known.lineage, epoch: known.epoch, position: ours };
        let them = Side { lineage: &lineage, epoch, position };
        if relate(us, them) == Relation::Unrelated {
            return Err(self.refused(format!(
                "node `{name}` has another store under this name: their histories have nothing in common, and nothing was changed"
            )));
        }
        // A standby of that very history: all but the last step was done.
        let through = known.role == Role::Standby && relate(us, them) == Relation::Same;
        match (&self.winner, meet(us, them)) {
            _ if through => {}
            (Some(winner), _) if *winner == self.node => {
                return Err(self.refused(format!("then node `{name}` is the one that comes back: run this command there")));
            }
            (Some(winner), _) if *winner != name => {
                return Err(self.refused(format!("no node `{winner}` answers; the other one is `{name}`")));
            }
            (Some(_), _) | (None, Meeting::Yield) => {}
            (None, Meeting::Stand) => {
                return Err(self.refused(format!(
                    "this node was promoted after `{name}`: run this command there (--winner {name} gives way all the same)"
                )));
            }
            (None, _) => {
                return Err(self.refused(format!(
                    "this node and `{name}` have both gone on, and nobody can tell which of them is right: name the one that stays with --winner"
                )));
            }
        }
        // Its log up to our position is ours: only what came after that can differ from what we know.
        let since = (chain_at_yours == Some(ours.chain) && ours.lsn <= position.lsn).then_some(ours.lsn);
        Ok(Other { remote, name, lineage, epoch, position, since })
    }

    /// Takes over the rows both had at the fork.
    async fn pull(&self, other: &mut Other) -> Result<Manifest, ResyncError> {
        let mut manifest = self.manifest()?;
        let mut since = other.since;
        loop {
            let mark = Lsn(other.position.lsn.0 + (1 << 40));
            manifest.begin().map_err(|e| manifest.state_error(&e))?;
            manifest.set_lsn(mark);
            let (position, digest) = other
                .remote
                .rows::<ResyncError>(since, |path, entry| {
                    let row = match entry {
                        None => None,
                        Some(entry) => {
                            let local = manifest.row(&path)?.filter(|old| old.entry == entry).and_then(|old| old.local);
                            Some(Row { entry, local })
                        }
                    };
                    Ok(manifest.set(&path, row)?)
                })
                .await?;
            if since.is_none() {
                loop {
                    let stale = manifest.unmarked(mark, 1000).map_err(|e| manifest.state_error(&e))?;
                    if stale.is_empty() {
                        break;
                    }
                    stale.iter().try_for_each(|path| manifest.set(path, None))?;
                }
            }
            if manifest.digest() == digest {
                // Not later than the fork: what is, is this node's own.
                manifest.settle(mark, position.lsn).map_err(|e| manifest.state_error(&e))?;
                manifest.commit(position).map_err(|e| manifest.state_error(&e))?;
                return Ok(manifest);
            }
            manifest.roll_back().map_err(|e| manifest.state_error(&e))?;
            if since.take().is_none() {
                return Err(RemoteError::OutOfTurn("its rows do not match its own digest").into());
            }
        }
    }

    /// What differs from the rows now.
    fn look(&self, manifest: &mut Manifest, progress: Progress<'_>) -> Result<BTreeMap<RelPath, Differs>, ResyncError> {
        let root = self.root()?;
        let (all, same) =
            differences(manifest, &root, &self.spec.selection, false, &mut |looked_at| progress("comparing", looked_at, None))?;
        let position = manifest.position().map_err(|e| manifest.state_error(&e))?;
        let mut noted = || {
            manifest.begin()?;
            same.iter().try_for_each(|(path, local)| manifest.set_local(path, Some(*local)))?;
            manifest.commit(position)
        };
        noted().map_err(|error| manifest.state_error(&error))?;
        Ok(all)
    }

    async fn decide(&self, other: &mut Other, progress: Progress<'_>) -> Result<Stored, ResyncError> {
        let boot = io("the kernel's boot id", crate::heal::boot_id())?;
        let state = NodeState::open(&self.state_dir)?;
        if let Some(mark) = state.local_mark(&self.spec.name)?.filter(|mark| mark.boot != boot) {
            // New bytes can be under old times; what was changed after the mark may have its times, and not its bytes. Before the rows of the fork replace those, which tell what that is.
            let mut manifest = self.manifest()?;
            manifest.distrust_in_place().map_err(|e| manifest.state_error(&e))?;
            manifest.distrust_after(mark.lsn).map_err(|e| manifest.state_error(&e))?;
        }
        progress("asking for the rows of the fork", 0, None);
        let mut manifest = self.pull(other).await?;
        let known = self.known()?;
        let fork = manifest.position().map_err(|e| manifest.state_error(&e))?;
        let differences = self.look(&mut manifest, progress)?;
        let tail = tail(&differences, &self.root()?);
        progress("asking what the other node has", 0, Some(tail.len() as u64));
        let theirs = other.remote.find(questions(&tail)).await?;
        let changes = other.remote.changes().await?;
        // A state that was put back from a copy does not know what it did after that: its flags and folders may be old ones.
        let older = known.reserved < fork.lsn && other.since.is_none();
        let policy = if older { Policy::Rescue } else { self.policy };
        progress("reading the mail server's files", 0, None);
        let root = self.root()?;
        let boxes = match self.spec.layout.as_str() {
            "sdbox" | "mdbox" => Some(boxes::dbox(&differences, &tail, &root)?),
            "mbox" => {
                let read = boxes::mboxes(&differences, &tail, &root)?;
                let known = other.remote.find(read.questions()).await?;
                Some(read.items(&differences, &tail, &root, &known))
            }
            _ => None,
        };
        let mail = match &boxes {
            Some(boxes) => Mail::Boxes(boxes),
            None if self.spec.layout == "maildir" => Mail::Maildir,
            None => Mail::None,
        };
        let mut plan = reconcile(&tail, mail, policy, &theirs);
        if !changes.has_program {
            without_program(&mut plan, &other.name);
        }
        let already = plan.items.iter().filter(|item| item.outcome == Outcome::Already);
        let there = already.filter_map(|item| tail.get(&item.path)?.ours.as_ref()?.hash()).collect();
        Ok(Stored {
            other: other.name.clone(),
            lineage: other.lineage.clone(),
            epoch: other.epoch,
            fork,
            policy,
            asked: self.policy,
            plan,
            changes,
            merged: false,
            done: BTreeSet::new(),
            there,
            rescued: None,
        })
    }

    async fn decide_and_store(&self, other: &mut Other, progress: Progress<'_>) -> Result<Stored, ResyncError> {
        let stored = self.decide(other, progress).await?;
        self.store(&stored)?;
        Ok(stored)
    }

    fn stored(&self) -> Result<Option<Stored>, ResyncError> {
        let path = self.dir().join(PLAN);
        match fs::read(&path) {
            Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()), // Damaged: nothing of it is needed to decide again.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => io(format!("reading {}", path.display()), Err(error)),
        }
    }

    fn store(&self, stored: &Stored) -> Result<(), ResyncError> {
        let bytes = serde_json::to_vec(stored).map_err(std::io::Error::other);
        io("storing the plan", bytes.and_then(|bytes| crate::atomic::write(&self.dir().join(PLAN), &bytes, 0o600)))
    }

    fn shown(&self, stored: &Stored) -> Shown {
        let Changes { new, changed, gone, .. } = stored.changes;
        let mut shown = Shown {
            mirror: self.spec.name.clone(),
            node: self.node.clone(),
            winner: stored.other.clone(),
            fork: stored.fork.lsn.0,
            theirs: [new, changed, gone],
            items: stored.plan.items.iter().map(Told::from).collect(),
            own_files: stored.plan.own,
            done: false,
            unplanned: 0,
            rescued: 0,
            rescue: None,
            report: None,
            text: String::new(),
        };
        shown.text = report::text(&shown, &stored.plan.items, &stored.changes);
        shown
    }

    /// Says what would be done. Changes nothing that people see.
    ///
    /// # Errors
    /// [`ResyncError`].
    pub async fn plan(&self, connection: &quinn::Connection, progress: Progress<'_>) -> Result<Shown, ResyncError> {
        let mut other = self.greet(connection).await?;
        if let Some(stored) = self.stored()?.filter(|stored| stored.fork == other.position) {
            return Ok(self.shown(&stored)); // Begun, and not yet through.
        }
        let stored = self.decide(&mut other, progress).await?;
        Ok(self.shown(&stored))
    }

    /// Does it; this node is a standby when it returns, and knows it after [`Job::finish`].
    ///
    /// # Errors
    /// [`ResyncError`]: it can be run again, and goes on where it was.
    pub async fn apply(&self, connection: &quinn::Connection, progress: Progress<'_>) -> Result<Shown, ResyncError> {
        let mut other = self.greet(connection).await?;
        let mut stored = match self.stored()?.filter(|stored| stored.fork == other.position) {
            Some(stored) if stored.asked != self.policy && (stored.merged || !stored.done.is_empty()) => {
                return Err(self.refused(format!("a resync with --policy {} has begun: finish that one", policy_text(stored.asked))));
            }
            Some(stored) if stored.asked == self.policy && stored.other == other.name => stored,
            _ => self.decide_and_store(&mut other, progress).await?,
        };
        // Its history may have grown since the plan was made.
        (stored.lineage, stored.epoch) = (other.lineage.clone(), other.epoch);
        if !stored.merged {
            let merged = self.merge(&mut other, &mut stored, progress).await;
            stored.merged = merged.is_ok();
            // Also when the link is lost in the middle: what was merged is not merged again.
            self.store(&stored)?;
            merged?;
        } else {
            self.store(&stored)?;
        }
        drop(other);
        let rescued = self.settle(&mut stored, progress)?;
        let mut shown = self.shown(&stored);
        let told: BTreeSet<&RelPath> = stored.plan.rescue.iter().chain(stored.plan.items.iter().map(|item| &item.path)).collect();
        shown.unplanned = stored.rescued.iter().flatten().filter(|path| !told.contains(path)).count() as u64;
        (shown.done, shown.rescued, shown.rescue) = (true, rescued, (rescued > 0).then(|| self.dir().join("rescue")));
        shown.text = report::text(&shown, &stored.plan.items, &stored.changes);
        let path = report::path(&self.dir());
        shown.report = Some(path.clone());
        shown.text += &format!("\nThis report: {}\n", path.display());
        let wrote =
            path.parent().map_or(Ok(()), fs::create_dir_all).and_then(|()| crate::atomic::write(&path, shown.text.as_bytes(), 0o600));
        io("writing the report", wrote)?;
        Ok(shown)
    }

    /// Has every item made on the other node.
    async fn merge(&self, other: &mut Other, stored: &mut Stored, progress: Progress<'_>) -> Result<(), ResyncError> {
        let root = self.root()?;
        let total = stored.plan.items.len() as u64;
        // Folders have their new names before anything is put into them.
        let mut order: Vec<usize> = (0..stored.plan.items.len()).collect();
        let stage = |n: &usize| match stored.plan.items[*n].what {
            What::FolderMove => 0,
            What::Folder => 1,
            _ => 2,
        };
        order.sort_by_key(stage);
        let rest = order.split_off(order.partition_point(|n| stage(n) < 2));
        let first = order;
        let (mut saved, mut took) = (Instant::now(), Duration::ZERO);
        for (done, n) in first.iter().chain(&rest).enumerate() {
            progress("merging", done as u64, Some(total));
            if done == first.len() {
                self.dirs(other, &stored.plan.dirs).await?;
            }
            if stored.done.contains(n) {
                continue;
            }
            // Not for each: it is one file, and the plan may be long.
            if saved.elapsed() > SAVE_EVERY.max(10 * took) {
                let began = Instant::now();
                self.store(stored)?;
                (saved, took) = (Instant::now(), began.elapsed());
            }
            let item = &mut stored.plan.items[*n];
            // A content that nobody needs here once it is there.
            let hash = |item: &Item| match (&item.merge, &item.part) {
                (Some(Merge::Message { entry, .. }), _) => entry.hash(),
                (_, Some(part)) => part.whole,
                _ => None,
            };
            let Some(merge) = item.merge.clone() else { continue };
            let mut file = None;
            if let Merge::Message { entry, .. } | Merge::Server { task: Task::Import { entry, .. }, .. } = &merge {
                // What was changed or moved since the plan was made is kept with the rest.
                let found = match &item.part {
                    Some(part) => boxes::bytes(&root, part).map(|bytes| self.spooled(&bytes)).transpose()?,
                    None => root.file(&item.path).map(File::from).ok(),
                };
                file = found.filter(|file| copy::hash(file).ok() == entry.hash());
                if file.is_none() {
                    stored.plan.rescue.push(file_of(item));
                    item.outcome = Outcome::Rescue { why: "it was changed, or moved, after the plan was made".into() };
                    stored.done.insert(*n);
                    continue;
                }
            }
            match other.remote.merge(merge, file.as_ref()).await? {
                Merged::Done | Merged::Already => stored.there.extend(hash(item)),
                // Mail is kept; a flag or a folder's name has nothing to keep.
                Merged::Kept { why } if matches!(item.merge, Some(Merge::Server { .. })) && item.part.is_none() => {
                    item.outcome = Outcome::Stays { why };
                }
                Merged::Kept { why } => {
                    stored.plan.rescue.push(file_of(item));
                    item.outcome = Outcome::Rescue { why };
                }
            }
            stored.done.insert(*n);
        }
        if rest.is_empty() {
            self.dirs(other, &stored.plan.dirs).await?;
        }
        Ok(())
    }

    /// In an unnamed file.
    fn spooled(&self, bytes: &[u8]) -> Result<File, ResyncError> {
        let spool = || {
            let mut file = tempfile::tempfile_in(self.dir())?;
            file.write_all(bytes)?;
            Ok(file)
        };
        io("keeping a message on its way", spool())
    }

    async fn dirs(&self, other: &mut Other, dirs: &[(RelPath, Entry)]) -> Result<(), ResyncError> {
        for (path, entry) in dirs {
            let _ = other.remote.merge(Merge::Dir { path: path.clone(), entry: entry.clone() }, None).await?; // What lacks it says so.
        }
        Ok(())
    }

    /// Keeps what nobody else has, then makes the rows say what this disk has; gives the number of files that are kept.
    pub(super) fn settle(&self, stored: &mut Stored, progress: Progress<'_>) -> Result<u64, ResyncError> {
        let mut manifest = self.manifest()?;
        let mut all = self.look(&mut manifest, progress)?;
        let mut replica = Replica::new(self.root()?);
        let rescue = Rescue::new(&self.dir());
        let mut losers: BTreeSet<RelPath> = stored.rescued.take().unwrap_or_default();
        losers.extend(stored.plan.rescue.iter().cloned());
        let moved: BTreeSet<ContentHash> = all.values().filter_map(|it| it.fork.as_ref()?.entry.hash()).collect();
        for (path, it) in &all {
            let Some((entry, _)) = it.ours.as_ref().filter(|(entry, _)| !entry.is_dir()) else { continue };
            let known = match entry.hash() {
                // On the other node: since it was merged, or at the fork (small ones of paths that are as they were are not found, and kept in vain).
                Some(hash) => {
                    let merged = stored.there.contains(&hash) || moved.contains(&hash);
                    merged || entry.size() == 0 || self.is_known(&manifest, hash)?
                }
                None => it.fork.as_ref().is_some_and(|fork| fork.entry.kind == entry.kind),
            };
            if !known {
                losers.insert(path.clone());
            }
        }
        stored.rescued = Some(losers.clone());
        self.store(stored)?;
        let (total, mut taken) = (losers.len() as u64, 0);
        for (done, path) in losers.iter().enumerate() {
            progress("keeping what the other node lacks", done as u64, Some(total));
            let Some(it) = all.get_mut(path).filter(|it| it.ours.as_ref().is_some_and(|(entry, _)| !entry.is_dir())) else {
                // As it was at the fork, with a message in it that is wanted: the other node may have done away with it.
                let is_file = replica.root.file(path).is_ok() && !all.contains_key(path);
                let hash = if is_file { manifest.row(path)?.and_then(|row| row.entry.hash()) } else { None };
                if hash.is_some() {
                    let kept = rescue.copy(&mut replica, path, Why::Resync);
                    kept.map_err(|error| ResyncError::Io { what: format!("copying {path} to rescue"), source: error.into() })?;
                    taken += 1;
                }
                continue;
            };
            let kept = rescue.take(&mut replica, path, Why::Resync);
            kept.map_err(|error| ResyncError::Io { what: format!("moving {path} to rescue"), source: error.into() })?;
            it.ours = None;
            taken += 1;
        }
        let state = io("opening the state directory", File::open(self.dir()))?;
        let synced = rfs::syncfs(replica.root.fd()).and_then(|()| rfs::syncfs(&state));
        io("syncing", synced.map_err(std::io::Error::from))?;
        manifest.begin().map_err(|e| manifest.state_error(&e))?;
        // Later than the fork: the other node asks for what came after that, and finds exactly this.
        manifest.set_lsn(stored.fork.lsn.next());
        for (path, it) in all.iter().rev().filter(|(_, it)| it.ours.is_none()) {
            if it.fork.is_some() {
                manifest.set(path, None)?;
            }
        }
        for (path, it) in &all {
            if let Some((entry, local)) = &it.ours {
                manifest.set(path, Some(Row { entry: entry.clone(), local: Some(*local) }))?;
            }
        }
        manifest.commit(stored.fork).map_err(|e| manifest.state_error(&e))?;
        Ok(taken)
    }

    fn is_known(&self, manifest: &Manifest, hash: ContentHash) -> Result<bool, ResyncError> {
        Ok(!manifest.by_hash(hash).map_err(|e| manifest.state_error(&e))?.is_empty())
    }

    /// This node is a standby of the other from now on. The last step: durable when it returns.
    ///
    /// # Errors
    /// [`ResyncError`]: it can be run again.
    pub fn finish(&self) -> Result<(), ResyncError> {
        let dir = self.dir();
        let Some(stored) = self.stored()? else { return Err(self.refused("there is no plan that was applied")) };
        for part in ["redo", "staging"] {
            io(format!("removing {part} of an earlier time"), crate::switch::or_absent(fs::remove_dir_all(dir.join(part))))?;
        }
        let node = NodeState::open(&self.state_dir)?;
        let known = self.known()?;
        // Not at a cut before the other node's changes are here: its first whole transaction says so.
        let state = MirrorState { role: Role::Standby, lineage: stored.lineage, epoch: stored.epoch, complete: false, ..known };
        node.set_mirror(&self.spec.name, &state)?;
        io("removing marks", crate::switch::unmark(&dir, &[crate::switch::RETURNING, PLAN]))?;
        Ok(())
    }
}

/// The file that a message is in.
fn file_of(item: &Item) -> RelPath {
    item.part.as_ref().map_or_else(|| item.path.clone(), |part| part.file.clone())
}

/// The other node cannot have its mail server do anything.
fn without_program(plan: &mut Plan, name: &str) {
    let why =
        format!("`{name}` has no `[hooks] merge` program (see examples/hooks/merge-dovecot): give it one, reload it, and this is merged");
    for item in plan.items.iter_mut().filter(|item| matches!(item.merge, Some(Merge::Server { .. }))) {
        item.merge = None;
        item.outcome = if item.part.is_some() { Outcome::Rescue { why: why.clone() } } else { Outcome::Stays { why: why.clone() } };
        if item.part.is_some() {
            plan.rescue.push(file_of(item));
        }
    }
    plan.rescue.sort();
    plan.rescue.dedup();
}

fn policy_text(policy: Policy) -> &'static str {
    match policy {
        Policy::Merge => "merge",
        Policy::Rescue => "rescue",
    }
}
