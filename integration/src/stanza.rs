//! A stanza of a throwaway repository: the arguments every run needs, its mounts, and the clones started from it.

use std::ffi::OsStr;
use std::fs::{self, Permissions};
use std::ops::Deref;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::bin::{self, Output, run_command};
use crate::client::Client;
use crate::cluster::{Builder, Cluster};
use crate::install;
use crate::mounts::MountGuard;
use crate::place::Place;
use crate::wait::poll;

/// The stanza's name.
pub const NAME: &str = "main";

/// How long processes may take to end.
const ENDING: Duration = Duration::from_secs(30);

/// Tells where the passphrase is.
pub const PASS_FILE: &str = "PGCAIRN_REPO_CIPHER_PASS_FILE";

/// A stanza called [`NAME`] and where its runs keep their things.
#[derive(Debug)]
pub struct Stanza {
    repo: String,
    environment: Vec<(String, String)>,
    place: Place,
}

impl Stanza {
    /// In a directory of the server's user, so that its `archive_command` can write there.
    pub fn in_directory() -> Self {
        let place = Place::new();
        let repo = place.directory("repo").display().to_string();
        Self::with(place, repo, Vec::new())
    }

    /// In a repository somewhere else; `environment` is what every run needs to get there.
    pub fn at(repo: &str, environment: &[(&str, &str)]) -> Self {
        let owned = environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Self::with(Place::new(), repo.to_owned(), owned)
    }

    fn with(place: Place, repo: String, mut environment: Vec<(String, String)>) -> Self {
        for (name, directory) in [("PGCAIRN_CACHE_PATH", "cache"), ("PGCAIRN_CLONE_PATH", "clones")] {
            environment.push((name.to_owned(), place.join(directory).display().to_string()));
        }
        Self { repo, environment, place }
    }

    /// From now on its runs archive and fetch WAL through workers and a spool in its place.
    pub fn asynchronous(mut self) -> Self {
        for (name, directory) in [("PGCAIRN_SPOOL_PATH", "spool"), ("XDG_STATE_HOME", "state")] {
            let directory = self.place.directory(directory);
            // root has spools in it too, and trusts no directory of another user
            let of_all = install::server_user().is_some();
            if of_all && name == "PGCAIRN_SPOOL_PATH" {
                std::os::unix::fs::chown(&directory, Some(0), Some(0)).expect("root may give it away");
                fs::set_permissions(&directory, Permissions::from_mode(0o1777)).expect("an owner may change modes");
            }
            self.environment.push((name.to_owned(), directory.display().to_string()));
        }
        self.environment.push(("PGCAIRN_ARCHIVE_ASYNC".to_owned(), "y".to_owned()));
        self
    }

