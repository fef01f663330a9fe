//! Plaintext chunks on a local disk: bounded, shared by processes, kept across them, checked at every read.
//!
//! One file per chunk, `<2 hex>/<62 hex>`: the plaintext, then the short hash of each grain, then the chunk's name and a
//! CRC32C over hashes and name. Files appear by rename, whole; anything that does not check is deleted and fetched again.

use std::fs::{self, File};
use std::io;
use std::num::NonZeroUsize;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use lru::LruCache;
use parking_lot::Mutex;

use crate::error::{Error, Result};
use crate::files::{self, Outlives};
use crate::format::GRAIN;
use crate::format::chunk::{ChunkId, ChunkRef, Decoded, GrainHash, Keys};
use crate::user::make_own;

/// Open cache files kept at hand where a process may open that many: opening one costs more than reading a page of it.
const OPEN_FILES: usize = 8192;
/// The same where it may not.
const OPEN_FILES_FEW: usize = 256;
/// A file is marked as used again when its mark is older than this.
const MARK_AGE: Duration = Duration::from_secs(600);
/// A sweep leaves this share of the limit, in percent.
const KEEP_PERCENT: u64 = 80;

/// Says that a directory is a cache, to backup programs too, and whose; see <https://bford.info/cachedir/>.
const TAG: &str = "CACHEDIR.TAG";
const TAG_TEXT: &str =
    "Signature: 8a477f597d28d172789f06886806bc55\n# The disk cache of pgcairn, which deletes in here.\n";
const TAG_OWNER: &str = "of pgcairn";
/// Where files are written before they get their name.
const TEMPORARY: &str = "tmp";
/// What the sweep of one process holds.
const LOCK: &str = "lock";
const HINT: &str = "choose another directory with --cache-path, new or empty, or do without the cache: --cache-size 0";

