//! What is known of one changed file's content, and the calls on its backing file.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use super::bitmap::{Bitmap, Run, pages_in};
use super::journal::Lsn;
use super::record::FileRecord;
use crate::fs::{Inode, errno};

/// See [`FileRecord`] for the words.
#[derive(Default)]
pub(crate) struct FileState {
    pub(super) generation: u32,
    pub(super) own: bool,
    /// the backing file's name is durable, and the journal says so
    pub(super) durable: bool,
    pub(super) size: u64,
    pub(super) base_size: u64,
    /// length and pages as of the last fsync
    pub(super) confirmed_size: u64,
    pub(super) confirmed: Bitmap,
    /// pages below `base_size` that are in the backing file
    pub(super) local: Bitmap,
    pub(super) mtime: i64,
    /// There is a backing file. Pages beyond `base_size` are in it although `local` does not show them.
    pub(super) backed: bool,
    pub(super) backing: Option<Arc<File>>,
    /// changed since the last fsync
    pub(super) dirty: bool,
    /// the kernel may write without telling us
    pub(super) unseen: bool,
    /// the last record about this content
    pub(super) lsn: Lsn,
}

impl FileState {
    pub(super) fn apply(&mut self, record: &FileRecord, lsn: Lsn) {
        if self.generation != record.generation || self.own != record.own {
            self.backing = None;
            self.backed = record.own;
        }
        self.generation = record.generation;
        self.own = record.own;
        self.durable = record.durable;
        self.size = record.size;
        self.confirmed_size = record.size;
        self.base_size = record.base_size;
        let pages = pages_in(record.base_size);
        self.local.truncate(pages);
        self.confirmed.truncate(pages);
        self.lsn = lsn;
    }

    pub(super) fn record(&self, inode: Inode) -> FileRecord {
        let Self { generation, own, durable, base_size, .. } = *self;
        let size = if own { 0 } else { self.confirmed_size.max(base_size) };
        FileRecord { inode, generation, own, durable, size, base_size }
    }

    /// The pages of `first..end` that are still the tree's, as runs.
    pub(super) fn missing(&self, first: u64, end: u64) -> Vec<Run> {
        let end = end.min(pages_in(self.base_size));
        let mut runs = Vec::new();
        let mut page = first;
        while page < end {
            let count = self.local.same_from(page, end - page);
            if !self.local.contains(page) {
                runs.push(Run { first: page, count });
            }
            page += count;
        }
        runs
    }
}

/// How every file of a scratch is opened: no link is followed, and what is made is ours alone, whatever the umask.
pub(super) fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.mode(0o600).custom_flags(libc::O_NOFOLLOW);
    options
}

pub(super) fn open_backing(path: &Path, create: bool) -> io::Result<File> {
    let opened = options().read(true).write(true).create(create).truncate(false).open(path);
    opened.map_err(not_absent)
}

/// A backing file that vanished must not look like a file that is not there.
pub(super) fn not_absent(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::NotFound { errno(libc::EIO) } else { error }
}

pub(super) fn read_full(file: &File, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    while done < buf.len() {
        match file.read_at(&mut buf[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

pub(super) fn reserve(file: &File, offset: u64, length: u64, keep_size: bool) -> io::Result<()> {
    use nix::fcntl::FallocateFlags;
    let flags = if keep_size { FallocateFlags::FALLOC_FL_KEEP_SIZE } else { FallocateFlags::empty() };
    let signed = |value: u64| i64::try_from(value).map_err(|_| errno(libc::EFBIG));
    Ok(nix::fcntl::fallocate(file, flags, signed(offset)?, signed(length)?)?)
}
