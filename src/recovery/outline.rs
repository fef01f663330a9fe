//! What can be known of an archive without listing all of it: which backups, which timelines, and where they came from.
//!
//! A horizon over the whole archive costs a request for each 1,000 segments. One that begins with a
//! backup is enough for whatever lies behind that: a road that begins there is the same in both.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use super::wal_times::Times;
use super::window::{Horizon, Stone};
use crate::error::{Context, Error, Result};
use crate::format::manifest::Database;
use crate::format::pack::WalKey;
use crate::postgres::wal::coverage::Coverage;
use crate::postgres::{SegmentName, SegmentSize, TimelineHistory, WalName};
use crate::repo::Repository;
use crate::repo::wal::Listing;

/// See the module.
#[derive(Debug)]
pub struct Outline {
    repository: Repository,
    database: Database,
    cache: Option<PathBuf>,
    stones: Vec<Stone>,
    survey: Survey,
}

impl Outline {
    /// Looks at the catalog and the archive of the cluster that backup `label` is of; without a label,
    /// the current one's. Times found in the WAL are kept below `cache`.
    pub fn load(repository: &Repository, label: Option<&str>, cache: Option<&Path>) -> Result<Self> {
        let info = repository.archive_info()?;
        let backups = repository.backup_info()?.backups;
        let id = label.and_then(|label| backups.get(label)).map(|of| of.database_id);
        let database = match id {
            Some(id) => info.history.iter().find(|database| database.id == id),
            None => info.history.last(),
        };
        let database = database.ok_or_else(|| Error::new("archive.info names no cluster"))?.clone();
        let of_database = backups.iter().filter(|(_, of)| of.database_id == database.id);
        let stones = of_database.map(|(label, of)| Stone::new(label, of)).collect::<Result<Vec<_>>>()?;
        let survey = Survey::new(repository, &database)?;
        Ok(Self { repository: repository.clone(), database, cache: cache.map(Path::to_owned), stones, survey })
    }

    /// True when the whole archive is known already.
    pub fn is_whole(&self) -> bool {
        self.survey.listing.is_whole()
    }

    /// All WAL.
    pub fn whole(&self) -> Result<Horizon> {
        let known = self.survey.all(&self.repository, &self.database, None)?;
        Ok(self.horizon(known))
    }

    /// The WAL from this segment number on, of every timeline.
    pub fn from(&self, number: u64) -> Result<Horizon> {
        let known = self.survey.all(&self.repository, &self.database, Some(number))?;
        Ok(self.horizon(self.with_timelines(known)?))
    }

    /// Timelines and backups, and no WAL but of an archive that is whole already.
    pub fn bare(&self) -> Result<Horizon> {
        if self.is_whole() {
            return self.whole();
        }
        Ok(self.horizon(self.with_timelines(self.survey.nothing())?))
    }

    fn horizon(&self, known: Known) -> Horizon {
        let times = Times::new(&self.repository, &self.database, self.cache.as_deref());
        Horizon::new(self.repository.clone(), self.stones.clone(), known, times)
    }

    /// The same with the timelines of which there are segments that are not known.
    fn with_timelines(&self, mut known: Known) -> Result<Known> {
        let named = known.coverage.timelines();
        for timeline in self.survey.listing.timelines().into_iter().filter(|timeline| !named.contains(timeline)) {
            // a directory may hold no segment at all
            let first = SegmentName::of_number(timeline, 0, known.coverage.size());
            if self.repository.archive(&self.database).first_from(first)?.is_some() {
                known.coverage.add_timeline(timeline);
            }
        }
        Ok(known)
    }
}

/// The WAL of an archive, as far as it is known.
#[derive(Clone, Debug)]
pub(crate) struct Known {
    pub(crate) coverage: Coverage,
    /// segments in which a restore point may begin, by their keys
    pub(crate) points: HashSet<SegmentName>,
}

