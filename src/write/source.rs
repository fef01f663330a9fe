//! A file of the data directory while it is read, and the checksums of its pages.

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::scan::Scanned;
use crate::error::{Error, Result};
use crate::postgres::{Lsn, page};

/// How page checksums are judged.
#[derive(Clone, Copy, Debug)]
pub struct Pages {
    /// BLCKSZ in bytes
    pub size: usize,
    /// a page changed after this point may be torn: WAL heals it
    pub start: Lsn,
}

/// A page whose checksum is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadPage {
    /// number of the block in its file
    pub block: u64,
    /// when its header says that it was changed after the backup's start: then it may be torn, and WAL heals it, unless no WAL
    /// reaches so far
    pub torn: Option<Lsn>,
}

/// A file of the data directory, open.
pub(super) struct Source {
    file: File,
    path: PathBuf,
}

impl Source {
    /// Opens a file; `None` when it vanished.
    pub(super) fn open(root: &Path, scanned: &Scanned) -> Result<Option<Self>> {
        let path = root.join(scanned.os_path());
        match File::open(&path) {
            Ok(file) => Ok(Some(Self { file, path })),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io("open", &path, error)),
        }
    }

    /// Fills `buf`; what lies past the end of a file truncated meanwhile reads as zeros, which WAL replay mends.
    pub(super) fn read(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            match self.file.read_at(&mut buf[done..], at + done as u64) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::io("read", &self.path, error)),
            }
        }
        buf[done..].fill(0);
        Ok(())
    }

    /// The time of its last change, now that it was read: later than when it was found, it may have been changed while it was read.
    pub(super) fn modified(&self) -> Result<i64> {
        let metadata = self.file.metadata().map_err(|error| Error::io("look at", &self.path, error))?;
        Ok(metadata.mtime())
    }

    /// Checks every page of a slot that was read from `at`; a page that fails is read once more, since the server may have
    /// been writing it.
    pub(super) fn check_pages(
        &self,
        pages: Pages,
        first_block: u64,
        at: u64,
        slot: &mut [u8],
        bad_pages: &mut Vec<BadPage>,
    ) -> Result<()> {
        for (number, page) in slot.chunks_mut(pages.size).enumerate() {
            let block = at / pages.size as u64 + number as u64;
            if page.len() < pages.size || wrong(page, first_block + block).is_none() {
                continue;
            }
            self.read(block * pages.size as u64, page)?;
            if let Some(lsn) = wrong(page, first_block + block) {
                bad_pages.push(BadPage { block, torn: (lsn >= pages.start).then_some(lsn) });
            }
        }
        Ok(())
    }
}

/// The position of the last change that a page names whose checksum is wrong.
fn wrong(page: &[u8], block: u64) -> Option<Lsn> {
    match page::verify(page, block as u32) {
        page::Verdict::Ok | page::Verdict::New => None,
        page::Verdict::Mismatch { lsn, .. } => Some(lsn),
    }
}
