//! Manifests: what they need, and whether all that they name is where they say.

use std::collections::{BTreeMap, HashMap};

use parking_lot::Mutex;

use super::packs::{Found, Verdict};
use super::{Findings, VerifyOptions, each, finding};
use crate::error::{Context, Error, Result};
use crate::format::LEAF_BYTES;
use crate::format::chunk::{ChunkRef, Decoder, PackId};
use crate::format::manifest::{Description, File, Node, Place};
use crate::format::map::{Leaf, LeafRef, changes_base, decode_index};
use crate::repo::manifest::ManifestCursor;
use crate::repo::proof::Contradiction;
use crate::repo::stored::{StoredWal, stored_segment};
use crate::repo::{Repository, layout};

/// What the manifests that can be read say.
#[derive(Debug, Default)]
pub(super) struct Described {
    /// by label
    pub(super) descriptions: Vec<Description>,
    /// packs that backups need, and how long they must be
    pub(super) packs: HashMap<PackId, u64>,
}

/// Reads every manifest.
pub(super) fn describe(
    repository: &Repository,
    labels: &[String],
    findings: &Findings,
    threads: usize,
) -> Result<Described> {
    let (descriptions, packs) = (Mutex::new(BTreeMap::new()), Mutex::new(HashMap::new()));
    each(labels, threads, |label| {
        let key = layout::manifest(&repository.stanza, label);
        let read = || -> Result<_> { Ok((repository.description(label)?, repository.manifest_packs(label)?)) };
        match read() {
            Ok((description, uses)) => {
                descriptions.lock().insert(label.clone(), description);
                let mut packs = packs.lock();
                for of in uses {
                    let size = packs.entry(of.pack).or_insert(of.size);
                    *size = of.size.max(*size);
                }
            }
            Err(error) => {
                let (object, what) = finding(error, &key)?;
                findings.suffers(label, &object, &what, None);
            }
        }
        Ok(())
    })?;
    Ok(Described { descriptions: descriptions.into_inner().into_values().collect(), packs: packs.into_inner() })
}

/// A leaf of a file map that was looked at: many backups share it.
type Leaves = Mutex<HashMap<ChunkRef, Vec<(PackId, String)>>>;

/// Follows every manifest down to its chunks, and in a full run looks into the WAL that a backup stores.
pub(super) fn follow(
    repository: &Repository,
    descriptions: &[&Description],
    found: &Found,
    findings: &Findings,
    options: &VerifyOptions,
) -> Result<()> {
    let leaves = Leaves::default();
    each(descriptions, options.process_max, |description| {
        let label = &description.label;
        let decoder = Decoder::new().context(|| "cannot set up zstd".into())?;
        let mut follower = Follower { repository, found, findings, leaves: &leaves, label, own: None, decoder };
        // it was there and whole a moment ago
        let gone = |error| {
            let (object, what) = finding(error, &layout::manifest(&repository.stanza, label))?;
            findings.suffers(label, &object, &what, None);
            Ok(())
        };
        let mut manifest = match repository.open_manifest(label) {
            Ok(manifest) => manifest,
            Err(error) => return gone(error),
        };
        follower.own = Some(manifest.pack());
        let has_wal = description.wal_stored && !options.quick;
        let mut wal = StoredWal::new();
        loop {
            match manifest.next() {
                Ok(Some(entry)) => {
                    if let Node::File(file) = &entry.node {
                        follower.file(&entry.path, file)?;
                    }
                    let segment = stored_segment(&entry).filter(|_| has_wal);
                    wal.extend(segment.map(|(segment, file)| (segment, file.clone())));
                }
                Ok(None) if has_wal => return follower.wal(&manifest, &wal),
                Ok(None) => return Ok(()),
                Err(error) => return gone(error),
            }
        }
    })
}

struct Follower<'a> {
    repository: &'a Repository,
    found: &'a Found,
    findings: &'a Findings,
    leaves: &'a Leaves,
    label: &'a str,
    /// the manifest itself, which was proved when it was read
    own: Option<PackId>,
    decoder: Decoder,
}

