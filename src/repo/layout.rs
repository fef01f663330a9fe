//! Where each object of a stanza is. Described in `docs/format.md`.

use crate::error::{Error, Result};
use crate::format::chunk::PackId;

/// Refuses a stanza name that could not be a part of a key.
pub fn check_stanza(stanza: &str) -> Result<()> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if stanza.is_empty() || stanza.len() > 128 || stanza.starts_with(['.', '-']) || !stanza.chars().all(allowed) {
        return Err(Error::new(format!("\"{stanza}\" cannot name a stanza"))
            .hint("use up to 128 letters, digits, \".\", \"_\" and \"-\", and begin with a letter or digit"));
    }
    Ok(())
}

/// A pack of chunks.
pub fn pack(stanza: &str, id: PackId) -> String {
    let id = id.to_string();
    format!("chunk/{stanza}/{}/{id}", &id[..2])
}

/// All packs of chunks.
pub fn packs(stanza: &str) -> String {
    format!("chunk/{stanza}/")
}

/// Everything about the stanza's backups.
pub fn backups(stanza: &str) -> String {
    format!("backup/{stanza}/")
}

/// The manifest of a backup.
pub fn manifest(stanza: &str, label: &str) -> String {
    format!("backup/{stanza}/{label}/backup.manifest")
}

/// The catalog of backups.
pub fn backup_info(stanza: &str) -> String {
    format!("backup/{stanza}/backup.info")
}

/// The catalog of the archive.
pub fn archive_info(stanza: &str) -> String {
    format!("archive/{stanza}/archive.info")
}

/// The archives of all clusters of the stanza.
pub fn archives(stanza: &str) -> String {
    format!("archive/{stanza}/")
}

/// A pointer: `latest`, `latest-full`, `latest-diff`, `latest-incr`.
pub fn latest(stanza: &str, name: &str) -> String {
    format!("latest/{stanza}/{name}")
}

/// The wrapped secrets of an encrypted stanza.
pub fn secrets(stanza: &str) -> String {
    format!("key/{stanza}/")
}

/// Where a wrapped secret can be: one place, and a second one for a change of the passphrase.
pub fn secret_places(stanza: &str) -> [String; 2] {
    ["a", "b"].map(|place| format!("key/{stanza}/{place}"))
}

/// The locks of a stanza.
pub fn locks(stanza: &str) -> String {
    format!("lock/{stanza}/")
}

/// The marks of a stanza: packs that wait for their removal.
pub fn marks(stanza: &str) -> String {
    format!("mark/{stanza}/")
}

/// What verify found harmed.
pub fn harms(stanza: &str) -> String {
    format!("harm/{stanza}/")
}

/// The archive of one cluster: `16-1` is PostgreSQL 16, the stanza's first system identifier.
pub fn archive(stanza: &str, version: u32, history: u32) -> String {
    format!("archive/{stanza}/{version}-{history}/")
}

/// What all stored forms of one archived file begin with. Segments, partial segments and backup history files lie below
/// their timeline and high half (`0000000100000000/`) and carry a hash of their content; timeline history files do neither.
pub fn wal_prefix(archive: &str, name: &str) -> String {
    match name.ends_with(".history") {
        true => format!("{archive}{name}"),
        false => format!("{archive}{}/{name}-", &name[..16.min(name.len())]),
    }
}
