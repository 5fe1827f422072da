//! A day at a mail server in seconds: deliveries while users file, flag, move and delete.
//!
//! What is delivered, and what each session does, follow from the seed; how the threads interleave does not. One IMAP thread serves
//! a fixed set of users, one user at a time, so a user's own operations are ordered; deliveries are not ordered against them.

use std::io;
use std::ops::AddAssign;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::dovecot::Dovecot;
use crate::imap::{Answer, Imap, quoted};
use crate::lmtp::Lmtp;
use crate::rng::Rng;

/// Folder names: plain, with a space, and non-ASCII in modified UTF-7.
const FOLDERS: [&str; 6] = ["Archive", "Lists", "To do", "Entw&APw-rfe", "2024", "Work"];

/// Keywords set and cleared.
const FLAGS: [&str; 6] = ["\\Seen", "\\Flagged", "\\Answered", "\\Deleted", "$Label1", "urgent"];

/// How much is done.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    /// Messages delivered, each counted once a recipient.
    pub messages: usize,
    /// Users, named by [`users`](crate::dovecot::users).
    pub users: usize,
    /// IMAP operations at least, over all users; sessions go on while mail comes in.
    pub operations: usize,
    /// Where every choice comes from.
    pub seed: u64,
}

impl Load {
    /// `messages` to `users` with twice as many operations by IMAP.
    #[must_use]
    pub fn new(messages: usize, users: usize, seed: u64) -> Self {
        Self { messages, users, operations: messages * 2, seed }
    }
}

/// What was done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Done {
    pub delivered: usize,
    pub flagged: usize,
    pub copied: usize,
    pub moved: usize,
    pub expunged: usize,
    pub created: usize,
    pub renamed: usize,
    pub deleted: usize,
    pub subscribed: usize,
    /// Answered `NO`.
    pub refused: usize,
}

impl AddAssign for Done {
    fn add_assign(&mut self, other: Self) {
        self.delivered += other.delivered;
        self.flagged += other.flagged;
        self.copied += other.copied;
        self.moved += other.moved;
        self.expunged += other.expunged;
        self.created += other.created;
        self.renamed += other.renamed;
        self.deleted += other.deleted;
        self.subscribed += other.subscribed;
        self.refused += other.refused;
    }
}

impl Done {
    /// Panics unless every kind of operation happened: a workload that does nothing proves nothing.
    pub fn assert_varied(&self) {
        let each = [
            self.delivered,
            self.flagged,
            self.copied,
            self.moved,
            self.expunged,
            self.created,
            self.renamed,
            self.deleted,
            self.subscribed,
        ];
        assert!(each.iter().all(|n| *n > 0), "a kind of operation is missing: {self:?}");
    }
}

/// Runs the load to its end.
pub fn run(server: &Dovecot, load: Load) -> io::Result<Done> {
    let users = crate::dovecot::users(load.users);
    let coming = AtomicBool::new(true);
    let total = Mutex::new(Done::default());
    let done = |part: Done| total.lock().expect("no panics while locked").add_assign(part);
    let sessions = load.users.div_ceil(5).max(1);
    std::thread::scope(|scope| {
        let mut threads = Vec::new();
        let quota = load.operations / sessions;
        for (n, users) in users.chunks(5).enumerate() {
            let (coming, done) = (&coming, &done);
            let rng = Rng::part(load.seed, 1 + n as u64);
            threads.push(scope.spawn(move || session(server, users, rng, quota, coming).map(done)));
        }
        let delivered = deliver(server, &users, load).map(done);
        coming.store(false, Ordering::SeqCst);
        for thread in threads {
            thread.join().expect("a session panicked")?;
        }
        delivered
    })?;
    total.into_inner().map_err(|_| io::Error::other("a session panicked"))
}

/// Delivers over two connections; one message in the middle goes to every user.
fn deliver(server: &Dovecot, users: &[String], load: Load) -> io::Result<Done> {
    let shared = users.len().min(load.messages / 2);
    let next = AtomicUsize::new(0);
    let single = load.messages - shared;
    let part = || -> io::Result<usize> {
        let mut lmtp = Lmtp::connect(server.lmtp())?;
        let mut delivered = 0;
        loop {
            let n = next.fetch_add(1, Ordering::SeqCst);
            if n >= single {
                return Ok(delivered);
            }
            let mut rng = Rng::part(load.seed, 1_000_000 + n as u64);
            let user = rng.below(users.len());
            lmtp.deliver(&users[user..=user], &message(&mut rng, n))?;
            delivered += 1;
            if n == single / 2 && shared > 0 {
                lmtp.deliver(&users[..shared], &sized_message(&mut rng, n, 150_000))?;
                delivered += shared;
            }
        }
    };
    let delivered = std::thread::scope(|scope| {
        let other = scope.spawn(part);
        let own = part()?;
        Ok::<_, io::Error>(own + other.join().expect("a delivery thread panicked")?)
    })?;
    Ok(Done { delivered, ..Done::default() })
}

/// A message of 1 KB to 200 KB, mostly small.
#[must_use]
pub fn message(rng: &mut Rng, n: usize) -> Vec<u8> {
    let size = match rng.below(100) {
        0..80 => 1_000 + rng.below(7_000),
        80..97 => 8_000 + rng.below(40_000),
        _ => 50_000 + rng.below(150_000),
    };
    sized_message(rng, n, size)
}

