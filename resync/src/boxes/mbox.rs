//! mbox files: one after the other, each message begins with a line `From SENDER DATE` after an empty line (or at the file's beginning).
//!
//! Dovecot keeps numbers and flags in headers that it adds and rewrites in place; they are no part of the message. `Content-Length` says where the next one begins, where that is true.
//! Source: <https://doc.dovecot.org/2.3/admin_manual/mailbox_formats/mbox/>, RFC 4155.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::ops::Range;

/// Headers that are the mail server's own.
const OWN: [&[u8]; 7] = [b"x-uid", b"x-imap", b"x-imapbase", b"status", b"x-status", b"x-keywords", b"content-length"];
/// No line of a header is longer; what is, is read in parts.
const LINE_MAX: u64 = 64 * 1024;

/// A message in it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Message {
    /// Its bytes, headers of the mail server's own among them, without the `From ` line.
    pub bytes: Range<u64>,
    /// When it was received, in seconds since 1970.
    pub received: Option<i64>,
    /// Its UID, once the mail server has written it down.
    pub uid: Option<u32>,
    /// Flags as they are written down.
    pub flags: BTreeSet<String>,
}

/// Whether these are the first bytes of an mbox file; an empty one is one, too.
#[must_use]
pub fn begins(bytes: &[u8]) -> bool {
    bytes.is_empty() || bytes.starts_with(b"From ")
}

/// Messages from byte `from` on: the first one begins there, or after the next empty line.
///
/// # Errors
/// The disk's; [`io::ErrorKind::InvalidData`] when it is no mbox file.
pub fn messages(file: &File, from: u64) -> io::Result<Vec<Message>> {
    let end = file.metadata()?.len();
    let mut reader = BufReader::with_capacity(256 * 1024, file);
    reader.seek(SeekFrom::Start(from))?;
    let (mut all, mut at, mut line) = (vec![], from, vec![]);
    let mut after_empty = from == 0;
    // Where a message's bytes begin, while one is open.
    let mut open: Option<Message> = None;
    loop {
        line.clear();
        let got = (&mut reader).take(LINE_MAX).read_until(b'\n', &mut line)? as u64;
        if got == 0 {
            break;
        }
        if after_empty && is_separator(&line) {
            all.extend(open.take().map(|message| closed(message, at)));
            let (message, next) = header(&mut reader, at + got, end)?;
            open = Some(Message { received: received(&line), ..message });
            at = next;
            after_empty = true; // Its body may be empty.
            continue;
        }
        if at == 0 && open.is_none() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "no mbox file"));
        }
        at += got;
        after_empty = line == b"\n" || line == b"\r\n";
    }
    all.extend(open.map(|message| closed(message, at)));
    Ok(all)
}

/// The empty line before the next message is not its own.
fn closed(mut message: Message, next: u64) -> Message {
    message.bytes.end = next.max(message.bytes.start);
    message
}

/// When a message was received, from its `From ` line (seconds since 1970). Local time, unless it names its zone.
#[must_use]
pub fn received(line: &[u8]) -> Option<i64> {
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let text = std::str::from_utf8(line.strip_prefix(b"From ")?).ok()?;
    let words: Vec<&str> = text.split_ascii_whitespace().collect();
    let at = words.iter().rposition(|word| word.contains(':'))?;
    let month = MONTHS.iter().position(|month| at >= 2 && *month == words[at - 2])? as i8 + 1;
    let mut time = words[at].split(':').map(|part| part.parse::<i8>().ok());
    let (hour, minute) = (time.next()??, time.next()??);
    let second = time.next().unwrap_or(Some(0))?;
    let year = words[at + 1..].iter().find(|word| word.len() == 4 && word.bytes().all(|byte| byte.is_ascii_digit()))?.parse().ok()?;
    let date = jiff::civil::Date::new(year, month, words[at - 1].parse().ok()?).ok()?;
    let local = date.to_datetime(jiff::civil::Time::new(hour, minute, second, 0).ok()?);
    let zone = words[at + 1..].iter().find(|word| word.starts_with(['+', '-']) && word.len() == 5);
    let zone = match zone {
        Some(zone) => {
            let (hours, minutes) = (zone[1..3].parse::<i32>().ok()?, zone[3..].parse::<i32>().ok()?);
            let seconds = (hours * 60 + minutes) * 60 * if zone.starts_with('-') { -1 } else { 1 };
            jiff::tz::TimeZone::fixed(jiff::tz::Offset::from_seconds(seconds).ok()?)
        }
        None => jiff::tz::TimeZone::system(),
    };
    Some(zone.to_timestamp(local).ok()?.as_second())
}

