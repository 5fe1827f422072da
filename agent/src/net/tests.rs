//! Two real endpoints over loopback: what a good peer gets, and what everybody else does not.

use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use quinn::{ConnectionError, TransportErrorCode};
use tokio::time::timeout;

use super::tls::Protocol;
use super::*;

const NOW: UnixSecs = 1_800_000_000;
const SOON: UnixSecs = NOW + 600;

/// Bounds every wait; far above what any of them takes.
async fn soon<F: Future>(future: F) -> F::Output {
    let limit = Duration::from_secs(30);
    timeout(limit, future).await.expect("took too long")
}

fn endpoint() -> Endpoint {
    let addr = "127.0.0.1:0".parse().ok();
    let key = NodeKey::generate().unwrap();
    Endpoint::bind(addr, key, PinnedPeers::new(), Tuning::default()).unwrap()
}

fn addr(endpoint: &Endpoint) -> SocketAddr {
    endpoint.local_addr().unwrap()
}

/// Two endpoints that have pinned each other.
fn acquainted() -> (Endpoint, Endpoint) {
    let (a, b) = (endpoint(), endpoint());
    a.pinned().pin(b.fingerprint(), "b").unwrap();
    b.pinned().pin(a.fingerprint(), "a").unwrap();
    (a, b)
}

async fn connected() -> (Endpoint, Endpoint, quinn::Connection, quinn::Connection) {
    let (a, b) = acquainted();
    let out = soon(a.dial(addr(&b), b.fingerprint())).await.unwrap();
    let incoming = soon(b.accept()).await.unwrap();
    (a, b, out, incoming.connection)
}

fn offer_by(host: &Endpoint) -> Offer {
    Offer::new("host", vec![addr(host)], host.fingerprint(), SOON).unwrap()
}

#[tokio::test]
async fn pinned_peers_know_each_other_by_key_and_name() {
    let (a, b) = acquainted();
    let out = soon(a.dial(addr(&b), b.fingerprint())).await.unwrap();
    assert_eq!(peer_fingerprint(&out), Some(b.fingerprint()));
    let incoming = soon(b.accept()).await.unwrap();
    assert_eq!(incoming.fingerprint, a.fingerprint());
    assert_eq!(incoming.node, "a");
    close(&incoming.connection, CloseCode::Superseded, "test");
    let ConnectionError::ApplicationClosed(reason) = soon(out.closed()).await else {
        panic!("not an application close");
    };
    assert_eq!(reason.error_code, CloseCode::Superseded.into());
    soon(b.close()).await;
    assert!(soon(b.accept()).await.is_none());
}

#[tokio::test]
async fn unpinned_client_fails_inside_the_handshake() {
    let (a, b) = (endpoint(), endpoint());
    let error = soon(a.dial(addr(&b), b.fingerprint())).await.unwrap_err();
    assert!(matches!(error, DialError::NotPinned { .. }), "{error:?}");
    assert!(!error.is_transient());
    // Below the welcome: TLS itself ended it, with the alert access_denied.
    let raw = soon(a.connect(addr(&b), b.fingerprint(), Protocol::Link)).await;
    if let Ok((connection, _)) = raw {
        let ConnectionError::ConnectionClosed(closed) = soon(connection.closed()).await else {
            panic!("closed by the application, not by TLS");
        };
        assert_eq!(closed.error_code, TransportErrorCode::crypto(49));
    }
    assert_eq!(b.refused(), 2);

    // Pinned at runtime, then unpinned again.
    b.pinned().pin(a.fingerprint(), "a").unwrap();
    let connection = soon(a.dial(addr(&b), b.fingerprint())).await.unwrap();
    close(&connection, CloseCode::Done, "");
    b.pinned().unpin(&a.fingerprint());
    let error = soon(a.dial(addr(&b), b.fingerprint())).await.unwrap_err();
    assert!(matches!(error, DialError::NotPinned { .. }), "{error:?}");
}

