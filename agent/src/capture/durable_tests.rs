//! What the capture notes for the day after a power cut.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use super::turns::{Rig, big, started};

fn write(rig: &Rig, name: &str, bytes: &[u8]) -> u64 {
    fs::write(rig.root.join(name), bytes).unwrap();
    fs::metadata(rig.root.join(name)).unwrap().ino()
}

fn settle(rig: &mut Rig) {
    let before = rig.engine.outbox.last().lsn;
    rig.until("the change to be durable on the standby", |rig| {
        rig.engine.outbox.last().lsn > before && rig.engine.outbox.in_flight().next().is_none()
    });
}

/// The standby keeps tombstones until it hears that they are stored: not before the removal is durable here, or it could not tell of it.
#[test]
fn what_is_not_durable_here_is_not_said_to_be_stored() {
    let mut rig = Rig::new();
    rig.connect();
    write(&rig, "a", b"1");
    settle(&mut rig);
    fs::remove_file(rig.root.join("a")).unwrap();
    let gone = rig.engine.outbox.last().lsn.next();
    settle(&mut rig);
    rig.turn(); // What the standby is told comes out one turn later.
    assert!(rig.stored < gone || rig.engine.disk.durable() >= gone, "{} at {gone}", rig.stored);
    let begun = Instant::now();
    while rig.engine.disk.durable() < gone {
        assert!(begun.elapsed() < Duration::from_secs(30), "never durable here");
        std::thread::yield_now();
    }
    write(&rig, "b", b"2");
    settle(&mut rig);
    rig.until("the standby to be told", |rig| rig.stored >= gone);
}

#[test]
fn inodes_written_in_place_are_noted_and_no_others() {
    let mut rig = Rig::new();
    rig.connect();
    let ino = write(&rig, "log", b"line\n");
    write(&rig, "index", b"old");
    settle(&mut rig);
    assert_eq!(rig.engine.view.manifest().in_place_after(None).unwrap(), None);
    write(&rig, "index.tmp", b"new");
    fs::rename(rig.root.join("index.tmp"), rig.root.join("index")).unwrap();
    write(&rig, "log", b"line\nline\n");
    settle(&mut rig);
    rig.until("both", |rig| rig.engine.view.manifest().in_place_after(None).unwrap().is_some());
    assert_eq!(rig.engine.view.manifest().in_place_after(None).unwrap(), Some(ino));
    assert_eq!(rig.engine.view.manifest().in_place_after(Some(ino)).unwrap(), None);
}

/// With no standby nothing is read until there is one again; power may be lost before, and new bytes be under old times.
#[test]
fn what_is_written_in_place_with_no_standby_is_noted_at_once() {
    let mut rig = Rig::new();
    rig.connect();
    let ino = write(&rig, "log", b"line\n");
    write(&rig, "other", b"1");
    settle(&mut rig);
    rig.disconnect();
    rig.turn();
    write(&rig, "log", b"LINE\n");
    write(&rig, "new", b"1");
    rig.until("it to be noted", |rig| rig.engine.view.manifest().in_place_after(None).unwrap() == Some(ino));
    assert_eq!(rig.engine.view.manifest().in_place_after(Some(ino)).unwrap(), None);
    assert!(rig.engine.noted_alone, "and to be written to the disk");
    rig.engine.store_locals().unwrap();
    assert!(!rig.engine.noted_alone);
}

/// A large file that is written all over is sent ahead and named, not patched: written in place it is all the same.
#[test]
fn a_large_file_written_all_over_in_place_is_noted() {
    let mut rig = started(&[]);
    let ino = write(&rig, "large", &big());
    settle(&mut rig);
    write(&rig, "small", b"1");
    settle(&mut rig);
    assert_eq!(rig.engine.view.manifest().in_place_after(None).unwrap(), None);
    let other: Vec<u8> = big().into_iter().map(|byte| !byte).collect();
    assert_eq!(write(&rig, "large", &other), ino);
    settle(&mut rig);
    rig.until("it", |rig| rig.engine.view.manifest().in_place_after(None).unwrap() == Some(ino));
}
