//! Which pages of a file are in the scratch.

/// Bytes per page: the unit of copying. PostgreSQL's pages of 8 KiB are two of them.
pub(crate) const PAGE: u64 = 4096;

/// The page that holds this byte.
pub(crate) fn page_of(offset: u64) -> u64 {
    offset / PAGE
}

/// Pages needed for this many bytes.
pub(crate) fn pages_in(bytes: u64) -> u64 {
    bytes.div_ceil(PAGE)
}

/// Neighbouring pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) first: u64,
    pub(crate) count: u64,
}

/// A set of page numbers; grows as pages are touched, one bit each (32 KiB for a segment of 1 GiB).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Bitmap {
    words: Vec<u64>,
}

impl Bitmap {
    pub(crate) fn contains(&self, page: u64) -> bool {
        self.words.get((page / 64) as usize).is_some_and(|word| word & (1 << (page % 64)) != 0)
    }

    pub(crate) fn insert(&mut self, run: Run) {
        let end = run.first + run.count;
        if run.count > 0 && self.words.len() < end.div_ceil(64) as usize {
            self.words.resize(end.div_ceil(64) as usize, 0);
        }
        for page in run.first..end {
            self.words[(page / 64) as usize] |= 1 << (page % 64);
        }
    }

    /// Removes every page from `end` on.
    pub(crate) fn truncate(&mut self, end: u64) {
        self.words.truncate(end.div_ceil(64) as usize);
        if !end.is_multiple_of(64)
            && self.words.len() as u64 == end.div_ceil(64)
            && let Some(last) = self.words.last_mut()
        {
            *last &= (1 << (end % 64)) - 1;
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.words.iter().all(|&word| word == 0)
    }

    /// Pages of this set that are not in `other`, as runs in ascending order.
    pub(crate) fn minus(&self, other: &Self) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        for (index, &word) in self.words.iter().enumerate() {
            let mut rest = word & !other.words.get(index).copied().unwrap_or(0);
            while rest != 0 {
                let page = index as u64 * 64 + u64::from(rest.trailing_zeros());
                match runs.last_mut() {
                    Some(run) if run.first + run.count == page => run.count += 1,
                    _ => runs.push(Run { first: page, count: 1 }),
                }
                rest &= rest - 1;
            }
        }
        runs
    }

    /// How many of the pages from `first` on, at most `limit`, are all in the set or all outside like the first one.
    pub(crate) fn same_from(&self, first: u64, limit: u64) -> u64 {
        let inside = self.contains(first);
        (1..limit).find(|&step| self.contains(first + step) != inside).unwrap_or(limit)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn members(bitmap: &Bitmap) -> BTreeSet<u64> {
        bitmap.minus(&Bitmap::default()).iter().flat_map(|run| run.first..run.first + run.count).collect()
    }

    proptest! {
        #[test]
        fn behaves_like_a_set(steps in prop::collection::vec((0u64..300, 0u64..80, any::<bool>()), 0..40)) {
            let (mut bitmap, mut set) = (Bitmap::default(), BTreeSet::new());
            for (at, count, cut) in steps {
                if cut {
                    bitmap.truncate(at + 100);
                    set.retain(|&page| page < at + 100);
                } else {
                    bitmap.insert(Run { first: at, count });
                    set.extend(at..at + count);
                }
                prop_assert_eq!(members(&bitmap), set.clone());
                prop_assert_eq!(bitmap.is_empty(), set.is_empty());
                let same = bitmap.same_from(at, 50);
                prop_assert!((at..at + same).all(|page| set.contains(&page) == set.contains(&at)));
                prop_assert!(same == 50 || set.contains(&(at + same)) != set.contains(&at));
            }
        }

        #[test]
        fn minus_is_set_difference(a in prop::collection::btree_set(0u64..400, 0..90), b in prop::collection::btree_set(0u64..200, 0..90)) {
            let make = |set: &BTreeSet<u64>| {
                let mut bitmap = Bitmap::default();
                set.iter().for_each(|&first| bitmap.insert(Run { first, count: 1 }));
                bitmap
            };
            let difference: BTreeSet<u64> = a.difference(&b).copied().collect();
            let runs = make(&a).minus(&make(&b));
            prop_assert!(runs.windows(2).all(|pair| pair[0].first + pair[0].count < pair[1].first));
            let found: BTreeSet<u64> = runs.iter().flat_map(|run| run.first..run.first + run.count).collect();
            prop_assert_eq!(found, difference);
        }
    }
}
