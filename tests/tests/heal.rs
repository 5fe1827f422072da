//! Power cuts of the primary: what the standby had and the primary's own disk lost comes back before anything is shipped. Real agents, an ext4 whose power is cut.
//!
//! Mail is delivered as Postfix and Dovecot do: written in `tmp`, fsynced, renamed, no fsync of the directory. Every change is on the standby when the agent is killed and the power cut, less than a second after
//! the first of them, so that the agent's own syncfs has not been there; where it has (a slow machine), the round is played again.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use twinbox_tests::gate::{Need, heavy, nap_until, wait_until};
use twinbox_tests::node::{Node, Spec, free_udp, pair};
use twinbox_tests::platter::Disk;
use twinbox_tests::require;
use twinbox_tests::scratch::Scratch;
use twinbox_tests::tree::{Layout, Rules, assert_identical, leftovers, wait_identical};
use twinbox_tests::twinbox::Program;

const LIMIT: Duration = Duration::from_secs(60);
/// The agent's own syncfs comes a second after a change: after this it has been there.
const LOCALLY_DURABLE: Duration = Duration::from_millis(2500);
/// Rounds that may be played for nothing because the machine was slow.
const ROUNDS: usize = 6;

struct World {
    disk: Disk,
    /// State of the primary, when it is not on the store's disk.
    other: Option<Disk>,
    replica: PathBuf,
    primary: Node,
    standby: Node,
    boot: PathBuf,
    boots: u32,
    delivered: u32,
    /// Last, so that it is removed after the disks in it were unmounted.
    _scratch: Scratch,
}

impl World {
    /// Both nodes paired and running, one mailbox. `apart`: the primary's state has a disk of its own, which loses other things.
    fn new(apart: bool) -> Self {
        let scratch = Scratch::new("heal");
        let disk = Disk::new(&scratch.join("store-disk"), 96);
        let other = apart.then(|| Disk::new(&scratch.join("state-disk"), 96));
        let store = disk.path().join("store");
        for sub in ["new", "cur", "tmp"] {
            fs::create_dir_all(store.join("u").join(sub)).unwrap();
        }
        let replica = scratch.dir("replica");
        let boot = scratch.join("boot-id");
        fs::write(&boot, "boot-0\n").unwrap();
        let layout = Layout::Maildir;
        let program = Program::under_env("TWINBOX_BOOT_ID_FILE", &boot);
        let primary = Spec { node: "alpha", role: "primary", mirror: "mail", root: &store, layout, listen: free_udp() };
        let standby = Spec { node: "beta", role: "standby", root: &replica, listen: free_udp(), ..primary.clone() };
        let state = other.as_ref().map_or(disk.path(), Disk::path);
        let mut primary = Node::init(program, &state.join("alpha"), &primary);
        primary.logs = scratch.dir("logs");
        let standby = Node::init(Program::here(), &scratch.join("beta"), &standby);
        pair(&primary, &standby);
        let mut world = World { disk, other, replica, primary, standby, boot, boots: 0, delivered: 0, _scratch: scratch };
        world.standby.start();
        world.primary.start();
        world.in_sync();
        world
    }

    fn store(&self) -> PathBuf {
        self.disk.path().join("store")
    }

    fn in_sync(&self) {
        wait_identical(&self.store(), &self.replica, Rules::of(Layout::Maildir), LIMIT).unwrap_or_else(|why| panic!("not identical {why}"));
        self.primary.wait_state(LIMIT, "protected");
    }

    /// Mail in `tmp`, fsynced, not delivered yet; gives the names.
    fn prepare(&mut self, count: u32) -> Vec<String> {
        let names: Vec<String> = (self.delivered..self.delivered + count).map(|n| format!("{n}.M{n}P1.host")).collect();
        self.delivered += count;
        for name in &names {
            let path = self.store().join("u/tmp").join(name);
            fs::write(&path, text(name)).unwrap();
            File::open(&path).unwrap().sync_all().unwrap();
        }
        names
    }

    fn deliver(&self, names: &[String]) {
        for name in names {
            fs::rename(self.store().join("u/tmp").join(name), self.store().join("u/new").join(name)).unwrap();
        }
    }

