//! What the threads of one standby and its handles see of each other: the status snapshot, the session that is open, and counters.
//!
//! Each mutex here guards a small value and is held for a copy or an update only, never across I/O or an await.

use std::collections::{BTreeMap, BTreeSet, HashSet};
#[cfg(test)]
use std::sync::atomic::AtomicBool;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use tokio::sync::{Semaphore, mpsc, watch};
use twinbox_protocol::ids::{ContentHash, Lsn};
use twinbox_protocol::msg::{Position, ToPrimary};
use twinbox_protocol::path::RelPath;

use super::error::StandbyError;

/// What status shows of a standby.
#[derive(Clone, Debug)]
pub struct StandbyStatus {
    /// Everything up to here survives a power cut.
    pub durable: Position,
    /// Everything up to here is visible in the replica.
    pub applied: Lsn,
    /// Paths in the manifest.
    pub rows: u64,
    /// The first sync has been completed: the replica is at a cut.
    pub complete: bool,
    /// Bytes in the redo log that no checkpoint covers yet.
    pub redo_bytes: u64,
    /// Rows were made from files found here, and the first sync since is not complete.
    pub adopted: bool,
    /// Metadata this machine could not store, counted by kind (`ownership`, `xattrs`, `devices`, …).
    pub lost_metadata: BTreeMap<String, u64>,
    /// Last thing that went wrong.
    pub last_error: Option<(SystemTime, String)>,
    /// Transactions applied since the start.
    pub txns: u64,
    /// Files written or patched since the start.
    pub files: u64,
    /// Files found changed by somebody else and kept in rescue since the start.
    pub rescued: u64,
    /// When the cut of the last applied txn was taken: ns since 1970 by the primary's clock.
    pub captured_ns: i64,
    /// Why nothing is accepted until a restart.
    pub refusing: Option<String>,
}

impl StandbyStatus {
    pub(super) fn new() -> Self {
        StandbyStatus {
            durable: Position::START,
            applied: Lsn::ZERO,
            rows: 0,
            complete: false,
            redo_bytes: 0,
            adopted: false,
            lost_metadata: BTreeMap::new(),
            last_error: None,
            txns: 0,
            files: 0,
            rescued: 0,
            captured_ns: 0,
            refusing: None,
        }
    }
}

/// Bytes of frames that may wait for the receiver.
pub(super) const QUEUE_BYTES: usize = 16 * 1024 * 1024;
/// Bulk objects a session may have open at once: file descriptors and buffers stay bounded. The next one is not read before there is room.
pub(super) const OBJECTS_MAX: usize = 64;

/// Staged objects that a primary may say it wants, about.
const KEPT_MAX: usize = 1 << 20;

/// The session that is open, as every thread sees it.
pub(super) struct SessionShared {
    pub(super) id: u64,
    out: mpsc::UnboundedSender<ToPrimary>,
    failed: watch::Sender<Option<StandbyError>>,
    /// In KiB: room in the receiver's queue.
    pub(super) budget: Arc<Semaphore>,
    /// Room for bulk objects.
    pub(super) objects: Arc<Semaphore>,
    missed: Mutex<BTreeSet<ContentHash>>,
    gone: Mutex<BTreeSet<ContentHash>>,
    /// Asked for by `verify`, one after the other; whether it was said that it will not come.
    wanted: Mutex<Option<(ContentHash, bool)>>,
    /// Staged objects that the primary still wants, as far as said.
    kept: Mutex<HashSet<ContentHash>>,
    /// Counts contents that came, and those of which was said that they will not.
    arrivals: watch::Sender<u64>,
}

impl SessionShared {
    pub(super) fn new(id: u64, out: mpsc::UnboundedSender<ToPrimary>) -> Arc<Self> {
        Arc::new(SessionShared {
            id,
            out,
            failed: watch::Sender::new(None),
            budget: Arc::new(Semaphore::new(QUEUE_BYTES / 1024)),
            objects: Arc::new(Semaphore::new(OBJECTS_MAX)),
            missed: Mutex::default(),
            gone: Mutex::default(),
            wanted: Mutex::default(),
            kept: Mutex::default(),
            arrivals: watch::Sender::new(0),
        })
    }

    /// Sends to the primary; a session whose link is gone fails soon by itself.
    pub(super) fn send(&self, message: ToPrimary) {
        let _ = self.out.send(message);
    }

    /// Asks for a content, unless that was done and it has not come yet.
    pub(super) fn miss(&self, hash: ContentHash) {
        if lock(&self.missed).insert(hash) {
            self.send(ToPrimary::Miss { hash });
        }
    }

    /// It came: the next time it is not found it is asked for again.
    pub(super) fn note_here(&self, hash: ContentHash) {
        lock(&self.missed).remove(&hash);
        self.arrivals.send_modify(|count| *count += 1);
    }

    /// More of what the primary still wants; all of it when those were the `last`.
    pub(super) fn note_kept(&self, hashes: Vec<ContentHash>, last: bool) -> Option<HashSet<ContentHash>> {
        let mut kept = lock(&self.kept);
        // Nobody has more; what is not noted is sent again.
        if kept.len() < KEPT_MAX {
            kept.extend(hashes);
        }
        last.then(|| std::mem::take(&mut *kept))
    }

