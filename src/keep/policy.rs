//! Which backups and which WAL a retention keeps. Pure: from what there is and what time it is to what goes, and why.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use crate::postgres::{BackupKind, Label, SegmentName, TimestampTz};
use crate::repo::clock::Clock;

/// What `repo-retention-full` counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FullType {
    /// full backups
    #[default]
    Count,
    /// days
    Time,
}

/// What is kept. Names and meanings are pgBackRest's; what is `None` keeps everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    /// full backups, or days that a full backup must be able to reach back
    pub full: Option<u32>,
    /// which of the two
    pub full_type: FullType,
    /// differential backups, full ones counted among them
    pub diff: Option<u32>,
    /// backups whose WAL is kept from their start on
    pub archive: Option<u32>,
    /// the least kind of backup that `archive` counts
    pub archive_type: BackupKind,
}

/// A backup as the policy sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    /// its label
    pub label: Label,
    /// its parent
    pub prior: Option<Label>,
    /// number of its cluster in `archive.info`
    pub database: u32,
    /// when it ended, in seconds since 1970
    pub stop_time: i64,
    /// first and last segment that it needs
    pub wal: (SegmentName, SegmentName),
}

/// What becomes of a backup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fate {
    /// which
    pub label: Label,
    /// it stays
    pub keep: bool,
    /// why
    pub why: String,
}

/// What is kept of the archive of one cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WalRule {
    /// everything
    All,
    /// from a segment on, and the segments, first to last, of backups before it
    From {
        /// the first of all that stay
        first: Option<SegmentName>,
        /// what older backups need to become consistent
        ranges: Vec<(SegmentName, SegmentName)>,
    },
}

/// What a retention makes of a stanza.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// of every backup, oldest first
    pub backups: Vec<Fate>,
    /// by number of the cluster
    pub archives: BTreeMap<u32, (WalRule, String)>,
    /// what looks wrong
    pub notes: Vec<String>,
}

impl Retention {
    /// Keeps everything.
    pub const NONE: Self =
        Self { full: None, full_type: FullType::Count, diff: None, archive: None, archive_type: BackupKind::Full };

    /// Whether anything can ever go.
    pub fn is_none(&self) -> bool {
        self.full.is_none() && self.diff.is_none() && self.archive.is_none()
    }
}

impl WalRule {
    /// Whether a segment, or a file that is named after it, stays.
    pub fn keeps(&self, segment: SegmentName) -> bool {
        match self {
            Self::All => true,
            Self::From { first, ranges } => {
                // names sort by timeline first: whatever branched off later has a greater number, and stays
                first.is_some_and(|first| segment >= first)
                    || ranges.iter().any(|(first, last)| (first..=last).contains(&&segment))
            }
        }
    }
}

/// What stays and what goes at `now`, seconds since 1970. `clusters` are the numbers of `archive.info`, the last is the
/// current one.
pub fn decide(known: &[Known], retention: &Retention, clusters: &[u32], now: i64) -> Decision {
    let mut known = known.to_vec();
    known.sort_by_key(|backup| backup.label);
    let mut gone: BTreeMap<Label, String> = BTreeMap::new();
    let clock = Clock::new(known.iter().map(|backup| backup.stop_time).collect(), now);
    expire_fulls(&known, retention, (&clock, now), &mut gone);
    expire_diffs(&known, retention, &mut gone);
    let notes = match (retention.full, retention.full_type) {
        (Some(_), FullType::Time) => doubts(&known, &clock),
        _ => Vec::new(),
    };
    Decision { notes, ..decision(&known, gone, retention, clusters) }
}

/// Says which times are not believed.
fn doubts(known: &[Known], clock: &Clock) -> Vec<String> {
    let time = |seconds: i64| TimestampTz::from_unix_s(seconds).unwrap_or_default();
    let wrong = known.iter().enumerate().filter(|(number, _)| !clock.believes(*number)).map(|(_, of)| {
        format!(
            "backup {} says that it ended {}, which does not fit the others: a clock was wrong; it does not count as old",
            of.label,
            time(of.stop_time)
        )
    });
    wrong.collect()
}

