#![allow(clippy::unwrap_used)]
use proptest::prelude::*;

use super::*;
use crate::postgres::{SegmentSize, Timeline};

const DAY: i64 = 86_400;
/// 2024-01-01 00:00:00 UTC
const START: i64 = 1_704_067_200;

fn segment(timeline: u32, number: u64) -> SegmentName {
    SegmentName::of_number(Timeline(timeline), number, SegmentSize::new(16 << 20).unwrap())
}

/// One backup a day, in order, of these kinds; day N needs segments 10 N and 10 N + 1.
fn taken(kinds: &str) -> Vec<Known> {
    let mut known: Vec<Known> = Vec::new();
    for (day, letter) in kinds.chars().enumerate() {
        let kind = match letter {
            'F' => BackupKind::Full,
            'D' => BackupKind::Diff,
            _ => BackupKind::Incr,
        };
        let newest = known.last().map(|backup| backup.label);
        let full = known.iter().map(|backup| backup.label).rfind(|label| label.kind() == BackupKind::Full);
        let prior = match kind {
            BackupKind::Full => None,
            BackupKind::Diff => full,
            BackupKind::Incr => newest,
        };
        let day = day as i64;
        let label = Label::next(kind, newest, START + day * DAY, newest).unwrap();
        let wal = (segment(1, day as u64 * 10), segment(1, day as u64 * 10 + 1));
        known.push(Known { label, prior, database: 1, stop_time: START + day * DAY, wal, counts: true });
    }
    known
}

/// The kinds of those that stay, a dot for each that goes.
fn stays(kinds: &str, decision: &Decision) -> String {
    kinds.chars().zip(&decision.backups).map(|(kind, fate)| if fate.keep { kind } else { '.' }).collect()
}

fn retention(full: u32, diff: u32) -> Retention {
    let some = |number| (number > 0).then_some(number);
    Retention { full: some(full), diff: some(diff), ..Retention::NONE }
}

#[test]
fn what_goes_by_count() {
    for (kinds, full, diff, expected) in [
        ("", 1, 1, ""),
        ("FDIDI", 0, 0, "FDIDI"),
        ("F", 1, 0, "F"),
        ("FFF", 1, 0, "..F"),
        ("FFF", 2, 0, ".FF"),
        ("FFF", 9, 0, "FFF"),
        ("FDIFDI", 1, 0, "...FDI"),
        // pgBackRest counts full backups among the differential ones
        ("FDDF", 0, 2, "F.DF"),
        ("FDIDI", 0, 1, "F..DI"),
        ("FIDI", 0, 1, "FIDI"),
        ("FDIDIFDI", 1, 1, ".....FDI"),
        ("FDIFDIDI", 2, 1, "F..F..DI"),
        ("FDIIDII", 0, 2, "FDIIDII"),
    ] {
        let decision = decide(&taken(kinds), &retention(full, diff), &[1], START + 100 * DAY);
        assert_eq!(stays(kinds, &decision), expected, "{kinds} full={full} diff={diff}");
    }
}

#[test]
fn what_goes_by_time() {
    let by_time = |days| Retention { full_type: FullType::Time, ..retention(days, 0) };
    for (kinds, days, today, expected) in [
        // one that is old enough stays, so that one can reach back
        ("FFF", 20, 2, "FFF"),
        ("FFF", 20, 20, "FFF"),
        ("FFF", 20, 21, ".FF"),
        ("FDFDF", 1, 5, "....F"),
        ("FDFDF", 2, 5, "..FDF"),
        // nobody took a backup for a year
        ("FIF", 7, 365, "..F"),
        ("F", 1, 365, "F"),
    ] {
        let decision = decide(&taken(kinds), &by_time(days), &[1], START + today * DAY);
        assert_eq!(stays(kinds, &decision), expected, "{kinds} days={days} today={today}");
    }
}

