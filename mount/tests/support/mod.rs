//! A mount served by a process of its own: this one must be able to kill it, and must never serve what it reads.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pgcairn_mount::{Mount, Options, Scratch, Tree, Writes, boot_id, mountpoint};

pub(crate) mod tree;

const MOUNTPOINT: &str = "PGCAIRN_TEST_MOUNTPOINT";
const SCRATCH: &str = "PGCAIRN_TEST_SCRATCH";
const WRITES: &str = "PGCAIRN_TEST_WRITES";
const BOOT: &str = "PGCAIRN_TEST_BOOT";
/// The name of the test that serves instead of testing.
const HELPER: &str = "serve_for_another_test";

/// Every way of writes.
pub(crate) const ALL_WRITES: [Writes; 3] = [Writes::Through, Writes::Passthrough, Writes::Back];

/// The body of the helper test: serves the sample tree until unmounted, if it was started by [`Daemon`].
pub(crate) fn serve() {
    let Some(mountpoint) = std::env::var_os(MOUNTPOINT) else { return };
    let boot = std::env::var(BOOT).unwrap_or_else(|_| boot_id().unwrap());
    let scratch = std::env::var_os(SCRATCH).map(|dir| Scratch::open(Path::new(&dir), "sample", &boot).unwrap());
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
    /// which start of the machine this is, if not the real one
    pub(crate) boot: Option<String>,
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

    /// With its scratch on another disk; not started yet.
    pub(crate) fn on(scratch: PathBuf, writes: Writes) -> Self {
        let mut daemon = Self::prepared(writes);
        daemon.scratch = Some(scratch);
        daemon
    }

    fn prepared(writes: Writes) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mountpoint = dir.path().join("mnt");
        std::fs::create_dir(&mountpoint).unwrap();
        Self { child: None, mountpoint, scratch: None, boot: None, writes, dir }
    }

    fn new(writable: bool, writes: Writes) -> Self {
        let mut daemon = Self::prepared(writes);
        daemon.scratch = writable.then(|| daemon.dir.path().join("scratch"));
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
        if let Some(boot) = &self.boot {
            command.env(BOOT, boot);
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
        self.wait();
    }

    /// Waits for the end of the daemon.
    pub(crate) fn wait(&mut self) {
        let Some(child) = &mut self.child else { return };
        let began = Instant::now();
        while child.try_wait().unwrap().is_none() {
            assert!(began.elapsed() < Duration::from_secs(60), "the daemon does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(self.child.take().is_none_or(|mut child| child.wait().unwrap().success()));
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

/// Numbers that are the same for the same seed.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}
