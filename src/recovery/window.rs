//! Which moments can be reached: the backups of a cluster, the WAL behind each, and the times in it.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use super::crossing::{OUT_OF_ORDER_US, StopPoint};
use super::outline::{Known, Outline};
use super::wal_times::{RestorePoint, SegmentTimes, Times};
use crate::error::{Context, Error, Result};
use crate::format::info::BackupSummary;
use crate::postgres::wal::coverage::{Coverage, Road, RoadEnd};
use crate::postgres::wal::landmarks::is_own_restore_point;
use crate::postgres::wal::records::Event;
use crate::postgres::{Lsn, SegmentName, Timeline, TimelineHistory, TimestampTz};
use crate::repo::Repository;

/// Segments at a road's end that are searched for the last time before the answer is "unknown".
pub(super) const LOOK_BACK: u64 = 64;

/// A backup, as far as points are concerned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stone {
    /// its label
    pub label: String,
    /// its timeline
    pub timeline: Timeline,
    /// where replay starts
    pub start: Lsn,
    /// where it is consistent
    pub stop: Lsn,
    /// when it had stopped, in seconds since 1970
    pub stop_s: i64,
}

/// A stretch of time without a gap.
#[derive(Clone, Debug)]
pub struct Range {
    /// the backup it begins with
    pub from: Stone,
    /// the last end of a transaction in it; unknown where none was found, or the WAL cannot be read
    pub to: Option<TimestampTz>,
    /// one past its last byte of WAL
    pub to_lsn: Lsn,
    /// why it ends
    pub end: RoadEnd,
}

/// All that is known of what one cluster's repository can reach.
#[derive(Debug)]
pub struct Horizon {
    repository: Repository,
    stones: Vec<Stone>,
    coverage: Coverage,
    /// segments in which a restore point may begin, by their keys
    points: HashSet<SegmentName>,
    times: Times,
}

impl Horizon {
    /// Looks at the catalog and lists the archive of the cluster that backup `label` is of; without a label, the current one's.
    /// Times found in the WAL are kept below `cache`.
    pub fn load(repository: &Repository, label: Option<&str>, cache: Option<&Path>) -> Result<Self> {
        Outline::load(repository, label, cache)?.whole()
    }

    pub(super) fn new(repository: Repository, stones: Vec<Stone>, known: Known, times: Times) -> Self {
        let Known { coverage, points } = known;
        Self { repository, stones, coverage, points, times }
    }

    /// The repository.
    pub fn repository(&self) -> &Repository {
        &self.repository
    }

    /// The WAL there is.
    pub fn coverage(&self) -> &Coverage {
        &self.coverage
    }

    /// The backups, oldest first.
    pub fn stones(&self) -> &[Stone] {
        &self.stones
    }

    /// The times in the WAL.
    pub fn times(&self) -> &Times {
        &self.times
    }

    /// Timelines that can be the newest, ascending: those of which there is WAL. One that only a backup with WAL of its own is on
    /// may be that of a copy; it counts only where there is no archive.
    pub fn archived_timelines(&self) -> Vec<Timeline> {
        let archived = self.coverage.timelines();
        if archived.is_empty() { self.timelines() } else { archived }
    }

    /// Timelines of backups and of WAL, ascending.
    pub fn timelines(&self) -> Vec<Timeline> {
        let mut all = self.coverage.timelines();
        all.extend(self.stones.iter().map(|stone| stone.timeline));
        all.sort_unstable();
        all.dedup();
        all
    }

    /// The backups that lie on a history, the newest first.
    pub fn on<'a>(&'a self, history: &'a TimelineHistory) -> impl DoubleEndedIterator<Item = &'a Stone> {
        self.stones.iter().rev().filter(|stone| stone.is_on(history))
    }

