use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;

use clap::Args;
use pgcairn_mount::{Options, Scratch, Tree, Writes, boot_id};
use signal_hook::iterator::Signals;

use super::clones::{Clone, Place};
use super::options::{Cache, Common};
use super::point::{self, PointOptions, WalFor};
use super::start::{Running, Start};
use super::{daemon, output, signals};
use crate::error::{Error, Result};
use crate::interrupt;
use crate::read::bounded::Bounded;
use crate::read::completion::Prepared;
use crate::read::prefetch::Prefetcher;
use crate::read::stanza::{Moments, StanzaTree};
use crate::read::tree::{Owner, ViewTree};
use crate::read::view::{View, ViewOptions};
use crate::recovery::plan::Bound;
use crate::recovery::target::Action;
use crate::repo::Repository;
use crate::store::Stop;
use crate::user;

/// Threads that serve the kernel's requests; one that waits for the store holds its thread.
const SERVE_THREADS: usize = 16;
/// How long `--recovered` waits for its server, in seconds: for recovery, then for the shutdown.
const RECOVER_SECONDS: u64 = 86_400;
/// How far the kernel reads ahead of who replays WAL: requests for more than one part of it are under way, so that none is waited
/// for while the processors are busy.
const REPLAY_AHEAD_KIB: u32 = 4096;
/// Threads that fetch ahead of sequential readers.
const PREFETCH_THREADS: usize = 8;
const SCRATCH_HINT: &str =
    "choose a directory for the scratch that nobody else can write or rename, or mount as the user it belongs to";

/// Mount the stanza, or one backup of it, as a directory
///
/// Without --backup the mountpoint shows every backup below backups/ (read-only), links to the latest, and the WAL archive.
/// With --backup it is itself a data directory; with --scratch that can be written to: PostgreSQL starts on it, and the backup
/// stays as it is. The command returns when the mount is ready.
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("standing").multiple(true).args(["backup", "kind", "target"]))]
pub(super) struct Mount {
    /// Empty directory to mount on
    mountpoint: PathBuf,
    /// Show this point alone: a label, latest, or a target
    #[arg(long, value_name = "POINT")]
    backup: Option<String>,
    #[command(flatten)]
    point: PointOptions,
    /// Make the mount writable; what is written is kept in this directory
    #[arg(long, value_name = "DIR", requires = "standing")]
    scratch: Option<PathBuf>,
    /// Recover to the target first, and show the result, read-only: needs PostgreSQL, in a private scratch that goes with the mount
    #[arg(long, requires = "standing", conflicts_with = "scratch")]
    recovered: bool,
    /// Directory of PostgreSQL's programs for --recovered [default: looked for]
    #[arg(long, env = "PGCAIRN_PG_BIN", value_name = "DIR")]
    pg_bin: Option<PathBuf>,
    /// Directory in which --recovered keeps its scratch
    #[arg(long, env = "PGCAIRN_CLONE_PATH", value_name = "DIR")]
    clone_path: Option<PathBuf>,
    /// Whose files these are [default: as root the owner of the backed up cluster, else yourself]
    #[arg(long, env = "PGCAIRN_OWNER", value_name = "USER")]
    owner: Option<String>,
    /// Stay in the foreground
    #[arg(long)]
    foreground: bool,
    #[command(flatten)]
    cache: Cache,
    /// The recovery the data directory is prepared for, as it was found before
    #[arg(long, hide = true)]
    recovery: Option<String>,
    /// The mount is a clone's, whose server is told where it is
    #[arg(long, hide = true)]
    for_clone: bool,
    /// Let the kernel collect writes, as suits a server that replays WAL and runs no programs meanwhile
    #[arg(long, hide = true)]
    write_back: bool,
    /// Serve the scratch read-only, and remove this directory at the end
    #[arg(long, hide = true)]
    discard: Option<PathBuf>,
}

