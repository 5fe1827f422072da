//! A manifest's rows on a control stream, in batches that fit into its frames.

use tokio::sync::mpsc::Sender;
use twinbox_protocol::entry::Entry;
use twinbox_protocol::ids::Lsn;
use twinbox_protocol::msg::{Position, ToPrimary};
use twinbox_protocol::path::RelPath;
use twinbox_resync::manifest::Manifest;
use twinbox_resync::schema::StateError;

/// Rows of one message, and about as many bytes: well below what a frame may have.
const ROWS: usize = 1000;
const BYTES: usize = 1 << 20;

/// Sends the rows that were set, and the paths that are gone, since `since` (`None`: all rows), then `RowsEnd`; `false` when nobody listens any more. Blocks.
///
/// # Errors
/// [`StateError`].
pub(crate) fn send(manifest: &Manifest, since: Option<Lsn>, position: Position, out: &Sender<ToPrimary>) -> Result<bool, StateError> {
    let mut rows: Vec<(RelPath, Option<Entry>)> = vec![];
    let (mut bytes, mut open) = (0, true);
    let mut add = |path: RelPath, entry: Option<Entry>| {
        bytes += 160 + path.as_bytes().len() + entry.as_ref().map_or(0, |e| e.xattrs.iter().map(|(n, v)| n.len() + v.len() + 8).sum());
        rows.push((path, entry));
        if open && (rows.len() >= ROWS || bytes >= BYTES) {
            bytes = 0;
            open = out.blocking_send(ToPrimary::Rows { rows: std::mem::take(&mut rows) }).is_ok();
        }
        if !open {
            rows.clear();
        }
    };
    let mut read = || {
        if let Some(since) = since {
            manifest.each_gone(since, |path| add(path, None))?;
        }
        manifest.each(since, |path, row, _| add(path, Some(row.entry)))
    };
    read().map_err(|error| manifest.state_error(&error))?;
    let end = ToPrimary::RowsEnd { position, digest: manifest.digest() };
    Ok((rows.is_empty() || out.blocking_send(ToPrimary::Rows { rows }).is_ok()) && out.blocking_send(end).is_ok())
}
