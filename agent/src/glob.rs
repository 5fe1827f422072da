//! Shell globs over raw path bytes, for `exclude` and `groups` in the configuration.
//!
//! Matching simulates the pattern as a nondeterministic automaton: its cost is at most (pattern length × path length), whatever
//! the pattern, so an operator's typo cannot stall the agent. Paths are `/`-separated, relative, any bytes.
//!
//! | pattern | matches |
//! |---|---|
//! | `*` | any run of bytes within one name, also the empty one |
//! | `**` as a whole component | any number of components, also none; at the end: everything below |
//! | `?` | one byte, not `/` |
//! | `[a-z]`, `[!a-z]`, `[^a-z]` | one byte in (not in) the set, never `/` |
//! | `\x` | the byte `x` itself |
//!
//! Does not: look at the disk, fold case, know Unicode (`?` is one *byte*), or expand braces.

use std::fmt;
use std::str::FromStr;

/// Longest pattern accepted, in bytes: bounds the automaton, and with it the time of a match.
pub const PATTERN_BYTES_MAX: usize = 1024;

/// Why a pattern was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GlobError {
    /// The pattern is empty.
    #[error("the pattern is empty")]
    Empty,
    /// The pattern is longer than [`PATTERN_BYTES_MAX`].
    #[error("the pattern has {bytes} bytes; at most {PATTERN_BYTES_MAX} are allowed")]
    TooLong {
        /// Its length.
        bytes: usize,
    },
    /// A `[` has no closing `]`.
    #[error("`[` at byte {at} is never closed")]
    UnclosedClass {
        /// Offset of the `[`.
        at: usize,
    },
    /// A range such as `[z-a]` runs backwards.
    #[error("the range at byte {at} runs backwards")]
    BackwardRange {
        /// Offset of the range.
        at: usize,
    },
    /// The pattern ends in a lone backslash.
    #[error("the pattern ends in a lone `\\`")]
    TrailingBackslash,
    /// The pattern could match no relative path (leading or doubled `/`, `.` or `..`, a NUL byte).
    #[error("the pattern can match no path: {why}")]
    Unmatchable {
        /// The offending part.
        why: &'static str,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Token {
    Byte(u8),
    /// `?`
    AnyInName,
    /// `*`
    RunInName,
    /// One byte of any kind: the first byte of a trailing `**`.
    Any,
    /// Any run of any bytes: the rest of a trailing `**`.
    Run,
    /// A `**/` at a component boundary: skip it, or enter the component.
    Dirs,
    /// Within a component that a `**/` swallowed.
    InDirs,
    Set(Box<[bool; 256]>),
}

/// A compiled pattern. Displays as it was written.
#[derive(Clone, PartialEq, Eq)]
pub struct Glob {
    text: String,
    tokens: Vec<Token>,
    components: usize,
    anchored: bool,
    dir_only: bool,
}

impl Glob {
    /// Whether the pattern, read from the root of the tree, matches all of `path`.
    #[must_use]
    pub fn matches(&self, path: &[u8]) -> bool {
        let end = self.tokens.len();
        let mut now = vec![false; end + 1];
        let mut next = vec![false; end + 1];
        now[0] = true;
        self.skip_empty(&mut now);
        for &byte in path {
            next.fill(false);
            for (i, token) in self.tokens.iter().enumerate() {
                if !now[i] {
                    continue;
                }
                match token {
                    Token::Byte(b) => next[i + 1] |= *b == byte,
                    Token::AnyInName => next[i + 1] |= byte != b'/',
                    Token::Set(set) => next[i + 1] |= set[usize::from(byte)],
                    Token::Any => next[i + 1] = true,
                    Token::RunInName => next[i] |= byte != b'/',
                    Token::Run => next[i] = true,
                    Token::Dirs => next[i + 1] |= byte != b'/',
                    Token::InDirs if byte == b'/' => next[i - 1] = true,
                    Token::InDirs => next[i] = true,
                }
            }
            self.skip_empty(&mut next);
            std::mem::swap(&mut now, &mut next);
        }
        now[end]
    }

    /// Whether an `exclude` entry written like this names `path` itself (not something above it).
    ///
    /// As in ignore files: without a `/` the pattern is compared with the last name at any depth, with one it is anchored at
    /// the root; a `/` at its end restricts it to directories.
    #[must_use]
    pub fn names(&self, path: &[u8], is_dir: bool) -> bool {
        if self.dir_only && !is_dir {
            return false;
        }
        if self.anchored {
            self.matches(path)
        } else {
            let name = path.iter().rposition(|&b| b == b'/').map_or(path, |slash| &path[slash + 1..]);
            self.matches(name)
        }
    }

