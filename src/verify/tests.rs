#![allow(clippy::unwrap_used)]
use super::*;
use crate::format::pack::{PackKind, PackWriter};
use crate::format::seal::SealKind;
use crate::postgres::BackupKind::{Diff, Full, Incr};
use crate::progress::Silent;
use crate::retention::expire::{ExpireOptions, GRACE, expire};
use crate::retention::policy::Retention;
use crate::retention::tests::{Made, database, other_wal, segment, wal_bytes};
use crate::store::{Body, Effect, ErrorKind};

fn run(made: &Made, quick: bool) -> Report {
    verify(&made.repository, &VerifyOptions { quick, process_max: 3 }, &Silent).unwrap()
}

fn made(kinds: &[crate::postgres::BackupKind]) -> Made {
    let mut made = Made::new();
    for kind in kinds {
        made.backup(*kind);
        made.pass(3600);
    }
    made
}

fn change(made: &Made, key: &str, spoil: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = made.repository.store.get(key).unwrap().to_vec();
    spoil(&mut bytes);
    made.repository.store.put(key, Body::Bytes(bytes.into())).unwrap();
}

/// Labels of the backups that are harmed.
fn harmed(report: &Report) -> Vec<String> {
    report.backups.iter().filter(|backup| !backup.sound).map(|backup| backup.label.clone()).collect()
}

/// The packs of a backup that no backup before it needs.
fn own_packs(made: &Made, number: usize) -> Vec<PackId> {
    let labels = made.labels();
    let packs = |label: &String| -> Vec<PackId> {
        made.repository.manifest_packs(label).unwrap().iter().map(|of| of.pack).collect()
    };
    let before: BTreeSet<PackId> = labels[..number].iter().flat_map(packs).collect();
    packs(&labels[number]).into_iter().filter(|pack| !before.contains(pack)).collect()
}

/// Labels of the backups that need a pack.
fn needing(made: &Made, pack: PackId) -> Vec<String> {
    let needs = |label: &String| made.repository.manifest_packs(label).unwrap().iter().any(|of| of.pack == pack);
    made.labels().into_iter().filter(needs).collect()
}

#[test]
fn a_sound_stanza_is_sound() {
    let mut made = made(&[Full, Incr, Diff, Full, Incr]);
    for quick in [true, false] {
        let report = run(&made, quick);
        assert!(report.sound && report.notes.is_empty() && report.backups.len() == 5, "{report:?}");
        assert_eq!(report.checked.packs > 0, !quick);
    }
    made.garbage();
    assert!(run(&made, true).notes[0].contains("1 packs that no backup needs"));
    // what expire leaves is sound too, though WAL between is gone
    made.pass(1);
    let retention = Retention { full: Some(2), archive: Some(1), ..Retention::NONE };
    let options = ExpireOptions { retention, grace: GRACE, force: true, set: None, brief: false, dry_run: false };
    expire(&made.repository, &options, &Silent).unwrap();
    for quick in [true, false] {
        let report = run(&made, quick);
        assert!(report.sound, "{report:?}");
    }
}

#[test]
fn a_flipped_byte_harms_the_backups_that_need_its_chunk() {
    let made = made(&[Full, Incr, Incr]);
    for number in 0..3 {
        for pack in own_packs(&made, number) {
            let key = layout::pack("main", pack);
            let needing = needing(&made, pack);
            // in the first chunk
            change(&made, &key, |bytes| bytes[40] ^= 1);
            let report = run(&made, false);
            assert!(!report.sound);
            let [harm] = report.harms.as_slice() else { panic!("{report:?}") };
            assert_eq!((&harm.object, &harm.backups), (&key, &harmed(&report)));
            assert!(harm.backups.iter().all(|label| needing.contains(label)), "{report:?}");
            assert!(harm.backups.contains(&made.labels()[number]), "{report:?}");
            assert_eq!(made.repository.harmed_packs().unwrap(), std::collections::HashSet::from([pack]));
            change(&made, &key, |bytes| bytes[40] ^= 1);
            assert!(run(&made, true).sound && !made.repository.harmed_packs().unwrap().is_empty());
            assert!(run(&made, false).sound && made.repository.harmed_packs().unwrap().is_empty());
        }
    }
}

