//! Running clones: where each keeps its things, and how its server is started and stopped.

use std::fs::{self, DirBuilder, File, TryLockError};
use std::io::Read;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::{Deserialize, Serialize};

use super::options::{refuse_in_data_directory, state_directory};
use crate::clone::environment;
use crate::error::{Error, Result};
use crate::files::{self, Outlives};
use crate::postgres::{conninfo, session};
use crate::read::completion::Prepared;
use crate::read::tree::Owner;
use crate::recovery::tablespaces::Created;
use crate::user::{make_above, make_own, make_with_parents, require_own};

const HINT: &str =
    "choose a directory for clones that nobody else can write or rename: --clone-path; or run pgcairn as its owner";

/// What a clone's directory holds.
const MOUNT: &str = "data";
const SCRATCH: &str = "scratch";
const RUN: &str = "run";
const MOUNT_LOG: &str = "mount.log";
const RECORD: &str = "clone.json";
const RECORD_NEW: &str = "clone.json.new";
/// How the names of a server's socket and its lock begin.
const SOCKET: &str = ".s.PGSQL.";

/// What is kept of a clone while it exists.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Clone {
    /// its name
    pub name: String,
    /// the stanza and backup it stands on
    pub stanza: String,
    /// the backup's label
    pub label: String,
    /// the recovery it was started with, which says what lies below its scratch
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recovery: Option<Prepared>,
    /// whether its server waits at its target, open for reading
    #[serde(default)]
    pub read_only: bool,
    /// tablespaces that its WAL creates; their directories are in it, and are shown to its server at these paths
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tablespaces: Vec<Created>,
    /// port, which names its socket
    pub port: u16,
    /// PostgreSQL's programs
    pub programs: PathBuf,
    /// user the server runs as
    pub uid: u32,
    /// and its group
    pub gid: u32,
}

/// The directory of one clone and what is in it.
#[derive(Clone, Debug)]
pub struct Place {
    root: PathBuf,
}

