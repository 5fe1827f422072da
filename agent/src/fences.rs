//! From a fence as a program asks for it (absolute paths) to the captures that answer it, and back to an answer for the program.
//!
//! Paths are compared with the mirrors' roots as text: with the root as configured and as it is without symbolic links. Whoever reaches the store by another name says that name without links, as `twinbox fence` does.

use std::collections::BTreeMap;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::json;
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::timeout;
use twinbox_protocol::ids::Lsn;
use twinbox_protocol::path::RelPath;

use crate::admin::{Fence, Response, request::plain};
use crate::capture::{CaptureHandle, Command, FenceRequest, NoTxn, NotFenced, Until};
use crate::names::MirrorName;

struct Mirror {
    name: String,
    /// As configured, and without links.
    roots: [PathBuf; 2],
    /// `None`: this node is its standby.
    capture: Option<CaptureHandle>,
}

/// The mirrors of a node, as far as fences go.
pub struct Fences {
    mirrors: Vec<Mirror>,
}

/// Most paths in one fence that are looked at for themselves; more are the whole mirror.
const PATHS_MAX: usize = 1024;

type Refusal = Response;

fn refused(code: &str, message: impl Into<String>) -> Refusal {
    Response::error(code, message)
}

impl Fences {
    /// Of these mirrors: name, root, and the capture where this node is primary.
    pub fn new(mirrors: impl IntoIterator<Item = (String, PathBuf, Option<CaptureHandle>)>) -> Self {
        let mirrors = mirrors.into_iter().map(|(name, root, capture)| {
            let real = std::fs::canonicalize(&root).unwrap_or_else(|_| root.clone());
            Mirror { name, roots: [plain(&root), real], capture }
        });
        Fences { mirrors: mirrors.collect() }
    }

    /// The mirror a path lies in (the innermost), and where in it.
    fn locate(&self, path: &Path, only: Option<&str>) -> Result<(&Mirror, RelPath), Refusal> {
        let path = plain(path);
        let all = self.mirrors.iter().filter(|m| only.is_none_or(|name| m.name == name));
        let roots = all.flat_map(|mirror| mirror.roots.iter().map(move |root| (root, mirror)));
        let fits = roots.filter_map(|(root, mirror)| Some((root.as_os_str().len(), mirror, path.strip_prefix(root).ok()?)));
        let Some((_, mirror, below)) = fits.max_by_key(|(len, ..)| *len) else {
            let shown = path.display().to_string();
            return Err(refused(
                "bad-path",
                format!("{} lies in no mirror{} of this node", shown.escape_default(), only.map_or(String::new(), |m| format!(" `{m}`"))),
            ));
        };
        let below = RelPath::new(below.as_os_str().as_bytes());
        below.map(|below| (mirror, below)).map_err(|error| refused("bad-path", error.to_string()))
    }

    fn primary<'m>(&self, mirror: &'m Mirror) -> Result<&'m CaptureHandle, Refusal> {
        let why = || format!("this node is the standby of `{}`: ask its primary", mirror.name);
        mirror.capture.as_ref().ok_or_else(|| refused("not-primary", why()))
    }

    /// Which captures are asked about which paths (none: all).
    fn targets(&self, fence: &Fence) -> Result<BTreeMap<String, (CaptureHandle, Vec<RelPath>)>, Refusal> {
        let only = fence.mirror.as_deref();
        if let Some(name) = only
            && !self.mirrors.iter().any(|m| m.name == name)
        {
            let shown = name.parse::<MirrorName>().map_or_else(|_| "of that name".into(), |name| format!("`{}`", name.as_str()));
            return Err(refused("bad-arguments", format!("no mirror {shown} on this node")));
        }
        let mut targets: BTreeMap<String, (CaptureHandle, Vec<RelPath>)> = BTreeMap::new();
        if fence.paths.is_empty() {
            for mirror in self.mirrors.iter().filter(|m| only.is_none_or(|name| m.name == name)) {
                match (self.primary(mirror), only) {
                    (Ok(capture), _) => drop(targets.insert(mirror.name.clone(), (capture.clone(), vec![]))),
                    (Err(refusal), Some(_)) => return Err(refusal),
                    (Err(_), None) => {}
                }
            }
            if targets.is_empty() {
                return Err(refused("not-primary", "this node is primary of no mirror: ask the other node"));
            }
            return Ok(targets);
        }
        for path in &fence.paths {
            let (mirror, below) = self.locate(path, only)?;
            let capture = self.primary(mirror)?;
            targets.entry(mirror.name.clone()).or_insert_with(|| (capture.clone(), vec![])).1.push(below);
        }
        for (_, paths) in targets.values_mut() {
            if paths.len() > PATHS_MAX || paths.iter().any(RelPath::is_root) {
                paths.clear();
            }
        }
        Ok(targets)
    }

    /// Waits for a fence.
    pub async fn fence(&self, fence: &Fence) -> Response {
        match self.targets(fence) {
            Ok(targets) => wait(targets, fence).await,
            Err(refusal) => refusal,
        }
    }

    /// Begins a declared transaction.
    pub async fn begin(&self, path: &Path, time: Duration) -> Response {
        let located = self.locate(path, None).and_then(|(mirror, below)| Ok((self.primary(mirror)?, below)));
        let (capture, path) = match located {
            Ok(located) => located,
            Err(refusal) => return refusal,
        };
        match timeout(time, capture.ask(|reply| Command::TxnBegin { path, time, reply })).await {
            Ok(Some(txn)) => Response::Ok(json!({ "txn": txn })),
            Ok(None) => ended(),
            Err(_) => refused("timeout", "other transactions of this group are open without a gap: it must be cut first"),
        }
    }

    /// Commits a declared transaction, and waits until it is safe.
    pub async fn commit(&self, txn: Option<u64>, fence: &Fence, nowait: bool) -> Response {
        let found = match fence.paths.first() {
            Some(path) => self.locate(path, fence.mirror.as_deref()).map(|(mirror, below)| vec![(mirror, Some(below))]),
            None => Ok(self.mirrors.iter().map(|m| (m, None)).collect()),
        };
        let found = match found {
            Ok(found) => found,
            Err(refusal) => return refusal,
        };
        for (mirror, path) in found {
            let capture = match self.primary(mirror) {
                Ok(capture) => capture.clone(),
                Err(refusal) if path.is_some() => return refusal,
                Err(_) => continue,
            };
            match capture.ask(|reply| Command::TxnEnd { id: txn, path, reply }).await {
                None => return ended(),
                Some(Ok(_)) if nowait => return Response::done(),
                Some(Ok(group)) => {
                    let paths = if group.is_root() { vec![] } else { vec![group] };
                    return wait([(mirror.name.clone(), (capture, paths))].into(), fence).await;
                }
                Some(Err(error @ NoTxn::Several { .. })) => return refused("several", error.to_string()),
                Some(Err(_)) => {}
            }
        }
        refused("expired", NoTxn::Expired.to_string())
    }
}

