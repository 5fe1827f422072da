//! What is to be done with a path after a power cut: a pure function of what the standby has, what this node knew, and what the disk has.
//!
//! Rules, in this order: what is equal stays. What was changed after the boot stays. What the disk has and nobody else may have is never replaced: it is newer, or in doubt. What the disk has and the mirror had before is older: it is replaced.

use twinbox_protocol::entry::Entry;
use twinbox_resync::rows::Local;

/// What the disk has at a path.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Found {
    /// Type, attributes, content.
    pub(super) entry: Entry,
    /// Inode and ctime.
    pub(super) local: Local,
    /// The path (as this node knew it) had this content lately.
    pub(super) was: bool,
    /// Somebody has it open for writing.
    pub(super) busy: bool,
    /// The standby's content is the beginning of this one.
    pub(super) longer: bool,
    /// The mirror has this content somewhere.
    pub(super) known: bool,
    /// It was changed after the power cut.
    pub(super) fresh: bool,
}

/// What to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Verdict {
    /// Nothing: the same, or there is no file and should be none.
    Same,
    /// Give it the standby's attributes; type and content are right.
    Attributes,
    /// It is missing: put it there.
    Restore,
    /// It is an older version, as far as contents and times tell: put the standby's in its place.
    Replace,
    /// Older only if its content is the beginning of the standby's; else in doubt.
    ReplaceIfBeginning,
    /// Older only if its content is the beginning of the standby's, and then what was changed are names and attributes, while bytes did not reach the disk; else newer.
    NewerUnlessBeginning,
    /// It was changed after the last txn and that change survived: leave it.
    Newer,
    /// Not to be decided: leave it, and keep the standby's version beside it.
    Doubt,
    /// It was removed before the cut and is back: remove it again.
    Remove,
}

/// Compares. `wanted`: the standby's row, `None` when the path was removed. `then`: inode and ctime this node noted when it captured that row; `None` when it did not live to note them.
#[must_use]
pub(super) fn judge(wanted: Option<&Entry>, then: Option<Local>, found: Option<&Found>) -> Verdict {
    let (wanted, found) = match (wanted, found) {
        (None, None) => return Verdict::Same,
        (Some(_), None) => return Verdict::Restore,
        (None, Some(found)) if found.fresh => return Verdict::Newer,
        // A directory goes when it is empty, which the system decides.
        (None, Some(found)) if found.entry.is_dir() || found.was || found.known => return Verdict::Remove,
        (None, Some(_)) => return Verdict::Newer,
        (Some(wanted), Some(found)) => (wanted, found),
    };
    let content = |entry: &Entry| (entry.kind.clone(), entry.is_dir());
    if content(wanted) == content(&found.entry) {
        return attributes(wanted, then, found);
    }
    if !wanted.same_type(&found.entry) {
        return if found.was && !found.busy && !found.fresh { Verdict::Replace } else { Verdict::Doubt };
    }
    if found.busy {
        return Verdict::Newer;
    }
    if found.fresh {
        // Bytes that are written move the mtime: else only a name or attributes were changed after the boot, of a file whose bytes may not have reached the disk.
        return if found.entry.mtime == wanted.mtime { Verdict::NewerUnlessBeginning } else { Verdict::Newer };
    }
    if found.was {
        return Verdict::Replace;
    }
    match then {
        // Appended to, and nothing else, since.
        _ if found.longer => Verdict::Newer,
        // Changed since we looked, or another file took the place: if that is all of it.
        Some(then) if found.local.ctime > then.ctime => Verdict::NewerUnlessBeginning,
        // The place was taken by a rename or a new file, which would have moved its ctime: this is the file of before.
        Some(then) if found.local.ino != then.ino && found.local.ctime < then.ctime => Verdict::Replace,
        // Bytes and times reach the disk apart: old, new, or half of each.
        _ => Verdict::ReplaceIfBeginning,
    }
}

fn attributes(wanted: &Entry, then: Option<Local>, found: &Found) -> Verdict {
    let mut same = found.entry.clone();
    if wanted.is_dir() && same.mtime > wanted.mtime {
        // A directory's time never goes back: a mail server would take its index for current.
        same.mtime = wanted.mtime;
    }
    if same == *wanted {
        return Verdict::Same;
    }
    match then {
        // A directory's ctime moves with every name in it, so it tells nothing.
        Some(then) if found.local.ctime > then.ctime && !wanted.is_dir() => Verdict::Newer,
        _ if found.fresh && !wanted.is_dir() => Verdict::Newer,
        _ => Verdict::Attributes,
    }
}

#[cfg(test)]
mod tests {
    use serde_bytes::ByteBuf;
    use twinbox_protocol::entry::{Kind, Time};
    use twinbox_protocol::ids::ContentHash;

    use super::*;

    fn time(secs: i64) -> Time {
        Time { secs, nanos: 5 }
    }

    fn entry(kind: Kind) -> Entry {
        Entry { kind, mode: 0o600, uid: 1, gid: 1, mtime: time(100), xattrs: vec![] }
    }

    fn file(bytes: &[u8]) -> Entry {
        entry(Kind::File { size: bytes.len() as u64, hash: ContentHash::of(bytes) })
    }

    fn at(ino: u64, ctime: i64) -> Local {
        Local { ino, ctime: time(ctime) }
    }

