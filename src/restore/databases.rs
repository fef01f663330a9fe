//! Which databases are restored; of all others the relations become files of zeros.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use crate::error::{Context, Error, Result};
use crate::format::manifest::Description;
use crate::postgres::{FileClass, Layout};
use crate::read::completion::stored_path;
use crate::read::view::View;

/// Restored unless excluded, whatever is included: a server can hardly do without.
const BUILT_IN: [&str; 3] = ["template0", "template1", "postgres"];
/// The file of each database that says where its catalogs are.
const RELATION_MAP: &[u8] = b"pg_filenode.map";
/// Databases that users make have this oid at least.
const FIRST_USER_OID: u32 = 16_384;

/// The databases that are asked for, each by its name or oid.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Databases {
    /// restored, if anything is listed; all others are not, but for those that every cluster has
    pub include: Vec<String>,
    /// not restored; beside [`Self::include`] only databases that every cluster has
    pub exclude: Vec<String>,
}

/// A database whose relations were restored as zeros.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ZeroedDatabase {
    /// its oid
    pub oid: u32,
    /// its name, where the backup knows it
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// Databases whose relations become zeros, by oid.
pub(super) type Zeroed = BTreeMap<u32, ZeroedDatabase>;

impl Databases {
    /// Those of a backup that are left out.
    pub(super) fn zeroed(&self, view: &View) -> Result<Zeroed> {
        if self.include.is_empty() && self.exclude.is_empty() {
            return Ok(Zeroed::new());
        }
        let known = Known { of: &view.description, oids: oids(view)? };
        let find =
            |wanted: &Vec<String>| wanted.iter().map(|wanted| known.find(wanted)).collect::<Result<BTreeSet<_>>>();
        let (include, exclude) = (find(&self.include)?, find(&self.exclude)?);
        if let Some(both) = include.intersection(&exclude).next() {
            return Err(Error::new(format!("database {} is included and excluded", known.describe(*both)))
                .hint("leave out one of --db-include and --db-exclude"));
        }
        let is_left_out = |oid: &u32| {
            exclude.contains(oid) || !include.is_empty() && !include.contains(oid) && !known.is_built_in(*oid)
        };
        let left_out = known.oids.iter().copied().filter(is_left_out);
        Ok(left_out.map(|oid| (oid, ZeroedDatabase { oid, name: known.name(oid).map(str::to_owned) })).collect())
    }
}

/// Whether a file of a backup is restored as zeros: a relation of a database that is left out, or the map that its catalogs are
/// found by. With that map and without the catalogs each connection to the database, and so autovacuum, would be a PANIC of the
/// whole server; without the map it is refused.
pub(super) fn is_zeroed(path: &[u8], layout: &Layout, zeroed: &Zeroed) -> bool {
    let beside = path.strip_suffix(RELATION_MAP).map(|directory| [directory, b"1"].concat());
    match layout.classify(beside.as_deref().unwrap_or(path)) {
        FileClass::Relation(file) => zeroed.contains_key(&file.database),
        _ => false,
    }
}

/// The databases of a backup.
struct Known<'a> {
    of: &'a Description,
    oids: BTreeSet<u32>,
}

impl Known<'_> {
    /// A name counts before an oid.
    fn find(&self, wanted: &str) -> Result<u32> {
        let named = self.of.databases.iter().find(|database| database.name == wanted).map(|database| database.oid);
        let oid = || wanted.parse().ok().filter(|oid| self.oids.contains(oid));
        named.or_else(oid).ok_or_else(|| {
            let all: Vec<String> = self.oids.iter().map(|oid| self.describe(*oid)).collect();
            let hint = match self.of.databases.is_empty() {
                true => "it was made before names were noted: give the oid, one of",
                false => "its databases are",
            };
            Error::new(format!("backup {} has no database \"{wanted}\"", self.of.label))
                .hint(format!("{hint} {}", all.join(", ")))
        })
    }

    fn name(&self, oid: u32) -> Option<&str> {
        self.of.databases.iter().find(|database| database.oid == oid).map(|database| database.name.as_str())
    }

    fn is_built_in(&self, oid: u32) -> bool {
        oid < FIRST_USER_OID || self.name(oid).is_some_and(|name| BUILT_IN.contains(&name))
    }

    fn describe(&self, oid: u32) -> String {
        ZeroedDatabase { oid, name: self.name(oid).map(str::to_owned) }.to_string()
    }
}

/// The databases that have files in a backup, wherever these are, and those that it names.
fn oids(view: &View) -> Result<BTreeSet<u32>> {
    let layout = view.description.database.layout().context(|| "the manifest".into())?;
    let mut oids: BTreeSet<u32> = view.description.databases.iter().map(|database| database.oid).collect();
    view.walk(&mut |path, _| {
        if let FileClass::Relation(file) = layout.classify(&stored_path(path))
            && file.database != 0
        {
            oids.insert(file.database);
        }
        Ok::<(), Error>(())
    })?;
    Ok(oids)
}

impl std::fmt::Display for ZeroedDatabase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.name {
            Some(name) => write!(f, "{name} ({})", self.oid),
            None => write!(f, "{}", self.oid),
        }
    }
}
