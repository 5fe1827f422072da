//! How QUIC is set up, from a LAN to a WAN: windows, timers, stream counts, and the UDP socket under it.
//!
//! quinn's defaults are for 100 Mbit/s at 100 ms and send no keep-alive. A window must hold bandwidth × round trip, or the
//! link idles: 64 MiB is 10 Gbit/s at 50 ms. Windows are also what a peer can make this node buffer, so a connection
//! starts with `ARRIVAL_WINDOW` and is widened only once its key is known.
//!
//! It does not measure or adapt anything; congestion control stays quinn's default.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use quinn::{IdleTimeout, TransportConfig, VarInt};
use rustix::net::sockopt;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with};

/// Streams a peer may have open towards us, of each kind: control, log, and bulk transfers with room to spare.
const STREAMS_MAX: u32 = 64;
/// What an incoming connection may send before its key is known to be pinned: a pairing claim fits many times over.
const ARRIVAL_WINDOW: u32 = 64 * 1024;
/// And on how many streams: pairing needs one.
const ARRIVAL_BIDI: u32 = 1;
/// Before the first sample. quinn's 333 ms makes every loss in a handshake cost a second; on a link slower than this
/// the only harm is a handshake packet sent twice.
const INITIAL_RTT: Duration = Duration::from_millis(100);
/// Wanted kernel buffer of the UDP socket, each way: 8 ms of a 10 Gbit/s burst while the agent is not scheduled.
const SOCKET_BUFFER: usize = 8 << 20;

/// Transport parameters an operator may set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tuning {
    /// Bytes in flight towards us on one stream.
    pub stream_window: u32,
    /// Bytes in flight towards us on one connection, all streams together.
    pub connection_window: u32,
    /// Bytes we keep for one connection until the peer has acknowledged them.
    pub send_window: u64,
    /// A quiet connection shows that it is alive this often.
    pub keep_alive: Duration,
    /// A connection silent for this long is dead.
    pub idle_timeout: Duration,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            stream_window: 16 << 20,
            connection_window: 64 << 20,
            send_window: 64 << 20,
            keep_alive: Duration::from_secs(1),
            idle_timeout: Duration::from_secs(5),
        }
    }
}

/// A [`Tuning`] that cannot work.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TuningError {
    /// Live connections would be taken for dead.
    #[error(
        "keep-alive every {keep_alive:?} is too rare for an idle timeout of {idle_timeout:?}: the timeout must be at least twice as long"
    )]
    KeepAlive {
        /// As configured.
        keep_alive: Duration,
        /// As configured.
        idle_timeout: Duration,
    },
    /// Longer than QUIC can express.
    #[error("idle timeout of {idle_timeout:?} is too long for QUIC")]
    IdleTimeout {
        /// As configured.
        idle_timeout: Duration,
    },
    /// Nothing could ever be sent.
    #[error("{field} must not be 0")]
    Zero {
        /// Which one.
        field: &'static str,
    },
}

impl Tuning {
    /// Client side: the server's key is proven before its first application byte, so the windows are wide at once.
    pub(super) fn outgoing(&self) -> Result<Arc<TransportConfig>, TuningError> {
        let mut config = self.common()?;
        config
            .receive_window(self.connection_window.into())
            .max_concurrent_uni_streams(STREAMS_MAX.into())
            .max_concurrent_bidi_streams(STREAMS_MAX.into());
        Ok(Arc::new(config))
    }

    /// Server side: see [`ARRIVAL_WINDOW`]; [`Tuning::widen`] follows once the peer is known.
    pub(super) fn incoming(&self) -> Result<Arc<TransportConfig>, TuningError> {
        let mut config = self.common()?;
        config
            .receive_window(ARRIVAL_WINDOW.into())
            .max_concurrent_uni_streams(VarInt::from_u32(0))
            .max_concurrent_bidi_streams(ARRIVAL_BIDI.into());
        Ok(Arc::new(config))
    }

    pub(super) fn widen(&self, connection: &quinn::Connection) {
        connection.set_receive_window(self.connection_window.into());
        connection.set_max_concurrent_uni_streams(STREAMS_MAX.into());
        connection.set_max_concurrent_bi_streams(STREAMS_MAX.into());
    }

    fn common(&self) -> Result<TransportConfig, TuningError> {
        let Self { keep_alive, idle_timeout, .. } = *self;
        for (field, zero) in [
            ("stream_window", self.stream_window == 0),
            ("connection_window", self.connection_window == 0),
            ("send_window", self.send_window == 0),
            ("keep_alive", keep_alive.is_zero()),
        ] {
            if zero {
                return Err(TuningError::Zero { field });
            }
        }
        if keep_alive.saturating_mul(2) > idle_timeout {
            return Err(TuningError::KeepAlive { keep_alive, idle_timeout });
        }
        let idle = IdleTimeout::try_from(idle_timeout).map_err(|_| TuningError::IdleTimeout { idle_timeout })?;
        let mut config = TransportConfig::default();
        config
            .stream_receive_window(self.stream_window.into())
            .send_window(self.send_window)
            .keep_alive_interval(Some(keep_alive))
            .max_idle_timeout(Some(idle))
            .initial_rtt(INITIAL_RTT)
            .datagram_receive_buffer_size(None);
        Ok(config)
    }
}

/// A UDP socket at `addr`, or for dialling only, at any free port. A wildcard IPv6 address serves IPv4 as well.
/// Larger buffers are asked for and a refusal is ignored: they only matter at speeds where an operator will look.
pub(super) fn udp_socket(addr: Option<SocketAddr>) -> io::Result<UdpSocket> {
    match addr {
        Some(addr) => bound(addr),
        None => bound((IpAddr::V6(Ipv6Addr::UNSPECIFIED), 0).into()).or_else(|_| bound((IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0).into())),
    }
}

fn bound(addr: SocketAddr) -> io::Result<UdpSocket> {
    let family = match addr {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let socket = socket_with(family, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    if addr.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED) {
        sockopt::set_ipv6_v6only(&socket, false)?;
    }
    // FORCE goes beyond net.core.{r,w}mem_max and needs CAP_NET_ADMIN.
    let _ = sockopt::set_socket_recv_buffer_size_force(&socket, SOCKET_BUFFER)
        .or_else(|_| sockopt::set_socket_recv_buffer_size(&socket, SOCKET_BUFFER));
    let _ = sockopt::set_socket_send_buffer_size_force(&socket, SOCKET_BUFFER)
        .or_else(|_| sockopt::set_socket_send_buffer_size(&socket, SOCKET_BUFFER));
    bind(&socket, &addr)?;
    Ok(UdpSocket::from(socket))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impossible_tuning_is_refused() {
        let good = Tuning::default();
        assert!(good.outgoing().is_ok() && good.incoming().is_ok());
        let (rare, forever) = (Duration::from_secs(4), Duration::MAX);
        let zero = Duration::ZERO;
        for bad in [
            Tuning { keep_alive: rare, ..good.clone() },
            Tuning { keep_alive: zero, ..good.clone() },
            Tuning { idle_timeout: forever, ..good.clone() },
            Tuning { stream_window: 0, ..good.clone() },
        ] {
            assert!(bad.outgoing().is_err(), "{bad:?}");
        }
    }
}