    fn on_disk(entry: Entry, local: Local) -> Found {
        Found { entry, local, was: false, busy: false, longer: false, known: false, fresh: false }
    }

    #[test]
    fn contents() {
        let wanted = file(b"row");
        let then = Some(at(7, 200));
        let other = |local| on_disk(file(b"other"), local);
        let written = Entry { mtime: time(101), ..file(b"other") };
        let case = |then, found: Found| judge(Some(&wanted), then, Some(&found));
        assert_eq!(judge(Some(&wanted), then, None), Verdict::Restore);
        // New bytes under old timestamps: they are the row's.
        assert_eq!(case(then, on_disk(file(b"row"), at(7, 90))), Verdict::Same);
        for (verdict, then, found, why) in [
            (Verdict::Replace, then, Found { was: true, ..other(at(7, 150)) }, "what it had before"),
            (Verdict::Replace, None, Found { was: true, ..other(at(9, 150)) }, "the same, acknowledgement lost"),
            (Verdict::Replace, then, other(at(9, 150)), "the file of before the rename over it"),
            (
                Verdict::NewerUnlessBeginning,
                then,
                Found { was: true, fresh: true, ..other(at(7, 150)) },
                "a name or attribute, since the boot",
            ),
            (Verdict::Newer, then, Found { was: true, fresh: true, ..on_disk(written.clone(), at(7, 150)) }, "written since the boot"),
            (Verdict::NewerUnlessBeginning, then, other(at(7, 201)), "changed after the last look"),
            (Verdict::NewerUnlessBeginning, then, other(at(9, 201)), "replaced after the last look"),
            (Verdict::Newer, then, Found { longer: true, ..other(at(7, 150)) }, "appended to"),
            (Verdict::Newer, None, Found { longer: true, ..other(at(7, 150)) }, "appended to, acknowledgement lost"),
            (Verdict::Replace, then, Found { longer: true, was: true, ..other(at(7, 150)) }, "cut short since, and that was lost"),
            (Verdict::Newer, None, Found { busy: true, ..other(at(7, 150)) }, "being written"),
            (
                Verdict::Newer,
                None,
                Found { busy: true, was: true, ..other(at(7, 150)) },
                "open for writing: replaced, its writer would write into nowhere",
            ),
            (Verdict::ReplaceIfBeginning, then, other(at(7, 150)), "torn, or newer bytes under old times"),
            (Verdict::ReplaceIfBeginning, then, other(at(7, 200)), "old bytes under new times, or newer ones"),
            (Verdict::ReplaceIfBeginning, then, other(at(9, 200)), "times too coarse to tell"),
            (Verdict::ReplaceIfBeginning, None, other(at(9, 150)), "nothing known"),
            (Verdict::Doubt, then, on_disk(entry(Kind::Dir), at(9, 150)), "another type"),
            (Verdict::Replace, then, Found { was: true, ..on_disk(entry(Kind::Dir), at(9, 150)) }, "another type, which it was before"),
        ] {
            assert_eq!(case(then, found), verdict, "{why}");
        }
    }

    #[test]
    fn attributes_of_the_right_content() {
        let wanted = file(b"row");
        let mut found = on_disk(file(b"row"), at(7, 150));
        found.entry.mtime = time(50);
        assert_eq!(judge(Some(&wanted), Some(at(7, 200)), Some(&found)), Verdict::Attributes, "old times on new bytes");
        found.local = at(7, 201);
        assert_eq!(judge(Some(&wanted), Some(at(7, 200)), Some(&found)), Verdict::Newer, "changed after the last look");
        assert_eq!(judge(Some(&wanted), None, Some(&found)), Verdict::Attributes);
        let (old, new) = (entry(Kind::Symlink { target: ByteBuf::from("a") }), entry(Kind::Symlink { target: ByteBuf::from("b") }));
        assert_eq!(judge(Some(&new), Some(at(7, 200)), Some(&on_disk(old, at(8, 150)))), Verdict::Replace);
    }

    #[test]
    fn a_directorys_time_never_goes_back() {
        let mut wanted = entry(Kind::Dir);
        let mut found = on_disk(entry(Kind::Dir), at(7, 300));
        found.entry.mtime = time(300);
        assert_eq!(judge(Some(&wanted), Some(at(7, 200)), Some(&found)), Verdict::Same);
        found.entry.mtime = time(50);
        assert_eq!(judge(Some(&wanted), Some(at(7, 200)), Some(&found)), Verdict::Attributes);
        wanted.mode = 0o700;
        found.entry.mtime = time(300);
        assert_eq!(judge(Some(&wanted), None, Some(&found)), Verdict::Attributes);
    }

    #[test]
    fn removals() {
        let other = on_disk(file(b"other"), at(7, 150));
        assert_eq!(judge(None, None, None), Verdict::Same);
        assert_eq!(judge(None, None, Some(&Found { was: true, ..other.clone() })), Verdict::Remove);
        assert_eq!(judge(None, None, Some(&Found { known: true, ..other.clone() })), Verdict::Remove);
        assert_eq!(judge(None, None, Some(&other)), Verdict::Newer, "the only copy of something nobody knows");
        assert_eq!(judge(None, None, Some(&on_disk(entry(Kind::Dir), at(7, 150)))), Verdict::Remove);
    }
}
