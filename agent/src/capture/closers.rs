//! Which files are written as "open, write, write, close": between two of those writes there is no cut, though nothing moves.
//!
//! A file that was made or closed a moment ago is one. One that was written to for longer than any such change takes, and not closed, is kept open by its writer, who changes it by single calls (index logs) or declares what
//! belongs together. A bounded hint: what was forgotten is treated like a file kept open.

use std::collections::HashMap;
use std::time::Instant;

use twinbox_protocol::path::RelPath;

/// Files remembered: twice this many at most.
const KEPT: usize = 8192;

/// See the module's text.
#[derive(Default)]
pub(super) struct Closers {
    new: HashMap<RelPath, Instant>,
    old: HashMap<RelPath, Instant>,
}

impl Closers {
    /// Somebody made it, or closed it after writing.
    pub(super) fn add(&mut self, path: &RelPath, now: Instant) {
        if let Some(at) = self.new.get_mut(path) {
            *at = now;
            return;
        }
        if self.new.len() >= KEPT {
            self.old = std::mem::take(&mut self.new);
        }
        self.new.insert(path.clone(), now);
    }

    /// When that was last.
    pub(super) fn last(&self, path: &RelPath) -> Option<Instant> {
        self.new.get(path).or_else(|| self.old.get(path)).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_are_remembered_and_memory_is_bounded() {
        let (mut closers, now) = (Closers::default(), Instant::now());
        let path = |n: usize| RelPath::new(format!("f{n}").as_bytes()).unwrap();
        for n in 0..5 * KEPT {
            closers.add(&path(n), now);
        }
        assert!(closers.last(&path(5 * KEPT - 1)).is_some() && closers.last(&path(4 * KEPT)).is_some());
        assert!(closers.last(&path(0)).is_none());
        assert!(closers.new.len() + closers.old.len() <= 2 * KEPT);
    }
}
