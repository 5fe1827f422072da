//! What is acknowledged, when, and from where contents come.

use twinbox_protocol::msg::BulkItem;
use twinbox_protocol::ops::Seg;
use twinbox_resync::redo::RedoReader;

use super::*;

async fn stage(rig: &mut Rig, bytes: &[u8]) -> ContentHash {
    let hash = ContentHash::of(bytes);
    let mut object = soon(rig.session.as_ref().unwrap().object()).await.unwrap();
    for piece in bytes.chunks(100_000) {
        assert!(!soon(object.item(BulkItem::Seg(Seg::Data(ByteBuf::from(piece))))).await.unwrap());
    }
    assert!(soon(object.item(BulkItem::End { hash, size: bytes.len() as u64 })).await.unwrap());
    hash
}

fn known(path: &str, bytes: &[u8], secs: i64) -> Op {
    Op::Put { path: p(path), entry: file(bytes, secs), content: Content::Known }
}

fn recipe(path: &str, bytes: &[u8], segs: Vec<Seg>, secs: i64) -> Op {
    Op::Put { path: p(path), entry: file(bytes, secs), content: Content::Recipe(segs) }
}

#[tokio::test]
async fn what_is_acknowledged_is_in_the_log_and_many_txns_share_a_sync() {
    let mut rig = Rig::new().await;
    rig.hold();
    let mut last = Lsn::ZERO;
    for at in 0..200 {
        last = rig.send(vec![put(&format!("f{at}"), &noise(at, 300), 1)]).await;
    }
    rig.durable(last).await;
    let acks = rig.heard.iter().filter(|m| matches!(m, ToPrimary::Durable { .. })).count();
    assert!(acks < 150, "{acks} syncs for 200 txns");
    rig.crash();
    let mut reader = RedoReader::new(&rig.state().join("redo"), Lsn::ZERO);
    let lsns: Vec<u64> = std::iter::from_fn(|| reader.next_record().unwrap()).map(|r| r.frame.lsn.0).collect();
    assert_eq!(lsns, (1..=200).collect::<Vec<_>>());
    rig.start().unwrap();
    assert_eq!(rig.model.differences(&rig.root()), Vec::<String>::new());
}

#[tokio::test]
async fn parts_of_a_txn_that_was_never_sealed_leave_nothing() {
    let mut rig = Rig::new().await;
    rig.check(vec![put("a", b"1", 1)]).await;
    let many: Vec<Op> = (0..60).map(|at| put(&format!("m{at}"), &noise(at, 60_000), 2)).collect();
    let (_, frames) = rig.outbox.seal(many, 0, rig.model.digest(), 1).unwrap();
    assert!(frames.len() > 2);
    for frame in &frames[..frames.len() - 1] {
        soon(rig.session.as_ref().unwrap().frame(frame.clone())).await.unwrap();
    }
    rig.begin().await.unwrap();
    rig.check(vec![put("b", b"2", 3)]).await;
    assert_eq!(rig.outbox.last().lsn, Lsn(3));
    rig.crash();
    rig.start().unwrap();
    assert_eq!(rig.model.differences(&rig.root()), Vec::<String>::new());
}

#[tokio::test]
async fn parts_taken_back_are_not_applied_though_they_were_read_already() {
    let mut rig = Rig::new().await;
    rig.hold();
    // The receiver waits for a content with the next txn's part queued behind it: one flush then writes both, and the applier buffers both.
    let first = rig.send(vec![known("a", b"not here", 1)]).await;
    rig.until(|m| matches!(m, ToPrimary::Miss { .. })).await;
    let part = twinbox_protocol::ops::LogFrame {
        lsn: Lsn(2),
        prev: Lsn(1),
        part: 0,
        flags: 0,
        captured_ns: 0,
        ops: vec![put("taken-back", b"never sealed", 1)],
        seal: None,
    };
    soon(rig.session.as_ref().unwrap().frame(twinbox_protocol::codec::encode(&part))).await.unwrap();
    rig.model.bytes.insert(ContentHash::of(b"not here"), b"not here".to_vec());
    stage(&mut rig, b"not here").await;
    rig.durable(first).await;
    rig.handle().shared.hold.store(false, Ordering::Relaxed);
    rig.begin().await.unwrap();
    rig.outbox.seal(vec![], 0, Digest::default(), 0).unwrap();
    rig.outbox.handle_restart(Position { lsn: first, ..rig.handle().status().durable });
    rig.check(vec![put("b", b"2", 3)]).await;
    assert_eq!(rig.outbox.last().lsn, Lsn(3));
}

