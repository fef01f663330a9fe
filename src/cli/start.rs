use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use clap::Args;

use super::clones::{Clone, Place};
use super::mount::{self, Mount};
use super::options::{Cache, Common, Output};
use super::point::{self, PointOptions};
use super::{output, pg};
use crate::error::{Error, Result};
use crate::format::manifest::Description;
use crate::postgres::{AUTO_CONF, CONTROL_FILE, ControlFile, RECOVERY_SIGNAL, SegmentName};
use crate::read::course::Bound;
use crate::read::point::{Action, Target};
use crate::read::recovery::Prepared;
use crate::read::tree::Owner;
use crate::repo::Repository;

/// A server's lock file in its data directory, and which of its lines says how far the server is.
const LOCK_FILE: &str = "postmaster.pid";
const LOCK_FILE_STATUS: usize = 7;

/// The least and the most `shared_buffers` of a clone.
const SHARED_BUFFERS_MB: (u64, u64) = (128, 1024);

/// A `restore_command` where `pg_wal` has everything.
const NOTHING_TO_RESTORE: &str = "false";

/// Start PostgreSQL on a backup, in seconds, whatever its size
///
/// Mounts the backup with a scratch layer and starts a server on it that archives nothing, follows nobody and listens on a
/// socket of its own. Only pages that are touched are fetched; what is written goes to the scratch and never to the backup.
#[derive(Debug, Args)]
pub(super) struct Start {
    /// Which point: a label, latest, a time, an LSN, or the name of a restore point [default: latest]
    #[arg(value_name = "POINT")]
    backup: Option<String>,
    #[command(flatten)]
    point: PointOptions,
    /// Stop at the target, open for reading only
    #[arg(long)]
    read_only: bool,
    /// Name of the clone, by which it is stopped and continued [default: stanza and label]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Port, which names the socket [default: a free one]
    #[arg(long, value_name = "PORT")]
    port: Option<u16>,
    /// Directory of PostgreSQL's programs of the backup's major version [default: looked for]
    #[arg(long, env = "PGCAIRN_PG_BIN", value_name = "DIR")]
    pg_bin: Option<PathBuf>,
    /// User the server runs as; only for root [default: the owner of the backed up cluster]
    #[arg(long, env = "PGCAIRN_OWNER", value_name = "USER")]
    owner: Option<String>,
    /// A setting of the clone's server, e.g. shared_buffers=1GB. May be repeated
    #[arg(long = "option", value_name = "NAME=VALUE")]
    options: Vec<String>,
    /// Directory in which clones live
    #[arg(long, env = "PGCAIRN_CLONE_PATH", value_name = "DIR")]
    clone_path: Option<PathBuf>,
    /// Seconds to wait for the server
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    start_timeout: u64,
    /// Output for people or programs
    #[arg(long, default_value = "text")]
    output: Output,
    #[command(flatten)]
    cache: Cache,
}

/// A clone that answers.
pub(super) struct Running {
    /// what is known of it
    pub(super) clone: Clone,
    /// where it lives
    pub(super) place: Place,
    /// its superuser
    pub(super) user: String,
    /// its major version
    pub(super) major: u32,
}

impl Start {
    pub(super) fn run(self, common: &Common) -> Result<()> {
        let started = Instant::now();
        let running = self.launch(common)?;
        let took = started.elapsed();
        if running.clone.recovery.is_none() {
            leave_backup_segment(&running.clone.conninfo(&running.place, &running.user));
        }
        report(&self, &running.clone, &running.place, &running.user, took);
        Ok(())
    }

    /// A clone that another verb needs for a while; its name ends with this process's id.
    pub(super) fn for_verb(
        verb: &str,
        backup: Option<&str>,
        point: &PointOptions,
        (pg_bin, owner): (Option<&Path>, Option<&str>),
        (options, clone_path, start_timeout): (&[String], Option<&Path>, u64),
        cache: &Cache,
    ) -> Self {
        Self {
            backup: backup.map(str::to_owned),
            point: point.clone(),
            read_only: false,
            name: Some(format!("{verb}-{}", std::process::id())),
            port: None,
            pg_bin: pg_bin.map(Path::to_owned),
            owner: owner.map(str::to_owned),
            options: options.to_vec(),
            clone_path: clone_path.map(Path::to_owned),
            start_timeout,
            output: Output::Text,
            cache: cache.clone(),
        }
    }