impl Place {
    /// The place of the clone called `name`.
    pub fn new(base: Option<&Path>, name: &str) -> Result<Self> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        if name.is_empty() || name.len() > 100 || name.starts_with(['.', '-']) || !name.chars().all(allowed) {
            return Err(Error::new(format!("\"{name}\" cannot name a clone"))
                .hint("use up to 100 letters, digits, \".\", \"_\" and \"-\""));
        }
        let base = base.map_or_else(default_base, |base| Ok(base.to_owned()))?;
        let base = std::path::absolute(&base).map_err(|error| Error::io("find", &base, error))?;
        refuse_in_data_directory("the clone's directory", &base, "--clone-path")?;
        Ok(Self { root: base.join(name) })
    }

    /// All of it.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The mount, which is the data directory.
    pub fn mount(&self) -> PathBuf {
        self.root.join(MOUNT)
    }

    /// What was written.
    pub fn scratch(&self) -> PathBuf {
        self.root.join(SCRATCH)
    }

    /// Socket, pg_hba.conf; only the server's user and root may enter.
    pub fn run(&self) -> PathBuf {
        self.root.join(RUN)
    }

    /// The server's log.
    pub fn log(&self) -> PathBuf {
        self.run().join("postgresql.log")
    }

    /// The log of the mount's daemon, which goes with the clone.
    pub fn mount_log(&self) -> PathBuf {
        self.root.join(MOUNT_LOG)
    }

    /// Where the server notes its process id, readable also when the mount is dead.
    pub fn pid_file(&self) -> PathBuf {
        self.run().join("postmaster.pid")
    }

    fn record(&self) -> PathBuf {
        self.root.join(RECORD)
    }

    /// Takes the clone for this run: two that start or stop it would pull the mount away from one another.
    ///
    /// # Errors
    /// When another run has it.
    pub fn take(&self) -> Result<File> {
        let directory = File::open(&self.root).map_err(|error| Error::io("open", &self.root, error))?;
        match directory.try_lock() {
            Ok(()) => Ok(directory),
            Err(TryLockError::Error(error)) => Err(Error::io("lock", &self.root, error)),
            Err(TryLockError::WouldBlock) => {
                Err(Error::new(format!("another run of pgcairn starts or stops the clone in {}", self.root.display()))
                    .hint("wait for its end"))
            }
        }
    }

    /// True where there are a clone's things and nothing else, with or without a record that can be read: what may be
    /// removed without knowing more of it.
    pub fn is_clone(&self) -> bool {
        let Ok(entries) = fs::read_dir(&self.root) else { return false };
        let names: Vec<_> = entries.flatten().map(|entry| entry.file_name()).collect();
        let ours = [MOUNT, SCRATCH, RUN, MOUNT_LOG, RECORD, RECORD_NEW];
        // one that was kept has no directory for its server any more
        names.iter().any(|name| *name == RUN || *name == SCRATCH)
            && names.iter().all(|name| ours.iter().any(|our| name == our))
    }

    /// Removes what a server that ended without cleaning up left beside its socket: PostgreSQL would take the lock for
    /// held while another process has that number. No server of this clone runs when this is called.
    pub fn forget_sockets(&self) -> Result<()> {
        let run = self.run();
        for entry in fs::read_dir(&run).map_err(|error| Error::io("list", &run, error))?.flatten() {
            if entry.file_name().as_encoded_bytes().starts_with(SOCKET.as_bytes()) {
                let path = entry.path();
                fs::remove_file(&path).map_err(|error| Error::io("remove", &path, error))?;
            }
        }
        Ok(())
    }

    /// Makes its directory, which nobody else has then; false where one is there.
    pub fn claim(&self) -> Result<bool> {
        make_above(&self.root, HINT)?;
        match DirBuilder::new().mode(0o755).create(&self.root) {
            Ok(()) => require_own(&self.root, HINT).map(|()| true).inspect_err(|_| _ = fs::remove_dir(&self.root)),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(Error::io("create", &self.root, error)),
        }
    }

    /// Creates the directories.
    pub fn create(&self, owner: Owner) -> Result<()> {
        // nobody but us makes anything in it
        make_own(&self.root, 0o755, HINT)?;
        make_own(&self.mount(), 0o755, HINT)?;
        let run = self.run();
        // of a clone that goes on it is the server's already
        make_with_parents(&run, 0o700).map_err(|error| Error::io("create", &run, error))?;
        if nix::unistd::geteuid().is_root() {
            chown(&run, Some(owner.uid), Some(owner.gid))
                .map_err(|error| Error::io("change the owner of", &run, error))?;
        }
        Ok(())
    }

    /// Writes what must be known to stop it.
    pub fn save(&self, clone: &Clone) -> Result<()> {
        let record = serde_json::to_vec_pretty(clone)?;
        let new = self.root.join(RECORD_NEW);
        files::place(&new, &self.record(), Outlives::PowerLoss, |to| {
            fs::write(to, &record)
                .and_then(|()| fs::set_permissions(to, fs::Permissions::from_mode(0o644)))
                .map_err(|error| Error::io("write", to, error))
        })?;
        files::sync_directories(self.root.parent())
    }

    /// Whether there is a directory. One that another user could fill, or have filled, is refused.
    pub fn is_own(&self) -> Result<bool> {
        match self.root.symlink_metadata() {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
            _ => require_own(&self.root, HINT).map(|()| true),
        }
    }

    /// Reads it back; none where no clone is.
    ///
    /// # Errors
    /// When what is there cannot be read, as after a power loss with an older pgcairn.
    pub fn load(&self) -> Result<Option<Clone>> {
        let path = self.record();
        // what is noted there says which program is run, and as whom
        if !self.is_own()? {
            return Ok(None);
        }
        match read_record(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|error| self.damaged(bytes.len(), error)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
                let name = self.root.file_name().unwrap_or_default().display();
                Err(Error::io("read", &path, error).hint(format!(
                    "check what it says and take the right to write it from others, or \"pgcairn stop {name}\" removes the \
                     clone, with what was written"
                )))
            }
            Err(error) => Err(Error::io("read", &path, error)),
        }
    }

    fn damaged(&self, bytes: usize, error: serde_json::Error) -> Error {
        let (path, name) = (self.record(), self.root.file_name().unwrap_or_default().display());
        let what = if bytes == 0 { "is empty" } else { "is damaged" };
        Error::new(format!("{} {what}: which backup the clone stands on is not known", path.display()))
            .hint(format!("\"pgcairn stop {name}\" ends what runs of it and removes it, with what was written"))
            .source(error)
    }

    /// Removes all of it but, with `keep_scratch`, what was written.
    pub fn remove(&self, keep_scratch: bool) -> Result<()> {
        let remove = |path: &Path| match fs::remove_dir_all(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io("remove", path, error)),
            _ => Ok(()),
        };
        if keep_scratch {
            remove(&self.run())?;
            // not remove_dir_all: should the mount still be there, nothing in it must be touched
            return match fs::remove_dir(self.mount()) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    Err(Error::io("remove", &self.mount(), error))
                }
                _ => Ok(()),
            };
        }
        match fs::remove_dir(self.mount()) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io("remove", &self.mount(), error));
            }
            _ => {}
        }
        remove(&self.root)
    }
}

