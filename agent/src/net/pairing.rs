//! How two nodes meet: an offer on one side, its code on the other, and afterwards each has pinned the other's key.
//!
//! The guest dials the addresses in the code and requires the fingerprint in the code, so the host is known from TLS.
//! The guest's key is new to the host, so the guest proves that it has read the code, and the host answers in kind:
//! ```text
//! guest ─ Claim{version, node, addrs, proof} ─▶ host      proof = BLAKE3-keyed(secret;
//! guest ◀─ Answer::Granted{proof} or a refusal ─ host             role, TLS exporter, both names, both keys, guest addrs)
//! ```
//! Invariants:
//! - A proof is good for one TLS session, one role, and exactly the names, keys and addresses it covers: someone in the
//!   middle has another exporter and another key, a replay another exporter, a reflection another role.
//!
//! If the connection breaks after the host has granted, the host knows the guest and not the other way round: pair again,
//! pinning twice is harmless. It does not persist pins: the caller does, with the [`PairedPeer`] both sides return.

use std::net::SocketAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use subtle::ConstantTimeEq;
use tokio::time::{Instant, timeout};

use super::code::{ADDRS_MAX, CodeError, Offer, OfferError, Secret, UnixSecs, valid_addr, valid_node_name};
use super::endpoint::{CloseCode, DialError, Endpoint, HANDSHAKE_LIMIT, close};
use super::framed::{FrameError, read_frame, write_frame};
use super::identity::Fingerprint;
use super::inbound::Core;
use super::pinned::NameTaken;
use super::tls::Protocol;

pub(super) const VERSION: u8 = 1;
/// A claim with 16 IPv6 addresses and the longest name takes 500 bytes.
const FRAME_MAX: usize = 4096;
/// For the two frames, once the handshake is done.
const TALK_LIMIT: Duration = Duration::from_secs(5);
const EXPORTER_LABEL: &[u8] = b"EXPORTER-twinbox-pair-1";
const PROOF_CONTEXT: &str = "twinbox pairing proof v1";

/// The other node, whose key is pinned now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PairedPeer {
    /// Its name.
    pub node: String,
    /// Its key.
    pub fingerprint: Fingerprint,
    /// Where it says it can be reached; may be empty for a guest that only dials.
    pub addrs: Vec<SocketAddr>,
}

