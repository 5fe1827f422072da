//! [`Status`] as text for a person: one block a mirror, the bound first, then what is needed to judge it, then what is wrong.
//!
//! Lines that need attention begin with `!`. Nothing from outside reaches the terminal unescaped.

use std::fmt::Write;
use std::time::Duration;

use super::{MirrorState, MirrorStatus, PeerStatus, Status, bytes_text, span_text};
use crate::config::Role;

/// Clocks further apart than this are reported.
const SKEW_MS_MAX: u64 = 1_000;

/// The text shown by `twinbox status`; ends with a newline.
#[must_use]
pub fn render_status(status: &Status) -> String {
    let mut out = format!(
        "{} · twinbox {} · pid {} · up {}\n",
        plain(&status.node),
        plain(&status.version),
        status.pid,
        span_text(Duration::from_secs(status.uptime_s)),
    );
    for mirror in &status.mirrors {
        out.push('\n');
        for line in mirror_lines(mirror, &status.version) {
            let _ = writeln!(out, "{line}");
        }
    }
    out
}

fn mirror_lines(mirror: &MirrorStatus, own_version: &str) -> Vec<String> {
    let since = match &mirror.unprotected_since {
        Some(since) if mirror.state == MirrorState::Unprotected => format!(" since {}", plain(since)),
        _ => String::new(),
    };
    let state = match mirror.state {
        MirrorState::Syncing => "SYNCING",
        MirrorState::Protected => "PROTECTED",
        MirrorState::Unprotected => "UNPROTECTED",
        MirrorState::Diverged => "DIVERGED",
    };
    let mut lines = vec![format!("{} · {} · {state}{since}", plain(&mirror.name), mirror.role), format!("  {}", bound(mirror))];
    let advice = match mirror.state {
        MirrorState::Unprotected if mirror.role == Role::Primary => {
            Some("what changes now exists only here; bring the standby or the link back")
        }
        MirrorState::Unprotected => Some("the primary is out of reach; this copy is consistent but grows old"),
        MirrorState::Diverged => Some("two nodes accepted changes apart; nothing is replicated until a person chooses"),
        MirrorState::Syncing => Some("the standby is not complete yet and cannot take over"),
        MirrorState::Protected => None,
    };
    if let Some(stalled) = &mirror.stalled {
        lines.push(format!("! stalled for {} in stage {}", span_text(Duration::from_millis(stalled.for_ms)), plain(&stalled.stage)));
    }
    lines.extend(advice.map(|advice| format!("! {advice}")));
    lines.extend(sync_line(mirror));
    lines.push(format!("  root     {} ({})", plain(&mirror.root), plain(&mirror.layout)));
    let lsn = mirror.lsn;
    lines.push(format!(
        "  lsn      captured {}, durable {}, applied {} · epoch {} · generation {}",
        lsn.captured,
        lsn.durable,
        lsn.applied,
        mirror.epoch,
        plain(mirror.generation.get(..8).unwrap_or(&mirror.generation)),
    ));
    lines.push(format!(
        "  rate     {:.1} txn/s, {}/s content, {}/s on the wire",
        mirror.rates.txns_per_s,
        bytes_text(mirror.rates.bytes_per_s as u64),
        bytes_text(mirror.rates.wire_bytes_per_s as u64),
    ));
    let totals = mirror.totals;
    lines.push(format!(
        "  total    {} txns, {} files, {} sent, {} received",
        totals.txns,
        totals.files,
        bytes_text(totals.wire_sent),
        bytes_text(totals.wire_received),
    ));
    lines.extend(verify_line(mirror));
    if mirror.watches.count > 0 {
        lines.push(format!("  watches  {} ({} of kernel memory)", mirror.watches.count, bytes_text(mirror.watches.kernel_bytes),));
    }
    if mirror.peers.is_empty() {
        lines.push("! no peer is paired: run `twinbox pair`".to_owned());
    }
    for peer in &mirror.peers {
        peer_lines(&mut lines, peer, own_version);
    }
    trouble(&mut lines, mirror);
    lines
}

/// The promise of the whole system in one sentence.
fn bound(mirror: &MirrorStatus) -> String {
    let who = match mirror.role {
        Role::Primary => "standby",
        Role::Standby => "this standby",
    };
    let behind = match mirror.bound_ms {
        Some(bound) => format!("at most {} behind", span_text(Duration::from_millis(bound))),
        None => "how far behind is not known".to_owned(),
    };
    let pending = match mirror.pending {
        pending if pending.paths == 0 => "nothing pending".to_owned(),
        pending => {
            format!("{} change{} pending ({})", pending.paths, if pending.paths == 1 { "" } else { "s" }, bytes_text(pending.bytes),)
        }
    };
    format!("{who} is at LSN {}, {behind}, {pending}", mirror.lsn.durable)
}

