//! Removes what a retention no longer keeps, in an order in which every step may be the last one: first the manifests, with
//! which a backup ceases to exist; then WAL; then packs, which no manifest refers to any more, after a grace period.
//! A run that dies leaves a sound stanza with something too much in it, and the next run finishes.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;

use super::mark::{self, Needed};
use super::policy::{Decision, Fate, Known, Retention, WalRule, remove_one};
use super::proofs::Proofs;
use super::sweep::{BATCH, Swept, due, sweep};
use crate::error::{Context, Error, Result};
use crate::format::info::{ArchiveInfo, BackupInfo, BackupSummary, LockKind};
use crate::format::manifest::Database;
use crate::postgres::{BackupKind, Label, WalName};
use crate::progress::Monitor;
use crate::repo::lock::{Attempt, Lock, Other, Timing};
use crate::repo::proof::Doubt;
use crate::repo::{Repository, layout};

/// How long a pack that nobody needs stays, unless said otherwise: longer than any reader or writer that knows it.
pub const GRACE: Duration = Duration::from_secs(24 * 60 * 60);

/// The shortest grace period that needs no word of its own. Within it a reader may open a backup, a listing may lag behind,
/// and clocks may differ.
pub const GRACE_MIN: Duration = Duration::from_secs(60 * 60);

/// What an expire does.
#[derive(Clone, Debug)]
pub struct ExpireOptions {
    /// what stays
    pub retention: Retention,
    /// how long a pack that nobody needs stays
    pub grace: Duration,
    /// even if that is shorter than [`GRACE_MIN`]
    pub force: bool,
    /// remove this backup, instead of what the retention decides
    pub set: Option<String>,
    /// look at packs only when this run or a dead one gave a reason to
    pub brief: bool,
    /// change nothing, and say what would be done
    pub dry_run: bool,
}

impl ExpireOptions {
    /// Refuses a grace period that is too short to be meant.
    pub fn check(&self) -> Result<()> {
        if self.force || self.dry_run || self.grace >= GRACE_MIN {
            return Ok(());
        }
        let (grace, least) = (self.grace.as_secs(), GRACE_MIN.as_secs());
        Err(Error::new(format!("a grace period of {grace} s is shorter than {least} s"))
            .hint("a mount or restore of a removed backup would lose its packs; \"pgcairn expire --force\" does it"))
    }
}

/// What an expire did, or would do.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Report {
    /// nothing was changed
    pub dry_run: bool,
    /// every backup, oldest first
    pub backups: Vec<BackupReport>,
    /// the archive of each cluster
    pub archives: Vec<ArchiveReport>,
    /// packs, if they were looked at
    pub packs: Option<PackReport>,
    /// backups that stand for no other
    pub unproved: Vec<Unproved>,
    /// what was left for another run, and why
    pub notes: Vec<String>,
}

/// One backup's fate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BackupReport {
    /// which
    pub label: String,
    /// it stays
    pub keep: bool,
    /// why
    pub why: String,
}

/// A backup that is not proved: it does not count, and what would go for it stays.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Unproved {
    /// which
    pub label: String,
    /// the segment that is missing or is not its own, if that is it
    pub segment: Option<String>,
    /// what is wrong
    pub what: String,
}

/// What went of one archive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ArchiveReport {
    /// e.g. `15-1`
    pub id: String,
    /// what stays
    pub keep: String,
    /// why
    pub why: String,
    /// files removed
    pub removed: u64,
    /// their stored bytes
    pub bytes: u64,
}

/// Packs and what happened to them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct PackReport {
    /// all there were
    pub total: u64,
    /// those that no backup needs
    pub unneeded: u64,
    /// their bytes
    pub unneeded_bytes: u64,
    /// newly marked: they go after the grace period
    pub marked: u64,
    /// deleted
    pub deleted: u64,
    /// their bytes
    pub deleted_bytes: u64,
}

/// Who else works on the stanza, by the store's clock.
struct Moment {
    now: i64,
    /// what was written from here on may belong to somebody who works
    horizon: i64,
    others: Vec<Other>,
}

