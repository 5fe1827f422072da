//! Dirty sets, move by move.

use super::*;

fn p(text: &str) -> RelPath {
    RelPath::new(text.as_bytes()).unwrap()
}

fn renamed(sets: &mut DirtySets, from: (&[u8], &RelPath), to: (&[u8], &RelPath), is_dir: bool, now: Instant) {
    sets.renamed(from, to, is_dir, now, |path| path.as_bytes().split(|b| *b == b'/').next().unwrap().to_vec());
}

#[test]
fn an_event_voids_the_observation_and_spoils_the_round() {
    let (mut sets, now) = (DirtySets::default(), Instant::now());
    sets.captured(b"g", p("g/x"), Seen::Absent);
    sets.mark(b"g", &p("g/x"), true, false, true, now);
    assert!(!sets.group(b"g").spoiled, "a directory's own times do not");
    sets.mark(b"g", &p("g/x"), true, false, false, now);
    assert!(sets.group(b"g").spoiled && sets.group(b"g").captured.is_empty());
    assert_eq!(sets.dirty_count(), 1);
}

#[test]
fn a_moved_directory_takes_marks_observations_and_origins_along() {
    let (mut sets, now) = (DirtySets::default(), Instant::now());
    sets.mark(b"a", &p("a/d/x"), true, false, false, now);
    sets.captured(b"a", p("a/d/y"), Seen::Absent);
    renamed(&mut sets, (b"a", &p("a/m")), (b"a", &p("a/d/m")), false, now);
    renamed(&mut sets, (b"a", &p("a/d")), (b"b", &p("b/d")), true, now);
    let b: Vec<_> = sets.group(b"b").dirty.iter().map(|(path, m)| (path.to_string(), m.content)).collect();
    assert_eq!(b, [("b/d".into(), false), ("b/d/m".into(), false), ("b/d/x".into(), true), ("b/d/y".into(), true)]);
    assert_eq!(sets.origin(&p("b/d/m")), p("a/m"));
    assert_eq!(sets.origin(&p("b/d/x")), p("a/d/x"));
    assert_eq!(sets.origin(&p("b/e")), p("b/e"));
    assert_eq!(sets.closure(b"a"), [b"a".to_vec(), b"b".to_vec()].into());
    assert!(sets.closure(b"c").len() == 1);
}

#[test]
fn a_rename_seen_after_the_boundary_keeps_its_groups_joined_past_the_commit() {
    let (mut sets, now) = (DirtySets::default(), Instant::now());
    sets.mark(b"a", &p("a/other"), true, false, false, now);
    sets.start_round();
    sets.freeze(b"a");
    sets.take(b"a", &p("a/other"));
    sets.captured(b"a", p("a/other"), Seen::Absent);
    renamed(&mut sets, (b"a", &p("a/x")), (b"b", &p("b/y")), false, now);
    let unit = sets.closure(b"a");
    assert!(unit.iter().all(|name| sets.is_round_whole(name)));
    let (seen, hints, _) = sets.commit(&unit);
    assert!(seen.len() == 1 && hints.is_empty());
    assert_eq!(sets.closure(b"a").len(), 2, "else the removal of a/x is committed without b/y: the message is nowhere");
}

#[test]
fn an_event_that_voids_an_observation_of_content_asks_for_the_content_again() {
    let (mut sets, now) = (DirtySets::default(), Instant::now());
    let file = |path: &str| {
        let kind = twinbox_protocol::entry::Kind::File { size: 1, hash: twinbox_protocol::ids::ContentHash::of(b"x") };
        let entry = twinbox_protocol::entry::Entry { kind, ..twinbox_resync::manifest::plain_dir() };
        let local = twinbox_resync::rows::Local { ino: 1, ctime: twinbox_protocol::entry::Time::default() };
        let body = twinbox_resync::plan::Body::Bytes(b"x".to_vec());
        (p(path), Seen::Present(Box::new(twinbox_resync::plan::Found { entry, local, nlink: 1, body })))
    };
    let (x, seen) = file("g/x");
    sets.captured(b"g", x.clone(), seen);
    sets.mark(b"g", &x, false, false, false, now);
    assert!(sets.group(b"g").dirty[&x].content, "a write, then utimes: the second event does not take back the first");
    let (y, seen) = file("g/y");
    sets.captured(b"g", y.clone(), seen);
    renamed(&mut sets, (b"g", &y), (b"g", &p("g/z")), false, now);
    assert!(sets.group(b"g").dirty[&p("g/z")].content, "a write, then a rename");
    sets.group(b"g").staging.insert(p("g/s"), 1);
    renamed(&mut sets, (b"g", &p("g/s")), (b"g", &p("g/t")), false, now);
    assert!(sets.group(b"g").dirty[&p("g/t")].content, "read ahead, then a rename");
    sets.mark(b"g", &p("g/u"), false, true, false, now);
    renamed(&mut sets, (b"g", &p("g/u")), (b"g", &p("g/v")), false, now);
    assert!(sets.group(b"g").dirty[&p("g/v")].scan, "found by a comparison, then a rename");
}

