//! The `pgcairn` under test, and what its runs must say.

use std::env;
use std::ffi::OsStr;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use crate::install;
use crate::process::{Finished, run};

/// How long one run may take.
const TIMEOUT: Duration = Duration::from_secs(300);

/// The binary: `PGCAIRN_BIN`, or the one cargo built beside this test's own executable; a copy of it if the server's user
/// cannot run it where it is, as below `/root`.
///
/// # Panics
/// When there is none.
pub fn path() -> PathBuf {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        let built = built();
        let runs =
            install::as_server_user(&built).arg("--version").output().is_ok_and(|output| output.status.success());
        if runs { built } else { copy_for_servers(&built) }
    })
    .clone()
}

/// A copy that the server's user can run, made once for each build.
fn copy_for_servers(built: &Path) -> PathBuf {
    let stamp = fs::metadata(built).and_then(|found| found.modified()).expect("the program is there");
    let directory = install::cache().join("program");
    fs::create_dir_all(&directory).unwrap_or_else(|error| panic!("cannot make {}: {error}", directory.display()));
    let name = built.display().to_string().replace('/', "-");
    let copy = directory.join(format!("pgcairn{name}"));
    if fs::metadata(&copy).and_then(|found| found.modified()).is_ok_and(|made| made >= stamp) {
        return copy;
    }
    let fresh = directory.join(format!("{}.{}", copy.file_name().expect("named above").display(), std::process::id()));
    fs::copy(built, &fresh).unwrap_or_else(|error| panic!("cannot write {}: {error}", fresh.display()));
    fs::set_permissions(&fresh, Permissions::from_mode(0o755)).expect("an owner may change modes");
    fs::rename(&fresh, &copy).unwrap_or_else(|error| panic!("cannot write {}: {error}", copy.display()));
    copy
}

fn built() -> PathBuf {
    let path = env::var_os("PGCAIRN_BIN").map(PathBuf::from).unwrap_or_else(|| {
        let test = env::current_exe().expect("this test has an executable");
        // target/<profile>/deps/<test>
        let profile = test.ancestors().nth(2).expect("cargo puts tests two levels deep");
        profile.join("pgcairn")
    });
    assert!(path.exists(), "{} is missing; run \"cargo build\" first, or set PGCAIRN_BIN", path.display());
    path
}

/// A command that runs the binary without this environment's `PG...` variables, ready to get arguments.
pub fn command() -> Command {
    install::clean(Command::new(path()))
}

/// Runs `pgcairn` with these arguments to its end.
///
/// # Panics
/// When it does not end within five minutes.
pub fn pgcairn<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Output {
    run_command(command().args(arguments))
}

/// Runs a command to its end.
///
/// # Panics
/// When it does not end within five minutes.
pub fn run_command(command: &mut Command) -> Output {
    let Finished { status, stdout, stderr } = run(command, &[], TIMEOUT);
    Output {
        command: format!("{command:?}"),
        code: status.code(),
        stdout: String::from_utf8_lossy(&stdout).into_owned(),
        stderr: String::from_utf8_lossy(&stderr).into_owned(),
    }
}

/// What a run came to.
#[derive(Clone, Debug)]
pub struct Output {
    /// what was run
    pub command: String,
    /// the exit status; `None` when a signal ended it
    pub code: Option<i32>,
    /// what it wrote
    pub stdout: String,
    /// what it complained about
    pub stderr: String,
}

impl Output {
    /// Demands success, and gives what was written.
    ///
    /// # Panics
    /// When the run failed, with all it said.
    #[track_caller]
    pub fn ok(self) -> String {
        assert!(self.code == Some(0), "this should have succeeded: {}", self.told());
        self.stdout
    }

    /// Demands a failure with this exit status, and this text in what it complained about.
    ///
    /// # Panics
    /// When the run ended otherwise, with all it said.
    #[track_caller]
    pub fn fails(self, code: i32, text: &str) -> Self {
        assert!(self.code == Some(code), "this should have failed with {code}: {}", self.told());
        assert!(self.stderr.contains(text), "this should have said \"{text}\": {}", self.told());
        self
    }

    fn told(&self) -> String {
        let Self { command, code, stdout, stderr } = self;
        format!("{command}\nexit status: {code:?}\nstdout: {stdout}\nstderr: {stderr}")
    }
}
