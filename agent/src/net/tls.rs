//! TLS under QUIC: mutual TLS 1.3 where trust is a pinned public key and nothing else.
//!
//! Invariants:
//! - Both sides always prove possession of their key: handshake signatures are verified by the ring provider. Names,
//!   dates, issuers and intermediates of certificates are ignored, for nobody signs for anybody here.
//! - No session is ever resumed (no tickets, no 0-RTT): a resumed session would skip the check of the key, and an
//!   unpinned peer could come back.
//! - On the ordinary protocol a client whose key is not pinned fails *inside* the handshake. The pairing protocol accepts
//!   any key, is offered only while an offer is open, and its connections never leave `pairing`.
//! - A server configuration serves one connection: the protocol its client asks for decides, through a cell shared by
//!   resolver and verifier, how its key is judged. Because a hello can come twice (HelloRetryRequest) the last one counts,
//!   and `inbound` looks the key up once more after the handshake, under the protocol that was in fact agreed.
//!
//! It does not open sockets or connections, and does not decide what a trusted peer may do.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use quinn::crypto::rustls::{HandshakeData, QuicClientConfig, QuicServerConfig};
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, ring, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, Error, PeerMisbehaved, SignatureScheme};

use super::identity::{Fingerprint, NodeKey};
use super::pinned::PinnedPeers;

/// What a connection is for; negotiated by ALPN (RFC 7301).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// Replication between nodes that know each other.
    Link,
    /// The first meeting of two nodes.
    Pair,
}

impl Protocol {
    /// The ALPN identifier; the number grows when nodes could no longer understand each other.
    pub const fn alpn(self) -> &'static [u8] {
        match self {
            Self::Link => b"twinbox/1",
            Self::Pair => b"twinbox-pair/1",
        }
    }

    /// What was agreed on an established connection.
    pub fn of(connection: &quinn::Connection) -> Option<Self> {
        let data = connection.handshake_data()?.downcast::<HandshakeData>();
        let agreed = data.ok()?.protocol?;
        [Self::Link, Self::Pair].into_iter().find(|protocol| protocol.alpn() == agreed)
    }
}

/// The key that a dialled server showed, if it came that far.
pub(super) type Shown = Arc<OnceLock<Fingerprint>>;

/// What is needed to make a configuration for each connection.
#[derive(Debug)]
pub(super) struct Tls {
    provider: Arc<CryptoProvider>,
    key: NodeKey,
    pinned: PinnedPeers,
}

impl Tls {
    pub(super) fn new(key: NodeKey, pinned: PinnedPeers) -> Self {
        let provider = Arc::new(ring::default_provider());
        Self { provider, key, pinned }
    }

    pub(super) fn key(&self) -> &NodeKey {
        &self.key
    }

    pub(super) fn pinned(&self) -> &PinnedPeers {
        &self.pinned
    }

    /// For one outgoing connection that must end at the key `expected`.
    pub(super) fn client(&self, expected: Fingerprint, protocol: Protocol) -> Result<(QuicClientConfig, Shown), Error> {
        let shown = Shown::default();
        let verifier = ExactServer { expected, shown: shown.clone(), algorithms: self.provider.signature_verification_algorithms };
        let mut config = rustls::ClientConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(self.key.certified())));
        config.alpn_protocols = vec![protocol.alpn().to_vec()];
        config.resumption = Resumption::disabled();
        config.enable_sni = false;
        let config = QuicClientConfig::try_from(config).map_err(no_initial_suite)?;
        Ok((config, shown))
    }

    /// For one incoming connection; `pairing` says whether an offer is open.
    pub(super) fn server(&self, pairing: bool) -> Result<QuicServerConfig, Error> {
        let asked = Asked::default();
        let verifier =
            KnownClients { asked: asked.clone(), pinned: self.pinned.clone(), algorithms: self.provider.signature_verification_algorithms };
        let resolver = OurCert { asked, certified: self.key.certified() };
        let mut config = rustls::ServerConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(Arc::new(verifier))
            .with_cert_resolver(Arc::new(resolver));
        // In this order: rustls agrees on the first of ours that the client offers, as `OurCert` assumes.
        config.alpn_protocols.push(Protocol::Link.alpn().to_vec());
        if pairing {
            config.alpn_protocols.push(Protocol::Pair.alpn().to_vec());
        }
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        QuicServerConfig::try_from(config).map_err(no_initial_suite)
    }
}

fn no_initial_suite(e: quinn::crypto::rustls::NoInitialCipherSuite) -> Error {
    Error::General(e.to_string())
}

/// What the client of one connection asked for, told by the resolver to the verifier.
type Asked = Arc<Mutex<Option<Protocol>>>;

#[derive(Debug)]
struct OurCert {
    asked: Asked,
    certified: Arc<CertifiedKey>,
}

impl ResolvesServerCert for OurCert {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let offered: Vec<&[u8]> = hello.alpn()?.collect();
        let asked = [Protocol::Link, Protocol::Pair].into_iter().find(|protocol| offered.contains(&protocol.alpn()));
        *self.asked.lock().unwrap_or_else(PoisonError::into_inner) = asked;
        Some(self.certified.clone())
    }
}

#[derive(Debug)]
struct KnownClients {
    asked: Asked,
    pinned: PinnedPeers,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ClientCertVerifier for KnownClients {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let peer = Fingerprint::of_certificate(end_entity)?;
        let asked = *self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        let allowed = match asked {
            Some(Protocol::Link) => self.pinned.name_of(&peer).is_some(),
            Some(Protocol::Pair) => true,
            None => false,
        };
        if !allowed {
            tracing::debug!(peer = %peer.short(), "refused a key that is not pinned");
            return Err(CertificateError::ApplicationVerificationFailure.into());
        }
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

#[derive(Debug)]
struct ExactServer {
    expected: Fingerprint,
    shown: Shown,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for ExactServer {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let got = Fingerprint::of_certificate(end_entity)?;
        let got = *self.shown.get_or_init(|| got);
        if got != self.expected {
            return Err(CertificateError::ApplicationVerificationFailure.into());
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// QUIC has no TLS 1.2 (RFC 9001 §4.2), and it is switched off besides.
fn tls12() -> Error {
    PeerMisbehaved::SignedHandshakeWithUnadvertisedSigScheme.into()
}
