//! The primary's agent is killed and started again while folders come, move, go and come again under the same names: identical each time the
//! store is at rest.
//!
//! Size: 3 kills; `TWINBOX_TEST_FULL=1`: 200.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use twinbox_tests::folders;
use twinbox_tests::gate::{full, heavy, nap_until, wait_until};
use twinbox_tests::node::{Node, Spec, free_udp, pair};
use twinbox_tests::rng::{Rng, Seed};
use twinbox_tests::scratch::Scratch;
use twinbox_tests::tree::{Layout, Rules, wait_identical};
use twinbox_tests::twinbox::Program;

const LIMIT: Duration = Duration::from_secs(60);

#[test]
fn folders_of_the_same_names_while_the_primary_is_killed() {
    let _turn = heavy();
    let seed = Seed::from_env().0;
    let scratch = Scratch::new("primary-kills");
    let trees = [scratch.dir("store"), scratch.dir("replica")];
    folders::make(&trees[0]).unwrap();
    let first = Spec { node: "alpha", role: "primary", mirror: "mail", root: &trees[0], layout: Layout::Maildir, listen: free_udp() };
    let second = Spec { node: "beta", role: "standby", root: &trees[1], listen: free_udp(), ..first.clone() };
    let program = Program::here;
    let mut nodes = [Node::init(program(), &scratch.join("alpha"), &first), Node::init(program(), &scratch.join("beta"), &second)];
    pair(&nodes[0], &nodes[1]);
    nodes.iter_mut().for_each(Node::start);
    nodes[0].wait_state(LIMIT, "protected");

    let mut rng = Rng::part(seed, 5);
    for round in 0..if full() { 200 } else { 3 } {
        let stop = AtomicBool::new(false);
        let done = std::thread::scope(|scope| {
            let load = scope.spawn(|| folders::run(&trees[0], seed, round, &stop));
            let mut pause = |most: usize| nap_until(Instant::now() + Duration::from_millis(rng.below(most) as u64));
            pause(1_000);
            nodes[0].kill9();
            pause(300);
            nodes[0].start();
            pause(1_500);
            stop.store(true, Ordering::SeqCst);
            load.join().expect("the load panicked")
        });
        eprintln!("round {round}: {} things done", done.unwrap());
        wait_until(LIMIT, "an answer", || nodes[0].status().is_some());
        nodes[0].wait_state(LIMIT, "protected");
        if let Err(why) = wait_identical(&trees[0], &trees[1], Rules::of(Layout::Maildir), LIMIT) {
            panic!("round {round}: not identical {why}\n{:#?}\n{:#?}", nodes[0].status(), nodes[1].status());
        }
    }
}
