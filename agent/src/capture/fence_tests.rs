//! Fences and holds, one turn of the engine at a time.

use std::fs;
use std::io::Write;

use super::super::fence::{FenceRequest, NoTxn, NotFenced, Until};
use super::turns::{Rig, big, p, started};
use super::*;

type Answer = oneshot::Receiver<Result<Lsn, NotFenced>>;

fn fence(rig: &mut Rig, path: &str, wait: bool) -> Answer {
    let (reply, answer) = oneshot::channel();
    let paths = if path.is_empty() { vec![] } else { vec![p(path)] };
    rig.engine.command(Command::Fence(FenceRequest { paths, until: Until::Durable, wait, reply })).unwrap();
    answer
}

fn begin(rig: &mut Rig, path: &str, time: Duration) -> oneshot::Receiver<u64> {
    let (reply, answer) = oneshot::channel();
    rig.engine.command(Command::TxnBegin { path: p(path), time, reply }).unwrap();
    answer
}

fn end(rig: &mut Rig, id: Option<u64>, path: Option<&str>) -> Result<RelPath, NoTxn> {
    let (reply, mut answer) = oneshot::channel();
    rig.engine.command(Command::TxnEnd { id, path: path.map(p), reply }).unwrap();
    answer.try_recv().unwrap()
}

fn answered(rig: &mut Rig, mut answer: Answer) -> Result<Lsn, NotFenced> {
    let end = Instant::now() + Duration::from_secs(5);
    loop {
        match answer.try_recv() {
            Ok(answer) => return answer,
            Err(error) => assert!(Instant::now() < end && error == oneshot::error::TryRecvError::Empty, "never answered"),
        }
        rig.turn();
    }
}

#[test]
fn a_fence_is_answered_when_what_was_there_is_durable_and_not_before() {
    let mut rig = started(&["u", "v"]);
    assert!(fence_now(&mut rig, "").is_ok(), "nothing is dirty");
    fs::write(rig.root.join("u/a"), b"mail").unwrap();
    rig.unacked = 1;
    let mut answer = fence(&mut rig, "u/a", false);
    rig.until("shipped", |r| r.has("u/a"));
    for _ in 0..3 {
        rig.turn();
        assert!(answer.try_recv().is_err(), "shipped is not durable");
    }
    rig.unacked = 0;
    answered(&mut rig, answer).unwrap();
    rig.settle();
    rig.check();
}

fn fence_now(rig: &mut Rig, path: &str) -> Result<Lsn, NotFenced> {
    let answer = fence(rig, path, false);
    answered(rig, answer)
}

#[test]
fn a_fence_covers_a_directory_that_has_just_been_made_with_all_below_it() {
    let mut rig = started(&["u"]);
    for n in 0..30 {
        let dir = rig.root.join(format!("u/{n}/b/c"));
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("x"), b"mail").unwrap();
        let path = format!("u/{n}");
        let answer = fence(&mut rig, if n % 2 == 0 { "" } else { &path }, false);
        answered(&mut rig, answer).unwrap();
        assert!(rig.has(&format!("u/{n}/b/c/x")), "round {n}");
    }
}

#[test]
fn a_fence_waits_for_its_own_groups_only() {
    let mut rig = started(&["u", "v"]);
    rig.stage = false;
    fs::write(rig.root.join("u/big"), big()).unwrap();
    fs::write(rig.root.join("v/a"), b"mail").unwrap();
    fence_now(&mut rig, "v").unwrap();
    assert!(rig.has("v/a"));
    let mut whole = fence(&mut rig, "", false);
    let mut other = fence(&mut rig, "u/small", false);
    for _ in 0..20 {
        rig.turn();
    }
    assert!(whole.try_recv().is_err() && other.try_recv().is_err(), "the large file is not there, and its group is cut as one");
    rig.stage = true;
    answered(&mut rig, whole).unwrap();
    answered(&mut rig, other).unwrap();
    assert!(rig.has("u/big"));
}

