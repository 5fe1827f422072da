//! Pairing over real connections; what a proof covers is tested in `offer`.

use super::super::tls::Protocol;
use super::*;

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
    soon(guest.dial(addr(&host), host.fingerprint())).await.unwrap();
    soon(host.dial(guest_addr, guest.fingerprint())).await.unwrap();

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
    let (x_paired, y_paired) = soon(async { tokio::join!(complete(&x, &code, "x", &[], NOW), complete(&y, &code, "y", &[], NOW)) }).await;
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
        assert!(matches!(error, Err(PairError::WrongSecret { .. })), "{error:?}");
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
    assert_eq!(host.open_offer(offer.clone(), SOON).unwrap_err(), OfferError::Expired);
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
    assert!(matches!(error, Err(DialError::NotPinned { .. })), "{error:?}");
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
        assert!(matches!(error, Err(PairError::OwnNameTaken { .. })), "{error:?}");
    }
    let error = soon(complete(&guest, &code, "a/b", &[], NOW)).await;
    assert!(matches!(error, Err(PairError::Own(OfferError::Name { .. }))));
    let error = soon(complete(&host, &code, "x", &[], NOW)).await;
    assert!(matches!(error, Err(PairError::SelfPairing)));
    guest.pinned().pin(other, "host").unwrap();
    let error = soon(complete(&guest, &code, "guest", &[], NOW)).await;
    assert!(matches!(error, Err(PairError::NameTaken(_))), "{error:?}");
    guest.pinned().unpin(&other);
    // None of that used the offer up.
    soon(complete(&guest, &code, "guest", &[], NOW)).await.unwrap();
    soon(open.paired()).await.unwrap();
}

#[tokio::test]
async fn every_address_of_a_code_is_tried() {
    let (host, guest, stranger) = (endpoint(), endpoint(), endpoint());
    let addrs = vec![addr(&stranger), addr(&host)];
    let offer = Offer::new("host", addrs, host.fingerprint(), SOON).unwrap();
    let code = offer.code();
    let _open = host.open_offer(offer, NOW).unwrap();
    soon(complete(&guest, &code, "guest", &[], NOW)).await.unwrap();
}
