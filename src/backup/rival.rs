//! Whether the connected server is the one whose WAL the stanza's archive holds.
//!
//! A copy of a data directory, a machine that went back to a snapshot, and a clone all have the system identifier of the
//! cluster, and some have its timeline too. A backup of one of them would become the latest of the stanza, and retention would
//! remove those of the cluster for it. What can be known before anything is written is refused here; that the server's WAL
//! arrives in the archive is proved by [`crate::backup::preflight::prove_archiving`].

use super::server::{Archiving, Server};
use crate::error::{Context, Error, Result};
use crate::format::manifest::Database;
use crate::postgres::{Lsn, SegmentName, SegmentSize, Timeline, TimelineHistory, WalName};
use crate::repo::Repository;

/// What to do about a server that is behind the archive.
const HINT: &str = "did this machine go back to a snapshot, or is the server a copy? A server that is to go on from here needs \
                    a timeline of its own (stop it, create standby.signal, start and promote it); a copy needs a stanza of its own";

/// What a person may say that a server is all the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checks {
    /// refuse a server that does not archive where the stanza has an archive
    pub archive_mode: bool,
    /// refuse a server whose timeline was left before what it has written
    pub timeline: bool,
}

/// Fails if the server cannot be the one whose WAL the archive of `database` holds.
pub fn refuse_rival(server: &mut Server, repository: &Repository, database: &Database, checks: Checks) -> Result<()> {
    refuse_view(server)?;
    // a standby replays what its primary wrote, and may be behind the archive
    if server.in_recovery {
        return Ok(());
    }
    if checks.archive_mode && server.archiving == Archiving::Off && repository.archive(database).has_segments()? {
        return Err(Error::new(format!(
            "archive_mode is off on this server, but stanza {} has a WAL archive",
            repository.stanza
        ))
        .hint(
            "a restored copy or a clone needs a stanza of its own. Set archive_mode = on if this server replaces the one that \
             archived; --archive-mode-check=n takes a backup of a server that no longer archives",
        ));
    }
    refuse_behind_backups(server, repository, database)?;
    refuse_behind_archive(server, repository, database)?;
    refuse_other_history(server, repository, database)?;
    let (lsn, segment) = server.writing()?;
    checks.refuse_left(repository, database, segment.timeline(), lsn)
}

impl Checks {
    /// Fails if a newer timeline of the archive left this one before `lsn`, up to which the server has written on it: another
    /// server was promoted, and this one is the primary before it, or its standby.
    pub(super) fn refuse_left(
        self,
        repository: &Repository,
        database: &Database,
        timeline: Timeline,
        lsn: Lsn,
    ) -> Result<()> {
        if !self.timeline {
            return Ok(());
        }
        let archive = repository.archive(database);
        let histories = archive.histories(&archive.begin()?);
        for (newer, key) in histories.into_iter().filter(|(newer, _)| *newer > timeline) {
            let text = repository.wal_file(database, &key)?;
            let history = TimelineHistory::parse(newer, &text).context(|| key.clone())?;
            if let Some(end) = history.end_of(timeline).filter(|end| *end < lsn) {
                return Err(Error::new(format!(
                    "the server has written up to {lsn} on timeline {timeline}, but timeline {newer} of the archive left that at {end}"
                ))
                .hint(
                    "is this the primary before a failover? Make it a standby of the new one (pg_rewind, or a restored backup). If \
                     it is to go on, it needs a timeline of its own (stop it, create standby.signal, start and promote it); \
                     --timeline-check=n takes its backups on this timeline",
                ));
            }
        }
        Ok(())
    }
}

/// A mount or a clone of this program shows a directory that no data directory has.
fn refuse_view(server: &mut Server) -> Result<()> {
    match server.is_view()? {
        true => Err(Error::new(format!("{} is a mount or a clone of a backup", server.data_directory.display()))
            .hint("back up the cluster itself; restore the backup to make an independent copy")),
        false => Ok(()),
    }
}

/// No backup of the server's timeline can end after what the server has written.
fn refuse_behind_backups(server: &mut Server, repository: &Repository, database: &Database) -> Result<()> {
    let backups = repository.backup_info()?.backups;
    let (lsn, segment) = server.writing()?;
    for (label, of) in backups.iter().rev().filter(|(_, of)| of.database_id == database.id) {
        let stop: Lsn = of.stop_lsn.parse().context(|| format!("WAL position {} of backup {label}", of.stop_lsn))?;
        let on_timeline = of.wal_stop.parse().is_ok_and(|last: SegmentName| last.timeline() == segment.timeline());
        if on_timeline && stop > lsn {
            return Err(Error::new(format!(
                "backup {label} ended at {stop} of timeline {}, but the server has written up to {lsn} only",
                segment.timeline()
            ))
            .hint(HINT));
        }
    }
    Ok(())
}

/// The archive cannot hold a segment of the server's timeline that the server has not finished.
fn refuse_behind_archive(server: &mut Server, repository: &Repository, database: &Database) -> Result<()> {
    let archive = repository.archive(database);
    let mut current = server.writing()?.1;
    while let Some(found) = archive.first_from(current)? {
        // the server may have finished it meanwhile
        let (lsn, now) = server.writing()?;
        current = now;
        if found.timeline() == current.timeline() && found >= current {
            return Err(Error::new(format!(
                "the archive has WAL segment {found}, which the server, at {lsn}, has not finished: it is other WAL"
            ))
            .hint(HINT));
        }
    }
    Ok(())
}

/// The server's timeline must have begun where the archive's timeline of that number did.
fn refuse_other_history(server: &mut Server, repository: &Repository, database: &Database) -> Result<()> {
    let (_, segment) = server.writing()?;
    let timeline = segment.timeline();
    if timeline == Timeline(1) {
        return Ok(());
    }
    let name = WalName::History(timeline).to_string();
    let Some(ours) = server.wal_text(&name)? else { return Ok(()) };
    let Some(object) = repository.archive(database).find(&name)? else { return Ok(()) };
    let theirs = String::from_utf8_lossy(&repository.wal_file(database, &object.key)?).into_owned();
    let last = |text: &str| text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default().to_owned();
    match ours == theirs {
        true => Ok(()),
        false => Err(Error::new(format!(
            "timeline {timeline} of the server is not that of the archive: {name} ends with \"{}\" there, \"{}\" in the archive",
            last(&ours),
            last(&theirs)
        ))
        .hint("two servers were promoted to the same timeline; see \"Two servers on one timeline\" in docs/operations.md")),
    }
}

/// The segment size of a cluster.
pub fn segment_size(database: &Database) -> Result<SegmentSize> {
    SegmentSize::new(database.wal_segment_size).context(|| "pg_control".into())
}
