//! Chunks: their names, where they are, and how their plaintext becomes stored bytes.

use std::fmt;
use std::io;

use zstd::zstd_safe::{self, CParameter};

use super::seal::{InfoSeal, Seal, SealKind};
use super::wire::{Reader, put_varint};
use super::{CHUNK, FormatError, GRAIN, Result};

/// Name of a chunk: keyed BLAKE3 over the keyed BLAKE3 digests of its grains.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChunkId(pub [u8; 32]);

/// Name of a pack, random (of a WAL object: derived from its content).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct PackId(pub [u8; 16]);

/// 64 bits of a grain's digest: enough to find changed grains of one file between two backups.
pub type GrainHash = u64;

/// Where the stored bytes of a chunk are, and what they must prove to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ChunkRef {
    /// the pack that holds it
    pub pack: PackId,
    /// first stored byte in the pack
    pub offset: u32,
    /// stored bytes
    pub stored_len: u32,
    /// plaintext bytes, 1 to [`CHUNK`]
    pub plain_len: u32,
    /// the plaintext's name
    pub id: ChunkId,
}

/// zstd level of the writer where nothing else is asked for.
pub const DEFAULT_LEVEL: i32 = 5;

/// Codec byte in front of a stored chunk: the plaintext follows as it is.
const RAW: u8 = 0;
/// Codec byte in front of a stored chunk: one zstd frame follows.
const ZSTD: u8 = 1;

/// The keys under which plaintext is hashed and stored bytes are sealed. Without encryption they derive from constants: a
/// name then tells as much as the stored bytes beside it do. With encryption they derive from the repository's secret.
#[derive(Clone)]
pub struct Keys {
    grain: [u8; 32],
    chunk: [u8; 32],
    file: [u8; 32],
    history: [u8; 32],
    seal: Seal,
    info: InfoSeal,
    /// of an encrypted stanza whose manifests carry a proof
    manifest: Option<[u8; 32]>,
}

/// The digests of one run of plaintext: its name and the short hash of each grain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Digest {
    /// name of the run as a chunk
    pub id: ChunkId,
    /// one per grain, the last may be of a partial grain
    pub grains: Vec<GrainHash>,
}

impl Keys {
    /// Keys of a repository; `secret` is empty where there is no encryption.
    pub fn new(secret: &[u8]) -> Self {
        Self {
            grain: blake3::derive_key("pgcairn 2026 grain", secret),
            chunk: blake3::derive_key("pgcairn 2026 chunk", secret),
            file: blake3::derive_key("pgcairn 2026 file", secret),
            history: blake3::derive_key("pgcairn 2026 history", secret),
            seal: Seal::new(secret),
            info: InfoSeal::new(secret),
            manifest: None,
        }
    }

    /// Keys of an encrypted stanza whose manifests carry a proof, see [`Self::manifest_proof`].
    pub fn with_manifest_proof(secret: &[u8]) -> Self {
        Self { manifest: Some(blake3::derive_key("pgcairn 2026 manifest", secret)), ..Self::new(secret) }
    }

    /// Binds the list of a manifest's chunks to the stanza's secret: a keyed hash over the backup's label, the manifest's pack
    /// id and the chunk ids, under a key that names nothing else. `None` where manifests carry no proof.
    ///
    /// The seal of each chunk proves that the chunk is the stanza's; it does not prove which manifest it belongs to.
    pub fn manifest_proof(&self, label: &str, pack: PackId, chunks: &[ChunkRef]) -> Option<[u8; 32]> {
        let mut hasher = blake3::Hasher::new_keyed(self.manifest.as_ref()?);
        hasher.update(&(label.len() as u32).to_le_bytes()).update(label.as_bytes()).update(&pack.0);
        hasher.update(&(chunks.len() as u32).to_le_bytes());
        chunks.iter().for_each(|chunk| _ = hasher.update(&chunk.id.0));
        Some(*hasher.finalize().as_bytes())
    }

