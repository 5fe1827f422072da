//! The capture thread: its state and its loop. What each event of the queue means is in `events`.
//!
//! One turn: commands, events, a piece of a running comparison, timers, a round of cuts; then it waits on the queue and its eventfd. Nothing else touches this state, so there are no locks
//! but the one around the published summary.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
#[cfg(test)]
use rustix::fs::inotify::ReadFlags;
#[cfg(test)]
use tokio::sync::oneshot;
use twinbox_protocol::ids::{ContentHash, Generation, Incarnation, Lsn};
use twinbox_protocol::outbox::Outbox;
use twinbox_protocol::path::RelPath;
use twinbox_resync::manifest::{Large, Manifest};
use twinbox_resync::node::{MirrorState, NodeState};
use twinbox_resync::rows::RowError;
use twinbox_resync::schema::StateError;
use twinbox_resync::view::View;

use super::ahead::Bulk;
use super::closers::Closers;
use super::dirty::{DirtySets, Group, Pending};
use super::durable::LocalDisk;
use super::fence::{Holds, Waiter};
use super::fresh::Fresh;
use super::messages::{CaptureHandle, CaptureStatus, Command};
use super::pulse::{CANARY_EVERY, Pulse, Stage};
use super::recent::RecentChunks;
use super::scan::Scan;
use super::session::Session;
use super::watch::{Event, Watch, WatchError, cookie_parent};
use crate::layout::{Grouping, Selection};
use crate::tree::{self, Root};

/// What a primary needs to know.
pub struct CaptureConfig {
    /// Mirror.
    pub name: String,
    /// This node.
    pub node: String,
    /// The store.
    pub root: PathBuf,
    /// `<state>`, with `state.db`.
    pub state_dir: PathBuf,
    /// `<state>/mirrors/<name>`, with `manifest.db`.
    pub mirror_dir: PathBuf,
    /// What is mirrored.
    pub selection: Selection,
    /// How paths fall into groups.
    pub grouping: Grouping,
    /// Layout's name, for the peer.
    pub layout: String,
    /// The mirror's history.
    pub known: MirrorState,
    /// This run.
    pub incarnation: Incarnation,
    /// Most bytes in flight.
    pub window_bytes: usize,
    /// Most dirty paths kept; more become one comparison.
    pub dirty_max: usize,
    /// Compare the whole store with the manifest this often, if at all.
    pub sweep: Option<Duration>,
    /// Send a group that could not be cut for this long as it is read.
    pub fuzzy_after: Option<Duration>,
}

/// Why a primary cannot work, or stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CaptureError {
    /// The root cannot be used.
    #[error("root {path}: {source}", path = path.display())]
    Root {
        /// Which.
        path: PathBuf,
        /// The system's words.
        source: io::Error,
    },
    /// The root went away under us.
    #[error("root {path} was moved, removed or unmounted: put it back and restart the agent; nothing was shipped as removed", path = path.display())]
    RootGone {
        /// Which.
        path: PathBuf,
    },
    /// Watching failed.
    #[error(transparent)]
    Watch(#[from] WatchError),
    /// State failed.
    #[error(transparent)]
    State(#[from] StateError),
    /// Rows failed.
    #[error("{0}")]
    Rows(#[from] RowError),
    /// This disk may lack what was shipped.
    #[error(
        "after a power cut this disk may lack mail that the standby has: `twinbox heal` brings it back, and `twinbox run` does so by itself; until then nothing is shipped"
    )]
    NotHealed {},
    /// This node's memory is not the newest: it, and perhaps the store, were put back from a copy.
    #[error(
        "the standby is at LSN {theirs} and this node never issued one above {ours}: its state is an older copy (a snapshot or a backup was put back). Restart the agent, or run `twinbox heal`: what the standby has since then comes back; nothing was shipped"
    )]
    OlderState {
        /// Highest LSN this node may have issued.
        ours: Lsn,
        /// Where the standby is.
        theirs: Lsn,
    },
    /// A system call of the loop failed.
    #[error("capture: {0}")]
    Io(#[from] io::Error),
}

/// A running capture.
pub struct Capture {
    handle: CaptureHandle,
    thread: Option<JoinHandle<()>>,
}

