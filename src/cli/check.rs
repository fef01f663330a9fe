use std::time::Duration;

use clap::Args;

use super::options::Common;
use super::output;
use super::pg::SourceKind;
use crate::backup::preflight::{await_told, identify, prove_archiving, prove_local, prove_stream};
use crate::backup::rival::{refuse_rival, segment_size};
use crate::backup::server::{Archiving, Server};
use crate::backup::standby;
use crate::error::{Error, Result};
use crate::format::manifest::Database;
use crate::postgres::SegmentName;
use crate::postgres::wal::coverage::RoadEnd;
use crate::recovery::outline::Outline;
use crate::repo::Repository;

/// Check that backups can work: the server, the stanza, and that WAL arrives in the archive
#[derive(Debug, Args)]
pub(super) struct Check {
    #[command(flatten)]
    server: super::pg::ServerOptions,
    #[command(flatten)]
    primary: super::pg::PrimaryOptions,
    #[command(flatten)]
    source: super::pg::SourceOptions,
    #[command(flatten)]
    refused: super::pg::CheckOptions,
    /// Fail if WAL is missing behind the newest backup, instead of a warning
    #[arg(long, env = "PGCAIRN_STRICT")]
    strict: bool,
    /// Seconds to wait for a WAL segment to be archived
    #[arg(long, env = "PGCAIRN_ARCHIVE_TIMEOUT", value_name = "SECONDS", default_value_t = 60)]
    archive_timeout: u64,
}

impl Check {
    pub(super) fn run(self, common: &Common) -> Result<()> {
        let found = common.repository().and_then(|repository| Ok((repository.archive_info()?, repository)));
        let (info, repository) = match found {
            Ok(found) => found,
            Err(error) => {
                // what a store that is away means for the server
                if let Ok(mut server) = Server::connect(&self.server.pg) {
                    tell_waiting(&mut server);
                }
                return Err(error);
            }
        };
        let mut server = Server::connect(&self.server.pg)?;
        let mut database = identify(&mut server)?;
        match self.source.source {
            SourceKind::Files => prove_local(&server)?,
            SourceKind::Stream => prove_stream(&mut server, &self.server.pg)?,
        }
        info.check(&repository.stanza, &database)?;
        database.id = info.current()?.id;
        let ok = format!("stanza {} is PostgreSQL {}, {}", repository.stanza, database.version, database.system_id);
        output::line(&ok);
        refuse_rival(&mut server, &repository, &database, self.refused.checks())?;
        let timeout = Duration::from_secs(self.archive_timeout);
        if server.in_recovery {
            return self.standby(&mut server, &repository, &database, timeout);
        }
        if server.archiving == Archiving::Off {
            output::line(
                "archive_mode is off: backups store the WAL they need, a point in time between them is not kept",
            );
            return Ok(());
        }
        tell_waiting(&mut server);
        let segment = prove_archiving(&mut server, &repository, &database, timeout)?;
        let first = SegmentName::of_number(segment.timeline(), 0, segment_size(&database)?);
        await_told(&mut server, first, segment, timeout)?;
        output::line(&format!("WAL segment {segment} was archived"));
        match (gap(&repository, segment)?, self.strict) {
            (Some(gap), true) => Err(gap),
            (Some(gap), false) => {
                output::warning(&gap);
                Ok(())
            }
            (None, _) => Ok(()),
        }
    }

    fn standby(
        &self,
        server: &mut Server,
        repository: &Repository,
        database: &Database,
        timeout: Duration,
    ) -> Result<()> {
        output::line("the server is a standby");
        if let Some(primary) = &self.primary.pg_primary {
            let segment = standby::prove_primary_archives(primary, server, repository, database, timeout)?;
            output::line(&format!("WAL segment {segment} was archived"));
            return Ok(());
        }
        let (_, redo) = server.checkpoint()?;
        output::line(&match standby::prove_archived(server, repository, database, redo, timeout)? {
            Some(segment) => format!("WAL segment {segment}, the last that was replayed to its end, is in the archive"),
            None => "no WAL segment was replayed to its end since the last checkpoint: name the primary with --pg-primary to see whether it archives".into(),
        });
        Ok(())
    }
}

/// What is missing between the newest backup and a segment that was just archived.
fn gap(repository: &Repository, segment: SegmentName) -> Result<Option<Error>> {
    let outline = Outline::load(repository, None, None)?;
    let known = outline.bare()?;
    let history = known.coverage().history(segment.timeline());
    let Some(backup) = known.on(&history).next() else { return Ok(None) };
    // what lies before it matters to older backups alone
    let horizon = outline.from(known.coverage().size().segment_of(backup.start))?;
    let RoadEnd::Gap { missing, then } = horizon.road(backup, &history)?.end else { return Ok(None) };
    let error = Error::new(format!(
        "WAL segment {missing} is missing in the archive, the next there is {then}: no point behind it can be reached from backup {}",
        backup.label
    ));
    Ok(Some(error.hint("take a backup now; \"pgcairn verify --quick\" shows all gaps")))
}

/// Says how much WAL waits for the archive. Who may not see that is not told.
fn tell_waiting(server: &mut Server) {
    match server.waiting() {
        Ok(Some(waiting)) => {
            output::line(&format!(
                "{} WAL files wait to be archived, the oldest since {}",
                waiting.files, waiting.oldest
            ));
            if let Some(failure) = waiting.failure {
                output::line(&format!("archiving has failed {failure}; the server's log says why"));
            }
        }
        Ok(None) => {}
        Err(error) => tracing::warn!(%error, "cannot tell how much WAL waits to be archived"),
    }
}
