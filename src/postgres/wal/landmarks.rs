//! Records by which the content of a WAL segment is recognised: checkpoints, ends of backups, restore points.
//!
//! Two servers with one system identifier give the same names to different WAL: a copy of a data directory, or a machine that
//! went back to a snapshot. Only a record with a known position and content tells whose WAL a segment holds.

use super::header::{SegmentError, WalIdentity};
use super::records::{CutRecord, Event, Rest, Stop, walk};
use super::{SegmentName, SegmentSize};
use crate::postgres::lsn::Lsn;
use crate::postgres::version::Major;

/// A record looked for is not longer than this, page headers included: its position tells which segments can hold it.
const RECORD_BYTES_MAX: u64 = 512;

/// The beginning of the name of a restore point by which this program recognises the WAL of a server.
const MARK: &str = "pgcairn mark ";
/// Digits of its nonce.
const NONCE_DIGITS: usize = 32;

/// Returns the name of a restore point that nobody else writes.
pub fn mark_name(nonce: [u8; NONCE_DIGITS / 2]) -> String {
    nonce.iter().fold(MARK.to_owned(), |name, byte| format!("{name}{byte:02x}"))
}

/// Whether a restore point is one of this program's own, which nobody wants to recover to.
pub fn is_own_restore_point(name: &str) -> bool {
    let is_nonce = |text: &str| text.len() == NONCE_DIGITS && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    // the second is what earlier versions wrote
    name.strip_prefix(MARK).is_some_and(is_nonce) || name == "pgcairn"
}

/// Where a record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// it begins here
    Begins(Lsn),
    /// one past its end
    Ends(Lsn),
}

/// The landmarks of one segment.
#[derive(Clone, Debug)]
pub struct Landmarks {
    found: Vec<(Lsn, Lsn, Event)>,
    cut: Option<CutRecord>,
    rest: Rest,
    first: Lsn,
    end: Lsn,
}

impl Landmarks {
    /// Reads a segment.
    ///
    /// # Errors
    /// When the bytes are not that segment of that cluster.
    pub fn read(identity: &WalIdentity, name: SegmentName, bytes: &[u8]) -> Result<Self, SegmentError> {
        let mut found = Vec::new();
        let first = identity.check_segment(name, bytes)?.page_address;
        let walked = walk(identity, name, bytes, |begin, end, event| {
            if is_landmark(&event) {
                found.push((begin, end, event));
            }
        })?;
        let (cut, end) = match walked.stop {
            Stop::Cut(cut) => (Some(cut), walked.end),
            // the record that ends a segment early reaches to its end
            Stop::Switched => (None, Lsn(first.0.saturating_add(identity.segment_size.bytes().into()))),
            Stop::Full | Stop::Unsound => (None, walked.end),
        };
        Ok(Self { found, cut, rest: walked.rest, first, end })
    }

    /// Whether sound records reach up to `lsn`.
    pub fn reaches(&self, lsn: Lsn) -> bool {
        self.end >= lsn
    }

    /// Whether `lsn` lies in a record, or is its end, that began in a segment before.
    pub fn is_rest_up_to(&self, lsn: Lsn) -> bool {
        self.rest.len > 0 && lsn <= first_record(self)
    }

    fn at(&self, place: Place) -> Option<&Event> {
        let is_it = |(begin, end, _): &&(Lsn, Lsn, Event)| match place {
            Place::Begins(lsn) => *begin == lsn,
            Place::Ends(lsn) => *end == lsn,
        };
        self.found.iter().find(is_it).map(|(_, _, event)| event)
    }
}

/// The numbers of the segments that can hold a record: the one that must be there first.
pub fn holders(size: SegmentSize, place: Place) -> Vec<u64> {
    let bytes = u64::from(size.bytes());
    match place {
        Place::Begins(lsn) => {
            let number = size.segment_of(lsn);
            let near_end = bytes - lsn.0 % bytes < RECORD_BYTES_MAX;
            if near_end { vec![number, number + 1] } else { vec![number] }
        }
        Place::Ends(lsn) => {
            let last = Lsn(lsn.0.saturating_sub(1));
            let number = size.segment_of(last);
            let near_begin = last.0 % bytes < RECORD_BYTES_MAX && number > 0;
            if near_begin { vec![number, number - 1] } else { vec![number] }
        }
    }
}

/// Looks for the record at `place` in the segments that [`holders`] names, in that order, as far as they are there.
pub fn record_at(place: Place, major: Major, segments: &[Option<&Landmarks>]) -> Option<Event> {
    let first = (*segments.first()?)?;
    if let Some(event) = first.at(place) {
        return Some(event.clone());
    }
    let second = (*segments.get(1)?)?;
    let (before, after) = match place {
        Place::Begins(lsn) if first.cut.as_ref()?.lsn == lsn => (first, second),
        Place::Ends(lsn) if first.rest.len > 0 && lsn == first_record(first) => (second, first),
        _ => return None,
    };
    before.cut.as_ref()?.joined(&after.rest, major).filter(is_landmark)
}

fn is_landmark(event: &Event) -> bool {
    matches!(event, Event::RestorePoint { .. } | Event::Checkpoint { .. } | Event::BackupEnd { .. })
}

/// Where the first record that begins in a segment begins at the earliest: after the rest of one before, on the first page.
fn first_record(of: &Landmarks) -> Lsn {
    let header = super::header::LONG_PAGE_HEADER_BYTES as u64;
    Lsn((of.first.0 + header + u64::from(of.rest.len)).next_multiple_of(8))
}

#[cfg(test)]
mod tests;
