#![allow(clippy::unwrap_used)]
use proptest::prelude::*;

use super::*;
use crate::format::info::LockInfo;
use crate::postgres::BackupKind::{Diff, Full, Incr};
use crate::progress::Silent;
use crate::retention::tests::{DAY, Made, segment};
use crate::store::{Body, Effect, ErrorKind, Operation};
use bytes::Bytes;

fn keep_full(count: u32) -> ExpireOptions {
    let retention = Retention { full: Some(count), ..Retention::NONE };
    ExpireOptions { retention, grace: GRACE, force: true, set: None, brief: false, dry_run: false }
}

fn run(made: &Made, options: &ExpireOptions) -> Report {
    expire(&made.repository, options, &Silent).unwrap()
}

/// A backup of each of these kinds, a day after the other.
fn made(kinds: &[crate::postgres::BackupKind]) -> Made {
    let mut made = Made::new();
    for kind in kinds {
        made.backup(*kind);
        made.pass(DAY);
    }
    made
}

#[test]
fn a_backup_goes_at_once_and_its_packs_after_the_grace_period() {
    let made = made(&[Full, Diff, Full, Incr]);
    let before = made.keys("chunk/");
    let report = run(&made, &keep_full(1));
    let kept: Vec<bool> = report.backups.iter().map(|backup| backup.keep).collect();
    assert_eq!(kept, [false, false, true, true]);
    assert_eq!(made.labels(), [report.backups[2].label.clone(), report.backups[3].label.clone()]);
    let packs = report.packs.unwrap();
    assert!(packs.marked > 0 && packs.marked == packs.unneeded && packs.deleted == 0, "{packs:?}");
    assert_eq!(made.keys("chunk/"), before);
    // marked once is enough
    made.pass(DAY / 2);
    assert_eq!(run(&made, &keep_full(1)).packs.unwrap().marked, 0);
    assert_eq!(made.keys("chunk/"), before);
    made.pass(DAY / 2);
    let swept = run(&made, &keep_full(1)).packs.unwrap();
    assert_eq!((swept.deleted, swept.deleted_bytes), (packs.marked, packs.unneeded_bytes));
    assert_eq!(made.keys("chunk/").len() as u64, packs.total - packs.marked);
    assert!(made.keys("mark/").is_empty() && made.keys("lock/").is_empty());
    made.assert_sound();
    let info = made.repository.backup_info().unwrap();
    assert_eq!(info.backups.keys().cloned().collect::<Vec<_>>(), made.labels());
}

/// A listing that lags behind, or that something cut, lacks a backup that is there: what only that one needs would go.
#[test]
fn a_listing_that_lacks_a_known_backup_stops_it() {
    let made = made(&[Full, Full, Full]);
    made.pass(DAY);
    let now = ExpireOptions { grace: Duration::ZERO, ..keep_full(5) };
    run(&made, &now);
    let before = made.keys("");
    for shown in 0..3 {
        made.plan.add(|call| call.operation == Operation::List && call.key.starts_with("backup/"), Effect::Cut(shown));
        for options in [&now, &ExpireOptions { dry_run: true, ..now.clone() }, &keep_full(1)] {
            let error = expire(&made.repository, options, &Silent).unwrap_err();
            assert!(error.to_string().contains("lacks backup"), "{shown} shown: {error}");
            assert!(error.hint_text().unwrap().contains("listings"), "{error}");
            assert_eq!(made.keys(""), before, "{shown} shown");
        }
        // nor does a look at it make the catalog forget it
        assert_eq!(made.repository.backup_info().unwrap().backups.len(), 3, "{shown} shown");
        made.plan.clear();
    }
    // one that is gone, though the catalog names it still, is no contradiction
    let gone = made.labels()[0].clone();
    made.repository.store.delete(&[layout::manifest("main", &gone)]).unwrap();
    assert!(run(&made, &now).packs.unwrap().deleted > 0);
    assert_eq!(made.labels().len(), 2);
}

