//! The command line's end of the socket.

use std::fs::File;
use std::io;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

use super::{AdminError, RESPONSE_BYTES_MAX, Request, Response, SOCKET, socket_address};
use crate::status::Status;

/// Sends one request to the agent on `state` and waits for its answer, `timeout` in all.
pub async fn request(state: &Path, request: Request, timeout: Duration) -> Result<Value, AdminError> {
    match tokio::time::timeout(timeout, exchange(state, request)).await {
        Err(_) => Err(AdminError::Timeout { after: timeout }),
        Ok(Err(error)) => Err(error),
        Ok(Ok(Response::Ok(value))) => Ok(value),
        Ok(Ok(Response::Error { code, message })) => Err(AdminError::Refused { code, message }),
    }
}

/// Asks the agent on `state` for its status.
pub async fn status(state: &Path, timeout: Duration) -> Result<Status, AdminError> {
    let value = request(state, Request::Status, timeout).await?;
    serde_json::from_value(value).map_err(|_| AdminError::BadAnswer)
}

async fn exchange(state: &Path, request: Request) -> Result<Response, AdminError> {
    let path = state.join(SOCKET);
    let unreachable = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => AdminError::NoAgent { state: state.to_owned() },
        io::ErrorKind::PermissionDenied => AdminError::Forbidden { path: path.clone() },
        _ => AdminError::Unusable { path: path.clone(), source },
    };
    let directory = File::open(state).map_err(unreachable)?;
    let mut stream = UnixStream::connect(socket_address(state, &directory)).await.map_err(unreachable)?;
    let cut_short = |_: io::Error| AdminError::BadAnswer;
    let line = format!("{}\n", request.to_line());
    stream.write_all(line.as_bytes()).await.map_err(cut_short)?;

    let mut answer = Vec::new();
    let mut bounded = BufReader::new(stream).take(RESPONSE_BYTES_MAX as u64);
    bounded.read_until(b'\n', &mut answer).await.map_err(cut_short)?;
    answer.pop_if(|last| *last == b'\n').ok_or(AdminError::BadAnswer)?;
    Response::parse(&answer).ok_or(AdminError::BadAnswer)
}
