//! What only the mail server may do in its own formats, done by the operator's program (`[hooks] merge`): messages taken in, flags, moved messages, folders.
//!
//! A message is handed over as a Maildir with one message in it (folders as directories), which every mail server can import. Nothing is taken in twice: what is in a mailbox since the fork is known by its bytes.
//! Nor is the program's word enough: what it says is done is looked for on disk.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::sync::PoisonError;
use std::time::{Duration, UNIX_EPOCH};

use rustix::fs::{self as rfs, FileType, Mode, OFlags};
use rustix::io::Errno;
use twinbox_protocol::entry::Entry;
use twinbox_protocol::ids::ContentHash;
use twinbox_protocol::path::RelPath;
use twinbox_protocol::rejoin::{Flags, Merged, Place, Task};
use twinbox_resync::boxes::log::{Said, index_id};
use twinbox_resync::boxes::{self, INDEXES, MAILS, STORAGE, dbox, fingerprint, folder_name, join, mailbox_dir, mbox, unpacked};
use twinbox_resync::manifest::Manifest;
use twinbox_resync::rows::Rows;

use super::store::{Lent, StoreError, kept};
use crate::hooks::{Hook, Tool};
use crate::layout::{Layout, OWN_PREFIX};
use crate::tree::{self, Root};

/// No log is larger: Dovecot begins a new one long before.
const LOG_MAX: u64 = 64 << 20;
/// A message that is larger is no mail.
const MESSAGE_MAX: u64 = 1 << 29;

/// Messages of a mailbox that were not there at the fork.
#[derive(Default)]
struct Fresh {
    /// Of sdbox: files that were looked at. Of mdbox: up to where.
    read: HashMap<RelPath, u64>,
    seen: HashSet<ContentHash>,
}

/// See the module's text.
pub(super) struct Program {
    lent: Lent,
    /// By where they are, and the mailbox (mdbox: any).
    fresh: BTreeMap<RelPath, HashMap<Vec<u8>, Fresh>>,
    /// By whose they are; as they were when first asked for.
    mboxes: HashMap<RelPath, Mboxes>,
}

fn disk(path: &RelPath) -> impl Fn(Errno) -> StoreError {
    let path = path.clone();
    move |source| StoreError::Disk { path: path.clone(), source }
}

