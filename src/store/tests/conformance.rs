//! What every store promises.

use std::collections::BTreeSet;
use std::io::Write;

use super::*;

/// Checks an empty store; leaves it as it was, but for objects under `many/`.
pub(super) fn run(store: &dyn Store) {
    get_and_put(store);
    ranges(store);
    missing(store);
    order_of_keys(store);
    names(store);
    pages(store);
    delete(store);
    files(store);
    concurrent_puts(store);
    bad_keys(store);
}

fn keys(store: &dyn Store, prefix: &str) -> Vec<String> {
    let page = store.list(prefix, None).unwrap();
    assert_eq!(page.next, None);
    page.objects.into_iter().map(|object| object.key).collect()
}

fn get_and_put(store: &dyn Store) {
    put(store, "a/key", "first");
    assert_eq!(store.get("a/key").unwrap(), "first");
    assert_eq!(store.size("a/key").unwrap(), Some(5));
    put(store, "a/key", "the second, longer");
    assert_eq!(store.get("a/key").unwrap(), "the second, longer");
    put(store, "a/key", "3");
    assert_eq!(store.get("a/key").unwrap(), "3");
    put(store, "a/empty", "");
    assert_eq!(store.get("a/empty").unwrap(), "");
    assert_eq!(store.size("a/empty").unwrap(), Some(0));

    let odd = "a=b+c:d_e.f-g/..h/i../0";
    put(store, odd, "odd");
    assert_eq!(store.get(odd).unwrap(), "odd");
    assert_eq!(store.get_range(odd, 1, 2).unwrap(), "dd");
    assert_eq!(keys(store, "a=b+c:d"), [odd]);
    store.delete(&[odd.into(), "a/key".into(), "a/empty".into()]).unwrap();
    assert_eq!(keys(store, ""), [""; 0]);
}

fn ranges(store: &dyn Store) {
    let bytes: Bytes = (0..100_000u32).flat_map(|n| n.to_le_bytes()).collect::<Vec<u8>>().into();
    let len = bytes.len() as u64;
    put(store, "range", bytes.clone());
    put(store, "range-empty", "");
    for (offset, count) in [(0, 1), (0, len), (1, len - 1), (len - 1, 1), (123_457, 65_537), (0, 0), (len, 0), (5, 0)] {
        let got = store.get_range("range", offset, count).unwrap();
        assert_eq!(got, bytes.slice(offset as usize..(offset + count) as usize), "{offset}+{count}");
    }
    let past =
        [(0, len + 1), (len - 1, 2), (len, 1), (len + 1, 0), (len + 5, 10), (1 << 40, 1), (u64::MAX, 1), (1, u64::MAX)];
    for (offset, count) in past {
        assert_eq!(kind(store.get_range("range", offset, count)), ErrorKind::Truncated, "{offset}+{count}");
    }
    assert_eq!(store.get_range("range-empty", 0, 0).unwrap(), "");
    assert_eq!(kind(store.get_range("range-empty", 0, 1)), ErrorKind::Truncated);
    store.delete(&["range".into(), "range-empty".into()]).unwrap();
}

fn missing(store: &dyn Store) {
    put(store, "there/is", "one");
    for key in ["no", "there/no", "there/is/not", "there/i"] {
        assert_eq!(kind(store.get(key)), ErrorKind::NotFound, "{key}");
        assert_eq!(kind(store.get_range(key, 0, 1)), ErrorKind::NotFound, "{key}");
        assert_eq!(kind(store.get_range(key, 0, 0)), ErrorKind::NotFound, "{key}");
        assert_eq!(store.size(key).unwrap(), None, "{key}");
    }
    let error = store.get("there/no").unwrap_err();
    assert_eq!(error.to_string(), format!("cannot read {}/there/no", store.url()));
    assert_eq!(store.list("no/", None).unwrap(), Page::default());
    assert_eq!(store.list("there/is/", None).unwrap(), Page::default());
    assert_eq!(store.names("no/").unwrap(), [""; 0]);
    store.delete(&["there/is".into()]).unwrap();
}

