//! Writes the golden repositories of the present format version: `cargo run --example golden -- tests/golden/v1`, and beside it
//! `tests/golden/v1-encrypted-proof`. (`v1-encrypted` was written before manifests carried a proof; nothing writes it any more.)
//!
//! Run once per format version, and the result is committed: what a program of that version wrote is read forever.

use std::collections::HashMap;
use std::error::Error;
use std::path::Path;
use std::sync::Arc;

use pgcairn::archive::push::push;
use pgcairn::backup::pack_usage::Weights;
use pgcairn::format::chunk::{ChunkRef, Encoder, Keys, PackId};
use pgcairn::format::cipher_key::Passphrase;
use pgcairn::format::manifest::{
    BlockWriter, Database, Description, Entry, File, Node, PackUse, Place, Sizes, Tablespace, encode_description,
    encode_own, encode_packs, encode_proof, path_cmp,
};
use pgcairn::format::map::{Extent, Leaf, LeafRef, SlotChange, encode_changes, encode_changes_since, encode_index};
use pgcairn::format::pack::{PackKind, PackWriter};
use pgcairn::format::{CHUNK, GRAIN, LEAF_BYTES, SLOT};
use pgcairn::postgres::BackupKind;
use pgcairn::repo::{Repository, layout};
use pgcairn::store::{Body, DirectoryStore, Store};

#[path = "../tests/golden/files.rs"]
mod files;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const MTIME: i64 = 1_704_628_800;

/// Chunks on their way into one pack.
struct Packer {
    keys: Keys,
    encoder: Encoder,
    pack: PackWriter,
}

impl Packer {
    fn new(keys: &Keys, kind: PackKind, number: u8) -> Result<Self> {
        let pack = PackWriter::new(kind, keys.seal_kind(), PackId([number; 16]), 0);
        Ok(Self { keys: keys.clone(), encoder: Encoder::new(3)?, pack })
    }

    fn add(&mut self, plain: &[u8]) -> Result<ChunkRef> {
        let (id, mut stored) = (self.keys.digest(plain).id, Vec::new());
        self.encoder.encode(&self.keys, &id, plain, &mut stored)?;
        Ok(self.pack.add(id, plain.len(), &stored))
    }
}

/// One backup in the making.
struct Backup {
    keys: Keys,
    data: Packer,
    small: Packer,
    maps: Packer,
    changes: Packer,
    manifest: Packer,
    entries: Vec<Entry>,
    weights: Weights,
}

/// The file with a map as the full backup stored it.
struct Old {
    run: ChunkRef,
    rest: ChunkRef,
    changes: ChunkRef,
    same: Entry,
}

impl Backup {
    /// A backup whose packs have names made of `first` and the numbers behind it.
    fn new(repository: &Repository, first: u8) -> Result<Self> {
        let keys = repository.keys.clone();
        Ok(Self {
            data: Packer::new(&keys, PackKind::Data, first)?,
            small: Packer::new(&keys, PackKind::Small, first + 1)?,
            maps: Packer::new(&keys, PackKind::Map, first + 2)?,
            changes: Packer::new(&keys, PackKind::Change, first + 3)?,
            manifest: Packer::new(&keys, PackKind::Manifest, first + 4)?,
            keys,
            entries: Vec::new(),
            weights: Weights::default(),
        })
    }

    fn slot_changes(&self, file: &[u8]) -> Vec<SlotChange> {
        let change = |slot| SlotChange { crc: crc32c::crc32c(slot), grains: self.keys.digest(slot).grains };
        file.chunks(SLOT).map(change).collect()
    }

    fn entry(&mut self, path: &[u8], mode: u32, node: Node) {
        self.entries.push(Entry { path: path.to_vec(), mode, mtime: MTIME, identity: None, node });
    }

    fn directories(&mut self, paths: &[&str]) {
        paths.iter().for_each(|path| self.entry(path.as_bytes(), 0o700, Node::Directory));
    }

    fn file(&mut self, path: &[u8], size: u64, crc: u32, place: Place) {
        self.entry(path, 0o600, Node::File(File { size, crc, place }));
    }

    /// `global/pg_control`, which the manifest holds itself, in its first chunk.
    fn control(&mut self, bytes: &[u8]) -> Result<()> {
        let (plain, at) = encode_own(bytes, &self.slot_changes(bytes));
        let chunk = self.manifest.add(&plain)?;
        let extents = vec![Extent { len: bytes.len() as u32, chunk, offset: at.bytes }];
        let place = Place::Inline { extents, changes: Some((chunk, at.changes)) };
        self.file(files::CONTROL, bytes.len() as u64, crc32c::crc32c(bytes), place);
        Ok(())
    }

