//! The running server: connecting, what it is, and the backup calls of its version.

mod refusal;

use std::path::PathBuf;

use postgres::error::SqlState;
use postgres::{Client, Config, NoTls, SimpleQueryMessage};

use super::peer;
use crate::error::{Context, Error, Result};
use crate::files;
use crate::interrupt;
use crate::postgres::{Lsn, Major, SegmentName, Timeline, session};

/// Name of the temporary replication slot of backups without an archive.
const SLOT_NAME: &str = "pgcairn_backup";
/// What a session that takes a backup calls itself.
const BACKUP_NAME: &str = "pgcairn backup";
/// Whether the server is a standby.
const IN_RECOVERY: &str = "SELECT pg_catalog.pg_is_in_recovery()";
/// Turns off what ends a session or a statement; not every server knows all of it.
const NO_TIMEOUTS: &str = "SELECT pg_catalog.set_config(name, '0', false) FROM pg_catalog.pg_settings WHERE name IN \
                           ('statement_timeout', 'lock_timeout', 'idle_session_timeout', \
                           'idle_in_transaction_session_timeout', 'transaction_timeout')";
/// Key of the advisory lock that keeps two backups of one server apart.
const LOCK_KEY: i64 = 0x7067_6361_6972_6e01;

/// A session with the server.
pub struct Server {
    client: Client,
    /// major version
    pub major: Major,
    /// where its data directory is on this machine
    pub data_directory: PathBuf,
    /// its system identifier
    pub system_id: u64,
    /// how it archives WAL
    pub archiving: Archiving,
    /// true: it is a standby
    pub in_recovery: bool,
    /// its postmaster.pid, where the user may see that
    pub postmaster: Option<String>,
}

/// How a server archives WAL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Archiving {
    /// `archive_mode` is off
    Off,
    /// on, with this command
    Command(String),
    /// on, with this library
    Library(String),
    /// on, but neither command nor library is set
    Unset,
}

/// WAL that waits for its archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// files marked ready
    pub files: u64,
    /// when the first of them was
    pub oldest: String,
    /// how often archiving failed, and when it did last, if it has not succeeded since
    pub failure: Option<String>,
}

/// What `pg_backup_stop` returned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stopped {
    /// where the copy is consistent
    pub lsn: Lsn,
    /// byte for byte
    pub backup_label: String,
    /// byte for byte; empty without tablespaces
    pub tablespace_map: String,
}

impl Server {
    /// Connects with a libpq conninfo string or URI; what it leaves out is taken from the `PG*` environment.
    pub fn connect(conninfo: &str) -> Result<Self> {
        let config = config(conninfo)?;
        let connect = |config: &Config| peer::connect(config, |config| config.connect(NoTls));
        let connected = connect(&guarded(&config)).or_else(|error| match error.code() {
            // a pooler that takes no options: what follows says the same
            Some(&SqlState::PROTOCOL_VIOLATION) => connect(&config),
            _ => Err(error),
        });
        let mut client = connected.map_err(|error| {
            Error::new(format!("cannot connect to the server at {}", describe(&config)))
                .hint(refusal::no_connection(&error))
                .source(error)
        })?;
        client.simple_query(session::GUARD).context(|| "cannot set search_path".into())?;
        // a DBA's defaults must not end a long backup
        client.simple_query(NO_TIMEOUTS).context(|| "cannot set the session's timeouts".into())?;
        let version: String = value(&mut client, "SHOW server_version_num")?;
        let version = version.parse().unwrap_or(0);
        let major = Major::from_server_version_num(version).context(|| "cannot back up this server".into())?;
        let in_recovery = value(&mut client, IN_RECOVERY)? == "t";
        let data_directory = PathBuf::from(value(&mut client, "SHOW data_directory")?);
        let system_id = value(&mut client, "SELECT system_identifier FROM pg_catalog.pg_control_system()")?;
        let system_id =
            system_id.parse::<i64>().map(|id| id as u64).context(|| format!("system identifier {system_id}"))?;
        let archiving = archiving(&mut client, major)?;
        let may_read =
            value(&mut client, "SELECT pg_catalog.has_function_privilege('pg_catalog.pg_read_file(text)', 'EXECUTE')")?
                == "t";
        let read = may_read.then(|| value(&mut client, "SELECT pg_catalog.pg_read_file('postmaster.pid')"));
        let postmaster = read.transpose()?;
        Ok(Self { client, major, data_directory, system_id, archiving, in_recovery, postmaster })
    }

