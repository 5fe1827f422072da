//! A private Dovecot over a mail store: its own configuration, directories and loopback ports; LMTP in, IMAP out.
//!
//! All mailboxes belong to one numeric user without an account, as on a virtual-mailbox host. Every user's password is anything.
//! The store is `ROOT/<user>/…`, one directory a user. Settings: Dovecot 2.3 (<https://doc.dovecot.org/2.3/>).

use std::collections::BTreeMap;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::gate::wait_for;
use crate::imap::{Imap, Message};
use crate::scratch::Scratch;
use crate::tree::Layout;

/// The owner of every mailbox.
pub const MAIL_UID: u32 = 5_000;

/// How long Dovecot may take to start or stop.
const LIMIT: Duration = Duration::from_secs(30);

/// A mailbox as IMAP shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mailbox {
    /// Its UIDVALIDITY.
    pub uid_validity: u64,
    /// Its UIDNEXT.
    pub uid_next: u64,
    /// In order of UID.
    pub messages: Vec<Message>,
}

/// What one user sees.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Account {
    /// By name (modified UTF-7).
    pub mailboxes: BTreeMap<String, Mailbox>,
    /// Names subscribed to, sorted.
    pub subscribed: Vec<String>,
}

/// What every user sees.
pub type Dump = BTreeMap<String, Account>;

/// A running Dovecot; stopped on drop.
#[derive(Debug)]
pub struct Dovecot {
    scratch: Scratch,
    child: Child,
    imap: SocketAddr,
    lmtp: SocketAddr,
}

impl Dovecot {
    /// Starts Dovecot on the store at `root`, which must belong to [`MAIL_UID`] (or be empty and owned by it).
    #[must_use]
    pub fn start(root: &Path, layout: Layout) -> Self {
        // A port found free can be taken before Dovecot binds it: then it exits, and is tried again elsewhere.
        for _ in 0..4 {
            let mut server = Self::launch(root, layout);
            let deadline = Instant::now() + LIMIT;
            while Instant::now() < deadline {
                if server.child.try_wait().expect("wait for dovecot").is_some() {
                    break;
                }
                if Imap::connect(server.imap).is_ok() && TcpStream::connect(server.lmtp).is_ok() {
                    return server;
                }
                crate::gate::nap(Duration::from_millis(20));
            }
            eprintln!("dovecot did not start:\n{}", server.log());
        }
        panic!("dovecot does not start");
    }

    fn launch(root: &Path, layout: Layout) -> Self {
        let scratch = Scratch::new("dovecot");
        let (imap, lmtp) = (free_tcp(), free_tcp());
        let location = match layout {
            Layout::Maildir | Layout::Plain => "maildir:~/Maildir",
            Layout::Sdbox => "sdbox:~/sdbox",
            Layout::Mdbox => "mdbox:~/mdbox",
            Layout::Mbox => "mbox:~/mail:INBOX=~/mail/inbox",
        };
        let text = CONFIG
            .replace("@base@", &scratch.path().display().to_string())
            .replace("@root@", &root.display().to_string())
            .replace("@location@", location)
            .replace("@uid@", &MAIL_UID.to_string())
            .replace("@imap@", &imap.port().to_string())
            .replace("@lmtp@", &lmtp.port().to_string());
        let config = scratch.join("dovecot.conf");
        fs::write(&config, text).expect("write configuration");
        let child = Command::new("dovecot")
            .arg("-F")
            .arg("-c")
            .arg(&config)
            .env("PATH", path_with_sbin())
            .stdin(Stdio::null())
            .stdout(fs::File::create(scratch.join("out")).expect("log"))
            .stderr(fs::File::create(scratch.join("err")).expect("log"))
            .spawn()
            .expect("start dovecot");
        Self { scratch, child, imap, lmtp }
    }

    /// Where IMAP is.
    #[must_use]
    pub fn imap(&self) -> SocketAddr {
        self.imap
    }

    /// Where LMTP is.
    #[must_use]
    pub fn lmtp(&self) -> SocketAddr {
        self.lmtp
    }

    /// Its configuration file.
    #[must_use]
    pub fn config(&self) -> PathBuf {
        self.scratch.join("dovecot.conf")
    }

    /// What it has logged.
    #[must_use]
    pub fn log(&self) -> String {
        ["dovecot.log", "out", "err"].iter().filter_map(|f| fs::read_to_string(self.scratch.join(f)).ok()).collect()
    }

    /// Lines in the log that say something is broken.
    #[must_use]
    pub fn complaints(&self) -> Vec<String> {
        let bad = ["Error:", "Fatal:", "Panic:", "orrupt"];
        let log = self.log();
        // Two of its processes wait for each other's lock of the mailbox list; the kernel refuses one, which gives up: Dovecot's own, mirrored or not.
        let pid = |line: &str| Some(line.split_once(")<")?.1.split_once('>')?.0.to_owned());
        let deadlocked: Vec<String> = log.lines().filter(|l| l.contains("Resource deadlock avoided")).filter_map(pid).collect();
        let of_those =
            |line: &str| deadlocked.iter().any(|p| line.contains(&format!("<{p}>")) || line.contains(&format!("child {p} killed")));
        let lines = log.lines().filter(|l| bad.iter().any(|b| l.contains(b)) && !of_those(l));
        lines.map(ToOwned::to_owned).collect()
    }

