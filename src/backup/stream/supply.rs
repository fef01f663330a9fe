//! The entries of the server's archives as jobs for the workers, in the order in which they arrive.

use std::sync::Arc;

use super::base::BaseBackup;
use crate::backup::copy::{Jobs, Supply};
use crate::backup::parent::{Known, ParentIndex};
use crate::backup::run::Started;
use crate::backup::scan::{Scanned, ScannedKind, refuse_reserved};
use crate::backup::slot_channel::{Budget, Filler};
use crate::backup::source::Origin;
use crate::error::{Context, Error, Result};
use crate::format::manifest::Tablespace;
use crate::format::{INLINE_BYTES, LEAF_BYTES, SLOT};
use crate::postgres::control::CONTROL_FILE_BYTES;
use crate::postgres::tar::{TarEntry, TarKind, tar_padding};
use crate::postgres::{FileClass, Layout, Lsn, SegmentName, Timeline};
use crate::repo::wal::wal_identity;

/// No backup_label or tablespace_map is longer.
const TEXT_BYTES_MAX: u64 = 1 << 20;
/// Bytes at the beginning of a WAL segment that say whose it is.
const WAL_HEADER_BYTES: usize = 64;

/// A backup while it arrives.
pub(super) struct Incoming<'a> {
    pub(super) backup: BaseBackup,
    pub(super) tablespaces: &'a [Tablespace],
    /// permission bits of the data directory
    pub(super) root_mode: u32,
    pub(super) layout: Layout,
    pub(super) started: &'a Started,
    pub(super) parent: Option<ParentIndex>,
    pub(super) budget: Budget,
}

/// What arrived, apart from files.
pub(super) struct Arrived {
    pub(super) stop: (Lsn, Timeline),
    /// names of the data directory's user and group
    pub(super) owner: (String, String),
    pub(super) backup_label: String,
    pub(super) tablespace_map: String,
    pub(super) control: (Scanned, Vec<u8>),
    /// WAL stored with the backup
    pub(super) segments: Vec<SegmentName>,
}

/// The same while some of it is missing.
#[derive(Default)]
struct Gathered {
    owner: Option<(String, String)>,
    backup_label: Option<String>,
    tablespace_map: String,
    control: Option<(Scanned, Vec<u8>)>,
    segments: Vec<SegmentName>,
}

impl Supply for Incoming<'_> {
    type End = Arrived;

    fn hand_out(mut self, jobs: &mut Jobs) -> Result<Option<Arrived>> {
        let mut gathered = Gathered::default();
        if !self.links(jobs)
            || !self.archives(jobs, &mut gathered).context(|| "the server's files did not arrive".into())?
        {
            return Ok(None);
        }
        if !jobs.flush() {
            return Ok(None);
        }
        let missing = |what: &str| Error::new(format!("the server did not send {what}"));
        let stop = self.backup.finish().context(|| "the server did not end the backup".into())?;
        Ok(Some(Arrived {
            stop,
            owner: gathered.owner.unwrap_or_default(),
            backup_label: gathered.backup_label.ok_or_else(|| missing("backup_label"))?,
            tablespace_map: gathered.tablespace_map,
            control: gathered.control.ok_or_else(|| missing("pg_control"))?,
            segments: gathered.segments,
        }))
    }
}

/// A directory or link as the server sends it.
fn without_content(path: &[u8], mode: u32, mtime: i64, kind: ScannedKind) -> Scanned {
    Scanned { path: path.into(), mode, mtime, size: 0, kind, first_block: None, identity: None, is_settled: false }
}

