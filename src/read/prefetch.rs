//! Reading ahead of sequential readers, with windows that grow.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Sender, bounded};
use lru::LruCache;
use parking_lot::Mutex;

use super::view::{NodeIndex, View};
use crate::store::deadline;

/// First and largest distance that is fetched ahead of a reader, in bytes of file.
const WINDOW_MIN: u64 = 1024 * 1024;
const WINDOW_MAX: u64 = 16 * 1024 * 1024;
/// One piece of prefetch work.
const PIECE: u64 = 4 * 1024 * 1024;
/// Files whose readers are watched.
const WATCHED: NonZeroUsize = NonZeroUsize::new(256).expect("not zero");

/// Watches the readers of views.
#[derive(Debug)]
pub struct Prefetcher {
    queue: Sender<(Arc<View>, NodeIndex, u64, u64)>,
    readers: Mutex<LruCache<(usize, NodeIndex), Reader>>,
}

/// A file among those of all views that are served: node numbers repeat from view to view. A view in the place of one that is
/// gone may inherit its readers' state, which costs at most a fetch ahead.
fn file(view: &Arc<View>, node: NodeIndex) -> (usize, NodeIndex) {
    (Arc::as_ptr(view).addr(), node)
}

#[derive(Clone, Copy, Debug, Default)]
struct Reader {
    /// how far the reader has come
    at: u64,
    window: u64,
    /// fetched or asked for up to here
    ahead: u64,
}

impl Prefetcher {
    /// Starts `threads` that fetch ahead; a piece that takes longer than `limit` is given up.
    pub fn start(threads: usize, limit: Duration) -> Self {
        let (queue, work) = bounded::<(Arc<View>, NodeIndex, u64, u64)>(64);
        for _ in 0..threads {
            let work = work.clone();
            std::thread::spawn(move || {
                while let Ok((view, node, offset, len)) = work.recv() {
                    // whoever really reads this will meet the error
                    _ = deadline::within(limit, || view.prefetch(node, offset, len));
                }
            });
        }
        Self { queue, readers: Mutex::new(LruCache::new(WATCHED)) }
    }

    /// A reader of a file of `size` bytes has come to `at` in order: fetches ahead of it, further each time.
    pub fn sequential(&self, view: &Arc<View>, node: NodeIndex, size: u64, at: u64) {
        let (from, to) = {
            let mut readers = self.readers.lock();
            let reader = readers.get_or_insert_mut(file(view, node), Reader::default);
            if at < reader.at || at > reader.ahead + WINDOW_MAX {
                *reader = Reader { at, window: 0, ahead: at };
            }
            reader.at = at;
            reader.window = (reader.window * 2).clamp(WINDOW_MIN, WINDOW_MAX);
            let (from, to) = (reader.ahead.max(at), (at + reader.window).min(size));
            if to < from + WINDOW_MIN && to < size {
                return;
            }
            reader.ahead = reader.ahead.max(to);
            (from, to)
        };
        self.ask(view, node, from, to);
    }

    /// Asks for all of a small file of `size` bytes, once.
    pub fn whole(&self, view: &Arc<View>, node: NodeIndex, size: u64) {
        let file = file(view, node);
        let before = self.readers.lock().push(file, Reader { at: 0, window: 0, ahead: size });
        if before.is_none_or(|(other, reader)| other != file || reader.ahead < size) {
            // whoever really reads it meets a full queue, too
            _ = self.queue.try_send((view.clone(), node, 0, size));
        }
    }

    /// Asks for a range.
    pub fn ask(&self, view: &Arc<View>, node: NodeIndex, mut from: u64, to: u64) {
        while from < to {
            let len = (to - from).min(PIECE);
            if self.queue.try_send((view.clone(), node, from, len)).is_err() {
                return;
            }
            from += len;
        }
    }
}
