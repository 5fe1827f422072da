//! One node of a pair: its configuration made by `init`, its agent under `run`, what `status --json` says of it.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;

use crate::gate::{wait_for, wait_until};
use crate::netns::Cable;
use crate::tree::Layout;
use crate::twinbox::{COMMAND_LIMIT, Ended, Process, Program, STOP_LIMIT};

/// How a pairing code begins.
pub const CODE: &str = "twinbox-pair:";

/// What `init` is told.
#[derive(Debug, Clone)]
pub struct Spec<'a> {
    /// The node's name.
    pub node: &'a str,
    /// `primary` or `standby`.
    pub role: &'a str,
    /// The mirror's name.
    pub mirror: &'a str,
    /// The tree.
    pub root: &'a Path,
    /// Its layout.
    pub layout: Layout,
    /// Where it listens.
    pub listen: SocketAddr,
}

/// A node, running or not.
#[derive(Debug)]
pub struct Node {
    /// How its commands are run.
    pub program: Program,
    /// Its name.
    pub name: String,
    /// Its configuration file.
    pub config: PathBuf,
    /// Its state directory.
    pub state: PathBuf,
    /// Where outputs go.
    pub logs: PathBuf,
    /// Its agent.
    pub agent: Option<Process>,
}

impl Node {
    /// Runs `init` in `dir` (created), which also takes the node's state and outputs.
    pub fn init(program: Program, dir: &Path, spec: &Spec<'_>) -> Self {
        let (node, ended) = Self::try_init(program, dir, spec);
        ended.ok("twinbox init");
        node
    }

    /// The same, whatever comes of it.
    pub fn try_init(program: Program, dir: &Path, spec: &Spec<'_>) -> (Self, Ended) {
        std::fs::create_dir_all(dir).expect("node directory");
        let node = Self {
            program,
            name: spec.node.to_owned(),
            config: dir.join("twinbox.toml"),
            state: dir.join("state"),
            logs: dir.to_owned(),
            agent: None,
        };
        let mut mirror = OsString::from(spec.mirror);
        mirror.push("=");
        mirror.push(spec.root);
        let listen = spec.listen.to_string();
        let args: Vec<OsString> = vec![
            "init".into(),
            "--config".into(),
            node.config.clone().into(),
            "--node".into(),
            spec.node.into(),
            "--role".into(),
            spec.role.into(),
            "--mirror".into(),
            mirror,
            "--layout".into(),
            spec.layout.name().into(),
            "--listen".into(),
            listen.into(),
            "--state".into(),
            node.state.clone().into(),
        ];
        let ended = node.program.run("init", &node.logs, args);
        (node, ended)
    }

    /// Runs a command of the product with `--config`.
    pub fn command(&self, words: &[&str]) -> Ended {
        self.program.run(&format!("{}-{}", self.name, words[0]), &self.logs, self.args(words))
    }

    fn args(&self, words: &[&str]) -> Vec<OsString> {
        let mut args: Vec<OsString> = words.iter().map(Into::into).collect();
        args.extend(["--config".into(), self.config.clone().into()]);
        args
    }

    /// Starts the agent; `TWINBOX_TEST_LOG=debug` has it say more.
    pub fn start(&mut self) {
        assert!(self.agent.is_none(), "{} runs already", self.name);
        let mut args = self.args(&["run"]);
        if let Some(level) = std::env::var_os("TWINBOX_TEST_LOG") {
            args.extend(["--log-level".into(), level]);
        }
        self.agent = Some(self.program.spawn(&format!("{}-run", self.name), &self.logs, args));
    }

    /// The running agent.
    pub fn agent(&mut self) -> &mut Process {
        self.agent.as_mut().expect("the agent was started")
    }

    /// Kills the agent without warning.
    pub fn kill9(&mut self) {
        let mut agent = self.agent.take().expect("the agent was started");
        agent.assert_running();
        agent.kill9();
    }

    /// Asks the agent to drain and stop; panics unless it exits 0.
    pub fn stop(&mut self) {
        let mut agent = self.agent.take().expect("the agent was started");
        agent.assert_running();
        agent.terminate();
        let status = agent.wait(STOP_LIMIT);
        assert!(status.success(), "{} stopped with {status}", self.name);
    }

    /// What the agent says of itself; `None` while it cannot be reached.
    #[must_use]
    pub fn status(&self) -> Option<Status> {
        let ended = self.command(&["status", "--json"]);
        if !ended.status.success() {
            return None;
        }
        let value: Value =
            serde_json::from_str(&ended.stdout).unwrap_or_else(|e| panic!("status --json is not JSON: {e}\n{}", ended.stdout));
        let said =
            serde_json::from_value(value.clone()).unwrap_or_else(|e| panic!("status --json breaks its schema: {e}\n{}", ended.stdout));
        Some(Status { said, value })
    }

    /// Waits until the only mirror is `state`.
    pub fn wait_state(&self, limit: Duration, state: &str) {
        wait_until(limit, &format!("{} to be {state}", self.name), || {
            self.status().is_some_and(|s| s.said.mirrors.iter().all(|m| m.state == state))
        });
    }
}

/// Pairs two nodes by code: the first prints it and waits, the second uses it. Returns the code.
pub fn pair(first: &Node, second: &Node) -> String {
    let args = first.args(&["pair"]);
    let mut waiting = first.program.spawn(&format!("{}-pair", first.name), &first.logs, args);
    let code = waiting.wait_output(COMMAND_LIMIT, "a pairing code", code_in);
    second.command(&["pair", &code]).ok("twinbox pair CODE");
    waiting.end(COMMAND_LIMIT).ok("twinbox pair, waiting side");
    code
}

