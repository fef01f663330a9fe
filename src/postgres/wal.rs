//! Names of the files in `pg_wal` and in an archive; what is inside them is in [`header`], [`records`], [`landmarks`] and [`history`]; which of
//! them there are is in [`coverage`].

pub mod coverage;
pub mod header;
pub mod history;
pub mod landmarks;
pub mod records;

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use super::lsn::{Lsn, Timeline};

/// The size of a WAL segment: a power of two from 1 MiB to 1 GiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SegmentSize(u32);

/// A size no segment can have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a WAL segment of {bytes} bytes cannot be: it is a power of two from 1 MiB to 1 GiB")]
pub struct SegmentSizeError {
    /// the size given
    pub bytes: u64,
}

impl SegmentSize {
    /// From a number of bytes.
    pub fn new(bytes: u64) -> Result<Self, SegmentSizeError> {
        match u32::try_from(bytes) {
            Ok(size) if size.is_power_of_two() && (1 << 20..=1 << 30).contains(&size) => Ok(Self(size)),
            _ => Err(SegmentSizeError { bytes }),
        }
    }

    /// The size in bytes.
    pub fn bytes(self) -> u32 {
        self.0
    }

    /// The number, from the beginning of the WAL, of the segment that holds the byte at `lsn`.
    pub fn segment_of(self, lsn: Lsn) -> u64 {
        lsn.0 / u64::from(self.0)
    }

    /// Where segment `number` begins; `None` past the end of the WAL.
    pub fn first_lsn(self, number: u64) -> Option<Lsn> {
        number.checked_mul(self.0.into()).map(Lsn)
    }

    /// The numbers of the segments that hold the WAL from `start` up to `stop`, which is one past the last byte:
    /// a stop exactly on a boundary needs nothing of the segment it begins. Never empty: the start's is always there.
    pub fn segments_covering(self, start: Lsn, stop: Lsn) -> RangeInclusive<u64> {
        let first = self.segment_of(start);
        let last = self.segment_of(stop.checked_sub(1).unwrap_or(start));
        first..=last.max(first)
    }

    /// The names, on `timeline`, of the segments that hold the WAL from `start` up to `stop`.
    pub fn names_covering(self, timeline: Timeline, start: Lsn, stop: Lsn) -> impl Iterator<Item = SegmentName> {
        self.segments_covering(start, stop).map(move |number| SegmentName::of_number(timeline, number, self))
    }

    /// Segments in 4 GiB of WAL: the third part of a name counts up to this.
    fn segments_per_file_id(self) -> u64 {
        (1 << 32) / u64::from(self.0)
    }
}

impl fmt::Display for SegmentSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} MiB", self.0 >> 20)
    }
}

/// The name of a WAL segment: 24 upper-case hexadecimal digits.
///
/// What it says of the position depends on the segment size, which a name alone does not tell.
/// The order is that of the text: by timeline, then by position.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentName {
    timeline: Timeline,
    file_id: u32,
    in_file_id: u32,
}

impl SegmentName {
    /// The segment on `timeline` that holds the byte at `lsn`.
    pub fn of_lsn(timeline: Timeline, lsn: Lsn, size: SegmentSize) -> Self {
        Self::of_number(timeline, size.segment_of(lsn), size)
    }

    /// The segment with this number. Numbers past the end of the WAL name its last segment.
    pub fn of_number(timeline: Timeline, number: u64, size: SegmentSize) -> Self {
        let per_id = size.segments_per_file_id();
        let number = number.min(size.segment_of(Lsn(u64::MAX)));
        // both parts fit: the number is at most 2^64 / size, and the remainder is below 4096
        Self { timeline, file_id: (number / per_id) as u32, in_file_id: (number % per_id) as u32 }
    }

    /// The timeline it was written on.
    pub fn timeline(self) -> Timeline {
        self.timeline
    }

    /// Its number from the beginning of the WAL; `None` when no segment of this size has such a name.
    pub fn number(self, size: SegmentSize) -> Option<u64> {
        let per_id = size.segments_per_file_id();
        (u64::from(self.in_file_id) < per_id).then(|| u64::from(self.file_id) * per_id + u64::from(self.in_file_id))
    }

