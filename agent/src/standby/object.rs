//! A bulk object arriving: pieces in order, then its name.
//!
//! Disk work runs on tokio's blocking threads, one piece at a time for an object, so that a slow disk slows the stream and nothing else.

use std::sync::Arc;
use std::sync::mpsc::Sender;

use tokio::sync::OwnedSemaphorePermit;
use twinbox_protocol::ids::ContentHash;
use twinbox_protocol::msg::{BulkItem, ToPrimary};
use twinbox_protocol::ops::Seg;

use super::applier::Cmd;
use super::error::StandbyError;
use super::receiver::Event;
use super::room::RESERVE;
use super::shared::SessionShared;
use super::staging::{Finished, Part, Staging};

/// How much is written between looks at the room left.
const LOOK_EVERY: u64 = 16 * 1024 * 1024;

fn failed(error: std::io::Error) -> StandbyError {
    StandbyError::io("staging a bulk object", error)
}

struct Writing {
    part: Part,
    looked: u64,
    /// A source of a copy is not here: the object must come whole.
    incomplete: bool,
}

/// See the module's text. Dropped before its end, it leaves nothing.
pub struct ObjectWriter {
    session: Arc<SessionShared>,
    staging: Arc<Staging>,
    events: Sender<Event>,
    applier: Sender<Cmd>,
    writing: Option<Writing>,
    /// Of the session, for one object.
    _room: OwnedSemaphorePermit,
}

impl ObjectWriter {
    pub(super) fn new(
        session: Arc<SessionShared>,
        staging: Arc<Staging>,
        events: Sender<Event>,
        applier: Sender<Cmd>,
        room: OwnedSemaphorePermit,
    ) -> Result<Self, StandbyError> {
        let part = staging.create().map_err(failed)?;
        Ok(ObjectWriter { session, staging, events, applier, writing: Some(Writing { part, looked: 0, incomplete: false }), _room: room })
    }

    /// Whoever waits for a content looks again.
    fn wake(&self) {
        let _ = self.events.send(Event::Staged);
        let _ = self.applier.send(Cmd::Wake);
    }

    /// Takes the next piece; `true` when the object is whole, durable and announced.
    ///
    /// # Errors
    /// [`StandbyError`]; the session has failed then, too, unless the object alone is at fault.
    pub async fn item(&mut self, item: BulkItem) -> Result<bool, StandbyError> {
        let Some(writing) = self.writing.take() else { return Ok(true) };
        let (staging, session, applier) = (self.staging.clone(), self.session.clone(), self.applier.clone());
        let done = tokio::task::spawn_blocking(move || write(writing, item, &staging, &session, &applier)).await;
        match done.map_err(|error| StandbyError::io("staging a bulk object", error)).and_then(|result| result) {
            Ok(Some(writing)) => {
                self.writing = Some(writing);
                Ok(false)
            }
            Ok(None) => {
                self.wake();
                Ok(true)
            }
            Err(error) => {
                self.session.fail(error.clone());
                Err(error)
            }
        }
    }
}

impl Drop for ObjectWriter {
    fn drop(&mut self) {
        self.writing = None;
        self.wake();
    }
}

/// One piece; `None` when it was the last.
fn write(
    mut writing: Writing,
    item: BulkItem,
    staging: &Arc<Staging>,
    session: &SessionShared,
    applier: &Sender<Cmd>,
) -> Result<Option<Writing>, StandbyError> {
    match item {
        BulkItem::Seg(_) if writing.incomplete => {}
        BulkItem::Seg(Seg::Data(bytes)) => writing.part.data(&bytes).map_err(failed)?,
        BulkItem::Seg(Seg::Hole(len)) => writing.part.hole(len).map_err(failed)?,
        BulkItem::Seg(Seg::Copy { from, offset, len }) => {
            let before = writing.part.len();
            let source = source(from, staging, applier);
            match source {
                Some(file) => writing.part.copy(&file, offset, len).map_err(failed)?,
                None => writing.incomplete = true,
            }
            writing.incomplete |= writing.part.len() != before.saturating_add(len);
        }
        BulkItem::End { hash, size } => {
            let copied = writing.incomplete || writing.part.copied();
            match if writing.incomplete { Finished::Wrong } else { writing.part.finish(hash, size).map_err(failed)? } {
                Finished::Staged => {
                    session.note_here(hash);
                    session.send(ToPrimary::Staged { hash });
                }
                // A source that was not there or changed meanwhile: the bytes themselves are needed.
                Finished::Wrong if copied => session.send(ToPrimary::Incomplete { hash }),
                Finished::Wrong => return Err(StandbyError::Damaged { hash, place: "a bulk object".into() }),
            }
            return Ok(None);
        }
    }
    if writing.part.len() >= writing.looked {
        writing.looked = writing.part.len() + LOOK_EVERY;
        if let Ok(stat) = rustix::fs::statvfs(staging.dir()) {
            let free = stat.f_bavail.saturating_mul(stat.f_frsize);
            if free < RESERVE {
                staging.make_room();
                return Err(StandbyError::Full { path: staging.dir().into(), free: free >> 20, need: RESERVE >> 20 });
            }
        }
    }
    Ok(Some(writing))
}

/// A file that should hold a content; whether it does shows at the object's end.
fn source(hash: ContentHash, staging: &Staging, applier: &Sender<Cmd>) -> Option<std::fs::File> {
    if staging.size(hash).is_some() {
        return staging.object(hash).ok();
    }
    let (reply, answer) = std::sync::mpsc::sync_channel(1);
    let reply = Box::new(move |files: Vec<std::fs::File>| {
        let _ = reply.send(files.into_iter().next());
    });
    applier.send(Cmd::Fetch { hash, hint: None, reply }).ok()?;
    answer.recv().ok().flatten()
}
