//! Reading manifests: entry by entry, so that a million of them need not be in memory; by path; or their pack table alone.

use std::collections::VecDeque;

use bytes::Bytes;

use super::{Repository, layout, reread};
use crate::error::{Context, Result};
use crate::format::FormatError;
use crate::format::chunk::{ChunkRef, Decoder, PackId};
use crate::format::manifest::{
    BlockWriter, Description, Entry, ManifestReader, PackUse, decode_packs, decode_proof, path_cmp,
};
use crate::format::pack::{HEADER_LEN, Header, Pack, PackKind, TRAILER_LEN, Trailer};

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

/// A manifest whose entries are asked for in any order: a server sends the files of a directory in no order. Its entries are
/// kept in blocks so small that to decode one costs little; a small file takes some 45 bytes.
#[derive(Debug)]
pub struct ManifestIndex {
    /// the manifest's key
    key: String,
    /// of each block: length of the path of its first entry, that path, and the block
    blocks: Vec<u8>,
    /// where each of them begins
    starts: Vec<usize>,
}

/// Entries of one block of an index.
const INDEX_ENTRIES: usize = 16;

/// Bytes at the end of a large manifest that are fetched for its pack table: that of some ten thousand packs is in them.
const TAIL_BYTES: u64 = 1 << 20;

/// A manifest in memory as it is stored, proved; or its end alone.
#[derive(Debug)]
struct Object {
    key: String,
    pack: PackId,
    bytes: Bytes,
    /// what is missing before `bytes`
    from: u64,
    chunks: Vec<ChunkRef>,
    decoder: Decoder,
    repository: Repository,
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
        match Object::end(self, label)?.map(|mut end| end.packs()).transpose()?.flatten() {
            Some(packs) => Ok(packs),
            None => Object::get(self, label)?.whole_packs(),
        }
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

    /// The same manifest, from its beginning, by path. `each` sees every entry, in path order.
    pub fn by_path(&self, mut each: impl FnMut(&Entry)) -> Result<ManifestIndex> {
        let mut object = self.object.again()?;
        let mut index = ManifestIndex { key: object.key.clone(), blocks: Vec::new(), starts: Vec::new() };
        let (mut reader, mut gathered) = (ManifestReader::new(&object.key), Vec::new());
        for number in 0..object.chunks.len() {
            reader.chunk(&object.plain(number)?, |entry| {
                each(&entry);
                gathered.push(entry);
                if gathered.len() == INDEX_ENTRIES {
                    index.add(&gathered);
                    gathered.clear();
                }
            })?;
        }
        index.add(&gathered);
        Ok(index)
    }

    /// The name by which entries refer to chunks that lie in the manifest itself.
    pub fn pack(&self) -> PackId {
        self.object.pack
    }

    /// The manifest's key.
    pub fn key(&self) -> &str {
        &self.object.key
    }

    /// The stored bytes of a chunk that lies in the manifest itself.
    pub fn stored(&self, chunk: &ChunkRef) -> Option<Bytes> {
        // a copy: a slice would keep the whole manifest
        Some(Bytes::copy_from_slice(self.object.bytes.get(chunk.offset as usize..chunk.end() as usize)?))
    }

    /// The packs the backup needs, ascending by name.
    pub fn packs(&mut self) -> Result<Vec<PackUse>> {
        self.object.whole_packs()
    }
}

impl ManifestIndex {
    /// The entry of this path.
    pub fn find(&self, path: &[u8]) -> Result<Option<Entry>> {
        let after = self.starts.partition_point(|start| path_cmp(self.block(*start).0, path).is_le());
        let Some(number) = after.checked_sub(1) else { return Ok(None) };
        let end = self.starts.get(after).copied().unwrap_or(self.blocks.len());
        let (mut at, mut found) = (self.starts[number], None);
        while at < end {
            let (_, block, next) = self.block(at);
            ManifestReader::new(&self.key).chunk(block, |entry| {
                if entry.path == path {
                    found = Some(entry);
                }
            })?;
            at = next;
        }
        Ok(found)
    }

    /// Adds entries that follow those added before.
    fn add(&mut self, entries: &[Entry]) {
        let Some(first) = entries.first() else { return };
        self.starts.push(self.blocks.len());
        let mut writer = BlockWriter::default();
        // entries of many extents may fill more than one block
        let mut blocks: Vec<Vec<u8>> = entries.iter().filter_map(|entry| writer.push(entry)).collect();
        blocks.extend(writer.finish());
        for block in blocks {
            for part in [&first.path, &block] {
                self.blocks.extend_from_slice(&(part.len() as u32).to_le_bytes());
                self.blocks.extend_from_slice(part);
            }
        }
    }

