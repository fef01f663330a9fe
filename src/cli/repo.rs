use clap::{Args, Subcommand};

use super::options::Common;
use super::output;
use crate::error::Result;
use crate::keep::repair::repair;

/// Work on the repository itself
#[derive(Debug, Args)]
pub(super) struct Repo {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Make backup.info, archive.info and the latest pointers again from manifests and archive
    Repair,
}

impl Repo {
    pub(super) fn run(self, common: &Common) -> Result<()> {
        let Verb::Repair = self.verb;
        let done = repair(&common.repository(false)?)?;
        done.iter().for_each(|line| output::line(line));
        Ok(())
    }
}