/// Why a guest could not pair.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PairError {
    /// Malformed, or a typing error.
    #[error(transparent)]
    Code(#[from] CodeError),
    /// Too late.
    #[error("the pairing code has expired: make a new one with `twinbox pair` on the other node (and compare the clocks if it is fresh)")]
    Expired,
    /// Used, replaced, or closed after wrong tries.
    #[error("{addr} has no pairing offer open: the code was used already or replaced, so make a new one there with `twinbox pair`")]
    NoOffer {
        /// Where.
        addr: SocketAddr,
    },
    /// The code is not the one of the open offer.
    #[error("{addr} refused the code: it belongs to an earlier offer; use the newest one, after three wrong tries a new one is needed")]
    WrongSecret {
        /// Where.
        addr: SocketAddr,
    },
    /// No address answered.
    #[error("no answer from {}: is the agent running there, and UDP let through? otherwise offer another address", list(.tried))]
    Unreachable {
        /// Every address of the code.
        tried: Vec<SocketAddr>,
    },
    /// A node of that name is pinned here already, with another key.
    #[error(transparent)]
    NameTaken(#[from] NameTaken),
    /// The host already knows another node by our name.
    #[error("the other node already knows another node named {node}: rename this node, or unpair the other one there")]
    OwnNameTaken {
        /// Our name.
        node: String,
    },
    /// The code is our own.
    #[error("this pairing code was made by this very node: use it on the other one")]
    SelfPairing,
    /// The host knows the key of the code but not its secret.
    #[error("{addr} could not prove that it made the code: do not trust it, make a new code")]
    HostProof {
        /// Where.
        addr: SocketAddr,
    },
    /// Our own name or addresses will not do.
    #[error(transparent)]
    Own(#[from] OfferError),
    /// The connection could not be made, for another reason than silence.
    #[error(transparent)]
    Dial(DialError),
    /// The talk broke off.
    #[error("pairing with {addr} broke off: make a new code and try again")]
    Broken {
        /// Where.
        addr: SocketAddr,
        /// None if it took too long.
        #[source]
        source: Option<FrameError>,
    },
    /// The host could not understand us.
    #[error("{addr} did not accept this version's pairing: upgrade the older node")]
    VersionMismatch {
        /// Where.
        addr: SocketAddr,
    },
}

fn list(addrs: &[SocketAddr]) -> String {
    let addrs: Vec<_> = addrs.iter().map(ToString::to_string).collect();
    addrs.join(", ")
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Claim {
    pub(super) version: u8,
    pub(super) node: String,
    pub(super) addrs: Vec<SocketAddr>,
    pub(super) proof: [u8; 32],
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Answer {
    Granted { proof: [u8; 32] },
    NoOffer,
    Expired,
    WrongSecret,
    NameTaken,
    Malformed,
}

#[derive(Debug, Clone, Copy, Serialize)]
pub(super) enum Role {
    Guest,
    Host,
}

/// What a proof covers. Postcard prefixes lengths, so two different bindings never encode alike.
#[derive(Debug, Serialize)]
pub(super) struct Binding<'a> {
    pub(super) exporter: [u8; 32],
    pub(super) host: (&'a str, &'a [u8; 32]),
    pub(super) guest: (&'a str, &'a [u8; 32]),
    pub(super) guest_addrs: &'a [SocketAddr],
}

impl Binding<'_> {
    pub(super) fn proof(&self, secret: &Secret, role: Role) -> Result<[u8; 32], postcard::Error> {
        let key = blake3::derive_key(PROOF_CONTEXT, &secret.0);
        let covered = postcard::to_stdvec(&(VERSION, role, self))?;
        Ok(*blake3::keyed_hash(&key, &covered).as_bytes())
    }

    pub(super) fn proven(&self, secret: &Secret, role: Role, shown: &[u8; 32]) -> bool {
        self.proof(secret, role).is_ok_and(|due| due.ct_eq(shown).into())
    }
}

fn exporter(connection: &quinn::Connection) -> Result<[u8; 32], FrameError> {
    let mut bytes = [0; 32];
    connection.export_keying_material(&mut bytes, EXPORTER_LABEL, b"").map_err(|_| FrameError::Closed)?;
    Ok(bytes)
}

/// The host's side of one pairing connection.
pub(super) async fn serve(core: &Core, connection: &quinn::Connection, guest: Fingerprint) {
    match timeout(TALK_LIMIT, host_talk(core, connection, guest)).await {
        Ok(Ok(granted)) => {
            tracing::info!(peer = %guest.short(), granted, "pairing attempt");
            close(connection, CloseCode::Done, "");
        }
        Ok(Err(error)) => {
            tracing::debug!(peer = %guest.short(), %error, "pairing broke off");
            close(connection, CloseCode::Protocol, "pairing broke off");
        }
        Err(_) => close(connection, CloseCode::Protocol, "pairing took too long"),
    }
}

async fn host_talk(core: &Core, connection: &quinn::Connection, guest: Fingerprint) -> Result<bool, FrameError> {
    let (mut send, mut recv) = connection.accept_bi().await?;
    let claim: Claim = read_frame(&mut recv, FRAME_MAX).await?;
    let exporter = exporter(connection)?;
    let answer = core.desk.judge(claim, guest, exporter, core.tls.pinned(), Instant::now());
    write_frame(&mut send, &answer).await?;
    let _ = send.finish();
    // Until the guest has it all: closing at once would discard what is still on its way.
    let _ = send.stopped().await;
    Ok(matches!(answer, Answer::Granted { .. }))
}

/// The guest's side: pairs with the node that made `code`, as `my_name`, reachable at `my_addrs` (none, if this node only
/// dials). `now` is the wall clock. Each address of the code is tried in turn; the first node that proves to be the one
/// that made the code decides.
pub async fn complete(
    endpoint: &Endpoint,
    code: &str,
    my_name: &str,
    my_addrs: &[SocketAddr],
    now: UnixSecs,
) -> Result<PairedPeer, PairError> {
    let offer: Offer = code.parse()?;
    check_own(my_name, my_addrs)?;
    if now >= offer.expires {
        return Err(PairError::Expired);
    }
    if offer.fingerprint == endpoint.fingerprint() {
        return Err(PairError::SelfPairing);
    }
    if let Some(holder) = endpoint.pinned().find(&offer.node)
        && holder != offer.fingerprint
    {
        let node = offer.node;
        return Err(NameTaken { node, holder }.into());
    }
    // An address may lead elsewhere (private networks overlap) or nowhere: the next may not. The first one that was
    // refused rather than silent says more than the rest.
    let mut refusal = None;
    for &addr in &offer.addrs {
        let connect = endpoint.connect(addr, offer.fingerprint, Protocol::Pair);
        let error = match timeout(HANDSHAKE_LIMIT, connect).await {
            Ok(Ok((connection, _))) => {
                return guest_talk(endpoint, &offer, &connection, addr, my_name, my_addrs).await;
            }
            Err(_) | Ok(Err(DialError::Unreachable { .. })) => continue,
            Ok(Err(DialError::VersionMismatch { .. })) => PairError::NoOffer { addr },
            Ok(Err(e)) => PairError::Dial(e),
        };
        refusal.get_or_insert(error);
    }
    let tried = offer.addrs;
    Err(refusal.unwrap_or(PairError::Unreachable { tried }))
}

fn check_own(name: &str, addrs: &[SocketAddr]) -> Result<(), OfferError> {
    if !valid_node_name(name) {
        let node = name.to_owned();
        return Err(OfferError::Name { node });
    }
    if addrs.len() > ADDRS_MAX {
        let count = addrs.len();
        return Err(OfferError::AddrCount { count });
    }
    match addrs.iter().find(|addr| !valid_addr(addr)) {
        Some(&addr) => Err(OfferError::Addr { addr }),
        None => Ok(()),
    }
}

async fn guest_talk(
    endpoint: &Endpoint,
    offer: &Offer,
    connection: &quinn::Connection,
    addr: SocketAddr,
    my_name: &str,
    my_addrs: &[SocketAddr],
) -> Result<PairedPeer, PairError> {
    let own = endpoint.fingerprint();
    let broken = |source| PairError::Broken { addr, source };
    let binding = Binding {
        exporter: exporter(connection).map_err(|e| broken(Some(e)))?,
        host: (&offer.node, offer.fingerprint.as_bytes()),
        guest: (my_name, own.as_bytes()),
        guest_addrs: my_addrs,
    };
    let talk = async {
        let (mut send, mut recv) = connection.open_bi().await?;
        let claim = Claim {
            version: VERSION,
            node: my_name.to_owned(),
            addrs: my_addrs.to_vec(),
            proof: binding.proof(&offer.secret, Role::Guest).map_err(FrameError::Decode)?,
        };
        write_frame(&mut send, &claim).await?;
        let _ = send.finish();
        read_frame::<Answer>(&mut recv, FRAME_MAX).await
    };
    let answer = match timeout(TALK_LIMIT, talk).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(e)) => return Err(broken(Some(e))),
        Err(_) => return Err(broken(None)),
    };
    close(connection, CloseCode::Done, "");
    match answer {
        Answer::Granted { proof } if binding.proven(&offer.secret, Role::Host, &proof) => {}
        Answer::Granted { .. } => return Err(PairError::HostProof { addr }),
        Answer::NoOffer => return Err(PairError::NoOffer { addr }),
        Answer::Expired => return Err(PairError::Expired),
        Answer::WrongSecret => return Err(PairError::WrongSecret { addr }),
        Answer::NameTaken => {
            let node = my_name.to_owned();
            return Err(PairError::OwnNameTaken { node });
        }
        Answer::Malformed => return Err(PairError::VersionMismatch { addr }),
    }
    endpoint.pinned().pin(offer.fingerprint, &offer.node)?;
    Ok(PairedPeer { node: offer.node.clone(), fingerprint: offer.fingerprint, addrs: offer.addrs.clone() })
}
