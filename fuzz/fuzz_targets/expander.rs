//! See `checks/expander.rs`.
#![no_main]

#[path = "../checks/expander.rs"]
mod check;

libfuzzer_sys::fuzz_target!(|data: &[u8]| check::check(data));
