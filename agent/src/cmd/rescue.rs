//! `twinbox rescue`: what was kept of content that gave way, and how it is given back. Listing, showing and purging read the state directory; giving back is the running agent's.
//!
//! An entry is named `MIRROR/TOP/PATH`, as `list` prints it: `TOP` is the directory of one occasion, `SECONDS-WHY`.

use std::ffi::OsStr;
use std::fs;
use std::io::{IsTerminal, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;

use crate::admin::{self, AdminError, Request, Rescued};
use crate::cli::{RescueArgs, RescueCommand, RescueWhich};
use crate::config::Config;
use crate::exit::ExitCode;
use crate::failure::Failure;
use crate::roles::mirror_dir;
use crate::status::{bytes_text, rfc3339};

/// The other node may be slow, a file large.
const TIMEOUT: Duration = Duration::from_secs(600);
/// What is shown of a file on a terminal.
const SHOWN: u64 = 8 * 1024;

/// One file that is kept. An interface: fields are only added.
#[derive(Debug, Clone, Serialize)]
struct Kept {
    /// As it is named to `show`, `restore` and `redeliver`.
    entry: String,
    mirror: String,
    /// Where it was in the store.
    path: String,
    /// `drift`, `adopt`, `heal`, `resync` or `verify`.
    why: String,
    /// RFC 3339, UTC.
    kept_at: String,
    size: u64,
    #[serde(skip)]
    file: PathBuf,
    #[serde(skip)]
    at: u64,
}

/// Runs the command.
///
/// # Errors
/// [`Failure`].
pub async fn run(args: &RescueArgs, quiet: bool) -> Result<ExitCode, Failure> {
    match &args.command {
        RescueCommand::List(which) => list(which),
        RescueCommand::Show(what) => show(&Config::load(&what.file.config)?, &what.entry, what.raw),
        RescueCommand::Purge(what) => purge(what, quiet),
        RescueCommand::Restore(what) => match &what.to {
            Some(to) => copy_out(&Config::load(&what.file.config)?, &what.entries, to, quiet),
            None => give_back(&what.file.config, what.entries.clone(), false, quiet).await,
        },
        RescueCommand::Redeliver(what) => {
            let config = Config::load(&what.file.config)?;
            let entries = if what.all {
                let mirror = what.mirror.as_ref().map(crate::names::MirrorName::as_str);
                let messages = all(&config, mirror)?.into_iter().filter(|kept| crate::resync::is_message(kept.path.as_bytes()));
                messages.map(|kept| kept.entry).collect()
            } else {
                what.entries.clone()
            };
            give_back(&what.file.config, entries, true, quiet).await
        }
    }
}

/// Everything that is kept, oldest first.
fn all(config: &Config, mirror: Option<&str>) -> Result<Vec<Kept>, Failure> {
    let mut found = vec![];
    for one in config.mirrors.iter().map(|one| one.name.as_str()).filter(|name| mirror.is_none_or(|mirror| mirror == *name)) {
        let base = mirror_dir(&config.state, one).join("rescue");
        let tops = match fs::read_dir(&base) {
            Ok(tops) => tops,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(Failure::io(&base.display().to_string(), &error)),
        };
        for top in tops.flatten() {
            let name = top.file_name().to_string_lossy().into_owned();
            let Some((at, why)) = name.split_once('-').and_then(|(at, why)| Some((at.parse::<u64>().ok()?, why))) else { continue };
            let why = why.split('.').next().unwrap_or_default().to_owned();
            let mut stack = vec![top.path()];
            while let Some(dir) = stack.pop() {
                for item in fs::read_dir(&dir).map_err(|error| Failure::io(&dir.display().to_string(), &error))?.flatten() {
                    let Ok(meta) = item.metadata() else { continue };
                    if meta.is_dir() {
                        stack.push(item.path());
                        continue;
                    }
                    let file = item.path();
                    let relative = file.strip_prefix(top.path()).unwrap_or(&file).to_string_lossy().into_owned();
                    found.push(Kept {
                        entry: format!("{one}/{name}/{relative}"),
                        mirror: one.to_owned(),
                        path: relative,
                        why: why.clone(),
                        kept_at: rfc3339(UNIX_EPOCH + Duration::from_secs(at)),
                        size: meta.len(),
                        file,
                        at,
                    });
                }
            }
        }
    }
    found.sort_by(|a, b| (a.at, &a.entry).cmp(&(b.at, &b.entry)));
    Ok(found)
}

fn list(which: &RescueWhich) -> Result<ExitCode, Failure> {
    let config = Config::load(&which.file.config)?;
    let kept = all(&config, which.mirror.as_ref().map(crate::names::MirrorName::as_str))?;
    if which.json {
        println!("{}", serde_json::json!({ "schema": 1, "kept": kept }));
        return Ok(ExitCode::Ok);
    }
    let mut out = std::io::stdout().lock();
    for one in &kept {
        if writeln!(out, "{}  {:>9}  {}", one.kept_at, bytes_text(one.size), one.entry).is_err() {
            return Ok(ExitCode::Ok); // A closed pipe.
        }
    }
    let sum: u64 = kept.iter().map(|one| one.size).sum();
    let _ = match kept.len() {
        0 => writeln!(out, "Nothing is kept."),
        n => writeln!(out, "{n} files, {}. `twinbox rescue show ENTRY` shows one.", bytes_text(sum)),
    };
    Ok(ExitCode::Ok)
}

/// The file an entry names; nothing outside of rescue is ever meant.
pub(super) fn file_of(state: &Path, mirrors: &[String], entry: &str) -> Result<(String, PathBuf, Vec<u8>), String> {
    let mut parts = entry.splitn(3, '/');
    let (mirror, top, path) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let plain = |text: &str| !text.is_empty() && Path::new(text).components().all(|part| matches!(part, Component::Normal(_)));
    if !mirrors.iter().any(|name| name == mirror) || !plain(top) || !plain(path) {
        return Err(format!("`{entry}` is no entry: `twinbox rescue list` prints them, as MIRROR/OCCASION/PATH"));
    }
    let file = mirror_dir(state, mirror).join("rescue").join(top).join(OsStr::from_bytes(path.as_bytes()));
    match fs::symlink_metadata(&file) {
        Ok(meta) if meta.is_file() => Ok((mirror.to_owned(), file, path.as_bytes().to_vec())),
        Ok(_) => Err(format!("`{entry}` is no regular file: look at it in {}", file.display())),
        Err(error) => Err(format!("`{entry}`: {error}")),
    }
}

fn named(config: &Config, entry: &str) -> Result<(PathBuf, Vec<u8>), Failure> {
    let mirrors: Vec<String> = config.mirrors.iter().map(|mirror| mirror.name.as_str().to_owned()).collect();
    let (_, file, path) = file_of(&config.state, &mirrors, entry).map_err(|why| Failure::new(ExitCode::Usage, why))?;
    Ok((file, path))
}

fn show(config: &Config, entry: &str, raw: bool) -> Result<ExitCode, Failure> {
    let (file, _) = named(config, entry)?;
    let failed = |error: std::io::Error| Failure::io(&file.display().to_string(), &error);
    let (mut from, mut out) = (fs::File::open(&file).map_err(failed)?, std::io::stdout().lock());
    if raw || !out.is_terminal() {
        std::io::copy(&mut from, &mut out).map_err(failed)?;
        return Ok(ExitCode::Ok);
    }
    let size = from.metadata().map_err(failed)?.len();
    let mut bytes = vec![];
    from.take(SHOWN).read_to_end(&mut bytes).map_err(failed)?;
    // It may hold anything: nothing of it reaches the terminal but text.
    let text: String = String::from_utf8_lossy(&bytes).chars().filter(|c| *c == '\n' || *c == '\t' || !c.is_control()).collect();
    let more = if size > SHOWN { format!("\n… {} in all; --raw prints every byte.\n", bytes_text(size)) } else { String::new() };
    let _ = write!(out, "{}\n\n{text}{more}", file.display());
    Ok(ExitCode::Ok)
}

fn copy_out(config: &Config, entries: &[String], to: &Path, quiet: bool) -> Result<ExitCode, Failure> {
    for entry in entries {
        let (file, path) = named(config, entry)?;
        let target = if to.is_dir() { to.join(Path::new(OsStr::from_bytes(&path)).file_name().unwrap_or_default()) } else { to.to_owned() };
        let failed = |error: std::io::Error| Failure::io(&target.display().to_string(), &error);
        let mut out = fs::File::options().write(true).create_new(true).open(&target).map_err(failed)?;
        std::io::copy(&mut fs::File::open(&file).map_err(failed)?, &mut out).map_err(failed)?;
        out.sync_all().map_err(failed)?;
        if !quiet {
            println!("{entry} → {}", target.display());
        }
    }
    Ok(ExitCode::Ok)
}

async fn give_back(config: &Path, entries: Vec<String>, redeliver: bool, quiet: bool) -> Result<ExitCode, Failure> {
    let config = Config::load(config)?;
    let (mut left, total) = (0, entries.len());
    for entry in entries {
        named(&config, &entry)?;
        let request = Request::Rescue(Rescued { entry: entry.clone(), redeliver });
        match admin::request(&config.state, request, TIMEOUT).await {
            Ok(answer) => {
                let kept = answer["outcome"] == "kept";
                left += usize::from(kept);
                if !quiet || kept {
                    println!("{entry}: {}", answer["said"].as_str().unwrap_or("done"));
                }
            }
            Err(AdminError::Refused { code, message }) => {
                let exit = if code == "peer" { ExitCode::Peer } else { ExitCode::Refused };
                return Err(Failure::new(exit, message));
            }
            Err(error) => return Err(error.into()),
        }
    }
    if left > 0 {
        return Err(Failure::new(ExitCode::Refused, format!("{left} of {total} stay in rescue only; the reason stands with each")));
    }
    if total == 0 && !quiet {
        println!("There is nothing to give back.");
    }
    Ok(ExitCode::Ok)
}

fn purge(what: &crate::cli::RescuePurge, quiet: bool) -> Result<ExitCode, Failure> {
    let config = Config::load(&what.file.config)?;
    let before = SystemTime::now().checked_sub(what.older_than).unwrap_or(UNIX_EPOCH);
    let before = before.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let (mut files, mut bytes) = (0u64, 0u64);
    for one in all(&config, what.mirror.as_ref().map(crate::names::MirrorName::as_str))?.iter().filter(|one| one.at <= before) {
        fs::remove_file(&one.file).map_err(|error| Failure::io(&one.file.display().to_string(), &error))?;
        (files, bytes) = (files + 1, bytes + one.size);
        // Directories that are empty now.
        let base = mirror_dir(&config.state, &one.mirror).join("rescue");
        let mut dir = one.file.parent();
        while let Some(empty) = dir.filter(|dir| **dir != base && dir.starts_with(&base)) {
            if fs::remove_dir(empty).is_err() {
                break;
            }
            dir = empty.parent();
        }
    }
    if !quiet {
        println!("{files} files removed, {}.", bytes_text(bytes));
    }
    Ok(ExitCode::Ok)
}
