//! Two nodes on loopback with a small Maildir store, whose roles change.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::node::{MirrorSaid, Node, Spec, free_udp, pair};
use crate::scratch::Scratch;
use crate::tree::{Layout, Rules, wait_identical};
use crate::twinbox::{Ended, Program};

/// Longest wait for anything.
pub const LIMIT: Duration = Duration::from_secs(60);
/// `ExitCode::Refused`.
pub const REFUSED: i32 = 16;

/// Two nodes: `alpha`, primary to begin with, and `beta`.
#[derive(Debug)]
pub struct World {
    /// Their stores.
    pub trees: [PathBuf; 2],
    /// They.
    pub nodes: [Node; 2],
    /// Says which boot of its machine `alpha` runs in.
    pub boot: PathBuf,
    _scratch: Scratch,
}

impl World {
    /// `alpha` is primary, `beta` its standby, and both are in sync.
    pub fn new(name: &str) -> Self {
        let scratch = Scratch::new(name);
        let boot = scratch.join("boot-id");
        fs::write(&boot, "boot-0\n").expect("a file of the test");
        let alpha = Program::under_env("TWINBOX_BOOT_ID_FILE", &boot);
        let trees = [scratch.dir("alpha-store"), scratch.dir("beta-store")];
        for dir in ["new", "cur", "tmp", ".Sent/new", ".Sent/cur"] {
            fs::create_dir_all(trees[0].join("anna/Maildir").join(dir)).expect("a file of the test");
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
        fs::hard_link(maildir.join("new/3"), maildir.join(".Sent/cur/3:2,")).expect("a file of the test");
        world.nodes.iter_mut().for_each(Node::start);
        world.in_sync();
        world
    }

    /// Puts a message into anna's Maildir.
    pub fn deliver(&self, node: usize, name: &str, text: &str) {
        let maildir = self.trees[node].join("anna/Maildir");
        fs::write(maildir.join("tmp/x"), text).expect("a file of the test");
        fs::rename(maildir.join("tmp/x"), maildir.join(name)).expect("a file of the test");
    }

    /// What a file of it holds.
    pub fn holds(&self, node: usize, name: &str) -> Option<String> {
        fs::read_to_string(self.trees[node].join("anna/Maildir").join(name)).ok()
    }

    /// What a node says of the mirror.
    pub fn said(&self, node: usize) -> MirrorSaid {
        self.nodes[node].status().expect("a status").said.mirrors.remove(0)
    }

    /// Waits until both are.
    pub fn in_sync(&self) {
        for node in &self.nodes {
            node.wait_state(LIMIT, "protected");
        }
        if let Err(why) = wait_identical(&self.trees[0], &self.trees[1], Rules::of(Layout::Maildir), LIMIT) {
            panic!("not identical {why}\n{:#?}\n{:#?}", self.nodes[0].status(), self.nodes[1].status());
        }
    }

    /// From `beta` to `alpha`, in order: what is then written on that one arrives.
    #[track_caller]
    pub fn switch_back(&self) {
        self.ok(1, &["demote"]);
        self.ok(0, &["promote"]);
        self.deliver(0, "new/last", "on alpha again");
        self.in_sync();
        assert_eq!(self.holds(1, "new/last").as_deref(), Some("on alpha again"));
    }

    /// Runs a command that must succeed.
    pub fn ok(&self, node: usize, words: &[&str]) {
        self.nodes[node].command(words).ok(&words.join(" "));
    }

    /// Runs a command that must be refused, for this reason.
    #[track_caller]
    pub fn refused(&self, node: usize, words: &[&str], because: &str) {
        let Ended { status, stderr, .. } = self.nodes[node].command(words);
        assert_eq!(status.code(), Some(REFUSED), "{words:?}: {stderr}");
        assert!(stderr.contains(because), "{words:?}: {stderr}");
    }

    /// What is kept in rescue: ends of paths, and contents.
    pub fn rescued(&self, node: usize) -> Vec<(String, String)> {
        fn walk(dir: &Path, out: &mut Vec<(String, String)>) {
            for item in fs::read_dir(dir).into_iter().flatten().flatten() {
                if item.file_type().expect("a file of the test").is_dir() {
                    walk(&item.path(), out);
                } else {
                    let name = item.file_name().to_string_lossy().into_owned();
                    out.push((name, fs::read_to_string(item.path()).expect("a file of the test")));
                }
            }
        }
        let mut out = vec![];
        walk(&self.nodes[node].state.join("mirrors/mail/rescue"), &mut out);
        out.sort();
        out
    }
}
