//! The object that holds a stanza's secret, wrapped by a passphrase: Argon2id makes a key of the passphrase, and
//! XChaCha20-Poly1305 encrypts the secret with it, the object's key as associated data.

use std::fmt;
use std::io;

use argon2::{Algorithm, Argon2, Params, Version};
use chacha20poly1305::aead::{Aead, KeyInit, Payload};
use chacha20poly1305::{XChaCha20Poly1305, XNonce};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::chunk::Keys;
use super::info::Info;
use super::{FormatError, Result};

/// Bytes of the random secret from which a stanza's keys derive.
pub const SECRET_BYTES: usize = 32;
/// Bytes of the random salt.
const SALT_BYTES: usize = 16;
/// Bytes of the random nonce.
const NONCE_BYTES: usize = 24;
/// What the passphrase is stretched with: the least that is recommended today, since every `archive-push` pays for it.
const COST: Cost = Cost { memory_kib: 19 * 1024, passes: 2, lanes: 1 };
/// What a reader pays at most: an object that asks for more is damaged, or hostile.
const COST_MAX: Cost = Cost { memory_kib: 1 << 20, passes: 64, lanes: 16 };

/// A passphrase, wiped from memory when it is dropped.
#[derive(Clone, PartialEq, Eq)]
pub struct Passphrase(Zeroizing<Vec<u8>>);

/// The random secret of an encrypted stanza, wiped from memory when it is dropped.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret {
    bytes: Zeroizing<[u8; SECRET_BYTES]>,
    /// whether the stanza's manifests carry a proof; those of stanzas made before there were proofs do not
    proves_manifests: bool,
}

/// The parameters of Argon2id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Cost {
    memory_kib: u32,
    passes: u32,
    lanes: u32,
}

/// `key/...`: the secret of an encrypted stanza. Without a passphrase that opens one of these, nothing else can be read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct KeyObject {
    /// how the passphrase becomes a key: `argon2id`, version 0x13
    derivation: String,
    #[serde(flatten)]
    cost: Cost,
    /// 32 hexadecimal digits
    salt: String,
    /// how the secret is encrypted: `xchacha20-poly1305`
    cipher: String,
    /// 48 hexadecimal digits
    nonce: String,
    /// the encrypted secret and its tag, 96 hexadecimal digits
    wrapped: String,
    /// what the secret says of the stanza's manifests; part of the associated data, so that nobody can take it away
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    manifest_proof: bool,
}

const DERIVATION: &str = "argon2id";
const CIPHER: &str = "xchacha20-poly1305";

impl Info for KeyObject {
    const NAME: &'static str = "key";
}

impl Passphrase {
    /// `None` when it is empty.
    pub fn new(bytes: Vec<u8>) -> Option<Self> {
        (!bytes.is_empty()).then(|| Self(Zeroizing::new(bytes)))
    }
}

impl Secret {
    /// A new one.
    pub fn random() -> io::Result<Self> {
        Ok(Self { bytes: Zeroizing::new(random()?), proves_manifests: true })
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        &*self.bytes
    }

    /// The keys that derive from it.
    pub fn keys(&self) -> Keys {
        match self.proves_manifests {
            true => Keys::with_manifest_proof(self.bytes()),
            false => Keys::new(self.bytes()),
        }
    }
}

impl KeyObject {
    /// Wraps `secret`, for the object with the key `object`.
    pub fn wrap(object: &str, secret: &Secret, passphrase: &Passphrase) -> io::Result<Self> {
        let (salt, nonce): ([u8; SALT_BYTES], [u8; NONCE_BYTES]) = (random()?, random()?);
        let key = derive(COST, &salt, passphrase).map_err(io::Error::other)?;
        let bound = associated(object, secret.proves_manifests);
        let payload = Payload { msg: secret.bytes(), aad: bound.as_bytes() };
        let wrapped = XChaCha20Poly1305::new((&*key).into()).encrypt(&XNonce::from(nonce), payload);
        let wrapped = wrapped.map_err(|_cipher_says_nothing| io::Error::other("cannot encrypt"))?;
        Ok(Self {
            derivation: DERIVATION.into(),
            cost: COST,
            salt: hex(&salt),
            cipher: CIPHER.into(),
            nonce: hex(&nonce),
            wrapped: hex(&wrapped),
            manifest_proof: secret.proves_manifests,
        })
    }

