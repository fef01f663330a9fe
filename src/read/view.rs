//! A backup as a tree of files: the manifest's entries, and what recovery needs beside them.

mod changes;
mod once;
mod used;

use std::collections::HashMap;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use lru::LruCache;
use parking_lot::Mutex;

pub(super) use self::changes::{NO_CHANGES, StoredChanges};

use self::once::Once;
use self::used::Used;
use super::builder::Builder;
use super::fetch::Fetcher;
use super::{completion, pgmanifest, wal};
use crate::error::{Error, Result};
use crate::format::chunk::{ChunkId, ChunkRef, PackId};
use crate::format::manifest::{Description, Entry, Node as Stored, Tablespace};
use crate::format::map::{Extent, INDEX_LEAVES, Leaf, LeafRef, decode_index};
use crate::format::{CHUNK, INDEX_BYTES, LEAF_BYTES, SLOT};
use crate::repo::wal::check_first_bytes;

/// Bytes of decoded leaves kept in memory.
const LEAF_MEMORY: usize = 16 * 1024 * 1024;

/// Number of a node in its view; 0 is the data directory itself.
pub type NodeIndex = u32;

/// How a view is made of a backup.
#[derive(Clone, Debug, Default)]
pub struct ViewOptions {
    /// with settings in `postgresql.auto.conf` by which a server on it does not act in its source's place
    pub copy: bool,
    /// its server is told where the data directory is, whatever `postgresql.conf` says
    pub placed: bool,
    /// an archive recovery that the copy is prepared for
    pub recovery: Option<completion::Prepared>,
    /// its server sees its own files in place of the source's directories, so that any WAL may be replayed
    pub sandboxed: bool,
    /// know what the backup noted of the files' content, to compare others with them
    pub changes: bool,
}

impl ViewOptions {
    /// What every copy of a cluster gets: it must never archive into its source's stanza.
    pub fn copy() -> Self {
        Self { copy: true, ..Self::default() }
    }

    /// The same, prepared for a recovery.
    pub fn prepared(self, recovery: Option<completion::Prepared>) -> Self {
        Self { recovery, ..self }
    }
}

/// A backup, ready to be read.
#[derive(Debug)]
pub struct View {
    /// what the backup is
    pub description: Description,
    nodes: Vec<Node>,
    /// node numbers, grouped by parent, in name order
    children: Vec<NodeIndex>,
    chunks: Vec<ChunkRef>,
    windows: HashMap<PackId, Window>,
    changes: Vec<StoredChanges>,
    fetcher: Arc<Fetcher>,
    leaves: Mutex<LeafCache>,
    /// to look at a small object is to fetch it
    archived: Once<Vec<ChunkRef>>,
    pg_manifest: OnceLock<std::result::Result<std::fs::File, String>>,
    used: Option<Used>,
}

/// One file, directory or link of a view.
#[derive(Debug)]
pub struct Node {
    /// its name in its directory
    pub name: Box<[u8]>,
    /// permission bits
    pub mode: u32,
    /// seconds since 1970
    pub mtime: i64,
    /// what it holds
    pub content: Content,
    pub(super) first_child: u32,
    pub(super) child_count: u32,
}

/// What a node holds. Chunks are named by their number in the view.
#[derive(Debug)]
pub enum Content {
    /// a directory
    Directory,
    /// a symbolic link and its target
    Link(Box<[u8]>),
    /// a file whose extents are at hand
    Inline {
        /// length, CRC32C
        stat: FileStat,
        /// extents in file order
        extents: Box<[Piece]>,
        /// number of its changes in the view, or [`NO_CHANGES`]
        changes: u32,
    },
    /// a file with a map: its leaves, or with `index` the chunks that name them
    Mapped {
        /// length, CRC32C
        stat: FileStat,
        /// chunk numbers
        maps: Box<[u32]>,
        /// true: the chunks are indexes
        index: bool,
        /// number of its changes in the view, or [`NO_CHANGES`]
        changes: u32,
    },
    /// made by us
    Text(Bytes),
    /// a file of the archive: its key and stored length
    Archived {
        /// length in bytes
        size: u64,
        /// where it is
        key: Box<str>,
        /// stored length
        stored: u64,
    },
    /// must be there, but is not: reading it is an error that says this
    Missing {
        /// length it should have
        size: u64,
        /// why it cannot be read
        why: Box<str>,
    },
    /// PostgreSQL's own backup_manifest, written when it is first looked at
    BackupManifest,
    /// how the mount does; its text comes from elsewhere
    Status,
}

