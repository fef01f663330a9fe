//! Which cluster asks for WAL, or archives it: what its pg_control says, beside the `pg_wal` that a call names.

use std::io::Read;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::files;
use crate::format::info::ArchiveInfo;
use crate::format::manifest::Database;
use crate::postgres::{CONTROL_FILE, Major};

/// A cluster by its pg_control.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asking {
    /// its system identifier
    pub system_id: u64,
    /// its major version; `None` where the catalogs are of none that is known
    pub version: Option<u32>,
}

impl Asking {
    /// The cluster whose `pg_wal` holds `path`, which is absolute or below the data directory in which a server runs its
    /// commands; `None` if the path is in no data directory.
    pub fn of(path: &Path) -> Option<Self> {
        let wal = std::path::absolute(path).ok()?.parent()?.to_owned();
        Self::read(wal.parent()?).or_else(|| {
            // pg_wal may be a link, and the path may name what it leads to
            let here = std::env::current_dir().ok()?;
            let real = |path: PathBuf| path.canonicalize().ok();
            let is_ours = real(here.join("pg_wal"))? == real(wal)?;
            is_ours.then(|| Self::read(&here)).flatten()
        })
    }

    /// Reads the first fields of a data directory's pg_control. They never change, so they can be read while the server writes
    /// the file.
    pub fn read(data_directory: &Path) -> Option<Self> {
        let mut bytes = [0; 16];
        files::open_regular(&data_directory.join(CONTROL_FILE)).ok()?.read_exact(&mut bytes).ok()?;
        let (system_id, [.., a, b, c, d]) = (bytes.first_chunk::<8>()?, bytes);
        let version = Major::from_catalog_version(u32::from_le_bytes([a, b, c, d])).ok().map(Major::number);
        Some(Self { system_id: u64::from_le_bytes(*system_id), version })
    }

    /// Whether it is this cluster of a stanza.
    pub fn is(&self, database: &Database) -> bool {
        self.system_id == database.system_id && self.version.is_none_or(|version| version == database.version)
    }
}

impl ArchiveInfo {
    /// The clusters of the stanza that the one that asks can be, newest first: the stanza may have gone on with another one.
    /// Without a pg_control to tell, the cluster that the stanza is now.
    pub fn asked_for(&self, stanza: &str, asking: Option<&Asking>) -> Result<Vec<&Database>> {
        let Some(asking) = asking else { return Ok(vec![self.current()?]) };
        let found: Vec<&Database> = self.history.iter().rev().filter(|database| asking.is(database)).collect();
        if !found.is_empty() {
            return Ok(found);
        }
        let version = asking.version.map_or_else(|| "an unknown version".to_owned(), |version| version.to_string());
        let known: Vec<String> =
            self.history.iter().map(|of| format!("PostgreSQL {} with {}", of.version, of.system_id)).collect();
        Err(Error::new(format!(
            "the cluster that asks is PostgreSQL {version} with system identifier {}, stanza {stanza} is of {}",
            asking.system_id,
            known.join(", ")
        ))
        .hint("check --stanza in restore_command: WAL of another cluster cannot be replayed"))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_cluster_is_known_by_its_control_file() {
        let place = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(place.path().join("data/global")).unwrap();
        std::fs::create_dir_all(place.path().join("data/pg_wal")).unwrap();
        let path = place.path().join("data/pg_wal/RECOVERYXLOG");
        assert_eq!(Asking::of(&path), None);
        let control = [&7u64.to_le_bytes()[..], &1300u32.to_le_bytes(), &202_209_061u32.to_le_bytes(), &[0; 100]];
        std::fs::write(place.path().join("data").join(CONTROL_FILE), control.concat()).unwrap();
        let asking = Asking::of(&path).unwrap();
        assert_eq!(asking, Asking { system_id: 7, version: Some(15) });
        let of = |id, version, system_id| Database { id, version, system_id, ..crate::retention::tests::database() };
        let info = ArchiveInfo { history: vec![of(1, 15, 7), of(2, 16, 8), of(3, 15, 7)] };
        let ids = |asking| info.asked_for("main", asking).map(|found| found.iter().map(|of| of.id).collect::<Vec<_>>());
        assert_eq!(ids(Some(&asking)).unwrap(), [3, 1]);
        assert_eq!(ids(Some(&Asking { system_id: 8, version: Some(16) })).unwrap(), [2]);
        assert_eq!(ids(None).unwrap(), [3]);
        let error = ids(Some(&Asking { system_id: 8, version: Some(15) })).unwrap_err();
        assert!(error.to_string().contains("PostgreSQL 15 with system identifier 8"), "{error}");
    }
}
