//! Which processes use a mounted file system, in whatever mount namespace they see it.
//!
//! The kernel says "busy" only for users of the one mount that is asked for. A service with a private `/tmp`, a
//! container or `unshare -m` has a copy of the mount, and its users are found here.

use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// The processes that use a file system.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Users {
    /// those that may go on using it
    pub(crate) living: Vec<u32>,
    /// those that were killed, and are gone as soon as what they wait for is answered
    pub(crate) killed: Vec<u32>,
}

/// Processes that have a file or directory of this device (`major:minor`) open, work in it, or have it as their root.
/// Those of other users are seen by root only.
pub(crate) fn users(device: &str) -> Users {
    let Some(device) = parse(device) else { return Users::default() };
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let (killed, living) = numbers.filter(|&process| uses(process, device)).partition(|process| is_killed(*process));
    Users { living, killed }
}

/// Whether SIGKILL waits for a process: sent as such, or what the kernel makes of any signal that ends it. A process that waits
/// for our answer meets it only then.
fn is_killed(process: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let pending = status.lines().filter_map(|line| line.strip_prefix("SigPnd:").or(line.strip_prefix("ShdPnd:")));
    let mut masks = pending.filter_map(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    masks.any(|mask| mask & (1 << (libc::SIGKILL - 1)) != 0)
}

fn uses(process: u32, device: (u32, u32)) -> bool {
    let directory = Path::new("/proc").join(process.to_string());
    let open = fs::read_dir(directory.join("fd")).into_iter().flatten().flatten().map(|entry| entry.path());
    ["cwd", "root"]
        .into_iter()
        .map(|name| directory.join(name))
        .chain(open)
        .any(|path| device_of(&path) == Some(device))
}

fn parse(device: &str) -> Option<(u32, u32)> {
    let (major, minor) = device.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// The device a path leads to. Its file system is not asked: it may be the one that we serve, or dead.
#[allow(unsafe_code, reason = "statx has no safe wrapper in nix")]
fn device_of(path: &Path) -> Option<(u32, u32)> {
    let path = CString::new(path.as_os_str().as_bytes()).ok()?;
    // SAFETY: all-zero bytes are a valid statx struct.
    let mut found: libc::statx = unsafe { std::mem::zeroed() };
    let flags = libc::AT_STATX_DONT_SYNC | libc::AT_NO_AUTOMOUNT;
    // SAFETY: the path ends with a zero byte, and the kernel fills the struct, which outlives the call.
    let done = unsafe { libc::statx(libc::AT_FDCWD, path.as_ptr(), flags, 0, &mut found) };
    (done == 0).then_some((found.stx_dev_major, found.stx_dev_minor))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;
    use std::process::Command;

    #[test]
    fn a_process_is_found_by_its_directory() {
        let device = fs::metadata("/proc").unwrap().dev();
        let device = format!("{}:{}", libc::major(device), libc::minor(device));
        let mut child = Command::new("sleep").arg("60").current_dir("/proc").spawn().unwrap();
        let found = users(&device);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(found.living.contains(&child.id()), "{found:?}");
    }
}
