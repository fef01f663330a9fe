//! Talking to a server over any connection string: psql, pgbench, dumps and fingerprints.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::time::Duration;

use crate::install;
use crate::process::{run, run_ok};

/// How long one call may take.
const TIMEOUT: Duration = Duration::from_secs(300);

/// A server, as its users see it.
#[derive(Clone, Debug)]
pub struct Client {
    conninfo: String,
}

impl Client {
    /// For a libpq connection string such as `host=/tmp/x port=5432 user=postgres dbname=postgres`.
    pub fn new(conninfo: impl Into<String>) -> Self {
        Self { conninfo: conninfo.into() }
    }

    /// The connection string.
    pub fn conninfo(&self) -> &str {
        &self.conninfo
    }

    /// The same server, another database. The name must need no quoting.
    pub fn database(&self, name: &str) -> Self {
        // of two values for the same key, libpq takes the last
        Self::new(format!("{} dbname={name}", self.conninfo))
    }

    /// Runs a script of SQL and psql commands, one transaction per statement; the rows, columns separated by `|`.
    ///
    /// # Panics
    /// When a statement fails.
    pub fn psql(&self, sql: &str) -> String {
        self.try_psql(sql).unwrap_or_else(|stderr| panic!("psql on {} failed: {stderr}in: {sql}", self.conninfo))
    }

    /// As [`Self::psql`]; the error is what psql says.
    pub fn try_psql(&self, sql: &str) -> Result<String, String> {
        self.copy_in(sql, &[])
    }

    /// As [`Self::try_psql`], for a script that ends with `COPY ... FROM STDIN` and the data for it.
    pub fn copy_in(&self, sql: &str, data: &[u8]) -> Result<String, String> {
        let mut command = install::client("psql");
        command.args(["-XAtq", "-v", "ON_ERROR_STOP=1", "-d", &self.conninfo]);
        let script = [sql.trim_end().as_bytes(), b"\n", data].concat();
        let finished = run(&mut command, &script, TIMEOUT);
        if finished.status.success() {
            return Ok(String::from_utf8_lossy(&finished.stdout).trim_end_matches('\n').to_owned());
        }
        Err(String::from_utf8_lossy(&finished.stderr).into_owned())
    }

    /// A session that stays open, for what lives no longer than one: temporary tables, locks, transactions.
    ///
    /// # Panics
    /// When psql cannot be started.
    pub fn session(&self) -> Session {
        let mut command = install::client("psql");
        command.args(["-XAtq", "-v", "ON_ERROR_STOP=1", "-d", &self.conninfo]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut psql = command.spawn().expect("psql can be started");
        let (stdin, stdout) = (psql.stdin.take().expect("piped"), psql.stdout.take().expect("piped"));
        Session { psql, stdin, stdout: BufReader::new(stdout) }
    }

    /// Runs pgbench to its end and gives its report.
    ///
    /// # Panics
    /// When it fails.
    pub fn pgbench(&self, arguments: &[&str]) -> String {
        run_ok(install::client("pgbench").args(arguments).arg("-d").arg(&self.conninfo), &[], TIMEOUT)
    }

    /// Runs pgbench beside the test, until it is done or dropped.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn pgbench_beside(&self, arguments: &[&str]) -> Beside {
        let mut command = install::client("pgbench");
        command.args(arguments).arg("-d").arg(&self.conninfo).stdout(Stdio::null()).stderr(Stdio::null());
        Beside { child: command.spawn().expect("pgbench can be started") }
    }

    /// `pg_dumpall` without what differs from run to run, and without the rows of unlogged tables, which no backup has.
    ///
    /// # Panics
    /// When it fails; it refuses servers newer than itself: use [`Self::fingerprint`] for those.
    pub fn dumpall(&self) -> String {
        let dump = run_ok(
            install::client("pg_dumpall").arg("--no-unlogged-table-data").arg("-d").arg(&self.conninfo),
            &[],
            TIMEOUT,
        );
        let differs = |line: &&str| !line.starts_with("\\restrict ") && !line.starts_with("\\unrestrict ");
        dump.lines().filter(differs).filter(|line| !line.starts_with("--")).collect::<Vec<_>>().join("\n")
    }

    /// What every logged table, sequence and materialised view of every database holds, of any major:
    /// `database.schema.name` to the number of rows and a sum over the MD5 of each, which no order changes.
    ///
    /// # Panics
    /// When a query fails.
    pub fn fingerprint(&self) -> BTreeMap<String, String> {
        let databases = self.psql("SELECT datname FROM pg_database WHERE datallowconn ORDER BY 1");
        let mut all = BTreeMap::new();
        for database in databases.lines() {
            let rows = self.database(database).psql(FINGERPRINT);
            for row in rows.lines() {
                let (name, value) = row.split_once('|').expect("two columns");
                all.insert(format!("{database}.{name}"), value.to_owned());
            }
        }
        all
    }
}

/// A query for each relation, run by `\gexec`: the name, and what it holds.
const FINGERPRINT: &str = "
SELECT format(
    'SELECT %L, count(*) || '' rows, sum '' ||
        coalesce(sum((''x'' || substr(md5(t::text), 1, 15))::bit(60)::bigint), 0) FROM %s %I.%I AS t',
    n.nspname || '.' || c.relname, CASE c.relkind WHEN 'r' THEN 'ONLY' ELSE '' END, n.nspname, c.relname)
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'm', 'S') AND c.relpersistence = 'p'
    AND (n.nspname NOT IN ('pg_catalog', 'information_schema', 'pg_toast') OR c.relname = 'pg_largeobject')
ORDER BY 1 \\gexec
";

/// A psql that stays connected.
#[derive(Debug)]
pub struct Session {
    psql: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Session {
    /// Runs a script and gives its rows.
    ///
    /// # Panics
    /// When a statement fails, or the session is gone; psql has written why to the standard error then.
    pub fn run(&mut self, sql: &str) -> String {
        const DONE: &str = "-- done --";
        writeln!(self.stdin, "{sql}\n\\echo '{DONE}'").expect("psql is listening");
        let mut rows = String::new();
        loop {
            let start = rows.len();
            let read = self.stdout.read_line(&mut rows).expect("psql writes text");
            assert!(read > 0, "psql ended while running: {sql}");
            // not always on a line of its own: \pset can make rows end with something else
            if let Some(last) = rows[start..].trim_end().strip_suffix(DONE) {
                rows.truncate(start + last.len());
                return rows.trim_end_matches('\n').to_owned();
            }
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.psql.kill();
        let _ = self.psql.wait();
    }
}

/// A program that runs beside the test.
#[derive(Debug)]
pub struct Beside {
    child: Child,
}

impl Beside {
    /// Waits for its end.
    ///
    /// # Panics
    /// When it failed.
    pub fn finish(mut self) {
        let status = self.child.wait().expect("a child can be waited for");
        assert!(status.success(), "it ended with {status}");
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
