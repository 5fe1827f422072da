//! Which history a node follows, and how the histories of two nodes relate: pure functions, with every case in a table.
//!
//! A history is a list of terms. A term begins when a primary writes alone: at its first change after a promotion, and at its first change after it has lost its standby. Its random
//! [`Generation`] decides, never a number: two nodes promoted apart mint the same epoch. Because a term begins *before* a change is made that nobody else has, a tail can never look like "merely behind".

use std::cmp::Ordering;

use serde::{Deserialize, Serialize};

use crate::ids::{Epoch, Generation, Lsn};
use crate::msg::Position;

/// Most terms kept; older ones are of a history that every node has left.
pub const TERMS_MAX: usize = 256;

/// Most bytes of a node's name in a term.
pub const NODE_MAX: usize = 255;

/// A stretch of history that one primary wrote.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Term {
    /// Its id.
    pub generation: Generation,
    /// Number of the promotion it belongs to.
    pub epoch: Epoch,
    /// Who began it.
    pub node: String,
    /// It begins after this position of the term before.
    pub start: Position,
}

/// A history, oldest term first; never empty.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(try_from = "Terms")]
pub struct Lineage(Vec<Term>);

/// As it is read, before anything is believed.
#[derive(Deserialize)]
struct Terms(#[serde(deserialize_with = "crate::bounded::seq::<_, _, TERMS_MAX>")] Vec<Term>);

impl TryFrom<Terms> for Lineage {
    type Error = BadLineage;

    fn try_from(terms: Terms) -> Result<Self, BadLineage> {
        Lineage::try_from(terms.0)
    }
}

/// Not a history.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadLineage {
    /// No terms.
    #[error("a history without terms")]
    Empty,
    /// More than [`TERMS_MAX`] terms.
    #[error("a history of too many terms")]
    TooLong,
    /// Epochs or positions go backwards, or a generation comes twice.
    #[error("a history whose terms do not follow each other")]
    Disordered,
}

impl TryFrom<Vec<Term>> for Lineage {
    type Error = BadLineage;

    fn try_from(terms: Vec<Term>) -> Result<Self, BadLineage> {
        if terms.is_empty() {
            return Err(BadLineage::Empty);
        }
        if terms.len() > TERMS_MAX || terms.iter().any(|term| term.node.len() > NODE_MAX) {
            return Err(BadLineage::TooLong);
        }
        let follows = |pair: &[Term]| pair[0].epoch <= pair[1].epoch && pair[0].start.lsn <= pair[1].start.lsn;
        let ids: std::collections::BTreeSet<Generation> = terms.iter().map(|term| term.generation).collect();
        if !terms.windows(2).all(follows) || ids.len() != terms.len() {
            return Err(BadLineage::Disordered);
        }
        Ok(Lineage(terms))
    }
}

impl Lineage {
    /// A history that begins.
    #[must_use]
    pub fn begin(generation: Generation, node: &str) -> Self {
        Lineage(vec![Term { generation, epoch: Epoch(1), node: node.into(), start: Position::START }])
    }

    /// The terms, oldest first.
    #[must_use]
    pub fn terms(&self) -> &[Term] {
        &self.0
    }

    /// The newest term.
    #[must_use]
    pub fn last(&self) -> &Term {
        // Never empty: checked where one is made.
        &self.0[self.0.len() - 1]
    }

    /// Generation of the newest term.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.last().generation
    }

    /// Takes back every term after `generation`; `false` when that is none of ours.
    pub fn withdraw_after(&mut self, generation: Generation) -> bool {
        let found = self.0.iter().rposition(|term| term.generation == generation);
        found.inspect(|at| self.0.truncate(at + 1)).is_some()
    }

    /// Begins a term; the oldest are forgotten when there are too many. One does not begin before the term that it follows: a node whose memory of its position is gone does not know better.
    pub fn mint(&mut self, mut term: Term) {
        let last = self.last();
        term.epoch = term.epoch.max(last.epoch);
        if term.start.lsn < last.start.lsn {
            term.start = last.start;
        }
        self.0.push(term);
        let over = self.0.len().saturating_sub(TERMS_MAX);
        self.0.drain(..over);
    }
}

