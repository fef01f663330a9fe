//! A whole stanza as a tree: every backup below `backups/`, links to the latest, any point below `pitr/`, the WAL archive below
//! `wal/`.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{OsStr, OsString};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;
use pgcairn_mount::{Attributes, Entry, Kind, NodeId, ROOT, Tree};

use super::completion::Prepared;
use super::fetch::Fetcher;
use super::prefetch::Prefetcher;
use super::tree::{Owner, ViewTree, eio};
use super::view::{View, ViewOptions};
use super::wal;
use crate::error::{Error, Result};
use crate::format::CHUNK;
use crate::format::chunk::ChunkRef;
use crate::postgres::{BackupKind, Label, WalName};
use crate::recovery::outline::Outline;
use crate::recovery::plan::{Bound, Course, NoCourse};
use crate::recovery::target::{Action, Point};
use crate::store::{Listed, deadline};

/// How long a listing of backups or WAL is believed.
const LISTING_AGE: Duration = Duration::from_secs(2);
/// Backups whose trees are kept; others are loaded again when they are touched.
const VIEWS: usize = 16;
/// Node numbers of one backup begin at its slot times this.
const SLOT_SHIFT: u32 = 32;

const BACKUPS: NodeId = NodeId(2);
const WAL: NodeId = NodeId(3);
const HIDDEN: NodeId = NodeId(4);
const STATUS: NodeId = NodeId(5);
const PITR: NodeId = NodeId(10);
/// Links to the newest backups: node, name, which kind.
const LINKS: [(NodeId, &str, Option<BackupKind>); 4] = [
    (NodeId(6), "latest", None),
    (NodeId(7), "latest-full", Some(BackupKind::Full)),
    (NodeId(8), "latest-diff", Some(BackupKind::Diff)),
    (NodeId(9), "latest-incr", Some(BackupKind::Incr)),
];
/// What the slots of points are called: no label begins so.
const IN_PITR: &str = "pitr/";
/// Files of the archive have nodes from here on, below the first slot.
const WAL_FIRST: u64 = 1 << 20;

/// A stanza as a read-only tree.
#[derive(Debug)]
pub struct StanzaTree {
    fetcher: Arc<Fetcher>,
    prefetcher: Arc<Prefetcher>,
    owner: Option<String>,
    root_owner: Owner,
    find_owner: fn(Option<&str>, &str) -> Result<Owner>,
    labels: Mutex<Labels>,
    /// held by who lists the backups, or the archive: others wait for that listing
    listing: Listings,
    /// the most recently used last; each is locked while it is loaded, so that others can be read meanwhile
    views: Mutex<Vec<(u64, Loading)>>,
    moments: Moments,
    archive: Mutex<Archived>,
}

#[derive(Debug, Default)]
struct Listings {
    backups: Mutex<()>,
    archive: Mutex<()>,
}

/// The tree of a backup, once it is loaded.
type Loading = Arc<Mutex<Option<Arc<ViewTree>>>>;

/// How points become data directories.
#[derive(Debug)]
pub struct Moments {
    /// fetches WAL that is not in a directory's `pg_wal`
    pub restore_command: String,
    /// where the times found in WAL are kept
    pub cache: Option<PathBuf>,
    /// those that were looked up, by name
    pub found: Mutex<BTreeMap<String, Course>>,
}

/// Labels and their slots; a slot is never given to another label.
#[derive(Debug, Default)]
struct Labels {
    listed: Option<Instant>,
    present: Vec<Label>,
    slots: HashMap<String, u64>,
    names: Vec<String>,
}

/// Files of the archive; a file keeps its node.
#[derive(Debug, Default)]
struct Archived {
    listed: Option<Instant>,
    segment_size: u64,
    system_id: u64,
    present: Vec<usize>,
    files: Vec<(String, Listed)>,
    numbers: HashMap<String, usize>,
    chunks: HashMap<usize, Arc<Vec<ChunkRef>>>,
}

impl StanzaTree {
    /// The stanza that `fetcher` reads. `find_owner` says whose the files of a backup are, from the user asked for and the
    /// cluster's own.
    pub fn new(
        fetcher: Arc<Fetcher>,
        owner: Option<String>,
        find_owner: fn(Option<&str>, &str) -> Result<Owner>,
        prefetcher: Arc<Prefetcher>,
        moments: Moments,
    ) -> Result<Self> {
        let root_owner = find_owner(owner.as_deref(), "postgres")?;
        Ok(Self {
            fetcher,
            prefetcher,
            owner,
            root_owner,
            find_owner,
            labels: Mutex::default(),
            listing: Listings::default(),
            views: Mutex::default(),
            moments,
            archive: Mutex::default(),
        })
    }

