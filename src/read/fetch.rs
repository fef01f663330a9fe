//! Chunks from memory, from the disk cache, or from the store: each fetched once however many ask, neighbours in one
//! request, every byte checked against its chunk's name before it leaves.

mod stalled;

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use lru::LruCache;
use parking_lot::{Condvar, Mutex};

use self::stalled::Stalled;
use super::cache::DiskCache;
use crate::error::{Error, Result};
use crate::format::FormatError;
use crate::format::chunk::{ChunkId, ChunkRef, Decoded, Decoder, PackId};
use crate::repo::reread::{self, Reads};
use crate::repo::{Repository, layout};
use crate::store::{ErrorKind, StoreError, deadline};

/// Neighbouring chunks are fetched together when at most this many bytes lie between them: what a request costs more
/// than the bytes do.
const GAP_BYTES: u64 = 64 * 1024;
/// The most one request asks for.
pub(crate) const REQUEST_BYTES: u64 = 4 * 1024 * 1024;

/// Plaintext of one chunk, shared by all who read it.
pub type Plain = Arc<Vec<u8>>;

/// How reading is bounded.
#[derive(Clone, Debug)]
pub struct FetchOptions {
    /// bytes of plaintext kept in memory
    pub memory_bytes: usize,
    /// the disk cache, if any
    pub disk: Option<Arc<DiskCache>>,
}

/// What was read from where, since the start.
#[derive(Debug, Default)]
pub struct Counters {
    /// requests to the store
    pub requests: AtomicU64,
    /// bytes the store sent
    pub fetched_bytes: AtomicU64,
    /// chunks found in memory
    pub memory_hits: AtomicU64,
    /// reads served by the disk cache
    pub disk_hits: AtomicU64,
    /// reads that failed
    pub errors: AtomicU64,
}

/// The one place where stored bytes become plaintext.
#[derive(Debug)]
pub struct Fetcher {
    repository: Repository,
    memory: Mutex<Memory>,
    disk: Option<Arc<DiskCache>>,
    flights: Mutex<HashMap<ChunkId, Arc<Flight>>>,
    stalled: Stalled,
    /// objects that hold chunks but are not packs below `chunk/`: files of the WAL archive
    elsewhere: Mutex<HashMap<PackId, String>>,
    /// stored bytes of chunks that lie in manifests: these may go while their backups are read
    held: Mutex<HashMap<(PackId, u32), Bytes>>,
    /// what was read from where
    pub counters: Counters,
}

#[derive(Debug)]
struct Memory {
    chunks: LruCache<ChunkId, Plain>,
    bytes: usize,
    limit: usize,
}

/// Neighbouring chunks as they are stored.
#[derive(Debug)]
pub struct Stored {
    key: String,
    /// where in the object they begin
    from: u64,
    bytes: Bytes,
}

/// A fetch under way, for those who want the same chunk.
#[derive(Debug, Default)]
struct Flight {
    landed: Mutex<Option<std::result::Result<Plain, Arc<Error>>>>,
    wake: Condvar,
}

impl Memory {
    fn insert(&mut self, id: ChunkId, plain: Plain) {
        self.bytes += plain.len();
        if let Some((_, old)) = self.chunks.push(id, plain) {
            self.bytes -= old.len();
        }
        while self.bytes > self.limit {
            let Some((_, old)) = self.chunks.pop_lru() else { break };
            self.bytes -= old.len();
        }
    }
}

thread_local! {
    static DECODER: RefCell<Option<Decoder>> = const { RefCell::new(None) };
}

impl Fetcher {
    /// Reads chunks of `repository`.
    pub fn new(repository: Repository, options: FetchOptions) -> Self {
        let memory = Memory { chunks: LruCache::unbounded(), bytes: 0, limit: options.memory_bytes };
        Self {
            repository,
            memory: Mutex::new(memory),
            disk: options.disk,
            flights: Mutex::default(),
            stalled: Stalled::default(),
            elsewhere: Mutex::default(),
            held: Mutex::default(),
            counters: Counters::default(),
        }
    }

