//! Small, human-readable objects: a magic line, pretty JSON, a checksum line.
//!
//! ```text
//! pgcairn backup.info 1
//! { ... }
//! blake3 <64 hex digits over all bytes before this line>
//! ```
//!
//! In an encrypted stanza one line `sealed <base64>` stands for the JSON, but for the object that holds the key.

use std::collections::BTreeMap;
use std::io;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::chunk::Keys;
use super::manifest::{Database, Sizes};
use super::{FormatError, Result, VERSION};
use crate::postgres::BackupKind;

/// `backup.info`: what backups there are. Can be rebuilt from the manifests.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BackupInfo {
    /// by label
    pub backups: BTreeMap<String, BackupSummary>,
}

/// What `info` shows of a backup without reading its manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BackupSummary {
    /// full, diff or incr
    #[serde(rename = "type")]
    pub kind: BackupKind,
    /// label of the parent
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prior: Option<String>,
    /// version of pgcairn that wrote it
    pub pgcairn: String,
    /// number of the cluster in `archive.info`
    pub database_id: u32,
    /// seconds since 1970
    pub start_time: i64,
    /// seconds since 1970
    pub stop_time: i64,
    /// where recovery starts
    pub start_lsn: String,
    /// where the copy is consistent
    pub stop_lsn: String,
    /// first segment needed
    pub wal_start: String,
    /// last segment needed
    pub wal_stop: String,
    /// what it weighs
    pub sizes: Sizes,
    /// pages failed their checksum
    pub page_errors: bool,
}

/// `archive.info`: the clusters this stanza has been, by number from 1; the last is the current one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ArchiveInfo {
    /// every system identifier that was ever backed up under this stanza
    pub history: Vec<Database>,
}

/// `latest/...`: the label of a backup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Latest {
    /// the backup's label
    pub label: String,
}

/// `harm/...`: packs in which verify found damage: new backups build on nothing in them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Harm {
    /// their ids, 32 hexadecimal digits each
    pub packs: Vec<String>,
}

/// What the holder of a lock does, and so whom it excludes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LockKind {
    /// takes a backup
    Backup,
    /// removes expired backups and WAL, and marks packs
    Expire,
    /// deletes packs that nothing refers to
    Sweep,
    /// changes what the stanza is: `stanza-create`, `stanza-upgrade`, `repo repair`
    Stanza,
    /// pushes a timeline history file
    History,
}

/// `lock/...`: who works on the stanza. Its holder writes it again and again to show that it lives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct LockInfo {
    /// what its holder does
    pub kind: LockKind,
    /// since when it is held, by the store's clock; absent while its writer still looks whether it may hold it
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<i64>,
    /// when this was written, by the holder's clock; for people, the store's own time counts
    pub heartbeat: i64,
    /// the holder's host
    pub host: String,
    /// its process id there
    pub pid: u32,
    /// the user it runs as
    pub user: String,
    /// the process among all that ever ran on this host: so that others there see at once that it is gone
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process: Option<String>,
    /// what it works on: the label of the backup
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub note: String,
    /// its holder failed and holds it no more: what it stored may be used again
    #[serde(default, skip_serializing_if = "is_false")]
    pub failed: bool,
    /// version of pgcairn
    pub pgcairn: String,
}

/// `mark/...`: packs that no manifest referred to when this was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// their ids, 32 hexadecimal digits each
    pub packs: Vec<String>,
}

impl std::fmt::Display for LockKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Backup => "backup",
            Self::Expire => "expire",
            Self::Sweep => "sweep",
            Self::Stanza => "change of the stanza",
            Self::History => "push of a history file",
        })
    }
}

/// Something that is stored in this form; `NAME` stands in the magic line.
pub trait Info: Serialize + DeserializeOwned {
    /// e.g. `backup.info`
    const NAME: &'static str;
}

impl Info for BackupInfo {
    const NAME: &'static str = "backup.info";
}

impl Info for ArchiveInfo {
    const NAME: &'static str = "archive.info";
}

impl Info for Latest {
    const NAME: &'static str = "latest";
}

impl Info for LockInfo {
    const NAME: &'static str = "lock";
}

impl Info for Harm {
    const NAME: &'static str = "harm";
}

impl Info for Mark {
    const NAME: &'static str = "mark";
}

fn is_false(value: &bool) -> bool {
    !value
}

/// Begins the line that stands for the JSON where it is encrypted.
const SEALED: &str = "sealed ";

/// The stored form of the object with the key `object`, encrypted where the stanza is.
pub fn encode<T: Info>(keys: &Keys, object: &str, info: &T) -> io::Result<Vec<u8>> {
    let json = serde_json::to_string_pretty(info)?;
    Ok(match keys.hide(object, json.as_bytes())? {
        Some(hidden) => envelope::<T>(&format!("{SEALED}{}", BASE64_STANDARD.encode(hidden))),
        None => envelope::<T>(&json),
    })
}

/// The stored form that everybody can read: of the object that holds the key.
pub fn encode_open<T: Info>(info: &T) -> io::Result<Vec<u8>> {
    Ok(envelope::<T>(&serde_json::to_string_pretty(info)?))
}

fn envelope<T: Info>(content: &str) -> Vec<u8> {
    let body = format!("pgcairn {} {VERSION}\n{content}\n", T::NAME);
    let checksum = blake3::hash(body.as_bytes());
    format!("{body}blake3 {checksum}\n").into_bytes()
}

