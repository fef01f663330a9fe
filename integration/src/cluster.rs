//! A PostgreSQL server in a temporary directory, of any installed major.

use std::fmt;
use std::fs::{self, Permissions};
use std::ops::Deref;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::client::Client;
use crate::clock::WrongClock;
use crate::install;
use crate::process::{is_running, run, run_ok};
use crate::wait::{poll, wait_until};
use crate::watchdog::Watchdog;

/// How long initdb, a start or a stop may take.
const TIMEOUT: Duration = Duration::from_secs(120);
/// The longest path of a Unix socket.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// How a server is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopMode {
    /// when all clients have left
    Smart,
    /// cleanly, clients are thrown out
    Fast,
    /// at once, as by a crash
    Immediate,
}

/// A running server and its directories; both are gone when this is dropped.
///
/// It derefs to a [`Client`] of its database `postgres`.
#[derive(Debug)]
pub struct Cluster {
    client: Client,
    major: u32,
    bin: PathBuf,
    data: PathBuf,
    port: u16,
    options: Vec<(String, String)>,
    environment: Vec<(&'static str, String)>,
    // in this order: the watchdog removes what `home` names, then `home` finds nothing left to do
    _watchdog: Watchdog,
    home: TempDir,
}

/// What a cluster is to be like.
#[derive(Clone, Debug)]
pub struct Builder {
    major: u32,
    checksums: bool,
    wal_segsize_mb: u32,
    conf: Vec<(String, String)>,
    environment: Vec<(&'static str, String)>,
}

impl Builder {
    /// A clock of the server's own.
    pub fn clock(mut self, clock: &WrongClock) -> Self {
        self.environment = clock.environment().into();
        self
    }

    /// The major version; 15 unless told.
    pub fn major(mut self, major: u32) -> Self {
        self.major = major;
        self
    }

    /// Whether pages carry checksums; not unless told.
    pub fn checksums(mut self, checksums: bool) -> Self {
        self.checksums = checksums;
        self
    }

    /// The size of a WAL segment, in MiB; 16 unless told.
    pub fn wal_segsize_mb(mut self, mib: u32) -> Self {
        self.wal_segsize_mb = mib;
        self
    }

    /// A line of `postgresql.conf`.
    pub fn conf(mut self, name: &str, value: &str) -> Self {
        self.conf.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Makes the cluster and starts it.
    ///
    /// # Panics
    /// When the major is not installed, or does not start.
    pub fn start(self) -> Cluster {
        let bin = install::server(self.major);
        let home = Home::make(None);
        let data = home.path.path().join("data");
        install::make_server_directory(&data, 0o700);
        self.initdb(&bin, &data);
        let mut conf = String::new();
        // no test pulls the plug, so nothing is lost by not waiting for the disk
        let base = [("fsync", "off"), ("shared_buffers", "32MB"), ("listen_addresses", ""), ("log_checkpoints", "off")];
        let owned = self.conf.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        for (name, value) in base.into_iter().chain(owned) {
            conf.push_str(&format!("{name} = {}\n", quoted(value)));
        }
        append(&data.join("postgresql.conf"), &conf);
        let mut cluster = Cluster::new(self.major, bin, data, home, Vec::new());
        cluster.environment = self.environment;
        cluster.start();
        cluster
    }

    fn initdb(&self, bin: &Path, data: &Path) {
        let mut initdb = install::as_server_user(bin.join("initdb"));
        initdb.args(["-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync", "-D"]).arg(data);
        initdb.arg(format!("--wal-segsize={}", self.wal_segsize_mb));
        match (self.checksums, self.major) {
            (true, _) => initdb.arg("--data-checksums"),
            (false, 18..) => initdb.arg("--no-data-checksums"),
            (false, _) => &mut initdb,
        };
        run_ok(&mut initdb, &[], TIMEOUT);
    }
}

/// A temporary directory with a place for the socket, the log and the pid file, that the server's user can enter.
struct Home {
    path: TempDir,
    port: u16,
    watchdog: Watchdog,
}

impl Home {
    /// `data` is the data directory, unless it will be in here. The watchdog comes first: initdb takes its time, too.
    fn make(data: Option<&Path>) -> Self {
        // each server has a socket directory of its own; different ports make a mix-up fail
        static NEXT_PORT: AtomicU16 = AtomicU16::new(54_320);
        let port = NEXT_PORT.fetch_add(1, Ordering::Relaxed);
        let make = |builder: &mut tempfile::Builder, directory: &Path| builder.tempdir_in(directory);
        let mut builder = tempfile::Builder::new();
        builder.prefix("pgcairn-test.");
        let mut path = make(&mut builder, &std::env::temp_dir()).expect("a temporary directory can be made");
        if socket(path.path(), port).as_os_str().len() > SOCKET_PATH_BYTES_MAX {
            path = make(&mut builder, Path::new("/tmp")).expect("a temporary directory can be made");
        }
        let data = data.map_or_else(|| path.path().join("data"), Path::to_owned);
        let watchdog = Watchdog::start(CLEAN_UP, &[path.path().as_os_str(), data.as_os_str()]);
        fs::set_permissions(path.path(), Permissions::from_mode(0o755)).expect("an owner may change modes");
        install::make_server_directory(&path.path().join("run"), 0o755);
        Self { path, port, watchdog }
    }
}

fn socket(home: &Path, port: u16) -> PathBuf {
    home.join(format!("run/.s.PGSQL.{port}"))
}

/// Ends the server of `$1` and removes `$1`. The pid is trusted only when that process works in the data directory `$2`.
const CLEAN_UP: &str = r#"
pid=$(cat "$1/run/pid" 2>/dev/null)
ours() { [ -n "$pid" ] && [ "$(readlink "/proc/$pid/cwd")" = "$2" ]; }
if ours "$@"; then
    kill -QUIT "$pid"
    tries=0
    while ours "$@" && [ $tries -lt 100 ]; do sleep 0.1; tries=$((tries + 1)); done
    ours "$@" && kill -KILL "$pid"
fi
rm -rf "$1"
"#;

impl Cluster {
    /// A new cluster.
    pub fn builder() -> Builder {
        Builder {
            major: install::CLIENT_MAJOR,
            checksums: false,
            wal_segsize_mb: 16,
            conf: Vec::new(),
            environment: Vec::new(),
        }
    }

