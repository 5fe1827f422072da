//! Arbitrary text as a configuration: refused with a message fit for a terminal, or valid; valid ones survive being written, and a peer
//! can be added to them without changing anything else.
//!
//! Fuzzed by `fuzz_targets/config.rs`; the committed corpus is replayed by `agent/tests/corpus.rs`.

use twinbox::config::{Config, ConfigError, Peer, upsert_peer};

fn fit_for_a_terminal(error: &ConfigError) {
    let text = error.to_string();
    assert!(!text.is_empty() && !text.chars().any(|c| c.is_control() && c != '\n'), "{text:?}");
}

/// Panics when a promise of the configuration is broken.
pub(crate) fn check(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let config = match Config::parse(text) {
        Ok(config) => config,
        Err(error) => return fit_for_a_terminal(&error),
    };
    let again = Config::parse(&config.to_toml());
    assert_eq!(again.as_ref().ok(), Some(&config), "{again:?}");

    let addresses = vec!["192.0.2.7:7440".parse().expect("an address"), "[2001:db8::7]:7440".parse().expect("an address")];
    let fingerprint = Some("SHA256:0123456789abcdef".to_owned());
    let new = Peer { node: "added".parse().expect("a name"), addresses: addresses.clone(), fingerprint: fingerprint.clone() };
    let known = config.peers.first().map(|peer| Peer { node: peer.node.clone(), addresses, fingerprint });
    for peer in std::iter::once(new).chain(known) {
        match upsert_peer(text, &peer) {
            Ok(edited) => {
                let mut wanted = config.clone();
                match wanted.peers.iter_mut().find(|p| p.node == peer.node) {
                    Some(old) => *old = peer.clone(),
                    None => wanted.peers.push(peer.clone()),
                }
                assert_eq!(Config::parse(&edited).ok(), Some(wanted), "{edited}");
                assert_eq!(upsert_peer(&edited, &peer).ok().as_ref(), Some(&edited), "a second time changes it again");
            }
            Err(error) => fit_for_a_terminal(&error),
        }
    }
}
