//! A view written out as a plain data directory: in parallel, every byte checked, unable to start until it is whole.
//!
//! Everything is decided, and refused, before anything is changed. Then a [`marker`] says whose the directory is, pg_control
//! goes, what does not belong goes, files are written or made equal, and pg_control comes last. What an interruption leaves
//! cannot be started; [`RestoreOptions::delta`] goes on with it.

mod databases;
mod delta;
mod existing;
mod marker;
mod place;
mod plan;
mod preflight;
mod small;
#[cfg(test)]
mod tests;
mod unarchived;
mod write;

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, chown, lchown, symlink};
use std::path::{Path, PathBuf};

pub use self::databases::{Databases, ZeroedDatabase};

use self::delta::Delta;
use self::marker::{MARKER, Marker, Said};
use self::place::{make_place, take_over, take_over_all, take_over_file};
use self::plan::{Plan, Target, enough_space, plan, refuse_nested};
use self::unarchived::refuse_unarchived;
use self::write::{write_files, write_zeros};
use crate::error::{Context, Error, Result};
use crate::format::manifest::Description;
use crate::postgres::Major;
use crate::progress::Monitor;
use crate::read::tree::Owner;
use crate::read::view::View;
use crate::recovery::tablespaces::created_in;
use crate::repo::wal::wal_identity;
use crate::restore::existing::{Local, look};
use crate::restore::preflight::{is_vacant, recognise, refuse_occupied, refuse_occupied_place};
use crate::user::{User, as_user};

/// How a view is written out.
#[derive(Clone, Debug)]
pub struct RestoreOptions {
    /// threads that fetch, check and write
    pub process_max: usize,
    /// whom the files are given to, where we may
    pub owner: Option<Owner>,
    /// where tablespaces go, by oid; others go where the source had them
    pub tablespaces: BTreeMap<u32, PathBuf>,
    /// make a data directory of this cluster equal: write what differs, remove what does not belong. The view must know what
    /// the backup noted ([`ViewOptions::changes`](crate::read::view::ViewOptions::changes)), or everything is fetched
    pub delta: bool,
    /// which databases are restored
    pub databases: Databases,
    /// it must not use directories that another server works with
    pub copy: bool,
}

/// What a directory holds now, and what was done for it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// files
    pub files: u64,
    /// bytes of them, zeros that were not asked for left out
    pub bytes: u64,
    /// bytes of these that were there already
    pub equal: u64,
    /// files and links that did not belong
    pub removed: u64,
    /// what else the user must know
    pub note: Option<String>,
    /// databases whose relations are zeros now
    pub zeroed: Vec<ZeroedDatabase>,
}

/// The name pg_control has until everything else is durable.
const CONTROL_LATER: &str = "global/pg_control.pgcairn";
/// Written once, when a data directory is made.
const VERSION_FILE: &str = "PG_VERSION";
/// The name of the former one while its successor is written.
const VERSION_BEFORE: &str = "PG_VERSION.pgcairn";

/// Writes `view` into `root`, which must be empty or not exist; with [`RestoreOptions::delta`] it may be this cluster's.
pub fn restore(view: &View, root: &Path, options: &RestoreOptions, monitor: &dyn Monitor) -> Result<Restored> {
    let is_delta = options.delta && !is_vacant(root)?;
    if !is_delta {
        refuse_occupied(root)?;
    }
    let zeroed = options.databases.zeroed(view)?;
    let plan = plan(view, root, options, &zeroed)?;
    refuse_nested(root, &plan, view)?;
    let local = match is_delta {
        true => recognised(view, root, &plan, options.owner)?,
        false => {
            plan.places
                .iter()
                .try_for_each(|(oid, place)| refuse_occupied_place(root, *oid, place, &view.description))?;
            Local::default()
        }
    };
    for (place, bytes) in &plan.bytes {
        enough_space(place, bytes.saturating_sub(local.bytes.get(place).copied().unwrap_or_default()))?;
    }
    let user = options.owner.and_then(|owner| User::other(owner.uid, owner.gid));
    let user = user.as_ref();
    make_places(root, &plan, &local, options)?;
    // from here on as the owner, who may put links in the place of everything in there
    let marker = as_user(user, || begin(view, root, &plan, &local, options.owner))?;
    // opened before anything is written: what cannot be written to the disk from here on fails their sync
    let places = plan.bytes.keys().map(|place| Open::directory(place)).collect::<Result<Vec<_>>>()?;
    let equal = write(view, root, &plan, &local, options, user, monitor)?;
    if options.copy {
        refuse_used(root, &view.description)?;
    }
    monitor.stage("syncing", 0);
    places.iter().try_for_each(Open::sync)?;
    as_user(user, || {
        marker.remove()?;
        let later = root.join(CONTROL_LATER);
        fs::rename(&later, &plan.control.path).map_err(|error| Error::io("rename to", &plan.control.path, error))
    })?;
    places.iter().try_for_each(Open::sync)?;
    Ok(Restored {
        files: (plan.files.len() + plan.zeros.len()) as u64 + 1,
        bytes: plan.bytes.values().sum(),
        equal,
        removed: local.removed_files,
        note: local.note,
        zeroed: zeroed.into_values().collect(),
    })
}