    /// Small files: grouped in chunks, their changes in one chunk.
    fn small(&mut self, files: &[(&[u8], Vec<u8>)]) -> Result<()> {
        let (mut group, mut groups, mut all_changes) = (Vec::new(), Vec::new(), Vec::new());
        let mut places = Vec::new();
        for (_, content) in files {
            let mut pieces = Vec::new();
            for slot in content.chunks(SLOT) {
                if group.len() + slot.len() > CHUNK {
                    groups.push(std::mem::take(&mut group));
                }
                pieces.push((groups.len(), group.len(), slot.len()));
                group.extend_from_slice(slot);
            }
            places.push((pieces, all_changes.len() as u32));
            if !content.is_empty() {
                all_changes.extend_from_slice(&encode_changes(&self.slot_changes(content)));
            }
        }
        groups.push(group);
        let groups = groups.iter().map(|group| self.small.add(group)).collect::<Result<Vec<_>>>()?;
        let changes = self.changes.add(&all_changes)?;
        for ((path, content), (pieces, at)) in files.iter().zip(places) {
            let extent = |(group, offset, len): (usize, usize, usize)| Extent {
                len: len as u32,
                chunk: groups[group],
                offset: offset as u32,
            };
            let extents: Vec<_> = pieces.into_iter().map(extent).collect();
            self.weights.add_extents(&extents);
            let changes = (!content.is_empty()).then_some((changes, at));
            changes.iter().for_each(|(chunk, _)| self.weights.add_changes(chunk, content.len() as u64));
            let place = Place::Inline { extents, changes };
            self.file(path, content.len() as u64, crc32c::crc32c(content), place);
        }
        Ok(())
    }

    /// A small file as an earlier backup has it.
    fn same(&mut self, entry: &Entry) {
        if let Node::File(File { size, place: Place::Inline { extents, changes: Some((chunk, _)) }, .. }) = &entry.node
        {
            self.weights.add_extents(extents);
            self.weights.add_changes(chunk, *size);
        }
        self.entries.push(entry.clone());
    }

    /// A file with one leaf, stored as a full backup does: runs of eight slots are chunks.
    fn mapped_before(&mut self) -> Result<(ChunkRef, ChunkRef, ChunkRef)> {
        let (content, mut leaf) = (files::mapped_before(), Leaf::default());
        let (run, rest) = (self.data.add(&content[..CHUNK])?, self.data.add(&content[CHUNK..])?);
        content.chunks(SLOT).enumerate().for_each(|(number, slot)| leaf.push(&[stored(run, rest, number, slot.len())]));
        let changes = encode_changes(&self.slot_changes(&content));
        let stored = self.leaf(&leaf, &changes, None)?;
        self.file(files::MAPPED, content.len() as u64, crc32c::crc32c(&content), Place::Leaves(vec![stored]));
        Ok((run, rest, stored.changes))
    }

    /// The same file as an incremental backup leaves it: changed grains of several slots share a chunk, and the changes are
    /// those since the full backup's.
    fn mapped(&mut self, old: &Old) -> Result<()> {
        let (content, grain) = (files::mapped(), GRAIN as u32);
        let (fresh, run) = (self.data.add(&files::changed())?, old.run);
        let mut leaf = Leaf::default();
        for (number, slot) in content.chunks(SLOT).enumerate() {
            let in_run = (number * SLOT) as u32;
            match number {
                1 => leaf.push(&[
                    Extent { len: grain, chunk: run, offset: in_run },
                    Extent { len: 2 * grain, chunk: fresh, offset: 0 },
                    Extent { len: 13 * grain, chunk: run, offset: in_run + 3 * grain },
                ]),
                5 => leaf.push(&[
                    Extent { len: 15 * grain, chunk: run, offset: in_run },
                    Extent { len: grain, chunk: fresh, offset: 2 * grain },
                ]),
                _ => leaf.push(&[stored(run, old.rest, number, slot.len())]),
            }
        }
        let (before, now) = (self.slot_changes(&files::mapped_before()), self.slot_changes(&content));
        let changes = encode_changes_since(old.changes, &before, &now).ok_or("the changes are not worth a base")?;
        let stored = self.leaf(&leaf, &changes, Some(&old.changes))?;
        let place = Place::Leaves(vec![stored]);
        self.file(files::MAPPED, content.len() as u64, crc32c::crc32c(&content), place);
        Ok(())
    }

    fn leaf(&mut self, leaf: &Leaf, changes: &[u8], base: Option<&ChunkRef>) -> Result<LeafRef> {
        let stored = LeafRef { map: self.maps.add(&leaf.encode())?, changes: self.changes.add(changes)? };
        self.weights.add_leaf(leaf, &stored, base);
        Ok(stored)
    }

