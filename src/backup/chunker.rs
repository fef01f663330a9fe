//! Files into slots: read, check page checksums, hash, compress what is new, and note where everything is.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;

use super::dedup::{Dedup, Seen};
use super::extents::{Member, Pending, Placing, SlotRead};
use super::pack_usage::Weights;
use super::packer::{Lane, Stored, Uploads};
use super::parent::{OldSlots, Parent, Part};
use super::scan::Scanned;
use super::source::{BadPage, Origin, Pages, Source};
use crate::error::{Error, Result};
use crate::format::chunk::{ChunkId, ChunkRef, Encoder, Keys};
use crate::format::manifest::File;
use crate::format::map::{Extent, LeafRef, SlotChange, encode_changes, encode_changes_since};
use crate::format::pack::PackKind;
use crate::format::{CHUNK, GRAIN, LEAF_BYTES, SLOT};
use crate::user::{User, as_user};

/// Small files that are opened before the first of them is read: to become another user costs as much as opening a file.
const OPEN_TOGETHER: usize = 32;

/// What every worker of one backup shares.
#[derive(Debug)]
pub struct Cutting<'a> {
    /// the data directory, where files are read from it
    pub root: PathBuf,
    /// as whom they are opened
    pub user: Option<User>,
    /// the repository, if it is a directory, links resolved: it is not part of the backup
    pub repository: Option<PathBuf>,
    /// how plaintext is hashed and sealed
    pub keys: &'a Keys,
    /// zstd level
    pub level: i32,
    /// where finished packs go
    pub uploads: &'a Uploads,
    /// content seen before
    pub dedup: Dedup,
    /// the lanes that all workers fill
    pub lanes: Lanes,
    /// how pages are checked; none where the cluster has no checksums
    pub pages: Option<Pages>,
    /// the backup that this one is compared with
    pub parent: Option<Parent>,
}

/// Lanes shared by all workers, so that what is read together is stored together.
#[derive(Debug)]
pub struct Lanes {
    small: Mutex<Lane>,
    map: Mutex<Lane>,
    changes: Mutex<Lane>,
}

/// What became of a file.
#[derive(Debug)]
pub enum Cut<T> {
    /// it was read
    Read(T),
    /// the parent has it; it was not read
    Same(Arc<File>),
    /// it vanished before it could be opened; WAL replay knows why
    Vanished,
}

/// What reading one file gave.
#[derive(Debug)]
pub struct Slots<P> {
    /// where its bytes are
    pub place: P,
    /// CRC32C of the bytes
    pub crc: u32,
    /// when it was last changed, seconds since 1970, seen after it was read: a later backup must not take what was read for the
    /// state of the time at which it was found
    pub mtime: i64,
    /// pages of the file whose checksum is wrong
    pub bad_pages: Vec<BadPage>,
}

/// A small file, placed.
pub type SmallFile = Slots<(Vec<Extent>, Option<(ChunkRef, u32)>)>;
/// One leaf of a large file, placed, and the packs it needs.
pub type LeafPart = Slots<(LeafRef, Weights)>;

impl Lanes {
    /// Empty lanes.
    pub fn new(keys: &Keys) -> Self {
        let lane = |kind| Mutex::new(Lane::new(kind, keys.seal_kind()));
        Self { small: lane(PackKind::Small), map: lane(PackKind::Map), changes: lane(PackKind::Change) }
    }

    /// Hands all that is left to the uploads.
    pub fn flush(&self, uploads: &Uploads) -> Result<()> {
        [&self.small, &self.map, &self.changes].into_iter().try_for_each(|lane| lane.lock().flush(uploads))
    }
}

/// One worker: its buffers, its compression context, its own data lane.
pub struct Worker<'a> {
    cutting: &'a Cutting<'a>,
    encoder: Encoder,
    /// for the few pages that changed in a leaf
    dense: Encoder,
    data: Lane,
    buffer: Vec<u8>,
    stored: Vec<u8>,
    pending: Pending,
}

