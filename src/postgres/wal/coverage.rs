//! Which WAL there is, and how far recovery gets with it: from a position along a timeline's history, over the forks, up to the
//! first segment that is missing.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;

use super::history::TimelineHistory;
use super::{SegmentName, SegmentSize};
use crate::postgres::lsn::{Lsn, Timeline};

/// The segments and histories that an archive holds.
#[derive(Clone, Debug)]
pub struct Coverage {
    size: SegmentSize,
    /// numbers of segments, as ascending runs that do not touch
    runs: BTreeMap<Timeline, Vec<RangeInclusive<u64>>>,
    histories: BTreeMap<Timeline, TimelineHistory>,
    /// timelines of which there are segments, though not known which
    others: BTreeSet<Timeline>,
}

/// Consecutive segments of one timeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leg {
    /// the timeline
    pub timeline: Timeline,
    /// number of its first segment
    pub first: u64,
    /// and of its last
    pub last: u64,
}

/// The segments that recovery reads one after the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Road {
    size: SegmentSize,
    /// in order, without a gap between them
    pub legs: Vec<Leg>,
    /// why it goes no further
    pub end: RoadEnd,
    /// when the last segment is one that a timeline left in its middle: where that was
    pub fork: Option<Lsn>,
}

/// Why a road ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RoadEnd {
    /// the archive has nothing later
    Open,
    /// a segment is missing, and there are later ones
    Gap {
        /// the first that is missing
        missing: SegmentName,
        /// the next that is there
        then: SegmentName,
    },
}

impl Coverage {
    /// Nothing yet.
    pub fn new(size: SegmentSize) -> Self {
        Self { size, runs: BTreeMap::new(), histories: BTreeMap::new(), others: BTreeSet::new() }
    }

    /// Adds a segment; a name that none of this size has is left out.
    pub fn add(&mut self, name: SegmentName) {
        let Some(number) = name.number(self.size) else { return };
        let runs = self.runs.entry(name.timeline()).or_default();
        let at = runs.partition_point(|run| *run.end() < number);
        if runs.get(at).is_some_and(|run| run.contains(&number)) {
            return;
        }
        let touches_before = at > 0 && *runs[at - 1].end() + 1 == number;
        let touches_after = runs.get(at).is_some_and(|run| *run.start() == number + 1);
        match (touches_before, touches_after) {
            (true, true) => {
                let after = runs.remove(at);
                runs[at - 1] = *runs[at - 1].start()..=*after.end();
            }
            (true, false) => runs[at - 1] = *runs[at - 1].start()..=number,
            (false, true) => runs[at] = number..=*runs[at].end(),
            (false, false) => runs.insert(at, number..=number),
        }
    }

    /// Adds a history file.
    pub fn add_history(&mut self, history: TimelineHistory) {
        self.histories.insert(history.timeline, history);
    }

    /// Adds a timeline of which there are segments, though not known which.
    pub fn add_timeline(&mut self, timeline: Timeline) {
        self.others.insert(timeline);
    }

    /// The segments' size.
    pub fn size(&self) -> SegmentSize {
        self.size
    }

