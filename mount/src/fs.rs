//! The filesystem proper, without FUSE: a tree, and over it the scratch if there is one.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::{RwLock, RwLockReadGuard};

use crate::scratch::{New, Scratch};
use crate::tree::{Attributes, Entry, Kind, NodeId, Tree};

/// An inode number: a [`NodeId`] of the tree, or one the scratch gave out, from [`FIRST_SCRATCH_INODE`] on.
pub type Inode = u64;

/// Inodes of the scratch start here, so that no tree ever holds the same number.
pub const FIRST_SCRATCH_INODE: Inode = 1 << 62;

/// What `stat` shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attr {
    /// the inode's number
    pub inode: Inode,
    /// file, directory or link
    pub kind: Kind,
    /// permission bits, at most 0o7777
    pub mode: u32,
    /// owner
    pub uid: u32,
    /// group
    pub gid: u32,
    /// number of names; always 1 for a directory, which says "not counted"
    pub links: u32,
    /// length in bytes
    pub size: u64,
    /// time of the last access as far as anybody set it
    pub atime: SystemTime,
    /// time of the last change of content
    pub mtime: SystemTime,
    /// time of the last change of attributes
    pub ctime: SystemTime,
    /// nothing of this may stay in a cache
    pub volatile: bool,
}

/// A directory and a name in it.
pub type Place<'a> = (Inode, &'a OsStr);

/// Who asks for something to be created.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    /// user
    pub uid: u32,
    /// group
    pub gid: u32,
}

/// What chmod, chown, truncate and utimens change; `None` leaves as is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// permission bits
    pub mode: Option<u32>,
    /// owner
    pub uid: Option<u32>,
    /// group
    pub gid: Option<u32>,
    /// length in bytes
    pub size: Option<u64>,
    /// time of last access
    pub atime: Option<SystemTime>,
    /// time of last change
    pub mtime: Option<SystemTime>,
}

impl Change {
    fn only_times(&self) -> bool {
        *self == Self { atime: self.atime, mtime: self.mtime, ..Self::default() }
    }
}

/// How a file's content may be cached while it is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caching {
    /// the kernel keeps what it read and wrote
    Keep,
    /// every read comes to us
    Direct,
    /// the whole file is one backing file of the scratch
    Own,
}

/// An open file.
#[derive(Debug)]
pub struct OpenFile {
    pub(crate) inode: Inode,
    pub(crate) caching: Caching,
}

impl OpenFile {
    /// Which file it is.
    pub fn inode(&self) -> Inode {
        self.inode
    }

    /// How its content may be cached.
    pub fn caching(&self) -> Caching {
        self.caching
    }
}

/// Space and inodes of the disk that takes the writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Space {
    /// bytes per block
    pub block_size: u32,
    /// blocks in all
    pub blocks: u64,
    /// free blocks
    pub blocks_free: u64,
    /// free blocks for users other than root
    pub blocks_available: u64,
    /// inodes in all
    pub files: u64,
    /// free inodes
    pub files_free: u64,
}

/// A tree, and over it the scratch if there is one. Every error carries the errno for the program that asked;
/// one without an errno stands for EIO.
pub struct Fs {
    tree: Arc<dyn Tree>,
    scratch: Option<Scratch>,
    /// true: the scratch was made durable for the last time. Held for reading by every change.
    closed: RwLock<bool>,
}

/// The scratch while it is being changed: it is not closed meanwhile.
struct Changing<'a> {
    scratch: &'a Scratch,
    _open: RwLockReadGuard<'a, bool>,
}

impl std::ops::Deref for Changing<'_> {
    type Target = Scratch;

    fn deref(&self) -> &Scratch {
        self.scratch
    }
}

impl std::fmt::Debug for Fs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fs").field("writable", &self.is_writable()).finish_non_exhaustive()
    }
}

impl Fs {
    /// Serves `tree`; without a scratch every change is EROFS.
    pub fn new(tree: Arc<dyn Tree>, scratch: Option<Scratch>) -> Self {
        Self { tree, scratch, closed: RwLock::new(false) }
    }

    /// Whether changes are possible.
    pub fn is_writable(&self) -> bool {
        self.scratch.is_some()
    }

    /// Finds a name. `Ok(None)` only when it is known not to exist.
    pub fn lookup(&self, directory: Inode, name: &OsStr) -> io::Result<Option<Attr>> {
        match &self.scratch {
            Some(scratch) => match scratch.child(&*self.tree, directory, name)? {
                Some(inode) => {
                    let attr = self.attributes(inode)?;
                    scratch.found(directory, &attr);
                    Ok(Some(attr))
                }
                None => Ok(None),
            },
            None => match base_lookup(&*self.tree, directory, name)? {
                Some(inode) => Ok(Some(base_attr(&*self.tree, inode)?)),
                None => Ok(None),
            },
        }
    }

