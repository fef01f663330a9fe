use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;

use super::archive_worker::{self, Staging};
use super::options::{Common, YesNo, size};
use super::output;
use crate::archive::prefetch::{Taken, follow, take};
use crate::archive::spool::Spool;
use crate::error::{Error, Result};
use crate::postgres::SegmentName;
use crate::read::wal::{GetError, get_for};
use crate::recovery::tablespaces::created_by_delivered;
use crate::repo::asking::Asking;

/// PostgreSQL takes any status up to 125 for "there is no such file" and ends recovery; beyond that it stops instead.
pub(super) const FAILED: u8 = 250;

/// Fetch a WAL file from the archive; for restore_command = 'pgcairn archive-get %f %p'
///
/// Delivers WAL of the cluster that asks, which pg_control beside its pg_wal tells, and of no other: a stanza may have gone on with
/// another cluster since.
///
/// Exit status: 0 delivered; 1 the archive has no such file, which ends PostgreSQL's recovery; 250 anything else, which makes
/// PostgreSQL stop rather than take a failing store for the end of WAL.
#[derive(Debug, Args)]
pub(super) struct ArchiveGet {
    /// Name of the file (%f)
    name: String,
    /// Where to write it (%p)
    path: PathBuf,
    /// The server is a copy: stop it before it replays a CREATE TABLESPACE by which it would write into another server's files
    #[arg(long)]
    for_copy: bool,
    /// Let a worker in the background fetch the segments that follow (y)
    #[arg(long, env = "PGCAIRN_ARCHIVE_ASYNC", value_name = "y|n", default_value = "n")]
    archive_async: YesNo,
    /// Bytes of segments that the worker may keep ready
    #[arg(long, env = "PGCAIRN_ARCHIVE_GET_QUEUE_MAX", value_name = "SIZE", default_value = "128M", value_parser = size)]
    archive_get_queue_max: u64,
    /// Seconds to wait for a segment that the worker is fetching
    #[arg(long, env = "PGCAIRN_ARCHIVE_TIMEOUT", value_name = "SECONDS", default_value_t = 60)]
    archive_timeout: u64,
    #[command(flatten)]
    staging: Staging,
}

/// Where the worker leaves what it fetched for this server.
struct Ahead {
    spool: Spool,
    segment: SegmentName,
    wal: PathBuf,
    asking: Asking,
}

impl ArchiveGet {
    pub(super) fn run(self, common: &Common) -> ExitCode {
        match self.deliver(common).and_then(|()| self.refuse_used().map_err(GetError::Failed)) {
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

    /// Where the server is a copy, refuses what would lead it to another's tablespace. It runs this in its data directory.
    fn refuse_used(&self) -> Result<()> {
        let Some(segment) = self.name.parse().ok().filter(|_| self.for_copy) else { return Ok(()) };
        let data =
            std::env::current_dir().map_err(|error| Error::new("there is no working directory").source(error))?;
        let (created, major) = created_by_delivered(&data, segment, &self.path)?;
        match created.iter().find(|created| created.is_used_by_another(&data, major)) {
            // to stop at the backup's end, recovery asks for the segment behind it
            Some(created) => Err(created.refusal().hint(format!(
                "\"pgcairn start\" or \"pgcairn mount --recovered\" can go past it; a copy can on another machine, or up to a \
                 point before WAL {segment}; \"pgcairn restore --type=none\" makes a copy of the backup alone"
            ))),
            None => Ok(()),
        }
    }

    fn deliver(&self, common: &Common) -> std::result::Result<(), GetError> {
        let asking = Asking::of(&self.path);
        let ahead = asking.and_then(|asking| self.ahead(common, asking));
        if let Some(ahead) = &ahead {
            match take(&ahead.spool, ahead.segment, &self.path, Duration::from_secs(self.archive_timeout)) {
                Ok(Taken::Delivered) => {
                    tracing::info!(segment = self.name, "taken from the spool");
                    // the worker may have ended meanwhile
                    self.have_worker(common, ahead);
                    return Ok(());
                }
                Ok(Taken::NotHere) => {}
                Err(error) => tracing::warn!(%error, "the spool is of no use, so the archive is asked"),
            }
        }
        let repository = common.repository_of_archive().map_err(GetError::Failed)?;
        let found = || {
            let Some(ahead) = &ahead else { return };
            match follow(&ahead.spool, ahead.segment) {
                Ok(()) => self.have_worker(common, ahead),
                Err(error) => tracing::warn!(%error, "nothing is fetched ahead"),
            }
        };
        get_for(&repository, asking.as_ref(), &self.name, &self.path, &found)
    }

    /// Only segments come in order; what is asked for beside them is asked of the archive.
    fn ahead(&self, common: &Common, asking: Asking) -> Option<Ahead> {
        let segment = self.name.parse().ok().filter(|_| self.archive_async == YesNo::Y)?;
        let open = || -> Result<Ahead> {
            let absolute =
                std::path::absolute(&self.path).and_then(|path| path.parent().unwrap_or(&path).canonicalize());
            let wal = absolute.map_err(|error| Error::io("find the directory of", &self.path, error))?;
            Ok(Ahead { spool: self.staging.get_spool(common, &wal, &asking)?, segment, wal, asking })
        };
        match open() {
            Ok(ahead) => Some(ahead),
            Err(error) => {
                tracing::warn!(%error, "without a spool, nothing is fetched ahead");
                None
            }
        }
    }

    /// A worker fetches the segments that follow. That there is none is no failure of this call.
    fn have_worker(&self, common: &Common, ahead: &Ahead) {
        let start = || -> Result<()> {
            if ahead.spool.live_run()?.is_none() {
                let (wal, queue): (&Path, _) = (&ahead.wal, self.archive_get_queue_max);
                let worker = archive_worker::Get::new(wal, &ahead.spool, queue, &ahead.asking, &self.staging);
                drop(archive_worker::start(common, &worker.arguments())?);
            }
            Ok(())
        };
        if let Err(error) = start() {
            tracing::warn!(%error, "nothing is fetched ahead");
        }
    }
}
