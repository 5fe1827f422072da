//! A frame of the log from a peer: it is refused, or it is legal, and encoding it again gives the same frame.
//!
//! Fuzzed by `fuzz_targets/log_frame.rs`; the committed corpus is replayed by `protocol/tests/corpus.rs`.

use twinbox_protocol::codec::{decode_log, encode};
use twinbox_protocol::ops::Op;

/// Panics when a promise of the codec is broken.
pub(crate) fn check(data: &[u8]) {
    let Ok(frame) = decode_log(data) else { return };
    let again = encode(&frame);
    // Lengths may be written longer than need be, never shorter.
    assert!(again.len() <= data.len(), "{} bytes became {}", data.len(), again.len());
    assert_eq!(decode_log(&again).as_ref(), Ok(&frame), "not the same frame after a round trip");

    assert!(frame.prev < frame.lsn);
    for op in &frame.ops {
        assert!(op.weight() >= 64);
        if let Op::Put { path, entry, .. } | Op::Patch { path, entry, .. } = op {
            assert!(!path.is_root() && entry.hash().is_some(), "{op:?}");
        }
        if let Op::Rename { from, to } = op {
            assert!(to.rebase(from, to).is_none() && !from.is_root() && !to.is_root(), "{op:?}");
        }
    }
}
