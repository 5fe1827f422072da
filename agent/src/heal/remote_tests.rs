//! A standby that says what it should not: nothing of it reaches the disk as a content that was asked for.

use std::net::{Ipv4Addr, SocketAddr};

use serde_bytes::ByteBuf;
use twinbox_protocol::digest::{Digest, DigestKey};
use twinbox_protocol::entry::Kind;
use twinbox_protocol::ids::{ChainHash, Epoch, Generation, Incarnation, MirrorId};
use twinbox_protocol::lineage::Lineage;
use twinbox_protocol::msg::{Replica, Welcome};

use super::*;
use crate::net::{Endpoint, NodeKey, PinnedPeers, Tuning};

fn hello() -> Hello {
    Hello {
        protocol: 1,
        software: String::new(),
        node: "a".into(),
        mirror: "m".into(),
        mirror_id: MirrorId([1; 16]),
        lineage: Lineage::begin(Generation([2; 16]), "a"),
        epoch: Epoch(1),
        incarnation: Incarnation([3; 16]),
        position: Position::START,
        digest: Digest::default(),
        digest_key: DigestKey([4; 32]),
        chunker: "c".into(),
        layout: "maildir".into(),
        wall_ns: 0,
    }
}

fn welcome(generation: u8) -> ToPrimary {
    let replica = Replica::Holds {
        lineage: Lineage::begin(Generation([generation; 16]), "a"),
        epoch: Epoch(1),
        position: Position { lsn: Lsn(9), chain: ChainHash([9; 32]) },
        digest: Digest::default(),
        chain_at_yours: Some(ChainHash::ZERO),
        complete: true,
    };
    ToPrimary::Welcome(Box::new(Welcome {
        protocol: 1,
        software: String::new(),
        node: "b".into(),
        incarnation: Incarnation([5; 16]),
        chunker: "c".into(),
        replica,
        wall_ns: 0,
    }))
}

/// A connection to a standby that answers the first message with `first` and the second with `then`, whatever they are.
async fn speaks(first: Vec<ToPrimary>, then: Vec<ToPrimary>) -> (quinn::Connection, Vec<Endpoint>) {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (NodeKey::load_or_create(&dir.path().join("a")).unwrap(), NodeKey::load_or_create(&dir.path().join("b")).unwrap());
    let (a_pins, b_pins) = (PinnedPeers::new(), PinnedPeers::new());
    a_pins.pin(b.fingerprint(), "b").unwrap();
    b_pins.pin(a.fingerprint(), "a").unwrap();
    let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let listener = Endpoint::bind(Some(loopback), b.clone(), b_pins, Tuning::default()).unwrap();
    let dialler = Endpoint::bind(Some(loopback), a, a_pins, Tuning::default()).unwrap();
    let accepting = listener.clone();
    tokio::spawn(async move {
        let incoming = accepting.accept().await.unwrap();
        let (mut send, recv) = incoming.connection.accept_bi().await.unwrap();
        let mut control = FrameReader::<ToStandby>::new(recv, CONTROL_MAX);
        for messages in [first, then] {
            control.next().await.unwrap();
            for message in messages {
                if write_frame(&mut send, &message).await.is_err() {
                    return;
                }
            }
        }
        let _ = control.next().await; // Until the other side has read it all.
    });
    let connection = dialler.dial(listener.local_addr().unwrap(), b.fingerprint()).await.unwrap();
    (connection, vec![listener, dialler])
}

async fn fetched(then: Vec<ToPrimary>) -> (Result<Option<Vec<RelPath>>, RemoteError>, Vec<u8>) {
    let (connection, _endpoints) = speaks(vec![welcome(2)], then).await;
    let Greeting::Holds(mut remote) = Remote::greet(&connection, hello()).await.unwrap() else { panic!("it holds rows") };
    let mut file = tempfile::tempfile().unwrap();
    let path = RelPath::new(b"new/1").unwrap();
    let ended = timeout(Duration::from_secs(20), remote.fetch(&path, ContentHash::of(b"mail"), 4, &mut file)).await.expect("an end");
    let mut bytes = vec![];
    std::io::Seek::rewind(&mut file).unwrap();
    std::io::Read::read_to_end(&mut file, &mut bytes).unwrap();
    (ended, bytes)
}

