//! Replays the committed corpora of the fuzz targets (see `fuzz/`), so that a finding stays found without the fuzzer.

#[path = "../../fuzz/checks/ops_sequence.rs"]
mod ops_sequence;
#[path = "../../fuzz/checks/redo.rs"]
mod redo;

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
fn redo_corpus() {
    replay("redo", redo::check);
}

#[test]
fn ops_sequence_corpus() {
    replay("ops_sequence", ops_sequence::check);
}
