//! The scratch: what was changed of a tree, kept in a directory of a local disk.
//!
//! ```text
//! lock                      held by the daemon that serves it
//! journal                   names, attributes, and which pages of which file are here
//! data/<inode>-<generation> a sparse file with the pages of one file at their own offsets
//! ```
//!
//! A file born here is all its backing file: its content and length are what that file says. Any other changed file
//! is a mixture: pages of the backing file over those of the tree, and the journal says which.
//!
//! The rules that make it survive a crash:
//! 1. data is forced to disk before the record that refers to it is;
//! 2. before a backing file loses bytes that a durable record refers to, the journal says so durably;
//! 3. a backing file is deleted after the journal durably stopped referring to it;
//! 4. records of pages nobody fsynced count only until the machine is restarted: a daemon that was killed left them
//!    in the kernel's cache, a power loss may have taken them.

mod bitmap;
mod changes;
mod content;
mod file;
mod journal;
mod namespace;
mod open;
mod record;
mod sync;
#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests;

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parking_lot::{Condvar, Mutex, RwLock};

use crate::error::Result;
use crate::fs::{Attr, Caching, FIRST_SCRATCH_INODE, Inode, OpenFile, Space, base_attr, base_list, base_lookup, errno};
use crate::tree::{Entry, Kind, NodeId, Tree};
pub(crate) use changes::New;
use file::{FileBody, Store};
use namespace::{Body, Known, Namespace, Node};
pub use open::boot_id;
use record::Record;

/// The copy-on-write layer of one mount. Changes nobody fsynced become durable within about a second.
pub struct Scratch {
    inner: Arc<Inner>,
    tidier: Option<JoinHandle<()>>,
}

struct Inner {
    namespace: RwLock<Namespace>,
    /// One change of names at a time, from looking at the tree to recording the change. Taken before `namespace`,
    /// which is never held while the tree is asked: the tree may be slow.
    changing: Mutex<()>,
    store: Store,
    /// one sync of everything at a time
    syncing_all: Mutex<()>,
    stop: Mutex<bool>,
    wake: Condvar,
    /// until this is closed, nobody else opens this scratch
    lock: File,
}

/// What a rewritten journal says about what follows.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ending {
    /// a daemon goes on with it
    Open,
    /// all is on disk, and nothing comes after
    Clean,
}

/// How often the tidier looks.
const TIDY_INTERVAL: Duration = Duration::from_secs(1);
/// A journal longer than this, and twice as long as when it was last rewritten, is rewritten.
const JOURNAL_MAX: u64 = 32 << 20;

impl Scratch {
    /// Opens the scratch in `directory`, or begins one if it is empty or missing. `base_identity` names what it lies
    /// over; a scratch begun over another base is refused, and so is one in use. `boot` names this start of the machine
    /// ([`boot_id`]): what was written before another one counts only as far as it was made durable.
    pub fn open(directory: &Path, base_identity: &str, boot: &str) -> Result<Self> {
        open::open(directory, base_identity, boot)
    }

    /// Finds a name.
    pub(crate) fn child(&self, tree: &dyn Tree, directory: Inode, name: &OsStr) -> io::Result<Option<Inode>> {
        let known = self.inner.namespace.read().known(directory, name);
        match known {
            Known::Here(inode) => Ok(Some(inode)),
            Known::Hidden | Known::Absent => Ok(None),
            Known::AskTree => base_lookup(tree, directory, name),
        }
    }

    /// Remembers where a directory was found, so that a rename can tell its ancestors.
    pub(crate) fn found(&self, directory: Inode, attr: &Attr) {
        if attr.kind == Kind::Directory && self.inner.namespace.read().parents.get(&attr.inode) != Some(&directory) {
            self.inner.namespace.write().parents.insert(attr.inode, directory);
        }
    }