fn os(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

/// The file of an mbox mailbox.
fn mbox_file(root: &Root, owner: &RelPath, mailbox: &RelPath) -> RelPath {
    let names: Vec<&[u8]> = mailbox.as_bytes().split(|byte| *byte == b'/').collect();
    let file = join(owner, &names);
    if mailbox.as_bytes() != b"INBOX" || root.stat(&file).is_ok_and(|stat| stat.is_some()) {
        return file;
    }
    let listed = root.dir_for_reading(owner).and_then(|dir| tree::list(dir.as_fd())).unwrap_or_default();
    listed.into_iter().find(|item| item.name.eq_ignore_ascii_case(b"inbox")).and_then(|item| owner.join(&item.name)).unwrap_or(file)
}

impl Program {
    pub(super) fn new(lent: &Lent) -> Self {
        Program { lent: lent.clone(), fresh: BTreeMap::new(), mboxes: HashMap::new() }
    }

    fn tool(&self) -> Option<Tool> {
        self.lent.tool.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether there is one.
    pub(super) fn is_there(&self) -> bool {
        self.tool().is_some()
    }

    /// Has a task done. Blocks, in a thread that may.
    pub(super) fn run(
        &mut self,
        root: &Root,
        manifest: &Manifest,
        owner: &RelPath,
        task: &Task,
        bytes: Option<&File>,
    ) -> Result<Merged, StoreError> {
        let Some(tool) = self.tool() else { return Ok(kept("that node has no [hooks] merge program")) };
        let exists = |mailbox: &RelPath| {
            // A directory that others lie in is no mailbox yet.
            let place = if self.is_mbox() { mbox_file(root, owner, mailbox) } else { join(&mailbox_dir(owner, mailbox), &[MAILS]) };
            Ok::<_, StoreError>(root.stat(&place).map_err(disk(&place))?.is_some())
        };
        if let Some(why) = self.odd(owner, task) {
            return Ok(kept(why));
        }
        match task {
            Task::Import { mailbox, flags, entry, print } => {
                self.import(&tool, (root, manifest), (owner, mailbox), flags, (entry, *print), bytes)
            }
            Task::Flags { at, set, clear } => {
                if let Some(why) = self.is_another(root, owner, at)? {
                    return Ok(why);
                }
                self.mark(&tool, root, owner, at, set, clear)
            }
            Task::Move { at, to, print, guid, set, clear } => {
                self.shift(&tool, (root, manifest), owner, (at, to), (*print, guid), (set, clear))
            }
            Task::Rename { mailbox, to } => match (exists(mailbox)?, exists(to)?) {
                (false, true) => Ok(Merged::Already),
                (false, false) => Ok(kept("the folder is not there any more")),
                (true, true) => Ok(kept("there is a folder of the new name, too")),
                (true, false) => {
                    let done = self.ask(&tool, root, owner, "rename", mailbox, [("TWINBOX_TO", folder_name(to.as_bytes()).into())])?;
                    Ok(if done == Merged::Done && !exists(to)? {
                        kept("the merge program said that it is done, and the folder has its old name")
                    } else {
                        done
                    })
                }
            },
            Task::Create { mailbox } if exists(mailbox)? => Ok(Merged::Already),
            Task::Create { mailbox } => self.ask(&tool, root, owner, "create", mailbox, []),
        }
    }

    fn is_mbox(&self) -> bool {
        self.lent.selection.layout() == Layout::Mbox
    }

    /// Where a mailbox has its indexes.
    fn index(&self, owner: &RelPath, mailbox: &RelPath) -> RelPath {
        if self.is_mbox() { boxes::mbox_index(owner, mailbox).unwrap_or_default() } else { join(&mailbox_dir(owner, mailbox), &[MAILS]) }
    }

    /// What must not be handed to a program, or is not mirrored.
    fn odd(&self, owner: &RelPath, task: &Task) -> Option<&'static str> {
        let (mailbox, to, searched) = match task {
            Task::Import { mailbox, .. } | Task::Create { mailbox } => (mailbox, None, false),
            Task::Flags { at, .. } => (&at.mailbox, None, true),
            Task::Move { at, to, .. } => (&at.mailbox, Some(to), true),
            Task::Rename { mailbox, to } => (mailbox, Some(to), false),
        };
        let has = |path: &[u8], bytes: &[u8]| path.iter().any(|byte| bytes.contains(byte));
        let group = self.lent.grouping.group_of(owner.as_bytes(), true);
        if has(group, b"*?\"\\") || group.iter().any(u8::is_ascii_control) {
            return Some("its owner's name would be taken for those of others");
        }
        for name in std::iter::once(mailbox).chain(to) {
            let excluded =
                |dir: &RelPath| self.lent.selection.excludes(dir.as_bytes(), true) || self.lent.selection.excludes(dir.as_bytes(), false);
            let below = name.as_bytes().split(|byte| *byte == b'/').try_fold(owner.clone(), |at, part| at.join(part));
            if name.is_root() || below.is_none_or(|below| excluded(&below)) || excluded(&mailbox_dir(owner, name)) {
                return Some("it is not mirrored on this node");
            }
            // What the program makes of it must be this one.
            let said = folder_name(name.as_bytes());
            if said.chars().any(char::is_control) || boxes::disk_name(&said) != name.as_bytes() {
                return Some("that mailbox's name cannot be handed to a program");
            }
        }
        // doveadm's searches take these for any characters.
        (searched && has(mailbox.as_bytes(), b"*%")).then_some("that mailbox's name would be taken for those of others")
    }

    fn mark(&self, tool: &Tool, root: &Root, owner: &RelPath, at: &Place, set: &Flags, clear: &Flags) -> Result<Merged, StoreError> {
        let flags = |flags: &Flags| OsString::from(imap_flags(flags).join(" "));
        let (set, clear) = (flags(set), flags(clear));
        if set.is_empty() && clear.is_empty() {
            return Ok(Merged::Already);
        }
        if self.lent.selection.layout() == Layout::Sdbox {
            let file = join(&self.index(owner, &at.mailbox), &[format!("u.{}", at.uid).as_bytes()]);
            if root.stat(&file).map_err(disk(&file))?.is_none() {
                return Ok(kept("it was deleted meanwhile"));
            }
        }
        let more = [("TWINBOX_UID", at.uid.to_string().into()), ("TWINBOX_SET", set), ("TWINBOX_CLEAR", clear)];
        self.ask(tool, root, owner, "flags", &at.mailbox, more)
    }

    /// Moves a message. That it is in the other mailbox then is seen there: in sdbox and mbox by its bytes, in mdbox by its GUID in the mailbox's log.
    fn shift(
        &mut self,
        tool: &Tool,
        store: (&Root, &Manifest),
        owner: &RelPath,
        (at, to): (&Place, &RelPath),
        (print, guid): (ContentHash, &str),
        (set, clear): (&Flags, &Flags),
    ) -> Result<Merged, StoreError> {
        let arrived = |program: &mut Self| {
            Ok::<_, StoreError>(
                program.has_come(store.0, owner, to, guid)?
                    || program.lent.selection.layout() != Layout::Mdbox && program.is_in(store, owner, to, print)?,
            )
        };
        if arrived(self)? {
            return Ok(Merged::Already);
        }
        if let Some(why) = self.is_another(store.0, owner, at)? {
            return Ok(why);
        }
        if let kept @ Merged::Kept { .. } = self.mark(tool, store.0, owner, at, set, clear)? {
            return Ok(kept);
        }
        let more = [("TWINBOX_UID", at.uid.to_string().into()), ("TWINBOX_TO", folder_name(to.as_bytes()).into())];
        let done = self.ask(tool, store.0, owner, "move", &at.mailbox, more)?;
        if done == Merged::Done && !arrived(self)? {
            return Ok(kept("the merge program said that it is done, and the message is not in that mailbox"));
        }
        Ok(done)
    }

    /// Whether a mailbox's log says that a message of this GUID came, and is there.
    fn has_come(&self, root: &Root, owner: &RelPath, mailbox: &RelPath, guid: &str) -> Result<bool, StoreError> {
        let log = join(&self.index(owner, mailbox), &[b"dovecot.index.log"]);
        if guid.is_empty() || self.is_mbox() {
            return Ok(false);
        }
        let read = |path: &RelPath| {
            let file = match root.file(path) {
                Ok(file) => File::from(file),
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::NXIO) => return Ok(None),
                Err(source) => return Err(disk(path)(source)),
            };
            let mut bytes = vec![0; file.metadata().map_err(|error| disk(path)(os(&error)))?.len().min(LOG_MAX) as usize];
            file.read_exact_at(&mut bytes, 0).map_err(|error| disk(path)(os(&error)))?;
            Ok(Some(bytes))
        };
        let Some(now) = read(&log)? else { return Ok(false) };
        let older = read(&join(&self.index(owner, mailbox), &[b"dovecot.index.log.2"]))?;
        let said = Said::messages(&now, older.as_deref());
        Ok(said.came.iter().any(|uid| !said.went.contains_key(uid) && said.guids.get(uid).is_some_and(|came| came == guid.as_bytes())))
    }

    /// Another mailbox has the name by now, or none.
    fn is_another(&self, root: &Root, owner: &RelPath, at: &Place) -> Result<Option<Merged>, StoreError> {
        let log = join(&self.index(owner, &at.mailbox), &[b"dovecot.index.log"]);
        let mut head = vec![0; 64];
        let read = root.file(&log).map(File::from).and_then(|file| file.read_at(&mut head, 0).map_err(|error| os(&error)));
        match read {
            Ok(got) if index_id(&head[..got]) == Some(at.index) => Ok(None),
            Ok(_) => Ok(Some(kept("another mailbox has that name by now"))),
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::NXIO) => Ok(Some(kept("the mailbox is not there any more"))),
            Err(source) => Err(disk(&log)(source)),
        }
    }

    fn ask<const N: usize>(
        &self,
        tool: &Tool,
        root: &Root,
        owner: &RelPath,
        what: &str,
        mailbox: &RelPath,
        more: [(&'static str, OsString); N],
    ) -> Result<Merged, StoreError> {
        let group = self.lent.grouping.group_of(owner.as_bytes(), true);
        let mut environment = vec![
            ("TWINBOX_MIRROR", OsString::from(&self.lent.name)),
            ("TWINBOX_ROOT", self.lent.root.as_os_str().to_owned()),
            ("TWINBOX_MERGE", what.into()),
            ("TWINBOX_GROUP", OsStr::from_bytes(group).to_owned()),
            ("TWINBOX_MAILBOX", folder_name(mailbox.as_bytes()).into()),
        ];
        environment.extend(more);
        let ended = tokio::runtime::Handle::current().block_on(tool.run(Hook::Merge, &environment));
        match ended {
            Ok(()) => {
                // What is said to be done survives a power cut.
                rfs::syncfs(root.fd()).map_err(disk(owner))?;
                Ok(Merged::Done)
            }
            Err(error) => Ok(Merged::Kept { why: error.to_string() }),
        }
    }

    fn import(
        &mut self,
        tool: &Tool,
        store: (&Root, &Manifest),
        (owner, mailbox): (&RelPath, &RelPath),
        flags: &Flags,
        (entry, print): (&Entry, ContentHash),
        bytes: Option<&File>,
    ) -> Result<Merged, StoreError> {
        let Some(bytes) = bytes.filter(|_| entry.hash().is_some() && entry.size() <= MESSAGE_MAX) else {
            return Ok(kept("its bytes did not arrive"));
        };
        let mut message = vec![0; entry.size() as usize];
        bytes.read_exact_at(&mut message, 0).map_err(|error| disk(owner)(os(&error)))?;
        if fingerprint(&message) != print {
            return Ok(kept("other bytes than announced"));
        }
        if self.is_in(store, owner, mailbox, print)? {
            return Ok(Merged::Already);
        }
        let handed = self.maildir(mailbox, &message, flags, entry).map_err(|error| disk(owner)(os(&error)))?;
        let more = [("TWINBOX_MAILDIR", handed.path().as_os_str().to_owned())];
        let done = self.ask(tool, store.0, owner, "import", mailbox, more)?;
        if done == Merged::Done && !self.is_in(store, owner, mailbox, print)? {
            return Ok(kept("the merge program said that it is done, and the message is not in that mailbox"));
        }
        Ok(done)
    }

    /// A Maildir with this message, in the root under a name that is never mirrored; removed when it is dropped.
    ///
    /// It is nobody's else before it is whole: its owner gets the outermost directory last, and every step goes by descriptors.
    fn maildir(&self, mailbox: &RelPath, message: &[u8], flags: &Flags, entry: &Entry) -> std::io::Result<tempfile::TempDir> {
        let prefix = [OWN_PREFIX, b"import-"].concat();
        let handed = tempfile::Builder::new().prefix(OsStr::from_bytes(&prefix)).tempdir_in(&self.lent.root)?;
        let reading = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let owners = (Some(rfs::Uid::from_raw(entry.uid)), Some(rfs::Gid::from_raw(entry.gid)));
        let own = |fd: BorrowedFd<'_>| match rfs::fchown(fd, owners.0, owners.1) {
            Err(Errno::PERM) => Ok(()), // An ordinary user's own already.
            other => other,
        };
        let make = |at: &OwnedFd, name: &[u8]| {
            rfs::mkdirat(at, name, Mode::RWXU)?;
            let made = rfs::openat(at, name, reading, Mode::empty())?;
            own(made.as_fd())?;
            Ok::<_, Errno>(made)
        };
        let outer = rfs::open(handed.path(), reading, Mode::empty())?;
        let mut folder = outer.try_clone()?;
        if mailbox.as_bytes() != b"INBOX" {
            for name in mailbox.as_bytes().split(|byte| *byte == b'/') {
                folder = make(&folder, name)?;
            }
        }
        let cur = make(&folder, b"cur")?;
        make(&folder, b"new")?;
        make(&folder, b"tmp")?;
        let (systems, keywords): (Vec<&String>, Vec<&String>) =
            flags.iter().partition(|flag| flag.len() == 1 && flag.bytes().all(|byte| byte.is_ascii_uppercase()));
        let mut letters: String = systems.into_iter().cloned().collect();
        let known = keywords.into_iter().filter(|name| !name.contains(['\n', '\r', '\0'])).take(26);
        let mut names = String::new();
        for (n, name) in known.enumerate() {
            letters.push(char::from(b'a' + n as u8));
            names += &format!("{n} {name}\n");
        }
        let put = |at: &OwnedFd, name: &str, bytes: &[u8]| {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let mut file = File::from(rfs::openat(at, name, flags, Mode::RUSR | Mode::WUSR)?);
            file.write_all(bytes)?;
            own(file.as_fd())?;
            Ok::<_, std::io::Error>(file)
        };
        if !names.is_empty() {
            put(&folder, "dovecot-keywords", names.as_bytes())?;
        }
        let secs = u64::try_from(entry.mtime.secs).unwrap_or(0);
        let file = put(&cur, &format!("{secs}.M1P1.twinbox:2,{letters}"), message)?;
        file.set_modified(UNIX_EPOCH + Duration::from_secs(secs))?;
        own(outer.as_fd())?;
        Ok(handed)
    }

    /// Removes what an earlier run left behind when it was killed.
    pub(super) fn sweep(&self) {
        let prefix = [OWN_PREFIX, b"import-"].concat();
        for item in fs::read_dir(&self.lent.root).into_iter().flatten().flatten() {
            if item.file_name().as_bytes().starts_with(&prefix)
                && let Err(error) = fs::remove_dir_all(item.path())
            {
                tracing::debug!(%error, "a Maildir of an earlier run stays");
            }
        }
    }

    /// Whether a mailbox has got such a message since the fork.
    fn is_in(
        &mut self,
        (root, manifest): (&Root, &Manifest),
        owner: &RelPath,
        mailbox: &RelPath,
        print: ContentHash,
    ) -> Result<bool, StoreError> {
        if self.is_mbox() {
            return self.is_in_mbox(root, owner, mailbox, print);
        }
        let storage = join(owner, &[STORAGE]);
        let multi = self.lent.selection.layout() == Layout::Mdbox;
        let dir = if multi { storage } else { join(&mailbox_dir(owner, mailbox), &[MAILS]) };
        let listed = match root.dir_for_reading(&dir) {
            Ok(fd) => tree::list(fd.as_fd()).map_err(disk(&dir))?,
            Err(Errno::NOENT | Errno::NOTDIR) => vec![],
            Err(source) => return Err(disk(&dir)(source)),
        };
        let fresh = self.fresh.entry(dir.clone()).or_default();
        let mut read = fresh.remove(b"".as_slice()).unwrap_or_default().read;
        for item in listed {
            let Some(path) = dir.join(&item.name) else { continue };
            let is_mail = if multi { item.name.starts_with(b"m.") } else { boxes::is_message(&path) };
            // A message of sdbox is read once.
            if !is_mail || item.kind != FileType::RegularFile || (!multi && read.contains_key(&path)) {
                continue;
            }
            let row = manifest.row(&path).map_err(super::tail::TailError::from)?;
            let file = match root.file(&path) {
                Ok(file) => File::from(file),
                Err(Errno::NOENT) => continue,
                Err(source) => return Err(disk(&path)(source)),
            };
            let stat = rfs::fstat(&file).map_err(disk(&path))?;
            let len = stat.st_size as u64;
            let from = match (read.get(&path), row) {
                (Some(at), _) => *at,
                // It is only ever appended to, and was as long at the fork as its row says.
                (None, Some(row)) if multi => row.entry.size(),
                // One message; another one of that number if the mailbox was made anew.
                (None, Some(row)) if row.local == Some(tree::local(&stat)) => len,
                _ => 0,
            };
            if len <= from {
                read.insert(path, from);
                continue;
            }
            let mut at = from;
            let (messages, why) = dbox::messages(&file, from).unwrap_or_default();
            if why.is_none() {
                at = len; // To its end; else there may be more of the last one soon.
            }
            for message in messages {
                let size = message.bytes.end - message.bytes.start;
                if size > MESSAGE_MAX {
                    continue;
                }
                let mut bytes = vec![0; size as usize];
                if file.read_exact_at(&mut bytes, message.bytes.start).is_ok()
                    && let Some(bytes) = unpacked(bytes, MESSAGE_MAX)
                {
                    let of = if multi { message.mailbox.unwrap_or_default() } else { b"one".to_vec() };
                    fresh.entry(of).or_default().seen.insert(fingerprint(&bytes));
                }
            }
            read.insert(path, at);
        }
        fresh.entry(vec![]).or_default().read = read;
        let names =
            if multi { vec![mailbox.as_bytes().to_vec(), folder_name(mailbox.as_bytes()).into_bytes()] } else { vec![b"one".to_vec()] };
        Ok(names.iter().any(|name| fresh.get(name).is_some_and(|fresh| fresh.seen.contains(&print))))
    }
}

