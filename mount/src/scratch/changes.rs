//! What programs do to a file system, turned into records.
//!
//! Every change first looks (at the scratch, then at the tree), then is appended to the journal as one frame, then is
//! applied in memory. When the journal cannot take it, nothing has happened.

use std::ffi::{OsStr, OsString};
use std::io;

use super::file::FileBody;
use super::namespace::Namespace;
use super::record::{FileRecord, NodeRecord, Record};
use super::{Scratch, now, to_nanos};
use crate::fs::{Caching, Caller, Change, FIRST_SCRATCH_INODE, Inode, OpenFile, Place, base_attr, base_lookup, errno};
use crate::tree::{Kind, Tree};

/// The longest name, as on ext4.
const NAME_MAX: usize = 255;

/// Something to be created.
pub(crate) struct New {
    pub(crate) kind: Kind,
    pub(crate) mode: u32,
    pub(crate) owner: Caller,
    /// of a symbolic link
    pub(crate) target: OsString,
}

impl Scratch {
    pub(crate) fn create(&self, tree: &dyn Tree, (parent, name): Place<'_>, new: New) -> io::Result<Inode> {
        let _turn = self.inner.changing.lock();
        check_name(name)?;
        if self.child(tree, parent, name)?.is_some() {
            return Err(errno(libc::EEXIST));
        }
        let mut records = Vec::new();
        let directory = self.touched(tree, parent, &mut records)?;
        let inode = self.inner.namespace.read().next_inode;
        let inherits_group = directory.mode & libc::S_ISGID != 0;
        let time = now();
        records.push(Record::Node(NodeRecord {
            inode,
            kind: new.kind,
            mode: new.mode & 0o7777 | if inherits_group && new.kind == Kind::Directory { libc::S_ISGID } else { 0 },
            uid: new.owner.uid,
            gid: if inherits_group { directory.gid } else { new.owner.gid },
            links: 1,
            atime: time,
            mtime: time,
            ctime: time,
            target: new.target,
        }));
        if new.kind == Kind::File {
            let own = FileRecord { inode, generation: 0, own: true, durable: false, size: 0, base_size: 0 };
            records.push(Record::File(own));
            FileBody::make_backing(&self.inner.store, inode)?;
        }
        records.push(Record::Name { directory: parent, name: name.to_owned(), inode: Some(inode) });
        // a backing file the journal never names is deleted when the scratch is opened
        self.commit(&records)?;
        if new.kind == Kind::Directory {
            self.inner.namespace.write().parents.insert(inode, parent);
        }
        Ok(inode)
    }

    /// Opens what [`Self::create`] made.
    pub(crate) fn open_created(&self, inode: Inode) -> OpenFile {
        *self.inner.namespace.write().opens.entry(inode).or_insert(0) += 1;
        OpenFile { inode, caching: Caching::Own }
    }

    pub(crate) fn link(&self, tree: &dyn Tree, inode: Inode, (parent, name): Place<'_>) -> io::Result<()> {
        let _turn = self.inner.changing.lock();
        check_name(name)?;
        if self.child(tree, parent, name)?.is_some() {
            return Err(errno(libc::EEXIST));
        }
        let mut records = Vec::new();
        let mut node = self.adopted(tree, inode, &mut records)?;
        match (node.kind, node.links) {
            (Kind::Directory, _) => return Err(errno(libc::EPERM)),
            (_, 0) => return Err(errno(libc::ENOENT)),
            _ => node.links += 1,
        }
        node.ctime = now();
        records.push(Record::Node(node));
        self.touched(tree, parent, &mut records)?;
        records.push(Record::Name { directory: parent, name: name.to_owned(), inode: Some(inode) });
        self.commit(&records)
    }

    pub(crate) fn unlink(&self, tree: &dyn Tree, (parent, name): Place<'_>) -> io::Result<()> {
        let _turn = self.inner.changing.lock();
        let inode = self.child(tree, parent, name)?.ok_or_else(|| errno(libc::ENOENT))?;
        if self.attributes(tree, inode)?.kind == Kind::Directory {
            return Err(errno(libc::EISDIR));
        }
        let mut records = Vec::new();
        self.touched(tree, parent, &mut records)?;
        self.unlinked(tree, inode, &mut records)?;
        records.push(self.without(tree, (parent, name))?);
        self.commit(&records)?;
        self.bury(inode)
    }

    pub(crate) fn rmdir(&self, tree: &dyn Tree, (parent, name): Place<'_>) -> io::Result<()> {
        let _turn = self.inner.changing.lock();
        let inode = self.child(tree, parent, name)?.ok_or_else(|| errno(libc::ENOENT))?;
        if self.attributes(tree, inode)?.kind != Kind::Directory {
            return Err(errno(libc::ENOTDIR));
        }
        if !self.list(tree, inode)?.is_empty() {
            return Err(errno(libc::ENOTEMPTY));
        }
        let mut records = Vec::new();
        self.touched(tree, parent, &mut records)?;
        records.push(self.without(tree, (parent, name))?);
        records.push(Record::Gone { inode });
        self.commit(&records)
    }

