use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::clones::{Clone, Place, default_base};
use super::mount::mount_error;
use super::{daemon, output};
use crate::error::{Error, Result};
use crate::files;
use crate::postgres::{CONTROL_FILE, ClusterState, ControlFile};

/// Stop a clone and remove all of it, or keep what was written
#[derive(Debug, Args)]
pub(super) struct Stop {
    /// Name of the clone
    name: String,
    /// Keep what was written; "pgcairn start --name NAME" continues it
    #[arg(long)]
    keep: bool,
    /// Directory in which clones live
    #[arg(long, env = "PGCAIRN_CLONE_PATH", value_name = "DIR")]
    clone_path: Option<PathBuf>,
}

impl Stop {
    pub(super) fn run(self) -> Result<()> {
        let place = Place::new(self.clone_path.as_deref(), &self.name)?;
        let clone = self.known(&place)?;
        let _turn = place.take()?;
        let ended = take_down(&place, clone.as_ref())?;
        place.remove(self.keep)?;
        output::line(&match (self.keep, ended) {
            (false, _) => format!("clone {} stopped, what was written is removed", self.name),
            (true, Ended::Cleanly) => format!("clone {} stopped, what was written is kept", self.name),
            (true, Ended::AsByCrash) => format!(
                "clone {} stopped, but its server could not shut down: what was written is kept as after a crash, and \
                 recovered at its next start",
                self.name
            ),
        });
        Ok(())
    }

    /// What is known of the clone: nothing where its record is missing or damaged. Then its directory alone must do, and
    /// suffices to remove it.
    fn known(&self, place: &Place) -> Result<Option<Clone>> {
        // before anything of it is believed, or removed
        if !place.is_own()? {
            return Err(self.unknown()?);
        }
        match place.load() {
            Ok(None) if place.is_clone() && !self.keep => Ok(None),
            Ok(None) => Err(self.unknown()?),
            Err(error) if place.is_clone() && !self.keep => {
                tracing::warn!("{error}; it is removed");
                Ok(None)
            }
            known => known,
        }
    }

    fn unknown(&self) -> Result<Error> {
        let base = self.clone_path.clone().map_or_else(default_base, Ok)?;
        let names: Vec<String> = std::fs::read_dir(&base)
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect();
        let error = Error::new(format!("there is no clone {} in {}", self.name, base.display()));
        Ok(match names.is_empty() {
            true => error.hint("\"pgcairn start\" makes one"),
            false => error.hint(format!("there are: {}", names.join(", "))),
        })
    }
}

/// Stops server and mount, then removes the clone's files.
pub(super) fn bring_down(place: &Place, clone: &Clone, keep: bool) -> Result<()> {
    take_down(place, Some(clone))?;
    place.remove(keep)
}

/// How a clone's server ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// after a checkpoint, or it did not run
    Cleanly,
    /// all that it had committed is in its WAL
    AsByCrash,
}

/// Stops server and mount, also where one of them died, or where it is not known how the server was started. Returns once
/// the scratch is free.
pub(super) fn take_down(place: &Place, clone: Option<&Clone>) -> Result<Ended> {
    // processes that wait for a store that hangs meet no signal before they have an answer, nor does anybody who looks
    daemon::hurry(&place.mount());
    // a lock file that a dead server left may name a process of somebody else by now
    let is_ours = running_server(place).is_some() && place.mount().join("postmaster.pid").exists();
    if let Some(clone) = clone.filter(|_| is_ours) {
        let mut command = clone.pg_ctl(place);
        command.args(["stop", "-s", "-w", "-t", "60", "-m", "fast"]);
        _ = command.output();
    }
    end_server(place)?;
    let ended = if is_ours && !is_shut_down(place) { Ended::AsByCrash } else { Ended::Cleanly };
    // that may have taken long
    daemon::hurry(&place.mount());
    let mounted = || pgcairn_mount::mountpoint::mounted_on(&place.mount()).map_err(mount_error);
    let started = Instant::now();
    while mounted()?.is_some() {
        match pgcairn_mount::unmount(&place.mount()) {
            // a server removes its lock files before its last process has left the directory
            Err(pgcairn_mount::Error::Busy { .. }) if started.elapsed() < Duration::from_secs(30) => {
                std::thread::sleep(Duration::from_millis(20));
            }
            other => {
                other.map_err(mount_error)?;
                break;
            }
        }
    }
    while mounted()?.is_some() || scratch_is_held(place) {
        if started.elapsed() > Duration::from_secs(30) {
            return Err(Error::new(format!("{} is still in use", place.mount().display()))
                .hint("somebody uses a copy of the mount in another mount namespace: end that, then try again"));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(ended)
}

/// Whether the server ended with a checkpoint, by its pg_control.
fn is_shut_down(place: &Place) -> bool {
    let control = files::read_regular(&place.mount().join(CONTROL_FILE)).ok();
    let control = control.and_then(|bytes| ControlFile::parse(&bytes).ok());
    control.is_some_and(|of| matches!(of.state, ClusterState::ShutDown | ClusterState::ShutDownInRecovery))
}

/// True while a server runs on a mount that works.
pub(super) fn is_running(place: &Place) -> Result<bool> {
    let mount = pgcairn_mount::mountpoint::mounted_on(&place.mount()).map_err(mount_error)?;
    let works = match mount {
        Some(_) => !pgcairn_mount::mountpoint::is_dead(&place.mount()),
        // taken out of sight, and served on
        None => scratch_is_held(place),
    };
    Ok(works && running_server(place).is_some())
}

/// Ends a server that pg_ctl could not: its mount may be dead, and its data directory with it.
pub(super) fn end_server(place: &Place) -> Result<()> {
    for (signal, patience) in [(Signal::SIGQUIT, Duration::from_secs(10)), (Signal::SIGKILL, Duration::from_secs(10))] {
        let started = Instant::now();
        let Some(pid) = running_server(place) else { return Ok(()) };
        _ = kill(pid, signal);
        while running_server(place).is_some() && started.elapsed() < patience {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    match running_server(place) {
        None => Ok(()),
        Some(pid) => Err(Error::new(format!("the clone's server, process {pid}, does not end"))),
    }
}

/// The process of the clone's server, if it is still that: process ids are used again.
pub(super) fn running_server(place: &Place) -> Option<Pid> {
    let pid: i32 = files::read_regular_text(&place.pid_file()).ok()?.trim().parse().ok()?;
    // the server's user writes that file: it must not name a process of somebody else
    let user = std::fs::metadata(place.run()).ok()?.uid();
    if std::fs::metadata(format!("/proc/{pid}")).ok()?.uid() != user {
        return None;
    }
    let command_line = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let directory = place.mount().into_os_string().into_vec();
    command_line.windows(directory.len()).any(|part| part == directory).then(|| Pid::from_raw(pid))
}

/// Has the clone's server read its configuration again.
pub(super) fn reload(place: &Place) -> Result<()> {
    let Some(server) = running_server(place) else { return Ok(()) };
    kill(server, Signal::SIGHUP).map_err(|error| Error::new("cannot reload the clone's server").source(error))
}

/// True while the mount's daemon has not let go of the scratch.
fn scratch_is_held(place: &Place) -> bool {
    let Ok(lock) = std::fs::File::open(place.scratch().join("lock")) else { return false };
    nix::fcntl::Flock::lock(lock, nix::fcntl::FlockArg::LockExclusiveNonblock).is_err()
}
