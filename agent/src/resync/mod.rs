//! A node that was primary comes back: what it has alone is merged into the one that was promoted after it, or kept in rescue, and it becomes that one's standby. See ARCHITECTURE §5c.
//!
//! On the returning node: [`work`] goes through it, `tail` says what this disk has that the fork's rows have not, `remote` speaks to the other node, `report` tells people. On the other: [`serve`] answers,
//! `store` looks at the store and changes it; [`back`] gives back what is kept. The decisions are [`twinbox_resync::reconcile`]'s.

pub mod back;
mod boxes;
mod keywords;
mod program;
mod remote;
mod report;
pub mod serve;
mod store;
mod tail;
pub mod work;

use twinbox_protocol::path::RelPath;
use twinbox_resync::mailname::Name;
pub use work::{ResyncError, Shown};

/// Whether a path of a store is a message of a Maildir.
#[must_use]
pub fn is_message(path: &[u8]) -> bool {
    RelPath::new(path).is_ok_and(|path| Name::of(&path).is_some())
}

#[cfg(test)]
mod tests;
