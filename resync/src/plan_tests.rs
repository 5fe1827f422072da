//! The planner against a model: whatever the tree did, the rows afterwards are the tree, and the same ops give the same rows elsewhere.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use twinbox_protocol::digest::DigestKey;
use twinbox_protocol::entry::{Entry, Kind, Time};
use twinbox_protocol::ids::{ContentHash, Lsn};
use twinbox_protocol::msg::Position;
use twinbox_protocol::ops::{Content, Op};
use twinbox_protocol::path::RelPath;

use super::{Body, Found, Hint, PlanError, Seen, plan};
use crate::manifest::{Manifest, plain_dir};
use crate::rows::{Local, Rows, perform};
use crate::view::View;

fn p(text: &str) -> RelPath {
    RelPath::new(text.as_bytes()).unwrap()
}

/// A file system small enough to be obviously right.
#[derive(Clone, Default)]
struct Tree {
    nodes: BTreeMap<RelPath, u64>,
    inodes: BTreeMap<u64, Option<Vec<u8>>>,
    next: u64,
    /// Numbers that are free again, of directories and of files: the next one of its kind that is made has the last of them.
    free: [Vec<u64>; 2],
}

impl Tree {
    fn is_dir(&self, path: &RelPath) -> bool {
        path.is_root() || self.nodes.get(path).is_some_and(|ino| self.inodes[ino].is_none())
    }
    fn below(&self, dir: &RelPath) -> Vec<RelPath> {
        self.nodes.keys().filter(|q| *q != dir && q.is_within(dir)).cloned().collect()
    }
    fn add(&mut self, path: &RelPath, body: Option<Vec<u8>>) -> bool {
        if self.nodes.contains_key(path) || !path.parent().is_some_and(|d| self.is_dir(&d)) {
            return false;
        }
        let ino = self.free[usize::from(body.is_some())].pop().unwrap_or_else(|| {
            self.next += 1;
            self.next
        });
        self.inodes.insert(ino, body);
        self.nodes.insert(path.clone(), ino);
        true
    }
    fn remove(&mut self, path: &RelPath) -> bool {
        let gone = self.nodes.remove(path);
        self.free(gone);
        gone.is_some()
    }
    fn free(&mut self, ino: Option<u64>) {
        if let Some(ino) = ino.filter(|ino| !self.nodes.values().any(|other| other == ino)) {
            self.free[usize::from(self.inodes[&ino].is_some())].push(ino);
        }
    }
    fn rename(&mut self, from: &RelPath, to: &RelPath) -> bool {
        if !self.nodes.contains_key(from) || to.is_within(from) || !to.parent().is_some_and(|d| self.is_dir(&d)) || from.is_within(to) {
            return false;
        }
        if self.nodes.contains_key(to) && (self.is_dir(from) != self.is_dir(to) || !self.below(to).is_empty()) {
            return false;
        }
        if self.nodes.get(from) == self.nodes.get(to) {
            return false;
        }
        let over = self.nodes.remove(to);
        self.free(over);
        for path in self.below(from).into_iter().chain([from.clone()]) {
            let ino = self.nodes.remove(&path).unwrap();
            self.nodes.insert(path.rebase(from, to).unwrap(), ino);
        }
        true
    }
    fn seen(&self, path: &RelPath, read: bool) -> Seen {
        let Some(ino) = self.nodes.get(path) else { return Seen::Absent };
        let body = &self.inodes[ino];
        let kind = match body {
            None => Kind::Dir,
            Some(bytes) => Kind::File { size: bytes.len() as u64, hash: ContentHash::of(bytes) },
        };
        let nlink = self.nodes.values().filter(|i| *i == ino).count() as u64;
        Seen::Present(Box::new(Found {
            entry: Entry { kind, ..plain_dir() },
            local: Local { ino: *ino, ctime: Time::default() },
            nlink,
            body: match body {
                Some(bytes) if read => Body::Bytes(bytes.clone()),
                _ => Body::Unread,
            },
        }))
    }
}

#[derive(Clone, Debug)]
enum Act {
    File(u8, u8),
    Dir(u8),
    Write(u8, u8),
    Link(u8, u8),
    Rename(u8, u8),
    Remove(u8),
    /// Two names are exchanged, with all below them.
    Exchange(u8, u8),
    /// A folder goes with all that is in it.
    Drop(u8),
    /// The same as mail servers do it: renamed first.
    Trash(u8),
    /// Rows were pulled from the standby: what this machine knew of the files is gone, and all of them are looked at again.
    Pulled,
}

