//! Names of files that came and are not committed: where a file that goes may have gone, when it was moved by link and unlink or while nobody watched.
//!
//! Found by size and mtime, which a move leaves as they are, so that a search costs what is searched for and one stat a new name, once. Pure but for the stat it is given.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use twinbox_protocol::entry::Time;
use twinbox_protocol::path::RelPath;

/// A file under whatever name: inode number, size, mtime. The number alone is used again at once.
pub(super) type Which = (u64, u64, Time);

/// What a new name was, the last time somebody asked, and how many names that file had.
pub(super) type Stat = (Which, u64);

/// See the module's text.
#[derive(Debug, Default)]
pub(super) struct Fresh {
    /// With size and mtime, once somebody asked.
    names: BTreeMap<RelPath, Option<(u64, Time)>>,
    /// Of these, such as nobody has asked for, or was there when somebody did.
    unasked: BTreeSet<RelPath>,
    by_look: HashMap<(u64, Time), BTreeSet<RelPath>>,
}

impl Fresh {
    pub(super) fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.names.len()
    }

    pub(super) fn clear(&mut self) {
        *self = Fresh::default();
    }

    /// A file came.
    pub(super) fn insert(&mut self, path: RelPath) {
        self.remove(&path);
        self.unasked.insert(path.clone());
        self.names.insert(path, None);
    }

    /// It went, or is committed.
    pub(super) fn remove(&mut self, path: &RelPath) {
        let Some(look) = self.names.remove(path) else { return };
        self.unasked.remove(path);
        if let Some(look) = look
            && let Some(names) = self.by_look.get_mut(&look)
        {
            names.remove(path);
            if names.is_empty() {
                self.by_look.remove(&look);
            }
        }
    }

    /// A file or directory was renamed.
    pub(super) fn moved(&mut self, from: &RelPath, to: &RelPath) {
        let moved: Vec<RelPath> = self.within(from).cloned().collect();
        for path in moved {
            self.remove(&path);
            if let Some(new) = path.rebase(from, to) {
                self.insert(new);
            }
        }
    }

    /// Whether one of them is this path, or below it.
    pub(super) fn any_within(&self, dir: &RelPath) -> bool {
        self.within(dir).next().is_some()
    }

    fn within<'a>(&'a self, dir: &'a RelPath) -> impl Iterator<Item = &'a RelPath> {
        let own = self.names.get_key_value(dir).map(|(path, _)| path);
        let below = dir.below().map(|(low, high)| {
            use std::ops::Bound;
            self.names.range::<[u8], _>((Bound::Included(low.as_slice()), Bound::Excluded(high.as_slice())))
        });
        let all = dir.is_root().then(|| self.names.iter());
        own.into_iter().chain(below.into_iter().flatten().chain(all.into_iter().flatten()).map(|(path, _)| path))
    }

    /// Asks what those are of which that is not known.
    pub(super) fn ask(&mut self, stat: impl Fn(&RelPath) -> Option<Stat>) {
        self.unasked.retain(|path| {
            let Some(((_, size, mtime), _)) = stat(path) else { return true };
            self.names.insert(path.clone(), Some((size, mtime)));
            self.by_look.entry((size, mtime)).or_default().insert(path.clone());
            false
        });
    }

    /// Whether one of them looks like this. (After [`ask`](Self::ask).)
    pub(super) fn may_be(&self, size: u64, mtime: Time) -> bool {
        self.by_look.contains_key(&(size, mtime))
    }

    /// The names of this file, by what they are now: such as have its number, where that is known (of which whoever asks has seen that no other committed name has it), and such as look like it:
    /// after a heal it has another number than its row. Of those, what has several names may be a message delivered to many: copies, not a move.
    pub(super) fn find(&self, (ino, size, mtime): (Option<u64>, u64, Time), stat: impl Fn(&RelPath) -> Option<Stat>) -> Vec<RelPath> {
        let is_it =
            |path: &&RelPath| stat(path).is_some_and(|(now, names)| ino == Some(now.0) || names == 1 && (now.1, now.2) == (size, mtime));
        self.by_look.get(&(size, mtime)).into_iter().flatten().filter(is_it).cloned().collect()
    }

    /// A name is gone, with all below it that is.
    pub(super) fn remove_within(&mut self, dir: &RelPath, is_gone: impl Fn(&RelPath) -> bool) {
        let gone: Vec<RelPath> = self.within(dir).filter(|path| is_gone(path)).cloned().collect();
        gone.iter().for_each(|path| self.remove(path));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn p(text: &str) -> RelPath {
        RelPath::new(text.as_bytes()).unwrap()
    }

    fn at(secs: i64) -> Time {
        Time { secs, nanos: 0 }
    }

    #[test]
    fn a_file_is_found_by_what_it_is_under_whatever_name_it_has_by_now() {
        let disk = |path: &RelPath| match path.to_string().as_str() {
            "b/x" | "c/x" => Some(((7, 10, at(1)), 1)),
            "b/linked" => Some(((8, 10, at(1)), 2)),
            _ => None,
        };
        let mut fresh = Fresh::default();
        for name in ["b/x", "b/linked", "b/gone"] {
            fresh.insert(p(name));
        }
        assert!(!fresh.may_be(10, at(1)), "nobody asked");
        fresh.ask(disk);
        assert!(fresh.may_be(10, at(1)) && !fresh.may_be(11, at(1)));
        assert_eq!(fresh.find((Some(7), 10, at(1)), disk), [p("b/x")]);
        assert_eq!(fresh.find((None, 10, at(1)), disk), [p("b/x")], "the other has two names");
        assert_eq!(fresh.find((Some(9), 10, at(1)), disk), [p("b/x")], "it got another number");
        assert_eq!(fresh.find((Some(8), 10, at(1)), disk), [p("b/linked"), p("b/x")]);
        assert_eq!(fresh.find((Some(7), 11, at(1)), disk), []);
        fresh.moved(&p("b"), &p("c"));
        assert!(fresh.any_within(&p("c")) && !fresh.any_within(&p("b")) && fresh.any_within(&RelPath::root()));
        assert!(!fresh.may_be(10, at(1)), "asked for anew under the new name");
        fresh.ask(disk);
        assert_eq!(fresh.find((Some(7), 10, at(1)), disk), [p("c/x")]);
        assert_eq!(fresh.find((Some(7), 10, at(1)), |_| Some(((7, 10, at(1)), 2))), [p("c/x")], "whatever names it got since");
        fresh.remove(&p("c/x"));
        assert!(!fresh.may_be(10, at(1)) && fresh.len() == 2);
    }
}
