//! A tree whose answers have one deadline each, whatever must be read for them.

use std::ffi::{OsStr, OsString};
use std::io;
use std::time::{Duration, Instant};

use pgcairn_mount::{Attributes, Entry, NodeId, Tree, asked_at};

use crate::store::deadline;

/// See the module. The time runs from the kernel's request on: that may ask the tree more than once.
#[derive(Debug)]
pub struct Bounded<T> {
    tree: T,
    limit: Duration,
}

impl<T: Tree> Bounded<T> {
    /// The same tree; what takes longer than `limit` fails.
    pub fn new(tree: T, limit: Duration) -> Self {
        Self { tree, limit }
    }

    fn within<A>(&self, answer: impl FnOnce(&T) -> A) -> A {
        deadline::since(asked_at().unwrap_or_else(Instant::now), self.limit, || answer(&self.tree))
    }
}

impl<T: Tree> Tree for Bounded<T> {
    fn lookup(&self, directory: NodeId, name: &OsStr) -> io::Result<Option<NodeId>> {
        self.within(|tree| tree.lookup(directory, name))
    }

    fn attributes(&self, node: NodeId) -> io::Result<Attributes> {
        self.within(|tree| tree.attributes(node))
    }

    fn list(&self, directory: NodeId, from: usize, limit: usize) -> io::Result<Vec<Entry>> {
        self.within(|tree| tree.list(directory, from, limit))
    }

    fn read_link(&self, node: NodeId) -> io::Result<OsString> {
        self.within(|tree| tree.read_link(node))
    }

    fn open(&self, node: NodeId) -> io::Result<()> {
        self.within(|tree| tree.open(node))
    }

    fn read_at(&self, node: NodeId, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        self.within(|tree| tree.read_at(node, offset, buf))
    }

    fn prefetch(&self, node: NodeId, offset: u64, len: u64) {
        self.tree.prefetch(node, offset, len);
    }
}
