//! What the golden repository holds, made again wherever it is needed: by the generator and by the test that reads it.

use pgcairn::format::{GRAIN, LEAF_BYTES, SLOT};

/// The stanza.
pub(crate) const STANZA: &str = "golden";
/// The backup.
pub(crate) const LABEL: &str = "20240107-120000F";
/// The tablespace's oid.
pub(crate) const TABLESPACE: u32 = 16400;
/// Where the source had it.
pub(crate) const TABLESPACE_PATH: &str = "/elsewhere/fast";
/// The WAL segment that the backup needs, of 1 MiB.
pub(crate) const SEGMENT: &str = "000000020000000000000012";
/// A history file of the archive.
pub(crate) const HISTORY: &str = "00000002.history";
/// What it says.
pub(crate) const HISTORY_TEXT: &[u8] = b"1\t0/1100028\tno recovery target specified\n";
/// The cluster.
pub(crate) const SYSTEM_ID: u64 = 7_321_000_000_000_000_001;
/// Length of a file with an index: 64 whole leaves and a piece of one more.
pub(crate) const HUGE_BYTES: u64 = 64 * LEAF_BYTES + SLOT as u64 + 100;

/// One slot's worth of bytes that compress, different for every `seed`.
pub(crate) fn rows(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len + 64);
    for row in 0.. {
        if bytes.len() >= len {
            break;
        }
        bytes.extend_from_slice(
            format!("{seed}|{row:08}|a row of the golden repository, long enough to compress\n").as_bytes(),
        );
    }
    bytes.truncate(len);
    bytes
}

/// Bytes that do not compress.
pub(crate) fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..len).map(next).collect()
}

/// Small files, whose extents are in the manifest: path and content.
pub(crate) fn small() -> Vec<(&'static [u8], Vec<u8>)> {
    vec![
        (b"PG_VERSION", b"15\n".to_vec()),
        (b"base/5/16384_fsm", Vec::new()),
        (b"base/5/16390", rows(9, SLOT + 3 * GRAIN + 17)),
        (b"base/5/na\xffme", b"not UTF-8".to_vec()),
        (b"base/5/noise", noise(5000)),
        (b"global/pg_control", rows(8, 8192)),
        (b"pg_tblspc/16400/PG_15_202209061/5/16401", rows(7, 3 * GRAIN)),
        (b"postgresql.auto.conf", b"work_mem = '64MB'\n".to_vec()),
        (b"postgresql.conf", b"port = 5432".to_vec()),
    ]
}

/// A file with a map. Its second slot is split as an incremental backup leaves it.
pub(crate) fn mapped() -> Vec<u8> {
    let mut bytes = rows(1, 9 * SLOT + 11);
    bytes[SLOT + GRAIN..SLOT + 3 * GRAIN].copy_from_slice(&changed());
    bytes
}

/// The two grains of its second slot that changed.
pub(crate) fn changed() -> Vec<u8> {
    rows(2, 2 * GRAIN)
}

/// What the file with an index consists of: this, over and over.
pub(crate) fn huge_slot() -> Vec<u8> {
    rows(3, SLOT)
}

/// The WAL segment, with a header that PostgreSQL 15 would have written.
pub(crate) fn segment() -> Vec<u8> {
    let mut bytes = rows(4, 256 * 1024);
    bytes.resize(1 << 20, 0);
    bytes[..2].copy_from_slice(&0xd110u16.to_le_bytes());
    bytes[2..4].copy_from_slice(&2u16.to_le_bytes());
    bytes[4..8].copy_from_slice(&2u32.to_le_bytes());
    bytes[8..16].copy_from_slice(&0x120_0000u64.to_le_bytes());
    bytes[16..24].fill(0);
    bytes[24..32].copy_from_slice(&SYSTEM_ID.to_le_bytes());
    bytes[32..36].copy_from_slice(&(1u32 << 20).to_le_bytes());
    bytes[36..40].copy_from_slice(&8192u32.to_le_bytes());
    bytes
}
