//! Frames as bytes: a length (u32, little endian) and a postcard body. Every decoder is bounded by the frame's limit before it allocates.
//!
//! Bytes from a peer never panic: each decoder returns an error, and the fuzz targets hold it to that.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::entry::{Entry, Kind, XATTRS_MAX_BYTES};
use crate::ops::{Content, INLINE_MAX, LogFrame, OP_DATA_MAX, Op, Seg};

/// Largest control message: a batch of manifest rows.
pub const CONTROL_MAX: usize = 4 * 1024 * 1024;
/// Largest log frame before compression: some ops plus one with [`OP_DATA_MAX`] bytes.
pub const LOG_FRAME_MAX: usize = 8 * 1024 * 1024;

/// Why bytes are not a message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// Longer than its limit.
    #[error("frame of {len} bytes is over the limit of {max}")]
    TooLarge {
        /// Bytes announced.
        len: usize,
        /// Limit.
        max: usize,
    },
    /// Not a message of the expected type.
    #[error("malformed frame")]
    Malformed,
    /// A field is outside what the protocol allows.
    #[error("illegal field: {field}")]
    Illegal {
        /// Which.
        field: &'static str,
    },
}

/// `message` as a body without length.
#[must_use]
pub fn encode<T: Serialize>(message: &T) -> Vec<u8> {
    // Serialising to a vector fails only for types that refuse it; ours do not.
    postcard::to_stdvec(message).unwrap_or_default()
}

/// `message` with its length in front.
#[must_use]
pub fn frame<T: Serialize>(message: &T) -> Vec<u8> {
    let body = encode(message);
    let mut out = Vec::with_capacity(body.len() + 4);
    out.extend_from_slice(&(body.len() as u32).to_le_bytes());
    out.extend_from_slice(&body);
    out
}

/// A body back into a message; trailing bytes are an error.
///
/// # Errors
/// [`DecodeError`] when the bytes are too many or not such a message.
pub fn decode<T: DeserializeOwned>(body: &[u8], max: usize) -> Result<T, DecodeError> {
    if body.len() > max {
        return Err(DecodeError::TooLarge { len: body.len(), max });
    }
    match postcard::take_from_bytes(body) {
        Ok((message, [])) => Ok(message),
        _ => Err(DecodeError::Malformed),
    }
}

/// Decodes a log frame and checks every field the type system does not.
///
/// # Errors
/// [`DecodeError`] as for [`decode`], or an illegal field.
pub fn decode_log(body: &[u8]) -> Result<LogFrame, DecodeError> {
    let frame: LogFrame = decode(body, LOG_FRAME_MAX)?;
    if frame.prev >= frame.lsn {
        return Err(DecodeError::Illegal { field: "lsn" });
    }
    frame.ops.iter().try_for_each(check_op)?;
    Ok(frame)
}

fn illegal(field: &'static str, wrong: bool) -> Result<(), DecodeError> {
    if wrong { Err(DecodeError::Illegal { field }) } else { Ok(()) }
}

/// Checks an entry that came over the wire or from disk.
///
/// # Errors
/// [`DecodeError::Illegal`].
pub fn check_entry(entry: &Entry) -> Result<(), DecodeError> {
    illegal("mode", entry.mode > 0o7777)?;
    illegal("mtime", entry.mtime.nanos >= 1_000_000_000)?;
    illegal("xattrs", !entry.xattrs.is_sorted_by(|a, b| a.0 < b.0))?;
    illegal("xattrs", entry.xattrs.iter().map(|(n, v)| n.len() + v.len()).sum::<usize>() > XATTRS_MAX_BYTES)?;
    illegal("xattr name", entry.xattrs.iter().any(|(n, _)| n.is_empty() || n.len() > 255 || n.contains(&0)))?;
    match &entry.kind {
        Kind::Symlink { target } => illegal("symlink target", target.is_empty() || target.len() > 4095 || target.contains(&0)),
        Kind::File { size, .. } => illegal("size", *size > i64::MAX as u64),
        Kind::Dir | Kind::Fifo | Kind::Device { .. } => Ok(()),
    }
}

