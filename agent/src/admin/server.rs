//! The agent's end of the socket.

use std::fs::{self, File};
use std::future::{Future, pending};
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::Gid;
use rustix::fs::{Mode, fchmod};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::{
    AdminError, CLIENT_IDLE, CLIENT_TIMEOUT, CLIENTS_MAX, REQUEST_BYTES_MAX, Request, Response, SOCKET, StateLock, socket_address,
};

/// How long answers under way may take once the server is told to end.
const DRAIN: Duration = Duration::from_secs(2);
/// Pause after a failing accept (out of descriptors): the queue holds the clients meanwhile.
const ACCEPT_PAUSE: Duration = Duration::from_millis(500);

/// A bound socket together with the lock of its state directory. Dropping it removes the socket.
#[derive(Debug)]
pub struct AdminServer {
    listener: UnixListener,
    path: PathBuf,
    lock: StateLock,
}

impl AdminServer {
    /// Locks the state directory and opens the socket in it. Call within a tokio runtime.
    pub fn bind(state: &Path) -> Result<Self, AdminError> {
        let lock = StateLock::acquire(state)?;
        let path = state.join(SOCKET);
        let unusable = |source: io::Error| AdminError::Unusable { path: path.clone(), source };
        let directory = File::open(state).map_err(unusable)?;
        let address = socket_address(state, &directory);
        remove_stale(state, &path, &address)?;

        let listener = open(&address).map_err(unusable)?;
        Ok(AdminServer { listener, path, lock })
    }

    /// The lock held with the socket.
    #[must_use]
    pub fn lock(&self) -> &StateLock {
        &self.lock
    }

    /// Answers requests through `handler` until `until` is ready, then lets answers under way finish.
    pub async fn serve<H, A>(&self, handler: H, until: impl Future<Output = ()>)
    where
        H: Fn(Request) -> A + Send + Sync + 'static,
        A: Future<Output = Response> + Send + 'static,
    {
        serve(&self.listener, handler, until).await;
    }
}

/// A socket for programs of a group, at a path of the operator's choice: fences, declared transactions and PING, nothing else. Dropping it removes the socket.
#[derive(Debug)]
pub struct FenceServer {
    listener: UnixListener,
    path: PathBuf,
}

impl FenceServer {
    /// Opens the socket; its directory is made when it is missing. Open to its owner and to `group` (a name of /etc/group, or a number). Call within a tokio runtime, and only under the lock of the state directory.
    ///
    /// # Errors
    /// [`AdminError`].
    pub fn bind(path: &Path, group: Option<&str>) -> Result<Self, AdminError> {
        let unusable = |source: io::Error| AdminError::Unusable { path: path.to_owned(), source };
        let parent = path.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(parent).map_err(unusable)?;
        let gid = group.map(gid_of).transpose().map_err(unusable)?;
        remove_stale(parent, path, path)?;
        let listener = open(path).map_err(unusable)?;
        let server = FenceServer { listener, path: path.to_owned() };
        if let Some(gid) = gid {
            // In this order: at no moment is it open to another group.
            rustix::fs::chown(path, None, Some(gid)).map_err(|e| unusable(e.into()))?;
            rustix::fs::chmod(path, Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::WGRP).map_err(|e| unusable(e.into()))?;
        }
        Ok(server)
    }

    /// As [`AdminServer::serve`]; requests that are not for this socket do not reach `handler`.
    pub async fn serve<H, A>(&self, handler: H, until: impl Future<Output = ()>)
    where
        H: Fn(Request) -> A + Send + Sync + 'static,
        A: Future<Output = Response> + Send + 'static,
    {
        let handler = Arc::new(handler);
        let allowed = move |request: Request| {
            let handler = handler.clone();
            async move {
                match request {
                    Request::Ping | Request::Fence(_) | Request::TxnBegin { .. } | Request::TxnCommit { .. } => handler(request).await,
                    _ => Response::error("forbidden", "this socket is for PING, FENCE, TXN BEGIN and TXN COMMIT"),
                }
            }
        };
        serve(&self.listener, allowed, until).await;
    }
}

