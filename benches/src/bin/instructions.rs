//! One step of `benches/src/steps.rs`, run once for `callgrind` to count. `benches/tests/instructions.rs` calls it for each of them.

use std::process::ExitCode;

use twinbox_benches::steps::ALL;

fn main() -> ExitCode {
    let Some(name) = std::env::args().nth(1) else {
        ALL.iter().for_each(|(name, ..)| println!("{name}"));
        return ExitCode::SUCCESS;
    };
    let Some((_, _, size, set_up)) = ALL.into_iter().find(|(of, ..)| *of == name) else {
        eprintln!("instructions [STEP]: no step is called `{name}`; without a word, all names are told");
        return ExitCode::from(2);
    };
    set_up(size).run();
    ExitCode::SUCCESS
}
