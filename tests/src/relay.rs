//! A UDP relay that delays, loses and stops datagrams, for links that fail where there is no root.
//!
//! One thread a direction and one that hands out delayed datagrams. Clients are told apart by address, each with its own socket
//! towards the target, so several connections may pass at once.

use std::collections::{BTreeMap, BinaryHeap};
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::rng::Rng;

/// How often blocked threads look whether the relay is being dropped.
const TICK: Duration = Duration::from_millis(50);

/// Datagrams waiting for their time; a full queue loses further ones, as a router does.
const QUEUE: usize = 4096;

/// Longest datagram.
const DATAGRAM: usize = 65_536;

#[derive(Debug, Default)]
struct Switches {
    paused: AtomicBool,
    muted: AtomicBool,
    stop: AtomicBool,
    loss_percent: AtomicU64,
    delay_us: AtomicU64,
    passed: AtomicU64,
}

/// A running relay; stops on drop.
#[derive(Debug)]
pub struct Relay {
    address: SocketAddr,
    switches: Arc<Switches>,
    threads: Vec<JoinHandle<()>>,
}

struct Later {
    due: Instant,
    order: u64,
    socket: Arc<UdpSocket>,
    to: SocketAddr,
    bytes: Vec<u8>,
}

impl PartialEq for Later {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}
impl Eq for Later {}
impl PartialOrd for Later {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Later {
    /// The earliest is the greatest: a heap gives it first.
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (other.due, other.order).cmp(&(self.due, self.order))
    }
}

impl Relay {
    /// Relays to `target` from a port of its own on loopback; losses follow from `seed`.
    pub fn start(target: SocketAddr, seed: u64) -> io::Result<Self> {
        let front = Arc::new(UdpSocket::bind("127.0.0.1:0")?);
        front.set_read_timeout(Some(TICK))?;
        let address = front.local_addr()?;
        let switches = Arc::new(Switches::default());
        let (queue, due) = sync_channel(QUEUE);
        let mut threads = vec![std::thread::spawn({
            let switches = Arc::clone(&switches);
            move || hand_out(&due, &switches)
        })];
        threads.push(std::thread::spawn({
            let switches = Arc::clone(&switches);
            move || accept(&front, target, &switches, &queue, seed)
        }));
        Ok(Self { address, switches, threads })
    }

    /// Where clients send.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Loses everything (or nothing more), both ways.
    pub fn pause(&self, paused: bool) {
        self.switches.paused.store(paused, Ordering::SeqCst);
    }

    /// Loses everything (or nothing more) that the target says.
    pub fn mute(&self, muted: bool) {
        self.switches.muted.store(muted, Ordering::SeqCst);
    }

    /// Loses this many datagrams in a hundred.
    pub fn lose(&self, percent: u64) {
        self.switches.loss_percent.store(percent, Ordering::SeqCst);
    }

    /// Holds every datagram this long.
    pub fn delay(&self, by: Duration) {
        self.switches.delay_us.store(by.as_micros() as u64, Ordering::SeqCst);
    }

    /// Bytes of payload let through, both ways.
    #[must_use]
    pub fn passed(&self) -> u64 {
        self.switches.passed.load(Ordering::SeqCst)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.switches.stop.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn accept(front: &Arc<UdpSocket>, target: SocketAddr, switches: &Arc<Switches>, queue: &SyncSender<Later>, seed: u64) {
    let mut backs: BTreeMap<SocketAddr, Arc<UdpSocket>> = BTreeMap::new();
    let mut threads = Vec::new();
    let rng = Arc::new(Mutex::new(Rng::new(seed)));
    let mut buffer = vec![0_u8; DATAGRAM];
    while !switches.stop.load(Ordering::SeqCst) {
        let Ok((len, from)) = front.recv_from(&mut buffer) else { continue };
        let back = match backs.get(&from) {
            Some(back) => Arc::clone(back),
            None => {
                let Ok(socket) = UdpSocket::bind("127.0.0.1:0") else { continue };
                let _ = socket.set_read_timeout(Some(TICK));
                let back = Arc::new(socket);
                backs.insert(from, Arc::clone(&back));
                let (socket, front) = (Arc::clone(&back), Arc::clone(front));
                let (switches, queue, rng) = (Arc::clone(switches), queue.clone(), Arc::clone(&rng));
                threads.push(std::thread::spawn(move || {
                    let mut buffer = vec![0_u8; DATAGRAM];
                    while !switches.stop.load(Ordering::SeqCst) {
                        let Ok((len, _)) = socket.recv_from(&mut buffer) else { continue };
                        if switches.muted.load(Ordering::SeqCst) {
                            continue;
                        }
                        pass(&switches, &queue, &rng, &front, from, &buffer[..len]);
                    }
                }));
                back
            }
        };
        pass(switches, queue, &rng, &back, target, &buffer[..len]);
    }
    for thread in threads {
        let _ = thread.join();
    }
}

fn pass(switches: &Switches, queue: &SyncSender<Later>, rng: &Mutex<Rng>, socket: &Arc<UdpSocket>, to: SocketAddr, bytes: &[u8]) {
    let loss = switches.loss_percent.load(Ordering::SeqCst) as usize;
    let lost = rng.lock().is_ok_and(|mut rng| rng.chance(loss));
    if lost || switches.paused.load(Ordering::SeqCst) {
        return;
    }
    let order = switches.passed.fetch_add(bytes.len() as u64, Ordering::SeqCst);
    let delay = Duration::from_micros(switches.delay_us.load(Ordering::SeqCst));
    if delay.is_zero() {
        let _ = socket.send_to(bytes, to);
        return;
    }
    let socket = Arc::clone(socket);
    let later = Later { due: Instant::now() + delay, order, socket, to, bytes: bytes.to_vec() };
    let _ = queue.try_send(later);
}

fn hand_out(due: &Receiver<Later>, switches: &Switches) {
    let mut waiting = BinaryHeap::new();
    loop {
        let now = Instant::now();
        while waiting.peek().is_some_and(|next: &Later| next.due <= now) {
            if let Some(Later { socket, to, bytes, .. }) = waiting.pop() {
                let _ = socket.send_to(&bytes, to);
            }
        }
        let nap = waiting.peek().map_or(TICK, |next| next.due.saturating_duration_since(now));
        match due.recv_timeout(nap.min(TICK)) {
            Ok(later) => waiting.push(later),
            Err(RecvTimeoutError::Timeout) if switches.stop.load(Ordering::SeqCst) => return,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_passes_delays_and_stops() {
        let echo = UdpSocket::bind("127.0.0.1:0").unwrap();
        let relay = Relay::start(echo.local_addr().unwrap(), 1).unwrap();
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        client.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        echo.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        let mut buffer = [0; 16];
        let mut turn = |text: &[u8]| -> bool {
            client.send_to(text, relay.address()).unwrap();
            let Ok((len, from)) = echo.recv_from(&mut buffer) else { return false };
            echo.send_to(&buffer[..len], from).unwrap();
            client.recv_from(&mut buffer).is_ok_and(|(n, _)| &buffer[..n] == text)
        };
        assert!(turn(b"one"));
        relay.delay(Duration::from_millis(20));
        let before = Instant::now();
        assert!(turn(b"two"));
        assert!(before.elapsed() >= Duration::from_millis(40));
        relay.pause(true);
        assert!(!turn(b"three"));
        relay.pause(false);
        relay.lose(100);
        assert!(!turn(b"four"));
        relay.lose(0);
        relay.mute(true);
        assert!(!turn(b"five"));
        relay.mute(false);
        assert!(turn(b"six"));
    }
}
