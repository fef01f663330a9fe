//! The directories a restore writes to: made and given to their owner, without help for whoever planted a link on the way.

use std::fs::{self, DirBuilder, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{Mode, mkdirat};

use crate::error::{Error, Result};
use crate::read::tree::Owner;
use crate::user::{User, as_user, make_with_parents};

/// Makes the directory `path` with its parents, if it is not there, and makes it the owner's with this mode.
///
/// As the owner where that is enough. Only where it is not, and somebody named this directory (`is_named`), root does it:
/// a backup's own word for where a tablespace was must not make root give away a directory.
pub(super) fn make_place(path: &Path, mode: u32, owner: Option<Owner>, is_named: bool) -> Result<()> {
    let user = owner.and_then(|owner| User::other(owner.uid, owner.gid));
    let Some(user) = user else {
        return make(path, mode, owner);
    };
    let made = as_user(Some(&user), || make(path, mode, owner));
    match made {
        Err(error) if is_named && is_denied(&error) => {
            let failed = |error: io::Error| {
                let is_link = error.raw_os_error() == Some(Errno::ELOOP as i32);
                let failed = Error::io("make a directory of", path, error);
                match is_link {
                    true => failed.hint(format!(
                        "user {} cannot make it, and root follows no links where it makes or gives away a directory: name it by its real path",
                        user.name()
                    )),
                    false => failed,
                }
            };
            let open = make_as_root(path).map_err(failed)?;
            let owner = owner.map(|owner| (owner.uid, owner.gid)).unzip();
            fchown(&open, owner.0, owner.1).map_err(failed)?;
            open.set_permissions(fs::Permissions::from_mode(mode)).map_err(failed)
        }
        Err(error) if is_denied(&error) => Err(error.hint(format!(
            "user {} cannot make it there: make it and give it to that user, or say where it goes: --tablespace-map",
            user.name()
        ))),
        made => made,
    }
}

/// Takes over the directory `below` of `place`, which is the owner's, from another user.
pub(super) fn take_over(place: &Path, below: &Path, owner: Owner) -> Result<()> {
    let failed = |error: io::Error| Error::io("change the owner of", below, error);
    let rest = below.strip_prefix(place).unwrap_or(Path::new(""));
    if rest.as_os_str().is_empty() {
        return Ok(());
    }
    let flags = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS;
    let open = File::open(place).and_then(|place| open_directory(&place, rest, flags)).map_err(failed)?;
    fchown(&open, Some(owner.uid), Some(owner.gid)).map_err(failed)
}

/// Takes over the file `name` of `place`, if it is there, from another user: a marker that root's restore left.
pub(super) fn take_over_file(place: &Path, name: &str, owner: Owner) -> Result<()> {
    let path = place.join(name);
    let failed = |error: io::Error| Error::io("change the owner of", &path, error);
    let resolve = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS;
    let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let directory = File::open(place).map_err(failed)?;
    let open: File = match openat2(&directory, Path::new(name), OpenHow::new().flags(flags).resolve(resolve)) {
        Ok(open) => open.into(),
        Err(Errno::ENOENT) => return Ok(()),
        Err(error) => return Err(failed(error.into())),
    };
    let found = open.metadata().map_err(failed)?;
    // another name of a file elsewhere is not ours to give away
    match found.is_file() && found.nlink() == 1 && found.uid() != owner.uid {
        true => fchown(&open, Some(owner.uid), Some(owner.gid)).map_err(failed),
        false => Ok(()),
    }
}

/// Takes over a directory below `place` that is to go, with all directories in it: only their owner can empty them.
pub(super) fn take_over_all(place: &Path, below: &Path, owner: Owner) -> Result<()> {
    take_over(place, below, owner)?;
    for entry in fs::read_dir(below).map_err(|error| Error::io("list", below, error))? {
        let entry = entry.map_err(|error| Error::io("list", below, error))?;
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            take_over_all(place, &entry.path(), owner)?;
        }
    }
    Ok(())
}

/// Makes a directory with its parents, if it is not there, and sets its mode and owner.
pub(super) fn make(path: &Path, mode: u32, owner: Option<Owner>) -> Result<()> {
    if let Some(parent) = path.parent() {
        // the server's user has to get through them
        make_with_parents(parent, 0o755).map_err(|error| Error::io("create", parent, error))?;
    }
    match DirBuilder::new().mode(mode).create(path) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(Error::io("create", path, error)),
        _ => {}
    }
    let permissions = fs::Permissions::from_mode(mode);
    let found = fs::metadata(path).map_err(|error| Error::io("look at", path, error))?;
    if found.mode() & 0o7777 != mode {
        fs::set_permissions(path, permissions).map_err(|error| Error::io("set the mode of", path, error))?;
    }
    let is_given = owner.is_none_or(|owner| owner.uid == found.uid());
    if is_given { Ok(()) } else { super::give(path, owner) }
}

/// Makes what is missing of a path in which no part is a link, and opens it.
fn make_as_root(path: &Path) -> io::Result<File> {
    let mut missing: Vec<PathBuf> = Vec::new();
    let mut there = path;
    let mut open = loop {
        match open_directory(AT_FDCWD, there, ResolveFlag::RESOLVE_NO_SYMLINKS) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let name = there.file_name().ok_or(ErrorKind::InvalidInput)?;
                missing.push(PathBuf::from(name));
                there = there.parent().ok_or(ErrorKind::InvalidInput)?;
            }
            opened => break opened?,
        }
    };
    while let Some(name) = missing.pop() {
        mkdirat(&open, &name, Mode::from_bits_truncate(0o755))?;
        open = open_directory(&open, &name, ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS)?;
        // whatever the umask: the server's user has to get through it
        open.set_permissions(fs::Permissions::from_mode(0o755))?;
    }
    Ok(open)
}

fn open_directory(at: impl std::os::fd::AsFd, path: &Path, resolve: ResolveFlag) -> io::Result<File> {
    let how = OpenHow::new().flags(OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC).resolve(resolve);
    Ok(openat2(at, path, how)?.into())
}

fn is_denied(error: &Error) -> bool {
    error.find::<io::Error>().is_some_and(|error| error.kind() == ErrorKind::PermissionDenied)
}
