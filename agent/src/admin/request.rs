//! Requests as they stand on a line: a command, then words `key=value` in any order.
//!
//! Values are percent-encoded where they hold a space, a control character, `%` or a byte that is no ASCII (RFC 3986 §2.1): a path of any bytes fits.
//! Does not know what mirrors there are.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::Response;
use crate::duration::{duration_text, parse_duration};

/// How long a fence waits when it is not told.
pub const FENCE_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a declared transaction may stay open when it is not told.
pub const TXN_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest time either can be told.
pub const TIMEOUT_MAX: Duration = Duration::from_secs(3600);

/// A fence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fence {
    /// Only this mirror.
    pub mirror: Option<String>,
    /// Absolute paths; empty: everything.
    pub paths: Vec<PathBuf>,
    /// How long to wait.
    pub timeout: Duration,
    /// Wait also for a standby that is not there.
    pub wait: bool,
}

impl Default for Fence {
    fn default() -> Self {
        Fence { mirror: None, paths: vec![], timeout: FENCE_TIMEOUT, wait: false }
    }
}

/// A change of role.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Switch {
    /// Which mirror; `None`: the only one there is.
    pub mirror: Option<String>,
    /// Although something speaks against it.
    pub force: bool,
}

/// What a node that was primary is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resync {
    /// Which mirror; `None`: the only one there is.
    pub mirror: Option<String>,
    /// Do it; else only say what would be done.
    pub apply: bool,
    /// The node that stays.
    pub winner: Option<String>,
    /// Keep everything in rescue, merge nothing.
    pub rescue: bool,
}

/// Something that is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rescued {
    /// `MIRROR/OCCASION/PATH`.
    pub entry: String,
    /// As a message that has just come, not as the file it was.
    pub redeliver: bool,
}

/// A comparison of this node's disk with the manifest.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Verify {
    /// Which mirror; `None`: the only one there is.
    pub mirror: Option<String>,
    /// Repair what differs.
    pub repair: bool,
    /// Bytes read a second; 0: as fast as the disk; `None`: as the configuration says.
    pub rate: Option<u64>,
    /// From the beginning, also when an earlier one was cut short.
    pub anew: bool,
}

/// What can be asked of an agent.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Request {
    /// Are you there? Answers `{}`.
    Ping,
    /// How are you? Answers a [`crate::status::Status`].
    Status,
    /// Read the configuration again.
    Reload,
    /// Drain and stop.
    Stop,
    /// Become primary of a mirror.
    Promote(Switch),
    /// Become standby of a mirror.
    Demote(Switch),
    /// Hand a mirror over to its standby.
    Switchover(Switch),
    /// What is on this node alone, which was primary: merge it, or keep it.
    Resync(Resync),
    /// Give something back that is kept in rescue.
    Rescue(Rescued),
    /// Compare disk and manifest. Answers a [`crate::verify::Record`] when it is through, or was stopped.
    Verify(Verify),
    /// Stop the comparison that is under way; the next goes on where it was.
    VerifyStop {
        /// Which mirror; `None`: the only one there is.
        mirror: Option<String>,
    },
    /// Say when everything changed by now is durable on the standby.
    Fence(Fence),
    /// Do not cut the group of this path until its transaction is committed.
    TxnBegin {
        /// Absolute path of, or in, the group.
        path: PathBuf,
        /// For this long at most.
        timeout: Duration,
    },
    /// Cut it again, and fence it.
    TxnCommit {
        /// Which transaction; `None`: the only one of the group.
        txn: Option<u64>,
        /// Path and limits of the fence; exactly one path.
        fence: Fence,
        /// Do not wait for the fence.
        nowait: bool,
    },
}

const KNOWN: &str = "PING, STATUS, RELOAD, STOP, PROMOTE, DEMOTE, SWITCHOVER, RESYNC PLAN, RESYNC APPLY, RESCUE RESTORE, RESCUE REDELIVER, VERIFY RUN, VERIFY STOP, FENCE, TXN BEGIN, TXN COMMIT";

