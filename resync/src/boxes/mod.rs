//! Mail in the formats of which a mail server keeps the index: what messages files hold, and what its transaction logs say of flags and expunged messages. Read only: such files are never merged or written
//! here; what is found is given to the mail server of the other node to be taken in.

pub mod dbox;
pub mod log;
pub mod mbox;

use std::io::Read;

use twinbox_protocol::ids::ContentHash;
use twinbox_protocol::path::RelPath;

/// Directory of a dbox mailbox in which its index and messages are.
pub const MAILS: &[u8] = b"dbox-Mails";
/// Directory below which a user's mailboxes are.
const MAILBOXES: &[u8] = b"mailboxes";
/// Directory beside mbox files in which their indexes are.
pub const INDEXES: &[u8] = b".imap";
/// Directory of mdbox's messages.
pub const STORAGE: &[u8] = b"storage";

/// Of a directory below `mailboxes`, or in a dbox mailbox: whose it is, and the mailbox's name. Folders can be called `mailboxes`, too: the first one counts.
#[must_use]
pub fn place(path: &RelPath) -> Option<(RelPath, RelPath)> {
    let names: Vec<&[u8]> = path.as_bytes().split(|byte| *byte == b'/').collect();
    let at = names.iter().position(|name| *name == MAILBOXES)?;
    let end = names.iter().position(|name| *name == MAILS).unwrap_or(names.len());
    let mailbox = names.get(at + 1..end).filter(|mailbox| !mailbox.is_empty())?;
    Some((RelPath::new(&names[..at].join(&b'/')).ok()?, RelPath::new(&mailbox.join(&b'/')).ok()?))
}

/// The index directory of an mbox file `mailbox` below `owner`.
#[must_use]
pub fn mbox_index(owner: &RelPath, mailbox: &RelPath) -> Option<RelPath> {
    let dir = mailbox.parent().filter(|dir| !dir.is_root());
    let names = dir.iter().flat_map(|dir| dir.as_bytes().split(|byte| *byte == b'/'));
    names.chain([INDEXES, mailbox.name()]).try_fold(owner.clone(), |at, name| at.join(name))
}

/// The mailbox that a file below `owner` is, or that has its indexes in a directory there.
#[must_use]
pub fn mbox_name(owner: &RelPath, path: &RelPath) -> Option<RelPath> {
    let inside = path.rebase(owner, &RelPath::root()).filter(|inside| !inside.is_root())?;
    let names: Vec<&[u8]> = inside.as_bytes().split(|byte| *byte == b'/').filter(|name| *name != INDEXES).collect();
    match names.as_slice() {
        [] => None,
        [one] if one.eq_ignore_ascii_case(b"inbox") => RelPath::new(b"INBOX").ok(),
        names => RelPath::new(&names.join(&b'/')).ok(),
    }
}

/// A path some names below another; a name that cannot be one is left out.
#[must_use]
pub fn join(dir: &RelPath, names: &[&[u8]]) -> RelPath {
    names.iter().fold(dir.clone(), |at, name| at.join(name).unwrap_or(at))
}

/// Directory of a dbox mailbox: what [`place`] reads.
#[must_use]
pub fn mailbox_dir(owner: &RelPath, mailbox: &RelPath) -> RelPath {
    let names: Vec<&[u8]> = mailbox.as_bytes().split(|byte| *byte == b'/').collect();
    join(&join(owner, &[MAILBOXES]), &names)
}

/// UID of the sdbox message that a path is.
#[must_use]
pub fn uid(path: &RelPath) -> Option<u32> {
    path.parent().filter(|dir| dir.name() == MAILS)?;
    std::str::from_utf8(path.name().strip_prefix(b"u.")?).ok()?.parse().ok()
}

/// Whether a path is a message of sdbox.
#[must_use]
pub fn is_message(path: &RelPath) -> bool {
    uid(path).is_some()
}

/// Whether a file is one that only the mail server understands: indexes, and the files messages are in.
#[must_use]
pub fn is_the_servers_own(path: &RelPath) -> bool {
    let dir = path.parent().unwrap_or_default();
    dir.name() == MAILS || dir.name() == STORAGE || path.name().starts_with(b"dovecot")
}