    /// Timelines of which there are segments or a history, ascending.
    pub fn timelines(&self) -> Vec<Timeline> {
        let mut all: Vec<Timeline> =
            self.runs.keys().chain(self.histories.keys()).chain(&self.others).copied().collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// The first segment of the first timeline and the last of the last one: the first and the last by name.
    pub fn range(&self) -> Option<(SegmentName, SegmentName)> {
        let name = |timeline: &Timeline, number| SegmentName::of_number(*timeline, number, self.size);
        let (first, runs) = self.runs.first_key_value()?;
        let (last, ends) = self.runs.last_key_value()?;
        Some((name(first, *runs.first()?.start()), name(last, *ends.last()?.end())))
    }

    /// Whether a timeline's history file is there; the first has none.
    pub fn has_history(&self, timeline: Timeline) -> bool {
        timeline == Timeline(1) || self.histories.contains_key(&timeline)
    }

    /// Where a timeline came from; without its history file, from nowhere.
    pub fn history(&self, timeline: Timeline) -> TimelineHistory {
        let alone = || TimelineHistory { timeline, ancestors: Vec::new() };
        self.histories.get(&timeline).cloned().unwrap_or_else(alone)
    }

    /// What is missing between a timeline's first segment and its last.
    pub fn gaps(&self, timeline: Timeline) -> Vec<(SegmentName, SegmentName)> {
        let runs = self.runs.get(&timeline).map(Vec::as_slice).unwrap_or_default();
        let name = |number| SegmentName::of_number(timeline, number, self.size);
        runs.windows(2).map(|pair| (name(pair[0].end() + 1), name(pair[1].start() - 1))).collect()
    }

    /// The way from `start` along `history`, as far as there are segments.
    pub fn road(&self, history: &TimelineHistory, start: Lsn) -> Road {
        let mut road = Road { size: self.size, legs: Vec::new(), end: RoadEnd::Open, fork: None };
        let stretches = self.stretches(history);
        let mut number = self.size.segment_of(start);
        loop {
            // the newest timeline that had begun by then: its first segment holds the end of the one before, too
            let at = stretches.partition_point(|stretch| stretch.first <= number).saturating_sub(1);
            let stretch = stretches[at];
            if let Some(run) = self.run(stretch.timeline, number) {
                let last = (*run.end()).min(stretch.last);
                road.legs.push(Leg { timeline: stretch.timeline, first: number, last });
                number = last + 1;
                continue;
            }
            let before = at.checked_sub(1).map(|before| stretches[before]).filter(|_| number == stretch.first);
            if let Some(before) = before.filter(|before| self.run(before.timeline, number).is_some()) {
                road.legs.push(Leg { timeline: before.timeline, first: number, last: number });
                road.fork = history.end_of(before.timeline);
            }
            road.end = self.road_end(&stretches[at..], number);
            return road;
        }
    }

    /// The timelines of a history, each from its first segment to the last that is its own.
    fn stretches(&self, history: &TimelineHistory) -> Vec<Leg> {
        let mut stretches = Vec::new();
        let mut first = 0;
        for ancestor in &history.ancestors {
            let next = self.size.segment_of(ancestor.end);
            if next > first {
                stretches.push(Leg { timeline: ancestor.timeline, first, last: next - 1 });
            } else {
                // left in the segment in which it began: only the next one's copy of it counts
                stretches.retain(|stretch: &Leg| stretch.first < next);
            }
            first = next;
        }
        stretches.push(Leg { timeline: history.timeline, first, last: u64::MAX });
        stretches
    }

    fn run(&self, timeline: Timeline, number: u64) -> Option<&RangeInclusive<u64>> {
        let runs = self.runs.get(&timeline)?;
        runs.get(runs.partition_point(|run| *run.end() < number)).filter(|run| run.contains(&number))
    }

    /// What the absence of segment `number` means: of the stretches from its own on.
    fn road_end(&self, stretches: &[Leg], number: u64) -> RoadEnd {
        let name = |timeline, number| SegmentName::of_number(timeline, number, self.size);
        let later = stretches.iter().find_map(|stretch| {
            let runs = self.runs.get(&stretch.timeline)?;
            let from = number.max(stretch.first);
            let run = runs.get(runs.partition_point(|run| *run.end() < from))?;
            let found = *run.start().max(&from);
            (found <= stretch.last).then(|| name(stretch.timeline, found))
        });
        match later {
            Some(then) => RoadEnd::Gap { missing: name(stretches[0].timeline, number), then },
            None => RoadEnd::Open,
        }
    }
}

impl Leg {
    fn len(self) -> u64 {
        self.last - self.first + 1
    }
}

impl Road {
    /// How many segments it has.
    pub fn len(&self) -> u64 {
        self.legs.iter().map(|leg| leg.len()).sum()
    }