impl Request {
    /// The request line, without newline.
    #[must_use]
    pub fn to_line(&self) -> String {
        let fence_words = |fence: &Fence| {
            let mut line = format!(" timeout={}", duration_text(fence.timeout));
            if let Some(mirror) = &fence.mirror {
                line += &format!(" mirror={}", encode(mirror.as_bytes()));
            }
            if fence.wait {
                line += " unprotected=wait";
            }
            for path in &fence.paths {
                line += &format!(" path={}", encode(path.as_os_str().as_bytes()));
            }
            line
        };
        let switch_words = |switch: &Switch| {
            let mirror = switch.mirror.as_ref().map_or(String::new(), |mirror| format!(" mirror={}", encode(mirror.as_bytes())));
            format!("{mirror}{}", if switch.force { " force=yes" } else { "" })
        };
        match self {
            Request::Promote(switch) => format!("PROMOTE{}", switch_words(switch)),
            Request::Demote(switch) => format!("DEMOTE{}", switch_words(switch)),
            Request::Switchover(switch) => format!("SWITCHOVER{}", switch_words(switch)),
            Request::Resync(Resync { mirror, apply, winner, rescue }) => {
                let word = |key: &str, value: &Option<String>| {
                    value.as_ref().map_or(String::new(), |value| format!(" {key}={}", encode(value.as_bytes())))
                };
                let policy = if *rescue { " policy=rescue" } else { "" };
                format!("RESYNC {}{}{}{policy}", if *apply { "APPLY" } else { "PLAN" }, word("mirror", mirror), word("winner", winner))
            }
            Request::Rescue(Rescued { entry, redeliver }) => {
                format!("RESCUE {} entry={}", if *redeliver { "REDELIVER" } else { "RESTORE" }, encode(entry.as_bytes()))
            }
            Request::Verify(Verify { mirror, repair, rate, anew }) => {
                let mirror = mirror.as_ref().map_or(String::new(), |mirror| format!(" mirror={}", encode(mirror.as_bytes())));
                let rate = rate.map_or(String::new(), |rate| format!(" rate={rate}"));
                let yes = |word, is| if is { format!(" {word}=yes") } else { String::new() };
                format!("VERIFY RUN{mirror}{rate}{}{}", yes("repair", *repair), yes("anew", *anew))
            }
            Request::VerifyStop { mirror } => {
                format!("VERIFY STOP{}", mirror.as_ref().map_or(String::new(), |mirror| format!(" mirror={}", encode(mirror.as_bytes()))))
            }
            Request::Ping => "PING".into(),
            Request::Status => "STATUS".into(),
            Request::Reload => "RELOAD".into(),
            Request::Stop => "STOP".into(),
            Request::Fence(fence) => format!("FENCE{}", fence_words(fence)),
            Request::TxnBegin { path, timeout } => {
                format!("TXN BEGIN timeout={} path={}", duration_text(*timeout), encode(path.as_os_str().as_bytes()))
            }
            Request::TxnCommit { txn, fence, nowait } => {
                let txn = txn.map_or(String::new(), |txn| format!(" txn={txn}"));
                format!("TXN COMMIT{txn}{}{}", fence_words(fence), if *nowait { " nowait=yes" } else { "" })
            }
        }
    }

