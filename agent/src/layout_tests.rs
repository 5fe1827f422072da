//! Tables of what is and is not mirrored, and of what falls into which group.

use super::{Grouping, Layout, Selection};
use crate::glob::Glob;

fn globs(texts: &[&str]) -> Vec<Glob> {
    texts.iter().map(|text| text.parse().expect("a valid pattern")).collect()
}

#[test]
fn names() {
    for layout in Layout::ALL {
        assert_eq!(layout.to_string().parse(), Ok(layout));
    }
    let error = "maildri".parse::<Layout>().expect_err("a typo");
    assert_eq!(error.nearest, Some(Layout::Maildir));
    assert_eq!(
        error.to_string(),
        "unknown layout `maildri`; did you mean `maildir`? the layouts are maildir, sdbox, mdbox, mbox and plain"
    );
    assert_eq!("zfs".parse::<Layout>().expect_err("unknown").nearest, None);
}

#[test]
fn scratch_is_not_mirrored() {
    use Layout::{Maildir, Mbox, Mdbox, Plain, Sdbox};
    let mail: &[Layout] = &[Maildir, Sdbox, Mdbox, Mbox];
    let cases: &[(&[Layout], &str)] = &[
        (&[Maildir], "alice/Maildir/tmp/1700000000.M1P2.host"),
        (&[Maildir], "tmp/1700000000.M1P2.host"),
        (&[Maildir], "alice/Maildir/.Work.lock/tmp/1"),
        (&[Maildir], "alice/Maildir/dovecot-uidlist.lock"),
        (&[Maildir], "alice/Maildir/dovecot-uidlist.tmp"),
        (mail, "alice/mail/dovecot.index.log.newlock"),
        (mail, "alice/mail/dovecot.index.tmp"),
        (mail, "alice/mail/dovecot.list.index.tmp"),
        (mail, "alice/mdbox/storage/dovecot.map.index.tmp"),
        (mail, "alice/mail/dovecot.index.cache.tmp"),
        (mail, "alice/mail/.temp.1700000000.P1Q2M3.host"),
        (mail, "alice/mail/subscriptions.lock"),
        (mail, "alice/mail/mailboxes.lock6fcf2e675c908448"),
        (mail, "alice/mail/INBOX.lock"),
        (&Layout::ALL, "alice/fts.sqlite-shm"),
        (&Layout::ALL, ".twinbox-cookie"),
        (&Layout::ALL, "alice/.twinbox-7f/anything/below"),
        (&Layout::ALL, "alice/Maildir/cur/.twinbox-7f"),
    ];
    for (layouts, path) in cases {
        for layout in *layouts {
            assert!(layout.excludes(path.as_bytes(), false), "{layout}: {path}");
        }
    }
    assert!(Plain.excludes(b".twinbox-dir", true));
}

#[test]
fn lookalikes_are_mirrored() {
    use Layout::{Maildir, Mbox, Mdbox, Plain, Sdbox};
    let cases: &[(&[Layout], &str, bool)] = &[
        // Directories are never scratch: folders are called what their users like.
        (&Layout::ALL, "alice/Maildir/tmp", true),
        (&Layout::ALL, "alice/Maildir/.Work.lock", true),
        (&Layout::ALL, "alice/Maildir/.temp.jobs", true),
        (&Layout::ALL, "alice/mailboxes/padlock.lock", true),
        (&Layout::ALL, "backup-shm", true),
        // A user or folder named tmp: only files directly in it can be scratch.
        (&Layout::ALL, "tmp/Maildir", true),
        (&Layout::ALL, "tmp/Maildir/cur/1700000000.M1P2.host:2,S", false),
        (&[Sdbox, Mdbox, Mbox, Plain], "alice/mailboxes/tmp/u.1", false),
        // Messages, whatever the delivering host is called.
        (&[Maildir], "alice/Maildir/cur/1700000000.M1P2.host.lock", false),
        (&[Maildir], "alice/Maildir/new/.temp.1", false),
        (&[Maildir], "alice/Maildir/new/1.db-shm", false),
        // The text somewhere in a name is not the name's ending.
        (&Layout::ALL, "alice/Maildir/maildirsize", false),
        (&Layout::ALL, "alice/x.lock.txt", false),
        (&Layout::ALL, "alice/x.lock6fcf2e675c90844", false),
        (&Layout::ALL, "alice/x.lock6FCF2E675C908448", false),
        (&Layout::ALL, "alice/clock", false),
        (&Layout::ALL, "alice/wiki-shm.html", false),
        (&Layout::ALL, "alice/notes.temp.txt", false),
        (&Layout::ALL, "alice/x.twinbox-y", false),
        (&Layout::ALL, "alice/report.tmp", false),
        (&Layout::ALL, "alice/dovecot.index.log", false),
        (&Layout::ALL, "alice/dovecot-uidlist", false),
        (&Layout::ALL, "alice/dovecot-keywords", false),
        (&Layout::ALL, "tmpfiles/x", false),
        (&[Mbox], "alice/mail/to-shm", false),
        (&[Mbox], "alice/mail/my.newlock", false),
        (&[Plain], "alice/tmp/x", false),
        (&[Plain], "Cargo.lock", false),
        (&[Plain], ".temp.x", false),
    ];
    for (layouts, path, is_dir) in cases {
        for layout in *layouts {
            assert!(!layout.excludes(path.as_bytes(), *is_dir), "{layout}: {path}");
        }
    }
    assert!(!Maildir.excludes(b"u/\xff.lock\xfe", false), "any bytes");
}

#[test]
fn operator_patterns() {
    let selection = Selection::new(Layout::Maildir, globs(&["*.bak", "lost+found/", "*/private"]));
    for (path, is_dir, expected) in [
        ("a/b.bak", false, true),
        ("a.bak/inside/x", false, true),
        ("lost+found", true, true),
        ("lost+found/#12", false, true),
        ("a/lost+found", false, false),
        ("a/private", true, true),
        ("a/private/deep/x", false, true),
        ("a/b/private", true, false),
        ("a/Maildir/cur/1", false, false),
        ("a/Maildir/tmp/1", false, true),
    ] {
        assert_eq!(selection.excludes(path.as_bytes(), is_dir), expected, "{path}");
    }
}

#[test]
fn groups() {
    for (patterns, path, is_dir, expected) in [
        (&[][..], "alice/Maildir/cur/x", false, "alice"),
        (&[], "alice", true, "alice"),
        (&[], "quota.db", false, ""),
        (&[], "", true, ""),
        (&["*/*"], "example.org/alice/Maildir/cur/x", false, "example.org/alice"),
        (&["*/*"], "example.org/alice", true, "example.org/alice"),
        (&["*/*"], "example.org/aliases", false, "example.org/aliases"),
        (&["*/*"], "example.org", true, ""),
        (&["*/*"], "quota.db", false, ""),
        (&["*/*", "shared"], "shared/a/b", false, "shared"),
        (&["*"], "alice", false, "alice"),
        (&["[a-z]/*"], "a/alice/x", false, "a/alice"),
        (&["nothing"], "a/b", false, ""),
    ] {
        let grouping = Grouping::new(globs(patterns));
        assert_eq!(grouping.group_of(path.as_bytes(), is_dir), expected.as_bytes(), "{path} by {patterns:?}");
    }
}
