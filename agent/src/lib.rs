//! The Twinbox agent: watches the live store, ships its changes, applies them on the standby.

pub mod net;
pub mod sys;
pub mod tree;
