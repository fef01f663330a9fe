//! Objects as files below a directory: the embedded default, with the same keys as on S3.
//!
//! An object appears under its key by one rename, after its bytes are on disk, so a reader sees all of it or nothing,
//! also after a power failure. Symbolic links below the root are never followed: whoever may write into the repository
//! must not be able to make its reader open something else.

use std::collections::HashSet;
use std::ffi::{CStr, OsString};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, fchown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat, openat2, renameat};
use nix::sys::stat::{Mode, SFlag, fstatat, mkdirat};
use nix::unistd::{UnlinkatFlags, unlinkat};
use parking_lot::Mutex;

use super::{Body, ErrorKind, Page, Result, Store, StoreError};
use crate::store::object_key;
use crate::user::make_with_parents;

mod walk;

/// A temporary file this old was left by a writer that died.
const TEMP_AGE_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// How many directories are remembered as durable; the rest are synced again, which is only slower.
const DURABLE_DIRECTORIES_MAX: usize = 4096;

/// How often a directory that vanishes under a writer is made again.
const PLACE_TRIES_MAX: u32 = 5;

const FILE_MODE: u32 = 0o640;
const DIRECTORY_MODE: Mode = Mode::S_IRWXU.union(Mode::S_IRGRP).union(Mode::S_IXGRP);

/// A store in a local directory.
#[derive(Debug)]
pub struct DirectoryStore {
    root: PathBuf,
    url: String,
    /// directories, relative to the root, that this process has synced together with all their parents
    durable: Mutex<HashSet<PathBuf>>,
    /// whose everything below the root is, where that is not simply whoever writes it: what root writes belongs to the
    /// owner of the root directory, so that the server's user can archive into what root created
    owner: Option<Owner>,
}

#[derive(Clone, Copy, Debug)]
struct Owner {
    uid: u32,
    gid: u32,
}

impl DirectoryStore {
    /// Opens the directory `path`, which may itself be a symbolic link; makes it and its parents when `create`.
    pub fn open(path: &Path, create: bool) -> Result<Self> {
        let shown = std::path::absolute(path).unwrap_or_else(|_| path.to_owned()).display().to_string();
        let failed = |e: io::Error| failure("open", &shown, "", e);
        if create {
            create_root(path).map_err(failed)?;
        }
        let root = path.canonicalize().map_err(failed)?;
        if !root.is_dir() {
            return Err(StoreError::new(ErrorKind::Other, "open", &shown, "", "not a directory"));
        }
        let url = root.display().to_string();
        let owner = owner_for_root(&root).map_err(failed)?;
        let store = Self { root, url, durable: Mutex::default(), owner };
        let _ = store.remove_old_temp_files();
        Ok(store)
    }

    /// Removes the temporary files of writers that died. Failing to is no harm: the directory may be read-only.
    ///
    /// Only regular files with a name of ours go, and only from a directory that was opened without following a
    /// link: whoever may write the repository must not choose what is deleted.
    fn remove_old_temp_files(&self) -> io::Result<()> {
        let root = File::open(&self.root)?;
        let directory = open_beneath(&root, Path::new(object_key::RESERVED), OFlag::O_DIRECTORY)?;
        // each file that a writer makes gives the directory this time, by the file system's own clock: this machine's may be
        // ahead, and then the files of writers at work would look old
        let now = directory.metadata()?.mtime();
        for entry in walk::entries(&directory)? {
            let (name, _) = entry?;
            if !is_temp_name(&name) {
                continue;
            }
            let Ok(found) = fstatat(&directory, name.as_c_str(), AtFlags::AT_SYMLINK_NOFOLLOW) else { continue };
            let is_file = SFlag::from_bits_truncate(found.st_mode) & SFlag::S_IFMT == SFlag::S_IFREG;
            if is_file && now.saturating_sub(found.st_mtime) > TEMP_AGE_MAX.as_secs() as i64 {
                let _ = unlinkat(&directory, name.as_c_str(), UnlinkatFlags::NoRemoveDir);
            }
        }
        Ok(())
    }

