//! What segments of the archive tell of time: read when it is asked for, kept in memory and in the cache directory, for an
//! archived segment never changes.

use std::collections::HashMap;
use std::os::unix::fs::DirBuilderExt;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::crossing::StopPoint;
use crate::error::{Context, Error, Result};
use crate::format::manifest::Database;
use crate::postgres::wal::records::{CutRecord, Event, Rest, Stop, walk};
use crate::postgres::{Lsn, SegmentName, TimestampTz};
use crate::repo::Repository;
use crate::repo::wal::wal_identity;
use crate::store::Listed;

/// Segments whose times are kept in memory.
const KEPT: usize = 100_000;

/// Segments that are held at once, where many have to be looked at: in number, and in bytes if it is more than one.
const AT_ONCE: u64 = 8;
const AT_ONCE_BYTES: u64 = 256 * 1024 * 1024;

/// What one segment tells.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SegmentTimes {
    /// the ends of transactions: the earliest and the latest time
    ends: Option<(i64, i64)>,
    /// and the lowest and the highest number of one
    ended: Option<(u32, u32)>,
    /// the latest time of anything else: a checkpoint, a restore point
    other: Option<i64>,
    /// restore points
    points: Vec<RestorePoint>,
    /// the last end of a transaction, or prepared one: where its record begins, and its time
    stop: Option<(u64, i64)>,
    /// where the last whole record begins, and one past its end
    last: Option<(u64, u64)>,
    /// a record that goes on in the next segment: where it begins, how much of it is here, its first bytes
    cut: Option<(u64, u32, Vec<u8>)>,
    /// what is here of a record before: bytes in all, the first of them
    rest: (u32, Vec<u8>),
    /// WAL ends in the middle of the segment, and goes on nowhere
    unsound: bool,
}

/// A restore point as the WAL has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestorePoint {
    /// its name
    pub name: String,
    /// where its record begins
    pub lsn: u64,
    /// when, in microseconds since 2000
    pub time: i64,
}

impl RestorePoint {
    /// When it was made.
    pub fn at(&self) -> TimestampTz {
        TimestampTz(self.time)
    }
}

impl SegmentTimes {
    /// Takes everything from a segment's bytes, and hands each event on.
    fn read(database: &Database, name: SegmentName, bytes: &[u8], each: &mut dyn FnMut(Lsn, &Event)) -> Result<Self> {
        let mut times = Self::default();
        let identity = wal_identity(database)?;
        let walked = walk(&identity, name, bytes, |lsn, _, event| {
            times.add(lsn, &event);
            each(lsn, &event);
        });
        let walked = walked.map_err(|error| {
            Error::new(format!("the archive holds something else as {name}"))
                .hint("the object was swapped or overwritten; recovery cannot go past it")
                .source(error)
        })?;
        times.last = walked.last.map(|last| (last.0, walked.end.0));
        times.unsound = walked.stop == Stop::Unsound;
        if let Stop::Cut(cut) = walked.stop {
            let head = if cut.may_tell() { cut.head } else { Vec::new() };
            times.cut = Some((cut.lsn.0, cut.written, head));
        }
        times.rest = (walked.rest.len, walked.rest.head);
        Ok(times)
    }

    fn add(&mut self, lsn: Lsn, event: &Event) {
        match event {
            Event::End { xid, time, .. } => {
                let (first, last) = self.ends.unwrap_or((time.0, time.0));
                self.ends = Some((first.min(time.0), last.max(time.0)));
                let (low, high) = self.ended.unwrap_or((*xid, *xid));
                self.ended = Some((low.min(*xid), high.max(*xid)));
                self.stop = self.stop.max(Some((lsn.0, time.0)));
            }
            Event::Prepared { time } => {
                self.other = self.other.max(Some(time.0));
                self.stop = self.stop.max(Some((lsn.0, time.0)));
            }
            Event::RestorePoint { name, time } => {
                self.points.push(RestorePoint { name: name.clone(), lsn: lsn.0, time: time.0 });
                self.other = self.other.max(Some(time.0));
            }
            Event::BackupEnd { .. } => {}
            Event::Checkpoint { time, .. } | Event::EndOfRecovery { time, .. } => {
                self.other = self.other.max(Some(time.0));
            }
            Event::Tablespace { .. } => {}
        }
    }

