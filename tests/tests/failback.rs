//! An old primary comes back with a tail: what it has alone is merged into the new one, or kept, and it is a standby in sync.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;
use twinbox_tests::failback::{Site, TAIL, count};
use twinbox_tests::gate::{Need, full, heavy, nap_until, wait_until};
use twinbox_tests::require;
use twinbox_tests::rng::{Rng, Seed};
use twinbox_tests::tree::{Layout, Rules, assert_identical};
use twinbox_tests::world::{LIMIT, REFUSED, World};

/// `alpha` was cut off, has gone on alone by `tail`, and died; `beta` was promoted and has gone on by `after`; `alpha` is back, and has stepped down.
fn failed_back(name: &str, tail: impl FnOnce(&Path), after: impl FnOnce(&Path)) -> World {
    let mut world = World::new(name);
    world.nodes[1].kill9();
    world.nodes[0].wait_state(LIMIT, "unprotected");
    let generation = world.said(0).generation;
    tail(&world.trees[0].join("anna/Maildir"));
    wait_until(LIMIT, "a history of its own", || world.said(0).generation != generation);
    world.nodes[0].kill9();
    world.nodes[1].start();
    wait_until(LIMIT, "beta to answer", || world.nodes[1].status().is_some());
    world.ok(1, &["promote"]);
    after(&world.trees[1].join("anna/Maildir"));
    world.nodes[0].start();
    wait_until(LIMIT, "alpha to step down", || {
        world.nodes[0]
            .status()
            .is_some_and(|s| (s.said.mirrors[0].role.as_str(), s.said.mirrors[0].state.as_str()) == ("standby", "diverged"))
    });
    world
}

fn deliver(maildir: &Path, name: &str, text: &str) {
    fs::write(maildir.join("tmp/x"), text).unwrap();
    fs::rename(maildir.join("tmp/x"), maildir.join(name)).unwrap();
}

fn rename(maildir: &Path, from: &str, to: &str) {
    fs::rename(maildir.join(from), maildir.join(to)).unwrap();
}

fn json(world: &World, words: &[&str]) -> Value {
    let ended = world.nodes[0].command(words);
    assert!(ended.status.success(), "{words:?}: {}", ended.stderr);
    serde_json::from_str(&ended.stdout).unwrap()
}

/// `what: path: outcome` of each item.
fn items(shown: &Value) -> Vec<String> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let item = |item: &Value| format!("{}: {}: {}", text(&item["what"]), text(&item["path"]), text(&item["outcome"]));
    shown["items"].as_array().unwrap().iter().map(item).collect()
}

