//! The primary's side of the log: numbers transactions, chains them, and keeps those that are not yet durable, to be sent again where a session ends before they are.
//!
//! Sans-I/O. Invariants: an LSN leaves [`Outbox::seal`] only below the ceiling given by [`Outbox::handle_reserved`], which the caller raises after the new
//! ceiling is on disk, so that no LSN is ever issued twice; acknowledgements only move forward.

use std::collections::VecDeque;

use crate::codec;
use crate::digest::Digest;
use crate::ids::{ChainHash, Lsn};
use crate::msg::Position;
use crate::ops::{LogFrame, Op, Seal};

/// Frames are closed at about this many bytes, so that a large txn streams.
pub const PART_BYTES: usize = 1024 * 1024;

/// Hashes frames of one transaction onto the chain.
pub struct Chain(blake3::Hasher);

impl Chain {
    /// Starts a record after `prev`.
    #[must_use]
    pub fn after(prev: ChainHash) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&prev.0);
        Chain(hasher)
    }

    /// Takes the body of the record's next frame.
    pub fn update(&mut self, body: &[u8]) {
        self.0.update(&(body.len() as u64).to_le_bytes());
        self.0.update(body);
    }

    /// The chain at this record.
    #[must_use]
    pub fn finish(&self) -> ChainHash {
        ChainHash(*self.0.finalize().as_bytes())
    }
}

/// A transaction that is on its way.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct InFlight {
    /// Its position.
    pub position: Position,
    /// Encoded bytes before compression.
    pub bytes: usize,
    /// Digest after it.
    pub digest: Digest,
    /// When its cut was taken.
    pub captured_ns: i64,
    /// Bodies of its frames.
    pub frames: Vec<Vec<u8>>,
}

/// Why an acknowledgement makes no sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the standby acknowledged LSN {lsn}, which is not in flight")]
pub struct BadAck {
    /// What it said.
    pub lsn: Lsn,
}

/// See the module's text.
pub struct Outbox {
    last: Position,
    durable: Position,
    next: Lsn,
    ceiling: Lsn,
    in_flight: VecDeque<InFlight>,
    bytes: usize,
}

impl Outbox {
    /// Goes on after `last`, with numbers above `used`; nothing may be issued before [`Outbox::handle_reserved`].
    #[must_use]
    pub fn new(last: Position, used: Lsn) -> Self {
        let next = last.lsn.max(used).next();
        Outbox { last, durable: last, next, ceiling: Lsn(next.0 - 1), in_flight: VecDeque::new(), bytes: 0 }
    }

    /// Every LSN up to `ceiling` is reserved on disk.
    pub fn handle_reserved(&mut self, ceiling: Lsn) {
        self.ceiling = self.ceiling.max(ceiling);
    }

    /// Whether the caller must reserve more before the next [`Outbox::seal`].
    #[must_use]
    pub fn wants_reserve(&self) -> bool {
        self.next > self.ceiling
    }

    /// The number the next transaction will get.
    #[must_use]
    pub fn next_lsn(&self) -> Lsn {
        self.next
    }

    /// Last position issued.
    #[must_use]
    pub fn last(&self) -> Position {
        self.last
    }

    /// The newest position that is durable on the standby: what is in flight goes on from it.
    #[must_use]
    pub fn durable(&self) -> Position {
        self.durable
    }

    /// Bytes not yet durable on the standby.
    #[must_use]
    pub fn bytes_in_flight(&self) -> usize {
        self.bytes
    }

    /// Transactions not yet durable on the standby, oldest first.
    pub fn in_flight(&self) -> impl ExactSizeIterator<Item = &InFlight> {
        self.in_flight.iter()
    }

    /// Numbers a transaction and encodes it: bodies of its frames, in order. `None` when no LSN is reserved.
    pub fn seal(&mut self, ops: Vec<Op>, flags: u8, digest: Digest, captured_ns: i64) -> Option<(Lsn, Vec<Vec<u8>>)> {
        if self.wants_reserve() {
            return None;
        }
        let (prev, lsn) = (self.last.lsn, self.next);
        self.next = lsn.next();
        let seal = Seal { digest, ops: ops.len() as u64 };
        let (mut frames, mut chain) = (vec![], Chain::after(self.last.chain));
        let (mut batch, mut weight) = (vec![], 0);
        let mut ops = ops.into_iter().peekable();
        loop {
            if let Some(op) = ops.next() {
                weight += op.weight();
                batch.push(op);
            }
            let end = ops.peek().is_none();
            if end || weight >= PART_BYTES {
                let part = frames.len() as u32;
                let frame = LogFrame { lsn, prev, part, flags, captured_ns, ops: std::mem::take(&mut batch), seal: end.then_some(seal) };
                let body = codec::encode(&frame);
                chain.update(&body);
                frames.push(body);
                weight = 0;
            }
            if end {
                break;
            }
        }
        self.last = Position { lsn, chain: chain.finish() };
        let bytes = frames.iter().map(Vec::len).sum();
        self.bytes += bytes;
        self.in_flight.push_back(InFlight { position: self.last, bytes, digest, captured_ns, frames: frames.clone() });
        Some((lsn, frames))
    }

