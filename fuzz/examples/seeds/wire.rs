//! Seeds of what crosses the wire.

use serde_bytes::ByteBuf;
use twinbox_protocol::chunk::CHUNKER;
use twinbox_protocol::codec::encode;
use twinbox_protocol::digest::{Digest, DigestKey};
use twinbox_protocol::entry::{Entry, Kind, Time};
use twinbox_protocol::ids::{ChainHash, ContentHash, Epoch, Generation, Incarnation, Lsn, MirrorId};
use twinbox_protocol::lineage::{Lineage, Term};
use twinbox_protocol::msg::{BulkItem, Hello, Position, RefuseCode, Replica, StreamHead, ToPrimary, ToStandby, Welcome};
use twinbox_protocol::ops::{Attrs, Content, LogFrame, Op, Seal, Seg};
use twinbox_protocol::path::RelPath;
use twinbox_protocol::rejoin::{Ask, Changes, Differs, Flags, Found, Merge, Merged, Place, Task};

use crate::seed;

pub(crate) const MAIL: &[u8] = b"Return-Path: <ann@example.org>\r\nSubject: seed\r\n\r\nHello.\r\n";

pub(crate) fn path(text: &str) -> RelPath {
    RelPath::new(text.as_bytes()).expect("a legal path")
}

pub(crate) fn entry(kind: Kind) -> Entry {
    let mtime = Time { secs: 1_700_000_000, nanos: 123_456_789 };
    Entry { kind, mode: 0o640, uid: 1000, gid: 1000, mtime, xattrs: vec![] }
}

pub(crate) fn file(bytes: &[u8]) -> Entry {
    entry(Kind::File { size: bytes.len() as u64, hash: ContentHash::of(bytes) })
}

pub(crate) fn frame(lsn: u64, ops: Vec<Op>) -> LogFrame {
    let seal = Some(Seal { digest: Digest([1, 2, 3, 4]), ops: ops.len() as u64 });
    LogFrame { lsn: Lsn(lsn), prev: Lsn(lsn - 1), part: 0, flags: 1, captured_ns: 1_700_000_000_000_000_000, ops, seal }
}

/// Every op, by name.
pub(crate) fn ops() -> Vec<(&'static str, Op)> {
    let hash = ContentHash::of(MAIL);
    let put = |content| Op::Put { path: path("cur/1.host:2,S"), entry: file(MAIL), content };
    let half = MAIL.len() as u64 / 2;
    let recipe =
        vec![Seg::Data(ByteBuf::from(&MAIL[..4])), Seg::Copy { from: hash, offset: 4, len: half }, Seg::Hole(MAIL.len() as u64 - half - 4)];
    let mut marked = file(MAIL);
    marked.xattrs = vec![(ByteBuf::from(b"user.a"), ByteBuf::from(b"1")), (ByteBuf::from(b"user.b"), ByteBuf::from(b"2"))];
    vec![
        ("put-inline", put(Content::Inline(ByteBuf::from(MAIL)))),
        ("put-known", put(Content::Known)),
        ("put-staged", put(Content::Staged)),
        ("put-recipe", put(Content::Recipe(recipe))),
        (
            "patch",
            Op::Patch {
                path: path("mbox"),
                entry: file(MAIL),
                base: ContentHash::of(b"before"),
                writes: vec![(0, ByteBuf::from(b"ab")), (10, ByteBuf::from(b"cd"))],
            },
        ),
        ("make-dir", Op::Make { path: path("cur"), entry: entry(Kind::Dir) }),
        ("make-link", Op::Make { path: path("s"), entry: entry(Kind::Symlink { target: ByteBuf::from(b"../t") }) }),
        ("make-fifo", Op::Make { path: path("f"), entry: entry(Kind::Fifo) }),
        ("make-device", Op::Make { path: path("d"), entry: entry(Kind::Device { block: false, major: 1, minor: 3 }) }),
        ("rename", Op::Rename { from: path("new/1.host"), to: path("cur/1.host:2,") }),
        ("link", Op::Link { from: path("cur/1"), to: path(".Sent/cur/1") }),
        ("remove", Op::Remove { path: path("cur/1") }),
        ("set-meta", Op::SetMeta { path: path("cur/1"), attrs: Attrs::of(&marked) }),
    ]
}

/// One frame an op, one with all, one without a seal.
pub(crate) fn log_frame() {
    for (name, op) in ops() {
        seed("log_frame", name, &encode(&frame(7, vec![op])));
    }
    let all = frame(u64::from(u32::MAX), ops().into_iter().map(|(_, op)| op).collect());
    seed("log_frame", "all-ops", &encode(&all));
    seed("log_frame", "open-part", &encode(&LogFrame { seal: None, part: 3, ops: vec![], ..all }));
}

