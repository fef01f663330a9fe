//! Files that appear whole or not at all, and files of users that are read without waiting for whoever put them there.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
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

/// Opens a file for reading that a user may have put there. It never waits for the other end of a pipe, and takes nothing but a
/// regular file.
///
/// # Errors
/// Also when it is anything else.
pub fn open_regular(path: &Path) -> io::Result<File> {
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    require_regular(file)
}

/// Gives the file back if it is a regular one.
///
/// # Errors
/// When it is anything else, or cannot be looked at.
pub fn require_regular(file: File) -> io::Result<File> {
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file")),
    }
}

/// Reads such a file whole.
///
/// # Errors
/// Those of [`open_regular`], and of reading.
pub fn read_regular(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open_regular(path)?.read_to_end(&mut bytes).map(|_| bytes)
}

/// Reads such a file of text whole.
///
/// # Errors
/// Those of [`read_regular`], and when it is not UTF-8.
pub fn read_regular_text(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    open_regular(path)?.read_to_string(&mut text).map(|_| text)
}

/// Fills `buf` from the offset `at` of a file as far as that goes; returns how far.
///
/// # Errors
/// When the file cannot be read.
pub fn read_full(file: &File, at: u64, buf: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    while done < buf.len() {
        match file.read_at(&mut buf[done..], at + done as u64) {
            Ok(0) => break,
            Ok(read) => done += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    #[test]
    fn a_pipe_in_the_place_of_a_file_is_refused_at_once() {
        let directory = tempfile::tempdir().unwrap();
        let (pipe, file) = (directory.path().join("pipe"), directory.path().join("file"));
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
        fs::write(&file, "text").unwrap();
        for refused in [&pipe, Path::new("/dev/null"), directory.path()] {
            assert_eq!(read_regular(refused).unwrap_err().kind(), io::ErrorKind::InvalidInput, "{}", refused.display());
        }
        assert_eq!(
            (read_regular(&file).unwrap(), read_regular_text(&file).unwrap()),
            (b"text".to_vec(), "text".into())
        );
        assert_eq!(read_regular(&directory.path().join("none")).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

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
