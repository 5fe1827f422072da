//! A site of two nodes with Dovecot through everything that can be asked of it: the link is cut, the primary's machine dies with a tail, the other is promoted and takes mail, the old one comes back, is
//! resynced, and takes over again. Every message that either server ever accepted must be readable on both nodes, once.

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::dovecot::{self, Dovecot, Dump};
use crate::gate::{nap_until, wait_until};
use crate::imap::{Answer, Imap, id_of, quoted};
use crate::lmtp::Lmtp;
use crate::mailload;
use crate::netns::Cable;
use crate::node::{Node, Pair};
use crate::rng::{Rng, Seed};
use crate::scratch::Scratch;
use crate::tree::{Layout, Rules, wait_identical};

/// Longest wait for anything.
const LIMIT: Duration = Duration::from_secs(90);
/// Users.
const USERS: usize = 4;
/// Folders each has, which are moved in the tail.
const FOLDERS: usize = 5;

/// What happens in the tail: messages, flag changes, deletions, moved folders.
pub const TAIL: [u64; 4] = [50, 20, 10, 5];

/// The site.
#[derive(Debug)]
pub struct Site {
    layout: Layout,
    trees: [PathBuf; 2],
    pair: Pair,
    cable: Cable,
    scratch: Scratch,
    users: Vec<String>,
    /// Every message a server has accepted: its number ▶ its text.
    accepted: BTreeMap<usize, Vec<u8>>,
    rng: Rng,
    /// Also what a resync could get wrong.
    awkward: bool,
    /// Message-ID of what one node has moved and the other one deleted.
    deleted: Option<String>,
}

/// A keyword that is an option to a command that does not look.
const KEYWORD: &str = "-uuser00";

impl Site {
    /// `alpha` is primary; its users have folders and mail.
    #[must_use]
    pub fn new(layout: Layout) -> Self {
        let scratch = Scratch::new(&format!("failback-{}", layout.name()));
        let trees = [dovecot::store(&scratch, "alpha-store"), scratch.dir("beta-store")];
        let (pair, cable) = Pair::over_cable(scratch.path(), &trees[0], &trees[1], layout);
        // As shipped, with the doveadm of whichever Dovecot is running.
        let program = scratch.join("merge");
        let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/hooks/merge-dovecot");
        let text =
            format!("#!/bin/sh\nDOVEADM=\"doveadm -c $(cat {})\" exec {}\n", scratch.join("dovecot-config").display(), shipped.display());
        fs::write(&program, text).expect("a file of the test");
        fs::set_permissions(&program, Permissions::from_mode(0o755)).expect("a file of the test");
        pair.wait_drained(LIMIT);
        for node in [&pair.primary, &pair.standby] {
            let mut config = fs::read_to_string(&node.config).expect("a configuration");
            config += &format!("\n[hooks]\nmerge = \"{}\"\n", program.display());
            fs::write(&node.config, config).expect("a file of the test");
            node.command(&["reload"]).ok("reload");
        }
        let rng = Rng::part(Seed::from_env().0, 811);
        let users = dovecot::users(USERS);
        Site { layout, trees, pair, cable, scratch, users, accepted: BTreeMap::new(), rng, awkward: false, deleted: None }
    }

    /// The tail has more in it than [`TAIL`]: messages read and moved, into a folder that is new, from where the other node deletes them; folders and flags with names that mean something to others.
    #[must_use]
    pub fn awkward(layout: Layout) -> Self {
        Site { awkward: true, ..Self::new(layout) }
    }

    /// As they are in the inbox of the last user: one each.
    fn one(&self, server: &Dovecot, n: usize) -> io::Result<(Imap, u64)> {
        let mut imap = Imap::login(server.imap(), &self.users[USERS - 1])?;
        imap.select("INBOX")?;
        let uid = imap.uids()?[n];
        Ok((imap, uid))
    }

    fn awkward_folders(&self, server: &Dovecot) -> io::Result<()> {
        for folder in ["50% off", "all"] {
            let (mut imap, uid) = self.one(server, 0)?;
            must(&mut imap, &format!("CREATE {}", quoted(folder)))?;
            must(&mut imap, &format!("UID MOVE {uid} {}", quoted(folder)))?;
            imap.logout();
        }
        Ok(())
    }