impl Program {
    /// The same of an mbox file, in which the mail server rewrites what it likes: new messages are at its end.
    fn is_in_mbox(&mut self, root: &Root, owner: &RelPath, mailbox: &RelPath, print: ContentHash) -> Result<bool, StoreError> {
        let path = mbox_file(root, owner, mailbox);
        let fresh = self.fresh.entry(path.clone()).or_default().entry(vec![]).or_default();
        let before = fresh.read.get(&path).copied();
        if before.is_some() && fresh.seen.contains(&print) {
            return Ok(true);
        }
        let file = match root.file(&path) {
            Ok(file) => File::from(file),
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(false),
            Err(source) => return Err(disk(&path)(source)),
        };
        let failed = |error: std::io::Error| disk(&path)(os(&error));
        let len = file.metadata().map_err(failed)?.len();
        // First what came at the end since it was last read; then, if it is not there, all of it.
        for from in before.map(|before| before.saturating_sub(MBOX_SHIFT)).filter(|from| *from > 0).into_iter().chain([0]) {
            for message in mbox::messages(&file, from).unwrap_or_default() {
                fresh.seen.insert(mbox_print(&file, &message).map_err(failed)?);
            }
            if fresh.seen.contains(&print) {
                break;
            }
        }
        fresh.read.insert(path, len);
        Ok(fresh.seen.contains(&print))
    }

