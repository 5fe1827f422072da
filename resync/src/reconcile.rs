//! What is done with the tail of a node that was primary when it comes back: a pure function of the fork's state, the two states since, and a policy.
//!
//! *Tail*: what differs, on the returning node, from the rows both nodes had at the fork. The other node, which was promoted, goes on as it is; what it lacks of the tail is merged into it where that is safe, and
//! everything else the returning node has, and loses, is kept in rescue.
//!
//! Invariant (property-tested): every content of the tail is, after the plan, on the other node ([`Outcome::Merge`], [`Outcome::Already`]) or named in [`Plan::rescue`].

use std::collections::{BTreeMap, BTreeSet, HashMap};

use serde::{Deserialize, Serialize};
use twinbox_protocol::entry::Entry;
use twinbox_protocol::ids::ContentHash;
use twinbox_protocol::path::RelPath;
use twinbox_protocol::rejoin::{Ask, Flags, Found, Merge, Task};

use crate::boxes;
use crate::mailname::{Name, is_the_servers_own};

/// How a path of the returning node differs from the fork.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Change {
    /// What both had.
    pub fork: Option<Entry>,
    /// What is there now.
    pub ours: Option<Entry>,
    /// A new directory: the one of the fork that it was, by an inode that is older than the fork.
    pub was: Option<RelPath>,
    /// Whose store it is in: the topmost Maildir above it.
    pub owner: RelPath,
    /// Flags of what is there now, of a message.
    pub flags: Flags,
    /// The same, of what both had.
    pub fork_flags: Flags,
}

/// All of them.
pub type Tail = BTreeMap<RelPath, Change>;

/// What may be merged.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    /// Messages, flags and folders of a Maildir; the rest is kept in rescue.
    #[default]
    Merge,
    /// Nothing: all of it is kept in rescue.
    Rescue,
}

/// Kind of an item.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum What {
    /// A message that came.
    Message,
    /// A message whose flags changed.
    Flags,
    /// A message that was deleted.
    Deletion,
    /// A message that was moved to another folder.
    Move,
    /// A folder that came.
    Folder,
    /// A folder that was given another name.
    FolderMove,
    /// A folder that was deleted.
    FolderDeletion,
    /// Anything else that came, was changed, or was deleted.
    File,
}

/// What becomes of it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "outcome")]
pub enum Outcome {
    /// Made on the other node too.
    Merge,
    /// It is so there already.
    Already,
    /// The other node's state stays.
    Stays {
        /// For people.
        why: String,
    },
    /// The other node's state stays, and this node's version is kept.
    Rescue {
        /// For people.
        why: String,
    },
}

/// One thing that happened on the returning node alone.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Item {
    /// Kind.
    pub what: What,
    /// Where: on this node, or, when it is gone, at the fork.
    pub path: RelPath,
    /// Where it was at the fork, if elsewhere.
    pub from: Option<RelPath>,
    /// What becomes of it.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// How it is made on the other node.
    pub merge: Option<Merge>,
    /// Where the message is that goes with it, if that is not the file `path`.
    pub part: Option<Part>,
}

impl Item {
    /// By what its message is recognised, if it is given as a new one.
    #[must_use]
    pub fn print(&self) -> Option<ContentHash> {
        match &self.merge {
            Some(Merge::Server { task: Task::Import { print, .. }, .. }) => Some(*print),
            _ => None,
        }
    }
}

/// A message within a file.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Part {
    /// The file.
    pub file: RelPath,
    /// Its bytes there.
    pub bytes: std::ops::Range<u64>,
    /// Headers of the mail server's own are among them.
    pub is_mbox: bool,
    /// Content of a file that has nothing else that is wanted: with its message on the other node nobody needs it.
    pub whole: Option<ContentHash>,
}

/// What is known of a store.
#[derive(Clone, Copy, Debug)]
pub enum Mail<'a> {
    /// Files.
    None,
    /// A Maildir.
    Maildir,
    /// Formats of which the mail server keeps the index: what was found in its files.
    Boxes(&'a Boxes),
}

