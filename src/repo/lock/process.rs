//! This process among all others, and clocks.

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::time::{ClockId, clock_gettime};
use parking_lot::Mutex;

use crate::format::info::LockInfo;

/// Seconds since 1970 by this host's clock.
pub(super) fn now_s() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64)
}

/// A clock that is never set, and goes on while the machine sleeps.
pub(super) fn uptime() -> Duration {
    match clock_gettime(ClockId::CLOCK_BOOTTIME) {
        Ok(time) => Duration::new(time.tv_sec() as u64, time.tv_nsec() as u32),
        // every Linux has it; without it the wall clock will do
        Err(_) => SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(),
    }
}

pub(super) fn host() -> String {
    nix::unistd::gethostname().map_or_else(|_| "?".into(), |name| name.to_string_lossy().into_owned())
}

pub(super) fn user() -> String {
    let uid = nix::unistd::geteuid();
    nix::unistd::User::from_uid(uid).ok().flatten().map_or_else(|| uid.to_string(), |user| user.name)
}

/// What no other process, on whichever host, at whichever time, has in common with `pid` here: the boot, the namespace its
/// number is of, and when it started. `None` where that cannot be known.
pub(super) fn identity(pid: u32) -> Option<String> {
    match known(pid) {
        Known::Started(ticks) => Some(format!("{} {ticks}", place()?)),
        Known::Ended | Known::Nothing => None,
    }
}

fn place() -> Option<String> {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let namespace = std::fs::read_link("/proc/self/ns/pid").ok()?;
    Some(format!("{} {}", boot.trim(), namespace.display()))
}

/// What is known of a process.
#[derive(Debug, PartialEq, Eq)]
enum Known {
    /// started then, in ticks since boot
    Started(u64),
    /// it ended, and nobody has asked how
    Ended,
    /// nothing: there is none, or we may not look
    Nothing,
}

fn known(pid: u32) -> Known {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { return Known::Nothing };
    // the name may hold anything, even parentheses: what counts begins behind the last one
    let mut fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace();
    match (fields.next(), fields.nth(18).and_then(|ticks| ticks.parse().ok())) {
        (Some("Z" | "X"), _) => Known::Ended,
        (Some(_), Some(ticks)) => Known::Started(ticks),
        _ => Known::Nothing,
    }
}

/// The locks that this process holds, or is about to: one that it could not take away is none of them.
static HELD: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

pub(super) fn holds(key: &str) {
    HELD.lock().insert(key.to_owned());
}

pub(super) fn holds_no_more(key: &str) {
    HELD.lock().remove(key);
}

/// Whether the holder of the lock `key` was of this very place, and is there no more.
pub(super) fn is_gone(key: &str, info: &LockInfo) -> bool {
    let Some((at, started)) = info.process.as_deref().and_then(|process| process.rsplit_once(' ')) else {
        return false;
    };
    if place().is_none_or(|place| place != at) {
        return false;
    }
    match known(info.pid) {
        Known::Started(ticks) if ticks.to_string() == started => {
            info.pid == std::process::id() && !HELD.lock().contains(key)
        }
        Known::Started(_) => true,
        Known::Ended => true,
        // /proc may hide others' processes, a signal finds them all
        Known::Nothing => {
            let pid = i32::try_from(info.pid).unwrap_or(i32::MAX);
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), None) == Err(nix::errno::Errno::ESRCH)
        }
    }
}
