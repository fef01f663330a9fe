//! What comes damaged out of a store is read again before it is called damage.
//!
//! Between a store and its reader are proxies, caches and networks. One wrong answer proves nothing of the object: only the same
//! wrong bytes twice in a row do. A verdict of damage makes `verify` note the pack and people remove backups.

use std::cell::RefCell;

use bytes::Bytes;

use crate::error::{Error, Result};
use crate::store::{self, ErrorKind, Store, StoreError};

/// How often an object is read that comes damaged, and differently each time.
const READS_MAX: usize = 5;

/// The reads of one try, kept for comparison with the next one's.
#[derive(Debug)]
pub struct Reads<'a> {
    store: &'a dyn Store,
    answers: RefCell<Vec<Bytes>>,
}

impl<'a> Reads<'a> {
    /// Reads of `store` that nobody compares.
    pub fn of(store: &'a dyn Store) -> Self {
        Reads { store, answers: RefCell::default() }
    }

    /// The whole object.
    pub fn get(&self, key: &str) -> store::Result<Bytes> {
        self.keep(self.store.get(key)?)
    }

    /// Exactly `len` bytes from `offset`.
    pub fn get_range(&self, key: &str, offset: u64, len: u64) -> store::Result<Bytes> {
        self.keep(self.store.get_range(key, offset, len)?)
    }

    fn keep(&self, bytes: Bytes) -> store::Result<Bytes> {
        self.answers.borrow_mut().push(bytes.clone());
        Ok(bytes)
    }
}

/// Reads and decodes, once if all is well.
///
/// # Errors
/// Damage, if the same bytes came twice in a row; a failure of the store, if other ones came each time.
pub fn checked<T>(store: &dyn Store, mut read: impl FnMut(&Reads<'_>) -> Result<T>) -> Result<T> {
    judged(store, &mut read, |outcome| outcome.as_ref().is_err_and(Error::is_damage))?
}

/// The same for a reader that finds several damages in one answer: `is_bad` says whether there are any.
pub fn judged<T>(store: &dyn Store, mut read: impl FnMut(&Reads<'_>) -> T, is_bad: impl Fn(&T) -> bool) -> Result<T> {
    let mut before: Option<Vec<Bytes>> = None;
    for _ in 0..READS_MAX {
        let reads = Reads::of(store);
        let outcome = read(&reads);
        let answers = reads.answers.into_inner();
        if !is_bad(&outcome) || before.as_ref() == Some(&answers) {
            return Ok(outcome);
        }
        tracing::debug!("what came is damaged; it is read again");
        before = Some(answers);
    }
    let why = format!("what was read is damaged, and different in each of {READS_MAX} tries");
    Err(StoreError::new(ErrorKind::Transient, "read", store.url(), "", why).into())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::format::FormatError;
    use crate::store::{Body, Effect, Fault, FaultPlan, MemoryStore};

    fn faulty() -> (Fault<MemoryStore>, Arc<FaultPlan>) {
        let store = Fault::new(MemoryStore::new());
        let plan = store.plan();
        store.put("a", Body::Bytes(vec![0; 8].into())).unwrap();
        (store, plan)
    }

    fn read(store: &dyn Store) -> Result<Bytes> {
        checked(store, |reads| {
            let bytes = reads.get("a")?;
            match bytes.iter().all(|byte| *byte == 0) && bytes.len() == 8 {
                true => Ok(bytes),
                false => Err(FormatError::new("a", 0, "not zero").into()),
            }
        })
    }

    #[test]
    fn one_bad_answer_is_no_damage() {
        let (store, plan) = faulty();
        for effect in [Effect::Flip(3), Effect::Cut(4), Effect::Cut(0)] {
            plan.next(1, effect);
            assert_eq!(read(&store).unwrap(), vec![0; 8], "{effect:?}");
        }
        let calls = plan.calls();
        read(&store).unwrap();
        assert_eq!(plan.calls() - calls, 1, "a sound object is read once");
    }

    #[test]
    fn other_bad_answers_are_no_damage_either() {
        let (store, plan) = faulty();
        plan.nth(1, Effect::Flip(1));
        plan.nth(2, Effect::Flip(2));
        assert_eq!(read(&store).unwrap(), vec![0; 8]);
        (1..=5).for_each(|n| plan.nth(n, Effect::Flip(n)));
        let error = read(&store).unwrap_err();
        assert!(!error.is_damage(), "{error}");
        assert_eq!(error.find::<StoreError>().unwrap().kind, ErrorKind::Transient);
    }

    #[test]
    fn the_same_bytes_twice_are_damage() {
        let (store, plan) = faulty();
        plan.nth(1, Effect::Cut(2));
        plan.from_nth(2, Effect::Flip(3));
        assert!(read(&store).unwrap_err().is_damage());
        assert_eq!(plan.calls(), 1 + 3);
    }
}