    /// True when not even the first segment is there.
    pub fn is_empty(&self) -> bool {
        self.legs.is_empty()
    }

    /// Its segment at `index`, from 0.
    pub fn segment(&self, mut index: u64) -> Option<SegmentName> {
        for leg in &self.legs {
            if index < leg.len() {
                return Some(SegmentName::of_number(leg.timeline, leg.first + index, self.size));
            }
            index -= leg.len();
        }
        None
    }

    /// All its segments, from the one at `from` on.
    pub fn segments(&self, from: u64) -> impl Iterator<Item = SegmentName> + '_ {
        (from..self.len()).filter_map(|index| self.segment(index))
    }

    /// The index of the segment that holds the byte at `lsn`.
    pub fn index_of(&self, lsn: Lsn) -> Option<u64> {
        let first = self.legs.first()?.first;
        self.size.segment_of(lsn).checked_sub(first).filter(|index| *index < self.len())
    }

    /// One past the last byte that it can give.
    pub fn end_lsn(&self) -> Lsn {
        let end = self.legs.last().and_then(|leg| self.size.first_lsn(leg.last + 1));
        self.fork.or(end).unwrap_or(Lsn::INVALID)
    }

    /// The same road, no further than the segment at `index`.
    pub fn up_to(&self, index: u64) -> Self {
        let mut left = index.saturating_add(1);
        let mut legs = Vec::new();
        for leg in &self.legs {
            let take = leg.len().min(left);
            if take > 0 {
                legs.push(Leg { last: leg.first + take - 1, ..*leg });
            }
            left -= take;
        }
        Self { legs, ..self.clone() }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::postgres::Ancestor;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    fn size() -> SegmentSize {
        SegmentSize::new(MIB).unwrap()
    }

    fn coverage(runs: &[(u32, RangeInclusive<u64>)]) -> Coverage {
        let mut coverage = Coverage::new(size());
        for (timeline, run) in runs {
            for number in run.clone() {
                coverage.add(SegmentName::of_number(Timeline(*timeline), number, size()));
            }
        }
        coverage
    }

    /// Each timeline but the last with where it was left, in segments.
    fn history(timeline: u32, ancestors: &[(u32, f64)]) -> TimelineHistory {
        let ancestor = |(timeline, end): &(u32, f64)| Ancestor {
            timeline: Timeline(*timeline),
            end: Lsn((end * MIB as f64) as u64),
            reason: String::new(),
        };
        TimelineHistory { timeline: Timeline(timeline), ancestors: ancestors.iter().map(ancestor).collect() }
    }

    fn leg(timeline: u32, first: u64, last: u64) -> Leg {
        Leg { timeline: Timeline(timeline), first, last }
    }

    fn road(runs: &[(u32, RangeInclusive<u64>)], history: &TimelineHistory, from: u64) -> Road {
        coverage(runs).road(history, Lsn(from * MIB + 40))
    }

    #[test]
    fn a_road_goes_over_forks_and_stops_at_gaps() {
        let forked = history(2, &[(1, 7.5)]);
        let alone = history(1, &[]);
        let name = |timeline, number| SegmentName::of_number(Timeline(timeline), number, size());
        let gap = |a, b| RoadEnd::Gap { missing: a, then: b };
        type Case<'a> = (&'a [(u32, RangeInclusive<u64>)], &'a TimelineHistory, u64, Vec<Leg>, RoadEnd, Option<f64>);
        let cases: Vec<Case<'_>> = vec![
            (&[(1, 2..=9)], &alone, 3, vec![leg(1, 3, 9)], RoadEnd::Open, None),
            (&[(1, 2..=9)], &alone, 10, vec![], RoadEnd::Open, None),
            (&[(1, 2..=9)], &alone, 1, vec![], gap(name(1, 1), name(1, 2)), None),
            (&[(1, 2..=5), (1, 8..=9)], &alone, 3, vec![leg(1, 3, 5)], gap(name(1, 6), name(1, 8)), None),
            // the old timeline went on, too: its WAL past the fork is none of ours
            (&[(1, 2..=9), (2, 7..=8)], &forked, 3, vec![leg(1, 3, 6), leg(2, 7, 8)], RoadEnd::Open, None),
            (&[(1, 2..=9)], &forked, 3, vec![leg(1, 3, 6), leg(1, 7, 7)], RoadEnd::Open, Some(7.5)),
            (&[(1, 2..=6)], &forked, 3, vec![leg(1, 3, 6)], RoadEnd::Open, None),
            (
                &[(1, 2..=9), (2, 8..=9)],
                &forked,
                3,
                vec![leg(1, 3, 6), leg(1, 7, 7)],
                gap(name(2, 7), name(2, 8)),
                Some(7.5),
            ),
            (&[(1, 2..=5), (2, 7..=8)], &forked, 3, vec![leg(1, 3, 5)], gap(name(1, 6), name(2, 7)), None),
            (
                &[(1, 2..=9), (2, 7..=7), (2, 9..=9)],
                &forked,
                6,
                vec![leg(1, 6, 6), leg(2, 7, 7)],
                gap(name(2, 8), name(2, 9)),
                None,
            ),
            (&[(1, 2..=9), (2, 7..=8)], &alone, 3, vec![leg(1, 3, 9)], RoadEnd::Open, None),
        ];
        for (runs, history, from, legs, end, fork) in cases {
            let found = road(runs, history, from);
            assert_eq!((&found.legs, found.end), (&legs, end), "{runs:?} from {from}");
            assert_eq!(found.fork, fork.map(|fork| Lsn((fork * MIB as f64) as u64)), "{runs:?}");
        }
    }

