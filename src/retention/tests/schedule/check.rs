//! The repository against the model.

use std::collections::BTreeSet;

use super::super::{database, segment, wal_bytes};
use super::model::{Files, WalLeft};
use super::steps::open;
use super::world::World;
use crate::error::Result;
use crate::format::LEAF_BYTES;
use crate::format::chunk::{ChunkRef, Decoder, PackId};
use crate::format::manifest::{File, Node, Place};
use crate::format::map::{Leaf, changes_base};
use crate::postgres::BackupKind;
use crate::progress::Silent;
use crate::read::view::{Content, NodeIndex, View};
use crate::repo::{Repository, layout};
use crate::verify::{Gap, Report, VerifyOptions, verify};

impl World {
    pub(super) fn verify(&self, quick: bool) -> Report {
        verify(&self.repository, &VerifyOptions { quick, process_max: 2 }, &Silent).unwrap()
    }

    /// What must be readable is, and verify has nothing to say.
    pub(super) fn check(&mut self, thorough: bool) {
        let labels: Vec<String> = self.model.backups.keys().cloned().collect();
        assert_eq!(self.repository.labels().unwrap(), labels);
        labels.iter().for_each(|label| self.check_backup(label));
        let archived = self.archived();
        let lost: Vec<_> = self.model.wal.iter().filter(|number| !archived.contains(number)).collect();
        assert!(lost.is_empty(), "lost WAL: {lost:?}");
        let known = self.repository.backup_info().unwrap();
        assert!(known.backups.keys().eq(&labels));
        for quick in if thorough { vec![true, false] } else { vec![true] } {
            let report = self.verify(quick);
            assert!(report.harms.is_empty() && report.backups.iter().all(|of| of.sound), "{report:#?}");
            // WAL that one retention let go, and another would have kept
            let is_released = |number: u64| number < self.wal.next() && !self.model.wal.contains(&number);
            let released: BTreeSet<String> = (1..self.wal.next())
                .filter(|number| is_released(*number))
                .map(|number| segment(1, number).to_string())
                .collect();
            let numbers = |gap: &Gap| released.contains(&gap.first) && released.contains(&gap.last);
            assert!(report.gaps.iter().all(numbers), "{report:#?}");
            assert_eq!(report.sound, report.gaps.is_empty());
            assert_eq!(report.backups.len(), labels.len());
        }
        self.read_mounts();
        self.check_leaving();
    }

    /// What a removed backup needs stays for the grace period.
    fn check_leaving(&self) {
        let there: BTreeSet<String> = self.keys("chunk/").into_iter().collect();
        for leaving in &self.leaving {
            let lost: Vec<&String> = leaving.packs.difference(&there).collect();
            assert!(
                lost.is_empty(),
                "{} went at {}, now it is {}, and {lost:?} is lost",
                leaving.label,
                leaving.gone,
                self.now()
            );
        }
    }

    /// Every byte of a backup, through a view of its own, and its WAL.
    pub(super) fn check_backup(&self, label: &str) {
        let (view, of) = (open(&self.repository, label), &self.model.backups[label]);
        check_files(&view, &of.files, label).unwrap();
        for number in of.wal.0..=of.wal.1 {
            let name = segment(1, number);
            let path = format!("pg_wal/{name}");
            assert!(read(&view, path.as_bytes()).unwrap() == wal_bytes(name), "{path} of {label}");
        }
    }

    fn read_mounts(&mut self) {
        for mount in &self.mounts {
            let found = check_files(&mount.view, &mount.files, &mount.label);
            assert!(
                found.is_ok() || mount.doubtful,
                "the mount of {}, removed at {:?}, now it is {}: {found:?}",
                mount.label,
                mount.gone,
                self.now()
            );
        }
    }

    /// Numbers of the segments in the archive.
    fn archived(&self) -> BTreeSet<u64> {
        let mut names = BTreeSet::new();
        self.repository.archive(&database()).files(|name, _| _ = names.insert(name.to_owned())).unwrap();
        (1..self.wal.next()).filter(|number| names.contains(&segment(1, *number).to_string())).collect()
    }

