//! What each format version wrote is read forever, byte for byte.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pgcairn::backup::pack_usage::Weights;
use pgcairn::format::chunk::{ChunkRef, Encoder, Keys, PackId};
use pgcairn::format::cipher_key::Passphrase;
use pgcairn::format::manifest::{File, Node, PackUse, Place};
use pgcairn::format::map::{Leaf, LeafRef, SlotChange, apply_changes, changes_base, decode_changes, decode_index};
use pgcairn::format::pack::{Pack, PackKind, PackWriter};
use pgcairn::format::seal::SealKind;
use pgcairn::format::{CHUNK, LEAF_BYTES, SLOT, VERSION};
use pgcairn::postgres::BackupKind;
use pgcairn::read::fetch::{FetchOptions, Fetcher};
use pgcairn::read::view::{Content, NodeIndex, View, ViewOptions, read_all};
use pgcairn::read::wal;
use pgcairn::repo::Repository;
use pgcairn::repo::catalog::stanzas;
use pgcairn::repo::chunks::ChunkReader;
use pgcairn::store::{DirectoryStore, Store};

#[path = "golden/files.rs"]
mod files;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &target),
            false => _ = fs::copy(entry.path(), &target).unwrap(),
        }
    }
}

/// A copy of the golden repository, so that no test can change it.
fn repository() -> (tempfile::TempDir, Repository) {
    let place = tempfile::tempdir().unwrap();
    copy(&golden("v1"), place.path());
    let store: Arc<dyn Store> = Arc::new(DirectoryStore::open(place.path(), false).unwrap());
    assert_eq!(stanzas(&store).unwrap(), [files::STANZA]);
    (place, Repository::new(store, files::STANZA).unwrap())
}

type KeysOf = fn(&[u8]) -> Keys;

/// The encrypted ones: before manifests carried a proof, and with it; and the keys that derive from a secret.
const ENCRYPTED: [(&str, KeysOf); 2] = [("v1-encrypted", Keys::new), ("v1-encrypted-proof", Keys::with_manifest_proof)];

/// A copy of an encrypted one. Its stanza has no info objects.
fn encrypted(name: &str, keys: Keys) -> (tempfile::TempDir, Repository) {
    let place = tempfile::tempdir().unwrap();
    copy(&golden(name), place.path());
    let store: Arc<dyn Store> = Arc::new(DirectoryStore::open(place.path(), false).unwrap());
    (place, Repository { keys, ..Repository::new(store, files::STANZA).unwrap() })
}

fn fetcher(repository: &Repository) -> Fetcher {
    Fetcher::new(repository.clone(), FetchOptions { memory_bytes: 4 << 20, disk: None })
}

fn view(repository: &Repository, options: &ViewOptions) -> View {
    View::load(Arc::new(fetcher(repository)), files::LABEL, options).unwrap()
}

fn content(view: &View, path: &[u8]) -> Vec<u8> {
    read_all(view, find(view, path)).unwrap()
}

/// The files of a backup by path.
fn entries(repository: &Repository, label: &str) -> Vec<(Vec<u8>, File)> {
    let mut files = Vec::new();
    let each = |entry: pgcairn::format::manifest::Entry| {
        if let Node::File(file) = entry.node {
            files.push((entry.path, file));
        }
    };
    repository.manifest(label, each).unwrap();
    files
}

/// All leaves of a file, and the chunks that name them.
fn leaves(chunks: &ChunkReader, file: &File) -> (Vec<LeafRef>, Vec<ChunkRef>) {
    match &file.place {
        Place::Inline { .. } => (Vec::new(), Vec::new()),
        Place::Leaves(leaves) => (leaves.clone(), Vec::new()),
        Place::Index(index) => {
            let named = |chunk| decode_index("index", &chunks.read(chunk, None).unwrap()).unwrap();
            (index.iter().flat_map(named).collect(), index.clone())
        }
    }
}

