//! Every workload for Twinbox and for what a user would otherwise run, in two network namespaces, round after round in rotated order.
//!
//! How to read and rerun it is in `benches/README.md`. Needs root (namespaces, control groups).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, ensure};
use clap::Parser;
use twinbox_benches::compare::arena::Arena;
use twinbox_benches::compare::peers::Peer;
use twinbox_benches::compare::plot::svg;
use twinbox_benches::compare::results::Results;
use twinbox_benches::compare::workloads::{Scale, Workload};
use twinbox_tests::bench::floor;
use twinbox_tests::slow::Line;

#[derive(Debug, Parser)]
#[command(about = "Twinbox beside rsync, lsyncd, syncthing and unison, on the same data in one run (root)")]
struct Options {
    /// Contenders [default: all that are installed]
    #[arg(long, value_delimiter = ',')]
    peers: Vec<Peer>,
    /// Workloads [default: all]
    #[arg(long, value_delimiter = ',')]
    workloads: Vec<Workload>,
    /// Rounds of each
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Size of the workloads, in parts of a hundred
    #[arg(long, default_value_t = 100)]
    percent: usize,
    /// Files in the store of the outage
    #[arg(long, default_value_t = 100_000)]
    files: usize,
    /// A long line in the cable's place: 10ms, 50ms (and one packet of a thousand lost) or 100mbit
    #[arg(long, value_name = "LINE")]
    line: Option<String>,
    /// Where stores and replicas lie [default: the system's temporary directory]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Where compare.json, compare.md and compare.svg (with --line: compare-LINE.…) are written
    #[arg(long, value_name = "DIR", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/results"))]
    out: PathBuf,
}

fn machine(dir: &Path, line: Option<&str>) -> String {
    let said = |program: &str, args: &[&str]| {
        let out = Command::new(program).args(args).output().ok()?;
        Some(String::from_utf8_lossy(&out.stdout).trim().to_owned())
    };
    let kernel = said("uname", &["-r"]).unwrap_or_default();
    let disk = said("stat", &["-f", "-c", "%T", &dir.display().to_string()]).unwrap_or_default();
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    let line = line.map_or(String::new(), |line| format!(", a line of {line}"));
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words = if words.is_empty() { String::new() } else { format!(" {}", words.join(" ")) };
    format!("{cpus} processors shared by both ends, Linux {kernel}, {disk}{line}; twinbox {}; just bench{words}", env!("CARGO_PKG_VERSION"))
}

/// A local copy of the store of the first sync: nobody can be faster who reads and writes every file.
fn copy(base: &Path, scale: Scale) -> anyhow::Result<f64> {
    let dir = tempfile::Builder::new().prefix("twinbox-compare-").tempdir_in(base)?;
    let source = dir.path().join("source");
    fs::create_dir(&source)?;
    Workload::FirstSync.prepare(&source, scale)?;
    rustix::fs::sync();
    let began = Instant::now();
    let status = Command::new("cp").arg("-a").arg(&source).arg(dir.path().join("copy")).status().context("cp")?;
    ensure!(status.success(), "cp: {status}");
    Ok(began.elapsed().as_secs_f64())
}

fn main() -> anyhow::Result<ExitCode> {
    let options = Options::parse();
    ensure!(options.rounds > 0 && options.percent > 0, "at least one round of one part in a hundred");
    ensure!(options.files >= 1_000, "--files: at least 1,000");
    let base = options.dir.clone().unwrap_or_else(std::env::temp_dir);
    let line = match &options.line {
        None => None,
        Some(name) => {
            let known = Line::ALL.into_iter().find(|(of, _)| of == name);
            Some(known.with_context(|| format!("--line {name}: not known; there are 10ms, 50ms and 100mbit"))?.1)
        }
    };
    let name = options.line.as_ref().map_or("compare".to_owned(), |line| format!("compare-{line}"));
    let workloads = if options.workloads.is_empty() { Workload::ALL.to_vec() } else { options.workloads.clone() };
    let mut peers = vec![];
    for peer in Peer::ALL.into_iter().filter(|peer| options.peers.is_empty() || options.peers.contains(peer)) {
        match peer.missing() {
            Some(why) => eprintln!("SKIPPED: {} is left out, it {why}", peer.name()),
            None => peers.push(peer),
        }
    }
    ensure!(!peers.is_empty(), "none of the contenders is installed");
    let scale = Scale { percent: options.percent, files: options.files };
    let mut results =
        Results { scale, rows: Default::default(), floor_ms: vec![], copy_s: vec![], machine: machine(&base, options.line.as_deref()) };
    let mut failed = false;
    for round in 0..options.rounds {
        results.floor_ms.push(floor(&base, 300)?.percentile(50).as_secs_f64() * 1e3);
        if workloads.contains(&Workload::FirstSync) {
            results.copy_s.push(copy(&base, scale)?);
        }
        for workload in &workloads {
            for turn in 0..peers.len() {
                let peer = peers[(turn + round) % peers.len()];
                if !workload.suits(peer) {
                    continue;
                }
                // What the one before left dirty must not be written back during this one.
                rustix::fs::sync();
                let began = Instant::now();
                let arena = Arena::new(&base, line)?;
                let done = workload.run(peer, &arena, scale);
                let rounds = results.rows.entry(*workload).or_default().entry(peer).or_default();
                let took = began.elapsed().as_secs_f64();
                match done {
                    Ok(figures) => {
                        eprintln!("round {}: {workload:?}, {}: {took:.0} s, {figures:.3?}", round + 1, peer.name());
                        rounds.done.push(figures);
                    }
                    Err(error) => {
                        eprintln!("round {}: {workload:?}, {}: FAILED after {took:.0} s: {error:#}", round + 1, peer.name());
                        failed |= peer == Peer::Twinbox;
                        rounds.failed.push(format!("{error:#}"));
                    }
                }
                fs::create_dir_all(&options.out)?;
                fs::write(options.out.join(format!("{name}.json")), serde_json::to_string_pretty(&results.json())? + "\n")?;
                fs::write(options.out.join(format!("{name}.md")), results.tables())?;
                fs::write(options.out.join(format!("{name}.svg")), svg(&results))?;
            }
        }
    }
    println!("{}", results.tables());
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