    /// Fails unless the chunks of an archived file, in order, are those that its pack id names. That of a timeline history file
    /// names the file, too, and its cluster, which is to be the one with `system_id`, if that is known.
    ///
    /// A pack id without them is that of a history file by an earlier writer: it proves the content alone.
    pub fn check_wal_content(
        &self,
        object: &str,
        system_id: Option<u64>,
        pack: PackId,
        chunks: &[ChunkRef],
    ) -> Result<()> {
        let ids = || chunks.iter().map(|chunk| chunk.id);
        let content = self.file(ids());
        if content == pack {
            return Ok(());
        }
        let name = object.rsplit('/').next().unwrap_or_default();
        match system_id.filter(|_| name.ends_with(".history")) {
            Some(system_id) if self.history(system_id, name, ids()) == pack => Ok(()),
            Some(system_id) => {
                let what =
                    format!("it is not what was archived as {name} of the cluster with system identifier {system_id}");
                Err(FormatError::new(object, 0, what))
            }
            None => Err(FormatError::new(object, 0, format!("its content is {content}, it is named {pack}"))),
        }
    }

    /// How packs are sealed under these keys.
    pub fn seal_kind(&self) -> SealKind {
        self.seal.kind()
    }

    /// Whether they derive from a secret, so that the repository is encrypted.
    pub fn is_secret(&self) -> bool {
        self.seal_kind() == SealKind::Encrypted
    }

    /// The content of an info object, encrypted and bound to the object's key; `None` where there is no encryption.
    pub(super) fn hide(&self, object: &str, plain: &[u8]) -> io::Result<Option<Vec<u8>>> {
        self.info.close(object, plain)
    }

    /// What [`Self::hide`] encrypted.
    pub(super) fn reveal(&self, object: &str, hidden: &[u8]) -> std::result::Result<Vec<u8>, String> {
        self.info.open(object, hidden)
    }

    /// Hashes the plaintext of one chunk, each byte once.
    pub fn digest(&self, plain: &[u8]) -> Digest {
        let digests: Vec<GrainDigest> = plain.chunks(GRAIN).map(|grain| self.grain_digest(grain)).collect();
        Digest { id: self.name(plain.len(), &digests), grains: digests.iter().map(GrainDigest::short).collect() }
    }

    /// The whole digest of one grain.
    pub fn grain_digest(&self, grain: &[u8]) -> GrainDigest {
        GrainDigest(*blake3::keyed_hash(&self.grain, grain).as_bytes())
    }

    /// The name of a chunk of `len` bytes, from the digests of its grains.
    pub fn name(&self, len: usize, grains: &[GrainDigest]) -> ChunkId {
        let mut whole = blake3::Hasher::new_keyed(&self.chunk);
        whole.update(&(len as u32).to_le_bytes());
        grains.iter().for_each(|grain| _ = whole.update(&grain.0));
        ChunkId(*whole.finalize().as_bytes())
    }

    /// The short hash of one grain.
    pub fn grain(&self, grain: &[u8]) -> GrainHash {
        self.grain_digest(grain).short()
    }

    /// The name of a whole file from the names of its chunks in order; the WAL archive's file names carry it.
    pub fn file(&self, chunks: impl IntoIterator<Item = ChunkId>) -> PackId {
        hash_of(blake3::Hasher::new_keyed(&self.file), chunks)
    }

    /// The pack id of a timeline history file: its text says neither which timeline it is of nor whose, so this does.
    pub fn history(&self, system_id: u64, name: &str, chunks: impl IntoIterator<Item = ChunkId>) -> PackId {
        let mut hasher = blake3::Hasher::new_keyed(&self.history);
        hasher.update(&system_id.to_le_bytes()).update(&(name.len() as u32).to_le_bytes()).update(name.as_bytes());
        hash_of(hasher, chunks)
    }
}

fn hash_of(mut hasher: blake3::Hasher, chunks: impl IntoIterator<Item = ChunkId>) -> PackId {
    chunks.into_iter().for_each(|chunk| _ = hasher.update(&chunk.0));
    let mut id = PackId::default();
    id.0.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    id
}

/// The whole digest of one grain, of which [`GrainHash`] is the beginning.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct GrainDigest([u8; 32]);

