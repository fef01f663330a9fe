//! The majors of PostgreSQL that are supported, and what differs between them.

use std::fmt;

/// A supported major version, 13 to 18.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Major(u8);

/// What one major fixes for its whole life.
struct Facts {
    major: u8,
    control_version: u32,
    catalog_version: u32,
    wal_magic: u16,
}

const fn facts(major: u8, control_version: u32, catalog_version: u32, wal_magic: u16) -> Facts {
    Facts { major, control_version, catalog_version, wal_magic }
}

/// Read from running servers of each major: `pg_control_system()` and the first page of a segment.
const FACTS: [Facts; 6] = [
    facts(13, 1300, 202_007_201, 0xD106),
    facts(14, 1300, 202_107_181, 0xD10D),
    facts(15, 1300, 202_209_061, 0xD110),
    facts(16, 1300, 202_307_071, 0xD113),
    facts(17, 1700, 202_406_281, 0xD116),
    facts(18, 1800, 202_506_291, 0xD118),
];

/// A version that is not supported, or is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VersionError {
    /// a release outside the supported range
    #[error("PostgreSQL {major} is not supported, only {} to {} are", Major::FIRST, Major::LAST)]
    Major {
        /// the major version found
        major: u32,
    },
    /// a catalog of no release: a beta, or a fork
    #[error(
        "catalog version {catalog_version} belongs to no release of PostgreSQL {} to {}",
        Major::FIRST,
        Major::LAST
    )]
    Catalog {
        /// the catalog version found
        catalog_version: u32,
    },
    /// the file `PG_VERSION` holds something else than a version
    #[error("PG_VERSION holds \"{text}\", not a major version")]
    File {
        /// its first bytes
        text: String,
    },
    /// not the name of a version's directory in a tablespace
    #[error("\"{name}\" is not a tablespace's version directory, which reads like PG_15_202209061")]
    TablespaceDirectory {
        /// the name found
        name: String,
    },
}

impl Major {
    /// The oldest supported.
    pub const FIRST: Self = Self(13);
    /// The newest supported.
    pub const LAST: Self = Self(18);

    /// Every supported major, oldest first.
    pub fn all() -> impl Iterator<Item = Self> {
        FACTS.iter().map(|facts| Self(facts.major))
    }

    /// From the number people use: 15.
    pub fn new(major: u32) -> Result<Self, VersionError> {
        Self::all().find(|known| known.number() == major).ok_or(VersionError::Major { major })
    }

    /// From `server_version_num`: 150014 is 15.
    pub fn from_server_version_num(version_num: u32) -> Result<Self, VersionError> {
        Self::new(version_num / 10_000)
    }

    /// From pg_control's catalog version; a beta's or a fork's is refused.
    pub fn from_catalog_version(catalog_version: u32) -> Result<Self, VersionError> {
        let found = FACTS.iter().find(|facts| facts.catalog_version == catalog_version);
        found.map(|facts| Self(facts.major)).ok_or(VersionError::Catalog { catalog_version })
    }

    /// From the contents of the file `PG_VERSION`.
    pub fn from_pg_version_file(contents: &[u8]) -> Result<Self, VersionError> {
        let text = std::str::from_utf8(contents).ok().map(str::trim_ascii_end);
        match text.filter(|text| text.bytes().all(|b| b.is_ascii_digit())).and_then(|text| text.parse().ok()) {
            Some(major) => Self::new(major),
            None => {
                let shown = String::from_utf8_lossy(&contents[..contents.len().min(32)]);
                Err(VersionError::File { text: shown.trim_end().to_owned() })
            }
        }
    }

    /// From the magic number of a WAL page, if it is one of a supported major.
    pub fn from_wal_magic(magic: u16) -> Option<Self> {
        FACTS.iter().find(|facts| facts.wal_magic == magic).map(|facts| Self(facts.major))
    }

    /// The number people use: 15.
    pub fn number(self) -> u32 {
        self.0.into()
    }

    /// The magic number at the start of every WAL page.
    pub fn wal_magic(self) -> u16 {
        self.facts().wal_magic
    }

    /// The version of the system catalogs.
    pub fn catalog_version(self) -> u32 {
        self.facts().catalog_version
    }

    /// The version of pg_control's layout.
    pub fn control_version(self) -> u32 {
        self.facts().control_version
    }

    /// The directory of this version inside every tablespace.
    pub fn tablespace_directory(self) -> TablespaceDirectory {
        TablespaceDirectory { major: self.number(), catalog_version: self.catalog_version() }
    }

