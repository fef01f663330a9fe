//! Files that are there already, made equal: what is the same is read here and not fetched, what differs is written.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::fcntl::OFlag;

use super::plan::Target;
use super::write::{Part, add_part, whole_crc};
use crate::error::{Error, Result};
use crate::files;
use crate::format::chunk::Keys;
use crate::format::map::SlotChange;
use crate::format::{CHUNK, GRAIN, LEAF_BYTES, SLOT};
use crate::read::view::{Content, Span, View};
use crate::user::{User, as_user};

/// Compares files with a view, and writes what differs.
#[derive(Debug)]
pub(super) struct Delta<'a> {
    view: &'a View,
    /// as whom files are opened
    user: Option<&'a User>,
    /// bytes that were the same
    equal: AtomicU64,
}

/// What is known of a range of a file without fetching it.
enum Known {
    /// what the backup noted of its slots, from the first byte of the range
    Slots(Vec<SlotChange>),
    /// the chunks that hold it
    Chunks(Vec<Span>),
    /// all of it
    Bytes(Vec<u8>),
    /// nothing: it is fetched
    Nothing,
}

/// What came of reading a range.
#[derive(Default)]
pub(super) struct Compared {
    /// runs that are the same
    pub(super) parts: Vec<Part>,
    /// runs that are not, from first byte to behind the last
    pub(super) differing: Vec<(u64, u64)>,
    /// bytes that are the same
    pub(super) equal: u64,
}

impl<'a> Delta<'a> {
    /// Compares with `view`, which was loaded with what the backup noted.
    pub(super) fn new(view: &'a View, user: Option<&'a User>) -> Self {
        Self { view, user, equal: AtomicU64::new(0) }
    }

    /// Bytes that were the same so far.
    pub(super) fn equal(&self) -> u64 {
        self.equal.load(Ordering::Relaxed)
    }

    /// Makes a range of a file equal, which begins where a leaf does; gives the file, and CRC32C and length of what is there now.
    pub(super) fn range(&self, target: &Target, from: u64, to: u64) -> Result<(File, u32, usize)> {
        let file = as_user(self.user, || open(target))?;
        let known = self.known(target, from, to)?;
        let Compared { mut parts, differing, equal } = self.compare(&file, target, &known, from, to)?;
        self.view.each_of_ranges(target.node, &differing, &mut |at, bytes| {
            add_part(&mut parts, at, bytes);
            file.write_all_at(bytes, at).map_err(|error| Error::io("write", &target.path, error))
        })?;
        self.equal.fetch_add(equal, Ordering::Relaxed);
        Ok((file, whole_crc(parts), (to - from) as usize))
    }

    /// Compares a whole small file and writes nothing.
    pub(super) fn small(&self, target: &Target) -> Result<(File, Compared)> {
        let file = as_user(self.user, || open(target))?;
        let known = self.known(target, 0, target.size)?;
        let compared = self.compare(&file, target, &known, 0, target.size)?;
        self.equal.fetch_add(compared.equal, Ordering::Relaxed);
        Ok((file, compared))
    }

    fn known(&self, target: &Target, from: u64, to: u64) -> Result<Known> {
        let len = (to - from) as usize;
        match &self.view.node(target.node)?.content {
            _ if len == 0 => Ok(Known::Nothing),
            Content::Inline { .. } | Content::Mapped { .. } => {
                match self.view.changes(target.node, from / LEAF_BYTES) {
                    Ok(changes) => Ok(changes.map_or(Known::Nothing, Known::Slots)),
                    // what is noted is not needed for a restore: the file itself may be whole
                    Err(error) if error.is_damage() || error.is_not_found() => {
                        tracing::warn!(%error, path = %target.path.display(), "cannot be compared, all of it is fetched");
                        Ok(Known::Nothing)
                    }
                    Err(error) => Err(error),
                }
            }
            Content::Archived { .. } => Ok(Known::Chunks(self.view.spans(target.node, from, len)?)),
            _ => {
                let mut bytes = vec![0; len];
                self.view.read_at(target.node, from, &mut bytes)?;
                Ok(Known::Bytes(bytes))
            }
        }
    }

    fn compare(&self, file: &File, target: &Target, known: &Known, from: u64, to: u64) -> Result<Compared> {
        let keys = &self.view.fetcher().repository().keys;
        let mut compared = Compared::default();
        let mut buffer = vec![0; (to - from).min(CHUNK as u64) as usize];
        for at in (from..to).step_by(CHUNK) {
            let len = (to - at).min(CHUNK as u64) as usize;
            let there = files::read_full(file, at, &mut buffer[..len])
                .map_err(|error| Error::io("read", &target.path, error))?;
            let mut begins = 0;
            for unit in buffer[..len].chunks(known.unit()) {
                let ends = begins + unit.len();
                let is_same = ends <= there && known.is(keys, (at - from) as usize + begins, unit);
                compared.add(at + begins as u64, unit, is_same);
                begins = ends;
            }
        }
        Ok(compared)
    }
}

impl Known {
    /// Bytes that are compared at once; a run of [`CHUNK`] bytes is a whole number of them.
    fn unit(&self) -> usize {
        match self {
            Self::Chunks(_) => CHUNK,
            _ => GRAIN,
        }
    }

    /// Whether the unit that begins `at` bytes behind the beginning of the range is this.
    fn is(&self, keys: &Keys, at: usize, unit: &[u8]) -> bool {
        match self {
            Self::Slots(slots) => {
                let noted = slots.get(at / SLOT).and_then(|slot| slot.grains.get(at % SLOT / GRAIN));
                noted.is_some_and(|grain| *grain == keys.grain(unit))
            }
            Self::Chunks(spans) => spans.get(at / CHUNK).is_some_and(|span| {
                let is_whole =
                    (span.offset, span.len) == (0, unit.len()) && span.chunk.plain_len as usize == unit.len();
                is_whole && keys.digest(unit).id == span.chunk.id
            }),
            Self::Bytes(bytes) => bytes.get(at..at + unit.len()) == Some(unit),
            Self::Nothing => false,
        }
    }
}

impl Compared {
    /// Adds the next unit, which begins at `at`.
    fn add(&mut self, at: u64, unit: &[u8], is_same: bool) {
        let end = at + unit.len() as u64;
        if !is_same {
            match self.differing.last_mut() {
                Some((_, last)) if *last == at => *last = end,
                _ => self.differing.push((at, end)),
            }
            return;
        }
        self.equal += unit.len() as u64;
        add_part(&mut self.parts, at, unit);
    }
}

fn open(target: &Target) -> Result<File> {
    let flags = (OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits();
    let opened = OpenOptions::new().read(true).write(true).custom_flags(flags).open(&target.path);
    opened.map_err(|error| Error::io("open", &target.path, error))
}
