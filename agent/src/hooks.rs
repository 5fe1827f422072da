//! Programs of the operator that are run when roles change and when protection does: start and stop a mail server, take an address, tell somebody.
//!
//! A hook gets no arguments and no input; what it has to know is in its environment. Its output goes to the log, line by line. One that does not end in time is killed, with everything it started.
//! Does not decide what a failure means: that is the caller's.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::Command;
use tokio::time::timeout;

/// How long a hook may take when it is not configured.
pub const TIMEOUT: Duration = Duration::from_secs(60);
/// Lines of output that are logged; the rest is read and dropped.
const LINES_MAX: usize = 200;
/// Bytes of a line that are logged.
const LINE_MAX: usize = 500;

/// When a hook is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Hook {
    /// Before this node becomes primary: fails, and it does not.
    PrePromote,
    /// This node is primary.
    PostPromote,
    /// Before this node stops being primary: stops the mail server. Fails, and it stays primary, unless another one is already.
    PreDemote,
    /// This node is primary no more.
    PostDemote,
    /// For some seconds no standby has followed.
    OnUnprotected,
    /// A standby follows (again).
    OnProtected,
    /// Two nodes went on apart.
    OnDiverged,
    /// Changes do not get on.
    OnStall,
    /// A node that comes back has mail that only this node's mail server can take in.
    Merge,
}

impl Hook {
    /// All, in the order they are explained.
    pub const ALL: [Hook; 9] = [
        Hook::PrePromote,
        Hook::PostPromote,
        Hook::PreDemote,
        Hook::PostDemote,
        Hook::OnUnprotected,
        Hook::OnProtected,
        Hook::OnDiverged,
        Hook::OnStall,
        Hook::Merge,
    ];

    /// Its key in `[hooks]`, and `TWINBOX_HOOK`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Hook::PrePromote => "pre_promote",
            Hook::PostPromote => "post_promote",
            Hook::PreDemote => "pre_demote",
            Hook::PostDemote => "post_demote",
            Hook::OnUnprotected => "on_unprotected",
            Hook::OnProtected => "on_protected",
            Hook::OnDiverged => "on_diverged",
            Hook::OnStall => "on_stall",
            Hook::Merge => "merge",
        }
    }
}

/// `[hooks]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hooks {
    /// Absolute paths of programs.
    pub programs: BTreeMap<Hook, PathBuf>,
    /// How long each may take.
    pub timeout: Duration,
}

impl Default for Hooks {
    fn default() -> Self {
        Hooks { programs: BTreeMap::new(), timeout: TIMEOUT }
    }
}

/// What a hook is told.
#[derive(Debug, Clone, Default)]
pub struct About {
    /// `TWINBOX_NODE`.
    pub node: String,
    /// `TWINBOX_MIRROR`.
    pub mirror: String,
    /// `TWINBOX_ROOT`.
    pub root: PathBuf,
    /// `TWINBOX_ROLE`: before it changes, in a `pre_…` hook.
    pub role: String,
    /// `TWINBOX_REASON`, one line for people.
    pub reason: String,
}

/// Why a hook counts as failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HookError {
    /// It could not be run.
    #[error("hook {hook} ({program}) cannot be run: {source}", program = program.display())]
    Start {
        /// Which.
        hook: &'static str,
        /// Its program.
        program: PathBuf,
        /// The system's words.
        source: std::io::Error,
    },
    /// It ended otherwise than with 0.
    #[error("hook {hook} ({program}) ended with {status}; its output is in the log", program = program.display())]
    Failed {
        /// Which.
        hook: &'static str,
        /// Its program.
        program: PathBuf,
        /// How.
        status: std::process::ExitStatus,
    },
    /// It did not end.
    #[error("hook {hook} ({program}) did not end within {} s and was killed", limit.as_secs(), program = program.display())]
    TooLong {
        /// Which.
        hook: &'static str,
        /// Its program.
        program: PathBuf,
        /// How long it may take.
        limit: Duration,
    },
}

impl Hooks {
    /// Runs a hook to its end; nothing when none is configured.
    ///
    /// # Errors
    /// [`HookError`].
    pub async fn run(&self, hook: Hook, about: &About) -> Result<(), HookError> {
        let Some(program) = self.programs.get(&hook) else { return Ok(()) };
        let environment = [
            ("TWINBOX_NODE", about.node.as_str().into()),
            ("TWINBOX_MIRROR", about.mirror.as_str().into()),
            ("TWINBOX_ROOT", about.root.as_os_str().to_owned()),
            ("TWINBOX_ROLE", about.role.as_str().into()),
            ("TWINBOX_REASON", about.reason.as_str().into()),
        ];
        Tool { program: program.clone(), timeout: self.timeout }.run(hook, &environment).await
    }

    /// The program of a hook that is told more than others.
    #[must_use]
    pub fn tool(&self, hook: Hook) -> Option<Tool> {
        Some(Tool { program: self.programs.get(&hook)?.clone(), timeout: self.timeout })
    }
}

/// A program, and how long it may take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tool {
    program: PathBuf,
    timeout: Duration,
}

