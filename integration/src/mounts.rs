//! The end of a mount and of its daemon, whatever state a test left them in.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::process::is_running;
use crate::wait::poll;
use crate::watchdog::Watchdog;

/// Unmounts a path when dropped, and kills the daemons that serve it. Harmless when nothing is mounted there.
#[derive(Debug)]
pub struct MountGuard {
    mountpoint: PathBuf,
    daemons: Vec<i32>,
    _watchdog: Watchdog,
}

/// Mounts may lie on top of one another. The daemon ends by itself when its connection is gone.
const CLEAN_UP: &str = r#"
tries=0
while [ $tries -lt 10 ] && grep -qF " $1 " /proc/self/mountinfo; do
    umount -l "$1" || fusermount3 -uz "$1"
    tries=$((tries + 1))
done
"#;

impl MountGuard {
    /// Guards a mountpoint; call it before mounting.
    ///
    /// # Panics
    /// When the directory is not there.
    pub fn new(mountpoint: &Path) -> Self {
        let mountpoint = mountpoint
            .canonicalize()
            .unwrap_or_else(|error| panic!("cannot find the mountpoint {}: {error}", mountpoint.display()));
        let watchdog = Watchdog::start(CLEAN_UP, &[mountpoint.as_os_str()]);
        Self { mountpoint, daemons: Vec::new(), _watchdog: watchdog }
    }

    /// A process to be killed with the mount, beside those found by the mountpoint among their arguments.
    pub fn daemon(&mut self, pid: i32) {
        self.daemons.push(pid);
    }

    /// The mountpoint.
    pub fn path(&self) -> &Path {
        &self.mountpoint
    }

    /// The processes of the binary under test that were started with this mountpoint as an argument.
    pub fn serving(&self) -> Vec<i32> {
        daemons_of(&self.mountpoint)
    }
}

impl Drop for MountGuard {
    fn drop(&mut self) {
        let mut daemons = self.serving();
        daemons.append(&mut self.daemons);
        for _ in 0..10 {
            let Some(mount) = mount_at(&self.mountpoint) else { break };
            if mount.kind.starts_with("fuse") {
                // ends every request that hangs; not there for every kernel and user, and rarely needed
                let _ = fs::write(format!("/sys/fs/fuse/connections/{}/abort", mount.device_minor), "1");
            }
            unmount_lazily(&self.mountpoint);
        }
        for pid in daemons {
            let ended = poll(Duration::from_secs(2), || (!is_running(pid)).then_some(()));
            if ended.is_none() {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
    }
}

/// Whether something is mounted there.
pub fn is_mounted(path: &Path) -> bool {
    mount_at(path).is_some()
}

struct Mount {
    /// for FUSE this names the connection
    device_minor: u32,
    kind: String,
}

/// The mount on top at this path.
fn mount_at(path: &Path) -> Option<Mount> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    mounts.lines().rev().find_map(|line| {
        // <id> <parent> <major>:<minor> <root> <mountpoint> <options> <more> - <kind> ...
        let (fields, source) = line.split_once(" - ")?;
        let mut fields = fields.split(' ');
        let (_, minor) = fields.nth(2)?.split_once(':')?;
        let mountpoint = unescaped(fields.nth(1)?);
        if Path::new(&mountpoint) != path {
            return None;
        }
        Some(Mount { device_minor: minor.parse().ok()?, kind: source.split(' ').next()?.to_owned() })
    })
}

/// The kernel writes white space and backslashes as three octal digits.
fn unescaped(field: &str) -> String {
    let escapes = [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")];
    escapes.into_iter().fold(field.to_owned(), |text, (code, plain)| text.replace(code, plain))
}

fn unmount_lazily(path: &Path) {
    for (program, options) in [("umount", "-l"), ("fusermount3", "-uz")] {
        let status = Command::new(program).arg(options).arg(path).stderr(Stdio::null()).status();
        if status.is_ok_and(|status| status.success()) {
            return;
        }
    }
}

fn daemons_of(mountpoint: &Path) -> Vec<i32> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let own = i32::try_from(std::process::id()).unwrap_or_default();
    pids.filter(|&pid| pid != own && is_daemon_of(pid, mountpoint)).collect()
}

fn is_daemon_of(pid: i32, mountpoint: &Path) -> bool {
    let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let mut arguments = arguments.split(|&byte| byte == 0).map(String::from_utf8_lossy);
    let program = arguments.next().unwrap_or_default();
    Path::new(program.as_ref()).file_name().is_some_and(|name| name == "pgcairn")
        && arguments.any(|argument| Path::new(argument.as_ref()) == mountpoint)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_what_is_mounted() {
        assert!(is_mounted(Path::new("/proc")));
        assert!(!is_mounted(Path::new("/proc/self")));
        assert_eq!(unescaped("/a\\040b\\134c"), "/a b\\c");
    }

    #[test]
    fn a_guard_of_nothing_does_nothing() {
        let directory = tempfile::tempdir().expect("a temporary directory can be made");
        let guard = MountGuard::new(directory.path());
        assert!(guard.serving().is_empty());
        drop(guard);
        assert!(directory.path().exists());
    }
}
