//! The file that a dump is written to before it takes its name: one that a killed run left is taken over, one that another run
//! writes is not.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Creates it beside `file`, or takes it over, empty. It is ours while the returned file, or a copy of it, is open.
pub(super) fn create(file: &Path) -> Result<(PathBuf, File)> {
    let mut name = file.as_os_str().to_owned();
    name.push(".pgcairn-tmp");
    let path = PathBuf::from(name);
    let failed = |error| Error::io("create", &path, error);
    loop {
        let opened = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(&path)
            .map_err(failed)?;
        let found = opened.metadata().map_err(failed)?;
        if !found.is_file() || found.uid() != nix::unistd::geteuid().as_raw() || found.nlink() > 1 {
            return Err(Error::new(format!("{} is there, and no pgcairn of this user left it", path.display()))
                .hint("move it away, or give another --output"));
        }
        match opened.try_lock() {
            Ok(()) => {}
            Err(TryLockError::Error(error)) => return Err(Error::io("lock", &path, error)),
            Err(TryLockError::WouldBlock) => {
                return Err(Error::new(format!("another run of pgcairn writes {}", file.display()))
                    .hint("wait for its end, or give another --output"));
            }
        }
        // the run that had it may have just given it its name
        match path.symlink_metadata() {
            Ok(there) if (there.dev(), there.ino()) == (found.dev(), found.ino()) => {}
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(Error::io("look at", &path, error)),
            _ => continue,
        }
        if let Err(error) = refuse_taken(file) {
            _ = std::fs::remove_file(&path);
            return Err(error);
        }
        opened.set_len(0).map_err(failed)?;
        return Ok((path, opened));
    }
}

/// Refuses a file that is there.
pub(super) fn refuse_taken(file: &Path) -> Result<()> {
    match file.symlink_metadata() {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Error::io("look at", file, error)),
        Ok(_) => Err(Error::new(format!("{} exists already", file.display())).hint("give another --output")),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::fs;
    use std::io::Write;

    use super::*;

    #[test]
    fn what_a_killed_run_left_is_taken_over() {
        let directory = tempfile::tempdir().unwrap();
        let (file, left) = (directory.path().join("o.sql"), directory.path().join("o.sql.pgcairn-tmp"));
        fs::write(&left, "half of a dump").unwrap();
        let (path, mut opened) = create(&file).unwrap();
        assert_eq!((&path, fs::read(&left).unwrap().len()), (&left, 0));
        let second = create(&file).unwrap_err().to_string();
        assert!(second.contains("another run of pgcairn writes"), "{second}");
        opened.write_all(b"whole").unwrap();
        fs::rename(&path, &file).unwrap();
        drop(opened);
        let taken = create(&file).unwrap_err().to_string();
        assert!(taken.contains("o.sql exists already"), "{taken}");
        assert_eq!((fs::read_to_string(&file).unwrap(), left.exists()), ("whole".to_owned(), false));
    }

    #[test]
    fn a_link_and_a_second_name_are_not_taken_over() {
        let directory = tempfile::tempdir().unwrap();
        let (file, left) = (directory.path().join("o.sql"), directory.path().join("o.sql.pgcairn-tmp"));
        let other = directory.path().join("other");
        fs::write(&other, "kept").unwrap();
        std::os::unix::fs::symlink(&other, &left).unwrap();
        create(&file).unwrap_err();
        fs::remove_file(&left).unwrap();
        fs::hard_link(&other, &left).unwrap();
        create(&file).unwrap_err();
        assert_eq!(fs::read_to_string(&other).unwrap(), "kept");
    }
}
