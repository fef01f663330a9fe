//! The one container: a header, stored chunks back to back, a footer that describes them, a trailer.
//!
//! ```text
//! header   32  magic "PGCNPACK", version u16, kind u8, seal u8, reserved 4, pack id 16
//! chunks    *  stored bytes of chunk 0, 1, ...
//! footer  n*48 per chunk: id 32, offset u32, stored length u32, plain length u32, reserved 4
//! trailer  88  footer offset u64, footer length u32, reserved 4, BLAKE3 of the footer 32,
//!              BLAKE3 of all bytes before this field 32, magic "PGCNPEND"
//! ```

use super::chunk::{ChunkId, ChunkRef, PackId};
use super::seal::SealKind;
use super::wire::Reader;
use super::{CHUNK, FormatError, Result, VERSION};

const MAGIC: &[u8; 8] = b"PGCNPACK";
const END_MAGIC: &[u8; 8] = b"PGCNPEND";
/// Bytes in front of the first chunk.
pub const HEADER_LEN: usize = 32;
/// Bytes behind the footer.
pub const TRAILER_LEN: usize = 88;
/// Footer bytes of one chunk.
pub const ENTRY_LEN: usize = 48;

/// What a pack holds; says nothing about how it is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum PackKind {
    /// chunks of files
    Data = 1,
    /// chunks of small files, in path order
    Small = 2,
    /// leaves of file maps
    Map = 3,
    /// grain hashes and checksums, for the next backup
    Change = 4,
    /// one file of the WAL archive
    Wal = 5,
    /// one manifest
    Manifest = 6,
}

impl PackKind {
    fn from_byte(byte: u8) -> Option<Self> {
        [Self::Data, Self::Small, Self::Map, Self::Change, Self::Wal, Self::Manifest]
            .into_iter()
            .find(|kind| *kind as u8 == byte)
    }
}

/// A pack in the making.
#[derive(Debug)]
pub struct PackWriter {
    id: PackId,
    bytes: Vec<u8>,
    chunks: Vec<ChunkRef>,
}

impl PackWriter {
    /// An empty pack with room for `capacity` bytes, for chunks sealed as `seal` says.
    pub fn new(kind: PackKind, seal: SealKind, id: PackId, capacity: usize) -> Self {
        let mut bytes = Vec::with_capacity(capacity);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&[kind as u8, seal as u8, 0, 0, 0, 0]);
        bytes.extend_from_slice(&id.0);
        Self { id, bytes, chunks: Vec::new() }
    }

    /// The pack's name.
    pub fn id(&self) -> PackId {
        self.id
    }

    /// The chunks added so far, in order.
    pub fn chunks(&self) -> &[ChunkRef] {
        &self.chunks
    }

    /// True while no chunk was added.
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// Bytes so far, footer not counted.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Adds one chunk of `plain_len` bytes in its stored form.
    pub fn add(&mut self, id: ChunkId, plain_len: usize, stored: &[u8]) -> ChunkRef {
        assert!(u32::try_from(self.bytes.len()).is_ok(), "a pack past 4 GiB");
        let (offset, stored_len) = (self.bytes.len() as u32, stored.len() as u32);
        assert!(plain_len <= CHUNK && u64::from(stored_len) <= ChunkRef::MAX_STORED, "a chunk past its limit");
        self.bytes.extend_from_slice(stored);
        let chunk = ChunkRef { pack: self.id, offset, stored_len, plain_len: plain_len as u32, id };
        self.chunks.push(chunk);
        chunk
    }

    /// The whole object.
    pub fn finish(mut self) -> Vec<u8> {
        let footer_at = self.bytes.len();
        for chunk in &self.chunks {
            self.bytes.extend_from_slice(&chunk.id.0);
            for field in [chunk.offset, chunk.stored_len, chunk.plain_len, 0] {
                self.bytes.extend_from_slice(&field.to_le_bytes());
            }
        }
        let footer = blake3::hash(&self.bytes[footer_at..]);
        let footer_len = (self.bytes.len() - footer_at) as u32;
        self.bytes.extend_from_slice(&(footer_at as u64).to_le_bytes());
        self.bytes.extend_from_slice(&footer_len.to_le_bytes());
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(footer.as_bytes());
        let whole = blake3::hash(&self.bytes);
        self.bytes.extend_from_slice(whole.as_bytes());
        self.bytes.extend_from_slice(END_MAGIC);
        self.bytes
    }
}

