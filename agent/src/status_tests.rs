//! Golden tests of the rendering, and of the JSON shape that scripts rely on.

use std::collections::BTreeMap;

use super::{
    AddressStatus, LastError, Lsns, MirrorState, MirrorStatus, PeerStatus, Pending, Rates, SCHEMA, Status, SyncProgress, Totals,
    Unreadable, Watches, render_status,
};
use crate::config::Role;
use crate::verify::VerifyStatus;

fn calm() -> Status {
    Status {
        schema: SCHEMA,
        node: "mail1".to_owned(),
        version: "0.1.0".to_owned(),
        pid: 4711,
        uptime_s: 273_600,
        mirrors: vec![MirrorStatus {
            name: "mail".to_owned(),
            role: Role::Primary,
            state: MirrorState::Protected,
            layout: "maildir".to_owned(),
            root: "/srv/mail".to_owned(),
            epoch: 1,
            generation: "0123456789abcdef0123456789abcdef".to_owned(),
            lsn: Lsns { captured: 905, durable: 902, applied: 901 },
            lag_ms: Some(4),
            bound_ms: Some(1012),
            pending: Pending { paths: 3, bytes: 12_288 },
            peers: vec![PeerStatus {
                node: "mail2".to_owned(),
                addresses: vec![AddressStatus { addr: "192.0.2.8:7440".to_owned(), connected: true, rtt_ms: Some(0.42), last_error: None }],
                connected: true,
                durable: Some(902),
                applied: Some(901),
                clock_skew_ms: Some(3),
                version: Some("0.1.0".to_owned()),
            }],
            rates: Rates { txns_per_s: 98.46, bytes_per_s: 2_000_000.0, wire_bytes_per_s: 900_000.0 },
            totals: Totals { wire_sent: 5 << 30, wire_received: 7 << 20, txns: 905, files: 1810 },
            watches: Watches { count: 1200, kernel_bytes: 1_300_000 },
            fuzzy_cuts: 0,
            unreadable: Unreadable::default(),
            lost_metadata: BTreeMap::new(),
            sync: None,
            last_error: None,
            unprotected_since: None,
            stalled: None,
            warnings: vec![],
            verify: None,
        }],
    }
}

#[test]
fn a_calm_night() {
    let expected = "\
mail1 · twinbox 0.1.0 · pid 4711 · up 3 d 4 h

mail · primary · PROTECTED
  standby is at LSN 902, at most 1.1 s behind, 3 changes pending (12 KiB)
  root     /srv/mail (maildir)
  lsn      captured 905, durable 902, applied 901 · epoch 1 · generation 01234567
  rate     98.5 txn/s, 1.9 MiB/s content, 879 KiB/s on the wire
  total    905 txns, 1810 files, 5.0 GiB sent, 7.0 MiB received
  watches  1200 (1.2 MiB of kernel memory)
  peer     mail2 connected · durable 902, applied 901
             192.0.2.8:7440 up, round trip 0.4 ms
";
    assert_eq!(render_status(&calm()), expected);
}

#[test]
fn verify_in_one_line() {
    let line = |running, ended: Option<&str>, paths, differences, left, eta_s| {
        let mut status = calm();
        let ended = ended.map(str::to_owned);
        let verify = VerifyStatus { running, began: String::new(), ended, paths, total: 1000, bytes: 1, differences, left, busy: 0, eta_s };
        status.mirrors[0].verify = Some(verify);
        let text = render_status(&status);
        text.lines().find(|line| line.contains("verify  ")).expect("a line").to_owned()
    };
    let end = Some("2026-11-30T03:00:00Z");
    assert_eq!(line(true, None, 250, 0, 0, Some(90)), "  verify   250 of 1000 paths, about 1 min 30 s left: no differences");
    assert_eq!(line(false, None, 250, 0, 0, None), "  verify   stopped after 250 of 1000 paths: no differences");
    assert_eq!(line(false, end, 1003, 0, 0, None), "  verify   1003 paths, through at 2026-11-30T03:00:00Z: no differences");
    assert_eq!(line(false, end, 1003, 2, 0, None), "  verify   1003 paths, through at 2026-11-30T03:00:00Z: 2 differences put right");
    assert_eq!(
        line(false, end, 1003, 2, 1, None),
        "! verify   1003 paths, through at 2026-11-30T03:00:00Z: 1 difference left: `twinbox verify --repair`"
    );
}