/// Removes what the retention no longer keeps.
pub fn expire(repository: &Repository, options: &ExpireOptions, monitor: &dyn Monitor) -> Result<Report> {
    options.check()?;
    let archive_info = repository.archive_info()?;
    let lock = if options.dry_run { None } else { Some(repository.lock(LockKind::Expire, "")?) };
    let named = options.set.as_deref().map(|set| named(repository, set)).transpose()?;
    let alone = named.filter(|_| !options.dry_run).map(|label| without_backups(repository, label)).transpose()?;
    // first who works, then what there is: a backup that commits in between is in one of the two
    let moment = moment(repository, lock.as_ref())?;
    repository.labels_proved()?;
    let backup_info = repository.backup_info()?;
    let mut proofs = Proofs::new(repository);
    let decision = decision(&mut proofs, repository, options, named, &archive_info, &backup_info, moment.now)?;
    let mut report = Report {
        dry_run: options.dry_run,
        backups: decision.backups.iter().map(BackupReport::from).collect(),
        notes: decision.notes.clone(),
        ..Report::default()
    };
    if options.retention.is_none() && options.set.is_none() {
        report.notes.push("no retention is set: backups and WAL stay (see --repo-retention-full)".into());
    }
    let gone = remove_backups(repository, lock.as_ref(), &decision)?;
    drop(alone);
    let mut failure = None;
    for database in &archive_info.history {
        match expire_wal(repository, lock.as_ref(), database, &decision, &mut proofs, moment.horizon) {
            Ok(archive) => report.archives.push(archive),
            Err(error) => _ = failure.get_or_insert(error),
        }
    }
    report.tell_unproved(&proofs);
    let reason = gone > 0 || moment.others.iter().any(|other| other.dead && may_be_backup(other));
    match packs(repository, lock.as_ref(), options, &moment, reason, &mut report, monitor) {
        Ok(()) => failure.map_or(Ok(report), Err),
        Err(error) => Err(failure.unwrap_or(error)),
    }
}

/// The backup that a person names.
fn named(repository: &Repository, set: &str) -> Result<Label> {
    repository.resolve(set)?.parse().context(|| "a label".into())
}

/// A person may name a full backup on which one is being built right now, whose label begins with that of the full one. So none
/// runs, nor begins, while it is taken away. The retention never removes the newest.
fn without_backups(repository: &Repository, label: Label) -> Result<Option<Lock>> {
    if label.kind() != BackupKind::Full {
        return Ok(None);
    }
    match repository.try_lock(LockKind::Sweep, "", Timing::default())? {
        Attempt::Held(lock) => Ok(Some(lock)),
        Attempt::Busy(other) => Err(Error::new(format!("backup {label} is not removed: {}", other.describe()))
            .hint("it may build on this full backup; run the command again when it has ended")),
    }
}

/// It is a backup's lock, for all we know.
fn may_be_backup(other: &Other) -> bool {
    other.kind().is_none_or(|kind| kind == LockKind::Backup)
}

fn moment(repository: &Repository, lock: Option<&Lock>) -> Result<Moment> {
    let (now, others) = match lock {
        Some(lock) => lock.others()?,
        None => {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64);
            (now, repository.locks()?)
        }
    };
    let works = others.iter().filter(|other| !other.dead && may_be_backup(other));
    let since = works.map(|other| other.since().unwrap_or(other.modified).min(other.modified));
    let own = lock.map_or(now, Lock::since);
    Ok(Moment { now, horizon: since.fold(own, i64::min), others })
}

fn decision(
    proofs: &mut Proofs<'_>,
    repository: &Repository,
    options: &ExpireOptions,
    named: Option<Label>,
    archive_info: &ArchiveInfo,
    backup_info: &BackupInfo,
    now: i64,
) -> Result<Decision> {
    let clusters: Vec<u32> = archive_info.history.iter().map(|database| database.id).collect();
    if let Some(label) = named {
        return decide_set(proofs, repository, options, backup_info, label, &clusters);
    }
    let known = known(repository, backup_info)?;
    proofs.decide(known, &options.retention, &clusters, now)
}

