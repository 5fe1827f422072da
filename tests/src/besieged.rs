//! A mirror of adversarial writers whose standby is killed again and again: each recovered replica must be a state the store had.

use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::adversary::{Held, Sizes, Stage, WRITERS, check, prepare};
use crate::dovecot::{self, Dovecot};
use crate::gate::{nap_until, wait_until};
use crate::mailload::{self, Done, Load};
use crate::netns::Cable;
use crate::node::Pair;
use crate::rng::{Rng, Seed};
use crate::scratch::Scratch;
use crate::tree::{Layout, Rules, wait_identical};

/// What was seen.
#[derive(Debug, Default)]
pub struct Seen {
    /// Recovered replicas looked at.
    pub samples: usize,
    /// Of these such as held something new, by file.
    pub fresh: std::collections::BTreeMap<&'static str, usize>,
    /// Changes made, by writer.
    pub made: Vec<(&'static str, u64)>,
    /// Last LSN.
    pub lsn: u64,
}

/// Runs the writers for `time` and kills the standby `kills` times, evenly; panics on the first state that never was.
#[must_use]
pub fn run(time: Duration, kills: usize, sizes: Sizes) -> Seen {
    let seed = Seed::from_env();
    let scratch = Scratch::new("besieged");
    let (root, replica, copies) = (scratch.dir("store"), scratch.dir("replica"), scratch.dir("copies"));
    let stage = Stage::new(&root, sizes);
    prepare(&stage).expect("prepare");
    let (mut pair, cable) = Pair::over_cable(scratch.path(), &root, &replica, Layout::Plain);
    pair.wait_drained(Duration::from_secs(120));
    let mut seen = Seen::default();
    let mut last = Held::default();
    std::thread::scope(|scope| {
        stage.run(scope, seed.0);
        let _end = End(&stage);
        let mut rng = Rng::part(seed.0, 699);
        let (began, share) = (Instant::now(), time / kills.max(1) as u32);
        for kill in 0..kills {
            let jitter = Duration::from_micros(rng.below(share.as_micros().min(1_000_000) as usize / 2 + 1) as u64);
            nap_until((began + share * kill as u32).max(Instant::now()) + share / 4 + jitter);
            recovered_alone(&mut pair, &cable);
            let (held, wrong) = check(&replica, &copies);
            assert!(wrong.is_empty(), "kill {kill}: the replica is in a state that never was:\n{}\n{held:?}", wrong.join("\n"));
            seen.samples += 1;
            for (name, generation) in &held.0 {
                *seen.fresh.entry(name).or_default() += usize::from(last.0.get(name) != Some(generation));
            }
            last = held;
            cable.restore();
            pair.primary.agent().assert_running();
        }
        nap_until(began + time);
    });
    seen.made = WRITERS.into_iter().zip(stage.made.iter().map(|n| n.load(Ordering::SeqCst))).collect();
    if let Err(why) = wait_identical(&root, &replica, Rules::of(Layout::Plain), Duration::from_secs(120)) {
        panic!("not identical {why}\nprimary: {:#?}", pair.primary.status());
    }
    let (_, wrong) = check(&replica, &copies);
    assert!(wrong.is_empty(), "at the end:\n{}", wrong.join("\n"));
    seen.lsn = pair.primary.status().map_or(0, |s| s.said.mirrors[0].lsn.durable);
    pair.primary.stop();
    pair.standby.stop();
    seen
}

/// Cuts the cable, kills the standby, and waits until it has recovered by itself.
fn recovered_alone(pair: &mut Pair, cable: &Cable) {
    cable.cut();
    pair.standby.kill9();
    pair.standby.start();
    wait_until(Duration::from_secs(60), "the standby to recover", || {
        pair.standby.status().is_some_and(|s| s.said.mirrors.iter().all(|m| m.lsn.applied == m.lsn.durable))
    });
}

struct End<'a>(&'a Stage);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// Users whose mailboxes are read after each kill of many, and everybody's after each [`ALL_EVERY`]th: a replica of many messages takes longer to read than the time between two kills.
const READ: usize = 2;
const ALL_EVERY: usize = 50;

/// What was seen of a mail server.
#[derive(Debug)]
pub struct Mail {
    /// Messages that each recovered replica showed, and of how many users.
    pub shown: Vec<(usize, usize)>,
    /// What the load did.
    pub done: Done,
    /// From the first change to the last kill's end.
    pub took: Duration,
}