impl GrainDigest {
    /// Its first 64 bits.
    pub fn short(&self) -> GrainHash {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&self.0[..8]);
        u64::from_le_bytes(bytes)
    }
}

/// The plaintext of a chunk, proved, and the short hash of each grain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decoded {
    /// the plaintext
    pub plain: Vec<u8>,
    /// one per grain, the last may be of a partial grain
    pub grains: Vec<GrainHash>,
}

/// Turns plaintext into stored bytes; keeps its compression contexts between calls.
///
/// A higher level pays for text and indexes; rows of numbers compress better at level 1, and random bytes not at all. So a part of
/// a large chunk is tried both ways, and what wins is taken for it and the chunks that follow.
pub struct Encoder {
    fast: zstd::bulk::Compressor<'static>,
    thorough: Option<zstd::bulk::Compressor<'static>>,
    pays: bool,
    /// large chunks until the next trial
    untried: usize,
    /// what a compressor writes into; grown once, since clearing it for each chunk would cost as much as hashing the chunk
    packed: Vec<u8>,
}

/// Level for what a higher one does not pay for.
const FAST_LEVEL: i32 = 1;
/// Bytes of a trial; smaller chunks are compressed thoroughly without one.
const TRIAL_BYTES: usize = 64 * 1024;
/// Large chunks that follow the outcome of one trial.
const TRIAL_EVERY: usize = 6;
/// Level for WAL, unless another is asked for.
pub const WAL_LEVEL: i32 = 3;
/// What it stands for. Records repeat what was written shortly before, and a table of positions that fits into a core's cache
/// finds it. Measured with WAL of pgbench, its loading, and of texts and their index: 1 to 3 % fewer bytes than zstd's own level
/// 3 in two thirds to nine tenths of the time.
const WAL_SETTINGS: [CParameter; 5] = [
    CParameter::CompressionLevel(WAL_LEVEL),
    CParameter::Strategy(zstd_safe::Strategy::ZSTD_fast),
    CParameter::HashLog(14),
    CParameter::MinMatch(5),
    // a byte less than the size from which on zstd looks for better places to begin a block: 0.1 % for a thirtieth of the time
    CParameter::MaxBlockSize((128 << 10) - 1),
];
/// A higher level pays where it saves at least this much of every thousand bytes that level 1 stores.
const PAYS_PERMILLE: usize = 40;

impl Encoder {
    /// `level` as of zstd, for what it pays for; see [`DEFAULT_LEVEL`].
    pub fn new(level: i32) -> io::Result<Self> {
        let compressor = zstd::bulk::Compressor::new;
        let thorough = if level > FAST_LEVEL { Some(compressor(level)?) } else { None };
        let fast = compressor(level.min(FAST_LEVEL))?;
        Ok(Self { fast, thorough, pays: true, untried: 0, packed: Vec::new() })
    }

    /// The same for WAL: [`WAL_LEVEL`] has settings that suit it, and nothing has to be tried.
    pub fn of_wal(level: i32) -> io::Result<Self> {
        if level != WAL_LEVEL {
            return Self::new(level);
        }
        let mut encoder = Self::new(FAST_LEVEL)?;
        for setting in WAL_SETTINGS {
            encoder.fast.set_parameter(setting)?;
        }
        Ok(encoder)
    }

    /// Appends the stored form of the chunk `id` to `out`; incompressible plaintext is kept raw.
    pub fn encode(&mut self, keys: &Keys, id: &ChunkId, plain: &[u8], out: &mut Vec<u8>) -> io::Result<()> {
        let start = out.len();
        self.room_for(plain.len());
        let thorough = self.thorough_pays(plain)?;
        let compressor = match &mut self.thorough {
            Some(slow) if thorough => slow,
            _ => &mut self.fast,
        };
        let written = compressor.compress_to_buffer(plain, &mut self.packed[..])?;
        let (codec, payload) = if written < plain.len() { (ZSTD, &self.packed[..written]) } else { (RAW, plain) };
        // with its codec byte and its seal
        out.reserve(ChunkRef::MAX_STORED as usize - CHUNK + payload.len());
        out.push(codec);
        out.extend_from_slice(payload);
        keys.seal.close(id, out, start)
    }