/// What stays when a person removes one backup, and with it what is said to build on it.
///
/// # Errors
/// When that is the last full backup: says so.
pub fn remove_one(
    known: &[Known],
    label: Label,
    retention: &Retention,
    clusters: &[u32],
) -> std::result::Result<Decision, String> {
    let mut known = known.to_vec();
    known.sort_by_key(|backup| backup.label);
    let mut gone = BTreeMap::from([(label, "asked for".to_owned())]);
    match label.kind() {
        BackupKind::Full => take_set(&known, label, &format!("goes with {label}"), &mut gone),
        _ => take_followers(&known, label, &mut gone),
    }
    let full_stays = known.iter().any(|backup| is_full(backup) && !gone.contains_key(&backup.label));
    match full_stays {
        true => Ok(decision(&known, gone, retention, clusters)),
        false => Err(format!("{label} is the last full backup")),
    }
}

fn decision(known: &[Known], mut gone: BTreeMap<Label, String>, retention: &Retention, clusters: &[u32]) -> Decision {
    let kept: Vec<&Known> = known.iter().filter(|backup| !gone.contains_key(&backup.label)).collect();
    let archives = clusters.iter().map(|cluster| (*cluster, wal_rule(&kept, retention, *cluster, clusters))).collect();
    let fate = |backup: &Known| match gone.remove(&backup.label) {
        Some(why) => Fate { label: backup.label, keep: false, why },
        None => Fate { label: backup.label, keep: true, why: why_kept(backup, known, retention) },
    };
    Decision { backups: known.iter().map(fate).collect(), archives, notes: Vec::new() }
}

fn is_full(backup: &Known) -> bool {
    backup.label.kind() == BackupKind::Full
}

fn why_kept(backup: &Known, known: &[Known], retention: &Retention) -> String {
    let last = known.iter().filter(|backup| is_full(backup)).map(|backup| backup.label).next_back();
    match (retention.full, retention.full_type) {
        _ if Some(backup.label) == last => "the last full backup".into(),
        (None, _) => "no retention of full backups is set".into(),
        (Some(full), FullType::Count) => format!("among the last {full} full backups and what belongs to them"),
        (Some(days), FullType::Time) => format!("needed to reach back {days} days"),
    }
}

fn expire_fulls(
    known: &[Known],
    retention: &Retention,
    (clock, now): (&Clock, i64),
    gone: &mut BTreeMap<Label, String>,
) {
    let Some(count) = retention.full else { return };
    let fulls: Vec<&Known> = known.iter().filter(|backup| is_full(backup)).collect();
    // never the last one, whatever was asked for
    let (first_kept, why) = match retention.full_type {
        FullType::Count => (
            fulls.len().saturating_sub((count as usize).max(1)),
            format!("older than the last {count} full backups (repo-retention-full)"),
        ),
        FullType::Time => {
            // the newest one that is old enough stays: without it nobody could reach back that far
            let oldest = now.saturating_sub(i64::from(count) * 86_400);
            let is_old = |number: usize| is_full(&known[number]) && clock.at_most(number) <= oldest;
            let reaching = (0..known.len()).rev().find(|number| is_old(*number));
            let first_kept = reaching.map_or(0, |number| known[..number].iter().filter(|of| is_full(of)).count());
            (first_kept, format!("a newer full backup reaches back {count} days (repo-retention-full)"))
        }
    };
    for full in &fulls[..first_kept] {
        gone.insert(full.label, why.clone());
        take_set(known, full.label, &format!("goes with its full backup {}", full.label), gone);
    }
    // a set whose full backup is no more, as a run that died leaves it
    let Some(first) = fulls.get(first_kept) else { return };
    for backup in known.iter().filter(|backup| !is_full(backup) && backup.label.full() < first.label) {
        gone.entry(backup.label).or_insert_with(|| format!("its full backup {} is gone", backup.label.full()));
    }
}