/// Refuses WAL of the backup by which the copy's server would take over another's tablespace. Without pg_control nothing starts.
fn refuse_used(root: &Path, of: &Description) -> Result<()> {
    let created = created_in(&root.join("pg_wal"), &wal_identity(&of.database)?)?;
    let major = Major::new(of.database.version).context(|| "the manifest".into())?;
    match created.iter().find(|created| created.is_used_by_another(root, major)) {
        Some(created) => Err(created.refusal()),
        None => Ok(()),
    }
}

/// Makes the data directory and those of tablespaces, and gives them, and directories in them, to the owner.
fn make_places(root: &Path, plan: &Plan, local: &Local, options: &RestoreOptions) -> Result<()> {
    let mode = |path: &Path| plan.directories.iter().find(|(directory, _)| directory == path).map(|(_, mode)| *mode);
    make_place(root, plan.directories[0].1, options.owner, true)?;
    for (oid, place) in &plan.places {
        let is_named = options.tablespaces.contains_key(oid);
        make_place(place, mode(place).unwrap_or(0o700), options.owner, is_named)?;
    }
    let Some(owner) = options.owner.filter(|owner| User::other(owner.uid, owner.gid).is_some()) else { return Ok(()) };
    for (directory, _) in &plan.directories {
        let is_of_other = |found: fs::Metadata| found.is_dir() && found.uid() != owner.uid;
        if fs::symlink_metadata(directory).is_ok_and(is_of_other) {
            take_over(place_of(plan, root, directory), directory, owner)?;
        }
    }
    take_over_file(root, MARKER, owner)?;
    for path in &local.removed {
        if fs::symlink_metadata(path).is_ok_and(|found| found.is_dir()) {
            take_over_all(place_of(plan, root, path), path, owner)?;
        }
    }
    Ok(())
}

/// The data directory, or the tablespace's, in which a path lies.
fn place_of<'a>(plan: &'a Plan, root: &'a Path, path: &Path) -> &'a Path {
    plan.places.values().find(|place| path.starts_with(place)).map_or(root, PathBuf::as_path)
}

/// What of this cluster is in `root`; refuses anything else.
fn recognised(view: &View, root: &Path, plan: &Plan, owner: Option<Owner>) -> Result<Local> {
    recognise(root, plan, &view.description)?;
    let note = refuse_unarchived(root, view)?;
    let layout = view.description.database.layout().context(|| "the manifest".into())?;
    Ok(Local { note, ..look(plan, root, &layout.tablespace_directory.to_string(), owner)? })
}

/// From here on the directory changes: it is marked, cannot start, and is freed of what does not belong.
fn begin(view: &View, root: &Path, plan: &Plan, local: &Local, owner: Option<Owner>) -> Result<Marker> {
    let places = plan.places.values().cloned().collect();
    let marker = Marker::set(root, &Said::of(&view.description, places))?;
    remove_durably(&plan.control.path)?;
    local.remove()?;
    // the next file of this name has another inode: its cluster is another for whoever trusts the times of files
    let version = root.join(VERSION_FILE);
    match fs::rename(&version, root.join(VERSION_BEFORE)) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(Error::io("rename", &version, error)),
        _ => {}
    }
    for (path, mode) in &plan.directories[1..] {
        make_directory(path, *mode, owner)?;
    }
    plan.links.iter().try_for_each(|(path, target)| make_link(path, target, owner))?;
    Ok(marker)
}

