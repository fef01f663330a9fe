//! Two who create a stanza at the same moment.
#![allow(clippy::unwrap_used)]
use std::sync::Barrier;
use std::thread;
use std::time::Duration;

use super::*;
use crate::format::cipher_key::Passphrase;
use crate::retention::tests::database;
use crate::store::{DirectoryStore, Fault, MemoryStore};

const ROUNDS: usize = 60;

/// A store whose calls come in any order, with no stanza in it.
fn store(place: &tempfile::TempDir, in_memory: bool) -> Arc<dyn Store> {
    let store: Arc<dyn Store> = match in_memory {
        true => Arc::new(MemoryStore::new()),
        false => Arc::new(DirectoryStore::open(place.path(), true).unwrap()),
    };
    let store = Fault::new(store);
    store.plan().shake(Duration::from_micros(300));
    Arc::new(store)
}

/// What each of two is told who do this at the same moment. One that finds the other at work tries again.
fn race<T: Send>(work: impl Fn(usize) -> Result<T> + Sync) -> [Result<T>; 2] {
    let (barrier, work) = (Barrier::new(2), &work);
    let try_one = |number: usize| {
        barrier.wait();
        loop {
            match work(number) {
                Err(error) if error.to_string().contains("is locked") => thread::sleep(Duration::from_millis(1)),
                told => return told,
            }
        }
    };
    thread::scope(|scope| {
        let racing = [0, 1].map(|number| scope.spawn(move || try_one(number)));
        racing.map(|thread| thread.join().unwrap())
    })
}

fn cluster(number: usize) -> Database {
    Database { system_id: 100 + number as u64, ..database() }
}

#[test]
fn of_two_clusters_that_create_a_stanza_at_once_one_has_it() {
    for round in 0..ROUNDS {
        let place = tempfile::tempdir().unwrap();
        let repository = Repository::new(store(&place, round % 2 == 0), "main").unwrap();
        let told = race(|number| repository.create_stanza(cluster(number)));
        let created: Vec<usize> = [0, 1].into_iter().filter(|number| told[*number].is_ok()).collect();
        assert_eq!(created.len(), 1, "round {round}: {told:?}");
        assert!(matches!(told[created[0]], Ok(true)));
        assert_eq!(repository.archive_info().unwrap().history, [cluster(created[0])], "round {round}");
        assert!(repository.labels().unwrap().is_empty());
        // both copies are of one
        let keys = with_copy(&layout::archive_info("main"));
        let [first, second] = keys.map(|key| repository.fetch_info::<ArchiveInfo>(&key).unwrap().unwrap());
        assert_eq!(first, second);
    }
}

#[test]
fn one_cluster_may_create_its_stanza_twice_at_once() {
    for round in 0..ROUNDS / 4 {
        let place = tempfile::tempdir().unwrap();
        let repository = Repository::new(store(&place, round % 2 == 0), "main").unwrap();
        let mut told = race(|_| repository.create_stanza(cluster(0))).map(Result::unwrap);
        told.sort_unstable();
        assert_eq!(told, [false, true], "round {round}");
    }
}

/// Whoever is told that it is there opens it with his passphrase.
#[test]
fn of_two_who_encrypt_a_stanza_at_once_one_has_it() {
    for round in 0..ROUNDS / 4 {
        let place = tempfile::tempdir().unwrap();
        let store = store(&place, round % 2 == 0);
        let open = Repository::new(Arc::clone(&store), "main").unwrap();
        let passphrase = |number: usize| Passphrase::new(format!("word {number}").into()).unwrap();
        let told = race(|number| open.create_encrypted_stanza(&passphrase(number), cluster(number)).map(drop));
        let created: Vec<usize> = [0, 1].into_iter().filter(|number| told[*number].is_ok()).collect();
        assert_eq!(created.len(), 1, "round {round}: {told:?}");
        let opened = Repository::open(store, "main", Some(&passphrase(created[0]))).unwrap();
        assert_eq!(opened.archive_info().unwrap().history, [cluster(created[0])], "round {round}");
    }
}
