//! The adapter between the kernel's requests and [`Fs`]. It holds no rules of its own beyond what the kernel may cache.

mod convert;

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use fuser::{
    AccessFlags, BackingId, BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, InitFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate,
    ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, Request,
    TimeOrNow, WriteFlags,
};
use parking_lot::{Mutex, RwLock};

use self::convert::{absent, caller, file_attr, file_type, time, ttl};
use crate::fs::{Attr, Caching, Change, Fs, Inode, OpenFile, Space};
use crate::mount::Writes;
use crate::tree::{Entry, ROOT, serving};

/// Inodes are never reused, so every one is of the first generation.
const GENERATION: Generation = Generation(0);
/// One open of a file, as the kernel's handle names it.
struct FileSlot {
    file: OpenFile,
    /// where a sequential reader would go on
    next_offset: AtomicU64,
}

/// One open of a directory: the names as they were when its reading began.
#[derive(Default)]
struct DirectorySlot {
    names: Mutex<Arc<Vec<Entry>>>,
}

/// The opens of one file. The kernel demands that all of them at one time go the same way.
struct Opens {
    count: u32,
    /// the kernel reads and writes this file by itself
    passthrough: Option<Arc<BackingId>>,
}

/// The filesystem as fuser sees it.
pub(crate) struct Server {
    fs: Arc<Fs>,
    writes: Writes,
    /// own files may be handed to the kernel
    passthrough: AtomicBool,
    /// some were: the kernel's cache may be behind the backing files
    passed: AtomicBool,
    opens: Mutex<HashMap<Inode, Opens>>,
    files: RwLock<HashMap<u64, Arc<FileSlot>>>,
    directories: RwLock<HashMap<u64, Arc<DirectorySlot>>>,
    next_handle: AtomicU64,
}

/// Runs one request: a panic in it must not take the mount down with it.
fn guarded<T>(request: &'static str, work: impl FnOnce() -> io::Result<T>) -> Result<T, Errno> {
    match serving(|| catch_unwind(AssertUnwindSafe(work))) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => {
            if error.raw_os_error().is_none_or(|code| code == libc::EIO) {
                tracing::warn!(request, %error, "request failed");
            }
            Err(Errno::from(error))
        }
        Err(_) => {
            tracing::error!(request, "request panicked");
            Err(Errno::EIO)
        }
    }
}

impl Server {
    pub(crate) fn new(fs: Arc<Fs>, writes: Writes) -> Self {
        Self {
            writes,
            passthrough: AtomicBool::new(false),
            passed: AtomicBool::new(false),
            opens: Mutex::default(),
            fs,
            files: RwLock::default(),
            directories: RwLock::default(),
            next_handle: AtomicU64::new(1),
        }
    }

    fn handle(&self) -> u64 {
        self.next_handle.fetch_add(1, Ordering::Relaxed)
    }

