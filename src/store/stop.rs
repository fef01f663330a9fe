//! Ends calls under way: a daemon that is asked to end does not wait for a store that hangs.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use tokio::sync::Notify;

/// Shared by a program that ends and the stores that it uses.
#[derive(Clone, Debug, Default)]
pub struct Stop(Arc<State>);

#[derive(Debug, Default)]
struct State {
    is_set: Mutex<bool>,
    wake: Condvar,
    notify: Notify,
}

impl Stop {
    /// From now on every call fails, also those under way.
    pub fn set(&self) {
        *self.0.is_set.lock() = true;
        self.0.wake.notify_all();
        self.0.notify.notify_waiters();
    }

    /// Whether it is set.
    pub fn is_set(&self) -> bool {
        *self.0.is_set.lock()
    }

    /// Sleeps for `time`, or until it is set.
    pub(super) fn sleep(&self, time: Duration) {
        let mut is_set = self.0.is_set.lock();
        if !*is_set {
            _ = self.0.wake.wait_for(&mut is_set, time);
        }
    }

    /// Returns when it is set.
    pub(super) async fn wait(&self) {
        let notified = self.0.notify.notified();
        if !self.is_set() {
            notified.await;
        }
    }
}
