//! What verbs know of PostgreSQL on this machine: how to reach a server, where the programs of a version are.

use std::path::{Path, PathBuf};
use std::process::Command;

use clap::{Args, ValueEnum};

use super::options::YesNo;
use crate::backup::rival::Checks;
use crate::error::{Error, Result};

/// How to reach the server.
#[derive(Debug, Args)]
pub(super) struct ServerOptions {
    /// The server, as a libpq conninfo string or URI; what it leaves out comes from PGHOST, PGPORT, PGUSER, ...
    #[arg(long, env = "PGCAIRN_PG", value_name = "CONNINFO", default_value = "")]
    pub(super) pg: String,
}

/// How the server's files are read.
#[derive(Debug, Args)]
pub(super) struct SourceOptions {
    /// How the server's files are read: files is from its data directory, on this machine; stream is over a replication
    /// connection, from anywhere, every byte of them
    #[arg(long, env = "PGCAIRN_SOURCE", value_name = "HOW", default_value = "files")]
    pub(super) source: SourceKind,
}

/// A way to the server's files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum SourceKind {
    Files,
    Stream,
}

/// Where a standby's primary is.
#[derive(Debug, Args)]
pub(super) struct PrimaryOptions {
    /// With a standby as the server: its primary, which is asked to end WAL segments
    #[arg(long, env = "PGCAIRN_PG_PRIMARY", value_name = "CONNINFO")]
    pub(super) pg_primary: Option<String>,
}

/// Which servers are refused.
#[derive(Debug, Args)]
pub(super) struct CheckOptions {
    /// Refuse a server with archive_mode = off where the stanza has a WAL archive: mostly it is a copy (y)
    #[arg(long, env = "PGCAIRN_ARCHIVE_MODE_CHECK", value_name = "y|n", default_value = "y")]
    archive_mode_check: YesNo,
    /// Refuse a server whose timeline a newer one of the archive left before what it has written: mostly it is the primary
    /// before a failover (y)
    #[arg(long, env = "PGCAIRN_TIMELINE_CHECK", value_name = "y|n", default_value = "y")]
    timeline_check: YesNo,
}

impl CheckOptions {
    pub(super) fn checks(&self) -> Checks {
        Checks { archive_mode: self.archive_mode_check == YesNo::Y, timeline: self.timeline_check == YesNo::Y }
    }
}

/// The directory of `major`'s programs: the one given, or found where distributions put it.
pub(super) fn programs(major: u32, given: Option<&Path>) -> Result<PathBuf> {
    let candidates: Vec<PathBuf> = match given {
        Some(path) => vec![path.to_owned()],
        None => [
            format!("/usr/lib/postgresql/{major}/bin"),
            format!("/usr/pgsql-{major}/bin"),
            format!("/usr/local/pgsql-{major}/bin"),
        ]
        .into_iter()
        .map(PathBuf::from)
        .chain(std::env::var_os("PATH").iter().flat_map(std::env::split_paths))
        .collect(),
    };
    for directory in &candidates {
        match version_of(directory) {
            Some(found) if found == major => return Ok(directory.clone()),
            Some(found) if given.is_some() => {
                return Err(Error::new(format!(
                    "{} has PostgreSQL {found}, the backup needs {major}",
                    directory.display()
                ))
                .hint(format!("give the directory of PostgreSQL {major} with --pg-bin")));
            }
            _ => {}
        }
    }
    Err(Error::new(format!("PostgreSQL {major} is not installed, and the backup needs it"))
        .hint(format!("install postgresql-{major}, or name its directory with --pg-bin")))
}

fn version_of(directory: &Path) -> Option<u32> {
    if !directory.join("pg_ctl").exists() {
        return None;
    }
    version(&directory.join("postgres"))
}

/// The major version of a program, as it says itself.
pub(super) fn version(program: &Path) -> Option<u32> {
    let output = Command::new(program).arg("--version").output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let version = text.split_whitespace().find(|word| word.starts_with(|c: char| c.is_ascii_digit()))?;
    version.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}
