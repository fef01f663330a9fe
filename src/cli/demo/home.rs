//! The demo's directory, and the removal of everything the demo made, in whatever state it ended.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, User};

use super::cluster::Programs;
use crate::cli::options::Common;
use crate::cli::{daemon, output};
use crate::error::{Context, Error, Result};
use crate::store::Store;

/// What every demo directory's name begins with.
const PREFIX: &str = "pgcairn-demo-";
/// Longest temporary directory below which sockets can still be made: their whole path may have 107 bytes.
const BASE_BYTES_MAX: usize = 40;
/// How long servers and mounts may take to end before they are killed.
const PATIENCE: Duration = Duration::from_secs(10);

/// Where everything is: `data`, `run`, `repo`, `mnt`, `clones`, `cache`, `copy`, `bin`, `pgcairn.toml`.
#[derive(Debug)]
pub(super) struct Home {
    root: PathBuf,
    stanza: String,
    /// a repository that stays, without what the demo put there
    repository: Option<Common>,
    /// whether the directory of mount logs was there before
    logs_were_there: bool,
    armed: bool,
}

impl Home {
    /// Makes the directory, with what servers and verbs need in it.
    pub(super) fn create(size_mb: u32, user: Option<&User>, repository: Option<&Common>) -> Result<Self> {
        let mut base = std::env::temp_dir();
        if base.as_os_str().len() > BASE_BYTES_MAX {
            base = "/tmp".into();
        }
        require_space(&base, size_mb)?;
        let made = tempfile::Builder::new().prefix(PREFIX).rand_bytes(4).tempdir_in(&base);
        let root = made.map_err(|error| Error::io("make a directory in", &base, error))?.keep();
        let suffix = root.to_string_lossy().rsplit('-').next().unwrap_or_default().to_owned();
        let stanza = if repository.is_some() { format!("demo-{suffix}") } else { "demo".to_owned() };
        let logs_were_there = logs().is_some_and(|logs| logs.exists());
        // from here on everything is removed when this is dropped
        let home = Self { root, stanza, repository: repository.cloned(), logs_were_there, armed: true };
        home.fill(user)?;
        Ok(home)
    }

    fn fill(&self, user: Option<&User>) -> Result<()> {
        let io = |path: &Path, result: std::io::Result<()>| result.map_err(|error| Error::io("prepare", path, error));
        // the server's user passes through here
        io(&self.root, fs::set_permissions(&self.root, Permissions::from_mode(0o755)))?;
        for (name, mode, of_server) in [
            ("data", 0o700, true),
            ("run", 0o700, true),
            ("repo", 0o750, true),
            ("bin", 0o755, false),
            ("mnt", 0o755, false),
        ] {
            let path = self.path(name);
            io(&path, fs::create_dir(&path))?;
            io(&path, fs::set_permissions(&path, Permissions::from_mode(mode)))?;
            if let Some(user) = user.filter(|_| of_server) {
                io(&path, chown(&path, Some(user.uid.as_raw()), Some(user.gid.as_raw())))?;
            }
        }
        // a copy, since the server's user may not enter the directory this one is in
        let program = self.path("bin/pgcairn");
        io(&program, fs::copy("/proc/self/exe", &program).map(drop))?;
        io(&program, fs::set_permissions(&program, Permissions::from_mode(0o755)))
    }

    /// Writes the configuration file, from which every verb takes its defaults.
    pub(super) fn configure(&self, conninfo: &str, programs: &Programs) -> Result<()> {
        let mut entries = vec![
            ("stanza".to_owned(), self.stanza.clone()),
            ("pg".to_owned(), conninfo.to_owned()),
            ("clone-path".to_owned(), self.path("clones").display().to_string()),
            ("cache-path".to_owned(), self.path("cache").display().to_string()),
            ("pg-bin".to_owned(), programs.server.display().to_string()),
        ];
        match &self.repository {
            None => entries.insert(0, ("repo".to_owned(), self.path("repo").display().to_string())),
            Some(common) => {
                let arguments = common.arguments();
                let pairs =
                    arguments.chunks_exact(2).map(|pair| (pair[0].trim_start_matches('-').to_owned(), pair[1].clone()));
                entries.splice(
                    0..0,
                    pairs.filter(|(name, _)| name.starts_with("repo") && !name.starts_with("repo-cipher")),
                );
            }
        }
        let text: String =
            entries.into_iter().map(|(name, value)| format!("{name} = {}\n", toml::Value::String(value))).collect();
        let path = self.path("pgcairn.toml");
        fs::write(&path, text).map_err(|error| Error::io("write", &path, error))?;
        let readable = Permissions::from_mode(0o644);
        fs::set_permissions(&path, readable).map_err(|error| Error::io("set the mode of", &path, error))
    }

