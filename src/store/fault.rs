//! A store that fails on command: what tests of everything above the store are made of.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::RwLock;

use super::record::body_len;
use super::{Body, Call, ErrorKind, Operation, Page, Result, Store, StoreError};

/// What happens to a call that a rule matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// the store is not reached
    Fail(ErrorKind),
    /// the store does it, but the answer is lost
    FailAfter(ErrorKind),
    /// a read returns only this many bytes, a listing this many entries, and says that all is well
    Cut(u64),
    /// a read returns one bit of this byte flipped, and says that all is well
    Flip(u64),
    /// the call waits first
    Delay(Duration),
}

type Predicate = Box<dyn Fn(&Call) -> bool + Send + Sync>;

/// The rules of a [`Fault`], shared with the test that changes them while the store is used.
#[derive(Default)]
pub struct FaultPlan {
    number: AtomicU64,
    rules: RwLock<Vec<(Predicate, Effect)>>,
}

impl FaultPlan {
    /// Adds a rule. A call meets the effects of all rules that match; the first that fails it wins.
    pub fn add(&self, matches: impl Fn(&Call) -> bool + Send + Sync + 'static, effect: Effect) {
        self.rules.write().push((Box::new(matches), effect));
    }

    /// Spoils the `n`-th call from now, counted from 1 over all operations.
    pub fn nth(&self, n: u64, effect: Effect) {
        let number = self.calls() + n;
        self.add(move |call| call.number == number, effect);
    }

    /// Spoils the next `count` calls.
    pub fn next(&self, count: u64, effect: Effect) {
        let last = self.calls() + count;
        self.add(move |call| call.number <= last, effect);
    }

    /// Spoils the `n`-th call from now and every later one: the store is gone for good.
    pub fn from_nth(&self, n: u64, effect: Effect) {
        let first = self.calls() + n;
        self.add(move |call| call.number >= first, effect);
    }

    /// Lets every call wait for a random moment first, so that what runs at the same time comes in any order.
    pub fn shake(&self, longest: Duration) {
        let wait = move |_: &Call| {
            let part = f64::from(getrandom::u32().unwrap_or_default()) / f64::from(u32::MAX);
            std::thread::sleep(longest.mul_f64(part));
            false
        };
        self.add(wait, Effect::Delay(Duration::ZERO));
    }

    /// Forgets all rules; the count of calls goes on.
    pub fn clear(&self) {
        self.rules.write().clear();
    }

    /// How many calls came so far.
    pub fn calls(&self) -> u64 {
        self.number.load(Ordering::SeqCst)
    }

    fn effects(&self, operation: Operation, key: &str, offset: u64, len: u64) -> Vec<Effect> {
        let number = self.number.fetch_add(1, Ordering::SeqCst) + 1;
        let call = Call { number, operation, key: key.to_owned(), offset, len };
        let rules = self.rules.read();
        rules.iter().filter(|(matches, _)| matches(&call)).map(|(_, effect)| *effect).collect()
    }
}

impl fmt::Debug for FaultPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let effects: Vec<Effect> = self.rules.read().iter().map(|(_, effect)| *effect).collect();
        f.debug_struct("FaultPlan").field("calls", &self.calls()).field("effects", &effects).finish()
    }
}

/// A store whose calls can be made to fail.
#[derive(Debug)]
pub struct Fault<S> {
    inner: S,
    plan: Arc<FaultPlan>,
}

impl<S: Store> Fault<S> {
    /// Passes everything on to `inner` until the plan says otherwise.
    pub fn new(inner: S) -> Self {
        Self { inner, plan: Arc::default() }
    }

    /// The rules.
    pub fn plan(&self) -> Arc<FaultPlan> {
        Arc::clone(&self.plan)
    }

    fn run<T>(
        &self,
        operation: Operation,
        key: &str,
        (offset, len): (u64, u64),
        call: impl FnOnce() -> Result<T>,
        spoil: impl Fn(T, Effect) -> T,
    ) -> Result<T> {
        let effects = self.plan.effects(operation, key, offset, len);
        let failure =
            |kind| Err(StoreError::new(kind, operation.verb(), self.inner.url(), key, "a fault made for a test"));
        for effect in &effects {
            match effect {
                Effect::Fail(kind) => return failure(*kind),
                Effect::Delay(delay) => std::thread::sleep(*delay),
                Effect::FailAfter(_) | Effect::Cut(_) | Effect::Flip(_) => {}
            }
        }
        let mut value = call()?;
        for effect in effects {
            match effect {
                Effect::FailAfter(kind) => return failure(kind),
                effect => value = spoil(value, effect),
            }
        }
        Ok(value)
    }
}

fn spoil_bytes(bytes: Bytes, effect: Effect) -> Bytes {
    match effect {
        Effect::Cut(len) => bytes.slice(..bytes.len().min(len as usize)),
        Effect::Flip(at) if (at as usize) < bytes.len() => {
            let mut spoilt = bytes.to_vec();
            spoilt[at as usize] ^= 1;
            spoilt.into()
        }
        _ => bytes,
    }
}

fn spoil_page(mut page: Page, effect: Effect) -> Page {
    if let Effect::Cut(len) = effect {
        page.objects.truncate(len as usize);
        page.next = None;
    }
    page
}

fn spoil_names(mut names: Vec<String>, effect: Effect) -> Vec<String> {
    if let Effect::Cut(len) = effect {
        names.truncate(len as usize);
    }
    names
}

fn keep<T>(value: T, _: Effect) -> T {
    value
}

impl<S: Store> Store for Fault<S> {
    fn get(&self, key: &str) -> Result<Bytes> {
        self.run(Operation::Get, key, (0, 0), || self.inner.get(key), spoil_bytes)
    }
    fn get_range(&self, key: &str, offset: u64, len: u64) -> Result<Bytes> {
        let call = || self.inner.get_range(key, offset, len);
        self.run(Operation::GetRange, key, (offset, len), call, spoil_bytes)
    }
    fn put(&self, key: &str, body: Body) -> Result<()> {
        self.run(Operation::Put, key, (0, body_len(&body)), || self.inner.put(key, body), keep)
    }
    fn size(&self, key: &str) -> Result<Option<u64>> {
        self.run(Operation::Size, key, (0, 0), || self.inner.size(key), keep)
    }
    fn list(&self, prefix: &str, after: Option<&str>) -> Result<Page> {
        self.run(Operation::List, prefix, (0, 0), || self.inner.list(prefix, after), spoil_page)
    }
    fn names(&self, prefix: &str) -> Result<Vec<String>> {
        self.run(Operation::Names, prefix, (0, 0), || self.inner.names(prefix), spoil_names)
    }
    fn delete(&self, keys: &[String]) -> Result<()> {
        let first = keys.first().map_or("", String::as_str);
        self.run(Operation::Delete, first, (0, keys.len() as u64), || self.inner.delete(keys), keep)
    }
    fn url(&self) -> &str {
        self.inner.url()
    }
}
