//! Fences through the agent's socket and through the command: what they promise, what they refuse, and many at once.
//!
//! Size: 600 deliveries and 3 losses of the primary; `TWINBOX_TEST_FULL=1`: 10,000 and 30.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use twinbox_tests::fence::{Client, deliver, maildir};
use twinbox_tests::fenced;
use twinbox_tests::gate::{Need, full, heavy};
use twinbox_tests::node::Pair;
use twinbox_tests::require;
use twinbox_tests::scratch::Scratch;
use twinbox_tests::tree::Layout;

#[test]
fn what_was_fenced_survives_the_loss_of_the_primary() {
    require!(Need::Namespaces);
    let _turn = heavy();
    let seen = if full() { fenced::run(10_000, 20, 30) } else { fenced::run(600, 20, 3) };
    eprintln!("{seen:?}");
    assert!(seen.fenced * 10 > seen.delivered * 8, "most fences hold, or this shows nothing: {seen:?}");
}

#[test]
fn what_was_fenced_survives_power_cuts_of_the_primary() {
    require!(Need::LoopDisk);
    let _turn = heavy();
    let seen = if full() { fenced::run_with_power_cuts(10_000, 20, 30) } else { fenced::run_with_power_cuts(600, 20, 3) };
    eprintln!("{seen:?}");
    assert!(seen.lost > 0, "no cut took anything, so nothing was shown: {seen:?}");
    assert!(seen.fenced * 10 > seen.delivered * 8, "most fences hold, or this shows nothing: {seen:?}");
}

#[test]
fn the_command_and_the_socket() {
    require!(Need::Program("socat"), Need::Program("python3"), Need::Program("lua5.4"));
    let _turn = heavy();
    let scratch = Scratch::new("fence");
    let (root, replica) = (scratch.dir("store"), scratch.dir("replica"));
    let maildir = maildir(&root, "anna");
    let mut pair = Pair::on_loopback(scratch.path(), &root, &replica, Layout::Maildir);
    pair.wait_drained(Duration::from_secs(30));

    let path = deliver(&maildir, "1.test", b"mail").unwrap();
    let text = path.display().to_string();
    let ended = pair.primary.command(&["fence", "--timeout", "20s", &text]).ok("fence");
    assert!(ended.stdout.starts_with("On two machines: mail at LSN "), "{}", ended.stdout);
    let json = pair.primary.command(&["fence", "--json"]).ok("fence --json").stdout;
    assert!(serde_json::from_str::<serde_json::Value>(&json).unwrap()["lsn"]["mail"].as_u64().is_some(), "{json}");
    let code = |words: &[&str], node: &twinbox_tests::node::Node| node.command(words).status.code();
    assert_eq!(code(&["fence", "/"], &pair.primary), Some(4), "no path of a mirror");
    assert_eq!(code(&["fence"], &pair.standby), Some(1), "the standby knows nothing of what is not there yet");

    // A declared transaction: nothing of it is there before its commit.
    let group = root.join("anna").display().to_string();
    let mut client = Client::connect(&pair.primary.state).unwrap();
    let begun = client.ask(&format!("TXN BEGIN timeout=60s path={group}")).unwrap();
    assert!(begun.starts_with("OK {\"txn\":"), "{begun}");
    deliver(&maildir, "2.test", b"mail").unwrap();
    deliver(&maildir, "3.test", b"mail").unwrap();
    assert!(client.ask(&format!("FENCE timeout=500ms path={group}")).unwrap().starts_with("ERR timeout "), "held");
    let there = |name: &str| replica.join("anna/Maildir/new").join(name).exists();
    assert!(!there("2.test") && !there("3.test"));
    assert!(client.ask(&format!("TXN COMMIT timeout=20s path={group}")).unwrap().starts_with("OK {\"lsn\":"));
    assert!(client.ask(&format!("TXN COMMIT path={group}")).unwrap().starts_with("ERR expired "));

    // A thousand callers at once share what a fence costs.
    let before = pair.primary.status().unwrap().said.mirrors[0].lsn.captured;
    let mut clients: Vec<Client> = (0..1000).map(|_| Client::connect(&pair.primary.state).unwrap()).collect();
    deliver(&maildir, "4.test", b"mail").unwrap();
    let began = Instant::now();
    std::thread::scope(|scope| {
        for part in clients.chunks_mut(125) {
            scope.spawn(|| {
                for client in part {
                    assert!(client.fence(&path, 30).unwrap());
                }
            });
        }
    });
    eprintln!("1,000 fences in {:?}", began.elapsed());
    let after = pair.primary.status().unwrap().said.mirrors[0].lsn.captured;
    assert!(after - before < 50, "a fence issues no transaction of its own: {} for 1,000", after - before);

    for (program, script) in [("sh", "fence.sh"), ("python3", "fence.py"), ("lua5.4", "fence.lua")] {
        let example = |path: &Path| {
            let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/fence").join(script);
            Command::new(program).arg(script).arg(path).arg(&pair.primary.state).output().unwrap()
        };
        let odd = maildir.join("new/a b%41\u{e4}.test");
        fs::write(&odd, b"mail").unwrap();
        let (good, bad) = (example(&odd), example(Path::new("/nowhere")));
        assert!(good.status.success(), "{script}: {good:?}");
        assert!(!bad.status.success() && String::from_utf8_lossy(&bad.stderr).contains("ERR bad-path"), "{script}: {bad:?}");
    }

    // Without a standby: at once, unless asked to wait.
    pair.standby.kill9();
    pair.primary.wait_state(Duration::from_secs(30), "unprotected");
    assert_eq!(code(&["fence"], &pair.primary), Some(14));
    assert_eq!(code(&["fence", "--wait", "--timeout", "300ms"], &pair.primary), Some(13));
    fs::write(maildir.join("new/5.test"), b"mail").unwrap();
    let answer = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| client.ask(&format!("FENCE timeout=60s unprotected=wait path={group}")));
        pair.standby.start();
        waiting.join().unwrap().unwrap()
    });
    assert!(answer.starts_with("OK "), "{answer}");
    pair.primary.stop();
    pair.standby.stop();
    assert!(there("2.test") && there("3.test") && there("5.test"));
}