#[tokio::test]
async fn wrong_server_key_is_refused_and_both_keys_named() {
    let (a, b) = acquainted();
    let expected = NodeKey::generate().unwrap().fingerprint();
    let error = soon(a.dial(addr(&b), expected)).await.unwrap_err();
    assert!(matches!(error, DialError::WrongKey { got, .. } if got == b.fingerprint()));
    let text = error.to_string();
    assert!(text.contains(&expected.to_string()) && text.contains(&b.fingerprint().to_string()));
}

#[tokio::test]
async fn silence_is_unreachable_and_a_taken_port_says_so() {
    let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
    let taken = silent.local_addr().unwrap();
    let impatient = Tuning {
        keep_alive: Duration::from_millis(50),
        idle_timeout: Duration::from_millis(200),
        ..Tuning::default()
    };
    let key = NodeKey::generate().unwrap();
    let pinned = PinnedPeers::new();
    let a = Endpoint::bind(None, key.clone(), pinned.clone(), impatient.clone()).unwrap();
    let error = soon(a.dial(taken, key.fingerprint())).await.unwrap_err();
    assert!(matches!(error, DialError::Unreachable { .. }), "{error:?}");
    assert!(error.is_transient());
    assert!(soon(a.accept()).await.is_none(), "dial only");
    let error = Endpoint::bind(Some(taken), key, pinned, impatient).unwrap_err();
    assert!(matches!(error, BindError::InUse { addr } if addr == taken));
}

#[tokio::test]
async fn dial_only_endpoint_reaches_an_ipv4_listener() {
    let b = endpoint();
    let key = NodeKey::generate().unwrap();
    b.pinned().pin(key.fingerprint(), "a").unwrap();
    let a = Endpoint::bind(None, key, PinnedPeers::new(), Tuning::default()).unwrap();
    soon(a.dial(addr(&b), b.fingerprint())).await.unwrap();
}

#[tokio::test]
async fn pairing_pins_both_keys() {
    let (host, guest) = (endpoint(), endpoint());
    let offer = offer_by(&host);
    let code = offer.code();
    let mut open = host.open_offer(offer, NOW).unwrap();
    let guest_addr = addr(&guest);
    let joined = soon(complete(&guest, &code, "guest", &[guest_addr], NOW)).await;
    let joined = joined.unwrap();
    assert_eq!(joined.node, "host");
    assert_eq!(joined.fingerprint, host.fingerprint());
    assert_eq!(joined.addrs, [addr(&host)]);
    let peer = soon(open.paired()).await.unwrap();
    assert_eq!(peer.node, "guest");
    assert_eq!(peer.fingerprint, guest.fingerprint());
    assert_eq!(peer.addrs, [guest_addr]);
    // Both directions work at once.
    soon(guest.dial(addr(&host), host.fingerprint()))
        .await
        .unwrap();
    soon(host.dial(guest_addr, guest.fingerprint()))
        .await
        .unwrap();

    // Used up.
    let late = endpoint();
    let error = soon(complete(&late, &code, "late", &[], NOW)).await;
    assert!(matches!(error, Err(PairError::NoOffer { .. })), "{error:?}");
    assert_eq!(host.pinned().name_of(&late.fingerprint()), None);
}

#[tokio::test]
async fn of_two_guests_with_one_code_one_pairs() {
    let host = endpoint();
    let offer = offer_by(&host);
    let code = offer.code();
    let mut open = host.open_offer(offer, NOW).unwrap();
    let (x, y) = (endpoint(), endpoint());
    let (x_paired, y_paired) = soon(async {
        tokio::join!(
            complete(&x, &code, "x", &[], NOW),
            complete(&y, &code, "y", &[], NOW)
        )
    })
    .await;
    assert_ne!(x_paired.is_ok(), y_paired.is_ok());
    let loser = x_paired.and(y_paired).unwrap_err();
    assert!(matches!(loser, PairError::NoOffer { .. }), "{loser:?}");
    soon(open.paired()).await.unwrap();
    assert_eq!(host.pinned().snapshot().len(), 1);
}

