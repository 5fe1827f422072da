//! Adversarial writers, and a standby that is killed under them. The long run: `cargo run -p twinbox-tests --bin adversary`.

use std::time::Duration;

use twinbox_tests::adversary::Sizes;
use twinbox_tests::besieged;
use twinbox_tests::gate::{Need, heavy};
use twinbox_tests::require;
use twinbox_tests::tree::Layout;

#[test]
fn no_state_that_never_was() {
    require!(Need::Namespaces);
    let _turn = heavy();
    let sizes = Sizes { between: 2 << 20, large: 4 << 20 };
    let seen = besieged::run(Duration::from_secs(30), 8, sizes);
    eprintln!("{seen:?}");
    // A replica that stands still would pass every check.
    let fresh = |name: &str| seen.fresh.get(name).copied().unwrap_or(0);
    for name in ["pairs", "between", "small single", "small split", "bank", "bank, journal"] {
        assert!(fresh(name) >= 2, "{name} hardly ever arrived: {seen:?}");
    }
}

/// Recovered replicas must have moved on in between, or the checks show nothing.
fn mail(layout: Layout) {
    require!(Need::Namespaces, Need::Dovecot);
    let _turn = heavy();
    let besieged::Mail { shown, .. } = besieged::mail(layout, Duration::from_secs(20), 4, 0);
    eprintln!("{}: messages shown after each kill: {shown:?}", layout.name());
    assert!(shown.windows(2).filter(|pair| pair[0] != pair[1]).count() >= 2, "{shown:?}");
}

#[test]
fn dovecot_finds_each_recovered_replica_sound_maildir() {
    mail(Layout::Maildir);
}

#[test]
fn dovecot_finds_each_recovered_replica_sound_mdbox() {
    mail(Layout::Mdbox);
}