/// Small pieces of one batch on their way into chunks.
#[derive(Default)]
struct Group {
    /// the chunk being filled
    pending: Pending,
    /// chunks that are complete
    chunks: Vec<(Stored, Vec<Member>)>,
    /// what the batch will store
    names: HashSet<ChunkId>,
    /// pieces equal to one of those
    repeated: Vec<Member>,
}

impl<'a> Worker<'a> {
    /// A worker of `cutting`.
    pub fn new(cutting: &'a Cutting<'a>) -> Result<Self> {
        let encoder = |level| Encoder::new(level).map_err(|error| Error::new("cannot set up zstd").source(error));
        let (encoder, dense) = (encoder(cutting.level)?, encoder(dense_level(cutting.level))?);
        let data = Lane::new(PackKind::Data, cutting.keys.seal_kind());
        let (buffer, pending) = (vec![0; SLOT], Pending::default());
        Ok(Self { cutting, encoder, dense, data, buffer, stored: Vec::with_capacity(CHUNK), pending })
    }

    /// The data directory.
    pub fn root(&self) -> &Path {
        &self.cutting.root
    }

    /// As whom its files are read.
    pub fn user(&self) -> Option<&User> {
        self.cutting.user.as_ref()
    }

    /// Hands the rest of its data lane to the uploads.
    pub fn finish(mut self) -> Result<()> {
        self.data.flush(self.cutting.uploads)
    }

    /// Reads the leaf `number` of a large file and stores what the parent's state of it, `old`, does not have.
    pub fn leaf(&mut self, file: &Scanned, number: u64, old: Option<&File>, origin: &Origin) -> Result<Cut<LeafPart>> {
        let Some(source) = Source::open(&self.cutting.root, self.cutting.user.as_ref(), file, origin)? else {
            return Ok(Cut::Vanished);
        };
        let old = self.old_slots(old, number)?;
        let mut placing = Placing::default();
        let end = file.size.min((number + 1) * LEAF_BYTES);
        let mut at = number * LEAF_BYTES;
        for slot in 0.. {
            let len = end.saturating_sub(at).min(SLOT as u64) as usize;
            if len == 0 {
                break;
            }
            let read = self.read_slot(&source, file, at, len, &mut placing)?;
            let parts = self.compare(old.as_ref(), slot, &read, len);
            // what is fresh of a slot lies in one chunk
            if self.pending.is_full(parts.iter().map(Part::fresh_len).sum()) {
                self.store_pending(&mut placing)?;
            }
            for part in parts {
                match part {
                    Part::Known(extent) => placing.known(slot, extent),
                    Part::Fresh(from, len) => self.add_fresh(&read, from, len, slot, &mut placing),
                }
            }
            at += len as u64;
        }
        self.store_pending(&mut placing)?;
        let (place, mtime) = (self.store_leaf(&placing, old)?, source.modified()?);
        Ok(Cut::Read(Slots { place, crc: placing.crc, mtime, bad_pages: placing.bad_pages }))
    }

    /// What a large file needs that is taken over from the parent.
    pub fn weights(&self, file: &File) -> Result<Weights> {
        match &self.cutting.parent {
            Some(parent) => parent.weights(file),
            None => Ok(Weights::default()),
        }
    }

    /// Reads and stores a batch of small files, which become neighbours in one pack.
    pub fn small(&mut self, files: &[(&Scanned, Option<&File>, &Origin)]) -> Result<Vec<Cut<SmallFile>>> {
        let (mut placing, mut group) = (Vec::with_capacity(files.len()), Group::default());
        for together in files.chunks(OPEN_TOGETHER) {
            let (root, user) = (&self.cutting.root, self.cutting.user.as_ref());
            let open = || together.iter().map(|(file, _, origin)| Source::open(root, None, file, origin)).collect();
            let sources: Vec<_> = as_user(user, open)?;
            for (source, (file, old, _)) in sources.into_iter().zip(together) {
                let number = placing.len();
                placing.push(match source {
                    Some(source) => {
                        let old = self.old_slots(*old, 0)?;
                        Some(self.place_small(&source, file, number, old.as_ref(), &mut group)?)
                    }
                    None => None,
                });
            }
        }
        self.close_group(&mut group)?;
        self.store_small(group, &mut placing)?;
        self.place_changes(placing)
    }

