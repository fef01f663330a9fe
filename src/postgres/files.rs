//! What each file under PGDATA is: to be kept, kept empty, left out, or checked page by page.
//!
//! The rules are those of PostgreSQL's own base backup (`basebackup.c`) and of `pg_checksums`.

use std::collections::HashSet;
use std::path::{Component, Path, PathBuf};

use super::version::TablespaceDirectory;

/// The tablespace `pg_default`, whose files lie in `base/`.
pub const DEFAULT_TABLESPACE: u32 = 1663;
/// The tablespace `pg_global`, whose files lie in `global/`.
pub const GLOBAL_TABLESPACE: u32 = 1664;
/// Its presence makes a server recover to its target.
pub const RECOVERY_SIGNAL: &str = "recovery.signal";
/// Its presence makes a server recover without an end.
pub const STANDBY_SIGNAL: &str = "standby.signal";
/// The file that ALTER SYSTEM writes, read after every other.
pub const AUTO_CONF: &str = "postgresql.auto.conf";
/// Where the control file lies.
pub const CONTROL_FILE: &str = "global/pg_control";

/// Emptied at every start, so kept without their contents.
const EMPTIED: [&str; 7] =
    ["pg_stat_tmp", "pg_replslot", "pg_dynshmem", "pg_notify", "pg_serial", "pg_snapshots", "pg_subtrans"];
/// WAL goes its own way, but the server wants to find these.
const WAL_DIRECTORIES: [&str; 3] = ["pg_wal", "pg_wal/archive_status", "pg_wal/summaries"];
/// Files in PGDATA itself that belong to the running server, or to another backup.
const LEFT_OUT: [&str; 10] = [
    "postgresql.auto.conf.tmp",
    "current_logfiles.tmp",
    "backup_label",
    "backup_label.old",
    "tablespace_map",
    "backup_manifest",
    "postmaster.pid",
    "postmaster.opts",
    RECOVERY_SIGNAL,
    STANDBY_SIGNAL,
];

/// Why a file is not in a backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SkipReason {
    /// in a directory that is kept empty
    InEmptiedDirectory,
    /// belongs to the running server, or to another backup
    OfRunningServer,
    /// a cache of system catalogs, rebuilt at start: `pg_internal.init`
    RelationCache,
    /// what a query spilled: `pgsql_tmp`
    QuerySpill,
    /// a temporary relation: `t3_16384`
    TemporaryRelation,
    /// inside a tablespace, but of another version of PostgreSQL
    OfOtherVersion,
}

/// A relation's fork.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fork {
    /// the rows or the index
    Main,
    /// the free space map
    FreeSpace,
    /// the visibility map
    Visibility,
    /// what an unlogged relation is reset to; only these have one
    Init,
}

/// One file of a relation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RelationFile {
    /// the tablespace's oid
    pub tablespace: u32,
    /// the database's oid, 0 in `global/`
    pub database: u32,
    /// the relation's file number
    pub number: u32,
    /// which fork
    pub fork: Fork,
    /// the file's place in the fork, 0 for the one without a suffix
    pub segment: u32,
    /// the first block of the file, counted from the start of the fork; its pages' checksums depend on it
    pub first_block: u32,
}

/// What a path is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileClass {
    /// a directory to be kept, without its contents
    KeepEmptyDirectory,
    /// to be left out, with everything below
    Skip(SkipReason),
    /// a relation's file; every page of it carries a checksum, if the cluster has them
    Relation(RelationFile),
    /// `global/pg_control`: to be read until its CRC is right, and copied last
    Control,
    /// `pg_tblspc/<oid>`: a link to a tablespace
    TablespaceLink {
        /// the tablespace's oid
        oid: u32,
    },
    /// anything else: to be kept as it is
    Plain,
}

/// What must be known of a cluster to tell its files apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// the directory of its version in every tablespace
    pub tablespace_directory: TablespaceDirectory,
    /// the pages of a full file of a relation, from pg_control
    pub relation_segment_pages: u32,
}

impl Layout {
    /// Tells what `path` is: relative to PGDATA, with `/` between names, tablespaces under `pg_tblspc/<oid>/`.
    pub fn classify(&self, path: &[u8]) -> FileClass {
        let Ok(path) = std::str::from_utf8(path) else {
            return FileClass::Plain;
        };
        let (directory, name) = path.rsplit_once('/').unwrap_or(("", path));
        if let Some(class) = emptied(path).or_else(|| left_out(directory, name)) {
            return class;
        }
        if path == CONTROL_FILE {
            return FileClass::Control;
        }
        let mut names = path.split('/');
        match (names.next(), names.next(), names.next(), names.next(), names.next(), names.next()) {
            (Some("base"), Some(db), Some(file), None, ..) => self.relation(DEFAULT_TABLESPACE, oid(db), file),
            (Some("global"), Some(file), None, ..) => self.relation(GLOBAL_TABLESPACE, Some(0), file),
            (Some("pg_tblspc"), Some(tablespace), below, db, file, None) => match (oid(tablespace), below) {
                (Some(oid), None) => FileClass::TablespaceLink { oid },
                (Some(space), Some(version)) => self.in_tablespace(space, version, db, file),
                (None, _) => FileClass::Plain,
            },
            _ => FileClass::Plain,
        }
    }

