//! A view as the tree that a mount serves.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use pgcairn_mount::{Attributes, Entry, Kind, NodeId, ROOT, Tree};

use super::completion::HIDDEN;
use super::fetch::Fetcher;
use super::prefetch::Prefetcher;
use super::view::{Content, NodeIndex, View};
use crate::error::Error;

/// Bytes of WAL that are fetched ahead of who replays it; twice as much fits into the memory for chunks.
const WAL_AHEAD: u64 = 32 * 1024 * 1024;

/// Who owns the files of a mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// user
    pub uid: u32,
    /// group
    pub gid: u32,
}

/// One backup, served as a data directory.
#[derive(Debug)]
pub struct ViewTree {
    view: Arc<View>,
    owner: Owner,
    prefetcher: Arc<Prefetcher>,
}

impl ViewTree {
    /// Serves `view`, all of it owned by `owner`.
    pub fn new(view: Arc<View>, owner: Owner, prefetcher: Arc<Prefetcher>) -> Self {
        Self { view, owner, prefetcher }
    }

    fn status(&self) -> Vec<u8> {
        status(&self.view)
    }
}

/// The text of `.pgcairn/status`.
pub fn status(view: &View) -> Vec<u8> {
    let repository = view.fetcher().repository();
    let about = serde_json::json!({
        "backup": view.description.label, "stanza": repository.stanza, "repo": repository.store.url(),
    });
    counters_json(view.fetcher(), about)
}

/// `about` and what `fetcher` has done, as text.
pub(super) fn counters_json(fetcher: &Fetcher, mut about: serde_json::Value) -> Vec<u8> {
    use std::sync::atomic::Ordering::Relaxed;
    let counters = &fetcher.counters;
    for (name, counter) in [
        ("requests", &counters.requests),
        ("fetched-bytes", &counters.fetched_bytes),
        ("memory-hits", &counters.memory_hits),
        ("disk-cache-hits", &counters.disk_hits),
        ("errors", &counters.errors),
    ] {
        about[name] = counter.load(Relaxed).into();
    }
    about["pid"] = std::process::id().into();
    format!("{about:#}\n").into_bytes()
}

fn index(node: NodeId) -> NodeIndex {
    (node.0 - ROOT.0) as NodeIndex
}

fn id(index: NodeIndex) -> NodeId {
    NodeId(u64::from(index) + ROOT.0)
}

/// An error as a program sees it: EIO, with the reason in the log.
pub fn eio(error: &Error) -> io::Error {
    tracing::error!("{}", error.told());
    io::Error::from_raw_os_error(libc::EIO)
}

fn kind(content: &Content) -> Kind {
    match content {
        Content::Directory => Kind::Directory,
        Content::Link(_) => Kind::Symlink,
        _ => Kind::File,
    }
}

impl Tree for ViewTree {
    fn lookup(&self, directory: NodeId, name: &OsStr) -> io::Result<Option<NodeId>> {
        Ok(self.view.child(index(directory), name.as_bytes()).map(id))
    }

    fn attributes(&self, node: NodeId) -> io::Result<Attributes> {
        let at = self.view.node(index(node)).map_err(|error| eio(&error))?;
        let volatile = matches!(at.content, Content::Status);
        let size = match volatile {
            true => self.status().len() as u64,
            false => self.view.size(index(node)).map_err(|error| eio(&error))?,
        };
        let seconds = Duration::from_secs(at.mtime.unsigned_abs());
        let mtime = match at.mtime >= 0 {
            true => SystemTime::UNIX_EPOCH + seconds,
            false => SystemTime::UNIX_EPOCH - seconds,
        };
        let (Owner { uid, gid }, mode) = (self.owner, at.mode);
        Ok(Attributes { kind: kind(&at.content), mode, uid, gid, size, mtime, volatile })
    }

    fn list(&self, directory: NodeId, from: usize, limit: usize) -> io::Result<Vec<Entry>> {
        let shown =
            |child: &&NodeIndex| self.view.node(**child).is_ok_and(|node| directory != ROOT || *node.name != *HIDDEN);
        let entry = |child: &NodeIndex| {
            let node = self.view.node(*child).map_err(|error| eio(&error))?;
            Ok(Entry { name: OsString::from_vec(node.name.to_vec()), node: id(*child), kind: kind(&node.content) })
        };
        self.view.children(index(directory)).iter().filter(shown).skip(from).take(limit).map(entry).collect()
    }

    fn read_link(&self, node: NodeId) -> io::Result<OsString> {
        match &self.view.node(index(node)).map_err(|error| eio(&error))?.content {
            Content::Link(target) => Ok(OsString::from_vec(target.to_vec())),
            _ => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        }
    }

    fn open(&self, node: NodeId) -> io::Result<()> {
        if self.view.looks_into(index(node)) {
            self.prefetch(node, 0, 0);
        }
        self.view.refuse_used(index(node)).map_err(|error| eio(&error))
    }

    fn read_at(&self, node: NodeId, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let number = index(node);
        let at = self.view.node(number).map_err(|error| eio(&error))?;
        if matches!(at.content, Content::Status) {
            let text = self.status();
            let rest = text.get(offset as usize..).unwrap_or_default();
            let len = rest.len().min(buf.len());
            buf[..len].copy_from_slice(&rest[..len]);
            return Ok(len);
        }
        self.view.read_at(number, offset, buf).map_err(|error| eio(&error))
    }

    fn prefetch(&self, node: NodeId, offset: u64, _len: u64) {
        let number = index(node);
        let content = |number| self.view.node(number).map(|node| &node.content);
        match content(number) {
            Ok(Content::Mapped { stat, .. }) => {
                self.prefetcher.sequential(&self.view, number, stat.size, offset);
            }
            // whoever replays WAL reads the next segments, too
            Ok(Content::Archived { size, .. }) => {
                let ahead = (WAL_AHEAD / size.max(&1)).max(1) as NodeIndex;
                for number in number..=number.saturating_add(ahead) {
                    let Ok(Content::Archived { size, .. }) = content(number) else { break };
                    self.prefetcher.whole(&self.view, number, *size);
                }
            }
            _ => {}
        }
    }
}
