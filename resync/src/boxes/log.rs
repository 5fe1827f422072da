//! Dovecot's transaction log of a mailbox (`dovecot.index.log`): which messages came, went, and what was done to flags, from some byte on.
//!
//! A log is only ever appended to; when it has grown it becomes `dovecot.index.log.2` and a new one begins. Source: `src/lib-index/mail-transaction-log.h` of Dovecot 2.3 (2.4 has the same), written by little-endian machines.

use std::collections::{BTreeMap, BTreeSet};

use twinbox_protocol::ids::ContentHash;

/// Flags of the system, by bit.
const FLAGS: [(u8, char); 5] = [(0x01, 'R'), (0x02, 'F'), (0x04, 'T'), (0x08, 'S'), (0x10, 'D')];

const EXPUNGE_MARK: u32 = 0xcd90;
const EXPUNGE: u32 = 0x1 | EXPUNGE_MARK;
const APPEND: u32 = 0x2;
const FLAG_UPDATE: u32 = 0x4;
const EXT_INTRO: u32 = 0x40;
const EXT_REC_UPDATE: u32 = 0x200;
const KEYWORD_UPDATE: u32 = 0x400;
const KEYWORD_RESET: u32 = 0x800;
const EXPUNGE_GUID: u32 = 0x2000 | EXPUNGE_MARK;
const TYPE: u32 = 0x0fff_ffff;
/// A log that speaks of more messages is damaged, or somebody is up to no good.
const UIDS_MAX: u32 = if cfg!(test) { 1000 } else { 1 << 19 };

/// Why a log says nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("no transaction log, or of a format that is not known")]
pub struct LogError;

/// What became of one message's flags.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Marked {
    /// Set at the end that may not have been before: capital letters as in a Maildir's names, and keywords.
    pub set: BTreeSet<String>,
    /// Not set at the end, that may have been before.
    pub clear: BTreeSet<String>,
    /// All keywords but those of `set` were taken away.
    pub only: bool,
}

impl Marked {
    fn set(&mut self, flag: &str) {
        self.clear.remove(flag);
        self.set.insert(flag.to_owned());
    }

    fn clear(&mut self, flag: &str) {
        self.set.remove(flag);
        self.clear.insert(flag.to_owned());
    }

    fn without_keywords(&mut self) {
        self.set.retain(|flag| is_systems(flag));
        self.clear.retain(|flag| is_systems(flag));
        self.only = true;
    }
}

fn is_systems(flag: &str) -> bool {
    flag.len() == 1 && FLAGS.iter().any(|(_, letter)| flag.starts_with(*letter))
}

/// What a log says.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Said {
    /// Messages that came.
    pub came: BTreeSet<u32>,
    /// Messages that went, or are to go, with their GUIDs (hex) as far as they are known.
    pub went: BTreeMap<u32, Vec<u8>>,
    /// Flags that messages came with.
    pub began: BTreeMap<u32, BTreeSet<String>>,
    /// What was done to flags since, also of messages that came.
    pub marked: BTreeMap<u32, Marked>,
    /// GUIDs of messages that came, hex.
    pub guids: BTreeMap<u32, Vec<u8>>,
    /// UIDs spoken of.
    spent: u32,
    /// Flags are of no interest.
    no_flags: bool,
}

/// Which index a log belongs to, from its first bytes; another mailbox of the same name has another.
#[must_use]
pub fn index_id(bytes: &[u8]) -> Option<u32> {
    // Major version 1; size of the header.
    let known = bytes.first() == Some(&1) && (24..=512).contains(&u16::from_le_bytes(bytes.get(2..4)?.try_into().ok()?));
    known.then(|| word(bytes, 4)).flatten()
}