#[test]
fn a_pack_that_is_missing_or_cut_is_found_even_quickly() {
    for quick in [true, false] {
        for cut in [false, true] {
            let made = made(&[Full, Incr, Full]);
            let pack = *own_packs(&made, 0)
                .iter()
                .max_by_key(|id| made.repository.store.size(&layout::pack("main", **id)).unwrap())
                .unwrap();
            let key = layout::pack("main", pack);
            let expected = needing(&made, pack);
            match cut {
                true => change(&made, &key, |bytes| bytes.truncate(bytes.len() / 3)),
                false => made.remove(&key),
            }
            // twice: what is noted is noted once
            run(&made, quick);
            let report = run(&made, quick);
            assert_eq!(made.keys("harm/").len(), 1);
            assert_eq!(harmed(&report), expected, "{report:?}");
            assert_eq!(report.harms.len(), 1, "{report:?}");
            assert_eq!((&report.harms[0].object, &report.harms[0].backups), (&key, &expected));
            assert!(report.backups[0].files.iter().any(|file| file == "base/large"), "{report:?}");
        }
    }
}

#[test]
fn a_pack_that_holds_other_sound_chunks_is_found() {
    let mut made = made(&[Full]);
    let pack = own_packs(&made, 0)[0];
    let mut other = PackWriter::new(PackKind::Data, SealKind::Hashed, pack, 0);
    made.chunk(&mut other, b"something else");
    made.repository.store.put(&layout::pack("main", pack), Body::Bytes(other.finish().into())).unwrap();
    let report = run(&made, false);
    assert_eq!(harmed(&report), made.labels());
}

#[test]
fn a_damaged_manifest_harms_its_backup() {
    for quick in [true, false] {
        let made = made(&[Full, Incr]);
        let key = layout::manifest("main", &made.labels()[0]);
        change(&made, &key, |bytes| bytes[50] ^= 1);
        let report = run(&made, quick);
        assert_eq!(harmed(&report), made.labels()[..1]);
        assert_eq!(report.harms[0].object, key);
    }
}

#[test]
fn wal_that_a_backup_needs() {
    for quick in [true, false] {
        let made = made(&[Full, Incr, Full]);
        // each backup needs two segments, and a third is archived after it
        made.remove(&made.wal_key(5));
        let report = run(&made, quick);
        assert_eq!(harmed(&report), made.labels()[1..2]);
        assert!(report.harms[0].object.ends_with(&segment(1, 5).to_string()), "{report:?}");
        assert_eq!(report.gaps.len(), 1);
    }
}

#[test]
fn a_gap_in_the_wal_harms_points_but_no_backup() {
    for quick in [true, false] {
        let mut made = made(&[Full, Incr]);
        made.archive_segment();
        made.archive_segment();
        made.backup(Full);
        made.remove(&made.wal_key(7));
        let report = run(&made, quick);
        let labels = made.labels();
        assert!(!report.sound && harmed(&report).is_empty(), "{report:?}");
        let [gap] = report.gaps.as_slice() else { panic!("{report:?}") };
        assert_eq!((&gap.first, &gap.last), (&segment(1, 7).to_string(), &segment(1, 7).to_string()));
        assert_eq!((gap.after.as_ref(), gap.until.as_ref()), (Some(&labels[1]), Some(&labels[2])));
        assert!(gap.from_time < gap.until_time);
    }
}

#[test]
fn wal_that_is_damaged_or_somebody_elses() {
    let mut made = made(&[Full, Incr]);
    made.archive_segment();
    let good = made.wal_key(6);
    change(&made, &good, |bytes| bytes[40] ^= 1);
    // sound, but of another place
    let name = segment(1, 7).to_string();
    made.remove(&made.wal_key(7));
    made.archive_file(&name, segment(1, 9));
    let report = run(&made, false);
    let objects: Vec<&str> = report.harms.iter().map(|harm| harm.object.as_str()).collect();
    assert_eq!(objects, [good, made.wal_key(7)]);
    assert!(report.harms[1].what.contains("begins at"), "{report:?}");
    assert!(harmed(&report).is_empty());
    assert_eq!(report.gaps.len(), 2, "{report:?}");
    assert!(run(&made, true).sound, "a quick look cannot see it");
    // two contents under one name
    made.archive_file(&segment(1, 2).to_string(), segment(1, 3));
    let report = run(&made, true);
    assert!(report.harms[0].what.contains("another content"), "{report:?}");
    assert_eq!(harmed(&report), made.labels()[..1]);
}

/// Another server with the same system identifier wrote it: names, headers and checksums are right.
#[test]
fn wal_of_another_server_under_the_right_names() {
    for number in [1, 2] {
        let mut made = made(&[Full, Incr]);
        assert!(run(&made, false).sound);
        made.swap_wal(number);
        let report = run(&made, false);
        assert_eq!(harmed(&report), made.labels()[..1], "{report:?}");
        let [harm] = report.harms.as_slice() else { panic!("{report:?}") };
        assert_eq!(harm.object, made.wal_key(number));
        assert!(harm.what.contains("is not the WAL of backup"), "{report:?}");
        assert!(run(&made, true).sound, "a quick look cannot see it");
    }
}