/// One backup goes because a person says so.
fn decide_set(
    proofs: &mut Proofs<'_>,
    repository: &Repository,
    options: &ExpireOptions,
    backup_info: &BackupInfo,
    named: Label,
    clusters: &[u32],
) -> Result<Decision> {
    let label = named.to_string();
    let mut known = backup_info.backups.iter().map(|(label, of)| known_of(label, of)).collect::<Result<Vec<_>>>()?;
    // it may be the one that cannot be read: its name is all that is known of it, and enough
    if let (false, Some(other)) = (backup_info.backups.contains_key(&label), known.first().cloned()) {
        known.push(Known { label: named, prior: None, ..other });
    }
    let decision = remove_one(&known, named, &options.retention, clusters).map_err(|why| {
        Error::new(format!("backup {label} is not removed: {why}"))
            .hint("take a new full backup first; a whole stanza is removed by deleting its objects by hand")
    })?;
    if named.kind() == BackupKind::Full {
        proofs.refuse_last(&known, named)?;
    }
    let unknown = |other: &String| *other != label && !backup_info.backups.contains_key(other);
    match repository.labels()?.iter().any(unknown) {
        // nobody knows what WAL another one needs that cannot be read
        true => Ok(Decision { archives: BTreeMap::new(), ..decision }),
        false => Ok(decision),
    }
}

/// The backups as the policy sees them.
///
/// # Errors
/// When nothing is known of one, for its manifest cannot be read: what it needs must not go.
fn known(repository: &Repository, backup_info: &BackupInfo) -> Result<Vec<Known>> {
    for label in repository.labels()? {
        if !backup_info.backups.contains_key(&label) {
            // with the reason, unless it was committed just now
            if let Err(error) = repository.description(&label) {
                let is_lost = error.is_damage() || error.is_not_found();
                let stop = Error::new(format!("backup {label} cannot be read, so nothing is removed")).source(error);
                return Err(match is_lost {
                    true => stop.hint(format!("if it is lost, remove it with \"pgcairn expire --set {label}\"")),
                    false => stop,
                });
            }
        }
    }
    backup_info.backups.iter().map(|(label, of)| known_of(label, of)).collect()
}

fn known_of(label: &str, of: &BackupSummary) -> Result<Known> {
    let what = || format!("backup.info says something strange of backup {label}");
    let parse = |text: &str| text.parse::<Label>().context(what);
    Ok(Known {
        label: parse(label)?,
        prior: of.prior.as_deref().map(parse).transpose()?,
        database: of.database_id,
        stop_time: of.stop_time,
        wal: (of.wal_start.parse().context(what)?, of.wal_stop.parse().context(what)?),
        counts: true,
    })
}

/// With its manifest a backup ceases to exist. Those that build on others go first.
fn remove_backups(repository: &Repository, lock: Option<&Lock>, decision: &Decision) -> Result<usize> {
    let gone = decision.backups.iter().rev().filter(|fate| !fate.keep);
    let gone: Vec<String> = gone.map(|fate| layout::manifest(&repository.stanza, &fate.label.to_string())).collect();
    let Some(lock) = lock else { return Ok(gone.len()) };
    let labels = decision.backups.iter().filter(|fate| !fate.keep).map(|fate| fate.label.to_string());
    mark::forget(repository, lock, &labels.collect::<Vec<_>>())?;
    for batch in gone.chunks(BATCH) {
        lock.check()?;
        repository.store.delete(batch)?;
    }
    // even when nothing went: the run that removed it may have died before this
    let empty = repository.refresh_catalog()?;
    if !empty.is_empty() {
        repository.store.delete(&empty)?;
    }
    Ok(gone.len())
}

