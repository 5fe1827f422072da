//! The wire between two nodes: who they are, how they meet, and how bytes travel between them.
//!
//! ```text
//! identity ─▶ tls ─┬▶ endpoint  dial ──────────────▶ Connection
//! pinned ──▶───────┘  inbound   accept ─▶ admitted ─▶ Incoming
//!                        └─ pairing ◀─ offer ◀─ code ─▶ both keys pinned
//! framed: one value, one frame, over any stream of a Connection
//! ```
//!
//! Invariants, each argued where it is kept:
//! - a peer is its public key; a certificate is only the envelope TLS wants (`identity`);
//! - no application byte is read from a key that is not pinned, except by an open pairing offer (`tls`, `inbound`);
//! - nothing a peer sends makes this node allocate more than a stated bound (`inbound`, `framed`, `tuning`).
//!
//! It does not know mirrors, roles, generations or logs: those are the link's business, on the streams it opens here.

pub mod code;
pub mod endpoint;
pub mod framed;
pub mod identity;
mod inbound;
pub mod offer;
pub mod pairing;
pub mod pinned;
mod reset;
pub mod tls;
pub mod tuning;

pub use code::{CodeError, Offer, OfferError, UnixSecs, valid_node_name};
pub use endpoint::{BindError, CloseCode, DialError, Endpoint, Incoming, close, peer_fingerprint};
pub use framed::{FrameError, FrameReader, encode_frame, read_frame, write_frame};
pub use identity::{Fingerprint, FingerprintError, IdentityError, NodeKey};
pub use offer::{OfferEnded, OpenOffer};
pub use pairing::{PairError, PairedPeer, complete};
pub use pinned::{NameTaken, PinnedPeers};
pub use tuning::{Tuning, TuningError};

#[cfg(test)]
mod tests;
