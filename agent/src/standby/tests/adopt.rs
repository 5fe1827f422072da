//! What start makes of the directory and the state it finds.

use super::*;

#[tokio::test]
async fn a_directory_with_files_is_refused_without_adopt() {
    let mut rig = Rig::empty();
    fs::write(rig.root().join("mine"), b"x").unwrap();
    let root = rig.root();
    assert_eq!(rig.start(), Err(StandbyError::NotEmpty { path: root.clone() }));
    fs::remove_file(root.join("mine")).unwrap();
    rig.start().unwrap();
    rig.stop();
    fs::remove_dir(&root).unwrap();
    assert!(matches!(rig.start(), Err(StandbyError::Root { .. })));
    fs::write(&root, b"a file").unwrap();
    assert!(matches!(rig.start(), Err(StandbyError::Root { .. })));
}

#[tokio::test]
async fn adopted_files_are_used_and_kept_when_replaced() {
    let mut rig = Rig::empty();
    let (same, other) = (noise(1, 90_000), noise(2, 3000));
    fs::create_dir(rig.root().join("d")).unwrap();
    fs::write(rig.root().join("d/same"), &same).unwrap();
    fs::write(rig.root().join("d/other"), &other).unwrap();
    fs::write(rig.root().join("gone"), b"only here").unwrap();
    fs::write(rig.root().join("patched"), noise(3, 9000)).unwrap();
    fs::hard_link(rig.root().join("gone"), rig.root().join("gone2")).unwrap();
    std::os::unix::fs::symlink("x", rig.root().join("sym")).unwrap();
    rig.start_with(true).unwrap();
    let replica = soon(rig.handle().replica(&hello(Position::START, Digest::default()))).await.unwrap();
    assert_eq!(replica, Replica::Adopted { rows: 7 }, "the root, and of two names of one file the first");
    let (out, mut got) = tokio::sync::mpsc::channel(100);
    soon(rig.handle().pull(None, out)).await.unwrap();
    let Some(ToPrimary::Rows { rows }) = got.recv().await else { panic!() };
    for (path, entry) in rows {
        rig.model.rows.insert(path, Row { entry: entry.unwrap(), local: None });
    }
    for bytes in [&same, &other, &noise(3, 9000)] {
        rig.model.bytes.insert(ContentHash::of(bytes), bytes.clone());
    }
    rig.begin().await.unwrap();
    let gone = if rig.model.rows.contains_key(&p("gone")) { "gone" } else { "gone2" };
    let left = if gone == "gone" { "gone2" } else { "gone" };
    let known = Op::Put { path: p("copy"), entry: file(&same, 4), content: Content::Known };
    let patch = rig.model.patch("patched", &[(0, b"new")], 9000, 4);
    let ops =
        vec![known, put("d/other", b"new", 5), remove(gone), put(left, b"newer", 5), patch, rename("d/same", "d/moved"), remove("sym")];
    ops.iter().for_each(|op| rig.model.perform(op).unwrap());
    let lsn = rig.send_raw(ops, FLAG_INITIAL).await;
    rig.applied(lsn).await;
    assert!(rig.handle().status().adopted);
    assert_eq!(rig.model.differences(&rig.root()), Vec::<String>::new());
    let kept: Vec<(String, Vec<u8>)> = rig.rescued();
    let names: Vec<&str> = kept.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["d/other", "gone", "gone2", "patched", "sym"]);
    assert_eq!(kept[0].1, other);
    // Complete: from now on what the primary removes is removed.
    let lsn = rig.send(vec![put("last", b"of the first sync", 6)]).await;
    rig.applied(lsn).await;
    assert!(!rig.handle().status().adopted);
    rig.check(vec![remove("d/other"), remove("d/moved")]).await;
    assert_eq!(rig.rescued().len(), 5);
}

#[tokio::test]
async fn a_damaged_manifest_is_set_aside_and_made_anew_from_the_files() {
    let mut rig = Rig::new().await;
    rig.check(vec![mkdir("d", 1), put("d/a", b"1", 1), put("b", &noise(1, 5000), 2)]).await;
    rig.stop();
    fs::write(rig.state().join("manifest.db"), vec![7; 10_000]).unwrap();
    rig.start().unwrap();
    assert!(rig.handle().status().last_error.unwrap().1.contains("damaged"));
    let aside =
        fs::read_dir(rig.state()).unwrap().filter(|e| e.as_ref().unwrap().file_name().to_string_lossy().contains("damaged")).count();
    assert!(aside >= 2, "manifest and log are kept");
    let replica = soon(rig.handle().replica(&hello(rig.outbox.last(), rig.model.digest()))).await.unwrap();
    assert_eq!(replica, Replica::Adopted { rows: 4 }, "of no known cut: the primary's status is `syncing` until it has compared them");
    assert_eq!(rig.model.differences(&rig.root()), Vec::<String>::new(), "the files are as they were");
}

#[tokio::test]
async fn another_or_an_empty_directory_under_the_same_path_is_refused() {
    let mut rig = Rig::new().await;
    rig.check(vec![put("a", b"1", 1), put("b", b"2", 1)]).await;
    rig.stop();
    fs::rename(rig.root(), rig.dir.path().join("elsewhere")).unwrap();
    fs::create_dir(rig.root()).unwrap();
    assert!(matches!(rig.start(), Err(StandbyError::Vanished { rows: 2, .. })));
    fs::write(rig.root().join("a"), b"1").unwrap();
    assert!(matches!(rig.start(), Err(StandbyError::OtherRoot { .. })));
    fs::remove_dir_all(rig.root()).unwrap();
    fs::rename(rig.dir.path().join("elsewhere"), rig.root()).unwrap();
    rig.start().unwrap();
}