    /// Brings the clone up, or leaves nothing of it.
    pub(super) fn launch(&self, common: &Common) -> Result<Running> {
        let repository = common.repository()?;
        let known =
            self.name.as_deref().map(|name| Place::new(self.clone_path.as_deref(), name)?.load()).transpose()?;
        let (label, recovery, continued) = match known.flatten() {
            Some(clone) => {
                self.continued(&clone, &repository.stanza)?;
                (clone.label.clone(), clone.recovery.clone(), Some(clone))
            }
            None => {
                let (label, recovery) = self.course(&repository)?;
                (label, recovery, None)
            }
        };
        let name = match &self.name {
            Some(name) => name.clone(),
            None => self.free_name(&format!("{}-{label}", repository.stanza))?,
        };
        let place = Place::new(self.clone_path.as_deref(), &name)?;
        if continued.is_none() && place.root().exists() {
            return Err(Error::new(format!("a clone {name} exists already in {}", place.root().display()))
                .hint(format!("give another --name, or \"pgcairn stop {name}\"")));
        }
        let description = repository.description(&label)?;
        let programs = pg::programs(description.database.version, self.pg_bin.as_deref())?;
        let owner = mount::owner(self.owner.as_deref(), &description.owner)?;
        refuse_root(owner)?;
        let clone = Clone {
            name: name.clone(),
            stanza: repository.stanza.clone(),
            label: label.clone(),
            recovery,
            read_only: continued.as_ref().map_or(self.waits(), |clone| clone.read_only),
            port: self.port.map_or_else(free_port, Ok)?,
            programs,
            uid: owner.uid,
            gid: owner.gid,
        };
        place.create(owner)?;
        place.save(&clone)?;
        let result = self.bring_up(common, &place, &clone, &description, owner);
        match result {
            Ok(user) => Ok(Running { clone, place, user, major: description.database.version }),
            Err(error) => {
                // whatever is up comes down again; a continued clone keeps what it had written
                _ = super::stop::bring_down(&place, &clone, continued.is_some());
                Err(error)
            }
        }
    }

    /// `name`, or with a number behind it, so that one backup can be started several times.
    fn free_name(&self, name: &str) -> Result<String> {
        let numbered = (2..).map(|number| format!("{name}-{number}"));
        for candidate in std::iter::once(name.to_owned()).chain(numbered) {
            if !Place::new(self.clone_path.as_deref(), &candidate)?.root().exists() {
                return Ok(candidate);
            }
        }
        Ok(name.to_owned())
    }

    /// True when the server is to wait at its target.
    fn waits(&self) -> bool {
        self.read_only || self.point.waits()
    }

    /// The backup to stand on, and the recovery from there.
    fn course(&self, repository: &Repository) -> Result<(String, Option<Prepared>)> {
        let mut point = self.point.point(self.backup.as_deref())?;
        match (&point.target, point.action) {
            (_, Some(Action::Shutdown)) => {
                return Err(
                    Error::new("a clone that shuts down at its target is none").hint("leave --target-action out")
                );
            }
            (_, Some(Action::Promote)) if self.read_only => {
                return Err(Error::new("--read-only waits at the target, --target-action promote goes on from it")
                    .hint("give one of them"));
            }
            (Target::Standby | Target::Preserve, _) => {
                return Err(
                    Error::new("a clone follows nobody").hint("\"pgcairn restore --type standby\" makes a standby")
                );
            }
            (Target::None, _) if self.waits() => point.target = Target::Immediate,
            _ => {}
        }
        let course = point::find(repository, &point, Bound::Archive, &self.cache)?;
        let action = if self.waits() { Action::Pause } else { Action::Promote };
        // all the WAL it needs is in its mount: nothing else is asked, so that it ends there or says why not
        let prepared = point::presented(&course, action, NOTHING_TO_RESTORE);
        Ok((course.label, prepared))
    }

