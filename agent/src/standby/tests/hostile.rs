//! Frames no honest primary sends, and trees somebody prepared.

use twinbox_protocol::codec;
use twinbox_protocol::msg::RefuseCode;
use twinbox_protocol::ops::{LogFrame, Seal};

use super::*;

fn frame(lsn: u64, prev: u64, part: u32, ops: Vec<Op>, seal: bool) -> LogFrame {
    let seal = seal.then_some(Seal { digest: Digest::default(), ops: ops.len() as u64 });
    LogFrame { lsn: Lsn(lsn), prev: Lsn(prev), part, flags: 0, captured_ns: 0, ops, seal }
}

/// Sends frames and gives the reason the session ends; nothing may have been acknowledged or written.
async fn fails(frames: &[Vec<u8>]) -> StandbyError {
    let mut rig = Rig::new().await;
    rig.check(vec![put("a", b"1", 1)]).await;
    let before = rig.outbox.last();
    for frame in frames {
        let _ = soon(rig.session.as_ref().unwrap().frame(frame.clone())).await;
    }
    let error = soon(rig.session.as_ref().unwrap().failed()).await;
    rig.begin().await.unwrap();
    assert_eq!(rig.outbox.last(), before);
    assert_eq!(rig.model.differences(&rig.root()), Vec::<String>::new());
    rig.check(vec![put("b", b"goes on", 2)]).await;
    error
}

#[tokio::test]
async fn frames_out_of_order_end_the_session() {
    let enc = |f: LogFrame| codec::encode(&f);
    for bad in [
        vec![enc(frame(9, 7, 0, vec![], true))],
        vec![enc(frame(2, 1, 1, vec![], true))],
        vec![enc(frame(2, 1, 0, vec![put("x", b"1", 1)], false)), enc(frame(2, 1, 2, vec![], true))],
        vec![enc(frame(2, 1, 0, vec![put("x", b"1", 1)], false)), enc(frame(3, 1, 1, vec![], true))],
        vec![enc(LogFrame { seal: Some(Seal { digest: Digest::default(), ops: 5 }), ..frame(2, 1, 0, vec![], true) })],
    ] {
        assert!(matches!(fails(&bad).await, StandbyError::Order { .. }));
    }
}

#[tokio::test]
async fn malformed_and_damaged_frames_end_the_session() {
    let op = Op::Put { path: p("x"), entry: file(b"1", 1), content: Content::Inline(ByteBuf::from("2")) };
    assert!(matches!(fails(&[codec::encode(&frame(2, 1, 0, vec![op], true))]).await, StandbyError::Damaged { .. }));
    let op = Op::Put { path: RelPath::root(), entry: file(b"1", 1), content: Content::Inline(ByteBuf::from("1")) };
    assert!(matches!(fails(&[codec::encode(&frame(2, 1, 0, vec![op], true))]).await, StandbyError::Frame { .. }));
    assert!(matches!(fails(&[b"garbage".to_vec()]).await, StandbyError::Frame { .. }));
    assert!(matches!(fails(&[vec![0; codec::LOG_FRAME_MAX + 1]]).await, StandbyError::Frame { .. }));
    let good = codec::encode(&frame(2, 1, 0, vec![put("x", b"1", 1)], true));
    for at in 0..good.len() {
        let mut cut = good.clone();
        cut.truncate(at);
        let rig_error = codec::decode_log(&cut);
        assert!(rig_error.is_err());
    }
}

#[tokio::test]
async fn a_link_in_the_replica_leads_nobody_outside() {
    let mut rig = Rig::new().await;
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("secret"), b"untouched").unwrap();
    fs::write(outside.path().join("f"), b"untouched").unwrap();
    rig.check(vec![mkdir("d", 1), put("d/f", b"1", 1), put("d/g", b"2", 1), put("k", b"3", 1)]).await;
    fs::rename(rig.root().join("d"), rig.root().join("was")).unwrap();
    std::os::unix::fs::symlink(outside.path(), rig.root().join("d")).unwrap();
    fs::remove_file(rig.root().join("k")).unwrap();
    std::os::unix::fs::symlink(outside.path().join("secret"), rig.root().join("k")).unwrap();
    let patch = rig.model.patch("k", &[(0, b"evil")], 4, 2);
    let attrs = Attrs { mode: 0o777, ..Attrs::of(&file(b"", 9)) };
    let before = (fs::metadata(outside.path()).unwrap(), fs::metadata(outside.path().join("f")).unwrap());
    let ops = vec![
        put("d/f", b"evil", 2),
        put("d/secret", b"evil", 2),
        Op::SetMeta { path: p("d/g"), attrs: attrs.clone() },
        Op::SetMeta { path: p("d"), attrs },
        remove("d/g"),
        rename("d/f", "out"),
    ];
    ops.iter().for_each(|op| rig.model.perform(op).unwrap());
    rig.model.perform(&patch).unwrap();
    rig.send_raw([ops, vec![patch]].concat(), 0).await;
    rig.until(|m| matches!(m, ToPrimary::Miss { .. })).await;
    let names: Vec<_> = fs::read_dir(outside.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names.len(), 2, "{names:?}");
    for name in ["f", "secret"] {
        assert_eq!(fs::read(outside.path().join(name)).unwrap(), b"untouched");
    }
    let after = (fs::metadata(outside.path()).unwrap(), fs::metadata(outside.path().join("f")).unwrap());
    assert_eq!(
        (before.0.mode(), before.0.ctime_nsec(), before.1.ctime_nsec()),
        (after.0.mode(), after.0.ctime_nsec(), after.1.ctime_nsec())
    );
}

#[tokio::test]
async fn a_panic_in_a_thread_leaves_nobody_waiting() {
    let mut rig = Rig::new().await;
    let reply = Box::new(|_: Vec<fs::File>| panic!("provoked by a test"));
    rig.handle().applier.send(Cmd::Fetch { hash: ContentHash([0; 32]), hint: None, reply }).unwrap();
    rig.send_raw(vec![put("a", b"1", 1)], 0).await;
    assert!(matches!(soon(rig.session.as_ref().unwrap().failed()).await, StandbyError::Latched { .. }));
    let refused = soon(rig.handle().replica(&hello(Position::START, Digest::default()))).await.unwrap_err();
    assert_eq!(refused.code, RefuseCode::Failed);
    let (out, _keep) = mpsc::unbounded_channel();
    assert!(soon(rig.handle().begin(Position::START, false, out)).await.is_err());
    rig.stop();
    rig.start().unwrap();
}
