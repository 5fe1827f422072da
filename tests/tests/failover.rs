//! Roles that change: a clean switch there and back, an old primary that comes back with a tail, two primaries at once. Real agents on loopback.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use twinbox_tests::gate::{heavy, wait_until};
use twinbox_tests::node::{MirrorSaid, Node, Spec, free_udp, pair};
use twinbox_tests::scratch::Scratch;
use twinbox_tests::tree::{Layout, Rules, assert_identical, wait_identical};
use twinbox_tests::twinbox::{Ended, Program};

const LIMIT: Duration = Duration::from_secs(60);
/// `ExitCode::Refused`.
const REFUSED: i32 = 16;

struct World {
    trees: [PathBuf; 2],
    nodes: [Node; 2],
    /// Says which boot of its machine `alpha` runs in.
    boot: PathBuf,
    _scratch: Scratch,
}

impl World {
    /// `alpha` is primary, `beta` its standby, and both are in sync.
    fn new(name: &str) -> Self {
        let scratch = Scratch::new(name);
        let boot = scratch.join("boot-id");
        fs::write(&boot, "boot-0\n").unwrap();
        let alpha = Program::under_env("TWINBOX_BOOT_ID_FILE", &boot);
        let trees = [scratch.dir("alpha-store"), scratch.dir("beta-store")];
        for dir in ["new", "cur", "tmp", ".Sent/new", ".Sent/cur"] {
            fs::create_dir_all(trees[0].join("anna/Maildir").join(dir)).unwrap();
        }
        let first = Spec { node: "alpha", role: "primary", mirror: "mail", root: &trees[0], layout: Layout::Maildir, listen: free_udp() };
        let second = Spec { node: "beta", role: "standby", root: &trees[1], listen: free_udp(), ..first.clone() };
        let nodes = [Node::init(alpha, &scratch.join("alpha"), &first), Node::init(Program::here(), &scratch.join("beta"), &second)];
        pair(&nodes[0], &nodes[1]);
        let mut world = World { trees, nodes, boot, _scratch: scratch };
        for n in 0..20 {
            world.deliver(0, &format!("new/{n}"), &format!("message {n}"));
        }
        // A message that was copied to another folder.
        let maildir = world.trees[0].join("anna/Maildir");
        fs::hard_link(maildir.join("new/3"), maildir.join(".Sent/cur/3:2,")).unwrap();
        world.nodes.iter_mut().for_each(Node::start);
        world.in_sync();
        world
    }

    fn deliver(&self, node: usize, name: &str, text: &str) {
        let maildir = self.trees[node].join("anna/Maildir");
        fs::write(maildir.join("tmp/x"), text).unwrap();
        fs::rename(maildir.join("tmp/x"), maildir.join(name)).unwrap();
    }

    fn holds(&self, node: usize, name: &str) -> Option<String> {
        fs::read_to_string(self.trees[node].join("anna/Maildir").join(name)).ok()
    }

    fn said(&self, node: usize) -> MirrorSaid {
        self.nodes[node].status().expect("a status").said.mirrors.remove(0)
    }

    fn in_sync(&self) {
        for node in &self.nodes {
            node.wait_state(LIMIT, "protected");
        }
        if let Err(why) = wait_identical(&self.trees[0], &self.trees[1], Rules::of(Layout::Maildir), LIMIT) {
            panic!("not identical {why}\n{:#?}\n{:#?}", self.nodes[0].status(), self.nodes[1].status());
        }
    }

    fn ok(&self, node: usize, words: &[&str]) {
        self.nodes[node].command(words).ok(&words.join(" "));
    }

    #[track_caller]
    fn refused(&self, node: usize, words: &[&str], because: &str) {
        let Ended { status, stderr, .. } = self.nodes[node].command(words);
        assert_eq!(status.code(), Some(REFUSED), "{words:?}: {stderr}");
        assert!(stderr.contains(because), "{words:?}: {stderr}");
    }

    /// What is kept in rescue: ends of paths, and contents.
    fn rescued(&self, node: usize) -> Vec<(String, String)> {
        fn walk(dir: &Path, out: &mut Vec<(String, String)>) {
            for item in fs::read_dir(dir).into_iter().flatten().flatten() {
                if item.file_type().unwrap().is_dir() {
                    walk(&item.path(), out);
                } else {
                    let name = item.file_name().to_string_lossy().into_owned();
                    out.push((name, fs::read_to_string(item.path()).unwrap()));
                }
            }
        }
        let mut out = vec![];
        walk(&self.nodes[node].state.join("mirrors/mail/rescue"), &mut out);
        out.sort();
        out
    }
}