    /// Waits until everything is on the standby, then kills the agent at once.
    fn on_the_standby_then_killed(&mut self) {
        wait_identical(&self.store(), &self.replica, Rules::of(Layout::Maildir), LIMIT).unwrap_or_else(|why| panic!("not identical {why}"));
        self.primary.kill9();
    }

    /// The power of the primary is cut, and it boots.
    fn cut(&mut self) {
        self.disk.cut();
        if let Some(other) = &mut self.other {
            other.cut();
        }
        self.boots += 1;
        fs::write(&self.boot, format!("boot-{}\n", self.boots)).unwrap();
    }

    fn missing(&self, names: &[String]) -> usize {
        names.iter().filter(|name| !self.store().join("u/new").join(name).exists()).count()
    }

    fn heal(&self) -> serde_json::Value {
        let ended = self.primary.command(&["heal", "--json", "--timeout", "60s"]).ok("twinbox heal");
        let said: serde_json::Value = serde_json::from_str(&ended.stdout).unwrap_or_else(|e| panic!("{e}: {ended}"));
        assert_eq!(said["schema"], 1);
        said["mirrors"][0].clone()
    }

    fn end(mut self) {
        self.in_sync();
        self.primary.stop();
        self.standby.stop();
        assert_identical(&self.store(), &self.replica, Rules::of(Layout::Maildir));
        assert_eq!(leftovers(&self.store()).unwrap(), Vec::<String>::new(), "left behind");
    }
}

#[track_caller]
fn has_all(root: &Path, names: &[String]) {
    for name in names {
        let found = fs::read_to_string(root.join("u/new").join(name)).unwrap_or_else(|e| panic!("{name} below {}: {e}", root.display()));
        assert_eq!(found, text(name));
    }
}

fn text(name: &str) -> String {
    format!("Subject: {name}\n\n{}\n", "a line of text. ".repeat(name.len() * 40))
}

fn overwrite(path: &Path, bytes: &[u8], at: u64, sync: bool) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(bytes, at).unwrap();
    if sync {
        file.sync_data().unwrap();
    }
}

/// Plays rounds of `change` until one whose changes the primary's disk lost; gives the names of the mail delivered in it.
fn lost_round(world: &mut World, count: u32, change: impl Fn(&Path, usize)) -> Vec<String> {
    for round in 0..ROUNDS {
        let names = world.prepare(count);
        nap_until(Instant::now() + LOCALLY_DURABLE);
        world.in_sync();
        world.deliver(&names);
        change(&world.store(), round);
        world.on_the_standby_then_killed();
        world.cut();
        let missing = world.missing(&names);
        eprintln!("round {round}: the disk lost {missing} of {count} deliveries that the standby has");
        if missing > 0 {
            has_all(&world.replica, &names);
            return names;
        }
        world.primary.start();
        world.in_sync();
    }
    panic!("in {ROUNDS} rounds nothing was lost: the machine is too slow for this test");
}

