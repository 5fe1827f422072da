//! What can be wrong with a configuration file, and how it is told: where, what, and what to write instead.

use std::fmt::{self, Write};
use std::io;
use std::ops::Range;
use std::path::PathBuf;

use super::{FILE_BYTES_MAX, TABLES_MAX};
use crate::duration::BadDuration;
use crate::exit::ExitCode;
use crate::glob::GlobError;
use crate::layout::UnknownLayout;
use crate::names::BadName;

/// Why there is no valid configuration.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// There is no such file.
    #[error("no configuration at {}; `twinbox init --config {}` writes one", path.display(), path.display())]
    NotFound {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// The file could not be read.
    #[error("cannot read the configuration {}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file could not be written.
    #[error("cannot write the configuration {}", path.display())]
    Unwritable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file is larger than [`FILE_BYTES_MAX`].
    #[error("the configuration {} is larger than {FILE_BYTES_MAX} bytes", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// The file is not text.
    #[error("{}:{line}: not UTF-8 text", path.display())]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// Line of the first bad byte, from 1.
        line: usize,
    },
    /// The file says something it cannot say. One line a problem.
    #[error("{}", problems.display(path.as_deref()))]
    Invalid {
        /// The file, if the text came from one.
        path: Option<PathBuf>,
        /// All that is wrong, in the order of the text.
        problems: Problems,
    },
    /// `init` found a file already there.
    #[error("{} exists already; `init` never overwrites a configuration", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// TOML is UTF-8 text and cannot name this path.
    #[error("the path {} is not UTF-8 and cannot stand in a configuration; reach it through a symlink", path.display())]
    PathNotUtf8 {
        /// The path.
        path: PathBuf,
    },
    /// The peer's table is written in a way that cannot be changed without rewriting the operator's text.
    #[error("cannot edit the existing text; please put this into it by hand:\n{block}")]
    CannotEdit {
        /// The `[[peer]]` block to write.
        block: String,
    },
}

impl ConfigError {
    /// How a command that ends with this error exits.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        match self {
            ConfigError::Unreadable { source, .. } | ConfigError::Unwritable { source, .. } => match source.kind() {
                io::ErrorKind::PermissionDenied => ExitCode::Permission,
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ExitCode::Io,
                _ => ExitCode::Config,
            },
            _ => ExitCode::Config,
        }
    }
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Line in the text, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
    /// What is wrong.
    pub kind: ProblemKind,
}

