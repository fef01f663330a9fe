//! What an earlier backup knows of the files that are read now: which need not be read, which slots and grains are stored
//! already. Only its manifest, file maps and changes are read, never its data.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::moved_files::Twins;
use super::pack_usage::Weights;
use super::scan::Scanned;
use crate::error::{Error, Result};
use crate::format::chunk::{ChunkRef, GrainHash, PackId};
use crate::format::manifest::{Description, Entry, File, Node, PackUse, Place, path_cmp};
use crate::format::map::{
    Changes, Extent, INDEX_LEAVES, Leaf, LeafRef, SlotChange, changes_base, decode_changes, decode_index,
    resolve_changes,
};
use crate::format::{GRAIN, INLINE_BYTES, LEAF_BYTES, SLOT};
use crate::repo::Repository;
use crate::repo::chunks::ChunkReader;
use crate::repo::manifest::ManifestCursor;

/// A pack of which a backup needs less than this share, in percent, is thin: a full backup stores anew what is in it.
const THIN_PERCENT: u64 = 25;

/// What is taken over from the parent, and what is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reuse {
    /// take over files of the same size and time without reading them
    pub unread: bool,
    /// a slot spread over more chunks than this is stored whole
    pub chunks_max: usize,
    /// store anew what lies in packs that are mostly garbage
    pub leave_thin: bool,
}

/// The parent cannot be used: its manifest, its maps or a pack that it needs are damaged or missing.
#[derive(Debug, thiserror::Error)]
#[error("backup {label} cannot be built on")]
pub struct Unusable {
    /// the parent
    pub label: String,
    source: Error,
}

/// An earlier backup, for the workers.
#[derive(Debug)]
pub struct Parent {
    label: String,
    chunks: ChunkReader,
    packs: HashMap<PackId, PackUse>,
    /// packs in which damage was found: what is in them is stored anew
    harmed: HashSet<PackId>,
    reuse: Reuse,
}

/// The entries of an earlier backup, for who walks the files in path order.
#[derive(Debug)]
pub struct ParentFiles {
    label: String,
    cursor: ManifestCursor,
    ahead: Option<Entry>,
    /// made when the first file is met that may have one
    twins: Option<Twins>,
    unread: bool,
}

/// The same for who meets the files in any order, and reads them all.
#[derive(Debug)]
pub struct ParentIndex {
    label: String,
    twins: Twins,
}

/// What the parent has under a file's path, or of its twin.
#[derive(Clone, Debug)]
pub enum Known {
    /// nothing
    New,
    /// another state of it, or of its twin, or perhaps the same
    Changed(Arc<File>),
    /// the same: it need not be read
    Same(Arc<File>),
}

impl Known {
    /// The state to compare with.
    pub fn changed(&self) -> Option<&File> {
        match self {
            Self::Changed(file) => Some(file),
            Self::New | Self::Same(_) => None,
        }
    }
}

/// The slots of one leaf, or of a small file, as the parent has them.
#[derive(Debug)]
pub struct OldSlots {
    leaf: Leaf,
    changes: Vec<SlotChange>,
    /// bytes of the file in these slots
    len: u64,
    /// where this leaf and its changes are stored
    pub stored: Option<LeafRef>,
    /// changes stored whole that these may have been derived from
    pub base: Option<(ChunkRef, Vec<SlotChange>)>,
    /// where the changes of a small file are stored
    small_changes: Option<(ChunkRef, u32)>,
}

/// One slot as the parent has it.
#[derive(Clone, Copy, Debug)]
pub struct OldSlot<'a> {
    extents: &'a [Extent],
    change: &'a SlotChange,
    len: usize,
}

/// What becomes of a run of bytes of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// it is stored already
    Known(Extent),
    /// it is to be stored: first byte in the slot and length
    Fresh(usize, usize),
}

impl Part {
    /// Bytes that are to be stored.
    pub fn fresh_len(&self) -> usize {
        match self {
            Self::Known(_) => 0,
            Self::Fresh(_, len) => *len,
        }
    }
}

