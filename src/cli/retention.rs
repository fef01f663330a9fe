//! Options of what is kept, shared by `expire` and `backup`.

use std::time::Duration;

use clap::{Args, ValueEnum, value_parser};

use super::output::{self, bytes};
use crate::postgres::BackupKind;
use crate::retention::expire::{ExpireOptions, Report};
use crate::retention::policy::{self, Retention};

#[derive(Debug, Args)]
#[command(next_help_heading = "Retention options (without any, everything is kept)")]
pub(super) struct RetentionOptions {
    /// Full backups to keep, or days that a full backup must reach back; their differential and incremental ones go with them
    #[arg(long, env = "PGCAIRN_REPO_RETENTION_FULL", value_name = "N", value_parser = value_parser!(u32).range(1..))]
    repo_retention_full: Option<u32>,
    /// What --repo-retention-full counts: backups, or days
    #[arg(long, env = "PGCAIRN_REPO_RETENTION_FULL_TYPE", value_name = "TYPE", default_value = "count")]
    repo_retention_full_type: FullType,
    /// Differential backups to keep, full ones counted among them; incremental ones go with them
    #[arg(long, env = "PGCAIRN_REPO_RETENTION_DIFF", value_name = "N", value_parser = value_parser!(u32).range(1..))]
    repo_retention_diff: Option<u32>,
    /// Backups whose WAL is kept from their start on; of older ones what they need [default: all that are kept]
    #[arg(long, env = "PGCAIRN_REPO_RETENTION_ARCHIVE", value_name = "N", value_parser = value_parser!(u32).range(1..))]
    repo_retention_archive: Option<u32>,
    /// Kind of backup that --repo-retention-archive counts: full ones, differential ones too, or all
    #[arg(long, env = "PGCAIRN_REPO_RETENTION_ARCHIVE_TYPE", value_name = "TYPE", default_value = "full")]
    repo_retention_archive_type: ArchiveType,
    /// How long to keep a pack that no backup needs any more: longer than any backup, mount or restore runs
    #[arg(
        long,
        alias = "grace",
        env = "PGCAIRN_REPO_RETENTION_GRACE",
        value_name = "TIME",
        default_value = "24h",
        value_parser = time
    )]
    repo_retention_grace: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum FullType {
    Count,
    Time,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ArchiveType {
    Full,
    Diff,
    Incr,
}

impl RetentionOptions {
    /// The expire that a backup ends with.
    pub(super) fn brief(&self) -> ExpireOptions {
        let (retention, grace) = (self.retention(), self.repo_retention_grace);
        ExpireOptions { retention, grace, force: false, set: None, brief: true, dry_run: false }
    }

    pub(super) fn retention(&self) -> Retention {
        Retention {
            full: self.repo_retention_full,
            full_type: match self.repo_retention_full_type {
                FullType::Count => policy::FullType::Count,
                FullType::Time => policy::FullType::Time,
            },
            diff: self.repo_retention_diff,
            archive: self.repo_retention_archive,
            archive_type: match self.repo_retention_archive_type {
                ArchiveType::Full => BackupKind::Full,
                ArchiveType::Diff => BackupKind::Diff,
                ArchiveType::Incr => BackupKind::Incr,
            },
        }
    }
}

/// Parses `24h`, `90m`, `7d`, `0`.
pub(super) fn time(text: &str) -> std::result::Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let seconds = match &text[digits.len()..] {
        "" | "s" => 1,
        "m" | "min" => 60,
        "h" => 3600,
        "d" => 86_400,
        other => return Err(format!("unknown unit \"{other}\"; use s, m, h or d")),
    };
    let number: u64 = digits.parse().map_err(|_| format!("\"{text}\" is no time; it reads like 24h or 7d"))?;
    number.checked_mul(seconds).map(Duration::from_secs).ok_or_else(|| format!("{text} is too much"))
}

/// What went and what stays; with `all`, every backup, else those that went.
pub(super) fn tell(report: &Report, all: bool) {
    let would = if report.dry_run { "would be " } else { "" };
    for backup in report.backups.iter().filter(|backup| all || !backup.keep) {
        let fate = if backup.keep { "kept".to_owned() } else { format!("{would}removed") };
        output::line(&format!("backup {}: {fate}: {}", backup.label, backup.why));
    }
    for archive in report.archives.iter().filter(|archive| all || archive.removed > 0) {
        output::line(&format!(
            "archive {}: {} files ({}) {would}removed; kept: {}: {}",
            archive.id,
            archive.removed,
            bytes(archive.bytes),
            archive.keep,
            archive.why
        ));
    }
    if let Some(packs) = &report.packs {
        output::line(&format!(
            "packs: {} in all, {} ({}) that no backup needs; {} newly marked, {} ({}) deleted",
            packs.total,
            packs.unneeded,
            bytes(packs.unneeded_bytes),
            packs.marked,
            packs.deleted,
            bytes(packs.deleted_bytes)
        ));
    }
    report.notes.iter().for_each(|note| output::line(&format!("note: {note}")));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        for (text, seconds) in [("0", 0), ("90", 90), ("5m", 300), ("24h", 86_400), ("7d", 604_800)] {
            assert_eq!(time(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        for text in ["", "h", "-1", "1w", "1.5h", "99999999999999999999d", "9999999999999999999d"] {
            assert!(time(text).is_err(), "{text}");
        }
    }
}
