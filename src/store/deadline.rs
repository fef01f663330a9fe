//! How long the call that a thread is in may still take, whatever is tried again within it.
//!
//! A deadline is the thread's, not an argument: it is set where a request comes in (a read of the kernel, a call of
//! [`super::Retry`]) and asked for where the time is spent, several layers below.

use std::cell::Cell;
use std::time::{Duration, Instant};

thread_local! {
    static END: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// Restores the outer deadline, also when the call panics.
struct Outer(Option<Instant>);

impl Drop for Outer {
    fn drop(&mut self) {
        END.set(self.0);
    }
}

/// Runs `call`, whose calls of stores on this thread give up `limit` from now; or earlier, if an outer deadline says so.
pub fn within<T>(limit: Duration, call: impl FnOnce() -> T) -> T {
    let outer = END.get();
    let end = Instant::now().checked_add(limit);
    let _restore = Outer(outer);
    END.set(match (outer, end) {
        (Some(outer), Some(end)) => Some(outer.min(end)),
        (outer, end) => outer.or(end),
    });
    call()
}

/// What is left of the time, if there is a deadline.
pub(super) fn left() -> Option<Duration> {
    END.get().map(|end| end.saturating_duration_since(Instant::now()))
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
        });
        assert_eq!(left(), None);
        within(Duration::MAX, || assert_eq!(left(), None));
    }
}