    /// Reads a request line without its newline.
    ///
    /// # Errors
    /// The answer to send.
    pub fn parse(line: &[u8]) -> Result<Self, Response> {
        let mut words = line.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty());
        let command = words.next().unwrap_or_default();
        let rest: Vec<&[u8]> = words.collect();
        let plain = |request: Request| match rest.as_slice() {
            [] => Ok(request),
            _ => Err(Response::error("bad-arguments", format!("{} takes none", request.to_line()))),
        };
        match (command, rest.first().copied()) {
            (b"PING", _) => plain(Request::Ping),
            (b"STATUS", _) => plain(Request::Status),
            (b"RELOAD", _) => plain(Request::Reload),
            (b"STOP", _) => plain(Request::Stop),
            (b"PROMOTE", _) => Words::read("PROMOTE", &rest)?.switch().map(Request::Promote),
            (b"DEMOTE", _) => Words::read("DEMOTE", &rest)?.switch().map(Request::Demote),
            (b"SWITCHOVER", _) => Words::read("SWITCHOVER", &rest)?.switch().map(Request::Switchover),
            (b"RESYNC", Some(what @ (b"PLAN" | b"APPLY"))) => {
                let mut words = Words::read("RESYNC", &rest[1..])?;
                let mut name = |key| Ok::<_, Response>(words.one(key)?.map(|name| name.to_string_lossy().into_owned()));
                let (mirror, winner) = (name("mirror")?, name("winner")?);
                let rescue = words.choice("policy", &["merge", "rescue"])? == 1;
                words.end().map(|()| Request::Resync(Resync { mirror, apply: what == b"APPLY", winner, rescue }))
            }
            (b"RESCUE", Some(what @ (b"RESTORE" | b"REDELIVER"))) => {
                let mut words = Words::read("RESCUE", &rest[1..])?;
                let entry = words.one("entry")?.ok_or_else(|| words.bad("entry=ENTRY is missing"))?;
                let entry = entry.to_string_lossy().into_owned();
                words.end().map(|()| Request::Rescue(Rescued { entry, redeliver: what == b"REDELIVER" }))
            }
            (b"VERIFY", Some(what @ (b"RUN" | b"STOP"))) => {
                let mut words = Words::read("VERIFY", &rest[1..])?;
                let mirror = words.one("mirror")?.map(|name| name.to_string_lossy().into_owned());
                if what == b"STOP" {
                    return words.end().map(|()| Request::VerifyStop { mirror });
                }
                let rate = match words.one("rate")? {
                    None => None,
                    Some(text) => Some(text.to_str().and_then(|t| t.parse().ok()).ok_or_else(|| words.bad("rate is a number of bytes"))?),
                };
                let (repair, anew) = (words.choice("repair", &["no", "yes"])? == 1, words.choice("anew", &["no", "yes"])? == 1);
                words.end().map(|()| Request::Verify(Verify { mirror, repair, rate, anew }))
            }
            (b"VERIFY", _) => Err(Response::error("bad-arguments", "VERIFY is followed by RUN or STOP")),
            (b"RESCUE", _) => Err(Response::error("bad-arguments", "RESCUE is followed by RESTORE or REDELIVER")),
            (b"RESYNC", _) => Err(Response::error("bad-arguments", "RESYNC is followed by PLAN or APPLY")),
            (b"FENCE", _) => {
                let mut words = Words::read("FENCE", &rest)?;
                let fence = words.fence()?;
                words.end().map(|()| Request::Fence(fence))
            }
            (b"TXN", Some(b"BEGIN")) => {
                let mut words = Words::read("TXN BEGIN", &rest[1..])?;
                let (timeout, path) = (words.duration("timeout", TXN_TIMEOUT)?, words.path()?);
                words.end().map(|()| Request::TxnBegin { path, timeout })
            }
            (b"TXN", Some(b"COMMIT")) => {
                let mut words = Words::read("TXN COMMIT", &rest[1..])?;
                let txn = match words.one("txn")? {
                    None => None,
                    Some(text) => Some(text.to_str().and_then(|t| t.parse().ok()).ok_or_else(|| words.bad("txn is a number"))?),
                };
                let nowait = words.choice("nowait", &["no", "yes"])? == 1;
                let fence = words.fence()?;
                if fence.paths.len() > 1 || (fence.paths.is_empty() && txn.is_none()) {
                    return Err(words.bad("name the transaction by txn=NUMBER, by one path=PATH of its group, or both"));
                }
                words.end().map(|()| Request::TxnCommit { txn, fence, nowait })
            }
            (b"TXN", _) => Err(Response::error("bad-arguments", "TXN is followed by BEGIN or COMMIT")),
            _ => {
                let shown: String = String::from_utf8_lossy(command).chars().take(40).flat_map(char::escape_default).collect();
                Err(Response::error("unknown-command", format!("`{shown}`; this agent knows {KNOWN}")))
            }
        }
    }
}

/// The words after a command.
struct Words {
    command: &'static str,
    map: BTreeMap<String, Vec<OsString>>,
}

impl Words {
    fn read(command: &'static str, words: &[&[u8]]) -> Result<Self, Response> {
        let mut map: BTreeMap<String, Vec<OsString>> = BTreeMap::new();
        for word in words {
            let pair = word.iter().position(|b| *b == b'=').map(|at| (&word[..at], &word[at + 1..]));
            let read = pair.and_then(|(key, value)| Some((std::str::from_utf8(key).ok()?, decode(value)?)));
            let Some((key, value)) = read else {
                return Err(Response::error("bad-arguments", format!("{command}: words are key=value, percent-encoded")));
            };
            map.entry(key.to_owned()).or_default().push(OsString::from_vec(value));
        }
        Ok(Words { command, map })
    }

