//! Power cuts of the standby: its replica and state lie on a disk of their own, whose image is copied in one instant under load; an agent is
//! started on the copy, alone, and must come up with everything that had been acknowledged, whole and in order.

use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::disk::{Disk, Format};
use crate::gate::{nap, nap_until, wait_for, wait_until};
use crate::node::{Node, Spec, free_udp, pair};
use crate::rng::Rng;
use crate::scratch::Scratch;
use crate::script::{Moment, Script};
use crate::tree::Layout;
use crate::twinbox::Program;

const LIMIT: Duration = Duration::from_secs(60);

/// Cuts the power `cuts` times under load. Needs root. Panics at the first copy that is not as it must be.
pub fn run(format: Format, cuts: usize, seed: u64) {
    let scratch = Scratch::new("powercut");
    let vault = Disk::vault(scratch.path(), 3000);
    let disk = Disk::new(format, &vault.path().join("disk.img"), 512, &scratch.join("disk"));
    let (store, replica) = (scratch.dir("store"), disk.path().join("replica"));
    fs::create_dir(&replica).expect("make the replica");
    let listen = [free_udp(), free_udp()];
    let first = Spec { node: "alpha", role: "primary", mirror: "mail", root: &store, layout: Layout::Maildir, listen: listen[0] };
    let second = Spec { node: "beta", role: "standby", root: &replica, listen: listen[1], ..first.clone() };
    let mut primary = Node::init(Program::here(), &scratch.join("alpha"), &first);
    // Outputs stay off the disk under test.
    let mut standby = Node::init(Program::here(), &disk.path().join("beta"), &second);
    standby.logs = scratch.dir("logs");
    pair(&primary, &standby);
    let script = Mutex::new(Script::begin(&store, seed).expect("write the store"));
    primary.start();
    standby.start();
    let mut rng = Rng::part(seed, 9);
    let mut lost = 0;
    for n in 0..cuts {
        // Everything up to here has arrived, and so is durable.
        let since = settle(&script, &replica);
        let moment = Instant::now() + Duration::from_millis(rng.below(250) as u64);
        let image = vault.path().join("copy.img");
        let durable = under_load(&script, || {
            nap_until(moment);
            let durable = primary.status().expect("the primary answers").said.mirrors[0].lsn.durable;
            nap(Duration::from_micros(rng.below(20_000) as u64));
            disk.cut(&image);
            durable
        });
        let copy = Disk::mount(format, &image, &scratch.join("copy"));
        let verdict = recovered(&copy, disk.path(), &scratch, durable, &script.lock().expect("the script"), since);
        match verdict {
            Ok(behind) => lost += behind,
            Err(why) => panic!("{} cut {n}: {why}", format.name()),
        }
    }
    eprintln!("{}: {cuts} cuts; LSN {lost} more were found than had been told", format.name());
    settle(&script, &replica);
    primary.stop();
    standby.stop();
}

fn settle(script: &Mutex<Script>, replica: &Path) -> usize {
    let script = script.lock().expect("the script");
    wait_until(LIMIT, "the replica to follow", || Moment::read(replica).is_ok_and(|tree| script.is_now(&tree)));
    script.moment()
}

/// What `act` gives, done while the store changes all the time.
fn under_load<T>(script: &Mutex<Script>, act: impl FnOnce() -> T) -> T {
    let working = AtomicBool::new(true);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while working.load(Ordering::SeqCst) {
                script.lock().expect("the script").load().expect("the load");
                nap(Duration::from_millis(1));
            }
        });
        /// The load ends however `act` does.
        struct Over<'a>(&'a AtomicBool);
        impl Drop for Over<'_> {
            fn drop(&mut self) {
                self.0.store(false, Ordering::SeqCst);
            }
        }
        let _over = Over(&working);
        act()
    })
}

/// Starts the standby on the copy; how many LSNs beyond `durable` it has.
fn recovered(copy: &Disk, original: &Path, scratch: &Scratch, durable: u64, script: &Script, since: usize) -> Result<u64, String> {
    let dir = copy.path().join("beta");
    let config = dir.join("twinbox.toml");
    let text = fs::read_to_string(&config).map_err(|e| format!("the configuration: {e}"))?;
    let text = text.replace(&original.display().to_string(), &copy.path().display().to_string());
    let listens = text.lines().find(|l| l.trim_start().starts_with("listen")).ok_or("no listen address")?;
    let text = text.replace(listens, &format!("listen = [\"{}\"]", free_udp()));
    fs::write(&config, text).map_err(|e| format!("the configuration: {e}"))?;
    let mut node =
        Node { program: Program::here(), name: "copy".into(), config, state: dir.join("state"), logs: scratch.join("logs"), agent: None };
    node.start();
    let found = wait_for(LIMIT, "the standby to recover", || {
        node.agent().assert_running();
        let status = node.status()?;
        let lsn = &status.said.mirrors[0].lsn;
        (lsn.applied == lsn.durable).then_some(lsn.durable)
    });
    let tree = Moment::read(&copy.path().join("replica")).map_err(|e| format!("the replica: {e}"))?;
    node.kill9();
    if found < durable {
        return Err(format!("LSN {durable} had been acknowledged, {found} is what is left"));
    }
    script.is_cut(&tree, since)?;
    Ok(found - durable)
}