    /// As [`Self::connect`], for what a standby cannot do; `option` is what named the server.
    pub fn connect_primary(conninfo: &str, option: &str) -> Result<Self> {
        let server = Self::connect(conninfo)?;
        match server.in_recovery {
            true => {
                Err(Error::new(format!("the server that {option} names is a standby")).hint("connect to the primary"))
            }
            false => Ok(server),
        }
    }

    /// What the server wants archived and is not yet; `None` where nothing waits.
    pub fn waiting(&mut self) -> Result<Option<Waiting>> {
        let ready = "FROM pg_catalog.pg_ls_archive_statusdir() WHERE name LIKE '%.ready'";
        let time = |column: &str| format!("to_char({column}, 'YYYY-MM-DD HH24:MI:SS TZ')");
        let files = self.value(&format!("SELECT count(*) {ready}"))?;
        let files: u64 = files.parse().context(|| format!("{files} files"))?;
        if files == 0 {
            return Ok(None);
        }
        let oldest = self.value(&format!("SELECT coalesce({}, 'a moment ago') {ready}", time("min(modification)")))?;
        let failure = self.value(&format!(
            "SELECT coalesce(max(failed_count || ' times, last for ' || last_failed_wal || ' at ' || {}), '') \
             FROM pg_catalog.pg_stat_archiver WHERE last_failed_time > coalesce(last_archived_time, '-infinity')",
            time("last_failed_time")
        ))?;
        Ok(Some(Waiting { files, oldest, failure: Some(failure).filter(|failure| !failure.is_empty()) }))
    }

    /// Takes the lock that keeps two backups of one server apart; it ends with the session.
    ///
    /// Advisory locks are per database, so the session's name says it too: each backup first names itself, then looks for
    /// another, so that of two that begin at the same moment at least one sees the other.
    pub fn lock(&mut self) -> Result<()> {
        self.value(&format!("SELECT pg_catalog.set_config('application_name', '{BACKUP_NAME}', false)"))?;
        let others = self.value(&format!(
            "SELECT count(*) FROM pg_catalog.pg_stat_activity WHERE application_name = '{BACKUP_NAME}' AND pid <> pg_catalog.pg_backend_pid()"
        ))?;
        match (self.value(&format!("SELECT pg_catalog.pg_try_advisory_lock({LOCK_KEY})"))?.as_str(), others.as_str()) {
            ("t", "0") => Ok(()),
            _ => Err(Error::new("another backup of this server is running").hint("wait until it has ended")),
        }
    }

    /// Name of the role that initdb made.
    pub fn bootstrap_superuser(&mut self) -> Result<String> {
        self.value("SELECT rolname FROM pg_catalog.pg_roles WHERE oid = 10")
    }

    /// Oids and names of all databases.
    pub fn databases(&mut self) -> Result<Vec<(u32, String)>> {
        self.names("SELECT oid, datname FROM pg_catalog.pg_database ORDER BY oid")
    }

    /// Oids and names of all tablespaces, those of every cluster among them.
    pub fn tablespaces(&mut self) -> Result<Vec<(u32, String)>> {
        self.names("SELECT oid, spcname FROM pg_catalog.pg_tablespace ORDER BY oid")
    }

    /// A name whose bytes are not UTF-8 is left out: databases have encodings of their own, these catalogs have none.
    fn names(&mut self, sql: &str) -> Result<Vec<(u32, String)>> {
        let messages = self.client.simple_query(sql).context(|| format!("the server refuses \"{sql}\""))?;
        let row = |message: &SimpleQueryMessage| match message {
            SimpleQueryMessage::Row(row) => {
                let text = |column: usize| row.try_get(column).ok().flatten();
                Some((text(0)?.parse().ok()?, text(1)?.to_owned()))
            }
            _ => None,
        };
        Ok(messages.iter().filter_map(row).collect())
    }

