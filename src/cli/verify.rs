use clap::Args;

use super::options::{Common, Output};
use super::output::{self, Progress, bytes, time};
use crate::error::{Error, Result};
use crate::verify::{Gap, Report, VerifyOptions, verify};

/// Check that everything backups and points in time need is there and whole
///
/// Reads every pack that a backup needs and every WAL file, and checks each chunk; says which backups and files, and which
/// points in time, are harmed by which object. The exit status is 1 when something is.
#[derive(Debug, Args)]
pub(super) struct Verify {
    /// Read the manifests only; of packs and WAL look whether they are there
    #[arg(long)]
    quick: bool,
    /// Packs read at the same time [default: number of CPUs, at most 8]
    #[arg(long, env = "PGCAIRN_PROCESS_MAX", value_name = "N")]
    process_max: Option<usize>,
    /// Output for people or programs
    #[arg(long, env = "PGCAIRN_OUTPUT", default_value = "text")]
    output: Output,
}

impl Verify {
    pub(super) fn run(self, common: &Common) -> Result<()> {
        let repository = common.repository()?;
        let progress = Progress::new(self.output == Output::Json);
        let process_max = self.process_max.unwrap_or_else(super::backup::default_process_max).max(1);
        let report = verify(&repository, &VerifyOptions { quick: self.quick, process_max }, &progress)?;
        progress.clear();
        match self.output {
            Output::Json => output::line(&serde_json::to_string_pretty(&report)?),
            Output::Text => tell(&report),
        }
        match report.sound {
            true => Ok(()),
            false => Err(Error::new(format!(
                "stanza {} is harmed: {} objects, {} gaps in the WAL",
                report.stanza,
                report.harms.len(),
                report.gaps.len()
            ))
            .hint("keep what is there, look at the store's disks, take a full backup; sound backups can be restored")),
        }
    }
}

fn tell(report: &Report) {
    for harm in &report.harms {
        let backups = match harm.backups.as_slice() {
            [] => "no backup needs it".to_owned(),
            labels => format!("needed by {}", labels.join(", ")),
        };
        output::line(&format!("{}: {}; {backups}", harm.object, harm.what));
    }
    report.gaps.iter().for_each(|gap| output::line(&of_gap(gap)));
    for backup in &report.backups {
        match (backup.sound, backup.files_harmed) {
            (true, _) => output::line(&format!("backup {}: sound", backup.label)),
            (false, 0) => output::line(&format!("backup {}: harmed", backup.label)),
            (false, count) => {
                output::line(&format!("backup {}: harmed in {count} files:", backup.label));
                backup.files.iter().for_each(|file| output::line(&format!("    {file}")));
                if count > backup.files.len() as u64 {
                    output::line(&format!("    and {} more", count - backup.files.len() as u64));
                }
            }
        }
    }
    report.notes.iter().for_each(|note| output::line(&format!("note: {note}")));
    let checked = report.checked;
    output::line(&match report.quick {
        true => "manifests were read, packs and WAL only listed".to_owned(),
        false => format!(
            "read {} packs ({}, {} chunks) and {} WAL files ({})",
            checked.packs,
            bytes(checked.pack_bytes),
            checked.chunks,
            checked.wal_files,
            bytes(checked.wal_bytes)
        ),
    });
}

fn of_gap(gap: &Gap) -> String {
    let segments = match gap.first == gap.last {
        true => format!("segment {} is", gap.first),
        false => format!("segments {} to {} are", gap.first, gap.last),
    };
    let from = gap.from_time.map_or_else(|| "all points".into(), |at| format!("points after {}", time(at)));
    let until = match (&gap.until, gap.until_time) {
        (Some(label), Some(at)) => format!("up to {}, when backup {label} ended, ", time(at)),
        _ => String::new(),
    };
    let after = gap.after.as_ref().map_or_else(String::new, |label| format!(" from backup {label}"));
    format!("WAL archive {}: {segments} missing or damaged: {from} {until}cannot be reached{after}", gap.archive)
}
