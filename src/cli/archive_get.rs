use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::options::Common;
use super::output;
use crate::error::Error;
use crate::read::wal::{GetError, get};

/// PostgreSQL takes any status up to 125 for "there is no such file" and ends recovery; beyond that it stops instead.
pub(super) const FAILED: u8 = 250;

/// Fetch a WAL file from the archive; for restore_command = 'pgcairn archive-get %f %p'
///
/// Exit status: 0 delivered; 1 the archive has no such file, which ends PostgreSQL's recovery; 250 anything else, which makes
/// PostgreSQL stop rather than take a failing store for the end of WAL.
#[derive(Debug, Args)]
pub(super) struct ArchiveGet {
    /// Name of the file (%f)
    name: String,
    /// Where to write it (%p)
    path: PathBuf,
}

impl ArchiveGet {
    pub(super) fn run(self, common: &Common) -> ExitCode {
        let repository = common.repository(false).map_err(GetError::Failed);
        match repository.and_then(|repository| get(&repository, &self.name, &self.path)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(GetError::NotThere) => {
                output::error(&Error::new(format!("the archive has no {}", self.name)));
                ExitCode::from(1)
            }
            Err(GetError::Failed(error)) => {
                output::error(&error);
                ExitCode::from(FAILED)
            }
        }
    }
}
