//! `global/pg_control`: what a cluster is, and where its recovery starts.
//!
//! The file is one C structure of little-endian, naturally aligned fields, then its CRC32C, then zeros up to 8 KiB.
//! The fields below keep their offsets from 13 to 18: 17 put `wal_level` of the checkpoint into what was padding,
//! and 18 put one byte before the nonce, which moves nothing but the CRC.
//! Only 64-bit little-endian clusters are read; of any other the version number reads as nonsense and is refused.

use super::lsn::{Lsn, Timeline};
use super::version::{Major, VersionError};
use super::wal::{SegmentSize, SegmentSizeError};

/// The file's size, in bytes.
pub const CONTROL_FILE_BYTES: usize = 8192;

/// What was going on when pg_control was last written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClusterState {
    /// being started
    StartingUp,
    /// shut down cleanly
    ShutDown,
    /// a standby, shut down cleanly
    ShutDownInRecovery,
    /// being shut down
    ShuttingDown,
    /// replaying WAL after a crash
    InCrashRecovery,
    /// a standby, or replaying from an archive
    InArchiveRecovery,
    /// running, or crashed while it was
    InProduction,
}

/// How much the server writes to its WAL.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum WalLevel {
    /// not enough for a backup of a running server
    Minimal,
    /// enough for archiving and standbys
    Replica,
    /// and for logical decoding
    Logical,
}

/// The last checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// where its record lies
    pub lsn: Lsn,
    /// where replay from it starts
    pub redo: Lsn,
    /// its timeline
    pub timeline: Timeline,
    /// the timeline before it; another only in the record that began a timeline
    pub previous_timeline: Timeline,
    /// whether pages were written in full to the WAL after it
    pub full_page_writes: bool,
    /// when it was made, in seconds since 1970
    pub time_s: i64,
}

/// What pg_control says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlFile {
    /// chosen at initdb; every WAL segment carries it
    pub system_identifier: u64,
    /// the version of this layout
    pub control_version: u32,
    /// the version of the catalogs
    pub catalog_version: u32,
    /// what was going on
    pub state: ClusterState,
    /// the last checkpoint
    pub checkpoint: Checkpoint,
    /// a server in recovery must replay up to here before it is consistent; invalid when it is not in recovery
    pub min_recovery_point: Lsn,
    /// the timeline of that; `None` when there is none
    pub min_recovery_timeline: Option<Timeline>,
    /// the start of the backup this cluster is being recovered from
    pub backup_start: Lsn,
    /// the end of that backup, when it was taken from a standby
    pub backup_end: Lsn,
    /// whether replay must meet the record that ends a backup
    pub backup_end_required: bool,
    /// the setting `wal_level`
    pub wal_level: WalLevel,
    /// the setting `max_connections`
    pub max_connections: i32,
    /// the setting `max_worker_processes`
    pub max_worker_processes: i32,
    /// the setting `max_wal_senders`
    pub max_wal_senders: i32,
    /// the setting `max_prepared_transactions`
    pub max_prepared_transactions: i32,
    /// the setting `max_locks_per_transaction`
    pub max_locks_per_transaction: i32,
    /// a page, in bytes
    pub page_bytes: u32,
    /// a file of a large relation, in pages
    pub relation_segment_pages: u32,
    /// a WAL page, in bytes
    pub wal_page_bytes: u32,
    /// a WAL segment
    pub wal_segment_size: SegmentSize,
    /// 0 without page checksums, 1 with
    pub data_checksum_version: u32,
}

/// Bytes that are no sound pg_control of a supported major.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// the file was cut
    #[error("pg_control has {bytes} bytes, at least {needed} are needed")]
    Short {
        /// its size
        bytes: usize,
        /// the size of the structure
        needed: usize,
    },
    /// another release, or another byte order
    #[error("pg_control has layout version {found}, only 1300, 1700 and 1800 are supported")]
    Layout {
        /// the version found
        found: u32,
    },
    /// read while it was being written (read it again), or damaged
    #[error("pg_control has CRC {computed:08x}, but {stored:08x} is stored in it")]
    Crc {
        /// the CRC in the file
        stored: u32,
        /// the CRC of its fields
        computed: u32,
    },
    /// a beta's or a fork's catalogs
    #[error("pg_control is of an unsupported version: {0}")]
    Version(VersionError),
    /// catalogs of one major in the layout of another
    #[error("pg_control has layout version {found}, but PostgreSQL {major} has {}", major.control_version())]
    LayoutOfMajor {
        /// the major the catalogs belong to
        major: Major,
        /// the version found
        found: u32,
    },
    /// a field has a value it cannot have
    #[error("pg_control has {field} {value}")]
    Field {
        /// the field
        field: &'static str,
        /// its value
        value: u64,
    },
    /// a WAL segment size that cannot be
    #[error("pg_control has a bad WAL segment size: {0}")]
    SegmentSize(SegmentSizeError),
}

