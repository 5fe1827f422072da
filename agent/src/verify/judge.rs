//! What a row says against what a disk has: pure, and the same on both sides.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::File;

use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use twinbox_protocol::entry::{Entry, Kind};
use twinbox_resync::rows::{Local, Row};

/// What is at a path on this disk.
#[derive(Debug)]
pub(crate) struct Found {
    /// It, with an empty name for a file's content.
    pub(crate) entry: Entry,
    /// Inode and change time.
    pub(crate) local: Local,
    /// Open for reading, if it is a file.
    pub(crate) file: Option<File>,
}

/// A path as whoever owns its row sees it.
#[derive(Debug)]
pub(crate) struct Looked {
    /// The row.
    pub(crate) row: Option<Row>,
    /// The disk.
    pub(crate) found: Result<Option<Found>, Errno>,
    /// The two need not agree now.
    pub(crate) busy: bool,
}

/// How a path differs.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum What {
    /// It has a row and is not there.
    Missing,
    /// It is there and has no row.
    Extra,
    /// Another kind of thing.
    Type,
    /// Other bytes, or a link to elsewhere.
    Content,
    /// The same bytes with another owner, mode, time or extended attribute.
    Attributes,
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            What::Missing => "missing",
            What::Extra => "extra",
            What::Type => "type",
            What::Content => "content",
            What::Attributes => "attributes",
        })
    }
}

/// What can be said without reading a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Glance {
    /// They agree.
    Same,
    /// They do not.
    Differs(What),
    /// The content has to be read; if it is right, this is what is wrong besides.
    Read(Option<What>),
}

/// What this machine can store.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub(crate) struct Able {
    /// Not root: owners, devices, special bits and system attributes are out of reach.
    pub(crate) ordinary: bool,
    /// Kinds of attributes that this file system was found not to keep: `ownership`, `mode`, `xattrs`, `times`.
    pub(crate) lost: BTreeSet<String>,
}

pub(crate) fn glance(row: Option<&Entry>, found: Option<&Entry>, able: &Able) -> Glance {
    let (row, found) = match (row, found) {
        (None, None) => return Glance::Same,
        (None, Some(_)) => return Glance::Differs(What::Extra),
        (Some(Entry { kind: Kind::Device { .. }, .. }), None) if able.ordinary => return Glance::Same,
        (Some(_), None) => return Glance::Differs(What::Missing),
        (Some(row), Some(found)) => (row, found),
    };
    let attributes = (!same_attributes(row, found, able)).then_some(What::Attributes);
    match (&row.kind, &found.kind) {
        (Kind::File { size: a, .. }, Kind::File { size: b, .. }) if a != b => Glance::Differs(What::Content),
        (Kind::File { .. }, Kind::File { .. }) => Glance::Read(attributes),
        (Kind::Symlink { target: a }, Kind::Symlink { target: b }) if a != b => Glance::Differs(What::Content),
        (a, b) if a == b => attributes.map_or(Glance::Same, Glance::Differs),
        _ => Glance::Differs(What::Type),
    }
}

/// Whether owner, mode, time or extended attributes differ, as far as they can be stored here.
pub(crate) fn differ_in_attributes(row: &Entry, found: &Entry, able: &Able) -> bool {
    !same_attributes(row, found, able)
}

