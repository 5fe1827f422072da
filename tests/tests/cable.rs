//! The cable itself: datagrams pass between the two namespaces, none while it is cut, and its counters count them.

use std::fs::File;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use twinbox_tests::gate::{Need, wait_until};
use twinbox_tests::netns::{Cable, Namespace};
use twinbox_tests::require;

/// A socket inside a namespace: sockets stay where they were made, whichever thread uses them.
fn socket(namespace: &Namespace) -> UdpSocket {
    let at = SocketAddr::new(namespace.address, 9_999);
    let file = File::open(namespace.file()).unwrap();
    let made = std::thread::spawn(move || {
        move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
        UdpSocket::bind(at).unwrap()
    });
    let socket = made.join().unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    socket
}

#[test]
fn it_passes_is_cut_and_restored() {
    require!(Need::Namespaces);
    let cable = Cable::new();
    let (a, b) = (socket(&cable.a), socket(&cable.b));
    let mut buffer = [0; 2_000];
    let mut passes = || {
        // A link that is down refuses to send, or loses what was sent.
        let _ = a.send_to(&[7; 1_000], b.local_addr().unwrap());
        b.recv_from(&mut buffer).is_ok()
    };
    let before = cable.a.bytes();
    wait_until(Duration::from_secs(10), "the cable to pass", &mut passes);
    assert!(cable.a.bytes().since(before).sent >= 1_000);
    cable.cut();
    wait_until(Duration::from_secs(10), "the cable to be cut", || !passes());
    assert!(!passes());
    cable.restore();
    wait_until(Duration::from_secs(10), "the cable to pass again", &mut passes);
}