#[test]
fn a_short_grace_period_needs_a_word_of_its_own() {
    let made = made(&[Full, Full]);
    let before = made.keys("");
    let short = ExpireOptions { grace: GRACE_MIN - Duration::from_secs(1), force: false, ..keep_full(1) };
    let error = expire(&made.repository, &short, &Silent).unwrap_err();
    assert!(error.to_string().contains("3599 s is shorter than 3600 s"), "{error}");
    assert!(error.hint_text().unwrap().contains("--force"), "{error}");
    assert_eq!(made.keys(""), before);
    run(&made, &ExpireOptions { dry_run: true, ..short.clone() });
    run(&made, &ExpireOptions { grace: GRACE_MIN, ..short.clone() });
    run(&made, &ExpireOptions { force: true, ..short });
}

#[test]
fn pointers_follow() {
    let made = made(&[Full, Diff, Full]);
    run(&made, &keep_full(1));
    assert_eq!(made.keys("latest/"), ["latest/main/latest", "latest/main/latest-full"]);
    assert_eq!(made.repository.resolve("latest").unwrap(), made.labels()[0]);
}

#[test]
fn wal_goes_but_for_what_kept_backups_need() {
    let mut made = made(&[Full, Full, Full]);
    let odd = [format!("{}.partial", segment(1, 2)), format!("{}.00000028.backup", segment(1, 1))];
    odd.iter().for_each(|name| made.archive_file(name, segment(1, 2)));
    made.archive_file("00000002.history", segment(1, 1));
    made.pass(1);
    let dry = ExpireOptions { dry_run: true, ..keep_full(2) };
    // three segments a backup; the third one of each is needed by nobody
    let would = run(&made, &dry).archives[0].clone();
    assert_eq!(would.removed, 5);
    assert_eq!(made.archived().len(), 12);
    assert_eq!(run(&made, &keep_full(2)).archives[0].removed, 5);
    let mut expected: Vec<String> = (4..10).map(|number| segment(1, number).to_string()).collect();
    expected.push("00000002.history".into());
    let mut left = made.archived();
    left.sort_by_key(|name| (name.ends_with("history"), name.clone()));
    assert_eq!(left, expected);
    // WAL of the last one only
    let retention = Retention { archive: Some(1), ..keep_full(2).retention };
    run(&made, &ExpireOptions { retention, ..keep_full(2) });
    let expected: Vec<String> = [4, 5, 7, 8, 9].map(|number| segment(1, number).to_string()).into();
    assert_eq!(made.archived().iter().filter(|name| name.len() == 24).cloned().collect::<Vec<_>>(), expected);
    made.assert_sound();
}

#[test]
fn a_dry_run_changes_nothing() {
    let mut made = made(&[Full, Full]);
    made.garbage();
    made.pass(DAY);
    let before = made.keys("");
    let report = run(&made, &ExpireOptions { dry_run: true, grace: Duration::ZERO, ..keep_full(1) });
    assert_eq!(made.keys(""), before);
    let packs = report.packs.unwrap();
    // those of the first backup that nobody else needs are counted too
    assert!(packs.unneeded > 1 && packs.marked == 0 && packs.deleted == 0, "{packs:?}");
    assert!(report.dry_run && !report.backups[0].keep);
}

#[test]
fn what_a_backup_that_died_left_goes_even_without_a_retention() {
    let mut made = made(&[Full]);
    let garbage = made.garbage();
    let options = ExpireOptions { retention: Retention::NONE, ..keep_full(1) };
    // written at this very second: it may belong to a backup that has just begun
    assert_eq!(run(&made, &options).packs.unwrap().marked, 0);
    made.pass(1);
    let report = run(&made, &options);
    assert_eq!(report.packs.unwrap().marked, 1);
    assert!(report.notes[0].contains("no retention is set"));
    made.pass(DAY);
    assert_eq!(run(&made, &options).packs.unwrap().deleted, 1);
    assert!(!made.keys("chunk/").contains(&garbage));
    made.assert_sound();
}