fn leaf_len(file: &File, number: usize) -> u64 {
    (file.size - number as u64 * LEAF_BYTES).min(LEAF_BYTES)
}

/// Changes of `len` bytes of file, and what they were derived from.
fn read_changes(chunks: &ChunkReader, at: &ChunkRef, len: u64) -> (Vec<SlotChange>, Option<ChunkRef>) {
    let plain = chunks.read(at, None).unwrap();
    let Some(base) = changes_base("changes", &plain).unwrap() else {
        return (decode_changes("changes", &plain, len).unwrap(), None);
    };
    let mut changes = decode_changes("base", &chunks.read(&base, None).unwrap(), len).unwrap();
    apply_changes("changes", &plain, &mut changes).unwrap();
    (changes, Some(base))
}

fn slot_changes(keys: &Keys, content: &[u8]) -> Vec<SlotChange> {
    let change = |slot| SlotChange { crc: crc32c::crc32c(slot), grains: keys.digest(slot).grains };
    content.chunks(SLOT).map(change).collect()
}

/// Flips one byte of a stored file.
fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at] ^= 0x20;
    fs::write(path, bytes).unwrap();
}

fn find(view: &View, path: &[u8]) -> NodeIndex {
    let step = |node, name: &[u8]| view.child(node, name).unwrap_or_else(|| panic!("no {}", path.escape_ascii()));
    path.split(|byte| *byte == b'/').fold(0, step)
}

/// Where the view has what the manifest keeps at `path`.
fn in_view(path: &[u8]) -> Vec<u8> {
    match path.strip_prefix(b"pg_tblspc/") {
        Some(rest) => [b".pgcairn/tablespaces/", rest].concat(),
        None => path.to_vec(),
    }
}

#[test]
fn every_format_version_has_a_golden_repository() {
    for version in 1..=VERSION {
        let name = format!("v{version}");
        assert!(golden(&name).join("archive").is_dir(), "write tests/golden/{name} with examples/golden.rs");
    }
}

#[test]
fn the_example_of_the_document_holds() {
    let (keys, mut stored) = (Keys::new(b""), Vec::new());
    let digest = keys.digest(b"pgcairn");
    assert_eq!(digest.grains, [0x4286_7331_c0cc_f771]);
    assert_eq!(digest.id.to_string(), "19b932d310d7706d05fdfb5a51b264f9389c010014b2b5b4b5777fc71f8560ca");
    Encoder::new(3).unwrap().encode(&keys, &digest.id, b"pgcairn", &mut stored).unwrap();
    assert_eq!(stored[..8], *b"\0pgcairn");
    assert_eq!(stored[8..], 0x2c93_3c91_e073_79e5_757c_4f1c_8abf_8aa4_u128.to_be_bytes());
    let text = keys.digest(b"1\t0/3000000\tx\n").id;
    assert_eq!(keys.history(7, "00000002.history", [text]).to_string(), "aba87c6f46ea84a7f1f93cff4b18f59e");
}

#[test]
fn every_file_comes_back() {
    let (_place, repository) = repository();
    let view = view(&repository, &ViewOptions::default());
    for (path, expected) in files::small() {
        assert_eq!(content(&view, &in_view(path)), expected, "{}", path.escape_ascii());
    }
    assert_eq!(content(&view, files::CONTROL), files::control(2));
    let mapped = find(&view, files::MAPPED);
    assert_eq!(read_all(&view, mapped).unwrap(), files::mapped());
    for (from, len) in [(SLOT + 5, 3 * 8192), (0, 1), (6 * SLOT - 9000, 9100), (9 * SLOT, 11), (SLOT - 1, 2)] {
        let mut part = vec![0; len];
        assert_eq!(view.read_at(mapped, from as u64, &mut part).unwrap(), len);
        assert_eq!(part, files::mapped()[from..from + len]);
    }
    assert_eq!(view.crc(mapped).unwrap(), Some(crc32c::crc32c(&files::mapped())));
}

