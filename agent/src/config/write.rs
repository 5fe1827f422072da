//! Writing the configuration: a commented new file, and one peer added to an existing file without touching anything else.
//!
//! Invariant: an edit is accepted only if the edited text parses to exactly the old configuration plus the peer. Text written
//! in a way this cannot edit (inline tables spread over lines, …) is refused with the block to paste, never guessed at.

use std::fmt::Write;
use std::fs;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use toml::de::{DeTable, DeValue};

use super::{Config, ConfigError, LIMITS, Limits, Mirror, Peer, Verify};
use crate::atomic;
use crate::duration::duration_text;
use crate::hooks::{Hook, Hooks};

/// Mode of a new configuration file: it holds no secrets, but its paths are nobody else's business.
const FILE_MODE: u32 = 0o640;

impl Config {
    /// The configuration as a commented file. Parsing it gives the same [`Config`].
    #[must_use]
    pub fn to_toml(&self) -> String {
        let mut text = String::new();
        self.write(&mut text).unwrap_or_else(|_| unreachable!("writing to a String does not fail"));
        text
    }

    /// Writes the commented file to `path`, which must not exist yet.
    pub fn create_file(&self, path: &Path) -> Result<(), ConfigError> {
        let paths = self.mirrors.iter().map(|mirror| &mirror.root).chain([&self.state]);
        if let Some(path) = paths.into_iter().find(|path| path.to_str().is_none()) {
            return Err(ConfigError::PathNotUtf8 { path: path.clone() });
        }
        let text = self.to_toml();
        Config::parse(&text)?;
        atomic::create(path, text.as_bytes(), FILE_MODE).map_err(|source| match source.kind() {
            io::ErrorKind::AlreadyExists => ConfigError::Exists { path: path.to_owned() },
            _ => ConfigError::Unwritable { path: path.to_owned(), source },
        })
    }

    fn write(&self, out: &mut String) -> std::fmt::Result {
        writeln!(out, "# Twinbox configuration; the same shape on every node. Check it with `twinbox status --config FILE`,")?;
        writeln!(out, "# apply changes with `twinbox reload --config FILE`. Commented lines show the defaults.\n")?;
        writeln!(out, "# This node's name: 1 to 64 of a-z A-Z 0-9 . _ -, unique among the nodes that know each other.")?;
        writeln!(out, "node = {}\n", quoted(self.node.as_str()))?;
        writeln!(out, "# Key, database and redo log live here: absolute, outside every root, on a disk that survives a power cut.")?;
        writeln!(out, "state = {}\n", quoted(&self.state.to_string_lossy()))?;
        writeln!(out, "# UDP address to listen on, or a list of them.")?;
        match self.listen.as_slice() {
            [one] => writeln!(out, "listen = {}\n", quoted(&one.to_string()))?,
            many => writeln!(out, "listen = {}\n", list(many))?,
        }
        writeln!(out, "[limits]")?;
        let defaults = Limits::default();
        for spec in &LIMITS {
            let (mut own, mut default) = (self.limits, defaults);
            let (value, default) = (*(spec.field)(&mut own), *(spec.field)(&mut default));
            let comment = if value == default { "# " } else { "" };
            writeln!(out, "# {}\n{comment}{} = {value}", spec.doc, spec.key)?;
        }
        writeln!(out, "\n[log]\n# error, warn, info, debug or trace")?;
        writeln!(out, "level = {}", quoted(self.log.level.as_str()))?;
        writeln!(out, "# text or json\nformat = {}", quoted(self.log.format.as_str()))?;
        writeln!(out, "\n# A socket for programs of a group (a mail server) that wait for fences: docs/admin-protocol.md.")?;
        match &self.fence {
            None => writeln!(out, "# [fence]\n# socket = \"/run/twinbox/fence.sock\"\n# group = \"vmail\"")?,
            Some(fence) => {
                writeln!(out, "[fence]\nsocket = {}", quoted(&fence.socket.to_string_lossy()))?;
                if let Some(group) = &fence.group {
                    writeln!(out, "group = {}", quoted(group))?;
                }
            }
        }
        writeln!(out, "\n# Programs run when roles or protection change: README, \"Hooks\"; examples/hooks has some to begin with.")?;
        if self.hooks == Hooks::default() {
            writeln!(out, "# [hooks]")?;
            for hook in Hook::ALL {
                writeln!(out, "# {} = \"/etc/twinbox/hooks/{}\"", hook.as_str(), hook.as_str().replace('_', "-"))?;
            }
            writeln!(out, "# timeout = {}", quoted(&duration_text(self.hooks.timeout)))?;
        } else {
            writeln!(out, "[hooks]")?;
            for (hook, program) in &self.hooks.programs {
                writeln!(out, "{} = {}", hook.as_str(), quoted(&program.to_string_lossy()))?;
            }
            writeln!(out, "timeout = {}", quoted(&duration_text(self.hooks.timeout)))?;
        }
        writeln!(
            out,
            "\n# How often this disk is read in full and compared with what it should hold (`twinbox verify`); without interval: never."
        )?;
        let commented = if self.verify == Verify::default() { "# " } else { "" };
        let never = if self.verify.interval.is_none() { "# " } else { "" };
        let interval = self.verify.interval.unwrap_or(Duration::from_secs(30 * 24 * 3600));
        writeln!(out, "{commented}[verify]\n{never}interval = {}", quoted(&duration_text(interval)))?;
        writeln!(out, "# Put right what differs; what was there is kept in rescue.\n{commented}repair = {}", self.verify.repair)?;
        writeln!(out, "# MiB read a second\n{commented}rate_mib = {}", self.verify.rate >> 20)?;
        for mirror in &self.mirrors {
            write_mirror(out, mirror)?;
        }
        if self.peers.is_empty() {
            writeln!(out, "\n# `twinbox pair` adds a [[peer]] table here: node, addresses, fingerprint.")?;
        }
        for peer in &self.peers {
            write!(out, "\n{}", peer_block(peer))?;
        }
        Ok(())
    }
}

