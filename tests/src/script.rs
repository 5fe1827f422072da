//! Changes to a store whose every moment is known: after each system call the script notes what the tree is now, so that whatever a replica
//! holds can be told to be one of those moments, group by group, or none.
//!
//! One thread, one system call a moment. A group is a top-level directory. What a Maildir never mirrors (`tmp/`) is left out. Times and modes are
//! not noted: a comparison of the trees at rest does that.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::rng::Rng;

/// What lies under a path: a directory, or a file of this content which shares its inode with the other names that bear the same number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Item {
    Dir,
    File { inode: u64, content: [u8; 8] },
}

/// A tree at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Moment(BTreeMap<String, Item>);

impl Moment {
    /// Reads the tree at `root`.
    pub fn read(root: &Path) -> io::Result<Self> {
        let mut found = BTreeMap::new();
        let mut todo = vec![String::new()];
        while let Some(dir) = todo.pop() {
            for entry in fs::read_dir(root.join(&dir))? {
                let entry = entry?;
                let name = entry.file_name().to_string_lossy().into_owned();
                let path = if dir.is_empty() { name } else { format!("{dir}/{name}") };
                let meta = entry.metadata()?;
                if meta.is_dir() {
                    found.insert(path.clone(), Item::Dir);
                    todo.push(path);
                } else if !scratch(&path) {
                    let content = name_of(&fs::read(entry.path())?);
                    found.insert(path, Item::File { inode: meta.ino(), content });
                }
            }
        }
        Ok(Self(found))
    }

    /// One group, with inodes told by the first name that each has in it.
    fn group<'a>(&'a self, group: &'a str) -> BTreeMap<&'a str, (&'a str, Option<[u8; 8]>)> {
        let mut first: BTreeMap<u64, &str> = BTreeMap::new();
        let of = |path: &str| path == group || path.strip_prefix(group).is_some_and(|rest| rest.starts_with('/'));
        let mine = self.0.iter().filter(|(path, _)| of(path));
        mine.map(|(path, item)| match item {
            Item::Dir => (path.as_str(), ("", None)),
            Item::File { inode, content } => (path.as_str(), (*first.entry(*inode).or_insert(path), Some(*content))),
        })
        .collect()
    }

    fn groups(&self) -> BTreeSet<&str> {
        self.0.keys().map(|path| path.split('/').next().unwrap_or_default()).collect()
    }
}

fn scratch(path: &str) -> bool {
    path.rsplit('/').nth(1) == Some("tmp")
}

fn name_of(content: &[u8]) -> [u8; 8] {
    let hash = blake3::hash(content);
    let mut short = [0; 8];
    short.copy_from_slice(&hash.as_bytes()[..8]);
    short
}

/// Changes a tree and remembers every moment of it.
#[derive(Debug)]
pub struct Script {
    root: PathBuf,
    rng: Rng,
    now: Moment,
    bodies: BTreeMap<u64, Vec<u8>>,
    history: Vec<Moment>,
    mails: u64,
    generation: u64,
}

/// How many acts [`Script::act`] has; more begin again.
pub const ACTS: usize = 9;

impl Script {
    /// Makes a small store in the empty directory `root`.
    pub fn begin(root: &Path, seed: u64) -> io::Result<Self> {
        let mut script = Self {
            root: root.to_owned(),
            rng: Rng::new(seed),
            now: Moment::default(),
            bodies: BTreeMap::new(),
            history: vec![Moment::default()],
            mails: 0,
            generation: 0,
        };
        for user in ["anna", "bert"] {
            script.mkdir(user)?;
            script.maildir(&format!("{user}/Maildir"))?;
            for _ in 0..8 {
                script.deliver(&format!("{user}/Maildir"), 3_000)?;
            }
            script.make(&format!("{user}/index"), 64 << 10)?;
            script.make(&format!("{user}/log"), 5_000)?;
            script.make(&format!("{user}/A"), 700)?;
            script.make(&format!("{user}/B"), 700)?;
        }
        script.make("anna/cache", 2 << 20)?;
        script.link("anna/log", "anna/log.kept")?;
        Ok(script)
    }

    /// The number of the moment that is now.
    #[must_use]
    pub fn moment(&self) -> usize {
        self.history.len() - 1
    }

