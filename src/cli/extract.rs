mod catalog;
mod load;
mod partial;
mod script;

use std::collections::HashSet;
use std::io::{BufReader, BufWriter};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use clap::Args;
use postgres::error::SqlState;
use postgres::{Client, NoTls};

use self::catalog::Relation;
use self::script::Contents;
use super::clones::Login;
use super::options::{Cache, Common};
use super::point::PointOptions;
use super::start::{LoginOptions, Running, Start, said};
use super::{output, pg, stop};
use crate::error::{Error, Result};
use crate::files::{self, Outlives};
use crate::interrupt;

/// Bring back a table as it was at a point
///
/// Starts a private clone there, runs pg_dump for the table, and removes the clone. Only the pages that this touches are fetched.
/// The dump goes to standard output, to a file, or into another database. Partitions, and other tables that inherit from the
/// table, come with it.
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
    login: LoginOptions,
    #[command(flatten)]
    cache: Cache,
}

impl Extract {
    pub(super) fn run(self, common: &Common) -> Result<()> {
        let (database, table) = split(&self.table)?;
        self.output.as_deref().map_or(Ok(()), partial::refuse_taken)?;
        // a server that cannot be reached is said before hours of replay
        let known = self.into.as_deref().map(load::settings).transpose()?;
        let start = Start::for_verb(
            "extract",
            self.backup.as_deref(),
            &self.point,
            (self.pg_bin.as_deref(), self.owner.as_deref()),
            (&self.options, self.clone_path.as_deref(), self.start_timeout),
            Some(&self.login),
            &self.cache,
        );
        let running = start.launch(common)?;
        let dumped = interrupt::check().and_then(|()| self.bring(&running, &database, &table, known.as_ref()));
        let stopped = stop::bring_down(&running.place, &running.clone, false);
        dumped.and(stopped)
    }

    /// Finds what the pattern means, dumps it, and says what came.
    fn bring(&self, running: &Running, database: &str, table: &str, known: Option<&HashSet<String>>) -> Result<()> {
        let (conninfo, relations) = relations(running, database, table)?;
        let pg_dump = client_program("pg_dump", &running.clone.programs, running.major)?;
        let mut dump = running.clone.command(&pg_dump);
        dump.arg("-d").arg(conninfo).args(["--strict-names", LOCK_WAIT]);
        dump.args(relations.iter().map(|relation| format!("--table={}", relation.pattern())));
        let done = |to: &str, contents: Contents| {
            let tables = relations.iter().filter(|relation| relation.is_table()).count();
            let tables = if tables == 1 { "1 table".to_owned() } else { format!("{tables} tables") };
            let moment = running.moment().map_or_else(String::new, |moment| format!("; {moment}"));
            format!("{} {to}: {} rows of {tables}{}{moment}", self.table, contents.rows, fetched(running))
        };
        match (&self.output, &self.into) {
            (Some(file), _) => {
                let (temporary, out) = partial::create(file)?;
                let copy = out.try_clone().map_err(|error| Error::io("write", &temporary, error))?;
                let mut contents = Contents::default();
                files::place(&temporary, file, Outlives::PowerLoss, |_| {
                    contents = finish(&mut dump, &pg_dump, table, copy, None)?;
                    Ok(())
                })?;
                drop(out);
                output::line(&done(&format!("is in {}", file.display()), contents));
            }
            (None, Some(into)) => {
                let failed = |error| Error::new("cannot keep the dump for a moment").source(error);
                // all of it, or nothing: a dump that breaks off must not be committed, so psql gets it when it is whole
                let mut file = tempfile::tempfile().map_err(failed)?;
                let copy = file.try_clone().map_err(failed)?;
                let contents = finish(&mut dump, &pg_dump, table, copy, known)?;
                std::io::Seek::rewind(&mut file).map_err(failed)?;
                let beside = pg_dump.parent().unwrap_or(&running.clone.programs);
                load::load(&client_program("psql", beside, running.major)?, file, into)?;
                output::line(&done("is back", contents));
            }
            (None, None) => {
                let contents = finish(&mut dump, &pg_dump, table, output::stream(), None)?;
                output::note(&done("was written to standard output", contents));
            }
        }
        relations.iter().filter_map(|of| of.lacks(self.into.is_some())).for_each(|text| output::note(&text));
        Ok(())
    }
}