    fn awkward_tail(&self, server: &Dovecot) -> io::Result<()> {
        let (mut imap, uid) = self.one(server, 4)?;
        let new = format!("New{}Sub", imap.separator()?);
        must(&mut imap, &format!("CREATE {}", quoted(&new)))?;
        imap.select("INBOX")?;
        must(&mut imap, &format!("UID STORE {uid} +FLAGS (\\Seen)"))?;
        must(&mut imap, &format!("UID MOVE {uid} {}", quoted(&new)))?;
        let uid = imap.uids()?[4];
        must(&mut imap, &format!("UID MOVE {uid} {}", quoted("Folder 1")))?;
        if self.layout != Layout::Mbox {
            // As clients do that keep a year's mail.
            must(&mut imap, &format!("RENAME {} {}", quoted("Folder 2"), quoted("Kept 2")))?;
            must(&mut imap, &format!("CREATE {}", quoted("Folder 2")))?;
        }
        for folder in ["50% off", "all"] {
            imap.select(folder)?;
            must(&mut imap, &format!("UID STORE 1:* +FLAGS (\\Flagged {KEYWORD})"))?;
        }
        imap.logout();
        Ok(())
    }

    /// What gave way is kept.
    fn is_kept(&self, id: &str) -> bool {
        let mut stack = vec![self.node(0).state.join("mirrors/mail/rescue")];
        while let Some(path) = stack.pop() {
            if path.is_dir() {
                stack.extend(fs::read_dir(path).expect("rescue").flatten().map(|item| item.path()));
            } else if fs::read(path).is_ok_and(|bytes| bytes.windows(id.len()).any(|part| part == id.as_bytes())) {
                return true;
            }
        }
        false
    }

    /// The other node deletes what the first one has moved.
    fn awkward_after(&mut self, server: &Dovecot) -> io::Result<()> {
        let (mut imap, uid) = self.one(server, 5)?;
        let gone = imap.messages()?.into_iter().find(|message| message.uid == uid).expect("it is there").id;
        // In mbox nothing says that it is the message that was moved: it comes back.
        if self.layout != Layout::Mbox {
            self.accepted.retain(|_, text| id_of(text) != gone);
            self.deleted = Some(gone);
        }
        must(&mut imap, &format!("UID STORE {uid} +FLAGS (\\Deleted)"))?;
        must(&mut imap, "EXPUNGE")?;
        imap.logout();
        Ok(())
    }

    fn awkward_end(&self, dump: &Dump) {
        for (user, account) in dump {
            for (name, mailbox) in &account.mailboxes {
                let theirs = *user == self.users[USERS - 1];
                let marked = mailbox.messages.iter().filter(|message| message.flags.iter().any(|flag| flag == KEYWORD)).count();
                assert!(marked == 0 || (theirs && (name.contains("off") || name == "all")), "{user}/{name} has a flag of another's");
                if name.contains("New") && name.ends_with("Sub") {
                    let read = mailbox.messages.iter().filter(|message| message.flags.iter().any(|flag| flag == "\\Seen")).count();
                    assert_eq!((mailbox.messages.len(), read), (1, 1), "the message that was read and moved into a new folder");
                }
            }
        }
    }

    fn serve(&self, node: usize) -> Dovecot {
        let server = Dovecot::start(&self.trees[node], self.layout);
        fs::write(self.scratch.join("dovecot-config"), server.config().display().to_string()).expect("a file of the test");
        server
    }

    fn deliver(&mut self, server: &Dovecot, count: usize) -> io::Result<()> {
        let mut lmtp = Lmtp::connect(server.lmtp())?;
        for _ in 0..count {
            let n = self.accepted.keys().last().map_or(0, |last| last + 1);
            let message = mailload::message(&mut self.rng, n);
            let user = n % self.users.len(); // In turn: each has as many as the tail wants to take away.
            lmtp.deliver(&self.users[user..=user], &message)?;
            self.accepted.insert(n, message);
        }
        Ok(())
    }

