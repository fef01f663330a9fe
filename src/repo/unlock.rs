//! Encrypted stanzas: those that have an object with their secret, wrapped by a passphrase. Whether one is encrypted is settled
//! when it is created.
//!
//! There are two places for that object, and mostly one is empty. A new passphrase wraps the same secret in the other place
//! before the old one is removed. So opening costs one request, or two; and there is always one passphrase that opens.

use std::sync::Arc;

use super::{Repository, layout, reread};
use crate::error::{Context, Error, Result};
use crate::format::cipher_key::{KeyObject, Passphrase, Secret};
use crate::format::info::{LockKind, decode_open, encode_open, is_sealed};
use crate::format::manifest::Database;
use crate::store::{Body, ErrorKind, Store};

/// What a passphrase opened.
#[derive(Debug)]
pub struct Unlocked {
    /// the secret
    pub secret: Secret,
    /// the key of the object that holds it
    pub place: String,
}

impl Repository {
    /// Opens a stanza that is there, encrypted just when there is a passphrase.
    ///
    /// # Errors
    /// When it is encrypted and there is no passphrase, or another one; or when there is one and it is not encrypted.
    pub fn open(store: Arc<dyn Store>, stanza: &str, passphrase: Option<&Passphrase>) -> Result<Self> {
        let open = Self::new(store, stanza)?;
        let Some(passphrase) = passphrase else {
            return if open.has_secret()? { Err(open.is_encrypted()) } else { Ok(open) };
        };
        match open.unlock(passphrase)? {
            Some(unlocked) => Ok(open.with_secret(&unlocked.secret)),
            None => Err(open.has_no_secret()),
        }
    }

    /// The same stanza with keys that derive from its secret.
    #[must_use]
    pub fn with_secret(&self, secret: &Secret) -> Self {
        Self { keys: secret.keys(), ..self.clone() }
    }

    /// Whether the stanza is encrypted.
    pub fn has_secret(&self) -> Result<bool> {
        Ok(!self.store.names(&layout::secrets(&self.stanza))?.is_empty())
    }

    /// The secret; `None` when the stanza is not encrypted.
    ///
    /// # Errors
    /// When the passphrase is another one.
    pub fn unlock(&self, passphrase: &Passphrase) -> Result<Option<Unlocked>> {
        let places = layout::secret_places(&self.stanza);
        // a change of the passphrase may move the object behind our back: not twice while we look
        for _ in 0..2 {
            let (mut found, mut damage) = (false, None);
            for place in &places {
                match self.unlock_at(place, passphrase) {
                    Ok(Some(Some(secret))) => return Ok(Some(Unlocked { secret, place: place.clone() })),
                    Ok(Some(None)) => found = true,
                    Ok(None) => {}
                    // the other one may be whole
                    Err(error) if error.is_damage() => damage = Some(error),
                    Err(error) => return Err(error),
                }
            }
            if let Some(error) = damage {
                return Err(error);
            }
            if !found && !self.has_secret()? {
                return Ok(None);
            }
        }
        Err(Error::new(format!("the passphrase does not open stanza {} in {}", self.stanza, self.store.url()))
            .hint("it is another one than that of \"stanza-create --encrypt\" or of the last \"repo passwd\""))
    }

    /// What is at one of the places: nothing, what the passphrase does not open, or the secret.
    pub fn unlock_at(&self, place: &str, passphrase: &Passphrase) -> Result<Option<Option<Secret>>> {
        let opened = reread::judged(
            &*self.store,
            |reads| {
                let bytes = reads.get(place)?;
                Ok(decode_open::<KeyObject>(place, &bytes).and_then(|object| object.unwrap(place, passphrase)))
            },
            |outcome| matches!(outcome, Ok(Err(_))),
        )?;
        let opened = match opened {
            Ok(opened) => opened,
            Err(error) if Error::is_not_found(&error) => return Ok(None),
            Err(error) => return Err(error),
        };
        opened.map(Some).map_err(|error| {
            Error::new(format!("the key of stanza {} cannot be read", self.stanza))
                .hint(format!(
                    "put back the copy of {place} that you keep elsewhere; see docs/operations.md, Encryption"
                ))
                .source(error)
        })
    }

