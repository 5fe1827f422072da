//! One UDP socket, both directions: dials peers whose key is known, and yields those that dial us.
//!
//! Invariants:
//! - [`Endpoint::dial`] returns a connection only after the peer has *admitted* us. A TLS 1.3 client is done before the
//!   server has judged its certificate, so the accepting side opens a one-byte welcome stream and the dialling side waits
//!   for it; without that a refusal would surface later, as a broken stream with no reason.
//! - [`Endpoint::accept`] yields pinned peers only; pairing connections go to the open offer and nowhere else.
//! - The last `Endpoint` handle closes the socket and every connection on it.
//!
//! It does not reconnect, choose among addresses or hold peers to one connection: the link does.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use quinn::{ClientConfig, ConnectError, ConnectionError, TransportErrorCode, VarInt};
use rustls::pki_types::CertificateDer;
use tokio::time::timeout;

use super::code::{Offer, OfferError, UnixSecs};
use super::identity::{Fingerprint, NodeKey};
use super::inbound::{self, Core};
use super::offer::OpenOffer;
use super::pinned::PinnedPeers;
use super::tls::{Protocol, Shown};
use super::tuning::{Tuning, TuningError, udp_socket};

/// A handshake and its welcome take two round trips; a peer that needs longer is as good as gone.
pub(super) const HANDSHAKE_LIMIT: Duration = Duration::from_secs(5);
/// How long a close may take to reach the peers.
const CLOSE_LIMIT: Duration = Duration::from_secs(1);
/// TLS alerts (RFC 8446 §6.2) as QUIC carries them (RFC 9001 §4.8).
const ACCESS_DENIED: u8 = 49;
const CERTIFICATE_REQUIRED: u8 = 116;
const NO_APPLICATION_PROTOCOL: u8 = 120;

/// Why a connection was closed, told to the other side as QUIC's application error code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum CloseCode {
    /// The node stops.
    Shutdown = 0,
    /// All was said.
    Done = 1,
    /// Too many connections wait already; try again later.
    Busy = 2,
    /// The key is not pinned, or not any more.
    NotPinned = 3,
    /// The peer broke the protocol.
    Protocol = 4,
    /// A newer connection of the same peer took over.
    Superseded = 5,
}

impl From<CloseCode> for VarInt {
    fn from(code: CloseCode) -> Self {
        Self::from_u32(code as u32)
    }
}

/// Closes with a code and a reason fit for the other side's log.
pub fn close(connection: &quinn::Connection, code: CloseCode, reason: &str) {
    connection.close(code.into(), reason.as_bytes());
}

/// The key at the other end; `None` only before the handshake is over.
pub fn peer_fingerprint(connection: &quinn::Connection) -> Option<Fingerprint> {
    let chain = connection.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    Fingerprint::of_certificate(chain.first()?).ok()
}

/// A connection that a pinned peer opened.
#[derive(Debug)]
pub struct Incoming {
    /// Ready for streams.
    pub connection: quinn::Connection,
    /// The peer's key.
    pub fingerprint: Fingerprint,
    /// The name it is pinned under.
    pub node: String,
}

