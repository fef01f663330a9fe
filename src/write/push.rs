//! One file of `pg_wal` into the archive: success means that the store has confirmed it.

use std::fs::File;
use std::io::Read;
use std::panic::resume_unwind;
use std::path::Path;
use std::thread;

use crate::error::{Context, Error, Result};
use crate::format::CHUNK;
use crate::format::chunk::{ChunkId, Encoder, Keys, PackId};
use crate::format::manifest::Database;
use crate::format::pack::{PackKind, PackWriter};
use crate::postgres::{SegmentName, WalName};
use crate::repo::Repository;
use crate::repo::wal::wal_identity;
use crate::store::Body;

/// The largest WAL segment there can be.
const SEGMENT_BYTES_MAX: u64 = 1 << 30;

/// Threads that compress one file. More than a few are done before the last one has begun.
const ENCODE_THREADS_MAX: usize = 4;

/// What a push did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pushed {
    /// the file is now in the archive
    New,
    /// the archive had the same content already
    AlreadyThere,
}

/// Archives the file at `path`, named as PostgreSQL names it.
pub fn push(repository: &Repository, path: &Path, level: i32) -> Result<Pushed> {
    // the catalog is fetched while the file is read and compressed: both take their time
    let (info, file) = thread::scope(|scope| {
        let info = scope.spawn(|| repository.archive_info());
        let file = WalFile::read(repository, path).map(|file| {
            let stored = file.encode(&repository.keys, level, ENCODE_THREADS_MAX);
            (file, stored)
        });
        (info.join().unwrap_or_else(|panic| resume_unwind(panic)), file)
    });
    let (info, (file, stored)) = (info?, file?);
    let database = info.current()?;
    file.check(database)?;
    let archive = repository.archive(database);
    if let Some(there) = archive.find(&file.name)? {
        return file.compare(repository, &there.key);
    }
    put(repository, &file.key(repository, database), stored?)?;
    // somebody else may have pushed other content at the same moment: then both are told
    archive.find(&file.name)?.map(|_| Pushed::New).ok_or_else(|| not_listed(&file.name))
}

/// Writes the object of a file whose name was looked for; it counts when it is listed.
pub(super) fn put(repository: &Repository, key: &str, stored: Vec<u8>) -> Result<()> {
    Ok(repository.store.put(key, Body::Bytes(stored.into()))?)
}

/// A store that does not list what it confirmed.
pub(super) fn not_listed(name: &str) -> Error {
    Error::new(format!("{name} was written to the archive, but is not listed there"))
        .hint("the store does not list what it confirmed; it cannot be used as a repository")
}

/// A file of `pg_wal` in memory, named by its content.
pub(super) struct WalFile {
    pub(super) name: String,
    kind: WalName,
    bytes: Vec<u8>,
    chunks: Vec<ChunkId>,
    content: PackId,
}