fn at(lsn: u64) -> Position {
    Position { lsn: Lsn(lsn), chain: ChainHash([lsn as u8; 32]) }
}

fn hello() -> Hello {
    Hello {
        protocol: twinbox_protocol::PROTOCOL_VERSION,
        software: "0.1.0".into(),
        node: "mail-a".into(),
        mirror: "mail".into(),
        mirror_id: MirrorId([1; 16]),
        lineage: Lineage::begin(Generation([2; 16]), "a"),
        epoch: Epoch(1),
        incarnation: Incarnation([3; 16]),
        position: at(10),
        digest: Digest([5; 4]),
        digest_key: DigestKey([6; 32]),
        chunker: CHUNKER.into(),
        layout: "maildir".into(),
        wall_ns: 1_700_000_000_000_000_000,
    }
}

fn welcome(replica: Replica) -> Welcome {
    Welcome {
        protocol: twinbox_protocol::PROTOCOL_VERSION,
        software: "0.1.0".into(),
        node: "mail-b".into(),
        incarnation: Incarnation([4; 16]),
        chunker: CHUNKER.into(),
        replica,
        wall_ns: -1,
    }
}

fn holds(generation: u8, lsn: u64, chain_at_yours: Option<u8>) -> Replica {
    Replica::Holds {
        lineage: Lineage::begin(Generation([generation; 16]), "a"),
        epoch: Epoch(1),
        position: at(lsn),
        digest: Digest([5; 4]),
        chain_at_yours: chain_at_yours.map(|c| ChainHash([c; 32])),
        complete: true,
    }
}

/// With a term more.
fn promoted(mut replica: Replica, to: u64) -> Replica {
    if let Replica::Holds { lineage, epoch, .. } = &mut replica {
        *epoch = Epoch(to);
        lineage.mint(Term { generation: Generation([8; 16]), epoch: Epoch(to), node: "mail-b".into(), start: at(10) });
    }
    replica
}

/// What a node that comes back asks, and has done.
fn merges() -> Vec<(&'static str, Merge)> {
    let (folder, unique) = (path("anna/Maildir/.Sent"), b"1.M1P1.host".to_vec());
    let flags = || Flags::from(["S", "F", "$Work"].map(String::from));
    let server = |task| Merge::Server { owner: path("anna/mdbox"), task };
    let at = || Place { mailbox: path("INBOX"), index: 77, uid: 5 };
    let print = ContentHash::of(MAIL);
    vec![
        ("dir", Merge::Dir { path: folder.clone(), entry: entry(Kind::Dir) }),
        ("message", Merge::Message { folder: folder.clone(), unique: unique.clone(), flags: flags(), entry: file(MAIL) }),
        ("flags", Merge::Flags { folder: folder.clone(), unique: unique.clone(), set: flags(), clear: Flags::new() }),
        ("move", Merge::Move { from: path("anna/Maildir"), was: unique.clone(), folder, unique, set: Flags::new(), clear: flags() }),
        ("file", Merge::File { path: path("anna/sieve"), entry: file(b"keep;") }),
        ("rename", Merge::Rename { from: path("a/b"), to: path("a/c") }),
        ("import", server(Task::Import { mailbox: path("A/B"), flags: flags(), entry: file(MAIL), print })),
        ("server-flags", server(Task::Flags { at: at(), set: flags(), clear: flags() })),
        ("server-move", server(Task::Move { at: at(), to: path("B"), print, guid: "3aece431".into(), set: flags(), clear: Flags::new() })),
        ("server-rename", server(Task::Rename { mailbox: path("A"), to: path("B") })),
        ("server-create", server(Task::Create { mailbox: path("B") })),
    ]
}

fn rejoin(put: &dyn Fn(u8, &str, Vec<u8>)) {
    let hash = ContentHash::of(MAIL);
    put(0, "to-standby-rejoin", encode(&ToStandby::Rejoin(Box::new(hello()))));
    let asks = vec![
        Ask::Path(path("a/b")),
        Ask::Message { folder: path("a/Maildir"), unique: b"1.host".to_vec() },
        Ask::Mail { owner: path("a/mail"), mailbox: path("INBOX"), print: hash },
    ];
    put(0, "to-standby-ask", encode(&ToStandby::Ask { asks }));
    put(0, "to-standby-changes", encode(&ToStandby::Changes));
    for (name, merge) in merges() {
        put(0, &format!("to-standby-merge-{name}"), encode(&ToStandby::Merge(Box::new(merge))));
    }
    put(0, "to-standby-piece", encode(&ToStandby::Piece { bytes: ByteBuf::from(MAIL) }));
    put(0, "to-standby-end", encode(&ToStandby::End));
    let found = Found { path: path("a/cur/1:2,S"), entry: file(MAIL), flags: Flags::from(["S".to_owned()]) };
    put(1, "to-primary-found", encode(&ToPrimary::Found { found: vec![Some(found), None] }));
    let changes = Changes { new: 1, changed: 2, gone: 3, first: vec![(Differs::Gone, path("a/new/1"))], has_program: true };
    put(1, "to-primary-changed", encode(&ToPrimary::Changed(Box::new(changes))));
    put(1, "to-primary-merged", encode(&ToPrimary::Merged(Merged::Kept { why: "it is there".into() })));
}