/// Why an endpoint could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BindError {
    /// Another process has the port.
    #[error("UDP {addr} is in use: stop the process that has it (`ss -ulpn` shows it) or configure another listen address")]
    InUse {
        /// The listen address.
        addr: SocketAddr,
    },
    /// This machine does not have the address.
    #[error("{addr} is not an address of this machine: correct the listen address, or use a wildcard such as [::]")]
    NotLocal {
        /// The listen address.
        addr: SocketAddr,
    },
    /// The transport parameters cannot work.
    #[error(transparent)]
    Tuning(#[from] TuningError),
    /// TLS could not be set up with this key.
    #[error("cannot set up TLS")]
    Tls(#[from] rustls::Error),
    /// The system refused.
    #[error("cannot open a UDP socket")]
    Io(#[source] io::Error),
}

/// Why a peer could not be connected to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DialError {
    /// No answer.
    #[error("no answer from {addr}: is the agent running there, and UDP let through?")]
    Unreachable {
        /// Where.
        addr: SocketAddr,
    },
    /// Somebody else answers at this address.
    #[error(
        "{addr} has the key {got}, expected {expected}: if that node was reinstalled, pair it again; otherwise something else answers at its address"
    )]
    WrongKey {
        /// Where.
        addr: SocketAddr,
        /// The pinned key.
        expected: Fingerprint,
        /// The key shown.
        got: Fingerprint,
    },
    /// The peer does not know us.
    #[error("{addr} does not know this node's key: pair the two nodes again")]
    NotPinned {
        /// Where.
        addr: SocketAddr,
    },
    /// No protocol in common.
    #[error("{addr} speaks no protocol this version does: upgrade the older node")]
    VersionMismatch {
        /// Where.
        addr: SocketAddr,
    },
    /// The peer takes no more connections now.
    #[error("{addr} is too busy for another connection")]
    Busy {
        /// Where.
        addr: SocketAddr,
    },
    /// This endpoint is closed.
    #[error("the endpoint is closed")]
    Stopped,
    /// The address cannot be dialled from this socket (another address family).
    #[error("cannot dial {addr} from this socket")]
    Address {
        /// Where.
        addr: SocketAddr,
        /// What quinn said.
        #[source]
        source: ConnectError,
    },
    /// TLS could not be set up.
    #[error("cannot set up TLS")]
    Tls(#[from] rustls::Error),
    /// Anything else.
    #[error("connection to {addr} failed")]
    Other {
        /// Where.
        addr: SocketAddr,
        /// What quinn said.
        #[source]
        source: ConnectionError,
    },
}

impl DialError {
    /// Whether time alone may cure it; otherwise a person has to act.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Busy { .. } | Self::Other { .. })
    }
}

/// A handle to the node's socket; clones share it.
#[derive(Debug, Clone)]
pub struct Endpoint {
    core: Arc<Core>,
    _open: Arc<OpenSocket>,
}

/// Held by handles only, not by the tasks behind them: so dropping the last handle ends those tasks.
#[derive(Debug)]
struct OpenSocket(Arc<Core>);

impl Drop for OpenSocket {
    fn drop(&mut self) {
        self.0.stop();
    }
}

impl Endpoint {
    /// Listens at `addr`, or without one only dials. Must be called inside a tokio runtime.
    pub fn bind(addr: Option<SocketAddr>, key: NodeKey, pinned: PinnedPeers, tuning: Tuning) -> Result<Self, BindError> {
        let socket = udp_socket(addr).map_err(|e| match (e.kind(), addr) {
            (io::ErrorKind::AddrInUse, Some(addr)) => BindError::InUse { addr },
            (io::ErrorKind::AddrNotAvailable, Some(addr)) => BindError::NotLocal { addr },
            _ => BindError::Io(e),
        })?;
        let core = Arc::new(Core::new(socket, addr.is_some(), key, pinned, tuning)?);
        if addr.is_some() {
            tokio::spawn(inbound::run(core.clone()));
        }
        let open = Arc::new(OpenSocket(core.clone()));
        Ok(Self { core, _open: open })
    }

