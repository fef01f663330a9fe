//! One file of `pg_wal` into the archive: success means that the store has confirmed it.

use std::cell::RefCell;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::SystemTime;

use super::client::ready;
use super::protocol::{Content, Stamp};
use crate::error::{Context, Error, Result};
use crate::files;
use crate::format::chunk::{ChunkId, Encoder, Keys, PackId};
use crate::format::info::LockKind;
use crate::format::manifest::Database;
use crate::format::pack::{ENTRY_LEN, HEADER_LEN, PackKind, PackWriter, TRAILER_LEN, WalKey};
use crate::format::seal::SealKind;
use crate::format::{CHUNK, GRAIN};
use crate::postgres::wal::header::{LONG_PAGE_HEADER_BYTES, LongPageHeader};
use crate::postgres::wal::records::may_begin_restore_point;
use crate::postgres::{TimelineHistory, WalName};
use crate::repo::Repository;
use crate::repo::asking::Asking;
use crate::repo::wal::wal_identity;
use crate::store::Body;
use crate::user::{User, as_user};

/// The largest WAL segment there can be.
const SEGMENT_BYTES_MAX: u64 = 1 << 30;

/// Bytes that are read and hashed at a time, so that they are hashed out of the processor's cache. Whole pages of any size.
const READ_BYTES: usize = 64 << 10;

/// Threads that read and compress one file. More than a few are done before the last one has begun.
const THREADS_MAX: usize = 4;

/// What a push did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pushed {
    /// the file is now in the archive
    New,
    /// the archive had the same content already
    AlreadyThere,
}

/// Archives the file at `path`, named as PostgreSQL names it.
///
/// A history file's key says nothing of its content: of two pushed at one moment the later would replace the earlier, and both
/// would be told that they are archived. So one is pushed at a time.
pub fn push(repository: &Repository, path: &Path, level: i32) -> Result<Pushed> {
    match wal_name(path)? {
        (_, WalName::History(_)) => push_history(repository, path, level),
        _ => push_any(repository, path, level),
    }
}

fn push_history(repository: &Repository, path: &Path, level: i32) -> Result<Pushed> {
    let (name, _) = wal_name(path)?;
    let database = repository.archive_info()?.current()?.clone();
    // mostly it is new, or there already
    if repository.archive(&database).find(name)?.is_some() {
        return push_any(repository, path, level);
    }
    let lock = repository.lock(LockKind::History, name)?;
    let pushed = push_any(repository, path, level)?;
    lock.check().map(|()| pushed)
}

fn push_any(repository: &Repository, path: &Path, level: i32) -> Result<Pushed> {
    let (name, _) = wal_name(path)?;
    // the archive is asked while the file is read and compressed: both take their time
    let (asked, file) = thread::scope(|scope| {
        let asked = scope.spawn(|| -> Result<_> {
            let database = repository.archive_info()?.current()?.clone();
            let there = repository.archive(&database).find(name);
            Ok((database, there))
        });
        let file = read_unchanged(repository, path, level);
        (asked.join().unwrap_or_else(|panic| resume_unwind(panic)), file)
    });
    let ((database, there), file) = (asked?, file?);
    file.check(&database)?;
    if let Some(there) = there? {
        return file.compare(repository, &database, &there.key);
    }
    let key = file.key(repository, &database);
    put(repository, &key, file.pack(repository, &database))?;
    // somebody else may have pushed other content at the same moment: then both are told
    let listed = repository.archive(&database).find(name)?;
    listed.filter(|listed| listed.key == key).map(|_| Pushed::New).ok_or_else(|| not_listed(name))
}

/// Reads a file and fails if it changed meanwhile. As long as it is to be archived the server leaves it alone; a call that
/// outlived its archiver may find that it becomes another segment.
fn read_unchanged(repository: &Repository, path: &Path, level: i32) -> Result<WalFile> {
    let is_ready = || path.parent().zip(path.file_name()?.to_str()).map(|(wal, name)| ready(wal, name).exists());
    let (was_ready, before) = (is_ready(), Stamp::of(path)?);
    let settled = before.is_settled(SystemTime::now());
    let file = WalFile::read(repository, path, Some(level), THREADS_MAX)?;
    let is_same = Stamp::of(path)? == before && (was_ready != Some(true) || is_ready() == Some(true));
    // a file that was written to a moment ago may be written to again without a new time, unless the server keeps it
    let is_known = settled || was_ready == Some(true);
    match is_same && (is_known || WalFile::read(repository, path, None, THREADS_MAX)?.content == file.content) {
        true => Ok(file),
        false => Err(changed(path)),
    }
}

