//! Many small files: what is stored of them is fetched once.

use super::*;
use crate::store::Operation;

const FILES: usize = 600;

fn path(number: usize) -> String {
    format!("base/5/{}", 30_000 + number)
}

/// Files of one page, of pages and a half, of several slots; each twice.
fn bytes(number: usize) -> Vec<u8> {
    let len = [GRAIN, GRAIN + 77, 2 * GRAIN, 10][number % 4];
    let len = if number % 100 == 3 { 2 * SLOT + 5 } else { len };
    content(1000 + number as u64 / 2 * 2, len)
}

fn many(source: &Path) {
    for number in 0..FILES {
        fs::write(source.join(path(number)), bytes(number)).unwrap();
    }
}

/// What was fetched of packs since the recording began; nothing of it twice.
#[track_caller]
fn fetched_once(fixture: &Fixture) -> (usize, u64) {
    let mut ranges: Vec<_> = fixture
        .recording
        .calls()
        .into_iter()
        .filter(|call| call.operation == Operation::GetRange && call.key.starts_with("chunk/"))
        .map(|call| (call.key, call.offset, call.len))
        .collect();
    ranges.sort();
    for pair in ranges.windows(2) {
        let [(key, from, len), (next, at, _)] = pair else { continue };
        assert!(key != next || from + len <= *at, "{key} is fetched twice at {at}");
    }
    (ranges.len(), ranges.iter().map(|(_, _, len)| len).sum())
}

#[test]
fn each_stored_range_is_fetched_once() {
    for secret in [&b""[..], b"a secret"] {
        let fixture = Fixture::with(secret, many);
        let packs = fixture.repository.packs().unwrap();
        let stored: u64 = packs.values().sum();
        let most = packs.values().map(|size| size.div_ceil(4 << 20) as usize + 2).sum::<usize>();
        let view = fixture.view();
        fixture.recording.keep_calls();
        fixture.recording.reset();
        restore(&view, &fixture.path("copy"), &fixture.options("copy", false), &Silent).unwrap();
        let (requests, bytes_fetched) = fetched_once(&fixture);
        assert!(requests <= most, "{requests} requests for {} packs", packs.len());
        assert!(bytes_fetched <= stored, "{bytes_fetched} of {stored} bytes");
        for number in 0..FILES {
            let found = fs::read(fixture.path("copy").join(path(number))).unwrap();
            assert!(found == bytes(number), "file {number}");
        }
    }
}

#[test]
fn files_that_differ_are_made_equal_with_as_few_requests() {
    let fixture = Fixture::with(b"", many);
    fixture.restore("fresh", false).unwrap();
    fixture.restore("copy", false).unwrap();
    // half of them differ, some are gone, some are longer
    for number in (0..FILES).step_by(2) {
        flip(&fixture.path("copy").join(path(number)), 3);
    }
    for number in (0..FILES).step_by(7) {
        fs::remove_file(fixture.path("copy").join(path(number))).unwrap();
    }
    for number in (1..FILES).step_by(70).filter(|number| number % 7 != 0) {
        let file = OpenOptions::new().append(true).open(fixture.path("copy").join(path(number))).unwrap();
        file.set_len(5 * SLOT as u64).unwrap();
    }
    let packs = fixture.repository.packs().unwrap();
    let view = fixture.view();
    fixture.recording.keep_calls();
    fixture.recording.reset();
    let restored = restore(&view, &fixture.path("copy"), &fixture.options("copy", true), &Silent).unwrap();
    let requests = fixture.recording.count(Operation::GetRange).calls;
    // what differs and what is gone are fetched one after the other, and what the backup noted before
    let most: u64 = packs.values().map(|size| 3 * size.div_ceil(1 << 20) + 3).sum();
    assert!(requests <= most, "{requests} requests for {} packs", packs.len());
    assert!(restored.equal > 0 && restored.equal < restored.bytes, "{restored:?}");
    fixture.assert_equal("copy", "fresh");
}

/// A chunk that is damaged harms the restore, whichever file of it comes first.
#[test]
fn damage_is_found() {
    let fixture = Fixture::with(b"", many);
    let small = |bytes: &[u8]| bytes[10] == crate::format::pack::PackKind::Small as u8;
    let view = fixture.view();
    let mut spoilt = 0;
    for object in fixture.repository.store.list("chunk/", None).unwrap().objects {
        let mut bytes = fixture.repository.store.get(&object.key).unwrap().to_vec();
        if small(&bytes) {
            let middle = bytes.len() / 3;
            bytes[middle] ^= 1;
            fixture.repository.store.put(&object.key, crate::store::Body::Bytes(bytes.into())).unwrap();
            spoilt += 1;
        }
    }
    assert!(spoilt > 0);
    let error = restore(&view, &fixture.path("copy"), &fixture.options("copy", false), &Silent).unwrap_err();
    assert!(error.is_damage(), "{error:?}");
    assert!(!fixture.path("copy").join("global/pg_control").exists());
}
