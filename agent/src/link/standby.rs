//! The waiting side: serves whatever pinned peers open, and routes each stream to its mirror's standby.
//!
//! A control stream (bidirectional) is one mirror's session; log and bulk streams (unidirectional) name the mirror they belong to and are refused without a session. A peer that breaks the
//! protocol loses its own connection and nothing else.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use twinbox_protocol::PROTOCOL_VERSION;
use twinbox_protocol::chunk::CHUNKER;
use twinbox_protocol::codec::{CONTROL_MAX, LOG_FRAME_MAX, decode};
use twinbox_protocol::ids::{ContentHash, Epoch, Generation, Incarnation, MirrorId};
use twinbox_protocol::lineage::{Meeting, Relation, Side, meet, relate};
use twinbox_protocol::msg::{BulkItem, Hello, Position, RefuseCode, Replica, StreamHead, ToPrimary, ToStandby, Welcome};
use twinbox_protocol::path::RelPath;
use twinbox_resync::node::{MirrorState, NodeState, Role};

use super::zstream::Expander;
use crate::capture::engine::{skew_ms, wall_ns};
use crate::net::{CloseCode, FrameReader, Incoming, close, read_frame, write_frame};
use crate::resync::serve::Lent;
use crate::standby::{Session, StandbyHandle};

/// A peer that opened a stream says what it is within this time.
const HEAD_WITHIN: Duration = Duration::from_secs(10);
/// Bytes read from a stream at a time.
const READ: usize = 16 * 1024;

/// A mirror this node is standby of.
pub struct Served {
    /// Its standby.
    pub handle: StandbyHandle,
    /// What the last primary said of itself, for status.
    pub seen: Mutex<Seen>,
}

/// The primary as this standby sees it.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Node, version, clock difference in ms; while connected.
    pub peer: Option<(String, String, i64)>,
    /// Histories disagree: why.
    pub diverged: Option<String>,
    /// Newest position the primary spoke of.
    pub connected: bool,
}

/// What another node says about roles.
#[derive(Debug)]
pub enum Word {
    /// It is primary of this mirror, too, and was promoted after this node.
    Superseded(String, Epoch),
    /// It was primary of this mirror, has nothing that this node lacks, and asks it to take over.
    TakeOver(String, Generation, oneshot::Sender<Result<(), (RefuseCode, String)>>),
}

/// All mirrors served here.
pub struct Server {
    /// This node's name.
    pub node: String,
    /// This run.
    pub incarnation: Incarnation,
    /// `<state>`.
    pub state_dir: std::path::PathBuf,
    /// By mirror name.
    pub mirrors: HashMap<String, Arc<Served>>,
    /// What nodes that come back may be told, by mirror: those this node is primary of.
    lent: HashMap<String, Lent>,
    /// To whoever changes roles.
    words: mpsc::Sender<Word>,
    /// Connections that are served; `None`: no more.
    open: Mutex<Option<Vec<quinn::Connection>>>,
}