    fn bad(&self, why: &str) -> Response {
        Response::error("bad-arguments", format!("{}: {why}", self.command))
    }

    fn one(&mut self, key: &str) -> Result<Option<OsString>, Response> {
        match self.map.remove(key) {
            None => Ok(None),
            Some(mut all) if all.len() == 1 => Ok(all.pop()),
            Some(_) => Err(self.bad(&format!("{key} is given twice"))),
        }
    }

    fn duration(&mut self, key: &str, default: Duration) -> Result<Duration, Response> {
        let Some(text) = self.one(key)? else { return Ok(default) };
        let time = parse_duration(&text.to_string_lossy()).map_err(|error| self.bad(&error.to_string()))?;
        if time > TIMEOUT_MAX { Err(self.bad(&format!("{key} is at most {}", duration_text(TIMEOUT_MAX)))) } else { Ok(time) }
    }

    fn choice(&mut self, key: &str, of: &[&str]) -> Result<usize, Response> {
        let Some(text) = self.one(key)? else { return Ok(0) };
        of.iter().position(|word| text == *word).ok_or_else(|| self.bad(&format!("{key} is one of {}", of.join(", "))))
    }

    fn absolute(&self, path: OsString) -> Result<PathBuf, Response> {
        let path = PathBuf::from(path);
        if path.is_absolute() && !path.as_os_str().as_bytes().contains(&0) { Ok(path) } else { Err(self.bad("a path is absolute")) }
    }

    fn path(&mut self) -> Result<PathBuf, Response> {
        let path = self.one("path")?.ok_or_else(|| self.bad("path=PATH is missing"))?;
        self.absolute(path)
    }

    fn fence(&mut self) -> Result<Fence, Response> {
        let mirror = self.one("mirror")?.map(|name| name.to_string_lossy().into_owned());
        let timeout = self.duration("timeout", FENCE_TIMEOUT)?;
        let wait = self.choice("unprotected", &["fail", "wait"])? == 1;
        let paths = self.map.remove("path").unwrap_or_default();
        let paths = paths.into_iter().map(|path| self.absolute(path)).collect::<Result<_, _>>()?;
        Ok(Fence { mirror, paths, timeout, wait })
    }

    fn switch(mut self) -> Result<Switch, Response> {
        let mirror = self.one("mirror")?.map(|name| name.to_string_lossy().into_owned());
        let force = self.choice("force", &["no", "yes"])? == 1;
        self.end().map(|()| Switch { mirror, force })
    }

    fn end(&self) -> Result<(), Response> {
        match self.map.keys().next() {
            None => Ok(()),
            Some(key) => {
                Err(self.bad(&format!("`{}` is not known", key.chars().take(40).flat_map(char::escape_default).collect::<String>())))
            }
        }
    }
}

/// Percent-encodes what a word cannot hold.
#[must_use]
pub fn encode(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for byte in bytes {
        match byte {
            b'!'..=b'$' | b'&'..=b'~' => text.push(char::from(*byte)),
            _ => text.push_str(&format!("%{byte:02X}")),
        }
    }
    text
}

fn decode(text: &[u8]) -> Option<Vec<u8>> {
    let (mut bytes, mut at) = (Vec::with_capacity(text.len()), 0);
    while at < text.len() {
        if text[at] == b'%' {
            let digits = std::str::from_utf8(text.get(at + 1..at + 3)?).ok()?;
            // `from_str_radix` would take a sign.
            bytes.push(digits.bytes().all(|b| b.is_ascii_hexdigit()).then(|| u8::from_str_radix(digits, 16).ok())??);
            at += 3;
        } else {
            bytes.push(text[at]);
            at += 1;
        }
    }
    Some(bytes)
}