fn same_attributes(row: &Entry, found: &Entry, able: &Able) -> bool {
    let link = matches!(row.kind, Kind::Symlink { .. });
    let bits = if able.ordinary { 0o777 } else { 0o7777 };
    let kept = |kind: &str| !able.lost.contains(kind);
    let owner = able.ordinary || !kept("ownership") || (row.uid, row.gid) == (found.uid, found.gid);
    let mode = link || !kept("mode") || row.mode & bits == found.mode & bits;
    let theirs = |entry: &Entry| -> Vec<_> {
        let all = entry.xattrs.iter();
        all.filter(|(name, _)| !able.ordinary || (name.starts_with(b"user.") && !link)).cloned().collect()
    };
    let xattrs = row.xattrs == found.xattrs || !kept("xattrs") || theirs(row) == theirs(found);
    owner && mode && xattrs && (row.mtime == found.mtime || !kept("times"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_bytes::ByteBuf;
    use twinbox_protocol::entry::Time;
    use twinbox_protocol::ids::ContentHash;

    fn entry(kind: Kind) -> Entry {
        Entry { kind, mode: 0o640, uid: 1, gid: 2, mtime: Time { secs: 7, nanos: 8 }, xattrs: vec![] }
    }

    fn file(size: u64) -> Entry {
        entry(Kind::File { size, hash: ContentHash([9; 32]) })
    }

    fn link(target: &str) -> Entry {
        entry(Kind::Symlink { target: ByteBuf::from(target) })
    }

    #[test]
    fn every_difference_has_its_name() {
        let (root, user) = (&Able::default(), &Able { ordinary: true, ..Able::default() });
        let poor = &Able { lost: ["ownership", "xattrs"].map(String::from).into(), ..Able::default() };
        let device = entry(Kind::Device { block: false, major: 1, minor: 3 });
        let owned = Entry { uid: 5, ..file(3) };
        let special = Entry { mode: 0o4640, ..file(3) };
        let named = Entry { xattrs: vec![(ByteBuf::from("user.a"), ByteBuf::from("1"))], ..file(3) };
        let system = Entry { xattrs: vec![(ByteBuf::from("trusted.a"), ByteBuf::from("1"))], ..file(3) };
        let later = Entry { mtime: Time { secs: 7, nanos: 9 }, ..entry(Kind::Dir) };
        let table = [
            (None, None, root, Glance::Same),
            (Some(file(3)), None, root, Glance::Differs(What::Missing)),
            (None, Some(file(3)), root, Glance::Differs(What::Extra)),
            (Some(file(3)), Some(file(3)), root, Glance::Read(None)),
            (Some(file(3)), Some(file(4)), root, Glance::Differs(What::Content)),
            (Some(file(3)), Some(entry(Kind::Dir)), root, Glance::Differs(What::Type)),
            (Some(file(3)), Some(owned.clone()), root, Glance::Read(Some(What::Attributes))),
            (Some(file(3)), Some(owned.clone()), user, Glance::Read(None)),
            (Some(file(3)), Some(owned), poor, Glance::Read(None)),
            (Some(file(3)), Some(named.clone()), poor, Glance::Read(None)),
            (Some(file(3)), Some(special.clone()), root, Glance::Read(Some(What::Attributes))),
            (Some(file(3)), Some(special), user, Glance::Read(None)),
            (Some(file(3)), Some(named.clone()), user, Glance::Read(Some(What::Attributes))),
            (Some(system.clone()), Some(file(3)), root, Glance::Read(Some(What::Attributes))),
            (Some(system), Some(file(3)), user, Glance::Read(None)),
            (Some(entry(Kind::Dir)), Some(later), root, Glance::Differs(What::Attributes)),
            (Some(entry(Kind::Dir)), Some(entry(Kind::Dir)), root, Glance::Same),
            (Some(link("a")), Some(link("b")), root, Glance::Differs(What::Content)),
            (Some(link("a")), Some(Entry { mode: 0o777, ..link("a") }), root, Glance::Same),
            (Some(device.clone()), None, user, Glance::Same),
            (Some(device.clone()), None, root, Glance::Differs(What::Missing)),
            (Some(device), Some(entry(Kind::Device { block: true, major: 1, minor: 3 })), root, Glance::Differs(What::Type)),
        ];
        for (at, (row, found, able, glance_)) in table.into_iter().enumerate() {
            assert_eq!(glance(row.as_ref(), found.as_ref(), able), glance_, "case {at}");
        }
    }
}
