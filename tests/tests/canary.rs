//! A stall anywhere in the pipeline is told within seconds, by name, in status and in the log; and that it is over.

use std::time::{Duration, Instant};

use rustix::process::Signal;
use twinbox_tests::fence::maildir;
use twinbox_tests::gate::{heavy, wait_until};
use twinbox_tests::node::{Node, Pair};
use twinbox_tests::scratch::Scratch;
use twinbox_tests::tree::Layout;

/// The promise is 5 s; a loaded machine gets twice that.
const TOLD_WITHIN: Duration = Duration::from_secs(10);

fn stage(node: &Node) -> Option<String> {
    Some(node.status()?.value["mirrors"][0]["stalled"]["stage"].as_str()?.to_owned())
}

#[test]
fn an_agent_that_stands_still_is_told_by_the_other() {
    let _turn = heavy();
    let scratch = Scratch::new("canary");
    let (root, replica) = (scratch.dir("store"), scratch.dir("replica"));
    maildir(&root, "anna");
    let mut pair = Pair::on_loopback(scratch.path(), &root, &replica, Layout::Maildir);
    pair.wait_drained(Duration::from_secs(30));
    pair.primary.wait_state(Duration::from_secs(30), "protected");

    let lsn = |pair: &Pair| pair.primary.status().unwrap().said.mirrors[0].lsn.durable;
    let before = lsn(&pair);
    wait_until(Duration::from_secs(20), "canaries of an idle mirror", || lsn(&pair) >= before + 3);
    let bound = pair.primary.status().unwrap().said.mirrors[0].bound_ms.unwrap();
    assert!(bound < 5_000.0, "{bound}");

    pair.standby.agent().signal(Signal::STOP);
    let began = Instant::now();
    wait_until(TOLD_WITHIN, "the primary to tell", || stage(&pair.primary).as_deref() == Some("link"));
    eprintln!("told after {:?}", began.elapsed());
    assert_eq!(pair.primary.status().unwrap().said.mirrors[0].state, "unprotected");
    wait_until(TOLD_WITHIN, "an ERROR in the log", || pair.primary.agent().stderr().contains("ERROR stalled"));
    pair.standby.agent().signal(Signal::CONT);
    pair.primary.wait_state(Duration::from_secs(60), "protected");
    assert_eq!(stage(&pair.primary), None);

    pair.primary.agent().signal(Signal::STOP);
    wait_until(TOLD_WITHIN, "the standby to tell", || {
        let status = pair.standby.status().unwrap();
        status.said.mirrors[0].state == "unprotected"
    });
    pair.primary.agent().signal(Signal::CONT);
    pair.standby.wait_state(Duration::from_secs(60), "protected");
    pair.primary.stop();
    pair.standby.stop();
}
