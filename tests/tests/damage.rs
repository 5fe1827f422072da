//! Damage to what a node keeps: every state file of both nodes, each kind of damage, and what must follow.
//!
//! The two agents have worked and been killed (so that logs and write-ahead files are full); one file is damaged; both are started again. Then
//! either the damaged node refuses (a documented exit code, one message that names the file or says what to do, no panic), or both run: then they
//! become identical, and as long as the primary says `protected` with nothing pending, they are. Never a difference that nobody tells.
//!
//! Size: one place for a flipped bit; `TWINBOX_TEST_FULL=1`: ten places.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use twinbox_tests::gate::{full, heavy, nap, wait_until};
use twinbox_tests::node::{Node, Spec, free_udp, pair};
use twinbox_tests::refusal::documented;
use twinbox_tests::rng::{Rng, Seed};
use twinbox_tests::scratch::Scratch;
use twinbox_tests::script::{ACTS, Moment, Script};
use twinbox_tests::tree::{Layout, Rules, compare};
use twinbox_tests::twinbox::Program;

const LIMIT: Duration = Duration::from_secs(40);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Damage {
    Truncated,
    Emptied,
    Zeroed,
    BitFlipped,
    Removed,
    Older,
    Foreign,
    Peers,
}

use Damage::{BitFlipped, Emptied, Foreign, Older, Peers, Removed, Truncated, Zeroed};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// Refused with one of these exit codes.
    Refused(&'static [i32]),
    /// Goes on and repairs itself.
    Runs,
    /// Runs, exchanges nothing, and status says that the keys are not those that were paired.
    Untrusted,
    /// Either: which depends on where the damage falls.
    Either(&'static [i32]),
}

use Outcome::{Either, Refused, Runs, Untrusted};

const PRIMARY: usize = 0;
const STANDBY: usize = 1;
const BOTH: &[usize] = &[PRIMARY, STANDBY];

/// File (below the state directory, or the configuration), on which sides, damage, what follows.
const TABLE: &[(&str, &[usize], &[Damage], Outcome)] = &[
    // The key is who we are: never made anew, and another node's is a stranger's.
    ("node.key", BOTH, &[Truncated, Emptied, Zeroed], Refused(&[5])),
    ("node.key", BOTH, &[Removed], Refused(&[4, 5])),
    ("node.key", BOTH, &[BitFlipped], Either(&[5])),
    // History and roles: nothing is guessed.
    ("state.db", BOTH, &[Truncated, Zeroed], Either(&[5])),
    ("state.db", BOTH, &[BitFlipped], Either(&[5, 10])),
    ("state.db", BOTH, &[Emptied, Removed], Either(&[4, 5])),
    ("state.db", BOTH, &[Older], Either(&[5])),
    ("state.db-wal", BOTH, &[Truncated, Zeroed, BitFlipped, Removed], Either(&[5])),
    ("state.db-shm", BOTH, &[Truncated, Zeroed, BitFlipped, Removed], Runs),
    // Rebuilt: on the primary from the standby, on the standby from the tree.
    ("mirrors/mail/manifest.db", BOTH, &[Truncated, Emptied, Zeroed, BitFlipped, Removed, Older], Runs),
    ("mirrors/mail/manifest.db-wal", BOTH, &[Truncated, Zeroed, BitFlipped, Removed], Runs),
    ("mirrors/mail/manifest.db-shm", BOTH, &[Truncated, Zeroed, BitFlipped, Removed], Runs),
    ("mirrors/mail/root", &[STANDBY], &[Truncated, Emptied, Zeroed, BitFlipped, Removed], Either(&[4])),
    ("mirrors/mail/redo/*", &[STANDBY], &[Truncated, Emptied, Zeroed, BitFlipped, Removed, Foreign], Either(&[5])),
    ("mirrors/mail/staging/*", &[STANDBY], &[Truncated, Emptied, Zeroed, BitFlipped, Removed], Either(&[5, 10])),
    ("lock", BOTH, &[Emptied, Removed], Runs),
    ("admin.sock", BOTH, &[Removed], Runs),
    // Only a socket is ours to remove.
    ("admin.sock", BOTH, &[Foreign], Refused(&[4])),
    // The other node's: a stranger's key, another role, rows that are compared before they count.
    ("node.key", BOTH, &[Peers], Untrusted),
    ("state.db", BOTH, &[Peers], Either(&[4, 5])),
    ("mirrors/mail/manifest.db", BOTH, &[Peers], Runs),
    ("../twinbox.toml", BOTH, &[Truncated, Emptied, Zeroed, Removed], Refused(&[3])),
];

struct Stage {
    trees: [PathBuf; 2],
    nodes: [Node; 2],
    codes: Vec<i32>,
    /// Removed last.
    _scratch: Scratch,
}

impl Stage {
    /// Two nodes that have worked, were killed in the middle of it, and what each had half-way kept as `state.older`.
    fn new(seed: u64) -> Self {
        let scratch = Scratch::new("damage");
        let trees = [scratch.dir("store"), scratch.dir("replica")];
        let listen = [free_udp(), free_udp()];
        let first = Spec { node: "alpha", role: "primary", mirror: "mail", root: &trees[0], layout: Layout::Maildir, listen: listen[0] };
        let second = Spec { node: "beta", role: "standby", root: &trees[1], listen: listen[1], ..first.clone() };
        let mut nodes =
            [Node::init(Program::here(), &scratch.join("alpha"), &first), Node::init(Program::here(), &scratch.join("beta"), &second)];
        pair(&nodes[0], &nodes[1]);
        let mut script = Script::begin(&trees[0], seed).expect("write the store");
        nodes.iter_mut().for_each(Node::start);
        follow(&script, &trees[1]);
        (0..2).for_each(|n| script.act(n).expect("act"));
        follow(&script, &trees[1]);
        nodes.iter_mut().for_each(Node::kill9);
        for node in &nodes {
            copy(&node.state, &node.state.with_extension("older"));
        }
        nodes.iter_mut().for_each(Node::start);
        (2..ACTS - 1).for_each(|n| {
            script.act(n).expect("act");
            follow(&script, &trees[1]);
        });
        nodes.iter_mut().for_each(Node::kill9);
        for node in &nodes {
            copy(&node.state, &node.state.with_extension("kept"));
            copy(&node.config, &node.config.with_extension("kept"));
        }
        copy(&trees[1], &trees[1].with_extension("kept"));
        let codes = documented(&scratch);
        Self { trees, nodes, codes, _scratch: scratch }
    }

    /// As it was when both had just been killed. The store itself is never harmed by any of this.
    fn reset(&mut self) {
        for node in &mut self.nodes {
            drop(node.agent.take());
            let kept = node.state.with_extension("kept");
            mirror(&kept, &node.state);
            fs::copy(node.config.with_extension("kept"), &node.config).expect("restore the configuration");
        }
        // In place, for the standby knows its files by inode; what another case changed is put right by the agents.
        mirror(&self.trees[1].with_extension("kept"), &self.trees[1]);
    }

    fn file(&self, side: usize, name: &str) -> Option<PathBuf> {
        let path = self.nodes[side].state.join(name);
        match name.strip_suffix("/*") {
            None => path.symlink_metadata().is_ok().then_some(path),
            Some(dir) => fs::read_dir(self.nodes[side].state.join(dir)).ok()?.filter_map(|e| Some(e.ok()?.path())).max(),
        }
    }

    /// Starts both; what went wrong against `expected`.
    fn verdict(&mut self, side: usize, expected: Outcome) -> Result<&'static str, String> {
        self.nodes.iter_mut().for_each(Node::start);
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(status) = self.nodes[side].agent().try_wait() {
                let said = self.nodes[side].agent().stderr();
                let code = status.code().ok_or_else(|| format!("ended by {status}: {said}"))?;
                let allowed = match expected {
                    Refused(codes) | Either(codes) => codes,
                    Runs | Untrusted => &[],
                };
                if said.contains("panicked at") || code == 101 {
                    return Err(format!("panicked: {said}"));
                }
                if !self.codes.contains(&code) || !allowed.contains(&code) || !said.contains("twinbox: ") {
                    return Err(format!("exit code {code}, allowed are {allowed:?}: {said}"));
                }
                return Ok("refused");
            }
            if let Some(status) = self.nodes[1 - side].agent().try_wait() {
                return Err(format!("the other node ended, {status}: {}", self.nodes[1 - side].agent().stderr()));
            }
            let told = self.nodes[PRIMARY].status();
            let claims = told.as_ref().is_some_and(|s| {
                let m = &s.said.mirrors[0];
                m.state == "protected" && m.pending.paths == 0 && m.lsn.captured == m.lsn.applied
            });
            let differs = compare(&self.trees[0], &self.trees[1], Rules::of(Layout::Maildir)).map_err(|e| e.to_string())?;
            if claims && differs.is_empty() {
                break;
            }
            if let Some(s) = &told
                && s.said.mirrors[0].state == "diverged"
            {
                let why = s.value["mirrors"][0]["last_error"]["message"].as_str().unwrap_or_default().to_owned();
                return if matches!(expected, Either(_)) && !why.is_empty() { Ok("diverged") } else { Err(format!("diverged: {why}")) };
            }
            let path = "/mirrors/0/peers/0/addresses/0/last_error";
            let stranger = told.as_ref().and_then(|s| s.value.pointer(path)?.as_str()).is_some_and(|why| why.contains("key"));
            if expected == Untrusted && stranger {
                return if claims { Err("claims to be protected by a stranger".into()) } else { Ok("not trusted, and says so") };
            }
            if Instant::now() > deadline {
                let list = differs.iter().take(5).map(ToString::to_string).collect::<Vec<_>>().join("\n");
                return Err(format!("claims protected: {claims}; differs:\n{list}\n{:#?}", told.map(|s| s.value)));
            }
            nap(Duration::from_millis(20));
        }
        if matches!(expected, Refused(_) | Untrusted) {
            return Err("runs, though it should refuse".into());
        }
        for node in &mut self.nodes {
            if node.agent().stderr().contains("panicked at") {
                return Err(format!("panicked: {}", node.agent().stderr()));
            }
        }
        Ok("repaired")
    }
}

