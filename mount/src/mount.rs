//! A running mount: threads that serve it, and the ways to end it.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::thread::{self, JoinHandle};

use fuser::{Config, MountOption, Session, SessionACL};

use crate::ending::{self, Ended};
use crate::error::{Error, Result};
use crate::fs::Fs;
use crate::mountpoint::{self, MountEntry, Patience};
use crate::scratch::Scratch;
use crate::serve::Server;
use crate::tree::Tree;

/// Where and how to mount.
#[derive(Clone, Debug)]
pub struct Options {
    /// an existing, empty directory
    pub mountpoint: PathBuf,
    /// users other than the one running the daemon may enter; the kernel then checks owners and modes.
    /// Needs root, or `user_allow_other` in /etc/fuse.conf
    pub allow_other: bool,
    /// what `mount` shows as the source
    pub fs_name: String,
    /// nothing can be written, whether there is a scratch or not
    pub read_only: bool,
    /// threads that serve requests; a request that waits for a fetch holds its thread
    pub threads: usize,
    /// how far the kernel reads ahead of a sequential reader, in KiB; best effort, needs root
    pub read_ahead_kib: u32,
    /// the way of writes to the scratch
    pub writes: Writes,
}

/// How writes reach the scratch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Writes {
    /// each comes to us as it is made
    Through,
    /// the same, but files that are all in the scratch are read and written by the kernel without asking us, where it can
    /// (root, Linux 6.9): for a server at work, whose WAL they are
    #[default]
    Passthrough,
    /// the kernel collects them and sends them in large requests, at the latest at an fsync: for replay, which writes the
    /// same pages again and again and syncs little. What was not synced goes with the kernel, or with us
    Back,
}

impl Options {
    /// The usual settings for a mountpoint.
    pub fn new(mountpoint: impl Into<PathBuf>) -> Self {
        Self {
            mountpoint: mountpoint.into(),
            allow_other: false,
            fs_name: "pgcairn".to_owned(),
            read_only: false,
            threads: 4,
            read_ahead_kib: 1024,
            writes: Writes::default(),
        }
    }
}

/// A mount being served by threads of this process. Dropping it unmounts.
///
/// This process itself must never touch files of the mount: a thread that serves it could wait for itself.
#[derive(Debug)]
pub struct Mount {
    session: Option<JoinHandle<()>>,
    ended: Receiver<Ended>,
    unmounter: Unmounter,
    fs: Arc<Fs>,
}

/// Ends a mount from another thread, such as one that waits for SIGTERM.
#[derive(Clone, Debug)]
pub struct Unmounter {
    mountpoint: PathBuf,
    entry: MountEntry,
}

impl Mount {
    /// Mounts `tree`, writable if there is a scratch. Files can be used as soon as this returns.
    pub fn new(tree: Arc<dyn Tree>, scratch: Option<Scratch>, options: &Options) -> Result<Self> {
        mountpoint::check(&options.mountpoint)?;
        check_device()?;
        raise_descriptor_limit();
        let fs = Arc::new(Fs::new(tree, scratch));
        let server = Server::new(Arc::clone(&fs), options.writes);
        let failed = |source| Error::Mount { path: options.mountpoint.clone(), source };
        let session =
            Session::new(server, &options.mountpoint, &config(options, fs.is_writable() && !options.read_only))
                .map_err(failed)?;
        let entry = mountpoint::mounted_on(&options.mountpoint)?
            .ok_or_else(|| Error::NotMounted { path: options.mountpoint.clone() })?;
        tune(&entry.device, options);
        let (tell, ended) = mpsc::channel();
        ending::watch(entry.clone(), tell.clone())?;
        let session = thread::Builder::new()
            .name("mount".to_owned())
            .spawn(move || {
                become_io_flusher();
                // nobody waits for it where the mount was left before
                _ = tell.send(Ended::Session(session.run()));
            })
            .map_err(failed)?;
        let unmounter = Unmounter { mountpoint: entry.path.clone(), entry };
        Ok(Self { session: Some(session), ended, unmounter, fs })
    }

    /// A handle that can end this mount while another thread waits for it.
    pub fn unmounter(&self) -> Unmounter {
        self.unmounter.clone()
    }

    /// Blocks until the mount is unmounted, by [`Unmounter`] or from outside, and makes the scratch durable. Where a
    /// copy of the mount is left in another mount namespace, its end is the end of this process.
    pub fn wait(self) -> Result<()> {
        self.wait_then(|| ())
    }

    /// The same. `ended` is called as soon as nobody uses the mount any more: what its tree still waits for then, nobody
    /// wants, and the scratch should not wait for it.
    pub fn wait_then(mut self, ended: impl FnOnce()) -> Result<()> {
        self.join(ended)
    }