#[tokio::test]
async fn references_are_resolved_before_the_ack() {
    let mut rig = Rig::new().await;
    let (small, large) = (noise(1, 5000), noise(2, 200_000));
    let hash = stage(&mut rig, &large).await;
    assert_eq!(rig.until(|m| matches!(m, ToPrimary::Staged { .. })).await, ToPrimary::Staged { hash });
    rig.model.bytes.insert(hash, large.clone());
    rig.check(vec![
        put("small", &small, 1),
        known("again", &small, 2),
        Op::Put { path: p("large"), entry: file(&large, 1), content: Content::Staged },
        known("twice", &large, 3),
    ])
    .await;
    rig.checkpoint().await;
    assert_eq!(fs::read_dir(rig.state().join("staging")).unwrap().count(), 0, "unpinned by the checkpoint");
    // From the tree, though the same txn removes the source; and only the log's own bytes are left to recover from.
    rig.begin().await.unwrap();
    let lsn = rig
        .send(vec![
            known("moved", &large, 4),
            known("small2", &small, 4),
            remove("large"),
            remove("twice"),
            remove("small"),
            remove("again"),
        ])
        .await;
    rig.applied(lsn).await;
    rig.same();
    rig.crash();
    fs::remove_file(rig.root().join("moved")).unwrap();
    fs::remove_file(rig.root().join("small2")).unwrap();
    rig.start().unwrap();
    assert_eq!(rig.model.differences(&rig.root()), Vec::<String>::new());
    assert!(!rig.heard.iter().any(|m| matches!(m, ToPrimary::Miss { .. })));
}

#[tokio::test]
async fn a_missing_content_is_asked_for_and_what_precedes_is_acknowledged_first() {
    let mut rig = Rig::new().await;
    let (first, bytes) = (rig.send(vec![put("a", b"1", 1)]).await, noise(7, 100_000));
    let lsn = rig.send(vec![known("f", &bytes, 2), known("g", b"tiny", 2)]).await;
    let miss = rig.until(|m| matches!(m, ToPrimary::Miss { .. })).await;
    assert_eq!(miss, ToPrimary::Miss { hash: ContentHash::of(&bytes) });
    assert!(rig.heard.contains(&ToPrimary::Durable { lsn: first }));
    rig.model.bytes.insert(ContentHash::of(&bytes), bytes.clone());
    stage(&mut rig, &bytes).await;
    rig.until(|m| *m == ToPrimary::Miss { hash: ContentHash::of(b"tiny") }).await;
    stage(&mut rig, b"tiny").await;
    rig.applied(lsn).await;
    rig.same();
    // A content the primary has no more ends the session; the next one goes on.
    rig.send_raw(vec![known("h", b"was never there, and is not small enough to be taken for nothing", 3)], 0).await;
    let ToPrimary::Miss { hash } =
        rig.until(|m| matches!(m, ToPrimary::Miss { hash } if *hash != ContentHash::of(b"tiny") && *hash != ContentHash::of(&bytes))).await
    else {
        unreachable!()
    };
    rig.session.as_ref().unwrap().gone(hash);
    assert_eq!(soon(rig.session.as_ref().unwrap().failed()).await, StandbyError::Gone { hash });
    rig.begin().await.unwrap();
    rig.check(vec![put("h", b"something else", 4)]).await;
}