/// `From SENDER Thu Nov 26 19:25:23 2026`, perhaps with a time zone: a time of day, and a year of four digits after it.
fn is_separator(line: &[u8]) -> bool {
    let Some(rest) = line.strip_prefix(b"From ") else { return false };
    let words: Vec<&[u8]> = rest.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty()).collect();
    let digits = |word: &[u8], len: usize| word.len() == len && word.iter().all(u8::is_ascii_digit);
    let time = |word: &&[u8]| {
        let parts: Vec<&[u8]> = word.split(|byte| *byte == b':').collect();
        matches!(parts.len(), 2 | 3) && parts.iter().all(|part| digits(part, 2))
    };
    let Some(at) = words.iter().position(time) else { return false };
    words[at + 1..].iter().any(|word| digits(word, 4))
}

/// Reads a message's headers, and past its body where its length is told truly; gives where the reader is then.
fn header(reader: &mut BufReader<&File>, start: u64, end: u64) -> io::Result<(Message, u64)> {
    let mut message = Message { bytes: start..start, received: None, uid: None, flags: BTreeSet::new() };
    let (mut at, mut line, mut length) = (start, vec![], None::<u64>);
    loop {
        line.clear();
        let got = reader.take(LINE_MAX).read_until(b'\n', &mut line)? as u64;
        at += got;
        if got == 0 || line == b"\n" || line == b"\r\n" {
            break;
        }
        let Some((name, value)) = field(&line) else { continue };
        match name.as_slice() {
            b"x-uid" => message.uid = value.trim().parse().ok(),
            b"content-length" => length = value.trim().parse().ok(),
            b"status" if value.contains('R') => drop(message.flags.insert("S".into())),
            b"x-status" => {
                let letters = [('A', "R"), ('F', "F"), ('T', "D"), ('D', "T")];
                message.flags.extend(letters.iter().filter(|(letter, _)| value.contains(*letter)).map(|(_, flag)| (*flag).to_owned()));
            }
            b"x-keywords" => message.flags.extend(value.split_whitespace().map(ToOwned::to_owned)),
            _ => {}
        }
    }
    // It is true when another message begins there, or none.
    if let Some(next) = length.and_then(|length| at.checked_add(length)).filter(|next| *next <= end) {
        reader.seek(SeekFrom::Start(next))?;
        let mut lines = vec![];
        reader.take(LINE_MAX).read_until(b'\n', &mut lines)?;
        let first = lines.len();
        reader.take(LINE_MAX).read_until(b'\n', &mut lines)?;
        let (empty, then) = lines.split_at(first);
        let is_end = next == end || ((empty == b"\n" || empty == b"\r\n") && (then.is_empty() || is_separator(then)));
        let back = if is_end { next + if next == end { 0 } else { first as u64 } } else { at };
        reader.seek(SeekFrom::Start(back))?;
        return Ok((message, back));
    }
    Ok((message, at))
}

/// A header's name in small letters, and its value.
fn field(line: &[u8]) -> Option<(Vec<u8>, String)> {
    let colon = line.iter().position(|byte| *byte == b':')?;
    Some((line[..colon].to_ascii_lowercase(), String::from_utf8_lossy(&line[colon + 1..]).into_owned()))
}

