//! Two stores on a disk that were one: whatever happened to each of them, nothing is lost, nothing is there twice, and nothing depends on how often it is done.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use twinbox_protocol::digest::DigestKey;
use twinbox_protocol::ids::{ChainHash, Epoch, Generation, Lsn, MirrorId};
use twinbox_protocol::lineage::Lineage;
use twinbox_protocol::msg::Position;
use twinbox_protocol::path::RelPath;
use twinbox_protocol::rejoin::{Changes, Merge, Merged};
use twinbox_resync::manifest::Manifest;
use twinbox_resync::node::{MirrorState, NodeState, Role};
use twinbox_resync::reconcile::{Mail, Outcome, Plan, Policy, What, questions, reconcile};
use twinbox_resync::rows::{Row, Rows};

use super::store::{Lent, Store};
use super::tail::{differences, look, tail};
use super::work::{Job, Stored};
use crate::layout::{Grouping, Layout, Selection};
use crate::roles::MirrorSpec;
use crate::tree::Root;

const MAILDIR: &str = "anna/Maildir";

/// One thing a mail server or its users do.
#[derive(Debug, Clone)]
enum Step {
    Deliver(usize, usize),
    Flag(usize, usize),
    Delete(usize),
    Move(usize, usize),
    RenameFolder(usize, usize),
    MakeFolder(usize),
    DeleteFolder(usize),
    Write(usize),
    See(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0usize..4, 0usize..4).prop_map(|(folder, flags)| Step::Deliver(folder, flags)),
        3 => (any::<usize>(), 0usize..6).prop_map(|(which, flags)| Step::Flag(which, flags)),
        2 => any::<usize>().prop_map(Step::Delete),
        2 => (any::<usize>(), 0usize..4).prop_map(|(which, folder)| Step::Move(which, folder)),
        2 => (0usize..4, 0usize..4).prop_map(|(from, to)| Step::RenameFolder(from, to)),
        1 => (0usize..4).prop_map(Step::MakeFolder),
        1 => (0usize..4).prop_map(Step::DeleteFolder),
        1 => (0usize..3).prop_map(Step::Write),
        1 => any::<usize>().prop_map(Step::See),
    ]
}

fn folder(n: usize) -> PathBuf {
    if n == 0 { MAILDIR.into() } else { format!("{MAILDIR}/.F{n}").into() }
}

fn make_folder(root: &Path, n: usize) {
    for part in ["cur", "new", "tmp"] {
        fs::create_dir_all(root.join(folder(n)).join(part)).unwrap();
    }
}

fn messages(root: &Path) -> Vec<PathBuf> {
    let mut all = vec![];
    for n in 0..8 {
        for part in ["cur", "new"] {
            for item in fs::read_dir(root.join(folder(n)).join(part)).into_iter().flatten().flatten() {
                all.push(item.path());
            }
        }
    }
    all.sort();
    all
}

/// `tag` keeps names and contents of one side apart from those of the other.
fn act(root: &Path, tag: &str, at: usize, step: &Step) {
    const FLAGS: [&str; 6] = ["", "S", "F", "FS", "RS", "DFRST"];
    let pick = |which: usize| {
        let all = messages(root);
        (!all.is_empty()).then(|| all[which % all.len()].clone())
    };
    let unique = |path: &Path| path.file_name().unwrap().to_str().unwrap().split(':').next().unwrap().to_owned();
    match step {
        Step::Deliver(n, flags) => {
            let to = root.join(folder(*n));
            if to.join("cur").is_dir() {
                let name = if *flags == 0 { format!("new/{at}.{tag}") } else { format!("cur/{at}.{tag}:2,{}", FLAGS[*flags]) };
                fs::write(to.join(name), format!("message {at} of {tag}")).unwrap();
            }
        }
        Step::Flag(which, flags) => {
            if let Some(from) = pick(*which) {
                let cur = from.parent().unwrap().parent().unwrap().join("cur");
                let to = cur.join(format!("{}:2,{}", unique(&from), FLAGS[*flags]));
                fs::rename(&from, to).unwrap();
            }
        }
        Step::See(which) => {
            if let Some(from) = pick(*which).filter(|from| from.parent().unwrap().ends_with("new")) {
                let cur = from.parent().unwrap().parent().unwrap().join("cur");
                fs::rename(&from, cur.join(format!("{}:2,", unique(&from)))).unwrap();
            }
        }
        Step::Delete(which) => drop(pick(*which).map(|path| fs::remove_file(path).unwrap())),
        Step::Move(which, n) => {
            let to = root.join(folder(*n)).join("cur");
            if let Some(from) = pick(*which).filter(|_| to.is_dir()) {
                // As Dovecot: a link under a new name, then the old one goes.
                fs::rename(&from, to.join(format!("{at}.{tag}m:2,S"))).unwrap();
            }
        }
        Step::RenameFolder(from, to) => {
            let (from, to) = (root.join(folder(*from + 1)), root.join(folder(*to + 4)));
            if from.is_dir() && !to.exists() {
                fs::rename(from, to).unwrap();
            }
        }
        Step::MakeFolder(n) => make_folder(root, n + 1),
        Step::DeleteFolder(n) => drop(fs::remove_dir_all(root.join(folder(n + 1)))),
        Step::Write(n) => {
            let name = ["sieve", "dovecot.index.log", "subscriptions"][*n];
            fs::write(root.join(MAILDIR).join(name), format!("{name} {at} of {tag}")).unwrap();
        }
    }
}

