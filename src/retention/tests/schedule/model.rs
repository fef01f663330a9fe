//! What must be there: said in the plainest way, and of nothing but labels, times and numbers.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::format::chunk::ChunkRef;
use crate::postgres::BackupKind;
use crate::retention::expire::ExpireOptions;
use crate::retention::policy::FullType;

/// Content by path.
pub(super) type Files = BTreeMap<Vec<u8>, Vec<u8>>;

/// A backup that must be readable.
#[derive(Clone, Debug)]
pub(super) struct Moment {
    pub(super) kind: BackupKind,
    pub(super) prior: Option<String>,
    pub(super) time: i64,
    /// numbers of the first and the last segment that it needs
    pub(super) wal: (u64, u64),
    pub(super) files: Arc<Files>,
    /// every chunk that it needs
    pub(super) chunks: Vec<ChunkRef>,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Model {
    /// by label
    pub(super) backups: BTreeMap<String, Moment>,
    /// numbers of the segments that must be in the archive
    pub(super) wal: BTreeSet<u64>,
}

/// What an expire may take.
#[derive(Debug)]
pub(super) struct Taken {
    pub(super) backups: BTreeSet<String>,
    pub(super) wal: WalLeft,
}

/// The segments that an expire must leave.
#[derive(Clone, Debug)]
pub(super) enum WalLeft {
    All,
    From {
        /// the first from which on all stay
        first: u64,
        /// those of backups before
        ranges: Vec<(u64, u64)>,
    },
}

impl WalLeft {
    pub(super) fn has(&self, number: u64) -> bool {
        match self {
            Self::All => true,
            Self::From { first, ranges } => {
                number >= *first || ranges.iter().any(|(first, last)| (*first..=*last).contains(&number))
            }
        }
    }
}

/// The label of the full backup of a set.
fn set_of(label: &str) -> &str {
    label.split('_').next().unwrap_or_default()
}

impl Model {
    /// What an expire takes; `None`: it is refused, for no full backup would be left.
    pub(super) fn expired(&self, options: &ExpireOptions, now: i64) -> Option<Taken> {
        let backups = match &options.set {
            Some(label) => self.asked_for(label),
            None => self.outlived(options, now),
        };
        let left = self.backups.iter().filter(|(label, _)| !backups.contains(*label));
        let fulls = left.filter(|(_, of)| of.kind == BackupKind::Full).count();
        if options.set.is_some() && fulls == 0 {
            return None;
        }
        let wal = self.wal_left(&backups, options);
        Some(Taken { backups, wal })
    }

    fn asked_for(&self, label: &str) -> BTreeSet<String> {
        let mut gone = BTreeSet::from([label.to_owned()]);
        match self.backups[label].kind {
            BackupKind::Full => {
                gone.extend(self.backups.keys().filter(|other| set_of(other) == label).cloned());
            }
            _ => self.follow(label, &mut gone),
        }
        gone
    }

    /// Incremental backups that were taken on top of `label`, and on top of them.
    fn follow(&self, label: &str, gone: &mut BTreeSet<String>) {
        let mut on_top = BTreeSet::from([label.to_owned()]);
        for (label, of) in &self.backups {
            if of.kind == BackupKind::Incr && of.prior.as_ref().is_some_and(|prior| on_top.contains(prior)) {
                on_top.insert(label.clone());
            }
        }
        gone.extend(on_top);
    }

    fn outlived(&self, options: &ExpireOptions, now: i64) -> BTreeSet<String> {
        let mut gone = BTreeSet::new();
        let fulls: Vec<(&String, &Moment)> =
            self.backups.iter().filter(|(_, of)| of.kind == BackupKind::Full).collect();
        if let (Some(count), Some(last)) = (options.retention.full, fulls.len().checked_sub(1)) {
            let first_kept = match options.retention.full_type {
                FullType::Count => fulls.len().saturating_sub(count as usize).min(last),
                FullType::Time => {
                    let reaches = |(_, of): &(&String, &Moment)| of.time <= now - i64::from(count) * 86_400;
                    fulls.iter().rposition(reaches).unwrap_or(0)
                }
            };
            let first_kept = fulls[first_kept].0;
            gone.extend(self.backups.keys().filter(|label| set_of(label) < first_kept.as_str()).cloned());
        }
        if let Some(count) = options.retention.diff {
            let counted =
                self.backups.iter().filter(|(label, of)| of.kind != BackupKind::Incr && !gone.contains(*label));
            let counted: Vec<(&String, &Moment)> = counted.collect();
            let old = counted.len().saturating_sub(count.max(1) as usize);
            for (label, _) in counted[..old].iter().filter(|(_, of)| of.kind == BackupKind::Diff) {
                self.follow(label, &mut gone);
            }
        }
        gone
    }

    fn wal_left(&self, gone: &BTreeSet<String>, options: &ExpireOptions) -> WalLeft {
        let kept: Vec<(&String, &Moment)> = self.backups.iter().filter(|(label, _)| !gone.contains(*label)).collect();
        let counted = |least| kept.iter().filter(move |(_, of)| of.kind <= least).map(|(label, _)| *label);
        let from = match (options.retention.archive, options.retention.full) {
            (None, None) => None,
            (None, Some(_)) => counted(BackupKind::Full).next(),
            (Some(count), _) => {
                let counted: Vec<&String> = counted(options.retention.archive_type).collect();
                counted.len().checked_sub(count.max(1) as usize).map(|at| counted[at])
            }
        };
        let Some(from) = from else { return WalLeft::All };
        let first = kept.iter().filter(|(label, _)| *label >= from).map(|(_, of)| of.wal.0).min();
        WalLeft::From { first: first.unwrap_or(u64::MAX), ranges: kept.iter().map(|(_, of)| of.wal).collect() }
    }
}