    /// Folders with a few messages each; an inbox of which some are read.
    fn furnish(&mut self, server: &Dovecot) -> io::Result<()> {
        self.deliver(server, 80)?;
        for user in &self.users {
            let mut imap = Imap::login(server.imap(), user)?;
            for n in 0..FOLDERS {
                must(&mut imap, &format!("CREATE {}", quoted(&format!("Folder {n}"))))?;
                imap.select("INBOX")?;
                if let Some(uid) = imap.uids()?.first() {
                    must(&mut imap, &format!("UID MOVE {uid} {}", quoted(&format!("Folder {n}"))))?;
                }
            }
            imap.logout();
        }
        if self.awkward { self.awkward_folders(server) } else { Ok(()) }
    }

    /// What nobody else will have: [`TAIL`].
    fn make_tail(&mut self, server: &Dovecot) -> io::Result<()> {
        let user = self.users[0].clone();
        let mut imap = Imap::login(server.imap(), &user)?;
        imap.select("INBOX")?;
        let before = imap.uids()?;
        let wanted = TAIL[2] as usize;
        let mut gone = 0;
        for uid in before.iter().take(wanted) {
            must(&mut imap, &format!("UID STORE {uid} +FLAGS (\\Deleted)"))?;
            gone += 1;
        }
        assert_eq!(gone, wanted, "the inbox of {user} is too small");
        must(&mut imap, "EXPUNGE")?;
        for n in 0..FOLDERS {
            must(&mut imap, &format!("RENAME {} {}", quoted(&format!("Folder {n}")), quoted(&format!("Moved {n}"))))?;
        }
        imap.logout();
        let mut flagged = 0;
        for user in &self.users[1..] {
            let mut imap = Imap::login(server.imap(), user)?;
            imap.select("INBOX")?;
            for uid in imap.uids()? {
                if flagged < TAIL[1] {
                    let flags = ["\\Flagged", "\\Seen", "\\Answered \\Seen", "$Work"][flagged as usize % 4];
                    must(&mut imap, &format!("UID STORE {uid} +FLAGS ({flags})"))?;
                    flagged += 1;
                }
            }
            imap.logout();
        }
        assert_eq!(flagged, TAIL[1], "the inboxes are too small");
        if self.awkward {
            self.awkward_tail(server)?;
        }
        self.deliver(server, TAIL[0] as usize)
    }

    fn said(&self, node: usize) -> Option<(String, String)> {
        let mirror = self.node(node).status()?.said.mirrors.into_iter().next()?;
        Some((mirror.role, mirror.state))
    }

    fn node(&self, node: usize) -> &Node {
        if node == 0 { &self.pair.primary } else { &self.pair.standby }
    }

    fn ok(&self, node: usize, words: &[&str]) -> String {
        self.node(node).command(words).ok(&words.join(" ")).stdout
    }

    fn in_sync(&self) {
        for node in 0..2 {
            self.node(node).wait_state(LIMIT, "protected");
        }
        if let Err(why) = wait_identical(&self.trees[0], &self.trees[1], Rules::of(self.layout), LIMIT) {
            panic!("not identical {why}\n{:#?}\n{:#?}", self.node(0).status(), self.node(1).status());
        }
    }

