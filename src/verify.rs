//! Whether the stanza is sound, and if not: which backups, which of their files, and which points in time are harmed, and
//! by which object.
//!
//! Quick: manifests are read, packs and WAL only listed. Full: every pack that a backup needs is read once and every chunk
//! in it proved; then every manifest is followed, down to the last extent, into a table of what was found; every WAL file
//! is read, and what backups store of WAL is compared with them. Memory: 8 bytes for each stored chunk, beside the packs being read.

mod backups;
mod harms;
mod packs;
pub mod repair;
mod wal;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;
use serde::Serialize;

use crate::error::{Error, Result};
use crate::format::chunk::PackId;
use crate::format::manifest::Description;
use crate::interrupt;
use crate::progress::Monitor;
use crate::repo::{Repository, layout};
use crate::retention::mark::each_object;

/// Files of one backup that a report names; the others are counted.
const FILES_MAX: usize = 20;

/// How much is looked at.
#[derive(Clone, Copy, Debug)]
pub struct VerifyOptions {
    /// read manifests only
    pub quick: bool,
    /// packs, and WAL files, read at the same time
    pub process_max: usize,
}

/// What a verify found.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Report {
    /// the stanza
    pub stanza: String,
    /// packs and WAL were listed, not read
    pub quick: bool,
    /// nothing is harmed
    pub sound: bool,
    /// every backup, oldest first
    pub backups: Vec<Health>,
    /// what does harm
    pub harms: Vec<Harm>,
    /// WAL that is not there, so points in time that cannot be reached
    pub gaps: Vec<Gap>,
    /// what harms no backup and no point: summaries, packs that nobody needs
    pub notes: Vec<String>,
    /// what was looked at
    pub checked: Checked,
}

/// How a backup is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Health {
    /// its label
    pub label: String,
    /// all of it can be had
    pub sound: bool,
    /// files that cannot be had whole
    pub files_harmed: u64,
    /// the first of them
    pub files: Vec<String>,
}

/// An object that is damaged or missing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Harm {
    /// its key
    pub object: String,
    /// what is wrong with it
    pub what: String,
    /// backups that need it
    pub backups: Vec<String>,
}

/// Segments that are missing, or cannot be used, where there should be no gap.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Gap {
    /// e.g. `15-1`
    pub archive: String,
    /// first segment that is not there
    pub first: String,
    /// last segment that is not there
    pub last: String,
    /// the backup to start from for points before it; none can use the gap's WAL
    pub after: Option<String>,
    /// seconds since 1970 after which points cannot be reached from that backup: when the last segment before was archived
    pub from_time: Option<i64>,
    /// the next backup, from which later points can be reached again
    pub until: Option<String>,
    /// when that backup ended
    pub until_time: Option<i64>,
}

/// How much was looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Checked {
    /// packs
    pub packs: u64,
    /// their bytes
    pub pack_bytes: u64,
    /// chunks in them
    pub chunks: u64,
    /// files of the archive
    pub wal_files: u64,
    /// their stored bytes
    pub wal_bytes: u64,
}

/// Collects what is found, from several threads.
#[derive(Debug, Default)]
struct Findings {
    harms: Mutex<BTreeMap<String, (String, BTreeSet<String>)>>,
    backups: Mutex<BTreeMap<String, Health>>,
}

impl Findings {
    /// An object is not what it should be.
    fn harm(&self, object: &str, what: impl Into<String>) {
        self.harms.lock().entry(object.to_owned()).or_insert_with(|| (what.into(), BTreeSet::new()));
    }

    /// A backup suffers by that object; `file` is what cannot be had, if it is not all.
    fn suffers(&self, label: &str, object: &str, what: &str, file: Option<&[u8]>) {
        let mut harms = self.harms.lock();
        let (_, labels) = harms.entry(object.to_owned()).or_insert_with(|| (what.to_owned(), BTreeSet::new()));
        labels.insert(label.to_owned());
        let mut backups = self.backups.lock();
        let health = backups.entry(label.to_owned()).or_default();
        health.sound = false;
        let Some(file) = file.map(|file| file.escape_ascii().to_string()) else { return };
        if health.files.last() != Some(&file) {
            health.files_harmed += 1;
            if health.files.len() < FILES_MAX {
                health.files.push(file);
            }
        }
    }
}

