//! Who takes part: Twinbox, and what a user would otherwise run, each set up as its manual says for the smallest delay.
//!
//! Everybody leaves out what is in `tmp` (half a delivery), and nobody encrypts or compresses less than by default. `rsync` and `lsyncd` speak
//! to an rsync daemon (no ssh: that would cost CPU which the others do not spend).

use std::ffi::OsString;
use std::fs;
use std::net::SocketAddr;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use twinbox_tests::gate::{Need, missing, nap};
use twinbox_tests::node::{Node, Spec, pair};
use twinbox_tests::tree::Layout;
use twinbox_tests::twinbox::Program;

use super::arena::{Arena, End};

const RSYNC_PORT: u16 = 8730;
const UNISON_PORT: u16 = 7700;
const SYNCTHING_PORT: u16 = 22_000;
const TWINBOX_PORT: u16 = 7440;

/// A contender.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
#[allow(missing_docs)]
pub enum Peer {
    Twinbox,
    Rsync,
    Lsyncd,
    Syncthing,
    Unison,
}

impl Peer {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Twinbox, Self::Rsync, Self::Lsyncd, Self::Syncthing, Self::Unison];

    /// As in tables.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Twinbox => "twinbox",
            Self::Rsync => "rsync, in a loop",
            Self::Lsyncd => "lsyncd",
            Self::Syncthing => "syncthing",
            Self::Unison => "unison",
        }
    }

    /// Why it cannot take part here.
    #[must_use]
    pub fn missing(self) -> Option<String> {
        let programs: &[&str] = match self {
            Self::Twinbox => &[],
            Self::Rsync => &["rsync"],
            Self::Lsyncd => &["rsync", "lsyncd"],
            Self::Syncthing => &["syncthing"],
            Self::Unison => &["unison"],
        };
        programs.iter().find_map(|name| missing(Need::Program(name)))
    }

    /// Everything that comes before the first byte is copied.
    ///
    /// # Errors
    /// It cannot be set up.
    pub fn set_up(self, arena: &Arena) -> anyhow::Result<Ready> {
        match self {
            Self::Twinbox => twinbox(arena),
            Self::Rsync => rsync(arena),
            Self::Lsyncd => lsyncd(arena),
            Self::Syncthing => syncthing(arena),
            Self::Unison => unison(arena),
        }
    }
}

/// Set up, not started.
#[derive(Debug)]
pub struct Ready(Vec<Part>);

impl Ready {
    /// Starts it.
    ///
    /// # Errors
    /// A process cannot be started.
    pub fn start(self) -> anyhow::Result<Running> {
        let mut running = Running { parts: vec![], nodes: vec![] };
        for part in self.0 {
            match part {
                Part::Node(mut node) => {
                    node.start();
                    running.nodes.push(*node);
                }
                Part::Daemon(name, command) => running.parts.push(Keeper::start(name, command, Duration::from_millis(200))),
                Part::Loop(name, command) => running.parts.push(Keeper::start(name, command, Duration::ZERO)),
                Part::Listens(at, namespace) => listens(at, &namespace)?,
            }
        }
        Ok(running)
    }
}

#[derive(Debug)]
enum Part {
    /// An agent.
    Node(Box<Node>),
    /// A program that should run for ever, and is started again when it ends, as a service manager does.
    Daemon(&'static str, Command),
    /// A program that ends and is run again at once.
    Loop(&'static str, Command),
    /// To be waited for, seen from the words of a namespace.
    Listens(SocketAddr, Vec<OsString>),
}

/// A contender at work; ended when dropped.
#[derive(Debug)]
pub struct Running {
    parts: Vec<Keeper>,
    nodes: Vec<Node>,
}

impl Running {
    /// Whether all of it still works.
    ///
    /// # Errors
    /// What does not.
    pub fn check(&mut self) -> anyhow::Result<()> {
        for node in &mut self.nodes {
            node.agent().assert_running();
        }
        self.parts.iter().try_for_each(Keeper::check)
    }

    /// Where the agent of the primary keeps its state, of Twinbox.
    #[must_use]
    pub fn state(&self) -> Option<&Path> {
        self.nodes.first().map(|node| node.state.as_path())
    }
}

/// Runs a program again and again.
#[derive(Debug)]
struct Keeper {
    stop: Arc<AtomicBool>,
    failed: Arc<Mutex<Option<String>>>,
    thread: Option<JoinHandle<()>>,
}

/// Ends in a row that are no accident.
const FAILURES: u32 = 200;

impl Keeper {
    fn start(name: &'static str, mut command: Command, pause: Duration) -> Self {
        let (stop, failed) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(None)));
        let (stopped, told) = (stop.clone(), failed.clone());
        let thread = std::thread::spawn(move || {
            let mut failures = 0;
            while !stopped.load(Ordering::Acquire) && failures < FAILURES {
                let mut child = match command.spawn() {
                    Ok(child) => child,
                    Err(error) => {
                        *told.lock().expect("no panics while locked") = Some(format!("{name}: {error}"));
                        return;
                    }
                };
                let status = loop {
                    if stopped.load(Ordering::Acquire) {
                        let _ = child.kill();
                    }
                    if let Ok(Some(status)) = child.try_wait() {
                        break status;
                    }
                    nap(Duration::from_millis(1));
                };
                // 24: files went while they were copied, which is what a mail store does.
                let fine = status.success() || status.code() == Some(24) || status.signal().is_some();
                failures = if fine { 0 } else { failures + 1 };
                nap(if fine { pause } else { pause.max(Duration::from_millis(20)) });
            }
            if failures >= FAILURES {
                *told.lock().expect("no panics while locked") = Some(format!("{name} fails again and again"));
            }
        });
        Self { stop, failed, thread: Some(thread) }
    }

