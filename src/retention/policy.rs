//! Which backups and which WAL a retention keeps. Pure: from what there is and what time it is to what goes, and why.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use crate::postgres::{BackupKind, Label, SegmentName, Timeline, TimestampTz};
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
    /// nothing speaks against it, so that older ones may go for it
    pub counts: bool,
}

impl Known {
    /// The timeline that it began on.
    fn timeline(&self) -> Timeline {
        self.wal.0.timeline()
    }

    /// Whether this later backup may stand for an earlier one: one of an older timeline of the same cluster cannot, since nothing
    /// of the newer one can be reached from it. It is of a server that went on after another was promoted.
    fn stands_for(&self, earlier: &Going<'_>) -> bool {
        let is_other = self.database != earlier.backup.database;
        self.label > earlier.backup.label && (is_other || self.timeline() >= earlier.timeline)
    }
}

/// A backup that would go, and the newest timeline of those that would go with it.
struct Going<'a> {
    backup: &'a Known,
    timeline: Timeline,
}

impl<'a> Going<'a> {
    fn new(known: &[Known], backup: &'a Known) -> Self {
        let (label, is_full) = (backup.label, is_full(backup));
        let goes = |of: &&Known| of.label.full() == label.full() && (is_full || of.label > label);
        let newest = known.iter().filter(goes).map(Known::timeline).max();
        Self { backup, timeline: newest.map_or(backup.timeline(), |newest| newest.max(backup.timeline())) }
    }
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
    /// the kept ones that must be sound, or those that go would be missed
    pub rests: Vec<Label>,
    /// the one from which on WAL stays, if without it older WAL would be missed
    pub cut: Option<Label>,
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
    let mut notes = match (retention.full, retention.full_type) {
        (Some(_), FullType::Time) => doubts(&known, &clock),
        _ => Vec::new(),
    };
    if retention.full.is_some() {
        notes.extend(other_timeline(&known));
    }
    let rests = rests(&known, &gone);
    Decision { notes, rests, ..decision(&known, gone, retention, clusters) }
}

/// The kept backups that stand for those that go: the newest, which a restore takes; the one behind them, which takes over their
/// points in time; and the newest of each cluster that loses one. Of those that go with their full backup, full ones; of the
/// others, differential ones too.
fn rests(known: &[Known], gone: &BTreeMap<Label, String>) -> Vec<Label> {
    let stays = |backup: &&Known| !gone.contains_key(&backup.label);
    let fulls: BTreeSet<Label> = known.iter().filter(stays).map(|of| of.label).filter(is_full_label).collect();
    let mut rests = BTreeSet::new();
    for kind in [BackupKind::Full, BackupKind::Diff] {
        let goes = |of: &&Known| !stays(of) && fulls.contains(&of.label.full()) == (kind == BackupKind::Diff);
        let going: Vec<&Known> = known.iter().filter(goes).collect();
        let kept: Vec<&Known> = known.iter().filter(stays).filter(|of| of.counts && of.label.kind() <= kind).collect();
        let last = going.iter().rfind(|of| of.label.kind() <= kind).or(going.first());
        let Some(last) = last.map(|of| of.label) else { continue };
        rests.extend(kept.iter().find(|of| of.label > last).map(|of| of.label));
        rests.extend(kept.last().map(|of| of.label));
        for cluster in going.iter().map(|of| of.database).collect::<BTreeSet<_>>() {
            let ours: Vec<&&Known> = kept.iter().filter(|of| of.database == cluster).collect();
            let newest = going.iter().filter(|of| of.database == cluster).max_by_key(|of| of.timeline());
            let newest = newest.map(|of| Going { backup: of, timeline: of.timeline() });
            rests.extend(ours.last().map(|of| of.label));
            rests.extend(
                ours.iter().rfind(|of| newest.as_ref().is_some_and(|newest| of.stands_for(newest))).map(|of| of.label),
            );
        }
    }
    rests.into_iter().rev().collect()
}

/// Says which full backup is the last that later ones do not stand for.
fn other_timeline(known: &[Known]) -> Option<String> {
    let is_left = |of: &&Known| is_left(known, of);
    known.iter().rfind(is_left).map(|of| {
        format!(
            "backup {} is of timeline {} with what builds on it, newer than that of later backups: these do not stand for it, and it stays. If that \
             timeline is given up, \"pgcairn expire --set {}\" removes it",
            of.label,
            Going::new(known, of).timeline,
            of.label
        )
    })
}

/// Whether a later full backup does not stand for this full one.
fn is_left(known: &[Known], of: &Known) -> bool {
    let going = Going::new(known, of);
    let mut later = known.iter().filter(|later| is_full(later) && later.label > of.label);
    is_full(of) && later.any(|later| !later.stands_for(&going))
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
    let cut = cut(&kept, retention);
    let rule = |cluster: u32| match &cut {
        Ok((cut, why)) => wal_rule(&kept, *cut, why, cluster, clusters),
        Err(why) => (WalRule::All, why.clone()),
    };
    let archives = clusters.iter().map(|cluster| (*cluster, rule(*cluster))).collect();
    let fate = |backup: &Known| match gone.remove(&backup.label) {
        Some(why) => Fate { label: backup.label, keep: false, why },
        None => Fate { label: backup.label, keep: true, why: why_kept(backup, known, retention) },
    };
    // WAL before the first kept backup is of no use to any
    let cut = cut.ok().map(|(cut, _)| cut).filter(|cut| kept.iter().any(|backup| backup.label < *cut));
    Decision { backups: known.iter().map(fate).collect(), archives, rests: Vec::new(), cut, notes: Vec::new() }
}

