//! The primary's manifest with what is in flight laid over it.
//!
//! A txn's rows live here, in memory, until the standby says they are durable; then [`View::handle_durable`] moves them to `manifest.db` together with their position.
//! Invariants: the database never says more than the standby durably has; for every path all versions in flight are kept, oldest first, so that any
//! acknowledged prefix can be stored exactly. Memory is bounded by the in-flight window of the caller.

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;

use twinbox_protocol::digest::{Digest, DigestKey};
use twinbox_protocol::ids::{ContentHash, Lsn};
use twinbox_protocol::msg::Position;
use twinbox_protocol::path::RelPath;

use crate::manifest::{Large, Manifest};
use crate::rows::{Local, Row, RowError, Rows};

type Version = (Lsn, Option<Row>);

/// See the module's text.
pub struct View {
    manifest: Manifest,
    key: DigestKey,
    digest: Digest,
    overlay: BTreeMap<RelPath, Vec<Version>>,
    hashes: HashMap<ContentHash, u32>,
    inos: HashMap<u64, Vec<RelPath>>,
    lsn: Lsn,
    undo: Vec<(RelPath, Option<Version>)>,
    digest_before: Digest,
    retire: Vec<(Lsn, ContentHash)>,
    /// What paths had before is forgotten up to here.
    pruned: Lsn,
}

impl View {
    /// Lays an empty overlay over `manifest`.
    #[must_use]
    pub fn new(manifest: Manifest) -> Self {
        let (key, digest) = (manifest.digest_key(), manifest.digest());
        View {
            manifest,
            key,
            digest,
            overlay: BTreeMap::new(),
            hashes: HashMap::new(),
            inos: HashMap::new(),
            lsn: Lsn::ZERO,
            undo: vec![],
            digest_before: digest,
            retire: vec![],
            pruned: Lsn::ZERO,
        }
    }

    /// The durable part.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Changes the durable part as a whole (a pull). The overlay must be empty: [`View::handle_restart`] first.
    ///
    /// # Errors
    /// SQLite's.
    pub fn replace<T>(&mut self, change: impl FnOnce(&mut Manifest) -> rusqlite::Result<T>) -> rusqlite::Result<T> {
        let result = change(&mut self.manifest);
        self.key = self.manifest.digest_key();
        self.digest = self.manifest.digest();
        result
    }

    /// Digest of all rows, those in flight included.
    #[must_use]
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// Changes from now on belong to `lsn`, until [`View::keep`] or [`View::roll_back`].
    pub fn start(&mut self, lsn: Lsn) {
        self.lsn = lsn;
        self.undo.clear();
        self.digest_before = self.digest;
    }

    /// Keeps the changes since [`View::start`].
    pub fn keep(&mut self) {
        self.undo.clear();
    }

    /// Undoes the changes since [`View::start`].
    pub fn roll_back(&mut self) {
        for (path, before) in std::mem::take(&mut self.undo).into_iter().rev() {
            let Some(versions) = self.overlay.get_mut(&path) else { continue };
            let popped = versions.pop();
            if versions.is_empty() && before.is_none() {
                self.overlay.remove(&path);
            } else if let Some(version) = before {
                versions.push(version.clone());
                self.count(&path, version.1.as_ref(), true);
            }
            if let Some((_, row)) = popped {
                self.count(&path, row.as_ref(), false);
            }
        }
        self.digest = self.digest_before;
    }

    fn count(&mut self, path: &RelPath, row: Option<&Row>, up: bool) {
        if let Some(hash) = row.and_then(|r| r.entry.hash()) {
            let n = self.hashes.entry(hash).or_default();
            *n = if up { *n + 1 } else { n.saturating_sub(1) };
            if *n == 0 {
                self.hashes.remove(&hash);
            }
        }
        if let Some(local) = row.and_then(|r| r.local) {
            let paths = self.inos.entry(local.ino).or_default();
            if up {
                paths.push(path.clone());
            } else if let Some(at) = paths.iter().position(|p| p == path) {
                paths.swap_remove(at);
            }
            if paths.is_empty() {
                self.inos.remove(&local.ino);
            }
        }
    }

    /// Whether the standby has this content, or will have by the time the next txn reaches it.
    ///
    /// # Errors
    /// [`RowError::Store`].
    pub fn has_content(&self, hash: ContentHash) -> Result<bool, RowError> {
        Ok(!self.paths_with(hash)?.is_empty())
    }

    /// Some paths that hold this content now.
    ///
    /// # Errors
    /// [`RowError::Store`].
    pub fn paths_with(&self, hash: ContentHash) -> Result<Vec<RelPath>, RowError> {
        let mut out = vec![];
        for path in self.manifest.by_hash(hash).map_err(|e| store(&e))? {
            if self.row(&path)?.is_some_and(|row| row.entry.hash() == Some(hash)) {
                out.push(path);
            }
        }
        if out.is_empty() && self.hashes.contains_key(&hash) {
            let holds = |versions: &Vec<Version>| matches!(versions.last(), Some((_, Some(row))) if row.entry.hash() == Some(hash));
            out.extend(self.overlay.iter().filter(|(_, versions)| holds(versions)).map(|(path, _)| path.clone()).take(8));
        }
        Ok(out)
    }