    /// Each object is one that somebody needs.
    pub(super) fn check_nothing_is_left_over(&self, wal: &WalLeft) {
        let mut expected: BTreeSet<String> = BTreeSet::new();
        for name in ["archive/main/archive.info", "backup/main/backup.info"] {
            expected.extend([name.to_owned(), format!("{name}.copy")]);
        }
        for (label, of) in &self.model.backups {
            expected.insert(layout::manifest("main", label));
            expected.extend(of.chunks.iter().map(|chunk| layout::pack("main", chunk.pack)));
            let pointer = match of.kind {
                BackupKind::Full => "latest-full",
                BackupKind::Diff => "latest-diff",
                BackupKind::Incr => "latest-incr",
            };
            expected.extend([layout::latest("main", pointer), layout::latest("main", "latest")]);
        }
        let found: BTreeSet<String> =
            self.keys("").into_iter().filter(|key| !key.starts_with("archive/main/15")).collect();
        let (lost, left): (Vec<_>, Vec<_>) =
            (expected.difference(&found).collect(), found.difference(&expected).collect());
        assert!(lost.is_empty() && left.is_empty(), "lost {lost:?}, left over {left:?}");
        let left: Vec<u64> = self.archived().into_iter().filter(|number| !wal.has(*number)).collect();
        assert!(left.is_empty(), "left over WAL: {left:?}");
    }
}

/// Demands all files of `files`, in every byte, and no other.
///
/// # Errors
/// When something cannot be read. What can be read must be right.
pub(super) fn check_files(view: &View, files: &Files, label: &str) -> Result<()> {
    let stored = (0..view.len() as NodeIndex)
        .filter(|node| matches!(view.node(*node).unwrap().content, Content::Inline { .. } | Content::Mapped { .. }));
    assert_eq!(stored.count(), files.len(), "files of {label}");
    let mut failure = Ok(());
    for (path, bytes) in files {
        match read(view, path) {
            Ok(found) => assert!(found == *bytes, "{} of {label} is wrong", path.escape_ascii()),
            Err(error) => failure = Err(error),
        }
    }
    failure
}

fn read(view: &View, path: &[u8]) -> Result<Vec<u8>> {
    let child = |node, name| view.child(node, name).unwrap_or_else(|| panic!("no {}", path.escape_ascii()));
    let node = path.split(|byte| *byte == b'/').fold(0, child);
    let mut bytes = vec![0; view.size(node)? as usize];
    let read = view.read_at(node, 0, &mut bytes)?;
    assert_eq!(read, bytes.len());
    Ok(bytes)
}

/// Every chunk that a backup needs, but for those in its manifest; and the packs it says it needs are theirs.
pub(super) fn chunks_of(repository: &Repository, label: &str) -> Vec<ChunkRef> {
    let mut decoder = Decoder::new().unwrap();
    let mut manifest = repository.open_manifest(label).unwrap();
    let (own, mut chunks) = (manifest.pack(), Vec::new());
    while let Some(entry) = manifest.next().unwrap() {
        let Node::File(File { size, place, .. }) = entry.node else { continue };
        match place {
            Place::Inline { extents, changes } => {
                chunks.extend(extents.iter().map(|extent| extent.chunk));
                chunks.extend(changes.map(|(chunk, _)| chunk));
            }
            Place::Leaves(leaves) => {
                for (number, at) in leaves.iter().enumerate() {
                    let len = (size - number as u64 * LEAF_BYTES).min(LEAF_BYTES);
                    let map = repository.fetch_chunk(&mut decoder, &at.map).unwrap();
                    let leaf = Leaf::decode("leaf", &map, len).unwrap();
                    chunks.extend((0..leaf.slots()).flat_map(|slot| leaf.slot(slot)).map(|extent| extent.chunk));
                    let changes = repository.fetch_chunk(&mut decoder, &at.changes).unwrap();
                    chunks.extend([at.map, at.changes].into_iter().chain(changes_base("changes", &changes).unwrap()));
                }
            }
            Place::Index(_) => panic!("no file is so large"),
        }
    }
    chunks.retain(|chunk| chunk.pack != own);
    let needed: BTreeSet<PackId> = chunks.iter().map(|chunk| chunk.pack).collect();
    let said: BTreeSet<PackId> = repository.manifest_packs(label).unwrap().iter().map(|of| of.pack).collect();
    assert_eq!(needed, said, "the packs of {label}");
    chunks
}