    #[test]
    fn timelines_that_began_in_one_segment() {
        // 2 was left in the segment in which it began
        let twice = history(3, &[(1, 7.2), (2, 7.6)]);
        let found = road(&[(1, 5..=7), (2, 7..=7), (3, 7..=8)], &twice, 5);
        assert_eq!(found.legs, [leg(1, 5, 6), leg(3, 7, 8)]);
        assert_eq!(found.len(), 4);
        assert_eq!(found.segment(2).unwrap().timeline(), Timeline(3));
        assert_eq!(found.segments(1).count(), 3);
        assert_eq!(found.index_of(Lsn(7 * MIB)), Some(2));
        assert_eq!(found.index_of(Lsn(9 * MIB)), None);
        assert_eq!(found.end_lsn(), Lsn(9 * MIB));
        assert_eq!(found.up_to(2).legs, [leg(1, 5, 6), leg(3, 7, 7)]);
        assert_eq!(found.up_to(0).legs, [leg(1, 5, 5)]);
    }

    #[test]
    fn gaps_are_named() {
        let coverage = coverage(&[(1, 2..=3), (1, 6..=7), (1, 9..=9)]);
        let name = |number| SegmentName::of_number(Timeline(1), number, size());
        assert_eq!(coverage.gaps(Timeline(1)), [(name(4), name(5)), (name(8), name(8))]);
        assert!(coverage.gaps(Timeline(2)).is_empty());
    }

    proptest! {
        #[test]
        fn runs_are_the_same_in_any_order(numbers in prop::collection::vec(0u64..60, 0..80)) {
            let mut coverage = Coverage::new(size());
            for number in &numbers {
                coverage.add(SegmentName::of_number(Timeline(1), *number, size()));
            }
            for start in 0..60 {
                let road = coverage.road(&history(1, &[]), Lsn(start * MIB));
                let expected = (start..).take_while(|number| numbers.contains(number)).count() as u64;
                prop_assert_eq!(road.len(), expected);
                let later = numbers.iter().any(|number| *number > start + expected);
                prop_assert_eq!(matches!(road.end, RoadEnd::Gap { .. }), later);
            }
        }
    }
}
