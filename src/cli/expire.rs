use clap::Args;

use super::options::{Common, Output};
use super::output::{self, Progress};
use super::retention::{RetentionOptions, tell};
use crate::error::{Error, Result};
use crate::retention::expire::{ExpireOptions, expire};

/// Remove backups and WAL that the retention no longer keeps, and packs that no backup needs
///
/// The last full backup always stays, and so does the WAL that kept backups need. Packs go only after a grace period, and
/// not while a backup runs. It runs after each backup too, unless --expire-auto is n. Before something is removed, the kept
/// backups that stand for it must be proved: their WAL and their packs are there. One that is not proved does not count, and
/// the exit status is 1.
#[derive(Debug, Args)]
pub(super) struct Expire {
    #[command(flatten)]
    retention: RetentionOptions,
    /// Remove this backup and what was taken on top of it, whatever the retention says
    #[arg(long, value_name = "LABEL")]
    set: Option<String>,
    /// Accept a grace period below 1h
    #[arg(long)]
    force: bool,
    /// Only say what would be removed, and why
    #[arg(long)]
    dry_run: bool,
    /// Output for people or programs
    #[arg(long, env = "PGCAIRN_OUTPUT", default_value = "text")]
    output: Output,
}

impl Expire {
    pub(super) fn run(self, common: &Common) -> Result<()> {
        let repository = common.repository()?;
        let progress = Progress::new(self.output == Output::Json);
        let (set, dry_run, force) = (self.set, self.dry_run, self.force);
        let options = ExpireOptions { set, dry_run, force, brief: false, ..self.retention.brief() };
        let report = expire(&repository, &options, &progress)?;
        progress.clear();
        match self.output {
            Output::Json => output::line(&serde_json::to_string_pretty(&report)?),
            Output::Text => tell(&report, true),
        }
        match report.unproved.as_slice() {
            [] => Ok(()),
            unproved => {
                let labels: Vec<&str> = unproved.iter().map(|of| of.label.as_str()).collect();
                Err(Error::new(format!("backups that are not proved: {}", labels.join(", ")))
                    .hint("older backups stay in their place; look with \"pgcairn verify\", take a new full backup"))
            }
        }
    }
}
