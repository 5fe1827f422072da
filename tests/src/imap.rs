//! A small IMAP client (RFC 3501, with MOVE of RFC 6851): what the workload and the dump need, no more.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// A server silent for this long has failed.
const LIMIT: Duration = Duration::from_secs(60);

/// A message as IMAP shows it. `\Recent` belongs to a session, not to the message, and is left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Its UID.
    pub uid: u64,
    /// Flags and keywords, sorted.
    pub flags: Vec<String>,
    /// RFC822.SIZE.
    pub size: u64,
    /// INTERNALDATE.
    pub date: String,
    /// Hash of the whole message.
    pub body: [u8; 32],
    /// Its Message-ID.
    pub id: String,
}

/// The Message-ID of a message.
#[must_use]
pub fn id_of(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(&text[..text.len().min(2000)]).into_owned();
    let line = text.lines().find_map(|line| line.strip_prefix("Message-ID: ")).unwrap_or_default();
    line.trim().to_owned()
}

/// What opening a mailbox says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Selected {
    /// Messages in it.
    pub exists: u64,
    /// Its UIDVALIDITY.
    pub uid_validity: u64,
    /// Its UIDNEXT.
    pub uid_next: u64,
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// Done.
    Ok,
    /// Refused (a folder exists already, …).
    No,
}

/// One untagged response: its text with `{}` where each literal stood, and the literals.
#[derive(Debug)]
struct Line {
    text: String,
    literals: Vec<Vec<u8>>,
}

/// An IMAP session.
#[derive(Debug)]
pub struct Imap {
    stream: BufReader<TcpStream>,
    tag: u32,
}

