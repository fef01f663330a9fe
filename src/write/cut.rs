//! Files into slots: read, check page checksums, hash, compress what is new, and note where everything is.

use std::collections::HashSet;
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::dedup::{Dedup, Seen};
use super::packer::{Lane, Stored, Uploads};
use super::scan::Scanned;
use crate::error::{Error, Result};
use crate::format::chunk::{ChunkId, ChunkRef, Digest, Encoder, HashKeys};
use crate::format::map::{Extent, Leaf, LeafRef, SlotChange, encode_changes};
use crate::format::pack::PackKind;
use crate::format::{LEAF_BYTES, SLOT};
use crate::postgres::{Lsn, page};
use parking_lot::Mutex;

/// What every worker of one backup shares.
#[derive(Debug)]
pub struct Cutting<'a> {
    /// the data directory
    pub root: PathBuf,
    /// how plaintext is hashed
    pub keys: &'a HashKeys,
    /// zstd level
    pub level: i32,
    /// where finished packs go
    pub uploads: &'a Uploads,
    /// content seen before
    pub dedup: Dedup,
    /// the lanes that all workers fill
    pub lanes: Lanes,
    /// how pages are checked; none where the cluster has no checksums
    pub pages: Option<Pages>,
}

/// Lanes shared by all workers, so that what is read together is stored together.
#[derive(Debug)]
pub struct Lanes {
    small: Mutex<Lane>,
    map: Mutex<Lane>,
    changes: Mutex<Lane>,
}

/// How page checksums are judged.
#[derive(Clone, Copy, Debug)]
pub struct Pages {
    /// BLCKSZ in bytes
    pub size: usize,
    /// a page changed after this point may be torn: WAL heals it
    pub start: Lsn,
}

/// What became of a file.
#[derive(Debug)]
pub enum Cut<T> {
    /// it was read
    Read(T),
    /// it vanished before it could be opened; WAL replay knows why
    Vanished,
}

/// What reading one file gave.
#[derive(Debug)]
pub struct Slots<P> {
    /// where its bytes are
    pub place: P,
    /// CRC32C of the bytes
    pub crc: u32,
    /// blocks of the file whose checksum is wrong
    pub bad_blocks: Vec<u64>,
}

/// A small file, placed.
pub type SmallFile = Slots<(Vec<Extent>, Option<(ChunkRef, u32)>)>;
/// One leaf of a large file, placed.
pub type LeafPart = Slots<LeafRef>;

impl Default for Lanes {
    fn default() -> Self {
        Self {
            small: Mutex::new(Lane::new(PackKind::Small)),
            map: Mutex::new(Lane::new(PackKind::Map)),
            changes: Mutex::new(Lane::new(PackKind::Change)),
        }
    }
}

impl Lanes {
    /// Hands all that is left to the uploads.
    pub fn flush(&self, uploads: &Uploads) -> Result<()> {
        [&self.small, &self.map, &self.changes].into_iter().try_for_each(|lane| lane.lock().flush(uploads))
    }
}

/// One worker: its buffers, its compression context, its own data lane.
pub struct Worker<'a> {
    cutting: &'a Cutting<'a>,
    encoder: Encoder,
    data: Lane,
    buffer: Vec<u8>,
    stored: Vec<u8>,
}

/// Small pieces of one batch on their way into chunks.
#[derive(Default)]
struct Group {
    /// the chunk being filled
    plain: Vec<u8>,
    members: Vec<Member>,
    /// what the batch will store
    pending: HashSet<ChunkId>,
    /// pieces equal to one of those; here the offset is the length
    repeated: Vec<Member>,
}

/// A piece of a group: which extent it becomes.
struct Member {
    file: usize,
    extent: usize,
    offset: usize,
    id: ChunkId,
}

/// A small file being placed: extents still without a chunk are in the current group.
struct Placing {
    extents: Vec<Option<Extent>>,
    changes: Vec<SlotChange>,
    crc: u32,
    bad_blocks: Vec<u64>,
}