    fn thorough_pays(&mut self, plain: &[u8]) -> io::Result<bool> {
        let Some(thorough) = &mut self.thorough else { return Ok(false) };
        if plain.len() < 2 * TRIAL_BYTES {
            return Ok(true);
        }
        if self.untried == 0 {
            let middle = plain.len() / 2 - TRIAL_BYTES / 2;
            let sample = &plain[middle..middle + TRIAL_BYTES];
            let fast = self.fast.compress_to_buffer(sample, &mut self.packed[..])?;
            let slow = thorough.compress_to_buffer(sample, &mut self.packed[..])?;
            self.pays = slow * 1000 <= fast * (1000 - PAYS_PERMILLE);
            self.untried = TRIAL_EVERY;
        }
        self.untried -= 1;
        Ok(self.pays)
    }

    fn room_for(&mut self, plain_len: usize) {
        let room = zstd_safe::compress_bound(plain_len);
        if self.packed.len() < room {
            self.packed.resize(room, 0);
        }
    }
}

/// Turns stored bytes back into plaintext and proves them; keeps its decompression context between calls.
pub struct Decoder {
    zstd: zstd::bulk::Decompressor<'static>,
}

impl Decoder {
    /// A decoder with an empty context.
    pub fn new() -> io::Result<Self> {
        Ok(Self { zstd: zstd::bulk::Decompressor::new()? })
    }

    /// The plaintext of a chunk, checked against its name; `object` is what an error calls the pack.
    pub fn decode(&mut self, keys: &Keys, object: &str, at: &ChunkRef, stored: &[u8]) -> Result<Decoded> {
        self.decode_named(keys, object, at, stored, false)
    }

    /// The same, and its seal is checked too: all that any reader may rely on.
    pub fn prove(&mut self, keys: &Keys, object: &str, at: &ChunkRef, stored: &[u8]) -> Result<Decoded> {
        self.decode_named(keys, object, at, stored, true)
    }

    fn decode_named(
        &mut self,
        keys: &Keys,
        object: &str,
        at: &ChunkRef,
        stored: &[u8],
        sealed: bool,
    ) -> Result<Decoded> {
        let bad = |what: String| FormatError::new(object, u64::from(at.offset), what);
        let mut plain = Vec::new();
        self.unpack(keys, at, stored, sealed, &mut plain).map_err(bad)?;
        let Digest { id, grains } = keys.digest(&plain);
        match id == at.id {
            true => Ok(Decoded { plain, grains }),
            false => Err(bad(format!("chunk {} reads as {id}", at.id))),
        }
    }

    /// Replaces `plain` by the plaintext of a chunk whose stored bytes are proved by their seal. That what they decompress to
    /// is right is for the caller to prove, by the checksum of the file.
    pub fn decode_sealed(
        &mut self,
        keys: &Keys,
        object: &str,
        at: &ChunkRef,
        stored: &[u8],
        plain: &mut Vec<u8>,
    ) -> Result<()> {
        let unpacked = self.unpack(keys, at, stored, true, plain);
        unpacked.map_err(|what| FormatError::new(object, u64::from(at.offset), what))
    }

    fn unpack(
        &mut self,
        keys: &Keys,
        at: &ChunkRef,
        stored: &[u8],
        prove: bool,
        plain: &mut Vec<u8>,
    ) -> std::result::Result<(), String> {
        plain.clear();
        let frame = keys.seal.open(&at.id, stored, prove)?;
        let (codec, payload) = frame.split_first().ok_or("an empty chunk")?;
        let expected = (at.plain_len as usize).min(CHUNK);
        match *codec {
            RAW => plain.extend_from_slice(payload),
            ZSTD => {
                plain.reserve_exact(expected);
                let unpacked = self.zstd.decompress_to_buffer(payload, plain);
                unpacked.map_err(|error| format!("a chunk that zstd refuses: {error}"))?;
            }
            other => return Err(format!("unknown codec {other}")),
        }
        match plain.len() == expected {
            true => Ok(()),
            false => Err(format!("a chunk of {} bytes where {expected} were stored", plain.len())),
        }
    }
}

