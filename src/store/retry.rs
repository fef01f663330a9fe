//! Tries again what is worth trying again.

use std::fmt;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::{Body, ErrorKind, Page, Result, Store, StoreError};

/// How often and how long to try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetryPolicy {
    /// tries in all, the first one included
    pub attempts: u32,
    /// upper bound of the first wait; doubles with each try
    pub delay_base: Duration,
    /// upper bound of any wait
    pub delay_max: Duration,
    /// no new try starts this long after the first one started
    pub deadline: Duration,
}

impl Default for RetryPolicy {
    /// Rides out a restart of the server and a few minutes of throttling.
    fn default() -> Self {
        Self {
            attempts: 10,
            delay_base: Duration::from_millis(100),
            delay_max: Duration::from_secs(10),
            deadline: Duration::from_secs(180),
        }
    }
}

impl RetryPolicy {
    /// The wait after the `tries`-th try failed: anything from nothing to the bound ("full jitter"), so that many
    /// clients of a server that throttled them do not come back at once.
    pub(super) fn delay(&self, tries: u32) -> Duration {
        let bound = self.delay_base.saturating_mul(1 << (tries - 1).min(20)).min(self.delay_max);
        let random = getrandom::u32().unwrap_or(u32::MAX);
        bound.mul_f64(f64::from(random) / f64::from(u32::MAX))
    }
}

/// A store whose calls are repeated while they fail with [`ErrorKind::Transient`]. Every call may be repeated: objects
/// are written whole, and deleting what is gone is no error.
#[derive(Debug)]
pub struct Retry<S> {
    inner: S,
    policy: RetryPolicy,
}

impl<S: Store> Retry<S> {
    /// Repeats the calls of `inner`.
    pub fn new(inner: S, policy: RetryPolicy) -> Self {
        Self { inner, policy }
    }

    fn run<T>(&self, call: impl Fn() -> Result<T>) -> Result<T> {
        let start = Instant::now();
        let mut tries = 1;
        loop {
            let error = match call() {
                Err(error) if error.kind == ErrorKind::Transient => error,
                done => return done,
            };
            let delay = self.policy.delay(tries);
            if tries >= self.policy.attempts || start.elapsed() + delay >= self.policy.deadline {
                return Err(gave_up(error, tries, start.elapsed()));
            }
            tracing::debug!(tries, ?delay, error = %error, cause = %error.source, "try again");
            std::thread::sleep(delay);
            tries += 1;
        }
    }
}

/// The last error, and how often was tried before it.
#[derive(Debug)]
struct GaveUp {
    tries: u32,
    elapsed: Duration,
    source: Box<dyn std::error::Error + Send + Sync>,
}

impl fmt::Display for GaveUp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "gave up after {} tries in {:.1} s", self.tries, self.elapsed.as_secs_f64())
    }
}

impl std::error::Error for GaveUp {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&*self.source)
    }
}

fn gave_up(error: StoreError, tries: u32, elapsed: Duration) -> StoreError {
    StoreError { source: Box::new(GaveUp { tries, elapsed, source: error.source }), ..error }
}

impl<S: Store> Store for Retry<S> {
    fn get(&self, key: &str) -> Result<Bytes> {
        self.run(|| self.inner.get(key))
    }
    fn get_range(&self, key: &str, offset: u64, len: u64) -> Result<Bytes> {
        self.run(|| self.inner.get_range(key, offset, len))
    }
    fn put(&self, key: &str, body: Body) -> Result<()> {
        self.run(|| self.inner.put(key, body.clone()))
    }
    fn size(&self, key: &str) -> Result<Option<u64>> {
        self.run(|| self.inner.size(key))
    }
    fn list(&self, prefix: &str, after: Option<&str>) -> Result<Page> {
        self.run(|| self.inner.list(prefix, after))
    }
    fn names(&self, prefix: &str) -> Result<Vec<String>> {
        self.run(|| self.inner.names(prefix))
    }
    fn delete(&self, keys: &[String]) -> Result<()> {
        self.run(|| self.inner.delete(keys))
    }
    fn url(&self) -> &str {
        self.inner.url()
    }
}
