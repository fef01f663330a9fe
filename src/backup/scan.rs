//! What is in a data directory and belongs into a backup of it.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, Metadata};
use std::io::ErrorKind;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::format::manifest::{Tablespace, path_cmp};
use crate::postgres::{FileClass, Layout, UnloggedRelations};

/// A file's state can be told from every later one if it is older than the newest time of its file system by more than
/// this many seconds: the coarsest time stamps are 2 s apart.
const SETTLED_SECONDS: i64 = 4;
/// How many links to directories may lead through one another.
const LINKS_MAX: usize = 8;
/// Names in the data directory that mounts and restores need for themselves.
const RESERVED: [&[u8]; 4] = [b".pgcairn", b"pgcairn.restore", b"PG_VERSION.pgcairn", b"global/pg_control.pgcairn"];

/// One file, directory or link found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scanned {
    /// path in the data directory, raw bytes
    pub path: Box<[u8]>,
    /// permission bits
    pub mode: u32,
    /// seconds since 1970
    pub mtime: i64,
    /// length in bytes when it was found; only that much is read
    pub size: u64,
    /// what it is
    pub kind: ScannedKind,
    /// of a relation file: its first block in the relation
    pub first_block: Option<u64>,
    /// of a file on disk: tells its state from others
    pub identity: Option<u64>,
    /// whether its identity changes with every later change of it
    pub is_settled: bool,
}

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ScannedKind {
    /// a directory
    Directory,
    /// a tablespace's link and its target
    Link(Box<[u8]>),
    /// a regular file
    File,
    /// `global/pg_control`: copied last
    Control,
}

/// A data directory as it was found.
#[derive(Debug)]
pub struct Scan {
    /// in path order
    pub found: Vec<Scanned>,
    /// tablespaces by oid
    pub tablespaces: Vec<Tablespace>,
    /// sum of the files' lengths
    pub bytes: u64,
}

impl Scanned {
    /// The path as the operating system takes it.
    pub fn os_path(&self) -> &OsStr {
        OsStr::from_bytes(&self.path)
    }

    /// True for files, `pg_control` not counted.
    pub fn is_file(&self) -> bool {
        self.kind == ScannedKind::File
    }
}

/// Lists a data directory by the rules of PostgreSQL's own base backup. Symbolic links other than those to tablespaces are
/// followed: what they lead to is found under the link's path.
pub fn scan(root: &Path, layout: Layout) -> Result<Scan> {
    scan_without(root, layout, None)
}

/// The same, but for what a link leads to in a `repository`, given with its links resolved, and for the repository itself: it
/// would be stored in itself, and be larger each time.
pub fn scan_without(root: &Path, layout: Layout, repository: Option<&Path>) -> Result<Scan> {
    let scan = Scan { found: Vec::new(), tablespaces: Vec::new(), bytes: 0 };
    let mut scanner = Scanner {
        root,
        layout,
        scan,
        times: Vec::new(),
        newest: HashMap::new(),
        above: Vec::new(),
        links: 0,
        repository,
        repository_at: repository.and_then(|path| fs::metadata(path).ok()).map(|own| on_device(&own)),
    };
    let metadata = fs::metadata(root).map_err(|error| Error::io("read the data directory", root, error))?;
    scanner.push(&[], &metadata, ScannedKind::Directory, None);
    scanner.above.push(on_device(&metadata));
    scanner.directory(&[])?;
    let mut scan = scanner.settled();
    scan.found.sort_by(|a, b| path_cmp(&a.path, &b.path));
    scan.tablespaces.sort_by_key(|tablespace| tablespace.oid);
    match scan.found.iter().any(|found| found.kind == ScannedKind::Control) {
        true => Ok(scan),
        false => Err(Error::new(format!("{} has no global/pg_control", root.display()))
            .hint("the data directory vanished or is damaged; check the server")),
    }
}

struct Scanner<'a> {
    root: &'a Path,
    layout: Layout,
    scan: Scan,
    /// of each that was found: its device, and the later of its two times
    times: Vec<(u64, i64)>,
    /// the newest time of change on each device: its own clock is past that
    newest: HashMap<u64, i64>,
    /// device and inode of the directories that enclose the present one, links followed
    above: Vec<(u64, u64)>,
    /// how many links to directories led to the present one
    links: usize,
    /// what is left out
    repository: Option<&'a Path>,
    /// its device and inode
    repository_at: Option<(u64, u64)>,
}