    /// The statement that begins a backup; `$1` is the label (text), `$2` whether to checkpoint at once (boolean).
    /// One row, one column `lsn`: the start, as text.
    pub fn start_backup_sql(self) -> &'static str {
        if self.0 < 15 {
            "SELECT pg_catalog.pg_start_backup($1, $2, false)::text AS lsn"
        } else {
            "SELECT pg_catalog.pg_backup_start($1, $2)::text AS lsn"
        }
    }

    /// The statement that ends it, in the same session; `$1` is whether the server is to wait for the archive (boolean).
    /// One row: `lsn`, the stop, as text; `labelfile` and `spcmapfile`, to be stored byte for byte.
    pub fn stop_backup_sql(self) -> &'static str {
        if self.0 < 15 {
            "SELECT lsn::text, labelfile, spcmapfile FROM pg_catalog.pg_stop_backup(false, $1)"
        } else {
            "SELECT lsn::text, labelfile, spcmapfile FROM pg_catalog.pg_backup_stop($1)"
        }
    }

    fn facts(self) -> &'static Facts {
        // a Major is only ever built from this table, whose majors follow one another
        &FACTS[usize::from(self.0 - Self::FIRST.0)]
    }
}

impl fmt::Display for Major {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// The name of a version's directory inside a tablespace: `PG_15_202209061`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TablespaceDirectory {
    /// the major version, which may be one that is not supported
    pub major: u32,
    /// its catalog version
    pub catalog_version: u32,
}

impl TablespaceDirectory {
    /// Reads such a name, of any release.
    pub fn parse(name: &str) -> Result<Self, VersionError> {
        let number = |digits: &str| match digits.as_bytes() {
            [b'1'..=b'9', rest @ ..] if rest.iter().all(u8::is_ascii_digit) => digits.parse().ok(),
            _ => None,
        };
        name.strip_prefix("PG_")
            .and_then(|rest| rest.split_once('_'))
            .and_then(|(major, catalog)| Some(Self { major: number(major)?, catalog_version: number(catalog)? }))
            .ok_or_else(|| VersionError::TablespaceDirectory { name: name.to_owned() })
    }
}

impl fmt::Display for TablespaceDirectory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PG_{}_{}", self.major, self.catalog_version)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_table_is_in_order_and_found_by_every_key() {
        assert_eq!(Major::all().map(Major::number).collect::<Vec<_>>(), [13, 14, 15, 16, 17, 18]);
        for major in Major::all() {
            assert_eq!(Major::new(major.number()), Ok(major));
            assert_eq!(Major::from_catalog_version(major.catalog_version()), Ok(major));
            assert_eq!(Major::from_wal_magic(major.wal_magic()), Some(major));
            assert_eq!(Major::from_server_version_num(major.number() * 10_000 + 7), Ok(major));
            assert_eq!(Major::from_pg_version_file(format!("{major}\n").as_bytes()), Ok(major));
        }
    }

    #[test]
    fn refuses_other_versions_by_name() {
        let text = |result: Result<Major, VersionError>| result.unwrap_err().to_string();
        assert_eq!(text(Major::new(12)), "PostgreSQL 12 is not supported, only 13 to 18 are");
        assert_eq!(text(Major::from_pg_version_file(b"9.6\n")), "PG_VERSION holds \"9.6\", not a major version");
        assert_eq!(text(Major::from_pg_version_file(b"")), "PG_VERSION holds \"\", not a major version");
        assert_eq!(
            text(Major::from_catalog_version(1)),
            "catalog version 1 belongs to no release of PostgreSQL 13 to 18"
        );
    }

    #[test]
    fn reads_the_directory_of_a_tablespace() {
        assert_eq!(TablespaceDirectory::parse("PG_15_202209061"), Ok(Major::new(15).unwrap().tablespace_directory()));
        assert_eq!(Major::new(18).unwrap().tablespace_directory().to_string(), "PG_18_202506291");
        for name in ["PG_15", "PG_15_", "PG__1", "pg_15_1", "PG_015_1", "PG_15_1_2", "PG_15_99999999999", "PG_+5_1"] {
            assert!(TablespaceDirectory::parse(name).is_err(), "{name}");
        }
    }

    proptest! {
        #[test]
        fn any_input_is_answered(name in ".*", contents: Vec<u8>) {
            let _ = TablespaceDirectory::parse(&name);
            let _ = Major::from_pg_version_file(&contents);
        }
    }
}
