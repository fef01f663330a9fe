//! The repository of one stanza: keys, catalog, and the order in which a backup becomes one.

pub mod asking;
pub mod catalog;
pub mod chunks;
pub mod clock;
pub mod damage;
pub mod layout;
pub mod lock;
pub mod manifest;
pub mod packs;
pub mod passwd;
pub mod proof;
pub mod reread;
pub mod stored;
pub mod unlock;
pub mod wal;

use std::sync::Arc;

use bytes::Bytes;

use crate::error::{Context, Error, Result};
use crate::format::FormatError;
use crate::format::chunk::{ChunkRef, Decoder, Keys};
use crate::format::info::{self, Info};
use crate::format::pack::{Pack, PackKind};
use crate::store::Store;

/// One stanza in one store.
#[derive(Clone, Debug)]
pub struct Repository {
    /// where its objects are
    pub store: Arc<dyn Store>,
    /// its name
    pub stanza: String,
    /// how its plaintext is hashed and its packs are sealed
    pub keys: Keys,
}

impl Repository {
    /// Names a stanza that is not encrypted, without looking whether it exists; [`Self::open`] looks.
    pub fn new(store: Arc<dyn Store>, stanza: &str) -> Result<Self> {
        layout::check_stanza(stanza)?;
        Ok(Self { store, stanza: stanza.to_owned(), keys: Keys::new(b"") })
    }

    /// Fetches one object that is a pack of `kind`, and calls `each` with the plaintext of its chunks in order.
    pub fn read_pack(&self, key: &str, kind: PackKind, each: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        self.read_pack_of(None, key, kind, each)
    }

    /// The same of what belongs to the cluster with this system identifier.
    fn read_pack_of(
        &self,
        system_id: Option<u64>,
        key: &str,
        kind: PackKind,
        mut each: impl FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let mut decoder = Decoder::new().map_err(|error| Error::new("cannot set up zstd").source(error))?;
        let mut done: Vec<ChunkRef> = Vec::new();
        reread::checked(&*self.store, |reads| {
            let bytes = reads.get(key)?;
            let pack = Pack::parse(key, &bytes)?;
            pack.header.expect(key, kind, self.keys.seal_kind())?;
            if kind == PackKind::Wal {
                self.keys.check_wal_content(key, system_id, pack.header.id, &pack.chunks)?;
            }
            if !pack.chunks.starts_with(&done) {
                return Err(FormatError::new(key, 0, "it lists other chunks than when it was read before").into());
            }
            // an earlier try may have come as far as that
            for chunk in &pack.chunks[done.len()..] {
                let stored = &bytes[chunk.offset as usize..chunk.end() as usize];
                each(&decoder.decode(&self.keys, key, chunk, stored)?.plain)?;
                done.push(*chunk);
            }
            Ok(())
        })
    }

    /// The stored form of an info object.
    pub fn encode_info<T: Info>(&self, key: &str, info: &T) -> Result<Bytes> {
        let bytes = info::encode(&self.keys, key, info).context(|| format!("cannot make {key}"))?;
        Ok(bytes.into())
    }

    /// Fetches and verifies an info object: what it says, or what is wrong with it.
    ///
    /// # Errors
    /// When the store cannot be asked, or has no such object.
    pub fn fetch_info<T: Info>(&self, key: &str) -> std::result::Result<crate::format::Result<T>, Error> {
        reread::judged(
            &*self.store,
            |reads| Ok(self.decode_info(key, &reads.get(key)?)),
            |outcome: &Result<crate::format::Result<T>>| matches!(outcome, Ok(Err(_))),
        )?
    }

    /// Reads and verifies an info object.
    pub fn decode_info<T: Info>(&self, key: &str, bytes: &[u8]) -> crate::format::Result<T> {
        info::decode(&self.keys, key, bytes)
    }
}