fn is_full(backup: &Known) -> bool {
    is_full_label(&backup.label)
}

fn is_full_label(label: &Label) -> bool {
    label.kind() == BackupKind::Full
}

fn why_kept(backup: &Known, known: &[Known], retention: &Retention) -> String {
    let last = known.iter().filter(|backup| is_full(backup)).map(|backup| backup.label).next_back();
    let that_count = if known.iter().all(|backup| backup.counts) { "" } else { " that count" };
    match (retention.full, retention.full_type) {
        _ if !backup.counts => "it does not count: it is not proved".into(),
        _ if Some(backup.label) == last => "the last full backup".into(),
        (None, _) => "no retention of full backups is set".into(),
        _ if is_left(known, backup) => "not all later backups are of its timeline or a newer one".into(),
        (Some(full), FullType::Count) => {
            format!("among the last {full} full backups{that_count} and what belongs to them")
        }
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
    let counted: Vec<usize> = (0..known.len()).filter(|at| is_full(&known[*at]) && known[*at].counts).collect();
    // never the last one, whatever was asked for
    let (least, standing, why) = match retention.full_type {
        FullType::Count => (
            (count as usize).max(1),
            counted,
            format!("older than the last {count} full backups (repo-retention-full)"),
        ),
        FullType::Time => {
            // the newest one that is old enough stays: without it nobody could reach back that far
            let oldest = now.saturating_sub(i64::from(count) * 86_400);
            (
                1,
                counted.into_iter().filter(|at| clock.at_most(*at) <= oldest).collect(),
                format!("a newer full backup reaches back {count} days (repo-retention-full)"),
            )
        }
    };
    let goes = |of: &&Known| {
        let going = Going::new(known, of);
        standing.iter().filter(|at| known[**at].stands_for(&going)).count() >= least
    };
    for full in known.iter().filter(|of| is_full(of)).filter(goes).map(|of| of.label) {
        gone.insert(full, why.clone());
        take_set(known, full, &format!("goes with its full backup {full}"), gone);
    }
    // a set whose full backup is no more, as a run that died leaves it
    let fulls: BTreeSet<Label> = known.iter().map(|backup| backup.label).filter(is_full_label).collect();
    let is_kept = |backup: &&Known| is_full(backup) && backup.counts && !gone.contains_key(&backup.label);
    let kept: Vec<&Known> = known.iter().filter(is_kept).collect();
    for backup in known.iter().filter(|backup| !fulls.contains(&backup.label.full())) {
        let is_older = kept.first().is_some_and(|first| backup.label.full() < first.label);
        if is_older && kept.iter().any(|full| full.stands_for(&Going::new(known, backup))) {
            gone.entry(backup.label).or_insert_with(|| format!("its full backup {} is gone", backup.label.full()));
        }
    }
}

fn take_set(known: &[Known], full: Label, why: &str, gone: &mut BTreeMap<Label, String>) {
    for backup in known.iter().filter(|backup| backup.label.full() == full) {
        gone.entry(backup.label).or_insert_with(|| why.to_owned());
    }
}

fn expire_diffs(known: &[Known], retention: &Retention, gone: &mut BTreeMap<Label, String>) {
    let Some(count) = retention.diff else { return };
    let stays = |backup: &&Known| backup.label.kind() != BackupKind::Incr && !gone.contains_key(&backup.label);
    let counted: Vec<&Known> = known.iter().filter(stays).filter(|backup| backup.counts).collect();
    let is_old = |of: &&Known| {
        let going = Going::new(known, of);
        let standing = counted.iter().filter(|later| later.stands_for(&going)).count();
        of.label.kind() == BackupKind::Diff && standing >= (count as usize).max(1)
    };
    let old: Vec<Label> = known.iter().filter(stays).filter(is_old).map(|of| of.label).collect();
    for label in old {
        let why = format!("older than the last {count} differential or full backups (repo-retention-diff)");
        gone.insert(label, why);
        take_followers(known, label, gone);
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

/// The backup from which on WAL stays, and by which option; or why all of it does.
fn cut(kept: &[&Known], retention: &Retention) -> std::result::Result<(Label, &'static str), String> {
    let counts = |backup: &&&Known| backup.label.kind() <= retention.archive_type && backup.counts;
    let counted: Vec<Label> = kept.iter().filter(counts).map(|backup| backup.label).collect();
    let (cut, why) = match (retention.archive, retention.full) {
        (None, None) => return Err("no retention of WAL or full backups is set".into()),
        // as with pgBackRest, the WAL then goes with the full backups
        (None, Some(_)) => (kept.iter().find(|backup| is_full(backup)).map(|backup| backup.label), "full"),
        (Some(count), _) if counted.len() < count as usize => {
            return Err(format!("{} of {count} backups that repo-retention-archive counts", counted.len()));
        }
        (Some(count), _) => {
            let at = counted.len() - (count as usize).max(1);
            (counted.get(at).copied(), "archive")
        }
    };
    cut.map(|cut| (cut, why)).ok_or_else(|| "there is no full backup".into())
}

fn wal_rule(kept: &[&Known], cut: Label, why: &str, cluster: u32, clusters: &[u32]) -> (WalRule, String) {
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