/// What a node says of itself.
#[derive(Clone, Copy, Debug)]
pub struct Side<'a> {
    /// History.
    pub lineage: &'a Lineage,
    /// Promotions it knows of: one more than the newest term's when it was promoted and nothing has changed since.
    pub epoch: Epoch,
    /// What the standby durably has, as this node knows.
    pub position: Position,
}

/// How a history relates to another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Relation {
    /// The same newest term.
    Same,
    /// Ours is the beginning of theirs.
    Behind,
    /// Theirs is the beginning of ours.
    Ahead,
    /// Both went on alone from here.
    Forked {
        /// The last position that both may have in common.
        since: Lsn,
    },
    /// Nothing in common.
    Unrelated,
}

/// How `ours` relates to `theirs`.
#[must_use]
pub fn relate(ours: Side<'_>, theirs: Side<'_>) -> Relation {
    let common = ours.lineage.0.iter().enumerate().rev().find_map(|(i, term)| {
        let j = theirs.lineage.0.iter().rposition(|other| other.generation == term.generation)?;
        Some((term, ours.lineage.0.get(i + 1), theirs.lineage.0.get(j + 1)))
    });
    let Some((term, our_next, their_next)) = common else { return Relation::Unrelated };
    // Whoever stayed in the common term may not have gone on in it past where a promoted standby left it. A primary that merely lost its standby left it where that had last answered: what came after was its own.
    let beyond = |stayed: Position, next: &Term| {
        let fork = stayed.lsn > next.start.lsn || (stayed.lsn == next.start.lsn && stayed.chain != next.start.chain);
        (next.epoch > term.epoch && fork).then_some(Relation::Forked { since: next.start.lsn })
    };
    match (our_next, their_next) {
        (None, None) => Relation::Same,
        (None, Some(next)) => beyond(ours.position, next).unwrap_or(Relation::Behind),
        (Some(next), None) => beyond(theirs.position, next).unwrap_or(Relation::Ahead),
        (Some(one), Some(other)) => Relation::Forked { since: one.start.lsn.min(other.start.lsn) },
    }
}

/// What a primary does that meets another one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Meeting {
    /// The other was promoted later: stop being primary at once.
    Yield,
    /// The other will.
    Stand,
    /// Nobody can tell: both refuse until an operator names the winner.
    Split,
    /// They are not primaries of one mirror.
    Unrelated,
}

