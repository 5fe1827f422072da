//! Whole-system tests: the harness they share.
//!
//! Reading order: [`gate`] (what a test needs, how large it is, what runs alone), [`scratch`] (where it works), [`tree`] (are two
//! directory trees the same?), [`twinbox`], [`live`], [`node`] and [`refusal`] (the product's processes), [`dovecot`], [`imap`],
//! [`lmtp`] and [`mailload`] (a real mail server and what happens to it), [`storm`] (changes without a mail server), [`script`] (changes
//! whose every moment is known), [`netns`] and
//! [`relay`] (networks that fail), [`slow`] (networks that are long), [`disk`], [`platter`] and [`powercut`] (disks that do), [`bench`](mod@bench) and [`arrivals`] (what the measuring programs share).
//!
//! Rules: waits are bounded and look at a condition, never at the clock alone; every random choice comes from a seed that a failing
//! test prints; only processes started here are ever signalled, by their id.

pub mod adversary;
pub mod arrivals;
pub mod bench;
pub mod besieged;
pub mod disk;
pub mod dovecot;
pub mod failback;
pub mod fence;
pub mod fenced;
pub mod folders;
pub mod gate;
pub mod imap;
pub mod live;
pub mod lmtp;
pub mod mailload;
pub mod netns;
pub mod node;
pub mod platter;
pub mod powercut;
pub mod refusal;
pub mod relay;
pub mod rng;
pub mod scratch;
pub mod script;
pub mod slow;
pub mod storm;
pub mod tree;
pub mod twinbox;
pub mod walk;
pub mod world;
