//! The pairing code: one word an operator carries from one node to the other.
//!
//! `twinbox-pair:` + lowercase base32 of postcard{version, node, addrs, fingerprint, secret, expires} + 4 checksum bytes.
//! Whoever reads the word while it is valid can pair, so it is short-lived, good for one use, and kept out of `Debug`.
//!
//! The checksum catches typing errors only; that a stranger cannot make or alter a code is shown by the handshake
//! (`pairing`), not here. Reads no clock: the time is an argument.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;

use data_encoding::BASE32_NOPAD;
use serde::{Deserialize, Serialize};

use super::identity::Fingerprint;

/// Wall-clock time: seconds since 1970-01-01 UTC.
pub type UnixSecs = u64;

/// What every code starts with.
pub const CODE_PREFIX: &str = "twinbox-pair:";
/// Addresses a code or claim may list; more would not be tried with patience anyway.
pub const ADDRS_MAX: usize = 16;
/// Bytes in a node name.
pub const NODE_NAME_MAX: usize = 64;

const VERSION: u8 = 1;
const CHECKSUM: usize = 4;
/// Characters of a code: 16 IPv6 addresses and the longest name take well under half.
const CODE_MAX: usize = 2048;

/// Names are for logs, status lines and file names: letters, digits, `.`, `-`, `_`, not starting with a dot.
pub fn valid_node_name(name: &str) -> bool {
    (1..=NODE_NAME_MAX).contains(&name.len())
        && !name.starts_with('.')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'))
}

/// An address another node could dial.
pub(super) fn valid_addr(addr: &SocketAddr) -> bool {
    addr.port() != 0 && !addr.ip().is_unspecified() && !addr.ip().is_multicast()
}

/// 128 random bits that make a code unguessable.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Secret(pub(super) [u8; 16]);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// An invitation to pair with one node: what a code says.
#[derive(Debug, Clone)]
pub struct Offer {
    pub(super) node: String,
    pub(super) addrs: Vec<SocketAddr>,
    pub(super) fingerprint: Fingerprint,
    pub(super) secret: Secret,
    pub(super) expires: UnixSecs,
}

/// The bytes inside a code. Field order is the format.
#[derive(Serialize, Deserialize)]
struct Payload {
    version: u8,
    node: String,
    addrs: Vec<SocketAddr>,
    fingerprint: [u8; 32],
    secret: [u8; 16],
    expires: UnixSecs,
}

/// Why an offer cannot be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OfferError {
    /// See [`valid_node_name`].
    #[error("node name {node:?} will not do: use 1 to 64 letters, digits, '.', '-' or '_'")]
    Name {
        /// As given.
        node: String,
    },
    /// None, or too many.
    #[error("a pairing code needs 1 to 16 addresses of this node, {count} given: name one that the other node can reach")]
    AddrCount {
        /// How many were given.
        count: usize,
    },
    /// A wildcard, a multicast group, or no port.
    #[error("nobody can dial {addr}: name an address of this node, with its port")]
    Addr {
        /// As given.
        addr: SocketAddr,
    },
    /// It would be expired before anyone could use it.
    #[error("the pairing code would be expired already: check the clock and the validity asked for")]
    Expired,
    /// The system gave no random bytes.
    #[error("no random bytes to be had")]
    Random,
    /// The offer names another key than the endpoint's.
    #[error("the offer is for the key {offered}, this node has {own}")]
    Key {
        /// In the offer.
        offered: Fingerprint,
        /// Of the endpoint.
        own: Fingerprint,
    },
    /// Nobody could come.
    #[error("this node accepts no connections: set a listen address")]
    NotListening,
}

/// Text that is not a pairing code.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CodeError {
    /// Not a code at all, or of a future version.
    #[error("this is not a pairing code this version understands: copy the whole word, starting with `twinbox-pair:`")]
    Malformed,
    /// A code, with an error in it.
    #[error("the pairing code has a typing error or is cut short: copy it again")]
    Checksum,
}

impl Offer {
    /// An invitation by `node`, reachable at `addrs` and identified by `fingerprint`, valid until `expires`.
    pub fn new(node: &str, addrs: Vec<SocketAddr>, fingerprint: Fingerprint, expires: UnixSecs) -> Result<Self, OfferError> {
        if !valid_node_name(node) {
            let node = node.to_owned();
            return Err(OfferError::Name { node });
        }
        if !(1..=ADDRS_MAX).contains(&addrs.len()) {
            let count = addrs.len();
            return Err(OfferError::AddrCount { count });
        }
        if let Some(addr) = addrs.iter().find(|addr| !valid_addr(addr)) {
            return Err(OfferError::Addr { addr: *addr });
        }
        let provider = rustls::crypto::ring::default_provider();
        let mut secret = [0; 16];
        provider.secure_random.fill(&mut secret).map_err(|_| OfferError::Random)?;
        Ok(Self { node: node.to_owned(), addrs, fingerprint, secret: Secret(secret), expires })
    }

    /// The word to carry to the other node. It is a secret.
    pub fn code(&self) -> String {
        let payload = Payload {
            version: VERSION,
            node: self.node.clone(),
            addrs: self.addrs.clone(),
            fingerprint: *self.fingerprint.as_bytes(),
            secret: self.secret.0,
            expires: self.expires,
        };
        // Encoding plain fields into a Vec has no way to fail.
        let mut bytes = postcard::to_stdvec(&payload).unwrap_or_default();
        let sum = checksum(&bytes);
        bytes.extend_from_slice(&sum);
        let text = BASE32_NOPAD.encode(&bytes).to_ascii_lowercase();
        format!("{CODE_PREFIX}{text}")
    }