impl PackId {
    /// Reads what [`Display`](fmt::Display) writes.
    pub fn from_hex(text: &str) -> Option<Self> {
        let digits = text.as_bytes();
        if digits.len() != 32 || !digits.iter().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f')) {
            return None;
        }
        let mut id = Self::default();
        for (byte, pair) in id.0.iter_mut().zip(digits.as_chunks::<2>().0) {
            *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
        }
        Some(id)
    }
}

impl ChunkRef {
    /// The largest stored length a chunk can have: raw, with its codec byte and its seal.
    pub const MAX_STORED: u64 = CHUNK as u64 + 256;

    /// The first byte behind the stored bytes.
    pub fn end(&self) -> u64 {
        u64::from(self.offset) + u64::from(self.stored_len)
    }
}

/// A table of packs and chunks at the head of a leaf or block; its records then name chunks by number.
#[derive(Debug, Default)]
pub struct ChunkTable {
    packs: Vec<PackId>,
    chunks: Vec<ChunkRef>,
    numbers: std::collections::HashMap<ChunkRef, usize>,
}

impl ChunkTable {
    /// The number of `chunk`, added where it is new.
    pub fn number(&mut self, chunk: ChunkRef) -> usize {
        if let Some(number) = self.numbers.get(&chunk) {
            return *number;
        }
        self.chunks.push(chunk);
        self.numbers.insert(chunk, self.chunks.len() - 1);
        self.chunks.len() - 1
    }

    /// Rough encoded length in bytes.
    pub fn encoded_len(&self) -> usize {
        self.chunks.len() * 46 + self.packs.len() * 16 + 16
    }

    /// Appends packs, then chunks.
    pub fn encode(&mut self, out: &mut Vec<u8>) {
        let mut pack_numbers = std::collections::HashMap::new();
        self.packs.clear();
        for chunk in &self.chunks {
            pack_numbers.entry(chunk.pack).or_insert_with(|| {
                self.packs.push(chunk.pack);
                self.packs.len() - 1
            });
        }
        put_varint(out, self.packs.len() as u64);
        self.packs.iter().for_each(|pack| out.extend_from_slice(&pack.0));
        put_varint(out, self.chunks.len() as u64);
        for chunk in &self.chunks {
            put_varint(out, pack_numbers[&chunk.pack] as u64);
            put_varint(out, u64::from(chunk.offset));
            put_varint(out, u64::from(chunk.stored_len));
            put_varint(out, u64::from(chunk.plain_len));
            out.extend_from_slice(&chunk.id.0);
        }
    }

    /// Reads what `encode` wrote.
    pub fn decode(reader: &mut Reader<'_>) -> Result<Vec<ChunkRef>> {
        let packs = reader.count(16, "pack count")?;
        let packs = (0..packs).map(|_| Ok(PackId(reader.array()?))).collect::<Result<Vec<_>>>()?;
        let chunks = reader.count(36, "chunk count")?;
        (0..chunks).map(|_| decode_chunk(reader, &packs)).collect()
    }
}

fn decode_chunk(reader: &mut Reader<'_>, packs: &[PackId]) -> Result<ChunkRef> {
    let number = reader.varint()?;
    let pack = usize::try_from(number).ok().and_then(|number| packs.get(number));
    let pack = *pack.ok_or_else(|| reader.error(format!("pack {number} of {}", packs.len())))?;
    let offset = reader.bounded(u64::from(u32::MAX) - ChunkRef::MAX_STORED, "chunk offset")? as u32;
    let stored_len = reader.bounded(ChunkRef::MAX_STORED, "stored length")? as u32;
    let plain_len = reader.bounded(CHUNK as u64, "plain length")? as u32;
    if plain_len == 0 || stored_len == 0 {
        return Err(reader.error("an empty chunk"));
    }
    Ok(ChunkRef { pack, offset, stored_len, plain_len, id: ChunkId(reader.array()?) })
}

fn hex(bytes: &[u8], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
}

impl fmt::Display for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        hex(&self.0, f)
    }
}

