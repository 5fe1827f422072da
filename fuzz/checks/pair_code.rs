//! Arbitrary text as a pairing code: refused, or an offer whose own code reads back as the same offer.
//!
//! First byte: even, the rest is the text; odd, the rest is the payload, and the checksum is made right, so that the reader gets
//! past it. Fuzzed by `fuzz_targets/pair_code.rs`; the committed corpus is replayed by `agent/tests/corpus.rs`.

use twinbox::net::Offer;
use twinbox::net::code::CODE_PREFIX;

fn code_of(payload: &[u8]) -> String {
    let sum = blake3::derive_key("twinbox pairing code checksum v1", payload);
    let text = data_encoding::BASE32_NOPAD.encode(&[payload, &sum[..4]].concat()).to_ascii_lowercase();
    format!("{CODE_PREFIX}{text}")
}

/// Panics when a promise of the pairing code is broken.
pub(crate) fn check(data: &[u8]) {
    let Some((&kind, data)) = data.split_first() else { return };
    let text = if kind & 1 == 0 { String::from_utf8_lossy(data).into_owned() } else { code_of(data) };
    let Ok(offer) = text.parse::<Offer>() else { return };
    let again: Offer = offer.code().parse().expect("the code of an offer is a code");
    assert_eq!(again.code(), offer.code());
    assert_eq!((again.node(), again.addrs(), again.expires()), (offer.node(), offer.addrs(), offer.expires()));
    assert!(twinbox::net::valid_node_name(offer.node()) && !offer.addrs().is_empty());
}
