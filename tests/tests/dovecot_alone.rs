//! The mail harness by itself: a load on a real Dovecot, the store copied with `rsync`, a second Dovecot on the copy: both must show
//! the same. Then one planted loss must show.

use std::fs;
use std::path::Path;
use std::process::Command;

use twinbox_tests::dovecot::{self, Dovecot, differences};
use twinbox_tests::gate::{Need, heavy};
use twinbox_tests::mailload::{self, Load};
use twinbox_tests::require;
use twinbox_tests::rng::Seed;
use twinbox_tests::scratch::Scratch;
use twinbox_tests::tree::{Layout, Rules, assert_identical};

#[test]
fn a_copied_store_shows_the_same() {
    require!(Need::Dovecot, Need::Program("rsync"));
    let _turn = heavy();
    let seed = Seed::from_env();
    for layout in Layout::MAIL {
        let scratch = Scratch::new("dovecot-alone");
        let root = dovecot::store(&scratch, "store");
        let copy = scratch.join("copy");
        let users = dovecot::users(6);
        let primary = Dovecot::start(&root, layout);
        let done = mailload::run(&primary, Load::new(150, users.len(), seed.0)).unwrap_or_else(|e| panic!("{}: {e}", layout.name()));
        done.assert_varied();
        let before = primary.dump(&users);
        assert_eq!(primary.complaints(), Vec::<String>::new());
        primary.stop();
        let from = format!("{}/", root.display());
        let status = Command::new("rsync").args(["-aHAX", &from]).arg(&copy).status();
        assert!(status.unwrap().success());
        assert_identical(&root, &copy, Rules::of(layout));
        let replica = Dovecot::start(&copy, layout);
        assert_eq!(differences(&before, &replica.dump(&users)), Vec::<String>::new());
        replica.stop();

        let lost = largest(&copy);
        fs::write(&lost, b"From nobody\r\n\r\ngone\r\n").unwrap();
        let replica = Dovecot::start(&copy, layout);
        let shown = std::panic::catch_unwind(|| replica.dump(&users));
        assert!(
            shown.map_or(true, |dump| !differences(&before, &dump).is_empty()),
            "{}: a destroyed {} does not show",
            layout.name(),
            lost.display()
        );
    }
}

/// The largest file, which holds mail in every format.
fn largest(dir: &Path) -> std::path::PathBuf {
    let mut found = (0, dir.to_owned());
    let mut todo = vec![dir.to_owned()];
    while let Some(dir) = todo.pop() {
        for item in fs::read_dir(dir).unwrap() {
            let item = item.unwrap();
            let meta = item.metadata().unwrap();
            if meta.is_dir() {
                todo.push(item.path());
            } else if meta.len() > found.0 && !item.file_name().to_string_lossy().starts_with("dovecot") {
                found = (meta.len(), item.path());
            }
        }
    }
    found.1
}
