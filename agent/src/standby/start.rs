//! Starting: which state is here, whether it belongs to this directory, and what must be done before anything is accepted.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

use twinbox_protocol::ids::Lsn;
use twinbox_protocol::msg::Position;
use twinbox_resync::manifest::Manifest;
use twinbox_resync::node::MirrorState;
use twinbox_resync::redo::RedoLog;

use super::adopt;
use super::applier::{self, Applier};
use super::error::StandbyError;
use super::receiver::{self, Event, Receiving};
use super::recover;
use super::replica::Replica;
use super::rescue::Rescue;
use super::shared::Shared;
use super::staging::Staging;
use super::{Standby, StandbyConfig, StandbyHandle};
use crate::switch::{ADOPTING, GAVE_UP};
use crate::tree::{self, Root};

fn secs() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// Writes a small file so that a power cut does not lose it.
fn write_synced(path: &Path, text: &str) -> Result<(), StandbyError> {
    let write = || -> std::io::Result<()> {
        let mut file = fs::File::create(path)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        path.parent().map_or(Ok(()), |dir| fs::File::open(dir)?.sync_all())
    };
    write().map_err(|e| StandbyError::io(format!("writing {}", path.display()), e))
}

/// Moves a manifest that cannot be used, and what belongs to it, aside; nothing is deleted.
fn set_aside(state_dir: &Path, why: &str) -> Result<(), StandbyError> {
    let mark = secs();
    for name in ["manifest.db", "manifest.db-wal", "manifest.db-shm", "redo"] {
        let from = state_dir.join(name);
        if from.symlink_metadata().is_ok() {
            let to = state_dir.join(format!("{name}.{why}-{mark}"));
            fs::rename(&from, &to).map_err(|e| StandbyError::io(format!("setting {} aside", from.display()), e))?;
        }
    }
    Ok(())
}

