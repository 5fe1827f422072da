//! See `checks/pair_code.rs`.
#![no_main]

#[path = "../checks/pair_code.rs"]
mod check;

libfuzzer_sys::fuzz_target!(|data: &[u8]| check::check(data));
