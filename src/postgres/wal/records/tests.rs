#![allow(clippy::unwrap_used)]
use proptest::prelude::*;

use super::*;
use crate::postgres::SegmentSize;

pub(crate) const PAGE: usize = 8192;
pub(crate) const SIZE: u32 = 1 << 20;

pub(crate) fn identity() -> WalIdentity {
    WalIdentity {
        major: Major::new(15).unwrap(),
        system_identifier: 7,
        segment_size: SegmentSize::new(SIZE.into()).unwrap(),
        page_bytes: PAGE as u32,
    }
}

/// Writes segments as a server does: records one after the other, headers wherever a page begins.
pub(crate) struct Writer {
    pub(crate) bytes: Vec<u8>,
    before: u64,
    first: u64,
    timeline: u32,
    system_id: u64,
}

impl Writer {
    pub(crate) fn new(number: u64) -> Self {
        Self::of(1, number, 7)
    }

    pub(crate) fn of(timeline: u32, number: u64, system_id: u64) -> Self {
        Self { bytes: Vec::new(), before: 0, first: number * u64::from(SIZE), timeline, system_id }
    }

    fn page_header(&mut self, left: usize) {
        let at = self.bytes.len();
        let is_first = at.is_multiple_of(SIZE as usize);
        let info = if left > 0 { FIRST_IS_REST } else { 0 } | if is_first { LONG_HEADER } else { 0 };
        self.bytes.extend(0xD110u16.to_le_bytes());
        self.bytes.extend(info.to_le_bytes());
        self.bytes.extend(self.timeline.to_le_bytes());
        self.bytes.extend((self.first + at as u64).to_le_bytes());
        self.bytes.extend((left as u32).to_le_bytes());
        self.bytes.extend([0; 4]);
        if is_first {
            self.bytes.extend(self.system_id.to_le_bytes());
            self.bytes.extend(SIZE.to_le_bytes());
            self.bytes.extend((PAGE as u32).to_le_bytes());
        }
    }

    pub(crate) fn record(&mut self, manager: u8, info: u8, xid: u32, data: &[u8]) -> Lsn {
        let mut body = match u8::try_from(data.len()) {
            Ok(len) => vec![255, len],
            Err(_) => [&[254][..], &(data.len() as u32).to_le_bytes()].concat(),
        };
        body.extend(data);
        let mut record = (RECORD_HEADER_BYTES as u32 + body.len() as u32).to_le_bytes().to_vec();
        record.extend(xid.to_le_bytes());
        record.extend(self.before.to_le_bytes());
        record.extend([info, manager, 0, 0]);
        let crc = crc32c::crc32c_append(crc32c::crc32c(&body), &record);
        record.extend(crc.to_le_bytes());
        record.extend(body);
        if self.bytes.len().is_multiple_of(PAGE) {
            self.page_header(0);
        }
        let lsn = self.first + self.bytes.len() as u64;
        self.before = lsn;
        let mut rest = &record[..];
        while !rest.is_empty() {
            if self.bytes.len().is_multiple_of(PAGE) {
                self.page_header(rest.len());
            }
            let room = PAGE - self.bytes.len() % PAGE;
            let (now, later) = rest.split_at(room.min(rest.len()));
            self.bytes.extend(now);
            rest = later;
        }
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
        Lsn(lsn)
    }

    pub(crate) fn commit(&mut self, xid: u32, time: i64) -> Lsn {
        self.record(XACT, COMMIT, xid, &time.to_le_bytes())
    }

    pub(crate) fn restore_point(&mut self, name: &str, time: i64) -> Lsn {
        let mut data = time.to_le_bytes().to_vec();
        data.extend(name.as_bytes());
        data.resize(72, 0);
        self.record(XLOG, RESTORE_POINT, 0, &data)
    }

    pub(crate) fn checkpoint(&mut self, redo: Lsn) -> Lsn {
        let mut data = vec![0; 88];
        data[..8].copy_from_slice(&redo.0.to_le_bytes());
        self.record(XLOG, CHECKPOINT_ONLINE, 0, &data)
    }