/// The pairing code in a text, once all of it is there.
#[must_use]
pub fn code_in(text: &str) -> Option<String> {
    let whole = |(at, _): (usize, &str)| {
        let rest = &text[at..];
        let end = rest.find(|c: char| c.is_whitespace() || c == '\'' || c == '"' || c == '`')?;
        // What is said on the other stream shows only its beginning, and may be read first.
        (!rest[..end].ends_with('…')).then(|| rest[..end].to_owned())
    };
    text.match_indices(CODE).find_map(whole)
}

/// An unused UDP port on loopback.
#[must_use]
pub fn free_udp() -> SocketAddr {
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").expect("bind");
    socket.local_addr().expect("an address")
}

/// `status --json`: what tests rely on, and all of it.
#[derive(Debug)]
pub struct Status {
    /// The documented part.
    pub said: Said,
    /// As it came.
    pub value: Value,
}

/// The documented schema of `status --json`; more fields may come.
#[derive(Debug, Deserialize)]
#[allow(missing_docs)]
pub struct Said {
    pub node: String,
    pub mirrors: Vec<MirrorSaid>,
}

/// One mirror in [`Said`].
#[derive(Debug, Deserialize)]
#[allow(missing_docs)]
pub struct MirrorSaid {
    pub name: String,
    pub role: String,
    pub state: String,
    pub epoch: u64,
    pub generation: Value,
    pub lsn: LsnSaid,
    pub lag_ms: Option<f64>,
    pub bound_ms: Option<f64>,
    pub pending: PendingSaid,
    pub peers: Vec<PeerSaid>,
}

/// Positions in a mirror's sequence.
#[derive(Debug, Deserialize)]
#[allow(missing_docs)]
pub struct LsnSaid {
    pub captured: u64,
    pub durable: u64,
    pub applied: u64,
}

/// What has not arrived yet.
#[derive(Debug, Deserialize)]
#[allow(missing_docs)]
pub struct PendingSaid {
    pub paths: u64,
    pub bytes: u64,
}

/// One peer of a mirror.
#[derive(Debug, Deserialize)]
#[allow(missing_docs)]
pub struct PeerSaid {
    pub node: String,
    pub connected: bool,
    pub durable: Option<u64>,
    pub applied: Option<u64>,
}

impl Status {
    /// The sum of every `totals.<name>` anywhere in the answer; `None` when there is none.
    #[must_use]
    pub fn total(&self, name: &str) -> Option<u64> {
        fn find(value: &Value, name: &str, sum: &mut Option<u64>) {
            match value {
                Value::Object(map) => {
                    if let Some(n) = map.get("totals").and_then(|t| t.get(name)?.as_u64()) {
                        *sum = Some(sum.unwrap_or(0) + n);
                    }
                    map.values().for_each(|v| find(v, name, sum));
                }
                Value::Array(items) => items.iter().for_each(|v| find(v, name, sum)),
                _ => {}
            }
        }
        let mut sum = None;
        find(&self.value, name, &mut sum);
        sum
    }
}

/// Two paired nodes on loopback, both running.
#[derive(Debug)]
pub struct Pair {
    /// The one that accepts changes.
    pub primary: Node,
    /// The one that holds the replica.
    pub standby: Node,
}

impl Pair {
    /// Makes, pairs and starts two nodes under `dir`.
    #[must_use]
    pub fn on_loopback(dir: &Path, source: &Path, replica: &Path, layout: Layout) -> Self {
        let at = [free_udp(), free_udp()];
        let programs = [Program::here(), Program::here()];
        Self::start(dir, source, replica, layout, programs, at)
    }

    /// The same, each node in a network namespace of its own, at the ends of a cable (root).
    #[must_use]
    pub fn over_cable(dir: &Path, source: &Path, replica: &Path, layout: Layout) -> (Self, Cable) {
        let cable = Cable::new();
        let programs = [Program::within(&cable.a), Program::within(&cable.b)];
        let listen = [SocketAddr::new(cable.a.address, 7440), SocketAddr::new(cable.b.address, 7440)];
        (Self::start(dir, source, replica, layout, programs, listen), cable)
    }

    /// The same, each node run in its own way and listening at its own address.
    #[must_use]
    pub fn start(dir: &Path, source: &Path, replica: &Path, layout: Layout, programs: [Program; 2], listen: [SocketAddr; 2]) -> Self {
        let [p, s] = programs;
        let primary = Spec { node: "alpha", role: "primary", mirror: "mail", root: source, layout, listen: listen[0] };
        let standby = Spec { node: "beta", role: "standby", root: replica, listen: listen[1], ..primary.clone() };
        let mut pair = Self { primary: Node::init(p, &dir.join("alpha"), &primary), standby: Node::init(s, &dir.join("beta"), &standby) };
        self::pair(&pair.primary, &pair.standby);
        pair.primary.start();
        pair.standby.start();
        pair
    }

    /// Waits until the primary says that everything captured is durable and applied, and nothing is pending.
    pub fn wait_drained(&self, limit: Duration) {
        wait_for(limit, "the standby to have everything", || {
            let status = self.primary.status()?;
            let done =
                status.said.mirrors.iter().all(|m| m.state == "protected" && m.pending.paths == 0 && m.lsn.captured == m.lsn.applied);
            done.then_some(())
        });
    }
}