impl Mount {
    pub(super) fn run(mut self, common: &Common) -> Result<()> {
        if daemon::is_child() {
            daemon::detach();
            return match self.prepare(common) {
                Ok(mount) => {
                    daemon::ready();
                    self.serve(mount, common)
                }
                Err(error) => Err(error),
            };
        }
        // what can be found out here is said here
        pgcairn_mount::mountpoint::check(&self.mountpoint).map_err(mount_error)?;
        if self.recovered {
            self.recover(common)?;
        }
        let mounted = self.settle(common).and_then(|()| self.mount(common));
        if let (Err(_), Some(directory)) = (&mounted, &self.discard) {
            discard(directory);
        }
        mounted
    }

    fn mount(&self, common: &Common) -> Result<()> {
        if self.foreground {
            let mount = self.prepare(common)?;
            output::line(&format!("mounted on {}", self.mountpoint.display()));
            return self.serve(mount, common);
        }
        let name = absolute(&self.mountpoint)?.replace('/', "-");
        spawn(self, common, &daemon::log_path(&format!("mount{name}"))?)?;
        output::line(&format!("mounted on {}", self.mountpoint.display()));
        Ok(())
    }

    /// A mount of one point with a scratch, as `start` wants it.
    pub(super) fn for_clone(
        (label, recovery): (&str, Option<&Prepared>),
        scratch: &Path,
        owner: Option<&str>,
        mountpoint: &Path,
        cache: &Cache,
    ) -> Result<Self> {
        Ok(Self {
            mountpoint: mountpoint.to_owned(),
            backup: Some(label.to_owned()),
            point: PointOptions::default(),
            scratch: Some(scratch.to_owned()),
            owner: owner.map(str::to_owned),
            recovered: false,
            pg_bin: None,
            clone_path: None,
            foreground: false,
            cache: cache.clone(),
            discard: None,
            for_clone: true,
            write_back: recovery.is_some(),
            recovery: recovery.map(serde_json::to_string).transpose()?,
        })
    }

    /// Recovers in a clone that is shut down at once; what it wrote is this mount's scratch.
    fn recover(&mut self, common: &Common) -> Result<()> {
        let programs = (self.pg_bin.as_deref(), self.owner.as_deref());
        let limits = (&[][..], self.clone_path.as_deref(), RECOVER_SECONDS);
        let start =
            Start::for_verb("recovered", self.backup.as_deref(), &self.point, programs, limits, None, &self.cache);
        let Running { clone, place, .. } = start.launch(common)?;
        let shut_down = shut_down(&clone, &place);
        let brought_down = super::stop::bring_down(&place, &clone, shut_down.is_ok());
        if let Err(error) = shut_down.and(brought_down) {
            discard(place.root());
            return Err(error);
        }
        (self.backup, self.point) = (Some(clone.label), PointOptions::default());
        self.recovery = clone.recovery.as_ref().map(serde_json::to_string).transpose()?;
        (self.scratch, self.discard) = (Some(place.scratch()), Some(place.root().to_owned()));
        Ok(())
    }

    /// Serves until unmounted; what only this mount needed goes with it.
    fn serve(&self, mount: pgcairn_mount::Mount, common: &Common) -> Result<()> {
        let served = serve(mount, common.stop.clone());
        if let Some(directory) = &self.discard {
            discard(directory);
        }
        served
    }

    /// Finds the way to the point, once: the daemon serves what was found.
    fn settle(&mut self, common: &Common) -> Result<()> {
        if self.discard.is_some() || self.recovery.is_some() || (self.backup.is_none() && self.point.is_empty()) {
            return Ok(());
        }
        let point = self.point.point(self.backup.as_deref())?;
        let repository = common.repository()?;
        let course = point::find(&repository, &point, Bound::Open, &self.cache)?;
        let restore_command = point::restore_command(common, WalFor::Mount)?;
        let prepared = point::presented(&course, point.action.unwrap_or(Action::Promote), &restore_command);
        self.recovery = prepared.as_ref().map(serde_json::to_string).transpose()?;
        (self.backup, self.point) = (Some(course.label), PointOptions::default());
        Ok(())
    }

