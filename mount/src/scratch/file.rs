//! The content of one changed file: pages of the scratch over those of the tree.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Mutex, RwLock, RwLockReadGuard};

use super::bitmap::{Bitmap, PAGE, Run, page_of, pages_in};
use super::content::{FileState, open_backing, options, read_full, reserve};
use super::journal::{Journal, Lsn};
use super::record::{FileRecord, Record};
use super::{now, to_nanos};
use crate::fs::{Change, Inode, base, errno, tree_error};
use crate::tree::Tree;

/// Runs of pages per record: 64 KiB.
const RUNS_PER_RECORD: usize = 4096;

/// What a file needs from its scratch.
pub(crate) struct Store {
    pub(crate) data: PathBuf,
    pub(crate) journal: Journal,
    /// names this start of the machine
    pub(crate) boot: String,
    /// backing files to delete once the journal is durable up to the LSN that says nobody needs them
    pub(crate) doomed: Mutex<Vec<(Lsn, PathBuf)>>,
}

impl Store {
    pub(crate) fn backing_path(&self, inode: Inode, generation: u32) -> PathBuf {
        self.data.join(backing_name(inode, generation))
    }
}

pub(crate) fn backing_name(inode: Inode, generation: u32) -> String {
    format!("{inode:016x}-{generation}")
}

/// A file with content in the scratch.
///
/// Locks, in this order: `syncer`, `writer`, `state`, the journal's own.
pub(crate) struct FileBody {
    pub(super) inode: Inode,
    /// one fsync at a time, so that a second one waits for what the first is forcing to disk
    pub(super) syncer: Mutex<()>,
    /// one change of content at a time; the kernel does the same, except for writes through mmap
    writer: Mutex<()>,
    pub(super) state: RwLock<FileState>,
    /// A write failed, and may have left bytes in the backing file past the end. Changed by whoever holds `writer`.
    surplus: AtomicBool,
}

/// Where the next bytes of a file are.
enum Source {
    Base,
    Backing(Arc<File>),
    /// the file grew and has no backing file
    Zeros,
}

impl FileBody {
    pub(crate) fn new(inode: Inode) -> Self {
        let (syncer, writer) = (Mutex::new(()), Mutex::new(()));
        Self { inode, syncer, writer, state: RwLock::default(), surplus: AtomicBool::new(false) }
    }

    // ---- what the journal says ----

    pub(crate) fn apply(&self, record: &FileRecord, lsn: Lsn) {
        self.state.write().apply(record, lsn);
    }

    pub(crate) fn apply_pages(&self, durable: bool, size: u64, mtime: i64, runs: &[Run]) {
        let mut state = self.state.write();
        // a record of an fsync names the length from when it began: pages never make a file shorter
        state.size = state.size.max(size);
        state.mtime = mtime;
        runs.iter().for_each(|&run| state.local.insert(run));
        if durable {
            state.confirmed_size = state.confirmed_size.max(size);
            runs.iter().for_each(|&run| state.confirmed.insert(run));
        }
    }