    fn error(&self, operation: &'static str, key: &str, error: io::Error) -> StoreError {
        failure(operation, &self.url, key, error)
    }

    fn open_root(&self) -> Result<File> {
        // a repository that is not mounted is not an empty one: never "no such object"
        File::open(&self.root).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => StoreError::new(ErrorKind::Other, "open", &self.url, "", e),
            _ => failure("open", &self.url, "", e),
        })
    }

    /// The object's file and length, `None` when there is none.
    fn open_object(&self, key: &str) -> Result<Option<(File, u64)>> {
        object_key::require("read", &self.url, key)?;
        let root = self.open_root()?;
        // not O_PATH: a file that may not be read must say so here; O_NONBLOCK: never hang on a pipe put there
        let file = match open_beneath(&root, Path::new(key), OFlag::O_RDONLY | OFlag::O_NONBLOCK) {
            Ok(file) => file,
            Err(e) if is_missing(&e) => return Ok(None),
            Err(e) => return Err(self.error("read", key, e)),
        };
        let meta = file.metadata().map_err(|e| self.error("read", key, e))?;
        Ok(meta.is_file().then_some((file, meta.len())))
    }

    fn require_object(&self, key: &str) -> Result<(File, u64)> {
        self.open_object(key)?
            .ok_or_else(|| StoreError::new(ErrorKind::NotFound, "read", &self.url, key, "no such object"))
    }

    fn write(&self, root: &File, key: &Path, body: &Body) -> io::Result<()> {
        let temp_directory = self.temp_directory(root)?;
        let temp = TempFile::create(&temp_directory)?;
        if let Some(owner) = self.owner {
            fchown(&temp.file, Some(owner.uid), Some(owner.gid))?;
        }
        match body {
            Body::Bytes(bytes) => (&temp.file).write_all(bytes)?,
            Body::File(path) => {
                io::copy(&mut File::open(path)?, &mut &temp.file)?;
            }
        }
        temp.file.sync_all()?;
        self.place(root, temp, key)
    }

    fn temp_directory(&self, root: &File) -> io::Result<File> {
        self.make_directories(root, Path::new(object_key::RESERVED))?;
        open_beneath(root, Path::new(object_key::RESERVED), OFlag::O_DIRECTORY)
    }

    /// Renames the temporary file to its key, in a directory that may have to be made.
    fn place(&self, root: &File, mut temp: TempFile<'_>, key: &Path) -> io::Result<()> {
        let parent = key.parent().unwrap_or(Path::new(""));
        let name = key.file_name().ok_or(Errno::EINVAL)?;
        for tries in 1.. {
            self.make_directories(root, parent)?;
            let placed = open_directory(root, parent).and_then(|directory| {
                renameat(temp.directory, temp.name.as_os_str(), &directory, name)?;
                temp.placed = true;
                sync_directory(&directory)
            });
            match placed {
                // somebody removed the empty directory in between
                Err(e) if e.kind() == io::ErrorKind::NotFound && !temp.placed && tries < PLACE_TRIES_MAX => {
                    self.durable.lock().clear();
                }
                placed => return placed,
            }
        }
        Ok(())
    }

    /// Makes `directory` and its parents below the root, and makes durable that they exist, whoever made them: the one
    /// who did may not have come to its own sync when the power fails.
    fn make_directories(&self, root: &File, directory: &Path) -> io::Result<()> {
        let (Some(parent), Some(name)) = (directory.parent(), directory.file_name()) else { return Ok(()) };
        if self.durable.lock().contains(directory) {
            return Ok(());
        }
        self.make_directories(root, parent)?;
        let parent = open_directory(root, parent)?;
        match (mkdirat(&parent, name, DIRECTORY_MODE), self.owner) {
            (Ok(()), Some(owner)) => {
                let made = open_beneath(&parent, Path::new(name), OFlag::O_DIRECTORY)?;
                fchown(&made, Some(owner.uid), Some(owner.gid))?;
            }
            (Ok(()), None) | (Err(Errno::EEXIST), _) => {}
            (Err(e), _) => return Err(e.into()),
        }
        sync_directory(&parent)?;
        let mut durable = self.durable.lock();
        if durable.len() >= DURABLE_DIRECTORIES_MAX {
            durable.clear();
        }
        durable.insert(directory.to_owned());
        Ok(())
    }

    fn delete_one(&self, root: &File, key: &Path) -> io::Result<()> {
        let parent = key.parent().unwrap_or(Path::new(""));
        let name = key.file_name().ok_or(Errno::EINVAL)?;
        let gone = open_directory(root, parent).and_then(|directory| {
            unlinkat(&directory, name, UnlinkatFlags::NoRemoveDir)?;
            Ok(())
        });
        match gone {
            Err(e) if is_missing(&e) || e.raw_os_error() == Some(Errno::EISDIR as i32) => Ok(()),
            gone => gone,
        }
    }
}