    /// Where a message is in somebody's mbox files: in this mailbox, or else in another one.
    pub(super) fn find(
        &mut self,
        root: &Root,
        owner: &RelPath,
        mailbox: &RelPath,
        print: ContentHash,
    ) -> Result<Option<RelPath>, StoreError> {
        let indexes = join(owner, &[INDEXES]);
        if self.lent.selection.excludes(owner.as_bytes(), true) || root.dir_for_reading(&indexes).is_err() {
            return Ok(None);
        }
        if !self.mboxes.contains_key(owner) {
            if self.mboxes.len() >= OWNERS_MAX {
                self.mboxes.clear();
            }
            let all = index_mboxes(root, owner)?;
            self.mboxes.insert(owner.clone(), all);
        }
        let file = mbox_file(root, owner, mailbox);
        let places = self.mboxes.get(owner).and_then(|all| all.get(&print));
        let found = places.and_then(|places| places.iter().find(|(path, _)| *path == file).or_else(|| places.first()));
        Ok(found.and_then(|(path, uid)| path.join(format!("UID {uid}").as_bytes())))
    }
}

/// Users whose mbox files are remembered: they are asked about one after the other.
const OWNERS_MAX: usize = 8;

/// Dovecot's headers move what is behind them by less.
const MBOX_SHIFT: u64 = 1 << 20;