    /// The repository it reads.
    pub fn repository(&self) -> &Repository {
        &self.repository
    }

    /// Says which object holds the chunks of `pack`, where that is not a pack below `chunk/`.
    pub fn locate(&self, pack: PackId, key: &str) {
        self.elsewhere.lock().insert(pack, key.to_owned());
    }

    /// Keeps the stored bytes of a chunk for good: the object that it lies in may go.
    pub fn hold(&self, chunk: &ChunkRef, stored: Bytes) {
        self.held.lock().insert((chunk.pack, chunk.offset), stored);
    }

    /// Counts a request that got `bytes`.
    pub fn count(&self, bytes: u64) {
        self.counters.requests.fetch_add(1, Ordering::Relaxed);
        self.counters.fetched_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Copies `buf.len()` bytes from `offset` of a chunk's plaintext, if memory or the disk cache has it.
    pub fn read_cached(&self, chunk: &ChunkRef, offset: usize, buf: &mut [u8]) -> bool {
        if let Some(plain) = self.in_memory(chunk) {
            buf.copy_from_slice(&plain[offset..offset + buf.len()]);
            return true;
        }
        let hit = self.disk.as_ref().is_some_and(|disk| disk.read(&self.repository.keys, chunk, offset, buf));
        if hit {
            self.counters.disk_hits.fetch_add(1, Ordering::Relaxed);
        }
        hit
    }

    /// The plaintext of one chunk.
    pub fn chunk(&self, chunk: &ChunkRef) -> Result<Plain> {
        let mut found = None;
        self.chunks(std::slice::from_ref(chunk), |_, plain| found = Some(plain))?;
        found.ok_or_else(|| Error::new(format!("chunk {} was not read", chunk.id)))
    }

    /// Hands the plaintext of every chunk to `each` with its number, in any order; what has to be fetched is fetched in as
    /// few requests as possible. A chunk that cannot be had fails the call after the others were delivered; a store that
    /// cannot be reached fails it at once: all that is asked for here has one deadline.
    pub fn chunks(&self, wanted: &[ChunkRef], mut each: impl FnMut(usize, Plain)) -> Result<()> {
        let mut missing = Vec::new();
        for (number, chunk) in wanted.iter().enumerate() {
            match self.in_caches(chunk) {
                Some(plain) => each(number, plain),
                None => missing.push(number),
            }
        }
        missing.sort_unstable_by_key(|number| (wanted[*number].pack, wanted[*number].offset));
        if let Some(error) = missing.iter().find_map(|number| self.stalled.error(&wanted[*number].id)) {
            self.counters.errors.fetch_add(1, Ordering::Relaxed);
            return Err(Error::new(error.to_string()).source(error));
        }
        let begun = Instant::now();
        let mut failure = None;
        while !missing.is_empty() {
            let run: Vec<usize> = missing.drain(..run_len(wanted, &missing)).collect();
            let Err(error) = self.fetch_run(wanted, &run, &mut each) else { continue };
            self.counters.errors.fetch_add(1, Ordering::Relaxed);
            if error.is_unreachable() {
                let error = Arc::new(error);
                let chunks = run.iter().chain(&missing).map(|number| wanted[*number].id);
                // the file map may have taken most of the time
                self.stalled.add(chunks, deadline::elapsed().unwrap_or_else(|| begun.elapsed()), &error);
                return Err(Error::new(error.to_string()).source(error));
            }
            failure.get_or_insert(error);
        }
        failure.map_or(Ok(()), Err)
    }

    /// Hands the plaintext of every chunk to `each` with its number, past all caches. What is stored is proved by its seal; that
    /// what comes out is right, the caller proves by the checksum of the file. For those who read everything once.
    pub fn sealed(&self, wanted: &[ChunkRef], mut each: impl FnMut(usize, &[u8]) -> Result<()>) -> Result<()> {
        let mut order: Vec<usize> = (0..wanted.len()).collect();
        order.sort_unstable_by_key(|number| (wanted[*number].pack, wanted[*number].offset));
        let mut plain = Vec::new();
        while !order.is_empty() {
            let run: Vec<usize> = order.drain(..run_len(wanted, &order)).collect();
            let chunks: Vec<ChunkRef> = run.iter().map(|number| wanted[*number]).collect();
            let stored = self.stored(&chunks)?;
            for (number, chunk) in run.into_iter().zip(&chunks) {
                self.unseal(&stored, chunk, &mut plain)?;
                each(number, &plain)?;
            }
        }
        Ok(())
    }

    /// The stored bytes of chunks that lie in one object in ascending order, got by one request.
    pub fn stored(&self, chunks: &[ChunkRef]) -> Result<Stored> {
        let (key, from, bytes) = self.get_range(&Reads::of(&*self.repository.store), chunks)?;
        Ok(Stored { key, from, bytes })
    }

    /// Replaces `plain` by the plaintext of one of the chunks of `stored`, proved by its seal as by [`Self::sealed`].
    pub fn unseal(&self, stored: &Stored, chunk: &ChunkRef, plain: &mut Vec<u8>) -> Result<()> {
        let Stored { key, from, bytes } = stored;
        let range = u64::from(chunk.offset).checked_sub(*from).map(|at| at as usize..(chunk.end() - from) as usize);
        let sealed = range.and_then(|range| bytes.get(range));
        let sealed = sealed.ok_or_else(|| Error::new(format!("chunk {} of {key} was not fetched", chunk.id)))?;
        let mut open = |sealed: &[u8]| {
            with_decoder(|decoder| Ok(decoder.decode_sealed(&self.repository.keys, key, chunk, sealed, plain)?))
        };
        match open(sealed) {
            // the answer may have been damaged, not the object
            Err(error) if error.is_damage() => reread::checked(&*self.repository.store, |reads| {
                let (_, _, sealed) = self.get_range(reads, std::slice::from_ref(chunk))?;
                open(&sealed)
            }),
            done => done,
        }
    }

    /// True for a chunk whose stored bytes are kept for good, see [`Self::hold`].
    pub fn is_held(&self, chunk: &ChunkRef) -> bool {
        self.held.lock().contains_key(&(chunk.pack, chunk.offset))
    }

    /// True when the chunk is at hand, without reading it.
    pub fn has(&self, chunk: &ChunkRef) -> bool {
        self.memory.lock().chunks.contains(&chunk.id) || self.disk.as_ref().is_some_and(|disk| disk.has(chunk))
    }

    /// Keeps what was fetched and checked in the caches.
    pub fn keep(&self, chunk: &ChunkRef, decoded: Decoded) -> Plain {
        if let Some(disk) = &self.disk {
            disk.write(chunk, &decoded);
        }
        self.keep_in_memory(chunk, decoded.plain)
    }

    /// Keeps plaintext in memory alone.
    pub fn keep_in_memory(&self, chunk: &ChunkRef, plain: Vec<u8>) -> Plain {
        let plain = Arc::new(plain);
        self.memory.lock().insert(chunk.id, plain.clone());
        plain
    }

    fn in_memory(&self, chunk: &ChunkRef) -> Option<Plain> {
        let plain = self.memory.lock().chunks.get(&chunk.id).cloned();
        // a hostile reference may claim another length under a right name
        let plain = plain.filter(|plain| plain.len() == chunk.plain_len as usize);
        if plain.is_some() {
            self.counters.memory_hits.fetch_add(1, Ordering::Relaxed);
        }
        plain
    }

    fn in_caches(&self, chunk: &ChunkRef) -> Option<Plain> {
        if let Some(plain) = self.in_memory(chunk) {
            return Some(plain);
        }
        let mut plain = vec![0; chunk.plain_len as usize];
        let disk = self.disk.as_ref()?;
        if !disk.read(&self.repository.keys, chunk, 0, &mut plain) {
            return None;
        }
        self.counters.disk_hits.fetch_add(1, Ordering::Relaxed);
        Some(Arc::new(plain))
    }

    /// Fetches one run of neighbours; chunks that another thread is fetching are waited for instead.
    fn fetch_run(&self, wanted: &[ChunkRef], run: &[usize], each: &mut impl FnMut(usize, Plain)) -> Result<()> {
        let mut mine = VecDeque::with_capacity(run.len());
        let mut others = Vec::new();
        {
            let mut flights = self.flights.lock();
            for number in run {
                match flights.get(&wanted[*number].id) {
                    Some(flight) => others.push((*number, flight.clone())),
                    None => {
                        let flight = Arc::new(Flight::default());
                        flights.insert(wanted[*number].id, flight.clone());
                        mine.push_back((*number, flight));
                    }
                }
            }
        }
        let mut failure = None;
        if !mine.is_empty() {
            let landing = Landing { fetcher: self, wanted, flights: mine };
            failure = landing.fetch(each).err();
        }
        for (number, flight) in others {
            match flight.wait() {
                Some(Ok(plain)) => each(number, plain),
                Some(Err(error)) => failure = failure.or(Some(Error::new(error.to_string()).source(error))),
                None => failure = failure.or_else(|| Some(self.late(&wanted[number]))),
            }
        }
        failure.map_or(Ok(()), Err)
    }

    /// A chunk that another thread asked for later than this one's deadline allows.
    fn late(&self, chunk: &ChunkRef) -> Error {
        let (url, key) = (self.repository.store.url(), self.key(chunk.pack));
        StoreError::new(ErrorKind::Transient, "read", url, &key, "no answer in time").into()
    }

    /// Gets and checks one range that holds `chunks`, which lie in one object in ascending order.
    fn get(&self, chunks: &[ChunkRef]) -> Result<Vec<Result<Decoded>>> {
        let decoded = |reads: &Reads<'_>| -> Result<Vec<Result<Decoded>>> {
            let (key, from, bytes) = self.get_range(reads, chunks)?;
            let stored = |chunk: &ChunkRef| (u64::from(chunk.offset) - from) as usize..(chunk.end() - from) as usize;
            Ok(chunks.iter().map(|chunk| self.decode(&key, chunk, &bytes[stored(chunk)])).collect())
        };
        let is_bad = |outcome: &Result<Vec<Result<Decoded>>>| {
            let damaged = |one: &Result<Decoded>| one.as_ref().is_err_and(Error::is_damage);
            outcome.as_ref().is_ok_and(|all| all.iter().any(damaged))
        };
        reread::judged(&*self.repository.store, decoded, is_bad)?
    }

