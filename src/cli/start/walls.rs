//! A clone's server in its sandbox: what it sees in place of its source's directories.

use std::fs::{self, DirBuilder};
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use super::super::clones::{Clone, Place};
use super::super::output;
use super::Start;
use super::reach::Attempt;
use super::replay::Replay;
use crate::clone::sandbox::{Cover, Sandbox, UNAVAILABLE};
use crate::error::{Error, Result};
use crate::files;
use crate::format::manifest::Description;
use crate::postgres::{AUTO_CONF, conf};
use crate::recovery::tablespaces::{Created, created_in};
use crate::repo::wal::wal_identity;
use crate::user::{User, as_user};

/// Where a clone keeps its tablespaces, below its data directory.
const TABLESPACES: &str = ".pgcairn/tablespaces";
/// What the server's log says, in any language, when it cannot replay a `CREATE TABLESPACE`.
const CANNOT_CREATE: &str = "Tablespace/CREATE";

impl Start {
    /// Runs pg_ctl in a sandbox; where there can be none, without, if the WAL does nothing that only a sandbox makes safe.
    pub(super) fn run_server(
        &self,
        attempt: &Attempt<'_>,
        of: &Description,
        pg_ctl: &mut Command,
        replay: &mut Option<Replay>,
    ) -> Result<Output> {
        let (place, clone) = (attempt.place, attempt.clone);
        let mut sandboxed = self.sandbox(place, clone, of).command(pg_ctl)?;
        let done = attempt.output(&mut sandboxed, replay)?;
        if done.status.code() != Some(UNAVAILABLE.into()) {
            return Ok(done);
        }
        let why = String::from_utf8_lossy(&done.stderr).trim().to_owned();
        refuse_new_tablespaces(place, of)?;
        output::note(&format!(
            "the clone's server runs without namespaces of its own ({why}): what its SQL, functions and jobs connect to or \
             write to is reached"
        ));
        attempt.output(pg_ctl, replay)
    }

    fn sandbox(&self, place: &Place, clone: &Clone, of: &Description) -> Sandbox {
        let programs = fs::canonicalize(&clone.programs).unwrap_or_else(|_| clone.programs.clone());
        let libraries = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
        let prefixes = [&clone.programs, &programs].into_iter().filter_map(|bin| bin.parent()).map(Path::to_owned);
        Sandbox {
            own: vec![place.mount(), place.run()],
            visible: prefixes.chain(std::env::split_paths(&libraries).filter(|path| path.is_absolute())).collect(),
            covers: covers(place, clone, of),
            sockets: socket_directories(place),
            network: self.network,
            user: nix::unistd::geteuid().is_root().then_some((clone.uid, clone.gid)),
        }
    }

    /// After the server has failed: directories of the clone for tablespaces that its WAL creates and that have none yet. True if
    /// there are any, so that the server can be started again.
    pub(super) fn cover_new_tablespaces(&self, place: &Place, clone: &mut Clone, of: &Description) -> Result<bool> {
        let log = files::read_regular(&place.log()).unwrap_or_default();
        if !String::from_utf8_lossy(&log).contains(CANNOT_CREATE) {
            return Ok(false);
        }
        let mut is_new = false;
        for created in created_in(&place.mount().join("pg_wal"), &wal_identity(&of.database)?)? {
            let known = covers(place, clone, of).into_iter().any(|cover| cover.at == created.path);
            if !known && !created.path.as_os_str().is_empty() {
                make_directory(place, clone, created.oid)?;
                clone.tablespaces.push(created);
                is_new = true;
            }
        }
        place.save(clone)?;
        Ok(is_new)
    }
}

/// The source's directories, and the clone's in their place.
fn covers(place: &Place, clone: &Clone, of: &Description) -> Vec<Cover> {
    let tablespaces = of.tablespaces.iter().map(|of| (of.oid, PathBuf::from(&of.path)));
    let new = clone.tablespaces.iter().map(|of| (of.oid, of.path.clone()));
    let cover = |(oid, at)| Cover { at, shows: directory(place, oid) };
    let data = Cover { at: PathBuf::from(&of.data_directory), shows: place.mount() };
    std::iter::once(data).chain(tablespaces.chain(new).map(cover)).filter(|cover| cover.at.is_absolute()).collect()
}

fn directory(place: &Place, oid: u32) -> PathBuf {
    place.mount().join(TABLESPACES).join(oid.to_string())
}

/// Makes the directory of a tablespace in the clone, with those above it.
fn make_directory(place: &Place, clone: &Clone, oid: u32) -> Result<()> {
    let directory = directory(place, oid);
    let above: Vec<&Path> = directory.ancestors().take(3).collect();
    // the server's user owns the data directory, and may have put links into it
    as_user(User::other(clone.uid, clone.gid).as_ref(), || {
        for path in above.into_iter().rev().filter(|path| !path.exists()) {
            DirBuilder::new().mode(0o700).create(path).map_err(|error| Error::io("create", path, error))?;
        }
        Ok(())
    })
}

/// Has the links that replay made lead where the directories are, also for those outside of the sandbox: to whoever reads the
/// mount, and to a server that continues the clone.
pub(super) fn settle_links(place: &Place, clone: &Clone, of: &Description) -> Result<()> {
    let links = place.mount().join("pg_tblspc");
    let covers = covers(place, clone, of);
    as_user(User::other(clone.uid, clone.gid).as_ref(), || replace_links(place, &links, &covers))
}

fn replace_links(place: &Place, links: &Path, covers: &[Cover]) -> Result<()> {
    for entry in fs::read_dir(links).map_err(|error| Error::io("list", links, error))? {
        let link = entry.map_err(|error| Error::io("list", links, error))?.path();
        let Ok(target) = fs::read_link(&link) else { continue };
        let Some(cover) = covers.iter().rev().find(|cover| cover.at == target) else { continue };
        let Ok(shows) = cover.shows.strip_prefix(place.mount()) else { continue };
        let beside = link.with_extension("pgcairn");
        let replaced = symlink(Path::new("..").join(shows), &beside).and_then(|()| fs::rename(&beside, &link));
        replaced.map_err(|error| Error::io("replace", &link, error))?;
    }
    Ok(())
}

/// The socket directories that the source's configuration names, whether its server runs or not.
fn socket_directories(place: &Place) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for name in ["postgresql.conf", AUTO_CONF] {
        let text = files::read_regular(&place.mount().join(name)).unwrap_or_default();
        for value in conf::values(&text, "unix_socket_directories") {
            let directories = value.split(',').map(|one| PathBuf::from(one.trim().trim_matches('"')));
            found.extend(directories.filter(|directory| directory.is_absolute()));
        }
    }
    found
}

/// Without a sandbox nothing may be replayed that makes the server write to a directory outside of the clone.
fn refuse_new_tablespaces(place: &Place, of: &Description) -> Result<()> {
    let created = created_in(&place.mount().join("pg_wal"), &wal_identity(&of.database)?)?;
    let outside = |created: &&Created| created.path.exists() && !created.is_of(&place.mount());
    match created.iter().find(outside) {
        None => Ok(()),
        Some(Created { oid, path }) => Err(Error::new(format!(
            "the WAL creates tablespace {oid} in {}, which is a directory of this machine: the clone would write to it",
            path.display()
        ))
        .hint("run it as root, or where users may make namespaces (sysctl user.max_user_namespaces), or choose a point before")),
    }
}
