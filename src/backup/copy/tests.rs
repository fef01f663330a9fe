//! A data directory through the workers into a repository and back through a view: every byte, for every kind of size.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use proptest::prelude::*;

use super::*;
use crate::backup::chunker::Lanes;
use crate::backup::dedup::Dedup;
use crate::backup::orphan_packs::{left_behind, take_over};
use crate::backup::packer::Uploads;
use crate::backup::parent::{Parent, Reuse};
use crate::backup::scan::scan;
use crate::format::chunk::{ChunkId, PackId};
use crate::format::manifest::{Description, Entry, File, Node, PackUse, Place};
use crate::format::map::{Extent, Leaf, apply_changes, changes_base, decode_changes, decode_index};
use crate::format::{GRAIN, SLOT};
use crate::postgres::{ControlFile, Layout, Major};
use crate::progress::Silent;
use crate::repo::Repository;
use crate::store::{Body, Effect, ErrorKind, Fault, MemoryStore, Operation, Store};

pub(crate) const LABEL: &str = "20240107-120000F";

fn repository() -> Repository {
    Repository::new(Arc::new(MemoryStore::new()), "main").unwrap()
}

/// Copies `root` as a full backup does, without a server.
pub(crate) fn copy_directory(repository: &Repository, root: &Path) -> Result<()> {
    copy_since(repository, root, LABEL, None, now_s()).map(drop)
}

/// Copies `root` as the backup `label`, comparing with a parent; gives the bytes of packs that it wrote.
pub(crate) fn copy_since(
    repository: &Repository,
    root: &Path,
    label: &str,
    parent: Option<(&str, Reuse)>,
    now: i64,
) -> Result<(u64, Vec<PackUse>)> {
    let layout = Layout {
        tablespace_directory: Major::new(15).unwrap().tablespace_directory(),
        relation_segment_pages: 131_072,
    };
    let mut scan = scan(root, layout)?;
    settle(&mut scan.found, now);
    let uploads = Uploads::start(repository, 2);
    let opened = parent.map(|(label, reuse)| Parent::open(repository, label, reuse)).transpose()?;
    let (files, parent) = opened.map(|(_, files, parent)| (files, parent)).unzip();
    let (left, dedup) = (left_behind(repository, &[dead()])?, Dedup::default());
    take_over(repository, &left, &dedup)?;
    let mut sizes: HashMap<_, _> = parent.iter().flat_map(Parent::packs).map(|pack| (pack.pack, pack.size)).collect();
    let cutting = Cutting {
        root: root.to_owned(),
        user: None,
        repository: None,
        keys: &repository.keys,
        level: 1,
        uploads: &uploads,
        dedup,
        lanes: Lanes::new(&repository.keys),
        pages: None,
        parent,
    };
    let mut assembler = Assembler::new(repository.keys.clone(), &[])?;
    let files = Files { found: scan.found, parent: files };
    let control = copy(&cutting, files, 3, &mut assembler, &Silent, &mut || Ok(()))?;
    let found = Scanned { kind: ScannedKind::File, ..control };
    assembler.fill_control(&found, &fs::read(root.join("global/pg_control")).unwrap())?;
    assembler.fill_wal(Vec::new(), &|_| Err(Error::new("no index here")))?;
    cutting.lanes.flush(&uploads)?;
    drop(cutting);
    let written = uploads.finish()?;
    let bytes = written.values().sum();
    sizes.extend(written);
    sizes.extend(left);
    let weights = assembler.totals().weights.sorted();
    let pack = |(pack, weight)| PackUse { pack, size: sizes.get(&pack).copied().unwrap_or_default(), weight };
    let packs: Vec<_> = weights.into_iter().filter(|(pack, _)| sizes.contains_key(pack)).map(pack).collect();
    let mut description: Description = serde_json::from_str(include_str!("description.json")).unwrap();
    (description.label, description.start_time) = (label.to_owned(), now);
    (description.data_directory, description.tablespaces) = (root.display().to_string(), scan.tablespaces);
    if let Ok(control) = ControlFile::parse(&fs::read(root.join("global/pg_control")).unwrap()) {
        description.database.system_id = control.system_identifier;
    }
    let manifest = assembler.finish(&description, &packs)?;
    repository.store.put(&crate::repo::layout::manifest("main", label), Body::Bytes(manifest.into()))?;
    Ok((bytes, packs))
}

/// Takes the times that a test sets for those of its file system's clock.
pub(crate) fn settle(found: &mut [Scanned], now: i64) {
    found.iter_mut().for_each(|found| found.is_settled = found.identity.is_some() && found.mtime < now - 10);
}

/// The lock of a backup that died before everything that a test does.
fn dead() -> crate::repo::lock::Other {
    crate::repo::lock::Other { key: String::new(), modified: 0, age: 0, info: None, dead: true }
}

pub(crate) fn now_s() -> i64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs() as i64
}