    /// How many components the pattern has: `*/*` has 2.
    #[must_use]
    pub fn components(&self) -> usize {
        self.components
    }

    /// The pattern as written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Adds every state reachable without consuming a byte. Such moves only go forward, so one pass is enough.
    fn skip_empty(&self, states: &mut [bool]) {
        for (i, token) in self.tokens.iter().enumerate() {
            if !states[i] {
                continue;
            }
            match token {
                Token::RunInName | Token::Run => states[i + 1] = true,
                Token::Dirs => states[i + 2] = true,
                _ => {}
            }
        }
    }
}

impl FromStr for Glob {
    type Err = GlobError;

    fn from_str(text: &str) -> Result<Self, GlobError> {
        if text.is_empty() {
            return Err(GlobError::Empty);
        }
        if text.len() > PATTERN_BYTES_MAX {
            return Err(GlobError::TooLong { bytes: text.len() });
        }
        let (body, dir_only) = match text.strip_suffix('/') {
            Some(body) if !body.ends_with('\\') => (body, true),
            _ => (text, false),
        };
        let why = if text.contains('\0') {
            Some("no file name holds a NUL byte")
        } else if body.is_empty() || body.starts_with('/') {
            Some("patterns are relative to the mirror's root, so drop the leading `/`")
        } else if body.split('/').any(str::is_empty) {
            Some("`//` never occurs in a path")
        } else if body.split('/').any(|part| part == "." || part == "..") {
            Some("`.` and `..` never occur in a path")
        } else {
            None
        };
        if let Some(why) = why {
            return Err(GlobError::Unmatchable { why });
        }
        let tokens = compile(body.as_bytes())?;
        let slashes = body.bytes().filter(|&b| b == b'/').count();
        Ok(Glob { text: text.to_owned(), tokens, components: slashes + 1, anchored: slashes > 0, dir_only })
    }
}

fn compile(body: &[u8]) -> Result<Vec<Token>, GlobError> {
    let mut tokens = Vec::with_capacity(body.len());
    let mut at = 0;
    while at < body.len() {
        let component_start = at == 0 || body[at - 1] == b'/';
        match body[at] {
            b'*' if component_start && body[at..] == *b"**" => {
                tokens.extend([Token::Any, Token::Run]);
                at += 2;
            }
            b'*' if component_start && body[at..].starts_with(b"**/") => {
                tokens.extend([Token::Dirs, Token::InDirs]);
                at += 3;
            }
            b'*' => {
                if tokens.last() != Some(&Token::RunInName) {
                    tokens.push(Token::RunInName);
                }
                at += 1;
            }
            b'?' => {
                tokens.push(Token::AnyInName);
                at += 1;
            }
            b'[' => {
                let (set, after) = compile_set(body, at)?;
                tokens.push(Token::Set(set));
                at = after;
            }
            b'\\' => {
                let byte = body.get(at + 1).ok_or(GlobError::TrailingBackslash)?;
                tokens.push(Token::Byte(*byte));
                at += 2;
            }
            byte => {
                tokens.push(Token::Byte(byte));
                at += 1;
            }
        }
    }
    Ok(tokens)
}

/// Reads the set opening at `open`; returns it with the offset after its `]`. A `]` that comes first stands for itself.
fn compile_set(body: &[u8], open: usize) -> Result<(Box<[bool; 256]>, usize), GlobError> {
    let unclosed = GlobError::UnclosedClass { at: open };
    let mut at = open + 1;
    let negated = matches!(body.get(at), Some(b'!' | b'^'));
    at += usize::from(negated);
    let first = at;
    let mut set = Box::new([false; 256]);
    let member = |at: &mut usize| -> Result<u8, GlobError> {
        if body.get(*at) == Some(&b'\\') {
            *at += 1;
        }
        let byte = *body.get(*at).ok_or_else(|| unclosed.clone())?;
        *at += 1;
        Ok(byte)
    };
    loop {
        match body.get(at) {
            None => return Err(unclosed),
            Some(b']') if at != first => break,
            Some(_) => {}
        }
        let start = at;
        let low = member(&mut at)?;
        let ranged = body.get(at) == Some(&b'-') && body.get(at + 1).is_some_and(|&b| b != b']');
        let high = if ranged {
            at += 1;
            member(&mut at)?
        } else {
            low
        };
        if high < low {
            return Err(GlobError::BackwardRange { at: start });
        }
        set[usize::from(low)..=usize::from(high)].fill(true);
    }
    if negated {
        set.iter_mut().for_each(|member| *member = !*member);
    }
    set[usize::from(b'/')] = false;
    Ok((set, at + 1))
}

impl fmt::Display for Glob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for Glob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Glob({:?})", self.text)
    }
}

#[cfg(test)]
#[path = "glob_tests.rs"]
mod tests;
