//! A heal without a network, for the simulation: the caller asks the standby.

use super::*;

impl Job {
    /// When the machine is to have come up; every file would be newer than the real boot is old.
    pub(crate) fn booted_at(&mut self, time: Time) {
        self.booted = Some(time);
    }
}

/// What a primary that comes up says to its standby.
pub(crate) fn hello(job: &Job) -> Hello {
    job.hello(known(&job.mirror_dir).unwrap().as_ref()).unwrap()
}

/// The standby has nothing of this mirror.
pub(crate) fn nothing(job: &Job) {
    note(job, job.durable).unwrap();
}

/// As [`heal`], with the rows the standby gave.
pub(crate) fn heal<S: remote::Source>(
    job: &Job,
    rows: Vec<(RelPath, Option<Entry>)>,
    position: Position,
    source: S,
) -> Result<Done, HealError> {
    let manifest = known(&job.mirror_dir)?.map(|(manifest, _)| manifest);
    let scratch = Scratch::new(&job.mirror_dir);
    let mut pulled = scratch.open()?;
    for (path, entry) in rows {
        take_row(&mut pulled, &path, entry).map_err(|error| job.work(error))?;
    }
    put_back(job, manifest, pulled, position, source, &mut |_| {})
}
