//! Contents given back to a primary whose disk lost them.
//!
//! Only files of the replica that a row names are ever opened, beneath the root's descriptor, and only bytes whose hash is the one asked for are sent. Whoever asks waits until everything durable is
//! applied. Memory is one piece and the queue's few.

use std::fs::File;
use std::os::unix::fs::FileExt;

use serde_bytes::ByteBuf;
use tokio::sync::{mpsc, oneshot};
use twinbox_protocol::ids::ContentHash;
use twinbox_protocol::msg::{PIECE_MAX, ToPrimary};
use twinbox_protocol::path::RelPath;

use super::StandbyHandle;
use super::applier::Cmd;
use super::copy;
use super::error::StandbyError;

impl StandbyHandle {
    /// Sends the other names of the file, if there are any, and a content in pieces, then `Fetched`; or `NotHere`.
    ///
    /// # Errors
    /// [`StandbyError`], also when the receiving end is gone.
    pub async fn content(&self, path: RelPath, hash: ContentHash, out: mpsc::Sender<ToPrimary>) -> Result<(), StandbyError> {
        let (done, applied) = oneshot::channel();
        self.tell(Cmd::Barrier { reply: Box::new(move |result| drop(done.send(result))) })?;
        applied.await.map_err(|_| StandbyError::Stopped)??;
        let (named, names) = oneshot::channel();
        self.tell(Cmd::Names { path: path.clone(), reply: Box::new(move |names| drop(named.send(names))) })?;
        let paths = names.await.map_err(|_| StandbyError::Stopped)?;
        if !paths.is_empty() {
            out.send(ToPrimary::Names { paths }).await.map_err(|_| StandbyError::Superseded)?;
        }
        let (found, files) = oneshot::channel();
        self.tell(Cmd::Fetch { hash, hint: Some(path), reply: Box::new(move |files| drop(found.send(files))) })?;
        let files = files.await.map_err(|_| StandbyError::Stopped)?;
        tokio::task::spawn_blocking(move || send(files, hash, &out)).await.map_err(|_| StandbyError::Stopped)?
    }

    fn tell(&self, command: Cmd) -> Result<(), StandbyError> {
        self.applier.send(command).map_err(|_| StandbyError::Stopped)
    }
}

fn send(files: Vec<File>, hash: ContentHash, out: &mpsc::Sender<ToPrimary>) -> Result<(), StandbyError> {
    let say = |message| out.blocking_send(message).map_err(|_| StandbyError::Superseded);
    // Read twice rather than sent in vain: somebody may have changed the replica.
    let Some(file) = files.into_iter().find(|file| copy::hash(file).is_ok_and(|found| found == hash)) else {
        return say(ToPrimary::NotHere { hash });
    };
    let (mut buffer, mut at) = (vec![0; PIECE_MAX], 0);
    loop {
        match file.read_at(&mut buffer, at).map_err(|error| StandbyError::io("reading a content of the replica", error))? {
            0 => return say(ToPrimary::Fetched { hash }),
            n => {
                at += n as u64;
                say(ToPrimary::Piece { bytes: ByteBuf::from(&buffer[..n]) })?;
            }
        }
    }
}
