//! A stanza of small made-up backups, on a store whose clock the test sets and that can be made to fail.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use bytes::Bytes;
use parking_lot::Mutex;

use crate::format::chunk::{ChunkRef, Encoder, PackId};
use crate::format::manifest::{
    BlockWriter, Database, Description, Entry, File, Node, PackUse, Place, Sizes, encode_description, encode_packs,
};
use crate::format::map::{Extent, Leaf, LeafRef, SlotChange, encode_changes};
use crate::format::pack::{PackKind, PackWriter};
use crate::format::seal::SealKind;
use crate::format::{CHUNK, GRAIN, LEAF_BYTES, SLOT};
use crate::postgres::wal::records::tests::Writer;
use crate::postgres::{BackupKind, Label, Lsn, SegmentName, SegmentSize, Timeline};
use crate::repo::{Repository, layout};
use crate::store::{Body, Fault, FaultPlan, MemoryStore, Page, Result, Store};

mod schedule;

pub(crate) const DAY: i64 = 86_400;
/// 2024-01-01 00:00:00 UTC
pub(crate) const START: i64 = 1_704_067_200;
/// Bytes of the file that has a file map.
pub(crate) const LARGE: u64 = LEAF_BYTES + SLOT as u64 + 100;

/// A store in memory with a clock of its own.
#[derive(Debug)]
pub(crate) struct Clocked {
    inner: MemoryStore,
    now: Arc<AtomicI64>,
    modified: Mutex<HashMap<String, i64>>,
}

impl Store for Clocked {
    fn get(&self, key: &str) -> Result<Bytes> {
        self.inner.get(key)
    }
    fn get_range(&self, key: &str, offset: u64, len: u64) -> Result<Bytes> {
        self.inner.get_range(key, offset, len)
    }
    fn put(&self, key: &str, body: Body) -> Result<()> {
        self.modified.lock().insert(key.to_owned(), self.now.load(Ordering::SeqCst));
        self.inner.put(key, body)
    }
    fn size(&self, key: &str) -> Result<Option<u64>> {
        self.inner.size(key)
    }
    fn list(&self, prefix: &str, after: Option<&str>) -> Result<Page> {
        let mut page = self.inner.list(prefix, after)?;
        let modified = self.modified.lock();
        page.objects.iter_mut().for_each(|object| object.modified = modified[&object.key]);
        Ok(page)
    }
    fn names(&self, prefix: &str) -> Result<Vec<String>> {
        self.inner.names(prefix)
    }
    fn delete(&self, keys: &[String]) -> Result<()> {
        self.inner.delete(keys)
    }
    fn url(&self) -> &str {
        self.inner.url()
    }
}

/// The stanza.
pub(crate) struct Made {
    pub(crate) repository: Repository,
    pub(crate) plan: Arc<FaultPlan>,
    now: Arc<AtomicI64>,
    labels: Vec<Label>,
    /// what the last backup's file map names, slot by slot
    slots: Vec<ChunkRef>,
    seed: u64,
    next_segment: u64,
    encoder: Encoder,
}

impl Made {
    pub(crate) fn new() -> Self {
        let now = Arc::new(AtomicI64::new(START));
        Self::with(Clocked { inner: MemoryStore::new(), now: now.clone(), modified: Mutex::default() }, now)
    }

    /// On another store, which has its own clock.
    pub(crate) fn on(store: impl Store + 'static) -> Self {
        Self::with(store, Arc::new(AtomicI64::new(START)))
    }

    fn with(store: impl Store + 'static, now: Arc<AtomicI64>) -> Self {
        let store = Fault::new(store);
        let plan = store.plan();
        let repository = Repository::new(Arc::new(store), "main").unwrap();
        repository.create_stanza(database()).unwrap();
        let encoder = Encoder::new(1).unwrap();
        Self { repository, plan, now, labels: Vec::new(), slots: Vec::new(), seed: 1, next_segment: 1, encoder }
    }

    pub(crate) fn now(&self) -> i64 {
        self.now.load(Ordering::SeqCst)
    }

    pub(crate) fn pass(&self, seconds: i64) {
        self.now.fetch_add(seconds, Ordering::SeqCst);
    }

    pub(crate) fn labels(&self) -> Vec<String> {
        self.repository.labels().unwrap()
    }