/// What was found in a mail server's own files.
#[derive(Clone, Default, Debug)]
pub struct Boxes {
    /// Messages, flags, deletions; of folders those that are files.
    pub items: Vec<Item>,
    /// Files with mail in them that only the mail server understands, besides those it is known of by their names.
    pub own: BTreeSet<RelPath>,
    /// Directories that are mailboxes, besides those of dbox: whose, and its name.
    pub places: BTreeMap<RelPath, (RelPath, RelPath)>,
    /// Files that went along with such a directory: now ▶ at the fork.
    pub moved: BTreeMap<RelPath, RelPath>,
}

impl Boxes {
    fn place(&self, path: &RelPath) -> Option<(RelPath, RelPath)> {
        self.places.get(path).cloned().or_else(|| boxes::place(path))
    }
}

/// What is to be done.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Plan {
    /// One for each thing that happened.
    pub items: Vec<Item>,
    /// Directories that are made on the other node before anything is merged, outermost first.
    pub dirs: Vec<(RelPath, Entry)>,
    /// Paths of this node that are kept in rescue before the other's state replaces them: losers, and the mail server's own files.
    pub rescue: Vec<RelPath>,
    /// How many of those are the mail server's own files, which it makes anew.
    pub own: u64,
}

/// What is in the other node's store now, of what was asked; what is missing is not there.
pub type Theirs = HashMap<Ask, Found>;

/// Folders that were given another name: new name ▶ old one.
#[must_use]
pub fn folder_moves(tail: &Tail) -> BTreeMap<&RelPath, &RelPath> {
    let gone = |path: &RelPath| tail.get(path).is_some_and(|change| change.ours.is_none());
    let moves: BTreeMap<&RelPath, &RelPath> = tail
        .iter()
        .filter(|(path, _)| !is_in_trash(path)) // What a mail server renames before it removes it is not moved.
        .filter_map(|(path, change)| Some((path, change.was.as_ref().filter(|was| gone(was))?)))
        .collect();
    // What lies in a directory that was moved has moved with it.
    let with_above = |to: &RelPath, from: &RelPath| {
        let above = std::iter::successors(to.parent(), RelPath::parent);
        above.into_iter().any(|dir| moves.get(&dir).is_some_and(|was| to.rebase(&dir, was).as_ref() == Some(from)))
    };
    moves.iter().filter(|(to, from)| !with_above(to, from)).map(|(to, from)| (*to, *from)).collect()
}

/// Whether Dovecot is about to remove it, with the directory it is in (`..DOVECOT-TRASHED`, or without the dots in other layouts).
fn is_in_trash(path: &RelPath) -> bool {
    path.as_bytes().split(|byte| *byte == b'/').any(|name| name.starts_with(b"..") || name == b"DOVECOT-TRASHED")
}

/// Where a path was before the folders were moved.
#[must_use]
pub fn before(moves: &BTreeMap<&RelPath, &RelPath>, path: &RelPath) -> Option<RelPath> {
    std::iter::successors(Some(path.clone()), RelPath::parent).find_map(|dir| path.rebase(&dir, moves.get(&dir)?))
}

/// What has to be known of the other node.
#[must_use]
pub fn questions(tail: &Tail) -> BTreeSet<Ask> {
    let moves = folder_moves(tail);
    let mut asks = BTreeSet::new();
    for (path, change) in tail {
        asks.insert(Ask::Path(path.clone()));
        let file = [&change.fork, &change.ours].into_iter().flatten().all(|entry| !entry.is_dir());
        if let Some(name) = Name::of(path).filter(|_| file) {
            let folders = [Some(name.folder.clone()), before(&moves, &name.folder)];
            asks.extend(folders.into_iter().flatten().map(|folder| Ask::Message { folder, unique: name.unique.clone() }));
        }
    }
    asks
}

struct Reconciler<'a> {
    tail: &'a Tail,
    theirs: &'a Theirs,
    moves: BTreeMap<&'a RelPath, &'a RelPath>,
    /// Of those, the ones that the other node takes over.
    merged: BTreeSet<RelPath>,
    /// Only the mail server may change anything.
    boxes: Option<&'a Boxes>,
    plan: Plan,
}

/// A message that went or came.
struct Seen<'a> {
    path: &'a RelPath,
    name: Name,
    change: &'a Change,
}

/// Messages by their unique names.
type ByName<'a> = BTreeMap<Vec<u8>, Vec<Seen<'a>>>;

