//! As an ordinary user: closed directories are opened and closed again, what cannot be stored is counted.
//!
//! Run by root, the test runs itself again as nobody; run by somebody else it runs as it is.

use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;

use super::*;

const NAME: &str = "standby::tests::ordinary::closed_directories_and_what_only_root_may_do";
const NOBODY: u32 = 65534;

#[test]
fn closed_directories_and_what_only_root_may_do() {
    if !rustix::process::geteuid().is_root() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        return runtime.block_on(body());
    }
    // The test's own file may lie where nobody else may look.
    let dir = tempfile::Builder::new().prefix("twinbox-test").tempdir_in("/tmp").unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let (exe, scratch) = (dir.path().join("test"), dir.path().join("scratch"));
    fs::copy(std::env::current_exe().unwrap(), &exe).unwrap();
    fs::set_permissions(&exe, fs::Permissions::from_mode(0o755)).unwrap();
    fs::create_dir(&scratch).unwrap();
    chown(&scratch, Some(NOBODY), Some(NOBODY)).unwrap();
    let mut command = std::process::Command::new(&exe);
    command.args(["--exact", NAME, "--nocapture"]).env("TMPDIR", &scratch).current_dir(dir.path()).uid(NOBODY).gid(NOBODY);
    let out = command.output().unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success() && text.contains("1 passed"), "{text}");
}

async fn body() {
    let closed = |mode: u32, secs| Entry { mode, ..dir(secs) };
    let mut rig = Rig::new().await;
    let big = noise(4, 9000);
    let lsn = rig
        .send(vec![
            Op::Make { path: p("d"), entry: closed(0o500, 1) },
            Op::Make { path: p("d/e"), entry: closed(0o400, 2) },
            put("d/e/f", b"inside", 3),
            put("d/g", &big, 3),
            Op::SetMeta { path: p("d/g"), attrs: Attrs { mode: 0, ..Attrs::of(&file(b"", 4)) } },
        ])
        .await;
    rig.applied(lsn).await;
    modes(&rig);
    let patch = rig.model.patch("d/g", &[(0, b"patched")], 9000, 5);
    rig.model.perform(&patch).unwrap();
    let lsn = rig.send_raw(vec![patch], 0).await;
    rig.applied(lsn).await;
    let more = vec![rename("d/e/f", "d/h"), link("d/h", "d/e/i"), put("d/e/f", b"again", 7), remove("d/g")];
    let lsn = rig.send(more).await;
    rig.applied(lsn).await;
    modes(&rig);
    // A crash in the middle, recovered from by the same user.
    rig.hold();
    let lsn = rig.send(vec![put("d/e/z", &big, 8), rename("d/h", "d/e/h"), remove("d/e/i")]).await;
    rig.durable(lsn).await;
    rig.crash();
    rig.start().unwrap();
    modes(&rig);
    rig.begin().await.unwrap();
    // What only root may do is counted, and is no reason to stop.
    let device = entry(Kind::Device { block: false, major: 1, minor: 3 }, 0o666, 9);
    let mut foreign = file(b"x", 9);
    (foreign.uid, foreign.gid) = (0, 0);
    foreign.xattrs = vec![(ByteBuf::from("trusted.t"), ByteBuf::from("1"))];
    let lsn = rig
        .send(vec![
            Op::Make { path: p("null"), entry: device },
            rename("null", "nil"),
            link("nil", "nil2"),
            remove("nil"),
            Op::Put { path: p("foreign"), entry: foreign, content: Content::Inline(ByteBuf::from("x")) },
        ])
        .await;
    rig.applied(lsn).await;
    let status = rig.handle().status();
    assert_eq!(status.last_error.map(|(_, e)| e), None);
    for kind in ["devices", "ownership", "xattrs"] {
        assert!(status.lost_metadata.contains_key(kind), "{kind}: {:?}", status.lost_metadata);
    }
    // The directories can be removed by the test's end again.
    fs::set_permissions(rig.root().join("d"), fs::Permissions::from_mode(0o700)).unwrap();
    fs::set_permissions(rig.root().join("d/e"), fs::Permissions::from_mode(0o700)).unwrap();
}

/// The model's modes and times are on disk, from the top down (what is closed is opened behind us).
fn modes(rig: &Rig) {
    let root = rig.root();
    let mut opened = vec![];
    for (path, row) in &rig.model.rows {
        let on_disk = root.join(std::str::from_utf8(path.as_bytes()).unwrap());
        let meta = fs::symlink_metadata(&on_disk).unwrap_or_else(|e| panic!("{path}: {e}; {:?}", rig.handle().status()));
        assert_eq!(meta.mode() & 0o7777, row.entry.mode, "{path}");
        assert_eq!(meta.mtime(), row.entry.mtime.secs, "{path}");
        if row.entry.is_dir() {
            fs::set_permissions(&on_disk, fs::Permissions::from_mode(0o700)).unwrap();
            opened.push((on_disk, row.entry.mode));
        } else {
            assert_eq!(
                ContentHash::of(&fs::read(&on_disk).unwrap_or_else(|_| rig.model.bytes[&row.entry.hash().unwrap()].clone())),
                row.entry.hash().unwrap()
            );
        }
    }
    for (path, mode) in opened.into_iter().rev() {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }
}
