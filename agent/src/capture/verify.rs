//! What the capture knows of a path, for `verify`: its row, and whether something is known to be changing there.

use std::collections::BTreeSet;

use twinbox_protocol::path::RelPath;
use twinbox_resync::rows::{Row, Rows};

use super::engine::{CaptureError, Engine};

/// What is known of a path.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Known {
    /// Its row, with what is on its way to the standby.
    pub row: Option<Row>,
    /// A change of it is seen and not on the standby, or may be: row and disk need not agree.
    pub busy: bool,
    /// It could not be read when it was to be sent: row and disk differ for that.
    pub unreadable: bool,
}

impl Engine {
    /// Answers after everything that was changed before has been taken out of the queue; `None` while the standby has not been told everything: then nothing can be said of any path.
    pub(super) fn known(&mut self, paths: &[RelPath]) -> Result<Option<Vec<Known>>, CaptureError> {
        self.take_events()?;
        if self.collapsed || !self.complete {
            return Ok(None);
        }
        let unsettled = self.compare || self.pull.is_some() || !self.halves.is_empty();
        let left: BTreeSet<&RelPath> = self.scan.left().collect();
        let mut all = vec![];
        for path in paths {
            let row = self.view.row(path)?;
            all.push(Known { row, busy: unsettled || self.is_busy(path, &left), unreadable: self.unreadable.contains_key(path) });
        }
        Ok(Some(all))
    }

    /// Of a path that is not there, also what is above it and not there either: a folder that went is one change.
    fn is_busy(&self, path: &RelPath, left: &BTreeSet<&RelPath>) -> bool {
        let mut at = path.clone();
        loop {
            let compared = std::iter::successors(Some(at.clone()), RelPath::parent).any(|above| left.contains(&above));
            let group = self.group_of_marked(&at);
            let pending = self.sets.is_pending(&group, &at) || self.bulk.is_open(&at) || self.view.is_in_flight(&at);
            if compared || pending || self.sets.origin(&at) != at || self.mapped.contains(&at) {
                return true;
            }
            let gone = matches!(self.root.stat(&at), Ok(None));
            match at.parent().filter(|_| gone) {
                Some(parent) => at = parent,
                None => return false,
            }
        }
    }

    /// These paths are not what the rows say, and no event told of it.
    pub(super) fn recheck(&mut self, paths: &[RelPath]) {
        for path in paths {
            tracing::warn!(mirror = %self.config.name, "a change that no event told of was found, and is sent now");
            tracing::debug!(%path, "missed");
            self.mark(path, true, true, false);
            if matches!(self.root.stat(path), Ok(Some(stat)) if crate::standby::replica::is_dir(&stat)) {
                self.scan.push(path.clone());
            }
        }
    }
}
