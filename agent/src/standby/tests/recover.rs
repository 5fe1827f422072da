//! Killed at any txn, with a disk that is behind, ahead, or a mixture as after a power cut: recovery ends at the log's end.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, PermissionsExt};

use proptest::prelude::*;

use super::*;
use crate::standby::replica::fault;

/// A small universe in which names collide often.
const DIRS: [&str; 4] = ["", "d", "e", "d/s"];
const NAMES: [&str; 4] = ["a", "b", "c", "t"];

fn place(at: u8) -> String {
    let (dir, name) = (DIRS[at as usize % 4], NAMES[at as usize / 4 % 4]);
    if dir.is_empty() { name.into() } else { format!("{dir}/{name}") }
}

#[derive(Clone, Debug)]
enum Act {
    Put(u8, u8),
    PutKnown(u8, u8),
    Patch(u8, u8, u8),
    Rename(u8, u8),
    Link(u8, u8),
    Remove(u8),
    Mkdir(u8),
    Rmdir(u8),
    MoveDir(u8, u8),
    Swap(u8, u8),
    Symlink(u8, u8),
    Meta(u8, u8),
}

fn act() -> impl Strategy<Value = Act> {
    let at = 0u8..16;
    let dir = 1u8..4;
    prop_oneof![
        4 => (at.clone(), 0u8..6).prop_map(|(a, c)| Act::Put(a, c)),
        2 => (at.clone(), at.clone()).prop_map(|(a, b)| Act::PutKnown(a, b)),
        3 => (at.clone(), 0u8..8, any::<u8>()).prop_map(|(a, page, with)| Act::Patch(a, page, with)),
        3 => (at.clone(), at.clone()).prop_map(|(a, b)| Act::Rename(a, b)),
        2 => (at.clone(), at.clone()).prop_map(|(a, b)| Act::Link(a, b)),
        2 => at.clone().prop_map(Act::Remove),
        2 => dir.clone().prop_map(Act::Mkdir),
        1 => dir.clone().prop_map(Act::Rmdir),
        2 => (dir.clone(), dir).prop_map(|(a, b)| Act::MoveDir(a, b)),
        1 => (at.clone(), at.clone()).prop_map(|(a, b)| Act::Swap(a, b)),
        1 => (at.clone(), 0u8..4).prop_map(|(a, b)| Act::Symlink(a, b)),
        1 => (at, any::<u8>()).prop_map(|(a, m)| Act::Meta(a, m)),
    ]
}

/// Sizes on both sides of the limits that matter.
fn content(of: u8) -> Vec<u8> {
    noise(u64::from(of), [0, 10, 700, 9000, 30_000, 64_000][of as usize % 6])
}

