//! Chunks that a writer reads: small ones, in the order in which they were stored, so that one request brings many.

use bytes::Bytes;
use parking_lot::Mutex;

use super::{Repository, layout, reread};
use crate::error::{Context, Result};
use crate::format::chunk::{ChunkRef, Decoder, PackId};

/// What one request asks for at least, where the pack has that much.
const WINDOW_BYTES: u64 = 1 << 20;
/// Windows kept: of maps, of changes and of the changes' bases, for workers that are not far from each other.
const WINDOWS: usize = 12;

impl Repository {
    /// One chunk of a pack below `chunk/`, proved in every way.
    pub fn fetch_chunk(&self, decoder: &mut Decoder, chunk: &ChunkRef) -> Result<Vec<u8>> {
        let key = layout::pack(&self.stanza, chunk.pack);
        reread::checked(&*self.store, |reads| {
            let stored = reads.get_range(&key, u64::from(chunk.offset), u64::from(chunk.stored_len))?;
            Ok(decoder.prove(&self.keys, &key, chunk, &stored)?.plain)
        })
    }
}

/// Reads file maps and changes, a window of neighbours at a time.
pub struct ChunkReader {
    repository: Repository,
    state: Mutex<State>,
}

struct State {
    /// most recently used last
    windows: Vec<Window>,
    decoder: Decoder,
}

struct Window {
    pack: PackId,
    from: u64,
    bytes: Bytes,
}

impl Window {
    fn has(&self, chunk: &ChunkRef) -> bool {
        let (from, to) = (self.from, self.from + self.bytes.len() as u64);
        self.pack == chunk.pack && from <= u64::from(chunk.offset) && chunk.end() <= to
    }
}

impl ChunkReader {
    /// Reads chunks of `repository`.
    pub fn new(repository: &Repository) -> Result<Self> {
        let decoder = Decoder::new().context(|| "cannot set up zstd".into())?;
        Ok(Self { repository: repository.clone(), state: Mutex::new(State { windows: Vec::new(), decoder }) })
    }

    /// The plaintext of a chunk, proved. `pack_bytes` is the length of its pack, if it is known.
    pub fn read(&self, chunk: &ChunkRef, pack_bytes: Option<u64>) -> Result<Vec<u8>> {
        let key = layout::pack(&self.repository.stanza, chunk.pack);
        // held while fetching: who waits here wants the same window
        let State { windows, decoder } = &mut *self.state.lock();
        match windows.iter().position(|window| window.has(chunk)) {
            Some(at) => windows[at..].rotate_left(1),
            None => {
                let from = u64::from(chunk.offset);
                let to = chunk.end().max(pack_bytes.unwrap_or(0).min(from + WINDOW_BYTES));
                let bytes = self.repository.store.get_range(&key, from, to - from)?;
                if windows.len() >= WINDOWS {
                    windows.remove(0);
                }
                windows.push(Window { pack: chunk.pack, from, bytes });
            }
        }
        let window = &windows[windows.len() - 1];
        let stored = &window.bytes[(u64::from(chunk.offset) - window.from) as usize..];
        let stored = &stored[..chunk.stored_len as usize];
        match decoder.decode(&self.repository.keys, &key, chunk, stored) {
            Ok(decoded) => Ok(decoded.plain),
            Err(_) => {
                // nobody is to meet the window again
                windows.pop();
                self.repository.fetch_chunk(decoder, chunk)
            }
        }
    }
}

impl std::fmt::Debug for ChunkReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ChunkReader")
    }
}