    /// Act `n`: one kind of change, a few times.
    pub fn act(&mut self, n: usize) -> io::Result<()> {
        match n % ACTS {
            0 => (0..6).try_for_each(|_| self.deliver("anna/Maildir", 4_000)).and_then(|()| self.deliver("bert/Maildir", 200)),
            1 => {
                let mails = self.in_dir("anna/Maildir/new/");
                for mail in mails.iter().take(4) {
                    let name = mail.rsplit('/').next().unwrap_or_default();
                    let seen = format!("anna/Maildir/cur/{name}:2,S");
                    self.rename(mail, &seen)?;
                    self.rename(&seen, &format!("anna/Maildir/cur/{name}:2,FS"))?;
                }
                Ok(())
            }
            2 => {
                self.overwrite("anna/index", 0, 64 << 10)?;
                self.append("anna/log", 3_000)?;
                self.overwrite("anna/cache", 40_000, 12_000)?;
                self.pair("anna", 3)?;
                self.overwrite("anna/cache", 1 << 20, 300_000)?;
                self.append("anna/cache", 70_000)?;
                self.pair("bert", 2)
            }
            3 => {
                self.mkdir(&format!("anna/kept{n}"))?;
                let mails = self.in_dir("anna/Maildir/cur/");
                for (at, mail) in mails.iter().take(3).enumerate() {
                    self.link(mail, &format!("anna/kept{n}/{at}"))?;
                    self.link(mail, &format!("bert/from-anna-{n}-{at}"))?;
                }
                self.append("anna/log.kept", 500)?;
                mails.iter().take(2).try_for_each(|mail| self.remove(mail))
            }
            4 => {
                let (work, done) = (format!("anna/Maildir/.Work{n}"), format!("anna/Maildir/.Done{n}"));
                self.maildir(&work)?;
                (0..3).try_for_each(|_| self.deliver(&work, 900))?;
                self.rename(&work, &done)?;
                self.deliver(&done, 900)?;
                self.maildir(&work)?;
                self.deliver(&work, 100)
            }
            5 => {
                self.mkdir(&format!("bert/att{n}"))?;
                let file = format!("bert/att{n}/movie");
                self.through_tmp("bert/Maildir", &file, 10 << 20)?;
                self.append(&file, 100_000)?;
                self.overwrite(&file, 5 << 20, 8_192)
            }
            6 => {
                let mails = self.in_dir("anna/Maildir/new/");
                if let Some(mail) = mails.first() {
                    self.rename(mail, &mail.replace("anna/", "bert/"))?;
                }
                mails.iter().skip(1).take(3).try_for_each(|mail| self.remove(mail))?;
                self.through_tmp("anna/Maildir", "anna/index", 66_000)?;
                self.pair("anna", 2)
            }
            7 => {
                let file = format!("bert/att{}/movie", n - 2);
                if self.now.0.contains_key(&file) {
                    self.rename(&file, &format!("bert/movie{n}"))?;
                    self.truncate(&format!("bert/movie{n}"), 3 << 20)?;
                }
                self.overwrite("bert/index", 10, 50_000)
            }
            _ => {
                self.remove_all(&format!("anna/Maildir/.Done{}", n - 4))?;
                self.remove_all(&format!("bert/movie{}", n - 1))?;
                (0..3).try_for_each(|_| self.deliver("bert/Maildir", 2_000))
            }
        }
    }

    /// Small changes without end, for a load: each is a few moments.
    pub fn load(&mut self) -> io::Result<()> {
        let user = *self.rng.pick(&["anna", "bert"]);
        match self.rng.below(10) {
            0..4 => self.deliver(&format!("{user}/Maildir"), 2_000),
            4..6 => self.pair(user, 1),
            6 => self.append(&format!("{user}/log"), 900),
            7 => {
                let mails = self.in_dir(&format!("{user}/Maildir/new/"));
                let Some(mail) = mails.first() else { return Ok(()) };
                let name = mail.rsplit('/').next().unwrap_or_default();
                self.rename(mail, &format!("{user}/Maildir/cur/{name}:2,S"))
            }
            8 => {
                let mails = self.in_dir(&format!("{user}/Maildir/cur/"));
                let Some(mail) = mails.last() else { return Ok(()) };
                let to = format!("{user}/link{}", self.moment());
                self.link(mail, &to)
            }
            _ => {
                let mails = self.in_dir(&format!("{user}/Maildir/cur/"));
                if mails.len() > 4 { self.remove(&mails[0]) } else { self.overwrite(&format!("{user}/index"), 0, 64 << 10) }
            }
        }
    }

