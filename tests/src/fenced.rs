//! Writers fence every message while the primary is lost again and again: what was fenced must be on the recovered standby each time.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::fence::{Ledger, maildir};
use crate::gate::{nap_until, wait_until};
use crate::node::{Node, Pair, Spec, free_udp, pair};
use crate::platter::Disk;
use crate::rng::{Rng, Seed};
use crate::scratch::Scratch;
use crate::tree::{Layout, Rules, wait_identical};
use crate::twinbox::Program;

/// What was seen.
#[derive(Debug, Default)]
pub struct Seen {
    /// Times the primary was lost.
    pub losses: usize,
    /// Messages delivered.
    pub delivered: usize,
    /// Of these fenced.
    pub fenced: usize,
    /// Messages looked for afterwards, over all losses.
    pub looked_for: usize,
    /// Of these not on the primary's disk after a power cut: they came back.
    pub lost: usize,
}

/// Delivers `deliveries` messages by `writers` writers while the primary is lost `losses` times; panics when a fenced message is missing.
#[must_use]
pub fn run(deliveries: usize, writers: usize, losses: usize) -> Seen {
    let seed = Seed::from_env();
    let scratch = Scratch::new("fenced");
    let (root, replica) = (scratch.dir("store"), scratch.dir("replica"));
    for writer in 0..writers {
        maildir(&root, &format!("user{writer:02}"));
    }
    let (mut pair, cable) = Pair::over_cable(scratch.path(), &root, &replica, Layout::Maildir);
    pair.wait_drained(Duration::from_secs(60));
    let (ledger, state) = (Ledger::default(), pair.primary.state.clone());
    let mut seen = Seen::default();
    while_delivering(&ledger, (&root, &state), deliveries, writers, losses, seed.0, |loss, rng| {
        if rng.chance(50) {
            cable.cut();
            pair.primary.kill9();
        } else {
            pair.primary.kill9();
            cable.cut();
        }
        let fenced = ledger.snapshot();
        ledger.down.store(true, Ordering::SeqCst);
        if rng.chance(50) {
            pair.standby.kill9();
            pair.standby.start();
        }
        wait_until(Duration::from_secs(60), "the standby to have applied what it acknowledged", || {
            pair.standby.status().is_some_and(|s| s.said.mirrors.iter().all(|m| m.lsn.applied == m.lsn.durable))
        });
        all_there(&fenced, &replica, loss);
        seen.looked_for += fenced.len();
        seen.losses += 1;
        cable.restore();
        pair.primary.start();
        pair.primary.wait_state(Duration::from_secs(60), "protected");
    });
    let fenced = ledger.snapshot();
    (seen.delivered, seen.fenced) = (deliveries, fenced.len());
    if let Err(why) = wait_identical(&root, &replica, Rules::of(Layout::Maildir), Duration::from_secs(60)) {
        panic!("not identical {why}");
    }
    all_there(&fenced, &root, losses);
    pair.primary.stop();
    pair.standby.stop();
    seen
}

/// The same on a disk of which only what was synced is left each time, after which the primary goes on (root): nothing fenced may be missing on either side.
#[must_use]
pub fn run_with_power_cuts(deliveries: usize, writers: usize, cuts: usize) -> Seen {
    let seed = Seed::from_env();
    let scratch = Scratch::new("fenced-cuts");
    let mut disk = Disk::new(&scratch.join("disk"), 512);
    let (root, replica, boot) = (disk.path().join("store"), scratch.dir("replica"), scratch.join("boot-id"));
    for writer in 0..writers {
        maildir(&root, &format!("user{writer:02}"));
    }
    fs::write(&boot, "boot-0").expect("a boot id");
    let (layout, listen) = (Layout::Maildir, [free_udp(), free_udp()]);
    let spec = Spec { node: "alpha", role: "primary", mirror: "mail", root: &root, layout, listen: listen[0] };
    let mut primary = Node::init(Program::under_env("TWINBOX_BOOT_ID_FILE", &boot), &disk.path().join("alpha"), &spec);
    primary.logs = scratch.dir("logs");
    let spec = Spec { node: "beta", role: "standby", root: &replica, listen: listen[1], ..spec.clone() };
    let mut standby = Node::init(Program::here(), &scratch.join("beta"), &spec);
    pair(&primary, &standby);
    standby.start();
    primary.start();
    let limit = Duration::from_secs(60);
    primary.wait_state(limit, "protected");
    let (ledger, state) = (Ledger { unsynced: true, ..Ledger::default() }, primary.state.clone());
    let mut seen = Seen::default();
    while_delivering(&ledger, (&root, &state), deliveries, writers, cuts, seed.0, |cut, _| {
        primary.kill9();
        let fenced = ledger.snapshot();
        ledger.down.store(true, Ordering::SeqCst);
        wait_until(limit, "the writers to rest", || ledger.resting.load(Ordering::SeqCst) == writers);
        disk.cut();
        let lost = Ledger::missing(&fenced, &root).len();
        fs::write(&boot, format!("boot-{}", cut + 1)).expect("a boot id");
        // It heals before anything else.
        primary.start();
        primary.wait_state(limit, "protected");
        all_there(&fenced, &root, cut);
        all_there(&fenced, &replica, cut);
        seen.looked_for += fenced.len();
        seen.lost += lost;
        seen.losses += 1;
    });
    let fenced = ledger.snapshot();
    (seen.delivered, seen.fenced) = (deliveries, fenced.len());
    if let Err(why) = wait_identical(&root, &replica, Rules::of(layout), limit) {
        panic!("not identical {why}");
    }
    all_there(&fenced, &root, cuts);
    primary.stop();
    standby.stop();
    seen
}

/// `writers` deliver and fence below `places` (the root; the agent's state) until `deliveries` are delivered, while `act` is called `times` times: at an even share of the deliveries, and then at a random moment.
fn while_delivering(
    ledger: &Ledger,
    places: (&Path, &Path),
    deliveries: usize,
    writers: usize,
    times: usize,
    seed: u64,
    mut act: impl FnMut(usize, &mut Rng),
) {
    std::thread::scope(|scope| {
        let write = |writer| scope.spawn(move || ledger.write(places.0, places.1, writer, deliveries, seed).expect("deliver"));
        let writing: Vec<_> = (0..writers).map(write).collect();
        // Also when a check fails: the writers must end.
        let _over = Over(ledger);
        let mut rng = Rng::part(seed, 499);
        for time in 0..times {
            let share = deliveries * time / times;
            wait_until(Duration::from_secs(600), "deliveries", || ledger.delivered.load(Ordering::SeqCst) >= share);
            nap_until(Instant::now() + Duration::from_micros(rng.below(200_000) as u64));
            act(time, &mut rng);
            ledger.down.store(false, Ordering::SeqCst);
        }
        for thread in writing {
            thread.join().expect("a writer panicked");
        }
    });
}

#[track_caller]
fn all_there(fenced: &BTreeMap<PathBuf, Vec<u8>>, tree: &Path, time: usize) {
    let missing = Ledger::missing(fenced, tree);
    let (few, at) = (missing.iter().take(20).cloned().collect::<Vec<_>>().join("\n"), tree.display());
    assert!(missing.is_empty(), "loss {time}: {} of {} fenced messages are not below {at}:\n{few}", missing.len(), fenced.len());
}

struct Over<'a>(&'a Ledger);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.over.store(true, Ordering::SeqCst);
        }
        self.0.down.store(false, Ordering::SeqCst);
    }
}