impl Tool {
    /// Runs it to its end.
    ///
    /// # Errors
    /// [`HookError`].
    pub async fn run(&self, hook: Hook, environment: &[(&str, OsString)]) -> Result<(), HookError> {
        let (name, program, owned) = (hook.as_str(), &self.program, self.program.clone());
        // One for each message of a resync would hide the rest.
        let often = hook == Hook::Merge;
        if !often {
            tracing::info!(hook = name, program = %program.display(), "hook begins");
        }
        let mut child = command(program, name, environment).spawn().map_err(|source| HookError::Start {
            hook: name,
            program: owned.clone(),
            source,
        })?;
        let group = child.id();
        let output =
            [child.stdout.take().map(|out| tokio::spawn(log(name, out))), child.stderr.take().map(|out| tokio::spawn(log(name, out)))];
        let ended = timeout(self.timeout, child.wait()).await;
        if ended.is_err() {
            kill(group);
            let _ = child.wait().await;
        }
        for task in output.into_iter().flatten() {
            // What it started in the background may hold its output open.
            if timeout(Duration::from_secs(1), task).await.is_err() {
                tracing::debug!(hook = name, "something it started goes on");
            }
        }
        match ended {
            Err(_) => Err(HookError::TooLong { hook: name, program: owned, limit: self.timeout }),
            Ok(Err(source)) => Err(HookError::Start { hook: name, program: owned, source }),
            Ok(Ok(status)) if status.success() => {
                if !often {
                    tracing::info!(hook = name, "hook is through");
                }
                Ok(())
            }
            Ok(Ok(status)) => Err(HookError::Failed { hook: name, program: owned, status }),
        }
    }
}

fn command(program: &Path, hook: &str, environment: &[(&str, OsString)]) -> Command {
    let mut command = Command::new(program);
    command
        .env("TWINBOX_HOOK", hook)
        .envs(environment.iter().map(|(name, value)| (name, value)))
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0);
    command
}

/// Ends a process group.
fn kill(leader: Option<u32>) {
    let leader = leader.and_then(|id| rustix::process::Pid::from_raw(i32::try_from(id).ok()?));
    if let Some(leader) = leader {
        let _ = rustix::process::kill_process_group(leader, rustix::process::Signal::KILL); // Gone already is fine.
    }
}

async fn log(hook: &'static str, mut out: impl AsyncRead + Unpin) {
    let (mut buffer, mut line, mut told) = (vec![0; 4096], vec![], 0);
    let mut tell = |line: &mut Vec<u8>| {
        told += 1;
        if told <= LINES_MAX && !line.is_empty() {
            let line: String = String::from_utf8_lossy(line).chars().filter(|c| !c.is_control()).collect();
            tracing::info!(hook, "{line}");
        }
        line.clear();
    };
    while let Ok(got @ 1..) = out.read(&mut buffer).await {
        for byte in &buffer[..got] {
            match byte {
                b'\n' => tell(&mut line),
                _ if line.len() < LINE_MAX => line.push(*byte),
                _ => {}
            }
        }
    }
    tell(&mut line);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn hooks(dir: &Path, script: &str, limit: Duration) -> Hooks {
        let program = dir.join("hook");
        std::fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        Hooks { programs: [(Hook::PreDemote, program)].into(), timeout: limit }
    }

    fn about() -> About {
        About { node: "alpha".into(), mirror: "mail".into(), root: "/srv/mail".into(), role: "primary".into(), reason: "why not".into() }
    }

    #[tokio::test]
    async fn a_hook_is_told_and_its_end_counts() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let script = format!("env | grep ^TWINBOX_ | sort > {}; exit $((1 - 1))", out.display());
        hooks(dir.path(), &script, TIMEOUT).run(Hook::PreDemote, &about()).await.unwrap();
        let told = std::fs::read_to_string(&out).unwrap();
        let expected = "TWINBOX_HOOK=pre_demote\nTWINBOX_MIRROR=mail\nTWINBOX_NODE=alpha\nTWINBOX_REASON=why not\nTWINBOX_ROLE=primary\nTWINBOX_ROOT=/srv/mail\n";
        assert_eq!(told, expected);
        let failed = hooks(dir.path(), "echo no; exit 3", TIMEOUT).run(Hook::PreDemote, &about()).await;
        assert!(matches!(failed, Err(HookError::Failed { status, .. }) if status.code() == Some(3)));
        assert!(hooks(dir.path(), "exit 3", TIMEOUT).run(Hook::PostDemote, &about()).await.is_ok(), "none is configured");
    }

    #[tokio::test]
    async fn one_that_does_not_end_is_killed_with_what_it_started() {
        let dir = tempfile::tempdir().unwrap();
        let pid = dir.path().join("pid");
        let script = format!("sleep 1000 & echo $! > {}; wait", pid.display());
        let failed = hooks(dir.path(), &script, Duration::from_millis(500)).run(Hook::PreDemote, &about()).await;
        assert!(matches!(failed, Err(HookError::TooLong { .. })));
        let child: u32 = std::fs::read_to_string(&pid).unwrap().trim().parse().unwrap();
        // It was sent the signal; how soon it dies of it is the kernel's.
        let state = || std::fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
        let end = std::time::Instant::now() + Duration::from_secs(10);
        while !(state().is_empty() || state().contains(") Z ")) {
            assert!(std::time::Instant::now() < end, "{}", state());
            tokio::time::sleep_until(tokio::time::Instant::now() + Duration::from_millis(5)).await;
        }
    }
}