fn order_of_keys(store: &dyn Store) {
    // in byte order: '+' '-' '.' '/' '0' ':' '=' 'A' '_' 'a'
    let sorted = [
        "t/a+b",
        "t/a-b/x",
        "t/a.b",
        "t/a.b-c/x",
        "t/a/x",
        "t/a/x-y",
        "t/a0",
        "t/a:b/x",
        "t/a=",
        "t/aA",
        "t/a_",
        "t/aa/y/z",
        "t/b",
    ];
    for key in sorted.iter().rev() {
        put(store, key, *key);
    }
    assert_eq!(keys(store, ""), sorted);
    assert_eq!(keys(store, "t/"), sorted);
    assert_eq!(keys(store, "t/a/"), ["t/a/x", "t/a/x-y"]);
    assert_eq!(keys(store, "t/a/x"), ["t/a/x", "t/a/x-y"]);
    assert_eq!(keys(store, "t/a."), ["t/a.b", "t/a.b-c/x"]);
    assert_eq!(keys(store, "t/a-b/x"), ["t/a-b/x"]);
    assert_eq!(keys(store, "u"), [""; 0]);
    for (index, key) in sorted.iter().enumerate() {
        let page = store.list("t/", Some(key)).unwrap();
        let after: Vec<&str> = page.objects.iter().map(|object| object.key.as_str()).collect();
        assert_eq!(after, sorted[index + 1..], "after {key}");
    }
    let between: Vec<Listed> = store.list("t/a", Some("t/a/")).unwrap().objects;
    assert_eq!(between[0].key, "t/a/x");
    assert_eq!(between[0].size, 5);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs() as i64;
    assert!((now - between[0].modified).abs() < 300, "{} {now}", between[0].modified);
    assert_eq!(store.list("t/a", Some("s")).unwrap().objects.len(), sorted.len() - 1);
    assert_eq!(store.list("t/a", Some("u")).unwrap(), Page::default());

    assert_eq!(store.names("").unwrap(), ["t"]);
    let below = ["a", "a+b", "a-b", "a.b", "a.b-c", "a0", "a:b", "a=", "aA", "a_", "aa", "b"];
    assert_eq!(store.names("t/").unwrap(), below);
    store.delete(&sorted.map(str::to_owned)).unwrap();
}

fn names(store: &dyn Store) {
    for key in ["n/one/x/y", "n/one/z", "n/two", "n/three/x"] {
        put(store, key, "x");
    }
    assert_eq!(store.names("n/").unwrap(), ["one", "three", "two"]);
    assert_eq!(store.names("n/one/").unwrap(), ["x", "z"]);
    store.delete(&["n/one/x/y".into(), "n/three/x".into()]).unwrap();
    assert_eq!(store.names("n/").unwrap(), ["one", "two"], "a directory without objects is none");
    assert_eq!(store.names("n/one/").unwrap(), ["z"]);
    assert_eq!(kind(store.names("n/one")), ErrorKind::Other);
    store.delete(&["n/one/z".into(), "n/two".into()]).unwrap();
    assert_eq!(store.names("").unwrap(), [""; 0]);
}

/// More than two pages, in two directories and beside them.
fn pages(store: &dyn Store) {
    let mut all: Vec<String> = (0..2100)
        .map(|n| match n % 3 {
            0 => format!("many/a-{n}/x"),
            1 => format!("many/a/{n:05}"),
            _ => format!("many/{n}.a"),
        })
        .collect();
    all.sort_unstable();
    std::thread::scope(|scope| {
        for part in all.chunks(300) {
            scope.spawn(move || part.iter().for_each(|key| put(store, key, "x")));
        }
    });
    let mut listed = Vec::new();
    let mut after = None;
    loop {
        let page = store.list("many/", after.as_deref()).unwrap();
        assert!(page.objects.len() <= PAGE_OBJECTS_MAX);
        listed.extend(page.objects.into_iter().map(|object| object.key));
        after = page.next;
        if after.is_none() {
            break;
        }
    }
    assert_eq!(listed, all);
    let names: BTreeSet<&str> = all.iter().map(|key| key.split('/').nth(1).unwrap()).collect();
    assert_eq!(store.names("many/").unwrap(), names.into_iter().collect::<Vec<_>>());
    assert_eq!(
        keys(store, "many/a/00"),
        all.iter().filter(|k| k.starts_with("many/a/00")).cloned().collect::<Vec<_>>()
    );
    store.delete(&all).unwrap();
    assert_eq!(keys(store, "many/"), [""; 0]);
}

