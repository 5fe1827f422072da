//! Dovecot's dbox files: `u.UID` of sdbox (one message), `m.N` of mdbox (any number, one after the other).
//!
//! A file begins with `2 M<size of a message's header, hex> C<time made, hex>\n`. A message: header `\x01\x02N`, nine unused bytes and a space, its size as 16 hex digits, `\n`; its bytes; `\n\x01\x03\n`; lines of
//! a letter and a value (`G` GUID, `R` time received, `B` the mailbox it was put into, `X` attachments kept elsewhere); an empty line. Source: <https://doc.dovecot.org/2.3/developer_manual/design/dbox_storage/>, and `src/lib-storage/index/dbox-common/dbox-file.h`.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// No metadata of a message is longer.
const METADATA_MAX: usize = 64 * 1024;
/// Nor the file's first line.
const LINE_MAX: usize = 256;
/// Nor a message's header.
const HEADER_MAX: u64 = 1024;

/// Why a file is not read on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DboxError {
    /// The disk.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// It is not such a file, or damaged from here on.
    #[error("no dbox message at byte {0}")]
    Damaged(u64),
}

/// A message in it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Message {
    /// Where its bytes are.
    pub bytes: Range<u64>,
    /// Its GUID, lower-case hex.
    pub guid: Vec<u8>,
    /// Seconds since 1970 at which it was received.
    pub received: Option<i64>,
    /// Mailbox it was put into (mdbox only).
    pub mailbox: Option<Vec<u8>>,
    /// Parts of it are kept in other files.
    pub is_split: bool,
}

/// Messages that begin at byte `from` or later, up to where the file ends or a message was not written to its end; then why no more, if that is not the end.
///
/// # Errors
/// Not a dbox file at all, or it cannot be read.
pub fn messages(file: &File, from: u64) -> Result<(Vec<Message>, Option<DboxError>), DboxError> {
    let end = file.metadata()?.len();
    if end == 0 {
        return Ok((vec![], None));
    }
    let first = piece(file, 0, LINE_MAX, end)?;
    let line = first.iter().position(|byte| *byte == b'\n').ok_or(DboxError::Damaged(0))?;
    let text = std::str::from_utf8(&first[..line]).map_err(|_| DboxError::Damaged(0))?;
    let mut words = text.split(' ');
    if words.next() != Some("2") {
        return Err(DboxError::Damaged(0));
    }
    let header =
        words.find_map(|word| u64::from_str_radix(word.strip_prefix('M')?, 16).ok()).filter(|size| (21..=HEADER_MAX).contains(size));
    let header = header.ok_or(DboxError::Damaged(0))?;
    let (mut all, mut at) = (vec![], line as u64 + 1);
    while at < end {
        match message(file, at, header, end) {
            Ok((message, next)) => {
                if at >= from {
                    all.push(message);
                }
                at = next;
            }
            Err(error) => return Ok((all, Some(error))),
        }
    }
    Ok((all, None))
}

fn piece(file: &File, at: u64, len: usize, end: u64) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; len.min(end.saturating_sub(at) as usize)];
    file.read_exact_at(&mut bytes, at)?;
    Ok(bytes)
}

fn message(file: &File, at: u64, header: u64, end: u64) -> Result<(Message, u64), DboxError> {
    let damaged = || DboxError::Damaged(at);
    let head = piece(file, at, header as usize, end)?;
    let size = head
        .strip_prefix(b"\x01\x02N")
        .filter(|_| head.len() as u64 == header && head.last() == Some(&b'\n'))
        .and_then(|rest| std::str::from_utf8(rest.get(10..26)?).ok())
        .and_then(|hex| u64::from_str_radix(hex, 16).ok());
    let bytes = at + header..size.and_then(|size| (at + header).checked_add(size)).ok_or_else(damaged)?;
    if bytes.end > end {
        return Err(damaged());
    }
    let after = piece(file, bytes.end, METADATA_MAX, end)?;
    let lines = after.strip_prefix(b"\n\x01\x03\n").ok_or_else(damaged)?;
    let mut message = Message { bytes: bytes.clone(), guid: vec![], received: None, mailbox: None, is_split: false };
    let mut used = 4;
    for line in lines.split(|byte| *byte == b'\n') {
        used += line.len() + 1;
        let Some((key, value)) = line.split_first() else {
            // Only an empty line that is there ends it.
            return if used <= after.len() { Ok((message, bytes.end + used as u64)) } else { Err(damaged()) };
        };
        match key {
            b'G' => message.guid = value.to_ascii_lowercase(),
            b'R' => message.received = std::str::from_utf8(value).ok().and_then(|hex| i64::from_str_radix(hex, 16).ok()),
            b'B' => message.mailbox = Some(value.to_vec()),
            b'X' => message.is_split = true,
            _ => {}
        }
    }
    Err(damaged())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn one(body: &str, more: &str) -> String {
        format!("\x01\x02N          {:016X}\n{body}\n\x01\x03\nR6b0887a2\nV44\nG3AECE431a287086b497200\n{more}\n", body.len())
    }

    fn file(text: &str) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file
    }

    #[test]
    fn messages_are_found_with_what_is_said_of_them() {
        let (a, b) = (one("From: a\n\nbody\n", ""), one("From: b\n\nbody\n\x01\x03\n", "BINBOX/x\nXpart\n"));
        let text = format!("2 M1e C6b0887a2\n{a}{b}");
        let (all, why) = messages(&file(&text), 0).unwrap();
        assert!(why.is_none());
        let of = |m: &Message| &text[m.bytes.start as usize..m.bytes.end as usize];
        assert_eq!((of(&all[0]), of(&all[1])), ("From: a\n\nbody\n", "From: b\n\nbody\n\x01\x03\n"));
        assert_eq!((all[0].received, all[0].guid.as_slice()), (Some(0x6b08_87a2), b"3aece431a287086b497200".as_slice()));
        assert_eq!((all[0].mailbox.as_deref(), all[1].mailbox.as_deref()), (None, Some(b"INBOX/x".as_slice())));
        assert!(!all[0].is_split && all[1].is_split);
        let second = 16 + a.len() as u64;
        for (from, found) in [(0, 2), (16, 2), (17, 1), (second, 1), (second + 1, 0)] {
            assert_eq!(messages(&file(&text), from).unwrap().0.len(), found, "{from}");
        }
    }

    #[test]
    fn what_is_cut_short_or_damaged_gives_what_is_whole() {
        let text = format!("2 M1e C6b0887a2\n{}{}", one("From: a\n\nbody\n", ""), one("From: b\n\nbody\n", "BINBOX\n"));
        let whole = messages(&file(&text), 0).unwrap().0;
        let first = 16 + one("From: a\n\nbody\n", "").len();
        for end in 0..text.len() {
            match messages(&file(&text[..end]), 0) {
                Ok((found, why)) => {
                    assert_eq!(found, whole[..found.len()], "{end}");
                    assert_eq!((found.len(), why.is_some()), (usize::from(end >= first), end > 16 && end != first), "{end}");
                }
                Err(_) => assert!((1..16).contains(&end), "{end}"),
            }
            let mut damaged = text.clone().into_bytes();
            damaged[end] ^= 0x55;
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(&damaged).unwrap();
            let _ = messages(&file, 0); // Whatever it says, it comes to an end.
        }
        assert!(messages(&file("2 M1e C6b0887a2\n\x01\x02N          FFFFFFFFFFFFFFFF\nx"), 0).unwrap().1.is_some());
        assert!(messages(&file("From someone\n\nmail\n"), 0).is_err());
    }
}