    pub(crate) fn keys(&self, prefix: &str) -> Vec<String> {
        let mut keys = Vec::new();
        super::mark::each_object(&self.repository, prefix, |object| {
            keys.push(object.key.clone());
            Ok(())
        })
        .unwrap();
        keys
    }

    fn random(&mut self) -> u64 {
        self.seed = self.seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.seed >> 20
    }

    fn pack_id(&mut self) -> PackId {
        let mut id = PackId::default();
        id.0[..8].copy_from_slice(&self.random().to_be_bytes());
        id.0[8..].copy_from_slice(&self.random().to_be_bytes());
        id
    }

    pub(crate) fn chunk(&mut self, pack: &mut PackWriter, plain: &[u8]) -> ChunkRef {
        let id = self.repository.keys.digest(plain).id;
        let mut stored = Vec::new();
        self.encoder.encode(&self.repository.keys, &id, plain, &mut stored).unwrap();
        pack.add(id, plain.len(), &stored)
    }

    fn put(&self, pack: PackWriter) {
        let key = layout::pack(&self.repository.stanza, pack.id());
        self.repository.store.put(&key, Body::Bytes(pack.finish().into())).unwrap();
    }

    /// A pack that nothing refers to, as a backup that died leaves it.
    pub(crate) fn garbage(&mut self) -> String {
        let mut pack = PackWriter::new(PackKind::Data, SealKind::Hashed, self.pack_id(), 0);
        let plain = self.random().to_le_bytes();
        self.chunk(&mut pack, &plain);
        let key = layout::pack(&self.repository.stanza, pack.id());
        self.put(pack);
        key
    }

    /// A backup now. Of the large file's slots it stores some anew and takes the others from the backup before it, whatever
    /// kind it is.
    pub(crate) fn backup(&mut self, kind: BackupKind) -> String {
        let entries = self.store_files();
        let label = self.next_label(kind);
        let wal = (self.archive_segment(), self.archive_segment());
        let full = self.labels.iter().rfind(|label| label.kind() == BackupKind::Full).map(Label::to_string);
        let prior = match kind {
            BackupKind::Full => None,
            BackupKind::Diff => full,
            BackupKind::Incr => self.labels.last().map(Label::to_string),
        };
        let description = description(&label.to_string(), kind, prior, wal, self.now());
        self.commit(&entries, &description);
        self.archive_segment();
        self.labels.push(label);
        label.to_string()
    }

    /// A full backup that stores its WAL; `content` says what is in its segments.
    pub(crate) fn backup_with_wal(&mut self, content: impl Fn(SegmentName) -> Vec<u8>) -> String {
        let mut entries = self.store_files();
        let label = self.next_label(BackupKind::Full);
        let wal = (segment(1, self.next_segment), segment(1, self.next_segment + 1));
        self.next_segment += 3;
        let mut pack = PackWriter::new(PackKind::Data, SealKind::Hashed, self.pack_id(), 0);
        let mut files = vec![Entry { path: b"pg_wal".into(), ..entries[0].clone() }];
        for segment in [wal.0, wal.1] {
            let bytes = content(segment);
            let chunk = self.chunk(&mut pack, &bytes);
            let extents: Vec<Extent> = (0..bytes.len().div_ceil(SLOT))
                .map(|slot| Extent {
                    chunk,
                    offset: (slot * SLOT) as u32,
                    len: (bytes.len() - slot * SLOT).min(SLOT) as u32,
                })
                .collect();
            let none = SlotChange { crc: 0, grains: vec![0; SLOT / GRAIN] };
            let changes = self.chunk(&mut pack, &encode_changes(&vec![none; extents.len()]));
            let place = match segment == wal.0 {
                true => Place::Inline { extents, changes: Some((changes, 0)) },
                false => {
                    let mut leaf = Leaf::default();
                    extents.iter().for_each(|extent| leaf.push(&[*extent]));
                    Place::Leaves(vec![LeafRef { map: self.chunk(&mut pack, &leaf.encode()), changes }])
                }
            };
            let node = Node::File(File { size: bytes.len() as u64, crc: 0, place });
            let path = format!("pg_wal/{segment}").into_bytes();
            files.push(Entry { path, mode: 0o600, mtime: 0, identity: None, node });
        }
        self.put(pack);
        entries.splice(3..3, files);
        let of = description(&label.to_string(), BackupKind::Full, None, wal, self.now());
        self.commit(&entries, &Description { wal_stored: true, ..of });
        self.labels.push(label);
        label.to_string()
    }

