//! Crash points: an agent is killed as it enters its n-th sync, rename, unlink, creation, truncation or write, counted over a whole life (first
//! sync, deliveries, flags, writes in place, hard links, moved folders, a file for the bulk stream, deletions, stop), on either side.
//!
//! After each kill: the replica, recovered alone where it was the standby that died, is at one moment of the store, group by group, and at none
//! older than what had arrived before; then both run, become identical and leave nothing behind.
//!
//! Size: points spread evenly over each kind; `TWINBOX_TEST_FULL=1`: every point. `TWINBOX_TEST_POINT=sync:17` runs one.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use twinbox_tests::gate::{full, heavy, wait_for, wait_until};
use twinbox_tests::node::{MirrorSaid, Node, Spec, free_udp, pair};
use twinbox_tests::rng::{Rng, Seed};
use twinbox_tests::scratch::Scratch;
use twinbox_tests::script::{ACTS, Moment, Script};
use twinbox_tests::tree::{Layout, Rules, assert_identical, leftovers};
use twinbox_tests::twinbox::Program;

const LIMIT: Duration = Duration::from_secs(20);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Primary,
    Standby,
}

/// Two paired nodes that have never run, to begin from again and again.
struct Stage {
    scratch: Scratch,
    root: PathBuf,
    replica: PathBuf,
    nodes: [Node; 2],
}

impl Stage {
    fn new() -> Self {
        let scratch = Scratch::new("crash");
        let (root, replica) = (scratch.dir("store"), scratch.dir("replica"));
        let listen = [free_udp(), free_udp()];
        let first = Spec { node: "alpha", role: "primary", mirror: "mail", root: &root, layout: Layout::Maildir, listen: listen[0] };
        let second = Spec { node: "beta", role: "standby", root: &replica, listen: listen[1], ..first.clone() };
        let nodes =
            [Node::init(Program::here(), &scratch.join("alpha"), &first), Node::init(Program::here(), &scratch.join("beta"), &second)];
        pair(&nodes[0], &nodes[1]);
        for node in &nodes {
            copy(&node.state, &node.state.with_extension("fresh"));
        }
        Self { scratch, root, replica, nodes }
    }

    /// Empties everything but the two nodes' trust in each other.
    fn reset(&mut self) {
        for node in &mut self.nodes {
            drop(node.agent.take());
            fs::remove_dir_all(&node.state).expect("remove a state");
            copy(&node.state.with_extension("fresh"), &node.state);
        }
        for tree in [&self.root, &self.replica] {
            fs::remove_dir_all(tree).expect("remove a tree");
            fs::create_dir(tree).expect("make a tree");
        }
    }

    /// One life in which `side` is killed at call `at` of `kind` (0: is not killed). How often each kind was called.
    fn life(&mut self, side: Side, kind: &str, at: u64, seed: u64) -> BTreeMap<String, u64> {
        self.reset();
        let mut script = Script::begin(&self.root, seed).expect("write the store");
        let counts = self.scratch.join("counts");
        let _ = fs::remove_file(&counts);
        let plain = Program::here();
        let traced = tracer(kind, at, &counts);
        let [alpha, beta] = &mut self.nodes;
        let (victim, other) = if side == Side::Primary { (alpha, beta) } else { (beta, alpha) };
        other.program = plain.clone();
        victim.program = traced;
        other.start();
        victim.start();
        victim.program = plain;

        // What had arrived before the kill.
        let mut since = None;
        let mut arrive = |script: &Script, victim: &mut Node, replica: &Path| {
            wait_until(LIMIT, "the replica to follow, or the kill", || {
                let here = Moment::read(replica).is_ok_and(|tree| script.is_now(&tree));
                if here {
                    since = Some(script.moment());
                }
                here || victim.agent().try_wait().is_some()
            });
        };
        arrive(&script, victim, &self.replica);
        for n in 0..ACTS {
            if victim.agent().try_wait().is_some() {
                break;
            }
            script.act(n).expect("act");
            arrive(&script, victim, &self.replica);
        }
        victim.agent().terminate();
        let ended = victim.agent().wait(LIMIT);
        let panicked = victim.agent().stderr().contains("panicked at");
        assert!(!panicked && (at > 0 || ended.success()), "{side:?}: {ended}\n{}", victim.agent().tails());
        drop(victim.agent.take());
        let counts = wait_for(LIMIT, "the tracer's counts", || fs::read_to_string(&counts).ok());
        self.recover(side, &script, since, kind, at);
        counts.lines().filter_map(|line| Some((line.split_once(' ')?.0.to_owned(), line.split_once(' ')?.1.parse().ok()?))).collect()
    }