fn lock_of(made: &Made, dead: bool) -> LockInfo {
    LockInfo {
        kind: LockKind::Backup,
        since: Some(made.now() - if dead { 2 * DAY } else { 0 }),
        heartbeat: 0,
        host: "elsewhere".into(),
        pid: 1,
        user: "postgres".into(),
        process: None,
        note: String::new(),
        failed: false,
        pgcairn: "0.1.0".into(),
    }
}

fn write_lock(made: &Made, info: &LockInfo) {
    let bytes = made.repository.encode_info("lock/main/backup", info).unwrap();
    made.repository.store.put("lock/main/backup", Body::Bytes(bytes)).unwrap();
}

#[test]
fn packs_of_a_running_backup_stay_and_none_is_deleted_meanwhile() {
    let mut made = made(&[Full, Full]);
    let old = made.garbage();
    made.pass(1);
    let lock = lock_of(&made, false);
    write_lock(&made, &lock);
    let fresh = made.garbage();
    made.pass(100);
    // its heartbeat
    write_lock(&made, &lock);
    let report = run(&made, &ExpireOptions { grace: Duration::ZERO, ..keep_full(1) });
    let packs = report.packs.unwrap();
    assert!(packs.marked > 0 && packs.deleted == 0, "{packs:?}");
    assert!(report.notes.iter().any(|note| note.contains("postgres@elsewhere")), "{:?}", report.notes);
    assert!(made.keys("chunk/").contains(&old) && made.keys("chunk/").contains(&fresh));
    let marked = mark::marks(&made.repository).unwrap().into_iter().flat_map(|mark| mark.packs);
    let marked: Vec<String> = marked.map(|pack| layout::pack("main", pack)).collect();
    assert!(marked.contains(&old) && !marked.contains(&fresh));
    // it ends, and took up nothing
    made.repository.store.delete(&["lock/main/backup".into()]).unwrap();
    run(&made, &ExpireOptions { grace: Duration::ZERO, ..keep_full(1) });
    assert!(!made.keys("chunk/").contains(&old));
    made.assert_sound();
}

#[test]
fn a_full_backup_that_may_be_built_on_is_not_removed_by_name() {
    let made = made(&[Full, Incr, Full, Incr]);
    let labels = made.labels();
    let named = |label: &String| ExpireOptions { set: Some(label.clone()), ..keep_full(9) };
    write_lock(&made, &lock_of(&made, false));
    let error = expire(&made.repository, &named(&labels[2]), &Silent).unwrap_err();
    assert!(error.to_string().contains("postgres@elsewhere"), "{error}");
    assert_eq!(made.labels(), labels);
    assert_eq!(made.keys("lock/"), ["lock/main/backup"]);
    // an incremental may go, whoever builds on it: its label is in no other
    run(&made, &named(&labels[3]));
    // the backup has died
    made.pass(3600);
    run(&made, &named(&labels[2]));
    assert_eq!(made.labels(), labels[..2]);
}

#[test]
fn a_lock_of_a_dead_backup_stays_as_long_as_its_packs() {
    let mut made = made(&[Full]);
    write_lock(&made, &lock_of(&made, true));
    let garbage = made.garbage();
    made.pass(3600);
    assert_eq!(run(&made, &keep_full(1)).packs.unwrap().marked, 1);
    assert_eq!(made.keys("lock/"), ["lock/main/backup"]);
    made.pass(DAY);
    assert_eq!(run(&made, &keep_full(1)).packs.unwrap().deleted, 1);
    assert!(made.keys("lock/").is_empty());
    assert!(!made.keys("chunk/").contains(&garbage));
}