impl fmt::Debug for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        hex(&self.0[..6], f)
    }
}

impl fmt::Display for PackId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        hex(&self.0, f)
    }
}

impl fmt::Debug for PackId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        hex(&self.0[..6], f)
    }
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Keys({:?})", self.seal)
    }
}

impl fmt::Debug for GrainDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        hex(&self.0[..6], f)
    }
}

impl fmt::Debug for Encoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Encoder")
    }
}

impl fmt::Debug for Decoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Decoder")
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn reference(keys: &Keys, plain: &[u8], stored_len: usize) -> ChunkRef {
        let id = keys.digest(plain).id;
        let (stored_len, plain_len) = (stored_len as u32, plain.len() as u32);
        ChunkRef { pack: PackId([7; 16]), offset: 32, stored_len, plain_len, id }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn plaintext_comes_back_and_a_flipped_bit_does_not(
            plain in prop_oneof![
                prop::collection::vec(any::<u8>(), 1..40_000),
                (any::<u8>(), 1..CHUNK).prop_map(|(byte, len)| vec![byte; len]),
            ],
            flip in any::<prop::sample::Index>(),
            encrypted: bool,
            is_wal: bool,
        ) {
            let keys = Keys::new(if encrypted { b"secret" } else { b"" });
            let (mut stored, mut unpacked) = (Vec::new(), Vec::new());
            let digest = keys.digest(&plain);
            let encoder = if is_wal { Encoder::of_wal(WAL_LEVEL) } else { Encoder::new(3) };
            encoder.unwrap().encode(&keys, &digest.id, &plain, &mut stored).unwrap();
            let at = reference(&keys, &plain, stored.len());
            let mut decoder = Decoder::new().unwrap();
            let decoded = Decoded { plain: plain.clone(), grains: digest.grains };
            prop_assert_eq!(&decoder.decode(&keys, "pack", &at, &stored).unwrap(), &decoded);
            decoder.decode_sealed(&keys, "pack", &at, &stored, &mut unpacked).unwrap();
            prop_assert_eq!(&unpacked, &plain);
            let bit = flip.index(stored.len() * 8);
            stored[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(decoder.decode_sealed(&keys, "pack", &at, &stored, &mut unpacked).is_err());
            if let Ok(read) = decoder.decode(&keys, "pack", &at, &stored) {
                prop_assert_eq!(read, decoded);
            }
        }
    }

    #[test]
    fn names_depend_on_the_secret_and_on_every_grain() {
        let (plain, open, sealed) = (vec![1; 3 * GRAIN], Keys::new(b""), Keys::new(b"secret"));
        assert_ne!(open.digest(&plain).id, sealed.digest(&plain).id);
        assert_eq!(open.digest(&plain).grains.len(), 3);
        let mut changed = plain.clone();
        changed[2 * GRAIN] = 2;
        assert_ne!(open.digest(&plain).id, open.digest(&changed).id);
        assert_eq!(open.digest(&plain).grains[..2], open.digest(&changed).grains[..2]);
        assert_ne!(open.digest(&plain).grains[2], open.digest(&changed).grains[2]);
    }

    #[test]
    fn names_of_packs_come_back() {
        let id = PackId([0, 1, 0x2a, 0xff, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]);
        assert_eq!(PackId::from_hex(&id.to_string()), Some(id));
        for wrong in ["", "7f", &id.to_string().to_uppercase(), &format!("{id}0"), &"+1".repeat(16), &"zz".repeat(16)] {
            assert_eq!(PackId::from_hex(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_table_comes_back() {
        let keys = Keys::new(b"");
        let mut table = ChunkTable::default();
        let first = reference(&keys, b"one", 4);
        let second = ChunkRef { pack: PackId([9; 16]), offset: 77, ..reference(&keys, b"two", 4) };
        assert_eq!((table.number(first), table.number(second), table.number(first)), (0, 1, 0));
        let mut out = Vec::new();
        table.encode(&mut out);
        assert_eq!(ChunkTable::decode(&mut Reader::new("table", &out)).unwrap(), [first, second]);
    }
}