/// Bytes of a message as every server gives them back: line ends without CR.
#[must_use]
pub fn canonical(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len());
    for (at, byte) in bytes.iter().enumerate() {
        if *byte != b'\r' || bytes.get(at + 1) != Some(&b'\n') {
            out.push(*byte);
        }
    }
    out
}

/// A message as it was received: what a mail server compressed, unpacked. `None`: encrypted, packed in a way we do not know, or not whole.
#[must_use]
pub fn unpacked(bytes: Vec<u8>, most: u64) -> Option<Vec<u8>> {
    const UNKNOWN: [&[u8]; 5] = [b"BZh", b"\xfd7zXZ", b"Dovecot-LZ4", b"CRYPTED\x03\x07", b"\x5d\x00\x00"];
    let read = |reader: &mut dyn Read| {
        let mut out = vec![];
        let got = reader.take(most + 1).read_to_end(&mut out).ok()?;
        (got as u64 <= most).then_some(out)
    };
    // What does not become a mail was none: those bytes are somebody's message as they are.
    let is_mail = |bytes: &Vec<u8>| bytes.split(|byte| *byte == b'\n').next().is_some_and(|line| line.contains(&b':'));
    if bytes.starts_with(b"\x1f\x8b") {
        read(&mut flate2::read::MultiGzDecoder::new(bytes.as_slice())).filter(is_mail)
    } else if bytes.starts_with(b"\x28\xb5\x2f\xfd") {
        read(&mut zstd::stream::read::Decoder::new(bytes.as_slice()).ok()?).filter(is_mail)
    } else if UNKNOWN.iter().any(|magic| bytes.starts_with(magic)) {
        None
    } else {
        Some(bytes)
    }
}

/// By what a message is recognised wherever it is: its bytes, but for line ends and empty lines at its end, which some formats add.
#[must_use]
pub fn fingerprint(bytes: &[u8]) -> ContentHash {
    let bytes = canonical(bytes);
    let end = bytes.iter().rposition(|byte| *byte != b'\n').map_or(0, |last| last + 1);
    ContentHash::of(&bytes[..end])
}

/// A folder's name as people write it, from a name on disk (IMAP's modified UTF-7, RFC 3501 §5.1.3); what is no such name stays as it is.
#[must_use]
pub fn folder_name(disk: &[u8]) -> String {
    decode(disk).unwrap_or_else(|| String::from_utf8_lossy(disk).into_owned())
}

/// The other way round.
#[must_use]
pub fn disk_name(name: &str) -> Vec<u8> {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+,";
    let (mut out, mut coded) = (vec![], vec![]);
    let flush = |coded: &mut Vec<u16>, out: &mut Vec<u8>| {
        if coded.is_empty() {
            return;
        }
        out.push(b'&');
        let (mut bits, mut held) = (0u32, 0);
        for unit in coded.drain(..) {
            bits = bits << 16 | u32::from(unit);
            held += 16;
            while held >= 6 {
                held -= 6;
                out.push(LETTERS[(bits >> held & 63) as usize]);
            }
            bits &= (1 << held) - 1;
        }
        if held > 0 {
            out.push(LETTERS[(bits << (6 - held) & 63) as usize]);
        }
        out.push(b'-');
    };
    for letter in name.chars() {
        if matches!(letter, ' '..='~') {
            flush(&mut coded, &mut out);
            out.push(letter as u8);
            if letter == '&' {
                out.push(b'-');
            }
        } else {
            coded.extend_from_slice(letter.encode_utf16(&mut [0; 2]));
        }
    }
    flush(&mut coded, &mut out);
    out
}