/// A message of about `size` bytes: mail headers, lines of words, then base64-like lines.
#[must_use]
pub fn sized_message(rng: &mut Rng, n: usize, size: usize) -> Vec<u8> {
    const WORDS: [&str; 12] =
        ["meeting", "invoice", "please", "the", "schedule", "of", "attached", "and", "regards", "tomorrow", "report", "to"];
    const CODE: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = format!(
        "From: Sender <sender@load.test>\r\nTo: list@load.test\r\nSubject: message {n} {}\r\n\
         Message-ID: <{n}.{:016x}@load.test>\r\nDate: Mon, 01 Jan 2024 00:00:00 +0000\r\n\
         MIME-Version: 1.0\r\nContent-Type: text/plain; charset=utf-8\r\n\r\n",
        rng.pick(&WORDS),
        rng.next_u64(),
    )
    .into_bytes();
    while text.len() < size {
        if text.len() < 4_000 {
            for _ in 0..10 {
                text.extend_from_slice(rng.pick(&WORDS).as_bytes());
                text.push(b' ');
            }
        } else {
            text.extend(rng.bytes(76).iter().map(|b| CODE[usize::from(b % 64)]));
        }
        text.extend_from_slice(b"\r\n");
    }
    text
}

fn session(server: &Dovecot, users: &[String], mut rng: Rng, quota: usize, coming: &AtomicBool) -> io::Result<Done> {
    let mut done = Done::default();
    let mut operations = 0;
    'logins: while operations < quota || coming.load(Ordering::SeqCst) {
        let user = rng.pick(users);
        let mut imap = Imap::login(server.imap(), user)?;
        for _ in 0..10 + rng.below(20) {
            match step(&mut imap, &mut rng, &mut done) {
                // The server's process ended (`Dovecot::complaints` says whether it may): a mail client logs in again.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => continue 'logins,
                result => result?,
            }
            operations += 1;
        }
        imap.logout();
    }
    Ok(done)
}

/// One thing a user does.
fn step(imap: &mut Imap, rng: &mut Rng, done: &mut Done) -> io::Result<()> {
    match rng.below(100) {
        0..75 => messages(imap, rng, done),
        _ => folders(imap, rng, done),
    }
}

fn messages(imap: &mut Imap, rng: &mut Rng, done: &mut Done) -> io::Result<()> {
    let mailboxes = imap.mailboxes()?;
    let from = if rng.chance(60) { "INBOX".to_owned() } else { rng.pick(&mailboxes).clone() };
    if imap.select(&from)?.exists == 0 {
        return Ok(());
    }
    let uids = imap.uids()?;
    let mut some: Vec<String> = (0..1 + rng.below(4)).map(|_| rng.pick(&uids).to_string()).collect();
    some.dedup();
    let set = some.join(",");
    let others: Vec<&String> = mailboxes.iter().filter(|m| **m != from).collect();
    if others.is_empty() {
        return Ok(());
    }
    let into = quoted(rng.pick::<&String>(&others));
    let (command, count) = match rng.below(100) {
        0..50 => {
            let sign = if rng.chance(65) { '+' } else { '-' };
            (format!("UID STORE {set} {sign}FLAGS ({})", rng.pick(&FLAGS)), &mut done.flagged)
        }
        50..70 => (format!("UID COPY {set} {into}"), &mut done.copied),
        70..85 => (format!("UID MOVE {set} {into}"), &mut done.moved),
        _ => {
            imap.run(&format!("UID STORE {set} +FLAGS (\\Deleted)"))?;
            ("EXPUNGE".to_owned(), &mut done.expunged)
        }
    };
    match imap.run(&command)? {
        Answer::Ok => *count += 1,
        Answer::No => done.refused += 1,
    }
    Ok(())
}

fn folders(imap: &mut Imap, rng: &mut Rng, done: &mut Done) -> io::Result<()> {
    imap.select("INBOX")?;
    let mailboxes = imap.mailboxes()?;
    let own: Vec<&String> = mailboxes.iter().filter(|m| *m != "INBOX").collect();
    let fresh = format!("{} {}", rng.pick(&FOLDERS), rng.below(40));
    let fresh = if rng.chance(30) { format!("Tree{}{}", imap.separator()?, fresh) } else { fresh };
    let fresh = quoted(&fresh);
    let (command, count) = if own.len() < 3 || rng.chance(35) {
        (format!("CREATE {fresh}"), &mut done.created)
    } else {
        let folder = quoted(rng.pick::<&String>(&own));
        match rng.below(100) {
            0..35 => (format!("RENAME {folder} {fresh}"), &mut done.renamed),
            35..60 => (format!("DELETE {folder}"), &mut done.deleted),
            60..85 => (format!("SUBSCRIBE {folder}"), &mut done.subscribed),
            _ => (format!("UNSUBSCRIBE {folder}"), &mut done.subscribed),
        }
    };
    match imap.run(&command)? {
        Answer::Ok => *count += 1,
        Answer::No => done.refused += 1,
    }
    Ok(())
}
