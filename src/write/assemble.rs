//! Results of the workers, which come in any order, into a manifest, which is in path order.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::cut::{Cut, LeafPart, SmallFile};
use super::packer::{Stored, random_pack_id};
use super::scan::{Scanned, ScannedKind};
use crate::error::{Error, Result};
use crate::format::LEAF_BYTES;
use crate::format::chunk::{ChunkRef, Encoder, HashKeys};
use crate::format::manifest::encode_description;
use crate::format::manifest::{BlockWriter, Description, ENTRY_LEAVES, Entry, File, Node, PageErrors, Place};
use crate::format::map::{INDEX_LEAVES, LeafRef, encode_index};
use crate::format::pack::{PackKind, PackWriter};

/// What one job of a worker gave. Jobs are numbered in path order.
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
    block: BlockWriter,
    blocks: Vec<Block>,
    encoder: Encoder,
    keys: HashKeys,
    totals: Totals,
}

/// What a backup adds up to.
#[derive(Debug, Default)]
pub struct Totals {
    /// number of files
    pub files: u64,
    /// sum of their lengths
    pub bytes: u64,
    /// pages whose checksum is wrong
    pub page_errors: Vec<PageErrors>,
}

enum Block {
    Ready(Stored),
    Later(Later),
}

struct Partial {
    leaves: Vec<LeafRef>,
    crc: u32,
    bad_blocks: Vec<u64>,
    vanished: bool,
}

impl Assembler {
    /// An empty manifest.
    pub fn new(keys: HashKeys) -> Result<Self> {
        let encoder = Encoder::new(3).map_err(|error| Error::new("cannot set up zstd").source(error))?;
        Ok(Self {
            next: 0,
            waiting: BTreeMap::new(),
            partial: None,
            block: BlockWriter::default(),
            blocks: Vec::new(),
            encoder,
            keys,
            totals: Totals::default(),
        })
    }

    /// Takes the result of job `number`; returns how many jobs are complete up to the first that is missing.
    pub fn take(&mut self, number: usize, done: Done, index: StoreIndex<'_>) -> Result<usize> {
        self.waiting.insert(number, done);
        while let Some(done) = self.waiting.remove(&self.next) {
            self.next += 1;
            match done {
                Done::Small(files) => files.into_iter().try_for_each(|(found, cut)| self.small(found, cut))?,
                Done::Leaf { file, number, part } => self.leaf(file, number, part, index)?,
                Done::Later(later) => {
                    self.close_block()?;
                    self.blocks.push(Block::Later(later));
                }
            }
        }
        Ok(self.next)
    }

    fn small(&mut self, found: Scanned, cut: Option<Cut<SmallFile>>) -> Result<()> {
        let node = match (&found.kind, cut) {
            (ScannedKind::Directory, _) => Node::Directory,
            (ScannedKind::Link(target), _) => Node::Symlink(target.to_vec()),
            (_, Some(Cut::Read(file))) => {
                self.totals.bad_pages(&found, file.bad_blocks);
                let (extents, changes) = file.place;
                Node::File(File { size: found.size, crc: file.crc, place: Place::Inline { extents, changes } })
            }
            (_, Some(Cut::Vanished) | None) => return Ok(()),
        };
        self.entry(&found, node)
    }

    fn leaf(&mut self, found: Arc<Scanned>, number: u64, part: Cut<LeafPart>, index: StoreIndex<'_>) -> Result<()> {
        let partial = self.partial.get_or_insert_with(|| Partial {
            leaves: Vec::new(),
            crc: 0,
            bad_blocks: Vec::new(),
            vanished: false,
        });
        let end = ((number + 1) * LEAF_BYTES).min(found.size);
        match part {
            Cut::Vanished => partial.vanished = true,
            Cut::Read(part) => {
                let len = (end - number * LEAF_BYTES) as usize;
                partial.crc = crc32c::crc32c_combine(partial.crc, part.crc, len);
                partial.bad_blocks.extend(part.bad_blocks);
                partial.leaves.push(part.place);
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
        self.totals.bad_pages(found, partial.bad_blocks);
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
        let node = Node::File(File { size: found.size, crc: partial.crc, place });
        self.entry(found, node)
    }

    fn entry(&mut self, found: &Scanned, node: Node) -> Result<()> {
        if let Node::File(file) = &node {
            self.totals.files += 1;
            self.totals.bytes += file.size;
        }
        let entry = Entry { path: found.path.to_vec(), mode: found.mode, mtime: found.mtime, node };
        match self.block.push(&entry) {
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
        let mut bytes = Vec::new();
        self.encoder.encode(plain, &mut bytes).map_err(|error| Error::new("cannot compress").source(error))?;
        Ok(Stored { id: self.keys.digest(plain).id, plain_len: plain.len(), bytes })
    }

    /// Fills a place that was left open; `results` are in path order.
    pub fn fill(&mut self, later: Later, results: Vec<Done>, index: StoreIndex<'_>) -> Result<()> {
        self.close_block()?;
        let place = self.blocks.iter().position(|block| matches!(block, Block::Later(open) if *open == later));
        let place = place.ok_or_else(|| Error::new(format!("the manifest has no place for {later:?}")))?;
        let behind = self.blocks.split_off(place);
        for done in results {
            self.take(self.next, done, index)?;
        }
        self.close_block()?;
        self.blocks.extend(behind.into_iter().skip(1));
        Ok(())
    }

    /// What the entries add up to.
    pub fn totals(&mut self) -> Totals {
        std::mem::take(&mut self.totals)
    }

    /// The whole object.
    pub fn finish(mut self, description: &Description) -> Result<Vec<u8>> {
        self.close_block()?;
        if !self.waiting.is_empty() || self.partial.is_some() {
            return Err(Error::new("a part of the data directory was not read"));
        }
        let mut pack = PackWriter::new(PackKind::Manifest, random_pack_id()?, 0);
        for plain in encode_description(description)? {
            let stored = self.encode(&plain)?;
            pack.add(stored.id, stored.plain_len, &stored.bytes);
        }
        for block in self.blocks {
            let Block::Ready(stored) = block else { return Err(Error::new("pg_control or WAL was not read")) };
            pack.add(stored.id, stored.plain_len, &stored.bytes);
        }
        Ok(pack.finish())
    }
}

impl Totals {
    fn bad_pages(&mut self, found: &Scanned, blocks: Vec<u64>) {
        if !blocks.is_empty() {
            self.page_errors.push(PageErrors { file: String::from_utf8_lossy(&found.path).into_owned(), blocks });
        }
    }
}

impl std::fmt::Debug for Assembler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Assembler").field("next", &self.next).finish_non_exhaustive()
    }
}