    /// Stops it and waits until it is gone.
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        if self.child.try_wait().is_ok_and(|s| s.is_none()) {
            let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
            wait_for(LIMIT, "dovecot to stop", || self.child.try_wait().ok().flatten());
        }
    }

    /// Everything `users` see, read through IMAP. Folders are opened as a mail client does, so that the server first takes in
    /// whatever it finds on disk.
    #[must_use]
    pub fn dump(&self, users: &[String]) -> Dump {
        let account = |user: &String| {
            let mut imap = Imap::login(self.imap, user).expect("log in");
            let mut account = Account { subscribed: imap.subscribed()?, ..Account::default() };
            for name in imap.mailboxes()? {
                let selected = imap.select(&name)?;
                let messages = imap.messages()?;
                let (uid_validity, uid_next) = (selected.uid_validity, selected.uid_next);
                account.mailboxes.insert(name, Mailbox { uid_validity, uid_next, messages });
            }
            imap.logout();
            Ok::<_, std::io::Error>((user.clone(), account))
        };
        let all: std::io::Result<Dump> = users.iter().map(account).collect();
        all.unwrap_or_else(|e| panic!("dump: {e}\n{}", self.log()))
    }
}

impl Drop for Dovecot {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<&str> = log.lines().rev().take(20).collect();
            eprintln!("--- dovecot\n{}", lines.into_iter().rev().collect::<Vec<_>>().join("\n"));
            let _ = self.child.try_wait().is_ok_and(|s| s.is_some()) || self.kill();
            return;
        }
        self.end();
    }
}

impl Dovecot {
    fn kill(&mut self) -> bool {
        let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
        self.child.wait().is_ok()
    }
}

/// What two dumps disagree on, one a line; empty when they agree exactly.
#[must_use]
pub fn differences(primary: &Dump, replica: &Dump) -> Vec<String> {
    let mut out = Vec::new();
    for user in primary.keys().chain(replica.keys().filter(|u| !primary.contains_key(*u))) {
        let (Some(p), Some(r)) = (primary.get(user), replica.get(user)) else {
            out.push(format!("{user}: only on one side"));
            continue;
        };
        if p.subscribed != r.subscribed {
            out.push(format!("{user}: subscribed {:?} → {:?}", p.subscribed, r.subscribed));
        }
        let more = r.mailboxes.keys().filter(|m| !p.mailboxes.contains_key(*m));
        for name in p.mailboxes.keys().chain(more) {
            let (Some(a), Some(b)) = (p.mailboxes.get(name), r.mailboxes.get(name)) else {
                out.push(format!("{user}/{name}: only on one side"));
                continue;
            };
            if (a.uid_validity, a.uid_next) != (b.uid_validity, b.uid_next) {
                out.push(format!(
                    "{user}/{name}: uidvalidity, uidnext {:?} → {:?}",
                    (a.uid_validity, a.uid_next),
                    (b.uid_validity, b.uid_next)
                ));
            }
            if a.messages.len() != b.messages.len() {
                let (a, b) = (a.messages.len(), b.messages.len());
                out.push(format!("{user}/{name}: {a} → {b} messages"));
            }
            for (x, y) in a.messages.iter().zip(&b.messages).filter(|(x, y)| x != y) {
                out.push(format!("{user}/{name}: {x:?} → {y:?}"));
            }
        }
    }
    out
}

/// The names of `n` users.
#[must_use]
pub fn users(n: usize) -> Vec<String> {
    (0..n).map(|i| format!("user{i:02}")).collect()
}

/// An unused TCP port on loopback.
fn free_tcp() -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bind");
    listener.local_addr().expect("an address")
}

fn path_with_sbin() -> std::ffi::OsString {
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(":/usr/sbin:/sbin");
    path
}

/// Where a store's users live is `root`; a helper to make it.
#[must_use]
pub fn store(scratch: &Scratch, name: &str) -> PathBuf {
    scratch.dir_of(name, MAIL_UID)
}

const CONFIG: &str = "\
base_dir = @base@/run
state_dir = @base@/state
log_path = @base@/dovecot.log
protocols = imap lmtp
listen = 127.0.0.1
ssl = no
disable_plaintext_auth = no
auth_mechanisms = plain
auth_username_format = %Ln
passdb {
  driver = static
  args = nopassword=y
}
userdb {
  driver = static
  args = uid=@uid@ gid=@uid@ home=@root@/%n allow_all_users=yes
}
first_valid_uid = @uid@
first_valid_gid = @uid@
mail_location = @location@
mail_max_userip_connections = 100
mail_fsync = optimized
mbox_write_locks = fcntl dotlock
namespace inbox {
  inbox = yes
}
service imap-login {
  inet_listener imap {
    port = @imap@
  }
  inet_listener imaps {
    port = 0
  }
}
service lmtp {
  inet_listener lmtp {
    address = 127.0.0.1
    port = @lmtp@
  }
}
service anvil {
  client_limit = 2000
}
service auth {
  client_limit = 2000
}
";
