//! Results of the workers, which come in any order, into a manifest, which is in path order.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::chunker::{Cut, LeafPart, SmallFile};
use super::pack_usage::Weights;
use super::packer::{Stored, random_pack_id};
use super::scan::{Scanned, ScannedKind};
use super::sorter::Sorter;
use super::source::BadPage;
use crate::error::{Error, Result};
use crate::format::chunk::{ChunkRef, Encoder, Keys, PackId};
use crate::format::manifest::{
    BlockWriter, Description, ENTRY_LEAVES, Entry, File, Node, PackUse, PageErrors, Place, encode_description,
    encode_own, encode_packs, encode_proof,
};
use crate::format::map::{Extent, INDEX_LEAVES, LeafRef, SlotChange, encode_index};
use crate::format::pack::{HEADER_LEN, PackKind, PackWriter};
use crate::format::{LEAF_BYTES, SLOT};
use crate::postgres::Lsn;

/// What one job of a worker gave. Jobs are numbered in path order, unless the assembler sorts.
#[derive(Debug)]
pub enum Done {
    /// a run of small files, and of directories and links between them
    Small(Vec<(Scanned, Option<Cut<SmallFile>>)>),
    /// one leaf of a large file; the last one completes it
    Leaf {
        /// the file
        file: Arc<Scanned>,
        /// the leaf's number
        number: u64,
        /// what was read
        part: Cut<LeafPart>,
    },
    /// a large file that the parent has, and the packs it needs
    Same(Scanned, Arc<File>, Weights),
    /// the place of what is read last
    Later(Later),
}

/// What is read after everything else, but has its place in the middle of the manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Later {
    /// `global/pg_control`
    Control,
    /// WAL segments stored with the backup
    Wal,
}

/// Stores an index chunk of a file too large for its entry.
pub type StoreIndex<'a> = &'a (dyn Fn(&[u8]) -> Result<ChunkRef> + Sync);

/// A manifest in the making. Compressed blocks are all it keeps of what is behind it.
pub struct Assembler {
    next: usize,
    waiting: BTreeMap<usize, Done>,
    partial: Option<Partial>,
    /// where entries wait that do not come in path order
    sorter: Option<Sorter>,
    block: BlockWriter,
    blocks: Vec<Block>,
    encoder: Encoder,
    keys: Keys,
    /// the manifest is a pack, and holds pg_control itself
    id: PackId,
    own: Option<Stored>,
    /// pages whose checksum was wrong in files that are taken over from the parent, by path
    old_errors: HashMap<String, Vec<u64>>,
    totals: Totals,
}

/// What a backup adds up to.
#[derive(Debug, Default)]
pub struct Totals {
    /// number of files
    pub files: u64,
    /// sum of their lengths
    pub bytes: u64,
    /// sum of the lengths of those that were read
    pub read: u64,
    /// what the backup needs of each pack
    pub weights: Weights,
    /// pages whose checksum is wrong, by file
    bad_pages: Vec<(String, Vec<BadPage>)>,
}

enum Block {
    Ready(Stored),
    Later(Later),
}

struct Partial {
    leaves: Vec<LeafRef>,
    crc: u32,
    mtime: i64,
    bad_pages: Vec<BadPage>,
    weights: Weights,
    vanished: bool,
}

impl Assembler {
    /// An empty manifest; `old_errors` are the parent's.
    pub fn new(keys: Keys, old_errors: &[PageErrors]) -> Result<Self> {
        let encoder = Encoder::new(3).map_err(|error| Error::new("cannot set up zstd").source(error))?;
        Ok(Self {
            next: 0,
            waiting: BTreeMap::new(),
            partial: None,
            sorter: None,
            block: BlockWriter::default(),
            blocks: Vec::new(),
            encoder,
            keys,
            id: random_pack_id()?,
            own: None,
            old_errors: old_errors.iter().map(|errors| (errors.file.clone(), errors.blocks.clone())).collect(),
            totals: Totals::default(),
        })
    }

