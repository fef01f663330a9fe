//! Files that appear whole or not at all.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use crate::error::{Error, Result};

/// What a file that took its name must outlive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outlives {
    /// the end of this program; for what can be made again, or is synced by whoever takes it
    Process,
    /// a power loss too
    PowerLoss,
}

/// Makes or replaces the file at `path`: `write` writes it as `temporary`, which then takes its name. Whatever dies
/// meanwhile, `path` is the old file or the new one. If it fails, `temporary` is removed.
///
/// # Errors
/// Those of `write`; and when the file cannot be synced or renamed.
pub fn place(temporary: &Path, path: &Path, outlives: Outlives, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let placed = write(temporary).and_then(|()| {
        let synced = |path: &Path| File::open(path)?.sync_all();
        if outlives == Outlives::PowerLoss {
            synced(temporary).map_err(|error| Error::io("sync", temporary, error))?;
        }
        fs::rename(temporary, path).map_err(|error| Error::io("rename to", path, error))?;
        match path.parent() {
            Some(parent) if outlives == Outlives::PowerLoss => {
                let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
                synced(parent).map_err(|error| Error::io("sync", parent, error))
            }
            _ => Ok(()),
        }
    });
    if placed.is_err() {
        _ = fs::remove_file(temporary);
    }
    placed
}

/// Makes directories durable: that what is in them is there after a power loss.
///
/// # Errors
/// When one cannot be opened or synced.
pub fn sync_directories<'a>(paths: impl IntoIterator<Item = &'a Path>) -> Result<()> {
    let sync = |path: &Path| -> io::Result<()> { File::open(path)?.sync_all() };
    paths.into_iter().try_for_each(|path| sync(path).map_err(|error| Error::io("sync", path, error)))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    #[test]
    fn a_write_that_fails_leaves_the_old_file_alone() {
        let directory = tempfile::tempdir().unwrap();
        let (temporary, path) = (directory.path().join("t"), directory.path().join("f"));
        let put = |text: &str| {
            place(&temporary, &path, Outlives::PowerLoss, |to| {
                fs::write(to, text).map_err(|error| Error::io("write", to, error))
            })
        };
        put("old").unwrap();
        let failed = place(&temporary, &path, Outlives::PowerLoss, |to| {
            fs::write(to, "half").unwrap();
            Err(Error::new("no more"))
        });
        assert_eq!(failed.unwrap_err().to_string(), "no more");
        assert_eq!((fs::read_to_string(&path).unwrap(), temporary.exists()), ("old".to_owned(), false));
        put("new").unwrap();
        assert_eq!((fs::read_to_string(&path).unwrap(), temporary.exists()), ("new".to_owned(), false));
    }
}
