//! Objects in memory: the reference that the other stores are compared with, and the store of quick tests.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Bound;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use parking_lot::RwLock;

use super::{Body, ErrorKind, Listed, PAGE_OBJECTS_MAX, Page, Result, Store, StoreError};
use crate::store::object_key;

const URL: &str = "memory:";

/// A store that is gone with the process.
#[derive(Default)]
pub struct MemoryStore {
    objects: RwLock<BTreeMap<String, Object>>,
}

struct Object {
    bytes: Bytes,
    modified: i64,
}

impl MemoryStore {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }

    fn with<T>(&self, key: &str, read: impl FnOnce(&Bytes) -> Result<T>) -> Result<T> {
        object_key::require("read", URL, key)?;
        match self.objects.read().get(key) {
            Some(object) => read(&object.bytes),
            None => Err(StoreError::new(ErrorKind::NotFound, "read", URL, key, "no such object")),
        }
    }
}

impl Store for MemoryStore {
    fn get(&self, key: &str) -> Result<Bytes> {
        self.with(key, |bytes| Ok(bytes.clone()))
    }

    fn get_range(&self, key: &str, offset: u64, len: u64) -> Result<Bytes> {
        self.with(key, |bytes| {
            let size = bytes.len() as u64;
            match offset.checked_add(len) {
                Some(end) if end <= size => Ok(bytes.slice(offset as usize..end as usize)),
                _ => Err(StoreError::truncated(URL, key, offset, len, Some(size))),
            }
        })
    }

    fn put(&self, key: &str, body: Body) -> Result<()> {
        object_key::require("write", URL, key)?;
        let bytes = match body {
            Body::Bytes(bytes) => bytes,
            Body::File(path) => {
                std::fs::read(&path).map_err(|e| StoreError::new(ErrorKind::Other, "write", URL, key, e))?.into()
            }
        };
        let modified = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs() as i64);
        self.objects.write().insert(key.to_owned(), Object { bytes, modified });
        Ok(())
    }

    fn size(&self, key: &str) -> Result<Option<u64>> {
        object_key::require("read", URL, key)?;
        Ok(self.objects.read().get(key).map(|object| object.bytes.len() as u64))
    }

    fn list(&self, prefix: &str, after: Option<&str>) -> Result<Page> {
        object_key::require_prefix(URL, prefix)?;
        let objects = self.objects.read();
        let start = after.unwrap_or_default().max(prefix);
        let mut matching = objects
            .range::<str, _>((Bound::Included(start), Bound::Unbounded))
            .skip_while(|(key, _)| after.is_some_and(|after| key.as_str() <= after))
            .take_while(|(key, _)| key.starts_with(prefix))
            .map(|(key, object)| Listed {
                key: key.clone(),
                size: object.bytes.len() as u64,
                modified: object.modified,
            });
        let page: Vec<Listed> = matching.by_ref().take(PAGE_OBJECTS_MAX).collect();
        let next = matching.next().and(page.last()).map(|last| last.key.clone());
        Ok(Page { objects: page, next })
    }

    fn names(&self, prefix: &str) -> Result<Vec<String>> {
        object_key::require_directory(URL, prefix)?;
        let objects = self.objects.read();
        let below = objects.range::<str, _>((Bound::Included(prefix), Bound::Unbounded)).map(|(key, _)| key);
        let below = below.take_while(|key| key.starts_with(prefix));
        let names: BTreeSet<&str> = below.filter_map(|key| key[prefix.len()..].split('/').next()).collect();
        Ok(names.into_iter().map(str::to_owned).collect())
    }

    fn delete(&self, keys: &[String]) -> Result<()> {
        keys.iter().try_for_each(|key| object_key::require("delete", URL, key))?;
        let mut objects = self.objects.write();
        for key in keys {
            objects.remove(key);
        }
        Ok(())
    }

    fn url(&self) -> &str {
        URL
    }
}

impl fmt::Debug for MemoryStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryStore").field("objects", &self.objects.read().len()).finish()
    }
}
