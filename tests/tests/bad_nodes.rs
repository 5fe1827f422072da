//! Everything wrong that a configuration, a pairing code or another node can bring: one clear message, a documented exit code, nothing
//! lost, no panic. What `twinbox mirror` can be given stands in `bad_input.rs`.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::net::UdpSocket;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

use twinbox_tests::gate::{heavy, wait_until};
use twinbox_tests::node::{Node, Pair, Spec, code_in, free_udp, pair};
use twinbox_tests::refusal::{refused, small_store};
use twinbox_tests::scratch::Scratch;
use twinbox_tests::tree::{Layout, Rules, assert_identical};
use twinbox_tests::twinbox::{COMMAND_LIMIT, Program};

fn lone_node(scratch: &Scratch, program: Program) -> (Node, PathBuf) {
    let root = small_store(scratch);
    let spec = Spec { node: "alpha", role: "primary", mirror: "mail", root: &root, layout: Layout::Maildir, listen: free_udp() };
    (Node::init(program, &scratch.join("alpha"), &spec), root)
}

#[test]
fn port_taken() {
    let scratch = Scratch::new("bad");
    let root = small_store(&scratch);
    let taken = UdpSocket::bind("127.0.0.1:0").unwrap();
    let listen = taken.local_addr().unwrap();
    let spec = Spec { node: "alpha", role: "primary", mirror: "mail", root: &root, layout: Layout::Maildir, listen };
    let mut node = Node::init(Program::here(), &scratch.join("alpha"), &spec);
    node.start();
    let ended = node.agent.take().unwrap().end(COMMAND_LIMIT);
    refused(&ended, &scratch, &[&listen.port().to_string()]);
}

#[test]
fn config_with_an_unknown_key() {
    let scratch = Scratch::new("bad");
    let (mut node, _) = lone_node(&scratch, Program::here());
    let text = fs::read_to_string(&node.config).unwrap();
    assert!(text.contains("listen = "), "{text}");
    fs::write(&node.config, text.replace("listen = ", "lissten = ")).unwrap();
    node.start();
    let ended = node.agent.take().unwrap().end(COMMAND_LIMIT);
    refused(&ended, &scratch, &["lissten", "`listen`"]);
    assert!(!ended.stderr.contains("RUST_BACKTRACE"), "{ended}");
}

#[test]
fn config_missing_or_no_toml() {
    let scratch = Scratch::new("bad");
    let config = scratch.join("none.toml");
    let args: [&OsStr; 3] = ["run".as_ref(), "--config".as_ref(), config.as_os_str()];
    refused(&Program::here().run("run", scratch.path(), args), &scratch, &["none.toml"]);
    for junk in [&b"[[[\n"[..], b"\xff\xfe\x00", b"", b"node = 7\n"] {
        fs::write(&config, junk).unwrap();
        refused(&Program::here().run("run", scratch.path(), args), &scratch, &["none.toml"]);
    }
}

#[test]
fn init_never_overwrites() {
    let scratch = Scratch::new("bad");
    let (node, root) = lone_node(&scratch, Program::here());
    let before = fs::read(&node.config).unwrap();
    let mode = fs::metadata(node.state.join("node.key")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "the key's mode");
    let spec = Spec { node: "omega", role: "primary", mirror: "mail", root: &root, layout: Layout::Maildir, listen: free_udp() };
    let (_, ended) = Node::try_init(Program::here(), &scratch.join("alpha"), &spec);
    refused(&ended, &scratch, &[]);
    assert_eq!(before, fs::read(&node.config).unwrap());
}

fn two_nodes(scratch: &Scratch) -> [Node; 2] {
    let (root, replica) = (small_store(scratch), scratch.dir("replica"));
    let first = Spec { node: "alpha", role: "primary", mirror: "mail", root: &root, layout: Layout::Maildir, listen: free_udp() };
    let second = Spec { node: "beta", role: "standby", root: &replica, listen: free_udp(), ..first.clone() };
    [Node::init(Program::here(), &scratch.join("alpha"), &first), Node::init(Program::here(), &scratch.join("beta"), &second)]
}

