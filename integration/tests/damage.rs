//! A repository broken in every way: every byte that comes out is right, or there is an error, and nothing panics.
#![allow(clippy::unwrap_used)]

mod library;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use bytes::Bytes;
use library::{Objects, Shown, changed_manifest, memory, objects, read_view, read_whole, repository, view};
use pgcairn::format::chunk::ChunkRef;
use pgcairn::format::manifest::{Entry, Node};
use pgcairn::format::pack::{Pack, PackKind};
use pgcairn::read::wal::{GetError, get};
use pgcairn_integration::{Cluster, Data, MountGuard, Place, Stanza, files};

/// A small backup, its objects, and what they should read as.
struct Source {
    stanza: Stanza,
    label: String,
    objects: Objects,
    shown: Shown,
}

/// Nobody changes it; the watchdogs remove it when the process ends.
static SOURCE: LazyLock<Source> = LazyLock::new(|| {
    let stanza = Stanza::in_directory();
    let cluster = stanza.archiving(Cluster::builder().wal_segsize_mb(1)).start();
    Data::tiny().random_mb(2).load(&cluster);
    stanza.create(&cluster);
    let label = stanza.backup(&cluster);
    let objects = objects(Path::new(stanza.repo()));
    let shown = read_whole(&view(&repository(memory(&objects)), &label).unwrap());
    Source { stanza, label, objects, shown }
});

/// Which kind of object a key names.
fn kind(key: &str, bytes: &[u8]) -> String {
    match key.split('/').next().unwrap() {
        "chunk" => format!("{:?}", Pack::parse(key, bytes).unwrap().header.kind),
        "latest" => "latest".to_owned(),
        _ if key.contains("/15-1/") => "WAL".to_owned(),
        _ => key.rsplit('/').next().unwrap().to_owned(),
    }
}

fn by_kind() -> BTreeMap<String, Vec<String>> {
    let mut kinds: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (key, bytes) in &SOURCE.objects {
        kinds.entry(kind(key, bytes)).or_default().push(key.clone());
    }
    kinds
}

/// What a reader met.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Met {
    right: usize,
    errors: usize,
}

/// Reads everything through the library. Whatever is not right must be an error.
fn read_all(what: &str, objects: &Objects) -> Met {
    let read = catch_unwind(AssertUnwindSafe(|| {
        let repository = repository(memory(objects));
        _ = repository.backup_info();
        _ = repository.resolve("latest");
        let mut met = Met::default();
        let Ok(view) = view(&repository, &SOURCE.label) else { return Met { right: 0, errors: 1 } };
        let shown = read_view(&view);
        assert!(shown.keys().eq(SOURCE.shown.keys()), "{what}: other files are there");
        for (path, bytes) in shown {
            match bytes {
                Ok(bytes) => {
                    assert!(bytes == SOURCE.shown[&path], "{what}: wrong bytes in {}", path.escape_ascii());
                    met.right += 1;
                }
                Err(_) => met.errors += 1,
            }
        }
        met
    }));
    read.unwrap_or_else(|_| panic!("{what}: reading panicked"))
}

/// Positions of an object worth spoiling: every field at both ends, some in the middle.
fn positions(len: usize) -> Vec<usize> {
    let middle = (1..6).map(|part| len * part / 6 + part);
    let mut all: Vec<usize> = [0, 9, 10, 20, 33].into_iter().chain(middle).collect();
    all.extend([1, 20, 70, 85, 100].iter().filter_map(|back| len.checked_sub(*back)));
    all.retain(|at| *at < len);
    all.sort_unstable();
    all.dedup();
    all
}

#[test]
fn a_flipped_byte_is_right_or_an_error() {
    assert_eq!(read_all("nothing", &SOURCE.objects), Met { right: SOURCE.shown.len(), errors: 0 });
    for (kind, keys) in by_kind() {
        let key = &keys[keys.len() / 2];
        let mut found = 0;
        for at in positions(SOURCE.objects[key].len()) {
            let mut objects = SOURCE.objects.clone();
            let mut bytes = objects[key].to_vec();
            bytes[at] ^= 1 << (at % 8);
            objects.insert(key.clone(), bytes.into());
            found += read_all(&format!("{kind}: byte {at} of {key}"), &objects).errors;
        }
        // what reading passes by, or has a copy of
        let unread =
            ["Change", "WAL", "latest", "backup.info", "backup.info.copy", "archive.info", "archive.info.copy"];
        assert!(found > 0 || unread.contains(&kind.as_str()), "no flipped byte of {kind} was noticed");
    }
}

