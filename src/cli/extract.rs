use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Args;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::options::{Cache, Common};
use super::point::PointOptions;
use super::start::{Running, Start};
use super::{output, pg, stop};
use crate::clone::environment;
use crate::error::{Error, Result};
use crate::files::{self, Outlives};

/// Bring back one table as it was at a point
///
/// Starts a private clone there, runs pg_dump for the table, and removes the clone. Only the pages that this touches are fetched.
/// The dump goes to standard output, to a file, or into another database.
#[derive(Debug, Args)]
pub(super) struct Extract {
    /// Which point: a label, latest, a time, an LSN, or the name of a restore point [default: latest]
    #[arg(value_name = "POINT")]
    backup: Option<String>,
    #[command(flatten)]
    point: PointOptions,
    /// The table, with its database and schema; what follows the database may be a pattern, as pg_dump's --table
    #[arg(long, value_name = "DATABASE.SCHEMA.TABLE")]
    table: String,
    /// Write the dump (SQL) to this file, which must not exist
    #[arg(long, value_name = "FILE", conflicts_with = "into")]
    output: Option<PathBuf>,
    /// Load the dump into this database, in one transaction
    #[arg(long, value_name = "CONNINFO")]
    into: Option<String>,
    /// Directory of PostgreSQL's programs of the backup's major version [default: looked for]
    #[arg(long, env = "PGCAIRN_PG_BIN", value_name = "DIR")]
    pg_bin: Option<PathBuf>,
    /// User the server runs as; only for root [default: the owner of the backed up cluster]
    #[arg(long, env = "PGCAIRN_OWNER", value_name = "USER")]
    owner: Option<String>,
    /// A setting of the clone's server. May be repeated
    #[arg(long = "option", value_name = "NAME=VALUE")]
    options: Vec<String>,
    /// Directory in which the clone lives meanwhile
    #[arg(long, env = "PGCAIRN_CLONE_PATH", value_name = "DIR")]
    clone_path: Option<PathBuf>,
    /// Seconds to wait for the server
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    start_timeout: u64,
    #[command(flatten)]
    cache: Cache,
}

impl Extract {
    pub(super) fn run(self, common: &Common) -> Result<()> {
        let (database, table) = split(&self.table)?;
        if let Some(file) = self.output.as_deref().filter(|file| file.exists()) {
            return Err(Error::new(format!("{} exists already", file.display())).hint("give another --output"));
        }
        // whoever interrupts this ends pg_dump too, and the clone must not stay
        let interrupted = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            signal_hook::flag::register(signal, interrupted.clone())
                .map_err(|error| Error::new("cannot wait for signals").source(error))?;
        }
        let start = Start::for_verb(
            "extract",
            self.backup.as_deref(),
            &self.point,
            (self.pg_bin.as_deref(), self.owner.as_deref()),
            (&self.options, self.clone_path.as_deref(), self.start_timeout),
            &self.cache,
        );
        let running = start.launch(common)?;
        let dumped = match interrupted.load(Ordering::Relaxed) {
            true => Err(Error::new("interrupted")),
            false => self.dump(&running, &database, &table),
        };
        let stopped = stop::bring_down(&running.place, &running.clone, false);
        dumped.and(stopped)
    }

    fn dump(&self, running: &Running, database: &str, table: &str) -> Result<()> {
        let major = running.major;
        let pg_dump = client_program("pg_dump", &running.clone.programs, major)?;
        let conninfo = format!("{} dbname={}", running.clone.conninfo(&running.place, &running.user), quoted(database));
        let mut dump = running.clone.command(&pg_dump);
        dump.arg("-d").arg(conninfo).arg("--table").arg(table);
        dump.stdin(Stdio::null()).stderr(Stdio::piped());
        match (&self.output, &self.into) {
            (Some(file), _) => {
                let temporary = file.with_extension("pgcairn-tmp");
                let out = File::create_new(&temporary).map_err(|error| Error::io("create", &temporary, error))?;
                files::place(&temporary, file, Outlives::PowerLoss, |_| finish(dump.stdout(out), &pg_dump, table))?;
                output::line(&format!("{} is in {}{}", self.table, file.display(), fetched(running)));
            }
            (None, Some(into)) => {
                self.load(dump, &pg_dump, table, &client_program("psql", &running.clone.programs, major)?, into)?;
                output::line(&format!("{} is back{}", self.table, fetched(running)));
            }
            (None, None) => finish(&mut dump, &pg_dump, table)?,
        }
        Ok(())
    }

    /// Into another database: all of it, or nothing. A dump that breaks off must not be committed, so psql gets it when it is whole.
    fn load(&self, mut dump: Command, pg_dump: &Path, table: &str, psql: &Path, into: &str) -> Result<()> {
        let failed = |error| Error::new("cannot keep the dump for a moment").source(error);
        let file = tempfile::tempfile().map_err(failed)?;
        finish(dump.stdout(file.try_clone().map_err(failed)?), pg_dump, table)?;
        let mut reader = file;
        std::io::Seek::rewind(&mut reader).map_err(failed)?;
        let mut load = Command::new(psql);
        environment::without_secrets(&mut load);
        load.args(["-X", "-q", "-v", "ON_ERROR_STOP=1", "--single-transaction", "-o", "/dev/null", "-d"]).arg(into);
        load.stdin(reader).stderr(Stdio::piped());
        let done = load.output().map_err(|error| Error::io("run", psql, error))?;
        match done.status.success() {
            true => Ok(()),
            false => Err(Error::new(format!("the table cannot be loaded: {}", last_line(&done.stderr)))
                .hint("nothing was changed there; a table of that name must not exist: rename it, or use --output")),
        }
    }
}

