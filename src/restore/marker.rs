//! The file that says what a directory is while a restore writes it: by it an interrupted restore is recognised and continued.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg, OFlag};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::files;
use crate::format::manifest::Description;

/// Its name in the data directory.
pub(super) const MARKER: &str = "pgcairn.restore";

/// What it says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Said {
    /// the cluster
    pub(super) system_id: u64,
    /// the backup that is being restored
    pub(super) label: String,
    /// where its tablespaces go
    pub(super) tablespaces: Vec<PathBuf>,
}

/// The file, locked: no other restore writes there meanwhile.
#[derive(Debug)]
pub(super) struct Marker {
    path: PathBuf,
    _lock: Flock<File>,
}

impl Said {
    /// What is said of a restore of this backup.
    pub(super) fn of(description: &Description, tablespaces: Vec<PathBuf>) -> Self {
        Self { system_id: description.database.system_id, label: description.label.clone(), tablespaces }
    }

    /// What the marker in `root` says; none where there is no marker, or one that was not written to its end.
    pub(super) fn read(root: &Path) -> Result<Option<Self>> {
        let path = root.join(MARKER);
        let mut text = Vec::new();
        match open(&path, false).and_then(|mut file| file.read_to_end(&mut text)) {
            Ok(_) => Ok(serde_json::from_slice(&text).ok()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io("read", &path, error)),
        }
    }
}

impl Marker {
    /// Makes the marker in `root`, durable when this returns.
    pub(super) fn set(root: &Path, said: &Said) -> Result<Self> {
        let path = root.join(MARKER);
        let fail = |error| Error::io("write", &path, error);
        let file = open(&path, true).map_err(fail)?;
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| {
            Error::new(format!("another restore writes to {}", root.display()))
                .hint("wait until it has ended, or end it")
                .source(error)
        })?;
        let mut text = serde_json::to_vec_pretty(said)?;
        text.push(b'\n');
        lock.set_len(0).and_then(|()| (&*lock).write_all(&text)).and_then(|()| lock.sync_all()).map_err(fail)?;
        File::open(root).and_then(|root| root.sync_all()).map_err(|error| Error::io("sync", root, error))?;
        Ok(Self { path, _lock: lock })
    }

    /// Removes it: all but pg_control's name is in place.
    pub(super) fn remove(self) -> Result<()> {
        fs::remove_file(&self.path).map_err(|error| Error::io("remove", &self.path, error))
    }
}

fn open(path: &Path, create: bool) -> std::io::Result<File> {
    let flags = (OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits();
    let mut options = OpenOptions::new();
    options.read(true).write(create).create(create).mode(0o600).custom_flags(flags);
    files::require_regular(options.open(path)?)
}
