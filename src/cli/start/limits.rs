//! Settings of which a server that replays needs at least what the server had that wrote the WAL.

use super::super::clones::Place;
use crate::error::{Error, Result};
use crate::files;
use crate::postgres::{CONTROL_FILE, ControlFile};

/// Names of the settings, in the order of [`Limits`].
const NAMES: [&str; 5] = [
    "max_connections",
    "max_worker_processes",
    "max_wal_senders",
    "max_prepared_transactions",
    "max_locks_per_transaction",
];

/// Values as `pg_control` has them: those at the checkpoint, then whatever replay met in the WAL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Limits([i32; 5]);

impl Limits {
    /// The values in the clone's `pg_control`.
    pub(super) fn of(place: &Place) -> Result<Self> {
        let path = place.mount().join(CONTROL_FILE);
        // the server may be writing it
        for _ in 0..10 {
            let bytes = files::read_regular(&path).map_err(|error| Error::io("read", &path, error))?;
            if let Ok(control) = ControlFile::parse(&bytes) {
                return Ok(Self::in_control(&control));
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        let bytes = files::read_regular(&path).map_err(|error| Error::io("read", &path, error))?;
        let control = ControlFile::parse(&bytes);
        let control = control.map_err(|error| Error::new("the clone's pg_control is damaged").source(error))?;
        Ok(Self::in_control(&control))
    }

    fn in_control(control: &ControlFile) -> Self {
        Self([
            control.max_connections,
            control.max_worker_processes,
            control.max_wal_senders,
            control.max_prepared_transactions,
            control.max_locks_per_transaction,
        ])
    }

    /// The settings, by name.
    pub(super) fn settings(&self) -> [(&'static str, i32); 5] {
        std::array::from_fn(|number| (NAMES[number], self.0[number]))
    }

    /// The larger value of each, if any of `other` is larger.
    pub(super) fn raised_by(&self, other: &Self) -> Option<Self> {
        let larger = Self(std::array::from_fn(|number| self.0[number].max(other.0[number])));
        (larger != *self).then_some(larger)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_larger_value_raises() {
        let limits = Limits([100, 8, 10, 0, 64]);
        assert_eq!(limits.raised_by(&Limits([100, 8, 10, 0, 64])), None);
        assert_eq!(limits.raised_by(&Limits([20, 8, 10, 0, 64])), None);
        assert_eq!(limits.raised_by(&Limits([20, 8, 10, 5, 64])), Some(Limits([100, 8, 10, 5, 64])));
        assert_eq!(limits.settings()[4], ("max_locks_per_transaction", 64));
    }
}