    /// Writes the secret, wrapped by a passphrase, to one of the places, and proves that it can be had from there.
    pub fn write_secret(&self, place: &str, secret: &Secret, passphrase: &Passphrase) -> Result<()> {
        let object = KeyObject::wrap(place, secret, passphrase).context(|| format!("cannot make {place}"))?;
        let bytes = encode_open(&object).context(|| format!("cannot make {place}"))?;
        self.store.put(place, Body::Bytes(bytes.into()))?;
        let opened = self.unlock_at(place, passphrase)?.flatten();
        match opened.as_ref() == Some(secret) {
            true => Ok(()),
            false => Err(Error::new(format!("{place} was written, but something else is there"))
                .hint("somebody else may have done the same at this moment; run the command again")),
        }
    }

    /// Creates the stanza for `database`, encrypted, or finds it created already; returns it with the keys of its secret.
    pub fn create_encrypted_stanza(&self, passphrase: &Passphrase, database: Database) -> Result<(Self, bool)> {
        if let Some(unlocked) = self.unlock(passphrase)? {
            let repository = self.with_secret(&unlocked.secret);
            let is_created = repository.create_stanza(database)?;
            return Ok((repository, is_created));
        }
        // of two who write a secret at the same moment, one would lose what he was told is there
        let lock = self.lock(LockKind::Stanza, "stanza-create")?;
        let repository = self.create_secret(passphrase)?;
        let is_created = repository.create_locked_stanza(database)?;
        lock.check().map(|()| (repository, is_created))
    }

    /// Gives a stanza that is to be created its secret; or takes up the one that a creation left which died.
    pub fn create_secret(&self, passphrase: &Passphrase) -> Result<Self> {
        if let Some(unlocked) = self.unlock(passphrase)? {
            return Ok(self.with_secret(&unlocked.secret));
        }
        if self.has_objects()? {
            return Err(self.has_no_secret());
        }
        let secret = Secret::random().context(|| "cannot get random bytes".into())?;
        let [place, _] = layout::secret_places(&self.stanza);
        self.write_secret(&place, &secret, passphrase)?;
        Ok(self.with_secret(&secret))
    }

    /// Whether anything of the stanza is there already.
    fn has_objects(&self) -> Result<bool> {
        for prefix in [layout::backups(&self.stanza), format!("archive/{}/", self.stanza), layout::packs(&self.stanza)]
        {
            if !self.store.names(&prefix)?.is_empty() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    pub(super) fn is_encrypted(&self) -> Error {
        Error::new(format!("stanza {} is encrypted, and no passphrase is given", self.stanza)).hint(
            "give --repo-cipher-pass-file or --repo-cipher-pass-command, or set PGCAIRN_REPO_CIPHER_PASS in the environment",
        )
    }

    /// Why there is no secret that a passphrase could open.
    fn has_no_secret(&self) -> Error {
        let key = layout::archive_info(&self.stanza);
        let is_sealed = match self.store.get(&key) {
            Ok(bytes) => is_sealed(&bytes),
            Err(error) if error.kind == ErrorKind::NotFound => false,
            Err(error) => return error.into(),
        };
        if is_sealed {
            let prefix = layout::secrets(&self.stanza);
            return Error::new(format!(
                "stanza {} is encrypted, and its key is gone: nothing is below {prefix}",
                self.stanza
            ))
            .hint("put back the copy that you keep elsewhere; without it nothing of the stanza can be read");
        }
        if let Err(error) = self.archive_info()
            && !error.is_damage()
        {
            return error;
        }
        Error::new(format!("a passphrase is given, but stanza {} is not encrypted", self.stanza)).hint(
            "leave the passphrase out; a stanza is encrypted from its creation on, by \"stanza-create --encrypt\", or never",
        )
    }
}

#[cfg(test)]
mod tests;