/// Length and checksum of a stored file.
#[derive(Clone, Copy, Debug)]
pub struct FileStat {
    /// bytes
    pub size: u64,
    /// CRC32C of them
    pub crc: u32,
}

/// An extent in a view's own terms.
#[derive(Clone, Copy, Debug)]
pub struct Piece {
    pub(crate) chunk: u32,
    pub(crate) offset: u32,
    pub(crate) len: u32,
}

/// Chunks of one pack that are fetched together with their neighbours.
#[derive(Debug)]
pub(super) struct Window {
    /// stored bytes of one aligned window
    pub(super) bytes: u32,
    /// chunk numbers by offset
    pub(super) chunks: Vec<u32>,
}

/// What a walk calls with path and number of each node.
pub type Visit<'a, E> = dyn FnMut(&[u8], NodeIndex) -> std::result::Result<(), E> + 'a;

#[derive(Debug)]
struct LeafCache {
    /// by the map's name and the bytes of file it covers
    leaves: LruCache<(ChunkId, u64), Arc<Leaf>>,
    bytes: usize,
}

/// A run of file bytes and where they are.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    /// first byte in the file
    pub at: u64,
    /// bytes
    pub len: usize,
    /// the chunk that holds them
    pub chunk: ChunkRef,
    /// first byte in the chunk's plaintext
    pub offset: usize,
}

/// Refuses a link that no tablespace of the backup explains: in a mount its own target would stay.
fn refuse_unknown_link(entry: &Entry, of: &Description) -> Result<()> {
    let is_known = |of: &Tablespace| format!("pg_tblspc/{}", of.oid).as_bytes() == entry.path;
    match matches!(entry.node, Stored::Symlink(_)) && !of.tablespaces.iter().any(is_known) {
        true => Err(Error::new(format!(
            "backup {} has a link {} that is none of its tablespaces'",
            of.label,
            entry.path.escape_ascii()
        ))
        .hint("it was not made by pgcairn, or was changed since; choose another backup, and see \"pgcairn verify\"")),
        false => Ok(()),
    }
}

impl View {
    /// Reads the manifest of `label` and finds the WAL it needs.
    pub fn load(fetcher: Arc<Fetcher>, label: &str, options: &ViewOptions) -> Result<Self> {
        let mut builder = Builder::default();
        builder.changes = options.changes.then(Vec::new);
        let repository = fetcher.repository().clone();
        let mut manifest = repository.open_manifest(label)?;
        // a chunk of the manifest's own
        fetcher.locate(manifest.pack(), manifest.key());
        while let Some(entry) = manifest.next()? {
            refuse_unknown_link(&entry, &manifest.description)?;
            builder.stored(entry);
        }
        // its own chunks stay readable when the backup is removed, as its packs do for the grace period
        for chunk in builder.chunks.iter().filter(|chunk| chunk.pack == manifest.pack()) {
            manifest.stored(chunk).into_iter().for_each(|stored| fetcher.hold(chunk, stored));
        }
        let description = manifest.description;
        fetcher.count(0);
        completion::complete(&mut builder, &repository, &description, options)?;
        let (nodes, children) = builder.tree()?;
        let leaves = LeafCache { leaves: LruCache::unbounded(), bytes: 0 };
        Ok(Self {
            used: (!options.sandboxed).then(|| Used::of(&description)).transpose()?,
            description,
            nodes,
            children,
            windows: builder.windows(),
            changes: builder.changes.unwrap_or_default(),
            chunks: builder.chunks,
            fetcher,
            leaves: Mutex::new(leaves),
            archived: Once::default(),
            pg_manifest: OnceLock::new(),
        })
    }

