//! A program that waits for fences: the agent's socket, spoken to by hand, and writers that deliver mail and fence each message.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::gate::nap_until;
use crate::rng::Rng;

/// A connection to an agent.
#[derive(Debug)]
pub struct Client(BufReader<UnixStream>);

impl Client {
    /// Connects to the agent on a state directory.
    pub fn connect(state: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(state.join("admin.sock"))?;
        stream.set_read_timeout(Some(Duration::from_secs(120)))?;
        Ok(Client(BufReader::new(stream)))
    }

    /// Sends a line, gives the answer without its newline.
    pub fn ask(&mut self, line: &str) -> io::Result<String> {
        self.0.get_mut().write_all(format!("{line}\n").as_bytes())?;
        self.answer()
    }

    /// Asks for a fence and does not wait.
    pub fn send(&mut self, path: &Path, seconds: u64) -> io::Result<()> {
        self.0.get_mut().write_all(format!("FENCE timeout={seconds}s path={}\n", path.display()).as_bytes())
    }

    /// The next answer, without its newline.
    pub fn answer(&mut self) -> io::Result<String> {
        let mut answer = String::new();
        if self.0.read_line(&mut answer)? == 0 || answer.pop() != Some('\n') {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(answer)
    }

    /// Whether everything below `path` (plain ASCII, no spaces) was safe within `seconds`.
    pub fn fence(&mut self, path: &Path, seconds: u64) -> io::Result<bool> {
        Ok(self.ask(&format!("FENCE timeout={seconds}s path={}", path.display()))?.starts_with("OK "))
    }
}

/// Delivers one message as a mail server does: written below `tmp`, synced, renamed into `new`. Gives its name in `new`.
pub fn deliver(maildir: &Path, name: &str, body: &[u8]) -> io::Result<PathBuf> {
    deliver_with(maildir, name, body, true)
}

/// The same; without `sync` as one that leaves it to the fence.
fn deliver_with(maildir: &Path, name: &str, body: &[u8], sync: bool) -> io::Result<PathBuf> {
    let (tmp, new) = (maildir.join("tmp").join(name), maildir.join("new").join(name));
    let mut file = File::create(&tmp)?;
    file.write_all(body)?;
    if sync {
        file.sync_all()?;
    }
    fs::rename(&tmp, &new)?;
    Ok(new)
}

/// Makes a Maildir.
pub fn maildir(root: &Path, user: &str) -> PathBuf {
    let dir = root.join(user).join("Maildir");
    for part in ["tmp", "new", "cur"] {
        fs::create_dir_all(dir.join(part)).expect("a Maildir");
    }
    dir
}

/// What writers delivered and had fenced: path below the root ▶ content.
#[derive(Debug, Default)]
pub struct Ledger {
    /// Fence returned success.
    pub fenced: Mutex<BTreeMap<PathBuf, Vec<u8>>>,
    /// Messages delivered, fenced or not.
    pub delivered: AtomicUsize,
    /// No agent is there: writers rest.
    pub down: AtomicBool,
    /// Writers that rest, or have ended: they have nothing open below the root.
    pub resting: AtomicUsize,
    /// Writers end.
    pub over: AtomicBool,
    /// Writers sync nothing themselves: a fence is all they wait for.
    pub unsynced: bool,
}

impl Ledger {
    /// The messages fenced by now.
    #[must_use]
    pub fn snapshot(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        self.fenced.lock().expect("no panics while locked").clone()
    }

    /// What of `fenced` is not in `tree` as it should be, one line each.
    #[must_use]
    pub fn missing(fenced: &BTreeMap<PathBuf, Vec<u8>>, tree: &Path) -> Vec<String> {
        let look = |(path, body): (&PathBuf, &Vec<u8>)| match fs::read(tree.join(path)) {
            Ok(found) if found == *body => None,
            Ok(found) => Some(format!("{}: {} bytes instead of {}", path.display(), found.len(), body.len())),
            Err(error) => Some(format!("{}: {error}", path.display())),
        };
        fenced.iter().filter_map(look).collect()
    }

    /// One writer: delivers to its own users and fences each message, until `total` messages are delivered by all or it is over. While the agent is down it rests.
    pub fn write(&self, root: &Path, state: &Path, writer: usize, total: usize, seed: u64) -> io::Result<()> {
        let mut rng = Rng::part(seed, 500 + writer as u64);
        let maildir = maildir(root, &format!("user{writer:02}"));
        let mut client = None;
        while !self.over.load(Ordering::SeqCst) {
            if self.down.load(Ordering::SeqCst) {
                client = None;
                self.resting.fetch_add(1, Ordering::SeqCst);
                while self.down.load(Ordering::SeqCst) {
                    nap_until(Instant::now() + Duration::from_millis(20));
                }
                self.resting.fetch_sub(1, Ordering::SeqCst);
                continue;
            }
            let n = self.delivered.fetch_add(1, Ordering::SeqCst);
            if n >= total {
                break;
            }
            let large = rng.chance(5);
            let size = 200 + rng.below(if large { 100_000 } else { 6_000 });
            let body = rng.bytes(size);
            let path = deliver_with(&maildir, &format!("{n:06}.w{writer}.test"), &body, !self.unsynced)?;
            let answer = match &mut client {
                Some(client) => Client::fence(client, &path, 10),
                None => Client::connect(state).and_then(|new| client.insert(new).fence(&path, 10)),
            };
            match answer {
                Ok(true) => {
                    let below = path.strip_prefix(root).expect("below the root").to_owned();
                    self.fenced.lock().expect("no panics while locked").insert(below, body);
                }
                Ok(false) => nap_until(Instant::now() + Duration::from_millis(20)),
                Err(_) => {
                    client = None;
                    nap_until(Instant::now() + Duration::from_millis(20));
                }
            }
        }
        self.resting.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}