/// The ops of an action that fit the model as it is; performed on it. Bytes known from before travel as references when they can be found.
fn ops(model: &mut Model, act: &Act, clock: &mut i64, findable: &dyn Fn(ContentHash) -> bool) -> Vec<Op> {
    *clock += 1;
    let now = *clock;
    let mut out: Vec<Op> = vec![];
    match act {
        Act::Put(a, c) => out.push(put(&place(*a), &content(*c), now)),
        Act::PutKnown(a, b) => {
            if let Some(hash) = model.rows.get(&p(&place(*b))).and_then(|row| row.entry.hash()) {
                let bytes = model.bytes[&hash].clone();
                let op = if findable(hash) && bytes.len() >= 512 {
                    Op::Put { path: p(&place(*a)), entry: file(&bytes, now), content: Content::Known }
                } else {
                    put(&place(*a), &bytes, now)
                };
                out.push(op);
            }
        }
        Act::Patch(a, page, with) => {
            if let Some(row) = model.rows.get(&p(&place(*a)))
                && row.entry.size() > 0
                && model.rows.values().filter(|r| r.local == row.local && r.local.is_some()).count() == 1
            {
                let at = u64::from(*page) * 4096;
                let size = (row.entry.size() / 2 + u64::from(*with) * 100).clamp(1, 60_000);
                let bytes = vec![*with; 600];
                let writes: Vec<(u64, &[u8])> = if at + 600 <= size { vec![(at, &bytes)] } else { vec![] };
                out.push(model.patch(&place(*a), &writes, size, now));
            }
        }
        Act::Rename(a, b) if a != b => out.push(rename(&place(*a), &place(*b))),
        Act::Link(a, b) if a != b => out.push(link(&place(*a), &place(*b))),
        Act::Remove(a) => out.push(remove(&place(*a))),
        Act::Mkdir(d) => out.push(mkdir(DIRS[*d as usize], now)),
        Act::Rmdir(d) => {
            for (path, _) in model.below(&p(DIRS[*d as usize])).unwrap().iter().rev() {
                out.push(Op::Remove { path: path.clone() });
            }
            out.push(remove(DIRS[*d as usize]));
        }
        Act::MoveDir(a, b) => {
            let (from, to) = (DIRS[*a as usize], DIRS[*b as usize]);
            if !p(to).is_within(&p(from)) && !p(from).is_within(&p(to)) {
                out.push(rename(from, to));
            }
        }
        Act::Swap(a, b) if a != b => {
            out.extend([rename(&place(*a), "swap"), rename(&place(*b), &place(*a)), rename("swap", &place(*b))]);
        }
        Act::Symlink(a, b) => {
            let target = ByteBuf::from(format!("to-{b}"));
            out.push(Op::Make { path: p(&place(*a)), entry: entry(Kind::Symlink { target }, 0o777, now) });
        }
        Act::Meta(a, m) => {
            if let Some(row) = model.rows.get(&p(&place(*a))).cloned() {
                let mode = if matches!(row.entry.kind, Kind::Symlink { .. }) { row.entry.mode } else { 0o600 | (u32::from(*m) % 0o200) };
                let mtime = Time { secs: now, nanos: 5 };
                // Attributes belong to the inode: every name gets them.
                for (path, other) in
                    model.rows.iter().filter(|(path, r)| **path == p(&place(*a)) || (r.local.is_some() && r.local == row.local))
                {
                    out.push(Op::SetMeta { path: path.clone(), attrs: Attrs { mode, mtime, ..Attrs::of(&other.entry) } });
                }
            }
        }
        _ => {}
    }
    let mut trial = model.clone();
    let fits = out.iter().all(|op| {
        if let Op::Put { content: Content::Known, entry, .. } = op {
            assert!(trial.bytes.contains_key(&entry.hash().unwrap()));
        }
        trial.perform(op).is_ok()
    });
    if !fits {
        return vec![];
    }
    *model = trial;
    out
}

/// Does to the disk, clumsily, what an op does: as if its effects had reached the disk without those before it. `torn`: bytes only in part.
fn effect(root: &std::path::Path, model: &Model, op: &Op, torn: bool) {
    let on = |path: &RelPath| root.join(std::str::from_utf8(path.as_bytes()).unwrap());
    let mtime = |path: &RelPath, entry: &Entry| {
        let time = std::time::UNIX_EPOCH + Duration::new(entry.mtime.secs as u64, entry.mtime.nanos);
        let _ = OpenOptions::new().write(true).open(on(path)).and_then(|f| f.set_modified(time));
    };
    match op {
        Op::Put { path, entry, .. } => {
            let mut bytes = model.bytes[&entry.hash().unwrap()].clone();
            if torn {
                bytes.truncate(bytes.len() / 2);
            }
            let temp = root.join(".twinbox-apply-9");
            if fs::write(&temp, bytes).is_ok() && (on(path).is_dir() || fs::rename(&temp, on(path)).is_err()) {
                let _ = fs::remove_file(temp);
            }
            mtime(path, entry);
        }
        Op::Patch { path, entry, writes, .. } => {
            if let Ok(file) = OpenOptions::new().write(true).open(on(path))
                && fs::symlink_metadata(on(path)).is_ok_and(|m| m.is_file())
            {
                let take = if torn { writes.len() / 2 } else { writes.len() };
                for (at, bytes) in &writes[..take] {
                    file.write_all_at(bytes, *at).unwrap();
                }
                if !torn {
                    file.set_len(entry.size()).unwrap();
                }
            }
        }
        Op::Make { path, entry } => match &entry.kind {
            Kind::Symlink { target } => {
                if !on(path).is_dir() {
                    let _ = fs::remove_file(on(path));
                }
                let _ = std::os::unix::fs::symlink(std::str::from_utf8(target).unwrap(), on(path));
            }
            _ => drop(fs::create_dir(on(path))),
        },
        Op::Rename { from, to } => drop(fs::rename(on(from), on(to))),
        Op::Link { from, to } => {
            if fs::symlink_metadata(on(from)).is_ok_and(|m| m.is_file()) && !on(to).is_dir() {
                let _ = fs::remove_file(on(to));
                let _ = fs::hard_link(on(from), on(to));
            }
        }
        Op::Remove { path } => {
            let _ = fs::remove_file(on(path)).or_else(|_| fs::remove_dir(on(path)));
        }
        Op::SetMeta { path, attrs } => {
            if fs::symlink_metadata(on(path)).is_ok_and(|m| m.is_file()) {
                let _ = fs::set_permissions(on(path), fs::Permissions::from_mode(attrs.mode));
            }
        }
    }
}

