//! The one bridge between the synchronous store and the asynchronous SDK: a runtime of its own, started at the first
//! call, and a bound in time on everything that runs on it.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use aws_sdk_s3::Client;
use parking_lot::Mutex;
use tokio::runtime::Runtime;

use super::S3Options;
use super::connect::connect;
use super::failure::Failure;

/// Threads that drive the connections. The callers' own threads do the rest: signing, copying.
const WORKERS: usize = 2;

const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(60);

/// The slowest link that is still worth waiting for, in bytes per second. What moves no byte at all for 20 s is cut
/// off earlier.
const RATE_MIN: u64 = 256 << 10;

type Outcome<T> = std::result::Result<T, Failure>;

/// Runs futures on behalf of threads that know nothing of them.
pub(super) struct Bridge {
    options: S3Options,
    live: Mutex<Option<Arc<Live>>>,
}

struct Live {
    /// present until dropped
    runtime: Option<Runtime>,
    client: Client,
}

impl Drop for Live {
    fn drop(&mut self) {
        // not the plain drop, which waits for file reads and name look-ups that nobody wants any more
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Bridge {
    pub(super) fn new(options: S3Options) -> Self {
        Self { options, live: Mutex::new(None) }
    }

    /// Runs one call that moves `len` bytes, in bounded time.
    pub(super) fn run<T>(&self, len: u64, call: impl AsyncFnOnce(&Client) -> Outcome<T>) -> Outcome<T> {
        let limit = self.limit(len);
        self.drive(async |client| bounded(limit, call(client)).await)
    }

    /// Runs one call in two steps, each in bounded time: the answer's head, which says how many bytes follow, and those.
    pub(super) fn run_read<T, F>(&self, call: impl AsyncFnOnce(&Client) -> Outcome<(u64, F)>) -> Outcome<T>
    where
        F: Future<Output = Outcome<T>>,
    {
        self.drive(async |client| {
            let (len, body) = bounded(self.limit(0), call(client)).await?;
            bounded(self.limit(len), body).await
        })
    }

    /// Runs calls that bound themselves with [`Bridge::limit`] and [`bounded`].
    pub(super) fn drive<T>(&self, calls: impl AsyncFnOnce(&Client) -> Outcome<T>) -> Outcome<T> {
        let live = self.live()?;
        let Some(runtime) = &live.runtime else { return Err(Failure::other("the store is closed")) };
        block_on(runtime, calls(&live.client))
    }

    /// How long moving `len` bytes may take.
    pub(super) fn limit(&self, len: u64) -> Duration {
        self.options.attempt_timeout.unwrap_or(ATTEMPT_TIMEOUT) + Duration::from_secs(len / RATE_MIN)
    }

    fn live(&self) -> Outcome<Arc<Live>> {
        let mut live = self.live.lock();
        if let Some(live) = &*live {
            return Ok(Arc::clone(live));
        }
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(WORKERS)
            .thread_name("pgcairn-s3")
            .enable_all()
            .build()
            .map_err(|e| Failure::other(format!("no runtime: {e}")))?;
        let client = block_on(&runtime, bounded(self.limit(0), connect(&self.options)))?;
        Ok(Arc::clone(live.insert(Arc::new(Live { runtime: Some(runtime), client }))))
    }
}

#[expect(clippy::disallowed_methods, reason = "this is the one bridge")]
fn block_on<T>(runtime: &Runtime, future: impl Future<Output = T>) -> T {
    runtime.block_on(future)
}

/// Gives up on `call` after `limit`.
pub(super) async fn bounded<T>(limit: Duration, call: impl Future<Output = Outcome<T>>) -> Outcome<T> {
    match tokio::time::timeout(limit, call).await {
        Ok(outcome) => outcome,
        Err(_) => Err(Failure::timeout(limit)),
    }
}

impl fmt::Debug for Bridge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.options.fmt(f)
    }
}
