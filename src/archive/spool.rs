//! The spool: a local directory in which a background worker of the archive leaves answers for the calls that come later.
//!
//! There is one per repository, stanza, cluster and direction, and at most one worker in it, a *run*. What is in a spool
//! counts only while the run that wrote it lives, which is known by a lock that ends with its process. So nothing in it
//! needs to be durable, nothing that a crash, a restore or a removed repository leaves behind can be taken for true, and
//! losing all of it loses nothing.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::files::{self, Outlives};
use crate::user::{make_own, require_own};

/// Held by the one worker, from before it takes anything away to its end.
const LOCK: &str = "lock";
/// Holds the name of the run; locked by its process before it gets this name.
const RUN: &str = "run";
/// What files are called while they are written.
const TEMPORARY: &str = ".new-";

/// A directory of answers.
#[derive(Clone, Debug)]
pub struct Spool {
    directory: PathBuf,
}

/// The worker of a spool, while it lives.
#[derive(Debug)]
pub struct Run {
    /// random, so that no run is taken for another
    pub id: String,
    _lock: File,
    _run: File,
}

impl Spool {
    /// The spool that belongs to all of `parts`, in the directory `base`; both are made where they are missing.
    /// `name` is for people.
    ///
    /// # Errors
    /// Also when somebody else could write into it.
    pub fn open(base: &Path, name: &str, parts: &[&[u8]]) -> Result<Self> {
        let mut hasher = blake3::Hasher::new();
        for part in parts {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        let directory = base.join(format!("{name}-{}", &hasher.finalize().to_hex()[..16]));
        make_own(&directory, 0o700, HINT)?;
        Self::of(directory)
    }

    /// A spool that is there.
    pub fn at(directory: &Path) -> Result<Self> {
        require_own(directory, HINT)?;
        Self::of(directory.to_owned())
    }

    /// A link could lead to what another program keeps.
    fn of(directory: PathBuf) -> Result<Self> {
        let found = fs::symlink_metadata(&directory);
        match found.map_err(|error| Error::io("look at", &directory, error).hint(HINT))?.is_dir() {
            true => Ok(Self { directory }),
            false => Err(Error::new(format!("the spool {} is a link", directory.display())).hint(HINT)),
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.directory
    }

    /// The path of what is called `name` in it.
    pub fn file(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Becomes the worker, and removes what others left but for the file `keep`; `None` while another is.
    pub fn begin(&self, keep: &str) -> Result<Option<Run>> {
        let path = self.file(LOCK);
        let lock = OpenOptions::new().create(true).append(true).mode(0o600).open(&path);
        let lock = lock.map_err(|error| Error::io("open", &path, error).hint(HINT))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(error)) => return Err(Error::io("lock", &path, error).hint(HINT)),
        }
        for name in self.names()?.iter().filter(|name| *name != keep) {
            self.remove(name)?;
        }
        let mut random = [0; 16];
        getrandom::fill(&mut random).map_err(|error| Error::new("no random numbers").source(error))?;
        let id: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
        let temporary = self.file(&format!("{TEMPORARY}{RUN}"));
        let claim = || -> io::Result<File> {
            let mut run = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&temporary)?;
            run.lock()?;
            run.write_all(id.as_bytes())?;
            // locked before it can be found: who finds it and can lock it knows that its process is gone
            fs::rename(&temporary, self.file(RUN))?;
            Ok(run)
        };
        let run = claim().map_err(|error| Error::io("write", &self.file(RUN), error).hint(HINT))?;
        Ok(Some(Run { id, _lock: lock, _run: run }))
    }

