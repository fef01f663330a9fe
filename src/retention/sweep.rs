//! Deletes packs whose mark is old enough and that nobody took up again.

use std::collections::HashMap;
use std::time::Duration;

use super::mark::{Marked, Needed};
use crate::error::Result;
use crate::format::chunk::PackId;
use crate::format::info::LockKind;
use crate::interrupt;
use crate::progress::Monitor;
use crate::repo::lock::{Attempt, Lock, Other, Timing};
use crate::repo::{Repository, layout};

/// Keys that one call deletes: S3's own limit.
pub(super) const BATCH: usize = 1000;

/// What a sweep did.
#[derive(Debug)]
pub(super) enum Swept {
    /// packs deleted, with their bytes
    Done { packs: u64, bytes: u64 },
    /// somebody works with packs, which must not go meanwhile
    Busy(Box<Other>),
}

/// The marks that were written at least `grace` before `now`.
pub(super) fn due(marks: Vec<Marked>, now: i64, grace: Duration) -> Vec<Marked> {
    let grace = i64::try_from(grace.as_secs()).unwrap_or(i64::MAX);
    marks.into_iter().filter(|mark| now.saturating_sub(mark.modified) >= grace).collect()
}

/// Deletes the packs that `due` names and that no manifest refers to now, then the marks. No backup can run meanwhile: what
/// one that ended just now needs is in its manifest, and is seen.
pub(super) fn sweep(
    repository: &Repository,
    expire: &Lock,
    due: &[Marked],
    needed: &mut Needed,
    sizes: &HashMap<PackId, u64>,
    monitor: &dyn Monitor,
) -> Result<Swept> {
    let lock = match repository.try_lock(LockKind::Sweep, "", Timing::default())? {
        Attempt::Held(lock) => lock,
        Attempt::Busy(other) => return Ok(Swept::Busy(other)),
    };
    needed.update(repository, monitor, |_| false)?;
    monitor.stage("deleting packs", 0);
    let (mut packs, mut bytes) = (0, 0);
    for mark in due {
        let unneeded: Vec<PackId> = mark.packs.iter().filter(|id| !needed.contains(id)).copied().collect();
        for batch in unneeded.chunks(BATCH) {
            interrupt::check()?;
            lock.check()?;
            expire.check()?;
            let keys: Vec<String> = batch.iter().map(|id| layout::pack(&repository.stanza, *id)).collect();
            repository.store.delete(&keys)?;
            packs += batch.len() as u64;
            bytes += batch.iter().filter_map(|id| sizes.get(id)).sum::<u64>();
        }
        // last: a run that dies before it comes by the same mark again
        repository.store.delete(std::slice::from_ref(&mark.key))?;
    }
    Ok(Swept::Done { packs, bytes })
}
