//! What a restore writes, and where: decided, and refused, before anything is changed.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::RestoreOptions;
use super::databases::{Zeroed, is_zeroed};
use super::marker::MARKER;
use crate::error::{Context, Error, Result};
use crate::format::manifest::{Description, Tablespace};
use crate::postgres::{CONTROL_FILE, tablespace_place};
use crate::read::completion::stored_path;
use crate::read::view::{Content, NodeIndex, View};

/// What goes where.
#[derive(Debug)]
pub(super) struct Plan {
    /// and their modes; each behind the one it lies in
    pub(super) directories: Vec<(PathBuf, u32)>,
    /// and their targets
    pub(super) links: Vec<(PathBuf, PathBuf)>,
    /// all that are written but pg_control
    pub(super) files: Vec<Target>,
    /// files of databases that are left out
    pub(super) zeros: Vec<Target>,
    /// pg_control
    pub(super) control: Target,
    /// where tablespaces go, by oid
    pub(super) places: BTreeMap<u32, PathBuf>,
    /// bytes that are written below the data directory and below each tablespace's
    pub(super) bytes: BTreeMap<PathBuf, u64>,
}

/// A file of a view and where it goes.
#[derive(Clone, Debug)]
pub(super) struct Target {
    pub(super) node: NodeIndex,
    pub(super) path: PathBuf,
    pub(super) mode: u32,
    pub(super) mtime: i64,
    pub(super) size: u64,
}

/// Refuses places that lie in one another, whose files would mix, and places that hold the repository.
pub(super) fn refuse_nested(root: &Path, plan: &Plan, view: &View) -> Result<()> {
    let places: Vec<&Path> = plan.places.values().map(PathBuf::as_path).chain([root]).collect();
    let resolved: Vec<PathBuf> = places.iter().map(|place| resolve(place)).collect();
    let repository = view.fetcher().repository().store.url();
    let repository = repository.starts_with('/').then(|| resolve(Path::new(repository)));
    for (number, place) in resolved.iter().enumerate() {
        let others = resolved.iter().enumerate().filter(|(other, _)| *other != number);
        if let Some((outer, _)) = others.into_iter().find(|(_, other)| place.starts_with(other)) {
            return Err(Error::new(format!("{} lies in {}", places[number].display(), places[outer].display()))
                .hint("each tablespace and the data directory need a directory of their own; see --tablespace-map"));
        }
        if let Some(repository) = repository.as_ref().filter(|repository| repository.starts_with(place)) {
            return Err(Error::new(format!(
                "the repository {} lies in {}",
                repository.display(),
                places[number].display()
            ))
            .hint("restore elsewhere"));
        }
    }
    Ok(())
}

/// The path without links, as far as it exists.
fn resolve(path: &Path) -> PathBuf {
    let found = path.ancestors().find_map(|above| Some((above, fs::canonicalize(above).ok()?)));
    match found {
        Some((above, canonical)) => canonical.join(path.strip_prefix(above).unwrap_or(Path::new(""))),
        None => path.to_owned(),
    }
}