#[test]
fn a_pack_that_was_taken_up_again_is_not_deleted() {
    let mut made = made(&[Full, Full]);
    run(&made, &keep_full(1));
    let marked = made.keys("mark/");
    assert!(!marked.is_empty());
    // a backup that began before the mark ends after it, and refers to packs of the backup that went
    made.backup(Incr);
    let needs: Vec<_> = made.labels().iter().flat_map(|label| made.repository.manifest_packs(label).unwrap()).collect();
    let all = crate::format::info::Mark { packs: needs.iter().map(|of| of.pack.to_string()).collect() };
    let bytes = made.repository.encode_info(&marked[0], &all).unwrap();
    made.repository.store.put(&marked[0], Body::Bytes(bytes)).unwrap();
    made.pass(2 * DAY);
    run(&made, &keep_full(1));
    made.assert_sound();
    assert!(!made.keys("mark/").contains(&marked[0]));
}

#[test]
fn packs_that_were_marked_before_a_backup_took_them_up_stay_for_the_grace_period_after_it() {
    let mut made = Made::new();
    made.backup(Full);
    let label = made.labels().remove(0);
    let uses = made.repository.manifest_packs(&label).unwrap();
    let needs: Vec<String> = uses.iter().map(|of| layout::pack("main", of.pack)).collect();
    // as if another backup had died with these packs, and they had been marked before this one took them over
    mark::mark(&made.repository, &uses.iter().map(|of| (of.pack, of.size)).collect(), &[]).unwrap();
    made.pass(2 * DAY);
    made.backup(Full);
    made.pass(1);
    let there = |made: &Made| {
        let keys = made.keys("chunk/");
        needs.iter().filter(|key| keys.contains(key)).count()
    };
    // the run that removes the backup: who reads it has a day to end
    assert_eq!(run(&made, &keep_full(1)).backups.iter().filter(|backup| !backup.keep).count(), 1);
    assert_eq!(there(&made), needs.len());
    made.pass(DAY);
    assert!(run(&made, &keep_full(1)).packs.unwrap().deleted > 0);
    assert!(there(&made) < needs.len());
    made.assert_sound();
}

#[test]
fn a_backup_that_commits_while_the_sweep_begins_loses_nothing() {
    let mut made = made(&[Full, Full]);
    let first = made.labels()[0].clone();
    let lock = made.repository.lock(LockKind::Expire, "").unwrap();
    made.repository.store.delete(&[layout::manifest("main", &first)]).unwrap();
    let mut needed = Needed::default();
    needed.update(&made.repository, &Silent, |_| false).unwrap();
    let found = mark::look(&made.repository, &needed, i64::MAX).unwrap();
    mark::mark(&made.repository, &found.unneeded, &[]).unwrap();
    // it was taken on top of the one that went, and needs packs of it; and it wrote some of its own
    made.backup(Incr);
    let needed_now = |made: &Made| {
        let of = |label: &String| made.repository.manifest_packs(label).unwrap();
        made.labels().iter().flat_map(of).map(|of| of.pack).collect::<std::collections::HashSet<_>>()
    };
    let wrongly_marked = needed_now(&made).iter().map(|pack| (*pack, 1)).collect();
    mark::mark(&made.repository, &wrongly_marked, &[]).unwrap();
    let due = due(mark::marks(&made.repository).unwrap(), made.now(), Duration::ZERO);
    let swept = sweep(&made.repository, &lock, &due, &mut needed, &found.unneeded, &Silent).unwrap();
    assert!(matches!(swept, Swept::Done { packs, .. } if packs > 0), "{swept:?}");
    made.assert_sound();
}

#[test]
fn wal_of_a_backup_that_may_run_stays() {
    let mut made = made(&[Full, Full]);
    // as when a server went back to an earlier point
    let early = segment(1, 0).to_string();
    made.archive_file(&early, segment(1, 0));
    run(&made, &keep_full(1));
    assert!(made.archived().contains(&early));
    made.pass(1);
    run(&made, &keep_full(1));
    assert!(!made.archived().contains(&early));
}

