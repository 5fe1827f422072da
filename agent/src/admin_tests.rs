//! Tests of the admin socket: refusals, hostile clients, stale sockets, long paths.

use std::fs;
use std::future::pending;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener as StdUnixListener;
use std::path::Path;
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::oneshot;

use super::{AdminError, AdminServer, FenceServer, REQUEST_BYTES_MAX, Request, Response, SOCKET, StateLock, request};
use crate::exit::ExitCode;

const PATIENCE: Duration = Duration::from_secs(20);

async fn answer(request: Request) -> Response {
    match request {
        Request::Ping => Response::done(),
        Request::Status => Response::Ok(json!({"node": "a\nb"})),
        Request::Reload => Response::error("not now", "line one\nline two"),
        _ => pending().await,
    }
}

/// Runs `client` against a server on `state`.
async fn with_server<T>(state: &Path, client: impl Future<Output = T>) -> T {
    let server = AdminServer::bind(state).expect("bound");
    let (end, ended) = oneshot::channel::<()>();
    let serving = server.serve(answer, async {
        let _ = ended.await;
    });
    let client = async {
        let result = client.await;
        drop(end);
        result
    };
    tokio::join!(client, serving).0
}

#[test]
fn lines() {
    assert_eq!(Request::parse(b"STATUS"), Ok(Request::Status));
    assert_eq!(Request::parse(b" PING \r"), Ok(Request::Ping));
    let refused = |line: &[u8]| Request::parse(line).expect_err("no request").to_line();
    assert_eq!(
        refused(b"fence \x1b"),
        "ERR unknown-command `fence`; this agent knows PING, STATUS, RELOAD, STOP, PROMOTE, DEMOTE, SWITCHOVER, RESYNC PLAN, RESYNC APPLY, RESCUE RESTORE, RESCUE REDELIVER, VERIFY RUN, VERIFY STOP, FENCE, TXN BEGIN, TXN COMMIT\n"
    );
    assert_eq!(refused(b"STOP now"), "ERR bad-arguments STOP takes none\n");
    for response in [Response::done(), Response::error("a", "b c"), Response::Ok(json!("x\ny"))] {
        let line = response.to_line();
        assert_eq!(line.matches('\n').count(), 1);
        assert_eq!(Response::parse(line.trim_end().as_bytes()), Some(response));
    }
    assert_eq!(Response::parse(b"OK {"), None);
    assert_eq!(Response::parse(b"\xff"), None);
}

#[tokio::test]
async fn answers() {
    let dir = tempfile::tempdir().expect("scratch directory");
    let state = dir.path();
    assert!(matches!(request(state, Request::Ping, PATIENCE).await, Err(AdminError::NoAgent { .. })));
    with_server(state, async {
        assert_eq!(request(state, Request::Ping, PATIENCE).await.expect("pong"), json!({}));
        assert_eq!(request(state, Request::Status, PATIENCE).await.expect("status"), json!({"node": "a\nb"}));
        let refused = request(state, Request::Reload, PATIENCE).await.expect_err("refused");
        assert_eq!(refused.to_string(), "the agent refused: line one line two (not-now)");
        let mode = fs::metadata(state.join(SOCKET)).expect("stat").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    })
    .await;
    assert!(!state.join(SOCKET).exists(), "removed with its server");
}

#[tokio::test]
async fn an_agent_that_hangs_is_not_waited_for() {
    let dir = tempfile::tempdir().expect("scratch directory");
    let listener = StdUnixListener::bind(dir.path().join(SOCKET)).expect("bound");
    let result = request(dir.path(), Request::Ping, Duration::from_millis(50)).await;
    let error = result.expect_err("no answer");
    assert!(matches!(error, AdminError::Timeout { .. }));
    assert_eq!(error.exit_code(), ExitCode::NoAgent);
    drop(listener);
}

#[tokio::test]
async fn one_agent_a_state_directory() {
    let dir = tempfile::tempdir().expect("scratch directory");
    let lock = StateLock::acquire(dir.path()).expect("locked");
    let second = AdminServer::bind(dir.path()).expect_err("refused");
    let own = std::process::id();
    assert!(matches!(second, AdminError::AlreadyRunning { pid: Some(pid), .. } if pid == own), "{second}");
    drop(lock);
    AdminServer::bind(dir.path()).expect("free again");
}

