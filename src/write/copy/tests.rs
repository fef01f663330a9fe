//! A data directory through the workers into a repository and back through a view: every byte, for every kind of size.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use proptest::prelude::*;

use super::*;
use crate::format::chunk::ChunkId;
use crate::format::manifest::{Entry, File, ManifestReader, Node, Place};
use crate::format::map::{Extent, Leaf, decode_changes, decode_index};
use crate::format::pack::PackKind;
use crate::format::{GRAIN, SLOT};
use crate::postgres::{Layout, Major};
use crate::progress::Silent;
use crate::repo::Repository;
use crate::store::{Body, Effect, ErrorKind, Fault, MemoryStore, Operation, Store};
use crate::write::cut::Lanes;
use crate::write::dedup::Dedup;
use crate::write::packer::Uploads;
use crate::write::scan::scan;

const MANIFEST: &str = "backup/main/test/backup.manifest";

/// Copies `root` as a backup does, without a server.
fn copy_directory(repository: &Repository, root: &Path) -> Result<()> {
    let layout = Layout {
        tablespace_directory: Major::new(15).unwrap().tablespace_directory(),
        relation_segment_pages: 131_072,
    };
    let scan = scan(root, layout)?;
    let uploads = Uploads::start(repository, 2);
    let cutting = Cutting {
        root: root.to_owned(),
        keys: &repository.keys,
        level: 1,
        uploads: &uploads,
        dedup: Dedup::default(),
        lanes: Lanes::default(),
        pages: None,
    };
    let mut assembler = Assembler::new(repository.keys.clone())?;
    let control = copy(&cutting, scan.found, 3, &mut assembler, &Silent)?;
    let mut last = Worker::new(&cutting)?;
    let found = Scanned { kind: ScannedKind::File, ..control };
    let cut = last.small_bytes(&found, fs::read(root.join("global/pg_control")).unwrap())?;
    let none = |_: &[u8]| Err(Error::new("no index here"));
    assembler.fill(Later::Control, vec![Done::Small(vec![(found, Some(cut))])], &none)?;
    assembler.fill(Later::Wal, Vec::new(), &none)?;
    last.finish()?;
    cutting.lanes.flush(&uploads)?;
    drop(cutting);
    uploads.finish()?;
    let description = serde_json::from_str(include_str!("description.json")).unwrap();
    repository.store.put(MANIFEST, Body::Bytes(assembler.finish(&description)?.into()))?;
    Ok(())
}

/// Reads every file of the manifest by the format's own rules, not through the view.
fn read_back(repository: &Repository) -> BTreeMap<Vec<u8>, (Vec<u8>, u32)> {
    let (mut entries, mut reader) = (Vec::<Entry>::new(), ManifestReader::new(MANIFEST));
    repository
        .read_pack(MANIFEST, PackKind::Manifest, |plain| Ok(reader.chunk(plain, |entry| entries.push(entry))?))
        .unwrap();
    let mut chunks = Chunks { repository, known: BTreeMap::new() };
    let files = entries.into_iter().filter_map(|entry| match entry.node {
        Node::File(file) => Some((entry.path, (chunks.file(&file), file.crc))),
        _ => None,
    });
    files.collect()
}

struct Chunks<'a> {
    repository: &'a Repository,
    known: BTreeMap<ChunkId, Vec<u8>>,
}

impl Chunks<'_> {
    fn chunk(&mut self, at: &crate::format::chunk::ChunkRef) -> &Vec<u8> {
        let repository = self.repository;
        self.known.entry(at.id).or_insert_with(|| {
            let key = crate::repo::keys::pack("main", at.pack);
            let stored = repository.store.get_range(&key, at.offset.into(), at.stored_len.into()).unwrap();
            let mut decoder = crate::format::chunk::Decoder::new().unwrap();
            decoder.decode(&repository.keys, &key, at, &stored).unwrap()
        })
    }

    fn extents(&mut self, extents: &[Extent], out: &mut Vec<u8>) {
        for extent in extents {
            let plain = self.chunk(&extent.chunk);
            out.extend_from_slice(&plain[extent.offset as usize..(extent.offset + extent.len) as usize]);
        }
    }

    fn file(&mut self, file: &File) -> Vec<u8> {
        let mut out = Vec::new();
        let leaves = match &file.place {
            Place::Inline { extents, .. } => {
                self.extents(extents, &mut out);
                Vec::new()
            }
            Place::Leaves(leaves) => leaves.clone(),
            Place::Index(index) => {
                let decode = |chunk| decode_index("index", self.chunk(chunk)).unwrap();
                index.iter().flat_map(decode).collect()
            }
        };
        for (number, leaf_ref) in leaves.iter().enumerate() {
            let len = (file.size - number as u64 * LEAF_BYTES).min(LEAF_BYTES);
            let leaf = Leaf::decode("leaf", self.chunk(&leaf_ref.map), len).unwrap();
            let start = out.len();
            (0..leaf.slots()).for_each(|slot| self.extents(leaf.slot(slot), &mut out));
            let changes = decode_changes("changes", self.chunk(&leaf_ref.changes), len).unwrap();
            for (change, slot) in changes.iter().zip(out[start..].chunks(SLOT)) {
                assert_eq!(change.crc, crc32c::crc32c(slot));
                assert_eq!(change.grains, self.repository.keys.digest(slot).grains);
            }
        }
        out
    }
}

