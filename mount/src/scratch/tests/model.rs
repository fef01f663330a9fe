//! The reference: operations on a file system without any cleverness.

use std::collections::BTreeMap;

use super::tree;
use crate::tree::{Kind, ROOT, Tree};

pub(super) type Paths = BTreeMap<String, u64>;

/// Where an operation may go: few places, so that operations meet.
pub(super) const PLACES: [&str; 10] = ["a", "b", "c", "n", "d", "d/x", "d/e", "d/e/y", "d/n", "empty"];

#[derive(Clone, Debug)]
pub(super) enum Op {
    Create(usize),
    Write(usize, u64, usize, u64),
    Truncate(usize, u64),
    Allocate(usize, u64, u64),
    Unlink(usize),
    Mkdir(usize),
    Rmdir(usize),
    Symlink(usize),
    Link(usize, usize),
    Rename(usize, usize, bool),
    Chmod(usize, u32),
    Sync(usize),
    Hold(usize),
    LetGo,
    /// the daemon is killed and the scratch opened again
    Crash,
    Remount,
    Rewrite,
}

/// One node of the reference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Plain {
    pub(super) kind: Kind,
    pub(super) mode: u32,
    pub(super) links: u32,
    pub(super) content: Vec<u8>,
    pub(super) children: Paths,
}

/// The reference: what a file system is, without any cleverness.
#[derive(Clone, Debug, Default)]
pub(super) struct Model {
    pub(super) nodes: BTreeMap<u64, Plain>,
    next: u64,
}

pub(super) type Outcome<T> = std::result::Result<T, i32>;

impl Model {
    pub(super) fn of(tree: &tree::MemoryTree) -> Self {
        let mut model = Self { next: 1 << 40, ..Self::default() };
        let mut todo = vec![ROOT];
        while let Some(node) = todo.pop() {
            let attributes = tree.attributes(node).unwrap();
            let mut content = tree.content(node);
            if attributes.kind == Kind::Symlink {
                content = tree.read_link(node).unwrap().into_encoded_bytes();
            }
            let children = tree.list(node, 0, usize::MAX).unwrap();
            todo.extend(children.iter().map(|entry| entry.node));
            let children = children.into_iter().map(|e| (e.name.into_string().unwrap(), e.node.0)).collect();
            let (kind, mode) = (attributes.kind, attributes.mode);
            model.nodes.insert(node.0, Plain { kind, mode, links: 1, content, children });
        }
        model
    }

