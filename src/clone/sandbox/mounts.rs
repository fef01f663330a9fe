//! What a mount namespace shows.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, umask};

use super::Sandbox;
use crate::error::{Context, Error, Result};

/// Where sockets and other people's files are: hidden whole.
const HIDDEN: [&str; 4] = ["/run", "/var/run", "/tmp", "/var/tmp"];
/// Directories in which too much is that programs need to be hidden because of a socket.
const STAY: [&str; 12] = [
    "/",
    "/home",
    "/media",
    "/mnt",
    "/opt",
    "/root",
    "/srv",
    "/var",
    "/var/lib",
    "/var/log",
    "/var/cache",
    "/var/spool",
];
/// The same with all that is below them.
const STAY_WHOLE: [&str; 12] =
    ["/bin", "/boot", "/dev", "/etc", "/gnu", "/lib", "/lib32", "/lib64", "/nix", "/proc", "/sbin", "/sys"];
const USR: &str = "/usr";
/// What programs need of `/usr`; people keep clusters beside it, as in `/usr/local/pgsql/data`.
const USR_PROGRAMS: [&str; 8] =
    ["/usr/bin", "/usr/include", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/libexec", "/usr/sbin", "/usr/share"];
/// Those of [`STAY_WHOLE`] below which there may be a cluster or a tablespace.
const HOLD_DATA: [&str; 2] = ["/dev", "/etc"];
/// What the sockets of PostgreSQL and of its poolers are called.
const PG_SOCKET: &str = ".s.PGSQL.";
const SHARED_MEMORY: &str = "/dev/shm";
/// For file systems of the sandbox's own.
const OWN_FLAGS: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV);

/// Makes all of it, in a mount namespace that is this process's own; `listening` are paths of sockets.
pub(super) fn set_up(sandbox: &Sandbox, listening: &[PathBuf]) -> Result<()> {
    umask(Mode::from_bits_truncate(0o022));
    let root = Path::new("/");
    flag(root, MsFlags::MS_REC | MsFlags::MS_PRIVATE).context(|| "cannot make the mounts private".into())?;
    for own in &sandbox.own {
        bind(own, own).context(|| format!("cannot bind {}", own.display()))?;
    }
    let own: Vec<PathBuf> = sandbox.own.iter().map(|own| resolved(own)).collect();
    let kept: Vec<PathBuf> = sandbox.visible.iter().map(|visible| resolved(visible)).chain(own.clone()).collect();
    for entry in entries()? {
        entry.make_read_only(&own, &kept)?;
    }
    let shown = Shown::open(sandbox)?;
    if Path::new(SHARED_MEMORY).is_dir() {
        file_system(Path::new(SHARED_MEMORY), "mode=1777")?;
        // clones may live in memory, too
        shown.below(Path::new(SHARED_MEMORY))?;
    }
    let hidden = if sandbox.network { Vec::new() } else { hidden(sandbox, listening, &kept) };
    for directory in &hidden {
        file_system(directory, "mode=0755,size=1m")?;
        shown.below(directory)?;
    }
    cover(sandbox, &kept)?;
    for directory in &hidden {
        let sealed = flag(directory, MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | OWN_FLAGS);
        sealed.context(|| format!("cannot make {} read-only", directory.display()))?;
    }
    if !sandbox.network {
        // those in places that cannot be hidden whole; one that is gone needs nothing
        for socket in listening.iter().filter(|socket| !hidden.iter().any(|directory| socket.starts_with(directory))) {
            _ = bind(Path::new("/dev/null"), socket);
        }
    }
    Ok(())
}

/// Shows the clone's directories where its source has its own. A place that does not exist cannot be used by anybody.
fn cover(sandbox: &Sandbox, kept: &[PathBuf]) -> Result<()> {
    let mut covers: Vec<_> = sandbox.covers.iter().collect();
    // what lies in another comes after it
    covers.sort_by_key(|cover| cover.at.components().count());
    for cover in covers {
        _ = fs::create_dir_all(&cover.at);
        let at = resolved(&cover.at);
        if !at.is_dir() || !may_be_covered(&at, kept) {
            continue;
        }
        bind(&cover.shows, &at).context(|| format!("cannot cover {}", cover.at.display()))?;
    }
    Ok(())
}

/// Whether a directory may be covered: no program needs what is in it. A clone inside its source's directory must not be
/// hidden by itself; that place stays read-only.
fn may_be_covered(at: &Path, kept: &[PathBuf]) -> bool {
    let programs = STAY_WHOLE.iter().filter(|whole| !HOLD_DATA.contains(whole)).chain(&USR_PROGRAMS);
    !STAY.iter().chain(&HOLD_DATA).chain([&USR, &SHARED_MEMORY]).any(|stay| at == Path::new(stay))
        && !programs.into_iter().any(|programs| at.starts_with(programs))
        && !kept.iter().any(|kept| kept.starts_with(at))
}