    /// The archived WAL behind a backup along a history. Where the backup holds its own WAL, it begins behind that.
    pub fn road(&self, stone: &Stone, history: &TimelineHistory) -> Result<Road> {
        let road = self.coverage.road(history, stone.start);
        if road.end_lsn() >= stone.stop || !self.repository.description(&stone.label)?.wal_stored {
            return Ok(road);
        }
        let size = self.coverage.size();
        let next = size.first_lsn(size.segment_of(Lsn(stone.stop.0.saturating_sub(1))) + 1);
        Ok(self.coverage.road(history, next.unwrap_or(stone.stop)))
    }

    /// What the segment at `index` of a road tells, the record that began before it included.
    pub fn segment(&self, road: &Road, index: u64) -> Result<Arc<SegmentTimes>> {
        let name = |index| road.segment(index).ok_or_else(|| Error::new(format!("the road has no segment {index}")));
        let times = self.times.of(name(index)?)?;
        match index.checked_sub(1) {
            Some(before) => Ok(Arc::new(times.joined(&*self.times.of(name(before)?)?, self.times.database())?)),
            None => Ok(times),
        }
    }

    /// Hands every event that the segment at `index` of a road tells to `each`, in order; that of the
    /// record which began before it comes first.
    pub fn events(&self, road: &Road, index: u64, each: &mut dyn FnMut(Lsn, &Event)) -> Result<()> {
        let before = index.checked_sub(1).and_then(|before| road.segment(before));
        match road.segment(index) {
            Some(name) => self.times.events(name, before, each),
            None => Ok(()),
        }
    }

    /// The first of these segments of a road in which a transaction ended that `passes`; times are
    /// taken to rise.
    pub fn first_passing(
        &self,
        road: &Road,
        within: std::ops::Range<u64>,
        passes: impl Fn(TimestampTz) -> bool,
    ) -> Result<Option<u64>> {
        let (mut low, mut high) = (within.start, within.end);
        let mut found = None;
        while low < high {
            let middle = low + (high - low) / 2;
            // in a segment in which none ended, the next one tells
            let mut probe = middle;
            let mut last = None;
            while probe < high {
                last = self.last_end(road, probe)?;
                if last.is_some() {
                    break;
                }
                probe += 1;
            }
            match last {
                Some(last) if !passes(last) => low = probe + 1,
                Some(_) => {
                    found = Some(probe);
                    high = middle;
                }
                None => high = middle,
            }
        }
        Ok(found)
    }

    /// The last time of a segment. That of a record which began before it is looked for only if the
    /// segment has no other.
    fn last_end(&self, road: &Road, index: u64) -> Result<Option<TimestampTz>> {
        let name = road.segment(index).ok_or_else(|| Error::new(format!("the road has no segment {index}")))?;
        let times = self.times.of(name)?;
        match times.last_end().is_none() && times.begins_with_rest() {
            true => Ok(self.segment(road, index)?.last_end()),
            false => Ok(times.last_end()),
        }
    }

    /// The last time that the WAL before `lsn` tells, if it is not far before. A clock that was set
    /// back meanwhile tells only what came after that.
    pub fn last_told_before(&self, history: &TimelineHistory, lsn: Lsn) -> Result<Option<TimestampTz>> {
        let size = self.coverage.size();
        let last = size.segment_of(Lsn(lsn.0.saturating_sub(1)));
        let mut checkpoint = None;
        for number in (last.saturating_sub(LOOK_BACK)..=last).rev() {
            let road = self.coverage.road(history, size.first_lsn(number).unwrap_or(lsn));
            let Some(name) = road.segment(0) else { break };
            let mut told: Option<TimestampTz> = None;
            let mut last_checkpoint = None;
            self.times.events(name, None, &mut |at, event| match event {
                Event::End { time, .. } | Event::RestorePoint { time, .. } | Event::Prepared { time } if at < lsn => {
                    let is_set_back = told.is_some_and(|told| told.0 - time.0 > OUT_OF_ORDER_US);
                    told = if is_set_back { Some(*time) } else { told.max(Some(*time)) };
                }
                // whole seconds, rounded down
                Event::Checkpoint { time, .. } if at < lsn => last_checkpoint = Some(TimestampTz(time.0 + 999_999)),
                _ => {}
            })?;
            if told.is_some() {
                return Ok(told);
            }
            checkpoint = checkpoint.or(last_checkpoint);
        }
        // where no transaction ended for so long, none ended after the checkpoint
        Ok(checkpoint)
    }

