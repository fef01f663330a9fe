//! Mountpoints: checks before mounting, what is mounted where, and unmounting, also after the daemon died.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};

use crate::error::{Error, Result};
use crate::users::{Users, users};

/// The type under which our mounts appear in /proc/self/mountinfo.
pub const FS_TYPE: &str = "fuse.pgcairn";

/// One line of /proc/self/mountinfo.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountEntry {
    /// the mount's number, which stays when it is moved
    pub id: u64,
    /// where it is mounted
    pub path: PathBuf,
    /// `major:minor` of the mounted file system
    pub device: String,
    /// e.g. `ext4` or `fuse.pgcairn`
    pub fs_type: String,
    /// what is mounted, as its file system names it
    pub source: OsString,
}

/// Everything mounted in this process's mount namespace, in the order of mounting.
pub fn mounts() -> Result<Vec<MountEntry>> {
    let path = "/proc/self/mountinfo";
    let text = fs::read(path).map_err(|source| Error::io("read", path, source))?;
    Ok(text.split(|&byte| byte == b'\n').filter_map(parse_mount).collect())
}

/// The topmost mount on exactly this path.
pub fn mounted_on(path: &Path) -> Result<Option<MountEntry>> {
    let path = absolute(path);
    Ok(mounts()?.into_iter().rev().find(|entry| entry.path == path))
}

/// Fails unless `path` is an existing, empty directory on which nothing is mounted.
pub fn check(path: &Path) -> Result<()> {
    if let Some(entry) = mounted_on(path)? {
        if entry.fs_type == FS_TYPE && is_dead(path) {
            return Err(Error::DeadMount { path: path.to_owned() });
        }
        return Err(Error::AlreadyMounted { path: path.to_owned(), fs_type: entry.fs_type });
    }
    match fs::metadata(path) {
        Err(source) if source.kind() == io::ErrorKind::NotFound => {
            return Err(Error::MountpointMissing { path: path.to_owned() });
        }
        Err(source) => return Err(Error::io("read", path, source)),
        Ok(metadata) if !metadata.is_dir() => return Err(Error::MountpointNotDirectory { path: path.to_owned() }),
        Ok(_) => {}
    }
    let mut names = fs::read_dir(path).map_err(|source| Error::io("list", path, source))?;
    if names.next().is_some() { Err(Error::MountpointNotEmpty { path: path.to_owned() }) } else { Ok(()) }
}

/// How long killed processes are waited for that still use a mount.
const KILLED_MAX: Duration = Duration::from_secs(20);

/// Unmounts a pgcairn mount, whether its daemon lives or died. A mount in use is [`Error::Busy`] while its daemon lives,
/// also where its users see a copy of it in another mount namespace.
pub fn unmount(path: &Path) -> Result<()> {
    unmount_hurried(path, |_| ())
}

/// The same. Where nobody uses the mount but who was killed, `hurry` is called with its path first: it may have the daemon give
/// up what it waits for, which the kernel waits for too.
pub fn unmount_hurried(path: &Path, hurry: impl Fn(&Path)) -> Result<()> {
    let Some(entry) = mounted_on(path)? else {
        return Err(Error::NotMounted { path: path.to_owned() });
    };
    if entry.fs_type != FS_TYPE {
        return Err(Error::ForeignMount { path: path.to_owned(), fs_type: entry.fs_type });
    }
    let Users { living, killed } = users(&entry.device);
    if living.is_empty() {
        hurry(&entry.path);
    } else if !is_dead(&entry.path) {
        return Err(Error::Busy { path: entry.path, users: living });
    }
    let started = Instant::now();
    loop {
        match unmount_once(&entry.path, Patience::WhenIdle) {
            // files of a dead mount stay open for as long as their processes like: nothing to wait for
            Err(Error::Busy { .. }) if is_dead(&entry.path) => return unmount_once(&entry.path, Patience::Detach),
            Err(Error::Busy { .. }) if !killed.is_empty() && started.elapsed() < KILLED_MAX => {
                thread::sleep(Duration::from_millis(20));
            }
            result => return result,
        }
    }
}

/// [`Error::Busy`] where a process uses the mount, or a copy of it in another mount namespace.
pub(crate) fn refuse_users(entry: &MountEntry) -> Result<()> {
    match users(&entry.device).living {
        users if users.is_empty() => Ok(()),
        users => Err(Error::Busy { path: entry.path.clone(), users }),
    }
}

/// Whether an unmount waits for the last open file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Patience {
    /// busy is an error
    WhenIdle,
    /// the name goes now, the mount with its last open file
    Detach,
}