fn healed_in_full(apart: bool) {
    let mut world = World::new(apart);
    let u = world.store().join("u");
    for n in 0..ROUNDS {
        for (name, bytes) in [("synced", &b"AAAA"[..]), ("unsynced", b"AAAA"), ("log", b"line\n")] {
            fs::write(u.join(format!("{name}-{n}")), bytes.repeat(1024)).unwrap();
        }
        fs::write(u.join(format!("cur/flag-{n}.M1:2,")), format!("flagged later {n}")).unwrap();
        fs::write(u.join(format!("cur/expunged-{n}.M1:2,S")), format!("expunged later {n}")).unwrap();
    }
    world.in_sync();
    let names = lost_round(&mut world, 25, |store, n| {
        let u = store.join("u");
        // Reaches the disk at once, its times do not.
        overwrite(&u.join(format!("synced-{n}")), &b"BBBB".repeat(1024), 0, true);
        overwrite(&u.join(format!("unsynced-{n}")), &b"CCCC".repeat(512), 1024, false);
        overwrite(&u.join(format!("log-{n}")), b"one more\n", 5 * 1024, false);
        fs::rename(u.join(format!("cur/flag-{n}.M1:2,")), u.join(format!("cur/flag-{n}.M1:2,S"))).unwrap();
        fs::remove_file(u.join(format!("cur/expunged-{n}.M1:2,S"))).unwrap();
        for sub in ["", "cur", "new", "tmp"] {
            fs::create_dir(u.join(format!(".Folder-{n}")).join(sub)).unwrap();
        }
        fs::write(u.join(format!(".Folder-{n}/cur/1.M1:2,")), "in a new folder").unwrap();
        fs::hard_link(u.join(format!(".Folder-{n}/cur/1.M1:2,")), u.join(format!(".Folder-{n}/new/2.M1"))).unwrap();
    });
    let n = world.boots as usize - 1;
    assert!(!u.join(format!(".Folder-{n}")).exists(), "the new folder was to be lost");
    assert_eq!(fs::read(u.join(format!("synced-{n}"))).unwrap(), b"BBBB".repeat(1024), "new bytes");
    assert_eq!(fs::read(u.join(format!("unsynced-{n}"))).unwrap(), b"AAAA".repeat(1024), "old bytes");
    let done = world.heal();
    eprintln!("{done}");
    assert_eq!(done["outcome"], "healed");
    assert!(done["restored"].as_u64().unwrap() >= 25, "{done}");
    assert_eq!((&done["unrestored"], &done["doubtful"]), (&0.into(), &0.into()), "{done}");
    let right = |root: &Path| {
        has_all(root, &names);
        let u = root.join("u");
        assert_eq!(fs::read(u.join(format!("synced-{n}"))).unwrap(), b"BBBB".repeat(1024));
        assert_eq!(
            fs::read(u.join(format!("unsynced-{n}"))).unwrap(),
            [b"AAAA".repeat(256), b"CCCC".repeat(512), b"AAAA".repeat(256)].concat()
        );
        assert_eq!(fs::read(u.join(format!("log-{n}"))).unwrap(), [b"line\n".repeat(1024), b"one more\n".to_vec()].concat());
        assert!(u.join(format!("cur/flag-{n}.M1:2,S")).exists() && !u.join(format!("cur/flag-{n}.M1:2,")).exists());
        assert!(!u.join(format!("cur/expunged-{n}.M1:2,S")).exists());
        assert_eq!(fs::read_to_string(u.join(format!(".Folder-{n}/cur/1.M1:2,"))).unwrap(), "in a new folder");
    };
    right(&world.store());
    // Again, and again after another cut: nothing is left to do.
    assert_eq!(world.heal()["outcome"], "clean");
    world.cut();
    right(&world.store());
    let done = world.heal();
    assert_eq!((&done["outcome"], &done["restored"], &done["replaced"]), (&"healed".into(), &0.into(), &0.into()), "{done}");
    world.primary.start();
    world.in_sync();
    right(&world.store());
    right(&world.replica);
    world.end();
}

#[test]
fn what_a_power_cut_took_comes_back() {
    require!(Need::LoopDisk);
    let _turn = heavy();
    healed_in_full(false);
}

#[test]
fn what_a_power_cut_took_comes_back_when_the_state_lost_other_things() {
    require!(Need::LoopDisk);
    let _turn = heavy();
    healed_in_full(true);
}

/// Nobody ran `heal`: `run` does it before it ships anything, also when the standby comes later.
#[test]
fn run_heals_before_it_ships() {
    require!(Need::LoopDisk);
    let _turn = heavy();
    let mut world = World::new(false);
    // Only killed: there is nothing to heal, and nobody is asked.
    world.primary.kill9();
    world.standby.stop();
    assert_eq!(world.heal()["outcome"], "clean");
    world.standby.start();
    world.primary.start();
    world.in_sync();

    let names = lost_round(&mut world, 25, |_, _| {});
    world.standby.stop();
    let ended = world.primary.command(&["heal", "--timeout", "1s"]);
    assert_eq!(ended.status.code(), Some(15), "{ended}");
    assert!(ended.stderr.contains("without the standby"), "{ended}");
    world.primary.start();
    wait_until(LIMIT, "the agent to say that it must heal", || {
        world.primary.status().is_some_and(|s| s.said.mirrors[0].state == "unprotected" && s.value.to_string().contains("power cut"))
    });
    let fence = world.primary.command(&["fence"]);
    assert_eq!(fence.status.code(), Some(14), "{fence}");
    world.standby.start();
    world.in_sync();
    has_all(&world.store(), &names);
    has_all(&world.replica, &names);
    // An orderly stop, then a boot: nobody is asked.
    world.primary.stop();
    world.standby.stop();
    world.cut();
    assert_eq!(world.heal()["outcome"], "clean");
    has_all(&world.store(), &names);
    world.standby.start();
    world.primary.start();
    world.end();
}

