//! Two nodes far apart: what takes a round trip takes one, and nothing else changes.

use std::fs;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use twinbox_tests::bench::Samples;
use twinbox_tests::fence::Client;
use twinbox_tests::gate::Need;
use twinbox_tests::netns::Cable;
use twinbox_tests::node::Pair;
use twinbox_tests::require;
use twinbox_tests::rng::Rng;
use twinbox_tests::scratch::Scratch;
use twinbox_tests::slow::Line;
use twinbox_tests::tree::{Layout, Rules, wait_identical};
use twinbox_tests::twinbox::Program;

/// 30 ms each way, and one packet of a hundred lost: worse than lines are.
const FAR: Line = Line { delay: Duration::from_millis(30), lost: 1_000, bits: 50_000_000 };

#[test]
fn a_fence_over_a_long_line_takes_a_round_trip_and_little_more() {
    require!(Need::Namespaces, Need::Program("socat"));
    let scratch = Scratch::new("long");
    let (root, replica) = (scratch.dir("store"), scratch.dir("replica"));
    for part in ["tmp", "new", "cur"] {
        fs::create_dir_all(root.join("user/Maildir").join(part)).unwrap();
    }
    fs::write(root.join("user/Maildir/cur/large"), Rng::new(1).bytes(3 << 20)).unwrap();
    let cable = Cable::long(FAR);
    let listen = [SocketAddr::new(cable.a.address, 7440), SocketAddr::new(cable.b.address, 7440)];
    let programs = [Program::within(&cable.a), Program::within(&cable.b)];
    let mut pair = Pair::start(scratch.path(), &root, &replica, Layout::Maildir, programs, listen);
    pair.wait_drained(Duration::from_secs(60));
    let mut client = Client::connect(&pair.primary.state).unwrap();
    let mut samples = Samples::default();
    for n in 0..40 {
        let (tmp, path) = (root.join(format!("user/Maildir/tmp/{n}")), root.join(format!("user/Maildir/new/{n}")));
        fs::write(&tmp, "a message\n").unwrap();
        fs::rename(tmp, &path).unwrap();
        let began = Instant::now();
        assert!(client.fence(&path, 30).unwrap());
        samples.push(began.elapsed());
        assert!(began.elapsed() >= 2 * FAR.delay, "there and back faster than the line is long: {:?}", began.elapsed());
    }
    // The median is one that lost nothing; generous, for a busy machine.
    assert!(samples.percentile(50) < 5 * FAR.delay, "{samples}");
    wait_identical(&root, &replica, Rules::of(Layout::Maildir), Duration::from_secs(60)).unwrap_or_else(|why| panic!("{why}"));
    pair.primary.stop();
    pair.standby.stop();
}