#[test]
fn a_fence_does_not_wait_for_what_comes_after_it() {
    let mut rig = started(&["u"]);
    fs::write(rig.root.join("u/0"), b"mail").unwrap();
    let mut answer = fence(&mut rig, "u", false);
    rig.unacked = 1;
    for n in 1..50 {
        fs::write(rig.root.join(format!("u/{n}")), b"mail").unwrap();
        rig.turn();
        if let Ok(answer) = answer.try_recv() {
            answer.unwrap();
            assert!(rig.has("u/0"));
            return;
        }
    }
    panic!("never answered while mail keeps coming");
}

#[test]
fn without_a_standby_a_fence_fails_at_once_or_waits_as_asked() {
    let mut rig = started(&["u"]);
    rig.keep();
    fs::write(rig.root.join("u/a"), b"mail").unwrap();
    rig.unacked = 1;
    let (fail, wait) = (fence(&mut rig, "", false), fence(&mut rig, "", true));
    rig.until("shipped", |r| r.has("u/a"));
    rig.disconnect();
    assert_eq!(answered(&mut rig, fail), Err(NotFenced::Unprotected));
    assert_eq!(fence_now(&mut rig, "u"), Err(NotFenced::Unprotected));
    rig.unacked = 0;
    rig.forget();
    assert!(!rig.has("u/a"));
    rig.connect();
    answered(&mut rig, wait).unwrap();
    assert!(rig.has("u/a"));
}

#[test]
fn a_fence_over_what_cannot_be_read_is_no_success() {
    let mut rig = started(&["u", "v"]);
    let later = Instant::now() + Duration::from_secs(60);
    rig.engine.unreadable.insert(p("u/secret"), ("permission denied".into(), later));
    assert!(matches!(fence_now(&mut rig, ""), Err(NotFenced::Unreadable { .. })));
    assert!(matches!(fence_now(&mut rig, "u"), Err(NotFenced::Unreadable { .. })));
    fence_now(&mut rig, "v").unwrap();
}