    /// The run that lives now.
    pub fn live_run(&self) -> Result<Option<String>> {
        let path = self.file(RUN);
        let mut file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io("open", &path, error).hint(HINT)),
        };
        match file.try_lock_shared() {
            Ok(()) => return Ok(None),
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(error)) => return Err(Error::io("lock", &path, error).hint(HINT)),
        }
        let mut id = String::new();
        file.read_to_string(&mut id).map_err(|error| Error::io("read", &path, error).hint(HINT))?;
        Ok(Some(id))
    }

    /// Fails for a run whose spool was removed or replaced: another worker may be in what is there now.
    pub fn check(&self, run: &Run) -> Result<()> {
        match self.live_run()? {
            Some(live) if live == run.id => Ok(()),
            _ => Err(Error::new(format!("the spool {} was removed under its worker", self.directory.display()))),
        }
    }

    /// Writes a file, which appears whole or not at all.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let (temporary, path) = (self.file(&format!("{TEMPORARY}{name}")), self.file(name));
        let write = |to: &Path| fs::write(to, bytes).map_err(|error| Error::io("write", to, error));
        files::place(&temporary, &path, Outlives::Process, write).map_err(|error| error.hint(HINT))
    }

    /// Reads a file, `None` when there is none.
    pub fn read(&self, name: &str) -> Result<Option<Vec<u8>>> {
        let path = self.file(name);
        match fs::read(&path) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io("read", &path, error).hint(HINT)),
        }
    }

    /// Removes a file, if it is there.
    pub fn remove(&self, name: &str) -> Result<()> {
        let path = self.file(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", &path, error).hint(HINT)),
            _ => Ok(()),
        }
    }

    /// The names of what is in it, beside locks.
    pub fn names(&self) -> Result<Vec<String>> {
        let failed = |error| Error::io("list", &self.directory, error).hint(HINT);
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.directory).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            names.extend(name.into_string().ok().filter(|name| name != LOCK && name != RUN));
        }
        Ok(names)
    }
}

const HINT: &str = "see --spool-path: a directory that belongs to the user who archives, with mode 0700";

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_run_lives_as_long_as_its_lock_and_leaves_nothing_that_counts() {
        let place = tempfile::tempdir().unwrap();
        let spool = Spool::open(&place.path().join("a/b"), "main", &[b"x", b"yz"]).unwrap();
        assert_eq!(spool.live_run().unwrap(), None);
        let run = spool.begin("").unwrap().unwrap();
        assert_eq!(spool.live_run().unwrap(), Some(run.id.clone()));
        assert!(spool.begin("").unwrap().is_none(), "two workers in one spool");
        spool.check(&run).unwrap();
        spool.write("name", b"what").unwrap();
        assert_eq!(spool.read("name").unwrap().as_deref(), Some(&b"what"[..]));
        let first = run.id.clone();
        drop(run);
        assert_eq!(spool.live_run().unwrap(), None);
        let run = spool.begin("").unwrap().unwrap();
        assert_ne!(run.id, first);
        assert!(spool.names().unwrap().is_empty(), "an answer of a dead run is left");
        assert_eq!(spool.read("name").unwrap(), None);
        // a directory that is put in its place is another spool
        fs::rename(&spool.directory, place.path().join("aside")).unwrap();
        fs::create_dir(&spool.directory).unwrap();
        spool.check(&run).unwrap_err();
        let other = spool.begin("").unwrap().unwrap();
        spool.check(&other).unwrap();
        spool.check(&run).unwrap_err();
    }

    #[test]
    fn what_belongs_together_has_a_spool_of_its_own() {
        let place = tempfile::tempdir().unwrap();
        let open = |parts: &[&[u8]]| Spool::open(place.path(), "main", parts).unwrap().directory;
        assert_eq!(open(&[b"a", b"b"]), open(&[b"a", b"b"]));
        assert_ne!(open(&[b"a", b"b"]), open(&[b"ab", b""]));
        assert_ne!(open(&[b"a", b"b"]), open(&[b"b", b"a"]));
    }

    #[test]
    fn a_spool_that_others_may_write_is_refused() {
        let place = tempfile::tempdir().unwrap();
        let path = Spool::open(place.path(), "main", &[]).unwrap().directory;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o770)).unwrap();
        assert!(Spool::at(&path).is_err());
        fs::set_permissions(&path, fs::Permissions::from_mode(0o750)).unwrap();
        assert!(Spool::at(&path).is_ok());
        let link = place.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(Spool::at(&link).is_err());
    }
}
