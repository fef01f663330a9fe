//! What the backup noted of its files when it read them: other files are compared with them without fetching anything else.

use super::{Content, NodeIndex, View};
use crate::error::Result;
use crate::format::LEAF_BYTES;
use crate::format::map::{SlotChange, resolve_changes};

/// Where the backup noted what a file held.
#[derive(Debug)]
pub(in crate::read) enum StoredChanges {
    /// chunk number, and the first byte there
    Small(u32, u32),
    /// a chunk number for each leaf
    Leaves(Box<[u32]>),
}

/// The number of changes that are not kept.
pub(in crate::read) const NO_CHANGES: u32 = u32::MAX;

impl View {
    /// What the backup noted of leaf `number` of a stored file when it read it, slot by slot; a small file is one leaf. None
    /// where that is not known: the view must have been loaded with [`ViewOptions::changes`].
    pub fn changes(&self, node: NodeIndex, number: u64) -> Result<Option<Vec<SlotChange>>> {
        let stored = |changes: &u32| self.changes.get(*changes as usize);
        let (stat, chunk, at) = match &self.node(node)?.content {
            Content::Inline { stat, changes, .. } => match stored(changes) {
                Some(StoredChanges::Small(chunk, at)) => (stat, self.chunks[*chunk as usize], *at as usize),
                _ => return Ok(None),
            },
            Content::Mapped { stat, maps, index: true, .. } => (stat, self.indexed(maps, number)?.changes, 0),
            Content::Mapped { stat, changes, .. } => match stored(changes) {
                Some(StoredChanges::Leaves(leaves)) => (stat, self.chunks[leaves[number as usize] as usize], 0),
                _ => return Ok(None),
            },
            _ => return Ok(None),
        };
        let len = (stat.size - number * LEAF_BYTES).min(LEAF_BYTES);
        let plain = self.plain(&chunk)?;
        let noted = plain.get(at..).unwrap_or_default();
        Ok(Some(resolve_changes("changes", noted, len, |base| self.plain(base))?.slots))
    }
}
