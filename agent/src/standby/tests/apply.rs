//! Every op, on a real tree.

use super::*;

#[tokio::test]
async fn every_kind_of_op_with_names_of_any_bytes() {
    let mut rig = Rig::new().await;
    let weird = RelPath::new(b"cur/\xff\xfe \n\"'\\:2,S").unwrap();
    let long = "n".repeat(255);
    rig.check(vec![
        Op::Make { path: RelPath::root(), entry: dir(5) },
        mkdir("cur", 1),
        put("cur/a", b"one", 2),
        Op::Put { path: weird.clone(), entry: file(b"weird", 3), content: Content::Inline(ByteBuf::from("weird")) },
        put(&format!("cur/{long}"), b"", 4),
        Op::Make { path: p("cur/link"), entry: entry(Kind::Symlink { target: ByteBuf::from("../no/where") }, 0o777, 9) },
        Op::Make { path: p("cur/pipe"), entry: entry(Kind::Fifo, 0o600, 10) },
    ])
    .await;
    rig.check(vec![
        rename("cur/a", "cur/b"),
        link("cur/b", "cur/c"),
        Op::Rename { from: weird, to: p("plain") },
        mkdir("new", 11),
        rename("cur", "old"),
        rename("old/link", "new/link"),
        remove("old/pipe"),
    ])
    .await;
    let attrs = Attrs { mode: 0o4751, mtime: Time { secs: -5, nanos: 7 }, ..Attrs::of(&file(b"", 1)) };
    rig.check(vec![
        Op::SetMeta { path: p("old/b"), attrs: attrs.clone() },
        Op::SetMeta { path: p("old/c"), attrs },
        Op::SetMeta { path: p("new"), attrs: Attrs::of(&dir(99)) },
        put("plain", b"replaced", 50),
    ])
    .await;
    rig.check(vec![remove("old/b"), put("old/c", b"alone now", 51), remove("new/link"), remove("new")]).await;
}

#[tokio::test]
async fn extended_attributes_come_and_go() {
    let mut rig = Rig::new().await;
    let with = |attrs: &[(&str, &[u8])]| {
        let mut entry = file(b"x", 3);
        entry.mode = 0o400;
        entry.xattrs = attrs.iter().map(|(n, v)| (ByteBuf::from(*n), ByteBuf::from(*v))).collect();
        Op::Put { path: p("f"), entry, content: Content::Inline(ByteBuf::from("x")) }
    };
    rig.check(vec![with(&[("user.a", b"1"), ("user.b", &[7; 900])])]).await;
    let mut attrs = Attrs::of(&file(b"x", 4));
    attrs.xattrs = vec![(ByteBuf::from("user.b"), ByteBuf::from("2"))];
    rig.check(vec![Op::SetMeta { path: p("f"), attrs }]).await;
    // u::rw- u:12:rw- g::r-- m::rw- o::---
    let acl: &[u8] = b"\x02\0\0\0\x01\0\x06\0\xff\xff\xff\xff\x02\0\x06\0\x0c\0\0\0\x04\0\x04\0\xff\xff\xff\xff\x10\0\x06\0\xff\xff\xff\xff\x20\0\0\0\xff\xff\xff\xff";
    let mut attrs = Attrs::of(&file(b"x", 4));
    attrs.mode = 0o660;
    attrs.xattrs = vec![(ByteBuf::from("system.posix_acl_access"), ByteBuf::from(acl))];
    rig.check(vec![Op::SetMeta { path: p("f"), attrs }]).await;
    rig.check(vec![Op::SetMeta { path: p("f"), attrs: Attrs::of(&file(b"x", 5)) }]).await;
    // What a directory gives its children by default is not what they have on the primary.
    let mut inherits = dir(6);
    inherits.mode = 0o770;
    inherits.xattrs = vec![(ByteBuf::from("system.posix_acl_default"), ByteBuf::from(acl))];
    rig.check(vec![Op::Make { path: p("d"), entry: inherits }, put("d/f", b"1", 7), mkdir("d/e", 8)]).await;
}

#[tokio::test]
async fn patches_in_place_grow_shrink_and_follow_each_other() {
    let mut rig = Rig::new().await;
    rig.check(vec![put("f", &noise(1, 50_000), 1), put("small", b"abc", 1)]).await;
    let ino = fs::metadata(rig.root().join("f")).unwrap().ino();
    let writes: [&[(u64, &[u8])]; 5] =
        [&[(4096, &[1; 4096])], &[(10, b"x"), (49_999, b"yz")], &[(60_000, &[3; 9000])], &[], &[(0, b"start"), (8000, &[4; 500])]];
    for (step, (writes, size)) in writes.iter().zip([50_000, 50_001, 69_000, 5000, 20_000]).enumerate() {
        let op = rig.model.patch("f", writes, size, 10 + step as i64);
        rig.check(vec![op]).await;
    }
    let a = rig.model.patch("small", &[(1, b"X")], 3, 30);
    rig.model.perform(&a).unwrap();
    let b = rig.model.patch("small", &[(2, b"Y")], 9, 31);
    rig.model.perform(&b).unwrap();
    let lsn = rig.send_raw(vec![a, b], 0).await;
    rig.applied(lsn).await;
    rig.same();
    assert_eq!(fs::metadata(rig.root().join("f")).unwrap().ino(), ino, "patched in place");
}