    /// Whether `tree` is what this tree is now.
    #[must_use]
    pub fn is_now(&self, tree: &Moment) -> bool {
        let groups: BTreeSet<&str> = self.now.groups().into_iter().chain(tree.groups()).collect();
        groups.into_iter().all(|group| self.now.group(group) == tree.group(group))
    }

    /// Checks that each group of `tree` is that group at one moment not before `since`; what is wrong otherwise.
    pub fn is_cut(&self, tree: &Moment, since: usize) -> Result<(), String> {
        let groups: BTreeSet<&str> = self.now.groups().into_iter().chain(tree.groups()).collect();
        for group in groups {
            let found = tree.group(group);
            if self.history[since..].iter().any(|moment| moment.group(group) == found) {
                continue;
            }
            if let Some(older) = self.history[..since].iter().rposition(|moment| moment.group(group) == found) {
                return Err(format!("{group} is at moment {older}, but {since} had been acknowledged"));
            }
            let differs = |moment: &Moment| -> Vec<String> {
                let should = moment.group(group);
                let names: BTreeSet<&&str> = should.keys().chain(found.keys()).collect();
                let wrong = names.into_iter().filter(|n| should.get(**n) != found.get(**n));
                wrong.map(|n| format!("  {n}: {:?}, should be {:?}", found.get(*n), should.get(*n))).collect()
            };
            let all = (since..self.history.len()).map(|n| (n, differs(&self.history[n])));
            let (near, lines) = all.min_by_key(|(_, lines)| lines.len()).expect("now is always there");
            let last = self.moment();
            return Err(format!("{group} is at no moment of {since}..={last}; nearest is {near}:\n{}", lines.join("\n")));
        }
        Ok(())
    }

    /// Checks that each file of `tree` has a content that a file of this name had at some moment; what is wrong otherwise. For a first sync under way.
    pub fn is_whole(&self, tree: &Moment) -> Result<(), String> {
        for (path, item) in &tree.0 {
            let Item::File { content, .. } = item else { continue };
            let known = |moment: &Moment| matches!(moment.0.get(path), Some(Item::File { content: had, .. }) if had == content);
            if !self.history.iter().any(known) {
                return Err(format!("{path} was never like this"));
            }
        }
        Ok(())
    }

    fn in_dir(&self, prefix: &str) -> Vec<String> {
        self.now.0.keys().filter(|path| path.starts_with(prefix)).cloned().collect()
    }

    fn note(&mut self) {
        let mut moment = self.now.clone();
        moment.0.retain(|path, item| *item == Item::Dir || !scratch(path));
        self.history.push(moment);
    }