/// The same of WAL that a backup stores.
#[test]
fn stored_wal_of_another_server_under_the_right_names() {
    let mut made = Made::new();
    made.backup_with_wal(wal_bytes);
    for quick in [true, false] {
        assert!(run(&made, quick).sound);
    }
    for (number, part) in [(4, "the checkpoint at"), (8, "sound WAL up to")] {
        let swapped = segment(1, number);
        let label = made.backup_with_wal(|name| if name == swapped { other_wal(name) } else { wal_bytes(name) });
        let report = run(&made, false);
        let harm =
            report.harms.iter().find(|harm| harm.backups == [label.clone()]).unwrap_or_else(|| panic!("{report:?}"));
        assert_eq!(harm.object, layout::manifest("main", &label));
        let wanted = format!("pg_wal/{swapped} in it is not the WAL of backup {label}: it does not hold {part}");
        assert!(harm.what.starts_with(&wanted), "{harm:?}");
        let health = report.backups.iter().find(|health| health.label == label).unwrap();
        assert_eq!(health.files, [format!("pg_wal/{swapped}")]);
        assert!(run(&made, true).sound, "a quick look cannot see it");
    }
    assert_eq!(harmed(&run(&made, false)), made.labels()[1..]);
}

/// Names of segments that the description asks for and no entry has, or that are no whole segments.
#[test]
fn stored_wal_that_is_not_whole() {
    let mut made = Made::new();
    let label = made.backup_with_wal(|name| wal_bytes(name)[..800_000].to_vec());
    let report = run(&made, false);
    assert_eq!(harmed(&report), [label]);
    assert!(report.harms[0].what.contains("has 800000 bytes, a segment has 1048576"), "{report:?}");
}

#[test]
fn a_timeline_must_join_the_one_before() {
    let mut made = made(&[Full]);
    // archived: 1 to 3 on timeline 1, which was left in segment 5
    made.archive_file(&segment(2, 5).to_string(), segment(2, 5));
    let history = |made: &Made, text: &str| {
        let key = made.repository.archive(&database()).key("00000002.history", PackId([0; 16]), false);
        let digest = made.repository.keys.digest(text.as_bytes());
        let content = made.repository.keys.file([digest.id]);
        let mut pack = PackWriter::new(PackKind::Wal, SealKind::Hashed, content, 0);
        let mut stored = Vec::new();
        let mut encoder = crate::format::chunk::Encoder::new(1).unwrap();
        encoder.encode(&made.repository.keys, &digest.id, text.as_bytes(), &mut stored).unwrap();
        pack.add(digest.id, text.len(), &stored);
        made.repository.store.put(&key, Body::Bytes(pack.finish().into())).unwrap();
    };
    let report = run(&made, true);
    assert!(report.harms[0].object.ends_with("00000002.history"), "{report:?}");
    history(&made, "1\t0/500100\tno recovery target specified\n");
    let report = run(&made, true);
    let [gap] = report.gaps.as_slice() else { panic!("{report:?}") };
    assert_eq!((&gap.first, &gap.last), (&segment(1, 4).to_string(), &segment(1, 4).to_string()));
    made.archive_segment();
    let report = run(&made, true);
    assert!(report.sound, "{report:?}");
    // the new timeline's first segment
    let key = made.keys("archive/main/15-1/0000000200000000/")[0].clone();
    made.remove(&key);
    made.archive_file(&segment(2, 6).to_string(), segment(2, 6));
    let report = run(&made, true);
    assert_eq!(report.gaps[0].first, segment(2, 5).to_string(), "{report:?}");
}

#[test]
fn summaries_are_notes_and_a_store_that_fails_is_an_error() {
    let made = made(&[Full, Incr]);
    made.remove("backup/main/backup.info.copy");
    change(&made, "latest/main/latest-full", |bytes| bytes[30] ^= 1);
    let report = run(&made, true);
    assert!(report.sound);
    assert_eq!(report.notes.len(), 2, "{report:?}");
    for quick in [true, false] {
        for call in 1.. {
            made.plan.nth(call, Effect::Fail(ErrorKind::Transient));
            let outcome = verify(&made.repository, &VerifyOptions { quick, process_max: 1 }, &Silent);
            made.plan.clear();
            match outcome {
                Err(error) => assert!(!error.is_damage(), "{error}"),
                Ok(report) => {
                    assert!(report.sound && call > 10, "{call}");
                    break;
                }
            }
        }
    }
}