fn piece(bytes: &[u8]) -> ToPrimary {
    ToPrimary::Piece { bytes: ByteBuf::from(bytes) }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_content_counts_only_when_it_is_the_one_asked_for() {
    let hash = ContentHash::of(b"mail");
    let end = || ToPrimary::Fetched { hash };
    let names = || ToPrimary::Names { paths: vec![RelPath::new(b"cur/2").unwrap()] };
    let (right, bytes) = fetched(vec![names(), piece(b"ma"), ToPrimary::Heartbeat { seq: 1, wall_ns: 1 }, piece(b"il"), end()]).await;
    assert_eq!((right.unwrap().unwrap().len(), &bytes[..]), (1, &b"mail"[..]));
    assert!(matches!(fetched(vec![ToPrimary::NotHere { hash }]).await.0, Ok(None)));
    for wrong in [
        vec![piece(b"liam"), end()],
        vec![piece(b"mai"), end()],
        vec![end()],
        vec![piece(b"mail"), piece(b"!"), end()],
        vec![piece(b"ma"), ToPrimary::NotHere { hash }],
        vec![names(), names(), piece(b"mail"), end()],
        vec![piece(b"mail"), names(), end()],
        vec![ToPrimary::Begun],
    ] {
        let shown = format!("{wrong:?}");
        let (ended, bytes) = fetched(wrong).await;
        assert!(matches!(ended, Err(RemoteError::OutOfTurn(_))), "{shown}: {ended:?}");
        assert!(bytes.len() <= 4, "{shown}: more than the content can have was written");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn another_history_is_refused_for_good_and_a_standby_that_cannot_now_is_asked_again() {
    let greet = async |said: ToPrimary| {
        let (connection, _endpoints) = speaks(vec![said], vec![]).await;
        Remote::greet(&connection, hello()).await.map(|_| ())
    };
    assert!(greet(welcome(2)).await.is_ok());
    let refuse = |code| ToPrimary::Refuse { code, message: "no".into() };
    for (said, is_final) in [
        (welcome(7), true),
        (refuse(RefuseCode::Diverged), true),
        (refuse(RefuseCode::NoSuchMirror), true),
        (refuse(RefuseCode::Failed), false),
        (refuse(RefuseCode::Busy), false),
        (ToPrimary::Begun, false),
    ] {
        let shown = format!("{said:?}");
        let error = greet(said).await.expect_err(&shown);
        assert_eq!(error.is_final(), is_final, "{shown}: {error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_cannot_be_are_refused() {
    let kind = Kind::File { size: 4, hash: ContentHash::of(b"mail") };
    let mut entry = Entry { kind, mode: 0o600, uid: 0, gid: 0, mtime: Default::default(), xattrs: vec![] };
    let end = ToPrimary::RowsEnd { position: Position { lsn: Lsn(9), chain: ChainHash([9; 32]) }, digest: Digest::default() };
    let path = RelPath::new(b"new/1").unwrap();
    for good in [true, false] {
        if !good {
            entry.mode = u32::MAX;
        }
        let rows = ToPrimary::Rows { rows: vec![(path.clone(), Some(entry.clone())), (path.clone(), None)] };
        let (connection, _endpoints) = speaks(vec![welcome(2)], vec![rows, end.clone()]).await;
        let Greeting::Holds(mut remote) = Remote::greet(&connection, hello()).await.unwrap() else { panic!("it holds rows") };
        let mut count = 0;
        let ended: Result<Position, RemoteError> = remote
            .rows(Lsn(3), |_, _| {
                count += 1;
                Ok(())
            })
            .await;
        assert_eq!((ended.is_ok(), count), if good { (true, 2) } else { (false, 0) });
    }
}
