//! What can go wrong while a mount is set up, taken down, or its scratch opened.

use std::io;
use std::path::PathBuf;

/// An error of this crate. Errors of single file operations are not here: they travel as errno.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// the mountpoint does not exist
    #[error("mountpoint {} does not exist", path.display())]
    MountpointMissing {
        /// the mountpoint
        path: PathBuf,
    },
    /// the mountpoint is a file
    #[error("mountpoint {} is not a directory", path.display())]
    MountpointNotDirectory {
        /// the mountpoint
        path: PathBuf,
    },
    /// the mountpoint holds files, which a mount would hide
    #[error("mountpoint {} is not empty", path.display())]
    MountpointNotEmpty {
        /// the mountpoint
        path: PathBuf,
    },
    /// something is mounted there
    #[error("{} is already a mountpoint of type {fs_type}", path.display())]
    AlreadyMounted {
        /// the mountpoint
        path: PathBuf,
        /// what /proc/self/mountinfo says, e.g. `fuse.pgcairn`
        fs_type: String,
    },
    /// a mount whose daemon died is still there
    #[error("{} is a mount whose daemon is gone", path.display())]
    DeadMount {
        /// the mountpoint
        path: PathBuf,
    },
    /// nothing is mounted there
    #[error("nothing is mounted on {}", path.display())]
    NotMounted {
        /// the path asked for
        path: PathBuf,
    },
    /// somebody else's mount
    #[error("{} is a mount of type {fs_type}, not one of pgcairn", path.display())]
    ForeignMount {
        /// the mountpoint
        path: PathBuf,
        /// what /proc/self/mountinfo says
        fs_type: String,
    },
    /// files of the mount are open
    #[error("mount {} is busy{}", path.display(), used_by(users))]
    Busy {
        /// the mountpoint
        path: PathBuf,
        /// the processes that use it, as far as they can be found out
        users: Vec<u32>,
    },
    /// `/dev/fuse` cannot be opened
    #[error("cannot open /dev/fuse (mode {mode})")]
    Device {
        /// permission bits in octal, or `absent`
        mode: String,
        /// why
        source: io::Error,
    },
    /// the kernel or fusermount3 refused the mount
    #[error("cannot mount on {}", path.display())]
    Mount {
        /// the mountpoint
        path: PathBuf,
        /// why
        source: io::Error,
    },
    /// the kernel or fusermount3 refused to unmount
    #[error("cannot unmount {}", path.display())]
    Unmount {
        /// the mountpoint
        path: PathBuf,
        /// why
        source: io::Error,
    },
    /// the threads that serve the mount ended with an error
    #[error("mount {} failed", path.display())]
    Session {
        /// the mountpoint
        path: PathBuf,
        /// why
        source: io::Error,
    },
    /// the scratch was begun over another base
    #[error("scratch {} belongs to {found}, not to {expected}", path.display())]
    ScratchOfOtherBase {
        /// the scratch directory
        path: PathBuf,
        /// the base the scratch names
        found: String,
        /// the base asked for
        expected: String,
    },
    /// another daemon serves this scratch
    #[error("scratch {} is in use by another mount", path.display())]
    ScratchInUse {
        /// the scratch directory
        path: PathBuf,
    },
    /// the directory holds something that is no scratch
    #[error("{} is neither empty nor a scratch", path.display())]
    NotAScratch {
        /// the directory
        path: PathBuf,
    },
    /// a stored file of the scratch is damaged
    #[error("{} is damaged at offset {offset}: {what}", path.display())]
    ScratchDamaged {
        /// the damaged file
        path: PathBuf,
        /// where in it, in bytes
        offset: u64,
        /// what was found there
        what: String,
    },
    /// the scratch was written by a newer program
    #[error("{} has format version {found}, this program reads {supported}", path.display())]
    ScratchVersion {
        /// the journal
        path: PathBuf,
        /// the version it carries
        found: u32,
        /// the version this program reads
        supported: u32,
    },
    /// another user could put files or links into the scratch
    #[error("{} is no directory of this user alone (owner {uid}, mode {mode:o})", path.display())]
    ScratchOfOthers {
        /// the scratch directory, or `data` in it
        path: PathBuf,
        /// its owner
        uid: u32,
        /// its type and mode
        mode: u32,
    },
    /// an operation on a file failed
    #[error("cannot {action} {}", path.display())]
    Io {
        /// a verb: open, read, write, sync
        action: &'static str,
        /// of what
        path: PathBuf,
        /// why
        source: io::Error,
    },
}

/// At most this many processes are named.
const USERS_MAX: usize = 5;

fn used_by(users: &[u32]) -> String {
    if users.is_empty() {
        return String::new();
    }
    let shown: Vec<String> = users.iter().take(USERS_MAX).map(u32::to_string).collect();
    let more = if users.len() > USERS_MAX { ", ..." } else { "" };
    format!(": used by process {}{more}", shown.join(", "))
}

/// A result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>, source: impl Into<io::Error>) -> Self {
        Self::Io { action, path: path.into(), source: source.into() }
    }

    /// What a person can do about it, if anything is known to help.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::MountpointMissing { path } => format!("create it with \"mkdir -p {}\"", path.display()),
            Self::MountpointNotDirectory { .. } | Self::MountpointNotEmpty { .. } => {
                "choose an empty directory".to_owned()
            }
            Self::AlreadyMounted { path, .. } | Self::DeadMount { path } => {
                format!("unmount it first with \"pgcairn umount {}\"", path.display())
            }
            Self::ForeignMount { path, .. } => format!("unmount it with \"umount {}\" if it is yours", path.display()),
            Self::Busy { path, .. } => format!("see who uses it with \"fuser -vm {}\"", path.display()),
            Self::Device { mode, .. } if mode == "absent" => "load the kernel module with \"modprobe fuse\"".to_owned(),
            Self::Device { mode, .. } => format!(
                "/dev/fuse has mode {mode}; other users than root need 0666 (\"chmod 0666 /dev/fuse\"), or run as root"
            ),
            Self::Mount { .. } => {
                "users other than root need fusermount3 (package fuse3), and user_allow_other in /etc/fuse.conf to \
                 serve others"
                    .to_owned()
            }
            Self::NotMounted { .. } => "\"findmnt -t fuse.pgcairn\" lists what is mounted".to_owned(),
            Self::ScratchOfOtherBase { .. } => "choose an empty scratch directory, or mount its own base".to_owned(),
            Self::ScratchInUse { .. } => "stop the other mount first, or choose another scratch directory".to_owned(),
            Self::ScratchOfOthers { .. } => {
                "choose a directory for the scratch that this user owns and no other can write".to_owned()
            }
            Self::NotAScratch { .. } => "choose an empty directory for the scratch".to_owned(),
            Self::ScratchDamaged { .. } => "discard this scratch and start from the backup again".to_owned(),
            _ => return None,
        })
    }
}
