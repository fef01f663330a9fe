//! The one bridge between the synchronous store and the asynchronous SDK: a runtime of its own, started at the first
//! call, and a bound in time on everything that runs on it.

use std::fmt;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::time::{Duration, Instant};

use aws_sdk_s3::Client;
use aws_sdk_s3::config::Credentials;
use parking_lot::{Mutex, RwLock};
use tokio::runtime::Runtime;

use super::S3Options;
use super::connect::{self, connect};
use super::failure::Failure;
use crate::store::{ErrorKind, RetryPolicy, deadline};

/// Threads that drive the connections. The callers' own threads do the rest: signing, copying.
const WORKERS: usize = 2;

const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(60);

/// The slowest link that is still worth waiting for, in bytes per second. What moves no byte at all for 20 s is cut
/// off earlier.
const RATE_MIN: u64 = 256 << 10;

/// Credentials that are refused are looked for again, but not more often.
const RENEWAL_MIN: Duration = Duration::from_secs(2);

type Outcome<T> = std::result::Result<T, Failure>;

/// Runs futures on behalf of threads that know nothing of them.
pub(super) struct Bridge {
    options: S3Options,
    live: Mutex<Option<Arc<Live>>>,
}

struct Live {
    /// present until dropped
    runtime: Option<Runtime>,
    connected: RwLock<Connected>,
    /// there was an answer, or it was looked for why there was none
    answered: AtomicBool,
}

#[derive(Clone)]
struct Connected {
    client: Client,
    credentials: Credentials,
    /// when they were last looked for after a refusal
    renewed: Option<Instant>,
}

impl Connected {
    async fn new(options: &S3Options) -> Outcome<Self> {
        let (client, credentials) = connect(options).await?;
        Ok(Self { client, credentials, renewed: None })
    }
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

    /// Runs calls that bound themselves with [`Bridge::limit`] and [`bounded`], until the program ends.
    pub(super) fn drive<T>(&self, calls: impl AsyncFnOnce(&Client) -> Outcome<T>) -> Outcome<T> {
        let begun = Instant::now();
        let live = self.live(begun)?;
        let Some(runtime) = &live.runtime else { return Err(Failure::other("the store is closed")) };
        let connected = live.connected.read().clone();
        let outcome = block_on(runtime, self.unless_ended(begun, calls(&connected.client)));
        match outcome {
            Err(failure) if failure.is_unanswered => {
                // looked at once, and only a server that has never answered
                let is_known = live.answered.swap(true, Ordering::Relaxed);
                let other = || connect::endpoint(&self.options)?.other_protocol();
                Err(if is_known { failure } else { other().unwrap_or(failure) })
            }
            Err(failure) if failure.kind == ErrorKind::Denied => Err(self.renewed(&live, &connected, runtime, failure)),
            outcome => {
                live.answered.store(true, Ordering::Relaxed);
                outcome
            }
        }
    }

    /// What a call that began then comes to, unless the program ends meanwhile.
    async fn unless_ended<T>(&self, begun: Instant, call: impl Future<Output = Outcome<T>>) -> Outcome<T> {
        // a store that answers at once could be the first
        if self.options.stop.ends(begun) {
            return Err(Failure::stopped());
        }
        let (ended, call) = (pin!(self.options.stop.wait(begun)), pin!(call));
        first(call, ended).await.unwrap_or_else(|| Err(Failure::stopped()))
    }

    /// What a refusal comes to. If there are other credentials by now than those that were refused, as in a profile that was
    /// rotated, they are taken from here on, and the call is worth another try.
    fn renewed(&self, live: &Live, used: &Connected, runtime: &Runtime, failure: Failure) -> Failure {
        if live.connected.read().credentials != used.credentials {
            return failure.again("another thread took up new credentials");
        }
        // what was given as an option stays what it is
        let is_given = self.options.key.is_some();
        if is_given || used.renewed.is_some_and(|renewed| renewed.elapsed() < RENEWAL_MIN) {
            return failure;
        }
        let fresh = bounded(self.limit(0), Connected::new(&self.options));
        match block_on(runtime, self.unless_ended(Instant::now(), fresh)) {
            Ok(fresh) => {
                let is_new = fresh.credentials != used.credentials;
                // also if they are the same: the next refusal need not look at once
                *live.connected.write() = Connected { renewed: Some(Instant::now()), ..fresh };
                if is_new { failure.again("there are new credentials") } else { failure }
            }
            Err(error) => {
                tracing::debug!(%error, "no new credentials");
                failure
            }
        }
    }

    /// How long moving `len` bytes may take. One try does not take longer than the whole call may.
    pub(super) fn limit(&self, len: u64) -> Duration {
        let attempt = self.options.attempt_timeout.unwrap_or(ATTEMPT_TIMEOUT);
        deadline::left().map_or(attempt, |left| left.min(attempt)) + moving(len)
    }

    /// How the parts of an upload are tried again.
    pub(super) fn retry(&self) -> RetryPolicy {
        self.options.retry
    }

    fn live(&self, begun: Instant) -> Outcome<Arc<Live>> {
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
        let connected = bounded(self.limit(0), Connected::new(&self.options));
        let connected = block_on(&runtime, self.unless_ended(begun, connected))?;
        let connected = RwLock::new(connected);
        let made = Live { runtime: Some(runtime), connected, answered: AtomicBool::new(false) };
        Ok(Arc::clone(live.insert(Arc::new(made))))
    }
}

#[expect(clippy::disallowed_methods, reason = "this is the one bridge")]
fn block_on<T>(runtime: &Runtime, future: impl Future<Output = T>) -> T {
    runtime.block_on(future)
}

/// How long `len` bytes take on the slowest link.
pub(super) fn moving(len: u64) -> Duration {
    Duration::from_secs(len / RATE_MIN)
}

/// What `call` comes to, unless `end` comes first.
async fn first<T>(
    mut call: Pin<&mut impl Future<Output = T>>,
    mut end: Pin<&mut impl Future<Output = ()>>,
) -> Option<T> {
    poll_fn(|context| match call.as_mut().poll(context) {
        Poll::Ready(outcome) => Poll::Ready(Some(outcome)),
        Poll::Pending => end.as_mut().poll(context).map(|()| None),
    })
    .await
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
