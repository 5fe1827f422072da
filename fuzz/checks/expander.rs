//! A compressed stream from a peer, in arbitrary pieces: no frame over the limit comes out, one step gives a bounded amount whatever
//! went in, and what was compressed honestly comes out as it went in.
//!
//! First byte: size of the pieces, and whether the rest is the compressed stream itself or what we compress. Fuzzed by
//! `fuzz_targets/expander.rs`; the committed corpus is replayed by `agent/tests/corpus.rs`.

use twinbox::link::zstream::{Compressor, Expander, STEP};

/// Largest frame taken.
const MAX: usize = 64 * 1024;

/// Bodies of the stream, or `None` when it was refused.
fn expand(stream: &[u8], piece: usize) -> Option<Vec<Vec<u8>>> {
    let mut expander = Expander::new(MAX).expect("memory for a decoder");
    let mut bodies = vec![];
    for mut piece in stream.chunks(piece) {
        loop {
            let (mut count, mut bytes) = (0, 0);
            let more = expander.take(&mut piece, |body| {
                assert!(body.len() <= MAX, "a frame of {} bytes", body.len());
                (count, bytes) = (count + 1, bytes + body.len());
                // Beyond this many the stream is a bomb; only that it comes out in small steps matters then.
                if bodies.len() < 1 << 16 {
                    bodies.push(body);
                }
            });
            assert!(bytes <= MAX + STEP && count <= STEP / 4 + 1, "{bytes} bytes in {count} frames at one step");
            match more {
                Ok(true) => {}
                Ok(false) => break,
                Err(_) => return None,
            }
        }
        assert!(piece.is_empty(), "the expander left input behind");
    }
    Some(bodies)
}

/// Panics when a promise of the expander is broken.
pub(crate) fn check(data: &[u8]) {
    let Some((&kind, data)) = data.split_first() else { return };
    let piece = 1 + usize::from(kind >> 1) * 33;
    if kind & 1 == 0 {
        let _ = expand(data, piece);
        return;
    }
    // Bytes 1.. are lengths of bodies, whose content is the data itself.
    let mut compressor = Compressor::new(kind & 2 != 0).expect("memory for an encoder");
    let (mut stream, mut sent, mut rest) = (vec![], vec![], data);
    while let Some((&len, after)) = rest.split_first() {
        let (body, after) = after.split_at(after.len().min(usize::from(len)));
        compressor.frame(body).expect("compresses");
        if len % 3 == 0 {
            stream.extend(compressor.flush().expect("flushes"));
        }
        sent.push(body.to_vec());
        rest = after;
    }
    stream.extend(compressor.flush().expect("flushes"));
    assert_eq!(expand(&stream, piece), Some(sent), "not what was compressed");
}