/// A connection string for the database of the clone, and what the pattern means there.
fn relations(running: &Running, database: &str, table: &str) -> Result<(String, Vec<Relation>)> {
    let usual = running.login()?;
    let mut login = Login { database: database.to_owned(), ..usual.clone() };
    let connect = |login: &Login| Client::connect(&running.clone.own_conninfo(&running.place, login), NoTls);
    let mut client = connect(&login).or_else(|error| match error.code() {
        // a library that is loaded for this database alone
        Some(code) if [SqlState::UNDEFINED_FILE, SqlState::INTERNAL_ERROR].contains(code) => {
            login.without_libraries = true;
            connect(&login)
        }
        _ => Err(error),
    });
    let client = client.as_mut().map_err(|error| {
        let failed = Error::new(format!("cannot connect to database \"{database}\" of the clone"));
        let hint = match connect(usual).and_then(|mut client| client.query(DATABASES, &[])) {
            Ok(rows) => {
                let names: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
                format!("its databases: {}", names.join(", "))
            }
            Err(_) => "look with \"pgcairn start\" and psql's \\l".to_owned(),
        };
        failed.hint(hint).source(said(error))
    })?;
    let mut relations = catalog::find(client, table)?;
    if relations.is_empty() {
        return Err(Error::new(format!("no table matches {table} in database {database} at that point"))
            .hint("look with \"pgcairn start\" and psql's \\dt"));
    }
    let parts: Vec<Relation> = relations.extract_if(.., |relation| relation.extension.is_some()).collect();
    for Relation { schema, name, extension, .. } in &parts {
        let extension = extension.as_deref().unwrap_or_default();
        let text = format!("{schema}.{name} is a part of extension {extension}");
        if relations.is_empty() {
            return Err(Error::new(format!("{text}: pg_dump does not dump it alone"))
                .hint("\"pgcairn start\" and COPY bring its rows"));
        }
        output::note(&format!("{text}, and is left out"));
    }
    match catalog::locked(client, &relations)? {
        Some(locked) => Err(locked),
        None => Ok((running.clone.own_conninfo(&running.place, &login), relations)),
    }
}

/// For a lock that is not of a table we asked for; in milliseconds.
const LOCK_WAIT: &str = "--lock-wait-timeout=300000";

/// The databases of a clone that let somebody in.
const DATABASES: &str = "SELECT datname::text FROM pg_catalog.pg_database WHERE datallowconn ORDER BY 1";

/// What the clone has read of the repository, for people; nothing where it does not say.
fn fetched(running: &Running) -> String {
    let status = crate::files::read_regular(&running.place.mount().join(".pgcairn/status")).ok();
    let status = status.and_then(|status| serde_json::from_slice::<serde_json::Value>(&status).ok());
    let bytes = status.and_then(|status| status.get("fetched-bytes")?.as_u64());
    bytes.map(|bytes| format!("; {} were fetched for it", output::bytes(bytes))).unwrap_or_default()
}

/// Runs pg_dump to its end.
fn finish(
    dump: &mut Command,
    pg_dump: &Path,
    table: &str,
    to: impl std::io::Write,
    known: Option<&HashSet<String>>,
) -> Result<Contents> {
    dump.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = dump.spawn().map_err(|error| Error::io("run", pg_dump, error))?;
    let _waited_for = interrupt::Guard::child(child.id());
    let stdout = child.stdout.take().map(|stdout| BufReader::with_capacity(1 << 20, stdout));
    let passed = stdout.map_or(Ok(Contents::default()), |from| script::pass(from, BufWriter::new(to), known));
    if passed.is_err() {
        _ = child.kill();
    }
    let done = child.wait_with_output().map_err(|error| Error::io("wait for", pg_dump, error))?;
    let passed = passed.map_err(|error| Error::new("cannot write the dump").source(error))?;
    match done.status.success() {
        true => Ok(passed),
        false => {
            let last = last_line(&done.stderr);
            let error = Error::new(format!("pg_dump of {table} failed: {last}"));
            Err(match last.contains("LOCK TABLE") {
                true => error.hint(
                    "a transaction that was prepared then may hold the lock: \"pgcairn start\", and pg_prepared_xacts there, show it",
                ),
                false => error,
            })
        }
    }
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
        Some(quoted) => unquoted(quoted).ok_or_else(bad)?,
        None => table.split_once('.').map(|(database, rest)| (database.to_owned(), rest)).ok_or_else(bad)?,
    };
    match database.is_empty() || rest.is_empty() || !rest.contains('.') {
        true => Err(bad()),
        false => Ok((database, rest.to_owned())),
    }
}

/// What stands before the quote that ends `text`, where two are one, and what follows its dot.
fn unquoted(text: &str) -> Option<(String, &str)> {
    let mut from = 0;
    loop {
        let quote = from + text[from..].find('"')?;
        let rest = &text[quote + 1..];
        match rest.starts_with('"') {
            true => from = quote + 2,
            false => return Some((text[..quote].replace("\"\"", "\""), rest.strip_prefix('.')?)),
        }
    }
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
        assert_eq!(names(r#""a ""b"".c".public.t"#).as_deref(), Some(r#"a "b".c|public.t"#));
        for bad in ["orders", "public.orders", ".public.orders", "shop.", "\"shop.public.orders", ""] {
            assert!(names(bad).is_none(), "{bad}");
        }
    }
}