    /// The stored bytes of `chunks`, which lie in one object in ascending order: its key, where they begin, and they.
    fn get_range(&self, reads: &Reads<'_>, chunks: &[ChunkRef]) -> Result<(String, u64, Bytes)> {
        let first = &chunks[0];
        let key = self.key(first.pack);
        let (from, to) = (u64::from(first.offset), chunks.iter().map(ChunkRef::end).max().unwrap_or_default());
        let held = self.held.lock().get(&(first.pack, first.offset)).cloned();
        if let Some(bytes) = held.filter(|bytes| bytes.len() as u64 == to - from) {
            return Ok((key, from, bytes));
        }
        let bytes = reads.get_range(&key, from, to - from).map_err(|error| missing(&key, error))?;
        self.count(to - from);
        Ok((key, from, bytes))
    }

    /// Checks stored bytes against the chunk's name.
    pub fn decode(&self, key: &str, chunk: &ChunkRef, stored: &[u8]) -> Result<Decoded> {
        with_decoder(|decoder| Ok(decoder.decode(&self.repository.keys, key, chunk, stored)?))
    }

    /// The plaintext of stored bytes that are proved by their seal, see [`Self::sealed`].
    pub fn open(&self, key: &str, chunk: &ChunkRef, stored: &[u8]) -> Result<Vec<u8>> {
        let mut plain = Vec::new();
        with_decoder(|decoder| Ok(decoder.decode_sealed(&self.repository.keys, key, chunk, stored, &mut plain)?))?;
        Ok(plain)
    }

