//! Chunks that a store did not give in time.
//!
//! A read that fails is tried again at once by the kernel, page by page, and a program would wait for the store's whole
//! deadline once more. So for a while after a long wait the answer is the same, without another.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::error::Error;
use crate::format::chunk::ChunkId;

/// A failure that came sooner is not remembered.
const SHORTEST: Duration = Duration::from_secs(1);
/// The longest time for which one is.
const LONGEST: Duration = Duration::from_secs(10);

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Stalled(Mutex<HashMap<ChunkId, (Instant, Arc<Error>)>>);

impl Stalled {
    /// Remembers that `chunks` could not be had, after a wait of `waited`.
    pub(super) fn add(&self, chunks: impl IntoIterator<Item = ChunkId>, waited: Duration, error: &Arc<Error>) {
        if waited < SHORTEST {
            return;
        }
        let now = Instant::now();
        let until = now + waited.min(LONGEST);
        let mut known = self.0.lock();
        known.retain(|_, (until, _)| *until > now);
        known.extend(chunks.into_iter().map(|chunk| (chunk, (until, error.clone()))));
    }

    /// Why this chunk could not be had a moment ago.
    pub(super) fn error(&self, chunk: &ChunkId) -> Option<Arc<Error>> {
        let known = self.0.lock();
        known.get(chunk).filter(|(until, _)| *until > Instant::now()).map(|(_, error)| error.clone())
    }
}
