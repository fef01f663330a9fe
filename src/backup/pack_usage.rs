//! How much of each pack a backup needs: the pack table of its manifest.

use std::collections::HashMap;

use crate::format::chunk::{ChunkRef, PackId};
use crate::format::map::Extent;

/// Stored bytes needed, by pack.
#[derive(Clone, Debug, Default)]
pub struct Weights(HashMap<PackId, u64>);

impl Weights {
    /// Counts a chunk that is needed whole.
    pub fn add_chunk(&mut self, chunk: &ChunkRef) {
        *self.0.entry(chunk.pack).or_default() += u64::from(chunk.stored_len);
    }

    /// Counts `len` bytes of a chunk's plaintext, in proportion; at least one stored byte.
    pub fn add_part(&mut self, chunk: &ChunkRef, len: u64) {
        let share = len * u64::from(chunk.stored_len) / u64::from(chunk.plain_len.max(1));
        *self.0.entry(chunk.pack).or_default() += share.max(1);
    }

    /// Counts what extents refer to.
    pub fn add_extents<'a>(&mut self, extents: impl IntoIterator<Item = &'a Extent>) {
        extents.into_iter().for_each(|extent| self.add_part(&extent.chunk, u64::from(extent.len)));
    }

    /// Counts the changes of one small file in a chunk that it shares with others.
    pub fn add_changes(&mut self, chunk: &ChunkRef, size: u64) {
        let slots = size.div_ceil(crate::format::SLOT as u64);
        let grains = size.div_ceil(crate::format::GRAIN as u64);
        let len = 2 + 4 * slots + 8 * grains;
        self.add_part(chunk, len);
    }

    /// Adds what another has counted.
    pub fn merge(&mut self, other: &Self) {
        other.0.iter().for_each(|(pack, weight)| *self.0.entry(*pack).or_default() += weight);
    }

    /// Every pack and its weight, ascending by name.
    pub fn sorted(&self) -> Vec<(PackId, u64)> {
        let mut all: Vec<_> = self.0.iter().map(|(pack, weight)| (*pack, *weight)).collect();
        all.sort_unstable();
        all
    }
}