impl Store for DirectoryStore {
    fn get(&self, key: &str) -> Result<Bytes> {
        let (mut file, len) = self.require_object(key)?;
        let mut bytes = Vec::new();
        let read = bytes.try_reserve_exact(len as usize).map_err(io::Error::other);
        read.and_then(|()| file.read_to_end(&mut bytes)).map_err(|e| self.error("read", key, e))?;
        Ok(bytes.into())
    }

    fn get_range(&self, key: &str, offset: u64, len: u64) -> Result<Bytes> {
        let (file, size) = self.require_object(key)?;
        if offset.checked_add(len).is_none_or(|end| end > size) {
            return Err(StoreError::truncated(&self.url, key, offset, len, Some(size)));
        }
        let mut bytes = Vec::new();
        let room = bytes.try_reserve_exact(len as usize).map_err(io::Error::other);
        let sought = room.and_then(|()| (&file).seek(SeekFrom::Start(offset)));
        sought.and_then(|_| (&file).take(len).read_to_end(&mut bytes)).map_err(|e| self.error("read", key, e))?;
        match bytes.len() as u64 == len {
            true => Ok(bytes.into()),
            false => Err(StoreError::truncated(&self.url, key, offset, len, None)),
        }
    }

    fn put(&self, key: &str, body: Body) -> Result<()> {
        object_key::require("write", &self.url, key)?;
        let root = self.open_root()?;
        self.write(&root, Path::new(key), &body).map_err(|e| match e.kind() {
            // what is missing while writing is the directory or the source, not an object
            io::ErrorKind::NotFound => StoreError::new(ErrorKind::Other, "write", &self.url, key, e),
            _ => self.error("write", key, e),
        })
    }

    fn size(&self, key: &str) -> Result<Option<u64>> {
        Ok(self.open_object(key)?.map(|(_, size)| size))
    }

    fn list(&self, prefix: &str, after: Option<&str>) -> Result<Page> {
        object_key::require_prefix(&self.url, prefix)?;
        let root = self.open_root()?;
        walk::list(&root, prefix, after).map_err(|e| self.error("list", prefix, e))
    }

    fn names(&self, prefix: &str) -> Result<Vec<String>> {
        object_key::require_directory(&self.url, prefix)?;
        let root = self.open_root()?;
        walk::names(&root, prefix).map_err(|e| self.error("list", prefix, e))
    }

    fn delete(&self, keys: &[String]) -> Result<()> {
        keys.iter().try_for_each(|key| object_key::require("delete", &self.url, key))?;
        let root = self.open_root()?;
        for key in keys {
            self.delete_one(&root, Path::new(key)).map_err(|e| self.error("delete", key, e))?;
        }
        Ok(())
    }

    fn url(&self) -> &str {
        &self.url
    }
}

/// A file being written; removed unless it was placed under its key.
struct TempFile<'a> {
    directory: &'a File,
    name: OsString,
    file: File,
    placed: bool,
}

