//! File maps: for each slot of a file, where its bytes are; and what the next backup needs to know of it.
//!
//! A file map is cut into leaves of [`LEAF_SLOTS`] slots, each stored as a chunk of its own, so that reading one page of a
//! large file fetches one leaf. What only the next backup reads (grain hashes, checksums) is a second chunk beside it.

use super::chunk::{ChunkRef, ChunkTable, GrainHash};
use super::wire::{Reader, put_varint};
use super::{CHUNK, FormatError, GRAIN, LEAF_SLOTS, Result, SLOT};

const LEAF_VERSION: u8 = 1;
/// First byte of changes that say only what differs from others.
const DELTA_VERSION: u8 = 2;

/// `file range -> (chunk, offset inside the chunk)`. Extents of one file follow each other without a gap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// bytes of the file
    pub len: u32,
    /// where they are
    pub chunk: ChunkRef,
    /// first byte of them in the chunk's plaintext
    pub offset: u32,
}

impl Extent {
    /// A whole chunk.
    pub fn whole(chunk: ChunkRef) -> Self {
        Self { len: chunk.plain_len, chunk, offset: 0 }
    }
}

/// Encodes extents as (length, chunk number, offset) against `table`.
pub fn encode_extents(extents: &[Extent], table: &mut ChunkTable, out: &mut Vec<u8>) {
    put_varint(out, extents.len() as u64);
    for extent in extents {
        put_varint(out, u64::from(extent.len));
        put_varint(out, table.number(extent.chunk) as u64);
        put_varint(out, u64::from(extent.offset));
    }
}

/// Decodes extents which must cover exactly `len` bytes.
pub fn decode_extents(reader: &mut Reader<'_>, chunks: &[ChunkRef], len: u64) -> Result<Vec<Extent>> {
    let count = reader.count(3, "extent count")?;
    let mut extents = Vec::with_capacity(count);
    let mut covered = 0u64;
    for _ in 0..count {
        let len = reader.bounded(SLOT as u64, "extent length")? as u32;
        let chunk = decode_number(reader, chunks)?;
        let offset = reader.bounded(CHUNK as u64, "extent offset")? as u32;
        if len == 0 || offset + len > chunk.plain_len {
            return Err(
                reader.error(format!("an extent of {len} bytes at {offset} of a {}-byte chunk", chunk.plain_len))
            );
        }
        covered += u64::from(len);
        extents.push(Extent { len, chunk, offset });
    }
    match covered == len {
        true => Ok(extents),
        false => Err(reader.error(format!("extents of {covered} bytes for {len} bytes of file"))),
    }
}

/// Decodes a chunk's number into the chunk.
pub fn decode_number(reader: &mut Reader<'_>, chunks: &[ChunkRef]) -> Result<ChunkRef> {
    let number = reader.varint()?;
    let chunk = usize::try_from(number).ok().and_then(|number| chunks.get(number)).copied();
    chunk.ok_or_else(|| reader.error(format!("chunk {number} of {}", chunks.len())))
}

/// One leaf: the extents of up to [`LEAF_SLOTS`] slots.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Leaf {
    extents: Vec<Extent>,
    /// number of each slot's first extent
    starts: Vec<u32>,
}

impl Leaf {
    /// Adds the next slot.
    pub fn push(&mut self, slot: &[Extent]) {
        self.starts.push(self.extents.len() as u32);
        self.extents.extend_from_slice(slot);
    }

    /// Slots in this leaf.
    pub fn slots(&self) -> usize {
        self.starts.len()
    }

    /// The extents of slot `number` of this leaf.
    pub fn slot(&self, number: usize) -> &[Extent] {
        let end = self.starts.get(number + 1).map_or(self.extents.len(), |start| *start as usize);
        &self.extents[self.starts[number] as usize..end]
    }

    /// Bytes this leaf takes in memory, roughly.
    pub fn memory(&self) -> usize {
        self.extents.len() * size_of::<Extent>() + self.starts.len() * 4 + 64
    }

    /// The plaintext of the chunk that stores this leaf.
    pub fn encode(&self) -> Vec<u8> {
        let (mut table, mut records) = (ChunkTable::default(), Vec::new());
        for slot in 0..self.slots() {
            encode_extents(self.slot(slot), &mut table, &mut records);
        }
        let mut out = vec![LEAF_VERSION];
        put_varint(&mut out, self.slots() as u64);
        table.encode(&mut out);
        out.extend_from_slice(&records);
        assert!(out.len() <= CHUNK, "a leaf must fit into a chunk");
        out
    }