fn mbox_print(file: &File, message: &mbox::Message) -> std::io::Result<ContentHash> {
    let size = (message.bytes.end - message.bytes.start).min(MESSAGE_MAX);
    let mut bytes = vec![0; size as usize];
    file.read_exact_at(&mut bytes, message.bytes.start)?;
    Ok(fingerprint(&mbox::stripped(&bytes)))
}

/// Messages of mbox files, by their bytes: file and UID.
type Mboxes = HashMap<ContentHash, Vec<(RelPath, u32)>>;

/// All messages of somebody's mbox files.
fn index_mboxes(root: &Root, owner: &RelPath) -> Result<Mboxes, StoreError> {
    let (mut all, mut stack) = (Mboxes::new(), vec![owner.clone()]);
    while let Some(dir) = stack.pop() {
        let listed = match root.dir_for_reading(&dir) {
            Ok(fd) => tree::list(fd.as_fd()).map_err(disk(&dir))?,
            Err(Errno::NOENT | Errno::NOTDIR) => continue,
            Err(source) => return Err(disk(&dir)(source)),
        };
        for item in listed {
            let Some(path) = dir.join(&item.name).filter(|_| item.name != INDEXES) else { continue };
            match item.kind {
                FileType::Directory => stack.push(path),
                FileType::RegularFile => {
                    let file = match root.file(&path) {
                        Ok(file) => File::from(file),
                        Err(Errno::NOENT) => continue,
                        Err(source) => return Err(disk(&path)(source)),
                    };
                    // What is no mbox file has no messages.
                    for message in mbox::messages(&file, 0).unwrap_or_default() {
                        let print = mbox_print(&file, &message).map_err(|error| disk(&path)(os(&error)))?;
                        all.entry(print).or_default().push((path.clone(), message.uid.unwrap_or(0)));
                    }
                }
                _ => {}
            }
        }
    }
    Ok(all)
}