impl Parent {
    /// Opens the backup `label`: what it is, its files in order, and the rest for the workers. All its packs are there.
    pub fn open(repository: &Repository, label: &str, reuse: Reuse) -> Result<(Description, ParentFiles, Self)> {
        let open = || {
            let mut cursor = repository.open_manifest(label)?;
            let packs = cursor.packs()?;
            repository.prove_packs(&packs)?;
            Ok((cursor, packs.into_iter().map(|pack| (pack.pack, pack)).collect::<HashMap<_, _>>()))
        };
        let (cursor, packs) = open().map_err(|error| unusable(label, error))?;
        let mut harmed = repository.harmed_packs()?;
        harmed.retain(|pack| packs.contains_key(pack));
        // every file is read then: only its maps would say whether it needs one of them
        let reuse = Reuse { unread: reuse.unread && harmed.is_empty(), ..reuse };
        let (label, description) = (label.to_owned(), cursor.description.clone());
        let files = ParentFiles { label: label.clone(), cursor, ahead: None, twins: None, unread: reuse.unread };
        Ok((description, files, Self { label, chunks: ChunkReader::new(repository)?, packs, harmed, reuse }))
    }

    /// What is taken over.
    pub fn reuse(&self) -> Reuse {
        self.reuse
    }

    /// The packs it needs.
    pub fn packs(&self) -> impl Iterator<Item = &PackUse> {
        self.packs.values()
    }

    /// The slots of leaf `number` of a file; those of a small file are leaf 0. None where it has no such leaf.
    pub fn slots(&self, file: &File, number: u64) -> Result<Option<OldSlots>> {
        self.read_slots(file, number).map_err(|error| unusable(&self.label, error))
    }

    fn read_slots(&self, file: &File, number: u64) -> Result<Option<OldSlots>> {
        let from = number * LEAF_BYTES;
        if from >= file.size {
            return Ok(None);
        }
        let len = (file.size - from).min(LEAF_BYTES);
        if let Place::Inline { extents, changes } = &file.place {
            let Some((chunk, at)) = *changes else { return Ok(None) };
            let plain = self.read(&chunk)?;
            let changes = decode_changes("changes", plain.get(at as usize..).unwrap_or_default(), len)?;
            let (leaf, small_changes) = (by_slot(extents, len), Some((chunk, at)));
            return Ok(Some(OldSlots { leaf, changes, len, stored: None, base: None, small_changes }));
        }
        let stored = self.leaf_ref(&file.place, number)?;
        let leaf = Leaf::decode("file map", &self.read(&stored.map)?, len)?;
        let plain = self.read(&stored.changes)?;
        let Changes { slots: changes, base } = resolve_changes("changes", &plain, len, |base| self.read(base))?;
        let base = base.unwrap_or_else(|| (stored.changes, changes.clone()));
        Ok(Some(OldSlots { leaf, changes, len, stored: Some(stored), base: Some(base), small_changes: None }))
    }

    /// What a file that is taken over needs.
    pub fn weights(&self, file: &File) -> Result<Weights> {
        self.read_weights(file).map_err(|error| unusable(&self.label, error))
    }

    fn read_weights(&self, file: &File) -> Result<Weights> {
        let mut weights = Weights::default();
        if let Place::Index(index) = &file.place {
            index.iter().for_each(|chunk| weights.add_chunk(chunk));
        }
        for number in 0..file.size.div_ceil(LEAF_BYTES) {
            let len = (file.size - number * LEAF_BYTES).min(LEAF_BYTES);
            let stored = self.leaf_ref(&file.place, number)?;
            let leaf = Leaf::decode("file map", &self.read(&stored.map)?, len)?;
            let base = changes_base("changes", &self.read(&stored.changes)?)?;
            weights.add_leaf(&leaf, &stored, base.as_ref());
        }
        Ok(weights)
    }

    fn leaf_ref(&self, place: &Place, number: u64) -> Result<LeafRef> {
        let at = number as usize;
        let found = match place {
            Place::Inline { .. } => None,
            Place::Leaves(leaves) => leaves.get(at).copied(),
            Place::Index(index) => match index.get(at / INDEX_LEAVES) {
                Some(chunk) => decode_index("file map index", &self.read(chunk)?)?.get(at % INDEX_LEAVES).copied(),
                None => None,
            },
        };
        let missing = || crate::format::FormatError::new("file map", 0, format!("it has no leaf {number}"));
        Ok(found.ok_or_else(missing)?)
    }