/// Messages delivered in one go; twice as many IMAP operations beside them.
const ROUND: usize = 100;

/// A Dovecot under load whose mirror's standby is killed `kills` times in `time`: a second Dovecot on a copy of each recovered replica must find nothing wrong. The load delivers `rate` messages a second
/// (0: as fast as it goes, which takes all processors there are).
#[must_use]
pub fn mail(layout: Layout, time: Duration, kills: usize, rate: usize) -> Mail {
    let seed = Seed::from_env();
    let scratch = Scratch::new("besieged-mail");
    let root = dovecot::store(&scratch, "store");
    let replica = scratch.dir("replica");
    let users = dovecot::users(20);
    let (mut pair, cable) = Pair::over_cable(scratch.path(), &root, &replica, layout);
    pair.wait_drained(Duration::from_secs(60));
    let server = Dovecot::start(&root, layout);
    let busy = AtomicBool::new(true);
    let mut shown = vec![];
    let began = Instant::now();
    let (done, took) = std::thread::scope(|scope| {
        let load = scope.spawn(|| {
            let (mut round, mut done) = (0, Done::default());
            while busy.load(Ordering::SeqCst) {
                done += mailload::run(&server, Load::new(ROUND, users.len(), seed.0 + round))?;
                round += 1;
                if rate > 0 {
                    nap_until(began + Duration::from_secs_f64((round as usize * ROUND) as f64 / rate as f64));
                }
            }
            Ok::<_, std::io::Error>(done)
        });
        let _rest = Rest(&busy);
        let mut rng = Rng::part(seed.0, 698);
        let share = time / kills.max(1) as u32;
        for kill in 0..kills {
            let jitter = Duration::from_micros(rng.below(share.as_micros().min(1_000_000) as usize / 2 + 1) as u64);
            nap_until((began + share * kill as u32).max(Instant::now()) + share / 4 + jitter);
            recovered_alone(&mut pair, &cable);
            let mut some = users.clone();
            while kills > ALL_EVERY && (kill + 1) % ALL_EVERY != 0 && some.len() > READ {
                some.swap_remove(rng.below(some.len()));
            }
            // A Dovecot changes what it opens.
            let copy = dovecot::store(&scratch, "copy");
            let theirs = some.iter().map(|user| replica.join(user)).filter(|dir| dir.exists());
            let done = Command::new("cp").arg("-a").args(theirs).arg(&copy).status().expect("cp");
            assert!(done.success() || std::fs::read_dir(&replica).is_ok_and(|mut dir| dir.next().is_none()));
            if Scratch::is_kept() {
                // As it was, for whoever looks into it.
                let untouched = scratch.join("untouched");
                let _ = std::fs::remove_dir_all(&untouched);
                let _ = Command::new("cp").arg("-a").arg(&replica).arg(&untouched).status();
            }
            cable.restore();
            let reader = Dovecot::start(&copy, layout);
            let dump = reader.dump(&some);
            let complaints = reader.complaints();
            assert!(complaints.is_empty(), "kill {kill}: the recovered replica is not sound:\n{}", complaints.join("\n"));
            reader.stop();
            // Not while the standby is kept apart: it is there for as long as it can be.
            let _ = std::fs::remove_dir_all(&copy);
            let messages = dump.values().flat_map(|account| account.mailboxes.values()).map(|mailbox| mailbox.messages.len()).sum();
            shown.push((messages, some.len()));
            eprintln!("kill {kill}, {} s: {messages} messages of {} users, sound", began.elapsed().as_secs(), some.len());
        }
        let took = began.elapsed();
        drop(_rest);
        Ok::<_, std::io::Error>((load.join().expect("the load panicked")?, took))
    })
    .unwrap_or_else(|e| panic!("load: {e}"));
    server.stop();
    if let Err(why) = wait_identical(&root, &replica, Rules::of(layout), Duration::from_secs(90)) {
        panic!("not identical {why}\nprimary: {:#?}", pair.primary.status());
    }
    pair.primary.stop();
    pair.standby.stop();
    Mail { shown, done, took }
}

/// Ends the load, also when a check fails.
struct Rest<'a>(&'a AtomicBool);

impl Drop for Rest<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
    }
}
