//! Writers fence every message while the primary is lost again and again: what was fenced must be on the recovered standby each time.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::fence::{Ledger, maildir};
use crate::gate::{nap_until, wait_until};
use crate::node::Pair;
use crate::rng::{Rng, Seed};
use crate::scratch::Scratch;
use crate::tree::{Layout, Rules, wait_identical};

/// What was seen.
#[derive(Debug, Default)]
pub struct Seen {
    /// Times the primary was lost.
    pub losses: usize,
    /// Messages delivered.
    pub delivered: usize,
    /// Of these fenced.
    pub fenced: usize,
    /// Messages looked for on the recovered standby, over all losses.
    pub looked_for: usize,
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
    std::thread::scope(|scope| {
        let writing: Vec<_> = (0..writers)
            .map(|writer| {
                let (ledger, root, state) = (&ledger, &root, &state);
                scope.spawn(move || ledger.write(root, state, writer, deliveries, seed.0).expect("deliver"))
            })
            .collect();
        // Also when a check fails: the writers must end.
        let _over = Over(&ledger);
        let mut rng = Rng::part(seed.0, 499);
        for loss in 0..losses {
            // At an even share of the deliveries, and then at a random moment.
            let share = deliveries * loss / losses;
            wait_until(Duration::from_secs(600), "deliveries", || ledger.delivered.load(Ordering::SeqCst) >= share);
            nap_until(Instant::now() + Duration::from_micros(rng.below(200_000) as u64));
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
            let missing = Ledger::missing(&fenced, &replica);
            assert!(
                missing.is_empty(),
                "loss {loss}: {} of {} fenced messages are not there:\n{}",
                missing.len(),
                fenced.len(),
                missing.join("\n")
            );
            seen.looked_for += fenced.len();
            seen.losses += 1;
            cable.restore();
            pair.primary.start();
            pair.primary.wait_state(Duration::from_secs(60), "protected");
            ledger.down.store(false, Ordering::SeqCst);
        }
        for thread in writing {
            thread.join().expect("a writer panicked");
        }
    });
    let fenced = ledger.snapshot();
    (seen.delivered, seen.fenced) = (deliveries, fenced.len());
    if let Err(why) = wait_identical(&root, &replica, Rules::of(Layout::Maildir), Duration::from_secs(60)) {
        panic!("not identical {why}");
    }
    let missing = Ledger::missing(&fenced, &root);
    assert!(missing.is_empty(), "missing on the primary:\n{}", missing.join("\n"));
    pair.primary.stop();
    pair.standby.stop();
    seen
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