    fn join(&mut self, tell: impl FnOnce()) -> Result<()> {
        let failed = |source| Error::Session { path: self.unmounter.mountpoint.clone(), source };
        let Some(session) = self.session.take() else { return Ok(()) };
        // closed without a word: its thread panicked
        let ended = self.ended.recv().unwrap_or_else(|_| Ended::Session(Err(io::Error::other("its thread panicked"))));
        tell();
        let closed = self.fs.close().map_err(failed);
        match ended {
            Ended::Session(result) => {
                _ = session.join();
                result.map_err(failed).and(closed)
            }
            Ended::Left => {
                // what a copy still asks for is refused by now; its threads end with the connection
                if ending::abort(&self.unmounter.entry.device) {
                    _ = session.join();
                }
                closed
            }
        }
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if self.session.is_none() {
            return;
        }
        // files still open keep a detached mount alive in its threads: nothing to join then
        let ended = match self.unmounter.unmount() {
            Err(Error::Busy { .. }) => return drop(self.unmounter.detach()),
            Err(error) => Err(error),
            Ok(()) => self.join(|| ()),
        };
        if let Err(error) = ended {
            tracing::warn!(%error, "unmount failed");
        }
    }
}

impl Unmounter {
    /// The mountpoint, absolute.
    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// Whether no process uses the mount, nor a copy of it in another mount namespace.
    pub fn is_idle(&self) -> bool {
        mountpoint::refuse_users(&self.entry).is_ok()
    }

    /// Unmounts; [`Error::Busy`] while files are open. Done already is no error.
    pub fn unmount(&self) -> Result<()> {
        self.end(Patience::WhenIdle)
    }

    /// Takes the mount out of sight at once; it is served on until its last file is closed.
    pub fn detach(&self) -> Result<()> {
        self.end(Patience::Detach)
    }

    fn end(&self, patience: Patience) -> Result<()> {
        match mountpoint::mounted_on(&self.mountpoint)? {
            // by device too: the mountpoint may serve another mount by now
            Some(entry) if entry.device == self.entry.device => {
                if patience == Patience::WhenIdle {
                    mountpoint::refuse_users(&entry)?;
                }
                mountpoint::unmount_once(&self.mountpoint, patience)
            }
            _ => Ok(()),
        }
    }
}

fn config(options: &Options, writable: bool) -> Config {
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::FSName(options.fs_name.clone()),
        // fuser's own Subtype does not reach the kernel when root mounts
        MountOption::CUSTOM("subtype=pgcairn".to_owned()),
        MountOption::NoDev,
        MountOption::NoSuid,
        MountOption::NoAtime,
        if writable { MountOption::RW } else { MountOption::RO },
    ];
    if options.allow_other {
        config.mount_options.push(MountOption::DefaultPermissions);
        config.acl = SessionACL::All;
    }
    config.n_threads = Some(options.threads.max(1));
    config.clone_fd = true;
    config
}

fn check_device() -> Result<()> {
    let path = "/dev/fuse";
    fs::OpenOptions::new().read(true).write(true).open(path).map(drop).map_err(|source| {
        let mode = fs::metadata(path).map(|metadata| format!("{:04o}", metadata.permissions().mode() & 0o7777));
        Error::Device { mode: mode.unwrap_or_else(|_| "absent".to_owned()), source }
    })
}

/// Without it a sequential reader gets 128 KiB per request, and writes are held up once a hundredth of the memory that the
/// machine grants to unwritten pages is full of them.
fn tune(device: &str, options: &Options) {
    let set = |name: &str, value: &str| {
        let path = format!("/sys/class/bdi/{device}/{name}");
        if let Err(error) = fs::write(&path, value) {
            tracing::debug!(%error, path, "stays as it is");
        }
    };
    set("read_ahead_kb", &options.read_ahead_kib.to_string());
    if options.writes == Writes::Back {
        set("strict_limit", "0");
        set("max_ratio", "100");
    }
}

/// Every open file of the scratch costs a descriptor, and PostgreSQL keeps a thousand of them per process.
#[allow(unsafe_code, reason = "getrlimit and setrlimit")]
fn raise_descriptor_limit() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both calls read or write the struct on our stack, which outlives them.
    let raised = unsafe {
        libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) == 0 && {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &limit) == 0
        }
    };
    if !raised {
        tracing::debug!(error = %io::Error::last_os_error(), "the limit of open files stays as it is");
    }
}

/// From linux/prctl.h; the libc crate does not have it.
const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// Keeps the kernel from waiting for our own writeback when it needs memory for us. Inherited by the threads begun
/// from this one. Needs CAP_SYS_RESOURCE; without it we do without.
#[allow(unsafe_code, reason = "prctl has no safe wrapper for this option")]
fn become_io_flusher() {
    // SAFETY: PR_SET_IO_FLUSHER takes plain numbers and sets flags of the calling thread only.
    if unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) } != 0 {
        tracing::debug!(error = %io::Error::last_os_error(), "no PR_SET_IO_FLUSHER");
    }
}