/// `path` with `.` and `..` and doubled slashes resolved as text.
#[must_use]
pub fn plain(path: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            std::path::Component::ParentDir => {
                out.pop();
            }
            std::path::Component::CurDir => {}
            other => out.push(other),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_request_reads_back_from_its_line() {
        let path = PathBuf::from(OsString::from_vec(b"/srv/m\xe4il/a b%\n/x=y".to_vec()));
        let fence = Fence {
            mirror: Some("mail".into()),
            paths: vec![path.clone(), "/srv".into()],
            timeout: Duration::from_millis(1500),
            wait: true,
        };
        let one = Fence { paths: vec![path.clone()], ..Fence::default() };
        let all = [
            Request::Ping,
            Request::Status,
            Request::Reload,
            Request::Stop,
            Request::Promote(Switch { mirror: None, force: false }),
            Request::Demote(Switch { mirror: Some("ma il".into()), force: true }),
            Request::Switchover(Switch { mirror: Some("mail".into()), force: false }),
            Request::Rescue(Rescued { entry: "mail/1-drift/anna/a b".into(), redeliver: true }),
            Request::Rescue(Rescued { entry: "mail/1-drift/anna/a%b".into(), redeliver: false }),
            Request::Resync(Resync { mirror: None, apply: false, winner: None, rescue: false }),
            Request::Resync(Resync { mirror: Some("mail".into()), apply: true, winner: Some("beta".into()), rescue: true }),
            Request::Verify(Verify::default()),
            Request::Verify(Verify { mirror: Some("ma il".into()), repair: true, rate: Some(1 << 20), anew: true }),
            Request::VerifyStop { mirror: None },
            Request::VerifyStop { mirror: Some("mail".into()) },
            Request::Fence(Fence::default()),
            Request::Fence(fence),
            Request::TxnBegin { path, timeout: Duration::from_secs(7) },
            Request::TxnCommit { txn: Some(7), fence: Fence::default(), nowait: true },
            Request::TxnCommit { txn: None, fence: one, nowait: false },
        ];
        for request in all {
            let line = request.to_line();
            assert!(line.bytes().all(|b| (b' '..=b'~').contains(&b)), "{line}");
            assert_eq!(Request::parse(line.as_bytes()), Ok(request), "{line}");
        }
    }

    #[test]
    fn what_is_wrong_is_said() {
        let refused = |line: &str| match Request::parse(line.as_bytes()) {
            Err(Response::Error { code, message }) => format!("{code}: {message}"),
            other => panic!("{line}: {other:?}"),
        };
        for (line, said) in [
            ("FENCE path=srv", "bad-arguments: FENCE: a path is absolute"),
            ("FENCE path=/a%zz", "bad-arguments: FENCE: words are key=value, percent-encoded"),
            ("FENCE path=/a%+1", "bad-arguments: FENCE: words are key=value, percent-encoded"),
            ("FENCE path=/a%2", "bad-arguments: FENCE: words are key=value, percent-encoded"),
            ("FENCE timeout=5", "bad-arguments: FENCE: `5` is no duration: write numbers with ms, s, m, h or d, as in `90s` or `1h30m`"),
            ("FENCE timeout=2d", "bad-arguments: FENCE: timeout is at most 1h"),
            ("FENCE unprotected=maybe", "bad-arguments: FENCE: unprotected is one of fail, wait"),
            ("FENCE mirror=a mirror=b", "bad-arguments: FENCE: mirror is given twice"),
            ("FENCE colour=red", "bad-arguments: FENCE: `colour` is not known"),
            ("RESYNC", "bad-arguments: RESYNC is followed by PLAN or APPLY"),
            ("RESYNC PLAN policy=merry", "bad-arguments: RESYNC: policy is one of merge, rescue"),
            ("VERIFY", "bad-arguments: VERIFY is followed by RUN or STOP"),
            ("VERIFY RUN rate=fast", "bad-arguments: VERIFY: rate is a number of bytes"),
            ("TXN", "bad-arguments: TXN is followed by BEGIN or COMMIT"),
            ("TXN BEGIN", "bad-arguments: TXN BEGIN: path=PATH is missing"),
            ("TXN COMMIT txn=-1", "bad-arguments: TXN COMMIT: txn is a number"),
            ("TXN COMMIT", "bad-arguments: TXN COMMIT: name the transaction by txn=NUMBER, by one path=PATH of its group, or both"),
        ] {
            assert_eq!(refused(line), said, "{line}");
        }
        assert_eq!(plain(Path::new("/a/./b//../c")), PathBuf::from("/a/c"));
    }
}
