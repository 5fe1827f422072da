//! The node that was promoted, as the one that comes back sees it. Nothing it says is believed beyond its bounds.

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use serde_bytes::ByteBuf;
use tokio::time::timeout;
use twinbox_protocol::codec::{CONTROL_MAX, check_entry};
use twinbox_protocol::digest::Digest;
use twinbox_protocol::entry::Entry;
use twinbox_protocol::ids::Lsn;
use twinbox_protocol::msg::{Hello, PIECE_MAX, Position, ToPrimary, ToStandby, Welcome};
use twinbox_protocol::path::RelPath;
use twinbox_protocol::rejoin::{ASKS_MAX, Ask, Changes, Found, Merge, Merged};

use crate::net::framed::{FrameError, FrameReader, write_frame};

/// It may be reading large files, or comparing a large store.
const ANSWER_WITHIN: Duration = Duration::from_secs(1800);

/// Why the other node did not help.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RemoteError {
    /// The connection broke.
    #[error("connection to the other node lost: {0}; run the command again, it goes on where it was")]
    Connection(#[from] quinn::ConnectionError),
    /// A frame could not be read or written.
    #[error("connection to the other node lost: {0}; run the command again, it goes on where it was")]
    Frame(#[from] FrameError),
    /// It will not.
    #[error("the other node refuses: {0}")]
    Refused(String),
    /// No answer.
    #[error("the other node did not answer within {} minutes", ANSWER_WITHIN.as_secs() / 60)]
    Silent,
    /// What it said makes no sense here.
    #[error("the other node said something out of turn or damaged: {0}")]
    OutOfTurn(&'static str),
}

/// An open stream.
pub(super) struct Remote {
    send: quinn::SendStream,
    control: FrameReader<ToPrimary>,
}

impl Remote {
    /// Says what this node is; gives what the other is.
    pub(super) async fn greet(connection: &quinn::Connection, hello: Hello) -> Result<(Self, Welcome), RemoteError> {
        let (send, recv) = connection.open_bi().await?;
        let mut remote = Remote { send, control: FrameReader::new(recv, CONTROL_MAX) };
        match remote.ask(&ToStandby::Rejoin(Box::new(hello))).await? {
            ToPrimary::Welcome(welcome) => Ok((remote, *welcome)),
            _ => Err(RemoteError::OutOfTurn("no welcome")),
        }
    }

    async fn answer(&mut self) -> Result<ToPrimary, RemoteError> {
        loop {
            let message = timeout(ANSWER_WITHIN, self.control.next()).await.map_err(|_| RemoteError::Silent)??;
            return match message.ok_or(RemoteError::OutOfTurn("end of the stream"))? {
                ToPrimary::Heartbeat { .. } | ToPrimary::Problem { .. } => continue,
                ToPrimary::Refuse { message, .. } => Err(RemoteError::Refused(message)),
                other => Ok(other),
            };
        }
    }

    async fn ask(&mut self, message: &ToStandby) -> Result<ToPrimary, RemoteError> {
        write_frame(&mut self.send, message).await?;
        self.answer().await
    }

    /// Rows of the fork: those changed after `since`, or all. Gives what they are as of.
    pub(super) async fn rows<E: From<RemoteError>>(
        &mut self,
        since: Option<Lsn>,
        mut sink: impl FnMut(RelPath, Option<Entry>) -> Result<(), E>,
    ) -> Result<(Position, Digest), E> {
        let mut message = self.ask(&ToStandby::Pull { since }).await?;
        loop {
            match message {
                ToPrimary::Rows { rows } => {
                    for (path, entry) in rows {
                        if entry.as_ref().is_some_and(|entry| check_entry(entry).is_err()) {
                            return Err(RemoteError::OutOfTurn("an entry that cannot be").into());
                        }
                        sink(path, entry)?;
                    }
                }
                ToPrimary::RowsEnd { position, digest } => return Ok((position, digest)),
                _ => return Err(RemoteError::OutOfTurn("no rows").into()),
            }
            message = self.answer().await?;
        }
    }

    /// What the other has of all this.
    pub(super) async fn find(&mut self, asks: BTreeSet<Ask>) -> Result<HashMap<Ask, Found>, RemoteError> {
        let (mut all, asks) = (HashMap::new(), asks.into_iter().collect::<Vec<_>>());
        for some in asks.chunks(ASKS_MAX) {
            let ToPrimary::Found { found } = self.ask(&ToStandby::Ask { asks: some.to_vec() }).await? else {
                return Err(RemoteError::OutOfTurn("no answer"));
            };
            if found.len() != some.len() || found.iter().flatten().any(|found| check_entry(&found.entry).is_err()) {
                return Err(RemoteError::OutOfTurn("other answers than questions"));
            }
            all.extend(some.iter().zip(found).filter_map(|(ask, found)| Some((ask.clone(), found?))));
        }
        Ok(all)
    }

    /// What the other has changed.
    pub(super) async fn changes(&mut self) -> Result<Changes, RemoteError> {
        match self.ask(&ToStandby::Changes).await? {
            ToPrimary::Changed(changes) => Ok(*changes),
            _ => Err(RemoteError::OutOfTurn("no changes")),
        }
    }

    /// Has a change made there; `bytes` are a message's.
    pub(super) async fn merge(&mut self, merge: Merge, bytes: Option<&File>) -> Result<Merged, RemoteError> {
        write_frame(&mut self.send, &ToStandby::Merge(Box::new(merge))).await?;
        if let Some(file) = bytes {
            let (mut buffer, mut at) = (vec![0; PIECE_MAX], 0);
            loop {
                // What is missing the other node notices by size and hash.
                let got = file.read_at(&mut buffer, at).unwrap_or(0);
                if got == 0 {
                    break;
                }
                at += got as u64;
                write_frame(&mut self.send, &ToStandby::Piece { bytes: ByteBuf::from(&buffer[..got]) }).await?;
            }
            write_frame(&mut self.send, &ToStandby::End).await?;
        }
        match self.answer().await? {
            ToPrimary::Merged(merged) => Ok(merged),
            _ => Err(RemoteError::OutOfTurn("no word of a merge")),
        }
    }
}
