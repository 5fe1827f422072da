//! Any pattern on any path: it is refused or compiles, matching takes bounded time, and a path written as a pattern matches itself.
//!
//! The pattern ends at the first NUL byte; the path follows. Fuzzed by `fuzz_targets/glob.rs`; the committed corpus is replayed by
//! `agent/tests/corpus.rs`.

use std::time::{Duration, Instant};

use twinbox::glob::Glob;
use twinbox_protocol::path::RelPath;

/// The longest pattern on the longest path takes far less; this is for a machine that is busy with other things.
const MATCH_MAX: Duration = Duration::from_secs(10);

/// Panics when a promise of the patterns is broken.
pub(crate) fn check(data: &[u8]) {
    let at = data.iter().position(|&b| b == 0).unwrap_or(data.len());
    let (pattern, path) = (&data[..at], data.get(at + 1..).unwrap_or_default());
    let Ok(pattern) = std::str::from_utf8(pattern) else { return };
    match pattern.parse::<Glob>() {
        Ok(glob) => {
            assert_eq!(glob.as_str().parse::<Glob>().as_ref(), Ok(&glob));
            let began = Instant::now();
            let (whole, dir, file) = (glob.matches(path), glob.names(path, true), glob.names(path, false));
            assert!(began.elapsed() < MATCH_MAX, "{:?} for {pattern:?}", began.elapsed());
            assert!(dir || !file, "names a file but not a directory");
            assert!(!path.contains(&b'/') || !whole || glob.components() > 1 || pattern.contains("**"), "{pattern:?} crossed a `/`");
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
    let Some(path) = RelPath::new(path).ok().filter(|p| !p.is_root()) else { return };
    let Ok(text) = std::str::from_utf8(path.as_bytes()) else { return };
    let literal: String = text.chars().flat_map(|c| [if "*?[]\\".contains(c) { "\\" } else { "" }.to_owned(), c.to_string()]).collect();
    if literal.len() <= twinbox::glob::PATTERN_BYTES_MAX {
        let glob: Glob = literal.parse().expect("a path, escaped, is a pattern");
        assert!(glob.matches(path.as_bytes()) && glob.names(path.as_bytes(), false), "{literal:?}");
    }
}