    /// The directory of a database in a tablespace, relative to PGDATA.
    pub fn database_directory(&self, tablespace: u32, database: u32) -> String {
        match tablespace {
            DEFAULT_TABLESPACE => format!("base/{database}"),
            tablespace => format!("pg_tblspc/{tablespace}/{}/{database}", self.tablespace_directory),
        }
    }

    fn in_tablespace(&self, tablespace: u32, version: &str, db: Option<&str>, file: Option<&str>) -> FileClass {
        if TablespaceDirectory::parse(version) != Ok(self.tablespace_directory) {
            return FileClass::Skip(SkipReason::OfOtherVersion);
        }
        match (db, file) {
            (Some(db), Some(file)) => self.relation(tablespace, oid(db), file),
            _ => FileClass::Plain,
        }
    }

    fn relation(&self, tablespace: u32, database: Option<u32>, name: &str) -> FileClass {
        let Some(database) = database else {
            return FileClass::Plain;
        };
        if is_temporary_relation(name) {
            return FileClass::Skip(SkipReason::TemporaryRelation);
        }
        let Some(RelationName { number, fork, segment }) = RelationName::parse(name) else {
            return FileClass::Plain;
        };
        // no relation has more than 2^32 pages: a name past that is somebody else's file
        match segment.checked_mul(self.relation_segment_pages) {
            Some(first_block) => {
                FileClass::Relation(RelationFile { tablespace, database, number, fork, segment, first_block })
            }
            None => FileClass::Plain,
        }
    }
}

/// Directories kept empty, and what lies in them.
fn emptied(path: &str) -> Option<FileClass> {
    if WAL_DIRECTORIES.contains(&path) || EMPTIED.contains(&path) {
        return Some(FileClass::KeepEmptyDirectory);
    }
    let (top, _) = path.split_once('/')?;
    (top == "pg_wal" || EMPTIED.contains(&top)).then_some(FileClass::Skip(SkipReason::InEmptiedDirectory))
}

fn left_out(directory: &str, name: &str) -> Option<FileClass> {
    if directory.is_empty() && LEFT_OUT.contains(&name) {
        Some(FileClass::Skip(SkipReason::OfRunningServer))
    } else if name.starts_with("pg_internal.init") {
        Some(FileClass::Skip(SkipReason::RelationCache))
    } else if name.starts_with("pgsql_tmp") || directory.split('/').any(|above| above.starts_with("pgsql_tmp")) {
        Some(FileClass::Skip(SkipReason::QuerySpill))
    } else {
        None
    }
}

/// A number as PostgreSQL writes it: decimal, no leading zero.
fn decimal(digits: &str) -> Option<u32> {
    match digits.as_bytes() {
        [b'1'..=b'9', rest @ ..] if rest.iter().all(u8::is_ascii_digit) => digits.parse().ok(),
        _ => None,
    }
}

fn oid(name: &str) -> Option<u32> {
    decimal(name)
}

/// `<number>[_fork][.segment]`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct RelationName {
    number: u32,
    fork: Fork,
    segment: u32,
}

impl RelationName {
    fn parse(name: &str) -> Option<Self> {
        let (stem, segment) = match name.split_once('.') {
            Some((stem, digits)) => (stem, decimal(digits)?),
            None => (name, 0),
        };
        let (digits, fork) = match stem.split_once('_') {
            None => (stem, Fork::Main),
            Some((digits, "fsm")) => (digits, Fork::FreeSpace),
            Some((digits, "vm")) => (digits, Fork::Visibility),
            Some((digits, "init")) => (digits, Fork::Init),
            Some(_) => return None,
        };
        Some(Self { number: decimal(digits)?, fork, segment })
    }
}

/// `t<backend>_<number>[_fork][.segment]`
fn is_temporary_relation(name: &str) -> bool {
    let parts = name.strip_prefix('t').and_then(|rest| rest.split_once('_'));
    let backend = |digits: &str| !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    parts.is_some_and(|(digits, relation)| backend(digits) && RelationName::parse(relation).is_some())
}

/// The unlogged relations of one directory: every fork of them but [`Fork::Init`] is left out of a backup,
/// since recovery makes them anew from that one.
#[derive(Clone, Debug, Default)]
pub struct UnloggedRelations {
    numbers: HashSet<u32>,
}

impl UnloggedRelations {
    /// From the names of all the files of one database's directory.
    pub fn among<'a>(names: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let parsed = names.into_iter().filter_map(relation_name);
        Self { numbers: parsed.filter(|name| name.fork == Fork::Init).map(|name| name.number).collect() }
    }

    /// Whether the file of this name in that directory is to be left out.
    pub fn drops(&self, name: &[u8]) -> bool {
        relation_name(name).is_some_and(|name| name.fork != Fork::Init && self.numbers.contains(&name.number))
    }
}

fn relation_name(name: &[u8]) -> Option<RelationName> {
    RelationName::parse(std::str::from_utf8(name).ok()?)
}

/// Returns where a link in `pg_tblspc` of `data_directory` leads. A relative link counts from the
/// directory in which it lies, and becomes a path without `..`; no symbolic link on the way is
/// followed.
pub fn tablespace_place(data_directory: &Path, link: &Path) -> PathBuf {
    if link.is_absolute() {
        return link.to_owned();
    }
    let mut place = PathBuf::new();
    for part in data_directory.join("pg_tblspc").join(link).components() {
        match part {
            Component::ParentDir => _ = place.pop(),
            Component::CurDir => {}
            part => place.push(part),
        }
    }
    place
}

#[cfg(test)]
mod tests;
