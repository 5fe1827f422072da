//! Tables of what is decided: each case is a tail and the other node's store, written down as paths and texts.

use std::collections::HashMap;

use super::*;
use crate::manifest::plain_dir;
use twinbox_protocol::entry::Kind;

fn p(text: &str) -> RelPath {
    RelPath::new(text.as_bytes()).unwrap()
}

fn file(text: &str) -> Entry {
    Entry { kind: Kind::File { size: text.len() as u64, hash: ContentHash::of(text.as_bytes()) }, ..plain_dir() }
}

fn flags(letters: &str) -> Flags {
    letters.chars().map(String::from).collect()
}

/// A tail and what the other node has, written down as `path text`.
#[derive(Default)]
struct World {
    tail: Tail,
    theirs: HashMap<Ask, Found>,
}

impl World {
    fn change(mut self, path: &str, fork: Option<Entry>, ours: Option<Entry>, was: Option<&str>) -> Self {
        let path = p(path);
        let letters = Name::of(&path).map_or_else(Flags::new, |name| name.flags(|_| None));
        let of = |entry: &Option<Entry>| if entry.is_some() { letters.clone() } else { Flags::new() };
        // Of a store `USER/Maildir`.
        let owner = path.as_bytes().split(|byte| *byte == b'/').take(2).collect::<Vec<_>>().join(&b'/');
        let (fork_flags, flags, owner) = (of(&fork), of(&ours), RelPath::new(&owner).unwrap());
        self.tail.insert(path, Change { fork, ours, was: was.map(p), owner, flags, fork_flags });
        self
    }

    fn came(self, path: &str, text: &str) -> Self {
        self.change(path, None, Some(file(text)), None)
    }

    fn went(self, path: &str, text: &str) -> Self {
        self.change(path, Some(file(text)), None, None)
    }

    fn folder(self, path: &str, was: Option<&str>) -> Self {
        let world = self.change(path, None, Some(plain_dir()), was);
        ["cur", "new", "tmp"].iter().fold(world, |world, part| {
            let was = was.map(|was| format!("{was}/{part}"));
            world.change(&format!("{path}/{part}"), None, Some(plain_dir()), was.as_deref())
        })
    }

    fn gone_folder(self, path: &str) -> Self {
        let world = self.change(path, Some(plain_dir()), None, None);
        ["cur", "new", "tmp"].iter().fold(world, |world, part| world.change(&format!("{path}/{part}"), Some(plain_dir()), None, None))
    }

    fn there(mut self, path: &str, entry: Entry) -> Self {
        let path = p(path);
        let name = Name::of(&path).filter(|_| entry.hash().is_some());
        let found = Found { path: path.clone(), entry, flags: name.as_ref().map_or_else(Flags::new, |name| name.flags(|_| None)) };
        if let Some(name) = name {
            self.theirs.insert(Ask::Message { folder: name.folder, unique: name.unique }, found.clone());
        }
        self.theirs.insert(Ask::Path(path), found);
        self
    }

    fn plan(&self) -> Plan {
        reconcile(&self.tail, Mail::Maildir, Policy::Merge, &self.theirs)
    }

    fn told(&self) -> Vec<String> {
        let outcome = |outcome: &Outcome| match outcome {
            Outcome::Merge => "merge",
            Outcome::Already => "already",
            Outcome::Stays { .. } => "stays",
            Outcome::Rescue { .. } => "rescue",
        };
        self.plan().items.iter().map(|item| format!("{:?} {} {}", item.what, item.path, outcome(&item.outcome))).collect()
    }
}

#[test]
fn flags_are_merged_one_by_one() {
    let world = World::default().went("a/M/cur/1:2,S", "x").came("a/M/cur/1:2,FS", "x").there("a/M/cur/1:2,RS", file("x"));
    assert_eq!(world.told(), ["Flags a/M/cur/1:2,FS merge"]);
    let merge = world.plan().items[0].merge.clone();
    assert_eq!(merge, Some(Merge::Flags { folder: p("a/M"), unique: b"1".to_vec(), set: flags("F"), clear: flags("") }));
    let world = World::default().went("a/M/cur/1:2,S", "x").came("a/M/cur/1:2,", "x").there("a/M/cur/1:2,R", file("x"));
    assert_eq!(world.told(), ["Flags a/M/cur/1:2, already"]);
    let world = World::default().went("a/M/new/1", "x").came("a/M/cur/1:2,", "x").there("a/M/new/1", file("x"));
    assert_eq!(world.told(), Vec::<String>::new(), "a client has looked into the folder");
    let world = World::default().went("a/M/new/1", "x").came("a/M/cur/1:2,S", "x");
    assert_eq!(world.told(), ["Flags a/M/cur/1:2,S rescue"], "the other node has deleted it: this one has the only copy");
    assert_eq!(world.plan().rescue, [p("a/M/cur/1:2,S")]);
}

#[test]
fn a_message_is_moved_within_a_store_and_never_into_another_users() {
    let moved = World::default().went("a/M/cur/1:2,S", "x").came("a/M/.T/cur/2:2,S", "x").there("a/M/cur/1:2,S", file("x"));
    assert_eq!(moved.told(), ["Move a/M/.T/cur/2:2,S merge"]);
    let mailing = World::default().went("a/M/cur/1:2,S", "x").came("b/M/.T/cur/2:2,S", "x").there("a/M/cur/1:2,S", file("x"));
    assert_eq!(mailing.told(), ["Message b/M/.T/cur/2:2,S merge", "Deletion a/M/cur/1:2,S stays"]);
}