    /// The same for jobs in any order of their paths: then nothing is left open for later.
    #[must_use]
    pub fn in_any_order(self) -> Self {
        Self { sorter: Some(Sorter::default()), ..self }
    }

    /// Takes the result of job `number`; returns how many jobs are complete up to the first that is missing.
    pub fn take(&mut self, number: usize, done: Done, index: StoreIndex<'_>) -> Result<usize> {
        self.waiting.insert(number, done);
        while let Some(done) = self.waiting.remove(&self.next) {
            self.next += 1;
            match done {
                Done::Small(files) => files.into_iter().try_for_each(|(found, cut)| self.small(found, cut))?,
                Done::Leaf { file, number, part } => self.leaf(file, number, part, index)?,
                Done::Same(found, file, weights) => {
                    self.totals.weights.merge(&weights);
                    self.same(&found, &file)?;
                }
                Done::Later(later) => {
                    self.close_block()?;
                    self.blocks.push(Block::Later(later));
                }
            }
        }
        Ok(self.next)
    }

    fn small(&mut self, mut found: Scanned, cut: Option<Cut<SmallFile>>) -> Result<()> {
        let node = match (&found.kind, cut) {
            (ScannedKind::Directory, _) => Node::Directory,
            (ScannedKind::Link(target), _) => Node::Symlink(target.to_vec()),
            (_, Some(Cut::Read(file))) => {
                found.mtime = found.mtime.max(file.mtime);
                self.totals.bad_pages(&found, file.bad_pages);
                self.totals.read += found.size;
                let (extents, changes) = file.place;
                self.totals.weigh_small(found.size, &extents, changes.as_ref());
                Node::File(File { size: found.size, crc: file.crc, place: Place::Inline { extents, changes } })
            }
            (_, Some(Cut::Same(file))) => {
                if let Place::Inline { extents, changes } = &file.place {
                    self.totals.weigh_small(file.size, extents, changes.as_ref());
                }
                return self.same(&found, &file);
            }
            (_, Some(Cut::Vanished) | None) => return Ok(()),
        };
        self.entry(&found, node)
    }

    fn leaf(&mut self, found: Arc<Scanned>, number: u64, part: Cut<LeafPart>, index: StoreIndex<'_>) -> Result<()> {
        let partial = self.partial.get_or_insert_with(|| Partial {
            leaves: Vec::new(),
            crc: 0,
            mtime: found.mtime,
            bad_pages: Vec::new(),
            weights: Weights::default(),
            vanished: false,
        });
        let end = ((number + 1) * LEAF_BYTES).min(found.size);
        match part {
            Cut::Vanished => partial.vanished = true,
            Cut::Same(_) => return Err(Error::new("a leaf cannot be taken over alone")),
            Cut::Read(part) => {
                let len = (end - number * LEAF_BYTES) as usize;
                partial.crc = crc32c::crc32c_combine(partial.crc, part.crc, len);
                partial.mtime = partial.mtime.max(part.mtime);
                partial.bad_pages.extend(part.bad_pages);
                let (place, weights) = part.place;
                partial.leaves.push(place);
                partial.weights.merge(&weights);
            }
        }
        if end < found.size {
            return Ok(());
        }
        match self.partial.take() {
            Some(partial) if !partial.vanished => self.large(&found, partial, index),
            _ => Ok(()),
        }
    }

    fn large(&mut self, found: &Scanned, partial: Partial, index: StoreIndex<'_>) -> Result<()> {
        self.totals.bad_pages(found, partial.bad_pages);
        self.totals.read += found.size;
        self.totals.weights.merge(&partial.weights);
        let place = match partial.leaves.len() <= ENTRY_LEAVES {
            true => Place::Leaves(partial.leaves),
            false => Place::Index(
                partial
                    .leaves
                    .chunks(INDEX_LEAVES)
                    .map(|leaves| index(&encode_index(leaves)))
                    .collect::<Result<_>>()?,
            ),
        };
        if let Place::Index(chunks) = &place {
            chunks.iter().for_each(|chunk| self.totals.weights.add_chunk(chunk));
        }
        let node = Node::File(File { size: found.size, crc: partial.crc, place });
        self.entry(&Scanned { mtime: partial.mtime, ..found.clone() }, node)
    }

