//! What a backup needs beside its files before PostgreSQL can start on it: `backup_label`, the WAL for consistency,
//! settings that make a copy harmless, tablespaces inside the view.

use bytes::Bytes;

use super::builder::Builder;
use super::view::{Content, ViewOptions};
use crate::error::{Context, Error, Result};
use crate::format::chunk::Decoder;
use crate::format::manifest::Description;
use crate::postgres::{SegmentName, SegmentSize, Timeline, conf};
use crate::repo::{Repository, keys};

/// Answers questions about the mount; hidden from listings.
pub const HIDDEN: &[u8] = b".pgcairn";
/// Where a view keeps the tablespaces, below [`HIDDEN`].
const TABLESPACES: &[u8] = b".pgcairn/tablespaces/";
/// Where a data directory links to its tablespaces.
const LINKS: &[u8] = b"pg_tblspc/";
/// The file that ALTER SYSTEM writes, read after every other.
const AUTO_CONF: &[u8] = b"postgresql.auto.conf";

/// Where a view shows what the manifest has at `path`: files of tablespaces lie behind their link.
pub fn view_path(path: &[u8]) -> Vec<u8> {
    match path.strip_prefix(LINKS) {
        Some(rest) if rest.contains(&b'/') => [TABLESPACES, rest].concat(),
        _ => path.to_vec(),
    }
}

/// The inverse of [`view_path`].
pub fn stored_path(path: &[u8]) -> Vec<u8> {
    match path.strip_prefix(TABLESPACES) {
        Some(rest) => [LINKS, rest].concat(),
        None => path.to_vec(),
    }
}

/// Adds everything that is not in the manifest.
pub fn complete(builder: &mut Builder, repository: &Repository, of: &Description, options: &ViewOptions) -> Result<()> {
    let mut text = |path: &[u8], text: Vec<u8>| {
        builder.add(path, 0o600, of.stop_time, Content::Text(Bytes::from(text)));
    };
    text(b"backup_label", of.backup_label.clone().into_bytes());
    builder.add(b"backup_manifest", 0o600, of.stop_time, Content::BackupManifest);
    builder.add(HIDDEN, 0o700, of.stop_time, Content::Directory);
    builder.add(b".pgcairn/status", 0o400, of.stop_time, Content::Status);
    tablespaces(builder, of);
    if !options.settings.is_empty() {
        settings(builder, repository, of, options)?;
    }
    match of.wal_stored {
        true => Ok(()),
        false => archived_wal(builder, repository, of),
    }
}

fn tablespaces(builder: &mut Builder, of: &Description) {
    if of.tablespaces.is_empty() {
        return;
    }
    builder.add(b".pgcairn/tablespaces", 0o700, of.stop_time, Content::Directory);
    for tablespace in &of.tablespaces {
        let directory = format!(".pgcairn/tablespaces/{}", tablespace.oid);
        let link = Content::Link(format!("../{directory}").into_bytes().into());
        builder.add(format!("pg_tblspc/{}", tablespace.oid).as_bytes(), 0o777, of.stop_time, link);
        builder.add(directory.as_bytes(), 0o700, of.stop_time, Content::Directory);
    }
}

/// Appends settings to `postgresql.auto.conf`, which PostgreSQL reads last.
fn settings(builder: &mut Builder, repository: &Repository, of: &Description, options: &ViewOptions) -> Result<()> {
    let mut conf = read_stored(builder, repository, AUTO_CONF)?;
    let settings: Vec<_> = options.settings.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let comment = format!("written by pgcairn for a copy of backup {}", of.label);
    conf::append(&mut conf, &comment, &settings).context(|| "postgresql.auto.conf".into())?;
    builder.add(AUTO_CONF, 0o600, of.stop_time, Content::Text(Bytes::from(conf)));
    Ok(())
}

/// The content of a small stored file; empty when the backup has none of that name.
fn read_stored(builder: &Builder, repository: &Repository, path: &[u8]) -> Result<Vec<u8>> {
    let Some((_, extents)) = builder.inline(path) else {
        return match builder.get(path) {
            None => Ok(Vec::new()),
            Some(_) => Err(Error::new(format!("{} is too large to be a configuration file", path.escape_ascii()))),
        };
    };
    let mut decoder = Decoder::new().context(|| "cannot set up zstd".into())?;
    let mut bytes = Vec::new();
    for extent in extents {
        let chunk = extent.chunk;
        let key = keys::pack(&repository.stanza, chunk.pack);
        let stored = repository.store.get_range(&key, u64::from(chunk.offset), u64::from(chunk.stored_len))?;
        let plain = decoder.decode(&repository.keys, &key, &chunk, &stored)?.plain;
        bytes.extend_from_slice(&plain[extent.offset as usize..(extent.offset + extent.len) as usize]);
    }
    Ok(bytes)
}

/// The segments that consistency needs, out of the archive.
fn archived_wal(builder: &mut Builder, repository: &Repository, of: &Description) -> Result<()> {
    let size = SegmentSize::new(of.database.wal_segment_size).context(|| "the manifest".into())?;
    let lsn = |text: &str| text.parse().context(|| format!("WAL position {text} of backup {}", of.label));
    let (start, stop) = (lsn(&of.start_lsn)?, lsn(&of.stop_lsn)?);
    let needed: Vec<SegmentName> = size.names_covering(Timeline(of.timeline), start, stop).collect();
    let archive = repository.archive(&of.database);
    let found = archive.segments(&needed)?;
    for (segment, object) in needed.iter().zip(found) {
        let size = u64::from(size.bytes());
        let content = match object {
            Some(object) => Content::Archived { size, key: object.key.into(), stored: object.size },
            None => {
                let why = format!("backup {} needs WAL {segment}, which is missing", of.label);
                tracing::error!("{why}");
                Content::Missing { size, why: why.into() }
            }
        };
        builder.add(format!("pg_wal/{segment}").as_bytes(), 0o600, of.stop_time, content);
    }
    Ok(())
}