/// One history: some txns before a checkpoint, some after it; then a crash in a state of the disk given by `reached`; then recovery, itself interrupted.
async fn history(before: &[Act], after: &[Act], reached: &[u8], applied: usize, interrupted: u32) {
    let mut rig = Rig::new().await;
    let mut clock = 100;
    let base = ["d", "e"].map(|d| mkdir(d, 1)).to_vec();
    rig.check([base, vec![Op::Make { path: RelPath::root(), entry: dir(5) }]].concat()).await;
    for act in before {
        let ops = ops(&mut rig.model, act, &mut clock, &|_| false);
        let lsn = rig.send_raw(ops, 0).await;
        rig.applied(lsn).await;
    }
    rig.same();
    rig.checkpoint().await;
    let at_checkpoint = rig.model.clone();
    let mut all = vec![];
    for (at, act) in after.iter().enumerate() {
        if at == applied {
            rig.hold();
        }
        let held = at >= applied;
        let old = &at_checkpoint;
        let ops = ops(&mut rig.model, act, &mut clock, &|hash| !held && old.bytes.contains_key(&hash));
        let lsn = rig.send_raw(ops.clone(), 0).await;
        if held {
            rig.durable(lsn).await;
            all.push((rig.model.clone(), ops));
        } else {
            rig.applied(lsn).await;
        }
    }
    rig.crash();
    // What of the txns not applied reached the disk, in any order that keeps each op's own; but file systems keep the order of names: what a link or a rename leads to is not lost because
    // a later change of its old name was faster.
    let names = |op: &Op| !matches!(op, Op::Patch { .. } | Op::SetMeta { .. });
    let reaches = |at: usize, how: u8| !how.is_multiple_of(3) && (how >> (at % 6 + 2)) & 1 == 0;
    let hows: Vec<u8> = reached.iter().copied().cycle().take(all.len()).collect();
    let each = || all.iter().zip(&hows).flat_map(|((model, ops), how)| ops.iter().enumerate().map(move |(at, op)| (model, at, op, *how)));
    let last = each().enumerate().filter(|(_, (_, at, op, how))| names(op) && reaches(*at, *how)).last().map(|(nth, _)| nth);
    for (nth, (model, at, op, how)) in each().enumerate() {
        let overtaken = matches!(op, Op::Link { .. } | Op::Rename { .. }) && last.is_some_and(|last| nth < last);
        if overtaken || reaches(at, how) {
            effect(&rig.root(), model, op, how % 3 == 2);
        }
    }
    if all.iter().any(|(_, ops)| !ops.is_empty()) {
        fs::write(rig.root().join(".twinbox-apply-5"), b"half").unwrap();
    }
    // A recovery that dies in the middle …
    fault::LEFT.set(Some(interrupted));
    let first = rig.start();
    fault::LEFT.set(None);
    if first.is_ok() {
        rig.crash();
    }
    // … and one that does not.
    rig.start().unwrap();
    let differences = rig.model.differences(&rig.root());
    assert!(differences.is_empty(), "{differences:#?}");
    assert_eq!(rig.handle().status().last_error.map(|(_, e)| e), None);
    assert_eq!(fs::read_dir(rig.state().join("staging")).unwrap().count(), 0, "nothing left behind");
    // The session goes on, on rows that are right.
    rig.begin().await.unwrap();
    for act in before {
        let ops = ops(&mut rig.model, act, &mut clock, &|_| false);
        let lsn = rig.send_raw(ops, 0).await;
        rig.applied(lsn).await;
    }
    rig.same();
    assert!(rig.rescued().is_empty(), "nothing was anybody else's: {:?}", rig.rescued());
}

