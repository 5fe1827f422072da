//! A simulated mail server works between and in the middle of the engine's steps, sessions end, agents are killed and machines lose power at any step. What a group holds on the standby is a state it
//! really had, and no older than the one before; no message is nowhere; what was acknowledged stays; a fence that answered was right. At the end both sides are the same.
//!
//! The server's changes and the faults follow from the seed; when a file is at rest long enough to be read does not. `TWINBOX_SIM_SEED=N` runs one seed, `TWINBOX_SIM_SEEDS=N` so many.
//! `TWINBOX_SIM_HARD=1` adds what is known to fail at times: files that change in place under names in several groups, and files of one size that follow each other under one inode number within a tick of the clock (ARCHITECTURE, Open defects).
//!
//! `alone`: the primary and a model standby, every txn checked. `nodes`: both nodes on disks of their own, real file systems that lose what was not synced. `roles`: the same, when the primary is lost, the standby promoted, and the first comes back.

use std::collections::BTreeMap;
use std::path::Path;

use super::super::fence::{FenceRequest, NotFenced, Until};
use super::super::testing;
use super::*;
use server::Server;

mod alone;
mod disk;
mod nodes;
mod roles;
mod server;

/// Which seeds to run.
struct Seeds {
    first: u64,
    count: u64,
}

impl Seeds {
    fn from_env(usual: u64) -> Seeds {
        let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
        match number("TWINBOX_SIM_SEED") {
            Some(first) => Seeds { first, count: 1 },
            None => Seeds { first: number("TWINBOX_SIM_FROM").unwrap_or(1), count: number("TWINBOX_SIM_SEEDS").unwrap_or(usual) },
        }
    }

    fn run(&self, test: &str, one: impl Fn(u64) -> BTreeMap<&'static str, usize>) {
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        for seed in self.first..self.first + self.count {
            eprintln!("seed {seed} (again: TWINBOX_SIM_SEED={seed} cargo test -p twinbox --lib {test})");
            for (what, n) in one(seed) {
                *counts.entry(what).or_default() += n;
            }
        }
        eprintln!("{} seeds: {counts:?}", self.count);
    }
}

/// An engine comes up on the state the one before left; the server works in the middle of its steps.
fn open_engine(node: &str, state: &Path, server: &Arc<Mutex<Server>>, life: u8) -> Engine {
    let config = testing::config(&server.lock().unwrap().root, state, life);
    let mut engine = testing::engine(CaptureConfig { node: node.into(), ..config });
    let server = server.clone();
    engine.meanwhile = Some(Box::new(move || {
        let mut server = server.lock().unwrap();
        if server.left > 0 && server.rng.one_in(40) {
            server.act();
        }
    }));
    engine
}

/// One turn of the engine's loop, without its waits.
fn turn(engine: &mut Engine) {
    assert!(engine.commands().unwrap());
    engine.take_events().unwrap();
    engine.scan_some().unwrap();
    engine.note_listed();
    engine.rechecks.clear(); // Nothing may need it.
    engine.timers().unwrap();
    engine.mint_when_alone().unwrap();
    engine.round().unwrap();
    engine.finish_first_sync().unwrap();
    engine.answer_waiters().unwrap();
}

/// The answer, and at which state each group was when it was asked for.
type Fence = (oneshot::Receiver<Result<Lsn, NotFenced>>, BTreeMap<String, usize>);

/// A fence over everything.
fn fence(server: &Server) -> (Command, Fence) {
    let (reply, answer) = oneshot::channel();
    let at = server.states.iter().map(|(group, states)| (group.clone(), states.len() - 1)).collect();
    (Command::Fence(FenceRequest { paths: vec![], until: Until::Durable, wait: false, reply }), (answer, at))
}

fn pending(engine: &Engine) -> Vec<String> {
    let of = |name: &Group, g: &super::super::dirty::GroupState| {
        let (dirty, captured) = (g.dirty.keys().collect::<Vec<_>>(), g.captured.keys().collect::<Vec<_>>());
        let name = String::from_utf8_lossy(name).into_owned();
        format!("{name}: dirty {dirty:?} captured {captured:?} staging {:?} hints {:?} spoiled {}", g.staging, g.hints, g.spoiled)
    };
    engine.sets.groups().map(|(name, g)| of(name, g)).chain(engine.bulk.left()).collect()
}