    /// The node that invites.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// Where it says it can be reached.
    pub fn addrs(&self) -> &[SocketAddr] {
        &self.addrs
    }

    /// Its key.
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    /// The code is refused from this moment on.
    pub fn expires(&self) -> UnixSecs {
        self.expires
    }
}

fn checksum(payload: &[u8]) -> [u8; CHECKSUM] {
    let hash = blake3::derive_key("twinbox pairing code checksum v1", payload);
    let [a, b, c, d, ..] = hash;
    [a, b, c, d]
}

impl FromStr for Offer {
    type Err = CodeError;

    /// Case does not matter, nor does white space: mail and terminals break long words.
    fn from_str(text: &str) -> Result<Self, CodeError> {
        if text.len() > CODE_MAX {
            return Err(CodeError::Malformed);
        }
        let mut word: String = text.split_whitespace().collect();
        word.make_ascii_uppercase();
        let prefix = CODE_PREFIX.to_ascii_uppercase();
        let text = word.strip_prefix(&prefix).ok_or(CodeError::Malformed)?;
        // A slip of the finger can leave the alphabet or the length as well as the checksum wrong.
        let bytes = BASE32_NOPAD.decode(text.as_bytes()).map_err(|_| CodeError::Checksum)?;
        let (payload, sum) = bytes.split_last_chunk::<CHECKSUM>().ok_or(CodeError::Checksum)?;
        if checksum(payload) != *sum {
            return Err(CodeError::Checksum);
        }
        let (payload, rest) = postcard::take_from_bytes::<Payload>(payload).map_err(|_| CodeError::Malformed)?;
        let sound = rest.is_empty()
            && payload.version == VERSION
            && valid_node_name(&payload.node)
            && (1..=ADDRS_MAX).contains(&payload.addrs.len())
            && payload.addrs.iter().all(valid_addr);
        if !sound {
            return Err(CodeError::Malformed);
        }
        Ok(Self {
            node: payload.node,
            addrs: payload.addrs,
            fingerprint: Fingerprint::from_bytes(payload.fingerprint),
            secret: Secret(payload.secret),
            expires: payload.expires,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn offer() -> Offer {
        let addrs = vec!["192.0.2.7:4433", "[2001:db8::7]:4433"];
        let addrs = addrs.into_iter().map(|a| a.parse().unwrap()).collect();
        Offer::new("mail-east", addrs, Fingerprint::from_bytes([7; 32]), 1_000).unwrap()
    }

    #[test]
    fn survives_the_trip() {
        let offer = offer();
        let code = offer.code();
        assert!(!code.contains(char::is_whitespace));
        let (start, end) = code.split_at(40);
        for text in [code.clone(), code.to_uppercase(), format!(" {start}\r\n  {end}\n")] {
            let read: Offer = text.parse().unwrap();
            assert_eq!(read.code(), code);
            assert_eq!((read.node(), read.expires()), ("mail-east", 1_000));
        }
        assert!(!format!("{offer:?}").contains(&format!("{:?}", offer.secret.0)));
        assert_ne!(super::tests::offer().code(), code, "secrets differ");
    }

    #[test]
    fn every_single_typing_error_is_seen() {
        let code = offer().code();
        for at in CODE_PREFIX.len()..code.len() {
            let old = code.as_bytes()[at];
            let new = if old == b'a' { 'b' } else { 'a' };
            let mut typo = code.clone();
            typo.replace_range(at..=at, &new.to_string());
            assert_eq!(typo.parse::<Offer>().unwrap_err(), CodeError::Checksum);
            let mut short = code.clone();
            short.remove(at);
            assert!(short.parse::<Offer>().is_err());
        }
        for text in ["", "twinbox-pair", "hello", &code[1..], &"a".repeat(CODE_MAX + 1)] {
            assert_eq!(text.parse::<Offer>().unwrap_err(), CodeError::Malformed);
        }
        assert_eq!(CODE_PREFIX.parse::<Offer>().unwrap_err(), CodeError::Checksum);
    }

    #[test]
    fn useless_offers_are_not_made() {
        let key = Fingerprint::from_bytes([7; 32]);
        let good: SocketAddr = "192.0.2.7:1".parse().unwrap();
        for node in ["", "a b", "ü", "../x", ".x", &"x".repeat(65)] {
            let made = Offer::new(node, vec![good], key, 1);
            assert!(matches!(made, Err(OfferError::Name { .. })), "{node}");
        }
        for addr in ["0.0.0.0:1", "192.0.2.7:0", "[::]:1", "224.0.0.1:1"] {
            let made = Offer::new("n", vec![addr.parse().unwrap()], key, 1);
            assert!(matches!(made, Err(OfferError::Addr { .. })), "{addr}");
        }
        for count in [0, 17] {
            let made = Offer::new("n", vec![good; count], key, 1);
            assert_eq!(made.unwrap_err(), OfferError::AddrCount { count });
        }
    }

    proptest! {
        #[test]
        fn any_bytes_behind_a_right_checksum_are_harmless(mut bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let sum = checksum(&bytes);
            bytes.extend_from_slice(&sum);
            let _ = format!("{CODE_PREFIX}{}", BASE32_NOPAD.encode(&bytes)).parse::<Offer>();
        }
    }
}
