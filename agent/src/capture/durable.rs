//! How much of what was shipped this machine's own disk has: the locally durable LSN, kept in `state.db`.
//!
//! A thread of its own does `syncfs` on the root's descriptor, opened before anything is shipped, a second after the first change since the last one; the capture only notes numbers. Invariants:
//! the LSN stored is one that had been issued before a `syncfs` began that succeeded; the mark of an orderly stop is gone, durably, before anything is shipped ([`LocalDisk::start`] returns after that).
//! A `syncfs` that fails may have lost pages whatever later ones say: the LSN stays, and the mark names no boot, so that the next start heals. Does not heal itself: see `heal`.

use std::fs::File;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::io::Errno;
use twinbox_protocol::ids::Lsn;
use twinbox_resync::node::{LocalMark, NodeState};
use twinbox_resync::schema::StateError;

use crate::tree::Root;

/// Between a change and its `syncfs`: what a power cut can make a heal look at.
const EVERY: Duration = Duration::from_secs(1);

struct Shared {
    issued: AtomicU64,
    durable: AtomicU64,
    failed: AtomicBool,
    /// Ends the thread.
    stop: Mutex<bool>,
    wake: Condvar,
}

/// See the module's text.
pub(super) struct LocalDisk {
    shared: Arc<Shared>,
    mirror: String,
    boot: String,
    root: Arc<Root>,
    thread: Option<JoinHandle<()>>,
}

impl LocalDisk {
    /// Takes the mark of an orderly stop away and begins. `known`: the last LSN issued, as far as this node knows; `node`: a connection of its own.
    /// `manifest`: this node's own.
    pub(super) fn start(
        root: &Arc<Root>,
        node: NodeState,
        mirror: &str,
        boot: &str,
        known: Lsn,
        manifest: &Path,
    ) -> Result<Self, StateError> {
        let before = node.local_mark(mirror)?;
        let durable = before.map_or(Lsn::ZERO, |mark| mark.lsn);
        node.set_local_mark(mirror, &LocalMark { boot: boot.into(), lsn: durable, clean: false })?;
        let shared = Arc::new(Shared {
            issued: AtomicU64::new(known.0.max(durable.0)),
            durable: AtomicU64::new(durable.0),
            failed: AtomicBool::new(false),
            stop: Mutex::new(false),
            wake: Condvar::new(),
        });
        let mut disk = LocalDisk { shared: shared.clone(), mirror: mirror.into(), boot: boot.into(), root: root.clone(), thread: None };
        let (root, mirror, boot, wal) = (root.clone(), mirror.to_owned(), boot.to_owned(), manifest.with_extension("db-wal"));
        let sync = move || match rustix::fs::syncfs(root.fd()) {
            // What was synced is not what is mounted now.
            Ok(()) if !root.is_in_place() => Err(Errno::NODEV),
            other => other,
        };
        disk.thread = Some(std::thread::spawn(move || keep(&shared, &sync, &node, &mirror, &boot, &wal)));
        Ok(disk)
    }

    /// A cut has this number from now on; called after it was taken.
    pub(super) fn issued(&self, lsn: Lsn) {
        if self.shared.issued.fetch_max(lsn.0, Ordering::AcqRel) == self.shared.durable.load(Ordering::Acquire) {
            // Taken and let go, so that the thread is either before its look at the number or waiting.
            drop(self.shared.stop.lock().unwrap_or_else(PoisonError::into_inner));
            self.shared.wake.notify_one();
        }
    }

    /// Everything up to here survives a power cut of this machine.
    pub(super) fn durable(&self) -> Lsn {
        Lsn(self.shared.durable.load(Ordering::Acquire))
    }

    /// What this disk has is not what was shipped, whatever boot this is: it is to be healed before anything is shipped again. Ends the thread.
    ///
    /// # Errors
    /// [`StateError`].
    pub(super) fn distrust(&mut self, node: &NodeState) -> Result<(), StateError> {
        self.end();
        node.set_local_mark(&self.mirror, &LocalMark { boot: String::new(), lsn: self.durable(), clean: false })
    }

    fn end(&mut self) {
        *self.shared.stop.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.shared.wake.notify_one();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }

    /// An orderly stop: nothing more will be shipped, `last` was the last. After it a boot needs no heal.
    pub(super) fn stopped(&mut self, last: Lsn, node: &NodeState) {
        self.end();
        let lsn = last.max(Lsn(self.shared.issued.load(Ordering::Acquire)));
        if self.shared.failed.load(Ordering::Acquire) {
            return;
        }
        let done = rustix::fs::syncfs(self.root.fd()).map_err(|error| std::io::Error::from(error).to_string()).and_then(|()| {
            let mark = LocalMark { boot: self.boot.clone(), lsn, clean: true };
            node.set_local_mark(&self.mirror, &mark).map_err(|error| error.to_string())
        });
        if let Err(error) = done {
            let _ = self.distrust(node);
            tracing::warn!(mirror = %self.mirror, error, "the orderly stop could not be noted: at the next start the store is compared with the standby");
        }
    }
}

impl Drop for LocalDisk {
    fn drop(&mut self) {
        self.end();
    }
}