    /// The key of an archived segment.
    pub(crate) fn wal_key(&self, number: u64) -> String {
        let name = segment(1, number).to_string();
        self.keys("archive/main/15-1/").into_iter().find(|key| key.contains(&name)).unwrap()
    }

    pub(crate) fn remove(&self, key: &str) {
        self.repository.store.delete(&[key.to_owned()]).unwrap();
    }

    /// Puts the WAL of another server with the same system identifier in a segment's place: name, header and checksums are right.
    pub(crate) fn swap_wal(&mut self, number: u64) {
        self.remove(&self.wal_key(number));
        self.archive_bytes(&segment(1, number).to_string(), &other_wal(segment(1, number)));
    }

    /// Manifests of `count` full backups, each of which says that it needs `packs` packs; none of these is there. They share
    /// their WAL.
    pub(crate) fn many(&mut self, count: u64, packs: u64) {
        self.archive_segment();
        self.archive_segment();
        let id = |number: u64| {
            let mut id = PackId::default();
            id.0[..8].copy_from_slice(&number.to_be_bytes());
            id
        };
        for number in 0..count {
            let own = packs - 100..packs;
            let ids = (0..packs).map(|pack| if own.contains(&pack) { packs + number * 100 + pack } else { pack });
            let uses: Vec<PackUse> = ids.map(|number| PackUse { pack: id(number), size: 1, weight: 1 }).collect();
            let label = self.next_label_quickly();
            let wal = (segment(1, 1), segment(1, 2));
            let description = description(&label.to_string(), BackupKind::Full, None, wal, self.now());
            let directory = Entry { path: Vec::new(), mode: 0o700, mtime: 0, identity: None, node: Node::Directory };
            self.put_manifest(&[directory], &uses, &description);
            self.labels.push(label);
            self.pass(DAY);
        }
    }

    fn next_label_quickly(&self) -> Label {
        Label::next(BackupKind::Full, None, self.now(), self.labels.last().copied()).unwrap()
    }

    /// The packs of a backup that dies before its manifest.
    pub(crate) fn die(&mut self) {
        let slots = self.slots.clone();
        self.store_files();
        self.slots = slots;
    }

    fn next_label(&mut self, kind: BackupKind) -> Label {
        let there = self.repository.labels().unwrap();
        self.labels.retain(|label| there.contains(&label.to_string()));
        let newest = self.labels.last().copied();
        let full = self.labels.iter().copied().rfind(|label| label.kind() == BackupKind::Full);
        Label::next(kind, full, self.now(), newest).unwrap()
    }

    fn store_files(&mut self) -> Vec<Entry> {
        let (data_id, small_id, map_id) = (self.pack_id(), self.pack_id(), self.pack_id());
        let mut data = PackWriter::new(PackKind::Data, SealKind::Hashed, data_id, 0);
        let count = LARGE.div_ceil(SLOT as u64) as usize;
        let is_first = self.slots.is_empty();
        for slot in 0..count {
            if !is_first && !self.random().is_multiple_of(40) {
                continue;
            }
            let len = if slot + 1 == count { 100 } else { SLOT };
            let mut plain = vec![slot as u8; len];
            plain[..8].copy_from_slice(&self.random().to_le_bytes());
            let chunk = self.chunk(&mut data, &plain);
            match is_first {
                true => self.slots.push(chunk),
                false => self.slots[slot] = chunk,
            }
        }
        let mut map = PackWriter::new(PackKind::Map, SealKind::Hashed, map_id, 0);
        let leaves: Vec<LeafRef> = (self.slots.clone().chunks((LEAF_BYTES / SLOT as u64) as usize))
            .map(|slots| {
                let mut leaf = Leaf::default();
                slots.iter().for_each(|slot| leaf.push(&[Extent::whole(*slot)]));
                let changes: Vec<SlotChange> = slots
                    .iter()
                    .map(|slot| SlotChange { crc: 0, grains: vec![0; (slot.plain_len as usize).div_ceil(GRAIN)] })
                    .collect();
                LeafRef {
                    map: self.chunk(&mut map, &leaf.encode()),
                    changes: self.chunk(&mut map, &encode_changes(&changes)),
                }
            })
            .collect();
        let mut small = PackWriter::new(PackKind::Small, SealKind::Hashed, small_id, 0);
        let text = format!("small file {}", self.random());
        let plain = self.chunk(&mut small, text.as_bytes());
        let changes = self.chunk(&mut small, &encode_changes(&[SlotChange { crc: 0, grains: vec![0] }]));
        let inline = Place::Inline { extents: vec![Extent::whole(plain)], changes: Some((changes, 0)) };
        if !data.is_empty() {
            self.put(data);
        }
        self.put(map);
        self.put(small);
        let file = |path: &str, size, place| {
            let node = Node::File(File { size, crc: 0, place });
            Entry { path: path.into(), mode: 0o600, mtime: 0, identity: None, node }
        };
        let directory =
            |path: &str| Entry { path: path.into(), mode: 0o700, mtime: 0, identity: None, node: Node::Directory };
        vec![
            directory(""),
            directory("base"),
            file("base/large", LARGE, Place::Leaves(leaves)),
            file("small", text.len() as u64, inline),
        ]
    }

