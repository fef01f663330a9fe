//! Work on a user's files as that user, though root runs the program.
//!
//! Whoever owns a directory can put a symbolic link, or a hard link, in the place of any file in it, at any moment. What
//! root opens, makes or gives away by path in such a directory is therefore the user's choice. Checks before the call do
//! not help, since the user can be faster. Here the thread becomes that user for the file system alone (`setfsuid(2)`,
//! which Linux keeps per thread), and the kernel refuses what the user may not do.

use std::io;
use std::marker::PhantomData;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::unistd::{Gid, Uid, geteuid, getgroups, setfsgid, setfsuid};

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
        let known = nix::unistd::User::from_uid(self.uid).ok().flatten();
        known.map_or_else(|| self.uid.to_string(), |user| user.name)
    }
}

/// Refuses a directory of the program's own that another user could fill: one of another owner, or one that others may
/// write. `hint` says what to do.
///
/// # Errors
/// Also if it cannot be looked at.
pub fn require_own(directory: &Path, hint: &str) -> Result<()> {
    let found = directory.metadata().map_err(|error| Error::io("look at", directory, error))?;
    let refused = |why: String| Err(Error::new(format!("{} {why}", directory.display())).hint(hint));
    if !found.is_dir() {
        return refused("is not a directory".into());
    }
    if found.uid() != geteuid().as_raw() {
        let owner = nix::unistd::User::from_uid(found.uid().into()).ok().flatten();
        return refused(format!("belongs to {}", owner.map_or_else(|| found.uid().to_string(), |owner| owner.name)));
    }
    match found.mode() & 0o022 {
        0 => Ok(()),
        _ => refused(format!("may be written by others (mode {:o})", found.mode() & 0o7777)),
    }
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
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

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
    fn nobody_acts_as_root_or_without_being_root() {
        assert!(User::other(0, 0).is_none());
        if geteuid().is_root() {
            assert!(User::of_server(Path::new("/")).is_err());
        }
    }
}