    /// Whether a clone can be started again by name.
    fn continued(&self, clone: &Clone, stanza: &str) -> Result<()> {
        let place = Place::new(self.clone_path.as_deref(), &clone.name)?;
        if pgcairn_mount::mountpoint::mounted_on(&place.mount()).map_err(mount::mount_error)?.is_some() {
            return Err(Error::new(format!("clone {} runs already", clone.name))
                .hint(format!("\"pgcairn stop {}\" ends it; another --name starts another", clone.name)));
        }
        let named = self.backup.as_deref().is_some_and(|backup| backup != "latest" && backup != clone.label);
        let other = named || !self.point.is_empty() || (self.read_only && !clone.read_only);
        match other || clone.stanza != stanza {
            true => {
                Err(Error::new(format!("clone {} stands on backup {} of {}", clone.name, clone.label, clone.stanza))
                    .hint("give another --name"))
            }
            false => Ok(()),
        }
    }

    fn bring_up(
        &self,
        common: &Common,
        place: &Place,
        clone: &Clone,
        of: &Description,
        owner: Owner,
    ) -> Result<String> {
        let mount = Mount::for_clone(
            (&clone.label, clone.recovery.as_ref()),
            &place.scratch(),
            self.owner.as_deref(),
            &place.mount(),
            &self.cache,
        )?;
        super::stop::end_server(place)?;
        mount::spawn(&mount, common, &place.mount_log())?;
        forget_old_server(place)?;
        write_files(place, owner)?;
        let recovers = of.database.version >= 14 && place.mount().join(RECOVERY_SIGNAL).exists();
        if recovers {
            set_restore_command(place, NOTHING_TO_RESTORE)?;
        }
        let mut command = clone.pg_ctl(place);
        command.arg("start").arg("-s").arg("-w").arg("-t").arg(self.start_timeout.to_string());
        command.arg("-l").arg(place.log()).arg("-o").arg(self.server_options(place, clone, of)?);
        run(command, &place.log())?;
        if recovers {
            // the server demands the command when it starts, and would run it for every segment, although all of them lie in
            // pg_wal: each run of a program makes the kernel write out every file the server has open
            set_restore_command(place, "")?;
            super::stop::reload(place)?;
        }
        let superuser = of.superuser.as_deref().unwrap_or("postgres");
        self.reach_target(place, clone, &clone.conninfo(place, superuser))?;
        Ok(superuser.to_owned())
    }