    /// The secret; `None` when the passphrase is another one, or the object was made for another place.
    ///
    /// # Errors
    /// When the object says what no writer writes.
    pub fn unwrap(&self, object: &str, passphrase: &Passphrase) -> Result<Option<Secret>> {
        let fail = |what: String| FormatError::new(object, 0, what);
        if (self.derivation.as_str(), self.cipher.as_str()) != (DERIVATION, CIPHER) {
            let what = format!("{} and {} are not known to this pgcairn", self.derivation, self.cipher);
            return Err(fail(what));
        }
        let Cost { memory_kib, passes, lanes } = self.cost;
        if memory_kib > COST_MAX.memory_kib || passes > COST_MAX.passes || lanes > COST_MAX.lanes {
            return Err(fail(format!("it asks for {memory_kib} KiB, {passes} passes and {lanes} lanes")));
        }
        let digits = |what: &str| fail(format!("its {what} is wrong"));
        let salt: [u8; SALT_BYTES] = unhex(&self.salt).ok_or_else(|| digits("salt"))?;
        let nonce: [u8; NONCE_BYTES] = unhex(&self.nonce).ok_or_else(|| digits("nonce"))?;
        let wrapped: [u8; SECRET_BYTES + 16] = unhex(&self.wrapped).ok_or_else(|| digits("wrapped secret"))?;
        let key = derive(self.cost, &salt, passphrase).map_err(|error| fail(error.to_string()))?;
        let bound = associated(object, self.manifest_proof);
        let payload = Payload { msg: &wrapped, aad: bound.as_bytes() };
        let opened = XChaCha20Poly1305::new((&*key).into()).decrypt(&XNonce::from(nonce), payload);
        let Ok(opened) = opened.map(Zeroizing::new) else { return Ok(None) };
        let mut bytes = Zeroizing::new([0; SECRET_BYTES]);
        bytes.copy_from_slice(&opened);
        Ok(Some(Secret { bytes, proves_manifests: self.manifest_proof }))
    }
}

/// What a wrapped secret is bound to: the key of its object, and what it says of manifests.
fn associated(object: &str, manifest_proof: bool) -> String {
    let suffix = if manifest_proof { " manifest-proof" } else { "" };
    format!("{object}{suffix}")
}

fn derive(cost: Cost, salt: &[u8], passphrase: &Passphrase) -> argon2::Result<Zeroizing<[u8; 32]>> {
    let params = Params::new(cost.memory_kib, cost.passes, cost.lanes, None)?;
    let mut key = Zeroizing::new([0; 32]);
    Argon2::new(Algorithm::Argon2id, Version::V0x13, params).hash_password_into(&passphrase.0, salt, &mut *key)?;
    Ok(key)
}

fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(io::Error::other)?;
    Ok(bytes)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    if pairs.len() != N || !rest.is_empty() || !text.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f')) {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(pairs) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(bytes)
}

impl fmt::Debug for Passphrase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Passphrase")
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn passphrase(text: &str) -> Passphrase {
        Passphrase::new(text.into()).unwrap()
    }

    #[test]
    fn only_the_right_passphrase_in_the_right_place_opens() {
        let (secret, right) = (Secret::random().unwrap(), passphrase("right"));
        let object = KeyObject::wrap("key/main/a", &secret, &right).unwrap();
        assert!(object.unwrap("key/main/a", &right).unwrap() == Some(secret.clone()));
        assert!(object.unwrap("key/main/a", &passphrase("Right")).unwrap().is_none());
        assert!(object.unwrap("key/other/a", &right).unwrap().is_none(), "the object of another stanza");
        assert!(object.unwrap("key/main/b", &right).unwrap().is_none(), "another object");
        let cheaper = KeyObject { cost: Cost { passes: 1, ..COST }, ..object.clone() };
        assert!(cheaper.unwrap("key/main/a", &right).unwrap().is_none(), "other parameters");
        let unproved = KeyObject { manifest_proof: false, ..object.clone() };
        assert!(unproved.unwrap("key/main/a", &right).unwrap().is_none(), "manifests without proof");
        let again = KeyObject::wrap("key/main/a", &secret, &right).unwrap();
        assert!(again.wrapped != object.wrapped && again.salt != object.salt);
    }

    #[test]
    fn what_no_writer_writes_is_refused() {
        let right = passphrase("right");
        let good = KeyObject::wrap("key/main/a", &Secret::random().unwrap(), &right).unwrap();
        let cost = |memory_kib, passes, lanes| KeyObject { cost: Cost { memory_kib, passes, lanes }, ..good.clone() };
        let wrong = [
            cost(u32::MAX, 2, 1),
            cost(19456, u32::MAX, 1),
            cost(19456, 2, u32::MAX),
            cost(0, 0, 0),
            KeyObject { derivation: "argon2i".into(), ..good.clone() },
            KeyObject { cipher: "rot13".into(), ..good.clone() },
            KeyObject { salt: good.salt[2..].into(), ..good.clone() },
            KeyObject { nonce: good.nonce.to_uppercase() + "0", ..good.clone() },
            KeyObject { wrapped: "zz".repeat(48), ..good.clone() },
        ];
        for object in wrong {
            assert!(object.unwrap("key/main/a", &right).is_err(), "{object:?}");
        }
    }

    #[test]
    fn passphrases_and_secrets_are_not_shown() {
        assert_eq!(format!("{:?} {:?}", passphrase("word"), Secret::random().unwrap()), "Passphrase Secret");
        assert!(Passphrase::new(Vec::new()).is_none());
    }
}
