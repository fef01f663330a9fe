//! The way to a point: which backup, along which timeline, what PostgreSQL is told, which WAL it needs for that.

mod instead;
mod near;
mod refused;

use serde::{Deserialize, Serialize};

use super::crossing::{self, StopPoint};
use super::outline::Outline;
pub use super::settings::{Reached, Recovery};
use super::target::{Point, Target, TargetTimeline};
use super::window::{Horizon, Stone};
use crate::error::{Error, Result};
use crate::postgres::wal::coverage::{Road, RoadEnd};
use crate::postgres::wal::records::Event;
use crate::postgres::{Lsn, Timeline, TimelineHistory, TimestampTz};
use crate::repo::Repository;

/// A point that was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Course {
    /// the backup to start from
    pub label: String,
    /// what is done beyond its consistency; none: nothing
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recovery: Option<Recovery>,
}

/// Why there is no way to a point.
#[derive(Debug)]
pub enum NoCourse {
    /// the repository cannot reach it
    Unreachable(Error),
    /// it could not be found out
    Failed(Error),
}

impl From<Error> for NoCourse {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl From<NoCourse> for Error {
    fn from(none: NoCourse) -> Self {
        match none {
            NoCourse::Unreachable(error) | NoCourse::Failed(error) => error,
        }
    }
}

/// Shorthand.
type Found<T> = std::result::Result<T, NoCourse>;

/// How strictly a recovery is bound to what is in the archive now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound {
    /// to exactly that: the end of the archive is a position, and nothing later is waited for
    Archive,
    /// the same; the end of the archive will do for a time of which nothing there says that it was
    /// reached
    ArchiveEnd,
    /// PostgreSQL asks the archive itself: its end is where that says so
    Open,
}

impl Course {
    /// Finds the way to a point.
    ///
    /// # Errors
    /// With the nearest moments that can be reached as a hint.
    pub fn find(
        repository: &Repository,
        point: &Point,
        bound: Bound,
        outline: impl FnOnce() -> Result<Outline>,
    ) -> Found<Self> {
        if matches!(point.target, Target::None | Target::Preserve) {
            let label = repository.resolve(point.label.as_deref().unwrap_or("latest"))?;
            return Ok(Self { label, recovery: None });
        }
        if let Some(label) = &point.label {
            repository.resolve(label)?;
        }
        let outline = outline()?;
        if let Some(course) = near::find(&outline, point, bound)? {
            return Ok(course);
        }
        let horizon = outline.whole()?;
        Search { horizon: &horizon, point, bound }.course()
    }
}

/// One search for one point.
struct Search<'a> {
    horizon: &'a Horizon,
    point: &'a Point,
    bound: Bound,
}

/// Where recovery starts, along what, and how far.
struct Way<'a> {
    stone: &'a Stone,
    history: TimelineHistory,
    road: Road,
    target: Option<(&'static str, String)>,
    reaches: Option<StopPoint>,
    /// the moment that was asked for, where nothing says that this is it
    wanted: Option<TimestampTz>,
    notes: Vec<String>,
}

impl<'a> Way<'a> {
    fn new(stone: &'a Stone, history: &TimelineHistory, road: Road, target: Option<(&'static str, String)>) -> Self {
        Self { stone, history: history.clone(), road, target, reaches: None, wanted: None, notes: Vec::new() }
    }
}