#[tokio::test]
async fn wrong_secret_three_times_closes_the_offer() {
    let (host, guest) = (endpoint(), endpoint());
    let old_code = offer_by(&host).code();
    let offer = offer_by(&host);
    let code = offer.code();
    let mut open = host.open_offer(offer, NOW).unwrap();
    for _ in 0..3 {
        let error = soon(complete(&guest, &old_code, "guest", &[], NOW)).await;
        assert!(
            matches!(error, Err(PairError::WrongSecret { .. })),
            "{error:?}"
        );
    }
    let error = soon(complete(&guest, &code, "guest", &[], NOW)).await;
    assert!(matches!(error, Err(PairError::NoOffer { .. })), "{error:?}");
    assert_eq!(soon(open.paired()).await, Err(OfferEnded::TooManyWrong));
    assert!(host.pinned().snapshot().is_empty() && guest.pinned().snapshot().is_empty());
}

#[tokio::test]
async fn expired_codes_are_refused_by_both_sides() {
    let (host, guest) = (endpoint(), endpoint());
    let offer = offer_by(&host);
    let code = offer.code();
    assert_eq!(
        host.open_offer(offer.clone(), SOON).unwrap_err(),
        OfferError::Expired
    );
    // The guest by its clock.
    let mut open = host.open_offer(offer.clone(), SOON - 1).unwrap();
    let error = soon(complete(&guest, &code, "guest", &[], SOON)).await;
    assert!(matches!(error, Err(PairError::Expired)), "{error:?}");
    // The host by its own, though the guest's is slow.
    assert_eq!(soon(open.paired()).await, Err(OfferEnded::Expired));
    let error = soon(complete(&guest, &code, "guest", &[], NOW)).await;
    assert!(matches!(error, Err(PairError::NoOffer { .. })), "{error:?}");
}

#[tokio::test]
async fn pairing_needs_an_open_offer() {
    let (host, guest) = (endpoint(), endpoint());
    let refused = async || {
        let pair = guest.connect(addr(&host), host.fingerprint(), Protocol::Pair);
        matches!(soon(pair).await, Err(DialError::VersionMismatch { .. }))
    };
    assert!(refused().await, "none yet");
    let open = host.open_offer(offer_by(&host), NOW).unwrap();
    assert!(!refused().await, "open");
    // Any key may pair, but it is still not let in on the ordinary protocol, and gets no other stream.
    let error = soon(guest.dial(addr(&host), host.fingerprint())).await;
    assert!(
        matches!(error, Err(DialError::NotPinned { .. })),
        "{error:?}"
    );
    let mut newer = host.open_offer(offer_by(&host), NOW).unwrap();
    let mut open = open;
    assert_eq!(soon(open.paired()).await, Err(OfferEnded::Replaced));
    drop(open);
    assert!(!refused().await, "the newer one is still open");
    host.close().await;
    assert_eq!(soon(newer.paired()).await, Err(OfferEnded::Stopped));

    let host = endpoint();
    drop(host.open_offer(offer_by(&host), NOW).unwrap());
    let pair = guest.connect(addr(&host), host.fingerprint(), Protocol::Pair);
    assert!(soon(pair).await.is_err(), "given up");
}

#[tokio::test]
async fn names_are_not_taken_over() {
    let (host, guest) = (endpoint(), endpoint());
    let other = NodeKey::generate().unwrap().fingerprint();
    host.pinned().pin(other, "mail").unwrap();
    let offer = offer_by(&host);
    let code = offer.code();
    let mut open = host.open_offer(offer, NOW).unwrap();
    for name in ["mail", "host"] {
        let error = soon(complete(&guest, &code, name, &[], NOW)).await;
        assert!(
            matches!(error, Err(PairError::OwnNameTaken { .. })),
            "{error:?}"
        );
    }
    let error = soon(complete(&guest, &code, "a/b", &[], NOW)).await;
    assert!(matches!(
        error,
        Err(PairError::Own(OfferError::Name { .. }))
    ));
    let error = soon(complete(&host, &code, "x", &[], NOW)).await;
    assert!(matches!(error, Err(PairError::SelfPairing)));
    guest.pinned().pin(other, "host").unwrap();
    let error = soon(complete(&guest, &code, "guest", &[], NOW)).await;
    assert!(matches!(error, Err(PairError::NameTaken(_))), "{error:?}");
    guest.pinned().unpin(&other);
    // None of that used the offer up.
    soon(complete(&guest, &code, "guest", &[], NOW))
        .await
        .unwrap();
    soon(open.paired()).await.unwrap();
}