impl Drop for FenceServer {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// The number of a group, as /etc/group has it.
fn gid_of(group: &str) -> io::Result<Gid> {
    if let Ok(number) = group.parse() {
        return Ok(Gid::from_raw(number));
    }
    let text = fs::read_to_string("/etc/group")?;
    let mut lines = text.lines().map(|line| line.split(':'));
    let found = lines.find_map(|mut fields| (fields.next() == Some(group)).then(|| fields.nth(1)?.parse().ok()).flatten());
    found.map(Gid::from_raw).ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("no group `{group}` in /etc/group")))
}

fn open(address: &Path) -> io::Result<UnixListener> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // bind(2) gives the name the mode of the socket's inode, less the umask: so it is right from the start.
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    bind(&socket, &SocketAddrUnix::new(address)?)?;
    listen(&socket, i32::try_from(CLIENTS_MAX).unwrap_or(i32::MAX))?;
    UnixListener::from_std(socket.into())
}

async fn serve<H, A>(listener: &UnixListener, handler: H, until: impl Future<Output = ()>)
where
    H: Fn(Request) -> A + Send + Sync + 'static,
    A: Future<Output = Response> + Send + 'static,
{
    let handler = Arc::new(handler);
    let slots = Arc::new(Semaphore::new(CLIENTS_MAX));
    let mut clients = JoinSet::new();
    let mut until = std::pin::pin!(until);
    loop {
        let accepted = async {
            let slot = slots.clone().acquire_owned().await.ok()?;
            Some((slot, listener.accept().await))
        };
        tokio::select! {
            () = &mut until => break,
            Some(_) = clients.join_next() => {}
            Some((slot, accepted)) = accepted => match accepted {
                Ok((stream, _)) => {
                    let handler = handler.clone();
                    clients.spawn(async move {
                        let _slot = slot;
                        if let Err(error) = converse(stream, &*handler).await {
                            tracing::debug!(%error, "admin client left");
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "admin socket: accept failed");
                    tokio::select! {
                        () = &mut until => break,
                        _ = timeout(ACCEPT_PAUSE, pending::<()>()) => {}
                    }
                }
            },
        }
    }
    let _ = timeout(DRAIN, async { while clients.join_next().await.is_some() {} }).await;
}

impl Drop for AdminServer {
    fn drop(&mut self) {
        // Still under the lock, so it is ours.
        let _ = fs::remove_file(&self.path);
    }
}

/// Removes what a killed agent left behind; refuses if somebody answers, or if it is no socket.
fn remove_stale(state: &Path, path: &Path, address: &Path) -> Result<(), AdminError> {
    let unusable = |source: io::Error| AdminError::Unusable { path: path.to_owned(), source };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(unusable(error)),
        Ok(found) if !found.file_type().is_socket() => return Err(AdminError::NotASocket { path: path.to_owned() }),
        Ok(_) => {}
    }
    match StdUnixStream::connect(address) {
        Ok(_) => Err(AdminError::AlreadyRunning { state: state.to_owned(), pid: None }),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path).map_err(unusable),
        Err(error) => Err(unusable(error)),
    }
}

/// One client: request, answer, and so on until it closes. One that stalls or talks too much is dropped.
async fn converse<H, A>(stream: UnixStream, handler: &H) -> io::Result<()>
where
    H: Fn(Request) -> A,
    A: Future<Output = Response>,
{
    let (read, mut write) = stream.into_split();
    let mut read = BufReader::with_capacity(1024, read);
    loop {
        let mut line = Vec::new();
        if timeout(CLIENT_IDLE, read.fill_buf()).await??.is_empty() {
            return Ok(());
        }
        let mut bounded = (&mut read).take(REQUEST_BYTES_MAX as u64);
        timeout(CLIENT_TIMEOUT, bounded.read_until(b'\n', &mut line)).await??;
        let complete = line.pop_if(|last| *last == b'\n').is_some();
        if !complete && line.is_empty() {
            return Ok(());
        }
        let answer = match complete.then(|| Request::parse(&line)) {
            Some(Ok(request)) => handler(request).await,
            Some(Err(answer)) => answer,
            None => Response::error("bad-line", format!("a request is one line of at most {REQUEST_BYTES_MAX} bytes")),
        };
        timeout(CLIENT_TIMEOUT, write.write_all(answer.to_line().as_bytes())).await??;
        if !complete {
            return Ok(());
        }
    }
}
