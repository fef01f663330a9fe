//! What backups and clusters a stanza has. The manifests are the truth; `backup.info` is their summary.

use std::collections::btree_map::Entry;
use std::sync::Arc;

use super::{Repository, keys};
use crate::error::{Error, Result};
use crate::format::info::{ArchiveInfo, BackupInfo, BackupSummary, Info, Latest, decode, encode};
use crate::format::manifest::{Database, Description};
use crate::postgres::BackupKind;
use crate::store::{Body, ErrorKind, Store};

impl Repository {
    /// `archive.info`; its absence means that the stanza does not exist.
    pub fn archive_info(&self) -> Result<ArchiveInfo> {
        match self.read_info(&keys::archive_info(&self.stanza))? {
            Some(info) => Ok(info),
            None => Err(self.unknown_stanza()),
        }
    }

    /// `backup.info`, brought up to date with the manifests that are there: a backup exists when its manifest does.
    pub fn backup_info(&self) -> Result<BackupInfo> {
        self.backup_info_with(None)
    }

    /// The same, with a backup that was just committed and need not be read.
    fn backup_info_with(&self, fresh: Option<&Description>) -> Result<BackupInfo> {
        let mut info: BackupInfo = match self.read_info(&keys::backup_info(&self.stanza)) {
            Ok(info) => info.unwrap_or_default(),
            Err(error) if error.is_damage() => {
                tracing::warn!(%error, "backup.info and its copy are damaged; the manifests are read instead");
                BackupInfo::default()
            }
            Err(error) => return Err(error),
        };
        info.backups.extend(fresh.map(|of| (of.label.clone(), summary(of))));
        let labels = self.labels()?;
        info.backups.retain(|label, _| labels.contains(label));
        for label in labels {
            let Entry::Vacant(place) = info.backups.entry(label) else { continue };
            match self.description(place.key()) {
                Ok(description) => _ = place.insert(summary(&description)),
                Err(error) if error.is_not_found() => {}
                Err(error) => tracing::warn!(label = place.key(), %error, "a manifest cannot be read"),
            }
        }
        Ok(info)
    }

    /// Labels below the stanza, oldest first; one whose manifest was never written may be among them.
    pub fn labels(&self) -> Result<Vec<String>> {
        let mut names = self.store.names(&keys::backups(&self.stanza))?;
        names.retain(|name| name.parse::<crate::postgres::Label>().is_ok());
        Ok(names)
    }

    /// The label that `latest` or a label names, proved to exist.
    pub fn resolve(&self, backup: &str) -> Result<String> {
        if backup != "latest" {
            if backup.parse::<crate::postgres::Label>().is_err() {
                return Err(self.unknown_backup(backup));
            }
            return match self.store.size(&keys::manifest(&self.stanza, backup)) {
                Ok(Some(_)) => Ok(backup.to_owned()),
                Ok(None) => Err(self.unknown_backup(backup)),
                Err(error) => Err(error.into()),
            };
        }
        for label in self.labels()?.into_iter().rev() {
            if self.store.size(&keys::manifest(&self.stanza, &label))?.is_some() {
                return Ok(label);
            }
        }
        self.archive_info()?;
        Err(Error::new(format!("stanza {} has no backup yet", self.stanza)).hint("take one with \"pgcairn backup\""))
    }

    /// What a backup is, without its files.
    pub fn description(&self, label: &str) -> Result<Description> {
        Ok(self.open_manifest(label)?.description)
    }

    /// Creates the stanza for `database`, or finds it created already.
    pub fn create_stanza(&self, database: Database) -> Result<bool> {
        let key = keys::archive_info(&self.stanza);
        if let Some(info) = self.read_info::<ArchiveInfo>(&key)? {
            info.check(&self.stanza, &database)?;
            return Ok(false);
        }
        self.write_info(&keys::backup_info(&self.stanza), &BackupInfo::default())?;
        self.write_info(&key, &ArchiveInfo { history: vec![database] })?;
        Ok(true)
    }