#[test]
fn failback_merges_what_only_the_old_primary_has() {
    let _turn = heavy();
    let world = failed_back(
        "failback",
        |alpha| {
            deliver(alpha, "new/tail", "only on alpha");
            deliver(alpha, "cur/seen:2,S", "only on alpha, and read");
            rename(alpha, "new/4", "cur/4:2,FS");
            rename(alpha, "new/5", "cur/5:2,S");
            rename(alpha, "new/7", "cur/7:2,");
            fs::remove_file(alpha.join("new/6")).unwrap();
            rename(alpha, ".Sent", ".Old");
            deliver(alpha, ".Old/cur/late:2,S", "into the renamed folder");
            fs::create_dir_all(alpha.join(".New/cur")).unwrap();
            fs::create_dir_all(alpha.join(".New/new")).unwrap();
            fs::create_dir_all(alpha.join(".New/tmp")).unwrap();
            deliver(alpha, ".New/new/first", "into a new folder");
            fs::write(alpha.join("sieve"), "keep;").unwrap();
            fs::write(alpha.join("new/1"), "changed on alpha").unwrap();
            fs::write(alpha.join("dovecot.index.log"), "alpha's").unwrap();
        },
        |beta| {
            deliver(beta, "new/after", "only on beta");
            rename(beta, "new/5", "cur/5:2,R");
            fs::write(beta.join("new/1"), "changed on beta").unwrap();
            fs::write(beta.join("dovecot.index.log"), "beta's").unwrap();
            fs::remove_file(beta.join("new/8")).unwrap();
        },
    );
    let plan = json(&world, &["resync", "plan", "--json"]);
    let expected = [
        "message: anna/Maildir/.New/new/first: merge",
        "message: anna/Maildir/.Old/cur/late:2,S: merge",
        "message: anna/Maildir/cur/seen:2,S: merge",
        "message: anna/Maildir/new/tail: merge",
        "flags: anna/Maildir/cur/4:2,FS: merge",
        "flags: anna/Maildir/cur/5:2,S: merge",
        "deletion: anna/Maildir/new/6: stays",
        "folder: anna/Maildir/.New: merge",
        "folder-move: anna/Maildir/.Old: merge",
        "file: anna/Maildir/new/1: rescue",
        "file: anna/Maildir/sieve: rescue",
    ];
    assert_eq!(items(&plan), expected);
    assert_eq!((&plan["done"], world.holds(1, "new/tail")), (&Value::Bool(false), None), "a plan changes nothing");
    assert!(plan["theirs"].as_array().unwrap().iter().all(|n| n.as_u64() >= Some(1)), "{plan}");

    let done = json(&world, &["resync", "apply", "--json"]);
    assert_eq!(items(&done), expected);
    world.in_sync();
    assert_identical(&world.trees[0], &world.trees[1], Rules::of(Layout::Maildir));
    assert_eq!((world.said(0).role.as_str(), world.said(1).role.as_str()), ("standby", "primary"));
    for (name, text) in [
        ("new/tail", "only on alpha"),
        ("cur/seen:2,S", "only on alpha, and read"),
        ("cur/4:2,FS", "message 4"),
        ("cur/5:2,RS", "message 5"),
        ("new/6", "message 6"),
        (".Old/cur/3:2,", "message 3"),
        (".Old/cur/late:2,S", "into the renamed folder"),
        (".New/new/first", "into a new folder"),
        ("new/after", "only on beta"),
        ("new/1", "changed on beta"),
        ("dovecot.index.log", "beta's"),
    ] {
        assert_eq!(world.holds(1, name).as_deref(), Some(text), "{name}");
    }
    assert_eq!((world.holds(1, "new/8"), world.holds(1, "sieve"), world.holds(1, ".Sent/cur/3:2,")), (None, None, None));
    let rescued: Vec<(String, String)> = world.rescued(0);
    let rescued: Vec<(&str, &str)> = rescued.iter().map(|(name, content)| (name.as_str(), content.as_str())).collect();
    assert_eq!(rescued, [("1", "changed on alpha"), ("dovecot.index.log", "alpha's"), ("sieve", "keep;")]);
    assert_eq!(world.rescued(1), []);
    let report = fs::read_to_string(done["report"].as_str().unwrap()).unwrap();
    for line in ["On `alpha` alone: 11 things.", "4 messages that came: 4 merged into `beta`", "2 of them need a person"] {
        assert!(report.contains(line), "{line}:\n{report}");
    }
    world.refused(0, &["resync", "apply"], "nothing to resync");

    // What was kept is given back to the one that is primary, and never over anything.
    let listed = json(&world, &["rescue", "list", "--json"]);
    let entry = |end: &str| {
        let mut all = listed["kept"].as_array().unwrap().iter().map(|one| one["entry"].as_str().unwrap().to_owned());
        all.find(|entry| entry.ends_with(end)).unwrap()
    };
    let (sieve, message) = (entry("/sieve"), entry("/new/1"));
    assert_eq!(world.nodes[0].command(&["rescue", "show", &sieve]).ok("show").stdout, "keep;");
    for said in ["given back", "is there already"] {
        assert!(world.nodes[0].command(&["rescue", "restore", &sieve]).ok("restore").stdout.contains(said));
    }
    wait_until(LIMIT, "the file to be on both", || (0..2).all(|node| world.holds(node, "sieve").as_deref() == Some("keep;")));
    world.refused(0, &["rescue", "redeliver", &message], "1 of 1 stay in rescue");
    fs::remove_file(world.trees[1].join("anna/Maildir/new/1")).unwrap();
    world.ok(0, &["rescue", "redeliver", "--all"]);
    assert_eq!(world.holds(1, "new/1").as_deref(), Some("changed on alpha"));
    world.in_sync();
    assert_eq!(world.rescued(0).len(), 3, "it stays there until it is purged");
    world.ok(0, &["rescue", "purge", "--older-than", "1d"]);
    assert_eq!(world.rescued(0).len(), 3);
    world.ok(0, &["rescue", "purge", "--older-than", "0s"]);
    assert_eq!(world.rescued(0), []);
    for outside in ["mail/../../state.db", "other/1-drift/x", "mail/1-drift/../../../node.key", "mail//x"] {
        assert_eq!(world.nodes[0].command(&["rescue", "show", outside]).status.code(), Some(2), "{outside}");
    }

    // And back.
    world.switch_back();
}