#[tokio::test]
async fn every_address_of_a_code_is_tried() {
    let (host, guest, stranger) = (endpoint(), endpoint(), endpoint());
    let addrs = vec![addr(&stranger), addr(&host)];
    let offer = Offer::new("host", addrs, host.fingerprint(), SOON).unwrap();
    let code = offer.code();
    let _open = host.open_offer(offer, NOW).unwrap();
    soon(complete(&guest, &code, "guest", &[], NOW))
        .await
        .unwrap();
}

#[tokio::test]
async fn junk_does_not_stop_a_good_peer() {
    let (a, b) = acquainted();
    // First packets of handshakes that never go on, more than one source may have, from another address.
    let sink = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let sink_addr = sink.local_addr().unwrap();
    let junk = UdpSocket::bind("127.0.0.2:0").unwrap();
    let stuck = endpoint();
    for n in 0..40 {
        let dial = stuck.dial(sink_addr, b.fingerprint());
        let first_packet = async {
            let mut packet = vec![0; 2048];
            let len = sink.recv(&mut packet).await.unwrap();
            packet.truncate(len);
            packet
        };
        let packet = tokio::select! {
            _ = dial => panic!("nobody answers there"),
            packet = first_packet => packet,
        };
        junk.send_to(&packet, addr(&b)).unwrap();
        junk.send_to(&[n; 1200], addr(&b)).unwrap();
        junk.send_to(&packet[..600], addr(&b)).unwrap();
    }
    let out = soon(a.dial(addr(&b), b.fingerprint())).await.unwrap();
    let incoming = soon(b.accept()).await.unwrap();
    assert_eq!(incoming.fingerprint, a.fingerprint());
    drop(out);
}

#[tokio::test]
async fn strangers_in_a_crowd_do_not_stop_a_good_peer() {
    let (a, b) = acquainted();
    let mut strangers = tokio::task::JoinSet::new();
    for _ in 0..10 {
        let (target, key) = (addr(&b), b.fingerprint());
        strangers.spawn(async move { endpoint().dial(target, key).await.err() });
    }
    soon(a.dial(addr(&b), b.fingerprint())).await.unwrap();
    for refused in soon(strangers.join_all()).await {
        assert!(
            matches!(refused, Some(DialError::NotPinned { .. })),
            "{refused:?}"
        );
    }
    assert_eq!(soon(b.accept()).await.unwrap().node, "a");
}

#[tokio::test]
async fn frames_round_trip_and_raw_bytes_may_follow() {
    let (_a, _b, out, inn) = connected().await;
    let mut send = out.open_uni().await.unwrap();
    let value = (7_u64, "text".to_owned(), vec![1_u8; 100_000]);
    write_frame(&mut send, &value).await.unwrap();
    write_frame(&mut send, &()).await.unwrap();
    send.write_all(b"raw").await.unwrap();
    send.finish().unwrap();
    let mut recv = soon(inn.accept_uni()).await.unwrap();
    let read: (u64, String, Vec<u8>) = soon(read_frame(&mut recv, 200_000)).await.unwrap();
    assert_eq!(read, value);
    soon(read_frame::<()>(&mut recv, 0)).await.unwrap();
    assert_eq!(soon(recv.read_to_end(10)).await.unwrap(), b"raw");
}