    /// Stores an index chunk.
    pub fn index(&mut self, plain: &[u8]) -> Result<ChunkRef> {
        self.store_in(&self.cutting.lanes.map, plain)
    }

    fn old_slots(&self, old: Option<&File>, number: u64) -> Result<Option<OldSlots>> {
        match (&self.cutting.parent, old) {
            (Some(parent), Some(file)) => parent.slots(file, number),
            _ => Ok(None),
        }
    }

    fn compare(&self, old: Option<&OldSlots>, slot: usize, read: &SlotRead, len: usize) -> Vec<Part> {
        match (&self.cutting.parent, old.and_then(|old| old.slot(slot))) {
            (Some(parent), Some(old)) => parent.compare(old, &read.change().grains, len),
            _ => vec![Part::Fresh(0, len)],
        }
    }

    /// Reads one slot into the buffer, and adds its checksum and hashes to the file's.
    fn read_slot(
        &mut self,
        source: &Source<'_>,
        file: &Scanned,
        at: u64,
        len: usize,
        placing: &mut Placing,
    ) -> Result<SlotRead> {
        source.read(at, &mut self.buffer[..len])?;
        if let (Some(pages), Some(first_block)) = (self.cutting.pages, file.first_block) {
            source.check_pages(pages, first_block, at, &mut self.buffer[..len], &mut placing.bad_pages)?;
        }
        let plain = &self.buffer[..len];
        let grains = plain.chunks(GRAIN).map(|grain| self.cutting.keys.grain_digest(grain)).collect();
        let read = SlotRead { grains, crc: crc32c::crc32c(plain) };
        // a second pass over bytes in the cache is cheaper than combining two sums
        placing.crc = crc32c::crc32c_append(placing.crc, plain);
        placing.changes.push(read.change());
        Ok(read)
    }

    /// Adds a part of the slot in the buffer to the chunk being filled.
    fn add_fresh(&mut self, read: &SlotRead, from: usize, len: usize, slot: usize, placing: &mut Placing) {
        let extent = placing.waiting(slot, len);
        self.pending.push(&self.buffer[from..from + len], read.grains_of(from, len), 0, extent, None);
    }

    /// Stores the chunk being filled, unless its content is known, and gives its pieces their place.
    fn store_pending(&mut self, placing: &mut Placing) -> Result<()> {
        if self.pending.plain.is_empty() {
            return Ok(());
        }
        let id = self.pending.id(self.cutting.keys);
        let seen = match self.cutting.dedup.get(&id) {
            Some(seen) => seen,
            None => {
                let encoder = if placing.is_mostly_known() { &mut self.dense } else { &mut self.encoder };
                encode(encoder, self.cutting.keys, &id, &self.pending.plain, &mut self.stored)?;
                let chunk = self.data.add(self.cutting.uploads, id, self.pending.plain.len(), &self.stored)?;
                let seen = Seen { chunk, offset: 0 };
                self.cutting.dedup.insert(id, seen);
                seen
            }
        };
        for member in &self.pending.members {
            placing.place(member.extent, seen.chunk, seen.offset + member.offset);
        }
        self.pending.clear();
        Ok(())
    }