#[test]
fn a_cut_emptied_or_deleted_object_is_right_or_an_error() {
    for (kind, keys) in by_kind() {
        for key in [&keys[0], &keys[keys.len() - 1]] {
            let len = SOURCE.objects[key].len();
            for to in [0, 31, len / 2, len - 1] {
                let mut objects = SOURCE.objects.clone();
                objects.insert(key.clone(), SOURCE.objects[key].slice(..to.min(len - 1)));
                read_all(&format!("{kind}: {key} cut to {to}"), &objects);
            }
            let mut objects = SOURCE.objects.clone();
            objects.remove(key);
            let met = read_all(&format!("{kind}: {key} deleted"), &objects);
            assert!(met.errors > 0 || !["Data", "Small", "Map", "backup.manifest"].contains(&kind.as_str()), "{key}");
        }
    }
}

#[test]
fn swapped_objects_are_right_or_an_error() {
    let kinds = by_kind();
    let all: Vec<&String> = SOURCE.objects.keys().collect();
    let neighbours = all.windows(2).map(|pair| (pair[0], pair[1]));
    let same_kind = kinds.values().flat_map(|keys| keys.windows(2).map(|pair| (&pair[0], &pair[1])));
    for (a, b) in neighbours.chain(same_kind) {
        let mut objects = SOURCE.objects.clone();
        objects.insert(a.clone(), SOURCE.objects[b].clone());
        objects.insert(b.clone(), SOURCE.objects[a].clone());
        let what = format!("{a} and {b} swapped");
        read_all(&what, &objects);
        for key in [a, b].into_iter().filter(|key| kinds["WAL"].contains(key)) {
            archive_tells_the_truth(&what, key, &objects);
        }
    }
}

/// An archived segment comes back as it was, or not at all.
fn archive_tells_the_truth(what: &str, key: &str, objects: &Objects) {
    let name = key.rsplit('/').next().unwrap().split('-').next().unwrap();
    let target = SOURCE.stanza.place().join(&format!("{name}-{:?}", std::thread::current().id()));
    match get(&repository(memory(objects)), name, &target) {
        Ok(()) => assert!(fs::read(&target).unwrap() == plain(key), "{what}: {name} is wrong"),
        Err(GetError::Failed(_)) => assert!(!target.exists(), "{what}"),
        Err(GetError::NotThere) => panic!("{what}: {name} counts as never archived"),
    }
    _ = fs::remove_file(&target);
}

/// What an archived object should read as.
fn plain(key: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let read = repository(memory(&SOURCE.objects)).read_pack(key, PackKind::Wal, |plain| {
        bytes.extend_from_slice(plain);
        Ok(())
    });
    read.unwrap();
    bytes
}

#[test]
fn a_damaged_segment_is_never_delivered() {
    let key = &by_kind()["WAL"][0];
    let len = SOURCE.objects[key].len();
    for at in positions(len) {
        let mut objects = SOURCE.objects.clone();
        let mut bytes = objects[key].to_vec();
        bytes[at] ^= 0x80;
        objects.insert(key.clone(), bytes.into());
        archive_tells_the_truth(&format!("byte {at} of {key}"), key, &objects);
        objects.insert(key.clone(), SOURCE.objects[key].slice(..at));
        archive_tells_the_truth(&format!("{key} cut to {at}"), key, &objects);
    }
}