#[test]
fn a_folder_that_is_about_to_be_removed_was_not_moved() {
    let trashed = World::default()
        .gone_folder("a/M/.X")
        .folder("a/M/..DOVECOT-TRASHED", Some("a/M/.X"))
        .went("a/M/.X/cur/1:2,S", "x")
        .came("a/M/..DOVECOT-TRASHED/cur/1:2,S", "x")
        .there("a/M/.X", plain_dir())
        .there("a/M/.X/cur/1:2,S", file("x"));
    let plan = trashed.plan();
    assert!(plan.items.iter().all(|item| !matches!(item.merge, Some(Merge::Rename { .. } | Merge::Move { .. }))), "{plan:?}");
    assert!(trashed.told().contains(&"Deletion a/M/.X/cur/1:2,S stays".into()), "{:?}", trashed.told());
}

#[test]
fn a_folder_is_moved_where_nothing_has_its_name() {
    let moved = |world: World| {
        let world = world.gone_folder("a/M/.X").folder("a/M/.Y", Some("a/M/.X"));
        world.went("a/M/.X/cur/1:2,S", "x").came("a/M/.Y/cur/1:2,S", "x").came("a/M/.Y/new/2", "late")
    };
    let there = |world: World| world.there("a/M/.X", plain_dir()).there("a/M/.X/cur/1:2,S", file("x"));
    let world = there(moved(World::default()));
    assert_eq!(world.told(), ["Message a/M/.Y/new/2 merge", "FolderMove a/M/.Y merge"]);
    let folder_of = |plan: &Plan| match &plan.items[0].merge {
        Some(Merge::Message { folder, .. }) => folder.clone(),
        other => panic!("{other:?}"),
    };
    assert_eq!(folder_of(&world.plan()), p("a/M/.Y"));
    let taken = there(moved(World::default())).there("a/M/.Y", plain_dir());
    assert_eq!(taken.told(), ["Message a/M/.Y/new/2 merge", "FolderMove a/M/.Y stays"]);
    assert_eq!(folder_of(&taken.plan()), p("a/M/.X"), "its mail is in the old one there");
    let deleted = moved(World::default());
    assert_eq!(deleted.told(), ["Message a/M/.Y/new/2 merge", "FolderMove a/M/.Y stays"]);
    assert_eq!(deleted.plan().rescue, [p("a/M/.Y/cur/1:2,S")], "the other node has no copy any more");
}

#[test]
fn what_is_no_mail_is_the_winners() {
    let world = World::default()
        .change("a/sieve", Some(file("old")), Some(file("mine")), None)
        .came("a/notes", "mine")
        .came("a/same", "both")
        .came("a/M/dovecot.index.log", "log")
        .went("a/gone", "old")
        .there("a/sieve", file("theirs"))
        .there("a/same", file("both"))
        .there("a/gone", file("old"));
    assert_eq!(world.told(), ["File a/gone stays", "File a/notes rescue", "File a/same already", "File a/sieve rescue"]);
    let plan = world.plan();
    assert_eq!((plan.rescue, plan.own), (vec![p("a/M/dovecot.index.log"), p("a/notes"), p("a/sieve")], 1));
    let nothing = reconcile(&world.tail, Mail::Maildir, Policy::Rescue, &world.theirs);
    assert!(nothing.items.iter().all(|item| item.merge.is_none()));
    let other = reconcile(&World::default().came("a/M/new/1", "x").tail, Mail::None, Policy::Merge, &HashMap::<Ask, Found>::new());
    assert!(matches!(other.items[0].outcome, Outcome::Rescue { .. }), "of another layout nothing is merged");
}

/// A folder was renamed here and deleted there: nobody else has its mail.
#[test]
fn what_lay_in_a_folder_that_the_other_node_deleted_is_kept() {
    let dir = || Some(plain_dir());
    let world = |there: bool| {
        let mut world = World::default()
            .change("u/sdbox/mailboxes/A", dir(), None, None)
            .change("u/sdbox/mailboxes/A/dbox-Mails", dir(), None, None)
            .went("u/sdbox/mailboxes/A/dbox-Mails/u.1", "mail")
            .change("u/sdbox/mailboxes/B", None, dir(), Some("u/sdbox/mailboxes/A"))
            .change("u/sdbox/mailboxes/B/dbox-Mails", None, dir(), Some("u/sdbox/mailboxes/A/dbox-Mails"))
            .came("u/sdbox/mailboxes/B/dbox-Mails/u.1", "mail");
        if there {
            for (path, entry) in [("u/sdbox/mailboxes/A", plain_dir()), ("u/sdbox/mailboxes/A/dbox-Mails/u.1", file("mail"))] {
                world.theirs.insert(Ask::Path(p(path)), Found { path: p(path), entry, flags: Flags::new() });
            }
        }
        world
    };
    let plan = |world: &World| reconcile(&world.tail, Mail::Boxes(&Boxes::default()), Policy::Merge, &world.theirs);
    let (gone, there) = (plan(&world(false)), plan(&world(true)));
    assert_eq!(gone.rescue, [p("u/sdbox/mailboxes/B/dbox-Mails/u.1")]);
    assert!(there.rescue.is_empty(), "{there:?}");
    let [item] = &there.items[..] else { panic!("{there:?}") };
    let rename = Task::Rename { mailbox: p("A"), to: p("B") };
    assert_eq!(item.merge, Some(Merge::Server { owner: p("u/sdbox"), task: rename }));
}
