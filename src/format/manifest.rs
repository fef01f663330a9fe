//! The manifest: the commit object of a backup. A pack of its own kind whose chunks are, in order, parts of the
//! backup's description (JSON) and blocks of entries sorted by path.

mod description;

pub use description::{Database, Description, NamedDatabase, PageErrors, Sizes, Source, Tablespace};

use super::chunk::{ChunkRef, ChunkTable, PackId};
use super::map::{
    Extent, LeafRef, SlotChange, decode_extents, decode_leaves, decode_number, encode_changes, encode_extents,
    encode_leaves,
};
use super::wire::{Reader, put_bytes, put_signed, put_varint};
use super::{CHUNK, INDEX_BYTES, INLINE_BYTES, LEAF_BYTES, Result};

/// First byte of a chunk that holds a part of the description.
const DESCRIPTION: u8 = 1;
/// First byte of a chunk that holds a block of entries.
const ENTRIES: u8 = 2;
/// First byte of a chunk that holds a part of the pack table.
const PACKS: u8 = 3;
/// First byte of a chunk that holds file bytes and changes of the manifest's own; entries refer to it as to any chunk.
const OWN: u8 = 4;
/// First byte of the chunk that proves the list of all chunks before it; the last one, in encrypted stanzas.
const PROOF: u8 = 5;
/// What the kind of a file's entry is greater by if its identity follows.
const WITH_IDENTITY: u8 = 3;
/// Packs in one part of the pack table.
const PACKS_EACH: usize = 16 * 1024;
/// A block is closed when it reaches this many bytes.
const BLOCK_BYTES: usize = 64 * 1024;
/// The longest path, as Linux has it.
const PATH_MAX: usize = 4096;
/// Longest list of leaves an entry carries itself: 2 GiB of file.
pub const ENTRY_LEAVES: usize = 64;

/// One file, directory or link of a backup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// path in the data directory, raw bytes, without a leading slash; the data directory itself is the empty path
    pub path: Vec<u8>,
    /// permission bits
    pub mode: u32,
    /// seconds since 1970
    pub mtime: i64,
    /// of a regular file: tells its state on the source from every later one. `None` if a later state could not be told
    pub identity: Option<u64>,
    /// what it is
    pub node: Node,
}

/// What an entry is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Node {
    /// a directory
    Directory,
    /// a symbolic link; only `pg_tblspc/<oid>` is one
    Symlink(Vec<u8>),
    /// a regular file
    File(File),
}

/// A regular file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct File {
    /// length in bytes
    pub size: u64,
    /// CRC32C of the whole
    pub crc: u32,
    /// where its bytes are
    pub place: Place,
}

/// Where a file's bytes are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// up to [`INLINE_BYTES`]: right here
    Inline {
        /// covers the file
        extents: Vec<Extent>,
        /// chunk and byte position of its slots' changes; none for an empty file
        changes: Option<(ChunkRef, u32)>,
    },
    /// one leaf per [`LEAF_BYTES`], at most [`ENTRY_LEAVES`]
    Leaves(Vec<LeafRef>),
    /// index chunks, each naming the leaves of [`INDEX_BYTES`]
    Index(Vec<ChunkRef>),
}

/// Turns entries, given in path order, into blocks.
#[derive(Debug, Default)]
pub struct BlockWriter {
    table: ChunkTable,
    records: Vec<u8>,
    count: usize,
    previous: Vec<u8>,
}

impl BlockWriter {
    /// Adds an entry; returns the plaintext of a chunk when one is full.
    pub fn push(&mut self, entry: &Entry) -> Option<Vec<u8>> {
        let shared = self.previous.iter().zip(&entry.path).take_while(|(a, b)| a == b).count();
        put_varint(&mut self.records, shared as u64);
        put_bytes(&mut self.records, &entry.path[shared..]);
        put_varint(&mut self.records, u64::from(entry.mode));
        put_signed(&mut self.records, entry.mtime);
        self.put_node(&entry.node, entry.identity);
        self.previous.clone_from(&entry.path);
        self.count += 1;
        (self.records.len() + self.table.encoded_len() >= BLOCK_BYTES).then(|| self.flush())
    }