/// Decides.
#[must_use]
pub fn reconcile(tail: &Tail, mail: Mail<'_>, policy: Policy, theirs: &Theirs) -> Plan {
    let mail = if policy == Policy::Merge { mail } else { Mail::None };
    let moves = if let Mail::None = mail { BTreeMap::new() } else { folder_moves(tail) };
    let boxes = if let Mail::Boxes(boxes) = mail { Some(boxes) } else { None };
    let mut work = Reconciler { tail, theirs, moves, merged: BTreeSet::new(), boxes, plan: Plan::default() };
    match mail {
        Mail::None => {}
        Mail::Maildir => {
            work.folders();
            work.messages();
        }
        Mail::Boxes(boxes) => {
            work.folders();
            work.boxed(&boxes.items);
        }
    }
    work.files(mail);
    let Reconciler { mut plan, .. } = work;
    plan.items.sort_by(|a, b| (a.what, &a.path).cmp(&(b.what, &b.path)));
    plan.rescue.sort();
    plan.rescue.dedup();
    plan
}

impl<'a> Reconciler<'a> {
    fn at(&self, path: &RelPath) -> Option<&Found> {
        self.theirs.get(&Ask::Path(path.clone()))
    }

    fn message(&self, folder: &RelPath, unique: &[u8]) -> Option<&Found> {
        self.theirs.get(&Ask::Message { folder: folder.clone(), unique: unique.to_vec() })
    }

    fn item(&mut self, what: What, path: &RelPath, from: Option<&RelPath>, outcome: Outcome, merge: Option<Merge>) {
        if matches!(outcome, Outcome::Rescue { .. }) {
            self.plan.rescue.push(path.clone());
        }
        self.plan.items.push(Item { what, path: path.clone(), from: from.cloned(), outcome, merge, part: None });
    }

    fn is_folder(&self, dir: &RelPath, fork: bool) -> bool {
        let side = |change: &'a Change| if fork { change.fork.as_ref() } else { change.ours.as_ref() };
        let mark: &[u8] = if self.boxes.is_some() { boxes::MAILS } else { b"cur" };
        dir.join(mark).and_then(|mark| self.tail.get(&mark)).and_then(side).is_some_and(Entry::is_dir)
    }

    fn folders(&mut self) {
        for (to, from) in self.moves.clone() {
            let (outcome, merge) = match (self.at(from), self.at(to)) {
                (Some(there), None) if there.entry.is_dir() => match self.rename(from, to) {
                    Some(merge) => {
                        self.merged.insert(to.clone());
                        (Outcome::Merge, Some(merge))
                    }
                    None => (stays("it went from one user to another: its mail is where that node has it"), None),
                },
                (None, Some(there)) if there.entry.is_dir() => {
                    self.merged.insert(to.clone());
                    (Outcome::Already, None)
                }
                (None, _) => (stays("the other node has deleted or renamed it too: its mail is where that one has it"), None),
                _ => (stays("the other node has a folder of the new name, too: its mail stays in the old one"), None),
            };
            self.item(What::FolderMove, to, Some(from), outcome, merge);
        }
        let (mut new, mut gone) = (vec![], vec![]);
        for (path, change) in self.tail {
            let is_dir = |entry: &Option<Entry>| entry.as_ref().is_some_and(Entry::is_dir);
            if is_dir(&change.ours) && change.fork.is_none() && before(&self.moves, path).is_none() && self.is_folder(path, false) {
                new.push(path);
            }
            let moved = |path: &RelPath| self.moves.values().any(|was| path.is_within(was));
            if is_dir(&change.fork) && change.ours.is_none() && !moved(path) && self.is_folder(path, true) {
                gone.push(path);
            }
        }
        for path in new {
            let there = self.at(path).is_some();
            let place = self.boxes.and_then(|boxes| boxes.place(path)).filter(|_| !there);
            let merge = place.map(|(owner, mailbox)| Merge::Server { owner, task: Task::Create { mailbox } });
            if self.boxes.is_none() {
                self.dirs(path);
                for part in [b"cur", b"new", b"tmp"] {
                    path.join(part).into_iter().for_each(|part| self.dirs(&part));
                }
            }
            self.item(What::Folder, path, None, if there { Outcome::Already } else { Outcome::Merge }, merge);
        }
        for path in gone {
            let outcome = match self.at(path) {
                None => Outcome::Already,
                Some(_) => stays("deletions are not repeated: mail comes back rather than vanishes"),
            };
            self.item(What::FolderDeletion, path, None, outcome, None);
        }
    }

