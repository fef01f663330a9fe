//! From a manifest's entries, and what is added to them, to the nodes of a view.

use std::collections::HashMap;

use super::completion;
use super::view::{Content, FileStat, NO_CHANGES, Node, NodeIndex, Piece, StoredChanges, Window};
use crate::error::{Error, Result};
use crate::format::chunk::{ChunkRef, PackId};
use crate::format::manifest::{Entry, Node as Stored, Place, path_cmp};
use crate::format::map::Extent;

/// Chunks of small files are fetched with their neighbours in an aligned window of this many stored bytes: a starting
/// server reads dozens of them.
const SMALL_WINDOW: u32 = 2 * 1024 * 1024;
/// The same for leaves of file maps.
const MAP_WINDOW: u32 = 512 * 1024;
/// The same for what the backup noted of their content.
const CHANGE_WINDOW: u32 = 1024 * 1024;

/// Collects nodes by path, then makes a tree of them.
#[derive(Debug, Default)]
pub struct Builder {
    entries: Vec<(Box<[u8]>, Node)>,
    pub(super) chunks: Vec<ChunkRef>,
    numbers: HashMap<ChunkRef, u32>,
    small: Vec<u32>,
    maps: Vec<u32>,
    noted: Vec<u32>,
    /// where the backup noted what files held; kept only when asked for
    pub(super) changes: Option<Vec<StoredChanges>>,
}

impl Builder {
    /// Adds an entry of the manifest.
    pub fn stored(&mut self, entry: Entry) {
        let content = match entry.node {
            Stored::Directory => Content::Directory,
            Stored::Symlink(target) => Content::Link(target.into()),
            Stored::File(file) => {
                let stat = FileStat { size: file.size, crc: file.crc };
                match file.place {
                    Place::Inline { extents, changes } => Content::Inline {
                        stat,
                        extents: extents.iter().map(|extent| self.piece(extent)).collect(),
                        changes: changes.map_or(NO_CHANGES, |(chunk, at)| {
                            self.note(|builder| StoredChanges::Small(builder.noted(chunk), at))
                        }),
                    },
                    Place::Leaves(leaves) => Content::Mapped {
                        stat,
                        maps: leaves.iter().map(|leaf| self.map(leaf.map)).collect(),
                        index: false,
                        changes: self.note(|builder| {
                            StoredChanges::Leaves(leaves.iter().map(|leaf| builder.noted(leaf.changes)).collect())
                        }),
                    },
                    Place::Index(chunks) => {
                        let maps = chunks.into_iter().map(|chunk| self.map(chunk)).collect();
                        Content::Mapped { stat, maps, index: true, changes: NO_CHANGES }
                    }
                }
            }
        };
        self.add(&completion::view_path(&entry.path), entry.mode, entry.mtime, content);
    }

    /// Adds a node, or replaces the one at that path.
    pub fn add(&mut self, path: &[u8], mode: u32, mtime: i64, content: Content) {
        let node = Node { name: [].into(), mode, mtime, content, first_child: 0, child_count: 0 };
        self.entries.push((path.into(), node));
    }

    /// The node at a path, if it was added.
    pub fn get(&self, path: &[u8]) -> Option<&Node> {
        self.entries.iter().find(|(at, _)| **at == *path).map(|(_, node)| node)
    }

    /// Length and extents of a small stored file.
    pub fn inline(&self, path: &[u8]) -> Option<(u64, Vec<Extent>)> {
        match &self.get(path)?.content {
            Content::Inline { stat, extents, .. } => {
                let extent = |piece: &Piece| Extent {
                    len: piece.len,
                    chunk: self.chunks[piece.chunk as usize],
                    offset: piece.offset,
                };
                Some((stat.size, extents.iter().map(extent).collect()))
            }
            _ => None,
        }
    }

    fn piece(&mut self, extent: &Extent) -> Piece {
        let known = self.chunks.len();
        let chunk = self.number(extent.chunk);
        if self.chunks.len() > known {
            self.small.push(chunk);
        }
        Piece { chunk, offset: extent.offset, len: extent.len }
    }

    /// The number of a file's changes, where they are kept.
    fn note(&mut self, changes: impl FnOnce(&mut Self) -> StoredChanges) -> u32 {
        if self.changes.is_none() {
            return NO_CHANGES;
        }
        let noted = changes(self);
        let Some(changes) = &mut self.changes else { return NO_CHANGES };
        changes.push(noted);
        changes.len() as u32 - 1
    }

