//! Which kind of backup is due.

use std::time::Duration;

use crate::format::info::BackupSummary;
use crate::postgres::BackupKind;
use crate::repo::clock::Clock;

/// How often backups of each kind are taken; incremental ones in between.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// time from one full backup to the next
    pub full_every: Duration,
    /// time from one full or differential backup to the next
    pub diff_every: Duration,
}

/// A timer does not fire at the same second each time: what is due so soon is due now.
const EARLY_MAX: Duration = Duration::from_secs(1800);

impl Schedule {
    /// The kind that is due at `now` (seconds since 1970), after these backups, in the order of their
    /// labels. A time that cannot be right counts as the one before it, so that a backup which a clock
    /// of the future dated does not put off the next for years.
    pub fn due<'a>(&self, backups: impl Iterator<Item = &'a BackupSummary>, now: i64) -> BackupKind {
        let backups: Vec<&BackupSummary> = backups.collect();
        let clock = Clock::new(backups.iter().map(|of| of.start_time).collect(), now);
        let last = |kinds: &[BackupKind]| {
            backups.iter().rposition(|of| kinds.contains(&of.kind)).and_then(|number| clock.at_least(number))
        };
        let is_due = |last: Option<i64>, every: Duration| {
            let early = EARLY_MAX.min(every / 4);
            last.is_none_or(|last| now.saturating_sub(last) >= (every - early).as_secs() as i64)
        };
        if is_due(last(&[BackupKind::Full]), self.full_every) {
            BackupKind::Full
        } else if is_due(last(&[BackupKind::Full, BackupKind::Diff]), self.diff_every) {
            BackupKind::Diff
        } else {
            BackupKind::Incr
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::BTreeMap;

    use super::*;

    const HOUR: i64 = 3600;
    const DAY: i64 = 24 * HOUR;

    /// A month of runs, `step` seconds apart and some seconds late or early: how many of each kind.
    fn month(step: i64) -> BTreeMap<BackupKind, usize> {
        let schedule =
            Schedule { full_every: Duration::from_secs(7 * 86_400), diff_every: Duration::from_secs(86_400) };
        let mut taken: Vec<BackupSummary> = Vec::new();
        let mut counts = BTreeMap::new();
        for (number, at) in (0..28 * DAY).step_by(step as usize).enumerate() {
            let now = 1_700_000_000 + at + [0, 7, -5][number % 3];
            let kind = schedule.due(taken.iter(), now);
            taken.push(summary(kind, now));
            *counts.entry(kind).or_default() += 1;
        }
        counts
    }

    fn summary(kind: BackupKind, start_time: i64) -> BackupSummary {
        let of = serde_json::json!({
            "type": kind, "pgcairn": "", "database-id": 1, "start-time": start_time, "stop-time": start_time,
            "start-lsn": "", "stop-lsn": "", "wal-start": "", "wal-stop": "", "page-errors": false,
            "sizes": {"database": 0, "read": 0, "stored-new": 0, "stored-all": 0, "files": 0},
        });
        serde_json::from_value(of).unwrap()
    }

    #[test]
    fn a_week_has_a_full_six_diffs_and_incrementals_between() {
        use BackupKind::{Diff, Full, Incr};
        assert_eq!(month(6 * HOUR), BTreeMap::from([(Full, 4), (Diff, 24), (Incr, 84)]));
        assert_eq!(month(DAY), BTreeMap::from([(Full, 4), (Diff, 24)]));
    }

    #[test]
    fn a_late_run_takes_what_was_missed() {
        let schedule =
            Schedule { full_every: Duration::from_secs(7 * 86_400), diff_every: Duration::from_secs(86_400) };
        assert_eq!(schedule.due([].iter(), 0), BackupKind::Full);
        let full = summary(BackupKind::Full, 0);
        assert_eq!(schedule.due([&full].into_iter(), 3 * DAY), BackupKind::Diff);
        assert_eq!(schedule.due([&full].into_iter(), 30 * DAY), BackupKind::Full);
        assert_eq!(schedule.due([&full].into_iter(), -DAY), BackupKind::Full, "a clock set back");
    }

    #[test]
    fn a_wrong_clock_does_not_put_off_the_next_full() {
        use BackupKind::{Diff, Full, Incr};
        let schedule =
            Schedule { full_every: Duration::from_secs(7 * 86_400), diff_every: Duration::from_secs(86_400) };
        let due = |taken: &[(BackupKind, i64)], now: i64| {
            let taken: Vec<BackupSummary> = taken.iter().map(|(kind, day)| summary(*kind, day * DAY)).collect();
            schedule.due(taken.iter(), now * DAY)
        };
        // a full of the year after
        assert_eq!(due(&[(Full, 0), (Full, 400), (Incr, 8)], 9), Full);
        assert_eq!(due(&[(Full, 400), (Incr, 1), (Incr, 2)], 9), Full);
        assert_eq!(due(&[(Full, 0), (Incr, 6), (Full, 400), (Incr, 8)], 9), Diff);
        // one of 1970
        assert_eq!(due(&[(Full, 10), (Incr, 16), (Full, -10_000), (Incr, 17)], 18), Diff);
        assert_eq!(due(&[(Full, 10), (Diff, 17), (Full, -10_000), (Incr, 17)], 17), Incr);
    }
}
