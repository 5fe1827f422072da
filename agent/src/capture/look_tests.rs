//! Looks at real files: what changed is found, what cannot be proved is not accepted.

use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;

use twinbox_protocol::entry::Entry;
use twinbox_protocol::ids::ContentHash;

use super::*;

struct NoChunks;
impl KnownChunks for NoChunks {
    fn find(&self, _: Chunk) -> Option<(ContentHash, u64)> {
        None
    }
}

struct Place {
    dir: tempfile::TempDir,
    root: Root,
}

fn place() -> Place {
    crate::sys::ignore_sigio();
    let dir = tempfile::tempdir().unwrap();
    let root = Root::open(dir.path()).unwrap();
    Place { dir, root }
}

fn p(text: &str) -> RelPath {
    RelPath::new(text.as_bytes()).unwrap()
}

fn noise(len: usize, seed: u8) -> Vec<u8> {
    let mut out = vec![0; len];
    blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut out);
    out
}

fn ask<'a>(row: Option<&'a Row>) -> Known<'a> {
    Known { row, content: true, scan: false, quiet_only: false, unfinished: None, boundary: Time { secs: i64::MAX, nanos: 0 } }
}

fn found(look: Look) -> (Found, Option<(Large, Option<ContentHash>)>) {
    match look {
        Look::Seen(Seen::Present(found), large) => (*found, large),
        other => panic!("{other:?}"),
    }
}

fn row(found: &Found) -> Row {
    Row { entry: found.entry.clone(), local: Some(found.local) }
}

#[test]
fn a_small_file_comes_whole_and_an_unchanged_one_unread() {
    let place = place();
    fs::write(place.dir.path().join("f"), b"hello").unwrap();
    let (first, _) = found(look(&place.root, &p("f"), &ask(None), |_| None, &NoChunks).0);
    assert_eq!((first.entry.hash(), &first.body), (Some(ContentHash::of(b"hello")), &Body::Bytes(b"hello".to_vec())));
    let row = row(&first);
    let again = look(&place.root, &p("f"), &Known { content: false, scan: true, ..ask(Some(&row)) }, |_| None, &NoChunks).0;
    assert_eq!(found(again).0, Found { body: Body::Unread, ..first });
    assert!(matches!(look(&place.root, &p("none"), &ask(None), |_| None, &NoChunks).0, Look::Seen(Seen::Absent, None)));
}

#[test]
fn what_is_to_be_read_again_is_read_whatever_its_times_say() {
    let place = place();
    let path = place.dir.path().join("f");
    fs::write(&path, b"hello").unwrap();
    let (first, _) = found(look(&place.root, &p("f"), &ask(None), |_| None, &NoChunks).0);
    let modified = fs::metadata(&path).unwrap().modified().unwrap();
    OpenOptions::new().write(true).open(&path).unwrap().write_all(b"other").unwrap();
    File::options().write(true).open(&path).unwrap().set_modified(modified).unwrap();
    let known = row(&first);
    // After a power cut: a heal has noted that nobody knows.
    let distrusted = Row { local: known.local.map(|local| twinbox_resync::rows::Local { ctime: Time::default(), ..local }), ..known };
    let renamed = Known { content: false, ..ask(Some(&distrusted)) };
    let (again, _) = found(look(&place.root, &p("f"), &renamed, |_| None, &NoChunks).0);
    assert_eq!(again.entry.hash(), Some(ContentHash::of(b"other")));
}

#[test]
fn an_open_writer_is_seen_and_waited_for_when_asked() {
    let place = place();
    let path = place.dir.path().join("f");
    let mut writer = File::create(&path).unwrap();
    writer.write_all(b"half").unwrap();
    let quiet = Known { quiet_only: true, ..ask(None) };
    let (seen, open) = look(&place.root, &p("f"), &quiet, |_| None, &NoChunks);
    assert!(matches!(seen, Look::Unstable { writer: true }) && open == Some(true));
    // By observation: accepted only when the last change is older than the round's first cookie.
    let late = Known { boundary: Time::default(), ..ask(None) };
    assert!(matches!(look(&place.root, &p("f"), &late, |_| None, &NoChunks).0, Look::Unstable { .. }));
    assert!(matches!(look(&place.root, &p("f"), &ask(None), |_| None, &NoChunks).0, Look::Seen(..)));
    drop(writer);
    let (seen, open) = look(&place.root, &p("f"), &quiet, |_| None, &NoChunks);
    assert!(matches!(seen, Look::Seen(..)) && open == Some(false));
}

