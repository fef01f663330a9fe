//! A mount served by a process of its own: this one must be able to kill it, and must never serve what it reads.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pgcairn_mount::{Mount, Options, Scratch, Tree, Writes, mountpoint};

pub(crate) mod tree;

const MOUNTPOINT: &str = "PGCAIRN_TEST_MOUNTPOINT";
const SCRATCH: &str = "PGCAIRN_TEST_SCRATCH";
const WRITES: &str = "PGCAIRN_TEST_WRITES";
/// The name of the test that serves instead of testing.
const HELPER: &str = "serve_for_another_test";

/// Every way of writes.
pub(crate) const ALL_WRITES: [Writes; 3] = [Writes::Through, Writes::Passthrough, Writes::Back];

/// The body of the helper test: serves the sample tree until unmounted, if it was started by [`Daemon`].
pub(crate) fn serve() {
    let Some(mountpoint) = std::env::var_os(MOUNTPOINT) else { return };
    let scratch = std::env::var_os(SCRATCH).map(|dir| Scratch::open(Path::new(&dir), "sample").unwrap());
    let mut options = Options::new(mountpoint);
    options.allow_other = true;
    let writes = std::env::var(WRITES).unwrap();
    options.writes = ALL_WRITES.into_iter().find(|one| format!("{one:?}") == writes).unwrap();
    let tree: Arc<dyn Tree> = Arc::new(tree::sample());
    Mount::new(tree, scratch, &options).unwrap().wait().unwrap();
}

/// A running daemon with its directories; dropping it leaves nothing behind.
pub(crate) struct Daemon {
    child: Option<Child>,
    pub(crate) mountpoint: PathBuf,
    pub(crate) scratch: Option<PathBuf>,
    writes: Writes,
    dir: tempfile::TempDir,
}

impl Daemon {
    pub(crate) fn read_only() -> Self {
        Self::new(false, Writes::Through)
    }

    pub(crate) fn writable(writes: Writes) -> Self {
        Self::new(true, writes)
    }

    fn new(writable: bool, writes: Writes) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mountpoint = dir.path().join("mnt");
        std::fs::create_dir(&mountpoint).unwrap();
        let scratch = writable.then(|| dir.path().join("scratch"));
        let mut daemon = Self { child: None, mountpoint, scratch, writes, dir };
        daemon.start();
        daemon
    }

    pub(crate) fn start(&mut self) {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", HELPER, "--nocapture"])
            .env(MOUNTPOINT, &self.mountpoint)
            .env(WRITES, format!("{:?}", self.writes));
        command.stdin(Stdio::null()).stdout(Stdio::null());
        if let Some(scratch) = &self.scratch {
            command.env(SCRATCH, scratch);
        }
        let mut child = command.spawn().unwrap();
        let began = Instant::now();
        while mountpoint::mounted_on(&self.mountpoint).unwrap().is_none() {
            assert_eq!(child.try_wait().unwrap(), None, "the daemon ended");
            assert!(began.elapsed() < Duration::from_secs(60), "no mount");
            std::thread::sleep(Duration::from_millis(5));
        }
        // answered once the daemon and the kernel have agreed
        nix::sys::statvfs::statvfs(&self.mountpoint).unwrap();
        self.child = Some(child);
    }

    /// kill -9, and away with the dead mount.
    pub(crate) fn kill(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    pub(crate) fn unmount(&mut self) {
        mountpoint::unmount(&self.mountpoint).unwrap();
        if let Some(mut child) = self.child.take() {
            assert!(child.wait().unwrap().success());
        }
    }

    pub(crate) fn remount(&mut self) {
        self.unmount();
        self.start();
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.mountpoint.join(name)
    }

    /// A directory of the local disk, gone with the daemon.
    pub(crate) fn local(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.mountpoint, nix::mount::MntFlags::MNT_DETACH);
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