/// As [`Standby::start`].
pub(super) fn start(config: StandbyConfig, known: Option<&MirrorState>) -> Result<Standby, StandbyError> {
    let StandbyConfig { mirror, root: path, state_dir, adopt: may_adopt, redo_max_bytes, on_complete } = config;
    let root = Root::open(&path).map_err(|error| StandbyError::Root { path: path.clone(), detail: error.to_string() })?;
    let empty = tree::is_empty(&root).map_err(|error| StandbyError::Root { path: path.clone(), detail: error.to_string() })?;
    let ino = rustix::fs::fstat(root.fd()).map_err(|e| StandbyError::Root { path: path.clone(), detail: e.to_string() })?.st_ino;
    fs::create_dir_all(&state_dir).map_err(|e| StandbyError::io(format!("making {}", state_dir.display()), e))?;
    let shared = Shared::new();
    let (manifest_path, redo_dir) = (state_dir.join("manifest.db"), state_dir.join("redo"));

    let mut rebuild = false;
    // A primary that gave up: whatever it has is compared, whatever its manifest says.
    let gave_up = state_dir.join(GAVE_UP).exists();
    if gave_up && !state_dir.join(ADOPTING).exists() {
        set_aside(&state_dir, "gave-up")?;
        rebuild = true;
    }
    let mut manifest = match Manifest::open(&manifest_path, true) {
        Err(error) if error.is_damage() => {
            tracing::error!(%error, "the manifest is damaged: it is set aside and rebuilt from the replica's files");
            shared.problem(format!("{error}; it was set aside and rebuilt from the replica's files"));
            set_aside(&state_dir, "damaged")?;
            rebuild = true;
            Manifest::open(&manifest_path, true)?
        }
        other => other?,
    };
    let checkpoint = manifest.position().map_err(|e| manifest.state_error(&e))?;
    let mut log = RedoLog::open(&redo_dir, checkpoint)?;
    let fresh = manifest.is_empty() && checkpoint == Position::START && log.sealed() == Position::START;

    // Which directory the manifest was made for: an inode number survives a restart, not a copy or a missing mount.
    let mark = state_dir.join("root");
    let made_for = fs::read_to_string(&mark).ok().and_then(|text| text.trim().parse::<u64>().ok());
    if !fresh {
        let moved = made_for.is_some_and(|made_for| made_for != ino);
        // With txns still to be redone an empty directory can be right: they may have removed everything.
        let vanished = empty && manifest.len() > 1 && log.sealed().lsn <= checkpoint.lsn;
        if (moved || vanished) && !may_adopt {
            return Err(if vanished { StandbyError::Vanished { path, rows: manifest.len() } } else { StandbyError::OtherRoot { path } });
        }
        rebuild |= moved || vanished;
    } else if !empty && !rebuild {
        if known.is_none() && !may_adopt {
            return Err(StandbyError::NotEmpty { path });
        }
        rebuild = true;
    }
    write_synced(&mark, &ino.to_string())?;

    let mut replica = Replica::new(root);
    let adopting_mark = state_dir.join(ADOPTING);
    if rebuild {
        drop((manifest, log));
        if !fresh {
            set_aside(&state_dir, "earlier")?;
        }
        manifest = Manifest::open(&manifest_path, true)?;
        write_synced(&adopting_mark, &secs().to_string())?;
        let rows = adopt::scan(&mut replica, &mut manifest)?;
        tracing::info!(mirror, rows, "files in the replica's directory were taken over");
        log = RedoLog::open(&redo_dir, Position::START)?;
    }
    let adopting = adopting_mark.exists();
    let staging = Staging::open(&state_dir.join("staging")).map_err(|e| StandbyError::io("opening the staging directory", e))?;
    let staging = Arc::new(staging);
    let rescue = Rescue::new(&state_dir);

    let mut complete = known.is_some_and(|known| known.complete);
    if rebuild && complete {
        // The files may be ahead of or behind any cut: the primary has to compare them first.
        complete = false;
        on_complete(false);
    }
    let sealed = log.sealed();
    let checkpoint = manifest.position().map_err(|e| manifest.state_error(&e))?;
    if sealed.lsn > checkpoint.lsn {
        let recovered = recover::recover(&mut replica, &mut manifest, &staging, &rescue, &redo_dir, sealed, adopting)?;
        for problem in recovered.problems {
            shared.problem(problem);
        }
        shared.update(|status| status.captured_ns = recovered.captured_ns);
        if recovered.complete != complete {
            complete = recovered.complete;
            on_complete(complete);
        }
        log.drop_up_to(sealed.lsn)?;
    }
    staging.prune(Lsn(u64::MAX));
    shared.update(|status| {
        status.durable = sealed;
        status.applied = sealed.lsn;
        status.rows = manifest.len();
        status.complete = complete;
        status.adopted = adopting;
        status.lost_metadata.clone_from(&replica.lost);
    });

    let (events, event_queue) = mpsc::channel::<Event>();
    let (commands, command_queue) = mpsc::channel();
    let parts = receiver::Parts {
        shared: shared.clone(),
        staging: staging.clone(),
        log,
        roots: [path, state_dir.clone()],
        redo_max: redo_max_bytes,
    };
    let receiver = Receiving::new(parts, event_queue, events.clone(), commands.clone());
    let parts = applier::Parts {
        shared: shared.clone(),
        staging: staging.clone(),
        replica,
        manifest,
        rescue,
        adopting,
        adopting_mark,
        known: known.map(|known| (known.lineage.clone(), known.epoch)),
        redo_dir,
        applied: sealed,
        on_complete,
    };
    let applier = Applier::new(parts, command_queue, events.clone());
    let spawn = |name: &str, body: Box<dyn FnOnce() + Send>| {
        let builder = thread::Builder::new().name(format!("{name} {mirror}"));
        builder.spawn(body).map_err(|e| StandbyError::io("starting a thread", e))
    };
    let handle = StandbyHandle { events, applier: commands, staging, shared };
    let mut standby = Standby { handle, threads: vec![] };
    standby.threads.push(spawn("receive", Box::new(move || receiver.run()))?);
    standby.threads.push(spawn("apply", Box::new(move || applier.run()))?);
    Ok(standby)
}
