//! One file of `pg_wal` into the archive: success means that the store has confirmed it.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::error::{Context, Error, Result};
use crate::format::CHUNK;
use crate::format::chunk::{ChunkId, Encoder, Keys, PackId};
use crate::format::manifest::Database;
use crate::format::pack::{PackKind, PackWriter};
use crate::postgres::WalName;
use crate::repo::Repository;
use crate::repo::wal::wal_identity;
use crate::store::Body;

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
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let kind = WalName::parse(name).map_err(|error| {
        Error::new(format!("{} is not a file of pg_wal", path.display()))
            .hint("archive_command passes the path as %p: \"pgcairn archive-push %p\"")
            .source(error)
    })?;
    let info = repository.archive_info()?;
    let database = info.current()?;
    let bytes = read(path, database)?;
    check(kind, name, &bytes, database)?;
    let chunks: Vec<ChunkId> = bytes.chunks(CHUNK).map(|plain| repository.keys.digest(plain).id).collect();
    let content = repository.keys.file(chunks.iter().copied());
    let archive = repository.archive(database);
    if let Some(there) = archive.find(name)? {
        return compare(repository, name, &there.key, content, &bytes);
    }
    let key = archive.key(name, content);
    repository.store.put(&key, Body::Bytes(encode(&repository.keys, content, &bytes, &chunks, level)?.into()))?;
    // somebody else may have pushed other content at the same moment: then both are told
    archive.find(name)?.map(|_| Pushed::New).ok_or_else(|| {
        Error::new(format!("{name} was written to the archive, but is not listed there"))
            .hint("the store does not list what it confirmed; it cannot be used as a repository")
    })
}

fn read(path: &Path, database: &Database) -> Result<Vec<u8>> {
    let file = File::open(path).map_err(|error| Error::io("open", path, error))?;
    let len = file.metadata().map_err(|error| Error::io("look at", path, error))?.len();
    if len > database.wal_segment_size {
        return Err(Error::new(format!(
            "{} has {len} bytes, a WAL segment of this cluster has {}",
            path.display(),
            database.wal_segment_size
        )));
    }
    let mut bytes = Vec::with_capacity(len as usize);
    file.take(len).read_to_end(&mut bytes).map_err(|error| Error::io("read", path, error))?;
    Ok(bytes)
}

/// Refuses what is not WAL of this cluster.
fn check(kind: WalName, name: &str, bytes: &[u8], database: &Database) -> Result<()> {
    let (WalName::Segment(segment) | WalName::Partial(segment)) = kind else { return Ok(()) };
    if bytes.len() as u64 != database.wal_segment_size {
        return Err(Error::new(format!(
            "WAL segment {name} has {} bytes, it should have {}",
            bytes.len(),
            database.wal_segment_size
        )));
    }
    wal_identity(database)?.check_segment(segment, bytes).map_err(|error| {
        Error::new(format!("{name} is not WAL of this stanza's cluster"))
            .hint("check --stanza in archive_command; a clone must not archive into its source's stanza")
            .source(error)
    })?;
    Ok(())
}

fn compare(repository: &Repository, name: &str, key: &str, content: PackId, bytes: &[u8]) -> Result<Pushed> {
    let same = if name.ends_with(".history") {
        let mut there = Vec::new();
        repository.read_pack(key, PackKind::Wal, |plain| {
            there.extend_from_slice(plain);
            Ok(())
        })?;
        there == bytes
    } else {
        key.ends_with(&content.to_string())
    };
    match same {
        true => Ok(Pushed::AlreadyThere),
        false => Err(Error::new(format!("the archive already holds {name} with other content"))
            .hint("another cluster, or a restored copy on the same timeline, archives into this stanza")),
    }
}

fn encode(keys: &Keys, content: PackId, bytes: &[u8], chunks: &[ChunkId], level: i32) -> Result<Vec<u8>> {
    let mut encoder = Encoder::new(level).context(|| "cannot set up zstd".into())?;
    let mut pack = PackWriter::new(PackKind::Wal, keys.seal_kind(), content, 0);
    let mut stored = Vec::new();
    for (plain, id) in bytes.chunks(CHUNK).zip(chunks) {
        stored.clear();
        encoder.encode(keys, id, plain, &mut stored).context(|| "cannot compress".into())?;
        pack.add(*id, plain.len(), &stored);
    }
    Ok(pack.finish())
}