    fn slot(&self, handle: FileHandle) -> io::Result<Arc<FileSlot>> {
        self.files.read().get(&handle.0).cloned().ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))
    }

    fn keep(&self, file: OpenFile) -> FileHandle {
        let handle = self.handle();
        self.files.write().insert(handle, Arc::new(FileSlot { file, next_offset: AtomicU64::new(0) }));
        FileHandle(handle)
    }

    /// Decides how an open file is read and written: as its other opens are, else by the kernel itself if the file is
    /// all in one backing file and the kernel takes it, else through us.
    fn way(&self, file: &OpenFile, register: impl FnOnce(&File) -> io::Result<BackingId>) -> Option<Arc<BackingId>> {
        let mut opens = self.opens.lock();
        if let Some(others) = opens.get_mut(&file.inode()) {
            others.count += 1;
            return others.passthrough.clone();
        }
        let wanted = file.caching() == Caching::Own && self.passthrough.load(Ordering::Relaxed);
        let registered = match wanted.then(|| self.fs.lend(file)) {
            Some(Ok(Some(backing))) => register(&backing).map(|id| Some(Arc::new(id))),
            Some(Err(error)) => Err(error),
            None | Some(Ok(None)) => Ok(None),
        };
        let passthrough = registered.unwrap_or_else(|error| {
            tracing::info!(%error, "no passthrough: all reads and writes come to the daemon");
            self.passthrough.store(false, Ordering::Relaxed);
            None
        });
        self.passed.fetch_or(passthrough.is_some(), Ordering::Relaxed);
        opens.insert(file.inode(), Opens { count: 1, passthrough: passthrough.clone() });
        passthrough
    }

    /// The one place that says what the kernel may cache of a file it reads through us.
    fn cache_flags(&self, caching: Caching) -> FopenFlags {
        match caching {
            Caching::Direct => FopenFlags::FOPEN_DIRECT_IO,
            Caching::Own if self.passed.load(Ordering::Relaxed) => FopenFlags::empty(),
            Caching::Keep | Caching::Own => FopenFlags::FOPEN_KEEP_CACHE,
        }
    }

    fn closed(&self, inode: Inode) {
        let mut opens = self.opens.lock();
        if let Some(open) = opens.get_mut(&inode) {
            open.count -= 1;
            if open.count == 0 {
                opens.remove(&inode);
            }
        }
    }

    /// How long names of a directory may be remembered.
    fn name_ttl(&self, directory: Inode) -> io::Result<Duration> {
        Ok(ttl(&self.fs.attributes(directory)?))
    }

    /// Names of a directory; the list is taken anew whenever reading (re)starts, as rewinddir demands.
    fn names(&self, inode: Inode, handle: FileHandle, offset: u64) -> io::Result<Arc<Vec<Entry>>> {
        let slot = self.directories.read().get(&handle.0).cloned();
        let slot = slot.ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))?;
        if offset == 0 {
            let names = Arc::new(self.fs.list(inode)?);
            *slot.names.lock() = Arc::clone(&names);
            return Ok(names);
        }
        let names = Arc::clone(&slot.names.lock());
        Ok(names)
    }

    fn read_into(&self, handle: FileHandle, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let slot = self.slot(handle)?;
        let count = self.fs.read(&slot.file, offset, buf)?;
        let end = offset + count as u64;
        let expected = slot.next_offset.swap(end, Ordering::Relaxed);
        if expected == offset && offset > 0 && count == buf.len() {
            self.fs.prefetch(slot.file.inode(), end, count as u64);
        }
        Ok(count)
    }
}

fn reply_entry(reply: ReplyEntry, result: Result<Attr, Errno>) {
    match result {
        Ok(attr) => reply.entry(&ttl(&attr), &file_attr(&attr), GENERATION),
        Err(errno) => reply.error(errno),
    }
}

fn reply_empty(reply: ReplyEmpty, result: Result<(), Errno>) {
    match result {
        Ok(()) => reply.ok(),
        Err(errno) => reply.error(errno),
    }
}

thread_local! {
    /// Replies are built here, so that a read costs no allocation.
    static BUFFER: std::cell::RefCell<Vec<u8>> = const { std::cell::RefCell::new(Vec::new()) };
}