impl WalFile {
    /// Reads it whole. Whose it is must be checked before it is put.
    pub(super) fn read(repository: &Repository, path: &Path) -> Result<Self> {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let kind = WalName::parse(name).map_err(|error| {
            Error::new(format!("{} is not a file of pg_wal", path.display()))
                .hint("archive_command passes the path as %p: \"pgcairn archive-push %p\"")
                .source(error)
        })?;
        let bytes = read(path)?;
        let chunks: Vec<ChunkId> = bytes.chunks(CHUNK).map(|plain| repository.keys.digest(plain).id).collect();
        let content = repository.keys.file(chunks.iter().copied());
        Ok(Self { name: name.to_owned(), kind, bytes, chunks, content })
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Which segment it is, if it is a whole one.
    pub(super) fn segment(&self) -> Option<SegmentName> {
        if let WalName::Segment(name) = self.kind { Some(name) } else { None }
    }

    /// Refuses what is not WAL of this cluster.
    pub(super) fn check(&self, database: &Database) -> Result<()> {
        let (name, len) = (&self.name, self.bytes.len() as u64);
        if len > database.wal_segment_size {
            return Err(Error::new(format!(
                "{name} has {len} bytes, a WAL segment of this cluster has {}",
                database.wal_segment_size
            )));
        }
        let (WalName::Segment(segment) | WalName::Partial(segment)) = self.kind else { return Ok(()) };
        if len != database.wal_segment_size {
            let expected = database.wal_segment_size;
            return Err(Error::new(format!("WAL segment {name} has {len} bytes, it should have {expected}")));
        }
        wal_identity(database)?.check_segment(segment, &self.bytes).map_err(|error| {
            Error::new(format!("{name} is not WAL of this stanza's cluster"))
                .hint("check --stanza in archive_command; a clone must not archive into its source's stanza")
                .source(error)
        })?;
        Ok(())
    }

    /// Whether what the archive has at `key`, under this file's name, is the same.
    pub(super) fn compare(&self, repository: &Repository, key: &str) -> Result<Pushed> {
        let same = if self.name.ends_with(".history") {
            let mut there = Vec::new();
            repository.read_pack(key, PackKind::Wal, |plain| {
                there.extend_from_slice(plain);
                Ok(())
            })?;
            there == self.bytes
        } else {
            key.ends_with(&self.content.to_string())
        };
        match same {
            true => Ok(Pushed::AlreadyThere),
            false => Err(Error::new(format!("the archive already holds {} with other content", self.name))
                .hint("another cluster, or a restored copy on the same timeline, archives into this stanza")),
        }
    }

    /// Where its object goes. The name is to be looked for before it is put, and again after, see [`push`].
    pub(super) fn key(&self, repository: &Repository, database: &Database) -> String {
        repository.archive(database).key(&self.name, self.content)
    }

    /// The object, made by up to this many threads.
    pub(super) fn encode(&self, keys: &Keys, level: i32, threads: usize) -> Result<Vec<u8>> {
        let chunks: Vec<(&[u8], ChunkId)> = self.bytes.chunks(CHUNK).zip(self.chunks.iter().copied()).collect();
        let threads = threads.min(thread::available_parallelism().map_or(1, usize::from)).min(chunks.len()).max(1);
        let mut pack = PackWriter::new(PackKind::Wal, keys.seal_kind(), self.content, 0);
        thread::scope(|scope| {
            let parts = chunks.chunks(chunks.len().div_ceil(threads).max(1));
            let encoding: Vec<_> = parts.map(|part| scope.spawn(move || encode(keys, part, level))).collect();
            let mut ahead = chunks.iter();
            for part in encoding {
                let stored = part.join().unwrap_or_else(|panic| resume_unwind(panic))?;
                stored.iter().zip(&mut ahead).for_each(|(stored, (plain, id))| _ = pack.add(*id, plain.len(), stored));
            }
            Ok(pack.finish())
        })
    }
}

fn encode(keys: &Keys, chunks: &[(&[u8], ChunkId)], level: i32) -> Result<Vec<Vec<u8>>> {
    let mut encoder = Encoder::new(level).context(|| "cannot set up zstd".into())?;
    let one = |(plain, id): &(&[u8], ChunkId)| {
        let mut stored = Vec::new();
        encoder.encode(keys, id, plain, &mut stored).context(|| "cannot compress".into())?;
        Ok(stored)
    };
    chunks.iter().map(one).collect()
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let file = File::open(path).map_err(|error| Error::io("open", path, error))?;
    let len = file.metadata().map_err(|error| Error::io("look at", path, error))?.len();
    if len > SEGMENT_BYTES_MAX {
        return Err(Error::new(format!("{} has {len} bytes, more than any WAL segment", path.display())));
    }
    let mut bytes = Vec::with_capacity(len as usize);
    file.take(len).read_to_end(&mut bytes).map_err(|error| Error::io("read", path, error))?;
    Ok(bytes)
}