    /// The packs of these entries and of the slots of the large file.
    fn packs_of(&self, entries: &[Entry]) -> Vec<PackUse> {
        let mut chunks = self.slots.clone();
        for entry in entries {
            match &entry.node {
                Node::File(File { place: Place::Inline { extents, changes }, .. }) => {
                    chunks.extend(extents.iter().map(|extent| extent.chunk));
                    chunks.extend(changes.iter().map(|(chunk, _)| *chunk));
                }
                Node::File(File { place: Place::Leaves(leaves), .. }) => {
                    chunks.extend(leaves.iter().flat_map(|leaf| [leaf.map, leaf.changes]));
                }
                _ => {}
            }
        }
        let sizes = self.repository.packs().unwrap();
        let mut weights = BTreeMap::new();
        for chunk in chunks {
            *weights.entry(chunk.pack).or_default() += u64::from(chunk.stored_len);
        }
        weights.into_iter().map(|(pack, weight)| PackUse { pack, size: sizes[&pack], weight }).collect()
    }

    fn commit(&mut self, entries: &[Entry], description: &Description) {
        self.put_manifest(entries, &self.packs_of(entries), description);
        self.repository.enter(description).unwrap();
    }

    fn put_manifest(&mut self, entries: &[Entry], packs: &[PackUse], description: &Description) {
        let mut pack = PackWriter::new(PackKind::Manifest, SealKind::Hashed, self.pack_id(), 0);
        let mut parts = encode_description(description).unwrap();
        let mut writer = BlockWriter::default();
        parts.extend(entries.iter().filter_map(|entry| writer.push(entry)));
        parts.extend(writer.finish());
        parts.extend(encode_packs(packs));
        for part in &parts {
            self.chunk(&mut pack, part);
        }
        let key = layout::manifest(&self.repository.stanza, &description.label);
        self.repository.store.put(&key, Body::Bytes(pack.finish().into())).unwrap();
    }

    /// The next segment of the archive.
    pub(crate) fn archive_segment(&mut self) -> SegmentName {
        let segment = segment(1, self.next_segment);
        self.next_segment += 1;
        self.archive_file(&segment.to_string(), segment);
        segment
    }

    /// One file of the archive, as large as a segment, with the header of `segment`.
    pub(crate) fn archive_file(&mut self, name: &str, segment: SegmentName) {
        self.archive_bytes(name, &wal_bytes(segment));
    }

    pub(crate) fn archive_bytes(&mut self, name: &str, bytes: &[u8]) {
        let ids: Vec<_> = bytes.chunks(CHUNK).map(|plain| self.repository.keys.digest(plain).id).collect();
        let content = self.repository.keys.file(ids.iter().copied());
        let mut pack = PackWriter::new(PackKind::Wal, SealKind::Hashed, content, 0);
        for plain in bytes.chunks(CHUNK) {
            self.chunk(&mut pack, plain);
        }
        let key = self.repository.archive(&database()).key(name, content, false);
        self.repository.store.put(&key, Body::Bytes(pack.finish().into())).unwrap();
    }

    /// Names in the archive.
    pub(crate) fn archived(&self) -> Vec<String> {
        let mut names = Vec::new();
        self.repository.archive(&database()).files(|name, _| names.push(name.to_owned())).unwrap();
        names
    }

