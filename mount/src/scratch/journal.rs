//! The journal: an append-only file of checksummed frames, each applied whole or not at all.
//!
//! ```text
//! header   magic 8 | version u32 | length u32 | born u64 | identity (u32 + bytes) | crc32c u32 | padding to 8
//! frame    payload length u32 | crc32c u32 | durable u64 | payload | padding to 8
//! ```
//!
//! `born` is the length that was durable before the file got its name. `durable` is the offset that was known to be
//! durable when the frame was written. So a bad frame is a torn tail only if no valid frame behind it says that its
//! place had already been durable; otherwise the file is damaged, and opening it is an error.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use super::content::options;
use super::record::{self, FRAME_MAX, Record};
use crate::error::{Error, Result};

const MAGIC: [u8; 8] = *b"PGCAIRNJ";
const VERSION: u32 = 1;
const FIXED_HEADER: usize = 8 + 4 + 4 + 8 + 4;
const FRAME_HEADER: usize = 16;
const ALIGN: usize = 8;
const NAME: &str = "journal";
const NEW_NAME: &str = "journal.new";

/// A point of the journal's history; grows without end, also when the journal is rewritten.
pub(crate) type Lsn = u64;

/// What a journal held when it was opened.
pub(crate) struct Found {
    pub(crate) identity: String,
    /// the frames with their offsets
    pub(crate) frames: Vec<(u64, Vec<Record>)>,
    /// where the last whole frame ends
    pub(crate) end: u64,
}

pub(crate) struct Journal {
    directory: PathBuf,
    identity: String,
    writer: Mutex<Writer>,
    /// held while the file is being synced, so that those who wait meanwhile share the next sync
    syncing: Mutex<()>,
    durable: AtomicU64,
}

struct Writer {
    file: Arc<File>,
    /// bytes of the file
    end: u64,
    /// added to an offset gives its LSN
    lsn_base: Lsn,
    /// a sync or the undoing of a torn append failed: what is on disk is unknown, so nothing more is promised
    broken: bool,
    buffer: Vec<u8>,
}

/// The journal of a scratch directory, if it has one.
pub(crate) fn read(directory: &Path) -> Result<Option<Found>> {
    let path = directory.join(NAME);
    let mut bytes = Vec::new();
    match options().read(true).open(&path).and_then(|mut file| file.read_to_end(&mut bytes)) {
        Ok(_) => parse(&path, &bytes).map(Some),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::io("read", path, source)),
    }
}

impl Journal {
    /// Replaces the journal by one that says `records`, durably.
    pub(crate) fn create(directory: &Path, identity: &str, records: &[Record]) -> Result<Self> {
        let (file, end) = write_whole(directory, identity, records)
            .map_err(|source| Error::io("write", directory.join(NEW_NAME), source))?;
        Ok(Self {
            directory: directory.to_owned(),
            identity: identity.to_owned(),
            writer: Mutex::new(Writer { file: Arc::new(file), end, lsn_base: 0, broken: false, buffer: Vec::new() }),
            syncing: Mutex::new(()),
            durable: AtomicU64::new(end),
        })
    }

    /// Bytes of the file.
    pub(crate) fn len(&self) -> u64 {
        self.writer.lock().end
    }

    /// Where the next frame goes.
    pub(crate) fn end(&self) -> Lsn {
        let writer = self.writer.lock();
        writer.lsn_base + writer.end
    }

    /// Everything before this is on disk.
    pub(crate) fn durable(&self) -> Lsn {
        self.durable.load(Ordering::Acquire)
    }