    /// The node; all numbers come from this view.
    pub fn node(&self, node: NodeIndex) -> Result<&Node> {
        self.nodes.get(node as usize).ok_or_else(|| Error::new(format!("the view has no node {node}")))
    }

    /// The chunk of this number; all numbers come from this view.
    pub(crate) fn chunk(&self, number: u32) -> &ChunkRef {
        &self.chunks[number as usize]
    }

    /// How many nodes there are.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// True for a view without nodes, which cannot be.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// The nodes in a directory, in name order.
    pub fn children(&self, node: NodeIndex) -> &[NodeIndex] {
        let node = &self.nodes[node as usize];
        &self.children[node.first_child as usize..(node.first_child + node.child_count) as usize]
    }

    /// Finds a name in a directory.
    pub fn child(&self, node: NodeIndex, name: &[u8]) -> Option<NodeIndex> {
        let children = self.children(node);
        let found = children.binary_search_by(|child| (*self.nodes[*child as usize].name).cmp(name));
        found.ok().map(|at| children[at])
    }

    /// Length of a file in bytes; of a link, of its target.
    pub fn size(&self, node: NodeIndex) -> Result<u64> {
        Ok(match &self.node(node)?.content {
            Content::Directory | Content::Status => 0,
            Content::Link(target) => target.len() as u64,
            Content::Inline { stat, .. } | Content::Mapped { stat, .. } => stat.size,
            Content::Text(text) => text.len() as u64,
            Content::Archived { size, .. } | Content::Missing { size, .. } => *size,
            Content::BackupManifest => {
                let file = self.pg_manifest()?;
                file.metadata().map_err(|error| Error::new("cannot look at backup_manifest").source(error))?.len()
            }
        })
    }

    /// Fills `buf` from `offset` of a file; short only at its end.
    pub fn read_at(&self, node: NodeIndex, offset: u64, buf: &mut [u8]) -> Result<usize> {
        let size = self.size(node)?;
        let len = size.saturating_sub(offset).min(buf.len() as u64) as usize;
        let buf = &mut buf[..len];
        match &self.node(node)?.content {
            Content::Text(text) => buf.copy_from_slice(&text[offset as usize..offset as usize + len]),
            Content::BackupManifest => {
                let read = self.pg_manifest()?.read_exact_at(buf, offset);
                read.map_err(|error| Error::new("cannot read backup_manifest").source(error))?;
            }
            Content::Missing { why, .. } => return Err(Error::new(why.to_string())),
            _ => self.read_stored(node, offset, buf)?,
        }
        Ok(len)
    }

    fn read_stored(&self, node: NodeIndex, offset: u64, buf: &mut [u8]) -> Result<()> {
        let spans = self.spans(node, offset, buf.len())?;
        let mut missing = Vec::new();
        for span in &spans {
            let from = (span.at - offset) as usize;
            if !self.fetcher.read_cached(&span.chunk, span.offset, &mut buf[from..from + span.len]) {
                missing.push(*span);
            }
        }
        if missing.is_empty() {
            return Ok(());
        }
        let mut copy = |span: &Span, plain: &[u8]| {
            let from = (span.at - offset) as usize;
            buf[from..from + span.len].copy_from_slice(&plain[span.offset..span.offset + span.len]);
        };
        self.fetch(&missing, &mut copy)
    }

    /// Hands every byte of a range of a file to `each`, with its position, in any order and past the caches. Bytes of files
    /// that have a checksum are proved only when it is compared, see [`crc`](Self::crc).
    pub fn each_range(
        &self,
        node: NodeIndex,
        from: u64,
        to: u64,
        each: &mut dyn FnMut(u64, &[u8]) -> Result<()>,
    ) -> Result<()> {
        self.each_of_ranges(node, &[(from, to)], each)
    }