    /// Starts a server on a data directory that is there already, such as a restored copy or a mounted backup.
    /// `settings` come on top of its configuration. Dropping stops the server and leaves the directory.
    ///
    /// # Panics
    /// When the major is not installed, or does not start.
    pub fn open(major: u32, data: &Path, settings: &[(&str, &str)]) -> Self {
        let mut cluster = Self::closed(major, data, settings);
        cluster.start();
        cluster
    }

    /// As [`Self::open`], but for a server that is not to start; the error is its log.
    pub fn try_open(major: u32, data: &Path, settings: &[(&str, &str)]) -> Result<Self, String> {
        let mut cluster = Self::closed(major, data, settings);
        cluster.try_start().map(|()| cluster)
    }

    fn closed(major: u32, data: &Path, settings: &[(&str, &str)]) -> Self {
        let data = data.canonicalize().unwrap_or_else(|error| panic!("cannot find {}: {error}", data.display()));
        let options = settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let home = Home::make(Some(&data));
        Self::new(major, install::server(major), data, home, options)
    }

    fn new(major: u32, bin: PathBuf, data: PathBuf, home: Home, options: Vec<(String, String)>) -> Self {
        let Home { path: home, port, watchdog } = home;
        let run = home.path().join("run");
        let conninfo = format!("host={} port={port} user=postgres dbname=postgres", run.display());
        Self {
            client: Client::new(conninfo),
            major,
            bin,
            data,
            port,
            options,
            environment: Vec::new(),
            _watchdog: watchdog,
            home,
        }
    }

    /// Starts the server, after a [`Self::stop`].
    ///
    /// # Panics
    /// When it does not start; with its log.
    pub fn start(&mut self) {
        self.try_start().unwrap_or_else(|log| panic!("PostgreSQL {} does not start: {log}", self.major));
    }

    /// As [`Self::start`]; the error is its log.
    pub fn try_start(&mut self) -> Result<(), String> {
        let run_directory = self.home.path().join("run");
        let pid_file = run_directory.join("pid");
        let mut options = vec![
            ("port".to_owned(), self.port.to_string()),
            ("unix_socket_directories".to_owned(), run_directory.display().to_string()),
            ("external_pid_file".to_owned(), pid_file.display().to_string()),
            ("logging_collector".to_owned(), "off".to_owned()),
        ];
        options.extend(self.options.iter().cloned());
        let options: Vec<String> =
            options.iter().map(|(name, value)| format!("-c {}", shell_quoted(&format!("{name}={value}")))).collect();
        let mut pg_ctl = self.pg_ctl();
        pg_ctl.args(["-w", "-t", "60", "-l"]).arg(self.log_path()).arg("-o").arg(options.join(" ")).arg("start");
        let finished = run(&mut pg_ctl, &[], TIMEOUT);
        if finished.status.success() { Ok(()) } else { Err(self.log()) }
    }

