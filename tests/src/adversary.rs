//! Writers made to be caught halfway, and what must be true of any state their files ever had.
//!
//! Each writer owns a group. None of them declares anything: the cut must be right from outside. `check` looks at a tree nobody writes to.

mod writers;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::rng::Rng;

pub use writers::prepare;

/// Bytes of the large files.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    /// The file between A and B in name order.
    pub between: usize,
    /// The large file overwritten in place.
    pub large: usize,
}

/// Shared by all writers.
#[derive(Debug)]
pub struct Stage {
    root: PathBuf,
    sizes: Sizes,
    over: AtomicBool,
    /// Changes made, by writer.
    pub made: [AtomicU64; 8],
}

/// Names of the writers, in the order of [`Stage::made`].
pub const WRITERS: [&str; 8] = ["pairs", "between", "small single", "large single", "small split", "large split", "wanderer", "bank"];

impl Stage {
    /// Where `root` is, and how large it may get.
    #[must_use]
    pub fn new(root: &Path, sizes: Sizes) -> Self {
        Self { root: root.to_owned(), sizes, over: AtomicBool::new(false), made: Default::default() }
    }

    /// Runs every writer until [`Stage::end`].
    pub fn run<'scope>(&'scope self, scope: &'scope std::thread::Scope<'scope, '_>, seed: u64) {
        for (n, writer) in writers::ALL.iter().enumerate() {
            let rng = Rng::part(seed, 700 + n as u64);
            scope.spawn(move || writer(self, rng).unwrap_or_else(|error| panic!("{}: {error}", WRITERS[n])));
        }
    }

    /// Ends the writers.
    pub fn end(&self) {
        self.over.store(true, Ordering::SeqCst);
    }
}

/// What a tree held, for those who want to see that it moved on.
#[derive(Debug, Default, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Held(pub BTreeMap<&'static str, u64>);

fn word(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at * 8..at * 8 + 8)?.try_into().ok().map(u64::from_le_bytes)
}

/// The generation of a file whose every word must be the same.
fn generation(path: &Path, wrong: &mut Vec<String>) -> Option<u64> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) => {
            wrong.push(format!("{}: {error}", path.display()));
            return None;
        }
    };
    let first = word(&bytes, 0)?;
    let torn = bytes.chunks(8).position(|chunk| chunk != first.to_le_bytes());
    if let Some(at) = torn {
        wrong.push(format!("{}: torn at byte {}: {first} and {:?}", path.display(), at * 8, word(&bytes, at)));
    }
    Some(first)
}

/// What of `tree` can never have been so, one line each.
#[must_use]
pub fn check(tree: &Path, scratch: &Path) -> (Held, Vec<String>) {
    let (mut held, mut wrong) = (Held::default(), vec![]);
    let (a, b) = (generation(&tree.join("pairs/A"), &mut wrong), generation(&tree.join("pairs/N"), &mut wrong));
    if let (Some(a), Some(b)) = (a, b) {
        if !(a == b || a == b + 1) {
            wrong.push(format!("A is of generation {a}, B of {b}: B comes after A, and before the next A"));
        }
        held.0.insert("pairs", b);
    }
    for (name, path) in [
        ("between", "pairs/M"),
        ("small single", "place/small-single"),
        ("large single", "place/large-single"),
        ("small split", "place2/small-split"),
        ("large split", "place3/large-split"),
    ] {
        if let Some(generation) = generation(&tree.join(path), &mut wrong) {
            held.0.insert(name, generation);
        }
    }
    let places: Vec<&str> = writers::PLACES.into_iter().filter(|place| tree.join(place).join("message").exists()).collect();
    if places.len() != 1 {
        wrong.push(format!("the wanderer is in {places:?}"));
    }
    for name in ["wal", "journal"] {
        match bank(&tree.join("bank"), name, scratch) {
            Ok(transfers) => drop(held.0.insert(if name == "wal" { "bank" } else { "bank, journal" }, transfers)),
            Err(why) => wrong.push(format!("bank/{name}.sqlite: {why}")),
        }
    }
    (held, wrong)
}

/// Opens a copy of the database as it would be after a crash; gives the number of transfers.
fn bank(dir: &Path, name: &str, scratch: &Path) -> Result<u64, String> {
    let copy = scratch.join("bank-copy");
    let _ = fs::remove_dir_all(&copy);
    fs::create_dir_all(&copy).map_err(|e| e.to_string())?;
    let file = format!("{name}.sqlite");
    for item in fs::read_dir(dir).map_err(|e| e.to_string())?.flatten() {
        if item.file_name().to_string_lossy().starts_with(&file) {
            fs::copy(item.path(), copy.join(item.file_name())).map_err(|e| e.to_string())?;
        }
    }
    let db = rusqlite::Connection::open(copy.join(&file)).map_err(|e| e.to_string())?;
    let ask = |sql: &str| db.query_row(sql, [], |row| row.get::<_, i64>(0)).map_err(|e| format!("{sql}: {e}"));
    let sound: String = db.query_row("PRAGMA integrity_check", [], |row| row.get(0)).map_err(|e| e.to_string())?;
    let (sum, transfers) = (ask("SELECT sum(balance) FROM account")?, ask("SELECT count FROM transfers")?);
    match () {
        () if sound != "ok" => Err(sound),
        () if sum != writers::MONEY => Err(format!("{sum} instead of {}", writers::MONEY)),
        () => Ok(transfers as u64),
    }
}
