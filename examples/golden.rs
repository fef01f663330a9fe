//! Writes the golden repository of the present format version: `cargo run --example golden -- tests/golden/v1`
//!
//! Run once per format version, and the result is committed: what a program of that version wrote is read forever.

use std::error::Error;
use std::path::Path;
use std::sync::Arc;

use pgcairn::format::chunk::{ChunkRef, Encoder, Keys, PackId};
use pgcairn::format::manifest::{
    BlockWriter, Database, Description, Entry, File, Node, Place, Sizes, Tablespace, encode_description, path_cmp,
};
use pgcairn::format::map::{Extent, Leaf, LeafRef, SlotChange, encode_changes, encode_index};
use pgcairn::format::pack::{PackKind, PackWriter};
use pgcairn::format::{GRAIN, LEAF_BYTES, SLOT};
use pgcairn::postgres::BackupKind;
use pgcairn::repo::{Repository, keys};
use pgcairn::store::{Body, DirectoryStore, Store};
use pgcairn::write::push::push;

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
    fn new(kind: PackKind, number: u8) -> Result<Self> {
        let keys = Keys::new(b"");
        let pack = PackWriter::new(kind, keys.seal_kind(), PackId([number; 16]), 0);
        Ok(Self { keys, encoder: Encoder::new(3)?, pack })
    }

    fn add(&mut self, plain: &[u8]) -> Result<ChunkRef> {
        let (id, mut stored) = (self.keys.digest(plain).id, Vec::new());
        self.encoder.encode(&self.keys, &id, plain, &mut stored)?;
        Ok(self.pack.add(id, plain.len(), &stored))
    }

    fn store(self, repository: &Repository) -> Result<()> {
        let key = keys::pack(&repository.stanza, self.pack.id());
        Ok(repository.store.put(&key, Body::Bytes(self.pack.finish().into()))?)
    }
}

fn change(keys: &Keys, slot: &[u8]) -> SlotChange {
    SlotChange { crc: crc32c::crc32c(slot), grains: keys.digest(slot).grains }
}

fn changes(keys: &Keys, file: &[u8]) -> Vec<u8> {
    encode_changes(&file.chunks(SLOT).map(|slot| change(keys, slot)).collect::<Vec<_>>())
}

/// Entries of small files: grouped in chunks, their changes in one chunk.
fn small(packs: &mut Packs) -> Result<Vec<Entry>> {
    let keys = Keys::new(b"");
    let files = files::small();
    let (mut group, mut groups, mut all_changes) = (Vec::new(), Vec::new(), Vec::new());
    let mut places = Vec::new();
    for (_, content) in &files {
        let mut pieces = Vec::new();
        for slot in content.chunks(SLOT) {
            if group.len() + slot.len() > SLOT {
                groups.push(std::mem::take(&mut group));
            }
            pieces.push((groups.len(), group.len(), slot.len()));
            group.extend_from_slice(slot);
        }
        places.push((pieces, all_changes.len() as u32));
        all_changes.extend_from_slice(&changes(&keys, content));
    }
    groups.push(group);
    let groups = groups.iter().map(|group| packs.small.add(group)).collect::<Result<Vec<_>>>()?;
    let changes = packs.changes.add(&all_changes)?;
    let mut entries = Vec::new();
    for ((path, content), (pieces, at)) in files.iter().zip(places) {
        let extent = |(group, offset, len): (usize, usize, usize)| Extent {
            len: len as u32,
            chunk: groups[group],
            offset: offset as u32,
        };
        let extents = pieces.into_iter().map(extent).collect();
        let place = Place::Inline { extents, changes: (!content.is_empty()).then_some((changes, at)) };
        entries.push(file(path, content.len() as u64, crc32c::crc32c(content), place));
    }
    Ok(entries)
}

/// A file with one leaf; its second slot lies in an older backup's chunk and in one of changed grains.
fn mapped(packs: &mut Packs) -> Result<Entry> {
    let (content, grain) = (files::mapped(), GRAIN as u32);
    let mut before = content.clone();
    before[SLOT + GRAIN..SLOT + 3 * GRAIN].copy_from_slice(&files::rows(1, 4 * SLOT)[SLOT + GRAIN..SLOT + 3 * GRAIN]);
    let mut leaf = Leaf::default();
    for (number, slot) in before.chunks(SLOT).enumerate() {
        let old = packs.older.add(slot)?;
        if number != 1 {
            leaf.push(&[Extent::whole(old)]);
            continue;
        }
        let fresh = packs.data.add(&files::changed())?;
        leaf.push(&[
            Extent { len: grain, chunk: old, offset: 0 },
            Extent { len: 2 * grain, chunk: fresh, offset: 0 },
            Extent { len: 13 * grain, chunk: old, offset: 3 * grain },
        ]);
    }
    let map = packs.maps.add(&leaf.encode())?;
    let changes = packs.changes.add(&changes(&Keys::new(b""), &content))?;
    let place = Place::Leaves(vec![LeafRef { map, changes }]);
    Ok(file(b"base/5/16384", content.len() as u64, crc32c::crc32c(&content), place))
}

