//! The product's binary as processes: found or built, started, signalled by id, its output kept in files.
//!
//! `TWINBOX_BIN` names another binary. A process still running when its [`Process`] is dropped is killed; when the test is
//! failing, the ends of its outputs are printed first.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::gate::{wait_for, wait_until};
use crate::netns::Namespace;

/// How long a command that should end by itself may take before it counts as hanging.
pub const COMMAND_LIMIT: Duration = Duration::from_secs(60);

/// How long a draining stop may take.
pub const STOP_LIMIT: Duration = Duration::from_secs(60);

/// How much of each output a failing test prints.
const TAIL: usize = 4000;

/// A way to run the product: which binary, and inside what.
#[derive(Debug, Clone)]
pub struct Program {
    prefix: Vec<OsString>,
    binary: PathBuf,
}

impl Default for Program {
    fn default() -> Self {
        Self::here()
    }
}

impl Program {
    /// The binary under test, run as the test runs.
    #[must_use]
    pub fn here() -> Self {
        Self { prefix: Vec::new(), binary: binary().to_owned() }
    }

    /// Run inside a network namespace.
    #[must_use]
    pub fn within(namespace: &Namespace) -> Self {
        Self { prefix: namespace.prefix(), ..Self::here() }
    }

    /// Run as an ordinary user, with a copy of the binary in `dir` so that this user can reach it.
    #[must_use]
    pub fn as_user(uid: u32, dir: &Path) -> Self {
        let copy = dir.join("twinbox-copy");
        std::fs::copy(binary(), &copy).expect("copy the binary");
        let mut prefix: Vec<OsString> = vec!["setpriv".into(), "--clear-groups".into()];
        prefix.extend(["--reuid".into(), uid.to_string().into()]);
        prefix.extend(["--regid".into(), uid.to_string().into(), "--".into()]);
        Self { prefix, binary: copy }
    }

    /// Run by another program (`sh -c …`, `unshare …`), whose arguments end where the binary begins.
    #[must_use]
    pub fn under<S: Into<OsString>>(prefix: impl IntoIterator<Item = S>) -> Self {
        Self { prefix: prefix.into_iter().map(Into::into).collect(), ..Self::here() }
    }

    /// Run with a variable in its environment.
    #[must_use]
    pub fn under_env(name: &str, value: &Path) -> Self {
        let mut setting = OsString::from(name);
        setting.push("=");
        setting.push(value);
        Self::under(["env".into(), setting])
    }

    fn command(&self) -> Command {
        let mut words = self.prefix.iter().cloned().chain([self.binary.clone().into_os_string()]);
        let mut command = Command::new(words.next().expect("at least the binary"));
        command.args(words).stdin(Stdio::null());
        command
    }

    /// Starts the product; outputs go to files in `logs` named after `name`.
    pub fn spawn<S: AsRef<OsStr>>(&self, name: &str, logs: &Path, args: impl IntoIterator<Item = S>) -> Process {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let out = logs.join(format!("{name}-{n}.out"));
        let err = logs.join(format!("{name}-{n}.err"));
        let child = self
            .command()
            .args(args)
            .env("RUST_BACKTRACE", "1")
            .stdout(File::create(&out).expect("log file"))
            .stderr(File::create(&err).expect("log file"))
            .spawn()
            .unwrap_or_else(|e| panic!("start {}: {e}", self.binary.display()));
        Process { name: name.to_owned(), child, ended: None, out, err }
    }

    /// Runs the product to its end, bounded by [`COMMAND_LIMIT`].
    pub fn run<S: AsRef<OsStr>>(&self, name: &str, logs: &Path, args: impl IntoIterator<Item = S>) -> Ended {
        self.spawn(name, logs, args).end(COMMAND_LIMIT)
    }
}

/// What a finished process left.
#[derive(Debug, Clone)]
pub struct Ended {
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Ended {
    /// Panics with the outputs unless the exit code was 0.
    #[track_caller]
    pub fn ok(self, what: &str) -> Self {
        assert!(self.status.success(), "{what}: {self}");
        self
    }

    /// Whether it panicked, by its outputs or by the code a Rust panic gives.
    #[must_use]
    pub fn panicked(&self) -> bool {
        self.status.code() == Some(101) || self.stderr.contains("panicked at") || self.stdout.contains("panicked at")
    }
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}\n--- stdout\n{}\n--- stderr\n{}", self.status, self.stdout, self.stderr)
    }
}

