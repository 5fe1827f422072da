//! Benchmarks of Twinbox.

pub mod burst;
pub mod compare;
pub mod steps;
