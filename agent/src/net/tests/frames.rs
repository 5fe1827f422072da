//! Frames and streams over a real connection.

use super::*;

#[tokio::test]
async fn frames_round_trip_and_raw_bytes_may_follow() {
    let (_a, _b, out, inn) = connected().await;
    let mut send = out.open_uni().await.unwrap();
    let value = (7_u64, "text".to_owned(), vec![1_u8; 100_000]);
    write_frame(&mut send, &value).await.unwrap();
    write_frame(&mut send, &()).await.unwrap();
    send.write_all(b"raw").await.unwrap();
    send.finish().unwrap();
    let mut recv = soon(inn.accept_uni()).await.unwrap();
    let read: (u64, String, Vec<u8>) = soon(read_frame(&mut recv, 200_000)).await.unwrap();
    assert_eq!(read, value);
    soon(read_frame::<()>(&mut recv, 0)).await.unwrap();
    assert_eq!(soon(recv.read_to_end(10)).await.unwrap(), b"raw");
}

#[tokio::test]
async fn hostile_frames_are_errors() {
    let (_a, _b, out, inn) = connected().await;
    let frame = encode_frame(&"hello").unwrap();
    let mut trailing = frame.clone();
    trailing[0] += 1;
    trailing.push(0);
    type Expected = fn(&FrameError) -> bool;
    let cases: [(&[u8], Expected); 7] = [
        (b"\xff\xff\xff\xff", |e| matches!(e, FrameError::TooLarge { max: 64, .. })),
        (b"\x41\0\0\0", |e| matches!(e, FrameError::TooLarge { len: 65, .. })),
        (b"\x05\0\0\0\xff\xff\xff\xff\x0f", |e| matches!(e, FrameError::Decode(_))),
        (b"\x02\0\0\0\x01\xff", |e| matches!(e, FrameError::Decode(_))),
        (&trailing, |e| matches!(e, FrameError::Trailing { count: 1 })),
        (&frame[..frame.len() - 1], |e| matches!(e, FrameError::Closed)),
        (b"\x05\0", |e| matches!(e, FrameError::Closed)),
    ];
    for (bytes, expected) in cases {
        for whole in [false, true] {
            let mut send = out.open_uni().await.unwrap();
            send.write_all(bytes).await.unwrap();
            send.finish().unwrap();
            let mut recv = soon(inn.accept_uni()).await.unwrap();
            let error = if whole {
                let mut reader = FrameReader::<String>::new(recv, 64);
                soon(reader.next()).await.unwrap_err()
            } else {
                soon(read_frame::<String>(&mut recv, 64)).await.unwrap_err()
            };
            assert!(expected(&error), "{bytes:?}: {error:?}");
        }
    }
}

#[tokio::test]
async fn a_frame_reader_loses_nothing_when_cancelled() {
    let (_a, _b, out, inn) = connected().await;
    let values: Vec<String> = (0..200).map(|n| "x".repeat(n * 7 % 300)).collect();
    let bytes: Vec<u8> = values.iter().flat_map(|v| encode_frame(v).unwrap()).collect();
    let mut send = out.open_uni().await.unwrap();
    let mut pieces = bytes.chunks(3);
    send.write_all(pieces.next().unwrap()).await.unwrap();
    let recv = soon(inn.accept_uni()).await.unwrap();
    let mut reader = FrameReader::<String>::new(recv, 300 + 8);
    let mut read = Vec::new();
    // Every write cancels a read that may be halfway through a frame.
    for piece in pieces {
        tokio::select! {
            biased;
            value = reader.next() => read.extend(value.unwrap()),
            () = tokio::task::yield_now() => {}
        }
        send.write_all(piece).await.unwrap();
    }
    send.finish().unwrap();
    while let Some(value) = soon(reader.next()).await.unwrap() {
        read.push(value);
    }
    assert_eq!(read, values);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_megabytes_arrive() {
    const PIECE: usize = 1 << 20;
    let (_a, _b, out, inn) = connected().await;
    let sending = tokio::spawn(async move {
        let mut send = out.open_uni().await.unwrap();
        let mut hash = blake3::Hasher::new();
        for n in 0..100_u8 {
            let piece = vec![n; PIECE];
            hash.update(&piece);
            send.write_all(&piece).await.unwrap();
        }
        send.finish().unwrap();
        let _ = send.stopped().await;
        hash.finalize()
    });
    let mut recv = soon(inn.accept_uni()).await.unwrap();
    let (mut hash, mut len) = (blake3::Hasher::new(), 0);
    while let Some(chunk) = soon(recv.read_chunk(PIECE, true)).await.unwrap() {
        hash.update(&chunk.bytes);
        len += chunk.bytes.len();
    }
    assert_eq!(len, 100 * PIECE);
    assert_eq!(soon(sending).await.unwrap(), hash.finalize());
}

#[tokio::test]
async fn admitted_peers_may_open_their_streams() {
    let (_a, _b, out, _inn) = connected().await;
    // Windows and stream limits were narrow until admission; all of this waits for the wide ones.
    let mut open = Vec::new();
    for _ in 0..64 {
        open.push(soon(out.open_uni()).await.unwrap());
        let (send, _recv) = soon(out.open_bi()).await.unwrap();
        open.push(send);
    }
    tokio::select! {
        biased;
        _ = out.open_uni() => panic!("not bounded"),
        () = std::future::ready(()) => {}
    }
    soon(open[0].write_all(&vec![0; 8 << 20])).await.unwrap();
}