impl<'a> Worker<'a> {
    /// A worker of `cutting`.
    pub fn new(cutting: &'a Cutting<'a>) -> Result<Self> {
        let encoder = Encoder::new(cutting.level).map_err(|error| Error::new("cannot set up zstd").source(error))?;
        let data = Lane::new(PackKind::Data);
        Ok(Self { cutting, encoder, data, buffer: vec![0; SLOT], stored: Vec::with_capacity(2 * SLOT) })
    }

    /// The data directory.
    pub fn root(&self) -> &Path {
        &self.cutting.root
    }

    /// Hands the rest of its data lane to the uploads.
    pub fn finish(mut self) -> Result<()> {
        self.data.flush(self.cutting.uploads)
    }

    /// Reads and stores the leaf `number` of a large file.
    pub fn leaf(&mut self, file: &Scanned, number: u64) -> Result<Cut<LeafPart>> {
        let Some(source) = Source::open(&self.cutting.root, file)? else { return Ok(Cut::Vanished) };
        let (mut leaf, mut changes) = (Leaf::default(), Vec::new());
        let (mut crc, mut bad_blocks) = (0, Vec::new());
        let end = file.size.min((number + 1) * LEAF_BYTES);
        let mut at = number * LEAF_BYTES;
        while at < end {
            let len = (end - at).min(SLOT as u64) as usize;
            let (digest, slot_crc) = self.read_slot(&source, file, at, len, &mut bad_blocks)?;
            // a second pass over bytes in the cache is cheaper than combining two sums
            crc = crc32c::crc32c_append(crc, &self.buffer[..len]);
            leaf.push(&[self.store_slot(&digest, len)?]);
            changes.push(SlotChange { crc: slot_crc, grains: digest.grains });
            at += len as u64;
        }
        let place = LeafRef {
            map: self.store_in(&self.cutting.lanes.map, &leaf.encode())?,
            changes: self.store_in(&self.cutting.lanes.changes, &encode_changes(&changes))?,
        };
        Ok(Cut::Read(Slots { place, crc, bad_blocks }))
    }

    /// Reads and stores a batch of small files, which become neighbours in one pack.
    pub fn small(&mut self, files: &[&Scanned]) -> Result<Vec<Cut<SmallFile>>> {
        let root = self.cutting.root.clone();
        self.small_sources(files, |file| Source::open(&root, file))
    }

    /// Stores a small file whose content is already in memory.
    pub fn small_bytes(&mut self, file: &Scanned, bytes: Vec<u8>) -> Result<Cut<SmallFile>> {
        let source = Source { content: Content::Memory(bytes), path: self.cutting.root.join(file.os_path()) };
        let mut source = Some(source);
        let mut cut = self.small_sources(&[file], |_| Ok(source.take()))?;
        cut.pop().ok_or_else(|| Error::new("a file was not read"))
    }

    /// Stores an index chunk.
    pub fn index(&mut self, plain: &[u8]) -> Result<ChunkRef> {
        self.store_in(&self.cutting.lanes.map, plain)
    }

    fn small_sources(
        &mut self,
        files: &[&Scanned],
        mut open: impl FnMut(&Scanned) -> Result<Option<Source>>,
    ) -> Result<Vec<Cut<SmallFile>>> {
        let mut placing = Vec::with_capacity(files.len());
        let (mut group, mut chunks) = (Group::default(), Vec::new());
        for (number, file) in files.iter().enumerate() {
            placing.push(match open(file)? {
                Some(source) => Some(self.place_small(&source, file, number, &mut group, &mut chunks)?),
                None => None,
            });
        }
        self.close_group(&mut group, &mut chunks)?;
        self.store_small(chunks, &mut placing)?;
        for piece in group.repeated {
            let seen = self.cutting.dedup.get(&piece.id);
            let seen = seen.ok_or_else(|| Error::new("a repeated piece of a small file was forgotten"))?;
            if let Some(placing) = &mut placing[piece.file] {
                let extent = Extent { len: piece.offset as u32, chunk: seen.chunk, offset: seen.offset };
                placing.extents[piece.extent] = Some(extent);
            }
        }
        self.place_changes(placing)
    }