    fn put_node(&mut self, node: &Node, identity: Option<u64>) {
        let (table, out) = (&mut self.table, &mut self.records);
        match node {
            Node::Directory => out.push(0),
            Node::Symlink(target) => {
                out.push(1);
                put_bytes(out, target);
            }
            Node::File(file) => {
                let kind = match file.place {
                    Place::Inline { .. } => 2,
                    Place::Leaves(_) => 3,
                    Place::Index(_) => 4,
                };
                match identity {
                    None => out.push(kind),
                    Some(identity) => {
                        out.push(kind + WITH_IDENTITY);
                        out.extend_from_slice(&identity.to_le_bytes());
                    }
                }
                put_varint(out, file.size);
                out.extend_from_slice(&file.crc.to_le_bytes());
                put_place(&file.place, table, out);
            }
        }
    }

    fn flush(&mut self) -> Vec<u8> {
        let mut block = vec![ENTRIES];
        self.table.encode(&mut block);
        put_varint(&mut block, self.count as u64);
        block.extend_from_slice(&self.records);
        assert!(block.len() <= CHUNK, "a block must fit into a chunk");
        *self = Self::default();
        block
    }

    /// The last block, if there is anything in it.
    pub fn finish(mut self) -> Option<Vec<u8>> {
        (self.count > 0).then(|| self.flush())
    }
}

fn put_place(place: &Place, table: &mut ChunkTable, out: &mut Vec<u8>) {
    match place {
        Place::Inline { extents, changes } => {
            encode_extents(extents, table, out);
            if let Some((chunk, offset)) = changes {
                put_varint(out, table.number(*chunk) as u64);
                put_varint(out, u64::from(*offset));
            }
        }
        Place::Leaves(leaves) => encode_leaves(leaves, table, out),
        Place::Index(chunks) => {
            put_varint(out, chunks.len() as u64);
            chunks.iter().for_each(|chunk| put_varint(out, table.number(*chunk) as u64));
        }
    }
}

/// The chunks' plaintexts that hold a description.
pub fn encode_description(description: &Description) -> serde_json::Result<Vec<Vec<u8>>> {
    let json = serde_json::to_vec(description)?;
    Ok(json.chunks(CHUNK - 1).map(|part| [&[DESCRIPTION], part].concat()).collect())
}

/// Where in a chunk of the manifest's own the parts of a file are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Own {
    /// first byte of the file
    pub bytes: u32,
    /// first byte of its changes
    pub changes: u32,
}

/// The plaintext of a chunk that the manifest holds itself: a small file that is different in every backup.
pub fn encode_own(bytes: &[u8], changes: &[SlotChange]) -> (Vec<u8>, Own) {
    let plain = [&[OWN], bytes, &encode_changes(changes)].concat();
    (plain, Own { bytes: 1, changes: 1 + bytes.len() as u32 })
}

/// How much a backup needs of one pack. What no manifest lists nobody needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackUse {
    /// the pack
    pub pack: PackId,
    /// length of the object in bytes
    pub size: u64,
    /// stored bytes of what the backup's extents refer to, in proportion; more than `size` where content is shared
    pub weight: u64,
}

/// The plaintexts of the chunks that hold a pack table, at least one; `packs` ascend by name.
pub fn encode_packs(packs: &[PackUse]) -> Vec<Vec<u8>> {
    let part = |part: &[PackUse]| {
        let mut out = vec![PACKS];
        put_varint(&mut out, part.len() as u64);
        for pack in part {
            out.extend_from_slice(&pack.pack.0);
            put_varint(&mut out, pack.size);
            put_varint(&mut out, pack.weight);
        }
        out
    };
    match packs.is_empty() {
        true => vec![part(&[])],
        false => packs.chunks(PACKS_EACH).map(part).collect(),
    }
}