    /// Where it begins; `None` when no segment of this size has such a name.
    pub fn first_lsn(self, size: SegmentSize) -> Option<Lsn> {
        size.first_lsn(self.number(size)?)
    }

    /// The segment after it on the same timeline, if there is one.
    pub fn next(self, size: SegmentSize) -> Option<Self> {
        let number = self.number(size)? + 1;
        size.first_lsn(number).map(|_| Self::of_number(self.timeline, number, size))
    }

    /// It and those after it on the same timeline, up to `last`.
    pub fn up_to(self, last: Self, size: SegmentSize) -> impl Iterator<Item = Self> {
        let within = move |segment: &Self| *segment <= last;
        std::iter::successors(Some(self).filter(within), move |segment| segment.next(size).filter(within))
    }

    /// The first 16 digits, timeline and 4 GiB of WAL: the directory of an archive it belongs to.
    pub fn directory(self) -> String {
        format!("{:08X}{:08X}", self.timeline.0, self.file_id)
    }
}

impl fmt::Display for SegmentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08X}{:08X}{:08X}", self.timeline.0, self.file_id, self.in_file_id)
    }
}

impl FromStr for SegmentName {
    type Err = WalNameError;

    fn from_str(text: &str) -> Result<Self, WalNameError> {
        match WalName::parse(text)? {
            WalName::Segment(name) => Ok(name),
            _ => Err(WalNameError { name: text.to_owned() }),
        }
    }
}

/// Every kind of file that PostgreSQL asks an archive to keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WalName {
    /// a complete segment: `0000000100000016000000B3`
    Segment(SegmentName),
    /// the last segment of a timeline that ended in it: `....partial`
    Partial(SegmentName),
    /// where a timeline came from: `00000002.history`
    History(Timeline),
    /// that a backup was taken: `0000000100000016000000B3.00000028.backup`
    BackupHistory {
        /// the segment the backup starts in
        segment: SegmentName,
        /// the start's offset in it, in bytes
        offset: u32,
    },
}

/// A name that PostgreSQL gives no WAL file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("\"{name}\" is not the name of a WAL segment, a .partial, a .history or a .backup file")]
pub struct WalNameError {
    /// what was given
    pub name: String,
}

impl WalName {
    /// Reads a file's name, without directories.
    pub fn parse(name: &str) -> Result<Self, WalNameError> {
        Self::classify(name).ok_or_else(|| WalNameError { name: name.to_owned() })
    }

    fn classify(name: &str) -> Option<Self> {
        let (stem, suffix) = name.split_once('.').unwrap_or((name, ""));
        if suffix == "history" {
            return hex8(stem).filter(|&id| id > 0).map(|id| Self::History(Timeline(id)));
        }
        if stem.len() != 24 || !stem.is_ascii() {
            return None;
        }
        let segment = SegmentName {
            timeline: Timeline(hex8(&stem[..8]).filter(|&id| id > 0)?),
            file_id: hex8(&stem[8..16])?,
            in_file_id: hex8(&stem[16..])?,
        };
        match suffix {
            "" if !name.contains('.') => Some(Self::Segment(segment)),
            "partial" => Some(Self::Partial(segment)),
            _ => Some(Self::BackupHistory { segment, offset: hex8(suffix.strip_suffix(".backup")?)? }),
        }
    }

    /// The timeline it belongs to; for a history file the one it tells of.
    pub fn timeline(self) -> Timeline {
        match self {
            Self::Segment(name) | Self::Partial(name) | Self::BackupHistory { segment: name, .. } => name.timeline,
            Self::History(timeline) => timeline,
        }
    }
}

impl fmt::Display for WalName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Segment(name) => write!(f, "{name}"),
            Self::Partial(name) => write!(f, "{name}.partial"),
            Self::History(timeline) => write!(f, "{:08X}.history", timeline.0),
            Self::BackupHistory { segment, offset } => write!(f, "{segment}.{offset:08X}.backup"),
        }
    }
}

/// Exactly 8 upper-case hexadecimal digits, as PostgreSQL writes and accepts them.
fn hex8(digits: &str) -> Option<u32> {
    let upper = digits.len() == 8 && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'A'..=b'F'));
    upper.then(|| u32::from_str_radix(digits, 16).ok()).flatten()
}

#[cfg(test)]
mod tests;