    /// Appends one frame; it survives the end of this process, and a power loss once [`Self::sync`] covered it.
    pub(crate) fn append(&self, records: &[Record]) -> io::Result<Lsn> {
        let mut writer = self.writer.lock();
        if writer.broken {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let durable = self.durable().saturating_sub(writer.lsn_base);
        let mut buffer = std::mem::take(&mut writer.buffer);
        buffer.clear();
        let written =
            put_frame(&mut buffer, durable, records).and_then(|()| writer.file.write_all_at(&buffer, writer.end));
        let length = buffer.len() as u64;
        writer.buffer = buffer;
        if let Err(error) = written {
            // a torn frame must not stand between this one and the next
            writer.broken = writer.file.set_len(writer.end).is_err();
            return Err(error);
        }
        writer.end += length;
        Ok(writer.lsn_base + writer.end)
    }

    /// Returns once everything before `lsn` is on disk. Callers that come together share one sync.
    pub(crate) fn sync(&self, lsn: Lsn) -> io::Result<()> {
        if self.durable() >= lsn {
            return Ok(());
        }
        let _turn = self.syncing.lock();
        if self.durable() >= lsn {
            return Ok(());
        }
        let (file, end) = {
            let writer = self.writer.lock();
            if writer.broken {
                return Err(io::Error::from_raw_os_error(libc::EIO));
            }
            (Arc::clone(&writer.file), writer.lsn_base + writer.end)
        };
        // after a failed sync the kernel forgets what it could not write: no later one may claim it
        file.sync_data().inspect_err(|_| self.writer.lock().broken = true)?;
        self.durable.store(end, Ordering::Release);
        Ok(())
    }

    /// Replaces the content by the shorter `records`, durably. The caller keeps others from appending meanwhile.
    pub(crate) fn rewrite(&self, records: &[Record]) -> io::Result<()> {
        let _turn = self.syncing.lock();
        let mut writer = self.writer.lock();
        if writer.broken {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let (file, end) = write_whole(&self.directory, &self.identity, records)?;
        writer.lsn_base += writer.end;
        writer.file = Arc::new(file);
        writer.end = end;
        self.durable.store(writer.lsn_base + end, Ordering::Release);
        Ok(())
    }
}

fn put_frame(out: &mut Vec<u8>, durable: u64, records: &[Record]) -> io::Result<()> {
    let start = out.len();
    out.extend_from_slice(&[0; FRAME_HEADER]);
    record::encode(records, out);
    let length = out.len() - start - FRAME_HEADER;
    if length > FRAME_MAX {
        return Err(io::Error::from_raw_os_error(libc::EFBIG));
    }
    out[start..start + 4].copy_from_slice(&(length as u32).to_le_bytes());
    out[start + 8..start + 16].copy_from_slice(&durable.to_le_bytes());
    let sum = frame_sum(&out[start..]);
    out[start + 4..start + 8].copy_from_slice(&sum.to_le_bytes());
    pad(out);
    Ok(())
}

fn pad(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(ALIGN), 0);
}

/// Over the length, the durable offset and the payload: all but the sum itself.
fn frame_sum(frame: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&frame[..4]), &frame[8..])
}

fn write_whole(directory: &Path, identity: &str, records: &[Record]) -> io::Result<(File, u64)> {
    let mut bytes = Vec::new();
    let header_length = (FIXED_HEADER + identity.len() + 4).next_multiple_of(ALIGN);
    bytes.resize(header_length, 0);
    for some in records.chunks(16) {
        put_frame(&mut bytes, 0, some)?;
    }
    let born = bytes.len() as u64;
    let mut header = Vec::with_capacity(header_length);
    header.extend_from_slice(&MAGIC);
    header.extend_from_slice(&VERSION.to_le_bytes());
    header.extend_from_slice(&(header_length as u32).to_le_bytes());
    header.extend_from_slice(&born.to_le_bytes());
    header.extend_from_slice(&(identity.len() as u32).to_le_bytes());
    header.extend_from_slice(identity.as_bytes());
    header.extend_from_slice(&crc32c::crc32c(&header).to_le_bytes());
    bytes[..header.len()].copy_from_slice(&header);

    let path = directory.join(NEW_NAME);
    let file = options().create(true).truncate(true).read(true).write(true).open(&path)?;
    file.write_all_at(&bytes, 0)?;
    file.sync_all()?;
    fs::rename(&path, directory.join(NAME))?;
    File::open(directory)?.sync_all()?;
    Ok((file, born))
}

fn parse(path: &Path, bytes: &[u8]) -> Result<Found> {
    let damaged = |offset: usize, what: &str| Error::ScratchDamaged {
        path: path.to_owned(),
        offset: offset as u64,
        what: what.to_owned(),
    };
    let number = |at: usize| Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
    if bytes.len() < FIXED_HEADER || bytes[..8] != MAGIC {
        return Err(damaged(0, "not a journal"));
    }
    match number(8) {
        Some(VERSION) => {}
        found => {
            return Err(Error::ScratchVersion { path: path.to_owned(), found: found.unwrap_or(0), supported: VERSION });
        }
    }
    let header_length = number(12).unwrap_or(0) as usize;
    let identity_length = number(24).unwrap_or(0) as usize;
    let sum_at = FIXED_HEADER.saturating_add(identity_length);
    if sum_at > bytes.len() || header_length != (sum_at + 4).next_multiple_of(ALIGN) || header_length > bytes.len() {
        return Err(damaged(12, "the header's lengths do not fit"));
    }
    if number(sum_at) != Some(crc32c::crc32c(&bytes[..sum_at])) {
        return Err(damaged(sum_at, "the header's checksum does not match"));
    }
    let born = bytes[16..].first_chunk().map_or(0, |raw| u64::from_le_bytes(*raw));
    let identity = String::from_utf8_lossy(&bytes[FIXED_HEADER..sum_at]).into_owned();

    let mut frames = Vec::new();
    let mut at = header_length;
    let mut known_durable = born;
    while let Some((durable, payload, next)) = frame_at(bytes, at) {
        let records = record::decode(payload).map_err(|_| damaged(at, "a frame that is no list of records"))?;
        known_durable = known_durable.max(durable);
        frames.push((at as u64, records));
        at = next;
    }
    if (at as u64) < known_durable.max(durable_behind(bytes, at)) {
        return Err(damaged(at, "a frame that had been written durably is unreadable"));
    }
    Ok(Found { identity, frames, end: at as u64 })
}

