#![allow(clippy::unwrap_used)]

use std::sync::Barrier;
use std::time::Duration;

use super::*;
use crate::format::SLOT;
use crate::format::chunk::Encoder;
use crate::format::pack::{PackKind, PackWriter};
use crate::store::{Body, Effect, Fault, FaultPlan, MemoryStore, Operation, Record, Recording};

/// A pack of incompressible chunks in a store that counts and fails on request.
struct Fixture {
    fetcher: Fetcher,
    chunks: Vec<ChunkRef>,
    plain: Vec<Vec<u8>>,
    recording: Arc<Recording>,
    faults: Arc<FaultPlan>,
}

fn fixture(count: usize, options: FetchOptions) -> Fixture {
    let fault = Fault::new(MemoryStore::new());
    let faults = fault.plan();
    let record = Record::new(fault);
    let recording = record.recording();
    let repository = Repository::new(Arc::new(record), "main").unwrap();
    let id = PackId([7; 16]);
    let mut pack = PackWriter::new(PackKind::Data, repository.keys.seal_kind(), id, 0);
    let (mut encoder, mut chunks, mut plain) = (Encoder::new(3).unwrap(), Vec::new(), Vec::new());
    for number in 0..count {
        let bytes = noise(number as u64 + 1, SLOT);
        let mut stored = Vec::new();
        let id = repository.keys.digest(&bytes).id;
        encoder.encode(&repository.keys, &id, &bytes, &mut stored).unwrap();
        chunks.push(pack.add(id, SLOT, &stored));
        plain.push(bytes);
    }
    repository.store.put(&layout::pack("main", id), Body::Bytes(pack.finish().into())).unwrap();
    recording.reset();
    Fixture { fetcher: Fetcher::new(repository, options), chunks, plain, recording, faults }
}

fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    (0..len).map(|_| next()).collect()
}

fn in_memory(bytes: usize) -> FetchOptions {
    FetchOptions { memory_bytes: bytes, disk: None }
}

fn read_all(fixture: &Fixture) -> Result<Vec<(usize, Plain)>> {
    let mut found = Vec::new();
    fixture.fetcher.chunks(&fixture.chunks, |number, plain| found.push((number, plain)))?;
    found.sort_by_key(|(number, _)| *number);
    Ok(found)
}

#[test]
fn neighbours_come_in_one_request_and_then_from_memory() {
    let fixture = fixture(16, in_memory(64 << 20));
    for _ in 0..2 {
        let found = read_all(&fixture).unwrap();
        assert!(found.iter().all(|(number, plain)| **plain == fixture.plain[*number]));
        assert_eq!(found.len(), 16);
        assert_eq!(fixture.recording.gets().calls, 1);
    }
}

#[test]
fn requests_are_bounded_and_gaps_split_them() {
    let fixture = fixture(80, in_memory(64 << 20));
    let far = [fixture.chunks[0], fixture.chunks[9]];
    fixture.fetcher.chunks(&far, |_, _| {}).unwrap();
    assert_eq!(fixture.recording.gets().calls, 2, "nine chunks lie between them");
    read_all(&fixture).unwrap();
    let longest = fixture.fetcher.counters.fetched_bytes.load(Ordering::Relaxed);
    assert!(fixture.recording.gets().calls >= 2 + longest / (REQUEST_BYTES + SLOT as u64));
}

#[test]
fn memory_stays_inside_its_bound() {
    let fixture = fixture(40, in_memory(8 * SLOT));
    read_all(&fixture).unwrap();
    let memory = fixture.fetcher.memory.lock();
    assert!(memory.bytes <= 8 * SLOT, "{} bytes", memory.bytes);
    assert_eq!(memory.bytes, memory.chunks.iter().map(|(_, plain)| plain.len()).sum::<usize>());
}

#[test]
fn many_readers_of_one_chunk_cost_one_request() {
    let fixture = fixture(1, in_memory(64 << 20));
    fixture.faults.add(|call| call.operation == Operation::GetRange, Effect::Delay(Duration::from_millis(50)));
    let barrier = Barrier::new(8);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                barrier.wait();
                assert_eq!(*fixture.fetcher.chunk(&fixture.chunks[0]).unwrap(), fixture.plain[0]);
            });
        }
    });
    assert_eq!(fixture.recording.gets().calls, 1);
}

#[test]
fn a_failed_fetch_is_not_remembered() {
    let fixture = fixture(1, in_memory(64 << 20));
    fixture.faults.next(1, Effect::Fail(ErrorKind::Transient));
    assert!(fixture.fetcher.chunk(&fixture.chunks[0]).is_err());
    assert_eq!(*fixture.fetcher.chunk(&fixture.chunks[0]).unwrap(), fixture.plain[0]);
    assert!(fixture.fetcher.flights.lock().is_empty());
}

