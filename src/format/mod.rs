//! Every stored byte layout, without I/O. `docs/format.md` describes the same in prose.
//!
//! One container, the [`pack`], holds everything large: chunks of data, file maps, manifests and WAL segments.
//! Small, human-readable objects ([`info`]) are JSON between a magic line and a checksum line.

pub mod chunk;
pub mod cipher_key;
pub mod info;
pub mod manifest;
pub mod map;
pub mod pack;
pub mod seal;
pub mod wire;

/// Hashing granularity in bytes: the unit in which a change between two backups is found. It does not depend on `BLCKSZ`,
/// so that stored bytes can be checked without knowing whose they are.
pub const GRAIN: usize = 8 * 1024;

/// An aligned run of 16 grains of one file: the unit of a file map.
pub const SLOT: usize = 16 * GRAIN;

/// The most plaintext one chunk may hold: 8 slots. Slots that are stored together compress together.
pub const CHUNK: usize = 8 * SLOT;

/// Slots that one leaf of a file map describes: 32 MiB of file.
pub const LEAF_SLOTS: usize = 256;

/// File bytes that one leaf of a file map describes.
pub const LEAF_BYTES: u64 = (LEAF_SLOTS * SLOT) as u64;

/// File bytes that one index chunk of a file map describes.
pub const INDEX_BYTES: u64 = map::INDEX_LEAVES as u64 * LEAF_BYTES;

/// Files up to this many bytes carry their extents in the manifest itself; larger ones have file maps.
pub const INLINE_BYTES: u64 = 8 * SLOT as u64;

/// Version of the layouts in this module.
pub const VERSION: u16 = 1;

/// Stored bytes that are not what they should be: which object, where, and what is wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{object} is damaged at byte {offset}: {what}")]
pub struct FormatError {
    /// key of the object, or what it is when it has no key of its own
    pub object: String,
    /// position of the finding in the object (or in the decoded part that `object` names)
    pub offset: u64,
    /// what was found
    pub what: String,
}

/// Shorthand of this module.
pub type Result<T> = std::result::Result<T, FormatError>;

impl FormatError {
    /// A finding at `offset` of `object`.
    pub fn new(object: &str, offset: u64, what: impl Into<String>) -> Self {
        Self { object: object.to_owned(), offset, what: what.into() }
    }
}
