//! A path inside a mirror: bytes, validated once, never absolute, never `..`.
//!
//! Whoever holds a [`RelPath`] need not ask again whether it can leave the root by its text. (Symbolic links are another
//! matter: the tree is only ever touched beneath the root's descriptor.)

use std::borrow::Borrow;
use std::fmt;

use serde::{Deserialize, Serialize};

/// Longest path in bytes we carry: Linux's `PATH_MAX` is 4096 per call, but openat chains go deeper; 16 KiB bounds memory.
pub const PATH_MAX: usize = 16 * 1024;
/// Longest name of one component, in bytes (`NAME_MAX`).
pub const NAME_MAX: usize = 255;

/// A path relative to a mirror's root; `/`-separated bytes. The empty path is the root itself.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(try_from = "serde_bytes::ByteBuf", into = "serde_bytes::ByteBuf")]
pub struct RelPath(Box<[u8]>);

/// Why bytes are not a [`RelPath`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BadPath {
    /// Longer than [`PATH_MAX`].
    #[error("path longer than {PATH_MAX} bytes")]
    TooLong,
    /// A component is empty, `.`, `..`, longer than [`NAME_MAX`], or holds a NUL byte.
    #[error("path component is empty, `.`, `..`, too long or holds a NUL byte")]
    Component,
}

/// Whether `name` can be one component of a path.
#[must_use]
pub fn is_name(name: &[u8]) -> bool {
    !name.is_empty() && name.len() <= NAME_MAX && name != b"." && name != b".." && !name.iter().any(|&b| b == 0 || b == b'/')
}

impl RelPath {
    /// The root itself.
    #[must_use]
    pub fn root() -> Self {
        RelPath::default()
    }

    /// Checks `bytes` and takes them as a path.
    ///
    /// # Errors
    /// [`BadPath`] when a component is not a legal name or the whole is too long.
    pub fn new(bytes: &[u8]) -> Result<Self, BadPath> {
        if bytes.len() > PATH_MAX {
            return Err(BadPath::TooLong);
        }
        if !bytes.is_empty() && !bytes.split(|&b| b == b'/').all(is_name) {
            return Err(BadPath::Component);
        }
        Ok(RelPath(bytes.into()))
    }

    /// `self/name`; `None` when `name` is not a legal component or the path would be too long.
    #[must_use]
    pub fn join(&self, name: &[u8]) -> Option<Self> {
        if !is_name(name) || self.0.len() + 1 + name.len() > PATH_MAX {
            return None;
        }
        if self.0.is_empty() {
            return Some(RelPath(name.into()));
        }
        let mut bytes = Vec::with_capacity(self.0.len() + 1 + name.len());
        bytes.extend_from_slice(&self.0);
        bytes.push(b'/');
        bytes.extend_from_slice(name);
        Some(RelPath(bytes.into()))
    }

    /// The bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Whether this is the root.
    #[must_use]
    pub fn is_root(&self) -> bool {
        self.0.is_empty()
    }

    /// Directory part and last component; the root has neither.
    #[must_use]
    pub fn split(&self) -> Option<(&[u8], &[u8])> {
        if self.0.is_empty() {
            return None;
        }
        Some(match self.0.iter().rposition(|&b| b == b'/') {
            Some(at) => (&self.0[..at], &self.0[at + 1..]),
            None => (&[], &self.0),
        })
    }

    /// The directory this path is in; `None` for the root.
    #[must_use]
    pub fn parent(&self) -> Option<RelPath> {
        self.split().map(|(dir, _)| RelPath(dir.into()))
    }

    /// Last component; empty for the root.
    #[must_use]
    pub fn name(&self) -> &[u8] {
        self.split().map_or(&[], |(_, name)| name)
    }

    /// Whether `self` is `dir` or lies below it.
    #[must_use]
    pub fn is_within(&self, dir: &RelPath) -> bool {
        dir.0.is_empty() || self.0.strip_prefix(&*dir.0).is_some_and(|rest| rest.is_empty() || rest[0] == b'/')
    }

