//! The WAL archive: what is there, under which key.

use std::panic::resume_unwind;
use std::thread;

use super::{Repository, keys};
use crate::error::{Context, Error, Result};
use crate::format::FormatError;
use crate::format::chunk::PackId;
use crate::format::manifest::Database;
use crate::format::pack::{POINT, PackKind, WalKey};
use crate::postgres::{Major, SegmentName, SegmentSize, TimelineHistory, WalIdentity, WalName};
use crate::store::{Listed, PAGE_OBJECTS_MAX};

/// Parts of a whole archive that are listed at the same time.
const LISTINGS: usize = 16;
/// Objects that one of these parts is to hold: a little less than whole pages, so that the last page is not mostly empty.
const LISTING_OBJECTS: u64 = 4 * PAGE_OBJECTS_MAX as u64 - 150;

/// The archive of one cluster.
#[derive(Clone, Debug)]
pub struct Archive<'a> {
    repository: &'a Repository,
    prefix: String,
    /// segments that a directory of the archive holds when none is missing
    per_directory: u64,
}

impl Repository {
    /// The archive of `database`.
    pub fn archive(&self, database: &Database) -> Archive<'_> {
        let prefix = keys::archive(&self.stanza, database.version, database.id);
        Archive { repository: self, prefix, per_directory: (1 << 32) / database.wal_segment_size.max(1 << 20) }
    }

    /// The content of a file in the archive of `database`, whole.
    pub fn wal_file(&self, database: &Database, key: &str) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.read_pack_of(Some(database.system_id), key, PackKind::Wal, |plain| {
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

    /// Every archived file, in the order of their keys; calls `each` with name and object. A large archive is listed in parts,
    /// several at the same time: the pages of one listing come one after the other.
    pub fn files(&self, mut each: impl FnMut(&str, &Listed)) -> Result<()> {
        let mut tell = |objects: &[Listed]| {
            let named = objects.iter().filter_map(|object| Some((self.name_of(&object.key)?, object)));
            named.for_each(|(name, object)| each(name, object));
        };
        let page = self.repository.store.list(&self.prefix, None)?;
        tell(&page.objects);
        let Some(after) = page.next else { return Ok(()) };
        let bounds = self.bounds(after)?;
        let parts: Vec<(&str, Option<&str>)> = bounds
            .iter()
            .enumerate()
            .map(|(number, after)| (after.as_str(), bounds.get(number + 1).map(String::as_str)))
            .collect();
        for some in parts.chunks(LISTINGS) {
            let listed: Vec<Result<Vec<Listed>>> = thread::scope(|scope| {
                let listing = |(after, to): &(&str, Option<&str>)| {
                    let (after, to) = ((*after).to_owned(), to.map(str::to_owned));
                    scope.spawn(move || self.part(after, to.as_deref()))
                };
                let threads: Vec<_> = some.iter().map(listing).collect();
                threads.into_iter().map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
            });
            for objects in listed {
                tell(&objects?);
            }
        }
        Ok(())
    }

    /// Where the parts of a listing begin that goes on after the key `after`. No object has one of these as its key.
    fn bounds(&self, after: String) -> Result<Vec<String>> {
        let directories = self.repository.store.names(&self.prefix)?;
        let beyond = directories.iter().filter(|name| is_directory(name)).map(|name| format!("{}{name}", self.prefix));
        let beyond: Vec<String> = beyond.filter(|bound| *bound > after).collect();
        let directories = (LISTING_OBJECTS / self.per_directory.max(1)).max(1) as usize;
        let bounds = beyond.into_iter().skip(directories - 1).step_by(directories);
        Ok(std::iter::once(after).chain(bounds).collect())
    }

    /// The objects whose keys come after `after`, up to `to`.
    fn part(&self, mut after: String, to: Option<&str>) -> Result<Vec<Listed>> {
        let mut objects = Vec::new();
        loop {
            let page = self.repository.store.list(&self.prefix, Some(&after))?;
            let is_inside = |object: &Listed| to.is_none_or(|to| object.key.as_str() < to);
            let is_last = page.objects.last().is_some_and(|object| !is_inside(object));
            objects.extend(page.objects.into_iter().take_while(is_inside));
            match page.next.filter(|_| !is_last) {
                Some(next) => after = next,
                None => return Ok(objects),
            }
        }
    }

    /// The first and the last segment by name, for people.
    pub fn range(&self) -> Result<Option<(String, String)>> {
        let segment = |name: &&str| name.len() == 24;
        let mut directories = self.repository.store.names(&self.prefix)?;
        directories.retain(|name| is_directory(name));
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

/// Whether this is a directory of segments: named by timeline and the upper half of the position.
fn is_directory(name: &str) -> bool {
    name.len() == 16 && name.bytes().all(|byte| byte.is_ascii_hexdigit())
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

/// Fails unless `text`, archived as `name`, is the history of a timeline of that number: its ancestors have lower ones.
pub fn check_history(key: &str, name: &str, text: &[u8]) -> Result<()> {
    let Ok(WalName::History(timeline)) = WalName::parse(name) else { return Ok(()) };
    let parsed = TimelineHistory::parse(timeline, text).map(drop);
    Ok(parsed.map_err(|error| FormatError::new(key, 0, error.to_string()))?)
}

/// Two contents under one name.
pub fn twice(name: &str) -> Error {
    Error::new(format!("the archive holds different files as {name}"))
        .hint("two clusters pushed under one stanza; find out which, and remove the wrong object by hand")
        .conflict()
}

#[cfg(test)]
mod tests;
