//! Ends calls under way: a daemon that is asked to end does not wait for a store that hangs.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use tokio::sync::Notify;
use tokio::time::timeout_at;

/// How long a call may take once somebody is in a hurry. A store that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a hurry lasts: whoever was in it may have given up.
const HURRY: Duration = Duration::from_secs(30);

/// Shared by a program that ends and the stores that it uses.
#[derive(Clone, Debug, Default)]
pub struct Stop(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    wake: Condvar,
    notify: Notify,
}

#[derive(Debug, Default)]
struct State {
    is_set: bool,
    hurry: Option<Hurry>,
}

#[derive(Clone, Copy, Debug)]
struct Hurry {
    since: Instant,
    /// a call took too long: the others need not be waited for
    hangs: bool,
}

impl State {
    /// When a call that began then has to end, as far as it is known now.
    fn end_of(&self, begun: Instant, now: Instant) -> Option<Instant> {
        if self.is_set {
            return Some(now);
        }
        let hurry = self.hurry.filter(|hurry| now < hurry.since + HURRY)?;
        Some(if hurry.hangs { now } else { hurry.since.max(begun + PATIENCE) })
    }
}

impl Stop {
    /// From now on every call fails, also those under way.
    pub fn set(&self) {
        self.change(|state| state.is_set = true);
    }

    /// Calls that take longer than some seconds fail, also those under way, and once one did, all others:
    /// for half a minute.
    pub fn hurry(&self) {
        let now = Instant::now();
        self.change(|state| {
            let hangs = state.hurry.is_some_and(|hurry| hurry.hangs && now < hurry.since + HURRY);
            state.hurry = Some(Hurry { since: now, hangs });
        });
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.0.state.lock());
        self.0.wake.notify_all();
        self.0.notify.notify_waiters();
    }

    /// Whether a call that began then has to end now.
    pub(super) fn ends(&self, begun: Instant) -> bool {
        let now = Instant::now();
        let mut state = self.0.state.lock();
        let ends = state.end_of(begun, now).is_some_and(|end| end <= now);
        if ends && let Some(hurry) = &mut state.hurry {
            hurry.hangs = true;
        }
        ends
    }

    /// Sleeps for `time`, or until a call that began then has to end.
    pub(super) fn sleep(&self, begun: Instant, time: Duration) {
        let until = Instant::now() + time;
        loop {
            let mut state = self.0.state.lock();
            let now = Instant::now();
            let end = state.end_of(begun, now).map_or(until, |end| end.min(until));
            if end <= now {
                return;
            }
            _ = self.0.wake.wait_until(&mut state, end);
        }
    }

    /// Returns when a call that began then has to end.
    pub(super) async fn wait(&self, begun: Instant) {
        loop {
            let changed = self.0.notify.notified();
            if self.ends(begun) {
                return;
            }
            let now = Instant::now();
            let end = self.0.state.lock().end_of(begun, now);
            match end {
                // the others learn from this one that the store hangs
                Some(end) => _ = timeout_at(end.into(), changed).await,
                None => changed.await,
            }
        }
    }
}