    fn prepare(&self, common: &Common) -> Result<pgcairn_mount::Mount> {
        pgcairn_mount::mountpoint::check(&self.mountpoint).map_err(mount_error)?;
        let repository = common.repository()?;
        let (tree, scratch) = match &self.backup {
            Some(backup) => self.one(common, repository, backup)?,
            None => (self.all(common, repository)?, None),
        };
        let mut options = Options::new(&self.mountpoint);
        options.allow_other = nix::unistd::geteuid().is_root();
        options.threads = SERVE_THREADS;
        options.read_only = self.discard.is_some();
        if self.write_back {
            options.writes = Writes::Back;
            options.read_ahead_kib = REPLAY_AHEAD_KIB;
        }
        pgcairn_mount::Mount::new(tree, scratch, &options).map_err(mount_error)
    }

    fn one(&self, common: &Common, repository: Repository, backup: &str) -> Result<(Arc<dyn Tree>, Option<Scratch>)> {
        let label = repository.resolve(backup)?;
        let stanza = repository.stanza.clone();
        let fetcher = self.cache.fetcher(repository)?;
        let prepared = self.recovery.as_deref().map(serde_json::from_str).transpose();
        let prepared = prepared.map_err(|error| Error::new("--recovery cannot be read").source(error))?;
        // what was recovered lies in the scratch: no server replays the WAL below it
        let sandboxed = self.for_clone || self.discard.is_some();
        let options = ViewOptions { placed: self.for_clone, sandboxed, ..ViewOptions::copy().prepared(prepared) };
        let view = Arc::new(View::load(fetcher, &label, &options)?);
        let owner = owner(self.owner.as_deref(), &view.description.owner)?;
        let mut identity = format!("{stanza}/{label}/{}", view.description.stop_lsn);
        if let Some(recovery) = &self.recovery {
            // what lies below the scratch depends on the recovery, too
            identity.push_str(&format!("/{}", &blake3::hash(recovery.as_bytes()).to_hex()[..16]));
        }
        let scratch = match &self.scratch {
            Some(directory) => {
                // what is in it is believed, and written
                user::make_own(directory, 0o700, SCRATCH_HINT)?;
                let boot = boot_id().map_err(mount_error)?;
                Some(Scratch::open(directory, &identity, &boot).map_err(mount_error)?)
            }
            None => None,
        };
        let prefetcher = Arc::new(Prefetcher::start(PREFETCH_THREADS, common.io_timeout));
        let tree = ViewTree::new(view, owner, prefetcher);
        Ok((Arc::new(Bounded::new(tree, common.io_timeout)), scratch))
    }

    fn all(&self, common: &Common, repository: Repository) -> Result<Arc<dyn Tree>> {
        repository.archive_info()?;
        let moments = Moments {
            restore_command: point::restore_command(common, WalFor::Mount)?,
            cache: self.cache.directory()?,
            found: parking_lot::Mutex::default(),
        };
        let fetcher = self.cache.fetcher(repository)?;
        let prefetcher = Arc::new(Prefetcher::start(PREFETCH_THREADS, common.io_timeout));
        let tree = StanzaTree::new(fetcher, self.owner.clone(), owner, prefetcher, moments)?;
        Ok(Arc::new(Bounded::new(tree, common.io_timeout)))
    }

    fn arguments(&self, common: &Common) -> Result<Vec<String>> {
        let mut arguments = common.arguments();
        arguments.push("mount".into());
        arguments.extend(self.cache.arguments());
        let option = |name: &str, value: &str| format!("--{name}={value}");
        arguments.extend(self.backup.as_deref().map(|backup| option("backup", backup)));
        arguments.extend(self.recovery.as_deref().map(|recovery| option("recovery", recovery)));
        arguments.extend(self.owner.as_deref().map(|owner| option("owner", owner)));
        arguments.extend(self.write_back.then(|| "--write-back".to_owned()));
        arguments.extend(self.for_clone.then(|| "--for-clone".to_owned()));
        for (name, directory) in [("scratch", &self.scratch), ("discard", &self.discard)] {
            if let Some(directory) = directory {
                arguments.push(option(name, &absolute(directory)?));
            }
        }
        arguments.push(absolute(&self.mountpoint)?);
        Ok(arguments)
    }
}

