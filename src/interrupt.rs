//! A signal that asks this program to end. It is noted here; whatever takes long looks for it between two steps, and ends
//! with an error as it would for any other reason, so that everything that cleans up after an error does so here too.

use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use parking_lot::Mutex;

use crate::error::{Error, Result};

type Call = Box<dyn Fn() + Send>;

static CAUGHT: AtomicI32 = AtomicI32::new(0);
/// What ends a wait that cannot look for signals, by the number of its [`Guard`].
static CALLS: Mutex<Vec<(u64, Call)>> = Mutex::new(Vec::new());

/// Notes the signal, and ends the waits that were told here.
pub fn note(signal: i32) {
    CAUGHT.store(signal, Ordering::SeqCst);
    CALLS.lock().iter().for_each(|(_, call)| call());
}

/// The signal that was noted.
pub fn caught() -> Option<i32> {
    Some(CAUGHT.load(Ordering::SeqCst)).filter(|signal| *signal != 0)
}

/// Fails once a signal was noted.
pub fn check() -> Result<()> {
    match caught() {
        Some(signal) => Err(error(signal)),
        None => Ok(()),
    }
}

/// What a program says that a signal ended.
pub fn error(signal: i32) -> Error {
    let name = Signal::try_from(signal).map_or("a signal", Signal::as_str);
    Error::new(format!("interrupted by {name}"))
}

/// While this lives, a signal makes its call.
#[derive(Debug)]
#[must_use]
pub struct Guard(u64);

impl Guard {
    /// Calls `call` when a signal is noted, or at once if one was.
    pub fn new(call: impl Fn() + Send + 'static) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let mut calls = CALLS.lock();
        if caught().is_some() {
            call();
        }
        calls.push((number, Box::new(call)));
        Self(number)
    }

    /// Asks a child to end for which somebody waits.
    pub fn child(pid: u32) -> Self {
        // process ids are positive, and fit
        let pid = Pid::from_raw(pid.cast_signed());
        Self::new(move || _ = kill(pid, Signal::SIGTERM))
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        CALLS.lock().retain(|(number, _)| *number != self.0);
    }
}
