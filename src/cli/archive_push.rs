use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;

use super::archive_worker::{self, Staging};
use super::options::{Common, YesNo};
use crate::archive::client::{Asked, Place, ask};
use crate::archive::push::{Pushed, push};
use crate::archive::spool::Spool;
use crate::error::{Error, Result};
use crate::format::chunk::WAL_LEVEL;

/// Archive a WAL file; for archive_command = 'pgcairn archive-push %p'
///
/// Succeeds only when the repository has confirmed the file. The same content again succeeds with a warning; other content
/// under the same name, or another cluster's WAL, is refused.
#[derive(Debug, Args)]
pub(super) struct ArchivePush {
    /// Path of the file (%p)
    path: PathBuf,
    /// zstd level; the default stands for settings that suit WAL
    #[arg(long, env = "PGCAIRN_COMPRESS_LEVEL", value_name = "LEVEL", default_value_t = WAL_LEVEL, allow_hyphen_values = true)]
    compress_level: i32,
    /// Let a worker in the background push all that is ready, in parallel (y); its success is still the repository's
    #[arg(long, env = "PGCAIRN_ARCHIVE_ASYNC", value_name = "y|n", default_value = "n")]
    archive_async: YesNo,
    /// Seconds to wait for the worker's answer
    #[arg(long, env = "PGCAIRN_ARCHIVE_TIMEOUT", value_name = "SECONDS", default_value_t = 60)]
    archive_timeout: u64,
    #[command(flatten)]
    staging: Staging,
}

impl ArchivePush {
    pub(super) fn run(self, common: &Common) -> Result<()> {
        if self.archive_async == YesNo::Y
            && let Some(place) = Place::of(&self.path)
        {
            let asked = self.staging.push_spool(common, &place).map(|spool| self.ask(common, &place, &spool));
            match asked {
                Ok(Ok(Asked::Archived)) => return Ok(()),
                Ok(Err(failed)) => return Err(failed),
                Ok(Ok(Asked::Alone(error))) | Err(error) => warn(&self.path, &error),
            }
        }
        let repository = common.repository_of_archive()?;
        match push(&repository, &self.path, self.compress_level)? {
            Pushed::New => tracing::info!(file = %self.path.display(), "archived"),
            Pushed::AlreadyThere => tracing::warn!(file = %self.path.display(), "the archive already has this file"),
        }
        Ok(())
    }

    fn ask(&self, common: &Common, place: &Place, spool: &Spool) -> Result<Asked> {
        let start = || {
            let worker =
                archive_worker::Push::new(place, spool, self.compress_level, self.archive_timeout, &self.staging);
            archive_worker::start(common, &worker.arguments())
        };
        ask(spool, &place.name, &self.path, Duration::from_secs(self.archive_timeout), &start)
    }
}

fn warn(path: &Path, error: &Error) {
    let cause = std::error::Error::source(error).map(|cause| format!(": {cause}")).unwrap_or_default();
    tracing::warn!(file = %path.display(), "the spool is of no use, so this file is pushed alone: {error}{cause}");
}
