//! What the agent costs those who write: open(O_WRONLY) of a file it reads, rename, and a delivery; agent off, on, and stopped (SIGSTOP), in turns.
//!
//! `cargo run -p twinbox-tests --bin writers [-- --rounds N]`. Figures that are compared with anything want `--release` for the product (`TWINBOX_BIN`).

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use twinbox_tests::bench::Samples;
use twinbox_tests::fence::{deliver, maildir};
use twinbox_tests::gate::nap_until;
use twinbox_tests::live::Live;
use twinbox_tests::scratch::Scratch;
use twinbox_tests::tree::Layout;

#[derive(Default)]
struct Times {
    open: Samples,
    rename: Samples,
    delivery: Samples,
}

fn option(name: &str, default: usize) -> usize {
    let mut words = std::env::args().skip_while(|w| w != name).skip(1);
    words.next().map_or(default, |w| w.parse().unwrap_or_else(|_| panic!("{name} wants a number")))
}

fn main() {
    let (rounds, turns) = (option("--rounds", 400), 3);
    let scratch = Scratch::new("writers");
    let (root, replica) = (scratch.dir("store"), scratch.dir("replica"));
    let maildir = maildir(&root, "anna");
    // A file that the agent reads again each time, for some hundred microseconds.
    let hot = maildir.join("dovecot.index");
    fs::write(&hot, vec![1; 512 * 1024]).expect("write");
    let mut modes: [(&str, Times); 3] = [("off", Times::default()), ("on", Times::default()), ("stopped", Times::default())];
    let mut n = 0;
    for _ in 0..turns {
        for (mode, times) in &mut modes {
            let mut live = (*mode != "off").then(|| {
                let mut live = Live::start(&root, &replica, scratch.path(), Layout::Maildir);
                live.settle("the first sync", Duration::from_secs(120));
                live
            });
            if *mode == "stopped" {
                live.as_mut().expect("runs").process().signal(Signal::STOP);
            }
            for _ in 0..rounds {
                n += 1;
                let began = Instant::now();
                let mut file = OpenOptions::new().write(true).open(&hot).expect("open");
                times.open.push(began.elapsed());
                file.write_all(&[n as u8; 100]).expect("write");
                drop(file);
                let began = Instant::now();
                let new = deliver(&maildir, &format!("{n}.test"), &[b'x'; 2000]).expect("delivered");
                times.delivery.push(began.elapsed());
                let began = Instant::now();
                fs::rename(&new, maildir.join("cur").join(format!("{n}.test:2,S"))).expect("rename");
                times.rename.push(began.elapsed());
                nap_until(Instant::now() + Duration::from_millis(2));
            }
            if let Some(mut live) = live {
                live.process().signal(Signal::CONT);
                drop(live.stop());
            }
        }
    }
    for (what, of) in
        [("open(O_WRONLY)", (|t: &Times| &t.open) as fn(&Times) -> &Samples), ("rename", |t| &t.rename), ("delivery", |t| &t.delivery)]
    {
        for (mode, times) in &modes {
            println!("{what:<15} agent {mode:<8} {}", of(times));
        }
    }
}
