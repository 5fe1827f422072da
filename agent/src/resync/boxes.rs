//! What a returning node's mail server wrote after the fork, read from its own files (sdbox, mdbox): messages, flags, moved and deleted messages. Nothing is changed.
//!
//! sdbox has a file for each message, so files say what came and went. mdbox has them in its log of each mailbox; their bytes are found by GUID in what was appended to `storage`.
//! Flags are in the logs in both. Of a log whose beginning is not the one both had nothing is taken: the messages of that mailbox are kept in rescue, and that is said.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::os::unix::fs::FileExt;

use rustix::io::Errno;
use twinbox_protocol::entry::{Entry, Kind, Time};
use twinbox_protocol::ids::ContentHash;
use twinbox_protocol::path::RelPath;
use twinbox_protocol::rejoin::{Ask, FLAGS_MAX, Flags, Merge, Place, Task};
use twinbox_resync::boxes::dbox::{self, Message};
use twinbox_resync::boxes::log::{Said, begins, index_id};
use twinbox_resync::boxes::{self, INDEXES, MAILS, STORAGE, canonical, fingerprint, join, mbox, unpacked};
use twinbox_resync::reconcile::{Boxes, Item, Outcome, Part, Tail, Theirs, What, before, folder_moves};

use super::tail::{Differs, TailError};
use crate::tree::Root;

/// No log is larger: Dovecot begins a new one long before.
const LOG_MAX: u64 = 64 << 20;
/// A message that is larger is not taken into memory, but kept.
const MESSAGE_MAX: u64 = 1 << 29;
const LOG: &[u8] = b"dovecot.index.log";

/// Where a message is.
#[derive(Clone)]
struct Held {
    file: RelPath,
    message: Message,
    /// Owner and mode are the file's.
    entry: Entry,
    whole: bool,
}

/// A mailbox that was changed.
#[derive(Default)]
struct Mailbox {
    index: Option<u32>,
    said: Said,
    /// Nobody can tell from its log what was done.
    is_unknown: bool,
    /// At the fork it had this name, and another mailbox has it now.
    stands_for: Option<RelPath>,
    /// Index that the mailbox of this name had at the fork, when another one has the name now.
    was_index: Option<u32>,
    /// sdbox: messages that came, by UID.
    files: BTreeMap<u32, Held>,
    /// sdbox: messages that went.
    gone: BTreeSet<u32>,
}

struct Reader<'a> {
    all: &'a BTreeMap<RelPath, Differs>,
    moves: BTreeMap<&'a RelPath, &'a RelPath>,
    root: &'a Root,
}

/// Of dbox, as items that are not decided on but for what cannot be merged.
pub(super) fn dbox(all: &BTreeMap<RelPath, Differs>, tail: &Tail, root: &Root) -> Result<Boxes, TailError> {
    let reader = Reader { all, moves: folder_moves(tail), root };
    let mut mailboxes: BTreeMap<(RelPath, RelPath), Mailbox> = BTreeMap::new();
    let mut stores: BTreeSet<RelPath> = BTreeSet::new();
    let mut items = vec![];
    for (path, it) in all {
        let Some(dir) = path.parent() else { continue };
        if dir.name() == STORAGE && path.name().starts_with(b"m.") {
            stores.extend(dir.parent());
            continue;
        }
        let Some((owner, name)) = boxes::place(path).filter(|_| dir.name() == MAILS) else { continue };
        if !reader.is_mailbox(&dir) {
            // Alternative storage has what was elsewhere; what is new here belongs to indexes that are not here.
            let new = it.ours.as_ref().filter(|_| it.fork.is_none()).and_then(|(entry, _)| entry.hash());
            if boxes::is_message(path) && new.is_some_and(|hash| !reader.was_here(hash)) {
                items.push(kept(What::Message, path.clone(), "the indexes of its mailbox are not kept beside it"));
            }
            continue;
        }
        if let Some(uid) = boxes::uid(path) {
            reader.file((&owner, &name), path, uid, it, &mut mailboxes)?;
        } else if path.name() == LOG && it.ours.is_some() {
            let mailbox = mailboxes.entry((owner, name)).or_default();
            reader.log(path, mailbox)?;
        }
    }
    let mut found: HashMap<RelPath, BTreeMap<Vec<u8>, Held>> = HashMap::new();
    for owner in stores {
        let held = reader.storage(&owner, true)?;
        found.insert(owner, held);
    }
    // A mailbox that has another name now, while a new one has its own: what it was is in its log.
    let stand: Vec<(RelPath, RelPath, Option<u32>)> =
        mailboxes.iter().filter_map(|((owner, _), it)| Some((owner.clone(), it.stands_for.clone()?, it.index))).collect();
    for (owner, was, index) in stand {
        let dir = mails_dir(&owner, &was);
        let log = reader.whole(&join(&dir, &[LOG]), LOG_MAX)?.unwrap_or_default();
        let older = reader.whole(&join(&dir, &[b"dovecot.index.log.2"]), LOG_MAX)?;
        let mailbox = mailboxes.entry((owner, was)).or_default();
        if let (true, Ok(said)) = (mailbox.is_unknown, Said::since(&log, older.as_deref(), None)) {
            (mailbox.said, mailbox.is_unknown) = (said, false);
        }
        mailbox.was_index = index;
    }
    let mut owners: BTreeMap<RelPath, Vec<(RelPath, Mailbox)>> = BTreeMap::new();
    for ((owner, name), mailbox) in mailboxes {
        owners.entry(owner).or_default().push((name, mailbox));
    }
    for (owner, held) in &found {
        if !held.is_empty() && !owners.contains_key(owner) {
            items.push(kept(
                What::File,
                join(owner, &[STORAGE]),
                "messages came, and the indexes of their mailboxes are not kept beside it",
            ));
        }
    }
    for (owner, mailboxes) in owners {
        let is_mdbox = root.stat(&join(&owner, &[STORAGE])).ok().flatten().is_some();
        if is_mdbox {
            reader.mdbox(&owner, &mailboxes, found.get(&owner), &mut items)?;
        } else {
            reader.sdbox(&owner, &mailboxes, &mut items);
        }
    }
    Ok(Boxes { items, ..Boxes::default() })
}

