//! Roles that change: a clean switch there and back, an old primary that comes back with a tail, two primaries at once. Real agents on loopback.

use std::fs;

use twinbox_tests::gate::{heavy, wait_until};
use twinbox_tests::tree::{Layout, Rules, assert_identical};
use twinbox_tests::world::{LIMIT, World};

#[test]
fn a_switch_there_and_back_loses_nothing() {
    let _turn = heavy();
    let world = World::new("switch");
    world.refused(1, &["promote"], "alive and connected");
    world.refused(0, &["promote"], "is its primary already");
    world.refused(1, &["demote"], "is its standby already");
    world.refused(0, &["promote", "--mirror", "male"], "no mirror of that name");
    let before = world.said(0).generation;

    world.ok(0, &["demote"]);
    assert_eq!((world.said(0).role.as_str(), world.said(1).role.as_str()), ("standby", "standby"));
    world.ok(1, &["promote"]);
    assert_eq!((world.said(1).role.as_str(), world.said(1).epoch), ("primary", 2));
    world.deliver(1, "new/on beta", "written on beta");
    fs::rename(world.trees[1].join("anna/Maildir/.Sent"), world.trees[1].join("anna/Maildir/.Gone")).unwrap();
    world.in_sync();
    assert_eq!(world.holds(0, "new/on beta").as_deref(), Some("written on beta"));
    let after = world.said(1).generation;
    assert_ne!(before, after, "what is written after a promotion is another history");
    assert_eq!(world.said(0).generation, after);

    world.ok(1, &["demote"]);
    world.ok(0, &["promote"]);
    assert_eq!(world.said(0).epoch, 3);
    world.deliver(0, "new/back on alpha", "written on alpha");
    world.in_sync();
    assert_eq!(world.holds(1, "new/back on alpha").as_deref(), Some("written on alpha"));
    assert_identical(&world.trees[0], &world.trees[1], Rules::of(Layout::Maildir));
    for node in 0..2 {
        assert_eq!(world.rescued(node), [], "nobody lost anything");
    }
}

#[test]
fn an_old_primary_that_comes_back_loses_nothing_of_its_tail() {
    comes_back(false);
}

/// Then it would be healed first, and its standby is none any more.
#[test]
fn nor_does_one_whose_machine_lost_power() {
    comes_back(true);
}

fn comes_back(power_cut: bool) {
    let _turn = heavy();
    let mut world = World::new("tail");
    world.nodes[1].kill9();
    world.nodes[0].wait_state(LIMIT, "unprotected");
    // What nobody else has.
    let generation = world.said(0).generation;
    world.deliver(0, "new/tail", "only on alpha");
    fs::write(world.trees[0].join("anna/Maildir/new/1"), "changed on alpha").unwrap();
    fs::remove_file(world.trees[0].join("anna/Maildir/new/2")).unwrap();
    wait_until(LIMIT, "a history of its own", || world.said(0).generation != generation);
    world.refused(0, &["demote"], "no standby follows");
    world.nodes[0].kill9();

    world.nodes[1].start();
    wait_until(LIMIT, "beta to answer", || world.nodes[1].status().is_some());
    world.ok(1, &["promote"]);
    world.deliver(1, "new/after", "only on beta");
    fs::write(world.trees[1].join("anna/Maildir/new/1"), "changed on beta").unwrap();
    for expunged in ["new/3", ".Sent/cur/3:2,"] {
        fs::remove_file(world.trees[1].join("anna/Maildir").join(expunged)).unwrap();
    }

    // It is back, and knows nothing: neither touches the other.
    if power_cut {
        fs::write(&world.boot, "boot-1\n").unwrap();
    }
    world.nodes[0].start();
    wait_until(LIMIT, "alpha to step down", || {
        world.nodes[0]
            .status()
            .is_some_and(|s| (s.said.mirrors[0].role.as_str(), s.said.mirrors[0].state.as_str()) == ("standby", "diverged"))
    });
    assert_eq!(world.holds(0, "new/after"), None);
    assert_eq!(world.holds(1, "new/tail"), None);
    world.refused(0, &["demote"], "twinbox resync plan");
    world.refused(0, &["promote"], "twinbox resync plan");
    world.ok(0, &["demote", "--force"]);
    world.in_sync();
    let now: Vec<_> = ["new/1", "new/2", "new/after", "new/tail"].iter().map(|name| world.holds(0, name)).collect();
    assert_eq!(now, [Some("changed on beta".into()), Some("message 2".into()), Some("only on beta".into()), None]);
    let rescued: Vec<(String, String)> = world.rescued(0);
    let rescued: Vec<(&str, &str)> = rescued.iter().map(|(name, content)| (name.as_str(), content.as_str())).collect();
    assert_eq!(rescued, [("1", "changed on alpha"), ("3", "message 3"), ("3:2,", "message 3"), ("tail", "only on alpha")]);
    assert_eq!(world.rescued(1), []);

    // And back, without loss.
    world.switch_back();
}