pub(crate) fn unmount_once(path: &Path, patience: Patience) -> Result<()> {
    let mut flags = MntFlags::UMOUNT_NOFOLLOW;
    if patience == Patience::Detach {
        flags |= MntFlags::MNT_DETACH;
    }
    match umount2(path, flags) {
        Ok(()) => Ok(()),
        Err(Errno::EBUSY) => Err(Error::Busy { path: path.to_owned(), users: Vec::new() }),
        Err(Errno::EPERM) => fusermount(path, patience),
        Err(errno) => Err(Error::Unmount { path: path.to_owned(), source: errno.into() }),
    }
}

/// Users other than root unmount through the setuid helper.
fn fusermount(path: &Path, patience: Patience) -> Result<()> {
    let mut command = Command::new("fusermount3");
    command.arg("-u").stdin(Stdio::null()).env("LC_ALL", "C");
    if patience == Patience::Detach {
        command.arg("-z");
    }
    let failed = |source| Error::Unmount { path: path.to_owned(), source };
    let output = command.arg("--").arg(path).output().map_err(|source| {
        failed(io::Error::new(source.kind(), format!("this needs root or fusermount3 (package fuse3): {source}")))
    })?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    if text.contains("busy") {
        return Err(Error::Busy { path: path.to_owned(), users: Vec::new() });
    }
    Err(failed(io::Error::other(text.trim().to_owned())))
}

/// Whether the daemon behind a FUSE mount is gone. statfs is never answered from a cache.
pub fn is_dead(path: &Path) -> bool {
    matches!(nix::sys::statvfs::statvfs(path), Err(Errno::ENOTCONN | Errno::ECONNABORTED))
}

/// The absolute path without links; of a dead mount, which cannot be asked, through its parent.
fn absolute(path: &Path) -> PathBuf {
    if let Ok(found) = path.canonicalize() {
        return found;
    }
    let whole = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    match (whole.parent().map(Path::canonicalize), whole.file_name()) {
        (Some(Ok(parent)), Some(name)) => parent.join(name),
        _ => whole,
    }
}

/// `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue`
fn parse_mount(line: &[u8]) -> Option<MountEntry> {
    let mut fields = line.split(|&byte| byte == b' ');
    let id = String::from_utf8_lossy(fields.next()?).parse().ok()?;
    let device = String::from_utf8_lossy(fields.nth(1)?).into_owned();
    let path = PathBuf::from(decode(fields.nth(1)?));
    let mut after = fields.skip_while(|field| *field != b"-").skip(1);
    let fs_type = String::from_utf8_lossy(decode(after.next()?).as_bytes()).into_owned();
    let source = decode(after.next()?);
    Some(MountEntry { id, path, device, fs_type, source })
}

/// The kernel writes space, tab, newline and backslash as three octal digits.
fn decode(field: &[u8]) -> OsString {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        let octal = (byte == b'\\').then(|| tail.get(..3).and_then(parse_octal)).flatten();
        match octal {
            Some(value) => {
                out.push(value);
                rest = &tail[3..];
            }
            None => {
                out.push(byte);
                rest = tail;
            }
        }
    }
    OsString::from_vec(out)
}

fn parse_octal(digits: &[u8]) -> Option<u8> {
    let text = OsStr::from_bytes(digits).to_str()?;
    u8::from_str_radix(text, 8).ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_is_read_with_its_escapes() {
        let line =
            b"36 35 0:98 / /mnt/a\\040b\\134c rw,nosuid master:1 shared:2 - fuse.pgcairn pgcairn:main rw,user_id=0";
        let entry = parse_mount(line).unwrap();
        assert_eq!(entry.path, Path::new("/mnt/a b\\c"));
        assert_eq!((entry.id, &*entry.device), (36, "0:98"));
        assert_eq!(entry.fs_type, FS_TYPE);
        assert_eq!(entry.source, "pgcairn:main");
    }

    #[test]
    fn half_a_line_is_no_mount() {
        assert_eq!(parse_mount(b""), None);
        assert_eq!(parse_mount(b"36 35 0:98 / /mnt"), None);
        assert_eq!(decode(b"a\\04"), "a\\04");
        assert_eq!(decode(b"\\999"), "\\999");
    }

    #[test]
    fn mountpoints_are_checked() {
        let dir = tempfile::tempdir().unwrap();
        assert!(check(dir.path()).is_ok());
        assert!(matches!(check(&dir.path().join("absent")), Err(Error::MountpointMissing { .. })));
        fs::write(dir.path().join("file"), b"").unwrap();
        assert!(matches!(check(dir.path()), Err(Error::MountpointNotEmpty { .. })));
        assert!(matches!(check(&dir.path().join("file")), Err(Error::MountpointNotDirectory { .. })));
        assert!(matches!(check(Path::new("/proc")), Err(Error::AlreadyMounted { .. })));
    }

    #[test]
    fn only_our_mounts_are_unmounted() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(unmount(dir.path()), Err(Error::NotMounted { .. })));
        assert!(matches!(unmount(Path::new("/proc")), Err(Error::ForeignMount { .. })));
    }
}
