//! The way to a point with as little of a large archive as is listed for it.

use super::{Bound, Course, Found, NoCourse, Search};
use crate::postgres::{Lsn, TimelineHistory};
use crate::recovery::outline::Outline;
use crate::recovery::target::{Point, Target};
use crate::recovery::window::LOOK_BACK;

/// Looks at what lies behind the backup that the catalog makes likely. None where that does not do;
/// whatever is answered here, the whole archive would answer too.
pub(super) fn find(outline: &Outline, point: &Point, bound: Bound) -> Found<Option<Course>> {
    if outline.is_whole() {
        return Ok(None);
    }
    let bare = outline.bare()?;
    let search = Search { horizon: &bare, point, bound };
    let likely = search.histories().ok().and_then(|histories| histories.into_iter().next());
    let Some(history) = likely else { return Ok(None) };
    let Some((label, from)) = search.likely(&history) else { return Ok(None) };
    let horizon = outline.from(from)?;
    let search = Search { horizon: &horizon, point, bound };
    match search.way(&history) {
        // another backup's choice may have lacked WAL before this one
        Ok(way) if way.stone.label == label => Ok(Some(search.settle(way))),
        Ok(_) | Err(NoCourse::Unreachable(_)) => Ok(None),
        Err(failed) => Err(failed),
    }
}

impl Search<'_> {
    /// The backup to begin with by the catalog alone, and from which segment on WAL must be known to
    /// be sure. None where all WAL must be: a transaction and a restore point are anywhere.
    fn likely(&self, history: &TimelineHistory) -> Option<(String, u64)> {
        let mut stones = self.own_stones(history);
        let stone = match &self.point.target {
            Target::Time(moment) => stones.find(|stone| stone.stop_s <= moment.at.unix_s()),
            Target::Lsn(lsn) => stones.find(|stone| stone.stop <= *lsn),
            Target::Xid(_) | Target::Name(_) => None,
            _ => stones.next(),
        }?;
        let size = self.horizon.coverage().size();
        // the last time that was told before it stopped proves that it is the one
        let told = size.segment_of(Lsn(stone.stop.0.saturating_sub(1))).saturating_sub(LOOK_BACK);
        Some((stone.label.clone(), size.segment_of(stone.start).min(told)))
    }
}