    /// Labels of the backups there are, oldest first.
    fn labels(&self) -> io::Result<Vec<Label>> {
        let _turn = deadline::lock(&self.listing.backups).ok_or_else(late)?;
        let is_fresh = self.labels.lock().listed.is_some_and(|at| at.elapsed() <= LISTING_AGE);
        if !is_fresh {
            let names = self.fetcher.repository().labels().map_err(|error| eio(&error))?;
            let mut labels = self.labels.lock();
            labels.present = names.iter().filter_map(|name| name.parse().ok()).collect();
            labels.listed = Some(Instant::now());
        }
        Ok(self.labels.lock().present.clone())
    }

    fn slot(&self, label: &str) -> u64 {
        let mut labels = self.labels.lock();
        if let Some(slot) = labels.slots.get(label) {
            return *slot;
        }
        labels.names.push(label.to_owned());
        let slot = labels.names.len() as u64;
        labels.slots.insert(label.to_owned(), slot);
        slot
    }

    /// The tree of the backup in `slot`, loaded when it is first touched.
    fn view(&self, slot: u64) -> io::Result<Arc<ViewTree>> {
        let loading = {
            let mut views = self.views.lock();
            let known = views.iter().position(|(known, _)| *known == slot).map(|at| views.remove(at));
            if known.is_none() && views.len() >= VIEWS {
                views.remove(0);
            }
            let entry = known.unwrap_or_else(|| (slot, Loading::default()));
            views.push(entry.clone());
            entry.1
        };
        let mut loaded = deadline::lock(&loading).ok_or_else(late)?;
        if let Some(view) = &*loaded {
            return Ok(view.clone());
        }
        let label = self.labels.lock().names.get(slot as usize - 1).cloned();
        let label = label.ok_or_else(|| io::Error::from_raw_os_error(libc::ESTALE))?;
        let load = || -> Result<ViewTree> {
            let (label, options) = self.moments.of(&label);
            let view = Arc::new(View::load(self.fetcher.clone(), &label, &options)?);
            let owner = (self.find_owner)(self.owner.as_deref(), &view.description.owner)?;
            Ok(ViewTree::new(view, owner, self.prefetcher.clone()))
        };
        // a manifest takes as long as it is large
        let view = deadline::apart(load).map_err(|error| eio(&error))?;
        Ok(loaded.insert(Arc::new(view)).clone())
    }

    /// The directory of a point below `pitr/`; what cannot be reached is not there, and the log says why.
    fn moment(&self, name: &str) -> io::Result<Option<NodeId>> {
        let slot = |name| in_slot(self.slot(&format!("{IN_PITR}{name}")), ROOT);
        if self.moments.found.lock().contains_key(name) {
            return Ok(Some(slot(name)));
        }
        // `.git`, `.hidden`: programs look for these everywhere, and to look for a restore point is to list the archive
        if name.starts_with('.') {
            return Ok(None);
        }
        let point = match Point::of_name(name, &jiff::Zoned::now()) {
            Ok(point) => point,
            Err(error) => {
                tracing::info!(%error, "pitr/ has no {name}");
                return Ok(None);
            }
        };
        let repository = self.fetcher.repository();
        let outline = || Outline::load(repository, None, self.moments.cache.as_deref());
        // a search takes as long as the WAL is
        match deadline::apart(|| Course::find(repository, &point, Bound::Open, outline)) {
            Ok(course) => {
                self.moments.found.lock().insert(name.to_owned(), course);
                Ok(Some(slot(name)))
            }
            Err(NoCourse::Unreachable(error)) => {
                tracing::warn!(hint = error.hint_text(), "pitr/ has no {name}: {error}");
                Ok(None)
            }
            Err(NoCourse::Failed(error)) => Err(eio(&error)),
        }
    }

    fn lists_archive(&self) -> io::Result<()> {
        let _turn = deadline::lock(&self.listing.archive).ok_or_else(late)?;
        if self.archive.lock().listed.is_some_and(|at| at.elapsed() < LISTING_AGE) {
            return Ok(());
        }
        let repository = self.fetcher.repository();
        let list = || -> Result<()> {
            let info = repository.archive_info()?;
            let mut files = Vec::new();
            repository.archive(info.current()?).files(|name, object| files.push((name.to_owned(), object.clone())))?;
            let mut archive = self.archive.lock();
            archive.present.clear();
            for file in files {
                let next = archive.files.len();
                let number = *archive.numbers.entry(file.0.clone()).or_insert(next);
                if number == next {
                    archive.files.push(file);
                }
                archive.present.push(number);
            }
            (archive.segment_size, archive.system_id) = (info.current()?.wal_segment_size, info.current()?.system_id);
            archive.listed = Some(Instant::now());
            Ok(())
        };
        list().map_err(|error| eio(&error))
    }

