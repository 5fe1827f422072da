//! Talking to a running agent: a Unix socket in its state directory, one line a request, one line an answer.
//!
//! Invariants:
//! - Who holds the lock of a state directory ([`StateLock`]) is the only agent on it; the socket is touched under that lock
//!   only, and removed only when nobody answers on it.
//! - The socket is never, not even for an instant, open to other users: its mode is set before it has a name.
//! - Clients cannot hurt the agent: lines, number of clients and waiting times are bounded.
//!
//! The protocol is described in `docs/admin-protocol.md`. Does not know what the answers mean.

mod client;
mod lock;
pub mod request;
mod server;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

pub use client::{request, status};
pub use lock::StateLock;
pub use request::{Fence, Request, Rescued, Resync, Switch, Verify};
pub use server::{AdminServer, FenceServer};

use crate::exit::ExitCode;

/// Name of the socket in the state directory.
pub const SOCKET: &str = "admin.sock";

/// Longest request line, with its newline: some paths of the greatest length, percent-encoded.
pub const REQUEST_BYTES_MAX: usize = 64 * 1024;
/// Longest answer a client accepts: a status of [`crate::config::TABLES_MAX`] mirrors has some hundred KiB.
pub const RESPONSE_BYTES_MAX: usize = 16 << 20;
/// Clients served at once; further ones wait in the kernel's queue. Each delivery of a busy server may wait for a fence of its own, at some KiB each.
pub const CLIENTS_MAX: usize = 4096;
/// How long a client may take to send the rest of a request, or to take its answer.
pub const CLIENT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a client may stay connected without a request: a mail server keeps its connection.
pub const CLIENT_IDLE: Duration = Duration::from_secs(600);

/// What an agent answers.
#[derive(Debug, Clone, PartialEq)]
pub enum Response {
    /// Done; the result.
    Ok(Value),
    /// Not done.
    Error {
        /// One word for programs, such as `unknown-command`.
        code: String,
        /// One line for people.
        message: String,
    },
}

impl Response {
    /// Done, with nothing to say.
    #[must_use]
    pub fn done() -> Self {
        Response::Ok(Value::Object(serde_json::Map::new()))
    }

    /// Not done.
    pub fn error(code: impl Into<String>, message: impl Into<String>) -> Self {
        Response::Error { code: code.into(), message: message.into() }
    }

    /// The answer line, with its newline. JSON holds no raw newline; those of an error message become spaces.
    #[must_use]
    pub fn to_line(&self) -> String {
        let single = |text: &str| text.replace(|c: char| c.is_control(), " ");
        match self {
            Response::Ok(value) => format!("OK {value}\n"),
            Response::Error { code, message } => {
                format!("ERR {} {}\n", single(code).replace(' ', "-"), single(message))
            }
        }
    }

    /// Reads an answer line without its newline; `None` if it is none.
    #[must_use]
    pub fn parse(line: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(line).ok()?;
        if let Some(json) = text.strip_prefix("OK ") {
            return serde_json::from_str(json).ok().map(Response::Ok);
        }
        let rest = text.strip_prefix("ERR ")?;
        let (code, message) = rest.split_once(' ').unwrap_or((rest, ""));
        Some(Response::error(code, message))
    }
}

/// Why an agent's socket could not be opened, or a request not be answered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdminError {
    /// Another agent works on this state directory.
    #[error("an agent{} already runs on the state directory {}", pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default(), state.display())]
    AlreadyRunning {
        /// The state directory.
        state: PathBuf,
        /// Its process id, if it wrote one.
        pid: Option<u32>,
    },
    /// Something that is no socket has the socket's name.
    #[error("{} is not a socket; move it away", path.display())]
    NotASocket {
        /// What stands in the way.
        path: PathBuf,
    },
    /// The state directory, its lock or its socket cannot be used.
    #[error("cannot use {}", path.display())]
    Unusable {
        /// Which one.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Nobody listens.
    #[error("no agent is running on the state directory {}", state.display())]
    NoAgent {
        /// The state directory.
        state: PathBuf,
    },
    /// Not allowed to ask.
    #[error("not allowed to reach the agent at {}; be root or the agent's user", path.display())]
    Forbidden {
        /// The socket.
        path: PathBuf,
    },
    /// No answer in time.
    #[error("the agent did not answer within {} s", after.as_secs_f32())]
    Timeout {
        /// How long was waited.
        after: Duration,
    },
    /// The connection failed, or the answer was none.
    #[error("the agent's answer was cut short or not understood")]
    BadAnswer,
    /// The agent answered with an error.
    #[error("the agent refused: {message} ({code})")]
    Refused {
        /// One word for programs.
        code: String,
        /// One line for people.
        message: String,
    },
}

impl AdminError {
    /// How a command that ends with this error exits.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        match self {
            AdminError::NoAgent { .. } | AdminError::Timeout { .. } | AdminError::BadAnswer => ExitCode::NoAgent,
            AdminError::Forbidden { .. } => ExitCode::Permission,
            AdminError::Refused { .. } => ExitCode::Failure,
            AdminError::AlreadyRunning { .. } | AdminError::NotASocket { .. } => ExitCode::BadPath,
            AdminError::Unusable { source, .. } => match source.kind() {
                io::ErrorKind::PermissionDenied => ExitCode::Permission,
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ExitCode::Io,
                _ => ExitCode::BadPath,
            },
        }
    }
}

/// The socket's address. A path too long for `sun_path` (108 bytes with its NUL, unix(7)) is reached through the opened
/// directory, which the caller keeps open while the address is in use.
fn socket_address(state: &Path, directory: &std::fs::File) -> PathBuf {
    use std::os::fd::AsRawFd;
    use std::os::unix::ffi::OsStrExt;

    const SUN_PATH_MAX: usize = 107;
    let path = state.join(SOCKET);
    if path.as_os_str().as_bytes().len() <= SUN_PATH_MAX {
        return path;
    }
    PathBuf::from(format!("/proc/self/fd/{}/{SOCKET}", directory.as_raw_fd()))
}

#[cfg(test)]
#[path = "admin_tests.rs"]
mod tests;