impl Incoming<'_> {
    /// The data directory itself and the links to tablespaces, which are in no archive. False, as below, when nobody takes jobs
    /// any more.
    fn links(&self, jobs: &mut Jobs) -> bool {
        let entry = |path: &[u8], mode, kind| {
            let mtime = self.started.start_time;
            without_content(path, mode, mtime, kind)
        };
        let root = entry(b"", self.root_mode, ScannedKind::Directory);
        jobs.small(root, Known::New, Origin::Disk)
            && self.tablespaces.iter().all(|Tablespace { oid, path, .. }| {
                let link = ScannedKind::Link(path.as_bytes().into());
                let path = format!("pg_tblspc/{oid}");
                jobs.small(entry(path.as_bytes(), 0o777, link), Known::New, Origin::Disk)
            })
    }

    fn archives(&mut self, jobs: &mut Jobs, gathered: &mut Gathered) -> Result<bool> {
        while let Some(tablespace) = self.backup.archive()? {
            while let Some(mut entry) = self.backup.entry()? {
                if let Some(oid) = tablespace {
                    entry.path.splice(0..0, format!("pg_tblspc/{oid}/").into_bytes());
                }
                let shown = entry.path.escape_ascii().to_string();
                if !self.entry(entry, jobs, gathered).context(|| format!("{shown} did not arrive"))? {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    fn entry(&mut self, entry: TarEntry, jobs: &mut Jobs, gathered: &mut Gathered) -> Result<bool> {
        let TarEntry { path, mode, mtime, kind, user, group } = entry;
        refuse_reserved(&path)?;
        let class = self.layout.classify(&path);
        let size = match kind {
            TarKind::File(size) => size,
            // links to tablespaces are made from their list
            TarKind::Link(_) => return Ok(true),
            TarKind::Directory => {
                let found = without_content(&path, mode, mtime, ScannedKind::Directory);
                let is_kept = !matches!(class, FileClass::Skip(_));
                return Ok(!is_kept || jobs.small(found, Known::New, Origin::Disk));
            }
        };
        gathered.owner.get_or_insert((user, group));
        let first_block = match class {
            FileClass::Relation(relation) => Some(u64::from(relation.first_block)),
            _ => None,
        };
        let mut found = Scanned {
            path: path.into(),
            mode,
            mtime,
            size,
            kind: ScannedKind::File,
            first_block,
            identity: None,
            is_settled: false,
        };
        let goes_on = match (&*found.path, class) {
            (b"backup_label", _) => {
                gathered.backup_label = Some(self.text(size)?);
                true
            }
            (b"tablespace_map", _) => {
                gathered.tablespace_map = self.text(size)?;
                true
            }
            (_, FileClass::Control) => {
                if size != CONTROL_FILE_BYTES as u64 {
                    return Err(Error::new(format!("pg_control has {size} bytes")));
                }
                found.kind = ScannedKind::Control;
                let mut bytes = vec![0; CONTROL_FILE_BYTES];
                self.backup.read(&mut bytes)?;
                gathered.control = Some((found, bytes));
                true
            }
            (_, FileClass::Skip(_) | FileClass::KeepEmptyDirectory) => match self.segment(&found) {
                Some(segment) => {
                    gathered.segments.push(segment);
                    self.file(found, Some(segment), jobs)?
                }
                None => self.backup.skip(size).map(|()| true)?,
            },
            _ => self.file(found, None, jobs)?,
        };
        self.backup.skip(tar_padding(size) as u64)?;
        Ok(goes_on)
    }

    /// The WAL segment that this is, if it is to be stored with the backup.
    fn segment(&self, found: &Scanned) -> Option<SegmentName> {
        let name = std::str::from_utf8(&found.path).ok()?.strip_prefix("pg_wal/")?;
        let segment: SegmentName = name.parse().ok()?;
        let is_wanted = self.started.wal_stored
            && segment.timeline() == self.started.timeline
            && found.size == self.started.database.wal_segment_size;
        is_wanted.then_some(segment)
    }

    fn text(&mut self, size: u64) -> Result<String> {
        if size > TEXT_BYTES_MAX {
            return Err(Error::new(format!("it has {size} bytes")));
        }
        let mut bytes = vec![0; size as usize];
        self.backup.read(&mut bytes)?;
        String::from_utf8(bytes).context(|| "it is no text".into())
    }

    fn file(&mut self, found: Scanned, segment: Option<SegmentName>, jobs: &mut Jobs) -> Result<bool> {
        let known = match (&mut self.parent, segment) {
            (Some(parent), None) => parent.find(&found)?,
            _ => Known::New,
        };
        let size = found.size;
        if size <= INLINE_BYTES {
            let (filler, pieces) = self.budget.pieces();
            fill(&mut self.backup, &filler, size, |first| self.started.check_wal(segment, first))?;
            return Ok(jobs.small(found, known, Origin::Stream(pieces)));
        }
        let old = match known {
            Known::Changed(old) | Known::Same(old) => Some(old),
            Known::New => None,
        };
        let found = Arc::new(found);
        for leaf in 0..size.div_ceil(LEAF_BYTES) {
            let (filler, pieces) = self.budget.pieces();
            if !jobs.leaf(&found, leaf, old.as_ref(), Origin::Stream(pieces)) {
                return Ok(false);
            }
            let of_leaf = (size - leaf * LEAF_BYTES).min(LEAF_BYTES);
            let segment = segment.filter(|_| leaf == 0);
            if !fill(&mut self.backup, &filler, of_leaf, |first| self.started.check_wal(segment, first))? {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// Puts the next `size` bytes where a worker takes them; `check` sees the first slot.
fn fill(backup: &mut BaseBackup, filler: &Filler<'_>, size: u64, check: impl Fn(&[u8]) -> Result<()>) -> Result<bool> {
    let mut at = 0;
    while at < size {
        let len = (size - at).min(SLOT as u64);
        let read = |slot: &mut [u8]| {
            backup.read(slot)?;
            if at == 0 { check(slot) } else { Ok(()) }
        };
        if !filler.put(len as usize, read)? {
            return Ok(false);
        }
        at += len;
    }
    Ok(true)
}

impl Started {
    /// Fails unless `first` is the beginning of that segment of this cluster; of what is no segment everything is good.
    fn check_wal(&self, segment: Option<SegmentName>, first: &[u8]) -> Result<()> {
        let Some(segment) = segment else { return Ok(()) };
        let header = &first[..first.len().min(WAL_HEADER_BYTES)];
        let checked = wal_identity(&self.database)?.check_segment(segment, header);
        checked.map(drop).context(|| format!("WAL segment {segment} cannot be stored"))
    }
}
