//! Work on a user's files as that user, though root runs the program.
//!
//! Whoever owns a directory can put a symbolic link, or a hard link, in the place of any file in it, at any moment. What
//! root opens, makes or gives away by path in such a directory is therefore the user's choice. Checks before the call do
//! not help, since the user can be faster. Here the thread becomes that user for the file system alone (`setfsuid(2)`,
//! which Linux keeps per thread), and the kernel refuses what the user may not do.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, DirBuilder, Metadata, Permissions};
use std::io;
use std::marker::PhantomData;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};

use nix::unistd::{Gid, Uid, geteuid, getgroups, setfsgid, setfsuid};
use parking_lot::Mutex;

use crate::error::{Error, Result};

/// A user other than root, for whom root works.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    uid: Uid,
    gid: Gid,
    groups: Vec<Gid>,
}

impl User {
    /// The user with this id. `None` if the program does not run as root, or if it would be root itself.
    pub fn other(uid: u32, gid: u32) -> Option<Self> {
        if !geteuid().is_root() || uid == 0 {
            return None;
        }
        let uid = Uid::from_raw(uid);
        let known = nix::unistd::User::from_uid(uid).ok().flatten();
        let gid = known.as_ref().map_or(Gid::from_raw(gid), |user| user.gid);
        let name = known.and_then(|user| std::ffi::CString::new(user.name).ok());
        let groups = name.and_then(|name| nix::unistd::getgrouplist(&name, gid).ok());
        Some(Self { uid, gid, groups: groups.unwrap_or_else(|| vec![gid]) })
    }

    /// The owner of a directory, if that is another user than the program's, which is root.
    ///
    /// # Errors
    /// The directory cannot be looked at.
    pub fn owner_of(directory: &Path) -> Result<Option<Self>> {
        let found = directory.metadata().map_err(|error| Error::io("look at", directory, error))?;
        Ok(Self::other(found.uid(), found.gid()))
    }

    /// The owner of the directory that a file is in: whoever that is can put a link in its place.
    ///
    /// # Errors
    /// The directory cannot be looked at.
    pub fn owner_of_place(file: &Path) -> Result<Option<Self>> {
        let directory = file.parent().filter(|parent| !parent.as_os_str().is_empty());
        Self::owner_of(directory.unwrap_or(Path::new(".")))
    }

    /// The user of a server whose data directory this is.
    ///
    /// # Errors
    /// Also if it belongs to root: PostgreSQL demands that it belongs to its own user, which is never root.
    pub fn of_server(data_directory: &Path) -> Result<Option<Self>> {
        let user = Self::owner_of(data_directory)?;
        match geteuid().is_root() && user.is_none() {
            true => Err(Error::new(format!("{} belongs to root", data_directory.display())).hint(
                "a server's data directory belongs to the server's user; if the server runs on another machine, use \
                     --source=stream",
            )),
            false => Ok(user),
        }
    }

    /// The user's id.
    pub fn uid(&self) -> u32 {
        self.uid.as_raw()
    }

    /// The user's name, or its number if this machine has no such user.
    pub fn name(&self) -> String {
        name_of(self.uid())
    }
}

/// Refuses a directory of the program's own that another user could fill: one of another owner, or one that others may
/// write. To root, nobody else may write in any directory above it either, nor have put a link there: who may rename puts
/// another directory, or a link, in the place of this one between any check and the work. Of a directory above that
/// belongs to another user root is warned. `hint` says what to do.
///
/// # Errors
/// Also if it cannot be looked at.
pub fn require_own(directory: &Path, hint: &str) -> Result<()> {
    way(directory, None, hint)?;
    let found = directory.metadata().map_err(|error| Error::io("look at", directory, error).hint(hint))?;
    let refused = |why: String| Err(Error::new(format!("{} {why}", directory.display())).hint(hint));
    if !found.is_dir() {
        return refused("is not a directory".into());
    }
    if found.uid() != geteuid().as_raw() {
        return refused(format!("belongs to {}", name_of(found.uid())));
    }
    match found.mode() & 0o022 {
        0 => Ok(()),
        _ => refused(format!("may be written by others (mode {:o})", found.mode() & 0o7777)),
    }
}