    /// Stops the server; the directories stay.
    ///
    /// # Panics
    /// When it does not stop.
    pub fn stop(&mut self, mode: StopMode) {
        run_ok(self.pg_ctl().args(["-w", "-t", "60", "-m", &mode.to_string(), "stop"]), &[], TIMEOUT);
    }

    /// Stops the server cleanly and starts it.
    ///
    /// # Panics
    /// When it does not stop or start.
    pub fn restart(&mut self) {
        self.stop(StopMode::Fast);
        self.start();
    }

    /// Makes a tablespace in a directory of its own, and gives that.
    ///
    /// # Panics
    /// When the server refuses.
    pub fn create_tablespace(&self, name: &str) -> PathBuf {
        let directory = self.home.path().join(format!("tablespace-{name}"));
        install::make_server_directory(&directory, 0o700);
        self.psql(&format!("CREATE TABLESPACE {name} LOCATION '{}';", directory.display()));
        directory
    }

    /// Waits until no backup has a session: that of one that was killed ends some time after it.
    ///
    /// # Panics
    /// When it does not end.
    pub fn wait_for_backup_sessions_to_end(&self) {
        let sessions = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'pgcairn%';";
        wait_until(TIMEOUT, "the sessions of backups to end", || self.psql(sessions) == "0");
    }

    /// A client of the database `postgres`.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// The data directory.
    pub fn data_directory(&self) -> &Path {
        &self.data
    }

    /// The directory of the server's own programs: `initdb`, `pg_ctl`, `postgres`.
    pub fn bin_directory(&self) -> &Path {
        &self.bin
    }

    /// A directory that goes when this goes; the server's socket, log and tablespaces are in it.
    pub fn home(&self) -> &Path {
        self.home.path()
    }

    /// The major version.
    pub fn major(&self) -> u32 {
        self.major
    }

    /// The port, which is only in the socket's name.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The postmaster's process id, while it runs.
    pub fn pid(&self) -> Option<i32> {
        let pid: i32 = fs::read_to_string(self.home.path().join("run/pid")).ok()?.trim().parse().ok()?;
        // after a crash the file stays, and the number may be another's
        let works_in = fs::read_link(format!("/proc/{pid}/cwd")).ok()?;
        (works_in == self.data && is_running(pid)).then_some(pid)
    }

    /// What the server logged.
    pub fn log(&self) -> String {
        let log = fs::read(self.log_path()).unwrap_or_default();
        String::from_utf8_lossy(&log).into_owned()
    }

    fn log_path(&self) -> PathBuf {
        self.home.path().join("run/log")
    }

    fn pg_ctl(&self) -> std::process::Command {
        let mut pg_ctl = install::as_server_user(self.bin.join("pg_ctl"));
        pg_ctl.arg("-s").arg("-D").arg(&self.data);
        pg_ctl.envs(self.environment.iter().map(|(name, value)| (name, value)));
        pg_ctl
    }

    fn stop_at_once(&self) {
        let Some(pid) = self.pid() else { return };
        let _ = kill(Pid::from_raw(pid), Signal::SIGQUIT);
        if poll(Duration::from_secs(10), || self.pid().is_none().then_some(())).is_none() {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }

    #[expect(clippy::print_stderr, reason = "the log of a test that failed belongs beside its message")]
    fn show_log(&self) {
        let log = self.log();
        let last: Vec<&str> = log.lines().rev().take(40).collect();
        eprintln!("the log of PostgreSQL {} in {} ended with:", self.major, self.data.display());
        for line in last.iter().rev() {
            eprintln!("  {line}");
        }
    }
}

impl Deref for Cluster {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.client
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.show_log();
        }
        self.stop_at_once();
    }
}

impl fmt::Display for StopMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Smart => "smart",
            Self::Fast => "fast",
            Self::Immediate => "immediate",
        })
    }
}

/// A value of `postgresql.conf`.
fn quoted(value: &str) -> String {
    format!("'{}'", value.replace('\\', "\\\\").replace('\'', "''"))
}

fn shell_quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', "'\\''"))
}

fn append(path: &Path, text: &str) {
    let before = fs::read_to_string(path).unwrap_or_default();
    fs::write(path, before + text).unwrap_or_else(|error| panic!("cannot write {}: {error}", path.display()));
}
