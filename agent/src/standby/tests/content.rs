//! Contents given back: what rows name, whole and right, and nothing else.

use twinbox_protocol::msg::PIECE_MAX;

use super::*;

/// What the standby answers: the bytes, or `None` for "not here".
async fn asked(rig: &Rig, path: &str, hash: ContentHash) -> Option<Vec<u8>> {
    asked_with_names(rig, path, hash).await.0
}

async fn asked_with_names(rig: &Rig, path: &str, hash: ContentHash) -> (Option<Vec<u8>>, Vec<RelPath>) {
    let mut names = vec![];
    let (out, mut answer) = mpsc::channel(2);
    let handle = rig.handle();
    let path = p(path);
    let sent = tokio::spawn(async move { handle.content(path, hash, out).await });
    let mut bytes = vec![];
    let end = loop {
        match soon(answer.recv()).await.expect("an end") {
            ToPrimary::Piece { bytes: piece } => {
                assert!(piece.len() <= PIECE_MAX && !piece.is_empty());
                bytes.extend_from_slice(&piece);
            }
            ToPrimary::Names { paths } => names = paths,
            ToPrimary::Fetched { hash: said } => {
                assert_eq!(said, hash);
                break Some(bytes);
            }
            ToPrimary::NotHere { hash: said } => {
                assert_eq!((said, bytes.len()), (hash, 0));
                break None;
            }
            other => panic!("{other:?}"),
        }
    };
    soon(sent).await.unwrap().unwrap();
    assert!(answer.recv().await.is_none(), "nothing after the end");
    (end, names)
}

#[tokio::test(flavor = "multi_thread")]
async fn contents_come_back_in_pieces() {
    let mut rig = Rig::new().await;
    let (small, large) = (noise(1, 700), noise(2, 60_000));
    rig.check(vec![put("small", &small, 1), put("large", &large, 1), put("empty", b"", 1), mkdir("d", 1)]).await;
    for (path, bytes) in [("small", &small[..]), ("large", &large), ("empty", b"")] {
        assert_eq!(asked(&rig, path, ContentHash::of(bytes)).await.as_deref(), Some(bytes), "{path}");
    }
    assert_eq!(asked(&rig, "another name", ContentHash::of(&large)).await, Some(large), "found by its hash");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_given_that_no_row_names_or_that_is_not_what_it_names() {
    let mut rig = Rig::new().await;
    rig.check(vec![put("a", b"mail", 1), mkdir("d", 1)]).await;
    fs::write(rig.dir.path().join("secret"), b"secret").unwrap();
    fs::write(rig.root().join("stranger"), b"stranger").unwrap();
    std::os::unix::fs::symlink("../secret", rig.root().join("link")).unwrap();
    for (path, bytes) in
        [("link", &b"secret"[..]), ("stranger", b"stranger"), ("a", b"other"), ("d", b""), ("a/b", b"mail 2"), ("none", b"none")]
    {
        assert_eq!(asked(&rig, path, ContentHash::of(bytes)).await, None, "{path}");
    }
    // Changed by somebody: of the same length, so only the hash tells.
    fs::write(rig.root().join("a"), b"liam").unwrap();
    assert_eq!(asked(&rig, "a", ContentHash::of(b"mail")).await, None);
    // A link in the way of a path whose row is a file.
    fs::remove_file(rig.root().join("a")).unwrap();
    fs::write(rig.dir.path().join("twin"), b"mail").unwrap();
    std::os::unix::fs::symlink("../twin", rig.root().join("a")).unwrap();
    assert_eq!(asked(&rig, "a", ContentHash::of(b"mail")).await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn other_names_of_the_file_come_first() {
    let mut rig = Rig::new().await;
    rig.check(vec![put("a", b"mail", 1), link("a", "b"), put("other", b"mail", 1)]).await;
    let (bytes, names) = asked_with_names(&rig, "b", ContentHash::of(b"mail")).await;
    assert_eq!((bytes.as_deref(), names), (Some(&b"mail"[..]), vec![p("a")]));
}
