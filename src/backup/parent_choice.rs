//! What a backup builds on: the kind that can be taken, the backup it is compared with, what another left that died.

use std::collections::HashMap;
use std::path::Path;

use super::pack_usage::Weights;
use super::parent::{Parent, ParentFiles, Reuse};
use super::run::{BackupOptions, Wanted, Way, now_s};
use crate::error::{Error, Result};
use crate::format::chunk::PackId;
use crate::format::info::BackupSummary;
use crate::format::manifest::{Database, Description, PackUse, Source};
use crate::postgres::{BackupKind, Lsn, Timeline};
use crate::progress::Monitor;
use crate::repo::Repository;

/// The backup that this one is compared with.
pub(super) struct Compared {
    pub(super) description: Description,
    pub(super) files: ParentFiles,
    pub(super) parent: Parent,
}

/// Lengths of packs: those that this backup wrote, and those that were there.
pub(super) struct Packs {
    pub(super) new: HashMap<PackId, u64>,
    pub(super) old: HashMap<PackId, u64>,
}

/// The kind of backup that can be taken, and the backup it is compared with.
///
/// A diff is compared with the last full backup, an incremental with the last backup. A full one is compared with the last backup
/// too, so that what is stored is not stored again; but it reads every file and trusts no time.
pub(super) fn compared(
    repository: &Repository,
    database: &Database,
    options: &BackupOptions,
    share: bool,
    monitor: &dyn Monitor,
) -> Result<(BackupKind, Option<Compared>)> {
    let info = repository.backup_info()?;
    let of_cluster = |(_, summary): &(&String, &BackupSummary)| summary.database_id == database.id;
    let fulls = |(_, summary): &(&String, &BackupSummary)| summary.kind == BackupKind::Full;
    let mut candidates = info.backups.iter().filter(of_cluster);
    let last_full = candidates.clone().rfind(fulls).map(|(label, _)| label.clone());
    let wanted = match options.kind {
        Wanted::Kind(kind) => kind,
        Wanted::Due(schedule) => schedule.due(candidates.clone().map(|(_, summary)| summary), now_s()),
    };
    let (kind, label) = match (wanted, last_full) {
        (BackupKind::Full, _) => (BackupKind::Full, candidates.next_back().map(|(label, _)| label.clone())),
        (kind, None) => {
            monitor.note(&format!("there is no full backup to build on: a full one is taken instead of {kind}"));
            (BackupKind::Full, None)
        }
        (BackupKind::Diff, Some(full)) => (BackupKind::Diff, Some(full)),
        (BackupKind::Incr, Some(_)) => (BackupKind::Incr, candidates.next_back().map(|(label, _)| label.clone())),
    };
    let Some(label) = label.filter(|_| share) else { return Ok((kind, None)) };
    let is_full = kind == BackupKind::Full;
    // what a stream brings has to be read anyway
    let unread = !is_full && !options.checksum && options.way == Way::Files;
    let reuse = Reuse { unread, chunks_max: if is_full { 2 } else { 4 }, leave_thin: is_full };
    let (description, files, parent) = Parent::open(repository, &label, reuse)?;
    Ok((kind, Some(Compared { description, files, parent })))
}

impl Compared {
    /// The time of a file is trusted only in the directory that the parent read, and on the parent's timeline: machines that
    /// replay the same WAL write the same file at different times, and different contents at the same time.
    pub(super) fn trusted(
        self,
        repository: &Repository,
        (timeline, start_lsn, (start_time, server_time)): (Timeline, Lsn, (i64, i64)),
        data_directory: &Path,
        source: &Source,
        options: &BackupOptions,
    ) -> Result<Self> {
        let parent = &self.description;
        // a cluster or a clock that went back: what the parent read may never have happened. A standby's backup begins at the
        // last checkpoint that was replayed, which may be the parent's
        let reached = if source.standby { &parent.start_lsn } else { &parent.stop_lsn };
        let is_later = reached.parse::<Lsn>().is_ok_and(|lsn| lsn <= start_lsn)
            && parent.start_time <= start_time
            && parent.stop_time <= server_time;
        let is_same = |of: &Source| (&of.host, &of.mark) == (&source.host, &source.mark);
        let trusted = is_later
            && parent.timeline == timeline.0
            && parent.data_directory == data_directory.display().to_string()
            && parent.source.as_ref().is_some_and(is_same);
        if trusted || options.checksum || !self.parent.reuse().unread {
            return Ok(self);
        }
        let reuse = Reuse { unread: false, ..self.parent.reuse() };
        let (description, files, parent) = Parent::open(repository, &self.description.label, reuse)?;
        Ok(Self { description, files, parent })
    }
}

impl Packs {
    /// The pack table of what is needed.
    pub(super) fn table(&self, weights: &Weights) -> Result<Vec<PackUse>> {
        let with_size = |(pack, weight): (PackId, u64)| {
            let size = self.new.get(&pack).or_else(|| self.old.get(&pack)).copied();
            let size = size.ok_or_else(|| Error::new(format!("pack {pack} is needed, but nobody wrote it")))?;
            Ok(PackUse { pack, size, weight })
        };
        weights.sorted().into_iter().map(with_size).collect()
    }
}