/// The plaintext of the chunk that holds a proof, as `Keys::manifest_proof` computes it.
pub fn encode_proof(proof: &[u8; 32]) -> Vec<u8> {
    [&[PROOF], &proof[..]].concat()
}

/// Reads a manifest's proof; `None` where the chunk holds something else.
pub fn decode_proof(object: &str, plain: &[u8]) -> Result<Option<[u8; 32]>> {
    let mut reader = Reader::new(object, plain);
    if reader.u8()? != PROOF {
        return Ok(None);
    }
    let proof = reader.array()?;
    reader.end()?;
    Ok(Some(proof))
}

/// Reads one chunk of a pack table; `None` where the chunk holds something else.
pub fn decode_packs(object: &str, plain: &[u8]) -> Result<Option<Vec<PackUse>>> {
    let mut reader = Reader::new(object, plain);
    if reader.u8()? != PACKS {
        return Ok(None);
    }
    let count = reader.count(18, "pack count")?;
    let read = |reader: &mut Reader<'_>| {
        Ok(PackUse { pack: PackId(reader.array()?), size: reader.varint()?, weight: reader.varint()? })
    };
    let packs = (0..count).map(|_| read(&mut reader)).collect::<Result<Vec<_>>>()?;
    reader.end()?;
    Ok(Some(packs))
}

/// Collects the plaintexts of a manifest's chunks, in order.
#[derive(Debug)]
pub struct ManifestReader {
    object: String,
    json: Vec<u8>,
    last: Option<Vec<u8>>,
    /// the pack table, which is the end, has begun
    ended: bool,
}

impl ManifestReader {
    /// Errors call the manifest `object`.
    pub fn new(object: &str) -> Self {
        Self { object: object.to_owned(), json: Vec::new(), last: None, ended: false }
    }

    /// Reads the next chunk's plaintext and hands its entries to `each`.
    pub fn chunk(&mut self, plain: &[u8], mut each: impl FnMut(Entry)) -> Result<()> {
        let object = self.object.clone();
        let mut reader = Reader::new(&object, plain);
        let part = reader.u8()?;
        if self.ended && part != PACKS {
            return Err(reader.error(format!("part {part} behind the pack table")));
        }
        match part {
            DESCRIPTION => self.json.extend_from_slice(reader.take(reader.remaining())?),
            ENTRIES => self.block(&mut reader, &mut each)?,
            PACKS => self.ended = true,
            OWN => {}
            other => return Err(reader.error(format!("unknown part {other}"))),
        }
        Ok(())
    }

    fn block(&mut self, reader: &mut Reader<'_>, each: &mut dyn FnMut(Entry)) -> Result<()> {
        let chunks = ChunkTable::decode(reader)?;
        let count = reader.count(4, "entry count")?;
        let mut path = Vec::new();
        for _ in 0..count {
            let entry = decode_entry(reader, &chunks, &mut path)?;
            check_path(reader, &entry.path)?;
            if self.last.as_ref().is_some_and(|last| !path_before(last, &entry.path)) {
                return Err(reader.error(format!("{} is out of order", entry.path.escape_ascii())));
            }
            self.last = Some(entry.path.clone());
            each(entry);
        }
        reader.end()
    }

    /// The description, once every chunk before the first block of entries was read.
    pub fn description(&self) -> Result<Description> {
        serde_json::from_slice(&self.json).map_err(|error| {
            super::FormatError::new(&self.object, 0, format!("the description cannot be read: {error}"))
        })
    }
}