/// The trailer: where the footer is and what it and the object must hash to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trailer {
    /// first byte of the footer
    pub footer_offset: u64,
    /// bytes of the footer
    pub footer_len: u32,
    footer_hash: [u8; 32],
    object_hash: [u8; 32],
}

impl Trailer {
    /// Reads the last [`TRAILER_LEN`] bytes of an object of `size` bytes.
    pub fn parse(object: &str, size: u64, bytes: &[u8]) -> Result<Self> {
        let base = size.saturating_sub(TRAILER_LEN as u64);
        let mut reader = Reader::new(object, bytes);
        let trailer = Self {
            footer_offset: reader.u64()?,
            footer_len: reader.u32()?,
            footer_hash: {
                zero(&mut reader, 4)?;
                reader.array()?
            },
            object_hash: reader.array()?,
        };
        if &reader.array()? != END_MAGIC {
            return Err(FormatError::new(
                object,
                size.saturating_sub(8),
                "the end magic is missing: the object is cut",
            ));
        }
        let end = trailer.footer_offset.checked_add(u64::from(trailer.footer_len));
        if end != Some(base) || trailer.footer_offset < HEADER_LEN as u64 {
            return Err(FormatError::new(object, base, "the footer is not where the trailer says"));
        }
        Ok(trailer)
    }

    /// Reads the footer's bytes, checked by their hash.
    pub fn footer(&self, object: &str, pack: PackId, bytes: &[u8]) -> Result<Vec<ChunkRef>> {
        let fail = |what: &str| FormatError::new(object, self.footer_offset, what);
        if blake3::hash(bytes).as_bytes() != &self.footer_hash {
            return Err(fail("the footer's checksum is wrong"));
        }
        if !bytes.len().is_multiple_of(ENTRY_LEN) {
            return Err(fail("the footer's length is wrong"));
        }
        let mut reader = Reader::new(object, bytes);
        let mut chunks = Vec::with_capacity(bytes.len() / ENTRY_LEN);
        let mut at = HEADER_LEN as u64;
        while reader.remaining() > 0 {
            let id = ChunkId(reader.array()?);
            let (offset, stored_len, plain_len) = (reader.u32()?, reader.u32()?, reader.u32()?);
            zero(&mut reader, 4)?;
            let chunk = ChunkRef { pack, offset, stored_len, plain_len, id };
            let limits = plain_len as usize <= CHUNK && u64::from(stored_len) <= ChunkRef::MAX_STORED;
            if u64::from(offset) != at || plain_len == 0 || stored_len == 0 || !limits {
                return Err(fail("a chunk is not where or what the footer says"));
            }
            at = chunk.end();
            chunks.push(chunk);
        }
        if at != self.footer_offset {
            return Err(fail("the chunks do not end where the footer begins"));
        }
        Ok(chunks)
    }
}

/// The header of a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// what the pack holds
    pub kind: PackKind,
    /// how its chunks are sealed
    pub seal: SealKind,
    /// its name
    pub id: PackId,
}

impl Header {
    /// Reads the first [`HEADER_LEN`] bytes.
    pub fn parse(object: &str, bytes: &[u8]) -> Result<Self> {
        let mut reader = Reader::new(object, bytes);
        if &reader.array()? != MAGIC {
            return Err(FormatError::new(object, 0, "this is no pgcairn pack: the magic is missing"));
        }
        let version = reader.u16()?;
        if version != VERSION {
            let what = format!("format version {version}; this pgcairn reads version {VERSION}");
            return Err(FormatError::new(object, 8, what));
        }
        let kind = reader.u8()?;
        let kind = PackKind::from_byte(kind).ok_or_else(|| reader.error(format!("unknown kind of pack {kind}")))?;
        let seal = reader.u8()?;
        let seal = SealKind::from_byte(seal).ok_or_else(|| reader.error(format!("unknown seal {seal}")))?;
        zero(&mut reader, 4)?;
        Ok(Self { kind, seal, id: PackId(reader.array()?) })
    }

