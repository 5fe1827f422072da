//! Two real endpoints over loopback: what a good peer gets, and what everybody else does not.

mod frames;
mod pairs;
mod peers;

use std::net::SocketAddr;
use std::time::Duration;

use tokio::time::timeout;

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