    /// Creates the temporary slot that keeps WAL from now on until the session ends.
    pub fn hold_wal(&mut self) -> Result<()> {
        let name = format!("{SLOT_NAME}_{}", std::process::id());
        self.value(&format!(
            "SELECT slot_name FROM pg_catalog.pg_create_physical_replication_slot('{name}', true, true)"
        ))?;
        Ok(())
    }

    /// Writes a restore point called `name` into the WAL and ends its segment; returns one past the record, and the segment
    /// that it ends in. That names the timeline that the server writes now, which pg_control knows only after a checkpoint.
    pub fn mark_wal(&mut self, name: &str) -> Result<(Lsn, SegmentName)> {
        let marked = self.position(&format!("pg_catalog.pg_create_restore_point('{name}')"))?;
        self.value("SELECT pg_catalog.pg_switch_wal()")?;
        Ok(marked)
    }

    /// What its clock shows, in seconds since 1970: times of commits are of this clock.
    pub fn now_s(&mut self) -> Result<i64> {
        let now = self.value("SELECT floor(extract(epoch FROM clock_timestamp()))::bigint")?;
        now.parse().context(|| format!("the server answers \"{now}\" where a time belongs"))
    }

    /// Up to where a primary has written, and the segment that it writes.
    pub fn writing(&mut self) -> Result<(Lsn, SegmentName)> {
        self.position("pg_catalog.pg_current_wal_insert_lsn()")
    }

    fn position(&mut self, lsn: &str) -> Result<(Lsn, SegmentName)> {
        let row = row(&mut self.client, &format!("SELECT lsn, pg_catalog.pg_walfile_name(lsn) FROM {lsn} AS lsn"))?;
        let column = |number: usize| row.get(number).cloned().flatten().unwrap_or_default();
        let name = column(1).parse().context(|| "the server does not name its WAL segment".into())?;
        Ok((parse_lsn(&column(0))?, name))
    }

    /// The first segment from `first` to `last`, of one timeline, that the server has not been told is archived; `None` if there
    /// is none, or the user may not see it.
    pub fn unarchived(&mut self, first: SegmentName, last: SegmentName) -> Result<Option<SegmentName>> {
        if !self.may("pg_catalog.pg_ls_archive_statusdir()")? {
            return Ok(None);
        }
        let name = self.value(&format!(
            "SELECT coalesce(min(left(name, 24)), '') FROM pg_catalog.pg_ls_archive_statusdir() \
             WHERE name ~ '^[0-9A-F]{{24}}\\.ready$' AND left(name, 24) COLLATE \"C\" BETWEEN '{first}' AND '{last}'"
        ))?;
        Ok(name.parse().ok())
    }

    /// The content of a small file of `pg_wal`; `None` if there is none, or the user may not read it.
    pub fn wal_text(&mut self, name: &str) -> Result<Option<String>> {
        if !self.may("pg_catalog.pg_read_file(text, bigint, bigint, boolean)")? {
            return Ok(files::read_regular_text(&self.data_directory.join("pg_wal").join(name)).ok());
        }
        let text = format!("SELECT coalesce(pg_catalog.pg_read_file('pg_wal/{name}', 0, 1048576, true), '')");
        Ok(Some(self.value(&text)?).filter(|text| !text.is_empty()))
    }

    /// Whether the server works on a mounted backup.
    pub fn is_view(&mut self) -> Result<bool> {
        if self.may("pg_catalog.pg_stat_file(text, boolean)")? {
            // a user may have a file of that name, and then it is an error to look below it
            let there = self.value(
                "SELECT CASE WHEN (SELECT isdir FROM pg_catalog.pg_stat_file('.pgcairn', true)) \
                 THEN (SELECT count(size) FROM pg_catalog.pg_stat_file('.pgcairn/status', true)) ELSE 0 END",
            )?;
            return Ok(there != "0");
        }
        Ok(self.data_directory.join(".pgcairn/status").exists())
    }

