//! Identifiers that must not be mixed up: each is its own type, parsed at the edge and trusted inside.
//!
//! Invariant: a number alone never decides who is right ([`Lsn`], [`Epoch`]); the random [`Generation`] does.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Position of a transaction in its mirror's sequence. 0 means "before the first".
///
/// One that is read, from a peer or a disk, is at most [`Lsn::MAX`]: SQLite keeps it as a signed number, and whoever has one may add to it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug, Serialize, Deserialize)]
#[serde(try_from = "u64")]
pub struct Lsn(pub u64);

/// A number that is no position.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("LSN {0} is beyond the last one")]
pub struct BadLsn(u64);

impl TryFrom<u64> for Lsn {
    type Error = BadLsn;
    fn try_from(number: u64) -> Result<Self, BadLsn> {
        if number <= Lsn::MAX.0 { Ok(Lsn(number)) } else { Err(BadLsn(number)) }
    }
}

impl Lsn {
    /// The position before any transaction.
    pub const ZERO: Lsn = Lsn(0);
    /// The last position there can be.
    pub const MAX: Lsn = Lsn(i64::MAX as u64);
    /// The next position. LSNs are 64 bits: at a million a second they last half a million years.
    #[must_use]
    pub fn next(self) -> Lsn {
        Lsn(self.0 + 1)
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Grows by one at each promotion.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug, Serialize, Deserialize)]
pub struct Epoch(pub u64);

macro_rules! id128 {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub struct $name(pub [u8; 16]);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($name))
            }
        }
        impl FromStr for $name {
            type Err = BadId;
            fn from_str(text: &str) -> Result<Self, BadId> {
                let bytes = text.as_bytes();
                if bytes.len() != 32 || !text.is_ascii() {
                    return Err(BadId);
                }
                let mut id = [0; 16];
                for (byte, pair) in id.iter_mut().zip(bytes.chunks(2)) {
                    let pair = std::str::from_utf8(pair).map_err(|_| BadId)?;
                    *byte = u8::from_str_radix(pair, 16).map_err(|_| BadId)?;
                }
                Ok($name(id))
            }
        }
    };
}

/// An id was not 32 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a 32-digit hexadecimal id")]
pub struct BadId;

id128!(
    /// A random 128-bit id of one stretch of history, minted at promotion. It decides; a number never does alone.
    Generation
);
id128!(
    /// A random id of one run of an agent: tells a restart from a reconnect.
    Incarnation
);
id128!(
    /// A random id of one mirror (of the store, not of a node).
    MirrorId
);

macro_rules! hash256 {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub struct $name(pub [u8; 32]);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().take(6).try_for_each(|b| write!(f, "{b:02x}"))
            }
        }
    };
}

hash256!(
    /// BLAKE3 of a file's bytes: the name of its content.
    ContentHash
);
hash256!(
    /// Chain hash of the log up to and including one LSN: `BLAKE3(previous ‖ record)`.
    ChainHash
);

impl ChainHash {
    /// The chain before the first record.
    pub const ZERO: ChainHash = ChainHash([0; 32]);
}

impl ContentHash {
    /// Name of `bytes`.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        ContentHash(*blake3::hash(bytes).as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_round_trip_as_text_and_reject_other_text() {
        let id = Generation(*b"0123456789abcdef");
        assert_eq!(id.to_string().parse::<Generation>(), Ok(id));
        for bad in ["", "zz", "+1+1+1+1+1+1+1+1+1+1+1+1+1+1+1+1x", "éééééééééééééééé"] {
            assert!(bad.parse::<Generation>().is_err(), "{bad}");
        }
    }
}
