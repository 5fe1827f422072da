//! A real Dovecot, mirrored live: at rest the trees are identical, and a Dovecot on the replica shows every message, flag and UID.
//!
//! Size: `TWINBOX_TEST_SCALE` scales the 1,000 messages; the 20 users stay.

use std::time::Duration;

use twinbox_tests::dovecot::{self, Dovecot, differences};
use twinbox_tests::gate::{Need, heavy, scaled};
use twinbox_tests::live::Live;
use twinbox_tests::mailload::{self, Load};
use twinbox_tests::require;
use twinbox_tests::rng::Seed;
use twinbox_tests::scratch::Scratch;
use twinbox_tests::tree::Layout;

fn mirrored(layout: Layout) {
    let _turn = heavy();
    let seed = Seed::from_env();
    let scratch = Scratch::new(layout.name());
    let root = dovecot::store(&scratch, "store");
    let replica = scratch.join("replica");
    let users = dovecot::users(20);

    let mut mirror = Live::start(&root, &replica, scratch.path(), layout);
    let server = Dovecot::start(&root, layout);
    let load = Load::new(scaled(1_000).max(100), users.len(), seed.0);
    let done = mailload::run(&server, load).unwrap_or_else(|e| panic!("load: {e}"));
    eprintln!("{}: {done:?}", layout.name());
    done.assert_varied();

    let shown = server.dump(&users);
    assert_eq!(server.complaints(), Vec::<String>::new(), "the primary's Dovecot complains");
    server.stop();
    mirror.settle("after the load", Duration::from_secs(60));
    mirror.stop();

    let standby = Dovecot::start(&replica, layout);
    let lost = differences(&shown, &standby.dump(&users));
    assert!(lost.is_empty(), "Dovecot on the replica differs:\n{}", lost.join("\n"));
    assert_eq!(standby.complaints(), Vec::<String>::new(), "the replica's Dovecot complains");
    standby.stop();
}

#[test]
fn maildir() {
    require!(Need::Dovecot);
    mirrored(Layout::Maildir);
}

#[test]
fn sdbox() {
    require!(Need::Dovecot);
    mirrored(Layout::Sdbox);
}

#[test]
fn mdbox() {
    require!(Need::Dovecot);
    mirrored(Layout::Mdbox);
}

#[test]
fn mbox() {
    require!(Need::Dovecot);
    mirrored(Layout::Mbox);
}
