//! See `checks/ops_sequence.rs`.
#![no_main]

#[path = "../checks/ops_sequence.rs"]
mod check;

libfuzzer_sys::fuzz_target!(|data: &[u8]| check::check(data));