#[tokio::test]
async fn recipes_are_put_together_and_checked() {
    let mut rig = Rig::new().await;
    let (old, small) = (noise(1, 300_000), noise(2, 2000));
    stage(&mut rig, &old).await;
    rig.model.bytes.insert(ContentHash::of(&old), old.clone());
    rig.check(vec![Op::Put { path: p("old"), entry: file(&old, 1), content: Content::Staged }, put("s", &small, 1)]).await;
    rig.checkpoint().await;
    let from = ContentHash::of(&old);
    let new = [&old[..100_000], b"inserted", &vec![0; 1 << 20], &small[100..200], &old[100_000..]].concat();
    let segs = vec![
        Seg::Copy { from, offset: 0, len: 100_000 },
        Seg::Data(ByteBuf::from("inserted")),
        Seg::Hole(1 << 20),
        Seg::Copy { from: ContentHash::of(&small), offset: 100, len: 100 },
        Seg::Copy { from, offset: 100_000, len: 200_000 },
    ];
    rig.model.bytes.insert(ContentHash::of(&new), new.clone());
    rig.check(vec![recipe("new", &new, segs.clone(), 2), remove("old")]).await;
    let sparse = fs::metadata(rig.root().join("new")).unwrap();
    assert!(sparse.blocks() * 512 < sparse.len(), "the hole stays one");
    // A small result becomes part of the record.
    let few = [&small[..10], b"x"].concat();
    rig.check(vec![recipe(
        "few",
        &few,
        vec![Seg::Copy { from: ContentHash::of(&small), offset: 0, len: 10 }, Seg::Data(ByteBuf::from("x"))],
        3,
    )])
    .await;
    // A source nobody has: the whole is asked for.
    let lost = Seg::Copy { from: ContentHash([9; 32]), offset: 0, len: 3 };
    let lsn = rig.send(vec![recipe("lost", b"abc", vec![lost], 4)]).await;
    rig.until(|m| *m == ToPrimary::Miss { hash: ContentHash::of(b"abc") }).await;
    stage(&mut rig, b"abc").await;
    rig.applied(lsn).await;
    rig.same();
}

/// Puts a staged content and changes it in the same txn.
fn staged_and_changed(rig: &mut Rig, path: &str, old: &[u8], secs: i64) -> Vec<Op> {
    let (base, new) = (ContentHash::of(old), [&old[..4096], b"changed", &old[4103..], b"and longer"].concat());
    rig.model.bytes.insert(base, old.to_vec());
    let writes = vec![(4096, ByteBuf::from("changed")), (old.len() as u64, ByteBuf::from("and longer"))];
    vec![
        Op::Put { path: p(path), entry: file(old, secs), content: Content::Staged },
        Op::Patch { path: p(path), entry: file(&new, secs), base, writes },
    ]
}

#[tokio::test]
async fn a_staged_content_may_be_changed_in_the_txn_that_names_it() {
    let mut rig = Rig::new().await;
    let (first, second) = (noise(1, 3_000_000), noise(2, 3_000_000));
    stage(&mut rig, &first).await;
    let ops = staged_and_changed(&mut rig, "m.1", &first, 1);
    rig.check(ops).await;
    // Over a file, and found in the log only.
    rig.hold();
    stage(&mut rig, &second).await;
    let ops = staged_and_changed(&mut rig, "m.1", &second, 2);
    let lsn = rig.send(ops).await;
    rig.durable(lsn).await;
    rig.crash();
    rig.start().unwrap();
    assert_eq!(rig.model.differences(&rig.root()), Vec::<String>::new());
}

#[tokio::test]
async fn an_object_no_txn_will_name_goes_at_the_next_checkpoint() {
    let mut rig = Rig::new().await;
    let (named, kept, free) = (noise(1, 300_000), noise(2, 300_000), noise(3, 300_000));
    for bytes in [&named, &kept, &free] {
        stage(&mut rig, bytes).await;
    }
    rig.model.bytes.insert(ContentHash::of(&named), named.clone());
    rig.hold();
    let lsn = rig.send(vec![Op::Put { path: p("f"), entry: file(&named, 1), content: Content::Staged }]).await;
    rig.durable(lsn).await;
    for bytes in [&named, &free] {
        rig.session.as_ref().unwrap().unstage(ContentHash::of(bytes));
    }
    rig.release();
    rig.applied(lsn).await;
    rig.same();
    rig.checkpoint().await;
    assert_eq!(staged_names(&rig), [ContentHash::of(&kept).to_string()]);
}