/// Directories to be hidden because sockets are, or will be, in them; none lies in another.
fn hidden(sandbox: &Sandbox, listening: &[PathBuf], kept: &[PathBuf]) -> Vec<PathBuf> {
    let servers = listening.iter().filter(|socket| {
        socket.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(PG_SOCKET.as_bytes()))
    });
    let found = servers.filter_map(|socket| socket.parent()).map(Path::to_owned).chain(sandbox.sockets.iter().cloned());
    let found = found.map(|directory| resolved(&directory)).filter(|directory| !stays(directory));
    let mut hidden: Vec<PathBuf> = HIDDEN.iter().map(|directory| resolved(Path::new(directory))).chain(found).collect();
    hidden.retain(|directory| directory.is_dir() && !kept.iter().any(|kept| directory.starts_with(kept)));
    hidden.sort_unstable();
    // sorted, a directory comes right before what is in it
    hidden.dedup_by(|inner, outer| inner.starts_with(&*outer));
    hidden
}

fn stays(directory: &Path) -> bool {
    STAY.iter().any(|stay| directory == Path::new(stay))
        || STAY_WHOLE.iter().chain([&USR]).any(|stay| directory.starts_with(stay))
}

/// Directories that are to be seen also where what they lie in is hidden.
struct Shown(Vec<(PathBuf, File)>);

impl Shown {
    fn open(sandbox: &Sandbox) -> Result<Self> {
        let mut shown = Vec::new();
        for path in sandbox.own.iter().chain(&sandbox.visible) {
            let mut options = OpenOptions::new();
            options.read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY);
            match options.open(path) {
                Ok(open) => shown.push((path.clone(), open)),
                Err(_) if sandbox.visible.contains(path) => {}
                Err(error) => return Err(Error::io("open", path, error)),
            }
        }
        Ok(Self(shown.into_iter().collect()))
    }

    /// Makes those visible that were below `directory`, under each name that they have there.
    fn below(&self, directory: &Path) -> Result<()> {
        for (path, open) in &self.0 {
            let handle = PathBuf::from(format!("/proc/self/fd/{}", open.as_raw_fd()));
            let canonical = fs::read_link(&handle).unwrap_or_else(|_| path.clone());
            let mut names = vec![path.clone(), canonical];
            names.dedup();
            for name in names.iter().filter(|name| name.starts_with(directory)) {
                fs::create_dir_all(name).map_err(|error| Error::io("create", name, error))?;
                bind(&handle, name).context(|| format!("cannot show {}", name.display()))?;
            }
        }
        Ok(())
    }
}

/// One line of /proc/self/mountinfo.
struct Entry {
    path: PathBuf,
    options: String,
    fs_type: String,
}

/// All mounts of this namespace.
fn entries() -> Result<Vec<Entry>> {
    let path = Path::new("/proc/self/mountinfo");
    let text = fs::read(path).map_err(|error| Error::io("read", path, error))?;
    Ok(text.split(|&byte| byte == b'\n').filter_map(Entry::parse).collect())
}

impl Entry {
    /// `36 35 98:0 /root /mount/point rw,noatime master:1 - ext3 /dev/root rw,errors=continue`
    fn parse(line: &[u8]) -> Option<Self> {
        let mut fields = line.split(|&byte| byte == b' ');
        let path = unescaped(fields.nth(4)?);
        let options = String::from_utf8_lossy(fields.next()?).into_owned();
        fields.find(|field| *field == b"-")?;
        let fs_type = String::from_utf8_lossy(fields.next()?).into_owned();
        Some(Self { path, options, fs_type })
    }

    fn make_read_only(&self, own: &[PathBuf], kept: &[PathBuf]) -> Result<()> {
        if own.iter().any(|own| self.path.starts_with(own)) || self.path.starts_with("/proc") {
            return Ok(());
        }
        let detach = || umount2(&self.path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
        let needed = kept.iter().any(|kept| kept.starts_with(&self.path));
        // a copy of somebody's mount would keep its daemon from ending
        if self.fs_type.starts_with("fuse") && !needed && detach().is_ok() {
            return Ok(());
        }
        if self.has("ro") {
            return Ok(());
        }
        match flag(&self.path, MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | self.flags()) {
            // another mount hides it
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT | Errno::ENOTDIR) => Ok(()),
            Err(_) if !needed && detach().is_ok() => Ok(()),
            Err(errno) => Err(errno).context(|| format!("cannot make {} read-only", self.path.display())),
        }
    }

