//! Proofs of content: that archived segments hold the WAL of the server that was asked, not other WAL under the same names.

use std::collections::BTreeMap;

use super::Repository;
use super::wal::wal_identity;
use crate::error::{Context, Error, Result};
use crate::format::manifest::{Database, Description};
use crate::postgres::wal::landmarks::{Landmarks, Place, holders, record_at};
use crate::postgres::wal::records::Event;
use crate::postgres::{BackupLabel, BackupSource, Lsn, SegmentName, SegmentSize, Timeline, WalIdentity};
use crate::store::{PAGE_OBJECTS_MAX, StoreError};

/// What the archive must hold for a backup to be recovered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claims {
    timeline: Timeline,
    /// where replay starts
    start: Lsn,
    /// where the checkpoint record is that it starts from
    checkpoint: Lsn,
    /// where the backup is consistent
    stop: Lsn,
    /// a standby writes no record that ends a backup
    standby: bool,
}

/// Why archived WAL is not that of a backup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contradiction {
    /// the segment that should hold the record
    pub segment: SegmentName,
    /// what is wrong with it; `None` if the segment is missing
    pub what: Option<String>,
}

/// Why a backup cannot be counted on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Doubt {
    /// the segment, if it is one
    pub segment: Option<SegmentName>,
    /// what is wrong, for people
    pub what: String,
}

impl Doubt {
    /// What an error says of a backup.
    ///
    /// # Errors
    /// That error, if the store failed, so that nobody knows.
    pub(super) fn told(error: Error) -> Result<Self> {
        let store_failed = error.find::<StoreError>().is_some() && !error.is_not_found() && !error.is_truncated();
        if store_failed { Err(error) } else { Ok(Self { segment: None, what: error.told() }) }
    }
}

/// The first and the last segment that a backup needs.
pub fn wal_of(of: &Description) -> Result<(SegmentName, SegmentName)> {
    let what = || format!("the WAL of backup {}", of.label);
    Ok((of.wal_start.parse().context(what)?, of.wal_stop.parse().context(what)?))
}

impl Repository {
    /// Reads the landmarks of an archived segment; `None` if it is not there.
    pub fn landmarks(&self, database: &Database, segment: SegmentName) -> Result<Option<Landmarks>> {
        let name = segment.to_string();
        let Some(object) = self.archive(database).find(&name)? else { return Ok(None) };
        self.landmarks_at(database, segment, &object.key).map(Some)
    }

    fn landmarks_at(&self, database: &Database, segment: SegmentName, key: &str) -> Result<Landmarks> {
        let bytes = self.wal_file(database, key).context(|| format!("cannot read WAL segment {segment}"))?;
        let read = Landmarks::read(&wal_identity(database)?, segment, &bytes);
        read.context(|| format!("the archive holds something else as {segment}"))
    }

    /// Returns the landmark at `place` of a timeline, if the archive has it there.
    pub fn archived_record(&self, database: &Database, timeline: Timeline, place: Place) -> Result<Option<Event>> {
        let identity = wal_identity(database)?;
        let size = identity.segment_size;
        let name = |number| SegmentName::of_number(timeline, number, size);
        let mut segments: Vec<Option<Landmarks>> = Vec::new();
        for number in holders(size, place) {
            segments.push(self.landmarks(database, name(number))?);
            let read: Vec<Option<&Landmarks>> = segments.iter().map(Option::as_ref).collect();
            let found = record_at(place, identity.major, &read);
            if found.is_some() {
                return Ok(found);
            }
        }
        Ok(None)
    }

    /// What speaks against a backup: its manifest or its WAL is missing or cannot be read, or is other WAL. `None` if its start
    /// and its end are proved, and all WAL between them is there.
    ///
    /// # Errors
    /// When the store fails, so that nobody knows.
    pub fn doubt(&self, label: &str) -> Result<Option<Doubt>> {
        let asked = || -> Result<Option<Contradiction>> {
            let mut manifest = self.open_manifest(label)?;
            match manifest.description.wal_stored {
                true => {
                    let stored = manifest.stored_wal()?;
                    self.stored_contradiction(&manifest, &stored)
                }
                false => self.archived_contradiction(&manifest.description),
            }
        };
        match asked() {
            Ok(found) => Ok(found.map(|Contradiction { segment, what }| Doubt {
                segment: Some(segment),
                what: format!("WAL segment {segment} {}", what.unwrap_or_else(|| "is missing".into())),
            })),
            Err(error) => Doubt::told(error).map(Some),
        }
    }