/// Both were promoted while they did not see each other, and both took mail.
#[test]
fn failback_of_two_that_were_promoted_apart_wants_a_winner() {
    let _turn = heavy();
    let mut world = World::new("split");
    world.ok(0, &["demote"]);
    for node in 0..2 {
        world.nodes[1 - node].kill9();
        if node == 1 {
            world.nodes[1].start();
        }
        wait_until(LIMIT, "the agent to know that it is alone", || {
            world.nodes[node].status().is_some_and(|s| s.said.mirrors[0].peers.iter().all(|peer| !peer.connected))
        });
        world.ok(node, &["promote"]);
        world.deliver(node, &format!("new/on {node}"), "alone");
        let generation = world.said(node).generation;
        wait_until(LIMIT, "a history of its own", || world.said(node).epoch == 2 || world.said(node).generation != generation);
    }
    world.nodes[0].start();
    world.nodes[0].wait_state(LIMIT, "diverged");
    assert_eq!((world.said(0).role.as_str(), world.said(1).role.as_str()), ("primary", "primary"), "nobody can tell");
    world.refused(0, &["resync", "plan"], "--winner");
    world.refused(0, &["resync", "plan", "--winner", "alpha"], "run this command on the other one");
    let misspelt = world.nodes[0].command(&["resync", "apply", "--winner", "gamma"]);
    assert_eq!(misspelt.status.code(), Some(16), "{}", misspelt.stderr);
    assert_eq!(world.said(0).role, "primary", "nothing was given up for a node that there is not");
    let plan = json(&world, &["resync", "plan", "--winner", "beta", "--json"]);
    assert_eq!(items(&plan), ["message: anna/Maildir/new/on 0: merge"]);
    world.ok(0, &["resync", "apply", "--winner", "beta"]);
    world.in_sync();
    for node in 0..2 {
        assert_eq!((world.holds(node, "new/on 0").as_deref(), world.holds(node, "new/on 1").as_deref()), (Some("alone"), Some("alone")));
        assert_eq!(world.rescued(node), []);
    }
}

/// Files of a store, by path; the mail server's none here.
fn files(root: &Path) -> BTreeMap<PathBuf, String> {
    let (mut all, mut stack) = (BTreeMap::new(), vec![root.to_owned()]);
    while let Some(dir) = stack.pop() {
        for item in fs::read_dir(&dir).into_iter().flatten().flatten() {
            if item.file_type().unwrap().is_dir() {
                stack.push(item.path());
            } else {
                all.insert(item.path().strip_prefix(root).unwrap().to_owned(), fs::read_to_string(item.path()).unwrap());
            }
        }
    }
    all
}