impl ControlFile {
    /// Reads the bytes of `global/pg_control`; what follows the structure is not looked at.
    ///
    /// On [`ControlError::Crc`] read the file again: the server may have been writing it.
    pub fn parse(bytes: &[u8]) -> Result<Self, ControlError> {
        let fields = checked(bytes)?;
        let control_version = fields.u32(8);
        let catalog_version = fields.u32(12);
        let major = Major::from_catalog_version(catalog_version).map_err(ControlError::Version)?;
        if major.control_version() != control_version {
            return Err(ControlError::LayoutOfMajor { major, found: control_version });
        }
        Ok(Self {
            system_identifier: fields.u64(0),
            control_version,
            catalog_version,
            state: fields.state()?,
            checkpoint: fields.checkpoint()?,
            min_recovery_point: Lsn(fields.u64(136)),
            min_recovery_timeline: Some(fields.u32(144)).filter(|&id| id > 0).map(Timeline),
            backup_start: Lsn(fields.u64(152)),
            backup_end: Lsn(fields.u64(160)),
            backup_end_required: fields.flag("backupEndRequired", 168)?,
            wal_level: fields.wal_level()?,
            max_connections: fields.i32(180),
            max_worker_processes: fields.i32(184),
            max_wal_senders: fields.i32(188),
            max_prepared_transactions: fields.i32(192),
            max_locks_per_transaction: fields.i32(196),
            page_bytes: fields.page_bytes("a page size of", 216, 32 << 10)?,
            relation_segment_pages: fields.at_least_one("a relation segment size of", 220)?,
            wal_page_bytes: fields.page_bytes("a WAL page size of", 224, 64 << 10)?,
            wal_segment_size: SegmentSize::new(fields.u32(228).into()).map_err(ControlError::SegmentSize)?,
            data_checksum_version: fields.u32(252),
        })
    }

    /// The major version of the cluster.
    pub fn major(&self) -> Result<Major, VersionError> {
        Major::from_catalog_version(self.catalog_version)
    }

    /// Whether pages carry checksums.
    pub fn has_page_checksums(&self) -> bool {
        self.data_checksum_version != 0
    }
}

/// The structure's bytes, of a known layout and with the right CRC.
fn checked(bytes: &[u8]) -> Result<Fields<'_>, ControlError> {
    let short = |needed| ControlError::Short { bytes: bytes.len(), needed };
    let layout = bytes.get(8..12).ok_or(short(12))?;
    let crc_at = match u32::from_le_bytes([layout[0], layout[1], layout[2], layout[3]]) {
        1300 | 1700 => 288,
        1800 => 292,
        found => return Err(ControlError::Layout { found }),
    };
    let structure = Fields(bytes.get(..crc_at + 4).ok_or(short(crc_at + 4))?);
    let (stored, computed) = (structure.u32(crc_at), crc32c::crc32c(&bytes[..crc_at]));
    if stored != computed {
        return Err(ControlError::Crc { stored, computed });
    }
    Ok(structure)
}

/// At least 292 bytes, which is past every offset used here.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn array<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut array = [0; N];
        array.copy_from_slice(&self.0[at..at + N]);
        array
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.array(at))
    }

    fn i32(&self, at: usize) -> i32 {
        i32::from_le_bytes(self.array(at))
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.array(at))
    }

    fn flag(&self, field: &'static str, at: usize) -> Result<bool, ControlError> {
        match self.0[at] {
            0 => Ok(false),
            1 => Ok(true),
            value => Err(ControlError::Field { field, value: value.into() }),
        }
    }

    fn at_least_one(&self, field: &'static str, at: usize) -> Result<u32, ControlError> {
        match self.u32(at) {
            0 => Err(ControlError::Field { field, value: 0 }),
            value => Ok(value),
        }
    }

    /// A power of two from 1 KiB to `max`: what PostgreSQL can be built with.
    fn page_bytes(&self, field: &'static str, at: usize, max: u32) -> Result<u32, ControlError> {
        let value = self.u32(at);
        if value.is_power_of_two() && (1024..=max).contains(&value) {
            return Ok(value);
        }
        Err(ControlError::Field { field, value: value.into() })
    }

    fn timeline(&self, field: &'static str, at: usize) -> Result<Timeline, ControlError> {
        self.at_least_one(field, at).map(Timeline)
    }

    fn state(&self) -> Result<ClusterState, ControlError> {
        Ok(match self.u32(16) {
            0 => ClusterState::StartingUp,
            1 => ClusterState::ShutDown,
            2 => ClusterState::ShutDownInRecovery,
            3 => ClusterState::ShuttingDown,
            4 => ClusterState::InCrashRecovery,
            5 => ClusterState::InArchiveRecovery,
            6 => ClusterState::InProduction,
            value => return Err(ControlError::Field { field: "state", value: value.into() }),
        })
    }

    fn wal_level(&self) -> Result<WalLevel, ControlError> {
        Ok(match self.u32(172) {
            0 => WalLevel::Minimal,
            1 => WalLevel::Replica,
            2 => WalLevel::Logical,
            value => return Err(ControlError::Field { field: "wal_level", value: value.into() }),
        })
    }

    fn checkpoint(&self) -> Result<Checkpoint, ControlError> {
        Ok(Checkpoint {
            lsn: Lsn(self.u64(32)),
            redo: Lsn(self.u64(40)),
            timeline: self.timeline("timeline", 48)?,
            previous_timeline: self.timeline("previous timeline", 52)?,
            full_page_writes: self.flag("full_page_writes", 56)?,
            time_s: i64::from_le_bytes(self.array(104)),
        })
    }
}

#[cfg(test)]
mod tests;