#[test]
fn a_bad_night() {
    let mut status = calm();
    let mirror = &mut status.mirrors[0];
    mirror.state = MirrorState::Unprotected;
    mirror.unprotected_since = Some("2025-03-01T02:03:04.000Z".to_owned());
    mirror.bound_ms = None;
    mirror.pending = Pending { paths: 1, bytes: 10 };
    mirror.peers[0].connected = false;
    mirror.peers[0].addresses[0].connected = false;
    mirror.peers[0].addresses[0].last_error = Some("connection refused".to_owned());
    mirror.peers[0].clock_skew_ms = Some(-2_500);
    mirror.peers[0].version = Some("0.2.0".to_owned());
    mirror.unreadable = Unreadable { count: 7, sample: vec!["alice/cur/\u{1b}[2Jx".to_owned()] };
    mirror.lost_metadata = BTreeMap::from([("ownership".to_owned(), 1)]);
    mirror.fuzzy_cuts = 2;
    mirror.last_error = Some(LastError { at: "2025-03-01T02:03:05.000Z".to_owned(), message: "no route to host".to_owned() });
    let expected = "\
mail1 · twinbox 0.1.0 · pid 4711 · up 3 d 4 h

mail · primary · UNPROTECTED since 2025-03-01T02:03:04.000Z
  standby is at LSN 902, how far behind is not known, 1 change pending (10 B)
! what changes now exists only here; bring the standby or the link back
  root     /srv/mail (maildir)
  lsn      captured 905, durable 902, applied 901 · epoch 1 · generation 01234567
  rate     98.5 txn/s, 1.9 MiB/s content, 879 KiB/s on the wire
  total    905 txns, 1810 files, 5.0 GiB sent, 7.0 MiB received
  watches  1200 (1.2 MiB of kernel memory)
! peer     mail2 NOT connected · durable 902, applied 901
!            192.0.2.8:7440 down: connection refused
! clock of mail2 is 2.5 s behind ours; check NTP on both
! mail2 runs twinbox 0.2.0, this node 0.1.0
! 7 files not readable, tried again: alice/cur/\\u{1b}[2Jx, …
! ownership not carried over on 1 path
! 2 cuts committed while a file was still changing
! last error, 2025-03-01T02:03:05.000Z: no route to host
";
    assert_eq!(render_status(&status), expected);
}

#[test]
fn a_first_sync_on_the_standby() {
    let mut status = calm();
    let mirror = &mut status.mirrors[0];
    mirror.role = Role::Standby;
    mirror.state = MirrorState::Syncing;
    mirror.pending = Pending::default();
    mirror.watches = Watches::default();
    mirror.peers.clear();
    mirror.sync = Some(SyncProgress {
        phase: "copying".to_owned(),
        files_done: 120,
        files_total: Some(1000),
        bytes_done: 3 << 20,
        bytes_total: Some(20 << 20),
        eta_s: Some(40),
    });
    let text = render_status(&status);
    for line in [
        "mail · standby · SYNCING",
        "  this standby is at LSN 902, at most 1.1 s behind, nothing pending",
        "! the standby is not complete yet and cannot take over",
        "  sync     copying: 120 of 1000 files, 3.0 MiB of 20 MiB, about 40 s left",
        "! no peer is paired: run `twinbox pair`",
    ] {
        assert!(text.lines().any(|found| found == line), "{line}\nis not in\n{text}");
    }
}

#[test]
fn the_json_shape_is_an_interface() {
    let status = calm();
    let value = serde_json::to_value(&status).expect("serializes");
    assert_eq!(value["schema"], 1);
    let mirror = &value["mirrors"][0];
    assert_eq!(mirror["role"], "primary");
    assert_eq!(mirror["state"], "protected");
    assert_eq!(mirror["lsn"]["durable"], 902);
    assert_eq!(mirror["pending"]["paths"], 3);
    assert_eq!(mirror["peers"][0]["addresses"][0]["addr"], "192.0.2.8:7440");
    assert!(mirror["sync"].is_null() && mirror["unprotected_since"].is_null(), "null, not absent");
    let mut keys: Vec<&str> = mirror.as_object().expect("an object").keys().map(String::as_str).collect();
    keys.sort_unstable();
    assert_eq!(
        keys,
        [
            "bound_ms",
            "epoch",
            "fuzzy_cuts",
            "generation",
            "lag_ms",
            "last_error",
            "layout",
            "lost_metadata",
            "lsn",
            "name",
            "peers",
            "pending",
            "rates",
            "role",
            "root",
            "stalled",
            "state",
            "sync",
            "totals",
            "unprotected_since",
            "unreadable",
            "verify",
            "warnings",
            "watches",
        ]
    );
    // A newer agent may say more.
    let mut newer = value.clone();
    newer["mirrors"][0]["quantum"] = true.into();
    assert_eq!(serde_json::from_value::<Status>(newer).expect("unknown fields are ignored"), status);
}

/// The document and the types name the same fields.
#[test]
fn every_field_is_documented() {
    fn names(value: &serde_json::Value, out: &mut Vec<String>) {
        match value {
            serde_json::Value::Object(fields) => {
                for (name, value) in fields {
                    out.push(name.clone());
                    names(value, out);
                }
            }
            serde_json::Value::Array(items) => items.iter().for_each(|item| names(item, out)),
            _ => {}
        }
    }
    let document = include_str!("../../docs/status.md");
    let mut status = calm();
    status.mirrors[0].sync =
        Some(SyncProgress { phase: "copying".to_owned(), files_done: 0, files_total: None, bytes_done: 0, bytes_total: None, eta_s: None });
    status.mirrors[0].last_error = Some(LastError { at: String::new(), message: String::new() });
    let mut fields = Vec::new();
    names(&serde_json::to_value(status).expect("serializes"), &mut fields);
    for field in fields {
        assert!(document.contains(&format!("`{field}`")), "docs/status.md does not explain `{field}`");
    }
}
