//! The throwaway cluster: PostgreSQL's programs, its settings, and what its tables hold.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use nix::unistd::{User, geteuid};
use postgres::{Client, NoTls};

use super::home::Home;
use super::shell::{As, Shell};
use crate::error::{Context, Error, Result};

/// The versions that are looked for, the newest first.
const MAJORS: std::ops::RangeInclusive<u32> = 13..=18;
/// What makes a server.
const SERVER: [&str; 3] = ["initdb", "pg_ctl", "postgres"];
/// What talks to one.
const CLIENTS: [&str; 2] = ["psql", "pgbench"];

/// Where PostgreSQL's programs are.
#[derive(Debug)]
pub(super) struct Programs {
    /// directory of `initdb`, `pg_ctl` and `postgres`
    pub(super) server: PathBuf,
    /// directory of `psql` and `pgbench`: the same, unless the server came without them
    clients: PathBuf,
}

impl Programs {
    /// Those in the directory given, or the newest that are installed.
    pub(super) fn find(given: Option<&Path>) -> Result<Self> {
        let has = |directory: &Path, names: &[&str]| names.iter().all(|name| directory.join(name).exists());
        let server = match given {
            Some(directory) if has(directory, &SERVER) => std::path::absolute(directory).unwrap_or_else(|_| directory.to_owned()),
            Some(directory) => {
                return Err(Error::new(format!("{} does not have all of {}", directory.display(), SERVER.join(", ")))
                    .hint("name the directory of PostgreSQL's own programs, such as /usr/lib/postgresql/15/bin, with --pg-bin"));
            }
            None => installed().find(|directory| has(directory, &SERVER)).ok_or_else(|| {
                Error::new("PostgreSQL is not installed: no initdb, pg_ctl and postgres in any of the usual places")
                    .hint("run scripts/setup.sh, or install the package postgresql-15, or name its directory with --pg-bin")
            })?,
        };
        let clients = std::iter::once(server.clone()).chain(installed()).find(|directory| has(directory, &CLIENTS));
        let clients = clients.ok_or_else(|| {
            Error::new("psql and pgbench are not installed")
                .hint("run scripts/setup.sh, or install the package postgresql-15")
        })?;
        Ok(Self { server, clients })
    }

    /// Both, as in PATH.
    pub(super) fn path(&self) -> String {
        format!("{}:{}", self.server.display(), self.clients.display())
    }

    /// Whether the server came with this program.
    pub(super) fn has(&self, name: &str) -> bool {
        self.server.join(name).exists()
    }
}

/// Where distributions put PostgreSQL, and PATH.
fn installed() -> impl Iterator<Item = PathBuf> {
    let places = MAJORS.rev().flat_map(|major| {
        [
            format!("/usr/lib/postgresql/{major}/bin"),
            format!("/usr/pgsql-{major}/bin"),
            format!("/usr/local/pgsql-{major}/bin"),
        ]
    });
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path: Vec<PathBuf> = std::env::split_paths(&path).collect();
    places.map(PathBuf::from).chain(path)
}

/// The user that servers run as when this is root, since PostgreSQL refuses to be root.
pub(super) fn server_user() -> Result<Option<User>> {
    if !geteuid().is_root() {
        return Ok(None);
    }
    let user = User::from_name("postgres").context(|| "cannot look up the user postgres".into())?;
    user.map(Some).ok_or_else(|| {
        Error::new("PostgreSQL refuses to run as root, and this machine has no user postgres")
            .hint("run scripts/setup.sh, or run the demo as an ordinary user (which needs fuse3)")
    })
}

/// A server of the demo and its socket, in `run`.
#[derive(Debug)]
pub(super) struct Server {
    data: PathBuf,
    log: PathBuf,
    port: u16,
    socket: PathBuf,
    pg_ctl: PathBuf,
}

impl Server {
    /// The server of the data directory `name`; the port is only the socket's name.
    pub(super) fn new(home: &Home, programs: &Programs, name: &str, log: &str, port: u16) -> Self {
        Self {
            data: home.path(name),
            log: home.path("run").join(log),
            port,
            socket: home.path("run"),
            pg_ctl: programs.server.join("pg_ctl"),
        }
    }

