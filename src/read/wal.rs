//! Archived WAL files: as a file of a view, and as `archive-get` delivers them.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::panic::resume_unwind;
use std::path::Path;
use std::thread;

use super::fetch::Fetcher;
use crate::error::{Context, Error, Result};
use crate::files::{self, Outlives};
use crate::format::chunk::{ChunkRef, Decoder};
use crate::format::manifest::Database;
use crate::format::pack::{HEADER_LEN, Header, Pack, PackKind, TRAILER_LEN, Trailer, WalKey};
use crate::format::{CHUNK, FormatError};
use crate::postgres::{SegmentName, WalName};
use crate::repo::Repository;
use crate::repo::asking::Asking;
use crate::repo::reread;
use crate::repo::wal::{check_first_bytes, check_history};
use crate::user::{User, as_user};

/// An archived object up to this size is fetched whole: its footer alone would cost as many requests.
const WHOLE_BYTES: u64 = 4 * 1024 * 1024;

/// The chunks of an archived file in file order, one for each [`CHUNK`]. A small object is fetched whole and its chunks are kept
/// in memory: whoever replays WAL reads it once.
pub fn open(fetcher: &Fetcher, system_id: u64, key: &str, size: u64) -> Result<Vec<ChunkRef>> {
    let store = &*fetcher.repository().store;
    if size <= WHOLE_BYTES {
        return reread::checked(store, |reads| {
            let bytes = reads.get(key)?;
            fetcher.count(bytes.len() as u64);
            let pack = Pack::parse(key, &bytes)?;
            pack.header.expect(key, PackKind::Wal, fetcher.repository().keys.seal_kind())?;
            fetcher.repository().keys.check_wal_content(key, Some(system_id), pack.header.id, &pack.chunks)?;
            fetcher.locate(pack.header.id, key);
            let is_segment = WalKey::parse(key).is_some_and(|key| key.name.parse::<SegmentName>().is_ok());
            for chunk in &pack.chunks {
                let stored = &bytes[chunk.offset as usize..chunk.end() as usize];
                // see `write` below
                let plain = if is_segment {
                    fetcher.open(key, chunk, stored)?
                } else {
                    fetcher.decode(key, chunk, stored)?.plain
                };
                check_history(key, key.rsplit('/').next().unwrap_or_default(), &plain)?;
                fetcher.keep_in_memory(chunk, plain);
            }
            Ok(pack.chunks)
        });
    }
    reread::checked(store, |reads| {
        let get = |offset: u64, len: u64| {
            fetcher.count(len);
            reads.get_range(key, offset, len)
        };
        let header = Header::parse(key, &get(0, HEADER_LEN as u64)?)?;
        header.expect(key, PackKind::Wal, fetcher.repository().keys.seal_kind())?;
        let trailer = Trailer::parse(key, size, &get(size - TRAILER_LEN as u64, TRAILER_LEN as u64)?)?;
        let footer = get(trailer.footer_offset, u64::from(trailer.footer_len))?;
        let chunks = trailer.footer(key, header.id, &footer)?;
        fetcher.repository().keys.check_wal_content(key, Some(system_id), header.id, &chunks)?;
        fetcher.locate(header.id, key);
        Ok(chunks)
    })
}

/// Why `archive-get` delivered nothing. The difference decides whether PostgreSQL ends recovery or stops.
#[derive(Debug)]
pub enum GetError {
    /// the archive has no such file
    NotThere,
    /// it could not be found out or delivered
    Failed(Error),
}

/// Writes an archived file of the stanza's current cluster to `target`, which appears whole or not at all.
///
/// It is not synced: PostgreSQL reads it at once, and syncs and renames what it keeps of it.
pub fn get(repository: &Repository, name: &str, target: &Path) -> std::result::Result<(), GetError> {
    get_for(repository, None, name, target, &|| ())
}

/// The same of the cluster that asks; calls `found` when the file is there, before it is fetched.
pub fn get_for(
    repository: &Repository,
    asking: Option<&Asking>,
    name: &str,
    target: &Path,
    found: &dyn Fn(),
) -> std::result::Result<(), GetError> {
    let parsed = WalName::parse(name).context(|| format!("{name} is not a file of the archive"));
    parsed.map_err(GetError::Failed)?;
    let info = repository.archive_info().map_err(GetError::Failed)?;
    for database in info.asked_for(&repository.stanza, asking).map_err(GetError::Failed)? {
        if let Some(object) = repository.archive(database).find(name).map_err(GetError::Failed)? {
            found();
            return deliver(repository, database, name, &object.key, target, THREADS_MAX).map_err(GetError::Failed);
        }
    }
    Err(GetError::NotThere)
}