    /// Those that a user namespace does not allow to be dropped.
    fn flags(&self) -> MsFlags {
        let known = [
            ("nosuid", MsFlags::MS_NOSUID),
            ("nodev", MsFlags::MS_NODEV),
            ("noexec", MsFlags::MS_NOEXEC),
            ("noatime", MsFlags::MS_NOATIME),
            ("nodiratime", MsFlags::MS_NODIRATIME),
            ("relatime", MsFlags::MS_RELATIME),
        ];
        known.into_iter().filter(|(name, _)| self.has(name)).map(|(_, flag)| flag).collect()
    }

    fn has(&self, option: &str) -> bool {
        self.options.split(',').any(|has| has == option)
    }
}

/// A path of mountinfo, in which blanks and backslashes are octal numbers.
fn unescaped(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, after)) = rest.split_first() {
        let digits = after.get(..3).filter(|_| byte == b'\\').and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(escaped) => {
                bytes.push(escaped);
                rest = &after[3..];
            }
            None => {
                bytes.push(byte);
                rest = after;
            }
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

/// The path without links, if it exists.
fn resolved(path: &Path) -> PathBuf {
    fs::canonicalize(path).unwrap_or_else(|_| path.to_owned())
}

fn flag(path: &Path, flags: MsFlags) -> nix::Result<()> {
    mount(None::<&str>, path, None::<&str>, flags, None::<&str>)
}

fn bind(from: &Path, to: &Path) -> nix::Result<()> {
    mount(Some(from), to, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)
}

/// An empty file system in memory.
fn file_system(at: &Path, options: &str) -> Result<()> {
    mount(Some("pgcairn"), at, Some("tmpfs"), OWN_FLAGS, Some(options))
        .context(|| format!("cannot hide {}", at.display()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn mounts_are_read_as_the_kernel_writes_them() {
        let line = b"36 35 98:0 / /srv/a\\040b rw,nosuid,noatime shared:2 master:1 - ext4 /dev/sda1 rw";
        let entry = Entry::parse(line).unwrap();
        assert_eq!((entry.path, entry.fs_type.as_str()), (PathBuf::from("/srv/a b"), "ext4"));
        let entry = Entry::parse(b"1 0 0:1 / / ro - tmpfs none rw").unwrap();
        assert!(entry.has("ro") && entry.flags().is_empty());
        assert_eq!(Entry::parse(line).unwrap().flags(), MsFlags::MS_NOSUID | MsFlags::MS_NOATIME);
        assert!(Entry::parse(b"").is_none());
    }

    #[test]
    fn a_source_is_covered_wherever_it_is_but_no_program() {
        let kept = ["/usr/local/pgsql".into(), "/srv/clones/one/data".into()];
        let may = |at: &str| may_be_covered(Path::new(at), &kept);
        for at in ["/usr/local/pgsql/data", "/etc/space", "/dev/shm/pg", "/var/lib/postgresql/15/main", "/srv/pg"] {
            assert!(may(at), "{at}");
        }
        for at in ["/", "/etc", "/dev/shm", "/usr", "/usr/lib/x", "/usr/local", "/lib/x", "/var/lib", "/srv/clones"] {
            assert!(!may(at), "{at}");
        }
    }

    #[test]
    fn directories_of_sockets_are_hidden_but_those_that_programs_need() {
        let space = tempfile::tempdir_in("/var/lib").or_else(|_| tempfile::tempdir()).unwrap();
        let (sockets, own) = (space.path().join("sockets"), space.path().join("clone/run"));
        fs::create_dir_all(sockets.join("inner")).unwrap();
        fs::create_dir_all(&own).unwrap();
        let listening = [
            sockets.join(".s.PGSQL.5432"),
            sockets.join("inner/.s.PGSQL.5432"),
            own.join(".s.PGSQL.5433"),
            "/etc/.s.PGSQL.1".into(),
            "/.s.PGSQL.1".into(),
        ];
        let hidden = hidden(&Sandbox::default(), &listening, std::slice::from_ref(&own));
        let below: Vec<_> = hidden.iter().filter(|directory| directory.starts_with(space.path())).collect();
        assert!(below.is_empty() || below == [&sockets], "{hidden:?}");
        assert!(
            !hidden.iter().any(|directory| directory.starts_with("/etc") || directory == Path::new("/")),
            "{hidden:?}"
        );
        assert!(hidden.contains(&PathBuf::from("/tmp")), "{hidden:?}");
    }
}