    pub(crate) fn rename(&self, tree: &dyn Tree, from: Place<'_>, to: Place<'_>, replace: bool) -> io::Result<()> {
        let _turn = self.inner.changing.lock();
        check_name(to.1)?;
        let inode = self.child(tree, from.0, from.1)?.ok_or_else(|| errno(libc::ENOENT))?;
        let kind = self.attributes(tree, inode)?.kind;
        let replaced = self.child(tree, to.0, to.1)?;
        if replaced.is_some() && !replace {
            return Err(errno(libc::EEXIST));
        }
        if replaced == Some(inode) {
            // two names of one file: POSIX wants both to stay
            return Ok(());
        }
        if kind == Kind::Directory && self.inner.namespace.read().is_inside(to.0, inode) {
            return Err(errno(libc::EINVAL));
        }
        let mut records = Vec::new();
        let mut node = self.adopted(tree, inode, &mut records)?;
        node.ctime = now();
        records.push(Record::Node(node));
        self.touched(tree, from.0, &mut records)?;
        self.touched(tree, to.0, &mut records)?;
        if let Some(replaced) = replaced {
            self.replaced(tree, kind, replaced, &mut records)?;
        }
        records.push(self.without(tree, from)?);
        records.push(Record::Name { directory: to.0, name: to.1.to_owned(), inode: Some(inode) });
        self.commit(&records)?;
        if kind == Kind::Directory {
            self.inner.namespace.write().parents.insert(inode, to.0);
        }
        replaced.map_or(Ok(()), |replaced| self.bury(replaced))
    }

    /// What becomes of the target of a rename.
    fn replaced(&self, tree: &dyn Tree, by: Kind, inode: Inode, records: &mut Vec<Record>) -> io::Result<()> {
        let kind = self.attributes(tree, inode)?.kind;
        match (by == Kind::Directory, kind == Kind::Directory) {
            (true, false) => Err(errno(libc::ENOTDIR)),
            (false, true) => Err(errno(libc::EISDIR)),
            (true, true) if !self.list(tree, inode)?.is_empty() => Err(errno(libc::ENOTEMPTY)),
            (true, true) => {
                records.push(Record::Gone { inode });
                Ok(())
            }
            (false, false) => self.unlinked(tree, inode, records),
        }
    }

    /// chmod, chown, truncate, utimens.
    pub(crate) fn change(&self, tree: &dyn Tree, inode: Inode, change: &Change) -> io::Result<()> {
        let turn = self.inner.changing.lock();
        let mut records = Vec::new();
        let mut node = self.adopted(tree, inode, &mut records)?;
        if change.size.is_some() && node.kind != Kind::File {
            return Err(errno(if node.kind == Kind::Directory { libc::EISDIR } else { libc::EINVAL }));
        }
        let attributes_too = *change != Change { size: change.size, ..Change::default() };
        if attributes_too {
            node.mode = change.mode.map_or(node.mode, |mode| mode & 0o7777);
            node.uid = change.uid.unwrap_or(node.uid);
            node.gid = change.gid.unwrap_or(node.gid);
            node.atime = change.atime.map_or(node.atime, to_nanos);
            node.mtime = change.mtime.map_or(node.mtime, to_nanos);
            node.ctime = now();
            records.push(Record::Node(node));
        }
        self.commit(&records)?;
        drop(turn);
        let Some(body) = self.body(inode) else { return Ok(()) };
        if let Some(size) = change.size {
            body.truncate(&self.inner.store, size)?;
        }
        if change.atime.is_some() || change.mtime.is_some() {
            body.set_times(&self.inner.store, change)?;
        }
        Ok(())
    }

    pub(crate) fn write(&self, tree: &dyn Tree, file: &OpenFile, offset: u64, data: &[u8]) -> io::Result<()> {
        self.writable(tree, file.inode)?.write(tree, &self.inner.store, offset, data)
    }

    pub(crate) fn allocate(
        &self,
        tree: &dyn Tree,
        file: &OpenFile,
        offset: u64,
        length: u64,
        keep_size: bool,
    ) -> io::Result<()> {
        self.writable(tree, file.inode)?.allocate(&self.inner.store, offset, length, keep_size)
    }

    fn writable(&self, tree: &dyn Tree, inode: Inode) -> io::Result<std::sync::Arc<FileBody>> {
        if let Some(body) = self.body(inode) {
            return Ok(body);
        }
        let _turn = self.inner.changing.lock();
        let mut records = Vec::new();
        self.adopted(tree, inode, &mut records)?;
        self.commit(&records)?;
        self.body(inode).ok_or_else(|| errno(libc::EBADF))
    }

    // ---- pieces of a change ----