    /// A file as the parent has it.
    fn same(&mut self, found: &Scanned, file: &File) -> Result<()> {
        if let Some(blocks) = self.old_errors.get(&*String::from_utf8_lossy(&found.path)) {
            let known = |block: &u64| BadPage { block: *block, torn: None };
            let pages = blocks.iter().map(known).collect();
            self.totals.bad_pages(found, pages);
        }
        self.entry(found, Node::File(file.clone()))
    }

    fn entry(&mut self, found: &Scanned, node: Node) -> Result<()> {
        if let Node::File(file) = &node {
            self.totals.files += 1;
            self.totals.bytes += file.size;
        }
        let identity = found.identity.filter(|_| found.is_settled);
        let entry = Entry { path: found.path.to_vec(), mode: found.mode, mtime: found.mtime, identity, node };
        match &mut self.sorter {
            Some(sorter) => sorter.push(entry),
            None => self.write(&entry),
        }
    }

    fn write(&mut self, entry: &Entry) -> Result<()> {
        match self.block.push(entry) {
            Some(plain) => self.keep_block(&plain),
            None => Ok(()),
        }
    }

    fn close_block(&mut self) -> Result<()> {
        match std::mem::take(&mut self.block).finish() {
            Some(plain) => self.keep_block(&plain),
            None => Ok(()),
        }
    }

    fn keep_block(&mut self, plain: &[u8]) -> Result<()> {
        let stored = self.encode(plain)?;
        self.blocks.push(Block::Ready(stored));
        Ok(())
    }

    fn encode(&mut self, plain: &[u8]) -> Result<Stored> {
        let (id, mut bytes) = (self.keys.digest(plain).id, Vec::new());
        let encoded = self.encoder.encode(&self.keys, &id, plain, &mut bytes);
        encoded.map_err(|error| Error::new("cannot compress").source(error))?;
        Ok(Stored { id, plain_len: plain.len(), bytes })
    }

    /// Fills the place of the WAL; `results` are in path order.
    pub fn fill_wal(&mut self, results: Vec<Done>, index: StoreIndex<'_>) -> Result<()> {
        self.fill(Later::Wal, |assembler| {
            results.into_iter().try_for_each(|done| assembler.take(assembler.next, done, index).map(drop))
        })
    }

    /// Fills the place of pg_control, which the manifest holds itself: it changes with every checkpoint.
    pub fn fill_control(&mut self, found: &Scanned, bytes: &[u8]) -> Result<()> {
        if bytes.len() > SLOT {
            return Err(Error::new(format!("pg_control has {} bytes", bytes.len())));
        }
        let (crc, grains) = (crc32c::crc32c(bytes), self.keys.digest(bytes).grains);
        let (plain, at) = encode_own(bytes, &[SlotChange { crc, grains }]);
        let stored = self.encode(&plain)?;
        let chunk = ChunkRef {
            pack: self.id,
            offset: HEADER_LEN as u32,
            stored_len: stored.bytes.len() as u32,
            plain_len: plain.len() as u32,
            id: stored.id,
        };
        self.own = Some(stored);
        let size = bytes.len() as u64;
        self.totals.read += size;
        let extents = vec![Extent { len: size as u32, chunk, offset: at.bytes }];
        let place = Place::Inline { extents, changes: Some((chunk, at.changes)) };
        self.fill(Later::Control, |assembler| assembler.entry(found, Node::File(File { size, crc, place })))
    }

    /// Fills a place that was left open; who sorts leaves none.
    fn fill(&mut self, later: Later, entries: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        if self.sorter.is_some() {
            return entries(self);
        }
        self.close_block()?;
        let place = self.blocks.iter().position(|block| matches!(block, Block::Later(open) if *open == later));
        let place = place.ok_or_else(|| Error::new(format!("the manifest has no place for {later:?}")))?;
        let behind = self.blocks.split_off(place);
        entries(self)?;
        self.close_block()?;
        self.blocks.extend(behind.into_iter().skip(1));
        Ok(())
    }