    fn at(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    /// What the disk has under `path` goes into every name of the inode.
    fn written(&mut self, path: &str, body: Vec<u8>) {
        let inode = fs::metadata(self.at(path)).expect("just written").ino();
        let content = name_of(&body);
        self.bodies.insert(inode, body);
        self.now.0.insert(path.to_owned(), Item::File { inode, content });
        for item in self.now.0.values_mut() {
            if let Item::File { inode: other, content: old } = item
                && *other == inode
            {
                *old = content;
            }
        }
        self.note();
    }

    fn body(&self, path: &str) -> Vec<u8> {
        match self.now.0.get(path) {
            Some(Item::File { inode, .. }) => self.bodies[inode].clone(),
            other => panic!("{path} is {other:?}"),
        }
    }

    fn mkdir(&mut self, path: &str) -> io::Result<()> {
        fs::create_dir(self.at(path))?;
        self.now.0.insert(path.to_owned(), Item::Dir);
        self.note();
        Ok(())
    }

    fn maildir(&mut self, path: &str) -> io::Result<()> {
        self.mkdir(path)?;
        ["tmp", "new", "cur"].iter().try_for_each(|part| self.mkdir(&format!("{path}/{part}")))
    }

    fn make(&mut self, path: &str, len: usize) -> io::Result<()> {
        let mut file = File::create_new(self.at(path))?;
        self.written(path, vec![]);
        let body = self.rng.bytes(len);
        file.write_all(&body)?;
        file.sync_data()?;
        self.written(path, body);
        Ok(())
    }

    fn through_tmp(&mut self, folder: &str, to: &str, len: usize) -> io::Result<()> {
        let tmp = format!("{folder}/tmp/{}", self.moment());
        self.make(&tmp, len)?;
        self.rename(&tmp, to)
    }

    fn deliver(&mut self, folder: &str, len: usize) -> io::Result<()> {
        self.mails += 1;
        let to = format!("{folder}/new/{:06}.M1.host", self.mails);
        self.through_tmp(folder, &to, len)
    }

    fn overwrite(&mut self, path: &str, from: usize, len: usize) -> io::Result<()> {
        let fresh = self.rng.bytes(len);
        self.write_at(path, from, &fresh)
    }

    fn append(&mut self, path: &str, len: usize) -> io::Result<()> {
        let end = self.body(path).len();
        self.overwrite(path, end, len)
    }

    fn write_at(&mut self, path: &str, from: usize, fresh: &[u8]) -> io::Result<()> {
        let mut body = self.body(path);
        let file = OpenOptions::new().write(true).open(self.at(path))?;
        // One call: a cut may lie before it or after it.
        let wrote = file.write_at(fresh, from as u64)?;
        assert_eq!(wrote, fresh.len(), "one write of {path}");
        body.resize(body.len().max(from + fresh.len()), 0);
        body[from..from + fresh.len()].copy_from_slice(fresh);
        self.written(path, body);
        Ok(())
    }

    /// A, then B, each in place: B is never newer than A.
    fn pair(&mut self, user: &str, times: usize) -> io::Result<()> {
        for _ in 0..times {
            self.generation += 1;
            let text = format!("generation {:>12}\n", self.generation);
            self.write_at(&format!("{user}/A"), 0, text.as_bytes())?;
            self.write_at(&format!("{user}/B"), 0, text.as_bytes())?;
        }
        Ok(())
    }

    fn truncate(&mut self, path: &str, len: usize) -> io::Result<()> {
        OpenOptions::new().write(true).open(self.at(path))?.set_len(len as u64)?;
        let mut body = self.body(path);
        body.truncate(len);
        self.written(path, body);
        Ok(())
    }

    fn link(&mut self, from: &str, to: &str) -> io::Result<()> {
        fs::hard_link(self.at(from), self.at(to))?;
        let item = self.now.0[from];
        self.now.0.insert(to.to_owned(), item);
        self.note();
        Ok(())
    }

    fn rename(&mut self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.at(from), self.at(to))?;
        let moved: Vec<String> =
            self.now.0.keys().filter(|p| *p == from || p.strip_prefix(from).is_some_and(|r| r.starts_with('/'))).cloned().collect();
        for path in moved {
            let item = self.now.0.remove(&path).expect("listed");
            self.now.0.insert(format!("{to}{}", &path[from.len()..]), item);
        }
        self.note();
        Ok(())
    }

    fn remove(&mut self, path: &str) -> io::Result<()> {
        fs::remove_file(self.at(path))?;
        self.now.0.remove(path);
        self.note();
        Ok(())
    }

    fn remove_all(&mut self, path: &str) -> io::Result<()> {
        let below: Vec<String> = self.now.0.keys().filter(|p| p.starts_with(&format!("{path}/")) || *p == path).cloned().collect();
        // Deepest first: what is below a directory sorts after it.
        for path in below.iter().rev() {
            match self.now.0[path] {
                Item::File { .. } => self.remove(path)?,
                Item::Dir => {
                    fs::remove_dir(self.at(path))?;
                    self.now.0.remove(path);
                    self.note();
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The script's book and the disk agree after every act, and neither a moment that never was nor an older one passes for a cut.
    #[test]
    fn the_book_is_what_the_disk_says() {
        let dir = tempfile::tempdir().unwrap();
        let mut script = Script::begin(dir.path(), 1).unwrap();
        for n in 0..2 * ACTS {
            script.act(n).unwrap();
            let tree = Moment::read(dir.path()).unwrap();
            assert!(script.is_now(&tree), "act {n}");
            script.is_cut(&tree, script.moment()).unwrap();
        }
        let early = Moment::read(dir.path()).unwrap();
        let since = script.moment();
        script.pair("anna", 1).unwrap();
        script.is_cut(&early, since).unwrap();
        script.is_cut(&early, since + 2).unwrap_err();
        fs::write(dir.path().join("anna/A"), "older").unwrap();
        script.is_cut(&Moment::read(dir.path()).unwrap(), 0).unwrap_err();
    }
}