impl Follower<'_> {
    fn file(&mut self, path: &[u8], file: &File) -> Result<()> {
        match &file.place {
            Place::Inline { extents, changes } => {
                let chunks = extents.iter().map(|extent| &extent.chunk).chain(changes.iter().map(|(chunk, _)| chunk));
                chunks.into_iter().try_for_each(|chunk| self.chunk(path, chunk))
            }
            Place::Leaves(leaves) => self.leaves(path, file.size, 0, leaves),
            Place::Index(index) => {
                let mut first = 0;
                for chunk in index {
                    match self.read(chunk).and_then(|plain| Ok(decode_index(&self.key(chunk.pack), &plain)?)) {
                        Ok(leaves) => {
                            self.leaves(path, file.size, first, &leaves)?;
                            first += leaves.len() as u64;
                        }
                        Err(error) => {
                            self.suffers_by(path, chunk.pack, error)?;
                            first += crate::format::map::INDEX_LEAVES as u64;
                        }
                    }
                }
                Ok(())
            }
        }
    }

    fn leaves(&mut self, path: &[u8], size: u64, first: u64, leaves: &[LeafRef]) -> Result<()> {
        for (number, leaf) in (first..).zip(leaves) {
            self.changes(path, &leaf.changes)?;
            let known = self.leaves.lock().get(&leaf.map).cloned();
            let harms = match known {
                Some(harms) => harms,
                None => {
                    let len = size.saturating_sub(number * LEAF_BYTES).min(LEAF_BYTES);
                    let harms = self.leaf(&leaf.map, len)?;
                    self.leaves.lock().insert(leaf.map, harms.clone());
                    harms
                }
            };
            for (pack, what) in &harms {
                self.findings.suffers(self.label, &self.key(*pack), what, Some(path));
            }
        }
        Ok(())
    }

    /// The changes of a leaf, and those that they were derived from. These are found only by reading, which is done when some
    /// pack is harmed.
    fn changes(&mut self, path: &[u8], chunk: &ChunkRef) -> Result<()> {
        self.chunk(path, chunk)?;
        if self.found.is_sound() {
            return Ok(());
        }
        match self.read(chunk).and_then(|plain| Ok(changes_base(&self.key(chunk.pack), &plain)?)) {
            Ok(Some(base)) => self.chunk(path, &base),
            Ok(None) => Ok(()),
            // that was told just now
            Err(error) => finding(error, "").map(drop),
        }
    }

    /// What is wrong with one leaf of a file map and what it names, each pack once.
    fn leaf(&mut self, map: &ChunkRef, len: u64) -> Result<Vec<(PackId, String)>> {
        let leaf = match self.read(map).and_then(|plain| Ok(Leaf::decode(&self.key(map.pack), &plain, len)?)) {
            Ok(leaf) => leaf,
            Err(error) => return Ok(vec![(map.pack, finding(error, "")?.1)]),
        };
        let mut harms: Vec<(PackId, String)> = Vec::new();
        for extent in (0..leaf.slots()).flat_map(|slot| leaf.slot(slot)) {
            let chunk = &extent.chunk;
            if let Verdict::Harmed(what) = self.found.judge(self.repository, &mut self.decoder, chunk)?
                && !harms.iter().any(|(pack, _)| *pack == chunk.pack)
            {
                harms.push((chunk.pack, what));
            }
        }
        Ok(harms)
    }

    fn chunk(&mut self, path: &[u8], chunk: &ChunkRef) -> Result<()> {
        if self.own == Some(chunk.pack) {
            return Ok(());
        }
        if let Verdict::Harmed(what) = self.found.judge(self.repository, &mut self.decoder, chunk)? {
            self.findings.suffers(self.label, &self.key(chunk.pack), &what, Some(path));
        }
        Ok(())
    }

    /// Whether the WAL that it stores is its own: names and headers prove nothing.
    fn wal(&self, manifest: &ManifestCursor, stored: &StoredWal) -> Result<()> {
        let (label, key) = (self.label, manifest.key());
        match self.repository.stored_contradiction(manifest, stored) {
            Ok(None) => {}
            Ok(Some(Contradiction { segment, what })) => {
                let path = format!("pg_wal/{segment}");
                let what = match what {
                    Some(what) => format!("{path} in it is not the WAL of backup {label}: it {what}"),
                    None => format!("{path}, which backup {label} needs, is not in it"),
                };
                self.findings.suffers(label, key, &what, Some(path.as_bytes()));
            }
            Err(error) => {
                let (object, what) = finding(error, key)?;
                self.findings.suffers(label, &object, &what, None);
            }
        }
        Ok(())
    }

    fn read(&mut self, chunk: &ChunkRef) -> Result<Vec<u8>> {
        self.repository.fetch_chunk(&mut self.decoder, chunk)
    }

    fn suffers_by(&self, path: &[u8], pack: PackId, error: Error) -> Result<()> {
        let (_, what) = finding(error, "")?;
        self.findings.suffers(self.label, &self.key(pack), &what, Some(path));
        Ok(())
    }

    fn key(&self, pack: PackId) -> String {
        layout::pack(&self.repository.stanza, pack)
    }
}