    fn check(&self) -> anyhow::Result<()> {
        match &*self.failed.lock().expect("no panics while locked") {
            Some(why) => bail!("{why}"),
            None => Ok(()),
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn words<S: Into<OsString>>(all: impl IntoIterator<Item = S>) -> Vec<OsString> {
    all.into_iter().map(Into::into).collect()
}

fn with_slash(dir: &Path) -> OsString {
    let mut text = dir.as_os_str().to_owned();
    text.push("/");
    text
}

/// Waits until something listens at an address of a namespace.
fn listens(at: SocketAddr, namespace: &[OsString]) -> anyhow::Result<()> {
    let began = Instant::now();
    let port = format!(":{}", at.port());
    loop {
        let mut command = Command::new(&namespace[0]);
        let out = command.args(&namespace[1..]).args(["ss", "-Hltn"]).output().context("`ss` (iproute2) must be installed")?;
        if String::from_utf8_lossy(&out.stdout).split_whitespace().any(|word| word.ends_with(&port)) {
            return Ok(());
        }
        ensure!(began.elapsed() < Duration::from_secs(30), "nothing listens at {at}");
        nap(Duration::from_millis(20));
    }
}

fn twinbox(arena: &Arena) -> anyhow::Result<Ready> {
    let at = |end| SocketAddr::new(arena.address(end), TWINBOX_PORT);
    let primary =
        Spec { node: "alpha", role: "primary", mirror: "mail", root: &arena.source, layout: Layout::Maildir, listen: at(End::Primary) };
    let standby = Spec { node: "beta", role: "standby", root: &arena.replica, listen: at(End::Standby), ..primary.clone() };
    let program = |end| Program::under(arena.prefix(end));
    let primary = Node::init(program(End::Primary), &arena.dir().join("alpha"), &primary);
    let standby = Node::init(program(End::Standby), &arena.dir().join("beta"), &standby);
    pair(&primary, &standby);
    Ok(Ready(vec![Part::Node(Box::new(primary)), Part::Node(Box::new(standby))]))
}

/// The daemon that `rsync` and `lsyncd` send to.
fn rsync_daemon(arena: &Arena) -> anyhow::Result<[Part; 2]> {
    let config = arena.dir().join("rsyncd.conf");
    let replica = arena.replica.display();
    fs::write(&config, format!("use chroot = no\nuid = root\ngid = root\n[replica]\npath = {replica}\nread only = no\n"))?;
    let at = SocketAddr::new(arena.address(End::Standby), RSYNC_PORT);
    let mut all = words(["rsync", "--daemon", "--no-detach", "--port", &RSYNC_PORT.to_string(), "--config"]);
    all.push(config.into());
    let daemon = arena.command(End::Standby, "rsyncd", &all)?;
    Ok([Part::Daemon("rsync --daemon", daemon), Part::Listens(at, arena.cable.b.prefix())])
}

fn rsync_url(arena: &Arena) -> String {
    format!("rsync://{}:{RSYNC_PORT}/replica/", arena.address(End::Standby))
}

fn rsync(arena: &Arena) -> anyhow::Result<Ready> {
    let mut all = words(["rsync", "-a", "--delete", "--modify-window=-1", "--exclude=/*/tmp/*"]);
    all.extend([with_slash(&arena.source), rsync_url(arena).into()]);
    let again = arena.command(End::Primary, "rsync", &all)?;
    let [daemon, listens] = rsync_daemon(arena)?;
    Ok(Ready(vec![daemon, listens, Part::Loop("rsync", again)]))
}

fn lsyncd(arena: &Arena) -> anyhow::Result<Ready> {
    let config = arena.dir().join("lsyncd.lua");
    let (source, url) = (arena.source.display(), rsync_url(arena));
    let status = arena.dir().join("lsyncd.status");
    let text = format!(
        "settings {{ nodaemon = true, insist = true, statusFile = \"{}\" }}\n\
         sync {{ default.rsync, source = \"{source}\", target = \"{url}\", delay = 0, exclude = {{ \"/*/tmp/*\" }},\n\
         \x20 rsync = {{ archive = true, _extra = {{ \"--modify-window=-1\" }} }} }}\n",
        status.display()
    );
    fs::write(&config, text)?;
    let mut all = words(["lsyncd"]);
    all.push(config.into());
    let lsyncd = arena.command(End::Primary, "lsyncd", &all)?;
    let [daemon, listens] = rsync_daemon(arena)?;
    Ok(Ready(vec![daemon, listens, Part::Daemon("lsyncd", lsyncd)]))
}

fn unison(arena: &Arena) -> anyhow::Result<Ready> {
    let at = SocketAddr::new(arena.address(End::Standby), UNISON_PORT);
    let server = words(["env".into(), format!("UNISON={}", arena.dir().join("unison-b").display()), "unison".into()]);
    let server = [server, words(["-socket", &UNISON_PORT.to_string()])].concat();
    let remote = format!("socket://{at}/{}", arena.replica.display());
    let client = words(["env".into(), format!("UNISON={}", arena.dir().join("unison-a").display()), "unison".into()]);
    let options = ["-batch", "-auto", "-times", "-owner", "-group", "-confirmbigdel=false", "-ignore", "Path */tmp/*", "-repeat", "1"];
    let client = [client, words([arena.source.clone().into_os_string(), remote.into()]), words(options)].concat();
    Ok(Ready(vec![
        Part::Daemon("unison -socket", arena.command(End::Standby, "unison-b", &server)?),
        Part::Listens(at, arena.cable.b.prefix()),
        Part::Daemon("unison", arena.command(End::Primary, "unison-a", &client)?),
    ]))
}

fn syncthing(arena: &Arena) -> anyhow::Result<Ready> {
    let home = |end: End| arena.dir().join(if end == End::Primary { "syncthing-a" } else { "syncthing-b" });
    let run = |end: End, args: &[&str]| -> anyhow::Result<String> {
        let out = Command::new("syncthing").args(args).arg("--home").arg(home(end)).env("HOME", arena.dir()).output()?;
        ensure!(out.status.success(), "syncthing {}: {}", args.join(" "), String::from_utf8_lossy(&out.stderr));
        Ok(String::from_utf8_lossy(&out.stdout).trim().to_owned())
    };
    let mut ids = vec![];
    for end in [End::Primary, End::Standby] {
        run(end, &["generate"])?;
        ids.push(run(end, &["--device-id"])?);
    }
    let at = |end| format!("tcp://{}:{SYNCTHING_PORT}", arena.address(end));
    for (end, root, kind) in [(End::Primary, &arena.source, "sendonly"), (End::Standby, &arena.replica, "receiveonly")] {
        fs::create_dir_all(root.join(".stfolder"))?;
        fs::write(root.join(".stignore"), "/*/tmp/*\n")?;
        let devices = [(&ids[0], End::Primary), (&ids[1], End::Standby)];
        let device = |(id, end): &(&String, End)| {
            format!("<device id=\"{id}\" name=\"{end:?}\" compression=\"always\"><address>{}</address></device>", at(*end))
        };
        let members: String = ids.iter().map(|id| format!("<device id=\"{id}\"></device>")).collect();
        let text = SYNCTHING
            .replace("@path@", &root.display().to_string())
            .replace("@kind@", kind)
            .replace("@members@", &members)
            .replace("@devices@", &devices.iter().map(device).collect::<String>())
            .replace("@listen@", &at(end));
        fs::write(home(end).join("config.xml"), text)?;
    }
    let mut parts = vec![];
    for (end, name) in [(End::Standby, "syncthing-b"), (End::Primary, "syncthing-a")] {
        let mut all = words(["syncthing", "--no-browser", "--no-restart", "--home"]);
        all.push(home(end).into());
        parts.push(Part::Daemon("syncthing", arena.command(end, name, &all)?));
    }
    Ok(Ready(parts))
}

/// No discovery, no relays, no web page; the shortest delay of its watcher (1 s).
const SYNCTHING: &str = r#"<configuration version="35">
<folder id="mail" label="mail" path="@path@" type="@kind@" rescanIntervalS="3600" fsWatcherEnabled="true" fsWatcherDelayS="1" ignorePerms="false" autoNormalize="false">
<filesystemType>basic</filesystemType>@members@<minDiskFree unit="%">0</minDiskFree><markerName>.stfolder</markerName>
</folder>
@devices@
<gui enabled="false"></gui>
<options><listenAddress>@listen@</listenAddress><globalAnnounceEnabled>false</globalAnnounceEnabled><localAnnounceEnabled>false</localAnnounceEnabled>
<relaysEnabled>false</relaysEnabled><natEnabled>false</natEnabled><urAccepted>-1</urAccepted><autoUpgradeIntervalH>0</autoUpgradeIntervalH>
<crashReportingEnabled>false</crashReportingEnabled><startBrowser>false</startBrowser><setLowPriority>false</setLowPriority></options>
</configuration>
"#;