    /// Asks for a content that nobody waits for in the log.
    pub(super) fn want(&self, path: RelPath, hash: ContentHash) {
        *lock(&self.wanted) = Some((hash, false));
        self.send(ToPrimary::Want { path, hash });
    }

    pub(super) fn note_lacking(&self, hash: ContentHash) {
        if let Some((_, lacking)) = lock(&self.wanted).as_mut().filter(|(wanted, _)| *wanted == hash) {
            *lacking = true;
        }
        self.arrivals.send_modify(|count| *count += 1);
    }

    pub(super) fn is_lacking(&self, hash: ContentHash) -> bool {
        *lock(&self.wanted) == Some((hash, true))
    }

    pub(super) fn arrivals(&self) -> watch::Receiver<u64> {
        self.arrivals.subscribe()
    }

    pub(super) fn note_gone(&self, hash: ContentHash) {
        lock(&self.gone).insert(hash);
    }

    pub(super) fn is_gone(&self, hash: ContentHash) -> bool {
        lock(&self.gone).contains(&hash)
    }

    /// Ends the session; the first reason stays.
    pub(super) fn fail(&self, error: StandbyError) {
        self.budget.close();
        self.failed.send_if_modified(|slot| {
            let first = slot.is_none();
            if first {
                *slot = Some(error);
            }
            first
        });
    }

    pub(super) fn error(&self) -> Option<StandbyError> {
        self.failed.borrow().clone()
    }

    pub(super) fn is_over(&self) -> bool {
        self.failed.borrow().is_some()
    }

    pub(super) fn watch(&self) -> watch::Receiver<Option<StandbyError>> {
        self.failed.subscribe()
    }
}

/// One for each standby.
pub(super) struct Shared {
    status: Mutex<StandbyStatus>,
    session: Mutex<Option<Arc<SessionShared>>>,
    /// Bytes appended to the redo log since the last checkpoint.
    pub(super) redo_bytes: AtomicU64,
    /// Bytes of content accepted and not yet in the replica.
    pub(super) unapplied: AtomicU64,
    /// Threads leave without a checkpoint.
    #[cfg(test)]
    pub(super) crash: AtomicBool,
    /// What is durable is not applied.
    #[cfg(test)]
    pub(super) hold: AtomicBool,
}

/// Held by a thread: tells everybody if it ends by a panic, so that nobody waits for it.
pub(super) struct Alive {
    pub(super) shared: Arc<Shared>,
    pub(super) events: std::sync::mpsc::Sender<super::receiver::Event>,
}

impl Drop for Alive {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.shared.refuse("a thread of the standby failed (a bug: please report it)");
        }
        let _ = self.events.send(super::receiver::Event::Progress);
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Shared {
            status: Mutex::new(StandbyStatus::new()),
            session: Mutex::new(None),
            redo_bytes: AtomicU64::new(0),
            unapplied: AtomicU64::new(0),
            #[cfg(test)]
            crash: AtomicBool::new(false),
            #[cfg(test)]
            hold: AtomicBool::new(false),
        })
    }

    pub(super) fn status(&self) -> StandbyStatus {
        let mut status = lock(&self.status).clone();
        status.redo_bytes = self.redo_bytes.load(Ordering::Relaxed);
        status
    }

    pub(super) fn update<T>(&self, change: impl FnOnce(&mut StandbyStatus) -> T) -> T {
        change(&mut lock(&self.status))
    }

    /// Notes an error where status shows it, and tells the primary if a session is open.
    pub(super) fn problem(&self, message: String) {
        self.update(|status| status.last_error = Some((SystemTime::now(), message.clone())));
        if let Some(session) = self.session() {
            session.send(ToPrimary::Problem { message });
        }
    }

    /// Nothing is accepted any more until a restart.
    pub(super) fn refuse(&self, why: &str) {
        tracing::error!(why, "the standby accepts nothing until it is restarted");
        let told = StandbyError::Latched { why: why.to_owned() }.to_string();
        self.update(|status| {
            status.last_error = Some((SystemTime::now(), told.clone()));
            status.refusing.get_or_insert_with(|| why.to_owned());
        });
        if let Some(session) = self.session() {
            session.send(ToPrimary::Problem { message: told });
            session.fail(StandbyError::Latched { why: why.to_owned() });
        }
    }

    pub(super) fn refusing(&self) -> Option<StandbyError> {
        lock(&self.status).refusing.clone().map(|why| StandbyError::Latched { why })
    }

    pub(super) fn session(&self) -> Option<Arc<SessionShared>> {
        lock(&self.session).clone()
    }

    pub(super) fn set_session(&self, session: Option<Arc<SessionShared>>) {
        *lock(&self.session) = session;
    }

    /// A test wants the threads to end as if killed.
    #[cfg(test)]
    pub(super) fn crashed(&self) -> bool {
        self.crash.load(Ordering::Relaxed)
    }

    #[cfg(not(test))]
    #[allow(clippy::unused_self)]
    pub(super) fn crashed(&self) -> bool {
        false
    }

    /// A test wants the applier to stay behind.
    #[cfg(test)]
    pub(super) fn held(&self) -> bool {
        self.hold.load(Ordering::Relaxed)
    }

    #[cfg(not(test))]
    #[allow(clippy::unused_self)]
    pub(super) fn held(&self) -> bool {
        false
    }
}
