//! Contents kept beside the replica until the checkpoint has passed the last txn that uses them.
//!
//! `staging/<hash hex>` is whole and fsynced, `*.part` is being written. A txn that uses an object pins it with its LSN *before* its record is written; a checkpoint
//! removes objects pinned at or below it, and those that were let go. What earlier sessions had sent ahead stays until the primary has said which of it is still wanted (`keep`), which it does
//! at the begin of each session.
//!
//! The names of objects that are finished at the same time are synced together.

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use twinbox_protocol::ids::{ContentHash, Lsn};

use super::copy;
use super::shared::lock;

#[derive(Clone, Copy)]
struct Object {
    size: u64,
    pin: Option<Lsn>,
    /// No txn will name it.
    released: bool,
    /// Its name is durable.
    ready: bool,
    /// Said to be here once more since it was pinned: for another txn.
    again: bool,
    /// Who is making its name durable.
    writers: u32,
    /// The session that sent it last.
    session: u64,
}

impl Object {
    /// One that nobody knows of yet.
    fn new(size: u64, session: u64) -> Self {
        Object { size, pin: None, released: false, ready: false, again: false, writers: 0, session }
    }
}

/// See the module's text.
pub(super) struct Staging {
    dir: PathBuf,
    handle: File,
    objects: Mutex<BTreeMap<ContentHash, Object>>,
    names: Together,
    next: AtomicU64,
    session: AtomicU64,
}

/// Work that serves everybody who was waiting when it began.
#[derive(Default)]
struct Together {
    asked: AtomicU64,
    done: Mutex<Done>,
}

#[derive(Default)]
struct Done {
    upto: u64,
    /// It failed once: what that was of, nobody can tell.
    failed: bool,
}

impl Together {
    /// Returns when `work` has run after this was called.
    fn run(&self, work: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let ticket = self.asked.fetch_add(1, Ordering::AcqRel) + 1;
        let mut done = lock(&self.done);
        if done.failed {
            return Err(io::Error::other("an earlier sync of staged contents failed: restart the agent"));
        }
        if done.upto >= ticket {
            return Ok(());
        }
        let upto = self.asked.load(Ordering::Acquire);
        let synced = work();
        done.failed = synced.is_err();
        done.upto = upto;
        synced
    }
}

fn hash_of_name(name: &str) -> Option<ContentHash> {
    let bytes = data_encoding::HEXLOWER.decode(name.as_bytes()).ok()?;
    Some(ContentHash(bytes.try_into().ok()?))
}

