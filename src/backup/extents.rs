//! Pieces of files on their way into chunks, and the extents that wait for them.

use super::source::BadPage;
use crate::format::chunk::{ChunkId, ChunkRef, GrainDigest, Keys};
use crate::format::map::{Extent, Leaf, SlotChange};
use crate::format::{CHUNK, GRAIN, SLOT};

/// One small file, or one leaf of a large one, being placed.
#[derive(Debug, Default)]
pub(super) struct Placing {
    extents: Vec<Waiting>,
    /// what the next backup needs to know of each slot
    pub(super) changes: Vec<SlotChange>,
    /// where the parent has just these changes, of a small file
    pub(super) stored_changes: Option<(ChunkRef, u32)>,
    /// CRC32C of what was read so far
    pub(super) crc: u32,
    /// when the file was last changed, seen after it was read
    pub(super) mtime: i64,
    /// pages whose checksum is wrong
    pub(super) bad_pages: Vec<BadPage>,
}

/// An extent of slot `slot` that may still be without a place.
#[derive(Debug)]
struct Waiting {
    slot: usize,
    len: u32,
    /// it is not taken over
    fresh: bool,
    place: Option<(ChunkRef, u32)>,
}

impl Placing {
    /// Adds an extent that is stored already.
    pub(super) fn known(&mut self, slot: usize, extent: Extent) {
        let place = Some((extent.chunk, extent.offset));
        self.extents.push(Waiting { slot, len: extent.len, fresh: false, place });
    }

    /// Adds an extent that waits for its chunk; returns its number.
    pub(super) fn waiting(&mut self, slot: usize, len: usize) -> usize {
        self.extents.push(Waiting { slot, len: len as u32, fresh: true, place: None });
        self.extents.len() - 1
    }

    /// Gives extent `number` its place.
    pub(super) fn place(&mut self, number: usize, chunk: ChunkRef, offset: u32) {
        self.extents[number].place = Some((chunk, offset));
    }

    /// True when little of what was read so far is to be stored.
    pub(super) fn is_mostly_known(&self) -> bool {
        let len = |of: &Waiting| u64::from(of.len);
        let waiting: u64 = self.extents.iter().filter(|of| of.fresh).map(len).sum();
        waiting * 8 <= self.extents.iter().map(len).sum()
    }

    /// The extents in file order; all must have their place.
    pub(super) fn extents(&self) -> Vec<Extent> {
        self.extents.iter().map(Waiting::extent).collect()
    }

    /// The same as a leaf.
    pub(super) fn leaf(&self) -> Leaf {
        let mut leaf = Leaf::default();
        for slot in self.extents.chunk_by(|a, b| a.slot == b.slot) {
            leaf.push(&slot.iter().map(Waiting::extent).collect::<Vec<_>>());
        }
        leaf
    }
}

impl Waiting {
    fn extent(&self) -> Extent {
        let Some((chunk, offset)) = self.place else { panic!("a piece of a file was not stored") };
        Extent { len: self.len, chunk, offset }
    }
}

/// A piece in a chunk: of which file, which of its extents, where in the chunk, and the piece's own name, if it has one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Member {
    pub(super) file: usize,
    pub(super) extent: usize,
    pub(super) offset: u32,
    pub(super) id: Option<ChunkId>,
}

/// A chunk being filled.
#[derive(Debug, Default)]
pub(super) struct Pending {
    pub(super) plain: Vec<u8>,
    pub(super) members: Vec<Member>,
    grains: Vec<GrainDigest>,
    /// a piece begins in the middle of a grain: the digests of the pieces' grains are not those of the chunk's
    shifted: bool,
}

impl Pending {
    /// True when `len` more bytes are too many.
    pub(super) fn is_full(&self, len: usize) -> bool {
        self.plain.len() + len > CHUNK
    }

    /// Appends a piece whose grains have these digests.
    pub(super) fn push(
        &mut self,
        piece: &[u8],
        grains: &[GrainDigest],
        file: usize,
        extent: usize,
        id: Option<ChunkId>,
    ) {
        self.shifted |= !self.plain.len().is_multiple_of(GRAIN);
        self.members.push(Member { file, extent, offset: self.plain.len() as u32, id });
        self.plain.extend_from_slice(piece);
        self.grains.extend_from_slice(grains);
    }

    /// The chunk's name.
    pub(super) fn id(&self, keys: &Keys) -> ChunkId {
        match self.shifted {
            true => keys.digest(&self.plain).id,
            false => keys.name(self.plain.len(), &self.grains),
        }
    }

    /// Empties it, keeping its memory.
    pub(super) fn clear(&mut self) {
        self.plain.clear();
        self.members.clear();
        self.grains.clear();
        self.shifted = false;
    }
}

/// One slot that was read: the digests of its grains and its checksum.
pub(super) struct SlotRead {
    pub(super) grains: Vec<GrainDigest>,
    pub(super) crc: u32,
}

impl SlotRead {
    /// What the next backup needs to know of it.
    pub(super) fn change(&self) -> SlotChange {
        SlotChange { crc: self.crc, grains: self.grains.iter().map(GrainDigest::short).collect() }
    }

    /// The digests of the grains of `len` bytes from `from`, which is where a grain begins.
    pub(super) fn grains_of(&self, from: usize, len: usize) -> &[GrainDigest] {
        debug_assert!(from.is_multiple_of(GRAIN) && from + len <= SLOT);
        &self.grains[from / GRAIN..(from + len).div_ceil(GRAIN)]
    }
}
