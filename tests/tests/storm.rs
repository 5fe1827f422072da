//! 50,000 files made, renamed and removed as fast as possible, in directories made and moved meanwhile: identical at the end, with the
//! kernel's usual event queue and with one so short that it overflows.
//!
//! Size: `TWINBOX_TEST_SCALE` scales the 50,000.

use std::time::{Duration, Instant};

use twinbox_tests::gate::{Heavy, Need, Sysctl, heavy, scaled};
use twinbox_tests::live::Live;
use twinbox_tests::require;
use twinbox_tests::rng::Seed;
use twinbox_tests::scratch::Scratch;
use twinbox_tests::storm;
use twinbox_tests::tree::Layout;

const FILES: usize = 50_000;

fn weather(_turn: &Heavy, layout: Layout) {
    let seed = Seed::from_env();
    let scratch = Scratch::new("storm");
    let (source, replica) = (scratch.dir("source"), scratch.join("replica"));
    std::fs::write(source.join("first"), b"first").unwrap();
    let mut mirror = Live::start(&source, &replica, scratch.path(), layout);
    mirror.settle("before the storm", Duration::from_secs(30));

    let began = Instant::now();
    let done = storm::run(&source, scaled(FILES), seed.0).unwrap();
    eprintln!("{done:?} in {:?}", began.elapsed());
    assert!(done.moved > 0 && done.delivered > 0 && done.directories > 0);

    let began = Instant::now();
    mirror.settle("after the storm", Duration::from_secs(180));
    eprintln!("identical {:?} after the last change", began.elapsed());
    mirror.stop();
}

#[test]
fn with_the_usual_queue() {
    weather(&heavy(), Layout::Maildir);
}

#[test]
fn with_a_queue_that_overflows() {
    require!(Need::Root);
    let turn = heavy();
    // The limit is taken over by an inotify instance when it is made: set before the agent starts.
    let _short = Sysctl::set(&turn, "fs.inotify.max_queued_events", "256").unwrap();
    weather(&turn, Layout::Plain);
}