    pub(crate) fn attributes(&self, tree: &dyn Tree, inode: Inode) -> io::Result<Attr> {
        let namespace = self.inner.namespace.read();
        let Some(node) = namespace.nodes.get(&inode) else {
            drop(namespace);
            return base_attr(tree, inode);
        };
        let record = &node.record;
        let mut attr = Attr {
            inode,
            kind: record.kind,
            mode: record.mode,
            uid: record.uid,
            gid: record.gid,
            links: if record.kind == Kind::Directory { 1 } else { record.links },
            size: record.target.len() as u64,
            atime: to_time(record.atime),
            mtime: to_time(record.mtime),
            ctime: to_time(record.ctime),
            volatile: false,
        };
        match &node.body {
            Body::File(body) => {
                let body = Arc::clone(body);
                drop(namespace);
                let (size, atime, mtime, ctime) = body.stat(&self.inner.store).map_err(|error| {
                    let gone = self.body(inode).is_none();
                    // deleted since: the kernel then looks the name up again
                    if gone { errno(libc::ESTALE) } else { content::not_absent(error) }
                })?;
                attr.size = size;
                attr.mtime = to_time(mtime);
                attr.ctime = attr.ctime.max(to_time(ctime));
                attr.atime = atime.map_or(attr.atime, to_time);
            }
            Body::Directory(_) => attr.size = 4096,
            Body::Symlink if inode < FIRST_SCRATCH_INODE => {
                drop(namespace);
                attr.size = base_attr(tree, inode)?.size;
            }
            Body::Symlink => {}
        }
        Ok(attr)
    }

    /// What is left of a file born here that has lost its last name and its last opener. The kernel may still know it, and
    /// have the time of its last change to tell, as where it collects writes.
    pub(crate) fn gone(&self, inode: Inode) -> Option<Attr> {
        let namespace = self.inner.namespace.read();
        let gone =
            (FIRST_SCRATCH_INODE..namespace.next_inode).contains(&inode) && !namespace.nodes.contains_key(&inode);
        let (time, kind) = (UNIX_EPOCH, Kind::File);
        gone.then_some(Attr {
            inode,
            kind,
            mode: 0,
            uid: 0,
            gid: 0,
            links: 0,
            size: 0,
            atime: time,
            mtime: time,
            ctime: time,
            volatile: false,
        })
    }

    pub(crate) fn list(&self, tree: &dyn Tree, directory: Inode) -> io::Result<Vec<Entry>> {
        let mut entries = if directory < FIRST_SCRATCH_INODE { base_list(tree, directory)? } else { Vec::new() };
        let namespace = self.inner.namespace.read();
        let Some(Node { body: Body::Directory(names), .. }) = namespace.nodes.get(&directory) else {
            return if directory < FIRST_SCRATCH_INODE { Ok(entries) } else { Err(errno(libc::ENOENT)) };
        };
        entries.retain(|entry| !names.contains_key(&entry.name));
        let mut unknown = Vec::new();
        for (name, inode) in names.iter().filter_map(|(name, inode)| Some((name, (*inode)?))) {
            let kind = namespace.nodes.get(&inode).map(|node| node.record.kind);
            unknown.extend(kind.is_none().then_some(entries.len()));
            entries.push(Entry { name: name.clone(), node: NodeId(inode), kind: kind.unwrap_or(Kind::File) });
        }
        drop(namespace);
        // nodes of the tree under another name that nothing else changed
        for index in unknown {
            entries[index].kind = base_attr(tree, entries[index].node.0)?.kind;
        }
        Ok(entries)
    }

    /// The target of a link born here.
    pub(crate) fn read_link(&self, inode: Inode) -> Option<OsString> {
        if inode < FIRST_SCRATCH_INODE {
            return None;
        }
        self.inner.namespace.read().nodes.get(&inode).map(|node| node.record.target.clone())
    }

    pub(crate) fn open_file(&self, tree: &dyn Tree, inode: Inode) -> io::Result<OpenFile> {
        // asked before the lock is taken: the tree may be slow
        let base = if inode < FIRST_SCRATCH_INODE { Some(base_attr(tree, inode)?) } else { None };
        if base.is_some() && self.body(inode).is_none() {
            tree.open(crate::fs::base(inode)?).map_err(crate::fs::tree_error)?;
        }
        let mut namespace = self.inner.namespace.write();
        let caching = match (namespace.nodes.get(&inode), base) {
            (Some(Node { body: Body::File(body), .. }), _) if body.is_own() => Caching::Own,
            (Some(Node { body: Body::File(_), .. }), _) => Caching::Keep,
            (Some(_), _) => return Err(errno(libc::EISDIR)),
            (None, Some(attr)) if attr.kind != Kind::File => return Err(errno(libc::EISDIR)),
            (None, Some(attr)) if attr.volatile => Caching::Direct,
            (None, Some(_)) => Caching::Keep,
            (None, None) => return Err(errno(libc::ENOENT)),
        };
        *namespace.opens.entry(inode).or_insert(0) += 1;
        Ok(OpenFile { inode, caching })
    }

    pub(crate) fn release(&self, file: &OpenFile) {
        let mut namespace = self.inner.namespace.write();
        match namespace.opens.get_mut(&file.inode) {
            Some(count) if *count > 1 => return *count -= 1,
            _ => namespace.opens.remove(&file.inode),
        };
        let Some(node) = namespace.nodes.get(&file.inode) else { return };
        if node.record.links == 0 {
            return self.inner.forget(&mut namespace, file.inode);
        }
        if let Body::File(body) = &node.body {
            body.close();
        }
    }

