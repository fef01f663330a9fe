#![allow(clippy::unwrap_used)]
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::*;
use crate::format::chunk::PackId;
use crate::format::info::Harm;
use crate::postgres::BackupKind::{Diff, Full};
use crate::progress::Silent;
use crate::repo::layout;
use crate::retention::expire::{ExpireOptions, GRACE, Report, expire};
use crate::retention::tests::{DAY, Made, other_wal, segment, wal_bytes};
use crate::store::{Body, Effect, Operation};

fn keep(full: u32) -> ExpireOptions {
    let retention = Retention { full: Some(full), ..Retention::NONE };
    ExpireOptions { retention, grace: GRACE, force: true, set: None, brief: false, dry_run: false }
}

/// Backups of these kinds, a day after the other. Each needs two segments, from 1 on, and a third is archived after it.
fn made(kinds: &[BackupKind]) -> Made {
    let mut made = Made::new();
    for kind in kinds {
        made.backup(*kind);
        made.pass(DAY);
    }
    made
}

fn run(made: &Made, options: &ExpireOptions) -> Report {
    expire(&made.repository, options, &Silent).unwrap()
}

/// Numbers of the backups that are left.
fn left(made: &Made, labels: &[String]) -> Vec<usize> {
    made.labels().iter().map(|label| labels.iter().position(|of| of == label).unwrap()).collect()
}

#[test]
fn a_newest_backup_whose_wal_is_another_servers_does_not_count() {
    for (spoilt, what) in [(10, "does not hold the checkpoint"), (11, "does not hold sound WAL up to")] {
        let mut made = made(&[Full; 4]);
        made.swap_wal(spoilt);
        let labels = made.labels();
        for dry_run in [true, false] {
            let report = run(&made, &ExpireOptions { dry_run, ..keep(2) });
            let kept: Vec<bool> = report.backups.iter().map(|of| of.keep).collect();
            assert_eq!(kept, [false, true, true, true]);
            let [unproved] = report.unproved.as_slice() else { panic!("{report:?}") };
            assert_eq!((&unproved.label, &unproved.segment), (&labels[3], &Some(segment(1, spoilt).to_string())));
            assert!(unproved.what.contains(what), "{unproved:?}");
            let note = report.notes.iter().find(|note| note.contains(&labels[3])).unwrap();
            assert!(note.contains(&segment(1, spoilt).to_string()) && note.contains("pgcairn verify"), "{note}");
        }
        assert_eq!(left(&made, &labels), [1, 2, 3]);
    }
}

#[test]
fn nor_does_the_one_behind_those_that_would_go() {
    let made = made(&[Full; 4]);
    let labels = made.labels();
    made.remove(&made.wal_key(8));
    let report = run(&made, &keep(2));
    assert_eq!(left(&made, &labels), [1, 2, 3]);
    assert!(report.unproved[0].what.contains("is missing"), "{report:?}");
    // once there are enough others it goes like them, and nobody asks any more
    let report = run(&made, &keep(1));
    assert_eq!(left(&made, &labels), [3]);
    assert!(report.unproved.is_empty() && report.notes.is_empty(), "{report:?}");
}

#[test]
fn wal_in_several_forms_and_a_manifest_that_is_lost_do_not_count() {
    let mut made = made(&[Full; 3]);
    let labels = made.labels();
    made.archive_bytes(&segment(1, 8).to_string(), &other_wal(segment(1, 8)));
    let report = run(&made, &keep(1));
    assert!(report.unproved[0].what.contains("different contents"), "{report:?}");
    assert_eq!(left(&made, &labels), [1, 2]);
}

#[test]
fn where_none_is_proved_nothing_goes_and_few_are_asked() {
    let mut made = made(&[Full; 30]);
    let labels = made.labels();
    (0..30).for_each(|number| made.swap_wal(3 * number + 1));
    let before = made.archived();
    let asked = Arc::new(AtomicU64::new(0));
    let count = asked.clone();
    made.plan.add(
        move |call| {
            let is_proof = call.operation == Operation::Get && call.key.starts_with("archive/main/15-1/");
            count.fetch_add(is_proof.into(), Ordering::SeqCst);
            false
        },
        Effect::Delay(Duration::ZERO),
    );
    let report = run(&made, &keep(2));
    assert_eq!(left(&made, &labels).len(), 30);
    assert_eq!(made.archived(), before);
    assert!((DOUBTS_MAX..DOUBTS_MAX + 3).contains(&report.unproved.len()), "{}", report.unproved.len());
    let asked = asked.load(Ordering::SeqCst) as usize;
    assert!(asked <= 2 * (DOUBTS_MAX + 3), "{asked} segments were read");
}

/// Nothing goes: nothing has to be proved.
#[test]
fn without_a_removal_nothing_is_asked() {
    let made = made(&[Full, Diff, Full]);
    run(&made, &keep(1));
    made.plan.add(
        |call| call.operation == Operation::Get && call.key.starts_with("archive/main/15-1/"),
        Effect::Fail(crate::store::ErrorKind::Other),
    );
    for full in 1..4 {
        let report = run(&made, &keep(full));
        assert!(report.unproved.is_empty());
    }
}

#[test]
fn a_store_that_fails_is_no_doubt() {
    let made = made(&[Full; 3]);
    let before = made.keys("");
    made.plan.add(
        |call| call.operation == Operation::Get && call.key.starts_with("archive/main/15-1/"),
        Effect::Fail(crate::store::ErrorKind::Transient),
    );
    expire(&made.repository, &keep(1), &Silent).unwrap_err();
    assert_eq!(made.keys(""), before);
}