/// Writes all files, pg_control under its other name; gives how many bytes were there already.
fn write(
    view: &View,
    root: &Path,
    plan: &Plan,
    local: &Local,
    options: &RestoreOptions,
    user: Option<&User>,
    monitor: &dyn Monitor,
) -> Result<u64> {
    monitor.stage("restoring", plan.bytes.values().sum());
    let is_there = |(number, _): &(usize, &Target)| local.files.contains_key(number);
    let (there, absent): (Vec<_>, Vec<_>) = plan.files.iter().enumerate().partition(is_there);
    for (number, target) in &there {
        if local.files[number] > target.size {
            as_user(user, || cut_to(&target.path, target.size))?;
        }
    }
    let delta = Delta::new(view, user);
    let there: Vec<&Target> = there.into_iter().map(|(_, target)| target).collect();
    let absent: Vec<&Target> = absent.into_iter().map(|(_, target)| target).collect();
    write_files(view, &there, Some(&delta), options, monitor)?;
    write_files(view, &absent, None, options, monitor)?;
    plan.zeros.iter().try_for_each(|target| as_user(user, || write_zeros(target, options.owner)))?;
    let later = Target { path: root.join(CONTROL_LATER), ..plan.control.clone() };
    write_files(view, &[&later], None, options, monitor)?;
    let version_before = root.join(VERSION_BEFORE);
    match as_user(user, || Ok(fs::remove_file(&version_before)))? {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io("remove", &version_before, error)),
        _ => Ok(delta.equal()),
    }
}

fn cut_to(path: &Path, size: u64) -> Result<()> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = OpenOptions::new().write(true).custom_flags(flags).open(path);
    file.and_then(|file| file.set_len(size)).map_err(|error| Error::io("truncate", path, error))
}

/// Removes a file, if it is there, before anything else happens.
fn remove_durably(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Ok(()) => {
            let directory = path.parent().unwrap_or(path);
            File::open(directory).and_then(|open| open.sync_all()).map_err(|error| Error::io("sync", directory, error))
        }
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(()),
        Err(error) => Err(Error::io("remove", path, error)),
    }
}

fn make_link(path: &Path, target: &Path, owner: Option<Owner>) -> Result<()> {
    match symlink(target, path) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists && fs::read_link(path).is_ok_and(|to| to == target) => {}
        made => made.map_err(|error| Error::io("create the link", path, error))?,
    }
    give_link(path, owner)
}

fn make_directory(path: &Path, mode: u32, owner: Option<Owner>) -> Result<()> {
    place::make(path, mode, owner)
}

fn give(path: &Path, owner: Option<Owner>) -> Result<()> {
    match owner {
        Some(owner) => {
            chown(path, Some(owner.uid), Some(owner.gid)).map_err(|error| Error::io("change the owner of", path, error))
        }
        None => Ok(()),
    }
}

/// The link itself; what it leads to is given away with its own directory.
fn give_link(path: &Path, owner: Option<Owner>) -> Result<()> {
    match owner {
        Some(owner) => lchown(path, Some(owner.uid), Some(owner.gid))
            .map_err(|error| Error::io("change the owner of", path, error)),
        None => Ok(()),
    }
}

/// An open directory, and its path.
struct Open<'a>(File, &'a Path);

impl<'a> Open<'a> {
    fn directory(place: &'a Path) -> Result<Self> {
        File::open(place).map(|open| Self(open, place)).map_err(|error| Error::io("open", place, error))
    }

    /// Makes everything written to its file system durable, in one call instead of one per file.
    fn sync(&self) -> Result<()> {
        nix::unistd::syncfs(&self.0).map_err(|error| Error::io("sync", self.1, error.into()))
    }
}