#[test]
fn what_is_left_of_a_set_without_its_full_backup_goes_with_older_sets() {
    let mut known = taken("FDIFD");
    known.remove(0);
    assert_eq!(stays("DIFD", &decide(&known, &retention(1, 0), &[1], START)), "..FD");
    assert_eq!(stays("DIFD", &decide(&known, &Retention::NONE, &[1], START)), "DIFD");
    // as long as no newer full backup is there, it stays
    let known = taken("FDI")[1..].to_vec();
    assert_eq!(stays("DI", &decide(&known, &retention(1, 0), &[1], START)), "DI");
}

/// Lower case: it does not count.
#[test]
fn what_does_not_count_stands_for_no_other() {
    let by_time = |days| Retention { full_type: FullType::Time, ..retention(days, 0) };
    for (kinds, retention, expected, rests) in [
        ("FFF", retention(1, 0), "..F", &[2][..]),
        ("FFFF", retention(2, 0), "..FF", &[3, 2]),
        ("FFFF", retention(9, 0), "FFFF", &[]),
        ("FFf", retention(1, 0), ".Ff", &[1]),
        ("FfF", retention(2, 0), "FfF", &[]),
        ("FFfF", retention(2, 0), ".FfF", &[3, 1]),
        ("fFF", retention(2, 0), ".FF", &[2, 1]),
        ("fF", retention(1, 0), ".F", &[1]),
        ("fff", retention(1, 0), "fff", &[]),
        ("FDfDF", retention(1, 0), "....F", &[4]),
        ("FDIfDI", retention(1, 0), "FDIfDI", &[]),
        ("FDIDI", retention(0, 1), "F..DI", &[3]),
        ("FDIdI", retention(0, 1), "FDIdI", &[]),
        ("FDIDIdID", retention(0, 2), "F..DIdID", &[7, 3]),
        ("FFF", by_time(50), ".FF", &[2, 1]),
        ("FfF", by_time(50), "FfF", &[]),
    ] {
        let mut known = taken(&kinds.to_uppercase());
        known.iter_mut().zip(kinds.chars()).for_each(|(of, letter)| of.counts = letter.is_uppercase());
        let labels: Vec<Label> = known.iter().map(|of| of.label).collect();
        // with 50 days, the first two are old enough
        let decision = decide(&known, &retention, &[1], START + 51 * DAY);
        assert_eq!(stays(kinds, &decision), expected, "{kinds} {retention:?}");
        let of = |number: &usize| labels[*number];
        assert_eq!(decision.rests, rests.iter().map(of).collect::<Vec<_>>(), "{kinds} {retention:?}");
    }
    // the newest of a cluster that loses one
    let mut known = taken("FFFF");
    known[..2].iter_mut().for_each(|of| of.database = 1);
    known[2..].iter_mut().for_each(|of| of.database = 2);
    let decision = decide(&known, &retention(3, 0), &[1, 2], START);
    assert_eq!(decision.rests, [known[3].label, known[1].label]);
}

