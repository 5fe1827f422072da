//! Two network namespaces joined by one cable that can be cut.
//!
//! Nothing leaves the machine: the namespaces have loopback and the cable, no route anywhere. Names hold the test's process id and
//! a counter; everything is removed on drop.

use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::slow::{Line, Slow};

/// One network namespace with one end of the cable.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    interface: String,
    /// Its address on the cable.
    pub address: IpAddr,
}

impl Namespace {
    fn new(name: String, interface: String, address: Ipv4Addr) -> Self {
        ip(&["netns", "add", &name]);
        Self { name, interface, address: address.into() }
    }

    /// The words that run a command inside it (the command takes the process's place).
    #[must_use]
    pub fn prefix(&self) -> Vec<OsString> {
        ["ip", "netns", "exec", &self.name].into_iter().map(Into::into).collect()
    }

    /// The file that stands for it, for `setns`.
    #[must_use]
    pub fn file(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }

    /// Runs a command inside it, to its end.
    pub fn run(&self, words: &[&str]) -> Output {
        let mut all = self.prefix();
        all.extend(words.iter().map(Into::into));
        Command::new(&all[0]).args(&all[1..]).output().expect("run ip")
    }

    /// Bytes this end of the cable has sent and received, with every header.
    #[must_use]
    pub fn bytes(&self) -> Traffic {
        let read = |what: &str| {
            let path = format!("/sys/class/net/{}/statistics/{what}", self.interface);
            let out = self.run(&["cat", &path]);
            let text = String::from_utf8_lossy(&out.stdout).trim().to_owned();
            text.parse().unwrap_or_else(|_| panic!("counter {path}: {text:?}"))
        };
        Traffic { sent: read("tx_bytes"), received: read("rx_bytes") }
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).output();
    }
}

/// Bytes over one end of the cable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Traffic {
    /// Out of this end.
    pub sent: u64,
    /// Into this end.
    pub received: u64,
}

impl Traffic {
    /// What has passed since `before`.
    #[must_use]
    pub fn since(self, before: Self) -> Self {
        Self { sent: self.sent - before.sent, received: self.received - before.received }
    }

    /// Both ways.
    #[must_use]
    pub fn total(self) -> u64 {
        self.sent + self.received
    }
}

/// Two namespaces and the cable between them.
#[derive(Debug)]
pub struct Cable {
    /// What delays its packets; ends before the namespaces go.
    slow: Option<Slow>,
    /// One end.
    pub a: Namespace,
    /// The other.
    pub b: Namespace,
}

impl Cable {
    fn apart() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let tag = format!("{}{}", std::process::id(), (b'a' + (n % 26) as u8) as char);
        let end = |side: &str, last: u8| {
            let address = Ipv4Addr::new(10, 213, 7, last);
            Namespace::new(format!("twb{tag}{side}"), format!("tw{tag}{side}"), address)
        };
        let cable = Self { a: end("a", 1), b: end("b", 2), slow: None };
        for end in [&cable.a, &cable.b] {
            ip(&["-n", &end.name, "link", "set", "lo", "up"]);
        }
        cable
    }

    /// Makes both namespaces, joined.
    #[must_use]
    pub fn new() -> Self {
        let cable = Self::apart();
        let (a, b) = (&cable.a, &cable.b);
        ip(&["link", "add", &a.interface, "netns", &a.name, "type", "veth", "peer", "name", &b.interface, "netns", &b.name]);
        for end in [a, b] {
            let address = format!("{}/24", end.address);
            ip(&["-n", &end.name, "addr", "add", &address, "dev", &end.interface]);
            ip(&["-n", &end.name, "link", "set", &end.interface, "up"]);
        }
        cable
    }

    /// Makes both namespaces, joined by a long line (needs `socat`).
    #[must_use]
    pub fn long(line: Line) -> Self {
        let mut cable = Self::apart();
        let ends = [&cable.a, &cable.b].map(|end| (end.prefix(), end.interface.clone(), format!("{}/24", end.address)));
        let [a, b] = &ends;
        cable.slow = Some(Slow::start([(&a.0, &a.1, &a.2), (&b.0, &b.1, &b.2)], line, 1).expect("a long line"));
        cable
    }

    /// Takes the link down: nothing passes, either way.
    pub fn cut(&self) {
        self.link("down");
    }

    /// Brings the link up again.
    pub fn restore(&self) {
        self.link("up");
    }

    fn link(&self, state: &str) {
        ip(&["-n", &self.a.name, "link", "set", &self.a.interface, state]);
    }
}

impl Default for Cable {
    fn default() -> Self {
        Self::new()
    }
}

fn ip(args: &[&str]) {
    let out = Command::new("ip").args(args).output().expect("run ip");
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "ip {}: {said}", args.join(" "));
}