/// Removes WAL that no kept backup can use. Timeline histories stay: they are small, and tell what the others are.
fn expire_wal(
    repository: &Repository,
    lock: Option<&Lock>,
    database: &Database,
    decision: &Decision,
    proofs: &mut Proofs<'_>,
    horizon: i64,
) -> Result<ArchiveReport> {
    let all = (WalRule::All, "nothing is known of that cluster".to_owned());
    let (rule, why) = decision.archives.get(&database.id).unwrap_or(&all);
    let mut report = ArchiveReport {
        id: format!("{}-{}", database.version, database.id),
        keep: rule.to_string(),
        why: why.clone(),
        removed: 0,
        bytes: 0,
    };
    if *rule == WalRule::All {
        return Ok(report);
    }
    let (mut batch, mut failure, mut is_kept) = (Vec::new(), None, None);
    let remove = |batch: &mut Vec<String>| -> Result<()> {
        if let Some(lock) = lock.filter(|_| !batch.is_empty()) {
            lock.check()?;
            repository.store.delete(batch)?;
        }
        batch.clear();
        Ok(())
    };
    repository.archive(database).files(|name, object| {
        let segment = match WalName::parse(name) {
            Ok(WalName::Segment(segment) | WalName::Partial(segment) | WalName::BackupHistory { segment, .. }) => {
                segment
            }
            Ok(WalName::History(_)) | Err(_) => return,
        };
        // a backup that runs may need what was archived since it began
        if rule.keeps(segment) || object.modified >= horizon || failure.is_some() || is_kept.is_some() {
            return;
        }
        // without that backup, it would be missed
        match decision.cut.filter(|_| report.removed == 0).map(|cut| Ok((cut, proofs.is_proved(cut)?))).transpose() {
            Ok(Some((cut, false))) => return is_kept = Some(cut),
            Ok(_) => {}
            Err(error) => return failure = Some(error),
        }
        report.removed += 1;
        report.bytes += object.size;
        batch.push(object.key.clone());
        if batch.len() >= BATCH {
            failure = remove(&mut batch).err();
        }
    })?;
    if let Some(cut) = is_kept {
        (report.keep, report.why) =
            (WalRule::All.to_string(), format!("backup {cut} does not count: it is not proved"));
    }
    match failure {
        Some(error) => Err(error),
        None => remove(&mut batch).map(|()| report),
    }
}

/// Marks packs that nobody needs, and deletes those that were marked long enough ago.
fn packs(
    repository: &Repository,
    lock: Option<&Lock>,
    options: &ExpireOptions,
    moment: &Moment,
    reason: bool,
    report: &mut Report,
    monitor: &dyn Monitor,
) -> Result<()> {
    let mut marks = mark::marks(repository)?;
    if options.brief && !reason && marks.is_empty() {
        return Ok(());
    }
    let mut needed = Needed::default();
    // in a dry run they are still there
    let gone = |label: &str| report.backups.iter().any(|backup| backup.label == label && !backup.keep);
    needed.update(repository, monitor, gone)?;
    monitor.stage("listing packs", 0);
    let found = mark::look(repository, &needed, moment.horizon)?;
    let mut packs = PackReport {
        total: found.total,
        unneeded: found.unneeded.len() as u64,
        unneeded_bytes: found.unneeded.values().sum(),
        ..PackReport::default()
    };
    let Some(lock) = lock else {
        report.packs = Some(packs);
        return Ok(());
    };
    packs.marked = mark::mark(repository, &found.unneeded, &marks)?;
    let mut now = moment.now;
    if packs.marked > 0 {
        marks = mark::marks(repository)?;
        now = lock.others()?.0;
    }
    let due = due(marks, now, options.grace);
    if !due.is_empty() {
        match sweep(repository, lock, &due, &mut needed, &found.unneeded, monitor)? {
            Swept::Done { packs: deleted, bytes } => (packs.deleted, packs.deleted_bytes) = (deleted, bytes),
            Swept::Busy(other) => report.notes.push(format!("packs are deleted by a later run: {}", other.describe())),
        }
    }
    report.packs = Some(packs);
    remove_dead_locks(lock, moment, options.grace)
}

/// A backup that died long ago is not continued: its packs went like all that nobody needs.
fn remove_dead_locks(lock: &Lock, moment: &Moment, grace: Duration) -> Result<()> {
    let mut dead = moment.others.clone();
    let grace = i64::try_from(grace.as_secs()).unwrap_or(i64::MAX);
    dead.retain(|other| other.dead && moment.now.saturating_sub(other.modified) >= grace);
    lock.remove(&dead)
}

impl Report {
    fn tell_unproved(&mut self, proofs: &Proofs<'_>) {
        for (label, Doubt { segment, what }) in proofs.doubts() {
            let (label, segment) = (label.to_string(), segment.map(|segment| segment.to_string()));
            // one that goes is missed by nobody
            if self.backups.iter().any(|backup| backup.label == label && backup.keep) {
                self.notes.push(format!(
                    "backup {label} does not count: {what}; what would go for it stays. Look with \"pgcairn verify\", take a new \
                     full backup"
                ));
                self.unproved.push(Unproved { label, segment, what: what.clone() });
            }
        }
    }
}

impl From<&Fate> for BackupReport {
    fn from(fate: &Fate) -> Self {
        Self { label: fate.label.to_string(), keep: fate.keep, why: fate.why.clone() }
    }
}

#[cfg(test)]
mod tests;
