//! Makes again what can be made from what is there: `backup.info` and the pointers from the manifests, `archive.info` from the
//! manifests and the archive.

use std::collections::BTreeMap;

use crate::error::{Error, Result};
use crate::format::info::{ArchiveInfo, LockKind};
use crate::format::manifest::Database;
use crate::format::pack::{PackKind, WalKey};
use crate::postgres::{LongPageHeader, SegmentName};
use crate::repo::{Repository, layout};

/// Repairs the stanza's summaries; returns what was done, line by line.
pub fn repair(repository: &Repository) -> Result<Vec<String>> {
    let labels = repository.labels()?;
    if labels.is_empty() && archives(repository)?.is_empty() {
        // a stanza of which nothing is there is none
        repository.archive_info()?;
    }
    let lock = repository.lock(LockKind::Stanza, "repo repair")?;
    let mut done = Vec::new();
    let wrong: Vec<(String, String)> =
        repository.info_states()?.into_iter().filter_map(|(key, state)| Some((key, state?))).collect();
    let archive_key = layout::archive_info(&repository.stanza);
    let archive_is_wrong = wrong.iter().any(|(key, _)| key.starts_with(&archive_key));
    done.extend(wrong.iter().map(|(key, what)| format!("{key} {what}")));
    lock.check()?;
    if archive_is_wrong {
        // the one of the pair that is whole counts
        let info = match repository.archive_info() {
            Ok(info) => info,
            Err(_) => rebuild_archive_info(repository, &labels, &mut done)?,
        };
        repository.write_archive_info(&info)?;
        done.push(format!("{archive_key} and its copy were written: {} clusters", info.history.len()));
    }
    let (count, unreadable) = repository.rebuild_backup_info()?;
    done.push(format!("{} and its copy were written: {count} backups", layout::backup_info(&repository.stanza)));
    done.extend(unreadable.into_iter().map(|(label, error)| format!("backup {label} cannot be read: {error}")));
    let empty = repository.refresh_catalog()?;
    if !empty.is_empty() {
        repository.store.delete(&empty)?;
    }
    Ok(done)
}

/// Clusters of which there is an archive: number and major version.
fn archives(repository: &Repository) -> Result<BTreeMap<u32, u32>> {
    let names = repository.store.names(&format!("archive/{}/", repository.stanza))?;
    let parse = |name: &String| {
        let (version, id) = name.split_once('-')?;
        Some((id.parse().ok()?, version.parse().ok()?))
    };
    Ok(names.iter().filter_map(parse).collect())
}

/// The clusters as manifests and WAL know them.
fn rebuild_archive_info(repository: &Repository, labels: &[String], done: &mut Vec<String>) -> Result<ArchiveInfo> {
    let mut clusters: BTreeMap<u32, Database> = BTreeMap::new();
    for label in labels {
        match repository.description(label) {
            Ok(description) => _ = clusters.insert(description.database.id, description.database),
            Err(error) if error.is_damage() => {}
            Err(error) => return Err(error),
        }
    }
    for (id, version) in archives(repository)? {
        if clusters.contains_key(&id) {
            continue;
        }
        if let Some(database) = from_wal(repository, id, version)? {
            done.push(format!("archive {version}-{id} has no backup: what is known of its cluster comes from its WAL"));
            clusters.insert(id, database);
        }
    }
    if clusters.is_empty() {
        return Err(Error::new(format!("no manifest and no WAL of stanza {} can be read", repository.stanza))
            .hint("choose another stanza, or remove what is left of this one by hand"));
    }
    Ok(ArchiveInfo { history: clusters.into_values().collect() })
}

/// What a segment tells of its cluster: all that archiving needs. The rest is asked of the server by the next backup.
fn from_wal(repository: &Repository, id: u32, version: u32) -> Result<Option<Database>> {
    let page = repository.store.list(&layout::archive(&repository.stanza, version, id), None)?;
    for object in page.objects {
        let is_segment = |key: WalKey<'_>| key.name.parse::<SegmentName>().is_ok();
        if !WalKey::parse(&object.key).is_some_and(is_segment) {
            continue;
        }
        let mut first = None;
        let read = repository.read_pack(&object.key, PackKind::Wal, |plain| {
            first = first.or_else(|| LongPageHeader::parse(plain));
            Ok(())
        });
        match (read, first) {
            (Ok(()), Some(header)) => {
                return Ok(Some(Database {
                    id,
                    version,
                    system_id: header.system_identifier,
                    catalog_version: 0,
                    control_version: 0,
                    page_size: 8192,
                    segment_size: 1 << 30,
                    wal_page_size: header.page_bytes,
                    wal_segment_size: u64::from(header.segment_bytes),
                    checksums: false,
                }));
            }
            (Err(error), _) if !error.is_damage() => return Err(error),
            _ => {}
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests;
