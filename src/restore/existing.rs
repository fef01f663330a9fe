//! What is already there and what of it stays: the files that are compared, and what does not belong.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, Metadata};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::VERSION_FILE;
use super::marker::MARKER;
use super::plan::{Plan, Target};
use crate::error::{Error, Result};
use crate::read::tree::Owner;
use crate::user::User;

/// What was found in the places of a restore.
#[derive(Debug, Default)]
pub(super) struct Local {
    /// number in [`Plan::files`] of each file that can be compared where it is, and its length
    pub(super) files: HashMap<usize, u64>,
    /// what goes: files and links, and directories with all that is in them
    pub(super) removed: Vec<PathBuf>,
    /// how many files and links of these are at paths that the backup does not have
    pub(super) removed_files: u64,
    /// what is to be said of what goes
    pub(super) note: Option<String>,
    /// bytes of all regular files found, by place: space that need not be free
    pub(super) bytes: HashMap<PathBuf, u64>,
}

/// What the plan has at a path.
enum Planned<'a> {
    Directory,
    Link(&'a Path),
    /// its number among the files that are compared
    File(usize),
    /// a file that is written anew
    Rewritten,
    /// the same, but it goes later
    Aside,
}

/// Looks at everything below the places of `plan`, of which in tablespaces only `version` counts: other versions keep their own
/// directories beside it. Nothing is changed.
pub(super) fn look(plan: &Plan, root: &Path, version: &str, owner: Option<Owner>) -> Result<Local> {
    let mut planned = HashMap::new();
    planned.extend(plan.directories.iter().map(|(path, _)| (path.as_path(), Planned::Directory)));
    planned.extend(plan.links.iter().map(|(path, target)| (path.as_path(), Planned::Link(target))));
    let number = |(number, target): (usize, &'_ Target)| (target.path.clone(), number);
    let files: HashMap<PathBuf, usize> = plan.files.iter().enumerate().map(number).collect();
    planned.extend(files.iter().map(|(path, number)| (path.as_path(), Planned::File(*number))));
    let version_file = root.join(VERSION_FILE);
    planned.insert(&version_file, Planned::Aside);
    let rewritten = plan.zeros.iter().chain([&plan.control]);
    planned.extend(rewritten.map(|target| (target.path.as_path(), Planned::Rewritten)));
    let user = owner.filter(|owner| User::other(owner.uid, owner.gid).is_some());
    let mut look = Look { planned, local: Local::default(), place: root.to_owned(), user: user.map(|user| user.uid) };
    look.directory(root, None)?;
    for place in plan.places.values() {
        look.place.clone_from(place);
        if place.is_dir() {
            look.directory(place, Some(OsStr::new(version)))?;
        }
    }
    Ok(look.local)
}

struct Look<'a> {
    planned: HashMap<&'a Path, Planned<'a>>,
    local: Local,
    place: PathBuf,
    /// as whom the files are written
    user: Option<u32>,
}

impl Look<'_> {
    /// Everything below a directory that stays, or only what is called `only`.
    fn directory(&mut self, path: &Path, only: Option<&OsStr>) -> Result<()> {
        for entry in fs::read_dir(path).map_err(|error| Error::io("list", path, error))? {
            let entry = entry.map_err(|error| Error::io("list", path, error))?;
            if only.is_some_and(|only| entry.file_name() != only) {
                continue;
            }
            let path = entry.path();
            let metadata = fs::symlink_metadata(&path).map_err(|error| Error::io("look at", &path, error))?;
            self.entry(&path, &metadata)?;
        }
        Ok(())
    }

    fn entry(&mut self, path: &Path, found: &Metadata) -> Result<()> {
        if path.file_name() == Some(OsStr::new(MARKER)) && path.parent() == Some(&self.place) {
            return Ok(());
        }
        if found.is_file() {
            *self.local.bytes.entry(self.place.clone()).or_default() += found.blocks() * 512;
        }
        match self.planned.get(path) {
            Some(Planned::Directory | Planned::File(_) | Planned::Rewritten | Planned::Aside) if found.is_symlink() => {
                refuse_link(path)
            }
            Some(Planned::Aside) if found.is_file() => Ok(()),
            Some(Planned::Directory) if found.is_dir() => self.directory(path, None),
            Some(Planned::Link(target)) if found.is_symlink() => match fs::read_link(path) {
                Ok(there) if there == *target => Ok(()),
                Ok(_) => self.goes(path),
                Err(error) => Err(Error::io("read the link", path, error)),
            },
            // a file of another user cannot be written to, and another name of the same file may be another cluster's, as after pg_upgrade --link
            Some(Planned::File(number))
                if found.is_file() && found.nlink() == 1 && self.user.is_none_or(|user| user == found.uid()) =>
            {
                self.local.files.insert(*number, found.len());
                Ok(())
            }
            // something else in the place of what the backup has
            Some(_) => self.goes(path),
            None => self.goes(path).and_then(|()| self.count(path, found)),
        }
    }

    fn goes(&mut self, path: &Path) -> Result<()> {
        self.local.removed.push(path.to_owned());
        Ok(())
    }

    fn count(&mut self, path: &Path, found: &Metadata) -> Result<()> {
        if !found.is_dir() {
            self.local.removed_files += 1;
            return Ok(());
        }
        for entry in fs::read_dir(path).map_err(|error| Error::io("list", path, error))? {
            let entry = entry.map_err(|error| Error::io("list", path, error))?;
            let found = entry.metadata().map_err(|error| Error::io("look at", &entry.path(), error))?;
            self.count(&entry.path(), &found)?;
        }
        Ok(())
    }
}

/// What a link leads to may be anybody's: nothing is written through it, and it is not replaced in silence.
fn refuse_link(path: &Path) -> Result<()> {
    let target = fs::read_link(path).unwrap_or_default();
    Err(Error::new(format!(
        "{} is a symbolic link to {}, which the backup does not have",
        path.display(),
        target.display()
    ))
    .hint("remove the link: its place is filled from the backup; or restore into an empty directory"))
}

impl Local {
    /// Removes what goes, links not followed.
    pub(super) fn remove(&self) -> Result<()> {
        self.removed.iter().try_for_each(|path| {
            let removed = fs::symlink_metadata(path).and_then(|found| match found.is_dir() {
                true => fs::remove_dir_all(path),
                false => fs::remove_file(path),
            });
            match removed {
                // pg_control went before all else
                Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
                removed => removed.map_err(|error| Error::io("remove", path, error)),
            }
        })
    }
}