fn write_mirror(out: &mut String, mirror: &Mirror) -> std::fmt::Result {
    writeln!(out, "\n[[mirror]]\n# The same name on every node.")?;
    writeln!(out, "name = {}", quoted(mirror.name.as_str()))?;
    writeln!(out, "# The tree on this node.\nroot = {}", quoted(&mirror.root.to_string_lossy()))?;
    writeln!(out, "# maildir, sdbox, mdbox, mbox or plain: decides what is scratch and never mirrored.")?;
    writeln!(out, "layout = {}", quoted(mirror.layout.as_str()))?;
    writeln!(out, "# primary or standby: the role to begin with; a promotion is remembered in the state directory.")?;
    writeln!(out, "role = {}", quoted(mirror.role.as_str()))?;
    writeln!(out, "# What moves as one; empty: each top-level directory. [\"*/*\"] for domain/user, [\"*\"] for a spool of files.")?;
    match mirror.groups.as_slice() {
        [] => writeln!(out, "# groups = []")?,
        globs => writeln!(out, "groups = {}", list(globs))?,
    }
    writeln!(out, "# Left out besides the layout's scratch: \"*.bak\" anywhere, \"a/b\" from the root, \"x/\" directories only.")?;
    match mirror.exclude.as_slice() {
        [] => writeln!(out, "# exclude = []")?,
        globs => writeln!(out, "exclude = {}", list(globs))?,
    }
    writeln!(out, "# How often everything is compared with the disk (names and times, not content).")?;
    writeln!(out, "sweep_interval = {}", quoted(&duration_text(mirror.sweep_interval)))?;
    writeln!(
        out,
        "# A group that never rests is sent after this time as it is read, not at one point in time (counted in status). Without: it waits."
    )?;
    match mirror.fuzzy_after {
        None => writeln!(out, "# fuzzy_after = \"1m\""),
        Some(time) => writeln!(out, "fuzzy_after = {}", quoted(&duration_text(time))),
    }
}