    /// Whether a change of this path is on its way to the standby.
    #[must_use]
    pub fn is_in_flight(&self, path: &RelPath) -> bool {
        self.overlay.contains_key(path)
    }

    /// Paths whose file has this inode number, as far as known.
    ///
    /// # Errors
    /// [`RowError::Store`].
    pub fn by_ino(&self, ino: u64) -> Result<Vec<RelPath>, RowError> {
        let mut candidates = self.manifest.by_ino(ino).map_err(|e| store(&e))?;
        candidates.extend(self.inos.get(&ino).into_iter().flatten().cloned());
        candidates.sort();
        candidates.dedup();
        let mut out = vec![];
        for path in candidates {
            if self.row(&path)?.and_then(|row| row.local).is_some_and(|local| local.ino == ino) {
                out.push(path);
            }
        }
        Ok(out)
    }

    /// Direct children of a directory, sorted by name.
    ///
    /// # Errors
    /// [`RowError::Store`].
    pub fn children(&self, dir: &RelPath) -> Result<Vec<(Vec<u8>, Row)>, RowError> {
        let stored = self.manifest.children(dir).map_err(|e| store(&e))?;
        let prefix = if dir.is_root() { 0 } else { dir.as_bytes().len() + 1 };
        let mut over: BTreeMap<Vec<u8>, Option<Row>> = BTreeMap::new();
        for (path, versions) in self.range(dir) {
            let name = &path.as_bytes()[prefix..];
            if !name.is_empty() && !name.contains(&b'/') {
                over.insert(name.to_vec(), versions.last().and_then(|(_, row)| row.clone()));
            }
        }
        if over.is_empty() {
            return Ok(stored);
        }
        let mut all: BTreeMap<Vec<u8>, Row> = stored.into_iter().collect();
        for (name, row) in over {
            match row {
                Some(row) => all.insert(name, row),
                None => all.remove(&name),
            };
        }
        Ok(all.into_iter().collect())
    }

    fn range(&self, dir: &RelPath) -> impl Iterator<Item = (&RelPath, &Vec<Version>)> {
        let bounds = dir.below();
        let (low, high) = match &bounds {
            Some((low, high)) => (Bound::Included(low.as_slice()), Bound::Excluded(high.as_slice())),
            None => (Bound::Unbounded, Bound::Unbounded),
        };
        self.overlay.range::<[u8], _>((low, high))
    }

    /// Notes what this machine knows of a path; not shipped, and stored with the next commit.
    ///
    /// # Errors
    /// [`RowError::Store`].
    pub fn set_local(&mut self, path: &RelPath, local: Option<Local>) -> Result<(), RowError> {
        if let Some((_, Some(row))) = self.overlay.get_mut(path).and_then(|v| v.last_mut()) {
            let before = Row { entry: row.entry.clone(), local: row.local };
            row.local = local;
            let after = row.clone();
            self.count(path, Some(&after), true);
            self.count(path, Some(&before), false);
            return Ok(());
        }
        if self.manifest.row(path)?.is_some_and(|row| row.local != local) {
            self.manifest.begin().map_err(|e| store(&e))?;
            self.manifest.set_local(path, local).map_err(|e| store(&e))?;
        }
        Ok(())
    }

    /// Remembers pages and chunks of a content that belongs to `lsn`, in place of those of `replaces`.
    ///
    /// # Errors
    /// [`RowError::Store`].
    pub fn set_large(&mut self, hash: ContentHash, large: &Large, replaces: Option<ContentHash>) -> Result<(), RowError> {
        self.manifest.begin().map_err(|e| store(&e))?;
        self.manifest.set_large(hash, large).map_err(|e| store(&e))?;
        if let Some(old) = replaces.filter(|old| *old != hash) {
            self.retire.push((self.lsn, old));
        }
        Ok(())
    }

    /// Pages and chunks of a content, if remembered.
    ///
    /// # Errors
    /// [`RowError::Store`].
    pub fn large(&self, hash: ContentHash) -> Result<Option<Large>, RowError> {
        self.manifest.large(hash).map_err(|e| store(&e))
    }

    /// Everything up to `position` is durable on the standby: store it.
    ///
    /// # Errors
    /// SQLite's, or a row that could not be stored.
    pub fn handle_durable(&mut self, position: Position) -> Result<(), RowError> {
        self.manifest.begin().map_err(|e| store(&e))?;
        let lsn = position.lsn;
        let done: Vec<RelPath> =
            self.overlay.iter().filter(|(_, v)| v.first().is_some_and(|(at, _)| *at <= lsn)).map(|(path, _)| path.clone()).collect();
        for path in done {
            let Some(versions) = self.overlay.get_mut(&path) else { continue };
            let n = versions.iter().take_while(|(at, _)| *at <= lsn).count();
            let mut taken: Vec<Version> = versions.drain(..n).collect();
            if versions.is_empty() {
                self.overlay.remove(&path);
            }
            for (_, row) in &taken {
                self.count(&path, row.as_ref(), false);
            }
            self.note_before(&path, &taken)?;
            if let Some((at, row)) = taken.pop() {
                self.manifest.set_lsn(at);
                self.manifest.set(&path, row)?;
            }
        }
        for (_, hash) in self.retire.extract_if(.., |(at, _)| *at <= lsn) {
            self.manifest.forget_large(hash).map_err(|e| store(&e))?;
        }
        self.manifest.commit(position).map_err(|e| store(&e))
    }