    /// Finds out what these segments of a road tell, and the one before them.
    pub fn look_at(&self, road: &Road, from: u64, to: u64) -> Result<()> {
        self.look_at_all(road, from.saturating_sub(1)..to)
    }

    /// The same of segments that need not be neighbours.
    pub fn look_at_each(&self, road: &Road, indexes: &[u64]) -> Result<()> {
        let mut all: Vec<u64> = indexes.iter().flat_map(|index| index.saturating_sub(1)..=*index).collect();
        all.sort_unstable();
        all.dedup();
        self.look_at_all(road, all)
    }

    fn look_at_all(&self, road: &Road, indexes: impl IntoIterator<Item = u64>) -> Result<()> {
        let names: Vec<SegmentName> = indexes.into_iter().filter_map(|index| road.segment(index)).collect();
        self.times.look_at(&names)
    }

    /// The last record of a road, the last time at which a transaction ended, and the last time that anything tells.
    pub fn end_of(&self, road: &Road) -> Result<RoadsEnd> {
        let mut end = RoadsEnd::default();
        let len = road.len();
        for index in (len.saturating_sub(LOOK_BACK)..len).rev() {
            let times = self.segment(road, index)?;
            end.last_record = end.last_record.or(times.last_record().map(|lsn| (index, lsn)));
            end.latest = end.latest.max(times.latest());
            end.last_end = end.last_end.or(times.last_end());
            end.last_stop = end.last_stop.or(times.last_stop());
            if end.last_end.is_some() && end.last_record.is_some() {
                break;
            }
        }
        Ok(end)
    }

    /// The restore points in the WAL behind the backups of a history, in order.
    pub fn restore_points(&self, history: &TimelineHistory) -> Result<Vec<RestorePoint>> {
        let mut found: Vec<RestorePoint> = Vec::new();
        self.each_stretch(history, &mut |stone, road, from, to| {
            // its record may end in the next segment, and is told there
            let begins = |index: u64| road.segment(index).is_some_and(|name| self.points.contains(&name));
            let telling: Vec<u64> =
                (from..to).filter(|index| begins(*index) || (*index > 0 && begins(index - 1))).collect();
            self.look_at_all(road, telling.iter().flat_map(|index| index.saturating_sub(1)..=*index))?;
            for index in telling {
                let times = self.segment(road, index)?;
                let is_shown =
                    |point: &&RestorePoint| Lsn(point.lsn) >= stone.stop && !is_own_restore_point(&point.name);
                let points = times.restore_points().iter().filter(is_shown);
                found.extend(points.cloned());
            }
            Ok(true)
        })?;
        found.sort_by_key(|point| point.lsn);
        found.dedup();
        Ok(found)
    }

    /// Calls `each` with a backup, its road, and which segments of that lie between this backup's consistency and where the
    /// newer ones began: the newest first, until it answers false.
    pub fn each_stretch(
        &self,
        history: &TimelineHistory,
        each: &mut dyn FnMut(&Stone, &Road, u64, u64) -> Result<bool>,
    ) -> Result<()> {
        let size = self.coverage.size();
        let mut done_from = u64::MAX;
        for stone in self.on(history) {
            let road = self.road(stone, history)?;
            let Some(first) = road.legs.first().map(|leg| leg.first) else { continue };
            let from = size.segment_of(stone.stop).saturating_sub(first);
            let to = road.len().min(done_from.saturating_sub(first));
            if from < to && !each(stone, &road, from, to)? {
                return Ok(());
            }
            // the segment in which this one became consistent may hold what only an older one reaches
            done_from = done_from.min(size.segment_of(stone.stop) + 1);
        }
        Ok(())
    }

