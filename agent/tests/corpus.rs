//! Replays the committed corpora of the fuzz targets (see `fuzz/`), so that a finding stays found without the fuzzer.

#[path = "../../fuzz/checks/config.rs"]
mod config;
#[path = "../../fuzz/checks/expander.rs"]
mod expander;
#[path = "../../fuzz/checks/glob.rs"]
mod glob;
#[path = "../../fuzz/checks/pair_code.rs"]
mod pair_code;

use std::path::Path;

fn replay(target: &str, check: fn(&[u8])) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target);
    let mut files: Vec<_> = std::fs::read_dir(&dir).expect("the corpus is there").map(|item| item.expect("a file").path()).collect();
    files.sort();
    assert!(!files.is_empty(), "{} is empty", dir.display());
    for file in files {
        println!("{}", file.display());
        check(&std::fs::read(&file).expect("the file can be read"));
    }
}

#[test]
fn expander_corpus() {
    replay("expander", expander::check);
}

#[test]
fn config_corpus() {
    replay("config", config::check);
}

#[test]
fn pair_code_corpus() {
    replay("pair_code", pair_code::check);
}

#[test]
fn glob_corpus() {
    replay("glob", glob::check);
}
