//! Entries of a manifest that come in any order, put into path order. What waits is held as the manifest will hold it: in
//! compressed blocks, each run of them sorted; at the end the runs are merged.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, VecDeque};

use crate::error::{Context, Result};
use crate::format::CHUNK;
use crate::format::manifest::{BlockWriter, Entry, ManifestReader, path_cmp};

/// Entries sorted at once, some 300 bytes each.
const RUN_ENTRIES: usize = 16 * 1024;

/// Takes entries in any order.
#[derive(Debug, Default)]
pub(super) struct Sorter {
    gathered: Vec<Entry>,
    runs: Vec<VecDeque<Vec<u8>>>,
}

/// A sorted run being read: its first entry, and what is behind it.
struct Run {
    first: Entry,
    /// of entries with the same path, the one of the later run counts
    number: usize,
    decoded: VecDeque<Entry>,
    blocks: VecDeque<Vec<u8>>,
}

impl Sorter {
    /// Adds an entry.
    pub(super) fn push(&mut self, entry: Entry) -> Result<()> {
        self.gathered.push(entry);
        match self.gathered.len() < RUN_ENTRIES {
            true => Ok(()),
            false => self.close_run(),
        }
    }

    /// Hands all entries to `each` in path order. Where a path came twice, which is a file that was replaced while its directory
    /// was read, the later entry counts.
    pub(super) fn finish(mut self, mut each: impl FnMut(&Entry) -> Result<()>) -> Result<()> {
        self.close_run()?;
        let runs = std::mem::take(&mut self.runs).into_iter().enumerate();
        let mut heap = runs
            .filter_map(|(number, blocks)| Run::open(number, blocks).transpose())
            .collect::<Result<BinaryHeap<_>>>()?;
        let mut last: Option<Entry> = None;
        while let Some(run) = heap.pop() {
            let (entry, rest) = run.next()?;
            heap.extend(rest);
            match last.replace(entry) {
                Some(before) if Some(&before.path) != last.as_ref().map(|entry| &entry.path) => each(&before)?,
                _ => {}
            }
        }
        last.iter().try_for_each(each)
    }

    fn close_run(&mut self) -> Result<()> {
        let mut entries = std::mem::take(&mut self.gathered);
        // stable: the later of two entries with one path stays behind the other
        entries.sort_by(|a, b| path_cmp(&a.path, &b.path));
        let later = entries.iter().skip(1).map(Some).chain([None]);
        let is_last = entries.iter().zip(later).map(|(entry, next)| next.is_none_or(|next| next.path != entry.path));
        let mut writer = BlockWriter::default();
        let kept = entries.iter().zip(is_last.collect::<Vec<_>>()).filter(|(_, is_last)| *is_last);
        let mut blocks: Vec<_> = kept.filter_map(|(entry, _)| writer.push(entry)).collect();
        blocks.extend(writer.finish());
        let compress = |block: &Vec<u8>| zstd::bulk::compress(block, 1).context(|| "cannot compress".into());
        self.runs.push(blocks.iter().map(compress).collect::<Result<_>>()?);
        Ok(())
    }
}

impl Run {
    fn open(number: usize, mut blocks: VecDeque<Vec<u8>>) -> Result<Option<Self>> {
        let mut decoded = VecDeque::new();
        let first = next(&mut decoded, &mut blocks)?;
        Ok(first.map(|first| Self { first, number, decoded, blocks }))
    }

    /// Its first entry, and the run without it, unless it is empty then.
    fn next(mut self) -> Result<(Entry, Option<Self>)> {
        Ok(match next(&mut self.decoded, &mut self.blocks)? {
            Some(second) => (std::mem::replace(&mut self.first, second), Some(self)),
            None => (self.first, None),
        })
    }
}

fn next(decoded: &mut VecDeque<Entry>, blocks: &mut VecDeque<Vec<u8>>) -> Result<Option<Entry>> {
    if decoded.is_empty()
        && let Some(block) = blocks.pop_front()
    {
        let plain = zstd::bulk::decompress(&block, CHUNK).context(|| "cannot decompress".into())?;
        ManifestReader::new("entries").chunk(&plain, |entry| decoded.push_back(entry))?;
    }
    Ok(decoded.pop_front())
}

/// The heap gives the greatest first: that is the run whose first entry comes first, and of two with one path the earlier run.
impl Ord for Run {
    fn cmp(&self, other: &Self) -> Ordering {
        path_cmp(&other.first.path, &self.first.path).then_with(|| other.number.cmp(&self.number))
    }
}

impl PartialOrd for Run {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Run {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Run {}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::format::manifest::Node;

    fn directory(number: usize, mtime: i64) -> Entry {
        Entry {
            path: format!("{}/{number:06}", number % 7).into(),
            mode: 0o700,
            mtime,
            identity: None,
            node: Node::Directory,
        }
    }

    #[test]
    fn any_order_becomes_path_order_and_the_later_of_two_counts() {
        let count = 3 * RUN_ENTRIES + 5;
        let mut sorter = Sorter::default();
        // 7919 is prime to the count: every number once
        for number in (0..count).map(|number| number * 7919 % count) {
            sorter.push(directory(number, 1)).unwrap();
        }
        [3, 3, 4].into_iter().for_each(|mtime| sorter.push(directory(77, mtime)).unwrap());
        let mut expected: Vec<_> =
            (0..count).map(|number| directory(number, if number == 77 { 4 } else { 1 })).collect();
        expected.sort_by(|a, b| path_cmp(&a.path, &b.path));
        let mut found = Vec::new();
        sorter
            .finish(|entry| {
                found.push(entry.clone());
                Ok(())
            })
            .unwrap();
        let differs = found.iter().zip(&expected).find(|(found, expected)| found != expected);
        assert_eq!((found.len(), differs), (expected.len(), None));
    }

    #[test]
    fn nothing_is_nothing() {
        Sorter::default().finish(|entry| panic!("{entry:?}")).unwrap();
    }
}
