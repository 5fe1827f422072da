//! References to bytes: after this, an op needs nothing but its record and the objects pinned for it.
//!
//! Where a content is looked for: recent small ones, staging, the replica (as it is now; then once more when everything durable is applied), and last the primary (`Miss`).
//! Files of the replica are read while the applier may change them: what was read is only taken when its hash is right.

use std::fs::File;
use std::os::unix::fs::FileExt;

use serde_bytes::ByteBuf;
use twinbox_protocol::entry::Entry;
use twinbox_protocol::ids::{ContentHash, Lsn};
use twinbox_protocol::ops::{Content, INLINE_MAX, Op, Seg};
use twinbox_protocol::path::RelPath;

use super::applier::Cmd;
use super::error::StandbyError;
use super::receiver::{Event, Receiving};
use super::staging::Finished;

fn failed(error: std::io::Error) -> StandbyError {
    StandbyError::io("staging a content", error)
}

impl Receiving {
    /// The op with its content inline or staged and pinned for `lsn`.
    pub(super) fn resolve(&mut self, op: Op, lsn: Lsn) -> Result<Op, StandbyError> {
        let Op::Put { path, entry, content } = op else { return Ok(op) };
        let (hash, size) = (entry.hash().unwrap_or(ContentHash([0; 32])), entry.size());
        let content = match content {
            Content::Inline(bytes) => {
                if ContentHash::of(&bytes) != hash {
                    return Err(StandbyError::Damaged { hash, place: path.to_string() });
                }
                self.recent.note(hash, &bytes);
                Content::Inline(bytes)
            }
            Content::Recipe(segs) => match self.build(&segs, hash, size, lsn)? {
                Some(content) => content,
                None => self.find(hash, &entry, &path, lsn)?,
            },
            // Staged: the primary was told so before it named it; what is not here any more, it is asked for.
            Content::Known | Content::Staged => self.find(hash, &entry, &path, lsn)?,
        };
        Ok(Op::Put { path, entry, content })
    }

    /// Finds a whole content, asking the primary for it if need be.
    fn find(&mut self, hash: ContentHash, entry: &Entry, path: &RelPath, lsn: Lsn) -> Result<Content, StandbyError> {
        let size = entry.size();
        if let Some(content) = self.at_hand(hash, size, lsn)? {
            return Ok(content);
        }
        let files = self.fetch(hash, Some(path))?;
        if let Some(content) = self.take(files, hash, size, lsn)? {
            return Ok(content);
        }
        if self.applied_all()? {
            let files = self.fetch(hash, Some(path))?;
            if let Some(content) = self.take(files, hash, size, lsn)? {
                return Ok(content);
            }
        }
        self.settle()?;
        tracing::debug!(%hash, "a content is not known here: asked for");
        loop {
            if let Some(content) = self.at_hand(hash, size, lsn)? {
                return Ok(content);
            }
            // Once more, should it have come and be gone again: a full disk lets go of what no txn has named yet.
            if let Some(session) = &self.session {
                session.miss(hash);
            }
            self.wait(|event| if matches!(event, Event::Staged) { Ok(()) } else { Err(event) })?;
        }
    }

    /// From memory or staging.
    fn at_hand(&mut self, hash: ContentHash, size: u64, lsn: Lsn) -> Result<Option<Content>, StandbyError> {
        if let Some(bytes) = self.recent.find(hash) {
            return Ok((bytes.len() as u64 == size).then(|| Content::Inline(ByteBuf::from(bytes))));
        }
        if size == 0 && hash == ContentHash::of(&[]) {
            return Ok(Some(Content::Inline(ByteBuf::new())));
        }
        match self.staging.size(hash) {
            Some(staged) if staged == size && size <= INLINE_MAX as u64 => {
                let mut bytes = vec![0; size as usize];
                self.staging.object(hash).and_then(|file| file.read_exact_at(&mut bytes, 0)).map_err(failed)?;
                if ContentHash::of(&bytes) != hash {
                    self.staging.discard(hash);
                    return Ok(None);
                }
                // The record has it, and may be taken back before it is durable.
                self.staging.pin(hash, lsn);
                Ok(Some(Content::Inline(ByteBuf::from(bytes))))
            }
            Some(staged) if staged == size && self.staging.is_sound(hash).map_err(failed)? => {
                Ok(self.staging.pin(hash, lsn).then_some(Content::Staged))
            }
            _ => Ok(None),
        }
    }

