//! Names and nodes the scratch knows: everything that was changed, and nothing else.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{OsStr, OsString};
use std::sync::Arc;

use super::file::FileBody;
use super::journal::Lsn;
use super::record::{NodeRecord, Record};
use crate::fs::{FIRST_SCRATCH_INODE, Inode};
use crate::tree::Kind;

/// A node that was changed or made.
pub(crate) struct Node {
    pub(crate) record: NodeRecord,
    pub(crate) body: Body,
    /// the last record about the node or one of its names
    pub(crate) lsn: Lsn,
}

pub(crate) enum Body {
    File(Arc<FileBody>),
    /// names that differ from the tree's; `None` hides one
    Directory(BTreeMap<OsString, Option<Inode>>),
    Symlink,
}

#[derive(Default)]
pub(crate) struct Namespace {
    pub(crate) nodes: HashMap<Inode, Node>,
    pub(crate) next_inode: Inode,
    /// how often each file is open
    pub(crate) opens: HashMap<Inode, u32>,
    /// parents of directories, as far as they were looked up
    pub(crate) parents: HashMap<Inode, Inode>,
}

/// What the scratch says about a name.
pub(crate) enum Known {
    Here(Inode),
    Hidden,
    AskTree,
    Absent,
}

impl Namespace {
    pub(crate) fn new() -> Self {
        Self { next_inode: FIRST_SCRATCH_INODE, ..Self::default() }
    }

    pub(crate) fn known(&self, directory: Inode, name: &OsStr) -> Known {
        let entry = match self.nodes.get(&directory) {
            Some(Node { body: Body::Directory(names), .. }) => names.get(name),
            _ => None,
        };
        match entry {
            Some(Some(inode)) => Known::Here(*inode),
            Some(None) => Known::Hidden,
            None if directory < FIRST_SCRATCH_INODE => Known::AskTree,
            None => Known::Absent,
        }
    }

    pub(crate) fn file(&self, inode: Inode) -> Option<&Arc<FileBody>> {
        match self.nodes.get(&inode) {
            Some(Node { body: Body::File(file), .. }) => Some(file),
            _ => None,
        }
    }

    pub(crate) fn files(&self) -> impl Iterator<Item = &Arc<FileBody>> {
        self.nodes.values().filter_map(|node| match &node.body {
            Body::File(body) => Some(body),
            _ => None,
        })
    }

    pub(crate) fn is_open(&self, inode: Inode) -> bool {
        self.opens.contains_key(&inode)
    }

    /// Makes a record true in memory. Records about nodes that are gone say nothing.
    pub(crate) fn apply(&mut self, record: &Record, lsn: Lsn) {
        match record {
            Record::NextInode { inode } => self.next_inode = self.next_inode.max(*inode),
            Record::Node(node) => self.apply_node(node, lsn),
            Record::File(file) => {
                if let Some(body) = self.file(file.inode) {
                    body.apply(file, lsn);
                }
            }
            Record::Name { directory, name, inode } => {
                if let Some(Node { body: Body::Directory(names), .. }) = self.nodes.get_mut(directory) {
                    names.insert(name.clone(), *inode);
                }
                if let Some(inode) = inode {
                    self.parents.entry(*inode).and_modify(|parent| *parent = *directory);
                }
            }
            Record::Unname { directory, name } => {
                if let Some(Node { body: Body::Directory(names), .. }) = self.nodes.get_mut(directory) {
                    names.remove(name);
                }
            }
            Record::Gone { inode } => {
                self.nodes.remove(inode);
                self.parents.remove(inode);
            }
            Record::Pages { inode, durable, size, mtime, runs } => {
                if let Some(body) = self.file(*inode) {
                    body.apply_pages(*durable, *size, *mtime, runs);
                }
            }
            Record::Boot { .. } | Record::Mark => {}
        }
    }

    fn apply_node(&mut self, record: &NodeRecord, lsn: Lsn) {
        if record.inode >= FIRST_SCRATCH_INODE {
            self.next_inode = self.next_inode.max(record.inode + 1);
        }
        match self.nodes.get_mut(&record.inode) {
            Some(node) => {
                node.record = record.clone();
                node.lsn = lsn;
            }
            None => {
                let body = match record.kind {
                    Kind::File => Body::File(Arc::new(FileBody::new(record.inode))),
                    Kind::Directory => Body::Directory(BTreeMap::new()),
                    Kind::Symlink => Body::Symlink,
                };
                self.nodes.insert(record.inode, Node { record: record.clone(), body, lsn });
            }
        }
    }

    /// The records that rebuild all of this, the content of files included. `files` are their frozen states, in the
    /// order of [`Self::files`].
    pub(crate) fn records(&self, mut file_records: impl FnMut(&FileBody, &mut Vec<Record>)) -> Vec<Record> {
        let mut out = vec![Record::NextInode { inode: self.next_inode }];
        for node in self.nodes.values() {
            out.push(Record::Node(node.record.clone()));
            if let Body::File(body) = &node.body {
                file_records(body, &mut out);
            }
        }
        for (&directory, node) in &self.nodes {
            if let Body::Directory(names) = &node.body {
                out.extend(names.iter().map(|(name, &inode)| Record::Name { directory, name: name.clone(), inode }));
            }
        }
        out
    }

    /// The first name that leads to a node of the scratch that is not there.
    pub(crate) fn dangling(&self) -> Option<&OsStr> {
        self.nodes.values().find_map(|node| match &node.body {
            Body::Directory(names) => names.iter().find_map(|(name, inode)| {
                let missing = inode.is_some_and(|to| to >= FIRST_SCRATCH_INODE && !self.nodes.contains_key(&to));
                missing.then_some(name.as_os_str())
            }),
            _ => None,
        })
    }
}