/// Reads every file of a backup by the format's own rules, not through the view.
pub(crate) fn read_back(repository: &Repository, label: &str) -> BTreeMap<Vec<u8>, (Vec<u8>, u32)> {
    let mut manifest = repository.open_manifest(label).unwrap();
    let own = (manifest.pack(), manifest.key().to_owned());
    let mut chunks = Chunks { repository, own, known: BTreeMap::new() };
    let mut files = BTreeMap::new();
    while let Some(entry) = manifest.next().unwrap() {
        if let Node::File(file) = entry.node {
            files.insert(entry.path, (chunks.file(&file), file.crc));
        }
    }
    files
}

struct Chunks<'a> {
    repository: &'a Repository,
    /// the manifest's own pack and key
    own: (PackId, String),
    known: BTreeMap<ChunkId, Vec<u8>>,
}

impl Chunks<'_> {
    fn chunk(&mut self, at: &crate::format::chunk::ChunkRef) -> &Vec<u8> {
        let (repository, own) = (self.repository, &self.own);
        self.known.entry(at.id).or_insert_with(|| {
            let key = if at.pack == own.0 { own.1.clone() } else { crate::repo::layout::pack("main", at.pack) };
            let stored = repository.store.get_range(&key, at.offset.into(), at.stored_len.into()).unwrap();
            let mut decoder = crate::format::chunk::Decoder::new().unwrap();
            decoder.decode(&repository.keys, &key, at, &stored).unwrap().plain
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
            let plain = self.chunk(&leaf_ref.changes).clone();
            let changes = match changes_base("changes", &plain).unwrap() {
                None => decode_changes("changes", &plain, len).unwrap(),
                Some(base) => {
                    let mut changes = decode_changes("changes", self.chunk(&base), len).unwrap();
                    apply_changes("changes", &plain, &mut changes).unwrap();
                    changes
                }
            };
            for (change, slot) in changes.iter().zip(out[start..].chunks(SLOT)) {
                assert_eq!(change.crc, crc32c::crc32c(slot));
                assert_eq!(change.grains, self.repository.keys.digest(slot).grains);
            }
        }
        out
    }
}

pub(crate) fn data_directory() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    for directory in ["global", "base/1", "base/5", "pg_wal/archive_status", "pg_tblspc"] {
        fs::create_dir_all(root.path().join(directory)).unwrap();
    }
    fs::write(root.path().join("global/pg_control"), [7; 8192]).unwrap();
    fs::write(root.path().join("pg_wal/000000010000000000000001"), "not ours to copy").unwrap();
    root
}

/// Half repeating, half noise, different for each seed.
pub(crate) fn content(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..len).map(|at| if (at / GRAIN).is_multiple_of(2) { (at / 512) as u8 ^ seed as u8 } else { next() }).collect()
}

pub(crate) fn assert_same(root: &Path, found: &BTreeMap<Vec<u8>, (Vec<u8>, u32)>, expected: usize) {
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
        let repository = repository();
        copy_directory(&repository, root.path()).unwrap();
        assert_same(root.path(), &read_back(&repository, LABEL), sizes.len() + 1);
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
    let repository = repository();
    copy_directory(&repository, root.path()).unwrap();
    let mut indexed = false;
    let index = |entry: Entry| indexed |= matches!(&entry.node, Node::File(File { place: Place::Index(_), .. }));
    repository.manifest(LABEL, index).unwrap();
    assert!(indexed);
    assert_same(root.path(), &read_back(&repository, LABEL), 3);
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
    assert_same(root.path(), &read_back(&repository, LABEL), 4);
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

#[test]
fn what_a_copy_left_that_died_is_not_stored_again() {
    let root = data_directory();
    for number in 0..300 {
        fs::write(root.path().join(format!("base/1/{}", 20_000 + number)), content(number, 30_000)).unwrap();
    }
    fs::write(root.path().join("base/5/30000"), content(99, 90 << 20)).unwrap();
    let whole = copy_since(&repository(), root.path(), LABEL, None, now_s()).unwrap().0;
    // the fourth pack cannot be written
    let store = Arc::new(MemoryStore::new());
    let fault = Fault::new(store.clone());
    let puts = std::sync::atomic::AtomicUsize::new(0);
    let fourth =
        move |call: &crate::store::Call| call.operation == Operation::Put && puts.fetch_add(1, Ordering::Relaxed) >= 3;
    fault.plan().add(fourth, Effect::Fail(ErrorKind::NoSpace));
    assert!(copy_directory(&Repository::new(Arc::new(fault), "main").unwrap(), root.path()).is_err());
    let repository = Repository::new(store, "main").unwrap();
    let left: u64 = repository.packs().unwrap().values().sum();
    assert!(left > 30 << 20, "{left} bytes were written");
    let rest = copy_since(&repository, root.path(), LABEL, None, now_s()).unwrap().0;
    assert!(rest <= whole - left * 9 / 10, "{rest} bytes stored after {left} of {whole}");
    assert_same(root.path(), &read_back(&repository, LABEL), 302);
}

pub(crate) mod model;