/// Adds `peer` to the file at `path`, or updates the peer of that name; atomically, keeping mode, owner and comments.
pub fn upsert_peer_file(path: &Path, peer: &Peer) -> Result<(), ConfigError> {
    let unreadable = |source| ConfigError::Unreadable { path: path.to_owned(), source };
    let text = fs::read_to_string(path).map_err(unreadable)?;
    let edited = upsert_peer(&text, peer)?;
    if edited == text {
        return Ok(());
    }
    atomic::replace(path, edited.as_bytes()).map_err(|source| ConfigError::Unwritable { path: path.to_owned(), source })
}

/// `text` with `peer` added, or with the addresses and fingerprint of the peer of that name replaced.
pub fn upsert_peer(text: &str, peer: &Peer) -> Result<String, ConfigError> {
    let mut wanted = Config::parse(text)?;
    match wanted.peers.iter_mut().find(|known| known.node == peer.node) {
        Some(known) => *known = peer.clone(),
        None => wanted.peers.push(peer.clone()),
    }
    // A fingerprint of `None` cannot remove a line, but then there is nothing to pin either: such an edit fails the check.
    candidates(text, peer)
        .into_iter()
        .find(|edited| Config::parse(edited).is_ok_and(|config| config == wanted))
        .ok_or_else(|| ConfigError::CannotEdit { block: peer_block(peer) })
}

/// Edits that may be right, most natural first.
fn candidates(text: &str, peer: &Peer) -> Vec<String> {
    let Some(places) = places_of(text, peer) else {
        let gap = if text.ends_with('\n') || text.is_empty() { "" } else { "\n" };
        return vec![format!("{text}{gap}\n{}", peer_block(peer))];
    };
    let values = [
        ("addresses", Some(list(&peer.addresses)), places.addresses),
        ("fingerprint", peer.fingerprint.as_deref().map(quoted), places.fingerprint),
    ];
    let line_end = text[places.node.end..].find('\n').map_or(text.len(), |at| places.node.end + at);
    // Missing keys go on lines of their own after `node = …`, or into the same inline table.
    let styles = [(line_end, "\n", ""), (places.node.end, ", ", "")];
    let edit = |(at, before, after): (usize, &str, &str)| {
        let mut edits: Vec<(Range<usize>, String)> = Vec::new();
        let mut added = String::new();
        for (key, value, place) in &values {
            match (value, place) {
                (Some(value), Some(place)) => edits.push((place.clone(), value.clone())),
                (Some(value), None) => added.push_str(&format!("{before}{key} = {value}{after}")),
                (None, _) => {}
            }
        }
        edits.push((at..at, added));
        // From the back, so that earlier places stay valid.
        edits.sort_by_key(|(place, _)| std::cmp::Reverse(place.start));
        let mut edited = text.to_owned();
        for (place, value) in edits {
            edited.replace_range(place, &value);
        }
        edited
    };
    styles.into_iter().map(edit).collect()
}

/// Where the values of an existing `[[peer]]` stand.
struct Places {
    node: Range<usize>,
    addresses: Option<Range<usize>>,
    fingerprint: Option<Range<usize>>,
}

fn places_of(text: &str, peer: &Peer) -> Option<Places> {
    let document = DeTable::parse(text).ok()?;
    let peers = document.get_ref().get("peer")?.get_ref().as_array()?;
    peers.iter().find_map(|table| {
        let DeValue::Table(table) = table.get_ref() else {
            return None;
        };
        let node = table.get("node")?;
        (node.get_ref().as_str() == Some(peer.node.as_str())).then(|| Places {
            node: node.span(),
            addresses: table.get("addresses").map(|value| value.span()),
            fingerprint: table.get("fingerprint").map(|value| value.span()),
        })
    })
}

fn peer_block(peer: &Peer) -> String {
    let mut block = format!("[[peer]]\nnode = {}\naddresses = {}\n", quoted(peer.node.as_str()), list(&peer.addresses));
    if let Some(fingerprint) = &peer.fingerprint {
        block.push_str(&format!("fingerprint = {}\n", quoted(fingerprint)));
    }
    block
}

fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

fn list<T: ToString>(items: &[T]) -> String {
    let items: Vec<String> = items.iter().map(|item| quoted(&item.to_string())).collect();
    format!("[{}]", items.join(", "))
}
