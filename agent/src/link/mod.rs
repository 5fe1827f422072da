//! Sessions between a primary and a standby over QUIC: who dials, who waits, what flows on which stream.
//!
//! The primary dials every configured address of its peer and keeps a connection on each ([`paths`]); the mirror's session runs on the first that works ([`primary`]).
//! The standby serves whatever pinned peers open ([`standby`]). Compression is [`zstream`], `rows` sends a manifest's rows. Decisions are the capture's and the standby's, through their handles.

pub mod paths;
pub mod primary;
pub(crate) mod rows;
pub mod standby;
pub mod zstream;
