//! What a fence costs, beside its floor (4 KiB made durable and a round trip) of the same run: when nothing is dirty, behind a delivery, and a thousand at once.
//!
//! `cargo run -p twinbox-tests --bin fences [-- --rounds N]`. Two agents on loopback. Figures that are compared with anything want `--release` for the product (`TWINBOX_BIN`).

use std::time::{Duration, Instant};

use twinbox_tests::bench::{Samples, floor};
use twinbox_tests::fence::{Client, deliver, maildir};
use twinbox_tests::node::Pair;
use twinbox_tests::scratch::Scratch;
use twinbox_tests::tree::Layout;

fn option(name: &str, default: usize) -> usize {
    let mut words = std::env::args().skip_while(|w| w != name).skip(1);
    words.next().map_or(default, |w| w.parse().unwrap_or_else(|_| panic!("{name} wants a number")))
}

fn main() {
    let rounds = option("--rounds", 200);
    let scratch = Scratch::new("fences");
    let (root, replica) = (scratch.dir("store"), scratch.dir("replica"));
    let maildir = maildir(&root, "anna");
    let mut pair = Pair::on_loopback(scratch.path(), &root, &replica, Layout::Maildir);
    pair.wait_drained(Duration::from_secs(30));
    let mut client = Client::connect(&pair.primary.state).expect("the agent's socket");
    let (mut idle, mut behind, mut floors) = (Samples::default(), Samples::default(), vec![]);
    for part in 0..4 {
        floors.push(floor(scratch.path(), 100).expect("floor"));
        for n in 0..rounds {
            let began = Instant::now();
            assert!(client.fence(&root, 30).expect("an answer"));
            idle.push(began.elapsed());
            let path = deliver(&maildir, &format!("{part}.{n}.test"), &[b'x'; 3000]).expect("delivered");
            let began = Instant::now();
            assert!(client.fence(&path, 30).expect("an answer"));
            behind.push(began.elapsed());
        }
    }
    let floor = floors.iter().map(|f| f.percentile(50)).min().expect("measured");
    let ratio = |samples: &Samples, percent| samples.percentile(percent).as_secs_f64() / floor.as_secs_f64();
    println!("floor            p50 {:.3} ms", floor.as_secs_f64() * 1e3);
    println!("nothing dirty    {idle}   {:.1} x floor at p50, {:.1} x at p99", ratio(&idle, 50), ratio(&idle, 99));
    println!("behind delivery  {behind}   {:.1} x floor at p50, {:.1} x at p99", ratio(&behind, 50), ratio(&behind, 99));

    let mut many: Vec<Client> = (0..1000).map(|_| Client::connect(&pair.primary.state).expect("the agent's socket")).collect();
    let captured = |pair: &Pair| pair.primary.status().expect("status").said.mirrors[0].lsn.captured;
    let before = captured(&pair);
    let path = deliver(&maildir, "many.test", b"mail").expect("delivered");
    let (mut all, began) = (Samples::default(), Instant::now());
    for client in &mut many {
        client.send(&path, 60).expect("sent");
    }
    for client in &mut many {
        assert!(client.answer().expect("an answer").starts_with("OK "));
        all.push(began.elapsed());
    }
    println!("1,000 at once    {all}   ({} transactions)", captured(&pair) - before);
    pair.primary.stop();
    pair.standby.stop();
}
