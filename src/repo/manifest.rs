//! Reading manifests: entry by entry, so that a million of them need not be in memory, or their pack table alone.

use std::collections::VecDeque;

use bytes::Bytes;

use super::{Repository, keys};
use crate::error::{Context, Result};
use crate::format::FormatError;
use crate::format::chunk::{ChunkRef, Decoder, PackId};
use crate::format::manifest::{Description, Entry, ManifestReader, PackUse, decode_packs};
use crate::format::pack::{Pack, PackKind};

/// A manifest that is being read.
#[derive(Debug)]
pub struct ManifestCursor {
    /// what the backup is
    pub description: Description,
    object: Object,
    next: usize,
    reader: ManifestReader,
    entries: VecDeque<Entry>,
}

/// A manifest in memory as it is stored, proved.
#[derive(Debug)]
struct Object {
    key: String,
    pack: PackId,
    bytes: Bytes,
    chunks: Vec<ChunkRef>,
    decoder: Decoder,
    keys: crate::format::chunk::Keys,
}

impl Repository {
    /// Opens the manifest of a backup.
    pub fn open_manifest(&self, label: &str) -> Result<ManifestCursor> {
        let mut object = Object::get(self, label)?;
        let mut reader = ManifestReader::new(&object.key);
        let (mut next, mut entries) = (0, VecDeque::new());
        while next < object.chunks.len() && entries.is_empty() {
            reader.chunk(&object.plain(next)?, |entry| entries.push_back(entry))?;
            next += 1;
        }
        let description = reader.description()?;
        match description.label == label {
            true => Ok(ManifestCursor { description, object, next, reader, entries }),
            false => {
                let what = format!("it is the manifest of backup {}", description.label);
                Err(FormatError::new(&object.key, 0, what).into())
            }
        }
    }

    /// Reads a manifest, handing its entries to `each` in path order.
    pub fn manifest(&self, label: &str, mut each: impl FnMut(Entry)) -> Result<Description> {
        let mut cursor = self.open_manifest(label)?;
        while let Some(entry) = cursor.next()? {
            each(entry);
        }
        Ok(cursor.description)
    }

    /// The packs a backup needs, ascending by name.
    pub fn manifest_packs(&self, label: &str) -> Result<Vec<PackUse>> {
        Object::get(self, label)?.packs()
    }
}

impl ManifestCursor {
    /// The next entry in path order.
    #[expect(clippy::should_implement_trait, reason = "it can fail, and then there is nothing to go on with")]
    pub fn next(&mut self) -> Result<Option<Entry>> {
        while self.entries.is_empty() && self.next < self.object.chunks.len() {
            let plain = self.object.plain(self.next)?;
            self.reader.chunk(&plain, |entry| self.entries.push_back(entry))?;
            self.next += 1;
        }
        Ok(self.entries.pop_front())
    }

    /// The name by which entries refer to chunks that lie in the manifest itself.
    pub fn pack(&self) -> PackId {
        self.object.pack
    }

    /// The manifest's key.
    pub fn key(&self) -> &str {
        &self.object.key
    }

    /// The packs the backup needs, ascending by name.
    pub fn packs(&mut self) -> Result<Vec<PackUse>> {
        self.object.packs()
    }
}

impl Object {
    fn get(repository: &Repository, label: &str) -> Result<Self> {
        let key = keys::manifest(&repository.stanza, label);
        let bytes = repository.store.get(&key)?;
        let pack = Pack::parse(&key, &bytes)?;
        pack.header.expect(&key, PackKind::Manifest, repository.keys.seal_kind())?;
        let decoder = Decoder::new().context(|| "cannot set up zstd".into())?;
        Ok(Self { key, pack: pack.header.id, bytes, chunks: pack.chunks, decoder, keys: repository.keys.clone() })
    }

    fn plain(&mut self, number: usize) -> Result<Vec<u8>> {
        let chunk = &self.chunks[number];
        let stored = &self.bytes[chunk.offset as usize..chunk.end() as usize];
        Ok(self.decoder.decode(&self.keys, &self.key, chunk, stored)?.plain)
    }

    /// The pack table: the last chunks.
    fn packs(&mut self) -> Result<Vec<PackUse>> {
        let mut parts = Vec::new();
        for number in (0..self.chunks.len()).rev() {
            let plain = self.plain(number)?;
            match decode_packs(&self.key, &plain)? {
                Some(part) => parts.push(part),
                None => break,
            }
        }
        let is_missing = parts.is_empty();
        let packs: Vec<PackUse> = parts.into_iter().rev().flatten().collect();
        let what = match packs.is_sorted_by(|a, b| a.pack < b.pack) {
            // who deletes must not take this for "needs nothing"
            _ if is_missing => "it has no pack table",
            true => return Ok(packs),
            false => "the pack table is not in order",
        };
        Err(FormatError::new(&self.key, 0, what).into())
    }
}
