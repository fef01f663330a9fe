//! The header of a WAL segment's first page, and the proof that a segment is what its name says.

use super::{SegmentName, SegmentSize};
use crate::postgres::lsn::{Lsn, Timeline};
use crate::postgres::version::Major;

/// The size of the header, in bytes.
pub const LONG_PAGE_HEADER_BYTES: usize = 40;

/// The flag that says that the header is the long one.
const INFO_LONG_HEADER: u16 = 0x0002;

/// The header of the first page of a segment, as found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LongPageHeader {
    /// tells the major version
    pub magic: u16,
    /// flags
    pub info: u16,
    /// the timeline of the page's first record
    pub timeline: Timeline,
    /// the position of the page, so of the segment
    pub page_address: Lsn,
    /// the cluster it belongs to
    pub system_identifier: u64,
    /// the size of the segment, in bytes
    pub segment_bytes: u32,
    /// the size of a WAL page, in bytes
    pub page_bytes: u32,
}

/// What a cluster's segments must have in common, from its pg_control.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WalIdentity {
    /// its major version
    pub major: Major,
    /// its identifier
    pub system_identifier: u64,
    /// the size of its segments
    pub segment_size: SegmentSize,
    /// the size of its WAL pages, in bytes
    pub page_bytes: u32,
}

/// Why a segment is not the one its name says.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SegmentError {
    /// the file was cut
    #[error("WAL segment {name} has {bytes} bytes, not even its {LONG_PAGE_HEADER_BYTES} byte header")]
    Short {
        /// its name
        name: SegmentName,
        /// its size
        bytes: usize,
    },
    /// written by another major, or no WAL at all
    #[error("WAL segment {name} has magic {found:04X}{}, but PostgreSQL {expected} writes {:04X}",
            of_major(*found), expected.wal_magic())]
    Magic {
        /// its name
        name: SegmentName,
        /// the magic found
        found: u16,
        /// the major expected
        expected: Major,
    },
    /// its first page has a short header, so it is no segment's first page
    #[error("WAL segment {name} does not begin with a segment's first page (flags {info:04x})")]
    NotFirstPage {
        /// its name
        name: SegmentName,
        /// the flags found
        info: u16,
    },
    /// written by another cluster
    #[error("WAL segment {name} belongs to the cluster with system identifier {found}, not to {expected}")]
    SystemIdentifier {
        /// its name
        name: SegmentName,
        /// the identifier in the segment
        found: u64,
        /// the cluster's
        expected: u64,
    },
    /// written with another segment size
    #[error("WAL segment {name} says that segments have {found} bytes, but this cluster's have {expected}")]
    SegmentSize {
        /// its name
        name: SegmentName,
        /// the size in the segment
        found: u32,
        /// the cluster's
        expected: u32,
    },
    /// written with another page size
    #[error("WAL segment {name} says that WAL pages have {found} bytes, but this cluster's have {expected}")]
    PageSize {
        /// its name
        name: SegmentName,
        /// the size in the segment
        found: u32,
        /// the cluster's
        expected: u32,
    },
    /// a name that no segment of this size has
    #[error("WAL segment {name} has a name that no segment of {size} has")]
    Name {
        /// its name
        name: SegmentName,
        /// the cluster's segment size
        size: SegmentSize,
    },
    /// renamed, or recycled and never written
    #[error("WAL segment {name} begins at {found}, but its name says {expected}")]
    PageAddress {
        /// its name
        name: SegmentName,
        /// the position in the segment
        found: Lsn,
        /// the position its name says
        expected: Lsn,
    },
    /// WAL of a later timeline under an earlier one's name
    #[error("WAL segment {name} begins on timeline {found}, later than its name says")]
    Timeline {
        /// its name
        name: SegmentName,
        /// the timeline in the segment
        found: Timeline,
    },
}

fn of_major(magic: u16) -> String {
    Major::from_wal_magic(magic).map(|major| format!(" (PostgreSQL {major})")).unwrap_or_default()
}

impl LongPageHeader {
    /// Reads the first bytes of a segment as they are; `None` when there are too few.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let header = bytes.first_chunk::<LONG_PAGE_HEADER_BYTES>()?;
        let u16_at = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
        let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        Some(Self {
            magic: u16_at(0),
            info: u16_at(2),
            timeline: Timeline(u32_at(4)),
            page_address: Lsn(u64_at(8)),
            // between them lie the bytes left of the record before (4) and padding (4)
            system_identifier: u64_at(24),
            segment_bytes: u32_at(32),
            page_bytes: u32_at(36),
        })
    }
}

impl WalIdentity {
    /// Proves from its first bytes that the segment called `name`, or its `.partial`, is that one of this cluster.
    ///
    /// The first page may be of an earlier timeline: a new timeline begins with a copy of the segment it left.
    pub fn check_segment(&self, name: SegmentName, bytes: &[u8]) -> Result<LongPageHeader, SegmentError> {
        let header = LongPageHeader::parse(bytes).ok_or(SegmentError::Short { name, bytes: bytes.len() })?;
        if header.magic != self.major.wal_magic() {
            return Err(SegmentError::Magic { name, found: header.magic, expected: self.major });
        }
        if header.info & INFO_LONG_HEADER == 0 {
            return Err(SegmentError::NotFirstPage { name, info: header.info });
        }
        self.check_cluster(name, &header)?;
        let size = self.segment_size;
        let expected = name.first_lsn(size).ok_or(SegmentError::Name { name, size })?;
        if header.page_address != expected {
            return Err(SegmentError::PageAddress { name, found: header.page_address, expected });
        }
        if header.timeline > name.timeline() {
            return Err(SegmentError::Timeline { name, found: header.timeline });
        }
        Ok(header)
    }

