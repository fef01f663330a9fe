//! What the worker that pushes ahead says of one WAL file, and for which bytes it says so.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::spool::Spool;
use crate::error::{Error, Result};

const SUFFIX: &str = ".answer";

/// The hash of a file's content, as answers carry it: of all its bytes, so of the system identifier in its header, too.
pub(super) type Content = blake3::Hash;

/// Which bytes an answer is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum About {
    /// those of this very file, which nobody had touched for a while when they were read
    File(Stamp),
    /// those with this [`Content`], in hexadecimal
    Content(String),
}

impl About {
    pub(super) fn content(content: Content) -> Self {
        Self::Content(content.to_hex().to_string())
    }
}

/// What no other file has, nor this one after it was written to: device, inode, length, times of the last changes of content and
/// of anything.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Stamp(u64, u64, u64, (i64, i64), (i64, i64));

/// A file that was changed less than this ago may be changed once more without a new time: clocks of file systems tick slowly.
const TICK_MAX: Duration = Duration::from_millis(500);

impl Stamp {
    pub(super) fn of(path: &Path) -> Result<Self> {
        let meta = std::fs::metadata(path).map_err(|error| Error::io("look at", path, error))?;
        let (content, any) = ((meta.mtime(), meta.mtime_nsec()), (meta.ctime(), meta.ctime_nsec()));
        Ok(Self(meta.dev(), meta.ino(), meta.size(), content, any))
    }

    /// Whether any change from `now` on shows in the stamp.
    pub(super) fn is_settled(&self, now: SystemTime) -> bool {
        let changed = |(seconds, nanos): (i64, i64)| {
            let since = Duration::new(u64::try_from(seconds).ok()?, u32::try_from(nanos).ok()?);
            SystemTime::UNIX_EPOCH.checked_add(since)?.checked_add(TICK_MAX)
        };
        changed(self.4).is_some_and(|settled| settled <= now)
    }
}

/// An answer in the spool. It counts while the run that gave it lives; see [`crate::archive::spool`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Answer {
    /// the run that gave it
    pub(super) run: String,
    /// what came of it
    pub(super) outcome: Outcome,
}

/// What came of pushing one file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Outcome {
    /// the store has confirmed a file of this name with these bytes
    Archived {
        /// which
        about: About,
    },
    /// it was not archived this time
    Failed {
        /// the error with its causes
        error: String,
        /// what to do
        hint: Option<String>,
        /// the archive holds other content under its name
        #[serde(default)]
        conflict: bool,
    },
}

impl Outcome {
    pub(super) fn failed(error: &Error) -> Self {
        Self::Failed { error: error.told(), hint: error.hint_text().map(str::to_owned), conflict: error.is_conflict() }
    }
}

impl Answer {
    pub(super) fn file(name: &str) -> String {
        format!("{name}{SUFFIX}")
    }

    /// The name of the WAL file that a file of the spool answers for.
    pub(super) fn name(file: &str) -> Option<&str> {
        file.strip_suffix(SUFFIX)
    }

    pub(super) fn write(&self, spool: &Spool, name: &str) -> Result<()> {
        spool.write(&Self::file(name), &serde_json::to_vec(self)?)
    }

    /// The answer for `name`, unless there is none or it cannot be understood.
    pub(super) fn read(spool: &Spool, name: &str) -> Result<Option<Self>> {
        let bytes = spool.read(&Self::file(name))?;
        Ok(bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok()))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::fs::{self, OpenOptions};
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn a_stamp_tells_a_file_from_every_other() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("000000010000000000000001");
        fs::write(&path, [1; 8192]).unwrap();
        let modified = fs::metadata(&path).unwrap().modified().unwrap();
        let stamp = Stamp::of(&path).unwrap();
        assert!(!stamp.is_settled(SystemTime::now()), "it was written just now");
        assert!(stamp.is_settled(SystemTime::now() + TICK_MAX));
        std::thread::sleep(TICK_MAX);
        fs::read(&path).unwrap();
        assert_eq!(Stamp::of(&path).unwrap(), stamp, "reading changes nothing");

        // one byte, with the old time put back
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(&[2], 5000).unwrap();
        file.set_modified(modified).unwrap();
        assert_ne!(Stamp::of(&path).unwrap(), stamp);

        // another file with the same bytes in its place
        let (changed, other) = (Stamp::of(&path).unwrap(), dir.path().join("other"));
        fs::copy(&path, &other).unwrap();
        fs::rename(&other, &path).unwrap();
        assert_ne!(Stamp::of(&path).unwrap(), changed);
    }
}
