//! Ctrl-C, and the other signals that ask a program to end: one mechanism for every verb that takes long. The first is noted,
//! see [`crate::interrupt`]; the verb cleans up as after an error and ends with 128 and the signal's number, as a shell has it.
//! A second one ends the program at once.

use std::time::Duration;

use parking_lot::Mutex;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::{Handle, Signals};

use super::output;
use crate::error::{Error, Result};
use crate::interrupt;

/// How long a verb that leaves nothing behind may go on with what cannot be interrupted, such as a query.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the verb that runs keeps when it is interrupted, and how it ends.
static KEPT: Mutex<Option<(Ending, &'static str)>> = Mutex::new(None);
static HANDLE: Mutex<Option<Handle>> = Mutex::new(None);

/// How a verb ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// it takes down what it brought up, however long that takes
    Patient,
    /// what it leaves is taken up, or thrown away, by the next run: nothing needs to be waited for
    Prompt,
}

/// From now on signals are noted. `kept` is what a person reads of what the verb leaves.
pub(super) fn watch(ending: Ending, kept: &'static str) -> Result<()> {
    *KEPT.lock() = Some((ending, kept));
    let mut signals =
        Signals::new(asking_to_end()).map_err(|error| Error::new("cannot wait for signals").source(error))?;
    *HANDLE.lock() = Some(signals.handle());
    std::thread::spawn(move || {
        for signal in &mut signals {
            if interrupt::caught().is_some() {
                output::note("interrupted again: ending at once");
                std::process::exit(128 + signal);
            }
            output::note("interrupted: cleaning up; once more ends at once");
            interrupt::note(signal);
            std::thread::spawn(move || {
                std::thread::sleep(PATIENCE);
                if KEPT.lock().is_some_and(|(ending, _)| ending == Ending::Prompt) {
                    end(signal);
                }
            });
        }
    });
    Ok(())
}

/// The signals that ask a program to end. nohup has SIGHUP ignored, and that stays.
pub(super) fn asking_to_end() -> impl Iterator<Item = i32> {
    [SIGINT, SIGTERM, SIGHUP].into_iter().filter(|signal| *signal != SIGHUP || !is_ignored(SIGHUP))
}

/// From now on the verb has something to take down, unless a signal came before.
pub(super) fn be_patient() -> Result<()> {
    interrupt::check()?;
    KEPT.lock().iter_mut().for_each(|(ending, _)| *ending = Ending::Patient);
    // one that came in between ends the program as soon as it looks
    Ok(())
}

/// Leaves the signals to somebody else, who waits for them already.
pub(super) fn let_go() {
    if let Some(handle) = HANDLE.lock().take() {
        handle.close();
    }
}

/// Ends a program whose work did not end.
fn end(signal: i32) {
    output::error(&interrupted(signal));
    std::process::exit(128 + signal);
}

/// The error and the exit status of a verb that failed after a signal.
pub(super) fn outcome() -> Option<(Error, u8)> {
    let signal = interrupt::caught()?;
    Some((interrupted(signal), 128u8.saturating_add(u8::try_from(signal).unwrap_or(0))))
}

fn interrupted(signal: i32) -> Error {
    let error = interrupt::error(signal);
    match *KEPT.lock() {
        Some((_, kept)) => error.hint(kept),
        None => error,
    }
}

/// Whether this program was started with the signal ignored.
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap_or_default();
    u64::from_str_radix(mask.trim(), 16).is_ok_and(|mask| mask & (1 << (signal - 1)) != 0)
}