/// WAL goes for a newer backup, too.
#[test]
fn wal_stays_where_the_backup_from_which_on_it_is_kept_is_not_proved() {
    let mut made = made(&[Full; 3]);
    made.swap_wal(8);
    made.pass(1);
    let before = made.archived();
    let retention = Retention { archive: Some(1), ..Retention::NONE };
    let report = run(&made, &ExpireOptions { retention, ..keep(1) });
    assert_eq!(made.archived(), before);
    assert_eq!(report.unproved.len(), 1);
    let archive = &report.archives[0];
    assert_eq!((archive.removed, archive.keep.as_str()), (0, "all"));
    assert!(archive.why.contains(&made.labels()[2]), "{archive:?}");
}

#[test]
fn a_differential_backup_stays_for_one_that_is_not_proved() {
    let mut made = made(&[Full, Diff, Diff, Diff]);
    let labels = made.labels();
    made.swap_wal(10);
    let retention = Retention { diff: Some(1), ..Retention::NONE };
    run(&made, &ExpireOptions { retention, ..keep(1) });
    assert_eq!(left(&made, &labels), [0, 2, 3]);
}

#[test]
fn a_person_cannot_remove_the_last_full_backup_that_is_proved() {
    let mut made = made(&[Full; 3]);
    let labels = made.labels();
    let named = |number: usize| ExpireOptions { set: Some(labels[number].clone()), ..keep(9) };
    made.swap_wal(1);
    made.swap_wal(8);
    let error = expire(&made.repository, &named(1), &Silent).unwrap_err();
    assert!(error.to_string().contains("no other full backup is proved"), "{error}");
    assert_eq!(left(&made, &labels), [0, 1, 2]);
    // what is of no use may go
    run(&made, &named(2));
    run(&made, &named(0));
    assert_eq!(left(&made, &labels), [1]);
}

#[test]
fn stored_wal_is_looked_into_as_well() {
    let mut made = Made::new();
    for _ in 0..3 {
        made.backup_with_wal(wal_bytes);
        made.pass(DAY);
    }
    let bad = made.backup_with_wal(|name| if name == segment(1, 11) { other_wal(name) } else { wal_bytes(name) });
    let labels = made.labels();
    let report = run(&made, &keep(1));
    assert_eq!(left(&made, &labels), [2, 3]);
    let [unproved] = report.unproved.as_slice() else { panic!("{report:?}") };
    assert_eq!((&unproved.label, &unproved.segment), (&bad, &Some(segment(1, 11).to_string())));
}

/// A pack that one backup needs and no other.
fn own_pack(made: &Made, label: &str) -> PackId {
    let packs = |label: &str| made.repository.manifest_packs(label).unwrap().into_iter().map(|of| of.pack);
    let others: Vec<PackId> = made.labels().iter().filter(|of| *of != label).flat_map(|of| packs(of)).collect();
    packs(label).find(|pack| !others.contains(pack)).unwrap()
}

fn note_harm(made: &Made, pack: PackId) {
    let key = format!("{}{}", layout::harms("main"), PackId([7; 16]));
    let note = made.repository.encode_info(&key, &Harm { packs: vec![pack.to_string()] }).unwrap();
    made.repository.store.put(&key, Body::Bytes(note)).unwrap();
}

#[test]
fn a_backup_whose_packs_are_missing_or_harmed_does_not_count() {
    for is_gone in [true, false] {
        let made = made(&[Full; 3]);
        let labels = made.labels();
        let pack = own_pack(&made, &labels[2]);
        match is_gone {
            true => made.remove(&layout::pack("main", pack)),
            false => note_harm(&made, pack),
        }
        let report = run(&made, &keep(1));
        assert_eq!(left(&made, &labels), [1, 2]);
        let [unproved] = report.unproved.as_slice() else { panic!("{report:?}") };
        assert_eq!((&unproved.label, &unproved.segment), (&labels[2], &None));
        assert!(unproved.what.contains(&pack.to_string()), "{unproved:?}");
        assert!(report.notes.iter().any(|note| note.contains(&labels[2]) && note.contains("pgcairn verify")));
        // nor may a person remove the one that is whole
        let named = ExpireOptions { set: Some(labels[1].clone()), ..keep(9) };
        let error = expire(&made.repository, &named, &Silent).unwrap_err();
        assert!(error.to_string().contains("no other full backup is proved"), "{error}");
        assert_eq!(left(&made, &labels), [1, 2]);
    }
}

/// All packs are listed once, and a manifest's pack table is a request or two.
#[test]
fn the_packs_of_several_backups_cost_one_listing() {
    let made = made(&[Full; 12]);
    let labels = made.labels();
    (4..12).for_each(|number| made.remove(&layout::pack("main", own_pack(&made, &labels[number]))));
    let listed = Arc::new(AtomicU64::new(0));
    let count = listed.clone();
    made.plan.add(
        move |call| {
            let is_listing = call.operation == Operation::List && call.key.starts_with("chunk/main/");
            count.fetch_add(is_listing.into(), Ordering::SeqCst);
            false
        },
        Effect::Delay(Duration::ZERO),
    );
    run(&made, &ExpireOptions { dry_run: true, ..keep(1) });
    // the other is that of packs nobody needs
    assert_eq!(listed.load(Ordering::SeqCst), 2);
}
