//! The mail server of the simulation: what it did to its store, and every state each group was in.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use twinbox_protocol::ids::ContentHash;

pub(super) const GROUPS: [&str; 3] = ["anna", "bert", "cleo"];
const FOLDERS: [&str; 4] = ["in", "work", "old", "in/sub"];
/// Past what is read at once.
const LARGE: usize = 8 * 1024 * 1024 + 4096;

pub(super) struct Rng(pub(super) u64);

impl Rng {
    pub(super) fn next(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % n as u64) as usize
    }

    pub(super) fn one_in(&mut self, n: usize) -> bool {
        self.next(n) == 0
    }

    pub(super) fn pick<T: Clone>(&mut self, from: &[T]) -> Option<T> {
        (!from.is_empty()).then(|| from[self.next(from.len())].clone())
    }
}

/// `None`: a directory; else which content.
pub(super) type Tree = BTreeMap<String, Option<usize>>;
/// What a group is at one moment.
pub(super) type State = BTreeMap<String, Option<ContentHash>>;

/// The mail server, what its store holds, and every state each group was in.
pub(super) struct Server {
    pub(super) root: PathBuf,
    pub(super) aside: PathBuf,
    pub(super) rng: Rng,
    pub(super) tree: Tree,
    /// Contents of files, shared by the names of one inode.
    bytes: Vec<Vec<u8>>,
    pub(super) hashes: Vec<ContentHash>,
    pub(super) states: BTreeMap<String, Vec<State>>,
    /// Contents of messages that were removed.
    pub(super) removed: BTreeSet<ContentHash>,
    pub(super) messages: BTreeSet<ContentHash>,
    /// Of these that were given several names: see ARCHITECTURE, Open defects.
    several: BTreeSet<ContentHash>,
    made: usize,
    /// Changes left.
    pub(super) left: usize,
    hard: bool,
    pub(super) said: Vec<String>,
    /// Some messages are made durable, as a mail server should, and some are not.
    pub(super) syncs: bool,
}

impl Server {
    pub(super) fn new(root: PathBuf, aside: PathBuf, seed: u64, left: usize) -> Self {
        let mut server = Server {
            root,
            aside,
            rng: Rng(seed),
            tree: Tree::new(),
            bytes: vec![],
            hashes: vec![],
            states: BTreeMap::new(),
            removed: BTreeSet::new(),
            messages: BTreeSet::new(),
            several: BTreeSet::new(),
            made: 0,
            left,
            hard: std::env::var("TWINBOX_SIM_HARD").is_ok(),
            said: vec![],
            syncs: false,
        };
        for group in GROUPS {
            server.mkdir(group);
            for folder in FOLDERS {
                server.mkdir(&format!("{group}/{folder}"));
            }
        }
        server
    }

    pub(super) fn now(&self, group: &str) -> State {
        let below = |path: &String| path == group || path.starts_with(&format!("{group}/"));
        self.tree.iter().filter(|(path, _)| below(path)).map(|(path, content)| (path.clone(), content.map(|c| self.hashes[c]))).collect()
    }

    /// An instant: what each group is now, it was.
    fn instant(&mut self, what: String) {
        self.said.push(what);
        for group in GROUPS {
            let now = self.now(group);
            let states = self.states.entry(group.into()).or_default();
            if states.last() != Some(&now) {
                states.push(now);
            }
        }
    }

    fn mkdir(&mut self, path: &str) {
        if fs::create_dir(self.root.join(path)).is_ok() {
            self.tree.insert(path.into(), None);
            self.instant(format!("mkdir {path}"));
        }
    }

    fn content(&mut self, bytes: Vec<u8>) -> usize {
        self.hashes.push(ContentHash::of(&bytes));
        self.bytes.push(bytes);
        self.bytes.len() - 1
    }

    fn files(&self) -> Vec<String> {
        self.tree.iter().filter(|(_, content)| content.is_some()).map(|(path, _)| path.clone()).collect()
    }

    fn dirs(&self) -> Vec<String> {
        self.tree.iter().filter(|(path, content)| content.is_none() && path.contains('/')).map(|(path, _)| path.clone()).collect()
    }