/// The standby has no content for what this disk lost: that must not become a removal.
#[test]
fn what_cannot_be_put_back_is_not_shipped_as_removed() {
    require!(Need::LoopDisk);
    let _turn = heavy();
    let mut world = World::new(false);
    let names = lost_round(&mut world, 25, |_, _| {});
    let lost = names.iter().find(|name| !world.store().join("u/new").join(name).exists()).unwrap().clone();
    let (theirs, aside) = (world.replica.join("u/new").join(&lost), world.replica.with_extension("aside"));
    fs::rename(&theirs, &aside).unwrap();
    let ended = world.primary.command(&["heal", "--timeout", "3s"]);
    assert_eq!(ended.status.code(), Some(15), "{ended}");
    assert!(ended.stderr.contains("--force-incomplete"), "{ended}");
    world.primary.start();
    wait_until(LIMIT, "the agent to say that it cannot heal", || {
        world.primary.status().is_some_and(|s| s.value.to_string().contains("could not be put back"))
    });
    assert_eq!(world.primary.status().unwrap().said.mirrors[0].state, "unprotected");
    fs::rename(&aside, &theirs).unwrap();
    world.in_sync();
    has_all(&world.store(), &names);
    has_all(&world.replica, &names);
    world.end();
}

/// The power is cut again while it heals.
#[test]
fn a_heal_that_is_cut_is_done_again() {
    require!(Need::LoopDisk);
    let _turn = heavy();
    let mut world = World::new(false);
    let names = lost_round(&mut world, 200, |_, _| {});
    let lost = world.missing(&names);
    let args = ["heal", "--config", world.primary.config.to_str().unwrap()];
    let mut heal = world.primary.program.spawn("heal-cut", &world.primary.logs, args);
    wait_until(LIMIT, "the first mail to come back", || world.missing(&names) < lost || heal.try_wait().is_some());
    heal.kill9();
    drop(heal);
    world.cut();
    eprintln!("cut after {} of {lost} were put back; {} are missing now", lost - world.missing(&names).min(lost), world.missing(&names));
    let done = world.heal();
    assert_eq!((&done["unrestored"], &done["doubtful"]), (&0.into(), &0.into()), "{done}");
    has_all(&world.store(), &names);
    world.primary.start();
    world.in_sync();
    has_all(&world.replica, &names);
    world.end();
}

/// `twinbox mirror`: the source's disk is cut, the replica is on another.
#[test]
fn mirror_heals_its_source_before_it_mirrors() {
    require!(Need::LoopDisk);
    let _turn = heavy();
    let scratch = Scratch::new("heal");
    let mut disk = Disk::new(&scratch.join("store-disk"), 96);
    let (replica, state, boot) = (scratch.dir("replica"), scratch.join("state"), scratch.join("boot-id"));
    fs::create_dir_all(disk.path().join("store/u/new")).unwrap();
    let program = Program::under_env("TWINBOX_BOOT_ID_FILE", &boot);
    let rules = Rules::of(Layout::Maildir);
    for round in 0..ROUNDS {
        let store = disk.path().join("store");
        fs::write(&boot, format!("boot-{round}")).unwrap();
        let args = ["mirror", store.to_str().unwrap(), replica.to_str().unwrap(), "--state", state.to_str().unwrap()];
        let mut mirror = program.spawn("mirror", scratch.path(), args);
        nap_until(Instant::now() + LOCALLY_DURABLE);
        wait_identical(&store, &replica, rules, LIMIT).unwrap_or_else(|why| panic!("{why}"));
        let name = store.join(format!("u/new/{round}.M1"));
        fs::write(&name, "a mail").unwrap();
        wait_identical(&store, &replica, rules, LIMIT).unwrap_or_else(|why| panic!("{why}"));
        mirror.kill9();
        disk.cut();
        let lost = !name.exists();
        fs::write(&boot, format!("boot-{round}-again")).unwrap();
        let once = program.run("mirror-once", scratch.path(), args.into_iter().chain(["--once"])).ok("mirror --once");
        assert_eq!(fs::read_to_string(&name).unwrap(), "a mail");
        assert_identical(&store, &replica, rules);
        if lost {
            assert!(once.stderr.contains("came back from the replica"), "{once}");
            return;
        }
    }
    panic!("in {ROUNDS} rounds nothing was lost: the machine is too slow for this test");
}