    /// The same for several ranges, from first byte to behind the last, that do not overlap: what is stored together is
    /// fetched together.
    pub fn each_of_ranges(
        &self,
        node: NodeIndex,
        ranges: &[(u64, u64)],
        each: &mut dyn FnMut(u64, &[u8]) -> Result<()>,
    ) -> Result<()> {
        if !matches!(self.node(node)?.content, Content::Inline { .. } | Content::Mapped { .. }) {
            return ranges.iter().try_for_each(|(from, to)| {
                let mut bytes = vec![0; (to - from) as usize];
                self.read_at(node, *from, &mut bytes)?;
                each(*from, &bytes)
            });
        }
        let mut spans = Vec::new();
        for (from, to) in ranges {
            spans.extend(self.spans(node, *from, (to - from) as usize)?);
        }
        let (spans, chunks) = by_chunk(spans);
        let of_chunk: Vec<&[Span]> = spans.chunk_by(|a, b| a.chunk == b.chunk).collect();
        self.fetcher.sealed(&chunks, |number, plain| {
            of_chunk[number].iter().try_for_each(|span| each(span.at, &plain[span.offset..span.offset + span.len]))
        })
    }

    /// Brings a range of a file into the caches.
    pub fn prefetch(&self, node: NodeIndex, offset: u64, len: u64) -> Result<()> {
        let len = self.size(node)?.saturating_sub(offset).min(len) as usize;
        if len == 0 || !self.node(node)?.content.is_stored() {
            return Ok(());
        }
        let (_, mut chunks) = by_chunk(self.spans(node, offset, len)?);
        chunks.retain(|chunk| !self.fetcher.has(chunk));
        self.fetcher.chunks(&chunks, |_, _| {})
    }

    /// Fetches spans, each with its neighbours where that is worth it.
    fn fetch(&self, spans: &[Span], each: &mut dyn FnMut(&Span, &[u8])) -> Result<()> {
        let (spans, mut wanted) = by_chunk(spans.to_vec());
        let of_chunk: Vec<&[Span]> = spans.chunk_by(|a, b| a.chunk == b.chunk).collect();
        let neighbours: Vec<ChunkRef> = spans
            .iter()
            .filter(|span| self.windows.contains_key(&span.chunk.pack) && !self.fetcher.has(&span.chunk))
            .flat_map(|span| self.neighbours(&span.chunk))
            .filter(|chunk| !wanted.contains(chunk) && !self.fetcher.has(chunk))
            .collect();
        let alone = wanted.clone();
        wanted.extend(neighbours);
        let mut deliver = |wanted: &[ChunkRef]| {
            self.fetcher.chunks(wanted, |number, plain| {
                of_chunk.get(number).into_iter().copied().flatten().for_each(|span| each(span, &plain));
            })
        };
        match deliver(&wanted) {
            // a damaged neighbour must not harm what was asked for
            Err(_) if wanted.len() > alone.len() => deliver(&alone),
            other => other,
        }
    }