/// Makes such a directory with what is missing above it, or takes the one that is there. What is made has the mode
/// `mode`, and 0755 above it, whatever the umask.
///
/// # Errors
/// Those of [`require_own`]; then nothing was made below a directory of another user.
pub fn make_own(directory: &Path, mode: u32, hint: &str) -> Result<()> {
    way(directory, Some(mode), hint)?;
    require_own(directory, hint)
}

/// Makes what is missing above such a directory, and not the directory.
///
/// # Errors
/// If root may not trust what is there; then nothing was made below that.
pub fn make_above(directory: &Path, hint: &str) -> Result<()> {
    directory.parent().map_or(Ok(()), |above| way_to(directory, above, Some(0o755), hint))
}

/// Makes a directory with what is missing above it, whoever the owners are; what is made has these modes, whatever the
/// umask: `mode`, and 0755 above it.
///
/// # Errors
/// When one cannot be made.
pub fn make_with_parents(directory: &Path, mode: u32) -> io::Result<()> {
    let missing: Vec<&Path> = directory.ancestors().take_while(|above| !above.as_os_str().is_empty()).collect();
    let missing = missing.into_iter().take_while(|above| above.symlink_metadata().is_err());
    for above in missing.collect::<Vec<_>>().into_iter().rev() {
        make_one(above, if above == directory { mode } else { 0o755 })?;
    }
    Ok(())
}

/// Somebody else may have made it meanwhile.
fn make_one(directory: &Path, mode: u32) -> io::Result<()> {
    match DirBuilder::new().mode(mode).create(directory) {
        Ok(()) => fs::set_permissions(directory, Permissions::from_mode(mode)),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
    }
}

/// As many links as the kernel follows.
const LINKS_MAX: usize = 40;

/// Goes from the root directory to `directory`. Each step is looked at, or made, in a directory in which only root and
/// the program's user can rename, so that it stays what it was found to be.
fn way(directory: &Path, make: Option<u32>, hint: &str) -> Result<()> {
    way_to(directory, directory, make, hint)
}

/// The same up to `end`, which is `directory` or lies above it.
fn way_to(directory: &Path, end: &Path, make: Option<u32>, hint: &str) -> Result<()> {
    // only root is led elsewhere
    if make.is_none() && !geteuid().is_root() {
        return Ok(());
    }
    let whole = std::path::absolute(end).map_err(|error| Error::io("find", end, error))?;
    let (mut at, mut links) = (PathBuf::from("/"), 0);
    let mut ahead: Vec<OsString> = steps(&whole);
    let root = at.symlink_metadata().map_err(|error| Error::io("look at", &at, error))?;
    require_safe(directory, &at, &root, hint)?;
    while let Some(name) = ahead.pop() {
        if name == ".." {
            at.pop();
            continue;
        }
        let next = at.join(name);
        let found = match (next.symlink_metadata(), make) {
            (Err(error), Some(mode)) if error.kind() == io::ErrorKind::NotFound => {
                let mode = if ahead.is_empty() { mode } else { 0o755 };
                make_one(&next, mode).map_err(|error| Error::io("create", &next, error).hint(hint))?;
                next.symlink_metadata()
            }
            (found, _) => found,
        };
        let found = found.map_err(|error| Error::io("look at", &next, error).hint(hint))?;
        require_safe(directory, &next, &found, hint)?;
        if !found.is_symlink() {
            at = next;
            continue;
        }
        links += 1;
        let target = fs::read_link(&next).map_err(|error| Error::io("look at", &next, error))?;
        if links > LINKS_MAX {
            return Err(Error::io("look at", &next, io::Error::from_raw_os_error(libc::ELOOP)).hint(hint));
        }
        if target.is_absolute() {
            at = PathBuf::from("/");
        }
        ahead.extend(steps(&target));
    }
    Ok(())
}

/// The names of a path, the last one first.
fn steps(path: &Path) -> Vec<OsString> {
    let named = path.components().filter_map(|part| match part {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some(OsString::from("..")),
        _ => None,
    });
    let mut steps: Vec<OsString> = named.collect();
    steps.reverse();
    steps
}

