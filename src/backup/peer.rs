//! Root at the server's Unix socket. A stock server asks the kernel who connects (`peer` authentication) and lets a user in
//! as the role of the same name. So root, who may become any user, connects as the user whose name the role has.

use nix::unistd::{Gid, Uid, User, geteuid};
use postgres::Config;
use postgres::config::Host;

/// Runs `connect` as the user whose name the role has, then, if that fails, as the program's own user; returns the first
/// error if both fail. Only root has a choice, and only at a Unix socket.
pub(super) fn connect<T: Send, E: Send>(
    config: &Config,
    connect: impl Fn(&Config) -> Result<T, E> + Sync,
) -> Result<T, E> {
    match peer(config) {
        Some(user) => {
            as_peer(&user, || connect(config)).or_else(|refused| connect(config).map_err(|_also_refused| refused))
        }
        None => connect(config),
    }
}

/// The user as whom root connects.
fn peer(config: &Config) -> Option<User> {
    let is_local = matches!(config.get_hosts().first(), Some(Host::Unix(_)));
    if !is_local || !geteuid().is_root() {
        return None;
    }
    User::from_name(config.get_user()?).ok()?.filter(|user| !user.uid.is_root())
}

/// Runs `connect` in a thread of that user: what the kernel tells of a connection is the identity of the thread that made it.
fn as_peer<T: Send>(user: &User, connect: impl FnOnce() -> T + Send) -> T {
    let work = || {
        if let Err(error) = become_user(user.uid, user.gid) {
            tracing::info!(%error, user = user.name, "cannot connect as this user");
        }
        connect()
    };
    std::thread::scope(|scope| match scope.spawn(work).join() {
        Ok(done) => done,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

/// Makes this thread, and no other, act as a user until it ends; the C library's calls change all threads.
#[expect(unsafe_code, reason = "the C library has no call for one thread")]
fn become_user(uid: Uid, gid: Gid) -> std::io::Result<()> {
    let unchanged: libc::c_long = -1;
    let check = |done: libc::c_long| if done == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) };
    // SAFETY: these take numbers alone; the group comes first, while the thread may still change it
    check(unsafe { libc::syscall(libc::SYS_setresgid, unchanged, gid.as_raw(), unchanged) })?;
    // SAFETY: as above
    check(unsafe { libc::syscall(libc::SYS_setresuid, unchanged, uid.as_raw(), unchanged) })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn root_is_the_roles_user_at_a_unix_socket_alone() {
        let peer = |conninfo: &str| peer(&conninfo.parse().unwrap()).map(|user| user.name);
        let nobody = geteuid().is_root().then(|| "nobody".to_owned());
        assert_eq!(peer("host=/var/run/postgresql user=nobody"), nobody);
        for other in ["host=127.0.0.1 user=nobody", "host=/run user=root", "host=/run user=no-such-user", "host=/run"] {
            assert_eq!(peer(other), None, "{other}");
        }
    }

    #[test]
    fn one_thread_is_the_user_and_the_others_stay() {
        let Some(user) = User::from_name("nobody").unwrap().filter(|_| geteuid().is_root()) else { return };
        assert_eq!(as_peer(&user, geteuid), user.uid);
        assert!(geteuid().is_root());
        let config: Config = "host=/run user=nobody".parse().unwrap();
        let tried = std::sync::Mutex::new(Vec::new());
        let refused: Result<(), Uid> = connect(&config, |_| {
            tried.lock().unwrap().push(geteuid());
            Err(geteuid())
        });
        assert_eq!(refused, Err(user.uid));
        assert_eq!(*tried.lock().unwrap(), [user.uid, Uid::from_raw(0)]);
    }
}