/// The thread's body.
fn keep(shared: &Shared, sync: &dyn Fn() -> Result<(), Errno>, node: &NodeState, mirror: &str, boot: &str, wal: &Path) {
    let waiting = |stop: &mut bool| !*stop && (shared.issued.load(Ordering::Acquire) == shared.durable.load(Ordering::Acquire));
    loop {
        let stop = shared.stop.lock().unwrap_or_else(PoisonError::into_inner);
        let stop = shared.wake.wait_while(stop, waiting).unwrap_or_else(PoisonError::into_inner);
        // Changes of one second share a syncfs.
        let (stop, _) = shared.wake.wait_timeout_while(stop, EVERY, |stop| !*stop).unwrap_or_else(PoisonError::into_inner);
        if *stop {
            return;
        }
        drop(stop);
        let lsn = Lsn(shared.issued.load(Ordering::Acquire));
        let synced = sync().map_err(|error| std::io::Error::from(error).to_string());
        // Without it a heal is right too, but knows less of what is older, and asks more often. Where the state lies on the same disk it is done already.
        let _ = File::open(wal).and_then(|wal| wal.sync_data());
        let stored = synced.and_then(|()| {
            let mark = LocalMark { boot: boot.into(), lsn, clean: false };
            node.set_local_mark(mirror, &mark).map_err(|error| error.to_string())
        });
        match stored {
            Ok(()) => shared.durable.store(lsn.0, Ordering::Release),
            Err(error) => {
                shared.failed.store(true, Ordering::Release);
                // A restart in the same boot would take what the page cache shows for what is on the disk.
                let suspect = LocalMark { boot: String::new(), lsn: Lsn(shared.durable.load(Ordering::Acquire)), clean: false };
                if let Err(error) = node.set_local_mark(mirror, &suspect) {
                    tracing::error!(mirror, %error, "that could not be noted: run `twinbox heal --force` after a restart");
                }
                tracing::error!(
                    mirror,
                    error,
                    "this machine's own disk could not be synced: look at its kernel log; mail is still mirrored, and at the next start, power cut or not, it is compared with the standby"
                );
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    fn mark(state: &std::path::Path) -> LocalMark {
        NodeState::open(state).unwrap().local_mark("m").unwrap().unwrap()
    }

    fn start(dir: &std::path::Path, known: u64) -> LocalDisk {
        let root = Arc::new(Root::open(dir).unwrap());
        LocalDisk::start(&root, NodeState::open(dir).unwrap(), "m", "boot-2", Lsn(known), &dir.join("manifest.db")).unwrap()
    }

    #[test]
    fn the_mark_of_an_orderly_stop_is_there_only_between_two_runs() {
        let dir = tempfile::tempdir().unwrap();
        let clean = LocalMark { boot: "boot-1".into(), lsn: Lsn(9), clean: true };
        NodeState::open(dir.path()).unwrap().set_local_mark("m", &clean).unwrap();
        let mut disk = start(dir.path(), 9);
        assert_eq!(mark(dir.path()), LocalMark { boot: "boot-2".into(), lsn: Lsn(9), clean: false });
        disk.stopped(Lsn(12), &NodeState::open(dir.path()).unwrap());
        assert_eq!(mark(dir.path()), LocalMark { boot: "boot-2".into(), lsn: Lsn(12), clean: true });
        drop(start(dir.path(), 12)); // As a failure ends it: no mark.
        assert!(!mark(dir.path()).clean);
    }

    /// What the system kept of the pages it could not write is not known: a restart must not forget it.
    #[test]
    fn a_sync_that_failed_is_remembered() {
        let dir = tempfile::tempdir().unwrap();
        let node = NodeState::open(dir.path()).unwrap();
        node.set_local_mark("m", &LocalMark { boot: "boot-2".into(), lsn: Lsn(3), clean: false }).unwrap();
        let mut disk = start(dir.path(), 3);
        disk.end();
        disk.issued(Lsn(5));
        *disk.shared.stop.lock().unwrap() = false;
        keep(&disk.shared, &|| Err(Errno::IO), &node, "m", "boot-2", Path::new("/nowhere"));
        disk.stopped(Lsn(6), &node);
        let mark = mark(dir.path());
        assert_eq!((mark.lsn, mark.is_torn("boot-2", Lsn(3))), (Lsn(3), true), "{mark:?}");
    }

    #[test]
    fn numbers_issued_become_durable_by_themselves_and_none_before_it_was_synced() {
        let dir = tempfile::tempdir().unwrap();
        let disk = start(dir.path(), 0);
        let begun = Instant::now();
        for lsn in 1..=5 {
            disk.issued(Lsn(lsn));
        }
        assert_eq!(disk.durable(), Lsn::ZERO, "not without a syncfs");
        while disk.durable() < Lsn(5) {
            assert!(begun.elapsed() < Duration::from_secs(30), "never durable");
            std::thread::yield_now();
        }
        assert!(begun.elapsed() >= EVERY, "changes of a second share one");
        assert_eq!(mark(dir.path()), LocalMark { boot: "boot-2".into(), lsn: Lsn(5), clean: false });
    }
}