#[test]
fn of_two_primaries_neither_touches_the_other() {
    let _turn = heavy();
    let mut world = World::new("split");
    world.ok(1, &["promote", "--force"]);
    for node in 0..2 {
        world.deliver(node, &format!("new/on {node}"), "alone");
    }
    world.nodes[0].wait_state(LIMIT, "diverged");
    // Nor after both have been restarted.
    for node in &mut world.nodes {
        node.stop();
        node.start();
    }
    world.nodes[0].wait_state(LIMIT, "diverged");
    assert_eq!((world.holds(0, "new/on 1"), world.holds(1, "new/on 0")), (None, None));
    world.ok(0, &["demote", "--force"]);
    world.in_sync();
    assert_eq!((world.holds(0, "new/on 1"), world.holds(1, "new/on 0")), (Some("alone".into()), None));
    assert_eq!(world.rescued(0), [("on 0".into(), "alone".into())]);
}

/// Has each hook of both nodes note that it was run; `refuses` is one that fails.
fn hooked(world: &World, refuses: Option<(usize, &str)>) -> std::path::PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let log = world.boot.with_file_name("hooks.log");
    for (n, node) in world.nodes.iter().enumerate() {
        let dir = node.config.parent().unwrap();
        let script = dir.join("hook");
        let fails = refuses.filter(|(at, _)| *at == n).map_or(String::new(), |(_, hook)| format!("[ $TWINBOX_HOOK = {hook} ] && exit 3\n"));
        fs::write(
            &script,
            format!("#!/bin/sh\necho $TWINBOX_NODE $TWINBOX_HOOK $TWINBOX_ROLE $TWINBOX_MIRROR >> {}\n{fails}exit 0\n", log.display()),
        )
        .unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
        let text = fs::read_to_string(&node.config).unwrap();
        if !text.contains("\n[hooks]") {
            let keys = ["pre_promote", "post_promote", "pre_demote", "post_demote", "on_unprotected", "on_protected", "on_diverged"];
            let table: String = keys.iter().map(|key| format!("{key} = \"{}\"\n", script.display())).collect();
            fs::write(&node.config, text.replacen("\n[[mirror]]", &format!("\n[hooks]\n{table}\n[[mirror]]"), 1)).unwrap();
        }
        world.ok(n, &["reload"]);
    }
    log
}

fn hooks_run(log: &std::path::Path) -> Vec<String> {
    let lines = fs::read_to_string(log).unwrap_or_default();
    lines.lines().filter(|line| !line.contains(" on_")).map(ToOwned::to_owned).collect()
}

#[test]
fn a_switchover_is_one_command() {
    let _turn = heavy();
    let mut world = World::new("switchover");
    let log = hooked(&world, None);
    world.refused(1, &["switchover"], "is its standby already");
    world.deliver(0, "new/last moment", "written just before");
    world.ok(0, &["switchover"]);
    assert_eq!((world.said(0).role.as_str(), world.said(1).role.as_str()), ("standby", "primary"));
    assert_eq!(world.holds(1, "new/last moment").as_deref(), Some("written just before"));
    wait_until(LIMIT, "the last hook", || hooks_run(&log).len() == 4);
    let mut run = hooks_run(&log);
    run[2..].sort(); // Both nodes do that at the same time.
    assert_eq!(
        run,
        [
            "alpha pre_demote primary mail",
            "beta pre_promote standby mail",
            "alpha post_demote standby mail",
            "beta post_promote primary mail"
        ]
    );
    world.deliver(1, "new/on beta", "written on beta");
    world.in_sync();

    // A node that cannot take over: everything is as it was, the mail server runs again.
    let log = hooked(&world, Some((0, "pre_promote")));
    fs::remove_file(&log).unwrap();
    world.refused(1, &["switchover"], "this node is primary again");
    assert_eq!((world.said(0).role.as_str(), world.said(1).role.as_str()), ("standby", "primary"));
    let run = hooks_run(&log);
    assert_eq!(
        run,
        [
            "beta pre_demote primary mail",
            "alpha pre_promote standby mail",
            "beta pre_promote standby mail",
            "beta post_promote primary mail"
        ]
    );
    world.deliver(1, "new/still on beta", "written on beta");
    world.in_sync();
    // One that cannot be stopped.
    hooked(&world, Some((1, "pre_demote")));
    world.refused(1, &["switchover"], "nothing was changed");
    world.refused(1, &["demote"], "nothing was changed");

    hooked(&world, None);
    world.nodes[0].kill9();
    world.nodes[1].wait_state(LIMIT, "unprotected");
    world.refused(1, &["switchover"], "no standby follows");
    wait_until(LIMIT, "somebody to be told", || {
        fs::read_to_string(&log).is_ok_and(|lines| lines.contains("beta on_unprotected primary mail"))
    });
    // A machine that is started has the mail server of its role.
    fs::remove_file(&log).unwrap();
    world.nodes.iter_mut().for_each(|node| {
        if node.agent.is_some() {
            node.stop();
        }
        node.start();
    });
    let started = ["alpha post_demote standby mail", "beta post_promote primary mail"];
    wait_until(LIMIT, "the hooks of a start", || started.iter().all(|line| hooks_run(&log).iter().any(|run| run == line)));
    world.in_sync();
    for node in 0..2 {
        assert_eq!(world.rescued(node), [], "nobody lost anything");
    }
}
