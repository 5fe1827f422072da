//! Replays the committed corpora of the fuzz targets (see `fuzz/`), so that a finding stays found without the fuzzer.

#[path = "../../fuzz/checks/control.rs"]
mod control;
#[path = "../../fuzz/checks/log_frame.rs"]
mod log_frame;

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
fn log_frame_corpus() {
    replay("log_frame", log_frame::check);
}

#[test]
fn control_corpus() {
    replay("control", control::check);
}
