//! Small files, planned by where they are stored: each stored range is fetched once, and each chunk decoded once, however many
//! files share it.

use std::collections::HashMap;
use std::ops::Range;

use super::plan::Target;
use crate::format::chunk::PackId;
use crate::read::fetch::REQUEST_BYTES;
use crate::read::view::{Content, View};

/// Pieces that are planned together. It bounds the memory of a plan, whatever the number of files, and is large enough that
/// few ranges are fetched again for a later batch.
const BATCH_PIECES: usize = 256 * 1024;
/// Chunks of one pack are fetched together when at most this many bytes that nobody needs lie between them.
const GAP_BYTES: u64 = 256 * 1024;

/// A run of bytes of a small file, and where it is stored.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    /// number of the file among those that are written
    pub(super) file: u32,
    /// first byte in the file
    pub(super) at: u32,
    pub(super) len: u32,
    /// number of the chunk in the view
    pub(super) chunk: u32,
    /// first byte in the chunk's plaintext
    pub(super) offset: u32,
}

/// Pieces in the order in which they are stored.
#[derive(Debug)]
pub(super) struct Batch {
    pub(super) pieces: Vec<Piece>,
}

/// True for files whose extents are in the manifest: several of them share a chunk.
pub(super) fn is_small(view: &View, target: &Target) -> bool {
    let content = view.node(target.node).map(|node| &node.content);
    target.size > 0 && matches!(content, Ok(Content::Inline { .. }))
}

/// Adds the pieces of a small file that lie in these ranges, which are in file order.
pub(super) fn add_pieces(view: &View, target: &Target, file: u32, ranges: &[(u64, u64)], pieces: &mut Vec<Piece>) {
    let Ok(Content::Inline { extents, .. }) = view.node(target.node).map(|node| &node.content) else { return };
    let mut at = 0;
    let first = pieces.len();
    for extent in extents {
        let end = at + u64::from(extent.len);
        for (from, to) in ranges {
            let (start, stop) = (at.max(*from), end.min(*to));
            if start >= stop {
                continue;
            }
            let (len, offset) = ((stop - start) as u32, extent.offset + (start - at) as u32);
            match pieces[first..].last_mut() {
                Some(last)
                    if last.chunk == extent.chunk
                        && u64::from(last.at + last.len) == start
                        && last.offset + last.len == offset =>
                {
                    last.len += len;
                }
                _ => pieces.push(Piece { file, at: start as u32, len, chunk: extent.chunk, offset }),
            }
        }
        at = end;
    }
}

/// Cuts pieces into batches and hands each to `each`, until that says that nobody takes them any more.
pub(super) fn in_batches(view: &View, pieces: impl Iterator<Item = Piece>, mut each: impl FnMut(Batch) -> bool) {
    let mut pieces = pieces.peekable();
    while pieces.peek().is_some() {
        if !each(Batch::new(view, pieces.by_ref().take(BATCH_PIECES).collect())) {
            return;
        }
    }
}

impl Batch {
    /// Sorts pieces by pack, in the order in which the packs are first needed, and by place in the pack.
    fn new(view: &View, mut pieces: Vec<Piece>) -> Self {
        let mut packs: HashMap<PackId, u32> = HashMap::new();
        for piece in &pieces {
            let next = packs.len() as u32;
            packs.entry(view.chunk(piece.chunk).pack).or_insert(next);
        }
        pieces.sort_by_cached_key(|piece| {
            let chunk = view.chunk(piece.chunk);
            (packs[&chunk.pack], chunk.offset, piece.chunk, piece.file, piece.at)
        });
        Self { pieces }
    }

    /// Pieces whose chunks one request fetches.
    pub(super) fn requests(&self, view: &View) -> Vec<Range<usize>> {
        let mut requests: Vec<Range<usize>> = Vec::new();
        let (mut from, mut end, mut pack) = (0, 0, None);
        for (number, piece) in self.pieces.iter().enumerate() {
            let chunk = view.chunk(piece.chunk);
            let is_near = pack == Some(chunk.pack)
                && u64::from(chunk.offset) <= end + GAP_BYTES
                && chunk.end() - from <= REQUEST_BYTES;
            // what is kept in memory is there chunk by chunk
            let is_same = number > 0 && self.pieces[number - 1].chunk == piece.chunk;
            match requests.last_mut().filter(|_| is_same || is_near && !view.fetcher().is_held(chunk)) {
                Some(last) => (last.end, end) = (number + 1, end.max(chunk.end())),
                None => {
                    requests.push(number..number + 1);
                    (from, end) = (u64::from(chunk.offset), chunk.end());
                    pack = Some(chunk.pack).filter(|_| !view.fetcher().is_held(chunk));
                }
            }
        }
        requests
    }
}
