//! What of the backup's configuration a clone's server does without, because this machine does not
//! have it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::super::clones::{Clone, Place};
use super::super::output;
use crate::clone::configuration::{Complaint, Configuration, Files, complaints, without_library};
use crate::error::{Error, Result};
use crate::format::manifest::Description;
use crate::postgres::AUTO_CONF;
use crate::user::{User, as_user};

const CONF: &str = "postgresql.conf";
const LIBRARIES: &str = "shared_preload_libraries";
/// Settings that are this program's, in `postgresql.auto.conf`.
const OF_RECOVERY: [&str; 2] = ["restore_command", "recovery_"];

/// What a clone's server does without.
#[derive(Debug, Default)]
pub(super) struct Amended {
    /// of `postgresql.conf`, once there is something
    configuration: Option<Configuration>,
    /// the libraries that are left
    libraries: Option<String>,
    /// what was said of it
    left_out: Vec<String>,
}

impl Amended {
    /// The configuration file that counts.
    pub(super) fn config_file(&self, place: &Place) -> PathBuf {
        let directory = if self.configuration.is_some() { place.run() } else { place.mount() };
        directory.join(CONF)
    }

    /// The libraries to load, if not all that the backup's configuration names.
    pub(super) fn libraries(&self) -> Option<&str> {
        self.libraries.as_deref()
    }

    /// In words.
    pub(super) fn into_words(self) -> Vec<String> {
        self.left_out
    }

    /// Leaves out what the server did not take, by its log since it was started. True if there is
    /// anything, so that it can be started again. What `options` of the user's say stays.
    pub(super) fn by_log(
        &mut self,
        (place, clone, of): (&Place, &Clone, &Description),
        log: &str,
        options: &[String],
    ) -> Result<bool> {
        let complaints = complaints(log);
        if complaints.is_empty() {
            return Ok(false);
        }
        let user = User::other(clone.uid, clone.gid);
        let disk = OnDisk { user: user.as_ref(), source: Path::new(&of.data_directory), own: place.mount() };
        let read = |path: &Path| Configuration::read(path, &disk).map_err(|error| Error::io("read", path, error));
        let mut main = match self.configuration.take() {
            Some(configuration) => configuration,
            None => read(&place.mount().join(CONF))?,
        };
        let auto_path = place.mount().join(AUTO_CONF);
        let mut auto = read(&auto_path)?;
        let mut left_out = Vec::new();
        for (complaint, words) in &complaints {
            if let Complaint::Library(missing) = complaint {
                let list = self.libraries.clone().or_else(|| auto.value(LIBRARIES)).or_else(|| main.value(LIBRARIES));
                let is_asked_for = options.iter().any(|option| option.trim().starts_with(LIBRARIES));
                let kept = list.filter(|_| !is_asked_for).and_then(|list| without_library(&list, missing));
                left_out.extend(kept.is_some().then(|| format!("library {missing} ({words})")));
                self.libraries = kept.or(self.libraries.take());
                continue;
            }
            let is_ours = matches!(complaint, Complaint::Unknown(name) | Complaint::Value(name)
                if OF_RECOVERY.iter().any(|prefix| name.starts_with(prefix)));
            let mut places = if is_ours { Vec::new() } else { auto.leave_out(complaint) };
            // the last value counts, and that file comes last
            if places.is_empty() || !matches!(complaint, Complaint::Value(_)) {
                places.extend(main.leave_out(complaint));
            }
            left_out.extend(places.iter().map(|place| format!("{place} ({words})")));
        }
        let write = |path: &Path, text: &[u8]| {
            as_user(user.as_ref(), || fs::write(path, text).map_err(|error| Error::io("write", path, error)))
        };
        if !left_out.is_empty() {
            write(&place.run().join(CONF), &main.text())?;
            write(&auto_path, &auto.text())?;
            self.configuration = Some(main);
        }
        left_out.iter().for_each(|what| output::note(&format!("note: the clone does without {what}")));
        let is_amended = !left_out.is_empty();
        self.left_out.extend(left_out);
        Ok(is_amended)
    }
}

/// Configuration files as the clone's server sees them.
struct OnDisk<'a> {
    /// the server's user
    user: Option<&'a User>,
    /// where the source has its data directory, and the server the clone's
    source: &'a Path,
    own: PathBuf,
}

impl OnDisk<'_> {
    fn seen(&self, path: &Path) -> PathBuf {
        let is_own = path.starts_with(&self.own) || !self.source.is_absolute();
        match path.strip_prefix(self.source) {
            Ok(below) if !is_own => self.own.join(below),
            _ => path.to_owned(),
        }
    }
}

impl Files for OnDisk<'_> {
    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        let path = self.seen(path);
        as_user(self.user, || Ok(crate::files::read_regular(&path)))
            .unwrap_or_else(|error| Err(io::Error::other(error)))
    }

    fn list(&self, path: &Path) -> io::Result<Vec<PathBuf>> {
        let seen = self.seen(path);
        let entries =
            as_user(self.user, || Ok(fs::read_dir(&seen))).unwrap_or_else(|error| Err(io::Error::other(error)));
        let mut names: Vec<_> = entries?.flatten().map(|entry| entry.file_name()).collect();
        names.retain(|name| {
            let name = name.as_encoded_bytes();
            !name.starts_with(b".") && name.len() > ".conf".len() && name.ends_with(b".conf")
        });
        names.sort_unstable();
        Ok(names.into_iter().map(|name| path.join(name)).collect())
    }
}