    /// `self` with its leading `from` replaced by `to`; `None` when `self` is not within `from` or grows too long.
    #[must_use]
    pub fn rebase(&self, from: &RelPath, to: &RelPath) -> Option<RelPath> {
        if !self.is_within(from) {
            return None;
        }
        let rest = &self.0[from.0.len()..];
        let rest = rest.strip_prefix(b"/").unwrap_or(rest);
        let mut bytes = to.0.to_vec();
        if !rest.is_empty() && !bytes.is_empty() {
            bytes.push(b'/');
        }
        bytes.extend_from_slice(rest);
        (bytes.len() <= PATH_MAX).then(|| RelPath(bytes.into()))
    }

    /// The smallest byte string greater than every path strictly below `self`, and the smallest path below it:
    /// `self/` (inclusive) to `self0` (exclusive; `0` is the byte after `/`). `None` for the root, below which everything is.
    #[must_use]
    pub fn below(&self) -> Option<(Vec<u8>, Vec<u8>)> {
        if self.0.is_empty() {
            return None;
        }
        let mut low = self.0.to_vec();
        low.push(b'/');
        let mut high = self.0.to_vec();
        high.push(b'0');
        Some((low, high))
    }
}

impl Borrow<[u8]> for RelPath {
    fn borrow(&self) -> &[u8] {
        &self.0
    }
}

impl TryFrom<serde_bytes::ByteBuf> for RelPath {
    type Error = BadPath;
    fn try_from(bytes: serde_bytes::ByteBuf) -> Result<Self, BadPath> {
        RelPath::new(&bytes)
    }
}

impl From<RelPath> for serde_bytes::ByteBuf {
    fn from(path: RelPath) -> Self {
        serde_bytes::ByteBuf::from(path.0.into_vec())
    }
}

impl fmt::Display for RelPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() { f.write_str(".") } else { write!(f, "{}", self.0.escape_ascii()) }
    }
}

impl fmt::Debug for RelPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{self}`")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn p(text: &str) -> RelPath {
        RelPath::new(text.as_bytes()).unwrap()
    }

    #[test]
    fn rejects_what_could_leave_the_root() {
        for bad in ["/", "/a", "a/", "a//b", ".", "..", "a/..", "a/../b", "a\0b", &"x".repeat(256)] {
            assert_eq!(RelPath::new(bad.as_bytes()), Err(BadPath::Component), "{bad:?}");
        }
        assert_eq!(RelPath::new(&b"a/".repeat(PATH_MAX)), Err(BadPath::TooLong));
        for good in ["", "a", "a/b", "...", " a", "a\nb", "a\\b"] {
            assert!(RelPath::new(good.as_bytes()).is_ok(), "{good:?}");
        }
        assert!(RelPath::new(b"\xff\xfe").is_ok());
    }

    #[test]
    fn parts_and_rebasing() {
        assert_eq!(p("a/b").parent(), Some(p("a")));
        assert_eq!(p("a").parent(), Some(RelPath::root()));
        assert_eq!(RelPath::root().parent(), None);
        assert!(p("a/b").is_within(&p("a")) && p("a").is_within(&p("a")) && !p("ab").is_within(&p("a")));
        assert!(p("a").is_within(&RelPath::root()));
        assert_eq!(p("a/b/c").rebase(&p("a/b"), &p("x")), Some(p("x/c")));
        assert_eq!(p("a").rebase(&p("a"), &p("x/y")), Some(p("x/y")));
        assert_eq!(p("a/b").rebase(&p("a"), &RelPath::root()), Some(p("b")));
        assert_eq!(p("a").rebase(&RelPath::root(), &p("x")), Some(p("x/a")));
        assert_eq!(p("ab").rebase(&p("a"), &p("x")), None);
    }
}
