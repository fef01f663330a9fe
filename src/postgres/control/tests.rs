#![allow(clippy::unwrap_used)]
use super::*;
use proptest::prelude::*;

/// The first 512 bytes of `global/pg_control` of a running server of each major; the rest is zeros.
const CONTROL_FILES: [(u32, &[u8]); 6] = [
    (13, include_bytes!("../fixtures/pg_control_13")),
    (14, include_bytes!("../fixtures/pg_control_14")),
    (15, include_bytes!("../fixtures/pg_control_15")),
    (16, include_bytes!("../fixtures/pg_control_16")),
    (17, include_bytes!("../fixtures/pg_control_17")),
    (18, include_bytes!("../fixtures/pg_control_18")),
];
const STANDBY: &[u8] = include_bytes!("../fixtures/pg_control_15_standby");
const SHUT_DOWN: &[u8] = include_bytes!("../fixtures/pg_control_15_shut_down");

fn of_major(major: u32) -> &'static [u8] {
    CONTROL_FILES.into_iter().find(|file| file.0 == major).unwrap().1
}

/// `bytes` with one field replaced and the CRC made right again.
fn with_field(bytes: &[u8], at: usize, value: u32) -> Vec<u8> {
    let crc_at = if bytes[8..10] == 1800u16.to_le_bytes() { 292 } else { 288 };
    let mut bytes = bytes.to_vec();
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    let crc = crc32c::crc32c(&bytes[..crc_at]);
    bytes[crc_at..crc_at + 4].copy_from_slice(&crc.to_le_bytes());
    bytes
}

#[test]
fn reads_every_major() {
    // (major, system identifier, checkpoint, redo, time, segment size in MiB), from pg_control_system() and so on
    let expected = [
        (13, 7711086858536544152, 0x120_5E00, 0x120_5DC8, 1795377740, 1),
        (14, 7711086883256129506, 0x300_0098, 0x300_0060, 1795377695, 16),
        (15, 7711086910132684897, 0x733_76D8, 0x733_76A0, 1795377752, 16),
        (16, 7711086931987417349, 0x30C_5560, 0x30C_5528, 1795377696, 16),
        (17, 7711086955514644809, 0x505_5BA8, 0x505_5B50, 1795377732, 16),
        (18, 7711086979095325053, 0x185_57C0, 0x185_5730, 1795377733, 4),
    ];
    for (major, system_identifier, lsn, redo, time_s, mib) in expected {
        let control = ControlFile::parse(of_major(major)).unwrap();
        let known = Major::new(major).unwrap();
        let checkpoint = Checkpoint {
            lsn: Lsn(lsn),
            redo: Lsn(redo),
            timeline: Timeline(1),
            previous_timeline: Timeline(1),
            full_page_writes: true,
            time_s,
        };
        let expected = ControlFile {
            system_identifier,
            control_version: known.control_version(),
            catalog_version: known.catalog_version(),
            state: ClusterState::InProduction,
            checkpoint,
            min_recovery_point: Lsn::INVALID,
            min_recovery_timeline: None,
            backup_start: Lsn::INVALID,
            backup_end: Lsn::INVALID,
            backup_end_required: false,
            wal_level: WalLevel::Logical,
            max_connections: 57,
            max_worker_processes: 9,
            max_wal_senders: 7,
            max_prepared_transactions: 3,
            max_locks_per_transaction: 65,
            page_bytes: 8192,
            relation_segment_pages: 131_072,
            wal_page_bytes: 8192,
            wal_segment_size: SegmentSize::new(mib << 20).unwrap(),
            data_checksum_version: 1,
        };
        assert_eq!(control, expected, "PostgreSQL {major}");
        assert_eq!(control.major(), Ok(known));
        assert!(control.has_page_checksums());
    }
}

#[test]
fn reads_a_standby_and_a_promoted_cluster() {
    let standby = ControlFile::parse(STANDBY).unwrap();
    assert_eq!(standby.state, ClusterState::InArchiveRecovery);
    assert_eq!(standby.min_recovery_point, Lsn(0x730_67A0));
    assert_eq!(standby.min_recovery_timeline, Some(Timeline(1)));
    let promoted = ControlFile::parse(SHUT_DOWN).unwrap();
    assert_eq!(promoted.state, ClusterState::ShutDown);
    assert_eq!(promoted.checkpoint.timeline, Timeline(2));
    assert_eq!(promoted.checkpoint.redo, promoted.checkpoint.lsn);
}

#[test]
fn the_padding_after_the_structure_may_be_missing_but_nothing_of_it() {
    let whole = of_major(18);
    assert!(ControlFile::parse(&whole[..296]).is_ok());
    assert_eq!(ControlFile::parse(&whole[..295]), Err(ControlError::Short { bytes: 295, needed: 296 }));
    assert_eq!(ControlFile::parse(&whole[..11]), Err(ControlError::Short { bytes: 11, needed: 12 }));
    assert_eq!(ControlFile::parse(&[]), Err(ControlError::Short { bytes: 0, needed: 12 }));
}

#[test]
fn refuses_other_layouts_and_catalogs() {
    let refused = |at, value| ControlFile::parse(&with_field(of_major(15), at, value)).unwrap_err().to_string();
    assert_eq!(refused(8, 1201), "pg_control has layout version 1201, only 1300, 1700 and 1800 are supported");
    assert_eq!(refused(8, 1700), "pg_control has layout version 1700, but PostgreSQL 15 has 1300");
    assert_eq!(
        refused(12, 202_209_060),
        "pg_control is of an unsupported version: catalog version 202209060 belongs to no release of PostgreSQL 13 to 18"
    );
}

#[test]
fn refuses_values_a_field_cannot_have() {
    let refused = |at, value| ControlFile::parse(&with_field(of_major(15), at, value)).unwrap_err().to_string();
    assert_eq!(refused(16, 7), "pg_control has state 7");
    assert_eq!(refused(48, 0), "pg_control has timeline 0");
    assert_eq!(refused(172, 3), "pg_control has wal_level 3");
    assert_eq!(refused(216, 8191), "pg_control has a page size of 8191");
    assert_eq!(refused(216, 0), "pg_control has a page size of 0");
    assert_eq!(refused(220, 0), "pg_control has a relation segment size of 0");
    assert_eq!(refused(224, 1 << 17), "pg_control has a WAL page size of 131072");
    assert!(refused(228, 3 << 20).starts_with("pg_control has a bad WAL segment size: a WAL segment of 3145728 bytes"));
}

proptest! {
    #[test]
    fn any_flipped_bit_of_the_structure_is_noticed(byte in 0usize..292, bit in 0u8..8) {
        let mut bytes = of_major(15).to_vec();
        bytes[byte] ^= 1 << bit;
        prop_assert!(ControlFile::parse(&bytes).is_err());
    }

    #[test]
    fn any_field_values_are_answered(at in 12usize..288, value: u32) {
        let _ = ControlFile::parse(&with_field(of_major(18), at, value));
    }

    #[test]
    fn any_bytes_are_answered(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        prop_assert!(ControlFile::parse(&bytes).is_err());
    }
}