    /// Reads the leaf of `len` bytes of file.
    pub fn decode(object: &str, bytes: &[u8], len: u64) -> Result<Self> {
        let mut reader = Reader::new(object, bytes);
        version(&mut reader)?;
        let slots = reader.bounded(LEAF_SLOTS as u64, "slot count")? as usize;
        if slots as u64 != len.div_ceil(SLOT as u64) {
            return Err(reader.error(format!("{slots} slots for {len} bytes of file")));
        }
        let chunks = ChunkTable::decode(&mut reader)?;
        let mut leaf = Self::default();
        for slot in 0..slots as u64 {
            let slot_len = (len - slot * SLOT as u64).min(SLOT as u64);
            leaf.push(&decode_extents(&mut reader, &chunks, slot_len)?);
        }
        reader.end()?;
        Ok(leaf)
    }
}

/// What the next backup needs to know of one slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotChange {
    /// CRC32C of the slot's bytes
    pub crc: u32,
    /// short hash of each grain
    pub grains: Vec<GrainHash>,
}

/// The plaintext of the chunk that stores the changes of a run of slots.
pub fn encode_changes(slots: &[SlotChange]) -> Vec<u8> {
    let mut out = vec![LEAF_VERSION];
    put_varint(&mut out, slots.len() as u64);
    for slot in slots {
        out.extend_from_slice(&slot.crc.to_le_bytes());
        slot.grains.iter().for_each(|grain| out.extend_from_slice(&grain.to_le_bytes()));
    }
    assert!(out.len() <= CHUNK, "a leaf's changes must fit into a chunk");
    out
}

/// Reads the changes of `len` bytes of file; more may follow, since small files share a chunk.
pub fn decode_changes(object: &str, bytes: &[u8], len: u64) -> Result<Vec<SlotChange>> {
    let mut reader = Reader::new(object, bytes);
    version(&mut reader)?;
    let slots = reader.bounded(LEAF_SLOTS as u64, "slot count")?;
    if slots != len.div_ceil(SLOT as u64) {
        return Err(reader.error(format!("changes of {slots} slots for {len} bytes of file")));
    }
    let mut changes = Vec::with_capacity(slots as usize);
    for slot in 0..slots {
        let slot_len = (len - slot * SLOT as u64).min(SLOT as u64) as usize;
        let crc = reader.u32()?;
        let grains = (0..slot_len.div_ceil(GRAIN)).map(|_| reader.u64()).collect::<Result<Vec<_>>>()?;
        changes.push(SlotChange { crc, grains });
    }
    Ok(changes)
}

/// The plaintext of changes that differ from those stored whole in `base` in some slots; `None` where they would not be much
/// shorter than [`encode_changes`] of `new`, or where the run has another length.
pub fn encode_changes_since(base: ChunkRef, old: &[SlotChange], new: &[SlotChange]) -> Option<Vec<u8>> {
    let same_shape = |(a, b): (&SlotChange, &SlotChange)| a.grains.len() == b.grains.len();
    if old.len() != new.len() || !old.iter().zip(new).all(same_shape) {
        return None;
    }
    let differing = || old.iter().zip(new).enumerate().filter(|(_, (a, b))| a != b);
    let mut table = ChunkTable::default();
    table.number(base);
    let mut out = vec![DELTA_VERSION];
    put_varint(&mut out, new.len() as u64);
    table.encode(&mut out);
    put_varint(&mut out, differing().count() as u64);
    for (number, (a, b)) in differing() {
        put_varint(&mut out, number as u64);
        out.extend_from_slice(&b.crc.to_le_bytes());
        let changed = |at: &usize| a.grains[*at] != b.grains[*at];
        let bits = (0..b.grains.len()).filter(changed).fold(0u64, |bits, at| bits | 1 << at);
        put_varint(&mut out, bits);
        (0..b.grains.len()).filter(changed).for_each(|at| out.extend_from_slice(&b.grains[at].to_le_bytes()));
    }
    let whole: usize = new.iter().map(|slot| 4 + 8 * slot.grains.len()).sum();
    (out.len() < whole / 2).then_some(out)
}

/// The changes of a run of slots, and those, stored whole, that they were stored as the difference to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Changes {
    /// one per slot
    pub slots: Vec<SlotChange>,
    /// where the others are stored, and they
    pub base: Option<(ChunkRef, Vec<SlotChange>)>,
}

