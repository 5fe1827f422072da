//! When a mirror's protection has changed for good: what is told to hooks, once for each change.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::hooks::Hook;
use crate::status::{MirrorState, MirrorStatus};

/// A standby that is away for less is nobody's business at night.
const UNPROTECTED_FOR: Duration = Duration::from_secs(5);

#[derive(Default)]
struct Mirror {
    told: Option<Hook>,
    seen: Option<(Hook, Instant)>,
}

/// What has been told of each mirror.
#[derive(Default)]
pub(super) struct Events(BTreeMap<String, Mirror>);

fn is(status: &MirrorStatus) -> Hook {
    match status.state {
        MirrorState::Diverged => Hook::OnDiverged,
        _ if status.stalled.is_some() => Hook::OnStall,
        MirrorState::Protected => Hook::OnProtected,
        MirrorState::Unprotected | MirrorState::Syncing => Hook::OnUnprotected,
    }
}

impl Events {
    /// What is to be told now.
    pub(super) fn look(&mut self, status: &[MirrorStatus], now: Instant) -> Vec<(Hook, String)> {
        let mut tell = vec![];
        for one in status {
            let (mirror, is) = (self.0.entry(one.name.clone()).or_default(), is(one));
            let since = match mirror.seen {
                Some((seen, since)) if seen == is => since,
                _ => mirror.seen.insert((is, now)).1,
            };
            let lasts = is != Hook::OnUnprotected || now.duration_since(since) >= UNPROTECTED_FOR;
            if lasts && mirror.told != Some(is) {
                mirror.told = Some(is);
                tell.push((is, one.name.clone()));
            }
        }
        tell
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Role;
    use crate::roles::MirrorSpec;

    #[test]
    fn each_change_is_told_once_and_a_short_absence_never() {
        let spec = MirrorSpec {
            name: "mail".into(),
            root: "/srv".into(),
            layout: "plain".into(),
            role: twinbox_resync::node::Role::Primary,
            selection: crate::layout::Selection::new(crate::layout::Layout::Plain, vec![]),
            grouping: crate::layout::Grouping::default(),
            adopt: false,
            sweep: None,
            fuzzy_after: None,
            tool: std::sync::Arc::default(),
        };
        let history = twinbox_resync::node::MirrorState {
            mirror_id: twinbox_protocol::ids::MirrorId([0; 16]),
            role: twinbox_resync::node::Role::Primary,
            lineage: twinbox_protocol::lineage::Lineage::begin(twinbox_protocol::ids::Generation([0; 16]), "a"),
            epoch: twinbox_protocol::ids::Epoch(1),
            digest_key: twinbox_protocol::digest::DigestKey([0; 32]),
            reserved: twinbox_protocol::ids::Lsn::ZERO,
            complete: true,
        };
        let (mut events, begin) = (Events::default(), Instant::now());
        let mut at = |second: u64, state| {
            let status = [MirrorStatus::idle(&spec, &history, Role::Primary, state, String::new())];
            events.look(&status, begin + Duration::from_secs(second)).into_iter().map(|(hook, _)| hook).collect::<Vec<_>>()
        };
        use MirrorState::{Diverged, Protected, Unprotected};
        assert_eq!(at(0, Unprotected), []);
        assert_eq!(at(2, Protected), [Hook::OnProtected]);
        assert_eq!(at(10, Unprotected), []);
        assert_eq!(at(14, Unprotected), []);
        assert_eq!(at(14, Protected), [], "back in time");
        assert_eq!(at(20, Unprotected), []);
        assert_eq!(at(25, Unprotected), [Hook::OnUnprotected]);
        assert_eq!(at(60, Unprotected), []);
        assert_eq!(at(61, Diverged), [Hook::OnDiverged]);
        assert_eq!(at(62, Protected), [Hook::OnProtected]);
    }
}