/// Each node is primary of one mirror and standby of the other, and both lose power: each is the only one that can help the other.
#[test]
fn two_nodes_that_lost_power_together_heal_each_other() {
    let scratch = Scratch::new("heal");
    let boot = scratch.join("boot-id");
    fs::write(&boot, "boot-0").unwrap();
    let mut nodes: Vec<Node> = ["alpha", "beta"]
        .into_iter()
        .map(|name| {
            let root = scratch.dir(&format!("{name}-one"));
            let spec = Spec { node: name, role: "standby", mirror: "one", root: &root, layout: Layout::Maildir, listen: free_udp() };
            let node = Node::init(Program::under_env("TWINBOX_BOOT_ID_FILE", &boot), &scratch.join(name), &spec);
            let other = scratch.dir(&format!("{name}-two"));
            let config = fs::read_to_string(&node.config).unwrap();
            let second =
                format!("\n[[mirror]]\nname = \"two\"\nroot = \"{}\"\nlayout = \"maildir\"\nrole = \"standby\"\n", other.display());
            let mine = if name == "alpha" { "one" } else { "two" };
            let both = config + &second;
            let at = both.find(&format!("name = \"{mine}\"")).unwrap();
            let (before, after) = both.split_at(at);
            fs::write(&node.config, format!("{before}{}", after.replacen("role = \"standby\"", "role = \"primary\"", 1))).unwrap();
            node
        })
        .collect();
    pair(&nodes[0], &nodes[1]);
    let wait_both = |nodes: &[Node]| {
        for node in nodes {
            node.wait_state(LIMIT, "protected");
        }
        for mirror in ["one", "two"] {
            let side = |name: &str| scratch.join(&format!("{name}-{mirror}"));
            wait_identical(&side("alpha"), &side("beta"), Rules::of(Layout::Maildir), LIMIT).unwrap_or_else(|why| panic!("{why}"));
        }
    };
    nodes.iter_mut().for_each(Node::start);
    fs::write(scratch.join("alpha-one/mail"), "of one").unwrap();
    fs::write(scratch.join("beta-two/mail"), "of two").unwrap();
    wait_both(&nodes);
    nodes.iter_mut().for_each(Node::kill9);
    fs::write(&boot, "boot-1").unwrap();
    let mut heals: Vec<_> = nodes
        .iter()
        .map(|node| {
            let args = ["heal", "--config", node.config.to_str().unwrap(), "--timeout", "60s", "--json"];
            Some(node.program.spawn("heal", &node.logs, args))
        })
        .collect();
    // The unit starts the agent when its heal is through; the other may still need this node.
    let end = Instant::now() + LIMIT;
    while heals.iter().any(Option::is_some) {
        assert!(Instant::now() < end, "they wait for each other");
        for (heal, node) in heals.iter_mut().zip(&mut nodes) {
            if let Some(mut process) = heal.take_if(|process| process.try_wait().is_some()) {
                let status = process.wait(LIMIT);
                assert!(status.success() && process.stdout().contains("\"healed\""), "{status} {}", process.stderr());
                node.start();
            }
        }
        nap_until(Instant::now() + Duration::from_millis(5));
    }
    wait_both(&nodes);
    nodes.iter_mut().for_each(Node::stop);
}