fn follow(script: &Script, replica: &Path) {
    wait_until(LIMIT, "the replica to follow", || Moment::read(replica).is_ok_and(|tree| script.is_now(&tree)));
}

/// Copies everything, metadata and hard links too.
fn copy(from: &Path, to: &Path) {
    let done = std::process::Command::new("cp").arg("-a").arg(from).arg(to).status().expect("cp");
    assert!(done.success(), "cp -a {}", from.display());
}

fn mirror(kept: &Path, to: &Path) {
    let source = format!("{}/", kept.display());
    let done = std::process::Command::new("rsync").args(["-aH", "--delete", "--modify-window=-1"]).arg(source).arg(to).status();
    assert!(done.expect("rsync").success(), "rsync {}", kept.display());
}

fn apply(damage: Damage, path: &Path, source: &Path, rng: &mut Rng) {
    let open = || fs::OpenOptions::new().read(true).write(true).open(path).expect("open what is damaged");
    let len = path.symlink_metadata().expect("what is damaged").len();
    match damage {
        Truncated => open().set_len(len / 2).expect("truncate"),
        Emptied => open().set_len(0).expect("truncate"),
        Zeroed => open().write_all_at(&vec![0; len as usize], 0).expect("zero"),
        BitFlipped => {
            let at = rng.below(len.max(1) as usize) as u64;
            let mut byte = [0];
            let file = open();
            if file.read_exact_at(&mut byte, at).is_ok() {
                file.write_all_at(&[byte[0] ^ (1 << rng.below(8))], at).expect("flip");
            }
        }
        Removed => fs::remove_file(path).expect("remove"),
        Older | Peers => {
            fs::copy(source, path).expect("copy another file over it");
        }
        Foreign => {
            fs::remove_file(path).expect("remove");
            fs::write(path, rng.bytes(5_000)).expect("write");
        }
    }
}

