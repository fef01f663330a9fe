//! WAL that is stored with a backup: the segments among its files, and their content.

use std::collections::BTreeMap;

use super::manifest::ManifestCursor;
use super::proof::{Claims, Contradiction, wal_of};
use super::wal::wal_identity;
use super::{Repository, layout, reread};
use crate::error::{Context, Error, Result};
use crate::format::chunk::{ChunkRef, Decoder};
use crate::format::manifest::{Entry, File, Node, Place};
use crate::format::map::{Extent, Leaf, decode_index};
use crate::format::{FormatError, LEAF_BYTES};
use crate::postgres::SegmentName;
use crate::postgres::wal::landmarks::Landmarks;

/// Stored bytes that one request asks for.
const REQUEST_BYTES: u64 = 8 << 20;

/// The segments that a backup has among its files.
pub type StoredWal = BTreeMap<SegmentName, File>;

/// The WAL segment that an entry of a manifest is.
pub fn stored_segment(entry: &Entry) -> Option<(SegmentName, &File)> {
    let name = std::str::from_utf8(entry.path.strip_prefix(b"pg_wal/")?).ok()?;
    match &entry.node {
        Node::File(file) => Some((name.parse().ok()?, file)),
        _ => None,
    }
}

impl ManifestCursor {
    /// The segments among the entries that are still to come.
    pub fn stored_wal(&mut self) -> Result<StoredWal> {
        let mut stored = StoredWal::new();
        while let Some(entry) = self.next()? {
            stored.extend(stored_segment(&entry).map(|(segment, file)| (segment, file.clone())));
        }
        Ok(stored)
    }
}

impl Repository {
    /// Compares a backup with the WAL that it stores; `None` if that is its WAL, and all of it.
    pub fn stored_contradiction(&self, manifest: &ManifestCursor, stored: &StoredWal) -> Result<Option<Contradiction>> {
        let of = &manifest.description;
        let damage = |error: Error| FormatError::new(manifest.key(), 0, error.told());
        let (claims, identity) = (Claims::of(of).map_err(damage)?, wal_identity(&of.database).map_err(damage)?);
        let size = identity.segment_size;
        let (first, last) = wal_of(of).map_err(damage)?;
        for segment in first.up_to(last, size) {
            let what = match stored.get(&segment) {
                None => None,
                Some(file) if file.size == u64::from(size.bytes()) => continue,
                Some(file) => Some(format!("has {} bytes, a segment has {}", file.size, size.bytes())),
            };
            return Ok(Some(Contradiction { segment, what }));
        }
        let mut found = BTreeMap::new();
        for segment in claims.segments(size).into_iter().filter(|segment| (first..=last).contains(segment)) {
            let Some(file) = stored.get(&segment) else { continue };
            let bytes = self.stored_file(manifest, file).context(|| format!("cannot read pg_wal/{segment}"))?;
            match Landmarks::read(&identity, segment, &bytes) {
                Ok(landmarks) => _ = found.insert(segment, landmarks),
                Err(error) => {
                    return Ok(Some(Contradiction { segment, what: Some(format!("is something else: {error}")) }));
                }
            }
        }
        Ok(claims.judge(&identity, &found))
    }

    /// The content of a file of a backup, whole.
    fn stored_file(&self, manifest: &ManifestCursor, file: &File) -> Result<Vec<u8>> {
        let mut decoder = Decoder::new().context(|| "cannot set up zstd".into())?;
        let extents = self.extents(manifest, file, &mut decoder)?;
        // a file's chunks mostly lie one behind the other in their pack
        let mut chunks: Vec<ChunkRef> = extents.iter().map(|extent| extent.chunk).collect();
        chunks.dedup();
        let mut plains = Vec::with_capacity(chunks.len());
        for run in chunks.chunk_by(follows) {
            for part in parts(run) {
                plains.extend(self.plains(manifest, part, &mut decoder)?);
            }
        }
        let (mut bytes, mut number) = (Vec::with_capacity(file.size as usize), 0);
        for extent in &extents {
            while chunks.get(number).is_some_and(|chunk| *chunk != extent.chunk) {
                number += 1;
            }
            let (from, plain) = (extent.offset as usize, plains.get(number).map_or(&[][..], Vec::as_slice));
            let part = plain.get(from..from + extent.len as usize);
            bytes.extend_from_slice(
                part.ok_or_else(|| FormatError::new(manifest.key(), 0, "an extent past its chunk"))?,
            );
        }
        Ok(bytes)
    }