    /// A node as it is after `records`, which get it from the tree if the scratch does not know it yet.
    fn adopted(&self, tree: &dyn Tree, inode: Inode, records: &mut Vec<Record>) -> io::Result<NodeRecord> {
        let planned = records.iter().rev().find_map(|record| match record {
            Record::Node(node) if node.inode == inode => Some(node.clone()),
            _ => None,
        });
        if let Some(node) = planned {
            return Ok(node);
        }
        if let Some(node) = self.inner.namespace.read().nodes.get(&inode) {
            return Ok(node.record.clone());
        }
        let attr = base_attr(tree, inode)?;
        if attr.volatile {
            return Err(errno(libc::EPERM));
        }
        let mtime = to_nanos(attr.mtime);
        let node = NodeRecord {
            inode,
            kind: attr.kind,
            mode: attr.mode,
            uid: attr.uid,
            gid: attr.gid,
            links: 1,
            atime: mtime,
            mtime,
            ctime: mtime,
            target: OsString::new(),
        };
        records.push(Record::Node(node.clone()));
        if attr.kind == Kind::File {
            let size = attr.size;
            let mixed = FileRecord { inode, generation: 0, own: false, durable: false, size, base_size: size };
            records.push(Record::File(mixed));
            records.push(Record::Pages { inode, durable: true, size, mtime, runs: Vec::new() });
        }
        Ok(node)
    }

    /// A directory whose names change.
    fn touched(&self, tree: &dyn Tree, inode: Inode, records: &mut Vec<Record>) -> io::Result<NodeRecord> {
        let mut node = self.adopted(tree, inode, records).map_err(|error| match error.raw_os_error() {
            Some(libc::ESTALE) => errno(libc::ENOENT),
            _ => error,
        })?;
        if node.kind != Kind::Directory {
            return Err(errno(libc::ENOTDIR));
        }
        node.mtime = now();
        node.ctime = node.mtime;
        records.push(Record::Node(node.clone()));
        Ok(node)
    }

    /// A file that loses a name. One of the tree that nobody opened or changed needs no record of its own.
    fn unlinked(&self, tree: &dyn Tree, inode: Inode, records: &mut Vec<Record>) -> io::Result<()> {
        let namespace = self.inner.namespace.read();
        let remembered = namespace.nodes.contains_key(&inode) || namespace.is_open(inode);
        drop(namespace);
        if remembered {
            let mut node = self.adopted(tree, inode, records)?;
            node.links = node.links.saturating_sub(1);
            node.ctime = now();
            records.push(Record::Node(node));
        }
        Ok(())
    }

    /// The record that takes a name away: one of the tree must be hidden.
    fn without(&self, tree: &dyn Tree, (directory, name): Place<'_>) -> io::Result<Record> {
        let in_tree = directory < FIRST_SCRATCH_INODE && base_lookup(tree, directory, name)?.is_some();
        let name = name.to_owned();
        Ok(if in_tree { Record::Name { directory, name, inode: None } } else { Record::Unname { directory, name } })
    }

    /// Frees a node that has lost its last name, unless it is open: then the last close does.
    fn bury(&self, inode: Inode) -> io::Result<()> {
        let mut namespace = self.inner.namespace.write();
        let Some(node) = namespace.nodes.get(&inode) else { return Ok(()) };
        if node.record.links > 0 || namespace.is_open(inode) {
            return Ok(());
        }
        self.inner.forget(&mut namespace, inode);
        Ok(())
    }

    fn commit(&self, records: &[Record]) -> io::Result<()> {
        if records.is_empty() {
            return Ok(());
        }
        let mut namespace = self.inner.namespace.write();
        let lsn = self.inner.store.journal.append(records)?;
        records.iter().for_each(|record| namespace.apply(record, lsn));
        Ok(())
    }
}

impl super::Inner {
    /// Drops a node without names and openers, and its content.
    pub(super) fn forget(&self, namespace: &mut Namespace, inode: Inode) {
        let body = namespace.file(inode).cloned();
        let record = Record::Gone { inode };
        // should the journal be full: opening a scratch drops what has no name
        let lsn = self.store.journal.append(std::slice::from_ref(&record));
        namespace.apply(&record, 0);
        if let Some(body) = body {
            body.doom(&self.store, lsn.unwrap_or_else(|_| self.store.journal.end()));
        }
    }
}

impl Namespace {
    /// Whether `directory` is `ancestor` or lies in it, as far as parents are known.
    fn is_inside(&self, directory: Inode, ancestor: Inode) -> bool {
        let mut at = Some(directory);
        // a bound, should the parents ever form a ring
        for _ in 0..self.parents.len() + 2 {
            match at {
                Some(inode) if inode == ancestor => return true,
                Some(inode) => at = self.parents.get(&inode).copied(),
                None => return false,
            }
        }
        true
    }
}

fn check_name(name: &OsStr) -> io::Result<()> {
    if name.len() > NAME_MAX { Err(errno(libc::ENAMETOOLONG)) } else { Ok(()) }
}
