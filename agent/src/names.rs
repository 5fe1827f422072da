//! Names an operator gives to nodes and mirrors, validated once and trusted inside.
//!
//! They appear in logs, in status and on the wire, so they are short ASCII without spaces or anything a shell would touch.

use std::fmt;
use std::str::FromStr;

/// Longest name, in bytes.
pub const NAME_BYTES_MAX: usize = 64;

/// A name that is empty, too long, or holds a character it must not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{given}` is no {kind} name: use 1 to {NAME_BYTES_MAX} of {allowed}")]
pub struct BadName {
    /// What was given, cut to a readable length.
    pub given: String,
    /// `node` or `mirror`.
    pub kind: &'static str,
    /// The characters that may be used.
    pub allowed: &'static str,
}

macro_rules! name {
    ($(#[$doc:meta])* $type:ident, $kind:literal, $allowed:literal, $byte:pat) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $type(String);

        impl $type {
            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $type {
            type Err = BadName;

            fn from_str(text: &str) -> Result<Self, BadName> {
                let fits = (1..=NAME_BYTES_MAX).contains(&text.len())
                    && text.bytes().all(|b| matches!(b, $byte));
                if fits {
                    Ok($type(text.to_owned()))
                } else {
                    let given = text.chars().take(NAME_BYTES_MAX + 1).collect::<String>();
                    Err(BadName { given: given.escape_debug().to_string(), kind: $kind, allowed: $allowed })
                }
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }
    };
}

name!(
    /// The name of a node: unique among the nodes that know each other.
    NodeName, "node", "a-z, A-Z, 0-9, `.`, `_` and `-`", b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'.' | b'_' | b'-'
);
name!(
    /// The name of a mirror: the same on every node that holds it.
    MirrorName, "mirror", "a-z, 0-9, `_` and `-`", b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-'
);

#[cfg(test)]
mod tests {
    use super::{MirrorName, NAME_BYTES_MAX, NodeName};

    #[test]
    fn alphabets() {
        for (text, node, mirror) in [
            ("mail", true, true),
            ("mail_2-b", true, true),
            ("Mail1.example.org", true, false),
            ("", false, false),
            ("a b", false, false),
            ("a/b", false, false),
            ("é", false, false),
        ] {
            assert_eq!(text.parse::<NodeName>().is_ok(), node, "{text}");
            assert_eq!(text.parse::<MirrorName>().is_ok(), mirror, "{text}");
        }
        assert!("a".repeat(NAME_BYTES_MAX).parse::<MirrorName>().is_ok());
        assert!("a".repeat(NAME_BYTES_MAX + 1).parse::<MirrorName>().is_err());
    }
}
