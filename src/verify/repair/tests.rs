#![allow(clippy::unwrap_used)]
use super::*;
use crate::postgres::BackupKind::{Full, Incr};
use crate::progress::Silent;
use crate::retention::tests::{Made, database};
use crate::store::Body;
use crate::verify::{VerifyOptions, verify};

fn made() -> Made {
    let mut made = Made::new();
    for kind in [Full, Incr, Full] {
        made.backup(kind);
        made.pass(3600);
    }
    made
}

const INFOS: [&str; 4] = [
    "archive/main/archive.info",
    "archive/main/archive.info.copy",
    "backup/main/backup.info",
    "backup/main/backup.info.copy",
];

#[test]
fn what_is_lost_or_damaged_is_made_again() {
    for damaged in [false, true] {
        let made = made();
        let before: Vec<_> = INFOS.iter().map(|key| made.repository.store.get(key).unwrap()).collect();
        for key in INFOS.into_iter().chain(["latest/main/latest", "latest/main/latest-incr"]) {
            match damaged {
                true => made.repository.store.put(key, Body::Bytes(b"rubbish".as_slice().into())).unwrap(),
                false => made.repository.store.delete(&[key.to_owned()]).unwrap(),
            }
        }
        let done = repair(&made.repository).unwrap();
        assert!(
            done.iter().any(|line| line.contains("1 clusters")) && done.iter().any(|line| line.contains("3 backups"))
        );
        for (key, before) in INFOS.iter().zip(&before) {
            assert_eq!(&made.repository.store.get(key).unwrap(), before, "{key}");
        }
        let report = verify(&made.repository, &VerifyOptions { quick: true, process_max: 1 }, &Silent).unwrap();
        assert!(report.sound && report.notes.is_empty(), "{report:?}");
        assert!(made.keys("lock/").is_empty());
    }
}

#[test]
fn a_whole_copy_counts() {
    let made = made();
    let history = made.repository.archive_info().unwrap();
    made.repository.store.delete(&[INFOS[0].to_owned()]).unwrap();
    repair(&made.repository).unwrap();
    made.repository.store.delete(&[INFOS[1].to_owned()]).unwrap();
    assert_eq!(made.repository.archive_info().unwrap(), history);
}

#[test]
fn a_cluster_without_a_backup_is_known_by_its_wal() {
    let mut made = Made::new();
    made.archive_segment();
    for key in INFOS {
        made.repository.store.delete(&[key.to_owned()]).unwrap();
    }
    repair(&made.repository).unwrap();
    let info = made.repository.archive_info().unwrap();
    info.check("main", &database()).unwrap();
    assert_eq!((info.history[0].wal_segment_size, info.history[0].wal_page_size), (1 << 20, 8192));
}

#[test]
fn a_backup_that_cannot_be_read_stays_known() {
    let made = made();
    let label = made.labels()[1].clone();
    let key = layout::manifest("main", &label);
    made.repository.store.put(&key, Body::Bytes(b"rubbish".as_slice().into())).unwrap();
    let done = repair(&made.repository).unwrap();
    assert!(done.iter().any(|line| line.contains(&format!("backup {label} cannot be read"))), "{done:?}");
    assert!(made.repository.backup_info().unwrap().backups.contains_key(&label));
}

#[test]
fn nothing_is_made_of_nothing() {
    let made = Made::new();
    let repository = Repository::new(made.repository.store.clone(), "other").unwrap();
    assert!(repair(&repository).unwrap_err().to_string().contains("does not exist"));
    assert!(made.keys("lock/").is_empty() && made.keys("backup/other/").is_empty());
}