    fn read(&self, chunk: &ChunkRef) -> Result<Vec<u8>> {
        self.chunks.read(chunk, self.packs.get(&chunk.pack).map(|pack| pack.size))
    }

    /// Which parts of a slot of `len` bytes with these `grains` are stored already.
    pub fn compare(&self, old: OldSlot<'_>, grains: &[GrainHash], len: usize) -> Vec<Part> {
        if old.extents.iter().any(|extent| self.harmed.contains(&extent.chunk.pack)) {
            return vec![Part::Fresh(0, len)];
        }
        if self.reuse.leave_thin && old.extents.iter().any(|extent| self.is_thin(extent.chunk.pack)) {
            return vec![Part::Fresh(0, len)];
        }
        compare(old, grains, len, self.reuse.chunks_max)
    }

    fn is_thin(&self, pack: PackId) -> bool {
        self.packs
            .get(&pack)
            .is_none_or(|pack| pack.weight.saturating_mul(100) < pack.size.saturating_mul(THIN_PERCENT))
    }
}

impl ParentIndex {
    /// What `found` is compared with; never [`Known::Same`].
    pub fn find(&mut self, found: &Scanned) -> Result<Known> {
        let file = match self.twins.at(&found.path) {
            Ok(None) if may_have_twin(found) => self.twins.find(&found.path, found.size),
            other => other,
        };
        let file = file.map_err(|error| unusable(&self.label, error))?;
        Ok(file.map_or(Known::New, |file| Known::Changed(Arc::new(file))))
    }
}

impl ParentFiles {
    /// All of them, by path.
    pub fn by_path(self) -> Result<ParentIndex> {
        let twins = Twins::of(&self.cursor).map_err(|error| unusable(&self.label, error))?;
        Ok(ParentIndex { label: self.label, twins })
    }

    /// What `found` is compared with; paths must be asked for in ascending order.
    pub fn find(&mut self, found: &Scanned) -> Result<Known> {
        match self.at_path(found)? {
            Known::New if may_have_twin(found) => self.twin(found).map_err(|error| unusable(&self.label, error)),
            known => Ok(known),
        }
    }

    /// What the parent has under the path of `found`.
    fn at_path(&mut self, found: &Scanned) -> Result<Known> {
        loop {
            if self.ahead.is_none() {
                self.ahead = self.cursor.next().map_err(|error| unusable(&self.label, error))?;
            }
            let Some(entry) = &self.ahead else { return Ok(Known::New) };
            match path_cmp(&entry.path, &found.path) {
                std::cmp::Ordering::Less => self.ahead = None,
                std::cmp::Ordering::Equal => break,
                std::cmp::Ordering::Greater => return Ok(Known::New),
            }
        }
        let Some(Entry { identity, node: Node::File(file), .. }) = self.ahead.take() else { return Ok(Known::New) };
        // what a small file needs is counted from its extents
        let counted = file.size > INLINE_BYTES || matches!(file.place, Place::Inline { .. });
        // the parent noted it only if no later change could have kept it
        let untouched = identity.is_some() && identity == found.identity && file.size == found.size;
        let same = self.unread && counted && untouched;
        let file = Arc::new(file);
        Ok(if same { Known::Same(file) } else { Known::Changed(file) })
    }

    /// The twin of what the parent does not have: to be compared with, whatever its size and time say.
    fn twin(&mut self, found: &Scanned) -> Result<Known> {
        let twins = match &mut self.twins {
            Some(twins) => twins,
            none => none.insert(Twins::of(&self.cursor)?),
        };
        let twin = twins.find(&found.path, found.size)?;
        Ok(twin.map_or(Known::New, |file| Known::Changed(Arc::new(file))))
    }
}

/// Who has no twin need not be looked for in all of the parent.
fn may_have_twin(found: &Scanned) -> bool {
    found.first_block.is_some() && found.size > 0
}

