//! What PostgreSQL defines, for majors 13 to 18. No I/O: pure functions over bytes and strings.
//!
//! | module | knows |
//! |---|---|
//! | [`version`] | the majors, and what differs between them |
//! | [`lsn`] | positions in the WAL, timelines |
//! | [`control`] | `pg_control`: what a cluster is, where its recovery starts |
//! | [`wal`] | names of WAL files, a segment's header and records, timeline histories, which WAL there is |
//! | [`timestamp`] | `timestamptz` |
//! | [`page`] | a page's header and checksum |
//! | [`files`] | what each file under PGDATA is |
//! | [`backup_label`] | `backup_label` and `tablespace_map` |
//! | [`conf`] | writing settings |
//! | [`conninfo`] | quoting in connection strings |
//! | [`session`] | settings that our own sessions begin with |
//! | [`manifest`] | PostgreSQL's own `backup_manifest` |
//! | [`tar`] | the archives in which a server sends a base backup |
//! | [`label`] | the labels of our backups, by pgBackRest's rule |
//!
//! Every parser is total: any bytes give a value or a typed error, never a panic.

pub mod backup_label;
pub mod conf;
pub mod conninfo;
pub mod control;
pub mod files;
pub mod label;
pub mod lsn;
pub mod manifest;
pub mod page;
pub mod session;
pub mod tar;
pub mod timestamp;
pub mod version;
pub mod wal;

pub use backup_label::{BackupLabel, BackupLabelError, BackupSource, TablespaceLink, TablespaceMapError};
pub use control::{Checkpoint, ClusterState, ControlError, ControlFile, WalLevel};
pub use files::{
    AUTO_CONF, CONTROL_FILE, FileClass, Fork, Layout, RECOVERY_SIGNAL, RelationFile, STANDBY_SIGNAL, SkipReason,
    UnloggedRelations, tablespace_place,
};
pub use label::{BackupKind, Label, LabelError};
pub use lsn::{Lsn, LsnError, Timeline, TimelineError};
pub use page::Verdict;
pub use timestamp::TimestampTz;
pub use version::{Major, TablespaceDirectory, VersionError};
pub use wal::header::{LongPageHeader, SegmentError, WalIdentity};
pub use wal::history::{Ancestor, HistoryError, TimelineHistory};
pub use wal::{SegmentName, SegmentSize, SegmentSizeError, WalName, WalNameError};
