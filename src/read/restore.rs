//! A view written out as a plain data directory: in parallel, every byte checked, unable to start until it is whole.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt, PermissionsExt, chown, lchown, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crossbeam_channel::{Receiver, bounded};
use parking_lot::Mutex;

use super::tree::Owner;
use super::view::{Content, NodeIndex, View};
use crate::error::{Error, Result};
use crate::format::LEAF_BYTES;
use crate::postgres::CONTROL_FILE;
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

struct Plan {
    directories: Vec<(PathBuf, u32)>,
    links: Vec<(PathBuf, PathBuf)>,
    files: Vec<Target>,
    control: Target,
    bytes: BTreeMap<PathBuf, u64>,
}

#[derive(Clone)]
struct Target {
    node: NodeIndex,
    path: PathBuf,
    mode: u32,
    mtime: i64,
    size: u64,
}

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

/// Refuses a directory in which something is, above all a server's.
fn refuse_unsafe(root: &Path) -> Result<()> {
    if root.join("postmaster.pid").exists() {
        return Err(Error::new(format!("a server runs, or ran, in {}", root.display()))
            .hint("stop it, and restore into an empty directory"));
    }
    match fs::read_dir(root) {
        Ok(mut entries) => match entries.next() {
            None => Ok(()),
            Some(_) => Err(Error::new(format!("{} is not empty", root.display()))
                .hint("restore into an empty directory, or one that does not exist yet")),
        },
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Error::io("list", root, error)),
    }
}

/// Refuses places that lie in one another: their files would mix.
fn refuse_nested(root: &Path, options: &RestoreOptions, view: &View) -> Result<()> {
    let places: Vec<PathBuf> = places(view, options)?.into_values().chain([root.to_owned()]).collect();
    for (number, place) in places.iter().enumerate() {
        let others = places.iter().enumerate().filter(|(other, _)| *other != number);
        if let Some((_, outer)) = others.into_iter().find(|(_, other)| place.starts_with(other)) {
            return Err(Error::new(format!("{} lies in {}", place.display(), outer.display()))
                .hint("each tablespace and the data directory need a directory of their own; see --tablespace-map"));
        }
    }
    Ok(())
}