/// A file of more than 64 leaves, so with an index; all its slots have the same content.
fn huge(packs: &mut Packs) -> Result<Entry> {
    let keys = Keys::new(b"");
    let slot = files::huge_slot();
    let chunk = packs.data.add(&slot)?;
    let part = files::HUGE_BYTES - 64 * LEAF_BYTES - SLOT as u64;
    let tail = Extent { len: part as u32, chunk, offset: 0 };
    let leaf_of = |slots: &[Extent]| {
        let mut leaf = Leaf::default();
        slots.iter().for_each(|slot| leaf.push(&[*slot]));
        leaf.encode()
    };
    let whole = LeafRef {
        map: packs.maps.add(&leaf_of(&vec![Extent::whole(chunk); 256]))?,
        changes: packs.changes.add(&encode_changes(&vec![change(&keys, &slot); 256]))?,
    };
    let last = LeafRef {
        map: packs.maps.add(&leaf_of(&[Extent::whole(chunk), tail]))?,
        changes: packs.changes.add(&encode_changes(&[change(&keys, &slot), change(&keys, &slot[..part as usize])]))?,
    };
    let leaves = [vec![whole; 64], vec![last]].concat();
    let index = packs.maps.add(&encode_index(&leaves))?;
    let of_slot = crc32c::crc32c(&slot);
    let crc = (0..64 * 256 + 1).fold(0, |crc, _| crc32c::crc32c_combine(crc, of_slot, SLOT));
    let crc = crc32c::crc32c_combine(crc, crc32c::crc32c(&slot[..part as usize]), part as usize);
    Ok(file(b"base/5/16500", files::HUGE_BYTES, crc, Place::Index(vec![index])))
}

fn file(path: &[u8], size: u64, crc: u32, place: Place) -> Entry {
    Entry { path: path.to_vec(), mode: 0o600, mtime: MTIME, node: Node::File(File { size, crc, place }) }
}

struct Packs {
    /// of the backup before this one
    older: Packer,
    data: Packer,
    small: Packer,
    maps: Packer,
    changes: Packer,
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
        wal_segment_size: 1 << 20,
        checksums: true,
    }
}

fn description() -> Description {
    Description {
        label: files::LABEL.into(),
        kind: BackupKind::Full,
        prior: None,
        pgcairn: "0.1.0".into(),
        start_time: MTIME,
        stop_time: MTIME + 60,
        start_lsn: "0/1200028".into(),
        stop_lsn: "0/1200100".into(),
        timeline: 2,
        wal_start: files::SEGMENT.into(),
        wal_stop: files::SEGMENT.into(),
        wal_stored: false,
        database: database(),
        data_directory: "/var/lib/postgresql/15/main".into(),
        owner: "postgres".into(),
        group: "postgres".into(),
        superuser: None,
        backup_label: "START WAL LOCATION: 0/1200028 (file 000000020000000000000012)\n".into(),
        tablespace_map: format!("{} {}\n", files::TABLESPACE, files::TABLESPACE_PATH),
        tablespaces: vec![Tablespace { oid: files::TABLESPACE, path: files::TABLESPACE_PATH.into() }],
        page_errors: Vec::new(),
        sizes: Sizes { database: 1, read: 1, stored_new: 1, stored_all: 1, files: 11 },
    }
}

fn main() -> Result<()> {
    let root = std::env::args().nth(1).ok_or("usage: golden DIRECTORY")?;
    let store: Arc<dyn Store> = Arc::new(DirectoryStore::open(Path::new(&root), true)?);
    let repository = Repository::new(store, files::STANZA)?;
    repository.create_stanza(database())?;

    let mut packs = Packs {
        older: Packer::new(PackKind::Data, 0x01)?,
        data: Packer::new(PackKind::Data, 0x02)?,
        small: Packer::new(PackKind::Small, 0x03)?,
        maps: Packer::new(PackKind::Map, 0x04)?,
        changes: Packer::new(PackKind::Change, 0x05)?,
    };
    let mut entries = small(&mut packs)?;
    entries.extend([mapped(&mut packs)?, huge(&mut packs)?]);
    for pack in [packs.older, packs.data, packs.small, packs.maps, packs.changes] {
        pack.store(&repository)?;
    }
    let directories = ["", "base", "base/5", "global", "pg_tblspc", "pg_wal", "pg_wal/archive_status"];
    let in_tablespace = ["pg_tblspc/16400/PG_15_202209061", "pg_tblspc/16400/PG_15_202209061/5"];
    entries.extend(directories.into_iter().chain(in_tablespace).map(|path| Entry {
        path: path.into(),
        mode: 0o700,
        mtime: MTIME,
        node: Node::Directory,
    }));
    let link = Node::Symlink(files::TABLESPACE_PATH.into());
    entries.push(Entry { path: b"pg_tblspc/16400".to_vec(), mode: 0o777, mtime: MTIME, node: link });
    entries.sort_by(|a, b| path_cmp(&a.path, &b.path));

    let wal = tempfile::tempdir()?;
    for (name, content) in [(files::SEGMENT, &files::segment()[..]), (files::HISTORY, files::HISTORY_TEXT)] {
        std::fs::write(wal.path().join(name), content)?;
        push(&repository, &wal.path().join(name), 3)?;
    }

    let mut manifest = Packer::new(PackKind::Manifest, 0x06)?;
    for plain in encode_description(&description())? {
        manifest.add(&plain)?;
    }
    // two blocks, as a larger manifest has
    for half in entries.chunks(entries.len().div_ceil(2)) {
        let mut blocks = BlockWriter::default();
        for entry in half {
            if let Some(plain) = blocks.push(entry) {
                manifest.add(&plain)?;
            }
        }
        if let Some(plain) = blocks.finish() {
            manifest.add(&plain)?;
        }
    }
    let key = keys::manifest(files::STANZA, files::LABEL);
    repository.store.put(&key, Body::Bytes(manifest.pack.finish().into()))?;
    repository.enter(&description())?;
    Ok(())
}