/// Number of a log, and of the one before it (0: there was none).
#[must_use]
pub fn numbers(bytes: &[u8]) -> Option<(u32, u32)> {
    index_id(bytes)?;
    Some((word(bytes, 8)?, word(bytes, 12)?))
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

/// A size as it is written: seven bits a byte, each with its highest bit set once the record is whole.
fn size(bytes: &[u8], at: usize) -> Option<usize> {
    let bytes = bytes.get(at..at.checked_add(4)?)?;
    let whole = bytes.iter().all(|byte| byte & 0x80 != 0);
    whole.then(|| bytes.iter().fold(0usize, |size, byte| size << 7 | usize::from(byte & 0x7f)) << 2)
}

/// Whether a log begins with what another one was.
#[must_use]
pub fn begins(log: &[u8], (size, hash): (u64, ContentHash)) -> bool {
    usize::try_from(size).is_ok_and(|size| log.get(..size).is_some_and(|head| ContentHash::of(head) == hash))
}

fn hex(bytes: &[u8]) -> Vec<u8> {
    bytes.iter().flat_map(|byte| format!("{byte:02x}").into_bytes()).collect()
}

impl Said {
    /// What was written after the fork: `now` is the log, `older` the one it goes on from, `fork` size and hash of what both had of it.
    ///
    /// # Errors
    /// [`LogError`] when that cannot be told: it does not go on from the fork, or a log between is not there any more.
    pub fn since(now: &[u8], older: Option<&[u8]>, fork: Option<(u64, ContentHash)>) -> Result<Self, LogError> {
        let older = older.filter(|older| numbers(older).zip(numbers(now)).is_some_and(|(a, b)| a.0 == b.1));
        let mut said = Said::default();
        match fork {
            None => {
                // What older ones said is lost.
                if numbers(older.unwrap_or(now)).is_none_or(|(_, before)| before != 0) {
                    return Err(LogError);
                }
                older.map_or(Ok(()), |older| said.read(older, 0))?;
                said.read(now, 0)?;
            }
            Some(fork) if begins(now, fork) => said.read(now, fork.0 as usize)?,
            Some(fork) => {
                let older = older.filter(|older| begins(older, fork)).ok_or(LogError)?;
                said.read(older, fork.0 as usize)?;
                said.read(now, 0)?;
            }
        }
        Ok(said)
    }

    /// The same without flags, and of whatever is there.
    #[must_use]
    pub fn messages(now: &[u8], older: Option<&[u8]>) -> Self {
        let mut said = Said { no_flags: true, ..Said::default() };
        for log in older.into_iter().chain([now]) {
            let _ = said.read(log, 0); // As far as it can be read.
        }
        said
    }

    /// UIDs of a range, as long as there are not too many.
    fn uids(&mut self, first: u32, last: u32) -> impl Iterator<Item = u32> + use<> {
        let count = last.checked_sub(first).map_or(0, |more| more.saturating_add(1));
        self.spent = self.spent.saturating_add(count);
        (first..=last).take(if self.spent > UIDS_MAX { 0 } else { count as usize })
    }

    /// Flags of a message that came, as they are now.
    #[must_use]
    pub fn flags_now(&self, uid: u32) -> BTreeSet<String> {
        let mut flags = self.began.get(&uid).cloned().unwrap_or_default();
        if let Some(marked) = self.marked.get(&uid) {
            flags.extend(marked.set.iter().cloned());
            flags.retain(|flag| !marked.clear.contains(flag));
        }
        flags
    }

    /// Reads a log from byte `from` on (0: all of it), up to its end or a record that was not written to its end.
    ///
    /// # Errors
    /// [`LogError`].
    pub fn read(&mut self, bytes: &[u8], from: usize) -> Result<(), LogError> {
        index_id(bytes).ok_or(LogError)?;
        let header = usize::from(u16::from_le_bytes([bytes[2], bytes[3]]));
        let mut at = if from == 0 { header } else { from };
        // How long a record of the extension spoken of is, and how it is aligned.
        let mut ext = (0usize, 0usize);
        while let (Some(len), Some(kind)) = (size(bytes, at), word(bytes, at + 4)) {
            let Some(record) = at.checked_add(len).and_then(|end| bytes.get(at + 8..end)) else { break };
            self.record(kind & TYPE, record, &mut ext);
            at += len.max(8);
        }
        if self.spent > UIDS_MAX { Err(LogError) } else { Ok(()) }
    }

    fn record(&mut self, kind: u32, record: &[u8], ext: &mut (usize, usize)) {
        let pairs = |bytes: &[u8], step: usize| -> Vec<(u32, u32, Vec<u8>)> {
            bytes.chunks_exact(step).filter_map(|one| Some((word(one, 0)?, word(one, 4)?, one[8..].to_vec()))).collect()
        };
        if self.no_flags && matches!(kind, FLAG_UPDATE | KEYWORD_UPDATE | KEYWORD_RESET) {
            return;
        }
        match kind {
            APPEND => {
                for one in record.chunks_exact(8) {
                    let Some(uid) = word(one, 0) else { continue };
                    if self.uids(uid, uid).next().is_none() {
                        continue;
                    }
                    self.came.insert(uid);
                    let set = FLAGS.iter().filter(|(bit, _)| one[4] & bit != 0).map(|(_, letter)| letter.to_string());
                    self.began.insert(uid, set.collect());
                }
            }
            EXPUNGE => {
                for (first, last, _) in pairs(record, 8) {
                    for uid in self.uids(first, last) {
                        self.went.entry(uid).or_default();
                    }
                }
            }
            EXPUNGE_GUID => {
                for one in record.chunks_exact(20) {
                    let Some(uid) = word(one, 0) else { continue };
                    let guid = self.went.entry(uid).or_default();
                    if one[4..].iter().any(|byte| *byte != 0) {
                        *guid = hex(&one[4..]);
                    }
                }
            }
            FLAG_UPDATE => {
                for (first, last, flags) in pairs(record, 12) {
                    self.uids(first, last).for_each(|uid| self.flags(uid, flags[0], flags[1]));
                }
            }
            KEYWORD_UPDATE => {
                let Some(([modify, _, low, high], rest)) = record.split_first_chunk::<4>() else { return };
                let len = usize::from(u16::from_le_bytes([*low, *high]));
                let Some(name) = rest.get(..len).and_then(|name| std::str::from_utf8(name).ok()) else { return };
                for (first, last, _) in pairs(rest.get(len.next_multiple_of(4)..).unwrap_or_default(), 8) {
                    for uid in self.uids(first, last) {
                        let marked = self.marked.entry(uid).or_default();
                        match modify {
                            0 => marked.set(name),
                            1 => marked.clear(name),
                            _ => {
                                marked.without_keywords();
                                marked.set(name);
                            }
                        }
                    }
                }
            }
            KEYWORD_RESET => {
                for (first, last, _) in pairs(record, 8) {
                    self.uids(first, last).for_each(|uid| self.marked.entry(uid).or_default().without_keywords());
                }
            }
            EXT_INTRO => {
                let half = |at: usize| record.get(at..at + 2).map_or(0, |two| usize::from(u16::from_le_bytes([two[0], two[1]])));
                *ext = (half(12), half(14));
            }
            // The only extension with records of such a size: GUIDs.
            EXT_REC_UPDATE if *ext == (16, 1) => {
                for one in record.chunks_exact(20) {
                    word(one, 0).map(|uid| self.guids.insert(uid, hex(&one[4..])));
                }
            }
            _ => {}
        }
    }

    fn flags(&mut self, uid: u32, add: u8, remove: u8) {
        for (bit, letter) in FLAGS {
            let flag = letter.to_string();
            if add & bit != 0 {
                self.marked.entry(uid).or_default().set(&flag);
            } else if remove & bit != 0 {
                self.marked.entry(uid).or_default().clear(&flag);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(kind: u32, body: &[u8]) -> Vec<u8> {
        let len = (body.len() as u32 + 8) >> 2;
        let size = [21, 14, 7, 0].map(|shift| 0x80 | (len >> shift & 0x7f) as u8);
        [&size[..], &kind.to_le_bytes(), body].concat()
    }

    fn words(all: &[u32]) -> Vec<u8> {
        all.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    fn keyword(modify: u8, name: &str, uids: &[u32]) -> Vec<u8> {
        let mut body = vec![modify, 0, name.len() as u8, 0];
        body.extend(name.bytes());
        body.resize(body.len().next_multiple_of(4), 0);
        body.extend(words(uids));
        record(KEYWORD_UPDATE, &body)
    }

    fn log() -> Vec<u8> {
        let mut bytes = vec![1, 3, 40, 0];
        bytes.extend(words(&[77, 3, 2]));
        bytes.resize(40, 0);
        bytes.extend(record(0x1000_0000 | APPEND, &[words(&[5]), vec![0x08, 0, 0, 0]].concat()));
        bytes.extend(record(0x1000_0000 | EXT_INTRO, &[words(&[4, 0, 0]), vec![16, 0, 1, 0, 1, 0, 0, 0]].concat()));
        bytes.extend(record(0x1000_0000 | EXT_REC_UPDATE, &[words(&[5]), (0..16).collect()].concat()));
        bytes.extend(record(FLAG_UPDATE, &[words(&[1, 2]), vec![0x12, 0x08, 0, 0]].concat()));
        bytes.extend(keyword(0, "$Work", &[2, 2]));
        bytes.extend(keyword(1, "old", &[2, 2, 3, 3]));
        bytes.extend(record(FLAG_UPDATE, &[words(&[2, 2]), vec![0x08, 0x10, 0, 0]].concat()));
        bytes.extend(record(EXPUNGE_GUID, &[words(&[4]), vec![0; 16]].concat()));
        bytes.extend(record(EXPUNGE_GUID, &[words(&[4]), vec![0xab; 16]].concat()));
        bytes.extend(record(0x1000_0000 | EXPUNGE, &words(&[8, 9])));
        bytes
    }

    fn set(flags: &[&str]) -> BTreeSet<String> {
        flags.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn what_was_done_is_read() {
        let mut said = Said::default();
        said.read(&log(), 0).unwrap();
        assert_eq!((index_id(&log()), numbers(&log())), (Some(77), Some((3, 2))));
        assert_eq!((said.came.iter().collect::<Vec<_>>(), said.went.keys().collect::<Vec<_>>()), (vec![&5], vec![&4, &8, &9]));
        assert_eq!((said.went[&4].as_slice(), said.went[&8].len()), ("ab".repeat(16).as_bytes(), 0));
        assert_eq!(said.guids[&5], b"000102030405060708090a0b0c0d0e0f");
        assert_eq!((said.began[&5].clone(), said.flags_now(5)), (set(&["S"]), set(&["S"])));
        assert_eq!((said.marked[&1].set.clone(), said.marked[&1].clear.clone()), (set(&["D", "F"]), set(&["S"])));
        assert_eq!((said.marked[&2].set.clone(), said.marked[&2].clear.clone()), (set(&["$Work", "F", "S"]), set(&["D", "old"])));
        assert_eq!(said.marked[&3].clear, set(&["old"]));
    }

    #[test]
    fn from_some_byte_on_and_up_to_what_is_whole() {
        let whole = log();
        let first = 40 + 16;
        let mut said = Said::default();
        said.read(&whole, first).unwrap();
        assert!(said.came.is_empty() && said.marked.len() == 3);
        for end in 0..whole.len() {
            let mut part = Said::default();
            assert_eq!(part.read(&whole[..end], 0).is_ok(), end >= 8, "{end}");
            let mut damaged = whole.clone();
            damaged[end] ^= 0xff;
            let _ = Said::default().read(&damaged, 0); // It comes to an end.
        }
        let mut reset = whole;
        reset.extend(record(KEYWORD_RESET, &words(&[2, 2])));
        reset.extend(keyword(2, "new", &[3, 3]));
        let mut said = Said::default();
        said.read(&reset, 0).unwrap();
        assert_eq!((said.marked[&2].set.clone(), said.marked[&2].only), (set(&["F", "S"]), true));
        assert_eq!((said.marked[&3].set.clone(), said.marked[&3].clear.clone(), said.marked[&3].only), (set(&["new"]), set(&[]), true));
    }
}