/// The frame at an offset, if a whole and valid one is there: durable offset, payload, offset of the next.
fn frame_at(bytes: &[u8], at: usize) -> Option<(u64, &[u8], usize)> {
    let frame = bytes.get(at..)?;
    let length = u32::from_le_bytes(*frame.first_chunk()?) as usize;
    if length == 0 || length > FRAME_MAX {
        return None;
    }
    let next = (at + FRAME_HEADER + length).next_multiple_of(ALIGN);
    // with its padding, so that the next frame begins where this one says
    let frame = &bytes.get(at..next)?[..FRAME_HEADER + length];
    let sum = u32::from_le_bytes(*frame[4..].first_chunk()?);
    if sum != frame_sum(frame) {
        return None;
    }
    let durable = u64::from_le_bytes(*frame[8..].first_chunk()?);
    Some((durable, &frame[FRAME_HEADER..], next))
}

/// The furthest durable offset that any valid frame behind a bad one reports.
fn durable_behind(bytes: &[u8], bad: usize) -> u64 {
    let (mut at, mut durable) = (bad + ALIGN, 0);
    while at < bytes.len() {
        match frame_at(bytes, at) {
            Some((found, _, next)) => {
                durable = durable.max(found);
                at = next;
            }
            None => at += ALIGN,
        }
    }
    durable
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use std::fs::OpenOptions;

    use super::*;

    fn journal(frames: u64) -> (tempfile::TempDir, Journal) {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::create(dir.path(), "base", &[Record::NextInode { inode: 7 }]).unwrap();
        for inode in 0..frames {
            let lsn = journal.append(&[Record::Gone { inode }]).unwrap();
            if inode % 2 == 0 {
                journal.sync(lsn).unwrap();
            }
        }
        (dir, journal)
    }

    fn flip(dir: &Path, offset: u64) {
        let file = OpenOptions::new().read(true).write(true).open(dir.join(NAME)).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset).unwrap();
        file.write_all_at(&[byte[0] ^ 0x10], offset).unwrap();
    }

    #[test]
    fn what_was_appended_is_read() {
        let (dir, journal) = journal(5);
        let found = read(dir.path()).unwrap().unwrap();
        assert_eq!(found.identity, "base");
        assert_eq!(found.frames.len(), 6);
        assert_eq!(found.frames[5].1, [Record::Gone { inode: 4 }]);
        assert_eq!(found.end, journal.len());
    }

    #[test]
    fn rewriting_keeps_lsns_growing() {
        let (dir, journal) = journal(50);
        let before = journal.end();
        journal.rewrite(&[Record::NextInode { inode: 8 }]).unwrap();
        assert!(journal.end() > before && journal.durable() == journal.end());
        journal.append(&[Record::Gone { inode: 1 }]).unwrap();
        assert_eq!(read(dir.path()).unwrap().unwrap().frames.len(), 2);
    }

    #[test]
    fn a_torn_tail_is_cut_wherever_it_tears() {
        let (dir, journal) = journal(1);
        let whole = fs::read(dir.path().join(NAME)).unwrap();
        let born = read(dir.path()).unwrap().unwrap().frames[1].0;
        for length in born..journal.len() {
            fs::write(dir.path().join(NAME), &whole[..length as usize]).unwrap();
            assert_eq!(read(dir.path()).unwrap().unwrap().frames.len(), 1, "cut to {length}");
        }
        for length in 1..born {
            fs::write(dir.path().join(NAME), &whole[..length as usize]).unwrap();
            assert!(read(dir.path()).is_err(), "cut to {length}");
        }
    }

    #[test]
    fn damage_before_a_durable_point_is_an_error_with_its_place() {
        let (dir, _journal) = journal(6);
        let found = read(dir.path()).unwrap().unwrap();
        let whole = fs::read(dir.path().join(NAME)).unwrap();
        // the frame of inode 3 was durable when that of inode 5 was written
        let (third, fourth) = (found.frames[3].0, found.frames[4].0);
        // the padding behind the payload is not summed: nothing reads it
        for offset in third..fourth - 7 {
            fs::write(dir.path().join(NAME), &whole).unwrap();
            flip(dir.path(), offset);
            match read(dir.path()) {
                Err(Error::ScratchDamaged { offset: at, .. }) => assert_eq!(at, third),
                Ok(found) => panic!("flip at {offset} read as {} frames", found.unwrap().frames.len()),
                Err(other) => panic!("{other}"),
            }
        }
    }

    #[test]
    fn a_hole_among_frames_never_synced_is_a_tail() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::create(dir.path(), "base", &[Record::Mark]).unwrap();
        for inode in 0..4 {
            journal.append(&[Record::Gone { inode }]).unwrap();
        }
        let second = read(dir.path()).unwrap().unwrap().frames[2].0;
        flip(dir.path(), second);
        let found = read(dir.path()).unwrap().unwrap();
        assert_eq!((found.frames.len(), found.end), (2, second));
    }

    #[test]
    fn another_version_is_named() {
        let (dir, _journal) = journal(0);
        flip(dir.path(), 8);
        assert!(matches!(read(dir.path()), Err(Error::ScratchVersion { found: 17, supported: 1, .. })));
    }
}
