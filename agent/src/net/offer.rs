//! The host's side of pairing: one open offer, and the decision about each claim to it.
//!
//! Invariants:
//! - An offer is judged and consumed under one lock: of two guests with one code, one pairs. Three wrong proofs
//!   close it. The 128-bit secret could stand any number of guesses: the limit is there to make an attack visible.
//! - A key is pinned before its owner is told, so that whoever hears "granted" can connect at once; and only while
//!   somebody waits for the result, so that no pin is left that nobody persists.
//!
//! Sees no connection and no frame: those are `pairing`'s.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::{Instant, timeout_at};

use super::code::{ADDRS_MAX, Offer, OfferError, UnixSecs, valid_addr, valid_node_name};
use super::identity::Fingerprint;
use super::pairing::{Answer, Binding, Claim, PairedPeer, Role, VERSION};
use super::pinned::PinnedPeers;

const WRONG_MAX: u8 = 3;
/// No offer stays open longer, whatever it says.
const OFFER_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// Why an offer ended without a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OfferEnded {
    /// Nobody came in time.
    #[error("nobody used the pairing code before it expired: make a new one")]
    Expired,
    /// Somebody who does not have the code tried.
    #[error("three wrong pairing attempts: the offer is closed; find out who tried, then make a new code")]
    TooManyWrong,
    /// A newer offer took its place.
    #[error("a newer pairing offer replaced this one")]
    Replaced,
    /// The endpoint was closed.
    #[error("the agent is stopping")]
    Stopped,
}

/// Where the one open offer lies.
#[derive(Debug, Default)]
pub(super) struct OfferDesk(Mutex<Option<OpenState>>);

#[derive(Debug)]
struct OpenState {
    offer: Offer,
    deadline: Instant,
    wrong: u8,
    done: oneshot::Sender<Result<PairedPeer, OfferEnded>>,
}

/// An offer that waits for its guest. Dropped, it is closed.
#[derive(Debug)]
pub struct OpenOffer {
    desk: Arc<OfferDesk>,
    deadline: Instant,
    done: oneshot::Receiver<Result<PairedPeer, OfferEnded>>,
}

impl OpenOffer {
    /// The guest, once it has paired, or why none will. Cancel safe; to be called until it has answered once.
    pub async fn paired(&mut self) -> Result<PairedPeer, OfferEnded> {
        match timeout_at(self.deadline, &mut self.done).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) => Err(OfferEnded::Stopped),
            Err(_) => {
                self.done.close();
                // A guest may have been granted in this very moment.
                self.done.try_recv().unwrap_or(Err(OfferEnded::Expired))
            }
        }
    }
}

impl Drop for OpenOffer {
    fn drop(&mut self) {
        self.done.close();
        self.desk.sweep();
    }
}

impl OfferDesk {
    pub(super) fn open(self: &Arc<Self>, offer: Offer, now: UnixSecs) -> Result<OpenOffer, OfferError> {
        let left = Duration::from_secs(offer.expires.saturating_sub(now)).min(OFFER_MAX);
        if left.is_zero() {
            return Err(OfferError::Expired);
        }
        let deadline = Instant::now() + left;
        let (tell, done) = oneshot::channel();
        let state = OpenState { offer, deadline, wrong: 0, done: tell };
        let old = self.lock().replace(state);
        if let Some(old) = old {
            let _ = old.done.send(Err(OfferEnded::Replaced));
        }
        let desk = self.clone();
        Ok(OpenOffer { desk, deadline, done })
    }

    /// Whether the pairing protocol is offered at all.
    pub(super) fn is_open(&self) -> bool {
        let desk = self.lock();
        desk.as_ref().is_some_and(|open| !open.done.is_closed() && Instant::now() < open.deadline)
    }

    pub(super) fn close(&self) {
        if let Some(open) = self.lock().take() {
            let _ = open.done.send(Err(OfferEnded::Stopped));
        }
    }

