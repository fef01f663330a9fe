//! A standby as the source: its files are read, and the backup begins and ends on the standby itself, as PostgreSQL's own base
//! backup from a standby does (`do_pg_backup_start` and `do_pg_backup_stop` in xlog.c).
//!
//! - The backup starts at the redo point of the last restartpoint, which the standby has replayed: no page read later is older.
//! - A standby writes no record that ends a backup. It is consistent where pg_control's `minRecoveryPoint` says, since a page
//!   reaches the disk only after pg_control says how far replay must go for it. So pg_control is read last, recovery goes to
//!   what it says (`BACKUP FROM: standby` in `backup_label`), and what `pg_backup_stop` returns is that point or a later one.
//! - Everything comes from the standby: a mix of two machines' files would need two starting points, and the primary's files
//!   cannot be read from here. The configuration files so are the standby's.
//! - A standby cannot end a WAL segment. The last segment of the backup reaches the archive when the primary ends it: told to by
//!   us, where we know how to reach it, else when it does so by itself.
//!
//! The backup is void when the standby was promoted, followed another timeline, or replayed WAL written with
//! `full_page_writes = off`: PostgreSQL checks the first and the last, the timeline is checked here.

use std::time::Duration;

use super::preflight::{await_segments, not_ours, prove_archiving, read_control};
use super::rival::segment_size;
use super::server::{Archiving, Server};
use crate::error::{Context, Error, Result};
use crate::format::manifest::Database;
use crate::postgres::wal::landmarks::Place;
use crate::postgres::wal::records::Event;
use crate::postgres::{ClusterState, ControlFile, Lsn, SegmentName, Timeline, TimelineHistory, WalName};
use crate::repo::Repository;

/// Connects to the primary of `standby`.
pub fn connect_primary(conninfo: &str, standby: &Server) -> Result<Server> {
    let primary =
        Server::connect_primary(conninfo, "--pg-primary").context(|| "the primary is asked to end a segment".into())?;
    match primary.system_id == standby.system_id {
        true => Ok(primary),
        false => Err(Error::new(format!(
            "the server that --pg-primary names has system identifier {}, the standby has {}",
            primary.system_id, standby.system_id
        ))
        .hint("it is the primary of another cluster")),
    }
}

/// Proves, with the primary's help, that its WAL reaches the archive; returns the segment that did.
pub fn prove_primary_archives(
    conninfo: &str,
    standby: &Server,
    repository: &Repository,
    database: &Database,
    timeout: Duration,
) -> Result<SegmentName> {
    let mut primary = connect_primary(conninfo, standby)?;
    if primary.archiving == Archiving::Off {
        return Err(Error::new("archive_mode is off at the primary").hint(
            "a backup from a standby takes its WAL from the archive: set archive_mode = on and an archive_command",
        ));
    }
    prove_archiving(&mut primary, repository, database, timeout)
}

/// Proves that the segments from `start` on that the standby has replayed to their end are in the archive, and that the archive
/// has the standby's last checkpoint where the standby has it. Returns the last of the segments, or `None` where replay is still
/// in the first.
pub fn prove_archived(
    standby: &mut Server,
    repository: &Repository,
    database: &Database,
    start: Lsn,
    timeout: Duration,
) -> Result<Option<SegmentName>> {
    let size = segment_size(database)?;
    let (replayed, timeline) = (standby.replayed()?, standby.replayed_timeline()?);
    let history = history(repository, database, timeline)?;
    // a segment in which a timeline was left is archived under the next one's name
    let name = |number: u64| {
        let last = size.first_lsn(number + 1).map_or(Lsn(u64::MAX), |next| Lsn(next.0 - 1));
        SegmentName::of_number(history.timeline_at(last), number, size)
    };
    let complete: Vec<SegmentName> = (size.segment_of(start)..size.segment_of(replayed)).map(name).collect();
    let archive = repository.archive(database);
    for names in complete.chunk_by(|a, b| a.timeline() == b.timeline()) {
        await_segments(&archive, names, timeout)?;
    }
    let (checkpoint, redo) = standby.checkpoint()?;
    let segment = name(size.segment_of(checkpoint));
    if complete.contains(&segment) {
        match repository.archived_record(database, segment.timeline(), Place::Begins(checkpoint))? {
            Some(Event::Checkpoint { redo: archived, .. }) if archived == redo => {}
            _ => {
                let why = format!("it lacks the checkpoint at {checkpoint} that the standby has replayed");
                return Err(not_ours(segment, why));
            }
        }
    }
    Ok(complete.last().copied())
}

/// The history of a timeline, from the archive.
fn history(repository: &Repository, database: &Database, timeline: Timeline) -> Result<TimelineHistory> {
    let name = WalName::History(timeline).to_string();
    let object = match timeline {
        Timeline(1) => None,
        _ => repository.archive(database).find(&name)?,
    };
    let Some(object) = object else { return Ok(TimelineHistory { timeline, ancestors: Vec::new() }) };
    TimelineHistory::parse(timeline, &repository.wal_file(database, &object.key)?).context(|| name)
}

/// The timeline of a backup that begins with this pg_control, or goes on with it on `expected`.
pub fn timeline(control: &ControlFile, expected: Option<Timeline>) -> Result<Timeline> {
    if control.state != ClusterState::InArchiveRecovery {
        return Err(Error::new("the standby was promoted during the backup").hint("run the backup again"));
    }
    let timeline = expected.unwrap_or(control.checkpoint.timeline);
    let replayed = control.min_recovery_timeline.unwrap_or(timeline);
    match (control.checkpoint.timeline, replayed) == (timeline, timeline) {
        true => Ok(timeline),
        false => Err(Error::new(format!("the standby went from timeline {timeline} to {replayed}")).hint(
            "the primary changed; run the backup again when the standby has replayed a checkpoint of the new one",
        )),
    }
}

/// Waits until the WAL of a backup that ended on a standby is in the archive.
pub fn await_wal(
    primary: Option<&str>,
    standby: &Server,
    repository: &Repository,
    database: &Database,
    segments: &[SegmentName],
    timeout: Duration,
) -> Result<()> {
    if let Some(conninfo) = primary {
        // what the standby has replayed lies before what the primary writes now: its mark ends the last segment, or a later one
        prove_primary_archives(conninfo, standby, repository, database, timeout)?;
    }
    await_segments(&repository.archive(database), segments, timeout).map_err(|error| match primary {
        Some(_) => error,
        None => error.hint(
            "a standby cannot end a WAL segment: name the primary with --pg-primary, or set archive_timeout there and wait longer with --archive-timeout",
        ),
    })
}

/// Fails unless the standby, now that the backup has ended at `stop`, is what it was when `control` was copied.
pub fn prove_stop(standby: &Server, control: &ControlFile, stop: Lsn) -> Result<()> {
    let (_, now) = read_control(&standby.data_directory)?;
    timeline(&now, Some(control.checkpoint.timeline))?;
    match stop >= control.min_recovery_point {
        true => Ok(()),
        false => Err(Error::new(format!(
            "the backup ended at {stop}, but pg_control needs replay up to {}",
            control.min_recovery_point
        ))
        .hint("is this the data directory of the server that --pg names?")),
    }
}