    /// Waits for the answer to a first query, at the target: pg_ctl is content with a server that replays.
    fn reach_target(&self, place: &Place, clone: &Clone, conninfo: &str) -> Result<()> {
        let started = Instant::now();
        let query = match clone.read_only {
            true => "SELECT NOT pg_is_in_recovery() OR pg_is_wal_replay_paused()",
            false => "SELECT NOT pg_is_in_recovery()",
        };
        let is_there = || -> std::result::Result<bool, postgres::Error> {
            let mut client = postgres::Client::connect(conninfo, postgres::NoTls)?;
            Ok(client.query_one(query, &[])?.get(0))
        };
        loop {
            // before that it would refuse, once more in its log for each time it was asked
            let error = match server_accepts(place).then(is_there) {
                Some(Ok(true)) => return Ok(()),
                Some(Err(error)) => Some(error),
                Some(Ok(false)) | None => None,
            };
            if super::stop::running_server(place).is_none() {
                return Err(did_not_start(&place.log(), "ended before its target"));
            }
            if started.elapsed() > Duration::from_secs(self.start_timeout) {
                let late = format!("the clone did not answer at its target within {} s", self.start_timeout);
                let late = Error::new(late).hint("give it more time with --start-timeout");
                return Err(match error {
                    Some(error) => late.source(error),
                    None => late,
                });
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Settings on the server's command line, which beat every file and ALTER SYSTEM.
    fn server_options(&self, place: &Place, clone: &Clone, of: &Description) -> Result<String> {
        let run = place.run().display().to_string();
        let version = of.database.version;
        let mut settings: Vec<(String, String)> = [
            ("port", clone.port.to_string()),
            ("listen_addresses", String::new()),
            ("unix_socket_directories", run.clone()),
            ("hba_file", format!("{run}/pg_hba.conf")),
            ("ident_file", format!("{run}/pg_ident.conf")),
            ("external_pid_file", place.pid_file().display().to_string()),
            ("cluster_name", format!("pgcairn-{}", clone.name)),
            ("archive_mode", "off".into()),
            ("wal_recycle", "off".into()),
            ("wal_init_zero", "off".into()),
            ("primary_conninfo", String::new()),
            ("primary_slot_name", String::new()),
            ("archive_cleanup_command", String::new()),
            ("recovery_end_command", String::new()),
            ("recovery_min_apply_delay", "0".into()),
            // a server that goes on at its target is not open before it
            ("hot_standby", if clone.read_only { "on" } else { "off" }.into()),
            ("synchronous_standby_names", String::new()),
            ("logging_collector", "off".into()),
            ("log_destination", "stderr".into()),
            ("autovacuum", "off".into()),
            ("shared_buffers", format!("{}MB", shared_buffers_mb(clone, memory_available()))),
            ("huge_pages", "off".into()),
            ("ssl", "off".into()),
        ]
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect();
        if clone.read_only {
            settings.extend(source_limits(place)?);
        }
        if version >= 14 {
            settings.push(("recovery_init_sync_method".into(), "syncfs".into()));
        }
        if version >= 15 {
            // it asks for pages that replay then overwrites with the images in the WAL, and each would be fetched
            settings.push(("recovery_prefetch".into(), "off".into()));
        }
        if version >= 18 {
            settings.push(("io_method".into(), "worker".into()));
        }
        for option in &self.options {
            let (name, value) = option.split_once('=').ok_or_else(|| {
                Error::new(format!("--option {option} is no setting")).hint("it reads like --option work_mem=64MB")
            })?;
            settings.push((name.trim().to_owned(), value.to_owned()));
        }
        Ok(settings
            .iter()
            .map(|(name, value)| format!("-c {name}={}", shell_quote(value)))
            .collect::<Vec<_>>()
            .join(" "))
    }
}

/// pg_ctl hands its options to a shell.
fn shell_quote(value: &str) -> String {
    format!("'{}'", value.replace('\'', r"'\''"))
}

/// Replay reads and writes the same pages again and again: what stays in the server's own memory costs nothing. Up to an eighth of
/// what the machine has to give.
fn shared_buffers_mb(clone: &Clone, available: u64) -> u64 {
    match clone.recovery {
        Some(_) => (available / 8 / 1024 / 1024).clamp(SHARED_BUFFERS_MB.0, SHARED_BUFFERS_MB.1),
        None => SHARED_BUFFERS_MB.0,
    }
}

/// Bytes of memory that could be had without swapping; none where the kernel does not say.
fn memory_available() -> u64 {
    let told = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = told.lines().find_map(|line| line.strip_prefix("MemAvailable:")).unwrap_or_default();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or_default() * 1024
}

/// The last setting of a name counts.
fn set_restore_command(place: &Place, command: &str) -> Result<()> {
    let path = place.mount().join(AUTO_CONF);
    let mut file = fs::OpenOptions::new().append(true).open(&path).map_err(|error| Error::io("open", &path, error))?;
    writeln!(file, "restore_command = '{command}'").map_err(|error| Error::io("write", &path, error))
}

/// Whether the server takes connections, by the last line of its lock file.
fn server_accepts(place: &Place) -> bool {
    let lock = fs::read_to_string(place.mount().join(LOCK_FILE)).unwrap_or_default();
    lock.lines().nth(LOCK_FILE_STATUS).is_some_and(|status| status.trim() == "ready")
}

/// Removes the lock file of a server that ended together with its mount. Nobody can be running on a mount this new, but
/// PostgreSQL would believe the file while that process id is taken: by another process, or by one its parent forgets.
fn forget_old_server(place: &Place) -> Result<()> {
    let lock = place.mount().join(LOCK_FILE);
    match fs::remove_file(&lock) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io("remove", &lock, error)),
        _ => Ok(()),
    }
}

/// A server that is open during recovery must have room for all that its source had.
fn source_limits(place: &Place) -> Result<Vec<(String, String)>> {
    let path = place.mount().join(CONTROL_FILE);
    let bytes = fs::read(&path).map_err(|error| Error::io("read", &path, error))?;
    let control =
        ControlFile::parse(&bytes).map_err(|error| Error::new("the backup's pg_control is damaged").source(error))?;
    let limits = [
        ("max_connections", control.max_connections),
        ("max_worker_processes", control.max_worker_processes),
        ("max_wal_senders", control.max_wal_senders),
        ("max_prepared_transactions", control.max_prepared_transactions),
        ("max_locks_per_transaction", control.max_locks_per_transaction),
    ];
    Ok(limits.into_iter().map(|(name, value)| (name.to_owned(), value.to_string())).collect())
}

fn refuse_root(owner: Owner) -> Result<()> {
    match owner.uid {
        0 => Err(Error::new("PostgreSQL refuses to run as root").hint("name the user it runs as with --owner")),
        _ => Ok(()),
    }
}

fn free_port() -> Result<u16> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).and_then(|listener| listener.local_addr());
    Ok(listener.map_err(|error| Error::new("cannot find a free port").source(error))?.port())
}