    /// Adds the record that began in the segment before this one.
    pub fn joined(&self, before: &Self, database: &Database) -> Result<Self> {
        let mut times = self.clone();
        if let Some((lsn, event)) = self.first_event(before, database)? {
            times.add(lsn, &event);
            times.last = times.last.or(Some((lsn.0, lsn.0)));
        }
        Ok(times)
    }

    /// What the record says that the end of the segment before cut.
    fn first_event(&self, before: &Self, database: &Database) -> Result<Option<(Lsn, Event)>> {
        let Some((lsn, written, head)) = &before.cut else { return Ok(None) };
        let cut = CutRecord { lsn: Lsn(*lsn), written: *written, head: head.clone() };
        let rest = Rest { len: self.rest.0, head: self.rest.1.clone() };
        Ok(cut.joined(&rest, wal_identity(database)?.major).map(|event| (cut.lsn, event)))
    }

    /// The latest time at which a transaction ended in it.
    pub fn last_end(&self) -> Option<TimestampTz> {
        self.ends.map(|(_, last)| TimestampTz(last))
    }

    /// The last end of a transaction in it, or the last that was prepared.
    pub fn last_stop(&self) -> Option<StopPoint> {
        self.stop.map(|(lsn, time)| StopPoint { lsn: Lsn(lsn), time: TimestampTz(time) })
    }

    /// Whether it begins with the rest of a record, which [`Self::joined`] adds.
    pub fn begins_with_rest(&self) -> bool {
        self.rest.0 > 0
    }

    /// Whether the transaction `xid` may have ended in it.
    pub fn may_end(&self, xid: u32) -> bool {
        self.ended.is_some_and(|(low, high)| (low..=high).contains(&xid))
    }

    /// The earliest.
    pub fn first_end(&self) -> Option<TimestampTz> {
        self.ends.map(|(first, _)| TimestampTz(first))
    }

    /// The latest time that anything in it tells.
    pub fn latest(&self) -> Option<TimestampTz> {
        self.other.max(self.ends.map(|(_, last)| last)).map(TimestampTz)
    }

    /// Where its last whole record begins.
    pub fn last_record(&self) -> Option<Lsn> {
        self.last.map(|(lsn, _)| Lsn(lsn))
    }

    /// Its restore points.
    pub fn restore_points(&self) -> &[RestorePoint] {
        &self.points
    }
}

/// The times of a cluster's archive.
#[derive(Debug)]
pub struct Times {
    repository: Repository,
    database: Database,
    directory: Option<PathBuf>,
    kept: Mutex<HashMap<SegmentName, Arc<SegmentTimes>>>,
}

impl Times {
    /// Those of `database`; what is found out is kept below `cache`, too.
    pub fn new(repository: &Repository, database: &Database, cache: Option<&Path>) -> Self {
        let directory = cache.map(|cache| cache.join(format!("times-3/{}-{}", repository.stanza, database.system_id)));
        Self { repository: repository.clone(), database: database.clone(), directory, kept: Mutex::default() }
    }

    /// The cluster.
    pub fn database(&self) -> &Database {
        &self.database
    }

    /// What a segment tells.
    pub fn of(&self, name: SegmentName) -> Result<Arc<SegmentTimes>> {
        match self.kept(name) {
            Some(times) => Ok(times),
            None => self.of_object(name, &self.find(name)?),
        }
    }

