//! Twinbox beside what a user would otherwise run, on the same data in the same run.
//!
//! Reading order: [`group`] and [`arena`] (where it happens and what it costs), [`peers`] (who takes part), [`workloads`] (what is
//! done), [`results`] (what came of it, as a table and as JSON) and [`plot`] (as a picture).

pub mod arena;
pub mod group;
pub mod peers;
pub mod plot;
pub mod results;
pub mod workloads;
