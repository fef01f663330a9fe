//! Listing a directory tree in the byte order of whole keys, page by page.
//!
//! That order is not the order of names: `a-b/x` comes before `a/x`, since `-` sorts before `/`. Comparing names with
//! the slash that follows a directory's name gives it.

use std::collections::BinaryHeap;
use std::fs::FileType;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::store::{Listed, PAGE_OBJECTS_MAX, Page, key};

/// Names of one directory held in memory at a time. A larger directory is read again for the next ones.
const NAMES_MAX: usize = PAGE_OBJECTS_MAX + 1;

/// The page of objects below `root` that start with `prefix` and come after `after`.
pub(super) fn list(root: &Path, prefix: &str, after: Option<&str>) -> io::Result<Page> {
    let mut walk = Walk { root, prefix, after, objects: Vec::new() };
    let (directory, _) = key::split_prefix(prefix);
    walk.directory(directory)?;
    let next = (walk.objects.len() > PAGE_OBJECTS_MAX).then(|| {
        walk.objects.truncate(PAGE_OBJECTS_MAX);
        walk.objects[PAGE_OBJECTS_MAX - 1].key.clone()
    });
    Ok(Page { objects: walk.objects, next })
}

/// The names directly below `directory` (empty or ending in a slash) that are objects or lead to one.
pub(super) fn names(root: &Path, directory: &str) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for_each(root, directory, |name, kind| {
        // a directory that lost its last object exists no more, as on S3
        if kind.is_file() || has_object(root, &format!("{directory}{name}/"))? {
            names.push(name.to_owned());
        }
        Ok(())
    })?;
    names.sort_unstable();
    Ok(names)
}

fn has_object(root: &Path, directory: &str) -> io::Result<bool> {
    let mut directories = Vec::new();
    let mut found = false;
    for_each(root, directory, |name, kind| {
        if kind.is_file() {
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
    root: &'a Path,
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
        let mut last = None;
        loop {
            let (paths, more) = self.smallest(directory, last.as_deref())?;
            for path in &paths {
                if path.ends_with('/') {
                    self.directory(path)?;
                } else {
                    self.object(path)?;
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
    fn smallest(&self, directory: &str, last: Option<&str>) -> io::Result<(Vec<String>, bool)> {
        let mut heap: BinaryHeap<String> = BinaryHeap::new();
        let mut more = false;
        for_each(self.root, directory, |name, kind| {
            let path = format!("{directory}{name}{}", if kind.is_dir() { "/" } else { "" });
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

    fn object(&mut self, path: &str) -> io::Result<()> {
        match self.root.join(path).symlink_metadata() {
            Ok(meta) => {
                self.objects.push(Listed { key: path.to_owned(), size: meta.len(), modified: meta.mtime() });
                Ok(())
            }
            // deleted since the directory was read
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(e),
        }
    }
}

/// Calls `f` for each file and directory of `directory` that can belong to a key. A missing directory is empty.
fn for_each(root: &Path, directory: &str, mut f: impl FnMut(&str, FileType) -> io::Result<()>) -> io::Result<()> {
    if leads_through_link(root, directory) {
        return Ok(());
    }
    let entries = match std::fs::read_dir(root.join(directory)) {
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        let kind = entry.file_type()?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        let is_object_or_directory = kind.is_file() || kind.is_dir();
        if is_object_or_directory && key::check(&format!("{directory}{name}")).is_ok() {
            f(name, kind)?;
        }
    }
    Ok(())
}

/// Reading an object through a symbolic link is refused, so nothing is listed behind one.
fn leads_through_link(root: &Path, directory: &str) -> bool {
    let slashes = directory.match_indices('/').map(|(at, _)| &directory[..at]);
    slashes.into_iter().any(|path| root.join(path).symlink_metadata().is_ok_and(|meta| meta.is_symlink()))
}
