//! How a command ends when it cannot do its work: one message for people and a documented exit code.
//!
//! Every error type of the agent that can end a command is sorted here, in one place.

use std::fmt;
use std::io;

use crate::admin::AdminError;
use crate::capture::CaptureError;
use crate::capture::watch::WatchError;
use crate::config::ConfigError;
use crate::exit::ExitCode;
use crate::heal::{HealError, RemoteError, WorkError};
use crate::net::{BindError, IdentityError};
use crate::roles::RoleError;
use crate::standby::StandbyError;
use twinbox_resync::schema::StateError;

/// The end of a command.
#[derive(Debug)]
pub struct Failure {
    /// Exit code.
    pub code: ExitCode,
    /// What happened, where, and what to do.
    pub message: String,
}

impl Failure {
    /// A failure with this code and text.
    pub fn new(code: ExitCode, message: impl Into<String>) -> Self {
        Failure { code, message: message.into() }
    }

    /// An error of the system at a path.
    #[must_use]
    pub fn io(what: &str, error: &io::Error) -> Self {
        Failure::new(of_io(error), format!("{what}: {error}"))
    }
}

/// An error with its causes, each said once.
fn text(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

fn of_io(error: &io::Error) -> ExitCode {
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => ExitCode::BadPath,
        io::ErrorKind::PermissionDenied => ExitCode::Permission,
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::ReadOnlyFilesystem => ExitCode::Io,
        _ => ExitCode::Failure,
    }
}

fn of_state(error: &StateError) -> ExitCode {
    match error {
        StateError::Disk { .. } => ExitCode::Io,
        _ => ExitCode::State,
    }
}

fn of_capture(error: &CaptureError) -> ExitCode {
    match error {
        CaptureError::Root { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => ExitCode::Permission,
        CaptureError::Root { .. } | CaptureError::RootGone { .. } => ExitCode::BadPath,
        CaptureError::Watch(WatchError::Limit { .. } | WatchError::Instances { .. }) => ExitCode::Watches,
        CaptureError::State(error) => of_state(error),
        CaptureError::NotHealed {} | CaptureError::OlderState { .. } => ExitCode::Unhealed,
        CaptureError::Io(error) => of_io(error),
        _ => ExitCode::Failure,
    }
}

/// Sorts a standby's error.
fn of_standby(error: &StandbyError) -> ExitCode {
    match error {
        StandbyError::State { .. } | StandbyError::Redo { .. } => ExitCode::State,
        StandbyError::Root { detail, .. } if detail.contains("ermission denied") => ExitCode::Permission,
        StandbyError::Root { .. } | StandbyError::NotEmpty { .. } | StandbyError::Vanished { .. } | StandbyError::OtherRoot { .. } => {
            ExitCode::BadPath
        }
        _ => ExitCode::Io,
    }
}

impl From<RoleError> for Failure {
    fn from(error: RoleError) -> Self {
        let code = match &error {
            RoleError::Capture { source, .. } => of_capture(source),
            RoleError::Standby { source, .. } => of_standby(source),
            RoleError::State(error) => of_state(error),
            RoleError::Dir { source, .. } => of_io(source),
            RoleError::OtherRoot { .. } => ExitCode::BadPath,
            RoleError::OtherMachine { .. } => ExitCode::State,
            RoleError::Random(_) => ExitCode::Failure,
        };
        Failure::new(code, text(&error))
    }
}

impl From<HealError> for Failure {
    fn from(error: HealError) -> Self {
        let code = match error {
            HealError::Role(error) => return error.into(),
            HealError::NoStandby { .. } | HealError::Incomplete { .. } => ExitCode::Unhealed,
            HealError::Work { source: WorkError::Remote(RemoteError::Spool(_)), .. } => ExitCode::Io,
            HealError::Remote { .. } | HealError::Work { source: WorkError::Remote(_), .. } => ExitCode::Peer,
            HealError::State(ref error) | HealError::Work { source: WorkError::State(ref error), .. } => of_state(error),
            _ => ExitCode::Io,
        };
        Failure::new(code, text(&error))
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        Failure::new(error.exit_code(), text(&error))
    }
}

impl From<AdminError> for Failure {
    fn from(error: AdminError) -> Self {
        Failure::new(error.exit_code(), text(&error))
    }
}

impl From<IdentityError> for Failure {
    fn from(error: IdentityError) -> Self {
        let code = match &error {
            IdentityError::Io { source, .. } => of_io(source),
            _ => ExitCode::State,
        };
        Failure::new(code, text(&error))
    }
}

impl From<BindError> for Failure {
    fn from(error: BindError) -> Self {
        let code = match &error {
            BindError::InUse { .. } | BindError::NotLocal { .. } => ExitCode::Listen,
            _ => ExitCode::Failure,
        };
        Failure::new(code, text(&error))
    }
}

impl From<StateError> for Failure {
    fn from(error: StateError) -> Self {
        Failure::new(of_state(&error), text(&error))
    }
}
