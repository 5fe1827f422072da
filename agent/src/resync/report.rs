//! A resync in words: what came back, what was kept, what needs a person.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use twinbox_protocol::rejoin::{Changes, Differs};
use twinbox_resync::reconcile::{Item, Outcome, What};

use super::work::Shown;
use crate::status::rfc3339;

/// Lines shown of each kind in a plan; the report of what was done has all.
const FIRST: usize = 5;

/// Where a report of now goes.
pub(super) fn path(mirror_dir: &Path) -> PathBuf {
    let now = rfc3339(SystemTime::now()).replace(':', "-");
    mirror_dir.join("reports").join(format!("resync-{now}.txt"))
}

fn named(what: What) -> &'static str {
    match what {
        What::Message => "messages that came",
        What::Flags => "messages with other flags",
        What::Deletion => "messages that were deleted",
        What::Move => "messages that were moved",
        What::Folder => "folders that were made",
        What::FolderMove => "folders that were renamed",
        What::FolderDeletion => "folders that were deleted",
        What::File => "other files",
    }
}

const ALL: [What; 8] =
    [What::Message, What::Flags, What::Deletion, What::Move, What::Folder, What::FolderMove, What::FolderDeletion, What::File];

/// What becomes of an item, in a few words.
fn becomes(outcome: &Outcome, winner: &str, done: bool) -> String {
    match outcome {
        Outcome::Merge if done => format!("merged into `{winner}`"),
        Outcome::Merge => format!("to be merged into `{winner}`"),
        Outcome::Already => format!("so on `{winner}` already"),
        Outcome::Stays { .. } => format!("as on `{winner}`"),
        Outcome::Rescue { .. } if done => "kept in rescue".into(),
        Outcome::Rescue { .. } => "to be kept in rescue".into(),
    }
}

fn line(item: &Item, winner: &str, done: bool) -> String {
    let from = item.from.as_ref().map_or(String::new(), |from| format!(" (was {from})"));
    let why = match &item.outcome {
        Outcome::Stays { why } | Outcome::Rescue { why } => format!(": {why}"),
        _ => String::new(),
    };
    format!("{}{from}: {}{why}", item.path, becomes(&item.outcome, winner, done))
}

/// The whole of it.
pub(super) fn text(shown: &Shown, all: &[Item], changes: &Changes) -> String {
    let Shown { mirror, node, winner, .. } = shown;
    let mut out = format!(
        "Mirror `{mirror}`: node `{node}` comes back, and `{winner}` stays as it is. Both were the same up to LSN {}.\n\nOn `{winner}` since then: {} new, {} changed, {} gone paths; this node takes them over.\n",
        shown.fork, shown.theirs[0], shown.theirs[1], shown.theirs[2]
    );
    for (kind, path) in changes.first.iter().take(FIRST) {
        let kind = match kind {
            Differs::New => "new",
            Differs::Changed => "changed",
            Differs::Gone => "gone",
        };
        let _ = writeln!(out, "    {kind}: {path}");
    }
    let _ = writeln!(out, "\nOn `{node}` alone: {} things.", all.len());
    for what in ALL {
        let items: Vec<&Item> = all.iter().filter(|item| item.what == what).collect();
        if items.is_empty() {
            continue;
        }
        let mut by: Vec<(String, usize)> = vec![];
        for item in &items {
            let becomes = becomes(&item.outcome, winner, shown.done);
            match by.iter_mut().find(|(text, _)| *text == becomes) {
                Some((_, count)) => *count += 1,
                None => by.push((becomes, 1)),
            }
        }
        let sums: Vec<String> = by.iter().map(|(text, count)| format!("{count} {text}")).collect();
        let _ = writeln!(out, "\n  {} {}: {}", items.len(), named(what), sums.join(", "));
        let most = if shown.done { items.len() } else { FIRST };
        for item in items.iter().take(most) {
            let _ = writeln!(out, "    {}", line(item, winner, shown.done));
        }
        if items.len() > most {
            let _ = writeln!(out, "    … and {} more (--json has all)", items.len() - most);
        }
    }
    if shown.own_files > 0 {
        let _ = writeln!(out, "\n  {} indexes and lists of the mail server differ: those of `{winner}` are used.", shown.own_files);
    }
    if shown.unplanned > 0 {
        let _ = writeln!(
            out,
            "\n  {} files were changed here while this ran: they are kept in rescue. Is the mail server stopped?",
            shown.unplanned
        );
    }
    let persons = all.iter().filter(|item| matches!(item.outcome, Outcome::Rescue { .. })).count();
    let _ = match (persons, shown.done) {
        (0, _) => writeln!(out, "\nNothing needs a person."),
        (n, true) => writeln!(out, "\n{n} of them need a person: look at them in rescue, and give back what is wanted."),
        (n, false) => writeln!(out, "\n{n} of them will need a person: `twinbox resync apply` keeps them in rescue."),
    };
    if let Some(rescue) = &shown.rescue {
        let _ = writeln!(out, "{} files were moved to {}.", shown.rescued, rescue.display());
    }
    out
}