fn plan(view: &View, root: &Path, options: &RestoreOptions) -> Result<Plan> {
    let places = places(view, options)?;
    let mut plan = Plan {
        directories: vec![(root.to_owned(), view.node(0)?.mode)],
        links: Vec::new(),
        files: Vec::new(),
        control: Target { node: 0, path: root.join(CONTROL_FILE), mode: 0, mtime: 0, size: 0 },
        bytes: BTreeMap::from([(root.to_owned(), 0)]),
    };
    for place in places.values() {
        plan.bytes.insert(place.clone(), 0);
    }
    view.walk(&mut |path, number| {
        let node = view.node(number)?;
        let Some((place, path)) = destination(root, &places, path) else { return Ok(()) };
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
                *plan.bytes.entry(place).or_default() += size;
                let target = Target { node: number, path, mode: node.mode, mtime: node.mtime, size };
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
    let place = |tablespace: &crate::format::manifest::Tablespace| {
        let mapped = options.tablespaces.get(&tablespace.oid).cloned();
        (tablespace.oid, mapped.unwrap_or_else(|| PathBuf::from(&tablespace.path)))
    };
    Ok(view.description.tablespaces.iter().map(place).collect())
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

fn enough_space(place: &Path, bytes: u64) -> Result<()> {
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

/// One piece of a file, or several whole small files.
enum Piece {
    Part(Target, u64),
    Whole(Vec<Target>),
}

fn write_files(view: &View, files: &[Target], options: &RestoreOptions, monitor: &dyn Monitor) -> Result<()> {
    let workers = options.process_max.max(1);
    let (queue, pieces) = bounded::<Piece>(workers * 2);
    let failure = Mutex::new(None);
    let writing = Writing { view, owner: options.owner, monitor, parts: Mutex::default() };
    std::thread::scope(|scope| {
        let pieces = pieces;
        for _ in 0..workers {
            let (pieces, failure, writing) = (pieces.clone(), &failure, &writing);
            scope.spawn(move || {
                if let Err(error) = writing.pieces(&pieces) {
                    failure.lock().get_or_insert(error);
                }
            });
        }
        drop(pieces);
        cut(files, |piece| queue.send(piece).is_ok());
        drop(queue);
    });
    match failure.into_inner() {
        Some(error) => Err(error),
        None => files.iter().filter(|file| file.size > LEAF_BYTES).try_for_each(|file| writing.finish_large(file)),
    }
}

fn cut(files: &[Target], send: impl Fn(Piece) -> bool) {
    let (mut small, mut bytes) = (Vec::new(), 0);
    for file in files {
        if file.size > LEAF_BYTES {
            let parts = file.size.div_ceil(LEAF_BYTES);
            if !(0..parts).all(|part| send(Piece::Part(file.clone(), part))) {
                return;
            }
            continue;
        }
        bytes += file.size;
        small.push(file.clone());
        if bytes >= LEAF_BYTES / 4 || small.len() >= 256 {
            bytes = 0;
            if !send(Piece::Whole(std::mem::take(&mut small))) {
                return;
            }
        }
    }
    send(Piece::Whole(small));
}

/// What the threads that write share.
struct Writing<'a> {
    view: &'a View,
    owner: Option<Owner>,
    monitor: &'a dyn Monitor,
    /// what was written of large files, whose parts end in any order
    parts: Mutex<HashMap<NodeIndex, Vec<Part>>>,
}

/// A run of bytes that was written: where in the file it begins, its length and its CRC32C.
type Part = (u64, usize, u32);

impl Writing<'_> {
    fn pieces(&self, pieces: &Receiver<Piece>) -> Result<()> {
        while let Ok(piece) = pieces.recv() {
            match piece {
                Piece::Part(target, part) => {
                    let from = part * LEAF_BYTES;
                    let (_, crc, len) = self.range(&target, from, target.size.min(from + LEAF_BYTES))?;
                    self.parts.lock().entry(target.node).or_default().push((from, len, crc));
                }
                Piece::Whole(targets) => targets.iter().try_for_each(|target| {
                    let (file, crc, _) = self.range(target, 0, target.size)?;
                    self.prove(target, crc)?;
                    finish_file(&file, target, self.owner)
                })?,
            }
        }
        Ok(())
    }

    /// Writes a range of a file; gives the file, and CRC32C and length of what was written.
    fn range(&self, target: &Target, from: u64, to: u64) -> Result<(File, u32, usize)> {
        let fail = |error| Error::io("write", &target.path, error);
        let file =
            OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&target.path).map_err(fail)?;
        let mut parts = Vec::new();
        self.view.each_range(target.node, from, to, &mut |at, bytes| {
            parts.push((at, bytes.len(), crc32c::crc32c(bytes)));
            file.write_all_at(bytes, at).map_err(fail)
        })?;
        self.monitor.advance(to - from);
        Ok((file, whole_crc(parts), (to - from) as usize))
    }

    /// A large file of which every part was written.
    fn finish_large(&self, target: &Target) -> Result<()> {
        self.prove(target, whole_crc(self.parts.lock().remove(&target.node).unwrap_or_default()))?;
        let file = OpenOptions::new().write(true).open(&target.path);
        finish_file(&file.map_err(|error| Error::io("open", &target.path, error))?, target, self.owner)
    }

    /// Fails unless what was written has the checksum that the backup computed when it read the file.
    fn prove(&self, target: &Target, crc: u32) -> Result<()> {
        match self.view.crc(target.node)? {
            Some(expected) if expected != crc => Err(Error::new(format!(
                "{} came out with checksum {crc:08x}, the backup read it with {expected:08x}",
                target.path.display()
            ))
            .hint(
                "the memory of this machine or of the one that made the backup may be faulty; choose another backup",
            )),
            _ => Ok(()),
        }
    }
}

/// The checksum of a run from those of its parts, which may come in any order.
fn whole_crc(mut parts: Vec<Part>) -> u32 {
    parts.sort_unstable();
    parts.into_iter().fold(0, |crc, (_, len, part)| crc32c::crc32c_combine(crc, part, len))
}

fn finish_file(file: &File, target: &Target, owner: Option<Owner>) -> Result<()> {
    let fail = |error| Error::io("set mode and owner of", &target.path, error);
    file.set_permissions(fs::Permissions::from_mode(target.mode)).map_err(fail)?;
    give(&target.path, owner)?;
    let modified = SystemTime::UNIX_EPOCH + Duration::from_secs(target.mtime.max(0) as u64);
    file.set_modified(modified).map_err(fail)
}

/// Makes everything written to the file system of `place` durable, in one call instead of one per file.
fn sync(place: &Path) -> Result<()> {
    let directory = File::open(place).map_err(|error| Error::io("open", place, error))?;
    nix::unistd::syncfs(&directory).map_err(|error| Error::io("sync", place, error.into()))
}
