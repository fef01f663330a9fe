//! Chunks into packs, packs into the store: bounded memory, uploads beside the work, the first error stops everything.

use std::collections::HashMap;
use std::sync::Arc;
use std::thread::JoinHandle;

use bytes::Bytes;
use crossbeam_channel::{Receiver, Sender, bounded};
use parking_lot::Mutex;

use crate::error::{Error, Result};
use crate::format::CHUNK;
use crate::format::chunk::{ChunkId, ChunkRef, PackId};
use crate::format::pack::{PackKind, PackWriter};
use crate::format::seal::SealKind;
use crate::repo::{Repository, layout};
use crate::store::Body;

/// A pack is closed and uploaded when its chunks reach this many bytes.
pub const PACK_BYTES: usize = 16 * 1024 * 1024;

/// A chunk ready to be stored.
#[derive(Debug)]
pub struct Stored {
    /// its name
    pub id: ChunkId,
    /// bytes of plaintext
    pub plain_len: usize,
    /// stored form
    pub bytes: Vec<u8>,
}

/// One pack being filled. Chunks added one after the other become neighbours.
#[derive(Debug)]
pub struct Lane {
    kind: PackKind,
    seal: SealKind,
    writer: Option<PackWriter>,
}

impl Lane {
    /// An empty lane.
    pub fn new(kind: PackKind, seal: SealKind) -> Self {
        Self { kind, seal, writer: None }
    }

    /// Adds a chunk; hands the pack to `uploads` when it is full.
    pub fn add(&mut self, uploads: &Uploads, id: ChunkId, plain_len: usize, stored: &[u8]) -> Result<ChunkRef> {
        let (kind, seal) = (self.kind, self.seal);
        let writer = match &mut self.writer {
            Some(writer) => writer,
            empty => empty.insert(PackWriter::new(kind, seal, random_pack_id()?, PACK_BYTES + CHUNK)),
        };
        let chunk = writer.add(id, plain_len, stored);
        if writer.len() >= PACK_BYTES {
            self.flush(uploads)?;
        }
        Ok(chunk)
    }

    /// Hands what there is to `uploads`.
    pub fn flush(&mut self, uploads: &Uploads) -> Result<()> {
        match self.writer.take() {
            Some(writer) => uploads.send(writer.id(), writer.finish()),
            None => Ok(()),
        }
    }
}

/// A fresh random name.
pub fn random_pack_id() -> Result<PackId> {
    let mut id = PackId::default();
    getrandom::fill(&mut id.0).map_err(|error| Error::new("cannot get random bytes").source(error))?;
    Ok(id)
}

/// Threads that put finished packs into the store. A `send` waits until one of them is free.
#[derive(Debug)]
pub struct Uploads {
    queue: Option<Sender<(PackId, Vec<u8>)>>,
    threads: Vec<JoinHandle<()>>,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    failure: Mutex<Option<Arc<Error>>>,
    sizes: Mutex<HashMap<PackId, u64>>,
}

impl Uploads {
    /// Starts `threads` uploaders.
    pub fn start(repository: &Repository, threads: usize) -> Self {
        let (queue, packs) = bounded(0);
        let shared = Arc::new(Shared::default());
        let threads = (0..threads.max(1))
            .map(|_| {
                let (repository, packs, shared) = (repository.clone(), packs.clone(), shared.clone());
                std::thread::spawn(move || upload(&repository, &packs, &shared))
            })
            .collect();
        Self { queue: Some(queue), threads, shared }
    }

    /// Waits for a free uploader and gives it the pack; fails when an earlier upload failed.
    pub fn send(&self, id: PackId, bytes: Vec<u8>) -> Result<()> {
        self.check()?;
        let queue = self.queue.as_ref().ok_or_else(|| Error::new("the uploads have ended"))?;
        queue.send((id, bytes)).map_err(|_| Error::new("the uploads have ended"))
    }

    /// Ends it early: what is being uploaded is, and nothing after it. Who sends a pack from now on fails.
    pub fn give_up(&self) {
        self.shared.failure.lock().get_or_insert_with(|| Arc::new(Error::new("the backup was given up")));
    }

    /// Fails when an upload failed.
    pub fn check(&self) -> Result<()> {
        match &*self.shared.failure.lock() {
            None => Ok(()),
            // each worker is told: whose report arrives first is what a person reads
            Some(error) => Err(Error::new(error.to_string()).source(error.clone())),
        }
    }

    /// Waits until every pack is in the store; returns the length of each.
    pub fn finish(mut self) -> Result<HashMap<PackId, u64>> {
        self.join();
        self.check()?;
        Ok(std::mem::take(&mut self.shared.sizes.lock()))
    }

    fn join(&mut self) {
        self.queue = None;
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                *self.shared.failure.lock() = Some(Arc::new(Error::new("an uploader died")));
            }
        }
    }
}

impl Drop for Uploads {
    fn drop(&mut self) {
        self.join();
    }
}

fn upload(repository: &Repository, packs: &Receiver<(PackId, Vec<u8>)>, shared: &Shared) {
    while let Ok((id, bytes)) = packs.recv() {
        if shared.failure.lock().is_some() {
            continue;
        }
        let size = bytes.len() as u64;
        match repository.store.put(&layout::pack(&repository.stanza, id), Body::Bytes(Bytes::from(bytes))) {
            Ok(()) => _ = shared.sizes.lock().insert(id, size),
            Err(error) => _ = shared.failure.lock().get_or_insert_with(|| Arc::new(error.into())),
        }
    }
}
