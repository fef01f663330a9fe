//! A directory for all that a test makes with `pgcairn`; nothing in it, under it or running in it outlives the test.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::install;
use crate::watchdog::Watchdog;

/// A temporary directory; what is mounted below it is unmounted and what works in it is killed when this is dropped.
#[derive(Debug)]
pub struct Place {
    path: PathBuf,
    _watchdog: Watchdog,
    _directory: TempDir,
}

/// Ends the servers that work below `$1`, unmounts what is mounted there (daemons end with their mount), removes it.
const CLEAN_UP: &str = r#"
inside() {
    for process in /proc/[0-9]*; do
        case "$(readlink "$process/cwd" 2>/dev/null)" in
            "$1"/*) echo "${process#/proc/}";;
        esac
    done
}
for signal in QUIT KILL; do
    tries=0
    while pids=$(inside "$1") && [ -n "$pids" ] && [ $tries -lt 50 ]; do
        [ $tries = 0 ] && kill -$signal $pids
        tries=$((tries + 1))
        sleep 0.1
    done
done
awk -v top="$1/" 'index($5, top) == 1 { print $5 }' /proc/self/mountinfo | sort -r | while read -r mount; do
    umount -l "$mount" || fusermount3 -uz "$mount"
done
rm -rf --one-file-system "$1"
"#;

impl Place {
    /// A new one, which the server's user can enter.
    ///
    /// # Panics
    /// When it cannot be made.
    pub fn new() -> Self {
        Self::below(&std::env::temp_dir())
    }

    /// In memory, where this machine has a place for that: for more files than a busy disk makes and removes in a test.
    ///
    /// # Panics
    /// When it cannot be made.
    pub fn in_memory() -> Self {
        let memory = Path::new("/dev/shm");
        let space = nix::sys::statvfs::statvfs(memory);
        let enough = space.is_ok_and(|space| space.blocks_available() * space.fragment_size() > 2 << 30);
        if enough { Self::below(memory) } else { Self::new() }
    }

    fn below(parent: &Path) -> Self {
        let directory = tempfile::Builder::new().prefix("pgcairn-test.").tempdir_in(parent);
        let directory = directory.expect("a temporary directory can be made");
        let path = directory.path().canonicalize().expect("it is there");
        fs::set_permissions(&path, Permissions::from_mode(0o755)).expect("an owner may change modes");
        let watchdog = Watchdog::start(CLEAN_UP, &[path.as_os_str()]);
        Self { path, _watchdog: watchdog, _directory: directory }
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A path in it.
    pub fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// A new directory in it, of the server's user.
    ///
    /// # Panics
    /// When it cannot be made.
    pub fn directory(&self, name: &str) -> PathBuf {
        let path = self.path.join(name);
        install::make_server_directory(&path, 0o700);
        path
    }

    /// A new file system in it that holds `mib` MiB, so that it can be full; `None` for those who may not mount one.
    ///
    /// # Panics
    /// When its directory cannot be made.
    pub fn file_system(&self, name: &str, mib: u32) -> Option<PathBuf> {
        let path = self.directory(name);
        // as /tmp: root makes directories of its own in it
        let options = format!("size={mib}m,mode=1777");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(&path).output();
        mounted.is_ok_and(|output| output.status.success()).then_some(path)
    }

    /// Gives such a file system another size.
    ///
    /// # Panics
    /// When that fails.
    pub fn resize(&self, file_system: &Path, mib: u32) {
        let options = format!("remount,size={mib}m");
        let mounted = Command::new("mount").args(["-o", &options]).arg(file_system).status();
        assert!(mounted.is_ok_and(|status| status.success()), "cannot resize {}", file_system.display());
    }

    /// Processes that work in it, and mounts below it: what should be gone when everything was stopped.
    pub fn leftovers(&self) -> Vec<String> {
        let processes = fs::read_dir("/proc").into_iter().flatten().flatten().map(|entry| entry.path());
        let works_here =
            |process: &PathBuf| fs::read_link(process.join("cwd")).is_ok_and(|cwd| cwd.starts_with(&self.path));
        let mut found: Vec<String> = processes
            .filter(works_here)
            .map(|process| format!("{}: {}", process.display(), command(&process)))
            .collect();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let top = format!("{}/", self.path.display());
        found.extend(mounts.lines().filter(|line| line.contains(&top)).map(str::to_owned));
        found
    }
}

/// The command line of a process, given its directory in `/proc`.
fn command(process: &Path) -> String {
    let words = fs::read(process.join("cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&words).replace('\0', " ")
}

impl Default for Place {
    fn default() -> Self {
        Self::new()
    }
}
