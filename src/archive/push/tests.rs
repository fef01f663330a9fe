//! Two who push at the same moment.
#![allow(clippy::unwrap_used)]
use std::path::Path;
use std::sync::{Arc, Barrier};
use std::time::Duration;

use super::*;
use crate::format::info::ArchiveInfo;
use crate::postgres::{SegmentName, SegmentSize, Timeline};
use crate::progress::Silent;
use crate::read::fetch::{FetchOptions, Fetcher};
use crate::read::wal::{GetError, get, open};
use crate::retention::tests::{Made, database, wal_bytes};
use crate::store::{DirectoryStore, Fault, MemoryStore, Store};
use crate::verify::{VerifyOptions, verify};

const ROUNDS: usize = 60;

/// A stanza in memory, or in a directory below `place`, whose calls come in any order.
fn stanza(place: &Path, in_memory: bool) -> Repository {
    let store: Arc<dyn Store> = match in_memory {
        true => Arc::new(MemoryStore::new()),
        false => Arc::new(DirectoryStore::open(&place.join("repo"), true).unwrap()),
    };
    let store = Fault::new(store);
    let plan = store.plan();
    let repository = Repository::new(Arc::new(store), "main").unwrap();
    repository.create_stanza(database()).unwrap();
    plan.shake(Duration::from_micros(300));
    repository
}

/// What each of two is told who push these contents under one name at the same moment. One that finds the other at work asks
/// again, as a server does.
fn race(repository: &Repository, place: &Path, name: &str, contents: &[Vec<u8>; 2]) -> [Result<Pushed>; 2] {
    let barrier = Barrier::new(2);
    let push_one = |number: usize| {
        let path = place.join(number.to_string()).join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, &contents[number]).unwrap();
        barrier.wait();
        loop {
            match push(repository, &path, 1) {
                Err(error) if error.to_string().contains("is locked") => std::thread::sleep(Duration::from_millis(1)),
                told => return told,
            }
        }
    };
    thread::scope(|scope| {
        let racing = [0, 1].map(|number| scope.spawn(move || push_one(number)));
        racing.map(|thread| thread.join().unwrap())
    })
}

#[test]
fn of_two_history_files_pushed_at_once_one_is_archived() {
    for round in 0..ROUNDS {
        let place = tempfile::tempdir().unwrap();
        let repository = stanza(place.path(), round % 2 == 0);
        let contents = [b"1\t0/500100\tone\n".to_vec(), b"1\t0/600100\tother\n".to_vec()];
        let told = race(&repository, place.path(), "00000002.history", &contents);
        let [archived] = [0, 1].into_iter().filter(|at| told[*at].is_ok()).collect::<Vec<_>>()[..] else {
            panic!("round {round}: {told:?}");
        };
        let error = told[1 - archived].as_ref().unwrap_err();
        assert!(error.is_conflict(), "round {round}: {error:?}");
        let target = place.path().join("target");
        get(&repository, "00000002.history", &target).unwrap();
        assert_eq!(std::fs::read(&target).unwrap(), contents[archived], "round {round}");
    }
}

#[test]
fn of_two_segments_of_one_name_pushed_at_once_one_at_most_is_archived() {
    let name = SegmentName::of_number(Timeline(1), 7, SegmentSize::new(database().wal_segment_size).unwrap());
    let mut other = wal_bytes(name);
    *other.last_mut().unwrap() = 1;
    let (contents, mut won) = ([wal_bytes(name), other], [0, 0]);
    for round in 0..ROUNDS {
        let place = tempfile::tempdir().unwrap();
        let repository = stanza(place.path(), round % 2 == 0);
        let told = race(&repository, place.path(), &name.to_string(), &contents);
        assert!(told.iter().any(Result::is_err), "round {round}: {told:?}");
        assert!(told.iter().filter_map(|told| told.as_ref().err()).all(Error::is_conflict), "round {round}: {told:?}");
        let keys: Vec<String> =
            repository.store.list("archive/main/15-1/", None).unwrap().objects.into_iter().map(|of| of.key).collect();
        for at in [0, 1].into_iter().filter(|at| told[*at].is_ok()) {
            won[at] += 1;
            let ids = contents[at].chunks(CHUNK).map(|plain| repository.keys.digest(plain).id);
            let content = repository.keys.file(ids).to_string();
            assert!(keys.iter().any(|key| key.contains(&content)), "round {round}: what was archived is gone");
            // nobody is given the other one for it
            let target = place.path().join("target");
            if get(&repository, &name.to_string(), &target).is_ok() {
                assert!(std::fs::read(&target).unwrap() == contents[at], "round {round}");
            }
        }
    }
    assert!(won[0] + won[1] > 0, "nobody was ever told that it is archived");
}