impl Staging {
    /// Opens the directory, made if need be; what was being written is removed, what is whole is kept.
    pub(super) fn open(dir: &Path) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        let mut objects = BTreeMap::new();
        for item in fs::read_dir(dir)? {
            let item = item?;
            match item.file_name().to_str().and_then(hash_of_name) {
                Some(hash) => {
                    objects.insert(hash, Object { ready: true, ..Object::new(item.metadata()?.len(), 0) });
                }
                None => fs::remove_file(item.path())?,
            }
        }
        let (next, session) = (AtomicU64::new(0), AtomicU64::new(0));
        let handle = File::open(dir)?;
        // Of a name that was given before a kill nobody knows whether it is durable.
        handle.sync_all()?;
        Ok(Staging { dir: dir.into(), handle, objects: Mutex::new(objects), names: Together::default(), next, session })
    }

    /// A session begins.
    pub(super) fn next_session(&self) {
        self.session.fetch_add(1, Ordering::AcqRel);
    }

    /// Of what sessions before this one have sent and no txn has named, only these are wanted: the rest goes at the next checkpoint, unless it is sent or named until then.
    pub(super) fn keep(&self, wanted: &HashSet<ContentHash>) {
        let now = self.session.load(Ordering::Acquire);
        let mut objects = lock(&self.objects);
        for (hash, object) in objects.iter_mut().filter(|(_, object)| object.session < now) {
            // One that a txn has named stays for the next, too.
            object.again = object.pin.is_some() && wanted.contains(hash);
            object.released = object.pin.is_none() && !wanted.contains(hash);
        }
    }

    /// The disk is full: what no txn has named goes at once. Where it is named after all, it is asked for again.
    pub(super) fn make_room(&self) {
        self.remove(&mut lock(&self.objects), |object| object.pin.is_none());
    }

    fn remove(&self, objects: &mut BTreeMap<ContentHash, Object>, which: impl Fn(&Object) -> bool) {
        objects.retain(|hash, object| {
            let keep = object.writers > 0 || !which(object);
            if !keep && let Err(error) = fs::remove_file(self.dir.join(hash.to_string())) {
                tracing::warn!(%error, "cannot remove a staged object");
            }
            keep
        });
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(super) fn path(&self, hash: ContentHash) -> PathBuf {
        self.dir.join(hash.to_string())
    }

    /// Size of an object that is whole.
    pub(super) fn size(&self, hash: ContentHash) -> Option<u64> {
        lock(&self.objects).get(&hash).filter(|o| o.ready).map(|o| o.size)
    }

    /// Opens an object for reading.
    pub(super) fn object(&self, hash: ContentHash) -> io::Result<File> {
        File::open(self.path(hash))
    }

    /// Whether an object is here; it is wanted again then, if that session is not over.
    fn is_here(&self, hash: ContentHash, session: u64) -> bool {
        let mut objects = lock(&self.objects);
        let Some(object) = objects.get_mut(&hash).filter(|object| object.ready) else { return false };
        if session == self.session.load(Ordering::Acquire) {
            (object.released, object.again, object.session) = (false, object.pin.is_some(), session);
        }
        true
    }

    /// Keeps an object until the checkpoint passes `lsn`; `false` when it is not there.
    pub(super) fn pin(&self, hash: ContentHash, lsn: Lsn) -> bool {
        let mut objects = lock(&self.objects);
        objects
            .get_mut(&hash)
            .filter(|object| object.ready)
            .map(|object| (object.pin, object.again) = (object.pin.max(Some(lsn)), false))
            .is_some()
    }

    /// Bytes an object takes on disk; 0 when it is not there.
    pub(super) fn takes(&self, hash: ContentHash) -> u64 {
        fs::metadata(self.path(hash)).map_or(0, |m| m.blocks() * 512)
    }

    /// The primary does not need an object: unless a txn named it, it goes at the next checkpoint.
    pub(super) fn release(&self, hash: ContentHash) {
        if let Some(object) = lock(&self.objects).get_mut(&hash) {
            object.released = true;
        }
    }

    /// The txns after `lsn` were taken back. One before it, which the checkpoint has not passed, may name the same content.
    pub(super) fn unpin_after(&self, lsn: Lsn) {
        for object in lock(&self.objects).values_mut().filter(|o| o.pin > Some(lsn)) {
            (object.pin, object.again) = (Some(lsn), true);
        }
    }

    /// Whether an object holds what its name says: one that an earlier session sent has been here for a while, and is read once. A damaged one goes.
    pub(super) fn is_sound(&self, hash: ContentHash) -> io::Result<bool> {
        let now = self.session.load(Ordering::Acquire);
        if lock(&self.objects).get(&hash).is_some_and(|object| object.session == now) {
            return Ok(true);
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(self.object(hash)?)?;
        let sound = ContentHash(*hasher.finalize().as_bytes()) == hash;
        if !sound {
            tracing::error!(%hash, "a staged content is damaged, and asked for again: check the disk of the state directory");
            self.discard(hash);
        } else if let Some(object) = lock(&self.objects).get_mut(&hash) {
            object.session = now;
        }
        Ok(sound)
    }

    /// An object that is not what its name says.
    pub(super) fn discard(&self, hash: ContentHash) {
        let mut objects = lock(&self.objects);
        if objects.get(&hash).is_some_and(|object| object.pin.is_none() && object.writers == 0) {
            objects.remove(&hash);
            if let Err(error) = fs::remove_file(self.dir.join(hash.to_string())) {
                tracing::warn!(%error, "cannot remove a staged object");
            }
        }
    }

    /// The checkpoint has passed `lsn`; objects that are not pinned stay unless they were let go.
    pub(super) fn prune(&self, lsn: Lsn) {
        let mut objects = lock(&self.objects);
        for object in objects.values_mut().filter(|object| object.again && object.pin.is_some_and(|pin| pin <= lsn)) {
            (object.pin, object.again) = (None, false);
        }
        self.remove(&mut objects, |object| object.pin.map_or(object.released, |pin| pin <= lsn));
    }

    /// Begins an object.
    pub(super) fn create(self: &Arc<Self>) -> io::Result<Part> {
        let path = self.dir.join(format!("{}.part", self.next.fetch_add(1, Ordering::Relaxed)));
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
        let session = self.session.load(Ordering::Acquire);
        Ok(Part { staging: self.clone(), session, file, path, hasher: blake3::Hasher::new(), size: 0, copied: false, done: false })
    }
}

/// An object being written, in order. Dropped unfinished, it goes.
pub(super) struct Part {
    staging: Arc<Staging>,
    /// That sends it.
    session: u64,
    pub(super) file: File,
    path: PathBuf,
    hasher: blake3::Hasher,
    size: u64,
    copied: bool,
    done: bool,
}

/// What became of a finished object.
#[derive(PartialEq, Eq, Debug)]
pub(super) enum Finished {
    /// It is staged under its name.
    Staged,
    /// Its bytes have another name or length; nothing is kept.
    Wrong,
}

impl Part {
    pub(super) fn data(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, self.size)?;
        self.hasher.update(bytes);
        self.size += bytes.len() as u64;
        Ok(())
    }

    pub(super) fn hole(&mut self, len: u64) -> io::Result<()> {
        let zeros = [0; 64 * 1024];
        let mut left = len;
        while left > 0 {
            let take = left.min(zeros.len() as u64);
            self.hasher.update(&zeros[..take as usize]);
            left -= take;
        }
        self.size += len;
        self.file.set_len(self.size)
    }

    /// `len` bytes of `source` from `offset`, holes kept. A source that ends early leaves the object wrong, which its name tells.
    pub(super) fn copy(&mut self, source: &File, offset: u64, len: u64) -> io::Result<()> {
        self.copied = true;
        let (mut at, end) = (offset, offset.saturating_add(len));
        let mut buffer = vec![0; 256 * 1024];
        while at < end {
            let data = copy::next_data(source.as_fd(), at, end);
            if data.start > at {
                self.hole(data.start - at)?;
                at = data.start;
            }
            while at < data.end {
                let take = buffer.len().min((data.end - at) as usize);
                let got = source.read_at(&mut buffer[..take], at)?;
                if got == 0 {
                    return Ok(());
                }
                self.data(&buffer[..got])?;
                at += got as u64;
            }
        }
        Ok(())
    }

    /// Whether some of it came from another file here.
    pub(super) fn copied(&self) -> bool {
        self.copied
    }

    pub(super) fn len(&self) -> u64 {
        self.size
    }

    /// Takes name and length from the file as it is now.
    pub(super) fn reread(&mut self) -> io::Result<()> {
        let hole = self.file.metadata()?.len();
        let file = self.file.try_clone()?;
        (self.hasher, self.size) = (blake3::Hasher::new(), 0);
        let mut buffer = vec![0; 256 * 1024];
        while self.size < hole {
            let got = file.read_at(&mut buffer, self.size)?;
            if got == 0 {
                break;
            }
            self.hasher.update(&buffer[..got]);
            self.size += got as u64;
        }
        Ok(())
    }

    /// Checks name and length, makes the object durable and gives it its name.
    pub(super) fn finish(mut self, hash: ContentHash, size: u64) -> io::Result<Finished> {
        let got = ContentHash(*self.hasher.finalize().as_bytes());
        if got != hash || size != self.size {
            return Ok(Finished::Wrong);
        }
        if self.staging.is_here(hash, self.session) {
            return Ok(Finished::Staged);
        }
        self.file.set_len(self.size)?;
        self.file.flush()?;
        let staging = self.staging.clone();
        self.file.sync_all()?;
        {
            let mut objects = lock(&staging.objects);
            fs::rename(&self.path, staging.path(hash))?;
            self.done = true;
            // Not yet there for anybody, nor for a checkpoint to remove.
            // Of a session that is over, nobody knows of it: the one that runs may have said already what it wants.
            let late = self.session != staging.session.load(Ordering::Acquire);
            let object = objects.entry(hash).or_insert(Object { released: late, ..Object::new(size, self.session) });
            if !late {
                (object.released, object.session) = (false, self.session);
            }
            object.writers += 1;
        }
        // Known once its name is durable, so that no txn is acknowledged on one that is not.
        let synced = staging.names.run(|| staging.handle.sync_all());
        if let Some(object) = lock(&staging.objects).get_mut(&hash) {
            object.writers -= 1;
            object.ready |= synced.is_ok();
            object.again |= object.pin.is_some();
        }
        synced.map(|()| Finished::Staged)
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        if !self.done {
            let _ = fs::remove_file(&self.path);
        }
    }
}
