//! Dialling and accepting: the known, the unknown, the wrong and the hostile.

use std::net::UdpSocket;
use std::time::Duration;

use quinn::{ConnectionError, TransportErrorCode};

use super::super::tls::Protocol;
use super::*;

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
    let impatient = Tuning { keep_alive: Duration::from_millis(50), idle_timeout: Duration::from_millis(200), ..Tuning::default() };
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
async fn junk_does_not_stop_a_good_peer() {
    let (a, b) = acquainted();
    // First packets of handshakes that never go on, more than there are places, from another address.
    let junk = UdpSocket::bind("127.0.0.2:0").unwrap();
    let stuck = endpoint();
    let mut dials = tokio::task::JoinSet::new();
    for n in 0..40 {
        let sink = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let (stuck, to) = (stuck.clone(), sink.local_addr().unwrap());
        let key = b.fingerprint();
        dials.spawn(async move { stuck.dial(to, key).await });
        let mut packet = [0; 2048];
        let len = soon(sink.recv(&mut packet)).await.unwrap();
        junk.send_to(&packet[..len], addr(&b)).unwrap();
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
        assert!(matches!(refused, Some(DialError::NotPinned { .. })), "{refused:?}");
    }
    assert_eq!(soon(b.accept()).await.unwrap().node, "a");
}

#[tokio::test]
async fn a_peer_that_was_killed_and_is_back_says_so_before_any_timeout() {
    let (a, key) = (endpoint(), NodeKey::generate().unwrap());
    let bind = |addr| {
        let pins = PinnedPeers::new();
        pins.pin(a.fingerprint(), "a").unwrap();
        Endpoint::bind(Some(addr), key.clone(), pins, Tuning::default()).unwrap()
    };
    // Its own runtime, so that it can end as after kill -9: the port is free, and nobody said goodbye.
    let life = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let first = {
        let _within = life.enter();
        bind("127.0.0.1:0".parse().unwrap())
    };
    let at = addr(&first);
    a.pinned().pin(first.fingerprint(), "b").unwrap();
    let connection = soon(a.dial(at, key.fingerprint())).await.unwrap();
    let held = soon(first.accept()).await.unwrap();
    // Ended before they are dropped: a driver that still runs would say goodbye for them.
    soon(tokio::task::spawn_blocking(move || life.shutdown_timeout(Duration::from_secs(20)))).await.unwrap();
    drop((held, first));
    let again = soon(async {
        loop {
            let pins = PinnedPeers::new();
            match Endpoint::bind(Some(at), key.clone(), pins, Tuning::default()) {
                Ok(endpoint) => return endpoint,
                Err(BindError::InUse { .. }) => tokio::task::yield_now().await,
                Err(error) => panic!("{error}"),
            }
        }
    })
    .await;
    let began = std::time::Instant::now();
    let ConnectionError::Reset = soon(connection.closed()).await else { panic!("not by a reset") };
    assert!(began.elapsed() < Duration::from_secs(4), "the idle timeout is 5 s: {:?}", began.elapsed());
    soon(again.close()).await;
}
