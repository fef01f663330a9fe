//! Durability: data to disk first, then the record that refers to it.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use parking_lot::MutexGuard;

use super::bitmap::Run;
use super::file::{FileBody, Store, pages_records};
use super::journal::Lsn;
use super::namespace::{Body, Node};
use super::record::Record;
use super::{Ending, Scratch, open};
use crate::fs::Inode;

/// Above this many unsynced files, one sync of the whole disk is quicker than one of each.
const SYNC_ONE_BY_ONE_MAX: usize = 200;

/// What an fsync covers.
pub(super) struct Forced {
    size: u64,
    mtime: i64,
    runs: Vec<Run>,
    backed: bool,
}

/// A file whose fsync has begun. What would take pages away waits for its end, so that they all still count then.
pub(super) struct Begun<'a> {
    body: &'a FileBody,
    forced: Forced,
    _turn: MutexGuard<'a, ()>,
}

impl Scratch {
    /// Makes content, attributes and names of a file durable. Of an unchanged one there is nothing to do.
    pub(crate) fn sync(&self, inode: Inode) -> io::Result<()> {
        let (body, lsn) = match self.inner.namespace.read().nodes.get(&inode) {
            None => return Ok(()),
            Some(Node { body: Body::File(body), lsn, .. }) => (Some(Arc::clone(body)), *lsn),
            Some(node) => (None, node.lsn),
        };
        let content = match body {
            Some(body) => body.sync(&self.inner.store)?,
            None => 0,
        };
        self.inner.store.journal.sync(lsn.max(content))
    }

    /// Makes everything durable that was written before.
    pub(crate) fn sync_all(&self) -> io::Result<()> {
        // two at a time, and each would hold files that the other waits for
        let _turn = self.inner.syncing_all.lock();
        let store = &self.inner.store;
        let dirty: Vec<_> = self.inner.namespace.read().files().filter(|body| body.is_dirty()).cloned().collect();
        if dirty.len() > SYNC_ONE_BY_ONE_MAX {
            let begun: Vec<_> = dirty.iter().filter_map(|body| body.begin()).collect();
            let synced = sync_filesystem(&store.data);
            let failed = || synced.as_ref().err().map(|error| io::Error::from(error.kind()));
            for one in begun {
                one.end(store, failed().map_or(Ok(()), Err))?;
            }
            synced?;
        } else {
            for body in dirty {
                body.sync(store)?;
            }
        }
        store.journal.sync(store.journal.end())
    }

    /// Makes everything durable and leaves a short journal that says so.
    pub(crate) fn close(&self) -> io::Result<()> {
        use std::os::unix::fs::FileExt;
        self.inner.lock.write_all_at(open::CLOSING, 0)?;
        self.sync_all()?;
        self.inner.rewrite(Ending::Clean)?;
        self.inner.reap();
        Ok(())
    }
}

impl FileBody {
    /// Makes content and length durable; returns the LSN up to which the journal must be synced too.
    pub(crate) fn sync(&self, store: &Store) -> io::Result<Lsn> {
        if let Some(begun) = self.begin() {
            let synced = self.force_data(store, &begun.forced);
            begun.end(store, synced)?;
        }
        Ok(self.state.read().lsn)
    }

    /// With `syncer` held: makes content and length durable as soon as the journal is.
    pub(super) fn force(&self, store: &Store) -> io::Result<()> {
        match self.forced() {
            Some(forced) => {
                let synced = self.force_data(store, &forced);
                self.confirm(store, forced, synced)
            }
            None => Ok(()),
        }
    }

    /// Begins an fsync, if anything changed since the last one. One that is under way may be forcing what the caller
    /// wrote, so it ends first.
    pub(super) fn begin(&self) -> Option<Begun<'_>> {
        let turn = self.syncer.lock();
        self.forced().map(|forced| Begun { body: self, forced, _turn: turn })
    }

    /// Takes down what an fsync has to cover: only what is there now. What comes while the disk works has to wait for
    /// the next one.
    fn forced(&self) -> Option<Forced> {
        let mut state = self.state.write();
        if !state.dirty && !state.unseen {
            return None;
        }
        state.dirty = false;
        Some(Forced {
            size: state.size,
            mtime: state.mtime,
            runs: if state.own { Vec::new() } else { state.local.minus(&state.confirmed) },
            backed: state.own || state.backed,
        })
    }

    fn force_data(&self, store: &Store, forced: &Forced) -> io::Result<()> {
        if !forced.backed {
            return Ok(());
        }
        let backing = self.backing(store)?;
        if self.state.read().durable {
            return backing.sync_data();
        }
        backing.sync_all()?;
        File::open(&store.data)?.sync_all()
    }

    /// Records what was forced to disk, or that it still has to be.
    fn confirm(&self, store: &Store, forced: Forced, synced: io::Result<()>) -> io::Result<()> {
        let done = synced.and_then(|()| self.record_forced(store, forced));
        if done.is_err() {
            self.state.write().dirty = true;
        }
        done
    }

    fn record_forced(&self, store: &Store, forced: Forced) -> io::Result<()> {
        let Forced { size, mtime, runs, backed } = forced;
        let mut state = self.state.write();
        if backed && !state.durable {
            state.durable = true;
            let mut records = vec![Record::File(state.record(self.inode))];
            if !state.own {
                // that record names the length of the last fsync: a daemon that dies now has a longer file
                records.extend(pages_records(self.inode, false, state.size, state.mtime, &[]));
            }
            state.lsn = store.journal.append(&records).inspect_err(|_| state.durable = false)?;
        }
        if state.own || (runs.is_empty() && size == state.confirmed_size) {
            return Ok(());
        }
        for record in pages_records(self.inode, true, size, mtime, &runs) {
            state.lsn = store.journal.append(&[record])?;
        }
        runs.into_iter().for_each(|run| state.confirmed.insert(run));
        state.confirmed_size = size;
        Ok(())
    }

    /// Says that the disk holds everything, as after a sync of all of it when a scratch is opened.
    pub(super) fn confirm_all(&self) {
        let mut state = self.state.write();
        state.confirmed = state.local.clone();
        state.confirmed_size = state.size;
        state.durable = state.own || state.backed;
        state.dirty = false;
    }
}

impl Begun<'_> {
    /// Ends an fsync whose data was `synced`.
    fn end(self, store: &Store, synced: io::Result<()>) -> io::Result<()> {
        self.body.confirm(store, self.forced, synced)
    }
}

pub(super) fn sync_filesystem(directory: &Path) -> io::Result<()> {
    Ok(nix::unistd::syncfs(File::open(directory)?)?)
}
