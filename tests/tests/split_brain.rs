//! Split brain and worse, made in several ways: each is continued, or refused and explained, and what was refused is resolved with nothing lost. Real agents on loopback.
//!
//! Both promoted and both written to: `failback_of_two_that_were_promoted_apart_wants_a_winner`.

use std::fs;
use std::path::Path;
use std::process::Command;

use twinbox_tests::gate::{Need, heavy, wait_until};
use twinbox_tests::relay::Relay;
use twinbox_tests::require;
use twinbox_tests::twinbox::Program;
use twinbox_tests::world::{LIMIT, World};

/// `ExitCode::State`.
const STATE: i32 = 5;

fn alone(world: &World, node: usize) {
    wait_until(LIMIT, "the agent to know that it is alone", || {
        world.nodes[node].status().is_some_and(|s| s.said.mirrors[0].peers.iter().all(|peer| !peer.connected))
    });
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    let ended = Command::new("cp").arg("-a").arg(from.join(".")).arg(to).status().unwrap();
    assert!(ended.success());
}

/// The directory stays the same one: a backup is put back into it.
fn put_back(from: &Path, to: &Path) {
    for item in fs::read_dir(to).unwrap().flatten() {
        if item.file_type().unwrap().is_dir() { fs::remove_dir_all(item.path()).unwrap() } else { fs::remove_file(item.path()).unwrap() }
    }
    copy(from, to);
}

/// The one that wrote nothing has nothing that could be lost.
#[test]
fn both_promoted_and_one_writes() {
    let _turn = heavy();
    let mut world = World::new("one-writes");
    world.ok(0, &["demote"]);
    for node in 0..2 {
        world.nodes[1 - node].kill9();
        if node == 1 {
            world.nodes[1].start();
        }
        alone(&world, node);
        world.ok(node, &["promote"]);
    }
    let generation = world.said(1).generation;
    world.deliver(1, "new/on beta", "written on beta");
    wait_until(LIMIT, "a history of its own", || world.said(1).generation != generation || world.said(1).epoch == 2);
    world.nodes[0].start();
    wait_until(LIMIT, "an answer", || world.nodes[0].status().is_some());
    world.nodes[0].wait_state(LIMIT, "diverged");
    assert_eq!(world.holds(0, "new/on beta"), None, "nobody was touched");
    if world.said(0).role == "primary" {
        world.refused(0, &["resync", "plan"], "--winner");
    }
    world.ok(0, &["resync", "apply", "--winner", "beta"]);
    world.in_sync();
    for node in 0..2 {
        assert_eq!((world.holds(node, "new/on beta").as_deref(), world.rescued(node).len()), (Some("written on beta"), 0));
    }
    world.switch_back();
}

/// Store and state of one node are put back from a copy that was made an hour ago, the mail server went on since.
#[test]
fn a_node_is_put_back_from_a_copy() {
    let _turn = heavy();
    for node in 0..2 {
        for with_store in [true, false] {
            let mut world = World::new("copy");
            let kept = world.trees[0].parent().unwrap().join("copies");
            world.nodes[node].stop();
            copy(&world.nodes[node].state, &kept.join("state"));
            copy(&world.trees[node], &kept.join("store"));
            world.nodes[node].start();
            wait_until(LIMIT, "an answer", || world.nodes[node].status().is_some());
            world.in_sync();
            world.deliver(0, "new/later", "after the copy");
            fs::rename(world.trees[0].join("anna/Maildir/new/4"), world.trees[0].join("anna/Maildir/cur/4:2,S")).unwrap();
            world.in_sync();
            world.nodes[node].kill9();
            put_back(&kept.join("state"), &world.nodes[node].state);
            if with_store {
                put_back(&kept.join("store"), &world.trees[node]);
            }
            world.nodes[node].start();
            if node == 0 {
                // It finds out when it hears of the standby, and says what to do: what a service manager does.
                let mut agent = world.nodes[0].agent.take().unwrap();
                assert!(!agent.wait(LIMIT).success());
                world.nodes[0].start();
            }
            wait_until(LIMIT, "an answer", || world.nodes[node].status().is_some());
            world.in_sync();
            for node in 0..2 {
                assert_eq!(world.holds(node, "new/later").as_deref(), Some("after the copy"), "node {node}, store {with_store}");
                assert_eq!(world.holds(node, "cur/4:2,S").as_deref(), Some("message 4"));
            }
            world.deliver(0, "new/last", "goes on");
            world.in_sync();
            assert_eq!(world.holds(1, "new/last").as_deref(), Some("goes on"));
        }
    }
}