    /// A name goes; the message is removed with its last one.
    fn forget(&mut self, path: &str) {
        if let Some(Some(content)) = self.tree.remove(path)
            && !self.tree.values().any(|c| *c == Some(content))
        {
            self.removed.insert(self.hashes[content]);
        }
    }

    fn rename(&mut self, from: &str, to: &str) {
        if from == to || fs::rename(self.root.join(from), self.root.join(to)).is_err() {
            return;
        }
        if self.tree.get(from).copied().flatten().is_some() && self.tree.get(from) == self.tree.get(to) {
            return; // Two names of one file: rename(2) does nothing.
        }
        let below = format!("{from}/");
        let moved: Vec<(String, Option<usize>)> =
            self.tree.iter().filter(|(p, _)| *p == from || p.starts_with(&below)).map(|(p, c)| (p.clone(), *c)).collect();
        let over = self.tree.get(to).copied().flatten();
        for (path, content) in moved {
            self.tree.remove(&path);
            self.tree.insert(format!("{to}{}", &path[from.len()..]), content);
        }
        if let Some(over) = over.filter(|over| !self.tree.values().any(|c| *c == Some(*over))) {
            self.removed.insert(self.hashes[over]);
        }
        self.instant(format!("rename {from} {to}"));
    }

    /// From outside the store, whole at once.
    fn put(&mut self, path: &str, mut bytes: Vec<u8>, message: bool) {
        if !self.hard {
            // Files of one size, made and removed within one tick of the clock, may have one inode number and the same times.
            bytes.resize(bytes.len() + self.made, b' ');
        }
        let temp = self.aside.join("temp");
        fs::write(&temp, &bytes).unwrap();
        let durable = self.syncs && self.rng.one_in(3);
        if durable {
            File::open(&temp).unwrap().sync_all().unwrap();
        }
        if fs::rename(&temp, self.root.join(path)).is_err() {
            return;
        }
        if durable && let Some((dir, _)) = path.rsplit_once('/') {
            File::open(self.root.join(dir)).unwrap().sync_all().unwrap();
        }
        self.forget(path);
        let content = self.content(bytes);
        if message {
            self.messages.insert(self.hashes[content]);
        }
        self.tree.insert(path.into(), Some(content));
        self.instant(format!("put {path} ({} bytes)", self.bytes[content].len()));
    }

    fn append(&mut self, path: &str, text: &[u8]) {
        let Some(Some(content)) = self.tree.get(path).copied() else { return };
        if self.messages.contains(&self.hashes[content]) {
            return; // A message never changes.
        }
        fs::OpenOptions::new().append(true).open(self.root.join(path)).unwrap().write_all(text).unwrap();
        self.bytes[content].extend_from_slice(text);
        self.hashes[content] = ContentHash::of(&self.bytes[content]);
        self.instant(format!("append {path}"));
    }

    fn remove(&mut self, path: &str) {
        let below = format!("{path}/");
        let all: Vec<String> = self.tree.keys().filter(|p| *p == path || p.starts_with(&below)).cloned().collect();
        for path in all.into_iter().rev() {
            let full = self.root.join(&path);
            let done = if self.tree[&path].is_none() { fs::remove_dir(full) } else { fs::remove_file(full) };
            if done.is_ok() {
                self.forget(&path);
                self.instant(format!("remove {path}"));
            }
        }
    }

    /// See `several`: it may be gone under one name before it is there under another.
    pub(super) fn may_be_nowhere(&self, hash: &ContentHash) -> bool {
        !self.hard && self.several.contains(hash)
    }

    /// Of the messages that were `seen` on the standby those that should be `here` and are not.
    pub(super) fn lost(&self, seen: &BTreeSet<ContentHash>, here: &BTreeSet<ContentHash>) -> Vec<ContentHash> {
        let ought = |hash: &&ContentHash| self.messages.contains(hash) && !self.may_be_nowhere(hash) && !self.removed.contains(hash);
        seen.difference(here).filter(ought).copied().collect()
    }

