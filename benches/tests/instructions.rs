//! No step costs more instructions than it did, by more than a tenth: those kept in `instructions.json`, counted by callgrind.
//!
//! `TWINBOX_BLESS=1` keeps what is counted now. Counted is what the tests run (the `dev` profile, in which protocol, cores and all dependencies are
//! optimised): other compilers and processors give somewhat other figures, which a tenth leaves room for.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use twinbox_benches::steps::ALL;
use twinbox_tests::gate::Need;
use twinbox_tests::require;

/// How much more is too much.
const MORE: f64 = 1.10;

/// Instructions of one step, set up not counted.
fn count(name: &str) -> u64 {
    let out = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null", "--toggle-collect=*steps::counted*"])
        .args([env!("CARGO_BIN_EXE_instructions"), name])
        .output()
        .expect("run valgrind");
    let text = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{name}: {text}");
    let collected = text.lines().find_map(|line| line.split_once("Collected :").map(|(_, count)| count.trim().to_owned()));
    collected.and_then(|count| count.parse().ok()).unwrap_or_else(|| panic!("{name}: callgrind tells no count: {text}"))
}

#[test]
fn no_step_costs_more_instructions_than_it_did() {
    require!(Need::Program("valgrind"));
    if !cfg!(debug_assertions) {
        eprintln!("not compared: the counts that are kept are those of the `dev` profile");
        return;
    }
    let kept_in = Path::new(env!("CARGO_MANIFEST_DIR")).join("instructions.json");
    // Both processors.
    let next = std::sync::atomic::AtomicUsize::new(0);
    let counts = std::sync::Mutex::new(BTreeMap::new());
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some((name, ..)) = ALL.get(next.fetch_add(1, std::sync::atomic::Ordering::SeqCst)) {
                    let counted = count(name);
                    counts.lock().expect("no panics while locked").insert((*name).to_owned(), counted);
                }
            });
        }
    });
    let counts: BTreeMap<String, u64> = counts.into_inner().expect("no panics while locked");
    if std::env::var("TWINBOX_BLESS").is_ok_and(|v| v == "1") {
        let text = serde_json::to_string_pretty(&counts).expect("JSON") + "\n";
        std::fs::write(&kept_in, text).expect("write instructions.json");
        return;
    }
    let text = std::fs::read_to_string(&kept_in).expect("read instructions.json");
    let kept: BTreeMap<String, u64> = serde_json::from_str(&text).expect("instructions.json");
    let mut wrong = vec![];
    for (name, counted) in &counts {
        let Some(kept) = kept.get(name) else {
            wrong.push(format!("{name}: {counted}, and none is kept"));
            continue;
        };
        let ratio = *counted as f64 / *kept as f64;
        println!("{name}: {counted} ({ratio:.3} of what is kept)");
        if ratio > MORE {
            wrong.push(format!("{name}: {counted} instructions, {ratio:.2} times the {kept} that are kept"));
        }
    }
    assert!(wrong.is_empty(), "{}\nif that is meant: TWINBOX_BLESS=1 cargo test -p twinbox-benches --test instructions", wrong.join("\n"));
}