    /// Chunks in the same window, itself included; none for chunks that are better fetched alone.
    fn neighbours(&self, chunk: &ChunkRef) -> impl Iterator<Item = ChunkRef> + '_ {
        let window = self.windows.get(&chunk.pack).map(|window| {
            let from = chunk.offset / window.bytes * window.bytes;
            let offset = |number: &u32| self.chunks[*number as usize].offset;
            let first = window.chunks.partition_point(|number| offset(number) < from);
            let end = window.chunks.partition_point(|number| offset(number) < from.saturating_add(window.bytes));
            &window.chunks[first..end]
        });
        window.unwrap_or_default().iter().map(|number| self.chunks[*number as usize])
    }

    /// Where `len` bytes from `offset` of a stored file are; the range must lie inside the file.
    pub fn spans(&self, node: NodeIndex, offset: u64, len: usize) -> Result<Vec<Span>> {
        let end = offset + len as u64;
        let mut spans = Vec::with_capacity(len / SLOT + 2);
        match &self.node(node)?.content {
            Content::Inline { extents, .. } => {
                let extents = extents.iter().map(|piece| Extent {
                    len: piece.len,
                    chunk: self.chunks[piece.chunk as usize],
                    offset: piece.offset,
                });
                clip(0, extents, offset, end, &mut spans);
            }
            Content::Mapped { stat, maps, index, .. } => {
                let mut at = offset;
                while at < end {
                    let number = at / LEAF_BYTES;
                    let leaf = self.leaf(stat.size, maps, *index, number)?;
                    let leaf_end = end.min((number + 1) * LEAF_BYTES);
                    while at < leaf_end {
                        let start = at / SLOT as u64 * SLOT as u64;
                        let slot = ((start - number * LEAF_BYTES) / SLOT as u64) as usize;
                        clip(start, leaf.slot(slot).iter().copied(), offset, end, &mut spans);
                        at = start + SLOT as u64;
                    }
                    at = leaf_end;
                }
            }
            Content::Archived { key, stored, size } => {
                let chunks = self.archived(node, key, *stored, *size)?;
                let first = (offset / CHUNK as u64) as usize;
                let last = (end.saturating_sub(1) / CHUNK as u64) as usize;
                for run in first..=last.min(chunks.len().saturating_sub(1)) {
                    clip((run * CHUNK) as u64, [Extent::whole(chunks[run])], offset, end, &mut spans);
                }
            }
            _ => return Err(Error::new("this node has no stored bytes")),
        }
        let covered: usize = spans.iter().map(|span| span.len).sum();
        match covered == len {
            true => Ok(spans),
            false => Err(Error::new(format!("the file map covers {covered} of {len} bytes at {offset}"))),
        }
    }

    fn leaf(&self, size: u64, maps: &[u32], index: bool, number: u64) -> Result<Arc<Leaf>> {
        let map = match index {
            false => self.chunks[maps[number as usize] as usize],
            true => self.indexed(maps, number)?.map,
        };
        let len = (size - number * LEAF_BYTES).min(LEAF_BYTES);
        if let Some(leaf) = self.leaves.lock().leaves.get(&(map.id, len)) {
            return Ok(leaf.clone());
        }
        let plain = self.plain(&map)?;
        let leaf = Arc::new(Leaf::decode("file map", &plain, len)?);
        self.leaves.lock().insert((map.id, len), leaf.clone());
        Ok(leaf)
    }

    /// What the indexes `maps` of a file name leaf `number`.
    fn indexed(&self, maps: &[u32], number: u64) -> Result<LeafRef> {
        let chunk = self.chunks[maps[(number * LEAF_BYTES / INDEX_BYTES) as usize] as usize];
        let leaves = decode_index("file map index", &self.fetcher.chunk(&chunk)?)?;
        let inside = number as usize % INDEX_LEAVES;
        leaves.get(inside).copied().ok_or_else(|| Error::new("the file map index is too short"))
    }

    /// The plaintext of a chunk, fetched with its neighbours where that is worth it.
    fn plain(&self, chunk: &ChunkRef) -> Result<Vec<u8>> {
        let mut plain = vec![0; chunk.plain_len as usize];
        if !self.fetcher.read_cached(chunk, 0, &mut plain) {
            let span = Span { at: 0, len: plain.len(), chunk: *chunk, offset: 0 };
            self.fetch(&[span], &mut |_, bytes| plain.copy_from_slice(bytes))?;
        }
        Ok(plain)
    }

    fn archived(&self, node: NodeIndex, key: &str, stored: u64, size: u64) -> Result<Arc<Vec<ChunkRef>>> {
        self.archived.get(node, key, || {
            let chunks = wal::open(&self.fetcher, self.description.database.system_id, key, stored)?;
            wal::check_cover(key, &chunks, size)?;
            if let Some(first) = chunks.first() {
                let name = String::from_utf8_lossy(&self.node(node)?.name).into_owned();
                check_first_bytes(&self.description.database, &name, &self.fetcher.chunk(first)?)?;
            }
            Ok(chunks)
        })
    }

    fn pg_manifest(&self) -> Result<&std::fs::File> {
        let written = self.pg_manifest.get_or_init(|| self.write_pg_manifest().map_err(|error| error.to_string()));
        written.as_ref().map_err(|why| Error::new(format!("cannot write backup_manifest: {why}")))
    }

    fn write_pg_manifest(&self) -> io::Result<std::fs::File> {
        let mut file = tempfile::tempfile()?;
        let mut out = io::BufWriter::new(&mut file);
        pgmanifest::write(self, &mut out)?;
        out.flush()?;
        drop(out);
        Ok(file)
    }

    /// Calls `each` with the path and number of every node, in path order; directories before what they contain.
    pub fn walk<E>(&self, each: &mut Visit<'_, E>) -> std::result::Result<(), E> {
        let mut stack: Vec<(NodeIndex, usize)> = self.children(0).iter().rev().map(|child| (*child, 0)).collect();
        let mut path = Vec::new();
        while let Some((node, parent_len)) = stack.pop() {
            path.truncate(parent_len);
            if parent_len > 0 {
                path.push(b'/');
            }
            path.extend_from_slice(&self.nodes[node as usize].name);
            each(&path, node)?;
            stack.extend(self.children(node).iter().rev().map(|child| (*child, path.len())));
        }
        Ok(())
    }

    /// The CRC32C of a file of the backup, or of a text of the view; others have none.
    pub fn crc(&self, node: NodeIndex) -> Result<Option<u32>> {
        Ok(match &self.node(node)?.content {
            Content::Inline { stat, .. } | Content::Mapped { stat, .. } => Some(stat.crc),
            Content::Text(text) => Some(crc32c::crc32c(text)),
            _ => None,
        })
    }

    /// Where its chunks come from.
    pub fn fetcher(&self) -> &Arc<Fetcher> {
        &self.fetcher
    }
}

