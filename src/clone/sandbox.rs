//! Namespaces of a clone's server, in which its source is not to be found.
//!
//! In a mount namespace of its own everything is read-only but the clone's directories. Where the source's data directory and
//! tablespaces are, the server sees its own: replay of `CREATE TABLESPACE` names the source's path, and lands in the clone.
//! Directories of Unix sockets are empty. In a network namespace of its own there is no way out; the clone's socket lies in
//! the file system, where it is reached from outside.
//!
//! The program starts itself again with [`FLAG`], since only a process of a single thread may enter a user namespace, which is
//! what users other than root need; it sets all up and becomes the program that it was to run.

mod mounts;
mod sockets;

use std::ffi::OsString;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use landlock::{Ruleset, RulesetAttr, RulesetError, Scope};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{getegid, geteuid};
use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, Result};

/// The first argument of the program when it is to enter a sandbox.
pub const FLAG: &str = "--in-sandbox";
/// The exit status when there can be no sandbox, and nothing was run.
pub const UNAVAILABLE: u8 = 97;

/// What a program gets to see.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sandbox {
    /// directories that it may write to
    pub own: Vec<PathBuf>,
    /// directories that must not be hidden: its programs and libraries
    pub visible: Vec<PathBuf>,
    /// directories in place of which it sees others of its own
    pub covers: Vec<Cover>,
    /// directories that are hidden because of the sockets in them, besides those known to the kernel
    pub sockets: Vec<PathBuf>,
    /// keep the network and all sockets in reach
    pub network: bool,
    /// the user and the group that the program runs as, if root starts it
    pub user: Option<(u32, u32)>,
}

/// A directory, and what is seen in its place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cover {
    /// where it is seen
    pub at: PathBuf,
    /// what is seen
    pub shows: PathBuf,
}

impl Sandbox {
    /// The command that runs `program` in here. It takes over arguments, environment and working directory.
    pub fn command(&self, program: &Command) -> Result<Command> {
        let own = std::env::current_exe().map_err(|error| Error::new("cannot find this program").source(error))?;
        let mut command = Command::new(own);
        command.arg(FLAG).arg(serde_json::to_string(self)?).arg(program.get_program()).args(program.get_args());
        command.env_clear();
        command.envs(program.get_envs().filter_map(|(name, value)| Some((name, value?))));
        command.current_dir(program.get_current_dir().unwrap_or(Path::new("/")));
        Ok(command)
    }
}

/// Runs what follows [`FLAG`]: a sandbox, a program, its arguments. Returns only when it cannot.
pub fn run(arguments: &[OsString]) -> Error {
    let [sandbox, program, arguments @ ..] = arguments else {
        return Error::new(format!("{FLAG} needs a sandbox and a program"));
    };
    let sandbox: Sandbox = match serde_json::from_slice(sandbox.as_encoded_bytes()) {
        Ok(sandbox) => sandbox,
        Err(error) => return Error::new("the sandbox cannot be read").source(error),
    };
    if let Err(error) = sandbox.enter() {
        return error;
    }
    let mut command = Command::new(program);
    if let Some((uid, gid)) = sandbox.user {
        command.uid(uid).gid(gid);
    }
    Error::io("run", Path::new(program), command.args(arguments).current_dir("/").exec())
}

impl Sandbox {
    fn enter(&self) -> Result<()> {
        // of the namespaces that are left
        let sockets = match self.network {
            true => Vec::new(),
            false => sockets::listening(),
        };
        let mut spaces = CloneFlags::CLONE_NEWNS;
        if !self.network {
            spaces |= CloneFlags::CLONE_NEWNET;
        }
        let (uid, gid) = (geteuid(), getegid());
        if uid.is_root() {
            unshare(spaces).context(|| "cannot make a mount namespace".into())?;
        } else {
            unshare(spaces | CloneFlags::CLONE_NEWUSER).context(|| "cannot make a user namespace".into())?;
            let write = |name: &str, text: String| {
                let path = Path::new("/proc/self").join(name);
                fs::write(&path, text).map_err(|error| Error::io("write", &path, error))
            };
            write("setgroups", "deny".into())?;
            write("uid_map", format!("{uid} {uid} 1"))?;
            write("gid_map", format!("{gid} {gid} 1"))?;
        }
        if !self.network {
            sockets::loopback_up().context(|| "cannot start the loopback device".into())?;
        }
        mounts::set_up(self, &sockets)?;
        // no program that it runs becomes root
        nix::sys::prctl::set_no_new_privs().context(|| "cannot give up privileges".into())?;
        leave_processes_alone().map_err(|error| Error::new("cannot enter a Landlock domain").source(error))
    }
}

/// Keeps the program from the processes outside, its user's too: it sends them no signals, and reaches none of their files,
/// memory and environment through `/proc/PID`. Before Linux 6.12 nothing can do that here, and nothing happens.
fn leave_processes_alone() -> std::result::Result<(), RulesetError> {
    Ruleset::default().scope(Scope::Signal)?.create()?.restrict_self().map(drop)
}