    /// Asks the applier for files that should hold the content.
    fn fetch(&mut self, hash: ContentHash, hint: Option<&RelPath>) -> Result<Vec<File>, StandbyError> {
        let (token, sender) = (self.token(), self.sender.clone());
        let reply = Box::new(move |files| {
            let _ = sender.send(Event::Fetched { token, files });
        });
        self.ask(Cmd::Fetch { hash, hint: hint.cloned(), reply });
        self.wait(|event| match event {
            Event::Fetched { token: t, files } if t == token => Ok(files),
            other => Err(other),
        })
    }

    /// Makes everything durable and waits until the applier has applied it; `false` when it cannot now.
    fn applied_all(&mut self) -> Result<bool, StandbyError> {
        self.settle()?;
        let (token, sender) = (self.token(), self.sender.clone());
        let reply = Box::new(move |result| {
            let _ = sender.send(Event::Done { token, result });
        });
        self.ask(Cmd::Barrier { reply });
        let done = self.wait(|event| match event {
            Event::Done { token: t, result } if t == token => Ok(result),
            other => Err(other),
        })?;
        Ok(done.is_ok())
    }

    /// Reads a content from the first of `files` that really holds it.
    fn take(&mut self, files: Vec<File>, hash: ContentHash, size: u64, lsn: Lsn) -> Result<Option<Content>, StandbyError> {
        for file in files {
            if size <= INLINE_MAX as u64 {
                let mut bytes = vec![0; size as usize];
                if file.read_exact_at(&mut bytes, 0).is_ok() && ContentHash::of(&bytes) == hash {
                    self.recent.note(hash, &bytes);
                    return Ok(Some(Content::Inline(ByteBuf::from(bytes))));
                }
                continue;
            }
            self.check_room_for(size)?;
            let mut part = self.staging.create().map_err(failed)?;
            part.copy(&file, 0, size).map_err(failed)?;
            if part.finish(hash, size).map_err(failed)? == Finished::Staged {
                return Ok(self.staging.pin(hash, lsn).then_some(Content::Staged));
            }
        }
        Ok(None)
    }

    /// Puts a content together; `None` when a source is missing or the result is not what it should be.
    fn build(&mut self, segs: &[Seg], hash: ContentHash, size: u64, lsn: Lsn) -> Result<Option<Content>, StandbyError> {
        if let Some(content) = self.at_hand(hash, size, lsn)? {
            return Ok(Some(content));
        }
        self.check_room_for(size)?;
        for settled in [false, true] {
            if settled && !self.applied_all()? {
                break;
            }
            let mut sources: Vec<(ContentHash, Vec<File>)> = vec![];
            for seg in segs {
                if let Seg::Copy { from, .. } = seg
                    && !sources.iter().any(|(known, _)| known == from)
                    && self.recent.find(*from).is_none()
                {
                    let files = match self.staging.size(*from) {
                        Some(_) => vec![self.staging.object(*from).map_err(failed)?],
                        None => self.fetch(*from, None)?,
                    };
                    sources.push((*from, files));
                }
            }
            if let Some(content) = self.assemble(segs, &sources, hash, size, lsn)? {
                return Ok(Some(content));
            }
        }
        Ok(None)
    }

    fn assemble(
        &mut self,
        segs: &[Seg],
        sources: &[(ContentHash, Vec<File>)],
        hash: ContentHash,
        size: u64,
        lsn: Lsn,
    ) -> Result<Option<Content>, StandbyError> {
        let mut part = self.staging.create().map_err(failed)?;
        for seg in segs {
            match seg {
                Seg::Data(bytes) => part.data(bytes).map_err(failed)?,
                Seg::Hole(len) => part.hole(*len).map_err(failed)?,
                Seg::Copy { from, offset, len } => {
                    if let Some(bytes) = self.recent.find(*from) {
                        let (start, end) = (*offset as usize, offset.saturating_add(*len) as usize);
                        let Some(bytes) = bytes.get(start..end) else { return Ok(None) };
                        part.data(bytes).map_err(failed)?;
                        continue;
                    }
                    let Some(file) = sources.iter().find(|(known, _)| known == from).and_then(|(_, files)| files.first()) else {
                        return Ok(None);
                    };
                    part.copy(file, *offset, *len).map_err(failed)?;
                }
            }
        }
        if size <= INLINE_MAX as u64 {
            let mut bytes = vec![0; size as usize];
            let whole = part.len() == size && part.file.read_exact_at(&mut bytes, 0).is_ok();
            if !whole || ContentHash::of(&bytes) != hash {
                return Ok(None);
            }
            self.recent.note(hash, &bytes);
            return Ok(Some(Content::Inline(ByteBuf::from(bytes))));
        }
        if part.finish(hash, size).map_err(failed)? == Finished::Wrong {
            return Ok(None);
        }
        Ok(self.staging.pin(hash, lsn).then_some(Content::Staged))
    }
}
