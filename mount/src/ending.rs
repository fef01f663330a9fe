//! The end of a mount: who finds out that it is over, and how its connection to the kernel is closed.
//!
//! The kernel ends the session of a mount when the last view of it is gone, in whatever mount namespace. A service with
//! a private `/tmp`, a container or `unshare -m` keeps a copy that nobody uses and nobody unmounts. So the daemon
//! watches its own mount, and ends the session itself once that was unmounted and no process uses a copy.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::sync::mpsc::Sender;
use std::thread;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::error::{Error, Result};
use crate::mountpoint::{self, MountEntry};
use crate::users::users;

/// How a mount came to its end.
#[derive(Debug)]
pub(crate) enum Ended {
    /// the kernel closed the session: no view of the mount is left
    Session(io::Result<()>),
    /// our mount was unmounted, and nobody uses what copies there are
    Left,
}

/// How often the users of a copy are looked for.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// Tells when `entry` was unmounted from this process's namespace and no process uses a copy of it elsewhere.
pub(crate) fn watch(entry: MountEntry, ended: Sender<Ended>) -> Result<()> {
    let path = "/proc/self/mountinfo";
    let failed = |source| Error::io("watch", path, source);
    // opened before the first look, so that no change falls between them
    let table = File::open(path).map_err(failed)?;
    let watcher = thread::Builder::new().name("watch".to_owned());
    let run = move || {
        while is_mounted(&entry) {
            let changed = PollFlags::POLLPRI | PollFlags::POLLERR;
            _ = poll(&mut [PollFd::new(table.as_fd(), changed)], PollTimeout::NONE);
        }
        let mut told = false;
        loop {
            let users = users(&entry.device).living;
            if users.is_empty() {
                break;
            }
            if !told {
                tracing::info!(?users, "unmounted, and served on for those who use a copy in another mount namespace");
                told = true;
            }
            thread::sleep(LOOK_AGAIN);
        }
        // nobody waits for it where the kernel closed the session
        _ = ended.send(Ended::Left);
    };
    watcher.spawn(run).map(drop).map_err(failed)
}

/// By number and device: the directories above a mount may be renamed, and a bind mount is not it.
fn is_mounted(entry: &MountEntry) -> bool {
    // where it cannot be found out, the kernel's word decides
    mountpoint::mounts()
        .map_or(true, |mounts| mounts.iter().any(|other| (other.id, &other.device) == (entry.id, &entry.device)))
}

/// Closes the connection to the kernel, so that copies of the mount fail at once. False where the file system that
/// can do this is not mounted, as in containers: the end of this process does it then.
pub(crate) fn abort(device: &str) -> bool {
    let Some((_, connection)) = device.split_once(':') else { return false };
    fs::write(format!("/sys/fs/fuse/connections/{connection}/abort"), "1").is_ok()
}
