//! Where objects live: one narrow trait, implemented by a directory, S3 and memory, and decorated by retry,
//! recording and faults.

mod object_key;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;

mod call;
pub mod deadline;
mod error;
mod fault;
mod file;
mod memory;
mod record;
mod retry;
mod s3;
mod stop;
#[cfg(test)]
mod tests;
mod url;

pub use call::{Call, Operation};
pub use error::{ErrorKind, Result, StoreError};
pub use fault::{Effect, Fault, FaultPlan};
pub use file::DirectoryStore;
pub use memory::MemoryStore;
pub use record::{Count, Record, Recording};
pub use retry::{Retry, RetryPolicy};
pub use s3::{S3Options, S3Store};
pub use stop::Stop;
pub use url::{StoreOptions, open};

/// How many objects one page of a listing holds at most; S3's own limit.
pub const PAGE_OBJECTS_MAX: usize = 1000;

/// What `put` writes. A body can be read again, so that a failed try can be repeated.
#[derive(Clone, Debug)]
pub enum Body {
    /// small enough to be held in memory
    Bytes(Bytes),
    /// a local file, streamed in parts
    File(PathBuf),
}

/// One object as `list` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// the key below the store's root
    pub key: String,
    /// stored length in bytes
    pub size: u64,
    /// when it was last written, in seconds since 1970; by the store's clock
    pub modified: i64,
}

/// One page of a listing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Page {
    /// objects in ascending byte order of their keys
    pub objects: Vec<Listed>,
    /// pass as `after` to get the next page; `None` at the end
    pub next: Option<String>,
}

/// A flat space of immutable-by-convention objects. Keys are relative, `/`-separated, of `[A-Za-z0-9._=+:-]` and never
/// contain an empty, `.` or `..` part (nor begin with `.tmp/`, which is the directory store's own). All calls block, are
/// bounded in time, and may come from many threads at once.
pub trait Store: Send + Sync + fmt::Debug {
    /// The whole object.
    fn get(&self, key: &str) -> Result<Bytes>;
    /// Exactly `len` bytes from `offset`; an object too short for that is an error of kind `Truncated`.
    fn get_range(&self, key: &str, offset: u64, len: u64) -> Result<Bytes>;
    /// Writes the object, whole or not at all, replacing what was there; durable when it returns.
    fn put(&self, key: &str, body: Body) -> Result<()>;
    /// The length of the object, `None` when there is no such object.
    fn size(&self, key: &str) -> Result<Option<u64>>;
    /// Objects whose keys start with `prefix` (any string, not only whole directories), in byte order, after `after`.
    fn list(&self, prefix: &str, after: Option<&str>) -> Result<Page>;
    /// The "directories" and objects directly below `prefix` (which ends in `/` or is empty): names, not whole keys,
    /// without their final slash, in byte order.
    fn names(&self, prefix: &str) -> Result<Vec<String>>;
    /// Removes objects; a missing one is no error.
    fn delete(&self, keys: &[String]) -> Result<()>;
    /// The URL people know this store by, without credentials.
    fn url(&self) -> &str;
}

impl<S: Store + ?Sized> Store for Arc<S> {
    fn get(&self, key: &str) -> Result<Bytes> {
        (**self).get(key)
    }
    fn get_range(&self, key: &str, offset: u64, len: u64) -> Result<Bytes> {
        (**self).get_range(key, offset, len)
    }
    fn put(&self, key: &str, body: Body) -> Result<()> {
        (**self).put(key, body)
    }
    fn size(&self, key: &str) -> Result<Option<u64>> {
        (**self).size(key)
    }
    fn list(&self, prefix: &str, after: Option<&str>) -> Result<Page> {
        (**self).list(prefix, after)
    }
    fn names(&self, prefix: &str) -> Result<Vec<String>> {
        (**self).names(prefix)
    }
    fn delete(&self, keys: &[String]) -> Result<()> {
        (**self).delete(keys)
    }
    fn url(&self) -> &str {
        (**self).url()
    }
}
