//! Text to [`Config`]: the known keys of each table, and how each becomes a value.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use toml::de::DeTable;

use super::problem::{Located, ProblemKind, line_column};
use super::reader::{Reader, Span};
use super::{
    Config, DEFAULT_PORT, DEFAULT_SWEEP, FenceSocket, LIMITS, Limits, Log, LogFormat, LogLevel, Mirror, Peer, Role, TABLES_MAX, Verify,
    paths,
};
use crate::duration::{duration_text, parse_duration};
use crate::glob::Glob;
use crate::hooks::{Hook, Hooks};

const TOP_KEYS: [&str; 10] = ["node", "state", "listen", "limits", "log", "fence", "hooks", "verify", "mirror", "peer"];
const VERIFY_KEYS: [&str; 3] = ["interval", "repair", "rate_mib"];
const FENCE_KEYS: [&str; 2] = ["socket", "group"];
const MIRROR_KEYS: [&str; 8] = ["name", "root", "layout", "role", "groups", "exclude", "sweep_interval", "fuzzy_after"];
const PEER_KEYS: [&str; 3] = ["node", "addresses", "fingerprint"];
const LOG_KEYS: [&str; 2] = ["level", "format"];

const SWEEP_MIN: Duration = Duration::from_secs(1);
const SWEEP_MAX: Duration = Duration::from_secs(30 * 24 * 3600);

/// Where the paths of a configuration stand in its text.
#[derive(Debug, Clone)]
pub(super) struct Spans {
    pub(super) state: Span,
    pub(super) roots: Vec<Span>,
}

/// Reads `text`; all problems are found before any is returned.
pub(super) fn parse(text: &str) -> Result<(Config, Spans), Vec<Located>> {
    let document = DeTable::parse(text).map_err(|error| {
        let message = error.message().lines().collect::<Vec<_>>().join(", ");
        vec![Located { span: error.span().unwrap_or(0..0), kind: ProblemKind::Syntax { message } }]
    })?;
    let mut problems = Vec::new();
    let parsed = top(document.get_ref(), text, &mut problems);
    match parsed {
        Some((config, spans)) if problems.is_empty() => {
            let overlaps = paths::overlaps(&config, &spans, |path| path.to_owned());
            if overlaps.is_empty() { Ok((config, spans)) } else { Err(overlaps) }
        }
        _ => Err(problems),
    }
}

