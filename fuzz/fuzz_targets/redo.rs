//! See `checks/redo.rs`.
#![no_main]

#[path = "../checks/redo.rs"]
mod check;

libfuzzer_sys::fuzz_target!(|data: &[u8]| check::check(data));
