//! Power cuts of the standby under load, on ext4 and XFS. `power_cuts --cuts 200` is the long form.

use twinbox_tests::disk::Format;
use twinbox_tests::gate::{Need, full, heavy};
use twinbox_tests::powercut;
use twinbox_tests::require;
use twinbox_tests::rng::Seed;

fn cuts(format: Format) {
    require!(Need::Root, Need::Program("mkfs.ext4"), Need::Program("mkfs.xfs"));
    let _turn = heavy();
    let seed = Seed::from_env();
    powercut::run(format, if full() { 100 } else { 10 }, seed.0);
}

#[test]
fn the_standby_keeps_what_it_acknowledged_on_ext4() {
    cuts(Format::Ext4);
}

#[test]
fn the_standby_keeps_what_it_acknowledged_on_xfs() {
    cuts(Format::Xfs);
}