#[test]
fn a_manifest_that_cannot_be_read_stops_the_sweep_but_can_be_removed() {
    let made = made(&[Full, Full, Full]);
    let labels = made.labels();
    let key = layout::manifest("main", &labels[1]);
    let mut bytes = made.repository.store.get(&key).unwrap().to_vec();
    bytes[60] ^= 1;
    made.repository.store.put(&key, Body::Bytes(bytes.into())).unwrap();
    let before = made.keys("chunk/");
    let options = ExpireOptions { grace: Duration::ZERO, ..keep_full(2) };
    for _ in 0..2 {
        let error = expire(&made.repository, &options, &Silent).unwrap_err();
        assert!(error.to_string().contains(&format!("backup {} cannot be read", labels[1])), "{error}");
        assert!(error.hint_text().unwrap().contains(&format!("expire --set {}", labels[1])));
        assert_eq!(made.keys("chunk/"), before);
    }
    // it does not count: the one before it stays
    assert_eq!(made.labels(), labels);
    let set = ExpireOptions { set: Some(labels[1].clone()), ..options.clone() };
    assert!(run(&made, &set).packs.unwrap().deleted > 0);
    assert_eq!(made.labels(), [labels[0].clone(), labels[2].clone()]);
    run(&made, &ExpireOptions { retention: keep_full(1).retention, ..options });
    assert_eq!(made.labels(), labels[2..]);
    made.assert_sound();
    let error = expire(&made.repository, &ExpireOptions { set: Some("latest".into()), ..set }, &Silent).unwrap_err();
    assert!(error.to_string().contains("last full backup"), "{error}");
}

#[test]
fn nothing_is_removed_when_nothing_is_known_of_a_backup() {
    let made = made(&[Full, Full, Full]);
    let labels = made.labels();
    for key in
        [layout::manifest("main", &labels[2]), layout::backup_info("main"), "backup/main/backup.info.copy".into()]
    {
        made.repository.store.put(&key, Body::Bytes(b"rubbish".as_slice().into())).unwrap();
    }
    let before = made.keys("");
    let error = expire(&made.repository, &keep_full(1), &Silent).unwrap_err();
    assert!(error.to_string().contains("nothing is removed"), "{error}");
    assert_eq!(made.keys(""), before);
    // without it
    run(&made, &ExpireOptions { set: Some(labels[2].clone()), ..keep_full(1) });
    run(&made, &keep_full(1));
    assert_eq!(made.labels(), [labels[1].clone()]);
    made.assert_sound();
}

#[test]
fn two_expires_exclude_each_other() {
    let made = made(&[Full, Full]);
    let _lock = made.repository.lock(LockKind::Expire, "").unwrap();
    let error = expire(&made.repository, &keep_full(1), &Silent).unwrap_err();
    assert!(error.to_string().contains("an expire is running"), "{error}");
    assert_eq!(made.labels().len(), 2);
}

#[test]
fn a_run_that_dies_at_any_call_is_finished_by_the_next() {
    let reference = {
        let made = made(&[Full, Diff, Full, Incr]);
        run(&made, &ExpireOptions { grace: Duration::ZERO, ..keep_full(1) });
        made.keys("")
    };
    for lost_answer in [false, true] {
        for call in 1.. {
            let made = made(&[Full, Diff, Full, Incr]);
            // deterministic content: every run has the same keys, but for random names of locks and marks
            let effect = match lost_answer {
                true => Effect::FailAfter(ErrorKind::Other),
                false => Effect::Fail(ErrorKind::Other),
            };
            made.plan.from_nth(call, effect);
            let died = expire(&made.repository, &ExpireOptions { grace: Duration::ZERO, ..keep_full(1) }, &Silent);
            made.plan.clear();
            made.assert_sound();
            run(&made, &ExpireOptions { grace: Duration::ZERO, ..keep_full(1) });
            made.assert_sound();
            assert_eq!(made.keys(""), reference, "died at call {call}");
            if died.is_ok() {
                assert!(call > 20, "{call} calls are too few");
                break;
            }
        }
    }
}

/// The most memory this process ever had, in bytes.
fn memory_peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").trim().parse::<u64>().unwrap() * 1024
}