fn staged_names(rig: &Rig) -> Vec<String> {
    let names = fs::read_dir(rig.state().join("staging")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.collect();
    names.sort();
    names
}

#[tokio::test]
async fn what_is_staged_outlives_the_agent_as_far_as_the_primary_still_wants_it() {
    let mut rig = Rig::new().await;
    let contents: Vec<Vec<u8>> = (1..=4).map(|n| noise(n, 300_000)).collect();
    let hashes: Vec<ContentHash> = contents.iter().map(|bytes| ContentHash::of(bytes)).collect();
    let sorted = |which: &[usize]| {
        let mut names: Vec<String> = which.iter().map(|n| hashes[*n].to_string()).collect();
        names.sort();
        names
    };
    for bytes in &contents[..3] {
        stage(&mut rig, bytes).await;
    }
    rig.crash();
    rig.start().unwrap();
    rig.begin().await.unwrap();
    rig.check(vec![put("a", b"1", 1)]).await;
    rig.checkpoint().await;
    assert_eq!(staged_names(&rig), sorted(&[0, 1, 2]), "nothing goes before the primary has said what it wants");
    rig.session.as_ref().unwrap().keep(vec![hashes[0]], false);
    // This one comes before all was said, the third once more.
    for n in [3, 2] {
        stage(&mut rig, &contents[n]).await;
    }
    rig.session.as_ref().unwrap().keep(vec![], true);
    rig.check(vec![put("a", b"2", 2)]).await;
    rig.checkpoint().await;
    assert_eq!(staged_names(&rig), sorted(&[0, 2, 3]));
    rig.model.bytes.insert(hashes[0], contents[0].clone());
    rig.check(vec![Op::Put { path: p("f"), entry: file(&contents[0], 1), content: Content::Staged }]).await;
    // Wanted for another path while the txn that named it first is not in the checkpoint.
    rig.begin().await.unwrap();
    rig.session.as_ref().unwrap().keep(vec![hashes[0], hashes[2]], true);
    rig.checkpoint().await;
    assert_eq!(staged_names(&rig), sorted(&[0, 2]));
    rig.begin().await.unwrap();
    rig.session.as_ref().unwrap().keep(vec![], true);
    rig.check(vec![put("a", b"3", 3)]).await;
    rig.checkpoint().await;
    assert_eq!(staged_names(&rig), Vec::<String>::new());
}

/// A txn that is begun and not sealed.
async fn begun(rig: &Rig, ops: Vec<Op>) {
    let prev = rig.outbox.last().lsn;
    let part = twinbox_protocol::ops::LogFrame { lsn: Lsn(prev.0 + 1), prev, part: 0, flags: 0, captured_ns: 0, ops, seal: None };
    soon(rig.session.as_ref().unwrap().frame(twinbox_protocol::codec::encode(&part))).await.unwrap();
}

#[tokio::test]
async fn what_a_txn_names_stays_when_it_is_taken_back() {
    for size in [3_000, 300_000] {
        let mut rig = Rig::new().await;
        let (twice, once) = (noise(1, size), noise(2, size));
        let hashes = [stage(&mut rig, &twice).await, stage(&mut rig, &once).await];
        rig.model.bytes.insert(hashes[0], twice.clone());
        let names = |path: &str, bytes: &[u8]| Op::Put { path: p(path), entry: file(bytes, 1), content: Content::Staged };
        rig.check(vec![put("f", b"before", 1)]).await;
        rig.checkpoint().await;
        rig.hold();
        let first = rig.send(vec![names("f", &twice)]).await;
        rig.durable(first).await;
        begun(&rig, vec![names("g", &twice), names("h", &once), known("i", b"not here", 1)]).await;
        // What is asked for last shows that the ones before were found.
        rig.until(|m| matches!(m, ToPrimary::Miss { .. })).await;
        rig.release();
        rig.applied(first).await;
        rig.begin().await.unwrap();
        rig.session.as_ref().unwrap().keep(vec![hashes[1]], true);
        // The first is in the log of an acknowledged txn, which the checkpoint has not passed; the second will be named again.
        rig.handle().staging.make_room();
        let mut both = hashes.map(|hash| hash.to_string());
        both.sort();
        assert_eq!(staged_names(&rig), both);
        rig.check(vec![put("j", b"after", 1)]).await;
        rig.checkpoint().await;
        assert_eq!(staged_names(&rig), [hashes[1].to_string()]);
    }
}

#[tokio::test]
async fn a_staged_content_that_was_damaged_is_asked_for_again() {
    for size in [3_000, 300_000] {
        let mut rig = Rig::new().await;
        let bytes = noise(1, size);
        let hash = stage(&mut rig, &bytes).await;
        rig.crash();
        let path = rig.state().join("staging").join(hash.to_string());
        let mut damaged = bytes.clone();
        damaged[size / 2] ^= 1;
        fs::write(&path, damaged).unwrap();
        rig.start().unwrap();
        rig.begin().await.unwrap();
        rig.session.as_ref().unwrap().keep(vec![hash], true);
        rig.model.bytes.insert(hash, bytes.clone());
        let lsn = rig.send(vec![Op::Put { path: p("f"), entry: file(&bytes, 1), content: Content::Staged }]).await;
        assert_eq!(rig.until(|m| matches!(m, ToPrimary::Miss { .. })).await, ToPrimary::Miss { hash });
        stage(&mut rig, &bytes).await;
        rig.applied(lsn).await;
        rig.same();
    }
}

#[tokio::test]
async fn bulk_objects_keep_holes_and_are_checked() {
    let mut rig = Rig::new().await;
    let session = rig.session.take().unwrap();
    let mut all = vec![];
    for _ in 0..64 {
        all.push(soon(session.object()).await.unwrap());
    }
    let next = session.object();
    tokio::pin!(next);
    assert!(
        tokio::time::timeout(Duration::from_millis(20), &mut next).await.is_err(),
        "waits for room, and is not refused: nobody would say so"
    );
    all.pop();
    drop(soon(next).await.unwrap());
    drop(all);
    let mut object = soon(session.object()).await.unwrap();
    let bytes = [b"begin".as_slice(), &vec![0; 1 << 20], b"end"].concat();
    for seg in [Seg::Data(ByteBuf::from("begin")), Seg::Hole(1 << 20), Seg::Data(ByteBuf::from("end"))] {
        soon(object.item(BulkItem::Seg(seg))).await.unwrap();
    }
    let hash = ContentHash::of(&bytes);
    soon(object.item(BulkItem::End { hash, size: bytes.len() as u64 })).await.unwrap();
    let staged = fs::metadata(rig.state().join("staging").join(hash.to_string())).unwrap();
    assert!(staged.len() == bytes.len() as u64 && staged.blocks() * 512 < staged.len());
    let mut wrong = soon(session.object()).await.unwrap();
    soon(wrong.item(BulkItem::Seg(Seg::Data(ByteBuf::from("x"))))).await.unwrap();
    let error = soon(wrong.item(BulkItem::End { hash: ContentHash([1; 32]), size: 1 })).await.unwrap_err();
    assert!(matches!(error, StandbyError::Damaged { .. }));
    assert_eq!(soon(session.failed()).await, error);
    drop((object, wrong));
    assert_eq!(fs::read_dir(rig.state().join("staging")).unwrap().count(), 1, "parts do not stay");
}

/// Killed in a first sync between the two: the next primary begins again, rather than find two histories.
#[tokio::test]
async fn a_history_without_a_position_holds_nothing() {
    let mut rig = Rig::empty();
    rig.known = Some(followed());
    rig.start().unwrap();
    let asked = Position { chain: twinbox_protocol::ids::ChainHash([9; 32]), ..Position::START };
    assert_eq!(soon(rig.handle().replica(&hello(asked, Digest::default()))).await.unwrap(), Replica::Empty);
}

/// The first LSN of all was acknowledged and the primary died before it heard so; its position is still where the first sync began.
#[tokio::test]
async fn where_a_first_sync_began_is_remembered() {
    let mut rig = Rig::empty();
    rig.start().unwrap();
    let from = Position { chain: twinbox_protocol::ids::ChainHash([9; 32]), ..Position::START };
    assert_eq!(soon(rig.handle().replica(&hello(from, Digest::default()))).await.unwrap(), Replica::Empty);
    let (out, from_standby) = mpsc::unbounded_channel();
    rig.session = Some(soon(rig.handle().begin(from, true, out)).await.unwrap());
    rig.from_standby = from_standby;
    rig.handle().follow(followed().lineage, Epoch(1));
    rig.outbox.handle_restart(from);
    rig.check(vec![put("a", b"x", 1)]).await;
    let told = |replica| match replica {
        Replica::Holds { chain_at_yours, .. } => chain_at_yours,
        other => panic!("{other:?}"),
    };
    let again = soon(rig.handle().replica(&hello(from, Digest::default()))).await.unwrap();
    assert_eq!(told(again), Some(from.chain));
    let lost = soon(rig.handle().replica(&hello(Position::START, Digest::default()))).await.unwrap();
    assert_eq!(told(lost), None, "a primary that remembers nothing pulls everything");
}

#[tokio::test]
async fn hello_tells_what_is_here_and_rows_can_be_pulled() {
    let mut rig = Rig::empty();
    rig.start().unwrap();
    let start = hello(Position::START, Digest::default());
    assert_eq!(soon(rig.handle().replica(&start)).await.unwrap(), Replica::Empty);
    rig.begin().await.unwrap();
    rig.check((0..2500).map(|at| put(&format!("f{at}"), b"x", 1)).collect()).await;
    let first = rig.outbox.last();
    rig.check(vec![put("f1", b"y", 2), remove("f2")]).await;
    let replica = soon(rig.handle().replica(&hello(first, Digest::default()))).await.unwrap();
    let holds = Replica::Holds {
        lineage: Lineage::begin(Generation([2; 16]), "a"),
        epoch: Epoch(1),
        position: rig.outbox.last(),
        digest: rig.model.digest(),
        chain_at_yours: Some(first.chain),
        complete: true,
    };
    assert_eq!(replica, holds);
    for (since, rows, batches) in [(None, 2499, 3), (Some(first.lsn), 2, 1)] {
        let (out, mut got) = tokio::sync::mpsc::channel(100);
        soon(rig.handle().pull(since, out)).await.unwrap();
        let (mut seen, mut parts) = (0, 0);
        while let Some(message) = got.recv().await {
            match message {
                ToPrimary::Rows { rows } => {
                    assert!(rows.len() <= 1000);
                    seen += rows.len();
                    parts += 1;
                }
                ToPrimary::RowsEnd { position, digest } => assert_eq!((position, digest), (rig.outbox.last(), rig.model.digest())),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!((seen, parts), (rows, batches));
    }
    // The primary has stored it: tombstones go with the next checkpoint.
    rig.session.as_ref().unwrap().stored(rig.outbox.last().lsn);
    rig.check(vec![put("f3", b"z", 3)]).await;
    rig.checkpoint().await;
    let (out, mut got) = tokio::sync::mpsc::channel(100);
    soon(rig.handle().pull(Some(first.lsn), out)).await.unwrap();
    let Some(ToPrimary::Rows { rows }) = got.recv().await else { panic!() };
    assert!(rows.iter().all(|(_, row)| row.is_some()));
}

#[tokio::test]
async fn a_session_begins_only_where_the_log_ends_or_anew_above_it() {
    let mut rig = Rig::new().await;
    rig.check(vec![put("a", b"1", 1)]).await;
    let handle = rig.handle();
    let at = |lsn: u64| Position { lsn: Lsn(lsn), chain: twinbox_protocol::ids::ChainHash([9; 32]) };
    let (out, _keep) = mpsc::unbounded_channel();
    for (from, reset) in [(at(1), false), (at(7), false), (Position::START, true)] {
        let refused = soon(handle.begin(from, reset, out.clone())).await.err();
        assert!(matches!(refused, Some(StandbyError::Position { .. })), "{refused:?}");
    }
    let (out, from_standby) = mpsc::unbounded_channel();
    let old = rig.session.take().unwrap();
    rig.session = Some(soon(handle.begin(at(50), true, out)).await.unwrap());
    rig.from_standby = from_standby;
    rig.heard.clear();
    assert_eq!(soon(old.failed()).await, StandbyError::Superseded);
    rig.outbox.handle_restart(at(50));
    rig.check(vec![put("b", b"2", 2)]).await;
    assert_eq!(rig.handle().status().durable.lsn, Lsn(51));
    rig.crash();
    rig.start().unwrap();
    assert_eq!(rig.model.differences(&rig.root()), Vec::<String>::new());
    assert_eq!(rig.handle().status().durable.lsn, Lsn(51));
}

#[tokio::test]
async fn the_first_sync_is_complete_with_the_first_txn_not_marked_initial() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let mut rig = Rig::empty();
    let told = Arc::new(AtomicBool::new(false));
    let tell = told.clone();
    let mut config = rig.config(false);
    config.on_complete = Box::new(move |complete| tell.store(complete, Ordering::SeqCst));
    rig.standby = Some(Standby::start(config, None).unwrap());
    rig.begin().await.unwrap();
    let op = put("a", b"1", 1);
    rig.model.perform(&op).unwrap();
    let lsn = rig.send_raw(vec![op], FLAG_INITIAL).await;
    rig.applied(lsn).await;
    assert!(!rig.handle().status().complete);
    let lsn = rig.send(vec![put("b", b"1", 1)]).await;
    rig.applied(lsn).await;
    assert!(rig.handle().status().complete && told.load(Ordering::SeqCst));
    rig.crash();
    rig.start().unwrap();
    assert!(rig.handle().status().complete, "recovered from the log");
}

#[tokio::test]
async fn a_stop_leaves_nothing_to_recover_and_a_small_log_limit_is_kept() {
    let mut rig = Rig::empty();
    rig.redo_max = 200_000;
    rig.start().unwrap();
    rig.begin().await.unwrap();
    for at in 0..40 {
        let lsn = rig.send(vec![put(&format!("f{at}"), &noise(at, 50_000), 1)]).await;
        rig.durable(lsn).await;
        assert!(rig.handle().status().redo_bytes <= 300_000);
    }
    rig.stop();
    let manifest = twinbox_resync::manifest::Manifest::open(&rig.state().join("manifest.db"), true).unwrap();
    assert_eq!(manifest.position().unwrap(), rig.outbox.last());
    drop(manifest);
    rig.start().unwrap();
    assert_eq!(rig.model.differences(&rig.root()), Vec::<String>::new());
}

/// A mount of so many bytes, when we may make one.
struct Small(PathBuf);

impl Small {
    fn mount(at: PathBuf, size: &str) -> Option<Small> {
        fs::create_dir_all(&at).unwrap();
        let done = std::process::Command::new("mount").args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"]).arg(&at).output();
        if !done.is_ok_and(|out| out.status.success()) {
            eprintln!("SKIPPED: no right to mount a tmpfs");
            return None;
        }
        Some(Small(at))
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(&self.0).output();
    }
}

#[tokio::test]
async fn a_full_disk_is_never_acknowledged_and_ends_by_itself() {
    let mut rig = Rig::empty();
    let Some(_mount) = Small::mount(rig.state(), "68m") else { return };
    rig.start().unwrap();
    rig.begin().await.unwrap();
    rig.check(vec![put("a", b"1", 1)]).await;
    fs::write(rig.state().join("filler"), vec![1; 5 << 20]).unwrap();
    let before = rig.outbox.last();
    rig.send_raw(vec![put("b", b"2", 1)], 0).await;
    let error = soon(rig.session.as_ref().unwrap().failed()).await;
    assert!(matches!(error, StandbyError::Full { .. }) && error.to_string().contains("standby disk is full"), "{error}");
    assert!(rig.problems().iter().any(|m| m.contains("standby disk is full")));
    assert_eq!(rig.handle().status().durable, before);
    rig.begin().await.unwrap();
    assert_eq!(rig.outbox.last(), before);
    fs::remove_file(rig.state().join("filler")).unwrap();
    let lsn = rig.send(vec![put("b", b"2", 1)]).await;
    rig.applied(lsn).await;
    assert_eq!(rig.model.differences(&rig.root()), Vec::<String>::new());
}

#[tokio::test]
async fn a_log_that_cannot_be_written_is_latched() {
    let mut rig = Rig::empty();
    let Some(mount) = Small::mount(rig.state().join("redo"), "2m") else { return };
    rig.start().unwrap();
    rig.begin().await.unwrap();
    rig.check(vec![put("a", b"1", 1)]).await;
    let before = rig.outbox.last();
    let mut filler = fs::File::create(rig.state().join("redo/filler")).unwrap();
    while std::io::Write::write_all(&mut filler, &[1; 4096]).is_ok() {}
    // Small enough to wait in memory until the sync: the sync fails, so there is no acknowledgement.
    rig.send_raw(vec![put("b", &noise(1, 60_000), 1)], 0).await;
    let error = soon(rig.session.as_ref().unwrap().failed()).await;
    assert!(matches!(error, StandbyError::Redo { .. } | StandbyError::Latched { .. }), "{error}");
    assert_eq!(rig.handle().status().durable, before);
    let refused = soon(rig.handle().replica(&hello(before, Digest::default()))).await.unwrap_err();
    assert_eq!(refused.code, twinbox_protocol::msg::RefuseCode::Failed);
    assert!(rig.handle().status().refusing.is_some());
    rig.problems();
    assert!(!rig.heard.iter().any(|m| matches!(m, ToPrimary::Durable { lsn } if *lsn > before.lsn)));
    // Room alone does not help: what the kernel said it had written may be gone.
    fs::remove_file(rig.state().join("redo/filler")).unwrap();
    assert!(soon(rig.handle().replica(&hello(before, Digest::default()))).await.is_err());
    rig.crash();
    rig.start().unwrap();
    rig.begin().await.unwrap();
    assert_eq!(rig.outbox.last(), before);
    rig.check(vec![put("b", b"2", 1)]).await;
    rig.stop();
    drop(mount);
}

#[tokio::test]
async fn a_replica_that_fills_up_is_waited_for_and_rescue_crosses_file_systems() {
    let mut rig = Rig::empty();
    let Some(mount) = Small::mount(rig.root(), "80m") else { return };
    rig.start().unwrap();
    rig.begin().await.unwrap();
    rig.check(vec![mkdir("d", 1), put("d/a", b"1", 1), put("e", b"x", 1)]).await;
    rig.hold();
    let lsn = rig.send(vec![put("b", &noise(1, 60_000), 1)]).await;
    rig.durable(lsn).await;
    let mut filler = fs::File::create(rig.root().join(".twinbox-filler")).unwrap();
    while std::io::Write::write_all(&mut filler, &[1; 4096]).is_ok() {}
    rig.handle().shared.hold.store(false, Ordering::Relaxed);
    rig.handle().applier.send(Cmd::Wake).unwrap();
    rig.until(|m| matches!(m, ToPrimary::Problem { message } if message.contains("standby disk is full"))).await;
    let refused = soon(rig.handle().replica(&hello(rig.outbox.last(), Digest::default()))).await.unwrap_err();
    assert!(refused.message.contains("full"), "{refused}");
    assert!(rig.handle().status().refusing.is_none(), "it passes by itself");
    drop(filler);
    fs::remove_file(rig.root().join(".twinbox-filler")).unwrap();
    rig.applied(lsn).await;
    assert_eq!(rig.model.differences(&rig.root()), Vec::<String>::new());
    // Local changes are kept although the state directory is another file system.
    fs::write(rig.root().join("d/a"), b"edited").unwrap();
    fs::remove_file(rig.root().join("e")).unwrap();
    fs::create_dir_all(rig.root().join("e/below")).unwrap();
    fs::write(rig.root().join("e/below/f"), b"strange").unwrap();
    std::os::unix::fs::symlink("nowhere", rig.root().join("e/l")).unwrap();
    let lsn = rig.send(vec![remove("d/a"), put("e", b"y", 2)]).await;
    rig.applied(lsn).await;
    assert_eq!(rig.model.differences(&rig.root()), Vec::<String>::new());
    let kept = rig.rescued();
    let kept: Vec<(&str, &[u8])> = kept.iter().map(|(n, b)| (n.as_str(), b.as_slice())).collect();
    assert_eq!(kept, [("d/a", b"edited".as_slice()), ("e/below/f", b"strange"), ("e/l", b"")]);
    rig.stop();
    drop(mount);
}
