//! Counts calls and bytes, and can keep the list of calls: for `status`, and for tests that assert request counts.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bytes::Bytes;
use parking_lot::Mutex;

use super::{Body, Call, Operation, Page, Result, Store};

/// What happened so far with one operation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// calls, failed ones included
    pub calls: u64,
    /// calls that failed
    pub errors: u64,
    /// bytes read or written by calls that succeeded
    pub bytes: u64,
}

/// The counters of a [`Record`], shared with whoever reads them.
#[derive(Debug, Default)]
pub struct Recording {
    counters: [Counters; Operation::ALL.len()],
    number: AtomicU64,
    keeps_calls: AtomicBool,
    calls: Mutex<Vec<Call>>,
}

#[derive(Debug, Default)]
struct Counters {
    calls: AtomicU64,
    errors: AtomicU64,
    bytes: AtomicU64,
}

impl Recording {
    /// The counters of one operation.
    pub fn count(&self, operation: Operation) -> Count {
        let counters = &self.counters[operation as usize];
        Count {
            calls: counters.calls.load(Ordering::Relaxed),
            errors: counters.errors.load(Ordering::Relaxed),
            bytes: counters.bytes.load(Ordering::Relaxed),
        }
    }

    /// The counters of all operations together.
    pub fn total(&self) -> Count {
        Operation::ALL.iter().map(|&operation| self.count(operation)).fold(Count::default(), |sum, one| Count {
            calls: sum.calls + one.calls,
            errors: sum.errors + one.errors,
            bytes: sum.bytes + one.bytes,
        })
    }

    /// `get` and `get_range` together: what a mount costs.
    pub fn gets(&self) -> Count {
        let (get, range) = (self.count(Operation::Get), self.count(Operation::GetRange));
        Count { calls: get.calls + range.calls, errors: get.errors + range.errors, bytes: get.bytes + range.bytes }
    }

    /// From now on keeps every call, without bound: for tests.
    pub fn keep_calls(&self) {
        self.keeps_calls.store(true, Ordering::Relaxed);
    }

    /// The calls kept, in the order they began.
    pub fn calls(&self) -> Vec<Call> {
        self.calls.lock().clone()
    }

    /// Counts from zero again and forgets the calls kept.
    pub fn reset(&self) {
        for counters in &self.counters {
            counters.calls.store(0, Ordering::Relaxed);
            counters.errors.store(0, Ordering::Relaxed);
            counters.bytes.store(0, Ordering::Relaxed);
        }
        self.calls.lock().clear();
    }

    fn begin(&self, operation: Operation, key: &str, offset: u64, len: u64) {
        self.counters[operation as usize].calls.fetch_add(1, Ordering::Relaxed);
        let number = self.number.fetch_add(1, Ordering::Relaxed) + 1;
        if self.keeps_calls.load(Ordering::Relaxed) {
            self.calls.lock().push(Call { number, operation, key: key.to_owned(), offset, len });
        }
    }

    fn end<T>(&self, operation: Operation, outcome: Result<T>, bytes: impl FnOnce(&T) -> u64) -> Result<T> {
        let counters = &self.counters[operation as usize];
        match &outcome {
            Ok(value) => counters.bytes.fetch_add(bytes(value), Ordering::Relaxed),
            Err(_) => counters.errors.fetch_add(1, Ordering::Relaxed),
        };
        outcome
    }
}

/// A store that counts its calls.
#[derive(Debug)]
pub struct Record<S> {
    inner: S,
    recording: Arc<Recording>,
}

impl<S: Store> Record<S> {
    /// Counts the calls of `inner`.
    pub fn new(inner: S) -> Self {
        Self { inner, recording: Arc::default() }
    }

    /// The counters; they stay readable when the store is gone.
    pub fn recording(&self) -> Arc<Recording> {
        Arc::clone(&self.recording)
    }
}

/// Bytes that `put` is given; 0 for a file that cannot be looked at, which the write itself will report.
pub(super) fn body_len(body: &Body) -> u64 {
    match body {
        Body::Bytes(bytes) => bytes.len() as u64,
        Body::File(path) => std::fs::metadata(path).map_or(0, |meta| meta.len()),
    }
}

impl<S: Store> Store for Record<S> {
    fn get(&self, key: &str) -> Result<Bytes> {
        self.recording.begin(Operation::Get, key, 0, 0);
        self.recording.end(Operation::Get, self.inner.get(key), |bytes| bytes.len() as u64)
    }
    fn get_range(&self, key: &str, offset: u64, len: u64) -> Result<Bytes> {
        self.recording.begin(Operation::GetRange, key, offset, len);
        let outcome = self.inner.get_range(key, offset, len);
        self.recording.end(Operation::GetRange, outcome, |bytes| bytes.len() as u64)
    }
    fn put(&self, key: &str, body: Body) -> Result<()> {
        let len = body_len(&body);
        self.recording.begin(Operation::Put, key, 0, len);
        self.recording.end(Operation::Put, self.inner.put(key, body), |()| len)
    }
    fn size(&self, key: &str) -> Result<Option<u64>> {
        self.recording.begin(Operation::Size, key, 0, 0);
        self.recording.end(Operation::Size, self.inner.size(key), |_| 0)
    }
    fn list(&self, prefix: &str, after: Option<&str>) -> Result<Page> {
        self.recording.begin(Operation::List, prefix, 0, 0);
        self.recording.end(Operation::List, self.inner.list(prefix, after), |_| 0)
    }
    fn names(&self, prefix: &str) -> Result<Vec<String>> {
        self.recording.begin(Operation::Names, prefix, 0, 0);
        self.recording.end(Operation::Names, self.inner.names(prefix), |_| 0)
    }
    fn delete(&self, keys: &[String]) -> Result<()> {
        let first = keys.first().map_or("", String::as_str);
        self.recording.begin(Operation::Delete, first, 0, keys.len() as u64);
        self.recording.end(Operation::Delete, self.inner.delete(keys), |()| 0)
    }
    fn url(&self) -> &str {
        self.inner.url()
    }
}