    /// Forgets an offer, with its secret, that nobody waits for any more.
    fn sweep(&self) {
        let mut desk = self.lock();
        if desk.as_ref().is_some_and(|open| open.done.is_closed()) {
            *desk = None;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<OpenState>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The whole decision about a claim by the key `guest` on a session with this `exporter`.
    pub(super) fn judge(&self, claim: Claim, guest: Fingerprint, exporter: [u8; 32], pinned: &PinnedPeers, now: Instant) -> Answer {
        let sound = claim.version == VERSION
            && valid_node_name(&claim.node)
            && claim.addrs.len() <= ADDRS_MAX
            && claim.addrs.iter().all(valid_addr);
        if !sound {
            return Answer::Malformed;
        }
        let mut desk = self.lock();
        let Some(open) = desk.take_if(|open| !open.done.is_closed()) else {
            return Answer::NoOffer;
        };
        if now >= open.deadline {
            let _ = open.done.send(Err(OfferEnded::Expired));
            return Answer::Expired;
        }
        let offer = &open.offer;
        let binding = Binding {
            exporter,
            host: (&offer.node, offer.fingerprint.as_bytes()),
            guest: (&claim.node, guest.as_bytes()),
            guest_addrs: &claim.addrs,
        };
        if !binding.proven(&offer.secret, Role::Guest, &claim.proof) {
            let wrong = open.wrong + 1;
            tracing::warn!(peer = %guest.short(), wrong, "wrong pairing attempt");
            if wrong >= WRONG_MAX {
                let _ = open.done.send(Err(OfferEnded::TooManyWrong));
            } else {
                *desk = Some(OpenState { wrong, ..open });
            }
            return Answer::WrongSecret;
        }
        // The guest is genuine from here on; what it can still do wrong leaves the offer open for another try.
        let granted = binding.proof(&offer.secret, Role::Host);
        let (Ok(proof), true) = (granted, claim.node != offer.node) else {
            *desk = Some(open);
            return Answer::NameTaken;
        };
        let before = pinned.name_of(&guest);
        if pinned.pin(guest, &claim.node).is_err() {
            *desk = Some(open);
            return Answer::NameTaken;
        }
        let peer = PairedPeer { node: claim.node, fingerprint: guest, addrs: claim.addrs };
        if open.done.send(Ok(peer)).is_err() {
            // The operator gave up in this very moment: nobody would persist the pin.
            pinned.unpin(&guest);
            if let Some(before) = before {
                let _ = pinned.pin(guest, &before);
            }
            return Answer::NoOffer;
        }
        Answer::Granted { proof }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXPORTER: [u8; 32] = [3; 32];

    struct Scene {
        desk: Arc<OfferDesk>,
        offer: Offer,
        open: OpenOffer,
        guest: Fingerprint,
        pinned: PinnedPeers,
    }

    impl Scene {
        fn new() -> Self {
            let host = Fingerprint::from_bytes([1; 32]);
            let addr = "192.0.2.1:1".parse().unwrap();
            let offer = Offer::new("host", vec![addr], host, 600).unwrap();
            let desk = Arc::new(OfferDesk::default());
            let open = desk.open(offer.clone(), 0).unwrap();
            Self { desk, offer, open, guest: Fingerprint::from_bytes([2; 32]), pinned: PinnedPeers::new() }
        }

        fn claim(&self, role: Role) -> Claim {
            let addrs = vec!["192.0.2.2:2".parse().unwrap()];
            let binding = Binding {
                exporter: EXPORTER,
                host: ("host", self.offer.fingerprint.as_bytes()),
                guest: ("guest", self.guest.as_bytes()),
                guest_addrs: &addrs,
            };
            let proof = binding.proof(&self.offer.secret, role).unwrap();
            Claim { version: VERSION, node: "guest".to_owned(), addrs, proof }
        }

        fn judge(&self, claim: Claim, guest: Fingerprint, exporter: [u8; 32]) -> Answer {
            let now = Instant::now();
            self.desk.judge(claim, guest, exporter, &self.pinned, now)
        }
    }

    /// How a claim is changed on its way.
    type Tamper = fn(&mut Claim, &mut Fingerprint, &mut [u8; 32]);

    #[tokio::test]
    async fn a_proof_covers_session_role_names_keys_and_addresses() {
        let tampers: [Tamper; 5] = [
            |claim, _, _| claim.node = "mallory".to_owned(),
            |claim, _, _| claim.addrs.clear(),
            |claim, _, _| claim.proof[31] ^= 1,
            |_, guest, _| *guest = Fingerprint::from_bytes([9; 32]),
            |_, _, exporter| exporter[0] ^= 1,
        ];
        for tamper in tampers {
            let scene = Scene::new();
            let (mut claim, mut guest) = (scene.claim(Role::Guest), scene.guest);
            let mut exporter = EXPORTER;
            tamper(&mut claim, &mut guest, &mut exporter);
            assert_eq!(scene.judge(claim, guest, exporter), Answer::WrongSecret);
            assert!(scene.pinned.snapshot().is_empty());
        }
        let mut scene = Scene::new();
        let reflected = scene.claim(Role::Host);
        let answer = scene.judge(reflected, scene.guest, EXPORTER);
        assert_eq!(answer, Answer::WrongSecret);
        let answer = scene.judge(scene.claim(Role::Guest), scene.guest, EXPORTER);
        let Answer::Granted { proof } = answer else {
            panic!("{answer:?}");
        };
        assert_ne!(proof, scene.claim(Role::Guest).proof);
        assert_eq!(proof, scene.claim(Role::Host).proof);
        assert_eq!(scene.open.paired().await.unwrap().node, "guest");
        let again = scene.judge(scene.claim(Role::Guest), scene.guest, EXPORTER);
        assert_eq!(again, Answer::NoOffer);
    }

    #[tokio::test]
    async fn too_late_malformed_or_given_up_pins_nobody() {
        let mut scene = Scene::new();
        let late = Instant::now() + Duration::from_secs(601);
        let claim = scene.claim(Role::Guest);
        let answer = scene.desk.judge(claim, scene.guest, EXPORTER, &scene.pinned, late);
        assert_eq!(answer, Answer::Expired);
        assert_eq!(scene.open.paired().await, Err(OfferEnded::Expired));
        assert!(!scene.desk.is_open());

        let tampers: [fn(&mut Claim); 3] = [
            |claim| claim.version += 1,
            |claim| claim.node = "../etc".to_owned(),
            |claim| claim.addrs = vec![claim.addrs[0]; ADDRS_MAX + 1],
        ];
        let scene = Scene::new();
        for tamper in tampers {
            let mut claim = scene.claim(Role::Guest);
            tamper(&mut claim);
            let answer = scene.judge(claim, scene.guest, EXPORTER);
            assert_eq!(answer, Answer::Malformed);
        }
        assert!(scene.desk.is_open());

        let Scene { open, desk, .. } = Scene::new();
        drop(open);
        assert!(!desk.is_open() && desk.lock().is_none());
        assert!(scene.pinned.snapshot().is_empty());
    }
}