impl Filesystem for Server {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        for flag in [
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_READDIRPLUS_AUTO,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_ASYNC_DIO,
            // nothing changes but through the kernel: a size learnt anew is no reason to drop its cached pages
            InitFlags::FUSE_EXPLICIT_INVAL_DATA,
        ] {
            // an old kernel goes without
            let _ = config.add_capabilities(flag);
        }
        let _ = config.set_max_background(64);
        match self.writes {
            _ if !self.fs.is_writable() => {}
            Writes::Through => {}
            // one level: backing files on a stacked filesystem are served through us
            Writes::Passthrough => {
                *self.passthrough.get_mut() = config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).is_ok()
                    && config.set_max_stack_depth(1).is_ok();
            }
            Writes::Back => {
                let _ = config.add_capabilities(InitFlags::FUSE_WRITEBACK_CACHE);
            }
        }
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found = guarded("lookup", || Ok((self.fs.lookup(parent.0, name)?, self.name_ttl(parent.0)?)));
        match found {
            Ok((Some(attr), name_ttl)) => {
                reply.entry_with_ttls(&ttl(&attr), &name_ttl.min(ttl(&attr)), &file_attr(&attr), GENERATION);
            }
            // with a scratch, the name may come to exist
            Ok((None, name_ttl)) if name_ttl.is_zero() || self.fs.is_writable() => reply.error(Errno::ENOENT),
            Ok((None, name_ttl)) => reply.entry(&name_ttl, &absent(), GENERATION),
            Err(errno) => reply.error(errno),
        }
    }

    fn getattr(&self, _request: &Request, inode: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        match guarded("getattr", || self.fs.attributes(inode.0)) {
            Ok(attr) => reply.attr(&ttl(&attr), &file_attr(&attr)),
            Err(errno) => reply.error(errno),
        }
    }

    fn setattr(
        &self,
        _request: &Request,
        inode: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _handle: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let change = Change { mode, uid, gid, size, atime: time(atime), mtime: time(mtime) };
        match guarded("setattr", || self.fs.change(inode.0, &change)) {
            Ok(attr) => reply.attr(&ttl(&attr), &file_attr(&attr)),
            Err(errno) => reply.error(errno),
        }
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        _rdev: u32,
        reply: ReplyEntry,
    ) {
        if mode & libc::S_IFMT != libc::S_IFREG {
            return reply.error(Errno::EPERM);
        }
        reply_entry(reply, guarded("mknod", || self.fs.make_file((parent.0, name), mode, caller(request))));
    }

    fn mkdir(&self, request: &Request, parent: INodeNo, name: &OsStr, mode: u32, _umask: u32, reply: ReplyEntry) {
        reply_entry(reply, guarded("mkdir", || self.fs.make_directory((parent.0, name), mode, caller(request))));
    }

    fn symlink(&self, request: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        let made = guarded("symlink", || self.fs.make_link((parent.0, name), target.as_os_str(), caller(request)));
        reply_entry(reply, made);
    }

    fn link(&self, _request: &Request, inode: INodeNo, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        reply_entry(reply, guarded("link", || self.fs.link(inode.0, (parent.0, name))));
    }

    fn unlink(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        reply_empty(reply, guarded("unlink", || self.fs.unlink((parent.0, name))));
    }

    fn rmdir(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        reply_empty(reply, guarded("rmdir", || self.fs.remove_directory((parent.0, name))));
    }

    fn rename(
        &self,
        _request: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        if !RenameFlags::RENAME_NOREPLACE.contains(flags) {
            return reply.error(Errno::EINVAL);
        }
        let result = guarded("rename", || self.fs.rename((parent.0, name), (new_parent.0, new_name), flags.is_empty()));
        reply_empty(reply, result);
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        match guarded("create", || self.fs.create((parent.0, name), mode, caller(request))) {
            Ok((attr, file)) => {
                let way = self.way(&file, |backing| reply.open_backing(backing));
                let flags = self.cache_flags(file.caching());
                let (handle, ttl, attr) = (self.keep(file), ttl(&attr), file_attr(&attr));
                match way {
                    Some(id) => {
                        reply.created_passthrough(&ttl, &attr, GENERATION, handle, FopenFlags::empty(), &id);
                    }
                    None => reply.created(&ttl, &attr, GENERATION, handle, flags),
                }
            }
            Err(errno) => reply.error(errno),
        }
    }

    fn write(
        &self,
        _request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match guarded("write", || self.fs.write(&self.slot(handle)?.file, offset, data)) {
            Ok(()) => reply.written(data.len() as u32),
            Err(errno) => reply.error(errno),
        }
    }

    /// Nothing happens at close; the kernel takes this for "never ask again".
    fn flush(&self, _request: &Request, _inode: INodeNo, _handle: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn fsync(&self, _request: &Request, inode: INodeNo, _handle: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        reply_empty(reply, guarded("fsync", || self.fs.sync(inode.0)));
    }

    fn fsyncdir(&self, _request: &Request, inode: INodeNo, _handle: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        reply_empty(reply, guarded("fsyncdir", || self.fs.sync(inode.0)));
    }

    fn fallocate(
        &self,
        _request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        if mode & !libc::FALLOC_FL_KEEP_SIZE != 0 {
            return reply.error(Errno::EOPNOTSUPP);
        }
        let keep_size = mode & libc::FALLOC_FL_KEEP_SIZE != 0;
        let result = guarded("fallocate", || self.fs.allocate(&self.slot(handle)?.file, offset, length, keep_size));
        reply_empty(reply, result);
    }

    fn statfs(&self, _request: &Request, _inode: INodeNo, reply: ReplyStatfs) {
        match guarded("statfs", || self.fs.space()) {
            Ok(space) => {
                let Space { block_size, blocks, blocks_free, blocks_available, files, files_free } = space;
                reply.statfs(blocks, blocks_free, blocks_available, files, files_free, block_size, 255, block_size);
            }
            Err(errno) => reply.error(errno),
        }
    }

    /// Where permissions matter the kernel checks them itself (default_permissions).
    fn access(&self, _request: &Request, _inode: INodeNo, _mask: AccessFlags, reply: ReplyEmpty) {
        reply.ok();
    }

    fn readlink(&self, _request: &Request, inode: INodeNo, reply: ReplyData) {
        match guarded("readlink", || self.fs.read_link(inode.0)) {
            Ok(target) => reply.data(target.as_bytes()),
            Err(errno) => reply.error(errno),
        }
    }

    fn open(&self, _request: &Request, inode: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let writing = flags.acc_mode() != OpenAccMode::O_RDONLY;
        match guarded("open", || self.fs.open(inode.0, writing)) {
            Ok(file) => {
                let way = self.way(&file, |backing| reply.open_backing(backing));
                let flags = self.cache_flags(file.caching());
                let handle = self.keep(file);
                match way {
                    Some(id) => reply.opened_passthrough(handle, FopenFlags::empty(), &id),
                    None => reply.opened(handle, flags),
                }
            }
            Err(errno) => reply.error(errno),
        }
    }

    fn read(
        &self,
        _request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        BUFFER.with_borrow_mut(|buffer| {
            let size = size as usize;
            if buffer.len() < size {
                buffer.resize(size, 0);
            }
            match guarded("read", || self.read_into(handle, offset, &mut buffer[..size])) {
                Ok(count) => reply.data(&buffer[..count]),
                Err(errno) => reply.error(errno),
            }
        });
    }

    fn release(
        &self,
        _request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        let slot = self.files.write().remove(&handle.0);
        let result = guarded("release", || {
            if let Some(slot) = slot {
                self.closed(slot.file.inode());
                self.fs.release(&slot.file);
            }
            Ok(())
        });
        reply_empty(reply, result);
    }

    /// The kernel never tells us of a syncfs. Who calls it must open something before: PostgreSQL, before crash recovery,
    /// and sync(1) open the directory itself, and not to list it. So that open makes everything durable.
    fn opendir(&self, _request: &Request, inode: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        if inode.0 == ROOT.0
            && flags.0 & libc::O_DIRECTORY == 0
            && let Err(errno) = guarded("syncfs", || self.fs.sync_all())
        {
            return reply.error(errno);
        }
        let handle = self.handle();
        self.directories.write().insert(handle, Arc::default());
        reply.opened(FileHandle(handle), FopenFlags::empty());
    }

    fn readdir(&self, _request: &Request, inode: INodeNo, handle: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let names = match guarded("readdir", || self.names(inode.0, handle, offset)) {
            Ok(names) => names,
            Err(errno) => return reply.error(errno),
        };
        for position in offset..names.len() as u64 + 2 {
            let full = match position {
                // the kernel knows the parent; programs do not look at the number here
                0 | 1 => reply.add(inode, position + 1, FileType::Directory, [".", ".."][position as usize]),
                _ => {
                    let entry = &names[position as usize - 2];
                    reply.add(INodeNo(entry.node.0), position + 1, file_type(entry.kind), &entry.name)
                }
            };
            if full {
                break;
            }
        }
        reply.ok();
    }

    fn readdirplus(
        &self,
        _request: &Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let listed = guarded("readdirplus", || Ok((self.names(inode.0, handle, offset)?, self.name_ttl(inode.0)?)));
        let (names, name_ttl) = match listed {
            Ok(listed) => listed,
            Err(errno) => return reply.error(errno),
        };
        for position in offset..names.len() as u64 + 2 {
            let full = match position {
                0 | 1 => {
                    let this = FileAttr { ino: inode, kind: FileType::Directory, ..absent() };
                    let name = [".", ".."][position as usize];
                    reply.add(inode, position + 1, name, &Duration::ZERO, &this, GENERATION)
                }
                _ => {
                    let entry = &names[position as usize - 2];
                    let attr = match guarded("readdirplus", || self.fs.attributes(entry.node.0)) {
                        Ok(attr) => attr,
                        // removed since the list was taken
                        Err(errno) if errno == Errno::ESTALE || errno == Errno::ENOENT => continue,
                        Err(errno) if position == offset => return reply.error(errno),
                        Err(_) => break,
                    };
                    let (inode, ttl) = (INodeNo(attr.inode), name_ttl.min(ttl(&attr)));
                    reply.add(inode, position + 1, &entry.name, &ttl, &file_attr(&attr), GENERATION)
                }
            };
            if full {
                break;
            }
        }
        reply.ok();
    }

    fn releasedir(
        &self,
        _request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.directories.write().remove(&handle.0);
        reply.ok();
    }
}