    fn place_small(
        &mut self,
        source: &Source,
        file: &Scanned,
        number: usize,
        group: &mut Group,
        chunks: &mut Vec<(Stored, Vec<Member>)>,
    ) -> Result<Placing> {
        let mut placing = Placing { extents: Vec::new(), changes: Vec::new(), crc: 0, bad_blocks: Vec::new() };
        let mut at = 0;
        while at < file.size {
            let len = (file.size - at).min(SLOT as u64) as usize;
            let (digest, crc) = self.read_slot(source, file, at, len, &mut placing.bad_blocks)?;
            placing.crc = crc32c::crc32c_append(placing.crc, &self.buffer[..len]);
            placing.changes.push(SlotChange { crc, grains: digest.grains });
            placing.extents.push(match self.cutting.dedup.get(&digest.id) {
                Some(seen) => Some(Extent { len: len as u32, chunk: seen.chunk, offset: seen.offset }),
                None if group.pending.contains(&digest.id) => {
                    group.repeated.push(Member {
                        file: number,
                        extent: placing.extents.len(),
                        offset: len,
                        id: digest.id,
                    });
                    None
                }
                None => {
                    group.pending.insert(digest.id);
                    if group.plain.len() + len > SLOT {
                        self.close_group(group, chunks)?;
                    }
                    let (extent, offset) = (placing.extents.len(), group.plain.len());
                    group.members.push(Member { file: number, extent, offset, id: digest.id });
                    group.plain.extend_from_slice(&self.buffer[..len]);
                    None
                }
            });
            at += len as u64;
        }
        Ok(placing)
    }

    fn close_group(&mut self, group: &mut Group, chunks: &mut Vec<(Stored, Vec<Member>)>) -> Result<()> {
        if group.plain.is_empty() {
            return Ok(());
        }
        let (plain, members) = (std::mem::take(&mut group.plain), std::mem::take(&mut group.members));
        let id = self.cutting.keys.digest(&plain).id;
        self.encode(&plain)?;
        chunks.push((Stored { id, plain_len: plain.len(), bytes: self.stored.clone() }, members));
        Ok(())
    }

    /// Stores the groups of one batch side by side and gives every member its extent.
    fn store_small(&self, chunks: Vec<(Stored, Vec<Member>)>, placing: &mut [Option<Placing>]) -> Result<()> {
        let mut lane = self.cutting.lanes.small.lock();
        for (stored, members) in chunks {
            let chunk = lane.add(self.cutting.uploads, stored.id, stored.plain_len, &stored.bytes)?;
            let ends = members.iter().skip(1).map(|member| member.offset).chain([stored.plain_len]);
            for (member, end) in members.iter().zip(ends) {
                let extent = Extent { len: (end - member.offset) as u32, chunk, offset: member.offset as u32 };
                self.cutting.dedup.insert(member.id, Seen { chunk, offset: extent.offset });
                if let Some(placing) = &mut placing[member.file] {
                    placing.extents[member.extent] = Some(extent);
                }
            }
        }
        Ok(())
    }

    /// Stores the changes of one batch in shared chunks and completes its files.
    fn place_changes(&mut self, placing: Vec<Option<Placing>>) -> Result<Vec<Cut<SmallFile>>> {
        let mut plain = Vec::new();
        let mut offsets = Vec::with_capacity(placing.len());
        for file in placing.iter().flatten() {
            offsets.push(plain.len() as u32);
            plain.extend_from_slice(&encode_changes(&file.changes));
        }
        let chunk = match plain.is_empty() {
            true => None,
            false => Some(self.store_in(&self.cutting.lanes.changes, &plain)?),
        };
        let mut offsets = offsets.into_iter();
        let complete = |placing: Option<Placing>| {
            let Some(file) = placing else { return Ok(Cut::Vanished) };
            let (offset, slots) = (offsets.next(), file.extents.len());
            let extents: Vec<_> = file.extents.into_iter().flatten().collect();
            assert!(extents.len() == slots, "every slot of a small file was stored");
            let changes = if slots == 0 { None } else { chunk.zip(offset) };
            Ok(Cut::Read(Slots { place: (extents, changes), crc: file.crc, bad_blocks: file.bad_blocks }))
        };
        placing.into_iter().map(complete).collect()
    }