impl<'a> TempFile<'a> {
    fn create(directory: &'a File) -> io::Result<Self> {
        // random: writers on several hosts may share the directory
        let random = getrandom::u64().map_err(io::Error::other)?;
        let name = OsString::from(format!("{}-{random:016x}", std::process::id()));
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let file = openat(directory, name.as_os_str(), flags, Mode::from_bits_truncate(FILE_MODE))?.into();
        Ok(Self { directory, name, file, placed: false })
    }
}

impl Drop for TempFile<'_> {
    fn drop(&mut self) {
        if !self.placed {
            let _ = unlinkat(self.directory, self.name.as_os_str(), UnlinkatFlags::NoRemoveDir);
        }
    }
}

/// Whether [`TempFile::create`] gives such names.
fn is_temp_name(name: &CStr) -> bool {
    let parts = name.to_str().ok().and_then(|name| name.split_once('-'));
    parts.is_some_and(|(process, random)| {
        !process.is_empty()
            && process.bytes().all(|byte| byte.is_ascii_digit())
            && random.len() == 16
            && random.bytes().all(|byte| byte.is_ascii_hexdigit())
    })
}

/// The owner of the root directory, if we are root and it is somebody else's.
fn owner_for_root(root: &Path) -> io::Result<Option<Owner>> {
    let metadata = root.metadata()?;
    let differs = nix::unistd::geteuid().is_root() && metadata.uid() != 0;
    Ok(differs.then_some(Owner { uid: metadata.uid(), gid: metadata.gid() }))
}

/// Makes the root with its parents and makes durable that it exists.
fn create_root(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    let path = std::path::absolute(path)?;
    let missing: Vec<&Path> = path.ancestors().take_while(|ancestor| !ancestor.exists()).collect();
    // those above it are not the repository's alone: the server's user gets through them, whatever the umask
    make_with_parents(&path, DIRECTORY_MODE.bits())?;
    for made in missing {
        if let Some(parent) = made.parent() {
            sync_directory(&File::open(parent)?)?;
        }
    }
    Ok(())
}

fn sync_directory(directory: &File) -> io::Result<()> {
    match directory.sync_all() {
        // some network file systems cannot sync directories, and need not
        Err(e) if matches!(e.raw_os_error().map(Errno::from_raw), Some(Errno::EINVAL | Errno::ENOTSUP)) => Ok(()),
        synced => synced,
    }
}

fn open_directory(root: &File, path: &Path) -> io::Result<File> {
    if path.as_os_str().is_empty() { root.try_clone() } else { open_beneath(root, path, OFlag::O_DIRECTORY) }
}

/// Opens `path` below `root` for reading without following any symbolic link.
fn open_beneath(root: &File, path: &Path, flags: OFlag) -> io::Result<File> {
    // no O_NOFOLLOW: with O_DIRECTORY it makes "not a directory" of a link, which reads like "missing"
    let how = OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
    Ok(openat2(root, path, how)?.into())
}

/// Says of an error what it means here that a path leads through a symbolic link.
fn explain(error: io::Error) -> io::Error {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ELOOP) => {
            io::Error::other("a symbolic link is in the way; below the repository's own directory none is followed")
        }
        _ => error,
    }
}

/// There is no such file, or something on the way to it is itself a file.
fn is_missing(error: &io::Error) -> bool {
    matches!(error.raw_os_error().map(Errno::from_raw), Some(Errno::ENOENT | Errno::ENOTDIR))
}

fn failure(operation: &'static str, url: &str, key: &str, error: io::Error) -> StoreError {
    let kind = match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ENOENT) => ErrorKind::NotFound,
        Some(Errno::ENOSPC | Errno::EDQUOT) => ErrorKind::NoSpace,
        Some(Errno::EACCES | Errno::EPERM | Errno::EROFS) => ErrorKind::Denied,
        Some(Errno::ESTALE | Errno::ETIMEDOUT | Errno::EAGAIN | Errno::EHOSTDOWN | Errno::EHOSTUNREACH) => {
            ErrorKind::Transient
        }
        _ => ErrorKind::Other,
    };
    StoreError::new(kind, operation, url, key, explain(error))
}