/// Refuses root a step of the way to `directory` that another user could turn elsewhere.
fn require_safe(directory: &Path, step: &Path, found: &Metadata, hint: &str) -> Result<()> {
    if !geteuid().is_root() {
        return Ok(());
    }
    // in a directory with the sticky bit nobody renames what root owns; a link has no mode of its own
    let may_rename = found.is_dir() && found.mode() & 0o022 != 0 && found.mode() & 0o1000 == 0;
    let why = match (found.uid(), may_rename) {
        (0, false) => return Ok(()),
        // people do keep clones below a home of the server's user
        (uid, false) if found.is_dir() && step != directory => {
            warn_of_owner(directory, step, uid);
            return Ok(());
        }
        (_, true) => format!("may be written by others (mode {:o})", found.mode() & 0o7777),
        (uid, _) => format!("belongs to {}", name_of(uid)),
    };
    let what = match step == directory {
        true => format!("{} {why}", directory.display()),
        false => format!("{} cannot be trusted: {} {why}", directory.display(), step.display()),
    };
    Err(Error::new(what).hint(hint))
}

/// Once for each place: that user can put something else in the place of what root works on.
fn warn_of_owner(directory: &Path, step: &Path, uid: u32) {
    static TOLD: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());
    if TOLD.lock().insert(step.to_owned()) {
        tracing::warn!(
            "root works in {}, below {}, which {} can rename at any moment: choose a place that is root's alone",
            directory.display(),
            step.display(),
            name_of(uid)
        );
    }
}

fn name_of(uid: u32) -> String {
    let known = nix::unistd::User::from_uid(uid.into()).ok().flatten();
    known.map_or_else(|| uid.to_string(), |user| user.name)
}

/// Runs `work` in this thread as `user`, or as the program's own user if there is none. Threads that `work` starts are
/// the user's for their whole life.
///
/// # Errors
/// Those of `work`; and if the program may not act as another user.
pub fn as_user<T>(user: Option<&User>, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let Some(user) = user else { return work() };
    let acting = Acting::begin(user).map_err(|error| {
        Error::new(format!("cannot act as user {}", user.name()))
            .hint("run pgcairn as that user, or as a root that may act as others (CAP_SETUID, CAP_SETGID)")
            .source(error)
    })?;
    let done = work().map_err(|error| acting.explain(error, user));
    drop(acting);
    done
}

/// The thread is another user for the file system, until this is dropped. It must stay in its thread.
struct Acting {
    /// what the thread was before
    uid: Uid,
    gid: Gid,
    groups: Vec<Gid>,
    stays: PhantomData<*const ()>,
}

impl Acting {
    fn begin(user: &User) -> io::Result<Self> {
        let groups = getgroups()?;
        set_thread_groups(&user.groups)?;
        let (gid, uid) = (setfsgid(user.gid), setfsuid(user.uid));
        let acting = Self { uid, gid, groups, stays: PhantomData };
        // neither call says whether it was allowed: each returns what was there before
        let nobody = u32::MAX;
        match (setfsuid(Uid::from_raw(nobody)), setfsgid(Gid::from_raw(nobody))) {
            (uid, gid) if (uid, gid) == (user.uid, user.gid) => Ok(acting),
            _ => Err(io::Error::from_raw_os_error(libc::EPERM)),
        }
    }

    /// A refusal reads strangely when root gets it.
    fn explain(&self, error: Error, user: &User) -> Error {
        let is_refusal = |error: &io::Error| {
            matches!(error.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem)
        };
        match error.find::<io::Error>().is_some_and(is_refusal) {
            true => error.hint(format!(
                "root works on a user's files as that user, here {0}: give {0} the right to it, or move it away",
                user.name()
            )),
            false => error,
        }
    }
}

impl Drop for Acting {
    fn drop(&mut self) {
        setfsuid(self.uid);
        setfsgid(self.gid);
        // the thread had them before, and may set any: it kept the right to
        if set_thread_groups(&self.groups).is_err() {
            tracing::error!("the groups of a thread cannot be set back");
        }
    }
}