/// Where a dbox mailbox has its messages and its index.
fn mails_dir(owner: &RelPath, name: &RelPath) -> RelPath {
    join(&boxes::mailbox_dir(owner, name), &[MAILS])
}

impl Reader<'_> {
    fn disk<T>(&self, path: &RelPath, done: Result<T, Errno>) -> Result<T, TailError> {
        done.map_err(|source| TailError::Disk { path: path.clone(), source })
    }

    fn open(&self, path: &RelPath) -> Result<File, TailError> {
        Ok(File::from(self.disk(path, self.root.file(path))?))
    }

    fn whole(&self, path: &RelPath, most: u64) -> Result<Option<Vec<u8>>, TailError> {
        let file = match self.root.file(path) {
            Ok(file) => File::from(file),
            // What is no file is none.
            Err(Errno::NOENT | Errno::LOOP | Errno::NXIO) => return Ok(None),
            Err(source) => return Err(TailError::Disk { path: path.clone(), source }),
        };
        let read = || {
            let mut bytes = vec![0; file.metadata()?.len().min(most) as usize];
            file.read_exact_at(&mut bytes, 0)?;
            Ok(bytes)
        };
        let read = read().map_err(|error: std::io::Error| Errno::from_io_error(&error).unwrap_or(Errno::IO));
        self.disk(path, read).map(Some)
    }

    /// Where a path was at the fork.
    fn at_fork(&self, path: &RelPath) -> RelPath {
        before(&self.moves, path).unwrap_or_else(|| path.clone())
    }

    /// What both had under a path of now.
    fn fork(&self, path: &RelPath) -> Option<&Entry> {
        self.all.get(&self.at_fork(path)).and_then(|it| it.fork.as_ref()).map(|row| &row.entry)
    }

    /// Whether a file of this content went somewhere.
    fn was_here(&self, hash: ContentHash) -> bool {
        self.all.values().any(|it| it.ours.is_none() && it.fork.as_ref().is_some_and(|row| row.entry.hash() == Some(hash)))
    }

    /// Alternative storage has directories of messages, too, but no indexes.
    fn is_mailbox(&self, dir: &RelPath) -> bool {
        let log = join(dir, &[LOG]);
        self.all.contains_key(&log) || self.root.stat(&log).is_ok_and(|stat| stat.is_some())
    }

    fn file(
        &self,
        (owner, name): (&RelPath, &RelPath),
        path: &RelPath,
        uid: u32,
        it: &Differs,
        mailboxes: &mut BTreeMap<(RelPath, RelPath), Mailbox>,
    ) -> Result<(), TailError> {
        match (&it.fork, &it.ours) {
            (_, Some((entry, _))) if entry.hash().is_some() && self.fork(path).is_none_or(|fork| fork.kind != entry.kind) => {
                let mailbox = mailboxes.entry((owner.clone(), name.clone())).or_default();
                let file = self.open(path)?;
                let found = dbox::messages(&file, 0).ok().and_then(|(all, _)| all.into_iter().next());
                // One that is no message stays a file, which is kept.
                if let Some(message) = found {
                    if it.fork.is_some() {
                        mailbox.gone.insert(uid); // Another mailbox has that name: its numbers begin anew.
                    }
                    mailbox.files.insert(uid, Held { file: path.clone(), message, entry: entry.clone(), whole: true });
                }
            }
            (Some(_), None) => {
                let now = self.moves.iter().find_map(|(to, from)| path.rebase(from, to));
                let now = now.unwrap_or_else(|| path.clone());
                let there = self.all.get(&now).is_some_and(|it| it.ours.is_some());
                if let Some((owner, name)) = boxes::place(&now).filter(|_| !there) {
                    mailboxes.entry((owner, name)).or_default().gone.insert(uid);
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// What was appended to a mailbox's log, or to the one before it.
    fn log(&self, path: &RelPath, mailbox: &mut Mailbox) -> Result<(), TailError> {
        let Some(now) = self.whole(path, LOG_MAX)? else { return Ok(()) };
        let older = match path.parent().and_then(|dir| dir.join(b"dovecot.index.log.2")) {
            Some(older) => self.whole(&older, LOG_MAX)?,
            None => None,
        };
        let fork = self.fork(path).and_then(|entry| Some((entry.size(), entry.hash()?)));
        // It may be another mailbox's of the fork, whose name a new one has.
        let (fork, stands_for) = match fork {
            Some(fork) => (Some(fork), None),
            None => self.log_of_the_fork(path, &now).map_or((None, None), |(name, fork)| (Some(fork), Some(name))),
        };
        match Said::since(&now, older.as_deref(), fork) {
            Ok(said) => (mailbox.said, mailbox.index, mailbox.stands_for) = (said, index_id(&now), stands_for),
            Err(_) => mailbox.is_unknown = true,
        }
        Ok(())
    }

    /// Of which mailbox of the same owner a log was, at the fork.
    fn log_of_the_fork(&self, path: &RelPath, now: &[u8]) -> Option<(RelPath, (u64, ContentHash))> {
        let (owner, _) = boxes::place(path)?;
        self.all.iter().filter(|(other, it)| other.name() == LOG && it.ours.is_some() && other.is_within(&owner)).find_map(|(other, it)| {
            let row = it.fork.as_ref()?;
            let fork = (row.entry.size(), row.entry.hash()?);
            let (_, name) = boxes::place(other).filter(|(of, _)| *of == owner && fork.0 > 0 && begins(now, fork))?;
            Some((name, fork))
        })
    }

    /// Messages of mdbox by GUID: those that were written after the fork, or all.
    fn storage(&self, owner: &RelPath, after: bool) -> Result<BTreeMap<Vec<u8>, Held>, TailError> {
        let mut found = BTreeMap::new();
        let dir = join(owner, &[STORAGE]);
        let fd = match self.root.dir_for_reading(&dir) {
            Ok(fd) => fd,
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(found),
            Err(source) => return Err(TailError::Disk { path: dir, source }),
        };
        let listed = crate::tree::list(std::os::fd::AsFd::as_fd(&fd));
        for item in self.disk(&dir, listed)? {
            let is_file = item.kind == rustix::fs::FileType::RegularFile && item.name.starts_with(b"m.");
            let Some(path) = dir.join(&item.name).filter(|_| is_file) else { continue };
            let it = self.all.get(&path);
            let Some(entry) = it.and_then(|it| it.ours.as_ref().map(|(entry, _)| entry.clone())).or_else(|| {
                let stat = self.root.stat(&path).ok().flatten().filter(|_| !after)?;
                super::tail::unread(&stat)
            }) else {
                continue;
            };
            let from = it.and_then(|it| it.fork.as_ref()).map_or(0, |row| row.entry.size());
            let Ok((messages, _)) = dbox::messages(&self.open(&path)?, if after { from } else { 0 }) else { continue };
            for message in messages {
                let held = Held { file: path.clone(), entry: entry.clone(), whole: false, message };
                found.insert(held.message.guid.clone(), held);
            }
        }
        Ok(found)
    }

    /// A message that came, with its bytes as the other node is sent them.
    fn message(&self, owner: &RelPath, mailbox: &RelPath, path: RelPath, held: &Held, flags: Flags) -> Item {
        let Held { file, message, entry, whole } = held;
        let part = Part { file: file.clone(), bytes: message.bytes.clone(), is_mbox: false, whole: whole.then(|| entry.hash()).flatten() };
        let why = message.is_split.then_some("its attachments are kept in other files");
        let mtime = message.received.map_or(entry.mtime, |secs| Time { secs, nanos: 0 });
        self.sent(owner, mailbox, path, part, flags, &Entry { mtime, ..entry.clone() }, why)
    }

    /// The same; `why`: it cannot be.
    #[allow(clippy::too_many_arguments)]
    fn sent(&self, owner: &RelPath, mailbox: &RelPath, path: RelPath, part: Part, flags: Flags, entry: &Entry, why: Option<&str>) -> Item {
        let why = why.or_else(|| (part.bytes.end - part.bytes.start > MESSAGE_MAX).then_some("it is too large"));
        let item = Item { what: What::Message, path, from: None, outcome: Outcome::Merge, merge: None, part: Some(part.clone()) };
        let bytes = match why {
            None => bytes(self.root, &part).ok_or("it cannot be read, or is encrypted or packed in a way that only its mail server knows"),
            Some(why) => Err(why),
        };
        match bytes {
            Err(why) => Item { outcome: Outcome::Rescue { why: why.into() }, ..item },
            Ok(bytes) => {
                let print = fingerprint(&bytes);
                let kind = Kind::File { size: bytes.len() as u64, hash: ContentHash::of(&bytes) };
                let entry = Entry { kind, xattrs: vec![], ..entry.clone() };
                let task = Task::Import { mailbox: mailbox.clone(), flags: some(&flags), entry, print };
                Item { merge: Some(Merge::Server { owner: owner.clone(), task }), ..item }
            }
        }
    }

    fn marked(
        &self,
        owner: &RelPath,
        name: &RelPath,
        mailbox: &Mailbox,
        label: impl Fn(u32) -> RelPath,
        but: &BTreeSet<u32>,
        items: &mut Vec<Item>,
    ) {
        let Some(index) = mailbox.index else { return };
        let old = |uid: &u32| !mailbox.said.came.contains(uid) && !mailbox.files.contains_key(uid) && !but.contains(uid);
        for (uid, marked) in mailbox.said.marked.iter().filter(|(uid, _)| old(uid)) {
            // To be deleted is not repeated, like deletions.
            let (set, clear) = (some(&marked.set), some(&marked.clear));
            if set.is_empty() && clear.is_empty() {
                continue;
            }
            let at = Place { mailbox: name.clone(), index, uid: *uid };
            let merge = Some(Merge::Server { owner: owner.clone(), task: Task::Flags { at, set, clear } });
            items.push(Item { what: What::Flags, path: label(*uid), from: None, outcome: Outcome::Merge, merge, part: None });
        }
    }

    fn sdbox(&self, owner: &RelPath, mailboxes: &[(RelPath, Mailbox)], items: &mut Vec<Item>) {
        let label = |name: &RelPath, uid: u32| join(&mails_dir(owner, name), &[format!("u.{uid}").as_bytes()]);
        let content = |path: &RelPath| self.all.get(&self.at_fork(path)).and_then(|it| it.fork.as_ref()?.entry.hash());
        // A message that is moved is the same file under another name.
        let mut went: HashMap<ContentHash, Vec<(&RelPath, &Mailbox, u32)>> = HashMap::new();
        for (name, mailbox) in mailboxes {
            for uid in &mailbox.gone {
                if let Some(hash) = content(&label(name, *uid)) {
                    went.entry(hash).or_default().push((name, mailbox, *uid));
                }
            }
        }
        let mut moved: BTreeSet<(&RelPath, u32)> = BTreeSet::new();
        for (name, mailbox) in mailboxes {
            for (uid, held) in &mailbox.files {
                let from = held.entry.hash().and_then(|hash| went.get_mut(&hash)?.pop());
                let flags = mailbox.said.flags_now(*uid);
                match from {
                    Some((was, of, old)) => {
                        moved.insert((was, old));
                        let sent = self.message(owner, name, label(name, *uid), held, flags);
                        items.push(moved_item(
                            (was, of, old),
                            (name, mailbox, *uid),
                            sent,
                            self.at_fork(&label(was, old)),
                            &held.message.guid,
                        ));
                    }
                    None => items.push(self.message(owner, name, label(name, *uid), held, flags)),
                }
            }
        }
        for (name, mailbox) in mailboxes {
            for uid in mailbox.gone.iter().filter(|uid| !moved.contains(&(name, **uid))) {
                items.push(deleted(self.at_fork(&label(name, *uid))));
            }
            self.marked(owner, name, mailbox, |uid| label(name, uid), &mailbox.gone, items);
            items.extend(mailbox.is_unknown.then(|| unknown(owner, name, "of its messages' flags nothing is known")));
        }
    }

    fn mdbox(
        &self,
        owner: &RelPath,
        mailboxes: &[(RelPath, Mailbox)],
        fresh: Option<&BTreeMap<Vec<u8>, Held>>,
        items: &mut Vec<Item>,
    ) -> Result<(), TailError> {
        let label = |name: &RelPath, uid: u32| join(&mails_dir(owner, name), &[format!("UID {uid}").as_bytes()]);
        let mut went: HashMap<&[u8], Vec<(&RelPath, &Mailbox, u32)>> = HashMap::new();
        for (name, mailbox) in mailboxes {
            for (uid, guid) in mailbox.said.went.iter().filter(|(uid, _)| !mailbox.said.came.contains(uid)) {
                went.entry(guid).or_default().push((name, mailbox, *uid));
            }
        }
        let mut all: Option<BTreeMap<Vec<u8>, Held>> = None;
        let mut moved: BTreeSet<(&RelPath, u32)> = BTreeSet::new();
        for (name, mailbox) in mailboxes {
            for uid in mailbox.said.came.iter().filter(|uid| !mailbox.said.went.contains_key(uid)) {
                let flags = mailbox.said.flags_now(*uid);
                let guid = mailbox.said.guids.get(uid).cloned().unwrap_or_default();
                // A purge writes old messages anew: one that went elsewhere is no new one.
                let from = went.get_mut(guid.as_slice()).filter(|_| !guid.is_empty()).and_then(Vec::pop);
                let held = match fresh.and_then(|fresh| fresh.get(&guid)) {
                    Some(held) => Some(held.clone()),
                    // A copy of an older one, or one that was moved.
                    None => match &mut all {
                        Some(all) => all.get(&guid).cloned(),
                        none => none.insert(self.storage(owner, false)?).get(&guid).cloned(),
                    },
                };
                let sent = match &held {
                    Some(held) => self.message(owner, name, label(name, *uid), held, flags),
                    None => {
                        let outcome = Outcome::Rescue { why: "its bytes are not in the storage that is here, all of which is kept".into() };
                        Item { what: What::Message, path: label(name, *uid), from: None, outcome, merge: None, part: None }
                    }
                };
                items.push(match from {
                    Some((was, of, old)) => {
                        moved.insert((was, old));
                        moved_item((was, of, old), (name, mailbox, *uid), sent, label(was, old), &guid)
                    }
                    None => sent,
                });
            }
        }
        for (name, mailbox) in mailboxes {
            let gone: BTreeSet<u32> = mailbox.said.went.keys().copied().collect();
            for uid in gone.iter().filter(|uid| !mailbox.said.came.contains(uid) && !moved.contains(&(name, **uid))) {
                items.push(deleted(label(name, *uid)));
            }
            self.marked(owner, name, mailbox, |uid| label(name, uid), &gone, items);
            items.extend(mailbox.is_unknown.then(|| unknown(owner, name, "look into its storage, all of which is kept")));
        }
        Ok(())
    }
}

/// A log of which nobody knows what it said.
fn unknown(owner: &RelPath, name: &RelPath, so: &str) -> Item {
    let why = format!("this log does not go on from what both had: {so}");
    let path = join(&mails_dir(owner, name), &[LOG]);
    Item { what: What::File, path, from: None, outcome: Outcome::Rescue { why }, merge: None, part: None }
}

/// Of a message's flags those that are told; to be deleted is not, like deletions. No more than fit.
fn some(flags: &BTreeSet<String>) -> Flags {
    flags.iter().filter(|flag| *flag != "T").take(FLAGS_MAX).cloned().collect()
}

/// A message that was moved: `sent` is how it would be given as a new one. Where the other node has deleted it, that stands, and this one is kept.
fn moved_item(
    (was, of, uid): (&RelPath, &Mailbox, u32),
    (to, into, now): (&RelPath, &Mailbox, u32),
    sent: Item,
    from: RelPath,
    guid: &[u8],
) -> Item {
    let print = sent.print();
    let item = Item { what: What::Move, from: Some(from), ..sent };
    let (Some(index), Some(print), Some(Merge::Server { owner, .. })) = (of.was_index.or(of.index), print, &item.merge) else {
        return item;
    };
    let (mut set, mut clear) = (Flags::new(), Flags::new());
    for marked in [of.said.marked.get(&uid), into.said.marked.get(&now)].into_iter().flatten() {
        set = set.difference(&marked.clear).cloned().chain(marked.set.iter().cloned()).collect();
        clear = clear.difference(&marked.set).cloned().chain(marked.clear.iter().cloned()).collect();
    }
    let at = Place { mailbox: was.clone(), index, uid };
    let task =
        Task::Move { at, to: to.clone(), print, guid: String::from_utf8_lossy(guid).into_owned(), set: some(&set), clear: some(&clear) };
    let merge = Some(Merge::Server { owner: owner.clone(), task });
    Item { merge, ..item }
}

/// What a person has to look at.
fn kept(what: What, path: RelPath, why: &str) -> Item {
    Item { what, path, from: None, outcome: Outcome::Rescue { why: why.into() }, merge: None, part: None }
}

fn deleted(path: RelPath) -> Item {
    let outcome = stays("deletions are not repeated: mail comes back rather than vanishes");
    Item { what: What::Deletion, path, from: None, outcome, merge: None, part: None }
}

fn stays(why: &str) -> Outcome {
    Outcome::Stays { why: why.into() }
}

/// The bytes of a message within a file, as they are sent.
pub(super) fn bytes(root: &Root, part: &Part) -> Option<Vec<u8>> {
    let file = File::from(root.file(&part.file).ok()?);
    let mut bytes = vec![0; usize::try_from(part.bytes.end.checked_sub(part.bytes.start)?).ok()?];
    file.read_exact_at(&mut bytes, part.bytes.start).ok()?;
    Some(canonical(&if part.is_mbox { mbox::stripped(&bytes) } else { unpacked(bytes, MESSAGE_MAX)? }))
}

/// Whose mailbox files lie in a directory: the topmost one above it, or itself, that has a directory of indexes.
pub(super) fn mbox_owner(root: &Root, dir: &RelPath, known: &mut HashMap<RelPath, bool>) -> Option<RelPath> {
    let mut above: Vec<RelPath> = std::iter::successors(Some(dir.clone()), RelPath::parent).collect();
    above.reverse();
    let has = |dir: &RelPath| dir.join(INDEXES).is_some_and(|indexes| root.dir_for_reading(&indexes).is_ok());
    above.into_iter().find(|dir| *known.entry(dir.clone()).or_insert_with(|| has(dir)))
}

/// A message of an mbox file that may have come after the fork.
struct Candidate {
    owner: RelPath,
    mailbox: RelPath,
    at_fork: RelPath,
    file: RelPath,
    uid: u32,
    print: ContentHash,
    flags: Flags,
    part: Part,
    entry: Entry,
}

impl Candidate {
    fn ask(&self) -> Ask {
        Ask::Mail { owner: self.owner.clone(), mailbox: self.at_fork.clone(), print: self.print }
    }
}

/// What mbox files and their indexes say. There a message has no name: whether it came after the fork is known once it is known what the other node has.
pub(super) struct Mboxes {
    boxes: Boxes,
    mailboxes: BTreeMap<(RelPath, RelPath), Mailbox>,
    /// Names of now, by those of the fork.
    now: HashMap<(RelPath, RelPath), RelPath>,
    candidates: Vec<Candidate>,
}

/// The mailbox file that has its indexes in a directory.
fn mbox_file(owner: &RelPath, index: &RelPath) -> Option<RelPath> {
    index.parent()?.parent()?.join(index.name()).filter(|file| file.is_within(owner))
}

/// Reads them.
pub(super) fn mboxes(all: &BTreeMap<RelPath, Differs>, tail: &Tail, root: &Root) -> Result<Mboxes, TailError> {
    let reader = Reader { all, moves: folder_moves(tail), root };
    let mut owners = HashMap::new();
    let mut read = Mboxes { boxes: Boxes::default(), mailboxes: BTreeMap::new(), now: HashMap::new(), candidates: vec![] };
    for (path, it) in all {
        let is_dir =
            [it.ours.as_ref().map(|(entry, _)| entry), it.fork.as_ref().map(|row| &row.entry)].into_iter().flatten().any(Entry::is_dir);
        let Some(owner) = path.parent().and_then(|dir| mbox_owner(root, &dir, &mut owners)) else { continue };
        let Some(name) = boxes::mbox_name(&owner, path) else { continue };
        let in_indexes = path.as_bytes().split(|byte| *byte == b'/').any(|part| part == INDEXES);
        if is_dir {
            read.boxes.places.insert(path.clone(), (owner, name));
        } else if in_indexes {
            read.boxes.own.insert(path.clone());
        } else if path.name() != b"subscriptions" {
            reader.mbox(&mut read, path, it, owner, name)?;
        }
    }
    Ok(read)
}

impl Mboxes {
    /// What has to be known of the other node.
    pub(super) fn questions(&self) -> BTreeSet<Ask> {
        self.candidates.iter().map(Candidate::ask).collect()
    }

    /// As items.
    pub(super) fn items(self, all: &BTreeMap<RelPath, Differs>, tail: &Tail, root: &Root, theirs: &Theirs) -> Boxes {
        let reader = Reader { all, moves: folder_moves(tail), root };
        let Mboxes { mut boxes, mailboxes, now, candidates } = self;
        let mut moved: BTreeSet<((RelPath, RelPath), u32)> = BTreeSet::new();
        for it in &candidates {
            let label = join(&it.file, &[format!("UID {}", it.uid).as_bytes()]);
            let found = theirs.get(&it.ask()).and_then(|found| {
                let uid = std::str::from_utf8(found.path.name().strip_prefix(b"UID ")?).ok()?.parse::<u32>().ok()?;
                Some((boxes::mbox_name(&it.owner, &found.path.parent()?)?, uid))
            });
            match found {
                // Both have it.
                Some((name, _)) if name == it.at_fork => continue,
                Some((name, uid)) => {
                    let there = (it.owner.clone(), now.get(&(it.owner.clone(), name.clone())).cloned().unwrap_or(name));
                    let of = mailboxes.get(&there).filter(|of| of.said.went.contains_key(&uid) && !moved.contains(&(there.clone(), uid)));
                    if let Some(of) = of {
                        moved.insert((there.clone(), uid));
                        let from = boxes::mbox_index(&there.0, &there.1).unwrap_or_default();
                        let from = join(&from, &[format!("UID {uid}").as_bytes()]);
                        let sent = reader.sent(&it.owner, &it.mailbox, label, it.part.clone(), it.flags.clone(), &it.entry, None);
                        let here = mailboxes.get(&(it.owner.clone(), it.mailbox.clone()));
                        let none = Mailbox::default();
                        boxes.items.push(moved_item((&there.1, of, uid), (&it.mailbox, here.unwrap_or(&none), it.uid), sent, from, b""));
                        continue;
                    }
                }
                None => {}
            }
            boxes.items.push(reader.sent(&it.owner, &it.mailbox, label, it.part.clone(), it.flags.clone(), &it.entry, None));
        }
        for ((owner, name), mailbox) in &mailboxes {
            let dir = boxes::mbox_index(owner, name).unwrap_or_default();
            let label = |uid: u32| join(&dir, &[format!("UID {uid}").as_bytes()]);
            let gone: BTreeSet<u32> = mailbox.said.went.keys().copied().collect();
            let here = (owner.clone(), name.clone());
            for uid in gone.iter().filter(|uid| !mailbox.said.came.contains(uid) && !moved.contains(&(here.clone(), **uid))) {
                boxes.items.push(deleted(label(*uid)));
            }
            reader.marked(owner, name, mailbox, label, &gone, &mut boxes.items);
            if mailbox.is_unknown {
                boxes.items.push(kept(
                    What::File,
                    join(&dir, &[LOG]),
                    "this log does not go on from what both had: of flags and deletions nothing is known",
                ));
            }
        }
        boxes
    }
}

impl Reader<'_> {
    fn mbox(&self, read: &mut Mboxes, path: &RelPath, it: &Differs, owner: RelPath, name: RelPath) -> Result<(), TailError> {
        let Some(index) = boxes::mbox_index(&owner, &name) else { return Ok(()) };
        let index_was = self.at_fork(&index);
        let was = if index_was == index { path.clone() } else { mbox_file(&owner, &index_was).unwrap_or_else(|| path.clone()) };
        let Some((entry, _)) = &it.ours else {
            // It went, with its indexes or to another name.
            if it.fork.as_ref().is_some_and(|row| row.entry.hash().is_some()) && self.all.get(&index).is_some_and(|it| it.ours.is_none()) {
                read.boxes.own.insert(path.clone());
                let moved = self.moves.values().any(|from| index.is_within(from));
                if !moved {
                    let outcome = stays("deletions are not repeated: mail comes back rather than vanishes");
                    read.boxes.items.push(Item {
                        what: What::FolderDeletion,
                        path: path.clone(),
                        from: None,
                        outcome,
                        merge: None,

                        part: None,
                    });
                }
            }
            return Ok(());
        };
        if entry.hash().is_none() {
            return Ok(());
        }
        let file = self.open(path)?;
        let failed =
            |error: std::io::Error| TailError::Disk { path: path.clone(), source: Errno::from_io_error(&error).unwrap_or(Errno::IO) };
        let found = match mbox::messages(&file, 0) {
            Err(error) if error.kind() == std::io::ErrorKind::InvalidData => return Ok(()), // A file like others.
            other => other.map_err(failed)?,
        };
        read.boxes.own.insert(path.clone());
        if was != *path {
            read.boxes.moved.insert(path.clone(), was.clone());
        }
        let fork = self.all.get(&was).and_then(|it| it.fork.as_ref()).map(|row| row.entry.clone());
        if fork.is_none() && was == *path {
            let merge = Some(Merge::Server { owner: owner.clone(), task: Task::Create { mailbox: name.clone() } });
            read.boxes.items.push(Item { what: What::Folder, path: path.clone(), from: None, outcome: Outcome::Merge, merge, part: None });
        }
        let mut mailbox = Mailbox::default();
        let log = join(&index, &[LOG]);
        if self.all.get(&log).is_some_and(|it| it.ours.is_some()) {
            self.log(&log, &mut mailbox)?;
        }
        let at_fork = boxes::mbox_name(&owner, &index_was).unwrap_or_else(|| name.clone());
        read.now.insert((owner.clone(), at_fork.clone()), name.clone());
        self.candidates(read, (&owner, &name, at_fork), path, (&file, entry), &found, &mailbox, fork.is_none());
        read.mailboxes.insert((owner, name), mailbox);
        Ok(())
    }

    #[allow(clippy::too_many_arguments)]
    fn candidates(
        &self,
        read: &mut Mboxes,
        (owner, name, at_fork): (&RelPath, &RelPath, RelPath),
        path: &RelPath,
        (file, entry): (&File, &Entry),
        found: &[mbox::Message],
        mailbox: &Mailbox,
        all: bool,
    ) {
        let said = &mailbox.said;
        let first = said.came.first().copied();
        let is_old = |uid: u32| !said.came.contains(&uid) && first.is_none_or(|first| uid < first);
        // Those that are not numbered yet got the last numbers, in order.
        let numbered: BTreeSet<u32> = found.iter().filter_map(|message| message.uid).collect();
        let free: Vec<u32> = said.came.iter().copied().filter(|uid| !numbered.contains(uid) && !said.went.contains_key(uid)).collect();
        let unnumbered = found.iter().filter(|message| message.uid.is_none()).count();
        let known = free.len() == unnumbered;
        let mut free = free.into_iter();
        for message in found {
            if message.uid.is_some_and(|uid| is_old(uid) && !all && !mailbox.is_unknown) {
                continue;
            }
            let uid = message.uid.or_else(|| free.next().filter(|_| known));
            let part = Part { file: path.clone(), bytes: message.bytes.clone(), is_mbox: true, whole: None };
            let mut bytes = vec![0; usize::try_from(message.bytes.end - message.bytes.start).unwrap_or(0).min(MESSAGE_MAX as usize)];
            if file.read_exact_at(&mut bytes, message.bytes.start).is_err() {
                continue;
            }
            let mut flags: Flags = message.flags.iter().filter(|flag| *flag != "T").cloned().collect();
            if let Some(uid) = uid {
                flags.extend(said.flags_now(uid).into_iter().filter(|flag| flag != "T"));
                flags.retain(|flag| !said.marked.get(&uid).is_some_and(|marked| marked.clear.contains(flag)));
            }
            let mut entry = entry.clone();
            entry.mtime = message.received.map_or(entry.mtime, |secs| Time { secs, nanos: 0 });
            read.candidates.push(Candidate {
                owner: owner.clone(),
                mailbox: name.clone(),
                at_fork: at_fork.clone(),
                file: path.clone(),
                uid: uid.unwrap_or(0),
                print: fingerprint(&mbox::stripped(&bytes)),
                flags,
                part,
                entry,
            });
        }
    }
}