#[test]
fn failback_killed_at_any_moment_comes_to_the_same() {
    let _turn = heavy();
    let (wanted, mut rng) = (if full() { 100 } else { 6 }, Rng::part(Seed::from_env().0, 812));
    let (mut kills, mut first) = (0, None);
    while kills < wanted {
        let mut world = failed_back(
            "killed",
            |alpha| {
                for n in 0..120 {
                    deliver(alpha, &format!("new/tail {n}"), &format!("only on alpha {n}"));
                }
                rename(alpha, "new/4", "cur/4:2,FS");
                rename(alpha, ".Sent", ".Old");
                fs::remove_file(alpha.join("new/6")).unwrap();
                (0..40).for_each(|n| fs::write(alpha.join(format!("file {n}")), format!("alpha's {n}")).unwrap());
            },
            |beta| deliver(beta, "new/after", "only on beta"),
        );
        loop {
            let nodes = &mut world.nodes;
            let after = Instant::now() + Duration::from_micros(rng.below(400_000) as u64);
            let (program, logs, config) = (nodes[0].program.clone(), nodes[0].logs.clone(), nodes[0].config.clone());
            let apply = std::thread::spawn(move || {
                let words = ["resync", "apply", "--json", "--config"].map(std::ffi::OsString::from);
                program.run("apply", &logs, words.into_iter().chain([config.into()]).collect::<Vec<_>>())
            });
            nap_until(after);
            if kills < wanted && !apply.is_finished() {
                kills += 1;
                nodes[0].kill9();
                nodes[0].start();
                let _ = apply.join().unwrap(); // Cut off, or through just before.
                wait_until(LIMIT, "alpha to answer", || nodes[0].status().is_some());
                continue;
            }
            let ended = apply.join().unwrap();
            // One that was killed after its last step has nothing left to do.
            let through = ended.status.code() == Some(REFUSED) && ended.stderr.contains("nothing to resync");
            assert!(ended.status.success() || through, "{}", ended.stderr);
            break;
        }
        world.in_sync();
        let came_to = (files(&world.trees[1]), world.rescued(0), world.rescued(1));
        assert_eq!((came_to.1.len(), came_to.0.len()), (40, 21 + 120 + 1), "{came_to:?}");
        assert_eq!(*first.get_or_insert_with(|| came_to.clone()), came_to);
    }
    eprintln!("{kills} kills");
}

/// The whole story with Dovecot.
fn with_dovecot(layout: Layout) {
    require!(Need::Namespaces, Need::Dovecot);
    let _turn = heavy();
    let outage = Duration::from_secs(if full() { 60 } else { 3 });
    let done = Site::new(layout).run(outage, |_| {}).unwrap();
    let counted = count(&done);
    let counted: Vec<u64> =
        ["message", "flags", "deletion", "folder-move"].iter().map(|what| counted.get(*what).copied().unwrap_or(0)).collect();
    assert_eq!(counted, TAIL, "{done:#}");
    assert_eq!(done["items"].as_array().unwrap().len() as u64, TAIL.iter().sum::<u64>(), "{done:#}");
}

#[test]
fn failback_maildir() {
    with_dovecot(Layout::Maildir);
}

#[test]
fn failback_sdbox() {
    with_dovecot(Layout::Sdbox);
}

#[test]
fn failback_mdbox() {
    with_dovecot(Layout::Mdbox);
}

#[test]
fn failback_mbox() {
    with_dovecot(Layout::Mbox);
}

/// More than the tail of the others, and each message once all the same.
#[test]
fn failback_of_what_is_easily_got_wrong() {
    require!(Need::Namespaces, Need::Dovecot);
    let _turn = heavy();
    // A folder that another one took the name of: where each message has a file, they are moved; mdbox leaves them.
    let all = [(Layout::Mdbox, 2), (Layout::Mbox, 1), (Layout::Sdbox, 3), (Layout::Maildir, 3)];
    for (layout, moves) in all.into_iter().take(if full() { 4 } else { 2 }) {
        let done = Site::awkward(layout).run(Duration::from_secs(3), |_| {}).unwrap();
        let counted = count(&done);
        assert_eq!(counted.get("move"), Some(&moves), "{layout:?}: {done:#}");
    }
}
