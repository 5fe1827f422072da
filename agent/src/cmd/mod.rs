//! The commands, one a file.

pub mod compare;
pub mod demo;
mod events;
pub mod fence;
pub mod heal;
pub mod init;
pub mod mirror;
pub mod pair;
pub mod rescue;
pub mod resync;
mod returning;
pub mod run;
pub mod status;
pub mod switch;
mod switching;
pub mod verify;
mod verifying;
