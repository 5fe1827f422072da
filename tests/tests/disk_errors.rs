//! A standby whose disk is full, or fails a sync: it stops acknowledging, says so in its status, keeps what it has, and goes on when it can.
//!
//! A failed sync is made by a tracer that changes one answer, so no failing device is needed.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use twinbox_tests::disk::{Disk, Format};
use twinbox_tests::gate::{Need, heavy, nap, wait_until};
use twinbox_tests::node::{Node, Spec, free_udp, pair};
use twinbox_tests::require;
use twinbox_tests::rng::Seed;
use twinbox_tests::scratch::Scratch;
use twinbox_tests::script::{Moment, Script};
use twinbox_tests::tree::{Layout, Rules, assert_identical};
use twinbox_tests::twinbox::Program;

const LIMIT: Duration = Duration::from_secs(30);

struct Stage {
    script: Script,
    store: PathBuf,
    replica: PathBuf,
    primary: Node,
    standby: Node,
}

impl Stage {
    /// A primary with a small store and a standby with these directories, paired.
    fn new(scratch: &Scratch, replica: PathBuf, state: &Path, seed: u64) -> Self {
        let store = scratch.dir("store");
        fs::create_dir_all(&replica).expect("make the replica");
        let listen = [free_udp(), free_udp()];
        let first = Spec { node: "alpha", role: "primary", mirror: "mail", root: &store, layout: Layout::Maildir, listen: listen[0] };
        let second = Spec { node: "beta", role: "standby", root: &replica, listen: listen[1], ..first.clone() };
        let primary = Node::init(Program::here(), &scratch.join("alpha"), &first);
        let mut standby = Node::init(Program::here(), state, &second);
        standby.logs = scratch.dir("logs");
        pair(&primary, &standby);
        let script = Script::begin(&store, seed).expect("write the store");
        Self { script, store, replica, primary, standby }
    }

    fn follow(&mut self) {
        let Self { script, replica, .. } = self;
        wait_until(LIMIT, "the replica to follow", || Moment::read(replica).is_ok_and(|tree| script.is_now(&tree)));
    }

    fn durable(&self) -> u64 {
        self.standby.status().expect("the standby answers").said.mirrors[0].lsn.durable
    }

    /// Waits until the standby's status names the trouble and the primary does not say that it is protected; returns the message.
    fn troubled(&mut self, word: &str) -> String {
        let mut message = String::new();
        wait_until(LIMIT, &format!("the standby to say {word:?}"), || {
            let Some(status) = self.standby.status() else { return false };
            message = status.value.pointer("/mirrors/0/last_error/message").and_then(|m| m.as_str()).unwrap_or_default().to_owned();
            let behind = self.primary.status().is_some_and(|s| {
                let m = &s.said.mirrors[0];
                m.state != "protected" || m.pending.paths > 0 || m.lsn.captured > m.lsn.durable
            });
            message.contains(word) && behind
        });
        message
    }

    fn identical_at_the_end(mut self) {
        self.follow();
        wait_until(LIMIT, "the primary to be protected", || {
            self.primary.status().is_some_and(|s| s.said.mirrors[0].state == "protected" && s.said.mirrors[0].pending.paths == 0)
        });
        self.primary.stop();
        self.standby.stop();
        assert_identical(&self.store, &self.replica, Rules::of(Layout::Maildir));
    }
}

/// Takes all but `left` MiB of the file system at `dir`.
fn fill(dir: &Path, left: u64) -> PathBuf {
    let filler = dir.join("filler");
    let stat = rustix::fs::statvfs(dir).expect("statvfs");
    let take = (stat.f_bavail * stat.f_frsize).saturating_sub(left << 20);
    let file = fs::File::create(&filler).expect("fill");
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, take).expect("fill");
    filler
}

fn full_disk(replica_there: bool) {
    require!(Need::Root, Need::Program("mkfs.ext4"));
    let _turn = heavy();
    let seed = Seed::from_env();
    let scratch = Scratch::new("full");
    let disk = Disk::new(Format::Ext4, &scratch.join("small.img"), 200, &scratch.join("small"));
    let (replica, state) = if replica_there {
        (disk.path().join("replica"), scratch.join("beta"))
    } else {
        (scratch.join("replica"), disk.path().join("beta"))
    };
    let mut stage = Stage::new(&scratch, replica, &state, seed.0);
    stage.primary.start();
    stage.standby.start();
    stage.follow();
    let since = stage.script.moment();
    let filler = fill(disk.path(), 5);
    let before = stage.durable();
    (0..4).for_each(|n| stage.script.act(n).expect("act"));
    let said = stage.troubled("free");
    assert!(said.contains("small"), "which file system: {said}");
    assert!(stage.durable() <= before, "acknowledged without room");
    let tree = Moment::read(&stage.replica).expect("read the replica");
    stage.script.is_cut(&tree, since).unwrap_or_else(|why| panic!("{why}"));
    stage.standby.agent().assert_running();
    fs::remove_file(filler).expect("make room");
    // By itself.
    stage.identical_at_the_end();
}

#[test]
fn no_room_for_the_replica() {
    full_disk(true);
}

#[test]
fn no_room_for_the_state() {
    full_disk(false);
}

/// The `at`-th sync from now on of what `kind` names fails once; nothing is acknowledged any more until a restart, though later syncs would succeed.
fn a_failed_sync(kind: &str, at: u64, word: &str) {
    let _turn = heavy();
    let seed = Seed::from_env();
    let scratch = Scratch::new("eio");
    let mut stage = Stage::new(&scratch, scratch.join("replica"), &scratch.join("beta"), seed.0);
    let words: [OsString; 4] =
        [env!("CARGO_BIN_EXE_kill_at").into(), kind.into(), format!("fail:{at}").into(), scratch.join("counts").into()];
    stage.standby.program = Program::under(words);
    stage.primary.start();
    stage.standby.start();
    stage.standby.program = Program::here();
    stage.follow();
    fs::write(scratch.join("counts.armed"), "").expect("arm");
    // Changes until it happens; each is a txn or more.
    let mut said = String::new();
    wait_until(LIMIT, "the failed sync to show", || {
        stage.script.load().expect("the load");
        nap(Duration::from_millis(30));
        let status = stage.standby.status();
        said = status.and_then(|s| Some(s.value.pointer("/mirrors/0/last_error/message")?.as_str()?.to_owned())).unwrap_or_default();
        said.contains(word)
    });
    assert!(said.contains("restart"), "what to do: {said}");
    let before = stage.durable();
    (0..3).for_each(|n| stage.script.act(n).expect("act"));
    stage.troubled(word);
    assert_eq!(stage.durable(), before, "acknowledged after a failed sync");
    stage.standby.agent().assert_running();
    // A kill, not a stop: there is nothing it could still put right.
    stage.standby.kill9();
    stage.standby.start();
    stage.identical_at_the_end();
}

#[test]
fn a_failed_sync_of_the_redo_log_latches() {
    a_failed_sync("sync@/redo/", 2, "redo log");
}

#[test]
fn a_failed_sync_of_the_replica_latches() {
    a_failed_sync("sync@/replica", 2, "sync");
}

#[test]
fn a_failed_sync_of_the_manifest_latches() {
    a_failed_sync("sync@manifest.db", 2, "manifest.db");
}
