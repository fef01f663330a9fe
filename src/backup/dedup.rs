//! Content seen before: template databases, copied tables, runs of zeros, what a backup that died has stored. Bounded,
//! recently used first.

use std::num::NonZeroUsize;

use lru::LruCache;
use parking_lot::Mutex;

use crate::format::chunk::{ChunkId, ChunkRef};

/// Names remembered, of chunks and of pieces of small files: about 20 MiB of memory, up to 128 GiB of large files.
const CAPACITY: NonZeroUsize = NonZeroUsize::new(128 * 1024).expect("not zero");

/// Where content is already stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// the chunk that holds it
    pub chunk: ChunkRef,
    /// where in that chunk's plaintext it begins
    pub offset: u32,
}

/// An index from names to where what they name is stored.
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