/// Each case syncs many times: fewer than usual, unless PROPTEST_CASES says how many.
fn cases() -> ProptestConfig {
    let mut config = ProptestConfig { max_shrink_iters: 400, ..ProptestConfig::default() };
    if std::env::var_os("PROPTEST_CASES").is_none() {
        config.cases = 48;
    }
    config
}

proptest! {
    #![proptest_config(cases())]
    #[test]
    fn recovery_ends_at_the_end_of_the_log(
        before in proptest::collection::vec(act(), 0..8),
        after in proptest::collection::vec(act(), 0..10),
        reached in proptest::collection::vec(any::<u8>(), 1..8),
        applied in 0usize..10,
        interrupted in 0u32..40,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(history(&before, &after, &reached, applied, interrupted));
    }
}

/// The first recovery saves a content beside the replica and dies; the second finds it in its place, and must not leave the saved one behind.
#[tokio::test]
async fn what_an_interrupted_recovery_saved_goes_with_the_next() {
    history(&[Act::Put(6, 0), Act::MoveDir(2, 3)], &[Act::Put(8, 1), Act::MoveDir(3, 2)], &[36], 0, 0).await;
    history(&[Act::Put(9, 0)], &[Act::Rename(9, 14), Act::MoveDir(2, 1)], &[3], 0, 0).await;
}

/// A name is linked and then replaced, both after the checkpoint: what it held between is the mirror's own.
#[tokio::test]
async fn what_a_name_was_linked_to_is_not_taken_for_somebody_elses_change() {
    history(&[Act::Put(8, 1)], &[Act::Link(8, 6), Act::Put(10, 2), Act::Rename(10, 6)], &[3], 1, 0).await;
}

/// Half of what was put reached the disk, and all of what was written to it then.
#[tokio::test]
async fn a_torn_file_that_was_patched_since_is_not_taken_for_somebody_elses_change() {
    history(&[], &[Act::Put(13, 1), Act::Patch(13, 1, 1)], &[248, 226], 0, 0).await;
    history(&[], &[Act::Put(13, 3), Act::Patch(13, 1, 1)], &[248, 226], 0, 0).await;
}

#[tokio::test]
async fn large_objects_moved_and_patched_survive_a_crash() {
    let mut rig = Rig::new().await;
    let big = noise(9, 300_000);
    let hash = ContentHash::of(&big);
    let mut object = soon(rig.session.as_ref().unwrap().object()).await.unwrap();
    use twinbox_protocol::msg::BulkItem;
    use twinbox_protocol::ops::Seg;
    for piece in big.chunks(70_000) {
        object.item(BulkItem::Seg(Seg::Data(ByteBuf::from(piece)))).await.unwrap();
    }
    object.item(BulkItem::End { hash, size: 300_000 }).await.unwrap();
    rig.until(|m| *m == ToPrimary::Staged { hash }).await;
    drop(object);
    rig.hold();
    rig.model.bytes.insert(hash, big.clone());
    let lsn = rig.send(vec![Op::Put { path: p("big"), entry: file(&big, 1), content: Content::Staged }]).await;
    rig.durable(lsn).await;
    let one = rig.model.patch("big", &[(100_000, &[1; 5000])], 310_000, 2);
    let lsn = rig.send(vec![one, rename("big", "huge"), link("huge", "twin")]).await;
    rig.durable(lsn).await;
    rig.crash();
    rig.start().unwrap();
    assert_eq!(rig.model.differences(&rig.root()), Vec::<String>::new());
    assert_eq!(rig.handle().status().applied, lsn);
}

