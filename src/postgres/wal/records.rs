//! The records of a WAL segment that tell when something happened: ends of transactions, restore points, checkpoints, ends of
//! recovery; and those that name a directory outside: tablespaces.
//!
//! A segment is a run of pages, each with a header (24 bytes, the first 40). Between the headers lie the records, one after the
//! other, each aligned to 8 bytes and cut wherever a page ends; a page that begins with the rest of a record says so, and how many
//! bytes are left of it (`rem_len`). A record begins with 24 bytes: length (4), transaction (4), position of the record before (8),
//! info (1), resource manager (1), padding (2), CRC32C (4). Then come the headers of its blocks and of its data, then these
//! (`access/xlogrecord.h`, `access/xlog_internal.h`; nothing here changed from 13 to 18 but what is said below).
//!
//! As a server does, the walk ends at the first record whose length, back link or CRC is not right.

mod glance;

pub use self::glance::{may_begin_restore_point, may_create_tablespace};

use super::header::{LONG_PAGE_HEADER_BYTES, SegmentError, WalIdentity};
use super::{Lsn, SegmentName};
use crate::postgres::lsn::Timeline;
use crate::postgres::timestamp::TimestampTz;
use crate::postgres::version::Major;

/// The page begins with the rest of a record.
const FIRST_IS_REST: u16 = 0x0001;
/// The header is the long one.
const LONG_HEADER: u16 = 0x0002;
/// The record that should go on here was given up after a crash; another one begins.
const FIRST_IS_INSTEAD: u16 = 0x0008;
/// A page's header, but a segment's first.
const PAGE_HEADER_BYTES: usize = 24;
/// The header of a record.
const RECORD_HEADER_BYTES: usize = 24;
/// A record of more bytes than this is not looked into beyond them.
const LOOK_BYTES: usize = 1 << 20;
/// What is kept of a record that a segment's end cuts: all that tells its time, and the subtransactions of most.
const CUT_BYTES: usize = 4096;

/// What a record says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// a transaction ended; recovery can stop here
    End {
        /// its number
        xid: u32,
        /// when
        time: TimestampTz,
        /// committed, not rolled back
        committed: bool,
    },
    /// `PREPARE TRANSACTION`: from here on the transaction survives
    Prepared {
        /// when
        time: TimestampTz,
    },
    /// `pg_create_restore_point`; recovery can stop here
    RestorePoint {
        /// its name
        name: String,
        /// when
        time: TimestampTz,
    },
    /// a checkpoint that was begun at that moment
    Checkpoint {
        /// when, in whole seconds
        time: TimestampTz,
        /// where replay from it starts
        redo: Lsn,
    },
    /// the end of a backup of a primary
    BackupEnd {
        /// where replay from that backup starts
        start: Lsn,
    },
    /// a server ended its recovery and began a timeline
    EndOfRecovery {
        /// when
        time: TimestampTz,
        /// the timeline it began
        timeline: Timeline,
    },
    /// `CREATE TABLESPACE`
    Tablespace {
        /// its oid
        oid: u32,
        /// the directory that it was given; empty for one inside the data directory
        path: Vec<u8>,
    },
}

/// A segment as it was walked through.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Walk {
    /// where the last whole record begins
    pub last: Option<Lsn>,
    /// one past the last whole record
    pub end: Lsn,
    /// why there are no more
    pub stop: Stop,
    /// the rest of a record that began in a segment before
    pub rest: Rest,
}

/// Why a walk through a segment ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stop {
    /// the segment ends with a whole record
    Full,
    /// the server began the next segment early
    Switched,
    /// the segment's end cuts a record
    Cut(CutRecord),
    /// no record follows, or no sound one
    Unsound,
}

/// A record that goes on in the next segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CutRecord {
    /// where it begins
    pub lsn: Lsn,
    /// how many bytes of it are in the segment where it begins
    pub written: u32,
    /// the first of them: at least its header, as far as that is there
    pub head: Vec<u8>,
}

/// What a segment begins with that belongs to a record before.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rest {
    /// how many bytes; none when the segment begins with a record
    pub len: u32,
    /// the first of them
    pub head: Vec<u8>,
}

impl CutRecord {
    /// What the record says, now that its rest is known; of both the head may be all there is.
    pub fn joined(&self, rest: &Rest, major: Major) -> Option<Event> {
        let total = u32_at(&self.head, 0)?;
        if self.written.checked_add(rest.len)? != total || self.head.len() != self.written as usize {
            return None;
        }
        event(&[&self.head[..], &rest.head[..]].concat(), major)
    }