    /// Enters a committed backup into the catalog and moves the pointers.
    pub fn enter(&self, description: &Description) -> Result<()> {
        let info = self.backup_info_with(Some(description))?;
        self.write_info(&keys::backup_info(&self.stanza), &info)?;
        let mut pointers = vec!["latest"];
        pointers.push(match description.kind {
            BackupKind::Full => "latest-full",
            BackupKind::Diff => "latest-diff",
            BackupKind::Incr => "latest-incr",
        });
        let latest = encode(&Latest { label: description.label.clone() })?;
        for pointer in pointers {
            self.store.put(&keys::latest(&self.stanza, pointer), Body::Bytes(latest.clone().into()))?;
        }
        Ok(())
    }

    fn read_info<T: Info>(&self, key: &str) -> Result<Option<T>> {
        let mut damage = None;
        for key in [key.to_owned(), format!("{key}.copy")] {
            match self.store.get(&key) {
                Ok(bytes) => match decode(&key, &bytes) {
                    Ok(info) => return Ok(Some(info)),
                    Err(error) => {
                        tracing::warn!(%error, "an info file is damaged; its copy is tried");
                        damage = Some(error);
                    }
                },
                Err(error) if error.kind == ErrorKind::NotFound => {}
                Err(error) => return Err(error.into()),
            }
        }
        damage.map_or(Ok(None), |error| Err(error.into()))
    }

    fn write_info<T: Info>(&self, key: &str, info: &T) -> Result<()> {
        let bytes: bytes::Bytes = encode(info)?.into();
        self.store.put(key, Body::Bytes(bytes.clone()))?;
        self.store.put(&format!("{key}.copy"), Body::Bytes(bytes))?;
        Ok(())
    }

    fn unknown_stanza(&self) -> Error {
        let error = Error::new(format!("stanza {} does not exist in {}", self.stanza, self.store.url()));
        match stanzas(&self.store) {
            Ok(names) if names.contains(&self.stanza) => error.hint(format!(
                "its archive.info and the copy of it are gone, other objects are there: put back {}",
                keys::archive_info(&self.stanza)
            )),
            Ok(names) if !names.is_empty() => error.hint(format!("stanzas there: {}", names.join(", "))),
            _ => error.hint("create it with \"pgcairn stanza-create\", or check --repo"),
        }
    }

    fn unknown_backup(&self, backup: &str) -> Error {
        let error = Error::new(format!("stanza {} has no backup {backup}", self.stanza));
        match self.archive_info().and_then(|_| self.labels()) {
            Err(error) => error,
            Ok(labels) if labels.is_empty() => error.hint("take one with \"pgcairn backup\""),
            Ok(labels) => {
                let newest: Vec<_> = labels.iter().rev().take(3).map(String::as_str).collect();
                error.hint(format!("the newest are: {}; see \"pgcairn info\"", newest.join(", ")))
            }
        }
    }
}

/// The stanzas a store holds.
pub fn stanzas(store: &Arc<dyn Store>) -> Result<Vec<String>> {
    Ok(store.names("archive/")?)
}

impl ArchiveInfo {
    /// The cluster this stanza is now.
    pub fn current(&self) -> Result<&Database> {
        self.history.last().ok_or_else(|| Error::new("archive.info names no cluster"))
    }

    /// Fails unless `database` is the cluster this stanza is now.
    pub fn check(&self, stanza: &str, database: &Database) -> Result<()> {
        let ours = self.current()?;
        if (ours.system_id, ours.version) == (database.system_id, database.version) {
            return Ok(());
        }
        Err(Error::new(format!(
            "stanza {stanza} is PostgreSQL {} with system identifier {}, but the server is PostgreSQL {} with {}",
            ours.version, ours.system_id, database.version, database.system_id
        ))
        .hint("check --stanza and --pg; another cluster needs a stanza of its own"))
    }
}

fn summary(of: &Description) -> BackupSummary {
    BackupSummary {
        kind: of.kind,
        prior: of.prior.clone(),
        pgcairn: of.pgcairn.clone(),
        database_id: of.database.id,
        start_time: of.start_time,
        stop_time: of.stop_time,
        start_lsn: of.start_lsn.clone(),
        stop_lsn: of.stop_lsn.clone(),
        wal_start: of.wal_start.clone(),
        wal_stop: of.wal_stop.clone(),
        sizes: of.sizes,
        page_errors: !of.page_errors.is_empty(),
    }
}