fn sync_line(mirror: &MirrorStatus) -> Option<String> {
    let sync = mirror.sync.as_ref()?;
    let of = |total: Option<String>| total.map(|total| format!(" of {total}")).unwrap_or_default();
    Some(format!(
        "  sync     {}: {}{} files, {}{}{}",
        plain(&sync.phase),
        sync.files_done,
        of(sync.files_total.map(|total| total.to_string())),
        bytes_text(sync.bytes_done),
        of(sync.bytes_total.map(bytes_text)),
        sync.eta_s.map(|eta| format!(", about {} left", span_text(Duration::from_secs(eta)))).unwrap_or_default(),
    ))
}

fn verify_line(mirror: &MirrorStatus) -> Option<String> {
    let verify = mirror.verify.as_ref()?;
    let mark = if verify.left > 0 { '!' } else { ' ' };
    let found = match (verify.differences, verify.left) {
        (0, _) => "no differences".to_owned(),
        (some, 0) => format!("{} put right", count(some, "difference")),
        (_, left) => format!("{} left: `twinbox verify --repair`", count(left, "difference")),
    };
    let eta = verify.eta_s.map(|eta| format!(", about {} left", span_text(Duration::from_secs(eta)))).unwrap_or_default();
    let how = match (&verify.ended, verify.running) {
        (Some(ended), _) => format!("{} paths, through at {}", verify.paths, plain(ended)),
        (None, true) => format!("{} of {} paths{eta}", verify.paths, verify.total),
        (None, false) => format!("stopped after {} of {} paths", verify.paths, verify.total),
    };
    let busy = if verify.busy > 0 { format!("; {} changed at every look", count(verify.busy, "path")) } else { String::new() };
    Some(format!("{mark} verify   {how}: {found}{busy}"))
}

fn peer_lines(lines: &mut Vec<String>, peer: &PeerStatus, own_version: &str) {
    let node = plain(&peer.node);
    let lsn = |lsn: Option<u64>| lsn.map_or_else(|| "?".to_owned(), |lsn| lsn.to_string());
    lines.push(format!(
        "{} peer     {node} {} · durable {}, applied {}",
        if peer.connected { " " } else { "!" },
        if peer.connected { "connected" } else { "NOT connected" },
        lsn(peer.durable),
        lsn(peer.applied),
    ));
    for address in &peer.addresses {
        let error = address.last_error.as_deref().map(plain);
        let health = match (address.connected, address.rtt_ms) {
            (true, Some(rtt)) => format!("up, round trip {rtt:.1} ms"),
            (true, None) => "up".to_owned(),
            (false, _) => format!("down: {}", error.as_deref().unwrap_or("no answer")),
        };
        let mark = if address.connected { ' ' } else { '!' };
        lines.push(format!("{mark}            {} {health}", plain(&address.addr)));
    }
    if let Some(skew) = peer.clock_skew_ms.filter(|skew| skew.unsigned_abs() > SKEW_MS_MAX) {
        let direction = if skew > 0 { "ahead of" } else { "behind" };
        let skew = span_text(Duration::from_millis(skew.unsigned_abs()));
        lines.push(format!("! clock of {node} is {skew} {direction} ours; check NTP on both"));
    }
    if let Some(version) = peer.version.as_deref().filter(|version| *version != own_version) {
        lines.push(format!("! {node} runs twinbox {}, this node {}", plain(version), plain(own_version)));
    }
}

fn trouble(lines: &mut Vec<String>, mirror: &MirrorStatus) {
    let unreadable = &mirror.unreadable;
    if unreadable.count > 0 {
        let sample: Vec<String> = unreadable.sample.iter().take(3).map(|path| plain(path)).collect();
        let more = if unreadable.count > sample.len() as u64 { ", …" } else { "" };
        lines.push(format!("! {} not readable, tried again: {}{more}", count(unreadable.count, "file"), sample.join(", "),));
    }
    for (kind, paths) in mirror.lost_metadata.iter().filter(|(_, paths)| **paths > 0) {
        lines.push(format!("! {} not carried over on {}", plain(kind), count(*paths, "path")));
    }
    for warning in &mirror.warnings {
        lines.push(format!("! {}", plain(warning)));
    }
    if mirror.fuzzy_cuts > 0 {
        lines.push(format!("! {} committed while a file was still changing", count(mirror.fuzzy_cuts, "cut")));
    }
    if let Some(error) = &mirror.last_error {
        lines.push(format!("! last error, {}: {}", plain(&error.at), plain(&error.message)));
    }
}

fn count(number: u64, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

/// Text from outside, made harmless for a terminal: control characters are escaped, everything else stays.
fn plain(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for letter in text.chars() {
        if letter.is_control() {
            safe.extend(letter.escape_default());
        } else {
            safe.push(letter);
        }
    }
    safe
}