/// Access rules of the clone's own, since only its user and root can reach the socket; and a postgresql.conf where the cluster
/// keeps it outside the data directory.
fn write_files(place: &Place, owner: Owner) -> Result<()> {
    let write = |path: &Path, text: &str| -> Result<()> {
        fs::write(path, text).map_err(|error| Error::io("write", path, error))?;
        match nix::unistd::geteuid().is_root() {
            true => chown(path, Some(owner.uid), Some(owner.gid))
                .map_err(|error| Error::io("change the owner of", path, error)),
            false => Ok(()),
        }
    };
    write(&place.run().join("pg_hba.conf"), "local all all trust\n")?;
    write(&place.run().join("pg_ident.conf"), "")?;
    let conf = place.mount().join("postgresql.conf");
    match conf.try_exists() {
        Ok(true) => Ok(()),
        Ok(false) => write(&conf, "# the backed up cluster keeps its configuration outside the data directory\n"),
        Err(error) => Err(Error::io("look at", &conf, error)),
    }
}

fn run(mut command: Command, log: &Path) -> Result<()> {
    let output = command.output().map_err(|error| Error::new(format!("cannot run {command:?}")).source(error))?;
    if output.status.success() {
        return Ok(());
    }
    Err(did_not_start(log, "did not start"))
}

fn did_not_start(log: &Path, what: &str) -> Error {
    let log_text = fs::read_to_string(log).unwrap_or_default();
    let tail: Vec<&str> = log_text.lines().rev().take(8).collect();
    let tail: Vec<&str> = tail.into_iter().rev().collect();
    if let Some(segment) = unreadable_segment(&log_text) {
        return Error::new(format!("recovery stopped at WAL segment {segment}, which cannot be read"))
            .hint("the mount's log says why; choose a point before it, or run \"pgcairn verify\"")
            .source(format!("the server's log ends with:\n  {}", tail.join("\n  ")));
    }
    Error::new(format!("the clone's server {what}:\n  {}", tail.join("\n  ")))
        .hint("the lines above are the end of its log; --option NAME=VALUE changes a setting")
}

/// The segment that the server failed to read, if it says so.
fn unreadable_segment(log: &str) -> Option<&str> {
    let line = log.lines().rev().find(|line| line.contains("could not read from") && line.contains("segment"))?;
    line.split(|c: char| !c.is_ascii_alphanumeric()).find(|word| word.parse::<SegmentName>().is_ok())
}

/// Leaves the WAL segment that came from the backup: one that is the scratch's own from birth is written without us.
fn leave_backup_segment(conninfo: &str) {
    let switched = postgres::Client::connect(conninfo, postgres::NoTls)
        .and_then(|mut client| client.simple_query("SELECT pg_switch_wal()"));
    if let Err(error) = switched {
        tracing::info!(%error, "the clone goes on in the backup's WAL segment");
    }
}

fn report(start: &Start, clone: &Clone, place: &Place, user: &str, took: Duration) {
    let conninfo = clone.conninfo(place, user);
    if start.output == Output::Json {
        let json = serde_json::json!({
            "name": clone.name, "backup": clone.label, "conninfo": conninfo, "port": clone.port,
            "data-directory": place.mount(), "first-answer-ms": took.as_millis() as u64,
        });
        return output::line(&format!("{json:#}"));
    }
    output::line(&format!(
        "clone {} of backup {}: first answer after {:.2} s",
        clone.name,
        clone.label,
        took.as_secs_f64()
    ));
    output::line(&format!("  psql \"{conninfo}\""));
    output::line(&format!("  pgcairn stop {}", clone.name));
}