impl OldSlots {
    /// Slot `number` of this leaf.
    pub fn slot(&self, number: usize) -> Option<OldSlot<'_>> {
        let change = self.changes.get(number)?;
        let len = (self.len - (number * SLOT) as u64).min(SLOT as u64) as usize;
        Some(OldSlot { extents: self.leaf.slot(number), change, len })
    }

    /// Where these changes are stored, if they are those of a small file.
    pub fn changes_of_small(&self, changes: &[SlotChange]) -> Option<(ChunkRef, u32)> {
        self.small_changes.filter(|_| self.changes == changes)
    }

    /// True when `leaf` and `changes` are what is stored.
    pub fn is(&self, leaf: &Leaf, changes: &[SlotChange]) -> bool {
        self.leaf == *leaf && self.changes == changes
    }
}

impl Weights {
    /// Counts a leaf: what it refers to, itself, and its changes.
    pub fn add_leaf(&mut self, leaf: &Leaf, stored: &LeafRef, base: Option<&ChunkRef>) {
        (0..leaf.slots()).for_each(|slot| self.add_extents(leaf.slot(slot)));
        [&stored.map, &stored.changes].into_iter().chain(base).for_each(|chunk| self.add_chunk(chunk));
    }
}

/// Tells damage, after which a backup without this parent can be taken, from a store that fails.
fn unusable(label: &str, error: Error) -> Error {
    match error.is_damage() || error.is_not_found() {
        true => Error::new(format!("backup {label} cannot be built on"))
            .source(Unusable { label: label.to_owned(), source: error }),
        false => error,
    }
}

/// Cuts the extents of a small file at slots.
fn by_slot(extents: &[Extent], len: u64) -> Leaf {
    let mut leaf = Leaf::default();
    for slot in 0..len.div_ceil(SLOT as u64) {
        let from = slot * SLOT as u64;
        leaf.push(&clip(extents, from as usize, (len - from).min(SLOT as u64) as usize));
    }
    leaf
}

/// The extents of `len` bytes from `from` of a run that `extents` cover.
fn clip(extents: &[Extent], from: usize, len: usize) -> Vec<Extent> {
    let (mut at, mut clipped) = (0, Vec::new());
    for extent in extents {
        let end = at + extent.len as usize;
        let (start, stop) = (at.max(from), end.min(from + len));
        if start < stop {
            let offset = extent.offset + (start - at) as u32;
            clipped.push(Extent { len: (stop - start) as u32, chunk: extent.chunk, offset });
        }
        at = end;
    }
    clipped
}

fn compare(old: OldSlot<'_>, grains: &[GrainHash], len: usize, chunks_max: usize) -> Vec<Part> {
    let grain_len = |number: usize, len: usize| len.saturating_sub(number * GRAIN).min(GRAIN);
    let is_old = |number: usize| {
        old.change.grains.get(number) == grains.get(number) && grain_len(number, old.len) == grain_len(number, len)
    };
    let mut parts = Vec::new();
    let mut number = 0;
    while number < grains.len() {
        let known = is_old(number);
        let run = (number..grains.len()).take_while(|number| is_old(*number) == known).count();
        let from = number * GRAIN;
        let end = len.min((number + run) * GRAIN);
        match known {
            true => parts.extend(clip(old.extents, from, end - from).into_iter().map(Part::Known)),
            false => parts.push(Part::Fresh(from, end - from)),
        }
        number += run;
    }
    match worth_it(&parts, len, chunks_max) {
        true => parts,
        false => vec![Part::Fresh(0, len)],
    }
}

/// A slot is better stored whole when most of it is fresh, or when it would be spread over too many chunks.
fn worth_it(parts: &[Part], len: usize, chunks_max: usize) -> bool {
    let (mut chunks, mut fresh) = (Vec::new(), 0);
    for part in parts {
        match part {
            Part::Fresh(_, len) => fresh += len,
            Part::Known(extent) => chunks.push((extent.chunk.pack, extent.chunk.offset)),
        }
    }
    chunks.sort_unstable();
    chunks.dedup();
    // the fresh parts share one chunk; what is only taken over costs nothing
    fresh == 0 && chunks.len() <= chunks_max || fresh * 4 <= len * 3 && chunks.len() < chunks_max
}

#[cfg(test)]
mod tests;
