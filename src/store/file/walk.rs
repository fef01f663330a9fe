//! Listing a directory tree in the byte order of whole keys, page by page.
//!
//! That order is not the order of names: `a-b/x` comes before `a/x`, since `-` sorts before `/`. Comparing names with
//! the slash that follows a directory's name gives it.

use std::collections::BinaryHeap;
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::path::Path;

use nix::dir::{Dir, Type};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag};
use nix::sys::stat::{SFlag, fstatat};

use super::{is_missing, open_beneath};
use crate::store::{Listed, PAGE_OBJECTS_MAX, Page, object_key};

/// Names of one directory held in memory at a time. A larger directory is read again for the next ones.
const NAMES_MAX: usize = PAGE_OBJECTS_MAX + 1;

/// The page of objects below `root` that start with `prefix` and come after `after`.
pub(super) fn list(root: &File, prefix: &str, after: Option<&str>) -> io::Result<Page> {
    let mut walk = Walk { root, prefix, after, objects: Vec::new() };
    let (directory, _) = object_key::split_prefix(prefix);
    walk.directory(directory)?;
    let next = (walk.objects.len() > PAGE_OBJECTS_MAX).then(|| {
        walk.objects.truncate(PAGE_OBJECTS_MAX);
        walk.objects[PAGE_OBJECTS_MAX - 1].key.clone()
    });
    Ok(Page { objects: walk.objects, next })
}

/// The names directly below `directory` (empty or ending in a slash) that are objects or lead to one.
pub(super) fn names(root: &File, directory: &str) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    let Some(open) = open(root, directory)? else { return Ok(names) };
    for_each(&open, directory, |name, kind| {
        // a directory that lost its last object exists no more, as on S3
        if kind == Kind::Object || has_object(root, &format!("{directory}{name}/"))? {
            names.push(name.to_owned());
        }
        Ok(())
    })?;
    names.sort_unstable();
    Ok(names)
}

fn has_object(root: &File, directory: &str) -> io::Result<bool> {
    let mut directories = Vec::new();
    let mut found = false;
    let Some(open) = open(root, directory)? else { return Ok(false) };
    for_each(&open, directory, |name, kind| {
        if kind == Kind::Object {
            found = true;
        } else if !found {
            directories.push(format!("{directory}{name}/"));
        }
        Ok(())
    })?;
    for below in directories {
        if found {
            break;
        }
        found = has_object(root, &below)?;
    }
    Ok(found)
}

struct Walk<'a> {
    root: &'a File,
    prefix: &'a str,
    after: Option<&'a str>,
    /// one more than a page at most: it tells whether there is another page
    objects: Vec<Listed>,
}

impl Walk<'_> {
    fn is_full(&self) -> bool {
        self.objects.len() > PAGE_OBJECTS_MAX
    }

    /// Adds what lies below `directory`, which is empty or ends in a slash.
    fn directory(&mut self, directory: &str) -> io::Result<()> {
        let Some(open) = open(self.root, directory)? else { return Ok(()) };
        let mut last = None;
        loop {
            let (paths, more) = self.smallest(&open, directory, last.as_deref())?;
            for path in &paths {
                if path.ends_with('/') {
                    self.directory(path)?;
                } else {
                    self.object(&open, path, &path[directory.len()..])?;
                }
                if self.is_full() {
                    return Ok(());
                }
            }
            if !more {
                return Ok(());
            }
            last = paths.into_iter().next_back();
        }
    }

    /// The first paths of one directory that matter, in order; those of directories end in a slash. And whether there
    /// are more.
    fn smallest(&self, open: &File, directory: &str, last: Option<&str>) -> io::Result<(Vec<String>, bool)> {
        let mut heap: BinaryHeap<String> = BinaryHeap::new();
        let mut more = false;
        for_each(open, directory, |name, kind| {
            let path = format!("{directory}{name}{}", if kind == Kind::Directory { "/" } else { "" });
            if !self.matters(&path) || last.is_some_and(|last| path.as_str() <= last) {
                return Ok(());
            }
            heap.push(path);
            if heap.len() > NAMES_MAX {
                heap.pop();
                more = true;
            }
            Ok(())
        })?;
        Ok((heap.into_sorted_vec(), more))
    }

    /// Whether `path` is, or may lead to, an object with the prefix and after the last one listed.
    fn matters(&self, path: &str) -> bool {
        let is_directory = path.ends_with('/');
        let has_prefix = path.starts_with(self.prefix) || is_directory && self.prefix.starts_with(path);
        has_prefix && self.after.is_none_or(|after| path > after || is_directory && after.starts_with(path))
    }

    fn object(&mut self, directory: &File, path: &str, name: &str) -> io::Result<()> {
        match fstatat(directory, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(found) => {
                let size = u64::try_from(found.st_size).unwrap_or_default();
                self.objects.push(Listed { key: path.to_owned(), size, modified: found.st_mtime });
                Ok(())
            }
            // deleted since the directory was read
            Err(Errno::ENOENT) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }
}

/// What an entry of a directory is to a listing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Object,
    Directory,
}

/// Opens a directory without following links. Returns `None` if there is none.
fn open(root: &File, directory: &str) -> io::Result<Option<File>> {
    let path = if directory.is_empty() { "." } else { directory };
    match open_beneath(root, Path::new(path), OFlag::O_RDONLY | OFlag::O_DIRECTORY) {
        Ok(open) => Ok(Some(open)),
        Err(e) if is_missing(&e) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Calls `f` for each file and directory that can belong to a key. A symbolic link under a key's name is an error: what
/// it hides would be missing in the listing, and expire deletes what no listing needs.
fn for_each(open: &File, directory: &str, mut f: impl FnMut(&str, Kind) -> io::Result<()>) -> io::Result<()> {
    for entry in entries(open)? {
        let (name, kind) = entry?;
        let Ok(name) = name.to_str() else { continue };
        if object_key::check(&format!("{directory}{name}")).is_err() {
            continue;
        }
        let kind = match kind {
            Some(kind) => Ok(kind),
            None => kind_of(open, name),
        };
        match kind {
            Ok(Type::File) => f(name, Kind::Object)?,
            Ok(Type::Directory) => f(name, Kind::Directory)?,
            Ok(Type::Symlink) => {
                return Err(io::Error::other(format!(
                    "{directory}{name} is a symbolic link; below the repository's own directory none is followed"
                )));
            }
            Ok(_) | Err(Errno::ENOENT) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// The names in an open directory, and of what kind they are where its file system says so.
pub(super) fn entries(directory: &File) -> io::Result<impl Iterator<Item = io::Result<(CString, Option<Type>)>>> {
    // opened again: a position in the directory of its own
    let again = open_beneath(directory, Path::new("."), OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
    let entries = Dir::from_fd(again.into())?.into_iter();
    let is_other = |name: &CString| !matches!(name.to_bytes(), b"." | b"..");
    Ok(entries
        .map(|entry| entry.map(|entry| (entry.file_name().to_owned(), entry.file_type())).map_err(io::Error::from))
        .filter(move |entry| entry.as_ref().map_or(true, |(name, _)| is_other(name))))
}

fn kind_of(directory: &File, name: &str) -> nix::Result<Type> {
    let found = fstatat(directory, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
    Ok(match SFlag::from_bits_truncate(found.st_mode) & SFlag::S_IFMT {
        SFlag::S_IFREG => Type::File,
        SFlag::S_IFDIR => Type::Directory,
        SFlag::S_IFLNK => Type::Symlink,
        _ => Type::Fifo,
    })
}