    /// The same of a backup whose WAL is in the archive, from its first segment to its last.
    fn archived_contradiction(&self, of: &Description) -> Result<Option<Contradiction>> {
        let (database, (first, last)) = (&of.database, wal_of(of)?);
        let (claims, identity) = (Claims::of(of)?, wal_identity(database)?);
        let size = identity.segment_size;
        let (claimed, mut found) = (claims.segments(size), BTreeMap::new());
        let mut all = first.up_to(last, size);
        loop {
            let needed: Vec<SegmentName> = all.by_ref().take(PAGE_OBJECTS_MAX).collect();
            if needed.is_empty() {
                return Ok(claims.judge(&identity, &found));
            }
            for (segment, stored) in needed.iter().zip(self.archive(database).stored(&needed)?) {
                let what = match &stored[..] {
                    [] => None,
                    [object] if claimed.contains(segment) => match self.landmarks_at(database, *segment, &object.key) {
                        Ok(landmarks) => {
                            found.insert(*segment, landmarks);
                            continue;
                        }
                        Err(error) if error.find::<StoreError>().is_some() => return Err(error),
                        Err(error) => Some(format!("cannot be used: {}", error.told())),
                    },
                    [_] => continue,
                    _ => Some("is in the archive with different contents".to_owned()),
                };
                return Ok(Some(Contradiction { segment: *segment, what }));
            }
        }
    }

    /// Compares a backup with the WAL in the archive; `None` if that is its WAL.
    pub fn contradiction(&self, database: &Database, claims: &Claims) -> Result<Option<Contradiction>> {
        let identity = wal_identity(database)?;
        let mut found = BTreeMap::new();
        for segment in claims.segments(identity.segment_size) {
            found.extend(self.landmarks(database, segment)?.map(|landmarks| (segment, landmarks)));
        }
        Ok(claims.judge(&identity, &found))
    }
}

impl Claims {
    /// What a backup needs that ended at `stop` with this `backup_label`.
    pub fn new(timeline: Timeline, backup_label: &str, stop: Lsn) -> Result<Self> {
        let label = BackupLabel::parse(backup_label.as_bytes()).context(|| "backup_label".into())?;
        let standby = label.source == BackupSource::Standby;
        Ok(Self { timeline, start: label.start, checkpoint: label.checkpoint, stop, standby })
    }

    /// The same of a backup in the repository.
    pub fn of(of: &Description) -> Result<Self> {
        let stop = of.stop_lsn.parse().context(|| format!("WAL position {} of backup {}", of.stop_lsn, of.label))?;
        Self::new(Timeline(of.timeline), &of.backup_label, stop).context(|| format!("backup {}", of.label))
    }

    /// The segments that [`Self::judge`] looks into; ascending.
    pub fn segments(&self, size: SegmentSize) -> Vec<SegmentName> {
        let mut numbers = holders(size, Place::Begins(self.checkpoint));
        numbers.extend(holders(size, Place::Ends(self.stop)));
        numbers.sort_unstable();
        numbers.dedup();
        numbers.into_iter().map(|number| SegmentName::of_number(self.timeline, number, size)).collect()
    }

