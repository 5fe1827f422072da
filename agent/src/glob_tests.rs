//! Tests of [`super`]: a table, a naive recursive model, and the cost on patterns that blow up backtracking matchers.

use proptest::prelude::*;

use super::{Glob, GlobError, PATTERN_BYTES_MAX};

fn glob(text: &str) -> Glob {
    text.parse().unwrap_or_else(|error| panic!("{text:?}: {error}"))
}

#[test]
fn table() {
    for (pattern, path, expected) in [
        ("*", "alice", true),
        ("*", "alice/Maildir", false),
        ("*/*", "example.org/alice", true),
        ("a*c", "ac", true),
        ("a*c", "a/c", false),
        ("?", "/", false),
        ("**", "a", true),
        ("**", "a/b/c", true),
        ("**/x", "x", true),
        ("**/x", "a/b/x", true),
        ("**/x", "ax", false),
        ("a/**", "a", false),
        ("a/**", "a/b/c", true),
        ("a/**/b", "a/b", true),
        ("a/**/b", "a/x/y/b", true),
        ("a/**/b", "axb", false),
        ("a**b", "axxb", true),
        ("a**b", "a/b", false),
        ("[a-c]x", "bx", true),
        ("[!a-c]x", "bx", false),
        ("[^a-c]x", "dx", true),
        ("[]x]", "]", true),
        ("[a-]", "-", true),
        ("[\\]]", "]", true),
        ("a[!x]b", "a/b", false),
        ("a[.-0]b", "a/b", false),
        ("\\*", "*", true),
        ("\\*", "x", false),
        ("*.log", ".log", true),
    ] {
        assert_eq!(glob(pattern).matches(path.as_bytes()), expected, "{pattern:?} on {path:?}");
    }
    assert!(glob("?").matches(&[0xff]), "names are bytes, not text");
}

#[test]
fn excludes_follow_ignore_files() {
    for (pattern, path, is_dir, expected) in [
        ("*.bak", "a/b/x.bak", false, true),
        ("a/*.bak", "a/x.bak", false, true),
        ("a/*.bak", "b/a/x.bak", false, false),
        ("trash/", "u/trash", true, true),
        ("trash/", "u/trash", false, false),
        ("u/trash/", "u/trash", true, true),
    ] {
        assert_eq!(glob(pattern).names(path.as_bytes(), is_dir), expected, "{pattern:?} on {path:?}");
    }
}

#[test]
fn refusals() {
    let parse = |text: &str| text.parse::<Glob>().map(|_| ());
    assert_eq!(parse(""), Err(GlobError::Empty));
    assert_eq!(parse("a["), Err(GlobError::UnclosedClass { at: 1 }));
    assert_eq!(parse("[]"), Err(GlobError::UnclosedClass { at: 0 }));
    assert_eq!(parse("[z-a]"), Err(GlobError::BackwardRange { at: 1 }));
    assert_eq!(parse("a\\"), Err(GlobError::TrailingBackslash));
    assert_eq!(parse(&"a".repeat(PATTERN_BYTES_MAX + 1)), Err(GlobError::TooLong { bytes: PATTERN_BYTES_MAX + 1 }));
    for text in ["/", "/a", "a//b", "../a", "a/./b", "a\0"] {
        assert!(matches!(parse(text), Err(GlobError::Unmatchable { .. })), "{text:?}");
    }
}

#[test]
fn no_blow_up() {
    // Exponential in a backtracking matcher; here 1 KiB × 4 KiB steps, some milliseconds even unoptimised.
    let pattern = "a*".repeat(PATTERN_BYTES_MAX / 2 - 1) + "b";
    assert!(!glob(&pattern).matches(&[b'a'; 4096]));
    let pattern = "**/".repeat(PATTERN_BYTES_MAX / 3 - 1) + "b";
    assert!(!glob(&pattern).matches(&b"a/".repeat(2048)));
}

/// The meaning of a pattern, spelled out on its text without regard to cost. Sets are left to the table above.
fn model(pattern: &[u8], path: &[u8], component_start: bool) -> bool {
    match pattern {
        [] => path.is_empty(),
        b"**" if component_start => !path.is_empty(),
        [b'*', b'*', b'/', rest @ ..] if component_start => {
            model(rest, path, true)
                || (1..path.len()).any(|i| path[i] == b'/' && path[i - 1] != b'/' && clean(&path[..i]) && model(rest, &path[i + 1..], true))
        }
        [b'*', rest @ ..] => {
            let longest = path.iter().position(|&b| b == b'/').unwrap_or(path.len());
            (0..=longest).any(|skip| model_after_star(rest, &path[skip..]))
        }
        [b'?', rest @ ..] => path.first().is_some_and(|&b| b != b'/') && model(rest, &path[1..], false),
        [byte, rest @ ..] => path.first() == Some(byte) && model(rest, &path[1..], *byte == b'/'),
    }
}

/// A star has been read, so a further `*` is no component start.
fn model_after_star(pattern: &[u8], path: &[u8]) -> bool {
    model(pattern, path, false)
}

/// No empty components: `**/` swallows whole names only.
fn clean(path: &[u8]) -> bool {
    path.split(|&b| b == b'/').all(|name| !name.is_empty())
}

proptest! {
    #[test]
    fn agrees_with_the_model(pattern in "[ab*?/]{1,9}", path in "[ab]{1,3}(/[ab]{1,3}){0,3}") {
        if let Ok(glob) = pattern.parse::<Glob>() {
            let body = pattern.strip_suffix('/').unwrap_or(&pattern);
            prop_assert_eq!(glob.matches(path.as_bytes()), model(body.as_bytes(), path.as_bytes(), true), "{} on {}", pattern, path);
        }
    }

    #[test]
    fn any_text_parses_or_is_refused(pattern in ".{0,40}", path in proptest::collection::vec(any::<u8>(), 0..40)) {
        if let Ok(glob) = pattern.parse::<Glob>() {
            let _ = glob.matches(&path);
            let _ = glob.names(&path, true);
        }
    }
}