    /// The file's content in the scratch, if it has any.
    fn body(&self, inode: Inode) -> Option<Arc<FileBody>> {
        self.inner.namespace.read().file(inode).cloned()
    }

    pub(crate) fn read(&self, tree: &dyn Tree, file: &OpenFile, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        match self.body(file.inode) {
            Some(body) => body.read(tree, &self.inner.store, offset, buf),
            None => tree.read_at(crate::fs::base(file.inode)?, offset, buf).map_err(crate::fs::tree_error),
        }
    }

    /// The backing file of an own file, for the kernel to use by itself.
    pub(crate) fn lend(&self, file: &OpenFile) -> io::Result<Option<Arc<File>>> {
        match self.body(file.inode) {
            Some(body) => body.lend(&self.inner.store),
            None => Ok(None),
        }
    }

    /// Space of the disk under the scratch.
    pub(crate) fn space(&self) -> io::Result<Space> {
        let found = nix::sys::statvfs::statvfs(&self.inner.store.data)?;
        Ok(Space {
            block_size: u32::try_from(found.fragment_size()).unwrap_or(4096),
            blocks: found.blocks(),
            blocks_free: found.blocks_free(),
            blocks_available: found.blocks_available(),
            files: found.files(),
            files_free: found.files_free(),
        })
    }
}

impl Inner {
    /// Writes the journal anew, as short as the state allows, while nothing changes.
    fn rewrite(&self, ending: Ending) -> io::Result<()> {
        let namespace = self.namespace.read();
        let frozen: HashMap<_, _> = namespace.files().map(|body| (Arc::as_ptr(body), body.freeze())).collect();
        let mut records = namespace.records(|body, out| {
            if let Some(state) = frozen.get(&std::ptr::from_ref(body)) {
                body.records(state, out);
            }
        });
        if ending == Ending::Open {
            records.insert(0, Record::Boot { id: self.store.boot.clone() });
        }
        self.store.journal.rewrite(&records)
    }

    /// Deletes backing files that the durable journal does not refer to.
    fn reap(&self) {
        let durable = self.store.journal.durable();
        let doomed = std::mem::take(&mut *self.store.doomed.lock());
        let (now, later): (Vec<_>, Vec<_>) = doomed.into_iter().partition(|(lsn, _)| *lsn <= durable);
        self.store.doomed.lock().extend(later);
        for (_, path) in now {
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!(%error, path = %path.display(), "cannot delete a file of the scratch");
                }
                _ => {}
            }
        }
    }

    /// Runs until the scratch is dropped: what nobody fsyncs becomes durable anyway, deleted files give their space
    /// back, and the journal stays short.
    fn tidy(&self) {
        let mut shortest = self.store.journal.len();
        let mut marked = 0;
        loop {
            let mut stop = self.stop.lock();
            if !*stop {
                self.wake.wait_for(&mut stop, TIDY_INTERVAL);
            }
            if *stop {
                return;
            }
            drop(stop);
            let journal = &self.store.journal;
            let done = journal.sync(journal.end()).and_then(|()| {
                self.reap();
                if journal.len() > JOURNAL_MAX.max(2 * shortest) {
                    self.rewrite(Ending::Open)?;
                    shortest = journal.len();
                }
                // so that damage to what is durable now is told from a torn tail
                if journal.end() != marked {
                    marked = journal.append(&[Record::Mark])?;
                }
                Ok(())
            });
            if let Err(error) = done {
                tracing::warn!(%error, "cannot write the scratch's journal");
            }
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        *self.inner.stop.lock() = true;
        self.inner.wake.notify_all();
        if let Some(tidier) = self.tidier.take()
            && tidier.join().is_err()
        {
            tracing::error!("the scratch's tidier panicked");
        }
    }
}

fn now() -> i64 {
    to_nanos(SystemTime::now())
}

fn to_nanos(time: SystemTime) -> i64 {
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => i64::try_from(after.as_nanos()).unwrap_or(i64::MAX),
        Err(before) => i64::try_from(before.duration().as_nanos()).map_or(i64::MIN, |nanos| -nanos),
    }
}

fn to_time(nanos: i64) -> SystemTime {
    let distance = Duration::from_nanos(nanos.unsigned_abs());
    if nanos < 0 { UNIX_EPOCH - distance } else { UNIX_EPOCH + distance }
}
