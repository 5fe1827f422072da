//! The Twinbox agent: watches the live store, ships its changes, applies them on the standby.

pub mod admin;
pub mod atomic;
pub mod capture;
pub mod cli;
pub mod cmd;
pub mod config;
pub mod duration;
pub mod exit;
pub mod failure;
pub mod fences;
pub mod glob;
pub mod heal;
pub mod hooks;
pub mod layout;
pub mod link;
pub mod local;
pub mod names;
pub mod nearest;
pub mod net;
pub mod resync;
pub mod roles;
pub mod standby;
pub mod status;
pub mod switch;
pub mod sys;
pub mod tree;