fn check_op(op: &Op) -> Result<(), DecodeError> {
    match op {
        Op::Put { path, entry, content } => {
            check_entry(entry)?;
            illegal("path", path.is_root())?;
            let Some(_) = entry.hash() else { return Err(DecodeError::Illegal { field: "kind" }) };
            match content {
                Content::Inline(bytes) => illegal("inline", bytes.len() > INLINE_MAX || bytes.len() as u64 != entry.size()),
                Content::Recipe(segs) => {
                    let (mut total, mut data) = (0u64, 0);
                    for seg in segs {
                        let len = match seg {
                            Seg::Data(bytes) => {
                                data += bytes.len();
                                bytes.len() as u64
                            }
                            Seg::Hole(len) | Seg::Copy { len, .. } => *len,
                        };
                        total = total.checked_add(len).ok_or(DecodeError::Illegal { field: "recipe" })?;
                    }
                    illegal("recipe", total != entry.size() || data > OP_DATA_MAX)
                }
                Content::Known | Content::Staged => Ok(()),
            }
        }
        Op::Patch { path, entry, writes, .. } => {
            check_entry(entry)?;
            illegal("path", path.is_root() || entry.hash().is_none())?;
            let (mut at, mut data) = (0u64, 0);
            for (offset, bytes) in writes {
                illegal("patch", *offset < at)?;
                at = offset.checked_add(bytes.len() as u64).ok_or(DecodeError::Illegal { field: "patch" })?;
                data += bytes.len();
            }
            illegal("patch", at > entry.size() || data > OP_DATA_MAX)
        }
        Op::Make { path, entry } => {
            check_entry(entry)?;
            illegal("path", path.is_root() && !entry.is_dir())?;
            illegal("kind", entry.hash().is_some())
        }
        Op::Rename { from, to } => illegal("path", from.is_root() || to.is_root() || to.is_within(from) || from.is_within(to)),
        Op::Link { from, to } => illegal("path", from.is_root() || to.is_root() || from == to),
        Op::Remove { path } => illegal("path", path.is_root()),
        Op::SetMeta { attrs, .. } => check_entry(&attrs.on(&Entry {
            kind: Kind::Dir,
            mode: 0,
            uid: 0,
            gid: 0,
            mtime: crate::entry::Time::default(),
            xattrs: vec![],
        })),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::Lsn;
    use crate::msg::{Position, ROWS_MAX, ToPrimary, ToStandby};
    use crate::ops::FRAME_OPS_MAX;
    use crate::path::RelPath;

    fn removals(lsn: u64, count: usize) -> Vec<u8> {
        let path = RelPath::new(b"a").unwrap();
        let ops = vec![Op::Remove { path }; count];
        encode(&LogFrame { lsn: Lsn(lsn), prev: Lsn::ZERO, part: 0, flags: 0, captured_ns: 0, ops, seal: None })
    }

    #[test]
    fn many_small_items_do_not_become_a_large_thing_in_memory() {
        assert!(decode_log(&removals(1, FRAME_OPS_MAX)).is_ok());
        // Within the bytes of a frame, but hundreds of MB once decoded.
        for count in [FRAME_OPS_MAX + 1, 2_000_000] {
            let body = removals(1, count);
            assert!(body.len() < LOG_FRAME_MAX);
            assert_eq!(decode_log(&body), Err(DecodeError::Malformed), "{count} ops");
        }
        let rows = |count| encode(&ToPrimary::Rows { rows: vec![(RelPath::root(), None); count] });
        assert!(decode::<ToPrimary>(&rows(ROWS_MAX), CONTROL_MAX).is_ok());
        assert_eq!(decode::<ToPrimary>(&rows(ROWS_MAX + 1), CONTROL_MAX), Err(DecodeError::Malformed));
    }

    #[test]
    fn a_position_from_outside_can_be_stored_and_added_to() {
        assert!(decode_log(&removals(Lsn::MAX.0, 1)).is_ok());
        for number in [Lsn::MAX.0 + 1, u64::MAX] {
            assert_eq!(decode_log(&removals(number, 1)), Err(DecodeError::Malformed), "{number}");
            let from = Position { lsn: Lsn(number), ..Position::START };
            let begin = encode(&ToStandby::Begin { from, reset: true });
            assert_eq!(decode::<ToStandby>(&begin, CONTROL_MAX), Err(DecodeError::Malformed), "{number}");
        }
    }
}
