//! The seal behind every stored chunk: it binds the stored bytes to the chunk's name, and hides them where a repository is
//! encrypted.
//!
//! ```text
//! hashed      frame | BLAKE3 keyed with the seal key, of chunk id | frame, the first 16 bytes
//! encrypted   XChaCha20-Poly1305 of the frame, the chunk id as associated data | tag 16 | nonce 24
//! ```
//!
//! So a restore can prove a chunk by hashing what is stored, a quarter of what comes out of it; and a chunk that was swapped
//! for another sealed one is found.

use std::borrow::Cow;
use std::fmt;
use std::io;

use chacha20poly1305::aead::{Aead, AeadInOut, KeyInit, Payload};
use chacha20poly1305::{Tag, XChaCha20Poly1305, XNonce};

use super::chunk::ChunkId;

/// Bytes of a hashed seal, and of the tag of an encrypted one.
const TAG: usize = 16;
/// Bytes of the random nonce behind an encrypted chunk.
const NONCE: usize = 24;

/// Which of the two seals the packs of a repository have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum SealKind {
    /// stored as it is, with a keyed hash
    Hashed = 1,
    /// encrypted and authenticated
    Encrypted = 2,
}

impl SealKind {
    /// The kind that a pack's header names.
    pub fn from_byte(byte: u8) -> Option<Self> {
        [Self::Hashed, Self::Encrypted].into_iter().find(|kind| *kind as u8 == byte)
    }
}

/// Closes and opens stored chunks.
#[derive(Clone)]
pub(super) enum Seal {
    Hashed([u8; 32]),
    Encrypted(Box<XChaCha20Poly1305>),
}

impl Seal {
    /// The seal of a repository; `secret` is empty where there is no encryption.
    pub(super) fn new(secret: &[u8]) -> Self {
        match secret.is_empty() {
            true => Self::Hashed(blake3::derive_key("pgcairn 2026 seal", secret)),
            false => {
                let key = blake3::derive_key("pgcairn 2026 cipher", secret);
                Self::Encrypted(Box::new(XChaCha20Poly1305::new(&key.into())))
            }
        }
    }

    pub(super) fn kind(&self) -> SealKind {
        match self {
            Self::Hashed(_) => SealKind::Hashed,
            Self::Encrypted(_) => SealKind::Encrypted,
        }
    }

    /// Turns the frame in `out[from..]` into stored bytes.
    pub(super) fn close(&self, id: &ChunkId, out: &mut Vec<u8>, from: usize) -> io::Result<()> {
        match self {
            Self::Hashed(key) => {
                let seal = hash(key, id, &out[from..]);
                out.extend_from_slice(&seal);
            }
            Self::Encrypted(cipher) => {
                let mut nonce = [0; NONCE];
                getrandom::fill(&mut nonce).map_err(io::Error::other)?;
                let frame = (&mut out[from..]).into();
                let tag = cipher.encrypt_inout_detached(&XNonce::from(nonce), &id.0, frame);
                out.extend_from_slice(&tag.map_err(|_cipher_says_nothing| io::Error::other("cannot encrypt"))?);
                out.extend_from_slice(&nonce);
            }
        }
        Ok(())
    }

    /// The frame in stored bytes. A hashed seal is compared only if `prove`; an encrypted one always is.
    pub(super) fn open<'a>(&self, id: &ChunkId, stored: &'a [u8], prove: bool) -> Result<Cow<'a, [u8]>, String> {
        let short = || format!("a chunk of {} stored bytes has no seal", stored.len());
        match self {
            Self::Hashed(key) => {
                let (frame, seal) = stored.split_last_chunk::<TAG>().ok_or_else(short)?;
                match prove && hash(key, id, frame) != *seal {
                    true => Err(format!("the seal of chunk {id} is broken")),
                    false => Ok(Cow::Borrowed(frame)),
                }
            }
            Self::Encrypted(cipher) => {
                let (rest, nonce) = stored.split_last_chunk::<NONCE>().ok_or_else(short)?;
                let (hidden, tag) = rest.split_last_chunk::<TAG>().ok_or_else(short)?;
                let mut frame = hidden.to_vec();
                let opened = cipher.decrypt_inout_detached(
                    &XNonce::from(*nonce),
                    &id.0,
                    frame.as_mut_slice().into(),
                    &Tag::from(*tag),
                );
                match opened {
                    Ok(()) => Ok(Cow::Owned(frame)),
                    Err(_) => Err(format!("the seal of chunk {id} is broken, or it was encrypted with another key")),
                }
            }
        }
    }
}