/// A file that is another one by now.
pub(super) fn changed(path: &Path) -> Error {
    Error::new(format!("{} changed while it was read", path.display()))
        .hint("PostgreSQL asks again; nothing else may write to its pg_wal")
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

fn wal_name(path: &Path) -> Result<(&str, WalName)> {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let kind = WalName::parse(name).map_err(|error| {
        Error::new(format!("{} is not a file of pg_wal", path.display()))
            .hint("archive_command passes the path as %p: \"pgcairn archive-push %p\"")
            .source(error)
    })?;
    Ok((name, kind))
}

/// A file of `pg_wal` as it was read once, named by its content. Its plain bytes are not kept.
pub(super) struct WalFile {
    pub(super) name: String,
    kind: WalName,
    path: PathBuf,
    /// whose it is, if root reads it
    user: Option<User>,
    len: u64,
    /// what tells whose it is
    header: Vec<u8>,
    chunks: Vec<Chunk>,
    content: PackId,
    seal: SealKind,
}

struct Chunk {
    id: ChunkId,
    /// a restore point may begin in it
    point: bool,
    plain_len: usize,
    /// empty unless it was to be compressed
    stored: Vec<u8>,
}

impl WalFile {
    /// Reads it whole, with up to `threads` threads; compresses it unless there is no `level`. Whose it is must be checked
    /// before it is put.
    pub(super) fn read(repository: &Repository, path: &Path, level: Option<i32>, threads: usize) -> Result<Self> {
        let threads = threads.min(thread::available_parallelism().map_or(1, usize::from));
        Self::read_with(repository, path, level, |source| {
            let count = source.chunks();
            let each = count.div_ceil(threads.clamp(1, count.max(1))).max(1);
            thread::scope(|scope| {
                let starts: Vec<usize> = (0..count).step_by(each).collect();
                let reading: Vec<_> = starts
                    .into_iter()
                    .map(|start| scope.spawn(move || source.read(start..count.min(start + each), |_| ())))
                    .collect();
                let mut chunks = Vec::with_capacity(count);
                for part in reading {
                    chunks.extend(part.join().unwrap_or_else(|panic| resume_unwind(panic))?);
                }
                Ok(chunks)
            })
        })
    }

    /// The same in this thread.
    pub(super) fn read_here(repository: &Repository, path: &Path, level: Option<i32>) -> Result<Self> {
        Self::read_with(repository, path, level, |source| source.read(0..source.chunks(), |_| ()))
    }

    /// The same, with the hash of the whole content.
    pub(super) fn read_hashed(repository: &Repository, path: &Path, level: Option<i32>) -> Result<(Self, Content)> {
        let mut hasher = blake3::Hasher::new();
        let file = Self::read_with(repository, path, level, |source| {
            source.read(0..source.chunks(), |plain| _ = hasher.update(plain))
        })?;
        Ok((file, hasher.finalize()))
    }

    fn read_with(
        repository: &Repository,
        path: &Path,
        level: Option<i32>,
        read: impl FnOnce(&Source<'_>) -> Result<Vec<Chunk>>,
    ) -> Result<Self> {
        let (name, kind) = wal_name(path)?;
        // what is a link there may lead to what only root may read
        let user = User::owner_of_place(path)?;
        let open = || files::open_regular(path).map_err(|error| Error::io("open", path, error));
        let file = as_user(user.as_ref(), open)?;
        let len = file.metadata().map_err(|error| Error::io("look at", path, error))?.len();
        if len > SEGMENT_BYTES_MAX {
            return Err(Error::new(format!("{} has {len} bytes, more than any WAL segment", path.display())));
        }
        let mut header = vec![0; LONG_PAGE_HEADER_BYTES.min(len as usize)];
        let mut source = Source { file, path, len, page: None, keys: &repository.keys, level };
        source.read_at(&mut header, 0)?;
        if matches!(kind, WalName::Segment(_) | WalName::Partial(_)) {
            source.page = LongPageHeader::parse(&header).map(|header| header.page_bytes as usize);
        }
        let chunks = read(&source)?;
        let content = repository.keys.file(chunks.iter().map(|chunk| chunk.id));
        let seal = repository.keys.seal_kind();
        Ok(Self { name: name.to_owned(), kind, path: path.to_owned(), user, len, header, chunks, content, seal })
    }

    /// Refuses what is not WAL of this cluster.
    pub(super) fn check(&self, database: &Database) -> Result<()> {
        let (name, len, expected) = (&self.name, self.len, database.wal_segment_size);
        if let WalName::History(timeline) = self.kind {
            TimelineHistory::parse(timeline, &self.text()?)
                .context(|| format!("{} tells no history", self.path.display()))?;
        }
        // history files say nothing of their cluster
        let asking = as_user(self.user.as_ref(), || Ok(Asking::of(&self.path)))?;
        if let Some(asking) = asking.filter(|asking| asking.system_id != database.system_id) {
            return Err(Error::new(format!(
                "{} is of the cluster with system identifier {}, the stanza is of {}",
                self.path.display(),
                asking.system_id,
                database.system_id
            ))
            .hint("check --stanza in archive_command; a clone must not archive into its source's stanza"));
        }
        if len > expected {
            return Err(Error::new(format!("{name} has {len} bytes, a WAL segment of this cluster has {expected}")));
        }
        let (WalName::Segment(segment) | WalName::Partial(segment)) = self.kind else { return Ok(()) };
        if len != expected {
            return Err(Error::new(format!("WAL segment {name} has {len} bytes, it should have {expected}")));
        }
        wal_identity(database)?.check_segment(segment, &self.header).map_err(|error| {
            Error::new(format!("{name} is not WAL of this stanza's cluster"))
                .hint("check --stanza in archive_command; a clone must not archive into its source's stanza")
                .source(error)
        })?;
        Ok(())
    }

    /// Reads a small file whole, as the user whose it is.
    fn text(&self) -> Result<Vec<u8>> {
        as_user(self.user.as_ref(), || {
            files::read_regular(&self.path).map_err(|error| Error::io("read", &self.path, error))
        })
    }

    /// Whether what the archive has at `key`, under this file's name, is the same.
    pub(super) fn compare(&self, repository: &Repository, database: &Database, key: &str) -> Result<Pushed> {
        let same = if self.name.ends_with(".history") {
            repository.wal_file(database, key)? == self.text()?
        } else {
            WalKey::parse(key).is_some_and(|there| there.content == self.content.to_string())
        };
        match same {
            true => Ok(Pushed::AlreadyThere),
            false => Err(Error::new(format!("the archive already holds {} with other content", self.name))
                .hint("another cluster, or a restored copy on the same timeline, archives into this stanza")
                .conflict()),
        }
    }

    /// Where its object goes. The name is to be looked for before it is put, and again after, see [`push`].
    pub(super) fn key(&self, repository: &Repository, database: &Database) -> String {
        let point = self.chunks.iter().any(|chunk| chunk.point);
        repository.archive(database).key(&self.name, self.content, point)
    }

    /// Its object, if it was compressed.
    pub(super) fn pack(&self, repository: &Repository, database: &Database) -> Vec<u8> {
        let id = match self.kind {
            WalName::History(_) => {
                repository.keys.history(database.system_id, &self.name, self.chunks.iter().map(|chunk| chunk.id))
            }
            _ => self.content,
        };
        let stored: usize = self.chunks.iter().map(|chunk| chunk.stored.len() + ENTRY_LEN).sum();
        let capacity = HEADER_LEN + stored + TRAILER_LEN;
        let mut pack = PackWriter::new(PackKind::Wal, self.seal, id, capacity);
        for chunk in &self.chunks {
            pack.add(chunk.id, chunk.plain_len, &chunk.stored);
        }
        pack.finish()
    }
}

thread_local! {
    /// The compression contexts of this thread, with their level: fresh ones for each segment cost a tenth of compressing it.
    static ENCODER: RefCell<Option<(i32, Encoder)>> = const { RefCell::new(None) };
}

/// A file being read.
struct Source<'a> {
    file: File,
    path: &'a Path,
    len: u64,
    /// bytes of a page of WAL, where it is WAL
    page: Option<usize>,
    keys: &'a Keys,
    level: Option<i32>,
}

impl Source<'_> {
    fn chunks(&self) -> usize {
        self.len.div_ceil(CHUNK as u64) as usize
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.file.read_exact_at(buffer, offset).map_err(|error| Error::io("read", self.path, error))
    }

    /// Reads these chunks in order; `each` sees the plain bytes.
    fn read(&self, numbers: Range<usize>, each: impl FnMut(&[u8])) -> Result<Vec<Chunk>> {
        let Some(level) = self.level else { return self.read_encoded(None, numbers, each) };
        ENCODER.with_borrow_mut(|kept| {
            if kept.as_ref().is_none_or(|(of, _)| *of != level) {
                *kept = Some((level, Encoder::of_wal(level).context(|| "cannot set up zstd".into())?));
            }
            self.read_encoded(kept.as_mut().map(|(_, encoder)| encoder), numbers, each)
        })
    }

    fn read_encoded(
        &self,
        mut encoder: Option<&mut Encoder>,
        numbers: Range<usize>,
        mut each: impl FnMut(&[u8]),
    ) -> Result<Vec<Chunk>> {
        // one buffer for all chunks: fresh ones would cost more than compressing
        let (mut plain, mut grains) = (vec![0; CHUNK], Vec::new());
        let mut chunks = Vec::with_capacity(numbers.len());
        for number in numbers {
            let offset = number as u64 * CHUNK as u64;
            plain.resize((self.len - offset).min(CHUNK as u64) as usize, 0);
            grains.clear();
            let mut point = false;
            for (number, part) in plain.chunks_mut(READ_BYTES).enumerate() {
                self.read_at(part, offset + (number * READ_BYTES) as u64)?;
                each(part);
                grains.extend(part.chunks(GRAIN).map(|grain| self.keys.grain_digest(grain)));
                point |= self.page.is_some_and(|page| may_begin_restore_point(part, page));
            }
            let id = self.keys.name(plain.len(), &grains);
            let mut stored = Vec::new();
            if let Some(encoder) = &mut encoder {
                encoder.encode(self.keys, &id, &plain, &mut stored).context(|| "cannot compress".into())?;
            }
            chunks.push(Chunk { id, point, plain_len: plain.len(), stored });
        }
        Ok(chunks)
    }
}

#[cfg(test)]
mod tests;
