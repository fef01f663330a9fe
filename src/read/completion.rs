//! What a backup needs beside its files before PostgreSQL can start on it: `backup_label`, the WAL for consistency,
//! settings that make a copy harmless, tablespaces inside the view; and what it needs to recover to a point.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::builder::Builder;
use super::view::{Content, ViewOptions};
use crate::error::{Context, Error, Result};
use crate::format::chunk::Decoder;
use crate::format::manifest::Description;
use crate::postgres::{AUTO_CONF, RECOVERY_SIGNAL, STANDBY_SIGNAL, SegmentName, SegmentSize, Timeline, WalName, conf};
use crate::recovery::plan::Recovery;
use crate::repo::wal::check_history;
use crate::repo::{Repository, layout, reread};

/// Answers questions about the mount; hidden from listings.
pub const HIDDEN: &[u8] = b".pgcairn";
/// Where a view keeps the tablespaces, below [`HIDDEN`].
const TABLESPACES: &[u8] = b".pgcairn/tablespaces/";
/// Where a data directory links to its tablespaces.
const LINKS: &[u8] = b"pg_tblspc/";
/// Where people write settings; [`AUTO_CONF`] is read after it.
const CONF: &[u8] = b"postgresql.conf";

/// A recovery as a data directory is prepared for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Prepared {
    /// what is reached
    pub recovery: Recovery,
    /// settings for `postgresql.auto.conf`: its own, what is done at the target, and `restore_command`
    pub settings: Vec<(String, String)>,
    /// whether the WAL it needs lies in `pg_wal`
    pub presents_wal: bool,
}

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
    if options.copy || options.recovery.is_some() {
        settings(builder, repository, of, options)?;
    }
    if !options.placed || options.recovery.is_some() {
        clear(builder, repository, of, options)?;
    }
    if !of.wal_stored {
        archived_wal(builder, repository, of)?;
    }
    match &options.recovery {
        Some(prepared) => recovery(builder, repository, of, prepared),
        None => Ok(()),
    }
}

/// The signal that makes a server recover, and the WAL it needs for that.
fn recovery(builder: &mut Builder, repository: &Repository, of: &Description, prepared: &Prepared) -> Result<()> {
    let signal = if prepared.recovery.standby { STANDBY_SIGNAL } else { RECOVERY_SIGNAL };
    builder.add(signal.as_bytes(), 0o600, of.stop_time, Content::Text(Bytes::new()));
    if !prepared.presents_wal {
        return Ok(());
    }
    let size = SegmentSize::new(of.database.wal_segment_size).context(|| "the manifest".into())?;
    let archive = repository.archive(&of.database);
    for leg in prepared.recovery.wal.chunk_by(|a, b| a.0 == b.0) {
        let needed: Vec<SegmentName> =
            Recovery { wal: leg.to_vec(), ..prepared.recovery.clone() }.segments(size).collect();
        present(builder, repository, of, &needed)?;
    }
    for timeline in &prepared.recovery.histories {
        let name = WalName::History(Timeline(*timeline)).to_string();
        let object = archive.find(&name)?.ok_or_else(|| Error::new(format!("the archive has no {name} any more")))?;
        let text = repository.wal_file(&of.database, &object.key)?;
        check_history(&object.key, &name, &text)?;
        let text = Content::Text(Bytes::from(text));
        builder.add(format!("pg_wal/{name}").as_bytes(), 0o600, of.stop_time, text);
    }
    Ok(())
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

/// Appends settings to `postgresql.auto.conf`, which PostgreSQL reads last. A recovery's target must be the only one: those
/// that some file has already become comments.
fn settings(builder: &mut Builder, repository: &Repository, of: &Description, options: &ViewOptions) -> Result<()> {
    let mut conf = read_stored(builder, repository, AUTO_CONF.as_bytes())?;
    let mut settings = if options.copy { conf::of_copy(of.database.version) } else { Vec::new() };
    if let Some(prepared) = &options.recovery {
        conf = conf::comment_out(&conf, conf::is_recovery_target);
        settings.extend(prepared.settings.iter().map(|(name, value)| (name.as_str(), value.as_str())));
    }
    let comment = format!("written by pgcairn for a copy of backup {}", of.label);
    conf::append(&mut conf, &comment, &settings).context(|| AUTO_CONF.into())?;
    builder.add(AUTO_CONF.as_bytes(), 0o600, of.stop_time, Content::Text(Bytes::from(conf)));
    Ok(())
}

/// Makes comments of lines of `postgresql.conf` that must not count in a copy: the target of another recovery, and the data
/// directory, which a server takes from there before it reads `postgresql.auto.conf`.
fn clear(builder: &mut Builder, repository: &Repository, of: &Description, options: &ViewOptions) -> Result<()> {
    if builder.inline(CONF).is_none() {
        return Ok(());
    }
    let main = read_stored(builder, repository, CONF)?;
    let cleared = conf::comment_out(&main, |name| {
        (options.recovery.is_some() && conf::is_recovery_target(name)) || conf::is_data_directory(name)
    });
    if cleared != main {
        builder.add(CONF, 0o600, of.stop_time, Content::Text(Bytes::from(cleared)));
    }
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
        let key = layout::pack(&repository.stanza, chunk.pack);
        let plain = reread::checked(&*repository.store, |reads| {
            let stored = reads.get_range(&key, u64::from(chunk.offset), u64::from(chunk.stored_len))?;
            Ok(decoder.decode(&repository.keys, &key, &chunk, &stored)?.plain)
        })?;
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
    present(builder, repository, of, &needed)
}

/// Segments of one timeline, in ascending order, as files of `pg_wal`.
fn present(builder: &mut Builder, repository: &Repository, of: &Description, needed: &[SegmentName]) -> Result<()> {
    let found = repository.archive(&of.database).segments(needed)?;
    for (segment, object) in needed.iter().zip(found) {
        let size = of.database.wal_segment_size;
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