    fn archived(&self, node: NodeId) -> io::Result<(usize, Listed, Arc<Vec<ChunkRef>>)> {
        let number = (node.0 - WAL_FIRST) as usize;
        let (object, chunks, system_id) = {
            let archive = self.archive.lock();
            let file = archive.files.get(number).ok_or_else(|| io::Error::from_raw_os_error(libc::ESTALE))?;
            (file.1.clone(), archive.chunks.get(&number).cloned(), archive.system_id)
        };
        let chunks = match chunks {
            Some(chunks) => chunks,
            None => {
                let opened =
                    wal::open(&self.fetcher, system_id, &object.key, object.size).map_err(|error| eio(&error))?;
                let opened = Arc::new(opened);
                self.archive.lock().chunks.insert(number, opened.clone());
                opened
            }
        };
        Ok((number, object, chunks))
    }

    /// An archived file and its length: known without a request where all files of its kind have the same.
    fn archived_size(&self, node: NodeId) -> io::Result<(Listed, u64)> {
        let known = {
            let archive = self.archive.lock();
            let file = archive.files.get((node.0 - WAL_FIRST) as usize);
            let (name, object) = file.ok_or_else(|| io::Error::from_raw_os_error(libc::ESTALE))?;
            let whole = matches!(WalName::parse(name), Ok(WalName::Segment(_) | WalName::Partial(_)));
            whole.then(|| (object.clone(), archive.segment_size))
        };
        match known {
            Some(known) => Ok(known),
            None => {
                let (_, object, chunks) = self.archived(node)?;
                Ok((object, chunks.iter().map(|chunk| u64::from(chunk.plain_len)).sum()))
            }
        }
    }

    fn link_target(&self, kind: Option<BackupKind>) -> io::Result<Option<String>> {
        let newest = |label: &&Label| kind.is_none_or(|kind| label.kind() == kind);
        Ok(self.labels()?.iter().rev().find(newest).map(|label| format!("backups/{label}")))
    }

    fn links(&self) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        for (node, name, kind) in LINKS {
            if self.link_target(kind)?.is_some() {
                entries.push(Entry { name: name.into(), node, kind: Kind::Symlink });
            }
        }
        Ok(entries)
    }

    fn status(&self) -> Vec<u8> {
        let repository = self.fetcher.repository();
        super::tree::counters_json(
            &self.fetcher,
            serde_json::json!({
                "stanza": repository.stanza, "repo": repository.store.url(),
            }),
        )
    }

    fn attributes_of(&self, kind: Kind, mode: u32, size: u64, volatile: bool) -> Attributes {
        let Owner { uid, gid } = self.root_owner;
        Attributes { kind, mode, uid, gid, size, mtime: SystemTime::UNIX_EPOCH, volatile }
    }

    fn read_archived(&self, node: NodeId, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let (_, _, chunks) = self.archived(node)?;
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let Some(chunk) = chunks.get((at / CHUNK as u64) as usize) else { break };
            let from = (at % CHUNK as u64) as usize;
            let len = (chunk.plain_len as usize).saturating_sub(from).min(buf.len() - done);
            if len == 0 {
                break;
            }
            let part = &mut buf[done..done + len];
            if !self.fetcher.read_cached(chunk, from, part) {
                let plain = self.fetcher.chunk(chunk).map_err(|error| eio(&error))?;
                part.copy_from_slice(&plain[from..from + len]);
            }
            done += len;
        }
        Ok(done)
    }
}

impl Moments {
    /// The backup and how it is shown, of a slot's name.
    fn of(&self, name: &str) -> (String, ViewOptions) {
        let course = name.strip_prefix(IN_PITR).and_then(|name| self.found.lock().get(name).cloned());
        let Some(course) = course else { return (name.to_owned(), ViewOptions::copy()) };
        let prepared = course.recovery.map(|recovery| Prepared {
            settings: recovery.settings_with(Action::Promote, &self.restore_command),
            recovery,
            presents_wal: true,
        });
        (course.label, ViewOptions::copy().prepared(prepared))
    }
}

/// What another request reads from the store did not come in time.
fn late() -> io::Error {
    eio(&Error::new("the repository did not answer in time"))
}

fn slot_of(node: NodeId) -> Option<(u64, NodeId)> {
    let slot = node.0 >> SLOT_SHIFT;
    (slot > 0).then_some((slot, NodeId(node.0 & ((1 << SLOT_SHIFT) - 1))))
}

fn in_slot(slot: u64, node: NodeId) -> NodeId {
    NodeId(slot << SLOT_SHIFT | node.0)
}

