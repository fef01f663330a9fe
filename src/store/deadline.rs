//! How long the call that a thread is in may still take, whatever is tried again within it.
//!
//! A deadline is the thread's, not an argument: it is set where a request comes in (a read of the kernel, a call of
//! [`super::Retry`]) and asked for where the time is spent, several layers below.

use std::cell::Cell;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};

/// One call as a whole.
#[derive(Clone, Copy, Debug)]
struct Call {
    begun: Instant,
    end: Option<Instant>,
}

thread_local! {
    static CALL: Cell<Option<Call>> = const { Cell::new(None) };
}

/// Restores the outer call, also when the inner one panics.
struct Outer(Option<Call>);

impl Drop for Outer {
    fn drop(&mut self) {
        CALL.set(self.0);
    }
}

/// Runs `call`, whose calls of stores on this thread give up `limit` from now; or earlier, if an outer deadline says so.
pub fn within<T>(limit: Duration, call: impl FnOnce() -> T) -> T {
    since(Instant::now(), limit, call)
}

/// The same for a call that had begun then.
pub fn since<T>(begun: Instant, limit: Duration, call: impl FnOnce() -> T) -> T {
    let outer = CALL.get();
    let end = [outer.and_then(|outer| outer.end), begun.checked_add(limit)].into_iter().flatten().min();
    let begun = outer.map_or(begun, |outer| outer.begun);
    let _restore = Outer(outer);
    CALL.set(Some(Call { begun, end }));
    call()
}

/// Runs `call`, which takes as many calls of stores as it needs, each with a deadline of its own.
pub fn apart<T>(call: impl FnOnce() -> T) -> T {
    let _restore = Outer(CALL.take());
    call()
}

/// What is left of the time, if there is a deadline.
pub fn left() -> Option<Duration> {
    CALL.get()?.end.map(|end| end.saturating_duration_since(Instant::now()))
}

/// How long the outermost call has taken until now.
pub fn elapsed() -> Option<Duration> {
    CALL.get().map(|call| call.begun.elapsed())
}

/// Waits for what another thread holds while it reads from a store, up to the deadline.
pub fn lock<T>(mutex: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
    match CALL.get().and_then(|call| call.end) {
        Some(end) => mutex.try_lock_until(end),
        None => Some(mutex.lock()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_deadline_counts() {
        assert_eq!(left(), None);
        within(Duration::from_secs(10), || {
            within(Duration::from_secs(1000), || assert!(left().unwrap() <= Duration::from_secs(10)));
            within(Duration::ZERO, || assert_eq!(left(), Some(Duration::ZERO)));
            assert!(left().unwrap() > Duration::from_secs(5));
            let other = std::thread::spawn(left);
            assert_eq!(other.join().unwrap(), None);
            apart(|| assert_eq!((left(), elapsed()), (None, None)));
        });
        assert_eq!(left(), None);
        within(Duration::MAX, || assert_eq!(left(), None));
    }

    #[test]
    fn a_call_that_had_begun_before_has_less_left() {
        let begun = Instant::now().checked_sub(Duration::from_secs(5)).unwrap();
        since(begun, Duration::from_secs(10), || {
            assert!(left().unwrap() <= Duration::from_secs(5));
            within(Duration::from_secs(1), || assert!(elapsed().unwrap() >= Duration::from_secs(5)));
        });
    }

    #[test]
    fn a_lock_is_waited_for_up_to_the_deadline() {
        let mutex = Mutex::new(());
        let held = mutex.lock();
        within(Duration::from_millis(20), || assert!(lock(&mutex).is_none()));
        drop(held);
        assert!(lock(&mutex).is_some());
    }
}