/// Every message, and greetings with every verdict.
pub(crate) fn control() {
    let put = |kind: u8, name: &str, body: Vec<u8>| seed("control", name, &[&[kind][..], &body].concat());
    let hash = ContentHash::of(MAIL);
    for (name, message) in [
        ("to-standby-hello", ToStandby::Hello(Box::new(hello()))),
        ("to-standby-pull", ToStandby::Pull { since: Some(Lsn(4)) }),
        ("to-standby-begin", ToStandby::Begin { from: at(10), reset: true }),
        ("to-standby-heartbeat", ToStandby::Heartbeat { seq: 9, wall_ns: 1, stored: Lsn(8) }),
        ("to-standby-gone", ToStandby::Gone { hash }),
        ("to-standby-unstage", ToStandby::Unstage { hash }),
        ("to-standby-fetch", ToStandby::Fetch { path: path("a/new/1.M1.host"), hash }),
    ] {
        put(0, name, encode(&message));
    }
    let rows = vec![(path("cur/1"), Some(file(MAIL))), (path("cur/2"), None), (RelPath::root(), Some(entry(Kind::Dir)))];
    for (name, message) in [
        ("to-primary-welcome", ToPrimary::Welcome(Box::new(welcome(holds(2, 10, None))))),
        ("to-primary-refuse", ToPrimary::Refuse { code: RefuseCode::Diverged, message: "no".into() }),
        ("to-primary-rows", ToPrimary::Rows { rows }),
        ("to-primary-rows-end", ToPrimary::RowsEnd { position: at(10), digest: Digest([5; 4]) }),
        ("to-primary-begun", ToPrimary::Begun),
        ("to-primary-durable", ToPrimary::Durable { lsn: Lsn(11) }),
        ("to-primary-applied", ToPrimary::Applied { lsn: Lsn(11) }),
        ("to-primary-staged", ToPrimary::Staged { hash }),
        ("to-primary-miss", ToPrimary::Miss { hash }),
        ("to-primary-heartbeat", ToPrimary::Heartbeat { seq: 9, wall_ns: -5 }),
        ("to-primary-problem", ToPrimary::Problem { message: "disk full".into() }),
        ("to-primary-piece", ToPrimary::Piece { bytes: ByteBuf::from("From: a") }),
        ("to-primary-names", ToPrimary::Names { paths: vec![path("a/new/1"), path("a/cur/1:2,")] }),
        ("to-primary-fetched", ToPrimary::Fetched { hash }),
        ("to-primary-not-here", ToPrimary::NotHere { hash }),
        ("to-primary-incomplete", ToPrimary::Incomplete { hash }),
    ] {
        put(1, name, encode(&message));
    }
    rejoin(&put);
    put(2, "head-log", encode(&StreamHead::Log { mirror: "mail".into() }));
    put(2, "head-bulk", encode(&StreamHead::Bulk { mirror: "mail".into(), id: 3 }));
    put(3, "bulk-data", encode(&BulkItem::Seg(Seg::Data(ByteBuf::from(MAIL)))));
    put(3, "bulk-copy", encode(&BulkItem::Seg(Seg::Copy { from: hash, offset: 1, len: 2 })));
    put(3, "bulk-end", encode(&BulkItem::End { hash, size: 100 }));
    for (name, replica) in [
        ("greet-empty", Replica::Empty),
        ("greet-adopted", Replica::Adopted { rows: 5 }),
        ("greet-equal", holds(2, 10, Some(10))),
        ("greet-ahead", holds(2, 12, Some(10))),
        ("greet-forked", holds(2, 12, Some(9))),
        ("greet-forgot", holds(2, 12, None)),
        ("greet-behind", holds(2, 3, None)),
        ("greet-diverged", holds(9, 10, Some(10))),
        ("greet-promoted", promoted(holds(2, 10, Some(10)), 2)),
        ("greet-put-back", promoted(holds(2, 10, Some(10)), 1)),
    ] {
        let hello = encode(&hello());
        let body = [&(hello.len() as u16).to_le_bytes()[..], &hello, &encode(&welcome(replica))].concat();
        put(4, name, body);
    }
}
