//! What a node remembers, and how two memories are reconciled.
//!
//! [`manifest`] is the durable memory of what the standby has; [`view`] lays what is in flight over it; [`rows`] says what each op does to a
//! memory, the same on both nodes; [`plan`] turns what was observed into ops; [`redo`] is the standby's write-ahead log; [`node`] holds roles and generations;
//! [`reconcile`] decides what becomes of what a returning primary has alone, [`mailname`] reads names of messages.

pub mod boxes;
pub mod mailname;
pub mod manifest;
pub mod node;
pub mod plan;
pub mod reconcile;
pub mod redo;
pub mod rows;
pub mod schema;
pub mod view;