#[test]
fn wrong_and_used_pairing_codes() {
    let scratch = Scratch::new("bad");
    let [alpha, beta] = two_nodes(&scratch);
    for wrong in ["twinbox-pair:", "twinbox-pair:AAAA", "nonsense", "twinbox-pair:\u{fc}"] {
        refused(&beta.command(&["pair", wrong]), &scratch, &[]);
    }
    let args: [OsString; 3] = ["pair".into(), "--config".into(), alpha.config.clone().into()];
    let mut waiting = alpha.program.spawn("pair", &alpha.logs, args);
    let code = waiting.wait_output(COMMAND_LIMIT, "a pairing code", code_in);
    // One character of the secret changed: refused, and the true code still works.
    let last = code.chars().last().unwrap();
    // Codes are read in either case.
    let other = if last.eq_ignore_ascii_case(&'a') { 'b' } else { 'a' };
    let tampered = format!("{}{other}", &code[..code.len() - last.len_utf8()]);
    refused(&beta.command(&["pair", &tampered]), &scratch, &[]);
    waiting.assert_running();
    beta.command(&["pair", &code]).ok("the true code");
    waiting.end(COMMAND_LIMIT).ok("the waiting side");
    refused(&beta.command(&["pair", &code]), &scratch, &[]);
}

#[test]
fn a_peer_with_an_unknown_key_gets_nothing() {
    let _turn = heavy();
    let scratch = Scratch::new("bad");
    let [mut alpha, mut beta] = two_nodes(&scratch);
    pair(&alpha, &beta);
    // Beta loses its key and makes another: the same name and address, a stranger all the same.
    let [saved, spare] = [scratch.join("saved"), scratch.join("spare")];
    fs::copy(&beta.config, &saved).unwrap();
    let other =
        Spec { node: "beta", role: "standby", mirror: "mail", root: &scratch.join("replica"), layout: Layout::Maildir, listen: free_udp() };
    let stranger = Node::init(Program::here(), &spare, &other);
    fs::copy(stranger.state.join("node.key"), beta.state.join("node.key")).unwrap();
    alpha.start();
    beta.start();
    // What refuses says so; looked for rather than waited out.
    wait_until(Duration::from_secs(30), "a refusal to be reported", || {
        [&mut alpha, &mut beta].into_iter().any(|node| {
            let process = node.agent();
            let said = process.stdout() + &process.stderr();
            process.try_wait().is_some() || ["key", "fingerprint", "certificate"].iter().any(|w| said.contains(w))
        })
    });
    let status = alpha.status().expect("the primary goes on");
    assert!(status.said.mirrors.iter().all(|m| m.state != "protected" && m.peers.iter().all(|p| !p.connected)), "{status:?}");
    assert!(fs::read_dir(scratch.join("replica")).unwrap().next().is_none(), "a stranger was given mail");
}

#[test]
fn status_without_an_agent() {
    let scratch = Scratch::new("bad");
    let (node, _) = lone_node(&scratch, Program::here());
    refused(&node.command(&["status"]), &scratch, &[]);
    refused(&node.command(&["status", "--json"]), &scratch, &[]);
}

#[test]
fn a_second_agent_on_the_same_state() {
    let _turn = heavy();
    let scratch = Scratch::new("bad");
    let (root, replica) = (small_store(&scratch), scratch.dir("replica"));
    let mut pair = Pair::on_loopback(scratch.path(), &root, &replica, Layout::Maildir);
    pair.wait_drained(Duration::from_secs(60));
    let second = pair.primary.command(&["run"]);
    refused(&second, &scratch, &[]);
    pair.primary.stop();
    pair.standby.stop();
    assert_identical(&root, &replica, Rules::of(Layout::Maildir));
}
