#![allow(clippy::unwrap_used)]

use std::time::Instant;

use super::*;
use crate::format::SLOT;
use crate::format::chunk::PackId;

fn chunk(keys: &Keys, plain: &[u8]) -> ChunkRef {
    let id = keys.digest(plain).id;
    ChunkRef { pack: PackId([1; 16]), offset: 32, stored_len: 10, plain_len: plain.len() as u32, id }
}

fn decoded(keys: &Keys, plain: &[u8]) -> Decoded {
    Decoded { plain: plain.to_vec(), grains: keys.digest(plain).grains }
}

fn plain(number: u8, len: usize) -> Vec<u8> {
    (0..len).map(|at| (at / GRAIN) as u8 ^ number).collect()
}

fn read(cache: &DiskCache, keys: &Keys, chunk: &ChunkRef, offset: usize, len: usize) -> Option<Vec<u8>> {
    let mut buf = vec![0; len];
    cache.read(keys, chunk, offset, &mut buf).then_some(buf)
}

#[test]
fn many_make_a_directory_a_cache_at_once() {
    let place = tempfile::tempdir().unwrap();
    for round in 0..20 {
        let root = place.path().join(round.to_string());
        std::thread::scope(|scope| {
            let all: Vec<_> = (0..8).map(|_| scope.spawn(|| prepare(&root))).collect();
            all.into_iter().for_each(|one| one.join().unwrap().unwrap());
        });
        assert_eq!(fs::read_to_string(root.join(TAG)).unwrap(), TAG_TEXT);
    }
}

#[test]
fn any_range_comes_back_also_after_opening_again() {
    let (directory, keys) = (tempfile::tempdir().unwrap(), Keys::new(b""));
    let bytes = plain(3, SLOT - 777);
    let chunk = chunk(&keys, &bytes);
    DiskCache::open(directory.path(), 1 << 30).unwrap().write(&chunk, &decoded(&keys, &bytes));
    let cache = DiskCache::open(directory.path(), 1 << 30).unwrap();
    for (offset, len) in [(0, bytes.len()), (0, 1), (GRAIN - 1, 2), (5 * GRAIN, GRAIN), (bytes.len() - 5, 5)] {
        assert_eq!(read(&cache, &keys, &chunk, offset, len).unwrap(), bytes[offset..offset + len]);
    }
}

#[test]
fn a_damaged_file_is_a_miss_and_goes_away() {
    let (directory, keys) = (tempfile::tempdir().unwrap(), Keys::new(b""));
    let bytes = plain(5, 3 * GRAIN);
    let chunk = chunk(&keys, &bytes);
    for damage in [0, GRAIN + 1, bytes.len(), bytes.len() + 30, bytes.len() + tail_len(bytes.len()) - 1] {
        DiskCache::open(directory.path(), 1 << 30).unwrap().write(&chunk, &decoded(&keys, &bytes));
        let cache = DiskCache::open(directory.path(), 1 << 30).unwrap();
        let path = cache.path(&chunk.id);
        let mut stored = fs::read(&path).unwrap();
        stored[damage] ^= 1;
        fs::write(&path, stored).unwrap();
        assert_eq!(read(&cache, &keys, &chunk, 0, bytes.len()), None, "byte {damage}");
    }
}

#[test]
fn another_chunk_under_this_name_is_a_miss() {
    let (directory, keys) = (tempfile::tempdir().unwrap(), Keys::new(b""));
    let (one, other) = (plain(1, SLOT), plain(2, SLOT));
    let (first, second) = (chunk(&keys, &one), chunk(&keys, &other));
    let cache = DiskCache::open(directory.path(), 1 << 30).unwrap();
    cache.write(&first, &decoded(&keys, &one));
    fs::create_dir_all(cache.path(&second.id).parent().unwrap()).unwrap();
    fs::rename(cache.path(&first.id), cache.path(&second.id)).unwrap();
    assert_eq!(read(&cache, &keys, &second, 0, SLOT), None);
}

#[test]
fn the_bound_holds() {
    let (directory, keys) = (tempfile::tempdir().unwrap(), Keys::new(b""));
    let limit = 20 * SLOT as u64;
    let cache = DiskCache::open(directory.path(), limit).unwrap();
    for number in 0..100 {
        let bytes = plain(number, SLOT);
        cache.write(&chunk(&keys, &bytes), &decoded(&keys, &bytes));
    }
    let started = Instant::now();
    let used = || cache.files().unwrap().iter().map(|file| file.1).sum::<u64>();
    while used() > limit {
        assert!(started.elapsed() < Duration::from_secs(20), "{} bytes of {limit}", used());
        cache.start_sweep();
        std::thread::yield_now();
    }
    assert!(used() > 0);
}