    fn may(&mut self, function: &str) -> Result<bool> {
        Ok(self.value(&format!("SELECT pg_catalog.has_function_privilege('{function}', 'EXECUTE')"))? == "t")
    }

    /// The timeline that a standby replays, as far as it says: its last restartpoint may be of an earlier one.
    pub fn replayed_timeline(&mut self) -> Result<Timeline> {
        let timeline = self.value(
            "SELECT greatest((SELECT timeline_id FROM pg_catalog.pg_control_checkpoint()), \
             (SELECT min_recovery_end_timeline FROM pg_catalog.pg_control_recovery()), \
             (SELECT max(received_tli) FROM pg_catalog.pg_stat_wal_receiver))",
        )?;
        timeline.parse().map(Timeline).context(|| format!("timeline {timeline}"))
    }

    /// Where the record of the last checkpoint, or restartpoint, is, and where replay from it starts.
    pub fn checkpoint(&mut self) -> Result<(Lsn, Lsn)> {
        let row = row(&mut self.client, "SELECT checkpoint_lsn, redo_lsn FROM pg_catalog.pg_control_checkpoint()")?;
        let lsn = |number: usize| parse_lsn(&row.get(number).cloned().flatten().unwrap_or_default());
        Ok((lsn(0)?, lsn(1)?))
    }

    /// Begins the backup; returns where recovery will start.
    pub fn start_backup(&mut self, label: &str, fast: bool) -> Result<Lsn> {
        let call = if self.major.number() < 15 {
            format!("SELECT pg_catalog.pg_start_backup('{label}', {fast}, false)")
        } else {
            format!("SELECT pg_catalog.pg_backup_start('{label}', {fast})")
        };
        // it waits for a checkpoint, and a session whose client is gone would go on waiting
        let token = self.client.cancel_token();
        let _interrupted = interrupt::Guard::new(move || _ = token.cancel_query(NoTls));
        let lsn = self.value(&call).map_err(|error| match self.in_recovery && refusal::is_of_state(&error) {
            true => error.hint("the primary needs full_page_writes = on and a checkpoint since"),
            false => error,
        })?;
        parse_lsn(&lsn)
    }

    /// How far a standby has replayed.
    pub fn replayed(&mut self) -> Result<Lsn> {
        let lsn = self.value("SELECT pg_catalog.pg_last_wal_replay_lsn()")?;
        parse_lsn(&lsn)
    }

    /// Ends the backup; does not wait for the archive, since we look for the WAL ourselves.
    pub fn stop_backup(&mut self) -> Result<Stopped> {
        let call = match self.major.number() < 15 {
            true => "SELECT lsn, labelfile, spcmapfile FROM pg_catalog.pg_stop_backup(false, false)",
            false => "SELECT lsn, labelfile, spcmapfile FROM pg_catalog.pg_backup_stop(false)",
        };
        let row = row(&mut self.client, call).map_err(|error| match self.in_recovery && refusal::is_of_state(&error) {
            true => error.hint(
                "the standby was promoted, or replayed what the primary wrote with full_page_writes = off; run the backup again",
            ),
            false => error,
        })?;
        let column = |number: usize| row.get(number).cloned().flatten().unwrap_or_default();
        Ok(Stopped { lsn: parse_lsn(&column(0))?, backup_label: column(1), tablespace_map: column(2) })
    }

    /// Fails when the session is gone, or the standby was promoted: the backup is void then.
    pub fn alive(&mut self) -> Result<()> {
        let gone = |error: Error| match error.find::<postgres::Error>().is_some_and(refusal::is_end) {
            true => error.hint(
                "the server was stopped or the connection was cut; run the backup again: it takes over what was stored",
            ),
            false => error,
        };
        let in_recovery = self.value(IN_RECOVERY).map_err(gone)? == "t";
        match self.in_recovery == in_recovery {
            true => Ok(()),
            false => Err(Error::new("the standby was promoted during the backup").hint("run the backup again")),
        }
    }

    pub(super) fn value(&mut self, sql: &str) -> Result<String> {
        value(&mut self.client, sql)
    }
}