    /// Returns where the record ends.
    pub(crate) fn backup_end(&mut self, start: Lsn) -> Lsn {
        self.record(XLOG, BACKUP_END, 0, &start.0.to_le_bytes());
        self.end()
    }

    pub(crate) fn end(&self) -> Lsn {
        Lsn(self.first + self.bytes.len() as u64)
    }

    /// Records that say nothing until `left` bytes are left in the segment.
    pub(crate) fn fill(&mut self, left: usize) {
        let goal = SIZE as usize - left;
        while self.bytes.len() < goal {
            // the last one fits exactly, with the header of a page that begins in it
            let boundary = self.bytes.len().next_multiple_of(PAGE);
            let header = if boundary < goal { 24 } else { 0 };
            match goal - self.bytes.len() {
                room @ ..200 => self.record(10, 0, 3, &vec![1; room - 26 - header]),
                room => self.record(10, 0, 3, &vec![1; (room - 150).min(5000)]),
            };
        }
        assert_eq!(self.bytes.len(), goal);
    }

    pub(crate) fn segments(&self) -> Vec<Vec<u8>> {
        let mut bytes = self.bytes.clone();
        bytes.resize(bytes.len().next_multiple_of(SIZE as usize), 0);
        bytes.chunks(SIZE as usize).map(<[u8]>::to_vec).collect()
    }
}

/// A record that creates a tablespace.
pub(crate) fn create_tablespace(wal: &mut Writer, oid: u32, path: &str) {
    wal.record(TABLESPACE, CREATE, 7, &[&oid.to_le_bytes()[..], path.as_bytes(), b"\0"].concat());
}

/// A record that says nothing, with these data.
pub(crate) fn record(wal: &mut Writer, manager: u8, data: &[u8]) {
    wal.record(manager, 0, 7, data);
}

pub(crate) fn name(number: u64) -> SegmentName {
    SegmentName::of_number(Timeline(1), number, identity().segment_size)
}

fn events(number: u64, bytes: &[u8]) -> (Vec<(Lsn, Event)>, Walk) {
    let mut events = Vec::new();
    let walk = walk(&identity(), name(number), bytes, |lsn, _, event| events.push((lsn, event))).unwrap();
    (events, walk)
}

fn ended(xid: u32, time: i64) -> Event {
    Event::End { xid, time: TimestampTz(time), committed: true }
}

#[test]
fn finds_what_tells_a_time_between_what_does_not() {
    let mut wal = Writer::new(3);
    wal.record(10, 0, 700, &[9; 20_000]);
    let first = wal.commit(700, 1_000_000);
    wal.record(XLOG, 0xB0, 0, &[1; 9000]);
    let point = wal.restore_point("before the change", 2_000_000);
    let second = wal.record(XACT, ABORT | 0x80, 701, &[3_000_000i64.to_le_bytes().to_vec(), vec![0; 300]].concat());
    let mut checkpoint = vec![0; 88];
    checkpoint[64..72].copy_from_slice(&1_800_000_000i64.to_le_bytes());
    let third = wal.record(XLOG, CHECKPOINT_ONLINE, 0, &checkpoint);
    let (found, walk) = events(3, &wal.segments()[0]);
    let expected = vec![
        (first, ended(700, 1_000_000)),
        (point, Event::RestorePoint { name: "before the change".into(), time: TimestampTz(2_000_000) }),
        (second, Event::End { xid: 701, time: TimestampTz(3_000_000), committed: false }),
        (third, Event::Checkpoint { time: TimestampTz::from_unix_s(1_800_000_000).unwrap(), redo: Lsn(0) }),
    ];
    assert_eq!(found, expected);
    assert_eq!((walk.last, walk.stop), (Some(third), Stop::Unsound));
    assert_eq!(walk.end, Lsn(wal.first + wal.bytes.len() as u64));
}

