//! What is kept in rescue, given back: into the store of whichever node is primary, never over anything.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::fs as rfs;
use twinbox_protocol::entry::Entry;
use twinbox_protocol::path::RelPath;
use twinbox_protocol::rejoin::{Flags, Merge, Merged};
use twinbox_resync::mailname::Name;

use super::store::{Lent, Store};
use super::work::{Job, ResyncError, io};
use crate::roles::{MirrorSpec, mirror_dir};
use crate::standby::copy;
use crate::tree;

/// One file.
pub struct Back {
    /// This node.
    pub node: String,
    /// The mirror.
    pub spec: MirrorSpec,
    /// `<state>`.
    pub state_dir: PathBuf,
    /// The file, in rescue.
    pub file: PathBuf,
    /// Where it was in the store.
    pub path: Vec<u8>,
    /// As a message that has just come, not as the file it was.
    pub redeliver: bool,
}

impl Back {
    fn merge(&self) -> Result<(Merge, File), ResyncError> {
        let what = || self.file.display().to_string();
        let file = io(what(), File::open(&self.file))?;
        let stat = io(what(), rfs::fstat(&file).map_err(Into::into))?;
        let hash = io(what(), copy::hash(&file))?;
        let xattrs = io(what(), tree::xattrs(file.as_fd(), false).map_err(Into::into))?;
        let entry: Option<Entry> = tree::entry(&stat, xattrs, Some(hash), None);
        let path = RelPath::new(&self.path).ok().filter(|path| !self.spec.selection.excludes(path.as_bytes(), false));
        let (Some(entry), Some(path)) = (entry, path) else {
            return Err(ResyncError::Refused(format!("{} has no place in the store: copy it with --to", what())));
        };
        let merge = match Name::of(&path).filter(|_| self.redeliver) {
            // Keywords are letters of a folder that may have others by now.
            Some(name) => {
                let flags: Flags = name
                    .letters
                    .iter()
                    .filter(|letter| letter.is_ascii_uppercase())
                    .map(|letter| char::from(*letter).to_string())
                    .collect();
                Merge::Message { folder: name.folder, unique: name.unique, flags, entry }
            }
            None if self.redeliver => {
                return Err(ResyncError::Refused(format!(
                    "{path} is no message of a Maildir: `twinbox rescue restore` puts it back as it was"
                )));
            }
            None => Merge::File { path, entry },
        };
        Ok((merge, file))
    }

    /// This node is primary. Blocks.
    ///
    /// # Errors
    /// [`ResyncError`].
    pub fn here(&self) -> Result<Merged, ResyncError> {
        let (merge, file) = self.merge()?;
        let lent = Lent {
            root: self.spec.root.clone(),
            mirror_dir: mirror_dir(&self.state_dir, &self.spec.name),
            selection: self.spec.selection.clone(),
            grouping: self.spec.grouping.clone(),
            name: self.spec.name.clone(),
            tool: self.spec.tool.clone(),
            alone: Arc::default(),
        };
        let done = Store::open(&lent).and_then(|mut store| store.merge(&merge, Some(&file)));
        done.map_err(|error| ResyncError::Io { what: "giving it back".into(), source: std::io::Error::other(error) })
    }

    /// The other node is. Its future blocks.
    ///
    /// # Errors
    /// [`ResyncError`].
    pub async fn there(&self, connection: &quinn::Connection) -> Result<Merged, ResyncError> {
        let (merge, file) = self.merge()?;
        let job = Job {
            node: self.node.clone(),
            spec: self.spec.clone(),
            state_dir: self.state_dir.clone(),
            winner: None,
            policy: twinbox_resync::reconcile::Policy::Merge,
        };
        let (mut remote, _) = job.say_hello(connection).await?;
        Ok(remote.merge(merge, Some(&file)).await?)
    }
}