impl Scanner<'_> {
    /// Everything below `path`.
    fn directory(&mut self, path: &[u8]) -> Result<()> {
        let on_disk = self.on_disk(path);
        let names = match read_names(&on_disk) {
            Ok(names) => names,
            // a database or a directory of temporary files dropped meanwhile
            Err(error) if error.kind() == ErrorKind::NotFound && !path.is_empty() => return Ok(()),
            Err(error) => return Err(Error::io("list", &on_disk, error)),
        };
        let unlogged = UnloggedRelations::among(names.iter().map(Vec::as_slice));
        for name in &names {
            let mut child = path.to_vec();
            if !path.is_empty() {
                child.push(b'/');
            }
            child.extend_from_slice(name);
            let class = self.layout.classify(&child);
            let drops = matches!(class, FileClass::Relation(_)) && unlogged.drops(name);
            if !drops {
                self.entry(&child, class)?;
            }
        }
        Ok(())
    }

    fn entry(&mut self, path: &[u8], class: FileClass) -> Result<()> {
        let on_disk = self.on_disk(path);
        refuse_reserved(path)?;
        let metadata = match fs::symlink_metadata(&on_disk) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(Error::io("look at", &on_disk, error)),
        };
        self.note_time(&metadata);
        match class {
            FileClass::Skip(_) => Ok(()),
            FileClass::KeepEmptyDirectory => {
                // pg_wal may be a link to another disk; in the backup it is a directory
                let metadata = fs::metadata(&on_disk).map_err(|error| Error::io("look at", &on_disk, error))?;
                self.push(path, &metadata, ScannedKind::Directory, None);
                match path == b"pg_wal" {
                    true => self.directory(path),
                    false => Ok(()),
                }
            }
            FileClass::TablespaceLink { oid } => self.tablespace(path, oid, &metadata),
            class => self.ordinary(path, class, &metadata),
        }
    }

    fn ordinary(&mut self, path: &[u8], class: FileClass, metadata: &Metadata) -> Result<()> {
        if metadata.is_dir() {
            if self.is_repository(metadata) {
                tracing::warn!("{} is not in the backup: it is the repository", self.on_disk(path).display());
                return Ok(());
            }
            self.push(path, metadata, ScannedKind::Directory, None);
            return self.enclosed(path, metadata);
        }
        if metadata.is_symlink() {
            return self.link(path, class);
        }
        if !metadata.is_file() {
            return Ok(()); // sockets and pipes belong to the running server
        }
        let first_block = match class {
            FileClass::Relation(relation) => Some(u64::from(relation.first_block)),
            _ => None,
        };
        let kind = if class == FileClass::Control { ScannedKind::Control } else { ScannedKind::File };
        self.push(path, metadata, kind, first_block);
        Ok(())
    }

    /// What lies in a directory that was pushed.
    fn enclosed(&mut self, path: &[u8], metadata: &Metadata) -> Result<()> {
        self.above.push(on_device(metadata));
        let done = self.directory(path);
        self.above.pop();
        done
    }

    /// A link that is no tablespace: what it leads to becomes an ordinary file or directory of the backup. A link that
    /// leads nowhere, or back to where it lies, is left out: no backup ends because of it.
    fn link(&mut self, path: &[u8], class: FileClass) -> Result<()> {
        let on_disk = self.on_disk(path);
        let left_out = |why: &str| {
            let target = fs::read_link(&on_disk).unwrap_or_default();
            tracing::warn!("{} is not in the backup: a link to {}, {why}", on_disk.display(), target.display());
            Ok(())
        };
        match fs::metadata(&on_disk) {
            Ok(target) if self.is_repository(&target) || self.is_in_repository(&on_disk) => {
                left_out("which is the repository, or lies in it")
            }
            Ok(target) if target.is_dir() && self.above.contains(&on_device(&target)) => left_out("which encloses it"),
            Ok(target) if target.is_dir() && self.links == LINKS_MAX => {
                left_out(&format!("inside {LINKS_MAX} linked directories, one in the other"))
            }
            Ok(target) if target.is_dir() => {
                self.push(path, &target, ScannedKind::Directory, None);
                self.links += 1;
                let done = self.enclosed(path, &target);
                self.links -= 1;
                done
            }
            Ok(target) => {
                self.note_time(&target);
                self.ordinary(path, class, &target)
            }
            Err(error) if error.kind() == ErrorKind::NotFound => match fs::symlink_metadata(&on_disk) {
                Ok(_) => left_out("which does not exist"),
                Err(_) => Ok(()),
            },
            Err(error) if error.raw_os_error() == Some(nix::errno::Errno::ELOOP as i32) => {
                left_out("which leads back to itself")
            }
            Err(error) => Err(Error::io("follow the link", &on_disk, error)),
        }
    }

    /// Whether this is the repository's own directory, by whatever path.
    fn is_repository(&self, of: &Metadata) -> bool {
        self.repository_at == Some(on_device(of))
    }

    fn is_in_repository(&self, path: &Path) -> bool {
        self.repository.is_some_and(|own| fs::canonicalize(path).is_ok_and(|target| target.starts_with(own)))
    }

    fn tablespace(&mut self, path: &[u8], oid: u32, metadata: &Metadata) -> Result<()> {
        let on_disk = self.on_disk(path);
        if !metadata.is_symlink() {
            return Err(Error::new(format!("tablespace {oid} is a directory inside the data directory"))
                .hint("in-place tablespaces are for PostgreSQL's own tests; move its tables to an ordinary one"));
        }
        let target = fs::read_link(&on_disk).map_err(|error| Error::io("read the link", &on_disk, error))?;
        // a relative link means something else wherever it is read next
        let place = match target.is_relative() {
            true => fs::canonicalize(&on_disk).map_err(|error| Error::io("follow", &on_disk, error))?,
            false => target.clone(),
        };
        let Some(shown) = place.to_str() else {
            return Err(Error::new(format!("the path of tablespace {oid} is not UTF-8: {}", place.display())).hint(
                "a backup notes it as text: move the directory, and make the link in pg_tblspc again while the server is down",
            ));
        };
        self.scan.tablespaces.push(Tablespace { oid, name: None, path: shown.to_owned() });
        let link = ScannedKind::Link(target.into_os_string().into_vec().into());
        self.push(path, metadata, link, None);
        let directory = match fs::metadata(&on_disk) {
            Ok(directory) => directory,
            // dropped meanwhile
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(Error::io("look at", &on_disk, error)),
        };
        self.enclosed(path, &directory)
    }

    fn push(&mut self, path: &[u8], metadata: &Metadata, kind: ScannedKind, first_block: Option<u64>) {
        let size = if matches!(kind, ScannedKind::File | ScannedKind::Control) { metadata.size() } else { 0 };
        self.scan.bytes += size;
        self.times.push((metadata.dev(), metadata.mtime().max(metadata.ctime())));
        let identity = (kind == ScannedKind::File).then(|| identity(metadata));
        self.scan.found.push(Scanned {
            path: path.into(),
            mode: metadata.mode() & 0o7777,
            mtime: metadata.mtime(),
            size,
            kind,
            first_block,
            identity,
            is_settled: false,
        });
    }

    fn note_time(&mut self, metadata: &Metadata) {
        let newest = self.newest.entry(metadata.dev()).or_insert(i64::MIN);
        *newest = (*newest).max(metadata.ctime());
    }

    /// What was found, and whose identity is settled.
    ///
    /// A time of change was set by the file system's own clock, so that clock is now past the newest one that was seen on
    /// it. Whatever changes a file from here on sets a time that is not older, and so differs from every time that is.
    /// Neither this machine's clock nor a time that somebody set comes into it.
    fn settled(self) -> Scan {
        let Self { mut scan, times, newest, .. } = self;
        for (found, (device, time)) in scan.found.iter_mut().zip(times) {
            let newest = newest.get(&device).copied().unwrap_or(i64::MIN);
            found.is_settled = found.identity.is_some() && time < newest.saturating_sub(SETTLED_SECONDS);
        }
        scan
    }

    fn on_disk(&self, path: &[u8]) -> PathBuf {
        self.root.join(OsStr::from_bytes(path))
    }
}

