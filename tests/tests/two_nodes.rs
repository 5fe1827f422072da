//! Two agents in two network namespaces, paired by code, while the cable between them is cut and restored and either agent is killed and
//! restarted, and a real Dovecot is at work on the primary: identical at the end, and a Dovecot on the replica shows the same.
//!
//! Size: 3 cuts of 3 s and 3 kills of each agent; `TWINBOX_TEST_FULL=1`: ten cuts of 10 s, ten kills of each.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use twinbox_tests::dovecot::{self, Dovecot, differences};
use twinbox_tests::gate::{Need, full, heavy, nap_until, scaled};
use twinbox_tests::mailload::{self, Done, Load};
use twinbox_tests::netns::Cable;
use twinbox_tests::node::{Node, Pair};
use twinbox_tests::require;
use twinbox_tests::rng::{Rng, Seed};
use twinbox_tests::scratch::Scratch;
use twinbox_tests::tree::{Layout, Rules, assert_identical, leftovers, wait_identical};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Cut,
    KillPrimary,
    KillStandby,
}

/// How long the agents are left alone between two faults: long enough to reconnect, so that faults also meet a catch-up under way.
const BETWEEN: Duration = Duration::from_millis(1_500);

/// Every fault `times` times, in an order that follows from the seed.
fn order(times: usize, rng: &mut Rng) -> Vec<Fault> {
    let each = [Fault::Cut, Fault::KillPrimary, Fault::KillStandby];
    let mut faults: Vec<Fault> = each.into_iter().flat_map(|f| std::iter::repeat_n(f, times)).collect();
    for n in (1..faults.len()).rev() {
        faults.swap(n, rng.below(n + 1));
    }
    faults
}

fn strike(fault: Fault, pair: &mut Pair, cable: &Cable, length: Duration, rng: &mut Rng) {
    let again = |node: &mut Node| {
        node.kill9();
        node.start();
    };
    match fault {
        Fault::Cut => {
            let until = Instant::now() + length;
            cable.cut();
            // Now and then an agent dies while the cable is cut.
            if rng.chance(30) {
                nap_until(Instant::now() + length / 2);
                if rng.chance(50) { again(&mut pair.primary) } else { again(&mut pair.standby) }
            }
            nap_until(until);
            cable.restore();
        }
        Fault::KillPrimary => again(&mut pair.primary),
        Fault::KillStandby => again(&mut pair.standby),
    }
}

#[test]
fn cuts_and_kills_under_a_mail_load() {
    require!(Need::Dovecot, Need::Namespaces);
    let _turn = heavy();
    let seed = Seed::from_env();
    let (times, length) = if full() { (10, Duration::from_secs(10)) } else { (3, Duration::from_secs(3)) };
    let layout = Layout::Maildir;
    let scratch = Scratch::new("two-nodes");
    let root = dovecot::store(&scratch, "store");
    let replica = scratch.dir("replica");
    let users = dovecot::users(20);
    let (mut pair, cable) = Pair::over_cable(scratch.path(), &root, &replica, layout);
    pair.wait_drained(Duration::from_secs(60));

    let server = Dovecot::start(&root, layout);
    let faulty = AtomicBool::new(true);
    let done = std::thread::scope(|scope| {
        // The load comes in rounds for as long as there are faults.
        let load = scope.spawn(|| {
            let mut all = Done::default();
            let mut round = 0;
            while faulty.load(Ordering::SeqCst) || round == 0 {
                let load = Load::new(scaled(250).max(100), users.len(), seed.0 + round);
                all += mailload::run(&server, load)?;
                round += 1;
            }
            Ok::<_, std::io::Error>(all)
        });
        // Lets the load end even where a fault's own check fails.
        let _over = Over(&faulty);
        let mut rng = Rng::part(seed.0, 77);
        for (n, fault) in order(times, &mut rng).into_iter().enumerate() {
            eprintln!("fault {n}: {fault:?}");
            strike(fault, &mut pair, &cable, length, &mut rng);
            nap_until(Instant::now() + BETWEEN);
            pair.primary.agent().assert_running();
            pair.standby.agent().assert_running();
        }
        drop(_over);
        load.join().expect("the load panicked")
    })
    .unwrap_or_else(|e| panic!("load: {e}"));
    eprintln!("{done:?}");
    done.assert_varied();

    let shown = server.dump(&users);
    server.stop();
    let rules = Rules::of(layout);
    if let Err(why) = wait_identical(&root, &replica, rules, Duration::from_secs(90)) {
        panic!("not identical {why}\nprimary: {:#?}\nstandby: {:#?}", pair.primary.status(), pair.standby.status());
    }
    pair.wait_drained(Duration::from_secs(30));
    let status = pair.primary.status().expect("the primary answers");
    assert!(status.said.mirrors.iter().all(|m| m.peers.iter().all(|p| p.connected)), "{status:?}");
    pair.primary.stop();
    pair.standby.stop();
    assert_identical(&root, &replica, rules);
    assert_eq!(leftovers(&replica).unwrap(), Vec::<String>::new(), "left behind");

    let standby = Dovecot::start(&replica, layout);
    let lost = differences(&shown, &standby.dump(&users));
    assert!(lost.is_empty(), "Dovecot on the replica differs:\n{}", lost.join("\n"));
    standby.stop();
}

/// Says on drop that the faults are over.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

/// While the cable is cut the primary says so, honestly, and takes up the work when it is back.
#[test]
fn a_cut_is_told_and_healed() {
    require!(Need::Namespaces);
    let _turn = heavy();
    let scratch = Scratch::new("two-nodes");
    let (root, replica) = (scratch.dir("store"), scratch.dir("replica"));
    std::fs::create_dir_all(root.join("user/Maildir/new")).unwrap();
    let (mut pair, cable) = Pair::over_cable(scratch.path(), &root, &replica, Layout::Maildir);
    pair.wait_drained(Duration::from_secs(60));
    cable.cut();
    for n in 0..50 {
        std::fs::write(root.join(format!("user/Maildir/new/{n}.M1.host")), b"written while cut").unwrap();
    }
    pair.primary.wait_state(Duration::from_secs(30), "unprotected");
    twinbox_tests::gate::wait_until(Duration::from_secs(10), "the pending changes to be counted", || {
        pair.primary.status().is_some_and(|s| s.said.mirrors[0].pending.paths > 0)
    });
    cable.restore();
    let rules = Rules::of(Layout::Maildir);
    wait_identical(&root, &replica, rules, Duration::from_secs(30)).unwrap_or_else(|why| panic!("{why}"));
    pair.wait_drained(Duration::from_secs(30));
    pair.primary.stop();
    pair.standby.stop();
    assert_identical(&root, &replica, rules);
}
