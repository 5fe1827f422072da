//! One value, one frame: a little-endian `u32` length, then that many bytes of postcard.
//!
//! Invariants: memory grows only with bytes that have arrived, never with a length that was merely announced; a frame
//! over the reader's bound is refused on its header; a value that does not fill its frame exactly is refused.
//!
//! Any error leaves the stream out of step: drop it. Cancel safety is stated at each function. It does not compress,
//! checksum (QUIC authenticates every packet) or know any message type.

use std::marker::PhantomData;

use quinn::{ConnectionError, ReadError, RecvStream, SendStream, VarInt, WriteError};
use serde::Serialize;
use serde::de::DeserializeOwned;

const HEADER: usize = 4;

/// Why a frame could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// Longer than the reader allows, or than a frame can be.
    #[error("frame of {len} bytes, {max} allowed")]
    TooLarge {
        /// Announced or encoded length in bytes.
        len: usize,
        /// The bound.
        max: usize,
    },
    /// The bytes are not the value expected here, or (writing) the value cannot be encoded.
    #[error("frame does not hold the value expected")]
    Decode(#[source] postcard::Error),
    /// The value ended before its frame did.
    #[error("{count} bytes left over in a frame")]
    Trailing {
        /// Bytes after the value.
        count: usize,
    },
    /// The peer ended the stream inside a frame, or where a frame was due.
    #[error("stream ended where a frame was due")]
    Closed,
    /// The peer abandoned the stream.
    #[error("peer abandoned the stream with code {code}")]
    Reset {
        /// Its application code.
        code: VarInt,
    },
    /// The connection is gone.
    #[error("connection lost")]
    Io(#[from] ConnectionError),
}

impl From<ReadError> for FrameError {
    fn from(e: ReadError) -> Self {
        match e {
            ReadError::Reset(code) => Self::Reset { code },
            ReadError::ConnectionLost(e) => Self::Io(e),
            _ => Self::Closed,
        }
    }
}

impl From<WriteError> for FrameError {
    fn from(e: WriteError) -> Self {
        match e {
            WriteError::Stopped(code) => Self::Reset { code },
            WriteError::ConnectionLost(e) => Self::Io(e),
            _ => Self::Closed,
        }
    }
}

/// The frame of one value, header included.
pub fn encode_frame<T: Serialize + ?Sized>(value: &T) -> Result<Vec<u8>, FrameError> {
    let mut frame = postcard::to_extend(value, vec![0; HEADER]).map_err(FrameError::Decode)?;
    let len = frame.len() - HEADER;
    let header = u32::try_from(len).map_err(|_| FrameError::TooLarge { len, max: u32::MAX as usize })?;
    frame[..HEADER].copy_from_slice(&header.to_le_bytes());
    Ok(frame)
}

/// Writes one value. Not cancel safe: dropped halfway, part of a frame has gone out and the stream is useless.
pub async fn write_frame<T: Serialize + ?Sized>(send: &mut SendStream, value: &T) -> Result<(), FrameError> {
    Ok(send.write_all(&encode_frame(value)?).await?)
}

/// Reads one value of at most `max` encoded bytes, and not a byte more: raw bytes may follow. Not cancel safe.
pub async fn read_frame<T: DeserializeOwned>(recv: &mut RecvStream, max: usize) -> Result<T, FrameError> {
    let mut buf = Vec::new();
    fill(recv, &mut buf, HEADER).await?;
    let due = frame_len(&buf, max)?;
    fill(recv, &mut buf, due).await?;
    decode(&buf[HEADER..])
}

async fn fill(recv: &mut RecvStream, buf: &mut Vec<u8>, due: usize) -> Result<(), FrameError> {
    while buf.len() < due {
        let chunk = recv.read_chunk(due - buf.len(), true).await?;
        buf.extend_from_slice(&chunk.ok_or(FrameError::Closed)?.bytes);
    }
    Ok(())
}

/// Bytes, header included, that `buf` must hold to make progress: the header, then the whole frame.
fn frame_len(buf: &[u8], max: usize) -> Result<usize, FrameError> {
    let Some(header) = buf.first_chunk::<HEADER>() else {
        return Ok(HEADER);
    };
    let len = u32::from_le_bytes(*header) as usize;
    if len > max {
        return Err(FrameError::TooLarge { len, max });
    }
    Ok(HEADER + len)
}

fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T, FrameError> {
    let (value, rest) = postcard::take_from_bytes(body).map_err(FrameError::Decode)?;
    match rest.len() {
        0 => Ok(value),
        count => Err(FrameError::Trailing { count }),
    }
}

/// Reads the frames of one stream, for use in `tokio::select!`: what has arrived of a frame is kept here, so dropping a
/// pending [`FrameReader::next`] loses nothing.
#[derive(Debug)]
pub struct FrameReader<T> {
    recv: RecvStream,
    buf: Vec<u8>,
    /// Bytes at the front of `buf` already handed out.
    taken: usize,
    max: usize,
    frames_of: PhantomData<fn() -> T>,
}

/// Read at once from the stream; more than most frames, so that many small ones cost one wake-up.
const READ_AHEAD: usize = 64 * 1024;

impl<T: DeserializeOwned> FrameReader<T> {
    /// Frames of at most `max` encoded bytes each.
    pub fn new(recv: RecvStream, max: usize) -> Self {
        Self { recv, buf: Vec::new(), taken: 0, max, frames_of: PhantomData }
    }

    /// The next value; `None` once the peer has finished the stream after a whole frame. Cancel safe.
    pub async fn next(&mut self) -> Result<Option<T>, FrameError> {
        loop {
            let ready = &self.buf[self.taken..];
            let due = frame_len(ready, self.max)?;
            if ready.len() >= HEADER && ready.len() >= due {
                let value = decode(&ready[HEADER..due])?;
                self.taken += due;
                return Ok(Some(value));
            }
            // Less than one frame is left: moving it to the front keeps the buffer within one frame and one read.
            self.buf.drain(..self.taken);
            self.taken = 0;
            match self.recv.read_chunk(READ_AHEAD, true).await? {
                Some(chunk) => self.buf.extend_from_slice(&chunk.bytes),
                None if self.buf.is_empty() => return Ok(None),
                None => return Err(FrameError::Closed),
            }
        }
    }

    /// The stream, and what was read ahead of it.
    pub fn into_parts(mut self) -> (RecvStream, Vec<u8>) {
        self.buf.drain(..self.taken);
        (self.recv, self.buf)
    }
}