    /// The directory itself.
    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// Something in it.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// The mounts that are there now.
    pub(super) fn mounts(&self) -> Result<Vec<PathBuf>> {
        let mounts = pgcairn_mount::mountpoint::mounts().map_err(crate::cli::mount::mount_error)?;
        Ok(mounts.into_iter().map(|mount| mount.path).filter(|path| path.starts_with(&self.root)).collect())
    }

    /// The end of the server's log, for a person who wonders why something failed.
    pub(super) fn show_log(&self) {
        let log = fs::read_to_string(self.path("run/server.log")).unwrap_or_default();
        let telling = |line: &&str| {
            ["ERROR", "FATAL", "PANIC", "WARNING", "error:", "hint:"].iter().any(|word| line.contains(word))
        };
        let lines: Vec<&str> = log.lines().filter(telling).collect();
        for line in &lines[lines.len().saturating_sub(10)..] {
            output::line(&format!("   server: {line}"));
        }
    }

    /// Leaves everything, and tells how to go on and how to end it.
    pub(super) fn keep(mut self, programs: &Programs) {
        self.armed = false;
        let root = self.root.display();
        output::line("");
        output::line(&format!("   Kept in {root}. To go on:"));
        output::line(&format!("     export PGCAIRN_CONFIG={root}/pgcairn.toml PATH={root}/bin:$PATH"));
        output::line(
            "   To end it: \"pgcairn stop\" each clone, \"pgcairn umount\" each mount, then as the server's user",
        );
        output::line(&format!("     {}/pg_ctl -D {root}/data stop", programs.server.display()));
        output::line(&format!("   and remove {root}."));
    }

    /// Ends every process, mount and file of the demo.
    ///
    /// # Errors
    /// When something stays; it says what.
    pub(super) fn remove(mut self) -> Result<()> {
        self.armed = false;
        self.clean_up()
    }

    fn clean_up(&self) -> Result<()> {
        // a mount that was being made while its maker was killed shows up only now: hence again
        for _ in 0..3 {
            end_all(|| processes(&self.root).into_iter().filter(|process| !process.mounts).collect());
            self.unmount_all()?;
            end_all(|| processes(&self.root));
            if self.mounts()?.is_empty() && processes(&self.root).is_empty() {
                break;
            }
        }
        let forgotten = self.forget_stanza();
        self.remove_logs();
        // with something still mounted below, removing would be done to the mount's contents
        if let Some(mount) = self.mounts()?.first() {
            return Err(Error::new(format!("{} is still mounted, so {} stays", mount.display(), self.root.display()))
                .hint("see who uses it with \"fuser -vm\", unmount it and remove the directory"));
        }
        fs::remove_dir_all(&self.root).map_err(|error| Error::io("remove", &self.root, error))?;
        forgotten
    }

    /// Ends servers and commands as soon as the demo is asked to end, so that a query being waited for ends too.
    pub(super) fn end_when(&self, interrupted: Arc<AtomicBool>) {
        let root = self.root.clone();
        std::thread::spawn(move || {
            while !interrupted.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(50));
            }
            end_all(|| processes(&root).into_iter().filter(|process| !process.mounts).collect());
        });
    }

    fn unmount_all(&self) -> Result<()> {
        for path in self.mounts()?.iter().rev() {
            if pgcairn_mount::unmount(path).is_err() && umount2(path, MntFlags::MNT_DETACH).is_err() {
                let mut command = Command::new("fusermount3");
                _ = command.arg("-uz").arg(path).stdout(Stdio::null()).stderr(Stdio::null()).status();
            }
        }
        Ok(())
    }

    /// Takes the demo's stanza out of a repository that was given.
    fn forget_stanza(&self) -> Result<()> {
        let Some(common) = &self.repository else { return Ok(()) };
        let forget = || -> Result<()> {
            let store = common.store(false)?;
            for kind in ["latest", "backup", "archive", "chunk", "lock"] {
                let prefix = format!("{kind}/{}/", self.stanza);
                loop {
                    let page = store.list(&prefix, None)?;
                    let keys: Vec<String> = page.objects.into_iter().map(|object| object.key).collect();
                    if keys.is_empty() {
                        break;
                    }
                    store.delete(&keys)?;
                }
                // a repository in a directory keeps directories, which are no objects
                remove_empty(&Path::new(store.url()).join(&prefix));
                _ = fs::remove_dir(Path::new(store.url()).join(kind));
            }
            Ok(())
        };
        forget().context(|| format!("cannot remove the stanza {} from the repository", self.stanza))
    }

    /// Mount daemons write their logs where all do.
    fn remove_logs(&self) {
        let Some(logs) = logs() else { return };
        let prefix = format!("mount{}-", self.root.display().to_string().replace('/', "-"));
        for entry in fs::read_dir(&logs).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(&prefix) {
                _ = fs::remove_file(entry.path());
            }
        }
        if !self.logs_were_there {
            // only if nobody else has put something there meanwhile
            _ = fs::remove_dir(&logs);
        }
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        if self.armed {
            _ = self.clean_up();
        }
    }
}