    /// Whether it can be a record that recovery stops at or that tells a time.
    pub fn may_tell(&self) -> bool {
        self.head.len() < RECORD_HEADER_BYTES || tells(&self.head)
    }

    /// Whether the part that is there tells what the record is.
    pub fn has_header(&self) -> bool {
        self.head.len() >= RECORD_HEADER_BYTES
    }

    /// Whether it can create a tablespace.
    pub fn may_create_tablespace(&self) -> bool {
        self.head.len() < RECORD_HEADER_BYTES || operation(&self.head) == Some((TABLESPACE, CREATE))
    }
}

/// Walks through a segment and hands each event to `each`, with the position of its record and one past that record's end.
///
/// # Errors
/// When the bytes are not those of that segment of that cluster. Unsound records are no error: WAL ends there.
pub fn walk(
    identity: &WalIdentity,
    name: SegmentName,
    bytes: &[u8],
    mut each: impl FnMut(Lsn, Lsn, Event),
) -> Result<Walk, SegmentError> {
    let header = identity.check_segment(name, bytes)?;
    let pages = Pages {
        bytes,
        page: identity.page_bytes as usize,
        first: header.page_address,
        magic: identity.major.wal_magic(),
    };
    let mut done = Walk { last: None, end: header.page_address, stop: Stop::Unsound, rest: Rest::default() };
    let Some(mut at) = pages.first_record(&mut done.rest) else { return Ok(done) };
    done.end = pages.lsn(at);
    loop {
        let start = match pages.next_record(at) {
            Next::At(start) => start,
            Next::End => {
                done.stop = Stop::Full;
                return Ok(done);
            }
            Next::Unsound => return Ok(done),
        };
        let (record, way) = pages.record(start);
        match way {
            Way::Whole(end) if record.is_sound(done.last) => {
                at = end.next_multiple_of(8);
                if let Some(event) = event(&record.head, identity.major) {
                    each(pages.lsn(start), pages.lsn(at), event);
                }
                (done.last, done.end) = (Some(pages.lsn(start)), pages.lsn(at));
                if is_switch(&record.head) {
                    done.stop = Stop::Switched;
                    return Ok(done);
                }
            }
            Way::Instead(page) => at = page,
            Way::Cut(written) => {
                let mut head = record.head;
                head.truncate(CUT_BYTES);
                done.stop = Stop::Cut(CutRecord { lsn: pages.lsn(start), written, head });
                return Ok(done);
            }
            Way::Whole(_) | Way::Unsound => return Ok(done),
        }
    }
}

/// The pages of a segment; positions are offsets in it.
struct Pages<'a> {
    bytes: &'a [u8],
    page: usize,
    first: Lsn,
    magic: u16,
}

/// Where the next record begins.
enum Next {
    At(usize),
    End,
    Unsound,
}

/// How far a record could be followed.
enum Way {
    /// to its end
    Whole(usize),
    /// to the end of the segment: so many bytes of it
    Cut(u32),
    /// to a page on which other records go on in its place
    Instead(usize),
    Unsound,
}

/// The beginning of a record, and the CRC of its body.
struct Record {
    head: Vec<u8>,
    len: usize,
    seen: usize,
    crc: u32,
}

