//! Shows how far a server's replay is: its startup process says in its title which segment it reads, before anybody can log in.

use std::fs;
use std::time::{Duration, Instant};

use super::super::clones::{Clone, Place};
use super::super::output::Progress;
use super::super::stop::running_server;
use crate::format::manifest::Description;
use crate::postgres::{SegmentName, SegmentSize};
use crate::progress::Monitor;

/// What is over sooner needs no progress.
const SHOW_AFTER: Duration = Duration::from_secs(1);
/// Time between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Progress of the replay of one clone, over all starts of its server.
pub(super) struct Replay {
    size: SegmentSize,
    /// timeline, first and last number of the segments to be replayed
    legs: Vec<(u32, u64, u64)>,
    progress: Option<Progress>,
    done: u64,
    startup: Option<u32>,
    looked: Instant,
    started: Instant,
}

impl Replay {
    /// Of a clone of this backup; none where its manifest names no WAL.
    pub(super) fn new(clone: &Clone, of: &Description) -> Option<Self> {
        let size = SegmentSize::new(of.database.wal_segment_size).ok()?;
        let own = || {
            let number = |name: &str| name.parse::<SegmentName>().ok()?.number(size);
            Some(vec![(of.timeline, number(&of.wal_start)?, number(&of.wal_stop)?)])
        };
        let legs = match &clone.recovery {
            Some(prepared) => prepared.recovery.wal.clone(),
            None => own()?,
        };
        let now = Instant::now();
        Some(Self { size, legs, progress: None, done: 0, startup: None, looked: now, started: now })
    }

    /// Looks how far replay is, now and then.
    pub(super) fn look(&mut self, place: &Place) {
        if self.started.elapsed() < SHOW_AFTER || self.looked.elapsed() < LOOK_EVERY {
            return;
        }
        self.looked = Instant::now();
        let Some(done) = self.segment(place).and_then(|segment| self.bytes_before(segment)) else { return };
        let progress = self.progress.get_or_insert_with(|| {
            let progress = Progress::told();
            let total: u64 = self.legs.iter().map(|(_, first, last)| (last - first).saturating_add(1)).sum();
            progress.stage("replaying WAL", total.saturating_mul(self.size.bytes().into()));
            progress
        });
        progress.advance(done.saturating_sub(self.done));
        self.done = self.done.max(done);
    }

    /// The segment that the startup process reads.
    fn segment(&mut self, place: &Place) -> Option<SegmentName> {
        if let Some(segment) = self.startup.and_then(segment_of) {
            return Some(segment);
        }
        let server = running_server(place)?.as_raw();
        let processes = fs::read_dir("/proc").ok()?.flatten();
        let mut numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        self.startup = numbers.find(|pid| parent(*pid) == Some(server) && segment_of(*pid).is_some());
        self.startup.and_then(segment_of)
    }

    /// Bytes of WAL before this segment; none if it is not one of those to be replayed.
    fn bytes_before(&self, segment: SegmentName) -> Option<u64> {
        let number = segment.number(self.size)?;
        let mut before = 0u64;
        for (timeline, first, last) in &self.legs {
            if *timeline == segment.timeline().0 && (*first..=*last).contains(&number) {
                return Some((before + number - first).saturating_mul(self.size.bytes().into()));
            }
            before += (last - first).saturating_add(1);
        }
        None
    }
}

/// `postgres: pgcairn-name: startup recovering 000000010000000000000005`
fn segment_of(pid: u32) -> Option<SegmentName> {
    let title = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let title = String::from_utf8_lossy(&title);
    let (_, state) = title.split_once("startup ")?;
    state.split(|c: char| !c.is_ascii_alphanumeric()).find_map(|word| word.parse().ok())
}

fn parent(pid: u32) -> Option<i32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // the name stands in parentheses and may hold anything
    stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()
}
