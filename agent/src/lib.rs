//! The Twinbox agent: watches the live store, ships its changes, applies them on the standby.

pub mod exit;
pub mod glob;
pub mod layout;
pub mod nearest;
