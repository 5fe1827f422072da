//! A mirror's session as its primary sees it: hello, pull if memories differ, then the log, bulk objects and heartbeats until the connection ends; again and again.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use twinbox_protocol::codec::CONTROL_MAX;
use twinbox_protocol::ids::Lsn;
use twinbox_protocol::msg::{BulkItem, StreamHead, ToPrimary, ToStandby};

use super::paths::Paths;
use super::zstream::Compressor;
use crate::capture::engine::{skew_ms, wall_ns};
use crate::capture::messages::BulkMessage;
use crate::capture::{CaptureHandle, Command, Step, ToLink};
use crate::net::framed::{FrameError, FrameReader, write_frame};

/// The standby may be finishing a long replay before it answers.
const ANSWER_WITHIN: Duration = Duration::from_secs(600);
/// Heartbeats on the control stream.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// Pause after a session that failed, so that a standing refusal is not asked ten times a second.
const PAUSE: Duration = Duration::from_millis(500);
/// Bulk items waiting between the bulk thread and the network.
const BULK_QUEUE: usize = 8;
/// A clock that is off by more than this is reported.
const SKEW_REPORTED: Duration = Duration::from_secs(1);

/// What the link knows of the peer, for status.
#[derive(Clone, Debug, Default)]
pub struct PeerLink {
    /// A session is up.
    pub connected: bool,
    /// Durable and applied there.
    pub durable: Option<Lsn>,
    /// Applied there.
    pub applied: Option<Lsn>,
    /// Its clock minus ours.
    pub skew_ms: Option<i64>,
    /// Its version.
    pub version: Option<String>,
    /// It refuses, or we do: why.
    pub refused: Option<String>,
    /// Histories disagree.
    pub diverged: bool,
    /// Last thing that went wrong.
    pub last_error: Option<String>,
}