    /// The standby says everything up to `lsn` is durable. Gives the newest record that became so, if any did.
    ///
    /// # Errors
    /// [`BadAck`] for an LSN that was never issued.
    pub fn handle_durable(&mut self, lsn: Lsn) -> Result<Option<InFlight>, BadAck> {
        if lsn > self.last.lsn {
            return Err(BadAck { lsn });
        }
        let mut newest = None;
        while let Some(first) = self.in_flight.front().filter(|f| f.position.lsn <= lsn) {
            self.bytes -= first.bytes;
            newest = self.in_flight.pop_front();
        }
        if let Some(newest) = &newest {
            self.durable = newest.position;
        }
        Ok(newest)
    }

    /// The session ended and the next does not go on from what was durable, but from `from`: whatever is not durable is forgotten (its paths are dirty again).
    /// LSNs issued since stay used: numbering goes on above them.
    pub fn handle_restart(&mut self, from: Position) {
        self.next = self.next.max(from.lsn.next());
        self.ceiling = self.ceiling.max(from.lsn);
        self.in_flight.clear();
        self.bytes = 0;
        self.last = from;
        self.durable = from;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::path::RelPath;

    fn ops(n: usize) -> Vec<Op> {
        (0..n).map(|i| Op::Remove { path: RelPath::new(format!("{i:0>200}").as_bytes()).unwrap() }).collect()
    }

    #[test]
    fn nothing_is_issued_above_the_reserved_ceiling() {
        let mut outbox = Outbox::new(Position::START, Lsn::ZERO);
        assert!(outbox.seal(ops(1), 0, Digest::default(), 0).is_none());
        outbox.handle_reserved(Lsn(2));
        assert_eq!(outbox.seal(ops(1), 0, Digest::default(), 0).unwrap().0, Lsn(1));
        assert_eq!(outbox.seal(ops(1), 0, Digest::default(), 0).unwrap().0, Lsn(2));
        assert!(outbox.seal(ops(1), 0, Digest::default(), 0).is_none());
    }

    #[test]
    fn a_large_txn_is_split_and_the_chain_covers_every_part() {
        let mut outbox = Outbox::new(Position::START, Lsn::ZERO);
        outbox.handle_reserved(Lsn(9));
        let (_, frames) = outbox.seal(ops(20_000), 0, Digest::default(), 5).unwrap();
        assert!(frames.len() > 3);
        let decoded: Vec<LogFrame> = frames.iter().map(|f| codec::decode_log(f).unwrap()).collect();
        assert_eq!(decoded.iter().map(|f| f.ops.len()).sum::<usize>(), 20_000);
        assert!(decoded.iter().enumerate().all(|(i, f)| f.part as usize == i && f.seal.is_some() == (i + 1 == frames.len())));
        let mut chain = Chain::after(ChainHash::ZERO);
        frames.iter().for_each(|f| chain.update(f));
        assert_eq!(chain.finish(), outbox.last().chain);
    }

    #[test]
    fn acks_move_forward_only_and_never_past_what_was_issued() {
        let mut outbox = Outbox::new(Position::START, Lsn::ZERO);
        outbox.handle_reserved(Lsn(9));
        for _ in 0..3 {
            outbox.seal(ops(1), 0, Digest::default(), 0).unwrap();
        }
        assert_eq!(outbox.handle_durable(Lsn(2)).unwrap().unwrap().position.lsn, Lsn(2));
        // What is left goes on from there, as it was sent.
        let left = outbox.in_flight().next().unwrap();
        assert_eq!((outbox.durable().lsn, codec::decode_log(&left.frames[0]).unwrap().prev), (Lsn(2), Lsn(2)));
        let mut chain = Chain::after(outbox.durable().chain);
        left.frames.iter().for_each(|body| chain.update(body));
        assert_eq!(chain.finish(), left.position.chain);
        assert_eq!(outbox.handle_durable(Lsn(1)), Ok(None));
        assert_eq!(outbox.in_flight().len(), 1);
        assert_eq!(outbox.handle_durable(Lsn(7)), Err(BadAck { lsn: Lsn(7) }));
        outbox.handle_durable(Lsn(3)).unwrap();
        assert_eq!(outbox.bytes_in_flight(), 0);
        outbox.seal(ops(1), 0, Digest::default(), 0).unwrap();
        outbox.handle_restart(Position { lsn: Lsn(3), chain: ChainHash::ZERO });
        assert_eq!(outbox.seal(ops(1), 0, Digest::default(), 0).unwrap().0, Lsn(5), "4 was issued once already");
    }
}
