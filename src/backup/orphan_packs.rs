//! What a backup left that died: packs that no manifest names. The next backup takes over what it needs of them.

use std::collections::HashMap;
use std::thread;

use crossbeam_channel::unbounded;

use super::dedup::{Dedup, Seen};
use crate::error::{Error, Result};
use crate::format::chunk::{ChunkRef, PackId};
use crate::format::pack::{TRAILER_LEN, Trailer};
use crate::repo::lock::Other;
use crate::repo::{Repository, layout, reread};

/// Requests under way at once.
const THREADS: usize = 8;
/// The end of a pack that is fetched first: mostly the whole footer.
const TAIL_BYTES: u64 = 16 * 1024;

/// Packs, and their lengths, that were written since the backups that left these locks began, and that no manifest names. None
/// where a manifest cannot be read: then nobody knows.
pub(super) fn left_behind(repository: &Repository, dead: &[Other]) -> Result<HashMap<PackId, u64>> {
    let Some(since) = dead.iter().filter_map(Other::since).min() else { return Ok(HashMap::new()) };
    let mut packs = repository.packs_since(since)?;
    repository.harmed_packs()?.iter().for_each(|pack| _ = packs.remove(pack));
    for label in repository.labels()? {
        match repository.manifest_packs(&label) {
            Ok(needed) => needed.iter().for_each(|of| _ = packs.remove(&of.pack)),
            // its manifest was never written, or it was expired just now
            Err(error) if error.is_not_found() => {}
            Err(error) if error.is_damage() => {
                tracing::warn!(label, %error, "a manifest is damaged: nothing is taken over from a backup that died");
                return Ok(HashMap::new());
            }
            Err(error) => return Err(error),
        }
    }
    Ok(packs)
}

/// Tells `dedup` what is in these packs. One whose end cannot be read is passed over: its chunks are stored anew.
pub(super) fn take_over(repository: &Repository, packs: &HashMap<PackId, u64>, dedup: &Dedup) -> Result<()> {
    let (queue, waiting) = unbounded();
    packs.iter().for_each(|(pack, size)| _ = queue.send((*pack, *size)));
    drop(queue);
    thread::scope(|scope| {
        let readers: Vec<_> = (0..THREADS.min(packs.len()))
            .map(|_| {
                let waiting = waiting.clone();
                scope.spawn(move || {
                    while let Ok((pack, size)) = waiting.recv() {
                        match footer(repository, pack, size) {
                            Ok(chunks) => remember(dedup, chunks),
                            Err(error) if error.is_damage() || error.is_not_found() => {
                                tracing::warn!(%pack, %error, "a pack left by another backup cannot be used");
                            }
                            Err(error) => return Err(error),
                        }
                    }
                    Ok(())
                })
            })
            .collect();
        readers.into_iter().try_for_each(|reader| reader.join().unwrap_or_else(|_| Err(Error::new("a thread died"))))
    })
}

fn remember(dedup: &Dedup, chunks: Vec<ChunkRef>) {
    chunks.into_iter().for_each(|chunk| dedup.insert(chunk.id, Seen { chunk, offset: 0 }));
}

/// The chunks of a pack, from its end.
fn footer(repository: &Repository, pack: PackId, size: u64) -> Result<Vec<ChunkRef>> {
    let key = layout::pack(&repository.stanza, pack);
    let from = size.saturating_sub(TAIL_BYTES);
    reread::checked(&*repository.store, |reads| {
        let tail = reads.get_range(&key, from, size - from)?;
        let trailer_at = tail.len().saturating_sub(TRAILER_LEN);
        let trailer = Trailer::parse(&key, size, &tail[trailer_at..])?;
        let footer = match trailer.footer_offset.checked_sub(from) {
            Some(at) => tail.slice(at as usize..trailer_at),
            None => reads.get_range(&key, trailer.footer_offset, u64::from(trailer.footer_len))?,
        };
        Ok(trailer.footer(&key, pack, &footer)?)
    })
}