/// Reads the changes of `len` bytes of file in whichever form they were stored; `read` gives the plaintext of another chunk.
pub fn resolve_changes<E: From<FormatError>>(
    object: &str,
    bytes: &[u8],
    len: u64,
    read: impl FnOnce(&ChunkRef) -> std::result::Result<Vec<u8>, E>,
) -> std::result::Result<Changes, E> {
    let Some(base) = changes_base(object, bytes)? else {
        return Ok(Changes { slots: decode_changes(object, bytes, len)?, base: None });
    };
    let whole = decode_changes(object, &read(&base)?, len)?;
    let mut slots = whole.clone();
    apply_changes(object, bytes, &mut slots)?;
    Ok(Changes { slots, base: Some((base, whole)) })
}

/// Where changes are stored that [`encode_changes_since`] wrote; `None` for those of [`encode_changes`].
pub fn changes_base(object: &str, bytes: &[u8]) -> Result<Option<ChunkRef>> {
    let mut reader = Reader::new(object, bytes);
    if reader.u8()? != DELTA_VERSION {
        return Ok(None);
    }
    reader.varint()?;
    match *ChunkTable::decode(&mut reader)?.as_slice() {
        [base] => Ok(Some(base)),
        ref other => Err(reader.error(format!("changes since {} others", other.len()))),
    }
}

/// Reads what [`encode_changes_since`] wrote; `changes` are those of its base and become those of `len` bytes of file.
pub fn apply_changes(object: &str, bytes: &[u8], changes: &mut [SlotChange]) -> Result<()> {
    let mut reader = Reader::new(object, bytes);
    let (version, slots) = (reader.u8()?, reader.varint()?);
    if version != DELTA_VERSION || slots != changes.len() as u64 {
        return Err(reader.error(format!("changes of {slots} slots since those of {}", changes.len())));
    }
    ChunkTable::decode(&mut reader)?;
    let mut next = 0;
    for _ in 0..reader.count(6, "changed slots")? {
        let number = reader.bounded(slots.saturating_sub(1), "changed slot")? as usize;
        if number < next {
            return Err(reader.error(format!("slot {number} behind slot {}", next - 1)));
        }
        next = number + 1;
        let crc = reader.u32()?;
        let bits = reader.varint()?;
        let slot = changes.get_mut(number).ok_or_else(|| reader.error("a slot beyond the run"))?;
        if bits >> slot.grains.len() != 0 {
            return Err(reader.error("a grain beyond its slot"));
        }
        slot.crc = crc;
        for (at, grain) in slot.grains.iter_mut().enumerate() {
            if bits >> at & 1 == 1 {
                *grain = reader.u64()?;
            }
        }
    }
    reader.end()
}

/// The map and changes chunk of one leaf, as an index names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeafRef {
    /// holds a [`Leaf`]
    pub map: ChunkRef,
    /// holds its [`SlotChange`]s
    pub changes: ChunkRef,
}

/// Encodes leaf references as pairs of chunk numbers against `table`.
pub fn encode_leaves(leaves: &[LeafRef], table: &mut ChunkTable, out: &mut Vec<u8>) {
    put_varint(out, leaves.len() as u64);
    for leaf in leaves {
        put_varint(out, table.number(leaf.map) as u64);
        put_varint(out, table.number(leaf.changes) as u64);
    }
}

/// Decodes leaf references.
pub fn decode_leaves(reader: &mut Reader<'_>, chunks: &[ChunkRef]) -> Result<Vec<LeafRef>> {
    let count = reader.count(2, "leaf count")?;
    (0..count)
        .map(|_| Ok(LeafRef { map: decode_number(reader, chunks)?, changes: decode_number(reader, chunks)? }))
        .collect()
}

/// The plaintext of an index chunk: up to [`INDEX_LEAVES`] leaves of a file too large for its manifest entry to name them.
pub fn encode_index(leaves: &[LeafRef]) -> Vec<u8> {
    let (mut table, mut records) = (ChunkTable::default(), Vec::new());
    encode_leaves(leaves, &mut table, &mut records);
    let mut out = vec![LEAF_VERSION];
    table.encode(&mut out);
    out.extend_from_slice(&records);
    assert!(out.len() <= CHUNK, "an index must fit into a chunk");
    out
}

/// Reads an index chunk.
pub fn decode_index(object: &str, bytes: &[u8]) -> Result<Vec<LeafRef>> {
    let mut reader = Reader::new(object, bytes);
    version(&mut reader)?;
    let chunks = ChunkTable::decode(&mut reader)?;
    let leaves = decode_leaves(&mut reader, &chunks)?;
    reader.end()?;
    Ok(leaves)
}

/// Leaves that one index chunk names: 16 GiB of file.
pub const INDEX_LEAVES: usize = 512;