/// A message without what the mail server added to it.
#[must_use]
pub fn stripped(bytes: &[u8]) -> Vec<u8> {
    let (mut out, mut rest, mut own) = (Vec::with_capacity(bytes.len()), bytes, false);
    while !rest.is_empty() {
        let len = rest.iter().position(|byte| *byte == b'\n').map_or(rest.len(), |at| at + 1);
        let (line, after) = rest.split_at(len);
        if line == b"\n" || line == b"\r\n" {
            out.extend_from_slice(rest);
            break;
        }
        // A header goes on in lines that begin with a space.
        if !line.starts_with(b" ") && !line.starts_with(b"\t") {
            own = field(line).is_some_and(|(name, _)| OWN.contains(&name.as_slice()));
        }
        if !own {
            out.extend_from_slice(line);
        }
        rest = after;
    }
    // The empty line before the next message.
    if out.ends_with(b"\n\n") {
        out.pop();
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    const TEXT: &str = "From anna@vm  Thu Nov 26 19:25:23 2026\nFrom: a@b\nX-UID: 2\nStatus: RO\nX-Status: AF\nX-Keywords: $Work           \nContent-Length: 43\nX-IMAPbase: 1795721122 0000000003 $Work\n\nbody\n\nFrom bob Thu Nov 26 19:25:23 2026\n\nx\n\nFrom anna@vm  Thu Nov 26 19:25:23 2026\nSubject: second\n\nFrom here on no separator\n\nFrom x\nend\n\nFrom anna@vm  Thu Nov 26 19:25 +0100 2026\nSubject: wrong length\nContent-Length: 3\n\nlonger\n";

    fn file(text: &str) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file
    }

    #[test]
    fn messages_are_found_with_numbers_and_flags() {
        let all = messages(&file(TEXT), 0).unwrap();
        let of = |n: usize| String::from_utf8(stripped(&TEXT.as_bytes()[all[n].bytes.start as usize..all[n].bytes.end as usize])).unwrap();
        assert_eq!(all.len(), 3, "{all:?}");
        assert_eq!(of(0), "From: a@b\n\nbody\n\nFrom bob Thu Nov 26 19:25:23 2026\n\nx\n");
        assert_eq!(of(1), "Subject: second\n\nFrom here on no separator\n\nFrom x\nend\n");
        assert_eq!(of(2), "Subject: wrong length\n\nlonger\n");
        assert_eq!((all[0].uid, all[1].uid), (Some(2), None));
        assert_eq!(all[0].flags, ["$Work", "F", "R", "S"].map(String::from).into());
        // From the middle of a message on: those after it.
        assert_eq!(messages(&file(TEXT), 5).unwrap().len(), 3, "the body's own line looks like one");
        let last = all[2].bytes.start - 60;
        assert_eq!(messages(&file(TEXT), last).unwrap(), all[2..]);
    }

    #[test]
    fn dates_are_read() {
        assert_eq!(received(b"From a@b  Thu Nov 26 19:25:23 2026 +0100\n"), Some(1_795_721_123 - 3600));
        assert_eq!(received(b"From a@b  Thu Nov 26 19:25 +0000 2026\n"), Some(1_795_721_123 - 23));
        assert!(received(b"From a@b  Thu Nov 26 19:25:23 2026\n").is_some());
        for line in ["From x", "From a Thu Nov 99 19:25:23 2026", "From 12:30 2026", "From a Thu Nov 26 99:25:23 2026"] {
            assert_eq!(received(line.as_bytes()), None, "{line}");
        }
    }

    #[test]
    fn whatever_is_cut_short_comes_to_an_end() {
        for end in 0..TEXT.len() {
            let found = messages(&file(&TEXT[..end]), 0);
            assert!(found.is_ok() || end < 40, "{end}");
            assert!(found.unwrap_or_default().iter().all(|message| message.bytes.end <= end as u64));
        }
        assert!(messages(&file("no mail\n"), 0).is_err());
        assert!(messages(&file(""), 0).unwrap().is_empty());
        assert_eq!(stripped(b"Status: R\n more\nA: b\n\n"), b"A: b\n");
    }
}
