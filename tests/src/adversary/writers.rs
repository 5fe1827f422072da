//! The writers. Every content is a generation number over and over, so that a torn file shows.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rusqlite::Connection;

use super::Stage;
use crate::gate::nap_until;
use crate::rng::Rng;

type Writer = fn(&Stage, Rng) -> io::Result<()>;

/// All of them, in the order of [`super::WRITERS`].
pub(super) const ALL: [Writer; 8] = [pairs, between, small_single, large_single, small_split, large_split, wanderer, bank];

/// Where the wanderer may be: two directories each of two groups.
pub(super) const PLACES: [&str; 4] = ["wander1/a", "wander1/b", "wander2/a", "wander2/b"];

const ACCOUNTS: i64 = 100;
/// Sum of all balances, always.
pub(super) const MONEY: i64 = ACCOUNTS * 1000;
const SMALL: usize = 256 * 1024;

fn content(generation: u64, len: usize) -> Vec<u8> {
    generation.to_le_bytes().repeat(len / 8)
}

fn nap(for_: Duration) {
    nap_until(Instant::now() + for_);
}

fn replace(dir: &Path, name: &str, body: &[u8]) -> io::Result<()> {
    let tmp = dir.join(format!(".{name}.tmp"));
    fs::write(&tmp, body)?;
    fs::rename(tmp, dir.join(name))
}

/// Makes what the writers begin with.
pub fn prepare(stage: &Stage) -> io::Result<()> {
    for dir in PLACES.into_iter().chain(["pairs", "place", "place2", "place3", "bank"]) {
        fs::create_dir_all(stage.root.join(dir))?;
    }
    for name in ["A", "N"] {
        fs::write(stage.root.join("pairs").join(name), content(0, 4096))?;
    }
    fs::write(stage.root.join("pairs/M"), content(0, stage.sizes.between))?;
    for (path, len) in [
        ("place/small-single", SMALL),
        ("place/large-single", stage.sizes.large),
        ("place2/small-split", SMALL),
        ("place3/large-split", stage.sizes.large),
    ] {
        fs::write(stage.root.join(path), content(0, len))?;
    }
    fs::write(stage.root.join(PLACES[0]).join("message"), b"never absent, never doubled")?;
    for name in ["wal", "journal"] {
        open(stage, name).map_err(io::Error::other)?;
    }
    Ok(())
}

fn open(stage: &Stage, name: &str) -> rusqlite::Result<Connection> {
    let db = Connection::open(stage.root.join(format!("bank/{name}.sqlite")))?;
    db.pragma_update(None, "journal_mode", if name == "wal" { "wal" } else { "delete" })?;
    db.pragma_update(None, "synchronous", "off")?;
    db.pragma_update(None, "wal_autocheckpoint", 50)?;
    db.busy_timeout(Duration::from_secs(10))?;
    db.execute_batch(&format!(
        "CREATE TABLE IF NOT EXISTS account (id INTEGER PRIMARY KEY, balance INTEGER, pad BLOB);
         CREATE TABLE IF NOT EXISTS transfers (count INTEGER);
         INSERT INTO transfers SELECT 0 WHERE NOT EXISTS (SELECT 1 FROM transfers);
         WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {ACCOUNTS})
         INSERT OR IGNORE INTO account SELECT i, 1000, randomblob(500) FROM n;"
    ))?;
    Ok(db)
}

/// A, then B ("N": behind the large file in name order), each by rename, 200 times a second.
fn pairs(stage: &Stage, _: Rng) -> io::Result<()> {
    let dir = stage.root.join("pairs");
    let mut generation = 0;
    while !stage.over.load(Ordering::SeqCst) {
        let next = Instant::now() + Duration::from_millis(5);
        generation += 1;
        let body = content(generation, 4096);
        replace(&dir, "A", &body)?;
        replace(&dir, "N", &body)?;
        stage.made[0].store(generation, Ordering::SeqCst);
        nap_until(next);
    }
    Ok(())
}

/// A large file between the two, replaced twice a second.
fn between(stage: &Stage, _: Rng) -> io::Result<()> {
    let dir = stage.root.join("pairs");
    let mut generation = 0;
    while !stage.over.load(Ordering::SeqCst) {
        let next = Instant::now() + Duration::from_millis(500);
        generation += 1;
        replace(&dir, "M", &content(generation, stage.sizes.between))?;
        stage.made[1].store(generation, Ordering::SeqCst);
        nap_until(next);
    }
    Ok(())
}