#[tokio::test]
async fn a_local_edit_is_kept_in_rescue_and_then_overwritten() {
    let mut rig = Rig::new().await;
    let big = noise(3, 20_000);
    rig.check(vec![mkdir("d", 1), put("d/a", b"one", 1), put("d/b", b"two", 1), put("d/c", b"three", 1), put("big", &big, 1)]).await;
    fs::write(rig.root().join("d/a"), b"edited a").unwrap();
    fs::write(rig.root().join("d/b"), b"edited b").unwrap();
    fs::write(rig.root().join("new"), b"not ours").unwrap();
    fs::write(rig.root().join("big"), b"edited big").unwrap();
    fs::create_dir(rig.root().join("e")).unwrap();
    fs::write(rig.root().join("e/inside"), b"not ours either").unwrap();
    let patch = rig.model.patch("big", &[(0, b"patched")], 20_000, 9);
    rig.model.perform(&patch).unwrap();
    let wanted = rig.model.bytes[&rig.model.rows[&p("big")].entry.hash().unwrap()].clone();
    let ops = vec![put("d/a", b"next", 2), remove("d/b"), put("new", b"ours", 2), put("e", b"a file", 3), rename("d/c", "d/z")];
    ops.iter().for_each(|op| rig.model.perform(op).unwrap());
    let lsn = rig.send_raw([vec![patch], ops].concat(), 0).await;
    let ToPrimary::Miss { hash } = rig.until(|m| matches!(m, ToPrimary::Miss { .. })).await else { unreachable!() };
    assert_eq!(hash, ContentHash::of(&wanted));
    let mut object = soon(rig.session.as_ref().unwrap().object()).await.unwrap();
    use twinbox_protocol::msg::BulkItem;
    use twinbox_protocol::ops::Seg;
    assert!(!soon(object.item(BulkItem::Seg(Seg::Data(ByteBuf::from(wanted.clone()))))).await.unwrap());
    assert!(soon(object.item(BulkItem::End { hash, size: 20_000 })).await.unwrap());
    drop(object);
    rig.applied(lsn).await;
    assert_eq!(rig.model.differences(&rig.root()), Vec::<String>::new());
    let kept: Vec<(String, Vec<u8>)> = rig.rescued();
    let kept: Vec<(&str, &[u8])> = kept.iter().map(|(n, b)| (n.as_str(), b.as_slice())).collect();
    assert_eq!(
        kept,
        [
            ("big", b"edited big".as_slice()),
            ("d/a", b"edited a"),
            ("d/b", b"edited b"),
            ("e/inside", b"not ours either"),
            ("new", b"not ours"),
        ]
    );
    assert!(rig.problems().iter().any(|m| m.contains("rescue")));
}

/// `cargo test --release -p twinbox --lib standby::tests::apply::measure -- --ignored --nocapture`
#[tokio::test]
#[ignore = "a measurement"]
async fn measure_a_burst_of_messages() {
    let mut rig = Rig::new().await;
    rig.check(vec![mkdir("new", 1), mkdir("cur", 1)]).await;
    let bytes: Vec<Vec<u8>> = (0..5000).map(|at| noise(at, 8000)).collect();
    let start = std::time::Instant::now();
    let (mut last, mut digest) = (Lsn::ZERO, rig.model.digest());
    for (at, bytes) in bytes.iter().enumerate() {
        let path = format!("new/{at}");
        digest.add(Digest::row(&key(), &p(&path), &file(bytes, 1)));
        let (lsn, frames) = rig.outbox.seal(vec![put(&path, bytes, 1)], 0, digest, 1).unwrap();
        soon(rig.session.as_ref().unwrap().frame(frames[0].clone())).await.unwrap();
        last = lsn;
    }
    rig.durable(last).await;
    eprintln!("durable after {:?}", start.elapsed());
    rig.applied(last).await;
    eprintln!("applied after {:?}", start.elapsed());
}

/// A healing primary repeats the removals it is told of: a failure here must not be one of them.
#[tokio::test]
async fn what_could_not_be_applied_is_not_told_as_removed() {
    let mut rig = Rig::new().await;
    let ops = vec![mkdir("d", 1), mkdir("e", 1), put("d/a", b"one", 1), put("e/b", b"two", 1), put("old", b"three", 1), put("x", b"x", 1)];
    rig.check(ops).await;
    rig.check(vec![remove("x")]).await;
    for lost in ["d", "e"] {
        fs::remove_dir_all(rig.root().join(lost)).unwrap();
    }
    // A file whose directory is gone, a directory that cannot be moved with what is in it, and the removal of what the first was made of.
    let lsn = rig.send(vec![put("d/a", b"next", 2), rename("e", "f"), put("d/copy", b"three", 3), remove("old")]).await;
    rig.applied(lsn).await;
    assert_eq!(rig.problems().len(), 1);
    rig.checkpoint().await;
    assert_eq!(rig.gone(), ["x"]);
}