    /// Stores the map and the changes of a leaf, unless the parent has the same.
    fn store_leaf(&mut self, placing: &Placing, old: Option<OldSlots>) -> Result<(LeafRef, Weights)> {
        let (leaf, mut weights) = (placing.leaf(), Weights::default());
        let base = old.as_ref().and_then(|old| old.base.as_ref());
        if let Some((old, stored)) = old.as_ref().and_then(|old| Some((old, old.stored?)))
            && old.is(&leaf, &placing.changes)
        {
            weights.add_leaf(&leaf, &stored, base.map(|(chunk, _)| chunk));
            return Ok((stored, weights));
        }
        let since = base.and_then(|(chunk, changes)| encode_changes_since(*chunk, changes, &placing.changes));
        let base = base.filter(|_| since.is_some()).map(|(chunk, _)| *chunk);
        let changes = since.unwrap_or_else(|| encode_changes(&placing.changes));
        let stored = LeafRef {
            map: self.store_in(&self.cutting.lanes.map, &leaf.encode())?,
            changes: self.store_in(&self.cutting.lanes.changes, &changes)?,
        };
        weights.add_leaf(&leaf, &stored, base.as_ref());
        Ok((stored, weights))
    }

    fn place_small(
        &mut self,
        source: &Source<'_>,
        file: &Scanned,
        number: usize,
        old: Option<&OldSlots>,
        group: &mut Group,
    ) -> Result<Placing> {
        let (mut placing, mut at) = (Placing::default(), 0);
        for slot in 0.. {
            let len = file.size.saturating_sub(at).min(SLOT as u64) as usize;
            if len == 0 {
                break;
            }
            let read = self.read_slot(source, file, at, len, &mut placing)?;
            for part in self.compare(old, slot, &read, len) {
                match part {
                    Part::Known(extent) => placing.known(slot, extent),
                    Part::Fresh(from, len) => self.add_small(&read, from, len, slot, number, &mut placing, group)?,
                }
            }
            at += len as u64;
        }
        placing.stored_changes = old.and_then(|old| old.changes_of_small(&placing.changes));
        placing.mtime = source.modified()?;
        Ok(placing)
    }

    /// Adds a part of the slot in the buffer to the batch, unless its content is known.
    #[expect(clippy::too_many_arguments, reason = "the piece, whose it is, and where it goes")]
    fn add_small(
        &mut self,
        read: &SlotRead,
        from: usize,
        len: usize,
        slot: usize,
        file: usize,
        placing: &mut Placing,
        group: &mut Group,
    ) -> Result<()> {
        let grains = read.grains_of(from, len);
        let id = self.cutting.keys.name(len, grains);
        if let Some(Seen { chunk, offset }) = self.cutting.dedup.get(&id) {
            placing.known(slot, Extent { len: len as u32, chunk, offset });
            return Ok(());
        }
        let extent = placing.waiting(slot, len);
        if !group.names.insert(id) {
            group.repeated.push(Member { file, extent, offset: 0, id: Some(id) });
            return Ok(());
        }
        if group.pending.is_full(len) {
            self.close_group(group)?;
        }
        group.pending.push(&self.buffer[from..from + len], grains, file, extent, Some(id));
        Ok(())
    }

    fn close_group(&mut self, group: &mut Group) -> Result<()> {
        if group.pending.plain.is_empty() {
            return Ok(());
        }
        let (id, plain_len) = (group.pending.id(self.cutting.keys), group.pending.plain.len());
        let bytes = match self.cutting.dedup.get(&id) {
            // stored meanwhile by another worker, perhaps in a larger chunk, or by a backup that died
            Some(_) => Vec::new(),
            None => {
                self.encode(&id, &group.pending.plain)?;
                self.stored.clone()
            }
        };
        group.chunks.push((Stored { id, plain_len, bytes }, std::mem::take(&mut group.pending.members)));
        group.pending.clear();
        Ok(())
    }