fn single(stage: &Stage, path: &str, len: usize, at: usize, pause: impl Fn(&mut Rng) -> Duration, mut rng: Rng) -> io::Result<()> {
    let file = OpenOptions::new().write(true).open(stage.root.join(path))?;
    let mut generation = 0;
    while !stage.over.load(Ordering::SeqCst) {
        generation += 1;
        let body = content(generation, len);
        // One call; a short write would be another generation's beginning.
        let wrote = file.write_at(&body, 0)?;
        assert_eq!(wrote, len, "a single write was short");
        stage.made[at].store(generation, Ordering::SeqCst);
        nap(pause(&mut rng));
    }
    Ok(())
}

fn small_single(stage: &Stage, rng: Rng) -> io::Result<()> {
    single(stage, "place/small-single", SMALL, 2, |rng| Duration::from_micros(rng.below(60_000) as u64), rng)
}

fn large_single(stage: &Stage, rng: Rng) -> io::Result<()> {
    single(stage, "place/large-single", stage.sizes.large, 3, |rng| Duration::from_millis(500 + rng.below(3_000) as u64), rng)
}

fn split(stage: &Stage, path: &str, len: usize, at: usize, pause: impl Fn(&mut Rng) -> Duration, mut rng: Rng) -> io::Result<()> {
    let mut generation = 0;
    while !stage.over.load(Ordering::SeqCst) {
        generation += 1;
        let body = content(generation, len);
        let mut file = OpenOptions::new().write(true).open(stage.root.join(path))?;
        for piece in body.chunks(len / 8) {
            file.write_all(piece)?;
            if rng.chance(30) {
                nap(Duration::from_micros(rng.below(8_000) as u64));
            }
        }
        drop::<File>(file);
        stage.made[at].store(generation, Ordering::SeqCst);
        nap(pause(&mut rng));
    }
    Ok(())
}

fn small_split(stage: &Stage, rng: Rng) -> io::Result<()> {
    split(stage, "place2/small-split", SMALL, 4, |rng| Duration::from_micros(rng.below(60_000) as u64), rng)
}

fn large_split(stage: &Stage, rng: Rng) -> io::Result<()> {
    split(stage, "place3/large-split", stage.sizes.large, 5, |rng| Duration::from_millis(500 + rng.below(3_000) as u64), rng)
}

/// One file renamed every 100 µs, in bursts with a rest between them, so that it can also be seen to arrive.
fn wanderer(stage: &Stage, mut rng: Rng) -> io::Result<()> {
    let (mut at, mut moves) = (PLACES[0], 0);
    while !stage.over.load(Ordering::SeqCst) {
        for _ in 0..1 + rng.below(20_000) {
            let to = *rng.pick(&PLACES);
            if to == at {
                continue;
            }
            fs::rename(stage.root.join(at).join("message"), stage.root.join(to).join("message"))?;
            (at, moves) = (to, moves + 1);
            nap(Duration::from_micros(100));
            if stage.over.load(Ordering::SeqCst) {
                break;
            }
        }
        stage.made[6].store(moves, Ordering::SeqCst);
        nap(Duration::from_millis(rng.below(400) as u64));
    }
    Ok(())
}

/// Transfers between accounts, in a WAL database and in one with a rollback journal.
fn bank(stage: &Stage, mut rng: Rng) -> io::Result<()> {
    let mut banks = [open(stage, "wal").map_err(io::Error::other)?, open(stage, "journal").map_err(io::Error::other)?];
    let mut done = 0;
    while !stage.over.load(Ordering::SeqCst) {
        let db = &mut banks[rng.below(2)];
        let steps: Vec<(i64, i64, i64)> =
            (0..1 + rng.below(5)).map(|_| (rng.below(100) as i64 + 1, rng.below(100) as i64 + 1, rng.below(100) as i64)).collect();
        let transfer = |db: &mut Connection| -> rusqlite::Result<()> {
            let tx = db.transaction()?;
            for (from, to, sum) in &steps {
                tx.execute("UPDATE account SET balance = balance - ?1, pad = randomblob(500) WHERE id = ?2", (sum, from))?;
                tx.execute("UPDATE account SET balance = balance + ?1, pad = randomblob(500) WHERE id = ?2", (sum, to))?;
            }
            tx.execute("UPDATE transfers SET count = count + 1", [])?;
            tx.commit()
        };
        transfer(db).map_err(io::Error::other)?;
        done += 1;
        stage.made[7].store(done, Ordering::SeqCst);
        nap(Duration::from_micros(rng.below(30_000) as u64));
    }
    Ok(())
}