#[test]
fn a_fence_sees_a_write_under_a_name_outside_of_the_mirror() {
    let mut rig = started(&["u"]);
    let (inside, outside) = (rig.root.join("u/log"), rig.dir.path().join("other-name"));
    fs::write(&inside, b"one").unwrap();
    fs::hard_link(&inside, &outside).unwrap();
    let mut writer = fs::OpenOptions::new().append(true).open(&outside).unwrap();
    fs::set_permissions(&inside, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    fs::write(&inside, b"two").unwrap();
    rig.settle();
    assert!(rig.engine.writers.contains_key(&p("u/log")));
    for n in 0..5 {
        write!(writer, "{n}").unwrap();
        fence_now(&mut rig, "u").unwrap();
        rig.check();
    }
}

#[test]
fn what_an_application_declares_arrives_as_one_txn() {
    let mut rig = started(&["u", "v"]);
    let id = begin(&mut rig, "u/x", Duration::from_secs(60)).try_recv().unwrap();
    let mut during = fence(&mut rig, "u", false);
    for name in ["u/1", "u/2", "v/1"] {
        fs::write(rig.root.join(name), b"mail").unwrap();
        for _ in 0..10 {
            rig.turn();
        }
    }
    fs::rename(rig.root.join("u/1"), rig.root.join("v/2")).unwrap();
    rig.engine.boundary().unwrap();
    for _ in 0..10 {
        rig.turn();
    }
    assert!(!rig.has("u/1") && !rig.has("u/2"), "held");
    assert!(!rig.has("v/2"), "joined to what is held");
    let _ = during.try_recv(); // Nothing was dirty when it was asked: it may be through.
    let txns = rig.engine.summary.txns;
    assert_eq!(end(&mut rig, Some(id + 1), None), Err(NoTxn::Expired));
    let group = end(&mut rig, None, Some("u")).unwrap();
    fence_now(&mut rig, &group.to_string()).unwrap();
    assert!(rig.has("u/2") && rig.has("v/2"));
    assert_eq!(rig.engine.summary.txns, txns + 1);
    assert_eq!(end(&mut rig, Some(id), None), Err(NoTxn::Expired));
    rig.settle();
    rig.check();
}

#[test]
fn a_txn_of_a_user_that_is_made_in_it_arrives_whole() {
    let mut rig = started(&["v"]);
    let _id = begin(&mut rig, "u", Duration::from_secs(60)).try_recv().unwrap();
    fs::create_dir(rig.root.join("u")).unwrap();
    fs::write(rig.root.join("u/1"), b"mail").unwrap();
    (0..20).for_each(|_| rig.turn());
    assert!(!rig.has("u/1"), "held");
    assert!(end(&mut rig, None, Some("u")).is_ok());
    rig.settle();
    rig.check();
}

#[test]
fn a_fence_covers_a_change_made_under_another_name_of_the_file() {
    let mut rig = started(&["u", "v"]);
    fs::write(rig.root.join("u/m"), b"one").unwrap();
    fs::hard_link(rig.root.join("u/m"), rig.root.join("v/m")).unwrap();
    rig.settle();
    // Written to under v, which is held: that it is u's, too, is not seen by looking at it.
    let _id = begin(&mut rig, "v", Duration::from_secs(60)).try_recv().unwrap();
    fs::OpenOptions::new().append(true).open(rig.root.join("v/m")).unwrap().write_all(b" and two").unwrap();
    let mut answer = fence(&mut rig, "u", false);
    for _ in 0..20 {
        rig.turn();
        assert!(answer.try_recv().is_err(), "the standby has the old bytes under u");
    }
    assert!(end(&mut rig, None, Some("v")).is_ok());
    assert!(answered(&mut rig, answer).is_ok());
    rig.settle();
    rig.check();
}

#[test]
fn an_application_that_died_holds_nothing_for_ever() {
    let mut rig = started(&["u"]);
    let id = begin(&mut rig, "u", Duration::from_millis(60)).try_recv().unwrap();
    fs::write(rig.root.join("u/1"), b"mail").unwrap();
    fence_now(&mut rig, "u").unwrap();
    assert!(rig.has("u/1"));
    assert_eq!(end(&mut rig, Some(id), None), Err(NoTxn::Expired));
    let (a, b) = (begin(&mut rig, "u", HELD), begin(&mut rig, "u", HELD));
    assert_eq!(end(&mut rig, None, Some("u")), Err(NoTxn::Several { open: 2 }));
    drop((a, b));
}

const HELD: Duration = Duration::from_secs(5);

#[test]
fn a_canary_goes_when_nothing_else_does_and_what_does_not_come_back_is_told() {
    let mut rig = started(&["u"]);
    let quiet = |rig: &mut Rig| rig.engine.shipped_at = Instant::now().checked_sub(CANARY_EVERY).unwrap();
    let txns = rig.engine.summary.txns;
    quiet(&mut rig);
    rig.turn();
    rig.turn();
    assert_eq!(rig.engine.summary.txns, txns + 1, "and only one");
    rig.engine.publish(false);
    assert_eq!(rig.engine.handle.stall(), None);
    assert!(rig.engine.summary.bound_ms.unwrap() < 5_000);
    rig.unacked = 1;
    quiet(&mut rig);
    rig.turn();
    quiet(&mut rig);
    rig.turn();
    assert_eq!(rig.engine.summary.txns, txns + 2, "one that is on its way is enough");
    rig.engine.acknowledged_at = Instant::now().checked_sub(Duration::from_secs(9)).unwrap();
    rig.engine.pulse.enter(Stage::Idle);
    rig.engine.publish(false);
    let stall = rig.engine.handle.stall().unwrap();
    assert!(stall.stage == Stage::StandbyLog && stall.lasts >= Duration::from_secs(9));
}