    /// Runs all of it, with the link away for `outage`; gives what `resync apply --json` said.
    ///
    /// # Errors
    /// A server refused something.
    pub fn run(&mut self, outage: Duration, mut while_applying: impl FnMut(&mut Self)) -> io::Result<Value> {
        self.pair.wait_drained(LIMIT);
        let server = self.serve(0);
        self.furnish(&server)?;
        self.pair.wait_drained(LIMIT);

        // The link is away for a while, and mail goes on.
        self.cable.cut();
        let until = Instant::now() + outage;
        self.node(0).wait_state(LIMIT, "unprotected");
        self.deliver(&server, 20)?;
        nap_until(until);
        self.cable.restore();
        self.node(0).wait_state(LIMIT, "protected");
        self.pair.wait_drained(LIMIT);

        // The machine dies, after some things that nobody else has heard of.
        self.cable.cut();
        self.node(0).wait_state(LIMIT, "unprotected");
        self.make_tail(&server)?;
        self.pair.primary.kill9();
        assert_eq!(server.complaints(), Vec::<String>::new());
        server.stop();

        wait_until(LIMIT, "beta to know that it is alone", || {
            self.node(1).status().is_some_and(|s| s.said.mirrors[0].peers.iter().all(|peer| !peer.connected))
        });
        self.ok(1, &["promote"]);
        let server = self.serve(1);
        if self.awkward {
            self.awkward_after(&server)?;
        }
        self.deliver(&server, 30)?;

        self.cable.restore();
        self.pair.primary.start();
        wait_until(LIMIT, "alpha to step down", || self.said(0) == Some(("standby".into(), "diverged".into())));
        let plan: Value = serde_json::from_str(&self.ok(0, &["resync", "plan", "--json"])).map_err(io::Error::other)?;
        while_applying(self);
        let done: Value = serde_json::from_str(&self.ok(0, &["resync", "apply", "--json"])).map_err(io::Error::other)?;
        assert_eq!(count(&plan), count(&done), "what was planned and what was done");
        assert!(self.deleted.as_ref().is_none_or(|id| self.is_kept(id)), "moved on one node, deleted on the other, and nowhere");
        self.deliver(&server, 5)?;
        self.in_sync_while(&server);

        // And back, in order.
        assert_eq!(server.complaints(), Vec::<String>::new(), "beta's Dovecot complains");
        server.stop();
        self.ok(1, &["demote"]);
        self.ok(0, &["promote"]);
        let server = self.serve(0);
        self.deliver(&server, 5)?;
        let alpha = server.dump(&self.users);
        assert_eq!(server.complaints(), Vec::<String>::new(), "alpha's Dovecot complains");
        server.stop();
        self.in_sync();
        let reader = self.serve(1); // It changes what it reads: last.
        let beta = reader.dump(&self.users);
        assert_eq!(reader.complaints(), Vec::<String>::new(), "Dovecot on beta's replica complains");
        reader.stop();
        for (node, dump) in [("alpha", &alpha), ("beta", &beta)] {
            self.all_there(node, dump);
            self.awkward_end(dump);
        }
        assert_eq!(dovecot::differences(&alpha, &beta), Vec::<String>::new());
        Ok(done)
    }

    /// The server runs, and makes lists of its own when it is looked at: identical in the end all the same.
    fn in_sync_while(&self, server: &Dovecot) {
        let _ = server.dump(&self.users);
        self.in_sync();
    }

    /// Every message once; deletions of the tail are not repeated, so what was deleted is back.
    fn all_there(&self, node: &str, dump: &Dump) {
        let mut seen: BTreeMap<String, usize> = BTreeMap::new();
        for mailbox in dump.values().flat_map(|account| account.mailboxes.values()) {
            for message in &mailbox.messages {
                *seen.entry(message.id.clone()).or_default() += 1;
            }
        }
        for (n, text) in &self.accepted {
            let id = id_of(text);
            let times = seen.get(&id).copied().unwrap_or(0);
            assert_eq!(times, 1, "{node}: message {n} ({id}) is there {times} times");
        }
        assert_eq!(seen.len(), self.accepted.len(), "{node}: other messages than were accepted");
    }

    /// Where it all is, for whoever looks into it.
    #[must_use]
    pub fn scratch(&self) -> &Scratch {
        &self.scratch
    }
}

/// Items by kind.
#[must_use]
pub fn count(shown: &Value) -> BTreeMap<String, u64> {
    let mut all = BTreeMap::new();
    for item in shown["items"].as_array().into_iter().flatten() {
        *all.entry(item["what"].as_str().unwrap_or_default().to_owned()).or_default() += 1;
    }
    all
}

fn must(imap: &mut Imap, command: &str) -> io::Result<()> {
    match imap.run(command)? {
        Answer::Ok => Ok(()),
        Answer::No => Err(io::Error::other(format!("refused: {command}"))),
    }
}