#[test]
fn the_full_backup_below_is_complete_in_itself() {
    let (_place, repository) = repository();
    let view = View::load(Arc::new(fetcher(&repository)), files::FULL, &ViewOptions::default()).unwrap();
    assert_eq!((view.description.kind, &view.description.prior), (BackupKind::Full, &None));
    assert_eq!(content(&view, files::MAPPED), files::mapped_before());
    assert_eq!(content(&view, files::CONTROL), files::control(1));
    assert_eq!(content(&view, files::SAME), b"15\n");
    assert_eq!(repository.description(files::LABEL).unwrap().prior.as_deref(), Some(files::FULL));
}

#[test]
fn a_file_with_an_index_is_read_anywhere() {
    let (_place, repository) = repository();
    let view = view(&repository, &ViewOptions::default());
    let (huge, run) = (find(&view, files::HUGE), files::huge_run());
    assert_eq!(view.size(huge).unwrap(), files::HUGE_BYTES);
    for at in [0, 3 * SLOT as u64 - 50, LEAF_BYTES - 50, 64 * LEAF_BYTES - 1, files::HUGE_BYTES - 100] {
        let mut part = [0; 100];
        let len = view.read_at(huge, at, &mut part).unwrap();
        let expected = (0..len).map(|byte| run[(at as usize + byte) % CHUNK]);
        assert!(part[..len].iter().copied().eq(expected), "at {at}");
    }
}

#[test]
fn chunks_hold_runs_and_extents_point_into_them() {
    let (_place, repository) = repository();
    let chunks = ChunkReader::new(&repository).unwrap();
    let (_, mapped) = entries(&repository, files::LABEL).into_iter().find(|file| file.0 == files::MAPPED).unwrap();
    let stored = leaves(&chunks, &mapped).0[0];
    let leaf = Leaf::decode("leaf", &chunks.read(&stored.map, None).unwrap(), mapped.size).unwrap();
    let shape = |slot| {
        let of = |extent: &pgcairn::format::map::Extent| {
            (extent.chunk.pack.0[0], extent.chunk.plain_len as usize, extent.offset as usize, extent.len as usize)
        };
        leaf.slot(slot).iter().map(of).collect::<Vec<_>>()
    };
    let grain = 8192;
    assert_eq!(leaf.slots(), 10);
    assert_eq!(shape(7), [(1, CHUNK, 7 * SLOT, SLOT)]);
    assert_eq!(shape(5), [(1, CHUNK, 5 * SLOT, 15 * grain), (0x11, 3 * grain, 2 * grain, grain)]);
    assert_eq!(shape(9), [(1, SLOT + 11, SLOT, 11)]);
    assert_eq!(shape(1).len(), 3);
    // what restore does: the seal proves what is stored
    let all = [leaf.slot(0)[0].chunk, leaf.slot(5)[1].chunk, leaf.slot(9)[0].chunk];
    let expected = [&files::mapped_before()[..CHUNK], &files::changed(), &files::mapped()[CHUNK..]];
    let mut read = 0;
    let each = |number: usize, plain: &[u8]| {
        read += 1;
        assert!(plain == expected[number], "chunk {number}");
        Ok(())
    };
    fetcher(&repository).sealed(&all, each).unwrap();
    assert_eq!(read, 3);
}