/// A running process of the product.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    ended: Option<ExitStatus>,
    out: PathBuf,
    err: PathBuf,
}

impl Process {
    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its standard output so far.
    #[must_use]
    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.out).unwrap_or_default()).into_owned()
    }

    /// Its standard error so far.
    #[must_use]
    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.err).unwrap_or_default()).into_owned()
    }

    /// How it ended, if it has.
    pub fn try_wait(&mut self) -> Option<ExitStatus> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().expect("wait for a child");
        }
        self.ended
    }

    /// Panics with the outputs if it has ended.
    #[track_caller]
    pub fn assert_running(&mut self) {
        if let Some(status) = self.try_wait() {
            panic!("{} ended by itself: {status}\n{}", self.name, self.tails());
        }
    }

    /// Sends a signal, unless it has ended.
    pub fn signal(&mut self, signal: Signal) {
        if self.try_wait().is_none() {
            let pid = Pid::from_child(&self.child);
            kill_process(pid, signal).expect("signal a child");
        }
    }

    /// Ctrl-C.
    pub fn interrupt(&mut self) {
        self.signal(Signal::INT);
    }

    /// SIGTERM.
    pub fn terminate(&mut self) {
        self.signal(Signal::TERM);
    }

    /// SIGKILL, and waits for its end.
    pub fn kill9(&mut self) {
        self.signal(Signal::KILL);
        if self.ended.is_none() {
            self.ended = Some(self.child.wait().expect("wait for a child"));
        }
    }

    /// Waits for its end; on giving up, kills it and panics.
    pub fn end(mut self, limit: Duration) -> Ended {
        self.wait(limit);
        Ended { status: self.ended.expect("waited for"), stdout: self.stdout(), stderr: self.stderr() }
    }

    /// Waits for its end.
    pub fn wait(&mut self, limit: Duration) -> ExitStatus {
        let what = format!("the end of {} (pid {})", self.name, self.pid());
        wait_for(limit, &what, || self.try_wait())
    }

    /// Waits until its outputs satisfy `found`; panics if it ends before.
    pub fn wait_output<T>(&mut self, limit: Duration, what: &str, mut found: impl FnMut(&str) -> Option<T>) -> T {
        wait_for(limit, what, || {
            let ended = self.try_wait();
            let hit = found(&self.stdout()).or_else(|| found(&self.stderr()));
            if let (None, Some(status)) = (&hit, ended) {
                panic!("{} ended ({status}) before {what}\n{}", self.name, self.tails());
            }
            hit
        })
    }

    /// Waits until it has been running and is gone, or its outputs contain `text`.
    pub fn wait_text(&mut self, limit: Duration, text: &str) {
        let mut seen = false;
        wait_until(limit, &format!("{text:?} from {}", self.name), || {
            seen |= self.stdout().contains(text) || self.stderr().contains(text);
            seen
        });
    }

    /// The ends of both outputs.
    #[must_use]
    pub fn tails(&self) -> String {
        let tail = |text: String| {
            let mut from = text.len().saturating_sub(TAIL);
            while !text.is_char_boundary(from) {
                from += 1;
            }
            text[from..].to_owned()
        };
        let (out, err) = (tail(self.stdout()), tail(self.stderr()));
        format!("--- {} stdout\n{out}\n--- {} stderr\n{err}", self.name, self.name)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.tails());
        }
        self.kill9();
    }
}

/// Whether the process was ended by a signal rather than by itself.
#[must_use]
pub fn by_signal(status: ExitStatus) -> bool {
    status.signal().is_some()
}

/// The binary under test: `TWINBOX_BIN`, else the one beside the running test, brought up to date once a process.
fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        if let Some(given) = std::env::var_os("TWINBOX_BIN") {
            return given.into();
        }
        // target/<profile>/deps/<test>, or target/<profile>/<program>
        let own = std::env::current_exe().expect("own path");
        let mut dir = own.parent().expect("a directory").to_owned();
        if dir.ends_with("deps") {
            dir.pop();
        }
        let profile = if dir.ends_with("release") { "release" } else { "dev" };
        let target = dir.parent().expect("a target directory");
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let built = Command::new(cargo)
            .args(["build", "--quiet", "-p", "twinbox", "--bin", "twinbox", "--profile", profile])
            .arg("--target-dir")
            .arg(target)
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .status()
            .is_ok_and(|s| s.success());
        let binary = dir.join("twinbox");
        assert!(built && binary.exists(), "cannot build {}", binary.display());
        binary
    })
}