/// Makes `root` a cache if it is not there or is empty; refuses a directory that holds anything else, since a cache is
/// cleaned, and one that another user may fill, since what is in a cache is believed.
pub fn prepare(root: &Path) -> Result<()> {
    let failed = |verb: &'static str| move |error| Error::io(verb, root, error).hint(HINT);
    make_own(root, 0o700, HINT)?;
    let tag = root.join(TAG);
    match fs::read(&tag) {
        Ok(text) if String::from_utf8_lossy(&text).contains(TAG_OWNER) => return Ok(()),
        Ok(_) => return Err(Error::new(format!("{} is the cache of another program", root.display())).hint(HINT)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(Error::io("read", &tag, error).hint(HINT)),
    }
    for entry in fs::read_dir(root).map_err(failed("list"))? {
        let name = entry.map_err(failed("list"))?.file_name();
        // an earlier program marked no cache
        let is_ours = name.to_str().is_some_and(|name| {
            name == TEMPORARY || name == TAG || name.starts_with("times") || name == "lost+found" || is_hex(name, 2)
        });
        if !is_ours {
            return Err(Error::new(format!("{} is no cache: it holds {}", root.display(), name.display())).hint(HINT));
        }
    }
    // others that prepare it now see nothing in it but what is a cache's
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let temporary = make_temporary(root)?.join(format!("{}-{}", std::process::id(), since.as_nanos()));
    let write = |to: &Path| fs::write(to, TAG_TEXT).map_err(|error| Error::io("write", to, error).hint(HINT));
    files::place(&temporary, &tag, Outlives::Process, write)
}

/// The directory of files that have no name yet.
fn make_temporary(root: &Path) -> Result<PathBuf> {
    let directory = root.join(TEMPORARY);
    let created = fs::DirBuilder::new().recursive(true).mode(0o700).create(&directory);
    created.map_err(|error| Error::io("create the cache directory", &directory, error).hint(HINT))?;
    Ok(directory)
}

fn is_hex(name: &str, len: usize) -> bool {
    name.len() == len && name.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

/// Whether a file in [`TEMPORARY`] is one of ours.
fn is_temporary(name: &str) -> bool {
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    name.split_once('-').is_some_and(|(process, number)| is_number(process) && is_number(number))
}

/// A directory of plaintext chunks.
#[derive(Debug)]
pub struct DiskCache {
    root: PathBuf,
    limit: u64,
    used: AtomicU64,
    sweeping: AtomicBool,
    open: Mutex<LruCache<ChunkId, Arc<Cached>>>,
    temporary: AtomicU64,
}

#[derive(Debug)]
struct Cached {
    file: File,
    grains: Vec<GrainHash>,
}

impl DiskCache {
    /// Opens or creates the cache in `root`, which may hold `limit` bytes.
    pub fn open(root: &Path, limit: u64) -> Result<Arc<Self>> {
        prepare(root)?;
        make_temporary(root)?;
        let cache = Arc::new(Self {
            root: root.to_owned(),
            limit,
            used: AtomicU64::new(0),
            sweeping: AtomicBool::new(false),
            open: Mutex::new(LruCache::new(open_files())),
            temporary: AtomicU64::new(0),
        });
        cache.start_sweep();
        Ok(cache)
    }

    /// True when the chunk seems to be here.
    pub fn has(&self, chunk: &ChunkRef) -> bool {
        self.open.lock().contains(&chunk.id) || self.path(&chunk.id).exists()
    }

    /// Fills `buf` from `offset` of the chunk; false when it is not here or not sound.
    pub fn read(&self, keys: &Keys, chunk: &ChunkRef, offset: usize, buf: &mut [u8]) -> bool {
        let Some(cached) = self.lookup(chunk) else { return false };
        let sound = cached.read(keys, chunk.plain_len as usize, offset, buf);
        if !sound {
            tracing::warn!(chunk = %chunk.id, "a cached chunk is damaged and is fetched again");
            self.open.lock().pop(&chunk.id);
            _ = fs::remove_file(self.path(&chunk.id));
        }
        sound
    }

    /// Keeps a chunk; a cache that cannot be written is no error.
    pub fn write(self: &Arc<Self>, chunk: &ChunkRef, decoded: &Decoded) {
        match self.try_write(chunk, decoded) {
            Ok(bytes) => {
                if self.used.fetch_add(bytes, Ordering::Relaxed) + bytes > self.limit {
                    self.start_sweep();
                }
            }
            Err(error) => tracing::debug!(%error, "a chunk cannot be cached"),
        }
    }

    fn try_write(&self, chunk: &ChunkRef, Decoded { plain, grains }: &Decoded) -> io::Result<u64> {
        let mut bytes = Vec::with_capacity(plain.len() + tail_len(plain.len()));
        bytes.extend_from_slice(plain);
        grains.iter().for_each(|grain| bytes.extend_from_slice(&grain.to_le_bytes()));
        bytes.extend_from_slice(&chunk.id.0);
        bytes.extend_from_slice(&crc32c::crc32c(&bytes[plain.len()..]).to_le_bytes());
        let number = self.temporary.fetch_add(1, Ordering::Relaxed);
        let temporary = self.root.join(TEMPORARY).join(format!("{}-{number}", std::process::id()));
        let file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
        let written = file.write_all_at(&bytes, 0).and_then(|()| self.publish(&temporary, &self.path(&chunk.id)));
        if written.is_err() {
            _ = fs::remove_file(&temporary);
        }
        written.map(|()| bytes.len() as u64)
    }

    fn publish(&self, temporary: &Path, path: &Path) -> io::Result<()> {
        match fs::rename(temporary, path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let parent = path.parent().unwrap_or(&self.root);
                fs::DirBuilder::new().recursive(true).mode(0o700).create(parent)?;
                fs::rename(temporary, path)
            }
            other => other,
        }
    }

    fn lookup(&self, chunk: &ChunkRef) -> Option<Arc<Cached>> {
        if let Some(cached) = self.open.lock().get(&chunk.id) {
            return Some(cached.clone());
        }
        let file = File::open(self.path(&chunk.id)).ok()?;
        let cached = Arc::new(Cached { grains: read_tail(&file, chunk)?, file });
        mark_used(&cached.file);
        self.open.lock().put(chunk.id, cached.clone());
        Some(cached)
    }

    fn path(&self, id: &ChunkId) -> PathBuf {
        let name = id.to_string();
        self.root.join(&name[..2]).join(&name[2..])
    }

    /// Counts what is there and deletes the longest unused beyond the limit, in a thread of its own.
    fn start_sweep(self: &Arc<Self>) {
        if self.sweeping.swap(true, Ordering::AcqRel) {
            return;
        }
        let cache = self.clone();
        std::thread::spawn(move || {
            if let Err(error) = cache.sweep() {
                tracing::warn!(%error, cache = %cache.root.display(), "the cache cannot be swept");
            }
            cache.sweeping.store(false, Ordering::Release);
        });
    }

    fn sweep(&self) -> io::Result<()> {
        // one process sweeps at a time; the others come back when they have written more
        let lock = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(self.root.join(TEMPORARY).join(LOCK))?;
        let Ok(_lock) = nix::fcntl::Flock::lock(lock, nix::fcntl::FlockArg::LockExclusiveNonblock) else {
            self.used.store(self.limit * KEEP_PERCENT / 100, Ordering::Relaxed);
            return Ok(());
        };
        let mut files = self.files()?;
        let mut used: u64 = files.iter().map(|file| file.1).sum();
        if used > self.limit {
            files.sort_unstable();
            for (_, size, path) in &files {
                if used <= self.limit * KEEP_PERCENT / 100 {
                    break;
                }
                if fs::remove_file(path).is_ok() {
                    used -= size;
                }
            }
            // deleted files give their space back only when they are closed
            self.open.lock().clear();
        }
        self.used.store(used, Ordering::Relaxed);
        Ok(())
    }

    /// Last use, size and path of every cached chunk; what died while being written is deleted.
    fn files(&self) -> io::Result<Vec<(SystemTime, u64, PathBuf)>> {
        let mut files = Vec::new();
        for directory in fs::read_dir(&self.root)? {
            let directory = directory?;
            let name = directory.file_name();
            let Some(name) = name.to_str() else { continue };
            let temporary = name == TEMPORARY;
            // what has no name of ours, or is a link, is not ours
            if !directory.file_type()?.is_dir() || !(temporary || is_hex(name, 2)) {
                continue;
            }
            for file in fs::read_dir(directory.path()).into_iter().flatten().flatten() {
                let Ok(metadata) = file.metadata() else { continue };
                let name = file.file_name();
                let Some(name) = name.to_str().filter(|_| metadata.is_file()) else { continue };
                let modified = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
                if !temporary && is_hex(name, 62) {
                    files.push((modified, metadata.size(), file.path()));
                } else if temporary && is_temporary(name) && modified.elapsed().is_ok_and(|age| age.as_secs() > 3600) {
                    _ = fs::remove_file(file.path());
                }
            }
        }
        Ok(files)
    }
}

impl Cached {
    fn read(&self, keys: &Keys, plain_len: usize, offset: usize, buf: &mut [u8]) -> bool {
        let from = offset / GRAIN * GRAIN;
        let to = (offset + buf.len()).next_multiple_of(GRAIN).min(plain_len);
        if (from, to) == (offset, offset + buf.len()) {
            return self.file.read_exact_at(buf, from as u64).is_ok() && self.sound(keys, from, buf);
        }
        let mut grains = vec![0; to - from];
        let sound = self.file.read_exact_at(&mut grains, from as u64).is_ok() && self.sound(keys, from, &grains);
        if sound {
            buf.copy_from_slice(&grains[offset - from..offset - from + buf.len()]);
        }
        sound
    }

    fn sound(&self, keys: &Keys, from: usize, bytes: &[u8]) -> bool {
        let expected = &self.grains[from / GRAIN..];
        bytes.chunks(GRAIN).zip(expected).all(|(grain, hash)| keys.grain(grain) == *hash)
    }
}

/// How many cache files to keep open: a mount raises its limit to the hard one.
fn open_files() -> NonZeroUsize {
    let limits = fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"));
    let hard = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<usize>().ok()).unwrap_or(0);
    NonZeroUsize::new(if hard >= 4 * OPEN_FILES { OPEN_FILES } else { OPEN_FILES_FEW }).unwrap_or(NonZeroUsize::MIN)
}

fn tail_len(plain_len: usize) -> usize {
    plain_len.div_ceil(GRAIN) * 8 + 32 + 4
}

/// The grains' hashes, if the file is whole and is this chunk.
fn read_tail(file: &File, chunk: &ChunkRef) -> Option<Vec<GrainHash>> {
    let plain_len = chunk.plain_len as usize;
    let mut tail = vec![0; tail_len(plain_len)];
    file.read_exact_at(&mut tail, plain_len as u64).ok()?;
    let (signed, crc) = tail.split_at(tail.len() - 4);
    let (grains, id) = signed.split_at(signed.len() - 32);
    if crc32c::crc32c(signed).to_le_bytes() != *crc || id != chunk.id.0 {
        return None;
    }
    Some(grains.as_chunks::<8>().0.iter().map(|bytes| GrainHash::from_le_bytes(*bytes)).collect())
}

/// Marks a file as used, for the sweep; best effort.
fn mark_used(file: &File) {
    let old = file
        .metadata()
        .and_then(|metadata| metadata.modified())
        .is_ok_and(|mark| mark.elapsed().is_ok_and(|age| age > MARK_AGE));
    if old {
        _ = file.set_modified(SystemTime::now());
    }
}

#[cfg(test)]
mod tests;