#[test]
fn a_record_that_two_segments_share_is_found_from_both() {
    // every place where the end of the segment can cut it, its header included
    for left in (8..=96).step_by(8) {
        let mut wal = Writer::new(1);
        wal.fill(left);
        let point = wal.restore_point("cut", 5);
        let after = wal.commit(9, 6);
        let segments = wal.segments();
        assert_eq!(segments.len(), 2, "{left} bytes left");
        let (_, before_walk) = events(1, &segments[0]);
        let (found, walk) = events(2, &segments[1]);
        let Stop::Cut(cut) = before_walk.stop else { panic!("{left} bytes left: {before_walk:?}") };
        assert_eq!((cut.lsn, cut.written), (point, left as u32));
        assert!(may_begin_restore_point(&segments[0], PAGE) && cut.may_tell());
        assert!(!may_begin_restore_point(&segments[1], PAGE), "{left} bytes left");
        let expected = Event::RestorePoint { name: "cut".into(), time: TimestampTz(5) };
        assert_eq!(cut.joined(&walk.rest, identity().major), Some(expected));
        let longer = Rest { len: walk.rest.len + 8, ..walk.rest.clone() };
        for other in [Rest::default(), longer] {
            assert_eq!(cut.joined(&other, identity().major), None);
        }
        assert_eq!(found, [(after, ended(9, 6))]);
    }
}

#[test]
fn a_tablespace_is_found_wherever_its_record_lies() {
    let data = [&16_384u32.to_le_bytes()[..], b"/srv/fast\0"].concat();
    let expected = Event::Tablespace { oid: 16_384, path: b"/srv/fast".to_vec() };
    // no record ends where a page's header is
    let ends = |left: &usize| !(1..=24).contains(&((SIZE as usize - left) % PAGE));
    for left in (8..120).chain(PAGE - 120..PAGE + 120).step_by(8).filter(ends) {
        let mut wal = Writer::new(1);
        wal.fill(left);
        wal.record(TABLESPACE, CREATE, 7, &data);
        wal.record(TABLESPACE, 0x10, 7, &16_384u32.to_le_bytes());
        let segments = wal.segments();
        let (found, walk) = events(1, &segments[0]);
        let glances: Vec<bool> = segments.iter().map(|bytes| may_create_tablespace(bytes, PAGE)).collect();
        assert!(glances.contains(&true), "{left} bytes left");
        match walk.stop {
            Stop::Cut(cut) if found.is_empty() => {
                assert!(cut.may_create_tablespace(), "{left} bytes left");
                let rest = events(2, &segments[1]).1.rest;
                assert_eq!(cut.joined(&rest, identity().major).as_ref(), Some(&expected));
                // the segment that holds the end of the record's header is the one that is looked into
                assert_eq!(glances, [cut.has_header(), !cut.has_header()], "{left} bytes left");
            }
            _ => assert_eq!(found.iter().map(|(_, event)| event).collect::<Vec<_>>(), [&expected], "{left} bytes left"),
        }
    }
    let mut wal = Writer::new(1);
    wal.record(TABLESPACE, 0x10, 7, &16_384u32.to_le_bytes());
    wal.fill(0);
    assert!(!may_create_tablespace(&wal.segments()[0], PAGE));
}

#[test]
fn a_record_longer_than_a_segment_is_passed_over() {
    let mut wal = Writer::new(1);
    wal.commit(5, 1);
    wal.record(10, 0, 6, &vec![7; 5 << 19]);
    let last = wal.commit(6, 2);
    let segments = wal.segments();
    assert_eq!(segments.len(), 3);
    let (found, walk) = events(2, &segments[1]);
    assert_eq!((found, walk.last, walk.stop), (vec![], None, Stop::Unsound));
    assert_eq!(events(3, &segments[2]).0, [(last, ended(6, 2))]);
}

