//! A file while it is read, from the data directory or as it arrives in a stream, and the checksums of its pages.

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::scan::Scanned;
use super::slot_channel::Pieces;
use crate::error::{Error, Result};
use crate::files;
use crate::postgres::{Lsn, page};
use crate::user::{User, as_user};

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

/// Where the bytes of a file are.
#[derive(Debug)]
pub enum Origin {
    /// in the data directory
    Disk,
    /// on their way from the server; of a large file those of one leaf
    Stream(Pieces),
}

/// A file, open. What arrives in a stream is read once, from its first byte to its last.
pub(super) enum Source<'a> {
    Disk(File, PathBuf),
    Stream(&'a Pieces, &'a Scanned),
}

impl<'a> Source<'a> {
    /// Opens a file; `None` when it vanished.
    pub(super) fn open(
        root: &Path,
        user: Option<&User>,
        scanned: &'a Scanned,
        origin: &'a Origin,
    ) -> Result<Option<Self>> {
        if let Origin::Stream(pieces) = origin {
            return Ok(Some(Self::Stream(pieces, scanned)));
        }
        let path = root.join(scanned.os_path());
        // as the user: since it was found, a link to a file that the user may not read may have come in its place
        as_user(user, || match open_file(&path) {
            Ok(file) => Ok(Some(Self::Disk(file, path))),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io("open", &path, error)),
        })
    }

    /// Fills `buf`, which is a slot.
    pub(super) fn read(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        match self {
            Self::Disk(file, path) => read_at(file, at, buf).map_err(|error| Error::io("read", path, error)),
            Self::Stream(pieces, _) => pieces.next(buf),
        }
    }

    /// Reads a page that failed once more, where that can be done: the server may have been writing it. In a stream the server
    /// has done it already, unless it can see that WAL heals the page.
    fn reread(&self, at: u64, page: &mut [u8]) -> Result<()> {
        match self {
            Self::Disk(..) => self.read(at, page),
            Self::Stream(..) => Ok(()),
        }
    }

    /// The time of its last change. On disk it is seen now that the file was read: later than when it was found, it may have been
    /// changed while it was read.
    pub(super) fn modified(&self) -> Result<i64> {
        match self {
            Self::Disk(file, path) => {
                let metadata = file.metadata().map_err(|error| Error::io("look at", path, error))?;
                Ok(metadata.mtime())
            }
            Self::Stream(_, scanned) => Ok(scanned.mtime),
        }
    }

    /// Checks every page of a slot that was read from `at`; a page that fails is read once more.
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
            self.reread(block * pages.size as u64, page)?;
            if let Some(lsn) = wrong(page, first_block + block) {
                bad_pages.push(BadPage { block, torn: (lsn >= pages.start).then_some(lsn) });
            }
        }
        Ok(())
    }
}

/// Never waits for a pipe that came in the place of a file.
fn open_file(path: &Path) -> std::io::Result<File> {
    // what is no file any more is gone
    let gone = |error: std::io::Error| {
        if error.kind() == ErrorKind::InvalidInput { ErrorKind::NotFound.into() } else { error }
    };
    files::open_regular(path).map_err(gone)
}

/// Fills `buf`; what lies past the end of a file truncated meanwhile reads as zeros, which WAL replay mends.
fn read_at(file: &File, at: u64, buf: &mut [u8]) -> std::io::Result<()> {
    let done = files::read_full(file, at, buf)?;
    buf[done..].fill(0);
    Ok(())
}

/// The position of the last change that a page names whose checksum is wrong.
fn wrong(page: &[u8], block: u64) -> Option<Lsn> {
    match page::verify(page, block as u32) {
        page::Verdict::Ok | page::Verdict::New => None,
        page::Verdict::Mismatch { lsn, .. } => Some(lsn),
    }
}