/// Rows of a tree as it is.
fn rows(root: &Path, db: &Path) {
    let (tree, mut manifest) = (Root::open(root).unwrap(), Manifest::open(db, true).unwrap());
    manifest.begin().unwrap();
    manifest.set_lsn(Lsn(7));
    let mut stack = vec![RelPath::root()];
    while let Some(path) = stack.pop() {
        let Some((entry, local)) = look(&tree, &path, None).unwrap() else { continue };
        if entry.is_dir() {
            let names = fs::read_dir(root.join(std::str::from_utf8(path.as_bytes()).unwrap())).unwrap();
            stack.extend(names.flatten().filter_map(|item| path.join(item.file_name().as_encoded_bytes())));
        }
        manifest.set(&path, Some(Row { entry, local: Some(local) })).unwrap();
    }
    manifest.commit(Position { lsn: Lsn(7), chain: ChainHash([7; 32]) }).unwrap();
}

/// How often each content is below a directory, of messages or of everything.
fn contents(root: &Path) -> BTreeMap<Vec<u8>, usize> {
    let (mut all, mut stack) = (BTreeMap::new(), vec![root.to_owned()]);
    while let Some(dir) = stack.pop() {
        for item in fs::read_dir(&dir).into_iter().flatten().flatten() {
            if item.file_type().unwrap().is_dir() {
                stack.push(item.path());
            } else {
                *all.entry(fs::read(item.path()).unwrap()).or_default() += 1;
            }
        }
    }
    all
}

struct Rig {
    dir: tempfile::TempDir,
    job: Job,
}

impl Rig {
    fn ours(&self) -> PathBuf {
        self.dir.path().join("ours")
    }

    fn theirs(&self) -> PathBuf {
        self.dir.path().join("theirs")
    }

    fn store(&self) -> Store {
        let lent = Lent {
            root: self.theirs(),
            mirror_dir: self.dir.path().join("them"),
            selection: Selection::new(Layout::Maildir, vec![]),
            grouping: Grouping::new(vec![]),
            name: "mail".into(),
            tool: std::sync::Arc::default(),
            alone: std::sync::Arc::default(),
        };
        Store::open(&lent).unwrap()
    }

    /// Both are the same; then each goes on alone.
    fn new(common: &[Step], alone: [&[Step]; 2]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let spec = MirrorSpec {
            name: "mail".into(),
            root: dir.path().join("ours"),
            layout: "maildir".into(),
            role: Role::Standby,
            selection: Selection::new(Layout::Maildir, vec![]),
            grouping: Grouping::new(vec![]),
            adopt: false,
            sweep: None,
            fuzzy_after: None,
            tool: std::sync::Arc::default(),
        };
        let job = Job { node: "alpha".into(), spec, state_dir: dir.path().join("us"), winner: None, policy: Policy::Merge };
        let rig = Rig { dir, job };
        let (ours, theirs) = (rig.ours(), rig.theirs());
        (0..4).for_each(|n| make_folder(&ours, n));
        common.iter().enumerate().for_each(|(at, step)| act(&ours, "both", at, step));
        assert!(std::process::Command::new("cp").arg("-a").args([&ours, &theirs]).status().unwrap().success());
        let us = rig.dir.path().join("us/mirrors/mail");
        fs::create_dir_all(&us).unwrap();
        fs::create_dir_all(rig.dir.path().join("them")).unwrap();
        let known = MirrorState {
            mirror_id: MirrorId([1; 16]),
            role: Role::Standby,
            lineage: Lineage::begin(Generation([1; 16]), "alpha"),
            epoch: Epoch(1),
            digest_key: DigestKey([0; 32]),
            reserved: Lsn(7),
            complete: true,
        };
        NodeState::open(&rig.job.state_dir).unwrap().set_mirror("mail", &known).unwrap();
        rows(&ours, &us.join("manifest.db"));
        rows(&theirs, &rig.dir.path().join("them/manifest.db"));
        for (root, tag, steps) in [(&ours, "ours", alone[0]), (&theirs, "theirs", alone[1])] {
            steps.iter().enumerate().for_each(|(at, step)| act(root, tag, at, step));
        }
        rig
    }