/// The whole of a view, for `root`.
pub(super) fn plan(view: &View, root: &Path, options: &RestoreOptions, zeroed: &Zeroed) -> Result<Plan> {
    let places = places(view, options)?;
    let layout = view.description.database.layout().context(|| "the manifest".into())?;
    let mut plan = Plan {
        directories: vec![(root.to_owned(), view.node(0)?.mode)],
        links: Vec::new(),
        files: Vec::new(),
        zeros: Vec::new(),
        places: places.clone(),
        control: Target { node: 0, path: root.join(CONTROL_FILE), mode: 0, mtime: 0, size: 0 },
        bytes: BTreeMap::from([(root.to_owned(), 0)]),
    };
    for place in places.values() {
        plan.bytes.insert(place.clone(), 0);
    }
    view.walk(&mut |in_view, number| {
        let node = view.node(number)?;
        let Some((place, path)) = destination(root, &places, in_view) else { return Ok(()) };
        if in_view == MARKER.as_bytes() {
            // another restore's, should its source have kept it
            return Ok(());
        }
        match &node.content {
            Content::Directory => plan.directories.push((path, node.mode)),
            Content::Status => {}
            Content::Link(_) => {
                let oid = path.file_name().and_then(OsStr::to_str).and_then(|name| name.parse().ok());
                let target = oid.and_then(|oid: u32| places.get(&oid));
                let target = target.ok_or_else(|| Error::new(format!("no tablespace for {}", path.display())))?;
                plan.links.push((path, target.clone()));
            }
            _ => {
                let size = view.size(number)?;
                let target = Target { node: number, path, mode: node.mode, mtime: node.mtime, size };
                if is_zeroed(&stored_path(in_view), &layout, zeroed) {
                    plan.zeros.push(target);
                    return Ok(());
                }
                *plan.bytes.entry(place).or_default() += size;
                match target.path == plan.control.path {
                    true => plan.control = target,
                    false => plan.files.push(target),
                }
            }
        }
        Ok::<(), Error>(())
    })?;
    match plan.control.size > 0 {
        true => Ok(plan),
        false => Err(Error::new(format!("backup {} has no pg_control", view.description.label))),
    }
}

/// Where each tablespace goes.
fn places(view: &View, options: &RestoreOptions) -> Result<BTreeMap<u32, PathBuf>> {
    let known: Vec<u32> = view.description.tablespaces.iter().map(|tablespace| tablespace.oid).collect();
    if let Some(unknown) = options.tablespaces.keys().find(|oid| !known.contains(oid)) {
        return Err(Error::new(format!("backup {} has no tablespace {unknown}", view.description.label))
            .hint(format!("its tablespaces are {known:?}")));
    }
    let place = |tablespace: &Tablespace| {
        let mapped = options.tablespaces.get(&tablespace.oid).cloned();
        Ok((tablespace.oid, mapped.map_or_else(|| source_place(&view.description, tablespace), Ok)?))
    };
    view.description.tablespaces.iter().map(place).collect()
}

/// Where the source had a tablespace, as an absolute path. Older backups have the text of its link,
/// which may be relative to the source's `pg_tblspc`.
fn source_place(of: &Description, tablespace: &Tablespace) -> Result<PathBuf> {
    let source = Path::new(&of.data_directory);
    let source = fs::canonicalize(source).unwrap_or_else(|_| source.to_owned());
    let place = tablespace_place(&source, Path::new(&tablespace.path));
    let oid = tablespace.oid;
    match place.starts_with(&source) {
        true => Err(Error::new(format!(
            "the source had tablespace {oid} inside its data directory, in {}",
            place.display()
        ))
        .hint(format!("say where it goes: --tablespace-map {oid}=DIR, or --tablespace-map-all DIR"))),
        false => Ok(place),
    }
}

/// Where a path of the view goes, and whose space it takes; none for what only a mount shows.
fn destination(root: &Path, places: &BTreeMap<u32, PathBuf>, path: &[u8]) -> Option<(PathBuf, PathBuf)> {
    let Some(rest) = path.strip_prefix(b".pgcairn/tablespaces/") else {
        return (!path.starts_with(b".pgcairn")).then(|| (root.to_owned(), root.join(OsStr::from_bytes(path))));
    };
    let rest = std::path::Path::new(OsStr::from_bytes(rest));
    let mut parts = rest.components();
    let oid: u32 = parts.next()?.as_os_str().to_str()?.parse().ok()?;
    let place = places.get(&oid)?;
    Some((place.clone(), place.join(parts.as_path())))
}

/// Fails where the file system of `place` has less than `bytes` free.
pub(super) fn enough_space(place: &Path, bytes: u64) -> Result<()> {
    let existing = place.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let space = nix::sys::statvfs::statvfs(existing)
        .map_err(|error| Error::io("look at the file system of", existing, error.into()))?;
    let free = space.blocks_available() * space.fragment_size();
    match free >= bytes {
        true => Ok(()),
        false => Err(Error::new(format!("{} needs {bytes} bytes, its file system has {free} free", place.display()))
            .hint("restore to a larger file system, or \"pgcairn start\" the backup without copying it")),
    }
}