/// Refuses what could not be restored, since mounts and restores have something else under that name.
pub(super) fn refuse_reserved(path: &[u8]) -> Result<()> {
    match RESERVED.contains(&path) {
        true => Err(Error::new(format!("{} in the data directory has a name of pgcairn's own", path.escape_ascii()))
            .hint("mounts and restores need that name; move the file out of the data directory, or rename it")),
        false => Ok(()),
    }
}

/// Device and inode: what a directory is, by whatever path.
fn on_device(of: &Metadata) -> (u64, u64) {
    (of.dev(), of.ino())
}

/// Tells the state of a file from others: inode, and both times to the nanosecond. The device is not in it, whose number
/// changes when a machine starts again.
fn identity(of: &Metadata) -> u64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&of.ino().to_le_bytes());
    for number in [of.mtime(), of.mtime_nsec(), of.ctime(), of.ctime_nsec()] {
        hasher.update(&number.to_le_bytes());
    }
    let hash = *hasher.finalize().as_bytes();
    u64::from_le_bytes(std::array::from_fn(|at| hash[at]))
}

fn read_names(directory: &Path) -> std::io::Result<Vec<Vec<u8>>> {
    fs::read_dir(directory)?.map(|entry| Ok(entry?.file_name().into_vec())).collect()
}

#[cfg(test)]
mod tests;