/// Reads a record that nobody else can have written: an older program, with a umask of 0, let everybody write it.
fn read_record(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut options = File::options();
    let mut file =
        files::require_regular(options.read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)?)?;
    let (found, own) = (file.metadata()?, nix::unistd::geteuid());
    // a user's own group may be the user alone
    let others = if own.is_root() { 0o022 } else { 0o002 };
    if found.uid() != own.as_raw() || found.mode() & others != 0 {
        let why = format!("others may have written it (owner {}, mode {:o})", found.uid(), found.mode() & 0o7777);
        return Err(std::io::Error::new(std::io::ErrorKind::PermissionDenied, why));
    }
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).map(|_| bytes)
}

/// Where clones live unless told otherwise.
pub fn default_base() -> Result<PathBuf> {
    state_directory("/var/lib/pgcairn/clones", "XDG_STATE_HOME", ".local/state", "pgcairn/clones", "--clone-path")
}

impl Clone {
    /// `pg_ctl` as the server's user.
    pub fn pg_ctl(&self, place: &Place) -> Command {
        let mut command = self.program("pg_ctl");
        command.arg("-D").arg(place.mount());
        command
    }

    /// A program of PostgreSQL as the server's user.
    pub fn program(&self, name: &str) -> Command {
        self.command(&self.programs.join(name))
    }

    /// Any program as the server's user, without the environment of whoever started the clone.
    pub fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        if nix::unistd::geteuid().is_root() {
            command.uid(self.uid).gid(self.gid);
        }
        environment::clean(&mut command, self.uid);
        command.current_dir("/");
        command
    }

    /// How people reach it.
    pub fn conninfo(&self, place: &Place, login: &Login) -> String {
        self.reached_with(place, login, if login.without_libraries { WITHOUT_LIBRARIES } else { "" })
    }

    /// How this program reaches it: with the settings that its own sessions have.
    pub fn own_conninfo(&self, place: &Place, login: &Login) -> String {
        let mut options = session::of_clone(login.major, login.with_triggers);
        if login.without_libraries {
            options = format!("{options} {WITHOUT_LIBRARIES}");
        }
        self.reached_with(place, login, &options)
    }

    fn reached_with(&self, place: &Place, login: &Login, options: &str) -> String {
        let (host, user, database) = (place.run(), conninfo::value(&login.user), conninfo::value(&login.database));
        let host = conninfo::value(&host.to_string_lossy());
        let mut text = format!("host={host} port={} user={user} dbname={database}", self.port);
        if !options.is_empty() {
            text.push_str(&format!(" options={}", conninfo::value(options)));
        }
        text
    }
}

/// Settings of one session, which beat those of its role and database: nothing that must be loaded first.
const WITHOUT_LIBRARIES: &str = "-c session_preload_libraries= -c local_preload_libraries=";

/// A role and a database that a clone's server lets in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Login {
    /// the role
    pub user: String,
    /// the database
    pub database: String,
    /// without the libraries that are loaded into each session: one of them cannot be
    pub without_libraries: bool,
    /// the server's major version
    pub major: u32,
    /// with the triggers on logins, since this role may not turn them off
    pub with_triggers: bool,
}
