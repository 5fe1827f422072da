//! The side of the node that was promoted: one control stream of one that comes back. Nothing is changed here but by `Merge`, and nothing is given away but rows of this mirror.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::timeout;
use twinbox_protocol::codec::check_entry;
use twinbox_protocol::entry::Entry;
use twinbox_protocol::msg::{Hello, PIECE_MAX, RefuseCode, Replica, ToPrimary, ToStandby, Welcome};
use twinbox_protocol::rejoin::{Merge, Task};
use twinbox_resync::node::MirrorState;

pub use super::store::Lent;
use super::store::{Store, StoreError};
use crate::capture::engine::wall_ns;
use crate::net::{FrameError, FrameReader, write_frame};

/// No message is larger, and no file that somebody would give back over the network.
const CONTENT_MAX: u64 = 16 << 30;
/// The bytes of a message come one after the other.
const PIECE_WITHIN: Duration = Duration::from_secs(60);

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The connection.
    #[error("{0}")]
    Frame(#[from] FrameError),
    /// The store.
    #[error("{0}")]
    Store(#[from] StoreError),
    /// A message's bytes could not be kept.
    #[error("keeping a message on its way: {0}")]
    Spool(#[from] std::io::Error),
    /// The peer said something else than it may.
    #[error("the peer broke the protocol: {0}")]
    Protocol(&'static str),
    /// Another stream of this mirror is open.
    #[error("another resync of this mirror is under way: try again in a minute")]
    Busy,
    /// A thread of ours ended.
    #[error("cut short")]
    Ended,
}

/// What this node says of itself.
pub(crate) struct Us<'a> {
    pub(crate) node: &'a str,
    pub(crate) incarnation: twinbox_protocol::ids::Incarnation,
    pub(crate) known: &'a MirrorState,
}

/// Runs a step where it may block.
async fn step<T: Send + 'static>(
    store: Store,
    work: impl FnOnce(&mut Store) -> Result<T, StoreError> + Send + 'static,
) -> Result<(Store, T), ServeError> {
    let done = tokio::task::spawn_blocking(move || {
        let mut store = store;
        let done = work(&mut store);
        (store, done)
    });
    let (store, done) = done.await.map_err(|_| ServeError::Ended)?;
    Ok((store, done?))
}

/// Answers until the stream ends.
///
/// # Errors
/// [`ServeError`]; the caller tells the peer.
pub(crate) async fn serve(
    us: Us<'_>,
    hello: &Hello,
    lent: Lent,
    send: &mut quinn::SendStream,
    control: &mut FrameReader<ToStandby>,
) -> Result<(), ServeError> {
    // A stream that broke may still be at its last step.
    let _alone = timeout(PIECE_WITHIN, lent.alone.clone().lock_owned()).await.map_err(|_| ServeError::Busy)?;
    let spool = lent.mirror_dir.clone();
    let opened = tokio::task::spawn_blocking(move || Store::open(&lent)).await.map_err(|_| ServeError::Ended)?;
    let theirs = hello.position.lsn;
    let (mut store, (position, digest, chain_at_yours)) = step(opened?, move |store| store.position(theirs)).await?;
    let welcome = Welcome {
        protocol: twinbox_protocol::PROTOCOL_VERSION,
        software: env!("CARGO_PKG_VERSION").into(),
        node: us.node.into(),
        incarnation: us.incarnation,
        chunker: twinbox_protocol::chunk::CHUNKER.into(),
        replica: Replica::Holds {
            lineage: us.known.lineage.clone(),
            epoch: us.known.epoch,
            position,
            digest,
            chain_at_yours,
            complete: true,
        },
        wall_ns: wall_ns(),
    };
    write_frame(send, &ToPrimary::Welcome(Box::new(welcome))).await?;
    tracing::info!(mirror = %hello.mirror, peer = %hello.node, lsn = %position.lsn, "a node that was primary compares itself with this one");
    while let Some(message) = control.next().await? {
        match message {
            ToStandby::Pull { since } => {
                let (rows, mut batches) = mpsc::channel(4);
                let sent = tokio::spawn(step(store, move |store| {
                    crate::link::rows::send(store.manifest(), since, position, &rows).map(|_| ()).map_err(StoreError::from)
                }));
                while let Some(batch) = batches.recv().await {
                    write_frame(send, &batch).await?;
                }
                (store, ()) = sent.await.map_err(|_| ServeError::Ended)??;
            }
            ToStandby::Ask { asks } => {
                let found;
                (store, found) = step(store, move |store| asks.iter().map(|ask| store.find(ask)).collect()).await?;
                write_frame(send, &ToPrimary::Found { found }).await?;
            }
            ToStandby::Changes => {
                let changes;
                (store, changes) = step(store, Store::changes).await?;
                write_frame(send, &ToPrimary::Changed(Box::new(changes))).await?;
            }
            ToStandby::Merge(merge) => {
                if let Merge::Message { entry, .. }
                | Merge::File { entry, .. }
                | Merge::Dir { entry, .. }
                | Merge::Server { task: Task::Import { entry, .. }, .. } = &*merge
                    && (check_entry(entry).is_err() || entry.size() > CONTENT_MAX)
                {
                    return Err(ServeError::Protocol("an entry that cannot be"));
                }
                let bytes = match &*merge {
                    Merge::Message { entry, .. } | Merge::File { entry, .. } | Merge::Server { task: Task::Import { entry, .. }, .. } => {
                        Some(receive(entry, &spool, control).await?)
                    }
                    _ => None,
                };
                let merged;
                (store, merged) = step(store, move |store| store.merge(&merge, bytes.as_ref())).await?;
                write_frame(send, &ToPrimary::Merged(merged)).await?;
            }
            ToStandby::Heartbeat { seq, .. } => write_frame(send, &ToPrimary::Heartbeat { seq, wall_ns: wall_ns() }).await?,
            _ => return Err(ServeError::Protocol("out of turn")),
        }
    }
    Ok(())
}

/// The bytes of a message, in an unnamed file: as many as the entry says, with the name it says.
async fn receive(entry: &Entry, spool: &Path, control: &mut FrameReader<ToStandby>) -> Result<File, ServeError> {
    let (mut file, mut hasher, mut got) = (tempfile::tempfile_in(spool)?, blake3::Hasher::new(), 0u64);
    loop {
        let message = timeout(PIECE_WITHIN, control.next()).await.map_err(|_| ServeError::Protocol("a message was cut short"))??;
        match message {
            Some(ToStandby::Piece { bytes }) if bytes.len() <= PIECE_MAX => {
                got += bytes.len() as u64;
                if got > entry.size() {
                    return Err(ServeError::Protocol("more bytes than the message has"));
                }
                hasher.update(&bytes);
                file.write_all(&bytes)?;
            }
            Some(ToStandby::End) if got == entry.size() && entry.hash().is_some_and(|hash| hash.0 == *hasher.finalize().as_bytes()) => {
                return Ok(file);
            }
            _ => return Err(ServeError::Protocol("other bytes than announced")),
        }
    }
}

/// A refusal.
pub(crate) fn refuse(message: String) -> ToPrimary {
    ToPrimary::Refuse { code: RefuseCode::Diverged, message }
}