fn take_set(known: &[Known], full: Label, why: &str, gone: &mut BTreeMap<Label, String>) {
    for backup in known.iter().filter(|backup| backup.label.full() == full) {
        gone.entry(backup.label).or_insert_with(|| why.to_owned());
    }
}

fn expire_diffs(known: &[Known], retention: &Retention, gone: &mut BTreeMap<Label, String>) {
    let Some(count) = retention.diff else { return };
    let counted: Vec<Label> = known
        .iter()
        .map(|backup| backup.label)
        .filter(|label| label.kind() != BackupKind::Incr && !gone.contains_key(label))
        .collect();
    let old = counted.len().saturating_sub((count as usize).max(1));
    for label in counted[..old].iter().filter(|label| label.kind() == BackupKind::Diff) {
        let why = format!("older than the last {count} differential or full backups (repo-retention-diff)");
        gone.insert(*label, why);
        take_followers(known, *label, gone);
    }
}

/// What was taken on top of a backup: itself complete, but it goes with it.
fn take_followers(known: &[Known], label: Label, gone: &mut BTreeMap<Label, String>) {
    let mut taken = BTreeSet::from([label]);
    // a child is always younger than its parent
    for backup in known {
        if backup.label.kind() == BackupKind::Incr && backup.prior.is_some_and(|prior| taken.contains(&prior)) {
            taken.insert(backup.label);
            gone.entry(backup.label).or_insert_with(|| format!("goes with {label}, on which it was taken"));
        }
    }
}

fn wal_rule(kept: &[&Known], retention: &Retention, cluster: u32, clusters: &[u32]) -> (WalRule, String) {
    let counts = |backup: &&&Known| backup.label.kind() <= retention.archive_type;
    let counted: Vec<Label> = kept.iter().filter(counts).map(|backup| backup.label).collect();
    let (cut, why) = match (retention.archive, retention.full) {
        (None, None) => return (WalRule::All, "no retention of WAL or full backups is set".into()),
        // as with pgBackRest, the WAL then goes with the full backups
        (None, Some(_)) => (kept.iter().filter(|backup| is_full(backup)).map(|backup| backup.label).next(), "full"),
        (Some(count), _) if counted.len() < count as usize => {
            let why = format!("{} of {count} backups that repo-retention-archive counts", counted.len());
            return (WalRule::All, why);
        }
        (Some(count), _) => {
            let at = counted.len() - (count as usize).max(1);
            (counted.get(at).copied(), "archive")
        }
    };
    let Some(cut) = cut else { return (WalRule::All, "there is no full backup".into()) };
    let ours: Vec<&&Known> = kept.iter().filter(|backup| backup.database == cluster).collect();
    if ours.is_empty() {
        return match clusters.last() == Some(&cluster) {
            true => (WalRule::All, "the current cluster has no backup yet".into()),
            false => (WalRule::From { first: None, ranges: Vec::new() }, "no backup of that cluster is left".into()),
        };
    }
    let first = ours.iter().filter(|backup| backup.label >= cut).map(|backup| backup.wal.0).min();
    let ranges = ours.iter().filter(|backup| backup.label < cut).map(|backup| backup.wal).collect();
    (WalRule::From { first, ranges }, format!("from the start of {cut} on (repo-retention-{why})"))
}

impl fmt::Display for WalRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("all"),
            Self::From { first: Some(first), ranges } if ranges.is_empty() => write!(f, "from {first} on"),
            Self::From { first: Some(first), ranges } => {
                write!(f, "from {first} on, and what {} older backups need", ranges.len())
            }
            Self::From { first: None, ranges } if ranges.is_empty() => f.write_str("none"),
            Self::From { first: None, ranges } => write!(f, "what {} backups need", ranges.len()),
        }
    }
}

#[cfg(test)]
mod tests;