#[tokio::test]
async fn hostile_frames_are_errors() {
    let (_a, _b, out, inn) = connected().await;
    let frame = encode_frame(&"hello").unwrap();
    let mut trailing = frame.clone();
    trailing[0] += 1;
    trailing.push(0);
    let cases: [(&[u8], fn(&FrameError) -> bool); 7] = [
        (b"\xff\xff\xff\xff", |e| {
            matches!(e, FrameError::TooLarge { max: 64, .. })
        }),
        (b"\x41\0\0\0", |e| {
            matches!(e, FrameError::TooLarge { len: 65, .. })
        }),
        (b"\x05\0\0\0\xff\xff\xff\xff\x0f", |e| {
            matches!(e, FrameError::Decode(_))
        }),
        (b"\x02\0\0\0\x01\xff", |e| {
            matches!(e, FrameError::Decode(_))
        }),
        (&trailing, |e| {
            matches!(e, FrameError::Trailing { count: 1 })
        }),
        (&frame[..frame.len() - 1], |e| {
            matches!(e, FrameError::Closed)
        }),
        (b"\x05\0", |e| matches!(e, FrameError::Closed)),
    ];
    for (bytes, expected) in cases {
        for whole in [false, true] {
            let mut send = out.open_uni().await.unwrap();
            send.write_all(bytes).await.unwrap();
            send.finish().unwrap();
            let mut recv = soon(inn.accept_uni()).await.unwrap();
            let error = if whole {
                let mut reader = FrameReader::<String>::new(recv, 64);
                soon(reader.next()).await.unwrap_err()
            } else {
                soon(read_frame::<String>(&mut recv, 64)).await.unwrap_err()
            };
            assert!(expected(&error), "{bytes:?}: {error:?}");
        }
    }
}

#[tokio::test]
async fn a_frame_reader_loses_nothing_when_cancelled() {
    let (_a, _b, out, inn) = connected().await;
    let values: Vec<String> = (0..200).map(|n| "x".repeat(n * 7 % 300)).collect();
    let bytes: Vec<u8> = values
        .iter()
        .flat_map(|v| encode_frame(v).unwrap())
        .collect();
    let mut send = out.open_uni().await.unwrap();
    let mut pieces = bytes.chunks(3);
    send.write_all(pieces.next().unwrap()).await.unwrap();
    let recv = soon(inn.accept_uni()).await.unwrap();
    let mut reader = FrameReader::<String>::new(recv, 300 + 8);
    let mut read = Vec::new();
    // Every write cancels a read that may be halfway through a frame.
    for piece in pieces {
        tokio::select! {
            biased;
            value = reader.next() => read.extend(value.unwrap()),
            () = tokio::task::yield_now() => {}
        }
        send.write_all(piece).await.unwrap();
    }
    send.finish().unwrap();
    while let Some(value) = soon(reader.next()).await.unwrap() {
        read.push(value);
    }
    assert_eq!(read, values);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_megabytes_arrive() {
    const PIECE: usize = 1 << 20;
    let (_a, _b, out, inn) = connected().await;
    let sending = tokio::spawn(async move {
        let mut send = out.open_uni().await.unwrap();
        let mut hash = blake3::Hasher::new();
        for n in 0..100_u8 {
            let piece = vec![n; PIECE];
            hash.update(&piece);
            send.write_all(&piece).await.unwrap();
        }
        send.finish().unwrap();
        let _ = send.stopped().await;
        hash.finalize()
    });
    let mut recv = soon(inn.accept_uni()).await.unwrap();
    let (mut hash, mut len) = (blake3::Hasher::new(), 0);
    while let Some(chunk) = soon(recv.read_chunk(PIECE, true)).await.unwrap() {
        hash.update(&chunk.bytes);
        len += chunk.bytes.len();
    }
    assert_eq!(len, 100 * PIECE);
    assert_eq!(soon(sending).await.unwrap(), hash.finalize());
}

#[tokio::test]
async fn admitted_peers_may_open_their_streams() {
    let (_a, _b, out, _inn) = connected().await;
    // Windows and stream limits were narrow until admission; all of this waits for the wide ones.
    let mut open = Vec::new();
    for _ in 0..64 {
        open.push(soon(out.open_uni()).await.unwrap());
        let (send, _recv) = soon(out.open_bi()).await.unwrap();
        open.push(send);
    }
    tokio::select! {
        biased;
        _ = out.open_uni() => panic!("not bounded"),
        () = std::future::ready(()) => {}
    }
    soon(open[0].write_all(&vec![0; 8 << 20])).await.unwrap();
}