impl Pages<'_> {
    fn lsn(&self, at: usize) -> Lsn {
        Lsn(self.first.0.saturating_add(at as u64))
    }

    /// Flags, bytes left of the record before, and length of the header of the page at `at`.
    fn header(&self, at: usize) -> Option<(u16, u32, usize)> {
        let header = self.bytes.get(at..at.checked_add(PAGE_HEADER_BYTES)?)?;
        let (magic, info) = (u16_at(header, 0)?, u16_at(header, 2)?);
        let sound = magic == self.magic && u64_at(header, 8)? == self.lsn(at).0;
        let len = if info & LONG_HEADER == 0 { PAGE_HEADER_BYTES } else { LONG_PAGE_HEADER_BYTES };
        sound.then_some((info, u32_at(header, 16)?, len))
    }

    /// Past the rest of a record before, which is collected; `None` when the segment holds no beginning of a record.
    fn first_record(&self, rest: &mut Rest) -> Option<usize> {
        let (info, left, len) = self.header(0)?;
        if info & FIRST_IS_REST == 0 {
            return Some(0);
        }
        rest.len = left;
        let mut at = len;
        let mut left = left as usize;
        while left > 0 {
            if at.is_multiple_of(self.page) {
                let (info, rem_len, len) = self.header(at)?;
                if info & FIRST_IS_REST == 0 || rem_len as usize != left {
                    return None;
                }
                at += len;
            }
            let end = (at / self.page + 1).checked_mul(self.page)?.min(at.checked_add(left)?);
            let part = self.bytes.get(at..end)?;
            let keep = CUT_BYTES.saturating_sub(rest.head.len()).min(part.len());
            rest.head.extend_from_slice(&part[..keep]);
            left -= part.len();
            at = end;
        }
        Some(at.next_multiple_of(8))
    }

    /// The record at `at`, or behind the header of the page that begins there.
    fn next_record(&self, at: usize) -> Next {
        if at >= self.bytes.len() {
            return Next::End;
        }
        if !at.is_multiple_of(self.page) {
            return Next::At(at);
        }
        match self.header(at) {
            Some((info, _, len)) if info & FIRST_IS_REST == 0 => Next::At(at + len),
            _ => Next::Unsound,
        }
    }

    /// Follows the record that begins at `start` over its pages.
    fn record(&self, start: usize) -> (Record, Way) {
        let mut record = Record { head: Vec::new(), len: 0, seen: 0, crc: 0 };
        let length = self.bytes.get(start..).and_then(|bytes| u32_at(bytes, 0)).unwrap_or(0) as usize;
        if length < RECORD_HEADER_BYTES {
            return (record, Way::Unsound);
        }
        record.len = length;
        let mut at = start;
        while record.seen < length {
            if at >= self.bytes.len() {
                // less than a record's length, which has 32 bits
                let written = record.seen as u32;
                return (record, Way::Cut(written));
            }
            if at.is_multiple_of(self.page) {
                match self.header(at) {
                    Some((info, ..)) if info & FIRST_IS_INSTEAD != 0 => return (record, Way::Instead(at)),
                    Some((info, left, len)) if info & FIRST_IS_REST != 0 && left as usize == length - record.seen => {
                        at += len;
                    }
                    _ => return (record, Way::Unsound),
                }
            }
            let end = ((at / self.page + 1) * self.page).min(at + (length - record.seen)).min(self.bytes.len());
            record.add(&self.bytes[at..end]);
            at = end;
        }
        (record, Way::Whole(at))
    }
}

impl Record {
    fn add(&mut self, part: &[u8]) {
        let header = RECORD_HEADER_BYTES.saturating_sub(self.seen).min(part.len());
        self.head.extend_from_slice(&part[..header]);
        let body = &part[header..];
        self.crc = crc32c::crc32c_append(self.crc, body);
        if tells(&self.head) {
            let keep = LOOK_BYTES.saturating_sub(self.head.len()).min(body.len());
            self.head.extend_from_slice(&body[..keep]);
        }
        self.seen += part.len();
    }

    /// Its CRC is right, and it names the record before it.
    fn is_sound(&self, before: Option<Lsn>) -> bool {
        let Some(header) = self.head.get(..20) else { return false };
        let links = before.is_none_or(|before| u64_at(header, 8) == Some(before.0));
        links && u32_at(&self.head, 20) == Some(crc32c::crc32c_append(self.crc, header))
    }
}

/// Resource managers, and what their records are (`access/rmgrlist.h`, `catalog/pg_control.h`, `access/xact.h`,
/// `commands/tablespace.h`).
const XLOG: u8 = 0;
const XACT: u8 = 1;
const TABLESPACE: u8 = 5;
const CREATE: u8 = 0x00;
const CHECKPOINT_SHUTDOWN: u8 = 0x00;
const CHECKPOINT_ONLINE: u8 = 0x10;
const SWITCH: u8 = 0x40;
const BACKUP_END: u8 = 0x50;
const RESTORE_POINT: u8 = 0x70;
const END_OF_RECOVERY: u8 = 0x90;
const COMMIT: u8 = 0x00;
const PREPARE: u8 = 0x10;
const ABORT: u8 = 0x20;
const COMMIT_PREPARED: u8 = 0x30;
const ABORT_PREPARED: u8 = 0x40;
/// The length of every restore point: header, header of its data (2), time (8), name (64).
const RESTORE_POINT_BYTES: u32 = 98;
/// The length of a record that creates a tablespace: header, header of its data (2), oid (4), path (1 to 1024) with a zero byte;
/// with all that may stand between, an origin and a transaction.
pub const TABLESPACE_BYTES: std::ops::RangeInclusive<u32> = 31..=1100;

/// Manager and operation of a record whose header is whole.
fn operation(head: &[u8]) -> Option<(u8, u8)> {
    let (info, manager) = (*head.get(16)?, *head.get(17)?);
    head.get(RECORD_HEADER_BYTES - 1)?;
    // the lower half is the WAL's own; a transaction's record uses the highest bit as a flag
    Some((manager, if manager == XACT { info & 0x70 } else { info & 0xF0 }))
}