/// What is wrong with one place of the text. `table` is written as in the file: `[[mirror]]`, `[limits]`, `the top level`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum ProblemKind {
    #[error("not valid TOML: {message}")]
    Syntax { message: String },
    #[error("unknown key `{key}` in {table}{}", nearest.as_ref().map(|known| format!("; did you mean `{known}`?")).unwrap_or_default())]
    UnknownKey { key: String, table: &'static str, nearest: Option<&'static str> },
    #[error("{table} lacks `{key}`{}", hint)]
    MissingKey { key: &'static str, table: &'static str, hint: &'static str },
    #[error("`{key}` must be {expected}, not {found}")]
    WrongType { key: &'static str, expected: &'static str, found: &'static str },
    #[error("`{key}` must be one of {}, not `{given}`", allowed.join(", "))]
    NotOneOf { key: &'static str, given: String, allowed: &'static [&'static str] },
    #[error("`{key}` must be between {min} and {max}, not {given}")]
    OutOfRange { key: &'static str, given: String, min: String, max: String },
    #[error(transparent)]
    UnknownLayout(#[from] UnknownLayout),
    #[error(transparent)]
    Name(#[from] BadName),
    #[error("`{key}`: {source}")]
    Duration { key: &'static str, source: BadDuration },
    #[error("bad pattern `{pattern}`: {source}")]
    Pattern { pattern: String, source: GlobError },
    #[error("`{given}` is no address: write IP:PORT, as in `192.0.2.7:7440` or `[2001:db8::7]:7440`")]
    Address { given: String },
    #[error("`{key}` is an empty list")]
    EmptyList { key: &'static str },
    #[error("`fingerprint` is not what `twinbox pair` writes; remove the line and pair again")]
    Fingerprint,
    /// A group name that cannot be one.
    #[error("`group` is the name or the number of a group")]
    Group,
    #[error("`{key}` must be an absolute path without `.` or `..`, not `{}`", given.display())]
    RelativePath { key: &'static str, given: PathBuf },
    #[error("a second {what} is called `{name}`; the first is on line {first_line}")]
    Duplicate { what: &'static str, name: String, first_line: usize },
    #[error("more than {TABLES_MAX} {table} tables")]
    TooMany { table: &'static str },
    #[error("peer `{name}` has this node's own name; each node needs its own")]
    PeerIsSelf { name: String },
    #[error("the root of `{inner}` lies inside the root of `{outer}`; mirrors must not overlap")]
    RootInRoot { inner: String, outer: String },
    #[error("mirrors `{first}` and `{second}` have the same root")]
    SameRoot { first: String, second: String },
    #[error("the state directory lies inside the root of `{mirror}`; it would mirror itself. Move it outside")]
    StateInRoot { mirror: String },
    #[error("the root of `{mirror}` lies inside the state directory; move one of them")]
    RootInState { mirror: String },
}

/// A problem whose place is still a byte range of the text.
#[derive(Debug, Clone)]
pub(super) struct Located {
    pub(super) span: Range<usize>,
    pub(super) kind: ProblemKind,
}

/// All that is wrong with one text; at least one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problems(Vec<Problem>);

impl Problems {
    /// Turns byte ranges into lines and columns, in the order of the text.
    pub(super) fn locate(mut located: Vec<Located>, text: &str) -> Self {
        located.sort_by_key(|problem| problem.span.start);
        let problem = |Located { span, kind }| {
            let (line, column) = line_column(text, span.start);
            Problem { line, column, kind }
        };
        Problems(located.into_iter().map(problem).collect())
    }

    /// The problems, in the order of the text.
    #[must_use]
    pub fn as_slice(&self) -> &[Problem] {
        &self.0
    }

    fn display(&self, path: Option<&std::path::Path>) -> String {
        // A file that is wrong throughout should not scroll its first problem off the screen.
        const SHOWN_MAX: usize = 20;
        let place = path.map_or_else(|| "line ".to_owned(), |path| format!("{}:", path.display()));
        let mut lines: Vec<String> = self.0.iter().take(SHOWN_MAX).map(|problem| format!("{place}{problem}")).collect();
        if self.0.len() > SHOWN_MAX {
            lines.push(format!("… and {} more", self.0.len() - SHOWN_MAX));
        }
        lines.join("\n")
    }
}

/// `12:3: unknown key …`
///
/// Some kinds carry text of the file as it stands there. It is printed on a terminal: what could steer one is escaped here, for all of
/// them, and a value that fills a page is cut.
impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const CHARS_MAX: usize = 500;
        write!(f, "{}:{}: ", self.line, self.column)?;
        for (n, c) in self.kind.to_string().chars().enumerate() {
            match c {
                _ if n == CHARS_MAX => return f.write_char('…'),
                _ if c.is_control() => write!(f, "{}", c.escape_debug())?,
                _ => f.write_char(c)?,
            }
        }
        Ok(())
    }
}

/// Line and column (in characters) of a byte offset, both from 1.
pub(super) fn line_column(text: &str, offset: usize) -> (usize, usize) {
    let before = &text.as_bytes()[..offset.min(text.len())];
    let line_start = before.iter().rposition(|&b| b == b'\n').map_or(0, |newline| newline + 1);
    let line = 1 + before.iter().filter(|&&b| b == b'\n').count();
    let column = 1 + String::from_utf8_lossy(&before[line_start..]).chars().count();
    (line, column)
}