const NAMES: [&str; 14] = ["a", "b", "c", "a/a", "a/b", "b/a", "b/c", "a/a/a", "b/a/x", "c/x", "c/x/y", "b/c/z", "c/a", "trash"];

fn act() -> impl Strategy<Value = Act> {
    // Mostly few names: what matters is what comes again under them.
    let n = prop_oneof![2 => proptest::sample::select(vec![0u8, 1, 3, 4]), 1 => 0u8..NAMES.len() as u8];
    prop_oneof![
        (n.clone(), 0u8..4).prop_map(|(a, b)| Act::File(a, b)),
        n.clone().prop_map(Act::Dir),
        (n.clone(), 0u8..4).prop_map(|(a, b)| Act::Write(a, b)),
        (n.clone(), n.clone()).prop_map(|(a, b)| Act::Link(a, b)),
        (n.clone(), n.clone()).prop_map(|(a, b)| Act::Rename(a, b)),
        (n.clone(), n.clone()).prop_map(|(a, b)| Act::Exchange(a, b)),
        n.clone().prop_map(Act::Remove),
        n.clone().prop_map(Act::Drop),
        n.prop_map(Act::Trash),
        Just(Act::Pulled),
    ]
}

struct World {
    tree: Tree,
    view: View,
    replica: Manifest,
    dirty: BTreeMap<RelPath, bool>,
    hints: Vec<Hint>,
    /// Directories that came, to be compared with the rows: at once, or (`late`) when all has happened.
    to_list: Vec<RelPath>,
    late: bool,
    lsn: Lsn,
    inodes: u64,
    _dirs: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let dirs = tempfile::tempdir().unwrap();
        let mut manifest = Manifest::open(&dirs.path().join("p.db"), false).unwrap();
        let mut replica = Manifest::open(&dirs.path().join("s.db"), true).unwrap();
        manifest.set_digest_key(DigestKey([5; 32])).unwrap();
        replica.set_digest_key(DigestKey([5; 32])).unwrap();
        replica.begin().unwrap();
        let view = View::new(manifest);
        World {
            tree: Tree::default(),
            view,
            replica,
            dirty: BTreeMap::new(),
            hints: vec![],
            to_list: vec![],
            late: false,
            lsn: Lsn(0),
            inodes: 0,
            _dirs: dirs,
        }
    }

    fn list(&mut self, dir: RelPath) {
        self.to_list.push(dir);
        if !self.late {
            self.list_all();
        }
    }

    /// What is not as in the rows of where a directory was is dirty.
    fn list_all(&mut self) {
        while let Some(dir) = self.to_list.pop() {
            if !self.tree.is_dir(&dir) {
                self.dirty.entry(dir).or_default();
                continue;
            }
            let mut rows: BTreeMap<RelPath, Option<u64>> = BTreeMap::new();
            for (name, row) in self.view.children(&self.origin(&dir)).unwrap() {
                rows.insert(dir.join(&name).unwrap(), row.local.map(|local| local.ino));
            }
            for path in self.tree.below(&dir).into_iter().filter(|path| path.parent().as_ref() == Some(&dir)) {
                let row = rows.remove(&path);
                if self.tree.is_dir(&path) {
                    self.to_list.push(path.clone());
                    if row.is_none() {
                        self.dirty.entry(path).or_default();
                    }
                } else if self.origin(&path) != self.origin(&dir).join(path.name()).unwrap()
                    || row != Some(self.tree.nodes.get(&path).copied())
                {
                    self.dirty.insert(path, true);
                }
            }
            for path in rows.into_keys() {
                self.dirty.entry(path).or_default();
            }
        }
    }

    /// What the watcher would make of an act.
    fn act(&mut self, act: &Act) {
        let at = |n: &u8| p(NAMES[*n as usize]);
        match act {
            Act::File(a, body) => {
                if self.tree.add(&at(a), Some(vec![*body; 600])) {
                    self.dirty.insert(at(a), true);
                }
            }
            Act::Dir(a) => {
                if self.tree.add(&at(a), None) {
                    self.dirty.entry(at(a)).or_default();
                    self.list(at(a));
                }
            }
            Act::Write(a, body) => {
                if let Some(ino) = self.tree.nodes.get(&at(a)).copied().filter(|i| self.tree.inodes[i].is_some()) {
                    self.tree.inodes.insert(ino, Some(vec![body + 10; 700]));
                    for (name, _) in self.tree.nodes.iter().filter(|(_, i)| **i == ino) {
                        self.dirty.insert(name.clone(), true);
                    }
                }
            }
            Act::Link(a, b) => {
                let free = !self.tree.nodes.contains_key(&at(b)) && at(b).parent().is_some_and(|d| self.tree.is_dir(&d));
                if let Some(ino) = self.tree.nodes.get(&at(a)).copied().filter(|i| free && self.tree.inodes[i].is_some()) {
                    self.tree.nodes.insert(at(b), ino);
                    self.dirty.insert(at(b), true);
                    self.dirty.entry(at(a)).or_default();
                }
            }
            Act::Rename(a, b) => {
                let (from, to) = (at(a), at(b));
                if self.tree.rename(&from, &to) {
                    let moved: BTreeSet<RelPath> = self.dirty.keys().filter(|q| q.is_within(&from)).cloned().collect();
                    for path in moved {
                        let flag = self.dirty.remove(&path).unwrap();
                        *self.dirty.entry(path.rebase(&from, &to).unwrap()).or_default() |= flag;
                    }
                    self.dirty.entry(from.clone()).or_default();
                    self.dirty.entry(to.clone()).or_default();
                    self.hints.push(Hint { from: from.clone(), to: to.clone() });
                    if self.tree.is_dir(&to) {
                        self.to_list.iter_mut().for_each(|dir| *dir = dir.rebase(&from, &to).unwrap_or_else(|| dir.clone()));
                        self.list(from);
                        self.list(to);
                    }
                }
            }
            Act::Exchange(a, b) => {
                let (a, b) = (at(a), at(b));
                let are = self.tree.nodes.contains_key(&a) && self.tree.nodes.contains_key(&b);
                if !are || a.is_within(&b) || b.is_within(&a) || self.tree.nodes[&a] == self.tree.nodes[&b] {
                    return;
                }
                let within = |path: &RelPath| path.is_within(&a) || path.is_within(&b);
                let (moved, rest) = std::mem::take(&mut self.tree.nodes).into_iter().partition(|(path, _)| within(path));
                self.tree.nodes = rest;
                let moved: BTreeMap<RelPath, u64> = moved;
                for (path, ino) in moved {
                    let new = path.rebase(&a, &b).or_else(|| path.rebase(&b, &a)).unwrap();
                    self.dirty.insert(path, true); // The capture lists both.
                    self.dirty.insert(new.clone(), true);
                    self.tree.nodes.insert(new, ino);
                }
                self.hints.extend([Hint { from: a.clone(), to: b.clone() }, Hint { from: b, to: a }]);
            }
            Act::Pulled => {
                // Renames are distrusted then: where they led is compared.
                self.hints.clear();
                self.dirty.extend(self.tree.nodes.keys().map(|path| (path.clone(), true)));
                for (path, _) in self.view.below(&RelPath::root()).unwrap() {
                    self.view.set_local(&path, None).unwrap();
                    self.dirty.insert(path, true);
                }
            }
            Act::Drop(a) => {
                let gone: Vec<RelPath> = self.tree.nodes.keys().filter(|path| path.is_within(&at(a))).cloned().collect();
                for path in gone.into_iter().rev() {
                    self.tree.remove(&path);
                    self.dirty.entry(path).or_default();
                }
            }
            Act::Trash(a) => {
                let trash = NAMES.len() as u8 - 1;
                self.act(&Act::Rename(*a, trash));
                self.act(&Act::Drop(trash));
            }
            Act::Remove(a) => {
                let path = at(a);
                if self.tree.below(&path).is_empty() && self.tree.remove(&path) {
                    self.dirty.entry(path).or_default();
                }
            }
        }
    }

    /// Where a path's row is before the hints: as the capture does it.
    fn origin(&self, path: &RelPath) -> RelPath {
        let mut at = path.clone();
        for hint in self.hints.iter().rev() {
            if let Some(before) = at.rebase(&hint.to, &hint.from) {
                at = before;
            }
        }
        at
    }

    fn cut(&mut self) {
        self.list_all();
        let mut dirty = std::mem::take(&mut self.dirty);
        // A rescan: everything is dirty and read, and no hint is trusted.
        for attempt in 0..2 {
            let seen: BTreeMap<RelPath, Seen> = dirty
                .iter()
                .map(|(path, content)| {
                    let row = self.view.row(&self.origin(path)).unwrap();
                    let known = match (self.tree.seen(path, true), row.and_then(|r| r.local)) {
                        (Seen::Present(found), Some(local)) => local.ino == found.local.ino,
                        _ => false,
                    };
                    (path.clone(), self.tree.seen(path, *content || !known))
                })
                .collect();
            self.lsn = self.lsn.next();
            match plan(&mut self.view, self.lsn, &seen, &self.hints) {
                Ok(ops) => {
                    self.ship(&ops);
                    break;
                }
                Err(error) => {
                    assert_eq!(attempt, 0, "a full rescan must always plan: {error}");
                    self.hints.clear();
                    let rows = self.view.below(&RelPath::root()).unwrap();
                    dirty =
                        rows.into_iter().map(|(path, _)| path).chain(self.tree.nodes.keys().cloned()).map(|path| (path, true)).collect();
                }
            }
        }
        self.hints.clear();
        self.check();
    }

    fn ship(&mut self, ops: &[Op]) {
        let mut had: BTreeSet<ContentHash> =
            self.replica.below(&RelPath::root()).unwrap().iter().filter_map(|(_, row)| row.entry.hash()).collect();
        for op in ops {
            if let Op::Put { entry, content, .. } = op {
                let fresh = had.insert(entry.hash().unwrap());
                assert!(!fresh || *content != Content::Known, "a reference to what the standby never had");
            }
            perform(&mut self.replica, op).unwrap();
            if let Op::Put { path, .. } | Op::Make { path, .. } = op {
                // A new inode there; a link copies it.
                self.inodes += 1;
                self.replica.set_local(path, Some(Local { ino: self.inodes, ctime: Time::default() })).unwrap();
            }
        }
        assert_eq!(self.replica.digest(), self.view.digest());
    }

    fn check(&mut self) {
        let rows = self.view.below(&RelPath::root()).unwrap();
        assert_eq!(rows.iter().map(|(path, _)| path).collect::<Vec<_>>(), self.tree.nodes.keys().collect::<Vec<_>>());
        for (path, row) in rows {
            let Seen::Present(found) = self.tree.seen(&path, true) else { unreachable!() };
            assert_eq!((&row.entry, row.local.map(|l| l.ino)), (&found.entry, Some(found.local.ino)), "{path}");
            assert_eq!(self.replica.row(&path).unwrap().unwrap().entry, found.entry, "{path}");
        }
        // Names that share an inode here share one there, and no others do.
        let there = |path: &RelPath| self.replica.row(path).unwrap().unwrap().local.map(|l| l.ino);
        for (a, ino) in self.tree.nodes.iter().filter(|(a, _)| !self.tree.is_dir(a)) {
            for (b, other) in self.tree.nodes.iter().filter(|(b, _)| !self.tree.is_dir(b)) {
                assert_eq!(ino == other, there(a) == there(b), "{a} and {b}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]
    #[test]
    fn rows_after_the_plan_are_the_tree(rounds in proptest::collection::vec(proptest::collection::vec(act(), 1..12), 1..8), acked in 0u64..4, late in any::<bool>()) {
        let mut world = World { late, ..World::new() };
        for (n, acts) in rounds.iter().enumerate() {
            acts.iter().for_each(|a| world.act(a));
            world.cut();
            if n as u64 % 4 == acked {
                let position = Position { lsn: world.lsn, ..Position::START };
                world.view.handle_durable(position).unwrap();
                world.check();
                prop_assert_eq!(world.view.manifest().digest(), world.view.digest());
            }
        }
    }
}

#[test]
fn a_rename_ships_no_content_and_a_moved_folder_is_one_op() {
    let mut world = World::new();
    for act in [Act::Dir(0), Act::File(3, 1), Act::File(4, 2)] {
        world.act(&act);
    }
    world.cut();
    world.act(&Act::Rename(0, 1));
    let seen = [(p("a"), Seen::Absent), (p("b"), world.tree.seen(&p("b"), false))].into();
    let ops = plan(&mut world.view, Lsn(9), &seen, &world.hints).unwrap();
    assert_eq!(ops, [Op::Rename { from: p("a"), to: p("b") }]);
}

/// Mail servers make a folder under one name and rename it at once.
#[test]
fn a_directory_that_was_made_since_the_last_cut_and_renamed_is_made_under_its_new_name() {
    let mut world = World::new();
    for act in [Act::Dir(0), Act::File(3, 1), Act::Rename(0, 1)] {
        world.act(&act);
    }
    let seen = ["a", "b", "b/a"].map(|path| (p(path), world.tree.seen(&p(path), true))).into();
    let ops = plan(&mut world.view, Lsn(9), &seen, &world.hints).unwrap();
    assert!(matches!(&ops[..], [Op::Make { path: b, .. }, Op::Put { path: a, .. }] if *b == p("b") && *a == p("b/a")), "{ops:?}");
}

#[test]
fn a_failed_plan_leaves_rows_and_digest_as_they_were() {
    let mut world = World::new();
    world.act(&Act::Dir(0));
    world.act(&Act::File(3, 1));
    world.cut();
    let before = world.view.digest();
    world.tree.add(&p("b"), None);
    world.tree.add(&p("b/a"), Some(vec![1; 10]));
    // The file is seen but its directory is not: something was missed.
    let seen = [(p("a/a"), Seen::Absent), (p("b/a"), world.tree.seen(&p("b/a"), true))].into();
    assert!(plan(&mut world.view, Lsn(9), &seen, &[]).is_err());
    assert_eq!(world.view.digest(), before);
    assert!(world.view.row(&p("a/a")).unwrap().is_some());
    assert!(world.view.row(&p("b/a")).unwrap().is_none());
}

/// A folder is renamed, then renamed into one that goes with it, and another one is made under the name between: nothing of the first is in that.
#[test]
fn what_passed_through_a_name_that_another_folder_has_by_now_is_not_in_it() {
    let mut world = World::new();
    for act in [Act::Dir(0), Act::File(3, 1)] {
        world.act(&act);
    }
    world.cut();
    world.tree.add(&p("b"), None);
    world.tree.nodes.retain(|path, _| path == &p("b"));
    let hint = |from: &str, to: &str| Hint { from: p(from), to: p(to) };
    world.hints = vec![hint("a", "b"), hint("b", "c/x")]; // "c" was made for it, and is gone.
    world.dirty = ["a", "b", "c", "c/x", "c/x/a"].into_iter().map(|path| (p(path), false)).collect();
    world.cut();
}

/// Two folders whose names were exchanged are both there: neither made way for the other.
#[test]
fn folders_that_were_exchanged_keep_what_they_have() {
    let mut world = World::new();
    for act in [Act::Dir(0), Act::File(3, 1), Act::Dir(1), Act::File(6, 2)] {
        world.act(&act);
    }
    world.cut();
    world.act(&Act::Exchange(0, 1));
    world.cut();
}

#[test]
fn what_cannot_be_read_any_more_keeps_its_content_when_it_is_renamed() {
    let mut world = World::new();
    for act in [Act::File(0, 1), Act::Dir(1), Act::File(5, 2)].iter() {
        world.act(act);
    }
    world.cut();
    // Both are made unreadable, then renamed; one of them twice.
    let hint = |from: &str, to: &str| Hint { from: p(from), to: p(to) };
    let hints = [hint("a", "t"), hint("b", "d"), hint("t", "c")];
    let seen = [("a", Seen::Absent), ("b", Seen::Absent), ("t", Seen::Absent), ("c", Seen::Skip), ("d", Seen::Skip)];
    let seen = seen.into_iter().map(|(path, seen)| (p(path), seen)).collect();
    plan(&mut world.view, Lsn(90), &seen, &hints).unwrap();
    let names: Vec<String> = world.view.below(&RelPath::root()).unwrap().iter().map(|(path, _)| path.to_string()).collect();
    assert_eq!(names, ["c", "d", "d/a"], "else the standby throws away what it has of them");
}

#[test]
fn a_file_below_a_directory_that_cannot_be_read_waits_for_it() {
    let mut world = World::new();
    world.tree.add(&p("a"), None);
    world.tree.add(&p("a/a"), Some(vec![1; 9]));
    world.tree.add(&p("b"), Some(vec![2; 9]));
    let seen = [("a", Seen::Skip), ("a/a", world.tree.seen(&p("a/a"), true)), ("b", world.tree.seen(&p("b"), true))];
    let seen = seen.into_iter().map(|(path, seen)| (p(path), seen)).collect();
    let ops = plan(&mut world.view, Lsn(1), &seen, &[])
        .expect("looked at again, it would be as unreadable as before: for ever, and nothing of its group would arrive");
    assert!(matches!(&ops[..], [Op::Put { path, .. }] if *path == p("b")), "{ops:?}");
}

#[test]
fn a_name_seen_before_its_inode_got_another_that_is_committed_is_looked_at_again() {
    let mut world = World::new();
    world.tree.add(&p("a"), Some(vec![1; 600]));
    let before = world.tree.seen(&p("a"), true);
    let ino = world.tree.nodes[&p("a")];
    world.tree.nodes.insert(p("b"), ino);
    let at = |secs, seen| match seen {
        Seen::Present(mut found) => {
            found.local.ctime = Time { secs, nanos: 0 };
            Seen::Present(found)
        }
        other => other,
    };
    plan(&mut world.view, Lsn(1), &[(p("b"), at(2, world.tree.seen(&p("b"), true)))].into(), &[]).unwrap();
    let stale = plan(&mut world.view, Lsn(2), &[(p("a"), at(1, before.clone()))].into(), &[]);
    assert!(matches!(stale, Err(PlanError::Rescan { .. })), "it would be an inode of its own on the standby: {stale:?}");
    let ops = plan(&mut world.view, Lsn(2), &[(p("a"), at(2, world.tree.seen(&p("a"), true)))].into(), &[]).unwrap();
    assert!(matches!(&ops[..], [Op::Link { .. }]), "{ops:?}");
    // The other name is gone and its inode number another file's: nothing to wait for.
    let gone = [(p("a"), at(1, before)), (p("b"), Seen::Absent)].into();
    plan(&mut world.view, Lsn(3), &gone, &[]).unwrap();
}

#[test]
fn a_row_that_bears_an_inode_number_used_again_is_left_alone() {
    let mut world = World::new();
    for act in [Act::Dir(0), Act::File(3, 1)] {
        world.act(&act);
    }
    world.cut();
    // The folder is gone, which another cut will say; its number belongs to a new file with two names.
    let ino = world.tree.nodes[&p("a")];
    let found = |path: &str| {
        let seen = world.tree.seen(&p("a/a"), true);
        let Seen::Present(mut found) = seen else { panic!("there") };
        (found.local.ino, found.nlink) = (ino, 2);
        (p(path), Seen::Present(found))
    };
    let seen = [found("n1"), found("n2")].into();
    let ops = plan(&mut world.view, Lsn(9), &seen, &[]).unwrap();
    assert!(matches!(&ops[..], [Op::Put { .. }, Op::Link { .. }]), "{ops:?}");
}

/// A folder goes (by way of the trash, or while nobody watched), and another one is made and renamed to its name: what lay in the first is not seen to be gone, for where
/// the second came from there is no row of it.
#[test]
fn what_lay_in_a_folder_is_not_in_the_one_that_came_under_its_name() {
    for watched in [true, false] {
        let mut world = World::new();
        for act in [Act::Dir(0), Act::File(3, 1)] {
            world.act(&act);
        }
        world.cut();
        if watched {
            world.act(&Act::Rename(0, 2)); // To "c", the trash; "a/a" goes with it.
            world.tree.nodes.retain(|path, _| !path.is_within(&p("c")));
            world.dirty.insert(p("c/a"), false);
        } else {
            world.tree.nodes.clear();
        }
        world.act(&Act::Dir(1));
        world.act(&Act::File(6, 2));
        world.act(&Act::Rename(1, 0)); // "b" with "b/c" is "a" now.
        world.cut();
    }
}

/// A file is moved into a folder that goes by way of another name, and a folder is made anew under the name it had: with the same inode number, or one that the rows never had. The file's own number is another file's.
#[test]
fn what_was_moved_into_a_folder_that_is_gone_is_not_in_the_one_made_anew() {
    for was_known in [true, false] {
        let mut world = World::new();
        for act in [Act::File(1, 1), Act::File(2, 2)].into_iter().chain(was_known.then_some(Act::Dir(0))) {
            world.act(&act);
        }
        world.cut();
        if !was_known {
            world.act(&Act::Dir(0));
        }
        world.act(&Act::Rename(1, 3)); // "b" is "a/a", and goes with "a".
        world.act(&Act::Trash(0));
        world.act(&Act::Dir(0));
        world.act(&Act::File(4, 3)); // "a/b" has its number.
        world.cut();
    }
}