#[test]
fn committed_renames_are_no_origins_any_more_and_those_left_start_from_the_new_rows() {
    let (mut sets, now) = (DirtySets::default(), Instant::now());
    renamed(&mut sets, (b"a", &p("a/d")), (b"a", &p("a/e")), true, now);
    sets.freeze(b"a");
    renamed(&mut sets, (b"a", &p("a/e")), (b"a", &p("a/f")), true, now);
    renamed(&mut sets, (b"b", &p("b/x")), (b"b", &p("b/y")), false, now);
    assert_eq!(sets.origin(&p("a/f/m")), p("a/d/m"));
    sets.commit(&[b"a".to_vec()].into());
    assert_eq!(sets.origin(&p("a/f/m")), p("a/e/m"), "the first rename is in the rows now");
    assert_eq!(sets.origin(&p("b/y")), p("b/x"));
    sets.freeze(b"a");
    sets.commit(&[b"a".to_vec()].into());
    assert_eq!(sets.origin(&p("a/f/m")), p("a/f/m"), "though another group still has renames");
}

#[test]
fn a_thing_that_wanders_is_one_rename() {
    let (mut sets, now) = (DirtySets::default(), Instant::now());
    let step = |sets: &mut DirtySets, from: &str, to: &str| {
        renamed(sets, (&from.as_bytes()[..1], &p(from)), (&to.as_bytes()[..1], &p(to)), false, now);
    };
    for _ in 0..1000 {
        step(&mut sets, "a/x", "b/x");
        step(&mut sets, "b/x", "a/y");
        step(&mut sets, "a/y", "a/x");
    }
    assert_eq!(sets.hint_count(), 0);
    step(&mut sets, "a/x", "b/x");
    sets.freeze(b"b");
    step(&mut sets, "b/x", "b/y");
    assert_eq!(sets.hint_count(), 2, "the first belongs to the cut under way");
    assert_eq!(sets.origin(&p("b/y")), p("a/x"));
    let unit = sets.closure(b"b");
    let (_, hints, _) = sets.commit(&unit);
    assert_eq!(hints, [Hint { from: p("a/x"), to: p("b/x") }]);
    assert_eq!(sets.hint_count(), 1);
    step(&mut sets, "a/m", "a/n");
    step(&mut sets, "b/y", "b/z");
    assert_eq!(sets.hint_count(), 3, "something else came between");
}

#[test]
fn a_thing_that_wanders_on_after_the_boundary_keeps_its_first_group_joined_to_its_last() {
    let (mut sets, now) = (DirtySets::default(), Instant::now());
    sets.mark(b"a", &p("a/other"), true, false, false, now);
    sets.start_round();
    sets.freeze(b"a");
    sets.take(b"a", &p("a/other"));
    sets.captured(b"a", p("a/other"), Seen::Absent);
    renamed(&mut sets, (b"a", &p("a/x")), (b"b", &p("b/x")), false, now);
    renamed(&mut sets, (b"b", &p("b/x")), (b"c", &p("c/x")), false, now);
    let unit = sets.closure(b"a");
    assert_eq!(unit.len(), 3);
    sets.commit(&unit);
    assert!(sets.closure(b"a").contains(&b"c"[..]), "else the removal of a/x is committed without c/x");
}

#[test]
fn what_was_not_captured_in_a_round_is_not_the_next_ones_because_it_was_renamed() {
    for dir in [false, true] {
        let (mut sets, now) = (DirtySets::default(), Instant::now());
        sets.mark(b"u", &p("u/d/log"), true, false, false, now);
        let asked = sets.round();
        sets.start_round();
        sets.freeze(b"u");
        let mark = sets.take(b"u", &p("u/d/log")).unwrap();
        sets.put_back(b"u", p("u/d/log"), mark); // A writer has it open.
        if dir {
            renamed(&mut sets, (b"u", &p("u/d")), (b"v", &p("v/d")), true, now);
            assert!(!sets.has_cut(&p("v"), asked), "it came there from before");
            assert!(!sets.is_round_whole(b"v"));
        } else {
            renamed(&mut sets, (b"u", &p("u/d/log")), (b"u", &p("u/d/log.2")), false, now);
            assert!(!sets.is_round_whole(b"u"), "it was dirty at the boundary and has not been read");
        }
    }
}

#[test]
fn a_group_the_round_did_not_begin_with_is_not_cut_in_it() {
    let (mut sets, now) = (DirtySets::default(), Instant::now());
    renamed(&mut sets, (b"g", &p("g/d")), (b"g", &p("g/e")), true, now);
    sets.start_round();
    sets.freeze(b"g");
    for path in ["g/d", "g/e"] {
        sets.take(b"g", &p(path));
        sets.captured(b"g", p(path), Seen::Absent);
    }
    sets.thaw(b"g"); // It waited for a bulk object, which is here now.
    sets.mark(b"h", &p("h/1"), true, false, false, now);
    sets.start_round();
    sets.freeze(b"h"); // The round had no room for g.
    sets.take(b"h", &p("h/1"));
    sets.captured(b"h", p("h/1"), Seen::Absent);
    renamed(&mut sets, (b"g", &p("g/m")), (b"h", &p("h/m")), false, now);
    let unit = sets.closure(b"h");
    assert!(!unit.iter().all(|name| sets.is_round_whole(name)) && sets.has_renames(&unit), "its rename would be left behind");
}