impl Content {
    /// True when its bytes lie in chunks.
    pub fn is_stored(&self) -> bool {
        matches!(self, Self::Inline { .. } | Self::Mapped { .. } | Self::Archived { .. })
    }
}

impl LeafCache {
    fn insert(&mut self, of: (ChunkId, u64), leaf: Arc<Leaf>) {
        self.bytes += leaf.memory();
        if let Some((_, old)) = self.leaves.push(of, leaf) {
            self.bytes -= old.memory();
        }
        while self.bytes > LEAF_MEMORY {
            let Some((_, old)) = self.leaves.pop_lru() else { break };
            self.bytes -= old.memory();
        }
    }
}

/// Sorts spans by where they are stored, and joins those that follow each other there as in the file; and the chunks they lie
/// in, each once, in the same order.
fn by_chunk(mut spans: Vec<Span>) -> (Vec<Span>, Vec<ChunkRef>) {
    spans.sort_unstable_by_key(|span| (span.chunk.pack, span.chunk.offset, span.at));
    spans.dedup_by(|next, span| {
        let follows =
            next.chunk == span.chunk && next.at == span.at + span.len as u64 && next.offset == span.offset + span.len;
        if follows {
            span.len += next.len;
        }
        follows
    });
    let mut chunks: Vec<ChunkRef> = spans.iter().map(|span| span.chunk).collect();
    chunks.dedup();
    (spans, chunks)
}

/// Adds the parts of `extents`, which begin at `at` of the file, that lie between `from` and `to`.
fn clip(mut at: u64, extents: impl IntoIterator<Item = Extent>, from: u64, to: u64, spans: &mut Vec<Span>) {
    for extent in extents {
        let (start, end) = (at.max(from), (at + u64::from(extent.len)).min(to));
        if start < end {
            let offset = extent.offset as usize + (start - at) as usize;
            spans.push(Span { at: start, len: (end - start) as usize, chunk: extent.chunk, offset });
        }
        at += u64::from(extent.len);
    }
}

/// Reads a whole small file through its view.
pub fn read_all(view: &View, node: NodeIndex) -> Result<Vec<u8>> {
    let mut bytes = vec![0; view.size(node)? as usize];
    view.read_at(node, 0, &mut bytes)?;
    Ok(bytes)
}