    /// How to reach it.
    pub(super) fn conninfo(&self) -> String {
        let port = if self.port == 5432 { String::new() } else { format!(" port={}", self.port) };
        format!("host={}{port} user=postgres dbname=postgres", self.socket.display())
    }

    /// Makes the cluster, not yet started, without the archiving that would only slow the loading of data.
    pub(super) fn create(&self, shell: &Shell, programs: &Programs) -> Result<()> {
        let data = self.data.to_string_lossy();
        let options =
            ["-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync", "--data-checksums", "-D", &data];
        shell.quietly(As::Server, &programs.server.join("initdb"), &options)?;
        let socket = self.socket.display();
        self.configure(&format!(
            "listen_addresses = ''\nunix_socket_directories = '{socket}'\nmax_wal_size = 512MB\nshared_buffers = 128MB\n\
             wal_level = minimal\nmax_wal_senders = 0\n"
        ))
    }

    /// Adds to its settings; the last of two counts.
    pub(super) fn configure(&self, settings: &str) -> Result<()> {
        let path = self.data.join("postgresql.conf");
        let before = fs::read_to_string(&path).map_err(|error| Error::io("read", &path, error))?;
        // written over, not replaced: it keeps its owner
        fs::write(&path, format!("{before}{settings}")).map_err(|error| Error::io("write", &path, error))
    }

    /// Starts it, and waits until it answers.
    pub(super) fn start(&self, shell: &Shell) -> Result<()> {
        let (data, log) = (self.data.to_string_lossy(), self.log.to_string_lossy());
        shell.quietly(As::Server, &self.pg_ctl, &["-D", &data, "-l", &log, "-s", "-w", "start"])
    }

    /// Stops it cleanly.
    pub(super) fn stop(&self, shell: &Shell) -> Result<()> {
        let data = self.data.to_string_lossy();
        shell.quietly(As::Server, &self.pg_ctl, &["-D", &data, "-s", "-w", "-m", "fast", "stop"])
    }
}

/// Connects as the demo itself, for what is not worth showing.
pub(super) fn connect(conninfo: &str) -> Result<Client> {
    Client::connect(conninfo, NoTls).context(|| format!("cannot connect to {conninfo}"))
}

/// One value of one row.
pub(super) fn ask(conninfo: &str, query: &str) -> Result<String> {
    let failed = || format!("this query failed: {query}");
    let rows = connect(conninfo)?.simple_query(query).context(failed)?;
    let value = rows.iter().find_map(|message| match message {
        postgres::SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
        _ => None,
    });
    value.ok_or_else(|| Error::new(failed()))
}

/// What a table holds: its rows, and a sum over a hash of each, which no order changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Contents {
    /// number of rows
    pub(super) rows: u64,
    sum: String,
}

/// What the tables of the database hold, by name.
pub(super) type Fingerprint = BTreeMap<String, Contents>;

/// The contents of every table.
pub(super) fn fingerprint(shell: &Shell, conninfo: &str) -> Result<Fingerprint> {
    fingerprint_of(shell, conninfo, |_| true)
}

/// The contents of the tables whose names are wanted.
pub(super) fn fingerprint_of(shell: &Shell, conninfo: &str, wanted: impl Fn(&str) -> bool) -> Result<Fingerprint> {
    let mut client = connect(conninfo)?;
    let failed = || format!("cannot read the tables of {conninfo}");
    let tables = client
        .query("SELECT relname::text FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace", &[]);
    let mut all = Fingerprint::new();
    let names = tables.context(failed)?.into_iter().map(|row| row.get::<_, String>(0));
    for name in names.filter(|name| wanted(name)) {
        shell.go_on()?;
        let query = format!("SELECT count(*), coalesce(sum(hashtext(t::text)::bigint), 0)::text FROM \"{name}\" AS t");
        let row = client.query_one(&query, &[]).context(failed)?;
        all.insert(name, Contents { rows: row.get::<_, i64>(0) as u64, sum: row.get(1) });
    }
    Ok(all)
}
