//! A node that was primary comes back: what it has alone is merged into the one that was promoted after it, or kept in rescue, and it becomes that one's standby. See ARCHITECTURE §5c.
//!
//! On the returning node: [`work`] goes through it, `tail` says what this disk has that the fork's rows have not, `remote` speaks to the other node, `report` tells people. On the other: [`serve`] answers,
//! `store` looks at the store and changes it. The decisions are [`twinbox_resync::reconcile`]'s.

mod keywords;
mod remote;
mod report;
pub mod serve;
mod store;
mod tail;
pub mod work;

pub use work::{ResyncError, Shown};

#[cfg(test)]
mod tests;