/// Sets the supplementary groups of this thread alone; `setgroups(3)` of the C library sets those of all threads.
#[expect(unsafe_code, reason = "the C library has no call for one thread")]
fn set_thread_groups(groups: &[Gid]) -> io::Result<()> {
    let ids: Vec<libc::gid_t> = groups.iter().map(|group| group.as_raw()).collect();
    // SAFETY: the kernel reads as many ids as it is told, from a list that lives
    let done = unsafe { libc::syscall(libc::SYS_setgroups, ids.len(), ids.as_ptr()) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::unix::fs::symlink;

    use super::*;

    fn nobody() -> Option<User> {
        User::other(65534, 65534)
    }

    #[test]
    fn a_user_reaches_what_the_user_may_and_root_is_root_again_afterwards() {
        let Some(user) = nobody() else { return };
        let place = tempfile::tempdir().unwrap();
        fs::set_permissions(place.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let (secret, link) = (place.path().join("secret"), place.path().join("link"));
        fs::write(&secret, "x").unwrap();
        fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
        symlink(&secret, &link).unwrap();
        let read = |path: &Path| fs::read(path).map_err(|error| Error::io("read", path, error));
        let error = as_user(Some(&user), || read(&link)).unwrap_err();
        assert!(error.hint_text().unwrap().contains("as that user"), "{error}");
        let made = place.path().join("made");
        as_user(Some(&user), || fs::write(&made, "y").map_err(|error| Error::io("write", &made, error))).unwrap();
        let found = made.metadata().unwrap();
        assert_eq!((found.uid(), found.gid()), (65534, user.gid.as_raw()));
        let inner = as_user(Some(&user), || {
            as_user(Some(&user), || Ok(()))?;
            read(&link)
        });
        inner.unwrap_err();
        assert_eq!(read(&link).unwrap(), b"x");
        fs::write(place.path().join("of root"), "").unwrap();
        assert_eq!(place.path().join("of root").metadata().unwrap().uid(), 0);
        assert_eq!(getgroups().unwrap(), std::thread::spawn(|| getgroups().unwrap()).join().unwrap());
    }

    #[test]
    fn one_thread_acts_while_another_stays_root() {
        let Some(user) = nobody() else { return };
        let place = tempfile::tempdir().unwrap();
        fs::set_permissions(place.path(), fs::Permissions::from_mode(0o700)).unwrap();
        let (begun, go_on) = (std::sync::Barrier::new(2), std::sync::Barrier::new(2));
        let look = || fs::read_dir(place.path()).map(drop).map_err(|error| Error::io("list", place.path(), error));
        std::thread::scope(|scope| {
            let acts = scope.spawn(|| {
                as_user(Some(&user), || {
                    begun.wait();
                    go_on.wait();
                    look()
                })
            });
            begun.wait();
            look().unwrap();
            go_on.wait();
            acts.join().unwrap().unwrap_err();
        });
    }

    #[test]
    fn root_trusts_no_directory_below_one_that_another_user_can_rename_in() {
        let place = tempfile::tempdir().unwrap();
        let place = place.path().canonicalize().unwrap();
        let own = place.join("a/b/own");
        make_own(&own, 0o700, "").unwrap();
        assert_eq!(own.metadata().unwrap().mode() & 0o7777, 0o700);
        assert_eq!(place.join("a/b").metadata().unwrap().mode() & 0o7777, 0o755);
        symlink(place.join("a"), place.join("link")).unwrap();
        require_own(&place.join("link/b/own"), "").unwrap();
        let mode = |path: &Path, mode| fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
        mode(&own, 0o770);
        assert!(require_own(&own, "").unwrap_err().to_string().contains("by others (mode 770)"));
        mode(&own, 0o700);
        if !geteuid().is_root() {
            return;
        }
        mode(&place.join("a"), 0o777);
        let error = make_own(&place.join("link/b/new"), 0o700, "").unwrap_err().to_string();
        assert!(error.contains("/a may be written by others (mode 777)"), "{error}");
        assert!(!place.join("a/b/new").exists());
        mode(&place.join("a"), 0o1777);
        require_own(&own, "").unwrap();
        std::os::unix::fs::lchown(place.join("link"), Some(65534), None).unwrap();
        assert!(require_own(&place.join("link/b/own"), "").unwrap_err().to_string().contains("/link belongs to"));
        // of which it warns
        std::os::unix::fs::chown(place.join("a/b"), Some(65534), None).unwrap();
        require_own(&own, "").unwrap();
        std::os::unix::fs::chown(&own, Some(65534), None).unwrap();
        assert!(require_own(&own, "").unwrap_err().to_string().contains("belongs to"));
    }

    #[test]
    fn nobody_acts_as_root_or_without_being_root() {
        assert!(User::other(0, 0).is_none());
        if geteuid().is_root() {
            assert!(User::of_server(Path::new("/")).is_err());
        }
    }
}
