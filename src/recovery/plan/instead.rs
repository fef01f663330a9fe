//! The end of the archive, for a moment of which nothing there says that it was reached.
//!
//! A time is proved by anything later in the WAL: the end of a transaction, a checkpoint, a restore
//! point, a prepared transaction, an end of recovery. Where nothing is, either nothing happened
//! before the moment that is not archived, or it is in a segment that is not archived yet; nobody
//! but the server can tell. Who looks at a clone wants it all the same, and is told; what is taken
//! for the moment without a look (a copy, a table) is refused.

use super::refused::ARCHIVE_IT;
use super::{Bound, Found, Search, Way};
use crate::postgres::wal::coverage::RoadEnd;
use crate::postgres::{TimelineHistory, TimestampTz};
use crate::recovery::crossing;
use crate::recovery::target::Target;

impl Search<'_> {
    /// The end of the archive along the first of these histories that has a backup before the
    /// moment. None where it must not stand for the moment: if that lies in the future, on another
    /// timeline, or behind a gap.
    pub(super) fn end_instead(&self, histories: &[TimelineHistory]) -> Found<Option<Way<'_>>> {
        let Target::Time(moment) = &self.point.target else { return Ok(None) };
        let at = moment.at;
        let now = TimestampTz::from_unix_us(jiff::Timestamp::now().as_microsecond()).unwrap_or_default();
        if self.bound != Bound::ArchiveEnd || at > now {
            return Ok(None);
        }
        for history in histories {
            let Some(stone) = self.stone_before(history, at)? else { continue };
            let road = self.consistent_road(stone, history)?;
            if road.end != RoadEnd::Open || !self.others_reaching(history, at)?.is_empty() {
                return Ok(None);
            }
            let exclusive = self.point.exclusive;
            let search = crossing::Search { horizon: self.horizon, road: &road, start: stone.stop, at, exclusive };
            let last = search.last_of_road()?;
            let newest = match last {
                Some(last) => format!("the newest transaction in it ended {} (LSN {})", last.time, last.lsn),
                None => format!("no transaction ended in it after backup {}", stone.label),
            };
            let note = format!(
                "nothing in the archive says that {at} was reached: {newest}, and it ends at {}; recovery ends there, \
                 without what was committed until {at} and is not archived; {ARCHIVE_IT}",
                road.end_lsn().max(stone.stop)
            );
            let way = self.up_to_stop(stone, history, &road, last);
            return Ok(Some(Way { wanted: Some(at), notes: vec![note], ..way }));
        }
        Ok(None)
    }
}