fn top(document: &DeTable<'_>, text: &str, problems: &mut Vec<Located>) -> Option<(Config, Spans)> {
    let mut reader = Reader::open(document, "the top level", 0..0, &TOP_KEYS, problems);
    reader.require("node", ": this node's name");
    reader.require("state", ": the state directory, as in `state = \"/var/lib/twinbox\"`");
    reader.require("mirror", ": write at least one [[mirror]] table");

    let node = reader.parsed("node", |name| name.parse());
    let state = reader.parsed("state", |path| absolute("state", path));
    let state_span = reader.value("state").map_or(0..0, |value| value.span());
    let listen = listen(&mut reader);

    let mut limits = Limits::default();
    if let Some((table, span)) = reader.table("limits") {
        let mut section = Reader::open(table, "[limits]", span, &LIMITS.map(|spec| spec.key), reader.problems());
        for spec in &LIMITS {
            if let Some(number) = section.number(spec.key, spec.min, spec.max) {
                *(spec.field)(&mut limits) = number;
            }
        }
    }
    let mut log = Log::default();
    if let Some((table, span)) = reader.table("log") {
        let mut section = Reader::open(table, "[log]", span, &LOG_KEYS, reader.problems());
        log.level = section.word("level", LogLevel::WORDS, LogLevel::from_word).unwrap_or_default();
        log.format = section.word("format", LogFormat::WORDS, LogFormat::from_word).unwrap_or_default();
    }

    let mut fence = None;
    if let Some((table, span)) = reader.table("fence") {
        let mut section = Reader::open(table, "[fence]", span, &FENCE_KEYS, reader.problems());
        section.require("socket", ": as in `socket = \"/run/twinbox/fence.sock\"`");
        let group = match section.value("group") {
            Some(_) => Some(section.parsed("group", group)?),
            None => None,
        };
        fence = Some(FenceSocket { socket: section.parsed("socket", |path| absolute("socket", path))?, group });
    }

    let mut hooks = Hooks::default();
    if let Some((table, span)) = reader.table("hooks") {
        let keys: Vec<&'static str> = Hook::ALL.iter().map(|hook| hook.as_str()).chain(["timeout"]).collect();
        let mut section = Reader::open(table, "[hooks]", span, &keys, reader.problems());
        for hook in Hook::ALL {
            if section.value(hook.as_str()).is_some() {
                hooks.programs.insert(hook, section.parsed(hook.as_str(), |path| absolute(hook.as_str(), path))?);
            }
        }
        if section.value("timeout").is_some() {
            hooks.timeout = section.parsed("timeout", |text| interval("timeout", text))?;
        }
    }

    let mut verify = Verify::default();
    if let Some((table, span)) = reader.table("verify") {
        let mut section = Reader::open(table, "[verify]", span, &VERIFY_KEYS, reader.problems());
        if section.value("interval").is_some() {
            verify.interval = Some(section.parsed("interval", |text| interval("interval", text))?);
        }
        verify.repair = section.boolean("repair").unwrap_or_default();
        if let Some(mib) = section.number("rate_mib", 1, 1 << 20) {
            verify.rate = mib << 20;
        }
    }

    let mut mirrors = Vec::new();
    let mut roots = Vec::new();
    let mut names = Names::new("mirror", text);
    for (table, span) in reader.tables("mirror", "[[mirror]]", TABLES_MAX) {
        let mut section = Reader::open(table, "[[mirror]]", span, &MIRROR_KEYS, reader.problems());
        names.check(&mut section, "name");
        roots.push(section.value("root").map_or(section.span(), |root| root.span()));
        mirrors.push(mirror(&mut section));
    }
    if mirrors.is_empty() && document.get("mirror").is_some_and(|value| value.get_ref().is_array()) {
        reader.report(0..0, ProblemKind::EmptyList { key: "mirror" });
    }
    let mut peers = Vec::new();
    let mut names = Names::new("peer", text);
    for (table, span) in reader.tables("peer", "[[peer]]", TABLES_MAX) {
        let mut section = Reader::open(table, "[[peer]]", span, &PEER_KEYS, reader.problems());
        names.check(&mut section, "node");
        let own = document.get("node").and_then(|value| value.get_ref().as_str());
        if let Some((name, span)) = section.string("node")
            && own == Some(name)
        {
            section.report(span, ProblemKind::PeerIsSelf { name: name.to_owned() });
        }
        peers.push(peer(&mut section));
    }

    let config = Config {
        node: node?,
        state: state?,
        listen: listen?,
        limits,
        log,
        fence,
        hooks,
        verify,
        mirrors: mirrors.into_iter().collect::<Option<_>>()?,
        peers: peers.into_iter().collect::<Option<_>>()?,
    };
    Some((config, Spans { state: state_span, roots }))
}

fn listen(reader: &mut Reader<'_, '_, '_>) -> Option<Vec<SocketAddr>> {
    let Some(value) = reader.value("listen") else {
        return Some(vec![SocketAddr::from(([0, 0, 0, 0], DEFAULT_PORT))]);
    };
    let addresses = reader.list("listen", address)?;
    if addresses.is_empty() {
        reader.report(value.span(), ProblemKind::EmptyList { key: "listen" });
        return None;
    }
    Some(addresses)
}

fn mirror(reader: &mut Reader<'_, '_, '_>) -> Option<Mirror> {
    reader.require("name", ": the same name on every node");
    reader.require("root", ": the directory to mirror");
    reader.require("layout", ": one of maildir, sdbox, mdbox, mbox, plain");
    reader.require("role", ": primary or standby");
    let name = reader.parsed("name", |name| name.parse());
    let root = reader.parsed("root", |path| absolute("root", path));
    let layout = reader.parsed("layout", |layout| layout.parse());
    let role = reader.word("role", Role::WORDS, Role::from_word);
    let groups = reader.list("groups", pattern);
    let exclude = reader.list("exclude", pattern);
    let sweep = match reader.value("sweep_interval") {
        Some(_) => reader.parsed("sweep_interval", |text| interval("sweep_interval", text)),
        None => Some(DEFAULT_SWEEP),
    };
    let fuzzy_after = match reader.value("fuzzy_after") {
        Some(_) => Some(reader.parsed("fuzzy_after", |text| interval("fuzzy_after", text))?),
        None => None,
    };
    Some(Mirror {
        name: name?,
        root: root?,
        layout: layout?,
        role: role?,
        groups: groups?,
        exclude: exclude?,
        sweep_interval: sweep?,
        fuzzy_after,
    })
}

