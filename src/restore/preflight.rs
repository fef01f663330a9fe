//! What is in a directory before a restore writes to it: nothing, or the data directory of this very cluster.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::signal::kill;
use nix::unistd::Pid;

use super::CONTROL_LATER;
use super::marker::{MARKER, Said};
use super::plan::Plan;
use crate::error::{Error, Result};
use crate::files;
use crate::format::manifest::Description;
use crate::postgres::{CONTROL_FILE, ControlFile};

/// The file by which a running server holds its data directory.
pub(super) const POSTMASTER_PID: &str = "postmaster.pid";
/// Shared memory that processes use, as Linux lists it.
const SHARED_MEMORY: &str = "/proc/sysvipc/shm";

/// True when the directory is empty, or not there.
pub(super) fn is_vacant(path: &Path) -> Result<bool> {
    match fs::read_dir(path) {
        Ok(mut entries) => Ok(entries.next().is_none()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(true),
        Err(error) => Err(Error::io("list", path, error)),
    }
}

/// Refuses a directory in which something is, above all a server's.
pub(super) fn refuse_occupied(path: &Path) -> Result<()> {
    if path.join(POSTMASTER_PID).exists() {
        return Err(Error::new(format!("a server runs, or ran, in {}", path.display()))
            .hint("stop it, and restore into an empty directory; --delta makes its directory equal to the backup"));
    }
    match is_vacant(path)? {
        true => Ok(()),
        false => Err(Error::new(format!("{} is not empty", path.display())).hint(
            "restore into an empty directory, or one that does not exist yet; --delta overwrites a data directory of \
             this cluster, and goes on where a restore was interrupted",
        )),
    }
}

/// Refuses a tablespace's directory in which something is. `--delta` is no way out: the directory
/// may be that of a live cluster.
pub(super) fn refuse_occupied_place(root: &Path, oid: u32, place: &Path, of: &Description) -> Result<()> {
    if is_vacant(place)? {
        return Ok(());
    }
    refuse_of_source(root, oid, place, of)?;
    Err(Error::new(format!("{}, where tablespace {oid} goes, is not empty", place.display())).hint(format!(
        "let it go elsewhere: --tablespace-map {oid}=DIR, or --tablespace-map-all DIR for all tablespaces"
    )))
}

/// Refuses to overwrite what is not this cluster's, or what a server works with.
pub(super) fn recognise(root: &Path, plan: &Plan, of: &Description) -> Result<()> {
    refuse_running(root)?;
    let said = Said::read(root)?;
    let (system_id, by) = system_id(root, said.as_ref())?;
    if system_id != of.database.system_id {
        return Err(Error::new(format!(
            "{} is another cluster's: {by} says system identifier {system_id}, backup {} is of {}",
            root.display(),
            of.label,
            of.database.system_id
        ))
        .hint("check the directory and --stanza, or restore into an empty directory"));
    }
    for (oid, place) in &plan.places {
        if is_vacant(place)? {
            continue;
        }
        refuse_of_source(root, *oid, place, of)?;
        let linked = same_place(&root.join(format!("pg_tblspc/{oid}")), place);
        if !linked && !said.iter().any(|said| said.tablespaces.contains(place)) {
            return Err(Error::new(format!(
                "{} is not empty, and not the place of tablespace {oid} of {}",
                place.display(),
                root.display()
            ))
            .hint(format!("empty it, or let the tablespace go elsewhere: --tablespace-map {oid}=DIR")));
        }
    }
    Ok(())
}

/// The system identifier of what is in `root`, and which file says so.
fn system_id(root: &Path, said: Option<&Said>) -> Result<(u64, &'static str)> {
    for name in [CONTROL_FILE, CONTROL_LATER] {
        let path = root.join(name);
        match files::read_regular(&path) {
            Ok(bytes) => match ControlFile::parse(&bytes) {
                Ok(control) => return Ok((control.system_identifier, name)),
                // what a restore had not written to its end is no damage
                Err(_) if name == CONTROL_LATER => {}
                Err(_) if said.is_some() => {}
                Err(error) => {
                    return Err(Error::new(format!("{} cannot be read, so nobody knows whose it is", path.display()))
                        .hint("restore into an empty directory")
                        .source(error));
                }
            },
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {}
            Err(error) => return Err(Error::io("read", &path, error)),
        }
    }
    match said {
        Some(said) => Ok((said.system_id, MARKER)),
        None => Err(Error::new(format!("{} is not empty, and not a data directory", root.display()))
            .hint("check the directory; it has neither pg_control nor the traces of an interrupted restore")),
    }
}

/// Refuses a directory whose server runs, or of which processes are left.
fn refuse_running(root: &Path) -> Result<()> {
    let path = root.join(POSTMASTER_PID);
    let text = match files::read_regular(&path) {
        Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io("read", &path, error)),
    };
    let hint = format!("stop it; if none runs there, remove {}", path.display());
    let pid: Option<i32> = text.lines().next().and_then(|line| line.trim().parse().ok()).filter(|pid| *pid > 0);
    let alive = pid.is_none_or(|pid| kill(Pid::from_raw(pid), None) != Err(Errno::ESRCH));
    if alive {
        let process = pid.map_or_else(|| "unknown".to_owned(), |pid| pid.to_string());
        return Err(Error::new(format!("a server runs in {}: process {process}", root.display())).hint(hint));
    }
    // its children may have survived it
    let segment = text.lines().nth(6).and_then(|line| line.split_whitespace().nth(1));
    match segment.is_some_and(is_attached) {
        true => Err(Error::new(format!("processes of a server that is gone still work in {}", root.display()))
            .hint(format!("end them; {hint}"))),
        false => Ok(()),
    }
}

/// Whether processes use the shared memory of this id.
fn is_attached(id: &str) -> bool {
    let listed = fs::read_to_string(SHARED_MEMORY).unwrap_or_default();
    let fields = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    // key, id, mode, size, creator, last user, how many are attached
    listed
        .lines()
        .map(fields)
        .any(|line| line.get(1).is_some_and(|found| found == id) && line.get(6).is_some_and(|attached| attached != "0"))
}

/// Refuses a tablespace's directory that the cluster which was backed up works with: a copy of a data directory has the links of
/// its source.
fn refuse_of_source(root: &Path, oid: u32, place: &Path, of: &Description) -> Result<()> {
    let source = Path::new(&of.data_directory);
    let link = source.join(format!("pg_tblspc/{oid}"));
    match !same_place(source, root) && same_place(&link, place) {
        true => Err(Error::new(format!(
            "{} is the place of tablespace {oid} of the cluster in {}",
            place.display(),
            source.display()
        ))
        .hint(format!("let the tablespace go elsewhere: --tablespace-map {oid}=DIR"))),
        false => Ok(()),
    }
}

/// True when both lead to one existing place.
fn same_place(a: &Path, b: &Path) -> bool {
    let found = |path: &Path| -> Option<PathBuf> { fs::canonicalize(path).ok() };
    found(a).is_some_and(|a| found(b) == Some(a))
}