/// What the clone has read of the repository, for people; nothing where it does not say.
fn fetched(running: &Running) -> String {
    let status = std::fs::read(running.place.mount().join(".pgcairn/status")).ok();
    let status = status.and_then(|status| serde_json::from_slice::<serde_json::Value>(&status).ok());
    let bytes = status.and_then(|status| status.get("fetched-bytes")?.as_u64());
    bytes.map(|bytes| format!("; {} were fetched for it", output::bytes(bytes))).unwrap_or_default()
}

/// Runs pg_dump to its end.
fn finish(dump: &mut Command, pg_dump: &Path, table: &str) -> Result<()> {
    let child = dump.spawn().map_err(|error| Error::io("run", pg_dump, error))?;
    let done = child.wait_with_output().map_err(|error| Error::io("wait for", pg_dump, error))?;
    if done.status.success() {
        return Ok(());
    }
    Err(Error::new(format!("pg_dump of {table} failed: {}", last_line(&done.stderr)))
        .hint("the table must be there at that point: look with \"pgcairn start\" and psql's \\dt"))
}

fn last_line(stderr: &[u8]) -> String {
    String::from_utf8_lossy(stderr).trim_end().lines().last().unwrap_or_default().to_owned()
}

/// Database and the rest of `database.schema.table`; the database may be quoted.
fn split(table: &str) -> Result<(String, String)> {
    let bad = || {
        Error::new(format!("\"{table}\" names no table of a database"))
            .hint("it reads like shop.public.orders; quote a database whose name has dots: '\"my.shop\".public.orders'")
    };
    let (database, rest) = match table.strip_prefix('"') {
        Some(quoted) => quoted.split_once("\".").ok_or_else(bad)?,
        None => table.split_once('.').ok_or_else(bad)?,
    };
    match database.is_empty() || rest.is_empty() || !rest.contains('.') {
        true => Err(bad()),
        false => Ok((database.to_owned(), rest.to_owned())),
    }
}

/// A value of a conninfo string.
fn quoted(value: &str) -> String {
    format!("'{}'", value.replace('\\', r"\\").replace('\'', r"\'"))
}

/// A client beside the server's programs, or one that is new enough on the path or where distributions put it.
fn client_program(name: &str, beside: &Path, major: u32) -> Result<PathBuf> {
    let distributed = (major..=18).map(|major| PathBuf::from(format!("/usr/lib/postgresql/{major}/bin")));
    let on_path: Vec<PathBuf> = std::env::var_os("PATH").iter().flat_map(std::env::split_paths).collect();
    for directory in std::iter::once(beside.to_owned()).chain(distributed).chain(on_path) {
        let program = directory.join(name);
        if program.exists() && pg::version(&program).is_some_and(|found| found >= major) {
            return Ok(program);
        }
    }
    Err(Error::new(format!("there is no {name} of PostgreSQL {major} or later"))
        .hint(format!("install postgresql-client-{major}, or put its directory into PATH")))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn tables_are_named_with_their_database() {
        let names = |table: &str| split(table).map(|(database, rest)| format!("{database}|{rest}")).ok();
        assert_eq!(names("shop.public.orders").as_deref(), Some("shop|public.orders"));
        assert_eq!(names("\"my.shop\".public.\"Orders\"").as_deref(), Some("my.shop|public.\"Orders\""));
        for bad in ["orders", "public.orders", ".public.orders", "shop.", "\"shop.public.orders", ""] {
            assert!(names(bad).is_none(), "{bad}");
        }
        assert_eq!(quoted(r"o'hara\x"), r"'o\'hara\\x'");
    }
}
