//! The port: what a mount asks of the tree of files it serves.

use std::cell::Cell;
use std::ffi::{OsStr, OsString};
use std::io;
use std::time::{Instant, SystemTime};

/// One file, directory or link of a [`Tree`]. Never reused for another one while the tree lives,
/// and the same again when the same content is mounted again: it becomes the inode number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub u64);

/// The node every walk starts from.
pub const ROOT: NodeId = NodeId(1);

/// What a node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// a regular file
    File,
    /// a directory
    Directory,
    /// a symbolic link
    Symlink,
}

/// What `stat` shows of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// file, directory or link
    pub kind: Kind,
    /// permission bits, at most 0o7777
    pub mode: u32,
    /// owner
    pub uid: u32,
    /// group
    pub gid: u32,
    /// length in bytes (of a link: of its target)
    pub size: u64,
    /// time of the last change of content
    pub mtime: SystemTime,
    /// true: content or membership may change while mounted (a status file, a directory of backups), so nothing of
    /// it may stay in the kernel's caches for long; a volatile file is read with direct I/O
    pub volatile: bool,
}

/// One name in a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// the name, without slashes
    pub name: OsString,
    /// the node it names
    pub node: NodeId,
    /// what the node is
    pub kind: Kind,
}

/// A read-only tree of files. All calls may come from several threads at once.
///
/// Every error reaches the program that asked, as its errno (EIO where the error carries none).
/// `lookup` answers `Ok(None)` only for what the tree does not hold: a source that fails is an `Err`,
/// since PostgreSQL takes a relation segment that is "absent" for an empty one.
pub trait Tree: Send + Sync + 'static {
    /// Finds `name` in a directory; also finds names that `list` hides.
    fn lookup(&self, directory: NodeId, name: &OsStr) -> io::Result<Option<NodeId>>;
    /// What `stat` shows.
    fn attributes(&self, node: NodeId) -> io::Result<Attributes>;
    /// Up to `limit` names of a directory in the tree's own stable order, from position `from` (0 = first);
    /// without `.` and `..`. Fewer than `limit` means the end.
    fn list(&self, directory: NodeId, from: usize, limit: usize) -> io::Result<Vec<Entry>>;
    /// The target of a symbolic link.
    fn read_link(&self, node: NodeId) -> io::Result<OsString>;
    /// A program opens a file; an error refuses it. Files need no opening to be read.
    fn open(&self, _node: NodeId) -> io::Result<()> {
        Ok(())
    }
    /// Fills `buf` from `offset`; the count is short only at the end of the file. Every byte is verified.
    fn read_at(&self, node: NodeId, offset: u64, buf: &mut [u8]) -> io::Result<usize>;
    /// A hint that this range will be read soon; must return at once.
    fn prefetch(&self, _node: NodeId, _offset: u64, _len: u64) {}
}

thread_local! {
    static ASKED: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// When the request of the kernel came that this thread serves; none on other threads. One request may make several calls of a
/// tree, whose deadline is the request's.
pub fn asked_at() -> Option<Instant> {
    ASKED.get()
}

/// Serves one request of the kernel, which came now.
pub(crate) fn serving<T>(work: impl FnOnce() -> T) -> T {
    ASKED.set(Some(Instant::now()));
    let served = work();
    ASKED.set(None);
    served
}