fn delete(store: &dyn Store) {
    put(store, "d/one", "1");
    put(store, "d/two", "2");
    store.delete(&[]).unwrap();
    store.delete(&["d/none".into()]).unwrap();
    store.delete(&["d/none".into(), "e/none".into(), "d/one".into(), "d/one/none".into()]).unwrap();
    assert_eq!(keys(store, "d/"), ["d/two"]);
    store.delete(&["d/two".into()]).unwrap();
    assert_eq!(store.size("d/two").unwrap(), None);
}

/// The largest is written in parts, the last of them short.
fn files(store: &dyn Store) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("source");
    for len in [0, 1, 100_000, (16 << 20) + 1, (64 << 20) + 12_345] {
        let block: Vec<u8> =
            (0..len.min(1 << 20)).map(|n| (n as u32).wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
        let bytes: Vec<u8> = block.iter().copied().cycle().take(len).collect();
        std::fs::File::create(&path).unwrap().write_all(&bytes).unwrap();
        store.put("f/file", Body::File(path.clone())).unwrap();
        assert_eq!(store.size("f/file").unwrap(), Some(len as u64));
        assert!(store.get("f/file").unwrap() == bytes, "a file of {len} bytes");
    }
    store.put("f/file", Body::File(directory.path().join("missing"))).unwrap_err();
    assert_eq!(store.size("f/file").unwrap(), Some((64 << 20) + 12_345), "a failed put changes nothing");
    store.delete(&["f/file".into()]).unwrap();
}

fn concurrent_puts(store: &dyn Store) {
    put(store, "c/same", vec![0; 200_000]);
    std::thread::scope(|scope| {
        for writer in 1..=4u8 {
            scope.spawn(move || (0..5).for_each(|_| put(store, "c/same", vec![writer; 200_000 + usize::from(writer)])));
        }
        scope.spawn(|| {
            for _ in 0..20 {
                let bytes = store.get("c/same").unwrap();
                assert_eq!(bytes.len(), 200_000 + usize::from(bytes[0]));
                assert!(bytes.iter().all(|byte| *byte == bytes[0]), "a mixture of two writers");
            }
        });
    });
    store.delete(&["c/same".into()]).unwrap();
}

fn bad_keys(store: &dyn Store) {
    for key in ["", "/a", "a/", "a//b", "..", "a/../b", "./a", "a b", "a\0", "ü", "a\\b", ".tmp/a"] {
        assert_eq!(kind(store.get(key)), ErrorKind::Other, "{key:?}");
        assert_eq!(kind(store.get_range(key, 0, 1)), ErrorKind::Other, "{key:?}");
        assert_eq!(kind(store.put(key, Body::Bytes(Bytes::new()))), ErrorKind::Other, "{key:?}");
        assert_eq!(kind(store.size(key)), ErrorKind::Other, "{key:?}");
        assert_eq!(kind(store.delete(&[key.to_owned()])), ErrorKind::Other, "{key:?}");
    }
    for prefix in ["/", "../", "a//", "a b"] {
        assert_eq!(kind(store.list(prefix, None)), ErrorKind::Other, "{prefix:?}");
        assert_eq!(kind(store.names(prefix)), ErrorKind::Other, "{prefix:?}");
    }
}