    fn key(&self, pack: PackId) -> String {
        match self.elsewhere.lock().get(&pack) {
            Some(key) => key.clone(),
            None => layout::pack(&self.repository.stanza, pack),
        }
    }
}

/// The decompression context of this thread.
fn with_decoder<T>(work: impl FnOnce(&mut Decoder) -> Result<T>) -> Result<T> {
    DECODER.with_borrow_mut(|decoder| {
        let decoder = match decoder {
            Some(decoder) => decoder,
            empty => empty.insert(Decoder::new().map_err(|error| Error::new("cannot set up zstd").source(error))?),
        };
        work(decoder)
    })
}

/// How many of the sorted `missing` chunks one request fetches.
fn run_len(wanted: &[ChunkRef], missing: &[usize]) -> usize {
    let first = &wanted[missing[0]];
    let mut end = first.end();
    let mut len = 1;
    for number in &missing[1..] {
        let chunk = &wanted[*number];
        let near = chunk.pack == first.pack && u64::from(chunk.offset) <= end + GAP_BYTES;
        if !near || chunk.end() - u64::from(first.offset) > REQUEST_BYTES {
            break;
        }
        end = end.max(chunk.end());
        len += 1;
    }
    len
}

/// An object that must exist and does not: damage, not absence.
fn missing(key: &str, error: StoreError) -> Error {
    match error.kind {
        ErrorKind::NotFound => FormatError::new(key, 0, "the object is missing").into(),
        _ => error.into(),
    }
}