impl Capture {
    /// Opens state and root, watches the whole tree, and starts the thread.
    ///
    /// # Errors
    /// [`CaptureError`]: nothing is running then.
    pub fn start(config: CaptureConfig) -> Result<Self, CaptureError> {
        crate::sys::ignore_sigio();
        let (commands, receiver) = channel();
        let wake = Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).map_err(io::Error::from)?);
        let status = Arc::new(Mutex::new(CaptureStatus::default()));
        let handle = CaptureHandle { commands, wake: wake.clone(), status, pulse: Arc::default() };
        let mut engine = Engine::open(config, handle.clone(), receiver, wake)?;
        let thread = std::thread::spawn(move || {
            if let Err(error) = engine.run() {
                tracing::error!(mirror = %engine.config.name, %error, "capture stopped");
                engine.fail(&error.to_string());
            }
        });
        Ok(Capture { handle, thread: Some(thread) })
    }

    /// To speak to it.
    #[must_use]
    pub fn handle(&self) -> CaptureHandle {
        self.handle.clone()
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.handle.send(Command::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// First half of a rename.
pub(super) struct HalfRename {
    pub(super) path: RelPath,
    /// The directory it left.
    pub(super) dir: i32,
    pub(super) is_dir: bool,
    pub(super) excluded: bool,
    /// The directory's watch, when it is one: by the time we know that it left, another may have its place.
    pub(super) wd: Option<i32>,
}

/// What a standby lacks that came back to a history which went on: until it has that, it is told to be at no cut.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum ComesBack {
    /// What the comparison finds that runs.
    Comparing,
    /// What was dirty in this round.
    Round(u64),
}

/// What was done since it was last told.
#[derive(Default)]
pub(super) struct Pace {
    turns: u64,
    pub(super) events: u64,
    pub(super) scanned: u64,
    pub(super) looked: u64,
    pub(super) cuts: u64,
}

pub(super) struct Engine {
    pub(super) config: CaptureConfig,
    pub(super) root: Arc<Root>,
    pub(super) node: NodeState,
    pub(super) view: View,
    pub(super) outbox: Outbox,
    pub(super) watch: Watch,
    pub(super) sets: DirtySets,
    pub(super) halves: BTreeMap<u32, HalfRename>,
    pub(super) scan: Scan,
    pub(super) session: Option<Session>,
    /// A session is being opened: the newest term that the standby was told of.
    pub(super) greeting: Option<Generation>,
    /// The standby follows the newest term of our history.
    pub(super) accepted: bool,
    pub(super) complete: bool,
    /// `complete` was taken back and that is not stored yet: nothing may be shipped before.
    pub(super) unsaved_incomplete: bool,
    /// Compare the whole root when a session begins.
    pub(super) compare: bool,
    /// Too much was dirty: marks are not kept, the root is compared instead.
    pub(super) collapsed: bool,
    /// Shared with the bulk thread; held for one look-up at a time.
    pub(super) recent: Arc<Mutex<RecentChunks>>,
    pub(super) larges: HashMap<RelPath, (Large, Option<ContentHash>)>,
    pub(super) writers: BTreeMap<RelPath, Instant>,
    /// Of these the files that are mapped for writing.
    pub(super) mapped: BTreeSet<RelPath>,
    pub(super) unreadable: BTreeMap<RelPath, (String, Instant)>,
    /// Names of files that came and are not committed.
    pub(super) fresh: Fresh,
    /// A name of those moved on to where nobody watched yet.
    pub(super) strayed: bool,
    pub(super) bulk: Bulk,
    pub(super) waiters: Vec<Waiter>,
    pub(super) pulse: Arc<Pulse>,
    /// When something was last shipped.
    pub(super) shipped_at: Instant,
    /// When what is in flight last grew shorter, or began; the same of what is to be applied.
    pub(super) acknowledged_at: Instant,
    pub(super) applied_at: Instant,
    pub(super) holds: Holds,
    /// Files whose writers close them.
    pub(super) closers: Closers,
    pub(super) disk: LocalDisk,
    pub(super) flights: VecDeque<(Lsn, Instant, Instant)>,
    pub(super) latencies: VecDeque<u32>,
    /// The first sync's last groups: those with something left when its comparison ended; then the LSN that carries the last of it.
    pub(super) last_groups: Option<(BTreeSet<Group>, Option<Lsn>)>,
    pub(super) applied: Lsn,
    /// Last one acknowledged in this session.
    pub(super) durable: Lsn,
    /// When the newest txn that is durable was sealed: what was older and is not dirty had been shipped.
    pub(super) proof: Option<Instant>,
    pub(super) summary: CaptureStatus,
    pub(super) pull: Option<super::session::Pull>,
    /// An inode was noted as written in place while there was no standby: the note is to be on the disk before long.
    pub(super) noted_alone: bool,
    /// The standby has come back with what it had alone, and is at no cut until everything that was dirty at this round is through.
    pub(super) comes_back: Option<ComesBack>,
    /// The standby that was welcomed says that it is at no cut, and what it lacks is not known to be in what it is sent.
    pub(super) at_no_cut: bool,
    /// Sessions that ended with something in flight of which nothing had become durable.
    pub(super) fruitless: u32,
    /// Something that was observed could not be sent after all: what rests on the standby is looked at again.
    pub(super) doubt: bool,
    /// Bytes of observations held when the round began, and read since.
    pub(super) held_bytes: usize,
    pub(super) held_at: Instant,
    events: Vec<Event>,
    receiver: Receiver<Command>,
    wake: Arc<OwnedFd>,
    handle: CaptureHandle,
    /// Ends the thread that looks for mappings.
    _mapping: Sender<()>,
    /// When it was last told why a group is not cut.
    pub(super) told_why: Instant,
    told_pace: Instant,
    pub(super) pace: Pace,
    writers_at: Instant,
    published_at: Instant,
    next_sweep: Option<Instant>,
    /// Groups in which directories came, moved or went: compared once more when that has been over for a while.
    pub(super) rechecks: BTreeMap<Group, Instant>,
    /// A simulation's mail server: works in the middle of our steps.
    #[cfg(test)]
    meanwhile: Option<Box<dyn FnMut() + Send>>,
}

/// How long a group's directories must have been at rest before it is compared once more.
pub(super) const RECHECK_AFTER: Duration = Duration::from_secs(2);

/// Renames kept; more are found by comparing.
pub(super) const HINTS_MAX: usize = 50_000;
/// Files known to be open for writing are looked at this often, because a write under another name raises no event here.
const WRITERS_EVERY: Duration = Duration::from_millis(500);
/// Paths that could not be read are tried again after this long.
pub(super) const UNREADABLE_EVERY: Duration = Duration::from_secs(20);

impl Engine {
    pub(super) fn open(
        config: CaptureConfig,
        handle: CaptureHandle,
        receiver: Receiver<Command>,
        wake: Arc<OwnedFd>,
    ) -> Result<Self, CaptureError> {
        let mut root = Root::open(&config.root).map_err(|source| CaptureError::Root { path: config.root.clone(), source })?;
        let proofs = super::proofs::try_out(&root);
        for warning in &proofs.warnings {
            tracing::warn!(mirror = %config.name, "{warning}");
        }
        root.trust(proofs.leases, proofs.grain);
        let root = Arc::new(root);
        let io = |error| CaptureError::Io(error);
        std::fs::create_dir_all(&config.mirror_dir).map_err(io)?;
        let path = config.mirror_dir.join("manifest.db");
        let mut damaged = None;
        let mut manifest = match Manifest::open(&path, false) {
            Err(error) if error.is_damage() => {
                // The standby has the same rows: set the damaged file aside and ask for them.
                let aside = path.with_extension(format!("db.damaged-{}", unix_seconds()));
                std::fs::rename(&path, &aside).map_err(io)?;
                for suffix in ["db-wal", "db-shm"] {
                    let _ = std::fs::remove_file(path.with_extension(suffix));
                }
                tracing::error!(mirror = %config.name, %error, aside = %aside.display(), "manifest set aside; it is pulled from the standby");
                damaged = Some(format!("{error}; it was set aside and is rebuilt"));
                Manifest::open(&path, false)?
            }
            other => other?,
        };
        manifest.set_digest_key(config.known.digest_key).map_err(|e| manifest.state_error(&e))?;
        let position = manifest.position().map_err(|e| manifest.state_error(&e))?;
        let node = NodeState::open(&config.state_dir)?;
        let boot = crate::heal::boot_id().map_err(io)?;
        if crate::heal::needs_heal(&node, &config.name, &boot, position.lsn)? {
            return Err(CaptureError::NotHealed {});
        }
        if node.local_mark(&config.name)?.is_some_and(|mark| mark.boot != boot) {
            // After an orderly stop the mail server may have gone on, and have lost power then: new bytes can be under old times.
            manifest.distrust_in_place().map_err(|e| manifest.state_error(&e))?;
        }
        let accepted = node.value(&super::session::accepted_key(&config.name))? == Some(config.known.lineage.generation().to_string());
        let disk = LocalDisk::start(&root, NodeState::open(&config.state_dir)?, &config.name, &boot, position.lsn, &path)?;
        let outbox = Outbox::new(position, config.known.reserved);
        let watch = Watch::new(root.fd(), &cookie_parent(&config.mirror_dir))?;
        let bulk = Bulk::start(&root, &handle);
        let mapping = super::mapped::start(root.clone(), config.root.clone(), handle.clone());
        let now = Instant::now();
        let mut engine = Engine {
            complete: config.known.complete,
            next_sweep: config.sweep.map(|every| now + every),
            root,
            node,
            view: View::new(manifest),
            outbox,
            watch,
            sets: DirtySets::default(),
            halves: BTreeMap::new(),
            scan: Scan::default(),
            session: None,
            greeting: None,
            accepted,
            unsaved_incomplete: false,
            compare: true,
            collapsed: false,
            recent: Arc::default(),
            larges: HashMap::new(),
            writers: BTreeMap::new(),
            mapped: BTreeSet::new(),
            unreadable: BTreeMap::new(),
            fresh: Fresh::default(),
            strayed: false,
            bulk,
            waiters: vec![],
            pulse: handle.pulse.clone(),
            shipped_at: now,
            acknowledged_at: now,
            applied_at: now,
            holds: Holds::default(),
            closers: Closers::default(),
            disk,
            flights: VecDeque::new(),
            latencies: VecDeque::new(),
            last_groups: None,
            applied: Lsn::ZERO,
            durable: Lsn::ZERO,
            proof: None,
            summary: CaptureStatus { unprotected_since: Some(SystemTime::now()), warnings: proofs.warnings, ..CaptureStatus::default() },
            pull: None,
            noted_alone: false,
            comes_back: None,
            at_no_cut: false,
            fruitless: 0,
            doubt: false,
            held_bytes: 0,
            held_at: now,
            events: vec![],
            receiver,
            wake,
            handle,
            _mapping: mapping,
            told_why: now,
            told_pace: now,
            pace: Pace::default(),
            writers_at: now,
            published_at: now,
            rechecks: BTreeMap::new(),
            #[cfg(test)]
            meanwhile: None,
            config,
        };
        if let Some(message) = damaged {
            engine.trouble(message);
        }
        engine.watch_everything()?;
        Ok(engine)
    }

    fn run(&mut self) -> Result<(), CaptureError> {
        loop {
            self.pulse.enter(Stage::Commit);
            if !self.commands()? {
                self.store_locals()?;
                self.disk.stopped(self.outbox.last().lsn, &self.node);
                return Ok(());
            }
            self.pulse.enter(Stage::Watch);
            self.take_events()?;
            self.pulse.enter(Stage::Scan);
            let scanned = self.scan_some()?;
            self.note_listed();
            self.timers()?;
            self.mint_when_alone()?;
            let cut = self.round()?;
            self.pulse.enter(Stage::Commit);
            self.finish_first_sync()?;
            self.answer_waiters()?;
            let busy = scanned || cut;
            self.pace.turns += 1;
            self.publish(busy);
            if !busy {
                self.store_locals()?;
                self.pulse.enter(Stage::Idle);
                self.wait()?;
            }
        }
    }

    /// Stores what was noted of this node's own files.
    pub(super) fn store_locals(&mut self) -> Result<(), CaptureError> {
        if self.pull.is_some() {
            return Ok(()); // Half a pull must still be taken back when its digest is wrong.
        }
        self.view.store_locals()?;
        if std::mem::take(&mut self.noted_alone) {
            // No acknowledgement waits for this thread while there is no standby.
            let wal = self.config.mirror_dir.join("manifest.db-wal");
            if let Err(error) = std::fs::File::open(wal).and_then(|wal| wal.sync_data()) {
                tracing::debug!(mirror = %self.config.name, %error, "what is written in place is noted, but not yet on the disk");
            }
        }
        Ok(())
    }

    fn commands(&mut self) -> Result<bool, CaptureError> {
        loop {
            match self.receiver.try_recv() {
                Ok(Command::Stop) | Err(TryRecvError::Disconnected) => return Ok(false),
                Ok(command) => self.command(command)?,
                Err(TryRecvError::Empty) => return Ok(true),
            }
        }
    }

    fn wait(&mut self) -> Result<(), CaptureError> {
        let now = Instant::now();
        let mut until = now + Duration::from_millis(250);
        if self.can_cut() {
            until = self.sets.next_look(now).map_or(until, |at| at.min(until));
        }
        until = self.next_expiry().map_or(until, |at| at.min(until));
        let left = until.saturating_duration_since(now);
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
        let watch = self.watch.fd();
        let mut fds = [PollFd::from_borrowed_fd(watch, PollFlags::IN), PollFd::from_borrowed_fd(self.wake.as_fd(), PollFlags::IN)];
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(io::Error::from(error).into()),
        }
        let mut counter = [0; 8];
        let _ = rustix::io::read(&*self.wake, &mut counter);
        Ok(())
    }

    fn timers(&mut self) -> Result<(), CaptureError> {
        let now = Instant::now();
        self.expire_holds();
        if self.complete && self.session.is_some() && now.duration_since(self.shipped_at) >= CANARY_EVERY {
            self.canary()?;
        }
        let due: Vec<RelPath> = self.unreadable.iter().filter(|(_, (_, at))| *at <= now).map(|(path, _)| path.clone()).collect();
        for path in due {
            self.unreadable.insert(path.clone(), (String::new(), now + UNREADABLE_EVERY));
            self.mark(&path, true, true, false);
            self.scan.push(path);
        }
        if now.duration_since(self.writers_at) >= WRITERS_EVERY {
            self.writers_at = now;
            if !self.root.is_in_place() {
                return Err(CaptureError::RootGone { path: self.config.root.clone() });
            }
            let open: Vec<RelPath> = self.writers.keys().cloned().collect();
            for path in open {
                self.check_writer(&path)?;
            }
        }
        // Defence in depth: watches follow directories through every race we know; a look at the mailbox afterwards costs its size, once, and
        // heals what we do not know.
        if self.session.is_some() && self.complete && self.scan.is_done() {
            // Not while renames are under way to the rows: compared with the old name's, a directory hides what is left of an earlier one under its own.
            let rests = |group: &Group| !RelPath::new(group).is_ok_and(|group| self.sets.has_moved_dirs(&group));
            let due: Vec<Group> =
                self.rechecks.iter().filter(|(group, at)| **at <= now && rests(group)).map(|(group, _)| group.clone()).collect();
            for group in due {
                self.rechecks.remove(&group);
                if let Ok(path) = RelPath::new(&group) {
                    self.scan.push(path);
                }
            }
        }
        if let (Some(at), Some(every)) = (self.next_sweep, self.config.sweep)
            && at <= now
            && self.session.is_some()
        {
            self.next_sweep = Some(now + every);
            self.scan.push(RelPath::root());
        }
        Ok(())
    }

    /// A file that was open for writing when last looked at: does it still have the ctime we know?
    pub(super) fn check_writer(&mut self, path: &RelPath) -> Result<(), CaptureError> {
        use twinbox_resync::rows::Rows;
        let group = self.group_of_marked(path);
        if self.sets.is_dirty(&group, path) {
            return Ok(()); // Looked at anyway; marked again, it would seem to be written to just now.
        }
        if self.mapped.contains(path) {
            super::mapped::sync(&self.root, path);
        }
        let known = match self.sets.seen(&group, path) {
            // Being read: that look sees changes itself, and is compared here once it is done. Marked dirty, it would begin anew for ever.
            Pending::Staging => return Ok(()),
            Pending::Seen(local) => local,
            Pending::No => self.view.row(&self.sets.origin(path))?.and_then(|row| row.local),
        };
        match self.root.stat(path) {
            Ok(Some(stat)) if known == Some(tree::local(&stat)) => {}
            Ok(Some(_)) => self.mark(path, true, false, false),
            _ => {
                self.writers.remove(path);
            }
        }
        Ok(())
    }

    /// What is mapped for writing changes without an event: it is followed like a file that is open for writing.
    pub(super) fn mapped(&mut self, paths: BTreeSet<RelPath>) -> Result<(), CaptureError> {
        self.mapped = paths.into_iter().filter(|path| !self.config.selection.excludes(path.as_bytes(), false)).collect();
        let now = Instant::now();
        for path in self.mapped.clone() {
            self.writers.entry(path.clone()).or_insert(now);
            self.check_writer(&path)?;
        }
        Ok(())
    }

    /// A point at which the mail server may have done something since the last one.
    #[cfg(test)]
    pub(super) fn meanwhile(&mut self) {
        if let Some(server) = &mut self.meanwhile {
            server();
        }
    }

    #[cfg(not(test))]
    #[inline]
    #[allow(clippy::unused_self)]
    pub(super) fn meanwhile(&mut self) {}

    /// Takes what is in the queue, without waiting.
    pub(super) fn take_events(&mut self) -> Result<(), CaptureError> {
        loop {
            let mut events = std::mem::take(&mut self.events);
            self.watch.read(&mut events)?;
            let any = !events.is_empty();
            for event in events.drain(..) {
                self.event(&event)?;
            }
            self.events = events;
            if !any {
                return Ok(());
            }
        }
    }

    /// Returns when everything completed before this call has been processed, and no rename is half out.
    pub(super) fn boundary(&mut self) -> Result<(), CaptureError> {
        self.pulse.enter(Stage::Watch);
        loop {
            self.until_cookie()?;
            if self.halves.is_empty() {
                return Ok(());
            }
            // A FROM without its TO: its rename may still be under way. Reading the source's directory waits for it.
            let open: Vec<u32> = self.halves.keys().copied().collect();
            // Where that is by now: a directory above it may have been renamed between the two.
            let parents: Vec<RelPath> = open.iter().filter_map(|half| self.watch.path(self.halves.get(half)?.dir)).collect();
            for dir in above(parents.iter()) {
                self.barrier(&dir);
            }
            self.until_cookie()?;
            for half in open {
                if let Some(half) = self.halves.remove(&half) {
                    self.moved_out(&half);
                }
            }
        }
    }

    fn until_cookie(&mut self) -> Result<(), CaptureError> {
        let mut wanted = self.watch.cookie()?;
        let mut overflows = self.summary.overflows;
        loop {
            let mut events = std::mem::take(&mut self.events);
            self.watch.read(&mut events)?;
            let (any, mut found) = (!events.is_empty(), false);
            for event in events.drain(..) {
                found |= self.watch.cookie_of(&event) == Some(wanted);
                self.event(&event)?;
            }
            self.events = events;
            if found {
                return Ok(());
            }
            if self.summary.overflows != overflows {
                // An overflow may have swallowed the cookie.
                overflows = self.summary.overflows;
                wanted = self.watch.cookie()?;
            } else if !any {
                let timeout = Timespec { tv_sec: 1, tv_nsec: 0 };
                let _ = poll(&mut [PollFd::from_borrowed_fd(self.watch.fd(), PollFlags::IN)], Some(&timeout));
            }
        }
    }

    /// Reads a directory once: its lock waits for every change of names in progress there, whose events are then out.
    pub(super) fn barrier(&self, dir: &RelPath) {
        if let Ok(dir) = self.root.dir_for_reading(dir) {
            let mut buffer = [std::mem::MaybeUninit::uninit(); 512];
            let _ = rustix::fs::RawDir::new(dir.as_fd(), &mut buffer).next().map(|e| e.is_ok());
        }
    }

    pub(super) fn group_of(&self, path: &RelPath, is_dir: bool) -> Group {
        self.config.grouping.group_of(path.as_bytes(), is_dir).to_vec()
    }

    /// Marks a path dirty. `quiet`: a directory's own times, which never spoil a round.
    pub(super) fn mark(&mut self, path: &RelPath, content: bool, scan: bool, quiet: bool) {
        if self.collapsed {
            return;
        }
        let group = self.group_of_marked(path);
        // A name directly in the root is in one group as a file and in another as a directory: what was seen of it before counts no more.
        let other = [true, false].map(|is_dir| self.group_of(path, is_dir)).into_iter().find(|other| *other != group);
        let old = other.and_then(|other| self.sets.withdraw(&other, path));
        self.sets.mark(&group, path, content | old.is_some_and(|(content, _)| content), scan, quiet, Instant::now());
        if let Some((_, round)) = old {
            self.sets.backdate(&group, path, round);
        }
        if self.sets.dirty_count() > self.config.dirty_max && (self.complete || self.session.is_none()) {
            self.collapse();
        }
    }

    /// The group of a path whose type we do not know for sure. A watched directory is one. One that is gone is looked at where it was: with what it was renamed to, or its mailbox would be gone
    /// before it is there again.
    pub(super) fn group_of_marked(&self, path: &RelPath) -> Group {
        use twinbox_resync::rows::Rows;
        let (dir, file) = (self.group_of(path, true), self.group_of(path, false));
        if dir == file || self.watch.at(path).is_some() || self.sets.is_pending(&dir, path) {
            return dir;
        }
        let was_dir = || self.view.row(&self.sets.origin(path)).is_ok_and(|row| row.is_some_and(|row| row.entry.is_dir()));
        if !self.sets.is_pending(&file, path) && was_dir() { dir } else { file }
    }

    fn collapse(&mut self) {
        tracing::warn!(mirror = %self.config.name, paths = self.sets.dirty_count(), "too many changes to keep: the store will be compared instead");
        self.sets.clear();
        self.fresh.clear();
        self.larges.clear();
        self.drop_all_ahead();
        self.scan.clear();
        self.restart_waiters();
        if self.session.is_some() {
            // Too much for one cut: go on as in a first sync, in batches, and say so.
            self.complete = false;
            self.unsaved_incomplete = true;
            self.scan.push(RelPath::root());
        } else {
            self.collapsed = true;
            self.compare = true;
        }
    }

    pub(super) fn trouble(&mut self, message: String) {
        self.summary.last_error = Some((SystemTime::now(), message));
    }

    fn fail(&mut self, why: &str) {
        self.summary.failed = Some(why.to_owned());
        self.trouble(why.to_owned());
        self.summary.connected = false;
        self.summary.protected = false;
        self.session = None;
        if let Ok(mut status) = self.handle.status.lock() {
            *status = self.summary.clone();
        }
        // The store may have been unmounted under us, and what comes back under the same boot id lack what was in memory.
        if let Err(error) = self.disk.distrust(&self.node) {
            tracing::error!(mirror = %self.config.name, %error, "run `twinbox heal --force` before the next start");
        }
    }

    /// For whoever wonders, at DEBUG, where the time goes: once a second while there is something to do.
    fn tell_pace(&mut self) {
        let now = Instant::now();
        if now.duration_since(self.told_pace) < Duration::from_secs(1) {
            return;
        }
        self.told_pace = now;
        let [queue, scan, look, commit, idle] = self.pulse.take_spent_ms();
        let Pace { turns, events, scanned, looked, cuts } = std::mem::take(&mut self.pace);
        if self.sets.is_clean() && self.scan.is_done() {
            return;
        }
        let (groups, pending, left) = (self.sets.groups().count(), self.sets.pending(), self.scan.left().count());
        let (up, flying, fresh) = (self.session.is_some(), self.outbox.in_flight().len(), self.fresh.len());
        let (ahead, came) = (self.bulk.ahead.len(), std::mem::take(&mut self.bulk.came));
        tracing::debug!(mirror = %self.config.name, up, queue, scan, look, commit, idle, turns, events, scanned, looked, cuts, groups, pending, left, flying, fresh, ahead, came, "pace (ms, then counts)");
    }

    fn publish(&mut self, busy: bool) {
        self.tell_pace();
        let now = Instant::now();
        if busy && now.duration_since(self.published_at) < Duration::from_millis(20) {
            return;
        }
        self.published_at = now;
        let last = self.outbox.last().lsn;
        let oldest = [self.sets.oldest(), self.flights.front().map(|(_, since, _)| *since)].into_iter().flatten().min();
        let up = self.session.is_some();
        let was = self.summary.protected;
        let waiting = self.outbox.in_flight().len();
        let summary = &mut self.summary;
        summary.connected = up;
        summary.generation = Some(self.config.known.lineage.generation());
        summary.complete = self.complete;
        summary.protected = up && self.complete;
        if summary.protected {
            summary.unprotected_since = None;
        } else if was || summary.unprotected_since.is_none() {
            summary.unprotected_since = Some(SystemTime::now());
        }
        let durable = self.flights.front().map_or(last, |(lsn, ..)| Lsn(lsn.0.saturating_sub(1)));
        summary.lsn = (last, durable.min(last), self.applied.min(last));
        summary.pending_paths = (self.sets.pending() + waiting) as u64 + u64::from(self.collapsed);
        summary.pending_bytes = self.outbox.bytes_in_flight() as u64 + self.sets.groups().map(|(_, g)| g.bytes as u64).sum::<u64>();
        summary.lag_ms = oldest.map_or(0, |since| now.duration_since(since).as_millis() as u64);
        summary.at = Some(now);
        summary.heard = self.session.as_ref().map(|s| s.heard);
        summary.unacknowledged_since = (waiting > 0).then_some(self.acknowledged_at);
        summary.unapplied_since = (self.applied < summary.lsn.1).then_some(self.applied_at);
        summary.bound_ms = self.proof.map(|sealed| (now.duration_since(sealed).as_millis() as u64).max(summary.lag_ms));
        summary.watches = self.watch.len();
        summary.scanning = !self.scan.is_done();
        summary.scanned = self.scan.looked_at();
        summary.unreadable = self.unreadable.iter().map(|(path, (why, _))| (path.clone(), why.clone())).collect();
        if !self.latencies.is_empty() {
            let mut sorted: Vec<u32> = self.latencies.iter().copied().collect();
            sorted.sort_unstable();
            summary.durable_us = (u64::from(sorted[sorted.len() / 2]), u64::from(sorted[sorted.len() * 99 / 100]));
        }
        if let Ok(mut status) = self.handle.status.lock() {
            *status = summary.clone();
        }
    }
}