    fn rename(&self, from: &RelPath, to: &RelPath) -> Option<Merge> {
        let Some(boxes) = self.boxes else { return Some(Merge::Rename { from: from.clone(), to: to.clone() }) };
        let ((owner, mailbox), (other, to)) = (boxes.place(from)?, boxes.place(to)?);
        (owner == other).then_some(Merge::Server { owner, task: Task::Rename { mailbox, to } })
    }

    /// What the mail server's files say; folders are told already.
    fn boxed(&mut self, items: &[Item]) {
        for item in items {
            let mut item = item.clone();
            if item.what == What::Deletion && self.at(&item.path).is_none() && boxes::is_message(&item.path) {
                item.outcome = Outcome::Already;
            }
            if matches!(item.outcome, Outcome::Rescue { .. }) {
                self.plan.rescue.push(item.part.as_ref().map_or_else(|| item.path.clone(), |part| part.file.clone()));
            }
            self.plan.items.push(item);
        }
    }

    /// The other node needs this directory, and those above it.
    fn dirs(&mut self, path: &RelPath) {
        let mut above: Vec<RelPath> = std::iter::successors(Some(path.clone()), RelPath::parent).filter(|dir| !dir.is_root()).collect();
        above.reverse();
        for dir in above {
            let known = self.at(&dir).is_some() || self.plan.dirs.iter().any(|(made, _)| *made == dir);
            if let Some(entry) = self.tail.get(&dir).and_then(|change| change.ours.clone()).filter(|_| !known) {
                self.plan.dirs.push((dir, entry));
            }
        }
    }

    /// Where a folder of this node is on the other one, once folders have been moved there.
    fn place(&self, folder: &RelPath) -> RelPath {
        let moved = std::iter::successors(Some(folder.clone()), RelPath::parent).find(|dir| self.moves.contains_key(dir));
        match moved {
            // It stays where it was, unless there is none any more.
            Some(dir) if !self.merged.contains(&dir) => {
                let was = self.moves.get(&dir).and_then(|was| folder.rebase(&dir, was));
                was.filter(|_| self.moves.get(&dir).is_some_and(|was| self.at(was).is_some())).unwrap_or_else(|| folder.clone())
            }
            _ => folder.clone(),
        }
    }

    /// What the other node has of a message that both had, wherever its folder is by now.
    fn theirs_of(&self, seen: &Seen<'_>) -> Option<Found> {
        self.message(&seen.name.folder, &seen.name.unique).cloned()
    }