/// Hides info objects; does nothing where there is no encryption.
#[derive(Clone)]
pub(super) struct InfoSeal(Option<Box<XChaCha20Poly1305>>);

impl InfoSeal {
    /// The seal of a repository; `secret` is empty where there is no encryption.
    pub(super) fn new(secret: &[u8]) -> Self {
        let key = blake3::derive_key("pgcairn 2026 info", secret);
        Self((!secret.is_empty()).then(|| Box::new(XChaCha20Poly1305::new(&key.into()))))
    }

    /// The encrypted bytes, the tag and the nonce, bound to the object's key.
    pub(super) fn close(&self, object: &str, plain: &[u8]) -> io::Result<Option<Vec<u8>>> {
        let Some(cipher) = &self.0 else { return Ok(None) };
        let mut nonce = [0; NONCE];
        getrandom::fill(&mut nonce).map_err(io::Error::other)?;
        let hidden = cipher.encrypt(&XNonce::from(nonce), Payload { msg: plain, aad: object.as_bytes() });
        let mut hidden = hidden.map_err(|_cipher_says_nothing| io::Error::other("cannot encrypt"))?;
        hidden.extend_from_slice(&nonce);
        Ok(Some(hidden))
    }

    /// What `close` hid.
    pub(super) fn open(&self, object: &str, hidden: &[u8]) -> Result<Vec<u8>, String> {
        let cipher = self.0.as_ref().ok_or("it is encrypted")?;
        let (hidden, nonce) = hidden.split_last_chunk::<NONCE>().ok_or("it is too short")?;
        let opened = cipher.decrypt(&XNonce::from(*nonce), Payload { msg: hidden, aad: object.as_bytes() });
        opened.map_err(|_cipher_says_nothing| "its seal is broken, or it was encrypted with another key".into())
    }
}

fn hash(key: &[u8; 32], id: &ChunkId, frame: &[u8]) -> [u8; TAG] {
    let mut hasher = blake3::Hasher::new_keyed(key);
    hasher.update(&id.0).update(frame);
    let mut seal = [0; TAG];
    seal.copy_from_slice(&hasher.finalize().as_bytes()[..TAG]);
    seal
}

impl fmt::Debug for Seal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Seal({:?})", self.kind())
    }
}

impl fmt::Debug for InfoSeal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("InfoSeal")
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_is_closed_opens_and_any_change_is_found() {
        for secret in [&b""[..], b"a secret"] {
            let (seal, id) = (Seal::new(secret), ChunkId([7; 32]));
            let mut stored = b"frame of a chunk".to_vec();
            seal.close(&id, &mut stored, 0).unwrap();
            assert_eq!(&*seal.open(&id, &stored, true).unwrap(), b"frame of a chunk");
            assert!(seal.open(&ChunkId([8; 32]), &stored, true).is_err(), "another chunk's name");
            for at in 0..stored.len() {
                let mut changed = stored.clone();
                changed[at] ^= 1;
                assert!(seal.open(&id, &changed, true).is_err(), "flipped byte {at}");
                assert!(seal.open(&id, &stored[..at], true).is_err(), "cut at {at}");
            }
        }
    }

    #[test]
    fn an_encrypted_frame_hides_and_never_repeats() {
        let (seal, id) = (Seal::new(b"a secret"), ChunkId([7; 32]));
        let (mut one, mut two) = (b"frame of a chunk".to_vec(), b"frame of a chunk".to_vec());
        seal.close(&id, &mut one, 0).unwrap();
        seal.close(&id, &mut two, 0).unwrap();
        assert_ne!(one, two);
        assert!(!one.windows(5).any(|part| part == b"frame"));
        assert!(Seal::new(b"another").open(&id, &one, true).is_err());
    }
}
