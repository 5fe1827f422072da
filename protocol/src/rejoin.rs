//! What a node that was primary asks the one that was promoted after it, and has it do: see the agent's `resync`.
//!
//! The returning node dials: `Rejoin` → `Welcome` or `Refuse`; then, in any order, `Pull` → `Rows`…, `RowsEnd` (the rows as they were at the fork), `Ask` → `Found`, `Changes` → `Changed`, and
//! `Merge` (a message's bytes follow it: `Piece`…, `End`) → `Merged`. Nothing else is changed by it.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::entry::Entry;
use crate::ids::ContentHash;
use crate::path::RelPath;

/// Most questions in one message.
pub const ASKS_MAX: usize = 512;

/// Most lines in [`Changes::first`].
pub const FIRST_MAX: usize = 64;

/// Most flags of a message: the system's, and Dovecot's 26 keywords of a folder.
pub const FLAGS_MAX: usize = 64;

/// Flags of a message: one capital letter as in its name, or a keyword by its own name.
pub type Flags = BTreeSet<String>;

/// A question about the store as it is now.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub enum Ask {
    /// What is at this path?
    Path(RelPath),
    /// What is the message of this unique name in this Maildir called?
    Message {
        /// Directory that has `cur` and `new`.
        folder: RelPath,
        /// Its name without flags.
        unique: Vec<u8>,
    },
    /// Is there such a message in one of somebody's mbox files? The answer's path is that file and `UID n` (0: not numbered yet).
    Mail {
        /// Directory of somebody's mailboxes.
        owner: RelPath,
        /// Where it is looked for first.
        mailbox: RelPath,
        /// Its bytes, without what a mail server adds.
        print: ContentHash,
    },
}

/// What is there.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Found {
    /// Its path.
    pub path: RelPath,
    /// What it is.
    pub entry: Entry,
    /// Its flags, of a message.
    #[serde(deserialize_with = "flags")]
    pub flags: Flags,
}

/// How a path differs from what it was at the fork.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Differs {
    /// Was not there.
    New,
    /// Other bytes or attributes.
    Changed,
    /// Not there any more.
    Gone,
}

/// What a node has changed since the fork.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
pub struct Changes {
    /// Paths that were not there.
    pub new: u64,
    /// Paths that are otherwise.
    pub changed: u64,
    /// Paths that are gone.
    pub gone: u64,
    /// Some of them.
    #[serde(deserialize_with = "crate::bounded::seq::<_, _, FIRST_MAX>")]
    pub first: Vec<(Differs, RelPath)>,
    /// It has a program for what only its mail server can do ([`Merge::Server`]).
    pub has_program: bool,
}

/// A change of the returning node that is made on the other one too. Each can be repeated.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Merge {
    /// Make this directory if nothing is there.
    Dir {
        /// Where.
        path: RelPath,
        /// Owner, mode, attributes.
        entry: Entry,
    },
    /// Put a message into a folder, unless one of that name is there. Its bytes follow.
    Message {
        /// Directory that has `cur` and `new`.
        folder: RelPath,
        /// Its name without flags.
        unique: Vec<u8>,
        /// Its flags.
        #[serde(deserialize_with = "flags")]
        flags: Flags,
        /// Size, hash, owner, mode, times.
        entry: Entry,
    },
    /// Set and clear flags of a message; the others stay as they are.
    Flags {
        /// Directory that has `cur` and `new`.
        folder: RelPath,
        /// Its name without flags.
        unique: Vec<u8>,
        /// To be set.
        #[serde(deserialize_with = "flags")]
        set: Flags,
        /// To be cleared.
        #[serde(deserialize_with = "flags")]
        clear: Flags,
    },
    /// Move a message to another folder, under another name.
    Move {
        /// Directory it is in.
        from: RelPath,
        /// Its name without flags there.
        was: Vec<u8>,
        /// Directory it goes to.
        folder: RelPath,
        /// Its new name.
        unique: Vec<u8>,
        /// Flags to be set.
        #[serde(deserialize_with = "flags")]
        set: Flags,
        /// Flags to be cleared.
        #[serde(deserialize_with = "flags")]
        clear: Flags,
    },
    /// Put a file where nothing is, with the directories above it. Its bytes follow.
    File {
        /// Where.
        path: RelPath,
        /// Size, hash, owner, mode, times.
        entry: Entry,
    },
    /// Give a directory another name.
    Rename {
        /// Where it is.
        from: RelPath,
        /// Where nothing is.
        to: RelPath,
    },
    /// Have its mail server do something, by the operator's program: the formats of which it keeps the index.
    Server {
        /// Directory of somebody's mailboxes.
        owner: RelPath,
        /// What.
        task: Task,
    },
}

/// Something that only a mail server can do. Mailboxes are named as on disk, relative to where they all are.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Task {
    /// Take in a message unless it is there. Its bytes follow.
    Import {
        /// Into which mailbox.
        mailbox: RelPath,
        /// Its flags.
        #[serde(deserialize_with = "flags")]
        flags: Flags,
        /// Size and hash of the bytes that follow; owner; when it was received.
        entry: Entry,
        /// By what it is known whatever a mail server adds to it.
        print: ContentHash,
    },
    /// Set and clear flags of a message that both had.
    Flags {
        /// Where it is.
        at: Place,
        /// To be set.
        #[serde(deserialize_with = "flags")]
        set: Flags,
        /// To be cleared.
        #[serde(deserialize_with = "flags")]
        clear: Flags,
    },
    /// Move a message that both had, with its flags changed.
    Move {
        /// Where it is.
        at: Place,
        /// Into which mailbox.
        to: RelPath,
        /// By what it is known there: its bytes,
        print: ContentHash,
        /// or its GUID, hex, where it has one.
        guid: String,
        /// To be set.
        #[serde(deserialize_with = "flags")]
        set: Flags,
        /// To be cleared.
        #[serde(deserialize_with = "flags")]
        clear: Flags,
    },
    /// Give a mailbox another name.
    Rename {
        /// Its name.
        mailbox: RelPath,
        /// A name that is free.
        to: RelPath,
    },
    /// Make a mailbox unless it is there.
    Create {
        /// Its name.
        mailbox: RelPath,
    },
}

/// A message by its number.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct Place {
    /// Its mailbox.
    pub mailbox: RelPath,
    /// Which index that mailbox had at the fork: another one of its name has another.
    pub index: u32,
    /// Its UID.
    pub uid: u32,
}

/// What came of it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Merged {
    /// It is so now, and survives a power cut.
    Done,
    /// It was so before.
    Already,
    /// It stays as it is.
    Kept {
        /// For people.
        why: String,
    },
}

/// At most [`FLAGS_MAX`].
fn flags<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Flags, D::Error> {
    crate::bounded::seq::<_, String, FLAGS_MAX>(from).map(|all| all.into_iter().collect())
}
