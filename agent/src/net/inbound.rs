//! What strangers meet: admission, handshake, and the way of a connection to whoever is meant to have it.
//!
//! Invariants, against a peer that means harm:
//! - At most [`HANDSHAKES_MAX`] connections are between their first packet and admission, at most [`SOURCE_MAX`] of them
//!   from one source, each for a bounded time: one source can use up its own share only. When half the places are taken,
//!   an address must prove that it is not forged (QUIC Retry) before it gets one.
//! - A connection's key is judged in the handshake (`tls`), and once more here before it is handed on.
//! - Until admission a peer can make us buffer the arrival window of `tuning`, no more.
//!
//! It does not limit what a pinned peer may do afterwards.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::net::{IpAddr, Ipv6Addr, UdpSocket};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use quinn::{ConnectionError, ServerConfig, TokioRuntime, TransportConfig};
use tokio::sync::Notify;
use tokio::time::timeout;

use super::endpoint::{BindError, CloseCode, HANDSHAKE_LIMIT, Incoming, close, peer_fingerprint};
use super::identity::NodeKey;
use super::offer::OfferDesk;
use super::pairing;
use super::pinned::PinnedPeers;
use super::tls::{Protocol, Tls};
use super::tuning::Tuning;

/// Handshakes at once: a restart of every peer of a large site fits; so do their buffers, in 2 MiB.
const HANDSHAKES_MAX: usize = 32;
/// Of which from one IPv4 address or IPv6 /64.
const SOURCE_MAX: usize = 16;
/// From here on addresses are validated first.
const CROWDED: usize = 16;
/// Admitted connections that wait for [`accept`](super::Endpoint::accept).
const INBOX_MAX: usize = 32;
/// Datagrams quinn keeps per connection attempt until we look at it: a few initial packets.
const ATTEMPT_BUFFER: u64 = 16 * 1024;
/// Connection attempts quinn keeps until we look at them, which takes microseconds.
const ATTEMPTS_MAX: usize = 256;
/// Content means nothing yet; a later version may say more by another byte.
const WELCOME: [u8; 1] = [1];

/// What the handles and tasks of one endpoint share.
#[derive(Debug)]
pub(super) struct Core {
    pub(super) quic: quinn::Endpoint,
    pub(super) listening: bool,
    pub(super) tls: Tls,
    pub(super) outgoing: Arc<TransportConfig>,
    pub(super) desk: Arc<OfferDesk>,
    pub(super) inbox: Inbox,
    pub(super) refused: AtomicU64,
    tuning: Tuning,
    base: ServerConfig,
    admission: Admission,
}

impl Core {
    pub(super) fn new(socket: UdpSocket, listening: bool, key: NodeKey, pinned: PinnedPeers, tuning: Tuning) -> Result<Self, BindError> {
        let outgoing = tuning.outgoing()?;
        let config = key.reset().endpoint();
        let tls = Tls::new(key, pinned);
        let mut base = ServerConfig::with_crypto(Arc::new(tls.server(false)?));
        base.transport_config(tuning.incoming()?)
            .max_incoming(ATTEMPTS_MAX)
            .incoming_buffer_size(ATTEMPT_BUFFER)
            .incoming_buffer_size_total(ATTEMPT_BUFFER * ATTEMPTS_MAX as u64);
        let quic = quinn::Endpoint::new(config, listening.then(|| base.clone()), socket, Arc::new(TokioRuntime)).map_err(BindError::Io)?;
        let inbox = Inbox::default();
        if !listening {
            inbox.close();
        }
        Ok(Self {
            quic,
            listening,
            tls,
            outgoing,
            desk: Arc::default(),
            inbox,
            refused: AtomicU64::new(0),
            tuning,
            base,
            admission: Admission::default(),
        })
    }

    pub(super) fn stop(&self) {
        self.quic.close(CloseCode::Shutdown.into(), b"shutdown");
        self.desk.close();
        self.inbox.close();
    }

    fn refuse(&self) {
        self.refused.fetch_add(1, Ordering::Relaxed);
    }
}

/// Runs until the endpoint is closed.
pub(super) async fn run(core: Arc<Core>) {
    while let Some(attempt) = core.quic.accept().await {
        let source = attempt.remote_address().ip();
        let validated = attempt.remote_address_validated();
        if !validated && attempt.may_retry() && core.admission.crowded() {
            // Costs us nothing: the token travels with the peer.
            let _ = attempt.retry();
            continue;
        }
        match core.admission.enter(source) {
            Some(place) => {
                tokio::spawn(meet(core.clone(), attempt, place));
            }
            None => {
                core.refuse();
                attempt.refuse();
            }
        }
    }
}

async fn meet(core: Arc<Core>, attempt: quinn::Incoming, _place: Place) {
    let peer = attempt.remote_address();
    let handshake = async {
        let mut config = core.base.clone();
        let tls = core.tls.server(core.desk.is_open()).map_err(io::Error::other)?;
        config.crypto = Arc::new(tls);
        let connecting = attempt.accept_with(Arc::new(config))?;
        Ok::<_, io::Error>(connecting.await?)
    };
    match timeout(HANDSHAKE_LIMIT, handshake).await {
        Ok(Ok(connection)) => route(&core, connection).await,
        Ok(Err(error)) => {
            core.refuse();
            tracing::debug!(%peer, %error, "handshake failed");
        }
        Err(_) => {
            core.refuse();
            tracing::debug!(%peer, "handshake took too long");
        }
    }
}

