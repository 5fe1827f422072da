//! What tests of the capture are made of.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::channel;

use rustix::event::{EventfdFlags, eventfd};
use twinbox_protocol::digest::DigestKey;
use twinbox_protocol::ids::{Epoch, Generation, Incarnation, Lsn, MirrorId};
use twinbox_protocol::lineage::Lineage;
use twinbox_protocol::msg::{Replica, Welcome};
use twinbox_resync::node::{MirrorState, NodeState, Role};

use super::engine::Engine;
use super::{CaptureConfig, CaptureHandle};
use crate::layout::{Grouping, Layout, Selection};

/// The history of a mirror whose node knows none yet.
pub(super) fn history() -> MirrorState {
    MirrorState {
        mirror_id: MirrorId([1; 16]),
        role: Role::Primary,
        lineage: Lineage::begin(Generation([2; 16]), "a"),
        epoch: Epoch(1),
        digest_key: DigestKey([3; 32]),
        reserved: Lsn::ZERO,
        complete: false,
    }
}

/// Mirror `m` on the state the agent before left, or on none.
pub(super) fn config(root: &Path, state: &Path, life: u8) -> CaptureConfig {
    let node = NodeState::open(state).unwrap();
    let known = node.mirror("m").unwrap().unwrap_or_else(history);
    node.set_mirror("m", &known).unwrap();
    CaptureConfig {
        name: "m".into(),
        node: "a".into(),
        root: root.into(),
        state_dir: state.into(),
        mirror_dir: state.join("mirrors/m"),
        selection: Selection::new(Layout::Plain, vec![]),
        grouping: Grouping::new(vec![]),
        layout: "plain".into(),
        known,
        incarnation: Incarnation([life; 16]),
        window_bytes: 32 << 20,
        dirty_max: 200_000,
        sweep: None,
        fuzzy_after: None,
    }
}

/// An engine that does nothing by itself.
pub(super) fn engine(config: CaptureConfig) -> Engine {
    crate::sys::ignore_sigio();
    let (commands, receiver) = channel();
    let wake = Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap());
    let handle = CaptureHandle { commands, wake: wake.clone(), status: Arc::default(), pulse: Arc::default() };
    Engine::open(config, handle, receiver, wake).unwrap()
}

/// The answer of a standby that holds `replica`.
pub(super) fn welcome(chunker: String, replica: Replica) -> Welcome {
    Welcome {
        protocol: twinbox_protocol::PROTOCOL_VERSION,
        software: String::new(),
        node: "b".into(),
        incarnation: Incarnation([9; 16]),
        chunker,
        replica,
        wall_ns: 0,
    }
}
