#![allow(clippy::unwrap_used)]
use super::*;
use proptest::prelude::*;

fn size(mib: u64) -> SegmentSize {
    SegmentSize::new(mib << 20).unwrap()
}

#[test]
fn a_segment_size_is_a_power_of_two_in_range() {
    for power in 20..=30 {
        assert_eq!(u64::from(SegmentSize::new(1 << power).unwrap().bytes()), 1 << power);
    }
    for bytes in [0, 1 << 19, 3 << 20, 1 << 31, 1 << 32, u64::MAX, (16 << 20) + 1] {
        assert_eq!(SegmentSize::new(bytes), Err(SegmentSizeError { bytes }));
    }
    assert_eq!(size(16).to_string(), "16 MiB");
}

#[test]
fn names_match_those_of_running_servers() {
    // pg_walfile_name() or the file names of 13 (1 MiB), 15 (16 MiB) and 18 (4 MiB)
    let name = |lsn, mib| SegmentName::of_lsn(Timeline(1), Lsn(lsn), size(mib)).to_string();
    assert_eq!(name(0xB0_0028, 1), "00000001000000000000000B");
    assert_eq!(name(0x200_0028, 16), "000000010000000000000002");
    assert_eq!(name(0xC0_0028, 4), "000000010000000000000003");
    assert_eq!(name(0x16_B374_D848, 16), "0000000100000016000000B3");
    let named: SegmentName = "0000000100000016000000B3".parse().unwrap();
    assert_eq!(named.first_lsn(size(16)), Some(Lsn(0x16_B300_0000)));
    assert_eq!(named.directory(), "0000000100000016");
}

#[test]
fn a_name_may_not_fit_the_segment_size() {
    let name: SegmentName = "000000010000000000000100".parse().unwrap();
    assert_eq!(name.number(size(16)), None);
    assert_eq!(name.number(size(1)), Some(256));
    assert_eq!(name.next(size(16)), None);
}

#[test]
fn the_next_segment_crosses_4_gib_and_stops_at_the_end() {
    let next = |name: &str, mib| name.parse::<SegmentName>().unwrap().next(size(mib)).map(|n| n.to_string());
    assert_eq!(next("0000000300000000000000FF", 16).as_deref(), Some("000000030000000100000000"));
    assert_eq!(next("000000030000000000000003", 1024).as_deref(), Some("000000030000000100000000"));
    assert_eq!(next("00000001FFFFFFFF000000FF", 16), None);
}

#[test]
fn a_stop_on_a_boundary_needs_the_segment_before_only() {
    let covering = |start, stop| size(1).segments_covering(Lsn(start), Lsn(stop));
    assert_eq!(covering(0x10_0028, 0x20_0000), 1..=1);
    assert_eq!(covering(0x10_0028, 0x20_0001), 1..=2);
    assert_eq!(covering(0x10_0000, 0x10_0000), 1..=1);
    assert_eq!(covering(0x30_0000, 0), 3..=3);
    let names: Vec<_> = size(1).names_covering(Timeline(2), Lsn(0xFFF0_0000), Lsn(0x1_0000_0001)).collect();
    assert_eq!(
        names.iter().map(ToString::to_string).collect::<Vec<_>>(),
        ["000000020000000000000FFF", "000000020000000100000000"]
    );
}

#[test]
fn every_kind_of_name_is_told_apart() {
    let segment: SegmentName = "0000000100000016000000B3".parse().unwrap();
    let parse = |name: &str| WalName::parse(name).unwrap();
    assert_eq!(parse("0000000100000016000000B3"), WalName::Segment(segment));
    assert_eq!(parse("0000000100000016000000B3.partial"), WalName::Partial(segment));
    assert_eq!(parse("0000000A.history"), WalName::History(Timeline(10)));
    let backup = WalName::BackupHistory { segment, offset: 0x28 };
    assert_eq!(parse("0000000100000016000000B3.00000028.backup"), backup);
    assert_eq!(parse("0000000A.history").timeline(), Timeline(10));
}

#[test]
fn other_names_are_refused() {
    for name in [
        "",
        ".",
        ".history",
        "0000000100000016000000B3.",
        "0000000100000016000000b3",
        "0000000000000016000000B3",
        "00000000.history",
        "0000000100000016000000B3.gz",
        "0000000100000016000000B3.28.backup",
        "0000000100000016000000B3.00000028.backup.old",
        "0000000100000016000000B3.00000028.partial",
        "../000000100000016000000B3",
        "0000000100000016000000B",
        "00000001000000160000+0B3",
        "00000001000000160000000é",
        "archive_status",
    ] {
        assert_eq!(WalName::parse(name), Err(WalNameError { name: name.to_owned() }));
    }
    assert!("0000000100000016000000B3.partial".parse::<SegmentName>().is_err());
}

fn any_size() -> impl Strategy<Value = SegmentSize> {
    (20u32..=30).prop_map(|power| SegmentSize::new(1 << power).unwrap())
}

proptest! {
    #[test]
    fn a_position_is_inside_the_segment_its_name_says(lsn: u64, timeline in 1u32.., size in any_size()) {
        let name = SegmentName::of_lsn(Timeline(timeline), Lsn(lsn), size);
        let first = name.first_lsn(size).unwrap();
        prop_assert!(Lsn(lsn).bytes_since(first).unwrap() < size.bytes().into());
        prop_assert_eq!(name.to_string().parse::<SegmentName>().unwrap(), name);
    }

    #[test]
    fn what_is_read_is_written_back(name in "[0-9A-F]{8}([0-9A-F]{16})?(\\.(partial|history|[0-9A-F]{8}\\.backup))?") {
        if let Ok(parsed) = WalName::parse(&name) {
            prop_assert_eq!(parsed.to_string(), name);
        }
    }

    #[test]
    fn any_name_is_answered(name in ".*") {
        let _ = WalName::parse(&name);
    }
}