fn row(client: &mut Client, sql: &str) -> Result<Vec<Option<String>>> {
    let messages = client.simple_query(sql).map_err(|error| {
        Error::new(format!("the server refuses \"{sql}\"")).hint(refusal::hint(sql, &error)).source(error)
    })?;
    let row = messages.iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some(row),
        _ => None,
    });
    let row = row.ok_or_else(|| Error::new(format!("the server answers nothing to \"{sql}\"")))?;
    let text = |column: usize| {
        let text = row.try_get(column).map_err(|error| {
            Error::new(format!("the server answers \"{sql}\" with bytes that are not UTF-8"))
                .hint("a path, a name or a setting of the server is not UTF-8; a backup notes them as text")
                .source(error)
        })?;
        Ok(text.map(str::to_owned))
    };
    (0..row.len()).map(text).collect()
}

fn value(client: &mut Client, sql: &str) -> Result<String> {
    let first = row(client, sql)?.into_iter().next().flatten();
    first.ok_or_else(|| Error::new(format!("the server answers null to \"{sql}\"")))
}

fn archiving(client: &mut Client, major: Major) -> Result<Archiving> {
    if value(client, "SHOW archive_mode")? == "off" {
        return Ok(Archiving::Off);
    }
    let command = value(client, "SHOW archive_command")?;
    let library = if major.number() >= 15 { value(client, "SHOW archive_library")? } else { String::new() };
    Ok(match (library.is_empty(), command.is_empty() || command == "(disabled)") {
        (false, _) => Archiving::Library(library),
        (true, false) => Archiving::Command(command),
        (true, true) => Archiving::Unset,
    })
}

fn parse_lsn(text: &str) -> Result<Lsn> {
    text.parse().context(|| format!("the server answers \"{text}\" where a WAL position belongs"))
}

/// libpq's defaults for what a conninfo string leaves out.
pub(super) fn config(conninfo: &str) -> Result<Config> {
    let mut config: Config = conninfo.parse().map_err(|error: postgres::Error| {
        // not shown: it may hold a password, in a form that only its parser would find
        Error::new("cannot read the conninfo string of --pg")
            .hint("it reads like \"host=/var/run/postgresql port=5432 user=postgres dbname=postgres\"")
            .source(error)
    })?;
    let environment = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    if config.get_hosts().is_empty() {
        config.host(environment("PGHOST").as_deref().unwrap_or("/var/run/postgresql"));
    }
    if config.get_ports().is_empty() {
        let port = environment("PGPORT").unwrap_or_else(|| "5432".into());
        config.port(port.parse().context(|| format!("PGPORT is \"{port}\""))?);
    }
    if config.get_user().is_none() {
        let login = nix::unistd::User::from_uid(nix::unistd::geteuid()).ok().flatten().map(|user| user.name);
        config.user(&environment("PGUSER").or(login).unwrap_or_else(|| "postgres".into()));
    }
    if config.get_dbname().is_none() {
        config.dbname(&environment("PGDATABASE").unwrap_or_else(|| "postgres".into()));
    }
    if let (None, Some(password)) = (config.get_password(), environment("PGPASSWORD")) {
        config.password(password);
    }
    config.application_name("pgcairn");
    if config.get_connect_timeout().is_none() {
        config.connect_timeout(std::time::Duration::from_secs(10));
    }
    Ok(config)
}

/// The same with what our sessions begin with.
pub(super) fn guarded(config: &Config) -> Config {
    let mut guarded = config.clone();
    guarded.options(&session::guarded(config.get_options()));
    guarded
}

pub(super) fn describe(config: &Config) -> String {
    let host = match config.get_hosts().first() {
        Some(postgres::config::Host::Tcp(host)) => host.clone(),
        Some(postgres::config::Host::Unix(path)) => path.display().to_string(),
        None => String::new(),
    };
    format!("{host}:{}", config.get_ports().first().copied().unwrap_or(5432))
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server")
            .field("major", &self.major)
            .field("data_directory", &self.data_directory)
            .finish_non_exhaustive()
    }
}
