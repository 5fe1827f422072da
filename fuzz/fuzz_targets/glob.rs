//! See `checks/glob.rs`.
#![no_main]

#[path = "../checks/glob.rs"]
mod check;

libfuzzer_sys::fuzz_target!(|data: &[u8]| check::check(data));