/// Threads that decompress and check one file. More than a few are done before the last one has begun.
const THREADS_MAX: usize = 4;

/// Writes the archived file `name`, whose object is `key`, to `target`, by way of a temporary file beside it.
pub(crate) fn deliver(
    repository: &Repository,
    database: &Database,
    name: &str,
    key: &str,
    target: &Path,
    threads: usize,
) -> Result<()> {
    let temporary = target.with_extension(TEMPORARY);
    let user = User::owner_of_place(target)?;
    reread::checked(&*repository.store, |reads| {
        // the store is read as ourselves
        let bytes = reads.get(key)?;
        as_user(user.as_ref(), || {
            // PostgreSQL makes durable what it takes
            files::place(&temporary, target, Outlives::Process, |to| {
                write(repository, database, name, (key, &bytes), to, threads)
            })
        })
    })
}

/// What a file is called while it is written.
pub(crate) const TEMPORARY: &str = "pgcairn-tmp";

fn write(
    repository: &Repository,
    database: &Database,
    name: &str,
    (key, bytes): (&str, &[u8]),
    path: &Path,
    threads: usize,
) -> Result<()> {
    let pack = Pack::parse(key, bytes)?;
    pack.header.expect(key, PackKind::Wal, repository.keys.seal_kind())?;
    repository.keys.check_wal_content(key, Some(database.system_id), pack.header.id, &pack.chunks)?;
    let len: u64 = pack.chunks.iter().map(|chunk| u64::from(chunk.plain_len)).sum();
    let is_segment = matches!(WalName::parse(name), Ok(WalName::Segment(_)));
    if is_segment && len != database.wal_segment_size {
        return Err(FormatError::new(key, 0, format!("a WAL segment of {len} bytes")).into());
    }
    let file = File::create(path).map_err(|error| Error::io("create", path, error))?;
    let part = |chunks: &[ChunkRef], mut offset: u64| -> Result<()> {
        let mut decoder = Decoder::new().map_err(|error| Error::new("cannot set up zstd").source(error))?;
        // one buffer for all chunks: fresh ones would cost as much as decompressing
        let mut plain = Vec::with_capacity(CHUNK);
        for chunk in chunks {
            let stored = &bytes[chunk.offset as usize..chunk.end() as usize];
            match is_segment {
                // what is stored is proved by its seal, what comes out by the checksum of every WAL record when it is replayed
                true => decoder.decode_sealed(&repository.keys, key, chunk, stored, &mut plain)?,
                false => plain = decoder.decode(&repository.keys, key, chunk, stored)?.plain,
            }
            if offset == 0 {
                check_first_bytes(database, name, &plain)?;
                check_history(key, name, &plain)?;
            }
            file.write_all_at(&plain, offset).map_err(|error| Error::io("write", path, error))?;
            offset += plain.len() as u64;
        }
        Ok(())
    };
    let threads = threads.min(thread::available_parallelism().map_or(1, usize::from));
    let each = pack.chunks.len().div_ceil(threads.max(1)).max(1);
    thread::scope(|scope| {
        let mut offset = 0;
        let mut parts = Vec::new();
        for chunks in pack.chunks.chunks(each) {
            let part = &part;
            parts.push(scope.spawn(move || part(chunks, offset)));
            offset += chunks.iter().map(|chunk| u64::from(chunk.plain_len)).sum::<u64>();
        }
        parts.into_iter().try_for_each(|part| part.join().unwrap_or_else(|panic| resume_unwind(panic)))
    })
}

/// Fails unless the chunks are the runs of a file of `size` bytes.
pub fn check_cover(key: &str, chunks: &[ChunkRef], size: u64) -> Result<()> {
    let slot = CHUNK as u64;
    let whole = |(number, chunk): (usize, &ChunkRef)| {
        u64::from(chunk.plain_len) == size.saturating_sub(number as u64 * slot).min(slot)
    };
    match chunks.len() as u64 == size.div_ceil(slot) && chunks.iter().enumerate().all(whole) {
        true => Ok(()),
        false => Err(FormatError::new(key, 0, format!("its chunks do not make a file of {size} bytes")).into()),
    }
}
