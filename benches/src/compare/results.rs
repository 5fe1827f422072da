//! What came of a run: every round of every contender, medians and spread, as JSON and as tables.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde_json::{Value, json};

use super::peers::Peer;
use super::workloads::{Figures, Scale, Workload};

/// Of one contender in one workload.
#[derive(Debug, Default)]
pub struct Rounds {
    /// Those that came to an end.
    pub done: Vec<Figures>,
    /// What became of the others.
    pub failed: Vec<String>,
}

impl Rounds {
    fn sorted(&self, figure: &str) -> Vec<f64> {
        let mut all: Vec<f64> = self.done.iter().filter_map(|figures| figures.get(figure).copied()).collect();
        all.sort_by(f64::total_cmp);
        all
    }

    /// The middle one (the lower of two).
    #[must_use]
    pub fn median(&self, figure: &str) -> Option<f64> {
        let all = self.sorted(figure);
        all.get(all.len().saturating_sub(1) / 2).copied()
    }

    /// Lowest and highest.
    #[must_use]
    pub fn spread(&self, figure: &str) -> Option<(f64, f64)> {
        let all = self.sorted(figure);
        all.first().copied().zip(all.last().copied())
    }
}

/// See the module's text.
#[derive(Debug)]
pub struct Results {
    /// How large the workloads were.
    pub scale: Scale,
    /// By workload and contender.
    pub rows: BTreeMap<Workload, BTreeMap<Peer, Rounds>>,
    /// 4 KiB made durable and a round trip, before each round; p50 in ms.
    pub floor_ms: Vec<f64>,
    /// Local copies of the store of the first sync, in seconds.
    pub copy_s: Vec<f64>,
    /// What it ran on.
    pub machine: String,
}

/// A figure as people read it.
#[must_use]
pub fn shown(figure: &str, value: f64) -> String {
    if figure.ends_with("_bytes") {
        return match value {
            v if v >= 1e9 => format!("{:.2} GB", v / 1e9),
            v if v >= 1e6 => format!("{:.2} MB", v / 1e6),
            v if v >= 1e3 => format!("{:.1} kB", v / 1e3),
            v => format!("{v:.0} B"),
        };
    }
    if figure.ends_with("_ms") {
        return if value < 10.0 { format!("{value:.2} ms") } else { format!("{value:.0} ms") };
    }
    if figure == "seconds" || figure.ends_with("_s") {
        return format!("{value:.2} s");
    }
    format!("{value:.0}")
}

/// Figures and their columns, in order.
const COLUMNS: [(&str, &str); 11] = [
    ("seconds", "until there"),
    ("lag_p50_ms", "p50"),
    ("lag_p99_ms", "p99"),
    ("lag_max_ms", "max"),
    ("samples", "samples"),
    ("b_newer_than_a", "B newer than A"),
    ("wire_bytes", "wire"),
    ("cpu_primary_s", "CPU primary"),
    ("cpu_standby_s", "CPU standby"),
    ("rss_primary_bytes", "memory primary"),
    ("rss_standby_bytes", "memory standby"),
];

fn median(values: &[f64]) -> Option<f64> {
    let mut all = values.to_vec();
    all.sort_by(f64::total_cmp);
    all.get(all.len().saturating_sub(1) / 2).copied()
}

impl Results {
    /// Every figure of every round.
    #[must_use]
    pub fn json(&self) -> Value {
        let rounds = |rounds: &Rounds| json!({ "rounds": rounds.done, "failed": rounds.failed });
        let row = |peers: &BTreeMap<Peer, Rounds>| peers.iter().map(|(peer, r)| (peer.name().to_owned(), rounds(r))).collect();
        let rows = self.rows.iter().map(|(workload, peers)| {
            let contenders: serde_json::Map<String, Value> = row(peers);
            json!({ "workload": format!("{workload:?}"), "title": workload.title(self.scale), "contenders": contenders })
        });
        json!({
            "machine": self.machine, "percent": self.scale.percent, "files": self.scale.files,
            "floor_p50_ms": self.floor_ms, "cp_a_s": self.copy_s, "workloads": rows.collect::<Vec<_>>(),
        })
    }

    /// One table a workload (Markdown): medians, and lowest to highest of the first column.
    #[must_use]
    pub fn tables(&self) -> String {
        let mut text = format!("{}\n\n", self.machine);
        if let Some(floor) = median(&self.floor_ms) {
            let _ = writeln!(text, "Floor of a durable delivery (4 KiB `fdatasync` and a round trip), p50: {}.", shown("_ms", floor));
        }
        if let Some(copy) = median(&self.copy_s) {
            let _ = writeln!(text, "`cp -a` of the store of the first sync: {}.", shown("seconds", copy));
        }
        for (workload, peers) in &self.rows {
            let _ = writeln!(text, "\n### {}\n", workload.title(self.scale));
            let has = |figure: &str| peers.values().any(|rounds| rounds.median(figure).is_some());
            let columns: Vec<_> = COLUMNS.into_iter().filter(|(figure, _)| has(figure)).collect();
            let heads: Vec<&str> = columns.iter().map(|(_, head)| *head).collect();
            let _ = writeln!(text, "| | {} | of the payload | rounds, spread |", heads.join(" | "));
            let _ = writeln!(text, "|---|{}---:|---|", "---:|".repeat(columns.len()));
            for (peer, rounds) in peers {
                let cell = |(figure, _): &(&str, &str)| rounds.median(figure).map_or("–".into(), |value| shown(figure, value));
                let cells: Vec<String> = columns.iter().map(cell).collect();
                let wire = rounds.median("wire_bytes").zip(rounds.median("payload_bytes")).filter(|(_, payload)| *payload > 0.0);
                let share = wire.map_or("–".into(), |(wire, payload)| format!("{:.2}", wire / payload));
                let spread = columns.first().and_then(|(figure, _)| {
                    let (low, high) = rounds.spread(figure)?;
                    Some(format!("{}, {} to {}", rounds.done.len(), shown(figure, low), shown(figure, high)))
                });
                let failed = rounds.failed.first().map_or(String::new(), |why| format!(" {} failed: {why}", rounds.failed.len()));
                let _ = writeln!(text, "| {} | {} | {share} | {}{failed} |", peer.name(), cells.join(" | "), spread.unwrap_or_default());
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_are_of_what_came_to_an_end() {
        let one = |value: f64| Figures::from([("seconds", value)]);
        let rounds = Rounds { done: vec![one(9.0), one(1.0), one(3.0), one(4.0)], failed: vec!["stuck".into()] };
        assert_eq!((rounds.median("seconds"), rounds.spread("seconds")), (Some(3.0), Some((1.0, 9.0))));
        assert_eq!((rounds.median("wire_bytes"), Rounds::default().median("seconds")), (None, None));
    }

    #[test]
    fn figures_are_read_by_people() {
        let all =
            [("wire_bytes", 1_234_567.0, "1.23 MB"), ("lag_p50_ms", 1.234, "1.23 ms"), ("seconds", 2.0, "2.00 s"), ("samples", 12.0, "12")];
        for (figure, value, text) in all {
            assert_eq!(shown(figure, value), text);
        }
    }
}