    fn check_cluster(&self, name: SegmentName, header: &LongPageHeader) -> Result<(), SegmentError> {
        let (found, expected) = (header.system_identifier, self.system_identifier);
        if found != expected {
            return Err(SegmentError::SystemIdentifier { name, found, expected });
        }
        let (found, expected) = (header.segment_bytes, self.segment_size.bytes());
        if found != expected {
            return Err(SegmentError::SegmentSize { name, found, expected });
        }
        let (found, expected) = (header.page_bytes, self.page_bytes);
        if found != expected {
            return Err(SegmentError::PageSize { name, found, expected });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    /// (major, system identifier, segment size in MiB, segment name, its first 40 bytes), from running servers.
    const SEGMENTS: [(u32, u64, u64, &str, &str); 6] = [
        (
            13,
            7711086858536544152,
            1,
            "00000001000000000000000B",
            "06d10200010000000000b00000000000000000000000000098e7408ba448036b0000100000200000",
        ),
        (
            14,
            7711086883256129506,
            16,
            "000000010000000000000002",
            "0dd102000100000000000002000000000000000000000000e2d7a74caa48036b0000000100200000",
        ),
        (
            15,
            7711086910132684897,
            16,
            "000000010000000000000002",
            "10d10200010000000000000200000000000000000000000061889f8eb048036b0000000100200000",
        ),
        (
            16,
            7711086931987417349,
            16,
            "000000010000000000000002",
            "13d102000100000000000002000000000000000000000000054944a5b548036b0000000100200000",
        ),
        (
            17,
            7711086955514644809,
            16,
            "000000010000000000000002",
            "16d1020001000000000000020000000000000000000000004949991fbb48036b0000000100200000",
        ),
        (
            18,
            7711086979095325053,
            4,
            "000000010000000000000003",
            "18d10600010000000000c0000000000000000000000000007de91d9dc048036b0000400000200000",
        ),
    ];

    fn bytes(hex: &str) -> Vec<u8> {
        (0..hex.len() / 2).map(|i| u8::from_str_radix(&hex[i * 2..i * 2 + 2], 16).unwrap()).collect()
    }

    fn sample(major: u32) -> (WalIdentity, SegmentName, Vec<u8>) {
        let (_, system_identifier, mib, name, hex) = SEGMENTS.into_iter().find(|s| s.0 == major).unwrap();
        let identity = WalIdentity {
            major: Major::new(major).unwrap(),
            system_identifier,
            segment_size: SegmentSize::new(mib << 20).unwrap(),
            page_bytes: 8192,
        };
        (identity, name.parse().unwrap(), bytes(hex))
    }

    #[test]
    fn accepts_the_segments_of_every_major() {
        for major in Major::all() {
            let (identity, name, bytes) = sample(major.number());
            let header = identity.check_segment(name, &bytes).unwrap();
            assert_eq!(header.timeline, Timeline(1));
            assert_eq!(Some(header.page_address), name.first_lsn(identity.segment_size));
        }
    }

    #[test]
    fn says_what_does_not_match() {
        let (identity, name, bytes) = sample(15);
        let refused = |identity: WalIdentity, name: SegmentName, bytes: &[u8]| {
            identity.check_segment(name, bytes).unwrap_err().to_string()
        };
        let text = format!("WAL segment {name}");
        let other = WalIdentity { major: Major::new(18).unwrap(), ..identity };
        assert_eq!(
            refused(other, name, &bytes),
            format!("{text} has magic D110 (PostgreSQL 15), but PostgreSQL 18 writes D118")
        );
        let other = WalIdentity { system_identifier: 7, ..identity };
        assert_eq!(
            refused(other, name, &bytes),
            format!("{text} belongs to the cluster with system identifier 7711086910132684897, not to 7")
        );
        let other = WalIdentity { segment_size: SegmentSize::new(1 << 20).unwrap(), ..identity };
        assert_eq!(
            refused(other, name, &bytes),
            format!("{text} says that segments have 16777216 bytes, but this cluster's have 1048576")
        );
        let renamed = name.next(identity.segment_size).unwrap();
        assert_eq!(
            refused(identity, renamed, &bytes),
            format!("WAL segment {renamed} begins at 0/2000000, but its name says 0/3000000")
        );
        assert_eq!(refused(identity, name, &bytes[..39]), format!("{text} has 39 bytes, not even its 40 byte header"));
        assert_eq!(refused(identity, name, &[0; 40]), format!("{text} has magic 0000, but PostgreSQL 15 writes D110"));
    }

    #[test]
    fn an_earlier_timeline_may_begin_a_segment_but_not_a_later_one() {
        let (identity, name, mut bytes) = sample(15);
        let later =
            SegmentName::of_lsn(Timeline(2), name.first_lsn(identity.segment_size).unwrap(), identity.segment_size);
        assert!(identity.check_segment(later, &bytes).is_ok());
        bytes[4] = 2;
        let refused = identity.check_segment(name, &bytes);
        assert_eq!(refused, Err(SegmentError::Timeline { name, found: Timeline(2) }));
    }

    proptest! {
        #[test]
        fn any_flipped_bit_that_matters_is_noticed(byte in 0usize..40, bit in 0u8..8) {
            let (identity, name, mut bytes) = sample(15);
            bytes[byte] ^= 1 << bit;
            // other flags, the timeline, the length of a record's rest and padding may differ
            let free = matches!(byte, 2..=7 | 16..=23);
            prop_assert!(identity.check_segment(name, &bytes).is_err() || free);
        }

        #[test]
        fn any_bytes_are_answered(bytes: Vec<u8>) {
            let (identity, name, _) = sample(13);
            prop_assert!(identity.check_segment(name, &bytes).is_err());
        }
    }
}
