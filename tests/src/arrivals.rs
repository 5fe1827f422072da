//! When names appear in directories, as the kernel tells it: the clock of everything that measures how far a replica is behind.

use std::collections::BTreeMap;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify;

/// A watch on what appears in the directories.
#[must_use]
pub fn watches(dirs: &[PathBuf]) -> OwnedFd {
    let events = inotify::init(inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC).expect("inotify");
    for dir in dirs {
        let flags = inotify::WatchFlags::MOVED_TO | inotify::WatchFlags::CREATE | inotify::WatchFlags::CLOSE_WRITE;
        inotify::add_watch(&events, dir, flags).expect("watch");
    }
    events
}

/// For every name that appears the moment it was last heard of (a file written in place is there when it is closed), until `stop` is
/// dropped.
#[must_use]
pub fn watch(events: &OwnedFd, stop: &Receiver<()>) -> BTreeMap<String, Instant> {
    let mut seen = BTreeMap::new();
    let mut buffer = vec![MaybeUninit::uninit(); 64 * 1024];
    loop {
        let last = stop.try_recv() == Err(TryRecvError::Disconnected);
        let mut ready = [PollFd::new(events, PollFlags::IN)];
        let tick = Timespec { tv_sec: 0, tv_nsec: if last { 0 } else { 50_000_000 } };
        if poll(&mut ready, Some(&tick)).unwrap_or(0) > 0 {
            let mut reader = inotify::Reader::new(events, &mut buffer);
            while let Ok(event) = reader.next() {
                let now = Instant::now();
                assert!(!event.events().contains(inotify::ReadFlags::QUEUE_OVERFLOW), "the measuring watch overflowed");
                if let Some(name) = event.file_name() {
                    seen.insert(name.to_string_lossy().into_owned(), now);
                }
            }
        }
        if last {
            return seen;
        }
    }
}
