//! What backups and clusters a stanza has. The manifests are the truth; `backup.info` is their summary.

use std::collections::BTreeSet;
use std::collections::btree_map::Entry;
use std::sync::Arc;

use super::{Repository, layout, reread};
use crate::error::{Error, Result};
use crate::format::info::{ArchiveInfo, BackupInfo, BackupSummary, Info, Latest, LockKind, is_sealed};
use crate::format::manifest::{Database, Description};
use crate::postgres::{BackupKind, Label};
use crate::store::{Body, Store};

impl Repository {
    /// `archive.info`; its absence means that the stanza does not exist.
    pub fn archive_info(&self) -> Result<ArchiveInfo> {
        match self.read_info(&layout::archive_info(&self.stanza))? {
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
        let mut info: BackupInfo = match self.read_info(&layout::backup_info(&self.stanza)) {
            Ok(info) => info.unwrap_or_default(),
            Err(error) if error.is_damage() => {
                tracing::warn!(%error, "backup.info and its copy are damaged; the manifests are read instead");
                BackupInfo::default()
            }
            Err(error) => return Err(error),
        };
        info.backups.extend(fresh.map(|of| (of.label.clone(), summary(of))));
        let labels = self.labels()?;
        let unlisted: Vec<String> = info.backups.keys().filter(|label| !labels.contains(label)).cloned().collect();
        for label in unlisted {
            // a listing may lag behind: the object itself decides
            if !self.has_manifest(&label)? {
                info.backups.remove(&label);
            }
        }
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

    /// Labels of the stanza's backups, oldest first.
    pub fn labels(&self) -> Result<Vec<String>> {
        let prefix = layout::backups(&self.stanza);
        let (mut labels, mut after) = (Vec::new(), None);
        loop {
            // the manifests themselves: a directory may have outlived its manifest
            let page = self.store.list(&prefix, after.as_deref())?;
            for object in &page.objects {
                let label = object.key.strip_prefix(&prefix).and_then(|rest| rest.strip_suffix("/backup.manifest"));
                labels.extend(label.filter(|label| label.parse::<Label>().is_ok()).map(str::to_owned));
            }
            after = page.next;
            if after.is_none() {
                return Ok(labels);
            }
        }
    }

    /// Labels for those who delete by them.
    ///
    /// # Errors
    /// When the listing lacks a backup that `backup.info` or a pointer names and whose manifest is there: listings of some
    /// stores lag behind, and what a backup needs that is not listed would be deleted.
    pub fn labels_proved(&self) -> Result<Vec<String>> {
        // named first: a backup that commits meanwhile is listed then
        let named = self.labels_named()?;
        let labels = self.labels()?;
        for label in named.into_iter().filter(|label| !labels.contains(label)) {
            if self.has_manifest(&label)? {
                return Err(Error::new(format!(
                    "the listing of {} lacks backup {label}, whose manifest is there, so nothing is removed",
                    self.store.url()
                ))
                .hint(
                    "the store's listings lag behind, or something between changes them: run the command again later",
                ));
            }
        }
        Ok(labels)
    }

    /// The backups that `backup.info`, its copy and the pointers name; what is damaged names none.
    fn labels_named(&self) -> Result<BTreeSet<String>> {
        let mut named = BTreeSet::new();
        for key in with_copy(&layout::backup_info(&self.stanza)) {
            let info = self.info_state::<BackupInfo>(&key)?;
            named.extend(info.into_iter().flat_map(|info| info.backups.into_keys()));
        }
        let kinds = [BackupKind::Full, BackupKind::Diff, BackupKind::Incr].map(pointer);
        for name in std::iter::once("latest").chain(kinds) {
            let latest = self.info_state::<Latest>(&layout::latest(&self.stanza, name))?;
            named.extend(latest.map(|latest| latest.label));
        }
        Ok(named)
    }

    fn has_manifest(&self, label: &str) -> Result<bool> {
        Ok(self.store.size(&layout::manifest(&self.stanza, label))?.is_some())
    }

    /// The label that `latest` or a label names, proved to exist.
    pub fn resolve(&self, backup: &str) -> Result<String> {
        if backup != "latest" {
            if backup.parse::<Label>().is_err() {
                return Err(self.unknown_backup(backup));
            }
            return match self.store.size(&layout::manifest(&self.stanza, backup)) {
                Ok(Some(_)) => Ok(backup.to_owned()),
                Ok(None) => Err(self.unknown_backup(backup)),
                Err(error) => Err(error.into()),
            };
        }
        if let Some(label) = self.labels()?.pop() {
            return Ok(label);
        }
        self.archive_info()?;
        Err(Error::new(format!("stanza {} has no backup yet", self.stanza)).hint("take one with \"pgcairn backup\""))
    }

    /// What a backup is, without its files.
    pub fn description(&self, label: &str) -> Result<Description> {
        Ok(self.open_manifest(label)?.description)
    }

    /// Creates the stanza for `database`, or finds it created already.
    ///
    /// # Errors
    /// When there is no `archive.info`, but backups or WAL of the stanza: they are of another cluster perhaps. When somebody else
    /// creates it at this moment.
    pub fn create_stanza(&self, database: Database) -> Result<bool> {
        // of two that create it for different clusters at the same moment, the second finds that of the first
        let lock = self.lock(LockKind::Stanza, "stanza-create")?;
        if !self.keys.is_secret() && self.has_secret()? {
            return Err(self.is_encrypted());
        }
        let is_created = self.create_locked_stanza(database)?;
        lock.check().map(|()| is_created)
    }

    /// The same by who holds the lock.
    pub(super) fn create_locked_stanza(&self, database: Database) -> Result<bool> {
        let key = layout::archive_info(&self.stanza);
        if let Some(info) = self.read_info::<ArchiveInfo>(&key)? {
            info.check(&self.stanza, &database)?;
            return Ok(false);
        }
        if let Some(found) = self.first_object()? {
            return Err(Error::new(format!("stanza {} has no {key}, but other objects: {found}", self.stanza)).hint(
                "\"pgcairn repo repair\" makes it again from backups and WAL; a new cluster needs another stanza",
            ));
        }
        self.write_info(&layout::backup_info(&self.stanza), &BackupInfo::default())?;
        self.write_info(&key, &ArchiveInfo { history: vec![database] })?;
        Ok(true)
    }

    /// The key of something that is stored for the stanza: a manifest, or a file of the archive.
    fn first_object(&self) -> Result<Option<String>> {
        if let Some(label) = self.labels()?.pop() {
            return Ok(Some(layout::manifest(&self.stanza, &label)));
        }
        let info = with_copy(&layout::archive_info(&self.stanza));
        let found = self.store.list(&layout::archives(&self.stanza), None)?.objects;
        Ok(found.into_iter().map(|object| object.key).find(|key| !info.contains(key)))
    }

    /// From now on the stanza is `database`, as after pg_upgrade; returns its number, or `None` when it was that already.
    /// What was backed up and archived before stays readable under its own number.
    pub fn upgrade_stanza(&self, mut database: Database) -> Result<Option<u32>> {
        let mut info = self.archive_info()?;
        let current = info.current()?;
        if (current.system_id, current.version) == (database.system_id, database.version) {
            return Ok(None);
        }
        if database.version < current.version {
            return Err(Error::new(format!(
                "stanza {} is PostgreSQL {}, the server is the older PostgreSQL {}",
                self.stanza, current.version, database.version
            ))
            .hint("check --stanza and --pg; a cluster that was not upgraded needs a stanza of its own"));
        }
        database.id = info.history.iter().map(|known| known.id).max().unwrap_or_default() + 1;
        let id = database.id;
        info.history.push(database);
        self.write_info(&layout::archive_info(&self.stanza), &info)?;
        Ok(Some(id))
    }

    /// Enters a committed backup into the catalog and moves the pointers.
    pub fn enter(&self, description: &Description) -> Result<()> {
        let info = self.backup_info_with(Some(description))?;
        self.write_info(&layout::backup_info(&self.stanza), &info)?;
        self.point("latest", &description.label)?;
        self.point(pointer(description.kind), &description.label)
    }

    /// Writes the summary of the backups there are, and moves the pointers that name none of them; returns the keys of
    /// pointers that name nothing any more.
    pub fn refresh_catalog(&self) -> Result<Vec<String>> {
        let info = self.backup_info()?;
        self.write_info(&layout::backup_info(&self.stanza), &info)?;
        self.refresh_pointers(&info)
    }

    /// Writes the summary from the manifests alone; returns how many, and those that cannot be read. Of these the old summary,
    /// if it is whole, still says what they are.
    pub fn rebuild_backup_info(&self) -> Result<(usize, Vec<(String, Error)>)> {
        let mut info = BackupInfo::default();
        let old: Option<BackupInfo> = self.read_info(&layout::backup_info(&self.stanza)).unwrap_or_default();
        let mut unreadable = Vec::new();
        for label in self.labels()? {
            match self.description(&label) {
                Ok(description) => _ = info.backups.insert(label, summary(&description)),
                Err(error) if error.is_damage() => {
                    let known = old.as_ref().and_then(|old| old.backups.get(&label)).cloned();
                    info.backups.extend(known.map(|of| (label.clone(), of)));
                    unreadable.push((label, error));
                }
                Err(error) => return Err(error),
            }
        }
        self.write_info(&layout::backup_info(&self.stanza), &info)?;
        Ok((info.backups.len(), unreadable))
    }

    /// Writes what clusters the stanza has been.
    pub fn write_archive_info(&self, info: &ArchiveInfo) -> Result<()> {
        self.write_info(&layout::archive_info(&self.stanza), info)
    }

    fn refresh_pointers(&self, info: &BackupInfo) -> Result<Vec<String>> {
        let newest = |kind: Option<BackupKind>| {
            info.backups.iter().rfind(|(_, of)| kind.is_none_or(|kind| of.kind == kind)).map(|(label, _)| label)
        };
        let mut empty = Vec::new();
        let kinds = [BackupKind::Full, BackupKind::Diff, BackupKind::Incr].map(|kind| (pointer(kind), Some(kind)));
        for (name, kind) in std::iter::once(("latest", None)).chain(kinds) {
            let key = layout::latest(&self.stanza, name);
            let named = self.info_state::<Latest>(&key)?.ok().map(|latest| latest.label);
            match newest(kind) {
                Some(label) if named.as_ref().is_none_or(|named| !info.backups.contains_key(named)) => {
                    self.point(name, label)?;
                }
                Some(_) => {}
                None => empty.push(key),
            }
        }
        Ok(empty)
    }

    fn point(&self, name: &str, label: &str) -> Result<()> {
        let key = layout::latest(&self.stanza, name);
        let latest = self.encode_info(&key, &Latest { label: label.to_owned() })?;
        Ok(self.store.put(&key, Body::Bytes(latest))?)
    }

    /// Every info file, its copy, and every pointer that should be there, each with what is wrong with it.
    pub fn info_states(&self) -> Result<Vec<(String, Option<String>)>> {
        let mut states = Vec::new();
        for key in with_copy(&layout::archive_info(&self.stanza)) {
            states.push((key.clone(), self.info_state::<ArchiveInfo>(&key)?.err()));
        }
        for key in with_copy(&layout::backup_info(&self.stanza)) {
            states.push((key.clone(), self.info_state::<BackupInfo>(&key)?.err()));
        }
        let labels = self.labels()?;
        let parsed: Vec<Label> = labels.iter().filter_map(|label| label.parse().ok()).collect();
        for kind in [BackupKind::Full, BackupKind::Diff, BackupKind::Incr] {
            if !parsed.iter().any(|label| label.kind() == kind) {
                continue;
            }
            let key = layout::latest(&self.stanza, pointer(kind));
            let what = match self.info_state::<Latest>(&key)? {
                Ok(latest) if labels.contains(&latest.label) => None,
                Ok(latest) => Some(format!("names {}, which is gone", latest.label)),
                Err(what) => Some(what),
            };
            states.push((key, what));
        }
        Ok(states)
    }

    /// What an info file says, or what is wrong with it.
    fn info_state<T: Info>(&self, key: &str) -> Result<std::result::Result<T, String>> {
        match self.fetch_info(key) {
            Ok(info) => Ok(info.map_err(|error| format!("is damaged: {}", error.what))),
            Err(error) if error.is_not_found() => Ok(Err("is missing".into())),
            Err(error) => Err(error),
        }
    }

    fn read_info<T: Info>(&self, key: &str) -> Result<Option<T>> {
        let mut damage = None;
        for key in with_copy(key) {
            let read = reread::checked(&*self.store, |reads| {
                let bytes = reads.get(&key)?;
                // who opens a stanza for one call does not look for its key first
                match !self.keys.is_secret() && is_sealed(&bytes) {
                    true => Err(self.is_encrypted()),
                    false => Ok(self.decode_info(&key, &bytes)?),
                }
            });
            match read {
                Ok(info) => return Ok(Some(info)),
                Err(error) if error.is_damage() => {
                    tracing::warn!(%error, "an info file is damaged; its copy is tried");
                    damage = Some(error);
                }
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(error),
            }
        }
        damage.map_or(Ok(None), Err)
    }

    fn write_info<T: Info>(&self, key: &str, info: &T) -> Result<()> {
        for key in with_copy(key) {
            self.store.put(&key, Body::Bytes(self.encode_info(&key, info)?))?;
        }
        Ok(())
    }

    fn unknown_stanza(&self) -> Error {
        let error = Error::new(format!("stanza {} does not exist in {}", self.stanza, self.store.url()));
        match stanzas(&self.store) {
            Ok(names) if names.contains(&self.stanza) => error.hint(format!(
                "{} and its copy are gone, other objects are there: \"pgcairn repo repair\" makes them again",
                layout::archive_info(&self.stanza)
            )),
            Ok(names) if !names.is_empty() => error.hint(format!("stanzas there: {}", names.join(", "))),
            Ok(_) => error.hint("create it with \"pgcairn stanza-create\", or check --repo"),
            // a store that fails shows nothing; its own error says what to do
            Err(failed) => error.source(failed),
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
        .hint("after pg_upgrade: \"pgcairn stanza-upgrade\"; else check --stanza and --pg, another cluster needs a stanza of its own"))
    }
}

/// An info file and its copy.
fn with_copy(key: &str) -> [String; 2] {
    [key.to_owned(), format!("{key}.copy")]
}

/// The name of the pointer to the newest backup of a kind.
fn pointer(kind: BackupKind) -> &'static str {
    match kind {
        BackupKind::Full => "latest-full",
        BackupKind::Diff => "latest-diff",
        BackupKind::Incr => "latest-incr",
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

#[cfg(test)]
mod tests;
