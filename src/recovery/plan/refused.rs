//! Why a point cannot be reached, and what can.

use super::{Bound, Search};
use crate::error::{Error, Result};
use crate::postgres::wal::coverage::{Road, RoadEnd};
use crate::postgres::{Timeline, TimelineHistory, TimestampTz};
use crate::recovery::window::Range;

/// How a moment gets into the archive that is not in it yet. A switch alone tells no time.
pub(super) const ARCHIVE_IT: &str = "what was written since is archived when its segment is full, or at once by \
                                     \"pgcairn check\" (it notes a restore point, and runs \"SELECT pg_switch_wal()\")";

impl Search<'_> {
    pub(super) fn no_backup(&self) -> Error {
        let stanza = self.horizon.times().database();
        match &self.point.label {
            Some(label) => Error::new(format!("backup {label} is not on the timeline that is asked for"))
                .hint("give another --target-timeline, or none"),
            None => Error::new(format!("there is no backup of PostgreSQL {} on that timeline", stanza.version))
                .hint("\"pgcairn info\" shows what there is"),
        }
    }

    /// The point lies before what the oldest backup, or the one named, can reach.
    pub(super) fn before(&self, history: &TimelineHistory, at: Option<TimestampTz>) -> Result<Error> {
        let what = match &self.point.label {
            Some(label) => format!("{} is before backup {label} is consistent", self.point.target),
            None => format!("{} is before the first backup of timeline {}", self.point.target, history.timeline),
        };
        self.hinted(Error::new(what), history, at)
    }

    /// The point lies behind the end of a road.
    pub(super) fn behind(&self, history: &TimelineHistory, road: &Road, at: Option<TimestampTz>) -> Result<Error> {
        let target = &self.point.target;
        let error = match road.end {
            RoadEnd::Gap { missing, then } => Error::new(format!(
                "{target} cannot be reached: WAL segment {missing} is missing, the next there is {then}"
            )),
            RoadEnd::Open => Error::new(format!("{target} is not in the archive, which ends at {}", road.end_lsn())),
        };
        self.hinted(error, history, at)
    }

    /// The moments nearest to what was asked for.
    pub(super) fn hinted(&self, error: Error, history: &TimelineHistory, at: Option<TimestampTz>) -> Result<Error> {
        let ranges = self.horizon.ranges(history)?;
        let near = nearest(&ranges, at);
        let listed: Vec<String> = near.iter().map(|range| range.to_string()).collect();
        let mut hint = match listed.is_empty() {
            true => format!("timeline {} has no backup; see \"pgcairn info\"", history.timeline),
            false => format!("timeline {} can be reached {}", history.timeline, listed.join(", and ")),
        };
        if let Some(at) = at {
            for timeline in self.others_reaching(history, at)? {
                hint.push_str(&format!("; --target-timeline {timeline} reaches it"));
            }
            if ranges.last().is_some_and(|last| last.to.is_none_or(|to| to < at) && last.end == RoadEnd::Open) {
                hint.push_str(&format!("; {ARCHIVE_IT}"));
                if self.bound == Bound::Archive {
                    hint.push_str("; \"--type=default\" is the end of the archive");
                }
            }
        }
        Ok(error.hint(hint))
    }

    /// Other timelines on which a moment lies.
    pub(super) fn others_reaching(&self, history: &TimelineHistory, at: TimestampTz) -> Result<Vec<Timeline>> {
        let mut reaching = Vec::new();
        for timeline in self.horizon.timelines().into_iter().filter(|timeline| *timeline != history.timeline) {
            let ranges = self.horizon.ranges(&self.horizon.coverage().history(timeline))?;
            reaching.extend(ranges.iter().any(|range| range.contains(at)).then_some(timeline));
        }
        Ok(reaching)
    }
}

/// The ranges on both sides of a moment; without one, the last two.
fn nearest(ranges: &[Range], at: Option<TimestampTz>) -> &[Range] {
    let next = match at {
        Some(at) => ranges.partition_point(|range| range.from.stop_s <= at.unix_s()),
        None => ranges.len(),
    };
    &ranges[next.saturating_sub(1).min(ranges.len().saturating_sub(2))..ranges.len().min(next + 1)]
}