async fn route(core: &Core, connection: quinn::Connection) {
    let peer = peer_fingerprint(&connection);
    match (peer, Protocol::of(&connection)) {
        (Some(peer), Some(Protocol::Link)) => match core.tls.pinned().name_of(&peer) {
            Some(node) => admit(core, connection, peer, node).await,
            None => {
                core.refuse();
                close(&connection, CloseCode::NotPinned, "not pinned");
            }
        },
        (Some(peer), Some(Protocol::Pair)) => pairing::serve(core, &connection, peer).await,
        _ => close(&connection, CloseCode::Protocol, "no key or no protocol"),
    }
}

async fn admit(core: &Core, connection: quinn::Connection, fingerprint: super::Fingerprint, node: String) {
    core.tuning.widen(&connection);
    match timeout(HANDSHAKE_LIMIT, welcome(&connection)).await {
        Ok(Ok(())) => {}
        _ => return close(&connection, CloseCode::Protocol, "welcome not taken"),
    }
    tracing::debug!(peer = %fingerprint.short(), %node, "connection accepted");
    let incoming = Incoming { connection, fingerprint, node };
    if let Err(full) = core.inbox.push(incoming) {
        close(&full.connection, CloseCode::Busy, "too many connections wait");
    }
}

async fn welcome(connection: &quinn::Connection) -> Result<(), io::Error> {
    let mut send = connection.open_uni().await?;
    send.write_all(&WELCOME).await?;
    let _ = send.finish();
    Ok(())
}

/// The dialling side of [`welcome`]. The server opens no other stream before this one.
pub(super) async fn welcomed(connection: &quinn::Connection) -> Result<(), ConnectionError> {
    let mut recv = connection.accept_uni().await?;
    match recv.read_chunk(WELCOME.len(), true).await {
        Ok(_) => Ok(()),
        Err(quinn::ReadError::ConnectionLost(e)) => Err(e),
        Err(_) => Err(ConnectionError::Reset),
    }
}

/// Counts connections between first packet and admission, by source.
#[derive(Debug, Default, Clone)]
struct Admission(Arc<Mutex<BTreeMap<IpAddr, usize>>>);

/// One place among the handshakes in progress, free again when dropped.
#[derive(Debug)]
struct Place {
    admission: Admission,
    source: IpAddr,
}

impl Admission {
    fn enter(&self, addr: IpAddr) -> Option<Place> {
        let source = source(addr);
        let mut sources = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let total: usize = sources.values().sum();
        let own = sources.get(&source).copied().unwrap_or(0);
        if total >= HANDSHAKES_MAX || own >= SOURCE_MAX {
            return None;
        }
        sources.insert(source, own + 1);
        Some(Place { admission: self.clone(), source })
    }

    fn crowded(&self) -> bool {
        let sources = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        sources.values().sum::<usize>() >= CROWDED
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let sources = &self.admission.0;
        let mut sources = sources.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = sources.get_mut(&self.source) {
            *count -= 1;
            if *count == 0 {
                sources.remove(&self.source);
            }
        }
    }
}

/// What one attacker has for free: an IPv4 address, or all of an IPv6 /64.
fn source(addr: IpAddr) -> IpAddr {
    match addr.to_canonical() {
        IpAddr::V6(v6) => {
            let prefix = u128::from(v6) & !u128::from(u64::MAX);
            IpAddr::V6(Ipv6Addr::from(prefix))
        }
        v4 => v4,
    }
}

/// Admitted connections on their way to `accept`.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    state: Mutex<Waiting>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    queue: VecDeque<Incoming>,
    closed: bool,
}

impl Inbox {
    fn push(&self, incoming: Incoming) -> Result<(), Box<Incoming>> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.closed || state.queue.len() >= INBOX_MAX {
            return Err(Box::new(incoming));
        }
        state.queue.push_back(incoming);
        drop(state);
        self.changed.notify_one();
        Ok(())
    }

    pub(super) async fn next(&self) -> Option<Incoming> {
        loop {
            // Made before looking, so that a change between looking and waiting is not missed.
            let changed = self.changed.notified();
            {
                let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
                if state.closed {
                    return None;
                }
                if let Some(incoming) = state.queue.pop_front() {
                    return Some(incoming);
                }
            }
            changed.await;
        }
    }

    pub(super) fn close(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.closed = true;
        state.queue.clear();
        drop(state);
        self.changed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_source_uses_up_its_own_share_only() {
        let admission = Admission::default();
        let at = |text: &str| text.parse::<IpAddr>().unwrap();
        let mut hostile: Vec<_> = (0..SOURCE_MAX).map(|n| admission.enter(at(&format!("2001:db8::{n:x}"))).unwrap()).collect();
        assert!(admission.enter(at("2001:db8::ffff")).is_none());
        assert!(admission.crowded());
        let good = admission.enter(at("192.0.2.1")).unwrap();
        assert_eq!(source(at("::ffff:192.0.2.1")), good.source);
        hostile.pop();
        assert!(admission.enter(at("2001:db8::ffff")).is_some());
        drop((hostile, good));
        assert!(admission.0.lock().unwrap().is_empty());
    }
}