#[test]
fn a_switch_there_and_back_loses_nothing() {
    let _turn = heavy();
    let world = World::new("switch");
    world.refused(1, &["promote"], "alive and connected");
    world.refused(0, &["promote"], "is its primary already");
    world.refused(1, &["demote"], "is its standby already");
    world.refused(0, &["promote", "--mirror", "male"], "no mirror of that name");
    let before = world.said(0).generation;

    world.ok(0, &["demote"]);
    assert_eq!((world.said(0).role.as_str(), world.said(1).role.as_str()), ("standby", "standby"));
    world.ok(1, &["promote"]);
    assert_eq!((world.said(1).role.as_str(), world.said(1).epoch), ("primary", 2));
    world.deliver(1, "new/on beta", "written on beta");
    fs::rename(world.trees[1].join("anna/Maildir/.Sent"), world.trees[1].join("anna/Maildir/.Gone")).unwrap();
    world.in_sync();
    assert_eq!(world.holds(0, "new/on beta").as_deref(), Some("written on beta"));
    let after = world.said(1).generation;
    assert_ne!(before, after, "what is written after a promotion is another history");
    assert_eq!(world.said(0).generation, after);

    world.ok(1, &["demote"]);
    world.ok(0, &["promote"]);
    assert_eq!(world.said(0).epoch, 3);
    world.deliver(0, "new/back on alpha", "written on alpha");
    world.in_sync();
    assert_eq!(world.holds(1, "new/back on alpha").as_deref(), Some("written on alpha"));
    assert_identical(&world.trees[0], &world.trees[1], Rules::of(Layout::Maildir));
    for node in 0..2 {
        assert_eq!(world.rescued(node), [], "nobody lost anything");
    }
}

#[test]
fn an_old_primary_that_comes_back_loses_nothing_of_its_tail() {
    comes_back(false);
}

/// Then it would be healed first, and its standby is none any more.
#[test]
fn nor_does_one_whose_machine_lost_power() {
    comes_back(true);
}

fn comes_back(power_cut: bool) {
    let _turn = heavy();
    let mut world = World::new("tail");
    world.nodes[1].kill9();
    world.nodes[0].wait_state(LIMIT, "unprotected");
    // What nobody else has.
    let generation = world.said(0).generation;
    world.deliver(0, "new/tail", "only on alpha");
    fs::write(world.trees[0].join("anna/Maildir/new/1"), "changed on alpha").unwrap();
    fs::remove_file(world.trees[0].join("anna/Maildir/new/2")).unwrap();
    wait_until(LIMIT, "a history of its own", || world.said(0).generation != generation);
    world.refused(0, &["demote"], "no standby follows");
    world.nodes[0].kill9();

    world.nodes[1].start();
    wait_until(LIMIT, "beta to answer", || world.nodes[1].status().is_some());
    world.ok(1, &["promote"]);
    world.deliver(1, "new/after", "only on beta");
    fs::write(world.trees[1].join("anna/Maildir/new/1"), "changed on beta").unwrap();
    for expunged in ["new/3", ".Sent/cur/3:2,"] {
        fs::remove_file(world.trees[1].join("anna/Maildir").join(expunged)).unwrap();
    }

    // It is back, and knows nothing: neither touches the other.
    if power_cut {
        fs::write(&world.boot, "boot-1\n").unwrap();
    }
    world.nodes[0].start();
    wait_until(LIMIT, "alpha to step down", || {
        world.nodes[0].status().is_some_and(|s| (s.said.mirrors[0].role.as_str(), s.said.mirrors[0].state.as_str()) == ("standby", "diverged"))
    });
    assert_eq!(world.holds(0, "new/after"), None);
    assert_eq!(world.holds(1, "new/tail"), None);
    world.refused(0, &["demote"], "twinbox resync plan");
    world.refused(0, &["promote"], "twinbox resync plan");
    world.ok(0, &["demote", "--force"]);
    world.in_sync();
    let now: Vec<_> = ["new/1", "new/2", "new/after", "new/tail"].iter().map(|name| world.holds(0, name)).collect();
    assert_eq!(now, [Some("changed on beta".into()), Some("message 2".into()), Some("only on beta".into()), None]);
    let rescued: Vec<(String, String)> = world.rescued(0);
    let rescued: Vec<(&str, &str)> = rescued.iter().map(|(name, content)| (name.as_str(), content.as_str())).collect();
    assert_eq!(rescued, [("1", "changed on alpha"), ("3", "message 3"), ("3:2,", "message 3"), ("tail", "only on alpha")]);
    assert_eq!(world.rescued(1), []);

    // And back, without loss.
    world.ok(1, &["demote"]);
    world.ok(0, &["promote"]);
    world.deliver(0, "new/last", "on alpha again");
    world.in_sync();
    assert_eq!(world.holds(1, "new/last").as_deref(), Some("on alpha again"));
}

#[test]
fn of_two_primaries_neither_touches_the_other() {
    let _turn = heavy();
    let mut world = World::new("split");
    world.ok(1, &["promote", "--force"]);
    for node in 0..2 {
        world.deliver(node, &format!("new/on {node}"), "alone");
    }
    world.nodes[0].wait_state(LIMIT, "diverged");
    // Nor after both have been restarted.
    for node in &mut world.nodes {
        node.stop();
        node.start();
    }
    world.nodes[0].wait_state(LIMIT, "diverged");
    assert_eq!((world.holds(0, "new/on 1"), world.holds(1, "new/on 0")), (None, None));
    world.ok(0, &["demote", "--force"]);
    world.in_sync();
    assert_eq!((world.holds(0, "new/on 1"), world.holds(1, "new/on 0")), (Some("alone".into()), None));
    assert_eq!(world.rescued(0), [("on 0".into(), "alone".into())]);
}
