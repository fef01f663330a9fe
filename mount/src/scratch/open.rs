//! Opening a scratch: lock, replay, check, and a clean start.

use std::collections::HashSet;
use std::fs::{self, DirBuilder, File, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, RwLock};

use super::content::options;
use super::file::Store;
use super::journal::{self, Found, Journal};
use super::namespace::Namespace;
use super::record::Record;
use super::sync::sync_filesystem;
use super::{Inner, Scratch};
use crate::error::{Error, Result};

const LOCK: &str = "lock";
const DATA: &str = "data";
/// All that a scratch directory may hold. A journal comes last when one is begun.
const NAMES: [&str; 4] = [LOCK, DATA, "journal", "journal.new"];

/// The name of this start of the machine.
pub fn boot_id() -> Result<String> {
    let path = "/proc/sys/kernel/random/boot_id";
    let id = fs::read_to_string(path).map_err(|source| Error::io("read", path, source))?;
    Ok(id.trim().to_owned())
}

pub(super) fn open(directory: &Path, identity: &str, boot: &str) -> Result<Scratch> {
    let at = |action, path: &Path| {
        let path = path.to_owned();
        move |source: io::Error| Error::Io { action, path, source }
    };
    fs::create_dir_all(directory).map_err(at("create", directory))?;
    let directory = &directory.canonicalize().map_err(at("open", directory))?;
    refuse_others(directory)?;
    require_own(directory, 0o022)?;
    // it holds pages of a database, and the files in it are read by nobody but us
    fs::set_permissions(directory, fs::Permissions::from_mode(0o700)).map_err(at("set the mode of", directory))?;
    let lock = lock(directory)?;
    let data = directory.join(DATA);
    match DirBuilder::new().mode(0o700).create(&data) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(Error::io("create", data, error)),
        // below a directory that nobody else enters its mode does not matter
        _ => require_own(&data, 0)?,
    }

    let found = journal::read(directory)?;
    // a journal that ends a mount cleanly names no boot
    let was_killed = found.as_ref().is_some_and(|found| {
        found.frames.iter().flat_map(|(_, records)| records).any(|record| matches!(record, Record::Boot { .. }))
    });
    let namespace = match found {
        None => Namespace::new(),
        Some(found) => {
            if found.identity != identity {
                let (path, expected) = (directory.clone(), identity.to_owned());
                return Err(Error::ScratchOfOtherBase { path, found: found.identity, expected });
            }
            replay(directory, &data, found, boot)?
        }
    };
    for body in namespace.files() {
        body.trim(&data).map_err(at("write", &data))?;
    }
    if was_killed {
        // what a dead server had written but not fsynced must not be taken for durable by its next recovery
        sync_filesystem(&data).map_err(at("sync", &data))?;
        namespace.files().for_each(|body| body.confirm_all());
    }
    let journal = Journal::create(directory, identity, &starting_records(&namespace, boot))?;
    delete_unreferenced(&namespace, &data).map_err(at("clean", &data))?;
    let store = Store { data, journal, boot: boot.to_owned(), doomed: Mutex::default() };

    let inner = Arc::new(Inner {
        namespace: RwLock::new(namespace),
        changing: Mutex::new(()),
        store,
        syncing_all: Mutex::new(()),
        stop: Mutex::new(false),
        wake: Condvar::new(),
        lock,
    });
    let tidier = thread::Builder::new().name("scratch".to_owned()).spawn({
        let inner = Arc::clone(&inner);
        move || inner.tidy()
    });
    Ok(Scratch { inner, tidier: Some(tidier.map_err(at("serve", directory))?) })
}

/// A directory with anything else in it was named by mistake.
fn refuse_others(directory: &Path) -> Result<()> {
    let failed = |source| Error::io("list", directory, source);
    for entry in fs::read_dir(directory).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        // a file system's own directory at its root says nothing
        if !NAMES.iter().any(|known| name == *known) && name != "lost+found" {
            return Err(Error::NotAScratch { path: directory.to_owned() });
        }
    }
    Ok(())
}

/// Another user could put links in it to the daemon's own files. A link is not followed: `directory` has none.
fn require_own(directory: &Path, not: u32) -> Result<()> {
    let found = directory.symlink_metadata().map_err(|source| Error::io("look at", directory, source))?;
    match found.is_dir() && found.uid() == nix::unistd::geteuid().as_raw() && found.mode() & not == 0 {
        true => Ok(()),
        false => Err(Error::ScratchOfOthers { path: directory.to_owned(), uid: found.uid(), mode: found.mode() }),
    }
}

/// A daemon whose mount is gone says so in its lock file while it still makes its scratch durable.
pub(super) const CLOSING: &[u8] = b"closing";
/// How long a daemon may take between the end of its mount and saying so, and until it is done.
const GRACE: Duration = Duration::from_secs(1);
const CLOSING_MAX: Duration = Duration::from_secs(120);
const LOCK_POLL: Duration = Duration::from_millis(20);

fn lock(directory: &Path) -> Result<File> {
    let path = directory.join(LOCK);
    let file = options().create(true).truncate(false).read(true).write(true).open(&path);
    let file = file.map_err(|source| Error::io("open", &path, source))?;
    let began = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => break,
            Err(TryLockError::Error(source)) => return Err(Error::io("lock", path, source)),
            Err(TryLockError::WouldBlock) => {
                let closing = fs::read(&path).is_ok_and(|said| said == CLOSING);
                if began.elapsed() > if closing { CLOSING_MAX } else { GRACE } {
                    return Err(Error::ScratchInUse { path: directory.to_owned() });
                }
                thread::sleep(LOCK_POLL);
            }
        }
    }
    file.set_len(0).map_err(|source| Error::io("write", path, source))?;
    Ok(file)
}

fn replay(directory: &Path, data: &Path, found: Found, boot: &str) -> Result<Namespace> {
    let damaged = |offset, what: String| Error::ScratchDamaged { path: directory.join("journal"), offset, what };
    let mut namespace = Namespace::new();
    let mut same_boot = false;
    for (_, records) in &found.frames {
        for record in records {
            match record {
                Record::Boot { id } => same_boot = id == boot,
                // written, but perhaps never on disk
                Record::Pages { durable: false, .. } if !same_boot => {}
                record => namespace.apply(record, 0),
            }
        }
    }
    // unlinked, but open when the daemon died
    namespace.nodes.retain(|_, node| node.record.links > 0);
    if let Some(name) = namespace.dangling() {
        return Err(damaged(found.end, format!("{} names a file that is not described", name.display())));
    }
    for body in namespace.files() {
        let (name, needed) = body.backing_needed();
        if needed && !data.join(&name).exists() {
            return Err(Error::ScratchDamaged {
                path: data.join(name),
                offset: 0,
                what: "the file is missing".to_owned(),
            });
        }
    }
    Ok(namespace)
}

fn starting_records(namespace: &Namespace, boot: &str) -> Vec<Record> {
    let mut records = vec![Record::Boot { id: boot.to_owned() }];
    records.extend(namespace.records(|body, out| body.records(&body.freeze(), out)));
    records
}

fn delete_unreferenced(namespace: &Namespace, data: &Path) -> io::Result<()> {
    let kept: HashSet<String> = namespace.files().map(|body| body.backing_needed().0).collect();
    for entry in fs::read_dir(data)? {
        let entry = entry?;
        if !entry.file_name().to_str().is_some_and(|name| kept.contains(name)) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}