    fn recover(&mut self, side: Side, script: &Script, since: Option<usize>, kind: &str, at: u64) {
        let [alpha, beta] = &mut self.nodes;
        if side == Side::Standby {
            // It must be right alone: the primary does not run meanwhile.
            alpha.agent().signal(Signal::STOP);
            // A recovery that dies too is no worse: every other time it is killed as it makes its own second sync.
            if at % 2 == 1 {
                let again = self.scratch.join("counts-again");
                beta.program = tracer("sync", 2 + at % 7, &again);
                beta.start();
                beta.program = Program::here();
                wait_until(LIMIT, "a recovery, or its end", || beta.agent().try_wait().is_some() || beta.status().is_some());
                drop(beta.agent.take());
            }
            beta.start();
        }
        wait_until(LIMIT, "the standby alone to apply what it has", || {
            beta.agent().assert_running();
            beta.status().is_some_and(|s| s.said.mirrors[0].lsn.applied == s.said.mirrors[0].lsn.durable)
        });
        let tree = Moment::read(&self.replica).expect("read the replica");
        let verdict = match since {
            Some(since) => script.is_cut(&tree, since),
            None => script.is_whole(&tree),
        };
        verdict.unwrap_or_else(|why| panic!("{side:?} killed at {kind}:{at}: the recovered replica: {why}"));
        match side {
            Side::Standby => alpha.agent().signal(Signal::CONT),
            Side::Primary => alpha.start(),
        }
        let deadline = Instant::now() + LIMIT;
        wait_until(2 * LIMIT, "both to agree", || {
            alpha.agent().assert_running();
            beta.agent().assert_running();
            let here = Moment::read(&self.replica).is_ok_and(|tree| script.is_now(&tree));
            let told = alpha.status();
            let drained = |m: &MirrorSaid| m.state == "protected" && m.pending.paths == 0 && m.lsn.captured == m.lsn.applied;
            let done = here && told.as_ref().is_some_and(|s| drained(&s.said.mirrors[0]));
            assert!(
                done || Instant::now() < deadline,
                "no agreement after {side:?} was killed at {kind}:{at}: same content: {here}\nprimary: {told:#?}\nstandby: {:#?}",
                beta.status()
            );
            done
        });
        alpha.stop();
        beta.stop();
        let trees = [self.root.display().to_string(), self.replica.display().to_string()];
        let compared = Program::here().run("compare", self.scratch.path(), ["compare", &trees[0], &trees[1], "--layout", "maildir"]);
        compared.ok(&format!("compare after {side:?} was killed at {kind}:{at}"));
        assert_identical(&self.root, &self.replica, Rules::of(Layout::Maildir));
        for tree in [&self.root, &self.replica] {
            assert_eq!(leftovers(tree).expect("read a tree"), Vec::<String>::new(), "left in {} after {kind}:{at}", tree.display());
        }
        let mirror = beta.state.join("mirrors/mail");
        let staged: Vec<_> = fs::read_dir(mirror.join("staging")).expect("staging").collect();
        assert!(staged.is_empty(), "left in staging after {side:?} was killed at {kind}:{at}: {staged:?}");
        let redo: u64 = fs::read_dir(mirror.join("redo")).expect("redo").map(|f| f.and_then(|f| f.metadata()).map_or(0, |m| m.len())).sum();
        assert!(redo < 1 << 20, "the redo log still has {redo} bytes after {side:?} was killed at {kind}:{at}");
        let rescued = fs::read_dir(mirror.join("rescue")).map_or(0, Iterator::count);
        assert_eq!(rescued, 0, "rescued after {side:?} was killed at {kind}:{at}, though nobody else wrote to the replica");
    }
}

fn tracer(kind: &str, at: u64, counts: &Path) -> Program {
    let words: [OsString; 4] = [env!("CARGO_BIN_EXE_kill_at").into(), kind.into(), at.to_string().into(), counts.into()];
    Program::under(words)
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir(to).expect("copy a state");
    for entry in fs::read_dir(from).expect("copy a state") {
        let entry = entry.expect("copy a state");
        let meta = entry.metadata().expect("copy a state");
        if meta.is_dir() {
            copy(&entry.path(), &to.join(entry.file_name()));
        } else if meta.is_file() {
            fs::copy(entry.path(), to.join(entry.file_name())).expect("copy a state");
        }
    }
    fs::set_permissions(to, fs::metadata(from).expect("copy a state").permissions()).expect("copy a state");
}

fn every_point(side: Side, part: u64) {
    let _turn = heavy();
    let seed = Seed::from_env();
    let mut stage = Stage::new();
    if let Ok(point) = std::env::var("TWINBOX_TEST_POINT") {
        let (kind, at) = point.split_once(':').expect("TWINBOX_TEST_POINT=KIND:N");
        stage.life(side, kind, at.parse().expect("TWINBOX_TEST_POINT=KIND:N"), seed.0);
        return;
    }
    let calls = stage.life(side, "sync", 0, seed.0);
    eprintln!("{side:?}: {calls:?}");
    let mut rng = Rng::part(seed.0, part);
    let mut done = 0;
    for (kind, total) in calls {
        let sample = match kind.as_str() {
            _ if full() => total,
            "sync" => 4,
            "rename" | "write" => 2,
            _ => 1,
        };
        // One point in each of as many equal parts, not always the same one.
        for n in 0..sample.min(total) {
            let (from, to) = (n * total / sample, (n + 1) * total / sample);
            let at = 1 + from + rng.below((to - from).max(1) as usize) as u64;
            let ended = stage.life(side, &kind, at, seed.0);
            done += ended.get("killed").copied().unwrap_or(0);
            eprintln!(
                "{side:?} {kind}:{at} of {total}: {}",
                if ended.contains_key("killed") { "killed, recovered" } else { "not reached" }
            );
        }
    }
    eprintln!("{side:?}: {done} kills recovered from");
    assert!(done > 0, "nothing was killed");
}

#[test]
fn the_standby_dies_at_any_call() {
    every_point(Side::Standby, 1);
}

#[test]
fn the_primary_dies_at_any_call() {
    every_point(Side::Primary, 2);
}