    fn messages(&mut self) {
        let (mut went, mut came): (ByName<'a>, ByName<'a>) = (BTreeMap::new(), BTreeMap::new());
        for (path, change) in self.tail {
            let Some(name) = Name::of(path) else { continue };
            let file = |entry: &Option<Entry>| entry.as_ref().is_some_and(|entry| entry.hash().is_some());
            let (list, key) = match (file(&change.fork), file(&change.ours)) {
                (true, false) if change.ours.is_none() => (&mut went, name.unique.clone()),
                (false, true) if change.fork.is_none() && !is_in_trash(path) => (&mut came, name.unique.clone()),
                _ => continue, // Other bytes under one name: a file like others.
            };
            list.entry(key).or_default().push(Seen { path, name, change });
        }
        let mut pairs: Vec<(Seen<'a>, Seen<'a>)> = vec![];
        for (unique, froms) in &mut went {
            let Some(tos) = came.get_mut(unique) else { continue };
            // In the same folder first: a flag; then wherever it went.
            for same in [true, false] {
                let mut at = 0;
                while at < froms.len() {
                    let from = &froms[at];
                    let was = |to: &Seen<'_>| before(&self.moves, &to.name.folder).unwrap_or_else(|| to.name.folder.clone());
                    let fits = |to: &Seen<'_>| {
                        let place = if same { was(to) == from.name.folder } else { to.change.owner == from.change.owner };
                        place && content(&to.change.ours) == content(&from.change.fork)
                    };
                    match tos.iter().position(fits) {
                        Some(to) => pairs.push((froms.remove(at), tos.remove(to))),
                        None => at += 1,
                    }
                }
            }
        }
        // A mail server that moves a message gives it a new name; it is the same one by its content, in the same user's store.
        let mut left: HashMap<(ContentHash, &RelPath), Vec<Seen<'a>>> = HashMap::new();
        for from in went.into_values().flatten() {
            if let Some(hash) = content(&from.change.fork) {
                left.entry((hash, &from.change.owner)).or_default().push(from);
            }
        }
        let mut fresh = vec![];
        for to in came.into_values().flatten() {
            let key = content(&to.change.ours).map(|hash| (hash, &to.change.owner));
            match key.and_then(|key| left.get_mut(&key)?.pop()) {
                Some(from) => pairs.push((from, to)),
                None => fresh.push(to),
            }
        }
        for (from, to) in pairs {
            self.pair(&from, &to);
        }
        fresh.iter().for_each(|to| self.fresh(to));
        for from in left.into_values().flatten() {
            let outcome = match self.theirs_of(&from) {
                None => Outcome::Already,
                Some(_) => stays("deletions are not repeated: mail comes back rather than vanishes"),
            };
            self.item(What::Deletion, from.path, None, outcome, None);
        }
    }

    /// A message that both had, under another name by now.
    fn pair(&mut self, from: &Seen<'a>, to: &Seen<'a>) {
        let (fork, ours) = (&from.change.fork_flags, &to.change.flags);
        let stayed = before(&self.moves, &to.name.folder).unwrap_or_else(|| to.name.folder.clone()) == from.name.folder
            && from.name.unique == to.name.unique;
        if stayed && fork == ours {
            // Moved with its folder, or from `new` to `cur`, which a client does that looks into the folder.
            if self.theirs_of(from).or_else(|| self.theirs_of(to)).is_none() {
                self.plan.rescue.push(to.path.clone());
            }
            return;
        }
        let what = if stayed { What::Flags } else { What::Move };
        let Some(theirs) = self.theirs_of(from).or_else(|| if stayed { self.theirs_of(to) } else { None }) else {
            let why = "the other node has deleted it".into();
            return self.item(what, to.path, Some(from.path), Outcome::Rescue { why }, None);
        };
        let (set, clear): (Flags, Flags) = (ours.difference(fork).cloned().collect(), fork.difference(ours).cloned().collect());
        // There is only set and not set: whoever changed a flag that both had made it the same.
        let so_already = set.is_subset(&theirs.flags) && clear.is_disjoint(&theirs.flags);
        let place = self.place(&to.name.folder);
        let there = Name::of(&theirs.path).map_or_else(|| from.name.folder.clone(), |name| name.folder);
        // Folders are moved first.
        let there =
            self.moves.iter().filter(|(to, _)| self.merged.contains(**to)).find_map(|(to, from)| there.rebase(from, to)).unwrap_or(there);
        let merge = if stayed {
            (!so_already).then(|| Merge::Flags { folder: place, unique: to.name.unique.clone(), set, clear })
        } else {
            let (was, unique) = (from.name.unique.clone(), to.name.unique.clone());
            self.dirs(&place);
            Some(Merge::Move { from: there, was, folder: place, unique, set, clear })
        };
        let outcome = if merge.is_some() { Outcome::Merge } else { Outcome::Already };
        self.item(what, to.path, Some(from.path), outcome, merge);
    }

    fn delivery(&self, to: &Seen<'_>, folder: RelPath) -> Option<Merge> {
        let entry = to.change.ours.clone()?;
        Some(Merge::Message { folder, unique: to.name.unique.clone(), flags: to.change.flags.clone(), entry })
    }

    /// A message that only this node has.
    fn fresh(&mut self, to: &Seen<'a>) {
        if to.change.ours.as_ref().is_some_and(|entry| entry.size() == 0) {
            let why = "it is empty: its bytes were lost in a power cut, or never written".into();
            return self.item(What::Message, to.path, None, Outcome::Rescue { why }, None);
        }
        let folder = self.place(&to.name.folder);
        match self.message(&folder, &to.name.unique) {
            Some(there) if content(&Some(there.entry.clone())) == content(&to.change.ours) => {
                self.item(What::Message, to.path, None, Outcome::Already, None);
            }
            Some(_) => {
                let why = "the other node has another message of that name".into();
                self.item(What::Message, to.path, None, Outcome::Rescue { why }, None);
            }
            None => {
                self.dirs(&folder);
                let merge = self.delivery(to, folder);
                self.item(What::Message, to.path, None, Outcome::Merge, merge);
            }
        }
    }

    /// Everything that is no message or folder, or that nobody may merge.
    fn files(&mut self, mail: Mail<'_>) {
        let merging = !matches!(mail, Mail::None);
        let is_message = |path: &RelPath| matches!(mail, Mail::Maildir) && Name::of(path).is_some();
        let boxes = self.boxes;
        let is_own = |path: &RelPath| {
            is_the_servers_own(path) || boxes.is_some_and(|boxes| boxes.own.contains(path) || boxes::is_the_servers_own(path))
        };
        let mut done: BTreeSet<RelPath> = self.plan.items.iter().map(|item| item.path.clone()).collect();
        if merging {
            // Messages that were told together with another name, and what came along.
            done.extend(self.plan.items.iter().filter_map(|item| item.from.clone()));
        }
        for (path, change) in self.tail {
            let of_message = is_message(path) && (change.fork.is_none() || change.ours.is_none());
            let dir = |entry: &Option<Entry>| entry.as_ref().is_none_or(Entry::is_dir);
            if done.contains(path) || of_message || (dir(&change.fork) && dir(&change.ours)) {
                continue;
            }
            let own = is_own(path);
            let ours = change.ours.as_ref().filter(|entry| !entry.is_dir());
            let there = self.at(path).map(|found| found.entry.kind.clone());
            let there = there.as_ref();
            if own {
                self.plan.own += 1;
                // Gone to another name with its folder it is as it was.
                let was = boxes.and_then(|boxes| boxes.moved.get(path).cloned()).or_else(|| before(&self.moves, path));
                let as_it_was = was.is_some_and(|was| {
                    let then = self.tail.get(&was).is_some_and(|then| content(&then.fork) == content(&change.ours));
                    // And the other node has it still, under one name or the other.
                    let there =
                        |path: &RelPath| self.at(path).is_some_and(|found| content(&Some(found.entry.clone())) == content(&change.ours));
                    then && (there(&was) || there(path))
                });
                if ours.is_some_and(|entry| Some(&entry.kind) != there) && !as_it_was {
                    self.plan.rescue.push(path.clone());
                }
                continue;
            }
            let from =
                before(&self.moves, path).filter(|was| self.tail.get(was).is_some_and(|then| content(&then.fork) == content(&change.ours)));
            let moved_away = |path: &RelPath| {
                self.moves.iter().any(|(to, from)| {
                    path.rebase(from, to).and_then(|to| self.tail.get(&to)).is_some_and(|now| content(&now.ours) == content(&change.fork))
                })
            };
            match ours {
                // Came along with its folder, which is on the other node under one name or the other.
                Some(_) if from.is_some() => {
                    if self.at(path).is_none() && from.as_ref().is_none_or(|from| self.at(from).is_none()) {
                        let why = "the other node has deleted it".into();
                        self.item(What::File, path, from.as_ref(), Outcome::Rescue { why }, None);
                    }
                }
                Some(entry) if Some(&entry.kind) == there => self.item(What::File, path, None, Outcome::Already, None),
                Some(_) => {
                    let why = if there.is_some() { "the other node has its own" } else { "the other node does not have it" };
                    self.item(What::File, path, None, Outcome::Rescue { why: why.into() }, None);
                }
                None if moved_away(path) => {}
                None => {
                    let outcome = if there.is_some() { stays("deletions are not repeated") } else { Outcome::Already };
                    self.item(What::File, path, None, outcome, None);
                }
            }
        }
    }
}

fn stays(why: &str) -> Outcome {
    Outcome::Stays { why: why.into() }
}

fn content(entry: &Option<Entry>) -> Option<ContentHash> {
    entry.as_ref().and_then(Entry::hash)
}

#[cfg(test)]
#[path = "reconcile_tests.rs"]
mod tests;