impl Imap {
    /// Connects and reads the greeting.
    pub fn connect(to: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(to)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(LIMIT))?;
        let mut session = Self { stream: BufReader::new(stream), tag: 0 };
        let greeting = session.line()?;
        if greeting.text.starts_with("* OK") { Ok(session) } else { Err(io::Error::other(format!("IMAP greeting {:?}", greeting.text))) }
    }

    /// Connects and logs in.
    pub fn login(to: SocketAddr, user: &str) -> io::Result<Self> {
        let mut session = Self::connect(to)?;
        session.must(&format!("LOGIN {user} secret"))?;
        Ok(session)
    }

    /// Ends the session and waits for the server to close it.
    pub fn logout(mut self) {
        let _ = self.must("LOGOUT");
    }

    /// Runs a command; `BAD` is an error.
    pub fn run(&mut self, command: &str) -> io::Result<Answer> {
        self.command(command).map(|(answer, _)| answer)
    }

    /// Opens a mailbox for reading and writing.
    pub fn select(&mut self, mailbox: &str) -> io::Result<Selected> {
        let command = format!("SELECT {}", quoted(mailbox));
        let lines = match self.must(&command) {
            // An INBOX that a delivery makes at the same moment: a client tries again.
            Err(error) if error.to_string().contains("[ALREADYEXISTS]") => self.must(&command)?,
            result => result?,
        };
        let mut found = Selected::default();
        for line in &lines {
            let words: Vec<&str> = line.text.split_whitespace().collect();
            match words[..] {
                ["*", n, "EXISTS"] => found.exists = number(n)?,
                ["*", "OK", "[UIDVALIDITY", n, ..] => found.uid_validity = number(n)?,
                ["*", "OK", "[UIDNEXT", n, ..] => found.uid_next = number(n)?,
                _ => {}
            }
        }
        Ok(found)
    }

    /// The UIDs in the open mailbox, ascending.
    pub fn uids(&mut self) -> io::Result<Vec<u64>> {
        let lines = self.must("UID SEARCH ALL")?;
        let mut uids = Vec::new();
        for line in lines.iter().filter_map(|l| l.text.strip_prefix("* SEARCH")) {
            for word in line.split_whitespace() {
                uids.push(number(word)?);
            }
        }
        uids.sort_unstable();
        Ok(uids)
    }

    /// Every message in the open mailbox, without marking any as read, in order of UID.
    pub fn messages(&mut self) -> io::Result<Vec<Message>> {
        let lines = self.must("UID FETCH 1:* (UID FLAGS RFC822.SIZE INTERNALDATE BODY.PEEK[])")?;
        let mut messages = Vec::new();
        for line in lines.iter().filter(|l| l.text.contains(" FETCH (")) {
            if let [body] = &line.literals[..] {
                messages.push(message(&line.text, body)?);
            }
        }
        messages.sort_by_key(|m| m.uid);
        Ok(messages)
    }

    /// Names of all mailboxes that can be opened, sorted.
    pub fn mailboxes(&mut self) -> io::Result<Vec<String>> {
        self.list("LIST")
    }

    /// Names subscribed to, sorted.
    pub fn subscribed(&mut self) -> io::Result<Vec<String>> {
        self.list("LSUB")
    }

    /// What separates levels of the mailbox hierarchy.
    pub fn separator(&mut self) -> io::Result<String> {
        let lines = self.must("LIST \"\" \"\"")?;
        let line = lines.iter().find_map(|l| l.text.strip_prefix("* LIST ")).unwrap_or_default();
        let mut parts = line.split('"');
        parts.nth(1).map(ToOwned::to_owned).ok_or_else(|| io::Error::other(format!("LIST {line:?}")))
    }

    fn list(&mut self, command: &str) -> io::Result<Vec<String>> {
        let prefix = format!("* {command} ");
        let mut names = Vec::new();
        for line in self.must(&format!("{command} \"\" \"*\""))? {
            let Some(rest) = line.text.strip_prefix(&prefix) else { continue };
            if rest.to_ascii_lowercase().contains("\\noselect") {
                continue;
            }
            // (flags) "separator" name
            let name = rest.splitn(3, '"').nth(2).unwrap_or_default().trim();
            let name = match line.literals.first() {
                Some(literal) => String::from_utf8_lossy(literal).into_owned(),
                None => name.trim_matches('"').replace("\\\"", "\"").replace("\\\\", "\\"),
            };
            names.push(name);
        }
        names.sort();
        Ok(names)
    }

    fn must(&mut self, command: &str) -> io::Result<Vec<Line>> {
        match self.command(command)? {
            (Answer::Ok, lines) => Ok(lines),
            (Answer::No, lines) => {
                let said = lines.last().map(|l| l.text.clone()).unwrap_or_default();
                Err(io::Error::other(format!("{command}: {said}")))
            }
        }
    }

    fn command(&mut self, command: &str) -> io::Result<(Answer, Vec<Line>)> {
        self.tag += 1;
        let tag = format!("t{} ", self.tag);
        self.stream.get_mut().write_all(format!("{tag}{command}\r\n").as_bytes())?;
        let mut lines = Vec::new();
        loop {
            let line = self.line()?;
            let answer = match line.text.strip_prefix(&tag) {
                None => {
                    if line.text.starts_with("* BYE") && command != "LOGOUT" {
                        return Err(io::Error::other(format!("{command}: {}", line.text)));
                    }
                    lines.push(line);
                    continue;
                }
                Some(rest) if rest.starts_with("OK") => Answer::Ok,
                Some(rest) if rest.starts_with("NO") => Answer::No,
                Some(rest) => return Err(io::Error::other(format!("{command}: {rest}"))),
            };
            lines.push(line);
            return Ok((answer, lines));
        }
    }

    fn line(&mut self) -> io::Result<Line> {
        let mut whole = Line { text: String::new(), literals: Vec::new() };
        loop {
            let mut bytes = Vec::new();
            if self.stream.read_until(b'\n', &mut bytes)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let text = String::from_utf8_lossy(&bytes);
            let text = text.trim_end_matches(['\r', '\n']);
            let literal =
                text.strip_suffix('}').and_then(|t| t.rsplit_once('{')).and_then(|(before, n)| Some((before, n.parse::<usize>().ok()?)));
            let Some((before, length)) = literal else {
                whole.text.push_str(text);
                return Ok(whole);
            };
            let mut bytes = vec![0; length];
            self.stream.read_exact(&mut bytes)?;
            whole.text.push_str(before);
            whole.text.push_str("{}");
            whole.literals.push(bytes);
        }
    }
}

/// A mailbox name as an IMAP quoted string.
#[must_use]
pub fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('\\', "\\\\").replace('"', "\\\""))
}

fn message(text: &str, body: &[u8]) -> io::Result<Message> {
    let after = |key: &str| {
        let at = text.find(key).map(|at| &text[at + key.len()..]);
        at.ok_or_else(|| io::Error::other(format!("no {key} in {text:?}")))
    };
    let until = |rest: &str, end: &[char]| rest.split(end).next().unwrap_or_default().to_owned();
    let flags = until(after("FLAGS (")?, &[')']);
    let mut flags: Vec<String> = flags.split_whitespace().filter(|f| *f != "\\Recent").map(ToOwned::to_owned).collect();
    flags.sort();
    Ok(Message {
        uid: number(&until(after("UID ")?, &[' ', ')']))?,
        flags,
        size: number(&until(after("RFC822.SIZE ")?, &[' ', ')']))?,
        date: until(after("INTERNALDATE \"")?, &['"']),
        body: *blake3::hash(body).as_bytes(),
        id: id_of(body),
    })
}

fn number(text: &str) -> io::Result<u64> {
    let digits = text.trim_end_matches([']', ')']);
    digits.parse().map_err(|_| io::Error::other(format!("not a number: {text:?}")))
}