    /// Keeps the content as it is while a journal is written anew.
    pub(crate) fn freeze(&self) -> RwLockReadGuard<'_, FileState> {
        self.state.read()
    }

    /// Records that rebuild this state.
    pub(crate) fn records(&self, state: &FileState, out: &mut Vec<Record>) {
        out.push(Record::File(state.record(self.inode)));
        if !state.own {
            let mut put = |durable, size, runs: Vec<Run>| {
                out.extend(pages_records(self.inode, durable, size, state.mtime, &runs));
            };
            put(true, state.confirmed_size, state.confirmed.minus(&Bitmap::default()));
            put(false, state.size, state.local.minus(&state.confirmed));
        }
    }

    /// The name of the backing file, and whether it must exist.
    pub(crate) fn backing_needed(&self) -> (String, bool) {
        let state = self.state.read();
        // a journal of an older program does not say it of a file with pages of the tree
        let needed = state.durable || !state.confirmed.is_empty();
        (backing_name(self.inode, state.generation), needed)
    }

    /// Looks at the backing file when a scratch is opened. What the state does not account for may not come back when
    /// the file grows again.
    pub(crate) fn trim(&self, data: &Path) -> io::Result<()> {
        let mut state = self.state.write();
        let path = data.join(backing_name(self.inode, state.generation));
        if state.own {
            return options().create(true).truncate(false).write(true).open(path).map(drop);
        }
        let file = match options().write(true).open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            file => file?,
        };
        state.backed = true;
        if file.metadata()?.len() > state.size { file.set_len(state.size) } else { Ok(()) }
    }

    // ---- attributes ----

    /// Length, and for an own file the times its backing file knows: (size, atime, mtime, ctime).
    pub(crate) fn stat(&self, store: &Store) -> io::Result<(u64, Option<i64>, i64, i64)> {
        let state = self.state.read();
        if !state.own {
            return Ok((state.size, None, state.mtime, state.mtime));
        }
        let metadata = match &state.backing {
            Some(file) => file.metadata()?,
            None => std::fs::symlink_metadata(store.backing_path(self.inode, state.generation))?,
        };
        let nanos = |seconds: i64, nanos: i64| seconds.saturating_mul(1_000_000_000).saturating_add(nanos);
        Ok((
            metadata.len(),
            Some(nanos(metadata.atime(), metadata.atime_nsec())),
            nanos(metadata.mtime(), metadata.mtime_nsec()),
            nanos(metadata.ctime(), metadata.ctime_nsec()),
        ))
    }

    pub(crate) fn set_times(&self, store: &Store, change: &Change) -> io::Result<()> {
        let _turn = self.writer.lock();
        if !self.state.read().own {
            if let Some(mtime) = change.mtime {
                let mut state = self.state.write();
                let (size, mtime) = (state.confirmed_size, to_nanos(mtime));
                let record = Record::Pages { inode: self.inode, durable: true, size, mtime, runs: Vec::new() };
                state.lsn = store.journal.append(&[record])?;
                state.mtime = mtime;
            }
            return Ok(());
        }
        let mut times = std::fs::FileTimes::new();
        if let Some(time) = change.atime {
            times = times.set_accessed(time);
        }
        if let Some(time) = change.mtime {
            times = times.set_modified(time);
        }
        self.state.write().dirty = true;
        self.backing(store)?.set_times(times)
    }

    pub(crate) fn is_dirty(&self) -> bool {
        let state = self.state.read();
        state.dirty || state.unseen
    }

    pub(crate) fn is_own(&self) -> bool {
        self.state.read().own
    }

    // ---- the backing file ----

    /// The empty backing file of a file that is being created.
    pub(crate) fn make_backing(store: &Store, inode: Inode) -> io::Result<()> {
        let path = store.backing_path(inode, 0);
        options().write(true).create(true).truncate(true).open(path).map(drop)
    }

    /// The backing file, opened (and, for a file that has pages of the tree, made) when first needed.
    pub(crate) fn backing(&self, store: &Store) -> io::Result<Arc<File>> {
        if let Some(file) = &self.state.read().backing {
            return Ok(Arc::clone(file));
        }
        let mut state = self.state.write();
        let file = Arc::new(open_backing(&store.backing_path(self.inode, state.generation), !state.own)?);
        state.backed = true;
        Ok(Arc::clone(state.backing.get_or_insert(file)))
    }

    /// The backing file of an own file, for the kernel to read and write by itself.
    pub(crate) fn lend(&self, store: &Store) -> io::Result<Option<Arc<File>>> {
        if !self.is_own() {
            return Ok(None);
        }
        let file = self.backing(store)?;
        self.state.write().unseen = true;
        Ok(Some(file))
    }

    /// After the last close: frees the descriptor. What the kernel wrote by itself until then counts as unsynced.
    pub(crate) fn close(&self) {
        let mut state = self.state.write();
        state.dirty |= std::mem::take(&mut state.unseen);
        state.backing = None;
    }

    /// Deletes the content of a file that has no name and no opener any more.
    pub(crate) fn doom(&self, store: &Store, lsn: Lsn) {
        let mut state = self.state.write();
        state.backing = None;
        let path = store.backing_path(self.inode, state.generation);
        if state.own && !state.durable {
            // nobody was promised this file: a journal that still names it after a power loss finds it empty
            let _ = std::fs::remove_file(path);
        } else {
            store.doomed.lock().push((lsn, path));
        }
    }

    // ---- content ----

    pub(crate) fn read(&self, tree: &dyn Tree, store: &Store, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        if self.is_own() {
            let backing = self.backing(store)?;
            return read_full(&backing, offset, buf);
        }
        let end = self.state.read().size.min(offset.saturating_add(buf.len() as u64));
        let mut at = offset;
        while at < end {
            let (source, length) = self.locate(store, at, end - at)?;
            let part = &mut buf[(at - offset) as usize..][..length as usize];
            match source {
                Source::Base => self.read_base(tree, at, part)?,
                // behind the backing file's end the file grew without being written
                Source::Backing(file) => {
                    let count = read_full(&file, at, part)?;
                    part[count..].fill(0);
                }
                Source::Zeros => part.fill(0),
            }
            at += length;
        }
        Ok(at.saturating_sub(offset) as usize)
    }

    /// Where the bytes from `at` on are, and how many of the next `limit` are there too.
    fn locate(&self, store: &Store, at: u64, limit: u64) -> io::Result<(Source, u64)> {
        let state = self.state.read();
        let base_end = pages_in(state.base_size) * PAGE;
        if !state.own && at < base_end {
            let page = page_of(at);
            let end = at + limit.min(base_end - at);
            let same = state.local.same_from(page, pages_in(end) - page);
            let length = end.min((page + same) * PAGE) - at;
            if !state.local.contains(page) {
                return Ok((Source::Base, length));
            }
            drop(state);
            return Ok((Source::Backing(self.backing(store)?), length));
        }
        // a read makes none: the disk may be full
        if !state.own && !state.backed {
            return Ok((Source::Zeros, limit));
        }
        drop(state);
        Ok((Source::Backing(self.backing(store)?), limit))
    }

    /// Bytes of the tree's file, and zeros behind the part of it that still counts.
    fn read_base(&self, tree: &dyn Tree, at: u64, part: &mut [u8]) -> io::Result<()> {
        let valid = self.state.read().base_size.saturating_sub(at).min(part.len() as u64) as usize;
        if valid > 0 && tree.read_at(base(self.inode)?, at, &mut part[..valid]).map_err(tree_error)? != valid {
            // the tree's file is shorter than it said: never fill in zeros for it
            return Err(errno(libc::EIO));
        }
        part[valid..].fill(0);
        Ok(())
    }

    pub(crate) fn write(&self, tree: &dyn Tree, store: &Store, offset: u64, data: &[u8]) -> io::Result<()> {
        let _turn = self.writer.lock();
        if data.is_empty() {
            return Ok(());
        }
        let end = offset.checked_add(data.len() as u64).ok_or_else(|| errno(libc::EFBIG))?;
        let backing = self.backing(store)?;
        if self.is_own() {
            self.state.write().dirty = true;
            return backing.write_all_at(data, offset);
        }
        self.cut_back(store)?;
        let written = self.fill_partial(tree, &backing, offset, end).and_then(|()| backing.write_all_at(data, offset));
        let noted = written.and_then(|()| self.note_written(store, offset, end));
        if noted.is_err() {
            self.surplus.store(true, Ordering::Relaxed);
            // tried again before the file grows
            _ = self.cut_back(store);
        }
        noted
    }

    /// Takes away what a failed write left past the end: where the file grows, it must be zeros.
    fn cut_back(&self, store: &Store) -> io::Result<()> {
        if !self.surplus.load(Ordering::Relaxed) {
            return Ok(());
        }
        let (own, size) = {
            let state = self.state.read();
            (state.own, state.size)
        };
        // one that became its own since has another backing file
        if !own {
            let backing = self.backing(store)?;
            if backing.metadata()?.len() > size {
                backing.set_len(size)?;
            }
        }
        self.surplus.store(false, Ordering::Relaxed);
        Ok(())
    }

    /// Puts into the journal and into the state what was written to the backing file.
    fn note_written(&self, store: &Store, offset: u64, end: u64) -> io::Result<()> {
        let mut state = self.state.write();
        let size = state.size.max(end);
        let runs = state.missing(page_of(offset), pages_in(end));
        let mtime = now();
        if !runs.is_empty() || size > state.size {
            let record = Record::Pages { inode: self.inode, durable: false, size, mtime, runs };
            store.journal.append(std::slice::from_ref(&record))?;
            let Record::Pages { runs, .. } = record else { return Ok(()) };
            runs.into_iter().for_each(|run| state.local.insert(run));
        }
        state.size = size;
        state.mtime = mtime;
        state.dirty = true;
        Ok(())
    }

    /// Copies the tree's bytes of pages that the write `offset..end` covers only in part.
    fn fill_partial(&self, tree: &dyn Tree, backing: &File, offset: u64, end: u64) -> io::Result<()> {
        let (first, last) = (page_of(offset), page_of(end - 1));
        for page in [Some(first), (last != first).then_some(last)].into_iter().flatten() {
            let whole = offset <= page * PAGE && end >= (page + 1) * PAGE;
            if whole || self.state.read().missing(page, page + 1).is_empty() {
                continue;
            }
            let mut content = [0; PAGE as usize];
            self.read_base(tree, page * PAGE, &mut content)?;
            backing.write_all_at(&content, page * PAGE)?;
        }
        Ok(())
    }

    pub(crate) fn truncate(&self, store: &Store, size: u64) -> io::Result<()> {
        let _sync = self.syncer.lock();
        let _turn = self.writer.lock();
        if self.is_own() {
            self.state.write().dirty = true;
            return self.backing(store)?.set_len(size);
        }
        let old = self.state.read().size;
        if size == 0 && old > 0 {
            return self.detach(store);
        }
        if size >= old {
            return self.extend(store, size);
        }
        self.shrink(store, size)
    }

    fn extend(&self, store: &Store, size: u64) -> io::Result<()> {
        self.cut_back(store)?;
        let mut state = self.state.write();
        let mtime = now();
        if size > state.size {
            store.journal.append(&[Record::Pages {
                inode: self.inode,
                durable: false,
                size,
                mtime,
                runs: Vec::new(),
            }])?;
        }
        state.size = size;
        state.mtime = mtime;
        state.dirty = true;
        Ok(())
    }

    /// Truncation to nothing: from here on the file is all its own, in a new backing file. The old one stays until
    /// the journal is durable, so that neither a crash nor a power loss ever finds one without the other.
    fn detach(&self, store: &Store) -> io::Result<()> {
        let old = self.state.read().record(self.inode);
        let new =
            FileRecord { generation: old.generation + 1, own: true, durable: false, size: 0, base_size: 0, ..old };
        let path = store.backing_path(self.inode, new.generation);
        drop(open_backing(&path, true)?);
        let mut state = self.state.write();
        let lsn = store.journal.append(&[Record::File(new)])?;
        state.apply(&new, lsn);
        state.dirty = true;
        drop(state);
        store.doomed.lock().push((lsn, store.backing_path(self.inode, old.generation)));
        Ok(())
    }

    /// What the backing file loses, the journal must have said durably before: else a power loss in between would
    /// leave holes where pages are expected.
    fn shrink(&self, store: &Store, size: u64) -> io::Result<()> {
        let backing = self.backing(store)?;
        // what stays must not be lost by counting as durable from here on
        self.force(store)?;
        let lsn = {
            let mut state = self.state.write();
            let record = FileRecord { size, base_size: state.base_size.min(size), ..state.record(self.inode) };
            let lsn = store.journal.append(&[Record::File(record)])?;
            state.apply(&record, lsn);
            state.mtime = now();
            state.dirty = true;
            lsn
        };
        if backing.metadata()?.len() > size {
            store.journal.sync(lsn)?;
            backing.set_len(size)?;
        }
        Ok(())
    }

    /// fallocate with mode 0 (`keep_size` false), which may lengthen the file, or FALLOC_FL_KEEP_SIZE.
    pub(crate) fn allocate(&self, store: &Store, offset: u64, length: u64, keep_size: bool) -> io::Result<()> {
        let _sync = self.syncer.lock();
        let _turn = self.writer.lock();
        let end = offset.checked_add(length).ok_or_else(|| errno(libc::EFBIG))?;
        let backing = self.backing(store)?;
        self.cut_back(store)?;
        let (own, base_size, size) = {
            let state = self.state.read();
            (state.own, pages_in(state.base_size) * PAGE, state.size)
        };
        // below the tree's length, space is taken when pages are written
        let from = if own { offset } else { offset.max(base_size) };
        if from < end {
            reserve(&backing, from, end - from, keep_size)?;
        }
        if own {
            self.state.write().dirty = true;
            return Ok(());
        }
        if keep_size { Ok(()) } else { self.extend(store, size.max(end)) }
    }
}

/// At least one record, and none too long for a frame.
pub(super) fn pages_records(inode: Inode, durable: bool, size: u64, mtime: i64, runs: &[Run]) -> Vec<Record> {
    let record = |some: &[Run]| Record::Pages { inode, durable, size, mtime, runs: some.to_vec() };
    if runs.is_empty() { vec![record(&[])] } else { runs.chunks(RUNS_PER_RECORD).map(record).collect() }
}