/// The kernel asks again page by page for what it did not get: that does not cost the store's deadline once more.
#[test]
fn after_a_long_wait_the_answer_is_the_same_without_another() {
    let fixture = fixture(2, in_memory(64 << 20));
    let [late, other] = [fixture.chunks[0], fixture.chunks[1]];
    let error = Arc::new(Error::new("too late"));
    fixture.fetcher.stalled.add([late.id], Duration::from_millis(900), &error);
    assert!(fixture.fetcher.stalled.error(&late.id).is_none());
    fixture.fetcher.stalled.add([late.id], Duration::from_secs(180), &error);
    assert_eq!(fixture.fetcher.chunk(&late).unwrap_err().to_string(), "too late");
    assert_eq!(fixture.recording.gets().calls, 0);
    assert_eq!(*fixture.fetcher.chunk(&other).unwrap(), fixture.plain[1]);
}

/// One request of the kernel has one deadline, of however many places its bytes come.
#[test]
fn a_store_that_cannot_be_reached_is_not_asked_for_the_rest() {
    let fixture = fixture(40, in_memory(64 << 20));
    fixture.faults.add(|call| call.operation == Operation::GetRange, Effect::Fail(ErrorKind::Transient));
    assert!(read_all(&fixture).unwrap_err().is_unreachable());
    assert_eq!(fixture.recording.gets().calls, 1);
}

#[test]
fn nobody_waits_for_a_thread_that_panics() {
    let fixture = fixture(3, in_memory(64 << 20));
    let fetch = || fixture.fetcher.chunks(&fixture.chunks, |_, _| panic!("a reader died"));
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(fetch)).unwrap_err();
    assert!(fixture.fetcher.flights.lock().is_empty());
    for (chunk, plain) in fixture.chunks.iter().zip(&fixture.plain) {
        assert_eq!(*fixture.fetcher.chunk(chunk).unwrap(), *plain);
    }
}

#[test]
fn one_damaged_chunk_harms_only_itself() {
    let fixture = fixture(8, in_memory(64 << 20));
    let within = u64::from(fixture.chunks[3].offset - fixture.chunks[0].offset) + 1000;
    // one bad answer, or two different ones, are no damage
    let once = self::fixture(8, in_memory(64 << 20));
    once.faults.nth(1, Effect::Flip(within));
    once.faults.nth(2, Effect::Flip(within + 1));
    once.fetcher.chunks(&once.chunks, |number, plain| assert_eq!(*plain, once.plain[number])).unwrap();
    assert_eq!(once.recording.gets().calls, 3);

    fixture.faults.from_nth(1, Effect::Flip(within));
    let mut found = Vec::new();
    let result = fixture.fetcher.chunks(&fixture.chunks, |number, _| found.push(number));
    assert!(format!("{:?}", result.unwrap_err()).contains("chunk"));
    assert_eq!(found, [0, 1, 2, 4, 5, 6, 7]);
}

#[test]
fn a_missing_pack_is_damage_not_absence() {
    let fixture = fixture(1, in_memory(64 << 20));
    let gone = ChunkRef { pack: PackId([9; 16]), ..fixture.chunks[0] };
    let error = fixture.fetcher.chunk(&gone).unwrap_err();
    assert!(!error.is_not_found(), "{error:?}");
    assert!(format!("{error:?}").contains("the object is missing"), "{error:?}");
}

#[test]
fn the_disk_cache_serves_a_second_process_without_a_request() {
    let directory = tempfile::tempdir().unwrap();
    let with_disk = || {
        let disk = Some(DiskCache::open(directory.path(), 64 << 20).unwrap());
        FetchOptions { memory_bytes: 0, disk }
    };
    read_all(&fixture(4, with_disk())).unwrap();
    let second = fixture(4, with_disk());
    let mut page = vec![0; 8192];
    assert!(second.fetcher.read_cached(&second.chunks[2], 3 * 8192, &mut page));
    assert_eq!(page, second.plain[2][3 * 8192..4 * 8192]);
    assert_eq!(second.recording.total().calls, 0);
}

/// Whoever waits for another thread's fetch waits no longer than its own deadline.
#[test]
fn a_late_fetch_of_another_is_not_waited_for() {
    let fixture = fixture(1, in_memory(1 << 20));
    fixture.faults.from_nth(1, Effect::Delay(Duration::from_secs(3)));
    std::thread::scope(|scope| {
        let other = scope.spawn(|| fixture.fetcher.chunk(&fixture.chunks[0]).map(drop));
        std::thread::sleep(Duration::from_millis(300));
        let start = Instant::now();
        let error =
            deadline::within(Duration::from_millis(200), || fixture.fetcher.chunk(&fixture.chunks[0]).map(drop));
        assert!(error.unwrap_err().is_unreachable());
        assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
        other.join().unwrap().unwrap();
    });
}