    /// The stretches of time that can be reached along a history, oldest first.
    pub fn ranges(&self, history: &TimelineHistory) -> Result<Vec<Range>> {
        let mut ranges: Vec<(Range, Road)> = Vec::new();
        for stone in self.on(history).rev() {
            let continues = ranges.last().is_some_and(|(range, _)| stone.stop <= range.to_lsn);
            let road = match self.road(stone, history) {
                Ok(road) => road,
                Err(error) => {
                    tracing::warn!(%error, label = stone.label, "a backup is left out of what can be reached");
                    continue;
                }
            };
            let to_lsn = road.end_lsn().max(stone.stop);
            match ranges.last_mut().filter(|_| continues) {
                // of two that end at the same place the longer one has more times
                Some((range, _)) if to_lsn == range.to_lsn => range.end = road.end,
                Some((range, last)) if to_lsn > range.to_lsn => {
                    (range.to_lsn, range.end) = (to_lsn, road.end);
                    *last = road;
                }
                Some(_) => {}
                None => ranges.push((Range { from: stone.clone(), to: None, to_lsn, end: road.end }, road)),
            }
        }
        for (range, road) in &mut ranges {
            match self.end_of(road) {
                Ok(end) => range.to = end.last_end.filter(|last| last.unix_s() >= range.from.stop_s),
                Err(error) => tracing::warn!(%error, "the last time of a range cannot be found"),
            }
        }
        Ok(ranges.into_iter().map(|(range, _)| range).collect())
    }
}

/// What the last segments of a road tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RoadsEnd {
    /// index of the segment with the last whole record, and where that begins
    pub last_record: Option<(u64, Lsn)>,
    /// the last end of a transaction
    pub last_end: Option<TimestampTz>,
    /// the last end of a transaction, or the last that was prepared, with its place
    pub last_stop: Option<StopPoint>,
    /// the latest time of anything behind that, a checkpoint for one
    pub latest: Option<TimestampTz>,
}

impl Stone {
    pub(super) fn new(label: &str, of: &BackupSummary) -> Result<Self> {
        let lsn = |text: &str| text.parse::<Lsn>().context(|| format!("WAL position {text} of backup {label}"));
        let start: SegmentName = of.wal_start.parse().context(|| format!("first WAL segment of backup {label}"))?;
        Ok(Self {
            label: label.to_owned(),
            timeline: start.timeline(),
            start: lsn(&of.start_lsn)?,
            stop: lsn(&of.stop_lsn)?,
            stop_s: of.stop_time,
        })
    }

    /// Whether recovery from it can go along this history: the history must not have left its timeline before it stopped.
    pub fn is_on(&self, history: &TimelineHistory) -> bool {
        history.contains(self.timeline) && history.end_of(self.timeline).is_none_or(|end| self.stop <= end)
    }
}

impl Range {
    /// Whether a moment lies in it, by the clocks of its ends.
    pub fn contains(&self, at: TimestampTz) -> bool {
        self.from.stop_s <= at.unix_s() && self.to.is_some_and(|to| at < to)
    }
}

/// `from 2026-11-22 14:00:00+00 (0/3000100) to 2026-11-22 15:00:00.123456+00 (0/5000000)`
impl std::fmt::Display for Range {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let from = jiff::Timestamp::from_second(self.from.stop_s).ok();
        let from = from.and_then(|from| TimestampTz::from_unix_us(from.as_microsecond())).unwrap_or_default();
        write!(f, "from {from} (LSN {})", self.from.stop)?;
        match self.to {
            Some(to) => write!(f, " to {to} (LSN {})", self.to_lsn),
            None => write!(f, " to LSN {}", self.to_lsn),
        }
    }
}