impl Tree for StanzaTree {
    fn lookup(&self, directory: NodeId, name: &OsStr) -> io::Result<Option<NodeId>> {
        if let Some((slot, node)) = slot_of(directory) {
            return Ok(self.view(slot)?.lookup(node, name)?.map(|node| in_slot(slot, node)));
        }
        let Some(name) = name.to_str() else { return Ok(None) };
        match directory {
            ROOT => Ok(match name {
                "backups" => Some(BACKUPS),
                "wal" => Some(WAL),
                "pitr" => Some(PITR),
                ".pgcairn" => Some(HIDDEN),
                _ => self.links()?.into_iter().find(|entry| entry.name == name).map(|entry| entry.node),
            }),
            BACKUPS => {
                let known = self.labels()?.iter().any(|label| label.to_string() == name);
                Ok(known.then(|| in_slot(self.slot(name), ROOT)))
            }
            PITR => self.moment(name),
            WAL => {
                self.lists_archive()?;
                Ok(self.archive.lock().numbers.get(name).map(|number| NodeId(WAL_FIRST + *number as u64)))
            }
            HIDDEN => Ok((name == "status").then_some(STATUS)),
            _ => Ok(None),
        }
    }

    fn attributes(&self, node: NodeId) -> io::Result<Attributes> {
        if let Some((slot, node)) = slot_of(node) {
            return self.view(slot)?.attributes(node);
        }
        Ok(match node {
            ROOT | BACKUPS | WAL | PITR | HIDDEN => self.attributes_of(Kind::Directory, 0o755, 0, true),
            STATUS => self.attributes_of(Kind::File, 0o444, self.status().len() as u64, true),
            node if node.0 >= WAL_FIRST => {
                let (object, size) = self.archived_size(node)?;
                let mut attributes = self.attributes_of(Kind::File, 0o600, size, false);
                attributes.mtime += Duration::from_secs(object.modified.max(0) as u64);
                attributes
            }
            node => {
                let size = self.read_link(node)?.len() as u64;
                self.attributes_of(Kind::Symlink, 0o777, size, true)
            }
        })
    }

    fn list(&self, directory: NodeId, from: usize, limit: usize) -> io::Result<Vec<Entry>> {
        if let Some((slot, node)) = slot_of(directory) {
            let mut entries = self.view(slot)?.list(node, from, limit)?;
            entries.iter_mut().for_each(|entry| entry.node = in_slot(slot, entry.node));
            return Ok(entries);
        }
        let entry = |name: &str, node, kind| Entry { name: OsString::from(name), node, kind };
        let all: Vec<Entry> = match directory {
            ROOT => {
                let mut all: Vec<Entry> = [("backups", BACKUPS), ("pitr", PITR), ("wal", WAL)]
                    .map(|(name, node)| entry(name, node, Kind::Directory))
                    .into();
                all.extend(self.links()?);
                all
            }
            BACKUPS => {
                let names = self.labels()?.into_iter().map(|label| label.to_string());
                names.map(|name| entry(&name, in_slot(self.slot(&name), ROOT), Kind::Directory)).collect()
            }
            PITR => {
                let names: Vec<String> = self.moments.found.lock().keys().cloned().collect();
                let node = |name: &str| in_slot(self.slot(&format!("{IN_PITR}{name}")), ROOT);
                names.iter().map(|name| entry(name, node(name), Kind::Directory)).collect()
            }
            WAL => {
                self.lists_archive()?;
                let archive = self.archive.lock();
                let node = |number: &usize| NodeId(WAL_FIRST + *number as u64);
                let page = archive.present.iter().skip(from).take(limit);
                return Ok(page.map(|number| entry(&archive.files[*number].0, node(number), Kind::File)).collect());
            }
            HIDDEN => vec![entry("status", STATUS, Kind::File)],
            _ => Vec::new(),
        };
        Ok(all.into_iter().skip(from).take(limit).collect())
    }

    fn read_link(&self, node: NodeId) -> io::Result<OsString> {
        if let Some((slot, node)) = slot_of(node) {
            return self.view(slot)?.read_link(node);
        }
        let link = LINKS.iter().find(|(known, ..)| *known == node);
        let (_, _, kind) = link.ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
        let target = self.link_target(*kind)?;
        target.map(OsString::from).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOENT))
    }

    fn open(&self, node: NodeId) -> io::Result<()> {
        slot_of(node).map_or(Ok(()), |(slot, node)| self.view(slot)?.open(node))
    }

    fn read_at(&self, node: NodeId, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        if let Some((slot, node)) = slot_of(node) {
            return self.view(slot)?.read_at(node, offset, buf);
        }
        if node.0 >= WAL_FIRST {
            return self.read_archived(node, offset, buf);
        }
        let text = self.status();
        let rest = text.get(offset as usize..).unwrap_or_default();
        let len = rest.len().min(buf.len());
        buf[..len].copy_from_slice(&rest[..len]);
        Ok(len)
    }

    fn prefetch(&self, node: NodeId, offset: u64, len: u64) {
        if let Some((slot, node)) = slot_of(node)
            && let Ok(view) = self.view(slot)
        {
            view.prefetch(node, offset, len);
        }
    }
}

#[cfg(test)]
mod tests;