    /// Reads one slot into the buffer; gives its digest and CRC32C.
    fn read_slot(
        &mut self,
        source: &Source,
        file: &Scanned,
        at: u64,
        len: usize,
        bad_blocks: &mut Vec<u64>,
    ) -> Result<(Digest, u32)> {
        source.read(at, &mut self.buffer[..len])?;
        if let (Some(pages), Some(first_block)) = (self.cutting.pages, file.first_block) {
            check_pages(source, pages, first_block, at, &mut self.buffer[..len], bad_blocks)?;
        }
        let plain = &self.buffer[..len];
        Ok((self.cutting.keys.digest(plain), crc32c::crc32c(plain)))
    }

    /// Stores the slot in the buffer as a chunk of its own, unless its content is known.
    fn store_slot(&mut self, digest: &Digest, len: usize) -> Result<Extent> {
        if let Some(seen) = self.cutting.dedup.get(&digest.id) {
            return Ok(Extent { len: len as u32, chunk: seen.chunk, offset: seen.offset });
        }
        let plain = std::mem::take(&mut self.buffer);
        let encoded = self.encode(&plain[..len]);
        self.buffer = plain;
        encoded?;
        let chunk = self.data.add(self.cutting.uploads, digest.id, len, &self.stored)?;
        self.cutting.dedup.insert(digest.id, Seen { chunk, offset: 0 });
        Ok(Extent::whole(chunk))
    }

    fn store_in(&mut self, lane: &Mutex<Lane>, plain: &[u8]) -> Result<ChunkRef> {
        let id = self.cutting.keys.digest(plain).id;
        self.encode(plain)?;
        lane.lock().add(self.cutting.uploads, id, plain.len(), &self.stored)
    }

    fn encode(&mut self, plain: &[u8]) -> Result<()> {
        self.stored.clear();
        self.encoder.encode(plain, &mut self.stored).map_err(|error| Error::new("cannot compress").source(error))
    }
}

/// A file of the data directory, open or already in memory.
struct Source {
    content: Content,
    path: PathBuf,
}

enum Content {
    Open(File),
    Memory(Vec<u8>),
}

impl Source {
    fn open(root: &Path, scanned: &Scanned) -> Result<Option<Self>> {
        let path = root.join(scanned.os_path());
        match File::open(&path) {
            Ok(file) => Ok(Some(Self { content: Content::Open(file), path })),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io("open", &path, error)),
        }
    }

    /// Fills `buf`; what lies past the end of a file truncated meanwhile reads as zeros, which WAL replay mends.
    fn read(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            match self.content.read_at(&mut buf[done..], at + done as u64) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::io("read", &self.path, error)),
            }
        }
        buf[done..].fill(0);
        Ok(())
    }
}

impl Content {
    fn read_at(&self, buf: &mut [u8], at: u64) -> std::io::Result<usize> {
        match self {
            Self::Open(file) => file.read_at(buf, at),
            Self::Memory(bytes) => {
                let rest = bytes.get(at as usize..).unwrap_or_default();
                let len = rest.len().min(buf.len());
                buf[..len].copy_from_slice(&rest[..len]);
                Ok(len)
            }
        }
    }
}

/// Checks every page of a slot; a page that fails is read once more, since the server may have been writing it.
fn check_pages(
    source: &Source,
    pages: Pages,
    first_block: u64,
    at: u64,
    slot: &mut [u8],
    bad_blocks: &mut Vec<u64>,
) -> Result<()> {
    for (number, page) in slot.chunks_mut(pages.size).enumerate() {
        let block = at / pages.size as u64 + number as u64;
        if page.len() < pages.size || sound(page, first_block + block, pages.start) {
            continue;
        }
        source.read(block * pages.size as u64, page)?;
        if !sound(page, first_block + block, pages.start) {
            bad_blocks.push(block);
        }
    }
    Ok(())
}

/// True when the checksum is right, or cannot be: a page changed after the backup's start may be torn.
fn sound(page: &[u8], block: u64, start: Lsn) -> bool {
    match page::verify(page, block as u32) {
        page::Verdict::Ok | page::Verdict::New => true,
        page::Verdict::Mismatch { lsn, .. } => lsn >= start,
    }
}