/// Whether these bytes, if they are an info object, belong to an encrypted stanza.
pub fn is_sealed(bytes: &[u8]) -> bool {
    let second = bytes.iter().position(|byte| *byte == b'\n').map_or(&[][..], |at| &bytes[at + 1..]);
    second.starts_with(SEALED.as_bytes())
}

/// Reads and verifies the stored form. In an encrypted stanza nothing else than the encrypted one is taken, or whoever can
/// write there could put in what he likes.
pub fn decode<T: Info>(keys: &Keys, object: &str, bytes: &[u8]) -> Result<T> {
    let (at, content) = content::<T>(object, bytes)?;
    let fail = |what: String| FormatError::new(object, at as u64, what);
    match (keys.is_secret(), content.strip_prefix(SEALED)) {
        (false, None) => parse(object, at, content.as_bytes()),
        (false, Some(_)) => Err(fail("it is encrypted, and the stanza is not".into())),
        (true, None) => Err(fail("it is not encrypted, and the stanza is".into())),
        (true, Some(sealed)) => {
            let hidden = BASE64_STANDARD.decode(sealed.trim_end()).map_err(|error| fail(error.to_string()))?;
            parse(object, at, &keys.reveal(object, &hidden).map_err(fail)?)
        }
    }
}

/// Reads what [`encode_open`] wrote.
pub fn decode_open<T: Info>(object: &str, bytes: &[u8]) -> Result<T> {
    let (at, content) = content::<T>(object, bytes)?;
    parse(object, at, content.as_bytes())
}

/// What stands between the magic line and that of the checksum, and where it begins.
fn content<'a, T: Info>(object: &str, bytes: &'a [u8]) -> Result<(usize, &'a str)> {
    let fail = |offset: usize, what: &str| FormatError::new(object, offset as u64, what);
    let text = std::str::from_utf8(bytes).map_err(|error| fail(error.valid_up_to(), "not UTF-8"))?;
    let first = text.lines().next().unwrap_or_default();
    let version = first.strip_prefix(&format!("pgcairn {} ", T::NAME));
    let version = version.ok_or_else(|| fail(0, &format!("this is no {}: the magic line is missing", T::NAME)))?;
    if version != VERSION.to_string() {
        return Err(fail(0, &format!("format version {version}; this pgcairn reads version {VERSION}")));
    }
    let at = text.trim_end().rfind('\n').map_or(0, |at| at + 1);
    let (body, last) = text.split_at(at);
    if last != format!("blake3 {}\n", blake3::hash(body.as_bytes())) {
        return Err(fail(at, "the checksum is wrong"));
    }
    // the magic line ends in a line feed, or the checksum's line would be the first
    Ok((first.len() + 1, &body[first.len() + 1..]))
}

fn parse<T: Info>(object: &str, at: usize, json: &[u8]) -> Result<T> {
    serde_json::from_slice(json).map_err(|error| FormatError::new(object, at as u64, error.to_string()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn latest() -> Latest {
        Latest { label: "20240107-120000F".into() }
    }

    #[test]
    fn an_info_comes_back_and_every_changed_byte_is_found() {
        for keys in [Keys::new(b""), Keys::new(b"secret")] {
            let bytes = encode(&keys, "latest", &latest()).unwrap();
            assert_eq!(decode::<Latest>(&keys, "latest", &bytes).unwrap(), latest());
            assert_eq!(is_sealed(&bytes), keys.is_secret());
            for at in 0..bytes.len() {
                let mut changed = bytes.clone();
                changed[at] ^= 1;
                assert!(decode::<Latest>(&keys, "latest", &changed).is_err(), "byte {at}");
                assert!(decode::<Latest>(&keys, "latest", &bytes[..at]).is_err(), "cut at {at}");
            }
        }
    }

    #[test]
    fn one_kind_is_not_read_as_another() {
        let keys = Keys::new(b"");
        let bytes = encode(&keys, "backup.info", &BackupInfo::default()).unwrap();
        let error = decode::<ArchiveInfo>(&keys, "archive.info", &bytes).unwrap_err();
        assert!(error.what.contains("no archive.info"));
    }

    #[test]
    fn an_encrypted_info_is_legible_nowhere_and_valid_in_its_place_only() {
        let (keys, open) = (Keys::new(b"secret"), Keys::new(b""));
        let bytes = encode(&keys, "latest/main/latest", &latest()).unwrap();
        assert!(!String::from_utf8_lossy(&bytes).contains("label"));
        assert_ne!(bytes, encode(&keys, "latest/main/latest", &latest()).unwrap(), "the same bytes twice");
        assert!(decode::<Latest>(&keys, "latest/main/latest-full", &bytes).is_err(), "in another's place");
        assert!(decode::<Latest>(&Keys::new(b"other"), "latest/main/latest", &bytes).is_err());
        assert!(decode::<Latest>(&open, "latest/main/latest", &bytes).unwrap_err().what.contains("is encrypted"));
        let plain = encode(&open, "latest/main/latest", &latest()).unwrap();
        assert!(decode::<Latest>(&keys, "latest/main/latest", &plain).unwrap_err().what.contains("not encrypted"));
        assert_eq!(plain, encode_open(&latest()).unwrap());
        assert_eq!(decode_open::<Latest>("latest", &plain).unwrap(), latest());
    }
}
