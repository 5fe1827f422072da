//! What crosses the wire between two Twinbox nodes, and the decisions about it.
//!
//! Sans-I/O: no sockets, no clock, no files, no randomness. `ls` shows the dataflow: [`ids`] and [`path`] are the vocabulary,
//! [`entry`] says what a path holds, [`content`] names bytes, [`chunk`] finds what changed in large files, [`ops`] is the log's
//! language, [`outbox`] numbers and chains it, [`msg`] and [`codec`] carry it, [`lineage`] and [`hello`] compare two nodes' memories, [`rejoin`] is what a node says that comes back.

mod bounded;
pub mod chunk;
pub mod codec;
pub mod content;
pub mod digest;
pub mod entry;
pub mod hello;
pub mod ids;
pub mod lineage;
pub mod msg;
pub mod ops;
pub mod outbox;
pub mod path;
pub mod rejoin;

/// Version of the wire protocol. Peers with another one are refused with both numbers named.
/// - 1: first version.
/// - 2: histories travel with the hello.
/// - 3: a node that was primary asks the one promoted after it ([`rejoin`]).
/// - 4: messages in the mail server's own formats are merged by its program.
/// - 5: either node asks the other for a content that `verify` has found damaged (`Borrow`, `Want`).
/// - 6: what is staged outlives a session (`Keep`); a standby says whether it is at a cut.
pub const PROTOCOL_VERSION: u32 = 6;
