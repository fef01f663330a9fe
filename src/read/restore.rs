//! A view written out as a plain data directory: in parallel, every byte checked, unable to start until it is whole.

mod plan;
mod write;

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, chown, lchown, symlink};
use std::path::{Path, PathBuf};

use self::plan::{Target, enough_space, plan, refuse_nested, refuse_unsafe};
use self::write::write_files;
use super::tree::Owner;
use super::view::View;
use crate::error::{Error, Result};
use crate::progress::Monitor;

/// How a view is written out.
#[derive(Clone, Debug)]
pub struct RestoreOptions {
    /// threads that fetch, check and write
    pub process_max: usize,
    /// whom the files are given to, where we may
    pub owner: Option<Owner>,
    /// where tablespaces go, by oid; others go where the source had them
    pub tablespaces: BTreeMap<u32, PathBuf>,
}

/// What was written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// files
    pub files: u64,
    /// bytes
    pub bytes: u64,
}

/// The name pg_control has until everything else is durable.
const CONTROL_LATER: &str = "global/pg_control.pgcairn";

/// Writes `view` into `root`, which must be empty or not exist.
pub fn restore(view: &View, root: &Path, options: &RestoreOptions, monitor: &dyn Monitor) -> Result<Restored> {
    refuse_unsafe(root)?;
    let plan = plan(view, root, options)?;
    refuse_nested(root, options, view)?;
    plan.bytes.keys().filter(|place| *place != root).try_for_each(|place| refuse_unsafe(place))?;
    plan.bytes.iter().try_for_each(|(place, bytes)| enough_space(place, *bytes))?;
    for (path, mode) in &plan.directories {
        make_directory(path, *mode, options.owner)?;
    }
    for (path, target) in &plan.links {
        symlink(target, path).map_err(|error| Error::io("create the link", path, error))?;
        give_link(path, options.owner)?;
    }
    let total: u64 = plan.bytes.values().sum();
    monitor.stage("restoring", total);
    write_files(view, &plan.files, options, monitor)?;
    let later = Target { path: root.join(CONTROL_LATER), ..plan.control.clone() };
    write_files(view, std::slice::from_ref(&later), options, monitor)?;
    monitor.stage("syncing", 0);
    plan.bytes.keys().try_for_each(|place| sync(place))?;
    fs::rename(&later.path, &plan.control.path).map_err(|error| Error::io("rename to", &plan.control.path, error))?;
    plan.bytes.keys().try_for_each(|place| sync(place))?;
    Ok(Restored { files: plan.files.len() as u64 + 1, bytes: total })
}

fn make_directory(path: &Path, mode: u32, owner: Option<Owner>) -> Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(|error| Error::io("create", parent, error))?;
    }
    match DirBuilder::new().mode(mode).create(path) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            return Err(Error::io("create", path, error));
        }
        _ => {}
    }
    let permissions = fs::Permissions::from_mode(mode);
    fs::set_permissions(path, permissions).map_err(|error| Error::io("set the mode of", path, error))?;
    give(path, owner)
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

/// Makes everything written to the file system of `place` durable, in one call instead of one per file.
fn sync(place: &Path) -> Result<()> {
    let directory = File::open(place).map_err(|error| Error::io("open", place, error))?;
    nix::unistd::syncfs(&directory).map_err(|error| Error::io("sync", place, error.into()))
}
