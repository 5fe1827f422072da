//! Comparison of what two nodes remember, as a pure function. In doubt it refuses: a wrong refusal costs an operator's minute,
//! a wrong agreement costs mail.

use crate::ids::Lsn;
use crate::lineage::{Relation, Side, relate};
use crate::msg::{Hello, Replica, Welcome};

/// What the primary does next.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Both at the same position with the same digest: go on from there.
    Continue,
    /// The standby is ahead (its last acks were lost): pull rows changed since our position.
    PullSince(Lsn),
    /// Memories do not join up, but the history is one: pull the whole manifest.
    PullAll {
        /// For the log.
        why: &'static str,
    },
    /// The standby has nothing: everything is to be shipped.
    FirstSync,
    /// Do not replicate.
    Refuse {
        /// For people.
        why: Refusal,
    },
}

/// Why not.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// Other wire protocol.
    #[error("the peer speaks protocol {theirs}, this node {ours}: install the same twinbox version on both")]
    Protocol {
        /// Ours.
        ours: u32,
        /// Theirs.
        theirs: u32,
    },
    /// Other chunker.
    #[error("the peer cuts chunks with `{theirs}`, this node with `{ours}`: install the same twinbox version on both")]
    Chunker {
        /// Ours.
        ours: String,
        /// Theirs.
        theirs: String,
    },
    /// Other history.
    #[error(
        "the standby follows another history (its generation {theirs}, ours {ours}): one of the two has been primary on its own; nothing was changed on either side"
    )]
    OtherGeneration {
        /// Ours.
        ours: crate::ids::Generation,
        /// Theirs.
        theirs: crate::ids::Generation,
    },
    /// The standby knows of a promotion that this node does not.
    #[error(
        "the standby follows a newer history (its generation {theirs}, ours {ours}): this node is not the primary any more; nothing was changed on either side"
    )]
    Superseded {
        /// Ours.
        ours: crate::ids::Generation,
        /// Theirs.
        theirs: crate::ids::Generation,
    },
    /// Same generation and position, other log.
    #[error(
        "both nodes are at LSN {at} of the same generation with different logs: one was restored from a copy; nothing was changed on either side"
    )]
    ForkedAt {
        /// Where.
        at: Lsn,
    },
}

