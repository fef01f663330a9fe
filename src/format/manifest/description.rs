//! What a backup is, as its manifest says it in JSON.

use serde::{Deserialize, Serialize};

use crate::postgres::{BackupKind, Layout, Major, VersionError};

/// The PostgreSQL cluster a backup was taken of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Database {
    /// number of this system identifier in the stanza's history, from 1
    pub id: u32,
    /// major version
    pub version: u32,
    /// given by initdb
    pub system_id: u64,
    /// version of the system catalogs
    pub catalog_version: u32,
    /// version of pg_control
    pub control_version: u32,
    /// BLCKSZ in bytes
    pub page_size: u32,
    /// bytes of a full relation segment
    pub segment_size: u64,
    /// bytes of a WAL page
    pub wal_page_size: u32,
    /// bytes of a WAL segment
    pub wal_segment_size: u64,
    /// pages carry checksums
    pub checksums: bool,
}

impl Database {
    /// How the files of the cluster are told apart.
    pub fn layout(&self) -> std::result::Result<Layout, VersionError> {
        let pages = self.segment_size / u64::from(self.page_size.max(1));
        Ok(Layout {
            tablespace_directory: Major::new(self.version)?.tablespace_directory(),
            // a segment with more pages than a relation can have is the only one
            relation_segment_pages: u32::try_from(pages).unwrap_or(u32::MAX),
        })
    }
}

/// A tablespace: its oid and the absolute path of its directory on the source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tablespace {
    /// oid of the tablespace
    pub oid: u32,
    /// its name; unknown in backups by pgcairn before it noted names
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// where the source had it
    pub path: String,
}

/// A database of the cluster: its oid and its name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamedDatabase {
    /// oid of the database, which names its directories
    pub oid: u32,
    /// its name
    pub name: String,
}

/// Pages of one file that failed their checksum while the backup read them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageErrors {
    /// path in the data directory
    pub file: String,
    /// block numbers in that file
    pub blocks: Vec<u64>,
}

/// Which files a backup read: their times say something about those of another backup only if host, mark and data directory
/// are the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Source {
    /// true: those of a standby
    pub standby: bool,
    /// name of the machine
    pub host: String,
    /// inode and time of the data directory's PG_VERSION, others when the directory was made anew; `stream` where the server sent
    /// the files
    pub mark: String,
}

/// Sizes of a backup in bytes, and its number of files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Sizes {
    /// sum of the files' lengths
    pub database: u64,
    /// sum of the lengths of files that were read (not taken over unread from the parent)
    pub read: u64,
    /// bytes of packs this backup wrote
    pub stored_new: u64,
    /// bytes of packs this backup needs, whoever wrote them: of each pack its weight, at most its length
    pub stored_all: u64,
    /// number of files
    pub files: u64,
}

/// What a backup is, apart from its files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Description {
    /// the backup's label
    pub label: String,
    /// full, diff or incr
    #[serde(rename = "type")]
    pub kind: BackupKind,
    /// label of the parent
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prior: Option<String>,
    /// version of pgcairn that wrote it
    pub pgcairn: String,
    /// seconds since 1970, when the copying began
    pub start_time: i64,
    /// seconds since 1970, when pg_backup_stop had answered
    pub stop_time: i64,
    /// where recovery starts
    pub start_lsn: String,
    /// where the copy is consistent
    pub stop_lsn: String,
    /// timeline of both
    pub timeline: u32,
    /// first WAL segment that consistency needs
    pub wal_start: String,
    /// last WAL segment that consistency needs
    pub wal_stop: String,
    /// true: these segments are among the files (`pg_wal/...`); false: they are in the archive
    pub wal_stored: bool,
    /// the cluster
    pub database: Database,
    /// the data directory on the source
    pub data_directory: String,
    /// which files were read; unknown in backups by pgcairn before it knew standbys
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<Source>,
    /// user name that owned it
    pub owner: String,
    /// group name that owned it
    pub group: String,
    /// name of the role that initdb made
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub superuser: Option<String>,
    /// what pg_backup_stop returned, byte for byte
    pub backup_label: String,
    /// what pg_backup_stop returned, byte for byte; empty without tablespaces
    pub tablespace_map: String,
    /// tablespaces by oid
    pub tablespaces: Vec<Tablespace>,
    /// databases by oid, as they were when the backup ended; empty in backups by pgcairn before it noted names
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub databases: Vec<NamedDatabase>,
    /// pages that failed their checksum
    pub page_errors: Vec<PageErrors>,
    /// what it weighs
    pub sizes: Sizes,
}