fn data_directory() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    for directory in ["global", "base/1", "base/5", "pg_wal/archive_status", "pg_tblspc"] {
        fs::create_dir_all(root.path().join(directory)).unwrap();
    }
    fs::write(root.path().join("global/pg_control"), [7; 8192]).unwrap();
    fs::write(root.path().join("pg_wal/000000010000000000000001"), "not ours to copy").unwrap();
    root
}

/// Half repeating, half noise, different for each seed.
fn content(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..len).map(|at| if (at / GRAIN).is_multiple_of(2) { (at / 512) as u8 ^ seed as u8 } else { next() }).collect()
}

fn assert_same(root: &Path, found: &BTreeMap<Vec<u8>, (Vec<u8>, u32)>, expected: usize) {
    assert_eq!(found.len(), expected);
    for (path, (bytes, crc)) in found {
        let source = fs::read(root.join(std::str::from_utf8(path).unwrap())).unwrap();
        assert!(*bytes == source, "{}", path.escape_ascii());
        assert_eq!(*crc, crc32c::crc32c(&source), "{}", path.escape_ascii());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn every_byte_comes_back(
        sizes in prop::collection::vec(
            prop_oneof![
                0..3 * GRAIN,
                (0..4usize, 0..3usize).prop_map(|(slots, off)| (slots * SLOT + off).saturating_sub(1)),
                (0..3usize).prop_map(|off| INLINE_BYTES as usize + off - 1),
                0..2 * INLINE_BYTES as usize,
            ],
            1..40,
        ),
    ) {
        let root = data_directory();
        for (number, size) in sizes.iter().enumerate() {
            let path = format!("base/{}/{}", if number % 2 == 0 { 1 } else { 5 }, 20_000 + number / 2);
            // neighbours in the two databases are often the same, as in template databases
            fs::write(root.path().join(path), content(number as u64 / 4, *size)).unwrap();
        }
        let repository = Repository::new(Arc::new(MemoryStore::new()), "main").unwrap();
        copy_directory(&repository, root.path()).unwrap();
        assert_same(root.path(), &read_back(&repository), sizes.len() + 1);
    }
}

#[test]
fn files_of_several_leaves_and_of_an_index_come_back() {
    let root = data_directory();
    fs::write(root.path().join("base/1/20001"), content(9, 2 * LEAF_BYTES as usize + 5)).unwrap();
    // sparse, so that only its map is large: 65 leaves are one more than an entry names
    let huge = fs::File::create(root.path().join("base/1/20002")).unwrap();
    huge.set_len(65 * LEAF_BYTES).unwrap();
    huge.write_all_at(b"near the end", 65 * LEAF_BYTES - 100).unwrap();
    let repository = Repository::new(Arc::new(MemoryStore::new()), "main").unwrap();
    copy_directory(&repository, root.path()).unwrap();
    let mut indexed = false;
    let mut reader = ManifestReader::new(MANIFEST);
    repository
        .read_pack(MANIFEST, PackKind::Manifest, |plain| {
            Ok(reader.chunk(plain, |entry| {
                indexed |= matches!(&entry.node, Node::File(File { place: Place::Index(_), .. }));
            })?)
        })
        .unwrap();
    assert!(indexed);
    assert_same(root.path(), &read_back(&repository), 3);
}

#[test]
fn the_same_content_is_stored_once() {
    let root = data_directory();
    for path in ["base/1/20000", "base/5/20000", "base/5/20001"] {
        fs::write(root.path().join(path), content(3, 5 * SLOT + 100)).unwrap();
    }
    let store = Arc::new(MemoryStore::new());
    let repository = Repository::new(store.clone(), "main").unwrap();
    copy_directory(&repository, root.path()).unwrap();
    let stored: u64 = store.list("chunk/", None).unwrap().objects.iter().map(|object| object.size).sum();
    assert!(stored < 6 * SLOT as u64 * 2 / 3, "{stored} bytes stored");
    assert_same(root.path(), &read_back(&repository), 4);
}

#[test]
fn a_store_that_fails_at_any_call_fails_the_copy() {
    let root = data_directory();
    for number in 0..20 {
        fs::write(root.path().join(format!("base/1/{}", 20_000 + number)), content(number, 100_000)).unwrap();
    }
    fs::write(root.path().join("base/1/30000"), content(99, 3 << 20)).unwrap();
    let calls = {
        let fault = Fault::new(MemoryStore::new());
        let plan = fault.plan();
        copy_directory(&Repository::new(Arc::new(fault), "main").unwrap(), root.path()).unwrap();
        plan.calls()
    };
    assert!(calls >= 4, "{calls} calls");
    for number in 1..=calls {
        let fault = Fault::new(MemoryStore::new());
        fault.plan().nth(number, Effect::Fail(ErrorKind::Other));
        let repository = Repository::new(Arc::new(fault), "main").unwrap();
        assert!(copy_directory(&repository, root.path()).is_err(), "call {number} failed unnoticed");
    }
    let fault = Fault::new(MemoryStore::new());
    fault.plan().add(|call| call.operation == Operation::Put, Effect::Fail(ErrorKind::NoSpace));
    assert!(copy_directory(&Repository::new(Arc::new(fault), "main").unwrap(), root.path()).is_err());
}