fn ended() -> Response {
    refused("ended", "the mirror has stopped; see the agent's log")
}

async fn wait(targets: BTreeMap<String, (CaptureHandle, Vec<RelPath>)>, fence: &Fence) -> Response {
    let mut asked = JoinSet::new();
    for (name, (capture, paths)) in targets {
        let wait = fence.wait;
        let ask = move |reply: oneshot::Sender<Result<Lsn, NotFenced>>| {
            Command::Fence(FenceRequest { paths, until: Until::Durable, wait, reply })
        };
        asked.spawn(async move { (name, capture.ask(ask).await) });
    }
    let all = async {
        let mut lsns = serde_json::Map::new();
        while let Some(done) = asked.join_next().await {
            match done {
                Ok((name, Some(Ok(lsn)))) => drop(lsns.insert(name, json!(lsn.0))),
                Ok((name, Some(Err(error)))) => {
                    let code = if error == NotFenced::Unprotected { "unprotected" } else { "unreadable" };
                    return refused(code, format!("mirror `{name}`: {error}"));
                }
                Ok((_, None)) | Err(_) => return ended(),
            }
        }
        Response::Ok(json!({ "lsn": lsns }))
    };
    let late = || refused("timeout", "not everything had arrived in time; it still travels, and a later fence will tell");
    timeout(fence.timeout, all).await.unwrap_or_else(|_| late())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_find_their_mirror() {
        let dir = tempfile::tempdir().unwrap();
        let real = std::fs::canonicalize(dir.path()).unwrap();
        std::fs::create_dir_all(real.join("mail/inner")).unwrap();
        std::os::unix::fs::symlink(real.join("mail"), real.join("link")).unwrap();
        let fences = Fences::new([("mail".into(), real.join("link"), None), ("inner".into(), real.join("mail/inner"), None)]);
        let at = |path: &str| fences.locate(&real.join(path), None).map(|(m, p)| (m.name.clone(), p.to_string()));
        assert_eq!(at("mail/u/x"), Ok(("mail".into(), "u/x".into())));
        assert_eq!(at("link/u/../v"), Ok(("mail".into(), "v".into())));
        assert_eq!(at("mail/inner/x"), Ok(("inner".into(), "x".into())));
        assert!(at("mail").unwrap().1.is_empty() || fences.locate(&real.join("mail"), None).unwrap().1.is_root());
        assert!(matches!(at("mailbox"), Err(Response::Error { code, .. }) if code == "bad-path"));
        let fence = Fence { paths: vec![real.join("mail/u")], ..Fence::default() };
        assert!(matches!(fences.targets(&fence), Err(Response::Error { code, .. }) if code == "not-primary"));
        let fence = Fence { mirror: Some("other".into()), ..Fence::default() };
        assert!(matches!(fences.targets(&fence), Err(Response::Error { code, .. }) if code == "bad-arguments"));
    }
}