/// The processes that live in the demo's directory: servers work in a data directory, everything of ours runs the copy of
/// this program.
fn processes(root: &Path) -> Vec<Process> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let ids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    ids.filter(|&id| id != std::process::id() as i32).filter_map(|id| process(root, id)).collect()
}

fn process(root: &Path, id: i32) -> Option<Process> {
    let link = |name: &str| fs::read_link(format!("/proc/{id}/{name}")).unwrap_or_default();
    let program = link("exe");
    let arguments = fs::read(format!("/proc/{id}/cmdline")).ok()?;
    let arguments: Vec<_> = arguments.split(|&byte| byte == 0).map(String::from_utf8_lossy).collect();
    let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let is_server = ["postgres", "pg_ctl", "initdb"].contains(&name.as_str());
    let names_us = || arguments.iter().any(|argument| argument.contains(root.to_string_lossy().as_ref()));
    let ours = program.starts_with(root) || (is_server && (link("cwd").starts_with(root) || names_us()));
    ours.then(|| Process { id, is_server, mounts: !is_server && arguments.iter().any(|argument| argument == "mount") })
}

/// Removes a directory and those below it, as far as they are empty; follows no links.
fn remove_empty(directory: &Path) {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let is_directory = |entry: &fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_dir());
    entries.filter(is_directory).for_each(|entry| remove_empty(&entry.path()));
    _ = fs::remove_dir(directory);
}

/// A process of the demo.
struct Process {
    id: i32,
    is_server: bool,
    /// serves a mount, on which a server may stand
    mounts: bool,
}

/// Asks processes to end, waits, kills the rest. A server is asked for an immediate shutdown: it takes its children and
/// its shared memory with it, and writes nothing more.
fn end_all(find: impl Fn() -> Vec<Process>) {
    let asked = Instant::now();
    let mut told: Vec<i32> = Vec::new();
    loop {
        let found = find();
        if found.is_empty() {
            return;
        }
        let late = asked.elapsed() > PATIENCE;
        for process in found.iter().filter(|process| late || !told.contains(&process.id)) {
            let signal = match (late, process.is_server) {
                (true, _) => Signal::SIGKILL,
                (false, true) => Signal::SIGQUIT,
                (false, false) => Signal::SIGTERM,
            };
            _ = kill(Pid::from_raw(process.id), signal);
        }
        if asked.elapsed() > 2 * PATIENCE {
            return;
        }
        told.extend(found.iter().map(|process| process.id));
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn logs() -> Option<PathBuf> {
    daemon::log_path("any").ok()?.parent().map(Path::to_owned)
}

/// The source, its WAL, the repository, the cache and the copy are there at once.
fn require_space(base: &Path, size_mb: u32) -> Result<()> {
    let needed = (u64::from(size_mb) * 4 + 600) << 20;
    let Ok(of) = nix::sys::statvfs::statvfs(base) else { return Ok(()) };
    let free = of.blocks_available() * of.fragment_size();
    if free >= needed {
        return Ok(());
    }
    let (free, needed) = (output::bytes(free), output::bytes(needed));
    Err(Error::new(format!("the demo needs {needed} in {}, and {free} are free", base.display()))
        .hint("give a smaller --size (MB), or name another place in TMPDIR"))
}