    /// Stores the chunks of one batch side by side and gives every piece its place.
    fn store_small(&self, group: Group, placing: &mut [Option<Placing>]) -> Result<()> {
        let mut lane = self.cutting.lanes.small.lock();
        let mut place = |member: &Member, Seen { chunk, offset }: Seen| {
            if let Some(placing) = &mut placing[member.file] {
                placing.place(member.extent, chunk, offset);
            }
        };
        for (stored, members) in group.chunks {
            let base = match self.cutting.dedup.get(&stored.id).filter(|_| stored.bytes.is_empty()) {
                Some(seen) => seen,
                None if stored.bytes.is_empty() => {
                    return Err(Error::new(format!("the place of chunk {} was forgotten", stored.id)));
                }
                None => {
                    let chunk = lane.add(self.cutting.uploads, stored.id, stored.plain_len, &stored.bytes)?;
                    Seen { chunk, offset: 0 }
                }
            };
            for member in &members {
                let seen = Seen { chunk: base.chunk, offset: base.offset + member.offset };
                member.id.iter().for_each(|id| self.cutting.dedup.insert(*id, seen));
                place(member, seen);
            }
        }
        for member in &group.repeated {
            let seen = member.id.and_then(|id| self.cutting.dedup.get(&id));
            place(member, seen.ok_or_else(|| Error::new("a repeated piece of a small file was forgotten"))?);
        }
        Ok(())
    }

    /// Stores the changes of one batch in shared chunks and completes its files.
    fn place_changes(&mut self, placing: Vec<Option<Placing>>) -> Result<Vec<Cut<SmallFile>>> {
        let fresh = |file: &&Placing| file.stored_changes.is_none() && !file.changes.is_empty();
        let (plain, offsets) = concatenated(placing.iter().flatten().filter(fresh).map(|file| &*file.changes));
        let chunk = match plain.is_empty() {
            true => None,
            false => Some(self.store_in(&self.cutting.lanes.changes, &plain)?),
        };
        let mut offsets = offsets.into_iter();
        let complete = |placing: Option<Placing>| {
            let Some(file) = placing else { return Cut::Vanished };
            let changes = if fresh(&&file) { chunk.zip(offsets.next()) } else { file.stored_changes };
            let place = (file.extents(), changes);
            Cut::Read(Slots { place, crc: file.crc, mtime: file.mtime, bad_pages: file.bad_pages })
        };
        Ok(placing.into_iter().map(complete).collect())
    }

    fn store_in(&mut self, lane: &Mutex<Lane>, plain: &[u8]) -> Result<ChunkRef> {
        let id = self.cutting.keys.digest(plain).id;
        if let Some(Seen { chunk, .. }) = self.cutting.dedup.get(&id).filter(|seen| seen.chunk.id == id) {
            return Ok(chunk);
        }
        self.encode(&id, plain)?;
        let chunk = lane.lock().add(self.cutting.uploads, id, plain.len(), &self.stored)?;
        self.cutting.dedup.insert(id, Seen { chunk, offset: 0 });
        Ok(chunk)
    }

    fn encode(&mut self, id: &ChunkId, plain: &[u8]) -> Result<()> {
        encode(&mut self.encoder, self.cutting.keys, id, plain, &mut self.stored)
    }
}

/// Replaces `stored` by the stored form of a chunk.
fn encode(encoder: &mut Encoder, keys: &Keys, id: &ChunkId, plain: &[u8], stored: &mut Vec<u8>) -> Result<()> {
    stored.clear();
    encoder.encode(keys, id, plain, stored).map_err(|error| Error::new("cannot compress").source(error))
}

/// The level for the few pages that changed: they compress worse alone than in their table, and are worth the time.
fn dense_level(level: i32) -> i32 {
    const MORE: i32 = 5;
    if level > 1 { level + MORE } else { level }
}

/// The changes of small files one behind the other, and where each begins.
fn concatenated<'c>(files: impl Iterator<Item = &'c [SlotChange]>) -> (Vec<u8>, Vec<u32>) {
    let (mut plain, mut offsets) = (Vec::new(), Vec::new());
    for changes in files {
        offsets.push(plain.len() as u32);
        plain.extend_from_slice(&encode_changes(changes));
    }
    (plain, offsets)
}

#[cfg(test)]
mod tests;