    /// Finds out what each of these segments tells, which is faster than one by one.
    pub fn look_at(&self, names: &[SegmentName]) -> Result<()> {
        let mut unknown = Vec::new();
        for names in names.chunk_by(|a, b| a.timeline() == b.timeline() && a < b) {
            let names: Vec<SegmentName> = names.iter().copied().filter(|name| self.kept(*name).is_none()).collect();
            let found = self.repository.archive(&self.database).segments(&names)?;
            unknown.extend(names.into_iter().zip(found).filter_map(|(name, object)| Some((name, object?))));
        }
        let next = AtomicUsize::new(0);
        let look = || {
            while let Some((name, object)) = unknown.get(next.fetch_add(1, Ordering::Relaxed)) {
                self.of_object(*name, object)?;
            }
            Ok(())
        };
        let at_once = (AT_ONCE_BYTES / self.database.wal_segment_size.max(1)).clamp(1, AT_ONCE);
        thread::scope(|scope| {
            let threads: Vec<_> = (0..at_once.min(unknown.len() as u64)).map(|_| scope.spawn(look)).collect();
            threads.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic)))
        })
    }

    /// When a segment was archived, by the clock of the store, in seconds since 1970.
    pub fn uploaded_s(&self, name: SegmentName) -> Result<i64> {
        Ok(self.find(name)?.modified)
    }

    fn kept(&self, name: SegmentName) -> Option<Arc<SegmentTimes>> {
        self.kept.lock().get(&name).cloned()
    }

    fn find(&self, name: SegmentName) -> Result<Listed> {
        let found = self.repository.archive(&self.database).find(&name.to_string())?;
        found.ok_or_else(|| Error::new(format!("the archive has no {name} any more")))
    }

    fn of_object(&self, name: SegmentName, object: &Listed) -> Result<Arc<SegmentTimes>> {
        let file = self.file(object);
        let times = match file.as_deref().and_then(load) {
            Some(times) => times,
            None => {
                let times = SegmentTimes::read(&self.database, name, &self.bytes(name, &object.key)?, &mut |_, _| {})?;
                file.as_deref().inspect(|file| keep(file, &times));
                times
            }
        };
        let times = Arc::new(times);
        let mut kept = self.kept.lock();
        if kept.len() >= KEPT {
            kept.clear();
        }
        kept.insert(name, times.clone());
        Ok(times)
    }

    /// Hands every event of a segment to `each`, in order; that of a record which began in `before` comes first.
    pub fn events(
        &self,
        name: SegmentName,
        before: Option<SegmentName>,
        each: &mut dyn FnMut(Lsn, &Event),
    ) -> Result<()> {
        let bytes = self.bytes(name, &self.find(name)?.key)?;
        let mut events = Vec::new();
        let times =
            SegmentTimes::read(&self.database, name, &bytes, &mut |lsn, event| events.push((lsn, event.clone())))?;
        if let Some(before) = before.filter(|_| times.rest.0 > 0)
            && let Some((lsn, event)) = times.first_event(&*self.of(before)?, &self.database)?
        {
            each(lsn, &event);
        }
        events.iter().for_each(|(lsn, event)| each(*lsn, event));
        Ok(())
    }

    fn bytes(&self, name: SegmentName, key: &str) -> Result<Vec<u8>> {
        self.repository.wal_file(&self.database, key).context(|| format!("cannot read WAL segment {name}"))
    }

    /// The object's name holds a hash of what is in it.
    fn file(&self, object: &Listed) -> Option<PathBuf> {
        Some(self.directory.as_ref()?.join(object.key.rsplit('/').next()?))
    }
}

/// What was kept of a segment; anything that cannot be read is found out again.
fn load(file: &Path) -> Option<SegmentTimes> {
    let bytes = std::fs::read(file).ok()?;
    let (hash, body) = bytes.split_first_chunk::<32>()?;
    (blake3::hash(body) == *hash).then(|| serde_json::from_slice(body).ok()).flatten()
}

/// A cache that cannot be written costs time and nothing else.
fn keep(file: &Path, times: &SegmentTimes) {
    let write = || -> std::io::Result<()> {
        let directory = file.parent().unwrap_or(Path::new("/"));
        // names of restore points are nobody's business
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        let body = serde_json::to_vec(times)?;
        let mut temporary = tempfile::NamedTempFile::new_in(directory)?;
        std::io::Write::write_all(&mut temporary, &[&blake3::hash(&body).as_bytes()[..], &body].concat())?;
        temporary.persist(file)?;
        Ok(())
    };
    if let Err(error) = write() {
        tracing::debug!(%error, "cannot keep the times of a segment");
    }
}
