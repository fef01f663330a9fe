//! The repository of one stanza: keys, catalog, and the order in which a backup becomes one.

pub mod catalog;
pub mod chunks;
pub mod harm;
pub mod keys;
pub mod lock;
pub mod manifest;
pub mod packs;
pub mod wal;

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::format::chunk::{Decoder, Keys};
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
    /// Names a stanza without looking whether it exists.
    pub fn new(store: Arc<dyn Store>, stanza: &str) -> Result<Self> {
        keys::check_stanza(stanza)?;
        Ok(Self { store, stanza: stanza.to_owned(), keys: Keys::new(b"") })
    }

    /// Fetches one object that is a pack of `kind`, and calls `each` with the plaintext of its chunks in order.
    pub fn read_pack(&self, key: &str, kind: PackKind, mut each: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let bytes = self.store.get(key)?;
        let pack = Pack::parse(key, &bytes)?;
        pack.header.expect(key, kind, self.keys.seal_kind())?;
        let mut decoder = Decoder::new().map_err(|error| Error::new("cannot set up zstd").source(error))?;
        for chunk in &pack.chunks {
            let stored = &bytes[chunk.offset as usize..chunk.end() as usize];
            each(&decoder.decode(&self.keys, key, chunk, stored)?.plain)?;
        }
        Ok(())
    }
}