#[tokio::test]
async fn a_local_file_in_the_way_of_recovery_is_kept() {
    let mut rig = Rig::new().await;
    rig.check(vec![put("a", b"one", 1), put("b", b"two", 1)]).await;
    rig.checkpoint().await;
    rig.hold();
    let lsn = rig.send(vec![put("a", b"three", 2), remove("b"), put("c", b"four", 3)]).await;
    rig.durable(lsn).await;
    rig.crash();
    fs::write(rig.root().join("a"), b"a stranger's").unwrap();
    fs::write(rig.root().join("b"), b"another").unwrap();
    fs::create_dir(rig.root().join("c")).unwrap();
    fs::write(rig.root().join("c/x"), b"third").unwrap();
    rig.start().unwrap();
    assert_eq!(rig.model.differences(&rig.root()), Vec::<String>::new());
    let kept: Vec<(String, Vec<u8>)> = rig.rescued();
    assert_eq!(kept, [("a".into(), b"a stranger's".to_vec()), ("b".into(), b"another".to_vec()), ("c/x".into(), b"third".to_vec())]);
    assert!(rig.handle().status().last_error.is_some());
}

#[tokio::test]
async fn what_cannot_be_recovered_is_said_and_asked_for_again() {
    let mut rig = Rig::new().await;
    rig.check(vec![put("f", &noise(1, 9000), 1), put("g", b"whole", 1)]).await;
    rig.checkpoint().await;
    rig.hold();
    let patch = rig.model.patch("f", &[(0, b"patched")], 9000, 2);
    let lsn = rig.send(vec![patch]).await;
    rig.durable(lsn).await;
    rig.crash();
    fs::write(rig.root().join("f"), b"the base is lost").unwrap();
    rig.start().unwrap();
    let status = rig.handle().status();
    assert!(status.last_error.unwrap().1.contains('f'));
    let replica = soon(rig.handle().replica(&hello(rig.outbox.last(), rig.model.digest()))).await.unwrap();
    let Replica::Holds { position, digest, .. } = replica else { panic!("{replica:?}") };
    assert_eq!(position.lsn, lsn);
    assert_ne!(digest, rig.model.digest(), "so that the primary compares everything");
}

#[tokio::test]
async fn what_could_not_be_recovered_is_not_told_as_removed() {
    let mut rig = Rig::new().await;
    rig.check(vec![put("f", &noise(1, 9000), 1), put("old", b"whole", 1), put("x", b"x", 1)]).await;
    rig.check(vec![remove("x")]).await;
    rig.checkpoint().await;
    rig.hold();
    let patch = rig.model.patch("f", &[(0, b"patched")], 9000, 2);
    let lsn = rig.send(vec![patch, rename("f", "g"), remove("old")]).await;
    rig.durable(lsn).await;
    rig.crash();
    fs::write(rig.root().join("f"), b"the base is lost").unwrap();
    rig.start().unwrap();
    assert!(rig.handle().status().last_error.is_some());
    rig.stop();
    assert_eq!(rig.gone(), ["x"]);
}

/// A patch writes several ranges; what a kill between two of them leaves is our own, wherever the base and the result are found.
#[tokio::test]
async fn a_half_written_patch_is_not_taken_for_somebody_elses_change() {
    let mut rig = Rig::new().await;
    let bytes = noise(1, 30_000);
    rig.check(vec![put("old", &bytes, 1), put("copy", &bytes, 1)]).await;
    rig.checkpoint().await;
    rig.check(vec![put("made", &noise(2, 30_000), 2), put("gone", &noise(3, 30_000), 2)]).await;
    rig.hold();
    let mut ops: Vec<Op> = vec![];
    for path in ["old", "made", "gone"] {
        ops.push(rig.model.patch(path, &[(4096, &[1; 100]), (20_000, &[2; 5000])], 31_000, 3));
    }
    ops.extend([rename("made", "moved"), remove("gone")]);
    let lsn = rig.send(ops).await;
    rig.durable(lsn).await;
    rig.crash();
    for path in ["old", "made", "gone"] {
        let file = OpenOptions::new().write(true).open(rig.root().join(path)).unwrap();
        file.write_all_at(&[1; 100], 4096).unwrap();
        file.write_all_at(&[2; 3], 20_000).unwrap();
    }
    rig.start().unwrap();
    assert_eq!(rig.model.differences(&rig.root()), Vec::<String>::new());
    assert_eq!(rig.rescued().into_iter().map(|(path, _)| path).collect::<Vec<_>>(), Vec::<String>::new());
    assert_eq!(rig.handle().status().applied, lsn);
}