impl Search<'_> {
    fn course(&self) -> Found<Course> {
        let histories = self.histories()?;
        let mut refused = None;
        for history in &histories {
            match self.way(history) {
                Ok(way) => return Ok(self.settle(way)),
                Err(NoCourse::Unreachable(error)) => _ = refused.get_or_insert(error),
                Err(failed) => return Err(failed),
            }
        }
        if let Some(way) = self.end_instead(&histories)? {
            return Ok(self.settle(way));
        }
        let none = || self.no_backup();
        Err(NoCourse::Unreachable(refused.unwrap_or_else(none)))
    }

    fn way(&self, history: &TimelineHistory) -> Found<Way<'_>> {
        match &self.point.target {
            Target::Time(moment) => self.to_time(history, moment.at),
            Target::Lsn(lsn) => self.to_lsn(history, *lsn),
            Target::Xid(xid) => self.to_xid(history, *xid),
            Target::Name(name) => self.to_name(history, name),
            _ => self.without_target(history),
        }
    }

    /// The histories along which to search, the preferred one first. Only `current` leaves a choice: each backup has its own.
    fn histories(&self) -> Found<Vec<TimelineHistory>> {
        let horizon = self.horizon;
        let history = |timeline: Timeline| horizon.coverage().history(timeline);
        let own =
            self.point.label.as_ref().and_then(|label| horizon.stones().iter().find(|stone| stone.label == *label));
        Ok(match self.point.timeline {
            TargetTimeline::Id(timeline) => {
                let known = horizon.timelines();
                if !known.contains(&timeline) {
                    let list: Vec<String> = known.iter().map(ToString::to_string).collect();
                    let error = Error::new(format!("the archive has no timeline {timeline}"));
                    return Err(NoCourse::Unreachable(error.hint(format!("its timelines: {}", list.join(", ")))));
                }
                vec![history(timeline)]
            }
            TargetTimeline::Current => match own {
                Some(stone) => vec![history(stone.timeline)],
                None => {
                    let mut timelines: Vec<Timeline> = horizon.stones().iter().map(|stone| stone.timeline).collect();
                    timelines.sort_unstable();
                    timelines.dedup();
                    timelines.into_iter().rev().map(history).collect()
                }
            },
            // a consistent backup is on its own timeline, whatever came later
            TargetTimeline::Latest if self.point.target == Target::Immediate => {
                own.or(horizon.stones().last()).map(|stone| history(stone.timeline)).into_iter().collect()
            }
            TargetTimeline::Latest => {
                let newest_first = horizon.archived_timelines().into_iter().rev().map(history);
                newest_first.filter(|history| own.is_none_or(|stone| stone.is_on(history))).take(1).collect()
            }
        })
    }

    fn without_target(&self, history: &TimelineHistory) -> Found<Way<'_>> {
        let stone = self.horizon.stones().iter().rev();
        let named = |stone: &&Stone| self.point.label.as_ref().is_none_or(|label| stone.label == *label);
        let stone = stone.filter(named).find(|stone| stone.is_on(history));
        let stone = stone.ok_or_else(|| NoCourse::Unreachable(self.no_backup()))?;
        let road = self.consistent_road(stone, history)?;
        if self.point.target == Target::Immediate {
            return Ok(self.up_to_stop(stone, history, &road, None));
        }
        let end = self.horizon.end_of(&road)?;
        let last = end.last_stop.filter(|last| last.lsn >= stone.stop);
        let mut notes = Vec::new();
        if let RoadEnd::Gap { missing, then } = road.end {
            let reached =
                last.map_or_else(|| format!("with backup {}", stone.label), |last| format!("at {}", last.time));
            notes.push(format!(
                "WAL segment {missing} is missing, the next there is {then}: recovery ends before it, at LSN {}; the \
                 last transaction that can be reached ended {reached}",
                road.end_lsn()
            ));
        }
        let way = match self.bound {
            Bound::Archive | Bound::ArchiveEnd
                if last.is_some() || end.last_record.is_none_or(|(_, lsn)| lsn < stone.stop) =>
            {
                let way = self.up_to_stop(stone, history, &road, last);
                Way { road, ..way }
            }
            // a long transaction that has not ended
            Bound::Archive | Bound::ArchiveEnd => {
                let target = end.last_record.map(|(_, lsn)| ("recovery_target_lsn", lsn.to_string()));
                Way::new(stone, history, road, target)
            }
            Bound::Open => Way { reaches: last, ..Way::new(stone, history, road, None) },
        };
        Ok(Way { notes, ..way })
    }

    /// The road behind a backup, which must reach where that is consistent.
    fn consistent_road(&self, stone: &Stone, history: &TimelineHistory) -> Found<Road> {
        let road = self.horizon.road(stone, history)?;
        let begins_behind = road.legs.first().is_none_or(|leg| {
            self.horizon.coverage().size().first_lsn(leg.first).is_some_and(|first| first >= stone.stop)
        });
        if road.end_lsn() >= stone.stop || (begins_behind && self.holds_wal(stone)?) {
            return Ok(road);
        }
        let missing = match road.end {
            RoadEnd::Gap { missing, .. } => missing.to_string(),
            RoadEnd::Open => format!("up to {}", stone.stop),
        };
        let error = Error::new(format!("backup {} needs WAL {missing}, which is missing", stone.label));
        Err(NoCourse::Unreachable(error.hint("choose an earlier point, or another backup; see \"pgcairn info\"")))
    }

    fn holds_wal(&self, stone: &Stone) -> Result<bool> {
        Ok(self.horizon.repository().description(&stone.label)?.wal_stored)
    }

    fn to_time(&self, history: &TimelineHistory, at: TimestampTz) -> Found<Way<'_>> {
        let Some(stone) = self.stone_before(history, at)? else {
            return Err(NoCourse::Unreachable(self.before(history, Some(at))?));
        };
        let road = self.consistent_road(stone, history)?;
        let search = crossing::Search {
            horizon: self.horizon,
            road: &road,
            start: stone.stop,
            at,
            exclusive: self.point.exclusive,
        };
        if let Some(found) = search.find()? {
            let way = self.up_to_stop(stone, history, &road, found.last);
            return Ok(Way { notes: found.warning.into_iter().collect(), ..way });
        }
        // nothing ended after it, but something else proves that the archive goes on beyond it
        let end = self.horizon.end_of(&road)?;
        match end.latest.filter(|latest| *latest > at && road.end == RoadEnd::Open).and(end.last_record) {
            Some((_, lsn)) if lsn >= stone.stop => Ok(self.up_to_stop(stone, history, &road, search.last_of_road()?)),
            _ => Err(NoCourse::Unreachable(self.behind(history, &road, Some(at))?)),
        }
    }

    /// The newest backup before whose consistency no transaction ended after the moment, by the times
    /// in the WAL. The times of backups say where to begin to look: they are another clock's.
    fn stone_before(&self, history: &TimelineHistory, at: TimestampTz) -> Result<Option<&Stone>> {
        let stones: Vec<&Stone> = self.own_stones(history).collect();
        let is_before = |stone: &Stone| -> Result<bool> {
            let last = self.horizon.last_told_before(history, stone.stop)?;
            let Some(last) = last else { return Ok(stone.stop_s <= at.unix_s()) };
            Ok(if self.point.exclusive { last < at } else { last <= at })
        };
        let hint = stones.iter().position(|stone| stone.stop_s <= at.unix_s()).unwrap_or(stones.len());
        let mut chosen = hint;
        while let Some(stone) = stones.get(chosen)
            && !is_before(stone)?
        {
            chosen += 1;
        }
        while chosen <= hint
            && let Some(newer) = chosen.checked_sub(1)
            && is_before(stones[newer])?
        {
            chosen = newer;
        }
        Ok(stones.get(chosen).copied())
    }

    /// To the end of a transaction, after which recovery stops; without one, to the backup's consistency.
    /// What lies between that and the target changes nothing that can be seen, but holds locks of
    /// transactions that had not ended, for which a server that waits there would wait for ever.
    fn up_to_stop<'a>(
        &self,
        stone: &'a Stone,
        history: &TimelineHistory,
        road: &Road,
        last: Option<StopPoint>,
    ) -> Way<'a> {
        let (target, index) = match last {
            // the record may go on in the next segment
            Some(last) => {
                (("recovery_target_lsn", last.lsn.to_string()), road.index_of(last.lsn).map(|index| index + 1))
            }
            None => {
                let index = road.index_of(Lsn(stone.stop.0.saturating_sub(1)));
                (("recovery_target", "immediate".to_owned()), Some(index.unwrap_or(0)))
            }
        };
        let road = road.up_to(index.unwrap_or(u64::MAX - 1));
        Way { reaches: last, ..Way::new(stone, history, road, Some(target)) }
    }

    fn to_lsn(&self, history: &TimelineHistory, lsn: Lsn) -> Found<Way<'_>> {
        let Some(stone) = self.own_stones(history).find(|stone| stone.stop <= lsn) else {
            return Err(NoCourse::Unreachable(self.before(history, None)?));
        };
        let road = self.consistent_road(stone, history)?;
        let last = self.horizon.end_of(&road)?.last_record;
        match (road.index_of(lsn), last) {
            (Some(index), Some((_, last))) if last >= lsn => {
                let target = Some(("recovery_target_lsn", lsn.to_string()));
                // the record there may begin, or go on, in the next segment
                let road = road.up_to(index + 1);
                Ok(Way::new(stone, history, road, target))
            }
            _ => Err(NoCourse::Unreachable(self.behind(history, &road, None)?)),
        }
    }

    fn to_xid(&self, history: &TimelineHistory, xid: u32) -> Found<Way<'_>> {
        let mut found = None;
        self.horizon.each_stretch(history, &mut |stone, road, from, to| {
            self.horizon.look_at(road, from, to)?;
            for index in from..to {
                if !self.horizon.segment(road, index)?.may_end(xid) {
                    continue;
                }
                self.horizon.events(road, index, &mut |lsn, event| match event {
                    Event::End { xid: ended, .. } if *ended == xid && lsn >= stone.stop => found = Some(lsn),
                    _ => {}
                })?;
            }
            Ok(found.is_none())
        })?;
        let Some(lsn) = found else {
            let error = Error::new(format!("transaction {xid} does not end in the WAL that can be reached"));
            return Err(NoCourse::Unreachable(self.hinted(error, history, None)?));
        };
        self.to_record(history, lsn, !self.point.exclusive)
    }

    fn to_name(&self, history: &TimelineHistory, name: &str) -> Found<Way<'_>> {
        let points = self.horizon.restore_points(history)?;
        let named: Vec<_> = points.iter().filter(|point| point.name == name).collect();
        match named[..] {
            [point] => self.to_record(history, Lsn(point.lsn), false),
            [] => {
                let error = Error::new(format!("there is no restore point \"{name}\" in the WAL that can be reached"));
                let newest: Vec<String> =
                    points.iter().rev().take(5).map(|point| format!("\"{}\"", point.name)).collect();
                Err(NoCourse::Unreachable(match newest.is_empty() {
                    true => {
                        error.hint("the server makes one with pg_create_restore_point(); give a time or an LSN instead")
                    }
                    false => error.hint(format!("the newest are {}", newest.join(", "))),
                }))
            }
            [..] => {
                let all: Vec<String> =
                    named.iter().map(|point| format!("{} ({})", Lsn(point.lsn), point.at())).collect();
                let error =
                    Error::new(format!("there are {} restore points \"{name}\": at {}", all.len(), all.join(" and ")));
                Err(NoCourse::Unreachable(error.hint("say which with --type lsn and its position")))
            }
        }
    }

    /// To a record that was found at `lsn`: with the end of a transaction there, or just before it.
    fn to_record(&self, history: &TimelineHistory, lsn: Lsn, with: bool) -> Found<Way<'_>> {
        let Some(stone) = self.own_stones(history).find(|stone| stone.stop <= lsn) else {
            return Err(NoCourse::Unreachable(self.before(history, None)?));
        };
        let road = self.consistent_road(stone, history)?;
        let Some(index) = road.index_of(lsn) else {
            return Err(NoCourse::Unreachable(self.behind(history, &road, None)?));
        };
        let at = TimestampTz(i64::MAX);
        let search = crossing::Search { horizon: self.horizon, road: &road, start: stone.stop, at, exclusive: false };
        let end = if with { Lsn(lsn.0.saturating_add(1)) } else { lsn };
        // a record that goes on in the next segment is told there
        let index = (index + 1).min(road.len().saturating_sub(1));
        let last = search.last_before(index, end)?;
        Ok(self.up_to_stop(stone, history, &road, last))
    }

    fn own_stones(&self, history: &TimelineHistory) -> std::vec::IntoIter<&Stone> {
        let history = history.clone();
        let stones: Vec<&Stone> = self.horizon.stones().iter().rev().collect();
        let named = |stone: &&Stone| self.point.label.as_ref().is_none_or(|label| stone.label == *label);
        stones.into_iter().filter(|stone| stone.is_on(&history)).filter(named).collect::<Vec<_>>().into_iter()
    }

    fn settle(&self, way: Way<'_>) -> Course {
        let Way { stone, history, road, target, reaches, wanted, notes } = way;
        let mut settings = Vec::new();
        let has_target = target.is_some();
        if let Some((name, value)) = target {
            let takes_inclusive =
                matches!(name, "recovery_target_time" | "recovery_target_xid" | "recovery_target_lsn");
            // the end of the archive, or of what proves a time, is always wanted with its last record
            let is_last_record = name == "recovery_target_lsn" && !matches!(self.point.target, Target::Lsn(_));
            let exclusive = self.point.exclusive && !is_last_record;
            settings.push((name.to_owned(), value));
            if takes_inclusive {
                settings
                    .push(("recovery_target_inclusive".to_owned(), if exclusive { "off" } else { "on" }.to_owned()));
            }
        }
        let follows = matches!(self.point.target, Target::Standby | Target::End) && self.bound == Bound::Open;
        let timeline = match self.point.timeline {
            TargetTimeline::Latest if follows && self.horizon.timelines().last() == Some(&history.timeline) => {
                "latest".to_owned()
            }
            _ if history.timeline == stone.timeline => "current".to_owned(),
            _ => history.timeline.to_string(),
        };
        settings.push(("recovery_target_timeline".to_owned(), timeline));
        let histories = history.ancestors.iter().map(|ancestor| ancestor.timeline).chain([history.timeline]);
        let histories =
            histories.filter(|timeline| *timeline != Timeline(1) && self.horizon.coverage().has_history(*timeline));
        let recovery = Recovery {
            major: self.horizon.times().database().version,
            standby: self.point.target == Target::Standby,
            settings,
            has_target,
            wal: road.legs.iter().map(|leg| (leg.timeline.0, leg.first, leg.last)).collect(),
            histories: histories.map(|timeline| timeline.0).collect(),
            to: self.point.target.to_string(),
            reaches: reaches.map(Reached::from),
            wanted: wanted.map(|wanted| wanted.to_string()),
            notes,
        };
        Course { label: stone.label.clone(), recovery: Some(recovery) }
    }
}
