//! Where in the WAL a moment lies: between the last end of a transaction at or before it and the
//! first after it.
//!
//! Times of commits rise with the WAL, but for two things. Transactions that end at the same moment
//! may be some milliseconds out of order; there PostgreSQL's rule holds, recovery ends before the
//! first that is past the target. And a clock may be set: then a moment may lie at several places.
//! The first of them is taken, which never goes past the target, unless the archive proves that the
//! clock was ahead there: a commit cannot be later than the upload of its segment.

use super::window::Horizon;
use crate::error::Result;
use crate::postgres::wal::coverage::Road;
use crate::postgres::wal::records::Event;
use crate::postgres::{Lsn, TimestampTz};

/// A stretch of up to this many segments is looked at as a whole; of longer ones, samples.
const LOOKED_AT_WHOLE: u64 = 32;
const SAMPLES: u64 = 16;
/// Segments on both sides of a place that are looked at.
const NEIGHBOURS: u64 = 3;
/// How far times of commits may be out of order in a server whose clock is not set.
pub(super) const OUT_OF_ORDER_US: i64 = 10_000_000;
/// How much later than its upload the last commit of a segment must be to prove a wrong clock.
const PROVES_AHEAD_US: i64 = 300_000_000;

/// A position after which recovery can end, and what a transaction there tells of the time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct StopPoint {
    /// where the record begins
    pub lsn: Lsn,
    /// when the transaction ended, or was prepared
    pub time: TimestampTz,
}

/// A place where the WAL passes a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Crossing {
    /// the first end of a transaction after it
    next: StopPoint,
    /// the segment that tells it
    index: u64,
    /// where times go back before the moment again: the last time before that, and the first after it
    set_back: Option<(StopPoint, StopPoint)>,
}

/// Where recovery to a moment ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// the last end of a transaction at or before the moment; none if there is none since the backup
    pub last: Option<StopPoint>,
    /// what the user must know of it
    pub warning: Option<String>,
}

/// A search for a moment along one road.
#[derive(Debug)]
pub struct Search<'a> {
    /// the times in the WAL
    pub horizon: &'a Horizon,
    /// the WAL after the backup
    pub road: &'a Road,
    /// where the backup is consistent
    pub start: Lsn,
    /// the moment
    pub at: TimestampTz,
    /// transactions that ended exactly then do not count
    pub exclusive: bool,
}