/// A directory repository with these objects, for the command line.
fn written(objects: &Objects) -> Stanza {
    let stanza = Stanza::in_directory();
    for (key, bytes) in objects {
        let path = Path::new(stanza.repo()).join(key);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
    stanza
}

#[test]
fn info_files_have_copies() {
    let Source { label, objects, .. } = &*SOURCE;
    let names = ["archive/main/archive.info", "backup/main/backup.info"];
    let stanza = written(objects);
    let path = |key: &str| Path::new(stanza.repo()).join(key);
    let spoilt = Bytes::from_static(b"pgcairn backup.info 1\n{}\nblake3 0000\n");
    for name in names {
        for key in [name.to_owned(), format!("{name}.copy")] {
            fs::write(path(&key), &spoilt).unwrap();
            assert!(stanza.run(["info"]).ok().contains(label), "{key} damaged");
            fs::remove_file(path(&key)).unwrap();
            assert!(stanza.run(["info"]).ok().contains(label), "{key} gone");
            fs::write(path(&key), &objects[&key]).unwrap();
        }
    }
    // the catalog is only a summary of the manifests
    for bytes in [None, Some(&spoilt)] {
        for key in [names[1].to_owned(), format!("{}.copy", names[1])] {
            match bytes {
                Some(bytes) => fs::write(path(&key), bytes).unwrap(),
                None => fs::remove_file(path(&key)).unwrap(),
            }
        }
        assert!(stanza.run(["info"]).ok().contains(label), "backup.info and its copy: {bytes:?}");
    }
    // what the stanza is, nothing else says
    let copy = format!("{}.copy", names[0]);
    fs::write(path(names[0]), &spoilt).unwrap();
    fs::write(path(&copy), &spoilt).unwrap();
    let refused = stanza.run(["info"]).fails(1, "error: the repository is damaged").fails(1, "archive.info");
    assert!(refused.stderr.contains("hint:"), "{}", refused.stderr);
    fs::remove_file(path(names[0])).unwrap();
    fs::remove_file(path(&copy)).unwrap();
    stanza.run(["info"]).fails(1, "error: stanza main does not exist").fails(1, "hint:");
}

/// A chunk in a data pack that does not compress, so that it belongs to one file and to no other.
fn large_chunk() -> (String, ChunkRef) {
    let packs = SOURCE.objects.iter().filter(|(key, _)| key.starts_with("chunk/"));
    let packs = packs.map(|(key, bytes)| (key, Pack::parse(key, bytes).unwrap()));
    let data = packs.filter(|(_, pack)| pack.header.kind == PackKind::Data);
    let found = data.flat_map(|(key, pack)| pack.chunks.into_iter().map(move |chunk| (key.clone(), chunk)));
    found.max_by_key(|(_, chunk)| chunk.stored_len).unwrap()
}

#[test]
fn a_flipped_byte_harms_one_chunk_of_a_mounted_file() {
    const PAGE: usize = 8192;
    let Source { label, objects, shown, .. } = &*SOURCE;
    let (key, chunk) = large_chunk();
    let stanza = written(objects);
    let mut bytes = objects[&key].to_vec();
    bytes[(chunk.offset + chunk.stored_len / 2) as usize] ^= 4;
    fs::write(Path::new(stanza.repo()).join(&key), bytes).unwrap();
    let mount = stanza.mount("mount", &["--backup", label]);
    let mut harmed: Vec<(PathBuf, usize)> = Vec::new();
    let pages = (chunk.plain_len as usize).div_ceil(PAGE);
    for path in files::files(mount.path()) {
        let expected = &shown[path.to_str().unwrap().as_bytes()];
        let file = File::open(mount.path().join(&path)).unwrap();
        for (page, right) in expected.chunks(PAGE).enumerate() {
            let mut read = vec![0; right.len()];
            match file.read_exact_at(&mut read, (page * PAGE) as u64) {
                Ok(()) => assert!(read == right, "{}: page {page} is wrong", path.display()),
                Err(error) => {
                    assert_eq!(error.raw_os_error(), Some(nix::libc::EIO), "{}: {error}", path.display());
                    harmed.push((path.clone(), page));
                }
            }
        }
    }
    let (path, first) = harmed[0].clone();
    let expected: Vec<_> = (first..first + pages).map(|page| (path.clone(), page)).collect();
    assert_eq!(harmed, expected, "not exactly the pages of one chunk are harmed");

    // a copy of it is not made
    let copy = stanza.place().join("copy");
    stanza.run(["restore", "--type=none", copy.to_str().unwrap()]).fails(1, "is damaged").fails(1, "hint:");
    assert!(!copy.join("global/pg_control").exists(), "half a copy can be started");
}

/// Manifests that are sound in every checksum, and hostile.
#[test]
fn a_path_that_leads_out_is_refused() {
    let Source { label, objects, .. } = &*SOURCE;
    let source = repository(memory(objects));
    let file = |path: &[u8], entries: &[Entry]| {
        let version = entries.iter().find(|entry| entry.path == b"PG_VERSION").unwrap();
        Entry { path: path.to_vec(), ..version.clone() }
    };
    let at_end = |entry: Entry, entries: &mut Vec<Entry>| entries.push(entry);
    let sorted = |entry: Entry, entries: &mut Vec<Entry>| {
        entries.push(entry);
        entries.sort_by(|a, b| pgcairn::format::manifest::path_cmp(&a.path, &b.path));
    };
    let link = |path: &[u8], target: &Path| Entry {
        path: path.to_vec(),
        mode: 0o777,
        mtime: 0,
        identity: None,
        node: Node::Symlink(target.to_str().unwrap().as_bytes().to_vec()),
    };
    let outside = Place::new();
    let victim = outside.directory("victim");
    let absolute = format!("{}/planted", victim.display());
    let up = format!("{}{}", "../".repeat(12), &absolute[1..]);
    for path in ["../x", &absolute, &up, "base/../../x", "./x", "base//x"] {
        refused(
            path,
            objects,
            &changed_manifest(&source, label, |_, entries| at_end(file(path.as_bytes(), entries), entries)),
        );
    }
    // through a link: the files of a directory that is really somewhere else
    let through = changed_manifest(&source, label, |_, entries| {
        sorted(link(b"zz", &victim), entries);
        sorted(file(b"zz/planted", entries), entries);
    });
    refused("through a link", objects, &through);
    // where a tablespace's link would be, of a tablespace that the backup does not know
    let unknown = changed_manifest(&source, label, |_, entries| sorted(link(b"pg_tblspc/77", &victim), entries));
    refused("an unknown tablespace's link", objects, &unknown);
    let alone = changed_manifest(&source, label, |_, entries| sorted(link(b"base/77", &victim), entries));
    let stanza = written(objects);
    fs::write(manifest_path(&stanza), alone).unwrap();
    let copy = stanza.place().join("copy");
    stanza.run(["restore", "--type=none", copy.to_str().unwrap()]).fails(1, "error:");
    assert!(!copy.join("global/pg_control").exists());
    assert_eq!(files::files(&victim), Vec::<PathBuf>::new());
}

fn manifest_path(stanza: &Stanza) -> PathBuf {
    Path::new(stanza.repo()).join(format!("backup/main/{}/backup.manifest", SOURCE.label))
}

fn refused(what: &str, objects: &Objects, manifest: &[u8]) {
    let Source { label, .. } = &*SOURCE;
    let stanza = written(objects);
    fs::write(manifest_path(&stanza), manifest).unwrap();
    let mountpoint = stanza.place().directory("mount");
    let _guard = MountGuard::new(&mountpoint);
    let output = stanza.run(["mount", "--backup", label, mountpoint.to_str().unwrap()]);
    assert!(output.code == Some(1) && output.stderr.contains("hint:"), "{what}: {output:?}");
    assert!(!pgcairn_integration::mounts::is_mounted(&mountpoint));
    let copy = stanza.place().join("copy");
    let output = stanza.run(["restore", "--type=none", copy.to_str().unwrap()]);
    assert!(output.code == Some(1) && output.stderr.contains("error:"), "{what}: {output:?}");
    assert!(!copy.exists(), "{what}: something was written");
}

#[test]
fn the_source_was_not_touched() {
    // reading never writes: whatever the tests above did, they did to copies
    assert!(objects(Path::new(SOURCE.stanza.repo())) == SOURCE.objects);
}