    /// Demands that everything the manifests refer to can be read.
    #[track_caller]
    pub(crate) fn assert_sound(&self) {
        let reader = crate::repo::chunks::ChunkReader::new(&self.repository).unwrap();
        for label in self.labels() {
            for of in self.repository.manifest_packs(&label).unwrap() {
                let key = layout::pack(&self.repository.stanza, of.pack);
                assert!(self.repository.store.size(&key).unwrap().is_some(), "{label} lost {key}");
            }
            let mut chunks = BTreeMap::new();
            let description = self
                .repository
                .manifest(&label, |entry| {
                    if let Node::File(File { place: Place::Inline { extents, .. }, .. }) = entry.node {
                        chunks.extend(extents.iter().map(|extent| (extent.chunk.id, extent.chunk)));
                    }
                })
                .unwrap();
            for chunk in chunks.values() {
                reader.read(chunk, None).unwrap();
            }
            for name in [&description.wal_start, &description.wal_stop] {
                assert!(self.archived().contains(name), "{label} lost {name}");
            }
        }
    }
}

pub(crate) fn segment(timeline: u32, number: u64) -> SegmentName {
    SegmentName::of_number(Timeline(timeline), number, SegmentSize::new(database().wal_segment_size).unwrap())
}

/// Segments of 1 MiB, so that they are quickly made.
pub(crate) fn database() -> Database {
    Database {
        id: 1,
        version: 15,
        system_id: 7_300_000_000_000_000_001,
        catalog_version: 202_209_061,
        control_version: 1300,
        page_size: 8192,
        segment_size: 1 << 30,
        wal_page_size: 8192,
        wal_segment_size: 1 << 20,
        checksums: true,
    }
}

/// Bytes of a segment before the checkpoint that begins it, and up to the end of that, which is all that is in it.
const CHECKPOINT: (u64, u64) = (40, 160);

/// A segment that begins with a checkpoint.
pub(crate) fn wal_bytes(segment: SegmentName) -> Vec<u8> {
    let database = database();
    let size = SegmentSize::new(database.wal_segment_size).unwrap();
    let number = segment.number(size).unwrap();
    let mut wal = Writer::of(segment.timeline().0, number, database.system_id);
    let redo = Lsn(size.first_lsn(number).unwrap().0 + CHECKPOINT.0);
    assert_eq!(wal.checkpoint(redo), redo);
    assert_eq!(wal.end().0 % database.wal_segment_size, CHECKPOINT.1);
    wal.segments().remove(0)
}

/// Sound WAL of another server in a segment of this name.
pub(crate) fn other_wal(segment: SegmentName) -> Vec<u8> {
    let number = segment.number(SegmentSize::new(database().wal_segment_size).unwrap()).unwrap();
    let mut other = Writer::of(segment.timeline().0, number, database().system_id);
    other.commit(700, 1);
    other.segments().remove(0)
}

/// Where a backup starts in its first segment, where it ends in its last, and its `backup_label`.
pub(crate) fn backup_positions((first, last): (SegmentName, SegmentName)) -> (Lsn, Lsn, String) {
    let size = SegmentSize::new(database().wal_segment_size).unwrap();
    let at = |segment: SegmentName, bytes| segment.first_lsn(size).unwrap().checked_add(bytes).unwrap();
    let start = at(first, CHECKPOINT.0);
    // a standby writes no record that ends a backup
    let label = format!(
        "START WAL LOCATION: {start} (file {first})\nCHECKPOINT LOCATION: {start}\nBACKUP METHOD: streamed\n\
         BACKUP FROM: standby\nSTART TIME: 2024-01-01 00:00:00 UTC\nLABEL: test\nSTART TIMELINE: {}\n",
        first.timeline()
    );
    (start, at(last, CHECKPOINT.1), label)
}

fn description(
    label: &str,
    kind: BackupKind,
    prior: Option<String>,
    wal: (SegmentName, SegmentName),
    now: i64,
) -> Description {
    let (start, stop, backup_label) = backup_positions(wal);
    Description {
        label: label.to_owned(),
        kind,
        prior,
        pgcairn: "test".into(),
        start_time: now,
        stop_time: now,
        start_lsn: start.to_string(),
        stop_lsn: stop.to_string(),
        timeline: 1,
        wal_start: wal.0.to_string(),
        wal_stop: wal.1.to_string(),
        wal_stored: false,
        database: database(),
        data_directory: "/data".into(),
        source: None,
        owner: "postgres".into(),
        group: "postgres".into(),
        superuser: None,
        backup_label,
        tablespace_map: String::new(),
        tablespaces: Vec::new(),
        databases: Vec::new(),
        page_errors: Vec::new(),
        sizes: Sizes::default(),
    }
}
