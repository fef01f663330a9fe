//! The WAL archive: what is there, under which key.

use std::panic::resume_unwind;
use std::thread;

use super::{Repository, layout};
use crate::error::{Context, Error, Result};
use crate::format::FormatError;
use crate::format::chunk::PackId;
use crate::format::manifest::Database;
use crate::format::pack::{POINT, PackKind, WalKey};
use crate::postgres::{Major, SegmentName, SegmentSize, Timeline, TimelineHistory, WalIdentity, WalName};
use crate::store::{Listed, PAGE_OBJECTS_MAX, Page};

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

/// What is known of an archive before all of it is listed.
#[derive(Debug)]
pub struct Listing {
    /// the first page
    objects: Vec<Listed>,
    /// the key after which there is more
    next: Option<String>,
    /// if there is more: all directories and history files
    names: Vec<String>,
}

impl Listing {
    /// True when nothing is left to be listed.
    pub fn is_whole(&self) -> bool {
        self.next.is_none()
    }

    /// Timelines that have a directory, ascending; none where nothing is left to be listed.
    pub fn timelines(&self) -> Vec<Timeline> {
        let numbers = self.directories().filter_map(|name| u32::from_str_radix(&name[..8], 16).ok());
        let mut all: Vec<Timeline> = numbers.map(Timeline).collect();
        all.dedup();
        all
    }

    fn directories(&self) -> impl Iterator<Item = &str> {
        self.names.iter().map(String::as_str).filter(|name| is_directory(name))
    }
}

impl Repository {
    /// The archive of `database`.
    pub fn archive(&self, database: &Database) -> Archive<'_> {
        let prefix = layout::archive(&self.stanza, database.version, database.id);
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
        let prefix = layout::wal_prefix(&self.prefix, name);
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
        let mut after = layout::wal_prefix(&self.prefix, &first.to_string());
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
        let mut after = layout::wal_prefix(&self.prefix, &segment.to_string());
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
        let prefix = layout::wal_prefix(&self.prefix, name);
        let point = if point { POINT } else { "" };
        if name.ends_with(".history") { prefix } else { format!("{prefix}{content}{point}") }
    }

    /// Every archived file, in the order of their keys; calls `each` with name and object.
    pub fn files(&self, each: impl FnMut(&str, &Listed)) -> Result<()> {
        self.files_from(&self.begin()?, None, each)
    }

    /// Begins to list the archive: its first objects, and what there is beside them.
    pub fn begin(&self) -> Result<Listing> {
        let Page { objects, next } = self.repository.store.list(&self.prefix, None)?;
        let names = if next.is_some() { self.repository.store.names(&self.prefix)? } else { Vec::new() };
        Ok(Listing { objects, next, names })
    }

    /// Goes on with a listing: every file in the order of the keys; with `from`, those of the directories
    /// that hold segments from that number on, of whatever timeline, and maybe others. Calls `each` with
    /// name and object. A large archive is listed in parts, several at the same time: the pages of one
    /// listing come one after the other.
    pub fn files_from(&self, listing: &Listing, from: Option<u64>, mut each: impl FnMut(&str, &Listed)) -> Result<()> {
        let mut tell = |objects: &[Listed]| {
            let named = objects.iter().filter_map(|object| Some((self.name_of(&object.key)?, object)));
            named.for_each(|(name, object)| each(name, object));
        };
        tell(&listing.objects);
        let Some(after) = &listing.next else { return Ok(()) };
        for some in self.parts(listing, after, from).chunks(LISTINGS) {
            let listed: Vec<Result<Vec<Listed>>> = thread::scope(|scope| {
                let listing = |(after, to): &(String, Option<String>)| {
                    let (after, to) = (after.clone(), to.clone());
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

    /// The parts of a listing that goes on after the key `after`: behind which key each begins, and before
    /// which it ends. No object has the name of a directory as its key, so a part may begin behind it.
    fn parts(&self, listing: &Listing, after: &str, from: Option<u64>) -> Vec<(String, Option<String>)> {
        let high = from.map_or(0, |from| from / self.per_directory.max(1));
        let is_wanted = |name: &str| u64::from_str_radix(&name[8..], 16).is_ok_and(|of| of >= high);
        let key = |name: &str| format!("{}{name}", self.prefix);
        let most = (LISTING_OBJECTS / self.per_directory.max(1)).max(1);
        let mut parts: Vec<(String, Option<String>)> = Vec::new();
        // the directory that the first page ends in is gone on with, if it is wanted at all
        let begun = listing.directories().take_while(|name| key(name).as_str() <= after).last();
        let (mut goes_on, mut directories) = (begun.is_none_or(is_wanted), u64::from(begun.is_some()));
        if goes_on {
            parts.push((after.to_owned(), None));
        }
        for name in listing.directories().filter(|name| key(name).as_str() > after) {
            let wanted = is_wanted(name);
            let begins = wanted && (!goes_on || directories == most);
            if goes_on && (begins || !wanted) {
                parts.last_mut().into_iter().for_each(|(_, to)| *to = Some(key(name)));
            }
            if begins {
                parts.push((key(name), None));
                directories = 0;
            }
            directories += u64::from(wanted);
            goes_on = wanted;
        }
        parts
    }

    /// The timeline history files of a listing, by timeline and key.
    pub fn histories(&self, listing: &Listing) -> Vec<(Timeline, String)> {
        let first = listing.objects.iter().filter_map(|object| self.name_of(&object.key));
        let history = |name: &str| match WalName::parse(name) {
            Ok(WalName::History(timeline)) => Some((timeline, layout::wal_prefix(&self.prefix, name))),
            _ => None,
        };
        let mut all: Vec<_> = first.chain(listing.names.iter().map(String::as_str)).filter_map(history).collect();
        all.sort_unstable();
        all.dedup();
        all
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