    /// A file of more than 64 leaves, so with an index; one chunk of eight slots, over and over.
    fn huge(&mut self) -> Result<()> {
        let run = files::huge_run();
        let chunk = self.data.add(&run)?;
        let part = (files::HUGE_BYTES - 64 * LEAF_BYTES) as usize;
        let of_run = self.slot_changes(&run);
        let slot = |number: usize, len: usize| Extent { len: len as u32, chunk, offset: (number % 8 * SLOT) as u32 };
        let mut whole = Leaf::default();
        (0..256).for_each(|number| whole.push(&[slot(number, SLOT)]));
        let first = self.leaf(&whole, &encode_changes(&vec![of_run; 32].concat()), None)?;
        (1..64).for_each(|_| self.weights.add_leaf(&whole, &first, None));
        let mut tail = Leaf::default();
        tail.push(&[slot(0, SLOT)]);
        tail.push(&[slot(1, part - SLOT)]);
        let last = self.leaf(&tail, &encode_changes(&self.slot_changes(&run[..part])), None)?;
        let leaves = [vec![first; 64], vec![last]].concat();
        let index = self.maps.add(&encode_index(&leaves))?;
        self.weights.add_chunk(&index);
        let of_run = crc32c::crc32c(&run);
        let crc = (0..64 * 32).fold(0, |crc, _| crc32c::crc32c_combine(crc, of_run, CHUNK));
        let crc = crc32c::crc32c_combine(crc, crc32c::crc32c(&run[..part]), part);
        self.file(files::HUGE, files::HUGE_BYTES, crc, Place::Index(vec![index]));
        Ok(())
    }

    /// Stores packs and manifest; `sizes` are those of packs, and become those with this backup's.
    fn commit(
        mut self,
        repository: &Repository,
        mut description: Description,
        sizes: &mut HashMap<PackId, u64>,
    ) -> Result<Description> {
        for packer in [self.data, self.small, self.maps, self.changes] {
            if packer.pack.is_empty() {
                continue;
            }
            let (id, bytes) = (packer.pack.id(), packer.pack.finish());
            sizes.insert(id, bytes.len() as u64);
            description.sizes.stored_new += bytes.len() as u64;
            repository.store.put(&layout::pack(&repository.stanza, id), Body::Bytes(bytes.into()))?;
        }
        self.entries.sort_by(|a, b| path_cmp(&a.path, &b.path));
        for entry in &self.entries {
            if let Node::File(file) = &entry.node {
                description.sizes.files += 1;
                description.sizes.database += file.size;
                description.sizes.read += file.size;
            }
        }
        let in_table = |(pack, weight)| PackUse { pack, size: sizes[&pack], weight };
        let packs: Vec<_> = self.weights.sorted().into_iter().map(in_table).collect();
        description.sizes.stored_all = packs.iter().map(|pack| pack.weight.min(pack.size)).sum();
        let mut plains = encode_description(&description)?;
        // two blocks, as a larger manifest has
        for half in self.entries.chunks(self.entries.len().div_ceil(2)) {
            let mut blocks = BlockWriter::default();
            plains.extend(half.iter().filter_map(|entry| blocks.push(entry)));
            plains.extend(blocks.finish());
        }
        plains.extend(encode_packs(&packs));
        plains.iter().try_for_each(|plain| self.manifest.add(plain).map(drop))?;
        let (id, chunks) = (self.manifest.pack.id(), self.manifest.pack.chunks());
        if let Some(proof) = self.keys.manifest_proof(&description.label, id, chunks) {
            self.manifest.add(&encode_proof(&proof))?;
        }
        let key = layout::manifest(&repository.stanza, &description.label);
        repository.store.put(&key, Body::Bytes(self.manifest.pack.finish().into()))?;
        Ok(description)
    }
}

/// Where a full backup stored a slot: in the chunk of the first eight, or in that of the others.
fn stored(run: ChunkRef, rest: ChunkRef, number: usize, len: usize) -> Extent {
    let chunk = if number < 8 { run } else { rest };
    Extent { len: len as u32, chunk, offset: (number % 8 * SLOT) as u32 }
}

fn database() -> Database {
    Database {
        id: 1,
        version: 15,
        system_id: files::SYSTEM_ID,
        catalog_version: 202_209_061,
        control_version: 1300,
        page_size: 8192,
        segment_size: 4 << 30,
        wal_page_size: 8192,
        wal_segment_size: files::SEGMENT_BYTES as u64,
        checksums: true,
    }
}

