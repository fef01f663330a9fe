//! A tree in memory, the same at every start, with one harmed range.

use std::ffi::{OsStr, OsString};
use std::io;
use std::time::{Duration, SystemTime};

use pgcairn_mount::{Attributes, Entry, Kind, NodeId, ROOT, Tree};

/// Reading any byte of this range of `harmed` is EIO.
pub(crate) const HARMED: std::ops::Range<u64> = 300_000..310_000;
/// Names in `many`.
pub(crate) const MANY: usize = 5000;

struct Node {
    attributes: Attributes,
    content: Vec<u8>,
    target: OsString,
    children: Vec<Entry>,
    hidden: Vec<Entry>,
}

/// See [`sample`].
pub(crate) struct MemoryTree {
    nodes: Vec<Node>,
}

/// Bytes that differ everywhere and between seeds.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        // never zero, so that a hole shows
        (state >> 32) as u8 | 1
    };
    (0..len).map(|_| next()).collect()
}

/// `/a` to `/c`: files of 0, 10000 and 300000 bytes; `/harmed`; `/link -> a`; `/d/x`, `/d/e/y`; `/empty/`; `/many/`;
/// `/now`, volatile; `/.hidden/inside`, found but not listed.
pub(crate) fn sample() -> MemoryTree {
    let mut tree = MemoryTree { nodes: Vec::new() };
    let root = tree.add(None, "", Kind::Directory, Vec::new());
    for (name, len) in [("a", 0), ("b", 10_000), ("c", 300_000), ("harmed", 1_000_000)] {
        tree.add(Some(root), name, Kind::File, noise(len as u64 + 1, len));
    }
    let link = tree.add(Some(root), "link", Kind::Symlink, Vec::new());
    tree.nodes[link].target = "a".into();
    tree.nodes[link].attributes.size = 1;
    let d = tree.add(Some(root), "d", Kind::Directory, Vec::new());
    tree.add(Some(d), "x", Kind::File, noise(7, 5000));
    let e = tree.add(Some(d), "e", Kind::Directory, Vec::new());
    tree.add(Some(e), "y", Kind::File, noise(8, 8192));
    tree.add(Some(root), "empty", Kind::Directory, Vec::new());
    let many = tree.add(Some(root), "many", Kind::Directory, Vec::new());
    for index in 0..MANY {
        tree.add(Some(many), &format!("{index:05}"), Kind::File, vec![b'0'; index % 7]);
    }
    let now = tree.add(Some(root), "now", Kind::File, b"volatile".to_vec());
    tree.nodes[now].attributes.volatile = true;
    let hidden = tree.add(Some(root), ".hidden", Kind::Directory, Vec::new());
    tree.add(Some(hidden), "inside", Kind::File, b"found".to_vec());
    let entry = tree.nodes[root].children.pop().unwrap();
    tree.nodes[root].hidden.push(entry);
    tree
}

impl MemoryTree {
    fn add(&mut self, parent: Option<usize>, name: &str, kind: Kind, content: Vec<u8>) -> usize {
        let index = self.nodes.len();
        let node = NodeId(ROOT.0 + index as u64);
        if let Some(parent) = parent {
            self.nodes[parent].children.push(Entry { name: name.into(), node, kind });
        }
        let mtime = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000 + index as u64);
        let mode = match kind {
            Kind::File => 0o644,
            Kind::Directory => 0o755,
            Kind::Symlink => 0o777,
        };
        let size = content.len() as u64;
        let attributes = Attributes { kind, mode, uid: 0, gid: 0, size, mtime, volatile: false };
        self.nodes.push(Node { attributes, content, target: OsString::new(), children: vec![], hidden: vec![] });
        index
    }

    fn node(&self, node: NodeId) -> io::Result<&Node> {
        let index = (node.0 - ROOT.0) as usize;
        self.nodes.get(index).ok_or_else(|| io::Error::from_raw_os_error(libc::ESTALE))
    }

    /// The content of the file at a path, if there is one.
    pub(crate) fn content_at(&self, path: &str) -> Option<Vec<u8>> {
        let mut at = ROOT;
        for name in path.split('/') {
            at = self.lookup(at, OsStr::new(name)).unwrap()?;
        }
        Some(self.content(at))
    }

    /// The content of a file, without faults.
    pub(crate) fn content(&self, node: NodeId) -> Vec<u8> {
        self.node(node).unwrap().content.clone()
    }
}

impl Tree for MemoryTree {
    fn lookup(&self, directory: NodeId, name: &OsStr) -> io::Result<Option<NodeId>> {
        let node = self.node(directory)?;
        Ok(node.children.iter().chain(&node.hidden).find(|entry| entry.name == name).map(|entry| entry.node))
    }

    fn attributes(&self, node: NodeId) -> io::Result<Attributes> {
        Ok(self.node(node)?.attributes)
    }

    fn list(&self, directory: NodeId, from: usize, limit: usize) -> io::Result<Vec<Entry>> {
        Ok(self.node(directory)?.children.iter().skip(from).take(limit).cloned().collect())
    }

    fn read_link(&self, node: NodeId) -> io::Result<OsString> {
        Ok(self.node(node)?.target.clone())
    }

    fn read_at(&self, node: NodeId, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let content = &self.node(node)?.content;
        let start = content.len().min(offset as usize);
        let end = content.len().min(offset as usize + buf.len());
        if content.len() == 1_000_000 && (start as u64) < HARMED.end && (end as u64) > HARMED.start {
            return Err(io::Error::other("harmed"));
        }
        buf[..end - start].copy_from_slice(&content[start..end]);
        Ok(end - start)
    }
}
