//! Content seen before in this backup: template databases, copied tables, runs of zeros. Bounded, recently used first.

use std::num::NonZeroUsize;

use lru::LruCache;
use parking_lot::Mutex;

use crate::format::chunk::{ChunkId, ChunkRef};

/// Slots remembered: about 16 MiB of memory, 16 GiB of files.
const CAPACITY: NonZeroUsize = NonZeroUsize::new(128 * 1024).expect("not zero");

/// Where the content of a slot is already stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// the chunk that holds it
    pub chunk: ChunkRef,
    /// where in that chunk's plaintext it begins
    pub offset: u32,
}

/// An index from a slot's name to where it is stored.
#[derive(Debug)]
pub struct Dedup {
    seen: Mutex<LruCache<ChunkId, Seen>>,
}

impl Default for Dedup {
    fn default() -> Self {
        Self { seen: Mutex::new(LruCache::new(CAPACITY)) }
    }
}

impl Dedup {
    /// Where this content is, if it is remembered.
    pub fn get(&self, id: &ChunkId) -> Option<Seen> {
        self.seen.lock().get(id).copied()
    }

    /// Remembers where this content was stored.
    pub fn insert(&self, id: ChunkId, seen: Seen) {
        self.seen.lock().put(id, seen);
    }
}
