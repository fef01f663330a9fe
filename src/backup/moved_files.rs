//! Where a file's content may be when the parent has nothing under its path: `ALTER DATABASE ... SET TABLESPACE` moves and
//! `CREATE DATABASE` by file copy copies a whole directory, byte for byte, and every file in it keeps its name. So the file of
//! the same name (number, fork, segment) in another database's directory is its twin.
//!
//! That they are equal is a guess, and never more: a twin is what a file is compared with, by the hash of every grain, as with
//! its own earlier state. Whatever twin is chosen costs or saves space, and can do no harm.

use crate::error::{Context, Result};
use crate::format::manifest::{Description, Entry, File, Node};
use crate::postgres::{FileClass, Fork, Layout, RelationFile};
use crate::repo::manifest::{ManifestCursor, ManifestIndex};

/// Files of the parent that are remembered, 24 bytes each: 96 MiB at most. Others are twins of nothing.
const NAMES_MAX: usize = 4 << 20;
/// Below are the catalogs, which every database has; from here on relations of users are counted (`FirstNormalObjectId`),
/// mostly in one database each and its copies.
const FIRST_OF_USERS: u32 = 16384;
/// Segments that a name has room for.
const SEGMENTS_MAX: u32 = 1 << 30;

/// The parent's manifest, by path and by the names of relations' files.
#[derive(Debug)]
pub(super) struct Twins {
    index: ManifestIndex,
    layout: Layout,
    /// ascending
    names: Vec<Name>,
    /// the directory asked for last, and the one where its files have their twins, as far as that was seen
    home: Option<(Directory, Directory)>,
}

/// Where a relation's file is: oids of its database and its tablespace.
type Directory = (u32, u32);

/// A relation's file; those that are called the same are neighbours, by size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Name {
    number: u32,
    /// fork in the lowest two bits
    segment: u32,
    size: u64,
    directory: Directory,
}

impl Name {
    /// None for what has no twin: an empty file has nothing to share, and a file of `global/` is nowhere else.
    fn new(of: &RelationFile, size: u64) -> Option<Self> {
        let fork = match of.fork {
            Fork::Main => 0,
            Fork::FreeSpace => 1,
            Fork::Visibility => 2,
            Fork::Init => 3,
        };
        let segment = (of.segment < SEGMENTS_MAX).then_some(of.segment << 2 | fork)?;
        let directory = (of.database, of.tablespace);
        (size > 0 && of.database != 0).then_some(Self { number: of.number, segment, size, directory })
    }

    fn called(&self) -> (u32, u32) {
        (self.number, self.segment)
    }
}

impl Twins {
    /// Of a manifest, from its beginning.
    pub(super) fn of(manifest: &ManifestCursor) -> Result<Self> {
        let Description { label, database, .. } = &manifest.description;
        let layout = database.layout().context(|| format!("the manifest of backup {label}"))?;
        let mut names = Vec::new();
        let index = manifest.by_path(|entry| {
            if let (Some(name), true) = (name(layout, entry), names.len() < NAMES_MAX) {
                names.push(name);
            }
        })?;
        names.sort_unstable();
        Ok(Self { index, layout, names, home: None })
    }

    /// The file under this path.
    pub(super) fn at(&self, path: &[u8]) -> Result<Option<File>> {
        Ok(self.index.find(path)?.and_then(|entry| match entry.node {
            Node::File(file) => Some(file),
            Node::Directory | Node::Symlink(_) => None,
        }))
    }

    /// The twin of a file of `size` bytes, under whose path the parent has none.
    pub(super) fn find(&mut self, path: &[u8], size: u64) -> Result<Option<File>> {
        let FileClass::Relation(of) = self.layout.classify(path) else { return Ok(None) };
        let Some(wanted) = Name::new(&of, size) else { return Ok(None) };
        let home = self.home.filter(|(of, _)| *of == wanted.directory).map(|(_, home)| home);
        let Some(twin) = choose(&self.names, wanted, home) else { return Ok(None) };
        if wanted.number >= FIRST_OF_USERS || home.is_none() {
            self.home = Some((wanted.directory, twin.directory));
        }
        let (database, tablespace) = twin.directory;
        let name = path.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
        let path = [self.layout.database_directory(tablespace, database).as_bytes(), b"/", name].concat();
        self.at(&path)
    }
}

fn name(layout: Layout, entry: &Entry) -> Option<Name> {
    let Node::File(file) = &entry.node else { return None };
    match layout.classify(&entry.path) {
        FileClass::Relation(of) => Name::new(&of, file.size),
        _ => None,
    }
}

/// Of those called the same, in this order: one of the same size, of the same database in another tablespace, or in the directory
/// `home`, or in the first one; the largest that is smaller, since files grow; the smallest that is larger.
fn choose(names: &[Name], wanted: Name, home: Option<Directory>) -> Option<Name> {
    let from = |name: Name| names.get(names.partition_point(|other| *other < name)).copied();
    let sized = |name: &Name| (name.called(), name.size) == (wanted.called(), wanted.size);
    let called = |name: &Name| name.called() == wanted.called();
    let (database, _) = wanted.directory;
    let moved = || from(Name { directory: (database, 0), ..wanted }).filter(|of| of.directory.0 == database);
    let at_home =
        || home.and_then(|directory| from(Name { directory, ..wanted })).filter(|of| Some(of.directory) == home);
    // one of this size, or else the next larger one
    let first = names.partition_point(|other| (other.called(), other.size) < (wanted.called(), wanted.size));
    let smaller = || first.checked_sub(1).and_then(|at| names.get(at)).copied();
    moved()
        .filter(sized)
        .or_else(|| at_home().filter(sized))
        .or_else(|| names.get(first).copied().filter(sized))
        .or_else(|| smaller().filter(called))
        .or_else(|| names.get(first).copied().filter(called))
}

#[cfg(test)]
mod tests;