#[test]
fn changes_are_those_of_the_files() {
    let (_place, repository) = repository();
    let (keys, chunks) = (&repository.keys, ChunkReader::new(&repository).unwrap());
    for (path, file) in entries(&repository, files::LABEL) {
        let Place::Inline { changes, .. } = &file.place else { continue };
        let Some((chunk, at)) = *changes else { continue };
        if &*path == files::CONTROL {
            continue;
        }
        let content = files::small().into_iter().find(|small| small.0 == path).unwrap().1;
        let plain = chunks.read(&chunk, None).unwrap();
        let found = decode_changes("changes", &plain[at as usize..], file.size).unwrap();
        assert_eq!(found, slot_changes(keys, &content), "{}", path.escape_ascii());
    }
    let of = |label, path: &[u8]| {
        let (_, file) = entries(&repository, label).into_iter().find(|file| file.0 == path).unwrap();
        let all: Vec<_> = leaves(&chunks, &file).0.iter().map(|leaf| leaf.changes).collect();
        (file, all)
    };
    let (file, before) = of(files::FULL, files::MAPPED);
    assert_eq!(read_changes(&chunks, &before[0], file.size), (slot_changes(keys, &files::mapped_before()), None));
    let (file, delta) = of(files::LABEL, files::MAPPED);
    assert_eq!(read_changes(&chunks, &delta[0], file.size), (slot_changes(keys, &files::mapped()), Some(before[0])));
    let (file, huge) = of(files::LABEL, files::HUGE);
    let run = slot_changes(keys, &files::huge_run());
    assert_eq!(huge.len(), 65);
    assert_eq!(read_changes(&chunks, &huge[63], LEAF_BYTES).0, vec![run; 32].concat());
    assert_eq!(read_changes(&chunks, &huge[64], leaf_len(&file, 64)).0.len(), 2);
}

/// What the pack table must say, counted anew from what the manifest refers to.
fn count(repository: &Repository, label: &str) -> Weights {
    let (chunks, mut weights) = (ChunkReader::new(repository).unwrap(), Weights::default());
    for (path, file) in entries(repository, label) {
        if let Place::Inline { extents, changes } = &file.place
            && &*path != files::CONTROL
        {
            weights.add_extents(extents);
            changes.iter().for_each(|(chunk, _)| weights.add_changes(chunk, file.size));
        }
        let (leaves, index) = leaves(&chunks, &file);
        index.iter().for_each(|chunk| weights.add_chunk(chunk));
        for (number, stored) in leaves.iter().enumerate() {
            let len = leaf_len(&file, number);
            let leaf = Leaf::decode("leaf", &chunks.read(&stored.map, None).unwrap(), len).unwrap();
            let (_, base) = read_changes(&chunks, &stored.changes, len);
            weights.add_leaf(&leaf, stored, base.as_ref());
        }
    }
    weights
}

#[test]
fn the_pack_table_lists_what_is_needed() {
    let (_place, repository) = repository();
    for (label, names) in [(files::FULL, &[1u8, 2, 3, 4][..]), (files::LABEL, &[1, 2, 4, 0x11, 0x12, 0x13, 0x14])] {
        let table = repository.manifest_packs(label).unwrap();
        assert_eq!(table.iter().map(|pack| pack.pack.0[0]).collect::<Vec<_>>(), names, "{label}");
        repository.prove_packs(&table).unwrap();
        let weights = count(&repository, label);
        let found: Vec<(PackId, u64)> = table.iter().map(|PackUse { pack, weight, .. }| (*pack, *weight)).collect();
        assert_eq!(found, weights.sorted(), "{label}");
        let needed: u64 = table.iter().map(|pack| pack.weight.min(pack.size)).sum();
        assert_eq!(repository.description(label).unwrap().sizes.stored_all, needed);
    }
}

#[test]
fn a_flipped_byte_is_refused() {
    let files: [(&str, &[u8]); 3] = [("01/01", files::MAPPED), ("11/11", files::MAPPED), ("12/12", b"base/5/16391")];
    for (pack, path) in files {
        let name = pack.replace('/', &format!("/{}", &pack[..2].repeat(15)));
        // the first chunk's codec byte, the frame's header, the frame
        for at in [32, 33, 200] {
            let (place, repository) = repository();
            flip(&place.path().join("chunk/golden").join(&name), at);
            let view = view(&repository, &ViewOptions::default());
            assert!(read_all(&view, find(&view, path)).is_err(), "byte {at} of {name}");
        }
    }
    let manifest = format!("backup/golden/{}/backup.manifest", files::LABEL);
    for at in [8, 11, 20, 32, 300, 2000, 2200] {
        let (place, repository) = repository();
        flip(&place.path().join(&manifest), at);
        assert!(repository.open_manifest(files::LABEL).is_err(), "byte {at} of the manifest");
    }
}

