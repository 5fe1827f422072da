//! Every exit code of `twinbox`, in one place: the numbers are an interface that scripts rely on, so they never change meaning.
//!
//! Does not decide which error maps to which code; that is done where the error is understood.

use std::fmt;
use std::process;

/// How a run of `twinbox` ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
#[non_exhaustive]
pub enum ExitCode {
    /// Done; with `--once`: in sync; with `compare`: identical.
    Ok = 0,
    /// A failure without a code of its own.
    Failure = 1,
    /// The command line was wrong.
    Usage = 2,
    /// The configuration file is missing or wrong.
    Config = 3,
    /// A root or state directory is unusable.
    BadPath = 4,
    /// The state database is damaged, newer, or another store's.
    State = 5,
    /// The listen address is unusable.
    Listen = 6,
    /// No agent answers.
    NoAgent = 7,
    /// The peer refused, or pairing failed.
    Peer = 8,
    /// Both sides are not the same.
    Differs = 9,
    /// Disk full, or a read or write failed.
    Io = 10,
    /// The kernel's limit on watches was reached.
    Watches = 11,
    /// Permission denied.
    Permission = 12,
    /// A fence had to wait longer than allowed.
    NotInTime = 13,
    /// A fence was asked for while no standby follows.
    Unprotected = 14,
    /// After a power cut, what this disk lacks is not known: the standby does not answer.
    Unhealed = 15,
    /// A change of role would lose something, or is not possible now.
    Refused = 16,
    /// Stopped by Ctrl-C before the job was done.
    Interrupted = 130,
}

impl ExitCode {
    /// Every code, ascending.
    pub const ALL: [ExitCode; 18] = [
        ExitCode::Ok,
        ExitCode::Failure,
        ExitCode::Usage,
        ExitCode::Config,
        ExitCode::BadPath,
        ExitCode::State,
        ExitCode::Listen,
        ExitCode::NoAgent,
        ExitCode::Peer,
        ExitCode::Differs,
        ExitCode::Io,
        ExitCode::Watches,
        ExitCode::Permission,
        ExitCode::NotInTime,
        ExitCode::Unprotected,
        ExitCode::Unhealed,
        ExitCode::Refused,
        ExitCode::Interrupted,
    ];

    /// The number the process ends with.
    #[must_use]
    pub fn code(self) -> u8 {
        self as u8
    }

    /// What it means and what to do, in one line.
    #[must_use]
    pub fn meaning(self) -> &'static str {
        match self {
            ExitCode::Ok => "done (--once: in sync; compare: identical)",
            ExitCode::Failure => "unexpected failure; the message says what happened",
            ExitCode::Usage => "wrong command line; see --help",
            ExitCode::Config => "configuration file missing or wrong; the message names the line",
            ExitCode::BadPath => "root or state directory missing, nested, not a directory, or not this mirror's replica",
            ExitCode::State => "state database damaged, written by a newer version, or belonging to another store",
            ExitCode::Listen => "cannot listen: address in use or not on this machine",
            ExitCode::NoAgent => "no agent is running for this configuration, or it does not answer",
            ExitCode::Peer => "the peer refused us, does not answer, or the pairing code was wrong, used or expired",
            ExitCode::Differs => "the two sides differ or are not in sync",
            ExitCode::Io => "disk full or an I/O error; nothing acknowledged is lost",
            ExitCode::Watches => "limit on inotify watches reached; the message names the sysctl and the number needed",
            ExitCode::Permission => "permission denied",
            ExitCode::NotInTime => "the fence was not through in time; the changes still travel",
            ExitCode::Unprotected => "no standby follows: what changes now exists once",
            ExitCode::Unhealed => "after a power cut this disk may lack mail that no standby could name or give back",
            ExitCode::Refused => "refused: it would lose something, or cannot be; the message says why",
            ExitCode::Interrupted => "interrupted by Ctrl-C before the job was done",
        }
    }

    /// The table shown in the long help.
    #[must_use]
    pub fn table() -> String {
        let rows: Vec<String> = Self::ALL.iter().map(|code| format!("  {code}")).collect();
        format!("Exit codes:\n{}", rows.join("\n"))
    }

    /// One line per given code, for the help of a command that ends with only these.
    #[must_use]
    pub fn lines(codes: &[ExitCode]) -> String {
        let rows: Vec<String> = codes.iter().map(|code| format!("  {code}")).collect();
        format!("Exit codes (all: `twinbox --help`):\n{}", rows.join("\n"))
    }
}

/// `130  interrupted by …`
impl fmt::Display for ExitCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>3}  {}", self.code(), self.meaning())
    }
}

impl From<ExitCode> for process::ExitCode {
    fn from(code: ExitCode) -> Self {
        process::ExitCode::from(code.code())
    }
}

#[cfg(test)]
mod tests {
    use super::ExitCode;

    #[test]
    fn the_numbers_are_an_interface() {
        let numbers: Vec<u8> = ExitCode::ALL.map(ExitCode::code).to_vec();
        assert_eq!(numbers, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 130]);
        let table = ExitCode::table();
        assert_eq!(table.lines().count(), 1 + ExitCode::ALL.len());
        assert!(table.contains("  9  the two sides differ"), "{table}");
    }
}
