//! A daemon that is ready when the command returns: the program starts itself again in the background, and waits for one
//! line on the child's standard output.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::error::{Error, Result};
use crate::files;
use crate::interrupt;
use crate::user::make_with_parents;

/// What the child writes when it is ready.
const READY: &str = "ready";
/// Tells a mount's daemon that the mount is about to end: what hangs need not be waited for. A program that does not know it
/// ignores it.
pub(super) const HURRY: Signal = Signal::SIGURG;
/// Set in the child's environment.
const VARIABLE: &str = "PGCAIRN_DAEMON";

/// True in the background child.
pub(super) fn is_child() -> bool {
    std::env::var_os(VARIABLE).is_some()
}

/// Starts this program with `arguments` in the background; returns when it is ready.
///
/// # Errors
/// What the child failed of, in its own words.
pub(super) fn spawn(arguments: &[String], secrets: &[(&str, &str)], log: &Path) -> Result<u32> {
    if let Some(parent) = log.parent() {
        make_with_parents(parent, 0o755).map_err(|error| Error::io("create", parent, error))?;
    }
    let log_file = open_log(log);
    let log_file = log_file.map_err(|error| Error::io("open the log", log, error))?;
    let program = std::env::current_exe().map_err(|error| Error::io("find", Path::new("pgcairn"), error))?;
    let mut command = Command::new(&program);
    command.args(arguments).env(VARIABLE, "1").envs(secrets.iter().copied()).current_dir("/");
    // glibc keeps an arena of its own for each of many threads, full of freed buffers: measured, this halves the daemon
    command.env("MALLOC_ARENA_MAX", "2").env("MALLOC_MMAP_THRESHOLD_", "1000000");
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log_file).spawn();
    let mut child = child.map_err(|error| Error::io("start", &program, error))?;
    let mut answer = String::new();
    let waited_for = interrupt::Guard::child(child.id());
    if let Some(stdout) = child.stdout.take() {
        _ = BufReader::new(stdout).read_line(&mut answer);
    }
    drop(waited_for);
    if answer.trim_end() == READY {
        return Ok(child.id());
    }
    _ = child.wait();
    let mut told = answer.trim_end().split('\t');
    let what = told.next().filter(|what| !what.is_empty()).unwrap_or("the mount daemon died");
    let error = Error::new(what.to_owned());
    Err(error.hint(told.next().map_or_else(|| format!("see {}", log.display()), str::to_owned)))
}

/// Starts this program with `arguments` in the background, and does not wait for anything.
pub(super) fn launch(arguments: &[String], secrets: &[(&str, &str)], log: &Path) -> Result<Child> {
    // a log that cannot be written is no reason not to work
    let log_file = log.parent().and_then(|parent| {
        make_with_parents(parent, 0o755).ok()?;
        open_log(log).ok()
    });
    let log_file = log_file.map_or_else(Stdio::null, Stdio::from);
    let program = std::env::current_exe().map_err(|error| Error::io("find", Path::new("pgcairn"), error))?;
    let mut command = Command::new(&program);
    command.args(arguments).envs(secrets.iter().copied()).current_dir("/");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log_file);
    command.spawn().map_err(|error| Error::io("start", &program, error))
}

/// Nothing but a regular file, since another user may have put a link or a pipe there.
fn open_log(log: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.create(true).append(true).mode(0o644).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    files::require_regular(options.open(log)?)
}

/// Has the daemons that serve this mountpoint give up what a store that hangs keeps them waiting for.
pub(super) fn hurry(mountpoint: &Path) {
    for pid in serving(mountpoint) {
        // one that is not ours to signal takes the time that it takes
        _ = kill(pid, HURRY);
    }
}

/// The processes that mount there, by their arguments: also one whose mount is out of sight.
fn serving(mountpoint: &Path) -> Vec<Pid> {
    let mountpoint = mountpoint.canonicalize().unwrap_or_else(|_| mountpoint.to_owned());
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let name = |program: &OsStr| Path::new(program).file_name().map(OsStr::to_owned);
    let our_name = std::env::args_os().next().and_then(|program| name(&program));
    let serves = |pid: &i32| {
        let directory = PathBuf::from(format!("/proc/{pid}"));
        let line = fs::read(directory.join("cmdline")).unwrap_or_default();
        let mut words = line.split(|byte| *byte == 0).map(OsStr::from_bytes);
        if words.next().and_then(name) != our_name {
            return false;
        }
        let words: Vec<&OsStr> = words.collect();
        let is_there = |word: &&OsStr| {
            let named = Path::new(word);
            // of one in the foreground it may be relative
            let path = || fs::read_link(directory.join("cwd")).ok()?.join(named).canonicalize().ok();
            named == mountpoint || (!named.as_os_str().is_empty() && path().is_some_and(|path| path == mountpoint))
        };
        words.contains(&OsStr::new("mount")) && words.iter().any(is_there)
    };
    let own = std::process::id().cast_signed();
    numbers.filter(|pid| *pid != own && serves(pid)).map(Pid::from_raw).collect()
}

/// In the child: closes what was inherited beside the standard streams, such as a server's sockets.
pub(super) fn let_go() {
    let open = fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    let numbers: Vec<i32> = open.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    for number in numbers.into_iter().filter(|number| *number > 2) {
        // the one by which they were listed is closed already
        _ = nix::unistd::close(number);
    }
}

/// In the child: tells the parent that the daemon is ready, and lets go of the terminal.
pub(super) fn ready() {
    tell(READY);
}

/// In the child: tells the parent why it never will be.
pub(super) fn failed(error: &Error) {
    tell(&format!("{}\t{}", error.told().replace(['\n', '\t'], " "), error.hint_text().unwrap_or_default()));
}

/// In the child: leaves the session of the terminal, so that Ctrl-C there does not end the mount. Its environment may hold
/// secrets, and a clone's server may run as the same user: nothing of the process can be read below /proc.
pub(super) fn detach() {
    _ = nix::unistd::setsid();
    _ = nix::sys::prctl::set_dumpable(false);
}

fn tell(line: &str) {
    let mut stdout = std::io::stdout();
    _ = writeln!(stdout, "{line}");
    _ = stdout.flush();
}

/// Where daemons write what went wrong.
pub(super) fn log_path(name: &str) -> Result<PathBuf> {
    let directory = super::options::state_directory(
        "/var/log/pgcairn",
        "XDG_STATE_HOME",
        ".local/state",
        "pgcairn/log",
        "XDG_STATE_HOME=",
    )?;
    Ok(directory.join(format!("{name}.log")))
}
