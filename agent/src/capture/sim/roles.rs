//! The primary is lost, the standby is promoted, the mail server goes on there; the first one comes back, keeps or hands over what it alone has, and is the standby from then on. Again and again.
//!
//! What is checked: at the promotion, everything fenced is on the new primary, and each group is in a state it had; at the return, every message of the one that comes back is on the other node, was there when
//! it was promoted, or is in rescue; afterwards all that `nodes` checks.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use tokio::runtime::Builder;
use twinbox_protocol::codec::CONTROL_MAX;
use twinbox_protocol::ids::{ContentHash, Incarnation, Lsn};
use twinbox_protocol::msg::ToStandby;
use twinbox_resync::node::{NodeState, Role};
use twinbox_resync::reconcile::Policy;

use super::nodes::{NAMES, Nodes};
use super::server::{GROUPS, each_below};
use crate::layout::{Grouping, Layout, Selection};
use crate::net::framed::FrameReader;
use crate::net::{Endpoint, NodeKey, PinnedPeers, Tuning};
use crate::resync::serve::{Lent, Us, serve};
use crate::resync::work::Job;
use crate::switch;

/// Contents of all files below a directory.
fn contents(root: &Path) -> BTreeSet<ContentHash> {
    let mut all = BTreeSet::new();
    if root.is_dir() {
        each_below(root, &mut |path, meta| {
            if meta.is_file() {
                all.insert(ContentHash::of(&fs::read(root.join(path)).unwrap()));
            }
        });
    }
    all
}

fn endpoint() -> Endpoint {
    let addr = "127.0.0.1:0".parse().ok();
    Endpoint::bind(addr, NodeKey::generate().unwrap(), PinnedPeers::new(), Tuning::default()).unwrap()
}

impl Nodes {
    /// The primary is lost, with its power or without; the standby takes over, if it may.
    pub(super) fn fail_over(&mut self) {
        if self.full {
            self.fill();
        }
        if self.standby.is_none() {
            self.start_standby();
        }
        if !self.handle().status().complete {
            return; // No mirror yet: `promote` refuses.
        }
        let (old, new, power) = (self.primary, self.other(), self.rng.one_in(2));
        self.count(if power { "primaries that lost power for good" } else { "primaries that were killed for good" });
        self.cut();
        self.engine = None;
        self.fences.clear();
        self.standby.take().unwrap().stop();
        switch::promote(&self.state_dir(new), "m").unwrap();
        if power {
            self.disks[old].lose_power();
            self.come_up(old);
        }
        let messages = self.server().messages.clone();
        self.tail = contents(&self.tree(old)).intersection(&messages).copied().collect();
        self.primary = new;
        self.away = true;
        {
            let (root, aside) = (self.tree(new), self.disks[new].path().join("aside"));
            let mut server = self.server();
            (server.root, server.aside) = (root, aside);
        }
        self.check_promises(true);
        self.server().reload();
        self.fork = contents(&self.tree(new));
        // Of another replica: what that one will have is not known.
        (self.seen, self.acknowledged) = (BTreeSet::new(), Lsn::ZERO);
        for group in GROUPS {
            let at = self.server().states[group].len() - 1;
            self.known.insert(group.into(), at);
        }
        self.start_primary();
    }

    /// The node that was lost is back: it steps down, resyncs and follows.
    pub(super) fn come_back(&mut self) {
        self.count("returns");
        let (old, new) = (self.other(), self.primary);
        let state = self.state_dir(old);
        let there = NodeState::open(&self.state_dir(new)).unwrap().mirror("m").unwrap().unwrap();
        switch::step_down(&state, "m", there.epoch).unwrap();
        let spec = self.spec(old, Role::Standby);
        let job = Job { node: NAMES[old].into(), spec, state_dir: state.clone(), winner: None, policy: Policy::Merge };
        let shown = self.resync(&job);
        job.finish().unwrap();
        *self.counts.entry("files kept in rescue").or_default() += shown.rescued as usize;
        let (here, kept) = (contents(&self.tree(new)), contents(&state.join("mirrors/m/rescue")));
        let safe = |hash: &&ContentHash| here.contains(hash) || kept.contains(hash) || self.fork.contains(hash);
        let lost: Vec<ContentHash> = self.tail.iter().filter(|hash| !safe(hash)).copied().collect();
        assert!(
            lost.is_empty(),
            "{} messages of the node that came back are nowhere: {lost:?}; {}; {}",
            lost.len(),
            shown.text,
            self.story(&lost)
        );
        self.away = false;
    }

    /// `twinbox resync apply`, over a connection of its own; the mail server works on meanwhile.
    fn resync(&self, job: &Job) -> crate::resync::work::Shown {
        let lent = Lent {
            root: self.tree(self.primary),
            mirror_dir: self.state_dir(self.primary).join("mirrors/m"),
            selection: Selection::new(Layout::Plain, vec![]),
            grouping: Grouping::new(vec![]),
            name: "m".into(),
            tool: Arc::default(),
            alone: Arc::default(),
        };
        let known = NodeState::open(&self.state_dir(self.primary)).unwrap().mirror("m").unwrap().unwrap();
        let (name, server) = (NAMES[self.primary], self.server.clone());
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        runtime.block_on(async {
            let (ours, theirs) = (endpoint(), endpoint());
            ours.pinned().pin(theirs.fingerprint(), name).unwrap();
            theirs.pinned().pin(ours.fingerprint(), "back").unwrap();
            let (addr, fingerprint) = (theirs.local_addr().unwrap(), theirs.fingerprint());
            let serving = tokio::spawn(async move {
                let incoming = theirs.accept().await.unwrap();
                let (mut send, recv) = incoming.connection.accept_bi().await.unwrap();
                let mut control = FrameReader::<ToStandby>::new(recv, CONTROL_MAX);
                let Some(ToStandby::Rejoin(hello)) = control.next().await.unwrap() else { panic!("no hello") };
                let us = Us { node: name, incarnation: Incarnation([1; 16]), known: &known };
                // The stream ends when everything was asked.
                let _ = serve(us, &hello, lent, &mut send, &mut control).await;
            });
            let connection = ours.dial(addr, fingerprint).await.unwrap();
            let act = move |_: &str, _: u64, _: Option<u64>| {
                let mut server = server.lock().unwrap();
                if server.left > 0 && server.rng.one_in(3) {
                    server.act();
                }
            };
            let shown = job.apply(&connection, &act).await.unwrap_or_else(|error| panic!("{error}"));
            serving.abort();
            shown
        })
    }
}