    /// What the disk has after a power cut, and what a heal put back, is what the store holds now.
    pub(super) fn reload(&mut self) {
        let (mut tree, mut inodes) = (Tree::new(), HashMap::new());
        let root = self.root.clone();
        each_below(&root, &mut |path, meta| {
            let content =
                (!meta.is_dir()).then(|| *inodes.entry(meta.ino()).or_insert_with(|| self.content(fs::read(root.join(&path)).unwrap())));
            tree.insert(path, content);
        });
        self.tree = tree;
        let here: BTreeSet<ContentHash> = self.tree.values().flatten().map(|content| self.hashes[*content]).collect();
        self.removed = self.messages.difference(&here).copied().collect();
        self.instant("the machine came up".into());
    }

    pub(super) fn act(&mut self) {
        self.left = self.left.saturating_sub(1);
        self.made += 1;
        let n = self.made;
        let (files, dirs) = (self.files(), self.dirs());
        let (file, dir, group) = (self.rng.pick(&files), self.rng.pick(&dirs), GROUPS[self.rng.next(3)]);
        let (Some(file), Some(dir)) = (file.or_else(|| dir.clone()), dir) else { return self.mkdir(&format!("{group}/d{n}")) };
        match self.rng.next(20) {
            0..4 => self.put(&format!("{dir}/m{n}"), format!("message {n}").into_bytes(), true),
            4..6 => self.rename(&file, &format!("{file}:f{}", n % 7).split(":f").take(2).collect::<Vec<_>>().join(":f")),
            6..9 => self.rename(&file, &format!("{dir}/m{n}")),
            9..11 => self.remove(&file),
            11 => {
                let log = format!("{group}/log");
                self.put(&log, format!("log {n}\n").into_bytes(), false);
            }
            12 | 13 => self.append(&format!("{group}/log"), format!("line {n}\n").as_bytes()),
            14 => {
                // The second is never newer than the first.
                for name in ["first", "second"] {
                    self.put(&format!("{group}/{name}"), format!("generation {n}").into_bytes(), false);
                }
            }
            15 => {
                let to = self.rng.pick(&dirs).unwrap_or_default();
                self.rename(&dir, &to); // Over it, if that is empty.
            }
            // Folders come again under the names of others.
            16 => self.rename(&dir, &format!("{group}/d{}", n % 5)),
            17 if self.rng.one_in(2) => self.mkdir(&format!("{group}/d{}", n % 5)),
            17 => self.mkdir(&format!("{dir}/d{n}")),
            18 if self.rng.one_in(3) => {
                // As mail servers do it.
                let trash = format!("{group}/trash");
                self.rename(&dir, &trash);
                self.remove(&trash);
            }
            18 => {
                let link = format!("{dir}/l{n}");
                // What changes in place has one name: see ARCHITECTURE, Open defects.
                if let Some(Some(content)) = self.tree.get(&file).copied()
                    && (self.hard || self.messages.contains(&self.hashes[content]))
                    && fs::hard_link(self.root.join(&file), self.root.join(&link)).is_ok()
                {
                    self.tree.insert(link.clone(), Some(content));
                    self.several.insert(self.hashes[content]);
                    self.instant(format!("link {file} {link}"));
                }
            }
            _ => {
                let path = format!("{group}/large");
                if self.tree.contains_key(&path) {
                    self.append(&path, format!("more {n}\n").as_bytes());
                } else if self.bytes.iter().filter(|bytes| bytes.len() >= LARGE).count() < 3 {
                    let bytes = (0..LARGE as u32 / 4).flat_map(|i| i.wrapping_mul(2_654_435_761 ^ n as u32).to_le_bytes()).collect();
                    self.put(&path, bytes, false);
                }
            }
        }
    }
}

/// Everything below a directory, its path relative to it; our own temporary files aside.
pub(super) fn each_below(root: &Path, each: &mut dyn FnMut(String, fs::Metadata)) {
    let mut dirs = vec![String::new()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(root.join(&dir)).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            if name.starts_with(".twinbox-") {
                continue;
            }
            let path = if dir.is_empty() { name } else { format!("{dir}/{name}") };
            let meta = fs::symlink_metadata(root.join(&path)).unwrap();
            if meta.is_dir() {
                dirs.push(path.clone());
            }
            each(path, meta);
        }
    }
}