    /// Whether these segments are the WAL of the backup: they hold the checkpoint that its `backup_label` names, and the record
    /// that ended it, or at least sound WAL up to there.
    pub fn judge(&self, identity: &WalIdentity, found: &BTreeMap<SegmentName, Landmarks>) -> Option<Contradiction> {
        let holders = |place| {
            let name = |number| SegmentName::of_number(self.timeline, number, identity.segment_size);
            let named = holders(identity.segment_size, place).into_iter().map(name);
            named.map(|name| (name, found.get(&name))).collect::<Vec<_>>()
        };
        let look = |place, is_it: &dyn Fn(&[Option<&Landmarks>]) -> bool, what: String| {
            let (names, segments): (Vec<SegmentName>, Vec<Option<&Landmarks>>) = holders(place).into_iter().unzip();
            let segment = names[0];
            match segments[0] {
                None => Some(Contradiction { segment, what: None }),
                Some(_) if is_it(&segments) => None,
                Some(_) => Some(Contradiction { segment, what: Some(what) }),
            }
        };
        let at_start = Place::Begins(self.checkpoint);
        let is_checkpoint = |segments: &[Option<&Landmarks>]| {
            let record = record_at(at_start, identity.major, segments);
            matches!(record, Some(Event::Checkpoint { redo, .. }) if redo == self.start)
        };
        let begins = format!("does not hold the checkpoint at {} that its backup_label names", self.checkpoint);
        let at_stop = Place::Ends(self.stop);
        let is_end = |segments: &[Option<&Landmarks>]| match self.standby {
            true => segments[0].is_some_and(|last| last.reaches(self.stop) || last.is_rest_up_to(self.stop)),
            false => record_at(at_stop, identity.major, segments) == Some(Event::BackupEnd { start: self.start }),
        };
        let ends = match self.standby {
            true => format!("does not hold sound WAL up to {}, where it is consistent", self.stop),
            false => format!("does not hold the record that ended it at {}", self.stop),
        };
        look(at_start, &is_checkpoint, begins).or_else(|| look(at_stop, &is_end, ends))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::postgres::wal::records::tests::{SIZE, Writer, identity};

    fn label(start: Lsn, checkpoint: Lsn, from: &str) -> String {
        format!(
            "START WAL LOCATION: {start} (file 000000010000000000000003)\nCHECKPOINT LOCATION: {checkpoint}\n\
             BACKUP METHOD: streamed\nBACKUP FROM: {from}\nSTART TIME: x\nLABEL: x\nSTART TIMELINE: 1\n"
        )
    }

    fn read(wal: &Writer) -> BTreeMap<SegmentName, Landmarks> {
        let segments = wal.segments().into_iter().enumerate();
        let name = |index: usize| {
            SegmentName::of_number(Timeline(1), 3 + index as u64, SegmentSize::new(SIZE.into()).unwrap())
        };
        segments
            .map(|(index, bytes)| (name(index), Landmarks::read(&identity(), name(index), &bytes).unwrap()))
            .collect()
    }

    /// A backup from somewhere in segment 3 to the end of what was written, with other WAL in between.
    fn backup(between: usize) -> (Writer, Lsn, Lsn, Lsn) {
        let mut wal = Writer::new(3);
        wal.record(10, 0, 700, &[9; 2000]);
        let start = wal.end();
        wal.record(10, 0, 700, &[9; 100]);
        let checkpoint = wal.checkpoint(start);
        wal.fill(between);
        let stop = wal.backup_end(start);
        wal.commit(7, 1);
        (wal, start, checkpoint, stop)
    }

    #[test]
    fn a_backup_is_proved_by_its_records_only() {
        for left in [900_000, 64, 48, 40, 32, 0] {
            let (wal, start, checkpoint, stop) = backup(left);
            let found = read(&wal);
            let claims = Claims::new(Timeline(1), &label(start, checkpoint, "primary"), stop).unwrap();
            assert_eq!(claims.judge(&identity(), &found), None, "{left}");
            let judge = |claims: Claims| claims.judge(&identity(), &found).unwrap().what.unwrap_or_default();
            assert!(judge(Claims { checkpoint: start, ..claims }).contains("does not hold the checkpoint"), "{left}");
            assert!(judge(Claims { start: Lsn(8), ..claims }).contains("does not hold the checkpoint"), "{left}");
            assert!(judge(Claims { stop: Lsn(stop.0 - 8), ..claims }).contains("the record that ended it"), "{left}");
            let standby = Claims { standby: true, ..claims };
            assert_eq!(standby.judge(&identity(), &found), None, "{left}");
            assert!(judge(Claims { stop: Lsn(wal.end().0 + 8), ..standby }).contains("sound WAL up to"), "{left}");
            let nothing = claims.judge(&identity(), &BTreeMap::new()).unwrap();
            assert_eq!(nothing.what, None, "{left}");
        }
    }
}
