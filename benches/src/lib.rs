//! Benchmarks of Twinbox.