/// Store and state of the primary are put back from a copy that is older than what the standby has.
fn rolled_back(orderly: bool) {
    let scratch = Scratch::new("heal");
    let (store, replica, boot) = (scratch.dir("store"), scratch.dir("replica"), scratch.join("boot-id"));
    fs::write(&boot, "boot-0").unwrap();
    fs::create_dir_all(store.join("u/new")).unwrap();
    let primary = Spec { node: "alpha", role: "primary", mirror: "mail", root: &store, layout: Layout::Maildir, listen: free_udp() };
    let standby = Spec { node: "beta", role: "standby", root: &replica, listen: free_udp(), ..primary.clone() };
    let mut primary = Node::init(Program::under_env("TWINBOX_BOOT_ID_FILE", &boot), &scratch.join("alpha"), &primary);
    let mut standby = Node::init(Program::here(), &scratch.join("beta"), &standby);
    primary.logs = scratch.dir("logs");
    pair(&primary, &standby);
    let in_sync = |primary: &Node| {
        wait_identical(&store, &replica, Rules::of(Layout::Maildir), LIMIT).unwrap_or_else(|why| panic!("not identical {why}"));
        primary.wait_state(LIMIT, "protected");
    };
    let end = |primary: &mut Node| if orderly { primary.stop() } else { primary.kill9() };
    let deliver = |numbers: std::ops::Range<u32>| -> Vec<String> {
        let names: Vec<String> = numbers.map(|n| format!("{n}.M{n}P1.host")).collect();
        names.iter().for_each(|name| fs::write(store.join("u/new").join(name), text(name)).unwrap());
        names
    };
    standby.start();
    primary.start();
    let before = deliver(0..5);
    in_sync(&primary);
    end(&mut primary);
    let dirs = [("store", &store), ("state", &scratch.join("alpha"))];
    let copy = |from: &Path, to: &Path| {
        let done = std::process::Command::new("cp").args(["-a", "--"]).arg(from.join(".")).arg(to).status().unwrap();
        assert!(done.success(), "cp of {}", from.display());
    };
    dirs.iter().for_each(|(name, dir)| copy(dir, &scratch.dir(&format!("copy-{name}"))));
    primary.start();
    let after = deliver(5..25);
    in_sync(&primary);
    end(&mut primary);
    for (name, dir) in &dirs {
        // The directory itself stays: another one is refused for other reasons.
        for item in fs::read_dir(dir).unwrap() {
            let path = item.unwrap().path();
            if path.is_dir() { fs::remove_dir_all(path).unwrap() } else { fs::remove_file(path).unwrap() }
        }
        copy(&scratch.join(&format!("copy-{name}")), dir);
    }
    if orderly {
        fs::write(&boot, "boot-1").unwrap();
    }
    primary.start();
    wait_until(LIMIT, "the agent to say that its state is an older one", || {
        primary.status().is_some_and(|s| s.value.to_string().contains("older copy"))
    });
    has_all(&replica, &after);
    primary.stop();
    primary.start();
    in_sync(&primary);
    has_all(&store, &[before, after].concat());
    let more = deliver(25..30);
    in_sync(&primary);
    has_all(&replica, &more);
    primary.stop();
    standby.stop();
}

#[test]
fn a_copy_of_a_stopped_primary_that_is_put_back_ships_no_removals() {
    rolled_back(true);
}

#[test]
fn a_copy_of_a_killed_primary_that_is_put_back_ships_no_removals() {
    rolled_back(false);
}

/// The store's file system goes and comes back without a boot, as with a disk that was pulled: what was in memory is gone all the same.
#[test]
fn a_store_that_is_mounted_anew_in_the_same_boot_is_healed() {
    require!(Need::LoopDisk);
    let _turn = heavy();
    let mut world = World::new(true);
    for round in 0..ROUNDS {
        let names = world.prepare(25);
        nap_until(Instant::now() + LOCALLY_DURABLE);
        world.in_sync();
        let begun = Instant::now();
        world.deliver(&names);
        wait_identical(&world.store(), &world.replica, Rules::of(Layout::Maildir), LIMIT).unwrap_or_else(|why| panic!("{why}"));
        world.disk.mount_anew();
        // Later the agent may have synced what was mounted, and the copy been made before.
        let in_time = begun.elapsed() < Duration::from_millis(900);
        let missing = world.missing(&names);
        eprintln!("round {round}: {missing} are not on the disk");
        wait_until(LIMIT, "the agent to see that its root is another", || {
            world.primary.status().is_some_and(|s| s.value.to_string().contains("unmounted"))
        });
        world.primary.stop();
        world.primary.start();
        world.in_sync();
        if !in_time {
            continue;
        }
        has_all(&world.store(), &names);
        has_all(&world.replica, &names);
        if missing > 0 {
            return world.end();
        }
    }
    panic!("in {ROUNDS} rounds nothing was lost: the machine is too slow for this test");
}
