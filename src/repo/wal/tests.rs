//! Listings of archives of any size: complete, in order, and in as few requests.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::*;
use crate::store::{Body, Effect, Fault, MemoryStore, Operation, Record, Store};

fn database(wal_segment_size: u64) -> Database {
    Database { wal_segment_size, ..crate::retention::tests::database() }
}

/// The names of an archive of two timelines with `count` segments each, and what comes beside them.
fn names(count: u64, size: SegmentSize) -> Vec<String> {
    let mut names = Vec::new();
    for timeline in [1, 2] {
        let segment = |number| SegmentName::of_number(crate::postgres::Timeline(timeline), number, size).to_string();
        names.extend((40..40 + count).map(segment));
        names.push(format!("{}.00000028.backup", segment(41)));
        names.push(format!("{}.partial", segment(40 + count)));
    }
    names.push("00000002.history".into());
    names
}

#[test]
fn all_of_an_archive_is_listed_in_order() {
    for (bytes, count) in [(16 << 20, 3), (16 << 20, 600), (16 << 20, 9000), (1 << 20, 5500), (1 << 30, 700)] {
        let size = SegmentSize::new(bytes).unwrap();
        let store = Record::new(MemoryStore::new());
        let recording = store.recording();
        let repository = Repository::new(Arc::new(store), "main").unwrap();
        let archive_of = database(bytes);
        let archive = repository.archive(&archive_of);
        let mut keys: Vec<String> =
            names(count, size).iter().map(|name| archive.key(name, PackId([7; 16]), false)).collect();
        for key in &keys {
            repository.store.put(key, Body::Bytes(Vec::new().into())).unwrap();
        }
        keys.sort();
        recording.reset();
        let mut found = Vec::new();
        archive
            .files(|name, object| {
                assert!(object.key.contains(name));
                found.push(object.key.clone());
            })
            .unwrap();
        assert!(found == keys, "{} of {} keys of {bytes} bytes", found.len(), keys.len());
        let pages = recording.total().calls;
        let least = keys.len().div_ceil(PAGE_OBJECTS_MAX) as u64;
        assert!(pages <= least + least / 4 + 4, "{pages} requests for {} keys", keys.len());
    }
}

#[test]
fn the_pages_of_a_large_archive_come_at_the_same_time() {
    let size = SegmentSize::new(16 << 20).unwrap();
    let fault = Fault::new(MemoryStore::new());
    let plan = fault.plan();
    let repository = Repository::new(Arc::new(fault), "main").unwrap();
    let archive_of = database(16 << 20);
    let archive = repository.archive(&archive_of);
    for name in names(3000, size) {
        repository.store.put(&archive.key(&name, PackId([7; 16]), false), Body::Bytes(Vec::new().into())).unwrap();
    }
    const DELAY: Duration = Duration::from_millis(300);
    let begun = Arc::new(parking_lot::Mutex::new(Vec::new()));
    let seen = begun.clone();
    let is_listing = move |call: &crate::store::Call| {
        let is_listing = call.operation == Operation::List;
        if is_listing {
            seen.lock().push(Instant::now());
        }
        is_listing
    };
    plan.add(is_listing, Effect::Delay(DELAY));
    let mut count = 0;
    archive.files(|_, _| count += 1).unwrap();
    assert_eq!(count, 6005);
    // one after the other they would begin at least that far apart
    let begun = begun.lock();
    assert!(begun.windows(2).any(|pair| pair[1] - pair[0] < DELAY), "{begun:?}");
}

/// What lies behind a segment is listed in as many pages as it has, however much lies before it.
#[test]
fn a_part_of_an_archive_is_listed_alone() {
    for (bytes, count) in [(16 << 20, 600), (16 << 20, 9000), (1 << 20, 5500), (1 << 30, 1700)] {
        let size = SegmentSize::new(bytes).unwrap();
        let store = Record::new(MemoryStore::new());
        let recording = store.recording();
        let repository = Repository::new(Arc::new(store), "main").unwrap();
        let archive_of = database(bytes);
        let archive = repository.archive(&archive_of);
        for name in names(count, size) {
            let key = archive.key(&name, PackId([7; 16]), false);
            repository.store.put(&key, Body::Bytes(Vec::new().into())).unwrap();
        }
        recording.reset();
        let listing = archive.begin().unwrap();
        assert!(!listing.is_whole());
        assert_eq!(listing.timelines(), [crate::postgres::Timeline(1), crate::postgres::Timeline(2)]);
        assert_eq!(archive.histories(&listing).len(), 1);
        let begun = recording.total().calls;
        for from in [0, 40, 41, 300, count / 2, count + 39, count + 40, 1 << 40] {
            recording.reset();
            let mut found = Vec::new();
            archive
                .files_from(&listing, Some(from), |name, _| {
                    let segment = name.parse::<SegmentName>().ok();
                    found.extend(segment.filter(|of| of.number(size).is_some_and(|number| number >= from)));
                })
                .unwrap();
            let expected = (40..40 + count).filter(|number| *number >= from);
            let expected: Vec<SegmentName> = [1, 2]
                .into_iter()
                .flat_map(|timeline| {
                    let segment =
                        move |number| SegmentName::of_number(crate::postgres::Timeline(timeline), number, size);
                    expected.clone().map(segment)
                })
                .collect();
            assert!(found == expected, "{} of {} from {from}", found.len(), expected.len());
            // of each timeline a page more than needed, and what is left of a directory
            let least = (expected.len() + 2 * 4096).div_ceil(PAGE_OBJECTS_MAX) as u64;
            let pages = recording.total().calls;
            assert!(pages <= least + least / 4 + 4, "{pages} requests from {from} of {bytes} bytes, {begun} before");
        }
    }
}