/// An archive of which the history files are known, and the rest is about to be listed.
#[derive(Debug)]
pub(crate) struct Survey {
    listing: Listing,
    histories: Coverage,
}

impl Survey {
    /// Begins to list an archive, and reads its history files.
    pub(crate) fn new(repository: &Repository, database: &Database) -> Result<Self> {
        let size = SegmentSize::new(database.wal_segment_size).context(|| "archive.info".into())?;
        let archive = repository.archive(database);
        let listing = archive.begin()?;
        let mut histories = Coverage::new(size);
        for (timeline, key) in archive.histories(&listing) {
            let text = repository.wal_file(database, &key)?;
            match TimelineHistory::parse(timeline, &text) {
                Ok(history) => histories.add_history(history),
                Err(error) => tracing::warn!(%error, "a history file cannot be read; its timeline is left out"),
            }
        }
        Ok(Self { listing, histories })
    }

    fn nothing(&self) -> Known {
        Known { coverage: self.histories.clone(), points: HashSet::new() }
    }

    /// Lists the segments from this number on, or all.
    pub(crate) fn all(&self, repository: &Repository, database: &Database, from: Option<u64>) -> Result<Known> {
        let mut known = self.nothing();
        let size = known.coverage.size();
        let from = from.filter(|_| !self.listing.is_whole());
        repository.archive(database).files_from(&self.listing, from, |name, object| {
            let Ok(WalName::Segment(segment)) = WalName::parse(name) else { return };
            // before it, not all are known
            if from.is_some_and(|from| segment.number(size).is_none_or(|number| number < from)) {
                return;
            }
            known.coverage.add(segment);
            known.points.extend(WalKey::parse(&object.key).filter(|key| key.point).map(|_| segment));
        })?;
        Ok(known)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::Arc;

    use super::*;
    use crate::format::chunk::PackId;
    use crate::postgres::Timeline;
    use crate::store::{Body, MemoryStore, Record};

    /// Of 100,000 segments those behind a backup are listed, and the same is known of them.
    #[test]
    fn what_lies_behind_a_backup_costs_as_many_requests_as_it_has_pages() {
        const SEGMENTS: u64 = 100_000;
        let database = Database { wal_segment_size: 16 << 20, ..crate::retention::tests::database() };
        let store = Record::new(MemoryStore::new());
        let recording = store.recording();
        let repository = Repository::new(Arc::new(store), "main").unwrap();
        let size = SegmentSize::new(database.wal_segment_size).unwrap();
        let name = |number| SegmentName::of_number(Timeline(1), number, size);
        for number in (1..=SEGMENTS).filter(|number| *number != SEGMENTS - 10) {
            let point = number % 1000 == 0;
            let key = repository.archive(&database).key(&name(number).to_string(), PackId([7; 16]), point);
            repository.store.put(&key, Body::Bytes(Vec::new().into())).unwrap();
        }
        let history = TimelineHistory { timeline: Timeline(1), ancestors: Vec::new() };
        let known = |from| {
            recording.reset();
            let survey = Survey::new(&repository, &database).unwrap();
            let known = survey.all(&repository, &database, from).unwrap();
            (known, recording.total().calls)
        };
        let (whole, all) = known(None);
        assert!((100..=110).contains(&all), "{all} requests for the whole");
        for (from, most) in [(SEGMENTS - 500, 4), (SEGMENTS - 5000, 10), (SEGMENTS, 3), (SEGMENTS + 1000, 3)] {
            let (part, asked) = known(Some(from));
            assert!(asked <= most, "{asked} requests from {from}");
            let road = |of: &Known| of.coverage.road(&history, size.first_lsn(from).unwrap());
            assert_eq!(road(&part), road(&whole));
            let points = |of: &Known| {
                let mut points: Vec<_> = of.points.iter().copied().filter(|point| *point >= name(from)).collect();
                points.sort_unstable();
                points
            };
            assert_eq!(points(&part), points(&whole));
        }
    }
}