/// A clean shutdown, so that the files are whole without any WAL.
fn shut_down(clone: &Clone, place: &Place) -> Result<()> {
    let mut stop = clone.pg_ctl(place);
    stop.args(["stop", "-s", "-w", "-t", &RECOVER_SECONDS.to_string(), "-m", "fast"]).stderr(Stdio::piped());
    let child = stop.spawn().map_err(|error| Error::new("cannot run pg_ctl").source(error))?;
    let _waited_for = interrupt::Guard::child(child.id());
    let done = child.wait_with_output().map_err(|error| Error::new("cannot wait for pg_ctl").source(error))?;
    match done.status.success() {
        true => Ok(()),
        false => Err(Error::new("the recovered server did not shut down cleanly")
            .hint(String::from_utf8_lossy(&done.stderr).trim().to_owned())),
    }
}

/// Removes what a recovered mount left. There is nobody left to tell but the log.
fn discard(directory: &Path) {
    if let Err(error) = std::fs::remove_dir_all(directory) {
        tracing::error!(%error, "cannot remove {}", directory.display());
    }
}

/// Mounts in the background; returns the daemon's process id when the mount is ready.
pub(super) fn spawn(mount: &Mount, common: &Common, log: &Path) -> Result<u32> {
    daemon::spawn(&mount.arguments(common)?, &common.secrets(), log)
}

/// Serves until unmounted, or until asked to end.
fn serve(mount: pgcairn_mount::Mount, stop: Stop) -> Result<()> {
    let unmounter = mount.unmounter();
    signals::let_go();
    let heard = signals::asking_to_end().chain([daemon::HURRY as i32]);
    let mut signals = Signals::new(heard).map_err(|error| Error::new("cannot wait for signals").source(error))?;
    let ended = stop.clone();
    std::thread::spawn(move || {
        // the first signal unmounts if nobody uses the mount; the second takes it away from whoever does
        let mut asked_before = false;
        for signal in signals.forever() {
            if signal == daemon::HURRY as i32 {
                stop.hurry();
                continue;
            }
            match asked_before {
                // readers that wait for a store that hangs keep their processes from ending
                true => stop.set(),
                // what is read ahead for nobody keeps the kernel from unmounting
                false if unmounter.is_idle() => stop.hurry(),
                false => {}
            }
            let ended = if asked_before { unmounter.detach() } else { unmounter.unmount() };
            if let Err(error) = ended {
                tracing::error!(%error, "cannot unmount; a second signal detaches the mount from its users");
            }
            asked_before = true;
        }
    });
    mount.wait_then(move || ended.set()).map_err(mount_error)
}

/// An error of the mount crate with its hint.
pub(super) fn mount_error(error: pgcairn_mount::Error) -> Error {
    let hint = error.hint();
    let mut ours = Error::new(error.to_string());
    if let Some(hint) = hint {
        ours = ours.hint(hint);
    }
    match std::error::Error::source(&error) {
        Some(_) => ours.source(error),
        None => ours,
    }
}

/// Whose the files are: the user named; as root the cluster's own user, if this machine has it; else ourselves.
pub(super) fn owner(named: Option<&str>, of_cluster: &str) -> Result<Owner> {
    use nix::unistd::{User, getegid, geteuid};
    let find = |name: &str| User::from_name(name).ok().flatten();
    if let Some(name) = named {
        let user =
            find(name).ok_or_else(|| Error::new(format!("this machine has no user {name}")).hint("check --owner"))?;
        return Ok(Owner { uid: user.uid.as_raw(), gid: user.gid.as_raw() });
    }
    let of_cluster = if geteuid().is_root() { find(of_cluster).or_else(|| find("postgres")) } else { None };
    Ok(match of_cluster {
        Some(user) => Owner { uid: user.uid.as_raw(), gid: user.gid.as_raw() },
        None => Owner { uid: geteuid().as_raw(), gid: getegid().as_raw() },
    })
}

fn absolute(path: &Path) -> Result<String> {
    let path = std::path::absolute(path).map_err(|error| Error::io("find", path, error))?;
    path.into_os_string().into_string().map_err(|path| Error::new(format!("{} is not UTF-8", path.display())))
}