    /// From now on its runs have a passphrase, in a file that the server's user may read.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn with_passphrase(mut self, passphrase: &str) -> Self {
        let file = self.place.directory("passphrase").join("first");
        fs::write(&file, format!("{passphrase}\n")).expect("the passphrase can be written");
        fs::set_permissions(&file, Permissions::from_mode(0o600)).expect("its mode can be set");
        install::give_to_server_user(&file);
        self.environment.push((PASS_FILE.to_owned(), file.display().to_string()));
        self
    }

    /// The repository's URL or path.
    pub fn repo(&self) -> &str {
        &self.repo
    }

    /// What another program's environment must hold so that the `pgcairn` it runs finds this repository and its places.
    pub fn environment(&self) -> Vec<(&str, &str)> {
        let own = self.environment.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        own.chain([("PGCAIRN_REPO", self.repo.as_str())]).collect()
    }

    /// The directory for everything else.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// `pgcairn` for this stanza, ready to get a verb.
    pub fn command(&self) -> Command {
        self.prepared(bin::command())
    }

    /// Another command that runs `pgcairn`, such as in another mount namespace, with what every run of this stanza needs.
    pub fn prepared(&self, mut command: Command) -> Command {
        command.args(["--repo", &self.repo, "--stanza", NAME]);
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command
    }

    /// Runs `pgcairn` for this stanza to its end.
    pub fn run<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Output {
        run_command(self.command().args(arguments))
    }

    /// The same as the user that servers run as.
    pub fn run_as_server_user<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Output {
        run_command(self.prepared(install::as_server_user(bin::path())).args(arguments))
    }

    /// What `archive_command` should be.
    pub fn archive_command(&self) -> String {
        let quoted = |word: &str| format!("'{}'", word.replace('\'', "'\\''"));
        let environment = self.environment.iter().map(|(name, value)| format!("{name}={} ", quoted(value)));
        let environment: String = environment.collect();
        let program = bin::path().display().to_string();
        let repo = quoted(&self.repo);
        format!("{environment}{} --repo {repo} --stanza {NAME} archive-push %p", quoted(&program))
    }

    /// A server that archives into this stanza, once [`Self::create`] has made it.
    pub fn archiving(&self, builder: Builder) -> Builder {
        builder.conf("archive_mode", "on").conf("archive_command", &self.archive_command())
    }

    /// Makes the stanza, for this server.
    ///
    /// # Panics
    /// When that fails.
    pub fn create(&self, cluster: &Cluster) {
        self.run(["stanza-create", "--pg", cluster.conninfo()]).ok();
    }

    /// Takes a backup and gives its label.
    ///
    /// # Panics
    /// When that fails.
    pub fn backup(&self, cluster: &Cluster) -> String {
        let told = self.run(["backup", "--type=full", "--pg", cluster.conninfo()]).ok();
        let label = told.strip_prefix("backup ").and_then(|rest| rest.split_once(':')).map(|(label, _)| label);
        label.unwrap_or_else(|| panic!("no label in: {told}")).to_owned()
    }

    /// Mounts on a new directory of this name; `arguments` are further ones.
    ///
    /// # Panics
    /// When that fails.
    pub fn mount(&self, name: &str, arguments: &[&str]) -> MountGuard {
        let mountpoint = self.place.directory(name);
        let guard = MountGuard::new(&mountpoint);
        self.run([&["mount"][..], arguments].concat().into_iter().map(OsStr::new).chain([mountpoint.as_os_str()])).ok();
        guard
    }

    /// Starts a clone; `arguments` are further ones.
    ///
    /// # Panics
    /// When that fails.
    pub fn start(&self, name: &str, arguments: &[&str]) -> StartedClone<'_> {
        let told = self.run([&["start", "--name", name][..], arguments].concat()).ok();
        let conninfo = told.split('"').nth(1).unwrap_or_else(|| panic!("no connection string in: {told}"));
        StartedClone { stanza: self, name: name.to_owned(), client: Client::new(conninfo), told }
    }

    /// The directory of a clone of this name, whether it is there or not.
    pub fn clone_directory(&self, name: &str) -> PathBuf {
        self.place.join("clones").join(name)
    }

    /// Demands that no clone, mount or process is left.
    ///
    /// # Panics
    /// When there is.
    #[track_caller]
    pub fn assert_nothing_left(&self) {
        let clones = self.place.join("clones");
        let left: Vec<_> = fs::read_dir(&clones).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
        assert!(left.is_empty(), "clones are left: {left:?}");
        // a server has removed its lock file before its process is gone
        let gone = poll(ENDING, || self.place.leftovers().is_empty().then_some(()));
        assert!(gone.is_some(), "{:?}", self.place.leftovers());
    }
}

/// A clone's server; it derefs to a [`Client`]. [`Place`] ends it, if [`Self::stop`] does not.
#[derive(Debug)]
pub struct StartedClone<'a> {
    stanza: &'a Stanza,
    name: String,
    client: Client,
    told: String,
}

impl StartedClone<'_> {
    /// What `pgcairn start` said.
    pub fn told(&self) -> &str {
        &self.told
    }

    /// Its data directory, which is a mount.
    pub fn data_directory(&self) -> PathBuf {
        self.stanza.clone_directory(&self.name).join("data")
    }

    /// The postmaster's process id.
    ///
    /// # Panics
    /// When it does not run.
    pub fn pid(&self) -> i32 {
        let text = fs::read_to_string(self.data_directory().join("postmaster.pid")).expect("the server runs");
        text.lines().next().and_then(|line| line.parse().ok()).expect("a process id")
    }

    /// The mount's daemon.
    ///
    /// # Panics
    /// When it is gone.
    pub fn daemon(&self) -> i32 {
        let status = fs::read_to_string(self.data_directory().join(".pgcairn/status")).expect("the mount answers");
        number(&status, "pid") as i32
    }

    /// Stops it; `arguments` are further ones.
    ///
    /// # Panics
    /// When that fails.
    pub fn stop(self, arguments: &[&str]) {
        self.stanza.run([&["stop", &self.name][..], arguments].concat()).ok();
    }
}

impl Deref for StartedClone<'_> {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.client
    }
}

/// A number in the status of a mount.
///
/// # Panics
/// When the status has none of that name.
pub fn number(status: &str, name: &str) -> u64 {
    let (_, rest) = status.split_once(&format!("\"{name}\":")).unwrap_or_else(|| panic!("no {name} in {status}"));
    let digits: String = rest.trim_start().chars().take_while(char::is_ascii_digit).collect();
    digits.parse().unwrap_or_else(|_| panic!("{name} is no number in {status}"))
}

/// The status of the mount at `path`.
///
/// # Panics
/// When it cannot be read.
pub fn status(path: &Path) -> String {
    fs::read_to_string(path.join(".pgcairn/status")).expect("a mount has a status")
}