    /// The path before the block at `at`, the block, and where the next one begins.
    fn block(&self, at: usize) -> (&[u8], &[u8], usize) {
        let part = |at: usize| {
            let bytes = self.blocks.get(at..).and_then(|rest| rest.split_first_chunk::<4>());
            let (len, rest) = bytes.map_or((0, &[][..]), |(len, rest)| (u32::from_le_bytes(*len) as usize, rest));
            (&rest[..len.min(rest.len())], at + 4 + len)
        };
        let (path, block_at) = part(at);
        let (block, next) = part(block_at);
        (path, block, next)
    }
}

impl Object {
    fn get(repository: &Repository, label: &str) -> Result<Self> {
        let key = layout::manifest(&repository.stanza, label);
        reread::checked(&*repository.store, |reads| {
            let (key, repository) = (key.clone(), repository.clone());
            let bytes = reads.get(&key)?;
            let pack = Pack::parse(&key, &bytes)?;
            pack.header.expect(&key, PackKind::Manifest, repository.keys.seal_kind())?;
            let decoder = Decoder::new().context(|| "cannot set up zstd".into())?;
            let object = Self { key, pack: pack.header.id, bytes, from: 0, chunks: pack.chunks, decoder, repository };
            object.proved(label)
        })
    }

    /// Checks the proof of the list of chunks, where manifests carry one, and takes it off the list.
    fn proved(mut self, label: &str) -> Result<Self> {
        let Some((last, listed)) = self.chunks.split_last() else { return Ok(self) };
        let Some(expected) = self.repository.keys.manifest_proof(label, self.pack, listed) else { return Ok(self) };
        let (at, plain) = (u64::from(last.offset), self.plain(self.chunks.len() - 1)?);
        let what = match decode_proof(&self.key, &plain)? {
            Some(proof) if proof == expected => {
                self.chunks.pop();
                return Ok(self);
            }
            Some(_) => format!("its list of chunks is not the one that was written for backup {label}"),
            None => "it has no proof of its list of chunks".to_owned(),
        };
        Err(FormatError::new(&self.key, at, what).into())
    }

    /// The end of a large manifest, where the pack table is: who looks at a thousand backups need not read every file's entry.
    fn end(repository: &Repository, label: &str) -> Result<Option<Self>> {
        let key = layout::manifest(&repository.stanza, label);
        let size = repository.store.size(&key)?.unwrap_or_default();
        let Some(from) = size.checked_sub(TAIL_BYTES).filter(|from| *from > 0) else { return Ok(None) };
        reread::checked(&*repository.store, |reads| {
            let key = key.clone();
            let header = Header::parse(&key, &reads.get_range(&key, 0, HEADER_LEN as u64)?)?;
            header.expect(&key, PackKind::Manifest, repository.keys.seal_kind())?;
            let bytes = reads.get_range(&key, from, TAIL_BYTES)?;
            let footer_end = bytes.len() - TRAILER_LEN;
            let trailer = Trailer::parse(&key, size, &bytes[footer_end..])?;
            let Some(footer) = trailer.footer_offset.checked_sub(from) else { return Ok(None) };
            let chunks = trailer.footer(&key, header.id, &bytes[footer as usize..footer_end])?;
            let decoder = Decoder::new().context(|| "cannot set up zstd".into())?;
            let repository = repository.clone();
            Self { key, pack: header.id, bytes, from, chunks, decoder, repository }.proved(label).map(Some)
        })
    }

    /// The same bytes, for who reads elsewhere in them.
    fn again(&self) -> Result<Self> {
        Ok(Self {
            key: self.key.clone(),
            pack: self.pack,
            bytes: self.bytes.clone(),
            from: self.from,
            chunks: self.chunks.clone(),
            decoder: Decoder::new().context(|| "cannot set up zstd".into())?,
            repository: self.repository.clone(),
        })
    }

    fn plain(&mut self, number: usize) -> Result<Vec<u8>> {
        let chunk = &self.chunks[number];
        let stored = &self.bytes[(u64::from(chunk.offset) - self.from) as usize..(chunk.end() - self.from) as usize];
        let keys = &self.repository.keys;
        let damage = match self.decoder.decode(keys, &self.key, chunk, stored) {
            Ok(decoded) => return Ok(decoded.plain),
            Err(damage) => damage,
        };
        // the answer may have been damaged, not the object
        let (offset, len) = (u64::from(chunk.offset), u64::from(chunk.stored_len));
        let mut again = || {
            reread::checked(&*self.repository.store, |reads| {
                let stored = reads.get_range(&self.key, offset, len)?;
                Ok(self.decoder.decode(keys, &self.key, chunk, &stored)?.plain)
            })
        };
        again().map_err(|error| match error.is_not_found() {
            // it was removed since: what is at hand is all there is
            true => damage.into(),
            false => error,
        })
    }

    fn whole_packs(&mut self) -> Result<Vec<PackUse>> {
        let packs = self.packs()?;
        packs.ok_or_else(|| FormatError::new(&self.key, 0, "only the end of it was read").into())
    }