#[test]
fn the_walk_ends_where_a_servers_would() {
    let mut wal = Writer::new(1);
    let first = wal.commit(5, 1);
    let second = wal.commit(6, 2);
    wal.commit(7, 3);
    let whole = wal.segments().remove(0);
    // a flipped byte in the second record, in its data or in its header
    for at in [(second.0 - wal.first) as usize + 30, (second.0 - wal.first) as usize + 9] {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        let (found, walk) = events(1, &bytes);
        assert_eq!((found.len(), walk.last, walk.stop), (1, Some(first), Stop::Unsound));
    }
    // the server went on in the next segment
    wal.record(XLOG, SWITCH, 0, &[]);
    assert_eq!(events(1, &wal.segments()[0]).1.stop, Stop::Switched);
    // exactly full
    let mut wal = Writer::new(1);
    wal.fill(0);
    assert_eq!(events(1, &wal.segments()[0]).1.stop, Stop::Full);
}

#[test]
fn a_prepared_transaction_is_known_by_its_own_number() {
    for (major, statistics) in [(15, 12), (18, 16)] {
        let mut data = 42i64.to_le_bytes().to_vec();
        data.extend((1u32 | 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 8).to_le_bytes());
        data.extend([0; 8]);
        for (count, bytes) in [(3u32, 4), (1, 12), (2, statistics), (1, 16)] {
            data.extend(count.to_le_bytes());
            data.extend(vec![0xEE; count as usize * bytes]);
        }
        data.extend(4711u32.to_le_bytes());
        let mut record = vec![0; 24];
        (record[16], record[17]) = (COMMIT_PREPARED | 0x80, XACT);
        record.extend([255, data.len() as u8]);
        record.extend(&data);
        let expected = Event::End { xid: 4711, time: TimestampTz(42), committed: true };
        assert_eq!(event(&record, Major::new(major).unwrap()), Some(expected));
    }
}

/// One place after the other.
fn begins_restore_point(bytes: &[u8], page: usize) -> bool {
    (0..bytes.len() / 8).map(|eight| eight * 8).any(|at| {
        let end = bytes.len().min(at + (page - at % page).min(RECORD_HEADER_BYTES));
        let head = &bytes[at..end];
        head[..4] == RESTORE_POINT_BYTES.to_le_bytes() && (head.len() < RECORD_HEADER_BYTES || is_restore_point(head))
    })
}

proptest! {
    #[test]
    fn a_glance_misses_no_restore_point(
        pages in 1..20usize,
        page in prop::sample::select(vec![1024usize, 8192, 65536]),
        lengths in prop::collection::vec((any::<prop::sample::Index>(), any::<bool>()), 0..4),
    ) {
        let mut bytes = vec![0; pages * page];
        for (at, is_point) in lengths {
            let at = at.index(bytes.len() / 8) * 8;
            bytes[at..at + 4].copy_from_slice(&RESTORE_POINT_BYTES.to_le_bytes());
            if let (true, Some(operation)) = (is_point, bytes.get_mut(at + 16..at + 18)) {
                operation.copy_from_slice(&[RESTORE_POINT, XLOG]);
            }
        }
        prop_assert_eq!(may_begin_restore_point(&bytes, page), begins_restore_point(&bytes, page));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn damage_never_panics_and_never_invents(flips in prop::collection::vec((0usize..60_000, any::<u8>()), 1..8)) {
        let mut wal = Writer::new(1);
        let mut known = Vec::new();
        for number in 0..40 {
            wal.record(10, 0, number, &vec![2; 1000]);
            known.push((wal.commit(number, i64::from(number)), ended(number, i64::from(number))));
        }
        let mut bytes = wal.segments().remove(0);
        for (at, bits) in flips {
            // the first header is proved before the walk
            bytes[40 + at] ^= bits;
        }
        let mut found = Vec::new();
        let _ = walk(&identity(), name(1), &bytes, |lsn, _, event| found.push((lsn, event)));
        prop_assert!(found.iter().all(|event| known.contains(event)));
    }

    #[test]
    fn any_bytes_are_answered(mut page in prop::collection::vec(any::<u8>(), 0..30_000), cut in 0usize..3) {
        let header = Writer::new(1);
        let mut start = header;
        start.page_header([0, 100, 1 << 30][cut]);
        page.splice(0..0, start.bytes);
        let _ = walk(&identity(), name(1), &page, |_, _, _| {});
        let _ = event(&page, identity().major);
    }
}