/// The flights one thread has to land; whatever happens, nobody is left waiting.
struct Landing<'a> {
    fetcher: &'a Fetcher,
    wanted: &'a [ChunkRef],
    flights: VecDeque<(usize, Arc<Flight>)>,
}

impl Landing<'_> {
    fn fetch(mut self, each: &mut impl FnMut(usize, Plain)) -> Result<()> {
        let chunks: Vec<ChunkRef> = self.flights.iter().map(|(number, _)| self.wanted[*number]).collect();
        let results = match self.fetcher.get(&chunks) {
            Ok(results) => results,
            Err(error) => {
                let error = Arc::new(error);
                self.land_all(&error);
                return Err(Error::new(error.to_string()).source(error));
            }
        };
        let mut failure = None;
        for result in results {
            // a flight stays in `self` until it has landed: should this thread panic, dropping that lands it
            let Some((number, flight)) = self.flights.front().cloned() else { break };
            let chunk = &self.wanted[number];
            let landed = match result {
                Ok(decoded) => Ok(self.fetcher.keep(chunk, decoded)),
                Err(error) => Err(Arc::new(error)),
            };
            self.land(chunk, &flight, landed.clone());
            self.flights.pop_front();
            match landed {
                Ok(plain) => each(number, plain),
                Err(error) => failure = Some(Error::new(error.to_string()).source(error)),
            }
        }
        failure.map_or(Ok(()), Err)
    }

    fn land(&self, chunk: &ChunkRef, flight: &Flight, result: std::result::Result<Plain, Arc<Error>>) {
        self.fetcher.flights.lock().remove(&chunk.id);
        *flight.landed.lock() = Some(result);
        flight.wake.notify_all();
    }

    fn land_all(&mut self, error: &Arc<Error>) {
        for (number, flight) in std::mem::take(&mut self.flights) {
            self.land(&self.wanted[number], &flight, Err(error.clone()));
        }
    }
}

impl Drop for Landing<'_> {
    fn drop(&mut self) {
        let error = Arc::new(Error::new("the thread that fetched this chunk died"));
        self.land_all(&error);
    }
}

impl Flight {
    /// What it brings; none where that would be too late.
    fn wait(&self) -> Option<std::result::Result<Plain, Arc<Error>>> {
        let mut landed = self.landed.lock();
        loop {
            match (&*landed, deadline::left()) {
                (Some(result), _) => return Some(result.clone()),
                (None, Some(Duration::ZERO)) => return None,
                (None, Some(left)) => _ = self.wake.wait_for(&mut landed, left),
                (None, None) => self.wake.wait(&mut landed),
            }
        }
    }
}

#[cfg(test)]
mod tests;