impl Search<'_> {
    fn passes(&self, time: TimestampTz) -> bool {
        if self.exclusive { time >= self.at } else { time > self.at }
    }

    fn from(&self) -> u64 {
        self.road.index_of(self.start).unwrap_or(0)
    }

    /// Finds where the moment lies; none if no transaction ends after it.
    pub fn find(&self) -> Result<Option<Found>> {
        let (from, len) = (self.from(), self.road.len());
        let Some(first) = self.horizon.first_passing(self.road, from..len, |time| self.passes(time))? else {
            return Ok(None);
        };
        let mut looked = self.to_look_at(from, first);
        self.horizon.look_at_each(self.road, &looked)?;
        let mut crossings = self.crossings(&looked)?;
        // a clock may have been ahead for longer than what was looked at
        while let Some(last) = crossings.last().filter(|last| last.set_back.is_none())
            && let Some(next) = looked.last().map(|last| last + 1).filter(|next| *next < len)
            && self.is_ahead(last.next)?
        {
            looked.extend(next..(next + LOOKED_AT_WHOLE).min(len));
            self.horizon.look_at_each(self.road, &looked)?;
            crossings = self.crossings(&looked)?;
        }
        self.choose(&without_disorder(crossings))
    }

    /// The segments to look at: all of a short stretch; of a long one those around the place that a
    /// binary search found, and samples before it.
    fn to_look_at(&self, from: u64, first: u64) -> Vec<u64> {
        let len = self.road.len();
        if len - from <= LOOKED_AT_WHOLE {
            return (from..len).collect();
        }
        let around = first.saturating_sub(NEIGHBOURS).max(from)..(first + NEIGHBOURS + 1).min(len);
        let step = ((first - from) / SAMPLES).max(1) as usize;
        let mut indexes: Vec<u64> = around.chain((from..first).step_by(step)).collect();
        indexes.sort_unstable();
        indexes.dedup();
        indexes
    }

    /// The places, in order, at which a time that passes follows on one that does not.
    fn crossings(&self, indexes: &[u64]) -> Result<Vec<Crossing>> {
        let mut found: Vec<Crossing> = Vec::new();
        let (mut last, mut is_before, mut next_index) = (None, true, self.from());
        for index in indexes.iter().copied() {
            let times = self.horizon.segment(self.road, index)?;
            let Some((earliest, latest)) = times.first_end().zip(times.last_end()) else { continue };
            let goes_on = if is_before { !self.passes(latest) } else { self.passes(earliest) };
            // between samples, the one where it changes is looked for
            let told = match is_before && !goes_on && self.passes(earliest) && next_index < index {
                true => {
                    let passing =
                        self.horizon.first_passing(self.road, next_index..index + 1, |time| self.passes(time));
                    passing?.unwrap_or(index)
                }
                false => index,
            };
            next_index = index + 1;
            if goes_on {
                last = times.last_stop().or(last);
                continue;
            }
            for point in self.ends(told)? {
                match self.passes(point.time) {
                    true if is_before => found.push(Crossing { next: point, index: told, set_back: None }),
                    false if !is_before => {
                        let before = last.unwrap_or(point);
                        found.last_mut().into_iter().for_each(|crossing| crossing.set_back = Some((before, point)));
                    }
                    _ => {}
                }
                is_before = !self.passes(point.time);
                last = Some(point);
            }
        }
        Ok(found)
    }

    /// The ends of transactions that a segment tells, after the backup.
    fn ends(&self, index: u64) -> Result<Vec<StopPoint>> {
        let mut ends = Vec::new();
        self.horizon.events(self.road, index, &mut |lsn, event| match event {
            Event::End { time, .. } if lsn >= self.start => ends.push(StopPoint { lsn, time: *time }),
            _ => {}
        })?;
        Ok(ends)
    }

    /// The first place that the archive does not refute.
    fn choose(&self, places: &[Crossing]) -> Result<Option<Found>> {
        let mut chosen = 0;
        while let Some((place, _)) = places.get(chosen).zip(places.get(chosen + 1))
            && self.is_refuted(place)?
        {
            chosen += 1;
        }
        let Some(place) = places.get(chosen) else { return Ok(None) };
        let last = self.last_before(place.index, place.next.lsn)?;
        let mut others = Vec::new();
        for (number, other) in places.iter().enumerate().filter(|(number, _)| *number != chosen) {
            let before = self.last_before(other.index, other.next.lsn)?.map_or(self.start, |last| last.lsn);
            others.push(match number < chosen {
                true => format!("{before}, which the archive refutes: that was uploaded before the time it tells"),
                false => before.to_string(),
            });
        }
        let warning = places.iter().find_map(|place| place.set_back).filter(|_| !others.is_empty());
        let warning = warning.map(|(before, after)| {
            format!(
                "the server's clock was set back from {} to {} at LSN {}, so that {} lies at several places: recovery \
                 ends at LSN {}; another is LSN {}; say which with --type=lsn",
                before.time,
                after.time,
                after.lsn,
                self.at,
                last.map_or(self.start, |last| last.lsn),
                others.join(", another LSN ")
            )
        });
        Ok(Some(Found { last, warning }))
    }

    /// Whether the clock was ahead when the first transaction after this place ended, and was right
    /// when it had been set back.
    fn is_refuted(&self, place: &Crossing) -> Result<bool> {
        let Some((_, after)) = place.set_back else { return Ok(false) };
        Ok(self.is_ahead(place.next)? && !self.is_ahead(after)?)
    }

    /// Whether a transaction claims to have ended long after its WAL was uploaded.
    fn is_ahead(&self, point: StopPoint) -> Result<bool> {
        let Some(name) = self.road.index_of(point.lsn).and_then(|index| self.road.segment(index)) else {
            return Ok(false);
        };
        let uploaded = TimestampTz::from_unix_s(self.horizon.times().uploaded_s(name)?).unwrap_or_default();
        Ok(point.time.0 > uploaded.0.saturating_add(PROVES_AHEAD_US))
    }

    /// The last place at which recovery can end with everything that was committed before `lsn`, or prepared before it
    /// and not after the moment; `index` is the segment that tells of the record there.
    pub fn last_before(&self, index: u64, lsn: Lsn) -> Result<Option<StopPoint>> {
        for index in (self.from()..=index).rev() {
            let last = match self.horizon.segment(self.road, index)?.last_stop() {
                Some(last) if last.lsn >= lsn || self.passes(last.time) => self.last_in(index, lsn)?,
                last => last,
            };
            if last.is_some() {
                return Ok(last.filter(|last| last.lsn >= self.start));
            }
        }
        Ok(None)
    }

    /// The last such place of the whole road, where no transaction ended after the moment.
    pub fn last_of_road(&self) -> Result<Option<StopPoint>> {
        self.road.len().checked_sub(1).map_or(Ok(None), |last| self.last_before(last, Lsn(u64::MAX)))
    }

    fn last_in(&self, index: u64, lsn: Lsn) -> Result<Option<StopPoint>> {
        let mut last = None;
        self.horizon.events(self.road, index, &mut |at, event| match event {
            Event::End { time, .. } if at < lsn => last = last.max(Some(StopPoint { lsn: at, time: *time })),
            Event::Prepared { time } if at < lsn && !self.passes(*time) => {
                last = last.max(Some(StopPoint { lsn: at, time: *time }));
            }
            _ => {}
        })?;
        Ok(last)
    }
}

/// Leaves out the places that are there only because transactions which ended at about the same
/// moment are a little out of order.
fn without_disorder(crossings: Vec<Crossing>) -> Vec<Crossing> {
    let mut places: Vec<Crossing> = Vec::new();
    for crossing in crossings {
        let is_disorder = |(before, after): (StopPoint, StopPoint)| before.time.0 - after.time.0 < OUT_OF_ORDER_US;
        match places.last_mut().filter(|place| place.set_back.is_some_and(is_disorder)) {
            Some(place) => place.set_back = crossing.set_back,
            None => places.push(crossing),
        }
    }
    places
}
