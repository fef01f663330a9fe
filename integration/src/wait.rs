//! Waiting for what happens elsewhere.

use std::thread;
use std::time::{Duration, Instant};

/// Asks until the answer is there, or the time is up.
pub fn poll<T>(timeout: Duration, mut ask: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + timeout;
    loop {
        if let Some(answer) = ask() {
            return Some(answer);
        }
        if Instant::now() >= deadline {
            return None;
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// Waits until `happened` says so.
///
/// # Panics
/// When the time is up; `what` completes the sentence "timed out waiting for ...".
pub fn wait_until(timeout: Duration, what: &str, mut happened: impl FnMut() -> bool) {
    if poll(timeout, || happened().then_some(())).is_none() {
        panic!("timed out after {timeout:?} waiting for {what}");
    }
}
