//! What is in a data directory and belongs into a backup of it.

use std::ffi::OsStr;
use std::fs::{self, Metadata};
use std::io::ErrorKind;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::format::manifest::{Tablespace, path_cmp};
use crate::postgres::{FileClass, Layout, UnloggedRelations};

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

/// Lists a data directory by the rules of PostgreSQL's own base backup.
pub fn scan(root: &Path, layout: Layout) -> Result<Scan> {
    let mut scanner = Scanner { root, layout, scan: Scan { found: Vec::new(), tablespaces: Vec::new(), bytes: 0 } };
    let metadata = fs::metadata(root).map_err(|error| Error::io("read the data directory", root, error))?;
    scanner.push(&[], &metadata, ScannedKind::Directory, None);
    scanner.directory(&[], false)?;
    let mut scan = scanner.scan;
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
}

impl Scanner<'_> {
    /// Everything below `path`; `linked` says that a symbolic link led here, so that another one is not followed.
    fn directory(&mut self, path: &[u8], linked: bool) -> Result<()> {
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
                self.entry(&child, class, linked)?;
            }
        }
        Ok(())
    }

    fn entry(&mut self, path: &[u8], class: FileClass, linked: bool) -> Result<()> {
        let on_disk = self.on_disk(path);
        let metadata = match fs::symlink_metadata(&on_disk) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(Error::io("look at", &on_disk, error)),
        };
        match class {
            FileClass::Skip(_) => Ok(()),
            FileClass::KeepEmptyDirectory => {
                // pg_wal may be a link to another disk; in the backup it is a directory
                let metadata = fs::metadata(&on_disk).map_err(|error| Error::io("look at", &on_disk, error))?;
                self.push(path, &metadata, ScannedKind::Directory, None);
                match path == b"pg_wal" {
                    true => self.directory(path, true),
                    false => Ok(()),
                }
            }
            FileClass::TablespaceLink { oid } => self.tablespace(path, oid, &metadata),
            class => self.ordinary(path, class, &metadata, linked),
        }
    }

    fn ordinary(&mut self, path: &[u8], class: FileClass, metadata: &Metadata, linked: bool) -> Result<()> {
        if metadata.is_dir() {
            self.push(path, metadata, ScannedKind::Directory, None);
            return self.directory(path, linked);
        }
        if metadata.is_symlink() {
            return self.link(path, class, linked);
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

    /// A link that is no tablespace: what it leads to becomes an ordinary file or directory of the backup.
    fn link(&mut self, path: &[u8], class: FileClass, linked: bool) -> Result<()> {
        let on_disk = self.on_disk(path);
        match fs::metadata(&on_disk) {
            Ok(target) if target.is_dir() && linked => {
                Err(Error::new(format!("{} is a link to a directory inside a linked directory", on_disk.display()))
                    .hint("move it out of the data directory; only one level of links is followed"))
            }
            Ok(target) if target.is_dir() => {
                self.push(path, &target, ScannedKind::Directory, None);
                self.directory(path, true)
            }
            Ok(target) => self.ordinary(path, class, &target, linked),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            Err(error) => Err(Error::io("follow", &on_disk, error)),
        }
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
        self.scan.tablespaces.push(Tablespace { oid, name: None, path: place.to_string_lossy().into_owned() });
        let link = ScannedKind::Link(target.into_os_string().into_vec().into());
        self.push(path, metadata, link, None);
        self.directory(path, true)
    }

    fn push(&mut self, path: &[u8], metadata: &Metadata, kind: ScannedKind, first_block: Option<u64>) {
        let size = if matches!(kind, ScannedKind::File | ScannedKind::Control) { metadata.size() } else { 0 };
        self.scan.bytes += size;
        self.scan.found.push(Scanned {
            path: path.into(),
            mode: metadata.mode() & 0o7777,
            mtime: metadata.mtime(),
            size,
            kind,
            first_block,
        });
    }

    fn on_disk(&self, path: &[u8]) -> PathBuf {
        self.root.join(OsStr::from_bytes(path))
    }
}

fn read_names(directory: &Path) -> std::io::Result<Vec<Vec<u8>>> {
    fs::read_dir(directory)?.map(|entry| Ok(entry?.file_name().into_vec())).collect()
}
