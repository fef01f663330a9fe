//! What is found out of each file once, by whoever asks first.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;

use super::NodeIndex;
use crate::error::{Error, Result};
use crate::store::deadline;

/// A value of each file, if it was asked for. While it is made, those who ask for it too wait, up to their deadline, and those
/// who ask for another file's do not.
#[derive(Debug)]
pub(super) struct Once<V>(Mutex<HashMap<NodeIndex, Arc<Slot<V>>>>);

type Slot<V> = Mutex<Option<Arc<V>>>;

impl<V> Default for Once<V> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<V> Once<V> {
    /// The value of a file, made by `make` if there is none; `what` says for people what is waited for.
    ///
    /// # Errors
    /// Those of `make`, which is tried again then; and when another who makes it takes too long.
    pub(super) fn get(&self, node: NodeIndex, what: &str, make: impl FnOnce() -> Result<V>) -> Result<Arc<V>> {
        let slot = self.0.lock().entry(node).or_default().clone();
        let held = deadline::lock(&slot);
        let mut held = held.ok_or_else(|| Error::new(format!("{what} did not come in time for another reader")))?;
        if let Some(value) = &*held {
            return Ok(value.clone());
        }
        Ok(held.insert(Arc::new(make()?)).clone())
    }
}
