//! Where servers, clients and users are found on this machine; `scripts/setup.sh` puts them there.

use std::env;
use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::unistd::{Uid, User};

/// The major whose clients (psql, pgbench, pg_dumpall, ...) talk to servers of every major.
pub const CLIENT_MAJOR: u32 = 15;

/// Where `scripts/setup.sh` unpacks the majors that Debian does not have, unless `PGCAIRN_TEST_CACHE` says otherwise.
pub const CACHE: &str = "/var/cache/pgcairn-test";

/// Where the tests keep what serves many runs.
pub fn cache() -> PathBuf {
    env::var_os("PGCAIRN_TEST_CACHE").map_or_else(|| PathBuf::from(CACHE), PathBuf::from)
}

/// What `scripts/setup.sh` put into the cache.
///
/// # Panics
/// When it is not there.
pub fn in_cache(path: &str) -> PathBuf {
    let path = cache().join(path);
    assert!(path.exists(), "{} is missing; run \"scripts/setup.sh\"", path.display());
    path
}

/// The directory with `initdb`, `pg_ctl` and `postgres` of a major, if it is installed.
pub fn find_server(major: u32) -> Option<PathBuf> {
    [debian(major), cache().join(format!("pg{major}/native/bin"))].into_iter().find(|bin| bin.join("initdb").exists())
}

/// As [`find_server`].
///
/// # Panics
/// When the major is not installed.
pub fn server(major: u32) -> PathBuf {
    find_server(major).unwrap_or_else(|| {
        panic!("PostgreSQL {major} is not installed; run \"scripts/setup.sh {major}\"");
    })
}

/// A client program of [`CLIENT_MAJOR`], ready to get arguments.
pub fn client(name: &str) -> Command {
    // not /usr/bin/psql: that is a wrapper which looks for clusters first
    let program = debian(CLIENT_MAJOR).join(name);
    assert!(program.exists(), "{} is missing; run \"scripts/setup.sh\"", program.display());
    clean(Command::new(program))
}

fn debian(major: u32) -> PathBuf {
    PathBuf::from(format!("/usr/lib/postgresql/{major}/bin"))
}

/// A command without this environment's `PG...` variables (so none of `PGCAIRN_...` either), speaking English.
pub fn clean(mut command: Command) -> Command {
    for (name, _) in env::vars_os() {
        if name.to_string_lossy().starts_with("PG") {
            command.env_remove(name);
        }
    }
    command.env("LC_ALL", "C");
    command
}

/// The user that servers run as: `postgres` when the tests run as root, since PostgreSQL refuses to be root.
pub fn server_user() -> Option<User> {
    if !Uid::effective().is_root() {
        return None;
    }
    let user = User::from_name("postgres").expect("the user database can be read");
    Some(user.expect("tests that run as root need a user \"postgres\"; run \"scripts/setup.sh\""))
}

/// A command that runs as [`server_user`], in a directory that user can enter.
pub fn as_server_user(program: impl AsRef<Path>) -> Command {
    let mut command = clean(Command::new(program.as_ref()));
    command.current_dir("/");
    if let Some(user) = server_user() {
        command.uid(user.uid.as_raw()).gid(user.gid.as_raw()).env("HOME", user.dir);
    }
    command
}

/// Makes a directory that belongs to [`server_user`].
///
/// # Panics
/// When it cannot be made.
pub fn make_server_directory(path: &Path, mode: u32) {
    fs::create_dir(path).unwrap_or_else(|error| panic!("cannot make {}: {error}", path.display()));
    // not at creation: the umask would have a say
    fs::set_permissions(path, Permissions::from_mode(mode)).expect("an owner may change modes");
    give_to_server_user(path);
}

/// Makes a file or directory, not what is below it, belong to [`server_user`]: what a test wrote into a data directory.
///
/// # Panics
/// When it is not there.
pub fn give_to_server_user(path: &Path) {
    if let Some(user) = server_user() {
        chown(path, Some(user.uid.as_raw()), Some(user.gid.as_raw()))
            .unwrap_or_else(|error| panic!("cannot give {} away: {error}", path.display()));
    }
}