/// An old primary that goes on after another was promoted takes none of its backups away.
#[test]
fn a_backup_of_an_older_timeline_stands_for_none_of_a_newer_one() {
    let by_time = |days| Retention { full_type: FullType::Time, ..retention(days, 0) };
    for (kinds, timelines, retention, expected, rests) in [
        ("FFF", "121", retention(1, 0), ".FF", &[2, 1][..]),
        ("FFFFF", "12111", retention(1, 0), ".F..F", &[4]),
        ("FFFFF", "12211", retention(1, 0), "..F.F", &[4, 2]),
        ("FFFFF", "12211", retention(2, 0), ".FFFF", &[4, 1]),
        ("FFF", "123", retention(1, 0), "..F", &[2]),
        ("FDFDF", "12211", retention(1, 0), "..FDF", &[4, 2]),
        ("FFF", "121", by_time(1), ".FF", &[2, 1]),
        ("FDDD", "1211", retention(0, 1), "FD.D", &[3]),
        // what would go with it is of the newer one
        ("FDF", "121", retention(1, 0), "FDF", &[]),
        ("FDIDD", "11211", retention(0, 1), "FDI.D", &[4]),
        ("fDF", "111", retention(2, 0), "fDF", &[]),
    ] {
        let mut known = taken(&kinds.to_uppercase());
        for (number, (of, timeline)) in known.iter_mut().zip(timelines.bytes()).enumerate() {
            let timeline = u32::from(timeline - b'0');
            of.wal = (segment(timeline, number as u64 * 10), segment(timeline, number as u64 * 10 + 1));
            of.counts = kinds.as_bytes()[number].is_ascii_uppercase();
        }
        let decision = decide(&known, &retention, &[1], START + 51 * DAY);
        assert_eq!(stays(kinds, &decision), expected, "{kinds} {timelines} {retention:?}");
        let of = |number: &usize| known[*number].label;
        assert_eq!(decision.rests, rests.iter().map(of).collect::<Vec<_>>(), "{kinds} {timelines} {retention:?}");
        let is_told = decision.notes.iter().any(|note| note.contains("later backups"));
        assert_eq!(is_told, timelines != "123" && timelines != "111" && retention.full.is_some(), "{decision:?}");
    }
}

#[test]
fn every_fate_says_why() {
    let decision = decide(&taken("FDIF"), &retention(1, 0), &[1], START);
    let why: Vec<&str> = decision.backups.iter().map(|fate| fate.why.as_str()).collect();
    assert_eq!(
        why,
        [
            "older than the last 1 full backups (repo-retention-full)",
            "goes with its full backup 20240101-000000F",
            "goes with its full backup 20240101-000000F",
            "the last full backup",
        ]
    );
}

fn rule(kinds: &str, retention: &Retention) -> String {
    decide(&taken(kinds), retention, &[1], START + 100 * DAY).archives[&1].0.to_string()
}

#[test]
fn what_goes_of_the_archive() {
    let archive = |count, archive_type, full| Retention {
        full: Some(full),
        archive: Some(count),
        archive_type,
        ..Retention::NONE
    };
    let from = |day: u64| format!("from {} on", segment(1, day * 10));
    assert_eq!(rule("FDF", &Retention::NONE), "all");
    assert_eq!(rule("", &retention(1, 0)), "all");
    assert_eq!(rule("FDF", &retention(1, 0)), from(2));
    assert_eq!(rule("FDF", &retention(2, 0)), from(0));
    assert_eq!(rule("FDFDI", &archive(1, BackupKind::Full, 2)), format!("{}, and what 2 older backups need", from(2)));
    assert_eq!(rule("FDFDI", &archive(1, BackupKind::Diff, 2)), format!("{}, and what 3 older backups need", from(3)));
    assert_eq!(rule("FDFDI", &archive(1, BackupKind::Incr, 2)), format!("{}, and what 4 older backups need", from(4)));
    // not reached yet
    assert_eq!(rule("FDFDI", &archive(3, BackupKind::Full, 9)), "all");
}

#[test]
fn wal_of_another_timeline_or_cluster() {
    let mut known = taken("FFF");
    known[1].wal = (segment(2, 3), segment(2, 4));
    known[2].wal = (segment(2, 8), segment(2, 9));
    let decision = decide(&known, &retention(2, 0), &[1], START);
    let (rule, _) = &decision.archives[&1];
    for (timeline, number, keep) in [(1, 5, false), (1, 500, false), (2, 2, false), (2, 3, true), (3, 0, true)] {
        assert_eq!(rule.keeps(segment(timeline, number)), keep, "{timeline} {number}");
    }
    // the server went back to timeline 1: both branches are kept
    known[2].wal = (segment(1, 7), segment(1, 8));
    let decision = decide(&known, &retention(2, 0), &[1], START);
    assert!(decision.archives[&1].0.keeps(segment(1, 7)) && decision.archives[&1].0.keeps(segment(2, 3)));
    // after two upgrades
    known[0].database = 1;
    known[1].database = 2;
    known[2].database = 2;
    let decision = decide(&known, &retention(2, 0), &[1, 2, 3], START);
    let rules: Vec<String> = decision.archives.values().map(|(rule, _)| rule.to_string()).collect();
    assert_eq!(rules, ["none".to_owned(), format!("from {} on", segment(1, 7)), "all".to_owned()]);
}