    fn plan(&self) -> Plan {
        let manifest = Manifest::open(&self.dir.path().join("us/mirrors/mail/manifest.db"), true).unwrap();
        let root = Root::open(&self.ours()).unwrap();
        let (all, _) = differences(&manifest, &root, &self.job.spec.selection, false, &mut |_| {}).unwrap();
        let (tail, mut store) = (tail(&all, &root), self.store());
        let asks = questions(&tail);
        let theirs: std::collections::HashMap<_, _> =
            asks.into_iter().filter_map(|ask| Some((ask.clone(), store.find(&ask).unwrap()?))).collect();
        let plan = reconcile(&tail, Mail::Maildir, Policy::Merge, &theirs);
        assert_eq!(plan, reconcile(&tail, Mail::Maildir, Policy::Merge, &theirs), "the same again");
        plan
    }

    /// As [`Job::apply`] has it done over the network.
    fn merge(&self, plan: &Plan) -> Stored {
        let mut stored = Stored {
            other: "beta".into(),
            lineage: Lineage::begin(Generation([1; 16]), "beta"),
            epoch: Epoch(2),
            fork: Position { lsn: Lsn(7), chain: ChainHash([7; 32]) },
            policy: Policy::Merge,
            plan: plan.clone(),
            changes: Changes::default(),
            merged: true,
            done: BTreeSet::new(),
            asked: Policy::Merge,
            there: BTreeSet::new(),
            rescued: None,
        };
        let mut store = self.store();
        let (first, rest): (Vec<usize>, Vec<usize>) = (0..plan.items.len()).partition(|n| plan.items[*n].what == What::FolderMove);
        let mut dirs = false;
        for n in first.iter().chain(&rest) {
            let item = &mut stored.plan.items[*n];
            if item.what != What::FolderMove && !std::mem::replace(&mut dirs, true) {
                for (path, entry) in &plan.dirs {
                    store.merge(&Merge::Dir { path: path.clone(), entry: entry.clone() }, None).unwrap();
                }
            }
            let Some(merge) = item.merge.clone() else { continue };
            let file = matches!(merge, Merge::Message { .. }).then(|| File::open(self.ours().join(item.path.to_string())).unwrap());
            match store.merge(&merge, file.as_ref()).unwrap() {
                Merged::Done | Merged::Already => {
                    if let Merge::Message { entry, .. } = &merge {
                        stored.there.extend(entry.hash());
                    }
                }
                Merged::Kept { why } => {
                    stored.plan.rescue.push(item.path.clone());
                    item.outcome = Outcome::Rescue { why };
                }
            }
        }
        stored
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn nothing_is_lost_or_there_twice(
        common in proptest::collection::vec(step(), 0..14),
        ours in proptest::collection::vec(step(), 0..10),
        theirs in proptest::collection::vec(step(), 0..10),
    ) {
        let rig = Rig::new(&common, [&ours, &theirs]);
        let (before, tail) = (contents(&rig.theirs()), contents(&rig.ours()));
        let fork: BTreeSet<Vec<u8>> = {
            let other = Rig::new(&common, [&[], &[]]);
            contents(&other.ours()).into_keys().collect()
        };
        let plan = rig.plan();
        let mut stored = rig.merge(&plan);
        let after = contents(&rig.theirs());
        for (content, times) in &before {
            prop_assert_eq!(after.get(content), Some(times), "of what the winner had: {:?}", String::from_utf8_lossy(content));
        }
        for (content, times) in &after {
            prop_assert!(*times <= *before.get(content).unwrap_or(&1), "twice: {:?}", String::from_utf8_lossy(content));
        }
        // Once more, as after a crash, changes nothing.
        rig.merge(&plan);
        prop_assert_eq!(&contents(&rig.theirs()), &after);
        let report: Vec<_> = stored.plan.items.iter().map(|item| (item.what, item.path.clone())).collect();
        let told: BTreeSet<_> = report.iter().collect();
        prop_assert_eq!(told.len(), report.len(), "an item twice");

        rig.job.settle(&mut stored, &|_, _, _| {}).unwrap();
        let kept = contents(&rig.dir.path().join("us/mirrors/mail/rescue"));
        for content in tail.keys() {
            // What both had, the winner has or has deleted itself.
            let there = after.contains_key(content) || kept.contains_key(content) || fork.contains(content);
            prop_assert!(there, "lost: {:?}", String::from_utf8_lossy(content));
        }
        // The rows say what the disk has, to the last byte: nothing is left to be told.
        let manifest = Manifest::open(&rig.dir.path().join("us/mirrors/mail/manifest.db"), true).unwrap();
        let root = Root::open(&rig.ours()).unwrap();
        let (left, _) = differences(&manifest, &root, &rig.job.spec.selection, false, &mut |_| {}).unwrap();
        let left: Vec<_> = left.iter().filter(|(_, it)| !it.ours.as_ref().is_some_and(|(entry, _)| entry.is_dir())).map(|(path, _)| path).collect();
        prop_assert!(left.is_empty(), "{:?}", left);
    }
}