#[test]
fn a_state_that_was_copied_to_another_machine_is_refused() {
    require!(Need::Root);
    let _turn = heavy();
    let mut world = World::new("machine");
    for node in 0..2 {
        world.nodes[node].stop();
        let other = world.trees[0].parent().unwrap().join("machine-id");
        fs::write(&other, "0123456789abcdef0123456789abcdef\n").unwrap();
        let script = format!("mount --bind {} /etc/machine-id && exec \"$@\"", other.display());
        let here = std::mem::replace(&mut world.nodes[node].program, Program::under(["unshare", "-m", "sh", "-c", script.as_str(), "sh"]));
        let ended = world.nodes[node].command(&["run"]);
        assert_eq!(ended.status.code(), Some(STATE), "{ended}");
        assert!(ended.stderr.contains("made on another machine"), "{ended}");
        world.nodes[node].program = here;
        world.nodes[node].start();
        wait_until(LIMIT, "an answer", || world.nodes[node].status().is_some());
    }
    world.deliver(0, "new/after", "nothing was changed by it");
    world.in_sync();
}

#[test]
fn a_root_that_is_another_directory_is_refused() {
    let _turn = heavy();
    let mut world = World::new("root");
    for node in 0..2 {
        world.nodes[node].stop();
        let aside = world.trees[node].with_extension("aside");
        fs::rename(&world.trees[node], &aside).unwrap();
        fs::create_dir(&world.trees[node]).unwrap();
        let ended = world.nodes[node].command(&["run"]);
        assert!(!ended.status.success() && !ended.panicked(), "{ended}");
        assert!(ended.stderr.contains("not the directory this") || ended.stderr.contains("empty"), "{ended}");
        fs::remove_dir(&world.trees[node]).unwrap();
        fs::rename(&aside, &world.trees[node]).unwrap();
        world.nodes[node].start();
        wait_until(LIMIT, "an answer", || world.nodes[node].status().is_some());
        world.in_sync();
    }
    assert_eq!(world.holds(1, "new/1").as_deref(), Some("message 1"), "nothing was shipped as removed");
}

/// The standby has what the primary never heard of: that is no tail, and nothing is there twice.
#[test]
fn the_last_acknowledgement_is_lost() {
    let _turn = heavy();
    let mut world = World::new("last-ack");
    let listen = |config: &Path| {
        let text = fs::read_to_string(config).unwrap();
        let line = text.lines().find(|line| line.starts_with("listen")).unwrap().to_owned();
        line.split('"').nth(1).unwrap().to_owned()
    };
    let beta = listen(&world.nodes[1].config);
    let relay = Relay::start(beta.parse().unwrap(), 1).unwrap();
    world.nodes[0].stop();
    let config = fs::read_to_string(&world.nodes[0].config).unwrap();
    assert!(config.contains(&beta));
    fs::write(&world.nodes[0].config, config.replace(&beta, &relay.address().to_string())).unwrap();
    world.nodes[0].start();
    wait_until(LIMIT, "an answer", || world.nodes[0].status().is_some());
    world.in_sync();
    relay.mute(true);
    world.deliver(0, "new/unheard", "arrived, and nobody knows");
    wait_until(LIMIT, "it to arrive", || world.holds(1, "new/unheard").is_some());
    world.nodes[0].kill9();
    relay.mute(false);
    alone(&world, 1);
    world.ok(1, &["promote"]);
    world.deliver(1, "new/after", "on beta");
    world.nodes[0].start();
    wait_until(LIMIT, "alpha to step down", || {
        world.nodes[0].status().is_some_and(|s| s.said.mirrors[0].role == "standby" && s.said.mirrors[0].state == "diverged")
    });
    let shown = world.nodes[0].command(&["resync", "plan", "--json"]).ok("plan").stdout;
    let plan: serde_json::Value = serde_json::from_str(&shown).unwrap();
    assert_eq!(plan["items"].as_array().map(Vec::len), Some(0), "{shown}");
    world.ok(0, &["resync", "apply"]);
    world.in_sync();
    assert_eq!((world.rescued(0).len(), world.rescued(1).len()), (0, 0));
    assert_eq!(world.holds(0, "new/unheard").as_deref(), Some("arrived, and nobody knows"));
}
