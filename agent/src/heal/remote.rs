//! The standby as a healing primary sees it: hello, the rows it has beyond a position, and contents, on one control stream. No log is begun.
//!
//! Nothing it says is believed beyond its bounds: a content is as long as its row says or refused, and its hash is computed here.

use std::fs::File;
use std::io::Write;
use std::time::Duration;

use tokio::time::timeout;
use twinbox_protocol::codec::{CONTROL_MAX, check_entry};
use twinbox_protocol::entry::Entry;
use twinbox_protocol::hello::{Refusal, Verdict, compare};
use twinbox_protocol::ids::{ContentHash, Lsn, MirrorId};
use twinbox_protocol::msg::{Hello, Position, RefuseCode, ToPrimary, ToStandby};
use twinbox_protocol::path::RelPath;

use crate::net::framed::{FrameError, FrameReader, write_frame};

/// The standby may be finishing a long replay, or hashing a large file.
const ANSWER_WITHIN: Duration = Duration::from_secs(600);

/// Why the standby did not help.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RemoteError {
    /// The connection broke.
    #[error("connection to the standby lost: {0}")]
    Connection(#[from] quinn::ConnectionError),
    /// A frame could not be read or written.
    #[error("connection to the standby lost: {0}")]
    Frame(#[from] FrameError),
    /// It cannot now.
    #[error("the standby: {0}")]
    NotNow(String),
    /// It will not, whenever it is asked.
    #[error("the standby refuses: {0}")]
    Refused(String),
    /// Memories do not belong together.
    #[error(transparent)]
    Other(#[from] Refusal),
    /// No answer.
    #[error("the standby did not answer within {} s", ANSWER_WITHIN.as_secs())]
    Silent,
    /// What it said makes no sense here.
    #[error("the standby said something out of turn or damaged: {0}")]
    OutOfTurn(&'static str),
    /// A received content could not be kept.
    #[error("keeping a content of the standby: {0}")]
    Spool(#[from] std::io::Error),
}

impl RemoteError {
    /// Whether asking again later is of no use.
    #[must_use]
    pub fn is_final(&self) -> bool {
        matches!(self, RemoteError::Refused(_) | RemoteError::Other(_) | RemoteError::Spool(_))
    }
}

/// Gives contents.
pub trait Source {
    /// Writes the content of `path` (named `hash`, `size` bytes) to an empty file, and gives other names of that file; `None` when nobody has it.
    ///
    /// # Errors
    /// [`RemoteError`].
    fn fetch(&mut self, path: &RelPath, hash: ContentHash, size: u64, into: &mut File) -> Result<Option<Vec<RelPath>>, RemoteError>;
}

/// An open control stream.
pub struct Remote {
    send: quinn::SendStream,
    control: FrameReader<ToPrimary>,
}

/// What the greeting came to.
pub enum Greeting {
    /// It has this mirror's rows.
    Holds(Remote),
    /// It has nothing of this mirror: nothing can be pulled back.
    Nothing,
}

impl Remote {
    /// Says hello. Everything the standby had received is applied when this returns.
    ///
    /// # Errors
    /// [`RemoteError`].
    pub async fn greet(connection: &quinn::Connection, hello: Hello) -> Result<Greeting, RemoteError> {
        let (send, recv) = connection.open_bi().await?;
        let mut remote = Remote { send, control: FrameReader::new(recv, CONTROL_MAX) };
        write_frame(&mut remote.send, &ToStandby::Hello(Box::new(hello.clone()))).await?;
        let ToPrimary::Welcome(welcome) = remote.answer().await? else { return Err(RemoteError::OutOfTurn("no welcome")) };
        match compare(&hello, &welcome) {
            Verdict::Refuse { why } => Err(why.into()),
            Verdict::FirstSync => Ok(Greeting::Nothing),
            _ if matches!(welcome.replica, twinbox_protocol::msg::Replica::Adopted { .. }) => Ok(Greeting::Nothing),
            _ => Ok(Greeting::Holds(remote)),
        }
    }

    /// Asks for contents only, beside a session.
    ///
    /// # Errors
    /// [`RemoteError`].
    pub async fn borrow(connection: &quinn::Connection, mirror: &str, mirror_id: MirrorId) -> Result<Self, RemoteError> {
        let (send, recv) = connection.open_bi().await?;
        let mut remote = Remote { send, control: FrameReader::new(recv, CONTROL_MAX) };
        write_frame(&mut remote.send, &ToStandby::Borrow { mirror: mirror.into(), mirror_id }).await?;
        Ok(remote)
    }

    async fn answer(&mut self) -> Result<ToPrimary, RemoteError> {
        loop {
            let message = timeout(ANSWER_WITHIN, self.control.next()).await.map_err(|_| RemoteError::Silent)??;
            return match message.ok_or(RemoteError::OutOfTurn("end of the stream"))? {
                ToPrimary::Heartbeat { .. } | ToPrimary::Problem { .. } => continue,
                ToPrimary::Refuse { code: RefuseCode::Failed | RefuseCode::Busy, message } => Err(RemoteError::NotNow(message)),
                ToPrimary::Refuse { message, .. } => Err(RemoteError::Refused(message)),
                other => Ok(other),
            };
        }
    }

    /// Rows set and paths removed after `since`; gives the position they are as of.
    ///
    /// # Errors
    /// [`RemoteError`], or the sink's.
    pub async fn rows<E: From<RemoteError>>(
        &mut self,
        since: Lsn,
        mut sink: impl FnMut(RelPath, Option<Entry>) -> Result<(), E>,
    ) -> Result<Position, E> {
        let asked = write_frame(&mut self.send, &ToStandby::Pull { since: Some(since) }).await;
        asked.map_err(RemoteError::from)?;
        loop {
            match self.answer().await? {
                ToPrimary::Rows { rows } => {
                    for (path, entry) in rows {
                        if entry.as_ref().is_some_and(|entry| check_entry(entry).is_err()) {
                            return Err(RemoteError::OutOfTurn("an entry that cannot be").into());
                        }
                        sink(path, entry)?;
                    }
                }
                ToPrimary::RowsEnd { position, .. } => return Ok(position),
                _ => return Err(RemoteError::OutOfTurn("no rows").into()),
            }
        }
    }

    /// As [`Source::fetch`].
    ///
    /// # Errors
    /// [`RemoteError`].
    pub async fn fetch(
        &mut self,
        path: &RelPath,
        hash: ContentHash,
        size: u64,
        into: &mut File,
    ) -> Result<Option<Vec<RelPath>>, RemoteError> {
        write_frame(&mut self.send, &ToStandby::Fetch { path: path.clone(), hash }).await?;
        let (mut hasher, mut got, mut names) = (blake3::Hasher::new(), 0u64, vec![]);
        loop {
            match self.answer().await? {
                ToPrimary::Names { paths } if got == 0 && names.is_empty() => names = paths,
                ToPrimary::Piece { bytes } => {
                    got += bytes.len() as u64;
                    if got > size {
                        return Err(RemoteError::OutOfTurn("more bytes than the content has"));
                    }
                    hasher.update(&bytes);
                    into.write_all(&bytes)?;
                }
                ToPrimary::Fetched { .. } if got == size && *hasher.finalize().as_bytes() == hash.0 => return Ok(Some(names)),
                ToPrimary::Fetched { .. } => return Err(RemoteError::OutOfTurn("other bytes than asked for")),
                ToPrimary::NotHere { .. } if got == 0 => return Ok(None),
                _ => return Err(RemoteError::OutOfTurn("no content")),
            }
        }
    }
}

/// A [`Remote`] for a thread that may wait.
pub struct Waiting {
    /// Of the runtime that drives the connection.
    pub runtime: tokio::runtime::Handle,
    /// The stream.
    pub remote: Remote,
}

impl Source for Waiting {
    fn fetch(&mut self, path: &RelPath, hash: ContentHash, size: u64, into: &mut File) -> Result<Option<Vec<RelPath>>, RemoteError> {
        self.runtime.block_on(self.remote.fetch(path, hash, size, into))
    }
}

#[cfg(test)]
#[path = "remote_tests.rs"]
mod tests;