    /// What `stat` shows.
    pub fn attributes(&self, inode: Inode) -> io::Result<Attr> {
        match &self.scratch {
            Some(scratch) => scratch.attributes(&*self.tree, inode),
            None => base_attr(&*self.tree, inode),
        }
    }

    /// All names of a directory, without `.` and `..`.
    pub fn list(&self, directory: Inode) -> io::Result<Vec<Entry>> {
        match &self.scratch {
            Some(scratch) => scratch.list(&*self.tree, directory),
            None => base_list(&*self.tree, directory),
        }
    }

    /// The target of a symbolic link.
    pub fn read_link(&self, inode: Inode) -> io::Result<OsString> {
        if let Some(scratch) = &self.scratch
            && let Some(target) = scratch.read_link(inode)
        {
            return Ok(target);
        }
        self.tree.read_link(base(inode)?).map_err(tree_error)
    }

    /// Opens a file; fetches nothing, but what the tree must know to allow it.
    pub fn open(&self, inode: Inode, writing: bool) -> io::Result<OpenFile> {
        match &self.scratch {
            Some(_) => self.scratch()?.open_file(&*self.tree, inode),
            None if writing => Err(errno(libc::EROFS)),
            None => {
                let attributes = self.tree.attributes(base(inode)?).map_err(tree_error)?;
                self.tree.open(base(inode)?).map_err(tree_error)?;
                Ok(OpenFile { inode, caching: if attributes.volatile { Caching::Direct } else { Caching::Keep } })
            }
        }
    }

    /// Ends an open; of an unlinked file, the last one frees it.
    pub fn release(&self, file: &OpenFile) {
        // after the end there is nothing to free
        if let Ok(scratch) = self.scratch() {
            scratch.release(file);
        }
    }

    /// Fills `buf` from `offset`; short only at the end of the file.
    pub fn read(&self, file: &OpenFile, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        match &self.scratch {
            Some(scratch) => scratch.read(&*self.tree, file, offset, buf),
            None => self.tree.read_at(base(file.inode)?, offset, buf).map_err(tree_error),
        }
    }

    /// Creates a file and opens it.
    pub fn create(&self, place: Place<'_>, mode: u32, owner: Caller) -> io::Result<(Attr, OpenFile)> {
        let inode = self.make(place, New { kind: Kind::File, mode, owner, target: OsString::new() })?;
        let file = self.scratch()?.open_created(inode);
        Ok((self.attributes(inode)?, file))
    }

    /// Creates a file without opening it.
    pub fn make_file(&self, place: Place<'_>, mode: u32, owner: Caller) -> io::Result<Attr> {
        let inode = self.make(place, New { kind: Kind::File, mode, owner, target: OsString::new() })?;
        self.attributes(inode)
    }

    /// Creates a directory.
    pub fn make_directory(&self, place: Place<'_>, mode: u32, owner: Caller) -> io::Result<Attr> {
        let inode = self.make(place, New { kind: Kind::Directory, mode, owner, target: OsString::new() })?;
        self.attributes(inode)
    }

    /// Creates a symbolic link.
    pub fn make_link(&self, place: Place<'_>, target: &OsStr, owner: Caller) -> io::Result<Attr> {
        let new = New { kind: Kind::Symlink, mode: 0o777, owner, target: target.to_owned() };
        let inode = self.make(place, new)?;
        self.attributes(inode)
    }

    fn make(&self, place: Place<'_>, new: New) -> io::Result<Inode> {
        self.scratch()?.create(&*self.tree, place, new)
    }

    /// Gives a file another name.
    pub fn link(&self, inode: Inode, place: Place<'_>) -> io::Result<Attr> {
        self.scratch()?.link(&*self.tree, inode, place)?;
        self.attributes(inode)
    }

    /// Takes a file's name away; its content stays while it is open.
    pub fn unlink(&self, place: Place<'_>) -> io::Result<()> {
        self.scratch()?.unlink(&*self.tree, place)
    }

    /// Removes an empty directory.
    pub fn remove_directory(&self, place: Place<'_>) -> io::Result<()> {
        self.scratch()?.rmdir(&*self.tree, place)
    }

    /// Moves a name; without `replace`, EEXIST when the new one exists.
    pub fn rename(&self, from: Place<'_>, to: Place<'_>, replace: bool) -> io::Result<()> {
        self.scratch()?.rename(&*self.tree, from, to, replace)
    }

    /// chmod, chown, truncate, utimens.
    pub fn change(&self, inode: Inode, change: &Change) -> io::Result<Attr> {
        if let Some(attr) = self.scratch()?.gone(inode)
            && change.only_times()
        {
            return Ok(attr);
        }
        self.scratch()?.change(&*self.tree, inode, change)?;
        self.attributes(inode)
    }

