//! A connection on every configured address of a peer, kept up with backoff. QUIC's keep-alive is the heartbeat on each.
//!
//! Does not use them: sessions take the first that works.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::net::{Endpoint, Fingerprint};
use crate::status::AddressStatus;

/// First pause after a failure; doubles up to `BACKOFF_MAX`.
const BACKOFF_MIN: Duration = Duration::from_millis(100);
/// Longest pause: a standby that comes back is found within this time.
const BACKOFF_MAX: Duration = Duration::from_secs(2);

struct PathState {
    addr: SocketAddr,
    connection: watch::Receiver<Option<quinn::Connection>>,
    error: Arc<Mutex<Option<String>>>,
    /// Bytes sent and received on connections that have ended.
    past: Arc<Mutex<(u64, u64)>>,
}

/// See the module's text.
pub struct Paths {
    node: String,
    paths: Vec<PathState>,
    tasks: Vec<JoinHandle<()>>,
}

impl Paths {
    /// Starts dialling every address.
    #[must_use]
    pub fn start(endpoint: &Endpoint, node: &str, addresses: &[SocketAddr], fingerprint: Fingerprint) -> Self {
        let (mut paths, mut tasks) = (vec![], vec![]);
        for addr in addresses {
            let (publish, connection) = watch::channel(None);
            let (error, past) = (Arc::new(Mutex::new(None)), Arc::new(Mutex::new((0, 0))));
            tasks.push(tokio::spawn(keep(endpoint.clone(), *addr, fingerprint, publish, error.clone(), past.clone())));
            paths.push(PathState { addr: *addr, connection, error, past });
        }
        Paths { node: node.into(), paths, tasks }
    }

    /// The peer's name.
    #[must_use]
    pub fn node(&self) -> &str {
        &self.node
    }

    /// Waits for a connection that works; the first configured address is preferred.
    pub async fn connection(&self) -> quinn::Connection {
        let mut watches: Vec<_> = self.paths.iter().map(|p| p.connection.clone()).collect();
        loop {
            for path in &mut watches {
                if let Some(connection) = path.borrow_and_update().as_ref().filter(|c| c.close_reason().is_none()) {
                    return connection.clone();
                }
            }
            let mut waits: Vec<_> = watches.iter_mut().map(|w| Box::pin(w.changed())).collect();
            std::future::poll_fn(|cx| {
                if waits.iter_mut().any(|w| w.as_mut().poll(cx).is_ready()) { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
            })
            .await;
        }
    }

    /// For status.
    #[must_use]
    pub fn addresses(&self) -> Vec<AddressStatus> {
        let of = |path: &PathState| {
            let connection = path.connection.borrow().clone().filter(|c| c.close_reason().is_none());
            AddressStatus {
                addr: path.addr.to_string(),
                connected: connection.is_some(),
                rtt_ms: connection.map(|c| (c.rtt().as_secs_f64() * 1e6).round() / 1e3),
                last_error: path.error.lock().ok().and_then(|e| e.clone()),
            }
        };
        self.paths.iter().map(of).collect()
    }

    /// Bytes sent and received in UDP datagrams, over all connections so far.
    #[must_use]
    pub fn wire(&self) -> (u64, u64) {
        let mut total = (0, 0);
        for path in &self.paths {
            let past = path.past.lock().map(|p| *p).unwrap_or_default();
            total = (total.0 + past.0, total.1 + past.1);
            if let Some(connection) = path.connection.borrow().as_ref() {
                let stats = connection.stats();
                total = (total.0 + stats.udp_tx.bytes, total.1 + stats.udp_rx.bytes);
            }
        }
        total
    }
}

impl Drop for Paths {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

use std::future::Future;

async fn keep(
    endpoint: Endpoint,
    addr: SocketAddr,
    fingerprint: Fingerprint,
    publish: watch::Sender<Option<quinn::Connection>>,
    error: Arc<Mutex<Option<String>>>,
    past: Arc<Mutex<(u64, u64)>>,
) {
    let mut backoff = BACKOFF_MIN;
    let note = |why: String| {
        if let Ok(mut error) = error.lock() {
            if error.as_ref() != Some(&why) {
                tracing::info!(error = %why, "peer not reached on an address");
            }
            *error = Some(why);
        }
    };
    loop {
        match endpoint.dial(addr, fingerprint).await {
            Ok(connection) => {
                let since = Instant::now();
                publish.send_replace(Some(connection.clone()));
                let why = connection.closed().await;
                let stats = connection.stats();
                publish.send_replace(None);
                if let Ok(mut past) = past.lock() {
                    past.0 += stats.udp_tx.bytes;
                    past.1 += stats.udp_rx.bytes;
                }
                note(why.to_string());
                if since.elapsed() > BACKOFF_MAX {
                    backoff = BACKOFF_MIN;
                }
            }
            Err(why) => note(why.to_string()),
        }
        tokio::time::sleep_until(Instant::now() + backoff).await;
        backoff = (backoff * 2).min(BACKOFF_MAX);
    }
}