    /// Where the socket is bound, with the port the system chose if none was given.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.core.quic.local_addr()
    }

    /// This node's key.
    pub fn fingerprint(&self) -> Fingerprint {
        self.core.tls.key().fingerprint()
    }

    /// The trusted peers this endpoint decides by.
    pub fn pinned(&self) -> &PinnedPeers {
        self.core.tls.pinned()
    }

    /// Handshakes that were refused or failed since the start, for status and alarms.
    pub fn refused(&self) -> u64 {
        self.core.refused.load(Ordering::Relaxed)
    }

    /// Connects to the node that has the key `expected`. Cancel safe: dropped, it leaves no connection behind.
    pub async fn dial(&self, addr: SocketAddr, expected: Fingerprint) -> Result<quinn::Connection, DialError> {
        let dial = async {
            let (connection, shown) = self.connect(addr, expected, Protocol::Link).await?;
            match inbound::welcomed(&connection).await {
                Ok(()) => Ok(connection),
                Err(e) => Err(failure(addr, expected, &shown, e)),
            }
        };
        let limit = timeout(HANDSHAKE_LIMIT, dial).await;
        limit.unwrap_or(Err(DialError::Unreachable { addr }))
    }

    /// A finished TLS handshake with `expected`; whether the peer accepts *us* is not known yet.
    pub(super) async fn connect(
        &self,
        addr: SocketAddr,
        expected: Fingerprint,
        protocol: Protocol,
    ) -> Result<(quinn::Connection, Shown), DialError> {
        let (crypto, shown) = self.core.tls.client(expected, protocol)?;
        let mut config = ClientConfig::new(Arc::new(crypto));
        config.transport_config(self.core.outgoing.clone());
        // The name goes nowhere: SNI is off and the key is what is checked.
        let connecting = self.core.quic.connect_with(config, addr, "twinbox");
        let connecting = connecting.map_err(|source| match source {
            ConnectError::EndpointStopping => DialError::Stopped,
            source => DialError::Address { addr, source },
        })?;
        match connecting.await {
            Ok(connection) => Ok((connection, shown)),
            Err(e) => Err(failure(addr, expected, &shown, e)),
        }
    }

    /// The next connection from a pinned peer; `None` once the endpoint is closed, or if it only dials. Cancel safe.
    pub async fn accept(&self) -> Option<Incoming> {
        self.core.inbox.next().await
    }

    /// Opens `offer` for one peer, until it expires; `now` is the wall clock. An offer still open is closed for it.
    /// Dropping the result closes the offer.
    pub fn open_offer(&self, offer: Offer, now: UnixSecs) -> Result<OpenOffer, OfferError> {
        let own = self.fingerprint();
        if offer.fingerprint != own {
            let offered = offer.fingerprint;
            return Err(OfferError::Key { offered, own });
        }
        if !self.core.listening {
            return Err(OfferError::NotListening);
        }
        self.core.desk.open(offer, now)
    }

    /// Waits until the connections that are open have ended by themselves (within the limit of [`Endpoint::close`]), then closes. For
    /// whoever has said all it had to say, and whose last words are still on their way.
    pub async fn finish(&self) {
        let _ = timeout(CLOSE_LIMIT, self.core.quic.wait_idle()).await;
        self.close().await;
    }

    /// Closes every connection with [`CloseCode::Shutdown`] and gives peers a moment to hear of it.
    pub async fn close(&self) {
        self.core.stop();
        // Past the limit the peers find out by their idle timeout.
        let _ = timeout(CLOSE_LIMIT, self.core.quic.wait_idle()).await;
    }
}

/// What a failed connection means.
fn failure(addr: SocketAddr, expected: Fingerprint, shown: &Shown, source: ConnectionError) -> DialError {
    if let Some(&got) = shown.get()
        && got != expected
    {
        return DialError::WrongKey { addr, expected, got };
    }
    let code = match &source {
        ConnectionError::TimedOut | ConnectionError::Reset => {
            return DialError::Unreachable { addr };
        }
        ConnectionError::VersionMismatch => return DialError::VersionMismatch { addr },
        ConnectionError::LocallyClosed => return DialError::Stopped,
        ConnectionError::ApplicationClosed(close) => {
            return match close.error_code {
                code if code == CloseCode::NotPinned.into() => DialError::NotPinned { addr },
                code if code == CloseCode::Busy.into() => DialError::Busy { addr },
                code if code == CloseCode::Shutdown.into() => DialError::Unreachable { addr },
                _ => DialError::Other { addr, source },
            };
        }
        ConnectionError::ConnectionClosed(close) => close.error_code,
        ConnectionError::TransportError(error) => error.code,
        ConnectionError::CidsExhausted => return DialError::Other { addr, source },
    };
    let alert = TransportErrorCode::crypto;
    if code == alert(ACCESS_DENIED) || code == alert(CERTIFICATE_REQUIRED) {
        DialError::NotPinned { addr }
    } else if code == alert(NO_APPLICATION_PROTOCOL) {
        DialError::VersionMismatch { addr }
    } else if code == TransportErrorCode::CONNECTION_REFUSED {
        DialError::Busy { addr }
    } else {
        DialError::Other { addr, source }
    }
}