fn decode(disk: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(disk).ok()?;
    let (mut out, mut rest) = (String::new(), text);
    while let Some((plain, coded)) = rest.split_once('&') {
        out.push_str(plain);
        let (coded, after) = coded.split_once('-')?;
        rest = after;
        if coded.is_empty() {
            out.push('&');
            continue;
        }
        let (mut bits, mut held, mut units) = (0u32, 0u32, vec![]);
        for byte in coded.bytes() {
            let value = match byte {
                b'A'..=b'Z' => byte - b'A',
                b'a'..=b'z' => byte - b'a' + 26,
                b'0'..=b'9' => byte - b'0' + 52,
                b'+' => 62,
                b',' => 63,
                _ => return None,
            };
            bits = bits << 6 | u32::from(value);
            held += 6;
            if held >= 16 {
                held -= 16;
                units.push((bits >> held) as u16);
                bits &= (1 << held) - 1;
            }
        }
        let decoded = String::from_utf16(&units).ok()?;
        // What need not be written so is another name that looks the same.
        if decoded.is_empty() || decoded.bytes().any(|byte| (0x20..0x7f).contains(&byte)) {
            return None;
        }
        out.push_str(&decoded);
    }
    out.push_str(rest);
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_folders_are_read() {
        for (disk, name) in [
            ("Entw&APw-rfe/Sub x", "Entwürfe/Sub x"),
            ("A &- B", "A & B"),
            ("&2D3eAA-", "😀"),
            ("&AGE-", "&AGE-"),
            ("plain", "plain"),
            ("a&b", "a&b"),
        ] {
            assert_eq!(folder_name(disk.as_bytes()), name);
            assert_eq!(disk_name(name) == disk.as_bytes(), disk != "&AGE-" && disk != "a&b", "{name}");
        }
    }

    #[test]
    fn what_a_mail_server_packed_is_unpacked() {
        use std::io::Write;
        let text = b"From: a\n\nbody\r\n".repeat(50);
        let mut gzip = flate2::write::GzEncoder::new(vec![], flate2::Compression::default());
        gzip.write_all(&text).unwrap();
        let gzip = gzip.finish().unwrap();
        let zstd = zstd::stream::encode_all(text.as_slice(), 3).unwrap();
        for packed in [&gzip, &zstd, &text] {
            assert_eq!(unpacked(packed.clone(), 10_000).as_deref(), Some(text.as_slice()));
        }
        assert_eq!(unpacked(gzip.clone(), 100), None, "larger than any message");
        assert_eq!(unpacked(gzip[..gzip.len() - 9].to_vec(), 10_000), None, "not whole");
        assert_eq!(unpacked(b"CRYPTED\x03\x07x".to_vec(), 10_000), None);
    }

    #[test]
    fn places_are_read() {
        let p = |text: &str| RelPath::new(text.as_bytes()).unwrap();
        for (path, found) in [
            ("u/sdbox/mailboxes/A/B/dbox-Mails/u.7", Some(("u/sdbox", "A/B", Some(7)))),
            ("u/mailboxes/A", Some(("u", "A", None))),
            ("mailboxes/mailboxes/dbox-Mails", Some(("", "mailboxes", None))),
            ("u/sdbox/mailboxes", None),
            ("u/sdbox/mailboxes/dbox-Mails/u.7", None),
            ("u/mdbox/storage/m.1", None),
        ] {
            let expected = found.map(|(owner, mailbox, _)| (p(owner), p(mailbox)));
            assert_eq!(place(&p(path)), expected, "{path}");
            if let Some((_, _, number)) = found {
                assert_eq!(uid(&p(path)), number, "{path}");
            }
        }
        for path in ["u.7", "x/dbox-Mails/u.", "x/dbox-Mails/u.x", "x/u.7", "x/dbox-Mails/dovecot.index"] {
            assert!(!is_message(&p(path)), "{path}");
        }
    }

    #[test]
    fn a_message_is_the_same_with_other_line_ends() {
        assert_eq!(canonical(b"a\r\nb\rc\r\n"), b"a\nb\rc\n");
        assert_eq!(fingerprint(b"a\r\n\r\nb\r\n"), fingerprint(b"a\n\nb\n\n"));
        assert_ne!(fingerprint(b"a\nb\n"), fingerprint(b"a\n\nb\n"));
    }
}