    /// Fails unless the pack is of `kind` and sealed as `seal`; one of the archive must also be named by its content, if its
    /// key says so.
    pub fn expect(&self, object: &str, kind: PackKind, seal: SealKind) -> Result<()> {
        if self.seal != seal {
            let what = format!("it is {:?} where the repository is {seal:?}", self.seal);
            return Err(FormatError::new(object, 11, what));
        }
        if self.kind != kind {
            let what = format!("a pack of kind {:?} where one of kind {kind:?} belongs", self.kind);
            return Err(FormatError::new(object, 10, what));
        }
        match (kind, WalKey::parse(object)) {
            (PackKind::Wal, Some(key)) if key.content != self.id.to_string() => {
                Err(FormatError::new(object, 16, format!("its content is named {}", self.id)))
            }
            _ => Ok(()),
        }
    }
}

/// What the key of an archived file says, unless it is a timeline history file's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WalKey<'k> {
    /// the file's name in `pg_wal`
    pub name: &'k str,
    /// the hash of its content
    pub content: &'k str,
    /// a restore point may begin in it
    pub point: bool,
}

/// What the keys of WAL end in, in which a restore point may begin.
pub const POINT: &str = ".point";

impl<'k> WalKey<'k> {
    /// Takes a key apart.
    pub fn parse(key: &'k str) -> Option<Self> {
        let (name, rest) = key.rsplit('/').next()?.rsplit_once('-')?;
        let content = rest.strip_suffix(POINT);
        Some(Self { name, content: content.unwrap_or(rest), point: content.is_some() })
    }
}

fn zero(reader: &mut Reader<'_>, len: usize) -> Result<()> {
    match reader.take(len)?.iter().all(|byte| *byte == 0) {
        true => Ok(()),
        false => Err(reader.error("reserved bytes are not zero")),
    }
}

/// A whole pack in memory, every checksum verified.
#[derive(Debug)]
pub struct Pack {
    /// its header
    pub header: Header,
    /// its chunks, in stored order
    pub chunks: Vec<ChunkRef>,
}

impl Pack {
    /// Reads and verifies a whole object.
    pub fn parse(object: &str, bytes: &[u8]) -> Result<Self> {
        if bytes.len() < HEADER_LEN + TRAILER_LEN {
            return Err(FormatError::new(object, 0, format!("{} bytes are too few for a pack", bytes.len())));
        }
        let header = Header::parse(object, &bytes[..HEADER_LEN])?;
        let trailer = Trailer::parse(object, bytes.len() as u64, &bytes[bytes.len() - TRAILER_LEN..])?;
        let hashed = bytes.len() - 40;
        if blake3::hash(&bytes[..hashed]).as_bytes() != &trailer.object_hash {
            return Err(FormatError::new(object, 0, "the object's checksum is wrong"));
        }
        let from = trailer.footer_offset as usize;
        let footer = &bytes[from..from + trailer.footer_len as usize];
        Ok(Self { header, chunks: trailer.footer(object, header.id, footer)? })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::chunk::{Encoder, Keys};
    use super::*;

    fn sample() -> Vec<u8> {
        let (keys, mut encoder) = (Keys::new(b""), Encoder::new(3).unwrap());
        let mut writer = PackWriter::new(PackKind::Data, keys.seal_kind(), PackId([3; 16]), 1024);
        for plain in [b"first".to_vec(), vec![0; CHUNK], vec![9; 100]] {
            let id = keys.digest(&plain).id;
            let mut stored = Vec::new();
            encoder.encode(&keys, &id, &plain, &mut stored).unwrap();
            writer.add(id, plain.len(), &stored);
        }
        writer.finish()
    }

    #[test]
    fn a_pack_comes_back() {
        let pack = Pack::parse("p", &sample()).unwrap();
        assert_eq!(pack.header, Header { kind: PackKind::Data, seal: SealKind::Hashed, id: PackId([3; 16]) });
        assert_eq!(pack.chunks.iter().map(|chunk| chunk.plain_len as usize).collect::<Vec<_>>(), [5, CHUNK, 100]);
    }

    #[test]
    fn every_flipped_byte_and_every_cut_is_found() {
        let whole = sample();
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x10;
            assert!(Pack::parse("p", &bytes).is_err(), "flipped byte {at}");
            assert!(Pack::parse("p", &whole[..at]).is_err(), "cut at {at}");
        }
    }
}