const HISTORY: &str = "00000002.history";

fn push_history(repository: &Repository, place: &Path) {
    let path = place.join(HISTORY);
    std::fs::write(&path, b"1\t0/500100\tno recovery target specified\n").unwrap();
    push(repository, &path, 1).unwrap();
}

#[track_caller]
fn refuses(repository: &Repository, place: &Path, name: &str, why: &str) {
    let Err(GetError::Failed(error)) = get(repository, name, &place.join("target")) else {
        panic!("{name} was delivered")
    };
    assert!(error.is_damage() && error.told().contains(why), "{}", error.told());
    assert!(!place.join("target").exists());
    let current = repository.archive_info().unwrap().current().unwrap().clone();
    let object = repository.archive(&current).find(name).unwrap().unwrap();
    let fetcher = Fetcher::new(repository.clone(), FetchOptions { memory_bytes: 1 << 20, disk: None });
    open(&fetcher, current.system_id, &object.key, object.size).unwrap_err();
    let report = verify(repository, &VerifyOptions { quick: true, process_max: 1 }, &Silent).unwrap();
    assert!(report.harms.iter().any(|harm| harm.object == object.key), "{report:?}");
}

/// Its text says neither of which timeline it is nor whose: a copy of its object is another history.
#[test]
fn a_history_file_is_read_under_its_own_name_and_of_its_own_cluster_only() {
    for secret in [&b""[..], b"a secret"] {
        let place = tempfile::tempdir().unwrap();
        let plain = Repository::new(Arc::new(MemoryStore::new()), "main").unwrap();
        let repository = Repository { keys: Keys::new(secret), ..plain };
        repository.create_stanza(database()).unwrap();
        push_history(&repository, place.path());
        get(&repository, HISTORY, &place.path().join("target")).unwrap();
        std::fs::remove_file(place.path().join("target")).unwrap();
        // pushed again, it is known
        assert_eq!(push(&repository, &place.path().join(HISTORY), 1).unwrap(), Pushed::AlreadyThere);
        let copy = |to: &str| {
            let bytes = repository.store.get("archive/main/15-1/00000002.history").unwrap();
            repository.store.put(&format!("archive/main/{to}"), Body::Bytes(bytes)).unwrap();
        };
        copy("15-1/00000003.history");
        refuses(&repository, place.path(), "00000003.history", "is not what was archived as 00000003.history");
        let other = Database { id: 2, system_id: 1, ..database() };
        repository.write_archive_info(&ArchiveInfo { history: vec![database(), other] }).unwrap();
        copy("15-2/00000002.history");
        refuses(&repository, place.path(), HISTORY, "of the cluster with system identifier 1");
    }
}

/// Development versions before 0.1.0 named the content alone: there the text must fit.
#[test]
fn a_history_that_names_a_timeline_which_is_not_before_it_is_refused() {
    let place = tempfile::tempdir().unwrap();
    let mut made = Made::new();
    made.archive_bytes(HISTORY, b"1\t0/500100\tx\n");
    get(&made.repository, HISTORY, &place.path().join("target")).unwrap();
    std::fs::remove_file(place.path().join("target")).unwrap();
    for (text, why) in
        [("1\t0/500100\tx\n2\t0/600100\tx\n", "not before it"), ("no history", "not a timeline and an LSN")]
    {
        made.archive_bytes(HISTORY, text.as_bytes());
        refuses(&made.repository, place.path(), HISTORY, why);
        let path = place.path().join("other").join(HISTORY);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        let error = push(&made.repository, &path, 1).unwrap_err();
        assert!(error.to_string().contains("tells no history"), "{error}");
    }
}