fn peer(reader: &mut Reader<'_, '_, '_>) -> Option<Peer> {
    reader.require("node", ": the other node's name");
    let node = reader.parsed("node", |name| name.parse());
    let addresses = reader.list("addresses", |text| {
        address(text).and_then(|address| match address.port() {
            0 => Err(ProblemKind::Address { given: text.to_owned() }),
            _ => Ok(address),
        })
    });
    let fingerprint = match reader.value("fingerprint") {
        Some(_) => Some(reader.parsed("fingerprint", fingerprint)?),
        None => None,
    };
    Some(Peer { node: node?, addresses: addresses?, fingerprint })
}

/// Only its outer shape is checked here: one printable word. What it means is the transport's business.
fn fingerprint(text: &str) -> Result<String, ProblemKind> {
    const BYTES_MAX: usize = 200;
    let fits = (1..=BYTES_MAX).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic() && b != b'"' && b != b'\\');
    if fits { Ok(text.to_owned()) } else { Err(ProblemKind::Fingerprint) }
}

fn address(text: &str) -> Result<SocketAddr, ProblemKind> {
    text.parse().map_err(|_| ProblemKind::Address { given: text.chars().take(80).collect::<String>().escape_debug().to_string() })
}

/// A name as groupadd(8) takes it, or a number.
fn group(text: &str) -> Result<String, ProblemKind> {
    let fits = (1..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-$".contains(&b));
    if fits { Ok(text.to_owned()) } else { Err(ProblemKind::Group) }
}

fn pattern(text: &str) -> Result<Glob, ProblemKind> {
    text.parse()
        .map_err(|source| ProblemKind::Pattern { pattern: text.chars().take(80).collect::<String>().escape_debug().to_string(), source })
}

fn interval(key: &'static str, text: &str) -> Result<Duration, ProblemKind> {
    let interval = parse_duration(text).map_err(|source| ProblemKind::Duration { key, source })?;
    if (SWEEP_MIN..=SWEEP_MAX).contains(&interval) {
        return Ok(interval);
    }
    Err(ProblemKind::OutOfRange { key, given: duration_text(interval), min: duration_text(SWEEP_MIN), max: duration_text(SWEEP_MAX) })
}

/// An absolute path, without a trailing slash and without components that make comparing paths by name unsafe.
fn absolute(key: &'static str, text: &str) -> Result<PathBuf, ProblemKind> {
    let path = Path::new(text);
    let plain = path.is_absolute()
        && !text.contains('\0')
        && path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    if !plain {
        return Err(ProblemKind::RelativePath { key, given: path.to_owned() });
    }
    Ok(path.components().collect())
}

/// Notices names used twice, and where the first use was.
struct Names<'t> {
    what: &'static str,
    text: &'t str,
    seen: BTreeMap<String, usize>,
}

impl<'t> Names<'t> {
    fn new(what: &'static str, text: &'t str) -> Self {
        Names { what, text, seen: BTreeMap::new() }
    }

    fn check(&mut self, section: &mut Reader<'_, '_, '_>, key: &'static str) {
        // A value that is no string is reported when it is read.
        let Some(value) = section.value(key) else { return };
        let Some(name) = value.get_ref().as_str() else { return };
        match self.seen.get(name) {
            Some(&first_line) => {
                let kind = ProblemKind::Duplicate { what: self.what, name: name.chars().take(64).collect(), first_line };
                section.report(value.span(), kind);
            }
            None => {
                self.seen.insert(name.to_owned(), line_column(self.text, value.span().start).0);
            }
        }
    }
}