    fn noted(&mut self, chunk: ChunkRef) -> u32 {
        let number = self.number(chunk);
        self.noted.push(number);
        number
    }

    fn map(&mut self, chunk: ChunkRef) -> u32 {
        let number = self.number(chunk);
        self.maps.push(number);
        number
    }

    fn number(&mut self, chunk: ChunkRef) -> u32 {
        let next = self.chunks.len() as u32;
        let number = *self.numbers.entry(chunk).or_insert(next);
        if number == next {
            self.chunks.push(chunk);
        }
        number
    }

    pub(super) fn windows(&mut self) -> HashMap<PackId, Window> {
        let mut windows = HashMap::new();
        for (bytes, numbers) in [(SMALL_WINDOW, &self.small), (MAP_WINDOW, &self.maps), (CHANGE_WINDOW, &self.noted)] {
            for number in numbers {
                let pack = self.chunks[*number as usize].pack;
                windows.entry(pack).or_insert_with(|| Window { bytes, chunks: Vec::new() }).chunks.push(*number);
            }
        }
        for window in windows.values_mut() {
            window.chunks.sort_unstable_by_key(|number| self.chunks[*number as usize].offset);
            window.chunks.dedup();
        }
        windows
    }

    /// Sorts by path, keeps the last one added at each, and links children to their directories.
    pub(super) fn tree(&mut self) -> Result<(Vec<Node>, Vec<NodeIndex>)> {
        let mut entries = std::mem::take(&mut self.entries);
        entries.sort_by(|a, b| path_cmp(&a.0, &b.0));
        entries.dedup_by(|later, kept| {
            let same = later.0 == kept.0;
            if same {
                std::mem::swap(&mut later.1, &mut kept.1);
            }
            same
        });
        if entries.first().is_none_or(|(path, node)| !path.is_empty() || !matches!(node.content, Content::Directory)) {
            return Err(Error::new("the backup has no data directory"));
        }
        let mut parents = Vec::with_capacity(entries.len());
        let mut open: Vec<(usize, NodeIndex)> = vec![(0, 0)];
        let mut nodes = Vec::with_capacity(entries.len());
        let mut previous: Box<[u8]> = [].into();
        for (number, (path, mut node)) in entries.into_iter().enumerate() {
            let name_at = path.iter().rposition(|byte| *byte == b'/').map_or(0, |at| at + 1);
            node.name = path[name_at..].into();
            let parent = if number == 0 { 0 } else { parent_of(&mut open, &previous, &path, name_at)? };
            if matches!(node.content, Content::Directory) {
                open.push((path.len(), number as u32));
            }
            parents.push(parent);
            previous = path;
            nodes.push(node);
        }
        let children = link(&mut nodes, &parents);
        Ok((nodes, children))
    }
}

/// The directory a path lies in: on the stack of directories that are open at this point of the walk.
fn parent_of(open: &mut Vec<(usize, NodeIndex)>, previous: &[u8], path: &[u8], name_at: usize) -> Result<NodeIndex> {
    let shared = previous.iter().zip(path).take_while(|(a, b)| a == b).count();
    let directory_len = name_at.saturating_sub(1);
    while let Some((len, node)) = open.last().copied() {
        let encloses = len == 0 || (len <= shared && path.get(len) == Some(&b'/'));
        if encloses && len == directory_len {
            return Ok(node);
        }
        if len <= directory_len && encloses {
            break;
        }
        open.pop();
    }
    Err(Error::new(format!("the backup has \"{}\", but not its directory", path.escape_ascii())))
}

/// Groups the children by parent, keeping their order.
fn link(nodes: &mut [Node], parents: &[NodeIndex]) -> Vec<NodeIndex> {
    for parent in &parents[1..] {
        nodes[*parent as usize].child_count += 1;
    }
    let mut next = 0;
    for node in nodes.iter_mut() {
        node.first_child = next;
        next += node.child_count;
    }
    let mut fill: Vec<u32> = nodes.iter().map(|node| node.first_child).collect();
    let mut children = vec![0; next as usize];
    for (number, parent) in parents.iter().enumerate().skip(1) {
        let at = &mut fill[*parent as usize];
        children[*at as usize] = number as u32;
        *at += 1;
    }
    children
}