    fn split<'a>(&self, path: &'a str) -> Outcome<(u64, &'a str)> {
        let (parents, name) = path.rsplit_once('/').map_or(("", path), |(parents, name)| (parents, name));
        let mut at = ROOT.0;
        for step in parents.split('/').filter(|step| !step.is_empty()) {
            at = *self.nodes[&at].children.get(step).ok_or(libc::ENOENT)?;
            if self.nodes[&at].kind != Kind::Directory {
                return Err(libc::ENOTDIR);
            }
        }
        Ok((at, name))
    }

    pub(super) fn find(&self, path: &str) -> Outcome<u64> {
        let (parent, name) = self.split(path)?;
        self.nodes[&parent].children.get(name).copied().ok_or(libc::ENOENT)
    }

    fn make(&mut self, path: &str, kind: Kind, mode: u32, content: Vec<u8>) -> Outcome<()> {
        let (parent, name) = self.split(path)?;
        if self.nodes[&parent].children.contains_key(name) {
            return Err(libc::EEXIST);
        }
        self.next += 1;
        self.nodes.insert(self.next, Plain { kind, mode, links: 1, content, children: Paths::new() });
        let next = self.next;
        self.nodes.get_mut(&parent).unwrap().children.insert(name.to_owned(), next);
        Ok(())
    }

    fn drop_name(&mut self, path: &str) -> Outcome<()> {
        let (parent, name) = self.split(path)?;
        let node = self.nodes.get_mut(&parent).unwrap().children.remove(name).ok_or(libc::ENOENT)?;
        self.nodes.get_mut(&node).unwrap().links -= 1;
        Ok(())
    }

    fn rename(&mut self, from: &str, to: &str, replace: bool) -> Outcome<()> {
        let node = self.find(from)?;
        let (parent, name) = self.split(to)?;
        let name = name.to_owned();
        if let Some(&target) = self.nodes[&parent].children.get(&name) {
            if !replace {
                return Err(libc::EEXIST);
            }
            if target == node {
                return Ok(());
            }
        }
        if self.nodes[&node].kind == Kind::Directory && (parent == node || to.starts_with(&format!("{from}/"))) {
            return Err(libc::EINVAL);
        }
        if let Some(&target) = self.nodes[&parent].children.get(&name) {
            let is_directory = |node: u64| self.nodes[&node].kind == Kind::Directory;
            match (is_directory(node), is_directory(target)) {
                (true, false) => return Err(libc::ENOTDIR),
                (false, true) => return Err(libc::EISDIR),
                (true, true) if !self.nodes[&target].children.is_empty() => return Err(libc::ENOTEMPTY),
                _ => self.drop_name(to)?,
            }
        }
        let (old_parent, old_name) = self.split(from)?;
        self.nodes.get_mut(&old_parent).unwrap().children.remove(old_name);
        self.nodes.get_mut(&parent).unwrap().children.insert(name, node);
        Ok(())
    }

    fn file(&mut self, path: &str) -> Outcome<&mut Plain> {
        let node = self.find(path)?;
        let node = self.nodes.get_mut(&node).unwrap();
        match node.kind {
            Kind::File => Ok(node),
            _ => Err(libc::EISDIR),
        }
    }

    pub(super) fn apply(&mut self, op: &Op) -> Outcome<()> {
        match *op {
            Op::Create(p) => self.make(PLACES[p], Kind::File, 0o600, Vec::new()),
            Op::Mkdir(p) => self.make(PLACES[p], Kind::Directory, 0o700, Vec::new()),
            Op::Symlink(p) => self.make(PLACES[p], Kind::Symlink, 0o777, b"elsewhere".to_vec()),
            Op::Write(p, offset, len, seed) => self.file(PLACES[p]).map(|node| {
                let end = offset as usize + len;
                if node.content.len() < end {
                    node.content.resize(end, 0);
                }
                node.content[offset as usize..end].copy_from_slice(&tree::noise(seed, len));
            }),
            Op::Truncate(p, size) => self.file(PLACES[p]).map(|node| node.content.resize(size as usize, 0)),
            Op::Allocate(p, offset, len) => self.file(PLACES[p]).map(|node| {
                let end = (offset + len) as usize;
                node.content.resize(end.max(node.content.len()), 0);
            }),
            Op::Unlink(p) => {
                let node = self.find(PLACES[p])?;
                if self.nodes[&node].kind == Kind::Directory { Err(libc::EISDIR) } else { self.drop_name(PLACES[p]) }
            }
            Op::Rmdir(p) => match &self.nodes[&self.find(PLACES[p])?] {
                node if node.kind != Kind::Directory => Err(libc::ENOTDIR),
                node if !node.children.is_empty() => Err(libc::ENOTEMPTY),
                _ => self.drop_name(PLACES[p]),
            },
            Op::Link(from, to) => {
                let node = self.find(PLACES[from])?;
                let (parent, name) = self.split(PLACES[to])?;
                if self.nodes[&parent].children.contains_key(name) {
                    return Err(libc::EEXIST);
                }
                if self.nodes[&node].kind == Kind::Directory {
                    return Err(libc::EPERM);
                }
                self.nodes.get_mut(&parent).unwrap().children.insert(name.to_owned(), node);
                self.nodes.get_mut(&node).unwrap().links += 1;
                Ok(())
            }
            Op::Rename(from, to, replace) => self.rename(PLACES[from], PLACES[to], replace),
            Op::Chmod(p, mode) => {
                let node = self.find(PLACES[p])?;
                self.nodes.get_mut(&node).unwrap().mode = mode;
                Ok(())
            }
            Op::Sync(p) => self.find(PLACES[p]).map(drop),
            Op::Hold(p) => self.file(PLACES[p]).map(drop),
            Op::LetGo | Op::Crash | Op::Remount | Op::Rewrite => Ok(()),
        }
    }
}
