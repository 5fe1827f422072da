//! Where the rows of what was renamed since the last commit are: a map of paths, both ways round. A look-up costs the depth of a path, not the number of renames.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

use twinbox_protocol::path::RelPath;

/// See the module's text. A renamed directory takes along what has no entry of its own.
#[derive(Debug, Default)]
pub(super) struct Origins {
    rows: BTreeMap<RelPath, RelPath>,
    /// The other way round. A name that is made anew and renamed again has the same row as what was renamed before.
    now: BTreeMap<RelPath, BTreeSet<RelPath>>,
    /// How often something was renamed to a name.
    given: BTreeMap<RelPath, u32>,
}

impl Origins {
    pub(super) fn clear(&mut self) {
        self.rows.clear();
        self.now.clear();
        self.given.clear();
    }

    fn remove(&mut self, path: &RelPath) -> Option<RelPath> {
        let origin = self.rows.remove(path)?;
        if let Some(names) = self.now.get_mut(&origin) {
            names.remove(path);
            if names.is_empty() {
                self.now.remove(&origin);
            }
        }
        Some(origin)
    }

    fn insert(&mut self, path: RelPath, origin: RelPath) {
        self.remove(&path);
        self.now.entry(origin.clone()).or_default().insert(path.clone());
        self.rows.insert(path, origin);
    }

    /// What `to` and all below it has its rows where `from` had them.
    pub(super) fn renamed(&mut self, from: &RelPath, to: &RelPath) {
        let origin = self.of(from);
        if let Some((low, high)) = from.below() {
            let bounds = (Bound::Included(low.as_slice()), Bound::Excluded(high.as_slice()));
            let below: Vec<RelPath> = self.rows.range::<[u8], _>(bounds).map(|(p, _)| p.clone()).collect();
            for path in below {
                if let (Some(origin), Some(new)) = (self.remove(&path), path.rebase(from, to)) {
                    self.insert(new, origin);
                }
            }
        }
        self.remove(from);
        self.insert(to.clone(), origin);
        for (path, times) in super::ahead::take_within(&mut self.given, from) {
            // That it was given the name it leaves says nothing of the one it gets.
            let times = if path == *from { times - 1 } else { times };
            if let Some(new) = path.rebase(from, to).filter(|_| times > 0) {
                *self.given.entry(new).or_default() += times;
            }
        }
        *self.given.entry(to.clone()).or_default() += 1;
    }

    /// Whether more than one thing was given the name of `path`, or of a directory above it: what rows those had there is not told by where the last one came from.
    pub(super) fn is_ambiguous(&self, path: &RelPath) -> bool {
        !self.given.is_empty() && std::iter::successors(Some(path.clone()), RelPath::parent).any(|at| self.given.get(&at) > Some(&1))
    }

    /// Where the row of `path` is.
    pub(super) fn of(&self, path: &RelPath) -> RelPath {
        if self.rows.is_empty() {
            return path.clone(); // As nearly always: no walk up for each file that is looked at.
        }
        nearest(path, |dir| self.rows.get(dir))
    }

    /// Where rows can be of what had the name of `path`: its own, that of what was there when a directory above it was renamed, and that name, unless it [is ambiguous](Self::is_ambiguous).
    pub(super) fn all_of(&self, path: &RelPath) -> impl Iterator<Item = RelPath> {
        // Nothing was renamed, as nearly always: no walk up for each file that goes.
        let above = std::iter::successors((!self.rows.is_empty()).then(|| path.clone()), RelPath::parent);
        std::iter::once(path.clone()).chain(above.filter_map(|at| path.rebase(&at, self.rows.get(&at)?)))
    }

    /// Where what has its row at `origin` is by now.
    pub(super) fn now_at(&self, origin: &RelPath) -> RelPath {
        if self.now.is_empty() {
            return origin.clone();
        }
        nearest(origin, |dir| self.now.get(dir).and_then(BTreeSet::last))
    }
}

/// `path`, with the nearest directory above it (or itself) that leads elsewhere replaced.
fn nearest<'a>(path: &RelPath, leads: impl Fn(&RelPath) -> Option<&'a RelPath>) -> RelPath {
    let mut at = Some(path.clone());
    while let Some(dir) = at {
        if let Some(to) = leads(&dir) {
            return path.rebase(&dir, to).unwrap_or_else(|| path.clone());
        }
        at = dir.parent();
    }
    path.clone()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn p(text: &str) -> RelPath {
        RelPath::new(text.as_bytes()).unwrap()
    }

    fn place() -> impl Strategy<Value = RelPath> {
        proptest::sample::select(vec!["a", "b", "c", "a/x", "b/x", "c/x", "a/x/1", "b/x/1", "c/y", "c/y/1"]).prop_map(p)
    }

    proptest! {
        /// Both ways are what a search through all renames gives.
        #[test]
        fn both_ways_agree_with_a_search(renames in proptest::collection::vec((place(), place()), 0..12), of in place()) {
            let mut origins = Origins::default();
            for (from, to) in &renames {
                if !to.is_within(from) && !from.is_within(to) {
                    origins.renamed(from, to);
                }
            }
            let moved = origins.rows.iter().filter(|(_, from)| of.is_within(from)).max_by_key(|(_, from)| from.as_bytes().len());
            let searched = moved.and_then(|(to, from)| of.rebase(from, to)).unwrap_or_else(|| of.clone());
            prop_assert_eq!(origins.now_at(&of), searched);
            let known: BTreeSet<_> = origins.now.iter().flat_map(|(from, all)| all.iter().map(move |to| (to, from))).collect();
            prop_assert_eq!(known, origins.rows.iter().collect::<BTreeSet<_>>());
        }
    }
}
