//! Which packs a backup needs.

use std::collections::HashMap;

use super::{Repository, keys};
use crate::error::{Context, Result};
use crate::format::chunk::{ChunkRef, Decoder, PackId};
use crate::format::manifest::{Node, Place};
use crate::format::map::{Leaf, LeafRef, decode_index};
use crate::format::pack::TRAILER_LEN;
use crate::format::{INDEX_BYTES, LEAF_BYTES};

/// How much a backup needs of one pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackUse {
    /// the pack
    pub pack: PackId,
    /// length of the object in bytes, at least
    pub size: u64,
    /// stored bytes of what the backup refers to
    pub weight: u64,
}

impl Repository {
    /// The packs a backup needs.
    pub fn manifest_packs(&self, label: &str) -> Result<Vec<PackUse>> {
        let mut chunks: HashMap<(PackId, u32), u32> = HashMap::new();
        let mut maps: Vec<(u64, Place)> = Vec::new();
        let mut need = |chunk: &ChunkRef| _ = chunks.insert((chunk.pack, chunk.offset), chunk.stored_len);
        self.manifest(label, |entry| {
            let Node::File(file) = entry.node else { return };
            match &file.place {
                Place::Inline { extents, changes } => {
                    extents.iter().for_each(|extent| need(&extent.chunk));
                    changes.iter().for_each(|(chunk, _)| need(chunk));
                }
                Place::Leaves(_) | Place::Index(_) => maps.push((file.size, file.place)),
            }
        })?;
        let mut decoder = Decoder::new().context(|| "cannot set up zstd".into())?;
        let mut fetch = |chunk: &ChunkRef| self.fetch_chunk(&mut decoder, chunk);
        for (size, place) in maps {
            let leaves = match place {
                Place::Leaves(leaves) => leaves,
                Place::Index(index) => {
                    let mut leaves: Vec<LeafRef> = Vec::new();
                    for chunk in &index {
                        need(chunk);
                        leaves.extend(decode_index(&keys::pack(&self.stanza, chunk.pack), &fetch(chunk)?)?);
                    }
                    debug_assert_eq!(index.len() as u64, size.div_ceil(INDEX_BYTES));
                    leaves
                }
                Place::Inline { .. } => continue,
            };
            for (number, leaf) in leaves.iter().enumerate() {
                need(&leaf.map);
                need(&leaf.changes);
                let len = size.saturating_sub(number as u64 * LEAF_BYTES).min(LEAF_BYTES);
                let decoded = Leaf::decode(&keys::pack(&self.stanza, leaf.map.pack), &fetch(&leaf.map)?, len)?;
                (0..decoded.slots()).for_each(|slot| decoded.slot(slot).iter().for_each(|extent| need(&extent.chunk)));
            }
        }
        let mut packs: HashMap<PackId, PackUse> = HashMap::new();
        for ((pack, offset), stored_len) in chunks {
            let of = packs.entry(pack).or_insert(PackUse { pack, size: 0, weight: 0 });
            of.weight += u64::from(stored_len);
            of.size = of.size.max(u64::from(offset) + u64::from(stored_len) + TRAILER_LEN as u64);
        }
        Ok(packs.into_values().collect())
    }

    /// One chunk by its place, checked.
    pub fn fetch_chunk(&self, decoder: &mut Decoder, chunk: &ChunkRef) -> Result<Vec<u8>> {
        let key = keys::pack(&self.stanza, chunk.pack);
        let stored = self.store.get_range(&key, u64::from(chunk.offset), u64::from(chunk.stored_len))?;
        Ok(decoder.decode(&self.keys, &key, chunk, &stored)?)
    }
}
