//! `twinbox pair`: the two nodes learn each other's key and addresses by a one-time code. Works beside a running agent, which is told to read its configuration again.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, SystemTime};

use crate::admin::{self, Request};
use crate::cli::Pair;
use crate::config::{Config, Peer, upsert_peer_file};
use crate::exit::ExitCode;
use crate::failure::Failure;
use crate::net::{BindError, Endpoint, NodeKey, Offer, PairError, PairedPeer, PinnedPeers, Tuning, complete};

fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// Addresses of this machine that another may reach: from /proc, loopback and link-local left out.
fn own_addresses() -> Vec<IpAddr> {
    let mut out = vec![];
    let table = std::fs::read_to_string("/proc/net/fib_trie").unwrap_or_default();
    let mut last = None;
    for line in table.lines() {
        let line = line.trim();
        if let Some(text) = line.strip_prefix("|-- ") {
            last = text.parse::<std::net::Ipv4Addr>().ok();
        } else if line.starts_with("/32 host LOCAL")
            && let Some(ip) = last.filter(|ip| !ip.is_loopback() && !ip.is_link_local())
        {
            out.push(IpAddr::V4(ip));
        }
    }
    for line in std::fs::read_to_string("/proc/net/if_inet6").unwrap_or_default().lines() {
        let mut fields = line.split_whitespace();
        let (Some(hex), Some("00")) = (fields.next(), fields.nth(2)) else { continue };
        if let Ok(bits) = u128::from_str_radix(hex, 16) {
            out.push(IpAddr::V6(bits.into()));
        }
    }
    out.sort();
    out.dedup();
    out
}

/// Where the other node can reach `listen`.
fn reachable(listen: &[SocketAddr], given: &[SocketAddr]) -> Vec<SocketAddr> {
    if !given.is_empty() {
        return given.to_vec();
    }
    let mut out = vec![];
    for addr in listen {
        if addr.ip().is_unspecified() {
            let fits = |ip: &IpAddr| ip.is_ipv4() || addr.is_ipv6();
            out.extend(own_addresses().into_iter().filter(fits).map(|ip| SocketAddr::new(ip, addr.port())));
        } else {
            out.push(*addr);
        }
    }
    out.truncate(crate::net::code::ADDRS_MAX);
    out
}

/// Runs the command.
///
/// # Errors
/// [`Failure`].
pub async fn run(args: &Pair) -> Result<ExitCode, Failure> {
    let config = Config::load(&args.file.config)?;
    let key = NodeKey::load(&config.state.join("node.key"))?;
    let pins = PinnedPeers::new();
    let mine = reachable(&config.listen, &args.address);
    let peer = match &args.code {
        None => host(args, &config, key, pins, mine).await?,
        Some(code) => {
            let endpoint = Endpoint::bind(None, key, pins, Tuning::default())?;
            let peer = complete(&endpoint, code, config.node.as_str(), &mine, now()).await;
            let peer = peer.map_err(|error: PairError| Failure::new(ExitCode::Peer, error.to_string()))?;
            endpoint.close().await;
            peer
        }
    };
    let known = Peer { node: name(&peer)?, addresses: peer.addrs.clone(), fingerprint: Some(peer.fingerprint.to_string()) };
    upsert_peer_file(&args.file.config, &known)?;
    println!("Paired with {} (key {}).", peer.node, peer.fingerprint);
    match admin::request(&config.state, Request::Reload, Duration::from_secs(5)).await {
        Ok(_) => println!("The running agent has taken it over."),
        Err(_) => println!("Next: `twinbox run --config {}` (or start the service).", args.file.config.display()),
    }
    Ok(ExitCode::Ok)
}

fn name(peer: &PairedPeer) -> Result<crate::names::NodeName, Failure> {
    peer.node
        .parse()
        .map_err(|_| Failure::new(ExitCode::Peer, format!("the other node calls itself `{}`, which is no node name", peer.node)))
}

async fn host(args: &Pair, config: &Config, key: NodeKey, pins: PinnedPeers, mine: Vec<SocketAddr>) -> Result<PairedPeer, Failure> {
    let fingerprint = key.fingerprint();
    let listen = config.listen.first().copied();
    // The running agent has the port: wait on another one of the same address, just for the pairing.
    let (endpoint, offered) = match Endpoint::bind(listen, key.clone(), pins.clone(), Tuning::default()) {
        Ok(endpoint) => (endpoint, mine.clone()),
        Err(BindError::InUse { addr }) => {
            let endpoint = Endpoint::bind(Some(SocketAddr::new(addr.ip(), 0)), key, pins, Tuning::default())?;
            let port = endpoint.local_addr().map_err(|e| Failure::io("pairing", &e))?.port();
            (endpoint, mine.iter().map(|a| SocketAddr::new(a.ip(), port)).collect())
        }
        Err(error) => return Err(error.into()),
    };
    if offered.is_empty() {
        return Err(Failure::new(ExitCode::Usage, "this machine has no address another could reach: name one with --address IP:PORT"));
    }
    let failed = |error: crate::net::OfferError| Failure::new(ExitCode::Peer, error.to_string());
    let offer = Offer::new(config.node.as_str(), offered, fingerprint, now() + args.lifetime().as_secs()).map_err(failed)?;
    let code = offer.code();
    let mut open = endpoint.open_offer(offer, now()).map_err(failed)?;
    println!("{code}");
    eprintln!("On the other node: twinbox pair --config FILE {}…", &code[..code.len().min(24)]);
    eprintln!("The code is good once, for {} minutes. Waiting; Ctrl-C ends it.", args.expires);
    let paired = tokio::select! {
        paired = open.paired() => paired,
        _ = tokio::signal::ctrl_c() => return Err(Failure::new(ExitCode::Interrupted, "not paired; the code is void")),
    };
    let paired = paired.map_err(|ended| Failure::new(ExitCode::Peer, ended.to_string()))?;
    // The guest may not have read its answer yet: closing now would tell it that the pairing broke off.
    endpoint.finish().await;
    Ok(paired)
}
