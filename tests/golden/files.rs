//! What the golden repository holds, made again wherever it is needed: by the generator and by the test that reads it.

use pgcairn::format::{CHUNK, GRAIN, LEAF_BYTES, SLOT};

/// The stanza.
pub(crate) const STANZA: &str = "golden";
/// The full backup.
pub(crate) const FULL: &str = "20240107-120000F";
/// The incremental backup on top of it, which holds everything else below.
pub(crate) const LABEL: &str = "20240107-120000F_20240108-180000I";
/// What the golden repository with encryption is encrypted with.
/// A stanza of which there is no more than its key and its info objects, encrypted.
pub(crate) const LOCKED: &str = "locked";
pub(crate) const PASSPHRASE: &str = "the passphrase of the golden stanza";
pub(crate) const SECRET: &[u8] = b"the secret of the golden repository";
/// The tablespace's oid.
pub(crate) const TABLESPACE: u32 = 16400;
/// Where the source had it.
pub(crate) const TABLESPACE_PATH: &str = "/elsewhere/fast";
/// The WAL segment that the backups need, of two chunks.
pub(crate) const SEGMENT: &str = "000000020000000000000012";
/// Bytes of a WAL segment.
pub(crate) const SEGMENT_BYTES: usize = 2 * CHUNK;
/// A history file of the archive.
pub(crate) const HISTORY: &str = "00000002.history";
/// What it says.
pub(crate) const HISTORY_TEXT: &[u8] = b"1\t0/2300028\tno recovery target specified\n";
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

/// The file that both backups have, and that the second takes over from the first.
pub(crate) const SAME: &[u8] = b"PG_VERSION";
/// The file that lies in the manifest.
pub(crate) const CONTROL: &[u8] = b"global/pg_control";
/// The file with a map, of which some grains change.
pub(crate) const MAPPED: &[u8] = b"base/5/16384";
/// The file with an index.
pub(crate) const HUGE: &[u8] = b"base/5/16500";

/// Small files of the incremental backup, whose extents are in the manifest: path and content. The first is the full's, too.
pub(crate) fn small() -> Vec<(&'static [u8], Vec<u8>)> {
    vec![
        (SAME, b"15\n".to_vec()),
        (b"base/5/16384_fsm", Vec::new()),
        (b"base/5/16390", rows(9, SLOT + 3 * GRAIN + 17)),
        // as large as a file without a map can be; it does not fit into one chunk with what is before it
        (b"base/5/16391", rows(10, 8 * SLOT)),
        (b"base/5/na\xffme", b"not UTF-8".to_vec()),
        (b"base/5/noise", noise(5000)),
        (b"pg_tblspc/16400/PG_15_202209061/5/16401", rows(7, 3 * GRAIN)),
        (b"postgresql.auto.conf", b"work_mem = '64MB'\n".to_vec()),
        (b"postgresql.conf", b"port = 5432".to_vec()),
    ]
}

/// `global/pg_control` of backup `number`.
pub(crate) fn control(number: u64) -> Vec<u8> {
    rows(80 + number, 8192)
}

/// The file with a map as the full backup found it: a chunk of eight slots, and one of the rest.
pub(crate) fn mapped_before() -> Vec<u8> {
    rows(1, 9 * SLOT + 11)
}

/// Where in it grains changed, up to the incremental backup.
pub(crate) const CHANGED: [(usize, usize); 2] = [(SLOT + GRAIN, 2 * GRAIN), (5 * SLOT + 15 * GRAIN, GRAIN)];

/// The grains that changed, one behind the other.
pub(crate) fn changed() -> Vec<u8> {
    rows(2, 3 * GRAIN)
}

/// The file with a map as the incremental backup found it.
pub(crate) fn mapped() -> Vec<u8> {
    let (mut bytes, changed, mut at) = (mapped_before(), changed(), 0);
    for (from, len) in CHANGED {
        bytes[from..from + len].copy_from_slice(&changed[at..at + len]);
        at += len;
    }
    bytes
}

/// What the file with an index consists of: this, one chunk, over and over.
pub(crate) fn huge_run() -> Vec<u8> {
    rows(3, CHUNK)
}

/// The file of the encrypted repository, of two slots and a bit.
pub(crate) fn hidden() -> Vec<u8> {
    rows(5, 2 * SLOT + 100)
}

/// The WAL segment, with a header that PostgreSQL 15 would have written.
pub(crate) fn segment() -> Vec<u8> {
    let mut bytes = rows(4, CHUNK + 2 * GRAIN + 1);
    bytes.resize(SEGMENT_BYTES, 0);
    bytes[..2].copy_from_slice(&0xd110u16.to_le_bytes());
    bytes[2..4].copy_from_slice(&2u16.to_le_bytes());
    bytes[4..8].copy_from_slice(&2u32.to_le_bytes());
    bytes[8..16].copy_from_slice(&0x240_0000u64.to_le_bytes());
    bytes[16..24].fill(0);
    bytes[24..32].copy_from_slice(&SYSTEM_ID.to_le_bytes());
    bytes[32..36].copy_from_slice(&(SEGMENT_BYTES as u32).to_le_bytes());
    bytes[36..40].copy_from_slice(&8192u32.to_le_bytes());
    bytes
}
