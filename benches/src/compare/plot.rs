//! The comparison as one picture (SVG): a panel a workload, a bar a contender, shorter is better.
//!
//! Written by hand: bars and words are fewer lines than a plotting library's set-up, and the result is the same text on every machine.

use std::fmt::Write;

use super::peers::Peer;
use super::results::{Results, Rounds, shown};
use super::workloads::Workload;

const WIDTH: f64 = 920.0;
const LEFT: f64 = 130.0;
const RIGHT: f64 = 90.0;
const BAR: f64 = 16.0;
const OURS: &str = "#1769aa";
const THEIRS: &str = "#b0b7bf";

/// What of each workload is shown.
const PANELS: [(Workload, &str, &str); 6] = [
    (Workload::Lag, "lag_p50_ms", "how far behind, median"),
    (Workload::Burst, "seconds", "until all are on both machines"),
    (Workload::FirstSync, "seconds", "time"),
    (Workload::Append, "wire_bytes", "bytes on the wire"),
    (Workload::Shared, "wire_bytes", "bytes on the wire"),
    (Workload::Flags, "wire_bytes", "bytes on the wire"),
];

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// The picture.
#[must_use]
pub fn svg(results: &Results) -> String {
    let (mut body, mut y) = (String::new(), 34.0);
    let text = |body: &mut String, x: f64, y: f64, class: &str, words: &str| {
        let _ = writeln!(body, "<text x=\"{x:.1}\" y=\"{y:.1}\" class=\"{class}\">{}</text>", escaped(words));
    };
    text(&mut body, 16.0, y, "title", "Two copies of a mail store, by different means: shorter is better");
    for (workload, figure, what) in PANELS {
        let Some(peers) = results.rows.get(&workload) else { continue };
        let bars: Vec<(Peer, f64)> =
            peers.iter().filter_map(|(peer, rounds): (&Peer, &Rounds)| Some((*peer, rounds.median(figure)?))).collect();
        let most = bars.iter().map(|(_, value)| *value).fold(0.0, f64::max);
        if most <= 0.0 {
            continue;
        }
        y += 34.0;
        text(&mut body, 16.0, y, "head", &format!("{} – {what}", workload.title(results.scale)));
        y += 8.0;
        for (peer, value) in bars {
            let width = ((WIDTH - LEFT - RIGHT) * value / most).max(1.0);
            let (colour, class) = if peer == Peer::Twinbox { (OURS, "ours") } else { (THEIRS, "name") };
            text(&mut body, LEFT - 8.0, y + BAR - 4.0, &format!("{class} end"), peer.name());
            let _ = writeln!(body, "<rect x=\"{LEFT}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{:.1}\" fill=\"{colour}\"/>", BAR - 3.0);
            text(&mut body, LEFT + width + 6.0, y + BAR - 4.0, class, &shown(figure, value));
            y += BAR;
        }
    }
    y += 26.0;
    text(&mut body, 16.0, y, "name", &results.machine);
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {:.0}\" font-family=\"sans-serif\">\n\
         <style>.title{{font-size:17px;font-weight:bold}}.head{{font-size:13px;font-weight:bold}}.name{{font-size:12px;fill:#444}}\
         .ours{{font-size:12px;font-weight:bold;fill:{OURS}}}.end{{text-anchor:end}}</style>\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n{body}</svg>\n",
        y + 14.0
    )
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::workloads::{Figures, Scale};
    use super::*;

    #[test]
    fn the_longest_bar_is_the_largest_figure() {
        let row = |value: f64| Rounds { done: vec![Figures::from([("lag_p50_ms", value)])], failed: vec![] };
        let peers = BTreeMap::from([(Peer::Twinbox, row(1.0)), (Peer::Rsync, row(100.0)), (Peer::Unison, Rounds::default())]);
        let rows = BTreeMap::from([(Workload::Lag, peers)]);
        let scale = Scale { percent: 100, files: 1 };
        let picture = svg(&Results { scale, rows, floor_ms: vec![], copy_s: vec![], machine: "a <machine> & more".into() });
        let widths: Vec<&str> = picture.split("width=\"").skip(1).map(|rest| rest.split('"').next().unwrap()).collect();
        assert_eq!(widths, ["100%", "7.0", "700.0"]);
        assert!(picture.contains("1.00 ms") && picture.contains("a &lt;machine&gt; &amp; more") && !picture.contains("unison"));
    }
}