/// Two primaries of one mirror have met.
///
/// The one that was promoted later stays, whatever the other has written: that is what its operator wanted, and what the other has is kept. Of equal promotions, which were made apart, the one that has
/// written nothing yields; if both have, nobody can tell.
#[must_use]
pub fn meet(ours: Side<'_>, theirs: Side<'_>) -> Meeting {
    match (ours.epoch.cmp(&theirs.epoch), relate(ours, theirs)) {
        (_, Relation::Unrelated) => Meeting::Unrelated,
        (Ordering::Less, _) | (Ordering::Equal, Relation::Behind) => Meeting::Yield,
        (Ordering::Greater, _) | (Ordering::Equal, Relation::Ahead) => Meeting::Stand,
        (Ordering::Equal, _) => Meeting::Split,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::{CONTROL_MAX, decode, encode};
    use crate::ids::ChainHash;

    fn at(lsn: u64) -> Position {
        Position { lsn: Lsn(lsn), chain: ChainHash([lsn as u8; 32]) }
    }

    /// `(generation, epoch, start)` of each term.
    fn lineage(terms: &[(u8, u64, u64)]) -> Lineage {
        let term = |(id, epoch, start): &(u8, u64, u64)| Term {
            generation: Generation([*id; 16]),
            epoch: Epoch(*epoch),
            node: "n".into(),
            start: at(*start),
        };
        Lineage::try_from(terms.iter().map(term).collect::<Vec<_>>()).unwrap()
    }

    /// History, promotions known of, position.
    type Node<'a> = (&'a [(u8, u64, u64)], u64, u64);

    #[track_caller]
    fn case(ours: Node<'_>, theirs: Node<'_>, relation: Relation, meeting: Meeting, why: &str) {
        let (a, b) = (lineage(ours.0), lineage(theirs.0));
        let a = Side { lineage: &a, epoch: Epoch(ours.1), position: at(ours.2) };
        let b = Side { lineage: &b, epoch: Epoch(theirs.1), position: at(theirs.2) };
        assert_eq!(relate(a, b), relation, "{why}");
        assert_eq!(meet(a, b), meeting, "{why}");
        let turned = match relation {
            Relation::Behind => Relation::Ahead,
            Relation::Ahead => Relation::Behind,
            other => other,
        };
        assert_eq!(relate(b, a), turned, "turned: {why}");
        let turned = match meeting {
            Meeting::Yield => Meeting::Stand,
            Meeting::Stand => Meeting::Yield,
            other => other,
        };
        assert_eq!(meet(b, a), turned, "turned: {why}");
    }

    #[test]
    fn every_row_of_the_table() {
        let first: &[_] = &[(1, 1, 0)];
        let forked = |since| Relation::Forked { since: Lsn(since) };
        case((first, 1, 9), (first, 2, 9), Relation::Same, Meeting::Yield, "promoted, and nothing was changed since: nothing has parted");
        case((first, 1, 7), (first, 2, 9), Relation::Same, Meeting::Yield, "the same, and the last acknowledgements were lost");
        case((first, 1, 9), (first, 1, 9), Relation::Same, Meeting::Split, "the state of one was copied");
        case((first, 2, 9), (first, 2, 9), Relation::Same, Meeting::Split, "both promoted, nobody wrote");
        case((first, 1, 9), (&[(1, 1, 0), (3, 2, 9)], 2, 9), Relation::Behind, Meeting::Yield, "died, the other was promoted and wrote");
        case((first, 1, 7), (&[(1, 1, 0), (3, 2, 9)], 2, 12), Relation::Behind, Meeting::Yield, "the same, acknowledgements lost");
        case(
            (first, 1, 10),
            (&[(1, 1, 0), (3, 2, 9)], 2, 12),
            forked(9),
            Meeting::Yield,
            "acknowledged more than the promoted one has: that was put back from a copy",
        );
        case(
            (first, 1, 7),
            (&[(1, 1, 0), (2, 1, 5)], 1, 5),
            Relation::Behind,
            Meeting::Yield,
            "a standby that a primary lost, and has more than that one heard of",
        );
        case(
            (&[(1, 1, 0), (2, 1, 9)], 1, 9),
            (&[(1, 1, 0), (3, 2, 9)], 2, 9),
            forked(9),
            Meeting::Yield,
            "a tail, and the other was promoted",
        );
        case(
            (&[(1, 1, 0), (2, 1, 7)], 1, 7),
            (&[(1, 1, 0), (3, 2, 9)], 2, 9),
            forked(7),
            Meeting::Yield,
            "the same, acknowledgements lost",
        );
        case(
            (&[(1, 1, 0), (2, 1, 9)], 1, 9),
            (first, 2, 9),
            Relation::Ahead,
            Meeting::Yield,
            "a tail, and the other was promoted and changed nothing",
        );
        case((&[(1, 1, 0), (2, 2, 9)], 2, 9), (&[(1, 1, 0), (3, 2, 9)], 2, 9), forked(9), Meeting::Split, "both promoted, both wrote");
        case((first, 2, 9), (&[(1, 1, 0), (3, 2, 9)], 2, 9), Relation::Behind, Meeting::Yield, "both promoted, the other wrote");
        case(
            (first, 3, 9),
            (&[(1, 1, 0), (3, 2, 9)], 2, 9),
            Relation::Behind,
            Meeting::Stand,
            "promoted after the other, without what that wrote",
        );
        case(
            (&[(1, 1, 0), (2, 1, 9)], 3, 9),
            (&[(1, 1, 0), (3, 2, 9)], 2, 9),
            forked(9),
            Meeting::Stand,
            "promoted again after the other, with its tail",
        );
        case((&[(1, 1, 0), (3, 2, 5), (4, 3, 8)], 3, 9), (first, 1, 5), Relation::Ahead, Meeting::Stand, "two promotions behind");
        case((&[(3, 2, 5), (4, 3, 8)], 3, 9), (first, 1, 5), Relation::Unrelated, Meeting::Unrelated, "too long ago to tell");
        case((&[(9, 1, 0)], 1, 5), (first, 1, 5), Relation::Unrelated, Meeting::Unrelated, "another store's");
    }

    #[test]
    fn the_same_position_of_another_log_is_a_fork() {
        let (ours, theirs) = (lineage(&[(1, 1, 0)]), lineage(&[(1, 1, 0), (3, 2, 9)]));
        let other = Position { lsn: Lsn(9), chain: ChainHash([77; 32]) };
        let relation =
            relate(Side { lineage: &ours, epoch: Epoch(1), position: other }, Side { lineage: &theirs, epoch: Epoch(2), position: at(12) });
        assert_eq!(relation, Relation::Forked { since: Lsn(9) });
    }

    #[test]
    fn a_history_survives_the_wire_and_nonsense_does_not() {
        let good = lineage(&[(1, 1, 0), (2, 1, 4), (3, 2, 4)]);
        assert_eq!(decode::<Lineage>(&encode(&good), CONTROL_MAX).unwrap(), good);
        let raw = |terms: &[(u8, u64, u64)]| {
            let terms: Vec<Term> = terms.iter().map(|term| lineage(&[*term]).last().clone()).collect();
            decode::<Lineage>(&encode(&terms), CONTROL_MAX)
        };
        assert!(raw(&[(1, 1, 0)]).is_ok());
        for bad in [&[][..], &[(1, 2, 0), (2, 1, 0)], &[(1, 1, 5), (2, 1, 4)], &[(1, 1, 0), (1, 1, 0)]] {
            assert!(raw(bad).is_err(), "{bad:?}");
        }
        let many: Vec<_> = (0..=TERMS_MAX as u64).map(|n| (n as u8, 1, n)).collect();
        assert!(raw(&many).is_err());
    }

    #[test]
    fn whatever_a_node_remembers_its_history_can_be_read_again() {
        let mut known = lineage(&[(1, 1, 0), (2, 2, 57)]);
        known.mint(Term { generation: Generation([3; 16]), epoch: Epoch(1), node: "n".into(), start: Position::START });
        assert_eq!(decode::<Lineage>(&encode(&known), CONTROL_MAX).unwrap(), known);
        assert_eq!((known.last().start, known.last().epoch), (at(57), Epoch(2)));
        assert!(known.withdraw_after(Generation([2; 16])) && known.generation() == Generation([2; 16]));
        assert!(!known.withdraw_after(Generation([3; 16])));
    }

    #[test]
    fn old_terms_are_forgotten() {
        let mut lineage = Lineage::begin(Generation([0; 16]), "n");
        for n in 1..=TERMS_MAX as u128 {
            lineage.mint(Term { generation: Generation(n.to_le_bytes()), epoch: Epoch(1), node: "n".into(), start: at(1) });
        }
        assert_eq!(lineage.terms().len(), TERMS_MAX);
        assert_eq!(lineage.generation(), Generation((TERMS_MAX as u128).to_le_bytes()));
        assert!(decode::<Lineage>(&encode(&lineage), CONTROL_MAX).is_ok());
    }
}
