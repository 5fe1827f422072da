//! One zstd stream of length-prefixed frames, flushed where the writer says, and its reader that never holds more than one frame.
//!
//! The window is 8 MiB with long-distance matching: thousands of similar headers, and a message delivered to many mailboxes, compress against each other. The decoder refuses larger windows and expands at most
//! 128 KiB bytes at a time, and the caller deals with what came out before it asks for more: a hostile peer cannot make either allocate,
//! although a few KiB of zstd may stand for a GiB of tiny frames.

use zstd::stream::raw::{CParameter, DParameter, Decoder, InBuffer, Operation, OutBuffer};
use zstd::stream::write::Encoder;

use twinbox_protocol::codec::DecodeError;

/// log2 of the window.
const WINDOW_LOG: u32 = 23;
/// Bytes expanded at a time.
pub const STEP: usize = 128 * 1024;
/// Level 1 to 3 cost little more than copying; 3 is where mail text stops gaining.
const LEVEL: i32 = 3;

/// The writing end.
pub struct Compressor {
    encoder: Encoder<'static, Vec<u8>>,
}

impl Compressor {
    /// A new stream. `long`: for the log, whose repetitions are far apart.
    ///
    /// # Errors
    /// zstd's (out of memory).
    pub fn new(long: bool) -> std::io::Result<Self> {
        let mut encoder = Encoder::new(vec![], LEVEL)?;
        if long {
            encoder.set_parameter(CParameter::WindowLog(WINDOW_LOG))?;
            encoder.set_parameter(CParameter::EnableLongDistanceMatching(true))?;
        }
        Ok(Compressor { encoder })
    }

    /// Adds a frame.
    ///
    /// # Errors
    /// zstd's.
    pub fn frame(&mut self, body: &[u8]) -> std::io::Result<()> {
        use std::io::Write;
        self.encoder.write_all(&(body.len() as u32).to_le_bytes())?;
        self.encoder.write_all(body)
    }

    /// Everything added so far, as bytes the reader can expand wholly.
    ///
    /// # Errors
    /// zstd's.
    pub fn flush(&mut self) -> std::io::Result<Vec<u8>> {
        use std::io::Write;
        self.encoder.flush()?;
        Ok(std::mem::take(self.encoder.get_mut()))
    }
}

/// The reading end.
pub struct Expander {
    decoder: Decoder<'static>,
    out: Vec<u8>,
    frame: Vec<u8>,
    max: usize,
}

/// Why a compressed stream cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExpandError {
    /// Not zstd, or a window larger than agreed.
    #[error("compressed stream: {0}")]
    Zstd(#[from] std::io::Error),
    /// A frame is too large.
    #[error(transparent)]
    Frame(#[from] DecodeError),
}

impl Expander {
    /// Reads frames of at most `max` bytes.
    ///
    /// # Errors
    /// zstd's (out of memory).
    pub fn new(max: usize) -> std::io::Result<Self> {
        let mut decoder = Decoder::new()?;
        decoder.set_parameter(DParameter::WindowLogMax(WINDOW_LOG))?;
        Ok(Expander { decoder, out: vec![0; STEP], frame: vec![], max })
    }

    /// Expands a step of the compressed `bytes`, which are advanced past what was read, and gives the bodies that are complete: at most
    /// [`STEP`] bytes of them, besides one that began earlier. Whether to call again, with what is left of `bytes`, before the next ones arrive.
    ///
    /// # Errors
    /// [`ExpandError`]: the stream is of no use after it.
    pub fn take(&mut self, bytes: &mut &[u8], mut sink: impl FnMut(Vec<u8>)) -> Result<bool, ExpandError> {
        let mut input = InBuffer::around(bytes);
        let mut output = OutBuffer::around(&mut self.out[..]);
        self.decoder.run(&mut input, &mut output)?;
        let (read, produced) = (input.pos(), output.pos());
        let mut rest = &self.out[..produced];
        while !rest.is_empty() {
            let need = if self.frame.len() < 4 {
                4
            } else {
                let len = u32::from_le_bytes([self.frame[0], self.frame[1], self.frame[2], self.frame[3]]) as usize;
                if len > self.max {
                    return Err(DecodeError::TooLarge { len, max: self.max }.into());
                }
                4 + len
            };
            let n = (need - self.frame.len()).min(rest.len());
            self.frame.extend_from_slice(&rest[..n]);
            rest = &rest[n..];
            if need > 4 && self.frame.len() == need {
                let body = self.frame.split_off(4);
                self.frame.clear();
                sink(body);
            } else if self.frame.len() == 4 && self.frame == [0; 4] {
                self.frame.clear();
                sink(vec![]);
            }
        }
        *bytes = &bytes[read..];
        Ok(!bytes.is_empty() || produced == STEP)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_out_as_they_went_in_whatever_the_pieces() {
        let frames: Vec<Vec<u8>> =
            [0usize, 1, 3, 100, 70_000, 1_000_000].iter().map(|n| (0..*n).map(|i| (i % 251) as u8).collect()).collect();
        for step in [1usize, 7, 4096] {
            let mut compressor = Compressor::new(true).unwrap();
            let mut bytes = vec![];
            for frame in &frames {
                compressor.frame(frame).unwrap();
                bytes.extend(compressor.flush().unwrap());
            }
            let (mut expander, mut got) = (Expander::new(1 << 20).unwrap(), vec![]);
            for mut piece in bytes.chunks(step) {
                while expander.take(&mut piece, |f| got.push(f)).unwrap() {}
            }
            assert!(got == frames, "by {step}");
        }
    }

    #[test]
    fn a_bomb_is_refused_before_it_is_held() {
        let mut compressor = Compressor::new(false).unwrap();
        compressor.frame(&vec![0; 64 << 20]).unwrap();
        let bytes = compressor.flush().unwrap();
        let mut expander = Expander::new(1 << 20).unwrap();
        let mut rest = &bytes[..];
        let refused = std::iter::from_fn(|| Some(expander.take(&mut rest, |_| {}))).find(|more| !matches!(more, Ok(true)));
        assert!(matches!(refused, Some(Err(_))));
        assert!(expander.frame.capacity() < 2 << 20);
        assert!(Expander::new(1).unwrap().take(&mut &b"not zstd at all"[..], |_| {}).is_err());
    }

    #[test]
    fn a_bomb_of_empty_frames_comes_out_in_bounded_steps() {
        // 64 MiB of zeros are sixteen million frames without a body, in a few KiB.
        let mut encoder = Encoder::new(vec![], LEVEL).unwrap();
        std::io::Write::write_all(&mut encoder, &vec![0; 64 << 20]).unwrap();
        let bytes = encoder.finish().unwrap();
        assert!(bytes.len() < 16 << 10, "{}", bytes.len());
        let (mut expander, mut rest, mut all) = (Expander::new(1 << 20).unwrap(), &bytes[..], 0);
        loop {
            let mut frames = 0;
            let more = expander.take(&mut rest, |_| frames += 1).unwrap();
            assert!(frames <= STEP / 4, "{frames} at one step");
            all += frames;
            if !more {
                break;
            }
        }
        assert_eq!(all, 16 << 20);
    }
}