#[derive(Debug, thiserror::Error)]
enum SessionError {
    #[error("connection lost: {0}")]
    Connection(#[from] quinn::ConnectionError),
    #[error("connection lost: {0}")]
    Frame(#[from] FrameError),
    #[error("connection lost: {0}")]
    Write(#[from] quinn::WriteError),
    #[error("{0}")]
    Refused(String),
    #[error("{0}")]
    Diverged(String),
    #[error("the standby did not answer within {} s", ANSWER_WITHIN.as_secs())]
    Silent,
    #[error("the standby said something out of turn")]
    OutOfTurn,
    #[error("compression: {0}")]
    Compress(#[from] std::io::Error),
    #[error("capture has ended")]
    Ended,
}

/// Numbers of sessions: never used twice in a process, so that a late `Down` of one that was aborted ends no other.
static SESSIONS: AtomicU64 = AtomicU64::new(1);

/// Says that a session is over, also when its task is aborted (a reload, a pairing): else the capture would ship into nowhere and call itself protected.
struct DownAtEnd<'a> {
    id: u64,
    capture: &'a CaptureHandle,
    shared: &'a Mutex<PeerLink>,
}

impl Drop for DownAtEnd<'_> {
    fn drop(&mut self) {
        self.capture.send(Command::Down(self.id));
        if let Ok(mut link) = self.shared.lock() {
            link.connected = false;
        }
    }
}

/// Runs sessions for ever; abort the task to end.
pub async fn run(mirror: String, paths: Arc<Paths>, capture: CaptureHandle, shared: Arc<Mutex<PeerLink>>) {
    loop {
        let connection = paths.connection().await;
        let id = SESSIONS.fetch_add(1, Ordering::Relaxed);
        let result = {
            let _down = DownAtEnd { id, capture: &capture, shared: &shared };
            session(id, &mirror, &connection, &paths, &capture, &shared).await
        };
        if let Err(error) = result {
            let text = error.to_string();
            if let Ok(mut link) = shared.lock() {
                link.connected = false;
                match &error {
                    SessionError::Refused(why) => link.refused = Some(why.clone()),
                    SessionError::Diverged(why) => (link.refused, link.diverged) = (Some(why.clone()), true),
                    _ => {}
                }
                if link.last_error.as_ref() != Some(&text) {
                    match error {
                        SessionError::Diverged(_) | SessionError::Refused(_) => {
                            tracing::error!(mirror, error = %text, "replication refused")
                        }
                        _ => tracing::warn!(mirror, error = %text, "session ended"),
                    }
                }
                link.last_error = Some(text);
            }
            if matches!(error, SessionError::Ended) {
                return;
            }
        }
        tokio::time::sleep_until(Instant::now() + PAUSE).await;
    }
}

type Control = FrameReader<ToPrimary>;

async fn answer(control: &mut Control) -> Result<ToPrimary, SessionError> {
    timeout(ANSWER_WITHIN, control.next()).await.map_err(|_| SessionError::Silent)??.ok_or(SessionError::OutOfTurn)
}

async fn session(
    id: u64,
    mirror: &str,
    connection: &quinn::Connection,
    paths: &Paths,
    capture: &CaptureHandle,
    shared: &Mutex<PeerLink>,
) -> Result<(), SessionError> {
    let (mut send, recv) = connection.open_bi().await?;
    let mut control = FrameReader::<ToPrimary>::new(recv, CONTROL_MAX);
    let hello = capture.ask(Command::Hello).await.ok_or(SessionError::Ended)?;
    write_frame(&mut send, &ToStandby::Hello(Box::new(hello))).await?;
    let welcome = loop {
        match answer(&mut control).await? {
            ToPrimary::Welcome(welcome) => break welcome,
            ToPrimary::Refuse { code: twinbox_protocol::msg::RefuseCode::Diverged, message } => {
                return Err(SessionError::Diverged(message));
            }
            ToPrimary::Refuse { message, .. } => return Err(SessionError::Refused(message)),
            ToPrimary::Heartbeat { .. } => {}
            _ => return Err(SessionError::OutOfTurn),
        }
    };
    let skew = skew_ms(welcome.wall_ns);
    if skew.unsigned_abs() > SKEW_REPORTED.as_millis() as u64 {
        tracing::warn!(
            mirror,
            skew_ms = skew,
            "the standby's clock differs from ours: set both by NTP, or times in reports will not match"
        );
    }
    if let Ok(mut link) = shared.lock() {
        link.version = Some(welcome.software.clone());
        link.skew_ms = Some(skew);
    }
    let mut step = ask_step(capture, |reply| Command::Welcome(welcome, reply)).await?;
    let (from, reset) = loop {
        match step {
            Step::Begin { from, reset } => break (from, reset),
            Step::Pull(since) => {
                write_frame(&mut send, &ToStandby::Pull { since }).await?;
                step = pull(&mut control, capture).await?;
            }
        }
    };
    write_frame(&mut send, &ToStandby::Begin { from, reset }).await?;
    match answer(&mut control).await? {
        ToPrimary::Begun => {}
        ToPrimary::Refuse { message, .. } => return Err(SessionError::Refused(message)),
        _ => return Err(SessionError::OutOfTurn),
    }
    let mut log = connection.open_uni().await?;
    write_frame(&mut log, &StreamHead::Log { mirror: mirror.into() }).await?;
    let (out, mut txns) = mpsc::unbounded_channel(); // Bounded by the capture's in-flight window.
    let (bulk, objects) = mpsc::channel(BULK_QUEUE);
    if !capture.send(Command::Up { id, out, bulk, peer: paths.node().into() }) {
        return Err(SessionError::Ended);
    }
    if let Ok(mut link) = shared.lock() {
        (link.connected, link.refused, link.diverged) = (true, None, false);
    }
    let bulk = send_objects(mirror, connection, objects);
    // Three things that never wait for each other: a standby that misses a content stops reading the log until we hear of it and answer.
    let hear = async {
        loop {
            let message = control.next().await?.ok_or(SessionError::OutOfTurn)?;
            heard(message, capture, shared)?;
        }
    };
    let (to_log, mut for_log) = mpsc::unbounded_channel::<Vec<Vec<u8>>>(); // Bounded by the in-flight window, as above.
    let write = async {
        let mut compressor = Compressor::new(true)?;
        while let Some(frames) = for_log.recv().await {
            for body in &frames {
                compressor.frame(body)?;
            }
            log.write_all(&compressor.flush()?).await?;
        }
        Err(SessionError::Ended)
    };
    let flow = async {
        let mut beat = interval(HEARTBEAT);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut seq, mut stored, mut told) = (0u64, Lsn::ZERO, Lsn::ZERO);
        loop {
            tokio::select! {
                txn = txns.recv() => {
                    match txn.ok_or(SessionError::Ended)? {
                        ToLink::Txn(frames) => {
                            let _ = to_log.send(frames); // Its reader ends only with the session.
                        }
                        ToLink::Gone(hash) => write_frame(&mut send, &ToStandby::Gone { hash }).await?,
                        ToLink::Lacks(hash) => write_frame(&mut send, &ToStandby::Lacks { hash }).await?,
                        ToLink::Unstage(hash) => write_frame(&mut send, &ToStandby::Unstage { hash }).await?,
                        ToLink::Keep { hashes, last } => write_frame(&mut send, &ToStandby::Keep { hashes, last }).await?,
                        ToLink::Stored(lsn) => stored = lsn,
                    }
                }
                _ = beat.tick() => {
                    seq += 1;
                    told = told.max(stored);
                    write_frame(&mut send, &ToStandby::Heartbeat { seq, wall_ns: wall_ns(), stored: told }).await?;
                }
            }
        }
    };
    tokio::select! {
        result = hear => result,
        result = write => result,
        result = flow => result,
        result = bulk => result,
    }
}

async fn ask_step<E: std::error::Error>(
    capture: &CaptureHandle,
    command: impl FnOnce(tokio::sync::oneshot::Sender<Result<Step, E>>) -> Command,
) -> Result<Step, SessionError> {
    capture.ask(command).await.ok_or(SessionError::Ended)?.map_err(|refusal| SessionError::Diverged(refusal.to_string()))
}

async fn pull(control: &mut Control, capture: &CaptureHandle) -> Result<Step, SessionError> {
    loop {
        match answer(control).await? {
            ToPrimary::Rows { rows } => {
                if !capture.send(Command::Rows(rows)) {
                    return Err(SessionError::Ended);
                }
            }
            ToPrimary::RowsEnd { position, digest } => return ask_step(capture, |reply| Command::RowsEnd(position, digest, reply)).await,
            ToPrimary::Heartbeat { .. } => {}
            ToPrimary::Refuse { message, .. } => return Err(SessionError::Refused(message)),
            _ => return Err(SessionError::OutOfTurn),
        }
    }
}

fn heard(message: ToPrimary, capture: &CaptureHandle, shared: &Mutex<PeerLink>) -> Result<(), SessionError> {
    let note = |change: &dyn Fn(&mut PeerLink)| {
        if let Ok(mut link) = shared.lock() {
            change(&mut link);
        }
    };
    let alive = match message {
        ToPrimary::Durable { lsn } => {
            note(&|link| link.durable = Some(lsn));
            capture.send(Command::Durable(lsn))
        }
        ToPrimary::Applied { lsn } => {
            note(&|link| link.applied = Some(lsn));
            capture.send(Command::Applied(lsn))
        }
        ToPrimary::Staged { hash } => capture.send(Command::Staged(hash)),
        ToPrimary::Miss { hash } => capture.send(Command::Miss(hash)),
        ToPrimary::Want { path, hash } => capture.send(Command::Want(path, hash)),
        ToPrimary::Incomplete { hash } => capture.send(Command::Incomplete(hash)),
        ToPrimary::Heartbeat { wall_ns: theirs, .. } => {
            note(&|link| link.skew_ms = Some(skew_ms(theirs)));
            capture.send(Command::Heard)
        }
        ToPrimary::Problem { message } => {
            tracing::error!(problem = %message, "the standby reports a problem");
            note(&|link| link.last_error = Some(format!("standby: {message}")));
            true
        }
        ToPrimary::Refuse { message, .. } => return Err(SessionError::Refused(message)),
        _ => return Err(SessionError::OutOfTurn),
    };
    if alive { Ok(()) } else { Err(SessionError::Ended) }
}

/// Each object on a stream of its own.
async fn send_objects(mirror: &str, connection: &quinn::Connection, mut objects: mpsc::Receiver<BulkMessage>) -> Result<(), SessionError> {
    let mut open: HashMap<u64, (quinn::SendStream, Compressor)> = HashMap::new();
    while let Some(message) = objects.recv().await {
        match message {
            BulkMessage::Abort(id) => {
                if let Some((mut stream, _)) = open.remove(&id) {
                    let _ = stream.reset(1u32.into());
                }
            }
            BulkMessage::Item(id, item) => {
                if let std::collections::hash_map::Entry::Vacant(slot) = open.entry(id) {
                    let mut stream = connection.open_uni().await?;
                    let _ = stream.set_priority(-1); // The log goes first.
                    write_frame(&mut stream, &StreamHead::Bulk { mirror: mirror.into(), id }).await?;
                    slot.insert((stream, Compressor::new(false)?));
                }
                let Some((stream, compressor)) = open.get_mut(&id) else { continue };
                let end = matches!(item, BulkItem::End { .. });
                compressor.frame(&twinbox_protocol::codec::encode(&item))?;
                match stream.write_all(&compressor.flush()?).await {
                    // It had read the end before the last bytes of the frame were written.
                    Err(quinn::WriteError::Stopped(_)) if end => {}
                    other => other?,
                }
                if end {
                    let _ = stream.finish();
                    open.remove(&id);
                }
            }
        }
    }
    Ok(())
}
