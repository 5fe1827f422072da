//! The comparison itself works: a small round of it, whose figures mean nothing.

use std::process::Command;

use serde_json::Value;
use twinbox_tests::gate::{Need, heavy};
use twinbox_tests::require;
use twinbox_tests::scratch::Scratch;

#[test]
fn a_small_round_comes_to_an_end_and_is_told() {
    require!(Need::Namespaces, Need::Program("rsync"), Need::Program("ss"));
    let _turn = heavy();
    let scratch = Scratch::new("compare");
    let out = Command::new(env!("CARGO_BIN_EXE_compare"))
        .args(["--peers", "twinbox,rsync", "--workloads", "lag,fence,burst,order", "--rounds", "1", "--percent", "4", "--out"])
        .arg(scratch.path())
        .output()
        .expect("run compare");
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{said}");
    let text = std::fs::read_to_string(scratch.join("compare.json")).expect("compare.json");
    let results: Value = serde_json::from_str(&text).expect("JSON");
    let rows = results["workloads"].as_array().expect("workloads");
    let mut looked_at = 0;
    for row in rows {
        for (name, contender) in row["contenders"].as_object().expect("contenders") {
            assert_eq!(contender["failed"].as_array().map(Vec::len), Some(0), "{name}: {contender}");
            let rounds = contender["rounds"].as_array().expect("rounds");
            assert_eq!(rounds.len(), 1, "{name}");
            for figure in ["wire_bytes", "rss_primary_bytes", "lag_p50_ms", "seconds", "samples"] {
                assert!(rounds[0][figure].is_null() || rounds[0][figure].as_f64() > Some(0.0), "{name}: {figure} in {contender}");
            }
            if name == "twinbox" && row["workload"] == "Order" {
                assert_eq!(rounds[0]["b_newer_than_a"].as_f64(), Some(0.0));
            }
            looked_at += 1;
        }
    }
    assert_eq!(looked_at, 7);
    for file in ["compare.md", "compare.svg"] {
        assert!(std::fs::read_to_string(scratch.join(file)).expect(file).contains("messages"), "{file}");
    }
}

#[test]
fn what_is_not_known_is_refused() {
    for words in [["--line", "moon"], ["--percent", "0"], ["--files", "3"], ["--peers", "nobody"]] {
        let out = Command::new(env!("CARGO_BIN_EXE_compare")).args(words).output().expect("run compare");
        assert!(!out.status.success(), "{words:?}");
        assert!(!String::from_utf8_lossy(&out.stderr).contains("panicked"), "{words:?}");
    }
}