/// Each test is a process of its own.
#[test]
fn a_thousand_backups_of_many_packs_need_little_memory() {
    const BACKUPS: u64 = 1000;
    // of these, each backup after the first has a hundred of its own and shares the others
    const PACKS: u64 = 2000;
    // in memory, where syncs cost nothing
    let place = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let store = crate::store::DirectoryStore::open(place.path(), true).unwrap();
    let mut made = Made::on(store);
    made.many(BACKUPS, PACKS);
    // the two kept ones for which the others go must be whole
    let labels = made.labels();
    for label in [&labels[990], &labels[999]] {
        for of in made.repository.manifest_packs(label).unwrap() {
            let key = layout::pack("main", of.pack);
            made.repository.store.put(&key, Body::Bytes(Bytes::from_static(b"p"))).unwrap();
        }
    }
    let before = memory_peak();
    let report = run(&made, &ExpireOptions { grace: Duration::ZERO, ..keep_full(10) });
    assert_eq!(report.backups.iter().filter(|backup| backup.keep).count(), 10);
    let options = crate::verify::VerifyOptions { quick: true, process_max: 4 };
    let report = crate::verify::verify(&made.repository, &options, &Silent).unwrap();
    // those of the others were never written
    assert_eq!(report.harms.len() as u64, 8 * 100);
    let needed = memory_peak().saturating_sub(before);
    assert!(needed < 48 << 20, "{needed} bytes more than the {before} before");
}

#[derive(Clone, Debug)]
enum Op {
    Backup(crate::postgres::BackupKind),
    Die,
    Expire { full: u32, diff: u32, archive: u32, grace_h: u64, fails_at: Option<u64> },
    Pass(i64),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => prop::sample::select(vec![Full, Diff, Incr]).prop_map(Op::Backup),
        1 => Just(Op::Die),
        3 => (1u32..4, 1u32..4, 0u32..4, prop::sample::select(vec![0, 24]), prop::option::of(1u64..80))
            .prop_map(|(full, diff, archive, grace_h, fails_at)| Op::Expire { full, diff, archive, grace_h, fails_at }),
        2 => prop::sample::select(vec![60, 3600, DAY]).prop_map(Op::Pass),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn whatever_happens_what_is_kept_can_be_read(ops in prop::collection::vec(op(), 1..14)) {
        let mut made = Made::new();
        made.backup(Full);
        for op in ops {
            match op {
                Op::Backup(kind) => _ = made.backup(kind),
                Op::Die => made.die(),
                Op::Pass(seconds) => made.pass(seconds),
                Op::Expire { full, diff, archive, grace_h, fails_at } => {
                    let archive = (archive > 0).then_some(archive);
                    let retention = Retention { diff: Some(diff), archive, ..keep_full(full).retention };
                    let grace = Duration::from_secs(grace_h * 3600);
                    if let Some(call) = fails_at {
                        made.plan.from_nth(call, Effect::Fail(ErrorKind::Other));
                    }
                    let outcome = expire(&made.repository, &ExpireOptions { retention, grace, ..keep_full(full) }, &Silent);
                    made.plan.clear();
                    prop_assert!(fails_at.is_some() || outcome.is_ok());
                }
            }
            made.assert_sound();
        }
        made.pass(2 * DAY);
        let end = ExpireOptions { grace: Duration::ZERO, ..keep_full(1) };
        run(&made, &end);
        // nothing is left but what somebody needs
        let report = run(&made, &ExpireOptions { dry_run: true, ..end });
        prop_assert_eq!(report.packs.unwrap().unneeded, 0);
        let options = crate::verify::VerifyOptions { quick: false, process_max: 2 };
        let report = crate::verify::verify(&made.repository, &options, &Silent).unwrap();
        prop_assert!(report.sound && report.notes.is_empty(), "{:?}", report);
        made.assert_sound();
        prop_assert!(made.keys("lock/").is_empty());
    }
}