    /// Writes all of `data`.
    pub fn write(&self, file: &OpenFile, offset: u64, data: &[u8]) -> io::Result<()> {
        self.scratch()?.write(&*self.tree, file, offset, data)
    }

    /// Takes space for a range; lengthens the file if need be, unless `keep_size`.
    pub fn allocate(&self, file: &OpenFile, offset: u64, length: u64, keep_size: bool) -> io::Result<()> {
        self.scratch()?.allocate(&*self.tree, file, offset, length, keep_size)
    }

    /// Makes a file or directory durable: content, attributes and names. Of an unchanged one there is nothing to do.
    pub fn sync(&self, inode: Inode) -> io::Result<()> {
        if self.is_writable() { self.scratch()?.sync(inode) } else { Ok(()) }
    }

    /// Makes everything durable that was written before.
    pub fn sync_all(&self) -> io::Result<()> {
        if self.is_writable() { self.scratch()?.sync_all() } else { Ok(()) }
    }

    /// The backing file of an own file, for the kernel to read and write by itself.
    pub(crate) fn lend(&self, file: &OpenFile) -> io::Result<Option<Arc<File>>> {
        if self.is_writable() { self.scratch()?.lend(file) } else { Ok(None) }
    }

    /// Space for writes; none without a scratch.
    pub fn space(&self) -> io::Result<Space> {
        self.scratch.as_ref().map_or(Ok(Space { block_size: 4096, ..Space::default() }), Scratch::space)
    }

    /// The scratch for a change: EROFS if there is none, ENOTCONN once it is closed, as after the end of the daemon.
    fn scratch(&self) -> io::Result<Changing<'_>> {
        let scratch = self.scratch.as_ref().ok_or_else(|| errno(libc::EROFS))?;
        let open = self.closed.read();
        if *open { Err(errno(libc::ENOTCONN)) } else { Ok(Changing { scratch, _open: open }) }
    }

    #[cfg(test)]
    pub(crate) fn scratch_for_tests(&self) -> &Scratch {
        self.scratch.as_ref().expect("a scratch")
    }

    /// Waits for the changes under way, refuses every later one, and makes everything durable.
    pub fn close(&self) -> io::Result<()> {
        let Some(scratch) = &self.scratch else { return Ok(()) };
        *self.closed.write() = true;
        scratch.close()
    }

    /// Tells the tree what will be read soon, if it is the tree that will be asked.
    pub fn prefetch(&self, inode: Inode, offset: u64, len: u64) {
        if inode < FIRST_SCRATCH_INODE {
            self.tree.prefetch(NodeId(inode), offset, len);
        }
    }
}

/// The node behind an inode that must be the tree's.
pub(crate) fn base(inode: Inode) -> io::Result<NodeId> {
    if inode < FIRST_SCRATCH_INODE { Ok(NodeId(inode)) } else { Err(errno(libc::ESTALE)) }
}

pub(crate) fn base_lookup(tree: &dyn Tree, directory: Inode, name: &OsStr) -> io::Result<Option<Inode>> {
    match tree.lookup(base(directory)?, name).map_err(tree_error)? {
        Some(node) if node.0 < FIRST_SCRATCH_INODE => Ok(Some(node.0)),
        Some(node) => Err(io::Error::other(format!("node {} of the tree is out of range", node.0))),
        None => Ok(None),
    }
}

pub(crate) fn base_attr(tree: &dyn Tree, inode: Inode) -> io::Result<Attr> {
    let Attributes { kind, mode, uid, gid, size, mtime, volatile } =
        tree.attributes(base(inode)?).map_err(tree_error)?;
    Ok(Attr { inode, kind, mode: mode & 0o7777, uid, gid, links: 1, size, atime: mtime, mtime, ctime: mtime, volatile })
}

/// Entries per call of [`Tree::list`].
const LIST_STEP: usize = 1000;

pub(crate) fn base_list(tree: &dyn Tree, directory: Inode) -> io::Result<Vec<Entry>> {
    let directory = base(directory)?;
    let mut all = Vec::new();
    loop {
        let some = tree.list(directory, all.len(), LIST_STEP).map_err(tree_error)?;
        let last = some.len() < LIST_STEP;
        all.extend(some);
        if last {
            return Ok(all);
        }
    }
}

/// A tree that fails must never look like a file that is not there: PostgreSQL takes an absent segment for an
/// empty one. ENOENT from inside a tree (say, of its own cache files) is therefore EIO.
pub(crate) fn tree_error(error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(libc::ENOENT) | None => errno(libc::EIO),
        Some(_) => error,
    }
}

pub(crate) fn errno(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code)
}
