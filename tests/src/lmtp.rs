//! Delivers mail over LMTP (RFC 2033), as a mail server's outer half does.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// A server silent for this long has failed.
const LIMIT: Duration = Duration::from_secs(60);

/// Tries of one delivery. Dovecot 2.3's lmtp process can end under an mdbox move of the same mailbox, or say `451` when another makes
/// the mailbox at the same time; a mail server's queue then tries again, on a new connection.
const TRIES: u32 = 3;

/// An LMTP session.
#[derive(Debug)]
pub struct Lmtp(BufReader<TcpStream>, SocketAddr);

impl Lmtp {
    /// Connects and greets.
    pub fn connect(to: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(to)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(LIMIT))?;
        let mut session = Self(BufReader::new(stream), to);
        session.expect("220")?;
        session.command("LHLO load.test", "250")?;
        Ok(session)
    }

    /// Delivers one message (CRLF lines) to users; each has it when this returns (some twice, if the server ended after storing it).
    pub fn deliver(&mut self, users: &[String], message: &[u8]) -> io::Result<()> {
        for _ in 1..TRIES {
            match self.try_deliver(users, message) {
                Err(error) if matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::WouldBlock) => {
                    *self = Self::connect(self.1)?
                }
                other => return other,
            }
        }
        self.try_deliver(users, message)
    }

    fn try_deliver(&mut self, users: &[String], message: &[u8]) -> io::Result<()> {
        self.command("MAIL FROM:<sender@load.test>", "250")?;
        for user in users {
            self.command(&format!("RCPT TO:<{user}@load.test>"), "250")?;
        }
        self.command("DATA", "354")?;
        let mut stuffed = Vec::with_capacity(message.len() + 16);
        for line in message.split_inclusive(|b| *b == b'\n') {
            if line.starts_with(b".") {
                stuffed.push(b'.');
            }
            stuffed.extend_from_slice(line);
        }
        if !stuffed.ends_with(b"\r\n") {
            stuffed.extend_from_slice(b"\r\n");
        }
        stuffed.extend_from_slice(b".\r\n");
        self.0.get_mut().write_all(&stuffed)?;
        for _ in users {
            self.expect("250")?;
        }
        Ok(())
    }

    fn command(&mut self, line: &str, want: &str) -> io::Result<()> {
        self.0.get_mut().write_all(format!("{line}\r\n").as_bytes())?;
        self.expect(want)
    }

    fn expect(&mut self, want: &str) -> io::Result<()> {
        loop {
            let mut line = String::new();
            if self.0.read_line(&mut line)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if line.starts_with('4') {
                return Err(io::Error::new(io::ErrorKind::WouldBlock, format!("LMTP: {line:?}")));
            }
            if !line.starts_with(want) {
                return Err(io::Error::other(format!("LMTP: wanted {want}, got {line:?}")));
            }
            if line.as_bytes().get(3) != Some(&b'-') {
                return Ok(());
            }
        }
    }
}

impl Drop for Lmtp {
    fn drop(&mut self) {
        let _ = self.0.get_mut().write_all(b"QUIT\r\n");
    }
}
