//! See `checks/log_frame.rs`.
#![no_main]

#[path = "../checks/log_frame.rs"]
mod check;

libfuzzer_sys::fuzz_target!(|data: &[u8]| check::check(data));