#[tokio::test]
async fn only_dead_sockets_are_removed() {
    let dir = tempfile::tempdir().expect("scratch directory");
    let socket = dir.path().join(SOCKET);
    let alive = StdUnixListener::bind(&socket).expect("bound");
    assert!(matches!(AdminServer::bind(dir.path()), Err(AdminError::AlreadyRunning { .. })));
    drop(alive); // As after kill -9: the name stays, nobody answers.
    assert!(socket.exists());
    drop(AdminServer::bind(dir.path()).expect("the stale socket is replaced"));
    fs::write(&socket, "precious").expect("write");
    assert!(matches!(AdminServer::bind(dir.path()), Err(AdminError::NotASocket { .. })));
    assert_eq!(fs::read(&socket).expect("read"), b"precious");
}

#[tokio::test]
async fn a_path_longer_than_a_socket_address() {
    let dir = tempfile::tempdir().expect("scratch directory");
    let state = dir.path().join("d".repeat(200));
    fs::create_dir(&state).expect("mkdir");
    with_server(&state, async {
        request(&state, Request::Ping, PATIENCE).await.expect("pong");
    })
    .await;
}

#[tokio::test]
async fn hostile_clients() {
    let dir = tempfile::tempdir().expect("scratch directory");
    let state = dir.path();
    with_server(state, async {
        // Endless line: answered once, then dropped. The agent goes on.
        let mut endless = UnixStream::connect(state.join(SOCKET)).await.expect("connected");
        endless.write_all(&vec![b'x'; REQUEST_BYTES_MAX]).await.expect("sent");
        let mut said = String::new();
        endless.read_to_string(&mut said).await.expect("read to the end");
        assert!(said.starts_with("ERR bad-line "), "{said}");

        // Half a line, then gone.
        let mut half = UnixStream::connect(state.join(SOCKET)).await.expect("connected");
        half.write_all(b"STA").await.expect("sent");
        drop(half);

        // Several requests on one connection, one of them no text.
        let mut several = UnixStream::connect(state.join(SOCKET)).await.expect("connected");
        several.write_all(b"PING\n\xff\xfe\n\nPING\n").await.expect("sent");
        several.shutdown().await.expect("half closed");
        let mut said = String::new();
        several.read_to_string(&mut said).await.expect("read to the end");
        let kinds: Vec<&str> = said.lines().map(|line| line.split(' ').next().unwrap_or_default()).collect();
        assert_eq!(kinds, ["OK", "ERR", "ERR", "OK"], "{said}");
    })
    .await;
}

#[tokio::test]
async fn the_fence_socket_is_for_fences() {
    let dir = tempfile::tempdir().expect("scratch directory");
    let path = dir.path().join("run/fence.sock");
    let server = FenceServer::bind(&path, Some("0")).expect("bound");
    let mode = fs::metadata(&path).expect("stat").permissions().mode();
    assert_eq!(mode & 0o777, 0o660, "the group, and nobody else");
    let (end, ended) = oneshot::channel::<()>();
    let serving = server.serve(answer, async {
        let _ = ended.await;
    });
    let client = async {
        let mut stream = UnixStream::connect(&path).await.expect("connected");
        stream.write_all(b"STOP\nRELOAD\nSTATUS\nPING\n").await.expect("sent");
        stream.shutdown().await.expect("half closed");
        let mut said = String::new();
        stream.read_to_string(&mut said).await.expect("read to the end");
        drop(end);
        said
    };
    let (said, ()) = tokio::join!(client, serving);
    let kinds: Vec<&str> = said.lines().map(|line| line.rsplit_once(" this").map_or(line, |(kind, _)| kind)).collect();
    assert_eq!(kinds, ["ERR forbidden", "ERR forbidden", "ERR forbidden", "OK {}"], "{said}");
    drop(server);
    assert!(!path.exists());
    let refused = FenceServer::bind(&path, Some("no-such-group")).expect_err("refused");
    assert!(matches!(refused, AdminError::Unusable { .. }), "{refused}");
    assert!(!path.exists(), "nothing is left open");
}