#[derive(Debug, thiserror::Error)]
enum ServeError {
    #[error("{0}")]
    Connection(#[from] quinn::ConnectionError),
    #[error("{0}")]
    Frame(#[from] crate::net::FrameError),
    #[error("{0}")]
    Read(#[from] quinn::ReadError),
    #[error("{0}")]
    Standby(#[from] crate::standby::StandbyError),
    #[error("{0}")]
    Expand(#[from] super::zstream::ExpandError),
    #[error("{0}")]
    Decode(#[from] twinbox_protocol::codec::DecodeError),
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error("{0}")]
    State(#[from] twinbox_resync::schema::StateError),
    #[error("the peer broke the protocol: {0}")]
    Protocol(&'static str),
}

type Sessions = Arc<Mutex<HashMap<String, Arc<Session>>>>;

impl Server {
    /// A server of these mirrors.
    #[must_use]
    pub fn new(
        node: String,
        incarnation: Incarnation,
        state_dir: std::path::PathBuf,
        mirrors: HashMap<String, Arc<Served>>,
        lent: HashMap<String, Lent>,
        words: mpsc::Sender<Word>,
    ) -> Self {
        Server { node, incarnation, state_dir, mirrors, lent, words, open: Mutex::new(Some(vec![])) }
    }

    /// Ends every connection: who dials again finds the server that comes after this one, with other mirrors.
    pub fn close(&self) {
        let open = self.open.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        for connection in open.into_iter().flatten() {
            close(&connection, CloseCode::Shutdown, "its mirrors change");
        }
    }

    /// Remembers a connection for [`Server::close`]; `false` when that was already.
    fn remember(&self, connection: &quinn::Connection) -> bool {
        let mut open = self.open.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let Some(open) = open.as_mut() else { return false };
        open.retain(|connection| connection.close_reason().is_none());
        open.push(connection.clone());
        true
    }

    /// Serves one connection until it ends.
    pub async fn serve(self: Arc<Self>, incoming: Incoming) {
        let sessions = Sessions::default();
        let connection = incoming.connection;
        if !self.remember(&connection) {
            close(&connection, CloseCode::Shutdown, "its mirrors change");
            return;
        }
        loop {
            tokio::select! {
                stream = connection.accept_bi() => {
                    let Ok((send, recv)) = stream else { return };
                    let (server, sessions, connection, node) = (self.clone(), sessions.clone(), connection.clone(), incoming.node.clone());
                    tokio::spawn(async move {
                        if let Err(error) = server.control(&node, send, recv, &sessions).await {
                            tracing::warn!(peer = %node, %error, "session ended");
                            if matches!(error, ServeError::Protocol(_) | ServeError::Decode(_) | ServeError::Expand(_)) {
                                close(&connection, CloseCode::Protocol, "protocol");
                            }
                        }
                    });
                }
                stream = connection.accept_uni() => {
                    let Ok(recv) = stream else { return };
                    let (sessions, connection, node) = (sessions.clone(), connection.clone(), incoming.node.clone());
                    tokio::spawn(async move {
                        if let Err(error) = data(recv, &sessions).await {
                            tracing::debug!(peer = %node, %error, "stream ended");
                            if matches!(error, ServeError::Protocol(_) | ServeError::Decode(_) | ServeError::Expand(_)) {
                                close(&connection, CloseCode::Protocol, "protocol");
                            }
                        }
                    });
                }
            }
        }
    }

    async fn control(
        &self,
        peer: &str,
        mut send: quinn::SendStream,
        recv: quinn::RecvStream,
        sessions: &Sessions,
    ) -> Result<(), ServeError> {
        let mut control = FrameReader::<ToStandby>::new(recv, CONTROL_MAX);
        let first = timeout(HEAD_WITHIN, control.next()).await.map_err(|_| ServeError::Protocol("no hello"))??;
        let hello = match first {
            Some(ToStandby::Hello(hello)) => hello,
            Some(ToStandby::TakeOver { mirror, generation }) => return self.take_over(mirror, generation, &mut send).await,
            Some(ToStandby::Borrow { mirror, mirror_id }) => return self.lend(&mirror, mirror_id, &mut send, &mut control).await,
            Some(ToStandby::Rejoin(hello)) => return self.rejoin(&hello, &mut send, &mut control).await,
            _ => return Err(ServeError::Protocol("no hello first")),
        };
        let refuse = |code, message: String| ToPrimary::Refuse { code, message };
        let Some(served) = self.mirrors.get(&hello.mirror) else {
            let known = NodeState::open(&self.state_dir)?.mirror(&hello.mirror)?;
            let comes_back = known.as_ref().is_some_and(|known| crate::switch::is_returning(&self.state_dir, &hello.mirror, known.role));
            let (code, message) = match known.filter(|known| known.role == Role::Primary) {
                None if comes_back => (RefuseCode::Diverged, returning(&self.node, &hello)),
                Some(known) => {
                    if meeting(&hello, &known) == Meeting::Stand {
                        let _ = self.words.try_send(Word::Superseded(hello.mirror.clone(), hello.epoch)); // It asks again.
                    }
                    (RefuseCode::Diverged, two_primaries(&self.node, &hello, &known))
                }
                None => {
                    let why = "is not standby of a mirror named";
                    let message = format!("node `{}` {why} `{}`: check [[mirror]] in its configuration", self.node, hello.mirror);
                    (RefuseCode::NoSuchMirror, message)
                }
            };
            write_frame(&mut send, &refuse(code, message)).await?;
            let _ = send.finish();
            return Ok(());
        };
        let skew = skew_ms(hello.wall_ns);
        if skew.abs() > 1000 {
            tracing::warn!(peer, skew_ms = skew, "the primary's clock differs from ours: set both by NTP");
        }
        let replica = match self.replica(&hello, served).await {
            Ok(replica) => replica,
            Err((code, message)) => {
                tracing::error!(peer, %message, "session refused");
                write_frame(&mut send, &refuse(code, message)).await?;
                let _ = send.finish();
                return Ok(());
            }
        };
        let welcome = Welcome {
            protocol: PROTOCOL_VERSION,
            software: env!("CARGO_PKG_VERSION").into(),
            node: self.node.clone(),
            incarnation: self.incarnation,
            chunker: CHUNKER.into(),
            replica,
            wall_ns: wall_ns(),
        };
        write_frame(&mut send, &ToPrimary::Welcome(Box::new(welcome))).await?;

        let (out, mut words) = mpsc::unbounded_channel();
        let mut session: Option<Arc<Session>> = None;
        let result = loop {
            let failed = async {
                match &session {
                    Some(session) => session.failed().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                error = failed => break Err(error.into()),
                word = words.recv() => {
                    if let Some(word) = word {
                        write_frame(&mut send, &word).await?;
                    }
                }
                message = control.next() => {
                    let message = match message {
                        Ok(Some(message)) => message,
                        Ok(None) => break Ok(()),
                        Err(error) => break Err(error.into()),
                    };
                    match message {
                        ToStandby::Heartbeat { seq, wall_ns: theirs, stored } => {
                            if let Some(session) = &session {
                                session.stored(stored);
                            }
                            if let Ok(mut seen) = served.seen.lock() {
                                seen.connected = session.is_some();
                                seen.peer = Some((peer.into(), hello.software.clone(), skew_ms(theirs)));
                            }
                            write_frame(&mut send, &ToPrimary::Heartbeat { seq, wall_ns: wall_ns() }).await?;
                        }
                        ToStandby::Pull { since } if session.is_none() => {
                            let (rows, mut batches) = mpsc::channel(4);
                            let handle = served.handle.clone();
                            let pull = tokio::spawn(async move { handle.pull(since, rows).await });
                            while let Some(batch) = batches.recv().await {
                                write_frame(&mut send, &batch).await?;
                            }
                            match pull.await {
                                Ok(done) => done?,
                                Err(_) => break Err(ServeError::Protocol("pull was cut short")),
                            }
                        }
                        ToStandby::Fetch { path, hash } if session.is_none() => {
                            give(served, path, hash, &mut send).await?;
                        }
                        ToStandby::Begin { from, reset } if session.is_none() => {
                            self.adopt_history(&hello, served, reset)?;
                            let begun = served.handle.begin(from, reset, out.clone()).await?;
                            let begun = Arc::new(begun);
                            if let Ok(mut all) = sessions.lock() {
                                all.insert(hello.mirror.clone(), begun.clone());
                            }
                            session = Some(begun);
                            if let Ok(mut seen) = served.seen.lock() {
                                *seen = Seen { peer: Some((peer.into(), hello.software.clone(), skew)), diverged: None, connected: true };
                            }
                            tracing::info!(mirror = %hello.mirror, peer, lsn = %from.lsn, "primary connected");
                            write_frame(&mut send, &ToPrimary::Begun).await?;
                        }
                        ToStandby::Unstage { hash } => {
                            if let Some(session) = &session {
                                session.unstage(hash);
                            }
                        }
                        ToStandby::Keep { hashes, last } => {
                            if let Some(session) = &session {
                                session.keep(hashes, last);
                            }
                        }
                        ToStandby::Lacks { hash } => {
                            if let Some(session) = &session {
                                session.lacks(hash);
                            }
                        }
                        ToStandby::Gone { hash } => {
                            if let Some(session) = &session {
                                session.gone(hash);
                            }
                        }
                        _ => break Err(ServeError::Protocol("out of turn")),
                    }
                }
            }
        };
        if let Some(session) = session {
            if let Ok(mut all) = sessions.lock()
                && all.get(&hello.mirror).is_some_and(|s| Arc::ptr_eq(s, &session))
            {
                all.remove(&hello.mirror);
            }
            if let Ok(mut seen) = served.seen.lock() {
                seen.connected = false;
            }
        }
        if let Err(error) = &result {
            let _ = write_frame(&mut send, &ToPrimary::Refuse { code: RefuseCode::Failed, message: error.to_string() }).await;
            let _ = send.finish();
        }
        result
    }

    /// The primary until now asks this standby to take over.
    async fn take_over(&self, mirror: String, generation: Generation, send: &mut quinn::SendStream) -> Result<(), ServeError> {
        let known = NodeState::open(&self.state_dir)?.mirror(&mirror)?;
        let follows = known.as_ref().is_some_and(|known| known.role == Role::Standby && known.lineage.generation() == generation);
        // Asked again, because the answer was lost when its connections were closed.
        let has =
            |known: &MirrorState| known.role == Role::Primary && known.lineage.terms().iter().any(|term| term.generation == generation);
        let taken = if known.as_ref().is_some_and(has) {
            Ok(())
        } else if follows && self.mirrors.contains_key(&mirror) {
            let (reply, answer) = oneshot::channel();
            let asked = self.words.try_send(Word::TakeOver(mirror, generation, reply));
            match (asked, answer.await) {
                (Ok(()), Ok(done)) => done,
                _ => Err((RefuseCode::Busy, "its agent is busy or stopping".into())),
            }
        } else {
            Err((RefuseCode::Failed, format!("node `{}` is not a standby that follows the same history", self.node)))
        };
        let word = match taken {
            Ok(()) => ToPrimary::Begun,
            Err((code, message)) => ToPrimary::Refuse { code, message },
        };
        write_frame(send, &word).await?;
        let _ = send.finish();
        Ok(())
    }

    /// The primary asks for contents that its own disk has damaged.
    async fn lend(
        &self,
        mirror: &str,
        mirror_id: MirrorId,
        send: &mut quinn::SendStream,
        control: &mut FrameReader<ToStandby>,
    ) -> Result<(), ServeError> {
        let known = NodeState::open(&self.state_dir)?.mirror(mirror)?;
        let same = known.is_some_and(|known| known.role == Role::Standby && known.mirror_id == mirror_id);
        let Some(served) = self.mirrors.get(mirror).filter(|_| same) else {
            let message = format!("node `{}` is not a standby of mirror `{mirror}`", self.node);
            write_frame(send, &ToPrimary::Refuse { code: RefuseCode::NoSuchMirror, message }).await?;
            let _ = send.finish();
            return Ok(());
        };
        while let Some(message) = control.next().await? {
            let ToStandby::Fetch { path, hash } = message else { return Err(ServeError::Protocol("out of turn")) };
            give(served, path, hash, send).await?;
        }
        Ok(())
    }

    /// A node that was primary asks what is here now.
    async fn rejoin(&self, hello: &Hello, send: &mut quinn::SendStream, control: &mut FrameReader<ToStandby>) -> Result<(), ServeError> {
        let known = NodeState::open(&self.state_dir)?.mirror(&hello.mirror)?;
        let refusal = match (&known, self.lent.get(&hello.mirror)) {
            _ if hello.protocol != PROTOCOL_VERSION => Some("install the same version of twinbox on both nodes".to_owned()),
            (Some(known), Some(_)) if relation(known, hello) == Relation::Unrelated => {
                Some("their histories have nothing in common".to_owned())
            }
            (Some(known), Some(lent)) => {
                let us = crate::resync::serve::Us { node: &self.node, incarnation: self.incarnation, known };
                let served = crate::resync::serve::serve(us, hello, lent.clone(), send, control).await;
                served.err().map(|error| error.to_string())
            }
            _ => Some(format!(
                "node `{}` is not primary of mirror `{}`: promote it first, or run this command when it is back",
                self.node, hello.mirror
            )),
        };
        if let Some(message) = refusal {
            tracing::warn!(peer = %hello.node, mirror = %hello.mirror, %message, "a node that comes back was not helped");
            write_frame(send, &crate::resync::serve::refuse(message)).await?;
        }
        let _ = send.finish();
        Ok(())
    }

    async fn replica(&self, hello: &Hello, served: &Served) -> Result<Replica, (RefuseCode, String)> {
        let failed = |error: &dyn std::fmt::Display| (RefuseCode::Failed, error.to_string());
        if hello.protocol != PROTOCOL_VERSION || hello.chunker != CHUNKER {
            let message = format!(
                "primary runs twinbox {} (protocol {}), standby {} (protocol {PROTOCOL_VERSION}): install the same version on both",
                hello.software,
                hello.protocol,
                env!("CARGO_PKG_VERSION")
            );
            return Err((RefuseCode::Version, message));
        }
        let state = NodeState::open(&self.state_dir).and_then(|node| node.mirror(&hello.mirror)).map_err(|e| failed(&e))?;
        // A node that has given up follows whoever is primary: what it lacks here is kept.
        let gave_up = crate::switch::gave_up(&self.state_dir, &hello.mirror);
        if let Some(state) = state.as_ref().filter(|state| !gave_up || state.role == Role::Primary) {
            if state.role == Role::Primary {
                return Err((RefuseCode::Diverged, two_primaries(&self.node, hello, state)));
            }
            let relation = relation(state, hello);
            let why = match relation {
                Relation::Same | Relation::Ahead => None,
                // Terms of that primary itself, which its state does not remember: it will see.
                Relation::Behind if hello.epoch == state.epoch => None,
                Relation::Behind => Some(format!(
                    "the replica on node `{}` follows a newer history (generation {}) than the primary `{}` writes ({}): that node is not the primary any more; nothing was changed",
                    self.node,
                    state.lineage.generation(),
                    hello.node,
                    hello.lineage.generation()
                )),
                Relation::Forked { .. } | Relation::Unrelated => Some(format!(
                    "the replica on node `{}` follows generation {}, the primary `{}` writes {}: histories differ, nothing was changed",
                    self.node,
                    state.lineage.generation(),
                    hello.node,
                    hello.lineage.generation()
                )),
            };
            if let Some(why) = why {
                if let Ok(mut seen) = served.seen.lock() {
                    seen.diverged = Some(why.clone());
                }
                return Err((RefuseCode::Diverged, why));
            }
        }
        served.handle.replica(hello).await.map_err(|refusal| (refusal.code, refusal.message))
    }

    /// The replica is this primary's from now on, if it begins anew (`reset`) or that one's history goes on from the one known here: remember it before anything of it is written.
    fn adopt_history(&self, hello: &Hello, served: &Served, reset: bool) -> Result<(), ServeError> {
        let node = NodeState::open(&self.state_dir)?;
        let known = node.mirror(&hello.mirror)?;
        let relation = known.as_ref().map(|known| relation(known, hello));
        let goes_on = relation == Some(Relation::Ahead) || known.as_ref().is_some_and(|known| known.epoch < hello.epoch);
        if !reset && !goes_on {
            return Ok(());
        }
        let longer = known.as_ref().filter(|_| relation == Some(Relation::Behind)).map(|known| known.lineage.clone());
        let state = MirrorState {
            mirror_id: hello.mirror_id,
            role: Role::Standby,
            // Not back to a hello of before this primary remembered its own newest terms.
            lineage: longer.unwrap_or_else(|| hello.lineage.clone()),
            epoch: hello.epoch,
            digest_key: hello.digest_key,
            reserved: known.as_ref().map_or_else(Default::default, |s| s.reserved),
            complete: known.is_some_and(|s| s.complete),
        };
        if !node.follow(&hello.mirror, &state)? {
            return Err(ServeError::Protocol("this node was promoted"));
        }
        served.handle.follow(state.lineage, state.epoch);
        Ok(())
    }
}

/// Gives a content back.
async fn give(served: &Served, path: RelPath, hash: ContentHash, send: &mut quinn::SendStream) -> Result<(), ServeError> {
    let (pieces, mut answer) = mpsc::channel(4);
    let handle = served.handle.clone();
    let sent = tokio::spawn(async move { handle.content(path, hash, pieces).await });
    while let Some(message) = answer.recv().await {
        write_frame(send, &message).await?;
    }
    Ok(sent.await.map_err(|_| ServeError::Protocol("a content was cut short"))??)
}

/// What a primary is told whose standby was primary before it.
fn returning(node: &str, hello: &Hello) -> String {
    format!(
        "node `{node}` was primary of mirror `{}` before `{}`, and may have mail that nobody else has: run `twinbox resync plan` there, then `twinbox resync apply`",
        hello.mirror, hello.node
    )
}

/// What the primary that speaks does, and this one.
fn meeting(hello: &Hello, known: &MirrorState) -> Meeting {
    let theirs = Side { lineage: &hello.lineage, epoch: hello.epoch, position: hello.position };
    meet(theirs, Side { lineage: &known.lineage, epoch: known.epoch, position: Position::START })
}

/// What a primary is told that speaks to another one.
fn two_primaries(node: &str, hello: &Hello, known: &MirrorState) -> String {
    let said = match meeting(hello, known) {
        Meeting::Yield => format!("and was promoted after node `{}`: that one steps down as soon as it hears of it", hello.node),
        Meeting::Stand => format!("but node `{}` was promoted after it: `{node}` steps down now", hello.node),
        Meeting::Split | Meeting::Unrelated => "and nobody can tell which of them is right: stop one mail server, and run `twinbox resync plan --winner NODE` on that node, naming the other".into(),
    };
    format!("node `{node}`, too, is primary of mirror `{}`, {said}; nothing was changed on either side", hello.mirror)
}

/// How a primary's history relates to the one known here.
fn relation(known: &MirrorState, hello: &Hello) -> Relation {
    // Which of the contents of a term a node has is the standby's to say: here it is only which terms.
    let theirs = Side { lineage: &hello.lineage, epoch: hello.epoch, position: Position::START };
    relate(theirs, Side { lineage: &known.lineage, epoch: known.epoch, position: Position::START })
}

/// One log or bulk stream.
async fn data(mut recv: quinn::RecvStream, sessions: &Sessions) -> Result<(), ServeError> {
    let head =
        timeout(HEAD_WITHIN, read_frame::<StreamHead>(&mut recv, 4096)).await.map_err(|_| ServeError::Protocol("silent stream"))??;
    let (StreamHead::Log { mirror } | StreamHead::Bulk { mirror, .. }) = &head;
    let session = sessions.lock().ok().and_then(|all| all.get(mirror).cloned());
    let Some(session) = session else {
        let _ = recv.stop(1u32.into());
        return Ok(()); // The session ended while the stream was on its way.
    };
    let bulk = matches!(head, StreamHead::Bulk { .. });
    let mut expander = Expander::new(LOG_FRAME_MAX)?;
    // Not read before there is room for it: the line holds the rest back.
    let mut object = if bulk { Some(session.object().await?) } else { None };
    let mut buffer = vec![0; READ];
    while let Some(n) = recv.read(&mut buffer).await? {
        let mut rest = &buffer[..n];
        loop {
            let mut bodies = vec![];
            let more = expander.take(&mut rest, |body| bodies.push(body))?;
            for body in bodies {
                match &mut object {
                    None => session.frame(body).await?,
                    Some(object) => {
                        if object.item(decode::<BulkItem>(&body, LOG_FRAME_MAX)?).await? {
                            return Ok(());
                        }
                    }
                }
            }
            if !more {
                break;
            }
        }
    }
    Ok(())
}