/// Looks at everything.
///
/// # Errors
/// When the store fails, so that nobody knows. What is damaged or missing is in the report.
pub fn verify(repository: &Repository, options: &VerifyOptions, monitor: &dyn Monitor) -> Result<Report> {
    let archive_info = repository.archive_info().map_err(|error| match error.is_damage() {
        true => error.hint("\"pgcairn repo repair\" makes it again"),
        false => error,
    })?;
    let mut report = Report {
        stanza: repository.stanza.clone(),
        quick: options.quick,
        notes: summaries(repository)?,
        ..Report::default()
    };
    let findings = Findings::default();
    let labels = repository.labels()?;
    findings.backups.lock().extend(labels.iter().map(|label| (label.clone(), Health::of(label))));

    monitor.stage("reading manifests", 0);
    let described = backups::describe(repository, &labels, &findings, options.process_max)?;
    let (needed, unneeded) = list_packs(repository, &described.packs)?;
    if unneeded > 0 {
        report.notes.push(format!("{unneeded} packs that no backup needs; \"pgcairn expire\" removes them"));
    }
    let found = match options.quick {
        true => packs::compare(repository, &described.packs, &needed, &findings)?,
        false => packs::read(repository, &described.packs, &needed, &findings, options, monitor, &mut report.checked)?,
    };
    if let Err(error) = harms::remember(repository, &found, options.quick) {
        tracing::warn!(%error, "what was found could not be noted in the repository: new backups may build on harmed packs");
    }
    // in a quick run only those backups are followed that something is known to be wrong with
    if !options.quick || !found.is_sound() {
        monitor.stage("following manifests", 0);
        let labels: Vec<&Description> = described.descriptions.iter().collect();
        backups::follow(repository, &labels, &found, &findings, options)?;
    }
    for database in &archive_info.history {
        let ours: Vec<&Description> =
            described.descriptions.iter().filter(|of| of.database.id == database.id).collect();
        report.gaps.extend(wal::check(repository, database, &ours, &findings, options, monitor, &mut report.checked)?);
    }
    finish(repository, findings, report)
}

/// What expire removed meanwhile is not missed.
fn finish(repository: &Repository, findings: Findings, mut report: Report) -> Result<Report> {
    let there: BTreeSet<String> = repository.labels()?.into_iter().collect();
    for (object, (what, mut labels)) in findings.harms.into_inner() {
        let had = labels.len();
        labels.retain(|label| there.contains(label));
        if had == 0 || !labels.is_empty() {
            report.harms.push(Harm { object, what, backups: labels.into_iter().collect() });
        }
    }
    report.backups = findings.backups.into_inner().into_values().filter(|of| there.contains(&of.label)).collect();
    report.gaps.retain(|gap| gap.after.as_ref().is_some_and(|label| there.contains(label)));
    report.sound = report.harms.is_empty() && report.gaps.is_empty() && report.backups.iter().all(|of| of.sound);
    Ok(report)
}

impl Health {
    fn of(label: &str) -> Self {
        Self { label: label.to_owned(), sound: true, ..Self::default() }
    }
}

/// What is wrong with the objects that can be made again.
fn summaries(repository: &Repository) -> Result<Vec<String>> {
    let mut notes = Vec::new();
    for (key, state) in repository.info_states()? {
        notes.extend(state.map(|what| format!("{key} {what}; \"pgcairn repo repair\" makes it again")));
    }
    Ok(notes)
}

/// The lengths of those packs that are needed and there, and the number of those that nobody needs.
fn list_packs(repository: &Repository, needed: &HashMap<PackId, u64>) -> Result<(HashMap<PackId, u64>, u64)> {
    let (mut there, mut unneeded) = (HashMap::new(), 0);
    each_object(repository, &layout::packs(&repository.stanza), |object| {
        match object.key.rsplit('/').next().and_then(PackId::from_hex) {
            Some(id) if needed.contains_key(&id) && object.key == layout::pack(&repository.stanza, id) => {
                there.insert(id, object.size);
            }
            _ => unneeded += 1,
        }
        Ok(())
    })?;
    Ok((there, unneeded))
}

/// Runs `work` on every item, `threads` at the same time; the first error ends it.
fn each<T: Sync>(items: &[T], threads: usize, work: impl Fn(&T) -> Result<()> + Sync) -> Result<()> {
    let next = AtomicUsize::new(0);
    let run = || -> Result<()> {
        while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
            interrupt::check()?;
            // one that failed makes the others stop at their next item
            work(item).inspect_err(|_| next.store(items.len(), Ordering::Relaxed))?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads.clamp(1, items.len().max(1))).map(|_| scope.spawn(run)).collect();
        let died = |_| Err(Error::new("a thread of verify died"));
        // every one is waited for, and the first error is told
        let outcomes: Vec<Result<()>> = workers.into_iter().map(|worker| worker.join().unwrap_or_else(died)).collect();
        outcomes.into_iter().collect()
    })
}

/// An error that is a finding, not a failure: the object is damaged or missing. Gives its key and what is wrong.
fn finding(error: Error, object: &str) -> Result<(String, String)> {
    if !error.is_damage() && !error.is_not_found() && !error.is_truncated() {
        return Err(error);
    }
    let mut what = error.to_string();
    let mut cause = std::error::Error::source(&error);
    while let Some(inner) = cause {
        what = inner.to_string();
        if let Some(format) = inner.downcast_ref::<crate::format::FormatError>() {
            return Ok((format.object.clone(), format!("byte {}: {}", format.offset, format.what)));
        }
        cause = inner.source();
    }
    match error.is_not_found() {
        true => Ok((object.to_owned(), "is missing".into())),
        false => Ok((object.to_owned(), what)),
    }
}

#[cfg(test)]
mod tests;
