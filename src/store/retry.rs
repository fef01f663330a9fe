//! Tries again what is worth trying again.

use std::fmt;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::{Body, ErrorKind, Page, Result, Stop, Store, StoreError, deadline};

/// How long to try, and how to wait between tries. The deadline decides, not the number of tries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetryPolicy {
    /// upper bound of the first wait; doubles with each try
    pub delay_base: Duration,
    /// upper bound of any wait
    pub delay_max: Duration,
    /// how long one call may take, whatever is tried again in it; moving many bytes may take longer
    pub deadline: Duration,
}

impl Default for RetryPolicy {
    /// Rides out a restart of the server and a few minutes of throttling.
    fn default() -> Self {
        Self {
            delay_base: Duration::from_millis(100),
            delay_max: Duration::from_secs(10),
            deadline: Duration::from_secs(180),
        }
    }
}

/// What is left for the last try: none begins later.
const LAST_TRY: Duration = Duration::from_secs(1);

/// A call that fails for so long is told to whoever waits for it.
const SILENCE_MAX: Duration = Duration::from_secs(10);

impl RetryPolicy {
    /// The wait after the `tries`-th try failed: anything from nothing to the bound ("full jitter"), so that many
    /// clients of a server that throttled them do not come back at once.
    fn delay(&self, tries: u32) -> Duration {
        let bound = self.delay_base.saturating_mul(1 << (tries - 1).min(20)).min(self.delay_max);
        let random = getrandom::u32().unwrap_or(u32::MAX);
        bound.mul_f64(f64::from(random) / f64::from(u32::MAX))
    }

    /// The same, so that one more try fits into what is `left`; `None` when none does.
    pub(super) fn next_delay(&self, tries: u32, left: Duration) -> Option<Duration> {
        let left = left.saturating_sub(LAST_TRY.min(self.deadline / 8));
        (!left.is_zero()).then(|| self.delay(tries).min(left))
    }
}

/// A store whose calls are repeated while they fail with [`ErrorKind::Transient`]. Every call may be repeated: objects
/// are written whole, and deleting what is gone is no error.
#[derive(Debug)]
pub struct Retry<S> {
    inner: S,
    policy: RetryPolicy,
    stop: Stop,
}

impl<S: Store> Retry<S> {
    /// Repeats the calls of `inner`.
    pub fn new(inner: S, policy: RetryPolicy) -> Self {
        Self { inner, policy, stop: Stop::default() }
    }

    /// The same, until `stop` is set.
    #[must_use]
    pub fn until(self, stop: Stop) -> Self {
        Self { stop, ..self }
    }

    fn run<T>(&self, call: impl Fn() -> Result<T>) -> Result<T> {
        deadline::within(self.policy.deadline, || self.repeat(call))
    }

    fn repeat<T>(&self, call: impl Fn() -> Result<T>) -> Result<T> {
        let start = Instant::now();
        let (mut tries, mut is_told, mut truncated) = (1, false, false);
        loop {
            let error = match call() {
                Err(error) if error.kind == ErrorKind::Transient => error,
                // one answer alone does not make an object shorter than it should be
                Err(error) if error.kind == ErrorKind::Truncated && !truncated => {
                    truncated = true;
                    continue;
                }
                done => return done,
            };
            let left = deadline::left().unwrap_or(self.policy.deadline);
            let delay = self.policy.next_delay(tries, left).filter(|_| !self.stop.ends(start));
            let Some(delay) = delay else { return Err(gave_up(error, tries, start.elapsed())) };
            if start.elapsed() >= SILENCE_MAX && !is_told {
                is_told = true;
                let left = left.as_secs();
                tracing::warn!(cause = %error.source, "{error}: it is tried again for up to {left} s");
            }
            tracing::debug!(tries, ?delay, error = %error, cause = %error.source, "try again");
            self.stop.sleep(start, delay);
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