    /// Notes which contents the path had, each until the version that replaced it.
    fn note_before(&self, path: &RelPath, versions: &[Version]) -> Result<(), RowError> {
        let content = |row: Option<&Row>| row.and_then(|row| row.entry.hash());
        let mut had = content(self.manifest.row(path)?.as_ref());
        for (at, row) in versions {
            let now = content(row.as_ref());
            if let Some(hash) = had.filter(|_| had != now) {
                self.manifest.note_before(path, hash, *at).map_err(|e| store(&e))?;
            }
            had = now;
        }
        Ok(())
    }

    /// Everything up to `durable` survives a power cut here; stored with the next commit.
    ///
    /// # Errors
    /// [`RowError::Store`].
    pub fn prune_before(&mut self, durable: Lsn) -> Result<(), RowError> {
        if durable > self.pruned {
            self.manifest.begin().and_then(|()| self.manifest.prune_before(durable)).map_err(|e| store(&e))?;
            self.pruned = durable;
        }
        Ok(())
    }

    /// Notes that an inode is written in place, stored with the next commit; whether that was not known.
    ///
    /// # Errors
    /// [`RowError::Store`].
    pub fn note_in_place(&self, ino: u64) -> Result<bool, RowError> {
        self.manifest.begin().and_then(|()| self.manifest.note_in_place(ino)).map_err(|e| store(&e))
    }

    /// Stores local notes gathered since the last commit.
    ///
    /// # Errors
    /// SQLite's.
    pub fn store_locals(&mut self) -> Result<(), RowError> {
        let position = self.manifest.position().map_err(|e| store(&e))?;
        if self.manifest.in_transaction() { self.manifest.commit(position).map_err(|e| store(&e)) } else { Ok(()) }
    }

    /// Forgets what is in flight; gives the paths that each txn changed, to be looked at again, and what it had made of them.
    pub fn handle_restart(&mut self) -> BTreeMap<Lsn, Vec<(RelPath, Option<Row>)>> {
        self.hashes.clear();
        self.inos.clear();
        self.retire.clear();
        self.undo.clear();
        self.digest = self.manifest.digest();
        let mut undone: BTreeMap<Lsn, Vec<(RelPath, Option<Row>)>> = BTreeMap::new();
        for (path, versions) in std::mem::take(&mut self.overlay) {
            for (lsn, row) in versions {
                undone.entry(lsn).or_default().push((path.clone(), row));
            }
        }
        undone
    }
}

fn store(error: &rusqlite::Error) -> RowError {
    RowError::Store { detail: error.to_string() }
}

impl Rows for View {
    fn row(&self, path: &RelPath) -> Result<Option<Row>, RowError> {
        match self.overlay.get(path).and_then(|versions| versions.last()) {
            Some((_, row)) => Ok(row.clone()),
            None => self.manifest.row(path),
        }
    }

    fn set(&mut self, path: &RelPath, row: Option<Row>) -> Result<(), RowError> {
        if let Some(old) = self.row(path)? {
            self.digest.sub(Digest::row(&self.key, path, &old.entry));
        }
        if let Some(new) = &row {
            self.digest.add(Digest::row(&self.key, path, &new.entry));
        }
        self.count(path, row.as_ref(), true);
        let versions = self.overlay.entry(path.clone()).or_default();
        let replaced = if versions.last().is_some_and(|(at, _)| *at == self.lsn) { versions.pop() } else { None };
        versions.push((self.lsn, row));
        if let Some((_, row)) = &replaced {
            let row = row.clone();
            self.count(path, row.as_ref(), false);
        }
        self.undo.push((path.clone(), replaced));
        Ok(())
    }

    fn below(&self, dir: &RelPath) -> Result<Vec<(RelPath, Row)>, RowError> {
        let mut all: BTreeMap<RelPath, Row> = self.manifest.below(dir)?.into_iter().collect();
        for (path, versions) in self.range(dir).filter(|(path, _)| !path.is_root()) {
            match versions.last().and_then(|(_, row)| row.clone()) {
                Some(row) => all.insert(path.clone(), row),
                None => all.remove(path),
            };
        }
        Ok(all.into_iter().collect())
    }

    fn is_empty_dir(&self, dir: &RelPath) -> Result<bool, RowError> {
        if self.range(dir).any(|(path, versions)| !path.is_root() && matches!(versions.last(), Some((_, Some(_))))) {
            return Ok(false);
        }
        if self.manifest.is_empty_dir(dir)? {
            return Ok(true);
        }
        Ok(self.children(dir)?.is_empty())
    }
}
