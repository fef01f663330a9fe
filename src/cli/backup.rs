use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};

use super::options::{Common, Output, YesNo, size};
use super::output::{self, Progress, bytes};
use super::pg::SourceKind;
use super::retention::{RetentionOptions, tell, time};
use crate::backup::run::{BackupOptions, WalChoice, Wanted, Way, backup};
use crate::backup::schedule::Schedule;
use crate::error::{Context, Error, Result};
use crate::format::chunk::DEFAULT_LEVEL;
use crate::format::manifest::Description;
use crate::postgres::BackupKind;
use crate::retention::expire::expire;

/// Back up the running cluster
///
/// Reads the data directory of the server on this machine, which may be a standby, or has the server send it (--source=stream); the server goes on working. A backup is complete in itself and
/// becomes visible only when every byte of it, and all WAL it needs, is in the repository.
#[derive(Debug, Args)]
pub(super) struct Backup {
    #[command(flatten)]
    server: super::pg::ServerOptions,
    #[command(flatten)]
    primary: super::pg::PrimaryOptions,
    #[command(flatten)]
    source: super::pg::SourceOptions,
    /// Kind of backup: full reads every file; diff and incr only those that changed since the last full, or the last backup;
    /// auto takes what is due by --full-every and --diff-every
    #[arg(long = "type", env = "PGCAIRN_TYPE", value_name = "TYPE", default_value = "incr")]
    kind: Kind,
    /// With --type=auto: time from one full backup to the next, e.g. 7d or 12h
    #[arg(long, env = "PGCAIRN_FULL_EVERY", value_name = "TIME", default_value = "7d", value_parser = time)]
    full_every: Duration,
    /// With --type=auto: time from one full or differential backup to the next
    #[arg(long, env = "PGCAIRN_DIFF_EVERY", value_name = "TIME", default_value = "1d", value_parser = time)]
    diff_every: Duration,
    /// Read and hash every file, also those whose size and time did not change
    #[arg(long, env = "PGCAIRN_CHECKSUM")]
    checksum: bool,
    /// Threads that read, hash and compress [default: number of CPUs, at most 8]
    #[arg(long, env = "PGCAIRN_PROCESS_MAX", value_name = "N")]
    process_max: Option<usize>,
    /// Bytes of packs held in memory at once; bounds threads and uploads too
    #[arg(long, env = "PGCAIRN_BUFFER_SIZE", value_name = "SIZE", default_value = "128M", value_parser = size)]
    buffer_size: u64,
    /// zstd level for what it pays for; the rest is compressed at level 1
    #[arg(long, env = "PGCAIRN_COMPRESS_LEVEL", value_name = "LEVEL", default_value_t = DEFAULT_LEVEL, allow_hyphen_values = true)]
    compress_level: i32,
    /// Begin with an immediate checkpoint (y), or wait for the server's next one (n)
    #[arg(long, env = "PGCAIRN_START_FAST", value_name = "y|n", default_value = "y")]
    start_fast: YesNo,
    /// Where the WAL goes that the backup needs: auto is the archive if the server archives
    #[arg(long, env = "PGCAIRN_WAL", value_name = "WHERE", default_value = "auto")]
    wal: Wal,
    #[command(flatten)]
    refused: super::pg::CheckOptions,
    /// Seconds to wait for a WAL segment to be archived
    #[arg(long, env = "PGCAIRN_ARCHIVE_TIMEOUT", value_name = "SECONDS", default_value_t = 60)]
    archive_timeout: u64,
    /// What to do about pages whose checksum is wrong
    #[arg(long, env = "PGCAIRN_PAGE_ERRORS", value_name = "WHAT", default_value = "report")]
    page_errors: PageErrors,
    /// Remove afterwards what the retention, if one is set, no longer keeps
    #[arg(long, env = "PGCAIRN_EXPIRE_AUTO", value_name = "y|n", default_value = "y")]
    expire_auto: YesNo,
    #[command(flatten)]
    retention: RetentionOptions,
    /// Output for people or programs
    #[arg(long, env = "PGCAIRN_OUTPUT", default_value = "text")]
    output: Output,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kind {
    Full,
    Diff,
    Incr,
    Auto,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Wal {
    Auto,
    Archive,
    Stored,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum PageErrors {
    Report,
    Fail,
}

impl Backup {
    pub(super) fn run(self, common: &Common) -> Result<()> {
        let expires = self.expire_auto == YesNo::Y && !self.retention.retention().is_none();
        if expires {
            // before the work of hours
            self.retention.brief().check()?;
        }
        common.refuse_repository_in_data_directory(None)?;
        let repository = common.repository()?;
        let progress = Progress::new(self.output == Output::Json);
        let options = BackupOptions {
            kind: match self.kind {
                Kind::Full => Wanted::Kind(BackupKind::Full),
                Kind::Diff => Wanted::Kind(BackupKind::Diff),
                Kind::Incr => Wanted::Kind(BackupKind::Incr),
                Kind::Auto => Wanted::Due(Schedule { full_every: self.full_every, diff_every: self.diff_every }),
            },
            checksum: self.checksum,
            conninfo: self.server.pg.clone(),
            primary: self.primary.pg_primary.clone(),
            process_max: self.process_max.unwrap_or_else(default_process_max),
            buffer_bytes: self.buffer_size as usize,
            level: self.compress_level,
            start_fast: self.start_fast == YesNo::Y,
            wal: match self.wal {
                Wal::Auto => WalChoice::Auto,
                Wal::Archive => WalChoice::Archive,
                Wal::Stored => WalChoice::Stored,
            },
            archive_timeout: Duration::from_secs(self.archive_timeout),
            page_errors_fail: self.page_errors == PageErrors::Fail,
            checks: self.refused.checks(),
            way: match self.source.source {
                SourceKind::Files => Way::Files,
                SourceKind::Stream => Way::Stream,
            },
        };
        let started = Instant::now();
        let description = backup(&repository, &options, &progress)?;
        progress.clear();
        match self.output {
            Output::Json => output::line(&serde_json::to_string_pretty(&description)?),
            Output::Text => report(&description, started.elapsed()),
        }
        if expires {
            let expired = expire(&repository, &self.retention.brief(), &progress);
            progress.clear();
            let expired = expired.context(|| format!("backup {} was taken, but expire failed", description.label))?;
            if self.output == Output::Text {
                tell(&expired, false);
            }
        }
        Ok(())
    }
}

fn report(of: &Description, took: Duration) {
    let sizes = of.sizes;
    output::line(&format!(
        "backup {}: {} in {} files, {} stored, {:.1} s",
        of.label,
        bytes(sizes.database),
        sizes.files,
        bytes(sizes.stored_new),
        took.as_secs_f64()
    ));
    for errors in &of.page_errors {
        let warning = Error::new(format!(
            "{} pages of {} fail their checksum: {:?}",
            errors.blocks.len(),
            errors.file,
            errors.blocks
        ))
        .hint("the server's own data is damaged; run pg_checksums or pg_amcheck there");
        output::error(&warning);
    }
}

/// As many threads as CPUs, so that a server is not starved: at most 8.
pub(super) fn default_process_max() -> usize {
    std::thread::available_parallelism().map_or(2, |cpus| cpus.get().min(8))
}
