//! The WAL archive: what is there, under which key.

use super::{Repository, keys};
use crate::error::{Context, Error, Result};
use crate::format::chunk::PackId;
use crate::format::manifest::Database;
use crate::format::pack::{POINT, PackKind, WalKey};
use crate::postgres::{Major, SegmentName, SegmentSize, WalIdentity, WalName};
use crate::store::Listed;

/// The archive of one cluster.
#[derive(Clone, Debug)]
pub struct Archive<'a> {
    repository: &'a Repository,
    prefix: String,
}

impl Repository {
    /// The archive of `database`.
    pub fn archive(&self, database: &Database) -> Archive<'_> {
        Archive { repository: self, prefix: keys::archive(&self.stanza, database.version, database.id) }
    }

    /// The content of an archived file, whole.
    pub fn wal_file(&self, key: &str) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.read_pack(key, PackKind::Wal, |plain| {
            bytes.extend_from_slice(plain);
            Ok(())
        })?;
        Ok(bytes)
    }
}

impl Archive<'_> {
    /// Finds an archived file by its name in `pg_wal`.
    ///
    /// # Errors
    /// When the archive holds two contents under that name: nobody can tell which one is right.
    pub fn find(&self, name: &str) -> Result<Option<Listed>> {
        let prefix = keys::wal_prefix(&self.prefix, name);
        let mut found = self.repository.store.list(&prefix, None)?.objects;
        found.retain(|object| self.name_of(&object.key) == Some(name));
        match found.len() {
            0 | 1 => Ok(found.pop()),
            _ => Err(twice(name)),
        }
    }

    /// Finds segments of one timeline, given in ascending order: a page of a listing for a thousand of them.
    pub fn segments(&self, needed: &[SegmentName]) -> Result<Vec<Option<Listed>>> {
        let one = |(name, mut found): (&SegmentName, Vec<Listed>)| match found.len() {
            0 | 1 => Ok(found.pop()),
            _ => Err(twice(&name.to_string())),
        };
        needed.iter().zip(self.stored(needed)?).map(one).collect()
    }

    /// All that is stored under the name of each of these segments of one timeline, given in ascending order. More than
    /// one is a conflict, see [`Self::find`].
    pub fn stored(&self, needed: &[SegmentName]) -> Result<Vec<Vec<Listed>>> {
        let mut found = vec![Vec::new(); needed.len()];
        let (Some(first), Some(last)) = (needed.first(), needed.last()) else { return Ok(found) };
        let prefix = format!("{}{:08X}", self.prefix, first.timeline().0);
        let mut after = keys::wal_prefix(&self.prefix, &first.to_string());
        loop {
            let page = self.repository.store.list(&prefix, Some(&after))?;
            for object in page.objects {
                let segment = self.name_of(&object.key).and_then(|name| name.parse::<SegmentName>().ok());
                let Some(segment) = segment else { continue };
                if segment > *last {
                    return Ok(found);
                }
                if let Ok(at) = needed.binary_search(&segment) {
                    found[at].push(object);
                }
            }
            match page.next {
                Some(next) => after = next,
                None => return Ok(found),
            }
        }
    }

    /// Whether there is a segment.
    pub fn has_segments(&self) -> Result<bool> {
        let mut after = None;
        loop {
            let page = self.repository.store.list(&self.prefix, after.as_deref())?;
            if page.objects.iter().any(|object| self.segment_of(&object.key).is_some()) {
                return Ok(true);
            }
            match page.next {
                Some(next) => after = Some(next),
                None => return Ok(false),
            }
        }
    }

    /// The first segment of its timeline from this one on.
    pub fn first_from(&self, segment: SegmentName) -> Result<Option<SegmentName>> {
        let prefix = format!("{}{:08X}", self.prefix, segment.timeline().0);
        let mut after = keys::wal_prefix(&self.prefix, &segment.to_string());
        loop {
            let page = self.repository.store.list(&prefix, Some(&after))?;
            let mut segments = page.objects.iter().filter_map(|object| self.segment_of(&object.key));
            if let Some(found) = segments.find(|found| *found >= segment) {
                return Ok(Some(found));
            }
            match page.next {
                Some(next) => after = next,
                None => return Ok(None),
            }
        }
    }

    /// Where a file with this content goes; `point`: a restore point may begin in it.
    pub fn key(&self, name: &str, content: PackId, point: bool) -> String {
        let prefix = keys::wal_prefix(&self.prefix, name);
        let point = if point { POINT } else { "" };
        if name.ends_with(".history") { prefix } else { format!("{prefix}{content}{point}") }
    }

    /// Every archived file, in name order within its timeline; calls `each` with name and object.
    pub fn files(&self, mut each: impl FnMut(&str, &Listed)) -> Result<()> {
        let mut after = None;
        loop {
            let page = self.repository.store.list(&self.prefix, after.as_deref())?;
            for object in &page.objects {
                if let Some(name) = self.name_of(&object.key) {
                    each(name, object);
                }
            }
            match page.next {
                Some(next) => after = Some(next),
                None => return Ok(()),
            }
        }
    }

    /// The first and the last segment by name, for people.
    pub fn range(&self) -> Result<Option<(String, String)>> {
        let segment = |name: &&str| name.len() == 24;
        let mut directories = self.repository.store.names(&self.prefix)?;
        directories.retain(|name| name.len() == 16 && name.bytes().all(|byte| byte.is_ascii_hexdigit()));
        let (Some(first), Some(last)) = (directories.first(), directories.last()) else { return Ok(None) };
        let names = |directory: &str| -> Result<Vec<String>> {
            let mut names = self.repository.store.names(&format!("{}{directory}/", self.prefix))?;
            names.retain_mut(|name| match WalKey::parse(name).map(|key| key.name.to_owned()) {
                Some(bare) if segment(&bare.as_str()) => {
                    *name = bare;
                    true
                }
                _ => false,
            });
            Ok(names)
        };
        let (first, last) = (names(first)?.into_iter().next(), names(last)?.pop());
        Ok(first.zip(last))
    }

    fn segment_of(&self, key: &str) -> Option<SegmentName> {
        self.name_of(key)?.parse().ok()
    }

    fn name_of<'k>(&self, key: &'k str) -> Option<&'k str> {
        let name = key.rsplit('/').next()?;
        if name.ends_with(".history") { Some(name) } else { Some(WalKey::parse(name)?.name) }
    }
}

/// What every WAL segment of `database` says of itself.
pub fn wal_identity(database: &Database) -> Result<WalIdentity> {
    Ok(WalIdentity {
        major: Major::new(database.version).context(|| "archive.info".into())?,
        system_identifier: database.system_id,
        segment_size: SegmentSize::new(database.wal_segment_size).context(|| "archive.info".into())?,
        page_bytes: database.wal_page_size,
    })
}

/// Fails unless `first`, the first bytes of a file archived as `name`, are those of that segment of `database`.
pub fn check_first_bytes(database: &Database, name: &str, first: &[u8]) -> Result<()> {
    let (Ok(WalName::Segment(segment)) | Ok(WalName::Partial(segment))) = WalName::parse(name) else { return Ok(()) };
    let checked = wal_identity(database)?.check_segment(segment, first);
    checked.map(drop).map_err(|error| {
        Error::new(format!("the archive holds something else as {name}"))
            .hint("the object was swapped or overwritten; recovery cannot go past it")
            .source(error)
    })
}

/// Two contents under one name.
pub fn twice(name: &str) -> Error {
    Error::new(format!("the archive holds different files as {name}"))
        .hint("two clusters pushed under one stanza; find out which, and remove the wrong object by hand")
}
