//! A long line: packets between two namespaces are delayed, lost and held to a bandwidth, whatever protocol they are of.
//!
//! Each end has a TUN interface whose packets `socat` carries to and from a socket of ours. A router's buffer of 100 ms stands before the
//! bandwidth; what does not fit there is lost, as on a real line.

use std::fs::File;
use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::gate::{nap_until, wait_until};
use crate::rng::Rng;
use crate::scratch::Scratch;

/// How long packets may wait for the bandwidth.
const BUFFER: Duration = Duration::from_millis(100);
/// The largest packet of an interface, and some.
const PACKET: usize = 2048;
/// How often a reader looks whether it is over.
const TICK: Duration = Duration::from_millis(200);

/// What a line is like, each way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Line {
    /// From end to end.
    pub delay: Duration,
    /// Packets lost of each 100,000.
    pub lost: usize,
    /// Bits a second; 0: no limit.
    pub bits: u64,
}

impl Line {
    /// Lines one meets, by name: a town, a continent, an office.
    pub const ALL: [(&str, Self); 3] = [
        ("10ms", Self { delay: Duration::from_millis(5), lost: 0, bits: 0 }),
        ("50ms", Self { delay: Duration::from_millis(25), lost: 100, bits: 0 }),
        ("100mbit", Self { delay: Duration::from_micros(500), lost: 0, bits: 100_000_000 }),
    ];
}

/// The line at work; it ends when this is dropped.
#[derive(Debug)]
pub struct Slow {
    over: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    ends: Vec<Child>,
    _dir: Scratch,
}

impl Slow {
    /// Joins two namespaces: the words that run a command in each, the name of the interface there, its address with the prefix' length.
    pub fn start(ends: [(&[std::ffi::OsString], &str, &str); 2], line: Line, seed: u64) -> io::Result<Self> {
        let dir = Scratch::new("slow");
        let ours: Vec<PathBuf> = ["a", "b"].iter().map(|end| dir.join(end)).collect();
        let theirs: Vec<PathBuf> = ["a.tun", "b.tun"].iter().map(|end| dir.join(end)).collect();
        let sockets = [UnixDatagram::bind(&ours[0])?, UnixDatagram::bind(&ours[1])?];
        let mut slow = Self { over: Arc::new(AtomicBool::new(false)), threads: vec![], ends: vec![], _dir: dir };
        for (n, (prefix, interface, address)) in ends.into_iter().enumerate() {
            let tun = format!("TUN:{address},tun-name={interface},iff-no-pi,iff-up");
            let socket = format!("UNIX-SENDTO:{},bind={}", ours[n].display(), theirs[n].display());
            let mut command = Command::new(&prefix[0]);
            command.args(&prefix[1..]).args(["socat", "-b", &PACKET.to_string(), &tun, &socket]).stdin(Stdio::null());
            slow.ends.push(command.stderr(File::create(slow._dir.join(&format!("socat-{n}")))?).spawn()?);
            // What comes before the other end is there is lost; it must be there before anybody is told that the line is.
            wait_until(Duration::from_secs(10), "the end of a line", || theirs[n].exists());
        }
        for (from, to) in [(0, 1), (1, 0)] {
            let (read, write) = (sockets[from].try_clone()?, sockets[to].try_clone()?);
            read.set_read_timeout(Some(TICK))?;
            let (send, due) = channel::<(Instant, Vec<u8>)>();
            let (over, target) = (slow.over.clone(), theirs[to].clone());
            slow.threads.push(std::thread::spawn(move || take(&read, line, &mut Rng::part(seed, from as u64), &over, &send)));
            slow.threads.push(std::thread::spawn(move || give(&due, &write, &target)));
        }
        Ok(slow)
    }
}

/// Decides when each packet arrives, if it does.
fn take(read: &UnixDatagram, line: Line, rng: &mut Rng, over: &AtomicBool, send: &Sender<(Instant, Vec<u8>)>) {
    let (mut buffer, mut free) = ([0; PACKET], Instant::now());
    while !over.load(Ordering::Acquire) {
        let Ok(len) = read.recv(&mut buffer) else { continue };
        let now = Instant::now();
        free = free.max(now);
        if rng.below(100_000) < line.lost || free.duration_since(now) > BUFFER {
            continue;
        }
        if line.bits > 0 {
            free += Duration::from_secs_f64(len as f64 * 8.0 / line.bits as f64);
        }
        if send.send((free + line.delay, buffer[..len].to_vec())).is_err() {
            return;
        }
    }
}

/// Gives them on at that time; they stay in order.
fn give(due: &Receiver<(Instant, Vec<u8>)>, write: &UnixDatagram, target: &PathBuf) {
    while let Ok((at, packet)) = due.recv() {
        nap_until(at);
        let _ = write.send_to(&packet, target); // The interface is gone, or its queue is full: lost.
    }
}

impl Drop for Slow {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Release);
        for end in &mut self.ends {
            let _ = end.kill();
            let _ = end.wait();
        }
        self.threads.drain(..).for_each(|thread| drop(thread.join()));
    }
}