fn decode_entry(reader: &mut Reader<'_>, chunks: &[ChunkRef], path: &mut Vec<u8>) -> Result<Entry> {
    let shared = reader.bounded(path.len() as u64, "shared path length")? as usize;
    path.truncate(shared);
    path.extend_from_slice(reader.bytes()?);
    let mode = reader.bounded(0o7777, "mode")? as u32;
    let mtime = reader.signed()?;
    let kind = reader.u8()?;
    let identity = match kind {
        5..=7 => Some(u64::from_le_bytes(reader.take(8)?.try_into().unwrap_or_default())),
        _ => None,
    };
    let node = match kind {
        0 => Node::Directory,
        1 if is_tablespace_link(path) => Node::Symlink(reader.bytes()?.to_vec()),
        1 => {
            let path = path.escape_ascii();
            return Err(reader.error(format!("\"{path}\" is a link; only those to tablespaces, pg_tblspc/OID, are")));
        }
        2..=4 => Node::File(decode_file(reader, chunks, kind)?),
        5..=7 => Node::File(decode_file(reader, chunks, kind - WITH_IDENTITY)?),
        other => return Err(reader.error(format!("unknown kind of entry {other}"))),
    };
    Ok(Entry { path: path.clone(), mode, mtime, identity, node })
}

fn decode_file(reader: &mut Reader<'_>, chunks: &[ChunkRef], kind: u8) -> Result<File> {
    let size = reader.bounded(i64::MAX as u64, "file size")?;
    let crc = reader.u32()?;
    let place = match kind {
        2 => decode_inline(reader, chunks, size)?,
        3 => {
            let leaves = decode_leaves(reader, chunks)?;
            expect(reader, "leaves", leaves.len() as u64, size.div_ceil(LEAF_BYTES))?;
            Place::Leaves(leaves)
        }
        _ => {
            let count = reader.count(1, "index count")?;
            let index = (0..count).map(|_| decode_number(reader, chunks)).collect::<Result<Vec<_>>>()?;
            expect(reader, "index chunks", count as u64, size.div_ceil(INDEX_BYTES))?;
            Place::Index(index)
        }
    };
    Ok(File { size, crc, place })
}

fn decode_inline(reader: &mut Reader<'_>, chunks: &[ChunkRef], size: u64) -> Result<Place> {
    if size > INLINE_BYTES {
        return Err(reader.error(format!("a file of {size} bytes without a file map")));
    }
    let extents = decode_extents(reader, chunks, size)?;
    let changes = match size {
        0 => None,
        _ => Some((decode_number(reader, chunks)?, reader.bounded(CHUNK as u64, "offset of changes")? as u32)),
    };
    Ok(Place::Inline { extents, changes })
}

fn expect(reader: &Reader<'_>, what: &str, found: u64, expected: u64) -> Result<()> {
    match found == expected {
        true => Ok(()),
        false => Err(reader.error(format!("{found} {what} where the file's size asks for {expected}"))),
    }
}

/// Whether a link may be here: any other could lead whoever reads or restores the backup anywhere.
fn is_tablespace_link(path: &[u8]) -> bool {
    let oid = path.strip_prefix(b"pg_tblspc/").and_then(|oid| std::str::from_utf8(oid).ok());
    oid.and_then(|oid| oid.parse::<u32>().ok())
        .is_some_and(|oid| oid > 0 && path == format!("pg_tblspc/{oid}").as_bytes())
}

/// Refuses a path that could lead out of the directory it is written to.
fn check_path(reader: &Reader<'_>, path: &[u8]) -> Result<()> {
    let part_is_bad = |part: &[u8]| part.is_empty() || part == b"." || part == b".." || part.contains(&0);
    let bad = path.len() > PATH_MAX || (!path.is_empty() && path.split(|byte| *byte == b'/').any(part_is_bad));
    match bad {
        true => Err(reader.error(format!("the path \"{}\" leads out of the backup", path.escape_ascii()))),
        false => Ok(()),
    }
}

/// Path order: a directory comes before what it contains, and everything in it before its next sibling.
pub fn path_before(a: &[u8], b: &[u8]) -> bool {
    path_cmp(a, b).is_lt()
}

/// Compares part by part; the empty path is first.
pub fn path_cmp(a: &[u8], b: &[u8]) -> std::cmp::Ordering {
    let key = |byte: &u8| if *byte == b'/' { 0 } else { *byte };
    a.iter().map(key).cmp(b.iter().map(key))
}

#[cfg(test)]
mod tests;