/// As IMAP names them: letters of a Maildir's names, and keywords.
fn imap_flags(flags: &Flags) -> Vec<String> {
    let name = |flag: &String| match flag.as_str() {
        "R" => "\\Answered".into(),
        "F" => "\\Flagged".into(),
        "T" => "\\Deleted".into(),
        "S" => "\\Seen".into(),
        "D" => "\\Draft".into(),
        other => other.to_owned(),
    };
    // What is no atom of IMAP's would be several flags, or none.
    let atom = |flag: &String| !flag.is_empty() && flag.bytes().all(|byte| byte.is_ascii_graphic() && !b"(){%*\"\\]".contains(&byte));
    flags.iter().filter(|flag| atom(flag)).map(name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{Grouping, Selection};

    fn p(text: &str) -> RelPath {
        RelPath::new(text.as_bytes()).unwrap()
    }

    fn program(root: &std::path::Path) -> Program {
        Program::new(&Lent {
            root: root.into(),
            mirror_dir: root.into(),
            selection: Selection::new(Layout::Sdbox, vec![]),
            grouping: Grouping::new(vec![]),
            name: "mail".into(),
            tool: std::sync::Arc::default(),
            alone: std::sync::Arc::default(),
        })
    }

    #[test]
    fn what_means_something_else_to_a_mail_server_is_not_asked_of_it() {
        let program = program(std::path::Path::new("/nonexistent"));
        let flags =
            |mailbox: &str| Task::Flags { at: Place { mailbox: p(mailbox), index: 1, uid: 1 }, set: Flags::new(), clear: Flags::new() };
        let create = |mailbox: &str| Task::Create { mailbox: p(mailbox) };
        let odd = |owner: &str, task: &Task| program.odd(&p(owner), task).is_some();
        assert!(!odd("anna/sdbox", &flags("INBOX")) && !odd("anna/sdbox", &create("50% off")));
        assert!(odd("anna/sdbox", &flags("50% off")) && odd("anna/sdbox", &flags("a*")));
        assert!(odd("*/sdbox", &create("x")) && odd("an?a/sdbox", &create("x")));
        assert!(
            odd("anna/sdbox", &create(".twinbox-x")) && odd("anna/sdbox", &create("a/.twinbox-x/b")) && odd("anna/sdbox", &create("a\nb"))
        );
        let some: Flags = ["S", "F", "$Work", "two words", "\\Seen", "a\"b", ""].map(String::from).into();
        assert_eq!(imap_flags(&some), ["$Work", "\\Flagged", "\\Seen"]);
    }

    #[test]
    fn a_message_is_handed_over_whole_and_nothing_stays() {
        let dir = tempfile::tempdir().unwrap();
        let program = program(dir.path());
        let me = rustix::process::getuid().as_raw();
        let entry = Entry {
            uid: me,
            gid: rustix::process::getgid().as_raw(),
            mtime: twinbox_protocol::entry::Time { secs: 1_700_000_000, nanos: 0 },
            ..twinbox_resync::manifest::plain_dir()
        };
        let flags: Flags = ["S", "$Work", "urgent"].map(String::from).into();
        let handed = program.maildir(&p("A &- B/Sub"), b"From: a\n\nmail\n", &flags, &entry).unwrap();
        let folder = handed.path().join("A &- B/Sub");
        let message = folder.join("cur/1700000000.M1P1.twinbox:2,Sab");
        assert_eq!(fs::read(&message).unwrap(), b"From: a\n\nmail\n");
        assert_eq!(fs::metadata(&message).unwrap().modified().unwrap(), UNIX_EPOCH + Duration::from_secs(1_700_000_000));
        assert_eq!(fs::read_to_string(folder.join("dovecot-keywords")).unwrap(), "0 $Work\n1 urgent\n");
        assert!(folder.join("new").is_dir() && folder.join("tmp").is_dir());
        assert!(program.lent.selection.excludes(handed.path().file_name().unwrap().as_bytes(), true), "never mirrored");
        std::mem::forget(handed); // Killed.
        program.sweep();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        let inbox = program.maildir(&p("INBOX"), b"x", &Flags::new(), &entry).unwrap();
        assert_eq!(fs::read_dir(inbox.path().join("cur")).unwrap().count(), 1);
    }
}