/// Whether it is worth looking into.
fn tells(head: &[u8]) -> bool {
    match operation(head) {
        Some((XLOG, what)) => {
            matches!(what, CHECKPOINT_SHUTDOWN | CHECKPOINT_ONLINE | BACKUP_END | RESTORE_POINT | END_OF_RECOVERY)
        }
        Some((XACT, what)) => matches!(what, COMMIT | PREPARE | ABORT | COMMIT_PREPARED | ABORT_PREPARED),
        Some((TABLESPACE, what)) => what == CREATE,
        _ => false,
    }
}

fn is_switch(head: &[u8]) -> bool {
    operation(head) == Some((XLOG, SWITCH))
}

fn is_restore_point(head: &[u8]) -> bool {
    operation(head) == Some((XLOG, RESTORE_POINT))
}

/// What a record says, of which at least the beginning is there.
fn event(record: &[u8], major: Major) -> Option<Event> {
    let (manager, what) = operation(record)?;
    if !tells(record) {
        return None;
    }
    let data = main_data(record)?;
    let time = |at| Some(TimestampTz(u64_at(data, at)? as i64));
    Some(match (manager, what) {
        // an xl_xact_prepare: magic (4), length (4), transaction (4), database (4), time, ...
        (XACT, PREPARE) => Event::Prepared { time: time(16)? },
        (XACT, _) => {
            let of_prepared = matches!(what, COMMIT_PREPARED | ABORT_PREPARED);
            let own = u32_at(record, 4)?;
            let xid = if of_prepared { prepared_xid(record[16], data, major)? } else { own };
            Event::End { xid, time: time(0)?, committed: matches!(what, COMMIT | COMMIT_PREPARED) }
        }
        (TABLESPACE, _) => {
            let path = data.get(4..)?.split(|&byte| byte == 0).next()?;
            Event::Tablespace { oid: u32_at(data, 0)?, path: path.to_vec() }
        }
        (_, RESTORE_POINT) => {
            let name = data.get(8..72)?;
            let name = name.split(|&byte| byte == 0).next()?;
            Event::RestorePoint { name: String::from_utf8_lossy(name).into_owned(), time: time(0)? }
        }
        (_, BACKUP_END) => Event::BackupEnd { start: Lsn(u64_at(data, 0)?) },
        (_, END_OF_RECOVERY) => Event::EndOfRecovery { time: time(0)?, timeline: Timeline(u32_at(data, 8)?) },
        // a CheckPoint, as in pg_control: redo (8), timelines (4 + 4), full_page_writes and in 17 wal_level (8), ...
        _ => {
            Event::Checkpoint { time: TimestampTz::from_unix_s(u64_at(data, 64)? as i64)?, redo: Lsn(u64_at(data, 0)?) }
        }
    })
}

/// The data of a record that refers to no block: behind the headers, of which its own is the last.
fn main_data(record: &[u8]) -> Option<&[u8]> {
    let mut at = RECORD_HEADER_BYTES;
    loop {
        at += match *record.get(at)? {
            // the origin of a replicated transaction (2), the transaction a subtransaction belongs to (4)
            253 => 3,
            252 => 5,
            255 => return record.get(at + 2..),
            254 => return record.get(at + 5..),
            _ => return None,
        };
    }
}

/// The transaction that `COMMIT PREPARED` or `ROLLBACK PREPARED` ended: behind everything else that such a record may hold,
/// of which flags tell.
fn prepared_xid(info: u8, data: &[u8], major: Major) -> Option<u32> {
    if info & 0x80 == 0 {
        return None;
    }
    let flags = u32_at(data, 8)?;
    let mut at = 12usize;
    if flags & 1 != 0 {
        // database and tablespace
        at += 8;
    }
    // subtransactions, dropped relations, dropped statistics (from 15 on; larger in 18), invalidations
    let statistics = if major.number() >= 18 { 16 } else { 12 };
    for (flag, bytes) in [(1 << 1, 4), (1 << 2, 12), (1 << 8, statistics), (1 << 3, 16)] {
        if flags & flag != 0 {
            let count = u32_at(data, at)? as usize;
            at = at.checked_add(4)?.checked_add(count.checked_mul(bytes)?)?;
        }
    }
    (flags & (1 << 4) != 0).then(|| u32_at(data, at)).flatten()
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|part| u16::from_le_bytes(*part))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|part| u32::from_le_bytes(*part))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().map(|part| u64::from_le_bytes(*part))
}

#[cfg(test)]
pub(crate) mod tests;
