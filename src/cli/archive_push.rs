use std::path::PathBuf;

use clap::Args;

use super::options::Common;
use crate::error::Result;
use crate::write::push::{Pushed, push};

/// Archive a WAL file; for archive_command = 'pgcairn archive-push %p'
///
/// Succeeds only when the repository has confirmed the file. The same content again succeeds with a warning; other content
/// under the same name, or another cluster's WAL, is refused.
#[derive(Debug, Args)]
pub(super) struct ArchivePush {
    /// Path of the file (%p)
    path: PathBuf,
    /// zstd level
    #[arg(long, env = "PGCAIRN_COMPRESS_LEVEL", value_name = "LEVEL", default_value_t = 3, allow_hyphen_values = true)]
    compress_level: i32,
}

impl ArchivePush {
    pub(super) fn run(self, common: &Common) -> Result<()> {
        let repository = common.repository(false)?;
        match push(&repository, &self.path, self.compress_level)? {
            Pushed::New => tracing::info!(file = %self.path.display(), "archived"),
            Pushed::AlreadyThere => tracing::warn!(file = %self.path.display(), "the archive already has this file"),
        }
        Ok(())
    }
}