#[test]
fn a_group_that_is_dirty_anew_has_cut_what_was_there_before() {
    let (mut sets, now) = (DirtySets::default(), Instant::now());
    sets.mark(b"a", &p("a/1"), true, false, false, now);
    let asked = sets.round();
    sets.start_round();
    sets.freeze(b"a");
    sets.take(b"a", &p("a/1"));
    sets.captured(b"a", p("a/1"), Seen::Absent);
    let unit = sets.closure(b"a");
    sets.commit(&unit);
    sets.note_cut(&unit);
    sets.mark(b"a", &p("a/2"), true, false, false, now);
    assert!(sets.has_cut_all(asked), "else a fence over everything waits for a moment at which nobody gets mail");
}

#[test]
fn renames_across_groups_are_committed_in_the_order_they_were_seen() {
    let (mut sets, now) = (DirtySets::default(), Instant::now());
    renamed(&mut sets, (b"a", &p("a/d")), (b"b", &p("b/t")), true, now);
    renamed(&mut sets, (b"b", &p("b/d")), (b"a", &p("a/d")), true, now);
    renamed(&mut sets, (b"b", &p("b/t")), (b"b", &p("b/d")), true, now);
    let unit = sets.closure(b"a");
    unit.iter().for_each(|name| sets.freeze(name));
    let to: Vec<String> = sets.commit(&unit).1.iter().map(|h| h.to.to_string()).collect();
    assert_eq!(to, ["b/t", "a/d", "b/d"]);
}

#[test]
fn a_group_that_is_cut_after_another_is_tried_again_in_a_moment_and_two_that_wait_for_each_other_are_cut_together() {
    let (mut sets, now) = (DirtySets::default(), Instant::now());
    let group = |name: &[u8]| BTreeSet::from([name.to_vec()]);
    for name in [b"a", b"b", b"c"] {
        sets.captured(name, p("x"), Seen::Absent);
    }
    assert!(sets.has_work(now));
    sets.wait_for(&group(b"a"), &group(b"b"), now);
    sets.wait_for(&group(b"b"), &group(b"c"), now);
    assert_eq!(sets.closure(b"a").len(), 1, "one after the other");
    sets.commit(&group(b"c"));
    sets.commit(&group(b"b"));
    assert!(sets.has_work(now), "b is there: a need not wait");
    sets.wait_for(&group(b"a"), &group(b"b"), now);
    assert!(!sets.has_work(now) && sets.next_look(now) == Some(now + OTHERS_WAIT), "else the thread would spin");
    assert!(sets.has_work(now + OTHERS_WAIT));
    sets.group(b"a").staging.insert(p("big"), 1);
    assert!(!sets.has_work(now + OTHERS_WAIT) && sets.next_look(now).is_none(), "nor while something is sent ahead");
    sets.group(b"a").staging.clear();
    sets.wait_for(&group(b"a"), &BTreeSet::new(), now);
    assert!(sets.has_work(now));
    sets.wait_for(&group(b"a"), &group(b"b"), now);
    sets.wait_for(&group(b"b"), &group(b"c"), now);
    sets.wait_for(&group(b"c"), &group(b"a"), now);
    assert_eq!(sets.closure(b"c").len(), 2, "c is cut with a,");
    assert!(sets.closure(b"c").contains(&b"a"[..]));
}

#[test]
fn a_group_joined_to_one_that_waits_for_its_bulk_object_is_no_work() {
    let (mut sets, now) = (DirtySets::default(), Instant::now());
    sets.captured(b"a", p("a/x"), Seen::Absent);
    sets.group(b"b").staging.insert(p("b/big"), 1);
    sets.join(b"a", b"b");
    assert!(!sets.has_work(now), "a round could commit nothing: the thread would spin until the object is staged");
}

#[test]
fn what_is_kept_counts_only_while_the_path_is_dirty() {
    let (mut sets, now) = (DirtySets::default(), Instant::now());
    let entry = twinbox_protocol::entry::Entry { ..twinbox_resync::manifest::plain_dir() };
    let local = Local { ino: 1, ctime: Time::default() };
    let found = || Box::new(Found { entry: entry.clone(), local, nlink: 2, body: twinbox_resync::plan::Body::Unread });
    sets.keep(b"g", p("g/d"), found());
    assert!(!sets.keeps(b"g", &p("g/d"), local), "else no comparison would ever find it different");
    sets.mark(b"g", &p("g/d"), true, true, false, now);
    sets.keep(b"g", p("g/d"), found());
    assert!(sets.keeps(b"g", &p("g/d"), local));
    sets.mark(b"g", &p("g/d"), true, true, false, now);
    assert!(!sets.keeps(b"g", &p("g/d"), local), "an event named it");
}