fn description(label: &str, kind: BackupKind, prior: Option<&str>, start_time: i64) -> Description {
    Description {
        label: label.into(),
        kind,
        prior: prior.map(Into::into),
        pgcairn: "0.1.0".into(),
        start_time,
        stop_time: start_time + 60,
        start_lsn: "0/2400028".into(),
        stop_lsn: "0/2400100".into(),
        timeline: 2,
        wal_start: files::SEGMENT.into(),
        wal_stop: files::SEGMENT.into(),
        wal_stored: false,
        database: database(),
        data_directory: "/var/lib/postgresql/15/main".into(),
        source: None,
        owner: "postgres".into(),
        group: "postgres".into(),
        superuser: None,
        backup_label: "START WAL LOCATION: 0/2400028 (file 000000020000000000000012)\n".into(),
        tablespace_map: String::new(),
        tablespaces: Vec::new(),
        databases: Vec::new(),
        page_errors: Vec::new(),
        sizes: Sizes::default(),
    }
}

/// The full backup: a file with a map, a small file, pg_control.
fn full(repository: &Repository, sizes: &mut HashMap<PackId, u64>) -> Result<Old> {
    let mut backup = Backup::new(repository, 0x01)?;
    backup.directories(&["", "base", "base/5", "global", "pg_wal"]);
    backup.control(&files::control(1))?;
    backup.small(&files::small()[..1])?;
    let same = backup.entries[backup.entries.len() - 1].clone();
    let (run, rest, changes) = backup.mapped_before()?;
    let described = description(files::FULL, BackupKind::Full, None, MTIME + 60);
    repository.enter(&backup.commit(repository, described, sizes)?)?;
    Ok(Old { run, rest, changes, same })
}

/// The incremental backup: everything there is.
fn incremental(repository: &Repository, old: &Old, sizes: &mut HashMap<PackId, u64>) -> Result<()> {
    let mut backup = Backup::new(repository, 0x11)?;
    backup.directories(&["", "base", "base/5", "global", "pg_tblspc", "pg_wal", "pg_wal/archive_status"]);
    backup.directories(&["pg_tblspc/16400/PG_15_202209061", "pg_tblspc/16400/PG_15_202209061/5"]);
    backup.entry(b"pg_tblspc/16400", 0o777, Node::Symlink(files::TABLESPACE_PATH.into()));
    backup.control(&files::control(2))?;
    backup.same(&old.same);
    backup.small(&files::small()[1..])?;
    backup.mapped(old)?;
    backup.huge()?;
    let described = Description {
        tablespace_map: format!("{} {}\n", files::TABLESPACE, files::TABLESPACE_PATH),
        tablespaces: vec![Tablespace { oid: files::TABLESPACE, name: None, path: files::TABLESPACE_PATH.into() }],
        ..description(files::LABEL, BackupKind::Incr, Some(files::FULL), MTIME + 108_000)
    };
    repository.enter(&backup.commit(repository, described, sizes)?)?;
    Ok(())
}

/// A full backup in packs that are encrypted, and nothing but packs.
fn encrypted(repository: &Repository) -> Result<()> {
    let mut backup = Backup::new(repository, 0x01)?;
    backup.directories(&["", "base", "base/5", "global"]);
    backup.control(&files::control(3))?;
    backup.small(&[(files::SAME, b"15\n".to_vec()), (files::MAPPED, files::hidden())])?;
    let described = description(files::FULL, BackupKind::Full, None, MTIME + 60);
    backup.commit(repository, Description { wal_stored: true, ..described }, &mut HashMap::new())?;
    Ok(())
}

fn repository(root: &str, keys: Keys) -> Result<Repository> {
    let store: Arc<dyn Store> = Arc::new(DirectoryStore::open(Path::new(root), true)?);
    Ok(Repository { keys, ..Repository::new(store, files::STANZA)? })
}

fn main() -> Result<()> {
    let root = std::env::args().nth(1).ok_or("usage: golden DIRECTORY")?;
    let plain = repository(&root, Keys::new(b""))?;
    plain.create_stanza(database())?;
    let wal = tempfile::tempdir()?;
    for (name, content) in [(files::SEGMENT, &files::segment()[..]), (files::HISTORY, files::HISTORY_TEXT)] {
        std::fs::write(wal.path().join(name), content)?;
        push(&plain, &wal.path().join(name), 3)?;
    }
    let mut sizes = HashMap::new();
    let old = full(&plain, &mut sizes)?;
    incremental(&plain, &old, &mut sizes)?;
    let encrypted_root = format!("{root}-encrypted-proof");
    encrypted(&repository(&encrypted_root, Keys::with_manifest_proof(files::SECRET))?)?;
    let store: Arc<dyn Store> = Arc::new(DirectoryStore::open(Path::new(&encrypted_root), true)?);
    let passphrase = Passphrase::new(files::PASSPHRASE.into()).ok_or("no passphrase")?;
    Repository::new(store, files::LOCKED)?.create_secret(&passphrase)?.create_stanza(database())?;
    Ok(())
}