#[test]
fn one_can_be_removed_by_hand_but_not_the_last_full_backup() {
    let known = taken("FDIDF");
    let removed = |at: usize| remove_one(&known, known[at].label, &Retention::NONE, &[1]);
    assert_eq!(stays("FDIDF", &removed(0).unwrap()), "....F");
    assert_eq!(stays("FDIDF", &removed(1).unwrap()), "F..DF");
    assert_eq!(stays("FDIDF", &removed(2).unwrap()), "FD.DF");
    assert_eq!(stays("FDIDF", &removed(4).unwrap()), "FDID.");
    let alone = taken("FD");
    assert!(remove_one(&alone, alone[0].label, &Retention::NONE, &[1]).unwrap_err().contains("last full backup"));
}

fn any_retention() -> impl Strategy<Value = Retention> {
    let number = || prop::option::of(0u32..5);
    let kind = prop::sample::select(vec![BackupKind::Full, BackupKind::Diff, BackupKind::Incr]);
    (number(), any::<bool>(), number(), number(), kind).prop_map(|(full, by_time, diff, archive, archive_type)| {
        let full_type = if by_time { FullType::Time } else { FullType::Count };
        Retention { full, full_type, diff, archive, archive_type }
    })
}

proptest! {
    #[test]
    fn whatever_is_asked_for(kinds in "F[FDI]{0,20}", retention in any_retention(), later in 0i64..40) {
        let known = taken(&kinds);
        let now = START + (kinds.len() as i64 + later) * DAY;
        let decision = decide(&known, &retention, &[1], now);
        prop_assert_eq!(decision.backups.len(), known.len());
        let kept: Vec<&Known> =
            known.iter().zip(&decision.backups).filter(|(_, fate)| fate.keep).map(|(backup, _)| backup).collect();
        // the last full backup stays, and everything that stays has its full backup
        let last = known.iter().rfind(|backup| is_full(backup)).unwrap();
        prop_assert!(kept.contains(&last));
        for backup in &kept {
            prop_assert!(kept.iter().any(|full| full.label == backup.label.full()), "{} lost its full", backup.label);
        }
        if let (Some(count), FullType::Count) = (retention.full, retention.full_type) {
            let fulls = kept.iter().filter(|backup| is_full(backup)).count();
            let all = known.iter().filter(|backup| is_full(backup)).count();
            prop_assert_eq!(fulls, all.min((count as usize).max(1)));
        }
        if let (Some(days), FullType::Time) = (retention.full, retention.full_type) {
            let oldest = now - i64::from(days) * DAY;
            for full in known.iter().filter(|backup| is_full(backup) && backup.stop_time > oldest) {
                prop_assert!(kept.contains(&full), "{} is younger than {} days", full.label, days);
            }
        }
        // what backups need stays, and behind the first segment that stays for good there is no gap
        let rule = &decision.archives[&1].0;
        for backup in &kept {
            prop_assert!(rule.keeps(backup.wal.0) && rule.keeps(backup.wal.1));
        }
        if let WalRule::From { first: Some(first), .. } = rule {
            let number = first.number(SegmentSize::new(16 << 20).unwrap()).unwrap();
            prop_assert!((number..number + 300).all(|number| rule.keeps(segment(1, number))));
            prop_assert!(kept.iter().any(|backup| backup.wal.0 == *first));
        }
        // a second run at the same time finds nothing to do
        let left: Vec<Known> = kept.into_iter().cloned().collect();
        let again = decide(&left, &retention, &[1], now);
        prop_assert!(again.backups.iter().all(|fate| fate.keep));
    }
}