/// Shipped bytes of a change in place to a remembered file, and proof that base + patch is the new content.
fn patch_bytes(old: &[u8], change: impl Fn(&mut File)) -> usize {
    let place = place();
    let path = place.dir.path().join("f");
    fs::write(&path, old).unwrap();
    let (first, _) = found(look(&place.root, &p("f"), &ask(None), |_| None, &NoChunks).0);
    let mut hasher = TreeHasher::default();
    hasher.update(old);
    let large = Large { tree: hasher.finish().1.unwrap(), chunks: None };
    change(&mut OpenOptions::new().write(true).open(&path).unwrap());
    let row = row(&first);
    let (second, _) = found(look(&place.root, &p("f"), &ask(Some(&row)), |_| Some(large.clone()), &NoChunks).0);
    let Body::Patch { base, writes, .. } = second.body else { panic!("{:?}", second.body) };
    assert_eq!(base, ContentHash::of(old));
    let mut rebuilt = old.to_vec();
    rebuilt.resize(second.entry.size() as usize, 0);
    for (at, bytes) in &writes {
        rebuilt[*at as usize..*at as usize + bytes.len()].copy_from_slice(bytes);
    }
    assert_eq!(Some(ContentHash::of(&rebuilt)), second.entry.hash());
    writes.iter().map(|(_, b)| b.len()).sum()
}

#[test]
fn changes_in_place_ship_pages_and_appends_ship_what_was_appended() {
    let old = noise(300_001, 1);
    assert_eq!(
        patch_bytes(&old, |f| assert_eq!(f.seek(SeekFrom::End(0)).and_then(|_| f.write(&noise(10_000, 2))).unwrap(), 10_000)),
        10_000
    );
    assert_eq!(patch_bytes(&old, |f| f.write_all_at(b"x", 50_000).unwrap()), PAGE);
    assert_eq!(patch_bytes(&old, |f| f.set_len(200_000).unwrap()), 200_000 % PAGE);
}

#[test]
fn holes_stay_holes() {
    let place = place();
    let path = place.dir.path().join("f");
    let file = File::create(&path).unwrap();
    file.set_len(1 << 20).unwrap();
    file.write_all_at(&noise(8192, 3), 512 * 1024).unwrap();
    drop(file);
    let (seen, _) = found(look(&place.root, &p("f"), &ask(None), |_| None, &NoChunks).0);
    let Body::Recipe(segs) = &seen.body else { panic!("{:?}", seen.body) };
    let data: usize = segs.iter().map(|s| if let Seg::Data(d) = s { d.len() } else { 0 }).sum();
    assert!(data <= 64 * 1024 && segs.iter().any(|s| matches!(s, Seg::Hole(_))));
    assert_eq!(seen.entry.hash(), Some(ContentHash::of(&fs::read(&path).unwrap())));
}

#[test]
fn a_rewritten_file_is_a_recipe_of_the_old_ones_chunks() {
    let place = place();
    let old = noise(1_500_000, 4);
    fs::write(place.dir.path().join("f"), &old).unwrap();
    let (first, large) = found(look(&place.root, &p("f"), &ask(None), |_| None, &NoChunks).0);
    let (large, _) = large.unwrap();
    let mut new = old;
    new.splice(3000..3000, noise(1000, 5));
    fs::write(place.dir.path().join("g"), &new).unwrap();
    fs::rename(place.dir.path().join("g"), place.dir.path().join("f")).unwrap();
    let row = row(&first);
    let (second, _) = found(look(&place.root, &p("f"), &ask(Some(&row)), |_| Some(large.clone()), &NoChunks).0);
    let Body::Recipe(segs) = second.body else { panic!() };
    let data: usize = segs.iter().map(|s| if let Seg::Data(d) = s { d.len() } else { 0 }).sum();
    assert!(data < 130_000, "{data}");
    let _: Entry = second.entry;
}

#[test]
fn a_mount_below_the_root_is_unreadable_and_not_looked_at_again_and_again() {
    let root = Root::open(std::path::Path::new("/")).unwrap();
    let known = Known { row: None, content: true, scan: true, quiet_only: false, unfinished: None, boundary: Time::default() };
    let (seen, _) = look(&root, &p("proc"), &known, |_| None, &NoChunks);
    assert!(matches!(seen, Look::Unreadable(Errno::XDEV)), "{seen:?}: else its group never has a cut, and a first sync never ends");
}

#[test]
fn a_change_of_several_writes_is_left_alone_until_its_writer_closes_or_long_rests() {
    let place = place();
    let mut writer = File::create(place.dir.path().join("x")).unwrap();
    writer.write_all(b"half").unwrap();
    let at = |quiet, closed| Known { unfinished: Some((Duration::from_millis(quiet), Duration::from_millis(closed))), ..ask(None) };
    let see = |known: &Known<'_>| look(&place.root, &p("x"), known, |_| None, &NoChunks).0;
    assert!(matches!(see(&at(100, 500)), Look::Unstable { writer: true }), "nothing moves, but the change may be half made");
    assert!(matches!(see(&at(900, 900)), Look::Seen(..)), "nobody is kept waiting for ever");
    assert!(matches!(see(&at(0, 2000)), Look::Seen(..)), "who writes on and on keeps it open");
    writer.write_all(b" and whole").unwrap();
    drop(writer);
    assert!(matches!(see(&at(0, 0)), Look::Seen(..)), "closed: the strict proof decides");
}