    /// What the entries add up to.
    pub fn totals(&mut self) -> Totals {
        std::mem::take(&mut self.totals)
    }

    /// The whole object; `packs` are those the backup needs, ascending by name.
    pub fn finish(mut self, description: &Description, packs: &[PackUse]) -> Result<Vec<u8>> {
        if let Some(sorter) = self.sorter.take() {
            sorter.finish(|entry| self.write(entry))?;
        }
        self.close_block()?;
        if !self.waiting.is_empty() || self.partial.is_some() {
            return Err(Error::new("a part of the data directory was not read"));
        }
        let mut pack = PackWriter::new(PackKind::Manifest, self.keys.seal_kind(), self.id, 0);
        let own = self.own.take().ok_or_else(|| Error::new("pg_control was not read"))?;
        pack.add(own.id, own.plain_len, &own.bytes);
        for plain in encode_description(description)? {
            let stored = self.encode(&plain)?;
            pack.add(stored.id, stored.plain_len, &stored.bytes);
        }
        for block in std::mem::take(&mut self.blocks) {
            let Block::Ready(stored) = block else { return Err(Error::new("pg_control or WAL was not read")) };
            pack.add(stored.id, stored.plain_len, &stored.bytes);
        }
        for plain in encode_packs(packs) {
            let stored = self.encode(&plain)?;
            pack.add(stored.id, stored.plain_len, &stored.bytes);
        }
        if let Some(proof) = self.keys.manifest_proof(&description.label, self.id, pack.chunks()) {
            let stored = self.encode(&encode_proof(&proof))?;
            pack.add(stored.id, stored.plain_len, &stored.bytes);
        }
        Ok(pack.finish())
    }
}

impl Totals {
    fn weigh_small(&mut self, size: u64, extents: &[Extent], changes: Option<&(ChunkRef, u32)>) {
        self.weights.add_extents(extents);
        changes.into_iter().for_each(|(chunk, _)| self.weights.add_changes(chunk, size));
    }

    fn bad_pages(&mut self, found: &Scanned, pages: Vec<BadPage>) {
        if !pages.is_empty() {
            self.bad_pages.push((String::from_utf8_lossy(&found.path).into_owned(), pages));
        }
    }

    /// Pages whose checksum is wrong and that no WAL up to `stop` heals.
    pub fn page_errors(&self, stop: Lsn) -> Vec<PageErrors> {
        let is_error = |page: &&BadPage| page.torn.is_none_or(|lsn| lsn > stop);
        let errors = self.bad_pages.iter().map(|(file, pages)| PageErrors {
            file: file.clone(),
            blocks: pages.iter().filter(is_error).map(|page| page.block).collect(),
        });
        errors.filter(|errors| !errors.blocks.is_empty()).collect()
    }
}

impl std::fmt::Debug for Assembler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Assembler").field("next", &self.next).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_page_is_torn_only_if_some_wal_heals_it() {
        let lsn = |text: &str| text.parse::<Lsn>().unwrap();
        let kind = ScannedKind::File;
        let found = Scanned {
            path: (*b"base/5/1").into(),
            mode: 0,
            mtime: 0,
            size: 0,
            kind,
            first_block: Some(0),
            identity: None,
            is_settled: false,
        };
        let page = |block, torn| BadPage { block, torn };
        let mut totals = Totals::default();
        totals.bad_pages(&found, vec![page(1, None), page(2, Some(lsn("1/0"))), page(3, Some(lsn("FFFF/0")))]);
        totals.bad_pages(&found, vec![page(9, Some(lsn("2/0")))]);
        let errors = totals.page_errors(lsn("2/0"));
        assert_eq!(errors, [PageErrors { file: "base/5/1".into(), blocks: vec![1, 3] }]);
    }
}