#[test]
fn an_encrypted_backup_is_read_with_its_secret_only() {
    ENCRYPTED.into_iter().for_each(|(name, keys)| read_with_its_secret_only(name, keys));
}

fn read_with_its_secret_only(name: &str, keys: KeysOf) {
    let (place, repository) = encrypted(name, keys(files::SECRET));
    assert_eq!(repository.keys.seal_kind(), SealKind::Encrypted);
    let load =
        |repository: &Repository| View::load(Arc::new(fetcher(repository)), files::FULL, &ViewOptions::default());
    let view = load(&repository).unwrap();
    assert_eq!(content(&view, files::MAPPED), files::hidden());
    assert_eq!(content(&view, files::CONTROL), files::control(3));
    let table = repository.manifest_packs(files::FULL).unwrap();
    assert_eq!(table.iter().map(|pack| pack.pack.0[0]).collect::<Vec<_>>(), [2, 4]);
    for other in [&b"another secret"[..], b""] {
        assert!(load(&encrypted(name, keys(other)).1).is_err(), "{}", other.escape_ascii());
    }
    let pack = place.path().join("chunk/golden/02").join("02".repeat(16));
    assert!(!fs::read(&pack).unwrap().windows(8).any(|part| part == b"a row of"));
    for at in [32, 500, 3700] {
        flip(&pack, at);
        assert!(read_all(&load(&repository).unwrap(), find(&view, files::MAPPED)).is_err(), "byte {at}");
        flip(&pack, at);
    }
    assert_eq!(content(&load(&repository).unwrap(), files::MAPPED), files::hidden());
}

#[test]
fn directories_links_and_wal_are_there() {
    let (_place, repository) = repository();
    let view = view(&repository, &ViewOptions::copy());
    let tablespace = &view.description.tablespaces[0];
    assert_eq!((tablespace.oid, tablespace.path.as_str()), (files::TABLESPACE, files::TABLESPACE_PATH));
    let link = &view.node(find(&view, b"pg_tblspc/16400")).unwrap().content;
    assert!(matches!(link, Content::Link(target) if **target == *b"../.pgcairn/tablespaces/16400"));
    let empty = view.node(find(&view, b"pg_wal/archive_status")).unwrap();
    assert!(matches!(empty.content, Content::Directory) && empty.mode == 0o700);
    let segment = find(&view, format!("pg_wal/{}", files::SEGMENT).as_bytes());
    assert_eq!(read_all(&view, segment).unwrap(), files::segment());
    let conf = read_all(&view, find(&view, b"postgresql.auto.conf")).unwrap();
    assert!(conf.starts_with(b"work_mem = '64MB'\n") && conf.ends_with(b"archive_mode = 'off'\n"));
    let label = read_all(&view, find(&view, b"backup_label")).unwrap();
    assert!(label.starts_with(b"START WAL LOCATION: 0/2400028"));
    let manifest: serde_json::Value =
        serde_json::from_slice(&read_all(&view, find(&view, b"backup_manifest")).unwrap()).unwrap();
    assert_eq!(manifest["Files"].as_array().unwrap().len(), files::small().len() + 4);
}