    fn extents(&self, manifest: &ManifestCursor, file: &File, decoder: &mut Decoder) -> Result<Vec<Extent>> {
        let mut one = |chunk: &ChunkRef| -> Result<Vec<u8>> {
            let mut plains = self.plains(manifest, std::slice::from_ref(chunk), decoder)?;
            plains.pop().ok_or_else(|| Error::new("no chunk"))
        };
        let leaves = match &file.place {
            Place::Inline { extents, .. } => return Ok(extents.clone()),
            Place::Leaves(leaves) => leaves.clone(),
            Place::Index(index) => {
                let mut leaves = Vec::new();
                for chunk in index {
                    leaves.extend(decode_index(&layout::pack(&self.stanza, chunk.pack), &one(chunk)?)?);
                }
                leaves
            }
        };
        let mut extents = Vec::new();
        for (number, leaf) in (0..).zip(&leaves) {
            let len = file.size.saturating_sub(number * LEAF_BYTES).min(LEAF_BYTES);
            let leaf = Leaf::decode(&layout::pack(&self.stanza, leaf.map.pack), &one(&leaf.map)?, len)?;
            (0..leaf.slots()).for_each(|slot| extents.extend_from_slice(leaf.slot(slot)));
        }
        Ok(extents)
    }

    /// The plaintext of chunks that lie one behind the other, proved.
    fn plains(&self, manifest: &ManifestCursor, run: &[ChunkRef], decoder: &mut Decoder) -> Result<Vec<Vec<u8>>> {
        let Some((first, last)) = run.first().zip(run.last()) else { return Ok(Vec::new()) };
        let mut prove = |key: &str, chunk: &ChunkRef, stored: &[u8]| -> Result<Vec<u8>> {
            Ok(decoder.prove(&self.keys, key, chunk, stored)?.plain)
        };
        if first.pack == manifest.pack() {
            let lost = || FormatError::new(manifest.key(), u64::from(first.offset), "a chunk past its end");
            let own = |chunk: &ChunkRef| prove(manifest.key(), chunk, &manifest.stored(chunk).ok_or_else(lost)?);
            return run.iter().map(own).collect();
        }
        let (key, from) = (layout::pack(&self.stanza, first.pack), u64::from(first.offset));
        reread::checked(&*self.store, |reads| {
            let bytes = reads.get_range(&key, from, last.end() - from)?;
            let stored =
                |chunk: &ChunkRef| &bytes[(u64::from(chunk.offset) - from) as usize..(chunk.end() - from) as usize];
            run.iter().map(|chunk| prove(&key, chunk, stored(chunk))).collect()
        })
    }
}

fn follows(a: &ChunkRef, b: &ChunkRef) -> bool {
    a.pack == b.pack && a.end() == u64::from(b.offset)
}

/// A run in parts that one request each brings.
fn parts(run: &[ChunkRef]) -> Vec<&[ChunkRef]> {
    let (mut parts, mut rest) = (Vec::new(), run);
    while let Some(first) = rest.first() {
        let limit = u64::from(first.offset) + REQUEST_BYTES;
        let (part, behind) = rest.split_at(rest.iter().take_while(|chunk| chunk.end() <= limit).count().max(1));
        parts.push(part);
        rest = behind;
    }
    parts
}