/// Some directories and all above them.
pub(super) fn above<'a>(dirs: impl Iterator<Item = &'a RelPath>) -> BTreeSet<RelPath> {
    let mut all = BTreeSet::new();
    for dir in dirs {
        let mut at = Some(dir.clone());
        while let Some(dir) = at.filter(|dir| !all.contains(dir)) {
            at = dir.parent();
            all.insert(dir);
        }
    }
    all
}

/// Seconds since 1970, for names of files set aside.
pub(crate) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// How far a peer's clock is ahead of ours, in milliseconds; it says what it likes.
#[must_use]
pub fn skew_ms(theirs_ns: i64) -> i64 {
    theirs_ns.saturating_sub(wall_ns()) / 1_000_000
}

/// Nanoseconds since 1970.
#[must_use]
pub fn wall_ns() -> i64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    now.tv_sec * 1_000_000_000 + now.tv_nsec
}

#[cfg(test)]
mod tests {
    use super::{skew_ms, wall_ns};

    #[test]
    fn a_clock_that_is_out_of_its_mind_is_only_that() {
        assert!(skew_ms(i64::MIN) < -1_000_000);
        assert!(skew_ms(i64::MAX) > 1_000_000);
        assert!(skew_ms(wall_ns()).abs() < 60_000);
    }
}

#[cfg(test)]
#[path = "engine_tests.rs"]
mod turns;

#[cfg(test)]
#[path = "sim/mod.rs"]
mod sim;

#[cfg(test)]
#[path = "fence_tests.rs"]
mod fences;

#[cfg(test)]
#[path = "durable_tests.rs"]
mod durability;