fn version(reader: &mut Reader<'_>) -> Result<()> {
    match reader.u8()? {
        LEAF_VERSION => Ok(()),
        other => Err(reader.error(format!("unknown leaf version {other}"))),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::chunk::{ChunkId, PackId};
    use super::*;
    use proptest::prelude::*;

    fn chunk(number: u8, plain_len: u32) -> ChunkRef {
        let id = ChunkId([number; 32]);
        ChunkRef {
            pack: PackId([number % 3; 16]),
            offset: 32 + u32::from(number) * 1000,
            stored_len: 900,
            plain_len,
            id,
        }
    }

    /// A leaf as an incremental leaves it: some slots split over an old chunk and a chunk of changed grains.
    fn split_leaf(slots: usize, last: usize) -> (Leaf, u64) {
        let mut leaf = Leaf::default();
        for slot in 0..slots {
            let len = if slot + 1 == slots { last } else { SLOT } as u32;
            let old = chunk(slot as u8, len);
            match slot % 3 {
                1 if len as usize > 3 * GRAIN => {
                    let (grain, fresh) = (GRAIN as u32, chunk(200, 2 * GRAIN as u32));
                    leaf.push(&[
                        Extent { len: grain, chunk: old, offset: 0 },
                        Extent { len: 2 * grain, chunk: fresh, offset: 0 },
                        Extent { len: len - 3 * grain, chunk: old, offset: 3 * grain },
                    ]);
                }
                _ => leaf.push(&[Extent::whole(old)]),
            }
        }
        (leaf, ((slots - 1) * SLOT + last) as u64)
    }

    fn run(slots: usize, last: usize) -> Vec<SlotChange> {
        let len = |slot| if slot + 1 == slots { last } else { SLOT };
        let change = |slot| SlotChange { crc: slot as u32, grains: (0..len(slot).div_ceil(GRAIN) as u64).collect() };
        (0..slots).map(change).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn a_leaf_comes_back(slots in 1..=LEAF_SLOTS, last in 1..=SLOT) {
            let (leaf, len) = split_leaf(slots, last);
            let bytes = leaf.encode();
            prop_assert_eq!(Leaf::decode("leaf", &bytes, len).unwrap(), leaf);
            prop_assert!(Leaf::decode("leaf", &bytes, len + 1).is_err());
        }

        #[test]
        fn hostile_bytes_are_an_error_not_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), len: u32) {
            let _ = Leaf::decode("leaf", &bytes, u64::from(len));
            let _ = decode_changes("changes", &bytes, u64::from(len));
            let _ = decode_index("index", &bytes);
            let _ = changes_base("changes", &bytes);
            let _ = apply_changes("changes", &bytes, &mut run(3, 5));
        }

        #[test]
        fn changes_since_others_come_back(
            slots in 1..=LEAF_SLOTS,
            last in 1..=SLOT,
            edits in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<u64>()), 0..20),
        ) {
            let old = run(slots, last);
            let mut new = old.clone();
            for (slot, grain, hash) in edits {
                let slot = slot.get_mut(&mut new);
                slot.crc ^= hash as u32;
                *grain.get_mut(&mut slot.grains) = hash;
            }
            let base = chunk(1, 900);
            if let Some(bytes) = encode_changes_since(base, &old, &new) {
                prop_assert_eq!(changes_base("changes", &bytes).unwrap(), Some(base));
                let mut read = old.clone();
                apply_changes("changes", &bytes, &mut read).unwrap();
                prop_assert_eq!(&read, &new);
                prop_assert!(apply_changes("changes", &bytes, &mut run(slots + 1, last)).is_err());
                prop_assert!(apply_changes("changes", &bytes[..bytes.len() - 1], &mut read).is_err());
            } else {
                prop_assert!(slots < 40, "20 edits in {} slots are stored whole", slots);
            }
        }

        #[test]
        fn changes_come_back(slots in 1..=LEAF_SLOTS, last in 1..=SLOT) {
            let changes = run(slots, last);
            prop_assert_eq!(changes_base("changes", &encode_changes(&changes)).unwrap(), None);
            let len = ((slots - 1) * SLOT + last) as u64;
            prop_assert_eq!(decode_changes("changes", &encode_changes(&changes), len).unwrap(), changes);
        }
    }

    #[test]
    fn an_index_comes_back() {
        let leaves: Vec<_> =
            (0..100).map(|number| LeafRef { map: chunk(number, 50), changes: chunk(number + 100, 60) }).collect();
        assert_eq!(decode_index("index", &encode_index(&leaves)).unwrap(), leaves);
    }
}
