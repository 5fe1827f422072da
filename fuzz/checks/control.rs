//! Messages of the control stream and heads of the others: any bytes are refused or survive a round trip, and two
//! greetings that decode are compared without a doubtful agreement.
//!
//! First byte: which message. Fuzzed by `fuzz_targets/control.rs`; the committed corpus is replayed by `protocol/tests/corpus.rs`.

use std::fmt::Debug;

use serde::Serialize;
use serde::de::DeserializeOwned;
use twinbox_protocol::codec::{CONTROL_MAX, LOG_FRAME_MAX, check_entry, decode, encode};
use twinbox_protocol::hello::{Verdict, compare};
use twinbox_protocol::lineage::Term;
use twinbox_protocol::msg::{BulkItem, Hello, Replica, StreamHead, ToPrimary, ToStandby, Welcome};

fn round_trip<T: Serialize + DeserializeOwned + PartialEq + Debug>(data: &[u8], max: usize) -> Option<T> {
    let message: T = decode(data, max).ok()?;
    let again = encode(&message);
    assert!(again.len() <= data.len(), "{} bytes became {}", data.len(), again.len());
    assert_eq!(decode::<T>(&again, max).as_ref(), Ok(&message), "not the same message after a round trip");
    Some(message)
}

fn greetings(data: &[u8]) -> Option<()> {
    // Two bytes: length of the hello; the rest is the welcome.
    let (len, rest) = data.split_first_chunk::<2>()?;
    let (hello, welcome) = rest.split_at_checked(usize::from(u16::from_le_bytes(*len)))?;
    let (hello, welcome): (Hello, Welcome) = (round_trip(hello, CONTROL_MAX)?, round_trip(welcome, CONTROL_MAX)?);
    let verdict = compare(&hello, &welcome);
    match (&verdict, &welcome.replica) {
        (Verdict::Refuse { why }, _) => assert!(!why.to_string().is_empty()),
        (Verdict::FirstSync, Replica::Empty) | (Verdict::PullAll { .. }, Replica::Adopted { .. }) => {}
        (agreed, Replica::Holds { lineage, position, digest, chain_at_yours, .. }) => {
            let known = |term: &Term| hello.lineage.terms().iter().any(|ours| ours.generation == term.generation);
            assert!(lineage.terms().iter().any(known), "{agreed:?} across histories");
            match agreed {
                Verdict::Continue => assert!(*position == hello.position && *digest == hello.digest),
                Verdict::PullSince(since) => {
                    assert!(*since == hello.position.lsn && position.lsn >= *since && *chain_at_yours == Some(hello.position.chain));
                }
                Verdict::PullAll { .. } => {}
                other => panic!("{other:?} with a replica that is there"),
            }
        }
        (other, replica) => panic!("{other:?} with {replica:?}"),
    }
    Some(())
}

/// Panics when a promise of the codec or of the comparison is broken.
pub(crate) fn check(data: &[u8]) {
    let Some((kind, data)) = data.split_first() else { return };
    match kind % 5 {
        0 => drop(round_trip::<ToStandby>(data, CONTROL_MAX)),
        1 => {
            if let Some(ToPrimary::Rows { rows }) = round_trip::<ToPrimary>(data, CONTROL_MAX) {
                for entry in rows.iter().filter_map(|(_, entry)| entry.as_ref()) {
                    let _ = check_entry(entry);
                }
            }
        }
        2 => drop(round_trip::<StreamHead>(data, CONTROL_MAX)),
        3 => drop(round_trip::<BulkItem>(data, LOG_FRAME_MAX)),
        _ => drop(greetings(data)),
    }
}