#[test]
fn every_file_in_every_way() {
    let _turn = heavy();
    let seed = Seed::from_env();
    let mut rng = Rng::part(seed.0, 3);
    let mut stage = Stage::new(seed.0);
    let only = std::env::var("TWINBOX_TEST_POINT").unwrap_or_default();
    let (mut cases, mut wrong) = (0, vec![]);
    for (name, sides, damages, expected) in TABLE {
        for side in *sides {
            for damage in *damages {
                let times = if *damage == BitFlipped && full() { 10 } else { 1 };
                for n in 0..times {
                    let title = format!("{}:{name}:{damage:?}", if *side == PRIMARY { "primary" } else { "standby" });
                    if !title.contains(&only) {
                        continue;
                    }
                    stage.reset();
                    let Some(path) = stage.file(*side, name) else {
                        eprintln!("{title}: no such file");
                        continue;
                    };
                    // An older copy of its own, or the other node's.
                    let (owner, age) = if *damage == Peers { (1 - *side, "kept") } else { (*side, "older") };
                    let older = stage.nodes[owner].state.with_extension(age).join(name);
                    let wal = [path.with_extension("db-wal"), path.with_extension("db-shm")];
                    apply(*damage, &path, &older, &mut rng);
                    if matches!(damage, Older | Peers) {
                        // An older database comes with its own write-ahead log, as from a backup of the directory.
                        for file in wal {
                            let _ = fs::remove_file(&file);
                            let _ = fs::copy(older.with_file_name(file.file_name().expect("a name")), &file);
                        }
                    }
                    cases += 1;
                    match stage.verdict(*side, *expected) {
                        Ok(what) => eprintln!("{title} {n}: {what}"),
                        Err(why) => {
                            eprintln!("{title} {n}: WRONG: {why}");
                            wrong.push(format!("{title}: {why}"));
                        }
                    }
                }
            }
        }
    }
    eprintln!("{cases} cases");
    assert!(wrong.is_empty(), "{} of {cases}:\n{}", wrong.len(), wrong.join("\n"));
}
