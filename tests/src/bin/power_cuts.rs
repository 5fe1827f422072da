//! Cuts the standby's power under load, many times, on ext4 and XFS: `power_cuts --cuts 200`. Needs root; see `twinbox_tests::powercut`.

use std::process::ExitCode;

use twinbox_tests::disk::Format;
use twinbox_tests::powercut;
use twinbox_tests::rng::Seed;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let cuts: usize = match &words[..] {
        [] => 200,
        [name, n] if name == "--cuts" && n.parse::<usize>().is_ok() => n.parse().unwrap_or(200),
        _ => {
            eprintln!("usage: power_cuts [--cuts N]");
            return ExitCode::from(2);
        }
    };
    let seed = Seed::from_env();
    for format in [Format::Ext4, Format::Xfs] {
        powercut::run(format, cuts.div_ceil(2), seed.0);
    }
    ExitCode::SUCCESS
}