/// Compares. See ARCHITECTURE §5 for the table.
#[must_use]
pub fn compare(hello: &Hello, welcome: &Welcome) -> Verdict {
    if welcome.protocol != hello.protocol {
        return Verdict::Refuse { why: Refusal::Protocol { ours: hello.protocol, theirs: welcome.protocol } };
    }
    if welcome.chunker != hello.chunker {
        return Verdict::Refuse { why: Refusal::Chunker { ours: hello.chunker.clone(), theirs: welcome.chunker.clone() } };
    }
    let (lineage, epoch, position, digest, chain_at_ours) = match &welcome.replica {
        Replica::Empty => return Verdict::FirstSync,
        Replica::Adopted { .. } => return Verdict::PullAll { why: "the standby adopted files it already had" },
        Replica::Holds { lineage, epoch, position, digest, chain_at_yours, .. } => (lineage, *epoch, position, digest, chain_at_yours),
    };
    let ours = Side { lineage: &hello.lineage, epoch: hello.epoch, position: hello.position };
    let (ids, relation) = ((hello.lineage.generation(), lineage.generation()), relate(ours, Side { lineage, epoch, position: *position }));
    match relation {
        Relation::Same | Relation::Ahead => {}
        // Not by a promotion: they are terms of ours that we do not remember.
        Relation::Behind if epoch == hello.epoch => {
            return Verdict::PullAll { why: "the standby follows a newer history of this node, whose memory was put back from a copy" };
        }
        Relation::Behind => return Verdict::Refuse { why: Refusal::Superseded { ours: ids.0, theirs: ids.1 } },
        Relation::Forked { .. } | Relation::Unrelated => {
            return Verdict::Refuse { why: Refusal::OtherGeneration { ours: ids.0, theirs: ids.1 } };
        }
    }
    if position.lsn == hello.position.lsn {
        return if position.chain != hello.position.chain {
            Verdict::Refuse { why: Refusal::ForkedAt { at: position.lsn } }
        } else if *digest != hello.digest && position.lsn == Lsn::ZERO {
            Verdict::PullAll { why: "the standby has rows and no position" }
        } else if *digest != hello.digest {
            // What came back after a failback is marked as later than the position; if that is not it, everything is pulled.
            Verdict::PullSince(position.lsn)
        } else {
            Verdict::Continue
        };
    }
    if position.lsn < hello.position.lsn {
        return Verdict::PullAll { why: "the standby is behind what it had acknowledged" };
    }
    match chain_at_ours {
        Some(chain) if *chain == hello.position.chain => Verdict::PullSince(hello.position.lsn),
        Some(_) => Verdict::Refuse { why: Refusal::ForkedAt { at: hello.position.lsn } },
        None => Verdict::PullAll { why: "the standby no longer remembers the log at our position" },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::{Digest, DigestKey};
    use crate::ids::{ChainHash, Epoch, Generation, Incarnation, MirrorId};
    use crate::lineage::{Lineage, Term};
    use crate::msg::Position;

    fn at(lsn: u64, chain: u8) -> Position {
        Position { lsn: Lsn(lsn), chain: ChainHash([chain; 32]) }
    }

    fn hello() -> Hello {
        Hello {
            protocol: 1,
            software: String::new(),
            node: "a".into(),
            mirror: "m".into(),
            mirror_id: MirrorId([0; 16]),
            lineage: Lineage::begin(Generation([1; 16]), "a"),
            epoch: Epoch(1),
            incarnation: Incarnation([2; 16]),
            position: at(10, 1),
            digest: Digest([1; 4]),
            digest_key: DigestKey([0; 32]),
            chunker: "c".into(),
            layout: "maildir".into(),
            wall_ns: 0,
        }
    }

    fn welcome(replica: Replica) -> Welcome {
        Welcome {
            protocol: 1,
            software: String::new(),
            node: "b".into(),
            incarnation: Incarnation([3; 16]),
            chunker: "c".into(),
            replica,
            wall_ns: 0,
        }
    }

    fn holds(generation: u8, position: Position, digest: u64, chain_at_yours: Option<u8>) -> Replica {
        Replica::Holds {
            lineage: Lineage::begin(Generation([generation; 16]), "a"),
            epoch: Epoch(1),
            position,
            digest: Digest([digest; 4]),
            chain_at_yours: chain_at_yours.map(|c| ChainHash([c; 32])),
            complete: true,
        }
    }

    #[test]
    fn every_row_of_the_table() {
        let case = |replica| compare(&hello(), &welcome(replica));
        assert_eq!(case(Replica::Empty), Verdict::FirstSync);
        assert!(matches!(case(Replica::Adopted { rows: 1 }), Verdict::PullAll { .. }));
        assert_eq!(case(holds(1, at(10, 1), 1, Some(1))), Verdict::Continue);
        assert_eq!(case(holds(1, at(10, 1), 2, Some(1))), Verdict::PullSince(Lsn(10)));
        assert_eq!(case(holds(1, at(10, 2), 1, Some(2))), Verdict::Refuse { why: Refusal::ForkedAt { at: Lsn(10) } });
        assert_eq!(case(holds(1, at(12, 5), 1, Some(1))), Verdict::PullSince(Lsn(10)));
        assert_eq!(case(holds(1, at(12, 5), 1, Some(9))), Verdict::Refuse { why: Refusal::ForkedAt { at: Lsn(10) } });
        assert!(matches!(case(holds(1, at(12, 5), 1, None)), Verdict::PullAll { .. }));
        assert!(matches!(case(holds(1, at(9, 5), 1, None)), Verdict::PullAll { .. }));
        let refused = case(holds(2, at(10, 1), 1, Some(1)));
        assert!(matches!(refused, Verdict::Refuse { why: Refusal::OtherGeneration { .. } }), "{refused:?}");
        let term = |start| Term { generation: Generation([3; 16]), epoch: Epoch(2), node: "b".into(), start };
        let begun = |mut replica: Replica, start| {
            if let Replica::Holds { lineage, .. } = &mut replica {
                lineage.mint(term(start));
            }
            replica
        };
        assert!(matches!(case(begun(holds(1, at(10, 1), 1, Some(1)), at(10, 1))), Verdict::PullAll { .. }));
        let mut newer = begun(holds(1, at(10, 1), 1, Some(1)), at(10, 1));
        if let Replica::Holds { epoch, .. } = &mut newer {
            *epoch = Epoch(2);
        }
        let refused = case(newer);
        assert!(matches!(refused, Verdict::Refuse { why: Refusal::Superseded { .. } }), "{refused:?}");
        let mut promoted = hello();
        promoted.lineage.mint(term(at(10, 1)));
        assert_eq!(compare(&promoted, &welcome(holds(1, at(10, 1), 1, Some(1)))), Verdict::Continue);
        let refused = compare(&promoted, &welcome(holds(1, at(12, 5), 1, Some(1))));
        assert!(matches!(refused, Verdict::Refuse { why: Refusal::OtherGeneration { .. } }), "{refused:?}");
        let mut other = welcome(Replica::Empty);
        other.protocol = 2;
        assert!(matches!(compare(&hello(), &other), Verdict::Refuse { why: Refusal::Protocol { .. } }));
        other.protocol = 1;
        other.chunker = "d".into();
        assert!(matches!(compare(&hello(), &other), Verdict::Refuse { why: Refusal::Chunker { .. } }));
    }
}
