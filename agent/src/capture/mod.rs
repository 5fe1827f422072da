//! The primary's side of a mirror: sees changes, takes cuts, hands transactions to the link.
//!
//! One thread owns everything here (`engine`); `watch` is the kernel's queue and the directory tree, `dirty` what may differ (`origins`: where the rows of what was renamed are), `look` one stable look at one path,
//! `proofs` what may be believed of the file system, `scan` compares listings with the manifest, `cut` takes rounds and commits, `session` follows the standby, `fence` answers those who wait, `ahead` has large files read by threads of their own (`bulk`) and sent before their txns; `pulse` says
//! what the thread is doing to those who watch it,
//! `durable` keeps what of it all this machine's own disk has; `verify` says what is known of a path.

mod ahead;
pub mod bulk;
mod closers;
mod cut;
pub mod dirty;
mod durable;
pub mod engine;
mod events;
pub mod fence;
mod fresh;
pub mod look;
mod mapped;
pub mod messages;
mod origins;
pub mod proofs;
pub mod pulse;
pub mod recent;
mod scan;
mod session;
mod staged;
pub mod verify;
pub mod watch;

pub use engine::{Capture, CaptureConfig, CaptureError};
pub use fence::{FenceRequest, NoTxn, NotFenced, Until};
pub use messages::{CaptureHandle, CaptureStatus, Command, Step, ToLink};

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