#[test]
fn the_catalog_is_read() {
    let (_place, repository) = repository();
    let archive = repository.archive_info().unwrap();
    assert_eq!(archive.current().unwrap().system_id, files::SYSTEM_ID);
    let backups = repository.backup_info().unwrap().backups;
    assert_eq!(backups.keys().collect::<Vec<_>>(), [files::FULL, files::LABEL]);
    assert_eq!(backups[files::LABEL].prior.as_deref(), Some(files::FULL));
    assert_eq!(backups[files::LABEL].stop_lsn, "0/2400100");
    assert_eq!(repository.resolve("latest").unwrap(), files::LABEL);
    let segments = repository.archive(archive.current().unwrap()).segments(&[files::SEGMENT.parse().unwrap()]).unwrap();
    assert!(segments[0].is_some());
}

#[test]
fn the_catalog_is_made_again_from_the_manifests() {
    let (place, repository) = repository();
    let whole = repository.backup_info().unwrap();
    for name in ["backup.info", "backup.info.copy"] {
        fs::remove_file(place.path().join("backup").join(files::STANZA).join(name)).unwrap();
    }
    assert_eq!(repository.backup_info().unwrap(), whole);
}

#[test]
fn archived_files_are_delivered() {
    let (place, repository) = repository();
    let target = place.path().join("RECOVERYXLOG");
    for (name, content) in [(files::SEGMENT, files::segment()), (files::HISTORY, files::HISTORY_TEXT.to_vec())] {
        wal::get(&repository, name, &target).unwrap();
        assert_eq!(fs::read(&target).unwrap(), content, "{name}");
    }
    assert!(matches!(wal::get(&repository, "000000020000000000000013", &target), Err(wal::GetError::NotThere)));
}

#[test]
fn a_passphrase_opens_what_was_encrypted_under_it() {
    for (name, keys) in ENCRYPTED {
        let (_place, other) = encrypted(name, keys(files::SECRET));
        let passphrase = |text: &str| Passphrase::new(text.into()).unwrap();
        let open = |text| Repository::open(other.store.clone(), files::LOCKED, Some(&passphrase(text)));
        let repository = open(files::PASSPHRASE).unwrap();
        assert_eq!(repository.archive_info().unwrap().current().unwrap().system_id, files::SYSTEM_ID);
        assert!(repository.backup_info().unwrap().backups.is_empty());
        let proof = repository.keys.manifest_proof(files::LABEL, PackId::default(), &[]);
        assert_eq!(proof.is_some(), name == "v1-encrypted-proof", "{name}");
        assert!(open("another").is_err());
    }
}

#[test]
fn a_manifest_without_proof_is_refused_where_manifests_carry_one() {
    let (_place, repository) = encrypted("v1-encrypted", Keys::with_manifest_proof(files::SECRET));
    assert!(repository.open_manifest(files::FULL).is_err());
    assert!(repository.manifest_packs(files::FULL).is_err());
}

#[test]
fn wal_spliced_from_stored_chunks_is_refused() {
    let (place, repository) = repository();
    let database = repository.archive_info().unwrap().current().unwrap().clone();
    let key = repository.archive(&database).find(files::SEGMENT).unwrap().unwrap().key;
    let object = place.path().join(&key);
    let bytes = fs::read(&object).unwrap();
    let pack = Pack::parse(&key, &bytes).unwrap();
    let first = pack.chunks[0];
    let stored = &bytes[first.offset as usize..first.end() as usize];
    let mut spliced = PackWriter::new(PackKind::Wal, SealKind::Hashed, pack.header.id, 0);
    (0..2).for_each(|_| _ = spliced.add(first.id, first.plain_len as usize, stored));
    fs::set_permissions(&object, fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(&object, spliced.finish()).unwrap();

    let view = view(&repository, &ViewOptions::default());
    let segment = find(&view, format!("pg_wal/{}", files::SEGMENT).as_bytes());
    assert!(read_all(&view, segment).is_err(), "in a view");
    assert!(repository.wal_file(&database, &key).is_err(), "whole");
    let target = place.path().join("RECOVERYXLOG");
    assert!(matches!(wal::get(&repository, files::SEGMENT, &target), Err(wal::GetError::Failed(_))));
    assert!(!target.exists());
}