    /// The pack table: the last chunks. `None` when it begins before what is in memory.
    fn packs(&mut self) -> Result<Option<Vec<PackUse>>> {
        let mut parts = Vec::new();
        for number in (0..self.chunks.len()).rev() {
            if u64::from(self.chunks[number].offset) < self.from {
                return Ok(None);
            }
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
            true => return Ok(Some(packs)),
            false => "the pack table is not in order",
        };
        Err(FormatError::new(&self.key, 0, what).into())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::Arc;

    use super::*;
    use crate::format::chunk::{Encoder, Keys};
    use crate::format::manifest::{ENTRY_LEAVES, Place, encode_packs, encode_proof};
    use crate::format::map::LeafRef;
    use crate::format::pack::PackWriter;
    use crate::format::seal::SealKind;
    use crate::store::{Body, MemoryStore, Operation, Record};

    const LABEL: &str = "20240107-120000F";

    /// A manifest of `parts` 64 KiB parts of a description and a table of `packs` packs.
    fn manifest(keys: &Keys, parts: usize, packs: u32) -> (Vec<u8>, Vec<PackUse>) {
        let table: Vec<PackUse> = (0..packs)
            .map(|number| {
                // names that cannot be compressed
                let mut pack = PackId::default();
                pack.0[..4].copy_from_slice(&number.to_be_bytes());
                pack.0[4..].copy_from_slice(&blake3::hash(&number.to_le_bytes()).as_bytes()[..12]);
                PackUse { pack, size: 1 << 24, weight: 1 << 20 }
            })
            .collect();
        let mut writer = PackWriter::new(PackKind::Manifest, keys.seal_kind(), PackId([9; 16]), 0);
        let mut encoder = Encoder::new(1).unwrap();
        let noise = |number: usize| {
            let mut noise = vec![1; 64 * 1024];
            blake3::Hasher::new().update(&number.to_le_bytes()).finalize_xof().fill(&mut noise[1..]);
            noise
        };
        for plain in (0..parts).map(noise).chain(encode_packs(&table)) {
            let (id, mut stored) = (keys.digest(&plain).id, Vec::new());
            encoder.encode(keys, &id, &plain, &mut stored).unwrap();
            writer.add(id, plain.len(), &stored);
        }
        (writer.finish(), table)
    }

    /// The manifest of `label` as its writer makes it: the two `parts`, an empty pack table, the proof.
    fn proved_manifest(keys: &Keys, label: &str, id: u8, parts: [&[u8]; 2]) -> Vec<u8> {
        let mut writer = PackWriter::new(PackKind::Manifest, keys.seal_kind(), PackId([id; 16]), 0);
        let mut encoder = Encoder::new(1).unwrap();
        let mut add = |writer: &mut PackWriter, plain: &[u8]| {
            let (id, mut stored) = (keys.digest(plain).id, Vec::new());
            encoder.encode(keys, &id, plain, &mut stored).unwrap();
            writer.add(id, plain.len(), &stored);
        };
        parts.iter().for_each(|part| add(&mut writer, &[&[1], *part].concat()));
        encode_packs(&[]).iter().for_each(|part| add(&mut writer, part));
        if let Some(proof) = keys.manifest_proof(label, PackId([id; 16]), writer.chunks()) {
            add(&mut writer, &encode_proof(&proof));
        }
        writer.finish()
    }

    /// What somebody makes who has no secret: a manifest out of stored chunks of others.
    fn spliced(id: u8, chunks: &[(&[u8], usize)]) -> Vec<u8> {
        let mut writer = PackWriter::new(PackKind::Manifest, SealKind::Encrypted, PackId([id; 16]), 0);
        for (from, number) in chunks {
            let chunk = Pack::parse("from", from).unwrap().chunks[*number];
            let stored = &from[chunk.offset as usize..chunk.end() as usize];
            writer.add(chunk.id, chunk.plain_len as usize, stored);
        }
        writer.finish()
    }

    #[test]
    fn a_manifest_spliced_from_others_is_refused_without_the_secret() {
        const OLDER: &str = "20240106-120000F";
        let keys = Keys::with_manifest_proof(b"a secret");
        let old = proved_manifest(&keys, OLDER, 8, [b"old description", b"old entries"]);
        let new = proved_manifest(&keys, LABEL, 9, [b"description", b"entries"]);
        let forged = [
            ("blocks of two, the proof of one", spliced(9, &[(&new, 0), (&old, 1), (&new, 2), (&new, 3)])),
            ("a block left out", spliced(9, &[(&new, 0), (&new, 2), (&new, 3)])),
            ("blocks in another order", spliced(9, &[(&new, 1), (&new, 0), (&new, 2), (&new, 3)])),
            ("no proof", spliced(9, &[(&new, 0), (&old, 1), (&new, 2)])),
            ("the name of another pack", spliced(8, &[(&new, 0), (&new, 1), (&new, 2), (&new, 3)])),
            ("the manifest of another backup", old.clone()),
            ("nothing but a proof", spliced(9, &[(&new, 3)])),
        ];
        let store = Arc::new(MemoryStore::new());
        let repository = Repository { keys: keys.clone(), ..Repository::new(store, "main").unwrap() };
        let read = |bytes: &[u8]| {
            let key = layout::manifest("main", LABEL);
            repository.store.put(&key, Body::Bytes(bytes.to_vec().into())).unwrap();
            repository.manifest_packs(LABEL)
        };
        assert_eq!(read(&new).unwrap(), []);
        for (what, bytes) in forged {
            let error = read(&bytes).expect_err(what);
            let told = format!("{error:?}");
            assert!(error.is_damage() && told.contains("list of chunks"), "{what}: {told}");
        }
        // a stanza made before manifests had proofs
        let unproved = Repository { keys: Keys::new(b"a secret"), ..repository.clone() };
        let old = proved_manifest(&unproved.keys, LABEL, 9, [b"description", b"entries"]);
        repository.store.put(&layout::manifest("main", LABEL), Body::Bytes(old.into())).unwrap();
        assert_eq!(unproved.manifest_packs(LABEL).unwrap(), []);
        assert!(repository.manifest_packs(LABEL).is_err());
    }

    #[test]
    fn a_pack_table_is_read_without_the_entries_before_it() {
        // a small manifest, a large one, and one whose table alone is longer than what is fetched first
        for (parts, packs, whole) in [(1, 10, true), (40, 5000, false), (20, 80_000, true)] {
            let store = Record::new(MemoryStore::new());
            let recording = store.recording();
            let repository = Repository::new(Arc::new(store), "main").unwrap();
            let (bytes, table) = manifest(&repository.keys, parts, packs);
            let key = layout::manifest("main", LABEL);
            repository.store.put(&key, Body::Bytes(bytes.clone().into())).unwrap();
            assert_eq!(repository.manifest_packs(LABEL).unwrap(), table);
            assert_eq!(recording.count(Operation::Get).calls, u64::from(whole), "{parts} {packs}");
            // damage at the end is found
            for at in [bytes.len() - 20, bytes.len() - 100, bytes.len() - 5000, 3] {
                let mut spoilt = bytes.clone();
                spoilt[at] ^= 1;
                repository.store.put(&key, Body::Bytes(spoilt.into())).unwrap();
                let read = repository.manifest_packs(LABEL);
                // the object's hash cannot be checked by who reads the end alone: what the table says is proved by itself
                let is_object_hash = at == bytes.len() - 20 && !whole;
                assert!(read.is_err() || is_object_hash && read.unwrap() == table, "{at} of {}", bytes.len());
            }
        }
    }

    #[test]
    fn entries_are_found_by_path_in_any_order() {
        let entry = |number: usize| Entry {
            path: format!("pg_tblspc/{}", number + 1).into_bytes(),
            mode: 0o600,
            identity: None,
            mtime: 7,
            node: crate::format::manifest::Node::Symlink(vec![b'x'; number % 50]),
        };
        let mut entries: Vec<Entry> = (0..3000).map(entry).collect();
        entries.sort_by(|a, b| path_cmp(&a.path, &b.path));
        // more than one block's worth in one run of entries
        let chunk = |number: u32| ChunkRef {
            pack: PackId([1; 16]),
            offset: 32 + number,
            stored_len: 20,
            plain_len: 20,
            id: crate::format::chunk::ChunkId(*blake3::hash(&number.to_le_bytes()).as_bytes()),
        };
        let leaves = (0..ENTRY_LEAVES as u32).map(|at| LeafRef { map: chunk(2 * at), changes: chunk(2 * at + 1) });
        let size = ENTRY_LEAVES as u64 * crate::format::LEAF_BYTES;
        let file = crate::format::manifest::File { size, crc: 1, place: Place::Leaves(leaves.collect()) };
        (16..28).for_each(|at| entries[at].node = crate::format::manifest::Node::File(file.clone()));
        let mut index = ManifestIndex { key: "m".into(), blocks: Vec::new(), starts: Vec::new() };
        entries.chunks(INDEX_ENTRIES).for_each(|run| index.add(run));
        for number in (0..3000).map(|number| number * 7919 % 3000) {
            assert_eq!(index.find(&entries[number].path).unwrap().as_ref(), Some(&entries[number]));
        }
        for absent in ["", "a", "pg_tblspc/", "pg_tblspc/3001", "pg_tblspc/17x", "zzz"] {
            assert_eq!(index.find(absent.as_bytes()).unwrap(), None, "{absent}");
        }
    }
}
